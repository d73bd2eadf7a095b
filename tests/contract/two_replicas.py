"""Every technique on two replicas and on one device: `python -m tests.contract.two_replicas`."""

import keras
import numpy as np
import tensorflow as tf

from tests.contract.techniques import CALLBACKS, TECHNIQUES
from tests.models import classification, compile_classifier, mlp

BATCH_SIZE, EPOCHS = 32, 4  # 96 examples: three full batches an epoch.


def train(callback):
    """The weights after training from a fixed start, under the strategy in scope."""
    keras.utils.set_random_seed(0)
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.1))
    x, y = classification()
    arguments = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[callback], **arguments)
    replicas = [
        [tensor.numpy() for tensor in tf.distribute.get_strategy().experimental_local_results(v)]
        for v in (weight.value for weight in model.weights)
    ]
    return [np.asarray(weight) for weight in model.get_weights()], replicas


def check(name, strategy):
    """Raise where two replicas differ from one device, or from each other."""
    alone, _ = train(TECHNIQUES[name].callback())
    with strategy.scope():
        together, replicas = train(TECHNIQUES[name].callback())
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    for copies in replicas:
        for other in copies[1:]:
            np.testing.assert_array_equal(copies[0], other)


def main():
    """Check every technique; print a line for each."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for name in CALLBACKS:
        check(name, strategy)
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
