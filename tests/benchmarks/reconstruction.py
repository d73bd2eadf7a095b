"""One-shot pruning with calibration data: how much of what layers compute is lost, and accuracy.

    python -m tests.benchmarks.reconstruction [--seeds 3] [--models cnn,minilm] [--quick]

For magnitude, Wanda and SparseGPT at 50% and at 2:4, without any training after pruning, on test
data that was not calibrated on: the mean over the kernels of `||XW - XW'|| / ||XW||`, where X are
the inputs in the dense model; the same ratio for the outputs of the model; and its accuracy.
MiniLM is fine-tuned on 2,000 film reviews first, for one epoch and one seed.
"""

import argparse
import collections
import glob
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import rich.table

import tfcompress as tfc
from tfcompress import zoo
from tfcompress.graph.inputs import linear_kernels, second_moments
from tfcompress.keras_hooks.walk import select_kernels

HOWS = ("50%", "2:4")


def prunable(model):
    """The kernels that all three methods prune."""
    return linear_kernels(model, list(select_kernels(model)[0]))[0]


def prune(model, criterion, calibration, how):
    """In place, the kernels that all three methods prune."""
    arguments = {"structure": "2:4"} if how == "2:4" else {"sparsity": 0.5}
    include = [glob.escape(path) for path in prunable(model)]
    data = None if criterion == "magnitude" else calibration
    tfc.prune(model, criterion=criterion, include=include, calibration=data, **arguments)


METHODS = {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}


def relative(reference, other):
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))


def layer_error(dense, pruned, moments):
    """The mean of `||XW - XW'|| / ||XW||`: from `X^T X`, without the outputs themselves."""

    def energy(matrix, moment):
        return np.einsum("io,ij,jo->", matrix, moment, matrix, optimize=True)

    ratios = [
        energy(pruned[path] - dense[path], moment) / energy(dense[path], moment)
        for path, moment in moments.items()
    ]
    return float(np.mean(np.sqrt(ratios)))


def matrices(model):
    return {
        path: kernel.to_matrix(kernel.variable.numpy().astype("float64"))
        for path, kernel in prunable(model).items()
    }


def measure(model, calibration, x_test, y_test, hows=HOWS):
    """(how, method) -> layer error, output error, accuracy and seconds; ("", "dense") as well."""
    weights, dense = model.get_weights(), matrices(model)
    reference = model.predict(x_test, verbose=0)
    moments = second_moments(model, prunable(model), x_test)
    results = {("", "dense"): (0.0, 0.0, accuracy(reference, y_test), 0.0)}
    for how in hows:
        for name, criterion in METHODS.items():
            start = time.perf_counter()
            prune(model, criterion, calibration, how)
            seconds = time.perf_counter() - start
            outputs = model.predict(x_test, verbose=0)
            errors = layer_error(dense, matrices(model), moments), relative(reference, outputs)
            results[how, name] = (*errors, accuracy(outputs, y_test), seconds)
            model.set_weights(weights)
    return results


def accuracy(outputs, labels):
    return float(np.mean(np.argmax(outputs, axis=-1) == labels))


def cnn():
    """Two convolutions and two dense layers for digits."""
    layers = [
        keras.Input((28, 28, 1)),
        keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
        keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential(layers, name="cnn")


def transformer(width=48, num_blocks=2):
    """A transformer that reads a digit as 28 rows."""
    inputs = keras.Input((28, 28))
    x = keras.layers.Dense(width, name="embed")(inputs)
    for block in range(num_blocks):
        attention = keras.layers.MultiHeadAttention(4, width // 4, name=f"attention_{block}")
        x = keras.layers.LayerNormalization()(x + attention(x, x))
        hidden = keras.layers.Dense(2 * width, activation="gelu", name=f"up_{block}")(x)
        x = keras.layers.LayerNormalization()(
            x + keras.layers.Dense(width, name=f"down_{block}")(hidden)
        )
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(x), name="transformer")


DIGITS = {"cnn": cnn, "transformer": transformer}


def trained_on_digits(name, seed=0, epochs=6):
    """A model that knows the digits; 512 of its training images; the test set."""
    keras.utils.set_random_seed(seed)
    (x_train, y_train), (x_test, y_test) = zoo.mnist5k(seed)
    model = DIGITS[name]()
    if len(model.input_shape) == 4:
        x_train, x_test = x_train[..., None], x_test[..., None]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss)
    model.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=0)
    return model, x_train[:512], x_test, y_test


def trained_on_reviews(seed=0):
    """MiniLM that tells good reviews from bad ones; 256 of its training texts; 512 test texts."""
    from tests.benchmarks import text

    data = text.load(seed, num_train=2000)
    model = text.classifier(seed=seed)
    model.fit(data.x_train, data.y_train, batch_size=32, verbose=0)
    calibration = {name: tokens[:256] for name, tokens in data.x_train.items()}
    x_test = {name: tokens[:512] for name, tokens in data.x_test.items()}
    return model, calibration, x_test, data.y_test[:512]


def show(console, name, runs):
    """The means over the seeds, and the range of the layer error."""
    table = rich.table.Table(title=f"{name}, seeds: {len(runs)}")
    for column in ("", "method", "layers", "(range)", "outputs", "accuracy", "s"):
        left = column in ("", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    gathered = collections.defaultdict(list)
    for run in runs:
        for key, values in run.items():
            gathered[key].append(values)
    for (how, method), rows in gathered.items():
        layers, outputs, accuracies, seconds = zip(*rows, strict=True)
        table.add_row(
            how,
            method,
            f"{statistics.mean(layers):.4f}",
            f"{min(layers):.3f} to {max(layers):.3f}",
            f"{statistics.mean(outputs):.4f}",
            f"{100 * statistics.mean(accuracies):.2f}%",
            f"{statistics.mean(seconds):.1f}",
        )
    console.print(table)


def main():
    """Train, measure and print, a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="trainings on digits")
    parser.add_argument("--models", default="cnn,transformer,minilm", help="which, by commas")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, no MiniLM")
    arguments = parser.parse_args()
    seeds, epochs = (1, 1) if arguments.quick else (arguments.seeds, 6)
    console = rich.console.Console()
    for name in arguments.models.split(","):
        if name in DIGITS:
            runs = [measure(*trained_on_digits(name, seed, epochs)) for seed in range(seeds)]
            show(console, name, runs)
        elif not arguments.quick:
            show(console, name, [measure(*trained_on_reviews())])


if __name__ == "__main__":
    main()
