"""What a distillation loss is, and those that compare the outputs of the models.

A loss is a frozen, serializable value. It says which points it compares (`bind`), what it has to
learn beside the student (`head`), and what it costs (`__call__`). All of them take weights of the
examples as Keras's losses do: the sum of weight * loss over the number of examples.
"""

import dataclasses
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfcompress.distillation.points import Points
from tfcompress.keras_hooks.capture import keras_logits
from tfcompress.schedules import Schedule
from tfcompress.values import Value

_SMALLEST = 1e-7  # Of a probability; what Keras clips at, too.


class Pair(NamedTuple):
    """Points that are compared: of the teacher, and of the student."""

    teacher: tuple[str, ...]
    student: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a loss is told beside the tensors.

    Args:
        weights: One weight an example, `(batch,)`, or one a position, `(batch, length)`; None for
            ones.
        mask: True where a position counts, `(batch, length)`; None for everywhere.
        step: Optimizer updates so far, an int or a tensor: what schedules are evaluated at.
        head: The layer that `Loss.head` made, or None.
        activations: `"softmax"`, `"sigmoid"` or `"linear"`: what the last layers of teacher and
            student are; the tensors of outputs are logits whichever it is.
        training: Whether this is a training step.
    """

    weights: Any = None
    mask: Any = None
    step: Any = 0
    head: keras.layers.Layer | None = None
    activations: tuple[str, str] = ("linear", "linear")
    training: bool = True


DEFAULT = Context()


class Loss(Value):
    """Base of the distillation losses; subclass it as a frozen dataclass for one of your own.

    `compares_outputs` says that the tensors are outputs of the models, which come as logits.
    """

    compares_outputs = False

    def bind(self, teacher: Points, student: Points) -> list[Pair]:
        """The points that are compared; the loss is the mean over the pairs."""
        raise NotImplementedError(f"{type(self).__name__} must define bind(teacher, student).")

    def head(self, teacher: list[tuple], student: list[tuple]) -> keras.layers.Layer | None:
        """What is trained with the student and thrown away, for a pair of points of these shapes.

        Args:
            teacher: The shapes of the teacher's points.
            student: The shapes of the student's points.

        Returns:
            A built layer, or None.
        """
        return None

    def __call__(self, teacher: list, student: list, context: Context = DEFAULT):
        """The loss of one pair.

        Args:
            teacher: The tensors at the teacher's points.
            student: The tensors at the student's points.
            context: What else it depends on.

        Returns:
            A scalar, float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    def get_config(self):
        """The constructor arguments, schedules and tuples among them in Keras's form."""
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config):
        """The loss that `get_config` described."""
        return cls(**{key: _deserialized(value) for key, value in config.items()})


def _deserialized(value):
    value = keras.saving.deserialize_keras_object(value)
    return _tuples(value)


def _tuples(value):
    """JSON has lists only, and a frozen value holds tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class OutputLoss(Loss):
    """Base of the losses between outputs: the first with the first, and so on, summed."""

    compares_outputs = True

    def bind(self, teacher, student):
        """Each output of the student with the teacher's."""
        shapes = [
            [points.shapes[name][1:] for name in points.outputs] for points in (teacher, student)
        ]
        if len(shapes[0]) != len(shapes[1]) or not all(map(_fit, *shapes)):
            raise ValueError(
                f"{type(self).__name__} compares the outputs of teacher and student, and "
                f"{teacher.model!r} has outputs of shape {shapes[0]}, {student.model!r} of "
                f"{shapes[1]}. Give the student the same outputs, or use a loss on features."
            )
        return [
            Pair((one,), (two,)) for one, two in zip(teacher.outputs, student.outputs, strict=True)
        ]


