"""Exports to ONNX, run in ONNX Runtime."""

import os
import sys

import keras
import numpy as np
import onnx
import pytest
from keras import layers

from tests.export import networks
from tfcompress.artefact import Artefact
from tfcompress.callbacks import Pruning, QuantizationAwareTraining
from tfcompress.export import ExportError, export, qdq
from tfcompress.export import onnx as exporter
from tfcompress.export.verify import OutputScale, check_output

INTEGER = {networks.transposed: {"ConvTranspose"}}


@pytest.mark.parametrize("make", networks.NETWORKS)
def test_int8_is_within_two_steps_of_the_simulation_on_500_inputs(make, tmp_path):
    model, x, held_out = networks.trained_to_int8(make)
    artefact = networks.quietly(model, tmp_path / "m.onnx", verify_on=x[:50])
    steps = networks.check_bars(artefact, model, held_out, 2)
    if make is networks.attention:
        assert {"Softmax", "MatMul"} <= networks.kinds(artefact)
        assert np.mean(steps < 1.01) > 0.99
    else:
        assert networks.kinds(artefact) == INTEGER.get(make, set())
    kernels = sorted(w.shape.num_elements() for w in model.weights if w.name == "kernel")
    weights = [t for t in artefact.tensors() if t.params > 100]
    assert {t.dtype for t in weights} <= {"int8", "uint8"}
    assert sum(t.params for t in weights) >= sum(size for size in kernels if size > 100)


def test_batches_of_any_size(tmp_path):
    model, x, held_out = networks.trained_to_int8(networks.conv2d)
    artefact = networks.quietly(model, tmp_path / "m.onnx", verify_on=x[:50])
    whole = artefact(held_out[:7])
    assert whole.shape == (7, 10)
    np.testing.assert_array_equal(artefact(held_out[3:4]), whole[3:4])
    np.testing.assert_array_equal(artefact.runner(num_threads=2)(held_out[:7]), whole)


@pytest.mark.parametrize(("weights", "activations"), [("int4", "int8"), ("int8", "int5")])
def test_fewer_bits_are_kept_in_integers_of_8(weights, activations, tmp_path):
    qat = QuantizationAwareTraining(weights=weights, activations=activations)
    model, x, held_out = networks.trained(networks.conv2d, qat, epochs=1)
    artefact = networks.quietly(model, tmp_path / "m.onnx", verify_on=x[:50])
    assert artefact.float_operators == ()
    step = artefact.max_abs_diff / artefact.output_steps if artefact.output_steps else 1.0
    difference = np.abs(artefact(held_out) - networks.simulate(model, held_out))
    assert difference.max() < 2.01 * step
    largest = max(np.abs(t.values).max() for t in artefact.tensors() if t.dtype == "int8")
    assert largest == (7 if weights == "int4" else 127)


def test_weights_are_those_of_the_simulation_and_pruned_zeros_are_zeros(tmp_path):
    pruning = Pruning(0.75, frequency=1)
    model, x, _ = networks.trained(networks.dense, pruning, QuantizationAwareTraining(), epochs=1)
    artefact = networks.quietly(model, tmp_path / "m.onnx", verify_on=x[:50])
    kernels = {k.shape: k for k in model.get_weights() if k.ndim == 2}
    stored = {t.shape: t for t in artefact.tensors() if len(t.shape) == 2}
    assert stored.keys() == kernels.keys()
    for shape, kernel in kernels.items():
        assert np.count_nonzero(kernel) == round(0.25 * kernel.size)
        assert np.all(stored[shape].values[kernel == 0] == 0)
        np.testing.assert_allclose(
            stored[shape].real(), kernel, atol=0.51 * np.abs(kernel).max() / 127
        )


def test_sums_of_the_largest_products_do_not_overflow(tmp_path):
    kernel = keras.initializers.Constant(1.0)
    model = networks.chain(layers.Dense(2, kernel_initializer=kernel), shape=(64,))
    x = np.ones((32, 64), "float32")
    artefact = export(model, tmp_path / "m.onnx", calibration=x)
    np.testing.assert_allclose(artefact(x), 64.0, rtol=0.005)


@pytest.mark.parametrize("make", [networks.conv2d, networks.attention, networks.embedding])
def test_a_float_model_gets_its_ranges_from_calibration(make, tmp_path):
    model, x, held_out = networks.trained(make, epochs=1)
    artefact = networks.quietly(
        model, tmp_path / "m.onnx", calibration=(x[i : i + 50] for i in range(0, 512, 50))
    )
    assert artefact.precision == "int8"
    expected = model.predict(held_out, verbose=0)
    # Some held-out values lie beyond what calibration saw.
    typical = np.quantile(np.abs(artefact(held_out) - expected), 0.99)
    assert typical < 0.05 * np.abs(expected).max()
    assert "int8" in {t.dtype for t in artefact.tensors()}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float16", 1e-2)])
