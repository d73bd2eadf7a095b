"""Regrowth: pruned units come back for kept ones, so that training searches for the mask.

Every time the masks are due, a share of the units that are kept is dropped by magnitude, and as
many are grown: the number of parameters never changes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import keras
import tensorflow as tf

from tfcompress.ops.criteria import random_scores
from tfcompress.ops.selection import top_k_mask
from tfcompress.shorthands import resolve
from tfcompress.values import Value

__all__ = ["SET", "Regrowth", "RigL", "get", "regrow"]


class Regrowth(Value):
    """Base of the regrowth rules; subclasses are frozen dataclasses with these fields.

    Attributes:
        reads: What `scores` needs: the weight's place in the model (`"index"`), or the gradient of
            the step (`"gradients"`).
        fraction: Share of the kept units that is exchanged, in (0, 1).
        end_step: Last step at which anything is exchanged; None for three quarters of the training.
    """

    reads: ClassVar[str]
    fraction: float
    end_step: int | None

    def __post_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"fraction must lie in (0, 1), got {self.fraction}: the share of the kept units "
                "that is exchanged, e.g. 0.3."
            )

    def share(self, step: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
        """The share that is exchanged at `step` of `end`, float64; both scalar int64 tensors."""
        raise NotImplementedError

    def scores(self, shape, statistic, step: tf.Tensor) -> tf.Tensor:
        """Scores of the weights of a kernel of `shape`: the pruned units of the highest grow."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class SET(Regrowth):
    """Sparse evolutionary training: random units grow
    ([Mocanu et al. 2018](https://arxiv.org/abs/1707.04780)).

    Args:
        fraction: Share of the kept units that is exchanged each time, in (0, 1).
        end_step: Last step at which anything is exchanged; None for three quarters of the training.
        seed: An int.

    Example:

    >>> float(SET(fraction=0.3).share(tf.constant(5, tf.int64), tf.constant(10, tf.int64)))
    0.3
    """

    reads: ClassVar[str] = "index"
    fraction: float = 0.3
    end_step: int | None = None
    seed: int = 0

    def share(self, step, end):
        """The same at every step."""
        return tf.constant(self.fraction, tf.float64)

    def scores(self, shape, statistic, step):
        """Random, anew at every step."""
        # The step in the high bits: no index of a weight reaches them.
        return random_scores(shape, self.seed, tf.cast(step, tf.int64) * 2**32 + statistic)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class RigL(Regrowth):
    """The rigged lottery: the units with the largest gradient grow
    ([Evci et al. 2020](https://arxiv.org/abs/1911.11134)).

    `fraction / 2 * (1 + cos(pi * step / end_step))` of the kept units is exchanged; the gradient
    is that of the step at which this happens.

    Args:
        fraction: Share of the kept units that is exchanged at first, in (0, 1).
        end_step: Last step at which anything is exchanged; None for three quarters of the training.

    Example:

    >>> float(RigL(fraction=0.3).share(tf.constant(10, tf.int64), tf.constant(10, tf.int64)))
    0.0
    """

    reads: ClassVar[str] = "gradients"
    fraction: float = 0.3
    end_step: int | None = None

    def share(self, step, end):
        """Cosine from `fraction` to 0."""
        progress = tf.cast(step, tf.float64) / tf.cast(tf.maximum(end, 1), tf.float64)
        return self.fraction / 2 * (1 + tf.cos(math.pi * tf.minimum(progress, 1)))

    def scores(self, shape, statistic, step):
        """`|gradient|`."""
        return tf.abs(statistic)


def regrow(
    masks: Sequence[tf.Tensor], magnitudes: Sequence[tf.Tensor], growth: Sequence[tf.Tensor], share
) -> list[tf.Tensor]:
    """Exchange a share of what is kept.

    Of the k units that a mask keeps, `floor(share * k)` of the smallest magnitude are dropped, at
    least one stays, and as many are grown out of all that are pruned by then, the dropped included.

    Args:
        masks: Boolean tensors, at least one element True in each.
        magnitudes: Of the units of each mask, 0 or more.
        growth: Of the units of each mask, 0 or more; the largest grow.
        share: In [0, 1], a float or a scalar tensor.

    Returns:
        New masks, each with as many elements True as before.

    Example:

    >>> mask, size = tf.constant([True, True, False, False]), tf.constant([3.0, 1.0, 0.0, 0.0])
    >>> regrow([mask], [size], [tf.constant([0.0, 1.0, 5.0, 2.0])], 0.5)[0].numpy().tolist()
    [True, False, True, False]
    """
    triples = zip(masks, magnitudes, growth, strict=True)
    return [_regrow(mask, size, grown, share) for mask, size, grown in triples]


def _regrow(mask, magnitude, growth, share):
    kept = tf.reduce_sum(tf.cast(mask, tf.int64))
    exchanged = tf.floor(tf.cast(share, tf.float64) * tf.cast(kept, tf.float64))
    exchanged = tf.minimum(tf.cast(exchanged, tf.int64), kept - 1)

    def exchange():
        # Scores are 0 or more: -1 comes behind all of them.
        stay = top_k_mask(_where(mask, magnitude), kept - exchanged)
        return stay | top_k_mask(_where(~stay, growth), exchanged)

    return tf.cond(exchanged > 0, exchange, lambda: tf.identity(mask))


def _where(mask, scores):
    return tf.where(mask, tf.cast(scores, tf.float32), -1.0)


_KNOWN = {"set": SET(), "rigl": RigL()}


def get(identifier):
    """The rule with this name, or a rule as it is; None stays None."""
    if identifier is None or isinstance(identifier, Regrowth):
        return identifier
    return resolve("regrowth", identifier, _KNOWN)
