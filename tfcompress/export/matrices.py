"""Dense layers over sequences, traced as one product of matrices."""

import contextlib
import functools
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import all_layers


@contextlib.contextmanager
def as_matrices(model: keras.Model) -> Iterator[None]:
    """Let `Dense` and `EinsumDense` layers flatten what they get, for the length of a `with` block.

    For inputs of more than two axes, TensorFlow adds the bias behind a reshaping, and so the LiteRT
    converter cannot put it into the integer operator: product, bias and reshaping stay in float.
    The results are the same.

    Args:
        model: Any model.
    """
    with contextlib.ExitStack() as stack:
        for layer in all_layers(model):
            if isinstance(layer, keras.layers.Dense):
                stack.callback(add_hook(layer, "call", _dense))
            elif isinstance(layer, keras.layers.EinsumDense):
                stack.callback(add_hook(layer, "call", functools.partial(_einsum, layer)))
        yield


def _dense(proceed, inputs, *args, **kwargs):
    if len(inputs.shape) < 3 or None in inputs.shape[1:]:
        return proceed(inputs, *args, **kwargs)
    outputs = proceed(tf.reshape(inputs, (-1, inputs.shape[-1])), *args, **kwargs)
    return tf.reshape(outputs, (-1, *inputs.shape[1:-1], outputs.shape[-1]))


def _einsum(layer, proceed, inputs, *args, **kwargs):
    count = _contracted(layer.equation)
    units = layer.kernel.shape[count:]
    bias_fits = layer.bias is None or layer.bias.shape == units
    if not count or None in inputs.shape[1:] or not bias_fits or layer.quantization_mode:
        return proceed(inputs, *args, **kwargs)
    size, width = _product(inputs.shape[-count:]), _product(units)
    kernel = tf.reshape(tf.convert_to_tensor(layer.kernel), (size, width))
    outputs = tf.matmul(tf.reshape(inputs, (-1, size)), kernel)
    if layer.bias is not None:
        outputs += tf.reshape(tf.convert_to_tensor(layer.bias), (width,))
    outputs = tf.reshape(outputs, (-1, *inputs.shape[1:-count], *units))
    return outputs if layer.activation is None else layer.activation(outputs)


def _contracted(equation: str) -> int:
    """How many last axes are summed over, where nothing else happens; else 0.

    >>> [_contracted(equation) for equation in ("abc,cde->abde", "abcd,cde->abe", "abc,bc->ab")]
    [1, 2, 0]
    """
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    for count in range(1, len(inputs)):
        if inputs[-count:] == kernel[:count] and output == inputs[:-count] + kernel[count:]:
            return count
    return 0


def _product(shape) -> int:
    return int(tf.TensorShape(shape).num_elements())
