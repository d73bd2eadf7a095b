"""What holds on the workers in `TF_CONFIG`: `python -m tests.parallel.workers DIRECTORY CHECK ...`.

Every worker runs all checks; each prints a line for what held.
"""

import collections
import os
import pathlib
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import tfcompress as tfc
from tests.contract import replicas as techniques
from tests.contract.techniques import CALLBACKS, TECHNIQUES
from tests.models import classification, compile_classifier, mlp
from tests.parallel import replicas
from tfcompress import parallel
from tfcompress.keras_hooks import distribute
from tfcompress.keras_hooks.workers import is_chief

EPOCHS = 4


class Kill(keras.callbacks.Callback):
    """The worker dies in the middle of the third epoch, of four batches."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 4 * 2 + 2:
            os.kill(os.getpid(), signal.SIGKILL)


def prepared(strategy, make=mlp, **compiling):
    keras.utils.set_random_seed(0)
    return compile_classifier(parallel.prepare(make(), strategy), "adam", **compiling)


def fit(model, callbacks=(), epochs=EPOCHS, **arguments):
    x, y = classification()
    given = {"batch_size": 24, "epochs": epochs, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, callbacks=list(callbacks), **given).history


def pruned(strategy, *callbacks):
    """A model trained with pruning whose masks follow what was gathered in all steps."""
    model, pruning = prepared(strategy), TECHNIQUES["pruning, gradient"].callback()
    history = fit(model, [*callbacks, pruning])
    masks = [mask.numpy() for mask in pruning.masks.values()]
    return [*model.get_weights(), *masks], len(history["loss"])


def dies(strategy, directory):
    """The last worker is killed; the others cannot go on."""
    backup = keras.callbacks.BackupAndRestore(directory / "backup")
    last = strategy.cluster_resolver.task_id == strategy.num_replicas_in_sync - 1
    pruned(strategy, backup, *([Kill()] if last else []))


def goes_on(strategy, directory):
    """From the backup of `dies`, to the end of an undisturbed run."""
    backup = keras.callbacks.BackupAndRestore(directory / "backup")
    found, epochs = pruned(strategy, backup)
    assert epochs == EPOCHS - 2
    expected, epochs = pruned(strategy)
    assert epochs == EPOCHS
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def only_the_chief_writes(strategy, directory):
    """Each worker names a directory of its own; the chief's alone comes to be."""
    own = directory / f"worker_{strategy.cluster_resolver.task_id}"
    model = prepared(strategy, replicas.with_batch_norm, metrics=["accuracy"])
    callbacks = [
        keras.callbacks.BackupAndRestore(own / "backup", delete_checkpoint=False),
        keras.callbacks.ModelCheckpoint(own / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(own / "w.weights.h5", "loss", 0, True, True),
        keras.callbacks.CSVLogger(own / "log.csv"),
        keras.callbacks.TensorBoard(own / "board"),
        tfc.callbacks.CompressionLogger(own / "compression"),
    ]
    if is_chief(strategy):
        own.mkdir()
    fit(model, callbacks, epochs=2)
    model.save(own / "end.keras")
    assert own.exists() == is_chief(strategy)
    chief = directory / "worker_0"
    names = {"backup", "1.keras", "2.keras", "w.weights.h5", "log.csv", "board", "compression"}
    assert {path.name for path in chief.iterdir()} - {"end.keras"} == names
    for path in ("2.keras", "w.weights.h5"):
        other = replicas.with_batch_norm()
        other.load_weights(chief / path)
        for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)
    assert fit(model, callbacks[1:2], epochs=1)["loss"]  # Nothing of the first fit is left.


def a_backup_of_one_worker_is_refused(strategy, directory):
    """`only_the_chief_writes` left a backup that only the chief finds."""
    own = directory / f"worker_{strategy.cluster_resolver.task_id}"
    try:
        model = prepared(strategy, replicas.with_batch_norm)
        fit(model, [keras.callbacks.BackupAndRestore(own / "backup")])
    except ValueError as error:
        assert "The workers start from different states" in str(error)
        assert "such as a shared file system" in str(error)
    else:
        raise AssertionError("nothing was raised")


