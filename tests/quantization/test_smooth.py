"""SmoothQuant: the function stays, the outliers go."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.quantization import quantize
from tfcompress.quantization.smooth import smooth

X = np.random.default_rng(0).normal(size=(128, 6, 16)).astype("float32")


def block(h, pre_norm):
    def attend(x):
        return layers.MultiHeadAttention(2, 8)(x, x)

    def feed(x):
        return layers.Dense(16)(layers.Dense(32, activation="gelu")(x))

    for branch in (attend, feed):
        if pre_norm:
            h = layers.Add()([h, branch(layers.LayerNormalization()(h))])
        else:
            h = layers.LayerNormalization()(layers.Add()([h, branch(h)]))
    return h


def transformer(pre_norm=True, outlier=100.0):
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 16))
    h = block(block(x, pre_norm), pre_norm)
    model = keras.Model(x, layers.Dense(4)(layers.GlobalAveragePooling1D()(h)))
    for layer in model.layers:
        if isinstance(layer, layers.LayerNormalization):
            spread = np.ones(16, "float32")
            spread[3] = outlier
            layer.gamma.assign(spread)
            layer.beta.assign(np.linspace(-0.5, 0.5, 16))
    for layer in model._flatten_layers():
        reads_norm = layer.__class__ in (layers.Dense, layers.EinsumDense) and layer.built
        if reads_norm and layer.kernel.shape[0] == 16:
            rows = np.ones((16, *[1] * (len(layer.kernel.shape) - 1)), "float32")
            rows[3] = 1 / outlier
            layer.kernel.assign(layer.kernel * rows)
    return model


def error(quantized, model):
    return np.square(quantized.predict(X, verbose=0) - model.predict(X, verbose=0)).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_outputs_are_those_of_the_model(alpha):
    model = transformer()
    smoothed = smooth(model, X, alpha, verbose=0)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(
        smoothed.predict(X, verbose=0), expected, atol=2e-5 * np.abs(expected).max()
    )


def test_the_input_model_is_not_touched():
    model = transformer()
    before = model.get_weights()
    smooth(model, X, verbose=0)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_int8_error_falls_where_a_channel_is_an_outlier():
    model = transformer()
    plain = quantize(model, calibration=X, verbose=0)
    smoothed = quantize(model, calibration=X, smooth=0.5, verbose=0)
    assert error(smoothed, model) < 0.2 * error(plain, model)


def test_readers_that_share_a_norm_share_its_factors():
    smoothed = smooth(transformer(), X, 1.0, verbose=0)
    norms = [x for x in smoothed.layers if isinstance(x, layers.LayerNormalization)]
    assert len(norms) == 4
    for norm in norms:
        # With alpha 1, all channels get the same largest activation.
        tap = keras.Model(smoothed.inputs, norm.output)
        largest = np.abs(tap.predict(X, verbose=0)).max(axis=(0, 1))
        np.testing.assert_allclose(largest, largest.mean(), rtol=1e-4)


def test_where_a_residual_connection_reads_the_norm_it_says_so(caplog):
    with (
        caplog.at_level("INFO", logger="tfcompress"),
        pytest.raises(ValueError, match=r"\(Add\) reads it too.*Leave smooth out"),
    ):
        smooth(transformer(pre_norm=False), X, verbose=0)


def test_rms_norms_are_smoothed_too():
    x = keras.Input((16,))
    norm = layers.RMSNormalization(name="norm")
    model = keras.Model(x, layers.Dense(2)(norm(x)))
    norm.scale.assign(10.0 ** np.linspace(-1, 1, 16))
    expected = model.predict(X[:, 0], verbose=0)
    smoothed = smooth(model, X[:, 0], verbose=0)
    np.testing.assert_allclose(smoothed.predict(X[:, 0], verbose=0), expected, atol=1e-4)
    scale = np.asarray(smoothed.get_layer("norm").scale)
    assert scale.max() / scale.min() < 50


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: smooth(transformer(), X, 2.0), r"alpha must be in \[0, 1\], got 2.0"),
        (lambda: smooth(transformer(), iter([]), verbose=0), "holds no batch"),
        (lambda: smooth(transformer(), X * np.nan, verbose=0), "NaN or infinite values"),
    ],
)
def test_bad_input_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
