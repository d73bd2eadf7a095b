"""Pruning by a threshold."""

import warnings

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.callbacks.masking import Group, MaskingCallback
from tfcompress.checks import check_threshold
from tfcompress.ops.masks import Units, threshold_mask


@keras.saving.register_keras_serializable(package="tfcompress")
class ThresholdPruning(MaskingCallback):
    """Set every weight below a threshold to zero when training starts, and hold the zeros.

    `mask = |w| >= threshold`, chosen once, on the weights that training starts from; the weights
    that are left are fine-tuned ([Han et al. 2015](https://arxiv.org/abs/1506.02626)).

    Args:
        threshold: Smallest magnitude that is kept, above 0, in units of the weights.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Attributes:
        applied: Path -> what was done to it.
        skipped: Path -> why nothing was.
        masks: Path -> boolean variable of the weight's shape; True keeps.

    Raises:
        ValueError: The threshold is not above 0; when training starts: a glob that matches nothing,
            a model without kernels, or weights that are not finite.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model.compile("sgd", "mse")
    >>> pruning = ThresholdPruning(threshold=0.5)
    >>> _ = model.fit(tf.ones((8, 4)), tf.zeros((8, 3)), verbose=0, callbacks=[pruning])
    >>> kernel = model.layers[0].kernel.numpy()
    >>> mask = next(iter(pruning.masks.values())).numpy()
    >>> bool((kernel[~mask] == 0).all())
    True
    """

    def __init__(self, threshold=0.1, include=None, exclude=None):
        check_threshold(threshold)
        super().__init__(include, exclude)
        self.threshold = threshold

    def get_config(self):
        """The constructor arguments."""
        return {"threshold": self.threshold, "include": self.include, "exclude": self.exclude}

    def _group_weights(self, model, weights):
        self.applied = dict.fromkeys(weights, f"|w| < {self.threshold} set to zero")
        units, _ = Units.cut("unstructured", {path: w.shape for path, w in weights.items()})
        return [Group(schedules.OneShot(self.threshold), tuple(weights), units)]

    def _is_due(self, group, step):
        return False  # Chosen once, when it is fresh.

    def _choose_masks(self, group, on, index, step):
        return [threshold_mask(on["weights"][path], self.threshold) for path in group.paths]

    def _finish(self):
        super()._finish()
        for path, mask in self.masks.items():
            if not bool(tf.reduce_any(mask.value)):
                warnings.warn(
                    f"threshold {self.threshold} left nothing of {path!r}: every weight in it was "
                    "smaller. Use a smaller threshold, or exclude it.",
                    stacklevel=2,
                )
