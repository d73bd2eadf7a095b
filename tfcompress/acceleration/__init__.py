"""Faster inference of a model as it is: XLA, ahead-of-time compilation, mixed precision."""

from tfcompress.acceleration.aot import aot
from tfcompress.acceleration.fusion import FusedGroup, FusionReport, fusion_report
from tfcompress.acceleration.precision import (
    mixed_precision,
    precision_policy,
    to_mixed_precision,
)
from tfcompress.acceleration.xla import Compiled, Measurement, compile

__all__ = [
    "Compiled",
    "FusedGroup",
    "FusionReport",
    "Measurement",
    "aot",
    "compile",
    "fusion_report",
    "mixed_precision",
    "precision_policy",
    "to_mixed_precision",
]
