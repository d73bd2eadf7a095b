"""Kernels as products of smaller ones: what each rank loses, and the factors; NumPy in float64.

Errors are those of the layer's output. With the second moment `G = X^T X` of the inputs `X`, an
error `E` of the kernel costs `||X E||^2 = tr(E^T G E)`; without one, `||E||^2`. The best product of
a rank is then a truncated singular value decomposition of the whitened kernel `L^T W`, where
`G = L L^T`: Eckart & Young 1936; SVD-LLM, Wang et al. 2024, https://arxiv.org/abs/2403.07378.
"""

from __future__ import annotations

import itertools

import numpy as np
import tensorflow as tf

# Share of the energy that the rounding of float32 weights may make up.
ROUNDING = 1e-12

# Alternations after which the error of a Tucker decomposition has settled.
_SWEEPS = 5


class Svd:
    """A kernel as two: from all inputs to `rank` features, and from these to the outputs.

    Args:
        kernel: `(..., outputs)`; the axes before the last are those of the inputs.
        moment: `(inputs, inputs)`, positive definite; `(inputs,)` if it is diagonal; None for none.

    Attributes:
        ranks: `(candidates, 1)`, integers.
        errors: `(candidates,)`: the share of the energy that each loses, in [0, 1].

    Example:

    >>> Svd(np.diag([2.0, 1.0])).errors.tolist()
    [0.2, 0.0]
    """

    def __init__(self, kernel: np.ndarray, moment: np.ndarray | None = None):
        self._shape = kernel.shape
        matrix = kernel.reshape(-1, kernel.shape[-1])
        energies, self._left, self._right = _decomposed(matrix, moment)
        self.ranks = np.arange(1, len(energies) + 1)[:, None]
        # Summed from the end, the small ones count.
        tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        self.errors = _share(tails[1:], tails[0])

    @staticmethod
    def sizes(shape: tuple[int, ...], ranks: np.ndarray) -> np.ndarray:
        """The weights in each factor of a kernel of that shape: `(candidates, 2)`."""
        return ranks * np.array([np.prod(shape[:-1]), shape[-1]], dtype=np.int64)

    def factors(self, rank: int) -> list[np.ndarray]:
        """`(..., rank)` and `(rank, outputs)`."""
        left = self._left[:, :rank].reshape(*self._shape[:-1], rank)
        return _balanced([left, self._right[:rank]])


class Spatial:
    """A convolution as two: `(height, 1)` to `rank` channels, then `(1, width)` to the outputs.

    The first is truncated by the moment of a column of its inputs, averaged over the columns of the
    patch; the second is the best one behind it.

    Args:
        kernel: `(height, width, channels in, channels out)`.
        moment: Of the patches, `(height * width * channels in,) * 2`, positive definite; or None.

    Attributes:
        ranks: `(candidates, 1)`, those that make the kernel smaller, and 1.
        errors: As of `Svd`.

    Example:

    >>> edges = np.outer([1.0, 2.0, 1.0], [1.0, 0.0, -1.0])[:, :, None, None]
    >>> [factor.shape for factor in Spatial(edges).factors(1)]
    [(3, 1, 1, 1), (1, 3, 1, 1)]

    Reference: Jaderberg et al. 2014, https://arxiv.org/abs/1405.3866.
    """

    def __init__(self, kernel: np.ndarray, moment: np.ndarray | None = None):
        self._shape = height, width, inputs, outputs = kernel.shape
        slices = _Slices(kernel, moment, kept=(1,))
        most = (kernel.size - 1) // (height * inputs + width * outputs)
        self._left = slices.basis()[:, : max(most, 1)]
        self._fit = slices.fit(self._left)
        gains = np.square(self._fit.parts).reshape(self._left.shape[1], -1).sum(axis=1)
        self.ranks = np.arange(1, len(gains) + 1)[:, None]
        self.errors = _share(slices.energy - np.cumsum(gains), slices.energy)

    @staticmethod
    def sizes(shape: tuple[int, ...], ranks: np.ndarray) -> np.ndarray:
        """The weights in each factor of a kernel of that shape: `(candidates, 2)`."""
        height, width, inputs, outputs = shape
        return ranks * [height * inputs, width * outputs]

    def factors(self, rank: int) -> list[np.ndarray]:
        """`(height, 1, channels in, rank)` and `(1, width, rank, channels out)`."""
        height, width, inputs, outputs = self._shape
        left = self._left[:, :rank].reshape(height, 1, inputs, rank)
        right = self._fit.coefficients(rank * width).reshape(rank, 1, width, outputs)
        return _balanced([left, right.transpose(1, 2, 0, 3)])


