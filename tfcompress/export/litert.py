"""Export to LiteRT (`.tflite`)."""

import contextlib
import dataclasses
import logging
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfcompress import artefact as artefacts
from tfcompress.artefact import Artefact
from tfcompress.batches import first_batch, input_batches, limited
from tfcompress.export import flatbuffer, verify
from tfcompress.export.matrices import as_matrices
from tfcompress.export.process import convert
from tfcompress.export.program import Program, require_built
from tfcompress.export.target import (
    CALIBRATION_EXAMPLES,
    by_name,
    has_ranges,
    known_quantizers,
    planned_quantizers,
)
from tfcompress.export.verify import ExportError
from tfcompress.graph.placement import has_attention
from tfcompress.keras_hooks.overlay import all_layers, settled
from tfcompress.keras_hooks.precision import computing_in_float32
from tfcompress.keras_hooks.quantizer import LayerQuantizer, recall_inputs
from tfcompress.ops.schemes import weight_scheme

logger = logging.getLogger("tfcompress")

PRECISIONS = ("float32", "float16", "dynamic", "int8", "int4")
# The converter leaves smaller weights in float, where activations are.
_SMALLEST_DYNAMIC = 1024
# Where 4 bits are no slower than 8 (one thread, XNNPACK: 0.7 of the time; convolutions 3.6 times).
_FAST_IN_4_BITS = ("FULLY_CONNECTED",)
_NAMED_IN_WARNING = 5
_ALL_IN_4_BITS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


def export_litert(
    model: keras.Model,
    path: pathlib.Path,
    precision: str | None = None,
    calibration: Any = None,
    verify_on: Any = None,
    io: str = "float",
    batch_size: int | None = None,
) -> Artefact:
    """Export to a `.tflite` file; see `tfcompress.export`."""
    require_built(model)
    quantizers = known_quantizers(model)
    example = _example(calibration, verify_on)
    precision = _precision(model, precision, quantizers, calibration, example)
    integer = _is_integer(precision, quantizers, calibration)
    _check_options(io, batch_size, precision, integer)
    with (
        artefacts.replacing(path) as temporary,
        tempfile.TemporaryDirectory() as directory,
        computing_in_float32(model),
        settled(model),
        _unrolled(model, integer or batch_size is None),
    ):
        chosen = _for_precision(model, quantizers, precision, integer, example)
        program = Program(model, chosen, example, batch_size)
        workspace = pathlib.Path(directory)
        calibrated = _write_calibration(program, calibration, workspace / "calibration", batch_size)
        with as_matrices(model):
            program.save(workspace / "model")
        _convert(
            {
                "saved_model": str(workspace / "model"),
                "output": str(temporary.absolute()),
                "precision": "int8" if integer else precision.replace("int4", "dynamic"),
                "calibration": calibrated,
            }
        )
        _finish(temporary, program, precision, io)
        batch = _verification_batch(program, calibrated, verify_on, batch_size)
        artefact = Artefact(temporary, "litert", precision)
        verified = _verify(program, artefact, batch, integer, calibrated is not None)
    logger.info("Exported %s to %s (%s)", model.name, path, precision)
    return dataclasses.replace(verified, path=path)


def _convert(request):
    try:
        convert(request)
    except ExportError as error:
        if re.search(r"\bErfc?\b", str(error)) is None:
            raise
        raise ExportError(
            f"{error}\nLiteRT has the error function only as part of an exact GELU. Use "
            'keras.activations.gelu, activation="gelu", or approximate it by a tanh.'
        ) from error


def _example(calibration, verify_on):
    for data in (verify_on, calibration):
        if data is not None and not hasattr(data, "__next__"):  # A generator is read only once.
            return first_batch(data)
    return None


def _for_precision(model, quantizers, precision, integer, example) -> tuple[LayerQuantizer, ...]:
    """Integer files take everything; else, weights that only exist on a grid come from the grid."""
    if precision == "int4" and not any(quantizer.weights for quantizer in quantizers):
        # What has ranges already keeps them; its weights are added.
        quantizers = (*quantizers, *_rounded_to_4_bits(model, example, integer))
    if integer:
        return quantizers
    rounds = precision in ("dynamic", "int4")
    return tuple(
        dataclasses.replace(quantizer, activation_scheme=None)
        for quantizer in quantizers
        if quantizer.wrapper is not None or (rounds and quantizer.weights)
    )


