"""A model into its quantized form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfcompress.layers import strip
from tfcompress.layers.quantize import Quantize
from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import Budget, calibrate, quantize

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
        layer.name.removeprefix("quantize_"): list(layer.ranges)
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


def test_a_model_of_plain_operations_is_stripped():
    x = keras.Input((4,))
    plain = strip(quantize(keras.Model(x, layers.Dense(2)(x + 1.0))))
    names = [operation.name for operation in plain.operations]
    assert len(set(names)) == len(names) == 5


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


def attention(**arguments):
    x = keras.Input((6, 8))
    h = layers.MultiHeadAttention(2, 4, name="mha")(x, x, **arguments)
    return keras.Model(x, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(h)))


@pytest.mark.parametrize("arguments", [{}, {"use_causal_mask": True}])
def test_attention_has_a_range_behind_each_step_and_none_that_holds_a_mask(arguments):
    model, x = attention(**arguments), RNG.normal(size=(32, 6, 8)).astype("float32")
    quantized = quantize(model, calibration=x)
    ranges = {
        layer.name.removeprefix("quantize_mha_dot_product_attention_"): layer.ranges["output"]
        for layer in quantized.layers
        if isinstance(layer, Quantize) and "dot_product" in layer.name
    }
    assert set(ranges) == {"multiply", "matmul", "softmax", "matmul_1"}
    assert ranges["softmax"] == (0.0, 255 / 256)
    assert all(abs(end) < 20 for bounds in ranges.values() for end in bounds)
    expected = model.predict(x, verbose=0)
    difference = np.abs(quantized.predict(x, verbose=0) - expected).max()
    assert 0 < difference < 0.05 * np.abs(expected).max()


def test_attention_stays_one_operation_where_activations_are_float():
    for activations in (None, "dynamic"):
        kinds = [type(op).__name__ for op in quantize(attention(), "int8", activations).operations]
        assert "DotProductAttention" in kinds


@pytest.mark.parametrize(
    "mask",
    [
        lambda x, masked: x + masked * -1e9,
        lambda x, masked: keras.ops.where(masked > 0.5, -1e4, x),
        lambda x, masked: x - (1.0 - keras.ops.cast(masked, "float32")) * -1e9,
        lambda x, masked: x + keras.ops.where(masked > 0.5, np.float32(-3e4), np.float32(0)),
    ],
)
def test_masks_written_by_hand_leave_no_range_either(mask):
    x, masked = keras.Input((4, 4)), keras.Input((4, 4))
    model = keras.Model([x, masked], layers.Softmax()(mask(keras.ops.exp(x), masked)))
    data = [RNG.normal(size=(8, 4, 4)), RNG.integers(0, 2, (8, 4, 4))]
    quantized = quantize(model, None, calibration=[[a.astype("float32") for a in data]])
    ends = [
        end
        for layer in quantized.layers
        if isinstance(layer, Quantize)
        for bounds in layer.ranges.values()
        for end in bounds
    ]
    assert max(np.abs(ends)) < 100


@pytest.mark.parametrize("followed", [True, False])
def test_a_separable_convolution_has_a_range_between_its_halves(followed):
    x = keras.Input((8, 8, 3))
    h = layers.SeparableConv2D(4, 3, name="conv")(x)
    model = keras.Model(x, layers.ReLU(name="relu")(h) if followed else h)
    quantized = quantize(model, calibration=X)
    places = wrapped(quantized)
    assert places["conv"] == (["middle"] if followed else ["middle", "output"])
    kernel = model.get_layer("conv").depthwise_kernel
    between = keras.ops.depthwise_conv(X, kernel)
    low, high = quantized.get_layer("quantize_conv").ranges["middle"]
    assert (low, high) == pytest.approx((np.min(between), np.max(between)), rel=0.05)
    expected = model.predict(X, verbose=0)
    difference = np.abs(quantized.predict(X, verbose=0) - expected).max()
    assert 0 < difference < 0.05 * np.abs(expected).max()
    assert list(wrapped(quantize(model, activations=None)).values()) == [[]]


def test_globs_leave_layers_float():
    quantized = quantize(cnn(), exclude="*conv/kernel")
    assert "conv" not in wrapped(quantized)
    assert "depthwise" in wrapped(quantized)
    with pytest.raises(ValueError, match="'x' matches no variable"):
        quantize(cnn(), include="x")


def test_weights_only():
    assert wrapped(quantize(cnn(), activations=None)) == {"conv": [], "depthwise": [], "head": []}


def schemes(model):
    return {
        weight.variable.path.split("/")[-2]: weight.scheme
        for layer in model.layers
        if isinstance(layer, Quantize)
        for weight in layer.quantizer.weights
    }


def test_weights_may_have_schemes_by_glob():
    quantized = quantize(cnn(), {"*conv*": "int4", "*head*": None, "*": "int8"}, None)
    assert schemes(quantized) == {"conv": Scheme(4), "depthwise": Scheme(8)}
    with pytest.raises(ValueError, match="'x' matches no variable"):
        quantize(cnn(), {"x": "int4"})


def test_a_part_of_a_layer_may_stay_float():
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, layers.SeparableConv2D(4, 3, name="conv")(x))
    quantized = quantize(model, exclude="*depthwise_kernel")
    (weight,) = quantized.get_layer("quantize_conv").quantizer.weights
    assert weight.variable.name == "pointwise_kernel"
    lstm = keras.Sequential([keras.Input((5, 3)), layers.LSTM(2, name="lstm")])
    quantized = quantize(lstm, exclude="*lstm_cell/kernel")
    (weight,) = quantized.get_layer("quantize_lstm").quantizer.weights
    assert weight.variable.name == "recurrent_kernel"
    with pytest.raises(ValueError, match="of one layer have several schemes"):
        quantize(model, {"*depthwise_kernel": "int8", "*": "int4"})


def test_dynamic_activations_are_rounded_before_layers_with_weights_only():
    model = cnn()
    quantized = quantize(model, activations="dynamic")
    assert set(wrapped(quantized)) == {"conv", "depthwise", "head"}
    assert quantized.get_layer("quantize_head").activations_scheme.dynamic
    exact = quantize(model, "int8", None)
    difference = quantized.predict(X, verbose=0) - exact.predict(X, verbose=0)
    assert 0 < np.abs(difference).max() < 0.05


def test_learned_scales_train_from_the_calibrated_ranges():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(16, "relu"), layers.Dense(2)]
    )
    y = model.predict(X, verbose=0)
    quantized = quantize(model, "w3a8", calibration=X, scales="lsq", verbose=0)
    assert quantized.get_layer("quantize_input_0").ranges["output"] == (X.min(), X.max())
    quantized.compile(keras.optimizers.Adam(1e-3), "mse")
    before = quantized.evaluate(X, y, verbose=0)
    quantized.fit(X, y, epochs=10, verbose=0)
    assert quantized.evaluate(X, y, verbose=0) < 0.5 * before


def error(model, **arguments):
    quantized = quantize(model, "int4", calibration=X, verbose=0, **arguments)
    return np.square(quantized.predict(X, verbose=0) - model.predict(X, verbose=0)).mean()


@pytest.mark.parametrize(
    "arguments",
    [
        {"rounding": "gptq"},
        {"rounding": "adaround"},
        {"bias_correction": True},
    ],
)
def test_each_correction_lowers_the_error_at_4_bits(arguments):
    keras.utils.set_random_seed(1)
    model = cnn()
    for kernel in (model.get_layer("conv").kernel, model.get_layer("head").kernel):
        kernel.assign(RNG.standard_t(3, size=kernel.shape) * 0.2)
    assert error(model, **arguments) < error(model)


def test_a_weight_calibrator_chooses_smaller_scales_where_there_are_outliers():
    model = cnn()
    kernel = model.get_layer("head").kernel
    outlier = np.zeros(kernel.shape, "float32")
    outlier[3, 0] = 4.0
    kernel.assign_add(outlier)
    quantized = quantize(model, "int4", None, weight_calibrator="mse")
    (weight,) = quantized.get_layer("quantize_head").quantizer.weights
    largest = np.abs(kernel).max(axis=0) / 7
    assert weight.scale[0, 0] < 0.97 * largest[0]
    np.testing.assert_allclose(weight.scale[0, 1], largest[1], rtol=0.3)


def test_equalization_helps_one_scale_a_tensor():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(8, 3, activation="relu", name="first")(x)
    model = keras.Model(x, layers.Conv2D(4, 3, name="second")(h))
    spread = np.float32(10.0) ** np.linspace(-1, 1, 8)
    first, second = model.get_layer("first").kernel, model.get_layer("second").kernel
    first.assign(first * spread)
    second.assign(second / spread[:, None])

    def error(**arguments):
        scheme = Scheme(granularity="tensor")
        quantized = quantize(model, scheme, calibration=X, verbose=0, **arguments)
        return np.square(quantized.predict(X, verbose=0) - model.predict(X, verbose=0)).mean()

    assert error(equalize=True) < 0.1 * error()


def test_a_budget_chooses_the_schemes():
    quantized = quantize(cnn(), "auto", calibration=X, budget=Budget(size=0.28), verbose=0)
    chosen = schemes(quantized)
    assert set(chosen) == {"conv", "depthwise", "head"}
    assert {scheme.bits for scheme in chosen.values()} == {4, 8}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weights": None, "activations": None}, "there is nothing to do"),
        ({"rounding": "gptq", "calibration": X, "scales": "lsq"}, "Pass one or the other"),
        ({"rounding": "up"}, "rounding='up' is not known"),
        ({"rounding": "gptq"}, "rounding='gptq' without calibration="),
        ({"smooth": 0.5}, "smooth= without calibration="),
        ({"weights": "auto", "calibration": X}, "needs a budget, got budget=None"),
        ({"weights": Scheme(symmetric=False), "scales": "lsq"}, "needs symmetric weights"),
        ({"calibrator": "best", "calibration": X}, "'best'"),
        ({"calibrator": "mse"}, "calibrator='mse' without calibration="),
        ({"smooth": "much", "calibration": X}, "got 'much'"),
        ({"budget": Budget(size=0.2)}, 'only weights="auto" keeps to'),
        ({"exclude": "*"}, "No weight of .* is left to quantize"),
        ({"include": 3}, "Expected a glob over variable.path, or several, got 3"),
        ({"calibration": [X, X]}, "A list is one array for each input"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        quantize(cnn(), **arguments)


def test_what_has_no_weights_yet_is_refused():
    with pytest.raises(ValueError, match="needs a built model"):
        quantize(keras.Sequential([layers.Dense(2)]))
