"""Pruning, under the names of `tensorflow_model_optimization.sparsity`."""

from tfcompress.tfmot.sparsity import keras

__all__ = ["keras"]
