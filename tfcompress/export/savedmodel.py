"""Export to a SavedModel (a directory), and TensorFlow as what runs it."""

import functools
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tfcompress.artefact import Format, Tensor, register_format, replacing_directory
from tfcompress.export.program import Program
from tfcompress.export.target import NamedRunner, Target

_FILE = "saved_model.pb"


def _write(program: Program, precision: str, path: pathlib.Path, workspace: pathlib.Path) -> None:
    program.save(path)


class SavedModelRunner(NamedRunner):
    """Runs the signature `serving_default` of a SavedModel.

    Args:
        path: A SavedModel directory.
        num_threads: Not used: TensorFlow has one pool of threads for the whole process, which
            `tf.config.threading` sets before the first operation.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = 1):
        _check(pathlib.Path(path))
        self._loaded = tf.saved_model.load(str(path))
        if "serving_default" not in self._loaded.signatures:
            raise ValueError(
                f"{str(path)!r} has no signature 'serving_default', it has "
                f"{sorted(self._loaded.signatures)}. Export the model again with tfcompress.export."
            )
        signature = self._loaded.signatures["serving_default"]
        specs = signature.structured_input_signature[1]
        known = getattr(self._loaded, "input_names", None)  # Written by `Program.save`.
        names = sorted(specs) if known is None else [name.decode() for name in known.numpy()]
        super().__init__(
            pathlib.Path(path),
            {name: specs[name].dtype.as_numpy_dtype for name in names},
            list(signature.structured_outputs),
            lambda batch: {
                name: value.numpy()
                for name, value in signature(
                    **{name: tf.convert_to_tensor(array) for name, array in batch.items()}
                ).items()
            },
        )


def _check(path: pathlib.Path) -> None:
    if not (path / _FILE).is_file():
        raise ValueError(
            f"{str(path)!r} is not a SavedModel: it is not a directory with a {_FILE!r} in it. "
            "Export the model again, e.g. tfcompress.export(model, 'directory')."
        )


def _tensors(path: pathlib.Path) -> Iterator[Tensor]:
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    for index, name in enumerate(sorted(reader.get_variable_to_dtype_map())):
        if reader.get_variable_to_dtype_map()[name].is_floating:
            array = np.asarray(reader.get_tensor(name))
            yield Tensor(name, str(array.dtype), array.shape, index, array)


TARGET = Target(
    format="savedmodel",
    title="a SavedModel",
    precisions=("float32", "int8"),
    write=_write,
    float_operators=lambda path: (),
    steps=2.0,
    replacing=functools.partial(replacing_directory, holds=_FILE, kind="a SavedModel"),
)
register_format(
    Format(
        name="savedmodel",
        suffix="",
        check=_check,
        runner=SavedModelRunner,
        tensors=_tensors,
    )
)
