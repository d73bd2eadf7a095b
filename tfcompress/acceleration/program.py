"""A model's inference pass as TensorFlow functions: with variables, and with constants."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants

from tfcompress.graph import expand, fold_batch_norm

_log = logging.getLogger("tfcompress")
# A serialized graph ends at 2 GiB; larger models keep their variables.
_MAX_CONSTANT_BYTES = 3 * 2**29
_ASSIGNS = ("Assign", "ResourceApply", "ResourceScatter")


def flattened(model: keras.Model, inputs: Any = None) -> keras.Model:
    """The flat graph of a model, or the model where it has none, which the log then says."""
    _require_model(model)
    try:
        return expand(model, inputs)
    except ValueError as error:
        if not model.built or not hasattr(model, "inputs") or inputs is None:
            raise
        _log.info("%s is compiled as it is: %s", model.name, str(error).splitlines()[0])
        return model


def folded(flat: keras.Model) -> keras.Model:
    """`fold_batch_norm` of a flat graph; the same model where there is nothing to fold."""
    norms = (keras.layers.BatchNormalization,)
    has_norms = hasattr(flat, "operations") and any(isinstance(x, norms) for x in flat.layers)
    return fold_batch_norm(flat) if has_norms else flat


def _require_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a built keras.Model, got {model!r} of type {type(model).__name__}. Put a "
            "layer into keras.Sequential([keras.Input(shape), layer]) first."
        )


def input_specs(flat: keras.Model, inputs: Any = None) -> Any:
    """What a model takes: nested `tf.TensorSpec`s, of any batch size and fixed in other axes.

    Args:
        flat: From `flattened`.
        inputs: An example batch, which fixes the axes that the model leaves open.

    Raises:
        ValueError: An axis is open and there is no example.
    """
    # A Sequential calls its layers on a tensor, and says that it has a list.
    symbolic = flat.inputs[0] if isinstance(flat, keras.Sequential) else flat.input
    if inputs is not None:
        return keras.tree.map_structure(
            lambda x, own: tf.TensorSpec((None, *x.shape[1:]), own.dtype),
            inputs,
            symbolic,
        )
    for x in keras.tree.flatten(symbolic):
        if None in x.shape[1:]:
            raise ValueError(
                f"The input {x.name!r} of {flat.name!r} has the shape {x.shape}, and all axes but "
                "the first must be known. Pass inputs= an example batch that fixes them."
            )
    return keras.tree.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), symbolic
    )


def example_batch(specs: Any, inputs: Any = None) -> Any:
    """The inputs, or one example: normal floats, zeros for indices, of seed 0.

    >>> example_batch(tf.TensorSpec((None, 3), "int32")).shape
    (1, 3)
    """
    if inputs is not None:
        return inputs
    rng = np.random.default_rng(0)

    def made(spec):
        shape = (1, *spec.shape[1:])
        if spec.dtype.is_floating:
            return rng.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
        return np.zeros(shape, spec.dtype.as_numpy_dtype)

    return keras.tree.map_structure(made, specs)


def with_batch_size(batch: Any, size: int) -> Any:
    """A batch of arrays, repeated or cut to `size` examples.

    >>> with_batch_size(np.array([[1], [2]]), 3).tolist()
    [[1], [2], [1]]
    """
    return keras.tree.map_structure(lambda a: np.resize(a, (size, *np.shape(a)[1:])), batch)


class Program(tf.Module):
    """An inference pass that can be saved: `serve(inputs)`, with variables, of any batch size.

    `named` is the same with its outputs as `output_0`, `output_1`, ..., for a signature.

    Args:
        model: A Keras model.
        specs: From `input_specs`.
    """

    def __init__(self, model: keras.Model, specs: Any):
        super().__init__(name="program")
        self.serve = tf.function(
            lambda inputs: model(inputs, training=False), input_signature=[specs], autograph=False
        )
        # A signature returns no nested structure.
        self.named = tf.function(
            lambda inputs: _by_name(self.serve(inputs)), input_signature=[specs], autograph=False
        )
        self.kept = [variable.value for variable in model.variables]
        self.function = self.serve.get_concrete_function()
        _refuse_state(self.function, model.name)


def _by_name(outputs) -> dict[str, tf.Tensor]:
    return {f"output_{i}": tensor for i, tensor in enumerate(tf.nest.flatten(outputs))}


def _refuse_state(function, name):
    operations = [x.type for x in function.graph.get_operations()]
    found = sorted({x for x in operations if x.startswith(_ASSIGNS)})
    if found:
        raise ValueError(
            f"{name!r} changes its variables when it is called ({', '.join(found)}), so it cannot "
            "be frozen. Build its recurrent layers with stateful=False and its layers without "
            "random numbers in inference."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """An inference pass with its weights as constants: flat tensors in, flat tensors out.

    Args:
        call: The function.
        specs: The structure of the inputs: nested `tf.TensorSpec`s.
        outputs: The structure of the outputs.
    """

    call: Callable
    specs: Any
    outputs: Any

    @classmethod
    def of(cls, function) -> "Frozen":
        """Freeze a concrete function of one argument."""
        ((specs,), _) = function.structured_input_signature
        structure = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), specs)
        return cls(_frozen(function), structure, function.structured_outputs)

    def compiled(self, batch_size: int | None, jit: bool) -> Callable:
        """A concrete function of flat tensors, at a fixed batch size or (None) any."""
        specs = [
            tf.TensorSpec((batch_size, *spec.shape[1:]), spec.dtype)
            for spec in tf.nest.flatten(self.specs)
        ]
        # A frozen function that is called by itself looks its arguments up by name, which is slow.
        wrapped = tf.function(
            lambda *flat: self.call(*flat), input_signature=specs, jit_compile=jit, autograph=False
        )
        return wrapped.get_concrete_function()


def _frozen(function) -> Callable:
    sizes = (math.prod(v.shape) * v.dtype.size for v in function.variables)
    if sum(sizes) > _MAX_CONSTANT_BYTES:
        _log.info("The weights are too large for constants of a graph, and stay variables.")
        return lambda *flat: tf.nest.flatten(function(*flat))
    frozen = convert_to_constants.convert_variables_to_constants_v2(
        function, lower_control_flow=False
    )
    return lambda *flat: tf.nest.flatten(frozen(*flat))
