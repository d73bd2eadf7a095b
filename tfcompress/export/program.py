"""A model as one function from named tensors to named tensors: what every exporter starts from."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.export.verify import OutputScale, graph_output_scale
from tfcompress.graph.expand import expand
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import all_layers, attached, raw_value
from tfcompress.keras_hooks.quantizer import (
    LayerQuantizer,
    calibrating,
    recall_inputs,
    weight_axes,
)
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops.ranges import extremes, widened_range


class Program:
    """A built model with the quantizers it was trained with.

    Args:
        model: A built model.
        quantizers: Empty to take the model as it is.
        example: A batch, for a subclassed model that does not know what it is called on.
        batch_size: Of every input; None for any.

    Raises:
        ValueError: What the model is called on is not known.
    """

    def __init__(
        self,
        model: keras.Model,
        quantizers: tuple[LayerQuantizer, ...] = (),
        example: Any = None,
        batch_size: int | None = None,
    ):
        self.model = model
        self.quantizers = quantizers
        self._batch_size = batch_size
        self._structure = _symbolic_inputs(model, example)
        self.inputs = [
            tf.TensorSpec(self._shape(tensor), tensor.dtype, name=name)
            for name, tensor in _named(keras.tree.flatten(self._structure)).items()
        ]

    def simulation(self) -> Callable:
        """The model with its quantizers, in Keras's own operations; dict in, dict out."""
        run = self._trace([q.overlay() for q in self.quantizers])
        return lambda batch: {k: v.numpy() for k, v in run(**_tensors(batch)).items()}

    def calibrate(self, batches: Iterable) -> None:
        """Widen the ranges of the quantizers to what the model computes on `batches`."""
        with calibrating(_widen):
            run = self._trace([q.overlay() for q in self.quantizers])
        for batch in batches:
            run(**_tensors(self.named(batch)))

    def output_scales(self) -> dict[str, OutputScale]:
        """How finely each output is rounded, by name."""
        run, _ = self._in_converter_words()
        return {name: graph_output_scale(x) for name, x in run.structured_outputs.items()}

    def _in_converter_words(self) -> tuple[Callable, list[tf.Variable]]:
        baked: list[tf.Variable] = []
        return self._trace([q.converter_overlay(baked.append) for q in self.quantizers]), baked

    def save(self, directory: pathlib.Path) -> None:
        """Write a SavedModel of the model with its quantizers in the converter's words."""
        module = tf.Module()
        run, module.baked = self._in_converter_words()
        # A signature lists its inputs by alphabet.
        module.input_names = tf.Variable([spec.name for spec in self.inputs], trainable=False)
        module.kept = [variable.value for variable in self.model.variables]
        tf.saved_model.save(module, str(directory), signatures={"serving_default": run})

    def weights(self) -> list[tuple[np.ndarray, tuple[int, ...]]]:
        """The weights as the file is to have them, each with the axes that share a scale."""
        quantized = {
            id(weight.variable): (weight.quantize(raw_value(weight.variable)), weight.axes)
            for quantizer in self.quantizers
            for weight in quantizer.weights
        }
        plain = {id(variable): (variable, axes) for variable, axes in weight_axes(self.model)}
        chosen = (plain | quantized).values()
        return [(keras.ops.convert_to_numpy(value), axes) for value, axes in chosen]

    def named(self, batch: Any) -> dict[str, np.ndarray]:
        """A batch in the structure of the model's input, by the names of the inputs."""
        leaves = keras.tree.flatten(self._in_order(batch))
        if len(leaves) != len(self.inputs):
            raise ValueError(
                f"The model {self.model.name!r} has {len(self.inputs)} inputs "
                f"{[spec.name for spec in self.inputs]}, but the batch holds {len(leaves)} arrays. "
                "Pass arrays in the structure that the model is called on."
            )
        return {
            spec.name: self._fitting(spec, leaf)
            for spec, leaf in zip(self.inputs, leaves, strict=True)
        }

    def random_batch(self, size: int = 16) -> dict[str, np.ndarray]:
        """Numbers that the inputs accept: inside the ranges seen in training, where there are."""
        rng = np.random.default_rng(0)
        ranges = {
            k: v for q in self.quantizers if q.layer is self.model for k, v in q.ranges.items()
        }
        batch = {}
        for index, spec in enumerate(self.inputs):
            shape = (size, *(dimension or 16 for dimension in spec.shape[1:]))
            source = ranges.get(f"input_{index}")
            low, high = (0.0, 1.0) if source is None else source.bounds().numpy()
            values = rng.uniform(low, high, shape) if spec.dtype.is_floating else np.zeros(shape)
            batch[spec.name] = values.astype(spec.dtype.as_numpy_dtype)
        return batch

    def _in_order(self, batch):
        """As Keras does: a dict for a model of listed inputs is read by their names."""
        names = [tensor.name for tensor in keras.tree.flatten(self._structure)]
        if isinstance(self._structure, dict) or not isinstance(batch, dict):
            return batch
        return [batch[name] for name in names] if set(names) <= set(batch) else batch

    def _shape(self, tensor):
        # A Sequential without an Input takes its batch size from the first batch it saw.
        stateful = any(getattr(layer, "stateful", False) for layer in all_layers(self.model))
        return tensor.shape if stateful else (self._batch_size, *tensor.shape[1:])

    def _fitting(self, spec, leaf) -> np.ndarray:
        array = np.asarray(leaf, spec.dtype.as_numpy_dtype)
        if not spec.shape.is_compatible_with(array.shape):
            raise ValueError(
                f"The input {spec.name!r} of the model {self.model.name!r} has the shape "
                f"{tuple(spec.shape)}, but the batch has {array.shape}. Pass a batch of examples."
            )
        return array

    def _trace(self, overlays) -> Callable:
        def serve(*args, **kwargs):
            flat = [*args, *(kwargs[spec.name] for spec in self.inputs[len(args) :])]
            inputs = keras.tree.pack_sequence_as(self._structure, flat)
            return _named_outputs(self.model(inputs, training=False))

        layers = [quantizer.layer for quantizer in self.quantizers]
        with bypassed(self.model), attached(zip(layers, overlays, strict=True)):
            return tf.function(serve, autograph=False).get_concrete_function(
                **{spec.name: spec for spec in self.inputs}
            )


