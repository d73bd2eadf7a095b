"""Tracing a whole model into the calls of its primitive layers and ops.

Private Keras API used here, each with a test in `tests/keras_hooks/test_tracing.py`:
`Operation.symbolic_call`, `Operation._inbound_nodes` and `_outbound_nodes`, `Layer._layers`,
`_call_signature` and `_get_call_context`, `Sequential._functional`,
`Functional._convert_inputs_to_tensors`, and the name `any_symbolic_tensors` in the module of
`Layer`, which decides whether the call of a layer becomes a node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.layers import layer as layer_module

from tfcompress.keras_hooks.nodes import (
    Call,
    calls_between,
    is_uniform,
    restore_sizes,
    symbolic_tensors,
)
from tfcompress.keras_hooks.sizes import NAMESPACES, Sizes


class Training:
    """Stands for `training` while a model is traced: it may be passed on, but not asked."""

    def __bool__(self):
        raise ValueError("it branches on `training` in Python, and one graph holds one branch")

    def __repr__(self):
        return "training"


TRAINING = Training()


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A value that enters a traced graph beside the inputs: a constant, or a variable of a layer.

    Args:
        tensor: The `KerasTensor` that stands for it.
        value: A `keras.Variable`, or a concrete tensor.
        owner: The layer that holds the variable, `None` for a constant.
    """

    tensor: keras.KerasTensor
    value: Any
    owner: keras.layers.Layer | None = None


@dataclasses.dataclass(frozen=True)
class Trace:
    """A model as a list of calls of primitive layers and ops.

    Args:
        calls: In topological order; arguments as the operations received them, masks included.
        outputs: The outputs of the model, nested.
        sources: Values that the calls read, beside the inputs.
        paths: `id(operation) -> names`, from the outermost layer inside the model to the operation.
    """

    calls: list[Call]
    outputs: Any
    sources: list[Source]
    paths: dict[int, tuple[str, ...]]


class TraceError(ValueError):
    """The `call` of a layer cannot be traced; `layer` is that layer."""

    def __init__(self, layer: keras.layers.Layer, error: Exception):
        self.layer = layer
        super().__init__(
            f"Cannot trace {type(layer).__name__}.call of the layer {layer.name!r} into a graph"
            f"{_where(error)}: {error}\n"
            "A graph needs a `call` that does the same operations for every input. Replace Python "
            "control flow on tensors or on `training` by keras.ops (where, cond) or by a layer; if "
            "it needs the size of an axis that is None here, pass expand(model, inputs=...) with "
            "fixed sizes; or set `_tfcompress_primitive = True` on the layer to keep it whole."
        )


