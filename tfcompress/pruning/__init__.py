"""Pruning outside of training."""

from tfcompress.pruning.budget import budget
from tfcompress.pruning.prune import prune
from tfcompress.pruning.sensitivity import Sensitivity, sensitivity

__all__ = ["Sensitivity", "budget", "prune", "sensitivity"]
