"""A wrapper is called and built as the layer inside; holds the private names that needs."""

import keras
import numpy as np
import pytest

from tfcompress.keras_hooks.wrapper import _READ_FROM_CALL, forward_signatures


class Around(keras.layers.Wrapper):
    def __init__(self, layer):
        super().__init__(layer)
        forward_signatures(self)

    def build(self, *args, **kwargs):
        self.layer.build(*args, **kwargs)

    def call(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("name", _READ_FROM_CALL)
def test_keras_reads_this_from_call(name):
    assert hasattr(keras.layers.Dense(1), name)


def test_the_layer_inside_is_told_training():
    x = np.ones((1, 1000), "float32")
    assert (Around(keras.layers.Dropout(0.5))(x, training=True).numpy() == 0).any()
    assert (Around(keras.layers.Dropout(0.5))(x, training=False).numpy() == 1).all()


def test_a_layer_with_several_shapes_is_built():
    wrapper = Around(keras.layers.MultiHeadAttention(2, 4))
    assert wrapper(np.ones((1, 3, 5)), np.ones((1, 7, 6))).shape == (1, 3, 5)
    assert wrapper.layer.built


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_the_input_shape_of_a_first_layer_builds_its_model():
    layer = keras.layers.Dense(2, input_shape=(3,))
    assert layer._input_shape_arg == (3,)
    model = keras.Sequential([Around(layer)])
    assert model.built
    assert model.input_shape == (None, 3)
