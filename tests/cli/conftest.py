"""A model and its files, made once, and the command line in this process."""

import os

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import tfcompress as tfc
from tests.models import classification, mlp
from tfcompress.cli import app


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A directory with `m.keras`, `m.tflite`, `m.onnx` (where it can be made), `d.npz`."""
    directory = tmp_path_factory.mktemp("files")
    keras.utils.set_random_seed(0)
    model, (x, y) = mlp(), classification(200)
    model.save(directory / "m.keras")
    np.savez(directory / "d.npz", x=x, y=y)
    tfc.export(model, directory / "m.tflite", precision="float32", verify_on=x[:8])
    return directory


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Runs a command in an empty directory; fails on a traceback."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        os.environ["COLUMNS"] = "200"
        result = CliRunner().invoke(app, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def refused(invoke, tmp_path):
    """Runs a command that must fail with exit code 2, one message, and nothing written."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.strip()
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return run
