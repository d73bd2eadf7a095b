"""Export to LiteRT (`.tflite`)."""

import dataclasses
import logging
import pathlib
import tempfile
import warnings
from typing import Any

import keras
import numpy as np

from tfcompress import artefact as artefacts
from tfcompress.artefact import Artefact
from tfcompress.batches import first_batch, input_batches, limited
from tfcompress.export import verify
from tfcompress.export.process import convert
from tfcompress.export.program import Program, require_built, wrappers
from tfcompress.keras_hooks.precision import computing_in_float32
from tfcompress.keras_hooks.quantizer import LayerQuantizer, recall
from tfcompress.layers.quantize import Quantize

logger = logging.getLogger("tfcompress")

PRECISIONS = ("float32", "float16", "dynamic", "int8")
# More examples move the extremes of a range by little.
_CALIBRATION_EXAMPLES = 512


def export_litert(
    model: keras.Model,
    path: pathlib.Path,
    precision: str | None = None,
    calibration: Any = None,
    verify_on: Any = None,
) -> Artefact:
    """Export to a `.tflite` file; see `tfcompress.export`."""
    require_built(model)
    quantizers = _quantizers(model)
    precision = _precision(precision, quantizers, calibration)
    if precision == "int8":
        _require_8_bits(quantizers)
    with (
        artefacts.replacing(path) as temporary,
        tempfile.TemporaryDirectory() as directory,
        computing_in_float32(model),
    ):
        chosen = _for_precision(quantizers, precision)
        program = Program(model, chosen, _example(calibration, verify_on))
        workspace = pathlib.Path(directory)
        calibrated = _write_calibration(program, calibration, workspace / "calibration")
        program.save(workspace / "model")
        convert(
            {
                "saved_model": str(workspace / "model"),
                "output": str(temporary),
                "precision": precision,
                "calibration": calibrated,
            }
        )
        batch = _verification_batch(program, calibrated, verify_on)
        verified = _verify(program, Artefact(temporary, "litert", precision), batch)
    logger.info("Exported %s to %s (%s)", model.name, path, precision)
    return dataclasses.replace(verified, path=path)


def _quantizers(model) -> tuple[LayerQuantizer, ...]:
    wrapped = [w.quantizer for w in wrappers(model) if isinstance(w, Quantize)]
    return (*recall(model), *wrapped)


def _example(calibration, verify_on):
    for data in (verify_on, calibration):
        if data is not None and not hasattr(data, "__next__"):  # A generator is read only once.
            return first_batch(data)
    return None


def _for_precision(quantizers, precision) -> tuple[LayerQuantizer, ...]:
    """Int8 takes everything; else, weights that only exist on a grid are taken from the grid."""
    if precision == "int8":
        return quantizers
    return tuple(
        dataclasses.replace(quantizer, activation_scheme=None)
        for quantizer in quantizers
        if quantizer.wrapper is not None
    )


def _precision(precision, quantizers, calibration) -> str:
    has_ranges = any(quantizer.ranges for quantizer in quantizers)
    if precision is None:
        return "int8" if has_ranges or calibration is not None else "float32"
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} is not known for LiteRT; pass one of {PRECISIONS}."
        )
    if precision == "int8" and not has_ranges and calibration is None:
        raise ValueError(
            'precision="int8" needs the ranges of the activations. Pass calibration= (some hundred '
            "training inputs: arrays, a tf.data.Dataset or a generator), or train with "
            'tfcompress.callbacks.QuantizationAwareTraining; precision="dynamic" needs neither.'
        )
    return precision


def _require_8_bits(quantizers):
    for quantizer in quantizers:
        for scheme in quantizer.schemes:
            if scheme.bits != 8:
                raise ValueError(
                    f"The layer {quantizer.layer.name!r} was trained with {scheme}, and a LiteRT "
                    'file of precision="int8" holds 8 bits. Train with weights="int8" and '
                    'activations="int8", or export with another precision.'
                )


def _write_calibration(program, calibration, directory) -> str | None:
    if calibration is None:
        return None
    directory.mkdir()
    batches = limited(input_batches(calibration), _CALIBRATION_EXAMPLES)
    for index, batch in enumerate(batches):
        np.savez(directory / f"{index:06d}.npz", **program.named(batch))
    if not any(directory.iterdir()):
        raise ValueError("calibration= holds no batch; pass some hundred inputs.")
    return str(directory)


def _verification_batch(program, calibrated, verify_on) -> dict[str, np.ndarray]:
    if verify_on is not None:
        return program.named(first_batch(verify_on))
    if calibrated is not None:
        with np.load(next(pathlib.Path(calibrated).iterdir())) as batch:
            return dict(batch)
    warnings.warn(
        "The exported file is verified on random input. Pass verify_on= a batch of real inputs to "
        "verify it on those.",
        stacklevel=4,
    )
    return program.random_batch()


def _verify(program: Program, artefact: Artefact, batch) -> Artefact:
    file = artefacts.litert_flatbuffer(artefact.path)
    left_in_float = verify.float_operators(file) if artefact.precision == "int8" else ()
    if left_in_float:
        warnings.warn(
            f"These operators of the int8 file compute in float: {', '.join(left_in_float)}. They "
            "had no range: pass calibration= to give them one, or see which kernels LiteRT lacks.",
            stacklevel=4,
        )
    runner = artefact.runner()
    actual = _by_name(runner(batch), runner)
    expected = program.simulation()(batch)
    exact = artefact.precision == "int8" and bool(program.quantizers) and not left_in_float
    differences, steps = [0.0], []
    for name, value in expected.items():
        scale = verify.output_scale(file, runner.outputs[name]["name"])
        verify.check_output(name, actual[name], value, artefact.precision, scale if exact else None)
        differences.append(float(np.max(np.abs(actual[name] - value.astype(np.float64)))))
        steps += [differences[-1] / scale.step] if scale.step else []
    return dataclasses.replace(
        artefact,
        max_abs_diff=max(differences),
        output_steps=max(steps, default=None),
        float_operators=left_in_float,
    )


def _by_name(outputs, runner) -> dict[str, np.ndarray]:
    if isinstance(outputs, dict):
        return outputs
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return dict(zip(runner.outputs, outputs, strict=True))
