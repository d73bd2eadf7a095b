"""Model parallelism within layers: columns of a kernel, and rows of the next one, split."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfcompress.graph import groups as coupled
from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import Uses, fill, new_input
from tfcompress.graph.shrink import Plan
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.devices import build_beside, move
from tfcompress.parallel.costs import num_bytes
from tfcompress.parallel.pipeline import check_devices

_log = logging.getLogger("tfcompress")


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Layers whose units (neurons, heads) are split over the devices.

    Args:
        name: Of the units: the path of the first weight that makes them, and its axis.
        layers: The names of the layers and ops that work on a part of the units on each device.
        units: How many each device has.
        weight_bytes: Of its weights, that each device holds.
    """

    name: str
    layers: tuple[str, ...]
    units: tuple[int, ...]
    weight_bytes: tuple[int, ...]


class TensorParallel(keras.Model):
    """A model whose widest layers are split over several devices.

    In a pair of `Dense` or `EinsumDense` layers the kernel of the first is split by columns and
    that of the second by rows, so that what lies between, activations, dropout or the heads of an
    attention, runs on a part of the units without any exchange: `Y = act(X A) B = sum_d act(X A_d)
    B_d`. The sums are exchanged, once a pair. All other layers lie on the first device.

    It is a Keras model: `compile`, `fit`, `evaluate` and `predict` it. Outputs, gradients and
    trained weights are those of `model` on one device, to rounding. Dropout between the layers of a
    pair draws other masks, equally distributed; an optimizer that uses norms of whole weights
    (`clipnorm`, LAMB, Adafactor, Muon) sees those of the parts.

    Not covered by tests: GPUs, several machines, mixed precision.

    Weights of layers that are not split stay those of `model`. The split ones are new variables,
    copies of the parts: `gather()` writes them back to `model`, which keeps its own in the
    meantime.

    Args:
        model: Any built model; see `tfcompress.expand`. Set `trainable` before.
        devices: Names such as `["GPU:0", "GPU:1"]`, two or more.

    Attributes:
        model: The model that was passed.
        regions: A `Region` for each pair, or attention, that is split.
        skipped: `{name of the units: why they are not split}`.

    Raises:
        ValueError: An unknown device, or nothing in the model that can be split.

    Example:

    >>> layers = [keras.layers.Dense(64, activation="relu", name="up"), keras.layers.Dense(8)]
    >>> model = keras.Sequential([keras.Input((16,)), *layers], name="model")
    >>> halves = TensorParallel(model, ["CPU:0", "CPU:0"])
    >>> [(region.name, region.units) for region in halves.regions]
    [('model/up/kernel:1', (32, 32))]
    >>> x = keras.random.normal((4, 16))
    >>> bool(keras.ops.max(keras.ops.abs(halves(x) - model(x))) < 1e-5)
    True

    Reference: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053 (Megatron-LM).
    """

    def __init__(self, model: keras.Model, devices: Sequence[str]):
        devices = check_devices(devices)
        if len(devices) < 2:
            raise ValueError(f"devices must be two or more, got {devices}.")
        super().__init__(name=f"{model.name}_parallel", dtype=model.dtype_policy)
        flat = expand(model)
        chosen, skipped = _choose(flat, len(devices))
        if not chosen:
            raise ValueError(
                f"No layers of {model.name!r} can be split over {len(devices)} devices: {skipped}."
            )
        splits = _splits(model, flat, chosen, devices)
        self.graph = _rebuilt(flat, chosen, splits)
        self._told = _Told(model, splits, skipped)
        split = {id(v) for layer in splits for v in layer.variables}
        move([v for v in self.graph.variables if id(v) not in split], devices[0])
        self.built = True
        _log.info("TensorParallel splits %s, not %s", [each.name for each in chosen], skipped)

    @property
    def model(self) -> keras.Model:
        """The model that was passed."""
        return self._told.model

    @property
    def regions(self) -> list[Region]:
        """What is split."""
        return [layer.region() for layer in self._told.splits]

    @property
    def skipped(self) -> dict[str, str]:
        """What is not split, and why."""
        return self._told.skipped

    def compile(self, *args, jit_compile=False, **kwargs):
        """As Keras's; without `jit_compile`, for XLA cannot compile across devices."""
        if jit_compile is True:
            raise ValueError(
                "XLA cannot compile a step over several devices, got jit_compile=True. Leave "
                "it out."
            )
        super().compile(*args, jit_compile=False, **kwargs)
        build_beside(self.optimizer, self.trainable_variables)

    def call(self, inputs, training=None):
        """The outputs of the model."""
        return self.graph(inputs, training=training)

    def get_config(self):
        """Refused: what is saved is the model that it was made from."""
        raise NotImplementedError(
            "A TensorParallel model is not saved: save gather(), which is the model that it was "
            "made from, with the trained weights."
        )

    def gather(self) -> keras.Model:
        """Write the trained weights back.

        Returns:
            The model that was passed, with the weights that this one has now.
        """
        for layer in self._told.splits:
            layer.gather()
        return self.model


