"""Models split over devices: `python -m tests.parallel.splits NUMBER [CASE ...]`."""

import functools
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.models import mlp
from tests.parallel.stages import features, gradients, held_bytes, tokens, transformer
from tests.processes import logical_cpus, report_cases
from tfcompress.parallel.tensor_parallel import TensorParallel

SGD = keras.optimizers.SGD


def regularized():
    """Three layers, of which two can be a pair; the last one ends in an activation."""
    wide = layers.Dense(33, "relu", kernel_regularizer="l2", bias_regularizer="l2")
    back = layers.Dense(12, "tanh", kernel_regularizer="l2", bias_regularizer="l2")
    return keras.Sequential([keras.Input((12,)), wide, back, layers.Dense(3)])


def convolved():
    """Batch norms between the layers of a pair."""
    x = inputs = keras.Input((12,))
    x = layers.BatchNormalization()(layers.Dense(32, use_bias=False)(x))
    x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


CASES = {
    "mlp": {"make": mlp, "regions": 1},
    "regularized": {"make": regularized, "regions": 1},
    "batch norm": {"make": convolved, "regions": 1},
    "transformer": {"make": transformer, "data": tokens, "regions": 4},
}


def check(number, case):
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        models.append(case["make"]())
    one, original = models
    split = TensorParallel(original, [f"CPU:{i}" for i in range(number)])
    assert len(split.regions) == case["regions"], split.regions
    x, y = (values[:24] for values in case.get("data", features)())
    for model in (one, split):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(SGD(0.1, momentum=0.9), loss)
    assert_close(split.predict(x, 8, verbose=0), one.predict(x, 8, verbose=0))
    outputs = [gradients(model, model, x[:8]) for model in (one, split)]
    norms = [sum(float(tf.reduce_sum(g**2)) for g in found) for _, found in outputs]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    losses = [model.fit(x, y, 8, 2, 0, shuffle=False).history["loss"] for model in (one, split)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert split.gather() is original
    for ours, theirs in zip(original.get_weights(), one.get_weights(), strict=True):
        assert_close(ours, theirs)
    held = held_bytes(split.variables)
    for place in range(1, number):
        expected = sum(region.weight_bytes[place] for region in split.regions)
        assert held[f"/device:CPU:{place}"] >= expected > 0, held


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)


def main(number, *names):
    logical_cpus(number)
    report_cases(functools.partial(check, number), CASES, names)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
