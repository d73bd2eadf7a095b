"""Which layer of the teacher teaches which layer of the student."""

import fnmatch
import re
from collections.abc import Sequence

import numpy as np

from tfcompress.optional import require

MAPPINGS = ("uniform", "last", "same", "searched")


def check_mapping(mapping) -> None:
    """Raise a ValueError if `mapping` is neither a name nor pairs.

    >>> check_mapping("uniform")
    """
    if isinstance(mapping, str):
        if mapping not in MAPPINGS:
            raise ValueError(
                f"Unknown mapping {mapping!r}; expected one of {list(MAPPINGS)}, or pairs of "
                "(teacher, student) paths."
            )
    elif not (
        isinstance(mapping, Sequence)
        and mapping
        and all(len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in mapping)
    ):
        raise ValueError(
            f"A mapping is {list(MAPPINGS)} or pairs of (teacher, student) paths, got {mapping!r}. "
            'Pass e.g. (("encoder_2", "encoder_1"), ("encoder_5", "encoder_3")).'
        )


def pairs(mapping, teacher: Sequence, student: Sequence, what: str) -> list[tuple]:
    """Pair the layers of a teacher with those of a student.

    Of n layers of a teacher and m of a student, `"uniform"` pairs the student's layer i, from 1 to
    m, with the teacher's `round(i * n / m)`, `"last"` with `n - m + i`, and `"same"` with the one
    of its name, as `distillation.student` keeps them (`block_2/norm` is `block_2_norm` there).

    Args:
        mapping: `"uniform"`, `"last"`, `"same"`, or pairs of globs (teacher, student) that match
            one layer each.
        teacher: Points, or tuples of them, in order of computation.
        student: Likewise.
        what: Who asks, for messages.

    Returns:
        `(teacher, student)` for each pair.

    Raises:
        ValueError: The student has more layers than the teacher, or one of another name, a glob of
            a pair matches none or several, or the mapping has not been searched for.

    Example:

    >>> pairs("uniform", ["t1", "t2", "t3", "t4"], ["s1", "s2"], "features")
    [('t2', 's1'), ('t4', 's2')]
    >>> pairs("last", ["t1", "t2", "t3", "t4"], ["s1", "s2"], "features")
    [('t3', 's1'), ('t4', 's2')]
    >>> pairs("same", ["net/b_0/norm", "net/b_1/norm"], ["net_b_1_norm"], "features")
    [('net/b_1/norm', 'net_b_1_norm')]

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351.
    """
    if mapping == "searched":
        raise ValueError(
            f'The mapping of {what} is "searched", for which the losses on a batch must be known. '
            "Call distiller.search(batch) before fit."
        )
    if not isinstance(mapping, str):
        return [(_only(one, teacher, what), _only(two, student, what)) for one, two in mapping]
    if mapping == "same":
        return _same(teacher, student, what)
    n, m = len(teacher), len(student)
    if m > n:
        raise ValueError(
            f"{what} got {n} layers of the teacher for {m} of the student: {list(teacher)} and "
            f"{list(student)}. Pass globs that match at most as many of the student, or pairs."
        )
    chosen = _uniform(n, m) if mapping == "uniform" else range(n - m, n)
    return [(teacher[i], each) for i, each in zip(chosen, student, strict=True)]


def _uniform(n: int, m: int) -> list[int]:
    # Half is rounded up; `round` would take 2.5 down and 3.5 up.
    return [(2 * i * n + m) // (2 * m) - 1 for i in range(1, m + 1)]


def _same(teacher: Sequence, student: Sequence, what: str) -> list[tuple]:
    named = {_flat(layer): layer for layer in teacher}
    strange = [layer_name(layer) for layer in student if _flat(layer) not in named]
    if strange:
        raise ValueError(
            f'{what}(mapping="same") finds no layer of the teacher for {strange}, only '
            f"{[layer_name(layer) for layer in teacher]}. Pass globs that match the same layers of "
            'both, "uniform", or pairs.'
        )
    return [(named[_flat(layer)], layer) for layer in student]


def _flat(layer) -> str:
    """The name that a layer has in a flat graph, see `tfcompress.expand`."""
    return re.sub(r"[^\w.:#-]", "_", layer_name(layer))


def _only(glob: str, layers: Sequence, what: str):
    hits = [layer for layer in layers if fnmatch.fnmatchcase(layer_name(layer), glob)]
    if len(hits) != 1:
        raise ValueError(
            f"{glob!r} in the mapping of {what} matches {len(hits)} of the layers "
            f"{[layer_name(layer) for layer in layers]}; expected one."
        )
    return hits[0]


def layer_name(layer) -> str:
    """The path of a point; of the parts of an attention layer, that of the layer.

    >>> layer_name("block/dense:input")
    'block/dense:input'
    """
    return layer if isinstance(layer, str) else layer.layer


def cheapest(costs: np.ndarray, in_order: bool = True) -> list[int]:
    """The layer of the teacher for each layer of the student with the smallest sum of costs.

    Args:
        costs: `(student layers, teacher layers)`, at most as many of the student.
        in_order: Whether deeper layers of the student must have deeper ones of the teacher, which
            is found by dynamic programming; else no teacher's layer is taken twice (the Hungarian
            method).

    Returns:
        An index for each layer of the student.

    Raises:
        ValueError: The student has more layers than the teacher, or a cost is not finite.

    Example:

    >>> costs = np.array([[3.0, 1.0, 9.0], [0.0, 5.0, 4.0]])
    >>> cheapest(costs), cheapest(costs, in_order=False)
    ([1, 2], [1, 0])
    """
    costs = np.asarray(costs, float)
    m, n = costs.shape
    if m > n or not np.isfinite(costs).all():
        raise ValueError(
            f"Expected finite costs of at least as many layers of the teacher as of the student, "
            f"got {costs.tolist()}."
        )
    if not in_order:
        return _assigned(costs)
    best = np.zeros(n + 1)  # best[j]: of the layers so far, within the first j of the teacher.
    taken = np.zeros((m, n + 1), bool)
    for i in range(m):
        row = np.full(n + 1, np.inf)
        for j in range(i + 1, n + 1):
            with_last = best[j - 1] + costs[i, j - 1]
            taken[i, j] = with_last < row[j - 1]
            row[j] = min(with_last, row[j - 1])
        best = row
    chosen, j = [], n
    for i in reversed(range(m)):
        while not taken[i, j]:
            j -= 1
        j -= 1
        chosen.append(j)
    return chosen[::-1]


def _assigned(costs: np.ndarray) -> list[int]:
    rows, columns = require("scipy.optimize", extra="search").linear_sum_assignment(costs)
    return [int(column) for _, column in sorted(zip(rows, columns, strict=True))]
