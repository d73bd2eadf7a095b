"""Dot-product attention, taken apart."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfcompress.graph.attention import split_attention
from tfcompress.graph.expand import expand

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 7, 16)).astype("float32")
Y = RNG.normal(size=(3, 9, 16)).astype("float32")
HEADS = RNG.normal(size=(3, 7, 2, 8)).astype("float32")


def attention(**arguments):
    x = keras.Input((7, 16))
    return keras.Model(x, layers.MultiHeadAttention(2, 8)(x, x, **arguments)), X


def masked():
    """With a query that may look at nothing, whose weights are uniform."""
    x, y, mask = keras.Input((7, 16)), keras.Input((9, 16)), keras.Input((7, 9), dtype="bool")
    values = RNG.random((3, 7, 9)) > 0.4
    values[1, 2] = False
    h = layers.MultiHeadAttention(2, 8)(x, y, attention_mask=mask)
    return keras.Model([x, y, mask], h), [X, Y, values]


def biased():
    x = keras.Input((None, 2, 8))
    bias = np.linspace(-3, 3, 49, dtype="float32").reshape(1, 1, 7, 7)
    return keras.Model(x, ops.dot_product_attention(x, x, x, bias=bias, scale=2.0)), HEADS


def twice():
    x, shared = keras.Input((7, 16)), layers.MultiHeadAttention(2, 8)
    return keras.Model(x, shared(shared(x, x), x)), X


def kinds(model):
    return [type(operation).__name__ for operation in model.operations]


CASES = {
    "plain": attention,
    "causal": lambda: attention(use_causal_mask=True),
    "masked": masked,
    "biased": biased,
    "twice": twice,
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_equal_also_once_saved(case, tmp_path):
    model, x = CASES[case]()
    flat = expand(model)
    assert "DotProductAttention" in kinds(flat)
    split = split_attention(flat)
    assert "DotProductAttention" not in kinds(split)
    np.testing.assert_allclose(split(x), model(x), atol=1e-6)
    split.save(tmp_path / "split.keras")
    loaded = keras.models.load_model(tmp_path / "split.keras")
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)


def test_gradients_are_equal_where_keys_are_masked():
    model, _ = attention(use_causal_mask=True)
    flat = expand(model)
    gradients = []
    for each in (flat, split_attention(flat)):
        each.compile(keras.optimizers.SGD(1.0), "mse")
        before = flat.get_weights()
        each.train_on_batch(X, np.ones_like(X))
        gradients.append([a - b for a, b in zip(before, flat.get_weights(), strict=True)])
        flat.set_weights(before)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_layers_and_weights_are_shared():
    flat = expand(attention()[0])
    split = split_attention(flat)
    assert [id(v) for v in split.variables] == [id(v) for v in flat.variables]


def test_the_scale_comes_first_and_a_softmax_layer_last():
    split = split_attention(expand(attention()[0]))
    path = [kind for kind in kinds(split) if kind in ("Multiply", "Matmul", "Softmax", "Add")]
    assert path == ["Multiply", "Matmul", "Softmax", "Matmul"]


@pytest.mark.parametrize("dtype, heads", [("float16", 4), ("float32", 2)])
def test_what_is_not_plain_stays_whole(dtype, heads):
    query, key = keras.Input((7, 4, 8), dtype=dtype), keras.Input((7, heads, 8), dtype=dtype)
    model = keras.Model([query, key], ops.dot_product_attention(query, key, key))
    split = split_attention(model)
    assert kinds(split) == kinds(model)
    x = [RNG.normal(size=(2, 7, n, 8)).astype(dtype) for n in (4, heads)]
    np.testing.assert_array_equal(split(x), model(x))


def test_a_model_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="split_attention reads the graph of a Functional model"):
        split_attention(keras.Model())
