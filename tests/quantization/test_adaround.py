"""AdaRound of the weights of one layer."""

import itertools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.quantization.test_gptq import channel_scale, correlated, error, matrix, nearest
from tfcompress.quantization.adaround import AdaRound, _Reservoir, adaround

LIMITS = (-7, 7)
QUICK = AdaRound(steps=300)


def multiply(x, weights):
    return tf.matmul(x, weights[0])


def learned(w, x, scale, targets=None, seed=0, steps=QUICK):
    x, w = x.astype("float32"), w.astype("float32")
    targets = x @ w if targets is None else targets.astype("float32")
    (new,), share = adaround([w], [scale], LIMITS, multiply, x, targets, steps, seed)
    return new, share


def test_less_error_on_other_inputs_and_every_value_next_to_its_weight():
    x, w = correlated(800, 48), matrix(48, 20)
    scale = channel_scale(w, LIMITS)
    new, share = learned(w, x[:400], scale)
    steps = new / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    assert np.abs(steps - w / scale).max() < 1 + 1e-5
    assert np.abs(np.round(steps)).max() <= 7
    plain = nearest(w, scale, LIMITS)
    assert error(x[400:], w, new) < 0.5 * error(x[400:], w, plain)
    assert share == pytest.approx(error(x[:400], w, new) / error(x[:400], w, plain), rel=1e-3)


def test_closes_most_of_the_gap_between_nearest_and_the_best_of_all_roundings():
    x, w = correlated(100, 8), matrix(8, 30)
    scale = np.full((1, 30), 1.0)
    ups = np.array(list(itertools.product([0, 1], repeat=8))).T
    candidates = np.floor(w)[:, :, None] + ups[:, None, :]
    outputs = np.einsum("ni,ioc->noc", x, candidates)
    best = np.square((x @ w)[:, :, None] - outputs).sum(0).min(1).sum()
    new, _ = learned(w, x, scale, steps=AdaRound(steps=1000))
    plain = error(x, w, nearest(w, scale, LIMITS))
    assert best <= error(x, w, new) * (1 + 1e-6)
    assert error(x, w, new) < best + 0.35 * (plain - best)


def test_targets_of_the_float_model_make_up_for_changed_inputs():
    x, w = correlated(400, 24), matrix(24, 8)
    changed = x + 0.3 * correlated(400, 24, seed=5)
    scale = channel_scale(w, LIMITS)
    own, _ = learned(w, changed, scale)
    asked, _ = learned(w, changed, scale, targets=x @ w)
    assert np.square(changed @ asked - x @ w).sum() < np.square(changed @ own - x @ w).sum()


def test_pruned_weights_stay_zero():
    x, w = correlated(200, 24), matrix(24, 10)
    pruned = np.random.default_rng(2).random(w.shape) < 0.5
    w[pruned] = 0.0
    new, share = learned(w, x, channel_scale(w, LIMITS))
    np.testing.assert_array_equal(new[pruned], 0.0)
    assert share < 0.7


def test_a_weight_beyond_the_grid_is_cut_to_its_end():
    x, w = correlated(200, 6), matrix(6, 4)
    scale = np.abs(w).max(0, keepdims=True) / 14
    new, _ = learned(w, x, scale)
    assert np.round(np.abs(new / scale)).max() == 7


def test_equal_seeds_give_equal_weights():
    x, w = correlated(200, 24), matrix(24, 10)
    scale = channel_scale(w, LIMITS)
    one, same, other = (learned(w, x, scale, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_never_worse_than_nearest_on_what_it_learns_from():
    x, w = correlated(200, 24), matrix(24, 10)
    scale = channel_scale(w, LIMITS)
    # One step learns nothing: up and down are as in the float weights.
    new, share = learned(w, x, scale, steps=AdaRound(steps=1))
    np.testing.assert_allclose(new, nearest(w, scale, LIMITS), rtol=1e-5)
    assert share == 1.0
    on_grid = nearest(w, scale, LIMITS).astype("float32")
    new, share = learned(on_grid, np.zeros((4, 24)), scale)
    np.testing.assert_allclose(new, on_grid, rtol=1e-6)
    assert share == 1.0


def test_two_weights_are_learned_together():
    x = correlated(300, 12).astype("float32")
    weights = [matrix(12, 6, 1).astype("float32"), matrix(6, 4, 2).astype("float32")]
    scales = [channel_scale(w, LIMITS) for w in weights]

    def both(x, ws):
        return tf.matmul(tf.nn.relu(tf.matmul(x, ws[0])), ws[1])

    targets = both(x, weights).numpy()
    new, share = adaround(weights, scales, LIMITS, both, x, targets, QUICK)
    plain = [nearest(w, s, LIMITS).astype("float32") for w, s in zip(weights, scales, strict=True)]
    ours, theirs = (np.square(both(x, each) - targets).sum() for each in (new, plain))
    assert share == pytest.approx(ours / theirs, rel=1e-3)
    assert share < 0.5


def test_a_reservoir_is_a_uniform_sample_in_bounded_memory(monkeypatch):
    counts = np.zeros(100)
    for seed in range(300):
        reservoir = _Reservoir(10, seed)
        for start in range(0, 100, 20):
            rows = np.arange(start, start + 20, dtype="float32")[:, None]
            reservoir.add(rows, -rows)
        assert reservoir.size == len(reservoir.inputs) == 10
        np.testing.assert_array_equal(reservoir.inputs, -reservoir.targets)
        counts[reservoir.inputs[:, 0].astype(int)] += 1
    # Each is taken in a tenth of the runs: 30 +- 5.2.
    assert np.abs(counts - 30).max() < 5 * 5.2
    assert abs(counts[:20].sum() - 600) < 5 * 20
    monkeypatch.setattr(sys.modules[_Reservoir.__module__], "_MAX_ELEMENTS", 70)
    small = _Reservoir(1000, 0)
    small.add(np.zeros((50, 3, 3)), np.zeros((50, 1)))
    small.add(np.zeros((50, 4, 3)), np.zeros((50, 1)))  # Of another shape.
    assert small.inputs.shape == (7, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0; pass 1 or more"),
        ({"batch_size": 0}, "batch_size=0; pass 1 or more"),
        ({"samples": 0}, "samples=0; pass 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0; pass more than 0"),
        ({"strength": -1}, "strength=-1; pass more than 0"),
        ({"warm_start": 1.0}, r"warm_start=1.0; pass a share in \[0, 1\)"),
        ({"beta": (2, 0)}, "beta=.*two numbers above 0"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaRound(**arguments)


def test_settings_are_saved():
    value = AdaRound(steps=7, beta=(10.0, 2.0))
    config = keras.saving.serialize_keras_object(value)
    assert keras.saving.deserialize_keras_object(config) == value
