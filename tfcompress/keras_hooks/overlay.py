"""The call overlay: what a layer computes with, replaced for as long as the overlay is on it.

`layer.call` is hooked on the instance. While it runs, reading a mapped variable gives a computed
tensor instead of its value; gradients flow through that tensor to the variable, and everything
else (updates, losses, the variables themselves) is as if nothing were there.

Private Keras API used here, each with a test in `tests/keras_hooks/test_overlay.py`:
`StatelessScope.get_current_value`, `add_update` and `add_loss`, `Variable._value` and
`_direct_assign`, `Layer._losses`, `_tracker`, `_flatten_layers`, `_trainable_variables` and
`_non_trainable_variables`, `Functional._standardize_inputs`, `Sequential._functional`, and the
global attributes `current_call_ctx`, `stateless_scope` and `autocast_scope`, which say what call is
running.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope

from tfcompress.keras_hooks.hook import add_hook

_SOURCE = "_tfcompress_source"
_TRAINING_STEP = contextvars.ContextVar("training_step", default=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Overlay:
    """What to replace in a layer's call. Functions map a tensor to a tensor of the same shape.

    Args:
        weights: `(variable, fn)` pairs; the layer sees `fn(value)`, computed once a call, in the
            dtype of the variable (mixed precision casts afterwards).
        inputs: One function, or None, for each tensor of the first argument, flattened. Of a
            Functional or Sequential model, in the order and dtype of its own inputs, whatever is
            passed: integers, numpy arrays, a dict by name. What lies beyond is left as it is.
        middle: Applied to what the depthwise half of a separable convolution hands to the
            pointwise one; see `has_middle`. A layer takes that of one overlay.
        preactivation: Applied to what the layer passes to its own `activation`.
        output: Applied to each floating-point tensor the layer returns.
    """

    weights: Sequence[tuple[keras.Variable, Callable]] = ()
    inputs: Sequence[Callable | None] = ()
    middle: Callable | None = None
    preactivation: Callable | None = None
    output: Callable | None = None


def attach(layer: keras.layers.Layer, overlay: Overlay) -> Callable[[], None]:
    """Put an overlay on a layer, around the overlays already there.

    The one attached last comes first to the weights and the inputs, and last to the output. A
    compiled step must be traced again for it to take effect.

    Args:
        layer: A layer; the variables that the overlay maps exist.
        overlay: What to replace.

    Returns:
        A function that takes it off; others stay. Without any, the layer is as it was before.

    Example:

    >>> import keras
    >>> layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    >>> layer.build((None, 2))
    >>> remove = attach(layer, Overlay(weights=[(layer.kernel, lambda w: 10.0 * w)]))
    >>> float(layer(keras.ops.ones((1, 2)))[0, 0])
    20.0
    >>> remove()
    >>> float(layer(keras.ops.ones((1, 2)))[0, 0])
    2.0
    """
    removes = [
        add_hook(layer, "call", functools.partial(_call_through, layer, overlay)),
        _add_middle(layer, overlay.middle),
    ]

    def remove():
        for each in removes:
            each()

    return remove


@contextlib.contextmanager
def attached(pairs: Iterable[tuple[keras.layers.Layer, Overlay]]) -> Iterator[None]:
    """Overlays on several layers for the length of a `with` block, whatever happens in it."""
    with contextlib.ExitStack() as stack:
        for layer, overlay in pairs:
            stack.callback(attach(layer, overlay))
        yield


def call_through(layer: keras.layers.Layer, overlay: Overlay, call: Callable, *args, **kwargs):
    """Run `call(*args, **kwargs)`, which calls `layer`, under an overlay."""
    remove = _add_middle(layer, overlay.middle)
    try:
        return _call_through(layer, overlay, call, *args, **kwargs)
    finally:
        remove()


def has_middle(layer: keras.layers.Layer) -> bool:
    """Whether a layer computes as Keras's separable convolutions do, in two halves.

    Example:

    >>> has_middle(keras.layers.SeparableConv1D(2, 3)), has_middle(keras.layers.Conv1D(2, 3))
    (True, False)
    """
    kinds = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
    # A subclass may compute something else.
    return isinstance(layer, kinds) and type(layer).call in [kind.call for kind in kinds]


def _call_through(layer, overlay, call, *args, **kwargs):
    if overlay.inputs and args:
        args = (_map_inputs(layer, overlay.inputs, args[0]), *args[1:])
    with _weights(layer, overlay.weights), _preactivation(layer, overlay.preactivation):
        outputs = call(*args, **kwargs)
    return outputs if overlay.output is None else _map_floats(overlay.output, outputs)


def original_layers(model: keras.Model) -> Callable[[keras.Operation], keras.layers.Layer | None]:
    """A function from an operation of a graph expanded from `model` to its layer in `model`.

    A flat graph may hold another object for a layer, with the same state; a layer's tracker is
    part of that state, and belongs to that layer alone. Ops that are not layers give None.
    """
    layers = {id(layer._tracker): layer for layer in model._flatten_layers()}
    return lambda operation: layers.get(id(getattr(operation, "_tracker", None)))


def readers(model: keras.Model, variables) -> list[tuple[keras.layers.Layer, list[keras.Variable]]]:
    """The layers whose call reads `variables`, each with those that it reads.

    A cell of an RNN runs inside a loop, where an overlay would be computed once a step: the RNN
    stands for it.

    Args:
        model: A model, built.
        variables: Keras variables of it.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((3, 2)), keras.layers.LSTM(4, name="lstm")])
    >>> kernels = [variable for variable in model.variables if len(variable.shape) == 2]
    >>> [(layer.name, len(read)) for layer, read in readers(model, kernels)]
    [('lstm', 2)]
    """
    wanted = {id(variable) for variable in variables}
    pending, seen, found = [model], set(), []
    while pending:
        layer = pending.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.layers.RNN):
            own = layer.variables
        else:
            own = [*layer._trainable_variables, *layer._non_trainable_variables]
            pending.extend(children(layer))
        read = [variable for variable in own if id(variable) in wanted]
        if read:
            found.append((layer, read))
    return found


def children(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers directly inside a layer."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and the layers in it at any depth, each once."""
    unique = {id(each): each for each in layer._flatten_layers()}
    return list(unique.values())