@contextlib.contextmanager
def bypassed(model: keras.Model) -> Iterator[None]:
    """Let every wrapper of tfcompress in a model call the layer inside, and do nothing else."""
    with contextlib.ExitStack() as stack:
        for wrapper in wrappers(model):
            stack.callback(add_hook(wrapper, "call", functools.partial(_call_inside, wrapper)))
        yield


def wrappers(model: keras.Model) -> list[CompressionWrapper]:
    """The wrappers of tfcompress in a model, at any depth."""
    return [layer for layer in all_layers(model) if isinstance(layer, CompressionWrapper)]


def _call_inside(wrapper, proceed, *args, **kwargs):
    return wrapper.layer(*args, **kwargs)


def require_built(model: keras.Model) -> None:
    """Raise a ValueError unless `model` is a Keras model that has its weights."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"export needs a keras.Model, got {model!r} of type {type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to export. Call it "
            "on a batch, train it, or start it with keras.Input(shape)."
        )


def _symbolic_inputs(model, example):
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if hasattr(model, "operations"):
        return model.input
    return expand(model, recall_inputs(model) or example).input


def _named(tensors) -> dict[str, keras.KerasTensor]:
    """Tensors by the names of their input layers, made valid and unique."""
    named = {}
    for tensor in tensors:
        name = nodes.producer(tensor).operation.name
        name = "".join(c if c.isalnum() else "_" for c in name)
        while name in named:
            name += "_"
        named[name] = tensor
    return named


def _widen(source, x):
    source.variable.assign(widened_range(source.bounds(), extremes(x)))


def _named_outputs(outputs) -> dict[str, tf.Tensor]:
    if isinstance(outputs, dict) and all(tf.is_tensor(value) for value in outputs.values()):
        return {str(key): tf.identity(value) for key, value in outputs.items()}
    flat = keras.tree.flatten(outputs)
    return {f"output_{index}": tf.identity(value) for index, value in enumerate(flat)}


def _tensors(batch):
    return {name: tf.convert_to_tensor(value) for name, value in batch.items()}
