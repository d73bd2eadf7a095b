import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops.clusters import by_channel, nearest, num_channels, share

# Shape and the axes that share one set of centroids.
CASES = [
    ((7,), (0,)),
    ((4, 6), (0, 1)),
    ((4, 6), (0,)),
    ((2, 3, 4, 5), (0, 1)),
    ((3, 4, 5), (0, 2)),
]


def example(shape, axes, clusters=3, seed=0):
    random = np.random.default_rng(seed)
    channels = () if len(axes) == len(shape) else (num_channels(shape, axes),)
    centroids = random.normal(size=(*channels, clusters)).astype("float32")
    indices = random.integers(0, clusters, shape).astype("uint8")
    return centroids, indices, random.random(channels) < 0.5


def rows_of(array, axes):
    """One row a channel, by indexing."""
    channels = [axis for axis in range(array.ndim) if axis not in axes]
    moved = np.moveaxis(array, channels, range(len(channels)))
    return moved.reshape(int(np.prod([array.shape[axis] for axis in channels])), -1)


def by_hand(centroids, zero):
    table = np.array(centroids).reshape(-1, centroids.shape[-1])
    table[np.reshape(zero, -1), 0] = 0.0
    return table


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape, axes", CASES)
def test_the_gradient_of_a_centroid_is_the_sum_over_its_members(shape, axes, jit):
    centroids, indices, zero = example(shape, axes)
    upstream = np.random.default_rng(1).integers(-8, 8, shape).astype("float32")

    @tf.function(jit_compile=jit)
    def run(centroids):
        with tf.GradientTape() as tape:
            tape.watch(centroids)
            w = share(centroids, tf.constant(indices), tf.constant(zero), axes)
            loss = tf.reduce_sum(w * upstream)
        return w, tape.gradient(loss, centroids)

    w, gradient = run(tf.constant(centroids))
    table, rows = by_hand(centroids, zero), rows_of(indices, axes)
    np.testing.assert_array_equal(
        rows_of(w.numpy(), axes), np.take_along_axis(table, rows.astype(int), axis=1)
    )
    expected = np.array(
        [
            [row[members == k].sum() for k in range(3)]
            for row, members in zip(rows_of(upstream, axes), rows, strict=True)
        ]
    )
    expected[np.reshape(zero, -1), 0] = 0.0  # What is fixed at 0 is not trained.
    np.testing.assert_array_equal(gradient, expected.reshape(centroids.shape))


def test_the_gradient_is_that_of_gather_and_the_same_in_every_run():
    random = np.random.default_rng(0)
    indices = tf.constant(random.integers(0, 16, (300, 217)).astype("uint8"))
    upstream = tf.constant(random.normal(size=(300, 217)).astype("float32"))

    @tf.function
    def gradient(look_up):
        centroids = tf.constant(np.arange(1.0, 17.0, dtype="float32"))
        with tf.GradientTape() as tape:
            tape.watch(centroids)
            loss = tf.reduce_sum(look_up(centroids) * upstream)
        return tf.convert_to_tensor(tape.gradient(loss, centroids))

    def ours(centroids):
        return share(centroids, indices, False, (0, 1))

    theirs = gradient(lambda centroids: tf.gather(centroids, tf.cast(indices, tf.int32)))
    np.testing.assert_allclose(gradient(ours), theirs, atol=2e-3)
    assert len({gradient(ours).numpy().tobytes() for _ in range(10)}) == 1


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape, axes", CASES)
def test_nearest_is_by_distance(shape, axes, jit):
    centroids, _, zero = example(shape, axes)
    w = np.random.default_rng(2).normal(size=shape).astype("float32")
    run = tf.function(nearest, jit_compile=jit)
    found = run(tf.constant(w), tf.constant(centroids), tf.constant(zero), axes).numpy()
    table = centroids.reshape(-1, 3).copy()
    table[np.reshape(zero, -1), 0] = np.inf
    expected = np.abs(rows_of(w, axes)[..., None] - table[:, None]).argmin(-1)
    np.testing.assert_array_equal(rows_of(found, axes), expected)


@hypothesis.given(st.lists(st.integers(-9, 9), min_size=2, max_size=6), st.integers(-99, 99))
def test_no_centroid_is_nearer(centroids, w):
    found = nearest(tf.constant([w], tf.float32), tf.constant(centroids, tf.float32), False, (0,))
    assert abs(centroids[int(found[0])] - w) == min(abs(each - w) for each in centroids)


@pytest.mark.parametrize("shape, axes", CASES)
def test_by_channel_is_a_row_a_channel(shape, axes):
    w = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(by_channel(tf.constant(w), axes), rows_of(w, axes))
