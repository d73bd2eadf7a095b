import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops.selection import order_keys, top_k_mask, top_k_masks

FLOATS = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf])
ARRAYS = hnp.arrays("float32", hnp.array_shapes(max_dims=4, max_side=6), elements=FLOATS)


def by_sorting(arrays, k):
    """The k largest of all arrays, ties by index: the definition, in numpy."""
    flat = np.concatenate([array.ravel() for array in arrays])
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:k]] = True
    parts = np.split(kept, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def test_literally():
    mask = top_k_mask(tf.constant([[3.0, 1.0], [2.0, 5.0]]), 2)
    assert mask.numpy().tolist() == [[True, False], [False, True]]


def test_the_first_ties_are_kept():
    assert top_k_mask(tf.constant([1.0, 2.0, 2.0, 2.0]), 2).numpy().tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_ties_are_broken_across_tensors_in_order():
    masks = top_k_masks([tf.ones((2,)), tf.ones((2, 2))], 3)
    assert [mask.numpy().tolist() for mask in masks] == [
        [True, True],
        [[True, False], [False, False]],
    ]


def test_negative_zero_ties_with_zero():
    assert top_k_mask(tf.constant([-1.0, -0.0, 0.0]), 1).numpy().tolist() == [False, True, False]


def test_nan_does_not_disturb_the_count():
    scores = tf.abs(tf.constant([np.nan, 1.0, 2.0, np.nan]))
    assert [int(tf.reduce_sum(tf.cast(top_k_mask(scores, k), tf.int32))) for k in (1, 2, 3)] == [
        1,
        2,
        3,
    ]


@hypothesis.given(st.lists(ARRAYS, min_size=1, max_size=3), st.floats(0, 1))
@hypothesis.settings(max_examples=50, deadline=None)
def test_it_is_what_sorting_would_keep(arrays, share):
    k = max(1, round(share * sum(array.size for array in arrays)))
    masks = top_k_masks([tf.constant(array) for array in arrays], k)
    for mask, expected in zip(masks, by_sorting(arrays, k), strict=True):
        np.testing.assert_array_equal(mask, expected)


@hypothesis.given(hnp.arrays("float32", 20, elements=FLOATS))
@hypothesis.settings(max_examples=50, deadline=None)
def test_keys_are_in_the_order_of_the_scores(scores):
    keys = order_keys(tf.constant(scores)).numpy().astype(np.int64)
    np.testing.assert_array_equal(
        np.sign(keys[:, None] - keys),
        np.sign(np.greater.outer(scores, scores) * 1.0 - np.less.outer(scores, scores)),
    )


@pytest.mark.parametrize(
    ("dtype", "distribution"),
    [
        ("float16", "normal"),
        ("bfloat16", "normal"),
        ("float64", "normal"),
        ("float32", "constant"),
        ("float32", "mostly zero"),
        ("float32", "heavy tails"),
    ],
)
def test_eager_graph_and_xla_agree(dtype, distribution):
    random = np.random.default_rng(0)
    values = {
        "normal": random.normal(size=(40, 25)),
        "constant": np.full((40, 25), 0.5),
        "mostly zero": random.normal(size=(40, 25)) * (random.uniform(size=(40, 25)) < 0.2),
        "heavy tails": np.exp(5 * random.normal(size=(40, 25))),
    }[distribution]
    scores = tf.abs(tf.cast(values, dtype))
    expected = by_sorting([tf.cast(scores, tf.float32).numpy()], 300)[0]
    for jit_compile in (None, False, True):
        function = top_k_mask
        if jit_compile is not None:
            function = tf.function(top_k_mask, jit_compile=jit_compile)
        np.testing.assert_array_equal(function(scores, tf.constant(300)), expected)


def test_k_may_be_everything_or_one():
    scores = tf.constant([0.5, 0.1, 0.9])
    assert top_k_mask(scores, 3).numpy().all()
    assert top_k_mask(scores, 1).numpy().tolist() == [False, False, True]
