"""One function for every kind of file."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from tfcompress.artefact import Artefact
from tfcompress.export.litert import export_litert

_EXPORTERS: dict[str, Callable[..., Artefact]] = {".tflite": export_litert}


def export(
    model: keras.Model,
    path: str | os.PathLike,
    precision: str | None = None,
    calibration: Any = None,
    verify_on: Any = None,
) -> Artefact:
    """Export a model to a file that runs without Keras, and verify that file.

    The kind of file follows from the suffix; `.tflite` is LiteRT. The batch dimension stays
    dynamic. The file is run on a batch and compared with the model; when they differ by more than
    the precision explains, it is removed and the error says by how much.

    At `"int8"`, a model trained with `callbacks.QuantizationAwareTraining` (or made by
    `tfcompress.quantize`) is written on the grids it was trained on, and compared with its own
    simulation, step by step; another model gets the ranges that `calibration` shows. Operators
    without an integer kernel are named in a warning and in the result.

    Args:
        model: A built Keras model. Mixed precision is exported as float32.
        path: File to write, whole or not at all.
        precision: `"float32"`, `"float16"`, `"dynamic"` (int8 weights) or `"int8"` (weights and
            activations). By default `"int8"` for a model that has ranges and where `calibration`
            is given, and `"float32"` for others.
        calibration: Inputs as the model gets them, of which some hundred are used: arrays, a
            `tf.data.Dataset`, a generator. At `"int8"` only.
        verify_on: A batch to compare on; by default the first of `calibration`, and random input
            (with a warning) without.

    Returns:
        An `Artefact`: call it to run the file; it knows what its verification found.

    Raises:
        ValueError: The suffix or the precision is not known, the path cannot be written, the model
            is not built, or `"int8"` was asked of a model without ranges.
        ExportError: The file could not be converted, or it does not compute what the model does.

    Example:

    >>> import keras, numpy as np, pathlib, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> file = pathlib.Path(tempfile.mkdtemp(), "model.tflite")
    >>> x = np.random.default_rng(0).normal(size=(64, 4))
    >>> artefact = export(model, file, calibration=x)
    >>> artefact.precision, artefact.float_operators, artefact(x).shape
    ('int8', (), (64, 2))

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """
    path = pathlib.Path(path)
    exporter = _EXPORTERS.get(path.suffix)
    if exporter is None:
        raise ValueError(
            f"Cannot tell from {path.name!r} what to export to: the suffix {path.suffix!r} is not "
            f"known. Supported: {', '.join(sorted(_EXPORTERS))}."
        )
    return exporter(model, path, precision, calibration, verify_on)


def register_exporter(suffix: str, exporter: Callable[..., Artefact]) -> None:
    """Make `export` write another kind of file.

    Args:
        suffix: With its dot, e.g. `".onnx"`.
        exporter: `(model, path, precision, calibration, verify_on) -> Artefact`.
    """
    _EXPORTERS[suffix] = exporter
