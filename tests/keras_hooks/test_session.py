"""What hangs on a model during `fit` is gone afterwards, whatever happens."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.models import classification, compile_classifier, kernels, mlp


def hooks(model):
    """Everything of ours that hangs on a model."""
    names = ("make_train_function", "compression_state", "compute_loss")
    return [name for name in names if name in vars(model)] + [
        "apply" for _ in range("apply" in vars(model.optimizer))
    ]


class Fails(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise RuntimeError("a callback fails")


class FailsInStep(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.fails = keras.Variable(False, dtype="bool", trainable=False)

    def call(self, x):
        return x + tf.cond(
            self.fails.value, lambda: tf.strings.to_number("the step fails"), lambda: 0.0
        )


def test_nothing_is_left_after_fit():
    model = compile_classifier(mlp())
    x, y = classification()
    callbacks = [tfc.callbacks.Pruning(0.5), tfc.callbacks.L1Regularization(1e-3)]
    model.fit(x, y, verbose=0, callbacks=callbacks)
    assert hooks(model) == []
    assert model.layers[0].kernel.regularizer is None
    before = kernels(model)
    model.fit(x, y, verbose=0)
    assert all((w != 0).all() for w in kernels(model).values())
    assert any((w == 0).any() for w in before.values())


def test_what_raises_in_the_step_detaches_at_once():
    failing = FailsInStep()
    model = compile_classifier(keras.Sequential([*mlp().layers, failing]))
    x, y = classification()
    failing.fails.assign(True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="the step fails"):
        model.fit(x, y, verbose=0, callbacks=[tfc.callbacks.Pruning(0.5)])
    assert hooks(model) == []


def test_what_raises_elsewhere_is_cleaned_up_by_the_next_fit():
    model = compile_classifier(mlp())
    x, y = classification()
    with pytest.raises(RuntimeError, match="a callback fails"):
        model.fit(x, y, verbose=0, callbacks=[tfc.callbacks.Pruning(0.5), Fails()])
    assert hooks(model) != []
    model.fit(x, y, verbose=0)
    assert hooks(model) == []
    assert all((w != 0).all() for w in kernels(model).values())


def test_a_callback_can_be_used_again_after_a_failure():
    model = compile_classifier(mlp())
    x, y = classification()
    pruning = tfc.callbacks.Pruning(0.5)
    with pytest.raises(RuntimeError, match="a callback fails"):
        model.fit(x, y, verbose=0, callbacks=[pruning, Fails()])
    model.fit(x, y, verbose=0, callbacks=[pruning])
    assert [int((w == 0).sum()) for w in kernels(model).values()] == [96, 24]
    assert hooks(model) == []


def test_a_custom_loop_attaches_in_a_block():
    model = compile_classifier(mlp())
    x, y = classification()
    optimizer = keras.optimizers.Adam()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pruning = tfc.callbacks.Pruning(0.75)
    with pruning.attached(model, optimizer):

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True))
            variables = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))

        for _ in range(3):
            step()
    assert [int((w == 0).sum()) for w in kernels(model).values()] == [144, 36]
    assert hooks(model) == []
    assert "apply" not in vars(optimizer)


def test_a_block_that_raises_detaches():
    model = compile_classifier(mlp())
    with pytest.raises(KeyError), tfc.callbacks.Pruning(0.5).attached(model):
        raise KeyError
    assert hooks(model) == []


def test_a_model_without_an_optimizer_is_refused():
    with (
        pytest.raises(ValueError, match="has none. Call model.compile"),
        tfc.callbacks.Pruning(0.5).attached(mlp()),
    ):
        pass


def test_train_on_batch_works_inside_a_block():
    model = compile_classifier(mlp())
    x, y = classification()
    with tfc.callbacks.Pruning(0.5).attached(model):
        for _ in range(3):
            model.train_on_batch(x, y)
        np.testing.assert_array_equal((model.layers[0].kernel.numpy() == 0).sum(), 96)
