"""Fake quantization: floats rounded to an integer grid, with a straight-through gradient."""

import math

import tensorflow as tf

from tfcompress.ops.schemes import Scheme, integer_limits


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
    return _nonzero(largest / integer_limits(bits)[1])


def to_power_of_two(scale) -> tf.Tensor:
    """The next power of two, upwards, so that nothing is clipped that was not.

    Example:

    >>> to_power_of_two(tf.constant([0.3, 0.25])).numpy()
    array([0.5 , 0.25], dtype=float32)
    """
    exponent = tf.math.ceil(tf.math.log(scale) / math.log(2.0) - 1e-6)
    return tf.pow(2.0, exponent)


def _nonzero(scale):
    # A denormal maximum over 127 rounds to 0, and 0 / 0 is NaN.
    return tf.where(tf.equal(scale, 0.0), tf.ones_like(scale), scale)


def asymmetric_scale(
    low, high, bits: int = 8, power_of_two: bool = False
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scale and zero point of a grid over `[low, high]`, nudged so that 0 is on the grid.

    `scale = (high - low) / (2^bits - 1)`; the zero point is rounded half up, as TensorFlow's
    fake-quant kernels and the LiteRT converter do, so that all three agree.

    Args:
        low: Scalar or tensor; values above 0 are taken as 0.
        high: Like `low`; values below 0 are taken as 0.
        bits: Width of the integers, 2 to 8.
        power_of_two: Whether to round the scale up to a power of two.

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
    scale = _nonzero((high - low) / (largest - smallest))
    scale = to_power_of_two(scale) if power_of_two else scale
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


def weight_grid(w, scheme: Scheme, axes=None) -> tuple[tf.Tensor, tf.Tensor]:
    """The scale and zero point of the grid that the extremes of some weights set.

    Args:
        w: Float tensor of any rank, of known shape.
        scheme: How it is quantized.
        axes: Axes that share one scale under `"channel"`; under `"group"`, the last of them is
            cut into groups, and the others are shared. None for all.

    Returns:
        A float32 scale, and a float32 whole number, the zero point; both broadcastable to `w`.

    Example:

    >>> w = tf.constant([[1.0], [2.0], [4.0], [6.0]])
    >>> scale, zero_point = weight_grid(w, Scheme(2, granularity="group", group_size=2), axes=(0,))
    >>> scale.numpy().ravel().tolist(), zero_point.numpy().ravel().tolist()
    ([2.0, 2.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0])
    """
    wide = tf.cast(w, tf.float32)
    if scheme.symmetric:
        largest = _over_shared(tf.reduce_max, tf.abs(wide), scheme, axes)
        scale = _nonzero(largest / scheme.limits[1])
        scale = to_power_of_two(scale) if scheme.power_of_two else scale
        return scale, tf.zeros_like(scale)
    low = _over_shared(tf.reduce_min, tf.minimum(wide, 0.0), scheme, axes)
    high = _over_shared(tf.reduce_max, tf.maximum(wide, 0.0), scheme, axes)
    return asymmetric_scale(low, high, scheme.bits, scheme.power_of_two)


def weight_scale(w, scheme: Scheme, axes=None) -> tf.Tensor:
    """The scale of `weight_grid`.

    Example:

    >>> weight_scale(tf.constant([[1.27, 0.0], [-2.54, 0.0]]), Scheme(), axes=(0,)).numpy()
    array([[0.02, 1.  ]], dtype=float32)
    """
    return weight_grid(w, scheme, axes)[0]


def fake_quant_weights(w, scheme: Scheme, axes=None, scale=None) -> tf.Tensor:
    """Fake-quantize weights, on the grid that their own extremes set or on a given one.

    Args:
        w: Float tensor of any rank, of known shape.
        scheme: How it is quantized.
        axes: Axes that share one scale; see `weight_grid`.
        scale: Broadcastable to `w`, for a symmetric scheme; None to let the extremes set it.

    Returns:
        A tensor like `w`. Zeros stay zeros.

    Example:

    >>> fake_quant_weights(tf.constant([[1.0], [0.3], [0.0]]), Scheme(bits=2), axes=0).numpy()
    array([[1.], [0.], [0.]], dtype=float32)
    """
    if scale is not None:
        return fake_quant(w, scale, bits=scheme.bits, narrow=scheme.symmetric)
    scale, zero_point = weight_grid(w, scheme, axes)
    if scheme.symmetric:
        return _rounded(tf.convert_to_tensor(w), tf.stop_gradient(scale))
    return fake_quant(w, scale, zero_point, bits=scheme.bits)


@tf.custom_gradient
def _rounded(w, scale):
    """`fake_quant` where nothing lies beyond the grid: a third of a QAT step's cost less."""
    on_grid = tf.cast(tf.round(tf.cast(w, tf.float32) / scale) * scale, w.dtype)
    return on_grid, lambda upstream: (upstream, None)


def learned_fake_quant(x, scale, zero_point, limits: tuple[int, int]) -> tf.Tensor:
    """Fake-quantize on a grid that is learned as well (LSQ; with a zero point, LSQ+).

    Forward as `fake_quant`. Backward, with `v = x / scale + zero_point`: the gradient of `x` where
    `v` is inside the limits, 0 beyond; for the scale `round(v) - v` inside, and the distance of the
    limit from the zero point beyond. See `gradient_scaled` for the size of a step.

    Args:
        x: Float tensor of any rank; float16 and bfloat16 are computed in float32.
        scale: Positive, broadcastable to `x`; float32.
        zero_point: Broadcastable to `x`; rounded here, with a straight-through gradient.
        limits: The smallest and largest integer.

    Returns:
        A tensor of the shape and dtype of `x`.

    Example:

    >>> scale = tf.Variable(0.5)
    >>> with tf.GradientTape() as tape:
    ...     y = learned_fake_quant(tf.constant([0.4, 9.0]), scale, 0.0, (-7, 7))
    >>> y.numpy(), round(float(tape.gradient(y, scale)), 4)  # 1 - 0.8, and 7
    (array([0.5, 3.5], dtype=float32), 7.2)

    Reference: Esser et al. 2020, https://arxiv.org/abs/1902.08153; Bhalgat et al. 2020,
    https://arxiv.org/abs/2004.09576.
    """
    low, high = limits
    round_through = tf.grad_pass_through(tf.round)
    zero_point = round_through(tf.convert_to_tensor(zero_point, tf.float32))
    steps = tf.cast(x, tf.float32) / scale + zero_point
    rounded = round_through(tf.clip_by_value(steps, float(low), float(high)))
    return tf.cast((rounded - zero_point) * scale, x.dtype)


def gradient_scaled(x, count: int, largest: int) -> tf.Tensor:
    """`x`, with a gradient smaller by `1 / sqrt(count * largest)`, for what sets a grid.

    With it, the steps of a scale are as large beside the scale as those of the weights beside them.

    Args:
        x: A scale, or the ends of a grid; float32.
        count: Values that share it, in one example.
        largest: The largest integer of the grid.

    Returns:
        `x`.

    Reference: Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.2.
    """
    factor = 1.0 / math.sqrt(count * largest)
    scaled = tf.custom_gradient(lambda x: (tf.identity(x), lambda upstream: upstream * factor))
    return scaled(tf.convert_to_tensor(x, tf.float32))


def learned_scale(w, scheme: Scheme, axes=None) -> tf.Tensor:
    """Where a learned scale of weights begins: `2 mean|w| / sqrt(largest integer)`, as in LSQ.

    Args:
        w: Float tensor, of known shape.
        scheme: A symmetric scheme.
        axes: Axes that share one scale; see `weight_grid`.

    Returns:
        A float32 scale, broadcastable to `w`; 1 where every weight is 0.

    Example:

    >>> learned_scale(tf.constant([[1.0], [-3.0]]), Scheme(2), axes=0).numpy()
    array([[4.]], dtype=float32)
    """
    # Zeros do not count: what was pruned is on every grid.
    total = _over_shared(tf.reduce_sum, tf.abs(tf.cast(w, tf.float32)), scheme, axes)
    count = _over_shared(tf.reduce_sum, tf.cast(tf.not_equal(w, 0), tf.float32), scheme, axes)
    mean = tf.math.divide_no_nan(total, count)
    return _nonzero(2.0 * mean / math.sqrt(scheme.limits[1]))


def compact_scale(scale, shape, scheme: Scheme, axes=None) -> tf.Tensor:
    """A scale without the repetitions that make it broadcastable; see `spread_scale`.

    Example:

    >>> scheme = Scheme(4, granularity="group", group_size=2)
    >>> compact_scale(tf.constant([[1.0], [1.0], [2.0]]), (3, 1), scheme, axes=(0,)).numpy()
    array([[1.],
           [2.]], dtype=float32)
    """
    if scheme.granularity != "group":
        return scale
    axis = _as_axes(axes, len(shape))[-1]
    return tf.gather(scale, range(0, shape[axis], scheme.group_size), axis=axis)


def spread_scale(scale, shape, scheme: Scheme, axes=None) -> tf.Tensor:
    """One scale a group, repeated to be broadcastable to weights of `shape`.

    Args:
        scale: From `compact_scale`.
        shape: Of the weights.
        scheme: Any scheme; only that of groups repeats.
        axes: See `weight_grid`.

    Returns:
        A tensor that broadcasts to `shape`.
    """
    if scheme.granularity != "group":
        return scale
    axis = _as_axes(axes, len(shape))[-1]
    repeated = tf.repeat(scale, scheme.group_size, axis=axis)
    return tf.gather(repeated, range(shape[axis]), axis=axis)


def num_sharing(shape, scheme: Scheme, axes=None) -> int:
    """How many weights of `shape` share one scale, at most.

    Example:

    >>> num_sharing((8, 3), Scheme(), axes=(0,))
    8
    """
    if scheme.granularity == "tensor":
        return math.prod(shape)
    axes = _as_axes(axes, len(shape))
    sizes = [shape[axis] for axis in axes]
    if scheme.granularity == "group":
        sizes[-1] = min(scheme.group_size, sizes[-1])
    return math.prod(sizes)


def _over_shared(reduce, x, scheme, axes):
    """`reduce` over what shares one scale, broadcastable to `x`."""
    rank = len(x.shape)
    axes = _as_axes(None if scheme.granularity == "tensor" else axes, rank)
    if scheme.granularity != "group":
        return reduce(x, axis=axes, keepdims=True)
    axis, size, group = axes[-1], x.shape[axes[-1]], scheme.group_size
    num_groups = -(-size // group)
    # 0 is inside of every range, and adds nothing.
    padded = tf.pad(x, [[0, num_groups * group - size if a == axis else 0] for a in range(rank)])
    split = tf.reshape(padded, [*x.shape[:axis], num_groups, group, *x.shape[axis + 1 :]])
    others = [a if a < axis else a + 1 for a in axes[:-1]]
    reduced = tf.squeeze(reduce(split, axis=[*others, axis + 1], keepdims=True), axis + 1)
    return spread_scale(reduced, x.shape, scheme, axes)


def _as_axes(axes, rank) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(rank))
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(axis % rank for axis in axes))


