"""A training that is killed in mid-epoch: `python -m tests.contract.killed NAME DIR [EPOCH]`.

Trains with `BackupAndRestore` in DIR; in the given epoch the process kills itself with SIGKILL.
Without one it trains to the end and writes the weights and masks to DIR/result.npz.
"""

import os
import pathlib
import signal
import sys

import keras
import numpy as np

from tests.contract.techniques import TECHNIQUES
from tests.models import classification, compile_classifier, mlp


class Kill(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 4 * self.epoch + 2:  # 4 batches an epoch.
            os.kill(os.getpid(), signal.SIGKILL)


def main(name, directory, *epoch):
    """Train, and die or write the result."""
    keras.utils.set_random_seed(0)
    model = compile_classifier(mlp(), "adam")
    callback = TECHNIQUES[name].callback()
    x, y = classification()
    model.fit(
        x,
        y,
        batch_size=24,
        epochs=4,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.BackupAndRestore(directory / "backup"),
            callback,
            *(Kill(int(each)) for each in epoch),
        ],
    )
    masks = [mask.numpy() for mask in getattr(callback, "masks", {}).values()]
    np.savez(directory / "result.npz", *model.get_weights(), *masks)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), *sys.argv[3:])
