"""Any model as one flat Functional graph of primitive layers and ops."""

from __future__ import annotations

import logging
import re
from typing import Any

import keras
import numpy as np

from tfcompress.graph.rebuild import fill, new_input
from tfcompress.keras_hooks import nodes, tracing

_log = logging.getLogger("tfcompress")


def expand(model: keras.Model, inputs: Any = None) -> keras.Model:
    """Turn any built model into one flat Functional graph of the same function and weights.

    Sequential, Functional, nested, subclassed and KerasHub models become one graph whose nodes are
    primitive layers and `keras.ops`. Recurrent layers, `keras.layers.Wrapper`s, and layers with
    `_tfcompress_primitive = True` stay whole. Outputs are equal to the last bit. Training the
    result trains `model`, for they share their variables; nothing else of `model` changes.

    A layer is represented by a view: an object of its class, with its variables and settings, named
    after its path (`block_1/conv` becomes `block_1_conv`). Set `trainable` before expanding: each
    view has its own flag. The result is not compiled, and lacks layers that no output depends on.

    A size that only a batch has (`ops.shape(x)[1]` of an input of any length) is computed in the
    graph, by plain ops, so that the result takes any batch and length that `model` takes.

    A variable that is read by the `call` of a layer with sublayers becomes the kernel of an
    `EinsumDense` on ones, or a look-up of all rows if it belongs to an `Embedding`, so that the
    saved model is plain Keras. A variable of another primitive layer that is read like this stays
    one variable in this process, but becomes two in a saved file; the log warns.

    Args:
        model: A built model.
        inputs: What `model` is called on, for subclassed models, where Keras records one shape and
            no dtype, or to fix sizes: nested `KerasTensor`s, `InputSpec`s, or an example batch,
            whose first axis is taken as a batch of any size. A dict that names several arguments of
            `call` is passed by name.

    Returns:
        A Functional model of the same name.

    Raises:
        ValueError: `model` is not built or not a model, its inputs are not known, or its `call`
            cannot be traced; the message names the layer and the line.

    Example:

    >>> import keras
    >>> head = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(2)], name="head")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU(name="relu"), head])
    >>> flat = expand(model)
    >>> [type(layer).__name__ for layer in flat.layers]
    ['InputLayer', 'ReLU', 'Dense', 'Dense']
    >>> flat.layers[2].kernel is head.layers[0].kernel
    True
    """
    _require_built_model(model)
    symbolic = _symbolic_inputs(model, inputs)
    trace = _trace(model, symbolic)
    indices = _index_inputs(symbolic, trace) if inputs is None else set()
    if indices:
        symbolic = keras.tree.map_structure(
            lambda x: _as_index(x) if id(x) in indices else x, symbolic
        )
        trace = _trace(model, symbolic)
    return _assemble(model, symbolic, trace)


def is_primitive(layer: keras.layers.Layer) -> bool:
    """Whether `expand` keeps a layer whole.

    >>> is_primitive(keras.layers.LSTM(4)), is_primitive(keras.Sequential([keras.layers.ReLU()]))
    (True, False)
    """
    whole = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.Wrapper)
    return (
        getattr(layer, "_tfcompress_primitive", False)
        or isinstance(layer, whole)
        or layer.activity_regularizer is not None
        or not (tracing.sublayers(layer) or _cannot_be_saved(layer))
    )


def _from_library(layer: keras.layers.Layer) -> bool:
    return type(layer).__module__.split(".")[0] in ("keras", "keras_hub")


def _cannot_be_saved(layer: keras.layers.Layer) -> bool:
    """Whether it is a layer of KerasHub without `get_config`, whose ops are saved instead."""
    if not _from_library(layer) or nodes.equivalent(layer) is not None:
        return False
    try:
        layer.get_config()
    except NotImplementedError:
        return True
    return False


def _trace(model: keras.Model, inputs: Any) -> tracing.Trace:
    """Trace; layers of Keras and KerasHub that cannot be traced stay whole, and the log says so."""
    args, kwargs = _call_arguments(model, inputs)
    kept: set[int] = set()
    while True:
        try:
            return tracing.trace(model, args, kwargs, lambda x: id(x) in kept or is_primitive(x))
        except tracing.TraceError as error:
            layer = error.layer
            if layer is model or id(layer) in kept or not _from_library(layer):
                raise
            kept.add(id(layer))
            reason = str(error).splitlines()[0]
            _log.info("expand keeps %s whole: %s", layer.path or layer.name, reason)


def _require_built_model(model: Any) -> None:
    if isinstance(model, keras.distillation.Distiller):
        raise ValueError(
            f"expand got the Distiller {model.name!r}, which holds two models; pass its .student."
        )
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"expand needs a keras.Model, but got {model!r}. Put a layer into "
            "keras.Sequential([keras.Input(shape), layer]) first."
        )
    if not model.built:
        raise ValueError(
            f"expand needs a built model, but {model.name!r} has no weights yet. Call it on a "
            "batch, or model.build(input_shape), or start it with keras.Input(shape)."
        )


