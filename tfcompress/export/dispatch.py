"""One function for every kind of file."""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from tfcompress.artefact import Artefact
from tfcompress.export import onnx, openvino, savedmodel
from tfcompress.export.fastest import export_fastest
from tfcompress.export.litert import export_litert
from tfcompress.export.target import export_to

_EXPORTERS: dict[str, Callable[..., Artefact]] = {
    ".tflite": export_litert,
    ".onnx": functools.partial(export_to, onnx.TARGET),
    ".xml": functools.partial(export_to, openvino.TARGET),
    "": functools.partial(export_to, savedmodel.TARGET),
}


def export(
    model: keras.Model,
    path: str | os.PathLike,
    precision: str | None = None,
    calibration: Any = None,
    verify_on: Any = None,
    **options: Any,
) -> Artefact:
    """Export a model to a file that runs without Keras, and verify that file.

    The kind of file follows from the suffix: `.tflite` is LiteRT, `.onnx` ONNX, `.xml` (with a
    `.bin` beside it) OpenVINO, and no suffix a SavedModel. The file is run on a batch and compared
    with the model; when they differ by more than the precision explains, it is removed and the
    error says by how much.

    At `"int8"`, a model trained with `callbacks.QuantizationAwareTraining` (or made by
    `tfcompress.quantize`) is written on the grids it was trained on, whatever their bits, and
    compared with its own simulation, step by step; another model gets the ranges that `calibration`
    shows. Operators without an integer kernel are named in a warning and in the result.

    Args:
        model: A built Keras model. Mixed precision is exported as float32.
        path: File to write, whole or not at all.
        precision: `"float32"`, `"float16"`, `"dynamic"` (int8 weights), `"int8"` (weights and
            activations) or, for LiteRT, `"int4"` (weights; activations int8 where there are ranges
            or `calibration`, else float; a model that was not trained on 4 bits is rounded) or
            `"fastest"` (float32, dynamic and int8 are measured on this machine). By default
            `"int8"` for a model that has ranges and where `calibration` is given, and `"float32"`
            for others; for LiteRT `"dynamic"` where the model has attention, or has been trained on
            quantized weights only.
        calibration: Inputs as the model gets them, of which some hundred are used: arrays, a
            `tf.data.Dataset`, a generator. For integer activations only.
        verify_on: A batch to compare on; by default the first of `calibration`, and random input
            (with a warning) without.
        **options: For LiteRT. `io="float"`, or `"integer"` for a file whose inputs and outputs are
            the integers it computes with (an `Artefact` takes and gives real numbers either way).
            `batch_size=None`, which leaves it open, or a number. `tolerance=0.01`, at `"fastest"`:
            how far a candidate may be from the model on `verify_on`, as the share of examples whose
            largest output is another (outputs of shape `(batch, classes)`), or as the relative root
            mean square of the difference.

    Returns:
        An `Artefact`: call it to run the file; it knows what its verification found.

    Raises:
        ValueError: The suffix, the precision or an option is not known, the path cannot be written,
            the model is not built, or `"int8"` was asked of a model without ranges.
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
            f"known. Supported: {', '.join(sorted(filter(None, _EXPORTERS)))}, and no suffix for a "
            "SavedModel."
        )
    if path.suffix == ".tflite":
        _check_options(options, precision)
    if precision == "fastest":
        _require_litert(path)
        return export_fastest(model, path, calibration, verify_on, **options)
    return exporter(model, path, precision, calibration, verify_on, **options)


def _check_options(options, precision):
    known = {"io", "batch_size"} | ({"tolerance"} if precision == "fastest" else set())
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"export got {', '.join(unknown)}, and a .tflite file of precision={precision!r} takes "
            f'{", ".join(sorted(known))}. Leave it out; tolerance= is for precision="fastest".'
        )


def _require_litert(path):
    if path.suffix != ".tflite":
        raise ValueError(
            f'precision="fastest" chooses between LiteRT files, and {path.name!r} is none. Pass a '
            "path that ends in .tflite, or a precision."
        )


def register_exporter(suffix: str, exporter: Callable[..., Artefact]) -> None:
    """Make `export` write another kind of file.

    Args:
        suffix: With its dot, e.g. `".onnx"`.
        exporter: `(model, path, precision, calibration, verify_on, **options) -> Artefact`.
    """
    _EXPORTERS[suffix] = exporter
