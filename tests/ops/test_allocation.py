import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import allocation as allocations
from tfcompress.ops.structures import Block, Channel, Unstructured

NAMES = ["uniform", "global", "erk", "lamp"]
STRUCTURES = [Unstructured(), Channel(), Channel(0), Block(2, 3), Block(1, 4, "max")]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=7)
# Few distinct values, so that ties are common.
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 2, width=16)
WEIGHTS = hnp.arrays("float32", SHAPES, elements=SCORES)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
SPARSITIES = st.floats(0, 0.999) | st.sampled_from([0.0, 0.5, 0.8, float(np.nextafter(1, 0))])


def num_kept(count, sparsity):
    return max(round(count * (1 - sparsity)), 1)


def unit_masks(scores, structure, name, sparsity):
    pooled = [structure.pool(each) for each in scores]
    return allocations.get(name)(pooled, sparsity, [each.shape for each in scores])


def weight_masks(scores, structure, name, sparsity):
    units = unit_masks(scores, structure, name, sparsity)
    return [structure.spread(mask, each.shape) for mask, each in zip(units, scores, strict=True)]


def counts(masks):
    return [int(np.sum(mask)) for mask in masks]


def erk_by_iteration(sizes, densities, total):
    """The published procedure: what would exceed density 1 is dense, and the rest solved again."""
    sizes, densities = np.array(sizes, float), np.array(densities)
    dense = np.zeros(len(sizes), bool)
    while not dense.all():
        scale = (total - sizes[dense].sum()) / (densities * sizes)[~dense].sum()
        exceeding = ~dense & (scale * densities > 1)
        if not exceeding.any():
            return np.where(dense, sizes, scale * densities * sizes)
        dense |= exceeding
    return sizes


