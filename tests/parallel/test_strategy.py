import json

import pytest
import tensorflow as tf

from tfcompress import parallel
from tfcompress.parallel.strategy import choose

CLUSTER = json.dumps(
    {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
)


@pytest.mark.parametrize(
    ("environment", "gpus", "tpus", "tpu", "expected"),
    [
        ({}, 0, 0, None, "one_device"),
        ({}, 1, 0, None, "one_device"),
        ({}, 2, 0, None, "mirrored"),
        ({"TF_CONFIG": CLUSTER}, 2, 0, None, "multi_worker"),
        ({"TF_CONFIG": CLUSTER}, 0, 8, None, "tpu"),
        ({"TPU_NAME": "pod"}, 0, 0, None, "tpu"),
        ({}, 0, 0, "grpc://host:1", "tpu"),
        ({"TF_CONFIG": "{}"}, 0, 0, None, "one_device"),
    ],
)
def test_auto_takes_the_first_that_fits(environment, gpus, tpus, tpu, expected):
    assert choose(environment, gpus, tpus, tpu)[0] == expected


def test_a_broken_cluster_is_shown():
    with pytest.raises(ValueError, match="TF_CONFIG is 'worker:0'"):
        choose({"TF_CONFIG": "worker:0"}, 0, 0)


def test_parameter_servers_are_refused():
    config = json.dumps({"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}})
    with pytest.raises(ValueError, match="parameter servers, .* under which Keras 3 cannot train"):
        choose({"TF_CONFIG": config}, 0, 0)


def test_a_strategy_passes_through():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    assert parallel.strategy(strategy) is strategy


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="expected a tf.distribute.Strategy or one of"):
        parallel.strategy("all")


def test_a_name_is_made_once():
    assert parallel.strategy("one_device") is parallel.strategy("one_device")