@pytest.mark.parametrize("make", [networks.conv2d, networks.attention, networks.lstm])
def test_float_precisions(make, precision, tolerance, tmp_path):
    model, (x, _, held_out) = make(), networks.digits(make)
    artefact = export(model, tmp_path / "m.onnx", precision, verify_on=x[:20])
    expected = model.predict(held_out, verbose=0)
    assert np.abs(artefact(held_out) - expected).max() < tolerance * np.abs(expected).max()
    weights = {t.dtype for t in artefact.tensors() if len(t.shape) > 1}
    assert weights == {precision}


def test_precisions_differ_in_size(tmp_path):
    model = networks.chain(layers.Dense(256), layers.Dense(64), shape=(64,))
    x = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
    sizes = [
        networks.quietly(model, tmp_path / "m.onnx", precision, x).bytes
        for precision in ("float32", "float16", "int8")
    ]
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.6 * sizes[2]


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((4,), name="a")
    outputs = {"sum": layers.Dense(2)(b) + layers.Dense(2)(a), "a/out": layers.Dense(1)(a)}
    model = keras.Model([b, a], outputs)
    batch = [np.random.default_rng(0).normal(size=(5, n)).astype("float32") for n in (3, 4)]
    artefact = export(model, tmp_path / "m.onnx", verify_on=batch)
    expected = model.predict(batch, verbose=0)
    assert list(artefact.runner().inputs) == ["b", "a"]
    for given in (batch, dict(zip("ba", batch, strict=True))):
        found = artefact(given)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"has 2 inputs \['b', 'a'\], 1 were passed"):
        artefact(batch[0])
    with pytest.raises(ValueError, match=r"has the inputs \['b', 'a'\], \['b'\] were passed"):
        artefact({"b": batch[0]})


def test_an_output_with_the_name_of_an_input_is_refused(tmp_path):
    x = keras.Input((3,), name="x")
    model = keras.Model(x, {"x": layers.Dense(2)(x)})
    with pytest.raises(ExportError, match=r"ONNX converter .* same name, .*\['x'\]"):
        export(model, tmp_path / "m.onnx", verify_on=np.zeros((1, 3)))


def test_a_file_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    def sabotaged(model):
        qdq.store_integers(model)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("_integers") and len(tensor.dims) == 2:
                tensor.raw_data = bytes(len(tensor.raw_data))

    monkeypatch.setattr(exporter, "store_integers", sabotaged)
    model, x, _ = networks.trained_to_int8(networks.dense)
    with pytest.raises(ExportError, match=r"does not compute .* differ by up to [\d.]+ steps"):
        export(model, tmp_path / "m.onnx", verify_on=x[:50])
    assert os.listdir(tmp_path) == []


def test_loading_a_file(tmp_path):
    model, x, _ = networks.trained_to_int8(networks.dense)
    written = export(model, tmp_path / "m.onnx", verify_on=x[:50])
    loaded = Artefact.load(tmp_path / "m.onnx")
    assert loaded.format == "onnx"
    assert loaded.bytes == (tmp_path / "m.onnx").stat().st_size > loaded.zipped_bytes > 10_000
    np.testing.assert_array_equal(loaded(x[:9]), written(x[:9]))
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        Artefact.load(tmp_path / "no.onnx")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"precision": "int9"}, r"precision='int9' is not known for ONNX Runtime; pass one of"),
        ({"precision": "int8"}, "needs the ranges of the activations. Pass calibration="),
        ({"calibration": iter([])}, "calibration= holds no batch"),
        ({"verify_on": np.zeros((2, 7))}, r"has the shape \(None, 28, 28, 1\)"),
    ],
)
def test_bad_input_is_refused(arguments, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export(networks.dense(), tmp_path / "m.onnx", **arguments)
    assert os.listdir(tmp_path) == []


def test_options_of_other_files_are_refused(tmp_path):
    from tfcompress.export.target import export_to

    with pytest.raises(ValueError, match="An export to ONNX Runtime takes no io; got"):
        export_to(exporter.TARGET, networks.dense(), tmp_path / "m.onnx", io="integer")


@pytest.mark.parametrize("package", ["onnx", "tf2onnx", "onnxruntime"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"'{package}'.*pip install \"tfcompress\[onnx\]\""):
        export(networks.dense(), tmp_path / "m.onnx", verify_on=np.zeros((2, 28, 28, 1)))


def test_more_steps_can_be_allowed():
    check_output("y", [3.9, 0.0], [0.0, 0.0], "int8", OutputScale(1.0, steps=4.0))
    with pytest.raises(ExportError, match="50.0% .* up to 3.9 steps"):
        check_output("y", [3.9, 0.0], [0.0, 0.0], "int8", OutputScale(1.0))


def test_a_quantized_gru_which_ends_the_process_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), keras.layers.GRU(8, name="gru")])
    with pytest.raises(ExportError, match=r"aborts on an int8 file with GRU layers \(gru\)"):
        export(model, tmp_path / "m.onnx", "int8", calibration=np.ones((8, 6, 4), "float32"))
    assert list(tmp_path.iterdir()) == []
