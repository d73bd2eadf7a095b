"""What fake-quantizes one layer: its weights on their own grids, its activations on ranges."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from tfcompress.keras_hooks.overlay import Overlay, children, in_training, raw_value
from tfcompress.ops import fake_quant as fq

_CALIBRATING = contextvars.ContextVar("calibrating", default=False)
_ATTRIBUTE = "_tfcompress_quantizers"
# What LiteRT's kernels do with these outputs whatever the file says; in units of 1 / 2^bits.
_FIXED_RANGES = {"softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}
# Activations that integer kernels apply while they write their output.
_FUSED_ACTIVATIONS = ("linear", "relu", "relu6")
_NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
)


class MovingRange:
    """A range of activations: the moving average of what was seen in training.

    Args:
        variable: A non-trainable float32 variable of shape `(2,)`, zeros at first.
    """

    def __init__(self, variable: keras.Variable):
        self.variable = variable

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """Take a batch into account; returns the new `[low, high]`."""
        update = fq.widened_range if _CALIBRATING.get() else fq.moving_range
        bounds = update(self.variable.value, x)
        self.variable.assign(bounds)
        return bounds

    def bounds(self) -> tf.Tensor:
        """`[low, high]` as it is."""
        return tf.convert_to_tensor(self.variable.value)


class FollowedRange:
    """The range of another layer, used as it is: for operators whose kernels keep the scale."""

    def __init__(self, source: "MovingRange | FixedRange | FollowedRange"):
        self.source = source

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """`[low, high]` as it is."""
        return self.bounds()

    def bounds(self) -> tf.Tensor:
        """`[low, high]` as it is."""
        return self.source.bounds()


@dataclasses.dataclass(frozen=True)
class FixedRange:
    """A range that follows from the function: a softmax lies in `[0, 1]`."""

    low: float
    high: float

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """`[low, high]` as it is."""
        return self.bounds()

    def bounds(self) -> tf.Tensor:
        """`[low, high]` as it is."""
        return tf.constant([self.low, self.high])


@contextlib.contextmanager
def calibrating() -> Iterator[None]:
    """While this is on, calls widen the ranges to what they see, and round no activation."""
    token = _CALIBRATING.set(True)
    try:
        yield
    finally:
        _CALIBRATING.reset(token)


Range = MovingRange | FollowedRange | FixedRange


@dataclasses.dataclass(frozen=True, eq=False)
class LayerQuantizer:
    """The fake quantization of one layer; `overlay()` puts it into the layer's call.

    Args:
        layer: A built layer.
        weights: `(variable, axes that share a scale)` pairs.
        weight_scheme: A symmetric scheme, or None.
        activation_scheme: An asymmetric scheme, or None.
        ranges: By place: `"preactivation"`, `"output"`, and `"input_0"`, `"input_1"`, ... for the
            tensors of the first argument.
        active: In-graph predicate; until it is true, ranges are observed and nothing is quantized.
        wrapper: The wrapper whose call does this by itself, if it is one.
    """

    layer: keras.layers.Layer
    weights: Sequence[tuple[keras.Variable, tuple[int, ...]]]
    weight_scheme: fq.Scheme | None
    activation_scheme: fq.Scheme | None
    ranges: Mapping[str, Range]
    active: Callable[[], tf.Tensor] | None = None
    wrapper: keras.layers.Layer | None = None

    def overlay(self) -> Overlay:
        """The overlay that trains (and observes ranges) and simulates (and does not)."""
        return self._overlay(self._quantize_weights, self._quantize_activations)

    def converter_overlay(self, keep: Callable[[tf.Variable], None]) -> Overlay:
        """The overlay in the converter's words: constant weights on the grid, TF's own operators.

        Args:
            keep: Receives the variables made for the weights, to be saved with the function.
        """

        baked = {}
        if self.weight_scheme is not None:
            for variable, axes in self.weights:
                on_grid = self._quantize_weights(raw_value(variable), variable, axes)
                baked[id(variable)] = tf.Variable(on_grid, trainable=False)
                keep(baked[id(variable)])
        return self._overlay(
            lambda w, variable, axes: tf.convert_to_tensor(baked[id(variable)]),
            self._converter_activations,
        )

    def _overlay(self, quantize_weights, quantize_activations) -> Overlay:
        weights = [
            (variable, functools.partial(quantize_weights, variable=variable, axes=axes))
            for variable, axes in self.weights
            if self.weight_scheme is not None
        ]
        places = {
            place: functools.partial(quantize_activations, source=source)
            for place, source in self.ranges.items()
            if self.activation_scheme is not None
        }
        indices = [int(place[6:]) for place in places if place.startswith("input_")]
        return Overlay(
            weights=weights,
            inputs=[places.get(f"input_{i}") for i in range(max(indices, default=-1) + 1)],
            preactivation=places.get("preactivation"),
            output=places.get("output"),
        )

    def _quantize_weights(self, w, variable, axes):
        quantized = fq.fake_quant_weights(w, self.weight_scheme, axes)
        return quantized if self.active is None else tf.where(self.active(), quantized, w)

    def _quantize_activations(self, x, source: Range):
        if _CALIBRATING.get():
            source.observe(x)
            return x
        training = in_training()
        bounds = source.observe(x) if training else source.bounds()
        averages = isinstance(source, FollowedRange)
        rounding = fq.fake_quant_averages if averages else fq.fake_quant_activations
        quantized = rounding(x, bounds, self.activation_scheme)
        if not training:  # A model that was not trained yet has no range to round to.
            quantized = tf.where(fq.range_is_empty(bounds), x, quantized)
        return quantized if self.active is None else tf.where(self.active(), quantized, x)

    def _converter_activations(self, x, source: Range):
        with tf.init_scope():
            low, high = source.bounds().numpy().tolist()
        if low == high == 0.0:
            return x
        return tf.quantization.fake_quant_with_min_max_vars(
            x, low, high, num_bits=self.activation_scheme.bits
        )


def remember(model: keras.Model, quantizers: Sequence[LayerQuantizer], inputs=None) -> None:
    """Keep on a model the quantizers that it was trained with, for its export.

    Args:
        model: The model.
        quantizers: What it was trained with.
        inputs: Specs of what it was called on, for a model that does not know; nested.
    """
    settled = tuple(dataclasses.replace(quantizer, active=None) for quantizer in quantizers)
    model.__dict__[_ATTRIBUTE] = (settled, inputs)


def recall(model: keras.Model) -> tuple[LayerQuantizer, ...]:
    """The quantizers that a model was trained with; empty if none."""
    return model.__dict__.get(_ATTRIBUTE, ((), None))[0]


def recall_inputs(model: keras.Model):
    """The specs of what a model with quantizers was called on; None if it knows by itself."""
    return model.__dict__.get(_ATTRIBUTE, ((), None))[1]


def weight_axes(layer: keras.layers.Layer) -> list[tuple[keras.Variable, tuple[int, ...]]]:
    """The weights of a layer to quantize, with the axes that share a scale in LiteRT's kernels.

    Weights are the floating-point variables of 2 or more axes: kernels and embeddings.

    Args:
        layer: A built layer; of an RNN or another wrapper, the sublayers count.

    Returns:
        `(variable, axes)` pairs: all axes but those of the output channels.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3)
    >>> layer.build((None, 8, 8, 4))
    >>> [(variable.name, axes) for variable, axes in weight_axes(layer)]
    [('kernel', (0, 1))]
    """
    if isinstance(layer, _NORMALIZATIONS):
        return []
    inside = children(layer)
    theirs = {id(variable) for child in inside for variable in child.variables}
    own = [
        (variable, _shared_axes(layer, variable))
        for variable in layer.variables
        if id(variable) not in theirs
        and len(variable.shape) > 1
        and keras.backend.is_float_dtype(variable.dtype)
    ]
    return own + [pair for child in inside for pair in weight_axes(child)]


def _shared_axes(layer, variable) -> tuple[int, ...]:
    rank = len(variable.shape)
    axes = tuple(range(rank))
    if isinstance(layer, keras.layers.Embedding):
        return axes
    if isinstance(layer, keras.layers.EinsumDense) and variable.name == "kernel":
        return contracted_axes(layer.equation)
    if isinstance(layer, keras.layers.Conv1DTranspose | keras.layers.Conv2DTranspose):
        return (*axes[:-2], rank - 1)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D)
    if depthwise or variable.name == "depthwise_kernel":
        return axes[:-2]
    return axes[:-1]


def contracted_axes(equation: str) -> tuple[int, ...]:
    """The axes of an `EinsumDense` kernel that its equation sums over.

    Example:

    >>> contracted_axes("abcd,cde->abe")
    (0, 1)
    """
    operands, output = equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1].replace("...", "")
    return tuple(axis for axis, label in enumerate(kernel) if label not in output)


def activation_name(layer: keras.layers.Layer) -> str:
    """The name of the function a layer applies last; `"linear"` when it applies none.

    Example:

    >>> activation_name(keras.layers.Dense(2, activation="relu"))
    'relu'
    >>> activation_name(keras.layers.ReLU(negative_slope=0.1))
    'leaky_relu'
    """
    if isinstance(layer, keras.layers.ReLU):
        plain = not layer.negative_slope and not layer.threshold
        return "relu" if plain and layer.max_value in (None, 6) else "leaky_relu"
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    activation = layer.__dict__.get("activation")
    return getattr(activation, "__name__", "linear")


def is_fused(activation: str) -> bool:
    """Whether integer kernels apply this activation while they write their output.

    Example:

    >>> is_fused("relu"), is_fused("gelu")
    (True, False)
    """
    return activation in _FUSED_ACTIVATIONS


def fixed_range(activation: str, scheme: fq.Scheme) -> FixedRange | None:
    """The range that LiteRT gives the output of an activation, or None where it is free.

    Example:

    >>> fixed_range("softmax", fq.activation_scheme("int8"))
    FixedRange(low=0.0, high=0.99609375)
    """
    if activation not in _FIXED_RANGES:
        return None
    low, high = _FIXED_RANGES[activation]
    steps = 2**scheme.bits
    return FixedRange(low, high - (high - low) / steps)


def range_places(layer: keras.layers.Layer) -> tuple[str, ...]:
    """Where a layer's activations need a range when its output is read by others.

    Example:

    >>> layer = keras.layers.Dense(2, activation="softmax")
    >>> layer.build((None, 2))
    >>> range_places(layer)
    ('preactivation', 'output')
    """
    # A layer without weights gets its input from a layer that has a range on it already.
    computes = bool(layer.variables) and not isinstance(layer, _NORMALIZATIONS)
    if computes and not is_fused(activation_name(layer)):
        return ("preactivation", "output")
    return ("output",)
