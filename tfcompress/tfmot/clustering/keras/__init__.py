"""Weight clustering of Keras 3 models, under the names of `tfmot.clustering.keras`."""

from tfcompress.tfmot.clustering.keras import experimental
from tfcompress.tfmot.weight_clustering import (
    CentroidInitialization,
    ClusterableLayer,
    ClusteringSummaries,
    GradientAggregation,
    cluster_scope,
    cluster_weights,
    strip_clustering,
)

__all__ = [
    "CentroidInitialization",
    "ClusterableLayer",
    "ClusteringSummaries",
    "GradientAggregation",
    "cluster_scope",
    "cluster_weights",
    "experimental",
    "strip_clustering",
]
