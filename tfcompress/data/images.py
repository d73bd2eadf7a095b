"""Folders of images, one for each class."""

import functools
import pathlib

import keras
import tensorflow as tf

from tfcompress.data.examples import Data

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "val", "valid", "test")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif"}


def read(path: pathlib.Path, source, like: keras.Model | None = None) -> Data:
    """A folder with a folder for each class, or with those in `train` and `validation`.

    Args:
        path: The folder.
        source: See `Source`: `image_size`, `scale`, `validation_split`, `seed`.
        like: The model, whose input says the size and the number of colours.

    Returns:
        `Data` of datasets of batches: float32 images of shape (batch, height, width, colours),
        their values in [0, 255] times `source.scale`; and class indices.

    Raises:
        ValueError: There are less than two classes, a class has no image, a file is no image, or
            the size is not known.
    """
    size, colours = _form(path, source, like)
    train, validation = _folder(path, _TRAIN), _folder(path, _VALIDATION)
    if train is not None and validation is not None:
        parts = [_read(each, size, colours) for each in (train, validation)]
        if parts[0].class_names != parts[1].class_names:
            raise ValueError(
                f"{str(train)!r} has the classes {parts[0].class_names} and {str(validation)!r} "
                f"{parts[1].class_names}; expected the same."
            )
    else:
        split = {"validation_split": source.validation_split, "seed": source.seed}
        parts = _read(train or path, size, colours, subset="both", **split)
    scaled = [part.map(functools.partial(_scale, source.scale)) for part in parts]
    return Data(*scaled, source=str(path), classes=tuple(parts[0].class_names))


def _scale(scale, image, label):
    return image * scale, label


def _folder(path: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _form(path, source, like) -> tuple[tuple[int, int], int]:
    shape = getattr(like, "input_shape", None)
    known = shape if isinstance(shape, tuple) and len(shape) == 4 else (None,) * 3 + (3,)
    size = source.image_size or tuple(known[1:3])
    if None in size:
        raise ValueError(
            f"The size of the images in {str(path)!r} is not known: the model takes any. Pass "
            "image_size, e.g. [96, 96]."
        )
    return size, known[3] or 3


def _read(path: pathlib.Path, size, colours: int, **split):
    _check(path)
    try:
        return keras.utils.image_dataset_from_directory(
            path,
            image_size=size,
            batch_size=32,
            color_mode="grayscale" if colours == 1 else "rgb",
            shuffle=bool(split),
            verbose=False,
            **split,
        )
    except ValueError as error:
        raise ValueError(f"Cannot read the images in {str(path)!r}: {error}") from error


def _check(path: pathlib.Path) -> None:
    folders = sorted(each for each in path.iterdir() if each.is_dir())
    empty = [each.name for each in folders if not any(_images(each))]
    if len(folders) < 2 or empty:
        found = f"no image in {empty}" if empty else f"{len(folders)} folders"
        raise ValueError(
            f"{str(path)!r} has {found}; expected a folder for each of two or more classes, with "
            f"images ({', '.join(sorted(_SUFFIXES))}) in it."
        )
    for file in (image for folder in folders for image in _images(folder)):
        _check_header(file)


def _images(folder: pathlib.Path):
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _SUFFIXES)


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8")


def _check_header(file: pathlib.Path) -> None:
    with open(file, "rb") as stream:
        start = stream.read(8)
    if not start.startswith(_MAGIC):
        raise ValueError(
            f"{str(file)!r} is not an image, whatever its suffix says. Take it out of the folder."
        )


def decode(content: tf.Tensor, channels: int) -> tf.Tensor:
    """An encoded image as float32 in [0, 255], of shape (height, width, channels)."""
    image = tf.io.decode_image(content, channels=channels, expand_animations=False)
    return tf.cast(image, tf.float32)
