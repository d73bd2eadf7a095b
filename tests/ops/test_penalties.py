import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops.penalties import group_lasso, group_soft_threshold, l1, soft_threshold
from tfcompress.ops.structures import Block, Channel, NofM, Unstructured

WEIGHTS = hnp.arrays(
    "float32",
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-2, 2, width=16),
)
STRUCTURES = st.sampled_from([Channel(), Channel(0), Block(2, 2), Block(1, 4), Unstructured()])


def groups(weight, structure):
    """The groups as arrays, by spreading the number of each."""
    shape = structure.reduce(tf.zeros(weight.shape), "sum").shape
    numbers = tf.reshape(tf.range(structure.num_units(weight.shape)), shape)
    index = structure.spread(numbers, weight.shape).numpy()
    return [weight[index == unit] for unit in range(index.max() + 1)]


def test_the_lasso_of_two_channels():
    weight = tf.constant([[3.0, 0.5], [4.0, 0.0]])
    assert float(group_lasso(weight, 2.0, Channel())) == pytest.approx(2 * np.sqrt(2) * 5.5)


def test_the_proximal_step_of_two_channels():
    # Both have 2 weights, so that their norms of 5 and 1 shrink by the root of 2.
    weight = tf.constant([[3.0, 0.6], [4.0, 0.8]])
    left = 1 - np.sqrt(2) / 5
    expected = [[3 * left, 0], [4 * left, 0]]
    np.testing.assert_allclose(group_soft_threshold(weight, 1.0, Channel()), expected, rtol=1e-6)


def test_a_cut_block_counts_what_it_holds():
    weight = tf.constant([[3.0, 4.0, 2.0]])
    expected = np.sqrt(2) * 5 + np.sqrt(1) * 2
    assert float(group_lasso(weight, 1.0, Block(1, 2))) == pytest.approx(expected)


@hypothesis.given(WEIGHTS, STRUCTURES)
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_lasso_is_its_definition(weight, structure):
    parts = groups(weight, structure)
    expected = sum(np.sqrt(part.size) * np.linalg.norm(part) for part in parts)
    actual = float(group_lasso(tf.constant(weight), 0.5, structure))
    assert actual == pytest.approx(0.5 * expected, rel=1e-5, abs=1e-6)


@hypothesis.given(WEIGHTS, STRUCTURES, st.floats(0, 2))
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_step_minimizes_its_objective(weight, structure, amount):
    shrunk = group_soft_threshold(tf.constant(weight), amount, structure).numpy()

    def objective(x):
        lasso = [
            np.sqrt(part.size) * np.linalg.norm(part.astype("float64"))
            for part in groups(x, structure)
        ]
        return 0.5 * np.sum((x - weight.astype("float64")) ** 2) + amount * np.sum(lasso)

    random = np.random.default_rng(0).normal(size=weight.shape).astype("float32")
    for other in (shrunk + 1e-2 * random, 0.99 * shrunk, np.zeros_like(weight), weight):
        assert objective(shrunk) <= objective(other) + 1e-5


@hypothesis.given(WEIGHTS, st.sampled_from([Unstructured(), Block(1, 1)]), st.floats(0, 2))
@hypothesis.settings(max_examples=20, deadline=None)
def test_groups_of_one_are_plain_l1(weight, structure, amount):
    weight = tf.constant(weight)
    assert float(group_lasso(weight, amount, structure)) == float(l1(weight, amount))
    np.testing.assert_array_equal(
        group_soft_threshold(weight, amount, structure), soft_threshold(weight, amount)
    )


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_the_gradient_of_a_group_of_zeros_is_zero(jit_compile):
    def gradient(weight):
        with tf.GradientTape() as tape:
            tape.watch(weight)
            loss = group_lasso(weight, 2.0, Channel())
        return tape.gradient(loss, weight)

    if jit_compile is not None:
        gradient = tf.function(gradient, jit_compile=jit_compile)
    weight = tf.constant([[3.0, 0.0], [4.0, 0.0]])
    expected = [[2 * np.sqrt(2) * 0.6, 0], [2 * np.sqrt(2) * 0.8, 0]]
    np.testing.assert_allclose(gradient(weight), expected, rtol=1e-6)


@pytest.mark.parametrize("structure", [Channel(), Block(2, 2)], ids=repr)
def test_an_amount_of_zero_changes_nothing_and_zeros_stay(structure):
    weight = tf.constant([[1.0, 0.0, -1e-30], [2.0, 0.0, 0.0]])
    np.testing.assert_array_equal(group_soft_threshold(weight, 0.0, structure), weight)
    np.testing.assert_array_equal(group_soft_threshold(0 * weight, 0.5, structure), 0 * weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_stays_and_squares_do_not_overflow(dtype):
    weight = tf.cast(tf.fill((2, 2), 300.0), dtype)  # 300 squared is infinite in float16.
    lasso, shrunk = (
        group_lasso(weight, 0.25, Channel()),
        group_soft_threshold(weight, 100.0, Channel()),
    )
    assert lasso.dtype == shrunk.dtype == weight.dtype
    assert float(lasso) == pytest.approx(300.0, rel=1e-2)  # 0.25 * 2 * sqrt(2) * 300 * sqrt(2)
    np.testing.assert_allclose(tf.cast(shrunk, tf.float32), np.full((2, 2), 200.0), rtol=1e-2)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_graph_and_xla_equal_eager(jit_compile):
    weight = tf.random.normal((5, 7))

    def both(weight, amount):
        structure = Block(2, 3)
        return group_lasso(weight, amount, structure), group_soft_threshold(
            weight, amount, structure
        )

    compiled = tf.function(both, jit_compile=jit_compile)(weight, tf.constant(0.4))
    for ours, eager in zip(compiled, both(weight, 0.4), strict=True):
        np.testing.assert_allclose(ours, eager, rtol=1e-5)


def test_n_of_m_has_nothing_to_shrink():
    with pytest.raises(ValueError, match="has no groups"):
        group_lasso(tf.ones((4, 4)), 1.0, NofM(2, 4))
    with pytest.raises(ValueError, match="has no groups"):
        group_soft_threshold(tf.ones((4, 4)), 1.0, NofM(2, 4))
