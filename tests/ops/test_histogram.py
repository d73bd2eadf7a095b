"""The histogram of a stream."""

import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import histogram

EDGES = histogram.edges()
ZERO = histogram.NUM_BINS // 2


def heavy(size=10_000, seed=0):
    return np.random.default_rng(seed).standard_cauchy(size).astype("float32")


def seen(batches, **kwargs):
    stream = histogram.empty()
    for batch in batches:
        stream = histogram.updated(stream, tf.constant(batch, tf.float32), **kwargs)
    return histogram.Stream(*(part.numpy() for part in stream))


def test_every_value_lies_in_its_bin():
    x = heavy()
    counts = histogram.counts(x).numpy()
    assert counts.sum() == len(x)
    np.testing.assert_array_equal(counts[ZERO + 1 :], np.histogram(x[x > 0], EDGES[ZERO + 1 :])[0])
    below = np.histogram(-x[x < 0], EDGES[ZERO + 1 :])[0]
    np.testing.assert_array_equal(counts[:ZERO], below[::-1])


def test_bins_are_narrow_beside_the_values_in_them_whatever_their_magnitude():
    positive = EDGES[ZERO + 1 :]
    ratios = positive[1:] / positive[:-1]
    assert 1 + 1 / 128 < ratios.min() <= ratios.max() == 1 + 1 / 64
    assert positive[0] == 2.0**-40
    assert positive[-1] == 2.0**40


def test_one_outlier_takes_no_resolution_away():
    x = np.random.default_rng(0).uniform(1, 2, 1000).astype("float32")
    plain, spoiled = seen([x]), seen([x, [1e9]])
    assert np.count_nonzero(plain.counts) == 64
    np.testing.assert_array_equal(np.sum(plain.counts != spoiled.counts), 1)


def test_neither_order_nor_the_size_of_batches_matters():
    x = heavy()
    whole = seen([x])
    for batches in (np.split(x, 8), [x[:17], x[17:]], [x[::-1]]):
        parts = seen(batches)
        np.testing.assert_array_equal(parts.counts, whole.counts)
        np.testing.assert_array_equal(parts.extremes, whole.extremes)


def test_counts_stay_exact_where_float32_ends():
    start = histogram.empty()
    stream = start._replace(counts=start.counts + 2**40)
    counts = histogram.updated(stream, [1.0]).counts.numpy()
    assert sorted(set(counts.tolist())) == [2**40, 2**40 + 1]


def test_the_middle_bin_counts_zeros_and_the_last_ones_what_is_beyond_all():
    counts = histogram.counts([0.0, -0.0, 1e-44, -1e-20, 1e-9, 1e30, -3e38]).numpy()
    assert (counts[ZERO], counts[0], counts[-1]) == (4, 1, 1)


def test_extremes_hold_zero_and_the_average_starts_at_the_first_batch():
    stream = seen([[1.0, 2.0], [3.0, 4.0]], momentum=0.75)
    np.testing.assert_array_equal(stream.extremes, [0, 4])
    np.testing.assert_allclose(stream.average, [0, 2.5])


def test_a_batch_half_as_large_moves_the_average_as_far_as_half_a_batch():
    full = [np.full(8, 4.0), np.full(8, 8.0)]
    halves = [np.full(8, 4.0), np.full(4, 8.0), np.full(4, 8.0)]
    np.testing.assert_allclose(seen(halves).average, seen(full).average, rtol=1e-6)
    single = seen([np.full(100, 4.0), [104.0]])
    np.testing.assert_allclose(single.average[1], 4 + 100 * (1 - 0.9**0.01), rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_noticed_and_not_forgotten(bad):
    assert not seen([[1.0, bad], [2.0, 3.0]]).finite
    assert seen([[1.0, 2.0]]).finite


def test_an_empty_batch_changes_nothing():
    before, after = seen([[1.0, 2.0]]), seen([[1.0, 2.0], []])
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_is_counted_like_float32():
    x = tf.constant([0.1, -2.5, 300.0], tf.float16)
    np.testing.assert_array_equal(
        histogram.counts(x).numpy(), histogram.counts(tf.cast(x, tf.float32)).numpy()
    )


def test_all_but_the_counts_compile_for_xla():
    def step(stream, x):
        return histogram.updated(stream, x, counting=False)

    x = tf.constant(heavy(100))
    compiled = tf.function(step, jit_compile=True)(histogram.empty(), x)
    for a, b in zip(compiled, step(histogram.empty(), x), strict=True):
        np.testing.assert_array_equal(a, b)
