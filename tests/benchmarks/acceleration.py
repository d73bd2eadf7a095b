"""Speed of `tfcompress.acceleration.compile` against TensorFlow's graph, and of XLA in training.

    python -m tests.benchmarks.acceleration [--quick] [--only MLP CNN] [--threads 1]

An MLP, the demo's CNN, MobileNetV2 at 96x96 and a BERT-like transformer of 6 layers, 384 wide, on
64 tokens, all of random weights. The plain graph is the concrete function of a `tf.function` of the
Keras model for this very batch size, which is TensorFlow at its fastest. Both are timed in turns;
the figures are medians, and how many times faster the compiled model is. The bars: nowhere slower
by more than 2%, 1.2 times faster on the MLP and the BERT-like model, and 1.3 times in a training
step of the MLP under XLA.
"""

import argparse
import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import rich.table
import tensorflow as tf

import tfcompress.acceleration as acceleration
from tests.benchmarks.engines import NETWORKS, mlp
from tfcompress.acceleration.program import with_batch_size
from tfcompress.timing import Timing, latency

FASTER = {"MLP": 1.2, "BERT-like": 1.2}
SLOWEST, TRAINING = 0.98, 1.3


def inference(name, sizes, rounds, console):
    """Lines `(size, plain ms, compiled ms, speed-up, engine)` for one model."""
    keras.utils.set_random_seed(0)
    network = NETWORKS[name]
    model, x = network.build(), network.inputs(np.random.default_rng(0))
    for _ in range(20):  # Batch norms that have seen data, without which signals vanish.
        model(x[:32], training=True)
    timing = Timing(rounds=rounds, min_ms=5.0)
    fast = acceleration.compile(model, batch_sizes=sizes, inputs=x[:32], timing=timing)
    console.print(fast)
    plain = tf.function(lambda batch: model(batch, training=False))
    for size in sizes:
        batch = tf.constant(with_batch_size(x, size))
        calls = {
            "plain": functools.partial(plain.get_concrete_function(batch), batch),
            "compiled": functools.partial(fast, batch),
        }
        found = latency(calls, timing)
        before, after = found["plain"].median_ms, found["compiled"].median_ms
        yield size, before, after, before / after, fast.engines[size]


def training(rounds):
    """How many times faster a training step of the MLP is under XLA, at batch size 128."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(128, 784)).astype("float32"), rng.integers(0, 10, 128)
    calls = {}
    for jit in (False, True):
        model = mlp()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, jit_compile=jit)
        model.train_on_batch(x, y)
        step = model.make_train_function()
        batches = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
        calls[jit] = functools.partial(step, batches)
    found = latency({str(jit): call for jit, call in calls.items()}, Timing(rounds=rounds))
    return found["False"].median_ms / found["True"].median_ms


def bar(speedup):
    """Whether it is nowhere slower."""
    return "met" if speedup >= SLOWEST else f"slower than {SLOWEST}"


def main():
    """Measure and print, a model as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, help="of TensorFlow; by default all cores")
    parser.add_argument("--quick", action="store_true", help="5 rounds, MLP and CNN")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.only = 5, ["MLP", "CNN"]
    if arguments.threads:
        tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
        tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    console = rich.console.Console(highlight=False, width=100)
    table = rich.table.Table("model", "batch", "plain ms", "compiled ms", "speed-up", "engine", "")
    for name in arguments.only:
        lines = list(inference(name, arguments.sizes, arguments.rounds, console))
        best = max(speedup for *_, speedup, _ in lines)
        for size, before, after, speedup, engine in lines:
            numbers = (f"{before:.3g}", f"{after:.3g}", f"{speedup:.2f}")
            table.add_row(name, str(size), *numbers, engine, bar(speedup))
            console.print(name, size, *numbers, engine)
        if name in FASTER:
            verdict = "met" if best >= FASTER[name] else "missed"
            console.print(f"{name}: best {best:.2f}, {FASTER[name]} asked for: {verdict}")
    console.print(table)
    speedup = training(arguments.rounds)
    verdict = "met" if speedup >= TRAINING else "missed"
    console.print(f"MLP training step under XLA: {speedup:.2f}, {TRAINING} asked for: {verdict}")


if __name__ == "__main__":
    main()