def _where(error: Exception) -> str:
    """` (file:line: code)` of the innermost frame outside Keras, TensorFlow and this package."""
    libraries = re.compile(r"[/\\](keras|tensorflow|optree)[/\\]")
    own = os.path.dirname(__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not libraries.search(frame.filename) and os.path.dirname(frame.filename) != own
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def trace(
    model: keras.Model,
    args: tuple,
    kwargs: dict,
    is_primitive: Callable[[keras.layers.Layer], bool],
) -> Trace:
    """Call a built model on symbolic tensors and record what its primitive layers and ops do.

    The model is as before afterwards. While it is traced, the layers that are not primitive are
    transparent (their symbolic call is their own `call`), variables that their `call` reads are
    symbolic tensors, and so is the output of a layer that is called on constants only.

    Args:
        model: Built.
        args: Positional arguments, nested `KerasTensor`s.
        kwargs: Keyword arguments.
        is_primitive: Which layers stay whole.

    Returns:
        The `Trace`.

    Raises:
        TraceError: A `call` does what no graph can hold; it names the layer and the line.
    """
    tracer = _Tracer(model, is_primitive)
    with tracer.attached():
        try:
            outputs = model(*args, **kwargs, training=TRAINING)
        except Exception as error:
            if tracer.failure is None:
                raise
            raise TraceError(*tracer.failure) from error
        return tracer.read((args, kwargs), outputs)


class _Tracer:
    """The state of one trace, and what stands in for the methods of the layers meanwhile."""

    def __init__(self, model, is_primitive):
        self.primitives, self.composites = _split(model, is_primitive)
        self.failure: tuple[keras.layers.Layer, Exception] | None = None
        self.scope: list[str] = []
        self.paths: dict[int, tuple[str, ...]] = {}
        self.masks: dict[int, dict] = {}
        self.variables: dict[int, Source] = {}
        self.constants: list[Source] = []
        self.originals: dict[int, dict] = {}
        self.behind: dict[int, list[keras.KerasTensor]] = {}
        self.sizes = Sizes(lambda: not self.in_primitive)
        self.in_primitive = False
        self.skip_node = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Make composites transparent and primitives observed; undo it all at the end."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_nodes_restored([*self.primitives, *self.composites]))
            stack.enter_context(_attributes(vars(layer_module), self._node_rule()))
            for namespace in NAMESPACES:
                stack.enter_context(_attributes(namespace, self.sizes.stand_ins()))
            stack.enter_context(_attributes(vars(tf), {"gather": _gather(tf.gather)}))
            for layer in self.primitives:
                stack.enter_context(_attributes(vars(layer), self._primitive_methods(layer)))
                stack.enter_context(_attributes(vars(layer), self._stand_ins(layer)))
            for layer in self.composites:
                stack.enter_context(_attributes(vars(layer), self._composite_methods(layer)))
                stack.enter_context(_attributes(vars(layer), _no_random_states(layer)))
                stack.enter_context(_attributes(vars(layer), self._stand_ins(layer)))
                for graph in _functional_parts(layer):
                    stack.enter_context(_attributes(vars(graph), _symbolic_conversion(graph)))
            yield

    def read(self, inputs, outputs) -> Trace:
        """The trace that leads from `inputs` to `outputs`."""
        sources = [*self.variables.values(), *self.constants]
        entries = (inputs, [source.tensor for source in sources])
        calls = [self._effective(call) for call in calls_between(entries, outputs)]
        read = {id(x) for call in calls for x in call.inputs} | set(
            map(id, symbolic_tensors(outputs))
        )
        used = [source for source in sources if id(source.tensor) in read]
        return Trace(calls, outputs, used, self.paths)

    def _effective(self, call: Call) -> Call:
        """The call with the masks it received, and without a `training` that follows the model."""
        if not isinstance(call.operation, keras.layers.Layer):
            return call
        kwargs = {**call.kwargs, **self.masks.get(id(call.outputs[0]), {})}
        training = kwargs.pop("training", None)
        operation = call.operation
        if isinstance(training, bool):
            operation = _with_fixed_training(operation, training)
        return dataclasses.replace(call, operation=operation, kwargs=kwargs)

    def _node_rule(self) -> dict[str, Callable]:
        """Keras asks `any_symbolic_tensors` if a layer call becomes a node: not composites."""
        symbolic = layer_module.any_symbolic_tensors

        def any_symbolic_tensors(args=None, kwargs=None):
            skip, self.skip_node = self.skip_node, False
            return not skip and symbolic(args, kwargs)

        return {"any_symbolic_tensors": any_symbolic_tensors}

    def _composite_methods(self, layer) -> dict[str, Callable]:
        call = layer.call

        def symbolic_call(*args, **kwargs):
            self.scope.append(layer.name)
            try:
                outputs = call(*args, **kwargs)
            except Exception as error:
                self.failure = self.failure or (layer, error)
                raise
            finally:
                path = tuple(self.scope[1:])
                self.scope.pop()
            self._claim_ops((args, kwargs), outputs, path)
            self.skip_node = True
            return outputs

        return {"symbolic_call": symbolic_call}

    def _primitive_methods(self, layer) -> dict[str, Callable]:
        symbolic, concrete = layer.symbolic_call, layer.call

        def symbolic_call(*args, **kwargs):
            self.paths.setdefault(id(layer), (*self.scope[1:], layer.name))
            inference = {k: False if v is TRAINING else v for k, v in kwargs.items()}
            with self._untouched(layer):
                outputs = symbolic(*args, **inference)
            for x in symbolic_tensors(outputs):
                restore_sizes(layer, symbolic_tensors((args, kwargs)), x)
            self._remember_masks(kwargs, outputs)
            return outputs

        # Shape inference of some layers reads the signature of `call`.
        @functools.wraps(concrete)
        def call(*args, **kwargs):
            if self.in_primitive:
                return concrete(*args, **kwargs)
            args, kwargs = keras.tree.map_structure(self._lift, (args, kwargs))
            if not symbolic_tensors((args, kwargs)):
                raise ValueError(f"it calls the layer {layer.name!r} without any tensor")
            return layer(*args, **kwargs)

        return {"symbolic_call": symbolic_call, "call": call}

    def _stand_ins(self, layer) -> dict[str, Any]:
        """Symbolic tensors for the variables in the attributes of a layer."""
        found = {k: v for k, v in vars(layer).items() if _holds_variables(k, v)}
        self.originals[id(layer)] = found
        stand_in = functools.partial(self._stand_in, layer)
        return {key: _map_variables(stand_in, value) for key, value in found.items()}

    def _stand_in(self, owner, variable):
        if id(variable) not in self.variables:
            is_float = keras.backend.is_float_dtype(variable.dtype)
            dtype = owner.compute_dtype if is_float else variable.dtype
            tensor = keras.KerasTensor(variable.shape, dtype=dtype, name=variable.name)
            self.variables[id(variable)] = Source(tensor, variable, owner)
        return self.variables[id(variable)].tensor

    def _lift(self, value):
        """A symbolic tensor in place of a concrete one, so that a call on it becomes a node."""
        if not (keras.ops.is_tensor(value) or isinstance(value, np.ndarray)):
            return value
        tensor = keras.KerasTensor(value.shape, dtype=keras.backend.standardize_dtype(value.dtype))
        self.constants.append(Source(tensor, value))
        return tensor

    @contextlib.contextmanager
    def _untouched(self, layer) -> Iterator[None]:
        """Let a primitive layer infer its shapes with its own methods and variables."""
        with contextlib.ExitStack() as stack:
            for inner in layer._flatten_layers():
                own = self.originals.get(id(inner), {})
                stack.enter_context(_attributes(vars(inner), own))
            stack.enter_context(_attributes(vars(self), {"in_primitive": True}))
            # Layers inside leave the `training` they are called with to all layers that follow.
            context = vars(layer._get_call_context())
            stack.enter_context(_attributes(context, {"training": False}))
            yield

    def _remember_masks(self, kwargs: dict, outputs) -> None:
        """Implicit masks do not survive ops between layers: the graph passes them explicitly."""
        masks = {k: v for k, v in kwargs.items() if k.endswith("mask") and symbolic_tensors(v)}
        self.masks[id(keras.tree.flatten(outputs)[0])] = masks

    def _claim_ops(self, inputs, outputs, path: tuple[str, ...]) -> None:
        """Give the ops that a composite ran, unless an inner one did, the path of the composite."""
        inputs, outputs = symbolic_tensors(inputs), symbolic_tensors(outputs)
        walked = set(map(id, inputs))
        pending = [x for x in outputs if id(x) not in walked]
        while pending:
            tensor = pending.pop()
            if id(tensor) in walked:
                continue
            walked.add(id(tensor))
            pending.extend(self.behind.get(id(tensor)) or self._claim_op(tensor, path))
        # Keeps the tensors alive as well, whose ids are keys.
        self.behind.update((id(x), [*inputs, x]) for x in outputs if id(x) not in map(id, inputs))

    def _claim_op(self, tensor, path: tuple[str, ...]) -> list[keras.KerasTensor]:
        history = getattr(tensor, "_keras_history", None)
        if history is None or history.operation is None:
            return []
        operation = history.operation
        self.paths.setdefault(id(operation), (*path, plain_name(operation)))
        if is_uniform(operation):
            return []  # It may read a tensor from before the composite, for its size.
        return operation._inbound_nodes[history.node_index].arguments.keras_tensors


def _split(model, is_primitive) -> tuple[list, list]:
    """The layers of a model that stay whole, and those that dissolve (the model first)."""
    primitives, composites = {}, {}
    pending = [model]
    while pending:
        layer = pending.pop()
        if id(layer) in primitives or id(layer) in composites:
            continue
        if layer is not model and is_primitive(layer):
            primitives[id(layer)] = layer
        else:
            composites[id(layer)] = layer
            pending.extend(layer._layers)
    return list(primitives.values()), list(composites.values())


def _functional_parts(layer) -> list[keras.Model]:
    """The Functional graphs that `layer.call` runs."""
    candidates = (layer, getattr(layer, "_functional", None))
    return [x for x in candidates if hasattr(x, "_convert_inputs_to_tensors")]


def _symbolic_conversion(graph) -> dict[str, Callable]:
    """A Functional model turns its inputs into tensors; symbolic ones only need their dtype."""

    def convert(flat_inputs):
        pairs = zip(flat_inputs, graph.inputs, strict=True)
        return [x if x is None else _as_dtype(x, spec.dtype) for x, spec in pairs]

    return {"_convert_inputs_to_tensors": convert}


def _as_dtype(x, dtype):
    if isinstance(x, keras.KerasTensor) and x.dtype == dtype:
        return x
    return keras.ops.cast(x, dtype)


class _NoRandomState:
    """In place of a `SeedGenerator`: what is drawn during the trace would be a constant."""

    def __repr__(self):
        return "nothing; random numbers in `call` need a layer of their own"


def _no_random_states(layer) -> dict[str, Any]:
    found = [k for k, v in vars(layer).items() if isinstance(v, keras.random.SeedGenerator)]
    return dict.fromkeys(found, _NoRandomState())


_BOOKKEEPING = {"_trainable_variables", "_non_trainable_variables", "_seed_generators", "_metrics"}


def _holds_variables(key: str, value) -> bool:
    if key in _BOOKKEEPING:
        return False
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(x, keras.Variable) for x in items)


