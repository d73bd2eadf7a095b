"""Callbacks: compression during `model.fit`, on any model as it is."""

from tfcompress.callbacks.base import CompressionCallback
from tfcompress.callbacks.l1 import L1Regularization
from tfcompress.callbacks.logger import CompressionLogger
from tfcompress.callbacks.pruning import Pruning
from tfcompress.callbacks.quantization import QuantizationAwareTraining
from tfcompress.callbacks.threshold import ThresholdPruning

__all__ = [
    "CompressionCallback",
    "CompressionLogger",
    "L1Regularization",
    "Pruning",
    "QuantizationAwareTraining",
    "ThresholdPruning",
]
