"""Physical removal: a smaller dense model, without the channels, neurons and heads left out."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tfcompress.graph import groups as coupled
from tfcompress.graph.dims import Dim
from tfcompress.graph.expand import expand
from tfcompress.graph.macs import macs, zero_example
from tfcompress.graph.rebuild import finalize, replay
from tfcompress.graph.unit_scores import unit_scores
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.walk import is_wanted, matches

_log = logging.getLogger("tfcompress")
_PROBES = 12
_FIX_SHAPES = "Fix them: tfcompress.expand(model, inputs=batch)."


def shrink(model: keras.Model, ratio=None, **arguments) -> keras.Model:
    """Remove channels, neurons and attention heads: `shrink_plan` and `Plan.apply`.

    Args:
        model: Any built model; see `tfcompress.expand`. It is not touched.
        ratio: See `shrink_plan`, as all other arguments.
        **arguments: See `shrink_plan`.

    Returns:
        A new flat Functional model of plain Keras layers, with weights of its own.

    Raises:
        ValueError: See `shrink_plan`.

    Example:

    >>> layers = [keras.layers.Dense(32, activation="relu"), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> [tuple(weight.shape) for weight in shrink(model, ratio=0.5).weights]
    [(4, 16), (16,), (16, 2), (2,)]
    """
    return shrink_plan(model, ratio, **arguments).apply(model)


def shrink_plan(
    model: keras.Model,
    ratio: float | Mapping[str, float] | None = None,
    target_macs: int | None = None,
    target_parameters: int | None = None,
    target_cost: float | None = None,
    cost: Callable[[keras.Model], float] | None = None,
    criterion="l2",
    allocation: str = "uniform",
    data: Any = None,
    round_to: int = 8,
    include=None,
    exclude=None,
) -> Plan:
    """Which channels, neurons and heads to remove from a model.

    Coupled axes (`tfcompress.graph.groups`) are groups; their units go together. Units with the
    lowest scores are removed, and at least one of each group stays. Exactly one of `ratio` and the
    targets says how many. To go on step by step, shrink a little, fine-tune, and shrink again.

    Args:
        model: Any built model; see `tfcompress.expand`.
        ratio: Share removed of each group, in (0, 1); or `{glob: ratio}` over the names of groups
            and the paths of the weights that make their units; the first match counts. With
            `allocation="global"` the share of all units.
        target_macs: The largest number of multiply-accumulates of one example.
        target_parameters: The largest number of parameters.
        target_cost: The largest value of `cost`.
        cost: Called with smaller models, e.g. one that measures their latency.
        criterion: `"l2"`, `"l1"`, `"batch_norm"` (the gammas), `"random"`, `"taylor"`, `"fisher"`
            (both need `data` and a compiled model), or `group -> scores` of shape (units,).
        allocation: `"uniform"`, the same share of each group, or `"global"`, the lowest scores of
            all groups, each relative to its mean.
        data: Batches `(x, y)`, e.g. a `tf.data.Dataset`, for the criteria that read gradients.
        round_to: Channels are kept in multiples of this, those of groups larger than it.
        include: Glob or globs as in `ratio`, None for all groups.
        exclude: Glob or globs to leave out.

    Returns:
        The plan.

    Raises:
        ValueError: Arguments that are out of range or contradict each other, a glob that matches
            nothing, a target that is out of reach, or a model without groups.

    Example:

    >>> layers = [keras.layers.Dense(16, activation="relu", name="wide"), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((4,)), *layers], name="model")
    >>> plan = shrink_plan(model, {"*wide*": 0.5})
    >>> {name: len(units) for name, units in plan.removed.items()}
    {'model/wide/kernel:1': 8}

    References: Li et al. 2017, https://arxiv.org/abs/1608.08710 (norms); Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771 (Taylor); Fang et al. 2023, https://arxiv.org/abs/2301.12900
    (groups); Liu et al. 2017, https://arxiv.org/abs/1708.06519 (batch norm).
    """
    targets = {"ratio": ratio, "macs": target_macs, "parameters": target_parameters}
    targets["cost"] = target_cost
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1 or (cost is None) != (target_cost is None):
        raise ValueError(
            "shrink needs exactly one of ratio, target_macs, target_parameters, and target_cost "
            f"with cost; got {given or 'none'}, cost={cost!r}. E.g. ratio=0.5."
        )
    if allocation not in ("uniform", "global"):
        raise ValueError(f'allocation must be "uniform" or "global", got {allocation!r}.')
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be a whole number, 1 or more, got {round_to!r}.")
    flat = expand(model)
    found = _wanted(model, coupled.groups(coupled.Coupling(flat)), include, exclude)
    scores = unit_scores(flat, model, found, criterion, data)
    chooser = _Chooser(found, scores, round_to, allocation)
    if ratio is not None:
        return chooser.plan(_ratios(found, ratio, allocation))
    measure = {
        "macs": lambda small: macs(small, zero_example(small, _FIX_SHAPES)),
        "parameters": lambda small: small.count_params(),
        "cost": cost,
    }
    name, target = next(iter(given.items()))
    return _within(model, chooser, measure[name], target, name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to remove from a model; the same for every model of the same architecture.

    Args:
        removed: Name of a group -> the units to remove, in order.
        sizes: Name of a group -> how many units it has.
    """

    removed: dict[str, tuple[int, ...]]
    sizes: dict[str, int]

    def apply(self, model: keras.Model) -> keras.Model:
        """A smaller model without the units.

        Args:
            model: Of the architecture that the plan was made for. It is not touched.

        Returns:
            A new flat Functional model of plain Keras layers, with weights of its own.

        Raises:
            ValueError: The model has other groups.
        """
        flat = expand(model)
        coupling = coupled.Coupling(flat)
        return _Smaller(coupling, self._kept(model, coupling)).rebuild(flat)

    def mask(self, model: keras.Model) -> keras.Model:
        """Set the units to zero, in place.

        Args:
            model: Of the architecture that the plan was made for.

        Returns:
            `model`; where a norm takes averages over removed channels, a flat model of the same
            variables, in which it takes them over the others. Its outputs are those of `apply`.

        Raises:
            ValueError: The model has other groups.
        """
        flat = expand(model)
        coupling = coupled.Coupling(flat)
        kept = self._kept(model, coupling)
        for variable, dims in coupling.weights.values():
            keeps = [dim.keep(kept) for dim in dims]
            if not all(keep.all() for keep in keeps):
                value = keras.ops.convert_to_numpy(variable).copy()
                for axis, keep in enumerate(keeps):
                    value[(slice(None),) * axis + (~keep,)] = 0
                variable.assign(value)
        averaged = {
            id(call.outputs[0]): dim.keep(kept)
            for call, dim in coupling.statistics
            if not dim.keep(kept).all()
        }
        return _averaging_over(flat, averaged) if averaged else model

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        removed = {name: tuple(units) for name, units in values["removed"].items()}
        return cls(removed, values["sizes"])

    def _kept(self, model, coupling) -> dict[Dim, np.ndarray]:
        found = {group.name: group for group in coupled.groups(coupling)}
        for name, size in self.sizes.items():
            if name not in found or found[name].size != size:
                has = found[name].size if name in found else "none"
                raise ValueError(
                    f"The plan is for a model with {size} units in {name!r}; {model.name!r} has "
                    f"{has}. Make a plan of this model."
                )
        kept = {}
        for name, units in self.removed.items():
            keep = np.ones(found[name].size, bool)
            keep[list(units)] = False
            kept[found[name].dim] = keep
        return kept


