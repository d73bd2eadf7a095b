"""References to data: what to read, and how."""

import dataclasses
import importlib
import pathlib
import re
from typing import Any

import keras

from tfcompress import zoo
from tfcompress.data import files, images, records
from tfcompress.data.examples import Data, as_data

ZOO = {"mnist5k": zoo.mnist5k, "movie_reviews": zoo.movie_reviews}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where data is, and how to read it.

    Args:
        path: A file `.csv`, `.npz` or `.tfrecord`, a folder of TFRecord files, a folder of images
            with one folder for each class, `zoo:mnist5k`, or `module:function`, which is only
            called where it is trusted.
        label: The column or feature with the labels; default: `label`, `y`, `target` or `class`,
            or the last column of a CSV file.
        validation_split: Share of the examples to validate on, in (0, 1), where the source has no
            part of its own for it (`x_test`, a folder `validation`, ...).
        image_size: Height and width that images are resized to; default: those of the model.
        scale: What the values of images are multiplied by, e.g. 0.00392 for [0, 1]; default: 1.
        seed: Chooses the examples to validate on.
    """

    path: str
    label: str | None = None
    validation_split: float = 0.2
    image_size: tuple[int, int] | None = None
    scale: float = 1.0
    seed: int = 0


def load(source: str | Source, like: keras.Model | None = None, trust: bool = False) -> Data:
    """Read data.

    Args:
        source: A `Source`, or its `path`.
        like: The model that it is for, whose inputs say the size of images; and they must fit.
        trust: Whether `module:function` may be imported and called.

    Returns:
        `Data`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, holds something else than examples with labels, or does
            not fit the model.
        ImportError: The package with the data is not installed.

    Example:

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "points.csv")
    >>> _ = file.write_text("a,b,label\\n" + "1,2,yes\\n3,4,no\\n" * 5)
    >>> data = load(str(file))
    >>> data.train[0].shape, data.classes
    ((8, 2), ('no', 'yes'))
    """
    source = Source(source) if isinstance(source, str) else source
    data = _read(source, like, trust)
    return data if like is None else data.check(like)


def _read(source: Source, like, trust: bool) -> Data:
    if source.path.startswith("zoo:"):
        return _from_zoo(source)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source.path):
        return _from_function(source, trust)
    path = pathlib.Path(source.path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no data at {source.path!r}. Pass a .csv, .npz or .tfrecord file, a folder "
            f"of images, or one of {', '.join(f'zoo:{name}' for name in ZOO)}."
        )
    if path.is_dir():
        is_records = any(records.files_in(path))
        return (records if is_records else images).read(path, source, like)
    readers = {".csv": files.read_csv, ".npz": files.read_npz}
    reader = records.read if records.is_record(path) else readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Cannot tell from {path.name!r} what data it holds. Expected one of .csv, .npz, "
            ".tfrecord, or a folder."
        )
    return reader(path, source, like)


def _from_zoo(source: Source) -> Data:
    name = source.path.removeprefix("zoo:")
    if name not in ZOO:
        raise ValueError(f"There is no data {name!r} in the zoo; expected one of {sorted(ZOO)}.")
    return Data(*ZOO[name](source.seed), source=source.path)


def _from_function(source: Source, trust: bool) -> Data:
    if not trust:
        raise ValueError(
            f"{source.path!r} is a function, and calling it runs the code of its module. Pass "
            "--trust (trust=True) if you know it, or a file."
        )
    return as_data(call(source.path), source.validation_split, source.seed)


def call(reference: str) -> Any:
    """What the function `module:function` returns; only for references that are trusted."""
    module, _, function = reference.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Cannot find {reference!r}: {error}.") from error
    return made()
