"""One way to run a Keras model, an exported file or a function: numpy in, numpy out."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.artefact import Artefact


def forward(item: Any, num_threads: int | None = 1) -> Callable:
    """The inference pass of a model or a file, as a function from a batch to numpy outputs.

    A Keras model runs as the concrete function of a `tf.function` with `training=False`, traced
    once a shape: TensorFlow's own graph mode at its fastest, the fair baseline. It uses the
    threads that TensorFlow was started with.

    Args:
        item: A Keras model, an `Artefact`, or a callable, which is returned as it is.
        num_threads: Threads of a file's interpreter.

    Returns:
        A callable; its argument is an array, a list or a dict of arrays.

    Raises:
        TypeError: The item cannot be run.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> forward(model)(np.ones((3, 4), "float32")).shape
    (3, 2)
    """
    if isinstance(item, Artefact):
        return item.runner(num_threads)
    if isinstance(item, keras.Model):
        return _graph_mode(item)
    if callable(item):
        return item
    raise TypeError(
        f"Expected a Keras model, an Artefact or a callable, {item!r} was passed. Open a file with "
        "tfcompress.artefact.Artefact.load(path)."
    )


def _graph_mode(model: keras.Model) -> Callable:
    step = tf.function(lambda inputs: model(inputs, training=False))
    traced: dict[tuple, Callable] = {}

    def run(inputs):
        tensors = as_tensors(inputs)
        key = tuple((t.shape, t.dtype) for t in keras.tree.flatten(tensors))
        if key not in traced:
            # Straight to the graph: the look-up in `step` costs more than a small model.
            traced[key] = step.get_concrete_function(tensors)
        return keras.tree.map_structure(np.asarray, traced[key](tensors))

    return run


def as_tensors(inputs):
    """Every array of a structure as a tensor; a tensor stays as it is."""
    return keras.tree.map_structure(tf.convert_to_tensor, inputs)


def as_arrays(inputs):
    """Every leaf of a structure as a numpy array, float64 as float32."""

    def leaf(value):
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    return keras.tree.map_structure(leaf, inputs)


def with_batch_size(inputs, size: int):
    """A structure of arrays repeated or cut to `size` examples.

    Example:

    >>> with_batch_size(np.array([[1], [2]]), 3).tolist()
    [[1], [2], [1]]
    """
    return keras.tree.map_structure(lambda a: a[np.arange(size) % len(a)], as_arrays(inputs))


def max_abs_diff(item: Any, reference: Any, batch) -> float:
    """The largest absolute difference between two models' outputs on a batch.

    `max |item(batch) - reference(batch)|`, over all outputs, in the units of the outputs.

    Args:
        item: A Keras model, an `Artefact` or a callable.
        reference: The same.
        batch: One batch of inputs.

    Returns:
        The difference; NaN when an output is NaN.

    Raises:
        ValueError: The outputs do not have the same shapes.

    Example:

    >>> max_abs_diff(lambda x: x, lambda x: x + 0.5, np.zeros((2, 3)))
    0.5
    """
    inputs = as_arrays(batch)
    ours = keras.tree.flatten(forward(item)(inputs))
    theirs = keras.tree.flatten(forward(reference)(inputs))
    shapes = [np.shape(a) for a in ours], [np.shape(b) for b in theirs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The outputs have the shapes {shapes[0]}, those of the reference {shapes[1]}. Pass "
            "the model that the file was exported from as the reference."
        )
    differences = [_largest(a, b) for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(differences))


def _largest(a, b) -> float:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.max(np.abs(difference), initial=0.0)
