"""What compression did, in the logs of every epoch."""

import keras
import numpy as np
import tensorflow as tf

from tfcompress.keras_hooks.state import find_state
from tfcompress.keras_hooks.walk import named_variables, select_kernels, trained_model
from tfcompress.keras_hooks.workers import is_chief
from tfcompress.optional import require


@keras.saving.register_keras_serializable(package="tfcompress")
class CompressionLogger(keras.callbacks.Callback):
    """Write the sparsity into `logs` at the end of every epoch.

    From there it reaches the progress bar, `History`, and any logging callback that is listed
    behind this one. With `log_dir`, the sparsity and a histogram of every kernel go to TensorBoard
    too. What a mask keeps out of the forward pass counts as zero (movement pruning leaves such
    weights their value until training ends).

    Args:
        log_dir: Directory for TensorBoard summaries; None for none. Of several workers, the chief
            writes them.

    Raises:
        ImportError: `log_dir` is given, and TensorBoard is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(tf.ones((8, 4)), tf.zeros((8, 3)), verbose=0,
    ...                     callbacks=[CompressionLogger()])
    >>> history.history["sparsity"]
    [0.0]
    """

    def __init__(self, log_dir=None):
        super().__init__()
        if log_dir is not None:
            require("tensorboard", extra="report")
        self.log_dir = log_dir
        self._writer = None

    def get_config(self):
        """The constructor arguments."""
        return {"log_dir": self.log_dir}

    def on_train_begin(self, logs=None):
        """Open the summary file."""
        if self.log_dir is not None and is_chief(self.model.distribute_strategy):
            self._writer = tf.summary.create_file_writer(str(self.log_dir))

    def on_epoch_end(self, epoch, logs=None):
        """Add `sparsity`, the fraction of zeros in all kernels, to `logs`."""
        kernels = _masked_kernels(trained_model(self.model))
        zeros = sum(int(np.sum(kernel == 0)) for kernel in kernels.values())
        sparsity = zeros / sum(kernel.size for kernel in kernels.values())
        if logs is not None:
            logs["sparsity"] = sparsity
        if self._writer is not None:
            self._write(epoch, sparsity, kernels)

    def on_train_end(self, logs=None):
        """Close the summary file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, epoch, sparsity, kernels):
        with self._writer.as_default(step=epoch):
            tf.summary.scalar("compression/sparsity", sparsity)
            for path, kernel in kernels.items():
                tf.summary.scalar(f"compression/sparsity/{path}", np.mean(kernel == 0))
                tf.summary.histogram(f"compression/weights/{path}", kernel)
        self._writer.flush()


def _masked_kernels(model):
    """The kernels by path, as the layers compute with them."""
    state = find_state(model)
    places = {path: i for i, path in enumerate(named_variables(model))}
    kernels = {}
    for path, variable in select_kernels(model)[0].items():
        kernel = keras.ops.convert_to_numpy(variable)
        for key, mask in state.items():
            if key.endswith(f"/weight_{places[path]}/mask"):
                kernel = np.where(keras.ops.convert_to_numpy(mask), kernel, 0)
        kernels[path] = kernel
    return kernels
