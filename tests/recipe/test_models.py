"""Loading files that may come from anywhere."""

import io
import zipfile

import keras
import numpy as np
import pytest

from tests.models import mlp
from tests.recipe.mutations import flipped, keras_files
from tfcompress.recipe import ModelFileError, load_model, models, save_model


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.keras"
    mlp().save(path)
    return path.read_bytes()


def refuse(path, content, match="keras|Keras"):
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=match) as raised:
        load_model(path)
    assert len(str(raised.value)) < 1000
    return str(raised.value)


def test_a_model_is_loaded_with_its_weights(tmp_path, content):
    (tmp_path / "m.keras").write_bytes(content)
    model = load_model(tmp_path / "m.keras")
    assert model.count_params() == 259


@pytest.mark.parametrize("number", range(20))
def test_damaged_files_are_refused(tmp_path, content, number):
    refuse(tmp_path / "m.keras", keras_files(content, 25)[number])


@pytest.mark.slow
def test_200_damaged_files_are_refused(tmp_path, content):
    for damaged in keras_files(content, 200):
        refuse(tmp_path / "m.keras", damaged)


def test_changed_bytes_are_refused_or_change_nothing(tmp_path, content):
    (tmp_path / "m.keras").write_bytes(content)
    expected = load_model(tmp_path / "m.keras").get_weights()
    refused = 0
    for damaged in flipped(content, 40):
        (tmp_path / "m.keras").write_bytes(damaged)
        try:
            found = load_model(tmp_path / "m.keras").get_weights()
        except ModelFileError:
            refused += 1
            continue
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert refused > 30


def test_code_in_a_file_is_only_run_where_it_is_trusted(tmp_path):
    layers = [keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1), keras.layers.Dense(2)]
    keras.Sequential(layers).save(tmp_path / "m.keras")
    with pytest.raises(ModelFileError, match="Lambda.*--trust"):
        load_model(tmp_path / "m.keras")
    assert load_model(tmp_path / "m.keras", trust=True).output_shape == (None, 2)


def test_a_class_of_its_own_is_named(tmp_path):
    class Doubled(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    keras.Sequential([keras.Input((4,)), Doubled(), keras.layers.Dense(2)]).save(
        tmp_path / "m.keras"
    )
    with pytest.raises(ModelFileError, match="function of its own.*Doubled"):
        load_model(tmp_path / "m.keras")


def test_a_bomb_is_not_unpacked(tmp_path, content, monkeypatch):
    monkeypatch.setattr(models, "_FREE_BYTES", 2**20)  # A gigabyte takes long to pack.
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("assets/bomb", bytes(2**24))
    refuse(tmp_path / "m.keras", buffer.getvalue(), match="fill the memory")


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "tfcompress migrate m.h5 m.keras"),
        ("m.keras", b"\x89HDF\r\n\x1a\n" + bytes(100), "tfcompress migrate"),
        ("m.tflite", b"TFL3", "not a .keras file"),
        ("m.keras", b"PK\x05\x06" + bytes(18), "without a Keras model"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, match):
    refuse(tmp_path / name, content, match)


def test_references_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.keras")
    with pytest.raises(ModelFileError, match="is a directory"):
        load_model(tmp_path)
    with pytest.raises(ModelFileError, match="minilm"):
        load_model("zoo:nothing")
    with pytest.raises(ModelFileError, match="--trust"):
        load_model("tests.models:mlp")
    assert load_model("tests.models:mlp", trust=True).name == "mlp"
    with pytest.raises(ModelFileError, match="returned a tuple"):
        load_model("tests.models:classification", trust=True)


def test_saving_needs_the_suffix_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=".keras"):
        save_model(mlp(), tmp_path / "m.h5")

    class Broken(keras.Model):
        def get_config(self):
            raise RuntimeError("no config")

    broken = Broken()
    broken.built = True
    with pytest.raises(RuntimeError):
        save_model(broken, tmp_path / "m.keras")
    assert list(tmp_path.iterdir()) == []
