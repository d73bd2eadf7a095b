"""Quantization: schemes, and a model into its quantized form."""

from tfcompress.ops.fake_quant import Scheme
from tfcompress.quantization.quantize import calibrate, quantize

__all__ = ["Scheme", "calibrate", "quantize"]
