"""Pruning outside of training."""

from tfcompress.pruning.prune import prune

__all__ = ["prune"]
