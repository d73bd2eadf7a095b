"""What XLA fuses: the kernels of a model before and after, and the memory traffic it saves."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Self

import keras
import rich.table
import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

from tfcompress.acceleration.program import (
    flattened,
    folded,
    input_specs,
    with_batch_size,
)
from tfcompress.batches import first_batch
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.values import SavedValue, Value

# They name memory, or move none.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "after-all"}
# They run the kernels of other computations.
_CONTROL = {"call", "while", "conditional", "async-start"}
_SCOPE = "tfcompress"


@dataclasses.dataclass(frozen=True)
class FusedGroup(Value):
    """One kernel that XLA made of several operations.

    Args:
        name: Its name in XLA's optimized program.
        layers: The layers (or `keras.ops`) that the operations come from, in their order.
        operations: TensorFlow's operations in it, e.g. `"BiasAdd"`, each once.
        num_kernels: Kernels that the group would be without fusion.
        bytes_before: What these would read and write for a batch.
        bytes_after: What the one kernel reads and writes.
    """

    name: str
    layers: tuple[str, ...]
    operations: tuple[str, ...]
    num_kernels: int
    bytes_before: int
    bytes_after: int

    @property
    def bytes_saved(self) -> int:
        """The traffic that fusion takes away; below 0 where XLA computes something twice."""
        return self.bytes_before - self.bytes_after


@dataclasses.dataclass(frozen=True)
class FusionReport(SavedValue):
    """The kernels of an inference pass before and after XLA; made by `fusion_report`.

    Args:
        model: Name of the model.
        batch_size: Examples of the batch; all bytes are for one batch.
        kernels_before: By kind, e.g. `{"dot": 2, "add": 2}`, one for each operation of XLA.
        kernels_after: The same behind XLA's optimizations; a fused group is a `"fusion"`.
        bytes_before: What all kernels read and write, each operand from memory.
        bytes_after: The same behind XLA's optimizations.
        groups: The fused groups, those that save most first.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)]
    >>> report = fusion_report(keras.Sequential(layers), tf.ones((3, 4)))
    >>> FusionReport.from_config(json.loads(report.to_json())) == report
    True
    """

    model: str
    batch_size: int
    kernels_before: dict[str, int]
    kernels_after: dict[str, int]
    bytes_before: int
    bytes_after: int
    groups: tuple[FusedGroup, ...] = ()

    @property
    def num_kernels(self) -> tuple[int, int]:
        """All kernels, before and after."""
        return sum(self.kernels_before.values()), sum(self.kernels_after.values())

    @property
    def bytes_saved(self) -> int:
        """`bytes_before - bytes_after`."""
        return self.bytes_before - self.bytes_after

    def to_json(self) -> str:
        """Everything as JSON; `save` and `load` do it with a file."""
        return json.dumps(self.get_config())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The report that `get_config` or `to_json` described."""
        groups = tuple(
            FusedGroup(**{**g, "layers": tuple(g["layers"]), "operations": tuple(g["operations"])})
            for g in config["groups"]
        )
        return cls(**{**config, "groups": groups})

    def __rich__(self) -> rich.table.Table:
        before, after = self.num_kernels
        title = (
            f"{self.model}, batch {self.batch_size}: {before} kernels before fusion, {after} "
            f"after; {_kilobytes(self.bytes_before)} kB moved before, "
            f"{_kilobytes(self.bytes_after)} after"
        )
        table = rich.table.Table("layers", "operations", title=title)
        for heading in ("kernels", "kB before", "kB after", "kB saved"):
            table.add_column(heading, justify="right")
        for group in self.groups:
            sizes = (group.bytes_before, group.bytes_after, group.bytes_saved)
            table.add_row(
                ", ".join(group.layers),
                ", ".join(group.operations),
                str(group.num_kernels),
                *map(_kilobytes, sizes),
            )
        return table


def fusion_report(model: keras.Model, batch: Any) -> FusionReport:
    """List what XLA fuses in a model's inference pass on this machine.

    Compared are XLA's program as TensorFlow writes it, in which each operation would be a kernel
    that reads its operands from memory and writes its result there, and the program behind XLA's
    optimizations for this device. Batch norms are folded first, as `compile` does. The bytes are
    counted from shapes, not measured: a cache may well hold what the count moves.

    Args:
        model: A built model of any kind.
        batch: A batch of inputs (or data, of which the first batch is used).

    Returns:
        A `FusionReport`; `print` it with `rich`.

    Raises:
        ValueError: The model is not built, or XLA cannot compile it.

    Example:

    >>> layers = [keras.Input((64,)), keras.layers.Dense(64, "gelu", name="hidden")]
    >>> report = fusion_report(keras.Sequential(layers), tf.ones((8, 64)))
    >>> report.groups[0].layers, report.bytes_saved > 0
    (('hidden',), True)

    See https://openxla.org/xla/architecture for what XLA does.
    """
    batch = first_batch(batch)
    flat = folded(flattened(model, batch))
    specs = input_specs(flat, batch)
    before, after = (hlo_pb2.HloModuleProto.FromString(x) for x in _modules(flat, specs, batch))
    names = [operation.name for operation in flat.operations] if _is_graph(flat) else []
    kernels_before, kernels_after = _kernels(before), _kernels(after)
    groups = [_group(kernel, names) for kernel in kernels_after if len(kernel.parts) > 1]
    return FusionReport(
        model.name,
        len(keras.tree.flatten(batch)[0]),
        _counts(kernels_before),
        _counts(kernels_after),
        sum(kernel.bytes for kernel in kernels_before),
        sum(kernel.bytes for kernel in kernels_after),
        tuple(sorted(groups, key=lambda group: -group.bytes_saved)),
    )


