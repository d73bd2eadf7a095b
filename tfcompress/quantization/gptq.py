"""GPTQ: weights are rounded in order, and those not rounded yet make up for the errors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tfcompress.graph.inputs import (
    NOT_REACHED,
    LinearKernel,
    call_stages,
    linear_kernels,
    second_moments,
)
from tfcompress.keras_hooks.quantizer import QuantizedWeight
from tfcompress.ops.compensation import block_edges, compensate, inverse_factor
from tfcompress.values import Value


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class GPTQ(Value):
    """How `round_weights` rounds with GPTQ.

    Args:
        damping: Added to the diagonal of the Hessian, as a share of its mean; 0 or more.
        block_size: Input features after which errors are passed on beyond the block; 1 or more.
            Saves time, changes nothing.
        act_order: Whether to round the input features of the largest second moment first, while
            all others can still make up for them. Scales stay with their features.

    Raises:
        ValueError: A value is out of range.

    Example:

    >>> GPTQ(act_order=True).damping
    0.01
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False

    def __post_init__(self):
        if not 0 <= self.damping < np.inf:
            raise ValueError(
                f"GPTQ has damping={self.damping!r}; pass 0 or more; the paper uses 0.01."
            )
        if self.block_size < 1:
            raise ValueError(
                f"GPTQ has block_size={self.block_size!r}; pass 1 or more; the paper uses 128."
            )


def gptq(
    w: np.ndarray,
    moment: np.ndarray,
    scale: np.ndarray,
    limits: tuple[int, int],
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    keep_zeros: bool = True,
) -> np.ndarray:
    """Round a matrix to a symmetric grid, so that `X @ w` changes little.

    Rows (input features) are rounded to nearest in order; the error of each is passed on to the
    rows behind it with the inverse of the damped Hessian `X^T X`, for all outputs at once. Float64.

    `keras.quantizers.GPTQConfig` is Keras's own, for the Dense and EinsumDense layers of a
    transformer that is described to it, calibrated on token sequences. It (3.15) passes errors on
    with the inverse Hessian itself, not its factor, and so loses part of the gain.

    Args:
        w: `(features in, features out)`.
        moment: `X^T X`, `(features in, features in)`.
        scale: Positive, broadcastable to `w`; it may vary by group of rows.
        limits: The smallest and largest integer of the grid.
        damping: Added to the diagonal of `moment`, as a share of its mean; 0 or more.
        block_size: Rows after which errors are passed on beyond the block.
        act_order: Whether to round rows in the order of their diagonal of `moment`, largest first.
        keep_zeros: Whether weights that are exactly 0 (pruned ones) stay 0.

    Returns:
        Float64, like `w`: whole numbers within `limits`, times `scale`.

    Raises:
        ValueError: The damped moment is not positive definite.

    Example: two inputs that are always equal; 0.4 + 0.4 is nearer to 1 + 0 than to 0 + 0.

    >>> w, moment = np.array([[0.4], [0.4]]), np.ones((2, 2))
    >>> gptq(w, moment, np.ones((1, 1)), (-7, 7)).tolist()
    [[0.0], [1.0]]

    Reference: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
    """
    order = np.argsort(-np.diag(moment), kind="stable") if act_order else np.arange(len(w))
    scale = np.broadcast_to(scale, w.shape).astype(np.float64)[order]
    fixed = (w == 0)[order] & keep_zeros

    def replace(row, weight):
        steps = np.clip(np.round(weight[row] / scale[row]), *limits)
        return np.where(fixed[row], 0.0, steps * scale[row])

    factor = inverse_factor(moment[np.ix_(order, order)], damping)
    rounded = compensate(w[order], factor, block_edges(len(w), block_size), replace)
    return rounded[np.argsort(order)]


def round_kernels(
    model: keras.Model,
    weights: Mapping[str, QuantizedWeight],
    calibration: Any,
    settings: GPTQ,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, str]]:
    """Round the kernels of a quantized model by GPTQ, in place, in the order in which they run.

    Each on the inputs that the rounded layers before it give it. A pass over the data for each
    stage of `tfcompress.graph.inputs.call_stages`.

    Args:
        model: Holds `weights`, float, with fixed scales.
        weights: Path in the model -> weight.
        calibration: Inputs as the model gets them, that can be read many times.
        settings: How.
        advance: Told how many weights were dealt with.

    Returns:
        Path -> squared error of the layer's output, as a share of that of rounding to nearest, on
        `calibration`; and path -> reason for every weight that was left alone.
    """
    kernels, skipped = linear_kernels(model, list(weights))
    advance(len(skipped))
    errors: dict[str, float] = {}
    for stage in call_stages(model, kernels, calibration) if kernels else ():
        moments = second_moments(model, stage.kernels, calibration, stage.last)
        for path, kernel in stage.kernels.items():
            if path in moments:
                errors[path] = _round_kernel(kernel, weights[path], moments[path], settings)
            else:
                skipped[path] = NOT_REACHED
        advance(len(stage.kernels))
    return errors, skipped


def _round_kernel(kernel: LinearKernel, weight: QuantizedWeight, moment, settings) -> float:
    scale = np.broadcast_to(weight.grid()[0], kernel.variable.shape)
    before = kernel.to_matrix(kernel.variable.numpy().astype(np.float64))
    nearest = kernel.to_matrix(np.asarray(weight.quantize(kernel.variable.value), np.float64))
    rounded = gptq(
        before, moment, kernel.to_matrix(scale), weight.scheme.limits, **settings.get_config()
    )
    kernel.variable.assign(kernel.from_matrix(rounded))
    energies = [_energy(each - before, moment) for each in (rounded, nearest)]
    return energies[0] / energies[1] if energies[1] else 1.0


def _energy(matrix, moment) -> float:
    """`||X matrix||^2`."""
    return float(np.sum(matrix * (moment @ matrix)))
