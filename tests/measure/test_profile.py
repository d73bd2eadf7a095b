import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.artefact import Artefact
from tfcompress.measure import Profile, Timing, compare, profile

L = keras.layers
FAST = Timing(batch_sizes=(1, 2), rounds=3, min_ms=0.1)
X = np.random.default_rng(0).random((6, 4), np.float32)


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((4,)), L.Dense(8), L.Dense(3)], name="tiny")
    kernel = np.arange(1.0, 33).reshape(4, 8) / 100
    kernel[:, :2] = 0
    model.layers[0].kernel.assign(kernel)
    model.layers[0].bias.assign(np.ones(8))
    return model


@pytest.fixture
def artefact(model, tmp_path):
    file = tmp_path / "tiny.tflite"
    file.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    return Artefact(file, "litert", max_abs_diff=0.25)


def test_a_keras_model_is_counted_exactly(model):
    labels = np.argmax(model(X), axis=-1)
    found = profile(model, X[:1], (X, labels), timing=FAST)
    assert (found.name, found.tool, found.artefact) == ("tiny/original", "keras", None)
    assert found.accuracy == 1.0
    assert found.params == 32 + 8 + 24 + 3
    assert found.nonzeros == 24 + 8 + 24
    assert found.macs == 32 + 24
    assert found.max_abs_diff is None
    assert list(found.latency_ms) == [1, 2]
    assert all(t.lower_ms <= t.median_ms <= t.upper_ms for t in found.latency.values())
    first = found.layers[0]
    assert (first.shape, first.params, first.nonzeros, first.sparsity) == ((4, 8), 32, 24, 0.25)
    assert sum(first.counts) == 32
    assert max(first.counts) == first.counts[len(first.counts) // 2] == 8
    assert len(first.edges) == len(first.counts) + 1


def test_a_file_is_compared_with_the_model_it_came_from(model, artefact):
    found = profile(artefact, X[:2], reference=model, name="tiny/float32", timing=FAST)
    assert (found.tool, found.artefact, found.macs) == ("litert", "tiny.tflite", None)
    assert found.max_abs_diff < 1e-6
    assert found.bytes == artefact.bytes
    assert found.nonzeros == 24 + 8 + 24  # the zero bias is not in the file
    assert profile(artefact, X, timing=FAST).max_abs_diff == 0.25


def test_a_profile_survives_json(model, artefact):
    for item in (model, artefact):
        found = profile(item, X, timing=FAST)
        assert Profile.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_compare_keeps_order_and_names(model, artefact):
    items = {"net": model, "net/file": artefact}
    found = compare(items, X, references={"net/file": model}, timing=FAST)
    assert [(p.model, p.variant, p.tool) for p in found] == [
        ("net", "original", "keras"),
        ("net", "file", "litert"),
    ]
    assert found[0].environment["keras"] == keras.__version__
    assert found[0].environment == found[1].environment
    with pytest.raises(ValueError, match=r"references \['other'\] have the name of no item"):
        compare(items, X, references={"other": model}, timing=FAST)


def test_the_tool_can_be_named(model):
    assert profile(model, X, tool="other", timing=FAST).tool == "other"


def test_weights_that_are_not_finite_do_not_break_the_histogram(model):
    model.layers[1].kernel.assign(np.full((8, 3), np.nan))
    found = profile(model, X, timing=FAST)
    assert (sum(found.layers[2].counts), found.layers[2].nonzeros) == (0, 24)


def test_dict_inputs_and_integer_inputs():
    ids, scale = keras.Input((3,), dtype="int32", name="ids"), keras.Input((1,), name="scale")
    outputs = L.Flatten()(L.Embedding(5, 2)(ids)) * scale
    model = keras.Model({"ids": ids, "scale": scale}, outputs)
    batch = {"ids": np.array([[1, 2, 3]]), "scale": np.array([[2.0]])}
    found = profile(model, batch, timing=FAST)
    assert (found.params, found.macs, set(found.latency_ms)) == (10, 0, {1, 2})
