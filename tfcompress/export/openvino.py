"""Export to OpenVINO (`.xml` with its `.bin`), and OpenVINO as what runs it."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from tfcompress import artefact as artefacts
from tfcompress.artefact import Format, Tensor, register_format
from tfcompress.export.grid import find_grid
from tfcompress.export.process import convert
from tfcompress.export.program import Program
from tfcompress.export.target import NamedRunner, Target
from tfcompress.optional import require

# By operator: which of its inputs is a weight, and the axes of the output channels in it.
_WEIGHTS = {
    "Convolution": (1, (0,)),
    "GroupConvolution": (1, (0, 1)),
    "ConvolutionBackpropData": (1, (1,)),
    "GroupConvolutionBackpropData": (1, (0, 2)),
    "MatMul": (1, (-1,)),
    "Gather": (0, ()),
}
# What a compiled model does besides computing; a Subgraph or an Eltwise computes.
_MOVES = (
    "Broadcast", "Concatenation", "Const", "Convert", "FakeQuantize", "Gather", "Input", "Output",
    "Pad", "Reorder", "Reshape", "ShapeOf", "Split", "StridedSlice", "Tile", "Transpose",
)  # fmt: skip


def _openvino(module: str):
    """A module of OpenVINO. Its telemetry forks this process at import, and stays off."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        return require(module, extra="openvino")
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before


def _write(program: Program, precision: str, path: pathlib.Path, workspace: pathlib.Path) -> None:
    openvino = _openvino("openvino")
    program.save(workspace / "model")
    converted = workspace / "converted.xml"
    convert(
        {
            "converter": "openvino",
            "saved_model": str(workspace / "model"),
            "output": str(converted),
        }
    )
    model = _in_order(openvino.Core().read_model(converted), [x.name for x in program.inputs])
    if precision == "int8":
        store_integers(model)
    openvino.save_model(model, path, compress_to_fp16=precision == "float16")


def _in_order(model, names: list[str]):
    """The model with its inputs in the order of Keras."""
    openvino = _openvino("openvino")
    by_name = {port.any_name: port.get_node() for port in model.inputs}
    parameters = [by_name[name] for name in names]
    return openvino.Model(model.get_results(), parameters, model.get_friendly_name())


def store_integers(model) -> None:
    """Store the weights of an OpenVINO model that lie on grids as integers, in place.

    Args:
        model: An `openvino.Model` with `FakeQuantize` on its activations.
    """
    for operator in model.get_ordered_ops():
        index, axes = _WEIGHTS.get(operator.get_type_name(), (None, ()))
        if index is None:
            continue
        weight = operator.input_value(index).get_node()
        if weight.get_type_name() != "Constant" or weight.get_element_type().to_string() != "f32":
            continue
        if operator.get_type_name() == "MatMul" and operator.get_attributes()["transpose_b"]:
            axes = (-2,)
        stored = _stored(weight.get_data(), axes)
        if stored is not None:
            stored.set_friendly_name(f"{weight.get_friendly_name()}/dequantized")
            operator.input(index).replace_source_output(stored.output(0))
    model.validate_nodes_and_infer_types()


def _stored(weight: np.ndarray, axes: tuple[int, ...]):
    """The weight as integers with what makes them real, or None where it lies on no grid."""
    ops = _openvino("openvino.opset13")
    axes = tuple(axis % weight.ndim for axis in axes)
    others = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    shape = [weight.shape[axis] for axis in axes]
    rows = weight.transpose(axes + others).reshape(int(np.prod(shape)), -1)
    found = find_grid(rows)
    if found is None:
        return None
    integers, scales, zero_points = found
    integers = integers.reshape(shape + [weight.shape[axis] for axis in others])
    integers = integers.transpose(np.argsort(axes + others))
    one_a_channel = [n if axis in axes else 1 for axis, n in enumerate(weight.shape)]
    real = ops.convert(ops.constant(np.ascontiguousarray(integers)), "f32")
    if np.any(zero_points):
        shift = ops.constant(zero_points.reshape(one_a_channel))
        real = ops.subtract(real, ops.convert(shift, "f32"))
    scales = np.where(scales == 0, np.float32(1), scales)
    return ops.multiply(real, ops.constant(scales.reshape(one_a_channel).astype(np.float32)))


