"""`prune`, `quantize`, `shrink`, `export`, `migrate` and `run`."""

import json

import keras
import numpy as np
import pytest

from tfcompress import Artefact
from tfcompress.recipe import Recipe, load_model


def found(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_prune(invoke, files, tmp_path):
    values = found(invoke("prune", files / "m.keras", "p.keras", "--sparsity", "0.5", "--json"))
    assert values["metrics"]["result"]["sparsity"] == 0.5
    kernel = keras.saving.load_model(tmp_path / "p.keras").get_weights()[0]
    assert (kernel == 0).mean() == 0.5
    assert Recipe.from_model(tmp_path / "p.keras").stages[0].prune.sparsity == 0.5


def test_prune_while_training_into_a_file(invoke, files, tmp_path):
    arguments = ["--sparsity", "0.75", "--epochs", "1", "--data", files / "d.npz"]
    result = invoke("prune", files / "m.keras", "p.tflite", *arguments)
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    weights = Artefact.load(tmp_path / "p.tflite").tensors()
    kernel = next(tensor for tensor in weights if tensor.params == 192)
    assert kernel.nonzeros == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.tflite"]


def test_shrink_and_then_quantize_is_remembered(invoke, files, tmp_path):
    found(invoke("shrink", files / "m.keras", "s.keras", "--ratio", "0.5", "--json"))
    data = ["--data", files / "d.npz"]
    values = found(
        invoke("quantize", "s.keras", "q.tflite", *data, "--precision", "int8", "--json")
    )
    assert values["artefacts"][0]["precision"] == "int8"
    assert load_model(tmp_path / "s.keras").count_params() == 131
    names = [stage.names for stage in Recipe.from_model(tmp_path / "q.tflite").stages]
    assert names == [["shrink"], ["quantize"], ["export"]]


def test_export_to_a_saved_model(invoke, files, tmp_path):
    values = found(
        invoke("export", files / "m.keras", "out/saved", "--data", files / "d.npz", "--json")
    )
    assert values["artefacts"][0]["format"] == "savedmodel"
    x = np.load(files / "d.npz")["x"][:4]
    expected = load_model(files / "m.keras")(x)
    np.testing.assert_allclose(Artefact.load(tmp_path / "out" / "saved")(x), expected, atol=1e-5)


def test_run_writes_everything_and_says_when_the_budget_is_missed(invoke, files, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"model: {files / 'm.keras'}\ndata: {files / 'd.npz'}\n"
        "stages:\n  - prune: {sparsity: 0.5}\n  - export: {path: m.tflite}\n"
        "budget: {max_bytes: 10}\n"
    )
    result = invoke("run", "r.yaml", "-o", "out", "--json")
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert values["missed"] == [
        f"m.tflite: bytes {values['metrics']['m.tflite']['bytes']:,}, the budget is 10"
    ]
    assert json.loads(result.stderr)["error"].startswith("The budget is missed: m.tflite")
    names = ["m.tflite", "model.keras", "recipe.yaml", "result.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_run_prints_schema_examples_and_checks(invoke, tmp_path):
    assert "stages" in found(invoke("run", "--schema"))["properties"]
    text = invoke("run", "--example", "bert").stdout
    (tmp_path / "b.yaml").write_text(text)
    result = invoke("run", "b.yaml", "--check")
    assert (result.exit_code, result.stdout) == (0, "")
    assert Recipe.parse(text) == Recipe.load("recipe:bert")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prune", "M", "o.keras"], "--sparsity 0.8"),
        (["prune", "M", "o.keras", "--sparsity", "1.5"], "less than 1"),
        (["prune", "M", "o.keras", "--sparsity", "0.5", "--criterion", "magnitud"], "magnitude"),
        (["prune", "M", "o.h5", "--sparsity", "0.5"], "is none of"),
        (["prune", "M", "o.keras", "--sparsity", "0.5", "--epochs", "1"], "needs data"),
        (["prune", "M", "o.keras", "--sparsity", "0.5", "--include", "x"], "x"),
        (["quantize", "M", "o.tflite", "--weights", "int99"], "int99"),
        (["quantize", "M", "o.keras", "--precision", "int8"], "--precision is for exported"),
        (["shrink", "M", "o.keras"], "--ratio"),
        (["shrink", "M", "o.keras", "--ratio", "0.5", "--target-macs", "3"], "one of --ratio"),
        (["export", "M", "o.keras"], "export to .tflite"),
        (["export", "M", "o.tflite", "--precision", "int7"], "int8"),
        (["export", "M", "o.tflite", "--precision", "int8"], "calibration"),
        (["export", "M", "o.tflite", "--data", "none.csv"], "no data at"),
        (["export", "none.keras", "o.tflite"], "no file"),
        (["migrate", "none.h5", "n.keras"], "no model at"),
        (["migrate", "M", "n.h5"], "must end in .keras"),
        (["run"], "Name a recipe"),
        (["run", "recipe:cn"], "Did you mean 'cnn'"),
        (["run", "recipe:cnn"], "Name the model"),
        (["run", "recipe:mlp", "--model", "M"], "needs data"),
        (["run", "recipe:mlp", "--model", "M", "--data", "tests.models:classification"], "--trust"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(refused, files, arguments, message):
    model = str(files / "m.keras")
    assert message in refused(*[model if each == "M" else each for each in arguments])
    if "--schema" not in arguments:
        given = [model if each == "M" else each for each in arguments]
        assert message in json.loads(refused(*given, "--json"))["error"]
