"""Examples, in arrays or in a dataset, and how one of them is found again."""

import hashlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def data_fingerprint(x: Any) -> str:
    """A hash of nested arrays: shapes, dtypes, values and order."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in keras.tree.flatten(x):
        array = np.ascontiguousarray(plain(leaf))
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def plain(leaf) -> np.ndarray:
    """A numpy array, float64 as float32."""
    array = keras.ops.convert_to_numpy(leaf) if tf.is_tensor(leaf) else np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def rows(x: Any, chosen) -> Any:
    """Some examples of nested arrays."""
    return keras.tree.map_structure(lambda leaf: plain(leaf[chosen]), x)


def size_of(x: Any) -> int:
    """How many examples nested arrays have, 1 or more."""
    leaves = keras.tree.flatten(x)
    if not leaves or not all(hasattr(leaf, "__len__") and np.ndim(leaf) for leaf in leaves):
        raise ValueError(
            f"A teacher cache needs arrays or a batched tf.data.Dataset, got {type(x).__name__}: "
            "each example is found again by its index, its inputs or its id."
        )
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"Expected arrays of one length, 1 or more, got the lengths {sizes}.")
    return sizes.pop()


def array_batches(given, size, batch_size, shuffle, seed) -> tf.data.Dataset:
    """Batches of rows of nested arrays, read when they are needed."""
    leaves = keras.tree.flatten(given)
    specs = [tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    def read(index):
        return [np.ascontiguousarray(leaf[index]) for leaf in leaves]

    def gather(index):
        found = tf.numpy_function(read, [index], [spec.dtype for spec in specs], stateful=False)
        for tensor, spec in zip(found, specs, strict=True):
            tensor.set_shape((index.shape[0], *spec.shape[1:]))
        return keras.tree.pack_sequence_as(given, found)

    indices = tf.data.Dataset.range(size)
    if shuffle:
        indices = indices.shuffle(size, seed=seed)
    batches = indices.batch(batch_size or min(size, 256)).map(gather)
    return batches if batch_size else batches.unbatch()


class Keyed:
    """The batches of a dataset, taken apart into inputs, keys, and the rest.

    Args:
        data: Batches of inputs, or of `(inputs, labels)` or `(inputs, labels, weights)`.
        key: The input that identifies an example and is none of the models'; None to take a hash
            of all inputs for the key.

    Raises:
        ValueError: The examples of this dataset have no key.
    """

    def __init__(self, data: tf.data.Dataset, key: str | None):
        spec = data.element_spec
        self._data, self._key = data, key
        self._is_tuple = type(spec) is tuple
        inputs = spec[0] if self._is_tuple else spec
        for leaf in keras.tree.flatten(inputs):
            if not isinstance(leaf, tf.TensorSpec) or leaf.shape.rank == 0:
                raise ValueError(
                    f"The dataset has {leaf} among its inputs; a teacher cache needs batches of "
                    "dense tensors, as for fit. Use dataset.batch(...), and pad what is ragged."
                )
        if key is None:
            return
        if not isinstance(inputs, dict) or key not in inputs:
            has = list(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(
                f"key={key!r} names no input of the dataset; it has {has}. Make its inputs a dict "
                "with an id of each example, or leave key out to find examples by their inputs."
            )
        is_id = inputs[key].dtype.is_integer or inputs[key].dtype == tf.string
        if not is_id or inputs[key].shape.rank != 1:
            raise ValueError(
                f"key={key!r} is {inputs[key]}; expected one integer or string an example: a shape "
                "of (batch,)."
            )

    def split(self, element) -> tuple[Any, Any, tuple]:
        """`(inputs of the models, what the key is made of, labels and weights)` of a batch."""
        x, *rest = element if self._is_tuple else (element,)
        if self._key is None:
            return x, keras.tree.flatten(x), tuple(rest)
        inputs = {name: x[name] for name in x if name != self._key}
        # A model of one input gets it as from any other dataset.
        inputs = next(iter(inputs.values())) if len(inputs) == 1 else inputs
        return inputs, [x[self._key]], tuple(rest)

    def keys(self, leaves: list) -> np.ndarray:
        """The key of each example of a batch, int64, of the second part of `split`."""
        arrays = [plain(leaf) for leaf in leaves]
        if self._key is not None and arrays[0].dtype.kind in "iu":
            return arrays[0].astype(np.int64)
        return hashes(arrays)

    def __iter__(self):
        """`(inputs, keys)` of each batch, in numpy."""
        for element in self._data:
            x, leaves, _ = self.split(element)
            yield keras.tree.map_structure(plain, x), self.keys(leaves)

    def count(self) -> int:
        """How many examples there are; reads the dataset once."""
        if self._data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "The dataset repeats forever. Build the cache on one pass over the examples; "
                "repeat() behind cache.dataset(...)."
            )
        total = sum(len(keras.tree.flatten(self.split(each)[0])[0]) for each in self._data)
        if not total:
            raise ValueError("The dataset is empty.")
        return total

    def joined(self, look_up, arrays: dict[str, np.ndarray], pack) -> tf.data.Dataset:
        """The dataset with rows of arrays.

        Args:
            look_up: Keys -> row of each.
            arrays: Name -> array.
            pack: `(inputs, name -> rows) -> ` what takes the place of the inputs.

        Returns:
            A dataset of as many batches.
        """
        kinds = [array.dtype for array in arrays.values()]

        def read(*leaves):
            found = look_up(self.keys(list(leaves)))
            return [np.ascontiguousarray(array[found]) for array in arrays.values()]

        def join(*element):
            x, leaves, rest = self.split(element if self._is_tuple else element[0])
            found = tf.numpy_function(read, leaves, kinds, stateful=False)
            for tensor, array in zip(found, arrays.values(), strict=True):
                tensor.set_shape((leaves[0].shape[0], *array.shape[1:]))
            return pack(x, dict(zip(arrays, found, strict=True))), *rest

        return self._data.map(join, num_parallel_calls=tf.data.AUTOTUNE)


def hashes(arrays: list[np.ndarray]) -> np.ndarray:
    """A hash of each row of some arrays, int64: of its shapes, dtypes and values.

    >>> one, two, again = hashes([np.array([[1, 2], [3, 4], [1, 2]])]).tolist()
    >>> one == again != two
    True
    """
    head = "".join(f"{array.shape[1:]}{array.dtype}" for array in arrays).encode()
    found = []
    for row in zip(*arrays, strict=True):
        digest = hashlib.blake2b(head, digest_size=8)
        for value in map(np.asarray, row):
            # The bytes of an array of objects, as which strings come, are addresses.
            is_text = value.dtype.kind in "OSU"
            digest.update(repr(value.tolist()).encode() if is_text else value.tobytes())
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), np.int64)


class Lookup:
    """From keys to rows.

    Args:
        keys: The key of each row; where several are equal, the first counts.
    """

    def __init__(self, keys: np.ndarray):
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    @property
    def repeated(self) -> int:
        """How many rows have the key of an earlier one."""
        return int((self._sorted[1:] == self._sorted[:-1]).sum())

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key; -1 where it is not known.

        >>> Lookup(np.array([30, 10, 20]))(np.array([10, 40, 30])).tolist()
        [1, -1, 0]
        """
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[places] == keys, self._order[places], -1)
