"""Pruning of one layer."""

import keras
import tensorflow as tf

from tfcompress import schedules
from tfcompress.checks import check_frequency, check_one_of, check_sparsity, check_threshold
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops import criteria, structures
from tfcompress.ops.masks import apply_mask, choose_masks, threshold_mask

_NEVER = -1


class _HeldZeros(keras.constraints.Constraint):
    """The constraint of one kernel: count the step, choose the mask when due, hold its zeros."""

    def __init__(self, choose, frequency, schedule, state, previous):
        self.choose = choose
        self.frequency = frequency
        self.schedule = schedule
        self.mask, self.step, self.updated_at = state
        self.previous = previous

    def __call__(self, weight):
        weight = tf.convert_to_tensor(weight)
        if self.previous is not None:
            weight = self.previous(weight)
        step = tf.convert_to_tensor(self.step) + 1
        self.step.assign(step)
        return self.prune(weight, step)

    def prune(self, weight, step):
        """`weight` with its zeros, after `step` updates."""
        last = tf.convert_to_tensor(self.updated_at)
        fresh = (last == _NEVER) & (step >= self.schedule.begin_step)
        due = fresh | schedules.is_due(self.schedule, step, self.frequency)
        old = tf.convert_to_tensor(self.mask)
        # Assigned outside of the cond: under tf.distribute an assignment inside would hang.
        mask = tf.cond(due, lambda: self.choose(weight, step), lambda: old)
        self.mask.assign(mask)
        self.updated_at.assign(tf.where(due, step, last))
        return apply_mask(weight, mask)


@keras.saving.register_keras_serializable(package="tfcompress")
class Prune(CompressionWrapper):
    """Prune a layer while it trains, and hold the zeros; no callback is needed.

    The zeros are held through `variable.constraint`, which Keras applies after every optimizer
    update. The masks and the step are the wrapper's own variables, so that a model saved in the
    middle of its schedule goes on from there. A layer that has weights when it is wrapped is pruned
    at once where its schedule has begun; a new one in the first step. Criteria that need gradients
    or other layers, allocation over several layers and regrowth belong to
    `tfcompress.callbacks.Pruning`.

    Args:
        layer: The layer to wrap.
        sparsity: Fraction of zeros in [0, 1) for each kernel, a float or a schedule; None where
            the structure says it (n:m).
        threshold: Instead of a sparsity: the smallest magnitude that is kept, above 0.
        criterion: Scores the weights: "magnitude", "random", or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured", "2:4" (any n:m), "channel", or an
            object such as `tfcompress.structures.Block(4, 4)`.
        frequency: Steps between two choices of the mask. A step is one application of the
            constraint: an optimizer update, or a micro-batch under gradient accumulation.
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: Not exactly one of sparsity and threshold, a value out of range, an unknown
            name; when built: a layer without kernels.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), Prune(keras.layers.Dense(5), sparsity=0.8)])
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(tf.ones((8, 4)), tf.zeros((8, 5)), verbose=0)
    >>> int((model.layers[0].layer.kernel.numpy() == 0).sum())
    16
    """

    def __init__(
        self,
        layer,
        sparsity=None,
        threshold=None,
        criterion="magnitude",
        structure="unstructured",
        frequency=100,
        include=None,
        exclude=None,
        **kwargs,
    ):
        criteria.require(criteria.get(criterion), "layers.Prune", "weights", "index")
        units = structures.get(structure)
        check_one_of(units.sparsity if sparsity is None else sparsity, threshold)
        if threshold is None:
            self._schedule = check_sparsity(sparsity, units)[None]
        else:
            check_threshold(threshold)
            self._schedule = schedules.OneShot(threshold)
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        self.sparsity = sparsity
        self.threshold = threshold
        self.criterion = criterion
        self.structure = structure
        self.frequency = check_frequency(frequency)

    def build_state(self, was_built):
        """Make the masks, and set the constraints that hold them."""
        self._masks = {}
        for kernel in self.kernels().values():
            mask, step, updated_at = state = self._add_state(kernel)
            self._masks[id(kernel)] = mask
            zeros = _HeldZeros(
                self._choose, self.frequency, self._schedule, state, kernel.constraint
            )
            kernel.constraint = zeros
            if was_built:
                kernel.assign(zeros.prune(tf.convert_to_tensor(kernel), tf.constant(0, tf.int64)))

    def bake(self, variable, value):
        """`value` with the zeros of `variable`."""
        mask = self._masks.get(id(variable))
        return value if mask is None else apply_mask(value, tf.convert_to_tensor(mask))

    def get_config(self):
        """The constructor arguments."""
        names = ("sparsity", "threshold", "criterion", "structure", "frequency")
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **keras.saving.serialize_keras_object(arguments)}

    def _choose(self, weight, step):
        if self.threshold is not None:
            return threshold_mask(weight, self.threshold)
        return choose_masks([weight], self._schedule(step), self.criterion, self.structure)[0]

    def _add_state(self, kernel):
        kinds = (("mask", kernel.shape, "ones", "bool"), ("step", (), "zeros", "int64"))
        last = ("updated_at", (), keras.initializers.Constant(_NEVER), "int64")
        return [
            self.add_weight(
                shape=shape,
                initializer=initializer,
                dtype=dtype,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name=f"{kernel.name}_{name}",
            )
            for name, shape, initializer, dtype in (*kinds, last)
        ]
