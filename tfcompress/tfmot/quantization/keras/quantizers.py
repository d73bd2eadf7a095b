"""Quantizers, under the names of `tfmot.quantization.keras.quantizers`."""

from tfcompress.tfmot.quantizers import (
    AllValuesQuantizer,
    FixedQuantizer,
    LastValueQuantizer,
    MovingAverageQuantizer,
    NoQuantizer,
    Quantizer,
)

__all__ = [
    "AllValuesQuantizer",
    "FixedQuantizer",
    "LastValueQuantizer",
    "MovingAverageQuantizer",
    "NoQuantizer",
    "Quantizer",
]
