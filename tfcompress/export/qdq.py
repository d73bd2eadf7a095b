"""An ONNX graph with rounded values into one that integer kernels can run.

What comes in has `QuantizeLinear` and `DequantizeLinear` on its activations, and float weights that
lie on grids. What goes out stores these weights as integers with a `DequantizeLinear` behind them,
the form in which ONNX Runtime finds its integer kernels.
"""

import collections
from typing import Any

import numpy as np

from tfcompress.export.grid import find_grid
from tfcompress.optional import require

# By operator: the axis of the output channels in the weight.
_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
_AFFINE = ("Add", "Sub", "Mul")
# These leave the values as they are.
_MOVES = (
    "Flatten", "Identity", "MaxPool", "ReduceMax", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
# What an integer kernel does while it writes its output, and the writing itself.
_WRITES = ("Relu", "Clip", "QuantizeLinear")
_MAKES = (*_WEIGHT_AXIS, "Gemm", "GlobalAveragePool")


class Graph:
    """An ONNX graph with its constants as arrays, and who makes and reads each tensor."""

    def __init__(self, model):
        self.onnx = require("onnx", extra="onnx")
        self.graph = model.graph
        to_array = self.onnx.numpy_helper.to_array
        self.constants = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        inferred = self.onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._shapes = {
            value.name: [d.dim_value or None for d in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input, *inferred.output)
            if value.type.tensor_type.HasField("shape")
        }

    def nodes(self, *types: str) -> list:
        """The nodes of these types, in the order of the graph."""
        return [node for node in self.graph.node if node.op_type in types]

    def maker(self, name: str):
        """The node that makes a tensor, or None."""
        return next((node for node in self.graph.node if name in node.output), None)

    def only_reader(self, name: str):
        """The one node that reads a tensor, if no other does and it is no output."""
        readers = [node for node in self.graph.node if name in node.input]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def shape(self, name: str) -> list[int | None] | None:
        """The shape of a tensor, as far as it is known."""
        return self._shapes.get(name)

    def add_constant(self, name: str, array: np.ndarray) -> str:
        """A new constant, under a name like `name`."""
        while name in self.constants:
            name += "_"
        self.constants[name] = array
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def insert_behind(self, node, type: str, inputs, output: str, **attributes):
        """A new node behind another; returns it."""
        made = self.onnx.helper.make_node(type, inputs, [output], f"{type}_{output}", **attributes)
        self.graph.node.insert(self._index(node) + 1, made)
        return self.graph.node[self._index(node) + 1]

    def move_behind(self, node, other) -> None:
        """Change the place of a node in the list, which is in the order of computation."""
        copy = type(node)()
        copy.CopyFrom(node)
        self.graph.node.remove(node)
        self.graph.node.insert(self._index(other) + 1, copy)

    def _index(self, node) -> int:
        return next(i for i, each in enumerate(self.graph.node) if each is node)

    def insert(self, before, type: str, inputs, output: str, **attributes) -> None:
        """A new node in front of another."""
        node = self.onnx.helper.make_node(type, inputs, [output], f"{type}_{output}", **attributes)
        self.graph.node.insert(self._index(before), node)

    def skip(self, node, kept: str) -> None:
        """Take out a node, the only reader of its input `kept`; its maker takes its place."""
        maker, output = self.maker(kept), node.output[0]
        maker.output[list(maker.output).index(kept)] = output
        self.graph.node.remove(node)

    def drop_unused(self) -> None:
        """Take out the constants that nothing reads."""
        read = collections.Counter(name for node in self.graph.node for name in node.input)
        for tensor in list(self.graph.initializer):
            if not read[tensor.name] and tensor.name not in self.outputs:
                self.graph.initializer.remove(tensor)


def attribute(node, name: str, default: Any) -> Any:
    """An attribute of a node."""
    onnx = require("onnx", extra="onnx")
    found = [each for each in node.attribute if each.name == name]
    return onnx.helper.get_attribute_value(found[0]) if found else default


def store_integers(model) -> None:
    """Store the weights of an ONNX model as integers, in place.

    What follows a linear operator a channel (bias, batch norm) is folded into it first. Weights
    that are on no grid stay float.

    Args:
        model: An `onnx.ModelProto` whose activations are quantized where they are to be.
    """
    graph = Graph(model)
    for node in graph.nodes("QuantizeLinear"):
        if node.input[0] in graph.constants:
            _quantize_constant(graph, node)
    for node in graph.nodes(*_WEIGHT_AXIS):
        # The format has one scale for a channel of all groups of a transposed convolution.
        grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1
        if node.input[1] in graph.constants and not grouped:
            _Linear(graph, node).rewrite()
    for node in graph.nodes("Gather"):
        if node.input[0] in graph.constants:
            _store_table(graph, node)
    for node in graph.nodes("ReduceMean"):
        _pool_globally(graph, node)
    for node in graph.nodes(*_MAKES):
        _write_before_moving(graph, node)
    for node in graph.nodes(*_MOVES):
        _repeat_grid(graph, node)
    graph.drop_unused()


class _Linear:
    """A convolution or a matrix product with constant weights, and the affine map behind it."""

    def __init__(self, graph: Graph, node):
        self.graph, self.node = graph, node
        self.weight = graph.constants[node.input[1]].astype(np.float64)
        self.axis = _WEIGHT_AXIS[node.op_type] % self.weight.ndim
        self.channels = self.weight.shape[self.axis]
        has_bias = len(node.input) > 2
        self.bias = graph.constants[node.input[2]].astype(np.float64) if has_bias else None

    def rewrite(self) -> None:
        """Fold, and store the weight as integers if it lies on a grid."""
        source = self._input_scale()
        shape = self.graph.shape(self.node.input[0])
        reader = self.graph.only_reader(self.node.output[0])
        flattened = reader is not None and reader.op_type == "Reshape"
        matrix = shape is not None and len(shape) == 2 and not flattened
        sequences = self.node.op_type == "MatMul" and not matrix
        if sequences and source is None and not self._can_be_gemm(shape):
            return
        # On sequences, what follows stays in float behind an integer product: rounding a bias to
        # steps of the sum shifts all places alike, which a layer normalization can enlarge.
        apart = sequences and source is not None
        scale, shift, folded = self._nothing() if apart else self._affine()
        rows = self._rows(self.weight) * scale[:, None]
        found = find_grid(rows)
        if found is None:
            return
        for node, kept in folded:
            self.graph.skip(node, kept)
        integers, scales, zero_points = found
        bias = shift if self.bias is None else shift + scale * self.bias
        scales = self._scales_of_zeros(scales, bias)
        if self.node.op_type == "MatMul" and not apart:
            self._make_gemm()
        self._store_weight(integers, scales, zero_points)
        if np.any(bias):
            self._store_bias(bias, scales, source)

    def _can_be_gemm(self, shape) -> bool:
        # A MatMul of floats and integers would have ONNX Runtime round the floats too.
        return self.weight.ndim == 2 and shape is not None and shape[:-1].count(None) <= 1

    def _nothing(self):
        return np.ones(self.channels), np.zeros(self.channels), []

    def _make_gemm(self) -> None:
        """A Gemm, which has a bias and an integer kernel, on inputs of two axes."""
        name, result = self.node.input[0], self.node.output[0]
        *others, inside = self.graph.shape(name)
        self.node.op_type = "Gemm"
        if len(others) == 1:
            return
        shapes = [
            self.graph.add_constant(f"{result}_{kind}", np.array(shape))
            for kind, shape in (
                ("rows", [-1, inside or self.weight.shape[0]]),
                ("shape", [*(n or -1 for n in others), self.channels]),
            )
        ]
        self.graph.insert(self.node, "Reshape", [name, shapes[0]], f"{result}_in_rows")
        self.node.input[0] = f"{result}_in_rows"
        self.node.output[0] = f"{result}_of_rows"
        self.graph.insert_behind(self.node, "Reshape", [self.node.output[0], shapes[1]], result)

    def _rows(self, weight: np.ndarray) -> np.ndarray:
        """`(channels, weights of one channel)`."""
        return np.moveaxis(weight, self.axis, 0).reshape(self.channels, -1)

    def _unrows(self, rows: np.ndarray) -> np.ndarray:
        shape = [*self.weight.shape]
        del shape[self.axis]
        moved = rows.reshape(self.channels, *shape)
        return np.ascontiguousarray(np.moveaxis(moved, 0, self.axis))

    def _affine(self):
        """`(scale, shift)` a channel of what follows, and the nodes that do it."""
        scale, shift, folded = self._nothing()
        name = self.node.output[0]
        places = 0 if self.node.op_type == "MatMul" else self.weight.ndim - 2
        # The last axes of the result, with 1 where one channel takes several places.
        layout = (self.channels, *[1] * places)
        while (node := self.graph.only_reader(name)) is not None:
            if node.op_type in ("Squeeze", "Reshape"):
                layout = self._moved(node, layout)
                if layout is None:
                    break
            else:
                factor = self._factor(node, name, layout)
                if factor is None:
                    break
                if node.op_type == "Mul":
                    scale, shift = scale * factor, shift * factor
                else:
                    shift = shift + (factor if node.op_type == "Add" else -factor)
                folded.append((node, name))
            name = node.output[0]
        return scale, shift, folded

    def _moved(self, node, layout: tuple[int, ...]) -> tuple[int, ...] | None:
        """The layout behind a node that only changes the shape; None if it is lost."""
        before, after = (self.graph.shape(name) for name in (node.input[0], node.output[0]))
        if node.op_type == "Squeeze":
            axes = self.graph.constants.get(node.input[1]) if len(node.input) > 1 else None
            rank = len(layout) + (2 if len(layout) == 1 else 1)
            if axes is None or self.node.op_type == "MatMul":
                return None
            dropped = {int(axis) % rank - rank for axis in axes}
            kept = [axis for axis in range(-len(layout), 0) if axis not in dropped]
            return tuple(layout[axis] for axis in kept) if -len(layout) in kept else None
        if before is None or after is None or tuple(before[-len(layout) :]) != layout:
            return None
        for first in range(len(after) - 1, -1, -1):
            last = after[first:]
            if None not in last and np.prod(last) == self.channels:
                return tuple(last)
        return None

    def _factor(self, node, name: str, layout: tuple[int, ...]) -> np.ndarray | None:
        """What a node adds or multiplies to each channel; None if it does something else."""
        other = [each for each in node.input if each != name]
        if node.op_type not in _AFFINE or len(other) != 1 or other[0] not in self.graph.constants:
            return None
        if node.op_type == "Sub" and node.input[0] != name:
            return None
        value = self.graph.constants[other[0]].astype(np.float64)
        while value.ndim > len(layout) and value.shape[0] == 1:
            value = value[0]
        fits = value.ndim <= len(layout) and all(
            size in (1, channels)
            for size, channels in zip(value.shape[::-1], layout[::-1], strict=False)
        )
        return np.broadcast_to(value, layout).reshape(-1) if fits else None

    def _scales_of_zeros(self, scales, bias) -> np.ndarray:
        """Channels without a weight may have any scale: one that their bias fits."""
        empty = scales == 0
        source = self._input_scale() or 1.0
        fitting = np.abs(bias) / (source * 2.0**20)
        return np.where(empty, np.where(bias == 0, 1.0, fitting), scales).astype(np.float32)

    def _store_weight(self, integers, scales, zero_points) -> None:
        name = self.node.input[1]
        integers = self._unrows(integers)
        inputs = [self.graph.add_constant(f"{name}_integers", integers)]
        inputs.append(self.graph.add_constant(f"{name}_scales", scales))
        inputs.append(self.graph.add_constant(f"{name}_zero_points", zero_points))
        output = f"{inputs[0]}_dequantized"
        self.graph.insert(self.node, "DequantizeLinear", inputs, output, axis=self.axis)
        self.node.input[1] = output

    def _store_bias(self, bias, scales, source: float | None) -> None:
        """As int32 in steps of input times weight, which integer kernels add to their sums."""
        name = f"{self.node.output[0]}_bias"
        if source is None or np.any(np.abs(bias) / (scales * source) > 2.0**31 - 1):
            output = self.graph.add_constant(name, bias.astype(np.float32))
        else:
            steps = (scales * np.float32(source)).astype(np.float32)
            integers = np.round(bias / steps).astype(np.int32)
            inputs = [
                self.graph.add_constant(f"{name}_integers", integers),
                self.graph.add_constant(f"{name}_scales", steps),
                self.graph.add_constant(f"{name}_zero_points", np.zeros_like(integers)),
            ]
            output = f"{inputs[0]}_dequantized"
            self.graph.insert(self.node, "DequantizeLinear", inputs, output, axis=0)
        del self.node.input[2:]
        self.node.input.append(output)

    def _input_scale(self) -> float | None:
        grid = _grid(self.graph, self.node.input[0])
        return None if grid is None else float(self.graph.constants[grid[0]])


def _grid(graph: Graph, name: str) -> list[str] | None:
    """The names of scale and zero point of the grid that a tensor is on, or None."""
    while (maker := graph.maker(name)) is not None and maker.op_type in _MOVES:
        name = maker.input[0]
    on_grid = maker is not None and maker.op_type == "DequantizeLinear"
    scalar = on_grid and not graph.constants[maker.input[1]].ndim
    return list(maker.input[1:3]) if scalar else None


def _quantize_constant(graph: Graph, node) -> None:
    """The converter moves what rounds the result of a lookup to the table."""
    values, scale, zero_point = (graph.constants[name] for name in node.input)
    limits = np.iinfo(zero_point.dtype)
    steps = np.clip(np.round(values / scale) + zero_point, limits.min, limits.max)
    graph.graph.node.remove(node)
    graph.add_constant(node.output[0], steps.astype(zero_point.dtype))


def _store_table(graph: Graph, node) -> None:
    """Look up integers, and dequantize what was found."""
    table = graph.constants[node.input[0]]
    if table.dtype != np.float32 or attribute(node, "axis", 0) != 0:
        return
    found = find_grid(table.reshape(1, -1))
    if found is None:
        return
    integers, scales, zero_points = found
    name = node.input[0]
    result, node.input[0] = (
        node.output[0],
        graph.add_constant(f"{name}_integers", integers.reshape(table.shape)),
    )
    node.output[0] = f"{result}_integers"
    scale = graph.add_constant(f"{name}_scale", (scales[0] or np.float32(1)).reshape(()))
    zero_point = graph.add_constant(f"{name}_zero_point", zero_points[0].reshape(()))
    graph.insert_behind(node, "DequantizeLinear", [node.output[0], scale, zero_point], result)


def _pool_globally(graph: Graph, node) -> None:
    """A mean over all places of an image as a pooling, for which there is an integer kernel."""
    shape = graph.shape(node.input[0]) or ()
    axes = graph.constants.get(node.input[1], ()) if len(node.input) > 1 else ()
    places = sorted(int(axis) % 4 for axis in np.ravel(axes))
    if len(shape) != 4 or places not in ([1, 2], [2, 3]) or _grid(graph, node.input[0]) is None:
        return
    image, result = node.input[0], node.output[0]
    if places == [1, 2]:
        graph.insert(node, "Transpose", [image], f"{result}_image", perm=[0, 3, 1, 2])
        image = f"{result}_image"
    graph.insert(node, "GlobalAveragePool", [image], f"{result}_pooled")
    pooled = f"{result}_pooled"
    if not attribute(node, "keepdims", 1):
        name = graph.add_constant(f"{result}_places", np.array([2, 3]))
        graph.insert(node, "Squeeze", [pooled, name], result)
    elif places == [1, 2]:
        graph.insert(node, "Transpose", [pooled], result, perm=[0, 2, 3, 1])
    else:
        graph.insert(node, "Identity", [pooled], result)
    graph.graph.node.remove(node)


def _write_before_moving(graph: Graph, node) -> None:
    """Let a node be followed by what its kernel does as it writes, and reshape what was written."""
    moving = graph.only_reader(node.output[0])
    if moving is None or moving.op_type not in ("Squeeze", "Reshape"):
        return
    writes, name = [], moving.output[0]
    while (reader := graph.only_reader(name)) is not None and reader.op_type in _WRITES:
        writes.append(reader)
        name = reader.output[0]
        if reader.op_type == "QuantizeLinear":
            break
    if not writes or writes[-1].op_type != "QuantizeLinear":
        return
    first, last = writes[0], writes[-1]
    first.input[0] = node.output[0]
    last.output[0] = f"{name}_written"
    moving.input[0], moving.output[0] = last.output[0], name
    graph.move_behind(moving, last)


def _repeat_grid(graph: Graph, node) -> None:
    """Say that what is moved stays on its grid, so that the next kernel finds it there."""
    grid = _grid(graph, node.output[0])
    result = node.output[0]
    readers = {each.op_type for each in graph.graph.node if result in each.input}
    computing = readers - {*_MOVES, "QuantizeLinear", "Shape"}
    if grid is None or result in graph.outputs or not computing:
        return
    node.output[0] = f"{result}_moved"
    quantize = graph.insert_behind(
        node, "QuantizeLinear", [node.output[0], *grid], f"{result}_integers"
    )
    graph.insert_behind(quantize, "DequantizeLinear", [quantize.output[0], *grid], result)