def _modules(flat, specs, batch) -> tuple[bytes, bytes]:
    size = len(keras.tree.flatten(batch)[0])
    inputs = keras.tree.map_structure(
        lambda x, spec: tf.cast(x, spec.dtype), with_batch_size(batch, size), specs
    )
    step = tf.function(lambda x: flat(x, training=False), jit_compile=True, autograph=False)
    with _scopes(flat):
        try:
            compiler = step.experimental_get_compiler_ir(inputs)
            return compiler(stage="hlo_serialized"), compiler(stage="optimized_hlo_serialized")
        except (tf.errors.OpError, ValueError) as error:
            raise ValueError(
                f"XLA cannot compile {flat.name!r}: {str(error)[:300]}. Without XLA "
                "nothing is fused by it; tfcompress.acceleration.compile falls back to the graph."
            ) from error


def _is_graph(flat) -> bool:
    return hasattr(flat, "operations")


@contextlib.contextmanager
def _scopes(flat) -> Iterator[None]:
    """Name what each operation of the graph computes after its place: names are not unique."""

    def around(index, call, *args, **kwargs):
        # A scope that ends with a slash is taken as it is, wherever one is.
        with tf.name_scope(f"{_SCOPE}.{index}/"):
            return call(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for index, operation in enumerate(flat.operations if _is_graph(flat) else ()):
            stack.callback(add_hook(operation, "call", functools.partial(around, index)))
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernel:
    """An instruction that runs, the operations in it, and the bytes that both move."""

    instruction: Any
    parts: list
    bytes: int
    bytes_of_parts: int


def _kernels(module) -> list[_Kernel]:
    computations = {each.id: each for each in module.computations}
    waiting, kernels = [module.entry_computation_id], []
    while waiting:
        computation = computations[waiting.pop(0)]
        shapes = {each.id: each.shape for each in computation.instructions}
        for each in computation.instructions:
            if each.opcode in _CONTROL:
                waiting += each.called_computation_ids
            elif each.opcode not in _FREE:
                kernels.append(_kernel(each, shapes, computations))
    return kernels


def _kernel(instruction, shapes, computations) -> _Kernel:
    traffic = _traffic(instruction, shapes)
    if instruction.opcode != "fusion":
        return _Kernel(instruction, [instruction], traffic, traffic)
    parts, total = [], 0
    for called in instruction.called_computation_ids:
        inner = computations[called]
        inner_shapes = {each.id: each.shape for each in inner.instructions}
        parts += (found := [each for each in inner.instructions if each.opcode not in _FREE])
        total += sum(_traffic(each, inner_shapes) for each in found)
    return _Kernel(instruction, parts, traffic, total)


def _traffic(instruction, shapes) -> int:
    operands = sum(_bytes(shapes[operand]) for operand in instruction.operand_ids)
    return operands + _bytes(instruction.shape)


def _bytes(shape) -> int:
    if shape.tuple_shapes:
        return sum(map(_bytes, shape.tuple_shapes))
    name = xla_data_pb2.PrimitiveType.Name(shape.element_type)
    bits = re.search(r"\d+", name)
    width = int(bits[0]) if bits else 8 * (name == "PRED")
    return math.prod(shape.dimensions) * width // 8


def _counts(kernels) -> dict[str, int]:
    return dict(collections.Counter(kernel.instruction.opcode for kernel in kernels).most_common())


def _group(kernel: _Kernel, names: list[str]) -> FusedGroup:
    paths = [each.metadata.op_name for each in kernel.parts if each.metadata.op_name]
    return FusedGroup(
        kernel.instruction.name,
        tuple(dict.fromkeys(_layer(path, names) for path in paths)),
        tuple(dict.fromkeys(e.metadata.op_type for e in kernel.parts if e.metadata.op_type)),
        len(kernel.parts),
        kernel.bytes_of_parts,
        kernel.bytes,
    )


def _layer(path: str, names: list[str]) -> str:
    found = re.search(rf"{_SCOPE}\.(\d+)/", path)
    return names[int(found[1])] if found else path.split("/")[0]


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f}"
