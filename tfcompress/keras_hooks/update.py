"""The optimizer's update: hooks that run in the step, around it and around each gradient in it.

Private Keras API used here, with a test in `tests/keras_hooks/test_update.py`: that the TensorFlow
optimizers call `update_step(gradient, variable, learning_rate)` on the instance, once for each
weight and replica, with gradients that are accumulated, reduced over the replicas and clipped; and
`_var_key`, which names the weight that a replica's copy belongs to.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from tensorflow.python.distribute import distribute_lib

from tfcompress.keras_hooks.hook import add_hook


def unwrap_optimizer(optimizer):
    """The optimizer that changes the weights: what a `LossScaleOptimizer` wraps, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def around_update(optimizer: keras.optimizers.Optimizer, around: Callable) -> Callable[[], None]:
    """Put `around(apply)` around every `optimizer.apply`.

    It sees the weights before and after everything that the optimizer does to them: gradient
    clipping, weight decay, the update, constraints, and the moving average that `use_ema` writes
    back. Under loss scaling it runs for finite gradients only.

    Args:
        optimizer: The model's optimizer; a `LossScaleOptimizer` is looked through.
        around: Called with a function of no arguments that performs the update.

    Returns:
        A function that removes the hook.

    Example:

    >>> optimizer = keras.optimizers.SGD(1.0)
    >>> weight = keras.Variable(1.0)
    >>> def clear(apply):
    ...     apply()
    ...     weight.assign(0.0)
    >>> remove = around_update(optimizer, clear)
    >>> _ = optimizer.apply([keras.ops.ones(())], [weight])
    >>> float(weight)
    0.0
    >>> remove()
    """

    def hooked(proceed, grads, trainable_variables=None):
        result = None

        def apply():
            nonlocal result
            result = proceed(grads, trainable_variables)

        around(apply)
        return result

    return add_hook(unwrap_optimizer(optimizer), "apply", hooked)


def around_gradients(
    optimizer: keras.optimizers.Optimizer,
    change: Callable[[str, tf.Tensor, tf.Variable], tf.Tensor],
) -> Callable[[], None]:
    """Put `change(key, gradient, variable)` in front of the update of each weight.

    It sees the gradient that the update uses: accumulated, reduced over the replicas, and clipped;
    and the weight before the update, once decayed. It runs on each replica's own copy, where state
    variables can be assigned freely.

    Args:
        optimizer: The model's optimizer; a `LossScaleOptimizer` is looked through.
        change: Called with the `variable_key` of the weight, its gradient (a tensor of its shape,
            or `tf.IndexedSlices`) and the weight; returns the gradient to use.

    Returns:
        A function that removes the hook.

    Example:

    >>> optimizer = keras.optimizers.SGD(1.0)
    >>> weight = keras.Variable(1.0)
    >>> remove = around_gradients(optimizer, lambda key, gradient, variable: 2 * gradient)
    >>> _ = optimizer.apply([keras.ops.ones(())], [weight])
    >>> float(weight)
    -1.0
    >>> remove()
    """
    inner = unwrap_optimizer(optimizer)

    def hooked(proceed, gradient, variable, learning_rate):
        gradient = change(variable_key(inner, variable), gradient, variable)
        return proceed(gradient, variable, learning_rate)

    return add_hook(inner, "update_step", hooked)


def variable_key(optimizer, variable) -> str:
    """What names a weight in an optimizer, whichever replica's copy of it is at hand."""
    return unwrap_optimizer(optimizer)._var_key(variable)


def on_each_replica(variables: Sequence[keras.Variable], update: Callable, tensors=()) -> None:
    """Run `update(variables, tensors)` once a replica, on that replica's own copies.

    Inside a step under `tf.distribute` a mirrored variable cannot be assigned freely, since each
    replica's assignment would have to be reduced. Replicas hold equal values here, so each computes
    the same thing on its own copies, as Keras's weight decay does.

    Args:
        variables: Keras variables that `update` reads or assigns, at least one.
        update: Called with a list of one `tf.Variable` for each, and a list of tensors.
        tensors: Tensors of the calling replica that `update` reads.
    """
    native = [variable.value for variable in variables]

    def across(strategy, native, tensors):
        def on_replica(_, native, tensors):
            update(native, tensors)

        strategy.extended.update(native[0], on_replica, args=(native, tensors), group=False)

    replica = distribute_lib.get_update_replica_id()
    if replica is not None:  # Within an update, which runs once a replica already.
        update([_copy(each, replica) for each in native], list(tensors))
        return
    strategy = tf.distribute.get_strategy()
    if not tf.distribute.has_strategy():  # Variables may be distributed outside of the scope too.
        strategy = getattr(native[0], "distribute_strategy", None) or strategy
    if strategy is not tf.distribute.get_strategy() or tf.distribute.in_cross_replica_context():
        with strategy.scope():
            across(strategy, native, list(tensors))
    else:
        tf.__internal__.distribute.interim.maybe_merge_call(across, strategy, native, list(tensors))


def _copy(native, replica):
    return native.distribute_strategy.experimental_local_results(native)[replica]
