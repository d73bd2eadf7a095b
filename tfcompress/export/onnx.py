"""Export to ONNX (`.onnx`), and ONNX Runtime as what runs it."""

import os
import pathlib
import tempfile
from collections.abc import Iterator

import keras
import numpy as np

from tfcompress.artefact import Format, Tensor, register_format
from tfcompress.export.process import convert
from tfcompress.export.program import Program
from tfcompress.export.qdq import Graph, attribute, store_integers
from tfcompress.export.target import NamedRunner, Target
from tfcompress.export.verify import ExportError
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.optional import require

_OPSET = 18
_INTEGER = (
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
    "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QuantizeLinear",
)  # fmt: skip
_COMPARE = ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or")
# They move values, whatever these are.
_MOVES = (
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "ReorderInput",
    "ReorderOutput", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    "Where",
)  # fmt: skip


def _write(program: Program, precision: str, path: pathlib.Path, workspace: pathlib.Path) -> None:
    onnx = require("onnx", extra="onnx")
    require("tf2onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    _refuse_gru(program.model, precision)
    program.save(workspace / "model")
    converted = workspace / "converted.onnx"
    convert(
        {
            "converter": "onnx",
            "saved_model": str(workspace / "model"),
            "output": str(converted),
            "opset": _OPSET,
            "inputs": [spec.name for spec in program.inputs],
        }
    )
    model = onnx.load(converted)
    if precision == "int8":
        store_integers(model)
    if precision == "float16":
        _halve(model)
    onnx.save(model, path)


def _refuse_gru(model, precision):
    """ONNX Runtime 1.32 ends the process on a quantized GRU, and what ends cannot be caught."""
    gru = [layer.name for layer in all_layers(model) if isinstance(layer, keras.layers.GRU)]
    if gru and precision == "int8":
        raise ExportError(
            f"ONNX Runtime aborts on an int8 file with GRU layers ({', '.join(gru)}). Export with "
            'precision="float32", to a .tflite file, or use keras.layers.LSTM.'
        )


def _halve(model) -> None:
    """Store the weights in float16; the runtime casts them once, when it loads the file."""
    graph = Graph(model)
    for name, array in list(graph.constants.items()):
        fits = array.dtype == np.float32 and array.size > 1
        if not fits or np.max(np.abs(array)) > np.finfo(np.float16).max:
            continue
        half = graph.add_constant(f"{name}_half", array.astype(np.float16))
        first = graph.graph.node[0]
        graph.insert(first, "Cast", [half], f"{name}_cast", to=graph.onnx.TensorProto.FLOAT)
        for node in graph.graph.node:
            for index, each in enumerate(node.input):
                if each == name:
                    node.input[index] = f"{name}_cast"
    graph.drop_unused()


class OnnxRunner(NamedRunner):
    """Runs an ONNX file in ONNX Runtime, on the CPU.

    Processors without VNNI instructions add pairs of 8-bit products in 16 bits, which overflows;
    the session is told to avoid that (`session.x64quantprecision`). Sessions made elsewhere should
    set it too.

    Args:
        path: An `.onnx` file.
        num_threads: Threads of the session; None leaves the choice to it.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = 1):
        self._session = _session(path, num_threads)
        inputs = {
            each.name: _numpy_dtype(each.type.removeprefix("tensor(").removesuffix(")"))
            for each in self._session.get_inputs()
        }
        outputs = [each.name for each in self._session.get_outputs()]
        super().__init__(
            pathlib.Path(path),
            inputs,
            outputs,
            lambda batch: dict(zip(outputs, self._session.run(outputs, batch), strict=True)),
        )


def _session(path, num_threads=1, optimized: pathlib.Path | None = None):
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _numpy_dtype(name: str) -> np.dtype:
    names = {"float": "float32", "double": "float64", "string": "object"}
    return np.dtype(names.get(name, name))


def float_operators(path: pathlib.Path) -> tuple[str, ...]:
    """The operators that ONNX Runtime computes in float, as it has arranged the file for itself."""
    onnx = require("onnx", extra="onnx")
    with tempfile.TemporaryDirectory() as directory:
        optimized = pathlib.Path(directory, "optimized.onnx")
        _session(path, optimized=optimized)
        graph = onnx.load(optimized).graph
    floats = {tensor.name for tensor in (*graph.input, *graph.initializer) if _is_float(tensor)}
    found = []
    for node in graph.node:
        reads_float = any(name in floats for name in node.input)
        integer = node.op_type in _INTEGER or node.op_type.startswith("QLinear")
        if reads_float and not integer and node.op_type not in (*_MOVES, *_COMPARE):
            found.append(
                f"{node.op_type} ({node.output[0].removeprefix('StatefulPartitionedCall/')})"
            )
        if _gives_float(node, reads_float, integer):
            floats.update(node.output)
    return tuple(found)


def _gives_float(node, reads_float: bool, integer: bool) -> bool:
    if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return True
    if node.op_type == "Cast":
        return attribute(node, "to", 0) in (1, 10, 11, 16)
    if integer or node.op_type in ("Shape", *_COMPARE):
        return node.op_type == "QGemm" and len(node.input) < 9  # Without a scale for its output.
    return reads_float


def _is_float(tensor) -> bool:
    data_type = getattr(tensor, "data_type", None)
    return (data_type or tensor.type.tensor_type.elem_type) in (1, 10, 11, 16)


def tensors(path: pathlib.Path) -> Iterator[Tensor]:
    """The weights of an ONNX file: floats, and integers with their scales."""
    graph = Graph(_model(path))
    scaled = {_origin(graph, node.input[0]): node for node in graph.nodes("DequantizeLinear")}
    parameters = {
        name
        for node in graph.nodes("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    for index, (name, array) in enumerate(graph.constants.items()):
        if name in parameters or not (name in scaled or array.dtype.kind == "f"):
            continue
        yield Tensor(
            name,
            str(array.dtype),
            array.shape,
            index,
            array,
            **(_quantization(graph, scaled[name]) if name in scaled else {}),
        )


def _origin(graph: Graph, name: str) -> str:
    """What the values of a tensor were looked up in or moved from."""
    while (maker := graph.maker(name)) is not None and maker.op_type in _MOVES and maker.input:
        name = maker.input[0]
    return name


def _quantization(graph: Graph, node) -> dict:
    scale, zero_point = (graph.constants[name].reshape(-1) for name in node.input[1:3])
    return {
        "scale": scale,
        "zero_point": zero_point.astype(np.int64),
        "axis": attribute(node, "axis", 1),
    }


def _model(path: pathlib.Path):
    onnx = require("onnx", extra="onnx")
    try:
        model = onnx.load(path)
    except Exception as error:
        raise ValueError(_not_onnx(path, error)) from error
    if not model.graph.node:
        raise ValueError(_not_onnx(path, "it holds no graph"))
    return model


def _not_onnx(path, reason) -> str:
    return (
        f"{str(path)!r} is not an ONNX file: {reason}. Export the model again, e.g. "
        "tfcompress.export(model, 'm.onnx')."
    )


TARGET = Target(
    format="onnx",
    title="ONNX Runtime",
    precisions=("float32", "float16", "int8"),
    write=_write,
    float_operators=float_operators,
    steps=2.0,
)
register_format(
    Format(name="onnx", suffix=".onnx", check=_model, runner=OnnxRunner, tensors=tensors)
)
