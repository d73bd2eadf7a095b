"""Finding the integers behind weights that lie on a grid."""

import numpy as np

# Of a step. Float32 rounding, also that of a folded batch norm, stays below a tenth of it.
_TOLERANCE = 1e-3
# 8 bits come first, being the usual; of the others the fewest, since their multiples fit as well.
_STEPS = (127, *(k for k in range(1, 256) if k != 127))
_SAMPLE = 64


def find_grid(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Integers, scales and zero points whose real values are `rows`, if there are any.

    A row lies on a grid when its values are multiples of its largest magnitude over a whole number
    of at most 255. Writing such a row as integers loses nothing, whatever scheme put it there and
    whatever factor a batch norm has multiplied it with since.

    Args:
        rows: Floats of shape `(channels, weights of one channel)`.

    Returns:
        `(integers, scales, zero_points)`: int8 like `rows`, float32 and int8 of shape `(channels,)`
        with `rows = scales * (integers - zero_points)`; None where a row lies on no such grid. A
        row of zeros has the scale 0.

    Example:

    >>> integers, scales, zero_points = find_grid(np.array([[0.5, -1.27, 0.0]]))
    >>> integers, scales.round(4), zero_points
    (array([[  50, -127,    0]], dtype=int8), array([0.01], dtype=float32), array([0], dtype=int8))
    >>> find_grid(np.random.default_rng(0).normal(size=(1, 100))) is None
    True
    """
    rows = np.asarray(rows, np.float64)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    whole = np.zeros(rows.shape, np.int32)
    scales = np.zeros(len(rows))
    open_rows = np.flatnonzero(largest)
    for steps in _STEPS:
        if not open_rows.size:
            break
        open_rows = _solve(rows, largest, steps, open_rows, whole, scales)
    low, high = whole.min(axis=1, initial=0), whole.max(axis=1, initial=0)
    if open_rows.size or np.any(high - low > 255):
        return None
    symmetric = (low >= -127) & (high <= 127)
    zero_points = np.where(symmetric, 0, -128 - low)
    return (
        (whole + zero_points[:, None]).astype(np.int8),
        scales.astype(np.float32),
        zero_points.astype(np.int8),
    )


def _solve(rows, largest, steps, open_rows, whole, scales) -> np.ndarray:
    """Fill in the open rows that have this many steps; returns those that stay open."""
    sample = rows[open_rows, :_SAMPLE]  # Most rows that fail do so in a few values.
    candidates = open_rows[_is_whole(sample * (steps / largest[open_rows])[:, None])]
    scaled = rows[candidates] * (steps / largest[candidates])[:, None]
    fits = _is_whole(scaled)
    solved = candidates[fits]
    whole[solved] = np.round(scaled[fits])
    scales[solved] = largest[solved] / steps
    return np.setdiff1d(open_rows, solved)


def _is_whole(scaled: np.ndarray) -> np.ndarray:
    return np.abs(scaled - np.round(scaled)).max(axis=1, initial=0.0) < _TOLERANCE
