"""The private API that the coordination of workers rests on; tests/parallel tests what it does."""

import types

import keras
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from tests.models import compile_classifier, mlp
from tfcompress.keras_hooks import workers


@pytest.mark.parametrize(
    "make",
    [
        lambda path: keras.callbacks.ModelCheckpoint(path / "m.keras"),
        lambda path: keras.callbacks.BackupAndRestore(path / "backup"),
    ],
)
def test_save_model_is_where_a_callback_writes(make, tmp_path):
    callback, written = make(tmp_path), []
    callback.set_model(compile_classifier(mlp()))
    callback.__dict__["_save_model"] = lambda *args, **kwargs: written.append(1)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 1.0})
    assert written == [1]
    assert list(tmp_path.iterdir()) == []


def test_a_backup_sets_the_initial_epoch(tmp_path):
    model = compile_classifier(mlp())
    assert model._initial_epoch is None
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    backup.set_model(model)
    backup.on_epoch_end(2)
    backup.on_train_begin()
    assert model._initial_epoch == 3


def test_global_seed_is_what_set_seed_sets():
    tf.random.set_seed(7)
    assert context.global_seed() == 7


def cluster(task_type, task_id, **jobs):
    spec = types.SimpleNamespace(as_dict=lambda: jobs)
    resolver = types.SimpleNamespace(
        cluster_spec=lambda: spec, task_type=task_type, task_id=task_id
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy.__new__(
        tf.distribute.MultiWorkerMirroredStrategy
    )
    strategy._cluster_resolver = resolver
    strategy._extended = types.SimpleNamespace(_cluster_resolver=resolver)
    return strategy


@pytest.mark.parametrize(
    ("task_type", "task_id", "jobs", "chief"),
    [
        ("worker", 0, {"worker": ["a:1", "b:1"]}, True),
        ("worker", 1, {"worker": ["a:1", "b:1"]}, False),
        ("chief", 0, {"chief": ["a:1"], "worker": ["b:1"]}, True),
        ("worker", 0, {"chief": ["a:1"], "worker": ["b:1"]}, False),
        ("worker", 0, {}, True),
    ],
)
def test_one_worker_is_the_chief(task_type, task_id, jobs, chief):
    assert workers.is_chief(cluster(task_type, task_id, **jobs)) == chief


def test_one_process_has_no_workers():
    strategy = tf.distribute.get_strategy()
    assert not workers.has_workers(strategy)
    assert workers.is_chief(strategy)
    model = mlp()
    workers.join_workers(model, strategy)
    assert "fit" not in vars(model)
