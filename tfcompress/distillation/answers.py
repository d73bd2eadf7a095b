"""What is kept of a teacher's answers, and how it becomes tensors again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.distillation.examples import data_fingerprint
from tfcompress.distillation.losses import Loss, to_logits
from tfcompress.distillation.points import Points, observe, trace_points, used
from tfcompress.values import Value


@dataclasses.dataclass(frozen=True)
class Stored(Value):
    """How a point is stored: as it is, or as the largest of its classes.

    Args:
        name: The point.
        classes: How many classes there are where only the largest are stored.
    """

    name: str
    classes: int | None = None


@dataclasses.dataclass(frozen=True)
class Answers(Value):
    """What is kept of one teacher.

    Args:
        points: The points of the teacher.
        stored: Those that are kept.
        fingerprint: Of its weights.
    """

    points: Points
    stored: tuple[Stored, ...]
    fingerprint: str

    @classmethod
    def from_config(cls, config):
        """What `get_config` described, also once it has been JSON."""
        stored = tuple(Stored(**each) for each in config["stored"])
        return cls(Points.from_config(config["points"]), stored, config["fingerprint"])

    def asker(self, teacher: keras.Model, dtype: str, top_k: int | None) -> Callable:
        """A function from a batch of inputs to the arrays that are stored of it, by name.

        Args:
            teacher: The model.
            dtype: Of what is stored.
            top_k: How many of the largest logits, for the points that have `classes`.

        Returns:
            The function.
        """
        kinds = dict(zip(self.points.outputs, self.points.activations, strict=True))

        @tf.function(reduce_retracing=True)
        def ask(x):
            with keras.StatelessScope():
                _, tensors = observe(teacher, x, [each.name for each in self.stored], False)
            found = {}
            for each in self.stored:
                values = tf.cast(
                    to_logits(tensors[each.name], kinds.get(each.name, "linear")), tf.float32
                )
                if each.classes is not None:
                    values, index, rest = _largest(values, top_k)
                    kind = tf.uint16 if each.classes < 2**16 else tf.int32
                    found[f"{each.name}/index"] = tf.cast(index, kind)
                    found[f"{each.name}/rest"] = _limited(rest, dtype)
                found[each.name] = _limited(values, dtype)
            return found

        return lambda x: {name: tensor.numpy() for name, tensor in ask(x).items()}

    def restore(self, targets: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Point -> float32 tensor, of a batch of what is stored."""
        tensors = {}
        for each in self.stored:
            values = tf.cast(targets[each.name], tf.float32)
            if each.classes is not None:
                index, rest = targets[f"{each.name}/index"], targets[f"{each.name}/rest"]
                values = _dense(values, index, rest, each.classes)
            tensors[each.name] = values
        return tensors


def answers(teacher, losses: list[Loss], student, first: Any, top_k: int | None) -> Answers:
    """What is to be kept of a teacher for these losses.

    Args:
        teacher: A built model.
        losses: What the cache is for.
        student: The student, for losses that pair layers, or None.
        first: A batch of inputs.
        top_k: How many of the largest logits are kept, or None.

    Returns:
        The `Answers`.
    """
    points = trace_points(teacher, first)
    wanted = _wanted(losses, points, student, first)
    stored = tuple(Stored(name, _classes(points, name, top_k)) for name in wanted)
    return Answers(points, stored, teacher_fingerprint(teacher))


def teacher_fingerprint(teacher: keras.Model) -> str:
    """A hash of the weights of a model, in order; names play no part, for Keras numbers them.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> before = teacher_fingerprint(model)
    >>> _ = model.layers[0].bias.assign([0.0, 1.0])
    >>> teacher_fingerprint(model) == before
    False
    """
    return data_fingerprint([keras.ops.convert_to_numpy(weight) for weight in teacher.weights])


def _wanted(losses: list[Loss], points: Points, student, first) -> list[str]:
    """The points of the teacher that the losses compare."""
    pairs = []
    for loss in losses:
        if loss.compares_outputs:
            pairs += [((name,), ()) for name in points.outputs]
        elif student is not None:
            pairs += loss.bind(points, trace_points(student, first))
        else:
            pairs += [(_tuple(name), ()) for name in loss.candidates(points, points)[0]]
    return used(pairs, 0)


def _tuple(name):
    return (name,) if isinstance(name, str) else name


def _classes(points: Points, name: str, top_k: int | None) -> int | None:
    if top_k is None or name not in points.outputs:
        return None
    classes = points.shapes[name][-1]
    if not 1 <= top_k < classes:
        raise ValueError(f"top_k must be in [1, {classes}) for {classes} classes, got {top_k}.")
    return classes


def _limited(values, dtype):
    limit = float(np.finfo(dtype).max)
    return tf.cast(tf.clip_by_value(values, -limit, limit), dtype)


def _largest(logits, k):
    """The k largest logits, their classes, and the logit that each of the others gets."""
    values, index = tf.math.top_k(logits, k)
    others = logits.shape[-1] - k
    ones = tf.one_hot(index, logits.shape[-1], on_value=True, off_value=False, dtype=tf.bool)
    taken = tf.reduce_any(ones, axis=-2)
    rest = tf.reduce_logsumexp(tf.where(taken, -1e30, logits), axis=-1)
    return values, index, rest - float(np.log(others))


def _dense(values, index, rest, classes):
    """Logits of all classes; by one-hot, for a scatter compiles badly."""
    ones = tf.one_hot(tf.cast(index, tf.int32), classes, dtype=tf.float32)
    taken = tf.reduce_sum(ones, axis=-2)
    known = tf.reduce_sum(ones * values[..., None], axis=-2)
    return tf.where(taken > 0, known, tf.cast(rest, tf.float32)[..., None])
