"""Exports to SavedModels, run by TensorFlow."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.export import networks
from tfcompress.artefact import Artefact
from tfcompress.export import ExportError, export
from tfcompress.export.program import Program


@pytest.mark.parametrize("make", [networks.conv1d, networks.residual, networks.attention])
def test_int8_is_the_simulation_on_500_inputs(make, tmp_path):
    model, x, held_out = networks.trained_to_int8(make)
    artefact = export(model, tmp_path / "m", verify_on=x[:50])
    networks.check_bars(artefact, model, held_out, 2)
    assert artefact.output_steps < 2.01


@pytest.mark.parametrize("make", [networks.conv2d, networks.lstm])
def test_float32_equals_the_model_for_batches_of_any_size(make, tmp_path):
    model, (x, _, held_out) = make(), networks.digits(make)
    artefact = export(model, tmp_path / "m", verify_on=x[:20])
    assert (artefact.format, artefact.precision) == ("savedmodel", "float32")
    for size in (1, 7):
        expected = model(held_out[:size], training=False)
        np.testing.assert_allclose(artefact(held_out[:size]), expected, rtol=1e-4, atol=1e-5)


def test_it_is_served_without_this_package(tmp_path):
    model, (x, _, _) = networks.dense(), networks.digits(networks.dense)
    export(model, tmp_path / "m", verify_on=x[:20])
    serve = tf.saved_model.load(str(tmp_path / "m")).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    found = serve(**{name: tf.constant(x[:5])})["output_0"]
    np.testing.assert_allclose(found, model(x[:5]), rtol=1e-4, atol=1e-5)


def test_its_size_and_weights(tmp_path):
    model, (x, _, _) = networks.dense(), networks.digits(networks.dense)
    export(model, tmp_path / "m", verify_on=x[:50])
    loaded = Artefact.load(tmp_path / "m")
    files = [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
    assert loaded.bytes == sum(p.stat().st_size for p in files)
    assert sorted(t.shape for t in loaded.tensors()) == sorted(
        w.numpy().shape for w in model.weights
    )


def test_several_inputs_keep_their_order(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((3,), name="a")
    model = keras.Model([b, a], layers.Dense(2)(layers.Subtract()([b, a])))
    batch = [np.random.default_rng(seed).normal(size=(5, 3)).astype("float32") for seed in (0, 1)]
    artefact = export(model, tmp_path / "m", verify_on=batch)
    np.testing.assert_allclose(artefact(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_only_a_saved_model_is_replaced(tmp_path):
    x = np.zeros((2, 28, 28, 1), "float32")
    model = networks.dense()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photo").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("data", "file"):
        with pytest.raises(ValueError, match="exists and is not a SavedModel, so it is not"):
            export(model, tmp_path / name, verify_on=x)
    with pytest.raises(ValueError, match="Cannot write"):
        export(model, tmp_path / "file" / "m", verify_on=x)
    assert (tmp_path / "data" / "photo").read_text() == "mine"
    for _ in range(2):
        export(model, tmp_path / "new" / "m", verify_on=x)
    assert os.listdir(tmp_path / "new") == ["m"]
    with pytest.raises(ValueError, match="is not a SavedModel"):
        Artefact.load(tmp_path / "data")


def test_a_directory_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    save = Program.save

    def sabotaged(self, directory):
        kernel = self.model.layers[-1].kernel
        before = kernel.numpy()
        kernel.assign(2.0 * before)
        save(self, directory)
        kernel.assign(before)

    monkeypatch.setattr(Program, "save", sabotaged)
    x = np.ones((2, 28, 28, 1), "float32")
    with pytest.raises(ExportError, match="the relative error is"):
        export(networks.dense(), tmp_path / "m", verify_on=x)
    assert os.listdir(tmp_path) == []


def test_float16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'float16' is not known for a SavedModel; pass one of"):
        export(networks.dense(), tmp_path / "m", "float16")
