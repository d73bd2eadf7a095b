"""Calibration as a pass over a stream."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import mlp
from tests.quantization.memory import BATCH, LONG
from tfcompress.layers import Quantize
from tfcompress.ops import histogram
from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import calibrators
from tfcompress.quantization.calibrate import _Observed, calibrate
from tfcompress.quantization.calibrators import Percentile
from tfcompress.quantization.quantize import quantize

X = np.random.default_rng(0).normal(size=(100, 12)).astype("float32")
KINDS = ["minmax", "moving_average", "percentile", "mse", "entropy"]


def ranges(model):
    return [layer.ranges for layer in model.layers if isinstance(layer, Quantize) and layer.ranges]


def input_range(model):
    return ranges(model)[0]["output"]


def calibrated(data, calibrator="minmax", **kwargs):
    model = quantize(mlp(), **kwargs)
    calibrate(model, data, calibrator, verbose=0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_gets_the_range_that_its_values_ask_for(kind):
    model = calibrated(X, kind)
    plain, scheme = mlp(), Scheme(symmetric=False, granularity="tensor")
    plain.set_weights(_weights(model))

    def expected(values):
        stream = histogram.empty()
        for start in range(0, 100, 32):
            stream = histogram.updated(stream, values[start : start + 32])
        return calibrators.get(kind).bounds(stream, scheme)

    found = [place["output"] for place in ranges(model)]
    outputs = [X, plain.layers[0](X), plain(X)]
    for bounds, values in zip(found, outputs, strict=True):
        np.testing.assert_allclose(bounds, expected(tf.constant(values)), rtol=0.05)
    np.testing.assert_allclose(found[0], expected(tf.constant(X)), rtol=1e-6)


def _weights(model):
    wrappers = [layer for layer in model.layers if isinstance(layer, Quantize)]
    return [w for wrapper in wrappers for w in wrapper.layer.get_weights()]


def test_minmax_widens_and_the_others_set_anew():
    model = calibrated(X)
    calibrate(model, X / 2, verbose=0)
    assert input_range(model) == (X.min(), X.max())
    calibrate(model, 3 * X, verbose=0)
    np.testing.assert_allclose(input_range(model), (3 * X.min(), 3 * X.max()))
    calibrate(model, X / 2, "moving_average", verbose=0)
    assert input_range(model)[1] <= X.max() / 2


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy"])
def test_how_the_data_is_cut_into_batches_does_not_matter(kind):
    whole = calibrated([(X,)], kind)
    parts = calibrated([(X[:64],), (X[64:96],), (X[96:],)], kind)
    np.testing.assert_allclose(input_range(parts), input_range(whole), rtol=1e-6)


def test_a_small_last_batch_moves_the_average_little():
    outlier = np.full((1, 12), 100, "float32")
    _, high = input_range(calibrated([(np.clip(X, -1, 1),), (outlier,)], "moving_average"))
    np.testing.assert_allclose(high, 1 + 99 * (1 - 0.9**0.01), rtol=1e-3)


def test_batches_of_other_sizes_are_traced_once_for_all(monkeypatch):
    traced, observe = [], _Observed.observe

    def noted(self, source, x):
        traced.append(x.shape[0])
        observe(self, source, x)

    monkeypatch.setattr(_Observed, "observe", noted)
    calibrated([(X[:32],), (X[32:64],), (X[:20],), (X[:7],), (X[:1],)], "mse")
    assert set(traced) == {32, None}
    assert traced.count(None) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad):
    spoiled = X.copy()
    spoiled[40, 3] = bad
    model = calibrated(X)
    before = ranges(model)
    with pytest.raises(ValueError, match="Batch 2 .*'quantize_input_0/output_range'"):
        calibrate(model, 2 * spoiled, verbose=0)
    assert ranges(model) == before


def test_the_layer_that_overflows_is_named():
    model = quantize(mlp())
    model.get_layer("quantize_head").layer.bias.assign([0, np.inf, 0])
    with pytest.raises(ValueError, match="'quantize_head/output_range'"):
        calibrate(model, X, verbose=0)


def test_a_stream_that_fails_changes_nothing():
    def broken():
        yield 5 * X
        raise OSError("the disk is gone")

    model = calibrated(X)
    before, outputs = ranges(model), model(X).numpy()
    with pytest.raises(OSError, match="the disk is gone"):
        calibrate(model, broken(), verbose=0)
    assert ranges(model) == before
    np.testing.assert_array_equal(model(X), outputs)


def test_no_data_and_no_such_calibrator():
    model = quantize(mlp())
    with pytest.raises(ValueError, match="The calibration data holds no batch"):
        calibrate(model, iter([]), verbose=0)
    with pytest.raises(ValueError, match="Did you mean 'entropy'"):
        calibrate(model, X, "entropie", verbose=0)


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_activations_get_symmetric_ranges(kind):
    scheme = Scheme(symmetric=True, granularity="tensor")
    model = calibrated(X + 1, kind, activations=scheme)
    for place in ranges(model):
        low, high = place["output"]
        assert -low == high > 0


def test_learned_ranges_are_set_too():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            Quantize(layers.Identity(), scales="lsq"),
            Quantize(layers.Dense(3), scales="lsq"),
        ]
    )
    calibrate(model, X, verbose=0)
    assert input_range(model) == (X.min(), X.max())


def test_a_layer_that_is_called_twice_has_seen_both():
    shared = layers.Dense(12, name="shared")
    inputs = keras.Input((12,))
    model = quantize(keras.Model(inputs, shared(10 * shared(inputs))))
    calibrate(model, X, "minmax", verbose=0)
    kernel, bias = model.get_layer("quantize_shared").layer.get_weights()
    first = X @ kernel + bias
    np.testing.assert_allclose(
        model.get_layer("quantize_shared").ranges["output"][1],
        max(first.max(), (10 * first @ kernel + bias).max()),
        rtol=0.02,
    )


def test_weights_only_models_have_nothing_to_calibrate():
    model = calibrated(X, "mse", activations=None)
    assert all(not layer.ranges for layer in model.layers if isinstance(layer, Quantize))


def test_subclassed_models_are_calibrated_where_they_are_wrapped():
    class Wrapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Quantize(layers.Identity())

        def call(self, inputs):
            return self.inner(inputs)

    model = Wrapped()
    calibrate(model, X, "minmax", verbose=0)
    assert model.inner.ranges["output"] == (X.min(), X.max())


def test_progress_is_shown(capsys):
    model = quantize(mlp())
    calibrate(model, X, "minmax")
    assert "4/4" in capsys.readouterr().out
    calibrate(model, iter([X[:50], X[50:]]))
    assert "2/Unknown" in capsys.readouterr().out
    calibrate(model, X, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["mse", "entropy", Percentile(99.9)])
def test_a_model_with_an_outlier_in_its_data_gains(kind):
    keras.utils.set_random_seed(3)
    plain = mlp()
    x = np.random.default_rng(0).normal(size=(5000, 12)).astype("float32")
    x[0] = 40
    expected = plain(x[1:])

    def error(kind):
        model = quantize(plain, weights="int8", activations="int4")
        calibrate(model, x, kind, verbose=0)
        return np.square(model(x[1:]) - expected).mean()

    assert error(kind) < 0.3 * error("minmax")


@pytest.mark.parametrize("kind", ["minmax", "entropy"])
def test_a_long_stream_takes_no_memory(kind):
    result = subprocess.run(
        [sys.executable, "-m", "tests.quantization.memory", kind],
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 0.1 * LONG * BATCH.nbytes
