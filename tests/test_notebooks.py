"""Every notebook runs from its first cell to its last, on small settings."""

import pathlib
import sys

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A kernel of this interpreter, in an empty directory, that finds this checkout."""
    monkeypatch.setenv("NOTEBOOK_EPOCHS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (spec / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "Python 3"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, here):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(here)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert printed


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_names_no_machine(path):
    assert not any(word in path.read_text() for word in ("/root", "/home", "/tmp", "/work"))
