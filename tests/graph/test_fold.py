"""Folding batch norm: which layers, in which order, with equal outputs."""

import logging

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.graph import fold_batch_norm


def randomized(model):
    """The model with every weight, moving statistics included, away from its initial value."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        low = 0.5 if "variance" in variable.name else -1.0
        variable.assign(rng.uniform(low, 1.0, variable.shape))
    return model


def chain(shape, *stack):
    return randomized(keras.Sequential([keras.Input(shape), *stack]))


def kinds(model):
    return [type(layer).__name__ for layer in model.layers[1:]]


def largest_difference(model, folded, batch=3):
    x = np.random.default_rng(1).uniform(-1, 1, (batch, *model.inputs[0].shape[1:]))
    a, b = model(x.astype("float32")), folded(x.astype("float32"))
    return float(np.max(np.abs(np.asarray(a, "float64") - np.asarray(b, "float64"))))


BEHIND = {
    "Dense": ((5,), lambda: layers.Dense(4)),
    "Dense on a sequence, no bias": ((6, 5), lambda: layers.Dense(4, use_bias=False)),
    "EinsumDense": ((6, 5), lambda: layers.EinsumDense("abc,cd->abd", (None, 4))),
    "EinsumDense with heads": (
        (6, 5),
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
    ),
    "Conv1D": ((9, 3), lambda: layers.Conv1D(4, 3, padding="causal")),
    "Conv2D": ((8, 8, 4), lambda: layers.Conv2D(6, 3, padding="same", groups=2)),
    "Conv3D": ((4, 4, 4, 2), lambda: layers.Conv3D(3, 2)),
    "DepthwiseConv1D": ((9, 3), lambda: layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "DepthwiseConv2D": ((8, 8, 3), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "SeparableConv1D": ((9, 3), lambda: layers.SeparableConv1D(4, 3)),
    "SeparableConv2D": ((8, 8, 3), lambda: layers.SeparableConv2D(4, 3, use_bias=False)),
    "Conv1DTranspose": ((9, 3), lambda: layers.Conv1DTranspose(4, 3, strides=2)),
    "Conv2DTranspose": ((4, 4, 3), lambda: layers.Conv2DTranspose(4, 3, strides=2)),
    "Conv3DTranspose": ((3, 3, 3, 2), lambda: layers.Conv3DTranspose(4, 2)),
}


@pytest.mark.parametrize("case", BEHIND)
def test_a_batch_norm_behind_a_linear_layer_goes_into_it(case):
    shape, make = BEHIND[case]
    layer = make()
    model = chain(shape, layer, layers.BatchNormalization(), layers.ReLU())
    folded = fold_batch_norm(model)
    assert kinds(folded) == [type(layer).__name__, "ReLU"]
    assert largest_difference(model, folded) < 2e-5


BEFORE = {
    "Dense": ((5,), lambda: layers.Dense(4, activation="relu")),
    "Conv1D": ((9, 3), lambda: layers.Conv1D(4, 3)),
    "Conv2D": ((8, 8, 4), lambda: layers.Conv2D(6, 3, groups=2, use_bias=False)),
    "Conv3D": ((4, 4, 4, 2), lambda: layers.Conv3D(3, 2)),
    "DepthwiseConv1D": ((9, 3), lambda: layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "DepthwiseConv2D": ((8, 8, 3), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "SeparableConv1D": ((9, 3), lambda: layers.SeparableConv1D(4, 3, depth_multiplier=2)),
    "SeparableConv2D": ((8, 8, 3), lambda: layers.SeparableConv2D(4, 3)),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_batch_norm_before_an_unpadded_linear_layer_goes_into_it(case):
    shape, make = BEFORE[case]
    layer = make()
    model = chain(shape, layers.ReLU(), layers.BatchNormalization(), layer)
    folded = fold_batch_norm(model)
    assert kinds(folded) == ["ReLU", type(layer).__name__]
    assert largest_difference(model, folded) < 2e-5


SHIFT_SENSITIVE = {
    "Conv2D": ((8, 8, 3), lambda: layers.Conv2D(4, 3, padding="same")),
    "DepthwiseConv2D": ((8, 8, 3), lambda: layers.DepthwiseConv2D(3, padding="same")),
    "Conv2DTranspose": ((4, 4, 3), lambda: layers.Conv2DTranspose(4, 3, strides=2)),
    "EinsumDense": ((6, 5), lambda: layers.EinsumDense("abc,cd->abd", (None, 4))),
}


@pytest.mark.parametrize("case", SHIFT_SENSITIVE)
def test_before_a_padded_layer_only_a_batch_norm_without_shift_is_folded(case):
    shape, make = SHIFT_SENSITIVE[case]
    norm = layers.BatchNormalization()
    model = chain(shape, layers.ReLU(), norm, make())
    assert "BatchNormalization" in kinds(fold_batch_norm(model))

    norm.beta.assign(np.zeros(shape[-1]))
    norm.moving_mean.assign(np.zeros(shape[-1]))
    folded = fold_batch_norm(model)
    assert "BatchNormalization" not in kinds(folded)
    assert largest_difference(model, folded) < 2e-5


def test_a_layer_takes_the_batch_norms_on_both_sides():
    model = chain(
        (8, 8, 3),
        layers.ReLU(),
        layers.BatchNormalization(),
        layers.Conv2D(4, 3),
        layers.BatchNormalization(),
    )
    folded = fold_batch_norm(model)
    assert kinds(folded) == ["ReLU", "Conv2D"]
    assert largest_difference(model, folded) < 2e-5


def test_the_folded_weights_are_those_of_the_formula():
    model = chain((1,), layers.Dense(1), layers.BatchNormalization(epsilon=0.0))
    dense, norm = model.layers
    for variable, value in [
        (dense.kernel, [[3.0]]),
        (dense.bias, [1.0]),
        (norm.gamma, [4.0]),
        (norm.beta, [0.5]),
        (norm.moving_mean, [2.0]),
        (norm.moving_variance, [16.0]),
    ]:
        variable.assign(value)
    folded = fold_batch_norm(model).layers[1]
    # s = 4 / sqrt(16) = 1, t = 0.5 - 1 * 2 = -1.5: W' = 3, b' = 1 - 1.5
    np.testing.assert_allclose(folded.kernel, [[3.0]])
    np.testing.assert_allclose(folded.bias, [-0.5])


def test_an_activation_in_between_keeps_the_batch_norm(caplog):
    model = chain((5,), layers.Dense(4, activation="relu"), layers.BatchNormalization(name="bn"))
    with caplog.at_level(logging.INFO, "tfcompress"):
        folded = fold_batch_norm(model)
    assert kinds(folded) == ["Dense", "BatchNormalization"]
    assert "bn stays" in caplog.text
    assert "the activation relu lies between" in caplog.text


def test_a_layer_that_is_called_twice_keeps_its_batch_norm(caplog):
    shared, x = layers.Dense(4, name="shared"), keras.Input((4,))
    h = layers.BatchNormalization(name="bn")(shared(shared(x)))
    model = randomized(keras.Model(x, layers.ReLU()(h)))
    with caplog.at_level(logging.INFO, "tfcompress"):
        folded = fold_batch_norm(model)
    assert "BatchNormalization" in kinds(folded)
    assert "behind shared: it is called more than once" in caplog.text
    assert largest_difference(model, folded) == 0


def test_an_output_that_is_read_twice_keeps_its_batch_norm():
    x = keras.Input((4,))
    h = layers.Dense(4)(x)
    model = randomized(keras.Model(x, layers.Add()([h, layers.BatchNormalization()(h)])))
    folded = fold_batch_norm(model)
    assert "BatchNormalization" in kinds(folded)
    assert largest_difference(model, folded) == 0


def test_an_output_of_the_model_keeps_its_batch_norm():
    x = keras.Input((4,))
    h = layers.Dense(4)(x)
    model = randomized(keras.Model(x, [h, layers.BatchNormalization()(h)]))
    assert "BatchNormalization" in kinds(fold_batch_norm(model))


def test_a_batch_norm_over_another_axis_stays():
    model = chain((6, 4), layers.Dense(4), layers.BatchNormalization(axis=1))
    assert "BatchNormalization" in kinds(fold_batch_norm(model))


def test_what_was_folded_is_logged(caplog):
    model = chain((5,), layers.Dense(4, name="fc"), layers.BatchNormalization(name="bn"))
    with caplog.at_level(logging.INFO, "tfcompress"):
        fold_batch_norm(model)
    assert "bn goes into fc" in caplog.text


def test_the_original_keeps_its_weights_and_shares_none():
    model = chain((5,), layers.Dense(4), layers.BatchNormalization(), layers.Dense(2))
    before = model.get_weights()
    folded = fold_batch_norm(model)
    for variable in folded.weights:
        variable.assign(np.zeros(variable.shape))
    for value, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_model_without_batch_norm_is_copied():
    model = chain((5,), layers.Dense(4, activation="relu"), layers.Dense(2))
    folded = fold_batch_norm(model)
    assert folded is not model
    assert largest_difference(model, folded) == 0


def test_adapted_statistics_are_copied():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).uniform(5, 9, (50, 3)))
    model = keras.Sequential([keras.Input((3,)), normalization, layers.Dense(2)])
    assert largest_difference(model, fold_batch_norm(model)) == 0


def test_frozen_layers_stay_frozen():
    frozen = layers.Dense(4, trainable=False)
    model = chain((5,), frozen, layers.BatchNormalization(), layers.ReLU(), layers.Dense(2))
    assert [layer.trainable for layer in fold_batch_norm(model).layers[1:]] == [False, True, True]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_kept(policy):
    model = chain(
        (8, 8, 3),
        layers.Conv2D(4, 3, dtype=policy),
        layers.BatchNormalization(dtype=policy),
        layers.ReLU(dtype=policy),
    )
    folded = fold_batch_norm(model)
    assert folded.layers[1].dtype_policy.name == policy
    assert folded.layers[1].kernel.dtype == "float32"
    assert largest_difference(model, folded) < 0.1


def test_mobilenet_loses_every_batch_norm():
    model = keras.applications.MobileNetV2(
        weights=None, alpha=0.35, input_shape=(32, 32, 3), classes=4
    )
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if "moving_mean" in variable.path or "beta" in variable.path:
            variable.assign(rng.uniform(-0.1, 0.1, variable.shape))
    folded = fold_batch_norm(model)
    assert "BatchNormalization" not in kinds(folded)
    assert largest_difference(model, folded) < 1e-5


def test_the_result_saves_loads_and_trains(tmp_path):
    model = chain((8, 8, 3), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Flatten())
    folded = fold_batch_norm(model)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    assert largest_difference(folded, loaded) == 0

    loaded.compile("sgd", "mse")
    loaded.fit(np.ones((4, 8, 8, 3)), np.ones((4, 144)), verbose=0)
    assert largest_difference(folded, loaded) > 0
