"""What each layer of a model costs: measured here, or estimated from its shapes."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfcompress.graph.expand import expand
from tfcompress.graph.macs import call_macs
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.devices import native
from tfcompress.parallel.partition import LayerCost
from tfcompress.timing import Timing, latency

# A device of the middle sort. Only the ratio of the two matters for where a model is cut.
_MACS_PER_SECOND = 5e10
_BYTES_PER_SECOND = 1e10
# A backward pass makes two products for each one of the forward pass.
_BACKWARD = 2.0
_REPEATS = 8


def layer_costs(
    model: keras.Model, batch: Any, measure: bool = False, training: bool = True
) -> tuple[LayerCost, ...]:
    """What each call in a model's flat graph costs with one micro-batch.

    Measured calls run by themselves on TensorFlow's default device, several times in one graph, so
    that what it costs to start one does not count; of calls of the same kind, shapes and settings
    one is measured. What a whole stage shares or hides (fusion, the cache, ops that run side by
    side) is not seen. Estimates are the multiply-accumulates at 5e10 a second plus all bytes that
    are read and written at 1e10 a second, and twice that backward.

    Args:
        model: Any built model; see `tfcompress.expand`.
        batch: An example micro-batch, in the structure of the model's inputs.
        measure: Whether to measure; else estimate.
        training: Whether the backward pass counts; else it costs 0.

    Returns:
        A `LayerCost` for each call, in the order of the graph.

    Raises:
        ValueError: See `tfcompress.expand`.

    Example:

    >>> import numpy as np
    >>> layers = [keras.Input((64,)), keras.layers.Dense(256, name="wide"), keras.layers.Dense(8)]
    >>> costs = layer_costs(keras.Sequential(layers), np.zeros((16, 64), "float32"))
    >>> [cost.weight_bytes for cost in costs], costs[1].reads, costs[0].output_bytes
    ([66560, 8224], (0,), 16384)
    """
    flat = expand(model)
    return graph_costs(flat, _tensors(flat, batch), measure, training)


def graph_costs(flat, tensors, measure=False, training=True) -> tuple[LayerCost, ...]:
    """`layer_costs` of a flat graph; `tensors` are its inputs, in their order."""
    calls = nodes.calls(flat)
    values = dict(zip(map(id, flat.inputs), tensors, strict=True))
    makers = {id(x): place for place, call in enumerate(calls) for x in call.outputs}
    seen: set[int] = set()
    known: dict[Any, tuple[float, float]] = {}
    costs = []
    for call in calls:
        args, kwargs = _filled((call.args, call.kwargs), values)
        outputs = keras.tree.flatten(call.operation(*args, **kwargs))
        values.update(zip(map(id, call.outputs), outputs, strict=True))
        key = _kind(call, args, kwargs)
        if key not in known:
            known[key] = (_measured if measure else _estimated)(call.operation, args, kwargs)
        forward, backward = known[key]
        new = [variable for variable in variables(call) if id(variable) not in seen]
        seen.update(map(id, new))
        costs.append(
            LayerCost(
                name=call.operation.name,
                forward=forward,
                backward=backward if training else 0.0,
                weight_bytes=sum(map(num_bytes, new)),
                output_bytes=sum(map(num_bytes, outputs)),
                reads=tuple(dict.fromkeys(makers[id(x)] for x in call.inputs if id(x) in makers)),
                examples=int(tensors[0].shape[0]),
            )
        )
    return tuple(costs)


def example(flat: keras.Model) -> list[tf.Tensor]:
    """One example of zeros, flat; a ValueError where the shape of an input is not known."""
    for x in flat.inputs:
        if None in x.shape[1:]:
            raise ValueError(
                f"The inputs of {flat.name!r} have no fixed shape: {x.name!r} is {x.shape}. Pass "
                "balance=Balance(costs=layer_costs(model, batch)) with an example batch."
            )
    return [tf.zeros((1, *x.shape[1:]), x.dtype) for x in flat.inputs]


def variables(call: nodes.Call) -> list[keras.Variable]:
    """Of the layer that is called; ops have none."""
    is_layer = isinstance(call.operation, keras.layers.Layer)
    return list(call.operation.variables) if is_layer else []


def num_bytes(tensor) -> int:
    """Of a tensor or variable of known shape."""
    dtype = tf.as_dtype(keras.backend.standardize_dtype(tensor.dtype))
    return math.prod(tensor.shape) * dtype.size


def _tensors(flat, batch) -> list[tf.Tensor]:
    if isinstance(flat.input, dict) and isinstance(batch, dict):
        batch = {key: batch[key] for key in flat.input}
    return [
        tf.cast(tf.convert_to_tensor(value), x.dtype)
        for value, x in zip(keras.tree.flatten(batch), flat.inputs, strict=True)
    ]


def _filled(structure, values):
    return keras.tree.map_structure(
        lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x, structure
    )


def _kind(call, args, kwargs):
    """Equal for calls that cost the same."""
    operation = call.operation
    if isinstance(operation, keras.layers.Layer):
        config = {key: x for key, x in operation.get_config().items() if key != "name"}
        settings = repr(config), tuple(tuple(x.shape) for x in operation.variables)
    else:
        settings = repr(nodes.parameters(operation) | {"name": None})
    given = keras.tree.flatten(
        keras.tree.map_structure(lambda x: _spec(x) if tf.is_tensor(x) else repr(x), (args, kwargs))
    )
    return type(operation), settings, tuple(given)


def _spec(tensor) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _estimated(operation, args, kwargs) -> tuple[float, float]:
    tensors = [x for x in keras.tree.flatten((args, kwargs)) if tf.is_tensor(x)]
    specs = keras.tree.map_structure(lambda x: _spec(x) if tf.is_tensor(x) else x, (args, kwargs))
    outputs = keras.tree.flatten(operation(*args, **kwargs))
    weights = operation.variables if isinstance(operation, keras.layers.Layer) else []
    is_table = isinstance(operation, keras.layers.Embedding)
    read = [*tensors, *outputs, *(() if is_table else weights)]
    seconds = call_macs(operation, *specs) / _MACS_PER_SECOND
    seconds += sum(map(num_bytes, read)) / _BYTES_PER_SECOND
    return seconds, _BACKWARD * seconds


def _measured(operation, args, kwargs) -> tuple[float, float]:
    """Seconds forward, and backward."""
    tensors = [x for x in keras.tree.flatten((args, kwargs)) if tf.is_tensor(x)]
    timed = {
        (name, repeats): _repeated(run, operation, args, kwargs, repeats)
        for name, run in (("forward", _forward), ("both", _both))
        for repeats in (1, 1 + _REPEATS)
    }
    found = latency(
        {key: (lambda function=function: function(tensors)) for key, function in timed.items()},
        Timing(rounds=7, min_ms=1.0),
    )
    forward, both = (
        max(found[name, 1 + _REPEATS].lower_ms - found[name, 1].lower_ms, 0.0) / _REPEATS / 1e3
        for name in ("forward", "both")
    )
    return forward, max(both - forward, 0.0)


def _repeated(run, operation, args, kwargs, repeats):
    """A function of the tensors that calls the operation so often, one call after the other."""

    @tf.function(autograph=False)
    def function(tensors):
        given = iter(tensors)
        structure = keras.tree.map_structure(
            lambda x: next(given) if tf.is_tensor(x) else x, (args, kwargs)
        )
        found: list = [[]]
        for _ in range(repeats):
            # Equal ops on equal inputs that wait for the same would be made one.
            with tf.control_dependencies(found[-1]):
                found.append(run(operation, *structure))
        return found  # What is not returned would not be computed.

    return function.get_concrete_function(
        [_spec(x) for x in keras.tree.flatten((args, kwargs)) if tf.is_tensor(x)]
    )


def _forward(operation, args, kwargs) -> list:
    return keras.tree.flatten(operation(*args, **kwargs))


def _both(operation, args, kwargs) -> list:
    weights = operation.trainable_variables if isinstance(operation, keras.layers.Layer) else []
    sources = [native(variable) for variable in weights]
    sources += [
        x for x in keras.tree.flatten((args, kwargs)) if tf.is_tensor(x) and x.dtype.is_floating
    ]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = _forward(operation, args, kwargs)
    targets = [x for x in outputs if x.dtype.is_floating]
    if not targets or not sources:
        return outputs
    gradients = tape.gradient(targets, sources)
    return [*outputs, *(tf.convert_to_tensor(x) for x in gradients if x is not None)]
