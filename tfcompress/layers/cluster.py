"""Weight sharing: layers whose weights are a few trained values, and models made of them."""

import logging

import keras
import tensorflow as tf

from tfcompress.graph.cluster import Clusters, check_clusters, find_clusters
from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import copied, replay
from tfcompress.keras_hooks import nodes, walk
from tfcompress.keras_hooks.overlay import (
    Overlay,
    call_through,
    outside_of_calls,
    raw_value,
    set_source,
)
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops.clusters import nearest, num_channels, share

logger = logging.getLogger("tfcompress")


@keras.saving.register_keras_serializable(package="tfcompress")
class Cluster(CompressionWrapper):
    """Compute a layer with weights that are only a few different values, and train those.

    Each weight becomes a table of centroids and, for every element, the index of one. The layer
    sees the table looked up; training moves the centroids, by the sum of the gradients of the
    elements that share each, while the weight inside stays as it was clustered. All of it is the
    wrapper's own saved variables: a `.keras` file goes on from there, and no callback is needed.

    This makes files small once they are zipped, and makes nothing faster: `tfcompress.strip` gives
    a plain layer of the same size, with equal numbers in it.

    A gradient that is a sum over many elements is large: train with Adam or the like, or with SGD
    at a far smaller rate. To quantize, too, put the quantizer around this or inside: either way
    the shared values are rounded. Prune before: the zeros stay, and no new ones come.

    Args:
        layer: The layer to wrap. One that has weights is clustered as it is; a new one, when it is
            built, in the values it starts from.
        clusters: Number of different values of a weight, 2 or more; up to 256 take a byte each.
        initialization: How they are found: `"kmeans++"` (k-means, needs scikit-learn), `"linear"`,
            `"density"` or `"random"`; see `tfcompress.graph.cluster.find_clusters`.
        preserve_sparsity: Whether zeros stay exactly 0. Where a weight has any, one of its values
            is 0 for good, for them alone.
        per_channel: Whether each output channel has values of its own; an embedding has no
            channels.
        reassign: Whether the weight inside is trained along, straight through, and its elements
            move to the centroid that is nearest at each step. Takes the memory of training
            without.
        include: Glob or globs over the paths of the layer's variables; None for all kernels and
            embeddings, frozen ones as well: they are clustered, and not trained.
        exclude: Glob or globs to leave out.
        seed: Of the initialization.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: An argument is not one of the above, the layer is clustered already; when built:
            a layer without weights to cluster, weights that are not finite, a glob matches nothing.
        ImportError: scikit-learn is not installed.

    Example:

    >>> layer = keras.layers.Dense(50)
    >>> model = keras.Sequential([keras.Input((40,)), Cluster(layer, clusters=4)])
    >>> model.compile("adam", "mse")
    >>> _ = model.fit(tf.ones((8, 40)), tf.zeros((8, 50)), verbose=0)
    >>> [variable.numpy().shape for variable in model.layers[0].centroids.values()]
    [(4,)]

    Reference: Han et al. 2016, https://arxiv.org/abs/1510.00149.
    """

    def __init__(
        self,
        layer,
        clusters: int = 16,
        initialization: str = "kmeans++",
        preserve_sparsity: bool = True,
        per_channel: bool = False,
        reassign: bool = False,
        include=None,
        exclude=None,
        seed: int = 0,
        **kwargs,
    ):
        check_clusters(clusters, initialization)
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        if any(isinstance(inner, Cluster) for inner in _within(layer)):
            raise ValueError(
                f"The layer {layer.name!r} is clustered already. Pass it through tfcompress.strip "
                "first to cluster it again."
            )
        self.clusters = int(clusters)
        self.initialization = initialization
        self.preserve_sparsity = preserve_sparsity
        self.per_channel = per_channel
        self.reassign = reassign
        self.seed = seed
        self._tables: list[_Table] = []
        self._from_file = False

    @property
    def centroids(self) -> dict[str, keras.Variable]:
        """The trained values of each weight, by its path."""
        return {table.kernel.path: table.centroids for table in self._tables}

    @property
    def indices(self) -> dict[str, keras.Variable]:
        """Which of the values each element of a weight has, by its path.

        With `reassign`, the choice they started from.
        """
        return {table.kernel.path: table.indices for table in self._tables}

    @property
    def zeros(self) -> dict[str, keras.Variable]:
        """Whether the first of the values of each weight is fixed at 0, by its path."""
        return {table.kernel.path: table.zero for table in self._tables}

    @property
    def trainable(self) -> bool:
        """Whether the centroids are trained."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool):
        keras.layers.Wrapper.trainable.fset(self, value)
        self._freeze_kernels()

    @property
    def _plain(self):
        # Not an attribute, which Keras would save as a second layer.
        return [*_within(self.layer)][-1]

    def build(self, *args, **kwargs):
        """Build the layer inside, if it is not, and cluster what it has."""
        # Eagerly, also where Keras builds while it traces: k-means needs values.
        with outside_of_calls():
            super().build(*args, **kwargs)

    def build_state(self, was_built):
        """Make the tables, and cluster what the layer has."""
        self._tables = [self._table(*pair) for pair in self._chosen()]
        self._freeze_kernels()
        # What a file holds comes next: no k-means for weights that are about to be replaced.
        self._find("linear" if self._from_file else self.initialization)

    def build_from_config(self, config):
        """Build for variables that are about to be loaded."""
        self._from_file = True
        try:
            super().build_from_config(config)
        finally:
            self._from_file = False

    def find_clusters(self):
        """Cluster the weights that the layer has now, e.g. after they were loaded into it."""
        self._find(self.initialization)

    def call(self, *args, **kwargs):
        """The layer's own call, on shared weights."""
        overlay = Overlay(weights=[(table.kernel, tf.identity) for table in self._tables])
        return call_through(self._plain, overlay, self.layer, *args, **kwargs)

    def get_config(self):
        """The constructor arguments."""
        names = ("clusters", "initialization", "preserve_sparsity", "per_channel", "reassign")
        return {**super().get_config(), **{key: getattr(self, key) for key in (*names, "seed")}}

    def _chosen(self) -> list[tuple[keras.Variable, tuple[int, ...]]]:
        found = weight_axes(self._plain)
        include, exclude = walk.as_globs(self.include), walk.as_globs(self.exclude)
        paths = [variable.path for variable in self._plain.variables]
        walk.check_globs([*(include or ()), *(exclude or ())], paths)
        chosen = [pair for pair in found if walk.is_wanted(pair[0].path, include, exclude)]
        if not chosen:
            raise ValueError(
                f"The layer {self.layer.name!r} of type {type(self.layer).__name__} has no weight "
                f"to cluster with include={include} and exclude={exclude}. Expected a kernel or an "
                f"embedding with 2 or more axes; it has: {', '.join(paths) or 'no variable'}."
            )
        return chosen

    def _table(self, kernel, axes) -> "_Table":
        axes = axes if self.per_channel else tuple(range(len(kernel.shape)))
        channels = () if len(axes) == len(kernel.shape) else (num_channels(kernel.shape, axes),)
        state = {
            "centroids": ((*channels, self.clusters), "float32", kernel.trainable),
            "indices": (kernel.shape, "uint8" if self.clusters <= 256 else "int32", False),
            "zero": (channels, "bool", False),
        }
        made = {
            name: self.add_weight(
                shape=shape,
                initializer="zeros",
                dtype=dtype,
                trainable=trainable,
                autocast=False,
                aggregation="mean" if trainable else "only_first_replica",
                name=f"{kernel.name}_{name}",
            )
            for name, (shape, dtype, trainable) in state.items()
        }
        table = _Table(kernel, axes, self.reassign, **made)
        set_source(kernel, table.shared)
        return table

    def _find(self, initialization):
        settings = (self.clusters, initialization, self.preserve_sparsity)
        for table in self._tables:
            w = keras.ops.convert_to_numpy(table.kernel.value)
            table.assign(find_clusters(w, *settings, axes=table.axes, seed=self.seed))

    def _freeze_kernels(self):
        # Also whenever Keras sets `trainable` of all the layers inside.
        for table in () if self.reassign else self._tables:
            table.kernel.trainable = False


