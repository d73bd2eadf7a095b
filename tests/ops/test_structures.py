import dataclasses
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import structures
from tfcompress.ops.allocation import uniform
from tfcompress.ops.masks import Units
from tfcompress.ops.structures import Block, Channel, Head, NofM, Structure, Unstructured

SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=7)
# Few distinct values, so that ties are common.
VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 10, width=16)
WEIGHTS = hnp.arrays("float32", SHAPES, elements=VALUES)
BLOCKS = st.builds(Block, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["mean", "max"]))
GROUPED = BLOCKS | st.sampled_from([Channel(), Channel(0), Channel(-2)])
NOFM = st.sampled_from([NofM(2, 4), NofM(1, 2), NofM(1, 16), NofM(3, 5), NofM(2, 4, axis=0)])
ALL = [Unstructured(), NofM(2, 4), NofM(1, 3, 0), Block(2, 3), Block(1, 4, "max"), Channel(0)]
HOWS = {"sum": np.sum, "mean": np.mean, "max": np.max}


def unit_index(structure, shape):
    """The number of every weight's unit, by the definition of the structure."""
    index = np.indices(shape)
    if isinstance(structure, Channel):
        return index[structure.axis]
    *leading, inputs, outputs = shape
    height, width = min(structure.height, inputs), min(structure.width, outputs)
    places = [*index[:-2], index[-2] // height, index[-1] // width]
    counts = [*leading, -(-inputs // height), -(-outputs // width)]
    return np.ravel_multi_index(places, counts)


def n_of_m_by_sorting(scores, structure, sparsity):
    mask = np.zeros(scores.shape, bool)
    axis = -2 if structure.axis is None else structure.axis
    lines = np.moveaxis(scores, axis, -1).reshape(-1, scores.shape[axis])
    kept = np.moveaxis(mask, axis, -1)
    rows = np.zeros_like(lines, bool)
    for line, row in zip(lines, rows, strict=True):
        for start in range(0, len(line), structure.m):
            group = line[start : start + structure.m]
            count = max(round(len(group) * (1 - sparsity)), 1)
            row[start + np.argsort(-group, kind="stable")[:count]] = True
    kept[...] = rows.reshape(kept.shape)
    return mask


def test_a_block_is_literally_a_tile():
    scores = tf.constant([[1.0, 2.0, 10.0], [3.0, 6.0, 20.0], [0.0, 4.0, 7.0]])
    assert Block(2, 2).pool(scores).numpy().tolist() == [[3.0, 15.0], [2.0, 7.0]]
    assert Block(2, 2, "max").pool(scores).numpy().tolist() == [[6.0, 20.0], [4.0, 7.0]]
    assert Block(2, 2).sizes((3, 3)).numpy().tolist() == [[4.0, 2.0], [2.0, 1.0]]
    units = tf.constant([[True, False], [False, True]])
    spread = Block(2, 2).spread(units, (3, 3)).numpy().astype(int).tolist()
    assert spread == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_a_kernel_smaller_than_the_block_is_one_unit_for_each_leading_index():
    structure = Block(8, 8)
    assert structure.num_units((3, 2, 4)) == 3
    assert structure.pool(tf.reshape(tf.range(24.0), (3, 2, 4))).numpy().ravel().tolist() == [
        3.5,
        11.5,
        19.5,
    ]


def test_the_largest_of_a_cut_block_may_be_negative():
    assert Block(2, 2, "max").pool(tf.constant([[-1.0, -2.0, -3.0]])).numpy().tolist() == [
        [-1.0, -3.0]
    ]


def test_a_channel_is_a_slice():
    scores = tf.reshape(tf.range(12.0), (2, 2, 3))
    assert Channel().pool(scores).numpy().tolist() == [4.5, 5.5, 6.5]
    assert Channel(0).reduce(scores, "sum").numpy().tolist() == [15.0, 51.0]
    assert Channel().sizes((2, 2, 3)).numpy().tolist() == [4.0, 4.0, 4.0]
    spread = Channel(0).spread(tf.constant([7.0, 8.0]), (2, 2, 3)).numpy()
    np.testing.assert_array_equal(spread, np.stack([np.full((2, 3), 7), np.full((2, 3), 8)]))


def test_two_of_four_literally():
    scores = tf.constant([[9.0, 1.0], [1.0, 1.0], [8.0, 1.0], [2.0, 1.0], [5.0, 0.0], [4.0, 9.0]])
    mask = NofM(2, 4).choose(scores, 0.5).numpy().astype(int)
    assert mask[:, 0].tolist() == [1, 0, 1, 0, 1, 0]  # The last group of 2 keeps 1.
    assert mask[:, 1].tolist() == [1, 1, 0, 0, 0, 1]  # Of equal ones the first.


def test_n_of_m_follows_a_schedule_to_its_own_sparsity():
    scores = tf.constant([[1.0], [2.0], [3.0], [4.0]])
    counts = [int(tf.reduce_sum(tf.cast(NofM(2, 4).choose(scores, s), tf.int32))) for s in (0, 0.3)]
    assert [*counts, NofM(2, 4).sparsity, NofM(1, 16).sparsity] == [4, 3, 0.5, 0.9375]


def test_n_of_m_lies_along_the_inputs_of_attention():
    assert NofM(2, 4).bind("mha/query/kernel", (8, 2, 4))[0].axis == -3
    assert NofM(2, 4).bind("mha/attention_output/kernel", (2, 4, 8))[0].axis is None
    assert NofM(2, 4, axis=1).bind("mha/key/kernel#2", (8, 2, 4))[0].axis == 1
    assert isinstance(NofM(2, 4).bind("dense/bias", (8,)), str)


def test_n_of_m_keeps_its_count_among_nan():
    scores = tf.constant([[np.nan], [1.0], [np.nan], [np.inf]])
    assert int(tf.reduce_sum(tf.cast(NofM(2, 4).choose(scores, 0.5), tf.int32))) == 2


@hypothesis.given(WEIGHTS, NOFM, st.floats(0, 0.999) | st.sampled_from([0.0, 0.5, 0.75]))
@hypothesis.settings(max_examples=50, deadline=None)
def test_n_of_m_is_what_sorting_each_group_would_keep(scores, structure, sparsity):
    expected = n_of_m_by_sorting(scores, structure, sparsity)
    np.testing.assert_array_equal(structure.choose(tf.constant(scores), sparsity), expected)


@hypothesis.given(WEIGHTS, GROUPED, st.sampled_from(sorted(HOWS)))
@hypothesis.settings(max_examples=80, deadline=None)
def test_units_reduce_over_what_they_hold(values, structure, how):
    index = unit_index(structure, values.shape)
    expected = [HOWS[how](values[index == unit]) for unit in range(index.max() + 1)]
    reduced = structure.reduce(tf.constant(values), how)
    assert structure.num_units(values.shape) == len(expected) == reduced.shape.num_elements()
    np.testing.assert_allclose(tf.reshape(reduced, [-1]), expected, rtol=1e-5)
    sizes = tf.reshape(structure.sizes(values.shape), [-1]).numpy()
    np.testing.assert_array_equal(sizes, np.bincount(index.ravel()))


@hypothesis.given(SHAPES, GROUPED)
@hypothesis.settings(max_examples=50, deadline=None)
def test_every_weight_gets_the_value_of_its_unit(shape, structure):
    index = unit_index(structure, shape)
    numbers = tf.range(structure.num_units(shape))
    units = tf.reshape(numbers, structure.reduce(tf.zeros(shape), "sum").shape)
    np.testing.assert_array_equal(structure.spread(units, shape), index)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_reduced_in_float32(dtype):
    values = tf.fill((300, 300), tf.constant(1.0, dtype))
    total = Channel().reduce(values, "sum")
    assert total.dtype == tf.float32
    assert total.numpy().tolist() == [300.0] * 300  # bfloat16 would stop at 256.


@pytest.mark.parametrize("structure", ALL, ids=repr)
def test_eager_graph_and_xla_agree(structure):
    scores = tf.abs(tf.random.normal((7, 6)))

    def mask(scores, sparsity):
        if structure.choose is not None:
            return structure.choose(scores, sparsity)
        pooled = structure.pool(scores)
        return structure.spread(pooled > tf.cast(sparsity, pooled.dtype), scores.shape)

    sparsity = tf.constant(0.5, tf.float64)
    for jit_compile in (False, True):
        compiled = tf.function(mask, jit_compile=jit_compile)
        np.testing.assert_array_equal(compiled(scores, sparsity), mask(scores, 0.5))


@pytest.mark.parametrize("structure", [*ALL, Head()], ids=repr)
def test_a_structure_survives_serialization(structure):
    config = keras.saving.serialize_keras_object(structure)
    assert keras.saving.deserialize_keras_object(config) == structure


# Two coupled kernels: units of "a" are columns of one and, two rows each, of the other.
GROUPS = {
    "one/kernel": [{"axis": 1, "group": "a", "places": [0, 1, 2]}],
    "one/bias": [{"axis": 0, "group": "a", "places": [0, 1, 2]}],
    "two/kernel": [
        {"axis": 0, "group": "a", "places": [0, 0, -1, 1, 1, 2, 2]},
        {"axis": 1, "group": "b", "places": [0, 1]},
    ],
}
SHAPES_OF_GROUPS = {"one/kernel": (2, 3), "one/bias": (3,), "two/kernel": (7, 2), "other": (4, 4)}


def test_a_group_spans_weights_and_a_weight_groups():
    units, skipped = Units.cut(Channel(groups=GROUPS), SHAPES_OF_GROUPS)
    assert skipped == {"other": "in none of the groups"}
    one, two = np.array([[1.0, 5, 9]] * 2), np.ones((7, 2))
    two[3:5] = 40.0
    scores = [tf.constant(one), None, tf.constant(two)]
    pooled = units.pool(scores)
    # Two columns of 2 weights and 2 rows of 2 weights each; the third row is of no unit.
    np.testing.assert_allclose(pooled[0], [(2 + 4) / 6, (10 + 160) / 6, (18 + 4) / 6], rtol=1e-6)
    np.testing.assert_allclose(pooled[1], [85 / 7, 85 / 7], rtol=1e-6)
    masks = units.choose(scores, 0.5, uniform)
    assert masks[0].numpy().astype(int).tolist() == [[0, 1, 1]] * 2
    assert masks[1].numpy().astype(int).tolist() == [0, 1, 1]
    rows = [0, 0, 1, 1, 1, 1, 1]
    assert masks[2].numpy().astype(int).tolist() == [[row, 0] for row in rows]


@pytest.mark.parametrize("how", sorted(HOWS))
def test_parts_reduce_over_what_they_hold(how):
    ((part, group), _) = Channel(groups=GROUPS).parts("two/kernel", (7, 2))
    values = np.random.default_rng(0).normal(size=(7, 2)).astype("float32")
    rows = [[0, 1], [3, 4], [5, 6]]
    expected = [HOWS[how](values[each]) for each in rows]
    np.testing.assert_allclose(part.reduce(tf.constant(values), how), expected, rtol=1e-6)
    assert (group, part.num_units((7, 2)), part.num_weights((7, 2))) == ("a", 3, 12)
    assert part.sizes((7, 2)).numpy().tolist() == [4.0, 4.0, 4.0]


def test_groups_survive_serialization_as_json():
    structure = Channel(groups=GROUPS)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(structure)))
    assert keras.saving.deserialize_keras_object(config) == structure
    assert repr(structure) == "Channel(groups=<of 3 weights>)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Channel(0, GROUPS), "takes axis, or groups"),
        (lambda: Channel(groups={"a": [{"axis": 0}]}), "takes axis, or groups"),
        (lambda: Channel(groups=["a"]), "takes axis, or groups"),
        (lambda: Channel(groups=GROUPS).bind("one/kernel", (2, 3)), "units of several weights"),
        (lambda: Channel(groups=GROUPS).parts("one/kernel", (2, 4)), "3 elements along axis 1"),
        (lambda: Channel(groups=GROUPS).parts("two/kernel", (7,)), "2 elements along axis 1"),
    ],
)
def test_groups_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_heads_of_an_attention_layer_share_a_key():
    layer = keras.layers.MultiHeadAttention(2, 4, name="attention")
    layer.build((None, 5, 8), (None, 5, 8))
    bound = {each.path: Head().bind(each.path, each.shape) for each in layer.weights}
    kernels = {path: each for path, each in bound.items() if path.endswith("kernel")}
    assert {path: each[1] for path, each in kernels.items()} == dict.fromkeys(kernels, "attention")
    assert len(kernels) == 4
    shapes = {each.path: each.shape for each in layer.weights}
    assert {each[0].num_units(shapes[path]) for path, each in kernels.items()} == {2}
    assert kernels["attention/attention_output/kernel"][0] == Channel(0)
    assert "not an attention kernel" in bound["attention/query/bias"]


