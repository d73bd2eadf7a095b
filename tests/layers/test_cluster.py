"""Shared weights: trained exactly, saved, stripped, and together with the other techniques."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.models import LAYER_KINDS, classification, compile_classifier, mlp, nested, subclassed
from tfcompress.keras_hooks.overlay import raw_value
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers import Cluster, Prune, Quantize, cluster, strip
from tfcompress.ops import fake_quant as fq
from tfcompress.ops.schemes import Scheme

ROOT = pathlib.Path(__file__).parents[2]
X, Y = classification()


def train(model, epochs=3):
    model.fit(X, Y, batch_size=24, epochs=epochs, shuffle=False, verbose=0)
    return model


def wrapped(optimizer="adam", outer=lambda layer: layer, **arguments):
    arguments = {"clusters": 4} | arguments
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
    layers = [outer(Cluster(layer, **arguments)) for layer in layers]
    return compile_classifier(keras.Sequential([keras.Input((12,)), *layers]), optimizer)


def num_values(model):
    return [np.unique(w).size for w in strip(model).weights if len(w.shape) > 1]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_every_kind_of_layer_trains_with_a_few_values(kind, per_channel):
    make, shape = LAYER_KINDS[kind]
    layer = Cluster(make(), clusters=3, initialization="density", per_channel=per_channel)
    if kind == "BatchNormalization":
        with pytest.raises(ValueError, match="of type BatchNormalization has no weight to cluster"):
            layer.build(shape)
        return
    inputs = keras.Input(batch_shape=shape)
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse", jit_compile=kind in ("Dense", "LSTM"))
    before = [variable.numpy() for variable in layer.centroids.values()]
    x = np.random.default_rng(0).integers(0, 5, shape).astype("float32")
    model.fit(x, np.ones(model.output.shape), batch_size=shape[0], verbose=0)
    for old, variable in zip(before, layer.centroids.values(), strict=True):
        assert np.any(old != variable.numpy())
    for variable, axes in weight_axes(layer):
        w = raw_value(variable).numpy()
        parts = [w]
        if per_channel:
            channels = [axis for axis in range(w.ndim) if axis not in axes]
            parts = np.moveaxis(w, channels, range(len(channels)))
            parts = parts.reshape(-1, *parts.shape[len(channels) :])
        assert max(np.unique(part).size for part in parts) <= 3


@pytest.mark.parametrize("kind", ["Dense", "DepthwiseConv2D", "Embedding", "LSTM"])
def test_a_centroid_has_the_gradients_of_its_members_and_the_bias_its_own(kind):
    make, shape = LAYER_KINDS[kind]
    layer = Cluster(make(), clusters=3)
    layer.build(shape)
    plain = make()
    plain.build(shape)
    for ours, theirs in zip(layer.layer.variables, plain.variables, strict=True):
        theirs.assign(raw_value(ours))
    x = tf.constant(np.random.default_rng(0).integers(0, 5, shape).astype("float32"))

    def gradients(layer):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(x)))
        variables = layer.trainable_variables
        found = tape.gradient(loss, [variable.value for variable in variables])
        return dict(zip((v.name for v in variables), map(tf.convert_to_tensor, found), strict=True))

    ours, expected = gradients(layer), gradients(plain)
    for variable in layer.indices.values():
        name = variable.name.removesuffix("_indices")
        members = expected.pop(name).numpy()
        sums = [members[variable.numpy() == k].sum() for k in range(3)]
        np.testing.assert_allclose(ours.pop(f"{name}_centroids"), sums, rtol=1e-4, atol=1e-4)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_the_kernel_is_not_trained_and_stays_out_when_layers_are_set_trainable():
    model = wrapped(keras.optimizers.AdamW(0.1, weight_decay=0.1))

    def trained():
        return sorted(variable.name for variable in model.trainable_variables)

    expected = ["bias", "bias", "kernel_centroids", "kernel_centroids"]
    assert trained() == expected
    model.trainable = False
    assert trained() == []
    model.trainable = True
    assert trained() == expected
    kernel = model.layers[0].layer.kernel.numpy()
    train(model)
    np.testing.assert_array_equal(model.layers[0].layer.kernel, kernel)


def test_a_frozen_layer_is_clustered_and_not_trained(tmp_path):
    layer = keras.layers.Dense(16, trainable=False)
    layer.build((None, 12))
    model = keras.Sequential(
        [keras.Input((12,)), Cluster(layer, clusters=4), keras.layers.Dense(3)]
    )
    compile_classifier(model)
    before = strip(model).layers[0].kernel.numpy()
    train(model).save(tmp_path / "m.keras")
    model = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(strip(model).layers[0].kernel, before)
    assert np.unique(before).size == 4


def test_strip_has_the_shared_values_and_the_wrapped_model_goes_on():
    model = train(wrapped())
    plain = strip(model)
    assert [type(layer) for layer in plain.layers] == [keras.layers.Dense] * 2
    np.testing.assert_array_equal(plain.predict(X, verbose=0), model.predict(X, verbose=0))
    assert num_values(model) == [4, 4]
    before = plain.get_weights()
    train(model)
    for now, then in zip(plain.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_loading_needs_no_kmeans(tmp_path, monkeypatch):
    model = train(wrapped())
    model.save(tmp_path / "m.keras")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model.predict(X, verbose=0), loaded.predict(X, verbose=0))


def test_an_unbuilt_model_is_clustered_by_its_first_batch():
    layers = [
        Cluster(keras.layers.Dense(16), clusters=4),
        Cluster(keras.layers.Dense(3), clusters=4),
    ]
    model = train(compile_classifier(keras.Sequential(layers), "adam"))
    assert num_values(model) == [4, 4]


def test_weights_that_are_loaded_into_the_layer_are_clustered_on_request():
    layer = Cluster(keras.layers.Dense(2), clusters=2)
    layer.build((None, 2))
    layer.layer.set_weights([np.array([[1.0, 1.5], [4.0, 4.5]]), np.zeros(2)])
    layer.find_clusters()
    np.testing.assert_array_equal(layer(np.eye(2)), [[1.25, 1.25], [4.25, 4.25]])


def test_exactly_the_pruned_zeros_stay_zero_in_training():
    model = tfc.prune(mlp(), sparsity=0.7)
    zeros = [w.numpy() == 0.0 for w in (layer.kernel for layer in model.layers)]
    clustered = cluster(model, clusters=4, verbose=0)
    compile_classifier(clustered, keras.optimizers.AdamW(0.05, weight_decay=0.1))
    for now, then in zip(strip(train(clustered)).layers[1:], zeros, strict=True):
        np.testing.assert_array_equal(now.kernel.numpy() == 0.0, then)
    assert num_values(clustered) == [4, 4]


def test_over_a_pruning_wrapper():
    model = keras.Sequential(
        [keras.Input((12,)), Prune(keras.layers.Dense(16), sparsity=0.5), keras.layers.Dense(3)]
    )
    train(compile_classifier(model))
    clustered = train(compile_classifier(cluster(model, clusters=5, verbose=0), "adam"))
    kernel = strip(clustered).layers[1].kernel.numpy()
    assert np.count_nonzero(kernel == 0.0) == 96
    np.testing.assert_array_equal(kernel == 0.0, model.layers[0].layer.kernel.numpy() == 0.0)
    assert np.unique(kernel).size == 5


def test_reassignment_trains_the_weight_straight_through():
    layer = Cluster(keras.layers.Dense(3, use_bias=False), clusters=4, reassign=True)
    layer.build((None, 5))
    kernel = layer.layer.kernel
    (centroids,) = layer.centroids.values()
    x = tf.constant(np.random.default_rng(0).normal(size=(7, 5)).astype("float32"))
    kernel.assign(kernel + 0.5)  # As an update would: elements move to other centroids.
    table = centroids.numpy()
    choice = np.abs(kernel.numpy()[..., None] - table).argmin(-1)
    assert np.any(choice != list(layer.indices.values())[0].numpy())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    of_kernel, of_centroids = tape.gradient(loss, [kernel.value, centroids.value])
    shared = table[choice]
    expected = x.numpy().T @ (2.0 * x.numpy() @ shared)
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-4, atol=1e-4)
    sums = [expected[choice == k].sum() for k in range(4)]
    np.testing.assert_allclose(of_centroids, sums, rtol=1e-4, atol=1e-4)


def test_reassignment_keeps_zeros_and_learns():
    model = tfc.prune(mlp(), sparsity=0.5)
    zeros = model.layers[0].kernel.numpy() == 0.0
    clustered = compile_classifier(cluster(model, clusters=6, reassign=True, verbose=0), "adam")
    losses = clustered.fit(X, Y, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    kernel = strip(clustered).layers[1].kernel.numpy()
    np.testing.assert_array_equal(kernel == 0.0, zeros)
    assert np.unique(kernel).size <= 6


def quantized(w):
    return fq.fake_quant_weights(w, Scheme(), 0).numpy()


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_shared_values_are_quantized_wherever_the_quantizer_stands(order):
    layer = keras.layers.Dense(3, use_bias=False)
    if order == "inside":
        both = Cluster(Quantize(layer, activations=None), clusters=4)
    else:
        both = Quantize(Cluster(layer, clusters=4), activations=None)
    model = keras.Sequential([keras.Input((12,)), both])
    train(compile_classifier(model, "adam"))
    shared = raw_value(layer.kernel).numpy()
    assert np.unique(shared).size == 4
    np.testing.assert_allclose(model(np.eye(12)), quantized(shared), atol=1e-6)
    np.testing.assert_allclose(strip(model).layers[0].kernel, quantized(shared), atol=1e-7)


def test_training_for_quantization_sees_and_moves_the_shared_values():
    model = wrapped()
    kernel = model.layers[0].layer.kernel
    before = raw_value(kernel).numpy()
    qat = tfc.callbacks.QuantizationAwareTraining(activations=None)
    with qat.attached(model):
        model.fit(X, Y, epochs=2, verbose=0)
        hidden = model.layers[0](np.eye(12, dtype="float32"))
        shared = raw_value(kernel).numpy()
        expected = np.maximum(quantized(shared) + model.layers[0].layer.bias.numpy(), 0.0)
        np.testing.assert_allclose(hidden, expected, atol=1e-6)
    assert np.any(shared != before) and np.unique(shared).size == 4
    assert len(qat.applied) == 2


def integers(path):
    """The int8 weights of a LiteRT file, with their scales."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    for detail in interpreter.get_tensor_details():
        if detail["dtype"] == np.int8 and len(detail["shape"]) == 2 and detail["shape"][0] > 1:
            yield interpreter.get_tensor(detail["index"])