class OpenVinoRunner(NamedRunner):
    """Runs an OpenVINO file on the CPU, in float32 where it is not in integers.

    Args:
        path: An `.xml` file beside its `.bin`.
        num_threads: Threads of the inference; None leaves the choice to it.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = 1):
        compiled = _compiled(path, num_threads)
        inputs = {
            port.any_name: np.dtype(port.get_element_type().to_dtype()) for port in compiled.inputs
        }
        names = [port.any_name for port in compiled.outputs]
        request = compiled.create_infer_request()

        def run(batch):
            found = request.infer(batch, share_inputs=True, share_outputs=False)
            return {name: found[name] for name in names}

        super().__init__(pathlib.Path(path), inputs, names, run)


def _compiled(path, num_threads=1):
    openvino = _openvino("openvino")
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if num_threads is not None:
        config["INFERENCE_NUM_THREADS"] = num_threads
    return openvino.Core().compile_model(_model(pathlib.Path(path)), "CPU", config)


def float_operators(path: pathlib.Path) -> tuple[str, ...]:
    """The operators that OpenVINO computes in float on this processor."""
    found = []
    for operator in _compiled(path).get_runtime_model().get_ordered_ops():
        info = operator.get_rt_info()
        kind, precision = (str(info[key].astype(str)) for key in ("layerType", "runtimePrecision"))
        if kind not in _MOVES and precision in ("f32", "f16", "bf16"):
            found.append(f"{kind} ({operator.get_friendly_name()})")
    return tuple(found)


def tensors(path: pathlib.Path) -> Iterator[Tensor]:
    """The weights of an OpenVINO file: floats, and integers with their scales."""
    operators = _model(path).get_ordered_ops()
    grids = {}
    for operator in operators:
        if operator.get_type_name() == "Convert":
            grids |= _grid_of(operator)
    parameters = {
        operator.input_value(index).get_node().get_friendly_name()
        for operator in operators
        if operator.get_type_name() == "FakeQuantize"
        for index in range(1, 5)
    }
    parameters |= {name for grid in grids.values() for name in grid.pop("names")}
    constants = [each for each in operators if each.get_type_name() == "Constant"]
    for index, constant in enumerate(constants):
        name, array = constant.get_friendly_name(), constant.get_data()
        if name in grids or (array.dtype.kind == "f" and name not in parameters):
            yield Tensor(name, str(array.dtype), array.shape, index, array, **grids.get(name, {}))


def _grid_of(convert) -> dict[str, dict]:
    """What `_stored` made of a weight, by its name: the integers under `Convert` and their grid."""
    integers, reader = convert.input_value(0).get_node(), _reader(convert)
    if integers.get_type_name() != "Constant" or integers.get_data().dtype != np.int8:
        return {}
    names, zero_point = set(), np.zeros(1, np.int64)
    if reader is not None and reader.get_type_name() == "Subtract":
        shift = reader.input_value(1).get_node().input_value(0).get_node()
        names.add(shift.get_friendly_name())
        zero_point, reader = shift.get_data().astype(np.int64).reshape(-1), _reader(reader)
    if reader is None or reader.get_type_name() != "Multiply":
        return {}
    scale = reader.input_value(1).get_node()
    names.add(scale.get_friendly_name())
    axes = [axis for axis, size in enumerate(scale.get_data().shape) if size > 1]
    grid = {"scale": scale.get_data().reshape(-1), "zero_point": zero_point, "names": names}
    return {integers.get_friendly_name(): grid | {"axis": axes[0] if axes else 0}}


def _reader(operator):
    readers = operator.output(0).get_target_inputs()
    return next(iter(readers)).get_node() if len(readers) == 1 else None


def _model(path: pathlib.Path):
    openvino = _openvino("openvino")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r} is not an OpenVINO model with its .bin beside it: {error}. Export the "
            "model again, e.g. tfcompress.export(model, 'm.xml')."
        ) from error


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return [path, path.with_suffix(".bin")]


@contextlib.contextmanager
def _replacing_both(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Both files under temporary names, the weights renamed first."""
    with (
        artefacts.replacing(path) as temporary,
        artefacts.replacing(path.with_suffix(".bin")) as weights,
    ):
        assert weights == temporary.with_suffix(".bin")
        yield temporary


TARGET = Target(
    format="openvino",
    title="OpenVINO",
    precisions=("float32", "float16", "int8"),
    write=_write,
    float_operators=float_operators,
    steps=4.0,
    replacing=_replacing_both,
)
register_format(
    Format(
        name="openvino",
        suffix=".xml",
        check=_model,
        runner=OpenVinoRunner,
        tensors=tensors,
        files=_files,
    )
)
