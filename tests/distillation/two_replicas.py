"""Distillation on two replicas and on one device: `python -m tests.distillation.two_replicas`."""

import keras
import numpy as np
import tensorflow as tf

from tests.distillation.networks import data, entropy
from tfcompress.distillation import Contrastive, Distiller, TeacherCache

CASES = {
    "features, balanced": ["logits", "features"],
    "relations of examples": ["rkd_distance", "rkd_angle", "similarity", "contrastive"],
    "a bank": [Contrastive(width=8, bank=40)],
    "cache": ["logits", "features"],
}


def make(width):
    """Without batch norm, whose statistics are of a replica."""
    layers = [keras.layers.Dense(width, "tanh"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def train(name):
    """The student's weights after training, under the strategy in scope."""
    keras.utils.set_random_seed(0)
    x, y = data(64)
    sample_weight = np.linspace(0.5, 1.5, 64).astype("float32")
    losses, teacher, student = CASES[name], make(8), make(4)
    arguments = {"verbose": 0, "epochs": 3}
    if name == "cache":
        cache = TeacherCache.build(teacher, x, losses, verbose=0)
        distiller = Distiller(cache, student, losses)
        given = (cache.dataset(x, y, sample_weight, batch_size=16, shuffle=False),)
    else:
        balancing = "magnitude" if "balanced" in name else None
        distiller = Distiller(teacher, student, losses, balancing=balancing)
        given = (x, y)
        arguments |= {"batch_size": 16, "shuffle": False, "sample_weight": sample_weight}
    distiller.compile(keras.optimizers.SGD(0.1), entropy())
    history = distiller.fit(*given, **arguments).history
    return [np.asarray(w) for w in student.get_weights()], history["loss"]


def main():
    """Check every case; print a line for each."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for name in CASES:
        alone, losses = train(name)
        with strategy.scope():
            together, theirs = train(name)
        for one, two in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, two, atol=2e-6)
        np.testing.assert_allclose(losses, theirs, rtol=1e-4)
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
