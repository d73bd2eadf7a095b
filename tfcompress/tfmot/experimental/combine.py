"""Collaborative optimization, under the names of `tfmot.experimental.combine`."""

from tfcompress.tfmot.quantization_aware import strip_clustering_cqat
from tfcompress.tfmot.quantize_schemes import (
    Default8BitClusterPreserveQuantizeScheme,
    Default8BitPrunePreserveQuantizeScheme,
)

__all__ = [
    "Default8BitClusterPreserveQuantizeScheme",
    "Default8BitPrunePreserveQuantizeScheme",
    "strip_clustering_cqat",
]
