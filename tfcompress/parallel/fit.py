"""Keras's own `compile` and `fit`, made to work on several devices and several machines."""

import logging

import keras
import tensorflow as tf

from tfcompress.keras_hooks.distribute import batch_norms, distribute, undistribute
from tfcompress.parallel.strategy import strategy as choose_strategy

logger = logging.getLogger("tfcompress")
_ATTRIBUTE = "tfcompress_release"


def prepare(
    model: keras.Model,
    strategy: tf.distribute.Strategy | str | None = None,
    synchronize_batch_norm: bool = True,
) -> keras.Model:
    """Let `compile`, `fit`, `evaluate` and `predict` of a model work under a strategy.

    Afterwards `jit_compile=True`, `steps_per_execution`, gradient accumulation, moving averages of
    the weights, clipping, and batches of any size train to what one device would: each example of
    a batch weighs the same, and gradients are summed over the replicas before anything else.

    A model that was made outside of the strategy's scope keeps its variable objects and their
    values; they get a copy on each replica. It may be compiled before or after, and again.

    What stays: XLA compiles forward and backward pass of a step, not the update, and nothing where
    replicas exchange values in the forward pass (a warning says so); a loss that divides by a sum
    of weights, or by a mask, does so on each replica; the steps of one `steps_per_execution` are
    started from Python; metrics shown within an epoch are means over the replicas, those of an
    epoch are exact.

    Under `MultiWorkerMirroredStrategy` every worker calls the same methods with the same data, of
    which it takes its share. Keras knows nothing of several workers, so here the chief alone
    writes: `ModelCheckpoint`, `BackupAndRestore`, `CSVLogger`, `TensorBoard`, `RemoteMonitor` and
    `model.save`, `save_weights`, `export` do nothing elsewhere (which also leaves a
    `ModelCheckpoint` there without `best`). What the callbacks wrote is there once `fit` returns,
    on any worker. Backups are read by all, from a place that all see; workers that start from
    different weights raise, all of them. They shuffle in the same order: where
    `keras.utils.set_random_seed` was not called alike, with a seed of the chief's.

    When a worker dies, the others raise `tf.errors.UnavailableError` or another of TensorFlow's
    errors, and cannot go on: end them (by themselves they may take minutes to), and start all of
    them anew. With `BackupAndRestore` listed first, and `shuffle=False`, they then end with the
    weights of an undisturbed run.

    Not covered: the tests train with 2 to 4 replicas on CPUs, in one process or in as many; GPUs
    and TPUs are taken, but no test runs there, nor one of a dataset that is distributed already,
    or of a loss that divides by a mask (see above). XLA does not compile a `train_step` or
    `test_step` of the model's own (a warning says so).

    Args:
        model: Any Keras model, built or not, compiled or not. It is changed in place.
        strategy: A strategy, or what `tfcompress.parallel.strategy` takes; by default the one of
            the model, else of the scope that this is called in, else `"auto"`.
        synchronize_batch_norm: Whether batch norms take the statistics of the whole batch, as one
            device does. If not, each replica uses its own, and a warning says so.

    Returns:
        The model. `tfcompress.parallel.release(model)` undoes it.

    Raises:
        ValueError: The strategy is one that Keras cannot train under, such as
            `ParameterServerStrategy`; in `fit`: the workers start from different states.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> prepare(model, "one_device") is model
    True
    """
    if strategy is None:
        strategy = _strategy_of(model)
    strategy = choose_strategy(strategy)
    release(model)
    if strategy.num_replicas_in_sync == 1:
        return model
    restore = _synchronize(model) if synchronize_batch_norm else _warn_of_batch_norm(model)
    remove = distribute(model, strategy)

    def undo():
        remove()
        restore()

    model.__dict__[_ATTRIBUTE] = undo
    return model


def release(model: keras.Model) -> keras.Model:
    """Undo `prepare`: the model trains on one device again, from the weights that it has.

    Args:
        model: A model; one that is not prepared is left as it is.

    Returns:
        The model.

    Raises:
        ValueError: It is called inside of a strategy's scope.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> release(prepare(model, "one_device")) is model
    True
    """
    undo = model.__dict__.get(_ATTRIBUTE)
    if undo is not None:
        undistribute(model)
        undo()
        del model.__dict__[_ATTRIBUTE]
    return model


def _strategy_of(model):
    if model.distribute_strategy is not tf.distribute.get_strategy():
        return model.distribute_strategy
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else "auto"


def _synchronize(model):
    changed = [layer for layer in batch_norms(model) if not layer.synchronized]
    for layer in changed:
        layer.synchronized = True
    if changed:
        logger.info("prepare synchronizes %s", [layer.name for layer in changed])

    def restore():
        for layer in changed:
            layer.synchronized = False

    return restore


def _warn_of_batch_norm(model):
    local = [layer.name for layer in batch_norms(model) if not layer.synchronized]
    if local:
        logger.warning(
            "Batch norms %s take the statistics of each replica's part of a batch: training "
            "differs from one device, and the moving statistics differ between replicas.",
            local,
        )
    return lambda: None
