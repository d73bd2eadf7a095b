"""What was done travels with the model and its files."""

import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.models import mlp
from tfcompress.recipe import Recipe, load_model, record, save_model

VALUES = {"stages": [{"prune": {"sparsity": 0.5}}]}


def test_a_keras_file_carries_it_and_loads_in_plain_keras(tmp_path):
    model = record.attach(mlp(), VALUES)
    save_model(model, tmp_path / "m.keras")
    assert record.read(tmp_path / "m.keras") == VALUES
    assert record.attached(load_model(tmp_path / "m.keras")) == VALUES
    plain = keras.saving.load_model(tmp_path / "m.keras")
    x = np.ones((2, 12), "float32")
    np.testing.assert_array_equal(plain(x), model(x))
    assert record.attached(plain) is None


def test_a_model_with_a_record_is_as_before():
    model = mlp()
    before = [layer.name for layer in model.layers], len(model.weights), model.get_config()
    record.attach(model, VALUES)
    assert before == (
        [layer.name for layer in model.layers],
        len(model.weights),
        model.get_config(),
    )
    assert callable(model.load_weights)
    copy = keras.models.clone_model(model)
    assert record.attached(copy) is None


def test_weights_load_into_a_model_with_a_record(tmp_path):
    mlp().save(tmp_path / "plain.keras")
    mlp().save_weights(tmp_path / "plain.weights.h5")
    model = record.attach(mlp(), VALUES)
    model.load_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "plain.keras")
    assert record.attached(model) == VALUES


@pytest.mark.parametrize("name", ["m.tflite", "m.onnx", "m.xml", "saved"])
def test_an_exported_file_carries_it_and_computes_the_same(tmp_path, name):
    if name == "m.onnx":
        pytest.importorskip("tf2onnx")
    if name == "m.xml":
        pytest.importorskip("openvino")
    x = np.random.default_rng(0).normal(size=(8, 12)).astype("float32")
    artefact = tfc.export(mlp(), tmp_path / name, verify_on=x)
    before, weights = artefact(x), [tensor.name for tensor in artefact.tensors()]
    assert record.read(artefact.path) is None
    record.write(artefact, VALUES)
    assert record.read(artefact.path) == VALUES
    again = tfc.Artefact.load(tmp_path / name)
    np.testing.assert_array_equal(again(x), before)
    assert [tensor.name for tensor in again.tensors()] == weights


def test_what_no_recipe_made_says_so(tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match="not the result of a recipe"):
        Recipe.from_model(model)
    save_model(model, tmp_path / "m.keras")
    with pytest.raises(ValueError, match="not the result of a recipe"):
        Recipe.from_model(tmp_path / "m.keras")
    with pytest.raises(FileNotFoundError):
        Recipe.from_model(tmp_path / "none.keras")
