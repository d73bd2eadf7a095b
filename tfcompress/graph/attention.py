"""Dot-product attention, which is one operation in Keras, as the operations it consists of."""

from __future__ import annotations

import inspect
import numbers

import keras
import numpy as np

from tfcompress.graph.rebuild import replay, require_functional
from tfcompress.keras_hooks import nodes

# Leaves nothing of the logits it is added to, and no weight; calibrated, -1e38 ends the process in
# LiteRT's runtime. Written over the logits, the converter would round it to their integers.
_MASKED = -1e30


def split_attention(flat: keras.Model) -> keras.Model:
    """Take `keras.ops.dot_product_attention` apart, so that each step can be read and changed.

    `softmax(scale * Q K^T + bias) V` becomes a product with the scale, two products of matrices, a
    `keras.layers.Softmax`, and what adds the bias and masks. An operation stays as it is where it
    is not plain: another dtype than float32, other numbers of heads in keys than in queries, or a
    scale that is computed.

    Args:
        flat: A Functional model, e.g. from `tfcompress.expand`.

    Returns:
        A Functional model of the same layers and weights, with the same outputs to rounding.

    Raises:
        ValueError: `flat` is not Functional.

    Example:

    >>> import keras
    >>> x = keras.Input((5, 2, 4))
    >>> model = keras.Model(x, keras.ops.dot_product_attention(x, x, x))
    >>> [type(operation).__name__ for operation in split_attention(model).operations]
    ['InputLayer', 'Multiply', 'Transpose', 'Transpose', 'Matmul', 'Softmax', 'Transpose', \
'Matmul', 'Transpose']

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """
    require_functional(flat, "split_attention")
    taken = {call.operation.name for call in nodes.calls(flat)}

    def call(node: nodes.Call, args, kwargs):
        if not _is_plain(node):
            return nodes.record_call(node.operation, args, kwargs, node.outputs)
        arguments = _arguments(node.operation, args, kwargs)
        name = _unique(f"{node.operation.name}_softmax", taken)
        outputs = _attention(**arguments, is_causal=node.operation.is_causal, softmax=name)
        for made in nodes.calls_between((args, kwargs), outputs):
            if not isinstance(made.operation, keras.layers.Layer):
                # Keras numbers them in the process, and a name must be unique in the graph.
                kind = type(made.operation).__name__.lower()
                made.operation.name = _unique(f"{node.operation.name}_{kind}", taken)
        return outputs

    return replay(flat, call)


def _arguments(operation, args, kwargs) -> dict:
    bound = inspect.signature(operation.call).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _is_plain(node: nodes.Call) -> bool:
    if type(node.operation).__name__ != "DotProductAttention":
        return False
    arguments = _arguments(node.operation, node.args, node.kwargs)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if any(keras.backend.standardize_dtype(x.dtype) != "float32" for x in (query, key, value)):
        return False
    heads = {x.shape[2] for x in (query, key, value)}
    return (
        len(heads) == 1
        and None not in (*heads, key.shape[3])
        and isinstance(arguments["scale"], numbers.Number | None)
    )


def _attention(query, key, value, bias, mask, scale, is_causal, softmax) -> keras.KerasTensor:
    """Of `(batch, length, heads, size)` each.

    The scale is applied before the product, where it changes no integer: only their scale.
    """
    scale = 1 / np.sqrt(key.shape[3]) if scale is None else scale
    query = keras.ops.transpose(keras.ops.multiply(query, float(scale)), (0, 2, 1, 3))
    logits = keras.ops.matmul(query, keras.ops.transpose(key, (0, 2, 3, 1)))
    if bias is not None:
        logits = keras.ops.add(logits, bias)
    if is_causal:
        past = _past(logits)
        mask = past if mask is None else keras.ops.logical_and(mask, past)
    if mask is not None:
        logits = keras.ops.add(logits, keras.ops.where(mask, np.float32(0), np.float32(_MASKED)))
    weights = keras.layers.Softmax(name=softmax, dtype="float32")(logits)
    outputs = keras.ops.matmul(weights, keras.ops.transpose(value, (0, 2, 1, 3)))
    return keras.ops.transpose(outputs, (0, 2, 1, 3))


def _past(logits) -> keras.KerasTensor:
    """Whether the key is not behind the query, for sequences of any length."""
    ones = keras.ops.ones_like(logits[0, 0], dtype="int32")
    return keras.ops.greater_equal(keras.ops.cumsum(ones, axis=0), keras.ops.cumsum(ones, axis=1))


def _unique(name: str, taken: set[str]) -> str:
    count, candidate = 0, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
