"""Structures: what is pruned as a unit. They turn scores into masks; 1 keeps, 0 prunes."""

import dataclasses

import tensorflow as tf

from tfcompress.shorthands import resolve

__all__ = ["Unstructured", "get"]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit of its own.

    Example:

    >>> Unstructured().num_units((3, 4))
    12
    """

    def num_units(self, shape) -> int:
        """How many units a weight of `shape` has."""
        return tf.TensorShape(shape).num_elements()

    def pool(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores of weights to scores of units: the same."""
        return scores

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Mask of units to mask of weights: the same."""
        return units


_KNOWN = {"unstructured": Unstructured()}


def get(identifier):
    """The structure with this name, or a structure as it is."""
    if hasattr(identifier, "spread"):
        return identifier
    return resolve("structure", identifier, _KNOWN)
