"""Every technique on replicas and on one device: `python -m tests.contract.replicas NUMBER [NAME]`.

The replicas are devices of this process, or the workers of the cluster in `TF_CONFIG`.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

from tests.contract.techniques import CALLBACKS, TECHNIQUES
from tests.models import classification, compile_classifier, mlp
from tests.parallel.replicas import everywhere, make_strategy
from tfcompress import parallel

BATCH_SIZE, EPOCHS = 32, 4  # 96 examples: three full batches an epoch.


def train(callback, strategy=None):
    """A model after training from a fixed start, under the strategy in scope or the given one."""
    keras.utils.set_random_seed(0)
    model = mlp()
    if strategy is not None:
        parallel.prepare(model, strategy)
    compile_classifier(model, keras.optimizers.SGD(0.1))
    x, y = classification()
    arguments = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[callback], **arguments)
    return model


def check(name, strategy):
    """Raise where the replicas differ from one device, or from each other."""
    alone = train(TECHNIQUES[name].callback())
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        together = train(TECHNIQUES[name].callback(), strategy)
    else:  # As Keras trains there by itself, without our help.
        with strategy.scope():
            together = train(TECHNIQUES[name].callback())
    for one, two in zip(alone.get_weights(), together.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    first, *others = everywhere(strategy, together.weights)
    assert len(others) == strategy.num_replicas_in_sync - 1
    for other in others:
        np.testing.assert_array_equal(first, other)


def main(number, *names):
    """Check every technique; print a line for each."""
    strategy = make_strategy(number)
    for name in names or CALLBACKS:
        check(name, strategy)
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