@dataclasses.dataclass(frozen=True, eq=False)
class _Told:
    """What Keras is not to track."""

    model: keras.Model
    splits: list
    skipped: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A group of units, the calls that work on a part of them, and those that sum over them."""

    group: coupled.Group
    inside: list[int]
    ends: list[int]
    reads: list[keras.KerasTensor]
    coupling: coupled.Coupling

    @property
    def name(self) -> str:
        return self.group.name


def _choose(flat, number) -> tuple[list[_Pair], dict[str, str]]:
    """The groups to split, the largest first where two cannot both be, and why others are not."""
    coupling = coupled.Coupling(flat)
    uses = Uses(flat)
    found, skipped = [], {}
    for group in coupled.groups(coupling):
        pair = _pair(group, coupling, uses, number)
        if isinstance(pair, str):
            skipped[group.name] = pair
        else:
            found.append(pair)
    chosen, taken = [], set()
    for pair in sorted(found, key=_size, reverse=True):
        places = {*pair.inside, *pair.ends}
        if places & taken:
            skipped[pair.name] = "its layers are split by other units"
        else:
            chosen.append(pair)
            taken |= places
    return sorted(chosen, key=lambda pair: pair.inside[0]), skipped


def _size(pair) -> int:
    return sum({id(m.variable): num_bytes(m.variable) for m in pair.group.members}.values())


def _pair(group, coupling, uses, number) -> _Pair | str:
    """The calls of a group, or why they cannot run on parts of its units."""
    if group.size < number:
        return f"{group.size} units for {number} devices"
    if any(group.dim in dim.leaves() for _, dim in coupling.statistics):
        return "a norm takes its statistics over all units"

    def is_split(x):
        return any(
            dim is not None and group.dim in dim.leaves() for dim in coupling.flows[id(x)].axes
        )

    inside, ends = [], []
    for place, call in enumerate(uses.calls):
        if any(map(is_split, call.outputs)):
            inside.append(place)
        elif any(map(is_split, call.inputs)):
            ends.append(place)
    calls = uses.calls
    for place in ends:
        if not isinstance(calls[place].operation, (keras.layers.Dense, keras.layers.EinsumDense)):
            return f"{calls[place].operation.name} reads all of them"
    if not inside or not ends:
        return "no pair of layers makes and reads them"
    members = {id(member.variable) for member in group.members}
    for place in (*inside, *ends):
        layer = calls[place].operation
        if not isinstance(layer, keras.layers.Layer):
            continue
        if uses.is_shared(calls[place]) and layer.weights:
            return f"{layer.name} is called more than once"
        weights = [v for v in layer.weights if not (place in ends and v is layer.bias)]
        if any(id(variable) not in members for variable in weights):
            return f"{layer.name} has weights that all units share"
        if any(variable.constraint is not None for variable in weights):
            return f"{layer.name} has a constraint"
    owners = [
        call.operation
        for call in calls
        if isinstance(call.operation, keras.layers.Layer)
        and any(id(variable) in members for variable in call.operation.weights)
    ]
    own = {id(calls[place].operation) for place in (*inside, *ends)}
    if any(id(layer) not in own for layer in owners):
        return "a weight is tied to another layer"
    made = {id(x) for place in inside for x in calls[place].outputs}
    reads = {
        id(x): x for place in (*inside, *ends) for x in calls[place].inputs if id(x) not in made
    }
    makers = {id(x): place for place, call in enumerate(calls) for x in call.outputs}
    if any(makers.get(key, -1) > ends[0] for key in reads):
        return "its parts lie behind one another"
    return _Pair(group, inside, ends, list(reads.values()), coupling)


def _splits(model, flat, chosen, devices) -> list[_Split]:
    calls = nodes.calls(flat)
    shares = {
        pair.name: np.array_split(np.arange(pair.group.size), len(devices)) for pair in chosen
    }
    sizes = {pair.name: pair.group.size for pair in chosen}
    shards: list[list[keras.Model]] = [[] for _ in chosen]
    for number, device in enumerate(devices):
        removed = {
            pair.name: tuple(sorted({*range(pair.group.size)} - {*shares[pair.name][number]}))
            for pair in chosen
        }
        part = Plan(removed, sizes).apply(model)
        small = nodes.calls(part)
        tensors = {
            id(old): new
            for old, new in zip(
                [*flat.inputs, *(x for call in calls for x in call.outputs)],
                [*part.inputs, *(x for call in small for x in call.outputs)],
                strict=True,
            )
        }
        for pair, own in zip(chosen, shards, strict=True):
            own.append(_shard(pair, small, tensors, device))
    return [
        _Split(
            pair, calls, own, [len(each) for each in shares[pair.name]], shares[pair.name], devices
        )
        for pair, own in zip(chosen, shards, strict=True)
    ]


def _shard(pair, small, tensors, device) -> keras.Model:
    """The graph of a group on one device: partial sums, without their bias."""
    reads = [tensors[id(x)] for x in pair.reads]
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in reads]
    values = dict(zip(map(id, reads), inputs, strict=True))

    def call(node, args, kwargs):
        return nodes.record_call(node.operation, args, kwargs, node.outputs)

    fill([small[place] for place in pair.inside], values, call)
    outputs = []
    for place in pair.ends:
        layer = small[place].operation
        is_dense = isinstance(layer, keras.layers.Dense)
        without_bias = {"use_bias": False} if is_dense else {"bias_axes": None}
        config = layer.get_config() | without_bias | {"activation": None}
        linear = type(layer).from_config(config)
        x = linear(values[id(small[place].inputs[0])])
        linear.kernel.assign(layer.kernel)
        outputs.append(x)
    shard = keras.Model(inputs, outputs)
    move(shard.variables, device)
    return shard


class _Split(keras.layers.Layer):
    """The parts of a group on their devices, and the sum of what they give."""

    def __init__(self, pair, calls, shards, units, shares, devices):
        super().__init__(name=f"{calls[pair.inside[0]].operation.name}_split")
        self.shards = shards
        self._about = pair, calls, units, shares, devices
        self.biases = []
        for layer in self._ends():
            bias = layer.bias
            if bias is not None:
                copy = self.add_weight(
                    name=f"{layer.name}_bias",
                    shape=bias.shape,
                    regularizer=bias.regularizer,
                    constraint=bias.constraint,
                    trainable=bias.trainable,
                )
                copy.assign(bias)
                bias = copy
            self.biases.append(bias)
        self.built = True

    def _ends(self) -> list[keras.layers.Layer]:
        """Of the model; an attribute would make Keras train their weights too."""
        pair, calls, *_ = self._about
        return [calls[place].operation for place in pair.ends]

    def call(self, tensors, training=None):
        """The outputs of the layers that end the group."""
        *_, devices = self._about
        parts = [
            _on_device(device, lambda *xs, s=shard: s(list(xs), training=training), tensors)
            for device, shard in zip(devices, self.shards, strict=True)
        ]
        outputs = []
        with tf.device(devices[0]):
            for layer, bias, partial in zip(
                self._ends(), self.biases, zip(*parts, strict=True), strict=True
            ):
                x = tf.add_n(list(partial))
                x = x if bias is None else x + tf.cast(bias, x.dtype)
                outputs.append(x if layer.activation is None else layer.activation(x))
        return outputs

    def compute_output_spec(self, tensors, training=None):
        """As the layers' in the model."""
        pair, calls, *_ = self._about
        return [calls[place].outputs[0] for place in pair.ends]

    def region(self) -> Region:
        pair, calls, units, _, _ = self._about
        return Region(
            pair.name,
            tuple(calls[place].operation.name for place in (*pair.inside, *pair.ends)),
            tuple(units),
            tuple(sum(map(num_bytes, shard.weights)) for shard in self.shards),
        )

    def gather(self) -> None:
        """Write the parts into the weights of the model."""
        pair, calls, _, shares, _ = self._about
        for shard, share in zip(self.shards, shares, strict=True):
            keep = np.zeros(pair.group.size, bool)
            keep[share] = True
            layers = {layer.name: layer for layer in shard.layers}
            for place in (*pair.inside, *pair.ends):
                operation = calls[place].operation
                if isinstance(operation, keras.layers.Layer):
                    # The linear copy of an end has its kernel only, which comes first.
                    for old, new in zip(
                        operation.weights, layers[operation.name].weights, strict=False
                    ):
                        _, dims = pair.coupling.weights[id(old)]
                        index = np.ix_(*(dim.keep({pair.group.dim: keep}) for dim in dims))
                        value = keras.ops.convert_to_numpy(old).copy()
                        value[index] = keras.ops.convert_to_numpy(new)
                        old.assign(value)
        for layer, bias in zip(self._ends(), self.biases, strict=True):
            if bias is not None:
                layer.bias.assign(bias)


