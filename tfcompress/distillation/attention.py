"""Losses on self-attention: its maps, and how its queries, keys and values lie to each other."""

import dataclasses
import math

import keras
import tensorflow as tf

from tfcompress.distillation import mapping as mappings
from tfcompress.distillation.features import PointLoss
from tfcompress.distillation.losses import DEFAULT, Pair, float32, weighted_mean

_HIDDEN = -1e9  # Added to what a softmax must not see; finite in float32 products.
_LETTERS = {"q": 0, "k": 1, "v": 2}


@dataclasses.dataclass(frozen=True)
class AttentionLoss(PointLoss):
    """Base: the points are the parts of attention layers, `(batch, length, heads, size)` each."""

    parts: tuple[str, ...] = ("query", "key", "value")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) != 3:
            raise ValueError(
                f"parts are the names of the layers of query, key and value, got {self.parts!r}."
            )

    def candidates(self, teacher, student):
        """The attention layers that the globs match."""
        name = type(self).__name__
        return (
            teacher.attention(self.teacher, self.parts, name),
            student.attention(self.student, self.parts, name),
        )

    def bind(self, teacher, student):
        """The attention layers, paired by the mapping."""
        found = self.candidates(teacher, student)
        paired = mappings.pairs(self.mapping, *found, type(self).__name__)
        return [Pair(*pair) for pair in paired]


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Attention(AttentionLoss):
    """What each position attends to: `"attention"`.

    With A = Q K^T / sqrt(size) of each head, `mean((A_t - A_s)**2)` (`on="scores"`, TinyBERT's
    choice, which found it to converge faster), or the mean over heads and positions of
    `KL(softmax(A_t) || softmax(A_s))` (`on="maps"`). Where the numbers of heads differ, it compares
    their means. Positions that the mask leaves out neither count nor are attended to.

    Args:
        teacher: Glob or globs over the paths of the teacher's attention layers; None for all.
        student: Likewise of the student.
        mapping: How several layers are paired: `"uniform"`, `"last"`, `"same"`, `"searched"`, or
            pairs of globs (teacher, student).
        parts: The names of the layers inside that make query, key and value.
        on: `"scores"` or `"maps"`.

    Raises:
        ValueError: An argument that is none of these.

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351.
    """

    on: str = "scores"

    def __post_init__(self):
        super().__post_init__()
        if self.on not in ("scores", "maps"):
            raise ValueError(f'on must be "scores" or "maps", got {self.on!r}.')

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of queries, keys and values `(batch, length, heads, size)`."""
        scores = [_scores(_heads(x[0]), _heads(x[1])) for x in (teacher, student)]
        same_heads = scores[0].shape[1] == scores[1].shape[1]
        if self.on == "maps":
            maps = [tf.nn.softmax(_hidden(x, context.mask)) for x in scores]
            if not same_heads:
                maps = [tf.reduce_mean(x, 1, keepdims=True) for x in maps]
            return weighted_mean(_divergence(*maps), context)
        if not same_heads:
            scores = [tf.reduce_mean(x, 1, keepdims=True) for x in scores]
        squares = tf.reduce_mean(tf.square(scores[0] - scores[1]), 1)
        if context.mask is None:
            return weighted_mean(tf.reduce_mean(squares, -1), context)
        keys = float32(context.mask)[:, None, :]
        length = tf.maximum(tf.reduce_sum(keys, -1), 1.0)
        return weighted_mean(tf.reduce_sum(squares * keys, -1) / length, context)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Relations(AttentionLoss):
    """Relations among queries, among keys and among values of one layer: `"relations"`.

    For X each of Q, K, V, split into as many relation heads for both models whatever their own:
    the mean over heads and positions of `KL(softmax(X_t X_t^T / sqrt(d_t)) || softmax(X_s X_s^T /
    sqrt(d_s)))`, summed over the relations, d being the size of a relation head. Neither the widths
    nor the numbers of heads of the models need be equal.

    Args:
        teacher: Glob over the path of the teacher's attention layer; None for all. The paper takes
            one of the upper layers.
        student: Likewise of the student; the paper takes the last.
        mapping: How several layers are paired; `"last"` here by default.
        parts: The names of the layers inside that make query, key and value.
        relations: Which, of `"qq"`, `"kk"`, `"vv"` and `"qk"`; `("qk", "vv")` is the first MiniLM.
        heads: How many relation heads; None for the teacher's number of heads.

    Raises:
        ValueError: An unknown relation, or widths that the heads do not divide.

    Reference: Wang et al. 2021 (MiniLMv2), https://arxiv.org/abs/2012.15828.
    """

    mapping: str | tuple[tuple[str, str], ...] = "last"
    relations: tuple[str, ...] = ("qq", "kk", "vv")
    heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "relations", tuple(self.relations))
        known = [one + two for one in _LETTERS for two in _LETTERS]
        wrong = [each for each in self.relations if each not in known]
        if wrong or not self.relations:
            raise ValueError(f"Unknown relations {wrong}; expected some of {known}.")

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of queries, keys and values `(batch, length, heads, size)`."""
        heads = self.heads or (teacher[0].shape[2] if len(teacher[0].shape) == 4 else 1)
        split = [[_heads(x, heads) for x in points] for points in (teacher, student)]
        total = 0.0
        for one, two in self.relations:
            maps = [
                tf.nn.softmax(_hidden(_scores(x[_LETTERS[one]], x[_LETTERS[two]]), context.mask))
                for x in split
            ]
            total += weighted_mean(_divergence(*maps), context)
        return total


def _heads(x, heads: int | None = None) -> tf.Tensor:
    """`(batch, length, heads, size)` of any number of heads, or `(batch, length, width)`."""
    x = float32(x)
    own = x.shape[2] if len(x.shape) == 4 else 1
    if heads in (None, own):
        return x if len(x.shape) == 4 else x[:, :, None, :]
    width = math.prod(x.shape[2:])
    if width % heads:
        raise ValueError(
            f"A width of {width} cannot be split into {heads} relation heads. Pass "
            f"Relations(heads=...), a number that divides the widths of both models."
        )
    return tf.reshape(x, (-1, tf.shape(x)[1], heads, width // heads))


def _scores(query, key) -> tf.Tensor:
    """`(batch, heads, length, length)`."""
    return tf.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])


def _hidden(scores, mask):
    return scores if mask is None else scores + _HIDDEN * (1.0 - float32(mask))[:, None, None, :]


def _divergence(p, q) -> tf.Tensor:
    """The mean over heads of the divergence of each position, `(batch, length)`."""
    logs = [tf.math.log(tf.maximum(x, 1e-9)) for x in (p, q)]
    return tf.reduce_mean(tf.reduce_sum(p * (logs[0] - logs[1]), -1), 1)
