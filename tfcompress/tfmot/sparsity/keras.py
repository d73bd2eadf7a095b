"""Pruning of Keras 3 models, under the names of `tfmot.sparsity.keras`."""

from tfcompress.tfmot.pruning import (
    PrunableLayer,
    prune_low_magnitude,
    prune_scope,
    strip_pruning,
)
from tfcompress.tfmot.pruning_callbacks import PruningSummaries, UpdatePruningStep
from tfcompress.tfmot.pruning_policy import PruneForLatencyOnXNNPack, PruningPolicy
from tfcompress.tfmot.pruning_schedules import ConstantSparsity, PolynomialDecay, PruningSchedule

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "PrunableLayer",
    "PruneForLatencyOnXNNPack",
    "PruningPolicy",
    "PruningSchedule",
    "PruningSummaries",
    "UpdatePruningStep",
    "prune_low_magnitude",
    "prune_scope",
    "strip_pruning",
]
