import keras
import numpy as np
import pytest

from tests.models import nested, subclassed
from tfcompress.graph.roles import (
    batch_norm_scales,
    leave_output_layer,
    output_kernels,
    prunable,
)
from tfcompress.keras_hooks.walk import select_kernels
from tfcompress.ops import criteria, structures


def two_heads():
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="stem")(x)
    x = keras.layers.BatchNormalization()(x)
    side = keras.layers.Conv2D(4, 3, padding="same", name="side")(keras.layers.ReLU()(x))
    x = keras.layers.Flatten()(keras.layers.Add()([x, side]))
    left = keras.layers.Softmax()(keras.layers.Dense(2, name="left")(x))
    right = keras.layers.Dense(3, name="right")(keras.layers.Dense(5, name="mid")(x))
    return keras.Model(inputs, [left, right])


@pytest.mark.parametrize(
    ("make", "expected"),
    [(two_heads, {"left", "right"}), (nested, {"head"}), (subclassed, {"head"})],
)
def test_the_output_layers(make, expected):
    kernels = output_kernels(make())
    assert {kernel.path.split("/")[-2] for kernel in kernels} == expected


def test_an_output_that_is_also_read_inside():
    x = inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4, name="hidden")(x)
    model = keras.Model(inputs, [hidden, keras.layers.Dense(2, name="head")(hidden)])
    assert {kernel.path for kernel in output_kernels(model)} == {"hidden/kernel", "head/kernel"}


def test_the_scale_is_that_of_the_only_reader():
    model = two_heads()
    scales = batch_norm_scales(model)
    stem, norm = model.get_layer("stem"), model.layers[2]
    assert set(scales) == {id(stem.kernel)} and scales[id(stem.kernel)] is norm.gamma


class Branching(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(2)

    def call(self, inputs):
        x = self.first(inputs)
        return self.second(x) if np.sum(x) > 0 else self.second(-x)


def test_where_the_graph_is_unknown_the_last_weight_is_left():
    model = Branching()
    model(np.ones((1, 3), "float32"))
    weights = select_kernels(model)[0]
    left = leave_output_layer(model, weights)
    assert list(left) == [list(weights)[-1]]
    assert "taken for the model's output layer" in next(iter(left.values()))


def test_nothing_prunable_is_refused_with_the_reasons():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    weights = select_kernels(model)[0]
    with pytest.raises(ValueError, match="fits no weight of the model"):
        prunable(model, weights, structures.Channel(), criteria.magnitude)
    with pytest.raises(ValueError, match="no batch norm reads its output"):
        prunable(model, weights, structures.Unstructured(), criteria.BatchNorm())
