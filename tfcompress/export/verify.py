"""Whether a file computes what the model computes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from tfcompress.artefact import Flatbuffer, Operator, Tensor
from tfcompress.timing import Timing, latency

# What an error at its input becomes at the output of a function, at most.
_LIPSCHITZ = {"SOFTMAX": 0.5, "LOGISTIC": 0.25, "TANH": 1.0}
# Largest difference over the largest output.
_MAX_ERROR = {"float32": 1e-4, "float16": 1e-2}
# Root mean square of the difference over that of the output: rounding is far below, garbage above.
_RMS_ERROR = {"dynamic": 0.25, "int8": 0.5, "int4": 0.5}
# What TensorFlow 2.21's converter leaves in float in a model of which it knows every range.
_NO_INTEGER_KERNEL = frozenset(
    ("COS", "CUMSUM", "ELU", "FLOOR", "NEG", "POW", "ROUND", "SIN", "SQUARE")
)


class ExportError(ValueError):
    """A file that could not be made, or that does not compute what its model computes."""


@dataclasses.dataclass(frozen=True)
class OutputScale:
    """How finely a file writes one output.

    Args:
        step: Its quantization step; None for a float output.
        slack: By how much it moves when the input of its last function moves by two steps.
        steps: How many steps are allowed.
    """

    step: float | None
    slack: float = 0.0
    steps: float = 2.0

    @property
    def tolerance(self) -> float:
        """That many steps here (and an ulp), or before the last function."""
        return (self.steps + 0.01) * self.step + self.slack * self.steps / 2


def latency_ms(runner: Callable, batch: Mapping[str, np.ndarray], size: int | None = None) -> float:
    """Median time of a call on one example, or on a batch of the file's fixed size, on one thread.

    Args:
        runner: Of the file.
        batch: Arrays by the names of its inputs.
        size: Examples that the file takes; None for any number.

    Returns:
        Milliseconds.
    """
    example = {name: array[: size or 1] for name, array in batch.items()}
    timed = latency({"file": functools.partial(runner, example)}, Timing(rounds=11))
    return timed["file"].median_ms


def output_scale(file: Flatbuffer, name: str) -> OutputScale:
    """Read the step of the output tensor `name` from a file."""
    quantized = _quantized(file, name)
    if quantized is None:
        return OutputScale(None)
    function = _maker(file, quantized.name)
    slack = 0.0
    if function is not None and function.name in _LIPSCHITZ:
        slack = 2 * _LIPSCHITZ[function.name] * _step(function.inputs[0])
    return OutputScale(_step(quantized), slack)


def graph_output_scale(tensor) -> OutputScale:
    """How finely a TensorFlow graph rounds the tensor `tensor` with its last fake quantization."""
    quantizer = _past_moves(tensor.op)
    if quantizer.type != "FakeQuantWithMinMaxVars":
        return OutputScale(None)
    function = _past_moves(quantizer.inputs[0].op)
    lipschitz = {"Softmax": 0.5, "Sigmoid": 0.25, "Tanh": 1.0}.get(function.type)
    before = None if lipschitz is None else _past_moves(function.inputs[0].op)
    slack = 0.0
    if before is not None and before.type == quantizer.type:
        slack = 2 * lipschitz * _graph_step(before)
    return OutputScale(_graph_step(quantizer), slack)


def _past_moves(operation):
    while operation.type in ("Identity", "Reshape", "Transpose", "Squeeze", "ExpandDims"):
        operation = operation.inputs[0].op
    return operation


def _graph_step(quantizer) -> float:
    low, high = (float(tf.get_static_value(tensor)) for tensor in quantizer.inputs[1:])
    return (high - low) / (2 ** quantizer.get_attr("num_bits") - 1)


@dataclasses.dataclass(frozen=True)
class Reasons:
    """Why an operator of an integer file computes in float.

    Args:
        calibrated: Whether the converter was shown every range.
        left_out: Names of the layers that were left out of the quantization.
        model: Name of the model.
    """

    calibrated: bool
    left_out: frozenset[str] = frozenset()
    model: str = ""

    def __call__(self, operator: Operator) -> str:
        """The reason, as a clause."""
        if self.calibrated or operator.name in _NO_INTEGER_KERNEL:
            return f"LiteRT has no integer kernel for {operator.name}"
        scopes = _path(operator).split("/")
        counter = scopes[0].removeprefix(self.model)  # TensorFlow numbers them alike.
        layer = next((name for name in self.left_out if name + counter in scopes), None)
        if layer is not None:
            return f"the layer {layer!r} was left out of the quantization"
        return "not all that it reads and writes has a range; calibration= gives it one"


def float_operators(file: Flatbuffer, reason: Callable[[Operator], str]) -> tuple[str, ...]:
    """The operators that compute in float, as `"SIN (model/sin/Sin): LiteRT has no ..."`.

    What converts at the border of the file does not count.
    """
    return tuple(
        f"{operator.name} ({_path(operator)}): {reason(operator)}"
        for operator in file.operators
        if operator.name not in ("QUANTIZE", "DEQUANTIZE")
        and any("float" in tensor.dtype for tensor in (*operator.inputs, *operator.outputs))
    )


def _path(operator: Operator) -> str:
    # A fused operator lists everything that went into it.
    return operator.outputs[0].name.split(";")[0]


def compare(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    precision: str,
    scales: Mapping[str, OutputScale],
    exact: bool,
) -> tuple[float, float | None]:
    """Check every output of a file.

    Args:
        actual: What the file computes, by output.
        expected: What the model computes.
        precision: What the file was exported as.
        scales: How finely each output is written.
        exact: Whether `expected` is the simulation of this very file; see `check_output`.

    Returns:
        The largest difference, and the same in steps, or None where no output has any.

    Raises:
        ExportError: One of them differs by more than the precision explains.
    """
    differences, steps = [0.0], []
    for name, value in expected.items():
        scale = scales[name]
        check_output(name, actual[name], value, precision, scale if exact else None)
        differences.append(float(np.max(np.abs(actual[name] - value.astype(np.float64)))))
        steps += [differences[-1] / scale.step] if scale.step else []
    return max(differences), max(steps, default=None)


def check_output(
    name: str, actual, expected, precision: str, scale: OutputScale | None = None
) -> None:
    """Compare one output of a file with that of the model.

    Args:
        name: Name of the output, for the message.
        actual: What the file computes.
        expected: What the model computes.
        precision: What the file was exported as.
        scale: Given when `expected` is the simulation of this very file: then all but 5% of the
            values must lie within two steps.

    Raises:
        ExportError: They differ by more than the precision explains.

    Example:

    >>> check_output("logits", np.ones(3), np.ones(3), "float32")
    >>> check_output("logits", np.ones(3), np.zeros(3), "float32")
    Traceback (most recent call last):
    ...
    tfcompress.export.verify.ExportError: The exported file does not compute ...
    """
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    if not np.all(np.isfinite(difference)):
        raise ExportError(_message(name, precision, "it gives values that are not finite"))
    if scale is not None and scale.step is not None:
        beyond = float(np.mean(difference > scale.tolerance))
        if beyond > 0.05:
            steps = difference.max() / scale.step
            reason = f"{beyond:.1%} of the values differ by up to {steps:.1f} steps"
            raise ExportError(_message(name, precision, reason))
        return
    error, allowed = _relative_error(difference, np.abs(expected), precision)
    if error > allowed:
        reason = f"the relative error is {error:.3g}, expected at most {allowed:.3g}"
        raise ExportError(_message(name, precision, reason))


def _relative_error(difference, magnitude, precision):
    if precision in _MAX_ERROR:
        return difference.max() / max(magnitude.max(), 1e-3), _MAX_ERROR[precision]
    rms = np.sqrt(np.mean(np.square(difference))) / max(np.sqrt(np.mean(magnitude**2)), 1e-6)
    return rms, _RMS_ERROR[precision]


def _message(name, precision, reason):
    remedy = {
        "int8": "Pass verify_on= and calibration= batches of real, preprocessed inputs; or train "
        'with callbacks.QuantizationAwareTraining; or export with precision="dynamic".',
        "dynamic": 'Export with precision="float16" or "float32".',
    }.get(precision, "Please report this model: no such difference is expected.")
    return (
        f"The exported file does not compute what the model computes, and was removed: for output "
        f"{name!r} at precision={precision!r}, {reason}. {remedy}"
    )


def _quantized(file: Flatbuffer, name: str) -> Tensor | None:
    """The integers behind an output: itself, or what is dequantized at the border."""
    maker = _maker(file, name)
    if maker is not None and maker.name == "DEQUANTIZE":
        return maker.inputs[0]
    output = next((tensor for tensor in file.outputs if tensor.name == name), None)
    return output if output is not None and output.scale.size else None


def _maker(file: Flatbuffer, name: str):
    return next(
        (op for op in file.operators if any(tensor.name == name for tensor in op.outputs)), None
    )


def _step(tensor: Tensor) -> float:
    return float(tensor.scale[0]) if tensor.scale.size else 0.0