class _Table:
    """The variables that stand for one weight."""

    def __init__(self, kernel, axes, reassign, centroids, indices, zero):
        self.kernel, self.axes, self.reassign = kernel, axes, reassign
        self.centroids, self.indices, self.zero = centroids, indices, zero

    def shared(self, w: tf.Tensor) -> tf.Tensor:
        """What the layer sees where its own weight is `w`."""
        centroids, indices, zero = map(raw_value, (self.centroids, self.indices, self.zero))
        if self.reassign:
            indices = self._reassigned(tf.cast(w, tf.float32), centroids, indices, zero)
        found = tf.cast(share(centroids, indices, zero, self.axes), w.dtype)
        return found + (w - tf.stop_gradient(w)) if self.reassign else found

    def assign(self, found: Clusters):
        """Take over what was found for the weight."""
        self.centroids.assign(found.centroids)
        self.indices.assign(found.indices)
        self.zero.assign(found.zero)
        if not self.reassign:
            self.kernel.assign(found.weight())

    def _reassigned(self, w, centroids, indices, zero):
        indices = tf.cast(indices, tf.int32)
        moved = nearest(w, tf.stop_gradient(centroids), zero, self.axes)
        shape = [1 if i in self.axes else size for i, size in enumerate(w.shape)]
        held = tf.reshape(zero, shape) & tf.equal(indices, 0)
        return tf.where(held, indices, moved)