def _rebuilt(flat, chosen, splits) -> keras.Model:
    """The flat graph with a `_Split` in the place of each group."""
    calls = nodes.calls(flat)
    inputs = keras.tree.map_structure(new_input, flat.input)
    tensors = dict(zip(map(id, flat.inputs), keras.tree.flatten(inputs), strict=True))
    first = {pair.ends[0]: number for number, pair in enumerate(chosen)}
    skipped = {place for pair in chosen for place in (*pair.inside, *pair.ends)}
    for place, call in enumerate(calls):
        if place in first:
            pair, layer = chosen[first[place]], splits[first[place]]
            outputs = [calls[end].outputs[0] for end in pair.ends]
            given = [tensors[id(x)] for x in pair.reads]
            made = nodes.record_call(layer, (given,), {}, tuple(outputs))
            tensors.update(zip(map(id, outputs), made, strict=True))
        elif place not in skipped:
            fill(
                [call],
                tensors,
                lambda node, args, kwargs: nodes.record_call(
                    node.operation, args, kwargs, node.outputs
                ),
            )
    outputs = keras.tree.map_structure(lambda x: tensors[id(x)], flat.output)
    return keras.Model(inputs, outputs, name=f"{flat.name}_split")


def _on_device(device: str, function: Callable, tensors: Sequence) -> list:
    """Run on a device, and backward too, which TensorFlow would leave to chance."""

    @tf.custom_gradient
    def run(*xs):
        with tf.device(device), tf.GradientTape() as tape:
            tape.watch([x for x in xs if x.dtype.is_floating])
            outputs = tf.nest.flatten(function(*xs))

        def gradients_of(*upstream, variables=()):
            sources = [*(x for x in xs if x.dtype.is_floating), *variables]
            with tf.device(device):
                found = tape.gradient(outputs, sources, list(upstream))
            given = iter(found)
            of_inputs = [next(given) if x.dtype.is_floating else None for x in xs]
            return of_inputs, list(given)

        return outputs, gradients_of

    return tf.nest.flatten(run(*tensors))
