"""TFMOT's clustering API on `tfcompress.layers.Cluster`."""

import abc
import enum
import logging
import math
import os

import keras
import tensorflow as tf

from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers import Cluster, strip
from tfcompress.tfmot.keras2 import refuse_keras_2
from tfcompress.tfmot.models import depthwise_kernels, has_kernels, require_model, wrapped
from tfcompress.tfmot.pruning_callbacks import check_log_dir

logger = logging.getLogger("tfcompress")


class CentroidInitialization(enum.StrEnum):
    """Where the centroids start; see `tfcompress.layers.Cluster`."""

    LINEAR = "CentroidInitialization.LINEAR"
    RANDOM = "CentroidInitialization.RANDOM"
    DENSITY_BASED = "CentroidInitialization.DENSITY_BASED"
    KMEANS_PLUS_PLUS = "CentroidInitialization.KMEANS_PLUS_PLUS"


_INITIALIZATIONS = {
    CentroidInitialization.LINEAR: "linear",
    CentroidInitialization.RANDOM: "random",
    CentroidInitialization.DENSITY_BASED: "density",
    CentroidInitialization.KMEANS_PLUS_PLUS: "kmeans++",
}


class GradientAggregation(enum.StrEnum):
    """How the gradients of the weights that share a centroid become its own."""

    SUM = "GradientAggregation.SUM"
    AVG = "GradientAggregation.AVG"


class ClusterableLayer(abc.ABC):
    """A layer of the user's own that says which of its weights are clustered."""

    @abc.abstractmethod
    def get_clusterable_weights(self):
        """`(name, variable)` pairs; called once the layer is built."""

    def get_clusterable_algorithm(self, weight_name):  # noqa: B027, TFMOT has it
        """TFMOT's look-up of its own, None by default; weights of any rank need none here."""


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class ClusterCustomLayer(Cluster):
    """`layers.Cluster` of the weights that a `ClusterableLayer` names."""

    def _chosen(self):
        axes = {id(variable): found for variable, found in weight_axes(self.layer)}
        return [
            (variable, axes.get(id(variable), tuple(range(len(variable.shape)))))
            for _, variable in self.layer.get_clusterable_weights()
        ]


def cluster_weights(
    to_cluster,
    number_of_clusters,
    cluster_centroids_init=CentroidInitialization.KMEANS_PLUS_PLUS,
    preserve_sparsity=False,
    cluster_per_channel=False,
    **kwargs,
):
    """Let the weights of a layer, a list of layers or a model share a few values, and train them.

    Layers come back in `tfcompress.layers.Cluster`; those without weights to cluster, and those
    that have no more weights than clusters, as they are. A model is copied, with its weights,
    nested models included; a subclassed one becomes its flat graph. Cluster trained weights: the
    values start from them.

    Args:
        to_cluster: A layer, a list of layers, or a model.
        number_of_clusters: How many different values a weight may have, above 1; above 2 where
            zeros are kept.
        cluster_centroids_init: A `CentroidInitialization`.
        preserve_sparsity: Whether zeros, as of pruning, stay exactly 0.
        cluster_per_channel: Whether each output channel of a Conv2D has values of its own.
        **kwargs: What `layers.Cluster` takes, for a single layer.

    Returns:
        The layer, list or model with clustering wrappers; a model is not compiled.

    Raises:
        ValueError: Something else was passed, a layer or model of Keras 2, or an argument is out of
            its range.
        ImportError: scikit-learn, which k-means needs, is not installed.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> clustered = cluster_weights(model, 4, CentroidInitialization.LINEAR)
    >>> [layer.name for layer in clustered.layers]
    ['cluster_head']

    Reference: Han et al. 2016, https://arxiv.org/abs/1510.00149.
    """
    refuse_keras_2(to_cluster, "cluster_weights")
    settings = clustering_settings(
        number_of_clusters, cluster_centroids_init, preserve_sparsity, cluster_per_channel
    )

    def wrap(layer):
        return _wrap(layer, settings)

    if isinstance(to_cluster, keras.Model):
        return wrapped(to_cluster, wrap)
    if isinstance(to_cluster, list):
        return list(map(wrap, to_cluster))
    if isinstance(to_cluster, keras.layers.Layer):
        return _wrap(to_cluster, settings | _of_layer(kwargs))
    raise ValueError(
        "cluster_weights can only cluster an object of the following types: a keras.Model, a "
        "keras.layers.Layer, a list of keras.layers.Layer. You passed an object of type: "
        f"{type(to_cluster).__name__}."
    )


