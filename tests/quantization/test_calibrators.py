"""Ranges and scales, judged by the error of what is quantized with them."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import fake_quant as fq
from tfcompress.ops import histogram
from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import calibrators
from tfcompress.quantization.calibrators import MSE, Entropy, MinMax, MovingAverage, Percentile

SIZE = 100_000
RANDOM = np.random.default_rng(0)
GAUSS = RANDOM.normal(size=SIZE)


def silu(x):
    return x / (1 + np.exp(-x))


STREAMS = {
    "gauss": GAUSS,
    "few": RANDOM.normal(size=300),
    "laplace": RANDOM.laplace(size=SIZE),
    "relu": np.maximum(GAUSS, 0),
    "relu, nearly all zeros": np.maximum(GAUSS - 2, 0),
    "relu6": np.clip(4 * GAUSS, 0, 6),
    "silu": silu(3 * GAUSS),
    "tanh": np.tanh(3 * GAUSS),
    "bimodal": GAUSS / 5 + np.where(RANDOM.random(SIZE) < 0.3, -5, 4),
    "student": RANDOM.standard_t(3, size=SIZE),
    "very heavy": RANDOM.standard_t(2, size=SIZE),
    "lognormal": np.exp(1.5 * GAUSS),
    "softmax": np.exp(3 * GAUSS) / np.exp(3 * GAUSS).max(),
    "outliers": np.where(np.arange(SIZE) < 10, 30, GAUSS),
    "one far outlier": np.where(np.arange(SIZE) < 1, 1e4, GAUSS),
    "peak": np.where(RANDOM.random(SIZE) < 0.8, 0.123, GAUSS),
    "uniform": RANDOM.random(SIZE),
    "integers": RANDOM.integers(0, 5, SIZE),
    "two values": np.where(RANDOM.random(SIZE) < 0.01, 1, 0.01),
    "constant": np.full(100, 3.3),
    "negative constant": np.full(100, -0.7),
}
STREAMS = {name: values.astype("float32") for name, values in STREAMS.items()}


def activations(bits=8, symmetric=False):
    return Scheme(bits, symmetric=symmetric, granularity="tensor")


def stream_of(x, num_batches=4):
    stream = histogram.empty()
    for batch in np.array_split(x, num_batches):
        stream = histogram.updated(stream, tf.constant(batch))
    return stream


def error(x, bounds, scheme):
    return float(np.square(fq.fake_quant_activations(x, bounds, scheme) - x).mean(dtype=float))


def errors(name, scheme, *kinds):
    x = STREAMS[name] if isinstance(name, str) else name
    stream = stream_of(x)
    return [error(x, calibrators.get(kind).bounds(stream, scheme), scheme) for kind in kinds]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("name", STREAMS)
def test_searched_ranges_are_no_worse_than_the_extremes(name, bits, symmetric):
    minmax, mse, entropy = errors(name, activations(bits, symmetric), "minmax", "mse", "entropy")
    assert mse <= 1.06 * minmax + 1e-12
    assert entropy <= 1.04 * minmax + 1e-12


@pytest.mark.parametrize("kind", ["mse", "entropy", Percentile(99.9)])
@pytest.mark.parametrize("symmetric, at_most", [(False, 0.25), (True, 0.12)])
def test_at_4_bits_outliers_are_clipped(kind, symmetric, at_most):
    minmax, calibrated = errors("outliers", activations(4, symmetric), "minmax", kind)
    assert calibrated < at_most * minmax


@pytest.mark.parametrize("kind", ["mse", "entropy"])
def test_at_8_bits_one_outlier_in_a_million_is_clipped(kind):
    x = np.append(np.random.default_rng(1).normal(size=2**20), 100).astype("float32")
    minmax, calibrated = errors(x, activations(8, symmetric=True), "minmax", kind)
    assert calibrated < 0.2 * minmax


def test_an_outlier_that_holds_all_the_energy_is_kept():
    for kind in ("mse", "entropy"):
        _, high = calibrators.get(kind).bounds(
            stream_of(STREAMS["one far outlier"]), activations(8)
        )
        np.testing.assert_allclose(high, 1e4, rtol=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["gauss", "laplace", "relu", "silu", "bimodal", "student"])
def test_mse_finds_what_a_search_on_the_values_themselves_finds(name, bits):
    x, scheme = STREAMS[name][:5000], activations(bits)
    found = error(x, MSE().bounds(stream_of(x), scheme), scheme)
    shares = np.linspace(0.1, 1, 10)
    best = min(
        error(x, (x.min() * low, x.max() * high), scheme)
        for low in (shares if x.min() < 0 else [1])
        for high in shares
    )
    assert found <= 1.02 * best


def test_mse_searches_each_end_by_itself():
    x = np.where(np.arange(SIZE) < 5, 40, GAUSS - 1).astype("float32")
    scheme = activations(4)
    low, high = MSE().bounds(stream_of(x), scheme)
    shares = np.linspace(0.02, 1, 50)
    common = min(error(x, (x.min() * share, x.max() * share), scheme) for share in shares)
    assert error(x, (low, high), scheme) < 0.75 * common
    assert 0.5 * x.min() > low > x.min()
    assert high < 4


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_does_not_see_how_many_zeros_there_are(bits):
    x = STREAMS["relu"][STREAMS["relu"] > 0]
    diluted = np.concatenate([x, np.zeros(20 * len(x), "float32")])
    scheme = activations(bits)
    expected = Entropy().bounds(stream_of(x), scheme)
    assert Entropy().bounds(stream_of(diluted), scheme) == expected
    assert 2.5 < expected[1] < x.max()


def test_entropy_is_steady_in_the_size_of_the_sample():
    scheme = activations(4, symmetric=True)
    highs = [Entropy().bounds(stream_of(GAUSS[:n]), scheme)[1] for n in (3000, 30_000, SIZE)]
    np.testing.assert_allclose(highs, highs[-1], rtol=0.2)


def test_entropy_clips_more_where_fewer_bits_are():
    highs = [Entropy().bounds(stream_of(GAUSS), activations(b, True))[1] for b in (2, 3, 4, 8)]
    assert highs == sorted(highs)
    assert highs[0] < 0.6 * highs[-1]


def test_entropy_of_uniform_data_clips_nothing():
    low, high = Entropy().bounds(stream_of(STREAMS["uniform"]), activations(8))
    assert low == 0
    assert high > 0.99


@pytest.mark.parametrize("kind", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_every_calibrator_keeps_zero_in_and_symmetric_ranges_symmetric(kind):
    calibrator = calibrators.get(kind)
    for name in ("gauss", "relu", "negative constant", "softmax"):
        stream, x = stream_of(STREAMS[name]), STREAMS[name]
        low, high = calibrator.bounds(stream, activations(8))
        assert min(x.min(), 0) * 1.0001 <= low <= 0 <= high <= max(x.max(), 0) * 1.0001
        low, high = calibrator.bounds(stream, activations(4, symmetric=True))
        assert -low == high > 0
    nothing = calibrator.bounds(stream_of(np.zeros(8, "float32")), activations(8))
    assert nothing == (0, 0)


def test_power_of_two_grids_are_judged_as_they_are():
    scheme = dataclasses.replace(activations(4, symmetric=True), power_of_two=True)
    minmax, mse = errors("gauss", scheme, "minmax", "mse")
    assert mse < 0.5 * minmax


def test_minmax_is_the_extremes():
    assert MinMax().bounds(stream_of(np.float32([-3, 1])), activations()) == (-3, 1)
    assert MinMax().bounds(stream_of(np.float32([-3, 1])), activations(8, True)) == (-3, 3)


def test_the_moving_average_forgets():
    calibrator, stream = MovingAverage(momentum=0.5), histogram.empty()
    for high in (4.0, 8.0, 16.0):
        stream = histogram.updated(stream, [0.0, high], calibrator.momentum)
    assert calibrator.bounds(stream, activations()) == (0, 11)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("name", ["gauss", "student", "relu", "lognormal"])
def test_percentiles_are_those_of_numpy(name, percentile):
    x = STREAMS[name]
    stream, outside = stream_of(x), 100 - percentile
    low, high = Percentile(percentile).bounds(stream, activations())
    ends = [outside / 2, 100 - outside / 2] if x.min() < 0 else [0, percentile]
    expected = np.minimum(np.percentile(x, ends), [0, np.inf])
    np.testing.assert_allclose([low, high], expected, rtol=0.02)
    _, high = Percentile(percentile).bounds(stream, activations(8, True))
    np.testing.assert_allclose(high, np.percentile(np.abs(x), percentile), rtol=0.02)


def test_hundred_percent_are_the_extremes():
    x = STREAMS["student"]
    np.testing.assert_allclose(
        Percentile(100).bounds(stream_of(x), activations()), [x.min(), x.max()], rtol=1e-6
    )


def layer_weights(shape=(128, 48), seed=0):
    """Kernels as trained ones are: near normal within a channel, with a few far outliers."""
    random = np.random.default_rng(seed)
    w = random.normal(size=shape) * np.exp(random.normal(size=shape[-1]) / 2)
    w = np.where(random.random(shape) < 0.003, 8 * w, w)
    return w.astype("float32")


GRANULARITIES = {
    "tensor": Scheme(4, granularity="tensor"),
    "channel": Scheme(4),
    "group": Scheme(4, granularity="group", group_size=48),
}
SEARCHED = ["mse", "entropy"]


def weight_errors(w, scheme, axes, kind):
    """Squared errors, summed over what shares a channel."""
    scale = calibrators.weight_scale(w, scheme, axes, kind)
    return np.square(fq.fake_quant_weights(w, scheme, axes, scale) - w)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape, axes", [((128, 48), (0,)), ((3, 3, 100, 8), (0, 1, 2))])
def test_the_minmax_scale_is_the_one_of_the_largest_weights(shape, axes, granularity):
    w, scheme = layer_weights(shape), GRANULARITIES[granularity]
    expected = fq.weight_scale(w, scheme, axes)
    for kind in ("minmax", "moving_average", Percentile(100)):
        np.testing.assert_array_equal(
            calibrators.weight_scale(w, scheme, axes, kind), expected, err_msg=str(kind)
        )


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_channel_is_worse_than_with_its_largest_weight(granularity, kind, bits):
    scheme = dataclasses.replace(GRANULARITIES[granularity], bits=bits)
    w = layer_weights()
    minmax, searched = (weight_errors(w, scheme, (0,), each) for each in ("minmax", kind))
    axes = None if granularity == "tensor" else 0
    if granularity == "group":
        minmax, searched = (
            np.stack([part.sum(0) for part in np.split(each, [48, 96])])
            for each in (minmax, searched)
        )
        axes = ()
    assert (searched.sum(axis=axes) <= minmax.sum(axis=axes) * 1.00001).all()


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("granularity, at_most", [("tensor", 0.4), ("channel", 0.95)])
def test_weights_with_outliers_gain_at_4_bits(granularity, at_most, kind):
    w, scheme = layer_weights(), GRANULARITIES[granularity]
    minmax, searched = (weight_errors(w, scheme, (0,), each).sum() for each in ("minmax", kind))
    assert searched < at_most * minmax


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("bits, at_most", [(3, 0.8), (4, 0.95), (8, 1.02)])
@pytest.mark.parametrize("correlated", [False, True])
def test_outputs_of_layers_gain_too(kind, bits, at_most, correlated):
    random = np.random.default_rng(2)
    x = random.normal(size=(500, 128))
    if correlated:
        x = np.maximum(x @ random.normal(size=(128, 128)) / 8 + 0.5, 0)
    w, scheme = layer_weights(), Scheme(bits)

    def output_error(each):
        scale = calibrators.weight_scale(w, scheme, (0,), each)
        off = fq.fake_quant_weights(w, scheme, (0,), scale).numpy() - w
        return np.square(x @ off).mean()

    assert output_error(kind) < at_most * output_error("minmax")


def test_scales_of_weights_are_near_the_best_ones():
    w, scheme = layer_weights((128, 6)), Scheme(3)
    found = weight_errors(w, scheme, (0,), "mse").sum(axis=0)
    shares = np.linspace(0.02, 1, 300)[:, None, None].astype("float32")
    scales = shares * fq.weight_scale(w, scheme, (0,))
    tried = np.square(fq.fake_quant_weights(w[None] + 0 * shares, scheme, 0, scales) - w)
    assert (found <= 1.02 * tried.sum(axis=1).min(axis=0)).all()


def test_percentiles_of_weights_are_exact_even_in_a_group_that_is_filled_up():
    w = np.arange(1, 201, dtype="float32")[:, None]
    scale = calibrators.weight_scale(w, Scheme(), (0,), Percentile(99))
    np.testing.assert_allclose(scale, [[198 / 127]])
    scheme = Scheme(granularity="group", group_size=150)
    scale = calibrators.weight_scale(w, scheme, (0,), Percentile(98)).numpy().ravel()
    np.testing.assert_allclose(scale[[0, 149, 150, 199]] * 127, [147, 147, 197, 197])


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy"])
def test_pruned_and_empty_channels(kind):
    w = layer_weights((64, 4))
    w[:, 0] = 0
    w[::2] = 0
    scheme = Scheme(4)
    scale = calibrators.weight_scale(w, scheme, (0,), kind).numpy()
    assert scale[0, 0] == 1
    assert (scale > 0).all()
    quantized = fq.fake_quant_weights(w, scheme, (0,), scale).numpy()
    assert (quantized[w == 0] == 0).all()


@pytest.mark.parametrize("kind", SEARCHED)
def test_scales_that_are_powers_of_two_stay_that(kind):
    w, scheme = layer_weights((64, 8)), Scheme(4, power_of_two=True)
    exponents = np.log2(calibrators.weight_scale(w, scheme, (0,), kind))
    np.testing.assert_array_equal(exponents, np.round(exponents))


def test_large_and_small_blocks_agree(monkeypatch):
    w, scheme = layer_weights(), Scheme(4)
    whole = calibrators.weight_scale(w, scheme, (0,), "entropy")
    monkeypatch.setattr(calibrators, "_BLOCK", 500)
    np.testing.assert_array_equal(calibrators.weight_scale(w, scheme, (0,), "entropy"), whole)


@pytest.mark.parametrize(
    "calibrator", [MinMax(), MovingAverage(0.5), Percentile(99.0), MSE(), Entropy()]
)
def test_calibrators_are_saved_by_keras(calibrator):
    config = keras.saving.serialize_keras_object(calibrator)
    assert config["registered_name"] == f"tfcompress>{type(calibrator).__name__}"
    assert keras.saving.deserialize_keras_object(config) == calibrator


def test_names():
    assert calibrators.get("mse") == MSE()
    assert calibrators.get(Percentile(99)).percentile == 99
    assert calibrators.get("moving_average").momentum == 0.9


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: calibrators.get("mze"), "Did you mean 'mse'"),
        (lambda: calibrators.get(None), "calibrator=None is none; pass one of"),
        (lambda: calibrators.get(MSE), "or an object such as"),
        (lambda: Percentile(30), r"\(50, 100\], got 30"),
        (lambda: MovingAverage(1.0), r"\[0, 1\), got 1.0"),
        (
            lambda: calibrators.weight_scale(tf.ones((2, 2)), Scheme(symmetric=False), (0,)),
            "pass symmetric=True",
        ),
    ],
)
def test_bad_input_says_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()
