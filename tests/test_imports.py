"""What may be imported where: by the package as a whole, and by each of its layers."""

import ast
import importlib.metadata
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import pytest

import tfcompress

PACKAGE = pathlib.Path(tfcompress.__file__).parent

# A module may import from its own group and from the groups above it in this list.
DIRECTION = [
    {
        "schedules",
        "checks",
        "ops",
        "artefact",
        "batches",
        "optional",
        "shorthands",
        "timing",
        "values",
    },
    {"keras_hooks"},
    {"graph"},
    {"layers", "callbacks"},
    {
        "pruning",
        "quantization",
        "distillation",
        "parallel",
        "acceleration",
        "export",
        "measure",
    },
    {"report"},
    {"tfmot", "zoo", "data", "recipe", "demo", "cli", "__main__"},
]
INDEPENDENT = DIRECTION[4]
OPTIONAL = {
    "ai_edge_litert",
    "jinja2",
    "keras_hub",
    "matplotlib",
    "mlxtend",
    "nncf",
    "onnx",
    "onnxruntime",
    "openvino",
    "optuna",
    "pandas",
    "safetensors",
    "sklearn",
    "tensorflow_model_optimization",
    "tf2onnx",
    "tf_keras",
}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
    )


def sources() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def group_of(part: str) -> int:
    return next(i for i, group in enumerate(DIRECTION) if part in group)


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path: pathlib.Path) -> list[str]:
    """Absolute dotted names of everything that the file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{absolute(node, path)}.{alias.name}" for alias in node.names]
    return names


def absolute(node: ast.ImportFrom, path: pathlib.Path) -> str:
    if not node.level:
        return node.module
    package = path.relative_to(PACKAGE.parent).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imported_parts(path: pathlib.Path) -> set[str]:
    names = (name.split(".") for name in imported_names(path))
    return {name[1] for name in names if name[0] == "tfcompress" and len(name) > 1}


def imported_packages(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = python(code)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_nothing_optional_is_imported():
    # Keras imports some of these by itself where they are installed.
    assert (imported_packages("tfcompress") - imported_packages("keras")) & OPTIONAL == set()


def test_tf_keras_stays_keras_3():
    result = python(
        "import os, tfcompress, tensorflow as tf;"
        "print(tf.keras.__version__[0], os.environ.get('TF_USE_LEGACY_KERAS'))"
    )
    assert result.stdout.split() == ["3", "None"], result.stderr


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy"])
def test_another_backend_is_refused_with_the_remedy(backend):
    # Whether or not that backend is installed, ours is the error that the user sees.
    result = python("import tfcompress", KERAS_BACKEND=backend)
    assert result.returncode != 0
    assert "tfcompress needs Keras on TensorFlow" in result.stderr
    assert "KERAS_BACKEND=tensorflow" in result.stderr
    assert repr(backend) in result.stderr


def import_seconds(module: str) -> float:
    start = time.perf_counter()
    result = python(f"import {module}")
    assert result.returncode == 0, result.stderr
    return time.perf_counter() - start


@pytest.mark.slow
def test_import_costs_less_than_a_tenth_of_keras():
    import_seconds("tfcompress")  # writes the bytecode and warms the file cache
    ratios = [import_seconds("tfcompress") / import_seconds("keras") for _ in range(7)]
    assert statistics.median(ratios) < 1.10, ratios


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        pytest.skip("the package itself re-exports everything")
    for other in imported_parts(path) - {part}:
        assert group_of(other) <= group_of(part), f"{part} must not import {other}"
        both_independent = {part, other} <= INDEPENDENT
        assert not both_independent, f"{part} and {other} must not know each other"


def test_the_direction_check_sees_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    wrong = tmp_path / "ops" / "wrong.py"
    wrong.write_text("def late():\n    from tfcompress.callbacks.base import Base\n")
    with pytest.raises(AssertionError, match="ops must not import callbacks"):
        test_imports_point_one_way(wrong)


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_private_keras_api_stays_in_keras_hooks(path):
    if part_of(path) == "keras_hooks":
        pytest.skip("the one place where it is allowed")
    names = [n for n in imported_names(path) if re.match(r"keras\.src\b|keras\._(?!_)", n)]
    attributes = re.findall(r"\bkeras\.src\b|\bkeras\._(?!_)\w+", path.read_text())
    assert names + attributes == []
    assert private_attributes(path) == []


def private_attributes(path: pathlib.Path) -> list[str]:
    """`other._name` where `_name` is not something that this package defines."""
    tree = ast.parse(path.read_text())
    text = "\n".join(source.read_text() for source in sources())
    own = set(re.findall(r"(?:def|class) (_\w+)|self\.(_\w+) *(?::[^=\n]+)?=[^=]", text))
    own = {name for pair in own for name in pair} | {"_replace", "_asdict", "_fields"}
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and node.attr not in own
        and "tfcompress" not in node.attr
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_optional_packages_are_only_required_by_name(path):
    packages = {name.split(".")[0] for name in imported_names(path)}
    assert packages & OPTIONAL == set()


def test_every_import_is_declared():
    used = {name.split(".")[0] for path in sources() for name in imported_names(path)}
    third_party = used - set(sys.stdlib_module_names) - {"tfcompress"}
    distributions = {d for p in third_party for d in importlib.metadata.packages_distributions()[p]}
    assert distributions <= {
        *("tensorflow", "keras", "networkx", "numpy", "rich", "typer"),
        *("h5py", "pydantic", "pydantic_core", "PyYAML"),  # h5py comes with Keras.
    }
