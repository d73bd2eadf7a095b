"""TFRecord files of `tf.train.Example`s."""

import functools
import pathlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfcompress.data.examples import Data, split_dataset
from tfcompress.data.files import LABELS
from tfcompress.data.images import decode

_SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec")
_LOOK_AT = 64


def is_record(path: pathlib.Path) -> bool:
    """Whether the name of a file is that of TFRecords, gzipped or not.

    >>> is_record(pathlib.Path("a.tfrecord.gz")), is_record(pathlib.Path("a.csv"))
    (True, False)
    """
    return path.name.lower().removesuffix(".gz").endswith(_SUFFIXES)


def files_in(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The TFRecord files in a folder, by name."""
    return (file for file in sorted(path.iterdir()) if is_record(file))


def read(path: pathlib.Path, source, like: keras.Model | None = None) -> Data:
    """Examples whose features have the same kind and length in each.

    A feature of bytes is an encoded image. One feature beside the label is the input; several are
    a dict by name.

    Args:
        path: A file, or a folder of files, of which those that begin with `val` or `test` are for
            validation.
        source: See `Source`.
        like: The model, whose input says the shape of an example and the size of images.

    Returns:
        `Data` of datasets of batches.

    Raises:
        ValueError: The files are damaged or hold something else; the message names the feature.
    """
    files = [path] if path.is_file() else list(files_in(path))
    held_back = [file for file in files if path.is_dir() and file.name.startswith(("val", "test"))]
    training = [file for file in files if file not in held_back]
    if not training:
        raise ValueError(f"All files in {str(path)!r} are for validation: {files}.")
    raw = _records(path, training)
    features = _features(path, raw)
    label = _label(path, features, source.label)
    parse = functools.partial(_parse, features, label, _form(path, features, label, source, like))
    train = raw.map(parse).batch(32)
    if held_back:
        return Data(train, _records(path, held_back).map(parse).batch(32), str(path))
    count = int(raw.cardinality())
    return Data(*split_dataset(train, source.validation_split, count), source=str(path))


def _records(path: pathlib.Path, files: Sequence[pathlib.Path]) -> tf.data.Dataset:
    kinds = {"GZIP" if file.suffix == ".gz" else "" for file in files}
    if len(kinds) != 1:
        raise ValueError(f"Some files in {str(path)!r} are gzipped and some are not.")
    dataset = tf.data.TFRecordDataset([str(file) for file in files], compression_type=kinds.pop())
    try:
        count = sum(1 for _ in dataset)
    except tf.errors.OpError as error:
        raise ValueError(
            f"{str(path)!r} is not a TFRecord file, or damaged: {_first(error)}."
        ) from error
    if not count:
        raise ValueError(f"{str(path)!r} holds no record.")
    return dataset.apply(tf.data.experimental.assert_cardinality(count))


def _first(error: tf.errors.OpError) -> str:
    return error.message.splitlines()[0]


def _features(path: pathlib.Path, raw: tf.data.Dataset) -> dict[str, tf.io.FixedLenFeature]:
    """What the first examples have in common."""
    forms: dict[str, set] = {}
    for record in raw.take(_LOOK_AT):
        for name, form in _example(path, record.numpy()).items():
            forms.setdefault(name, set()).add(form)
    uneven = sorted(name for name, found in forms.items() if len(found) != 1)
    if uneven or not forms:
        raise ValueError(
            f"The features {uneven} of {str(path)!r} do not have the same kind and length in every "
            "example; pad them, or read the file yourself and pass a tf.data.Dataset."
        )
    return {
        name: tf.io.FixedLenFeature([length] if length != 1 else [], kind)
        for name, ((kind, length),) in forms.items()
    }


def _example(path: pathlib.Path, record: bytes) -> dict[str, tuple]:
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # google.protobuf.message.DecodeError, of whichever protobuf it is.
        raise ValueError(f"{str(path)!r} holds no tf.train.Example: {error}.") from error
    dtypes = {"bytes_list": tf.string, "float_list": tf.float32, "int64_list": tf.int64}
    found = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        if kind is not None:
            found[name] = dtypes[kind], len(getattr(feature, kind).value)
    return found


def _label(path: pathlib.Path, features, wanted: str | None) -> str:
    usual = [name for name in features if name.split("/")[-1].lower() in LABELS]
    if wanted is None and len(usual) != 1:
        raise ValueError(
            f"It is not known which of {sorted(features)} in {str(path)!r} is the label; name it "
            "as label."
        )
    label = wanted or usual[0]
    if label not in features or features[label].dtype == tf.string or len(features) < 2:
        raise ValueError(
            f"{str(path)!r} has no feature {label!r} of numbers beside others; it has "
            f"{sorted(features)}."
        )
    return label


def _form(path, features, label, source, like) -> tuple:
    """The shape of one example, as far as the model says it."""
    shape = getattr(like, "input_shape", None)
    known = tuple(shape[1:]) if isinstance(shape, tuple) else None
    if known is not None and source.image_size is not None and len(known) == 3:
        known = (*source.image_size, known[2])
    has_image = any(f.dtype == tf.string for name, f in features.items() if name != label)
    if has_image and known is None:
        known = (*(source.image_size or (None, None)), 3)
    if has_image and (len(known) != 3 or None in known):
        raise ValueError(
            f"The size of the images in {str(path)!r} is not known. Pass image_size, e.g. [96, 96]."
        )
    return known, source.scale


def _parse(features, label, form, record):
    parsed = tf.io.parse_single_example(record, features)
    y = parsed.pop(label)
    shape, scale = form
    values = {name: _value(value, shape, scale) for name, value in parsed.items()}
    return (next(iter(values.values())) if len(values) == 1 else values), y


def _value(value, shape, scale):
    if value.dtype == tf.string:
        image = decode(value, shape[2])
        return tf.ensure_shape(tf.image.resize(image, shape[:2]), shape) * scale
    size = 1
    for dimension in shape or ():
        size *= dimension or 0
    return tf.reshape(value, shape) if shape and value.shape.num_elements() == size else value
