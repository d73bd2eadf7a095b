"""Which axes are surely of one size, and which are not known to be."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfcompress.keras_hooks.origins import Origins

WAYS = {
    "layers": lambda x: layers.Dropout(0.1)(layers.Dense(3)(layers.LayerNormalization()(x))),
    "a residual": lambda x: ops.relu(x + layers.Dense(4)(x)) * 2 + np.ones((1, 1, 4)),
    "heads": lambda x: layers.EinsumDense("abc,cde->abde", (None, 2, 2))(x),
    "einsum": lambda x: ops.einsum("bqd,bkd->bqk", x, ops.exp(x)),
    "reshape layer": lambda x: layers.Reshape((-1, 2, 2))(x),
    "new axes": lambda x: ops.expand_dims(x, (2, 3))[:, :, None],
    "take": lambda x: ops.take(x[0, :3, 0], ops.cast(x[:, :, None], "int32"), axis=0),
    "take along": lambda x: ops.take_along_axis(x, ops.cast(x, "int32"), axis=1),
}
BREAKS = {
    "a slice": lambda x: x[:, 1:],
    "two lengths": lambda x: x + ops.exp(x[:, ::2]),
    "a merged axis": lambda x: layers.Reshape((-1, 2))(x),
    "concatenation": lambda x: ops.concatenate([x, x], axis=1),
    "strides": lambda x: layers.MaxPooling1D(2)(x),
    "a layer of someone": lambda x: Dense()(x),
}


class Dense(layers.Layer):
    def call(self, x):
        return x[:, ::2]


@pytest.mark.parametrize("name", WAYS)
def test_the_length_comes_from_the_input(name):
    x = keras.Input((None, 4))
    assert Origins().of(WAYS[name](x), 1) == (x, 1)
    assert Origins().of(WAYS[name](x), 0) == (x, 0)


@pytest.mark.parametrize("name", BREAKS)
def test_another_length_is_not_taken_for_that_of_the_input(name):
    x = keras.Input((None, 4))
    origin, axis = Origins().of(layers.ReLU()(BREAKS[name](x)), 1)
    assert (origin is x, axis) == (False, 1)
    assert origin.shape[1] is None


def test_axes_that_change_places_are_followed():
    x = keras.Input((None, 4))
    assert Origins().of(ops.transpose(x, (2, 1, 0)), 2) == (x, 0)
    assert Origins().of(ops.transpose(ops.einsum("abc->cab", x), (1, 2, 0)), 1) == (x, 1)
    y = ops.repeat(ops.expand_dims(x[..., 0], 1), 3, axis=1)
    assert Origins().of(y, 2) == (x, 1) or y.shape[2] is None


def test_what_is_added_is_believed():
    origins, x, ones = Origins(), keras.Input((None, 4)), keras.KerasTensor((None,))
    origins.add(ones, 0, (x, 1))
    assert origins.of(ones, 0) == (x, 1)


def test_deep_residual_graphs_take_no_time_and_no_stack():
    x = y = keras.Input((None, 4))
    for _ in range(300):
        y = y + ops.exp(y)
    assert Origins().of(y, 1) == (x, 1)
