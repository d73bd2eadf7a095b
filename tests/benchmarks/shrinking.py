"""Physical removal: speed of the files, accuracy after fine-tuning, criteria, time and memory.

    python -m tests.benchmarks.shrinking [--only speed criteria time memory]

* speed: LiteRT files of half of the channels (the demo's CNN, MobileNetV2 at 96x96) and of half of
  the heads and feed-forward neurons (a BERT-like encoder of 6 layers, 384 wide, on 64 tokens)
  against the whole model, one example a call, one thread, all files of a model interleaved.
* criteria: the demo's CNN on the MNIST digits of `tfcompress.zoo`, trained, shrunk to a half and to
  a quarter of its multiply-accumulates by each criterion, and fine-tuned, at once and in three
  steps. Test accuracy before and after fine-tuning, and the paired differences from the original
  and from L2, as means over seeds with standard errors.
* time: the groups of a graph of 1,000 layers, and `shrink` of MobileNetV2 at 224x224.
* memory: how much `shrink` raises the peak of a process, over what its model takes, for MobileNetV2
  and ResNet50 at 224x224, each in a process of its own.
"""

import argparse
import gc
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import rich.table

import tfcompress as tfc
from tests.benchmarks.engines import NETWORKS
from tests.processes import run_module
from tfcompress import demo
from tfcompress.graph.groups import Coupling, groups
from tfcompress.graph.macs import macs
from tfcompress.timing import Timing, latency

# Which groups of a network are halved, and the bar.
SPEED = {"CNN": (None, 3.0), "MobileNetV2": (None, 1.9), "BERT-like": ("*kernel:1", 1.8)}
PRECISIONS = {"CNN": "int8", "MobileNetV2": "int8", "BERT-like": "dynamic"}
CRITERIA = ("l2", "activation", "taylor", "fisher", "random")
SCORED = 500  # Examples that scores are taken on.
EPOCHS, FINE_TUNING, BATCH_SIZE, LEARNING_RATE, FINE_RATE = 6, 4, 64, 1e-2, 2e-3
MODELS = ("MobileNetV2", "ResNet50")


def speed(console, arguments):
    """Times faster than the whole model."""
    table = rich.table.Table("", "multiply-accumulates", "float32", "integers", "bar")
    for name in arguments.networks:
        include, bar = SPEED[name]
        keras.utils.set_random_seed(0)
        network = NETWORKS[name]
        x = network.inputs(np.random.default_rng(0))[:64]
        model = network.build()
        for _ in range(20):  # Batch norms that have seen data, without which signals vanish.
            model(x[:32], training=True)
        # In eights, half of the CNN's 24 filters would be 16 of them.
        small = tfc.shrink(model, ratio=0.5, include=include, round_to=4)
        with tempfile.TemporaryDirectory() as directory:
            calls = {}
            for kind, each in (("whole", model), ("half", small)):
                for precision in ("float32", PRECISIONS[name]):
                    path = pathlib.Path(directory) / f"{kind}-{precision}.tflite"
                    given = None if precision == "float32" else x
                    artefact = tfc.export(each, path, precision, given, x[:16], batch_size=1)
                    runner = artefact.runner(1)
                    calls[kind, precision] = lambda runner=runner, x=x[:1]: runner(x)
            timing = Timing(rounds=5 if arguments.quick else 51, min_ms=5.0)
            found = latency(calls, timing)
        ratios = [
            found["whole", p].median_ms / found["half", p].median_ms
            for p in ("float32", PRECISIONS[name])
        ]
        fewer = macs(model, x) / macs(small, x)
        cells = [f"{ratios[0]:.2f}", f"{ratios[1]:.2f} ({PRECISIONS[name]})", f"{bar}"]
        console.print("  ".join((name, f"1/{fewer:.2f}", *cells)))
        table.add_row(name, f"1/{fewer:.2f}", *cells)
    console.print(table)


