import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models import classification, compile_classifier, mlp
from tfcompress.keras_hooks.update import around_gradients, variable_key

OPTIMIZERS = ["SGD", "Adam", "AdamW", "Muon", "Lion", "RMSprop", "Adafactor"]


def record(optimizer):
    seen = []

    def change(key, gradient, variable):
        seen.append((key, np.asarray(gradient), np.asarray(variable)))
        return gradient

    return seen, around_gradients(optimizer, change)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_step_is_called_once_a_weight_with_the_weight_before_the_update(name):
    optimizer = getattr(keras.optimizers, name)(learning_rate=0.1)
    weights = [keras.Variable(np.ones((3, 2), "float32")), keras.Variable([1.0, 2.0])]
    seen, remove = record(optimizer)
    gradients = [keras.ops.ones((3, 2)), keras.ops.ones((2,))]
    optimizer.apply(gradients, weights)
    assert [key for key, _, _ in seen] == [variable_key(optimizer, weight) for weight in weights]
    np.testing.assert_allclose(seen[0][2], np.ones((3, 2)), atol=1e-3)  # Decayed by AdamW, Muon.
    assert np.abs(weights[0].numpy() - 1).min() > 1e-3
    remove()
    optimizer.apply(gradients, weights)
    assert len(seen) == 2 and "update_step" not in vars(optimizer)


def test_the_gradient_is_clipped_and_accumulated():
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, global_clipnorm=1.0)
    weight = keras.Variable([0.0, 0.0])
    optimizer.build([weight])
    seen = keras.Variable([0.0, 0.0])

    def change(key, gradient, variable):
        seen.assign_add(gradient)
        return gradient

    around_gradients(optimizer, change)
    step = tf.function(lambda gradient: optimizer.apply([gradient], [weight]))
    for gradient in ([9.0, 0.0], [-3.0, 8.0]):
        step(tf.constant(gradient))
    np.testing.assert_allclose(seen.numpy(), [0.6, 0.8], rtol=1e-6)  # (3, 4) clipped to norm 1.


def test_the_gradient_it_returns_is_used_and_loss_scaling_is_looked_through():
    inner = keras.optimizers.SGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    weight = keras.Variable([1.0])
    around_gradients(optimizer, lambda key, gradient, variable: 2 * gradient)
    optimizer.apply([keras.ops.convert_to_tensor([8.0])], [weight])
    assert weight.numpy().tolist() == [-1.0]


def test_an_embedding_brings_indexed_slices():
    model = keras.Sequential([keras.Input((2,), dtype="int32"), keras.layers.Embedding(5, 3)])
    model.compile("sgd", "mse")
    kinds = []
    around_gradients(
        model.optimizer, lambda key, gradient, variable: kinds.append(type(gradient)) or gradient
    )
    model.fit(np.array([[1, 1]]), np.zeros((1, 2, 3)), verbose=0)
    assert kinds == [tf.IndexedSlices]


def test_in_training_it_sees_the_gradient_of_the_loss():
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.0), run_eagerly=True)
    x, y = classification()
    seen, _ = record(model.optimizer)
    model.train_on_batch(x, y)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x=x, y=y, y_pred=model(x))
    expected = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for (_, gradient, _), other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(gradient, other.numpy(), atol=1e-6)
