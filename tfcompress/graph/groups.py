"""Which axes of which weights go together: what is removed from one is removed from all of them.

Sizes flow through the flat graph as `dims.Dim`s. Every layer and op that is known here says which
of its axes are the same as those of its inputs and weights; whatever is not known freezes what it
touches. What is left are groups: channels, neurons, heads, hidden widths.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfcompress.graph.dims import Dim, concatenation, cut, product, unify
from tfcompress.keras_hooks import nodes


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """What is known of a tensor.

    Args:
        axes: A dim for each axis; None where the size is not known, as that of the batch.
        zero: For each axis, whether elements whose weights are zero are zero.
    """

    axes: tuple[Dim | None, ...]
    zero: tuple[bool, ...]

    def freeze(self, reason: str, axes: Sequence[int] | None = None) -> None:
        """Let nothing of the axes be removed."""
        for axis in range(len(self.axes)) if axes is None else axes:
            if self.axes[axis] is not None:
                self.axes[axis].freeze(reason)


class Coupling:
    """The dims of every tensor and weight of a flat model.

    Args:
        flat: A Functional model, e.g. from `tfcompress.expand`.

    Attributes:
        flat: The model.
        flows: `id(KerasTensor) -> Flow`.
        weights: `id(variable) -> (variable, dims)`, of the weights whose layers are known.
        statistics: Layers that average over an axis, with its dim: their result depends on how
            many elements there are.
        read: `(id(variable), axis)` of the axes of weights that read channels, not make them.
    """

    def __init__(self, flat: keras.Model):
        self.flat = flat
        self.flows: dict[int, Flow] = {}
        self.weights: dict[int, tuple[keras.Variable, tuple[Dim, ...]]] = {}
        self.statistics: list[tuple[nodes.Call, Dim]] = []
        self.read: set[tuple[int, int]] = set()
        for x in flat.inputs:
            self.flows[id(x)] = self.fresh(x, "it is an input of the model")
        for call in nodes.calls(flat):
            self._trace(call)
        for x in flat.outputs:
            self.flows[id(x)].freeze("it is an output of the model")

    def flow(self, x) -> Flow:
        """Of a tensor, or of a constant among the arguments of a call."""
        if isinstance(x, keras.KerasTensor):
            return self.flows[id(x)]
        shape = np.shape(x)
        axes = tuple(Dim(size, "a constant has it") for size in shape)
        return Flow(axes, (bool(np.all(np.asarray(x) == 0)),) * len(shape))

    def fresh(self, x, reason: str) -> Flow:
        """A tensor about which nothing is known."""
        axes = tuple(None if size is None else Dim(size, reason) for size in x.shape)
        return Flow(axes, (False,) * len(axes))

    def weight(self, variable: keras.Variable, reads: Sequence[int] = ()) -> tuple[Dim, ...]:
        """The dims of a weight, made when it is first asked for; it `reads` along some axes."""
        self.read.update((id(variable), axis % len(variable.shape)) for axis in reads)
        if id(variable) not in self.weights:
            self.weights[id(variable)] = variable, tuple(map(Dim, variable.shape))
        return self.weights[id(variable)][1]

    def _trace(self, call: nodes.Call) -> None:
        rule = rule_of(call.operation)
        flows = None if rule is None else rule(self, call)
        if flows is None:
            name = call.operation.name
            for x in call.inputs:
                self.flows[id(x)].freeze(f"{name} reads it")
            flows = [self.fresh(x, f"{name} makes it") for x in call.outputs]
        for x, flow in zip(
            call.outputs, [flows] if isinstance(flows, Flow) else flows, strict=True
        ):
            self.flows[id(x)] = flow


Rule = Callable[[Coupling, nodes.Call], Any]
_RULES: dict[str, Rule] = {}


def rule(*names: str):
    """Register a rule for layers of `keras.layers`, or ops, of these class names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(operation: keras.Operation) -> Rule | None:
    """The rule of a layer or op; None where its class, or a `call` of its own, is not known."""
    cls = type(operation)
    if not isinstance(operation, keras.layers.Layer):
        return _RULES.get(cls.__name__) if cls.__module__.startswith("keras.") else None
    if cls.__module__.split(".")[0] not in ("keras", "keras_hub"):
        return None
    if getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False):
        return None
    return _RULES.get(cls.__name__)


# What rules are made of.