def _fit(one, two) -> bool:
    return len(one) == len(two) and all(
        a is None or b is None or a == b for a, b in zip(one, two, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class SoftenedLoss(OutputLoss):
    """Base of the losses between the probabilities of classes, softened by a temperature."""

    temperature: float | Schedule
    activation: str | None = None

    def __post_init__(self):
        _check_temperature(self.temperature)
        _check_activation(self.activation)

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of logits `(batch, ..., classes)`."""
        temperature = at_step(self.temperature, context.step)
        log_p, log_q = _log_probabilities(self, teacher[0], student[0], temperature, context)
        losses = sum(
            tf.reduce_sum(self.of_class(p, q), -1) for p, q in zip(log_p, log_q, strict=True)
        )
        return weighted_mean(temperature**2 * losses, context)

    def of_class(self, log_p, log_q):
        """The share of each class in the loss, of log-probabilities `(..., classes)`."""
        raise NotImplementedError(f"{type(self).__name__} must define of_class.")


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Logits(SoftenedLoss):
    """The divergence of the student's softened classes from the teacher's: `"logits"`.

    `T**2 * KL(softmax(t / T) || softmax(s / T))` of logits t and s; `T**2` keeps the size of the
    gradients whatever the temperature. With independent labels, the sum over the labels of the
    divergence of `sigmoid(t / T)`.

    Args:
        temperature: T, above 0, or a schedule; 2 to 5 are usual.
        activation: `"softmax"` or `"sigmoid"`; None for that of the models' last layer, and softmax
            where they return logits.

    Raises:
        ValueError: A temperature not above 0, or an unknown activation.

    Example:

    >>> loss = Logits(temperature=2.0)
    >>> teacher, student = tf.constant([[2.0, 0.0]]), tf.constant([[0.0, 0.0]])
    >>> print(round(float(loss([teacher], [student])), 4))
    0.4438

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
    """

    temperature: float | Schedule = 3.0

    def of_class(self, log_p, log_q):
        """The share of a class in the divergence."""
        return tf.exp(log_p) * (log_p - log_q)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class CrossEntropy(SoftenedLoss):
    """Cross-entropy with the teacher's probabilities as targets: `"cross_entropy"`.

    `-T**2 * sum(softmax(t / T) * log(softmax(s / T)))`: the gradient of `Logits`, and a value that
    is the teacher's entropy where the two agree.

    Args:
        temperature: T, above 0, or a schedule.
        activation: See `Logits`.

    Raises:
        ValueError: A temperature not above 0, or an unknown activation.

    Example:

    >>> zeros = tf.zeros((1, 2))
    >>> print(round(float(CrossEntropy()([zeros], [zeros])), 4))
    0.6931

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
    """

    temperature: float | Schedule = 1.0

    def of_class(self, log_p, log_q):
        """The share of a class in the cross-entropy."""
        return -tf.exp(log_p) * log_q


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class MeanSquaredError(OutputLoss):
    """The mean squared difference of the outputs, of classifiers of their logits: `"mse"`.

    Example:

    >>> float(MeanSquaredError()([tf.zeros((1, 2))], [tf.constant([[1.0, 3.0]])]))
    5.0

    Reference: Ba & Caruana 2014, https://arxiv.org/abs/1312.6184.
    """

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of outputs `(batch, ...)`."""
        difference = float32(student[0]) - float32(teacher[0])
        axis = -1 if len(difference.shape) > 1 else None
        squares = tf.square(difference)
        return weighted_mean(squares if axis is None else tf.reduce_mean(squares, axis), context)


def _check_temperature(temperature):
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; 2 to 5 are usual.")
    if not isinstance(temperature, (int, float)) and not callable(temperature):
        raise ValueError(
            f"temperature must be a number or a schedule, got {temperature!r}. Pass e.g. 3.0 or "
            "tfcompress.schedules.Linear(6.0, 1.0, begin_step=0, end_step=1000)."
        )


def _check_activation(activation):
    if activation not in (None, "softmax", "sigmoid"):
        raise ValueError(f'activation must be "softmax", "sigmoid" or None, got {activation!r}.')


def _log_probabilities(loss, teacher, student, temperature, context):
    """The logarithms of the probabilities of all outcomes, a list of them for each model."""
    activation = loss.activation
    if activation is None:
        activation = "sigmoid" if "sigmoid" in context.activations else "softmax"
    logits = [float32(x) / temperature for x in (teacher, student)]
    if activation == "sigmoid":
        return [[tf.math.log_sigmoid(x), tf.math.log_sigmoid(-x)] for x in logits]
    if teacher.shape[-1] == 1:
        raise ValueError(
            f"{type(loss).__name__} got outputs of one class, whose softmax is always 1. Pass "
            f'{type(loss).__name__}(activation="sigmoid") for a binary classifier, or "mse" for a '
            "regression."
        )
    return [[tf.nn.log_softmax(x)] for x in logits]


def float32(x) -> tf.Tensor:
    """A tensor in the precision in which losses are computed."""
    return tf.cast(x, tf.float32)


def at_step(value, step):
    """A number, or a schedule at `step`, as a float or a float32 tensor."""
    if not callable(value):
        return float(value)
    value = value(step)
    return float32(value) if tf.is_tensor(value) else float(value)


def weighted_mean(values: tf.Tensor, context: Context = DEFAULT) -> tf.Tensor:
    """The sum of weight * loss over the number of examples, as in Keras's losses.

    Args:
        values: Losses, `(batch,)` or `(batch, positions, ...)`. The loss of an example is the mean
            of its positions; where there is a mask, of those where it is True.
        context: Weights and mask.

    Returns:
        A scalar.

    Example:

    >>> float(weighted_mean(tf.constant([1.0, 3.0]), Context(weights=tf.constant([2.0, 0.0]))))
    1.0
    """
    values = float32(values)
    has_positions = len(values.shape) > 1
    weights = example_weights(context, positions=has_positions)
    if not has_positions:
        return tf.reduce_mean(values if weights is None else values * weights)
    values = tf.reduce_mean(values, axis=list(range(2, len(values.shape))))
    if weights is not None:
        values = values * (weights if len(weights.shape) == 2 else weights[:, None])
    if context.mask is None:
        return tf.reduce_mean(values)
    mask = float32(context.mask)
    lengths = tf.maximum(tf.reduce_sum(mask, 1), 1.0)
    # A product would keep what is not finite where the mask is False.
    return tf.reduce_mean(tf.reduce_sum(tf.where(mask > 0, values, 0.0), 1) / lengths)


def example_weights(context: Context, positions: bool = False) -> tf.Tensor | None:
    """The weights as `(batch,)`; as `(batch, length)` if there are such and they are asked for."""
    if context.weights is None:
        return None
    weights = float32(context.weights)
    if positions and len(weights.shape) == 2 and weights.shape[1] != 1:
        return weights
    return tf.reduce_mean(weights, axis=list(range(1, len(weights.shape))))


def gathered(tensor: tf.Tensor) -> tf.Tensor:
    """The examples of all replicas, for the losses that compare examples with each other."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return tensor
    return replica.all_gather(tensor, axis=0)


def to_logits(tensor, activation):
    """Logits of outputs: what a softmax or sigmoid was applied to, or else what gives the same."""
    if activation == "linear":
        return tensor
    logits = keras_logits(tensor)
    if logits is not None:
        return logits
    tensor = tf.clip_by_value(float32(tensor), _SMALLEST, 1.0 - _SMALLEST)
    odds = tf.math.log(tensor)
    return odds if activation == "softmax" else odds - tf.math.log1p(-tensor)
