"""Whether a file computes what the model computes."""

import dataclasses

import numpy as np

from tfcompress.artefact import Flatbuffer, Tensor

# What an error at its input becomes at the output of a function, at most.
_LIPSCHITZ = {"SOFTMAX": 0.5, "LOGISTIC": 0.25, "TANH": 1.0}
# Largest difference over the largest output.
_MAX_ERROR = {"float32": 1e-4, "float16": 1e-2}
# Root mean square of the difference over that of the output: rounding is far below, garbage above.
_RMS_ERROR = {"dynamic": 0.25, "int8": 0.5}


class ExportError(ValueError):
    """A file that could not be made, or that does not compute what its model computes."""


@dataclasses.dataclass(frozen=True)
class OutputScale:
    """How finely a file writes one output.

    Args:
        step: Its quantization step; None for a float output.
        slack: By how much it moves when the input of its last function moves by two steps.
    """

    step: float | None
    slack: float = 0.0

    @property
    def tolerance(self) -> float:
        """Two steps here (and an ulp), or two steps before the last function."""
        return 2.01 * self.step + self.slack


def output_scale(file: Flatbuffer, name: str) -> OutputScale:
    """Read the step of the output tensor `name` from a file."""
    maker = _maker(file, name)
    if maker is None or maker.name != "DEQUANTIZE":
        return OutputScale(None)
    quantized = maker.inputs[0]
    function = _maker(file, quantized.name)
    slack = 0.0
    if function is not None and function.name in _LIPSCHITZ:
        slack = 2 * _LIPSCHITZ[function.name] * _step(function.inputs[0])
    return OutputScale(_step(quantized), slack)


def float_operators(file: Flatbuffer) -> tuple[str, ...]:
    """The operators that compute in float, as `"GELU (model/activation/Gelu)"`.

    What converts at the border of the file does not count.
    """
    return tuple(
        # A fused operator lists everything that went into it.
        f"{operator.name} ({operator.outputs[0].name.split(';')[0]})"
        for operator in file.operators
        if operator.name not in ("QUANTIZE", "DEQUANTIZE")
        and any("float" in tensor.dtype for tensor in (*operator.inputs, *operator.outputs))
    )


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


def _maker(file: Flatbuffer, name: str):
    return next(
        (op for op in file.operators if any(tensor.name == name for tensor in op.outputs)), None
    )


def _step(tensor: Tensor) -> float:
    return float(tensor.scale[0]) if tensor.scale.size else 0.0
