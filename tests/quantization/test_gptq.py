"""GPTQ of a matrix: against rounding to nearest, and against trying everything."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import correlated, matrix
from tfcompress.quantization.gptq import GPTQ, gptq


def nearest(w, scale, limits):
    return np.clip(np.round(w / scale), *limits) * scale


def error(x, w, new):
    return np.square(x @ (w - new)).sum()


def channel_scale(w, limits):
    return np.abs(w).max(0, keepdims=True) / limits[1]


def group_scale(w, limits, size):
    largest = [np.abs(w[start : start + size]).max(0) for start in range(0, len(w), size)]
    return np.repeat(largest, size, axis=0)[: len(w)] / limits[1]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("limits", [(-7, 7), (-3, 3), (-127, 127)])
def test_less_error_on_other_inputs_and_every_value_on_the_grid(limits, group, act_order):
    x = correlated(800, 96)
    w = matrix(96, 20)
    scale = channel_scale(w, limits) if group is None else group_scale(w, limits, group)
    seen, held_out = x[:400], x[400:]
    new = gptq(w, seen.T @ seen, scale, limits, act_order=act_order)
    steps = new / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    assert steps.min() >= limits[0] - 1e-9
    assert steps.max() <= limits[1] + 1e-9
    assert error(held_out, w, new) < 0.5 * error(held_out, w, nearest(w, scale, limits))


@settings(deadline=None, max_examples=50)
@given(block_size=st.integers(1, 40), act_order=st.booleans(), seed=st.integers(0, 9))
def test_blocks_only_batch_the_work(block_size, act_order, seed):
    x, w = correlated(100, 24, seed), matrix(24, 6, seed + 1)
    scale = channel_scale(w, (-7, 7))
    whole, parts = (
        gptq(w, x.T @ x, scale, (-7, 7), block_size=size, act_order=act_order)
        for size in (24, block_size)
    )
    np.testing.assert_allclose(whole, parts, atol=1e-9)


def test_closes_most_of_the_gap_between_nearest_and_the_best_of_all_roundings():
    x, w = correlated(100, 5), matrix(5, 40)
    limits, scale = (-3, 3), np.full((1, 40), 0.7)
    grid = 0.7 * np.array(list(itertools.product(range(-3, 4), repeat=5))).T
    between = np.einsum("ni,ioc->noc", x, w[:, :, None] - grid[:, None, :])
    best = np.square(between).sum(0).min(1).sum()
    ours = error(x, w, gptq(w, x.T @ x, scale, limits))
    plain = error(x, w, nearest(w, scale, limits))
    assert best <= ours < best + 0.5 * (plain - best)


def test_uncorrelated_inputs_give_nearest():
    w = matrix(12, 5)
    scale = channel_scale(w, (-7, 7))
    moment = np.diag(np.arange(1.0, 13.0))
    np.testing.assert_allclose(gptq(w, moment, scale, (-7, 7)), nearest(w, scale, (-7, 7)))


def test_the_order_of_the_inputs_is_theirs_again():
    """With act_order, a permutation of the features permutes the result, scales included."""
    x, w = correlated(200, 32), matrix(32, 6)
    scale = group_scale(w, (-7, 7), 8)
    order = np.random.default_rng(3).permutation(32)
    plain = gptq(w, x.T @ x, scale, (-7, 7), act_order=True)
    shuffled = x[:, order]
    moved = gptq(w[order], shuffled.T @ shuffled, scale[order], (-7, 7), act_order=True)
    np.testing.assert_allclose(moved, plain[order], atol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_pruned_weights_stay_zero(act_order):
    x, w = correlated(200, 24), matrix(24, 10)
    pruned = np.random.default_rng(2).random(w.shape) < 0.5
    w[pruned] = 0.0
    scale = channel_scale(w, (-7, 7))
    arguments = (w, x.T @ x, scale, (-7, 7))
    kept = gptq(*arguments, act_order=act_order)
    np.testing.assert_array_equal(kept[pruned], 0.0)
    assert error(x, w, kept) < error(x, w, nearest(w, scale, (-7, 7)))
    assert np.count_nonzero(gptq(*arguments, keep_zeros=False)[pruned])


def test_inputs_that_are_always_zero_round_to_nearest():
    x, w = correlated(200, 12), matrix(12, 5)
    x[:, [2, 7]] = 0
    scale = channel_scale(w, (-7, 7))
    new = gptq(w, x.T @ x, scale, (-7, 7))
    np.testing.assert_allclose(new[[2, 7]], nearest(w, scale, (-7, 7))[[2, 7]])


def test_settings_are_checked_and_saved():
    with pytest.raises(ValueError, match="damping=-1; pass 0 or more"):
        GPTQ(damping=-1)
    with pytest.raises(ValueError, match="block_size=0; pass 1 or more"):
        GPTQ(block_size=0)
    value = GPTQ(0.1, act_order=True)
    config = keras.saving.serialize_keras_object(value)
    assert keras.saving.deserialize_keras_object(config) == value
