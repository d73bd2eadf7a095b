"""How much each unit of a group matters: what is removed first has the lowest score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.graph.groups import Group, Member

_BY_GRADIENTS = ("taylor", "fisher")
_BATCH = 32


def unit_scores(
    flat: keras.Model,
    model: keras.Model,
    groups: Sequence[Group],
    criterion: str | Callable[[Group], np.ndarray],
    data: Any = None,
) -> dict[str, np.ndarray]:
    """Scores of the units of each group.

    Args:
        flat: The model as one graph, of the same variables.
        model: As it was compiled, whose loss counts.
        groups: From `tfcompress.graph.groups`.
        criterion: See `tfcompress.shrink_plan`.
        data: Batches `(x, y)`, for the criteria that read gradients.

    Returns:
        Name of a group -> float64 array of shape (units,), 0 or more.

    Raises:
        ValueError: An unknown criterion, or one without the data or the loss that it reads.
    """
    if callable(criterion):
        return {group.name: _checked(group, criterion(group)) for group in groups}
    if criterion in _BY_GRADIENTS:
        return _by_gradients(flat, model, groups, criterion, data)
    if criterion == "random":
        random = np.random.default_rng(0)
        return {group.name: random.random(group.size) for group in groups}
    if criterion not in _BY_WEIGHTS:
        known = [*_BY_WEIGHTS, "random", *_BY_GRADIENTS]
        raise ValueError(f"criterion must be one of {known} or a function, got {criterion!r}.")
    return {group.name: _BY_WEIGHTS[criterion](group) for group in groups}


def _checked(group, scores):
    scores = np.asarray(scores, "float64")
    if scores.shape != (group.size,) or not np.isfinite(scores).all():
        raise ValueError(
            f"The criterion must return {group.size} finite scores for {group.name!r}, got "
            f"{scores!r}."
        )
    return scores


def _kernels(group: Group) -> list[Member]:
    members = [member for member in group.members if member.variable.trainable]
    return [member for member in members if len(member.variable.shape) > 1] or members


def _summed(member: Member, values: np.ndarray, size: int) -> np.ndarray:
    """The sum over each unit's part of a weight."""
    others = tuple(axis for axis in range(values.ndim) if axis != member.axis)
    along = values.sum(axis=others)
    has = member.places >= 0
    return np.bincount(member.places[has], along[has], size)


def _norms(power: int):
    def score(group: Group) -> np.ndarray:
        total = sum(
            _summed(member, np.abs(_float64(member.variable)) ** power, group.size)
            for member in _kernels(group)
        )
        return total ** (1 / power)

    return score


def _batch_norm(group: Group) -> np.ndarray:
    gammas = [member for member in group.members if member.variable.name == "gamma"]
    if not gammas:
        raise ValueError(
            f"The criterion batch_norm reads the gammas of a batch norm, and {group.name!r} has "
            'none. Leave it out with exclude=, or use "l2".'
        )
    return sum(_summed(each, np.abs(_float64(each.variable)), group.size) for each in gammas)


_BY_WEIGHTS = {"l2": _norms(2), "l1": _norms(1), "batch_norm": _batch_norm}


def _float64(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype("float64")


def _by_gradients(flat, model, groups, criterion, data):
    """Squares of what the loss changes by if a unit goes: `sum(w * g)`, by batch, averaged.

    "fisher" takes each example for a batch.
    """
    if data is None or not getattr(model, "compiled", False):
        raise ValueError(
            f"The criterion {criterion!r} reads gradients of the loss: compile the model, and pass "
            f"data=, batches (x, y). Got data={data!r}, a model that is "
            f"{'' if getattr(model, 'compiled', False) else 'not '}compiled."
        )
    members = {id(m.variable): m.variable for group in groups for m in _kernels(group)}
    variables = list(members.values())

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, flat(x, training=False))
        return tape.gradient(loss, [variable.value for variable in variables])

    scores = {group.name: np.zeros(group.size) for group in groups}
    for x, y in _pairs(data, criterion == "fisher"):
        found = dict(zip(members, map(_dense, gradients(x, y)), strict=True))
        for group in groups:
            change = sum(
                _summed(each, found[id(each.variable)] * _float64(each.variable), group.size)
                for each in _kernels(group)
            )
            scores[group.name] += change**2
    return scores


def _dense(gradient) -> np.ndarray:
    return 0.0 if gradient is None else tf.convert_to_tensor(gradient).numpy().astype("float64")


def _pairs(data, one_by_one: bool):
    """Batches `(x, y)`, or every example of them as a batch of one."""
    if isinstance(data, tuple) and len(data) == 2:
        data = tf.data.Dataset.from_tensor_slices(data).batch(_BATCH)
    for batch in data:
        pair = keras.tree.map_structure(tf.convert_to_tensor, tuple(batch[:2]))
        if not one_by_one:
            yield pair
            continue
        for i in range(keras.tree.flatten(pair)[0].shape[0]):
            yield keras.tree.map_structure(lambda x, i=i: x[i : i + 1], pair)
