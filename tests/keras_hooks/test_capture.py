"""The private Keras API that `keras_hooks/capture.py` builds on."""

import threading

import keras
import numpy as np
import tensorflow as tf

from tfcompress.keras_hooks.capture import (
    compiled_loss,
    keras_logits,
    keras_mask,
    operations,
    recording,
)


def test_keras_runs_layers_and_ops_of_a_graph_through_operation_call():
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.layers.Dense(3, name="dense")], name="inner")
    model = keras.Model(inputs, keras.ops.relu(inner(inputs) + inputs))
    x = np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
    with recording(model) as records:
        outputs = model(x)
    paths = [record.path for record in records]
    assert paths[:2] == ["inner/dense", "inner"] and len(paths) == 4
    assert records[-1].output is outputs
    np.testing.assert_allclose(records[-1].input, records[1].output + x, rtol=1e-6)
    assert not any("call" in vars(each) for _, each in operations(model))


def test_later_calls_under_a_path_are_numbered_and_others_left_out():
    shared = keras.layers.ReLU(name="shared")
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(shared(shared(inputs))))
    with recording(model, {"shared"}) as records:
        model(np.ones((1, 3)))
    assert [record.path for record in records] == ["shared", "shared#2"]


def test_calls_of_other_threads_are_not_recorded():
    model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()])
    with recording(model) as records:
        thread = threading.Thread(target=lambda: model(np.ones((1, 3))))
        thread.start(), thread.join()
        assert records == []


def test_keras_mask_is_what_an_embedding_puts_on_its_output():
    layer = keras.layers.Embedding(4, 2, mask_zero=True)
    outputs = layer(tf.constant([[1, 0]]))
    assert outputs._keras_mask is keras_mask(outputs)
    np.testing.assert_array_equal(keras_mask(outputs), [[True, False]])
    assert keras_mask(tf.ones(2)) is None


def test_keras_logits_is_what_a_softmax_was_applied_to():
    x = tf.constant([[1.0, 2.0]])
    outputs = keras.activations.softmax(x)
    assert outputs._keras_logits is keras_logits(outputs)
    np.testing.assert_array_equal(keras_logits(outputs), x)
    assert keras_logits(x) is None


def test_compile_loss_is_the_compiled_loss_alone():
    regularizer = keras.regularizers.L2(1.0)
    layer = keras.layers.Dense(2, kernel_regularizer=regularizer)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse")
    y, y_pred = tf.zeros((2, 2)), tf.constant([[1.0, 1.0], [2.0, 2.0]])
    weight = tf.constant([1.0, 0.0])
    assert model._compile_loss is not None
    assert float(compiled_loss(model, y, y_pred, weight)) == 0.5
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd")
    assert compiled_loss(model, y, y_pred) is None
