"""Optimal brain surgery on a matrix: rows are replaced, and the rows behind make up for it.

NumPy in float64, on the host: SparseGPT and GPTQ work on one kernel at a time, between training
steps.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

# The variance of an input that is always 0, as a share of the mean: it ranks below all others.
_DEAD = 1e-30


def inverse_factor(moment: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """The upper triangular `U` with `U^T U` the inverse of the damped moment.

    `1 / U[j, j]^2` is the variance of feature j that the features behind it do not explain.

    Args:
        moment: `X^T X`, `(features, features)`.
        damping: Added to the diagonal, as a share of its mean; 0 or more.

    Returns:
        A float64 array like `moment`.

    Raises:
        ValueError: The damped moment is not positive definite.

    Example:

    >>> inverse_factor(np.diag([4.0, 16.0]), damping=0.0).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    diagonal = np.diag(moment)
    mean = diagonal.mean() or 1.0
    added = np.where(diagonal > 0, damping * mean, _DEAD * mean)
    # Reversed, the lower factor of the moment itself gives the upper one of its inverse.
    try:
        lower = np.linalg.cholesky((moment + np.diag(added))[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"The second moment of the inputs is singular with damping={damping}: there are fewer "
            "calibration examples than input features, or features depend on each other. Pass "
            "damping=0.01 or more examples."
        ) from error
    inverse = tf.linalg.triangular_solve(lower, np.eye(len(lower)), lower=True).numpy()
    return np.ascontiguousarray(inverse[::-1, ::-1])


def compensate(
    weight: np.ndarray,
    factor: np.ndarray,
    edges: Sequence[int],
    replace: Callable[[int, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Replace the rows of a matrix in order, so that `X @ weight` changes little.

    What a row changes is passed on to the rows behind it, with the inverse of the Hessian of the
    rows that are left (optimal brain surgery, an input feature at a time).

    Args:
        weight: `(features in, features out)`.
        factor: From `inverse_factor`.
        edges: Where blocks begin, and the number of features: 0, ..., features in. Rows get the
            changes of earlier blocks once for each block, which saves time and changes nothing.
        replace: (row, the weight so far) -> the new row. The rows of the block are up to date.

    Returns:
        The new weight, float64.

    Example: of two inputs that are always equal, one takes over.

    >>> factor = inverse_factor(np.ones((2, 2)), damping=1e-9)
    >>> keep = [0.0, 1.0]
    >>> compensate(np.ones((2, 1)), factor, [0, 2], lambda j, w: keep[j] * w[j]).round(6).tolist()
    [[0.0], [2.0]]

    Reference: Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580.
    """
    weight = weight.astype(np.float64)
    for first, last in itertools.pairwise(edges):
        errors = np.empty((last - first, weight.shape[1]))
        for row in range(first, last):
            new = replace(row, weight)
            error = (weight[row] - new) / factor[row, row]
            weight[row] = new
            weight[row + 1 : last] -= np.outer(factor[row, row + 1 : last], error)
            errors[row - first] = error
        weight[last:] -= factor[first:last, last:].T @ errors
    return weight


def block_edges(num_features: int, block_size: int) -> list[int]:
    """Edges of blocks of `block_size` features, the last one smaller.

    Example:

    >>> block_edges(5, 2)
    [0, 2, 4, 5]
    """
    return [*range(0, num_features, block_size), num_features]
