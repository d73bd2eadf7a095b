"""Cross-layer equalization: the channels between two layers get weights of equal range."""

from __future__ import annotations

import dataclasses
import logging

import keras
import numpy as np

from tfcompress.graph import channels as ch
from tfcompress.graph.expand import expand
from tfcompress.graph.fold import fold_batch_norm, norms_behind
from tfcompress.graph.rebuild import Uses, map_layers
from tfcompress.keras_hooks import nodes

logger = logging.getLogger("tfcompress")

_HOMOGENEOUS = (keras.activations.linear, keras.activations.relu, keras.activations.leaky_relu)
_HOMOGENEOUS_OPS = ("Relu", "LeakyRelu", "Identity")
# The same at every position of each channel, and nothing but 0 at 0.
_CHANNEL_WISE = (
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
)
_PADS = (keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D)
_SPATIAL = _PADS + (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.UpSampling1D,
    keras.layers.UpSampling2D,
    keras.layers.UpSampling3D,
)
_GLOBAL = (
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
)
_RELU6 = "ReLU6 does not scale with its input; replace_relu6=True makes it a ReLU"
# Below this share of the largest range of a layer, a channel counts as dead.
_DEAD = 1e-7
_TOLERANCE = 1e-4
_MAX_SWEEPS = 1000


