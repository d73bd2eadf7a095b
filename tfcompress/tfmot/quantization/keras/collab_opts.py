"""What TFMOT has under `tfmot.quantization.keras.collab_opts`."""

from tfcompress.tfmot.quantize_schemes import Default8BitPrunePreserveQuantizeScheme

__all__ = ["Default8BitPrunePreserveQuantizeScheme"]
