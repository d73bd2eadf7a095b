"""Pruning while training: masks that are chosen on a schedule and held after every update."""

import dataclasses
import warnings

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.callbacks.base import CompressionCallback, logger
from tfcompress.keras_hooks.update import around_update, on_each_replica
from tfcompress.keras_hooks.walk import check_globs, matches, named_variables
from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures
from tfcompress.ops.masks import apply_mask, choose_masks

_NEVER = -1


@dataclasses.dataclass(frozen=True)
class _Group:
    """Weights whose masks are chosen together, at the steps of one schedule."""

    schedule: schedules.Schedule
    paths: tuple[str, ...]
    updated_at: (
        keras.Variable
    )  # The step of the last choice, so that a resumed run goes on from it.


class _MaskingCallback(CompressionCallback):
    """Zeros that are chosen by `_choose_masks` and held in the variables after every update."""

    def __init__(self, include=None, exclude=None):
        self.masks: dict[str, keras.Variable] = {}
        self._weights: dict[str, keras.Variable] = {}
        self._groups: list[_Group] = []
        super().__init__(include, exclude)

    def _group_weights(self, weights):
        """Pairs of a schedule and the paths that follow it, out of `weights`."""
        raise NotImplementedError

    def _choose_masks(self, group, weights, step):
        """Boolean masks for `weights`, at `step`."""
        raise NotImplementedError

    def _is_due(self, group, step):
        """Whether masks are chosen after update number `step`."""
        raise NotImplementedError

    def _prepare(self, model):
        selected = self._select(model)
        grouped = self._group_weights(selected)
        self._weights = {path: selected[path] for _, paths in grouped for path in paths}
        # By its place in the model: the paths of a model that is made anew may differ.
        key = {path: f"weight_{i}" for i, path in enumerate(named_variables(model))}
        self.masks = {
            path: self._add_state(f"{key[path]}/mask", tf.ones(weight.shape, tf.bool), "bool")
            for path, weight in self._weights.items()
        }
        self._groups = [
            _Group(schedule, paths, self._add_state(f"{key[paths[0]]}/updated_at", _NEVER, "int64"))
            for schedule, paths in grouped
        ]

    def _begin(self, tracing):
        if not tracing:
            _check_finite(self._weights)
            self._run(self._choose_and_hold)

    def _attach(self, session, optimizer):
        session.defer(around_update(optimizer, self._around_update))

    def _around_update(self, apply):
        self._start()
        apply()
        self._run(self._choose_and_hold)

    def _choose_and_hold(self, weights, masks, updated_at, step):
        for group, at in zip(self._groups, updated_at, strict=True):
            fresh = (at == _NEVER) & (step >= group.schedule.begin_step)
            # Micro-batches of a gradient accumulation share their step: masks are chosen once.
            due = self._is_due(group, step) & (at != step)
            self._choose_if(fresh | due, group, at, weights, masks, step)
        _hold(weights, masks)

    def _choose_if(self, condition, group, updated_at, weights, masks, step):
        def choose():
            chosen = self._choose_masks(group, [weights[path] for path in group.paths], step)
            for path, mask in zip(group.paths, chosen, strict=True):
                masks[path].assign(mask)
            updated_at.assign(step)

        tf.cond(condition, choose, lambda: None)

    def _finish(self):
        self._run(lambda weights, masks, updated_at, step: _hold(weights, masks))
        for path, mask in self.masks.items():
            zeros = 1 - float(tf.reduce_mean(tf.cast(mask.value, tf.float32)))
            logger.info("%s: %s holds %.4f zeros", type(self).__name__, path, zeros)

    def _run(self, update):
        """`update(weights, masks, updated_at, step)` on every replica's own copies."""
        counters = [group.updated_at for group in self._groups]
        count = len(self._weights)

        def on_replica(variables, tensors):
            weights = dict(zip(self._weights, variables[:count], strict=True))
            masks = dict(zip(self._weights, variables[count : 2 * count], strict=True))
            update(weights, masks, variables[2 * count :], tensors[0])

        step = tf.cast(tf.convert_to_tensor(self._optimizer.iterations), tf.int64)
        variables = [*self._weights.values(), *self.masks.values(), *counters]
        on_each_replica(variables, on_replica, [step])


@keras.saving.register_keras_serializable(package="tfcompress")
class ThresholdPruning(_MaskingCallback):
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
        if not threshold > 0:
            raise ValueError(
                f"threshold must be above 0, got {threshold}. It is the smallest magnitude that is "
                "kept, e.g. 0.1."
            )
        super().__init__(include, exclude)
        self.threshold = threshold

    def get_config(self):
        """The constructor arguments."""
        return {"threshold": self.threshold, "include": self.include, "exclude": self.exclude}

    def _group_weights(self, weights):
        self.applied = dict.fromkeys(weights, f"|w| < {self.threshold} set to zero")
        return [(schedules.OneShot(self.threshold), tuple(weights))]

    def _is_due(self, group, step):
        return False  # Chosen once, when it is fresh.

    def _choose_masks(self, group, weights, step):
        return [tf.abs(weight) >= tf.cast(self.threshold, weight.dtype) for weight in weights]

    def _finish(self):
        super()._finish()
        for path, mask in self.masks.items():
            if not bool(tf.reduce_any(mask.value)):
                warnings.warn(
                    f"threshold {self.threshold} left nothing of {path!r}: every weight in it was "
                    "smaller. Use a smaller threshold, or exclude it.",
                    stacklevel=2,
                )


