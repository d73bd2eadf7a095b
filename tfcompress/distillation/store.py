"""Arrays that are filled batch by batch, in memory or in files."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from tfcompress.artefact import replacing

MANIFEST = "cache.json"


class Memory:
    """Arrays in memory.

    Args:
        size: How many rows each of them has.
    """

    def __init__(self, size: int):
        self.size, self.arrays = size, {}

    def __call__(self, rows: slice, found: dict[str, np.ndarray]) -> None:
        """Put these rows into the arrays of these names."""
        for name, values in found.items():
            if name not in self.arrays:
                self.arrays[name] = self.make(name, (self.size, *values.shape[1:]), values.dtype)
            array = self.arrays[name]
            if values.shape[1:] != array.shape[1:]:
                raise ValueError(
                    f"{name!r} has the shape {array.shape[1:]} in one batch and {values.shape[1:]} "
                    "in another, and a cache keeps one array of it. Pad the inputs to one length, "
                    "or cache what does not depend on it, e.g. the logits."
                )
            array[rows] = values

    def make(self, name, shape, dtype):
        """A new array."""
        return np.empty(shape, dtype)

    def finish(self, manifest: dict) -> dict[str, np.ndarray]:
        """The arrays, when all rows are there."""
        return self.arrays


class Disk(Memory):
    """Arrays in `.npy` files of one directory."""

    def __init__(self, size, directory):
        super().__init__(size)
        self.directory, self.files = directory, {}

    def make(self, name, shape, dtype):
        """A new file."""
        self.files[name] = f"{len(self.files)}.npy"
        return np.lib.format.open_memmap(
            self.directory / self.files[name], mode="w+", dtype=dtype, shape=shape
        )

    def finish(self, manifest):
        """The arrays; the manifest is written."""
        for array in self.arrays.values():
            array.flush()
        manifest["files"] = self.files
        with replacing(self.directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return self.arrays


@contextlib.contextmanager
def writer(path: str | os.PathLike | None, size: int) -> Iterator[Memory]:
    """Something to put arrays into; a directory appears under its name when all is written.

    Args:
        path: The directory; None for memory.
        size: How many rows there will be.

    Yields:
        A `Memory`.

    Raises:
        ValueError: The directory is in use.
    """
    if path is None:
        yield Memory(size)
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
        disk = Disk(size, inner)
        yield disk
        os.replace(inner, path)
        disk.arrays.update(
            (name, np.load(path / file, mmap_mode="r")) for name, file in disk.files.items()
        )