def _symbolic_inputs(model: keras.Model, inputs: Any) -> Any:
    """New `keras.Input`s in the structure that the model is called on."""
    if inputs is not None:
        return _inputs_like(inputs)
    if isinstance(model, keras.Sequential) and hasattr(model, "inputs"):
        return new_input(model.inputs[0])
    if hasattr(model, "operations"):
        return keras.tree.map_structure(new_input, model.input)
    return _recorded_inputs(model)


def _recorded_inputs(model: keras.Model) -> Any:
    """Inputs after the shapes that Keras recorded when the model was built."""
    config = model.get_build_config() or {}
    shapes = config.get("input_shape", config.get("shapes_dict"))
    if shapes is None:
        raise ValueError(
            f"The inputs of {model.name!r} are not known. Pass expand(model, inputs=...) an "
            "example batch, or keras.Input()s, in the structure that the model is called on."
        )
    if "shapes_dict" in config:
        shapes = {key.removesuffix("_shape"): shape for key, shape in shapes.items()}
    return _named_inputs(shapes, lambda shape: ((None, *shape[1:]), "float32"), _is_shape)


def _is_shape(x) -> bool:
    return isinstance(x, (tuple, list)) and all(d is None or isinstance(d, int) for d in x)


def _inputs_like(inputs: Any) -> Any:
    """Inputs after tensors, specs or arrays."""

    def spec(x):
        if isinstance(x, (keras.KerasTensor, keras.InputSpec)):
            return tuple(x.shape), x.dtype or "float32"
        x = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
        return (None, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)

    return _named_inputs(inputs, spec, lambda x: not isinstance(x, (dict, list, tuple)))


def _named_inputs(structure, spec, is_leaf, name="inputs") -> Any:
    if is_leaf(structure):
        shape, dtype = spec(structure)
        return keras.Input(batch_shape=shape, dtype=dtype, name=name)
    if isinstance(structure, dict):
        return {key: _named_inputs(x, spec, is_leaf, key) for key, x in structure.items()}
    return [_named_inputs(x, spec, is_leaf, f"{name}_{i}") for i, x in enumerate(structure)]


def _call_arguments(model: keras.Model, inputs: Any) -> tuple[tuple, dict]:
    """`(args, kwargs)`: a dict that names several arguments of `call` is passed by name."""
    names = tracing.call_arguments(model)
    if isinstance(inputs, dict) and not hasattr(model, "operations"):
        first = names[0] if names else None
        if first in inputs and set(inputs) <= set(names):
            return (), inputs
    return (inputs,), {}


def _index_inputs(inputs: Any, trace: tracing.Trace) -> set[int]:
    """The ids of the float inputs that only embeddings, and the masks they make, read.

    Keras does not record the dtype that a subclassed model was called on.
    """
    readers: dict[int, list[keras.Operation]] = {}
    for call in trace.calls:
        for x in call.inputs:
            readers.setdefault(id(x), []).append(call.operation)
    embeddings = {
        key
        for key, ops in readers.items()
        if any(isinstance(x, keras.layers.Embedding) for x in ops)
    }
    return {
        id(x)
        for x in keras.tree.flatten(inputs)
        if keras.backend.is_float_dtype(x.dtype)
        and id(x) in embeddings
        and all(_reads_indices(operation) for operation in readers[id(x)])
    }


def _reads_indices(operation: keras.Operation) -> bool:
    is_embedding = isinstance(operation, keras.layers.Embedding)
    reads_any_dtype = tracing.plain_name(operation) == "not_equal" or nodes.is_uniform(operation)
    return is_embedding or reads_any_dtype


def _as_index(x: keras.KerasTensor) -> keras.KerasTensor:
    return keras.Input(batch_shape=x.shape, dtype="int32", name=x.name)


def _assemble(model: keras.Model, inputs: Any, trace: tracing.Trace) -> keras.Model:
    """The traced calls, on views with unique names, as a Functional model."""
    for x in keras.tree.flatten(trace.outputs):
        if not isinstance(x, keras.KerasTensor):
            raise ValueError(
                f"expand needs outputs that depend on the inputs, but {model.name!r} returns "
                f"{x!r}. Return tensors only."
            )
    builder = _Builder(keras.tree.flatten(inputs), trace.paths)
    for source in trace.sources:
        builder.tensors[id(source.tensor)] = builder.value(source)
    fill(trace.calls, builder.tensors, builder.call)
    outputs = keras.tree.map_structure(lambda x: builder.tensors[id(x)], trace.outputs)
    return keras.Model(inputs, outputs, name=model.name)


