"""Computing in float32 for a while."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.keras_hooks.precision import computing_in_float32


def test_a_mixed_model_computes_in_float32_inside_and_as_before_outside():
    inner = keras.Sequential([layers.Dense(3, dtype="mixed_bfloat16")])
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, dtype="mixed_float16")])
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    w1, b1, w2, b2 = model.get_weights()
    before = model(x)
    with computing_in_float32(model):
        np.testing.assert_allclose(model(x), (x @ w1 + b1) @ w2 + b2, rtol=1e-5)
    np.testing.assert_array_equal(model(x), before)
    assert [layer.compute_dtype for layer in model.layers] == ["float32", "float16"]
    assert inner.layers[0].compute_dtype == "bfloat16"


def test_what_holds_low_precision_variables_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="bfloat16")])
    with pytest.raises(ValueError, match='holds bfloat16 variables.*"mixed_bfloat16"'):
        computing_in_float32(model).__enter__()


def test_what_keras_quantized_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.quantize("int8")
    with pytest.raises(ValueError, match="was quantized by Keras"):
        computing_in_float32(model).__enter__()
