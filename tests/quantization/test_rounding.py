"""Rounding a whole quantized model: layer by layer, on real layers, and what goes wrong."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import mlp
from tfcompress import demo, zoo
from tfcompress.graph.expand import expand
from tfcompress.graph.inputs import watch_calls
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers import strip
from tfcompress.layers.quantize import Quantize
from tfcompress.quantization import Scheme, calibrate
from tfcompress.quantization.adaround import AdaRound, adaround
from tfcompress.quantization.gptq import GPTQ, gptq
from tfcompress.quantization.rounding import round_weights

QUICK = AdaRound(steps=300)
GROUP_32 = Scheme(4, granularity="group", group_size=32)


def with_scales(model, weights="int4", activations=None, scales="fixed", calibration=None):
    """The flat form of a model with every layer that has weights wrapped."""
    flat = expand(model)

    def wrap(layer):
        copy = layer.__class__.from_config(layer.get_config())
        if not isinstance(layer, keras.layers.Layer) or not weight_axes(layer):
            return copy
        return Quantize(copy, weights, activations, scales=scales)

    quantized = keras.models.clone_model(flat, clone_function=wrap)
    for layer in quantized.layers:
        inner = layer.layer if isinstance(layer, Quantize) else layer
        if inner.weights:
            inner.set_weights(flat.get_layer(inner.name).get_weights())
    if calibration is not None:
        calibrate(quantized, calibration)
    return quantized


def quantized_weights(model):
    wrappers = [layer for layer in model.layers if isinstance(layer, Quantize)]
    return [weight for wrapper in wrappers for weight in wrapper.quantizer.weights]


def assert_on_grid(weight):
    value, scale = weight.variable.numpy(), weight.grid()[0].numpy()
    steps = value / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    low, high = weight.scheme.limits
    assert low <= np.round(steps).min() <= np.round(steps).max() <= high
    # What the layer computes with is what was set.
    np.testing.assert_allclose(weight.quantize(weight.variable.value), value, atol=1e-6)


def hook_free(*models):
    return all("call" not in vars(layer) for model in models for layer in all_layers(model))


@functools.cache
def digits():
    """The demo's CNN, trained a little; images to calibrate on; others."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, _) = zoo.mnist5k(0)
    model = demo.cnn(filters=8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(5e-3), loss)
    model.fit(x, y, batch_size=64, epochs=2, verbose=0)
    return model, x[:256], x_test[:256]


def layer_outputs(model, x):
    """Name -> what each layer with a kernel returns when the whole model runs."""
    named = {layer.name: layer for layer in all_layers(model) if hasattr(layer, "kernel")}
    outputs = {}
    watch_calls(model, named, x, lambda name, call: outputs.update({name: call.outputs.numpy()}))
    return outputs


def layer_errors(model, quantized, x):
    """Name -> the squared error of what each layer with a kernel returns."""
    expected, actual = layer_outputs(expand(model), x), layer_outputs(quantized, x)
    return {name: np.square(actual[name] - each).sum() for name, each in expected.items()}


@pytest.mark.parametrize("scheme", ["int4", GROUP_32], ids=["channel", "group32"])
@pytest.mark.parametrize("method", ["gptq", QUICK], ids=["gptq", "adaround"])
def test_real_layers_lose_less_on_held_out_images(method, scheme):
    """Two convolutions and two dense layers that read digits."""
    model, calibration, held_out = digits()
    nearest, rounded = with_scales(model, scheme), with_scales(model, scheme)
    rounding = round_weights(rounded, model, calibration, method, verbose=0)
    assert len(rounding.errors) == 4
    assert rounding.skipped == {}
    assert max(rounding.errors.values()) < 0.6
    plain, ours = (layer_errors(model, each, held_out) for each in (nearest, rounded))
    assert len(plain) == 4
    for name, error in ours.items():
        assert 0 < error < 0.6 * plain[name], (name, error, plain[name])
    expected = model.predict(held_out, verbose=0)
    lost = [
        np.square(each.predict(held_out, verbose=0) - expected).sum() for each in (rounded, nearest)
    ]
    assert lost[0] < 0.5 * lost[1]
    for weight in quantized_weights(rounded):
        assert_on_grid(weight)
    assert hook_free(model, rounded)


