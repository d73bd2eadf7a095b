"""Sizes that are not known before a batch comes, as tensors of a traced graph.

`keras.ops.shape` of a symbolic tensor has None for such a size, and no op takes a None. While a
model is traced, the ops here stand in for those of `keras.ops`: `shape` gives an integer scalar
that the graph computes, and ops that take sizes express what they do with it by plain operations.

Private Keras API used here, with a test in `tests/keras_hooks/test_sizes.py`: `keras.src.ops`, the
module through which the layers of Keras call ops.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src import ops as keras_ops

from tfcompress.keras_hooks.nodes import parameters, producer, symbolic_tensors
from tfcompress.keras_hooks.origins import Origins

NAMESPACES = (vars(keras.ops), vars(keras_ops))


class Sizes:
    """The unknown sizes that one trace asked for.

    Args:
        is_active: `() -> bool`, whether the ops stand in now.
    """

    def __init__(self, is_active: Callable[[], bool]):
        self._is_active = is_active
        # id(scalar) -> (scalar, ones of that length, axis it is the size of)
        self._known: dict[int, tuple[keras.KerasTensor, keras.KerasTensor, int]] = {}
        self._of: dict[tuple[int, int], tuple[keras.KerasTensor, keras.KerasTensor]] = {}
        self._origins = Origins()

    def stand_ins(self) -> dict[str, Callable]:
        """By name, what takes the place of ops of `keras.ops`."""
        own = {
            "shape": self.shape,
            "arange": self.arange,
            "reshape": self.reshape,
            "broadcast_to": self.broadcast_to,
            "tile": self.tile,
            "repeat": self.repeat,
            "zeros": functools.partial(self._filled, 0),
            "ones": functools.partial(self._filled, 1),
            "full": lambda shape, fill_value, dtype=None: self._filled(fill_value, shape, dtype),
        }
        return {name: self._or_plain(name, function) for name, function in own.items()}

    def _or_plain(self, name: str, function: Callable) -> Callable:
        plain = getattr(keras.ops, name)

        @functools.wraps(plain)
        def op(*args, **kwargs):
            if name == "shape":
                replaced = symbolic_tensors((args, kwargs))
            else:
                bound = inspect.signature(plain).bind(*args, **kwargs).arguments
                settings = [x for key, x in bound.items() if key not in ("x", "fill_value")]
                replaced = symbolic_tensors(settings)
            return (function if replaced and self._is_active() else plain)(*args, **kwargs)

        return op

    def shape(self, x: keras.KerasTensor) -> tuple:
        """As `keras.ops.shape`, with an integer scalar for each size that is not known."""
        sizes = enumerate(x.shape)
        return tuple(self._size(x, axis) if size is None else size for axis, size in sizes)

    def _size(self, x: keras.KerasTensor, axis: int) -> keras.KerasTensor:
        # What depends on an early tensor alone is the same for all blocks, and in none of them.
        x, axis = self._origins.of(x, axis)
        if (id(x), axis) not in self._of:
            key = tuple(slice(None) if i == axis else 0 for i in range(len(x.shape)))
            ones = keras.ops.ones_like(x, dtype="int32")
            ones = ones[key] if len(key) > 1 else ones
            self._origins.add(ones, 0, (x, axis))
            size = keras.ops.sum(ones)
            self._known[id(size)] = size, ones, axis
            self._of[id(x), axis] = size, x
        return self._of[id(x), axis][0]

    def _ones(self, size: keras.KerasTensor, name: str) -> keras.KerasTensor:
        if id(size) not in self._known:
            raise ValueError(
                f"{name} needs a size that is computed from the sizes of tensors; a graph has only "
                "those that ops.shape(x)[axis] gives"
            )
        return self._known[id(size)][1]

    def arange(self, start, stop=None, step=None, dtype=None) -> keras.KerasTensor:
        """As `keras.ops.arange`, from a number, by a number."""
        start, stop = (0, start) if stop is None else (start, stop)
        step = 1 if step is None else step
        plain = isinstance(start, int) and isinstance(step, int) and start >= 0 and step > 0
        if not plain:
            raise ValueError(f"arange({start}, {stop}, {step}) has no symbolic form")
        numbers = keras.ops.subtract(keras.ops.cumsum(self._ones(stop, "arange")), 1)
        if (start, step) != (0, 1):
            numbers = numbers[(slice(start, None, step),)]
        return keras.ops.cast(numbers, dtype or "int32")

    def reshape(self, x, newshape) -> keras.KerasTensor:
        """As `keras.ops.reshape`; besides the batch, one axis may be of unknown size."""
        shape = [-1 if _is_unknown(size) else int(size) for size in newshape]
        if shape.count(-1) < 2:
            return keras.ops.reshape(x, shape)
        batch, rest = newshape[0], shape[1:]
        is_batch = self._known.get(id(batch), (None, None, None))[2] == 0
        if not is_batch or rest.count(-1) > 1 or not _is_batched(x):
            raise ValueError(
                f"a tensor of shape {x.shape} cannot be reshaped to {tuple(shape)}: more than the "
                "batch and one other axis is of unknown size"
            )
        return keras.layers.Reshape(rest)(x)

    def broadcast_to(self, x, shape) -> keras.KerasTensor:
        """As `keras.ops.broadcast_to`."""
        x, rank = keras.ops.convert_to_tensor(x), len(shape)
        if rank > len(x.shape):
            x = keras.ops.expand_dims(x, list(range(rank - len(x.shape))))
        return self._broadcast(x, shape)

    def _broadcast(self, x, shape) -> keras.KerasTensor:
        for axis, size in enumerate(shape):
            if isinstance(size, keras.KerasTensor):
                x = _stretch(x, _along(self._ones(size, "broadcast_to"), axis, len(shape)))
            elif x.shape[axis] == 1 and not _is_unknown(size) and size > 1:
                x = keras.ops.repeat(x, int(size), axis)
            elif x.shape[axis] is None and not _is_unknown(size):
                known = (int(size), *(1 for _ in shape[axis + 1 :]))
                x = _stretch(x, keras.ops.ones(known, "int32"))
        return x

    def tile(self, x, repeats) -> keras.KerasTensor:
        """As `keras.ops.tile`, an unknown number of times along axes of size 1."""
        repeats = list(repeats) if isinstance(repeats, (tuple, list)) else [repeats]
        x = keras.ops.convert_to_tensor(x)
        rank = max(len(x.shape), len(repeats))
        repeats = [1] * (rank - len(repeats)) + repeats
        sizes = (1,) * (rank - len(x.shape)) + tuple(x.shape)
        wide = [
            self._once(each, size, "tile") if isinstance(each, keras.KerasTensor) else size
            for each, size in zip(repeats, sizes, strict=True)
        ]
        known = [1 if isinstance(each, keras.KerasTensor) else each for each in repeats]
        for axis, size in enumerate(wide):
            if isinstance(size, keras.KerasTensor):
                x = _stretch(x, _along(self._ones(size, "tile"), axis, rank))
        return keras.ops.tile(x, known) if any(each != 1 for each in known) else x

    def repeat(self, x, repeats, axis=None) -> keras.KerasTensor:
        """As `keras.ops.repeat`, an unknown number of times along an axis of size 1."""
        x = keras.ops.convert_to_tensor(x)
        if axis is None:
            x, axis = keras.ops.reshape(x, (-1,)), 0
        rank = len(x.shape)
        size = self._once(repeats, x.shape[axis], "repeat")
        return _stretch(x, _along(self._ones(size, "repeat"), axis % rank, rank))

    def _once(self, repeats, size: int | None, name: str) -> keras.KerasTensor:
        if size != 1:
            raise ValueError(
                f"{name} of an axis of size {size} by an unknown number has no symbolic form"
            )
        return repeats

    def _filled(self, value, shape, dtype=None) -> keras.KerasTensor:
        shape = [shape] if isinstance(shape, keras.KerasTensor) else list(shape)
        dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
        axis = next((i for i, x in enumerate(shape) if isinstance(x, keras.KerasTensor)), None)
        if axis is None:
            return keras.ops.broadcast_to(keras.ops.cast(value, dtype), shape)
        ones = _along(self._ones(shape[axis], "a tensor"), axis, len(shape))
        others = [1 if i == axis else size for i, size in enumerate(shape)]
        return self._broadcast(keras.ops.full_like(ones, value, dtype=dtype), others)


def _is_unknown(size: Any) -> bool:
    return isinstance(size, keras.KerasTensor) or size in (None, -1)


def _along(ones: keras.KerasTensor, axis: int, rank: int) -> keras.KerasTensor:
    """A vector as a tensor of this rank."""
    others = [i for i in range(rank) if i != axis]
    return keras.ops.expand_dims(ones, others) if others else ones


def _stretch(x, ones) -> keras.KerasTensor:
    """`x` as often as there are ones; -0.0, infinity and NaN stay what they are."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    ones = keras.ops.cast(ones, dtype)
    return keras.ops.logical_and(x, ones) if dtype == "bool" else keras.ops.multiply(x, ones)


