"""`prepare` on several workers: real processes that find each other through `TF_CONFIG`."""

import re
import signal

import pytest
import tensorflow as tf

from tests.parallel.workers import count_ops, host_calls
from tests.processes import finished, run_workers, start_workers


def assert_ok(results, lines):
    for each in results:
        assert each.returncode == 0, each.stdout + each.stderr
        ok = [line for line in each.stdout.splitlines() if line.endswith(": ok")]
        assert ok == [f"{line}: ok" for line in lines], each.stdout


def test_two_workers_of_which_one_is_killed(tmp_path):
    """The others are ended and all started anew, as `srun --kill-on-bad-exit` and JobSets do.

    What else holds on two workers is checked in the same processes, since starting them takes long.
    """
    first, last = start_workers(2, "tests.parallel.workers", tmp_path, "dies")
    killed = finished(last)
    first.kill()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert finished(first).stdout == ""
    checks = [
        "goes_on",
        "only_the_chief_writes",
        "a_backup_of_one_worker_is_refused",
        "workers_without_a_seed_share_the_examples",
        "callbacks_add_no_collective",
        "they_train_as_one_device",
    ]
    assert_ok(run_workers(2, "tests.parallel.workers", tmp_path, *checks), checks)


@pytest.mark.slow
def test_no_technique_adds_a_collective(tmp_path):
    check = "no_technique_adds_a_collective"
    assert_ok(run_workers(2, "tests.parallel.workers", tmp_path, check), [check])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_workers_train_as_one_device(number):
    for each in run_workers(number, "tests.parallel.replicas", number):
        assert each.returncode == 0, each.stdout + each.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_workers_fail_when_one_is_killed_and_go_on_when_started_anew(number, tmp_path):
    *others, killed = run_workers(number, "tests.parallel.workers", tmp_path, "dies")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for each in others:
        assert each.returncode > 0
        assert re.search(r"Unavailable|Collective ops is aborted", each.stderr), each.stderr
    checks = ["goes_on"]
    assert_ok(run_workers(number, "tests.parallel.workers", tmp_path, *checks), checks)


def test_ops_are_counted_in_the_functions_that_are_called():
    inner = tf.function(lambda x: tf.numpy_function(lambda x: x, [x], tf.float32), autograph=False)

    @tf.function(autograph=False)
    def outer(x):
        return tf.cond(x > 0.0, lambda: inner(inner(x)), lambda: x)

    graph_def = outer.get_concrete_function(tf.TensorSpec((), tf.float32)).graph.as_graph_def()
    assert host_calls(count_ops(graph_def)) == 2
