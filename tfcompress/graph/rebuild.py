"""Walking and rebuilding flat Functional graphs: the two functions every pass stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tfcompress.keras_hooks import nodes


def require_functional(model: keras.Model, what: str) -> keras.Model:
    """The Functional model in `model`, or a ValueError that says how to get one.

    Args:
        model: Any model.
        what: The function that needs it, for the message.

    Returns:
        `model` itself.

    Raises:
        ValueError: It has no graph of its own.
    """
    if isinstance(model, keras.Model) and hasattr(model, "operations"):
        return model
    raise ValueError(
        f"{what} reads the graph of a Functional model, but got {model!r} of type "
        f"{type(model).__name__}. Pass it through tfcompress.expand(model) first."
    )


def map_layers(
    model: keras.Model, fn: Callable[[keras.Operation], keras.Operation | None]
) -> keras.Model:
    """Rebuild a Functional model with some of its operations replaced.

    `fn` sees every layer and op once, however often it is called, in topological order; inputs are
    kept. What it returns is called on the arguments of the old one:

    * the same object: kept, with its variables;
    * another layer: called in its place (and built, if it was not);
    * `None`: dropped; its first input takes the place of its output.

    Args:
        model: A Functional model, e.g. from `tfcompress.expand`.
        fn: `operation -> operation | None`.

    Returns:
        A new Functional model of the same inputs, structure and name. `model` is not touched.

    Raises:
        ValueError: `model` is not Functional.

    Example:

    >>> import keras
    >>> x = keras.Input((4,))
    >>> model = keras.Model(x, keras.layers.Dropout(0.5)(keras.layers.Dense(2)(x)))
    >>> lean = map_layers(model, lambda op: None if isinstance(op, keras.layers.Dropout) else op)
    >>> [type(layer).__name__ for layer in lean.layers]
    ['InputLayer', 'Dense']
    """
    require_functional(model, "map_layers")
    chosen: dict[int, keras.Operation | None] = {}

    def call(node: nodes.Call, args: tuple, kwargs: dict) -> Any:
        key = id(node.operation)
        if key not in chosen:
            chosen[key] = fn(node.operation)
        operation = chosen[key]
        if operation is None:
            return nodes.symbolic_tensors((args, kwargs))[: len(node.outputs)]
        if operation is node.operation:
            return nodes.record_call(operation, args, kwargs, node.outputs)
        return operation(*args, **kwargs)

    return replay(model, call)


def replay(model: keras.Model, call: Callable[[nodes.Call, tuple, dict], Any]) -> keras.Model:
    """Rebuild a Functional model call by call.

    Args:
        model: A Functional model.
        call: `(old call, new args, new kwargs) -> new outputs`, nested `KerasTensor`s.

    Returns:
        A new Functional model of the same inputs, structure and name.
    """
    inputs = keras.tree.map_structure(new_input, model.input)
    tensors = dict(zip(map(id, model.inputs), keras.tree.flatten(inputs), strict=True))
    fill(nodes.calls(model), tensors, call)
    outputs = keras.tree.map_structure(lambda x: tensors[id(x)], model.output)
    return keras.Model(inputs, outputs, name=model.name, trainable=model.trainable)


def fill(calls: list[nodes.Call], tensors: dict[int, Any], call: Callable) -> None:
    """Run `call` over `calls`, reading its arguments from and writing its outputs to `tensors`.

    Args:
        calls: In topological order.
        tensors: `id(old tensor) -> new tensor`, with an entry for each input; extended in place.
        call: `(old call, new args, new kwargs) -> new outputs`.
    """

    def swap(x):
        return tensors.get(id(x), x) if isinstance(x, keras.KerasTensor) else x

    for node in calls:
        args = keras.tree.map_structure(swap, node.args)
        kwargs = keras.tree.map_structure(swap, node.kwargs)
        outputs = keras.tree.flatten(call(node, args, kwargs))
        for x in outputs:
            maker = nodes.producer(x)
            nodes.restore_sizes(maker.operation, maker.arguments.keras_tensors, x)
        tensors.update(zip(map(id, node.outputs), outputs, strict=True))


def new_input(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """A new `keras.Input` with the shape, dtype and name of an old one."""
    layer = nodes.producer(tensor).operation
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=layer.name,
        optional=getattr(layer, "optional", False),
    )


def consumers(model: keras.Model) -> dict[str, list[keras.Operation]]:
    """Which operations read the output of each operation.

    Args:
        model: A Functional model, e.g. from `tfcompress.expand`.

    Returns:
        `{operation.name: [operations]}` in graph order, inputs included. An operation that reads
        the same output twice, or a shared one that reads it in two calls, is listed once. What only
        leaves the model as an output has an empty list.

    Raises:
        ValueError: `model` is not Functional.

    Example:

    >>> import keras
    >>> x = keras.Input((4,), name="x")
    >>> h = keras.layers.Dense(4, name="h")(x)
    >>> model = keras.Model(x, keras.layers.Add(name="sum")([x, h]))
    >>> {name: [op.name for op in ops] for name, ops in consumers(model).items()}
    {'x': ['h', 'sum'], 'h': ['sum'], 'sum': []}
    """
    require_functional(model, "consumers")
    readers: dict[str, list[keras.Operation]] = {
        nodes.producer(x).operation.name: [] for x in model.inputs
    }
    for call in nodes.calls(model):
        readers.setdefault(call.operation.name, [])
        for tensor in call.inputs:
            listed = readers[nodes.producer(tensor).operation.name]
            if all(call.operation is not x for x in listed):
                listed.append(call.operation)
    return readers


def copied(model: keras.Model) -> keras.Model:
    """A Functional model of the same layers with weights of their own.

    Args:
        model: A Functional model, e.g. from `tfcompress.expand`.

    Raises:
        ValueError: `model` is not Functional.

    Example:

    >>> import keras
    >>> x = keras.Input((1,))
    >>> model = keras.Model(x, keras.layers.Dense(1, name="dense")(x))
    >>> twin = copied(model)
    >>> twin.layers[-1].kernel is model.layers[-1].kernel
    False
    >>> bool(twin.layers[-1].kernel == model.layers[-1].kernel)
    True
    """
    # Not `clone_model`, in which sizes get lost that `fill` restores.
    copies: dict[int, keras.layers.Layer] = {}

    def call(node: nodes.Call, args: tuple, kwargs: dict) -> Any:
        layer = node.operation
        if not isinstance(layer, keras.layers.Layer):
            return nodes.record_call(layer, args, kwargs, node.outputs)
        if id(layer) not in copies:
            copies[id(layer)] = type(layer).from_config(layer.get_config())
        return copies[id(layer)](*args, **kwargs)

    require_functional(model, "copied")
    copy = replay(model, call)
    for old in model.layers:
        if id(old) in copies:
            new = copies[id(old)]
            new.set_weights(old.get_weights())
            finalize(new)
    return copy


def finalize(layer: keras.layers.Layer) -> None:
    """Let a layer whose weights were set derive what it computes with, as `Normalization` does."""
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()


class Uses:
    """Who produces and who reads each tensor of a flat model.

    Args:
        flat: A Functional model, e.g. from `tfcompress.expand`.
    """

    def __init__(self, flat: keras.Model):
        self.calls = nodes.calls(flat)
        self.producers = {id(x): call for call in self.calls for x in call.outputs}
        self.readers: dict[int, list[nodes.Call]] = {}
        for call in self.calls:
            for x in call.inputs:
                self.readers.setdefault(id(x), []).append(call)
        self._outputs = {id(x) for x in flat.outputs}
        self._num_calls: dict[int, int] = {}
        for call in self.calls:
            self._num_calls[id(call.operation)] = self._num_calls.get(id(call.operation), 0) + 1

    def is_output(self, call: nodes.Call) -> bool:
        """Whether what the operation returns is an output of the model."""
        return id(call.outputs[0]) in self._outputs

    def is_shared(self, call: nodes.Call) -> bool:
        """Whether the operation is called elsewhere too."""
        return self._num_calls[id(call.operation)] > 1

    def only_reader(self, call: nodes.Call) -> nodes.Call | None:
        """The one call that reads the output of `call`, if no other does and it is no output."""
        tensor = id(call.outputs[0])
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self._outputs else None