def _wanted(model, found, include, exclude) -> list[coupled.Group]:
    as_list = {
        key: [value] if isinstance(value, str) else value
        for key, value in (("include", include), ("exclude", exclude))
    }
    for key, globs in as_list.items():
        for glob in globs or ():
            if not any(matches(name, [glob]) for group in found for name in _names(group)):
                raise ValueError(_nothing(key, glob, found))
    wanted = [
        group
        for group in found
        if any(is_wanted(name, as_list["include"]) for name in _names(group))
        and not (exclude and any(matches(name, as_list["exclude"]) for name in _names(group)))
    ]
    if not wanted:
        raise ValueError(
            f"No channels, neurons or heads of {model.name!r} can be removed: all are inputs or "
            "outputs, or run through layers that tfcompress does not know."
        )
    return wanted


def _names(group) -> list[str]:
    return [group.name, *(member.variable.path for member in group.members if member.makes)]


def _nothing(key, glob, found) -> str:
    return f"{key}: {glob!r} matches no group; there are {[group.name for group in found]}."


def _ratios(found, ratio, allocation):
    values = ratio if isinstance(ratio, Mapping) else {"": ratio}
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"ratio is a share to remove, in (0, 1), got {value!r}.")
    if not isinstance(ratio, Mapping):
        return dict.fromkeys((group.name for group in found), ratio)
    if allocation != "uniform":
        raise ValueError('A ratio by group is the allocation; leave allocation="global" out.')
    chosen = {}
    for group in found:
        glob = next((x for x in ratio if any(matches(n, [x]) for n in _names(group))), None)
        if glob is not None:
            chosen[group.name] = ratio[glob]
    for glob in ratio:
        if not any(matches(name, [glob]) for group in found for name in _names(group)):
            raise ValueError(_nothing("ratio", glob, found))
    return chosen


