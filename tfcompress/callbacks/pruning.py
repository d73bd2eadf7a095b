"""Pruning while training: criterion x structure x allocation x schedule x regrowth."""

import warnings

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.callbacks.base import logger
from tfcompress.callbacks.masking import NEVER, Group, MaskingCallback
from tfcompress.checks import check_frequency, check_sparsity
from tfcompress.graph.roles import check_coupled, prunable, select
from tfcompress.keras_hooks.overlay import Overlay, attach, readers
from tfcompress.keras_hooks.update import around_gradients, variable_key
from tfcompress.keras_hooks.walk import group_by_glob
from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures
from tfcompress.ops import regrowth as regrowths
from tfcompress.ops.masks import Units, apply_mask, apply_mask_straight_through

# Below every magnitude that training leaves behind, and its square is still a float32.
_TINY = 1e-18


@keras.saving.register_keras_serializable(package="tfcompress")
class Pruning(MaskingCallback):
    """Prune to a sparsity, at once or on a schedule, and hold the zeros while training goes on.

    At the steps of the schedule the criterion scores every weight, the structure says what is kept
    together, the allocation how many units each weight may keep. The zeros are held in the
    variables after each optimizer update, so that they are there whenever the model is looked at;
    with the criterion "movement" they are in the forward pass until training ends. Gradual
    magnitude pruning ([Zhu & Gupta 2017](https://arxiv.org/abs/1710.01878)) is the default
    criterion with `tfcompress.schedules.PolynomialDecay`.

    Of n units exactly `max(round(n * (1 - sparsity)), 1)` are kept, ties broken by index. A step is
    an optimizer update. Whatever weights are in the model when training ends (the best epoch's, a
    moving average) get the zeros of the last step.

    Args:
        sparsity: Fraction of zeros in [0, 1): a float, a schedule, or {glob: float or schedule};
            the first glob that matches a path counts, other weights are left alone. None where the
            structure says it (n:m) or the criterion (soft movement).
        criterion: Scores the weights: "magnitude", "random", "gradient", "fisher", "movement",
            "batch_norm", an object of `tfcompress.criteria`, or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured", "2:4" (any n:m), "channel", "head", or
            an object of `tfcompress.structures`, such as `Block(4, 4)`, or
            `Channel(groups=tfcompress.channel_groups(model))` for the channels, neurons and heads
            that `tfcompress.shrink_plan(model, zeros=True)` then removes.
        allocation: How the sparsity is shared out: "uniform" (each weight), "global" (all weights
            of one schedule together), "erk", "lamp", or a function.
        frequency: Steps between two choices of the masks; a schedule's last step always is one.
        regrowth: None, "set", "rigl" or an object of `tfcompress.regrowth`: from the second choice
            on, units are exchanged by magnitude, in place of a choice by the criterion.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Attributes:
        applied: Path -> what was done to it.
        skipped: Path -> why nothing was.
        masks: Path -> boolean variable of the weight's shape; True keeps.

    Raises:
        ValueError: A sparsity outside [0, 1), an unknown name, parts that exclude each other; when
            training starts: a glob that matches nothing, a model without kernels, or weights that
            are not finite.

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
        regrowth=None,
        include=None,
        exclude=None,
    ):
        super().__init__(include, exclude)
        self.sparsity = sparsity
        self.criterion = criterion
        self.structure = structure
        self.allocation = allocation
        self.frequency = check_frequency(frequency)
        self.regrowth = regrowth
        self._criterion = criteria.get(criterion)
        self._structure = structures.get(structure)
        self._allocation = allocations.get(allocation)
        self._regrowth = regrowths.get(regrowth)
        self._schedules = self._check()

    def get_config(self):
        """The constructor arguments."""
        names = ("sparsity", "criterion", "structure", "allocation", "frequency", "regrowth")
        arguments = {name: getattr(self, name) for name in (*names, "include", "exclude")}
        return keras.saving.serialize_keras_object(arguments)

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config))

    # What excludes what.

    def _check(self) -> dict[str | None, schedules.Schedule]:
        """The schedules by glob, once the parts are known to go together."""
        available = ("weights", "index", "gradients", "batch_norm")
        criteria.require(self._criterion, "callbacks.Pruning", *available)
        if self._reads("batch_norm") and not isinstance(self._structure, structures.Channel):
            raise ValueError(
                f"The criterion batch_norm scores whole channels, got structure={self.structure!r}."
                ' Pass structure="channel".'
            )
        check_coupled(
            self._structure,
            sparsity=self.sparsity,
            criterion="batch_norm" if self._reads("batch_norm") else None,
            regrowth=self.regrowth,
            include=self.include,
            exclude=self.exclude,
        )
        if self._structure.choose and self._allocation is not allocations.uniform:
            raise ValueError(
                f"{self.structure!r} keeps the same share in each group, so allocation="
                f"{self.allocation!r} has no say. Leave allocation out."
            )
        if self._regrowth is not None and (self._structure.choose or self._is_latent):
            raise ValueError(
                f"regrowth={self.regrowth!r} exchanges units freely, which structure="
                f"{self.structure!r} with criterion={self.criterion!r} does not allow: n:m fixes "
                "their number in each group, and movement brings units back by itself."
            )
        if not self._is_soft:
            return check_sparsity(self.sparsity, self._structure)
        if self.sparsity is not None:
            raise ValueError(
                f"Soft movement decides the sparsity by its threshold and strength, got sparsity="
                f"{self.sparsity}. Leave sparsity out, or the criterion's threshold."
            )
        return {None: schedules.Constant(0.0)}

    def _reads(self, what) -> bool:
        return criteria.reads(self._criterion) == what

    @property
    def _is_latent(self) -> bool:
        return getattr(self._criterion, "is_latent", False)

    @property
    def _is_soft(self) -> bool:
        return getattr(self._criterion, "threshold", None) is not None

    # Before the first step.

    def _select(self, model):
        selected, self.skipped = select(model, self._structure, self.include, self.exclude)
        logger.info("Pruning skips %s", self.skipped)
        return selected

    def _group_weights(self, model, weights):
        fitting = prunable(model, weights, self._structure, self._criterion)
        self._scales = fitting.scales
        grouped = group_by_glob(self._schedules, fitting.weights)
        self.applied = {
            path: self._description(self._schedules[glob])
            for glob, paths in grouped.items()
            for path in paths
        }
        left = {path for path in fitting.weights if path not in self.applied}
        self.skipped |= fitting.skipped | dict.fromkeys(left, "no glob in sparsity matches")
        return [
            self._group(self._schedules[glob], {path: weights[path].shape for path in paths})
            for glob, paths in grouped.items()
        ]

    def _group(self, schedule, shapes):
        units, _ = Units.cut(self._structure, shapes)
        return Group(schedule, tuple(shapes), units)

    def _description(self, schedule) -> str:
        parts = [self.criterion, self.structure, self.allocation]
        if self.regrowth is not None:
            parts.append(self.regrowth)
        return f"{', '.join(map(str, parts))}: {schedule}"

    def _prepare(self, model):
        super()._prepare(model)
        weights = self._variables["weights"]

        def zeros(name):
            return {
                path: self._add_weight_state(path, name, tf.zeros(weight.shape))
                for path, weight in weights.items()
            }

        if self._reads("gradients"):
            self._variables["statistics"] = zeros("statistic")
        if self._reads("batch_norm"):
            self._variables["scales"] = {path: self._scales[path] for path in weights}
        if self._regrowth is not None:
            if self._regrowth.reads == "gradients":
                self._variables["growth"] = zeros("growth")
            self._regrowth_end = self._add_weight_state(
                next(iter(weights)), "regrowth_end", tf.constant(NEVER, tf.int64)
            )
        self._group_of = {path: group for group in self._groups for path in group.paths}

    def _begin(self, tracing):
        self._path_of = {
            variable_key(self._optimizer, weight): path
            for path, weight in self._variables["weights"].items()
        }
        if self._regrowth is not None:
            self._settle_regrowth_end()
        super()._begin(tracing)

    def _settle_regrowth_end(self):
        """Fix the last step of the regrowth, once: a resumed run finds it in its state."""
        if int(keras.ops.convert_to_numpy(self._regrowth_end)) != NEVER:
            return
        end, last_step = self._regrowth.end_step, self._last_step()
        if end is None and last_step is None:
            raise ValueError(
                f"regrowth={self.regrowth!r} ends after three quarters of the training, whose "
                "length is not known here. Say when: tfcompress.regrowth."
                f"{type(self._regrowth).__name__}(end_step=...)."
            )
        self._regrowth_end.assign(end if end is not None else last_step * 3 // 4)

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
        params = self.params or {}
        epochs, steps = params.get("epochs"), params.get("steps")
        if not epochs or not steps:
            return None
        per_update = getattr(self._optimizer, "gradient_accumulation_steps", None) or 1
        done = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        return done + epochs * steps // per_update

    # In the step: gradients are observed, masks are chosen, zeros are held.

    def _attach(self, session, optimizer):
        super()._attach(session, optimizer)
        if self._observes:
            session.defer(around_gradients(optimizer, self._around_gradient))
        if self._is_latent:
            self._attach_masks(session)

    @property
    def _observes(self) -> bool:
        rigged = self._regrowth is not None and self._regrowth.reads == "gradients"
        return rigged or self._reads("gradients")

    def _attach_masks(self, session):
        if not self._started:
            raise ValueError(
                f"The criterion {self.criterion!r} masks what layers compute with, and the model "
                f"{self.model.name!r} is not built. Give it a keras.Input, or call it once first."
            )
        paths = {id(weight): path for path, weight in self._variables["weights"].items()}
        weights = list(self._variables["weights"].values())
        for layer, read in readers(self.model, weights):
            pairs = [(variable, self._masked(paths[id(variable)])) for variable in read]
            session.defer(attach(layer, Overlay(weights=pairs)))

    def _masked(self, path):
        mask = self.masks[path]
        return lambda weight: apply_mask_straight_through(weight, tf.convert_to_tensor(mask))

    def _around_gradient(self, key, gradient, variable):
        path = self._path_of.get(key)
        if path is None:
            return gradient
        dense = tf.convert_to_tensor(gradient)
        self._observe(path, tf.cast(variable, tf.float32), tf.cast(dense, tf.float32))
        return self._visible(path, dense) if self._is_latent else gradient

    def _visible(self, path, gradient):
        """The gradient without what reached pruned weights, for the scores only."""
        return apply_mask(gradient, tf.convert_to_tensor(self.masks[path].value))

    def _observe(self, path, weight, gradient):
        group, step = self._group_of[path], self._step() + 1
        if "statistics" in self._variables:
            statistic = self._variables["statistics"][path].value
            self._observe_if(self._is_observed(group.schedule, step), statistic, weight, gradient)
        if "growth" in self._variables:
            # At every step: the variable takes the tensor over, which costs less than to ask.
            self._variables["growth"][path].value.assign(gradient)

    def _observe_if(self, condition, statistic, weight, gradient):
        def observe():
            before = tf.convert_to_tensor(statistic)
            statistic.assign_add(self._criterion.observe(weight, gradient, before))

        tf.cond(condition, observe, lambda: None)

    def _is_observed(self, schedule, step):
        """To the last choice: from one interval before the first, or always if never forgotten."""
        begun = (step > schedule.begin_step - self.frequency) | (not self._criterion.forgets)
        return begun if schedule.end_step is None else begun & (step <= schedule.end_step)

    def _is_exchanged(self, schedule, step):
        on_grid = (step > schedule.begin_step) & (
            (step - schedule.begin_step) % self.frequency == 0
        )
        return on_grid & (step <= tf.convert_to_tensor(self._regrowth_end))

    def _is_due(self, group, step):
        due = schedules.is_due(group.schedule, step, self.frequency)
        if self._regrowth is None:
            return due
        return due | self._is_exchanged(group.schedule, step)

    def _chooses_at_start(self):
        return not self._reads("gradients")  # Nothing was observed yet.

    def _choose_masks(self, group, on, index, step):
        if self._regrowth is None:
            return self._by_criterion(group, on, step)
        return tf.cond(
            on["updated_at"][index] == NEVER,
            lambda: self._by_criterion(group, on, step),
            lambda: self._by_regrowth(group, on, step),
        )

    def _by_criterion(self, group, on, step):
        weights = [on["weights"][path] for path in group.paths]
        statistics = self._statistics(group, on)
        if self._reads("gradients") and self._criterion.forgets:
            for path in group.paths:
                on["statistics"][path].assign(tf.zeros_like(on["statistics"][path]))
        if self._is_soft:
            kept = [self._criterion.keep(each) for each in group.units.pool(statistics)]
            return group.units.spread(kept)
        sparsity = group.schedule(step)
        return group.units.masks(weights, self._criterion, statistics, sparsity, self._allocation)

    def _statistics(self, group, on):
        kinds = {"gradients": on.get("statistics"), "batch_norm": on.get("scales")}
        read = kinds.get(criteria.reads(self._criterion), self._places)
        # As tensors: a variable is reset before its scores are used.
        return [tf.convert_to_tensor(read[path]) for path in group.paths]

    def _by_regrowth(self, group, on, step):
        masks = [on["masks"][path] for path in group.paths]
        sizes = [tf.abs(tf.cast(on["weights"][path], tf.float32)) for path in group.paths]
        read = on.get("growth", self._places)
        shapes = [mask.shape for mask in masks]
        growth = [
            self._regrowth.scores(shape, read[path], step)
            for path, shape in zip(group.paths, shapes, strict=True)
        ]
        units = group.units
        kept = [each > 0.5 for each in units.pool([tf.cast(mask, tf.float32) for mask in masks])]
        magnitudes = [
            tf.where(mask, tf.maximum(tf.cast(size, tf.float32), _TINY), 0.0)
            for mask, size in zip(kept, units.pool(sizes), strict=True)
        ]
        if group.schedule.end_step is not None:  # The sparsity may have risen meanwhile.
            kept = units.allocate(magnitudes, group.schedule(step), self._allocation)
        end = tf.convert_to_tensor(self._regrowth_end)
        share = tf.where(step <= end, self._regrowth.share(step, end), 0.0)
        return units.spread(regrowths.regrow(kept, magnitudes, units.pool(growth), share))

    def _hold(self, on):
        if not self._is_latent:
            super()._hold(on)
