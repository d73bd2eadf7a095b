"""Masks that are chosen in the training step, and held after every update."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.callbacks.base import CompressionCallback, logger
from tfcompress.keras_hooks.update import around_update, on_each_replica
from tfcompress.keras_hooks.walk import named_variables
from tfcompress.ops.masks import Units, apply_mask

NEVER = -1


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights whose masks are chosen together, at the steps of one schedule.

    Args:
        schedule: When, and to which sparsity.
        paths: Of the weights.
        units: What is kept or pruned as a whole.
    """

    schedule: schedules.Schedule
    paths: tuple[str, ...]
    units: Units


class MaskingCallback(CompressionCallback):
    """Zeros that are chosen by `_choose_masks` and held in the variables after every update.

    Its variables are one nested dict, `_variables`: `"weights"` and `"masks"` by path,
    `"updated_at"`, the step of each group's last choice, so that a resumed run goes on from it, and
    what a subclass adds. Functions that run in the step get the replica's own copies of it as `on`.
    """

    def __init__(self, include=None, exclude=None):
        self.masks: dict[str, keras.Variable] = {}
        self._groups: list[Group] = []
        self._variables: dict[str, Any] = {}
        super().__init__(include, exclude)

    def _group_weights(self, model, weights) -> list[Group]:
        """The groups of the weights to prune, out of `weights`, path -> variable."""
        raise NotImplementedError

    def _choose_masks(self, group, on, index, step):
        """Boolean masks for the weights of the group of this index, after update number `step`."""
        raise NotImplementedError

    def _is_due(self, group, step):
        """Whether masks are chosen after update number `step`."""
        raise NotImplementedError

    def _chooses_at_start(self) -> bool:
        """Whether masks can be chosen before the first update."""
        return True

    def _prepare(self, model):
        selected = self._select(model)
        self._groups = self._group_weights(model, selected)
        paths = [path for group in self._groups for path in group.paths]
        # By its place in the model: the paths of a model that is made anew may differ.
        self._places = {path: i for i, path in enumerate(named_variables(model))}
        self.masks = {
            path: self._add_weight_state(path, "mask", tf.ones(selected[path].shape, tf.bool))
            for path in paths
        }
        self._variables = {
            "weights": {path: selected[path] for path in paths},
            "masks": self.masks,
            "updated_at": [
                self._add_weight_state(group.paths[0], "updated_at", tf.constant(NEVER, tf.int64))
                for group in self._groups
            ],
        }

    def _add_weight_state(self, path, name, value):
        return self._add_state(f"weight_{self._places[path]}/{name}", value, value.dtype.name)

    def _begin(self, tracing):
        if not tracing:
            _check_finite(self._variables["weights"])
            may_choose = tf.constant(self._chooses_at_start())
            self._run(self._choose_and_hold, self._step(), may_choose)

    def _attach(self, session, optimizer):
        session.defer(around_update(optimizer, self._around_update))

    def _around_update(self, apply):
        self._start()
        before = self._step()
        apply()
        after = self._step()
        # The micro-batches of a gradient accumulation update nothing.
        self._run(self._choose_and_hold, after, after > before)

    def _step(self):
        return tf.cast(tf.convert_to_tensor(self._optimizer.iterations), tf.int64)

    def _choose_and_hold(self, on, step, may_choose):
        for index, group in enumerate(self._groups):
            at = on["updated_at"][index]
            fresh = (at == NEVER) & (step >= group.schedule.begin_step)
            due = self._is_due(group, step) & (at != step)  # A resumed run has chosen already.
            self._choose_if(may_choose & (fresh | due), group, on, index, step)
        self._hold(on)

    def _choose_if(self, condition, group, on, index, step):
        def choose():
            chosen = self._choose_masks(group, on, index, step)
            for path, mask in zip(group.paths, chosen, strict=True):
                on["masks"][path].assign(mask)
            on["updated_at"][index].assign(step)

        tf.cond(condition, _in_one_node(choose), lambda: None)

    def _hold(self, on):
        hold(on)

    def _finish(self):
        self._run(hold)
        for path, mask in self.masks.items():
            zeros = 1 - float(tf.reduce_mean(tf.cast(mask.value, tf.float32)))
            logger.info("%s: %s holds %.4f zeros", type(self).__name__, path, zeros)

    def _run(self, update, *tensors):
        """`update(on, *tensors)` on every replica's own copies of the variables."""

        def on_replica(variables, tensors):
            update(tf.nest.pack_sequence_as(self._variables, variables), *tensors)

        on_each_replica(tf.nest.flatten(self._variables), on_replica, tensors)


def _in_one_node(function):
    """`function`, which counts as one node in the step's graph.

    A branch is inlined into the step. Where it is not taken, its nodes are visited all the same:
    the loops that choose masks, some hundred nodes a weight, cost a small step 2% and more.
    """
    if tf.executing_eagerly():
        return function

    def call():
        tf.function(function, autograph=False, experimental_attributes={"_noinline": True})()

    return call


def hold(on):
    """Set every weight to zero where its mask says so."""
    for path, weight in on["weights"].items():
        weight.assign(apply_mask(weight, on["masks"][path]))


def _check_finite(weights):
    for path, weight in weights.items():
        if not bool(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(weight)))):
            raise ValueError(
                f"The weight {path!r} holds NaN or infinity when pruning starts; expected finite "
                "values. Load an intact checkpoint, or lower the learning rate that led to this."
            )
