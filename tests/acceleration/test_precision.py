"""Mixed precision by the device, and techniques under it."""

import keras
import numpy as np
import pytest
from keras import layers

import tfcompress as tfc
from tests.models import classification, compile_classifier, mlp, subclassed
from tfcompress.acceleration import (
    compile,
    mixed_precision,
    precision,
    precision_policy,
    to_mixed_precision,
)
from tfcompress.timing import Timing


@pytest.mark.parametrize(
    ("devices", "flags", "expected"),
    [
        ({"CPU", "TPU"}, set(), "mixed_bfloat16"),
        ({"CPU", "GPU"}, {"avx512_bf16"}, "mixed_float16"),
        ({"CPU"}, {"avx2", "avx512_bf16"}, "mixed_bfloat16"),
        ({"CPU"}, {"amx_bf16"}, "mixed_bfloat16"),
        ({"CPU"}, {"avx2"}, "float32"),
    ],
)
def test_auto_follows_the_device(devices, flags, expected):
    name, reason = precision.choose_policy(devices, flags)
    assert name == expected
    assert reason


def test_auto_says_what_it_chose(caplog):
    with caplog.at_level("INFO", "tfcompress"):
        policy = precision_policy()
    assert policy.name in ("mixed_bfloat16", "mixed_float16", "float32")
    assert f"mixed_precision: {policy.name}" in caplog.text


def test_the_context_ends_also_when_it_raises():
    with pytest.raises(KeyError), mixed_precision("mixed_float16") as policy:
        assert policy.compute_dtype == "float16"
        assert layers.Dense(2).compute_dtype == "float16"
        raise KeyError
    assert keras.config.dtype_policy().name == "float32"


def test_a_copy_computes_in_bfloat16_and_gives_float32():
    model = mlp()
    copy = to_mixed_precision(model, "mixed_bfloat16")
    assert [layer.compute_dtype for layer in copy.layers] == ["bfloat16", "float32"]
    assert {w.dtype for w in copy.weights} == {"float32"}
    x, _ = classification()
    difference = np.abs(np.asarray(copy(x)) - np.asarray(model(x)))
    assert 0 < difference.max() < 0.05
    assert [layer.compute_dtype for layer in model.layers] == ["float32", "float32"]


def test_other_models_and_names_are_refused():
    with pytest.raises(ValueError, match="needs a built Sequential or Functional model"):
        to_mixed_precision(subclassed())
    with pytest.raises(ValueError, match="Got the precision 'half'; expected one of"):
        precision_policy("half")


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_pruning_quantization_and_compile_work_under_it(name):
    x, y = classification()
    model = compile_classifier(to_mixed_precision(mlp(), name))
    callbacks = [
        tfc.callbacks.Pruning(0.5, frequency=1),
        tfc.callbacks.QuantizationAwareTraining(),
    ]
    model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
    zeros = np.mean(model.layers[0].kernel.numpy() == 0)
    assert zeros == 0.5
    fast = compile(model, batch_sizes=(4,), timing=Timing(rounds=1), verbose=0)
    difference = np.abs(np.asarray(fast(x[:4])) - np.asarray(model(x[:4], training=False)))
    assert difference.max() < 0.05
