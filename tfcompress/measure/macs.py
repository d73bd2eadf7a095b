"""Multiply-accumulates of a forward pass, counted from the shapes in its graph."""

import math
import warnings
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

# TensorFlow documents no way from the name of a function to its graph; its own loops use this one.
from tensorflow.python.ops.control_flow_util_v2 import get_func_graph

from tfcompress.measure.forward import with_batch_size


def macs(model: keras.Model, batch) -> int | None:
    """Multiply-accumulates of one example's forward pass.

    The model is traced at batch size 1, and every contraction in its graph is counted from its
    shapes, whichever layer or `keras.ops` call it came from: a matrix product of `(m, k)` and
    `(k, n)` is `m * k * n`, a convolution the size of its output times the weights each output
    sees. A loop counts as often as it runs (RNNs), a branch as its larger side. Element-wise
    work and embeddings count 0. Zeros count in full: dense kernels multiply them.

    Args:
        model: A Keras model.
        batch: An example batch of inputs; only its shapes and types matter.

    Returns:
        The number for one example; None, with a warning, when a shape in the graph is unknown.

    Example:

    >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(10)])
    >>> macs(model, np.zeros((1, 100)))
    1000
    """
    try:
        return _count(_traced(model, with_batch_size(batch, 1)).graph)
    except _UnknownShape as error:
        warnings.warn(f"No MACs for {model.name!r}: {error}", stacklevel=2)
        return None


def _traced(model: keras.Model, inputs):
    """The forward pass with the weights as arguments.

    A loop that reads a variable hides its shape from the graph of the loop's body, a tensor's
    shape is seen there.
    """

    @tf.function
    def step(values, inputs):
        with keras.StatelessScope(zip(model.variables, values, strict=True)):
            return model(inputs, training=False)

    weights = [_spec(variable) for variable in model.variables]
    return step.get_concrete_function(weights, keras.tree.map_structure(_spec, inputs))


def _spec(array) -> tf.TensorSpec:
    return tf.TensorSpec(array.shape, array.dtype)


class _UnknownShape(Exception):
    """A contraction, or the length of a loop, depends on data."""


def _count(graph) -> int:
    return sum(_operation(operation) for operation in _live(graph))


def _live(graph) -> list:
    """The operations that the outputs depend on.

    Keras traces one step of an RNN outside of its loop, for the shapes; it never runs.
    """
    pending, seen = [output.op for output in graph.outputs], {}
    while pending:
        operation = pending.pop()
        if operation.name not in seen:
            seen[operation.name] = operation
            pending.extend(tensor.op for tensor in operation.inputs)
    return list(seen.values())


def _operation(operation) -> int:
    if operation.type in _CONTRACTIONS:
        return _CONTRACTIONS[operation.type](operation)
    if operation.type in ("While", "StatelessWhile"):
        return _loop(operation)
    counts = [_count(_function(operation, name)) for name in _called(operation)]
    # `If` and `Case` run one of the functions they name, a call has only one.
    return max(counts, default=0)


def _called(operation) -> Iterator[str]:
    for attribute in operation.node_def.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (function.name for function in attribute.list.func)


def _function(operation, name: str):
    # The first input of `If` and `Case` chooses the function, the others are its arguments.
    chooses = "branches" in operation.node_def.attr or "then_branch" in operation.node_def.attr
    arguments = operation.inputs[1:] if chooses else operation.inputs
    return get_func_graph(operation, [tensor.shape for tensor in arguments], name)


def _loop(operation) -> int:
    body = _count(_function(operation, operation.get_attr("body").name))
    return body * _iterations(operation) if body else 0


def _iterations(loop) -> int:
    # The second variable of a `tf.while_loop` is its maximum number of iterations, -1 for none;
    # Keras takes the maximum over the lengths of the batch.
    limit = loop.inputs[1]
    known = tf.get_static_value(limit.op.inputs[0] if limit.op.type == "Max" else limit)
    if known is None or np.max(known) < 0:
        raise _UnknownShape(f"the length of the loop {loop.name!r} is not known")
    return int(np.max(known))


def _shape(tensor) -> list[int]:
    if not tensor.shape.is_fully_defined():
        raise _UnknownShape(f"the shape {tensor.shape} of {tensor.name!r} is not known")
    return tensor.shape.as_list()


def _size(tensor) -> int:
    return math.prod(_shape(tensor))


def _matmul(operation, transposed: str) -> int:
    inner = -2 if operation.get_attr(transposed) else -1
    return _size(operation.outputs[0]) * _shape(operation.inputs[0])[inner]


def _convolution(operation) -> int:
    return _size(operation.outputs[0]) * math.prod(_shape(operation.inputs[1])[:-1])


def _depthwise(operation) -> int:
    return _size(operation.outputs[0]) * math.prod(_shape(operation.inputs[1])[:2])


def _transposed_convolution(operation) -> int:
    return _size(operation.inputs[2]) * math.prod(_shape(operation.inputs[1])[:-1])


def _einsum(operation) -> int:
    equation = operation.get_attr("equation").decode().replace(" ", "")
    inputs, output = equation.split("->")
    sizes: dict[str, int] = {}
    for labels, tensor in zip(inputs.split(","), operation.inputs, strict=True):
        sizes.update(_labelled(labels, _shape(tensor)))
    if len(operation.inputs) == 1:
        return 0
    contracted = set(sizes) - set(output)
    return _size(operation.outputs[0]) * math.prod(sizes[label] for label in contracted)


def _labelled(labels: str, shape: list[int]) -> dict[str, int]:
    """The size of each label; the axes of an ellipsis are part of the output, and left out."""
    head, _, tail = labels.partition("...")
    sizes = dict(zip(head, shape, strict=False))
    return sizes | dict(zip(reversed(tail), reversed(shape), strict=False))


_CONTRACTIONS: dict[str, Callable] = {
    "MatMul": lambda op: _matmul(op, "transpose_a"),
    "BatchMatMul": lambda op: _matmul(op, "adj_x"),
    "BatchMatMulV2": lambda op: _matmul(op, "adj_x"),
    "BatchMatMulV3": lambda op: _matmul(op, "adj_x"),
    "Einsum": _einsum,
    "Conv2D": _convolution,
    "Conv3D": _convolution,
    "DepthwiseConv2dNative": _depthwise,
    "Conv2DBackpropInput": _transposed_convolution,
    "Conv3DBackpropInputV2": _transposed_convolution,
}