def grid_bounds(bounds, scheme: Scheme) -> tuple[tf.Tensor, tf.Tensor]:
    """Both ends of the grid over `[low, high]`, which kernels are told.

    Args:
        bounds: Two numbers, or two tensors.
        scheme: How the activations are quantized.

    Returns:
        `(low, high)`, float32: as they are, for an asymmetric scheme; for a symmetric one and
        for powers of two, so that `asymmetric_scale` of them is that grid.

    Example:

    >>> low, high = grid_bounds([-1.0, 1.27], Scheme(granularity="tensor"))
    >>> round(float(low), 4), round(float(high), 4)
    (-1.28, 1.27)
    """
    low, high = (tf.cast(bounds[i], tf.float32) for i in range(2))
    smallest, largest = integer_limits(scheme.bits)
    if scheme.symmetric:
        scale = _nonzero(tf.maximum(-low, high) / largest)
        zero_point = 0.0
    elif scheme.power_of_two:
        scale, zero_point = asymmetric_scale(low, high, scheme.bits, power_of_two=True)
    else:
        return low, high
    scale = to_power_of_two(scale) if scheme.power_of_two else scale
    return (smallest - zero_point) * scale, (largest - zero_point) * scale


def fake_quant_activations(x, bounds, scheme: Scheme) -> tf.Tensor:
    """Fake-quantize activations on the grid over `bounds = [low, high]`.

    Args:
        x: Float tensor of any rank.
        bounds: Two numbers, `low <= 0 <= high`.
        scheme: How the activations are quantized.

    Returns:
        A tensor like `x`.

    Example:

    >>> scheme = Scheme(symmetric=False, granularity="tensor")
    >>> fake_quant_activations(tf.constant([0.0, 1.013, 9.0]), [0.0, 5.1], scheme).numpy().round(4)
    array([0.  , 1.02, 5.1 ], dtype=float32)
    """
    scale, zero_point = asymmetric_scale(*grid_bounds(bounds, scheme), scheme.bits)
    return fake_quant(x, scale, zero_point, scheme.bits)


