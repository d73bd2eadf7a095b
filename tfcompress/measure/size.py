"""Weights, zeros and bytes of a model or a file."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfcompress.artefact import Artefact, files_below, zipped_size


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model or a file: its real values, and how many of them are not zero."""

    path: str
    values: np.ndarray
    shape: tuple[int, ...]
    nonzeros: int

    @property
    def params(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))


def weights(item: keras.Model | Artefact) -> list[Weight]:
    """Every weight once, also one that several layers share.

    Args:
        item: A built Keras model, whose non-trainable weights count as well (the statistics of
            a batch normalization); or an `Artefact`, whose integers are dequantized.

    Returns:
        `Weight`s in the order of the model or the file.

    Raises:
        ValueError: The model is not built.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> [(w.shape, w.params, w.nonzeros) for w in weights(model)]
    [((4, 2), 8, 8), ((2,), 2, 0)]
    """
    if isinstance(item, Artefact):
        return [Weight(t.name, t.real(), t.shape, t.nonzeros) for t in item.tensors()]
    if not item.built:
        raise ValueError(
            f"The model {item.name!r} has no weights yet. Call it on a batch first, or start it "
            "with keras.Input(shape)."
        )
    # `model.weights` leaves out duplicates, and the states of seeds and metrics.
    return [_keras_weight(variable) for variable in item.weights]


def _keras_weight(variable: keras.Variable) -> Weight:
    values = keras.ops.convert_to_numpy(variable)
    nonzeros = int(np.count_nonzero(values))
    return Weight(variable.path, values.astype(np.float32), tuple(values.shape), nonzeros)


def sparsity(item: keras.Model | Artefact) -> float:
    """The fraction of zeros in the kernels and embeddings.

    `zeros / parameters`, over the weights with 2 or more axes: those that pruning acts on.

    Args:
        item: A built Keras model or an `Artefact`.

    Returns:
        A fraction in [0, 1]; 0 for a model without such weights.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> sparsity(model)
    0.0
    """
    kernels = [weight for weight in weights(item) if len(weight.shape) >= 2]
    total = sum(weight.params for weight in kernels)
    return 1.0 - sum(weight.nonzeros for weight in kernels) / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes as they are and as a zip archive (deflate, level 9)."""

    bytes: int
    zipped_bytes: int


def size(item: keras.Model | Artefact | str | os.PathLike) -> Size:
    """How many bytes a model or a file takes, raw and zipped.

    A Keras model is saved to a temporary `.keras` file without its optimizer. A model whose class
    cannot be serialized is saved as `.weights.h5`.

    Args:
        item: A Keras model, an `Artefact`, or the path of a file or a directory.

    Returns:
        A `Size`.

    Raises:
        FileNotFoundError: There is no such file.

    Example:

    >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100)])
    >>> size(model).bytes > 4 * 100 * 100
    True
    """
    if isinstance(item, Artefact):
        return Size(item.bytes, item.zipped_bytes)
    if isinstance(item, keras.Model):
        with tempfile.TemporaryDirectory() as directory:
            return _files_size([_saved(item, pathlib.Path(directory))])
    if not pathlib.Path(item).exists():
        raise FileNotFoundError(
            f"There is no file {str(item)!r}. Pass a saved file, a model or an Artefact."
        )
    return _files_size(files_below(pathlib.Path(item)))


def _files_size(files: list[pathlib.Path]) -> Size:
    return Size(sum(file.stat().st_size for file in files), zipped_size(files))


def _saved(model: keras.Model, directory: pathlib.Path) -> pathlib.Path:
    path = directory / "model.keras"
    with _without_optimizer(model):
        if _is_serializable(model):
            model.save(path)
        else:
            path = directory / "model.weights.h5"
            model.save_weights(path)
    return path


@contextlib.contextmanager
def _without_optimizer(model: keras.Model) -> Iterator[None]:
    """Take the optimizer off for a while: Keras saves its slots with the model."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        yield
        return
    model.optimizer = None
    try:
        yield
    finally:
        model.optimizer = optimizer


def _is_serializable(model: Any) -> bool:
    try:
        keras.saving.serialize_keras_object(model)
    except (NotImplementedError, TypeError, ValueError):
        return False
    return True
