"""Exports to OpenVINO, run in OpenVINO."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from tests.export import networks
from tfcompress.artefact import Artefact
from tfcompress.callbacks import QuantizationAwareTraining
from tfcompress.export import ExportError, export
from tfcompress.export import openvino as exporter


@pytest.mark.parametrize("make", networks.NETWORKS)
def test_int8_is_within_four_steps_of_the_simulation_on_500_inputs(make, tmp_path):
    model, x, held_out = networks.trained_to_int8(make)
    artefact = networks.quietly(model, tmp_path / "m.xml", verify_on=x[:50])
    steps = networks.check_bars(artefact, model, held_out, 4)
    if make is networks.attention:
        assert "Softmax" in networks.kinds(artefact)
        assert np.mean(steps < 2.01) > 0.99
    else:
        assert networks.kinds(artefact) == set()
    assert "int8" in {t.dtype for t in artefact.tensors()}
    large = [t for t in artefact.tensors() if len(t.shape) > 1 and t.params > 100]
    assert {t.dtype for t in large} == {"int8"}


def test_weights_of_4_bits(tmp_path):
    model, x, held_out = networks.trained(
        networks.dense, QuantizationAwareTraining(weights="int4"), epochs=1
    )
    artefact = export(model, tmp_path / "m.xml", verify_on=x[:50])
    assert artefact.float_operators == ()
    networks.check_bars(artefact, model, held_out, 4)
    weights = [t for t in artefact.tensors() if t.dtype == "int8"]
    assert [np.abs(t.values).max() for t in weights] == [7, 7]


def test_a_float_model_gets_its_ranges_from_calibration(tmp_path):
    model, x, held_out = networks.trained(networks.conv2d, epochs=1)
    artefact = export(model, tmp_path / "m.xml", calibration=x)
    assert (artefact.precision, artefact.float_operators) == ("int8", ())
    expected = model.predict(held_out, verbose=0)
    assert np.abs(artefact(held_out) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float16", 1e-2)])
@pytest.mark.parametrize("make", [networks.conv2d, networks.attention, networks.lstm])
def test_float_precisions(make, precision, tolerance, tmp_path):
    model, (x, _, held_out) = make(), networks.digits(make)
    artefact = export(model, tmp_path / "m.xml", precision, verify_on=x[:20])
    expected = model.predict(held_out, verbose=0)
    assert np.abs(artefact(held_out) - expected).max() < tolerance * np.abs(expected).max()
    weights = {t.dtype for t in artefact.tensors() if len(t.shape) > 1 and t.params > 100}
    # The weights of a loop are in its body, which is not listed.
    assert weights == (set() if make is networks.lstm else {precision})
    assert artefact(held_out[:1]).shape == (1, 10)


def test_both_files_belong_to_it(tmp_path):
    model, x, _ = networks.trained_to_int8(networks.dense)
    written = export(model, tmp_path / "m.xml", verify_on=x[:50])
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml"]
    loaded = Artefact.load(tmp_path / "m.xml")
    assert loaded.bytes == sum((tmp_path / name).stat().st_size for name in ("m.bin", "m.xml"))
    assert 20_000 < loaded.zipped_bytes < loaded.bytes
    np.testing.assert_array_equal(loaded.runner(num_threads=2)(x[:9]), written(x[:9]))
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ValueError, match="is not an OpenVINO model with its .bin beside it"):
        Artefact.load(tmp_path / "m.xml")


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((4,), name="a")
    outputs = {"sum": layers.Dense(2)(b) + layers.Dense(2)(a), "a/out": layers.Dense(1)(a)}
    model = keras.Model([b, a], outputs)
    batch = [np.random.default_rng(0).normal(size=(5, n)).astype("float32") for n in (3, 4)]
    artefact = export(model, tmp_path / "m.xml", verify_on=batch)
    expected = model.predict(batch, verbose=0)
    found = artefact(batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_file_of_zeros_is_removed(tmp_path, monkeypatch):
    stored = exporter._stored
    monkeypatch.setattr(exporter, "_stored", lambda weight, axes: stored(0.0 * weight, axes))
    model, x, _ = networks.trained_to_int8(networks.dense)
    with pytest.raises(ExportError, match=r"does not compute .* differ by up to [\d.]+ steps"):
        export(model, tmp_path / "m.xml", verify_on=x[:50])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"precision": "dynamic"}, r"precision='dynamic' is not known for OpenVINO; pass one of"),
        ({"precision": "int8"}, "needs the ranges of the activations. Pass calibration="),
    ],
)
def test_bad_input_is_refused(arguments, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export(networks.dense(), tmp_path / "m.xml", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"'openvino'.*pip install \"tfcompress\[openvino\]\""):
        export(networks.dense(), tmp_path / "m.xml", verify_on=np.zeros((2, 28, 28, 1)))


def test_importing_openvino_leaves_no_process_behind():
    code = (
        "import multiprocessing, os; from tfcompress.export import openvino;"
        "openvino._openvino('openvino');"
        "print(len(multiprocessing.active_children()), os.environ.get('CI'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "None"]
