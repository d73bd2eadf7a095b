"""Test programs that run in a process of their own: strategies do not share one well."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_module(name, *arguments) -> subprocess.CompletedProcess:
    """Run `python -m name arguments` from the root of the repository, its output captured."""
    return subprocess.run(
        _command(name, arguments),
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_workers(number, name, *arguments) -> list[subprocess.CompletedProcess]:
    """Run `python -m name arguments` as the workers of one cluster on this machine, in order."""
    return [finished(each) for each in start_workers(number, name, *arguments)]


def start_workers(number, name, *arguments) -> list[subprocess.Popen]:
    """Start what `run_workers` runs; one thread of computation each, since they share a machine."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(number)]}
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(number)]
    return [start(name, *arguments, environment={"TF_CONFIG": json.dumps(c)}) for c in configs]


def start(name, *arguments, environment) -> subprocess.Popen:
    """Start `python -m name arguments`, one of several workers, with more in its environment."""
    return subprocess.Popen(
        _command(name, arguments),
        cwd=ROOT,
        env=_environment(TF_NUM_INTRAOP_THREADS="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, timeout=600) -> subprocess.CompletedProcess:
    """What a started process did; it is killed when it takes longer, in seconds."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nkilled after {timeout} s"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _command(name, arguments):
    return [sys.executable, "-m", name, *map(str, arguments)]


def _environment(**changes):
    return os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | changes


def free_ports(number) -> list[int]:
    """Ports of this machine that nothing listens to."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def logical_cpus(number) -> None:
    """Let TensorFlow have `number` devices; before it has started."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * number
    tf.config.set_logical_device_configuration(cpu, devices)


def report_cases(check, cases, names) -> None:
    """`check(case)` for the cases of these names, or all; say which held, and exit."""
    failed = False
    for name in names or cases:
        try:
            check(cases[name])
            print(f"{name}: ok", flush=True)
        except Exception as error:  # Every case is reported.
            failed = True
            print(f"{name}: {type(error).__name__}: {str(error)[:900]}", flush=True)
    sys.exit(failed)
