"""`map_layers` and `consumers` on Functional graphs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfcompress.graph import consumers, expand, map_layers
from tfcompress.graph.rebuild import copied


@pytest.fixture
def residual():
    x = keras.Input((4,), name="x")
    h = layers.Dense(4, activation="relu", name="h")(x)
    y = layers.Add(name="sum")([ops.exp(x), h])
    return keras.Model(x, layers.Dense(2, name="head")(y), name="residual")


def data(shape=(3, 4)):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")


def test_the_identity_keeps_layers_weights_and_outputs(residual):
    rebuilt = map_layers(residual, lambda op: op)
    assert rebuilt is not residual
    assert rebuilt.name == "residual"
    assert all(a is b for a, b in zip(rebuilt.layers[1:], residual.layers[1:], strict=True))
    np.testing.assert_array_equal(rebuilt(data()), residual(data()))


def test_a_replacement_is_built_and_called_in_place_of_the_old_layer(residual):
    wide = layers.Dense(4, use_bias=False, kernel_initializer="ones", name="wide")
    rebuilt = map_layers(residual, lambda op: wide if op.name == "h" else op)
    assert wide.built
    x = data()
    total = np.exp(x) + x.sum(axis=1, keepdims=True)
    expected = residual.get_layer("head")(total.astype("float32"))
    np.testing.assert_allclose(rebuilt(x), expected, rtol=1e-5)


def test_a_replacement_may_change_the_shapes_behind_it():
    x = keras.Input((4,))
    model = keras.Model(x, layers.ReLU()(layers.Dense(8, name="fc")(x)))
    narrow = map_layers(model, lambda op: layers.Dense(3) if op.name == "fc" else op)
    assert narrow(data()).shape == (3, 3)


def test_none_drops_an_operation(residual):
    def without_exp(operation):
        return None if "exp" in operation.name else operation

    rebuilt = map_layers(residual, without_exp)
    x = data()
    expected = residual.get_layer("head")(x + residual.get_layer("h")(x))
    np.testing.assert_allclose(rebuilt(x), expected, rtol=1e-6)


def test_each_operation_is_shown_once_and_inputs_are_not(residual):
    seen = []
    shared, x = layers.Dense(4, name="shared"), keras.Input((4,))
    model = keras.Model(x, shared(shared(x)))
    map_layers(model, lambda op: seen.append(op.name) or op)
    assert seen == ["shared"]


def test_a_shared_layer_stays_shared_when_replaced():
    shared, x = layers.Dense(4, name="shared"), keras.Input((4,))
    model = keras.Model(x, shared(shared(x)))
    rebuilt = map_layers(model, lambda op: layers.Dense(4, name="new"))
    assert len(rebuilt.layers) == 2
    assert len(rebuilt.trainable_variables) == 2


def test_structures_of_inputs_and_outputs_are_kept():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model(
        {"a": a, "b": b}, {"sum": layers.Add()([a, b]), "parts": [layers.ReLU()(a), b]}
    )
    rebuilt = map_layers(model, lambda op: op)
    outputs = rebuilt({"a": data(), "b": data()})
    assert set(outputs) == {"sum", "parts"}
    np.testing.assert_array_equal(outputs["sum"], 2 * data())
    np.testing.assert_array_equal(outputs["parts"][1], data())


def test_a_frozen_layer_is_not_thawed(residual):
    residual.get_layer("h").trainable = False
    rebuilt = map_layers(residual, lambda op: op)
    assert not rebuilt.get_layer("h").trainable
    assert len(rebuilt.trainable_variables) == 2


def test_the_result_saves_and_loads(residual, tmp_path):
    map_layers(residual, lambda op: op).save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(data()), residual(data()))


@pytest.fixture
def attention():
    """The length of what an attention returns is known by its input alone."""
    x = keras.Input((6, 8))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    h = layers.BatchNormalization()(layers.Flatten()(attended))
    return expand(keras.Model(x, layers.Dense(3)(h)))


def test_a_length_that_keras_forgets_is_known_in_what_is_rebuilt(attention):
    x = data((3, 6, 8))
    for rebuilt in (attention, copied(attention), map_layers(attention, lambda op: op)):
        assert rebuilt.get_layer("flatten").output.shape == (None, 48)
        np.testing.assert_array_equal(rebuilt(x), attention(x))

    wide = layers.Dense(5, name="wide")
    rebuilt = map_layers(attention, lambda op: wide if isinstance(op, layers.Dense) else op)
    assert wide.kernel.shape == (48, 5)
    assert rebuilt(x).shape == (3, 5)


def test_a_copy_has_weights_of_its_own_and_shares_layers_as_the_model_does(residual):
    shared, x = layers.Dense(4, name="shared"), keras.Input((4,))
    frozen = layers.Dense(2, name="frozen", trainable=False)
    model = keras.Model(x, frozen(shared(shared(x))), trainable=True)
    copy = copied(model)
    assert len(copy.weights) == len(model.weights) == 4
    assert not copy.get_layer("frozen").trainable
    np.testing.assert_array_equal(copy(data()), model(data()))
    copy.get_layer("shared").kernel.assign(np.zeros((4, 4)))
    assert np.abs(model.get_layer("shared").kernel).max() > 0


def test_a_sequential_model_is_not_copied():
    with pytest.raises(ValueError, match=r"copied reads the graph of a Functional model"):
        copied(ResidualLike())


class ResidualLike(keras.Model):
    def call(self, x):
        return x


def test_consumers_lists_readers_in_graph_order(residual):
    readers = {name: [op.name for op in ops] for name, ops in consumers(residual).items()}
    exp = next(name for name in readers if "exp" in name)
    assert readers == {"x": [exp, "h"], exp: ["sum"], "h": ["sum"], "sum": ["head"], "head": []}


def test_a_reader_of_two_outputs_is_listed_once():
    x = keras.Input((4,), name="x")
    model = keras.Model(x, layers.Add(name="twice")([x, x]))
    assert [op.name for op in consumers(model)["x"]] == ["twice"]


def test_a_sequential_model_is_refused_with_the_remedy():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"tfcompress\.expand\(model\) first"):
        map_layers(model, lambda op: op)
    with pytest.raises(ValueError, match="consumers reads the graph of a Functional model"):
        consumers(model)
