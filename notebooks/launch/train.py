"""Prune and quantize a classifier on all workers of a cluster; every launcher here runs this.

    python train.py --output DIRECTORY

trains on one machine, on its GPUs if it has several. On several machines every worker runs the same
command, and DIRECTORY lies on a file system that all of them see. A worker finds the others through
what its launcher sets: TF_CONFIG (Ray, or by hand), SLURM's variables (slurm.sbatch), or those of
kubernetes.yaml.

When a worker dies, the others raise; the launcher starts all of them anew, and they go on from the
last epoch's backup, to the weights that they would have ended with undisturbed.
"""

import argparse
import json
import logging
import os
import pathlib

BATCH_SIZE = 64  # Of all workers together.
PORT = int(os.environ.get("TRAIN_PORT", "2222"))  # Where workers listen, where we choose it.


def main():
    """Train with the arguments of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="shared directory")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--sparsity", type=float, default=0.8)
    arguments = parser.parse_args()
    print(json.dumps(train(**vars(arguments))))


def train(output, epochs=6, sparsity=0.8) -> dict[str, float]:
    """Train on every worker and, on the chief, write `model.keras` into the output directory.

    Args:
        output: A directory that all workers see.
        epochs: Passes over the data.
        sparsity: Fraction of zeros in the kernels, reached in the second half.

    Returns:
        The metrics of the last epoch.
    """
    strategy = make_strategy()  # Before anything else of TensorFlow runs.
    import keras

    import tfcompress as tfc

    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    x, y = data()
    model = tfc.parallel.prepare(make_model(), strategy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    end = epochs * -(-len(x) // BATCH_SIZE)
    schedule = tfc.schedules.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=end // 2)
    history = model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        shuffle=False,  # Started anew, it sees what it would have seen.
        verbose=2,
        callbacks=[
            keras.callbacks.BackupAndRestore(output / "backup"),
            tfc.callbacks.Pruning(schedule, frequency=10),
            tfc.callbacks.QuantizationAwareTraining(),
            tfc.callbacks.CompressionLogger(),
        ],
    ).history
    model.save(output / "model.keras")  # The chief writes, the others pass.
    return {name: float(values[-1]) for name, values in history.items()}


def data(num_examples=1024, num_features=16):
    """Put your own data here, the same on every worker: each takes its share of every batch."""
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(num_examples, num_features)).astype("float32")
    radius = np.linalg.norm(x, axis=1)
    return x, np.digitize(radius, np.quantile(radius, [1 / 3, 2 / 3])).astype("int32")


def make_model(num_features=16):
    """Put your own model here."""
    import keras

    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((num_features,)), *hidden, keras.layers.Dense(3)])


# How the workers find each other.


def make_strategy():
    """The strategy of the cluster that this process was started in, or of this machine."""
    import tensorflow as tf

    import tfcompress as tfc

    if "TF_CONFIG" not in os.environ:
        if "TRAIN_JOB_NAME" in os.environ:
            os.environ["TF_CONFIG"] = json.dumps(train_job_config(os.environ))
        elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            resolver = slurm_resolver()
            return tfc.parallel.strategy(
                tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
            )
    return tfc.parallel.strategy("auto")


def slurm_resolver(port=PORT):
    """The cluster of a SLURM job step, as TensorFlow reads it.

    Raises:
        ValueError: TensorFlow takes this process for one on another node.
    """
    import tensorflow as tf

    resolver_class = tf.distribute.cluster_resolver.SlurmClusterResolver
    if tf.config.list_physical_devices("GPU"):
        resolver = resolver_class(port_base=port)
    else:  # It lists as many tasks a node as there are GPUs for.
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        resolver = resolver_class(
            port_base=port, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
        )
    address = resolver.cluster_spec().task_address(*resolver.get_task_info())
    node = os.environ.get("SLURMD_NODENAME")
    if node not in (None, address.rsplit(":", 1)[0]):
        raise ValueError(
            f"This process runs on {node}, but TensorFlow expects it at {address}: it sorts nodes "
            "by name, SLURM by number. Ask for nodes whose names have the same number of digits."
        )
    return resolver


def train_job_config(environment, port=PORT) -> dict:
    """The `TF_CONFIG` of one pod of a Kubeflow TrainJob; kubernetes.yaml sets what it reads.

    The pods of a JobSet are called `NAME-node-0-INDEX.NAME`.
    """
    name, index = environment["TRAIN_JOB_NAME"], int(environment["JOB_COMPLETION_INDEX"])
    hosts = [f"{name}-node-0-{i}.{name}" for i in range(int(environment["TRAIN_JOB_NODES"]))]
    cluster = {"worker": [f"{host}:{port}" for host in hosts]}
    return {"cluster": cluster, "task": {"type": "worker", "index": index}}


if __name__ == "__main__":
    main()
