"""One-shot pruning of a model that is not being trained."""

import logging

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.keras_hooks.walk import select_kernels
from tfcompress.ops.masks import apply_mask, choose_masks

logger = logging.getLogger("tfcompress")


def prune(
    model: keras.Model,
    sparsity=None,
    threshold=None,
    criterion="magnitude",
    structure="unstructured",
    allocation="uniform",
    include=None,
    exclude=None,
) -> keras.Model:
    """Prune a model once, in place.

    To hold the zeros while training goes on use `tfcompress.callbacks.Pruning`.

    Args:
        model: A built Keras model.
        sparsity: Fraction of zeros in [0, 1) for the kernels and embeddings.
        threshold: Instead of a sparsity: the smallest magnitude that is kept, above 0.
        criterion: Scores the weights: "magnitude", or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured".
        allocation: "uniform" (each weight) or "global" (all weights together).
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Returns:
        The same model.

    Raises:
        ValueError: Not exactly one of sparsity and threshold, a value out of range, an unknown
            name, a glob that matches nothing, or a model without kernels. The model is left as
            it was.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> kernel = prune(model, sparsity=0.5).layers[0].kernel
    >>> int((kernel.numpy() == 0).sum())
    10
    """
    if (sparsity is None) == (threshold is None):
        raise ValueError(
            f"Give either sparsity or threshold, got sparsity={sparsity} and "
            f"threshold={threshold}; e.g. sparsity=0.8."
        )
    selected, skipped = select_kernels(model, include, exclude)
    weights = [kernel.value for kernel in selected.values()]
    if threshold is not None:
        masks = _threshold_masks(weights, threshold)
    else:
        schedules.check_sparsity(schedules.Constant(sparsity))
        masks = choose_masks(weights, sparsity, criterion, structure, allocation)
    for kernel, mask in zip(selected.values(), masks, strict=True):
        kernel.assign(apply_mask(tf.convert_to_tensor(kernel), mask))
    logger.info("Pruned %s; skipped %s", list(selected), skipped)
    return model


def _threshold_masks(weights, threshold):
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}; e.g. 0.1.")
    return [tf.abs(weight) >= tf.cast(threshold, weight.dtype) for weight in weights]
