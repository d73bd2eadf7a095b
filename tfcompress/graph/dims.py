"""Symbolic sizes: which axes have to stay equally long, and in what order their elements lie.

A `Dim` is the size of an axis. Axes that are added, multiplied or contracted with each other have
one size between them, and `unify` says so. A size may turn out to be a product (an axis that is
reshaped into heads and channels) or a sum (an axis that is concatenated): it is taken apart in
place, and every axis that has it sees its parts. What cannot be taken apart is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np


class Dim:
    """The size of an axis, or of a part of one.

    Args:
        size: 1 or more.
        frozen: Why its elements cannot be removed, or None.
    """

    __slots__ = ("_kind", "_parts", "_reason", "_same", "size")

    def __init__(self, size: int, frozen: str | None = None):
        self.size = size
        self._reason = frozen
        self._same: Dim | None = None
        self._kind: str | None = None
        self._parts: tuple[Dim, ...] = ()

    @property
    def root(self) -> Dim:
        """The one that stands for all that were unified with it."""
        dim = self
        while dim._same is not None:
            dim = dim._same
        return dim

    @property
    def frozen(self) -> str | None:
        """Why the elements of a leaf cannot be removed, or None."""
        return self.root._reason

    @property
    def parts(self) -> tuple[Dim, ...]:
        """Of a product or a sum; empty for a leaf."""
        return tuple(part.root for part in self.root._parts)

    @property
    def kind(self) -> str | None:
        """`"product"`, `"sum"`, or None for a leaf."""
        return self.root._kind

    def leaves(self) -> Iterator[Dim]:
        """The dims at the bottom, in order; one may come more than once."""
        if not self.parts:
            yield self.root
        for part in self.parts:
            yield from part.leaves()

    def freeze(self, reason: str) -> None:
        """Let no element of it be removed."""
        for leaf in self.leaves():
            leaf._reason = leaf._reason or reason

    def split(self, kind: str, parts: Iterable[Dim]) -> None:
        """Take a leaf apart.

        Args:
            kind: `"product"`, the last part changes fastest, or `"sum"`, one behind the other.
            parts: Two or more.
        """
        root, parts = self.root, tuple(parts)
        root._kind, root._parts = kind, parts
        if root._reason is not None:
            for part in parts:
                part.freeze(root._reason)

    def keep(self, kept: Mapping[Dim, np.ndarray]) -> np.ndarray:
        """Which elements are kept, of shape (size,), if those of its leaves are.

        Args:
            kept: Leaf -> boolean array of its size; a leaf that is missing keeps all.
        """
        if not self.parts:
            return kept.get(self.root, np.ones(self.size, bool))
        parts = [part.keep(kept) for part in self.parts]
        if self.kind == "sum":
            return np.concatenate(parts)
        keep = parts[0]
        for part in parts[1:]:
            keep = np.logical_and.outer(keep, part).reshape(-1)
        return keep

    def places(self, leaf: Dim) -> np.ndarray:
        """Which element of `leaf` each element belongs to, of shape (size,); -1 for none."""
        if not self.parts:
            return np.arange(self.size) if self.root is leaf.root else np.full(self.size, -1)
        parts = [part.places(leaf) for part in self.parts]
        if self.kind == "sum":
            return np.concatenate(parts)
        place = parts[0]
        for part in parts[1:]:
            # At most one of the factors has the leaf, or the elements of several are the same.
            place = np.maximum(place[:, None], part[None, :]).reshape(-1)
        return place


def product(dims: Iterable[Dim]) -> Dim:
    """One dim for several in row-major order; those of size 1 are left out."""
    dims = [dim for dim in dims if dim.size != 1] or [Dim(1, "of size 1")]
    if len(dims) == 1:
        return dims[0]
    made = Dim(math.prod(dim.size for dim in dims))
    made.split("product", dims)
    return made


def concatenation(dims: Iterable[Dim]) -> Dim:
    """One dim for several, one behind the other."""
    dims = list(dims)
    if len(dims) == 1:
        return dims[0]
    made = Dim(sum(dim.size for dim in dims))
    made.split("sum", dims)
    return made


def unify(one: Dim, two: Dim) -> None:
    """Let two dims of the same size be the same, element by element."""
    one, two = one.root, two.root
    if one is two:
        return
    if one.size != two.size:
        raise ValueError(f"Sizes {one.size} and {two.size} cannot be the same.")
    if not one.parts:
        _join(one, two)
    elif not two.parts:
        _join(two, one)
    elif not _unify_parts(one, two):
        reason = "two orders of its elements meet"
        one.freeze(reason)
        two.freeze(reason)


def _join(leaf: Dim, other: Dim) -> None:
    if any(each is leaf for each in other.leaves()):
        other.freeze("it would contain itself")
        return
    if leaf._reason is not None:
        other.freeze(leaf._reason)
    leaf._same = other


def _unify_parts(one: Dim, two: Dim) -> bool:
    if one.kind == two.kind == "product":
        aligned = _aligned(list(one.parts), list(two.parts), _cut_product)
    elif one.kind == two.kind == "sum":
        aligned = _aligned(list(one.parts), list(two.parts), _cut_sum)
    else:
        total, parts = (one, two) if one.kind == "product" else (two, one)
        aligned = _distributed(total, parts)
    if aligned is None:
        return False
    for first, second in aligned:
        unify(first, second)
    return True


def _aligned(one: list[Dim], two: list[Dim], cut) -> list[tuple[Dim, Dim]] | None:
    """Pairs of parts of equal size; `cut` takes the first `size` off a larger leaf."""
    pairs = []
    while one and two:
        if one[0].size == two[0].size:
            pairs.append((one.pop(0), two.pop(0)))
            continue
        larger, size = (one, two[0].size) if one[0].size > two[0].size else (two, one[0].size)
        parts = cut(larger[0], size)
        if parts is None:
            return None
        larger[:1] = parts
    return None if one or two else pairs


def _cut_product(dim: Dim, size: int) -> list[Dim] | None:
    if dim.parts:
        return list(dim.parts) if dim.kind == "product" else None
    if dim.size % size:
        return None
    dim.split("product", (Dim(size), Dim(dim.size // size)))
    return list(dim.parts)


def _cut_sum(dim: Dim, size: int) -> list[Dim] | None:
    if dim.kind == "sum":
        return list(dim.parts)
    if dim.kind == "product":
        return _cut_factor(dim, [size, dim.size - size])
    dim.split("sum", (Dim(size), Dim(dim.size - size)))
    return list(dim.parts)


def _distributed(total: Dim, parts: Dim) -> list[tuple[Dim, Dim]] | None:
    """`(a + b) * c` as `a * c + b * c`, to be compared with a sum."""
    pieces = _cut_factor(total, [part.size for part in parts.parts])
    return None if pieces is None else list(zip(pieces, parts.parts, strict=True))


def _cut_factor(dim: Dim, sizes: list[int]) -> list[Dim] | None:
    first, *rest = dim.parts
    inner = math.prod(part.size for part in rest)
    if any(size % inner for size in sizes):
        return None
    whole = [Dim(size // inner) for size in sizes]
    unify(first, concatenation(whole))
    return [product([part, *rest]) for part in whole]


def cut(dim: Dim, sizes: list[int]) -> list[Dim]:
    """The parts of these sizes, one behind the other, of an axis; frozen if it cannot be cut."""
    parts = [Dim(size) for size in sizes]
    unify(dim, concatenation(parts))
    return parts
