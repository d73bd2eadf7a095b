"""TFMOT's callbacks for pruning. The wrappers do without them."""

import os
import warnings

import keras
import tensorflow as tf

from tfcompress.tfmot.pruning import pruned_weights


class UpdatePruningStep(keras.callbacks.Callback):
    """Warn about a schedule that the training will not reach. Not needed for pruning itself.

    Example:

    >>> UpdatePruningStep().prunable_weights
    {}
    """

    def __init__(self):
        super().__init__()
        self.prunable_weights = {}

    def on_train_begin(self, logs=None):
        """Find the pruned weights, and warn about schedules that end after this training."""
        self.prunable_weights = pruned_weights(self.model)
        params = self.params or {}
        if not self.prunable_weights or not params.get("epochs") or not params.get("steps"):
            return
        for schedule, done in self._schedules():
            last = done + params["epochs"] * params["steps"]
            end = schedule.end_step or schedule.begin_step
            if end > last:
                warnings.warn(
                    f"Training ends at step {last}, before {schedule} is through at step {end}: "
                    "the final sparsity will not be reached. Train longer, or end the schedule "
                    "earlier.",
                    stacklevel=2,
                )

    def on_epoch_end(self, batch, logs=None):
        """Nothing is left to do; TFMOT calls the epoch `batch`."""

    def _schedules(self):
        """Each schedule once, with the number of steps that are done."""
        found = {}
        for weight in self.prunable_weights.values():
            done = int(keras.ops.convert_to_numpy(weight.constraint.step))
            found[repr(weight.constraint.schedule)] = weight.constraint.schedule, done
        return found.values()


class PruningSummaries(keras.callbacks.TensorBoard):
    """TensorBoard summaries of every mask's sparsity and threshold, at the start of each epoch.

    Args:
        log_dir: Directory for TensorBoard, not empty.
        update_freq: See `keras.callbacks.TensorBoard`.
        **kwargs: See `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: `log_dir` is not a path.

    Example:

    >>> PruningSummaries("")
    Traceback (most recent call last):
    ...
    ValueError: `log_dir` must be a non-empty string. You passed `log_dir`=''...
    """

    def __init__(self, log_dir, update_freq="epoch", **kwargs):
        check_log_dir(log_dir)
        super().__init__(log_dir=os.fspath(log_dir), update_freq=update_freq, **kwargs)
        self._masks_writer = None

    def on_epoch_begin(self, epoch, logs=None):
        """Write the summaries."""
        if logs is not None:
            super().on_epoch_begin(epoch, logs)
        if self._masks_writer is None:
            self._masks_writer = tf.summary.create_file_writer(
                os.path.join(self.log_dir, "metrics")
            )
        step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        with self._masks_writer.as_default(step=step):
            for path, weight in pruned_weights(self.model).items():
                mask = tf.convert_to_tensor(weight.constraint.mask)
                kept = tf.boolean_mask(tf.abs(tf.convert_to_tensor(weight)), mask)
                tf.summary.scalar(
                    f"{path}/mask/sparsity", 1 - tf.reduce_mean(tf.cast(mask, "float32"))
                )
                tf.summary.scalar(f"{path}/threshold", tf.reduce_min(kept))
        self._masks_writer.flush()


def check_log_dir(log_dir) -> None:
    """Raise a ValueError if `log_dir` is no path."""
    if not isinstance(log_dir, str | os.PathLike) or not os.fspath(log_dir):
        raise ValueError(f"`log_dir` must be a non-empty string. You passed `log_dir`={log_dir!r}.")
