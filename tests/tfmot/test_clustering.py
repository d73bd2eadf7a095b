"""`tfmot.clustering.keras` on Keras 3."""

import keras
import numpy as np
import pytest

import tfcompress.tfmot as tfmot
from tfcompress.layers import Cluster

clustering = tfmot.clustering.keras
Start = clustering.CentroidInitialization
layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 8)).astype("float32")


def dense():
    return keras.Sequential([keras.Input((8,)), layers.Dense(8, name="dense"), layers.ReLU()])


def unique(kernel) -> int:
    return len(np.unique(keras.ops.convert_to_numpy(kernel)))


def trained(model, x=X, y=X, **arguments):
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, verbose=0, **arguments)
    return model


@pytest.mark.parametrize("start", Start)
def test_every_initialization(start):
    if start is Start.KMEANS_PLUS_PLUS:
        pytest.importorskip("sklearn")
    model = dense()
    clustered = clustering.cluster_weights(model, 4, start)
    trained(clustered)
    plain = clustering.strip_clustering(clustered)
    np.testing.assert_array_equal(plain.predict(X, verbose=0), clustered.predict(X, verbose=0))
    assert unique(plain.layers[0].kernel) <= 4
    assert unique(model.layers[0].kernel) == 64  # The original stays.


def test_zeros_stay_zeros():
    model = dense()
    kernel, bias = model.layers[0].get_weights()
    kernel[:4] = 0
    model.layers[0].set_weights([kernel, bias])
    clustered = trained(
        clustering.cluster_weights(model, 4, Start.LINEAR, preserve_sparsity=True), epochs=3
    )
    after = np.asarray(clustering.strip_clustering(clustered).layers[0].kernel.value)
    np.testing.assert_array_equal(after == 0, kernel == 0)


def test_per_channel_is_for_conv2d_and_from_tfmots_module():
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(3, 3, name="conv")(x)
    tiny = layers.Conv2D(1, 1, use_bias=False, name="tiny")(layers.DepthwiseConv2D(3)(h))
    model = keras.Model(x, layers.Dense(4, name="dense")(layers.Flatten()(tiny)))
    cluster = clustering.experimental.cluster
    clustered = cluster.cluster_weights(model, 4, Start.LINEAR, cluster_per_channel=True)
    found = {
        layer.layer.name: [tuple(each.shape) for each in layer.centroids.values()]
        for layer in clustered.layers
        if isinstance(layer, Cluster)
    }
    assert found == {"conv": [(3, 4)], "dense": [(4,)]}  # The tiny one has 3 weights.


class Own(layers.Layer, clustering.ClusterableLayer):
    def build(self, shape):
        self.first = self.add_weight(shape=(shape[-1], 4), name="first")
        self.second = self.add_weight(shape=(shape[-1], 4), name="second")

    def call(self, x):
        return x @ self.first + x @ self.second

    def get_clusterable_weights(self):
        return [("first", self.first)]


def test_a_layer_says_which_of_its_weights_are_clustered():
    clustered = clustering.cluster_weights(Own(name="own"), 3, Start.LINEAR)
    assert clustered.name == "cluster_own"
    model = keras.Sequential([keras.Input((8,)), clustered])
    assert [path.split("/")[-1] for path in clustered.centroids] == ["first"]
    trained(model, y=np.ones((16, 4)))


def subclassed():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = layers.Embedding(9, 4)
            self.outer = layers.GRU(3)

        def call(self, x):
            return self.outer(self.inner(x) * 2.0)

    model = Model()
    model(np.zeros((1, 3), "int32"))
    return model


def test_a_subclassed_model_with_a_table_and_recurrent_kernels():
    x = RNG.integers(0, 9, (8, 3))
    clustered = clustering.cluster_weights(subclassed(), 4, Start.LINEAR)
    trained(clustered, x, np.ones((8, 3)))
    plain = clustering.strip_clustering(clustered)
    kernels = [w for w in plain.weights if len(w.shape) > 1 and "bias" not in w.name]
    assert len(kernels) == 3
    assert all(unique(w) <= 4 for w in kernels)


def test_summaries_are_written(tmp_path):
    clustered = clustering.cluster_weights(dense(), 4, Start.LINEAR)
    summaries = clustering.ClusteringSummaries(str(tmp_path), cluster_update_freq="batch")
    trained(clustered, callbacks=[summaries])
    assert any(b"clustering/" in path.read_bytes() for path in tmp_path.glob("events*"))


def test_lists_and_layers_that_are_clustered_already():
    first, second = clustering.cluster_weights([layers.Dense(4), layers.ReLU()], 4, Start.LINEAR)
    assert isinstance(first, Cluster)
    assert isinstance(second, layers.ReLU)
    assert clustering.cluster_weights(first, 4, Start.LINEAR) is first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"number_of_clusters": 4.0}, "number_of_clusters must be an integer"),
        ({"number_of_clusters": 1}, "number_of_clusters must be greater than 1. Given: 1"),
        ({"number_of_clusters": 2, "preserve_sparsity": True}, "must be greater than 2. Given: 2"),
        (
            {"number_of_clusters": 4, "cluster_centroids_init": "best"},
            "Cluster centroid initialization 'best' not supported",
        ),
        ({"number_of_clusters": 4, "to_cluster": "dense"}, "an object of type: str"),
        (
            {
                "number_of_clusters": 4,
                "cluster_centroids_init": Start.LINEAR,
                "cluster_gradient_aggregation": clustering.GradientAggregation.AVG,
            },
            "is not supported: the gradient of a centroid is the sum",
        ),
    ],
)
def test_bad_arguments_say_what_to_pass(arguments, text):
    with pytest.raises(ValueError, match=text):
        clustering.cluster_weights(**{"to_cluster": layers.Dense(4)} | arguments)
