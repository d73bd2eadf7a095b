"""What TFMOT has under `tfmot.quantization.keras.experimental`."""

from tfcompress.tfmot.quantization.keras.experimental import default_n_bit

__all__ = ["default_n_bit"]
