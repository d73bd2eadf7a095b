"""Symbolic graphs: reading their calls, adding calls, and another name for a layer in one.

Private Keras API used here, each with a test in `tests/keras_hooks/test_nodes.py`:
`KerasTensor._keras_history`, `Operation._inbound_nodes` and `_outbound_nodes`, `Node`,
`KerasTensor._shape`, `EinsumDense._kernel`, `RMSNormalization.scale`, `Layer._tracker`,
`Reshape.newshape`, `BroadcastTo.shape`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras.src.ops.node import Node
from keras.src.ops.numpy import BroadcastTo, Reshape


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation (a layer or a `keras.ops` op) in a symbolic graph.

    Args:
        operation: What was called.
        args: Its positional arguments, nested; `KerasTensor`s are the edges of the graph.
        kwargs: Its keyword arguments.
        outputs: The `KerasTensor`s that came out, flat.
    """

    operation: keras.Operation
    args: tuple
    kwargs: dict
    outputs: tuple

    @property
    def inputs(self) -> list[keras.KerasTensor]:
        """The symbolic tensors among the arguments, flat."""
        return symbolic_tensors((self.args, self.kwargs))

    @property
    def is_input(self) -> bool:
        """Whether the call produces an input of the graph instead of computing something."""
        return not self.inputs


def symbolic_tensors(structure: Any) -> list[keras.KerasTensor]:
    """The `KerasTensor`s in a nested structure, flat."""
    return [x for x in keras.tree.flatten(structure) if isinstance(x, keras.KerasTensor)]


def producer(tensor: keras.KerasTensor) -> Node:
    """The node that made a symbolic tensor."""
    operation, node_index, _ = tensor._keras_history
    return operation._inbound_nodes[node_index]


def calls_between(inputs: Any, outputs: Any, producer=producer) -> list[Call]:
    """The calls that lead from `inputs` to `outputs`, each behind the calls that feed it.

    Args:
        inputs: Nested `KerasTensor`s; the walk stops at them.
        outputs: Nested `KerasTensor`s.
        producer: `KerasTensor -> Node`, where another than the recorded one counts.

    Returns:
        One `Call` a node, inputs excluded, in topological order.
    """
    known = {id(x) for x in symbolic_tensors(inputs)}
    calls: list[Call] = []
    pending = [(x, False) for x in reversed(symbolic_tensors(outputs))]
    while pending:
        tensor, parents_done = pending.pop()
        if id(tensor) in known:
            continue
        node = producer(tensor)
        if not parents_done:
            pending.append((tensor, True))
            pending.extend((x, False) for x in reversed(node.arguments.keras_tensors))
            continue
        known.update(id(x) for x in node.outputs)
        known.add(id(tensor))
        arguments = node.arguments
        calls.append(Call(node.operation, arguments.args, arguments.kwargs, tuple(node.outputs)))
    return calls


def calls(model: keras.Model) -> list[Call]:
    """The calls of a Functional model in topological order, inputs excluded."""
    return calls_between(model.inputs, model.outputs)


def record_call(operation: keras.Operation, args: tuple, kwargs: dict, outputs: tuple) -> list:
    """Add a call to the graph without running any shape inference.

    Args:
        operation: What is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        outputs: The specs of what comes out, flat `KerasTensor`s; they are not touched.

    Returns:
        New `KerasTensor`s of the same specs, wired to the operation.
    """
    fresh = [
        keras.KerasTensor(shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=x.name)
        for x in outputs
    ]
    Node(operation, call_args=args, call_kwargs=kwargs, outputs=fresh)
    return fresh


def view(operation: keras.Operation, name: str) -> keras.Operation:
    """A second object for an operation, with its own name and the same state.

    Layers carry their own name and their own list of calls, and both must fit the graph they are
    in. A view has its own, so that the operation it views is not touched.

    Args:
        operation: A layer (built) or an op.
        name: The name of the view.

    Returns:
        An object of the same class which shares all state by reference.
    """
    cls = type(operation)
    twin = cls.__new__(cls)
    # `__new__` binds these two to the new object; the ones of the original are bound to it.
    own = {key: twin.__dict__[key] for key in ("build", "quantize") if key in twin.__dict__}
    twin.__dict__.update(operation.__dict__)
    twin.__dict__.update(own, name=name, _inbound_nodes=[], _outbound_nodes=[])
    return twin


