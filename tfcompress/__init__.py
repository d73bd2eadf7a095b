"""Compress and accelerate Keras 3 models on TensorFlow, during `model.fit` and after it."""

import importlib
import os

if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    # Before keras is imported, which fails on its own where that backend is not installed.
    raise ImportError(
        f"tfcompress needs Keras on TensorFlow; KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}. "
        'Set KERAS_BACKEND=tensorflow in the environment, or os.environ["KERAS_BACKEND"] = '
        '"tensorflow" before keras is imported first.'
    )

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"tfcompress needs Keras on TensorFlow; Keras uses {keras.backend.backend()!r}, which its "
        "configuration file names. Set KERAS_BACKEND=tensorflow in the environment before keras "
        "is imported first."
    )

from tfcompress import (
    acceleration,
    callbacks,
    distillation,
    layers,
    measure,
    parallel,
    quantization,
    report,
    schedules,
    zoo,
)
from tfcompress.artefact import Artefact
from tfcompress.export import ExportError, export
from tfcompress.graph import (
    channel_groups,
    drop_layers,
    expand,
    factorize,
    fold_batch_norm,
    prune_vocabulary,
    shrink,
    shrink_plan,
)
from tfcompress.layers import cluster, strip
from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, regrowth, structures
from tfcompress.pruning import prune, sensitivity
from tfcompress.quantization import quantize

__all__ = [
    "Artefact",
    "ExportError",
    "acceleration",
    "allocations",
    "callbacks",
    "channel_groups",
    "cluster",
    "criteria",
    "distillation",
    "drop_layers",
    "expand",
    "export",
    "factorize",
    "fold_batch_norm",
    "layers",
    "measure",
    "parallel",
    "prune",
    "prune_vocabulary",
    "quantization",
    "quantize",
    "regrowth",
    "report",
    "schedules",
    "sensitivity",
    "shrink",
    "shrink_plan",
    "strip",
    "structures",
    "zoo",
]

# They stand on optional packages, or warn about what was imported before.
_LATE = ("data", "recipe", "tfmot")


def __getattr__(name):
    if name == "Recipe":
        return importlib.import_module("tfcompress.recipe").Recipe
    if name in _LATE:
        return importlib.import_module(f"tfcompress.{name}")
    raise AttributeError(f"module 'tfcompress' has no attribute {name!r}")
