"""Dropping whole residual blocks: transformer layers, residual blocks of conv nets."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import logging
import re
from collections.abc import Iterable

import keras
import networkx as nx

from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import copied, fill, new_input
from tfcompress.keras_hooks import nodes, tracing

_log = logging.getLogger("tfcompress")


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a flat graph that might be dropped whole.

    Args:
        name: What its layers' names in the flat graph start with, or `residual_0`, `residual_1`,
            ..., where names say nothing.
        layers: The names of its layers and ops, in graph order.
        reason: Why it cannot be dropped; empty where it can.
    """

    name: str
    layers: tuple[str, ...]
    reason: str = ""

    @property
    def is_droppable(self) -> bool:
        """Whether `drop_layers` can drop it."""
        return not self.reason


def blocks(model: keras.Model) -> list[Block]:
    """The repeated residual blocks of a model, in graph order.

    They are found by name: all layers whose names in the flat graph (`tfcompress.expand`) begin
    with the same words up to a number, `transformer_layer_0`, `conv2_block1`. Where no such set is
    a residual block, they are found by structure: stretches between tensors that every path from
    an input must pass, where as many equal stretches in a row as repeat make one block.

    Args:
        model: Any built model.

    Returns:
        The blocks; those of the same name up to the number that cannot be dropped are listed too,
        with the reason. Empty if no part of the model repeats.

    Raises:
        ValueError: `model` cannot be expanded.

    Example:

    >>> import keras
    >>> x = inputs = keras.Input((4,))
    >>> for i in range(2):
    ...     h = keras.layers.Dense(4, name=f"block_{i}_dense")(x)
    ...     x = keras.layers.Add(name=f"block_{i}_add")([x, h])
    >>> [(block.name, block.is_droppable) for block in blocks(keras.Model(inputs, x))]
    [('block_0', True), ('block_1', True)]
    """
    return [region.block for region in _Graph(expand(model)).repeated()]


def drop_layers(
    model: keras.Model,
    layers: str | Iterable[str] | None = None,
    keep: Iterable[int] | None = None,
) -> keras.Model:
    """Drop whole blocks, such as layers of a transformer.

    A block can be dropped if exactly one tensor that depends on its main input is read outside of
    it, and has the dtype and, as far as it is known, the shape of that input, which then takes its
    place. Side inputs such as masks may be of any kind. Train the result: a residual block changes
    its input little, not none.

    Args:
        model: Any built model. It is not touched.
        layers: A glob, or several, for the names of the blocks to drop (see `blocks`), e.g.
            `"transformer_layer_[135]"`. A glob that fits none of these may name any other part of
            the flat graph by what the names of its layers begin with.
        keep: Or the blocks to keep, by index in `blocks(model)`, from 0; negative ones count from
            the end.

    Returns:
        A new flat Functional model with weights of its own.

    Raises:
        ValueError: A glob or index fits nothing, or a block cannot be dropped; the message names
            the block and the reason.

    Example:

    >>> import keras
    >>> x = inputs = keras.Input((4,))
    >>> for i in range(3):
    ...     h = keras.layers.Dense(4, name=f"block_{i}_dense")(x)
    ...     x = keras.layers.Add(name=f"block_{i}_add")([x, h])
    >>> shallow = drop_layers(keras.Model(inputs, x), keep=[0, 2])
    >>> [layer.name for layer in shallow.layers[1:]]
    ['block_0_dense', 'block_0_add', 'block_2_dense', 'block_2_add']

    Paper: Sajjad et al. 2023, "On the Effect of Dropping Layers of Pre-trained Transformer
    Models", https://arxiv.org/abs/2004.03844.
    """
    if (layers is None) == (keep is None):
        raise ValueError(
            f"Give either layers or keep, got layers={layers!r} and keep={keep!r}; e.g. "
            'layers="transformer_layer_[135]" or keep=[0, 2, 4].'
        )
    graph = _Graph(expand(model))
    regions = graph.named(layers) if keep is None else graph.all_but(keep)
    for region in regions:
        if region.block.reason:
            raise ValueError(
                f"drop_layers cannot drop {region.block.name!r}: {region.block.reason} "
                "tfcompress.graph.drop.blocks(model) lists what can be dropped."
            )
    if not regions:
        _log.warning("drop_layers: keep=%s keeps every block of %s", list(keep), model.name)
    return copied(graph.without(regions))


