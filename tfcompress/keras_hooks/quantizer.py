"""What fake-quantizes one layer: its weights on their own grids, its activations on ranges."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from tfcompress.keras_hooks.overlay import (
    Overlay,
    children,
    has_middle,
    in_training,
    raw_value,
)
from tfcompress.ops import fake_quant as fq
from tfcompress.ops import ranges
from tfcompress.ops.schemes import Scheme

_CALIBRATING = contextvars.ContextVar("calibrating", default=None)
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
        percentile: Share of a batch's values that it is to hold, in (50, 100]; 100 takes its
            extremes.
        moving: In-graph predicate; once it is false, the range stays as it is. None for always.
    """

    def __init__(
        self,
        variable: keras.Variable,
        percentile: float = 100.0,
        moving: Callable[[], tf.Tensor] | None = None,
    ):
        self.variable, self.percentile, self.moving = variable, percentile, moving

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """Take a batch into account; returns the new `[low, high]`."""
        bounds = self.bounds()
        whole = self.percentile == 100.0
        seen = ranges.extremes(x) if whole else ranges.percentiles(x, self.percentile)
        moved = ranges.moving_range(bounds, seen)
        if self.moving is not None:
            moved = tf.where(self.moving(), moved, bounds)
        self.variable.assign(moved)
        return moved

    def bounds(self) -> tf.Tensor:
        """`[low, high]` as it is."""
        return raw_value(self.variable)


class LearnedRange:
    """A range that is trained with the weights (LSQ+); the first batch it sees sets it.

    Args:
        variable: A trainable float32 variable of shape `(2,)`, zeros at first.
    """

    def __init__(self, variable: keras.Variable):
        self.variable = variable

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """`[low, high]`, with a gradient; set from `x` if it was not set yet."""
        bounds = self.bounds()
        settled = tf.where(ranges.range_is_empty(bounds), ranges.extremes(x), bounds)
        self.variable.assign(settled)
        return settled

    def bounds(self) -> tf.Tensor:
        """`[low, high]` as it is."""
        return raw_value(self.variable)


class FollowedRange:
    """The range of another layer, used as it is: for operators whose kernels keep the scale."""

    def __init__(self, source: "Range"):
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


class DynamicRange:
    """The range that a batch has, whatever was seen before."""


Range = MovingRange | LearnedRange | FollowedRange | FixedRange | DynamicRange


