"""What Keras lacks on several workers: who writes files, and what must be equal on all of them.

Every worker runs the whole program, so each would write the same files at the same time, and
shuffle its data in an order of its own.

Private API used here, each with a test in `tests/keras_hooks/test_workers.py`: `_save_model` of
Keras's `ModelCheckpoint` and `BackupAndRestore`, `Model._initial_epoch`, and TensorFlow's
`context.global_seed`.
"""

import contextlib
import functools
import inspect
import logging
import random
import zlib
from collections.abc import Callable

import keras
import tensorflow as tf
from tensorflow.python.eager import context

from tfcompress.keras_hooks.hook import add_hook

logger = logging.getLogger("tfcompress")
_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
_LOGGING = (
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def has_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether the strategy trains on several processes."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    return sum(map(len, _cluster(strategy).values())) > 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one of the workers that writes files."""
    if not has_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    first = "chief" if "chief" in _cluster(strategy) else "worker"
    return (resolver.task_type, resolver.task_id) == (first, 0)


def join_workers(model: keras.Model, strategy: tf.distribute.Strategy) -> Callable[[], None]:
    """Let the chief alone write what `fit` and `save` write, and check that all start alike.

    Args:
        model: A model whose variables are on the strategy's replicas.
        strategy: Of several workers; with one process this does nothing.

    Returns:
        A function that takes the hooks off.
    """
    removes = contextlib.ExitStack()
    if has_workers(strategy):
        removes.callback(add_hook(model, "fit", functools.partial(_fit, strategy)))
        if not is_chief(strategy):
            for name in ("save", "save_weights", "export"):
                removes.callback(add_hook(model, name, _left_to_the_chief(name)))
    return removes.close


def _cluster(strategy) -> dict[str, list[str]]:
    return strategy.cluster_resolver.cluster_spec().as_dict()


def _left_to_the_chief(name):
    def around(proceed, *args, **kwargs):
        logger.info("%s is left to the chief", name)

    return around


def _fit(strategy, proceed, *args, **kwargs):
    names = list(inspect.signature(keras.Model.fit).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    callbacks = given.pop("callbacks", None)
    settle_seed(strategy)
    with contextlib.ExitStack() as stack:
        kept = _kept(callbacks, is_chief(strategy), stack)
        history = proceed(**given, callbacks=[*kept, SameStart(strategy)])
    gathered(strategy, [0])  # What the chief wrote is there when any worker goes on.
    return history


def _kept(callbacks, chief, stack):
    """The callbacks that this worker runs; those that save do not until `stack` closes."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        raise ValueError(
            "fit got a CallbackList, which is bound to its callbacks already; several workers need "
            "to add one. Pass callbacks=[...], a plain list."
        )
    listed = keras.tree.flatten([] if callbacks is None else callbacks)
    if chief:
        return listed
    for callback in listed:
        if isinstance(callback, _SAVING):
            stack.callback(add_hook(callback, "_save_model", _left_to_the_chief("a checkpoint")))
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            stack.callback(setattr, callback, "delete_checkpoint", callback.delete_checkpoint)
            callback.delete_checkpoint = False
    left = [each for each in listed if isinstance(each, _LOGGING)]
    if left:
        logger.info("%s run on the chief alone", [type(each).__name__ for each in left])
    return [each for each in listed if each not in left]


class SameStart(keras.callbacks.Callback):
    """Raises, on every worker, when they start from different weights or epochs."""

    def __init__(self, strategy):
        super().__init__()
        self.strategy = strategy

    def on_train_begin(self, logs=None):
        """Listed last, so that what was to be restored is."""
        states = gathered(self.strategy, _start_of(self.model))
        if any(state != states[0] for state in states):
            raise ValueError(
                "The workers start from different states; (epoch, updates, checksum of the "
                f"weights) of each replica: {states}. Expected the same, since they train one "
                "model: a backup must lie where every worker can read it, such as a shared file "
                "system, and every worker must load the same weights."
            )


def _start_of(model) -> list[int]:
    checksum = 0
    for variable in model.trainable_weights:  # Batch norms may keep statistics of their own.
        checksum = zlib.crc32(keras.ops.convert_to_numpy(variable).tobytes(), checksum)
    updates = 0 if model.optimizer is None else model.optimizer.iterations
    return [model._initial_epoch or 0, int(keras.ops.convert_to_numpy(updates)), checksum]


def settle_seed(strategy: tf.distribute.Strategy) -> None:
    """Give all workers the seed of the chief, unless they have one, the same.

    Each worker reads its share of the same batches, so they must be shuffled in the same order.
    """
    own = context.global_seed()
    drawn = random.SystemRandom().randrange(2**31)
    seeds = gathered(strategy, [-1 if own is None else own, drawn])
    if own is None or any(seed != own for seed, _ in seeds):
        chosen, drawn = seeds[0]
        tf.random.set_seed(drawn if chosen < 0 else chosen)
        logger.info("The workers had no seed in common; they shuffle with the chief's")


def gathered(strategy: tf.distribute.Strategy, numbers: list[int]) -> list[list[int]]:
    """The numbers of all replicas, the chief's first; waits until every worker has called it."""
    own = strategy.run(lambda: tf.constant([numbers], tf.int64))
    return strategy.gather(own, axis=0).numpy().tolist()