def _map_variables(fn, value):
    def swap(x):
        return fn(x) if isinstance(x, keras.Variable) else x

    if isinstance(value, dict):
        return {key: swap(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [swap(x) for x in value]
    return swap(value)


_NOISE = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


# These take `training` and do nothing with it.
_HEEDLESS = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding)


def _with_fixed_training(layer, training: bool):
    """What does the same as `layer(..., training=training)` whatever the model is told.

    A Functional model overrides the `training` of every call, so it cannot be kept as an argument.
    """
    if isinstance(layer, _NOISE) and not training:
        return keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy)
    if isinstance(layer, keras.layers.BatchNormalization) and not (training or layer.trainable):
        return layer
    if "training" not in call_arguments(layer) or isinstance(layer, _HEEDLESS):
        return layer
    raise TraceError(
        layer,
        ValueError(
            f"it is called with training={training}, which a Functional graph cannot fix; pass "
            "`training` on instead, and freeze batch norm by `layer.trainable = False`"
        ),
    )


def sublayers(layer) -> list[keras.layers.Layer]:
    """The layers inside a layer, at any depth."""
    return layer._flatten_layers(include_self=False)


def call_arguments(layer) -> list[str]:
    """The names of the arguments of `layer.call`."""
    return list(layer._call_signature.parameters)


