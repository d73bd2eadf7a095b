"""Malformed recipes and damaged files on the command line: exit code 2, one message, no output."""

import pytest

from tests.recipe.mutations import flipped, keras_files, recipes


def check_recipes(refused, tmp_path, files, texts):
    for text in texts:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        message = refused("run", "r.yaml", "--model", files / "m.keras", "-o", "out")
        assert "r.yaml" in message


def test_20_malformed_recipes(refused, tmp_path, files):
    check_recipes(refused, tmp_path, files, recipes(200)[:20])


@pytest.mark.slow
def test_200_malformed_recipes(refused, tmp_path, files):
    check_recipes(refused, tmp_path, files, recipes(200))


def test_damaged_keras_files(refused, tmp_path, files):
    for content in keras_files((files / "m.keras").read_bytes(), 25)[::2]:
        (tmp_path / "x.keras").write_bytes(content)
        assert "x.keras" in refused("prune", "x.keras", "o.keras", "--sparsity", "0.5")


def damaged_litert(files, count):
    content = (files / "m.tflite").read_bytes()
    cut = [content[: len(content) * part // (count + 1)] for part in range(count)]
    return [b"no flatbuffer", b"\0\0\0\0TFL3", b"\xff" * 8 + content[8:], *cut][:count]


def test_damaged_litert_files(refused, tmp_path, files):
    for content in damaged_litert(files, 7):
        (tmp_path / "x.tflite").write_bytes(content)
        assert "x.tflite" in refused("inspect", "x.tflite")


@pytest.mark.slow
def test_200_damaged_model_files(refused, invoke, tmp_path, files):
    for content in keras_files((files / "m.keras").read_bytes(), 100):
        (tmp_path / "x.keras").write_bytes(content)
        assert "x.keras" in refused("inspect", "x.keras", "--quick")
    for content in damaged_litert(files, 50):
        (tmp_path / "x.tflite").write_bytes(content)
        refused("inspect", "x.tflite")
    # With other bytes in it, a flatbuffer may still be one: then it is shown, or else refused.
    for content in flipped((files / "m.tflite").read_bytes(), 50):
        (tmp_path / "x.tflite").write_bytes(content)
        assert invoke("bench", files / "m.keras", "x.tflite", "--rounds", "1").exit_code in (0, 2)


@pytest.mark.parametrize("name", ["x.onnx", "x.xml", "saved"])
def test_damaged_files_of_other_formats(refused, tmp_path, name):
    path = tmp_path / name
    if name == "saved":
        path.mkdir()
        path = path / "saved_model.pb"
    for content in (b"", b"no model", b"<net/>", bytes(200)):
        path.write_bytes(content)
        assert name in refused("inspect", name)
