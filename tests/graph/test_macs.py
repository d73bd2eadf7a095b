import keras
import numpy as np
import pytest

from tfcompress.graph.macs import macs, macs_by_weight

L = keras.layers

# Each count is written out by hand for one example: contraction by contraction.
CASES = {
    "dense": (lambda: L.Dense(3), (7,), 7 * 3),
    "dense over a sequence": (lambda: L.Dense(3), (5, 7), 5 * 7 * 3),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (None, 6)), (5, 4), 5 * 4 * 6),
    "conv 1d": (lambda: L.Conv1D(4, 3), (6, 2), 4 * (3 * 2 * 4)),
    "conv 2d": (lambda: L.Conv2D(4, 3), (6, 6, 2), 16 * (9 * 2 * 4)),
    "strided": (lambda: L.Conv2D(4, 3, strides=2, padding="same"), (6, 6, 2), 9 * (9 * 2 * 4)),
    "grouped": (lambda: L.Conv2D(4, 3, groups=2), (6, 6, 4), 16 * (9 * 2 * 4)),
    "conv 3d": (lambda: L.Conv3D(4, 2), (3, 3, 3, 2), 8 * (8 * 2 * 4)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 4), 16 * (9 * 4 * 2)),
    "separable": (lambda: L.SeparableConv2D(5, 3), (6, 6, 4), 16 * (9 * 4 + 4 * 5)),
    "transposed 1d": (lambda: L.Conv1DTranspose(5, 3, strides=2), (6, 4), 6 * (3 * 4 * 5)),
    "transposed 2d": (lambda: L.Conv2DTranspose(5, 3), (6, 6, 4), 36 * (9 * 4 * 5)),
    "transposed 3d": (lambda: L.Conv3DTranspose(5, 2), (3, 3, 3, 4), 27 * (8 * 4 * 5)),
    "lstm": (lambda: L.LSTM(4), (7, 3), 7 * (3 + 4) * 16),
    "gru": (lambda: L.GRU(4, return_sequences=True), (7, 3), 7 * (3 + 4) * 12),
    "bidirectional": (lambda: L.Bidirectional(L.LSTM(4)), (7, 3), 2 * 7 * (3 + 4) * 16),
    "unrolled": (lambda: L.SimpleRNN(4, unroll=True), (7, 3), 7 * (3 + 4) * 4),
    "conv lstm": (lambda: L.ConvLSTM2D(2, 3), (7, 6, 6, 2), 7 * 16 * 9 * (2 + 2) * 8),
    "time distributed": (lambda: L.TimeDistributed(L.Dense(3)), (7, 2), 7 * 2 * 3),
    "pooling": (lambda: L.AveragePooling2D(2), (6, 6, 2), 0),
    "normalization": (lambda: L.BatchNormalization(), (6,), 0),
}


@pytest.mark.parametrize(("layer", "shape", "expected"), CASES.values(), ids=CASES.keys())
def test_macs_of_a_layer(layer, shape, expected):
    model = keras.Sequential([keras.Input(shape), layer()])
    assert macs(model, np.zeros((4, *shape))) == expected


def test_attention_counts_projections_scores_and_values():
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, L.MultiHeadAttention(num_heads=2, key_dim=4)(inputs, inputs))
    projections, per_head = 4 * 5 * 8 * 8, 5 * 5 * 4
    assert macs(model, np.zeros((1, 5, 8))) == projections + 2 * 2 * per_head


def test_an_embedding_counts_nothing():
    model = keras.Sequential([keras.Input((5,), dtype="int32"), L.Embedding(10, 4)])
    assert macs(model, np.zeros((2, 5), "int32")) == 0


def test_a_shared_layer_counts_every_call_and_plain_ops_count_as_well():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(4)

        def call(self, x):
            return keras.ops.matmul(self.dense(x), keras.ops.transpose(self.dense(2 * x)))

    model = Twice()
    model(np.zeros((1, 3)))
    assert macs(model, np.zeros((1, 3))) == 2 * (3 * 4) + 4


def test_a_branch_counts_as_its_larger_side():
    class Branch(L.Layer):
        def build(self, shape):
            self.small, self.large = self.add_weight(shape=(3, 3)), self.add_weight(shape=(3, 3))

        def call(self, x):
            return keras.ops.cond(
                keras.ops.sum(x) > 0,
                lambda: keras.ops.matmul(x, self.small),
                lambda: keras.ops.matmul(keras.ops.matmul(x, self.large), self.small),
            )

    model = keras.Sequential([keras.Input((3,)), Branch()])
    assert macs(model, np.ones((1, 3))) == 2 * 9


def test_a_loop_of_unknown_length_gives_none_and_says_why():
    class Halving(L.Layer):
        def call(self, x):
            def step(x):
                return (keras.ops.matmul(x, keras.ops.ones((2, 2))) / 4,)

            return keras.ops.while_loop(lambda x: keras.ops.sum(x) > 1, step, (x,))[0]

    model = keras.Sequential([keras.Input((2,)), Halving()])
    with pytest.warns(UserWarning, match="length of the loop .* is not known"):
        assert macs(model, np.ones((1, 2))) is None


def test_mobilenet_v2_needs_what_its_paper_says():
    # Sandler et al. 2018, table 4: 300 million.
    model = keras.applications.MobileNetV2(weights=None)
    assert macs(model, np.zeros((1, 224, 224, 3), "float32")) == 300_774_272


def test_macs_by_weight_names_each_factor():
    tokens = keras.Input((6,), dtype="int32")
    x = L.Embedding(11, 8, name="embedding")(tokens)
    x = L.MultiHeadAttention(num_heads=2, key_dim=4, name="attention")(x, x)
    x = L.Bidirectional(L.GRU(3, return_sequences=True), name="both")(x)
    x = L.SeparableConv1D(5, 3, name="separable")(x)
    model = keras.Model(tokens, L.Dense(2, name="head")(L.Flatten()(x)), name="model")
    found = macs_by_weight(model, np.zeros((3, 6), "int32"))
    projection = 6 * 8 * 8
    assert found == {
        "attention/query/kernel": projection,
        "attention/key/kernel": projection,
        "attention/value/kernel": projection,
        "attention/attention_output/kernel": projection,
        None: 2 * (2 * 6 * 6 * 4),
        "both/forward_gru/gru_cell/kernel": 6 * 8 * 9,
        "both/forward_gru/gru_cell/recurrent_kernel": 6 * 3 * 9,
        "both/backward_gru/gru_cell/kernel": 6 * 8 * 9,
        "both/backward_gru/gru_cell/recurrent_kernel": 6 * 3 * 9,
        "separable/depthwise_kernel": 4 * 3 * 6,
        "separable/pointwise_kernel": 4 * 6 * 5,
        "head/kernel": 20 * 2,
    }


def test_a_weight_that_is_used_twice_counts_for_both():
    class Tied(L.Layer):
        def __init__(self, other):
            super().__init__()
            self.other = other

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.other.kernel))

    first = L.Dense(4, use_bias=False, name="first")
    model = keras.Sequential([keras.Input((3,)), first, Tied(first)], name="model")
    assert macs_by_weight(model, np.zeros((1, 3))) == {"model/first/kernel": 24}
