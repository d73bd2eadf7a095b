"""The n-bit scheme, under the name of `tfmot.quantization.keras.experimental.default_n_bit`."""

from tfcompress.tfmot.quantize_schemes import DefaultNBitQuantizeScheme

__all__ = ["DefaultNBitQuantizeScheme"]
