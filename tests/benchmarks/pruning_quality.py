"""What each way of pruning costs in accuracy, on real digits; means over seeds.

    python -m tests.benchmarks.pruning_quality [--seeds 3] [--sparsities 0.9 0.95 0.98] [--quick]

Two tables for the demo's CNN on MNIST-5k (1,000 test images): a trained model pruned and fine-tuned
for 4 epochs, at once or gradually, with the sparsity shared out in different ways; and a sparse
model trained from scratch for 10 epochs, with a fixed random mask, SET and RigL.
"""

import argparse
import os
import statistics
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import rich.console
import rich.progress
import rich.table

import tfcompress as tfc
from tfcompress import demo, zoo

BATCH_SIZE, TRAINING, FINE_TUNING, FROM_SCRATCH = 64, 6, 4, 10


def gradual(sparsity, steps):
    """Cubic from 0 over the first half of the fine-tuning."""
    return tfc.schedules.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=steps // 2)


def _gradual(**kwargs):
    return lambda s, steps: tfc.callbacks.Pruning(gradual(s, steps), frequency=10, **kwargs)


FINE_TUNED: dict[str, Callable] = {
    "one-shot, uniform": lambda s, steps: tfc.callbacks.Pruning(s),
    "one-shot, global": lambda s, steps: tfc.callbacks.Pruning(s, allocation="global"),
    "gradual, uniform": _gradual(),
    "gradual, global": _gradual(allocation="global"),
    "gradual, ERK": _gradual(allocation="erk"),
    "gradual, LAMP": _gradual(allocation="lamp"),
    "gradual, global, gradient": _gradual(allocation="global", criterion="gradient"),
    "gradual, global, fisher": _gradual(allocation="global", criterion="fisher"),
}


def _scratch(allocation, regrowth=None):
    def make(sparsity, steps):
        rule = regrowth and regrowth(end_step=steps * 3 // 4)
        return tfc.callbacks.Pruning(
            sparsity, criterion="random", allocation=allocation, frequency=20, regrowth=rule
        )

    return make


SCRATCH: dict[str, Callable] = {
    "static random, uniform": _scratch("uniform"),
    "SET, uniform": _scratch("uniform", tfc.regrowth.SET),
    "RigL, uniform": _scratch("uniform", tfc.regrowth.RigL),
    "static random, ERK": _scratch("erk"),
    "SET, ERK": _scratch("erk", tfc.regrowth.SET),
    "RigL, ERK": _scratch("erk", tfc.regrowth.RigL),
}


class Study:
    """The data and the trained model of one seed."""

    def __init__(self, seed, epochs=TRAINING):
        self.seed = seed
        (self.x, self.y), self.test = zoo.mnist5k(seed)
        keras.utils.set_random_seed(seed)
        self.model = demo.cnn()
        self.train(self.model, epochs, 1e-2)

    def fine_tuned(self, make, sparsity, epochs=FINE_TUNING) -> float:
        """Test accuracy in percent of a copy, fine-tuned under the callback."""
        keras.utils.set_random_seed(self.seed)
        model = keras.models.clone_model(self.model)
        model.set_weights(self.model.get_weights())
        return self.train(model, epochs, 1e-3, make(sparsity, self.steps(epochs)))

    def from_scratch(self, make, sparsity, epochs=FROM_SCRATCH) -> float:
        """Test accuracy in percent of a new model trained under the callback."""
        keras.utils.set_random_seed(self.seed)
        return self.train(demo.cnn(), epochs, 1e-2, make(sparsity, self.steps(epochs)))

    def steps(self, epochs):
        """Optimizer updates in that many epochs."""
        return epochs * -(-len(self.x) // BATCH_SIZE)

    def train(self, model, epochs, learning_rate, *callbacks):
        """Train with Adam and a cosine schedule; test accuracy in percent."""
        decay = keras.optimizers.schedules.CosineDecay(learning_rate, self.steps(epochs))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(decay), loss, metrics=["accuracy"])
        model.fit(
            self.x,
            self.y,
            batch_size=BATCH_SIZE,
            epochs=epochs,
            verbose=0,
            callbacks=list(callbacks),
        )
        return 100 * model.evaluate(*self.test, verbose=0)[1]


def table(title, sparsities, results):
    """Rows of `mean (lowest to highest)` by variant and sparsity."""
    made = rich.table.Table("", *(f"{100 * s:g}% zeros" for s in sparsities), title=title)
    for name, by_sparsity in results.items():
        cells = [
            f"{statistics.mean(by_sparsity[s]):.1f} "
            f"({min(by_sparsity[s]):.1f} to {max(by_sparsity[s]):.1f})"
            for s in sparsities
        ]
        made.add_row(name, *cells)
    return made


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch each, 95% zeros")
    arguments = parser.parse_args()
    seeds, sparsities, epochs = range(arguments.seeds), arguments.sparsities, {}
    if arguments.quick:
        seeds, sparsities, epochs = range(1), [0.95], {"epochs": 1}
    tables = {"fine-tuned": FINE_TUNED, "from scratch": SCRATCH}
    results = {
        name: {variant: {s: [] for s in sparsities} for variant in variants}
        for name, variants in tables.items()
    }
    dense = []
    total = len(seeds) * len(sparsities) * sum(map(len, tables.values()))
    with rich.progress.Progress() as progress:
        task = progress.add_task("training", total=total)
        for seed in seeds:
            study = Study(seed, **epochs)
            dense.append(100 * study.model.evaluate(*study.test, verbose=0)[1])
            for s in sparsities:
                for variant, make in FINE_TUNED.items():
                    results["fine-tuned"][variant][s].append(study.fine_tuned(make, s, **epochs))
                    progress.advance(task)
                for variant, make in SCRATCH.items():
                    accuracy = study.from_scratch(make, s, **epochs)
                    results["from scratch"][variant][s].append(accuracy)
                    progress.advance(task)
    console = rich.console.Console(width=120)
    console.print(f"Dense: {statistics.mean(dense):.1f}% ({', '.join(f'{d:.1f}' for d in dense)})")
    for name, by_variant in results.items():
        console.print(table(f"Test accuracy in %, {name}", sparsities, by_variant))


if __name__ == "__main__":
    main()
