"""Low rank: test accuracy against the share of parameters kept, plain and activation-aware.

    python -m tests.benchmarks.factorization [--seeds 3] [--quick]

A small convolutional network and a multi-layer perceptron are trained on the MNIST digits of
`tfcompress.zoo` and factorized to 50, 30, 20 and 10% of their parameters, with and without
calibration data. Prints, for each, the test accuracy before and after an epoch of fine-tuning, as
means over seeds.
"""

import argparse
import statistics

import keras
import rich.console

import tfcompress as tfc
from tests.benchmarks.qat import BATCH_SIZE, compile_network, digits, network

SHARES = (0.5, 0.3, 0.2, 0.1)
CALIBRATION = 1000


def perceptron():
    """Two wide layers."""
    hidden = [keras.layers.Dense(width, activation="relu") for width in (512, 256)]
    inputs = keras.Input((28, 28, 1))
    return keras.Sequential([inputs, keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])


NETWORKS = {"CNN": lambda: network(keras), "MLP": perceptron}


def trained(name, seed, epochs):
    """A network for digits."""
    x, y, *_ = digits()
    keras.utils.set_random_seed(seed)
    model = compile_network(keras, NETWORKS[name](), 2e-3)
    model.fit(x, y, BATCH_SIZE, epochs, verbose=0)
    return model


def accuracy(model):
    """Test accuracy in percent."""
    *_, x, y = digits()
    return 100 * model.evaluate(x, y, verbose=0)[1]


def measure(model, share, calibrated):
    """Accuracy in percent of a factorized model, before and after an epoch."""
    x, y, *_ = digits()
    small = tfc.factorize(
        model,
        target_parameters=int(share * model.count_params()),
        calibration=x[:CALIBRATION] if calibrated else None,
        verbose=0,
    )
    compile_network(keras, small, 1e-3)
    before = accuracy(small)
    small.fit(x, y, BATCH_SIZE, 1, verbose=0)
    return before, accuracy(small)


def main():
    """Measure and print, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch of training")
    arguments = parser.parse_args()
    seeds, epochs = (1, 1) if arguments.quick else (arguments.seeds, 8)
    console = rich.console.Console(highlight=False)
    for name in NETWORKS:
        models = [trained(name, seed, epochs) for seed in range(seeds)]
        console.print(f"{name}: {statistics.mean(map(accuracy, models)):.1f}%")
        for share in SHARES:
            for calibrated in (False, True):
                found = zip(*(measure(model, share, calibrated) for model in models), strict=True)
                before, after = map(statistics.mean, found)
                how = "calibrated" if calibrated else "plain"
                console.print(f"  {share:.0%} {how}: {before:.1f}%, tuned {after:.1f}%")


if __name__ == "__main__":
    main()