class Tucker:
    """A convolution as three: 1x1 to `ranks[0]` channels, the taps to `ranks[1]`, 1x1 to all.

    A truncated higher-order SVD, then alternations (HOOI). The first kernel is truncated by the
    moment of the channels, averaged over the taps; the other two are the best ones behind it.

    Args:
        kernel: `(height, width, channels in, channels out)`.
        moment: Of the patches, `(height * width * channels in,) * 2`, positive definite; or None.

    Attributes:
        ranks: `(candidates, 2)`: for some ranks of the inputs every one of the outputs.
        errors: As of `Svd`, before the alternations.

    Example:

    >>> kernel = np.einsum("ij,c,o->ijco", np.eye(3), np.ones(4), np.ones(5))
    >>> [factor.shape for factor in Tucker(kernel).factors(1, 1)]
    [(1, 1, 4, 1), (3, 3, 1, 1), (1, 1, 1, 5)]

    Reference: Kim et al. 2016, https://arxiv.org/abs/1511.06530.
    """

    def __init__(self, kernel: np.ndarray, moment: np.ndarray | None = None):
        self._shape = kernel.shape
        self._slices = _Slices(kernel, moment, kept=(0, 1))
        self._left = self._slices.basis()
        self._fit = self._slices.fit(self._left)
        self.ranks, self.errors = self._candidates()

    @staticmethod
    def sizes(shape: tuple[int, ...], ranks: np.ndarray) -> np.ndarray:
        """The weights in each factor of a kernel of that shape: `(candidates, 3)`."""
        height, width, inputs, outputs = shape
        first, second = ranks.T
        return np.stack([inputs * first, height * width * first * second, second * outputs], 1)

    def factors(self, first: int, second: int) -> list[np.ndarray]:
        """`(1, 1, in, first)`, `(height, width, first, second)` and `(1, 1, second, out)`."""
        left, fit = self._left[:, :first], self._fit
        best = np.inf
        for _ in range(_SWEEPS):
            parts = fit.parts[: first * self._num_taps]
            gains, right = _eigen(parts.T @ parts, second)
            error = self._slices.energy - gains.sum()
            # With a moment, the basis is not the best one, and an alternation may lose.
            if not error < best * (1 - 1e-6):
                break
            best, found = error, (left, fit, right)
            left = self._slices.basis(right)[:, :first]
            fit = self._slices.fit(left)
        left, fit, right = found
        core = fit.coefficients(first * self._num_taps) @ right
        core = core.reshape(first, *self._shape[:2], second).transpose(1, 2, 0, 3)
        return _balanced([left[None, None], core, right.T[None, None]])

    @property
    def _num_taps(self) -> int:
        return self._shape[0] * self._shape[1]

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        energy, parts = self._slices.energy, self._fit.parts
        by_input = np.square(parts).reshape(self._left.shape[1], -1).sum(axis=1)
        ranks, errors = [], []
        gram, done = np.zeros((parts.shape[1],) * 2), 0
        for first in _grid(_share(energy - np.cumsum(by_input), energy)):
            added = parts[done * self._num_taps : first * self._num_taps]
            gram, done = gram + added.T @ added, first
            most = min(first * self._num_taps, len(gram))
            gains = np.maximum(np.linalg.eigvalsh(gram)[::-1][:most], 0.0)
            ranks += [(first, second) for second in range(1, most + 1)]
            errors.append(_share(energy - np.cumsum(gains), energy))
        return np.array(ranks), np.concatenate(errors)


METHODS = {"svd": Svd, "spatial": Spatial, "tucker": Tucker}


def damped(moment: np.ndarray, damping: float) -> np.ndarray:
    """A moment that is positive definite: a share of the mean is added to its diagonal.

    Args:
        moment: `X^T X`.
        damping: Above 0.

    Example:

    >>> damped(np.ones((2, 2)), 0.5).tolist()
    [[1.5, 1.0], [1.0, 1.5]]
    """
    mean = np.diag(moment).mean() or 1.0
    result = moment.copy()
    result[np.diag_indices_from(result)] += damping * mean
    return result


class _Slices:
    """A kernel and its moment by the taps that a first factor keeps, and what it contracts.

    The first factor is the same for each of the kept taps, and makes `rank` features of each.
    """

    def __init__(self, kernel: np.ndarray, moment: np.ndarray | None, kept: tuple[int, ...]):
        order = [*kept, *(axis for axis in range(3) if axis not in kept)]
        num_kept = int(np.prod([kernel.shape[axis] for axis in kept]))
        shape = (num_kept, -1, kernel.shape[-1])
        self._kernel = kernel.transpose(*order, 3).reshape(shape)
        if moment is None:
            self._moment, self._seen = None, self._kernel
        else:
            seen = (moment @ kernel.reshape(len(moment), -1)).reshape(kernel.shape)
            self._seen = seen.transpose(*order, 3).reshape(shape)
            contracted = self._kernel.shape[1]
            self._moment = (
                moment.reshape(kernel.shape[:3] * 2)
                .transpose(*order, *(axis + 3 for axis in order))
                .reshape(num_kept, contracted, num_kept, contracted)
            )
        self.energy = float(np.sum(self._kernel * self._seen))

    def basis(self, right: np.ndarray | None = None) -> np.ndarray:
        """First factors of all ranks, `(contracted, rank)`: the leading columns are the best ones.

        Args:
            right: `(outputs, rank)`: the outputs that matter; None for all.
        """
        kernel = self._kernel if right is None else self._kernel @ right
        unfolded = kernel.transpose(1, 0, 2).reshape(kernel.shape[1], -1)
        lower = None
        if self._moment is not None:
            lower = np.linalg.cholesky(np.einsum("acad->cd", self._moment))
            unfolded = lower.T @ unfolded
        _, basis = _eigen(unfolded @ unfolded.T)
        return basis if lower is None else _solve(lower, basis, adjoint=True)

    def fit(self, left: np.ndarray) -> _Regression:
        """The kernel as a function of what a basis leaves of its inputs."""
        cross = np.einsum("aco,cr->rao", self._seen, left, optimize=True)
        cross = cross.reshape(-1, cross.shape[-1])
        if self._moment is None:
            return _Regression(cross)
        gram = np.einsum("acbd,cr,ds->rasb", self._moment, left, left, optimize=True)
        return _Regression(cross, np.linalg.cholesky(gram.reshape(len(cross), len(cross))))


