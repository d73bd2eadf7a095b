import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.models import classification, compile_classifier
from tfcompress.layers import L1, CompressionWrapper, Prune, strip

DECAY = tfc.schedules.PolynomialDecay(0.0, 0.8, begin_step=2, end_step=11)


def wrapped(wrap=lambda layer: Prune(layer, sparsity=0.75), **kwargs):
    hidden = keras.layers.Dense(16, activation="relu", name="hidden")
    layers = [keras.Input((12,)), wrap(hidden), wrap(keras.layers.Dense(3, name="head"))]
    return compile_classifier(keras.Sequential(layers), **kwargs)


def train(model, epochs=4):
    x, y = classification()
    model.fit(x, y, batch_size=24, epochs=epochs, verbose=0, shuffle=False)
    return model


def num_zeros(model):
    return [int((layer.kernel.numpy() == 0).sum()) for layer in strip(model).layers]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_prune_reaches_the_exact_sparsity(optimizer, jit_compile):
    model = wrapped(
        lambda layer: Prune(layer, sparsity=DECAY, frequency=4),
        optimizer=optimizer,
        jit_compile=jit_compile,
    )
    train(model)
    assert num_zeros(model) == [192 - 38, 48 - 10]
    assert [int((layer.layer.kernel.numpy() == 0).sum()) for layer in model.layers] == [154, 38]


def test_it_equals_the_callback():
    ours = wrapped(lambda layer: Prune(layer, sparsity=DECAY, frequency=4))
    plain = compile_classifier(strip(ours))
    train(ours)
    x, y = classification()
    pruning = tfc.callbacks.Pruning(DECAY, frequency=4)
    plain.fit(x, y, batch_size=24, epochs=4, verbose=0, shuffle=False, callbacks=[pruning])
    for ours_now, plain_now in zip(strip(ours).weights, plain.weights, strict=True):
        np.testing.assert_array_equal(ours_now, plain_now)


def test_it_goes_on_from_a_saved_model(tmp_path):
    model = train(wrapped(lambda layer: Prune(layer, sparsity=DECAY, frequency=4)), epochs=2)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    train(model)
    train(loaded)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_pretrained_layer_is_pruned_when_it_is_wrapped():
    layer = keras.layers.Dense(5)
    layer.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), Prune(layer, sparsity=0.5)])
    assert int((layer.kernel.numpy() == 0).sum()) == 10
    assert int((strip(model).layers[0].kernel.numpy() == 0).sum()) == 10


def test_a_threshold():
    layer = keras.layers.Dense(2, kernel_initializer=lambda shape, dtype: [[0.3, -0.1]])
    layer.build((None, 1))
    keras.Sequential([keras.Input((1,)), Prune(layer, threshold=0.2)])
    assert layer.kernel.numpy().tolist() == [[np.float32(0.3), 0.0]]


def test_a_constraint_that_was_there_still_holds():
    layer = keras.layers.Dense(16, kernel_constraint=keras.constraints.NonNeg(), name="hidden")
    model = keras.Sequential(
        [keras.Input((12,)), Prune(layer, sparsity=0.75), keras.layers.Dense(3)]
    )
    train(compile_classifier(model))
    assert (layer.kernel.numpy() >= 0).all()
    assert (layer.kernel.numpy() == 0).sum() >= 144


def test_l1_is_the_penalty_in_the_loss():
    model = wrapped(lambda layer: L1(layer, strength=0.5))
    expected = sum(0.5 * np.abs(layer.layer.kernel.numpy()).sum() for layer in model.layers)
    x, _ = classification()
    model(x)
    assert float(sum(model.losses)) == pytest.approx(float(expected), rel=1e-6)


def test_wrappers_nest_and_strip_takes_all_of_them_off():
    model = train(wrapped(lambda layer: Prune(L1(layer, strength=1e-3), sparsity=0.75)))
    plain = strip(model)
    assert not any(isinstance(layer, CompressionWrapper) for layer in plain.layers)
    assert [layer.name for layer in plain.layers] == ["hidden", "head"]
    x, _ = classification()
    np.testing.assert_array_equal(plain(x), model(x))


def test_strip_leaves_the_wrapped_model_in_training():
    model = train(wrapped())
    plain = strip(model)
    before = [w.numpy() for w in plain.weights]
    train(model)
    for now, then in zip(plain.weights, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_strip_goes_through_nested_and_shared_layers():
    block = keras.Sequential([Prune(keras.layers.Dense(6, name="inner"), sparsity=0.5)], name="b")
    shared = Prune(keras.layers.Dense(6, name="shared"), sparsity=0.5)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, shared(shared(block(inputs))))
    x, y = np.ones((4, 6), "float32"), np.zeros((4, 6), "float32")
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    plain = strip(model)
    np.testing.assert_array_equal(plain(x), model(x))
    assert [int((w.numpy() == 0).sum()) for w in plain.weights if len(w.shape) == 2] == [18, 18]


def test_attention_can_be_wrapped(tmp_path):
    inputs = keras.Input((5, 8))
    outputs = Prune(keras.layers.MultiHeadAttention(2, 4, dropout=0.1), sparsity=0.5)(
        inputs, inputs
    )
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = np.ones((4, 5, 8), "float32")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_array_equal(strip(loaded)(x), model(x))


def test_masks_pass_through():
    embedding = keras.layers.Embedding(5, 4, mask_zero=True)
    inputs = keras.Input((None,), dtype="int32")
    outputs = keras.layers.LSTM(2)(Prune(embedding, sparsity=0.5)(inputs))
    model = keras.Model(inputs, outputs)
    masked, shorter = model(np.array([[1, 2, 0]])), model(np.array([[1, 2]]))
    np.testing.assert_allclose(masked, shorter, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either sparsity or threshold"),
        ({"sparsity": 0.5, "threshold": 0.1}, "Give either sparsity or threshold"),
        ({"sparsity": 1.0}, r"fraction of zeros in \[0, 1\), got 1.0"),
        ({"threshold": 0}, "threshold must be above 0"),
        ({"sparsity": 0.5, "criterion": "magic"}, "Unknown criterion 'magic'"),
        ({"sparsity": 0.5, "frequency": 0}, "whole number of steps, 1 or more: 0"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Prune(keras.layers.Dense(1), **arguments)


def test_what_is_no_layer_is_refused():
    with pytest.raises(ValueError, match="L1 wraps a Keras layer, got 'dense'"):
        L1("dense")


def test_a_layer_without_kernels_is_refused():
    with pytest.raises(ValueError, match="has no weight to compress"):
        keras.Sequential([keras.Input((3,)), Prune(keras.layers.ReLU(), sparsity=0.5)])


def test_strip_says_what_it_needs():
    with pytest.raises(ValueError, match="is not built"):
        strip(keras.Sequential([Prune(keras.layers.Dense(1), sparsity=0.5)]))
