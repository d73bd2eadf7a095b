"""Quantization-aware training here and in TFMOT: accuracy over seeds, and the cost of a step.

    python -m tests.benchmarks.qat [--seeds 5] [--quick]

A small convolutional network is trained on the MNIST digits of `tfcompress.zoo`, then fine-tuned at
8 bits from the same weights, with the same data, optimizer and epochs: by
`tfcompress.callbacks.QuantizationAwareTraining`, and by TFMOT's `quantize_model` on the same
network in tf_keras, in a process of its own. Prints the test accuracy of both int8 LiteRT files
for each seed, the mean difference with its standard error, and what a step of each costs, over the
plain step of its own Keras (median of interleaved pairs, quartiles).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console

import tfcompress as tfc
from tfcompress.artefact import Artefact

EPOCHS, FINE_TUNING = 6, 3
BATCH_SIZE = 64
LEARNING_RATE, FINE_RATE = 2e-3, 5e-4


def network(library):
    """The network, of `keras` or `tf_keras` layers."""
    layers = library.layers
    return library.Sequential(
        [
            layers.InputLayer((28, 28, 1)),
            layers.Conv2D(24, 5, 2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(48, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(96, activation="relu"),
            layers.Dense(10),
        ]
    )


def compile_network(library, model, learning_rate):
    """Compile for digits, at its own optimizer."""
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


def digits():
    """The 4,000 and 1,000 digits as (28, 28, 1)."""
    (x, y), (x_test, y_test) = tfc.zoo.mnist5k()
    return x[..., None], y, x_test[..., None], y_test


def step_ratios(plain, quantized, pairs, steps):
    """Seconds of `fit` on some steps, with quantization over without, once a pair."""

    def seconds(fit):
        start = time.perf_counter()
        fit(steps)
        return time.perf_counter() - start

    seconds(plain), seconds(quantized)
    ratios = []
    for pair in range(pairs):
        order = (plain, quantized) if pair % 2 else (quantized, plain)
        taken = {fit: seconds(fit) for fit in order}
        ratios.append(taken[quantized] / taken[plain])
    return ratios


def litert_accuracy(artefact, x, y):
    """Test accuracy of a file, in percent."""
    runner = artefact.runner()
    found = np.concatenate([runner(x[i : i + 100]).argmax(-1) for i in range(0, len(x), 100)])
    return float(100 * np.mean(found == y))


def run_ours(seed, directory, epochs):
    """Train, save the weights for TFMOT, fine-tune at 8 bits; both accuracies in percent."""
    x, y, x_test, y_test = digits()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, network(keras), LEARNING_RATE)
    model.fit(x, y, BATCH_SIZE, EPOCHS if epochs is None else epochs, verbose=0)
    np.savez(directory / "weights.npz", *model.get_weights())
    plain = 100 * model.evaluate(x_test, y_test, verbose=0)[1]
    compile_network(keras, model, FINE_RATE)
    qat = tfc.callbacks.QuantizationAwareTraining()
    model.fit(x, y, BATCH_SIZE, epochs or FINE_TUNING, verbose=0, callbacks=[qat])
    artefact = tfc.export(model, directory / "ours.tflite", "int8", verify_on=x_test[:500])
    return plain, litert_accuracy(artefact, x_test, y_test)


def cost_of_ours(pairs, steps):
    """Step with QAT over step without, in graph mode."""
    x, y, *_ = digits()
    models = [compile_network(keras, network(keras), FINE_RATE) for _ in range(2)]
    qat = tfc.callbacks.QuantizationAwareTraining()

    def fit(model, callbacks):
        size = BATCH_SIZE
        return lambda steps: model.fit(
            x[: steps * size], y[: steps * size], size, verbose=0, callbacks=callbacks
        )

    plain = fit(models[0], [])
    with qat.attached(models[1]):  # Traced once for all of the pairs.
        return step_ratios(plain, fit(models[1], []), pairs, steps)


def run_tfmot(directory, seed, epochs, pairs, steps):
    """The same in tf_keras, from the weights in `directory`; called in its own process."""
    from tfcompress.schedules import import_tfmot

    tfmot = import_tfmot("tensorflow_model_optimization")
    import tensorflow as tf
    import tf_keras

    x, y, x_test, y_test = digits()
    tf_keras.utils.set_random_seed(seed)
    model = network(tf_keras)
    with np.load(directory / "weights.npz") as saved:
        model.set_weights([saved[name] for name in saved.files])
    quantized = tfmot.quantization.keras.quantize_model(model)
    compile_network(tf_keras, quantized, FINE_RATE)
    quantized.fit(x, y, BATCH_SIZE, epochs or FINE_TUNING, verbose=0)
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    (directory / "tfmot.tflite").write_bytes(converter.convert())
    result = {
        "accuracy": litert_accuracy(Artefact.load(directory / "tfmot.tflite"), x_test, y_test)
    }
    if pairs:
        plain = compile_network(tf_keras, network(tf_keras), FINE_RATE)
        size = BATCH_SIZE
        result["ratios"] = step_ratios(
            lambda n: plain.fit(x[: n * size], y[: n * size], size, verbose=0),
            lambda n: quantized.fit(x[: n * size], y[: n * size], size, verbose=0),
            pairs,
            steps,
        )
    return result


def tfmot_in_its_process(*arguments):
    """What `run_tfmot` returns there."""
    command = [sys.executable, "-m", "tests.benchmarks.qat", "--tfmot", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"TFMOT's process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 2 pairs")
    parser.add_argument("--tfmot", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tfmot:
        directory, *numbers = arguments.tfmot
        seed, epochs, pairs, steps = map(int, numbers)
        print(json.dumps(run_tfmot(pathlib.Path(directory), seed, epochs, pairs, steps)))
        return
    console = rich.console.Console(highlight=False)
    seeds, epochs, pairs, steps = arguments.seeds, None, 11, 60
    if arguments.quick:
        seeds, epochs, pairs, steps = 1, 1, 2, 10
    differences = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            directory = pathlib.Path(name)
            plain, ours = run_ours(seed, directory, epochs)
            last = seed == seeds - 1
            theirs = tfmot_in_its_process(name, seed, epochs or 0, pairs if last else 0, steps)
        differences.append(ours - theirs["accuracy"])
        figures = f"float32 {plain:.1f}, int8 here {ours:.1f}, TFMOT {theirs['accuracy']:.1f}"
        console.print(f"seed {seed}: {figures}")
    error = statistics.stdev(differences) / len(differences) ** 0.5 if seeds > 1 else float("nan")
    mean = statistics.mean(differences)
    console.print(f"here - TFMOT: {mean:+.2f} points, standard error {error:.2f}")
    for who, ratios in (("here", cost_of_ours(pairs, steps)), ("TFMOT", theirs["ratios"])):
        low, median, high = statistics.quantiles(ratios, n=4)
        console.print(f"step with QAT / without, {who}: {median:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
