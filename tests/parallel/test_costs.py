"""What layers cost."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.parallel.stages import tied, transformer
from tfcompress.parallel import layer_costs
from tfcompress.timing import Timing, latency


def test_estimates_follow_the_shapes():
    hidden = [layers.Dense(64, name="wide"), layers.Dense(2, name="narrow")]
    model = keras.Sequential([keras.Input((32,)), *hidden])
    wide, narrow = layer_costs(model, np.zeros((8, 32), "float32"))
    size = 4 * (8 * 32 + 32 * 64 + 64 + 8 * 64)
    assert wide.forward == pytest.approx(8 * 32 * 64 / 5e10 + size / 1e10)
    assert wide.backward == pytest.approx(2 * wide.forward)
    assert (wide.weight_bytes, narrow.weight_bytes) == (4 * (32 * 64 + 64), 4 * (64 * 2 + 2))
    assert (wide.output_bytes, narrow.output_bytes) == (4 * 8 * 64, 4 * 8 * 2)
    assert (wide.reads, narrow.reads, wide.examples) == ((), (0,), 8)


def test_inference_has_no_backward_pass():
    costs = layer_costs(transformer(), np.zeros((2, 6), "int32"), training=False)
    assert {cost.backward for cost in costs} == {0.0}
    assert all(cost.forward > 0 for cost in costs)


def test_a_shared_weight_counts_once():
    model = tied()
    costs = layer_costs(model, np.zeros((2, 6), "int32"))
    assert sum(cost.weight_bytes for cost in costs) == sum(v.numpy().nbytes for v in model.weights)


def test_equal_layers_cost_the_same_when_measured():
    hidden = [layers.Dense(64, "relu", name=name) for name in "abc"]
    model = keras.Sequential([keras.Input((64,)), *hidden])
    costs = layer_costs(model, np.zeros((64, 64), "float32"), measure=True)
    assert len({(cost.forward, cost.backward) for cost in costs}) == 1
    assert costs[0].forward > 0


@pytest.mark.slow
def test_measured_layers_add_up_to_the_model():
    hidden = [layers.Dense(512, "relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((512,)), *hidden])
    x = tf.random.normal((128, 512))
    costs = layer_costs(model, x, measure=True, training=False)
    whole = tf.function(lambda: model(x, training=False))
    seconds = latency({"whole": whole}, Timing(rounds=15))["whole"].lower_ms / 1e3
    assert 0.4 < sum(cost.forward for cost in costs) / seconds < 2.5
