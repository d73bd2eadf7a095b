"""Masks: scores, structure and allocation put together. True keeps, False prunes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import tensorflow as tf

from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures

__all__ = [
    "Units",
    "apply_mask",
    "apply_mask_straight_through",
    "choose_masks",
    "threshold_mask",
]

# These read the weights themselves, without a copy of their magnitudes.
_OF_MAGNITUDES = (allocations.uniform, allocations.global_)


@dataclasses.dataclass(frozen=True)
class Member:
    """One division of a weight into units.

    Args:
        weight: Index of the weight.
        structure: How it is divided.
    """

    weight: int
    structure: structures.Structure


@dataclasses.dataclass(frozen=True)
class Units:
    """How weights are cut into the units that are pruned as a whole; known before any value is.

    Args:
        shapes: Of each weight.
        groups: Divisions of weights that share the mask of their units. A weight that is in several
            groups is kept where all of them keep it.
    """

    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[Member, ...], ...]

    @classmethod
    def cut(cls, structure, shapes: Mapping[str, Sequence[int]]) -> tuple["Units", dict[str, str]]:
        """The units of the weights of these paths and shapes that can be cut at all.

        Args:
            structure: A structure or its name.
            shapes: Path -> shape.

        Returns:
            The units, of the weights in order, and path -> reason for those left out.
        """
        structure = structures.get(structure)
        parts = {path: structure.parts(path, tuple(shape)) for path, shape in shapes.items()}
        skipped = {path: each for path, each in parts.items() if isinstance(each, str)}
        kept = [path for path in parts if path not in skipped]
        members: dict[tuple, list[Member]] = {}
        for i, path in enumerate(kept):
            for own, group in parts[path]:
                key = group, own.num_units(shapes[path])
                members.setdefault(key, []).append(Member(i, own))
        units = cls(
            tuple(tuple(shapes[path]) for path in kept), tuple(map(tuple, members.values()))
        )
        return units, skipped

    @functools.cached_property
    def scored(self) -> tuple[tuple[Member, ...], ...]:
        """The members of each group whose scores count: its kernels; vectors where it has none."""
        return tuple(
            tuple(each for each in members if len(self.shapes[each.weight]) > 1) or members
            for members in self.groups
        )

    def masks(self, weights, criterion, statistics, sparsity, allocation) -> list[tf.Tensor]:
        """Masks of the weights, from a criterion.

        Args:
            weights: Floating tensors or variables.
            criterion: From `criteria.get`.
            statistics: What it reads, for each weight.
            sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.
            allocation: From `allocation.get`.
        """
        each = [member.structure for members in self.groups for member in members]
        single = all(isinstance(structure, structures.Unstructured) for structure in each)
        if single and criterion is criteria.magnitude and allocation in _OF_MAGNITUDES:
            return allocation([tf.convert_to_tensor(w) for w in weights], sparsity, absolute=True)
        counted = {member.weight for members in self.scored for member in members}
        scores = [
            criteria.score(criterion, tf.convert_to_tensor(weights[i]), statistics[i])
            if i in counted
            else None
            for i in range(len(self.shapes))
        ]
        return self.choose(scores, sparsity, allocation)

    def choose(self, scores: Sequence[tf.Tensor | None], sparsity, allocation) -> list[tf.Tensor]:
        """Masks of the weights.

        Args:
            scores: Of each weight, of its shape; None for those that are not `scored`.
            sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.
            allocation: From `allocation.get`.
        """
        if any(members[0].structure.choose for members in self.groups):
            own = (members[0].structure for members in self.groups)
            return [each.choose(x, sparsity) for each, x in zip(own, scores, strict=True)]
        return self.spread(self.allocate(self.pool(scores), sparsity, allocation))

    def allocate(self, scores: Sequence[tf.Tensor], sparsity, allocation) -> list[tf.Tensor]:
        """Masks of each group's units, from their scores."""
        shapes = [self.shapes[members[0].weight] for members in self.scored]
        return allocation(scores, sparsity, shapes)

    def pool(self, scores: Sequence[tf.Tensor | None]) -> list[tf.Tensor]:
        """Scores of each group's units; those of several weights are averaged by size."""
        return [self._pool(members, scores) for members in self.scored]

    def _pool(self, members, scores):
        if len(members) == 1:
            return members[0].structure.pool(scores[members[0].weight])
        pooled = [each.structure.pool(tf.cast(scores[each.weight], tf.float32)) for each in members]
        sizes = [each.structure.num_weights(self.shapes[each.weight]) for each in members]
        return tf.add_n([size * each for size, each in zip(sizes, pooled, strict=True)]) / sum(
            sizes
        )

    def spread(self, units: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Masks of each group's units to masks of the weights."""
        masks: dict[int, tf.Tensor] = {}
        for members, mask in zip(self.groups, units, strict=True):
            for i, structure in ((each.weight, each.structure) for each in members):
                own = structure.spread(mask, self.shapes[i])
                masks[i] = tf.logical_and(masks[i], own) if i in masks else own
        return [masks[i] for i in range(len(self.shapes))]


def choose_masks(
    weights: Sequence[tf.Tensor],
    sparsity,
    criterion="magnitude",
    structure="unstructured",
    allocation="uniform",
) -> list[tf.Tensor]:
    """Masks that prune `weights` to `sparsity`, by a criterion that reads nothing else.

    Args:
        weights: Floating tensors or `tf.Variable`s, none of size 0.
        sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.
        criterion: Scores the weights, e.g. "magnitude".
        structure: What is kept together, e.g. "unstructured".
        allocation: How the sparsity is shared out, e.g. "uniform".

    Returns:
        A boolean tensor for each weight, of its shape.

    Raises:
        ValueError: An unknown name, a criterion that reads more than weights, or a weight that
            cannot be cut into such units.

    Example:

    >>> choose_masks([tf.constant([1.0, -3.0, 2.0, 0.5])], 0.5)[0].numpy().tolist()
    [False, True, True, False]
    """
    criterion = criteria.get(criterion)
    criteria.require(criterion, "choose_masks", "weights", "index")
    units, skipped = Units.cut(structure, {str(i): each.shape for i, each in enumerate(weights)})
    if skipped:
        raise ValueError(f"Weights, by index, that {structure!r} cannot prune: {skipped}.")
    allocation = allocations.get(allocation)
    return units.masks(weights, criterion, range(len(weights)), sparsity, allocation)


def apply_mask(weight: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """`weight` where `mask` is True, 0 elsewhere; NaN and infinity are pruned like any value.

    Args:
        weight: Floating tensor.
        mask: Boolean tensor of the same shape.

    Returns:
        Tensor of the shape and dtype of `weight`.

    Example:

    >>> apply_mask(tf.constant([1.0, float("nan")]), tf.constant([True, False])).numpy().tolist()
    [1.0, 0.0]
    """
    # A fifth faster on CPUs than `tf.where`.
    return tf.math.multiply_no_nan(weight, tf.cast(mask, weight.dtype))


def threshold_mask(weight: tf.Tensor, threshold: float) -> tf.Tensor:
    """True where `|weight| >= threshold`.

    Example:

    >>> threshold_mask(tf.constant([0.05, -0.2]), 0.1).numpy().tolist()
    [False, True]
    """
    return tf.abs(weight) >= tf.cast(threshold, weight.dtype)


@tf.custom_gradient
def apply_mask_straight_through(weight: tf.Tensor, mask: tf.Tensor):
    """`apply_mask`, whose gradient reaches the pruned weights as if they were there.

    Example:

    >>> weight = tf.constant([3.0, 4.0])
    >>> with tf.GradientTape() as tape:
    ...     tape.watch(weight)
    ...     masked = apply_mask_straight_through(weight, tf.constant([True, False]))
    >>> masked.numpy().tolist(), tape.gradient(masked, weight).numpy().tolist()
    ([3.0, 0.0], [1.0, 1.0])
    """
    return apply_mask(weight, mask), lambda gradient: (gradient, None)
