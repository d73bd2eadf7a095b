"""What TFMOT has under `tfmot.clustering.keras.experimental`."""

from tfcompress.tfmot.clustering.keras.experimental import cluster
from tfcompress.tfmot.weight_clustering import cluster_weights

__all__ = ["cluster", "cluster_weights"]
