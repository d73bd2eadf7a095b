"""A model into one whose layers compute as their integer versions will."""

import logging
from typing import Any

import keras
import tensorflow as tf

from tfcompress.batches import input_batches
from tfcompress.graph.expand import expand
from tfcompress.graph.placement import place
from tfcompress.graph.rebuild import replay
from tfcompress.keras_hooks import nodes, walk
from tfcompress.keras_hooks.quantizer import calibrating, weight_axes
from tfcompress.layers.quantize import Quantize
from tfcompress.ops import ranges
from tfcompress.ops.schemes import Scheme, scheme_pair

logger = logging.getLogger("tfcompress")

# Ops that only move values: what comes out is on the grid of what went in.
_MOVING_OPS = (
    "Reshape", "Transpose", "Squeeze", "ExpandDims", "GetItem", "Identity", "Flip", "Split",
    "BroadcastTo", "Repeat", "Take", "Cast", "Pad",
)  # fmt: skip


def quantize(
    model: keras.Model,
    weights: str | Scheme | None = "int8",
    activations: str | Scheme | None = "int8",
    calibration: Any = None,
    include=None,
    exclude=None,
) -> keras.Model:
    """Put `layers.Quantize` around every layer that computes, and calibrate the ranges.

    The result is a flat Functional model with copies of the weights. With `calibration`, its ranges
    hold all that these batches produce, and it is ready for `tfcompress.export`; without, or to
    recover accuracy, train it: training observes the ranges. `tfcompress.strip` takes the wrappers
    off again, with the weights on their grids.

    Args:
        model: A built model that `tfcompress.expand` takes.
        weights: `"int8"`, `"int2"` to `"int8"`, a symmetric `Scheme`, or None to leave them float.
        activations: The same, asymmetric per tensor; None to leave them float.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator. They
            are streamed once.
        include: Glob or globs over `variable.path` of `model`; None for every kernel and embedding.
        exclude: Glob or globs to leave out. A layer all of whose weights are left out stays float.

    Returns:
        A new model, not compiled.

    Raises:
        ValueError: A scheme is not one of the above, a glob matches nothing, or the model cannot be
            expanded.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> quantized = quantize(model, calibration=np.eye(4))
    >>> [layer.name for layer in quantized.layers]
    ['input_layer...', 'quantize_input_0', 'quantize_head']
    >>> quantized.layers[1].ranges
    {'output': (0.0, 1.0)}

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """
    weights, activations = scheme_pair(weights, activations)
    schemes = {"weights": weights, "activations": activations}
    left_float = _left_float(model, include, exclude)
    flat = expand(model)
    wrapped = replay(_copy(flat), _Wrapping(flat, schemes, left_float))
    if calibration is not None:
        calibrate(wrapped, calibration)
    return wrapped


def calibrate(model: keras.Model, data: Any) -> None:
    """Widen the ranges of a quantized model to what it computes on `data`, in one pass.

    Args:
        model: From `quantize`, or with `layers.Quantize` in it.
        data: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator.

    Raises:
        ValueError: `data` holds no batch.
    """
    step = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)
    num_batches = 0
    with calibrating(_widen):
        for batch in input_batches(data):
            step(keras.tree.map_structure(tf.convert_to_tensor, batch))
            num_batches += 1
    if not num_batches:
        raise ValueError("The calibration data holds no batch; pass some hundred inputs.")
    logger.info("Calibrated %s on %d batches", model.name, num_batches)


def _widen(source, x):
    source.variable.assign(ranges.widened_range(source.bounds(), ranges.extremes(x)))


def _left_float(model, include, exclude) -> set[int]:
    """The ids of the kernels of `model` that the globs leave out."""
    include, exclude = walk.as_globs(include), walk.as_globs(exclude)
    named = walk.named_variables(model)
    walk.check_globs([*(include or ()), *(exclude or ())], named)
    return {
        id(variable)
        for path, variable in named.items()
        if (include is not None and not walk.matches(path, include))
        or (exclude and walk.matches(path, exclude))
    }


def _copy(flat: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(flat)
    copy.set_weights(flat.get_weights())
    return copy


class _Wrapping:
    """Calls the operations of a flat graph, with wrappers around what its plan names."""

    def __init__(self, flat, schemes, left_float):
        plan = place(flat)
        self.schemes = schemes
        self.outputs = {p.layer.name: p.output for p in plan.placements}
        self.inputs = dict(zip((x.name for x in flat.inputs), plan.inputs, strict=True))
        self.left_float = {
            layer.name
            for layer in flat.layers
            if (found := weight_axes(layer)) and all(id(v) in left_float for v, _ in found)
        }
        self.wrappers: dict[str, Quantize] = {}
        self.num_inputs = 0

    def __call__(self, call: nodes.Call, args, kwargs):
        args, kwargs = keras.tree.map_structure(self._input, (args, kwargs))
        operation = call.operation
        if isinstance(operation, keras.layers.Layer):
            return self._layer(operation)(*args, **kwargs)
        outputs = operation(*args, **kwargs)
        if type(operation).__name__ in _MOVING_OPS or self.schemes["activations"] is None:
            return outputs
        return keras.tree.map_structure(lambda x: self._rounded(x, operation.name), outputs)

    def _layer(self, layer):
        output = self.outputs.get(layer.name, False) and self.schemes["activations"] is not None
        weights = weight_axes(layer) if self.schemes["weights"] is not None else []
        if layer.name in self.left_float or not (output or weights):
            return layer
        if layer.name not in self.wrappers:
            activations = self.schemes["activations"] if output else None
            self.wrappers[layer.name] = Quantize(layer, self.schemes["weights"], activations)
        return self.wrappers[layer.name]

    def _input(self, x):
        if not isinstance(x, keras.KerasTensor) or self.schemes["activations"] is None:
            return x
        if not isinstance(nodes.producer(x).operation, keras.layers.InputLayer):
            return x
        if not self.inputs.get(x.name, False):
            return x
        return self._rounded(x, f"input_{list(self.inputs).index(x.name)}")

    def _rounded(self, x, name):
        if not keras.backend.is_float_dtype(x.dtype):
            return x
        if name not in self.wrappers:
            identity = keras.layers.Identity(name=name, dtype=x.dtype)
            self.wrappers[name] = Quantize(identity, None, self.schemes["activations"])
        return self.wrappers[name](x)
