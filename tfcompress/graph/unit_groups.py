"""Groups of units as other modules ask for them: chosen by globs, as data, and those of zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np

from tfcompress.graph.expand import expand
from tfcompress.graph.groups import Coupling, Group, Member, groups
from tfcompress.keras_hooks.walk import as_globs, is_wanted, matches, named_variables

_STATISTICS = ("moving_mean", "moving_variance")


def wanted_groups(model: keras.Model, coupling: Coupling, include, exclude) -> list[Group]:
    """The groups of a model that globs choose.

    Args:
        model: For the messages.
        coupling: Of the model.
        include: Glob or globs over the names of groups and the paths of the weights that make their
            units; None for all.
        exclude: Glob or globs to leave out.

    Raises:
        ValueError: A glob that matches nothing, or no group at all.
    """
    found, include, exclude = groups(coupling), as_globs(include), as_globs(exclude)
    for key, globs in (("include", include), ("exclude", exclude)):
        check_globs(key, globs or (), found)
    wanted = [
        group
        for group in found
        if any(is_wanted(name, include) for name in names_of(group))
        and not (exclude and any(matches(name, exclude) for name in names_of(group)))
    ]
    if not wanted:
        raise ValueError(
            f"No channels, neurons or heads of {model.name!r} can be removed: all are inputs or "
            "outputs, run through layers that tfcompress does not know, or are left out."
        )
    return wanted


def check_globs(key: str, globs: Sequence[str], found: Sequence[Group]) -> None:
    """Raise a ValueError that names the groups, if a glob matches none of them."""
    for glob in globs:
        if not any(matches(name, [glob]) for group in found for name in names_of(group)):
            names = [group.name for group in found]
            raise ValueError(f"{key}: {glob!r} matches no group; there are {names}.")


def names_of(group: Group) -> list[str]:
    """What globs are compared with: its name, and the weights that make its units."""
    return [group.name, *(member.variable.path for member in group.members if member.makes)]


def channel_groups(model: keras.Model, include=None, exclude=None) -> dict[str, list[dict]]:
    """Which weights go together when channels, neurons or heads are removed, as plain data.

    For `tfcompress.callbacks.Pruning(structure=tfcompress.structures.Channel(groups=...))`, which
    makes zero, in all of these weights, what `tfcompress.shrink_plan(model, zeros=True)` then
    removes without changing any output. Three kinds of groups are left out, since zeros do not
    stand for removed units there: those over which a layer norm averages (the hidden width of a
    transformer), those with a frozen weight, and those that `tfcompress.shrink` cannot remove.

    Args:
        model: Any built model; see `tfcompress.expand`.
        include: Glob or globs over the names of groups and the paths of the weights that make their
            units, as in `tfcompress.shrink_plan`; None for all.
        exclude: Glob or globs to leave out.

    Returns:
        Path of a weight -> its axes with units: `{"axis": int, "group": name, "places": [for each
        element along the axis the unit it belongs to, or -1]}`. It goes into JSON as it is.

    Raises:
        ValueError: A glob that matches nothing, or a model without such groups.

    Example:

    >>> layers = [keras.layers.Dense(2, name="wide"), keras.layers.Dense(1, name="head")]
    >>> model = keras.Sequential([keras.Input((4,)), *layers], name="m")
    >>> for path, axes in channel_groups(model).items():
    ...     print(path, axes)
    m/wide/kernel [{'axis': 1, 'group': 'm/wide/kernel:1', 'places': [0, 1]}]
    m/wide/bias [{'axis': 0, 'group': 'm/wide/kernel:1', 'places': [0, 1]}]
    m/head/kernel [{'axis': 0, 'group': 'm/wide/kernel:1', 'places': [0, 1]}]

    Reference: Fang et al. 2023, https://arxiv.org/abs/2301.12900.
    """
    coupling = Coupling(expand(model))
    paths = {id(variable): path for path, variable in named_variables(model).items()}
    found: dict[str, list[dict]] = {}
    for group, members in _zeroable(coupling, wanted_groups(model, coupling, include, exclude)):
        for member in members:
            axis = {
                "axis": member.axis,
                "group": group.name,
                "places": member.places.tolist(),
            }
            found.setdefault(paths[id(member.variable)], []).append(axis)
    if not found:
        raise ValueError(
            f"No group of {model.name!r} can be trained to zero: a layer norm averages over each, "
            "or a weight of it is frozen. Set layer.trainable, or shrink it by a criterion."
        )
    return found


def zero_units(coupling: Coupling, found: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Which units can be removed without changing any output: all that they consist of is zero.

    Args:
        coupling: Of the model.
        found: Groups of it.

    Returns:
        Name of a group -> its units, in order. One of each group stays.
    """
    removed = {}
    for group, members in _zeroable(coupling, found):
        alive = np.zeros(group.size, bool)
        for member in members:
            value = np.moveaxis(keras.ops.convert_to_numpy(member.variable), member.axis, 0)
            used = (value.reshape(len(value), -1) != 0).any(axis=1)
            alive[member.places[used & (member.places >= 0)]] = True
        if not alive.any():
            alive[0] = True
        if not alive.all():
            removed[group.name] = tuple(map(int, np.flatnonzero(~alive)))
    return removed


def _zeroable(coupling: Coupling, found: Sequence[Group]) -> Iterator[tuple[Group, list[Member]]]:
    """The groups whose units are as good as removed once some of their members are zero."""
    averaged = {leaf for _, dim in coupling.statistics for leaf in dim.leaves()}
    for group in found:
        by_path = {member.variable.path: member.variable for member in group.members}
        members = [m for m in group.members if m.variable.trainable or _shifts(m, by_path)]
        left = {id(m.variable) for m in group.members} - {id(m.variable) for m in members}
        frozen = any(id(v) in left and v.name not in _STATISTICS for v in by_path.values())
        if group.dim not in averaged and not frozen:
            yield group, members


def _shifts(member: Member, by_path: Mapping[str, keras.Variable]) -> bool:
    """Whether it is a mean that a batch norm subtracts with no gamma behind it to hide that."""
    layer = member.variable.path.rsplit("/", 1)[0]
    return member.variable.name == "moving_mean" and f"{layer}/gamma" not in by_path
