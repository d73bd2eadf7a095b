"""The share of examples that a classifier gets right."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from tfcompress.measure.forward import as_arrays, forward

_BATCH = 256


def accuracy(item: Any, data) -> float:
    """How often the largest output is the labelled class.

    `mean(argmax(item(x), axis=-1) == y)`; every position counts when `y` has several.

    Args:
        item: A Keras model, an `Artefact` or a callable with outputs of shape `(..., classes)`.
        data: A pair of arrays `(x, y)`, or an iterable of such batches (a `tf.data.Dataset`).
            `y` holds class indices, or one-hot rows of the shape of the output.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: The shapes of outputs and labels do not fit, or there are no examples.

    Example:

    >>> accuracy(lambda x: x, (np.eye(4), np.array([0, 1, 2, 0])))
    0.75
    """
    run = forward(item)
    hits = [_hits(run, x, y) for x, y in _batches(data)]
    if not hits:
        raise ValueError("The data has no examples. Pass (x, y) or a finite dataset of batches.")
    return float(np.mean(np.concatenate(hits)))


def _hits(run: Callable, x, y) -> np.ndarray:
    outputs = np.asarray(run(x))
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        raise ValueError(
            f"Accuracy needs one output a class, the outputs have the shape {outputs.shape}. Pass "
            "data=None and measure this model with its own metrics."
        )
    return (np.argmax(outputs, axis=-1) == _labels(y, outputs.shape)).reshape(-1)


def _labels(y, shape: tuple[int, ...]) -> np.ndarray:
    labels = np.asarray(y)
    if labels.shape == shape:
        return np.argmax(labels, axis=-1)
    if labels.size != np.prod(shape[:-1]):
        raise ValueError(
            f"The labels have the shape {labels.shape}, expected {shape[:-1]} (class indices) or "
            f"{shape} (one-hot) for these outputs."
        )
    return labels.reshape(shape[:-1])


def _batches(data) -> Iterator[tuple]:
    if isinstance(data, tuple) and len(data) == 2:
        yield from _slices(*data)
    elif isinstance(data, Iterable):
        for batch in data:
            yield as_arrays(batch[0]), np.asarray(batch[1])
    else:
        raise ValueError(
            f"Expected data as a pair of arrays (x, y) or an iterable of batches, {type(data)} was "
            "passed."
        )


def _slices(x, y) -> Iterator[tuple]:
    inputs, labels = as_arrays(x), np.asarray(y)
    for start in range(0, len(labels), _BATCH):
        part = slice(start, start + _BATCH)
        yield keras.tree.map_structure(lambda a, part=part: a[part], inputs), labels[part]
