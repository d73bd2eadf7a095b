"""The demo, run small; and the promises of the full one, when its results are at hand."""

import io
import json
import os
import pathlib

import keras
import numpy as np
import pytest
import rich.console

import tfcompress as tfc
from tfcompress import demo

KEYS = [
    "model",
    "variant",
    "tool",
    "artefact",
    "accuracy",
    "params",
    "nonzeros",
    "bytes",
    "zipped_bytes",
    "latency_ms_b1",
    "latency_ms_b32",
    "speedup_b1",
    "size_ratio",
    "max_abs_diff",
]
VARIANTS = ["original", *(variant.name for variant in demo.VARIANTS)]
TOOLS = ["keras", "litert float32", "litert int8"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One epoch each of everything for the MLP: the directory, and what was printed."""
    output, console = (
        tmp_path_factory.mktemp("demo") / "out",
        rich.console.Console(file=io.StringIO(), width=200),
    )
    effort = demo.Effort(epochs=1, fine_tuning=1, timing=tfc.measure.Timing(rounds=3))
    demo.run(("mlp",), output, seed=3, effort=effort, console=console)
    return output, console.file.getvalue()


@pytest.fixture(scope="module")
def rows(small):
    return json.loads((small[0] / "results.json").read_text())


def test_the_rows_have_the_keys_in_order(rows):
    assert all(list(row) == KEYS for row in rows)


def test_every_variant_is_a_keras_model_and_two_files(rows):
    assert [(row["variant"], row["tool"]) for row in rows] == [
        (variant, tool) for variant in VARIANTS for tool in TOOLS
    ]


def test_the_original_comes_first_and_is_the_unit(rows):
    first = rows[0]
    assert (first["model"], first["variant"]) == ("mlp", "original")
    assert first["speedup_b1"] == first["size_ratio"] == 1
    assert first["params"] == 101_770


def test_everything_is_measured(rows):
    for row in rows:
        assert 0.5 < row["accuracy"] <= 1
        assert min(row[key] for key in ("bytes", "zipped_bytes", "latency_ms_b1")) > 0
        assert (row["max_abs_diff"] is None) == (row["tool"] == "keras")


def test_the_pruned_model_has_exactly_80_percent_zeros(small):
    model = keras.saving.load_model(small[0] / "mlp-pruned80.keras")
    kernels = [layer.kernel.numpy() for layer in model.layers[1:]]
    size = sum(kernel.size for kernel in kernels)
    assert sum(np.count_nonzero(kernel) for kernel in kernels) == round(size * 0.2)


def test_joint_pruning_and_quantization_keeps_the_zeros_in_the_int8_file(rows):
    by_name = {(row["variant"], row["tool"]): row for row in rows}
    kernels = round((784 * 128 + 128 * 10) * 0.2)
    biases = 128 + 10
    assert by_name["pruned80-qat", "litert int8"]["nonzeros"] <= kernels + biases


def test_the_files_are_there_and_no_temporary_ones(small, rows):
    names = {path.name for path in small[0].iterdir()}
    assert {row["artefact"] for row in rows} <= names
    assert {f"{plot}.png" for plot in demo.PLOTS} <= names
    assert names - {row["artefact"] for row in rows} == {
        "report.html",
        "results.json",
        *(f"{plot}.png" for plot in demo.PLOTS),
    }


def test_the_table_is_printed(small):
    assert "pruned80-qat" in small[1]
    assert "litert int8" in small[1]
    assert "report.html" in small[1]


def test_the_models_are_plain_keras(small):
    for path in small[0].glob("*.keras"):
        assert "tfcompress" not in keras.saving.load_model(path).to_json()


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown models \['resnet'\], expected some of"):
        demo.run(("resnet",), tmp_path)


def test_an_output_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write to the output directory '.*file"):
        demo.run(("mlp",), tmp_path / "file")


@pytest.fixture(scope="module")
def full():
    """Rows of `tfcompress demo`, by model, variant and tool."""
    path = os.environ.get("TFCOMPRESS_DEMO_RESULTS")
    if path is None:
        pytest.skip("TFCOMPRESS_DEMO_RESULTS names no results.json of a full demo")
    rows = json.loads(pathlib.Path(path).read_text())
    return {(row["model"], row["variant"], row["tool"]): row for row in rows}


@pytest.mark.parametrize("variant", [*VARIANTS, "distilled"])
def test_full_cnn_int8_is_within_half_a_point_and_4_times_faster(full, variant):
    int8 = full["cnn", variant, "litert int8"]
    assert int8["accuracy"] >= full["cnn", variant, "litert float32"]["accuracy"] - 0.005
    assert int8["speedup_b1"] >= 4


@pytest.mark.parametrize("tool", TOOLS)
def test_full_cnn_80_percent_sparsity_is_within_half_a_point(full, tool):
    original, pruned = full["cnn", "original", "keras"], full["cnn", "pruned80", tool]
    assert pruned["accuracy"] >= original["accuracy"] - 0.005
