"""Fake quantization: floats rounded to an integer grid, with a straight-through gradient."""

import dataclasses
import re

import tensorflow as tf

GRANULARITIES = ("tensor", "channel")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized: an integer grid and what shares one scale.

    A symmetric scheme has zero point 0 and leaves out the most negative integer, so that
    `-w` is representable whenever `w` is; an asymmetric one covers `[low, high]` exactly once.

    Args:
        bits: Width of the integers, 2 to 8.
        symmetric: Whether the zero point is 0.
        granularity: `"tensor"`, or `"channel"`: one scale for each output channel.

    Raises:
        ValueError: `bits` or `granularity` is not one of the above.

    Example:

    >>> Scheme(bits=4).limits
    (-7, 7)
    >>> Scheme(symmetric=False, granularity="tensor").limits
    (-128, 127)
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"

    def __post_init__(self):
        if self.bits not in range(2, 9):
            raise ValueError(f"Scheme has bits={self.bits!r}; pass an integer from 2 to 8.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Scheme has granularity={self.granularity!r}; pass one of {GRANULARITIES}."
            )

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        return integer_limits(self.bits, narrow=self.symmetric)

    def get_config(self) -> dict:
        """Return the arguments that rebuild this scheme."""
        return dataclasses.asdict(self)


def weight_scheme(spec: "str | dict | Scheme | None") -> Scheme | None:
    """Resolve what a user passes as `weights`: `"int8"` is symmetric, one scale a channel.

    Args:
        spec: `"int2"` to `"int8"`, a `Scheme`, its config, or None (leave float).

    Returns:
        The scheme, or None.

    Raises:
        ValueError: `spec` is none of these, or an asymmetric scheme.

    Example:

    >>> weight_scheme("int8")
    Scheme(bits=8, symmetric=True, granularity='channel')
    """
    scheme = _resolve(spec, "weights", symmetric=True, granularity="channel")
    if scheme is not None and not scheme.symmetric:
        raise ValueError(
            f"weights={spec!r} is asymmetric, which would move pruned zeros off zero and which "
            "no integer kernel reads; pass a scheme with symmetric=True."
        )
    return scheme


def activation_scheme(spec: "str | dict | Scheme | None") -> Scheme | None:
    """Resolve what a user passes as `activations`: `"int8"` is asymmetric, one scale a tensor.

    Args:
        spec: `"int2"` to `"int8"`, a `Scheme`, its config, or None (leave float).

    Returns:
        The scheme, or None.

    Raises:
        ValueError: `spec` is none of these, or a scheme that is not asymmetric per tensor.

    Example:

    >>> activation_scheme("int8")
    Scheme(bits=8, symmetric=False, granularity='tensor')
    """
    scheme = _resolve(spec, "activations", symmetric=False, granularity="tensor")
    if scheme is not None and (scheme.symmetric or scheme.granularity != "tensor"):
        raise ValueError(
            f"activations={spec!r} must be asymmetric with one scale a tensor: "
            'Scheme(bits=..., symmetric=False, granularity="tensor").'
        )
    return scheme


def _resolve(spec, argument, symmetric, granularity):
    if spec is None or isinstance(spec, Scheme):
        return spec
    if isinstance(spec, dict):
        return Scheme(**spec)
    match = re.fullmatch(r"int([2-8])", spec) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(
            f'{argument}={spec!r} is not a quantization scheme; pass "int8" ("int2" to "int8"), '
            "a tfcompress.ops.Scheme, or None to leave them float."
        )
    return Scheme(int(match[1]), symmetric, granularity)


