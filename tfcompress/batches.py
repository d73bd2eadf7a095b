"""Whatever a user passes as data, as a stream of batches of inputs."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def input_batches(data: Any, batch_size: int = 32) -> Iterator[Any]:
    """Iterate over the inputs in `data`; targets are left out, nothing is held in memory.

    Args:
        data: An array, a list or dict of arrays (one for each input of the model), a tuple
            `(inputs, targets)`, a `tf.data.Dataset`, a `keras.utils.PyDataset`, or an iterable (or
            a function that returns one) of batches, each being inputs or `(inputs, targets)`.
        batch_size: Examples of a batch, where `data` is arrays.

    Yields:
        Nested numpy arrays, float64 as float32.

    Raises:
        ValueError: `data` is none of these.

    Example:

    >>> [len(batch) for batch in input_batches(np.zeros((5, 2)), batch_size=2)]
    [2, 2, 1]
    """
    for batch in _structures(data, batch_size):
        inputs = batch[0] if isinstance(batch, tuple) else batch
        yield keras.tree.map_structure(_array, inputs)


def calibration_batches(model: keras.Model | None, data: Any) -> Iterator[Any]:
    """`input_batches`, where what does not fit the model, and empty or endless data, is refused.

    Args:
        model: What they are for. Of a subclassed one it is not known what fits; None to take
            whatever comes.
        data: See `input_batches`.

    Yields:
        See `input_batches`.

    Raises:
        ValueError: A batch has other arrays, names or shapes than the inputs of the model, there
            is none, or the dataset repeats forever.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> [len(batch) for batch in calibration_batches(model, np.ones((40, 3)))]
    [32, 8]
    """
    endless = tf.data.INFINITE_CARDINALITY
    if isinstance(data, tf.data.Dataset) and int(data.cardinality()) == endless:
        raise ValueError(
            "The calibration dataset repeats forever; pass dataset.take(n), some hundred examples."
        )
    wanted, batch = _wanted(model), None
    for batch in input_batches(data):
        if wanted is not None and not _fits(batch, wanted):
            raise ValueError(
                f"The calibration data gives batches of {_described(batch)}, and {model.name!r} "
                f"takes {_described(wanted)}. Pass inputs as the model gets them, with the "
                "axis of the batch. A list is one array for each input: pass several batches as a "
                "generator, a tf.data.Dataset or a list of tuples (inputs,)."
            )
        yield batch
    if batch is None:
        raise ValueError("The calibration data holds no batch; pass some hundred inputs.")


def _wanted(model):
    """The symbolic inputs of a model, as it gets them; None where it does not know."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0] if model.inputs else None
    return model.input if getattr(model, "inputs", None) else None


def _fits(batch, wanted) -> bool:
    leaves, inputs = keras.tree.flatten(batch), keras.tree.flatten(wanted)
    if isinstance(batch, dict):  # Keras takes dicts by name, whatever else is in them.
        return set(wanted if isinstance(wanted, dict) else [x.name for x in inputs]) <= set(batch)
    return len(leaves) == len(inputs) and all(map(_has_shape, leaves, inputs))


def _has_shape(leaf, wanted) -> bool:
    shape = np.shape(leaf)
    if not shape:
        return False
    if len(shape) != len(wanted.shape):  # Keras adds and takes off a last axis of 1.
        longer = max(shape, wanted.shape, key=len)
        return abs(len(shape) - len(wanted.shape)) == 1 and longer[-1] == 1
    return all(want in (None, have) for have, want in zip(shape[1:], wanted.shape[1:], strict=True))


def _described(structure) -> str:
    shapes = keras.tree.map_structure(lambda x: str(tuple(np.shape(x))), structure)
    return str(shapes).replace("'(", "(").replace(")'", ")")


def num_batches(data: Any, batch_size: int = 32) -> int | None:
    """How many batches `input_batches` makes of `data`, or None where only the end will tell.

    Example:

    >>> num_batches(np.zeros((5, 2)), batch_size=2), num_batches(iter([np.zeros(2)]))
    (3, None)
    """
    if isinstance(data, tf.data.Dataset):
        known = int(data.cardinality())
        return known if known >= 0 else None
    if isinstance(data, keras.utils.PyDataset) or _is_list_of_batches(data):
        return len(data)
    leaves = keras.tree.flatten(data[0] if isinstance(data, tuple) else data)
    return -(-len(leaves[0]) // batch_size) if _are_arrays(leaves) else None


def first_batch(data: Any) -> Any:
    """The first batch of a stream; all examples, where `data` is arrays.

    Example:

    >>> first_batch((np.zeros((5, 2)), np.zeros(5))).shape
    (5, 2)
    """
    batch = next(input_batches(data, batch_size=2**31), None)
    if batch is None:
        raise ValueError("The data holds no batch; pass at least one.")
    return batch


def _structures(data, batch_size) -> Iterable:
    if isinstance(data, tf.data.Dataset):
        return data
    if isinstance(data, keras.utils.PyDataset):
        return (data[index] for index in range(len(data)))
    if _is_list_of_batches(data):
        return data
    inputs = data[0] if isinstance(data, tuple) else data
    leaves = keras.tree.flatten(inputs)
    if _are_arrays(leaves):
        return _slices(inputs, len(leaves[0]), batch_size)
    if callable(data):
        return data()
    if isinstance(data, Iterable):
        return data
    raise ValueError(
        f"Expected arrays, a tf.data.Dataset or an iterable of batches, got {data!r} of type "
        f"{type(data).__name__}."
    )


def _is_list_of_batches(data):
    return isinstance(data, list) and data and all(isinstance(batch, tuple) for batch in data)


def _are_arrays(leaves):
    return leaves and all(hasattr(leaf, "shape") and len(leaf.shape) for leaf in leaves)


def _slices(inputs, size, batch_size):
    for start in range(0, size, batch_size):
        part = slice(start, start + batch_size)
        yield keras.tree.map_structure(lambda x, part=part: x[part], inputs)


def limited(batches: Iterable, num_examples: int) -> Iterator:
    """The first batches, until they hold `num_examples` together.

    Example:

    >>> [len(batch) for batch in limited([np.zeros(4)] * 9, num_examples=8)]
    [4, 4]
    """
    seen = 0
    for batch in batches:
        if seen >= num_examples:
            return
        yield batch
        seen += len(keras.tree.flatten(batch)[0])


def _array(leaf):
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array
