"""A file that was exported: what it holds, how large it is, and how to run it."""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shutil
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tfcompress.optional import require


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file; `values` is None for an activation.

    The real value of a stored integer `q` is `scale * (q - zero_point)`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: int = 0
    values: np.ndarray | None = None
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    zero_point: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    axis: int = 0

    @property
    def params(self) -> int:
        """How many numbers the tensor has."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nonzeros(self) -> int:
        """How many of them differ from zero, that is, from the zero point."""
        if self.values is None:
            return 0
        return int(np.count_nonzero(self.values != self._along_axis(self.zero_point)))

    @property
    def is_weight(self) -> bool:
        """A constant with a real value: a float, or an integer with a scale; no shape, no axis."""
        return self.values is not None and ("float" in self.dtype or self.scale.size > 0)

    def real(self) -> np.ndarray:
        """The values in float32, dequantized."""
        if self.scale.size == 0:
            return np.asarray(self.values, np.float32)
        zero_point = self._along_axis(self.zero_point)
        return (np.asarray(self.values, np.float32) - zero_point) * self._along_axis(self.scale)

    def _along_axis(self, parameter: np.ndarray) -> np.ndarray:
        """Scales or zero points in the shape that broadcasts against the values."""
        parameter = parameter.astype(self.values.dtype if parameter.dtype.kind == "i" else "f4")
        if parameter.size <= 1:
            return parameter.reshape(()) if parameter.size else np.zeros((), self.values.dtype)
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return parameter.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """One operator of a file, e.g. `CONV_2D`, or a custom operator by its own name."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Flatbuffer:
    """What a `.tflite` file says about itself, over all of its subgraphs."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    constants: tuple[Tensor, ...]


def litert_flatbuffer(path: str | os.PathLike) -> Flatbuffer:
    """Read the operators and the constants of a LiteRT file, without running it.

    A tensor is a constant when the file stores bytes for it. The converter leaves out a bias of
    zeros and lets equal constants share one buffer; such a buffer is listed once in `constants`.

    Args:
        path: A `.tflite` file.

    Returns:
        A `Flatbuffer`; `inputs` and `outputs` are those of the main subgraph.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a LiteRT flatbuffer.

    Example:

    >>> import tempfile
    >>> import tensorflow as tf
    >>> dense = tf.function(lambda x: tf.matmul(x, tf.ones((4, 2))))
    >>> graph = dense.get_concrete_function(tf.TensorSpec((None, 4)))
    >>> file = pathlib.Path(tempfile.mkdtemp(), "m.tflite")
    >>> _ = file.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([graph]).convert())
    >>> [operator.name for operator in litert_flatbuffer(file).operators]
    ['FULLY_CONNECTED']

    Format: https://ai.google.dev/edge/litert (schema.fbs).
    """
    content = _litert_content(pathlib.Path(path))
    schema = litert_schema()
    model = schema.Model.GetRootAs(content, 0)
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    tensors = [_graph_tensors(schema, model, graph) for graph in graphs]
    constants = {t.buffer: t for group in tensors for t in group if t.values is not None}
    return Flatbuffer(
        inputs=_pick(tensors[0], graphs[0].InputsAsNumpy()),
        outputs=_pick(tensors[0], graphs[0].OutputsAsNumpy()),
        operators=tuple(
            _operator(schema, model, graph.Operators(i), group)
            for graph, group in zip(graphs, tensors, strict=True)
            for i in range(graph.OperatorsLength())
        ),
        constants=tuple(constants.values()),
    )


def _litert_content(path: pathlib.Path) -> bytes:
    content = path.read_bytes()
    # Bytes 4 to 8 of a flatbuffer are its file identifier.
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"{str(path)!r} is not a LiteRT flatbuffer: expected the identifier b'TFL3', found "
            f"{content[4:8]!r}. Export the model again, e.g. tfcompress.export(model, 'm.tflite')."
        )
    return content


def _first_module(*names: str) -> types.ModuleType:
    """The first of these modules that is installed; TensorFlow carries a copy of LiteRT."""
    for name in names[:-1]:
        with contextlib.suppress(ImportError):
            return require(name, extra="litert")
    return require(names[-1], extra="litert")


def litert_schema() -> types.ModuleType:
    """The classes generated from the schema of LiteRT files."""
    return _first_module(
        "ai_edge_litert.schema_py_generated", "tensorflow.lite.python.schema_py_generated"
    )


def _enum_names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if not name.startswith("_")}


def _graph_tensors(schema, model, graph) -> list[Tensor]:
    dtypes = _enum_names(schema.TensorType)
    return [_tensor(model, graph.Tensors(i), dtypes) for i in range(graph.TensorsLength())]


def _tensor(model, tensor, dtypes: dict[int, str]) -> Tensor:
    shape = tuple(int(tensor.Shape(i)) for i in range(tensor.ShapeLength()))
    dtype = dtypes[tensor.Type()].lower()
    buffer = model.Buffers(tensor.Buffer())
    values = _decode(buffer.DataAsNumpy(), dtype, shape) if buffer.DataLength() else None
    quantization = tensor.Quantization()
    parameters = {} if quantization is None else _quantization(quantization)
    name = (tensor.Name() or b"").decode()
    return Tensor(name, dtype, shape, tensor.Buffer(), values, **parameters)


def _quantization(quantization) -> dict[str, Any]:
    if not quantization.ScaleLength():
        return {}
    scale = quantization.ScaleAsNumpy()
    has_zero_point = quantization.ZeroPointLength() > 0
    return {
        "scale": scale,
        "zero_point": quantization.ZeroPointAsNumpy() if has_zero_point else np.zeros(1, np.int64),
        "axis": quantization.QuantizedDimension(),
    }


def _decode(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "int4":
        return _unpack_int4(data, int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if dtype == "string":
        return data
    values = data.view(_numpy_dtype(dtype))
    # A sparsely encoded tensor stores fewer values than its shape has.
    return values.reshape(shape) if values.size == np.prod(shape, dtype=np.int64) else values


def _numpy_dtype(dtype: str) -> np.dtype:
    try:
        return np.dtype(dtype)
    except TypeError:
        # bfloat16 and the 8-bit floats.
        return np.dtype(getattr(require("ml_dtypes", extra="litert"), dtype))


def _unpack_int4(data: np.ndarray, count: int) -> np.ndarray:
    """Two signed 4-bit integers a byte, the low nibble first."""
    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def _pick(tensors: list[Tensor], indices) -> tuple[Tensor, ...]:
    # -1 is an optional input that is not given, e.g. no bias; an absent vector reads as 0.
    return tuple(tensors[i] for i in np.atleast_1d(indices) if i >= 0)


def _operator(schema, model, operator, tensors: list[Tensor]) -> Operator:
    return Operator(
        _operator_name(schema, model.OperatorCodes(operator.OpcodeIndex())),
        _pick(tensors, operator.InputsAsNumpy()) if operator.InputsLength() else (),
        _pick(tensors, operator.OutputsAsNumpy()) if operator.OutputsLength() else (),
    )


def _operator_name(schema, code) -> str:
    if code.CustomCode() is not None:
        return code.CustomCode().decode()
    # Old files have only the deprecated field, which ends at 127.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    return _enum_names(schema.BuiltinOperator)[number]


def quantize(values: np.ndarray, scale: float, zero_point: int, dtype: np.dtype) -> np.ndarray:
    """Real values to stored integers: `clip(round(values / scale) + zero_point)`.

    Args:
        values: Real values, any shape.
        scale: The size of one step, above 0.
        zero_point: The integer that stands for 0.
        dtype: The integer type to store; its range is where values are clipped.

    Returns:
        An array of `dtype`, of the same shape.

    Example:

    >>> quantize(np.array([-9.0, 0.0, 0.5]), 0.5, -128, np.int8)
    array([-128, -128, -127], dtype=int8)
    """
    limits = np.iinfo(dtype)
    steps = np.round(np.asarray(values, np.float64) / scale) + zero_point
    return np.clip(steps, limits.min, limits.max).astype(dtype)


class LiteRTRunner:
    """Runs a LiteRT file on numpy arrays, in real units.

    Integer inputs and outputs are quantized and dequantized by the file's own scale and zero
    point; an input that already has the file's integer type is passed through. The batch
    dimension is resized when the size changes, so keep one runner for each size when timing.
    One runner serves one thread.

    Args:
        path: A `.tflite` file.
        num_threads: Threads of the interpreter; None leaves the choice to it.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = 1):
        module = _first_module("ai_edge_litert.interpreter", "tensorflow.lite.python.interpreter")
        _litert_content(pathlib.Path(path))
        self.path = pathlib.Path(path)
        self._interpreter = module.Interpreter(model_path=str(path), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.inputs = self._by_subgraph_order()
        self.outputs = self._by_signature("outputs", self._interpreter.get_output_details())

    def __call__(self, inputs):
        """Run on one array, a list in the model's order or a dict by name; same kind out."""
        named = by_input(self.path, self.inputs, inputs)
        arrays = {name: _store(value, self.inputs[name]) for name, value in named.items()}
        self._resize({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            self._interpreter.set_tensor(self.inputs[name]["index"], array)
        self._interpreter.invoke()
        outputs = {name: self._read(details) for name, details in self.outputs.items()}
        return restructure(outputs)

    def _by_signature(self, kind: str, details: list[dict]) -> dict[str, dict]:
        """Details by the names of the signature; by tensor name for a file that has none."""
        if not self._interpreter.get_signature_list():
            return {d["name"]: d for d in details}
        runner = self._interpreter.get_signature_runner()
        named = runner.get_input_details() if kind == "inputs" else runner.get_output_details()
        return {name: named[name] for name in sorted(named, key=natural_order)}

    def _by_subgraph_order(self) -> dict[str, dict]:
        # A signature lists its inputs by alphabet, the subgraph in the order of the Keras model.
        details = self._interpreter.get_input_details()
        order = {d["index"]: position for position, d in enumerate(details)}
        named = self._by_signature("inputs", details)
        return dict(sorted(named.items(), key=lambda item: order[item[1]["index"]]))

    def _resize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            expected = self.inputs[name]["shape_signature"]
            if len(shape) != len(expected) or any(
                size not in (-1, actual) for size, actual in zip(expected, shape, strict=True)
            ):
                raise ValueError(
                    f"Input {name!r} of {str(self.path)!r} has the shape {expected.tolist()} "
                    f"(-1 is any size), {list(shape)} was passed. Reshape the array, or export "
                    "with a dynamic batch dimension."
                )
            self._interpreter.resize_tensor_input(self.inputs[name]["index"], shape)
        self._interpreter.allocate_tensors()
        self._shapes = shapes

    def _read(self, details: dict) -> np.ndarray:
        values = self._interpreter.get_tensor(details["index"])
        scale, zero_point = details["quantization"]
        if not scale:
            return values
        return ((values.astype(np.float32) - zero_point) * scale).astype(np.float32)


def by_input(path: pathlib.Path, names: Iterable[str], inputs) -> dict[str, Any]:
    """What is passed to a runner, by the names of its inputs.

    Args:
        path: The file, for messages.
        names: In the order of the model.
        inputs: One array, a list in this order, or a dict by name.

    Returns:
        A dict in the order of `names`, or as it was passed.

    Raises:
        ValueError: There are more or fewer arrays, or other names.
    """
    names = list(names)
    if not isinstance(inputs, dict):
        arrays = inputs if isinstance(inputs, list | tuple) else [inputs]
        if len(arrays) != len(names):
            raise ValueError(
                f"{str(path)!r} has {len(names)} inputs {names}, "
                f"{len(arrays)} were passed. Pass one array for each, in this order."
            )
        inputs = dict(zip(names, arrays, strict=True))
    if set(inputs) != set(names):
        raise ValueError(
            f"{str(path)!r} has the inputs {names}, {list(inputs)} were "
            "passed. Pass a dict with exactly these names."
        )
    return inputs


def _store(value, details: dict) -> np.ndarray:
    array = np.asarray(value)
    scale, zero_point = details["quantization"]
    if scale and array.dtype != details["dtype"]:
        return quantize(array, scale, zero_point, details["dtype"])
    return np.ascontiguousarray(array, dtype=details["dtype"])


def natural_order(name: str) -> list:
    """Sort key that puts `output_10` behind `output_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def restructure(outputs: dict[str, np.ndarray]):
    """A model with a dict of outputs gives a dict; positional names give an array or a list."""
    positional = all(re.fullmatch(r"output_\d+", name) for name in outputs)
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    return list(outputs.values()) if positional else outputs


def files_below(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or every file in a directory and those below it."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of file is recognised, run and read; register one with `register_format`.

    Args:
        name: The name in `Artefact.format`.
        suffix: The suffix that selects it.
        check: Raises a `ValueError` on a file that is not of this kind.
        runner: `(path, num_threads) -> callable`, arrays in, arrays out.
        tensors: `path -> ` the constant weights.
        files: `path -> ` every file that must be shipped with it.
    """

    name: str
    suffix: str
    check: Callable[[pathlib.Path], Any]
    runner: Callable[[pathlib.Path, int | None], Callable]
    tensors: Callable[[pathlib.Path], Iterable[Tensor]]
    files: Callable[[pathlib.Path], list[pathlib.Path]] = files_below


_FORMATS: dict[str, Format] = {}


def register_format(format: Format) -> Format:
    """Make a format known to `Artefact`, by its name and its suffix."""
    _FORMATS[format.name] = format
    return format


register_format(
    Format(
        name="litert",
        suffix=".tflite",
        check=_litert_content,
        runner=LiteRTRunner,
        tensors=lambda path: [t for t in litert_flatbuffer(path).constants if t.is_weight],
    )
)


def _format_of(path: pathlib.Path) -> Format:
    for candidate in _FORMATS.values():
        if candidate.suffix == path.suffix:
            return candidate
    known = sorted(candidate.suffix for candidate in _FORMATS.values())
    raise ValueError(
        f"The suffix {path.suffix!r} of {str(path)!r} is not known. Expected one of {known}."
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What was found of one of the files that `precision="fastest"` chooses from.

    Args:
        precision: What it was exported as.
        bytes: Its size; None where it could not be made.
        latency_ms: Median time of a call on one example (or one batch of the fixed size), measured
            on this machine, interleaved with the other candidates.
        difference: To the model: the share of changed argmax, or the relative root mean square.
        note: Why it could not be made.
    """

    precision: str
    bytes: int | None = None
    latency_ms: float | None = None
    difference: float | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Artefact:
    """An exported file with what its verification found; call it to run it.

    Args:
        path: The file (or directory).
        format: The name of a registered format, e.g. `"litert"`.
        precision: What it was exported as, e.g. `"int8"`; None when not known.
        max_abs_diff: Largest difference to the Keras model on the verification batch, in the
            units of the output; None when not verified.
        output_steps: The same in quantization steps of the output; None for a float output.
        float_operators: Operators that were left in float in a full-integer file, each with the
            reason.
        latency_ms: Median time of a call on one example; None when not measured.
        candidates: What `precision="fastest"` has chosen from.

    Example:

    >>> import tempfile
    >>> import tensorflow as tf
    >>> dense = tf.function(lambda x: tf.matmul(x, tf.ones((4, 2))))
    >>> graph = dense.get_concrete_function(tf.TensorSpec((None, 4)))
    >>> file = pathlib.Path(tempfile.mkdtemp(), "m.tflite")
    >>> _ = file.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([graph]).convert())
    >>> artefact = Artefact.load(file)
    >>> artefact(np.ones((3, 4), np.float32)).shape
    (3, 2)
    >>> sum(tensor.params for tensor in artefact.tensors())
    8
    """

    path: pathlib.Path
    format: str
    precision: str | None = None
    max_abs_diff: float | None = None
    output_steps: float | None = None
    float_operators: tuple[str, ...] = ()
    latency_ms: float | None = None
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Artefact":
        """Open a file by its suffix.

        Args:
            path: An exported file.

        Returns:
            An `Artefact`, with nothing known about its verification.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The suffix is not known, or the file is not what the suffix says.
        """
        path = pathlib.Path(path)
        format = _format_of(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no file {str(path)!r}. Export one first: "
                f"tfcompress.export(model, {path.name!r})."
            )
        format.check(path)
        return cls(path, format.name)

    @property
    def bytes(self) -> int:
        """The size of the file, with the files that belong to it."""
        return sum(file.stat().st_size for file in self._files())

    @property
    def zipped_bytes(self) -> int:
        """The size as a zip archive (deflate, level 9): what sparse weights save."""
        return zipped_size(self._files())

    def runner(self, num_threads: int | None = 1) -> Callable:
        """A callable from numpy arrays to numpy arrays that keeps the file loaded."""
        return _FORMATS[self.format].runner(self.path, num_threads)

    def __call__(self, inputs):
        """Load the file and run it once; keep a `runner()` to run it often."""
        return self.runner()(inputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """The constant weights in the file, each stored buffer once."""
        return tuple(_FORMATS[self.format].tensors(self.path))

    def _files(self) -> list[pathlib.Path]:
        return _FORMATS[self.format].files(self.path)


class _CountingSink(io.RawIOBase):
    """A stream that only counts what is written to it."""

    def __init__(self):
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size


def zipped_size(files: Iterable[str | os.PathLike]) -> int:
    """Bytes of a zip archive (deflate, level 9) of these files; nothing is written.

    Args:
        files: Paths; the archive stores only their last part.

    Returns:
        The size in bytes.

    Example:

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "zeros")
    >>> _ = file.write_bytes(bytes(100_000))
    >>> zipped_size([file]) < 400
    True
    """
    sink = _CountingSink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for position, file in enumerate(map(pathlib.Path, files)):
            archive.write(file, arcname=f"{position}/{file.name}")
    return sink.count


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Write a file whole or not at all: a temporary name beside it, renamed at the end.

    Args:
        path: The file to write; missing parent directories are made.

    Yields:
        The temporary path to write to, with the same suffix.

    Raises:
        ValueError: The file cannot be written there.

    Example:

    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.txt")
    >>> with replacing(file) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> file.read_text()
    'whole'
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    _check_writable(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: str | os.PathLike, holds: str, kind: str) -> Iterator[pathlib.Path]:
    """Write a directory whole or not at all: a temporary name beside it, renamed at the end.

    Args:
        path: The directory to write; missing parent directories are made. One that exists is only
            replaced if it is of the same kind.
        holds: The name of a file that every directory of this kind has.
        kind: What to call it, e.g. `"a SavedModel"`.

    Yields:
        The temporary path; nothing is there yet.

    Raises:
        ValueError: The directory is of another kind, or cannot be written there.

    Example:

    >>> import tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp(), "set")
    >>> with replacing_directory(target, "a.txt", "a set") as temporary:
    ...     temporary.mkdir()
    ...     _ = (temporary / "a.txt").write_text("whole")
    >>> [file.name for file in target.iterdir()]
    ['a.txt']
    """
    path = pathlib.Path(path)
    _check_replaceable(path, holds, kind)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.exists():  # A directory that is not empty cannot be replaced by a rename.
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(path: pathlib.Path, holds: str, kind: str) -> None:
    if path.exists() and not (path / holds).is_file():
        raise ValueError(
            f"{str(path)!r} exists and is not {kind}, so it is not replaced. Pass a new directory."
        )
    _make_parent(path)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"Cannot write {str(path)!r}: {str(path.parent)!r} is read-only. Pass a path in a "
            "directory you may write to."
        )


def _make_parent(path: pathlib.Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Cannot write {str(path)!r}: {error.strerror}. Pass a path in a directory that exists "
            "or can be made."
        ) from error


def _check_writable(path: pathlib.Path) -> None:
    _make_parent(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"Cannot write {str(path)!r}: it is a directory, or {str(path.parent)!r} is read-only. "
            "Pass the path of a file in a directory you may write to."
        )
