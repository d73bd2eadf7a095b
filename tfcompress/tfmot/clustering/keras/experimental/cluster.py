"""The module from which TFMOT's guides import `cluster_weights`."""

from tfcompress.tfmot.weight_clustering import CentroidInitialization, cluster_weights

__all__ = ["CentroidInitialization", "cluster_weights"]
