"""The bridge next to TFMOT on Keras 2: same weights, data and order; and models that come over."""

import keras
import numpy as np
import pytest

import tfcompress as tfc
import tfcompress.tfmot as tfmot
from tests.tfmot import old as other
from tfcompress.artefact import LiteRTRunner
from tfcompress.layers import Prune


@pytest.mark.parametrize("name", other.SCHEDULES)
def test_pruned_weights_and_losses_over_200_steps(old, name):
    directory, told = old
    kind, arguments = other.SCHEDULES[name]
    schedule = getattr(tfmot.sparsity.keras, kind)(**arguments)
    model = tfmot.sparsity.keras.prune_low_magnitude(other.mlp(keras), schedule)
    losses = other.train(keras, model, [tfmot.sparsity.keras.UpdatePruningStep()])
    assert len(losses) == 200
    np.testing.assert_allclose(losses, told["losses"][name], atol=1e-5)
    with np.load(directory / f"{name}.npz") as arrays:
        expected = [arrays[key] for key in arrays]
    ours = tfmot.sparsity.keras.strip_pruning(model).get_weights()
    assert (expected[0] == 0).mean() >= 0.5
    for weight, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(weight == 0, theirs == 0)
        np.testing.assert_allclose(weight, theirs, atol=1e-5)


def test_linear_centroids_are_those_of_tfmot(old):
    directory, _ = old
    linear = tfmot.clustering.keras.CentroidInitialization.LINEAR
    model = tfmot.clustering.keras.cluster_weights(other.mlp(keras), 5, linear)
    with np.load(directory / "linear.npz") as arrays:
        for layer, key in zip(model.layers, arrays, strict=True):
            (centroids,) = layer.centroids.values()
            np.testing.assert_allclose(np.asarray(centroids.value), arrays[key], atol=1e-6)


def test_models_in_memory_come_over_with_equal_outputs(old):
    _, told = old
    for kind, found in told["converted"].items():
        assert found["difference"] < 2e-6, (kind, found)
    wrappers = {"prune": "Prune", "cluster": "Cluster", "zeros": "Cluster"}
    for kind, name in wrappers.items():
        assert told["converted"][kind]["layers"].count(name) == 3
    assert "QuantizeAnnotate" in told["converted"]["annotate"]["layers"]


def test_what_is_of_keras_2_is_told_so(old):
    _, told = old
    assert any("import tfcompress.tfmot as tfmot" in text for text in told["warnings"])
    refused = told["refused"]
    assert "TFOpLambda has no twin in Keras 3: an operator such as x + y" in refused["operator"]
    assert "'attention' of type MultiHeadAttention is called on several" in refused["several"]
    assert "Build its class on Keras 3" in refused["subclassed"]
    for function in ("prune", "quantize", "cluster"):
        assert "Pass a model through tfcompress.tfmot.convert first" in refused[function]


def test_a_pruned_file_comes_over_in_mid_training(old):
    directory, _ = old
    model = tfmot.convert(directory / "prune.h5")
    with np.load(directory / "decay.npz") as arrays:
        expected = [arrays[key] for key in arrays]
    for layer, kernel, bias in zip(model.layers, expected[::2], expected[1::2], strict=True):
        assert isinstance(layer, Prune)
        np.testing.assert_array_equal(np.asarray(layer.layer.kernel.value), kernel)
        np.testing.assert_array_equal(np.asarray(layer.layer.bias.value), bias)
        held = layer.layer.kernel.constraint
        np.testing.assert_array_equal(np.asarray(held.mask.value), kernel != 0)
        assert int(held.step.value) == 200
        assert int(held.updated_at.value) == 200
        assert (held.schedule(104), held.schedule.end_step) == (0.75, 104)
    model.compile("adam", "mse")
    model.fit(other.X, other.Y, verbose=0)
    ours = tfmot.sparsity.keras.strip_pruning(model).get_weights()
    for weight, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(weight == 0, theirs == 0)
        assert (weight != theirs).any()


def test_a_quantized_file_comes_over_with_its_ranges_and_exports_the_same_integers(old, tmp_path):
    directory, _ = old
    model = tfmot.convert(directory / "quantize.h5")
    assert len(model.get_layer("quant_depthwise").quantizer.weights) == 1
    outputs = model.predict(other.IMAGES, verbose=0)
    np.testing.assert_allclose(outputs, np.load(directory / "quantize.npy"), atol=1e-5)
    artefact = tfc.export(model, tmp_path / "m.tflite", precision="int8", verify_on=other.IMAGES)
    pairs = LiteRTRunner(artefact.path)(other.IMAGES), np.load(directory / "litert.npy")
    # The steps are those of the logits, which the softmax reads; its own are 1 / 256.
    ours, theirs = (np.log(p) - np.log(p).mean(1, keepdims=True) for p in pairs)
    low, high = model.get_layer("quant_head").ranges["preactivation"]
    assert np.abs(ours - theirs).max() <= 1.25 * (high - low) / 255
    assert artefact.float_operators == ()
    model.compile("adam", "sparse_categorical_crossentropy")
    before = model.get_layer("quantize_layer").ranges
    model.fit(other.IMAGES * 2, other.LABELS, verbose=0)
    assert model.get_layer("quantize_layer").ranges != before


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ValueError, match="There is no model at"):
        tfmot.convert(tmp_path / "missing.h5")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.save(tmp_path / "new.keras")
    with pytest.raises(ValueError, match=r"was saved by Keras 3.*keras.models.load_model"):
        tfmot.convert(tmp_path / "new.keras")
    with pytest.raises(ValueError, match="Models of Keras 3 need no conversion"):
        tfmot.convert(model)
