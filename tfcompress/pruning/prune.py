"""One-shot pruning of a model that is not being trained."""

import logging

import keras
import tensorflow as tf

from tfcompress.checks import check_one_of, check_sparsity, check_threshold
from tfcompress.graph.inputs import input_norms, linear_kernels
from tfcompress.graph.roles import Prunable, check_coupled, prunable, select
from tfcompress.keras_hooks.walk import group_by_glob
from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures
from tfcompress.ops.masks import Units, apply_mask, threshold_mask
from tfcompress.pruning.sparsegpt import sparsegpt

logger = logging.getLogger("tfcompress")

Masks = dict[str, tf.Tensor]


def prune(
    model: keras.Model,
    sparsity=None,
    threshold=None,
    criterion="magnitude",
    structure="unstructured",
    allocation="uniform",
    calibration=None,
    include=None,
    exclude=None,
) -> keras.Model:
    """Prune a model once, in place.

    To hold the zeros while training goes on use `tfcompress.callbacks.Pruning`.

    Args:
        model: A built Keras model.
        sparsity: Fraction of zeros in [0, 1) for the kernels and embeddings, or {glob: fraction};
            the first glob that matches a path counts. None where the structure says it (n:m).
        threshold: Instead of a sparsity: the smallest magnitude that is kept, above 0.
        criterion: Scores the weights: "magnitude", "random", "batch_norm", "wanda", "sparsegpt", an
            object of `tfcompress.criteria`, or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured", "2:4" (any n:m), "channel", "head", or
            an object of `tfcompress.structures`. "sparsegpt" knows the first two.
        allocation: How the sparsity is shared out: "uniform" (each weight), "global" (all weights
            of one glob together), "erk", "lamp". For "sparsegpt", magnitudes decide.
        calibration: Inputs for "wanda" and "sparsegpt": arrays, a `tf.data.Dataset` or a generator,
            some hundred examples.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Returns:
        The same model.

    Raises:
        ValueError: Not exactly one of sparsity and threshold, a value out of range, an unknown
            name, a glob that matches nothing, a model without kernels, or calibration data missing
            or not needed. The model is left as it was.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> kernel = prune(model, sparsity=0.5).layers[0].kernel
    >>> int((kernel.numpy() == 0).sum())
    10
    """
    criterion, structure = criteria.get(criterion), structures.get(structure)
    check_one_of(structure.sparsity if sparsity is None else sparsity, threshold)
    _check_calibration(criterion, calibration)
    reads = criteria.reads(criterion)
    check_coupled(
        structure,
        sparsity=sparsity,
        threshold=threshold,
        criterion=None if reads in ("weights", "index") else reads,
        include=include,
        exclude=exclude,
    )
    selected, skipped = select(model, structure, include, exclude)
    if threshold is not None:
        check_threshold(threshold)
        masks = {path: threshold_mask(w.value, threshold) for path, w in selected.items()}
    else:
        sparsities = _final_values(check_sparsity(sparsity, structure))
        chosen = prunable(model, selected, structure, criterion)
        task = _Task(chosen, structure, allocations.get(allocation), sparsities)
        masks, unreached = task.masks(model, criterion, calibration)
        skipped = skipped | chosen.skipped | unreached
    for path, mask in masks.items():
        selected[path].assign(apply_mask(tf.convert_to_tensor(selected[path]), mask))
    logger.info("Pruned %s; skipped %s", list(masks), skipped)
    return model


class _Task:
    """Masks for what is prunable, one group of weights a glob."""

    def __init__(self, chosen: Prunable, structure, allocation, sparsities):
        self.chosen = chosen
        self.structure = structure
        self.allocation = allocation
        self.sparsities = sparsities

    def masks(self, model, criterion, calibration) -> tuple[Masks, dict[str, str]]:
        """Path -> mask, and path -> reason for what could not be scored."""
        if criteria.reads(criterion) == "reconstruction":
            return self._reconstructed(model, criterion, calibration)
        if criteria.reads(criterion) == "inputs":
            norms, skipped = input_norms(model, list(self.chosen.weights), calibration)
            return self._chosen(criterion, norms), skipped
        return self._chosen(criterion, self.chosen.statistics(criterion)), {}

    def _chosen(self, criterion, statistics) -> Masks:
        masks: Masks = {}
        for glob, paths in group_by_glob(self.sparsities, statistics).items():
            kernels = {path: self.chosen.weights[path] for path in paths}
            units, _ = Units.cut(self.structure, {path: w.shape for path, w in kernels.items()})
            read = [statistics[path] for path in paths]
            weights, sparsity = list(kernels.values()), self.sparsities[glob]
            found = units.masks(weights, criterion, read, sparsity, self.allocation)
            masks.update(zip(paths, found, strict=True))
        return masks

    def _reconstructed(self, model, criterion, calibration) -> tuple[Masks, dict[str, str]]:
        n_of_m = None
        if isinstance(self.structure, structures.NofM):
            n_of_m = (self.structure.n, self.structure.m)
        elif not isinstance(self.structure, structures.Unstructured):
            raise ValueError(
                f"sparsegpt prunes single weights or n:m, got structure={self.structure}. Use "
                'criterion="wanda" or "magnitude" for it.'
            )
        kernels, skipped = linear_kernels(model, list(self.chosen.weights))
        if n_of_m is None:
            sparsities = self._by_magnitude(kernels)
        else:
            sparsities = dict.fromkeys(kernels, self.structure.sparsity)
        settings = {"damping": criterion.damping, "block_size": criterion.block_size}
        return sparsegpt(model, sparsities, calibration, n_of_m, **settings), skipped

    def _by_magnitude(self, kernels) -> dict[str, float]:
        """What the allocation gives each kernel, by its magnitudes."""
        masks = self._chosen(criteria.magnitude, dict.fromkeys(kernels))
        return {
            path: 1.0 - float(tf.reduce_mean(tf.cast(mask, tf.float64)))
            for path, mask in masks.items()
        }


def _final_values(schedules_by_glob) -> dict[str | None, float]:
    return {
        glob: schedule(schedule.end_step or schedule.begin_step)
        for glob, schedule in schedules_by_glob.items()
    }


def _check_calibration(criterion, calibration):
    available = ("weights", "index", "batch_norm", "inputs", "reconstruction")
    criteria.require(criterion, "tfcompress.prune", *available)
    needed = criteria.reads(criterion) in ("inputs", "reconstruction")
    if needed == (calibration is None):
        problem = "needs calibration data" if needed else "reads no calibration data"
        raise ValueError(
            f"The criterion {criterion} {problem}, got calibration="
            f"{'None' if needed else type(calibration).__name__}. "
            + ("Pass some hundred inputs." if needed else "Leave it out.")
        )
