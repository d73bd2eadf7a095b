"""What all data becomes: examples to train on, and examples to validate on."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches, input_batches, limited


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Labelled examples, in two parts.

    Args:
        train: `(x, y)` as arrays (x may be a dict of arrays by input), or a `tf.data.Dataset` of
            batches `(x, y)`.
        validation: The same, for examples that are not trained on.
        source: Where they come from, for messages.
        classes: The names of the labels 0, 1, ..., where they have names.

    Example:

    >>> x, y = np.zeros((10, 4), "float32"), np.arange(10) % 2
    >>> data = Data((x, y), (x[:2], y[:2]), "made up")
    >>> data.num_batches(batch_size=4), data.inputs(3).shape
    (3, (3, 4))
    """

    train: Any
    validation: Any
    source: str = "data"
    classes: tuple[str, ...] = ()

    def num_batches(self, batch_size: int = 32) -> int:
        """How many steps an epoch of training has."""
        if isinstance(self.train, tf.data.Dataset):
            known = int(batched(self.train, batch_size).cardinality())
            return known if known >= 0 else sum(1 for _ in batched(self.train, batch_size))
        return -(-num_examples(self.train) // batch_size)

    def fit_arguments(self, batch_size: int = 32, seed: int = 0) -> dict[str, Any]:
        """The arguments of `model.fit` that hand it the data.

        Args:
            batch_size: Examples of a training step.
            seed: Of the order in which a dataset is shuffled; arrays Keras shuffles itself.
        """
        if isinstance(self.train, tf.data.Dataset):
            shuffled = self.train.unbatch().shuffle(1024, seed).batch(batch_size)
            shuffled = shuffled.apply(
                tf.data.experimental.assert_cardinality(self.num_batches(batch_size))
            )
            return {"x": shuffled.prefetch(2), "shuffle": False, "validation_data": self.validation}
        x, y = self.train
        return {"x": x, "y": y, "batch_size": batch_size, "validation_data": self.validation}

    def inputs(self, examples: int, part: str = "train") -> Any:
        """The inputs of the first examples as one batch, e.g. to calibrate or verify on.

        Args:
            examples: How many at most.
            part: `"train"` or `"validation"`.

        Returns:
            An array, or a dict of arrays.
        """
        batches = list(limited(input_batches(getattr(self, part)), examples))
        joined = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
        return keras.tree.map_structure(lambda array: array[:examples], joined)

    def labels(self, examples: int = 512) -> np.ndarray:
        """The labels of the first training examples."""
        if not isinstance(self.train, tf.data.Dataset):
            return np.asarray(self.train[1])[:examples]
        batches = self.train.take(-(-examples // 32))
        return np.concatenate([np.asarray(y) for _, y in batches])[:examples]

    def check(self, model: keras.Model) -> "Data":
        """This data, or a `ValueError` if its inputs do not fit `model`."""
        try:
            next(calibration_batches(model, self.train))
        except ValueError as error:
            text = str(error).replace("The calibration data", f"{self.source}")
            raise ValueError(text) from error
        return self


def batched(dataset: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """A dataset of batches as one of batches of another size."""
    return dataset.rebatch(batch_size)


def num_examples(pair: tuple) -> int:
    """How many examples a pair of arrays has."""
    return len(keras.tree.flatten(pair[0])[0])


def as_data(data: Any, validation_split: float = 0.2, seed: int = 0) -> Data:
    """Whatever a user has at hand, as `Data`.

    Args:
        data: A `Data`, a pair `(x, y)` of arrays, a dataset of batches `(x, y)`, or a pair of
            either of them: to train on and to validate on.
        validation_split: Share of the examples to validate on, in (0, 1), if there is one part.
        seed: Chooses them.

    Returns:
        The data.

    Raises:
        ValueError: It is none of these.

    Example:

    >>> data = as_data((np.zeros((10, 4)), np.arange(10)))
    >>> len(data.train[1]), len(data.validation[1])
    (8, 2)
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, tf.data.Dataset):
        return Data(*split_dataset(data, validation_split), source="the dataset")
    if isinstance(data, tuple | list) and len(data) == 2:
        if all(isinstance(part, tf.data.Dataset) for part in data):
            return Data(*data, source="the datasets")
        if all(isinstance(part, tuple | list) and len(part) == 2 for part in data):
            train, validation = (_pair(part) for part in data)
            return Data(train, validation, source="the arrays")
        return Data(*split_arrays(_pair(data), validation_split, seed), source="the arrays")
    raise ValueError(
        f"Got data of type {type(data).__name__}; expected (x, y), a tf.data.Dataset of batches "
        "(x, y), a pair of either to train and validate on, or what tfcompress.data.load returns."
    )


def _pair(pair) -> tuple:
    x = keras.tree.map_structure(np.asarray, pair[0])
    y = np.asarray(pair[1])
    lengths = {len(array) if array.ndim else 0 for array in [*keras.tree.flatten(x), y]}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"The arrays hold {sorted(lengths)} examples; expected x and y with the same number, "
            "at least one."
        )
    return x, y


def split_arrays(pair: tuple, share: float, seed: int) -> tuple[tuple, tuple]:
    """Two parts of a pair of arrays, by chance; with class labels, the same share of each.

    Args:
        pair: `(x, y)`.
        share: Of the second part, in (0, 1).
        seed: Chooses the examples.

    Returns:
        `((x, y), (x, y))`.

    Raises:
        ValueError: One of the parts would be empty.
    """
    x, y = pair
    _check_share(share)
    chosen = _held_back(np.asarray(y), share, np.random.default_rng(seed))
    _check_parts(len(y), int(chosen.sum()), share)
    return _take(x, y, ~chosen), _take(x, y, chosen)


def _take(x, y, rows) -> tuple:
    return keras.tree.map_structure(lambda array: array[rows], x), np.asarray(y)[rows]


def _held_back(y: np.ndarray, share: float, rng) -> np.ndarray:
    chosen = np.zeros(len(y), bool)
    is_class = y.ndim == 1 and y.dtype.kind in "iub"
    groups = [np.flatnonzero(y == label) for label in np.unique(y)] if is_class else []
    if not groups or min(map(len, groups)) * share < 1:
        groups = [np.arange(len(y))]
    for rows in groups:
        count = max(int(len(rows) * share), 1)
        chosen[rng.permutation(rows)[:count]] = True
    return chosen


def split_dataset(dataset: tf.data.Dataset, share: float, count: int | None = None) -> tuple:
    """Two parts of a dataset of batches: every so many examples validate.

    Args:
        dataset: Of batches `(x, y)`, finite, in the same order each time that it is read.
        share: Of the second part, in (0, 1).
        count: How many examples it has; None to count them.

    Returns:
        Two datasets of batches of 32.

    Raises:
        ValueError: One of the parts would be empty.
    """
    _check_share(share)
    if count is None:
        count = sum(len(keras.tree.flatten(batch)[0]) for batch in dataset)
    second = int(np.floor(np.float64(count) * share))
    _check_parts(count, second, share)
    rows = dataset.unbatch().enumerate()

    def is_held_back(index):
        done = tf.cast(index, tf.float64)
        return tf.floor((done + 1) * share) > tf.floor(done * share)

    def part(wanted, size):
        chosen = rows.filter(lambda index, _: tf.equal(is_held_back(index), wanted))
        examples = chosen.map(lambda _, example: example)
        # Keras warns of the end of a dataset whose size it has to find out.
        return examples.apply(tf.data.experimental.assert_cardinality(size)).batch(32)

    return part(False, count - second), part(True, second)


def _check_parts(count: int, second: int, share: float) -> None:
    if not 0 < second < count:
        raise ValueError(
            f"{count} examples cannot be split with validation_split={share}: a part would be "
            "empty. Pass more examples, or another share."
        )


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(
            f"validation_split is {share}, expected a share in (0, 1) such as 0.2: data in one "
            "part has none to validate on."
        )