def equalize(
    model: keras.Model, replace_relu6: bool = False, absorb_biases: bool = False
) -> keras.Model:
    """Equalize the ranges of the weights between layers, so that one scale a tensor fits them.

    A positive factor moves through what is positively homogeneous: `relu(s * x) = s * relu(x)`.
    Where one linear layer feeds another, channel `i` between them is divided by `s_i` in the
    weights and bias of the first, and multiplied in the second, with
    `s_i = sqrt(r1_i * r2_i) / r2_i` of the largest magnitudes `r1_i` and `r2_i` of the weights that
    make and read it. This is repeated over all pairs until nothing moves. Batch normalization is
    folded first.

    Layers are `Dense`, `Conv`, `DepthwiseConv`, `SeparableConv` (also within) and `ConvTranspose`;
    between them may lie ReLU (leaky, parametric), pooling, padding, cropping, upsampling, dropout,
    `Flatten` and `Reshape`, each with one reader. Channels whose weights are all 0 are left alone.
    The logger "tfcompress" says what was equalized and what was skipped, with the reason (INFO).

    Args:
        model: Any built model; see `tfcompress.expand`.
        replace_relu6: Whether every ReLU6 becomes a ReLU first. It changes outputs where a value
            exceeds 6.
        absorb_biases: Whether the part of a first bias that its channel exceeds almost always, by
            the batch norm that was folded: `c = max(0, beta - 3 * abs(gamma))`, moves on into the
            second, which narrows the range of the activations. It changes outputs where a value is
            below `c`, 1 in 740 of normally distributed ones. Only where zero padding does not stand
            in the way.

    Returns:
        A new flat Functional model with weights of its own and without the batch norms that could
        be folded. Its outputs in inference are those of `model` to rounding, but for what the two
        options say.

    Raises:
        ValueError: `model` cannot be expanded, or no pair of layers can be equalized.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="relu"),
    ...                           keras.layers.Dense(1)])
    >>> model.set_weights([np.diag([100.0, 1.0]), np.zeros(2), np.ones((2, 1)), np.zeros(1)])
    >>> equalized = equalize(model)
    >>> equalized.layers[1].kernel.numpy().round(3).tolist()
    [[10.0, 0.0], [0.0, 1.0]]
    >>> equalized.layers[2].kernel.numpy().round(3).tolist()
    [[10.0], [1.0]]

    Reference: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", https://arxiv.org/abs/1906.04721, sections 4.1.1 to 4.1.3.
    """
    norms = norms_behind(expand(model)) if absorb_biases else {}
    flat = fold_batch_norm(model)
    if replace_relu6:
        flat = _without_relu6(flat)
    pairs, skipped = _pairs(flat)
    for name, reason in skipped.items():
        logger.info("equalize: nothing behind %s: %s", name, reason)
    if not pairs:
        raise ValueError(
            f"equalize found no two layers of {model.name!r} with only ReLU, pooling and the like "
            f"between them: {skipped or 'it has no linear layer'}. Leave the model as it is."
        )
    values = ch.Values()
    divisors = _equalize(pairs, values)
    if absorb_biases:
        _absorb(pairs, values, norms, divisors)
    values.store()
    return flat


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Two layers, or the two halves of a separable one, with the channels between them.

    Args:
        first: The layer that makes the channels.
        second: The layer that reads them.
        made: The channels in the weights of the first.
        read: The same channels in the weights of the second.
        padded: Whether zeros are put around the channels on the way.
    """

    first: keras.layers.Layer
    second: keras.layers.Layer
    made: ch.Channels
    read: ch.Channels
    padded: bool = False

    @property
    def is_within(self) -> bool:
        """Whether both are halves of one separable convolution."""
        return self.first is self.second

    def __str__(self):
        return (
            f"within {self.first.name}"
            if self.is_within
            else f"{self.first.name} - {self.second.name}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Way:
    """How far the channels of a layer have come.

    Args:
        call: The call behind which they are.
        axis: Their axis there, not negative.
        labels: The channel of each index of the axis.
        padded: Whether zeros were put around them.
    """

    call: nodes.Call
    axis: int
    labels: np.ndarray
    padded: bool = False


def _pairs(flat) -> tuple[list[_Pair], dict[str, str]]:
    """The pairs in graph order, and layer -> why no pair begins with it."""
    uses, pairs, skipped = Uses(flat), [], {}
    for call in uses.calls:
        layer = call.operation
        if type(layer) not in ch.LINEAR:
            continue
        reason = ch.obstacle(call, uses)
        if reason is None and ch.has_inside(layer):
            pairs.append(_Pair(layer, layer, *ch.inside(layer)))
        if reason is None:
            found = _pair_behind(call, uses)
            reason = found if isinstance(found, str) else pairs.append(found)
        if reason is not None:
            skipped[layer.name] = reason
    return pairs, skipped


def _pair_behind(call, uses) -> _Pair | str:
    layer = call.operation
    if not _is_homogeneous(layer.activation):
        return _reason(layer.activation)
    made = ch.made_by(layer)
    axis = ch.channel_axis(layer) % len(call.outputs[0].shape)
    way = _Way(call, axis, np.arange(made.size))
    while not isinstance(way, str):
        reader = uses.only_reader(way.call)
        if reader is None:
            return _no_only_reader(way.call, uses)
        if type(reader.operation) in ch.LINEAR:
            return _join(layer, made, way, reader, uses)
        way = _through(way, reader)
    return way


def _no_only_reader(call, uses) -> str:
    if uses.is_output(call):
        return "it is an output of the model"
    readers = [reader.operation.name for reader in uses.readers.get(id(call.outputs[0]), [])]
    return f"{call.operation.name} has several readers: {', '.join(readers)}"


def _join(layer, made, way, reader, uses) -> _Pair | str:
    second = reader.operation
    if reason := ch.obstacle(reader, uses):
        return reason
    if ch.channel_axis(second) % len(reader.inputs[0].shape) != way.axis:
        return f"{second.name} reads another axis as its channels"
    return _Pair(layer, second, made, ch.read_by(second).regroup(way.labels), way.padded)


def _through(way: _Way, reader: nodes.Call) -> _Way | str:
    """The channels behind a call that treats each by itself and scales with it."""
    operation = reader.operation
    moved = dataclasses.replace(way, call=reader)
    if isinstance(operation, keras.layers.ReLU):
        if operation.max_value is not None:
            return _RELU6 if operation.max_value == 6 else f"{operation.name} has a maximum"
        return moved if not operation.threshold else f"{operation.name} has a threshold"
    if isinstance(operation, keras.layers.Activation):
        kept = _is_homogeneous(operation.activation)
        return moved if kept else _reason(operation.activation)
    if isinstance(operation, _CHANNEL_WISE) or type(operation).__name__ in _HOMOGENEOUS_OPS:
        return moved
    if type(operation).__name__ == "Relu6":
        return _RELU6
    shapes = reader.inputs[0].shape, reader.outputs[0].shape
    if isinstance(operation, _SPATIAL + _GLOBAL):
        if ch.channel_axis(operation) % len(shapes[0]) != way.axis:
            return f"{operation.name} has its channels on another axis"
        if isinstance(operation, _GLOBAL) and not operation.keepdims:
            return dataclasses.replace(moved, axis=1)
        return dataclasses.replace(moved, padded=way.padded or isinstance(operation, _PADS))
    reshapes = isinstance(operation, keras.layers.Flatten | keras.layers.Reshape)
    if reshapes or type(operation).__name__ == "Reshape":
        return _reshaped(moved, *shapes)
    return f"{operation.name} ({type(operation).__name__}) does not scale channel by channel"


def _reshaped(way: _Way, before, after) -> _Way | str:
    """The channels on the last axis behind a reshape, if each index there is of one channel."""
    name = way.call.operation.name
    if None in before[1:] or None in after[1:]:
        return f"{name} reshapes an axis of unknown size"
    spread = way.labels.reshape([-1 if axis == way.axis else 1 for axis in range(1, len(before))])
    rows = np.broadcast_to(spread, before[1:]).reshape(-1, after[-1])
    if (rows != rows[0]).any():
        return f"{name} mixes channels"
    return dataclasses.replace(way, axis=len(after) - 1, labels=rows[0])


def _is_homogeneous(activation) -> bool:
    return activation is None or activation in _HOMOGENEOUS


def _reason(activation) -> str:
    if activation is keras.activations.relu6:
        return _RELU6
    name = getattr(activation, "__name__", activation)
    return f"the activation {name} does not scale with its input"


def _equalize(pairs: list[_Pair], values: ch.Values) -> dict[int, np.ndarray]:
    """Equalize until nothing moves; returns what each first layer was divided by, by its id."""
    divisors = [np.ones(pair.made.size) for pair in pairs]
    for _ in range(_MAX_SWEEPS):
        change = 0.0
        for divisor, pair in zip(divisors, pairs, strict=True):
            factors = _factors(pair.made.ranges(values), pair.read.ranges(values))
            pair.made.scale(values, 1 / factors)
            pair.read.scale(values, factors)
            divisor *= factors
            change = max(change, np.abs(np.log(factors)).max())
        if change < _TOLERANCE:
            break
    else:
        logger.info("equalize: after %d sweeps scales still moved by %g", _MAX_SWEEPS, change)
    for divisor, pair in zip(divisors, pairs, strict=True):
        logger.info("equalize: %s: divided by %g to %g", pair, divisor.min(), divisor.max())
    by_pair = zip(pairs, divisors, strict=True)
    return {id(pair.first): divisor for pair, divisor in by_pair if not pair.is_within}


def _factors(r1: np.ndarray, r2: np.ndarray) -> np.ndarray:
    """`sqrt(r1 * r2) / r2`, and 1 for dead channels."""
    alive = (r1 > _DEAD * r1.max()) & (r2 > _DEAD * r2.max())
    return np.sqrt(np.where(alive, r1, 1.0) / np.where(alive, r2, 1.0))


def _absorb(pairs, values, norms, divisors) -> None:
    """Move what channels exceed almost always from the bias of each first layer to the second."""
    for pair in pairs:
        norm = norms.get(pair.first.name)
        if norm is None or pair.is_within:
            continue
        if reason := _keeps_bias(pair):
            logger.info("equalize: the biases of %s stay: %s", pair, reason)
            continue
        surplus = np.maximum(0.0, _lowest(norm)) / divisors[id(pair.first)]
        values[pair.first.bias] = values[pair.first.bias] - surplus
        values[pair.second.bias] = values[pair.second.bias] + _response(pair, values, surplus)
        logger.info("equalize: absorbed biases of %s, up to %g", pair, surplus.max())


def _lowest(norm) -> np.ndarray:
    """Three standard deviations below the mean of what a batch norm returns."""
    gamma = keras.ops.convert_to_numpy(norm.gamma) if norm.scale else 1.0
    beta = keras.ops.convert_to_numpy(norm.beta) if norm.center else 0.0
    return beta - 3.0 * np.abs(gamma)


def _keeps_bias(pair: _Pair) -> str | None:
    second = pair.second
    if pair.first.bias is None or second.bias is None:
        return "one of the two layers has none"
    if type(second) not in ch.SHIFTABLE:
        return f"{type(second).__name__} passes a constant on by position"
    point = all(size == 1 for size in getattr(second, "kernel_size", ()))
    if pair.padded or (getattr(second, "padding", "valid") != "valid" and not point):
        return "the padded zeros would have to be shifted too"
    return None


def _response(pair: _Pair, values: ch.Values, constant: np.ndarray) -> np.ndarray:
    """What the second layer makes, without its bias, of channels that are constant."""
    (kernel, read), (_, made) = pair.read.weights[0], ch.made_by(pair.second).weights[0]
    sums = np.zeros(pair.second.bias.shape)
    products = values[kernel] * constant[read]
    np.add.at(sums, np.broadcast_to(made, products.shape), products)
    return sums


def _without_relu6(flat: keras.Model) -> keras.Model:
    copies = []

    def replace(operation):
        copy = _relu_for(operation)
        if copy is None:
            return operation
        logger.info("equalize: %s is a ReLU now, no ReLU6", operation.name)
        copies.append((operation, copy))
        return copy

    replaced = map_layers(flat, replace)
    for layer, copy in copies:
        if isinstance(layer, keras.layers.Layer):
            copy.set_weights(layer.get_weights())
    return replaced


def _relu_for(operation) -> keras.layers.Layer | None:
    """The same layer with ReLU for ReLU6; None if it has none."""
    if type(operation).__name__ == "Relu6":
        return keras.layers.ReLU(name=operation.name)
    if isinstance(operation, keras.layers.ReLU) and operation.max_value == 6:
        return type(operation).from_config(operation.get_config() | {"max_value": None})
    if getattr(operation, "activation", None) is keras.activations.relu6:
        return type(operation).from_config(operation.get_config() | {"activation": "relu"})
    return None