def integer_limits(bits: int, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest signed integer of `bits` bits; `narrow` leaves out the smallest.

    Example:

    >>> integer_limits(8), integer_limits(8, narrow=True)
    ((-128, 127), (-127, 127))
    """
    high = 2 ** (bits - 1) - 1
    return (-high if narrow else -high - 1), high


def symmetric_scale(x: tf.Tensor, bits: int = 8, axis=None) -> tf.Tensor:
    """Scale that lets the largest magnitude fill a symmetric grid: `max|x| / (2^(bits-1) - 1)`.

    Args:
        x: Float tensor of any shape; float16 and bfloat16 are computed in float32.
        bits: Width of the integers, 2 to 8.
        axis: Axes that share one scale; None shares it over the whole tensor.

    Returns:
        A float32 scale, broadcastable to `x`; 1 where every value is 0.

    Example:

    >>> symmetric_scale(tf.constant([[1.27, 0.0], [-2.54, 0.0]]), axis=0).numpy()
    array([[0.02, 1.  ]], dtype=float32)
    """
    largest = tf.reduce_max(tf.abs(tf.cast(x, tf.float32)), axis=axis, keepdims=True)
    scale = largest / integer_limits(bits)[1]
    # A denormal maximum over 127 rounds to 0, and 0 / 0 is NaN.
    return tf.where(tf.equal(scale, 0.0), tf.ones_like(scale), scale)


def asymmetric_scale(low, high, bits: int = 8) -> tuple[tf.Tensor, tf.Tensor]:
    """Scale and zero point of a grid over `[low, high]`, nudged so that 0 is on the grid.

    `scale = (high - low) / (2^bits - 1)`; the zero point is rounded half up, as TensorFlow's
    fake-quant kernels and the LiteRT converter do, so that all three agree.

    Args:
        low: Scalar or tensor; values above 0 are taken as 0.
        high: Like `low`; values below 0 are taken as 0.
        bits: Width of the integers, 2 to 8.

    Returns:
        A float32 scale (1 for an empty range), and a float32 whole number, the zero point.

    Example:

    >>> scale, zero_point = asymmetric_scale(-1.0, 4.1)
    >>> round(float(scale), 6), float(zero_point)
    (0.02, -78.0)
    """
    low = tf.minimum(tf.cast(low, tf.float32), 0.0)
    high = tf.maximum(tf.cast(high, tf.float32), 0.0)
    smallest, largest = integer_limits(bits)
    scale = (high - low) / (largest - smallest)
    scale = tf.where(tf.equal(scale, 0.0), tf.ones_like(scale), scale)
    steps_below_zero = tf.clip_by_value(
        tf.floor(-low / scale + 0.5), 0.0, float(largest - smallest)
    )
    return scale, smallest + steps_below_zero


def quantize(x, scale, zero_point=0.0, bits: int = 8, narrow: bool = False) -> tf.Tensor:
    """Round to integers: `clip(round(x / scale) + zero_point)`, as int8.

    Args:
        x: Float tensor.
        scale: Positive, broadcastable to `x`.
        zero_point: Whole number, broadcastable to `x`.
        bits: Width of the integers, 2 to 8.
        narrow: Leave out the most negative integer.

    Returns:
        An int8 tensor of the shape of `x`.

    Example:

    >>> quantize(tf.constant([-1.0, 0.26, 9.0]), 0.1, zero_point=-5.0).numpy()
    array([-15,  -2,  85], dtype=int8)
    """
    low, high = integer_limits(bits, narrow)
    steps = tf.round(tf.cast(x, tf.float32) / scale) + zero_point
    return tf.cast(tf.clip_by_value(steps, float(low), float(high)), tf.int8)


def dequantize(q, scale, zero_point=0.0) -> tf.Tensor:
    """Undo `quantize`: `(q - zero_point) * scale`, in float32.

    Example:

    >>> dequantize(tf.constant([-15, -2], tf.int8), 0.1, zero_point=-5.0).numpy()
    array([-1. ,  0.3], dtype=float32)
    """
    return (tf.cast(q, tf.float32) - zero_point) * scale


def fake_quant(x, scale, zero_point=0.0, bits: int = 8, narrow: bool = False) -> tf.Tensor:
    """Quantize and dequantize, with a straight-through gradient.

    Forward: `(clip(round(x / scale) + zero_point) - zero_point) * scale`. Backward: the gradient
    of `x` where it rounds to a value of the grid, 0 beyond; none for scale and zero point.

    Args:
        x: Float tensor of any rank; float16 and bfloat16 are computed in float32.
        scale: Positive, broadcastable to `x`.
        zero_point: Whole number, broadcastable to `x`.
        bits: Width of the integers, 2 to 8.
        narrow: Leave out the most negative integer.

    Returns:
        A tensor of the shape and dtype of `x`, at most `scale / 2` from it inside the range.

    Example:

    >>> fake_quant(tf.constant([0.26, -9.0]), 0.1, bits=4, narrow=True).numpy()
    array([ 0.3, -0.7], dtype=float32)

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432.
    """
    scale, zero_point = tf.stop_gradient(scale), tf.stop_gradient(zero_point)

    smallest, largest = integer_limits(bits, narrow)
    # Up to half a step beyond the grid still rounds to its end. The largest weight of a channel,
    # which sets the scale, may lie an ulp beyond, and has to learn too.
    low, high = (smallest - zero_point - 0.49) * scale, (largest - zero_point + 0.49) * scale

    @tf.custom_gradient
    def straight_through(x):
        wide = tf.cast(x, tf.float32)
        clipped = tf.clip_by_value(wide, low, high)

        def gradient(upstream):
            return tf.where(tf.equal(clipped, wide), upstream, tf.zeros_like(upstream))

        return tf.cast(tf.round(clipped / scale) * scale, x.dtype), gradient

    return straight_through(tf.convert_to_tensor(x))


def fake_quant_weights(w, scheme: Scheme, axis=None) -> tf.Tensor:
    """Fake-quantize weights on the symmetric grid that their own largest magnitudes set.

    Args:
        w: Float tensor of any rank.
        scheme: A symmetric scheme.
        axis: Axes that share one scale under granularity `"channel"`.

    Returns:
        A tensor like `w`. Zeros stay zeros.

    Example:

    >>> fake_quant_weights(tf.constant([[1.0], [0.3], [0.0]]), Scheme(bits=2), axis=0).numpy()
    array([[1.], [0.], [0.]], dtype=float32)
    """
    shared = axis if scheme.granularity == "channel" else None
    scale = symmetric_scale(w, scheme.bits, shared)
    return fake_quant(w, scale, bits=scheme.bits, narrow=True)


def fake_quant_activations(x, bounds, scheme: Scheme) -> tf.Tensor:
    """Fake-quantize activations on the asymmetric grid over `bounds = [low, high]`.

    Args:
        x: Float tensor of any rank.
        bounds: Two numbers, `low <= 0 <= high`.
        scheme: An asymmetric scheme.

    Returns:
        A tensor like `x`.

    Example:

    >>> scheme = activation_scheme("int8")
    >>> fake_quant_activations(tf.constant([0.0, 1.013, 9.0]), [0.0, 5.1], scheme).numpy().round(4)
    array([0.  , 1.02, 5.1 ], dtype=float32)
    """
    scale, zero_point = asymmetric_scale(bounds[0], bounds[1], scheme.bits)
    return fake_quant(x, scale, zero_point, scheme.bits)


def fake_quant_averages(x, bounds, scheme: Scheme) -> tf.Tensor:
    """Fake-quantize the averages of values that are on the grid over `bounds` already.

    LiteRT's average pooling sums the stored integers and rounds the quotient half away from zero.
    Halves are frequent (a quarter of all averages of four), so that they matter, and float division
    misses them by an ulp; they are found first.

    Args:
        x: Averages of at most some hundred values each.
        bounds: Two numbers, `low <= 0 <= high`.
        scheme: An asymmetric scheme.

    Returns:
        A tensor like `x`.

    Example:

    >>> scheme = activation_scheme("int8")  # 0.025 is the stored integer -125.5 here.
    >>> fake_quant_averages(tf.constant([0.025]), [0.0, 2.55], scheme).numpy()
    array([0.02], dtype=float32)
    """
    scale, zero_point = asymmetric_scale(bounds[0], bounds[1], scheme.bits)
    stored = tf.round(tf.cast(x, tf.float32) / scale * 1024.0) / 1024.0 + zero_point
    rounded = tf.sign(stored) * tf.floor(tf.abs(stored) + 0.5)
    on_grid = tf.cast(dequantize(rounded, scale, zero_point), x.dtype)
    return fake_quant(x + tf.stop_gradient(on_grid - x), scale, zero_point, scheme.bits)


def moving_range(bounds, x, momentum: float = 0.99) -> tf.Tensor:
    """One step of the moving average of a batch's extremes; the first batch sets it.

    `low <- momentum * low + (1 - momentum) * min(x, 0)`, and likewise `high` with the maximum.

    Args:
        bounds: `[low, high]`, the averages so far; `[0, 0]` when nothing was seen yet.
        x: Float tensor, the batch. Under `tf.distribute`, the extremes are those of all replicas.
        momentum: In [0, 1).

    Returns:
        The new `[low, high]` in float32, with `low <= 0 <= high`.

    Example:

    >>> moving_range([0.0, 0.0], tf.constant([-1.0, 3.0])).numpy()
    array([-1.,  3.], dtype=float32)
    >>> moving_range([-1.0, 3.0], tf.constant([1.0, 4.0]), momentum=0.5).numpy()
    array([-0.5,  3.5], dtype=float32)
    """
    bounds, extremes = tf.cast(bounds, tf.float32), _extremes(x)
    moved = momentum * bounds + (1.0 - momentum) * extremes
    return tf.where(range_is_empty(bounds), extremes, moved)


def widened_range(bounds, x) -> tf.Tensor:
    """The range that holds `bounds = [low, high]` and all of `x`.

    Example:

    >>> widened_range([-1.0, 3.0], tf.constant([1.0, 4.0])).numpy()
    array([-1.,  4.], dtype=float32)
    """
    bounds, extremes = tf.cast(bounds, tf.float32), _extremes(x)
    return tf.stack([tf.minimum(bounds[0], extremes[0]), tf.maximum(bounds[1], extremes[1])])


def range_is_empty(bounds) -> tf.Tensor:
    """Whether `[low, high]` is `[0, 0]`: a range that has seen nothing, or only zeros."""
    return tf.reduce_all(tf.equal(bounds, 0.0))


def _extremes(x):
    """`[min(x, 0), max(x, 0)]` of a batch; 0 must be on the grid."""
    x = tf.stop_gradient(tf.cast(x, tf.float32))
    low, high = tf.minimum(tf.reduce_min(x), 0.0), tf.maximum(tf.reduce_max(x), 0.0)
    return _over_replicas(tf.stack([low, high]))


def _over_replicas(extremes):
    """Extremes of all replicas: a mean of maxima is smaller than the maximum of one device."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return extremes
    gathered = context.all_gather(extremes[None], axis=0)
    return tf.stack([tf.reduce_min(gathered[:, 0]), tf.reduce_max(gathered[:, 1])])