def test_grouped_query_attention_has_two_numbers_of_heads():
    layer = keras.layers.GroupQueryAttention(4, 6, 2, name="gqa")
    layer.build((None, 5, 8), (None, 5, 8))
    heads = {}
    for weight in layer.weights:
        if weight.path.endswith("kernel"):
            structure, key = Head().bind(weight.path, weight.shape)
            heads.setdefault((key, structure.num_units(weight.shape)), []).append(weight.path)
    assert heads == {
        ("gqa", 6): ["gqa/query/kernel", "gqa/attention_output/kernel"],
        ("gqa", 2): ["gqa/key/kernel", "gqa/value/kernel"],
    }


def test_a_repeated_path_is_another_layer():
    assert Head().bind("attention/key/kernel#2", (8, 2, 4)) == (Channel(1), "attention#2")


@pytest.mark.parametrize(
    ("structure", "path", "shape", "reason"),
    [
        (Head(), "dense/kernel", (8, 4), "not an attention kernel"),
        (Head(), "query/kernel", (8, 2, 4), "not an attention kernel"),
        (Head(), "attention/query/kernel", (8, 4), "no axis of heads"),
        (Channel(), "dense/bias", (4,), "fewer than 2 axes"),
        (Block(2, 2), "dense/bias", (4,), "fewer than 2 axes"),
        (NofM(2, 4), "dense/bias", (4,), "fewer than 2 axes"),
    ],
)
def test_what_a_structure_leaves_alone_has_a_reason(structure, path, shape, reason):
    assert reason in structure.bind(path, shape)