@contextlib.contextmanager
def calibrating(observe: Callable[[MovingRange | LearnedRange, tf.Tensor], None]) -> Iterator[None]:
    """While this is on, calls hand what their ranges see to `observe`, and round no activation.

    Args:
        observe: `(range, tensor)`, called in the graph that is being traced, for each range that is
            a variable of its own: `range.variable` is its `[low, high]`.
    """
    token = _CALIBRATING.set(observe)
    try:
        yield
    finally:
        _CALIBRATING.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight of a layer on its grid.

    Args:
        variable: The float weight.
        axes: Axes that share one scale; see `ops.fake_quant.weight_grid`.
        scheme: How it is quantized.
        scale: A variable that holds the scale, one number for each that is shared, zeros until it
            is set; it is learned if it is trainable. None where the weight's extremes set it.
    """

    variable: keras.Variable
    axes: tuple[int, ...]
    scheme: Scheme
    scale: keras.Variable | None = None

    def quantize(self, w: tf.Tensor) -> tf.Tensor:
        """`w`, a value of the variable, on the grid."""
        if self.scale is None:
            return fq.fake_quant_weights(w, self.scheme, self.axes)
        scale, limits = self._settled(w), self.scheme.limits
        if not self.scale.trainable:
            return fq.fake_quant_weights(w, self.scheme, self.axes, self._spread(scale))
        count = fq.num_sharing(w.shape, self.scheme, self.axes)
        scale = self._spread(fq.gradient_scaled(scale, count, limits[1]))
        return fq.learned_fake_quant(w, scale, 0.0, limits)

    def grid(self) -> tuple[tf.Tensor, tf.Tensor]:
        """`(scale, zero point)` of the weight as it is, broadcastable to it."""
        w = raw_value(self.variable)
        if self.scale is None:
            return fq.weight_grid(w, self.scheme, self.axes)
        scale = self._spread(self._start_at(w))
        return scale, tf.zeros_like(scale)

    def set_scale(self, scale) -> None:
        """Keep `scale`, broadcastable to the weight, as from `ops.fake_quant.weight_scale`."""
        shape = self.variable.shape
        self.scale.assign(fq.compact_scale(scale, shape, self.scheme, self.axes))

    def _settled(self, w):
        scale = self._start_at(w)
        if self.scale.trainable and in_training():
            self.scale.assign(scale)
        return scale

    def _start_at(self, w):
        """The scale; while it is unset, the one it starts from."""
        scale = raw_value(self.scale)
        start = fq.learned_scale if self.scale.trainable else fq.weight_scale
        first = start(tf.stop_gradient(w), self.scheme, self.axes)
        first = fq.compact_scale(first, w.shape, self.scheme, self.axes)
        # A learned scale must not turn negative.
        return tf.where(tf.equal(scale, 0.0), first, tf.maximum(tf.abs(scale), 1e-8))

    def _spread(self, scale):
        return fq.spread_scale(scale, self.variable.shape, self.scheme, self.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerQuantizer:
    """The fake quantization of one layer; `overlay()` puts it into the layer's call.

    Args:
        layer: A built layer.
        weights: Its weights on their grids.
        activation_scheme: How its activations are quantized, or None.
        ranges: By place: `"middle"`, `"preactivation"`, `"output"`, and `"input_0"`, `"input_1"`,
            ... for the tensors of the first argument.
        active: In-graph predicate; until it is true, ranges are observed and nothing is quantized.
        wrapper: The wrapper whose call does this by itself, if it is one.
    """

    layer: keras.layers.Layer
    weights: Sequence[QuantizedWeight]
    activation_scheme: Scheme | None
    ranges: Mapping[str, Range]
    active: Callable[[], tf.Tensor] | None = None
    wrapper: keras.layers.Layer | None = None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of its weights, and that of its activations."""
        schemes = (*(weight.scheme for weight in self.weights), self.activation_scheme)
        return tuple(scheme for scheme in schemes if scheme is not None)

    def overlay(self) -> Overlay:
        """The overlay that trains (and observes ranges) and simulates (and does not)."""
        return self._overlay(self._quantize_weight, self._quantize_activations)

    def converter_overlay(self, keep: Callable[[tf.Variable], None]) -> Overlay:
        """The overlay in the converter's words: constant weights on the grid, TF's own operators.

        Args:
            keep: Receives the variables made for the weights, to be saved with the function.
        """
        baked = {}
        for weight in self.weights:
            on_grid = self._quantize_weight(raw_value(weight.variable), weight)
            baked[id(weight.variable)] = tf.Variable(on_grid, trainable=False)
            keep(baked[id(weight.variable)])
        return self._overlay(
            lambda w, weight: tf.convert_to_tensor(baked[id(weight.variable)]),
            self._converter_activations,
        )

    def _overlay(self, quantize_weight, quantize_activations) -> Overlay:
        weights = [
            (weight.variable, functools.partial(quantize_weight, weight=weight))
            for weight in self.weights
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
            middle=places.get("middle"),
            preactivation=places.get("preactivation"),
            output=places.get("output"),
        )

    def _quantize_weight(self, w, weight: QuantizedWeight):
        quantized = weight.quantize(w)
        return quantized if self.active is None else tf.where(self.active(), quantized, w)

    def _quantize_activations(self, x, source: Range):
        observe = _CALIBRATING.get()
        if observe is not None:
            if isinstance(source, MovingRange | LearnedRange):
                observe(source, x)
            return x
        quantized = self._on_grid(x, source)
        return quantized if self.active is None else tf.where(self.active(), quantized, x)

    def _on_grid(self, x, source: Range):
        scheme = self.activation_scheme
        if isinstance(source, DynamicRange):
            return fq.fake_quant_dynamic(x, scheme)
        training = in_training()
        bounds = source.observe(x) if training else source.bounds()
        if training and isinstance(source, LearnedRange):
            return fq.fake_quant_learned(x, bounds, scheme)
        averages = isinstance(source, FollowedRange)
        rounding = fq.fake_quant_averages if averages else fq.fake_quant_activations
        quantized = rounding(x, bounds, scheme)
        if training:
            return quantized
        # A model that was not trained yet has no range to round to.
        return tf.where(ranges.range_is_empty(bounds), x, quantized)

    def _converter_activations(self, x, source: Range):
        if isinstance(source, DynamicRange):  # The runtime sees to it.
            return x
        with tf.init_scope():
            bounds = source.bounds().numpy()
            low, high = (float(end) for end in fq.grid_bounds(bounds, self.activation_scheme))
        if not bounds.any():
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
        # Biases of attention and GRU have two axes, as have the centroids of channels.
        and not any(word in variable.name for word in ("bias", "centroids"))
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


def fixed_range(activation: str, scheme: Scheme) -> FixedRange | None:
    """The range that LiteRT gives the output of an activation, or None where it is free.

    Example:

    >>> fixed_range("softmax", Scheme(symmetric=False, granularity="tensor"))
    FixedRange(low=0.0, high=0.99609375)
    """
    if activation not in _FIXED_RANGES or scheme.symmetric:
        return None
    low, high = _FIXED_RANGES[activation]
    steps = 2**scheme.bits
    return FixedRange(low, high - (high - low) / steps)


def range_places(layer: keras.layers.Layer, output: bool = True) -> tuple[str, ...]:
    """Where a layer's activations need a range.

    Args:
        layer: A built layer.
        output: Whether its output needs one; False where the next operator is computed in the same
            kernel.

    Example:

    >>> layer = keras.layers.Dense(2, activation="softmax")
    >>> layer.build((None, 2))
    >>> range_places(layer)
    ('preactivation', 'output')
    """
    inside = ("middle",) if has_middle(layer) else ()
    if not output:
        return inside
    # A layer without weights gets its input from a layer that has a range on it already.
    computes = bool(layer.variables) and not isinstance(layer, _NORMALIZATIONS)
    if computes and not is_fused(activation_name(layer)):
        return (*inside, "preactivation", "output")
    return (*inside, "output")


def dynamic_places(layer: keras.layers.Layer) -> tuple[str, ...]:
    """Where a layer's activations are rounded when ranges are dynamic: before it multiplies.

    Example:

    >>> dynamic_places(keras.layers.ReLU()), dynamic_places(keras.layers.Embedding(4, 2))
    ((), ())
    """
    looks_up = isinstance(layer, keras.layers.Embedding)
    return ("input_0",) if layer.variables and weight_axes(layer) and not looks_up else ()
