"""What integers cost in accuracy: MobileNetV2 and the demo's CNN, as the LiteRT files that run.

    python -m tests.benchmarks.quantized_models [--quick] [--only mobilenet cnn] [--seed 0]

Both are trained on the MNIST digits of `tfcompress.zoo`, 4,000 of them, and tested on 1,000;
MobileNetV2 (Keras applications, from random weights) sees them scaled up to 96x96x3. Then int8
after training, int8 by quantization-aware training, and 4-bit weights with 8-bit activations on
learned scales, each exported, verified and run on the test images. Bars: no operator in float,
and at most 0.5 points below the float model at int8, 1.5 at 4 bits.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import rich.table

import tfcompress as tfc
from tfcompress import demo
from tfcompress.export import ExportError

BATCH_SIZE, CALIBRATION, VERIFICATION = 32, 500, 200
MOBILENET_SIZE = 96


def mobilenet():
    """MobileNetV2 for ten classes, with logits."""
    model = keras.applications.MobileNetV2(
        (MOBILENET_SIZE, MOBILENET_SIZE, 3), weights=None, classes=10, classifier_activation=None
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # With 125 steps an epoch, 0.999 would still remember the initial values.
            layer.momentum = 0.9
    return model


def scaled_up(images):
    """Digits of 28x28 as (96, 96, 3), in [-1, 1]."""
    size = (MOBILENET_SIZE, MOBILENET_SIZE)
    parts = [
        keras.ops.convert_to_numpy(keras.ops.image.resize(part[..., None], size))
        for part in np.array_split(images, 10)
    ]
    return np.repeat(np.concatenate(parts) * 2 - 1, 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and how it is trained here.

    Args:
        build: Makes it.
        prepare: Digits to what it reads.
        learning_rate: For new weights; a cosine takes it to zero.
        fine_rate: The same for fine-tuning.
        epochs: For new weights.
        fine_tuning: Epochs of fine-tuning.
    """

    build: Callable[[], keras.Model]
    prepare: Callable
    learning_rate: float
    fine_rate: float
    epochs: int
    fine_tuning: int


