"""SparseGPT: one-shot pruning in which the weights that stay make up for those that go."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import rich.progress
import tensorflow as tf

from tfcompress.graph.inputs import (
    NOT_REACHED,
    LinearKernel,
    call_stages,
    linear_kernels,
    repeatable,
    second_moments,
)
from tfcompress.ops.allocation import num_kept
from tfcompress.ops.compensation import block_edges, compensate, inverse_factor

logger = logging.getLogger("tfcompress")

Group = tuple[int, int]  # The input features from start to stop.


def sparsegpt(
    model: keras.Model,
    sparsities: Mapping[str, float],
    calibration: Any,
    n_of_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    verbose: int = 1,
) -> dict[str, tf.Tensor]:
    """Prune kernels and reconstruct their layers' outputs on calibration data, in place.

    For a kernel `W` and the inputs `X` that reach it, weights are removed so as to change `X W`
    little, and the error of each removal is passed on to the weights of later input features, with
    the inverse of the damped Hessian `X^T X` (optimal brain surgery, an input feature at a time).
    Kernels are pruned in the order in which their layers run, each on the inputs that the layers
    already pruned give it.

    Cost: for every kernel, or set of kernels that get the same tensor (query, key and value), a
    pass over the data through the layers up to it, half a model on average; then about
    `d_in^3 + d_in^2 d_out` operations in float64. Memory beside the model: a batch in the model,
    a few matrices `(d_in, d_in)` and a copy of the kernels. Batches are streamed; those of an
    iterator, which can be read only once, are kept.

    Args:
        model: A built model of any kind.
        sparsities: Path of a Dense, EinsumDense or ungrouped Conv2D kernel -> fraction of zeros in
            [0, 1).
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator. The
            paper uses 128 sequences; more positions than a kernel has input features are best.
        n_of_m: `(2, 4)` keeps 2 of each 4 consecutive weights along the last contracted axis (the
            inputs of Dense, the input channels of Conv2D); the sparsities are 0.5 then.
        damping: Added to the diagonal of the Hessian, as a share of its mean; 0 or more.
        block_size: Input features for which unstructured masks are chosen together, 1 or more.
        verbose: Whether to show a progress bar.

    Returns:
        Path -> boolean mask of the kernel's shape; True keeps. Of the whole kernel exactly
        `max(round(size * (1 - sparsity)), 1)` weights are kept, or of each group of m exactly n (of
        a last one of r `max(round(r * n / m), 1)`).

    Raises:
        ValueError: An argument is out of range, a kernel cannot be captured or is not reached, or
            values are NaN or infinite. The model is left as it was.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(5, name="dense")]
    >>> model = keras.Sequential(layers, name="model")
    >>> data = np.random.default_rng(0).normal(size=(64, 4))
    >>> masks = sparsegpt(model, {"model/dense/kernel": 0.5}, data, verbose=0)
    >>> int((layers[1].kernel.numpy() == 0).sum())
    10

    Reference: Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774.
    """
    _check_arguments(sparsities, n_of_m, damping, block_size)
    kernels = _capturable(model, sparsities)
    calibration = repeatable(calibration)
    stages = call_stages(model, kernels, calibration)
    originals = {path: kernel.variable.numpy() for path, kernel in kernels.items()}
    masks: dict[str, tf.Tensor] = {}
    try:
        for stage in rich.progress.track(stages, "SparseGPT", disable=not verbose):
            moments = second_moments(model, stage.kernels, calibration, stage.last)
            for path, kernel in stage.kernels.items():
                _check_reached(path, moments)
                plan = _plan(kernel, sparsities[path], n_of_m, block_size)
                masks[path] = _prune_kernel(kernel, moments.pop(path), plan, damping)
    except BaseException:
        for path, original in originals.items():
            kernels[path].variable.assign(original)
        raise
    logger.info("SparseGPT pruned %s", list(masks))
    return {path: masks[path] for path in sparsities}


def reconstruct(
    weight: np.ndarray,
    moment: np.ndarray,
    blocks: Sequence[Sequence[Group]],
    choose: Callable[[np.ndarray, Group], np.ndarray],
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Prune a matrix, and adjust what is left so that `X @ weight` changes little.

    Args:
        weight: `(features in, features out)`.
        moment: `X^T X`, `(features in, features in)`.
        blocks: All input features, in order: groups whose mask is chosen at once, in blocks after
            which the errors are passed on to the features behind.
        choose: (scores of a group, group) -> boolean mask of the same shape.
        damping: As a share of the mean of the diagonal of `moment`.

    Returns:
        The new weight, float64, and the mask.

    Raises:
        ValueError: The damped moment is not positive definite.

    Example: of two inputs that are always equal, one takes over.

    >>> keep_last = lambda scores, group: np.array([[False], [True]])
    >>> new, _ = reconstruct(np.ones((2, 1)), np.ones((2, 2)), [[(0, 2)]], keep_last, damping=1e-9)
    >>> new.round(6).tolist()
    [[0.0], [2.0]]
    """
    factor = inverse_factor(moment, damping)
    spread = np.diag(factor)[:, None]
    stops = {start: stop for block in blocks for start, stop in block}
    mask = np.empty(weight.shape, bool)

    def replace(row, weight):
        if row in stops:
            group = slice(row, stops[row])
            mask[group] = choose(np.square(weight[group] / spread[group]), (row, stops[row]))
        return np.where(mask[row], weight[row], 0.0)

    edges = [0, *(block[-1][1] for block in blocks)]
    return compensate(weight, factor, edges, replace), mask


