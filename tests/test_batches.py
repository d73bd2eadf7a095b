"""Every kind of data as a stream of inputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.batches import calibration_batches, first_batch, input_batches, limited

X = np.arange(10, dtype=np.float64).reshape(5, 2)
Y = np.zeros(5)


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X[2 * index : 2 * index + 2], Y[:2]


SOURCES = {
    "array": X,
    "tensor": tf.constant(X),
    "inputs and targets": (X, Y),
    "dataset": tf.data.Dataset.from_tensor_slices((X, Y)).batch(2),
    "generator": (X[i : i + 2] for i in (0, 2, 4)),
    "function": lambda: ((X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)),
    "list of batches": [(X[:2], Y[:2]), (X[2:4], Y[2:4]), (X[4:], Y[4:])],
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_inputs_in_float32(source):
    batches = list(input_batches(SOURCES[source], batch_size=2))
    np.testing.assert_array_equal(np.concatenate(batches), X)
    assert all(batch.dtype == np.float32 for batch in batches)


def test_a_keras_dataset_is_read_by_index():
    np.testing.assert_array_equal(np.concatenate(list(input_batches(Data()))), X[:4])


def test_structures_are_sliced_together():
    first, *_ = input_batches({"a": X, "b": Y.astype("int32")}, batch_size=3)
    assert first["a"].shape == (3, 2)
    assert first["b"].dtype == np.int32


def test_the_first_batch_of_arrays_is_all_of_them():
    assert first_batch((X, Y)).shape == (5, 2)
    with pytest.raises(ValueError, match="holds no batch"):
        first_batch(iter([]))


def test_limited_reads_no_further_than_it_must():
    taken = []
    source = (taken.append(i) or X for i in range(9))
    assert sum(len(batch) for batch in limited(source, 6)) == 10
    assert len(taken) <= 3


def test_other_things_are_refused():
    with pytest.raises(ValueError, match="Expected arrays, a tf.data.Dataset or an iterable"):
        list(input_batches(3))


def one_input():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def two_inputs():
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((1,), name="b")}
    return keras.Model(inputs, keras.layers.Concatenate()(list(inputs.values())))


@pytest.mark.parametrize("source", ["array", "dataset", "list of batches"])
def test_calibration_data_that_fits_the_model_is_passed_on(source):
    batches = list(calibration_batches(one_input(), SOURCES[source]))
    np.testing.assert_array_equal(np.concatenate(batches), X)


def test_calibration_data_fits_by_name_and_up_to_a_last_axis_of_1():
    assert list(calibration_batches(two_inputs(), {"a": X, "b": X[:, 0], "more": Y}))
    assert list(calibration_batches(two_inputs(), [X, X[:, 0]]))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (one_input, [X, X], r"batches of \[\(5, 2\), \(5, 2\)\], and .* takes \(None, 2\)"),
        (one_input, X[:, :1], r"batches of \(5, 1\), and .* takes \(None, 2\)"),
        (one_input, tf.data.Dataset.from_tensor_slices(X), r"batches of \(2,\), and"),
        (one_input, X.tolist(), "with the axis of the batch"),
        (one_input, "abc", r"batches of \(\), and"),
        (two_inputs, {"a": X}, r"batches of {'a': \(5, 2\)}, and .*'b': \(None, 1\)"),
        (one_input, tf.data.Dataset.from_tensors(X).repeat(), "repeats forever"),
    ],
)
def test_calibration_data_that_does_not_fit_is_refused(model, data, message):
    with pytest.raises(ValueError, match=message):
        list(calibration_batches(model(), data))
