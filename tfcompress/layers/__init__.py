"""Layer wrappers: compression of single layers, inside a Sequential or Functional model."""

from tfcompress.layers.base import CompressionWrapper
from tfcompress.layers.cluster import Cluster, cluster
from tfcompress.layers.l1 import L1
from tfcompress.layers.prune import Prune
from tfcompress.layers.quantize import Quantize
from tfcompress.layers.strip import strip

__all__ = ["Cluster", "CompressionWrapper", "L1", "Prune", "Quantize", "cluster", "strip"]
