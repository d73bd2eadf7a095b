"""A copy of a model with its layers wrapped: what the functions of TFMOT's API do to a model."""

import functools
from collections.abc import Callable

import keras

from tfcompress.graph.expand import expand
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.keras_hooks.walk import is_graph
from tfcompress.tfmot.keras2 import refuse_keras_2

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
# Layers of Keras that have kernels, for those that are not built and cannot be asked.
_WITH_KERNELS = (
    *_SEPARABLE,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.Embedding,
    keras.layers.RNN,
    keras.layers.Bidirectional,
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)


def wrapped(
    model: keras.Model, wrap: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> keras.Model:
    """A copy of a model, with weights of its own, in which `wrap` has been around every layer.

    The structure stays, names and nested models included. A subclassed model, or one that holds
    one, becomes its flat graph, see `tfcompress.expand`.

    Args:
        model: A model; an unbuilt Sequential gives an unbuilt one.
        wrap: Layer (a copy, with its weights) -> layer, the same where nothing is to be done.

    Returns:
        The new model, not compiled.

    Raises:
        ValueError: A subclassed model is not built, or cannot be expanded.

    Example:

    >>> from tfcompress.layers import L1
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [layer.name for layer in wrapped(model, L1).layers]
    ['l1_head']
    """
    if not _is_made_of_graphs(model):
        model = expand(model)

    built_later = []

    def copy(layer):
        if not isinstance(layer, keras.layers.Layer):
            return layer
        if isinstance(layer, keras.layers.Lambda):
            return wrap(layer)  # Its function is in no config that Keras would trust.
        # A layer that holds what is not registered makes its twin by itself.
        twin = getattr(layer, "twin", functools.partial(_twin, layer))()
        if isinstance(layer, keras.layers.InputLayer):
            return twin
        if not _build_as(layer, twin):
            built_later.append((layer, twin))
        return wrap(twin)

    clone = keras.models.clone_model(model, clone_function=copy, recursive=True)
    for layer, twin in built_later:
        twin.set_weights(layer.get_weights())
    return clone


def require_model(model, function: str) -> None:
    """Raise a ValueError unless `model` is a model of Keras 3."""
    refuse_keras_2(model, function)
    if not isinstance(model, keras.Model):
        raise ValueError(f"{function} expected a keras.Model, got {type(model).__name__}.")


def has_kernels(layer: keras.layers.Layer, trainable: bool = True) -> bool:
    """Whether a layer has weights that TFMOT compresses; depthwise convolutions have none.

    Args:
        layer: A layer, built or not. One of the user's own that is not built is taken to have some.
        trainable: Whether frozen weights do not count.

    Example:

    >>> has_kernels(keras.layers.LSTM(4)), has_kernels(keras.layers.ReLU())
    (True, False)
    """
    if isinstance(layer, _DEPTHWISE) or (trainable and not layer.trainable):
        return False
    if layer.built:
        return any(variable.trainable or not trainable for variable, _ in weight_axes(layer))
    if isinstance(layer, keras.layers.TimeDistributed):
        return has_kernels(layer.layer, trainable)
    from_keras = type(layer).__module__.split(".")[0] == "keras"
    return isinstance(layer, _WITH_KERNELS) or not from_keras


def depthwise_kernels(layer: keras.layers.Layer) -> str | None:
    """The glob of what TFMOT leaves whole in a layer with other kernels: few weights that matter.

    >>> depthwise_kernels(keras.layers.SeparableConv2D(4, 3))
    '*depthwise_kernel'
    """
    return "*depthwise_kernel" if isinstance(layer, _SEPARABLE) else None


def _twin(layer):
    return layer.__class__.from_config(layer.get_config())


def _build_as(layer, twin) -> bool:
    """Give a layer the weights of its twin before it is wrapped; whether that is done."""
    if layer.built and layer.weights:
        twin.build_from_config(layer.get_build_config())
        if not twin.built:
            return False
        twin.set_weights(layer.get_weights())
    return True


def _is_made_of_graphs(model) -> bool:
    if not isinstance(model, keras.Model):
        return True
    return is_graph(model) and all(map(_is_made_of_graphs, model.layers))
