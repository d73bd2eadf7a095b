"""Losses on hidden states: each example of the student with the same example of the teacher."""

import dataclasses
import math

import keras
import tensorflow as tf

from tfcompress.distillation import mapping as mappings
from tfcompress.distillation.losses import (
    DEFAULT,
    Loss,
    Pair,
    float32,
    weighted_mean,
)


@dataclasses.dataclass(frozen=True)
class PointLoss(Loss):
    """Base of the losses between hidden states.

    Args:
        teacher: Glob or globs over the points of the teacher; None for what its classifier reads.
        student: Likewise of the student.
        mapping: How several points are paired: `"uniform"`, `"last"`, `"same"`, `"searched"`, or
            pairs of globs (teacher, student).
    """

    teacher: str | tuple[str, ...] | None = None
    student: str | tuple[str, ...] | None = None
    mapping: str | tuple[tuple[str, str], ...] = "uniform"

    def __post_init__(self):
        for name in ("teacher", "student", "mapping"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(map(_frozen, value)))
        mappings.check_mapping(self.mapping)

    def candidates(self, teacher, student) -> tuple[list, list]:
        """What the mapping chooses from: points of the teacher and of the student."""
        return self._points(teacher, self.teacher), self._points(student, self.student)

    def bind(self, teacher, student):
        """The points that the globs name, paired by the mapping."""
        found = self.candidates(teacher, student)
        paired = mappings.pairs(self.mapping, *found, type(self).__name__)
        return [Pair((one,), (two,)) for one, two in paired]

    def _points(self, points, globs):
        if globs is not None:
            return points.match(globs, type(self).__name__)
        if points.embedding is None:
            raise ValueError(
                f"It is not known what the classifier of {points.model!r} reads: no layer with "
                f"weights makes its output. Pass {type(self).__name__}(teacher=..., student=...)."
            )
        return [points.embedding]


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Features(PointLoss):
    """The mean squared difference of hidden states, projected where widths differ: `"features"`.

    `mean((t - W s)**2)`; W is learned with the student and thrown away afterwards; without a need
    for it there is none. Maps of other heights and widths are averaged to the smaller ones.

    Args:
        teacher: Glob or globs over the points of the teacher; None for what its classifier reads.
        student: Likewise of the student.
        mapping: How several points are paired: `"uniform"`, `"last"`, `"same"`, `"searched"`, or
            pairs of globs (teacher, student).
        project: Whether there is a W: None for where the widths differ.

    Raises:
        ValueError: A mapping that is none of these.

    Example:

    >>> float(Features()([tf.zeros((1, 2))], [tf.constant([[1.0, 3.0]])]))
    5.0

    Reference: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550; Jiao et al. 2020
    (TinyBERT), https://arxiv.org/abs/1909.10351.
    """

    project: bool | None = None

    def head(self, teacher, student):
        """W, a dense layer over the last axis."""
        _check_rank(self, teacher, student)
        width, own = teacher[0][-1], student[0][-1]
        if self.project is False and width != own:
            raise ValueError(
                f"Features(project=False) got the widths {width} of the teacher and {own} of the "
                "student. Leave project out to learn a projection."
            )
        needed = width != own if self.project is None else self.project
        return dense(width, own) if needed else None

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of states `(batch, ..., width)`."""
        target, state = float32(teacher[0]), float32(student[0])
        target, state = same_size(target, state)
        if context.head is not None:
            state = context.head(state)
        return weighted_mean(tf.reduce_mean(tf.square(target - state), -1), context)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class ActivationMaps(PointLoss):
    """Where convolutions look: squared activations summed over the channels: `"activation_maps"`.

    `mean((q_t / |q_t| - q_s / |q_s|)**2)` with q the flat map `sum(f**2)` over the channels, so
    that widths may differ.

    Args:
        teacher: Glob or globs over the points of the teacher, `(batch, ..., channels)`.
        student: Likewise of the student.
        mapping: See `Features`.

    Example:

    >>> maps = tf.reshape(tf.range(8.0), (1, 2, 2, 2))
    >>> float(ActivationMaps("a", "b")([maps], [3.0 * maps]))
    0.0

    Reference: Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928.
    """

    def head(self, teacher, student):
        """Nothing is learned."""
        if len(teacher[0]) < 3 or len(student[0]) < 3:
            raise ValueError(
                f"ActivationMaps needs maps (batch, ..., channels), got the shapes {teacher[0]} "
                f"and {student[0]}. Name convolutions with teacher= and student=."
            )

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of maps `(batch, ..., channels)`."""
        target, state = same_size(float32(teacher[0]), float32(student[0]))
        maps = [tf.reduce_sum(tf.square(x), -1) for x in (target, state)]
        maps = [tf.reshape(x, (-1, math.prod(target.shape[1:-1]))) for x in maps]
        one, two = (tf.math.l2_normalize(x, axis=-1) for x in maps)
        return weighted_mean(tf.reduce_mean(tf.square(one - two), -1), context)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class MaskedFeatures(PointLoss):
    """The teacher's features, generated from parts of the student's: `"masked_features"`.

    `mean((t - G(M * W s))**2)`: W brings the student's features to the teacher's width where that
    differs, M zeroes each position with probability `ratio`, and G, two convolutions of width 3
    with a ReLU between, generates what is missing. W and G are learned with the student and thrown
    away afterwards. Nothing is masked in evaluation.

    G is trained at the teacher's width c: it takes 54 c^2 multiplications a position and step. Next
    to a deep teacher that is little, next to a few convolutions it is more than the rest. The paper
    takes one point of a classifier, the last feature map, which is also the cheapest.

    Args:
        teacher: Glob or globs over the points of the teacher, `(batch, height, width, channels)`
            or `(batch, length, channels)`.
        student: Likewise of the student.
        mapping: See `Features`.
        ratio: Share of the positions that are left out, in [0, 1).

    Raises:
        ValueError: A ratio out of its range.

    Reference: Yang et al. 2022 (MGD), https://arxiv.org/abs/2205.01529.
    """

    ratio: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is a share in [0, 1), got {self.ratio}; 0.5 is usual.")

    def head(self, teacher, student):
        """W, M and G."""
        _check_rank(self, teacher, student)
        if len(teacher[0]) not in (3, 4):
            raise ValueError(
                f"MaskedFeatures needs features (batch, height, width, channels) or (batch, "
                f"length, channels), got the shape {teacher[0]}. Name a layer with teacher= and "
                "student=."
            )
        layer = _Generator(teacher[0][-1], student[0][-1], len(teacher[0]) - 2, self.ratio)
        layer.build(student[0])
        return layer

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of features `(batch, ..., channels)`."""
        target, state = same_size(float32(teacher[0]), float32(student[0]))
        generated = context.head(state, training=context.training)
        return weighted_mean(tf.reduce_mean(tf.square(target - generated), -1), context)


class _Generator(keras.layers.Layer):
    """W, the random mask, and two convolutions."""

    def __init__(self, channels, own, axes, ratio):
        # Keras makes no valid name of that of a private class.
        super().__init__(dtype="float32", name="generator")
        convolution = keras.layers.Conv1D if axes == 1 else keras.layers.Conv2D
        arguments = {"padding": "same", "data_format": "channels_last", "dtype": "float32"}
        self.align = None if channels == own else keras.layers.Dense(channels, dtype="float32")
        # Keeps one value for all channels of a position; what is kept is not scaled up.
        self.ratio = ratio
        self.seed = keras.random.SeedGenerator()
        self.first = convolution(channels, 3, activation="relu", **arguments)
        self.second = convolution(channels, 3, **arguments)

    def build(self, shape):
        if self.align:
            self.align.build(shape)
        aligned = (*shape[:-1], self.first.filters)
        self.first.build(aligned)
        self.second.build(aligned)
        self.built = True

    def call(self, x, training=False):
        x = self.align(x) if self.align else x
        if training and self.ratio:
            drawn = keras.random.uniform((*tf.unstack(tf.shape(x)[:-1]), 1), seed=self.seed)
            x = tf.where(drawn < self.ratio, 0.0, x)
        return self.second(self.first(x))


def flat(x) -> tf.Tensor:
    """A float32 tensor as `(batch, features)`."""
    x = float32(x)
    return tf.reshape(x, (-1, flat_size(x.shape)))


def flat_size(shape) -> int:
    """How many features an example of a point has; its shape must be fixed."""
    if None in tuple(shape)[1:]:
        raise ValueError(
            f"The shape {tuple(shape)} has sizes that are not fixed, so that its examples are no "
            "vectors. Name a point behind pooling with teacher= and student=."
        )
    return math.prod(shape[1:])


def dense(units: int, width: int) -> keras.layers.Dense:
    """A built layer in the precision of the losses."""
    layer = keras.layers.Dense(units, dtype="float32")
    layer.build((None, width))
    return layer


def _check_rank(loss, teacher, student):
    if len(teacher[0]) != len(student[0]):
        raise ValueError(
            f"{type(loss).__name__} compares points of as many axes, got the shapes {teacher[0]} "
            f"of the teacher and {student[0]} of the student. Name others with teacher= and "
            "student=."
        )


def same_size(one: tf.Tensor, two: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Maps of the same height and width (or length): the larger is averaged over whole blocks."""
    sizes = one.shape[1:-1], two.shape[1:-1]
    if sizes[0] == sizes[1] or None in (*sizes[0], *sizes[1]):
        return one, two
    return _averaged(one, sizes[1]), _averaged(two, sizes[0])


def _averaged(x: tf.Tensor, sizes) -> tf.Tensor:
    for axis, size in enumerate(sizes, start=1):
        own = x.shape[axis]
        if own > size:
            if own % size:
                raise ValueError(
                    f"Maps of the sizes {tuple(x.shape[1:-1])} and {tuple(sizes)} are compared, "
                    f"and {own} is no multiple of {size}. Name points of the same size."
                )
            blocks = [-1, *x.shape[1:axis], size, own // size, *x.shape[axis + 1 :]]
            x = tf.reduce_mean(tf.reshape(x, blocks), axis=axis + 1)
    return x