@dataclasses.dataclass(frozen=True, eq=False)
class _Region:
    """A block, and where it is cut out: `entry` takes the place of `exit`."""

    block: Block
    first: int
    entry: keras.KerasTensor | None = None
    exit: keras.KerasTensor | None = None
    dropped: frozenset[int] = frozenset()
    is_residual: bool = False


class _Graph:
    """The calls of a flat model, numbered in topological order, and who reads whom."""

    def __init__(self, flat: keras.Model):
        self._flat = flat
        self._calls = nodes.calls(flat)
        self._names = [call.operation.name for call in self._calls]
        self._makers = {id(x): i for i, call in enumerate(self._calls) for x in call.outputs}
        self._outputs = {id(x) for x in flat.outputs}
        self._readers: dict[int, set[int]] = collections.defaultdict(set)
        # Nodes are calls, by number, and the model's inputs, by the id of the tensor, as a tuple.
        self._edges = nx.DiGraph()
        for i, call in enumerate(self._calls):
            for x in call.inputs:
                self._readers[id(x)].add(i)
                self._edges.add_edge(self._node(x), i)

    def _node(self, x: keras.KerasTensor):
        return self._makers.get(id(x), ("input", id(x)))

    def repeated(self) -> list[_Region]:
        """The blocks found by name, or else by structure."""
        return self._by_name() or self._by_structure()

    def all_but(self, keep: Iterable[int]) -> list[_Region]:
        """The repeated blocks whose index is not in `keep`."""
        regions = self.repeated()
        keep, count = list(keep), len(regions)
        wrong = [i for i in keep if not -count <= i < count]
        if wrong:
            raise ValueError(
                f"keep={keep} has {wrong}, but {self._flat.name!r} has {count} repeated blocks: "
                f"{[x.block.name for x in regions]}. Pass their indices, from 0, or name what to "
                "drop with layers=."
            )
        kept = {i % count for i in keep}
        return [x for i, x in enumerate(regions) if i not in kept]

    def named(self, globs: str | Iterable[str]) -> list[_Region]:
        """The blocks that the globs fit."""
        repeated = {x.block.name: x for x in self.repeated()}
        found: dict[str, _Region] = {}
        for glob in [globs] if isinstance(globs, str) else list(globs):
            fitting = fnmatch.filter(repeated, glob)
            found |= {name: repeated[name] for name in fitting}
            if not fitting:
                found |= {x.block.name: x for x in self._other(glob, list(repeated))}
        return sorted(found.values(), key=lambda x: x.first)

    def _other(self, glob: str, known: list[str]) -> list[_Region]:
        members = self._members(r"(?=_|$)")
        fitting = _outermost(fnmatch.filter(members, glob))
        if not fitting:
            raise ValueError(
                f"layers={glob!r} fits no block of {self._flat.name!r}. Its blocks are {known}; "
                "other parts are named by what their layers' names in tfcompress.expand(model) "
                "begin with."
            )
        return [self._region(name, members[name]) for name in fitting]

    def _members(self, end: str) -> dict[str, list[int]]:
        """Beginning of a name, up to where `end` matches -> the calls that have it."""
        members: dict[str, list[int]] = collections.defaultdict(list)
        for i, name in enumerate(self._names):
            for match in re.finditer(end, name):
                if match.end():
                    members[name[: match.end()]].append(i)
        return members

    def _by_name(self) -> list[_Region]:
        members = self._members(r"(?<=\d)(?=_|$)")
        regions = {
            name: self._region(name, calls)
            for name, calls in members.items()
            if len(calls) > 1 or self._is_composite(calls)
        }
        residual = _outermost([name for name, x in regions.items() if x.is_residual])
        families = {_stem(name) for name in residual}
        listed = [
            x
            for name, x in regions.items()
            if _stem(name) in families and not _is_inside(name, residual)
        ]
        return sorted(listed, key=lambda x: x.first)

    def _region(self, name: str, calls: list[int]) -> _Region:
        """Those calls as a block, cut out at the main one of their inputs."""
        inside = set(calls)
        whole = Block(name, tuple(dict.fromkeys(self._names[i] for i in calls)))
        cuts, reasons = [], []
        entries = self._main_inputs(calls, inside)
        for entry in [x for x in entries if self._is_summed(x, inside)] or entries:
            dropped = nx.descendants(self._edges, self._node(entry)) & inside
            reason, exits = self._cut(entry, dropped, inside)
            reasons.append(reason)
            if not reason:
                cuts.append((entry, exits[0], dropped))
        if len(cuts) != 1:
            reason = reasons[0] if reasons else "it reads nothing from outside."
            if cuts:
                tensors = [x.name for x, _, _ in cuts]
                reason = f"each of its inputs {tensors} could take its place."
            return _Region(dataclasses.replace(whole, reason=reason), calls[0])
        ((entry, exit, dropped),) = cuts
        is_summed = len(dropped) > 1 and self._is_summed(entry, inside)
        is_residual = is_summed or self._is_composite(calls)
        return _Region(whole, calls[0], entry, exit, frozenset(dropped), is_residual)

    def _main_inputs(self, calls: list[int], inside: set[int]) -> list[keras.KerasTensor]:
        """What the calls read from outside; of a single call, its first argument."""
        read = {id(x): x for i in calls for x in self._calls[i].inputs}
        outside = [x for x in read.values() if self._makers.get(id(x)) not in inside]
        return outside[:1] if len(calls) == 1 else outside

    def _cut(self, entry, dropped: set[int], inside: set[int]) -> tuple[str, list]:
        """`(reason, exits)`: what leaves the calls that depend on `entry`, and why that is bad."""
        made = [x for i in sorted(dropped) for x in self._calls[i].outputs]
        exits = [x for x in made if id(x) in self._outputs or not self._readers[id(x)] <= dropped]
        if len(exits) != 1:
            names = [self._names[self._makers[id(x)]] for x in exits]
            return f"{len(exits)} of its tensors are read outside, not 1: {names}.", exits
        if not _is_alike(exits[0], entry):
            return (
                f"it makes {tuple(exits[0].shape)} {exits[0].dtype} of "
                f"{tuple(entry.shape)} {entry.dtype}, so that its input cannot take the place of "
                "its output."
            ), exits
        if self._node(entry) in nx.descendants(self._edges, self._makers[id(exits[0])]):
            return "its input depends on its own output.", exits
        return "", exits

    def _is_summed(self, x: keras.KerasTensor, inside: set[int]) -> bool:
        readers = self._readers[id(x)] & inside
        return any(type(self._calls[i].operation).__name__ == "Add" for i in readers)

    def _is_composite(self, calls: list[int]) -> bool:
        """Whether it is one layer with layers inside, which `expand` had to keep whole."""
        layer = self._calls[calls[0]].operation
        is_layer = len(calls) == 1 and isinstance(layer, keras.layers.Layer)
        return is_layer and bool(tracing.sublayers(layer))

    def _by_structure(self) -> list[_Region]:
        """Repeats among the stretches of the longest chain of tensors that no path avoids."""
        chains = [self._chain(("input", id(x))) for x in self._flat.inputs]
        units = _units([self._stretch(a, b) for a, b in _pairs(max(chains, key=len))])
        kinds = [[self._kind(i) for i in unit] for unit in units]
        groups = [sorted(sum(units[a:b], [])[:size]) for a, b, size in _repeats(kinds)]
        regions = [self._region(f"residual_{n}", calls) for n, calls in enumerate(groups)]
        return regions if any(x.is_residual for x in regions) else []

    def _chain(self, source) -> list:
        """What every path from an input to an output goes through."""
        if source not in self._edges:
            return []
        reached = nx.descendants(self._edges, source) | {source}
        graph = self._edges.subgraph(reached).copy()
        graph.add_edges_from(
            (self._makers[x], "end") for x in self._outputs if self._makers.get(x) in reached
        )
        if "end" not in graph:
            return []
        dominators, chain = nx.immediate_dominators(graph, source), []
        node = dominators["end"]
        while node != source:
            chain.append(node)
            node = dominators[node]
        return [source, *reversed(chain)]

    def _stretch(self, start, stop) -> list[int]:
        """The calls behind `start` up to `stop`, with what only they read from the side."""
        between = nx.descendants(self._edges, start) & nx.ancestors(self._edges, stop)
        return sorted({*between, stop})

    def _kind(self, i: int) -> tuple[str, list]:
        # Not the shapes of outputs: attention forgets the length, and all behind it.
        operation = self._calls[i].operation
        weights = [tuple(x.shape) for x in getattr(operation, "weights", ())]
        return type(operation).__name__, weights

    def without(self, regions: list[_Region]) -> keras.Model:
        """The model without these; it shares the rest."""
        flat = self._flat
        inputs = keras.tree.map_structure(new_input, flat.input)
        tensors = dict(zip(map(id, flat.inputs), keras.tree.flatten(inputs), strict=True))
        dropped = frozenset().union(*(x.dropped for x in regions))
        entries = {self._makers[id(x.exit)]: x for x in regions}

        def record(node, args, kwargs):
            return nodes.record_call(node.operation, args, kwargs, node.outputs)

        for i, call in enumerate(self._calls):
            if i in entries:
                tensors[id(entries[i].exit)] = tensors[id(entries[i].entry)]
            elif i not in dropped:
                fill([call], tensors, record)
        outputs = keras.tree.map_structure(lambda x: tensors[id(x)], flat.output)
        return keras.Model(inputs, outputs, name=flat.name, trainable=flat.trainable)