@contextlib.contextmanager
def outside_of_calls() -> Iterator[None]:
    """Run a block eagerly and as if no layer were being called, in the middle of a traced call."""
    names = ("current_call_ctx", "stateless_scope", "autocast_scope")
    values = {name: global_state.get_global_attribute(name) for name in names}
    with tf.init_scope():
        try:
            for name in names:
                global_state.set_global_attribute(name, None)
            yield
        finally:
            for name, value in values.items():
                global_state.set_global_attribute(name, value)


@contextlib.contextmanager
def training_step() -> Iterator[None]:
    """Calls in this block are training, whether or not anyone passes `training`.

    A subclassed model whose `call` takes no `training` is not told, nor are the layers in it.
    """
    token = _TRAINING_STEP.set(True)
    try:
        yield
    finally:
        _TRAINING_STEP.reset(token)


def in_training() -> bool:
    """Whether the call that is running is part of a training step, or made with `training=True`."""
    context = global_state.get_global_attribute("current_call_ctx")
    told = context is not None and context.get_value("training")
    return bool(told or _TRAINING_STEP.get())


def raw_value(variable: keras.Variable) -> tf.Tensor:
    """The value a call sees for a variable, without the cast of mixed precision."""
    scope = get_stateless_scope()
    mapped = scope.mapped_value(variable) if isinstance(scope, _WeightsScope) else None
    if mapped is not None:
        return mapped
    value = scope.get_current_value(variable) if scope is not None else None
    value = tf.convert_to_tensor(variable._value if value is None else value)
    source = getattr(variable, _SOURCE, None)
    return value if source is None else source(value)


def set_source(variable: keras.Variable, source: Callable[[tf.Tensor], tf.Tensor]) -> None:
    """Let `raw_value`, and with it every overlay, start from `source(value)` of a variable.

    For a weight that is computed from other variables, whatever is around the layer that reads it.
    The layer itself sees it under an overlay that maps the variable, if only by `tf.identity`.

    Args:
        variable: The weight.
        source: Its own value to what stands for it, of the same shape and dtype.

    Example:

    >>> import keras
    >>> variable = keras.Variable([1.0, 2.0])
    >>> set_source(variable, lambda value: 10.0 * value)
    >>> raw_value(variable).numpy()
    array([10., 20.], dtype=float32)
    """
    setattr(variable, _SOURCE, source)


