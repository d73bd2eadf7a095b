"""CSV and NPZ files."""

import csv
import pathlib
import re
import zipfile
from collections.abc import Iterable

import keras
import numpy as np

from tfcompress.data.examples import Data, num_examples, split_arrays

LABELS = ("label", "labels", "y", "target", "class")
_VALIDATION = ("test", "validation", "val", "valid")


def read_csv(path: pathlib.Path, source, like: keras.Model | None = None) -> Data:
    """Numbers by column, and a column of labels: numbers, or names of classes.

    Args:
        path: A file whose first line names the columns.
        source: See `Source`.
        like: The model; what has one output and no classes is a number to predict.

    Returns:
        `Data` with x of shape (rows, columns), float32.

    Raises:
        ValueError: The file is no table of numbers; the message names the line and the column.
    """
    header, rows = _table(path)
    label = _label(path, header, source.label)
    features = [name for name in header if name != label]
    if not features:
        raise ValueError(f"{str(path)!r} has the column {label!r} only; expected features too.")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    x = np.stack([_numbers(path, name, columns[name]) for name in features], axis=1)
    y, classes = _labels(columns[label], is_regression=_predicts_numbers(like))
    train, validation = split_arrays((x, y), source.validation_split, source.seed)
    return Data(train, validation, str(path), classes)


def _table(path: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is not a CSV file: {error}.") from error
    if len(lines) < 2:
        raise ValueError(
            f"{str(path)!r} has {len(lines)} lines; expected a line with the names of the columns, "
            "and one for each example."
        )
    header, *rows = lines
    if len(set(header)) != len(header):
        raise ValueError(f"{str(path)!r} names a column twice: {header}.")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"{str(path)!r}, row {number}: {len(row)} values, and the first line names "
                f"{len(header)} columns."
            )
    return header, rows


def _label(path: pathlib.Path, names: Iterable[str], wanted: str | None) -> str:
    names = list(names)
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"{str(path)!r} has no {wanted!r}; it has {names[:50]}. Name one as label."
        )
    usual = [name for name in names if name.lower() in LABELS]
    return wanted or (usual or names[-1:])[0]


def _numbers(path: pathlib.Path, name: str, column: tuple[str, ...]) -> np.ndarray:
    try:
        numbers = np.array(column, np.float32)
    except ValueError:
        numbers = np.array([_number(value) for value in column], np.float32)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        raise ValueError(
            f"{str(path)!r}, row {wrong[0] + 2}, column {name!r}: {column[wrong[0]]!r} is not a "
            "number. Encode text as numbers, fill in what is missing, or leave the column out."
        )
    return numbers


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _labels(column: tuple[str, ...], is_regression: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices; the names of the classes, where they are not numbers; or numbers."""
    numbers = np.array([_number(value) for value in column])
    if not np.isfinite(numbers).all():
        classes = sorted(set(column))
        index = {name: i for i, name in enumerate(classes)}
        return np.array([index[value] for value in column], np.int64), tuple(classes)
    if is_regression or (numbers != numbers.astype(np.int64)).any() or numbers.min() < 0:
        return numbers.astype(np.float32)[:, None], ()
    return numbers.astype(np.int64), ()


def _predicts_numbers(model: keras.Model | None) -> bool:
    shape = getattr(model, "output_shape", None)
    last = model.layers[-1] if model is not None and getattr(model, "layers", None) else None
    has_sigmoid = getattr(last, "activation", None) is keras.activations.sigmoid
    return isinstance(shape, tuple) and shape[-1] == 1 and not has_sigmoid


def read_npz(path: pathlib.Path, source, like: keras.Model | None = None) -> Data:
    """Arrays `x` and `y`, or `x_train` and `y_train`, perhaps with `x_test` and `y_test`.

    A model with several inputs has them as `x.<input>` (`x_train.<input>`) each.

    Args:
        path: What `np.savez` wrote, without pickled objects.
        source: See `Source`.
        like: Not used.

    Returns:
        `Data`.

    Raises:
        ValueError: The file is no NPZ file, or has other arrays.
    """
    arrays = _arrays(path)
    train = _part(path, arrays, ("", "_train"), source.label)
    if train is None:
        raise ValueError(
            f"{str(path)!r} holds the arrays {sorted(arrays)}; expected x and y, or x_train and "
            "y_train (and x_test and y_test)."
        )
    validation = _part(path, arrays, [f"_{name}" for name in _VALIDATION], None)
    if validation is None:
        train, validation = split_arrays(train, source.validation_split, source.seed)
    return Data(train, validation, str(path))


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            _check_size(path, archive.zip)
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is not an NPZ file of plain arrays: {error}. Write one with "
            "np.savez(path, x=x, y=y)."
        ) from error


def _check_size(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
    size = sum(info.file_size for info in archive.infolist())
    limit = max(1000 * path.stat().st_size, 2**30)
    if size > limit:
        raise ValueError(f"it would unpack to {size:,} bytes")


def _part(path, arrays, suffixes, label) -> tuple | None:
    for suffix in suffixes:
        y = arrays.get(label or f"y{suffix}")
        x = arrays.get(f"x{suffix}")
        named = {
            name.partition(".")[2]: array
            for name, array in arrays.items()
            if re.match(rf"x{suffix}\.", name)
        }
        if y is not None and (x is not None or named):
            return _checked(path, named if x is None else x, y)
    return None


def _checked(path, x, y) -> tuple:
    arrays = [*keras.tree.flatten(x), y]
    if any(array.ndim == 0 or array.dtype.kind not in "iufb" for array in arrays):
        kinds = [f"{array.dtype}{list(array.shape)}" for array in arrays]
        raise ValueError(
            f"{str(path)!r} holds {', '.join(kinds)}; expected arrays of numbers, with one row an "
            "example."
        )
    if len({len(array) for array in arrays}) != 1 or not len(y):
        counts = [len(array) for array in arrays]
        raise ValueError(
            f"{str(path)!r} holds {counts} examples of x and y; expected the same number, at "
            "least one."
        )
    single = keras.tree.map_structure(
        lambda array: array.astype(np.float32) if array.dtype == np.float64 else array, x
    )
    assert num_examples((single, y)) == len(y)
    return single, y
