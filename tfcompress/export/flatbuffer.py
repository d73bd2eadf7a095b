"""A LiteRT file changed after its conversion: weights on their own grids, 4 bits, borders."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from tfcompress.artefact import litert_schema
from tfcompress.optional import require

# The converter writes weights as integers up to this one.
_LARGEST = 127
_LARGEST_INT4 = 7
# Of a step of the converter's: what lies on its grid is at most half a step off (and rounding).
_HALF_STEP = 0.51
# Of a step of the weights' grid. Float32 rounding stays below a tenth of it.
_TOLERANCE = 1e-3
_SAMPLE = 64
# Of a step of the output: what rounding a bias may add in 4 bits, whose steps are coarse.
_BIAS_ERROR = 0.1
# Where operators have their weights and their bias, among their inputs.
_WEIGHTS = {
    "FULLY_CONNECTED": (1, 2),
    "CONV_2D": (1, 2),
    "DEPTHWISE_CONV_2D": (1, 2),
    "TRANSPOSE_CONV": (1, 3),
    "BATCH_MATMUL": (1, None),
}
# Since which version they read 4 bits (tensorflow/lite/tools/versioning/op_version.cc).
_INT4_VERSIONS = {"FULLY_CONNECTED": 10, "CONV_2D": 7, "DEPTHWISE_CONV_2D": 7}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """One weight of a model, a row for each output channel, with the grid that each row lies on.

    Args:
        values: Floats of shape `(channels, weights of one channel)`.
        steps: For each row its largest integer, 1 to 127, on the coarsest grid that all of the row
            lies on; 0 where there is none.
    """

    values: np.ndarray
    steps: np.ndarray

    @property
    def codes(self) -> np.ndarray:
        """What the converter writes for the values, before it rounds to integers."""
        return self.values * _over(_LARGEST, np.abs(self.values).max(axis=1))[:, None]

    @property
    def integers(self) -> np.ndarray:
        """The values in steps of their own grid; 0 in a row that has none."""
        scale = _over(self.steps, np.abs(self.values).max(axis=1))
        return np.round(self.values * scale[:, None]).astype(np.int32)


def rows_of(values: np.ndarray, axes: Sequence[int]) -> Rows:
    """A weight as rows, with the grids found in it.

    Args:
        values: The weight, floats of any shape.
        axes: The axes that share one scale.

    Returns:
        `Rows`.

    Example:

    >>> rows = rows_of(np.array([[0.3, 1.0], [-0.2, 0.25]]), axes=(0,))
    >>> rows.steps, rows.integers.tolist()
    (array([3, 4]), [[3, -2], [4, 1]])
    """
    values = np.asarray(values, np.float64)
    free = [axis for axis in range(values.ndim) if axis not in axes]
    count = int(np.prod([values.shape[axis] for axis in free], dtype=np.int64))
    rows = values.transpose(*free, *axes).reshape(count, -1)
    return Rows(rows, _coarsest(rows))


def _coarsest(rows) -> np.ndarray:
    largest = np.abs(rows).max(axis=1, initial=0.0)
    steps = np.zeros(len(rows), np.int64)
    left = np.arange(len(rows))
    for candidate in range(1, _LARGEST + 1):
        scale = _over(candidate, largest[left])[:, None]
        # Most rows that fail do so in a few values.
        likely = np.flatnonzero(_is_whole(rows[left, :_SAMPLE] * scale))
        fits = left[likely[_is_whole(rows[left[likely]] * scale[likely])]]
        steps[fits] = candidate
        left = left[steps[left] == 0]
    return steps


def _is_whole(scaled) -> np.ndarray:
    return np.abs(scaled - np.round(scaled)).max(axis=1, initial=0.0) < _TOLERANCE


def _over(a, b) -> np.ndarray:
    """`a / b`, and 0 where `b` is."""
    b = np.asarray(b, np.float64)
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def regrid(content: bytes, weights: Sequence[Rows], int4: Collection[str] = ()) -> bytes:
    """Write weights on the grids they lie on, where the converter has rounded them to its own.

    The converter writes a channel as `round(127 w / max|w|)`. That is exact for a grid whose
    largest integer is 127, and for no other: not for 4 bits, learned or clipped scales and powers
    of two. From these integers, the grid's own follow; so they do behind a batch normalization,
    which multiplies a channel by one number.

    Args:
        content: A `.tflite` file.
        weights: Weights of the model that was converted; those found in the file are written anew.
        int4: Operators whose weights are stored in 4 bits, where they lie on a grid that has them.

    Returns:
        The file with these weights, and biases to match; `content` where there is nothing to do.
    """
    coarse = [rows for rows in weights if np.any((rows.steps > 0) & (rows.steps < _LARGEST))]
    if not coarse:
        return content
    file = _File(content)
    for graph in file.model.subgraphs:
        _Regrid(file, graph, coarse, frozenset(int4)).run()
    return file.content()


class _Regrid:
    """The weights of one subgraph."""

    def __init__(self, file, graph, weights, int4):
        self.file, self.graph, self.weights, self.int4 = file, graph, weights, int4
        self.changed: dict[int, np.ndarray] = {}  # Tensor -> by what each of its scales has grown.
        self.kept: set[int] = set()

    def run(self):
        for operator in self.graph.operators:
            self._visit(operator, self.file.name(operator))
        for operator in self.graph.operators:
            self._follow(operator, self.file.name(operator))

    def _visit(self, operator, name):
        place, _ = _WEIGHTS.get(name, (None, None))
        if place is None or operator.inputs[place] in self.changed:
            return
        tensor = self.graph.tensors[operator.inputs[place]]
        codes = self.file.weights(tensor)
        found = None if codes is None else _find(codes, self.weights)
        if found is None:
            return
        sign, rows = found
        readers = self._readers(operator.inputs[place])
        fits = np.all((rows.steps > 0) & (rows.steps <= _LARGEST_INT4))
        pack = fits and all(self._takes_int4(o, tensor, rows) for o in readers)
        # A multiple of the grid's integers is as exact, and keeps the steps of the bias fine.
        factor = 1 if pack else np.maximum(_LARGEST // np.maximum(rows.steps, 1), 1)
        largest = np.where(rows.steps == 0, _LARGEST, rows.steps * factor)
        integers = sign * rows.integers * np.reshape(factor, (-1, 1))
        integers = np.where((rows.steps == 0)[:, None], codes, integers)
        self.changed[operator.inputs[place]] = _LARGEST / largest
        self.file.write_weights(tensor, integers, _LARGEST / largest, pack)
        for reader in readers if pack else ():
            self.file.require_version(reader, _INT4_VERSIONS[self.file.name(reader)])

    def _readers(self, index):
        return [o for o in self.graph.operators if index in np.atleast_1d(o.inputs)]

    def _takes_int4(self, operator, weights, rows) -> bool:
        name = self.file.name(operator)
        if name not in self.int4 or name not in _INT4_VERSIONS:
            return False
        if self.graph.tensors[operator.inputs[0]].type != self.file.types.INT8:
            # LiteRT has no kernel for a depthwise convolution of floats with 4-bit weights.
            return name != "DEPTHWISE_CONV_2D"
        return self._bias_is_fine(operator, weights, rows)

    def _bias_is_fine(self, operator, weights, rows) -> bool:
        """Whether the steps of the bias, those of input times weights, stay below the output's."""
        source, target = (
            self.graph.tensors[each].quantization.scale[0]
            for each in (operator.inputs[0], operator.outputs[0])
        )
        largest = np.abs(rows.values).max(axis=1)
        scale = np.asarray(weights.quantization.scale) * _LARGEST / rows.steps
        steps = np.where(largest > 0, source * scale, 0.0)
        return bool(steps.max() / 2 <= _BIAS_ERROR * target)

    def _follow(self, operator, name):
        """The scale of a bias is that of the input times that of the weights."""
        place, bias = _WEIGHTS.get(name, (None, None))
        if bias is None or len(operator.inputs) <= bias or operator.inputs[bias] < 0:
            return
        grown = self.changed.get(operator.inputs[place])
        tensor = self.graph.tensors[operator.inputs[bias]]
        if grown is None or tensor.type != self.file.types.INT32:
            return
        if operator.inputs[bias] not in self.kept:
            self.kept.add(operator.inputs[bias])
            self.file.write_bias(tensor, grown)