@contextlib.contextmanager
def settled(model: keras.Model) -> Iterator[None]:
    """For a `with` block, let every weight that has a source hold what is computed for it."""
    computed = [variable for variable in model.variables if hasattr(variable, _SOURCE)]
    before = [tf.convert_to_tensor(variable._value) for variable in computed]
    try:
        for variable in computed:
            variable.assign(raw_value(variable))
        yield
    finally:
        for variable, value in zip(computed, before, strict=True):
            variable.assign(value)


class _WeightsScope(keras.StatelessScope):
    """A scope that replaces what is read and lets everything that is written through."""

    def __init__(self, layer: keras.layers.Layer, replaced: dict[int, tf.Tensor]):
        super().__init__(collect_losses=True, initialize_variables=False)
        self.layer = layer
        self.parent = get_stateless_scope()
        self.replaced = replaced

    def get_current_value(self, variable):
        if id(variable) in self.replaced:
            return self.replaced[id(variable)]
        return None if self.parent is None else self.parent.get_current_value(variable)

    def mapped_value(self, variable):
        """What the innermost overlay around gives for a variable; None if none maps it."""
        if id(variable) in self.replaced:
            return self.replaced[id(variable)]
        around = isinstance(self.parent, _WeightsScope)
        return self.parent.mapped_value(variable) if around else None

    def add_update(self, update):
        variable, value = update
        if self.parent is None:
            variable._direct_assign(value)
        else:
            self.parent.add_update(update)

    def add_loss(self, loss):
        if self.parent is None:
            self.layer._losses.append(loss)
        elif self.parent.collect_losses:
            self.parent.add_loss(loss)


def _weights(layer, weights):
    if not weights:
        return contextlib.nullcontext()
    # Computed here, outside of any loop the layer runs, so that an RNN does it once a sequence.
    replaced = {id(variable): fn(raw_value(variable)) for variable, fn in weights}
    return _WeightsScope(layer, replaced)


def _add_middle(layer, fn) -> Callable[[], None]:
    if fn is None:
        return lambda: None
    # Innermost: it stands for the layer's own call, around which all else is hooked.
    return add_hook(layer, "call", functools.partial(_in_halves, layer, fn), innermost=True)


def _in_halves(layer, fn, proceed, inputs):
    """The call of a separable convolution, with `fn` between its halves."""
    outputs = keras.ops.depthwise_conv(
        inputs,
        layer.depthwise_kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    outputs = keras.ops.conv(fn(outputs), layer.pointwise_kernel, data_format=layer.data_format)
    if layer.use_bias:
        shape = [1] * len(outputs.shape)
        shape[-1 if layer.data_format == "channels_last" else 1] = layer.filters
        outputs = keras.ops.add(outputs, keras.ops.reshape(layer.bias, shape))
    return outputs if layer.activation is None else layer.activation(outputs)


@contextlib.contextmanager
def _preactivation(layer, fn):
    activation = layer.__dict__.get("activation")
    if fn is None or activation is None:
        yield
        return
    # Past Keras's `__setattr__`, which would record the change in the state of the layer.
    layer.__dict__["activation"] = lambda x, *args, **kwargs: activation(fn(x), *args, **kwargs)
    try:
        yield
    finally:
        layer.__dict__["activation"] = activation


def _map_floats(fn, structure: Any) -> Any:
    return keras.tree.map_structure(lambda x: _apply_to_float(fn, x), structure)


def _map_inputs(layer, fns, passed: Any) -> Any:
    graph = getattr(layer, "_functional", None) or layer
    structure, leaves = passed, keras.tree.flatten(passed)
    if hasattr(graph, "_standardize_inputs"):
        structure, leaves = graph.input, graph._standardize_inputs(passed)
    padded = [*fns, *[None] * (len(leaves) - len(fns))]
    mapped = [_apply_to_float(fn, x) for fn, x in zip(padded, leaves, strict=True)]
    return keras.tree.pack_sequence_as(structure, mapped)


def _apply_to_float(fn, x):
    return fn(x) if fn is not None and tf.is_tensor(x) and x.dtype.is_floating else x
