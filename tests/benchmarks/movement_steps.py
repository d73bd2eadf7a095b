"""Movement against magnitude pruning as the training gets longer, on real digits.

    python -m tests.benchmarks.movement_steps [--seeds 3] [--kept 0.03 0.01] [--epochs 10 40]

Three layers of 256 learn the ten digits of MNIST-5k; then they are fine-tuned to tell odd digits
from even ones, and pruned at the same time, on a cubic schedule: a tenth of the training is a
warm-up without pruning, the last third is for recovery. Both criteria have the same schedule, data,
learning rate and seeds. Test accuracy on 1,000 digits. What `tests.benchmarks.movement` compares on
a transformer, in a setting where the number of steps can be raised on a small machine.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import rich.console

import tfcompress as tfc
from tfcompress import zoo

CRITERIA = ("magnitude", "movement")
BATCH_SIZE, PRETRAINING, HIDDEN = 64, 10, 3


def network(num_classes, learning_rate):
    """Three hidden layers over flat pixels, compiled."""
    hidden = [keras.layers.Dense(256, activation="relu") for _ in range(HIDDEN)]
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Flatten(),
            *hidden,
            keras.layers.Dense(num_classes, name="head"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=60,
    )
    return model


def pretrained(seed, x, y):
    """The weights of the hidden layers, after the ten digits were learned."""
    keras.utils.set_random_seed(seed)
    model = network(10, 1e-3)
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=PRETRAINING, verbose=0)
    return model.get_weights()[: 2 * HIDDEN]


def accuracy(criterion, kept, epochs, seed, start, data, learning_rate):
    """Percent right on odd against even; a criterion of None fine-tunes without pruning."""
    (x_train, y_train), (x_test, y_test) = data
    keras.utils.set_random_seed(seed)
    model = network(2, learning_rate)
    model.set_weights([*start, *model.get_weights()[2 * HIDDEN :]])
    steps = epochs * -(-len(x_train) // BATCH_SIZE)
    schedule = tfc.schedules.PolynomialDecay(
        0.0, 1 - kept, begin_step=steps // 10, end_step=steps * 2 // 3
    )
    pruning = tfc.callbacks.Pruning(
        schedule, criterion=criterion or "magnitude", frequency=5, exclude="*head*"
    )
    model.fit(
        x_train,
        y_train % 2,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        verbose=0,
        callbacks=[pruning] if criterion else [],
    )
    return 100 * model.evaluate(x_test, y_test % 2, verbose=0)[1]


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.03, 0.01])
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--quick", action="store_true", help="one seed, 2 epochs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, [2]
    console = rich.console.Console(highlight=False)
    data = [zoo.mnist5k(seed) for seed in range(arguments.seeds)]
    starts = [pretrained(seed, *each[0]) for seed, each in enumerate(data)]
    cases = [(None, 1.0), *((each, kept) for kept in arguments.kept for each in CRITERIA)]
    for epochs in arguments.epochs:
        for criterion, kept in cases:
            begin = time.perf_counter()
            found = [
                accuracy(criterion, kept, epochs, seed, start, each, arguments.learning_rate)
                for seed, (start, each) in enumerate(zip(starts, data, strict=True))
            ]
            steps = epochs * -(-len(data[0][0][0]) // BATCH_SIZE)
            console.print(
                f"{steps:6d} steps  {criterion or 'not pruned':<10} {kept:4.0%} kept  "
                f"{statistics.mean(found):5.1f}% ({', '.join(f'{each:.1f}' for each in found)})  "
                f"{(time.perf_counter() - begin) / arguments.seeds:.0f} s a run"
            )


if __name__ == "__main__":
    main()