def _find(codes, weights):
    """`(signs, rows)` of the weight that the converter has written as `codes`, or None."""
    for rows in weights:
        if rows.values.shape != codes.shape:
            continue
        # A batch normalization may have turned the sign of a channel.
        sign = np.where(np.sum(codes * rows.codes, axis=1) < 0, -1, 1)[:, None]
        if np.abs(codes - sign * rows.codes).max(initial=0.0) < _HALF_STEP:
            return sign, rows
    return None


class _File:
    """A file as objects that can be changed."""

    def __init__(self, content: bytes):
        schema = litert_schema()
        self._schema = schema
        self.types = schema.TensorType
        self.model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
        self._names = {v: k for k, v in vars(schema.BuiltinOperator).items() if k[0] != "_"}

    def content(self) -> bytes:
        self._empty_unused()
        builder = require("flatbuffers", extra="litert").Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def name(self, operator) -> str:
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def require_version(self, operator, version):
        code = self.model.operatorCodes[operator.opcodeIndex]
        code.version = max(code.version, version)

    def weights(self, tensor) -> np.ndarray | None:
        """Constant int8 weights as rows, one for each scale; None if they are something else."""
        data = self.model.buffers[tensor.buffer].data
        if tensor.type != self.types.INT8 or data is None or tensor.quantization is None:
            return None
        if np.any(tensor.quantization.zeroPoint) or not np.size(tensor.quantization.scale):
            return None
        values = np.asarray(data, np.uint8).view(np.int8).reshape(tensor.shape)
        if np.size(tensor.quantization.scale) == 1:
            return values.reshape(1, -1)
        axis = tensor.quantization.quantizedDimension
        return np.moveaxis(values, axis, 0).reshape(tensor.shape[axis], -1)

    def write_weights(self, tensor, rows, grown, pack):
        shape, axis = list(tensor.shape), tensor.quantization.quantizedDimension
        if len(rows) == 1:
            values = rows
        else:
            moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
            values = np.moveaxis(rows.reshape(moved), 0, axis)
        values = values.astype(np.int8).reshape(-1)
        tensor.type = self.types.INT4 if pack else self.types.INT8
        tensor.buffer = self._new_buffer(_pack_int4(values) if pack else values.view(np.uint8))
        _grow(tensor, grown)

    def write_bias(self, tensor, grown):
        data = np.asarray(self.model.buffers[tensor.buffer].data, np.uint8).view(np.int32)
        values = np.round(data / grown).astype(np.int32)
        tensor.buffer = self._new_buffer(values.view(np.uint8))
        _grow(tensor, grown)

    def _empty_unused(self):
        tensors = [tensor for graph in self.model.subgraphs for tensor in graph.tensors]
        used = {each.buffer for each in (*tensors, *(self.model.metadata or ()))}
        for index, buffer in enumerate(self.model.buffers):
            if index not in used:
                buffer.data = None

    def _new_buffer(self, data) -> int:
        buffer = self._schema.BufferT()
        buffer.data = data
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1


