"""The recipes in `notebooks/launch`: each finds its cluster, and trains on it."""

import importlib.util
import json
import os
import subprocess
import sys

import keras
import pytest

from tests.processes import ROOT, finished, free_ports, run_module, run_workers, start

LAUNCH = ROOT / "notebooks" / "launch"


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("launch_train", LAUNCH / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slurm(monkeypatch, rank, node, nodes="n[1-2]"):
    step = {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURMD_NODENAME": node,
    }
    for name, value in step.items():
        monkeypatch.setenv(name, value)


def test_slurm_tells_each_task_its_address(train, monkeypatch):
    slurm(monkeypatch, rank=3, node="n2")
    resolver = train.slurm_resolver(port=2222)
    expected = ["n1:2222", "n1:2223", "n2:2222", "n2:2223"]
    assert resolver.cluster_spec().as_dict() == {"worker": expected}
    assert resolver.get_task_info() == ("worker", 3)


def test_nodes_that_tensorflow_sorts_otherwise_are_refused(train, monkeypatch):
    slurm(monkeypatch, rank=0, node="n2", nodes="n[2,10]")
    with pytest.raises(ValueError, match="runs on n2, but TensorFlow expects it at n10:2222"):
        train.slurm_resolver(port=2222)


def test_a_pod_of_a_train_job_knows_its_cluster(train):
    pod = {"TRAIN_JOB_NAME": "job", "TRAIN_JOB_NODES": "2", "JOB_COMPLETION_INDEX": "1"}
    assert train.train_job_config(pod, port=2222) == {
        "cluster": {"worker": ["job-node-0-0.job:2222", "job-node-0-1.job:2222"]},
        "task": {"type": "worker", "index": 1},
    }


def test_the_train_job_is_one():
    yaml = pytest.importorskip("yaml")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    # What a class does not know is lost on the way.
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    variables = {each["name"]: each["value"] for each in job["spec"]["trainer"]["env"]}
    assert variables["TRAIN_JOB_NAME"] == job["metadata"]["name"]
    assert variables["TRAIN_JOB_NODES"] == str(job["spec"]["trainer"]["numNodes"])
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


def test_slurm_starts_all_tasks_anew(tmp_path):
    """A stand-in for `srun`, which writes down how it is called and fails once."""
    srun = tmp_path / "srun"
    srun.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) -gt 1 ]'
    )
    srun.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": "/jobs",
    }
    command = ["bash", LAUNCH / "slurm.sbatch", "/shared"]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    call = "--kill-on-bad-exit=1 python /jobs/train.py --output /shared"
    assert (tmp_path / "calls").read_text().splitlines() == [call] * 2


def assert_trained(directory, metrics):
    assert 0.79 < metrics["sparsity"] < 0.81
    kernels = [w.numpy() for w in keras.models.load_model(directory / "model.keras").weights]
    zeros = sum((w == 0).sum() for w in kernels if w.ndim > 1)
    assert 0.79 < zeros / sum(w.size for w in kernels if w.ndim > 1) < 0.81


@pytest.mark.slow
def test_it_trains_on_one_machine(tmp_path):
    result = run_module("notebooks.launch.train", "--output", tmp_path, "--epochs", 2)
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path, json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_it_trains_on_two_workers(tmp_path):
    arguments = ("notebooks.launch.train", "--output", tmp_path, "--epochs", 2)
    results = run_workers(2, *arguments)
    assert [each.returncode for each in results] == [0, 0], results
    metrics = [json.loads(each.stdout.splitlines()[-1]) for each in results]
    assert metrics[0] == metrics[1]
    assert_trained(tmp_path, metrics[0])


@pytest.mark.slow
def test_it_trains_in_a_step_of_slurm(tmp_path):
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "TRAIN_PORT": str(free_ports(1)[0]),
    }
    arguments = ("notebooks.launch.train", "--output", tmp_path, "--epochs", 2)
    tasks = [start(*arguments, environment=step | {"SLURM_PROCID": str(i)}) for i in range(2)]
    results = [finished(each) for each in tasks]
    assert [each.returncode for each in results] == [0, 0], results
    assert_trained(tmp_path, json.loads(results[0].stdout.splitlines()[-1]))


@pytest.mark.slow
def test_it_trains_on_two_workers_of_ray(tmp_path):
    pytest.importorskip("ray.train.tensorflow")
    command = [sys.executable, LAUNCH / "ray_train.py", "--output", tmp_path, "--epochs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_trained(tmp_path, {"sparsity": 0.8})
