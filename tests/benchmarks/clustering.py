"""Weight sharing: test accuracy and zipped bytes for several numbers of values.

    python -m tests.benchmarks.clustering [--seeds 3] [--quick]

A small convolutional network is trained on the MNIST digits of `tfcompress.zoo`, as it is and
pruned to 80%, clustered into 8, 16, 32 and 64 values, and fine-tuned. Prints, for each, the test
accuracy before and after fine-tuning and the zipped bytes of the stripped `.keras` file, as means
over seeds.
"""

import argparse
import statistics

import keras
import rich.console

import tfcompress as tfc
from tests.benchmarks.qat import BATCH_SIZE, compile_network, digits, network
from tfcompress.layers import cluster

SPARSITY = 0.8


def trained(seed, epochs, sparsity):
    """A network for digits, pruned once it is trained, and fine-tuned with its zeros held."""
    x, y, *_ = digits()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, network(keras), 2e-3)
    model.fit(x, y, BATCH_SIZE, epochs, verbose=0)
    if sparsity:
        pruning = tfc.callbacks.Pruning(sparsity)
        model.fit(x, y, BATCH_SIZE, epochs, verbose=0, callbacks=[pruning])
    return model


def accuracy(model):
    """Test accuracy in percent."""
    *_, x, y = digits()
    return 100 * model.evaluate(x, y, verbose=0)[1]


def measure(model, clusters, epochs):
    """Accuracy before and after fine-tuning in percent, and the zipped bytes of the plain model."""
    x, y, *_ = digits()
    clustered = compile_network(keras, cluster(model, clusters, verbose=0), 1e-3)
    before = accuracy(clustered)
    clustered.fit(x, y, BATCH_SIZE, epochs, verbose=0)
    return before, accuracy(clustered), tfc.measure.size(tfc.strip(clustered)).zipped_bytes


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    arguments = parser.parse_args()
    seeds, epochs, tuning = (1, 1, 1) if arguments.quick else (arguments.seeds, 8, 3)
    console = rich.console.Console(highlight=False)
    for sparsity in (0.0, SPARSITY):
        models = [trained(seed, epochs, sparsity) for seed in range(seeds)]
        plain = statistics.mean(map(accuracy, models))
        zipped = statistics.mean(tfc.measure.size(model).zipped_bytes for model in models)
        console.print(f"{sparsity:.0%} zeros: {plain:.1f}%, {zipped / 1000:.0f} kB zipped")
        for clusters in (8, 16, 32, 64):
            found = zip(*(measure(model, clusters, tuning) for model in models), strict=True)
            before, after, size = map(statistics.mean, found)
            share = f"{size / 1000:.0f} kB, {zipped / size:.1f}x smaller"
            console.print(f"  {clusters} values: {before:.1f}%, tuned {after:.1f}%, {share}")


if __name__ == "__main__":
    main()
