"""Ranges of activations, `[low, high]`, as they are observed batch by batch."""

import tensorflow as tf

# Values of a batch that its percentiles are taken from.
_SAMPLE = 65_536


def moving_range(bounds, seen, momentum: float = 0.99) -> tf.Tensor:
    """One step of the moving average of what batches span; the first batch sets it.

    Args:
        bounds: `[low, high]`, the averages so far; `[0, 0]` when nothing was seen yet.
        seen: `[low, high]` of a batch: its `extremes` or `percentiles`.
        momentum: In [0, 1): `bounds <- momentum * bounds + (1 - momentum) * seen`.

    Returns:
        The new `[low, high]` in float32, with `low <= 0 <= high`.

    Example:

    >>> moving_range([0.0, 0.0], [-1.0, 3.0]).numpy()
    array([-1.,  3.], dtype=float32)
    >>> moving_range([-1.0, 3.0], [0.0, 4.0], momentum=0.5).numpy()
    array([-0.5,  3.5], dtype=float32)
    """
    bounds, seen = tf.cast(bounds, tf.float32), tf.cast(seen, tf.float32)
    moved = momentum * bounds + (1.0 - momentum) * seen
    return tf.where(range_is_empty(bounds), seen, moved)


def widened_range(bounds, seen) -> tf.Tensor:
    """The range that holds both `[low, high]`.

    Example:

    >>> widened_range([-1.0, 3.0], [0.0, 4.0]).numpy()
    array([-1.,  4.], dtype=float32)
    """
    return tf.stack([tf.minimum(bounds[0], seen[0]), tf.maximum(bounds[1], seen[1])])


def range_is_empty(bounds) -> tf.Tensor:
    """Whether `[low, high]` is `[0, 0]`: a range that has seen nothing, or only zeros."""
    return tf.reduce_all(tf.equal(bounds, 0.0))


def extremes(x) -> tf.Tensor:
    """`[min(x, 0), max(x, 0)]` of a batch, of all replicas; 0 must be on the grid.

    Example:

    >>> extremes(tf.constant([1.0, 3.0])).numpy()
    array([0., 3.], dtype=float32)
    """
    x = tf.stop_gradient(tf.cast(x, tf.float32))
    low, high = tf.minimum(tf.reduce_min(x), 0.0), tf.maximum(tf.reduce_max(x), 0.0)
    return _over_replicas(tf.stack([low, high]))


def percentiles(x, percentile: float) -> tf.Tensor:
    """Like `extremes`, without the outermost values: `[low, high]` that hold `percentile` of `x`.

    Of a large tensor, 65,536 values are looked at, evenly spread. Found by bisection between the
    extremes, to 2^-16 of their distance: compiles for XLA and TPUs, where sorting does not.

    Args:
        x: Float tensor, the batch. Under `tf.distribute`, the values are those of all replicas.
        percentile: Share of the values inside, in (50, 100]; the rest is left out half at each
            end, or whole at the one end if all values have one sign.

    Returns:
        `[low, high]` in float32, with `low <= 0 <= high`.

    Example:

    >>> percentiles(tf.range(-1000.0, 1001.0), 99.0).numpy().round(-1)
    array([-990.,  990.], dtype=float32)
    """
    values = tf.reshape(tf.stop_gradient(tf.cast(x, tf.float32)), [-1])
    stride = tf.maximum(tf.size(values) // _SAMPLE, 1)
    values = _gathered(values[::stride])
    low, high = tf.minimum(tf.reduce_min(values), 0.0), tf.maximum(tf.reduce_max(values), 0.0)
    two_sided = tf.logical_and(low < 0.0, high > 0.0)
    outside = (1.0 - percentile / 100.0) * tf.where(two_sided, 0.5, 1.0)
    allowed = tf.cast(tf.size(values), tf.float32) * outside
    return tf.stack([-_above(-values, -low, allowed), _above(values, high, allowed)])


def _above(values, largest, allowed):
    """The smallest number in `[0, largest]` with at most `allowed` of the values above it."""

    def halve(_, inside, outside):
        middle = (inside + outside) / 2.0
        few = tf.reduce_sum(tf.cast(values > middle, tf.float32)) <= allowed
        return tf.where(few, inside, middle), tf.where(few, middle, outside)

    low, high = tf.zeros_like(largest), largest
    for step in range(16):
        low, high = halve(step, low, high)
    return high


def _gathered(values):
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_gather(values, axis=0)


def _over_replicas(extremes):
    """Extremes of all replicas: a mean of maxima is smaller than the maximum of one device."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return extremes
    # Each in a row of its own, and summed: one collective, where all_gather takes two.
    own = tf.one_hot(context.replica_id_in_sync_group, context.num_replicas_in_sync)
    rows = context.all_reduce(tf.distribute.ReduceOp.SUM, own[:, None] * extremes)
    return tf.stack([tf.reduce_min(rows[:, 0]), tf.reduce_max(rows[:, 1])])
