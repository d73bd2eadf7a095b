"""Keras models from files that may come from anywhere, and to files that are whole or not there."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras

from tfcompress import zoo
from tfcompress.artefact import replacing
from tfcompress.data.source import call
from tfcompress.recipe import record

ZOO = {"minilm": zoo.minilm}

# What a file may unpack to, whatever its own size; more than that, if it shrank by less than this.
_FREE_BYTES = 2**30
_MAX_EXPANSION = 100
# An axis that no weight of the file has, of this size or larger, would only fill the memory.
_LARGE_AXIS = 1_000_000


class ModelFileError(ValueError):
    """A file that is no Keras model, is damaged, or would run code."""


def load_model(reference: str | os.PathLike, trust: bool = False) -> keras.Model:
    """A model from a `.keras` file or the zoo.

    Keras's safe mode stays on: a file that would run code of its own is refused, as is one that
    is damaged or unpacks to much more than it is. The recipe that made it is read, too.

    Args:
        reference: A path, `zoo:minilm`, or `module:function`, which is only called where it is
            trusted.
        trust: Whether to load a file with code in it (a Lambda layer), or to call a function.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ModelFileError: It is none of these; the message says what it is.

    Example:

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "m.keras")
    >>> keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(file)
    >>> load_model(file).count_params()
    10
    """
    text = os.fspath(reference)
    if text.startswith("zoo:"):
        return _from_zoo(text)
    path = pathlib.Path(text)
    if ":" in text and not path.exists() and path.suffix != ".keras":
        return _from_function(text, trust)
    _check_file(path)
    config = _check_archive(path, trust)
    if "keras_hub" in config and importlib.util.find_spec("keras_hub"):
        importlib.import_module("keras_hub")  # Registers its classes.
    try:
        model = keras.saving.load_model(path, safe_mode=not trust)
    except Exception as error:  # Keras raises whatever its layers do on a wrong config.
        raise ModelFileError(_message(path, error)) from error
    if not isinstance(model, keras.Model):
        raise ModelFileError(f"{text!r} holds a {type(model).__name__}, not a model.")
    return record.attach_from(model, path)


def save_model(model: keras.Model, path: str | os.PathLike) -> pathlib.Path:
    """Write a `.keras` file, whole or not at all.

    Args:
        model: A built model.
        path: A path that ends in `.keras`.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, or it cannot be written there.
    """
    path = pathlib.Path(path)
    if path.suffix != ".keras":
        raise ValueError(f"A model is saved as a .keras file; got {str(path)!r}.")
    with replacing(path) as temporary:
        model.save(temporary)
    return path


def _from_zoo(reference: str) -> keras.Model:
    name = reference.removeprefix("zoo:")
    if name not in ZOO:
        raise ModelFileError(f"There is no model {name!r} in the zoo; expected {sorted(ZOO)}.")
    return ZOO[name]()


def _from_function(reference: str, trust: bool) -> keras.Model:
    if not trust:
        raise ModelFileError(
            f"There is no file {reference!r}; if it is a function, calling it runs the code of its "
            "module: pass --trust (trust=True) if you know it."
        )
    model = call(reference)
    if not isinstance(model, keras.Model):
        raise ModelFileError(f"{reference!r} returned a {type(model).__name__}, not a Keras model.")
    return model


def _check_file(path: pathlib.Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}. Pass a saved .keras model.")
    if path.is_dir():
        raise ModelFileError(
            f"{str(path)!r} is a directory; expected a .keras file. A SavedModel can be measured "
            "(bench, compare), not compressed: save the model with model.save('m.keras')."
        )
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"\x89HDF"):
        raise ModelFileError(
            f"{str(path)!r} is an HDF5 file, as Keras 2 wrote them. Convert it first: tfcompress "
            f"migrate {path.name} {path.stem}.keras"
        )
    if path.suffix != ".keras":
        raise ModelFileError(
            f"{str(path)!r} is not a .keras file. Save the model with model.save('m.keras')."
        )
    if not start.startswith(b"PK"):
        raise ModelFileError(
            f"{str(path)!r} is not a Keras model: a .keras file is a zip archive, and this begins "
            f"with {start!r}. It may have been cut off or overwritten."
        )


def _check_archive(path: pathlib.Path, trust: bool) -> str:
    """The config of the model, once the archive is known to be whole and harmless."""
    with _opened(path) as archive:
        names = set(archive.namelist())
        if not {"config.json", "metadata.json"} <= names:
            raise ModelFileError(
                f"{str(path)!r} is a zip archive without a Keras model in it: it holds "
                f"{sorted(names)[:5]}, expected config.json, metadata.json and weights."
            )
        _check_sizes(path, archive)
        damaged = archive.testzip()
        if damaged is not None:
            raise ModelFileError(f"{str(path)!r} is damaged: {damaged!r} in it cannot be read.")
        text = archive.read("config.json").decode("utf-8", "replace")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(
                f"{str(path)!r} is damaged: its config.json is no JSON: {error}."
            ) from error
        if not trust:
            _check_code(path, config)
        _check_axes(path, config, _largest_axis(path, archive))
    return text


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ModelFileError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFileError(
            f"{str(path)!r} is a damaged zip archive, not a Keras model: {error}."
        ) from error
    except Exception as error:  # zlib.error, struct.error, UnicodeDecodeError, ...
        raise ModelFileError(f"{str(path)!r} is damaged: {error}.") from error


def _check_sizes(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
    size = sum(info.file_size for info in archive.infolist())
    if size > max(_FREE_BYTES, _MAX_EXPANSION * path.stat().st_size):
        raise ModelFileError(
            f"{str(path)!r} has {path.stat().st_size:,} bytes and would unpack to {size:,}, more "
            f"than {_MAX_EXPANSION} times as many: it may be made to fill the memory. It is not "
            "loaded."
        )


def _check_code(path: pathlib.Path, config: Any) -> None:
    if any(node.get("class_name") in ("Lambda", "__lambda__") for node in _objects(config)):
        raise ModelFileError(
            f"{str(path)!r} has a Lambda layer, whose code would run in this process. Pass --trust "
            "(trust=True) if you know where the file comes from, or replace the layer by one of "
            "keras.layers or keras.ops."
        )


def _objects(config: Any) -> Iterator[dict]:
    """Every dict in nested JSON."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _largest_axis(path: pathlib.Path, archive: zipfile.ZipFile) -> int:
    """The largest axis of all weights in the file; 0 where they are stored otherwise."""
    weights = [name for name in archive.namelist() if name.endswith(".weights.h5")]
    largest = 0
    for name in weights:
        with archive.open(name) as stream, h5py.File(stream, "r") as file:
            sizes: list[int] = []
            file.visititems(
                lambda _, item, sizes=sizes: sizes.extend(getattr(item, "shape", None) or ())
            )
            largest = max([largest, *sizes])
    return largest


def _check_axes(path: pathlib.Path, config: Any, largest: int) -> None:
    """A size in the config that no weight has makes a layer that was never saved, or a bomb."""
    for node in _objects(config):
        for key, value in node.items():
            values = value if isinstance(value, list) else [value]
            for number in values:
                is_size = isinstance(number, int) and not key.endswith(("seed", "_id"))
                if is_size and abs(number) > max(_LARGE_AXIS, largest):
                    raise ModelFileError(
                        f"{str(path)!r} is damaged: its config says {key}={number:,}, and the "
                        f"largest axis of its weights is {largest:,}."
                    )


def _message(path: pathlib.Path, error: Exception) -> str:
    whole = " ".join(str(error).split())
    custom = re.search(r"Could not locate \w+ '[^']*'", whole)
    if custom:
        return (
            f"{str(path)!r} has a class or function of its own: {custom[0]}. Import the module "
            "that registers it before loading; on the command line, name a function that does so "
            "and returns the model: module:function, with --trust."
        )
    return (
        f"{str(path)!r} cannot be loaded as a Keras model. The file may be damaged, or from "
        f"another version of Keras, which says: {whole[:300] or type(error).__name__}"
    )
