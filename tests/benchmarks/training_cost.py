"""What compression costs a training step, and selection an update: ratios, measured interleaved.

    python -m tests.benchmarks.training_cost [--pairs 9] [--steps 100] [--only NAME] [--quick]

Prints, for an MLP 784-512-512-512-10 at batch 128, the time of a training step with a technique
over that of the plain step, in graph mode and under XLA (median of the pairs, and quartiles); and
how much faster the masks of 25 million weights are chosen than `tf.sort` sorts them.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import tensorflow as tf

import tfcompress as tfc
from tfcompress.ops.selection import top_k_mask
from tfcompress.schedules import import_tfmot


def _pruning(**kwargs):
    schedule = tfc.schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=10**6)
    return lambda: tfc.callbacks.Pruning(schedule, frequency=100, **kwargs)


TECHNIQUES = {
    "pruning": _pruning(),
    "pruning, gradient": _pruning(criterion="gradient"),
    "pruning, movement": _pruning(criterion="movement"),
    "pruning, RigL": _pruning(regrowth=tfc.regrowth.RigL(end_step=10**6)),
    "L1": lambda: tfc.callbacks.L1Regularization(1e-5),
    "L1, proximal": lambda: tfc.callbacks.L1Regularization(1e-5, proximal=True),
    "QAT int8": lambda: tfc.callbacks.QuantizationAwareTraining(),
}


class Trainer:
    """A compiled model in training under `callback`; `run` times some more of its steps."""

    def __init__(self, callback, jit_compile):
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Dense(512, activation="relu") for _ in range(3)]
        self.model = keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("adam", loss, jit_compile=jit_compile)
        self.data = iter(batches())
        self.attached = callback.attached(self.model) if callback else contextlib.nullcontext()

    def run(self, steps):
        """Seconds for `steps` steps."""
        return timed_steps(self.model, self.data, steps)


def timed_steps(model, data, steps):
    """Seconds for `steps` training steps of a compiled model on an iterator of batches."""
    model.make_train_function()
    start = time.perf_counter()
    for _ in range(steps):
        logs = model.train_function(data)
    float(logs["loss"])
    return time.perf_counter() - start


def batches():
    """The same batch over and over: the input pipeline costs next to nothing."""
    x = np.random.default_rng(0).normal(size=(128, 784)).astype("float32")
    y = np.arange(128) % 10
    return tf.data.Dataset.from_tensors((x, y)).cache().repeat()


def step_ratios(technique, jit_compile, pairs, steps):
    """Time with the technique over time without, once a pair, the order alternating."""
    plain, compressed = Trainer(None, jit_compile), Trainer(technique(), jit_compile)
    with compressed.attached:
        return paired_ratios(plain, compressed, pairs, steps)


def paired_ratios(plain, compressed, pairs, steps):
    """Time of the steps of one trainer over those of another, once a pair."""
    plain.run(steps), compressed.run(steps)  # Traced and warm.
    ratios = []
    for pair in range(pairs):
        order = (plain, compressed) if pair % 2 else (compressed, plain)
        seconds = {trainer: trainer.run(steps) for trainer in order}
        ratios.append(seconds[compressed] / seconds[plain])
    return ratios


def selection_ratios(size, jit_compile, pairs):
    """Time of `tf.sort` over the time to choose a mask, once a pair."""
    weights = tf.constant(np.random.default_rng(0).normal(size=size).astype("float32"))
    kept = tf.constant(size // 5)
    sort = tf.function(lambda: tf.sort(tf.abs(weights))[0], jit_compile=jit_compile)
    select = tf.function(
        lambda: tf.reduce_any(top_k_mask(weights, kept, absolute=True)), jit_compile=jit_compile
    )
    sort(), select()
    return [_seconds(sort) / _seconds(select) for _ in range(pairs)]


class TfmotTrainer:
    """The same model in tf_keras, pruned by TFMOT's wrapper or plain; `run` fits some steps."""

    def __init__(self, pruned):
        tfmot = import_tfmot("tensorflow_model_optimization")
        tf_keras = importlib.import_module("tf_keras")
        hidden = [tf_keras.layers.Dense(512, activation="relu") for _ in range(3)]
        model = tf_keras.Sequential([tf_keras.Input((784,)), *hidden, tf_keras.layers.Dense(10)])
        self.callbacks = []
        if pruned:
            schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.8, 0, 10**6, frequency=100)
            model = tfmot.sparsity.keras.prune_low_magnitude(model, pruning_schedule=schedule)
            self.callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.Adam(), loss)
        self.model, self.data = model, batches()

    def run(self, steps):
        """Seconds for `steps` steps."""
        start = time.perf_counter()
        self.model.fit(self.data, steps_per_epoch=steps, verbose=0, callbacks=self.callbacks)
        return time.perf_counter() - start


def tfmot_ratios(pairs, steps):
    """Time of a step under TFMOT's pruning wrapper over one of plain tf_keras, once a pair."""
    return paired_ratios(TfmotTrainer(False), TfmotTrainer(True), pairs, steps)


def _seconds(function):
    start = time.perf_counter()
    function().numpy()
    return time.perf_counter() - start


def _print(console, name, jit_compile, ratios, unit):
    low, median, high = statistics.quantiles(ratios, n=4)
    how = "XLA" if jit_compile else "graph"
    console.print(
        f"{name:<26} {how:<6} {median:6.3f} ({low:.3f} to {high:.3f}, {len(ratios)} pairs) {unit}",
        highlight=False,
    )


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=9, help="interleaved pairs a figure, 2 or more"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps a measurement")
    parser.add_argument("--only", help="a part of the name of what is measured, e.g. pruning")
    parser.add_argument("--quick", action="store_true", help="2 pairs of 20 steps, 1M weights")
    arguments = parser.parse_args()
    pairs, steps, size = arguments.pairs, arguments.steps, 25_000_000
    if arguments.quick:
        pairs, steps, size = 2, 20, 1_000_000
    console = rich.console.Console()
    cases = [*TECHNIQUES.items(), (f"masks of {size:,} weights", None)]
    tfmot = "TFMOT's pruning, tf_keras"
    if not arguments.only or arguments.only in tfmot:
        _print(console, tfmot, False, tfmot_ratios(pairs, steps), "step with / step without")
    for name, technique in cases:
        if arguments.only and arguments.only not in name:
            continue
        for jit_compile in (False, True):
            if technique is None:
                ratios = selection_ratios(size, jit_compile, min(pairs, 7))
                _print(console, name, jit_compile, ratios, "tf.sort / selection")
            else:
                ratios = step_ratios(technique, jit_compile, pairs, steps)
                _print(console, name, jit_compile, ratios, "step with / step without")


if __name__ == "__main__":
    main()
