"""Which layers of a model are pruned, where the runtime gains from some alone."""

import abc

import keras

from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import Uses
from tfcompress.layers import CompressionWrapper
from tfcompress.tfmot.models import require_model

_ELEMENTWISE = (
    keras.layers.Add,
    keras.layers.Multiply,
    keras.layers.ZeroPadding2D,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.Dropout,
    keras.layers.Identity,
)
_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid", "linear")
_OPS = ("Identity", "Add", "Subtract", "Multiply", "Relu", "Relu6", "Sigmoid")


class PruningPolicy(abc.ABC):
    """Which layers `prune_low_magnitude` prunes, and which models it takes. Subclass it."""

    @abc.abstractmethod
    def allow_pruning(self, layer):
        """Whether `layer` is pruned."""

    @abc.abstractmethod
    def ensure_model_supports_pruning(self, model):
        """Raise a ValueError that names what is in the way, if `model` is not supported."""


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Prune the 1x1 convolutions only, of a model that XNNPACK's sparse kernels can run.

    They run a part of a network that starts with a 3x3 convolution of 3 channels with stride 2, on
    input that `ZeroPadding2D` has padded by 1, and ends with `GlobalAveragePooling2D(keepdims=
    True)`; between them stand 1x1 and depthwise convolutions and elementwise operators.

    Example:

    >>> policy = PruneForLatencyOnXNNPack()
    >>> [policy.allow_pruning(keras.layers.Conv2D(8, size)) for size in (1, 3)]
    [True, False]

    Reference: Elsen et al. 2020, https://arxiv.org/abs/1911.09723.
    """

    def allow_pruning(self, layer):
        """Whether it is a 1x1 convolution."""
        return type(layer) is keras.layers.Conv2D and layer.kernel_size == (1, 1)

    def ensure_model_supports_pruning(self, model):
        """Raise a ValueError that names what is in the way, if XNNPACK cannot run it sparsely.

        Args:
            model: A built model; nested and subclassed ones are expanded.

        Raises:
            ValueError: No model, not built, no start or end was found, or the layer between them
                that is not supported.
        """
        require_model(model, "PruneForLatencyOnXNNPack")
        if not model.built:
            raise ValueError(
                f"Unbuilt models are not supported: build {model.name!r} or call it on a batch."
            )
        uses = Uses(expand(model))
        starts = [call for call in uses.calls if _is_start(call, uses)]
        if not starts:
            raise ValueError(
                "Could not find a Conv2D of 3x3 with stride 2, 3 input channels and padding "
                "'valid', behind a ZeroPadding2D(1), in the model."
            )
        if not any(_is_end(call) for call in uses.calls):
            raise ValueError("Could not find a GlobalAveragePooling2D layer in the model.")
        for call in _between(starts, uses):
            if not _is_supported(call, uses):
                raise ValueError(
                    f"Layer {call.operation.name!r} of type {type(call.operation).__name__} is not "
                    f"supported for the {type(self).__name__} pruning policy. Leave the policy out "
                    "to prune for size."
                )


def _between(starts, uses) -> list:
    """The calls behind the starts, up to the pooling, which is one of them."""
    found, waiting = {}, list(starts)
    while waiting:
        for output in waiting.pop().outputs:
            for reader in uses.readers.get(id(output), []):
                if id(reader) not in found:
                    found[id(reader)] = reader
                    waiting += [] if _is_end(reader) else [reader]
    return list(found.values())


def _is_end(call) -> bool:
    return isinstance(_layer(call), keras.layers.GlobalAveragePooling2D)


def _is_start(call, uses) -> bool:
    layer = _layer(call)
    return (
        type(layer) is keras.layers.Conv2D
        and tuple(layer.kernel.shape[:3]) == (3, 3, 3)
        and layer.strides == (2, 2)
        and layer.padding == "valid"
        and _padding_before(call, uses) == ((1, 1), (1, 1))
    )


def _padding_before(call, uses):
    """The padding of the one ZeroPadding2D that the call reads; None if it reads something else."""
    producer = uses.producers.get(id(call.inputs[0]))
    layer = _layer(producer) if producer is not None else None
    return layer.padding if isinstance(layer, keras.layers.ZeroPadding2D) else None


def _is_supported(call, uses) -> bool:
    layer = _layer(call)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return _is_supported_depthwise(call, layer, uses)
    if isinstance(layer, keras.layers.Conv2D):
        plain = layer.groups == 1 and layer.strides == layer.dilation_rate == (1, 1)
        return plain and layer.kernel_size == (1, 1)
    if isinstance(layer, keras.layers.GlobalAveragePooling2D):
        return layer.keepdims
    if isinstance(layer, keras.layers.BatchNormalization):
        return layer.axis in (-1, 3)
    if isinstance(layer, keras.layers.UpSampling2D):
        return layer.interpolation == "bilinear"
    if isinstance(layer, keras.layers.Activation):
        return getattr(layer.activation, "__name__", "") in _ACTIVATIONS
    return isinstance(layer, _ELEMENTWISE) or type(layer).__name__ in _OPS


def _is_supported_depthwise(call, layer, uses) -> bool:
    half = {(3, 3): 1, (5, 5): 2}.get(layer.kernel_size)
    if half is None or layer.depth_multiplier != 1 or layer.dilation_rate != (1, 1):
        return False
    if layer.padding == "same":
        return layer.strides == (1, 1)
    padded = _padding_before(call, uses) == ((half, half), (half, half))
    return padded and layer.strides in ((1, 1), (2, 2))


def _layer(call):
    """What was called, without compression wrappers around it."""
    layer = call.operation
    while isinstance(layer, CompressionWrapper):
        layer = layer.layer
    return layer
