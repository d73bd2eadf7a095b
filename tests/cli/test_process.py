"""The command as a process: Ctrl-C, and the exit codes that a shell sees."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def start(directory, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tfcompress", *map(str, arguments)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, such as a whole test run, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(stream, text, seconds=300):
    end = time.time() + seconds
    for line in stream:
        if text in line:
            return
        assert time.time() < end
    raise AssertionError(f"{text!r} was never printed")


def test_ctrl_c_leaves_nothing_half_written(files, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "stages:\n  - export: {path: m.tflite}\n  - train: {epochs: 100000}\n"
    )
    options = ["--model", files / "m.keras", "--data", files / "d.npz", "-o", "out"]
    process = start(tmp_path, "run", "r.yaml", *options)
    wait_for(process.stdout, "Epoch 2/")
    assert (tmp_path / "out").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.slow
def test_bad_input_in_a_shell(tmp_path):
    process = start(tmp_path, "run", "none.yaml")
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (2, "")
    assert "no recipe 'none.yaml'" in errors
