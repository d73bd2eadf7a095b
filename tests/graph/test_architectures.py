"""The table of architectures: what `expand` and `fold_batch_norm` do to each of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.architectures import ARCHITECTURES, parameters
from tfcompress.graph import expand
from tfcompress.graph.fold import fold_batch_norm
from tfcompress.keras_hooks import tracing

# What stays whole: recurrent layers alone.
WHOLE = {"LSTM": {"LSTM"}, "bidirectional GRU": {"Bidirectional"}}


def assert_equal(actual, expected):
    for x, y in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(actual, expected, tolerance):
    """Relative to the largest output, as rounding errors are."""
    for x, y in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))


def built(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.batch(np.random.default_rng(0))
    return model, inputs, model(inputs)


def gradients(model, inputs):
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(model(inputs))
        loss = sum(tf.reduce_sum(x * tf.random.stateless_normal(x.shape, (0, 1))) for x in outputs)
    return tape.gradient(loss, variables)


@pytest.mark.parametrize("name", parameters())
def test_it_expands(name, tmp_path):
    model, inputs, expected = built(name)
    flat = expand(model)
    assert_equal(flat(inputs), expected)

    whole = {type(layer).__name__ for layer in flat.layers if tracing.sublayers(layer)}
    assert whole == WHOLE.get(name, set())

    own = {id(variable) for variable in model.trainable_variables}
    assert {id(variable) for variable in flat.trainable_variables} == own
    assert all(gradient is not None for gradient in gradients(flat, inputs))

    compiled = tf.function(lambda x: flat(x), jit_compile=True)
    assert_close(compiled(keras.tree.map_structure(tf.constant, inputs)), expected, 1e-4)

    flat.save(tmp_path / "flat.keras")
    assert_close(keras.models.load_model(tmp_path / "flat.keras")(inputs), expected, 1e-6)


@pytest.mark.parametrize("name", parameters())
def test_batch_norms_fold(name):
    model, inputs, expected = built(name)
    assert_close(fold_batch_norm(model)(inputs), expected, 1e-4)
