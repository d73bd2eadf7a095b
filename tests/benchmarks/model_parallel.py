"""A pipeline of two stages against one device, for an encoder of 6 layers of width 384.

    python -m tests.benchmarks.model_parallel [--rounds 7] [--steps 4] [--microbatches 8] [--quick]

Each way runs in a process of its own, which waits while another is timed; the rounds are
interleaved. Every process gives TensorFlow one thread within an op: one device with one thread for
ops, one device with two, and the pipeline, on two logical CPU devices, with two. Prints, for
inference and for training at batch 16, how much faster than the first the others are (median and
quartiles); the same for the first with the batch in micro-batches, which is what splitting it
costs; and what `simulate` predicts from the measured costs of the layers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import tensorflow as tf
from keras import layers

from tfcompress.parallel.costs import layer_costs
from tfcompress.parallel.pipeline import Pipeline
from tfcompress.parallel.simulate import simulate

WAYS = ("one thread", "two threads", "pipeline", "pipeline, 1F1B")
LENGTH, WIDTH, HEADS, VOCABULARY, BATCH = 64, 384, 6, 1000, 16


def encoder(num_layers=6):
    """Token ids of shape `(batch, 64)` -> 2 logits."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for _ in range(num_layers):
        attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x)
        x = layers.LayerNormalization()(x + attended)
        wide = layers.Dense(4 * WIDTH, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(wide))
    return keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


def tokens(batch):
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, LENGTH)).astype("int32")


class Worker:
    """One way to run the encoder; answers requests from its parent, a JSON line each."""

    def __init__(self, way, microbatches, num_layers):
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1 if way == "one thread" else 2)
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        self.microbatches = microbatches
        self.inner = self.model = encoder(num_layers)
        if way.startswith("pipeline"):
            schedule = "1f1b" if "1F1B" in way else "gpipe"
            self.model = Pipeline(self.inner, ["CPU:0", "CPU:1"], microbatches, schedule)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("adam", loss, jit_compile=False)
        self.model.make_train_function()
        self.infer = tf.function(lambda x: self.model(x, training=False), autograph=False)

    def inference(self, steps, batch=BATCH):
        """Seconds."""
        x = tf.constant(tokens(batch))
        start = time.perf_counter()
        for _ in range(steps):
            self.infer(x).numpy()
        return time.perf_counter() - start

    def training(self, steps, batch=BATCH):
        """Seconds."""
        data = tf.data.Dataset.from_tensors((tokens(batch), np.arange(batch) % 2)).repeat()
        data = iter(data)
        start = time.perf_counter()
        for _ in range(steps):
            float(self.model.train_function(data)["loss"])
        return time.perf_counter() - start

    def predict(self):
        """What `simulate` says for one and for two devices: examples a second."""
        batch = tokens(BATCH // self.microbatches)
        found = {}
        for kind in ("inference", "training"):
            costs = layer_costs(self.inner, batch, measure=True, training=kind == "training")
            found[kind] = [
                simulate(costs, number, self.microbatches, number).throughput for number in (1, 2)
            ]
        return found

    def serve(self):
        """Until the parent closes the pipe."""
        print("ready", flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(self, name)(*arguments)), flush=True)


class Remote:
    """A `Worker` in a process."""

    def __init__(self, way, *arguments):
        command = [sys.executable, "-m", __spec__.name, "--worker", way, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The worker ended with {self.process.wait()}; its error is above.")
        return line

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(workers, kind, rounds, steps, microbatches):
    """Seconds of each way, a round each, and those of the first in micro-batches."""
    seconds = {way: [] for way in (*workers, "one thread, in micro-batches")}
    split = (steps * microbatches, BATCH // microbatches)
    for worker in workers.values():
        worker.ask(kind, 2)
    workers["one thread"].ask(kind, 2, split[1])
    for place in range(rounds):
        order = list(workers.items())[:: 1 if place % 2 else -1]
        for way, worker in order:
            seconds[way].append(worker.ask(kind, steps))
        seconds["one thread, in micro-batches"].append(workers["one thread"].ask(kind, *split))
    return seconds


def _print(console, kind, seconds):
    base = seconds["one thread"]
    for way, own in seconds.items():
        if way != "one thread":
            ratios = [one / other for one, other in zip(base, own, strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            console.print(
                f"{kind:<10} {way:<30} {median:5.2f}x ({low:.2f} to {high:.2f}, "
                f"{len(ratios)} rounds)",
                highlight=False,
            )


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, 2 or more")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--microbatches", type=int, default=8, help="a divisor of 16")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="2 layers, 2 rounds of 1 step")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, *numbers = arguments.worker
        Worker(way, *map(int, numbers)).serve()
        return
    rounds, steps, num_layers = arguments.rounds, arguments.steps, arguments.layers
    if arguments.quick:
        rounds, steps, num_layers = 2, 1, 2
    console = rich.console.Console()
    workers = {way: Remote(way, arguments.microbatches, num_layers) for way in WAYS}
    for kind in ("inference", "training"):
        ways = {k: w for k, w in workers.items() if kind == "training" or "1F1B" not in k}
        _print(console, kind, measure(ways, kind, rounds, steps, arguments.microbatches))
    for kind, (one, two) in workers["one thread"].ask("predict").items():
        console.print(f"{kind:<10} simulated {two / one:.2f}x", highlight=False)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
