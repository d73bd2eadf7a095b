"""Which channel each weight of a layer belongs to: what scaling a channel has to scale."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from tfcompress.graph.rebuild import Uses
from tfcompress.keras_hooks.nodes import Call

_CONVS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
# A constant input gives each output channel a constant, if no zeros are padded.
SHIFTABLE = (keras.layers.Dense, *_CONVS, *_DEPTHWISE)
LINEAR = (keras.layers.Dense, *_CONVS, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED)


class Values:
    """Weights in float64 while they are worked on; `store` writes them to their variables."""

    def __init__(self):
        self._values: dict[int, tuple[keras.Variable, np.ndarray]] = {}

    def __getitem__(self, variable: keras.Variable) -> np.ndarray:
        if id(variable) not in self._values:
            value = keras.ops.convert_to_numpy(variable).astype("float64")
            self._values[id(variable)] = variable, value
        return self._values[id(variable)][1]

    def __setitem__(self, variable: keras.Variable, value: np.ndarray) -> None:
        self._values[id(variable)] = variable, value

    def store(self) -> None:
        """Assign every value that was read or set."""
        for variable, value in self._values.values():
            variable.assign(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The channels on one side of a layer, in the weights that make or read them.

    Args:
        size: How many there are.
        weights: `(variable, index)` pairs: `index` is an integer array that broadcasts to the
            variable and says to which channel, `0` to `size - 1`, each weight belongs.
        biases: The same for what is scaled with the channels, but is no weight of theirs.
    """

    size: int
    weights: tuple[tuple[keras.Variable, np.ndarray], ...]
    biases: tuple[tuple[keras.Variable, np.ndarray], ...] = ()

    def ranges(self, values: Values) -> np.ndarray:
        """The largest magnitude among the weights of each channel."""
        ranges = np.zeros(self.size)
        for variable, index in self.weights:
            magnitudes = np.abs(values[variable])
            # Axes along which the channel is the same go first, for `maximum.at` is slow.
            index = index.reshape((1,) * (magnitudes.ndim - index.ndim) + index.shape)
            same = tuple(axis for axis, size in enumerate(index.shape) if size == 1)
            np.maximum.at(ranges, index, magnitudes.max(axis=same, keepdims=True))
        return ranges

    def scale(self, values: Values, factors: np.ndarray) -> None:
        """Multiply the weights and biases of each channel by its factor."""
        for variable, index in (*self.weights, *self.biases):
            values[variable] = values[variable] * factors[index]

    def regroup(self, labels: np.ndarray) -> Channels:
        """The same weights by other channels: `labels[i]` is the new name of channel `i`."""
        weights = tuple((variable, labels[index]) for variable, index in self.weights)
        return Channels(int(labels.max()) + 1, weights)


def made_by(layer: keras.layers.Layer) -> Channels:
    """The output channels of a linear layer.

    Args:
        layer: A built layer, one of `LINEAR`.

    Returns:
        Its `Channels`.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3, depth_multiplier=2)
    >>> layer.build((None, 8, 8, 3))
    >>> made_by(layer).weights[0][1].tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    kernel = main_kernel(layer)
    if isinstance(layer, _DEPTHWISE):
        index = _count(kernel.shape[-2:])
    elif isinstance(layer, _TRANSPOSED):
        index = np.arange(kernel.shape[-2])[:, None]
    else:
        index = np.arange(kernel.shape[-1])
    if isinstance(layer, _SEPARABLE):
        kernel, index = layer.pointwise_kernel, np.arange(layer.pointwise_kernel.shape[-1])
    return Channels(index.size, ((kernel, index),), _bias(layer, index.reshape(-1)))


def read_by(layer: keras.layers.Layer) -> Channels:
    """The input channels of a linear layer.

    Args:
        layer: A built layer, one of `LINEAR`.

    Returns:
        Its `Channels`, without biases.

    Example: the two filters of a second group read the channels behind.

    >>> layer = keras.layers.Conv1D(4, 1, groups=2)
    >>> layer.build((None, 8, 2))
    >>> read_by(layer).weights[0][1].tolist()
    [[0, 0, 1, 1]]
    """
    kernel = main_kernel(layer)
    if isinstance(layer, _TRANSPOSED):
        index = np.arange(kernel.shape[-1])
    elif isinstance(layer, _CONVS):
        inputs, outputs = kernel.shape[-2:]
        channels = np.arange(inputs * layer.groups).reshape(layer.groups, inputs)
        index = np.repeat(channels.T, outputs // layer.groups, axis=1)
    else:
        index = np.arange(kernel.shape[-2])[:, None]
    return Channels(int(index.max()) + 1, ((kernel, index),))


def inside(layer: keras.layers.Layer) -> tuple[Channels, Channels]:
    """The channels between the two convolutions of a separable one: made by, and read by.

    Example:

    >>> layer = keras.layers.SeparableConv2D(5, 3)
    >>> layer.build((None, 8, 8, 4))
    >>> [channels.size for channels in inside(layer)]
    [4, 4]
    """
    depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
    made = _count(depthwise.shape[-2:])
    read = np.arange(pointwise.shape[-2])[:, None]
    return Channels(made.size, ((depthwise, made),)), Channels(read.size, ((pointwise, read),))


def main_kernel(layer: keras.layers.Layer) -> keras.Variable:
    """The kernel that reads the input of a linear layer."""
    return layer.depthwise_kernel if isinstance(layer, _SEPARABLE) else layer.kernel


def has_inside(layer: keras.layers.Layer) -> bool:
    """Whether a layer is two convolutions with nothing between them."""
    return isinstance(layer, _SEPARABLE)


def channel_axis(layer: keras.layers.Layer) -> int:
    """The axis of the channels in what a layer reads and returns."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def obstacle(call: Call, uses: Uses) -> str | None:
    """Why the weights of a linear layer cannot be rescaled, or None.

    Args:
        call: A call of a layer with weights.
        uses: Of its model.
    """
    layer = call.operation
    if uses.is_shared(call):
        return f"{layer.name} is called more than once"
    if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
        return f"the weights of {layer.name} are quantized or adapted by LoRA"
    return None


def _count(shape) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(tuple(shape))


def _bias(layer, index):
    return () if layer.bias is None else ((layer.bias, index),)
