"""Layers split over devices: equal to one device."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.models import classification, mlp
from tests.parallel import splits
from tests.parallel.stages import tokens, transformer
from tests.processes import run_module
from tfcompress.parallel import TensorParallel

TWICE = ["CPU:0", "CPU:0"]


def test_two_devices_train_as_one():
    result = run_module("tests.parallel.splits", 2, "regularized")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == ["regularized: ok"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("case", splits.CASES)
def test_devices_train_as_one(number, case):
    if case == "transformer" and number == 4:
        pytest.skip("it has two heads")
    result = run_module("tests.parallel.splits", number, case)
    assert result.returncode == 0, result.stdout + result.stderr


def test_heads_and_neurons_are_split():
    model = transformer()
    split = TensorParallel(model, TWICE)
    assert [region.units for region in split.regions] == [(1, 1), (8, 8)] * 2
    heads, neurons, *_ = split.regions
    # Half of query, key and value with their biases, and of what reads them.
    assert heads.weight_bytes == ((3 * (8 * 4 + 4) + 4 * 8) * 4,) * 2
    assert neurons.weight_bytes == ((8 * 8 + 8 + 8 * 8) * 4,) * 2
    assert "a norm takes its statistics over all units" in split.skipped.values()
    assert split.count_params() == model.count_params()  # Nothing is trained twice.
    x, _ = tokens()
    np.testing.assert_allclose(split(x), model(x), atol=1e-6)


def test_units_that_do_not_divide_are_shared_out():
    model = splits.regularized()
    split = TensorParallel(model, [*TWICE, "CPU:0", "CPU:0"])
    assert split.regions[0].units == (9, 8, 8, 8)
    x, _ = classification(5)
    np.testing.assert_allclose(split(x), model(x), atol=1e-6)


def test_gather_writes_the_trained_weights_back():
    x, y = classification(16)
    model = mlp()
    before = model.get_weights()
    split = TensorParallel(model, TWICE)
    split.gather()
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    split.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    split.fit(x, y, batch_size=8, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert split.gather() is model
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), before, strict=True))
    np.testing.assert_allclose(model(x), split(x), atol=1e-6)


def test_a_layer_that_is_called_twice_stays_whole():
    inputs = keras.Input((8,))
    shared, wide = layers.Dense(8, "relu"), layers.Dense(16, "relu")
    x = layers.Dense(8)(wide(shared(shared(inputs))))
    split = TensorParallel(keras.Model(inputs, x), TWICE)
    assert [region.layers[0] for region in split.regions] == [wide.name]


def test_a_model_without_pairs_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="No layers of .* can be split over 2 devices"):
        TensorParallel(model, TWICE)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="devices must be two or more"):
        TensorParallel(mlp(), ["CPU:0"])
    with pytest.raises(ValueError, match="jit_compile=True"):
        TensorParallel(mlp(), TWICE).compile("sgd", "mse", jit_compile=True)
    with pytest.raises(NotImplementedError, match="save gather"):
        TensorParallel(mlp(), TWICE).get_config()
