"""Sentiment of film reviews with MiniLM, for benchmarks: token arrays, and a classifier over them.

    python -m tests.benchmarks.text [--num-train 2000] [--epochs 2] [--jit]

Prints, epoch by epoch, the seconds of training and the accuracy on the whole test set.
"""

import argparse
import dataclasses
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console

from tfcompress import zoo


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token arrays `x`, keyed as the model's inputs, and labels `y`, to train and to test on."""

    x_train: dict[str, np.ndarray]
    y_train: np.ndarray
    x_test: dict[str, np.ndarray]
    y_test: np.ndarray


def load(seed=0, num_train=None, sequence_length=64):
    """The reviews as token arrays of shape `(n, sequence_length)`, int32.

    Args:
        seed: Chooses the split.
        num_train: How many of the 6,879 reviews to train on; None for all.
        sequence_length: Tokens of a review; 99.9% of the reviews have at most 64.

    Returns:
        A `Tokens`; its test set is always whole, 2,292 reviews.
    """
    (x_train, y_train), (x_test, y_test) = zoo.movie_reviews(seed)
    preprocessor = zoo.minilm_preprocessor(sequence_length)
    return Tokens(
        _tokens(preprocessor, x_train[:num_train]),
        y_train[:num_train],
        _tokens(preprocessor, x_test),
        y_test,
    )


def _tokens(preprocessor, texts):
    tokens = preprocessor(list(map(str, texts)))
    return {name: np.asarray(value, np.int32) for name, value in tokens.items()}


def classifier(learning_rate=5e-5, jit_compile=False, seed=0, freeze_embeddings=False):
    """MiniLM with two logits over token arrays, compiled with Adam."""
    keras.utils.set_random_seed(seed)
    # The same graph as a plain model: KerasHub's own `fit` never shuffles, and tokenizes anew in
    # every epoch.
    task = zoo.minilm(num_classes=2)
    for layer in task.backbone.layers:
        layer.trainable = not (freeze_embeddings and "embedding" in layer.name)
    model = keras.Model(task.input, task.output, name="classifier")
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    return model


class Seconds(keras.callbacks.Callback):
    """The time of each epoch and, without its first step, of a step."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.first = time.perf_counter()
        self.last, self.batch = time.perf_counter(), batch

    def on_epoch_end(self, epoch, logs=None):
        self.epoch = self.last - self.start
        self.step = (self.last - self.first) / self.batch


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-train", type=int, help="reviews to train on; all without it")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    arguments = parser.parse_args()
    console = rich.console.Console(highlight=False)
    data = load(arguments.seed, arguments.num_train, arguments.sequence_length)
    model = classifier(arguments.learning_rate, arguments.jit, arguments.seed)
    console.print(f"{len(data.y_train)} reviews, {'XLA' if arguments.jit else 'graph'}")
    seconds = Seconds()
    for epoch in range(1, arguments.epochs + 1):
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=arguments.batch_size,
            callbacks=[seconds],
            verbose=0,
        )
        _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=128, verbose=0)
        console.print(
            f"epoch {epoch}: {seconds.epoch:.0f} s, {1e3 * seconds.step:.0f} ms a step, "
            f"test accuracy {accuracy:.4f}"
        )


if __name__ == "__main__":
    main()
