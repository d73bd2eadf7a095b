"""Where ranges are needed."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.graph.placement import has_attention, moves_only, place


def outputs(model):
    return [p.layer.name for p in place(model).placements if p.output]


def chain(*operations, shape=(8, 8, 3)):
    return keras.Sequential([keras.Input(shape), *operations])


def test_what_a_kernel_computes_at_once_has_one_range():
    model = chain(
        layers.Conv2D(4, 3, name="conv"),
        layers.BatchNormalization(name="bn"),
        layers.ReLU(name="relu"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.ReLU(6.0, name="relu6"),
        layers.MaxPooling2D(name="pool"),
        layers.Flatten(name="flatten"),
        layers.Dense(3, activation="relu", name="dense"),
        layers.Dropout(0.1, name="dropout"),
        layers.Dense(2, name="logits"),
    )
    assert outputs(model) == ["relu", "relu6", "dense", "logits"]


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        (layers.Conv2D(4, 3, activation="relu", name="a"), layers.BatchNormalization(name="b")),
        (layers.MaxPooling2D(name="pool"), layers.BatchNormalization(name="b")),
        (layers.Conv2D(4, 3, name="a"), layers.Activation("gelu", name="b")),
        (layers.Conv2D(4, 3, name="a"), layers.LeakyReLU(name="b")),
    ],
)
def test_what_takes_a_kernel_of_its_own_has_a_range_of_its_own(before, behind):
    expected = ["b"] if before.name == "pool" else ["a", "b"]
    assert outputs(chain(before, behind)) == expected


def test_a_branch_that_leaves_before_the_relu_needs_the_range():
    x = keras.Input((4,))
    h = layers.Dense(3, name="dense")(x)
    model = keras.Model(x, [layers.ReLU(name="relu")(h), layers.Dense(2, name="other")(h)])
    assert outputs(model) == ["dense", "relu", "other"]
    assert outputs(keras.Model(x, [h, layers.ReLU(name="relu")(h)])) == ["dense", "relu"]
    two = [layers.ReLU(name="relu")(h), layers.ReLU(6.0, name="relu6")(h)]
    assert outputs(keras.Model(x, two)) == ["dense", "relu", "relu6"]


def test_what_is_concatenated_is_rounded_once():
    x = keras.Input((4,))
    parts = [layers.Dense(3, name="a")(x), layers.Dense(3, "tanh", name="b")(x)]
    assert outputs(keras.Model(x, layers.Concatenate(name="all")(parts))) == ["b", "all"]


def test_average_pooling_keeps_the_range_of_what_it_averages():
    model = chain(
        layers.Conv2D(4, 3, activation="relu", name="conv"),
        layers.MaxPooling2D(name="max"),
        layers.AveragePooling2D(2, name="average"),
        layers.GlobalAveragePooling2D(name="global"),
    )
    follows = {p.layer.name: p.follows and p.follows.name for p in place(model).placements}
    assert follows == {"conv": None, "max": None, "average": "conv", "global": None}
    first = chain(layers.AveragePooling2D(2))
    assert place(first).placements[0].follows is first


def test_shared_and_nested_layers_are_placed_once_as_objects_of_the_model():
    shared = layers.Dense(4, name="shared")
    inner = keras.Sequential([layers.ReLU(name="relu"), layers.Dense(4, name="inner")])
    x = keras.Input((4,))
    model = keras.Model(x, layers.Add(name="sum")([shared(x), inner(shared(shared(x)))]))
    placements = place(model).placements
    assert [p.layer.name for p in placements] == ["shared", "relu", "inner", "sum"]
    assert placements[0].layer is shared
    assert placements[2].layer is inner.layers[1]
    assert all(p.output for p in placements)


def test_inputs_that_are_names_have_no_range():
    ids, x, image = keras.Input((4,)), keras.Input((4, 8)), keras.Input((2,), dtype="int32")
    embedded = layers.Add()([layers.Embedding(9, 8)(ids), x])
    model = keras.Model([ids, x, image], [embedded, layers.Embedding(3, 2)(image)])
    assert place(model).inputs == (False, True, False)


def test_operations_that_are_no_layers_are_named():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(x) + 1.0)
    assert "is an operation, not a layer" in place(model).skipped["add"]


class Branching(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([layers.Dense(4, name="a"), layers.ReLU(name="b")])
        self.rnn = layers.LSTM(3, name="lstm")

    def call(self, x, training=None):
        if training:
            x = x + 1.0
        return self.rnn(self.inner(x))


def test_a_model_without_a_graph_gets_a_range_behind_every_layer():
    model = Branching()
    model(keras.ops.ones((1, 5, 4)))
    plan = place(model, keras.Input((5, 4)))
    assert [(p.layer.name, p.output) for p in plan.placements] == [
        ("a", True),
        ("b", True),
        ("lstm", True),
    ]
    assert "its graph cannot be read" in plan.skipped[model.name]
    assert plan.inputs == (True,)


def test_layers_that_move_values():
    assert moves_only(layers.UpSampling2D())
    assert not moves_only(layers.UpSampling2D(interpolation="bilinear"))
    assert moves_only(layers.Activation("linear"))
    assert not moves_only(layers.Activation("relu"))


class HandWritten(keras.Model):
    def __init__(self, mixes):
        super().__init__()
        self.mixes, self.head = mixes, layers.Dense(4)

    def call(self, x):
        scores = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))) / 2.0 + 1.0
        weights = keras.ops.softmax(scores if self.mixes else x)
        return self.head(keras.ops.matmul(weights, x) if self.mixes else weights)


@pytest.mark.parametrize("mixes", [True, False])
def test_attention_by_hand_is_found_by_its_operations(mixes):
    model, x = HandWritten(mixes), np.ones((2, 4, 4), "float32")
    model(x)
    assert has_attention(model, x) == mixes
