"""Bias correction: channels keep the mean they had in float."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.quantization import quantize
from tfcompress.quantization.bias import correct_biases

# Of one sign, so that the errors of the weights have a mean.
X = np.random.default_rng(0).uniform(size=(200, 12, 12, 3)).astype("float32")


def network(use_bias=True):
    keras.utils.set_random_seed(0)
    x = keras.Input((12, 12, 3))
    h = layers.Conv2D(8, 3, activation="relu", use_bias=use_bias, name="conv")(x)
    h = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(h)
    h = layers.ReLU()(layers.BatchNormalization(name="norm")(h))
    h = layers.Conv2D(16, 3, activation="relu", use_bias=use_bias, name="last")(h)
    h = layers.GlobalAveragePooling2D()(h)
    return keras.Model(x, layers.Dense(4, use_bias=use_bias, name="head")(h), name="net")


def means(model, data):
    return np.mean(model.predict(data, verbose=0), axis=0)


def test_the_means_of_the_outputs_are_those_of_the_float_model():
    model = network()
    quantized = quantize(model, "int4", None)
    expected = means(model, X)
    before = np.abs(means(quantized, X) - expected).max()
    skipped = correct_biases(quantized, model, X, verbose=0)
    after = np.abs(means(quantized, X) - expected).max()
    assert after < 0.1 * before
    assert list(skipped) == ["depthwise"]


def test_the_error_of_outputs_falls_at_4_bits_on_held_out_inputs():
    model = network()
    errors = {}
    for corrected in (False, True):
        quantized = quantize(
            model, "int4", calibration=X[:100], bias_correction=corrected, verbose=0
        )
        held_out = X[100:]
        difference = quantized.predict(held_out, verbose=0) - model.predict(held_out, verbose=0)
        errors[corrected] = np.mean(np.square(difference))
    assert errors[True] < 0.5 * errors[False]


def test_batch_norms_are_corrected_where_convolutions_have_no_bias():
    model = network(use_bias=False)
    quantized = quantize(model, "int4", None)
    correct_biases(quantized, model, X, verbose=0)
    norm = quantized.get_layer("norm")
    assert np.abs(np.asarray(norm.beta) - np.asarray(model.get_layer("norm").beta)).max() > 1e-4
    no_bias = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)], name="net")
    with pytest.raises(ValueError, match="No layer of 'net' has a bias"):
        correct_biases(quantize(no_bias), no_bias, X[0, 0], verbose=0)


def test_a_generator_is_enough_and_an_empty_one_is_refused():
    model = network()
    quantized = quantize(model, "int4", calibration=X, verbose=0)
    correct_biases(quantized, model, (X[i : i + 50] for i in range(0, 200, 50)), verbose=0)
    again = quantize(model, "int4", calibration=X, verbose=0)
    correct_biases(again, model, X, verbose=0)
    for ours, theirs in zip(quantized.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="holds no batch"):
        correct_biases(quantized, model, iter([]), verbose=0)
