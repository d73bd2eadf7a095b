"""What a teacher says about each example, computed once and kept.

On disk a cache is a directory of `.npy` files, one for each array, and `cache.json`, which is
written last: a directory without it is no cache.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from tfcompress.artefact import replacing
from tfcompress.distillation import names
from tfcompress.distillation.losses import Loss, to_logits
from tfcompress.distillation.points import Points, observe, trace_points, used

_INPUTS, _TARGETS = "tfcompress_inputs", "tfcompress_targets"
_MANIFEST = "cache.json"
_VERSION = 1
_CHECKED = 8  # Examples on which the teacher is asked again when a cache is opened.


@dataclasses.dataclass(frozen=True)
class _Array:
    """How a point is stored: as it is, or as the largest of its classes."""

    name: str
    classes: int | None = None


class TeacherCache:
    """What a teacher says about a data set, in memory or on disk; stands for the teacher.

    `Distiller(cache, student, ...)` trains on `fit(cache.dataset(x, y))` and runs no teacher. Each
    example carries what was said about it, so shuffling is harmless. Augmentation is not: the
    teacher saw the examples as they were passed here. Data of other examples (`validation_data`)
    carries nothing of the teacher: on it only the loss of the labels is evaluated.

    Make one with `TeacherCache.build`, and open one on disk with `TeacherCache.open`.

    Attributes:
        points: The points of the teacher.
        size: How many examples there are.
        bytes: What the arrays take.
    """

    def __init__(self, manifest: dict, arrays: dict[str, np.ndarray], path=None):
        self._manifest = manifest
        self._arrays = arrays
        self.path = path
        self.points = Points.from_config(manifest["points"])
        self.size = manifest["size"]
        self._stored = [_Array(**each) for each in manifest["stored"]]

    @property
    def bytes(self) -> int:
        """What the arrays take, in bytes."""
        return sum(array.nbytes for array in self._arrays.values())

    @classmethod
    def build(
        cls,
        teacher: keras.Model,
        x: Any,
        distillation_losses="logits",
        path: str | os.PathLike | None = None,
        top_k: int | None = None,
        dtype: str = "float16",
        batch_size: int = 32,
        student: keras.Model | None = None,
        verbose: int | bool = 1,
    ) -> Self:
        """Ask a teacher about every example.

        Args:
            teacher: A built model.
            x: Inputs: an array, or nested arrays, of any number of examples.
            distillation_losses: What the cache is for: the points that these compare are kept.
            path: A directory to write; None to keep everything in memory.
            top_k: How many of the largest logits to keep of each output; the others share what
                probability is left, equally. None for all.
            dtype: Of what is stored: `"float16"` or `"float32"`.
            batch_size: Examples a call of the teacher.
            student: Needed by losses that pair several layers: the student they are meant for.
            verbose: Whether to show a progress bar.

        Returns:
            The cache.

        Raises:
            ValueError: The directory is in use, or an argument does not fit.

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
        size = _size(x)
        first = _rows(x, slice(0, 1))
        points = trace_points(teacher, first)
        wanted = _wanted(losses, points, student, first)
        stored = [_Array(name, _classes(points, name, top_k)) for name in wanted]
        ask = _asker(teacher, points, stored, dtype, top_k)
        manifest = {
            "version": _VERSION,
            "size": size,
            "points": points.get_config(),
            "stored": [dataclasses.asdict(each) for each in stored],
            "teacher": teacher_fingerprint(teacher),
            "data": data_fingerprint(x),
        }
        with _writer(path, size) as put:
            bar = keras.utils.Progbar(size, unit_name="example", verbose=verbose)
            for start in range(0, size, batch_size):
                rows = slice(start, min(start + batch_size, size))
                put(rows, ask(_rows(x, rows)))
                bar.update(rows.stop)
            arrays = put.finish(manifest)
        return cls(manifest, arrays, None if path is None else str(path))

    @classmethod
    def open(
        cls, path: str | os.PathLike, teacher: keras.Model | None = None, x: Any = None
    ) -> Self:
        """Open a cache on disk, if it is that of this teacher and these inputs.

        Args:
            path: The directory.
            teacher: The teacher, to be compared with the one that was asked: its weights, and what
                it says about the first examples where `x` is there. None to trust it.
            x: The inputs, to be compared with those it was asked about. None to trust them.

        Returns:
            The cache; its arrays are read from disk as they are needed.

        Raises:
            FileNotFoundError: There is no cache.
            ValueError: It was made by another teacher, or on other data.
        """
        directory = pathlib.Path(path)
        if not (directory / _MANIFEST).is_file():
            raise FileNotFoundError(
                f"There is no teacher cache in {str(path)!r}. Make one with TeacherCache.build("
                "teacher, x, path=...)."
            )
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
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
        """The examples with what the teacher said about each of them.

        Args:
            x: The inputs that the teacher was asked about.
            y: Labels; None for none.
            sample_weight: Weights; None for ones.
            batch_size: Examples a batch; None for single examples.
            shuffle: Whether to shuffle all of them, anew each epoch.
            seed: Of the order.

        Returns:
            A dataset for `fit`. It may be shuffled and batched further, but not augmented.

        Raises:
            ValueError: These are not the inputs that the teacher was asked about.
        """
        self.check_data(x)
        given = [each for each in (x, y, sample_weight) if each is not None]
        if sample_weight is not None and y is None:
            raise ValueError("sample_weight needs y; pass y, e.g. the unlabelled= label.")
        for each in given[1:]:
            if _size(each) != self.size:
                raise ValueError(f"Got {_size(each)} labels or weights for {self.size} examples.")
        data = keras.tree.map_structure(_plain, (*given,))
        rows = {"data": data, "arrays": dict(self._arrays)}
        return (
            _batches(rows, self.size, batch_size, shuffle, seed)
            .map(
                lambda found: (
                    {_INPUTS: found["data"][0], _TARGETS: found["arrays"]},
                    *found["data"][1:],
                ),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
            .prefetch(2)
        )

    def check_data(self, x: Any) -> None:
        """Raise a ValueError if `x` is not what the teacher was asked about."""
        if data_fingerprint(x) != self._manifest["data"]:
            raise ValueError(
                f"The cache is stale: it holds what the teacher said about {self.size} other "
                f"examples than these {_size(x)} (their values, order or dtype differ). Pass "
                "those, or build the cache again."
            )

    def check_teacher(self, teacher: keras.Model, x: Any = None) -> None:
        """Raise a ValueError if `teacher` is not the model that was asked."""
        if teacher_fingerprint(teacher) != self._manifest["teacher"]:
            raise ValueError(
                f"The cache is stale: it was made by a teacher with other weights than "
                f"{teacher.name!r} has now. Build it again with TeacherCache.build."
            )
        if x is None:
            return
        rows = slice(0, min(_CHECKED, self.size))
        top_k = max((each.classes is not None for each in self._stored), default=False)
        k = self._arrays[f"{self._stored[0].name}/index"].shape[-1] if top_k else None
        ask = _asker(teacher, self.points, self._stored, "float32", k)
        for name, now in ask(_rows(x, rows)).items():
            then = np.asarray(self._arrays[name][rows], np.float32)
            scale = max(float(np.abs(then).max()), 1e-3)
            if not name.endswith("/index") and np.abs(now - then).max() > 1e-2 * scale:
                raise ValueError(
                    f"The cache is stale: {teacher.name!r} has the weights of the teacher that "
                    f"made it, but gives other values at {name!r}. Build it again."
                )

    def require(self, points) -> None:
        """Raise a ValueError if a point is not in the cache."""
        have = [each.name for each in self._stored]
        missing = [name for name in points if name not in have]
        if missing:
            raise ValueError(
                f"The cache lacks the points {missing}; it has {have}. Build it with the losses "
                "that the Distiller has: TeacherCache.build(teacher, x, distillation_losses=[...])."
            )

    def restore(self, targets: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Point -> float32 tensor, of what the dataset carries."""
        tensors = {}
        for each in self._stored:
            values = tf.cast(targets[each.name], tf.float32)
            if each.classes is not None:
                values = _dense(
                    values,
                    targets[f"{each.name}/index"],
                    targets[f"{each.name}/rest"],
                    each.classes,
                )
            tensors[each.name] = values
        return tensors

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
    """`(inputs, what the teacher said)`; the latter None for plain inputs."""
    if isinstance(x, dict) and _INPUTS in x:
        return x[_INPUTS], x[_TARGETS]
    return x, None


def teacher_fingerprint(teacher: keras.Model) -> str:
    """A hash of the weights of a model, in order; names play no part, for Keras numbers them.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> before = teacher_fingerprint(model)
    >>> _ = model.layers[0].bias.assign([0.0, 1.0])
    >>> teacher_fingerprint(model) == before
    False
    """
    return data_fingerprint([keras.ops.convert_to_numpy(weight) for weight in teacher.weights])


def data_fingerprint(x: Any) -> str:
    """A hash of nested arrays: shapes, dtypes, values and order."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in keras.tree.flatten(x):
        array = np.ascontiguousarray(_plain(leaf))
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _plain(leaf) -> np.ndarray:
    array = keras.ops.convert_to_numpy(leaf) if tf.is_tensor(leaf) else np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _size(x) -> int:
    if isinstance(x, tf.data.Dataset) or not keras.tree.flatten(x):
        raise ValueError(
            f"A teacher cache needs arrays, got {type(x).__name__}: each example is found again by "
            "its index."
        )
    sizes = {len(leaf) for leaf in keras.tree.flatten(x)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"Expected arrays of one length, 1 or more, got the lengths {sizes}.")
    return sizes.pop()


def _rows(x, rows):
    return keras.tree.map_structure(lambda leaf: _plain(leaf[rows]), x)


def _wanted(losses: list[Loss], points: Points, student, first) -> list[str]:
    """The points of the teacher that the losses compare."""
    pairs = []
    for loss in losses:
        if loss.compares_outputs:
            pairs += [((name,), ()) for name in points.outputs]
        elif student is not None:
            pairs += loss.bind(points, trace_points(student, first))
        else:
            pairs += [(_tuple(name), ()) for name in loss.candidates(points, points)[0]]
    return used(pairs, 0)


def _tuple(name):
    return (name,) if isinstance(name, str) else name


def _classes(points: Points, name: str, top_k: int | None) -> int | None:
    if top_k is None or name not in points.outputs:
        return None
    classes = points.shapes[name][-1]
    if not 1 <= top_k < classes:
        raise ValueError(f"top_k must be in [1, {classes}) for {classes} classes, got {top_k}.")
    return classes


def _asker(teacher, points, stored, dtype, top_k) -> Callable:
    """A function from a batch to the arrays that are stored of it, by name."""
    kinds = dict(zip(points.outputs, points.activations, strict=True))

    @tf.function(reduce_retracing=True)
    def ask(x):
        with keras.StatelessScope():
            _, tensors = observe(teacher, x, [each.name for each in stored], training=False)
        found = {}
        for each in stored:
            values = tf.cast(
                to_logits(tensors[each.name], kinds.get(each.name, "linear")), tf.float32
            )
            if each.classes is not None:
                values, index, rest = _largest(values, top_k)
                kind = tf.uint16 if each.classes < 2**16 else tf.int32
                found[f"{each.name}/index"] = tf.cast(index, kind)
                found[f"{each.name}/rest"] = _stored(rest, dtype)
            found[each.name] = _stored(values, dtype)
        return found

    def to_numpy(x):
        return {name: tensor.numpy() for name, tensor in ask(x).items()}

    return to_numpy


def _stored(values, dtype):
    limit = float(np.finfo(dtype).max)
    return tf.cast(tf.clip_by_value(values, -limit, limit), dtype)


def _largest(logits, k):
    """The k largest logits, their classes, and the logit that each of the others gets."""
    values, index = tf.math.top_k(logits, k)
    others = logits.shape[-1] - k
    ones = tf.one_hot(index, logits.shape[-1], on_value=True, off_value=False, dtype=tf.bool)
    taken = tf.reduce_any(ones, axis=-2)
    rest = tf.reduce_logsumexp(tf.where(taken, -1e30, logits), axis=-1)
    return values, index, rest - float(np.log(others))


def _dense(values, index, rest, classes):
    """Logits of all classes; by one-hot, for a scatter compiles badly."""
    ones = tf.one_hot(tf.cast(index, tf.int32), classes, dtype=tf.float32)
    taken = tf.reduce_sum(ones, axis=-2)
    known = tf.reduce_sum(ones * values[..., None], axis=-2)
    return tf.where(taken > 0, known, tf.cast(rest, tf.float32)[..., None])


class _Memory:
    """Arrays in memory, filled batch by batch."""

    def __init__(self, size):
        self.size, self.arrays = size, {}

    def __call__(self, rows, found):
        for name, values in found.items():
            if name not in self.arrays:
                self.arrays[name] = self.make(name, (self.size, *values.shape[1:]), values.dtype)
            self.arrays[name][rows] = values

    def make(self, name, shape, dtype):
        return np.empty(shape, dtype)

    def finish(self, manifest):
        return self.arrays


class _Disk(_Memory):
    """Arrays in `.npy` files of one directory."""

    def __init__(self, size, directory):
        super().__init__(size)
        self.directory, self.files = directory, {}

    def make(self, name, shape, dtype):
        self.files[name] = f"{len(self.files)}.npy"
        return np.lib.format.open_memmap(
            self.directory / self.files[name], mode="w+", dtype=dtype, shape=shape
        )

    def finish(self, manifest):
        for array in self.arrays.values():
            array.flush()
        manifest["files"] = self.files
        with replacing(self.directory / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return self.arrays


@contextlib.contextmanager
def _writer(path, size) -> Iterator[_Memory]:
    """Something to put arrays into; a directory appears under its name when all is written."""
    if path is None:
        yield _Memory(size)
        return
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"{str(path)!r} exists. Open it with TeacherCache.open, or remove it to build it again."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
    ) as temporary:
        inner = pathlib.Path(temporary, "cache")
        inner.mkdir()
        writer = _Disk(size, inner)
        yield writer
        os.replace(inner, path)
        writer.arrays.update(
            (name, np.load(path / file, mmap_mode="r")) for name, file in writer.files.items()
        )


def _batches(rows, size, batch_size, shuffle, seed) -> tf.data.Dataset:
    """Batches of rows of nested arrays, read when they are needed."""
    leaves = keras.tree.flatten(rows)
    specs = [tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    def read(index):
        return [np.ascontiguousarray(leaf[index]) for leaf in leaves]

    def gather(index):
        found = tf.numpy_function(read, [index], [spec.dtype for spec in specs], stateful=False)
        for tensor, spec in zip(found, specs, strict=True):
            tensor.set_shape((index.shape[0], *spec.shape[1:]))
        return keras.tree.pack_sequence_as(rows, found)

    indices = tf.data.Dataset.range(size)
    if shuffle:
        indices = indices.shuffle(size, seed=seed)
    batches = indices.batch(batch_size or min(size, 256)).map(gather)
    return batches if batch_size else batches.unbatch()