def fake_quant_learned(x, bounds, scheme: Scheme) -> tf.Tensor:
    """`fake_quant_activations` on bounds that are learned as well: LSQ+ by both ends of the grid.

    Args:
        x: Float tensor of any rank, batch first.
        bounds: `[low, high]`, which get gradients.
        scheme: How the activations are quantized.

    Returns:
        A tensor like `x`.

    Reference: Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576.
    """
    limits = integer_limits(scheme.bits)
    count = math.prod(size or 1 for size in x.shape[1:])
    low, high = grid_bounds(gradient_scaled(bounds, count, limits[1]), scheme)
    low, high = tf.minimum(low, 0.0), tf.maximum(high, 0.0)
    scale = _nonzero((high - low) / (limits[1] - limits[0]))
    return learned_fake_quant(x, scale, limits[0] - low / scale, limits)


def fake_quant_dynamic(x, scheme: Scheme) -> tf.Tensor:
    """Fake-quantize activations on the range that they have: each row, or the whole tensor.

    Args:
        x: Float tensor of any rank.
        scheme: With granularity `"channel"`, each row (all but the last axis) has its own range.

    Returns:
        A tensor like `x`.

    Example:

    >>> fake_quant_dynamic(tf.constant([[0.0, 0.4, 3.0], [0.0, 0.1, 0.3]]), Scheme(2)).numpy()
    array([[0. , 0. , 3. ],
           [0. , 0. , 0.3]], dtype=float32)
    """
    axis = -1 if scheme.granularity == "channel" else None
    wide = tf.cast(x, tf.float32)
    low = tf.minimum(tf.reduce_min(wide, axis=axis, keepdims=True), 0.0)
    high = tf.maximum(tf.reduce_max(wide, axis=axis, keepdims=True), 0.0)
    return fake_quant_activations(x, (low, high), scheme)


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

    >>> scheme = Scheme(symmetric=False, granularity="tensor")
    >>> # 0.025 is the stored integer -125.5 here.
    >>> fake_quant_averages(tf.constant([0.025]), [0.0, 2.55], scheme).numpy()
    array([0.02], dtype=float32)
    """
    scale, zero_point = asymmetric_scale(*grid_bounds(bounds, scheme), scheme.bits)
    stored = tf.round(tf.cast(x, tf.float32) / scale * 1024.0) / 1024.0 + zero_point
    rounded = tf.sign(stored) * tf.floor(tf.abs(stored) + 0.5)
    on_grid = tf.cast(dequantize(rounded, scale, zero_point), x.dtype)
    return fake_quant(x + tf.stop_gradient(on_grid - x), scale, zero_point, scheme.bits)
