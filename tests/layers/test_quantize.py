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


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="weights='int1' is not"):
        Quantize(layers.Dense(2), weights="int1")
    with pytest.raises(ValueError, match="wraps a Keras layer"):
        Quantize("dense")
