"""Criteria: weight -> scores of the same shape; the lowest scores are pruned first.

A criterion is called as `criterion(weight, statistic)`. What the statistic is, it says itself in
`reads`: nothing (`"weights"`), the place of the weight in the model (`"index"`), what it gathered
from the gradients of the training steps (`"gradients"`), the scale of the batch norm behind
(`"batch_norm"`), or the norms of the layer's inputs (`"inputs"`). A plain function of the weight
serves as well.
"""

import dataclasses
from typing import Any, ClassVar

import keras
import tensorflow as tf

from tfcompress.shorthands import resolve
from tfcompress.values import Value

__all__ = [
    "BatchNorm",
    "Criterion",
    "Fisher",
    "Gradient",
    "Movement",
    "Random",
    "SparseGPT",
    "Wanda",
    "get",
    "magnitude",
    "reads",
]


def magnitude(weight: tf.Tensor, statistic=None) -> tf.Tensor:
    """`|w|`: small weights matter least ([Han et al. 2015](https://arxiv.org/abs/1506.02626)).

    Args:
        weight: Floating tensor of any shape.
        statistic: Not used.

    Returns:
        Scores, of the same shape and dtype, 0 or more.

    Example:

    >>> magnitude(tf.constant([-2.0, 1.0])).numpy().tolist()
    [2.0, 1.0]
    """
    return tf.abs(weight)