def broadcast(flows: Sequence[Flow], zero: Callable) -> Flow:
    """Axes of equal size are unified, from the last one backwards; those of size 1 give way."""
    rank = max(len(flow.axes) for flow in flows)
    axes: list[Dim | None] = []
    zeros: list[bool] = []
    for place in range(-rank, 0):
        present = [flow for flow in flows if len(flow.axes) >= -place]
        dims = [flow.axes[place] for flow in present]
        unknown = any(dim is None for dim in dims)
        wide = [dim for dim in dims if dim is not None and dim.size != 1]
        for dim in wide[1:]:
            unify(wide[0], dim)
        if unknown:
            for dim in wide:
                dim.freeze("its size is not known everywhere")
        one = next((dim for dim in dims if dim is not None), None)
        axes.append(None if unknown and not wide else wide[0] if wide else one)
        # A tensor that is broadcast along an axis has no zeros in it.
        flags = [
            flow.zero[place]
            for flow in present
            if flow.axes[place] is None or flow.axes[place].size != 1 or not wide
        ]
        stretched = len(flags) < len(flows)
        zeros.append(zero(flags) if zero is any or not stretched else False)
    return Flow(tuple(axes), tuple(zeros))


_KEEP_ZERO = frozenset(
    [
        "linear",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "gelu",
        "gelu_approximate",
        "silu",
        "swish",
        "tanh",
        "softsign",
        "hard_silu",
        "hard_swish",
        "hard_tanh",
        "celu",
        "tanh_shrink",
        "soft_shrink",
        "hard_shrink",
        "mish",
    ]
)
_ELEMENTWISE = _KEEP_ZERO | frozenset(
    [
        "sigmoid",
        "hard_sigmoid",
        "softplus",
        "exponential",
        "log_sigmoid",
        "sparse_sigmoid",
        "squareplus",
        "threshold",
        "sparse_plus",
    ]
)


def activated(function, flow: Flow) -> Flow:
    """A tensor behind an activation function."""
    name = getattr(function, "__name__", None)
    module = str(getattr(function, "__module__", "")).split(".")[0]
    known = function is None or (name in _ELEMENTWISE and module in ("keras", "keras_hub"))
    if not known:
        flow.freeze(f"the activation {name} mixes it")
    keeps = function is None or (known and name in _KEEP_ZERO)
    return flow if keeps else Flow(flow.axes, (False,) * len(flow.axes))