NETWORKS = {
    "cnn": Network(demo.cnn, lambda images: images, 1e-2, 1e-3, 6, 2),
    "mobilenet": Network(mobilenet, scaled_up, 2e-3, 1e-4, 4, 1),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One row: accuracies in percent, and what its file says of itself."""

    model: str
    variant: str
    accuracy: float
    drop: float
    bar: float
    artefact: tfc.artefact.Artefact
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether it is within both bars."""
        return self.drop <= self.bar and not self.artefact.float_operators

    def cells(self) -> list[str]:
        """What the table shows."""
        steps, in_float = self.artefact.output_steps, self.artefact.float_operators
        return [
            self.model,
            self.variant,
            f"{self.accuracy:.1f}%",
            f"{self.drop:+.1f}",
            f"{self.bar:.1f}",
            str(len(in_float)),
            "-" if steps is None else f"{steps:.1f}",
            f"{self.artefact.bytes / 1e3:.0f}",
            f"{self.seconds:.0f}",
            "yes" if self.holds else "NO",
        ]


COLUMNS = (
    "model", "variant", "accuracy", "points lost", "bar", "float operators",
    "steps from simulation", "kB", "s", "holds",
)  # fmt: skip


class Study:
    """One trained network, its data and the directory of its files."""

    def __init__(self, name, seed, directory, quick=False):
        self.name, self.network, self.directory = name, NETWORKS[name], directory
        (x, self.y), (x_test, self.y_test) = tfc.zoo.mnist5k(seed)
        self.x, self.x_test = self.network.prepare(x), self.network.prepare(x_test)
        self.epochs, self.fine_tuning = self.network.epochs, self.network.fine_tuning
        if quick:
            self.x, self.y, self.epochs, self.fine_tuning = self.x[:640], self.y[:640], 1, 1
        keras.utils.set_random_seed(seed)
        self.model = self.network.build()
        self.fit(self.model, self.epochs, self.network.learning_rate)
        self.accuracy = 100 * self.model.evaluate(self.x_test, self.y_test, verbose=0)[1]

    def fit(self, model, epochs, learning_rate, callbacks=()):
        """Train with Adam and a cosine schedule down to zero."""
        steps = epochs * -(-len(self.x) // BATCH_SIZE)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,  # XLA is 20 times slower on MobileNetV2 on a CPU.
        )
        model.fit(
            self.x, self.y, BATCH_SIZE, epochs, verbose=0, shuffle=True, callbacks=list(callbacks)
        )

    def after_training(self):
        """Int8 weights and activations, on ranges that some training images show."""
        return tfc.quantize(self.model, calibration=self.x[:CALIBRATION], verbose=0)

    def by_training(self):
        """A copy, trained on with the rounding."""
        model = keras.models.clone_model(self.model)
        model.set_weights(self.model.get_weights())
        qat = tfc.callbacks.QuantizationAwareTraining()
        self.fit(model, self.fine_tuning, self.network.fine_rate, [qat])
        return model

    @functools.cached_property
    def on_learned_scales(self):
        """Weights of 4 bits, activations of 8, trained with their scales."""
        model = tfc.quantize(
            self.model, "w4a8", calibration=self.x[:CALIBRATION], scales="lsq", verbose=0
        )
        self.fit(model, self.fine_tuning, self.network.fine_rate)
        return model

    def result(self, variant, precision, bar, make) -> Result:
        """Make a quantized model, export it and run the file on the test images."""
        start = time.perf_counter()
        artefact = tfc.export(
            make(),
            self.directory / f"{self.name}-{variant.split()[0]}-{precision}.tflite",
            precision,
            verify_on=self.x_test[:VERIFICATION],
        )
        runner = artefact.runner(None)
        parts = np.array_split(self.x_test, len(self.x_test) // 100)
        found = np.concatenate([runner(part).argmax(axis=-1) for part in parts])
        accuracy = float(100 * np.mean(found == self.y_test))
        seconds = time.perf_counter() - start
        lost = self.accuracy - accuracy
        return Result(self.name, variant, accuracy, lost, bar, artefact, seconds)

    def variants(self):
        """What `result` takes, for each way of quantizing."""
        yield "after training, int8", "int8", 0.5, self.after_training
        yield "by training, int8", "int8", 0.5, self.by_training
        yield "learned scales, w4a8", "int8", 1.5, lambda: self.on_learned_scales
        # The same weights in half the bytes. Biases have 18 times coarser steps there: deep
        # networks may fail their verification for it.
        yield "the same, packed", "int4", 1.5, lambda: self.on_learned_scales


def report(study, variant, console, table):
    """Measure one variant; a line, and a row. A file that fails its verification is a result."""
    try:
        result = study.result(*variant)
    except ExportError as error:
        console.print(f"{study.name}, {variant[0]}: NOT EXPORTED: {error}")
        table.add_row(study.name, variant[0], *[""] * 7, "NO")
        return
    table.add_row(*result.cells())
    in_float, steps = result.artefact.float_operators, result.artefact.output_steps
    console.print(
        f"{study.name}, {result.variant}: {result.accuracy:.1f}%, {result.drop:+.1f} points lost, "
        f"{len(in_float)} operators in float, {steps or 0:.1f} steps from the simulation, "
        f"{result.seconds:.0f} s"
    )
    for operator in in_float:
        console.print(f"    {operator}")


def main():
    """Measure and print, a line as soon as it is known, and all in a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="640 digits, one epoch each")
    arguments = parser.parse_args()
    console = rich.console.Console(highlight=False, width=110)
    table = rich.table.Table(*COLUMNS, title="LiteRT files on 1,000 test digits")
    # The table has the number of operators left in float; their names are printed below.
    warnings.filterwarnings("ignore", message="These operators of the")
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.only:
            start = time.perf_counter()
            study = Study(name, arguments.seed, pathlib.Path(directory), arguments.quick)
            seconds = time.perf_counter() - start
            console.print(f"{name}, float32: {study.accuracy:.1f}%, {seconds:.0f} s")
            table.add_row(name, "float32", f"{study.accuracy:.1f}%", *[""] * 5, f"{seconds:.0f}")
            for variant in study.variants():
                report(study, variant, console, table)
    console.print(table)


if __name__ == "__main__":
    main()
