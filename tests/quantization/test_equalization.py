"""Equalization: ranges become equal, outputs stay."""

import logging

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.graph import fold_batch_norm
from tfcompress.quantization import Scheme, quantize
from tfcompress.quantization.equalization import equalize

RNG = np.random.default_rng(0)
TENSOR = Scheme(granularity="tensor")


def uneven(model, seed=0):
    """The model with channels of very uneven ranges, as batch norms leave them behind."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for variable in layer.weights:
            value = variable.numpy()
            if isinstance(layer, layers.BatchNormalization):
                spread = np.exp(rng.normal(size=value.shape) * 0.5)
                value = spread if variable.name in ("gamma", "moving_variance") else 0.3 * spread
            elif value.ndim > 1:
                value = value * np.exp(rng.normal(size=value.shape[-1:]) * 1.5)
            else:
                value = rng.normal(size=value.shape) * 0.1
            variable.assign(value)
    return model


def batch(model, num=4):
    return RNG.normal(size=(num, *model.inputs[0].shape[1:])).astype("float32")


def relative_error(a, b):
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    return np.abs(a - b).max() / np.abs(a).max()


def assert_same_function(model, other, tolerance=1e-5):
    x = batch(model)
    assert relative_error(model(x, training=False), other(x, training=False)) < tolerance


def kernel(model, name):
    return model.get_layer(name).kernel.numpy()


def chain(*stack, shape=(8, 8, 3)):
    return uneven(keras.Sequential([keras.Input(shape), *stack]))


def messages(caplog, model, **options):
    with caplog.at_level(logging.INFO, "tfcompress"):
        equalize(model, **options)
    return [record.getMessage() for record in caplog.records if "equalize:" in record.getMessage()]


def test_ranges_of_a_pair_meet_at_their_geometric_mean():
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, "relu", name="a"), layers.Dense(1, name="b")]
    )
    first = np.array([[4.0, -9.0, 1.0], [1.0, 2.0, -1.0]])
    bias, second = np.array([2.0, 3.0, 5.0]), np.array([[1.0], [4.0], [1.0]])
    model.set_weights([first, bias, second, np.ones(1)])
    a, b, c, _ = equalize(model).get_weights()
    # The factors are sqrt(4 / 1), sqrt(9 / 4) and 1.
    np.testing.assert_allclose(a, first / [2, 1.5, 1], rtol=1e-5)
    np.testing.assert_allclose(b, bias / [2, 1.5, 1], rtol=1e-5)
    np.testing.assert_allclose(c[:, 0], [2, 6, 1], rtol=1e-5)
    np.testing.assert_array_equal(model.get_weights()[0], first.astype("float32"))


PAIRS = {
    "Conv1D": ((12, 3), lambda: [layers.Conv1D(4, 3, activation="relu"), layers.Conv1D(5, 3)]),
    "Conv2D, no bias": (
        (8, 8, 3),
        lambda: [layers.Conv2D(4, 3, use_bias=False), layers.ReLU(), layers.Conv2D(5, 3)],
    ),
    "grouped": ((8, 8, 4), lambda: [layers.Conv2D(6, 3), layers.Conv2D(8, 3, groups=2)]),
    "depthwise with multiplier": (
        (8, 8, 3),
        lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2), layers.ReLU(), layers.Conv2D(5, 1)],
    ),
    "into depthwise": ((8, 8, 3), lambda: [layers.Conv2D(4, 1), layers.DepthwiseConv2D(3, 2)]),
    "separable": (
        (8, 8, 3),
        lambda: [layers.SeparableConv2D(4, 3, depth_multiplier=2), layers.SeparableConv2D(5, 3)],
    ),
    "transposed": (
        (5, 5, 3),
        lambda: [
            layers.Conv2DTranspose(4, 3, strides=2, activation="relu"),
            layers.Conv2DTranspose(2, 3, strides=2),
        ],
    ),
    "leaky and parametric": (
        (8, 8, 3),
        lambda: [
            layers.Conv2D(4, 3, activation="leaky_relu"),
            layers.PReLU(shared_axes=[1, 2]),
            layers.ReLU(negative_slope=0.1),
            layers.Activation("relu"),
            layers.Conv2D(5, 3),
        ],
    ),
    "pooling and padding": (
        (9, 9, 3),
        lambda: [
            layers.Conv2D(4, 3, activation="relu"),
            layers.ZeroPadding2D(1),
            layers.MaxPooling2D(),
            layers.Dropout(0.5),
            layers.UpSampling2D(2),
            layers.AveragePooling2D(2),
            layers.Conv2D(5, 3, padding="same"),
        ],
    ),
    "flatten": ((6, 6, 3), lambda: [layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(5)]),
    "reshape": (
        (6, 6, 3),
        lambda: [
            layers.Conv2D(4, 3),
            layers.GlobalAveragePooling2D(),
            layers.Reshape((1, 1, 4)),
            layers.Conv2D(5, 1),
        ],
    ),
    "batch norm": (
        (8, 8, 3),
        lambda: [
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(5, 3, padding="same"),
        ],
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_every_pair_is_equalized_and_computes_the_same(kind, caplog):
    shape, stack = PAIRS[kind]
    model = chain(*stack(), shape=shape)
    assert any("divided by" in line for line in messages(caplog, model))
    equalized = equalize(model)
    assert_same_function(model, equalized)
    # Not because nothing was done.
    names = ("kernel", "pointwise_kernel")
    before, after = (
        [v.numpy() for v in m.layers[1].weights if v.name in names]
        for m in (fold_batch_norm(model), equalized)
    )
    assert relative_error(before[0], after[0]) > 0.01


def test_flattened_features_are_scaled_with_their_channel():
    model = chain(layers.Conv2D(2, 2, name="a"), layers.Flatten(), layers.Dense(3, name="b"))
    equalized = equalize(model)
    before = kernel(model, "b").reshape(49, 2, 3)
    after = kernel(equalized, "b").reshape(49, 2, 3)
    factors = after / before
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:1, :, :1], factors.shape), 1e-5)
    ranges = np.abs(kernel(equalized, "a")).max(axis=(0, 1, 2))
    np.testing.assert_allclose(ranges, np.abs(after).max(axis=(0, 2)), rtol=1e-3)


def test_a_depthwise_chain_of_three_has_three_equal_ranges():
    model = chain(
        layers.Conv2D(6, 1, activation="relu", name="a"),
        layers.DepthwiseConv2D(3, activation="relu", name="b"),
        layers.Conv2D(4, 1, name="c"),
    )
    original = [kernel(model, name) for name in "abc"]
    a, b, c = (kernel(equalize(model), name) for name in "abc")
    r1, r2, r3 = np.abs(a).max((0, 1, 2)), np.abs(b).max((0, 1, 3)), np.abs(c).max((0, 1, 3))
    np.testing.assert_allclose(r1, r2, rtol=1e-3)
    np.testing.assert_allclose(r2, r3, rtol=1e-3)
    # The paper's closed form: each is the cube root of the product.
    o1, o2, o3 = (np.abs(w).max(axes) for w, axes in zip(
        original, [(0, 1, 2), (0, 1, 3), (0, 1, 3)], strict=True))  # fmt: skip
    np.testing.assert_allclose(r1, np.cbrt(o1 * o2 * o3), rtol=1e-3)


def residual_net(activation="relu"):
    def block(x, width):
        h = layers.Conv2D(12, 1, use_bias=False)(x)
        h = layers.Activation(activation)(layers.BatchNormalization()(h))
        h = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(h)
        h = layers.Activation(activation)(layers.BatchNormalization()(h))
        h = layers.BatchNormalization()(layers.Conv2D(width, 1, use_bias=False)(h))
        return layers.Add()([x, h]) if x.shape[-1] == width else h

    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", activation=activation, name="stem")(inputs)
    x = block(block(x, 6), 8)
    x = layers.GlobalAveragePooling2D()(x)
    return uneven(keras.Model(inputs, layers.Dense(4, name="head")(x)))


def test_residual_nets_compute_the_same_and_branches_are_left(caplog):
    model = residual_net()
    lines = messages(caplog, model)
    assert sum("divided by" in line for line in lines) == 5
    assert any("nothing behind stem: stem has several readers" in line for line in lines)
    assert any("nothing behind head: it is an output of the model" in line for line in lines)
    assert any("(Add) does not scale channel by channel" in line for line in lines)
    assert_same_function(model, equalize(model))


def test_one_scale_a_tensor_fits_the_weights_much_better():
    model = residual_net()
    x = batch(model, 64)
    expected = model(x)

    def error(candidate):
        return relative_error(expected, quantize(candidate, TENSOR, None)(x))

    assert error(equalize(model)) < 0.3 * error(model)


def test_relu6_stays_or_is_replaced_when_asked(caplog):
    model = residual_net("relu6")
    lines = messages(caplog, model)
    assert any("replace_relu6=True makes it a ReLU" in line for line in lines)
    assert_same_function(model, equalize(model))
    replaced = equalize(model, replace_relu6=True)
    same = residual_net("relu")
    same.set_weights(model.get_weights())
    assert_same_function(same, replaced)
    assert "relu6" not in replaced.to_json()


def test_every_form_of_relu6_is_replaced():
    x = keras.Input((4,))
    h = layers.ReLU(6.0)(layers.Dense(5)(x))
    h = keras.ops.relu6(layers.Dense(5, activation="relu6")(h))
    model = uneven(keras.Model(x, layers.Dense(2)(h)))
    replaced = equalize(model, replace_relu6=True)
    h = layers.ReLU()(layers.Dense(5)(x))
    h = layers.Dense(5, activation="relu")(h)
    same = keras.Model(x, layers.Dense(2)(h))
    same.set_weights(model.get_weights())
    inputs = batch(model) * 50
    assert relative_error(same(inputs), replaced(inputs)) < 1e-5


def test_dead_channels_are_left_alone():
    model = chain(layers.Dense(4, "relu", name="a"), layers.Dense(2, name="b"), shape=(3,))
    a, b = model.layers
    a.kernel.assign(a.kernel.numpy() * [0, 1, 1, 1])
    b.kernel.assign(b.kernel.numpy() * [[1], [0], [1], [1]])
    equalized = equalize(model)
    np.testing.assert_allclose(kernel(equalized, "b")[:2], b.kernel.numpy()[:2], rtol=1e-6)
    np.testing.assert_allclose(kernel(equalized, "a")[:, 1], a.kernel.numpy()[:, 1], rtol=1e-6)
    assert np.isfinite(np.concatenate([w.ravel() for w in equalized.get_weights()])).all()
    assert_same_function(model, equalized)


def test_a_layer_called_twice_is_left_alone():
    x = keras.Input((4,))
    shared = layers.Dense(4, activation="relu", name="shared")
    h = layers.Dense(4, activation="relu", name="first")(shared(shared(x)))
    model = uneven(keras.Model(x, layers.Dense(2, name="last")(h)))
    equalized = equalize(model)
    np.testing.assert_array_equal(kernel(model, "shared"), kernel(equalized, "shared"))
    assert_same_function(model, equalized)


def test_channels_first_is_flattened_channel_by_channel():
    first = layers.Conv2D(2, 2, data_format="channels_first", name="a")
    model = keras.Sequential([keras.Input((3, 4, 4)), first, layers.Reshape((18,))])
    model.add(layers.Dense(3, name="b"))
    uneven(model)
    # Convolutions of this layout do not run on CPU; the factors say enough.
    factors = kernel(equalize(model), "b") / kernel(model, "b")
    np.testing.assert_allclose(factors[:9], np.broadcast_to(factors[0, 0], (9, 3)), 1e-5)
    np.testing.assert_allclose(factors[9:], np.broadcast_to(factors[9, 0], (9, 3)), 1e-5)
    assert abs(factors[0, 0] / factors[9, 0] - 1) > 0.01


def test_high_biases_move_on_where_batch_norm_tells_them():
    model = chain(
        layers.Conv2D(6, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(name="relu"),
        layers.Conv2D(4, 3),
    )
    norm = model.layers[1]
    norm.beta.assign([8.0, 0.0, 5.0, 1.0, 0.1, 9.0])
    norm.gamma.assign(np.full(6, 0.5))
    x = batch(model, 256)
    statistics = keras.ops.moments(model.layers[0](x), axes=(0, 1, 2))
    norm.moving_mean.assign(statistics[0])
    norm.moving_variance.assign(statistics[1])
    plain, absorbed = equalize(model), equalize(model, absorb_biases=True)

    def largest(equalized):
        part = keras.Model(equalized.inputs, equalized.get_layer("relu").output)
        return np.asarray(part(x)).max(axis=(0, 1, 2))

    moved = largest(plain) - largest(absorbed)
    assert (moved[[0, 2, 5]] > 0.3 * largest(plain)[[0, 2, 5]]).all()
    np.testing.assert_allclose(moved[[1, 3, 4]], 0, atol=1e-4)
    assert np.abs(np.asarray(plain(x) - absorbed(x))).mean() < 2e-3 * np.abs(plain(x)).mean()


def test_high_biases_stay_before_zero_padding(caplog):
    model = chain(
        layers.Conv2D(6, 3, use_bias=False),
        layers.BatchNormalization(beta_initializer="ones"),
        layers.ReLU(),
        layers.Conv2D(4, 3, padding="same"),
    )
    lines = messages(caplog, model, absorb_biases=True)
    assert any("the padded zeros would have to be shifted too" in line for line in lines)
    assert_same_function(model, equalize(model, absorb_biases=True))


@pytest.mark.parametrize("stack", [["sigmoid"], ["relu"]])
def test_a_model_without_pairs_is_refused(stack):
    last = [layers.Dense(2)] if stack == ["sigmoid"] else []
    model = chain(*[layers.Dense(3, activation) for activation in stack], *last, shape=(4,))
    with pytest.raises(ValueError, match="equalize found no two layers"):
        equalize(model)


def test_it_trains_saves_and_loads(tmp_path):
    model = residual_net()
    equalized = equalize(model)
    equalized.save(tmp_path / "m.keras")
    assert_same_function(model, keras.models.load_model(tmp_path / "m.keras"))
    equalized.compile("sgd", "mse")
    equalized.fit(batch(model, 8), np.ones((8, 4)), verbose=0)
