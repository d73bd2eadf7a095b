"""The wrapper: as the integer version computes, saved and stripped."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.layers import strip
from tfcompress.layers.prune import Prune
from tfcompress.layers.quantize import Quantize
from tfcompress.ops import fake_quant as fq
from tfcompress.ops.schemes import Scheme

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = X @ np.ones((6, 2), "float32")


def wrapped(**arguments):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Quantize(layers.Identity(), name="input"),
            Quantize(layers.Dense(5, activation="tanh"), name="first", **arguments),
            Quantize(layers.Dense(2), name="second", **arguments),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def test_it_computes_with_rounded_weights_and_rounds_its_output():
    model = keras.Sequential([keras.Input((6,)), Quantize(layers.Dense(2))])
    layer = model.layers[0]
    weights_only = fq.fake_quant_weights(layer.layer.kernel.value, Scheme(), 0)
    np.testing.assert_allclose(model(X), X @ weights_only, rtol=1e-5, atol=1e-6)
    model(X, training=True)
    low, high = layer.ranges["output"]
    grid = np.asarray(model(X)) / ((high - low) / 255)
    np.testing.assert_allclose(grid, np.round(grid), atol=1e-2)


def test_a_model_saved_in_training_goes_on_as_if_it_had_not_been(tmp_path):
    model = wrapped()
    model.fit(X, Y, epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.ranges for layer in again.layers] == [layer.ranges for layer in model.layers]
    for each in (model, again):
        each.fit(X, Y, epochs=1, verbose=0, shuffle=False)
    np.testing.assert_array_equal(model.predict(X, verbose=0), again.predict(X, verbose=0))


def test_inference_moves_no_range():
    model = wrapped()
    model.fit(X, Y, verbose=0)
    before = [layer.ranges for layer in model.layers]
    model.predict(10 * X, verbose=0)
    model.evaluate(10 * X, Y, verbose=0)
    assert [layer.ranges for layer in model.layers] == before


def test_strip_gives_plain_layers_with_weights_on_the_grid():
    model = wrapped(activations=None)
    model.fit(X, Y, verbose=0)
    plain = strip(model)
    assert [type(layer).__name__ for layer in plain.layers] == ["Identity", "Dense", "Dense"]
    kernel = plain.layers[1].kernel.numpy()
    steps = kernel / (np.abs(kernel).max(axis=0) / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    h = np.asarray(model.layers[0](X))
    np.testing.assert_allclose(
        plain.predict(h, verbose=0), model.predict(X, verbose=0), rtol=1e-4, atol=1e-5
    )


def test_a_softmax_has_the_range_of_its_kernel():
    layer = Quantize(layers.Dense(2, activation="softmax"))
    layer.build((None, 3))
    assert layer.ranges == {"preactivation": (0.0, 0.0), "output": (0.0, 255 / 256)}


def test_zeros_stay_zeros_over_a_pruned_layer():
    model = keras.Sequential([keras.Input((6,)), Quantize(Prune(layers.Dense(5), sparsity=0.5))])
    model.compile("sgd", "mse")
    model.fit(X, np.ones((64, 5)), verbose=0, epochs=2)
    kernel = model.layers[0].layer.layer.kernel
    assert np.count_nonzero(kernel) == 15
    assert np.count_nonzero(strip(model).layers[0].kernel) == 15


def test_xla_equals_graph():
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = wrapped()
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        model.fit(X, Y, epochs=2, verbose=0, shuffle=False)
        results.append(model.get_weights())
    for graph, xla in zip(*results, strict=True):
        np.testing.assert_allclose(graph, xla, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantize(layers.LSTM(3)),
        lambda: Quantize(layers.TimeDistributed(layers.Dense(3))),
        lambda: Quantize(layers.Conv1D(3, 2)),
        lambda: Quantize(layers.Dense(3, dtype="mixed_bfloat16")),
        lambda: Quantize(keras.Sequential([layers.Dense(3), layers.Dense(2)])),
    ],
)
def test_other_layers_train_and_reload(make, tmp_path):
    model = keras.Sequential([keras.Input((4, 6)), make(), layers.Flatten(), layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(16, 4, 6)).astype("float32")
    model.fit(x, np.ones((16, 1)), verbose=0)
    assert all(high > low for low, high in model.layers[0].ranges.values())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))


def test_globs_choose_the_weights():
    layer = Quantize(layers.SeparableConv2D(3, 2), include="*/pointwise_kernel")
    layer.build((None, 4, 4, 2))
    assert [weight.variable.name for weight in layer.quantizer.weights] == ["pointwise_kernel"]
    with pytest.raises(ValueError, match="'nothing' matches no variable"):
        Quantize(layers.Dense(2), exclude="nothing").build((None, 3))


def lsq(weights="w3a4", scales="lsq"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Quantize(layers.Identity(), None, "int4", scales=scales, name="input"),
            Quantize(layers.Dense(16, activation="relu"), weights, scales=scales, name="first"),
            Quantize(layers.Dense(2), weights, scales=scales, name="second"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def test_learned_scales_start_from_the_weights_and_the_first_batch():
    model = lsq()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(X, Y, batch_size=64, verbose=0)
    first = model.layers[1]
    start = fq.learned_scale(first.layer.kernel.value, Scheme(3), 0)
    np.testing.assert_allclose(first.quantizer.weights[0].scale, start, rtol=1e-6)
    assert model.layers[0].ranges["output"] == (float(X.min()), float(X.max()))


def test_learned_scales_are_trained_and_beat_those_of_the_extremes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 6)).astype("float32")
    y = np.tanh(x @ rng.normal(size=(6, 2))).astype("float32")
    keras.utils.set_random_seed(0)
    trained = keras.Sequential([layers.Dense(32, activation="relu"), layers.Dense(2)])
    trained.compile(keras.optimizers.Adam(0.01), "mse")
    trained.fit(x, y, epochs=40, verbose=0)
    errors = {}
    for scales in ("max", "lsq"):
        plain = keras.models.clone_model(trained)
        plain.set_weights(trained.get_weights())
        model = keras.Sequential([Quantize(each, "w2a4", scales=scales) for each in plain.layers])
        model.compile(keras.optimizers.Adam(0.003), "mse")
        model.fit(x, y, epochs=20, verbose=0)
        errors[scales] = model.evaluate(x, y, verbose=0)
    assert errors["lsq"] < 0.7 * errors["max"]
    scale = model.layers[0].quantizer.weights[0].scale
    before, ranges = np.asarray(scale), model.layers[0].ranges
    model.fit(x, y, verbose=0)
    assert np.mean(np.asarray(scale) != before) > 0.5  # Dead units have no gradient.
    assert model.layers[0].ranges != ranges


def test_learned_scales_are_saved_and_go_on(tmp_path):
    model = lsq()
    model.fit(X, Y, epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, again):
        each.fit(X, Y, epochs=1, verbose=0, shuffle=False)
    np.testing.assert_array_equal(model.predict(X, verbose=0), again.predict(X, verbose=0))


def test_a_fixed_scale_is_used_and_kept(tmp_path):
    scheme = Scheme(4, granularity="group", group_size=2)
    model = keras.Sequential(
        [keras.Input((6,)), Quantize(layers.Dense(2), scheme, None, scales="fixed")]
    )
    weight = model.layers[0].quantizer.weights[0]
    kernel = np.asarray(weight.variable)
    by_extremes = fq.weight_scale(kernel, scheme, (0,))
    np.testing.assert_allclose(model(X), X @ fq.fake_quant_weights(kernel, scheme, 0), atol=1e-5)
    weight.set_scale(by_extremes / 2)
    rounded = fq.fake_quant_weights(kernel, scheme, 0, by_extremes / 2)
    np.testing.assert_allclose(model(X), X @ rounded, atol=1e-5)
    assert weight.scale.shape == (3, 2)
    np.testing.assert_array_equal(weight.grid()[0], by_extremes / 2)
    np.testing.assert_array_equal(strip(model).layers[0].kernel, rounded)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(X), model(X))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scales='min' is not known; pass one of"):
        Quantize(layers.Dense(2), scales="min")
    with pytest.raises(ValueError, match="needs symmetric weights"):
        Quantize(layers.Dense(2), Scheme(symmetric=False), scales="lsq")
    with pytest.raises(ValueError, match="percentile=101 must be in"):
        Quantize(layers.Dense(2), percentile=101)
    with pytest.raises(ValueError, match="weights='int1' is not"):
        Quantize(layers.Dense(2), weights="int1")
    with pytest.raises(ValueError, match="a dict of globs is for tfcompress.quantize"):
        Quantize(layers.Dense(2), weights={"*kernel": "int8"})
    with pytest.raises(ValueError, match="percentile='99' must be in"):
        Quantize(layers.Dense(2), percentile="99")
    with pytest.raises(ValueError, match="wraps a Keras layer"):
        Quantize("dense")