def _is_batched(x: keras.KerasTensor) -> bool:
    """Whether the first axis of a tensor is, as far as can be seen, that of the batch.

    Nothing on the way from the inputs, or from the last op that says so, moved another axis there.
    """
    seen: set[int] = set()
    pending = [x]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or not tensor.shape or tensor.shape[0] is not None:
            continue
        seen.add(id(tensor))
        if getattr(tensor, "_keras_history", None) is None:
            continue
        node = producer(tensor)
        if isinstance(node.operation, keras.layers.Reshape):
            continue
        if _moves_batch(node):
            return False
        pending.extend(node.arguments.keras_tensors)
    return True


def _moves_batch(node) -> bool:
    """Whether an op may put another axis than the first one of its input in the first place."""
    kind, settings = type(node.operation).__name__, parameters(node.operation)
    if kind == "Transpose":
        return not settings["axes"] or settings["axes"][0] != 0
    if kind == "Einsum":
        inputs, output = settings["subscripts"].replace(" ", "").split("->")
        return output[:1] not in {term[:1] for term in inputs.split(",")}
    if kind in ("Swapaxes", "Moveaxis"):
        return 0 in np.concatenate([np.atleast_1d(axes) for axes in settings.values()])
    if kind == "Reshape":
        before, after = (x.shape[1:] for x in (*node.arguments.keras_tensors, *node.outputs))
        known = None not in before and None not in after
        return np.prod(before) != np.prod(after) if known else tuple(before) != tuple(after)
    return False