def plain_name(operation) -> str:
    """The name of an operation, without the process-wide counter of generated names."""
    generated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()
    return generated if re.fullmatch(rf"{generated}(_\d+)?", operation.name) else operation.name


def _gather(plain: Callable) -> Callable:
    """`tf.gather`, which KerasHub's DeBERTa calls, as an op where its arguments are symbolic."""

    @functools.wraps(plain)
    def gather(params, indices, *args, axis=None, batch_dims=0, **kwargs):
        if args or kwargs or not symbolic_tensors((params, indices)):
            return plain(params, indices, *args, axis=axis, batch_dims=batch_dims, **kwargs)
        axis = batch_dims if axis is None else axis
        if not batch_dims:
            return keras.ops.take(params, indices, axis=axis)
        if axis == batch_dims == len(params.shape) - 1 == len(indices.shape) - 1:
            return keras.ops.take_along_axis(params, indices, axis=axis)
        raise ValueError(f"tf.gather with batch_dims={batch_dims} has no op; use keras.ops")

    return gather


_MISSING = object()


@contextlib.contextmanager
def _attributes(namespace: dict, values: dict) -> Iterator[None]:
    """Set entries of an object's `__dict__` for a while, past its `__setattr__`."""
    before = {key: namespace.get(key, _MISSING) for key in values}
    namespace.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is _MISSING:
                del namespace[key]
            else:
                namespace[key] = value


@contextlib.contextmanager
def _nodes_restored(layers) -> Iterator[None]:
    """Forget the nodes that are added to `layers`, and to the ops of Functional ones, meanwhile."""
    operations = {id(op): op for layer in layers for op in getattr(layer, "operations", ())}
    operations.update({id(layer): layer for layer in layers})
    lists = [x for op in operations.values() for x in (op._inbound_nodes, op._outbound_nodes)]
    lengths = [len(x) for x in lists]
    try:
        yield
    finally:
        for nodes, length in zip(lists, lengths, strict=True):
            del nodes[length:]
