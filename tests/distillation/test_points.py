import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.distillation.networks import Subclassed, attentive, net
from tfcompress.distillation.points import Points, observe, trace_points


def test_points_come_in_order_with_shapes():
    points = trace_points(net(8), np.zeros((2, 6), "float32"))
    assert points.match("*", "x") == ["first", "norm", "relu", "dropout", "second", "head"]
    assert points.shapes["head:input"] == (None, 8)
    assert points.match("head:input", "x") == ["head:input"]
    assert (points.embedding, points.outputs) == ("head:input", ("output:0",))
    assert Points.from_config(points.get_config()) == points


def test_the_classifier_is_found_behind_a_softmax():
    for last in (keras.layers.Softmax(), keras.layers.Activation("softmax")):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(5, name="hidden")(inputs)
        model = keras.Model(inputs, last(keras.layers.Dense(3, name="head")(x)))
        points = trace_points(model, model.input)
        assert (points.embedding, points.activations) == ("head:input", ("softmax",))
    nested = keras.Sequential([keras.Input((6,)), net(8, activation="sigmoid")])
    points = trace_points(nested, nested.inputs[0])
    assert (points.embedding, points.activations) == ("net/head:input", ("sigmoid",))


def test_ops_between_the_layers_of_a_subclassed_model_are_points_once_expanded():
    model = Subclassed(8, 2)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    model(x)
    assert "block_0/multiply" not in trace_points(model, x).shapes
    flat = tfc.expand(model)
    name = next(
        n for n in trace_points(flat, x).shapes if n.startswith("block_0_multiply") and ":" not in n
    )
    _, tensors = observe(flat, x, [name], training=False)
    np.testing.assert_allclose(tensors[name], 2.0 * model.blocks[0].inner(x), rtol=1e-6)


def test_what_loops_compute_is_no_point():
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(keras.layers.LSTM(4)(inputs)))
    assert not any("cell" in name for name in trace_points(model, model.input).shapes)


def test_attention_layers_are_found_by_their_parts():
    model = attentive(layers=2)
    points = trace_points(model, model.input)
    parts = ("query", "key", "value")
    found = points.attention(None, parts, "x")
    assert found == [tuple(f"attention_{i}/{part}" for part in parts) for i in range(2)]
    assert points.attention("attention_1", parts, "x") == found[1:]
    with pytest.raises(ValueError, match="matches no attention layer.*attention_0, attention_1"):
        points.attention("norm*", parts, "x")


def test_tracing_changes_nothing():
    model = net(8, dropout=0.5)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    trace_points(model, model.inputs[0])
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert not any("call" in vars(layer) for layer in model.layers)
