"""The contrastive loss, and its memory of earlier examples."""

import dataclasses

import keras
import tensorflow as tf

from tfcompress.distillation.features import PointLoss, dense, flat, flat_size
from tfcompress.distillation.losses import DEFAULT, example_weights, gathered

_EXCLUDED = -1e9  # The logit of what is no negative.


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Contrastive(PointLoss):
    """The student's embedding must tell which example of the batch it is: `"contrastive"`.

    `-log(exp(u_i . v_i / T) / sum_j exp(u_i . v_j / T))` with u and v the embeddings of student and
    teacher, projected to `width` by a learned layer each, of length 1. The negatives are the other
    examples of the batch (of all replicas), for which batches of 64 and more are needed, or of a
    memory bank too. An example of weight 0 is no negative either.

    The bank holds the v of the last examples that were trained on, as they were then, first in,
    first out; it is saved with the `Distiller`. (That of the paper has a place for each example of
    the data, draws 16,384 of them, and contrasts the teacher's embeddings with the student's too;
    its objective compares pairs one by one.) Choose it smaller than the data set: what is still in
    it when the example comes again counts as a negative of the example itself.

    Args:
        teacher: Glob over the point of the teacher; None for what its classifier reads.
        student: Likewise of the student.
        mapping: See `Features`.
        width: Of the projections.
        temperature: T, above 0.
        bank: How many earlier examples are remembered; 0 for none.

    Raises:
        ValueError: A temperature not above 0, or sizes below 1 (of the bank, below 0).

    Reference: Tian et al. 2020 (CRD), https://arxiv.org/abs/1910.10699; a bank that is a queue: He
    et al. 2020 (MoCo), https://arxiv.org/abs/1911.05722.
    """

    width: int = 128
    temperature: float = 0.1
    bank: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0 or self.width < 1:
            raise ValueError(
                f"Contrastive needs a temperature above 0 and a width of 1 or more, got "
                f"{self.temperature} and {self.width}."
            )
        if isinstance(self.bank, bool) or not isinstance(self.bank, int) or self.bank < 0:
            raise ValueError(
                f"bank is how many earlier examples are remembered, 0 or more, got {self.bank!r}. "
                "Pass e.g. bank=4096."
            )

    def head(self, teacher, student):
        """The two projections, and the bank."""
        sizes = flat_size(teacher[0]), flat_size(student[0])
        return _Projections(*sizes, self.width, self.bank)

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of embeddings `(batch, ...)`, which are flattened."""
        target, state = flat(teacher[0]), flat(student[0])
        if context.head is not None:
            target, state = context.head.teacher(target), context.head.student(state)
        v, u = (tf.math.l2_normalize(gathered(x), axis=-1) for x in (target, state))
        weights = example_weights(context)
        weights = None if weights is None else gathered(weights)
        logits = self._logits(u, v, weights)
        own = tf.linalg.diag_part(logits)
        if self.bank:
            earlier = self._logits(u, *context.head.bank.contents())
            logits = tf.concat([logits, earlier], axis=1)
            if context.training:
                context.head.bank.append(v, weights)
        losses = tf.reduce_logsumexp(logits, axis=1) - own
        if weights is None:
            return tf.reduce_mean(losses)
        return tf.reduce_mean(tf.where(weights > 0, losses * weights, 0.0))

    def _logits(self, u, v, weights):
        logits = tf.matmul(u, v, transpose_b=True) / self.temperature
        return logits if weights is None else tf.where(weights[None, :] > 0, logits, _EXCLUDED)


class _Projections(keras.layers.Layer):
    """A dense layer for the teacher's embedding and one for the student's, and a bank."""

    def __init__(self, teacher_width, student_width, width, bank):
        super().__init__(dtype="float32", name="projections")
        self.teacher = dense(width, teacher_width)
        self.student = dense(width, student_width)
        self.bank = _Bank(bank, width) if bank else None
        self.built = True


class _Bank(keras.layers.Layer):
    """The embeddings of the last examples, latest first, and whether each place holds one."""

    def __init__(self, size, width):
        super().__init__(dtype="float32", name="bank")
        self.size = size
        # Every replica appends the examples of all of them, so that each has the same.
        arguments = {
            "initializer": "zeros",
            "trainable": False,
            "aggregation": "only_first_replica",
        }
        self.embeddings = self.add_weight(shape=(size, width), name="embeddings", **arguments)
        self.filled = self.add_weight(shape=(size,), name="filled", **arguments)
        self.built = True

    def contents(self):
        """`(embeddings, filled)`: of shape (size, width), and (size,) of 0 and 1."""
        return tf.convert_to_tensor(self.embeddings), tf.convert_to_tensor(self.filled)

    def append(self, embeddings, weights):
        """Put a batch in front; as many fall out at the end. What has no weight leaves a gap."""
        embeddings = tf.stop_gradient(embeddings)
        filled = tf.ones_like(embeddings[:, 0]) if weights is None else tf.sign(weights)
        for variable, batch in ((self.embeddings, embeddings), (self.filled, filled)):
            joined = tf.concat([batch, tf.convert_to_tensor(variable)], axis=0)
            variable.assign(tf.ensure_shape(joined[: self.size], variable.shape))