@dataclasses.dataclass(frozen=True)
class _Chooser:
    """Which units go, for given ratios."""

    groups: list
    scores: dict[str, np.ndarray]
    round_to: int
    allocation: str

    def plan(self, ratios: Mapping[str, float]) -> Plan:
        """The plan that removes these shares."""
        if self.allocation == "global":
            ratios = self._global(next(iter(ratios.values())))
        removed = {}
        for group in self.groups:
            kept = self._kept(group, group.size * (1 - ratios.get(group.name, 0.0)))
            if kept < group.size:
                order = np.argsort(self.scores[group.name], kind="stable")
                removed[group.name] = tuple(sorted(map(int, order[: group.size - kept])))
        return Plan(removed, {group.name: group.size for group in self.groups})

    def uniform(self, share: float) -> Plan:
        """The plan for one share of everything."""
        return self.plan({group.name: share for group in self.groups})

    def _kept(self, group, wanted: float) -> int:
        step = self.round_to if group.is_channels and group.size > self.round_to else 1
        return int(min(max(step * round(wanted / step), min(step, group.size)), group.size))

    def _global(self, ratio: float) -> dict[str, float]:
        relative = {
            group.name: self.scores[group.name] / max(self.scores[group.name].mean(), 1e-30)
            for group in self.groups
        }
        threshold = np.quantile(np.concatenate(list(relative.values())), ratio)
        return {name: float(np.mean(each < threshold)) for name, each in relative.items()}


def _within(model, chooser, measure, target, name) -> Plan:
    """The plan that removes least, whose model costs at most `target`."""
    low, high, best = 0.0, 1.0, None
    if (now := measure(expand(model))) is not None and now <= target:
        return Plan({}, {group.name: group.size for group in chooser.groups})
    least = chooser.uniform(1.0)
    if (reached := measure(least.apply(model))) > target:
        raise ValueError(
            f"target_{name}={target} is out of reach: with one unit, or {chooser.round_to} "
            f"channels, in each group {model.name!r} still needs {reached}, and now {now}."
        )
    tried = {}
    for _ in range(_PROBES):
        share = (low + high) / 2
        plan = chooser.uniform(share)
        key = plan.to_json()
        if key not in tried:
            tried[key] = measure(plan.apply(model)) <= target
        if tried[key]:
            high, best = share, plan
        else:
            low = share
    return best or least


