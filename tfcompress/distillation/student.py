"""A student made of its teacher: fewer layers, fewer heads, neurons and channels, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import keras

from tfcompress.graph.dims import Dim
from tfcompress.graph.drop import Block, blocks, drop_layers
from tfcompress.graph.expand import expand
from tfcompress.graph.groups import Coupling, groups
from tfcompress.graph.rebuild import copied
from tfcompress.graph.shrink import shrink


def student(
    teacher: keras.Model,
    layers: int | Iterable[int] | None = None,
    width: float | Mapping[str, float] | None = None,
    **arguments,
) -> keras.Model:
    """A smaller model that starts with weights of its teacher.

    Layers keep their names (`block_2/dense` becomes `block_2_dense`, as in `tfcompress.expand`), so
    that `mapping="same"` of the losses pairs each with the teacher's that it was copied from.

    Args:
        teacher: Any built model. It is not touched.
        layers: Which blocks stay (see `tfcompress.graph.blocks`): their indices, from 0; or how
            many, 1 or more, which are then spread evenly from the first to the last, as in
            DistilBERT: 6 of 12 are 0, 2, 4, 7, 9, 11. Blocks that cannot be dropped stay. None for
            all.
        width: Share that stays, in (0, 1], of the channels, neurons and attention heads. What a
            layer norm averages over stays whole, as the hidden width of a transformer, and so does
            the size of a head. Or `{glob: share}`, see `shrink_plan`, for whatever the globs name.
            None for all.
        **arguments: How `width` chooses, see `shrink_plan`: `criterion`, `data`, `round_to`,
            `include`, `exclude`, ...

    Returns:
        A new flat Functional model of plain Keras layers, with weights of its own; without `layers`
        and `width` a copy of the teacher, for self-distillation.

    Raises:
        ValueError: An argument that is out of range, a block that cannot be dropped, or a model
            with no blocks or nothing to remove.

    Example:

    >>> x = inputs = keras.Input((4,))
    >>> for i in range(4):
    ...     h = keras.layers.Dense(16, activation="relu", name=f"block_{i}_in")(x)
    ...     x = keras.layers.Add(name=f"block_{i}_add")(
    ...         [x, keras.layers.Dense(4, name=f"block_{i}_out")(h)]
    ...     )
    >>> small = student(keras.Model(inputs, x), layers=2, width=0.5)
    >>> [(layer.name, layer.units) for layer in small.layers if hasattr(layer, "units")]
    [('block_0_in', 8), ('block_0_out', 4), ('block_3_in', 8), ('block_3_out', 4)]

    References: Sanh et al. 2019 (DistilBERT), https://arxiv.org/abs/1910.01108; Hou et al. 2020
    (DynaBERT: heads and neurons, not the hidden width), https://arxiv.org/abs/2004.04037.
    """
    found = [] if layers is None else blocks(teacher)
    kept = [] if layers is None else _kept(found, layers)
    shares = _shares(width)
    if arguments and shares is None:
        raise ValueError(
            f"{sorted(arguments)} say how the width is chosen, and width is {width!r}. Pass e.g. "
            "width=0.5."
        )
    small = expand(teacher) if shares is None else _narrowed(teacher, shares, arguments)
    if len(kept) < len(found):
        return drop_layers(small, keep=kept)
    return copied(small) if shares is None else small


def _kept(found: list[Block], layers) -> list[int]:
    """The indices of the blocks that stay."""
    names = [block.name for block in found]
    if not found:
        raise ValueError(
            "layers= was given, and no part of the teacher repeats (tfcompress.graph.blocks finds "
            "none). Leave layers out."
        )
    if isinstance(layers, bool) or not isinstance(layers, int):
        return _indices(layers, names)
    fixed = [i for i, block in enumerate(found) if not block.is_droppable]
    least = max(len(fixed), 1)
    if not least <= layers <= len(found):
        why = f", and {[names[i] for i in fixed]} cannot be dropped" if fixed else ""
        raise ValueError(
            f"layers={layers} of the {len(found)} blocks {names} cannot stay{why}; expected "
            f"{least} to {len(found)}."
        )
    free = [i for i in range(len(found)) if i not in fixed]
    return sorted(fixed + [free[i] for i in spread(len(free), layers - len(fixed))])


def _indices(layers, names) -> list[int]:
    is_iterable = isinstance(layers, Iterable) and not isinstance(layers, str)
    given = list(layers) if is_iterable else []
    if not given or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        raise ValueError(
            f"layers is how many blocks stay, or their indices, got {layers!r}. The teacher has "
            f"{len(names)}: {names}. Pass e.g. layers={max(len(names) // 2, 1)}."
        )
    wrong = [i for i in given if not -len(names) <= i < len(names)]
    if wrong:
        raise ValueError(
            f"layers={given} has {wrong}, and the teacher has {len(names)} blocks: {names}."
        )
    return sorted({i % len(names) for i in given})


def spread(count: int, chosen: int) -> list[int]:
    """As many of `count` indices as are chosen, evenly from the first to the last.

    Index i of m is `i * (n - 1) / (m - 1)`, rounded, half down; the first where m is 1.

    >>> spread(12, 6), spread(6, 3)
    ([0, 2, 4, 7, 9, 11], [0, 2, 5])
    """
    if chosen <= 1:
        return [0][:chosen]
    steps = chosen - 1
    return [-((steps - 2 * i * (count - 1)) // (2 * steps)) for i in range(chosen)]


def _shares(width) -> float | Mapping[str, float] | None:
    """What stays; None for everything."""
    shares = width if isinstance(width, Mapping) else {"": width}
    for share in shares.values():
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if width is not None and not (is_number and 0 < share <= 1):
            raise ValueError(
                f"width is the share that stays, in (0, 1], or a dict of them, got {width!r}. Pass "
                "e.g. 0.5."
            )
    partly = {glob: share for glob, share in shares.items() if share not in (None, 1)}
    if not partly:
        return None
    return partly if isinstance(width, Mapping) else width


def _narrowed(teacher, shares, arguments) -> keras.Model:
    if isinstance(shares, Mapping):
        return shrink(teacher, {glob: 1 - share for glob, share in shares.items()}, **arguments)
    coupling = Coupling(expand(teacher))
    found, whole = groups(coupling), _whole(coupling)
    names = [group.name for group in found if group.dim not in whole]
    if found and not names:
        raise ValueError(
            f"width={shares}: all that could be removed from {teacher.name!r} is averaged over by "
            f"a layer norm: {[group.name for group in found]}. Name it: width={{'*': {shares}}}."
        )
    exclude = arguments.pop("exclude", None)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude or ())
    kept = [_escaped(group.name) for group in found if group.dim in whole]
    return shrink(teacher, 1 - shares, exclude=[*exclude, *kept], **arguments)


def _whole(coupling: Coupling) -> set[Dim]:
    """What no single share is removed of: what layer norms average over, and sizes of heads."""
    whole = {leaf for _, dim in coupling.statistics for leaf in dim.leaves()}
    for variable, dims in coupling.weights.values():
        made = [dim for axis, dim in enumerate(dims) if (id(variable), axis) not in coupling.read]
        whole |= _inner(made)
    return whole


def _inner(parts: Sequence[Dim]) -> set[Dim]:
    """Of sizes that are multiplied, such as heads and their size, all but the first."""
    free = [part for part in parts if any(leaf.frozen is None for leaf in part.leaves())]
    inner = {leaf for part in free[1:] for leaf in part.leaves()}
    return inner | (_inside(free[0]) if free else set())


def _inside(dim: Dim) -> set[Dim]:
    if dim.kind == "product":
        return _inner(dim.parts)
    return set().union(*map(_inside, dim.parts))


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