def _grow(tensor, grown):
    scale = np.asarray(tensor.quantization.scale, np.float64) * grown
    tensor.quantization.scale = scale.astype(np.float32)


def _pack_int4(values: np.ndarray) -> np.ndarray:
    """Two signed 4-bit integers a byte, the low nibble first."""
    nibbles = np.append(values, np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    return nibbles[0::2] | (nibbles[1::2] << 4)


def ordered_inputs(content: bytes, names: Sequence[str]) -> bytes:
    """Put the inputs of a file into this order; the converter's is by chance.

    Args:
        content: A `.tflite` file with one signature.
        names: Those of the inputs, as in the signature; the file may have fewer.

    Returns:
        The file; `content` itself, if they are in order.
    """
    file = _File(content)
    graph, signature = file.model.subgraphs[0], file.model.signatureDefs[0]
    index = {each.name.decode(): each.tensorIndex for each in signature.inputs}
    inputs = [index[name] for name in names if name in index]
    if inputs == list(graph.inputs):
        return content
    graph.inputs = inputs
    return file.content()


def integer_borders(content: bytes) -> bytes:
    """Let a full-int8 file take and give the integers that it computes with.

    Args:
        content: A `.tflite` file whose floating-point inputs are quantized at once, and whose
            floating-point outputs are dequantized at the very end.

    Returns:
        The file without these conversions. Its inputs and outputs have scales and zero points.

    Raises:
        ValueError: An operator computes with a floating-point input or output.
    """
    file = _File(content)
    graph = file.model.subgraphs[0]
    moved = {}
    for index in graph.inputs:
        if graph.tensors[index].type == file.types.FLOAT32:
            moved[index] = _only(file, graph, index, "QUANTIZE", "inputs").outputs[0]
    for index in graph.outputs:
        if graph.tensors[index].type == file.types.FLOAT32:
            moved[index] = _only(file, graph, index, "DEQUANTIZE", "outputs").inputs[0]
    _move(file, graph, moved)
    return file.content()


def _only(file, graph, index, name, side):
    """The one operator at a border, which must be a conversion."""
    found = [o for o in graph.operators if index in np.atleast_1d(getattr(o, side))]
    if len(found) != 1 or file.name(found[0]) != name:
        raise ValueError(
            f"{graph.tensors[index].name.decode()!r} among the {side[:-1]}s of the file is read or "
            f"written in float by {[file.name(o) for o in found]}"
        )
    return found[0]


def _move(file, graph, moved: dict[int, int]):
    ends = set(moved)
    graph.operators = [
        operator
        for operator in graph.operators
        if not (
            file.name(operator) in ("QUANTIZE", "DEQUANTIZE")
            and ends & {*operator.inputs, *operator.outputs}
        )
    ]
    graph.inputs = np.array([moved.get(i, i) for i in graph.inputs], np.int32)
    graph.outputs = np.array([moved.get(i, i) for i in graph.outputs], np.int32)
    for signature in file.model.signatureDefs or ():
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            entry.tensorIndex = moved.get(entry.tensorIndex, entry.tensorIndex)