class _Builder:
    """Builds the flat graph: `tensors` maps the traced tensors to those of the graph."""

    def __init__(self, inputs: list[keras.KerasTensor], paths: dict[int, tuple[str, ...]]):
        self.inputs = inputs
        self.tensors = {id(x): x for x in inputs}
        self._paths = dict(paths)
        self._names = {x.name for x in inputs}
        self._views: dict[int, tuple[keras.Operation, keras.Operation]] = {}
        self._zeros: dict[str, keras.KerasTensor] = {}

    def call(self, node: nodes.Call, args: tuple, kwargs: dict) -> list[keras.KerasTensor]:
        shape = nodes.requested_shape(node.operation)
        if shape is not None and None in shape:
            resized = _to_batch_shape(node.operation, args[0], shape, self.inputs[0])
            return [self._add(resized, [args[0], *self.inputs])]
        return nodes.record_call(self.view(node.operation), args, kwargs, node.outputs)

    def view(self, operation: keras.Operation) -> keras.Operation:
        """The one view of an operation in this graph."""
        if id(operation) not in self._views:
            path = self._paths.get(id(operation), (tracing.plain_name(operation),))
            stand_in = nodes.equivalent(operation) or operation
            view = nodes.view(stand_in, self.unique_name("_".join(path)))
            # The operation is kept as well: a freed one would pass on its id.
            self._views[id(operation)] = view, operation
        return self._views[id(operation)][0]

    def unique_name(self, name: str) -> str:
        """`name`, numbered if this graph has it already, of characters that any name may have."""
        base = re.sub(r"[^\w.-]", "_", name).lstrip("_-.") or "layer"
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def value(self, source: tracing.Source) -> keras.KerasTensor:
        """The value of a source, as plain Keras operations on an input of the graph."""
        if source.owner is None:
            return self._constant(source.value)
        if isinstance(source.owner, keras.layers.Embedding):
            rows = self._constant(np.arange(source.tensor.shape[0], dtype="int32"))
            return nodes.record_call(self.view(source.owner), (rows,), {}, (source.tensor,))[0]
        return self._weight(source)

    def _weight(self, source: tracing.Source) -> keras.KerasTensor:
        """A variable as the output of a layer that holds it."""
        variable, owner = source.value, source.owner
        if not tracing.sublayers(owner):
            _log.warning(
                "expand: %s is used outside its layer; once saved and loaded, the two are not tied",
                variable.path,
            )
        layer, argument = nodes.weight_layer(variable, owner.dtype_policy)
        self._paths[id(layer)] = (variable.path,)
        if len(variable.shape):
            return self._plain(layer, argument)
        return self._plain(lambda x: keras.ops.negative(keras.ops.squeeze(layer(x), 0)), argument)

    def _constant(self, value) -> keras.KerasTensor:
        """`value + 0`, where the 0 is computed from an input, which puts it into the graph."""
        return self._plain(lambda x: x, keras.ops.convert_to_numpy(value))

    def _plain(self, fn, value: np.ndarray) -> keras.KerasTensor:
        dtype = str(value.dtype)
        if dtype not in self._zeros:
            zero = keras.ops.sum(keras.ops.zeros_like(self.inputs[0]))
            self._zeros[dtype] = self._add(keras.ops.cast(zero, dtype), self.inputs)
        zero = self._zeros[dtype]
        return self._add(fn(keras.ops.add(value, zero)), [zero])

    def _add(self, result: keras.KerasTensor, inputs: list) -> keras.KerasTensor:
        """Add to the graph what leads from tensors of the graph to `result`."""
        self.tensors.update((id(x), x) for x in inputs)
        fill(nodes.calls_between(inputs, result), self.tensors, self.call)
        return self.tensors[id(result)]


def _to_batch_shape(operation, x, shape: tuple, anchor: keras.KerasTensor) -> keras.KerasTensor:
    """`reshape` or `broadcast_to` of `x` to `(batch, ...)`, without the size of the batch.

    A graph has no number for the batch: `keras.layers.Reshape` keeps the axis, and a sum with zeros
    made from an input of the model has it.
    """
    rest = shape[1:]
    if shape[0] is not None or sum(size in (None, -1) for size in rest) > 1:
        raise ValueError(
            f"expand cannot express the {tracing.plain_name(operation)} of a tensor of shape "
            f"{x.shape} to {shape}: more than the batch axis is of unknown size. Pass "
            "expand(model, inputs=...) with fixed sizes."
        )
    if tracing.plain_name(operation) == "reshape":
        return keras.layers.Reshape([-1 if size is None else size for size in rest])(x)
    combine = keras.ops.logical_or if x.dtype == "bool" else keras.ops.add
    zeros = keras.ops.sum(keras.ops.zeros_like(anchor), axis=tuple(range(1, len(anchor.shape))))
    zeros = keras.ops.cast(keras.layers.Reshape((1,) * len(rest))(zeros), x.dtype)
    return combine(combine(x, np.zeros((1, *rest), dtype=x.dtype)), zeros)
