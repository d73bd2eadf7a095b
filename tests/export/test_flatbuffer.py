"""LiteRT files changed after the conversion: real files, run in the real runtime."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tfcompress.artefact import Artefact, litert_flatbuffer
from tfcompress.export import export, flatbuffer
from tfcompress.export.flatbuffer import integer_borders, regrid, rows_of

RNG = np.random.default_rng(0)
FOUR_BITS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


def chain(*operations, shape):
    return keras.Sequential([keras.Input(shape), *operations])


def put_on_grid(variable, axes, largest):
    """Give a kernel values `k * s`, `|k| <= largest`, with one odd scale a channel."""
    w = RNG.integers(-largest, largest + 1, variable.shape).astype("float64")
    scale_shape = [1 if axis in axes else size for axis, size in enumerate(variable.shape)]
    variable.assign(w * RNG.uniform(0.001, 0.3, scale_shape))


def unchanged(model, precision, x, tmp_path, monkeypatch):
    """What the converter wrote, and the weights that `regrid` is told."""
    told = {}

    def keep(content, rows, int4):
        told["rows"] = rows
        return content

    monkeypatch.setattr(flatbuffer, "regrid", keep)
    calibration = x if precision == "int8" else None
    artefact = export(model, tmp_path / "raw.tflite", precision, calibration, verify_on=x)
    monkeypatch.undo()
    return artefact.path.read_bytes(), told["rows"]


def weights_of(path, name):
    operators = [op for op in litert_flatbuffer(path).operators if op.name == name]
    return [op.inputs[1] for op in operators]


def run(content, x, tmp_path):
    path = tmp_path / "run.tflite"
    path.write_bytes(content)
    return Artefact.load(path)(x), path


@pytest.mark.parametrize("precision", ["int8", "dynamic"])
@pytest.mark.parametrize("largest", [1, 7, 63, 64, 100, 126])
def test_any_grid_is_exact(largest, precision, tmp_path, monkeypatch):
    model = chain(layers.Dense(64, use_bias=True), shape=(33,))
    put_on_grid(model.layers[0].kernel, (0,), largest)
    model.layers[0].bias.assign(RNG.normal(size=64))
    kernel = model.layers[0].kernel.numpy().T
    x = RNG.normal(size=(64, 33)).astype("float32")
    raw, rows = unchanged(model, precision, x, tmp_path, monkeypatch)
    before, path = run(raw, x, tmp_path)
    (weights,) = weights_of(path, "FULLY_CONNECTED")
    # The converter's own grid has them by half a step of 1/127 at worst; a grid of 1 by nothing.
    assert largest == 1 or np.abs(weights.real() - kernel).max() > 1e-3 * np.abs(kernel).max()
    after, path = run(regrid(raw, rows), x, tmp_path)
    (weights,) = weights_of(path, "FULLY_CONNECTED")
    np.testing.assert_allclose(weights.real(), kernel, rtol=1e-5, atol=1e-7)
    expected = model.predict(x, verbose=0)
    error = [np.abs(y - expected).mean() for y in (before, after)]
    assert error[1] < error[0] * 1.05
    assert path.stat().st_size < 1.1 * len(raw) + 500


def test_a_folded_batch_norm_changes_no_integer(tmp_path, monkeypatch):
    model = chain(layers.Conv2D(6, 3), layers.BatchNormalization(), shape=(8, 8, 4))
    put_on_grid(model.layers[0].kernel, (0, 1, 2), 7)
    gamma = np.array([1.5, -0.5, 0.01, 2.0, -3.0, 1.0])
    model.layers[1].gamma.assign(gamma)
    x = RNG.normal(size=(64, 8, 8, 4)).astype("float32")
    raw, rows = unchanged(model, "int8", x, tmp_path, monkeypatch)
    _, path = run(regrid(raw, rows), x, tmp_path)
    (weights,) = weights_of(path, "CONV_2D")
    kernel = model.layers[0].kernel.numpy().transpose(3, 0, 1, 2)
    expected = kernel * (gamma / np.sqrt(1 + 1e-3)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(weights.real(), expected, rtol=1e-5, atol=1e-7)


LAYERS = {
    "FULLY_CONNECTED": (lambda: layers.Dense(40), (31,), (0,)),
    "CONV_2D": (lambda: layers.Conv2D(5, 3), (8, 8, 3), (0, 1, 2)),
    "DEPTHWISE_CONV_2D": (lambda: layers.DepthwiseConv2D(3), (8, 8, 5), (0, 1)),
    "TRANSPOSE_CONV": (lambda: layers.Conv2DTranspose(5, 3), (8, 8, 3), (0, 1, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_4_bits_compute_what_8_bits_compute(name, tmp_path, monkeypatch):
    make, shape, axes = LAYERS[name]
    model = chain(make(), shape=shape)
    put_on_grid(model.layers[0].weights[0], axes, 7)
    x = RNG.normal(size=(64, *shape)).astype("float32")
    raw, rows = unchanged(model, "int8", x, tmp_path, monkeypatch)
    wide, path = run(regrid(raw, rows), x, tmp_path)
    assert [w.dtype for w in weights_of(path, name)] == ["int8"]
    narrow, path = run(regrid(raw, rows, FOUR_BITS), x, tmp_path)
    packed = name in FOUR_BITS
    (weights,) = weights_of(path, name)
    assert weights.dtype == ("int4" if packed else "int8")
    assert np.abs(weights.values).max() == (7 if packed else 126)
    step = next(o for o in litert_flatbuffer(path).operators if o.name == "DEQUANTIZE").inputs[0]
    assert np.abs(wide - narrow).max() < 1.01 * step.scale[0]
    # Convolutions of 4 bits have a kernel that rounds twice.
    assert np.mean(wide == narrow) > (0.9 if packed else 0.999)


def test_a_shared_layer_is_written_once(tmp_path, monkeypatch):
    shared = layers.Dense(32)
    model = chain(shared, layers.ReLU(), shared, shape=(32,))
    put_on_grid(shared.kernel, (0,), 5)
    shared.bias.assign(RNG.normal(size=32))
    x = RNG.normal(size=(64, 32)).astype("float32")
    raw, rows = unchanged(model, "int8", x, tmp_path, monkeypatch)
    found, path = run(regrid(raw, rows, FOUR_BITS), x, tmp_path)
    expected = model.predict(x, verbose=0)
    assert {w.dtype for w in weights_of(path, "FULLY_CONNECTED")} == {"int4"}
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_weights_on_no_grid_are_left_alone(tmp_path, monkeypatch):
    model = chain(layers.Dense(40), shape=(31,))
    x = RNG.normal(size=(64, 31)).astype("float32")
    raw, rows = unchanged(model, "int8", x, tmp_path, monkeypatch)
    assert regrid(raw, rows, FOUR_BITS) is raw
    other = rows_of(np.round(RNG.normal(size=(31, 40)) * 3), (0,))
    assert regrid(raw, [other], FOUR_BITS).count(b"TFL3") == 1
    found, _ = run(regrid(raw, [other], FOUR_BITS), x, tmp_path)
    np.testing.assert_array_equal(found, run(raw, x, tmp_path)[0])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(-127, 127), min_size=1, max_size=40),
    st.floats(1e-6, 1e6),
)
def test_the_grid_of_a_row_is_found(integers, scale):
    rows = rows_of(np.float32(np.array(integers) * scale)[:, None], (0,))
    common = max(np.gcd.reduce(np.abs(integers)), 1)
    np.testing.assert_array_equal(rows.integers[0], np.array(integers) // common)


def test_integers_at_the_borders_are_those_inside(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((4,), name="a")
    model = keras.Model(
        [b, a], {"z": layers.Dense(2)(b) + layers.Dense(2)(a), "y": layers.Dense(1)(a)}
    )
    x = [RNG.normal(size=(64, n)).astype("float32") for n in (3, 4)]
    artefact = export(model, tmp_path / "m.tflite", "int8", x)
    content = integer_borders(artefact.path.read_bytes())
    found, path = run(content, x, tmp_path)
    file = litert_flatbuffer(path)
    assert {t.dtype for t in (*file.inputs, *file.outputs)} == {"int8"}
    assert {op.name for op in file.operators}.isdisjoint({"QUANTIZE", "DEQUANTIZE"})
    for name, value in artefact(x).items():
        np.testing.assert_array_equal(found[name], value)


def test_a_float_border_is_refused(tmp_path):
    model = chain(layers.Dense(4), shape=(3,))
    artefact = export(model, tmp_path / "m.tflite", "float32", verify_on=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="in float by .'FULLY_CONNECTED'"):
        integer_borders(artefact.path.read_bytes())
