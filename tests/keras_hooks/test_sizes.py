"""Unknown sizes as tensors of a graph: what the ops that stand in for `keras.ops` compute."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src import ops as keras_ops

from tfcompress.graph import expand
from tfcompress.keras_hooks import sizes, tracing


class Calling(layers.Layer):
    """A layer with a layer inside, so that its `call` is traced."""

    def __init__(self, function):
        super().__init__(name="calling")
        self.function = function
        self.inner = layers.ReLU()

    def call(self, x):
        return self.function(self.inner(x))


def ask(function, width=4):
    """`(model, flat)` of a function of a tensor whose batch and length are not known."""
    x = keras.Input((None, width))
    model = keras.Model(x, Calling(function)(x))
    return model, expand(model)


def heads(x):
    batch, length, width = ops.shape(x)
    split = ops.transpose(ops.reshape(x, (batch, length, 2, width // 2)), (0, 2, 1, 3))
    return ops.reshape(ops.transpose(split, (0, 2, 1, 3)), (batch, -1, width))


FUNCTIONS = {
    "arange": lambda x: x + ops.arange(ops.shape(x)[1], dtype="float32")[:, None],
    "arange from a number": lambda x: (
        x[:, 1:] * ops.cast(ops.arange(1, ops.shape(x)[1])[None, :, None], "float32")
    ),
    "arange in steps": lambda x: x[0, ::2, 0] * ops.arange(0, ops.shape(x)[1], 2, "float32"),
    "zeros": lambda x: x + ops.zeros((1, ops.shape(x)[1], 4)),
    "ones": lambda x: (
        ops.cumsum(ops.ones((3, ops.shape(x)[1], 1), "int32"), 1) + ops.cast(ops.sum(x), "int32")
    ),
    "full of a vector": lambda x: x[..., 0] * ops.full((ops.shape(x)[1],), 2.5),
    "full of two sizes": lambda x: ops.full(ops.shape(x)[:2], -1.5) + x[..., 1],
    "a mask of three sizes": lambda x: ops.broadcast_to(
        ops.expand_dims(x[0, :, 0] > 0, 0), (ops.shape(x)[0], ops.shape(x)[1], ops.shape(x)[1])
    ),
    "broadcast to known and unknown": lambda x: ops.broadcast_to(
        x[:1, :1], (ops.shape(x)[0], 3, 4)
    ),
    "broadcast of a number": lambda x: x * ops.broadcast_to(ops.sum(x), ops.shape(x)),
    "tile": lambda x: ops.tile(
        ops.mean(x, (0, 1), keepdims=True), (ops.shape(x)[0], ops.shape(x)[1], 2)
    ),
    "tile of a vector": lambda x: ops.tile(ops.mean(x, (0, 1)), (ops.shape(x)[0], 1)),
    "repeat": lambda x: ops.repeat(x[:, None], ops.shape(x)[1], axis=1),
    "reshape": heads,
    "reshape of the batch": lambda x: ops.reshape(x[:, :2], (ops.shape(x)[0], 8)),
    "a size in arithmetic": lambda x: x / ops.cast(ops.shape(x)[1] + 2, "float32"),
    "a mean over the batch": lambda x: ops.sum(x, 0) / ops.cast(ops.shape(x)[0], "float32"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_is_the_function_for_any_batch_and_length(name, tmp_path):
    model, flat = ask(FUNCTIONS[name])
    flat.save(tmp_path / "flat.keras")
    loaded = keras.models.load_model(tmp_path / "flat.keras")
    for batch, length in [(2, 5), (3, 2), (1, 7)]:
        x = np.random.default_rng(0).normal(size=(batch, length, 4)).astype("float32")
        x[0, 0, 0] = -0.0
        expected = np.asarray(model(x))
        for each in (flat, loaded, tf.function(flat, jit_compile=True)):
            actual = np.asarray(each(tf.constant(x)))
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(actual, expected, rtol=1e-6)
        np.testing.assert_array_equal(flat(x), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: ops.arange(ops.shape(x)[1] + 1), "computed from the sizes"),
        (lambda x: ops.arange(5, 0, ops.shape(x)[1]), "no symbolic form"),
        (lambda x: ops.tile(x, (1, ops.shape(x)[0], 1)), "tile of an axis of size None"),
        (lambda x: ops.repeat(x, ops.shape(x)[0], axis=2), "repeat of an axis of size 4"),
        (lambda x: ops.reshape(x, (ops.shape(x)[1], -1, 2)), "more than the batch"),
    ],
)
def test_what_has_no_form_names_the_line(function, message):
    with pytest.raises(tracing.TraceError, match=rf"test_sizes\.py(.|\n)*{message}"):
        ask(function)


def test_a_batch_that_was_merged_with_another_axis_is_not_taken_for_the_batch():
    def windows(x):
        batch, length = ops.shape(x)[:2]
        merged = ops.reshape(
            ops.transpose(ops.reshape(x, (batch, length, 2, 2)), (0, 2, 1, 3)), (-1, 2)
        )
        return ops.reshape(merged, (batch, length, 4))

    with pytest.raises(tracing.TraceError, match="more than the batch"):
        ask(windows)


def test_the_module_through_which_layers_call_ops_has_the_stand_ins_while_tracing():
    seen = []

    def function(x):
        seen.append((keras_ops.shape(x)[1], ops.shape(x)[1]))
        return x

    before = [dict(namespace) for namespace in sizes.NAMESPACES]
    ask(function)
    inside, outside = seen[-1]
    assert isinstance(inside, keras.KerasTensor) and inside is outside
    assert inside.shape == ()
    assert [dict(namespace) for namespace in sizes.NAMESPACES] == before


def test_integer_scalars_that_are_no_sizes_are_values_as_ever():
    def function(x):
        count = ops.sum(ops.cast(x > 0, "int32"))
        return ops.tile(count, (6,)) + ops.reshape(count, (1,))

    model, flat = ask(function)
    x = np.ones((2, 3, 4), "float32")
    np.testing.assert_array_equal(flat(x), model(x))
    np.testing.assert_array_equal(flat(x), np.full(6, 48, "int32"))


def test_known_sizes_stay_numbers():
    seen = []
    ask(lambda x: seen.append(ops.shape(x)) or x)
    assert seen[-1][2] == 4


def test_the_causal_mask_of_an_attention_takes_any_length(tmp_path):
    x = keras.Input((None, 8))
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x, use_causal_mask=True)
    model = keras.Model(x, attended)
    flat = expand(model)
    assert not any(isinstance(layer, layers.MultiHeadAttention) for layer in flat.layers)
    flat.save(tmp_path / "flat.keras")
    loaded = keras.models.load_model(tmp_path / "flat.keras")
    for length in (3, 6):
        data = np.random.default_rng(0).normal(size=(2, length, 8)).astype("float32")
        np.testing.assert_array_equal(flat(data), model(data))
        np.testing.assert_array_equal(loaded(data), model(data))