def workers_without_a_seed_share_the_examples(strategy, directory):
    """A linear loss counts in each weight how often its example was seen."""
    tf.random.set_seed(strategy.cluster_resolver.task_id)
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(1, use_bias=False)])
    parallel.prepare(model, strategy)
    model.set_weights([np.zeros((32, 1))])
    model.compile(keras.optimizers.SGD(1.0), lambda y, y_pred: y_pred)
    model.fit(np.eye(32), np.zeros(32), batch_size=8, epochs=2, shuffle=True, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], -2 / 8)


def count_ops(graph_def):
    """Op -> how often it is in a graph, in the functions that are called too."""
    functions = {each.signature.name: each.node_def for each in graph_def.library.function}

    def count(nodes):
        total = collections.Counter()
        for node in nodes:
            total[node.op] += 1
            for value in node.attr.values():
                for called in [value.func, *value.list.func]:
                    total += count(functions.get(called.name, ()))
            total += count(functions.get(node.op, ()))
        return total

    return count(graph_def.node)


def step_ops(strategy, callbacks):
    """What the training step's graph holds."""
    graphs, original = [], distribute._next_step

    def recording(one_step, compiled):
        def recorded(data):
            graphs.append(tf.compat.v1.get_default_graph())
            return one_step(data)

        return original(recorded, compiled)

    distribute._next_step = recording
    try:
        fit(prepared(strategy), callbacks, epochs=1)
    finally:
        distribute._next_step = original
    return count_ops(graphs[-1].as_graph_def())


def collectives(ops):
    return sum(n for op, n in ops.items() if op.startswith("Collective") and "Group" not in op)


def host_calls(ops):
    return sum(n for op, n in ops.items() if "PyFunc" in op or "Print" in op or "Summary" in op)


# Whether there is a batch, the examples in it, the gradients, the results.
OWN = 4


def callbacks_add_no_collective(strategy, directory):
    """Pruning and L1 add none, QAT one for each range that it observes; none calls the host."""
    plain = step_ops(strategy, [])
    assert (collectives(plain), host_calls(plain)) == (OWN, 0), plain
    pruning = TECHNIQUES["pruning, gradient"].callback()
    l1 = tfc.callbacks.L1Regularization(proximal=True)
    ops = step_ops(strategy, [pruning, l1, tfc.callbacks.CompressionLogger()])
    assert (collectives(ops), host_calls(ops)) == (OWN, 0), ops
    qat = tfc.callbacks.QuantizationAwareTraining()
    ops = step_ops(strategy, [qat])
    assert len(qat.ranges) == 3
    assert (collectives(ops), host_calls(ops)) == (OWN + 3, 0), ops


def no_technique_adds_a_collective(strategy, directory):
    """But for ranges: an extreme takes one, a percentile two, to know how many values there are."""
    for name in CALLBACKS:
        callback = TECHNIQUES[name].callback()
        ops = step_ops(strategy, [callback])
        each = 2 if "percentiles" in name else 1
        needed = each * len(getattr(callback, "ranges", ()))
        assert (collectives(ops), host_calls(ops)) == (OWN + needed, 0), (name, ops)


def they_train_as_one_device(strategy, directory):
    """A sample of what the slow tests run whole."""
    replicas.check(strategy, replicas.CASES["smaller, xla, several steps"])
    techniques.check("QAT", strategy)


CHECKS = [
    dies,
    goes_on,
    only_the_chief_writes,
    a_backup_of_one_worker_is_refused,
    workers_without_a_seed_share_the_examples,
    callbacks_add_no_collective,
    no_technique_adds_a_collective,
    they_train_as_one_device,
]


def main(directory, *names):
    strategy = parallel.strategy("multi_worker")
    for check in CHECKS:
        if check.__name__ in names:
            check(strategy, pathlib.Path(directory))
            print(f"{check.__name__}: ok", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
