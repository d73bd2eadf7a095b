"""Where the unknown size of an axis in a symbolic graph comes from.

Two tensors of length None may or may not be equally long. What is known of the operations between
them tells; what is not known is never taken for the same.
"""

from __future__ import annotations

import keras
import numpy as np

from tfcompress.keras_hooks.nodes import axis_names, parameters, producer

# What keeps every axis of its first argument, but for the last one of some layers.
_KEEPS = {
    "Abs", "Absolute", "Activation", "BatchNormalization", "Cast", "Ceil", "Clip",
    "ConvertToTensor", "Cumsum", "Dense", "Dropout", "Embedding", "Erf", "Exp", "FullLike", "Gelu",
    "Identity", "LayerNormalization", "Log", "LogicalNot", "Negative", "OnesLike",
    "PositionEmbedding", "RMSNormalization", "ReLU", "Relu", "ReversibleEmbedding", "Rsqrt",
    "Sigmoid", "Sign", "Silu", "Softmax", "Sqrt", "Square", "T5LayerNorm", "Tanh", "ZerosLike",
}  # fmt: skip
_BROADCASTS = {
    "Add", "Divide", "Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd",
    "LogicalOr", "Maximum", "Minimum", "Multiply", "NotEqual", "Subtract", "TrueDivide", "Where",
}  # fmt: skip


class Origins:
    """Finds the earliest tensor that surely has an axis of the same size as another one."""

    def __init__(self):
        self._found: dict[tuple[int, int], tuple[keras.KerasTensor, int]] = {}
        self._alive: list[keras.KerasTensor] = []

    def of(self, x: keras.KerasTensor, axis: int) -> tuple[keras.KerasTensor, int]:
        """`(tensor, axis)`: at the end of the way back from an axis of unknown size."""
        pending = [(x, axis)]
        while pending:
            each = pending[-1]
            if _key(*each) in self._found:
                pending.pop()
                continue
            before = _before(*each)
            missing = [place for place in before if _key(*place) not in self._found]
            if missing:
                pending.extend(missing)
                continue
            # Of two unknown sizes one may be 1, unless they are the same.
            ends = {_key(*end): end for end in (self._found[_key(*place)] for place in before)}
            self.add(*each, next(iter(ends.values())) if len(ends) == 1 else each)
        return self._found[_key(x, axis)]

    def add(self, x: keras.KerasTensor, axis: int, origin: tuple[keras.KerasTensor, int]) -> None:
        """Say where the size of an axis comes from."""
        self._alive.append(x)
        self._found[id(x), axis] = origin


def _key(x, axis: int) -> tuple[int, int]:
    return id(x), axis


def _before(x, axis: int) -> list[tuple[keras.KerasTensor, int]]:
    """The axes of unknown size, of what a tensor is made of, that an axis of it has the size of."""
    if getattr(x, "_keras_history", None) is None:
        return []
    places = [(y, i) for y, i in _places(producer(x), x, axis) if i >= 0]
    return [(y, i) for y, i in places if y.shape[i : i + 1] == (None,)]


def _places(node, x, axis: int) -> list[tuple[keras.KerasTensor, int]]:
    """The axes of the inputs of a node that an axis of its output has the size of."""
    kind, settings = type(node.operation).__name__, parameters(node.operation)
    if type(node.operation).__module__.split(".")[0] not in ("keras", "keras_hub"):
        return []
    inputs = node.arguments.keras_tensors
    first, rank = inputs[0] if inputs else None, len(x.shape)
    if kind in _KEEPS:
        return [(first, axis)]
    if kind in _BROADCASTS:
        return [(y, axis - rank + len(y.shape)) for y in inputs]
    if kind in ("EinsumDense", "Einsum"):
        equation = settings["equation" if kind == "EinsumDense" else "subscripts"].replace(" ", "")
        return _lettered(*equation.partition("->")[::2], inputs, rank, axis)
    if kind == "Transpose":
        return [(first, (settings["axes"] or range(rank)[::-1])[axis])]
    if kind == "ExpandDims":
        added = {each % rank for each in np.atleast_1d(settings["axis"])}
        return [] if axis in added else [(first, axis - sum(each < axis for each in added))]
    if kind == "GetItem":
        return _sliced(first, node.arguments.args[1:], axis)
    if kind == "Repeat" and settings["axis"] is not None:
        return [] if settings["axis"] % rank == axis else [(first, axis)]
    if kind == "Take" and settings["axis"] is not None and len(inputs) == 2:
        looked_up, width = settings["axis"] % len(first.shape), len(inputs[1].shape)
        if looked_up <= axis < looked_up + width:
            return [(inputs[1], axis - looked_up)]
        return [(first, axis if axis < looked_up else axis - width + 1)]
    if kind == "TakeAlongAxis" and settings["axis"] is not None:
        return [(y, axis) for y in (inputs[1:] if settings["axis"] % rank == axis else inputs)]
    if kind == "DotProductAttention":
        return [(first, axis)] if axis < 2 else []
    if isinstance(node.operation, keras.layers.Reshape) and _keeps_axis(first, x, axis):
        return [(first, axis)]
    return []


def _sliced(x, keys, axis: int) -> list[tuple[keras.KerasTensor, int]]:
    """Behind `x[key]`, for keys of new axes and whole ones."""
    key = keys[0] if keys and isinstance(keys[0], tuple) else keys
    if any(each is not None and each != slice(None) for each in key):
        return []
    if axis < len(key) and key[axis] is None:
        return []
    return [(x, axis - sum(each is None for each in key[:axis]))]


def _lettered(left: str, right: str, inputs, rank: int, axis: int) -> list:
    """The axes of the inputs of an einsum that have the letter of an axis of its output."""
    if not right:
        return []
    letter = axis_names(right, rank)[axis]
    pairs = zip(inputs, left.split(","), strict=False)
    named = [(y, axis_names(term, len(y.shape))) for y, term in pairs]
    return [(y, names.index(letter)) for y, names in named if letter in names]


def _keeps_axis(before, after, axis: int) -> bool:
    """Whether a `keras.layers.Reshape`, which keeps the first axis, keeps the second one too."""
    rest = (before.shape[2:], after.shape[2:])
    is_known = not any(None in sizes for sizes in rest)
    return axis == 0 or (axis == 1 and is_known and np.prod(rest[0]) == np.prod(rest[1]))
