"""Keras's own `compile` and `fit`, made to work under `tf.distribute.MirroredStrategy`."""

import logging

import keras
import tensorflow as tf

from tfcompress.keras_hooks.distribute import batch_norms, distribute, undistribute
from tfcompress.parallel.strategy import resolve
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

    Not covered: several workers are refused, since training over them was never tried. The tests
    train under `MirroredStrategy` with 2 to 4 replicas on CPUs; GPUs and TPUs are taken, but no
    test runs there, nor one of mixed precision, of a dataset that is distributed already, or of
    a loss that divides by a mask (see above). XLA does not compile a `train_step` or `test_step`
    of the model's own (a warning says so).

    Args:
        model: Any Keras model, built or not, compiled or not. It is changed in place.
        strategy: A strategy, or what `tfcompress.parallel.strategy` takes; by default the one of
            the model, else of the scope that this is called in, else `"auto"`.
        synchronize_batch_norm: Whether batch norms take the statistics of the whole batch, as one
            device does. If not, each replica uses its own, and a warning says so.

    Returns:
        The model. `tfcompress.parallel.release(model)` undoes it.

    Raises:
        ValueError: The strategy is one of several workers, or one that Keras cannot train under.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> prepare(model, "one_device") is model
    True
    """
    if strategy is None:
        strategy = _strategy_of(model)
    _require_one_worker(strategy)
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


def _require_one_worker(which):
    # A name is refused before its strategy is made, which would wait for the other workers.
    name, why = resolve(which) if isinstance(which, str) else (None, "an object")
    if name == "multi_worker" or isinstance(which, tf.distribute.MultiWorkerMirroredStrategy):
        raise ValueError(
            f"prepare got {which!r} ({why}), which is a MultiWorkerMirroredStrategy; it was never "
            "tried with several workers. Expected a strategy of one machine: pass "
            'tf.distribute.MirroredStrategy(), "mirrored" or "one_device".'
        )


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
