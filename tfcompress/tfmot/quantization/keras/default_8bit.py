"""The default scheme, under the name of `tfmot.quantization.keras.default_8bit`."""

from tfcompress.tfmot.quantize_schemes import Default8BitQuantizeScheme

__all__ = ["Default8BitQuantizeScheme"]
