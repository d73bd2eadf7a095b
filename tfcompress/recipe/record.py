"""The recipe that made a model, in the model, in its `.keras` file, and in exported files.

In a model it is a layer without weights that hangs on an attribute; Keras walks the attributes when
it saves, and lets each save assets of its own. A file that was exported keeps it where its format
has a place for such things: a zip archive behind a LiteRT file, as the metadata of these is packed
(https://ai.google.dev/edge/litert/models/metadata), a property of an ONNX model, `rt_info` in the
XML of OpenVINO, `assets.extra` in a SavedModel.
"""

import json
import os
import pathlib
import shutil
import xml.etree.ElementTree
import zipfile
from typing import Any

import keras

from tfcompress.artefact import Artefact, replacing
from tfcompress.optional import require

_ATTRIBUTE = "compression_recipe"
_FILE = "tfcompress_recipe.json"
_IN_KERAS = f"assets/{_ATTRIBUTE}/{_FILE}"
_KEY = "tfcompress_recipe"
_MAX_BYTES = 1_000_000


@keras.saving.register_keras_serializable(package="tfcompress")
class _Record(keras.layers.Layer):
    """Holds what was done to the model that it hangs on."""

    def __init__(self, values: Any = None, **kwargs):
        super().__init__(**kwargs)
        self.content = json.dumps(values)

    def save_assets(self, directory):
        """Called by Keras when the model is saved."""
        pathlib.Path(directory, _FILE).write_text(self.content, encoding="utf-8")

    def load_assets(self, directory):
        """Called by Keras when weights are loaded; a file without a recipe is fine."""


def attach(model: keras.Model, values: Any) -> keras.Model:
    """Let a model carry the recipe that made it, also into the files that it is saved to.

    Args:
        model: A model.
        values: The recipe as nested dicts, lists and scalars.

    Returns:
        The same model.
    """
    # Not by setattr: a layer that Keras tracks would be one of the model's.
    model.__dict__[_ATTRIBUTE] = _Record(values, name=_ATTRIBUTE)
    return model


def attached(model: keras.Model) -> Any:
    """The values that `attach` was given; None without any."""
    found = model.__dict__.get(_ATTRIBUTE)
    return None if found is None else json.loads(found.content)


def attach_from(model: keras.Model, path: pathlib.Path) -> keras.Model:
    """Attach what the file has that the model was loaded from; Keras has no place to put it."""
    values = read(path)
    return model if values is None else attach(model, values)


def read(path: str | os.PathLike) -> Any:
    """The recipe in a file.

    Args:
        path: A `.keras` file or one that `tfcompress.export` wrote and `write` marked.

    Returns:
        Nested values; None without a recipe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: What is there is no JSON.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    text = _READERS.get(path.suffix, _from_directory)(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The recipe in {str(path)!r} is damaged: {error}.") from error


def write(artefact: Artefact, values: Any) -> None:
    """Put a recipe into an exported file; the file is replaced as a whole.

    Args:
        artefact: What `tfcompress.export` returned.
        values: The recipe as nested dicts, lists and scalars.
    """
    text = json.dumps(values)
    if artefact.format == "savedmodel":
        folder = artefact.path / "assets.extra"
        folder.mkdir(exist_ok=True)
        with replacing(folder / _FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    with replacing(artefact.path) as temporary:
        _WRITERS[artefact.format](artefact.path, temporary, text)


def _from_zip(name: str):
    def read_member(path: pathlib.Path) -> str | None:
        try:
            with zipfile.ZipFile(path) as archive:
                if name not in archive.namelist() or archive.getinfo(name).file_size > _MAX_BYTES:
                    return None
                return archive.read(name).decode("utf-8", "replace")
        except zipfile.BadZipFile:
            return None  # A LiteRT file without anything behind it.

    return read_member


def _from_onnx(path: pathlib.Path) -> str | None:
    model = require("onnx", extra="onnx").load(str(path), load_external_data=False)
    return next((each.value for each in model.metadata_props if each.key == _KEY), None)


def _from_xml(path: pathlib.Path) -> str | None:
    found = xml.etree.ElementTree.parse(path).getroot().find(f"rt_info/{_KEY}")
    return None if found is None else found.get("value")


def _from_directory(path: pathlib.Path) -> str | None:
    file = path / "assets.extra" / _FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _to_litert(path: pathlib.Path, temporary: pathlib.Path, text: str) -> None:
    shutil.copyfile(path, temporary)
    # Appending keeps every offset in the flatbuffer, and zip archives are read from their end.
    with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_FILE, text)


def _to_onnx(path: pathlib.Path, temporary: pathlib.Path, text: str) -> None:
    onnx = require("onnx", extra="onnx")
    model = onnx.load(str(path), load_external_data=False)
    model.metadata_props.add(key=_KEY, value=text)
    onnx.save(model, str(temporary))


def _to_openvino(path: pathlib.Path, temporary: pathlib.Path, text: str) -> None:
    tree = xml.etree.ElementTree.parse(path)
    root = tree.getroot()
    info = root.find("rt_info")
    info = xml.etree.ElementTree.SubElement(root, "rt_info") if info is None else info
    xml.etree.ElementTree.SubElement(info, _KEY, value=text)
    tree.write(temporary, encoding="utf-8", xml_declaration=True)


_READERS = {
    ".keras": _from_zip(_IN_KERAS),
    ".tflite": _from_zip(_FILE),
    ".onnx": _from_onnx,
    ".xml": _from_xml,
}
_WRITERS = {"litert": _to_litert, "onnx": _to_onnx, "openvino": _to_openvino}
