"""The private Keras API that `tfcompress.keras_hooks.tracing` relies on, and what it restores."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.src.layers import layer as layer_module

from tfcompress.keras_hooks import nodes, tracing


def is_leaf(layer):
    return not tracing.sublayers(layer)


class Twice(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, name="dense")
        self.scales = [self.add_weight(shape=(3,), name="a"), self.add_weight(shape=(3,), name="b")]

    def call(self, x):
        return ops.exp(self.dense(self.dense(x))) * self.scales[0] + self.scales[1]


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((3,)), Twice(name="twice"), layers.Dropout(0.5)])


def traced(model, **kwargs):
    x = keras.Input(model.input_shape[1:])
    return tracing.trace(model, (x,), {}, kwargs.pop("is_primitive", is_leaf))


def test_symbolic_call_of_the_instance_is_what_a_layer_call_runs():
    layer, x = layers.Dense(2), keras.Input((3,))
    layer(x)
    vars(layer)["symbolic_call"] = lambda *args, **kwargs: keras.KerasTensor((7,))
    assert layer(x).shape == (7,)


def test_any_symbolic_tensors_decides_whether_a_layer_call_becomes_a_node(monkeypatch):
    layer, x = layers.Dense(2), keras.Input((3,))
    monkeypatch.setattr(layer_module, "any_symbolic_tensors", lambda args, kwargs: False)
    assert not hasattr(layer(x), "_keras_history")
    assert layer._inbound_nodes == []


def test_layers_are_one_level_and_sublayers_are_all(model):
    assert [type(x).__name__ for x in model._layers] == ["InputLayer", "Twice", "Dropout"]
    assert "dense" in [x.name for x in tracing.sublayers(model)]


def test_the_call_arguments_are_those_of_call():
    assert tracing.call_arguments(layers.LSTM(2))[:2] == ["sequences", "initial_state"]


def test_a_sequential_model_runs_its_functional_which_converts_its_inputs(model):
    assert hasattr(model._functional, "_convert_inputs_to_tensors")
    assert "training" not in vars(model._get_call_context())
    model._maybe_reset_call_context()


def test_composites_leave_no_call_and_primitives_one_for_each(model):
    kinds = [type(call.operation).__name__ for call in traced(model).calls]
    assert kinds == ["Dense", "Dense", "Exp", "Multiply", "Add", "Dropout"]


def test_variables_that_a_call_reads_are_sources_also_in_lists(model):
    sources = traced(model).sources
    twice = model.layers[0]
    assert [source.value for source in sources] == twice.scales
    assert all(source.owner is twice for source in sources)


def test_paths_name_the_layers_around_an_operation(model):
    trace = traced(model)
    paths = [trace.paths[id(call.operation)] for call in trace.calls]
    expected = [("twice", name) for name in ("dense", "dense", "exp", "multiply", "add")]
    assert paths == [*expected, (model.layers[1].name,)]


def test_what_stays_whole_is_one_call(model):
    whole = traced(model, is_primitive=lambda layer: True)
    assert [type(call.operation).__name__ for call in whole.calls] == ["Twice", "Dropout"]


def test_training_that_is_passed_on_is_no_argument_of_a_call(model):
    assert all("training" not in call.kwargs for call in traced(model).calls)


def test_constants_that_only_a_layer_reads_are_sources():
    class Positions(layers.Layer):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(3, 3)

        def call(self, x):
            return x + self.table(np.arange(3))

    (source,) = traced(keras.Sequential([keras.Input((3,)), Positions()])).sources
    np.testing.assert_array_equal(source.value, [0, 1, 2])
    assert source.owner is None


def test_masks_become_arguments():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Embedding(5, 2, mask_zero=True), layers.LSTM(2)]
    )
    trace = traced(model, is_primitive=lambda x: isinstance(x, layers.RNN) or is_leaf(x))
    (call,) = [c for c in trace.calls if isinstance(c.operation, layers.LSTM)]
    assert nodes.producer(call.kwargs["mask"]).operation.name.startswith("not_equal")


def test_everything_is_as_before_afterwards(model):
    everything = [model, *tracing.sublayers(model), model._functional]
    before = [{k: id(v) for k, v in vars(layer).items()} for layer in everything]
    rule = layer_module.any_symbolic_tensors
    lengths = [len(layer._inbound_nodes) for layer in everything]
    traced(model)
    after = [{k: id(v) for k, v in vars(layer).items()} for layer in everything]
    changed = {k for a, b in zip(after, before, strict=True) for k in a if a[k] != b.get(k)}
    assert changed <= {"_called"}
    assert layer_module.any_symbolic_tensors is rule
    assert [len(layer._inbound_nodes) for layer in everything] == lengths


def test_plain_names_lose_the_counter_of_generated_names_only():
    x = keras.Input((3,))
    layers_and_names = [
        (nodes.producer(ops.exp(ops.exp(x))).operation, "exp"),
        (layers.Dense(2, name="block_2"), "block_2"),
        (layers.Dense(2), "dense"),
    ]
    for operation, name in layers_and_names:
        assert tracing.plain_name(operation) == name


def test_the_error_names_the_innermost_layer_and_its_line():
    class Inner(layers.Layer):
        def __init__(self):
            super().__init__(name="inner")
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x) if x[0, 0] > 0 else x  # the line

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    model = Outer()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(tracing.TraceError, match=r"'inner'.*test_tracing\.py:\d+.*# the line") as e:
        tracing.trace(model, (keras.Input((3,)),), {}, is_leaf)
    assert e.value.layer is model.inner


def test_tf_gather_along_the_last_axis_is_an_op_while_tracing():
    class Gathering(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x):
            order = ops.cast(ops.relu(x[:, :2]), "int32")
            picked = tf.gather(self.dense(x), order, batch_dims=1)
            return tf.gather(picked, tf.gather([1, 0, 1], [2, 1]), axis=1)

    plain = tf.gather
    model = keras.Sequential([keras.Input((3,)), Gathering()])
    trace = traced(model)
    kinds = [type(call.operation).__name__ for call in trace.calls]
    assert kinds[-2:] == ["TakeAlongAxis", "Take"]
    assert tf.gather is plain


def test_tf_gather_that_is_no_op_is_refused():
    class Gathering(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x):
            return tf.gather(self.dense(x), ops.cast(x[:, :, 0], "int32"), batch_dims=1)

    model = keras.Sequential([keras.Input((3, 3)), Gathering()])
    with pytest.raises(tracing.TraceError, match="batch_dims=1 has no op"):
        traced(model)
