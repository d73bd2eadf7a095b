"""`prepare`: training on replicas equals training on one device; each in a process of its own."""

import json

import pytest
import tensorflow as tf

from tests.models import mlp
from tests.processes import run_module
from tfcompress import parallel


def run(*arguments):
    return run_module("tests.parallel.replicas", *arguments)


def test_two_replicas_train_as_one_device():
    # What differs most from Keras's own ways; all cases are run by the slow tests.
    cases = ["smaller, xla, several steps", "accumulation", "ema that overwrites", "pruning, xla"]
    result = run(2, *cases)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{case}: ok" for case in cases]


def test_replicas_whose_first_batches_differ_train_as_one_device():
    result = run(3, "plain")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4])
def test_replicas_train_as_one_device(number):
    result = run(number)
    assert result.returncode == 0, result.stdout + result.stderr


def test_one_device_is_left_alone():
    model = mlp()
    assert parallel.prepare(model, "one_device") is model
    assert "train_step" not in vars(model)


class UnconnectedServers(tf.distribute.ParameterServerStrategy):
    def __init__(self):  # The real one waits for its servers.
        pass


def test_parameter_servers_are_refused():
    with pytest.raises(ValueError, match="Keras 3 cannot train under ParameterServerStrategy"):
        parallel.prepare(mlp(), UnconnectedServers())


@pytest.mark.parametrize("name", ["auto", None])
def test_a_cluster_with_parameter_servers_is_refused_before_it_connects(name, monkeypatch):
    cluster = {"worker": ["a:1", "b:1"], "ps": ["c:1"]}
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    model = mlp()
    with pytest.raises(ValueError, match=r"parameter servers, \['c:1'\], under which Keras 3"):
        parallel.prepare(model, name)
    assert "train_step" not in vars(model)
