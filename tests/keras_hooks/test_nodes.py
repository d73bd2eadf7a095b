"""The private Keras API that `tfcompress.keras_hooks.nodes` relies on."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tfcompress.keras_hooks import nodes


def test_keras_history_names_the_operation_and_the_index_of_its_node():
    layer, x = layers.Dense(2), keras.Input((3,))
    first, second = layer(x), layer(x)
    operation, index, output = second._keras_history
    assert (operation, index, output) == (layer, 1, 0)
    assert nodes.producer(first) is layer._inbound_nodes[0]


def test_a_node_holds_its_arguments_and_its_readers_are_outbound():
    x = keras.Input((3,))
    y = layers.Dropout(0.5)(x, training=True)
    node = nodes.producer(y)
    assert node.arguments.args == (x,)
    assert node.arguments.kwargs == {"training": True}
    assert node in nodes.producer(x).operation._outbound_nodes


def test_calls_are_in_topological_order_and_stop_at_the_inputs():
    x = keras.Input((3,))
    a = ops.exp(x)
    b = layers.Dense(3, name="b")(a)
    y = ops.add(b, a)
    found = nodes.calls_between(x, y)
    assert [type(call.operation).__name__ for call in found] == ["Exp", "Dense", "Add"]
    assert found[2].inputs == [b, a]
    assert nodes.calls_between([a], y)[0].operation.name == "b"


def test_a_deep_graph_needs_no_deep_stack():
    x = y = keras.Input((3,))
    for _ in range(3000):
        y = ops.negative(y)
    assert len(nodes.calls_between(x, y)) == 3000


def test_a_recorded_call_makes_a_model_without_shape_inference():
    layer, x = layers.Dense(2), keras.Input((3,))
    spec = layer(x)
    (y,) = nodes.record_call(layer, (x,), {}, (spec,))
    data = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(keras.Model(x, y)(data), layer(data))


def test_a_view_shares_variables_but_not_its_name_or_nodes():
    layer = layers.BatchNormalization(name="bn")
    layer(keras.Input((3,)))
    view = nodes.view(layer, "other")
    assert type(view) is layers.BatchNormalization
    assert (view.name, layer.name) == ("other", "bn")
    assert all(a is b for a, b in zip(view.variables, layer.variables, strict=True))
    assert view._inbound_nodes == [] and len(layer._inbound_nodes) == 1


def test_the_methods_that_keras_binds_in_new_are_those_of_the_view():
    layer = layers.Dense(2)
    layer(keras.Input((3,)))
    view = nodes.view(layer, "other")
    view.quantize("int8")
    assert view.quantization_mode == "int8"
    assert layer.quantization_mode is None


def test_a_view_serializes_under_its_name():
    layer = layers.Dense(2, activation="relu", name="fc")
    layer(keras.Input((3,)))
    config = nodes.view(layer, "other").get_config()
    assert (config["name"], config["units"], config["activation"]) == ("other", 2, "relu")


def test_requested_shape_reads_reshape_and_broadcast_to():
    x = keras.Input((2, 3))
    targets = {
        ops.reshape(x, (-1, 6)): (-1, 6),
        ops.broadcast_to(x, (None, 2, 3)): (None, 2, 3),
        ops.exp(x): None,
    }
    for tensor, shape in targets.items():
        assert nodes.requested_shape(nodes.producer(tensor).operation) == shape


def test_a_weight_layer_returns_its_variable_and_holds_nothing_else():
    for shape in [(), (3,), (2, 3), (1, 2, 3)]:
        value = np.random.default_rng(0).normal(size=shape)
        variable = keras.Variable(value, dtype="float32", name="w")
        layer, argument = nodes.weight_layer(variable, "float32")
        sign = 1 if shape else -1
        np.testing.assert_array_equal(
            np.reshape(sign * layer(argument), shape), np.asarray(variable)
        )
        assert [id(v) for v in layer.trainable_variables] == [id(variable)]


def test_parameters_are_what_an_op_was_made_with():
    x = keras.Input((6, 4))
    made = {
        "Split": (keras.ops.split(x, 2, axis=2)[0], {"axis": 2, "indices_or_sections": 2}),
        "Repeat": (keras.ops.repeat(x, 3, axis=1), {"axis": 1, "repeats": 3}),
        "Transpose": (keras.ops.transpose(x, (0, 2, 1)), {"axes": (0, 2, 1)}),
        "Swapaxes": (keras.ops.swapaxes(x, 1, 2), {"axis1": 1, "axis2": 2}),
        "Moveaxis": (keras.ops.moveaxis(x, 1, 2), {"source": 1, "destination": 2}),
        "Squeeze": (keras.ops.squeeze(x[:, :1], 1), {"axis": [1]}),
        "ExpandDims": (keras.ops.expand_dims(x, 1), {"axis": 1}),
        "Einsum": (keras.ops.einsum("abc,abc->ab", x, x), {"subscripts": "abc,abc->ab"}),
        "Sum": (keras.ops.sum(x, axis=1), {"axis": [1]}),
    }
    for kind, (tensor, expected) in made.items():
        operation = nodes.producer(tensor).operation
        assert type(operation).__name__ == kind
        found = nodes.parameters(operation)
        for name, value in expected.items():
            assert np.array_equal(np.atleast_1d(found[name]), np.atleast_1d(value)), (kind, name)


def test_an_einsum_dense_gets_the_sizes_of_its_input_back():
    layer, x = layers.EinsumDense("abc,cde->abde", (None, 2, 4)), keras.Input((6, 8))
    y = layer(x)
    assert y.shape == (None, None, 2, 4)
    nodes.restore_sizes(layer, [x], y)
    assert y.shape == (None, 6, 2, 4)

    deep, x = layers.EinsumDense("...c,cd->...d", (None, 5)), keras.Input((3, 6, 8))
    y = keras.KerasTensor((None, 3, None, 5))
    nodes.restore_sizes(deep, [x], y)
    assert y.shape == (None, 3, 6, 5)

    other = keras.KerasTensor((None, 3))
    nodes.restore_sizes(layers.Dense(3), [x], other)
    assert other.shape == (None, 3)


def test_the_norm_of_t5_has_an_equivalent_in_keras():
    module = pytest.importorskip("keras_hub.src.models.t5.t5_layer_norm")
    norm = module.T5LayerNorm(1e-3, name="norm")
    norm.build((None, 6))
    norm.weight.assign(np.linspace(-1, 2, 6))
    same = nodes.equivalent(norm)
    assert same.scale is norm.weight and same.name == "norm"
    assert [id(x) for x in same.trainable_variables] == [id(norm.weight)]
    x = np.random.default_rng(0).normal(size=(4, 3, 6)).astype("float32")
    np.testing.assert_array_equal(same(x), norm(x))

    half = module.T5LayerNorm(1e-3, dtype="mixed_float16")
    half.build((None, 6))
    assert nodes.equivalent(half) is None  # RMSNormalization would compute in float32.
    assert nodes.equivalent(layers.Dense(2)) is None