def _rounded_to_4_bits(model, example, integer) -> Iterator[LayerQuantizer]:
    scheme = weight_scheme("int4")
    for quantizer in planned_quantizers(model, example):
        weights = [
            dataclasses.replace(weight, scheme=scheme)
            for weight in quantizer.weights
            if integer or np.prod(weight.variable.shape) >= _SMALLEST_DYNAMIC
        ]
        if weights:
            yield LayerQuantizer(quantizer.layer, weights, None, {})


def _precision(model, precision, quantizers, calibration, example) -> str:
    if precision is None:
        return _default_precision(model, quantizers, calibration, example)
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} is not known for LiteRT; pass one of "
            f"{(*PRECISIONS, 'fastest')}."
        )
    if precision == "int8" and not has_ranges(quantizers) and calibration is None:
        raise ValueError(
            'precision="int8" needs the ranges of the activations. Pass calibration= (some hundred '
            "training inputs: arrays, a tf.data.Dataset or a generator), or train with "
            'tfcompress.callbacks.QuantizationAwareTraining; precision="dynamic" needs neither.'
        )
    schemes = [weight.scheme for quantizer in quantizers for weight in quantizer.weights]
    if precision == "int4" and schemes and all(scheme.bits > 4 for scheme in schemes):
        raise ValueError(
            f'precision="int4" was asked of the model {model.name!r}, which was trained on weights '
            f"of {schemes[0].bits} bits, and rounding those again would undo the training. Train "
            'with weights="int4", or export with precision="int8".'
        )
    return precision


def _default_precision(model, quantizers, calibration, example) -> str:
    knows = hasattr(model, "operations") or isinstance(model, keras.Sequential)
    if has_attention(model, None if knows else recall_inputs(model) or example):
        logger.info(
            "%s has attention, for which LiteRT's int8 kernels are slower than float: exported at "
            'precision="dynamic" (int8 weights). Pass precision="int8" to have all in integers.',
            model.name,
        )
        return "dynamic"
    if has_ranges(quantizers) or calibration is not None:
        return "int8"
    return "dynamic" if any(quantizer.weights for quantizer in quantizers) else "float32"


def _is_integer(precision, quantizers, calibration) -> bool:
    """Whether activations are integers too."""
    if precision not in ("int8", "int4"):
        return False
    _require_8_bit_activations(quantizers)
    return has_ranges(quantizers) or calibration is not None


def _require_8_bit_activations(quantizers):
    for quantizer in quantizers:
        scheme = quantizer.activation_scheme
        if scheme is not None and scheme.bits != 8:
            raise ValueError(
                f"The activations of {quantizer.layer.name!r} were trained with {scheme}, and "
                'LiteRT has kernels for 8 bits. Train with activations="int8", or export with '
                'precision="dynamic".'
            )


def _check_options(io, batch_size, precision, integer):
    if io not in ("float", "integer"):
        raise ValueError(f'io={io!r} is not known; pass "float" or "integer".')
    if io == "integer" and not integer:
        raise ValueError(
            f'io="integer" needs activations in integers, which precision={precision!r} has not '
            'here. Pass precision="int8" with calibration=, or train with '
            "callbacks.QuantizationAwareTraining."
        )
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}; pass 1 or more, or None for any size.")


@contextlib.contextmanager
def _unrolled(model, wanted: bool) -> Iterator[None]:
    """Recurrent layers traced step by step.

    The converter dies of their loops at full int8, and cannot write them for any batch size.
    """
    layers = all_layers(model) if wanted else []
    rolled = [each for each in layers if isinstance(each, keras.layers.RNN) and not each.unroll]
    for layer in rolled:
        layer.unroll = True
    try:
        yield
    except ValueError as error:
        if "Cannot unroll" not in str(error):
            raise
        raise ExportError(
            "The model has recurrent layers over a sequence of any length, which LiteRT's "
            "converter cannot write with integer activations, nor with any batch size. Fix the "
            "length, as in keras.Input((steps, features)), or export with a batch_size= and "
            'precision="dynamic" or "float32".'
        ) from error
    finally:
        for layer in rolled:
            layer.unroll = False


