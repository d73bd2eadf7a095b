"""Structures: what is pruned as a unit. They turn scores into masks; 1 keeps, 0 prunes.

A structure divides a weight into units: it reduces the scores of a unit to one, and spreads the
mask of the units over the weights. `NofM` is the exception: what it keeps is decided within groups
of consecutive weights, so that it chooses its masks itself.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from tfcompress.ops.allocation import num_kept
from tfcompress.ops.selection import order_keys
from tfcompress.shorthands import resolve
from tfcompress.values import Value

__all__ = ["Block", "Channel", "Head", "NofM", "Structure", "Unstructured", "get"]

_REDUCTIONS = ("sum", "mean", "max")


class Structure(Value):
    """What every structure offers. Subclass it as a frozen dataclass.

    `choose` is None, or a function (scores, sparsity) -> mask of the weights, for a structure that
    decides within each weight and takes no allocation. `sparsity` is None, or the one that the
    structure itself means.
    """

    choose = None
    sparsity = None

    def num_units(self, shape) -> int:
        """How many units a weight of `shape` has."""
        raise NotImplementedError(self._missing("num_units(shape)"))

    def reduce(self, values: tf.Tensor, how: str) -> tf.Tensor:
        """One value for each unit: the "sum", "mean" or "max" of what its weights have.

        Args:
            values: Floating tensor of the weight's shape.
            how: One of the three. Units cut off at the edges reduce over what they hold.

        Returns:
            Tensor of the units, in the dtype of `values`, but float32 at least.

        Raises:
            ValueError: An unknown `how`, or a structure without groups.
        """
        raise NotImplementedError(self._missing("reduce(values, how)"))

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Give every weight of a weight of `shape` the value of its unit, boolean or floating."""
        raise NotImplementedError(self._missing("spread(units, shape)"))

    def sizes(self, shape) -> tf.Tensor:
        """How many weights each unit holds, in float32."""
        raise NotImplementedError(self._missing("sizes(shape)"))

    def pool(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores of weights to scores of units: their mean."""
        # Summed in float64: equal units tie whatever the order in which a compiler sums.
        return tf.cast(self.reduce(tf.cast(scores, tf.float64), "mean"), tf.float32)

    def bind(self, path: str, shape) -> "tuple[Structure, str] | str":
        """The structure for one weight of a model, and which weights share its mask.

        Args:
            path: The weight's path in its model.
            shape: Its shape.

        Returns:
            The structure and the key of the weights that share one mask with this one; or the
            reason why the weight is left alone.

        Example:

        >>> Channel().bind("dense/kernel", (4, 3))
        (Channel(axis=-1), 'dense/kernel')
        """
        return self, path

    def parts(self, path: str, shape) -> "list[tuple[Structure, str]] | str":
        """`bind`, for each division of the weight into units: most structures have one.

        A weight is kept where all of its parts keep it.
        """
        bound = self.bind(path, shape)
        return bound if isinstance(bound, str) else [bound]

    def num_weights(self, shape) -> int:
        """How many weights of a weight of `shape` are in units: most structures take all."""
        return math.prod(_dims(shape))

    def _missing(self, what):
        return f"{type(self).__name__} must define {what}."


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
    """Every weight is a unit of its own.

    Example:

    >>> Unstructured().num_units((3, 4))
    12
    """

    def num_units(self, shape) -> int:
        """How many units a weight of `shape` has."""
        return math.prod(_dims(shape))

    def reduce(self, values: tf.Tensor, how: str) -> tf.Tensor:
        """The values: every unit holds one."""
        _check_how(how)
        return values

    def pool(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores of weights to scores of units: the same."""
        return scores

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Mask of units to mask of weights: the same."""
        return units

    def sizes(self, shape) -> tf.Tensor:
        """Ones."""
        return tf.ones(_dims(shape))


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class NofM(Structure):
    """At most n of m consecutive weights along the reduction axis are not zero.

    2:4 is what the sparse tensor cores of GPUs multiply
    ([Mishra et al. 2021](https://arxiv.org/abs/2104.08378)). Where m does not divide the axis, the
    last group is shorter, and keeps its own share.

    Args:
        n: How many of each group are kept, 1 to m - 1.
        m: Weights in a group.
        axis: The axis that the groups lie along; None for the reduction axis: -2 in Dense kernels
            and convolutions (input channels), -3 in the query, key and value kernels of attention
            (dim, heads, head_dim).

    Raises:
        ValueError: n or m out of range.

    Example:

    >>> scores = tf.constant([[4.0], [1.0], [3.0], [2.0], [1.0], [2.0], [3.0], [4.0]])
    >>> NofM(2, 4).choose(scores, 0.5).numpy().astype(int).ravel().tolist()
    [1, 0, 1, 0, 0, 0, 1, 1]
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"n of m must have 1 <= n < m, got n={self.n} and m={self.m}. "
                'NofM(2, 4), or "2:4", keeps 2 of every 4 weights.'
            )

    @property
    def sparsity(self) -> float:
        """`1 - n / m`."""
        return 1 - self.n / self.m

    def choose(self, scores: tf.Tensor, sparsity) -> tf.Tensor:
        """The mask that keeps the largest `num_kept(m, sparsity)` of each group of m.

        Args:
            scores: Floating tensor of 2 axes or more.
            sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor; on the way to its own
                sparsity a schedule may ask for less.

        Returns:
            Boolean tensor of the same shape. A last group of r < m keeps `num_kept(r, sparsity)`.
            Of equal scores in a group the first are kept.
        """
        before, length, after = _around(scores.shape, -2 if self.axis is None else self.axis, self)
        keys = order_keys(tf.reshape(scores, (before, length, after)))
        groups, rest = divmod(length, self.m)
        whole = tf.reshape(keys[:, : groups * self.m], (before, groups, self.m, after))
        parts = [tf.reshape(_first_in_group(whole, sparsity), (before, groups * self.m, after))]
        if rest:
            parts.append(_first_in_group(keys[:, tf.newaxis, groups * self.m :], sparsity)[:, 0])
        return tf.reshape(tf.concat(parts, 1), scores.shape)

    def bind(self, path, shape):
        """With the reduction axis of this very weight, which has 2 axes or more."""
        bound = _refuse_vectors(shape) or (self, path)
        projects = re.search(r"(query|key|value)/kernel(#\d+)?$", path)
        if self.axis is not None or isinstance(bound, str) or not (projects and len(shape) == 3):
            return bound
        return dataclasses.replace(self, axis=-3), path

    def num_units(self, shape) -> int:
        """How many units a weight of `shape` has: its weights."""
        return math.prod(_dims(shape))

    def reduce(self, values: tf.Tensor, how: str) -> tf.Tensor:
        """Refused: what is kept together is no group that could shrink together."""
        raise ValueError(self._no_groups())

    def pool(self, scores: tf.Tensor) -> tf.Tensor:
        """Refused: `choose` takes the scores of the weights."""
        raise ValueError(self._no_groups())

    def sizes(self, shape) -> tf.Tensor:
        """Refused, as `reduce` is."""
        raise ValueError(self._no_groups())

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Mask of units to mask of weights: the same."""
        return units

    def _no_groups(self):
        return (
            f"{self} has no groups of weights that are kept or shrink together: it keeps "
            f"{self.n} of every {self.m}. Call choose(scores, sparsity) for its mask; for a group "
            "penalty use Channel() or Block(height, width)."
        )


class _Grouped(Structure):
    """Units of several weights: `_split` shows which axes to reduce."""

    def num_units(self, shape) -> int:
        """How many units a weight of `shape` has."""
        return math.prod(self._units(shape))

    def reduce(self, values: tf.Tensor, how: str) -> tf.Tensor:
        """One value for each unit: the "sum", "mean" or "max" of what its weights have."""
        _check_how(how)
        if values.dtype in (tf.float16, tf.bfloat16):
            values = tf.cast(values, tf.float32)
        if how == "max":
            return tf.reduce_max(*self._split(values, -math.inf))
        total = tf.reduce_sum(*self._split(values, 0.0))
        return total if how == "sum" else total / tf.cast(self.sizes(values.shape), total.dtype)

    def bind(self, path, shape):
        """Itself, for 2 axes or more."""
        return _refuse_vectors(shape) or (self, path)

    def _units(self, shape):
        """The shape of the units of a weight of `shape`."""
        raise NotImplementedError(self._missing("_units(shape)"))

    def _split(self, values, fill):
        """The values, reshaped and filled up, and the axes that lie within a unit."""
        raise NotImplementedError(self._missing("_split(values, fill)"))


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Block(_Grouped):
    """Blocks of height x width over the last two axes ([Gray et al. 2017][1]).

    Leading axes are independent. Blocks cut off at the edges are units of their own, and a weight
    smaller than a block is one.

    [1]: https://cdn.openai.com/blocksparse/blocksparsepaper.pdf

    Args:
        height: Weights along the next to last axis (inputs), 1 or more.
        width: Weights along the last axis (outputs), 1 or more.
        pooling: "mean" or "max": the score of a block from those of its weights.

    Raises:
        ValueError: A size below 1, or an unknown pooling.

    Example:

    >>> Block(2, 2, "max").pool(tf.constant([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])).numpy().tolist()
    [[4.0, 5.0]]
    """

    height: int
    width: int
    pooling: str = "mean"

    def __post_init__(self):
        if min(self.height, self.width) < 1:
            raise ValueError(
                f"A block needs a height and a width of 1 or more, got {self.height} and "
                f"{self.width}, e.g. Block(4, 4)."
            )
        if self.pooling not in ("mean", "max"):
            raise ValueError(f'Block has pooling={self.pooling!r}; pass "mean" or "max".')

    def pool(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores of weights to scores of blocks, by `pooling`."""
        return self.reduce(scores, "max") if self.pooling == "max" else super().pool(scores)

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Give every weight the value of its block."""
        leading, (rows, height), (columns, width) = self._tiles(shape)
        tiled = tf.broadcast_to(
            tf.reshape(units, (*leading, rows, 1, columns, 1)),
            (*leading, rows, height, columns, width),
        )
        whole = tf.reshape(tiled, (*leading, rows * height, columns * width))
        *_, inputs, outputs = _dims(shape)
        return whole[..., :inputs, :outputs]

    def sizes(self, shape) -> tf.Tensor:
        """How many weights each block holds."""
        return tf.reduce_sum(*self._split(tf.ones(_dims(shape)), 0.0))

    def _units(self, shape):
        leading, (rows, _), (columns, _) = self._tiles(shape)
        return (*leading, rows, columns)

    def _split(self, values, fill):
        leading, (rows, height), (columns, width) = self._tiles(values.shape)
        *_, inputs, outputs = _dims(values.shape)
        missing = ((0, rows * height - inputs), (0, columns * width - outputs))
        filled = tf.pad(
            values,
            (*((0, 0) for _ in leading), *missing),
            constant_values=tf.constant(fill, values.dtype),
        )
        return tf.reshape(filled, (*leading, rows, height, columns, width)), (-3, -1)

    def _tiles(self, shape):
        """Leading axes, and for each of the last two: how many blocks, and how long they are."""
        dims = _dims(shape)
        if len(dims) < 2:
            raise ValueError(
                f"{self} needs a weight of 2 axes or more, got shape {dims}. Exclude this weight."
            )
        *leading, inputs, outputs = dims
        height, width = min(self.height, inputs), min(self.width, outputs)
        return leading, (-(-inputs // height), height), (-(-outputs // width), width)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Channel(_Grouped):
    """One output channel, filter or neuron is a unit: a whole slice ([Li et al. 2017][1]).

    With `groups` the units are what `tfcompress.shrink` can remove, each with all that belongs to
    it in any weight: the columns that make a channel, its bias, gamma and beta, the rows that read
    it, in every layer that is coupled by a residual connection ([Fang et al. 2023][2]).

    [1]: https://arxiv.org/abs/1608.08710
    [2]: https://arxiv.org/abs/2301.12900

    Args:
        axis: The axis that counts the units; the last holds the outputs of Dense and convolutions.
        groups: None, or the groups of one model, from `tfcompress.channel_groups(model)`: path of a
            weight -> `{"axis": ..., "group": ..., "places": [...]}` for each of its axes.

    Raises:
        ValueError: `axis` with `groups`, which say it, or groups of another form.

    Example:

    >>> Channel().pool(tf.constant([[1.0, 2.0], [3.0, 6.0]])).numpy().tolist()
    [2.0, 4.0]
    """

    axis: int = -1
    groups: Mapping[str, Sequence[Mapping]] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if self.groups is None:
            return
        if self.axis != -1 or not _are_groups(self.groups):
            raise ValueError(
                f"Channel takes axis, or groups as tfcompress.channel_groups(model) returns them; "
                f"got axis={self.axis}, groups={str(self.groups)[:200]}."
            )

    def __repr__(self):
        if self.groups is None:
            return f"Channel(axis={self.axis})"
        return f"Channel(groups=<of {len(self.groups)} weights>)"

    def bind(self, path, shape):
        """Itself; refused with `groups`, where a weight alone has no units."""
        if self.groups is not None:
            raise ValueError(
                f"{self} makes units of several weights, which only callbacks.Pruning and "
                "tfcompress.prune can keep together. Use them, or Channel() without groups."
            )
        return super().bind(path, shape)

    def parts(self, path, shape):
        """With `groups`: each axis of the weight that has units, and the name of its group."""
        if self.groups is None:
            return super().parts(path, shape)
        dims = _dims(shape)
        parts = []
        for each in self.groups.get(path, ()):
            part = _Part(each["axis"], tuple(each["places"]), self._sizes[each["group"]])
            if not each["axis"] < len(dims) or dims[each["axis"]] != len(part.places):
                raise ValueError(
                    f"The groups have {len(part.places)} elements along axis {each['axis']} of "
                    f"{path!r}, whose shape is {tuple(dims)}. Make them of this model, by "
                    "tfcompress.channel_groups(model)."
                )
            parts.append((part, each["group"]))
        return parts or "in none of the groups"

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Name of a group -> how many units it has."""
        sizes: dict[str, int] = {}
        for axes in self.groups.values():
            for each in axes:
                last = max(each["places"], default=-1)
                sizes[each["group"]] = max(sizes.get(each["group"], 1), last + 1)
        return sizes

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Give every weight the value of its channel."""
        dims = _dims(shape)
        ones = [1] * len(dims)
        ones[self.axis] = self._units(shape)[0]
        return tf.broadcast_to(tf.reshape(units, ones), dims)

    def sizes(self, shape) -> tf.Tensor:
        """How many weights each channel holds: the same for all."""
        (channels,) = self._units(shape)
        return tf.fill([channels], float(math.prod(_dims(shape)) // channels))

    def _units(self, shape):
        return (_around(shape, self.axis, self)[1],)

    def _split(self, values, fill):
        return tf.reshape(values, _around(values.shape, self.axis, self)), (0, 2)


@dataclasses.dataclass(frozen=True)
class _Part(Structure):
    """The units of a group along one axis of one weight.

    Args:
        axis: The axis.
        places: For each element along it the unit it belongs to; -1 for none, which is kept.
        size: How many units the group has.
    """

    axis: int
    places: tuple[int, ...]
    size: int

    def num_units(self, shape) -> int:
        """How many units the group has."""
        return self.size

    def reduce(self, values: tf.Tensor, how: str) -> tf.Tensor:
        """One value for each unit: the "sum", "mean" or "max" of what its weights have."""
        _check_how(how)
        if values.dtype in (tf.float16, tf.bfloat16):
            values = tf.cast(values, tf.float32)
        along = {"sum": tf.reduce_sum, "mean": tf.reduce_sum, "max": tf.reduce_max}[how](
            tf.reshape(values, _around(values.shape, self.axis, self)), (0, 2)
        )
        segment = tf.math.unsorted_segment_max if how == "max" else tf.math.unsorted_segment_sum
        found = segment(along, tf.constant(self.places), self.size)
        if how == "mean":
            found /= tf.maximum(tf.cast(self.sizes(values.shape), found.dtype), 1)
        return found

    def spread(self, units: tf.Tensor, shape) -> tf.Tensor:
        """Give every weight the value of its unit, True or 1 where it has none."""
        dims = _dims(shape)
        # One more unit, which those of no unit are in.
        every = tf.concat([units, tf.ones([1], units.dtype)], 0)
        places = [self.size if place < 0 else place for place in self.places]
        ones = [1] * len(dims)
        ones[self.axis] = dims[self.axis]
        return tf.broadcast_to(tf.reshape(tf.gather(every, places), ones), dims)

    def sizes(self, shape) -> tf.Tensor:
        """How many weights each unit holds here."""
        each = math.prod(_dims(shape)) // len(self.places)
        has = [place for place in self.places if place >= 0]
        return tf.math.unsorted_segment_sum(tf.fill([len(has)], float(each)), has, self.size)

    def num_weights(self, shape) -> int:
        """How many weights are in units."""
        has = sum(place >= 0 for place in self.places)
        return math.prod(_dims(shape)) // len(self.places) * has


def _are_groups(groups) -> bool:
    keys = {"axis", "group", "places"}
    return isinstance(groups, Mapping) and all(
        isinstance(axes, (list, tuple)) and all(keys <= set(each) for each in axes)
        for axes in groups.values()
    )


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Head(Structure):
    """One attention head is a unit, in all four kernels of its layer ([Michel et al. 2019][1]).

    The kernels are known by their paths: those of `keras.layers.MultiHeadAttention` and of
    KerasHub's attention layers end in "query/kernel", "key/kernel", "value/kernel" (dim, heads,
    head_dim) and "attention_output/kernel" (heads, head_dim, dim). `bind` gives each its axis and
    one key for all, so that the same heads go everywhere. In grouped-query attention key and value
    have fewer heads than query and output: such weights cannot share a mask, so that what is bound
    to one key has to be divided by the number of units: the query heads are pruned in query and
    output, the key-value heads in key and value.

    [1]: https://arxiv.org/abs/1905.10650

    Example:

    >>> Head().bind("encoder/attention/query/kernel", (32, 4, 8))
    (Channel(axis=1), 'encoder/attention')
    >>> Head().bind("encoder/attention/attention_output/kernel", (4, 8, 32))
    (Channel(axis=0), 'encoder/attention')
    """

    def bind(self, path, shape):
        """The channels that are heads, and the attention layer as the key."""
        match = re.fullmatch(
            r"(.+)/(query|key|value|attention_output)/kernel(#\d+)?", path, flags=re.DOTALL
        )
        if match is None:
            return "not an attention kernel: query, key, value or attention_output"
        if len(_dims(shape)) != 3:
            return f"no axis of heads: shape {tuple(_dims(shape))}, not 3 axes"
        layer, kernel, number = match.groups()
        return Channel(0 if kernel == "attention_output" else 1), layer + (number or "")

    def _missing(self, what):
        return (
            f"Head() knows the axis of the heads from a weight's path: call bind(path, shape) and "
            f"use {what} of the structure that it returns."
        )


def _dims(shape) -> list[int]:
    return tf.TensorShape(shape).as_list()


def _around(shape, axis, structure) -> tuple[int, int, int]:
    """How many elements are before, along and behind `axis`."""
    dims = _dims(shape)
    if not -len(dims) <= axis < len(dims):
        raise ValueError(
            f"{structure} has no axis {axis} in a weight of shape {dims}; pass an axis from "
            f"{-len(dims)} to {len(dims) - 1}, or exclude this weight."
        )
    axis %= len(dims)
    return math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :])


def _first_in_group(keys, sparsity):
    """Mask of the largest keys along the next to last axis, of two equal ones the first."""
    size = keys.shape[-2]
    position = tf.range(size)[:, tf.newaxis]
    ahead = tf.zeros_like(keys)
    # One other member at a time: all pairs at once would take m times the memory of the weight.
    for other in range(size):
        rival = keys[..., other : other + 1, :]
        wins = (rival > keys) | ((rival == keys) & (position > other))
        ahead += tf.cast(wins, tf.int32)
    return ahead < tf.cast(num_kept(size, sparsity), tf.int32)


def _check_how(how):
    if how not in _REDUCTIONS:
        raise ValueError(f"how={how!r} is no reduction of a unit; pass one of {_REDUCTIONS}.")


def _refuse_vectors(shape):
    """The reason to leave a weight of less than 2 axes alone, or None."""
    return "fewer than 2 axes" if len(_dims(shape)) < 2 else None


_KNOWN = {
    "2:4": NofM(2, 4),
    "channel": Channel(),
    "head": Head(),
    "unstructured": Unstructured(),
}


def get(identifier):
    """A structure from its name, or a structure as it is.

    Args:
        identifier: "unstructured", "channel", "head", "n:m" for any n < m such as "2:4", or a
            structure.

    Returns:
        The structure.

    Raises:
        ValueError: None of these.

    Example:

    >>> get("1:16")
    NofM(n=1, m=16, axis=None)
    """
    if hasattr(identifier, "spread") and not isinstance(identifier, type):
        return identifier
    if not isinstance(identifier, str):
        raise ValueError(
            f"Expected a structure, got {identifier!r}; pass one of {sorted(_KNOWN)} or an object "
            "such as tfcompress.structures.Block(4, 4)."
        )
    if match := re.fullmatch(r"(\d+):(\d+)", identifier):
        return NofM(int(match[1]), int(match[2]))
    if identifier == "block":
        raise ValueError(
            'The structure "block" needs sizes; pass tfcompress.structures.Block(height, width), '
            "e.g. Block(4, 4)."
        )
    return resolve("structure", identifier, _KNOWN)


def require_groups(identifier) -> Structure:
    """The structure with this name, if its units are groups that a penalty can make small.

    Raises:
        ValueError: n:m, or an unknown name.

    Example:

    >>> require_groups("channel")
    Channel(axis=-1)
    """
    structure = get(identifier)
    if structure.choose is not None:
        raise ValueError(
            f"{structure} keeps some weights of each group, so there is nothing to make small as a "
            'whole. Pass "unstructured", "channel" or a Block.'
        )
    return structure
