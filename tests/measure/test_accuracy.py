import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.measure import accuracy, forward, max_abs_diff

X = np.eye(4, dtype=np.float32)
Y = np.array([0, 1, 2, 0])


def identity(x):
    return x


@pytest.mark.parametrize(
    "labels", [Y, Y[:, None], np.eye(4)[Y]], ids=["sparse", "column", "one-hot"]
)
def test_labels_may_be_indices_or_one_hot(labels):
    assert accuracy(identity, (X, labels)) == 0.75


def test_a_dataset_counts_examples_not_batches():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(3)
    assert accuracy(identity, data) == 0.75


def test_more_examples_than_one_batch():
    x, y = np.tile(X, (150, 1)), np.tile(Y, 150)
    y[-1] = 3
    assert accuracy(identity, (x, y)) == (450 + 1) / 600


def test_every_position_of_a_sequence_counts():
    assert accuracy(identity, (X[None], Y[None])) == 0.75


def test_a_keras_model_runs_in_inference_mode():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.9)])
    assert accuracy(model, (X, np.arange(4))) == 1.0


def test_several_inputs():
    first, second = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([first, second], keras.layers.Add()([first, second]))
    assert accuracy(model, ([X, X], Y)) == 0.75


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one output a class.*\(4, 1\)"):
        accuracy(lambda x: x[:, :1], (X, Y))
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected \(4,\)"):
        accuracy(identity, (X, np.zeros((4, 3))))
    with pytest.raises(ValueError, match="no examples"):
        accuracy(identity, [])
    with pytest.raises(ValueError, match="pair of arrays"):
        accuracy(identity, 3)


def test_max_abs_diff_is_over_all_outputs():
    def two(x):
        return {"a": x, "b": x + 1}

    def other(x):
        return {"a": x, "b": x + 3}

    assert max_abs_diff(two, other, X) == 2.0
    with pytest.raises(ValueError, match="shapes"):
        max_abs_diff(identity, two, X)


def test_a_nan_is_a_difference():
    assert np.isnan(max_abs_diff(identity, lambda x: x * np.nan, X))


def test_forward_refuses_what_cannot_run():
    with pytest.raises(TypeError, match="'m.tflite' was passed. Open a file"):
        forward("m.tflite")