def erk_by_bisection(sizes, densities, total):
    """The shares between one unit and all of them that add up to `total`."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        quotas = np.clip(middle * np.array(densities) * sizes, 1, sizes)
        low, high = (middle, high) if quotas.sum() < total else (low, middle)
    return quotas


def lamp_by_definition(scores):
    flat = scores.ravel().astype("float64")
    order = np.argsort(-flat, kind="stable")
    squares = flat[order] ** 2 if flat.any() else np.ones(flat.size)
    result = np.empty(flat.size)
    result[order] = squares / np.cumsum(squares)
    return result.reshape(scores.shape)


@hypothesis.given(
    st.lists(WEIGHTS, min_size=1, max_size=3),
    DTYPES,
    st.sampled_from(STRUCTURES),
    st.sampled_from(NAMES),
    SPARSITIES,
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_counts_are_exact_and_units_stay_whole(weights, dtype, structure, name, sparsity):
    scores = [tf.cast(weight, dtype) for weight in weights]
    units = unit_masks(scores, structure, name, sparsity)
    sizes = [structure.num_units(weight.shape) for weight in weights]
    if name == "uniform":
        assert counts(units) == [num_kept(size, sparsity) for size in sizes]
    total = sum(counts(units))
    if name != "uniform":
        assert total == num_kept(sum(sizes), sparsity)
    if name in ("erk", "lamp") and total >= len(sizes):
        assert min(counts(units)) >= 1
    for mask, weight in zip(units, weights, strict=True):
        spread = structure.spread(mask, weight.shape)
        assert spread.shape == weight.shape and spread.dtype == tf.bool
        means = structure.reduce(tf.cast(spread, tf.float32), "mean")
        np.testing.assert_array_equal(means, tf.cast(mask, tf.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_constant_scores_give_exact_counts_and_keep_the_first(name, constant):
    masks = unit_masks([tf.fill((9, 9), constant)], Unstructured(), name, 0.9)
    np.testing.assert_array_equal(tf.reshape(masks[0], [-1]), np.arange(81) < 8)


@pytest.mark.parametrize(
    ("structure", "dtype"),
    [(Unstructured(), "bfloat16"), (Channel(), "float16"), (Block(2, 3), "float32")],
    ids=repr,
)
def test_eager_graph_and_xla_choose_the_same(structure, dtype):
    random = np.random.default_rng(0)
    shapes = [(7, 5), (3, 2, 4, 9)]
    # Rounded to few values: most of what decides is ties.
    values = [np.round(random.normal(size=shape) ** 2, 1) for shape in shapes]
    scores = [*[tf.cast(value, dtype) for value in values], tf.fill((4, 5), tf.cast(0.3, dtype))]

    def choose(scores, sparsity):
        return [weight_masks(scores, structure, name, sparsity) for name in NAMES]

    graph, xla = tf.function(choose), tf.function(choose, jit_compile=True)
    for sparsity in (0.0, 0.37, 0.5, 0.9, 0.999):
        expected = choose(scores, sparsity)
        for compiled in (graph, xla):
            actual = compiled(scores, tf.constant(sparsity, tf.float64))
            for ours, eager in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
                np.testing.assert_array_equal(ours, eager)


def test_a_python_sparsity_serves_in_a_graph():
    scores = [tf.random.normal((4, 4)), tf.random.normal((8, 8))]
    for name in NAMES:
        masks = tf.function(lambda name=name: allocations.get(name)(scores, 0.8))()
        assert counts(masks) == counts(allocations.get(name)(scores, 0.8))


def test_erk_literally():
    # Densities go as 8/16 and 16/64: 40 of 80 = scale * (8 + 16), shares 13.33 and 26.67.
    masks = allocations.erk([tf.random.normal((4, 4)), tf.random.normal((8, 8))], 0.5)
    assert counts(masks) == [13, 27]


def test_erk_keeps_small_weights_whole_and_solves_the_rest():
    # The first would keep 1.5 times its weights: it is dense, 52 of the 96 are left for the others,
    # and those share by 16 to 8.
    scores = [tf.random.normal(shape) for shape in ((2, 2), (8, 8), (4, 8))]
    densities = [sum(each.shape) / each.shape.num_elements() for each in scores]
    expected = erk_by_iteration([4, 64, 32], densities, 56)
    np.testing.assert_allclose(expected, [4, 52 * 16 / 28, 52 * 12 / 28])
    assert counts(allocations.erk(scores, 0.44)) == [4, 30, 22]


def test_erk_goes_by_the_shape_behind_the_units():
    scores = [tf.random.uniform([10]), tf.random.uniform([10])]
    shapes = [(5, 10), (500, 10)]  # 15/50 and 510/5000: scale * 10 * 0.402 = 8.
    assert counts(allocations.erk(scores, 0.6, shapes)) == [6, 2]
    assert counts(allocations.erk(scores, 0.6)) == [4, 4]


def test_erk_gives_equal_remainders_to_the_first():
    scores = [tf.random.normal((2, 2)) for _ in range(3)]
    assert counts(allocations.erk(scores, 7 / 12)) == [2, 2, 1]


def test_erk_leaves_one_unit_each_where_it_can():
    scores = [tf.random.normal((2, 1)), tf.random.normal((1000, 1000))]
    shapes = [(10**6, 10**6), (2, 2)]  # The share of the first is next to nothing.
    assert counts(allocations.erk(scores, 0.5, shapes)) == [1, 500_000]
    assert counts(allocations.erk([tf.ones((1, 1))] * 3, 0.5)) == [1, 1, 0]


@hypothesis.given(st.lists(SHAPES, min_size=1, max_size=8), st.floats(0, 0.99))
@hypothesis.settings(max_examples=50, deadline=None)
def test_erk_rounds_its_shares(shapes, sparsity):
    sizes = [int(np.prod(shape)) for shape in shapes]
    total = num_kept(sum(sizes), sparsity)
    hypothesis.assume(total >= len(sizes))
    densities = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    quotas = erk_by_bisection(sizes, densities, total)
    published = erk_by_iteration(sizes, densities, total)
    if published.min() >= 1:
        np.testing.assert_allclose(quotas, published, rtol=1e-6)
    chosen = counts(allocations.erk([tf.random.normal(shape) for shape in shapes], sparsity))
    assert sum(chosen) == total
    assert np.all(np.abs(chosen - quotas) < 1 + 1e-5)


def test_lamp_literally():
    # 4 and 3: 16/16 and 9/25. 2 and 1: 1 and 1/5. 3 of 4 are kept.
    masks = allocations.lamp([tf.constant([3.0, 4.0]), tf.constant([2.0, 1.0])], 0.25)
    assert [mask.numpy().tolist() for mask in masks] == [[True, True], [True, False]]


@hypothesis.given(st.lists(WEIGHTS, min_size=1, max_size=3), st.floats(0, 0.99))
@hypothesis.settings(max_examples=50, deadline=None)
def test_lamp_is_global_on_its_definition(weights, sparsity):
    scores = [tf.constant(weight) for weight in weights]
    adapted = [tf.constant(lamp_by_definition(weight), tf.float32) for weight in weights]
    expected = allocations.global_(adapted, sparsity)
    for ours, theirs in zip(allocations.lamp(scores, sparsity), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_lamp_does_not_depend_on_the_scale_of_a_weight():
    scores = [tf.abs(tf.random.normal((6, 6))), tf.abs(tf.random.normal((5, 9)))]
    scaled = [scores[0] * 2.0**60, scores[1] * 2.0**-60]
    for ours, theirs in zip(
        allocations.lamp(scores, 0.7), allocations.lamp(scaled, 0.7), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_lamp_leaves_every_weight_its_largest_unit():
    scores = [tf.constant([[1.0, 2.0]]), tf.zeros((3, 3)), tf.fill((20, 20), 5.0)]
    masks = allocations.lamp(scores, 1 - 3 / 411)
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[1], [0], [0]]


@pytest.mark.parametrize("name", NAMES)
def test_nan_does_not_disturb_the_count(name):
    scores = [tf.constant([[np.nan, 1.0, 2.0]]), tf.constant([[np.inf, 1.0, np.nan]])]
    kept = sum(counts(allocations.get(name)(scores, 0.5)))
    assert kept == (4 if name == "uniform" else 3)  # Uniform rounds 1.5 to 2 in each.


def test_names_and_functions():
    assert [allocations.get(name) for name in NAMES] == [
        allocations.uniform,
        allocations.global_,
        allocations.erk,
        allocations.lamp,
    ]
    assert allocations.get(max) is max
    with pytest.raises(ValueError, match="Unknown allocation 'larp'.*Did you mean 'lamp'"):
        allocations.get("larp")