@pytest.mark.parametrize("structure", [Unstructured(), Channel(), Block(2, 2), NofM(2, 4)])
def test_a_weight_is_bound_to_itself(structure):
    assert structure.bind("dense/kernel", (4, 4)) == (structure, "dense/kernel")


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("unstructured", Unstructured()),
        ("channel", Channel()),
        ("head", Head()),
        ("2:4", NofM(2, 4)),
        ("1:16", NofM(1, 16)),
    ],
)
def test_names(name, structure):
    assert structures.get(name) == structure
    assert structures.get(structure) is structure


def test_a_structure_of_ones_own_serves():
    @dataclasses.dataclass(frozen=True)
    class Rows(Structure):
        def spread(self, units, shape):
            return tf.broadcast_to(units[:, None], shape)

    assert structures.get(Rows()) == Rows()
    with pytest.raises(NotImplementedError, match=r"Rows must define num_units\(shape\)"):
        Rows().num_units((2, 2))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NofM(4, 4), 'got n=4 and m=4. NofM\\(2, 4\\), or "2:4"'),
        (lambda: structures.get("0:4"), "1 <= n < m, got n=0"),
        (lambda: Block(0, 4), "height and a width of 1 or more, got 0 and 4"),
        (lambda: Block(4, 4, "sum"), 'pooling=\'sum\'; pass "mean" or "max"'),
        (lambda: structures.get("block"), r"needs sizes; pass .*Block\(height, width\)"),
        (lambda: structures.get("chanel"), "Did you mean 'channel'"),
        (lambda: structures.get(Channel), "Expected a structure, got <class"),
        (lambda: structures.get(4), "Expected a structure, got 4"),
        (lambda: NofM(2, 4).pool(tf.ones((4, 4))), "has no groups .* for a group penalty use"),
        (lambda: NofM(2, 4).reduce(tf.ones((4, 4)), "sum"), "has no groups"),
        (lambda: NofM(2, 4).sizes((4, 4)), "has no groups"),
        (lambda: Channel(2).num_units((4, 4)), "has no axis 2 in a weight of shape"),
        (lambda: Block(2, 2).num_units((4,)), "needs a weight of 2 axes or more"),
        (lambda: Channel().reduce(tf.ones((2, 2)), "min"), "how='min' is no reduction"),
        (lambda: Unstructured().reduce(tf.ones((2, 2)), "min"), "how='min' is no reduction"),
    ],
)
def test_bad_input_says_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_heads_are_known_from_the_path():
    with pytest.raises(NotImplementedError, match=r"call bind\(path, shape\)"):
        Head().num_units((8, 2, 4))
