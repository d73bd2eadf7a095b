"""The fastest file that computes nearly what the model does: all kinds are written and timed."""

import dataclasses
import functools
import logging
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np

from tfcompress import artefact as artefacts
from tfcompress.artefact import Artefact, Candidate
from tfcompress.batches import first_batch, input_batches, limited
from tfcompress.export.litert import export_litert
from tfcompress.export.program import Program, require_built
from tfcompress.export.target import CALIBRATION_EXAMPLES, by_name, has_ranges, known_quantizers
from tfcompress.export.verify import ExportError
from tfcompress.keras_hooks.overlay import settled
from tfcompress.keras_hooks.precision import computing_in_float32
from tfcompress.timing import Timing, latency

logger = logging.getLogger("tfcompress")


def export_fastest(
    model: keras.Model,
    path: pathlib.Path,
    calibration: Any = None,
    verify_on: Any = None,
    io: str = "float",
    batch_size: int | None = None,
    tolerance: float = 0.01,
) -> Artefact:
    """Write a `.tflite` file at each precision, and keep the fastest that is near the model.

    Args:
        model: A built model.
        path: File to write.
        calibration: See `export`; without, and without ranges in the model, int8 is left out.
        verify_on: A batch of real inputs, some hundred examples; by default the calibration data.
        io: `"integer"` considers int8 only.
        batch_size: See `export`.
        tolerance: What a candidate may differ in on that batch: the share of examples whose
            largest output is another, for outputs of shape `(batch, classes)`; else the root mean
            square of the difference over that of the output.

    Returns:
        The chosen `Artefact`; `latency_ms` is its own, `candidates` tells of all.

    Raises:
        ValueError: There is no data to compare on, or `tolerance` is not in [0, 1].
        ExportError: No candidate is within the tolerance.
    """
    require_built(model)
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance={tolerance!r}; pass a share from 0 to 1, e.g. 0.01.")
    batches = None if calibration is None else _kept(calibration)
    compare_on = _comparison(verify_on, batches)
    quantizers = known_quantizers(model)
    with computing_in_float32(model), settled(model):
        reference = Program(model, quantizers, compare_on)
        inputs = reference.named(compare_on)
        expected = reference.simulation()(inputs)
    has_integers = has_ranges(quantizers) or batches is not None
    with artefacts.replacing(path) as temporary, tempfile.TemporaryDirectory() as directory:
        made, candidates = {}, {}
        for precision in _precisions(io, has_integers):
            artefact = _attempt(
                model,
                pathlib.Path(directory, f"{precision}.tflite"),
                precision,
                None if precision != "int8" or batches is None else iter(batches),
                compare_on,
                io=io,
                batch_size=batch_size,
            )
            if isinstance(artefact, ExportError):
                candidates[precision] = Candidate(precision, note=str(artefact))
                continue
            difference = _difference(artefact, inputs, expected, batch_size)
            candidates[precision] = Candidate(precision, artefact.bytes, difference=difference)
            made[precision] = artefact
        candidates |= _timed(candidates, made, inputs, batch_size)
        chosen = _choose(candidates.values(), tolerance)
        temporary.write_bytes(made[chosen.precision].path.read_bytes())
    logger.info("The fastest of %s is %s", list(candidates.values()), chosen.precision)
    return dataclasses.replace(
        made[chosen.precision],
        path=path,
        latency_ms=chosen.latency_ms,
        candidates=tuple(candidates.values()),
    )


def _kept(calibration) -> list:
    return list(limited(input_batches(calibration), CALIBRATION_EXAMPLES))


def _comparison(verify_on, batches):
    if verify_on is not None:
        return first_batch(verify_on)
    if not batches:
        raise ValueError(
            'precision="fastest" compares the candidates with the model. Pass verify_on= (some '
            "hundred real inputs) or calibration=."
        )
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)


def _precisions(io, has_integers) -> tuple[str, ...]:
    integer = ("int8",) if has_integers else ()
    return integer if io == "integer" and integer else ("float32", "dynamic", *integer)


def _attempt(model, path, precision, calibration, verify_on, **options):
    try:
        return export_litert(model, path, precision, calibration, verify_on, **options)
    except ExportError as error:
        return error


def _difference(artefact, inputs, expected, size) -> float:
    """The largest over the outputs: of changed argmax, or of relative root mean square."""
    runner = artefact.runner()
    parts = [by_name(runner(part), runner) for part in _parts(inputs, size)]
    return max(
        _share_changed(np.concatenate([part[name] for part in parts]), value)
        for name, value in expected.items()
    )


def _share_changed(actual, expected) -> float:
    expected = expected[: len(actual)]
    if expected.ndim == 2 and expected.shape[1] > 1:
        return float(np.mean(actual.argmax(axis=1) != expected.argmax(axis=1)))
    rms = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64))) / max(rms, 1e-6))


def _parts(inputs, size: int | None):
    """Batches as the file takes them; a file of fixed size does not see the rest."""
    total = len(next(iter(inputs.values())))
    size = size or total
    for start in range(0, max(total - size, 0) + 1, size):
        yield {name: np.resize(x[start:], (size, *x.shape[1:])) for name, x in inputs.items()}


def _timed(candidates, made, inputs, size) -> dict[str, Candidate]:
    """The candidates with the median latency of a call on one example, or one full batch."""
    example = next(_parts(inputs, size or 1))
    calls = {
        precision: functools.partial(artefact.runner(), example)
        for precision, artefact in made.items()
    }
    return {
        precision: dataclasses.replace(candidates[precision], latency_ms=found.median_ms)
        for precision, found in latency(calls, Timing()).items()
    }


def _choose(candidates, tolerance) -> Candidate:
    near = [c for c in candidates if c.difference is not None and c.difference <= tolerance]
    if not near:
        raise ExportError(
            f"No file is within tolerance={tolerance} of the model: {list(candidates)}. Pass a "
            "larger tolerance, or more data to calibrate on."
        )
    return min(near, key=lambda candidate: candidate.latency_ms)