class _Regression:
    """Least squares on features `Z`, for all leading ones at once.

    Args:
        cross: `Z^T Y`.
        lower: The Cholesky factor of `Z^T Z`; None where that is the identity.

    Attributes:
        parts: `(features, outputs)`: `Y` in the orthonormal basis of the features, one by one. What
            the first n explain is the sum of the squares of n rows.
    """

    def __init__(self, cross: np.ndarray, lower: np.ndarray | None = None):
        self._lower = lower
        self.parts = cross if lower is None else _solve(lower, cross)

    def coefficients(self, num_features: int) -> np.ndarray:
        """Of the first features, `(num_features, outputs)`."""
        parts = self.parts[:num_features]
        if self._lower is None:
            return parts
        return _solve(self._lower[:num_features, :num_features], parts, adjoint=True)


def _decomposed(matrix: np.ndarray, moment: np.ndarray | None):
    """`(energies, left, right)`, descending: `left @ right` is the matrix.

    The leading ones are the best product of that rank. The eigenvectors of the smaller side give
    them: `W v` and `v^T` for those of `W^T G W`, `L^-T u` and `u^T L^T W` for those of
    `L^T W W^T L`.
    """
    rows, columns = matrix.shape
    if columns <= rows:
        energies, right = _eigen(matrix.T @ _times(moment, matrix))
        return energies, matrix @ right, right.T
    if moment is None:
        energies, left = _eigen(matrix @ matrix.T)
        return energies, left, left.T @ matrix
    lower = np.linalg.cholesky(moment if moment.ndim == 2 else np.diag(moment))
    whitened = lower.T @ matrix
    energies, left = _eigen(whitened @ whitened.T)
    return energies, _solve(lower, left, adjoint=True), left.T @ whitened


def _times(moment: np.ndarray | None, matrix: np.ndarray) -> np.ndarray:
    if moment is None:
        return matrix
    return moment @ matrix if moment.ndim == 2 else moment[:, None] * matrix


def _eigen(symmetric: np.ndarray, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues, none below 0, and their vectors."""
    values, vectors = np.linalg.eigh(symmetric)
    return np.maximum(values[::-1][:number], 0.0), vectors[:, ::-1][:, :number]


def _solve(lower: np.ndarray, right: np.ndarray, adjoint: bool = False) -> np.ndarray:
    return tf.linalg.triangular_solve(lower, right, lower=True, adjoint=adjoint).numpy()


def _share(energies: np.ndarray, total: float) -> np.ndarray:
    """Shares of the total in [0, 1]; a kernel without energy loses none."""
    return np.clip(energies / total, 0.0, 1.0) if total > 0 else np.zeros_like(energies)


def _grid(errors: np.ndarray) -> list[int]:
    """Some of the ranks from 1 to `len(errors)`: evenly spaced, and by what they lose."""
    even = np.linspace(1, len(errors), 12).round().astype(int)
    by_energy = [
        1 + np.argmax(errors <= level)
        for level in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, ROUNDING)
        if errors[-1] <= level
    ]
    return sorted({int(rank) for rank in (*even, *by_energy)})


def _balanced(kernels: list[np.ndarray]) -> list[np.ndarray]:
    """The same product, with equal norms on both sides of each inner feature, as training likes.

    Khodak et al. 2021, https://arxiv.org/abs/2105.01029, call it spectral initialization.
    """
    kernels = list(kernels)
    for i, j in itertools.pairwise(range(len(kernels))):
        made = np.sqrt(np.square(kernels[i]).reshape(-1, kernels[i].shape[-1]).sum(axis=0))
        read = np.sqrt(np.square(np.moveaxis(kernels[j], -2, 0)).reshape(len(made), -1).sum(axis=1))
        usable = (made > 0) & (read > 0)
        factor = np.sqrt(np.divide(read, made, where=usable, out=np.ones_like(made)))
        factor = np.where(usable, factor, 1.0)
        kernels[i] = kernels[i] * factor
        kernels[j] = kernels[j] / factor[:, None]
    return kernels
