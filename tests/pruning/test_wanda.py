"""Wanda: magnitude times input norm."""

import keras
import numpy as np
import pytest

from tests.models import kernels, mlp, nested, subclassed
from tfcompress.graph.inputs import input_norms
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.walk import named_variables
from tfcompress.ops.criteria import Wanda


def data(num_examples=50, seed=0):
    return np.random.default_rng(seed).normal(size=(num_examples, 12)).astype("float32")


def wanda_scores(model, paths, calibration):
    norms, skipped = input_norms(model, paths, calibration)
    named = named_variables(model)
    return {path: Wanda()(named[path].value, norm) for path, norm in norms.items()}, skipped


def test_scores_by_hand():
    model = mlp()
    x = data()
    hidden = model.get_layer("hidden")(x).numpy()
    scores, skipped = wanda_scores(model, ["mlp/hidden/kernel", "mlp/head/kernel"], x)
    assert skipped == {}
    for layer, inputs in (("hidden", x), ("head", hidden)):
        weight = model.get_layer(layer).kernel.numpy()
        expected = np.abs(weight) * np.linalg.norm(inputs, axis=0)[:, None]
        np.testing.assert_allclose(scores[f"mlp/{layer}/kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("make", [nested, subclassed])
def test_the_model_stays_as_it_is(make):
    model = make()
    before = kernels(model)
    scores, _ = wanda_scores(model, list(before), data())
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight, before[path])
        assert scores[path].shape == weight.shape
        assert scores[path].dtype == weight.dtype
    assert all("call" not in vars(layer) for layer in all_layers(model))


def test_a_score_is_what_the_output_loses():
    """Zeroing one weight changes the outputs by exactly its score, in the 2-norm."""
    layer = keras.layers.Conv2D(4, (3, 2), padding="same", name="conv")
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, layer(inputs))
    images = np.random.default_rng(0).normal(size=(40, 6, 5, 3)).astype("float32")
    scores = wanda_scores(model, ["conv/kernel"], images)[0]["conv/kernel"].numpy()
    before, weight = model(images).numpy(), layer.kernel.numpy()
    for index in [(0, 0, 0, 0), (2, 1, 2, 3), (1, 0, 1, 2)]:
        pruned = weight.copy()
        pruned[index] = 0
        layer.kernel.assign(pruned)
        lost = np.linalg.norm(model(images).numpy() - before)
        np.testing.assert_allclose(lost, scores[index], rtol=1e-3)


def test_attention_kernels_have_scores_of_their_shape():
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    model = keras.Model(inputs, x)
    x = np.random.default_rng(0).normal(size=(10, 6, 8)).astype("float32")
    before = kernels(model)
    paths = [path for path in before if path.endswith("kernel")]
    scores, skipped = wanda_scores(model, paths, x)
    assert skipped == {}
    norms = np.linalg.norm(x.reshape(-1, 8), axis=0)
    for path in paths:
        assert scores[path].shape == before[path].shape
        if not path.endswith("attention_output/kernel"):
            expected = np.abs(before[path]) * norms[:, None, None]
            np.testing.assert_allclose(scores[path], expected, rtol=1e-5)


def test_what_has_no_inputs_to_capture_is_reported():
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(9, 5, name="embedding")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="model")
    paths = ["embedding/embeddings", "head/kernel"]
    scores, skipped = wanda_scores(model, paths, np.zeros((3, 4), "int32"))
    assert list(scores) == ["head/kernel"]
    assert skipped == {
        "embedding/embeddings": "not the kernel of a Dense, EinsumDense or Conv2D layer"
    }
