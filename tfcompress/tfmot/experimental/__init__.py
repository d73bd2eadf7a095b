"""What TFMOT has under `tensorflow_model_optimization.experimental`."""

from tfcompress.tfmot.experimental import combine

__all__ = ["combine"]