def _write_calibration(program, calibration, directory, batch_size) -> str | None:
    if calibration is None:
        return None
    directory.mkdir()
    batches = limited(input_batches(calibration), CALIBRATION_EXAMPLES)
    for index, batch in enumerate(batches):
        np.savez(directory / f"{index:06d}.npz", **program.named(_of_size(batch, batch_size)))
    if not any(directory.iterdir()):
        raise ValueError("calibration= holds no batch; pass some hundred inputs.")
    return str(directory)


def _of_size(batch, size: int | None):
    """The batch, cut or repeated to a fixed size."""
    if size is None:
        return batch
    return keras.tree.map_structure(
        lambda x: np.resize(np.asarray(x), (size, *np.shape(x)[1:])), batch
    )


def _verification_batch(program, calibrated, verify_on, batch_size) -> dict[str, np.ndarray]:
    if verify_on is not None:
        return program.named(_of_size(first_batch(verify_on), batch_size))
    if calibrated is not None:
        with np.load(next(pathlib.Path(calibrated).iterdir())) as batch:
            return dict(batch)
    warnings.warn(
        "The exported file is verified on random input. Pass verify_on= a batch of real inputs to "
        "verify it on those.",
        stacklevel=4,
    )
    return program.random_batch(batch_size or 16)


def _finish(path: pathlib.Path, program: Program, precision: str, io: str):
    """What the converter cannot do: other grids than its own, and integers at the borders."""
    written = path.read_bytes()
    content = flatbuffer.ordered_inputs(written, [spec.name for spec in program.inputs])
    if precision in ("dynamic", "int8", "int4"):
        rows = [flatbuffer.rows_of(values, axes) for values, axes in program.weights()]
        in_4_bits = _ALL_IN_4_BITS if precision == "int4" else _FAST_IN_4_BITS
        content = flatbuffer.regrid(content, rows, in_4_bits)
    if io == "integer":
        try:
            content = flatbuffer.integer_borders(content)
        except ValueError as error:
            raise ExportError(
                f'io="integer" is not possible for {program.model.name!r}: {error}. Pass '
                'calibration= to give everything a range, or io="float".'
            ) from error
    if content is not written:
        path.write_bytes(content)


def _verify(program: Program, artefact: Artefact, batch, integer, calibrated) -> Artefact:
    file = artefacts.litert_flatbuffer(artefact.path)
    reason = verify.Reasons(calibrated, _left_out(program), program.model.name)
    left_in_float = verify.float_operators(file, reason) if integer else ()
    if left_in_float:
        shown = "; ".join(left_in_float[:_NAMED_IN_WARNING])
        rest = len(left_in_float) - _NAMED_IN_WARNING
        warnings.warn(
            f"These operators of the {artefact.precision} file compute in float: {shown}"
            + (f"; and {rest} more, see float_operators." if rest > 0 else "."),
            stacklevel=4,
        )
    runner = artefact.runner()
    actual = by_name(runner(batch), runner)
    expected = program.simulation()(batch)
    exact = integer and has_ranges(program.quantizers) and not left_in_float
    scales = {name: verify.output_scale(file, runner.outputs[name]["name"]) for name in expected}
    difference, steps = verify.compare(actual, expected, artefact.precision, scales, exact)
    return dataclasses.replace(
        artefact,
        max_abs_diff=difference,
        output_steps=steps,
        float_operators=left_in_float,
        latency_ms=verify.latency_ms(runner, batch, program.inputs[0].shape[0]),
    )


def _left_out(program: Program) -> frozenset[str]:
    """Names of layers with weights that have no quantizer, in a model that has some."""
    quantizers = [q for q in program.quantizers if q.layer is not program.model]
    covered = {id(each) for q in quantizers for each in all_layers(q.layer)}
    return frozenset(
        layer.name
        for layer in all_layers(program.model)
        if quantizers and id(layer) not in covered and layer.variables and not _holds_layers(layer)
    )


def _holds_layers(layer) -> bool:
    return len(all_layers(layer)) > 1
