"""Ranges of activations."""

import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import ranges


def test_a_range_starts_at_the_first_batch_and_then_moves():
    bounds = ranges.moving_range([0.0, 0.0], ranges.extremes(tf.constant([-2.0, 4.0])))
    np.testing.assert_array_equal(bounds, [-2, 4])
    bounds = ranges.moving_range(bounds, ranges.extremes(tf.constant([1.0, 104.0])))
    np.testing.assert_allclose(bounds, [-1.98, 5.0], rtol=1e-6)


def test_a_widened_range_holds_everything():
    bounds = ranges.widened_range([-1.0, 2.0], ranges.extremes(tf.constant([-3.0, 1.0])))
    np.testing.assert_array_equal(bounds, [-3, 2])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_numpy(percentile, jit):
    x = np.random.default_rng(0).standard_t(2, size=50_000).astype("float32")
    found = tf.function(ranges.percentiles, jit_compile=jit)(tf.constant(x), percentile).numpy()
    outside = (100 - percentile) / 2
    expected = np.percentile(x, [outside, 100 - outside])
    resolution = np.abs(x).max() * 2**-15
    np.testing.assert_allclose(found, expected, atol=resolution, rtol=0.01)
    assert np.mean((x >= found[0]) & (x <= found[1])) >= percentile / 100 - 1e-5


def test_percentiles_of_one_sign_leave_out_at_one_end():
    x = np.abs(np.random.default_rng(0).normal(size=10_000)).astype("float32")
    low, high = ranges.percentiles(x, 99.0).numpy()
    assert low == 0
    np.testing.assert_allclose(high, np.percentile(x, 99), rtol=1e-3)


def test_percentiles_of_a_large_batch_are_near_those_of_all_of_it():
    x = np.random.default_rng(0).normal(size=(64, 5000)).astype("float32")
    low, high = ranges.percentiles(x, 99.0).numpy()
    np.testing.assert_allclose([low, high], np.percentile(x, [0.5, 99.5]), rtol=0.05)


def test_percentiles_of_zeros_are_empty():
    assert ranges.range_is_empty(ranges.percentiles(tf.zeros(9), 99.0))