@pytest.mark.parametrize("quantize", ["stripped", "wrapped", "QAT", "tfc.quantize"])
def test_an_int8_file_has_a_few_integers_a_channel(quantize, tmp_path):
    model = train(wrapped(clusters=5))
    if quantize == "stripped":
        model = strip(model)
    if quantize == "QAT":
        qat = tfc.callbacks.QuantizationAwareTraining()
        model.fit(X, Y, epochs=1, verbose=0, callbacks=[qat])
    if quantize == "tfc.quantize":
        model = tfc.quantize(model, calibration=X, verbose=0)
    tfc.export(model, tmp_path / "m.tflite", "int8", calibration=X, verify_on=X)
    found = list(integers(tmp_path / "m.tflite"))
    assert sorted(w.shape for w in found) == [(3, 16), (16, 12)]
    for w in found:  # One scale a row.
        assert max(np.unique(row).size for row in w) <= 5


@pytest.mark.parametrize("reassign", [False, True])
def test_a_float_file_of_the_wrapped_model_has_the_trained_values(reassign, tmp_path):
    model = train(wrapped(reassign=reassign), epochs=8)
    latent = model.layers[0].layer.kernel.numpy()
    artefact = tfc.export(model, tmp_path / "m.tflite", "float32", verify_on=X)
    np.testing.assert_allclose(
        artefact.runner()(X), model.predict(X, verbose=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(model.layers[0].layer.kernel, latent)


def test_keras_stateless_calls_read_the_centroids_they_are_given():
    model = wrapped()
    values = [v.value for v in model.trainable_variables]
    doubled = [
        2.0 * value if "centroids" in v.name else value
        for v, value in zip(model.trainable_variables, values, strict=True)
    ]
    rest = [v.value for v in model.non_trainable_variables]
    outputs, _ = model.stateless_call(doubled, rest, X)
    for variable, value in zip(model.trainable_variables, doubled, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(outputs, model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_near_float32(policy):
    trained = []
    for dtype in ("float32", policy):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(16, activation="relu", dtype=dtype), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((12,)), *(Cluster(each) for each in layers)])
        trained.append(train(compile_classifier(model, keras.optimizers.SGD(0.01))))
    assert trained[1].layers[0].compute_dtype == policy.removeprefix("mixed_")
    for one, two in zip(*(model.get_weights() for model in trained), strict=True):
        np.testing.assert_allclose(one, two, atol=0.02)


def test_eager_is_graph_is_xla():
    results = []
    for how in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        keras.utils.set_random_seed(0)
        model = wrapped(keras.optimizers.SGD(0.01), per_channel=True)
        compile_classifier(model, keras.optimizers.SGD(0.01), **how)
        results.append(train(model).get_weights())
    for eager, graph, xla in zip(*results, strict=True):
        np.testing.assert_allclose(eager, graph, atol=1e-5)
        np.testing.assert_allclose(eager, xla, atol=1e-5)


TWO_REPLICAS = """
import keras, numpy as np, tensorflow as tf
from tests.layers.test_cluster import train, wrapped

def trained():
    keras.utils.set_random_seed(0)
    return train(wrapped(keras.optimizers.SGD(0.01), per_channel=True)).get_weights()

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
alone = trained()
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    together = trained()
for one, two in zip(alone, together, strict=True):
    np.testing.assert_allclose(one, two, atol=1e-6)
print("equal")
"""


def test_two_replicas_are_one():
    """In a process of its own: strategies do not share one well."""
    result = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.split()[-1:] == ["equal"], result.stdout + result.stderr


@pytest.mark.parametrize("make", [mlp, nested, subclassed])
def test_cluster_takes_any_model_that_expands_and_leaves_it_alone(make):
    model = make()
    before = model.get_weights()
    clustered = cluster(model, clusters=128, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert all(variable.trainable for variable in model.variables)
    assert num_values(clustered) == [min(w.size, 128) for w in before if w.ndim > 1]
    np.testing.assert_allclose(
        clustered.predict(X, verbose=0), model.predict(X, verbose=0), atol=0.05
    )


def test_globs_choose_single_weights_of_a_layer(tmp_path):
    layers = [keras.Input((6, 4)), keras.layers.LSTM(3, name="lstm")]
    model = keras.Sequential([*layers, keras.layers.Dense(30, name="head")], name="model")
    exclude = ["*recurrent_kernel", "*head/*"]
    clustered = cluster(model, clusters=2, exclude=exclude, verbose=0)
    clustered.save(tmp_path / "m.keras")
    for each in (clustered, keras.models.load_model(tmp_path / "m.keras")):
        wrappers = [layer for layer in each.layers if isinstance(layer, Cluster)]
        assert [layer.name for layer in wrappers] == ["cluster_lstm"]
        assert [path.split("/")[-1] for path in wrappers[0].centroids] == ["kernel"]
    only = cluster(model, clusters=2, include="*head/kernel", verbose=0)
    assert [layer.name for layer in only.layers if isinstance(layer, Cluster)] == ["cluster_head"]


def test_a_shared_layer_is_clustered_once():
    clustered = cluster(nested(), clusters=4, verbose=0)
    assert sum(isinstance(layer, Cluster) for layer in clustered.layers) == 3
    train(compile_classifier(clustered, "adam"))
    assert num_values(clustered) == [4, 4, 4]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cluster(mlp(), clusters=1), "clusters=1 must be a whole number, 2 or more"),
        (lambda: cluster(mlp(), initialization="pca"), "'pca' is not known"),
        (lambda: cluster(mlp(), include="*nothing"), r"'\*nothing' matches no variable"),
        (lambda: cluster(mlp(), exclude="*"), "No weight of 'mlp' is left to cluster"),
        (lambda: cluster(cluster(mlp(), verbose=0), verbose=0), "is clustered already"),
        (lambda: Cluster(keras.layers.Dense(3), clusters=0), "clusters=0 must be"),
        (lambda: Cluster("dense"), "wraps a Keras layer, got 'dense'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_pruning_callback_leaves_centroids_alone():
    model = wrapped(per_channel=True)
    with pytest.raises(ValueError, match="kernel_centroids"):
        model.fit(X, Y, verbose=0, callbacks=[tfc.callbacks.Pruning(0.5)])


def test_the_zipped_file_is_small(tmp_path):
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(300, name="wide")])
    before = tfc.measure.size(model)
    plain = strip(cluster(model, clusters=16, verbose=0))
    after = tfc.measure.size(plain)
    assert after.bytes == pytest.approx(before.bytes, rel=0.01)
    # 4 bits of 32, and what deflate loses to a perfect code.
    assert after.zipped_bytes < 0.22 * before.zipped_bytes
    artefact = tfc.export(plain, tmp_path / "m.tflite", "float32", verify_on=np.eye(200))
    assert artefact.zipped_bytes < 0.25 * artefact.bytes


def digits(network):
    (x, y), (x_test, y_test) = tfc.zoo.mnist5k()
    model = compile_classifier(network, keras.optimizers.Adam(2e-3), metrics=["accuracy"])
    return model, (x[..., None], y), (x_test[..., None], y_test)


def accuracies(network, epochs, rate=1e-3, clusters=16):
    """Before clustering, after it, and after fine-tuning, in percent."""
    model, (x, y), test = digits(network)
    model.fit(x, y, 64, epochs, verbose=0)
    clustered = cluster(model, clusters=clusters, verbose=0)
    compile_classifier(clustered, keras.optimizers.Adam(rate), metrics=["accuracy"])
    found = [100 * each.evaluate(*test, verbose=0)[1] for each in (model, clustered)]
    clustered.fit(x, y, 64, 2, verbose=0)
    assert all(n <= clusters for n in num_values(clustered))
    return *found, 100 * clustered.evaluate(*test, verbose=0)[1]


def test_sixteen_values_are_enough_for_digits():
    layers = keras.layers
    network = [
        keras.Input((28, 28, 1)),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(10),
    ]
    before, _, tuned = accuracies(keras.Sequential(network), epochs=5)
    assert before > 92.0
    assert tuned > before - 1.0


@pytest.mark.slow
def test_sixteen_values_are_enough_for_a_convolutional_network():
    layers = keras.layers
    network = [
        keras.Input((28, 28, 1)),
        layers.Conv2D(16, 3, strides=2, activation="relu"),
        layers.Conv2D(32, 3, strides=2, activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10),
    ]
    before, _, tuned = accuracies(keras.Sequential(network), epochs=8)
    assert before > 95.0
    assert tuned > before - 1.0