class Criterion(Value):
    """Base of the criteria that read more than the weight; subclasses are frozen dataclasses.

    One that reads gradients defines `observe`: a training step adds its value to the statistic, a
    float32 variable of the weight's shape that is zero at first.

    Attributes:
        reads: What the statistic is.
        is_latent: Whether pruned weights keep their value and may come back; the mask then acts in
            the forward pass, with a straight-through gradient.
        forgets: Whether the statistic starts from zero again after each choice of masks.
    """

    reads: ClassVar[str] = "weights"
    is_latent: ClassVar[bool] = False
    forgets: ClassVar[bool] = True

    def __call__(self, weight: tf.Tensor, statistic: Any = None) -> tf.Tensor:
        """Scores of the shape of `weight`."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores of single weights.")

    def observe(self, weight: tf.Tensor, gradient: tf.Tensor, statistic: tf.Tensor) -> tf.Tensor:
        """What one training step adds to the statistic: all three, and the result, of one shape."""
        raise NotImplementedError(f"{type(self).__name__} does not read gradients.")


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """Scores without meaning: the floor that every criterion has to beat.

    They depend on the seed and the weight's place in the model only, so that a gradual schedule
    prunes more and more of the same order.

    Args:
        seed: An int.

    Example:

    >>> scores = Random(seed=1)(tf.zeros((2, 3)), 0)
    >>> bool(tf.reduce_all(scores == Random(seed=1)(tf.ones((2, 3)), 0)))
    True
    """

    reads: ClassVar[str] = "index"
    seed: int = 0

    def __call__(self, weight, statistic=0):
        """Uniform in [0, 1), the same in eager mode, in a graph and under XLA."""
        return random_scores(weight.shape, self.seed, statistic)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Gradient(Criterion):
    """`sum over steps of |w * g|`: the loss that the first-order Taylor expansion expects to lose.

    Summed since the last choice of masks ([Molchanov et al. 2019](https://arxiv.org/abs/1906.10771)
    average the square; [Lee et al. 2019](https://arxiv.org/abs/1810.02340) use one batch).

    Example:

    >>> Gradient().observe(tf.constant([2.0]), tf.constant([-3.0]), tf.zeros(1)).numpy().tolist()
    [6.0]
    """

    reads: ClassVar[str] = "gradients"

    def observe(self, weight, gradient, statistic):
        """`|w * g|`."""
        return tf.abs(weight * gradient)

    def __call__(self, weight, statistic):
        """The sum."""
        return statistic


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Fisher(Criterion):
    """`w ** 2 * sum over steps of g ** 2`: second-order, with the Fisher matrix's diagonal.

    What optimal brain damage expects a weight's removal to cost
    ([LeCun et al. 1989](https://papers.nips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658)),
    its Hessian approximated by the empirical Fisher information of the batches
    ([Theis et al. 2018](https://arxiv.org/abs/1801.05787)); the factor 1/2 changes no order.

    Example:

    >>> float(Fisher()(tf.constant(3.0), tf.constant(2.0)))
    18.0
    """

    reads: ClassVar[str] = "gradients"

    def observe(self, weight, gradient, statistic):
        """`g ** 2`."""
        return tf.square(gradient)

    def __call__(self, weight, statistic):
        """`w ** 2` times the sum."""
        return tf.square(tf.cast(weight, statistic.dtype)) * statistic


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Movement(Criterion):
    """`- sum over steps of w * g`: weights that training moves away from zero are kept.

    For fine-tuning a pretrained model to few weights, where what a weight was before says little
    ([Sanh et al. 2020](https://arxiv.org/abs/2005.07683)). Pruned weights keep their value, are
    left out in the forward pass, and come back when their score rises: the gradient reaches the
    scores of all weights straight through the mask, and the values of the kept ones only.

    Scores are summed from the first step on, also before the schedule begins: begin it after a
    warm-up of a tenth of the training. All start at 0, whatever the weights were, so that it takes
    thousands of steps and few weights kept to pay; in a few hundred, magnitude keeps more of what
    the pretrained weights knew (`tests.benchmarks.movement_steps` measures both).

    Hard movement keeps the asked number of weights. With `threshold` it is soft: a weight is kept
    while `sigmoid(score) > threshold`, and the scores take steps of
    `learning_rate * (-w * g / rms(w * g) - strength * sigmoid'(score))`, so that `strength`
    decides the sparsity, and each weight gets what it needs. The paper's scores are trained by
    Adam; dividing by the root mean square over the weight makes a step independent of the
    gradients' scale as well, without two more variables.

    Args:
        threshold: None for hard movement; in (0, 0.5) for soft, 0.1 in the paper.
        strength: Soft only: weight of the penalty on the scores, 0 or more.
        learning_rate: Soft only: step size of the scores.

    Raises:
        ValueError: A value out of range.

    Example:

    >>> Movement().observe(tf.constant([2.0]), tf.constant([-3.0]), tf.zeros(1)).numpy().tolist()
    [6.0]
    """

    reads: ClassVar[str] = "gradients"
    is_latent: ClassVar[bool] = True
    forgets: ClassVar[bool] = False
    threshold: float | None = None
    strength: float = 1.0
    learning_rate: float = 0.01

    def __post_init__(self):
        if self.threshold is not None and not 0 < self.threshold < 0.5:
            raise ValueError(
                f"threshold must lie in (0, 0.5), got {self.threshold}: all scores start at 0, "
                "where the sigmoid is 0.5. The paper uses 0.1."
            )
        if self.strength < 0 or self.learning_rate <= 0:
            raise ValueError(
                f"strength must be 0 or more and learning_rate above 0, got {self.strength} and "
                f"{self.learning_rate}."
            )

    def observe(self, weight, gradient, statistic):
        """The step of the scores."""
        movement = -weight * gradient
        if self.threshold is None:
            return movement
        rms = tf.sqrt(tf.reduce_mean(tf.square(movement)))
        kept = tf.sigmoid(statistic)
        penalty = self.strength * kept * (1.0 - kept)
        return self.learning_rate * (tf.math.divide_no_nan(movement, rms) - penalty)

    def __call__(self, weight, statistic):
        """The scores."""
        return statistic

    def keep(self, scores: tf.Tensor) -> tf.Tensor:
        """Soft movement's mask of units: `sigmoid(score) > threshold`."""
        return tf.sigmoid(scores) > self.threshold


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class BatchNorm(Criterion):
    """`|gamma|` of the batch norm behind a layer: its channels' own scale.

    Network Slimming ([Liu et al. 2017](https://arxiv.org/abs/1708.06519)); for whole channels,
    after training with an L1 penalty on the gammas.

    Example:

    >>> BatchNorm()(tf.zeros((2, 2)), tf.constant([-1.0, 3.0])).numpy().tolist()
    [[1.0, 3.0], [1.0, 3.0]]
    """

    reads: ClassVar[str] = "batch_norm"

    def __call__(self, weight, statistic):
        """`|gamma|`, of shape (channels,), for every weight of the channel (the last axis)."""
        return tf.broadcast_to(tf.abs(statistic), weight.shape)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Wanda(Criterion):
    """`|w| * norm of its input` over calibration data
    ([Sun et al. 2023](https://arxiv.org/abs/2306.11695)).

    Weights of one kernel compete with each other; the paper lets those of one output compete, which
    the structure `"n:m"` does too.

    Example:

    >>> Wanda()(tf.constant([[-2.0], [1.0]]), tf.constant([[1.0], [3.0]])).numpy().tolist()
    [[2.0], [3.0]]
    """

    reads: ClassVar[str] = "inputs"

    def __call__(self, weight, statistic):
        """`|w|` times the norms, which broadcast to the weight's shape."""
        return tf.abs(weight) * tf.cast(statistic, weight.dtype)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class SparseGPT(Criterion):
    """Optimal brain surgery, a layer at a time; the weights that stay make up for those that go
    ([Frantar & Alistarh 2023](https://arxiv.org/abs/2301.00774)).

    It decides on masks and values together, so there are no scores: `tfcompress.prune` runs it.

    Args:
        damping: Added to the Hessian's diagonal, as a share of its mean.
        block_size: Input features that are pruned at once.

    Example:

    >>> SparseGPT().reads
    'reconstruction'
    """

    reads: ClassVar[str] = "reconstruction"
    damping: float = 0.01
    block_size: int = 128


def random_scores(shape, seed: int, index) -> tf.Tensor:
    """Uniform float32 scores in [0, 1) that depend on `shape`, `seed` and `index` alone.

    Args:
        shape: Of the result.
        seed: An int.
        index: An int or a scalar integer tensor: one draw among many.

    Example:

    >>> random_scores((2, 3), seed=0, index=1).shape
    TensorShape([2, 3])
    """
    # `tf.random.stateless_uniform` gives other numbers under XLA than without, whatever the
    # algorithm that it is told to use. Integer arithmetic is the same everywhere.
    index = tf.cast(index, tf.int64)
    key = _scramble(tf.cast(seed % 2**32, tf.uint32))
    for half in (index % 2**32, index // 2**32):
        key = _scramble(key ^ tf.cast(half % 2**32, tf.uint32))
    positions = tf.range(tf.TensorShape(shape).num_elements(), dtype=tf.int64)
    bits = _scramble(_scramble(tf.cast(positions, tf.uint32) ^ key) + key)
    return tf.reshape(tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2.0**-24, shape)


def _scramble(bits: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 in which every bit of the result hangs on every bit of the argument.

    The constants are those of "lowbias32", found by search for the least bias
    (https://nullprogram.com/blog/2018/07/31).
    """
    bits = (bits ^ tf.bitwise.right_shift(bits, 16)) * tf.constant(0x7FEB352D, tf.uint32)
    bits = (bits ^ tf.bitwise.right_shift(bits, 15)) * tf.constant(0x846CA68B, tf.uint32)
    return bits ^ tf.bitwise.right_shift(bits, 16)


_KNOWN = {
    "magnitude": magnitude,
    "random": Random(),
    "gradient": Gradient(),
    "fisher": Fisher(),
    "movement": Movement(),
    "batch_norm": BatchNorm(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}

_REMEDIES = {
    "gradients": "it gathers gradients while a model trains: use tfcompress.callbacks.Pruning",
    "batch_norm": "it reads another layer: use tfcompress.callbacks.Pruning or tfcompress.prune",
    "inputs": "it needs calibration data: use tfcompress.prune(model, ..., calibration=data)",
    "reconstruction": "it needs calibration data: use tfcompress.prune(model, ..., "
    "calibration=data)",
}


def get(identifier):
    """The criterion with this name, or a callable as it is."""
    return resolve("criterion", identifier, _KNOWN)


def reads(criterion) -> str:
    """What a criterion's statistic is; `"weights"` for a plain function, which has none."""
    return getattr(criterion, "reads", "weights")


def require(criterion, where: str, *available: str) -> None:
    """Raise a ValueError that names the remedy if `criterion` reads more than is `available`.

    Example:

    >>> require(Gradient(), "layers.Prune", "weights", "index")
    Traceback (most recent call last):
    ...
    ValueError: layers.Prune cannot use the criterion Gradient(): it gathers gradients ...
    """
    if reads(criterion) not in available:
        raise ValueError(
            f"{where} cannot use the criterion {criterion}: {_REMEDIES[reads(criterion)]}."
        )


def score(criterion, weight: tf.Tensor, statistic=None) -> tf.Tensor:
    """`criterion(weight, statistic)`; a plain function gets the weight alone.

    Args:
        criterion: From `get`.
        weight: Floating tensor.
        statistic: What it reads, if it reads anything.

    Returns:
        Scores of the shape of `weight`.

    Example:

    >>> score(tf.square, tf.constant([-2.0])).numpy().tolist()
    [4.0]
    """
    return criterion(weight) if reads(criterion) == "weights" else criterion(weight, statistic)
