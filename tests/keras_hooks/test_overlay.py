"""The call overlay, and the private Keras API it relies on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.backend.common import global_state

from tests.models import LAYER_KINDS
from tfcompress.keras_hooks import overlay as overlays
from tfcompress.keras_hooks.overlay import Overlay, attach


def triple(w):
    return 3.0 * w


def built(kind):
    make, shape = LAYER_KINDS[kind]
    layer = make()
    layer.build(shape)
    x = np.random.default_rng(0).integers(0, 5, shape).astype("float32") / 4
    return layer, tf.constant(x * 4 if kind == "Embedding" else x)


def run(layer, x, jit=False):
    @tf.function(jit_compile=jit)
    def step():
        with tf.GradientTape() as tape:
            y = layer(x, training=True) if layer._call_has_training_arg else layer(x)
            loss = tf.reduce_sum(tf.square(y))
        return y, tape.gradient(loss, [v.value for v in layer.trainable_variables])

    return step()


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_outputs_and_gradients_equal_those_of_a_layer_with_the_replaced_weights(kind):
    layer, x = built(kind)
    by_hand, _ = built(kind)
    kernels = [i for i, v in enumerate(layer.trainable_variables) if len(v.shape) > 1]
    by_hand.set_weights(layer.get_weights())
    for index in kernels:
        variable = by_hand.trainable_variables[index]
        variable.assign(3.0 * variable)
    weights = [(layer.trainable_variables[index], triple) for index in kernels]
    remove = attach(layer, Overlay(weights=weights))
    y, gradients = run(layer, x)
    expected, by_hand_gradients = run(by_hand, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for index, (ours, theirs) in enumerate(zip(gradients, by_hand_gradients, strict=True)):
        factor = 3.0 if index in kernels else 1.0
        np.testing.assert_allclose(
            tf.convert_to_tensor(ours), factor * tf.convert_to_tensor(theirs), rtol=1e-3, atol=1e-4
        )
    for ours, theirs in zip(
        layer.non_trainable_variables, by_hand.non_trainable_variables, strict=True
    ):
        if "float" in ours.dtype:  # BatchNormalization's statistics were updated through it.
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    remove()
    assert "call" not in layer.__dict__


@pytest.mark.parametrize("kind", ["Conv2D", "GRU", "BatchNormalization"])
def test_xla_equals_graph(kind):
    layer, x = built(kind)
    start = layer.get_weights()
    attach(layer, Overlay(weights=[(layer.trainable_variables[0], triple)], output=triple))
    y, gradients = run(layer, x)
    after = layer.get_weights()
    layer.set_weights(start)
    y_xla, gradients_xla = run(layer, x, jit=True)
    for a, b in zip(
        [y, *gradients, *after], [y_xla, *gradients_xla, *layer.get_weights()], strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_detached_layer_is_as_before():
    layer, x = built("Dense")
    before = layer(x).numpy()
    attributes = set(vars(layer))
    removes = [attach(layer, Overlay(output=triple)), attach(layer, Overlay(inputs=[triple]))]
    assert not np.allclose(layer(x), before)
    for remove in removes:  # Not in the order of a stack.
        remove()
    np.testing.assert_array_equal(layer(x), before)
    assert set(vars(layer)) == attributes


def test_several_overlays_compose():
    layer = layers.Dense(1, use_bias=False, kernel_initializer="ones")
    layer.build((None, 1))
    attach(layer, Overlay(weights=[(layer.kernel, lambda w: w + 1.0)], output=lambda y: y + 1.0))
    attach(layer, Overlay(weights=[(layer.kernel, lambda w: w * 10.0)], output=lambda y: y * 10.0))
    # Weights: the last attached first. Outputs: the last attached last.
    assert float(layer(tf.ones((1, 1)))[0, 0]) == ((1 * 10 + 1) + 1) * 10


def test_the_function_of_a_layer_gets_rounded_input():
    layer = layers.Dense(1, use_bias=False, kernel_initializer="ones", activation="relu")
    layer.build((None, 1))
    activation = layer.activation
    attach(layer, Overlay(preactivation=tf.round))
    assert float(layer(tf.constant([[1.4]]))[0, 0]) == 1.0
    assert layer.activation is activation


def test_only_floats_are_mapped_and_inputs_one_by_one():
    class Pick(layers.Layer):
        def call(self, inputs):
            return inputs["a"], inputs["b"]

    layer = Pick()
    attach(layer, Overlay(inputs=[triple, None], output=lambda y: y + 1.0))
    a, b = layer({"a": tf.constant([1.0]), "b": tf.constant([1])})
    assert (float(a[0]), int(b[0])) == (4.0, 1)


def test_inputs_beyond_the_functions_are_left_as_they_are():
    class Sum(layers.Layer):
        def call(self, inputs):
            return inputs[0] + tf.cast(inputs[1], "float32")

    layer = Sum()
    attach(layer, Overlay(inputs=[triple]))
    assert float(layer([tf.constant(1.0), tf.constant(2)])) == 5.0


def two_inputs():
    b, a = keras.Input((1,), name="b"), keras.Input((1,), name="a")
    return keras.Model([b, a], layers.Subtract()([b, a]))


@pytest.mark.parametrize(
    "passed",
    [
        [np.array([[2.0]]), np.array([[1.0]])],
        [np.array([[2]], "uint8"), np.array([[1]], "uint8")],
        [tf.constant([2]), tf.constant([1])],
        {"a": np.array([[1.0]]), "b": np.array([[2.0]])},
        {"a": np.array([[1.0]]), "b": np.array([[2.0]]), "c": np.array([[9.0]])},
    ],
)
def test_inputs_of_a_graph_are_mapped_as_standardize_inputs_gives_them(passed):
    model = two_inputs()
    attach(model, Overlay(inputs=[triple, None]))
    assert float(model(passed)[0, 0]) == 5.0


@pytest.mark.parametrize("x", [np.array([[2]], "uint8"), np.array([[2.0]]), tf.constant([[2]])])
def test_the_input_of_a_sequential_is_mapped_by_its_functional(x):
    model = keras.Sequential([keras.Input((1,)), layers.Identity()])
    attach(model, Overlay(inputs=[triple]))
    assert float(model(x)[0, 0]) == 6.0


def test_a_sequential_of_structures_has_no_functional():
    model = keras.Sequential([layers.Add()])
    attach(model, Overlay(inputs=[triple]))
    assert float(model([tf.constant([[1.0]]), tf.constant([[2.0]])])[0, 0]) == 5.0


def test_losses_added_in_the_call_are_kept():
    class Adds(layers.Dense):
        def call(self, x):
            self.add_loss(tf.reduce_sum(self.kernel))
            return super().call(x)

    layer = Adds(1, use_bias=False, kernel_initializer="ones")
    layer.build((None, 2))
    attach(layer, Overlay(weights=[(layer.kernel, triple)]))
    layer(tf.ones((1, 2)))
    np.testing.assert_allclose(layer.losses, [6.0])


def test_mixed_precision_replaces_before_it_casts():
    layer = layers.Dense(1, dtype="mixed_float16")
    layer.build((None, 2))
    seen = []
    attach(layer, Overlay(weights=[(layer.kernel, lambda w: seen.append(w.dtype) or w)]))
    assert layer(tf.ones((1, 2))).dtype == tf.float16
    assert seen == [tf.float32]


def test_keras_stateless_calls_see_through_it():
    layer = layers.BatchNormalization()
    layer.build((None, 2))
    attach(layer, Overlay(weights=[(layer.gamma, triple)]))
    x = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    y, updated = layer.stateless_call(
        [v.value + 1.0 for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
        x,
        training=True,
    )
    np.testing.assert_allclose(y, [[-5, -5], [7, 7]], rtol=2e-3)  # gamma 3 * (1 + 1), beta 1
    np.testing.assert_allclose(updated[0], [0.02, 0.04], rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, [0, 0])


def test_training_is_known_inside_calls():
    seen = []
    inner = layers.Dense(1)
    model = keras.Sequential([keras.Input((2,)), inner])
    attach(inner, Overlay(output=lambda y: seen.append(overlays.in_training()) or y))
    x = tf.ones((1, 2))
    model(x, training=True), model(x, training=False), model(x)
    with overlays.training_step():
        model(x)
    assert seen == [True, False, False, True]
    assert not overlays.in_training()


def test_outside_of_calls_hides_the_running_call():
    class Inside(layers.Layer):
        def call(self, x):
            running = global_state.get_global_attribute("current_call_ctx")
            with overlays.outside_of_calls():
                assert tf.executing_eagerly()
                assert global_state.get_global_attribute("current_call_ctx") is None
                self.value = keras.ops.convert_to_numpy(keras.ops.ones(()) + 1)
            assert global_state.get_global_attribute("current_call_ctx") is running is not None
            return x

    layer = Inside()
    tf.function(lambda x: layer(x, training=True), autograph=False)(tf.ones((1, 1)))
    assert layer.value == 2


def test_an_operation_of_an_expanded_graph_leads_to_its_layer():
    from tfcompress.graph import expand

    inner = keras.Sequential([layers.ReLU(), layers.Dense(2)])
    model = keras.Sequential([keras.Input((3,)), inner, layers.ReLU()])
    original = overlays.original_layers(model)
    found = [original(layer) for layer in expand(model).layers[1:]]
    expected = [*inner.layers, model.layers[-1]]
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert original(keras.Operation()) is None


SEPARABLE = {
    "2D": (lambda: layers.SeparableConv2D(3, 2, activation="relu"), (2, 5, 5, 4)),
    "2D, strides": (
        lambda: layers.SeparableConv2D(3, 3, 2, "same", depth_multiplier=2, use_bias=False),
        (2, 6, 6, 4),
    ),
    "2D, dilated": (lambda: layers.SeparableConv2D(3, 2, dilation_rate=2), (2, 6, 6, 4)),
    "1D": (lambda: layers.SeparableConv1D(3, 2, activation="tanh"), (2, 5, 4)),
    "1D, strides": (lambda: layers.SeparableConv1D(3, 3, 2, "same"), (2, 6, 4)),
}


@pytest.mark.parametrize("kind", SEPARABLE)
def test_a_separable_convolution_in_halves_is_what_keras_computes_at_once(kind):
    """Relied on: `SeparableConv.call` is depthwise, pointwise, bias, activation."""
    make, shape = SEPARABLE[kind]
    layer = make()
    layer.build(shape)
    for variable in layer.trainable_variables:  # The bias is zeros at first.
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    x = tf.constant(np.random.default_rng(0).normal(size=shape).astype("float32"))
    seen = []
    expected, expected_gradients = run(layer, x)
    remove = attach(layer, Overlay(middle=lambda h: seen.append(h.shape) or h))
    y, gradients = run(layer, x)
    assert seen and seen[0][-1] == layer.pointwise_kernel.shape[-2]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    remove()
    assert "call" not in vars(layer)


def test_the_middle_lies_inside_of_everything_else():
    layer = layers.SeparableConv1D(1, 1, activation="relu", name="separable")
    layer.build((None, 1, 1))
    layer.set_weights([np.full((1, 1, 1), 2.0), np.full((1, 1, 1), 3.0), np.full(1, 5.0)])
    x = tf.ones((1, 1, 1))
    attach(layer, Overlay(output=lambda y: y + 100.0))
    middle = Overlay(
        weights=[(layer.depthwise_kernel, triple)],
        middle=lambda h: h + 1.0,
        preactivation=tf.negative,
    )
    remove = attach(layer, middle)
    assert float(layer(x)[0, 0, 0]) == max(-((6.0 + 1.0) * 3.0 + 5.0), 0.0) + 100.0
    remove()
    assert float(layer(x)[0, 0, 0]) == 11.0 + 100.0
    called = overlays.call_through(layer, Overlay(middle=lambda h: h + 1.0), layer, x)
    assert float(called[0, 0, 0]) == (2.0 + 1.0) * 3.0 + 5.0 + 100.0
    assert float(layer(x)[0, 0, 0]) == 11.0 + 100.0


def test_a_subclass_with_a_call_of_its_own_has_no_middle():
    class Mine(layers.SeparableConv2D):
        def call(self, inputs):
            return super().call(inputs) + 1.0

    class Renamed(layers.SeparableConv2D):
        pass

    assert not overlays.has_middle(Mine(3, 2))
    assert overlays.has_middle(Renamed(3, 2))


def test_every_overlay_starts_from_the_source_of_a_weight():
    layer, x = layers.Dense(1, use_bias=False), tf.ones((1, 2))
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [2.0]])
    overlays.set_source(layer.kernel, lambda value: 10.0 * value)
    assert float(layer(x)[0, 0]) == 3.0  # Without an overlay, it reads its own weight.
    remove = attach(layer, Overlay(weights=[(layer.kernel, tf.identity)]))
    assert float(layer(x)[0, 0]) == 30.0
    for _ in range(2):  # The source is applied once, whatever the overlays around it.
        attach(layer, Overlay(weights=[(layer.kernel, triple)]))
    assert float(layer(x)[0, 0]) == 270.0
    remove()
    assert float(layer(x)[0, 0]) == 270.0


def test_a_source_is_applied_to_the_value_of_a_stateless_scope():
    variable = keras.Variable([1.0])
    overlays.set_source(variable, lambda value: 10.0 * value)
    with keras.StatelessScope(state_mapping=[(variable, tf.constant([7.0]))]):
        assert overlays.raw_value(variable).numpy().tolist() == [70.0]


def test_settled_weights_hold_what_is_computed_for_them_and_get_their_own_back():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    kernel = model.layers[0].kernel
    kernel.assign([[1.0], [2.0]])
    overlays.set_source(kernel, lambda value: tf.minimum(value, 1.5))
    with pytest.raises(InterruptedError), overlays.settled(model):
        assert kernel.numpy().tolist() == [[1.0], [1.5]]
        raise InterruptedError
    assert kernel.numpy().tolist() == [[1.0], [2.0]]
