import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import criteria, regrowth


@pytest.mark.parametrize("index", [0, 1, 2**31, 2**32 + 3, 2**62])
def test_random_scores_are_the_same_everywhere(index):
    index = tf.constant(index, tf.int64)
    eager = criteria.random_scores((50,), 3, index).numpy()
    for jit_compile in (False, True):
        compiled = tf.function(
            lambda i: criteria.random_scores((50,), 3, i), jit_compile=jit_compile
        )
        np.testing.assert_array_equal(compiled(index).numpy(), eager)


def test_random_scores_are_random():
    draws = [
        criteria.random_scores((40_000,), seed, index).numpy()
        for seed, index in ((0, 0), (0, 1), (1, 0), (0, 2**32))
    ]
    for draw in draws:
        assert draw.min() >= 0 and draw.max() < 1
        counts = np.histogram(draw, 20, (0, 1))[0]
        assert np.sum((counts - 2000) ** 2 / 2000) < 50  # Chi-squared, 19 degrees: p = 1e-4.
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.02
    assert np.all(np.abs(np.corrcoef(draws) - np.eye(4)) < 0.02)


def test_soft_movement_moves_by_its_learning_rate_whatever_the_scale():
    movement = criteria.Movement(threshold=0.1, strength=0.0, learning_rate=0.01)
    weight, gradient = tf.constant([1.0, 2.0]), tf.constant([-3.0, 1.0])
    step = movement.observe(weight, gradient, tf.zeros(2)).numpy()
    np.testing.assert_allclose(np.sqrt(np.mean(step**2)), 0.01, rtol=1e-6)
    np.testing.assert_allclose(movement.observe(weight, 1e-6 * gradient, tf.zeros(2)), step, 1e-5)


def test_soft_movements_penalty_lowers_the_scores():
    movement = criteria.Movement(threshold=0.1, strength=2.0, learning_rate=0.1)
    step = movement.observe(tf.zeros(1), tf.zeros(1), tf.zeros(1))
    np.testing.assert_allclose(step.numpy(), [-0.1 * 2.0 * 0.25], rtol=1e-6)
    np.testing.assert_array_equal(movement.keep(tf.constant([-2.1, -2.3])).numpy(), [True, False])


@pytest.mark.parametrize("arguments", [{"threshold": 0.5}, {"threshold": 0.0}, {"strength": -1}])
def test_a_bad_argument_is_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        criteria.Movement(**arguments)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("gradient", "callbacks.Pruning"),
        ("batch_norm", "tfcompress.prune"),
        ("wanda", "calibration=data"),
        ("sparsegpt", "calibration=data"),
    ],
)
def test_what_is_not_available_names_the_remedy(name, remedy):
    with pytest.raises(ValueError, match=remedy):
        criteria.require(criteria.get(name), "here", "weights", "index")


@pytest.mark.parametrize(
    "each",
    [criteria.Random(3), criteria.Movement(0.2), criteria.SparseGPT(0.1), regrowth.RigL(0.1, 5)],
)
def test_they_survive_serialization(each):
    config = keras.saving.serialize_keras_object(each)
    assert keras.saving.deserialize_keras_object(config) == each
