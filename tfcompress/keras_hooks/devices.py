"""Variables on devices of their own, and what a training step made of parts needs from Keras.

Private Keras API used here, each with a test in `tests/keras_hooks/test_devices.py`:
`Variable._initialize` and `_value`, `Trainer._loss_tracker`, `set_keras_mask`; and that every
optimizer makes its slots by `add_variable_from_reference` and passes what holds the value of a
variable to `update_step`.
"""

from __future__ import annotations

from collections.abc import Iterable

import keras
import tensorflow as tf
from keras.src import backend

from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.update import unwrap_optimizer


def move(variables: Iterable[keras.Variable], device: str) -> None:
    """Put variables on a device, with their values; the Keras variables stay the same objects.

    What was traced before still reads the old place.

    Args:
        variables: Variables that have their values.
        device: A device that TensorFlow has, such as `"GPU:1"`.

    Example:

    >>> kernel = keras.Variable([1.0, 2.0])
    >>> move([kernel], "CPU:0")
    >>> kernel.numpy()
    array([1., 2.], dtype=float32)
    """
    with tf.init_scope(), tf.device(device):
        for variable in variables:
            # As an array: a tensor would be a second copy on the device until it is freed.
            variable._initialize(keras.ops.convert_to_numpy(variable))


def build_beside(optimizer: keras.Optimizer, variables: list[keras.Variable]) -> None:
    """Build an optimizer that keeps its slots, and computes updates, where the variables lie.

    Keras does both on the default device. What it does besides `update_step`, weight decay and
    moving averages, stays there.

    Args:
        optimizer: One that is not built; others are left as they are.
        variables: What it is to train.

    Example:

    >>> optimizer = keras.optimizers.SGD(momentum=0.9)
    >>> build_beside(optimizer, [keras.Variable([1.0, 2.0])])
    >>> optimizer.built
    True
    """
    if optimizer.built:
        return

    def beside(proceed, reference_variable, *args, **kwargs):
        holder = native(reference_variable)
        with tf.init_scope(), tf.device(holder.device):
            return proceed(reference_variable, *args, **kwargs)

    remove = add_hook(unwrap_optimizer(optimizer), "add_variable_from_reference", beside)
    try:
        optimizer.build(variables)
    finally:
        remove()
    add_hook(unwrap_optimizer(optimizer), "update_step", _update_beside, innermost=True)


def _update_beside(proceed, gradient, variable, learning_rate):
    with tf.device(variable.device):
        return proceed(gradient, variable, learning_rate)


def native(variable: keras.Variable) -> tf.Variable:
    """What holds the value of a Keras variable."""
    return variable._value


def set_mask(tensor, mask) -> None:
    """Put a mask on a tensor, as the layers of Keras do; None leaves it as it is."""
    if mask is not None:
        backend.set_keras_mask(tensor, mask)


def track_loss(model: keras.Model, loss, examples) -> None:
    """Add the loss of a step to the mean that `fit` shows.

    Args:
        model: A compiled model.
        loss: A scalar.
        examples: How many examples it is the loss of.
    """
    model._loss_tracker.update_state(loss, sample_weight=examples)
