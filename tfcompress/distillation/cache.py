"""What teachers say about each example, computed once and kept.

On disk a cache is a directory of `.npy` files, one for each array, and `cache.json`, which is
written last: a directory without it is no cache.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from tfcompress.distillation import names
from tfcompress.distillation.answers import Answers, answers, teacher_fingerprint
from tfcompress.distillation.examples import (
    Keyed,
    Lookup,
    array_batches,
    data_fingerprint,
    plain,
    rows,
    size_of,
)
from tfcompress.distillation.store import MANIFEST, writer

_INPUTS, _TARGETS = "tfcompress_inputs", "tfcompress_targets"
_KEYS = "keys"
_VERSION = 2
_CHECKED = 8  # Examples on which a teacher is asked again when a cache is opened.


class TeacherCache:
    """What one or several teachers say about a data set, in memory or on disk; stands for them.

    `Distiller(cache, student, ...)` trains on `fit(cache.dataset(x, y))` and runs no teacher. Each
    example carries what was said about it, so shuffling is harmless. Augmentation is not: the
    teacher saw the examples as they were passed here. Data of other examples (`validation_data`)
    carries nothing of the teacher: on it only the loss of the labels is evaluated.

    An example is found again

    * in arrays by its index: they must be the same arrays, in the same order;
    * in a `tf.data.Dataset` by a hash of its inputs: it may be shuffled, filtered, repeated and
      batched anew, and what the teacher has not seen, also because it was augmented or padded to
      another length, is refused;
    * in a `tf.data.Dataset` with `key="id"` by that input, an integer or string that no two
      examples share and that the models do not get (where one other input is left, they get that
      instead of a dict). What else an example holds is then not compared: the teacher's word is
      about the inputs as they were.

    Make one with `TeacherCache.build`, and open one on disk with `TeacherCache.open`.

    Attributes:
        points: The points of each teacher.
        size: How many examples there are.
        bytes: What the arrays take.
    """

    def __init__(self, manifest: dict, arrays: dict[str, np.ndarray], path=None):
        self._manifest = manifest
        self._arrays = {name: array for name, array in arrays.items() if name != _KEYS}
        self._lookup = Lookup(np.asarray(arrays[_KEYS])) if _KEYS in arrays else None
        self.path = path
        self.size = manifest["size"]
        self._answers = [Answers.from_config(each) for each in manifest["teachers"]]
        self.points = [each.points for each in self._answers]

    @property
    def bytes(self) -> int:
        """What the arrays take, in bytes."""
        keys = 8 * self.size if self._lookup else 0
        return keys + sum(array.nbytes for array in self._arrays.values())

    @classmethod
    def build(
        cls,
        teacher: keras.Model | list[keras.Model],
        x: Any,
        distillation_losses="logits",
        path: str | os.PathLike | None = None,
        top_k: int | None = None,
        dtype: str = "float16",
        batch_size: int = 32,
        student: keras.Model | None = None,
        verbose: int | bool = 1,
        key: str | None = None,
    ) -> Self:
        """Ask one or several teachers about every example.

        Args:
            teacher: A built model, or a list of several.
            x: Inputs: an array, or nested arrays, of any number of examples; or a batched
                `tf.data.Dataset` as for `fit`, which is read twice, once to count.
            distillation_losses: What the cache is for: the points that these compare are kept.
            path: A directory to write; None to keep everything in memory.
            top_k: How many of the largest logits to keep of each output; the others share what
                probability is left, equally. None for all.
            dtype: Of what is stored: `"float16"` or `"float32"`.
            batch_size: Examples a call of the teacher, of arrays.
            student: Needed by losses that pair several layers: the student they are meant for.
            verbose: Whether to show a progress bar.
            key: The input of a dataset that identifies an example; None for a hash of its inputs.

        Returns:
            The cache.

        Raises:
            ValueError: The directory is in use, examples have no key or share one, or an argument
                does not fit.

        Example:

        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10)])
        >>> cache = TeacherCache.build(teacher, np.zeros((5, 4)), top_k=2, verbose=0)
        >>> cache.size, cache.bytes
        (5, 50)
        """
        several = isinstance(distillation_losses, (list, tuple))
        losses = distillation_losses if several else [distillation_losses]
        losses = [names.get(loss) for loss in losses]
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype must be "float16" or "float32", got {dtype!r}.')
        is_dataset = isinstance(x, tf.data.Dataset)
        if key is not None and not is_dataset:
            raise ValueError(
                f"key={key!r} is for a tf.data.Dataset; examples in arrays are found by index."
            )
        keyed = Keyed(x, key) if is_dataset else None
        size = keyed.count() if keyed else size_of(x)
        batches = iter(keyed) if keyed else _array_batches(x, size, batch_size)
        first = next(batches, None)
        if first is None:
            raise ValueError(_unsteady(size, "none"))
        one = rows(first[0], slice(0, 1))
        teachers = _listed(teacher)
        kept = [answers(each, losses, student, one, top_k) for each in teachers]
        manifest = {
            "version": _VERSION,
            "size": size,
            "teachers": [each.get_config() for each in kept],
            "data": None if keyed else data_fingerprint(x),
            "key": key,
        }
        askers = [
            each.asker(model, dtype, top_k) for each, model in zip(kept, teachers, strict=True)
        ]
        with writer(path, size) as put:
            _fill(put, itertools.chain([first], batches), askers, size, verbose)
            if key is not None and (count := Lookup(put.arrays[_KEYS]).repeated):
                raise ValueError(
                    f"key={key!r} does not tell {size} examples apart: {count} have the id of an "
                    "earlier one. Give each example an id of its own, or leave key out."
                )
            arrays = put.finish(manifest)
        return cls(manifest, arrays, None if path is None else str(path))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        teacher: keras.Model | list[keras.Model] | None = None,
        x: Any = None,
    ) -> Self:
        """Open a cache on disk, if it is that of this teacher and these inputs.

        Args:
            path: The directory.
            teacher: The teacher or teachers, to be compared with those that were asked: their
                weights, and what they say about the first examples where `x` is there. None to
                trust them.
            x: The inputs, to be compared with those they were asked about (of a dataset, the first
                batch). None to trust them.

        Returns:
            The cache; its arrays are read from disk as they are needed.

        Raises:
            FileNotFoundError: There is no cache.
            ValueError: It was made by another teacher, or on other data.
        """
        directory = pathlib.Path(path)
        if not (directory / MANIFEST).is_file():
            raise FileNotFoundError(
                f"There is no teacher cache in {str(path)!r}. Make one with TeacherCache.build("
                "teacher, x, path=...)."
            )
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("version") != _VERSION:
            raise ValueError(f"{str(path)!r} is a cache of another version; build it again.")
        arrays = {
            name: np.load(directory / file, mmap_mode="r", allow_pickle=False)
            for name, file in manifest["files"].items()
        }
        cache = cls(manifest, arrays, str(path))
        if x is not None:
            cache.check_data(x)
        if teacher is not None:
            cache.check_teacher(teacher, x)
        return cache

    def dataset(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int | None = 32,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> tf.data.Dataset:
        """The examples with what the teachers said about each of them.

        Args:
            x: The inputs that the teachers were asked about: the arrays; or, if they were asked
                about a dataset, a batched one of such examples, whose batches, order, labels and
                weights stay.
            y: Labels, of arrays; None for none.
            sample_weight: Weights, of arrays; None for ones.
            batch_size: Examples a batch, of arrays; None for single examples.
            shuffle: Whether to shuffle all of them, anew each epoch, if they are arrays.
            seed: Of the order.

        Returns:
            A dataset for `fit`. It may be shuffled and batched further, but not augmented.

        Raises:
            ValueError: These are not inputs that the teachers were asked about. Of a dataset, the
                first batch is looked at here, and each other when it is read.
        """
        self.check_data(x)
        if isinstance(x, tf.data.Dataset):
            if y is not None or sample_weight is not None:
                raise ValueError("The labels and weights of a tf.data.Dataset are in it already.")
            return self._keyed(x).joined(self._rows, self._arrays, _packed).prefetch(2)
        given = [each for each in (x, y, sample_weight) if each is not None]
        if sample_weight is not None and y is None:
            raise ValueError("sample_weight needs y; pass y, e.g. the unlabelled= label.")
        for each in given[1:]:
            if size_of(each) != self.size:
                raise ValueError(f"Got {size_of(each)} labels or weights for {self.size} examples.")
        data = keras.tree.map_structure(plain, (*given,))
        everything = {"data": data, "arrays": dict(self._arrays)}
        return (
            array_batches(everything, self.size, batch_size, shuffle, seed)
            .map(
                lambda found: (_packed(found["data"][0], found["arrays"]), *found["data"][1:]),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
            .prefetch(2)
        )

    def check_data(self, x: Any) -> None:
        """Raise a ValueError if `x` is not what the teachers were asked about.

        Args:
            x: The arrays, of which all are compared; or a dataset, of which the first batch is.
        """
        is_dataset = isinstance(x, tf.data.Dataset)
        if is_dataset != (self._lookup is not None):
            made, passed = ("a tf.data.Dataset", "arrays")[:: -1 if is_dataset else 1]
            raise ValueError(
                f"The cache was made from {made}, and {passed} were passed. Pass {made}, or build "
                "the cache again."
            )
        if is_dataset:
            self._first(x)
        elif data_fingerprint(x) != self._manifest["data"]:
            raise ValueError(
                f"The cache is stale: it holds what the teacher said about {self.size} other "
                f"examples than these {size_of(x)} (their values, order or dtype differ). Pass "
                "those, or build the cache again."
            )

    def check_teacher(self, teacher: keras.Model | list[keras.Model], x: Any = None) -> None:
        """Raise a ValueError if `teacher` is not what was asked.

        Args:
            teacher: A model, or as many as were asked.
            x: Inputs, on the first of which the answers are compared; None for the weights alone.
        """
        teachers = _listed(teacher)
        if len(teachers) != len(self._answers):
            raise ValueError(
                f"The cache was made by {len(self._answers)} teachers, got {len(teachers)}."
            )
        for model, kept in zip(teachers, self._answers, strict=True):
            if teacher_fingerprint(model) != kept.fingerprint:
                raise ValueError(
                    f"The cache is stale: it was made by a teacher with other weights than "
                    f"{model.name!r} has now. Build it again with TeacherCache.build."
                )
        if x is not None:
            self._check_answers(teachers, x)

    def _check_answers(self, teachers, x) -> None:
        inputs, places = self._first(x)
        askers = []
        for index, (model, kept) in enumerate(zip(teachers, self._answers, strict=True)):
            cut = next((each.name for each in kept.stored if each.classes is not None), None)
            top_k = None if cut is None else self._arrays[f"{index}/{cut}/index"].shape[-1]
            askers.append(kept.asker(model, "float32", top_k))
        for name, now in _ask(askers, inputs).items():
            then = np.asarray(self._arrays[name][places], np.float32)
            scale = max(float(np.abs(then).max()), 1e-3)
            if not name.endswith("/index") and np.abs(now - then).max() > 1e-2 * scale:
                index, _, point = name.partition("/")
                raise ValueError(
                    f"The cache is stale: {teachers[int(index)].name!r} has the weights of the "
                    f"teacher that made it, but gives other values at {point!r}. Build it again."
                )

    def _first(self, x) -> tuple[Any, np.ndarray]:
        """Some inputs and where they are in the arrays."""
        if self._lookup is None:
            places = np.arange(min(_CHECKED, self.size))
            return rows(x, places), places
        for inputs, keys in self._keyed(x):
            return rows(inputs, slice(0, _CHECKED)), self._rows(keys)[:_CHECKED]
        raise ValueError("The dataset is empty.")

    def _keyed(self, x) -> Keyed:
        return Keyed(x, self._manifest["key"])

    def _rows(self, keys) -> np.ndarray:
        found = self._lookup(keys)
        if (found < 0).any():
            how = "id" if self._manifest["key"] else "inputs"
            raise ValueError(
                f"The cache is stale: of {len(keys)} examples, the teacher was not asked about "
                f"{int((found < 0).sum())}, known by {how}. Pass the examples as they were in "
                "TeacherCache.build: not augmented, of the same dtypes and padding; or build the "
                "cache again."
            )
        return found

    def require(self, points: list) -> None:
        """Raise a ValueError if a point is not in the cache.

        Args:
            points: The points that are needed of each teacher.
        """
        for kept, needed in zip(self._answers, points, strict=True):
            have = [each.name for each in kept.stored]
            missing = [name for name in needed if name not in have]
            if missing:
                raise ValueError(
                    f"The cache lacks the points {missing}; it has {have}. Build it with the "
                    "losses that the Distiller has: TeacherCache.build(teacher, x, "
                    "distillation_losses=[...])."
                )

    def restore(self, targets: dict[str, tf.Tensor]) -> list[dict[str, tf.Tensor]]:
        """Point -> float32 tensor for each teacher, of what the dataset carries."""
        parts: list[dict] = [{} for _ in self._answers]
        for name, tensor in targets.items():
            index, _, point = name.partition("/")
            parts[int(index)][point] = tensor
        return [kept.restore(part) for kept, part in zip(self._answers, parts, strict=True)]

    def get_config(self) -> dict:
        """Where it is; one in memory cannot be saved."""
        if self.path is None:
            raise ValueError(
                "A cache in memory cannot be saved with its Distiller. Save the student "
                "(distiller.student.save), or build the cache with path=..."
            )
        return {"path": self.path}

    @classmethod
    def from_config(cls, config):
        """Open it again."""
        return cls.open(config["path"])


keras.saving.register_keras_serializable(package="tfcompress")(TeacherCache)


def unpack(x: Any) -> tuple[Any, dict | None]:
    """`(inputs, what the teachers said)`; the latter None for plain inputs."""
    if isinstance(x, dict) and _INPUTS in x:
        return x[_INPUTS], x[_TARGETS]
    return x, None


def _packed(inputs, targets: dict) -> dict:
    return {_INPUTS: inputs, _TARGETS: targets}


def _listed(teacher) -> list[keras.Model]:
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not teachers:
        raise ValueError("Got no teacher; pass a model, or a list of some.")
    return teachers


def _array_batches(x, size, batch_size) -> Iterator[tuple[Any, None]]:
    for start in range(0, size, batch_size):
        yield rows(x, slice(start, min(start + batch_size, size))), None


def _fill(put, batches, askers, size, verbose) -> None:
    """Ask about each batch, and put the answers and the keys where they belong."""
    bar = keras.utils.Progbar(size, unit_name="example", verbose=verbose)
    done = 0
    for inputs, keys in batches:
        start, done = done, done + size_of(inputs)
        if done > size:
            raise ValueError(_unsteady(size, "more"))
        put(slice(start, done), _ask(askers, inputs) | ({} if keys is None else {_KEYS: keys}))
        bar.update(done)
    if done < size:
        raise ValueError(_unsteady(size, f"only {done}"))


def _ask(askers, inputs) -> dict[str, np.ndarray]:
    """What every teacher says, under `0/point`, `1/point`, ..."""
    return {
        f"{index}/{name}": values
        for index, ask in enumerate(askers)
        for name, values in ask(inputs).items()
    }


def _unsteady(size, found) -> str:
    return (
        f"The dataset had {size} examples when they were counted, and {found} when they were read. "
        "Pass one that has the same in each pass, in any order."
    )
