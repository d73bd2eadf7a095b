"""Training on several devices of one machine: replicas by `tf.distribute`, and parts of models."""

from tfcompress.parallel.costs import layer_costs
from tfcompress.parallel.fit import prepare, release
from tfcompress.parallel.partition import Balance, LayerCost, partition
from tfcompress.parallel.pipeline import Pipeline
from tfcompress.parallel.simulate import Link, Simulation, simulate
from tfcompress.parallel.stages import Stage
from tfcompress.parallel.strategy import strategy
from tfcompress.parallel.tensor_parallel import Region, TensorParallel

__all__ = [
    "Balance",
    "LayerCost",
    "Link",
    "Pipeline",
    "Region",
    "Simulation",
    "Stage",
    "TensorParallel",
    "layer_costs",
    "partition",
    "prepare",
    "release",
    "simulate",
    "strategy",
]