def fit(model, data, epochs, learning_rate):
    """Train with Adam, down to a learning rate of zero."""
    x, y = data
    decay = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * -(-len(x) // BATCH_SIZE))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(decay), loss, metrics=["accuracy"])
    model.fit(x, y, BATCH_SIZE, epochs, verbose=0)
    return model


def accuracy(model, data):
    """In percent."""
    if not model.compiled:
        model.compile(metrics=["accuracy"], loss="sparse_categorical_crossentropy")
    return 100 * model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def shrunk(model, seed, criterion, share, iterations, quick):
    """Test accuracy before and after fine-tuning."""
    data, test = tfc.zoo.mnist5k(seed)
    target = int(share * macs(model, data[0][:1]))
    chosen = {"criterion": criterion, "target_macs": target, "verbose": 0}
    if criterion not in ("l2", "random"):
        chosen["data"] = data[0][:SCORED], data[1][:SCORED]
    # As many epochs in all, however many steps.
    before, epochs = [], 1 if quick else FINE_TUNING
    last = epochs - (iterations - 1) * (epochs // (iterations + 1))

    def fine_tune(small):
        before.append(accuracy(small, test))
        is_last = len(before) == iterations
        fit(small, data, last if is_last else max(epochs // (iterations + 1), 1), FINE_RATE)

    keras.utils.set_random_seed(seed)
    small = tfc.shrink(model, iterations=iterations, fine_tune=fine_tune, **chosen)
    return before[0], accuracy(small, test)


def with_error(values):
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.2f} ± {error:.2f}"


def criteria(console, arguments):
    """Accuracy at fewer multiply-accumulates, by criterion."""
    seeds = range(1 if arguments.quick else arguments.seeds)
    models, whole = [], []
    for seed in seeds:
        data, test = tfc.zoo.mnist5k(seed)
        keras.utils.set_random_seed(seed)
        models.append(fit(demo.cnn(), data, 1 if arguments.quick else EPOCHS, LEARNING_RATE))
        whole.append(accuracy(models[-1], test))
    console.print(f"original: {statistics.mean(whole):.2f}% {whole}")
    columns = ("MACs", "criterion", "steps", "at once", "tuned", "- original", "- L2")
    table = rich.table.Table(*columns)
    for share in (0.5, 0.25):
        base = None
        for criterion, iterations in [*((c, 1) for c in CRITERIA), ("l2", 3), ("taylor", 3)]:
            pairs = zip(models, seeds, strict=True)
            found = [
                shrunk(model, seed, criterion, share, iterations, arguments.quick)
                for model, seed in pairs
            ]
            before, tuned = zip(*found, strict=True)
            base = base or tuned
            lost = with_error([a - b for a, b in zip(tuned, whole, strict=True)])
            beside = with_error([a - b for a, b in zip(tuned, base, strict=True)])
            means = [f"{statistics.mean(each):.2f}" for each in (before, tuned)]
            row = (f"{share:.0%}", criterion, str(iterations), *means, lost, beside)
            console.print("  ".join(row))
            table.add_row(*row)
    console.print(table)


def times(console, arguments):
    """Seconds of the two bars."""
    x = inputs = keras.Input((8,))
    for _ in range(500):
        x = keras.layers.Add()([x, keras.layers.Dense(8)(keras.layers.Dense(16)(x))])
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    start = time.perf_counter()
    found = len(groups(Coupling(tfc.expand(model))))
    taken = time.perf_counter() - start
    console.print(f"{found} groups of {len(model.layers)} layers: {taken:.1f} s (bar 10 s)")
    model = keras.applications.MobileNetV2(weights=None)
    start = time.perf_counter()
    tfc.shrink(model, ratio=0.5)
    taken = time.perf_counter() - start
    console.print(f"shrink of MobileNetV2 by a ratio: {taken:.1f} s (bar 20 s)")
    start = time.perf_counter()
    tfc.shrink(model, target_macs=150_000_000, verbose=0)
    taken = time.perf_counter() - start
    console.print(f"shrink of MobileNetV2 to half of its MACs: {taken:.1f} s")


def _resident() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(name):
    """Print the bytes of the weights, of the model as a whole, and of what `shrink` adds."""
    tfc.shrink(demo.cnn(), ratio=0.5)  # What is loaded at the first use does not count.
    gc.collect()
    start = _resident()
    model = getattr(keras.applications, name)(weights=None)
    gc.collect()
    built = _resident()
    small = tfc.shrink(model, ratio=0.5)
    peak = max(_peak(), _resident())
    weights = 4 * model.count_params()
    print(json.dumps([weights, built - start, peak - built, 4 * small.count_params()]))


def memory(console, arguments):
    """Peaks beside the model."""
    table = rich.table.Table("MB", "weights", "model", "shrink adds", "peak / model", "result")
    for name in MODELS[: 1 if arguments.quick else None]:
        done = run_module("tests.benchmarks.shrinking", "--measure", name)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        weights, model, added, small = json.loads(done.stdout.strip().splitlines()[-1])
        cells = [f"{each / 2**20:.0f}" for each in (weights, model, added)]
        ratio = f"{(model + added) / model:.2f} (bar 2)"
        table.add_row(name, *cells, ratio, f"{small / 2**20:.0f}")
    console.print(table)


PARTS = {"speed": speed, "criteria": criteria, "time": times, "memory": memory}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=SPEED, default=list(SPEED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs and rounds")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_memory(arguments.measure)
        return
    warnings.filterwarnings("ignore")  # Of operators in float; here only the clock counts.
    console = rich.console.Console(highlight=False, width=110)
    for name in arguments.only:
        console.print(f"[bold]{name}[/bold]")
        PARTS[name](console, arguments)


if __name__ == "__main__":
    main()
