"""Multiply-accumulates of a forward pass, counted from the shapes in its graph."""

import collections
import math
import warnings
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

# TensorFlow documents no way from the name of a function to its graph; its own loops use this one.
from tensorflow.python.ops.control_flow_util_v2 import get_func_graph

from tfcompress.keras_hooks.walk import named_variables

# What comes out are the numbers that went in, or some of them, in another order or shape.
_KEEP_VALUES = (
    "Cast", "ExpandDims", "Identity", "IdentityN", "Reshape", "ReverseV2",
    "Slice", "Split", "SplitV", "Squeeze", "StopGradient", "StridedSlice", "Transpose", "Unpack",
)  # fmt: skip


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
    found = macs_by_weight(model, batch)
    return None if found is None else sum(found.values())


def macs_by_weight(model: keras.Model, batch) -> dict[str | None, int] | None:
    """`macs`, by the path of the weight that is multiplied with.

    Args:
        model: A Keras model.
        batch: An example batch of inputs; only its shapes and types matter.

    Returns:
        Path -> number for one example, without weights that count 0. Products of two activations,
        as in attention, and of weights that were computed with before are under None. None as a
        whole, with a warning, when a shape in the graph is unknown.

    Example:

    >>> layers = [keras.Input((6, 8)), keras.layers.LSTM(2, name="lstm"),
    ...           keras.layers.Dense(3, name="head")]
    >>> model = keras.Sequential(layers, name="model")
    >>> found = macs_by_weight(model, np.zeros((1, 6, 8)))
    >>> found["model/lstm/lstm_cell/recurrent_kernel"], found["model/head/kernel"]
    (96, 6)
    """
    paths = {id(variable): path for path, variable in named_variables(model).items()}
    graph = _traced(model, batch).graph
    # The weights are the first arguments, in the order of the model's variables.
    origins = {
        tensor.name: paths[id(variable)]
        for tensor, variable in zip(graph.inputs, model.variables, strict=False)
        if id(variable) in paths
    }
    try:
        return dict(_count(graph, origins))
    except _UnknownShape as error:
        warnings.warn(f"No MACs for {model.name!r}: {error}", stacklevel=3)
        return None


def call_macs(operation: keras.Operation, args: tuple, kwargs: dict) -> int:
    """Multiply-accumulates of one call of a layer or op.

    Args:
        operation: A built layer, or an op.
        args: What it is called on; `tf.TensorSpec`s of known shape stand for tensors.
        kwargs: By name.

    Returns:
        The number for the whole batch; 0, with a warning, when a shape inside is unknown.

    Example:

    >>> layer = keras.layers.Dense(10)
    >>> layer.build((None, 100))
    >>> call_macs(layer, (tf.TensorSpec((8, 100), tf.float32),), {})
    8000
    """
    variables = operation.variables if isinstance(operation, keras.layers.Layer) else []

    @tf.function(autograph=False)
    def step(values, tensors):
        with keras.StatelessScope(zip(variables, values, strict=True)):
            given = iter(tensors)
            args_, kwargs_ = keras.tree.map_structure(
                lambda x: next(given) if isinstance(x, tf.TensorSpec) else x, (args, kwargs)
            )
            return operation(*args_, **kwargs_)

    specs = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, tf.TensorSpec)]
    weights = [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]
    try:
        return _count(step.get_concrete_function(weights, specs).graph, {}).total()
    except _UnknownShape as error:
        warnings.warn(f"No MACs for {operation.name!r}: {error}", stacklevel=2)
        return 0


def _traced(model: keras.Model, batch):
    """The forward pass of one example with the weights as arguments.

    A loop that reads a variable hides its shape from the graph of the loop's body, a tensor's
    shape is seen there.
    """

    @tf.function
    def step(values, inputs):
        with keras.StatelessScope(zip(model.variables, values, strict=True)):
            return model(inputs, training=False)

    weights = [tf.TensorSpec(variable.shape, variable.dtype) for variable in model.variables]
    return step.get_concrete_function(weights, keras.tree.map_structure(_one_example, batch))