def strip_clustering(model):
    """The plain model, with the shared values in its weights; see `tfcompress.strip`.

    Args:
        model: A model with clustering wrappers.

    Returns:
        A new model.

    Raises:
        ValueError: Not a model of Keras 3.

    Example:

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> clustered = cluster_weights(model, 4, CentroidInitialization.LINEAR)
    >>> len(np.unique(strip_clustering(clustered).layers[0].kernel)) <= 4
    True
    """
    require_model(model, "strip_clustering")
    return strip(model)


def cluster_scope():
    """A scope to load clustered models in. Not needed: their classes are registered with Keras."""
    return keras.saving.custom_object_scope({})


class ClusteringSummaries(keras.callbacks.TensorBoard):
    """TensorBoard histograms of the centroids and the weights.

    Args:
        log_dir: Directory for TensorBoard, not empty.
        cluster_update_freq: `"epoch"`, `"batch"`, or a number of batches.
        **kwargs: See `keras.callbacks.TensorBoard`.

    Raises:
        ValueError: `log_dir` is not a path.
    """

    def __init__(self, log_dir="logs", cluster_update_freq="epoch", **kwargs):
        check_log_dir(log_dir)
        super().__init__(log_dir=os.fspath(log_dir), **kwargs)
        self.cluster_update_freq = 1 if cluster_update_freq == "batch" else cluster_update_freq
        self._centroids_writer = None
        self._batches = 0

    def on_train_batch_end(self, batch, logs=None):
        """Write the histograms every `cluster_update_freq` batches."""
        super().on_train_batch_end(batch, logs)
        self._batches += 1
        if self.cluster_update_freq != "epoch" and self._batches % self.cluster_update_freq == 0:
            self._write_histograms()

    def on_epoch_end(self, epoch, logs=None):
        """Write the histograms every epoch."""
        super().on_epoch_end(epoch, logs)
        if self.cluster_update_freq == "epoch":
            self._write_histograms()

    def _write_histograms(self):
        if self._centroids_writer is None:
            self._centroids_writer = tf.summary.create_file_writer(self.log_dir)
        with self._centroids_writer.as_default(step=self._batches):
            for layer in self.model.layers:
                for variable in layer.variables if isinstance(layer, Cluster) else ():
                    values = tf.cast(tf.convert_to_tensor(variable), tf.float32)
                    tf.summary.histogram(f"clustering/{variable.path}", values)
        self._centroids_writer.flush()


def clustering_settings(clusters, initialization, preserve_sparsity, per_channel) -> dict:
    """The arguments of `layers.Cluster` for those of TFMOT."""
    if isinstance(clusters, bool) or not isinstance(clusters, int):
        raise ValueError(f"number_of_clusters must be an integer. Given: {type(clusters)}")
    limit = 2 if preserve_sparsity else 1
    if clusters <= limit:
        raise ValueError(f"number_of_clusters must be greater than {limit}. Given: {clusters}")
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            f"Cluster centroid initialization {initialization!r} not supported. Pass one of "
            f"{[str(each) for each in CentroidInitialization]}."
        )
    return {
        "clusters": clusters,
        "initialization": _INITIALIZATIONS[CentroidInitialization(initialization)],
        "preserve_sparsity": preserve_sparsity,
        "per_channel": per_channel,
        # As in TFMOT, the weights are trained along, and move between the centroids.
        "reassign": True,
    }


def _of_layer(kwargs) -> dict:
    kwargs = dict(kwargs)
    aggregation = kwargs.pop("cluster_gradient_aggregation", GradientAggregation.SUM)
    if aggregation != GradientAggregation.SUM:
        raise ValueError(
            f"cluster_gradient_aggregation={aggregation!r} is not supported: the gradient of a "
            "centroid is the sum over its weights. Leave it out, and train with Adam or a smaller "
            "learning rate."
        )
    return kwargs


def _wrap(layer, settings):
    if isinstance(layer, Cluster):
        return layer
    # TFMOT has values for each channel in Conv2D only.
    per_channel = settings["per_channel"] and type(layer) is keras.layers.Conv2D
    settings = {"name": f"cluster_{layer.name}"} | settings | {"per_channel": per_channel}
    if hasattr(layer, "get_clusterable_weights"):
        return ClusterCustomLayer(layer, **settings)
    if not has_kernels(layer, trainable=False) or not _has_enough_weights(layer, settings):
        logger.info("Not clustered, without weights enough to cluster: %s", layer.name)
        return layer
    return Cluster(layer, exclude=depthwise_kernels(layer), **settings)


def _has_enough_weights(layer, settings) -> bool:
    """Whether a built Conv2D has more weights than clusters, as TFMOT asks of it."""
    if not isinstance(layer, keras.layers.Conv2D) or not layer.built:
        return True
    channels = layer.kernel.shape[-1] if settings["per_channel"] else 1
    return math.prod(layer.kernel.shape) / channels > settings["clusters"]