def channels_of(layer, rank: int) -> int:
    """The axis of the channels."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _spatial(coupling, call, channel: Dim | None, zero: bool, x: Flow) -> Flow:
    """The output of a layer that keeps the batch, makes new positions, and has these channels."""
    output = coupling.fresh(call.outputs[0], f"{call.operation.name} makes it")
    axis = channels_of(call.operation, len(output.axes))
    axes, zeros = list(output.axes), list(output.zero)
    axes[0], axes[axis], zeros[axis] = x.axes[0], channel, zero
    return Flow(tuple(axes), tuple(zeros))


def _read_channels(coupling, call, made: Dim) -> Flow:
    x = coupling.flow(call.inputs[0])
    axis = channels_of(call.operation, len(x.axes))
    unify(x.axes[axis], made)
    return x


def _bias(coupling, layer, channel: Dim) -> None:
    if getattr(layer, "bias", None) is not None:
        unify(coupling.weight(layer.bias)[0], channel)


# Layers with weights.


@rule("Dense")
def _dense(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    read, made = coupling.weight(layer.kernel, [0])
    unify(x.axes[-1], read)
    _bias(coupling, layer, made)
    flow = Flow((*x.axes[:-1], made), (*(False for _ in x.axes[:-1]), True))
    return activated(layer.activation, flow)


@rule("Conv1D", "Conv2D", "Conv3D")
def _conv(coupling, call):
    layer = call.operation
    *taps, read, made = coupling.weight(layer.kernel, [-2])
    _freeze_taps(taps)
    if layer.groups > 1:
        group = Dim(layer.groups)
        unify(made, product([group, Dim(made.size // layer.groups)]))
        read = product([group, read])
    x = _read_channels(coupling, call, read)
    _bias(coupling, layer, made)
    return activated(layer.activation, _spatial(coupling, call, made, True, x))


@rule("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def _transposed(coupling, call):
    layer = call.operation
    *taps, made, read = coupling.weight(layer.kernel, [-1])
    _freeze_taps(taps)
    x = _read_channels(coupling, call, read)
    _bias(coupling, layer, made)
    return activated(layer.activation, _spatial(coupling, call, made, True, x))


@rule("DepthwiseConv1D", "DepthwiseConv2D")
def _depthwise(coupling, call):
    layer = call.operation
    *taps, read, multiplier = coupling.weight(layer.kernel, [-2])
    _freeze_taps(taps)
    x = _read_channels(coupling, call, read)
    made = product([read, multiplier])
    _bias(coupling, layer, made)
    return activated(layer.activation, _spatial(coupling, call, made, True, x))


@rule("SeparableConv1D", "SeparableConv2D")
def _separable(coupling, call):
    layer = call.operation
    *taps, read, multiplier = coupling.weight(layer.depthwise_kernel, [-2])
    *ones, between, made = coupling.weight(layer.pointwise_kernel, [-2])
    _freeze_taps([*taps, *ones])
    x = _read_channels(coupling, call, read)
    unify(between, product([read, multiplier]))
    _bias(coupling, layer, made)
    return activated(layer.activation, _spatial(coupling, call, made, True, x))


def _freeze_taps(dims):
    for dim in dims:
        dim.freeze("it is the size of a window")


@rule("Embedding", "ReversibleEmbedding")
def _embedding(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    rows, made = coupling.weight(layer.embeddings)
    rows.freeze("it is the vocabulary, see tfcompress.prune_vocabulary")
    if not _is_reversed(call):
        return Flow((*x.axes, made), (*(False for _ in x.axes), True))
    if getattr(layer, "tie_weights", True):
        read, rows = made, rows
    else:
        read, rows = coupling.weight(layer.reverse_embeddings)
        rows.freeze("it is the vocabulary, see tfcompress.prune_vocabulary")
    unify(x.axes[-1], read)
    return Flow((*x.axes[:-1], rows), (False,) * len(x.axes))


def _is_reversed(call) -> bool:
    return bool(call.kwargs.get("reverse") or (len(call.args) > 1 and call.args[1]))


@rule("PositionEmbedding")
def _positions(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    rows, made = coupling.weight(layer.position_embeddings)
    rows.freeze("it is the number of positions")
    unify(x.axes[-1], made)
    return Flow(x.axes, (*(False for _ in x.axes[:-1]), True))


@rule("EinsumDense")
def _einsum_dense(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    left, right = layer.equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    summed = [axis for axis, letter in enumerate(kernel) if letter in inputs]
    sizes = dict(zip(kernel, coupling.weight(layer.kernel, summed), strict=True))
    flows = dict(zip(nodes.axis_names(inputs, len(x.axes)), x.axes, strict=True))
    for letter in set(flows) & set(sizes):
        unify(flows[letter], sizes[letter])
    dims = flows | sizes
    letters = nodes.axis_names(right, len(call.outputs[0].shape))
    if layer.bias is not None:
        axes = [x for x in right.replace("...", "") if x in layer.bias_axes]
        for dim, letter in zip(coupling.weight(layer.bias)[-len(axes) :], axes, strict=True):
            if letter in dims and dims[letter] is not None:
                unify(dim, dims[letter])
            else:
                dim.freeze("it is a bias of positions")
    biased = set(layer.bias_axes or "") if layer.bias is not None else set(letters)
    made = [letter in kernel and letter in biased for letter in letters]
    return activated(layer.activation, Flow(tuple(dims[x] for x in letters), tuple(made)))


@rule("BatchNormalization", "Normalization")
def _batch_norm(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    if type(layer).__name__ == "Normalization":
        x.freeze(f"{layer.name} has constants for it")
        return x
    axis = layer.axis % len(x.axes)
    for variable in layer.weights:
        if len(variable.shape) == 1:
            unify(coupling.weight(variable)[0], x.axes[axis])
    zero = list(x.zero)
    zero = [False] * len(zero)
    zero[axis] = bool(layer.scale) or x.zero[axis]
    return Flow(x.axes, tuple(zero))


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    axes = [axis % len(x.axes) for axis in axes]
    for variable in layer.weights:
        for dim, axis in zip(coupling.weight(variable), axes, strict=True):
            unify(dim, x.axes[axis])
    scaled = any(getattr(layer, name, None) is not None for name in ("gamma", "scale"))
    if len(axes) > 1 or not x.zero[axes[0]] or not scaled:
        x.freeze(f"{layer.name} averages over it", axes)
    else:
        coupling.statistics.append((call, x.axes[axes[0]]))
    zero = [False] * len(x.axes)
    zero[axes[0]] = True
    return Flow(x.axes, tuple(zero))


@rule("GroupNormalization")
def _group_norm(coupling, call):
    layer, x = call.operation, coupling.flow(call.inputs[0])
    axis = layer.axis % len(x.axes)
    size = x.axes[axis].size
    groups = size if layer.groups == -1 else layer.groups
    inner = Dim(size // groups, f"{layer.name} averages over it")
    unify(x.axes[axis], product([Dim(groups), inner]))
    for variable in layer.weights:
        unify(coupling.weight(variable)[0], x.axes[axis])
    zero = [False] * len(x.axes)
    zero[axis] = bool(layer.scale)
    return Flow(x.axes, tuple(zero))


@rule("PReLU")
def _prelu(coupling, call):
    x = coupling.flow(call.inputs[0])
    for dim, axis in zip(coupling.weight(call.operation.alpha), x.axes[1:], strict=True):
        if dim.size != 1 and axis is not None:
            unify(dim, axis)
    return x


@rule("LSTM", "GRU", "SimpleRNN")
def _recurrent(coupling, call):
    if not _reads_one(call):
        return None
    x, layer = coupling.flow(call.inputs[0]), call.operation
    made = _units(coupling, layer, x)
    return [_sequence(x, made, len(tensor.shape)) for tensor in call.outputs]


@rule("Bidirectional")
def _bidirectional(coupling, call):
    layer = call.operation
    plain = type(layer.forward_layer).__name__ in ("LSTM", "GRU", "SimpleRNN")
    if not (_reads_one(call) and plain and len(call.outputs) == 1):
        return None
    x = coupling.flow(call.inputs[0])
    one, two = (_units(coupling, each, x) for each in (layer.forward_layer, layer.backward_layer))
    unify(one.axes[0], two.axes[0])  # One configuration makes both.
    if layer.merge_mode == "concat":
        one = Flow((concatenation([one.axes[0], two.axes[0]]),), (one.zero[0] and two.zero[0],))
    return _sequence(x, one, len(call.outputs[0].shape))


def _reads_one(call) -> bool:
    """Whether a recurrent layer starts from zeros: its one other input may be a mask."""
    others = nodes.symbolic_tensors(
        (call.args[1:], {key: x for key, x in call.kwargs.items() if key != "mask"})
    )
    return bool(call.args) and not others


def _sequence(x: Flow, units: Flow, rank: int) -> Flow:
    return Flow(
        (*x.axes[: rank - 1], *units.axes), (*(False for _ in range(rank - 1)), *units.zero)
    )


def _units(coupling, layer, x: Flow) -> Flow:
    """The units of a recurrent layer, as a tensor of one axis."""
    cell = layer.cell
    units, gates = Dim(cell.units), cell.kernel.shape[-1] // cell.units
    bias = getattr(cell, "bias", None)
    for variable in (cell.kernel, cell.recurrent_kernel, bias):
        if variable is not None:
            stacked = product([Dim(gates, "it is the number of gates"), units])
            unify(coupling.weight(variable)[-1], stacked)
    unify(coupling.weight(cell.recurrent_kernel, [0])[0], units)
    unify(coupling.weight(cell.kernel, [0])[0], x.axes[-1])
    if bias is not None and len(bias.shape) == 2:
        coupling.weight(bias)[0].freeze("it is the number of biases")
    # Whatever the gates are, a state of 0 that moves towards 0 stays there.
    return activated(layer.activation, Flow((units,), (True,)))


# Layers and ops without weights.


@rule(
    "ReLU", "LeakyReLU", "ELU", "Dropout", "SpatialDropout1D", "SpatialDropout2D",
    "SpatialDropout3D", "ActivityRegularization", "Identity",
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Gelu", "Silu", "Tanh", "Softsign", "HardSilu",
    "HardTanh", "Celu", "Abs", "Absolute", "Negative", "Square", "Sqrt", "Sin", "Sinh", "Erf",
    "Cast", "StopGradient", "Sign", "Floor", "Ceil", "Round", "ConvertToTensor", "Expm1", "Log1p",
    "Conj", "Real",
)  # fmt: skip
def _zero_to_zero(coupling, call):
    return coupling.flow(call.inputs[0])


@rule(
    "Sigmoid", "HardSigmoid", "Softplus", "LogSigmoid", "Exp", "Cos", "GaussianNoise", "Log",
    "Rsqrt", "Reciprocal", "Clip",
)  # fmt: skip
def _elementwise(coupling, call):
    x = coupling.flow(call.inputs[0])
    return Flow(x.axes, (False,) * len(x.axes))


@rule(*nodes.UNIFORM)
def _uniform(coupling, call):
    x = coupling.flow(call.inputs[0])
    for other in call.inputs[1:]:
        coupling.flow(other).freeze(f"{call.operation.name} reads it")
    return Flow(x.axes, (type(call.operation).__name__ == "ZerosLike",) * len(x.axes))


@rule("Cumsum", "Cumprod")
def _cumulate(coupling, call):
    x, axis = coupling.flow(call.inputs[0]), _parameter(call, "axis")
    if axis is None:
        return None
    x.freeze(f"{call.operation.name} adds it up", [axis])
    zero = list(x.zero)
    zero[axis] = False
    return Flow(x.axes, tuple(zero))


@rule("Activation")
def _activation(coupling, call):
    return activated(call.operation.activation, coupling.flow(call.inputs[0]))


@rule("Softmax", "LogSoftmax")
def _softmax(coupling, call):
    x, axis = coupling.flow(call.inputs[0]), getattr(call.operation, "axis", -1)
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    x.freeze(f"{call.operation.name} mixes it", axes)
    for other in call.inputs[1:]:
        coupling.flow(other).freeze(f"{call.operation.name} reads it")
    return Flow(x.axes, (False,) * len(x.axes))


def _operands(call) -> list:
    flat = keras.tree.flatten((call.args, call.kwargs))
    return [x for x in flat if isinstance(x, keras.KerasTensor) or np.ndim(x) or _is_number(x)]


def _is_number(x) -> bool:
    is_number = isinstance(x, (int, float, np.number)) or keras.ops.is_tensor(x)
    return is_number and not isinstance(x, bool)


@rule("Add", "Subtract", "Maximum", "Minimum", "Average")
def _both(coupling, call):
    flows = [coupling.flow(x) for x in _operands(call)]
    return broadcast(flows, all)


@rule(
    "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd",
    "LogicalNot", "LogicalOr", "LogicalXor",
)  # fmt: skip
def _compare(coupling, call):
    flow = broadcast([coupling.flow(x) for x in _operands(call)], all)
    return Flow(flow.axes, (False,) * len(flow.axes))


@rule("Multiply")
def _either(coupling, call):
    return broadcast([coupling.flow(x) for x in _operands(call)], any)


@rule("Divide", "TrueDivide")
def _divide(coupling, call):
    above, below = (coupling.flow(x) for x in _operands(call))
    below.freeze(f"{call.operation.name} divides by it")
    flow = broadcast([above, below], any)
    zero = above.zero if len(above.axes) == len(flow.axes) else (False,) * len(flow.axes)
    return Flow(flow.axes, zero)


@rule("Concatenate")
def _concatenate(coupling, call):
    flows = [coupling.flow(x) for x in call.inputs]
    rank = len(flows[0].axes)
    place = call.operation.axis % rank
    axes, zero = [], []
    for axis in range(rank):
        dims = [flow.axes[axis] for flow in flows]
        if axis == place:
            axes.append(None if None in dims else concatenation(dims))
        else:
            known = [dim for dim in dims if dim is not None]
            for dim in known[1:]:
                unify(known[0], dim)
            axes.append(dims[0])
        zero.append(all(flow.zero[axis] for flow in flows))
    return Flow(tuple(axes), tuple(zero))


@rule(
    "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D",
    "AveragePooling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D",
    "Cropping2D", "Cropping3D", "UpSampling1D", "UpSampling2D", "UpSampling3D",
    "AdaptiveAveragePooling2D",
)  # fmt: skip
def _pooling(coupling, call):
    x = coupling.flow(call.inputs[0])
    axis = channels_of(call.operation, len(x.axes))
    return _spatial(coupling, call, x.axes[axis], x.zero[axis], x)


@rule("Pad")
def _pad(coupling, call):
    x, widths = coupling.flow(call.inputs[0]), _parameter(call, "pad_width")
    values = [*call.args[1:], *call.kwargs.values()]
    if len(widths) != len(x.axes) or any(value not in (None, 0) for value in values):
        return None
    padded = [axis for axis, width in enumerate(widths) if tuple(width) != (0, 0)]
    x.freeze(f"{call.operation.name} pads it", padded)
    made = coupling.fresh(call.outputs[0], f"{call.operation.name} makes it").axes
    axes = [made[i] if i in padded else dim for i, dim in enumerate(x.axes)]
    return Flow(tuple(axes), x.zero)


@rule("Padder")  # KerasHub's Whisper has it: it pads the second of three axes with zeros.
def _padder(coupling, call):
    x = coupling.flow(call.inputs[0])
    return _spatial(coupling, call, x.axes[2], x.zero[2], x)


@rule(
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D",
)  # fmt: skip
def _global_pooling(coupling, call):
    x = coupling.flow(call.inputs[0])
    axis = channels_of(call.operation, len(x.axes))
    if getattr(call.operation, "keepdims", False):
        return _spatial(coupling, call, x.axes[axis], x.zero[axis], x)
    return Flow((x.axes[0], x.axes[axis]), (False, x.zero[axis]))


@rule("Flatten")
def _flatten(coupling, call):
    x = coupling.flow(call.inputs[0])
    inner = list(range(1, len(x.axes)))
    if getattr(call.operation, "data_format", None) == "channels_first" and len(inner) > 1:
        inner = [*inner[1:], inner[0]]
    if not inner or any(x.axes[axis] is None for axis in inner):
        return None
    zero = x.zero[inner[-1]]
    return Flow((x.axes[0], product([x.axes[axis] for axis in inner])), (False, zero))


@rule("Reshape")
def _reshape(coupling, call):
    x, shape = coupling.flow(call.inputs[0]), call.outputs[0].shape
    old = [None if dim is None else dim.size for dim in x.axes]
    head = 0
    while head < min(len(old), len(shape)) and old[head] == shape[head]:
        head += 1
    tail = 0
    while (
        tail < min(len(old), len(shape)) - head and old[-1 - tail] == shape[len(shape) - 1 - tail]
    ):
        tail += 1
    middle = x.axes[head : len(old) - tail]
    wanted = shape[head : len(shape) - tail]
    if None in middle or None in wanted or np.prod(old[head : len(old) - tail]) != np.prod(wanted):
        return None
    made = [Dim(size) for size in wanted]
    if middle and made:
        unify(product(middle), product(made))
    axes = (*x.axes[:head], *made, *x.axes[len(old) - tail :])
    # A removed element is zero wherever it goes to, if it was zero along every axis it came from.
    zeros = bool(middle) and all(
        zero
        for zero, dim in zip(x.zero[head : len(old) - tail], middle, strict=True)
        if not _fixed(dim)
    )
    zero = (*x.zero[:head], *(zeros for _ in made), *x.zero[len(old) - tail :])
    return Flow(axes, zero)


def _fixed(dim: Dim) -> bool:
    return all(leaf.frozen for leaf in dim.leaves())


def _parameter(call, name, default=None):
    return nodes.parameters(call.operation).get(name, default)


@rule("Transpose", "Permute", "Swapaxes", "Moveaxis")
def _transpose(coupling, call):
    x = coupling.flow(call.inputs[0])
    order = np.arange(len(x.axes))
    kind = type(call.operation).__name__
    if kind == "Permute":
        order = np.array([0, *call.operation.dims])
    elif kind == "Transpose":
        order = _parameter(call, "axes") or order[::-1]
    elif kind == "Swapaxes":
        order = np.arange(len(x.axes))
        one, two = _parameter(call, "axis1"), _parameter(call, "axis2")
        order[one], order[two] = order[two], order[one]
    else:
        order = _moved(len(order), _parameter(call, "source"), _parameter(call, "destination"))
    return Flow(tuple(x.axes[i] for i in order), tuple(x.zero[i] for i in order))


def _moved(rank, source, destination) -> list[int]:
    source, destination = np.atleast_1d(source) % rank, np.atleast_1d(destination) % rank
    order = [axis for axis in range(rank) if axis not in source]
    for place, axis in sorted(zip(destination, source, strict=True)):
        order.insert(place, int(axis))
    return order


@rule("ExpandDims")
def _expand_dims(coupling, call):
    x = coupling.flow(call.inputs[0])
    rank = len(call.outputs[0].shape)
    places = {axis % rank for axis in np.atleast_1d(_parameter(call, "axis"))}
    axes, zero = iter(x.axes), iter(x.zero)
    one = [Dim(1, "of size 1") if axis in places else next(axes) for axis in range(rank)]
    return Flow(tuple(one), tuple(False if axis in places else next(zero) for axis in range(rank)))


@rule("Squeeze")
def _squeeze(coupling, call):
    x, axis = coupling.flow(call.inputs[0]), _parameter(call, "axis")
    rank = len(x.axes)
    if axis is None:
        gone = {i for i, dim in enumerate(x.axes) if dim is not None and dim.size == 1}
    else:
        gone = {each % rank for each in np.atleast_1d(axis)}
    left = [i for i in range(rank) if i not in gone]
    return Flow(tuple(x.axes[i] for i in left), tuple(x.zero[i] for i in left))


@rule("Split")
def _split(coupling, call):
    x = coupling.flow(call.inputs[0])
    axis = _parameter(call, "axis") % len(x.axes)
    sizes = [output.shape[axis] for output in call.outputs]
    if x.axes[axis] is None or None in sizes:
        return None
    return [
        Flow((*x.axes[:axis], part, *x.axes[axis + 1 :]), x.zero)
        for part in cut(x.axes[axis], sizes)
    ]


@rule("GetItem")
def _get_item(coupling, call):
    x, key = coupling.flow(call.args[0]), call.args[1]
    key = key if isinstance(key, tuple) else (key,)
    if len(call.inputs) != 1 or sum(each is Ellipsis for each in key) > 1:
        return None
    hidden = len(x.axes) - sum(each is not None and each is not Ellipsis for each in key)
    if Ellipsis not in key:
        key = (*key, Ellipsis)
    full = []
    for each in key:
        full += [slice(None)] * hidden if each is Ellipsis else [each]
    is_uniform = nodes.is_uniform(nodes.producer(call.args[0]).operation)
    axes, zero, place = [], [], 0
    for each in full:
        if each is None:
            axes.append(Dim(1, "of size 1"))
            zero.append(False)
            continue
        dim, flag = x.axes[place], x.zero[place]
        place += 1
        if isinstance(each, int):
            if dim is not None and not is_uniform:
                dim.freeze("one element of it is read")
            continue
        if not isinstance(each, slice):
            return None
        axes.append(_sliced(dim, each))
        zero.append(flag)
    return Flow(tuple(axes), tuple(zero))


def _sliced(dim: Dim | None, part: slice) -> Dim | None:
    if part == slice(None) or dim is None:
        return dim
    start, stop, step = part.indices(dim.size)
    if step != 1 or stop <= start:
        dim.freeze("it is read in steps")
        return Dim(max(len(range(start, stop, step)), 1), "it is read in steps")
    sizes = start, stop - start, dim.size - stop
    parts = iter(cut(dim, [size for size in sizes if size]))
    return [next(parts) if size else None for size in sizes][1]


@rule("Repeat")
def _repeat(coupling, call):
    x, repeats, axis = (
        coupling.flow(call.inputs[0]),
        *(_parameter(call, name) for name in ("repeats", "axis")),
    )
    if not isinstance(repeats, int) or axis is None or x.axes[axis] is None:
        return None
    axis %= len(x.axes)
    zero = list(x.zero)
    if x.axes[axis].size == 1:
        made, zero[axis] = Dim(repeats), False  # They are all the same, and any of them can go.
    else:
        made = product([x.axes[axis], Dim(repeats, "it is the number of repeats")])
    return Flow((*x.axes[:axis], made, *x.axes[axis + 1 :]), tuple(zero))


@rule("Take")
def _take(coupling, call):
    x, indices = (coupling.flow(each) for each in _operands(call))
    axis = _parameter(call, "axis")
    if axis is None:
        return None
    axis %= len(x.axes)
    x.freeze(f"{call.operation.name} looks it up", [axis])
    axes = (*x.axes[:axis], *indices.axes, *x.axes[axis + 1 :])
    return Flow(axes, (*x.zero[:axis], *(False for _ in indices.axes), *x.zero[axis + 1 :]))


@rule("TakeAlongAxis")
def _take_along_axis(coupling, call):
    x, indices = (coupling.flow(each) for each in _operands(call))
    axis = _parameter(call, "axis")
    if axis is None or len(x.axes) != len(indices.axes):
        return None
    axis %= len(x.axes)
    x.freeze(f"{call.operation.name} looks it up", [axis])
    others = [_without(flow, axis) for flow in (x, indices)]
    both, zero = broadcast(others, any), others[0].zero
    axes = (*both.axes[:axis], indices.axes[axis], *both.axes[axis:])
    return Flow(axes, (*zero[:axis], False, *zero[axis:]))


def _without(flow: Flow, axis: int) -> Flow:
    return Flow(
        (*flow.axes[:axis], *flow.axes[axis + 1 :]), (*flow.zero[:axis], *flow.zero[axis + 1 :])
    )


@rule("Matmul")
def _matmul(coupling, call):
    one, two = (coupling.flow(x) for x in _operands(call))
    if min(len(one.axes), len(two.axes)) < 2:
        return None
    _contract(one, -1, two, -2, call.operation.name)
    deep = max(len(one.axes), len(two.axes)) > 2
    batch = broadcast([_lead(one, 2), _lead(two, 2)], any) if deep else Flow((), ())
    axes = (*batch.axes, one.axes[-2], two.axes[-1])
    return Flow(axes, (*batch.zero, one.zero[-2], two.zero[-1]))


def _lead(flow: Flow, count: int) -> Flow:
    return Flow(flow.axes[:-count], flow.zero[:-count])


def _contract(one: Flow, axis: int, two: Flow, other: int, name: str) -> None:
    """A sum over an axis of two tensors: what is removed must have been zero in one of them."""
    first, second = one.axes[axis], two.axes[other]
    if first is None or second is None:
        for dim in (first, second):
            if dim is not None:
                dim.freeze(f"{name} sums over it")
        return
    unify(first, second)
    if not (one.zero[axis] or two.zero[other]):
        first.freeze(f"{name} sums over it, and it need not be zero")


@rule("Einsum")
def _einsum(coupling, call):
    equation = _parameter(call, "subscripts").replace(" ", "")
    left, right = equation.split("->") if "->" in equation else (equation, None)
    flows = [coupling.flow(x) for x in _operands(call)]
    terms = left.split(",")
    if right is None or "." in equation or any(len(set(x)) < len(x) for x in terms):
        return None
    dims: dict[str, list[tuple[Dim | None, bool]]] = collections.defaultdict(list)
    for term, flow in zip(terms, flows, strict=True):
        for letter, dim, zero in zip(term, flow.axes, flow.zero, strict=True):
            dims[letter].append((dim, zero))
    for letter, found in dims.items():
        known = [dim for dim, _ in found if dim is not None]
        for dim in known[1:]:
            unify(known[0], dim)
        if known and letter not in right and not any(zero for _, zero in found):
            known[0].freeze(f"{call.operation.name} sums over it, and it need not be zero")
        if known and len(known) < len(found):
            known[0].freeze("its size is not known everywhere")
    axes = tuple(dims[letter][0][0] for letter in right)
    return Flow(axes, tuple(any(zero for _, zero in dims[letter]) for letter in right))


@rule("DotProductAttention")
def _attention(coupling, call):
    names = ("query", "key", "value", "bias", "mask", "scale")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    query, key, value = (coupling.flow(given[name]) for name in names[:3])
    heads = {None if flow.axes[2] is None else flow.axes[2].size for flow in (query, key, value)}
    if len(heads) > 1 or None in heads:
        return None
    if given.get("scale") is None:
        # The scale would change with the size of a head.
        query.freeze("its size is the scale", [3])
        key.freeze("its size is the scale", [3])
    unify(query.axes[2], key.axes[2])
    unify(query.axes[2], value.axes[2])
    _contract(query, 3, key, 3, call.operation.name)
    for name in ("bias", "mask"):
        if given.get(name) is not None:
            flow = coupling.flow(given[name])
            if len(flow.axes) == 4 and flow.axes[1] is not None and flow.axes[1].size != 1:
                unify(flow.axes[1], query.axes[2])
    axes = (query.axes[0], query.axes[1], query.axes[2], value.axes[3])
    return Flow(axes, (False, False, value.zero[2], value.zero[3]))


@rule("Sum", "Mean", "Max", "Min", "Prod", "Any", "All", "Argmax", "Var", "Std")
def _reduce(coupling, call):
    x, axis = coupling.flow(call.inputs[0]), _parameter(call, "axis")
    rank = len(x.axes)
    axes = range(rank) if axis is None else [each % rank for each in np.atleast_1d(axis)]
    for each in axes:
        if type(call.operation).__name__ != "Sum" or not x.zero[each]:
            x.freeze(f"{call.operation.name} reduces it", [each])
    keeps = len(call.outputs[0].shape) == rank
    made = [Dim(1, "of size 1") if i in axes else dim for i, dim in enumerate(x.axes)]
    left = [i for i in range(rank) if keeps or i not in axes]
    return Flow(tuple(made[i] for i in left), tuple(x.zero[i] and i not in axes for i in left))


@rule("Where")
def _where(coupling, call):
    condition, *branches = (coupling.flow(x) for x in call.args)
    chosen = broadcast(branches, all)
    both = broadcast([condition, chosen], any)
    zero = chosen.zero if len(chosen.axes) == len(both.axes) else (False,) * len(both.axes)
    return Flow(both.axes, zero)


# Groups.


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An axis of a weight whose elements belong to the units of a group.

    Args:
        variable: The weight.
        axis: Of the weight.
        places: For each element along the axis the unit it belongs to; -1 for none.
        makes: Whether the weight makes the units; others read or scale them.
    """

    variable: keras.Variable
    axis: int
    places: np.ndarray
    makes: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed: channels, neurons, heads.

    Args:
        name: Path of the first weight that makes them, and the axis.
        dim: Its size.
        members: All axes of weights that have them.
    """

    name: str
    dim: Dim
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.dim.size

    @property
    def is_channels(self) -> bool:
        """Whether they are columns of a kernel, and not heads, or groups of channels."""
        return any(
            member.axis == len(member.variable.shape) - 1 > 0 and len(member.places) == self.size
            for member in self.members
        )


def groups(coupling: Coupling) -> list[Group]:
    """What can be removed from a model, in the order of its graph."""
    found: dict[Dim, list[tuple[keras.Variable, int, Dim]]] = {}
    for variable, dims in coupling.weights.values():
        for axis, dim in enumerate(dims):
            for leaf in dict.fromkeys(dim.leaves()):
                if leaf.frozen is None and leaf.size > 1:
                    found.setdefault(leaf, []).append((variable, axis, dim))
    made, names = [], collections.Counter()
    for leaf, axes in found.items():
        members = tuple(
            Member(
                variable,
                axis,
                dim.places(leaf),
                len(variable.shape) > 1 and (id(variable), axis) not in coupling.read,
            )
            for variable, axis, dim in axes
        )
        first = next((member for member in members if member.makes), members[0])
        name = f"{first.variable.path}:{first.axis}"
        names[name] += 1
        made.append(Group(name if names[name] == 1 else f"{name}.{names[name]}", leaf, members))
    return made