def cluster(
    model: keras.Model,
    clusters: int = 16,
    initialization: str = "kmeans++",
    preserve_sparsity: bool = True,
    per_channel: bool = False,
    include=None,
    exclude=None,
    seed: int = 0,
    *,
    reassign: bool = False,
    verbose: int = 1,
) -> keras.Model:
    """Let every kernel and embedding have only a few different values, ready to train these.

    Puts `layers.Cluster` around the layers of the flat graph, on copies of the weights. Train the
    result to recover accuracy; `tfcompress.strip` takes the wrappers off, with the shared values in
    the weights. What is saved is the size of the file once it is zipped: 16 values take 4 bits
    each. It makes nothing faster, and takes no less memory.

    Args:
        model: A built model that `tfcompress.expand` takes.
        clusters: See `tfcompress.layers.Cluster`.
        initialization: See `tfcompress.layers.Cluster`.
        preserve_sparsity: Whether zeros, as of pruning, stay exactly 0.
        per_channel: Whether each output channel has values of its own. Take it before a
            quantization with a scale for each channel.
        include: Glob or globs over `variable.path` of `model`; None for every kernel and embedding.
        exclude: Glob or globs to leave out.
        seed: Of the initialization.
        reassign: See `tfcompress.layers.Cluster`.
        verbose: Whether a bar shows the progress, a layer a step.

    Returns:
        A new model, not compiled.

    Raises:
        ValueError: An argument is not one of the above, a glob matches nothing, no weight is left
            to cluster, the model is clustered already or cannot be expanded.
        ImportError: scikit-learn is not installed, and `initialization` needs it.

    Example:

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(50, name="head")])
    >>> clustered = cluster(model, clusters=8, verbose=0)
    >>> [layer.name for layer in clustered.layers]
    ['input_layer...', 'cluster_head']
    >>> from tfcompress.layers import strip
    >>> len(np.unique(strip(clustered).layers[-1].kernel))
    8

    Reference: Han et al. 2016, https://arxiv.org/abs/1510.00149.
    """
    check_clusters(clusters, initialization)
    flat = expand(model)
    left_out = _left_out(model, flat, include, exclude)
    bar = keras.utils.Progbar(len(left_out), unit_name="layer", verbose=verbose)
    settings = {
        "clusters": clusters,
        "initialization": initialization,
        "preserve_sparsity": preserve_sparsity,
        "per_channel": per_channel,
        "reassign": reassign,
        "seed": seed,
    }
    return replay(copied(flat), _Wrapping(left_out, settings, bar))


def _left_out(model, flat, include, exclude) -> dict[str, list[int]]:
    """Layers to wrap, by name: which of their weights, as `weight_axes` counts, stay as they are.

    `flat` holds the variables of `model`.
    """
    include, exclude = walk.as_globs(include), walk.as_globs(exclude)
    named = walk.named_variables(model)
    walk.check_globs([*(include or ()), *(exclude or ())], named)
    paths = {id(variable): path for path, variable in named.items()}
    left_out = {}
    for layer in flat.layers:
        found = [paths.get(id(variable), "") for variable, _ in weight_axes(layer)]
        unwanted = [i for i, path in enumerate(found) if not walk.is_wanted(path, include, exclude)]
        if len(unwanted) < len(found):
            left_out[layer.name] = unwanted
    if not left_out:
        raise ValueError(
            f"No weight of {model.name!r} is left to cluster: include={include}, "
            f"exclude={exclude}. Expected one kernel or embedding at least; this model has: "
            f"{', '.join(named)}."
        )
    return left_out


class _Wrapping:
    """Calls the operations of a flat graph, with wrappers around the layers to cluster."""

    def __init__(self, left_out, settings, bar):
        self.left_out, self.settings, self.bar = left_out, settings, bar
        self.wrappers: dict[str, Cluster] = {}

    def __call__(self, call: nodes.Call, args, kwargs):
        name = call.operation.name
        if name not in self.left_out:
            return call.operation(*args, **kwargs)
        if name in self.wrappers:  # A shared layer.
            return self.wrappers[name](*args, **kwargs)
        self.wrappers[name] = self._wrapper(call.operation)
        outputs = self.wrappers[name](*args, **kwargs)
        logger.info("Clustered %s", list(self.wrappers[name].centroids))
        self.bar.add(1)
        return outputs

    def _wrapper(self, layer) -> Cluster:
        found = [variable.path for variable, _ in weight_axes(layer)]
        # A path up to the layer is another one in every model, and in a loaded one.
        globs = [f"*{layer.name}/{_behind(found[i], layer)}" for i in self.left_out[layer.name]]
        return Cluster(layer, exclude=globs or None, **self.settings)


def _behind(path: str, layer) -> str:
    return path.split(f"{layer.name}/", 1)[-1]


def _within(layer):
    """A layer and, where it is a wrapper of tfcompress, what it wraps."""
    yield layer
    while isinstance(layer, CompressionWrapper):
        layer = layer.layer
        yield layer
