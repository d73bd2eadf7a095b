"""Test programs that run in a process of their own: strategies do not share one well."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_module(name, *arguments) -> subprocess.CompletedProcess:
    """Run `python -m name arguments` from the root of the repository, its output captured."""
    return subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=600,
    )
