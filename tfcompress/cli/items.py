"""Models and exported files of any kind, opened so that a damaged one is an error, not a crash."""

import pathlib
import subprocess
import sys
from typing import Any

import keras
import numpy as np

from tfcompress.artefact import Artefact, litert_schema
from tfcompress.recipe.models import ModelFileError, load_model

_SECONDS = 120
_PROBE = """
import sys
try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tensorflow.lite.python.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1])
interpreter.allocate_tensors()
interpreter.invoke()
"""


def open_item(path: str, trust: bool = False) -> keras.Model | Artefact:
    """A model or an exported file, by what its name says.

    Args:
        path: A `.keras` file, `zoo:minilm`, or a file of any format that can be exported to.
        trust: See `load_model`.

    Returns:
        The model, or an `Artefact` that has been loaded once.

    Raises:
        FileNotFoundError: There is no such file.
        ModelFileError: It is damaged, or of no kind that can be run.
    """
    suffix = pathlib.Path(path).suffix
    if ":" in path and not pathlib.Path(path).exists() or suffix in (".keras", ".h5", ".hdf5"):
        return load_model(path, trust)
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"There is no file {path!r}.")
    try:
        artefact = Artefact.load(path)
        if artefact.format == "litert":
            _check_lengths(artefact.path)
            _probe(artefact.path)
        artefact.runner()
        artefact.tensors()
    except (ImportError, ModelFileError):
        raise
    except Exception as error:  # Each runtime has errors of its own.
        message = " ".join(str(error).split())[:300] or type(error).__name__
        if path in message:
            raise ModelFileError(message) from error
        raise ModelFileError(
            f"{path!r} cannot be loaded: it is damaged, or not what its name says. {message}"
        ) from error
    return artefact


def _check_lengths(path: pathlib.Path) -> None:
    """Refuse a flatbuffer whose vectors are longer than the file: reading it would take forever."""
    content = path.read_bytes()
    model = litert_schema().Model.GetRootAs(content, 0)
    graphs = [model.Subgraphs(i) for i in range(min(model.SubgraphsLength(), len(content)))]
    parts = sum(graph.TensorsLength() + graph.OperatorsLength() for graph in graphs)
    if parts + model.BuffersLength() + model.SubgraphsLength() > len(content):
        raise ModelFileError(f"{str(path)!r} is damaged: it claims to have {parts:,} parts.")


def _probe(path: pathlib.Path) -> None:
    """Load and run a LiteRT file in a process of its own, which a damaged one may crash."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", _PROBE, str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelFileError(f"{str(path)!r} ran for {_SECONDS} s without an end.") from error
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise ModelFileError(f"{str(path)!r} is damaged: LiteRT cannot run it: {lines[-1][:200]}")


def example_inputs(items: dict[str, Any], examples: int = 32) -> Any:
    """Random inputs that the first of the items that knows its shapes takes.

    Args:
        items: Models and artefacts by name.
        examples: How many.

    Returns:
        An array, or a list in the order of the model's inputs.

    Raises:
        ValueError: No item says its shapes.
    """
    models = [item for item in items.values() if isinstance(item, keras.Model)]
    files = [item for item in items.values() if not isinstance(item, keras.Model)]
    for model in models:
        specs = getattr(model, "inputs", None)
        if specs and all(None not in spec.shape[1:] for spec in specs):
            arrays = [_random(spec.shape[1:], spec.dtype, examples) for spec in specs]
            by_name = isinstance(getattr(model, "input", None), dict)
            if by_name:
                return dict(zip(model.input, arrays, strict=True))
            return arrays if len(arrays) > 1 else arrays[0]
    for file in files:
        details = getattr(file.runner(), "inputs", None)
        if isinstance(details, dict) and all("shape" in each for each in details.values()):
            shapes = [each["shape_signature"][1:] for each in details.values()]
            if all(min(shape, default=1) > 0 for shape in shapes):
                kinds = [
                    np.float32 if each["quantization"][0] else each["dtype"]
                    for each in details.values()
                ]
                arrays = [_random(*pair, examples) for pair in zip(shapes, kinds, strict=True)]
                return arrays if len(arrays) > 1 else arrays[0]
    raise ValueError(
        "The shape of the inputs is not known, as no .keras file with fixed sizes is among them. "
        "Pass examples with --data."
    )


def _random(shape, dtype, examples: int) -> np.ndarray:
    random = np.random.default_rng(0)
    if np.issubdtype(np.dtype(dtype), np.integer):
        return np.zeros((examples, *shape), dtype)  # Id 0 is in every vocabulary.
    return random.normal(size=(examples, *shape)).astype(np.float32)
