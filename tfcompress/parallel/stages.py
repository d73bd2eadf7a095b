"""A flat graph, cut into stages."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import keras

from tfcompress.graph.rebuild import fill
from tfcompress.keras_hooks import nodes
from tfcompress.parallel import costs as layer_costs
from tfcompress.parallel.partition import LayerCost, received_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A part of a model, on one device.

    Args:
        device: Where its weights are and its ops run.
        layers: The names of its layers and ops, in their order.
        weight_bytes: Of the weights that the device holds for it.
        received_bytes: Of what it gets from earlier stages for one micro-batch of the costs.
        cost: Seconds of its layers, as measured or estimated, for that micro-batch.
        shared: The paths of weights that it uses and an earlier stage holds.
        model: Its graph.
        reads: Which tensors of the flat graph its inputs are: `keys`.
        makes: Which its outputs are.
    """

    device: str
    layers: tuple[str, ...]
    weight_bytes: int
    received_bytes: int
    cost: float
    shared: tuple[str, ...]
    model: keras.Model = dataclasses.field(repr=False)
    reads: tuple[int, ...] = dataclasses.field(repr=False)
    makes: tuple[int, ...] = dataclasses.field(repr=False)


def keys(flat: keras.Model) -> dict[int, int]:
    """`id(tensor) -> key`: the inputs of a flat graph, then all else in its order."""
    tensors = [*flat.inputs, *(x for call in nodes.calls(flat) for x in call.outputs)]
    return {id(x): key for key, x in enumerate(tensors)}


def make_stages(
    flat: keras.Model,
    positions: Sequence[int],
    devices: Sequence[str],
    costs: Sequence[LayerCost],
) -> tuple[Stage, ...]:
    """Cut a flat graph; the stages share its layers.

    Args:
        flat: A Functional model, e.g. from `tfcompress.expand`.
        positions: From `partition`.
        devices: One for each stage.
        costs: Of the calls of the graph.

    Returns:
        The stages in their order.
    """
    calls, key_of = nodes.calls(flat), keys(flat)
    wanted = {id(x) for x in flat.outputs}
    received = received_bytes(costs)
    seen: dict[int, keras.Variable] = {}
    stages: list[Stage] = []
    for device, (begin, end) in zip(devices, itertools.pairwise(positions), strict=True):
        own, later = calls[begin:end], calls[end:]
        read_later = {id(x) for call in later for x in call.inputs} | wanted
        made = {id(x): x for call in own for x in call.outputs}
        reads = {id(x): x for call in own for x in call.inputs if id(x) not in made}
        makes = {key: x for key, x in made.items() if key in read_later}
        used = {id(v): v for call in own for v in layer_costs.variables(call)}
        new = {key: variable for key, variable in used.items() if key not in seen}
        stages.append(
            Stage(
                device=device,
                layers=tuple(call.operation.name for call in own),
                weight_bytes=sum(map(layer_costs.num_bytes, new.values())),
                received_bytes=int(received[begin, end]),
                cost=sum(cost.forward + cost.backward for cost in costs[begin:end]),
                shared=tuple(used[key].path for key in used if key in seen),
                model=_graph(f"{flat.name}_stage_{len(stages)}", own, reads, makes),
                reads=tuple(key_of[key] for key in reads),
                makes=tuple(key_of[key] for key in makes),
            )
        )
        seen |= new
    return tuple(stages)


def _graph(name, calls, reads, makes) -> keras.Model:
    inputs = [
        keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=f"input_{place}")
        for place, x in enumerate(reads.values())
    ]
    tensors = dict(zip(reads, inputs, strict=True))
    fill(
        calls,
        tensors,
        lambda call, args, kwargs: nodes.record_call(call.operation, args, kwargs, call.outputs),
    )
    return keras.Model(inputs, [tensors[key] for key in makes], name=name)