def _is_alike(a: keras.KerasTensor, b: keras.KerasTensor) -> bool:
    """Whether dtypes are equal and shapes are too, as far as they are known."""
    sizes = zip(a.shape, b.shape, strict=False)
    same = len(a.shape) == len(b.shape) and all(x == y or None in (x, y) for x, y in sizes)
    return same and a.dtype == b.dtype


def _stem(name: str) -> str:
    """
    >>> _stem("transformer_layer_12")
    'transformer_layer_'
    """
    return name.rstrip("0123456789")


def _is_inside(name: str, others: list[str]) -> bool:
    return any(name.startswith(f"{other}_") for other in others)


def _outermost(names: list[str]) -> list[str]:
    """
    >>> _outermost(["a_1", "a_1_b_2", "a_10"])
    ['a_1', 'a_10']
    """
    return [name for name in names if not _is_inside(name, names)]


def _pairs(chain: list) -> list[tuple]:
    return list(zip(chain, chain[1:], strict=False))


def _units(stretches: list[list[int]]) -> list[list[int]]:
    """Stretches of several calls, each with the single calls behind it."""
    starts = [i for i, x in enumerate(stretches) if len(x) > 1]
    stops = [*starts[1:], len(stretches)][: len(starts)]
    return [sum(stretches[a:b], []) for a, b in zip(starts, stops, strict=True)]


def _repeats(kinds: list[list]) -> list[tuple[int, int, int]]:
    """`(start, stop, size)` of the slices that repeat one behind the other, the shortest ones.

    A slice may have more at its end than the first one, which is not part of the `size` calls.

    >>> _repeats([["a"], ["b"], ["a"], ["b", "c"], ["d"]])
    [(0, 2, 2), (2, 4, 2)]
    """
    found, start = [], 0
    while start < len(kinds):
        length, count = _run(kinds, start)
        size = len(sum(kinds[start : start + length], []))
        if count > 1:
            starts = range(start, start + length * count, length)
            found += [(i, i + length, size) for i in starts]
        start += length * count
    return found


def _run(kinds: list[list], start: int) -> tuple[int, int]:
    """The least length of a slice at `start` that is repeated, and how often it is there."""
    for length in range(1, (len(kinds) - start) // 2 + 1):
        count = 1
        while _alike(kinds, start, start + count * length, length):
            count += 1
        if count > 1:
            return length, count
    return 1, 1


def _alike(kinds: list[list], a: int, b: int, length: int) -> bool:
    first, second = sum(kinds[a : a + length], []), sum(kinds[b : b + length], [])
    return b + length <= len(kinds) and second[: len(first)] == first
