"""Quantization-aware training, under the names of `tensorflow_model_optimization.quantization`."""

from tfcompress.tfmot.quantization import keras

__all__ = ["keras"]