def requested_shape(operation: keras.Operation) -> tuple | None:
    """The target of a `reshape` or `broadcast_to` op, `None` for other operations."""
    if isinstance(operation, Reshape):
        return tuple(np.atleast_1d(operation.newshape))
    if isinstance(operation, BroadcastTo):
        return tuple(operation.shape)
    return None


def weight_layer(variable: keras.Variable, policy) -> tuple[keras.layers.Layer, np.ndarray]:
    """A plain Keras layer whose only weight is `variable`, and an argument that makes it return it.

    Keras has no layer that returns a weight. On ones, `EinsumDense` of "a,ab->ab" does, exactly;
    on -1, `PReLU` with a scalar weight returns its negative.

    Args:
        variable: A float variable.
        policy: The dtype policy of the layer.

    Returns:
        `(layer, argument)` with `layer(argument)` equal to the variable, or, for a scalar, to its
        negative with one more axis.
    """
    shape = tuple(variable.shape)
    if not shape:
        layer, attribute, argument = keras.layers.PReLU(dtype=policy), "alpha", -np.ones(1)
    else:
        axes = "abcdefghijklmnopqrstuvwxyz"[: len(shape)]
        layer = keras.layers.EinsumDense(
            f"{axes[0]},{axes}->{axes}", output_shape=shape[1:], dtype=policy
        )
        attribute, argument = "_kernel", np.ones(shape[:1])
    layer.build(argument.shape)
    _replace_weight(layer, attribute, variable)
    return layer, argument.astype("float32")


def equivalent(layer: keras.layers.Layer) -> keras.layers.Layer | None:
    """A layer of Keras that computes the same with the same variables, bit by bit, or None.

    Layers of KerasHub that cannot be saved have one: `T5LayerNorm`, in float32.

    Args:
        layer: Built.

    Returns:
        A built layer of the same name.
    """
    kind = f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}"
    if kind != "keras_hub.T5LayerNorm" or layer.compute_dtype != "float32":
        return None
    same = keras.layers.RMSNormalization(epsilon=layer.epsilon, name=layer.name)
    same.build((None, *layer.weight.shape))
    same.trainable = layer.trainable
    _replace_weight(same, "scale", layer.weight)
    return same


def _replace_weight(layer: keras.layers.Layer, attribute: str, variable: keras.Variable) -> None:
    layer._tracker.unlock()
    layer._untrack_variable(getattr(layer, attribute))
    setattr(layer, attribute, variable)
    layer._tracker.lock()


def parameters(operation: keras.Operation) -> dict:
    """What an op was made with, by name: the axis of a `split`, the repeats of a `repeat`."""
    return {key: value for key, value in vars(operation).items() if not key.startswith("_")}


UNIFORM = ("OnesLike", "ZerosLike", "FullLike")


def is_uniform(operation: keras.Operation) -> bool:
    """Whether an op reads the shape of its input alone, and all elements it makes are the same."""
    return type(operation).__name__ in UNIFORM


def axis_names(term: str, rank: int) -> list[str]:
    """A name for each axis of a term of an einsum equation, those of an ellipsis from the right.

    >>> axis_names("a...b", 4)
    ['a', '...2', '...1', 'b']
    """
    head, dots, tail = term.partition("...")
    hidden = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f"...{hidden - i}" for i in range(hidden)), *tail]


def restore_sizes(operation: keras.Operation, inputs: list, output: keras.KerasTensor) -> None:
    """Give the output of an `EinsumDense` the sizes that its input has, in place.

    Keras takes them from the `output_shape` of the layer, which in attention has None for the
    length, even if that is known.

    Args:
        operation: Any layer or op.
        inputs: The symbolic tensors among its arguments.
        output: What it returned.
    """
    if not isinstance(operation, keras.layers.EinsumDense) or not inputs:
        return
    left, right = operation.equation.replace(" ", "").split("->")
    read = inputs[0].shape
    sizes = dict(zip(axis_names(left.split(",")[0], len(read)), read, strict=True))
    letters = axis_names(right, len(output.shape))
    output._shape = tuple(
        sizes.get(letter) if size is None else size
        for letter, size in zip(letters, output.shape, strict=True)
    )
