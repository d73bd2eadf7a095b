"""Physical removal: a smaller dense model, without the channels, neurons and heads left out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import rich.progress

from tfcompress.graph import groups as coupled
from tfcompress.graph.dims import Dim
from tfcompress.graph.expand import expand
from tfcompress.graph.macs import macs, macs_by_weight, zero_example
from tfcompress.graph.rebuild import finalize, replay
from tfcompress.graph.unit_groups import check_globs, names_of, wanted_groups, zero_units
from tfcompress.graph.unit_scores import unit_scores
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.walk import matches, named_variables

_PROBES = 12
_FIX_SHAPES = "Fix them: tfcompress.expand(model, inputs=batch)."


def shrink(
    model: keras.Model,
    ratio: float | Mapping[str, float] | None = None,
    *,
    iterations: int = 1,
    fine_tune: Callable[[keras.Model], Any] | None = None,
    **arguments,
) -> keras.Model:
    """Remove channels, neurons and attention heads: `shrink_plan` and `Plan.apply`.

    Args:
        model: Any built model; see `tfcompress.expand`. It is not touched.
        ratio: See `shrink_plan`, as all other arguments.
        iterations: In how many steps, 1 or more. Each removes an equal share of what the first
            model has, or comes an equal part nearer to the target, and scores what is left anew, so
            that the last meets what is asked for as one step would.
        fine_tune: Called with the smaller model after each removal, the last one included; it
            compiles and trains it in place.
        **arguments: See `shrink_plan`.

    Returns:
        A new flat Functional model of plain Keras layers, with weights of its own.

    Raises:
        ValueError: Iterations below 1, what cannot be called, and see `shrink_plan`.

    Example:

    >>> layers = [keras.layers.Dense(32, activation="relu"), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> [tuple(weight.shape) for weight in shrink(model, ratio=0.5).weights]
    [(4, 16), (16,), (16, 2), (2,)]
    >>> widths = []
    >>> note = lambda small: widths.append(small.layers[1].units)
    >>> _ = shrink(model, ratio=0.5, iterations=2, fine_tune=note)
    >>> widths
    [24, 16]

    Reference: Molchanov et al. 2017, https://arxiv.org/abs/1611.06440 (prune, fine-tune, repeat).
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number, 1 or more, got {iterations!r}.")
    if fine_tune is not None and not callable(fine_tune):
        raise ValueError(f"fine_tune must be a function of the smaller model, got {fine_tune!r}.")
    given = inspect.signature(shrink_plan).bind(model, ratio, **arguments)
    given.apply_defaults()
    return _Task(**given.arguments).run(iterations, fine_tune)


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
    zeros: bool = False,
    verbose: int = 1,
) -> Plan:
    """Which channels, neurons and heads to remove from a model.

    Coupled axes (`tfcompress.graph.groups`) are groups; their units go together. Units with the
    lowest scores are removed, and at least one of each group stays. Exactly one of `ratio`, the
    targets and `zeros` says how many. To go on step by step, with fine-tuning in between, see
    `shrink`.

    Args:
        model: Any built model; see `tfcompress.expand`.
        ratio: Share removed of each group, in (0, 1); or `{glob: ratio}` over the names of groups
            and the paths of the weights that make their units; the first match counts. With
            `allocation="global"` the share of all units.
        target_macs: The largest number of multiply-accumulates of one example.
        target_parameters: The largest number of parameters.
        target_cost: The largest value of `cost`.
        cost: Called with smaller models, e.g. one that measures their latency.
        criterion: `"l2"`, `"l1"`, `"batch_norm"` (the gammas), `"random"`, `"activation"` (the mean
            magnitude of what the next layers read, which needs `data`), `"taylor"`, `"fisher"`
            (both need `data` and a compiled model), or `group -> scores` of shape (units,).
        allocation: `"uniform"`, the same share of each group, or `"global"`, the lowest scores of
            all groups, each relative to its mean.
        data: Batches `(x, y)`, e.g. a `tf.data.Dataset`, for the criteria that read gradients; for
            `"activation"` also batches of inputs.
        round_to: Channels are kept in multiples of this, those of groups larger than it.
        include: Glob or globs as in `ratio`, None for all groups.
        exclude: Glob or globs to leave out.
        zeros: Whether to remove what is zero, no more and no less, so that no output changes: what
            `tfcompress.callbacks.Pruning(structure=Channel(groups=channel_groups(model)))` leaves.
        verbose: Whether to show progress while `data` is read and a target is searched for.

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
    >>> shrink_plan(plan.mask(model), zeros=True) == plan
    True

    References: Li et al. 2017, https://arxiv.org/abs/1608.08710 (norms); Molchanov et al. 2017,
    https://arxiv.org/abs/1611.06440 (activation); Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771 (Taylor); Fang et al. 2023, https://arxiv.org/abs/2301.12900
    (groups); Liu et al. 2017, https://arxiv.org/abs/1708.06519 (batch norm).
    """
    task = _Task(
        model=model,
        ratio=ratio,
        target_macs=target_macs,
        target_parameters=target_parameters,
        target_cost=target_cost,
        cost=cost,
        criterion=criterion,
        allocation=allocation,
        data=data,
        round_to=round_to,
        include=include,
        exclude=exclude,
        zeros=zeros,
        verbose=verbose,
    )
    return task.plan()


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
        return self._graph(model).smaller(self).model

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
        graph = self._graph(model)
        kept = graph.kept(self)
        for variable, dims in graph.coupling.weights.values():
            keeps = [dim.keep(kept) for dim in dims]
            if not all(keep.all() for keep in keeps):
                value = keras.ops.convert_to_numpy(variable).copy()
                for axis, keep in enumerate(keeps):
                    value[(slice(None),) * axis + (~keep,)] = 0
                variable.assign(value)
        masked = graph.as_if_smaller(self, graph.flat)
        return model if masked is graph.flat else masked

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        removed = {name: tuple(units) for name, units in values["removed"].items()}
        return cls(removed, values["sizes"])

    def _graph(self, model) -> _Graph:
        flat = expand(model)
        coupling = coupled.Coupling(flat)
        graph = _Graph(flat, coupling, {x.name: x for x in coupled.groups(coupling)})
        for name, size in self.sizes.items():
            has = graph.groups[name].size if name in graph.groups else "none"
            if has != size:
                raise ValueError(
                    f"The plan is for a model with {size} units in {name!r}; {model.name!r} has "
                    f"{has}. Make a plan of this model."
                )
        return graph


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A flat model whose units can be removed.

    Args:
        flat: The model.
        coupling: Of its axes.
        groups: Name -> group, of those that may be removed from.
    """

    flat: keras.Model
    coupling: coupled.Coupling
    groups: dict[str, coupled.Group]

    @property
    def sizes(self) -> dict[str, int]:
        """Name of a group -> how many units it has."""
        return {name: group.size for name, group in self.groups.items()}

    def kept(self, plan: Plan) -> dict[Dim, np.ndarray]:
        """Which elements stay of the dim of each group that loses some."""
        kept = {}
        for name, units in plan.removed.items():
            keep = np.ones(self.groups[name].size, bool)
            keep[list(units)] = False
            kept[self.groups[name].dim] = keep
        return kept

    def smaller(self, plan: Plan) -> _Smaller:
        """The model without the units."""
        return _Smaller(self.flat, self.coupling, self.kept(plan))

    def as_if_smaller(self, plan: Plan, model: keras.Model) -> keras.Model:
        """`model`, a part of the flat one with zeros for the units, in which norms ignore them."""
        kept = self.kept(plan)
        averaged = {
            id(call.outputs[0]): dim.keep(kept)
            for call, dim in self.coupling.statistics
            if not dim.keep(kept).all()
        }
        return _averaging_over(model, averaged) if averaged else model

    def copy(self) -> _Graph:
        """The same with weights of its own."""
        flat = _Smaller(self.flat, self.coupling, {}).model
        coupling = coupled.Coupling(flat)
        # Paths have changed, and with them names; the order has not.
        every = zip(coupled.groups(self.coupling), coupled.groups(coupling), strict=True)
        named = {old.name: new for old, new in every if old.name in self.groups}
        groups = {name: dataclasses.replace(new, name=name) for name, new in named.items()}
        return _Graph(flat, coupling, groups)


class _Task:
    """A model, and how much of it is to go; the arguments are those of `shrink_plan`."""

    def __init__(
        self,
        model,
        ratio,
        target_macs,
        target_parameters,
        target_cost,
        cost,
        criterion,
        allocation,
        data,
        round_to,
        include,
        exclude,
        zeros,
        verbose,
    ):
        goals = {"ratio": ratio, "target_macs": target_macs, "target_parameters": target_parameters}
        goals |= {"target_cost": target_cost, "zeros": zeros or None}
        given = {name: value for name, value in goals.items() if value is not None}
        if len(given) != 1 or (cost is None) != (target_cost is None):
            raise ValueError(
                "shrink needs exactly one of ratio, target_macs, target_parameters, zeros, and "
                f"target_cost with cost; got {given or 'none'}, cost={cost!r}. E.g. ratio=0.5."
            )
        if allocation not in ("uniform", "global"):
            raise ValueError(f'allocation must be "uniform" or "global", got {allocation!r}.')
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ValueError(f"round_to must be a whole number, 1 or more, got {round_to!r}.")
        flat = expand(model)
        coupling = coupled.Coupling(flat)
        found = wanted_groups(model, coupling, include, exclude)
        self._graph = _Graph(flat, coupling, {group.name: group for group in found})
        self._goal = next(iter(given))
        self._amount = given[self._goal] if ratio is None else _ratios(found, ratio, allocation)
        self._model, self._cost, self._verbose = model, cost, verbose
        self._criterion, self._data = criterion, data
        self._choice = {"round_to": round_to, "allocation": allocation}

    def plan(self) -> Plan:
        """The plan that removes all at once."""
        return self._next(self._graph, self._nothing, 1.0)

    def run(self, iterations: int, fine_tune: Callable | None) -> keras.Model:
        """The smaller model, by removals that are scored and fine-tuned one by one."""
        if iterations > 1 and self._goal == "zeros":
            raise ValueError(f"What is zero goes at once: zeros=True, iterations={iterations}.")
        # At its full size it takes the weights of the smaller models, to score what is left.
        graph = self._graph if iterations == 1 else self._graph.copy()
        plan = self._nothing
        for step in range(1, iterations + 1):
            plan = self._next(graph, plan, step / iterations)
            smaller = graph.smaller(plan)
            if fine_tune is not None:
                fine_tune(smaller.model)
            if step < iterations:
                smaller.write_back()
        return smaller.model

    @property
    def _nothing(self) -> Plan:
        return Plan({}, self._graph.sizes)

    def _next(self, graph: _Graph, before: Plan, part: float) -> Plan:
        """The plan of a part of the way, which removes what `before` does, and more."""
        groups = list(graph.groups.values())
        if self._goal == "zeros":
            return Plan(zero_units(graph.coupling, groups), graph.sizes)
        scores = unit_scores(
            graph.coupling,
            self._model,
            groups,
            self._criterion,
            self._data,
            self._verbose,
            lambda model: graph.as_if_smaller(before, model),
        )
        chooser = _Chooser(groups, scores, before.removed, **self._choice)
        if self._goal == "ratio":
            return chooser.plan({name: part * each for name, each in self._amount.items()})
        return self._within(graph, chooser, before, part)

    def _within(self, graph, chooser, before, part) -> Plan:
        """The plan that removes least, whose model costs at most what it may by now."""

        def measured(plan):
            return self._measure(graph.smaller(plan).model)

        estimated = self._estimate(graph)
        for cost in filter(None, (estimated, measured)):
            cost = _remembered(cost)
            first, least = cost(self._nothing), chooser.uniform(1.0)
            if (reached := cost(least)) > self._amount:
                raise ValueError(
                    f"{self._goal}={self._amount} is out of reach: with one unit, or "
                    f"{chooser.round_to} channels, in each group {self._model.name!r} still needs "
                    f"{reached}, and now {first}."
                )
            limit = first + part * (self._amount - first)
            plan = before if cost(before) <= limit else self._search(chooser, cost, limit)
            if estimated is None or measured(plan) <= limit:
                break
        return plan

    def _search(self, chooser, cost, limit) -> Plan:
        low, high, best = 0.0, 1.0, chooser.uniform(1.0)
        for _ in rich.progress.track(range(_PROBES), "Size", disable=not self._verbose):
            share = (low + high) / 2
            plan = chooser.uniform(share)
            if cost(plan) <= limit:
                high, best = share, plan
            else:
                low = share
        return best

    def _estimate(self, graph) -> Callable[[Plan], int] | None:
        """Cost of a plan by the sizes of weights; None where it takes the model to tell."""
        by_weight = {id(weight): math.prod(weight.shape) for weight in graph.flat.weights}
        if self._goal == "target_macs":
            found = macs_by_weight(graph.flat, zero_example(graph.flat, _FIX_SHAPES))
            if found is None or None in found:  # Products of activations, as in attention.
                return None
            variables = named_variables(graph.flat)
            by_weight = {id(variables[path]): number for path, number in found.items()}
        elif self._goal == "target_cost":
            return None

        def cost(plan):
            kept, total = graph.kept(plan), 0
            for key, number in by_weight.items():
                for dim in graph.coupling.weights.get(key, (None, ()))[1]:
                    number = number * int(dim.keep(kept).sum()) // dim.size
                total += number
            return total

        return cost

    def _measure(self, small: keras.Model) -> float:
        if self._goal == "target_parameters":
            return small.count_params()
        if self._goal == "target_cost":
            return self._cost(small)
        found = macs(small, zero_example(small, _FIX_SHAPES))
        if found is None:
            raise ValueError(
                f"The multiply-accumulates of {self._model.name!r} cannot be counted. {_FIX_SHAPES}"
            )
        return found


def _remembered(cost: Callable[[Plan], float]) -> Callable[[Plan], float]:
    known: dict[str, float] = {}

    def remembered(plan):
        key = plan.to_json()
        if key not in known:
            known[key] = cost(plan)
        return known[key]

    return remembered


def _ratios(found, ratio, allocation):
    values = ratio if isinstance(ratio, Mapping) else {"": ratio}
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"ratio is a share to remove, in (0, 1), got {value!r}.")
    if not isinstance(ratio, Mapping):
        return dict.fromkeys((group.name for group in found), ratio)
    if allocation != "uniform":
        raise ValueError('A ratio by group is the allocation; leave allocation="global" out.')
    check_globs("ratio", list(ratio), found)
    chosen = {}
    for group in found:
        glob = next((x for x in ratio if any(matches(n, [x]) for n in names_of(group))), None)
        if glob is not None:
            chosen[group.name] = ratio[glob]
    return chosen


@dataclasses.dataclass(frozen=True)
class _Chooser:
    """Which units go, for given ratios; those that are gone already go in any case."""

    groups: list[coupled.Group]
    scores: dict[str, np.ndarray]
    gone: Mapping[str, tuple[int, ...]]
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
                order = np.argsort(self._ranked(group), kind="stable")
                removed[group.name] = tuple(sorted(map(int, order[: group.size - kept])))
        return Plan(removed, {group.name: group.size for group in self.groups})

    def uniform(self, share: float) -> Plan:
        """The plan for one share of everything."""
        return self.plan({group.name: share for group in self.groups})

    def _ranked(self, group) -> np.ndarray:
        """The scores, those of what is gone below all others."""
        scores = self.scores[group.name].copy()
        scores[list(self.gone.get(group.name, ()))] = -np.inf
        return scores

    def _kept(self, group, wanted: float) -> int:
        step = self.round_to if group.is_channels and group.size > self.round_to else 1
        kept = min(max(step * round(wanted / step), min(step, group.size)), group.size)
        return int(min(kept, group.size - len(self.gone.get(group.name, ()))))

    def _global(self, ratio: float) -> dict[str, float]:
        ranked = {group.name: self._ranked(group) for group in self.groups}
        relative = {
            name: each / max(each[np.isfinite(each)].mean(), 1e-30) for name, each in ranked.items()
        }
        every = np.sort(np.concatenate(list(relative.values())))
        threshold = every[min(round(ratio * every.size), every.size - 1)]
        return {name: float(np.mean(each < threshold)) for name, each in relative.items()}


class _Smaller:
    """A flat graph rebuilt with what is left of every axis.

    Args:
        flat: The graph, which stays as it is.
        coupling: Of its axes.
        kept: Dim of a group -> which of its units stay; a group that is missing keeps all.

    Attributes:
        model: What is left.
    """

    def __init__(
        self, flat: keras.Model, coupling: coupled.Coupling, kept: Mapping[Dim, np.ndarray]
    ):
        self._coupling = coupling
        self._kept = kept
        self._copies: dict[int, tuple[keras.layers.Layer, keras.layers.Layer]] = {}
        self.model = replay(flat, self._call)
        for old, new in self._pairs():
            new.assign(keras.ops.convert_to_numpy(old)[self._left(old)])
        for _, copy in self._copies.values():
            finalize(copy)

    def write_back(self) -> None:
        """Give the weights of `model` to `flat`, and zeros for what is not in it."""
        for old, new in self._pairs():
            value = np.zeros(old.shape, keras.ops.convert_to_numpy(new).dtype)
            value[self._left(old)] = keras.ops.convert_to_numpy(new)
            old.assign(value)

    def _pairs(self) -> Iterator[tuple[keras.Variable, keras.Variable]]:
        for layer, copy in self._copies.values():
            yield from zip(layer.weights, copy.weights, strict=True)

    def _left(self, variable) -> tuple:
        """The index of what is left of a weight."""
        _, dims = self._coupling.weights.get(id(variable), (variable, ()))
        keeps = [dim.keep(self._kept) for dim in dims]
        return () if all(keep.all() for keep in keeps) else np.ix_(*keeps)

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
        if kind == "Repeat" and self._changed(call.outputs[0]):
            axis = nodes.parameters(operation)["axis"]
            if call.inputs[0].shape[axis] == 1:
                return keras.ops.repeat(args[0], self._sizes(call.outputs[0])[axis], axis)
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
