"""Run train.py on the workers of a Ray cluster, or on two of this machine.

    pip install "ray[train]"
    python ray_train.py --output DIRECTORY --workers 2

Ray starts the workers, sets TF_CONFIG in each, and starts all of them anew when one dies.
"""

import argparse
import pathlib
import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer


def main():
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="shared directory")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    run(arguments.output, arguments.workers, arguments.epochs)


def run(output, workers, epochs=6, use_gpu=False, restarts=3):
    """Train on workers of the Ray cluster that this process is connected to, or of this machine.

    Args:
        output: A directory that all workers see.
        workers: How many processes; with `use_gpu`, each has a GPU of its own.
        epochs: Passes over the data.
        use_gpu: Whether the workers have GPUs.
        restarts: How often they are started anew when one of them dies.

    Returns:
        Ray's result.
    """
    output = pathlib.Path(output).resolve()
    trainer = TensorflowTrainer(
        _train,
        train_loop_config={"output": str(output), "epochs": epochs, "path": str(_HERE)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name="tfcompress",
            storage_path=str(output / "ray"),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    return trainer.fit()


_HERE = pathlib.Path(__file__).resolve().parent


def _train(config):
    sys.path.insert(0, config["path"])
    import train
    from ray.train import report

    report(train.train(config["output"], config["epochs"]))


if __name__ == "__main__":
    main()
