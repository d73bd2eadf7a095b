"""Data of one's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models import mlp
from tfcompress.data import Source, as_data, load

ROWS = "a,b,label\n" + "".join(f"{i},{-i},{'cat' if i % 2 else 'dog'}\n" for i in range(20))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_csv(tmp_path):
    data = load(write(tmp_path / "d.csv", ROWS))
    assert data.train[0].shape == (16, 2)
    assert data.train[0].dtype == np.float32
    assert data.classes == ("cat", "dog")
    # The split keeps the share of each class, and no row is in both parts.
    assert np.bincount(data.validation[1]).tolist() == [2, 2]
    first = np.concatenate([data.train[0][:, 0], data.validation[0][:, 0]])
    assert sorted(first) == list(range(20))
    for x, y in (data.train, data.validation):
        np.testing.assert_array_equal(y, 1 - x[:, 0] % 2)


def test_csv_of_numbers_to_predict(tmp_path):
    rows = "x,target\n" + "".join(f"{i},{i / 2}\n" for i in range(10))
    data = load(write(tmp_path / "d.csv", rows))
    assert data.train[1].dtype == np.float32
    np.testing.assert_array_equal(data.train[1], data.train[0] / 2)
    whole = "x,target\n" + "".join(f"{i},{i}\n" for i in range(10))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    assert load(write(tmp_path / "d.csv", whole), like=model).train[1].shape == (8, 1)


def test_a_column_is_named_as_label(tmp_path):
    path = write(tmp_path / "d.csv", "a,b,label\n" + "1,0,5\n2,1,6\n" * 10)
    data = load(Source(path, label="b"))
    np.testing.assert_array_equal(data.train[1], data.train[0][:, 0] - 1)
    with pytest.raises(ValueError, match="has no 'c'"):
        load(Source(path, label="c"))


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "has 0 lines"),
        ("a,label\n", "has 1 lines"),
        ("a,a\n1,2\n", "twice"),
        ("a,label\n1,2\n1\n", "row 3: 1 values"),
        ("a,label\n1,2\nx,2\n", "row 3, column 'a': 'x' is not a number"),
        ("a,label\n1,2\n,2\n", "row 3, column 'a': '' is not a number"),
        ("label\n1\n2\n", "expected features"),
        ("a,label\n1,2\n", "cannot be split"),
        ('a,label\n"1,2\n', "not a CSV"),
    ],
)
def test_csv_files_that_are_none(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path / "d.csv", text))


def test_npz(tmp_path):
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    data = load(str(tmp_path / "a.npz"))
    assert len(data.train[1]) == 16
    assert data.train[0].dtype == np.float32
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    data = load(str(tmp_path / "b.npz"))
    assert (len(data.train[1]), len(data.validation[1])) == (20, 5)
    ids = {"x_train.token_ids": x.astype(int), "x_train.padding_mask": x > 3, "y_train": y}
    np.savez(tmp_path / "c.npz", **ids)
    assert set(load(str(tmp_path / "c.npz")).train[0]) == {"token_ids", "padding_mask"}


@pytest.mark.parametrize(
    "arrays, match",
    [
        ({"a": np.zeros(3)}, "expected x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, r"\[3, 4\] examples"),
        ({"x": np.zeros((3, 2)), "y": np.array(["a", "b", "c"])}, "arrays of numbers"),
        ({"x": np.array([{}, {}], object), "y": np.zeros(2)}, "plain arrays"),
    ],
)
def test_npz_files_with_other_arrays(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load(str(tmp_path / "a.npz"))


def test_damaged_npz_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 2)), y=np.zeros(30))
    content = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", b"PK", content[:100], content[: len(content) // 2], b"\0" * 50):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="not an NPZ file"):
            load(str(tmp_path / "a.npz"))


def record(**features):
    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))

    made = {name: feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString()


def write_records(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for each in records:
            writer.write(each)
    return str(path)


def test_records(tmp_path):
    rows = [record(point=[float(i)] * 12, label=i % 3) for i in range(50)]
    data = load(write_records(tmp_path / "d.tfrecord", rows), like=mlp())
    (train, y), *_ = data.train
    assert train.shape == (32, 12)
    np.testing.assert_array_equal(y, train[:, 0] % 3)
    parts = [[float(v) for x, _ in part for v in x[:, 0]] for part in (data.train, data.validation)]
    assert [len(part) for part in parts] == [40, 10]
    assert sorted(parts[0] + parts[1]) == list(range(50))
    assert data.num_batches(8) == 5
    model = mlp()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(**data.fit_arguments(8), epochs=2, verbose=0)
    assert len(history.history["val_loss"]) == 2
    assert data.inputs(35).shape == (35, 12)


def test_records_of_images_in_a_folder(tmp_path):
    image = tf.io.encode_png(np.full((6, 8, 3), 9, np.uint8)).numpy()
    for name in ("train-0", "train-1", "val-0"):
        write_records(tmp_path / f"{name}.tfrecord", [record(image=image, label=1)] * 3)
    data = load(Source(str(tmp_path), image_size=(4, 4), scale=0.5))
    (x, y), *_ = data.train
    assert x.shape == (6, 4, 4, 3)
    assert float(np.max(x)) == 4.5
    assert len(next(iter(data.validation))[1]) == 3


@pytest.mark.parametrize(
    "records, match",
    [
        ([], "no record"),
        ([b"no example\xff"] * 3, "no tf.train.Example"),
        ([record(a=[1.0], label=1), record(a=[1.0, 2.0], label=1)], "same kind and length"),
        ([record(a=[1.0], b=2)], "which of"),
        ([record(label=1)], "beside others"),
    ],
)
def test_records_of_another_kind(tmp_path, records, match):
    with pytest.raises(ValueError, match=match):
        load(write_records(tmp_path / "d.tfrecord", records))


def test_damaged_records(tmp_path):
    path = tmp_path / "d.tfrecord"
    write_records(path, [record(a=[1.0], label=1)] * 5)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        load(str(path))


def image_folder(path, classes=("cat", "dog"), count=5):
    for value, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            image = np.full((6, 6, 3), 100 * value, np.uint8)
            (path / name / f"{i}.png").write_bytes(tf.io.encode_png(image).numpy())


def test_images(tmp_path):
    image_folder(tmp_path)
    model = keras.Sequential([keras.Input((4, 5, 3)), keras.layers.Flatten()])
    data = load(Source(str(tmp_path), scale=0.01), like=model)
    assert data.classes == ("cat", "dog")
    (x, y), *_ = data.train
    assert x.shape[1:] == (4, 5, 3)
    np.testing.assert_allclose(np.max(x, axis=(1, 2, 3)), y, atol=1e-6)
    assert data.num_batches(4) == 2


def test_images_in_train_and_validation(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", count=2)
    data = load(Source(str(tmp_path), image_size=(4, 4)))
    assert [sum(len(y) for _, y in part) for part in (data.train, data.validation)] == [10, 4]


def test_folders_without_classes_or_images(tmp_path):
    with pytest.raises(ValueError, match="size of the images"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="0 folders"):
        load(Source(str(tmp_path), image_size=(4, 4)))
    image_folder(tmp_path)
    (tmp_path / "cat" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match="0.png' is not an image"):
        load(Source(str(tmp_path), image_size=(4, 4)))


def test_references(tmp_path):
    with pytest.raises(FileNotFoundError, match="zoo:mnist5k"):
        load(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="Cannot tell"):
        load(write(tmp_path / "a.txt", "x"))
    with pytest.raises(ValueError, match="mnist5k"):
        load("zoo:mnist")
    with pytest.raises(ValueError, match="--trust"):
        load("tests.models:classification")
    assert len(load("tests.models:classification", trust=True).train[1]) > 60
    with pytest.raises(ValueError, match="Cannot find"):
        load("tests.models:nothing", trust=True)


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"d.csv gives .*\(16, 2\).*takes \(None, 12\)"):
        load(write(tmp_path / "d.csv", ROWS), like=mlp())


def test_whatever_a_user_has_at_hand():
    x, y = np.zeros((10, 4), "float32"), np.arange(10) % 2
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    assert as_data((x, y)).num_batches(4) == 2
    assert len(as_data(((x, y), (x[:3], y[:3]))).validation[1]) == 3
    assert as_data(batches).num_batches(4) == 2
    assert as_data((batches, batches)).num_batches(5) == 2
    for wrong in (x, "text", (x, y[:3]), 3):
        with pytest.raises(ValueError):
            as_data(wrong)
