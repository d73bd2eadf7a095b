"""A model into its quantized form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfcompress.layers import strip
from tfcompress.layers.quantize import Quantize
from tfcompress.quantization import calibrate, quantize

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8, 8, 3)).astype("float32")


def cnn():
    x = keras.Input((8, 8, 3))
    h = layers.ReLU(name="relu")(layers.BatchNormalization()(layers.Conv2D(4, 3, name="conv")(x)))
    branch = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(h)
    h = layers.MaxPooling2D()(layers.Add(name="sum")([h, branch]))
    return keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(h)))


def wrapped(model):
    return {
        layer.layer.name: list(layer.ranges)
        for layer in model.layers
        if isinstance(layer, Quantize)
    }


def test_wrappers_are_where_integer_kernels_round():
    assert wrapped(quantize(cnn())) == {
        "input_0": ["output"],
        "conv": [],
        "relu": ["output"],
        "depthwise": ["output"],
        "sum": ["output"],
        "head": ["output"],
    }


def test_calibrated_outputs_are_near_those_of_the_float_model():
    model = cnn()
    expected = model.predict(X, verbose=0)
    close = quantize(model, calibration=X).predict(X, verbose=0)
    assert 0 < np.abs(close - expected).max() < 0.05 * np.abs(expected).max()
    coarse = quantize(model, "int3", "int3", calibration=X).predict(X, verbose=0)
    assert np.abs(coarse - expected).mean() > 4 * np.abs(close - expected).mean()


def test_without_calibration_only_the_weights_are_rounded():
    model = cnn()
    quantized = quantize(model)
    np.testing.assert_allclose(
        quantized.predict(X, verbose=0), strip(quantized).predict(X, verbose=0), atol=1e-5
    )


def test_the_original_is_not_touched():
    model = cnn()
    before = model.get_weights()
    quantized = quantize(model, calibration=X)
    quantized.compile("adam", "mse")
    quantized.fit(X, np.ones((64, 2)), verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(model.layers[1]) is layers.Conv2D


@pytest.mark.parametrize(
    "data",
    [
        X,
        (X, np.ones(64)),
        tf.data.Dataset.from_tensor_slices(X).batch(24),
        [(X[:32], None), (X[32:], None)],
    ],
)
def test_ranges_hold_all_calibration_data_whatever_it_comes_as(data):
    low, high = quantize(cnn(), calibration=data).layers[1].ranges["output"]
    assert (low, high) == (X.min(), X.max())


def test_calibration_reads_a_generator_once():
    quantized = quantize(cnn())
    taken = []
    calibrate(quantized, (taken.append(i) or X[i : i + 8] for i in range(0, 64, 8)))
    assert taken == list(range(0, 64, 8))
    with pytest.raises(ValueError, match="holds no batch"):
        calibrate(quantized, iter([]))


class Residual(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return x + self.inner(x)


def test_operations_inside_composite_layers_get_ranges():
    model = keras.Sequential([keras.Input((3,)), Residual(), layers.Dense(2)])
    quantized = quantize(model, calibration=X[0, 0])
    places = wrapped(quantized)
    assert len(places) == 4
    assert all(ranges == ["output"] for ranges in places.values())


def test_globs_leave_layers_float():
    quantized = quantize(cnn(), exclude="*conv/kernel")
    assert "conv" not in wrapped(quantized)
    assert "depthwise" in wrapped(quantized)
    with pytest.raises(ValueError, match="'x' matches no variable"):
        quantize(cnn(), include="x")


def test_weights_only():
    assert wrapped(quantize(cnn(), activations=None)) == {"conv": [], "depthwise": [], "head": []}


def test_what_has_no_weights_yet_is_refused():
    with pytest.raises(ValueError, match="needs a built model"):
        quantize(keras.Sequential([layers.Dense(2)]))
