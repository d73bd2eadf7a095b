"""Training a student on what a teacher says."""

import collections
import threading
from typing import Any

import keras
import tensorflow as tf

from tfcompress.distillation import names
from tfcompress.distillation.balancing import Magnitudes, check_balancing
from tfcompress.distillation.cache import TeacherCache, unpack
from tfcompress.distillation.losses import Context, at_step, float32, to_logits
from tfcompress.distillation.points import observe, trace_points, used
from tfcompress.distillation.search import searched
from tfcompress.keras_hooks.capture import compiled_loss, keras_mask
from tfcompress.keras_hooks.overlay import outside_of_calls
from tfcompress.keras_hooks.update import unwrap_optimizer

_Term = collections.namedtuple("_Term", "loss teacher pairs heads")


@keras.saving.register_keras_serializable(package="tfcompress")
class Distiller(keras.distillation.Distiller):
    """Train a student on the labels and on what one or several teachers say.

    `a * loss + (1 - a) * sum(w_k * L_k)`, with a the `student_loss_weight`, `loss` the one of
    `compile`, and L the distillation losses; regularizers and other losses inside the student are
    added whole. Used as `keras.distillation.Distiller` is: `compile`, `fit`, `.student`. Beyond it:

    * `sample_weight` and `class_weight` count, in the loss and in every distillation loss.
    * A step runs the student once and each teacher once, as in inference; a teacher's weights,
      statistics and random states do not change, nor does its `trainable`.
    * Points anywhere in nested, subclassed and KerasHub models serve, of any width. What a
      subclassed model computes between its layers is a point of `tfcompress.expand(model)`.
    * Callbacks that prune or quantize work on the student.

    Args:
        teacher: A built model, a list of several, or a `TeacherCache` of them. It must share no
            trained weight with the student: for self-distillation pass a copy.
        student: A model.
        distillation_losses: One or several of `"logits"`, `"cross_entropy"`, `"mse"`, `"features"`,
            `"activation_maps"`, `"masked_features"`, `"contrastive"`, `"attention"`, `"relations"`,
            `"rkd_distance"`, `"rkd_angle"`, `"similarity"`, and objects of these kinds.
        distillation_loss_weights: A number or schedule for each loss; ones by default.
        student_loss_weight: The share of the loss of the labels, in [0, 1], or a schedule.
        teacher_weights: A number or schedule for each of several teachers; equal by default.
        balancing: `"magnitude"` brings all losses to the running size of the first one (the loss of
            the labels, where it counts); weights are then shares. See `balancing.Magnitudes`.
        unlabelled: The label of examples that have none, e.g. -1 or NaN: they count in the
            distillation losses only, and not in metrics. With `fit(x)`, none has.
        mask: The name of the model input that is 1 at real tokens, e.g. `"padding_mask"`, where the
            inputs are a dict; without it, the masks that Keras passes along are used.
        name: Name of the model.

    Attributes:
        student: The student; plain Keras all the time.
        teacher: The teacher, or the first of them.

    Raises:
        ValueError: A model, loss or weight that cannot be used; the message says why.

    Example:

    >>> import numpy as np
    >>> def make(width):
    ...     layers = [keras.layers.Dense(width, activation="relu"), keras.layers.Dense(2)]
    ...     return keras.Sequential([keras.Input((4,)), *layers])
    >>> distiller = Distiller(make(8), make(2), ["logits", "features"])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> distiller.compile("adam", loss)
    >>> history = distiller.fit(np.eye(4), np.array([0, 1, 0, 1]), verbose=0)
    >>> sorted(history.history)
    ['distillation_loss', 'features_loss', 'logits_loss', 'loss', 'student_loss']

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
    """

    includes_student_losses = True

    def __init__(
        self,
        teacher,
        student,
        distillation_losses,
        distillation_loss_weights=None,
        student_loss_weight=0.5,
        teacher_weights=None,
        balancing=None,
        unlabelled=None,
        mask=None,
        name="distiller",
        **kwargs,
    ):
        # Not that of Keras's Distiller, which asks for equal shapes and dtypes, and freezes.
        policy = kwargs.pop("dtype", getattr(student, "dtype_policy", None))
        keras.Model.__init__(self, name=name, dtype=policy, **kwargs)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        self.teachers = [] if self.cache else teachers
        self.teacher = None if self.cache else teachers[0]
        self.student = student
        _check_models(self.teachers, student)
        several = isinstance(distillation_losses, (list, tuple))
        losses = distillation_losses if several else [distillation_losses]
        self.distillation_losses = tuple(names.get(loss) for loss in losses)
        self.distillation_loss_weights = _weights(
            "distillation_loss_weights", distillation_loss_weights, len(losses), 1.0
        )
        count = len(self.cache.points) if self.cache else len(teachers)
        self.teacher_weights = _weights("teacher_weights", teacher_weights, count, 1.0 / count)
        _check_share(student_loss_weight)
        self.student_loss_weight = student_loss_weight
        check_balancing(balancing)
        self.balancing = balancing
        self.unlabelled = unlabelled
        self.mask = mask
        self._make_trackers()
        self._recorded = threading.local()
        self._terms: list[_Term] | None = None
        self._inputs_seen = None
        self.heads = []
        searching = any(getattr(x, "mapping", None) == "searched" for x in self.distillation_losses)
        if student.built and getattr(student, "inputs", None) and not searching:
            single = isinstance(student, keras.Sequential)
            self._prepare(student.inputs[0] if single else student.input)

    def compile(self, optimizer="adam", loss=None, metrics=None, **kwargs):
        """As in Keras; `loss` may be None where the student's loss does not count.

        Args:
            optimizer: For the student.
            loss: Of the student, on the labels.
            metrics: Of the student.
            **kwargs: See `keras.Model.compile`.
        """
        if loss is None and self.student_loss_weight != 0:
            raise ValueError(
                f"loss is None, and student_loss_weight is {self.student_loss_weight}. Pass the "
                "loss on the labels, or Distiller(..., student_loss_weight=0.0)."
            )
        if self.unlabelled is not None and metrics is not None:
            # These leave examples without a label out.
            kwargs["weighted_metrics"] = [*(kwargs.get("weighted_metrics") or []), *metrics]
            metrics = None
        keras.Model.compile(self, optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def search(self, batch, in_order: bool = True) -> dict[int, tuple[tuple[str, str], ...]]:
        """Choose the layers for every loss with `mapping="searched"`, on a batch.

        The cost of a pair of layers is the loss between them, relative to that of the teacher's
        layer with its mean; where a projection would be learned, it is the best one for the batch.

        Args:
            batch: Inputs, some hundred examples (of features more positions than their width).
            in_order: Whether deeper layers of the student must learn from deeper ones.

        Returns:
            The pairs (teacher, student) that were chosen, by the position of the loss.
        """
        if len(self.teachers) != 1:
            raise ValueError("search needs one teacher that is a model; pass mapping= pairs.")
        losses = list(self.distillation_losses)
        found = {}
        for index, loss in enumerate(losses):
            if getattr(loss, "mapping", None) == "searched":
                losses[index] = searched(loss, self.teacher, self.student, batch, in_order)
                found[index] = losses[index].mapping
        self.distillation_losses = tuple(losses)
        self._prepare(keras.tree.map_structure(tf.convert_to_tensor, batch))
        return found

    # What Keras calls.

    def call(self, inputs, training=None, **kwargs):
        """The student's outputs."""
        inputs, _ = unpack(inputs)
        outputs, tensors = observe(self.student, inputs, self._student_points, training)
        self._recorded.points = outputs, tensors
        return outputs

    def __call__(self, inputs, *args, **kwargs):
        """As in Keras, which builds a model from shapes alone; here the dtypes are needed."""
        if self._terms is None:
            with self.distribute_strategy.scope():
                self._prepare(unpack(inputs)[0])
        return super().__call__(inputs, *args, **kwargs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The whole loss of a batch; see the class.

        Args:
            x: Inputs; with what the teacher said, from `TeacherCache.dataset`.
            y: Labels, or None.
            y_pred: What this model returned for `x`; None to run it.
            sample_weight: One weight an example, or one a position.
            training: Whether this is a training step.

        Returns:
            A scalar.
        """
        inputs, targets = unpack(x)
        y_pred, points = self._student_tensors(x, y_pred, training)
        y, labelled = _labels(y, self.unlabelled, y_pred, sample_weight)
        size = tf.shape(keras.tree.flatten(inputs)[0])[0]
        student_loss = self._student_loss(y, y_pred, labelled)
        parts = self._distillation(inputs, targets, points, sample_weight, training)
        total, distilled = self._combine(student_loss, parts, training)
        self._track(student_loss, distilled, parts, size)
        return total + self._other_losses()

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """As in Keras, where there are labels."""
        if y is None:
            return self.get_metrics_result()
        y, weight = _labels(y, self.unlabelled, y_pred, sample_weight)
        return super().compute_metrics(x, y, y_pred, weight)

    def get_metrics_result(self):
        """The results of the metrics that have seen labels, and of the losses."""
        found = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                found.update(result if isinstance(result, dict) else {metric.name: result})
        return found

    @property
    def losses(self):
        """Of the student only: a teacher's regularizers are not to be trained on."""
        return self.student.losses

    @property
    def trainable_variables(self):
        """Of the student, and of what is learned with it."""
        layers = [self.student, *self.heads] if self.trainable else []
        return _unique(v for layer in layers for v in layer.trainable_variables)

    @property
    def trainable_weights(self):
        """The same."""
        return self.trainable_variables

    @property
    def non_trainable_variables(self):
        """Everything else: the teacher whole, statistics, metrics."""
        trained = set(map(id, self.trainable_variables))
        return [v for v in self.variables if id(v) not in trained]

    @property
    def non_trainable_weights(self):
        """Everything else, without metrics and random states."""
        trained = set(map(id, self.trainable_variables))
        return [v for v in self.weights if id(v) not in trained]

    def reset_metrics(self):
        """Reset all metrics."""
        keras.Model.reset_metrics(self)

    def get_config(self):
        """The constructor arguments; the models with them."""
        teacher = self.cache or (self.teachers if len(self.teachers) > 1 else self.teacher)
        config = {
            "teacher": teacher,
            "student": self.student,
            "distillation_losses": list(self.distillation_losses),
            "distillation_loss_weights": list(self.distillation_loss_weights),
            "student_loss_weight": self.student_loss_weight,
            "teacher_weights": list(self.teacher_weights),
            "balancing": self.balancing,
            "unlabelled": self.unlabelled,
            "mask": self.mask,
            "name": self.name,
        }
        return keras.saving.serialize_keras_object(config)

    @classmethod
    def from_config(cls, config):
        """The distiller that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config))

    def get_build_config(self):
        """The shapes and dtypes of the inputs."""
        return None if self._inputs_seen is None else {"inputs": self._inputs_seen}

    def build_from_config(self, config):
        """Make what is learned beside the student, so that its values can be loaded."""
        if self._terms is None and config:
            self._prepare(
                _map_specs(
                    lambda spec: keras.KerasTensor(spec["shape"], spec["dtype"]), config["inputs"]
                )
            )

    def compile_from_config(self, config):
        """Compile as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    # What is made before the first step.

    def _prepare(self, inputs):
        """Look at the points of all models, and make what is learned beside the student."""
        with outside_of_calls():
            student = trace_points(self.student, inputs)
            traced = [trace_points(teacher, inputs) for teacher in self.teachers]
            teachers = self.cache.points if self.cache else traced
            self._activations = [(points.activations, student.activations) for points in teachers]
            self._terms = [
                self._term(loss, i, points, student)
                for loss in self.distillation_losses
                for i, points in enumerate(teachers)
            ]
            self.heads = [head for term in self._terms for head in term.heads if head is not None]
            if self.balancing:
                count = len(self.distillation_losses) + (self.student_loss_weight != 0)
                self.magnitudes = Magnitudes(count)
        self._student_points = used([pair for term in self._terms for pair in term.pairs], 1)
        self._teacher_points = [
            used([pair for term in self._terms if term.teacher == i for pair in term.pairs], 0)
            for i in range(len(teachers))
        ]
        if self.cache:
            self.cache.require(self._teacher_points)
        self._inputs_seen = keras.tree.map_structure(
            lambda x: {
                "shape": (None, *x.shape[1:]),
                "dtype": keras.backend.standardize_dtype(x.dtype),
            },
            inputs,
        )
        self.built = True

    def _term(self, loss, teacher, teacher_points, student_points):
        pairs = loss.bind(teacher_points, student_points)
        heads = []
        for pair in pairs:
            one = [teacher_points.shapes[name] for name in pair.teacher]
            two = [student_points.shapes[name] for name in pair.student]
            heads.append(loss.head(one, two))
        return _Term(loss, teacher, pairs, heads)

    def _make_trackers(self):
        self.student_loss_tracker = keras.metrics.Mean(name="student_loss")
        self.distillation_loss_tracker = keras.metrics.Mean(name="distillation_loss")
        self.loss_trackers = []
        if len(self.distillation_losses) > 1:
            known = {kind: name for name, kind in names.LOSSES.items()}
            labels = [
                known.get(type(loss), type(loss).__name__) for loss in self.distillation_losses
            ]
            for index, label in enumerate(labels):
                again = labels[:index].count(label)
                suffix = f"_{again + 1}" if again else ""
                self.loss_trackers.append(keras.metrics.Mean(name=f"{label}{suffix}_loss"))

    # The parts of a step.

    def _student_tensors(self, x, y_pred, training):
        """The outputs and points of the student, of the call that made `y_pred`."""
        outputs, tensors = self._recorded.__dict__.pop("points", (None, None))
        same = outputs is not None and y_pred is not None
        if not (same and keras.tree.flatten(outputs)[0] is keras.tree.flatten(y_pred)[0]):
            # Keras traces the loss alone when it builds it; so may others.
            y_pred = self(x, training=training)
            outputs, tensors = self._recorded.__dict__.pop("points")
        return y_pred, tensors

    def _student_loss(self, y, y_pred, sample_weight):
        if y is None or self.student_loss_weight == 0:
            return tf.zeros(())
        loss = compiled_loss(self, y, y_pred, sample_weight)
        return float32(loss) * _replicas()

    def _distillation(self, x, targets, student, sample_weight, training) -> list[tf.Tensor]:
        """Each distillation loss, over all teachers."""
        if self.student_loss_weight == 1:
            return [tf.zeros(()) for _ in self.distillation_losses]
        said = self._said(x, targets, training)
        if said is None:
            return [tf.zeros(()) for _ in self.distillation_losses]
        step = self._step()
        parts = []
        for loss in self.distillation_losses:
            part = tf.zeros(())
            for term in (each for each in self._terms if each.loss is loss):
                weight = at_step(self.teacher_weights[term.teacher], step)
                values = self._term_values(term, said, student, x, sample_weight, step, training)
                part += weight * sum(values) / (1 if loss.compares_outputs else len(values))
            parts.append(part)
        return parts

    def _said(self, x, targets, training) -> list[dict[str, tf.Tensor]] | None:
        """What the teachers say at their points."""
        if self.cache is None:
            if targets is not None:
                raise ValueError(
                    "The data carries what a teacher said, and this Distiller has its own teacher. "
                    "Pass the cache as teacher: Distiller(cache, student, ...)."
                )
            return [self._ask(i, x) for i in range(len(self.teachers))]
        if targets is not None:
            return self.cache.restore(targets)
        if training:
            raise ValueError(
                "This Distiller learns from a cache, and the data lacks what the teacher said. "
                "Train on it with fit(cache.dataset(x, y))."
            )
        return None

    def _ask(self, index, x):
        # Whatever a teacher would assign (statistics, random states) goes into the scope, and away.
        with keras.StatelessScope():
            _, tensors = observe(
                self.teachers[index], x, self._teacher_points[index], training=False
            )
        return {name: tf.stop_gradient(tensor) for name, tensor in tensors.items()}

    def _term_values(self, term, said, student, x, sample_weight, step, training):
        values = []
        for index, (pair, head) in enumerate(zip(term.pairs, term.heads, strict=True)):
            one = [said[term.teacher][name] for name in pair.teacher]
            two = [student[name] for name in pair.student]
            kinds = ("linear", "linear")
            if term.loss.compares_outputs:
                kinds = tuple(each[index] for each in self._activations[term.teacher])
                if self.cache is None:  # Else they were stored as logits.
                    one = [to_logits(one[0], kinds[0])]
                two = [to_logits(two[0], kinds[1])]
            context = Context(
                _one_weight(sample_weight), self._mask_of(x, two[0]), step, head, kinds, training
            )
            values.append(term.loss(one, two, context))
        return values

    def _mask_of(self, x, tensor):
        if self.mask is None:
            mask = keras_mask(tensor)
            fits = mask is not None and len(mask.shape) == 2
            return mask if fits else None
        if not isinstance(x, dict) or self.mask not in x:
            raise ValueError(
                f"mask={self.mask!r} names no input; expected a dict of inputs with it, got "
                f"{list(x) if isinstance(x, dict) else type(x).__name__}."
            )
        return x[self.mask]

    def _combine(self, student_loss, parts, training):
        """The total, and the weighted sum of the distillation losses."""
        step = self._step()
        share = at_step(self.student_loss_weight, step)
        weights = [at_step(weight, step) for weight in self.distillation_loss_weights]
        balanced = parts
        if self.balancing:
            with_labels = self.student_loss_weight != 0
            everything = [student_loss, *parts] if with_labels else parts
            factors = self.magnitudes(tf.stack(everything), training=training)
            factors = tf.unstack(factors)[with_labels:]
            balanced = [factor * part for factor, part in zip(factors, parts, strict=True)]
        distilled = sum(w * part for w, part in zip(weights, balanced, strict=True))
        # Replicas add up what each of them returns.
        return (share * student_loss + (1.0 - share) * distilled) / _replicas(), distilled

    def _other_losses(self):
        """Regularizers and `add_loss` of the student."""
        losses = [tf.reduce_sum(float32(loss)) for loss in self.losses]
        return sum(losses, tf.zeros(())) / _replicas()

    def _track(self, student_loss, distilled, parts, size):
        self.student_loss_tracker.update_state(student_loss, sample_weight=size)
        self.distillation_loss_tracker.update_state(distilled, sample_weight=size)
        for tracker, part in zip(self.loss_trackers, parts, strict=False):
            tracker.update_state(part, sample_weight=size)

    def _step(self):
        if getattr(self, "optimizer", None) is None:
            return 0
        return tf.convert_to_tensor(unwrap_optimizer(self.optimizer).iterations.value)


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def _labels(y, unlabelled, y_pred, sample_weight) -> tuple[Any, Any]:
    """Labels that any loss takes, and weights that leave examples without a label out."""
    if y is None or unlabelled is None:
        return y, sample_weight
    if len(keras.tree.flatten(y)) != 1:
        raise ValueError("unlabelled= is for models of one output; pass fit(x) or sample weights.")
    labels = tf.convert_to_tensor(y)
    nan = unlabelled != unlabelled
    missing = tf.math.is_nan(labels) if nan else labels == tf.cast(unlabelled, labels.dtype)
    labels = tf.where(missing, tf.zeros_like(labels), labels)
    first = tf.reduce_any(missing, axis=list(range(1, len(labels.shape))))
    weights = 1.0 - float32(first)
    given = _one_weight(sample_weight)
    if given is not None:
        given = float32(given)
        weights = given * tf.reshape(weights, (-1, *[1] * (len(given.shape) - 1)))
    return labels, weights


def _one_weight(sample_weight):
    leaves = [x for x in keras.tree.flatten(sample_weight) if x is not None]
    if len(leaves) > 1:
        raise ValueError(
            f"Got {len(leaves)} sample weights, one for each output; the distillation losses need "
            "one an example. Pass one array."
        )
    return leaves[0] if leaves else None


def _check_models(teachers, student):
    if not teachers and not isinstance(student, keras.Model):
        raise ValueError(f"student must be a keras.Model, got {student!r}.")
    for teacher in teachers:
        if not isinstance(teacher, keras.Model) or not isinstance(student, keras.Model):
            raise ValueError(
                f"teacher and student must be keras.Models (or the teacher a TeacherCache), got "
                f"{teacher!r} and {student!r}."
            )
        if not teacher.built:
            raise ValueError(
                f"The teacher {teacher.name!r} has no weights yet. Load or train it first, and "
                "call it on a batch."
            )
        shared = set(map(id, teacher.variables)) & set(map(id, student.trainable_variables))
        if shared:
            raise ValueError(
                f"The teacher {teacher.name!r} and the student {student.name!r} share "
                f"{len(shared)} trained weights, so training the student would "
                "change the teacher. Pass a copy: "
                "keras.models.clone_model(model), then set_weights(model.get_weights())."
            )


def _weights(what, weights, count, default):
    weights = [default] * count if weights is None else weights
    weights = weights if isinstance(weights, (list, tuple)) else [weights]
    if len(weights) != count:
        raise ValueError(f"{what} has {len(weights)} entries, expected {count}: {weights!r}.")
    wrong = [w for w in weights if not (isinstance(w, (int, float)) or callable(w))]
    if wrong:
        raise ValueError(f"{what} takes numbers and schedules, got {wrong}.")
    return tuple(weights)


def _check_share(share):
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not callable(share) and not (is_number and 0 <= share <= 1):
        raise ValueError(
            f"student_loss_weight must be a number in [0, 1] or a schedule, got {share!r}."
        )


def _unique(variables):
    return list({id(variable): variable for variable in variables}.values())


def _map_specs(fn, structure):
    if isinstance(structure, dict) and set(structure) == {"shape", "dtype"}:
        return fn(structure)
    if isinstance(structure, dict):
        return {key: _map_specs(fn, value) for key, value in structure.items()}
    return [_map_specs(fn, value) for value in structure]