def _one_example(values) -> tf.TensorSpec:
    array = np.asarray(values)
    dtype = np.float32 if array.dtype == np.float64 else array.dtype
    return tf.TensorSpec((1, *array.shape[1:]), dtype)


def zero_example(model: keras.Model, remedy: str):
    """A batch of one example of zeros, to count with.

    Args:
        model: A Functional model.
        remedy: What to do where the shape of an input is not known, for the message.

    Returns:
        Arrays in the structure of the model's inputs.

    Raises:
        ValueError: The shape of an input is not known.

    Example:

    >>> x = keras.Input((3,))
    >>> zero_example(keras.Model(x, keras.layers.Dense(2)(x)), "Fix them.").shape
    (1, 3)
    """
    for x in model.inputs:
        if None in x.shape[1:]:
            raise ValueError(
                f"target_macs needs the shapes of the inputs of {model.name!r}, and {x.name!r} is "
                f"of shape {x.shape}. {remedy}"
            )
    return keras.tree.map_structure(
        lambda x: np.zeros((1, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)), model.input
    )


class _UnknownShape(Exception):
    """A contraction, or the length of a loop, depends on data."""


Counts = collections.Counter[str | None]
# Name of a tensor -> path of the weight that it is, in one graph.
Origins = Mapping[str, str]


def _count(graph, origins: Origins) -> Counts:
    counts: Counts = collections.Counter()
    for operation in _live(graph):
        counts.update(_operation(operation, origins))
    return counts


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


def _operation(operation, origins: Origins) -> Counts:
    if operation.type in _CONTRACTIONS:
        number = _CONTRACTIONS[operation.type](operation)
        return collections.Counter({_weight(operation, origins): number} if number else {})
    if operation.type in ("While", "StatelessWhile"):
        return _loop(operation, origins)
    counts = [
        _count(*_function(operation, name, _arguments(operation), origins))
        for name in _called(operation)
    ]
    # `If` and `Case` run one of the functions they name, a call has only one.
    return max(counts, key=lambda each: each.total(), default=collections.Counter())


def _weight(operation, origins: Origins) -> str | None:
    """The weight among the factors of a contraction; the second factor as a rule."""
    found = [_origin(tensor, origins) for tensor in reversed(operation.inputs)]
    return next((path for path in found if path is not None), None)


def _origin(tensor, origins: Origins) -> str | None:
    while tensor.name not in origins:
        operation = tensor.op
        if operation.type not in _KEEP_VALUES:
            return None
        if operation.type == "IdentityN":
            tensor = operation.inputs[tensor.value_index]
        else:
            tensor = operation.inputs[1 if operation.type == "Split" else 0]
    return origins[tensor.name]


def _called(operation) -> Iterator[str]:
    for attribute in operation.node_def.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (function.name for function in attribute.list.func)


def _arguments(operation) -> list:
    # The first input of `If` and `Case` chooses the function, the others are its arguments.
    chooses = "branches" in operation.node_def.attr or "then_branch" in operation.node_def.attr
    return list(operation.inputs[1:] if chooses else operation.inputs)


def _function(operation, name: str, arguments: list, origins: Origins):
    """The graph of a function that an operation runs, with the weights that it is passed."""
    graph = get_func_graph(operation, [tensor.shape for tensor in arguments], name)
    found = {
        inside.name: _origin(outside, origins)
        for inside, outside in zip(graph.inputs, arguments, strict=True)
    }
    return graph, {name: path for name, path in found.items() if path is not None}


def _loop(operation, origins: Origins) -> Counts:
    name = operation.get_attr("body").name
    body = _count(*_function(operation, name, list(operation.inputs), origins))
    if not body:
        return body
    iterations = _iterations(operation)
    return collections.Counter({path: number * iterations for path, number in body.items()})


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
