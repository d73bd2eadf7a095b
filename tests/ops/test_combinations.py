"""Criterion x structure x allocation, each with each: what holds for every mask."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria
from tfcompress.ops.masks import Units, apply_mask
from tfcompress.ops.structures import Block, Channel, Head, NofM, Unstructured

CRITERIA = {
    "magnitude": criteria.magnitude,
    "a function": tf.square,
    "random": criteria.Random(5),
    "gradient": criteria.Gradient(),
    "fisher": criteria.Fisher(),
    "movement": criteria.Movement(),
    "batch_norm": criteria.BatchNorm(),
    "wanda": criteria.Wanda(),
}
STRUCTURES = [
    Unstructured(),
    NofM(2, 4),
    NofM(1, 3),
    Block(2, 3),
    Block(1, 4, "max"),
    Channel(),
    Channel(0),
    Head(),
]
ALLOCATIONS = [
    allocations.uniform,
    allocations.global_,
    allocations.erk,
    allocations.lamp,
]
# Few distinct values, so that ties are common; a kernel of equal values is common, too.
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]) | st.floats(-3, 3, width=16)
SPARSITIES = st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.999]) | st.floats(0, 0.9999)
SIDES = st.integers(1, 7)


def num_kept(num_units, sparsity):
    """The rule, as the documentation has it."""
    return max(round(num_units * (1 - sparsity)), 1)


def array(draw, shape):
    if draw(st.booleans()):
        return np.full(shape, draw(VALUES), "float32")
    return draw(hnp.arrays("float32", shape, elements=VALUES))


def shapes_of(draw, structure):
    """Shapes by path: an attention layer for heads, else one to three weights of 2 to 4 axes."""
    if structure == Head():
        dim, heads, size = draw(SIDES), draw(SIDES), draw(SIDES)
        into = dict.fromkeys(("query", "key", "value"), (dim, heads, size))
        layer = into | {"attention_output": (heads, size, dim)}
        count = draw(st.integers(1, 2))
        return {f"a{i}/{name}/kernel": each for i in range(count) for name, each in layer.items()}
    ranks = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    return {
        f"w{i}/kernel": tuple(draw(st.integers(1, 5)) for _ in range(rank))
        for i, rank in enumerate(ranks)
    }


def statistic(draw, criterion, shape, index):
    """One of the shape and range that the criterion gets."""
    reads = criteria.reads(criterion)
    if reads == "index":
        return index
    if reads == "batch_norm":
        return tf.constant(array(draw, shape[-1:]))
    if reads == "inputs":
        norms = (*shape[:-1], 1)
        return tf.constant(np.abs(array(draw, norms)))
    gathered = array(draw, shape)
    # Movement's may be negative; the other two are sums of squares or magnitudes.
    return tf.constant(gathered if criterion == criteria.Movement() else np.abs(gathered))


@st.composite
def problems(draw, criterion, structure):
    shapes = shapes_of(draw, structure)
    weights = [tf.constant(array(draw, shape)) for shape in shapes.values()]
    statistics = [statistic(draw, criterion, shape, i) for i, shape in enumerate(shapes.values())]
    units, skipped = Units.cut(structure, shapes)
    assert skipped == {}
    return units, weights, statistics


def kept_units(units, masks):
    """Which units each group keeps; fails if one is kept in part, or not in all its weights."""
    groups = []
    for members in units.groups:
        found = []
        for each in members:
            mask = tf.cast(masks[each.weight], tf.float32)
            most = each.structure.reduce(mask, "max").numpy()
            share = each.structure.reduce(mask, "mean").numpy()
            np.testing.assert_allclose(most, share, atol=1e-6)
            found.append(most > 0.5)
        for each in found:
            np.testing.assert_array_equal(each, found[0])
        groups.append(found[0])
    return groups


def lines(mask, axis):
    return np.moveaxis(mask, axis, -1).reshape(-1, mask.shape[axis])


def check_n_of_m(structure, mask, sparsity):
    for line in lines(mask, -2):
        for start in range(0, len(line), structure.m):
            group = line[start : start + structure.m]
            assert group.sum() == num_kept(len(group), sparsity)


def check_counts(kept, allocation, sparsity):
    if allocation is allocations.uniform:
        for each in kept:
            assert each.sum() == num_kept(each.size, sparsity)
    else:
        total = sum(each.size for each in kept)
        assert sum(each.sum() for each in kept) == num_kept(total, sparsity)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("name", CRITERIA)
@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
def test_every_mask(name, structure, data):
    criterion = CRITERIA[name]
    units, weights, statistics = data.draw(problems(criterion, structure))
    sparsity, higher = sorted((data.draw(SPARSITIES), data.draw(SPARSITIES)))
    decides_itself = structure.choose is not None
    for allocation in ALLOCATIONS[:1] if decides_itself else ALLOCATIONS:

        def masks(sparsity, allocation=allocation):
            return units.masks(weights, criterion, statistics, sparsity, allocation)

        chosen, fewer = masks(sparsity), masks(higher)
        for weight, mask in zip(weights, chosen, strict=True):
            assert mask.dtype == tf.bool and mask.shape == weight.shape
            zeroed = apply_mask(weight, mask).numpy()
            np.testing.assert_array_equal(zeroed, np.where(mask, weight, 0))
        if decides_itself:
            for mask in chosen:
                check_n_of_m(structure, mask.numpy(), sparsity)
        else:
            check_counts(kept_units(units, chosen), allocation, sparsity)
        if allocation is not allocations.erk:  # Its shares are rounded anew at every sparsity.
            for few, many in zip(fewer, chosen, strict=True):
                assert not np.any(few.numpy() & ~many.numpy())
        assert all(mask.numpy().all() for mask in masks(0.0))