@keras.saving.register_keras_serializable(package="tfcompress")
class Pruning(_MaskingCallback):
    """Prune to a sparsity, at once or on a schedule, and hold the zeros while training goes on.

    At the steps of the schedule the criterion scores every weight, the allocation decides how many
    each may keep, the structure what is kept together. The zeros are held in the variables after
    each optimizer update, so that they are there whenever the model is looked at. Gradual magnitude
    pruning ([Zhu & Gupta 2017](https://arxiv.org/abs/1710.01878)) is the default criterion with
    `tfcompress.schedules.PolynomialDecay`.

    Of n weights exactly `max(round(n * (1 - sparsity)), 1)` are kept, ties broken by index. A step
    is an optimizer update. Whatever weights are in the model when training ends (the best epoch's,
    a moving average) get the zeros of the last step.

    Args:
        sparsity: Fraction of zeros in [0, 1): a float, a schedule, or {glob: float or schedule};
            the first glob that matches a path counts, other weights are left alone.
        criterion: Scores the weights: "magnitude", or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured".
        allocation: How the sparsity is shared out: "uniform" (each weight) or "global" (all weights
            of one schedule together).
        frequency: Steps between two choices of the masks; a schedule's last step always is one.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Attributes:
        applied: Path -> what was done to it.
        skipped: Path -> why nothing was.
        masks: Path -> boolean variable of the weight's shape; True keeps.

    Raises:
        ValueError: A sparsity outside [0, 1), an unknown name; when training starts: a glob that
            matches nothing, a model without kernels, or weights that are not finite.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> model.compile("adam", "mse")
    >>> pruning = Pruning(sparsity=0.8)
    >>> _ = model.fit(tf.ones((8, 4)), tf.zeros((8, 5)), verbose=0, callbacks=[pruning])
    >>> int((model.layers[0].kernel.numpy() == 0).sum())
    16
    """

    def __init__(
        self,
        sparsity=None,
        criterion="magnitude",
        structure="unstructured",
        allocation="uniform",
        frequency=100,
        include=None,
        exclude=None,
    ):
        if frequency < 1 or frequency != int(frequency):
            raise ValueError(f"frequency must be a whole number of steps, 1 or more: {frequency}.")
        super().__init__(include, exclude)
        self.sparsity = sparsity
        self.criterion = criterion
        self.structure = structure
        self.allocation = allocation
        self.frequency = int(frequency)
        self._schedules = _schedules_by_glob(sparsity)
        criteria.get(criterion)
        structures.get(structure)
        allocations.get(allocation)

    def get_config(self):
        """The constructor arguments."""
        names = ("sparsity", "criterion", "structure", "allocation", "frequency")
        arguments = {name: getattr(self, name) for name in (*names, "include", "exclude")}
        return keras.saving.serialize_keras_object(arguments)

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config))

    def on_train_begin(self, logs=None):
        """Attach; warn about a schedule that this training will not reach."""
        super().on_train_begin(logs)
        last_step = self._last_step()
        for schedule in self._schedules.values():
            end = schedule.end_step or schedule.begin_step
            if last_step is not None and end > last_step:
                warnings.warn(
                    f"Training ends at step {last_step}, before {schedule} is through at step "
                    f"{end}: the final sparsity will not be reached. Train longer, or end the "
                    "schedule earlier.",
                    stacklevel=2,
                )

    def _last_step(self):
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        if not epochs or not steps:
            return None
        per_update = getattr(self._optimizer, "gradient_accumulation_steps", None) or 1
        done = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        return done + epochs * steps // per_update

    def _group_weights(self, weights):
        check_globs([glob for glob in self._schedules if glob is not None], weights)
        grouped: dict[str | None, list[str]] = {}
        for path in weights:
            glob = next((g for g in self._schedules if g is None or matches(path, [g])), "")
            if glob == "":
                self.skipped[path] = "no glob in sparsity matches"
            else:
                grouped.setdefault(glob, []).append(path)
                self.applied[path] = (
                    f"{self.criterion}, {self.structure}, {self.allocation}: "
                    f"{self._schedules[glob]}"
                )
        return [(self._schedules[glob], tuple(paths)) for glob, paths in grouped.items()]

    def _is_due(self, group, step):
        return schedules.is_due(group.schedule, step, self.frequency)

    def _choose_masks(self, group, weights, step):
        sparsity = group.schedule(step)
        return choose_masks(weights, sparsity, self.criterion, self.structure, self.allocation)


def _hold(weights, masks):
    for path, weight in weights.items():
        weight.assign(apply_mask(weight, masks[path]))


def _check_finite(weights):
    for path, weight in weights.items():
        if not bool(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(weight)))):
            raise ValueError(
                f"The weight {path!r} holds NaN or infinity when pruning starts; expected finite "
                "values. Load an intact checkpoint, or lower the learning rate that led to this."
            )


def _schedules_by_glob(sparsity) -> dict[str | None, schedules.Schedule]:
    """Glob -> schedule; the glob None stands for every weight."""
    if sparsity is None:
        raise ValueError(
            "sparsity is needed: a fraction of zeros in [0, 1) such as 0.8, a schedule, or "
            "{glob: float or schedule}; got None."
        )
    if isinstance(sparsity, dict):
        if not sparsity:
            raise ValueError("sparsity is an empty dict; expected {glob: float or schedule}.")
        return {
            glob: schedules.check_sparsity(schedules.get(each)) for glob, each in sparsity.items()
        }
    return {None: schedules.check_sparsity(schedules.get(sparsity))}