@pytest.mark.parametrize("method", [GPTQ(act_order=True), AdaRound(steps=20)])
def test_pruned_weights_stay_zero_exactly(method):
    model, calibration, _ = digits()
    pruned = keras.models.clone_model(model)
    pruned.set_weights(model.get_weights())
    for layer in pruned.layers:
        if weight_axes(layer):
            kernel = layer.kernel.numpy()
            layer.kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, kernel))
    quantized = with_scales(pruned)
    round_weights(quantized, pruned, calibration[:128], method, verbose=0)
    floats = [v for layer in expand(pruned).layers for v, _ in weight_axes(layer)]
    for weight, before in zip(quantized_weights(quantized), floats, strict=True):
        zeros = before.numpy() == 0
        assert zeros.sum() >= zeros.size // 2
        np.testing.assert_array_equal(weight.variable.numpy()[zeros], 0.0)
        assert np.count_nonzero(weight.variable.numpy())


def varied():
    """A depthwise, a grouped and a transposed convolution, and an LSTM, on related inputs."""
    inputs = keras.Input((8, 8, 6))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(inputs)
    x = layers.Conv2D(8, 3, groups=2, activation="relu", name="grouped")(x)
    x = layers.Conv2DTranspose(4, 2, name="transposed")(x)
    x = layers.LSTM(6, name="lstm")(layers.Reshape((7, 28))(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="varied")


def images(count, seed=0):
    random = np.random.default_rng(seed)
    smooth = random.normal(size=(count, 10, 10, 2)).cumsum(1).cumsum(2)[:, 2:, 2:]
    return (smooth @ random.normal(size=(2, 6)) / 4).astype("float32")


def test_adaround_takes_layers_that_are_no_matrix_product():
    model = varied()
    data = images(160)
    quantized, nearest = with_scales(model), with_scales(model)
    rounding = round_weights(quantized, model, data[:128], QUICK, verbose=0)
    errors = {path.split("/", 1)[1]: error for path, error in rounding.errors.items()}
    assert list(errors) == [
        "depthwise/kernel",
        "grouped/kernel",
        "transposed/kernel",
        "lstm/lstm_cell/kernel",
        "lstm/lstm_cell/recurrent_kernel",
        "head/kernel",
    ]
    assert max(errors.values()) < 0.9
    assert errors["depthwise/kernel"] < 0.6
    expected = model.predict(data[128:], verbose=0)
    ours, theirs = (
        np.square(each.predict(data[128:], verbose=0) - expected).sum()
        for each in (quantized, nearest)
    )
    assert ours < 0.8 * theirs
    for weight in quantized_weights(quantized):
        assert_on_grid(weight)


def test_what_gptq_cannot_round_is_named_and_left_to_nearest():
    model = varied()
    quantized, nearest = with_scales(model), with_scales(model)
    rounding = round_weights(quantized, model, images(64), "gptq", verbose=0)
    assert [path.split("/")[-2] for path in rounding.errors] == ["head"]
    reasons = {path.split("/", 1)[1]: reason for path, reason in rounding.skipped.items()}
    assert reasons["grouped/kernel"] == "a convolution in 2 groups"
    assert "DepthwiseConv2D is not a plain" in reasons["depthwise/kernel"]
    assert len(reasons) == 5
    ours, theirs = (
        strip(each).get_layer("depthwise").kernel.numpy() for each in (quantized, nearest)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_what_adaround_cannot_round_is_named():
    ids = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(20, 8, mask_zero=True, name="embedding")(ids)
    x = layers.LSTM(4, name="masked")(embedded)
    model = keras.Model(ids, layers.Dense(2, name="head")(x))
    data = np.random.default_rng(0).integers(0, 20, (64, 6))
    quantized = with_scales(model)
    rounding = round_weights(quantized, model, data, AdaRound(steps=5), verbose=0)
    reasons = {path.split("/")[1]: reason for path, reason in rounding.skipped.items()}
    assert "nearest is best" in reasons["embedding"]
    assert reasons["masked"] == "its layer is called with more than one tensor"
    assert [path.split("/")[-2] for path in rounding.errors] == ["head"]


@pytest.mark.parametrize("method", ["gptq", AdaRound(steps=50)])
def test_equal_seeds_give_equal_weights_and_rounding_again_starts_anew(method):
    model = mlp()
    x = np.random.default_rng(0).normal(size=(200, 3)) @ np.ones((3, 12)) + np.eye(200, 12)
    first, second = with_scales(model), with_scales(model)
    for quantized in (first, second):
        round_weights(quantized, model, iter([x[:90], x[90:]]), method, seed=3, verbose=0)
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    round_weights(second, model, x[:50], "gptq", verbose=0)
    round_weights(second, model, iter([x[:90], x[90:]]), method, seed=3, verbose=0)
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gptq_sees_the_inputs_that_the_quantized_model_gives():
    model = mlp()
    x = np.random.default_rng(0).normal(size=(400, 12)).astype("float32")
    quantized = with_scales(model, "int4", "int3", calibration=x)
    first, last = (layer for layer in quantized.layers if isinstance(layer, Quantize))
    ranges = first.ranges, last.ranges
    round_weights(quantized, model, x, verbose=0)
    assert (first.ranges, last.ranges) == ranges
    hidden = keras.Model(quantized.input, first.output).predict(x, verbose=0).astype("float64")
    assert len(np.unique(hidden)) <= 8  # Three bits.
    (weight,) = last.quantizer.weights
    before = model.get_layer("head").kernel.numpy()
    moment, scale = hidden.T @ hidden, weight.grid()[0].numpy()
    expected = gptq(before, moment, scale, weight.scheme.limits)
    np.testing.assert_allclose(weight.variable.numpy(), expected, atol=1e-6)


def test_adaround_makes_up_for_rounded_activations():
    """What the float head computes is nearer than with AdaRound of the head by itself."""
    model = mlp()
    x = np.random.default_rng(0).normal(size=(400, 12)).astype("float32")
    quantized = with_scales(model, "int3", "int3", calibration=x)
    first, last = (layer for layer in quantized.layers if isinstance(layer, Quantize))
    rounding = round_weights(quantized, model, x, AdaRound(), verbose=0)
    hidden = keras.Model(quantized.input, first.output).predict(x, verbose=0)
    (weight,) = last.quantizer.weights
    head = model.get_layer("head")
    before = head.kernel.numpy()
    wanted = keras.Model(model.inputs, model.layers[0].output).predict(x, verbose=0) @ before
    scale, limits = weight.grid()[0].numpy(), weight.scheme.limits
    (alone,), _ = adaround(
        [before], [scale], limits, lambda x, w: tf.matmul(x, w[0]), hidden, hidden @ before
    )
    plain = np.clip(np.round(before / scale), *limits) * scale
    ours, others, nearest = (
        np.square(hidden @ each - wanted).sum() for each in (weight.variable.numpy(), alone, plain)
    )
    assert ours < others
    assert list(rounding.errors.values())[-1] == pytest.approx(ours / nearest, rel=1e-3)


def test_the_progress_bar_is_shown_on_demand(capsys):
    model = mlp()
    x = np.random.default_rng(0).normal(size=(40, 12))
    round_weights(with_scales(model), model, x, verbose=0)
    assert capsys.readouterr().out == ""
    round_weights(with_scales(model), model, x)
    assert "2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "method='best' is not known; pass one of .'adaround', 'gptq'"),
        ({"calibration": iter([])}, "holds no batch"),
        ({"calibration": np.full((4, 12), np.nan)}, "holds NaN or infinity"),
        ({"scales": "max"}, r"follows its largest weight.*scales=\"fixed\""),
        ({"model": mlp(num_features=9)}, "no layer 'hidden' with weights of these shapes"),
        ({"quantized": mlp()}, "'mlp' has no layer with quantized weights"),
    ],
)
@pytest.mark.parametrize("method", ["gptq", AdaRound(steps=5)])
def test_bad_input_is_refused_and_the_model_is_as_it_was(method, arguments, message):
    model = mlp()
    passed = {"calibration": np.ones((8, 12)), "method": method, **arguments}
    scales = passed.pop("scales", "fixed")
    passed = {"quantized": with_scales(model, scales=scales), "model": model, **passed}
    before = passed["quantized"].get_weights()
    with pytest.raises(ValueError, match=message):
        round_weights(**passed, verbose=0)
    for one, other in zip(passed["quantized"].get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert hook_free(passed["quantized"])
