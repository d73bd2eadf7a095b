"""Movement against magnitude pruning of a pretrained transformer, at few weights kept.

    python -m tests.benchmarks.movement [--seeds 3] [--kept 0.1 0.03] [--epochs 4] [--quick]

MiniLM (6 layers of 384) is fine-tuned on film reviews and pruned at the same time, from its
pretrained weights: the kernels of its encoder go down a cubic schedule to 10% and 3% of their
weights, after a warm-up without pruning and before a recovery. Test accuracy on 2,292 reviews, mean
over seeds, which choose the split, the head and the order. Sanh et al. 2020 do this on MNLI, SQuAD
and QQP with BERT-base, embeddings frozen, 10 epochs of which one is warm-up and two are recovery:
55,000 steps on SQuAD, here 252. `--warm-up 0.1 --recovery 0.2 --freeze-embeddings --epochs 10
--num-train 6879` is their setting on all the reviews there are, 2,150 steps;
`tests.benchmarks.movement_steps` shows what the number of steps does.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.console

import tfcompress as tfc
from tests.benchmarks import text

ENCODER = ["*transformer_layer*"]
CRITERIA = ("magnitude", "movement")


def accuracy(criterion, kept, seed, arguments):
    """Percent right on the test set; a criterion of None fine-tunes without pruning."""
    data = text.load(seed, arguments.num_train, arguments.sequence_length)
    model = text.classifier(
        arguments.learning_rate, seed=seed, freeze_embeddings=arguments.freeze_embeddings
    )
    steps = arguments.epochs * -(-len(data.y_train) // arguments.batch_size)
    callbacks = []
    if criterion is not None:
        schedule = tfc.schedules.PolynomialDecay(
            0.0,
            1 - kept,
            begin_step=int(steps * arguments.warm_up),
            end_step=int(steps * (1 - arguments.recovery)),
        )
        callbacks = [
            tfc.callbacks.Pruning(
                schedule,
                criterion=criterion,
                allocation=arguments.allocation,
                frequency=5,
                include=ENCODER,
            )
        ]
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    return 100 * model.evaluate(data.x_test, data.y_test, batch_size=128, verbose=0)[1]


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.1, 0.03])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--warm-up", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--recovery", type=float, default=1 / 3, help="share of the steps")
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one seed, 200 reviews, one epoch")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.num_train, arguments.epochs = 1, 200, 1
    console = rich.console.Console(highlight=False)
    cases = [(None, 1.0), *((each, kept) for kept in arguments.kept for each in CRITERIA)]
    for criterion, kept in cases:
        start, found = time.perf_counter(), []
        for seed in range(arguments.seeds):
            found.append(accuracy(criterion, kept, seed, arguments))
        console.print(
            f"{criterion or 'not pruned':<12} {kept:5.0%} kept  {statistics.mean(found):5.1f}% "
            f"({', '.join(f'{each:.1f}' for each in found)})  "
            f"{(time.perf_counter() - start) / arguments.seeds:.0f} s a run"
        )


if __name__ == "__main__":
    main()
