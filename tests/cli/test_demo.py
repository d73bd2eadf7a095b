"""`tfcompress demo`, and the command as a program."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tfcompress import demo
from tfcompress.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to the demo."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments))
    return calls


def test_help_lists_the_commands_and_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "tfcompress", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "demo" in result.stdout


def test_demo_options_have_defaults(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    ((models, output, seed),) = calls
    assert (models, str(output), seed) == (("mlp", "cnn"), "tfcompress-demo", 0)


def test_demo_options_are_passed_on(calls, tmp_path):
    result = invoke("demo", "--model", "cnn", "--output", str(tmp_path / "out"), "--seed", "7")
    assert result.exit_code == 0, result.output
    assert calls == [(("cnn",), tmp_path / "out", 7)]


def test_an_output_that_cannot_be_written_exits_with_2_before_any_training(calls, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a directory")
    result = invoke("demo", "--output", str(file / "out"))
    assert result.exit_code == 2
    assert "--output" in result.output
    assert "Cannot write to the output directory" in result.output
    assert calls == []


@pytest.mark.parametrize("arguments", [["--model", "resnet"], ["--seed", "-1"], ["--size", "3"]])
def test_bad_options_exit_with_2(calls, arguments):
    assert invoke("demo", *arguments).exit_code == 2
    assert calls == []
