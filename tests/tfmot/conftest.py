"""What TFMOT itself computes, once for all tests that compare with it."""

import json

import pytest

from tests.processes import run_module


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    """The directory that `tests/tfmot/old.py` filled, and what it told."""
    directory = tmp_path_factory.mktemp("old")
    result = run_module("tests.tfmot.old", directory)
    assert result.returncode == 0, result.stderr[-4000:]
    return directory, json.loads((directory / "told.json").read_text())