class _Smaller:
    """Rebuilds a flat graph with what is left of every axis."""

    def __init__(self, coupling: coupled.Coupling, kept: dict[Dim, np.ndarray]):
        self._coupling = coupling
        self._kept = kept
        self._copies: dict[int, tuple[keras.layers.Layer, keras.layers.Layer]] = {}

    def rebuild(self, flat: keras.Model) -> keras.Model:
        small = replay(flat, self._call)
        for layer, copy in self._copies.values():
            for old, new in zip(layer.weights, copy.weights, strict=True):
                new.assign(self._rest(old))
            finalize(copy)
        return small

    def _rest(self, variable) -> np.ndarray:
        value = keras.ops.convert_to_numpy(variable)
        _, dims = self._coupling.weights.get(id(variable), (variable, ()))
        for axis, dim in enumerate(dims):
            value = np.compress(dim.keep(self._kept), value, axis)
        return value

    def size(self, dim: Dim | None) -> int | None:
        """What is left of an axis."""
        return None if dim is None else int(dim.keep(self._kept).sum())

    def _sizes(self, x) -> list[int | None]:
        return [self.size(dim) for dim in self._coupling.flows[id(x)].axes]

    def _call(self, call: nodes.Call, args: tuple, kwargs: dict):
        operation = call.operation
        if isinstance(operation, keras.layers.Layer):
            if id(operation) not in self._copies:
                copy = type(operation).from_config(self._config(call))
                self._copies[id(operation)] = operation, copy
            return self._copies[id(operation)][1](*args, **kwargs)
        kind = type(operation).__name__
        if kind == "DotProductAttention":
            # Keras takes the size of the values for that of the queries.
            (query, *_), value = nodes.symbolic_tensors((args, kwargs)), call.outputs[0]
            spec = keras.KerasTensor(
                (*query.shape[:3], self._sizes(value)[3]), call.outputs[0].dtype
            )
            return nodes.record_call(operation, args, kwargs, (spec,))
        if kind in ("Reshape", "BroadcastTo") and self._changed(call.outputs[0]):
            shape = [-1 if size is None else size for size in self._sizes(call.outputs[0])]
            return getattr(keras.ops, {"Reshape": "reshape"}.get(kind, "broadcast_to"))(
                args[0], shape
            )
        if kind == "Split" and any(map(self._changed, call.outputs)):
            axis = nodes.parameters(operation)["axis"]
            sizes = [self._sizes(x)[axis] for x in call.outputs]
            return keras.ops.split(args[0], list(np.cumsum(sizes[:-1])), axis)
        if kind == "GetItem" and self._changed(call.args[0]):
            return operation(args[0], self._key(call))
        return operation(*args, **kwargs)

    def _changed(self, x) -> bool:
        return any(
            dim is not None and self.size(dim) != dim.size
            for dim in self._coupling.flows[id(x)].axes
        )

    def _key(self, call):
        dims = iter(self._coupling.flows[id(call.args[0])].axes)
        key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        hidden = len(self._coupling.flows[id(call.args[0])].axes) - sum(
            each is not None and each is not Ellipsis for each in key
        )
        made = []
        for each in key:
            if each is None:
                made.append(each)
            elif each is Ellipsis:
                for _ in range(hidden):
                    next(dims)
                made.append(each)
            else:
                made.append(self._slice(each, next(dims)))
        return tuple(made)

    def _slice(self, part, dim):
        if not isinstance(part, slice) or dim is None or self.size(dim) == dim.size:
            return part
        keep = dim.keep(self._kept)
        start, stop, _ = part.indices(dim.size)
        return slice(int(keep[:start].sum()), int(keep[:stop].sum()))

    def _units(self, layer) -> int:
        found = self._coupling.weights.get(id(layer.cell.recurrent_kernel))
        return self.size(found[1][0]) if found else layer.cell.units

    def _config(self, call: nodes.Call) -> dict:
        layer, config = call.operation, call.operation.get_config()
        dims = {
            name: self._coupling.weights[id(variable)][1]
            for name in ("kernel", "depthwise_kernel", "pointwise_kernel", "embeddings")
            if id(variable := getattr(layer, name, None)) in self._coupling.weights
        }
        kernel = dims.get("kernel")
        if "units" in config and kernel:
            config["units"] = self.size(kernel[-1])
        if "units" in config and hasattr(layer, "cell"):
            config["units"] = self._units(layer)
        for side in ("layer", "backward_layer"):
            if isinstance(layer, keras.layers.Bidirectional) and config.get(side):
                config[side].pop("build_config", None)  # The old shapes.
                config[side]["config"]["units"] = self._units(layer.forward_layer)
        if "filters" in config:
            made = dims.get("pointwise_kernel", kernel)
            transposed = type(layer).__name__.endswith("Transpose")
            config["filters"] = self.size(made[-2 if transposed else -1])
        if "depth_multiplier" in config:
            config["depth_multiplier"] = self.size(dims.get("depthwise_kernel", kernel)[-1])
        if config.get("groups", 1) > 1 and kernel and "filters" in config:
            axis = coupled.channels_of(layer, len(call.inputs[0].shape))
            config["groups"] = self._sizes(call.inputs[0])[axis] // self.size(kernel[-2])
        elif type(layer).__name__ == "GroupNormalization":
            axis = layer.axis
            before = call.inputs[0].shape[axis] // layer.groups
            config["groups"] = self._sizes(call.inputs[0])[axis] // before
        if "embeddings" in dims:
            config["output_dim"] = self.size(dims["embeddings"][1])
        if isinstance(layer, keras.layers.EinsumDense):
            sizes = self._sizes(call.outputs[0])[-len(layer.partial_output_shape) :]
            config["output_shape"] = tuple(
                None if old is None else size
                for old, size in zip(layer.partial_output_shape, sizes, strict=True)
            )
        if isinstance(layer, keras.layers.Reshape):
            sizes = self._sizes(call.outputs[0])[1:]
            config["target_shape"] = tuple(
                -1 if old == -1 or size is None else size
                for old, size in zip(layer.target_shape, sizes, strict=True)
            )
        return config


def _averaging_over(flat, averaged: Mapping[int, np.ndarray]) -> keras.Model:
    """A graph in which norms see some of the channels only: gathered, normed, put back."""

    def call(node: nodes.Call, args, kwargs):
        keep = averaged.get(id(node.outputs[0]))
        if keep is None:
            return nodes.record_call(node.operation, args, kwargs, node.outputs)
        layer = node.operation
        norm = type(layer).from_config(layer.get_config() | {"name": f"{layer.name}_kept"})
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        x = keras.ops.moveaxis(args[0], axis, -1)
        x = keras.ops.take(x, np.flatnonzero(keep), axis=-1)
        x = norm(keras.ops.moveaxis(x, -1, axis))
        for old, new in zip(layer.weights, norm.weights, strict=True):
            new.assign(keras.ops.convert_to_numpy(old)[keep])
        spread = np.eye(len(keep), dtype="float32")[keep]
        x = keras.ops.matmul(keras.ops.moveaxis(x, axis, -1), spread)
        return keras.ops.moveaxis(x, -1, axis)

    return replay(flat, call)
