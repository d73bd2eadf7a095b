"""Quantization: schemes, and a model into its quantized form."""

from tfcompress.ops.schemes import Scheme
from tfcompress.quantization.quantize import calibrate, quantize

__all__ = ["Scheme", "calibrate", "quantize"]