def _prune_kernel(kernel: LinearKernel, moment, plan, damping) -> tf.Tensor:
    weight, mask = reconstruct(
        kernel.to_matrix(kernel.variable.numpy()), moment, *plan, damping=damping
    )
    kernel.variable.assign(kernel.from_matrix(weight))
    return tf.constant(kernel.from_matrix(mask))


def _plan(kernel: LinearKernel, sparsity, n_of_m, block_size):
    """The blocks of a kernel's input features, and how masks are chosen."""
    if n_of_m is not None:
        depth = kernel.variable.shape[kernel.axes[-1]]
        return _n_of_m_plan(kernel.num_inputs, depth, n_of_m, block_size)
    size = int(np.prod(kernel.variable.shape))
    return _unstructured_plan(kernel.num_inputs, size, num_kept(size, sparsity), block_size)


def _unstructured_plan(num_inputs, size, kept, block_size):
    """Each block keeps its share; the shares add up to `kept`."""
    num_outputs = size // num_inputs
    edges = block_edges(num_inputs, block_size)

    def kept_before(edge):
        return (kept * edge * num_outputs + size // 2) // size

    def choose(scores, group):
        start, stop = group
        return largest(scores.reshape(-1), kept_before(stop) - kept_before(start)).reshape(
            scores.shape
        )

    return [[group] for group in itertools.pairwise(edges)], choose


def _n_of_m_plan(num_inputs, depth, n_of_m, block_size):
    """Groups of m within each run of `depth` features; a block is as many as fit, one at least."""
    n, m = n_of_m
    groups = [
        (run + start, run + min(start + m, depth))
        for run in range(0, num_inputs, depth)
        for start in range(0, depth, m)
    ]
    blocks: list[list[Group]] = [[]]
    for group in groups:
        if blocks[-1] and group[1] - blocks[-1][0][0] > block_size:
            blocks.append([])
        blocks[-1].append(group)

    def choose(scores, group):
        return largest(scores, max(round(len(scores) * n / m), 1))

    return blocks, choose


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest along the first axis; of equal scores the first are kept.

    Example:

    >>> largest(np.array([1.0, 3.0, 3.0]), 1).tolist()
    [False, True, False]
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[:count], True, axis=0)
    return mask


def _check_reached(path, moments):
    if path not in moments:
        raise ValueError(
            f"The inputs of {path!r} are not known: {NOT_REACHED}. Leave it out with exclude, or "
            "pass inputs that reach it."
        )


def _capturable(model, sparsities) -> dict[str, LinearKernel]:
    kernels, skipped = linear_kernels(model, list(sparsities))
    if skipped:
        raise ValueError(
            "SparseGPT takes kernels of Dense, EinsumDense and ungrouped Conv2D layers, not "
            f"{skipped}. Leave these out with exclude, or prune them with another criterion."
        )
    for path, kernel in kernels.items():
        if not np.isfinite(kernel.variable.numpy()).all():
            raise ValueError(f"{path!r} holds NaN or infinity: there is nothing to reconstruct.")
    return kernels


def _check_arguments(sparsities, n_of_m, damping, block_size):
    for path, sparsity in sparsities.items():
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"The sparsity of {path!r} must be a fraction of zeros in [0, 1), got {sparsity}."
            )
    if n_of_m is not None:
        _check_n_of_m(n_of_m, sparsities)
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping must be 0 or more, got {damping}; the paper uses 0.01.")
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}; the paper uses 128.")


def _check_n_of_m(n_of_m, sparsities):
    n, m = n_of_m
    if not 1 <= n < m:
        raise ValueError(f"n_of_m must have 1 <= n < m, got {n_of_m}; e.g. (2, 4).")
    for path, sparsity in sparsities.items():
        if abs(sparsity - (1 - n / m)) > 1e-6:
            raise ValueError(
                f"{n} of {m} is sparsity {1 - n / m:g}, but {sparsity} was given for {path!r}."
            )
