"""What the exports have in common; those to ONNX, OpenVINO and SavedModel as a whole."""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from tfcompress import artefact as artefacts
from tfcompress.artefact import Artefact
from tfcompress.batches import first_batch, input_batches, limited
from tfcompress.export import verify
from tfcompress.export.program import Program, require_built, wrappers
from tfcompress.graph.placement import place
from tfcompress.keras_hooks.overlay import settled
from tfcompress.keras_hooks.precision import computing_in_float32
from tfcompress.keras_hooks.quantizer import (
    DynamicRange,
    FollowedRange,
    LayerQuantizer,
    MovingRange,
    QuantizedWeight,
    activation_name,
    fixed_range,
    range_places,
    recall,
    recall_inputs,
    weight_axes,
)
from tfcompress.layers.quantize import Quantize
from tfcompress.ops.schemes import scheme_pair

logger = logging.getLogger("tfcompress")

# More examples move the extremes of a range by little.
CALIBRATION_EXAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        format: Name of its registered `Format`.
        title: What runs it, for messages.
        precisions: Those it can be written at.
        write: `(program, precision, path, workspace)` writes the file; `workspace` is an empty
            directory.
        float_operators: `path -> ` the operators of an int8 file that compute in float.
        steps: By how many output steps it may differ from the simulation.
        replacing: Like `artefact.replacing`.
    """

    format: str
    title: str
    precisions: tuple[str, ...]
    write: Callable[[Program, str, pathlib.Path, pathlib.Path], None]
    float_operators: Callable[[pathlib.Path], tuple[str, ...]]
    steps: float
    replacing: Callable[[pathlib.Path], contextlib.AbstractContextManager] = artefacts.replacing


def export_to(
    target: Target,
    model: keras.Model,
    path: pathlib.Path,
    precision: str | None = None,
    calibration: Any = None,
    verify_on: Any = None,
    **options: Any,
) -> Artefact:
    """Write a model as one kind of file and verify it; see `tfcompress.export`."""
    _refuse(options, target)
    require_built(model)
    quantizers = known_quantizers(model)
    precision = _precision(precision, quantizers, calibration, target)
    with (
        target.replacing(path) as temporary,
        tempfile.TemporaryDirectory() as workspace,
        computing_in_float32(model),
        settled(model),
    ):
        batches = _calibration_batches(calibration)
        example = next(iter(batches), None) if verify_on is None else first_batch(verify_on)
        program = _program(model, precision, quantizers, batches, example)
        batch = _verification_batch(program, example)
        target.write(program, precision, temporary, pathlib.Path(workspace))
        verified = _verify(target, program, Artefact(temporary, target.format, precision), batch)
    logger.info("Exported %s to %s (%s)", model.name, path, precision)
    return dataclasses.replace(verified, path=path)


def _refuse(options, target):
    if options:
        raise ValueError(
            f"An export to {target.title} takes no {', '.join(sorted(options))}; got "
            f"{options!r}. Leave it out, or export to a .tflite file."
        )


def known_quantizers(model: keras.Model) -> tuple[LayerQuantizer, ...]:
    """The quantizers that a model was trained with or is wrapped in."""
    wrapped = [w.quantizer for w in wrappers(model) if isinstance(w, Quantize)]
    return (*recall(model), *wrapped)


def has_ranges(quantizers: Iterable[LayerQuantizer]) -> bool:
    """Whether an integer file can be written without calibration."""
    sources = [source for quantizer in quantizers for source in quantizer.ranges.values()]
    return any(not isinstance(source, DynamicRange) for source in sources)


def _precision(precision, quantizers, calibration, target) -> str:
    if precision is None:
        ranges = has_ranges(quantizers) or calibration is not None
        return "int8" if ranges and "int8" in target.precisions else "float32"
    if precision not in target.precisions:
        raise ValueError(
            f"precision={precision!r} is not known for {target.title}; pass one of "
            f"{target.precisions}."
        )
    if precision == "int8" and not quantizers and calibration is None:
        raise ValueError(
            'precision="int8" needs the ranges of the activations. Pass calibration= (some hundred '
            "training inputs: arrays, a tf.data.Dataset or a generator), or train with "
            "tfcompress.callbacks.QuantizationAwareTraining."
        )
    return precision


def _calibration_batches(calibration) -> list:
    if calibration is None:
        return []
    batches = list(limited(input_batches(calibration), CALIBRATION_EXAMPLES))
    if not batches:
        raise ValueError("calibration= holds no batch; pass some hundred inputs.")
    return batches


def _program(model, precision, quantizers, batches, example) -> Program:
    if precision != "int8":  # Weights that only exist on a grid are taken from the grid.
        wrapped = (quantizer for quantizer in quantizers if quantizer.wrapper is not None)
        kept = (dataclasses.replace(each, activation_scheme=None) for each in wrapped)
        return Program(model, tuple(kept), example)
    if quantizers:
        return Program(model, quantizers, example)
    program = Program(model, planned_quantizers(model, example), example)
    program.calibrate(batches)
    return program


def planned_quantizers(model: keras.Model, example: Any = None) -> tuple[LayerQuantizer, ...]:
    """What quantizes every layer of a float model to int8, with ranges that saw nothing yet.

    Args:
        model: A built model.
        example: A batch, for a subclassed model that does not know what it is called on.

    Returns:
        One quantizer for each layer that needs one, and one for the input.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [(q.layer.name, list(q.ranges)) for q in planned_quantizers(model)]
    [('sequential...', ['input_0']), ('head', ['output'])]
    """
    weights, activations = scheme_pair("int8", "int8")
    plan = place(model, recall_inputs(model) or example)
    inputs = {f"input_{i}": _new_range() for i, wanted in enumerate(plan.inputs) if wanted}
    made = {id(model): inputs}
    quantizers = [LayerQuantizer(model, (), activations, inputs)]
    for placement in plan.placements:
        layer = placement.layer
        followed = made.get(id(placement.follows), {})
        ranges = {
            where: _range(layer, where, followed, activations)
            for where in range_places(layer, placement.output)
        }
        made[id(layer)] = ranges
        found = [QuantizedWeight(v, axes, weights) for v, axes in weight_axes(layer)]
        quantizers.append(LayerQuantizer(layer, found, activations, ranges))
    return tuple(each for each in quantizers if each.weights or each.ranges)


def _range(layer, where, followed, scheme):
    source = followed.get("output", followed.get("input_0"))
    if where == "output" and source is not None:
        return FollowedRange(source)
    fixed = fixed_range(activation_name(layer), scheme) if where == "output" else None
    return fixed or _new_range()


def _new_range() -> MovingRange:
    return MovingRange(keras.Variable(np.zeros(2), trainable=False, dtype="float32"))


def _verification_batch(program, example) -> dict[str, np.ndarray]:
    if example is not None:
        return program.named(example)
    warnings.warn(
        "The exported file is verified on random input. Pass verify_on= a batch of real inputs to "
        "verify it on those.",
        stacklevel=4,
    )
    return program.random_batch()


def _verify(target: Target, program: Program, artefact: Artefact, batch) -> Artefact:
    integer = artefact.precision == "int8"
    left_in_float = target.float_operators(artefact.path) if integer else ()
    if left_in_float:
        warnings.warn(
            f"{target.title} computes these operators of the int8 file in float: "
            f"{', '.join(left_in_float)}. They have no integer kernel there, or nothing gave them "
            "a range; tfcompress.quantize(model, calibration=data) gives one to operations that "
            "are not layers.",
            stacklevel=4,
        )
    runner = artefact.runner()
    actual, expected = by_name(runner(batch), runner), program.simulation()(batch)
    scales = program.output_scales() if integer else {}
    exact = integer and not left_in_float
    scales = {
        name: dataclasses.replace(scales.get(name, verify.OutputScale(None)), steps=target.steps)
        for name in expected
    }
    difference, steps = verify.compare(actual, expected, artefact.precision, scales, exact)
    return dataclasses.replace(
        artefact,
        max_abs_diff=difference,
        output_steps=steps,
        float_operators=left_in_float,
        latency_ms=verify.latency_ms(runner, batch, program.inputs[0].shape[0]),
    )


def by_name(outputs: Any, runner: Any) -> dict[str, np.ndarray]:
    """What a runner gave, by the names of its outputs."""
    if isinstance(outputs, dict):
        return outputs
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return dict(zip(runner.outputs, outputs, strict=True))


class NamedRunner:
    """Runs a file on numpy arrays: one, a list in the model's order, or a dict by name.

    Args:
        path: The file, for messages.
        inputs: Numpy dtype of each input by name, in the order of the model.
        outputs: Their names.
        run: A dict of arrays to a dict of arrays.
    """

    def __init__(self, path, inputs: dict[str, Any], outputs, run: Callable[[dict], dict]):
        self.path, self.inputs, self._run = path, inputs, run
        self.outputs = tuple(sorted(outputs, key=artefacts.natural_order))

    def __call__(self, inputs):
        """Run it; the outputs are one array, a list, or a dict by name, as the model gives them."""
        named = artefacts.by_input(self.path, self.inputs, inputs)
        found = self._run(
            {name: np.ascontiguousarray(named[name], dtype) for name, dtype in self.inputs.items()}
        )
        return artefacts.restructure({name: np.asarray(found[name]) for name in self.outputs})
