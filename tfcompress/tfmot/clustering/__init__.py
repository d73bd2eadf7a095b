"""Weight clustering, under the names of `tensorflow_model_optimization.clustering`."""

from tfcompress.tfmot.clustering import keras

__all__ = ["keras"]
