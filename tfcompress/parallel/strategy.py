"""Which `tf.distribute` strategy fits the machine."""

import functools
import json
import logging
import os
from collections.abc import Mapping

import tensorflow as tf

logger = logging.getLogger("tfcompress")
_NAMES = ("auto", "tpu", "multi_worker", "mirrored", "one_device")


def strategy(which="auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """A strategy for this machine; what was chosen, and why, goes to the log in one line.

    "auto" takes the first of these that fits: TPUs (`tpu=`, `TPU_NAME`, or TPUs that TensorFlow
    sees), a cluster of several workers in `TF_CONFIG`, several GPUs, one device. Each is made once
    a process: a second call returns the same object, since TensorFlow bears one only.

    A cluster's must be made before TensorFlow does anything else, and waits for the other workers.
    Not covered by tests: making a TPU's strategy, of which only the choice is tested.

    Args:
        which: `"auto"`, `"tpu"`, `"multi_worker"`, `"mirrored"`, `"one_device"`, or any strategy,
            which is returned as it is.
        tpu: Address or name of a TPU; `"local"` on a TPU VM.

    Returns:
        The strategy. One device is TensorFlow's default strategy, under which Keras does what it
        does without any.

    Raises:
        ValueError: An unknown name, or a `ParameterServerStrategy`, which Keras 3 cannot train
            under; a `tpu=` beside a name that is not one.

    Example:

    >>> strategy("one_device").num_replicas_in_sync
    1
    """
    if isinstance(which, tf.distribute.Strategy):
        return require_synchronous(which)
    if which not in _NAMES:
        raise ValueError(
            f"Got the strategy {which!r}; expected a tf.distribute.Strategy or one of {_NAMES}."
        )
    if tpu is not None and which not in ("auto", "tpu"):
        raise ValueError(f"tpu={tpu!r} does not go with {which!r}; pass 'auto' or 'tpu'.")
    name, why = resolve(which, tpu)
    made = _made(name, tpu)
    logger.info(
        "strategy: %s, %d replicas: %s", type(made).__name__, made.num_replicas_in_sync, why
    )
    return made


def require_synchronous(which: tf.distribute.Strategy) -> tf.distribute.Strategy:
    """The strategy, or a ValueError that names the remedy if Keras cannot train under it."""
    if isinstance(which, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "Keras 3 cannot train under ParameterServerStrategy, whose workers update the weights "
            "each at its own time. Expected a synchronous strategy, such as "
            'tf.distribute.MirroredStrategy() or tfcompress.parallel.strategy("mirrored").'
        )
    return which


def resolve(which: str, tpu: str | None = None) -> tuple[str, str]:
    """The name of the strategy that a name, perhaps "auto", stands for here, and why."""
    if which != "auto":
        return which, "asked for"
    gpus, tpus = (len(tf.config.list_physical_devices(kind)) for kind in ("GPU", "TPU"))
    return choose(os.environ, gpus, tpus, tpu)


def choose(environment: Mapping[str, str], gpus: int, tpus: int, tpu=None) -> tuple[str, str]:
    """The name of the strategy that "auto" takes, and why.

    Args:
        environment: Of the process.
        gpus: How many GPUs TensorFlow sees.
        tpus: How many TPU cores it sees.
        tpu: The address of a TPU, if one was given.

    Returns:
        `(name, reason)`.

    Raises:
        ValueError: `TF_CONFIG` is no JSON object, or names parameter servers.

    Example:

    >>> choose({}, gpus=2, tpus=0)
    ('mirrored', '2 GPUs')
    """
    if tpu or environment.get("TPU_NAME"):
        return "tpu", f"a TPU at {tpu or environment['TPU_NAME']!r}"
    if tpus:
        return "tpu", f"{tpus} TPU cores"
    workers = _workers(environment.get("TF_CONFIG"))
    if workers > 1:
        return "multi_worker", f"TF_CONFIG names {workers} workers"
    if gpus > 1:
        return "mirrored", f"{gpus} GPUs"
    return "one_device", "one GPU" if gpus else "no GPU, no TPU, no cluster in TF_CONFIG"


def _workers(config: str | None) -> int:
    try:
        cluster = json.loads(config or "{}").get("cluster") or {}
        workers = sum(len(cluster.get(job, ())) for job in ("chief", "worker"))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"TF_CONFIG is {config!r}; expected JSON such as "
            '{"cluster": {"worker": ["host1:port", "host2:port"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}: {error}'
        ) from error
    if cluster.get("ps"):
        raise ValueError(
            f"TF_CONFIG names parameter servers, {cluster['ps']}, under which Keras 3 cannot train."
            ' Expected "worker" addresses alone; each worker keeps all weights.'
        )
    return workers


@functools.cache
def _made(name, tpu):
    return {
        "tpu": functools.partial(_tpu, tpu),
        "multi_worker": tf.distribute.MultiWorkerMirroredStrategy,
        "mirrored": tf.distribute.MirroredStrategy,
        "one_device": tf.distribute.get_strategy,
    }[name]()


def _tpu(address):
    address = address or os.environ.get("TPU_NAME") or "local"
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
    if address != "local":
        tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
