"""How much each unit of a group matters: what is removed first has the lowest score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import input_batches, num_batches
from tfcompress.graph.groups import Coupling, Group, Member
from tfcompress.keras_hooks import nodes

_BY_GRADIENTS = ("taylor", "fisher")
_BATCH = 32


def unit_scores(
    coupling: Coupling,
    model: keras.Model,
    groups: Sequence[Group],
    criterion: str | Callable[[Group], np.ndarray],
    data: Any = None,
    verbose: int = 0,
    view: Callable[[keras.Model], keras.Model] = lambda model: model,
) -> dict[str, np.ndarray]:
    """Scores of the units of each group.

    Args:
        coupling: Of the flat graph.
        model: As it was compiled, whose loss counts.
        groups: From `tfcompress.graph.groups`, of the coupling.
        criterion: See `tfcompress.shrink_plan`.
        data: Batches `(x, y)`, for the criteria that read gradients or activations.
        verbose: Whether to show progress while data is read.
        view: From the flat graph, or a part of it, to a model of the same inputs, outputs and
            weights that is run in its place.

    Returns:
        Name of a group -> float64 array of shape (units,), 0 or more.

    Raises:
        ValueError: An unknown criterion, or one without the data or the loss that it reads.
    """
    if callable(criterion):
        return {group.name: _checked(group, criterion(group)) for group in groups}
    if criterion in _BY_GRADIENTS:
        return _by_gradients(view(coupling.flat), model, groups, criterion, data, verbose)
    if criterion == "activation":
        return _by_activations(coupling, groups, data, verbose, view)
    if criterion == "random":
        random = np.random.default_rng(0)
        return {group.name: random.random(group.size) for group in groups}
    if criterion not in _BY_WEIGHTS:
        known = [*_BY_WEIGHTS, "random", "activation", *_BY_GRADIENTS]
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


def _by_activations(coupling, groups, data, verbose, view):
    """Mean magnitudes of the units where the next layers read them, over examples and positions."""
    if data is None:
        raise ValueError(
            "The criterion 'activation' reads activations: pass data=, batches of inputs or (x, y)."
        )
    flat = coupling.flat
    places = {group.name: _readings(coupling, group) for group in groups}
    tensors = list({id(x): x for found in places.values() for x, *_ in found}.values())
    index = {id(x): i for i, x in enumerate(tensors)}
    axes = sorted({(index[id(x)], axis) for found in places.values() for x, axis, _ in found})
    probe = view(keras.Model(flat.input, tensors))

    @tf.function(reduce_retracing=True)
    def magnitudes(batch):
        outputs = keras.tree.flatten(probe(batch, training=False))
        outputs = [tf.abs(tf.cast(x, tf.float32)) for x in outputs]
        others = [[i for i in range(len(outputs[x].shape)) if i != axis] for x, axis in axes]
        return [tf.reduce_mean(outputs[x], o) for (x, _), o in zip(axes, others, strict=True)]

    means, examples = [0.0] * len(axes), 0
    bar = keras.utils.Progbar(num_batches(data), unit_name="batch", verbose=verbose)
    for batch in input_batches(data, _BATCH):
        size = len(keras.tree.flatten(batch)[0])
        found = magnitudes(keras.tree.map_structure(tf.convert_to_tensor, batch))
        means = [
            mean + size * x.numpy().astype("float64") for mean, x in zip(means, found, strict=True)
        ]
        examples += size
        bar.add(1)
    if not examples:
        raise ValueError("The data holds no batch; pass at least one.")
    of_axis = dict(zip(axes, means, strict=True))
    return {
        group.name: sum(
            np.bincount(place[place >= 0], of_axis[index[id(x)], axis][place >= 0], group.size)
            / np.maximum(np.bincount(place[place >= 0], minlength=group.size), 1)
            for x, axis, place in places[group.name]
        )
        / (examples * len(places[group.name]))
        for group in groups
    }


def _readings(coupling, group) -> list[tuple[keras.KerasTensor, int, np.ndarray]]:
    """Tensors, axes and the units along them: those that weights read, or else all there are."""
    readers = {id(member.variable) for member in group.members if not member.makes}
    calls = nodes.calls(coupling.flat)
    read = [
        x
        for call in calls
        if isinstance(call.operation, keras.layers.Layer)
        and any(id(w) in readers and len(w.shape) > 1 for w in call.operation.weights)
        for x in call.inputs
    ]
    for tensors in (read, [x for call in calls for x in call.outputs]):
        found = [
            (x, axis, dim.places(group.dim))
            for x in {id(x): x for x in tensors}.values()
            for axis, dim in enumerate(coupling.flows[id(x)].axes)
            if dim is not None and group.dim.root in dim.leaves()
        ]
        if found:
            return found
    raise ValueError(f"No tensor has the units of {group.name!r}; leave it out with exclude=.")


def _by_gradients(flat, model, groups, criterion, data, verbose):
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
    number = None if criterion == "fisher" else num_batches(data)
    bar = keras.utils.Progbar(number, unit_name="batch", verbose=verbose)
    for x, y in _pairs(data, criterion == "fisher"):
        found = dict(zip(members, map(_dense, gradients(x, y)), strict=True))
        for group in groups:
            change = sum(
                _summed(each, found[id(each.variable)] * _float64(each.variable), group.size)
                for each in _kernels(group)
            )
            scores[group.name] += change**2
        bar.add(1)
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
