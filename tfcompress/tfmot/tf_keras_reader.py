"""Taking a model of Keras 2 apart: a plain .h5 file, and what its TFMOT wrappers hold.

This file is also run as a program in a process of its own, where Keras is Keras 2. So it imports
nothing of tfcompress, and Keras 2 and TFMOT only when they are asked for.
"""

import contextlib
import importlib
import json
import pathlib
import sys

import numpy as np

PLAIN, STATE, DESCRIPTION = "plain.h5", "state.npz", "description.json"

# What became of layers that Keras 3 does not have.
_ADVICE = {
    "TFOpLambda": "an operator such as x + y, or a tf function on symbolic tensors: write it as a "
    "layer (Add, Multiply, Rescaling, ...) in the old code and save again",
    "SlicingOpLambda": "a slice of a symbolic tensor: write it as a Cropping layer or a layer of "
    "your own in the old code and save again",
    "ClassMethod": "a method of a symbolic tensor: write it as a layer in the old code",
    "ThresholdedReLU": "use ReLU(threshold=theta) in the old code and save again",
    "LocallyConnected1D": "it is gone from Keras; a Conv1D or a layer of your own takes its place",
    "LocallyConnected2D": "it is gone from Keras; a Conv2D or a layer of your own takes its place",
    "DenseFeatures": "use keras.utils.FeatureSpace in Keras 3",
    "Lambda": "write its function as a layer of your own and save again: a file would run its code",
}


def take_apart(model, directory) -> None:
    """Write a model of Keras 2 without its TFMOT wrappers, and what those hold.

    Args:
        model: A Functional or Sequential model of tf_keras.
        directory: Where `plain.h5`, `state.npz` and `description.json` go.

    Raises:
        ValueError: A layer that has no twin in Keras 3, or a wrapper that holds the user's own.
    """
    directory = pathlib.Path(directory)
    reading = _Reading()
    plain = reading.plain(model)
    plain.save(directory / PLAIN, include_optimizer=False, save_format="h5")
    np.savez(directory / STATE, **reading.arrays)
    (directory / DESCRIPTION).write_text(json.dumps(reading.layers), encoding="utf-8")


class _Reading:
    """`layers`: by the name of the plain layer what its wrapper is; `arrays`: what it holds."""

    def __init__(self):
        self.layers, self.arrays = {}, {}
        self.keras = importlib.import_module("tf_keras")

    def plain(self, model):
        """The model without wrappers."""
        if not (isinstance(model, self.keras.Sequential) or getattr(model, "_is_graph_network", 0)):
            raise ValueError(
                f"{model.name!r} of type {type(model).__name__} is a subclassed model of Keras 2, "
                "whose code a file does not hold. Build its class on Keras 3, and load the weights "
                "with load_weights."
            )
        if not model.built:
            raise ValueError(f"{model.name!r} is not built. Call it on a batch first.")
        values = []

        def unwrapped(layer):
            if isinstance(layer, self.keras.Model):
                return self.plain(layer)
            self._check(layer)
            twin, weights = self._read(layer)
            values.append((twin, weights))
            return twin

        plain = self.keras.models.clone_model(model, clone_function=unwrapped)
        for twin, weights in values:
            twin.set_weights(weights)
        return plain

    def _check(self, layer):
        inner = layer
        while _kind(inner) and hasattr(inner, "layer"):
            inner = inner.layer
        name = type(inner).__name__
        if name in _ADVICE:
            raise ValueError(
                f"The layer {inner.name!r} of type {name} has no twin in Keras 3: {_ADVICE[name]}."
            )
        if any(_reads_by_keyword(node) for node in layer.inbound_nodes):
            raise ValueError(
                f"The layer {inner.name!r} of type {name} is called on several tensors as separate "
                "arguments, which Keras 3 does not read from configs of Keras 2. Build the model "
                "by its code on Keras 3, and copy the weights layer by layer with set_weights."
            )

    def _read(self, layer):
        """A plain twin of a layer, and its weights."""
        kind = _kind(layer)
        if kind is None:
            return layer.__class__.from_config(layer.get_config()), layer.get_weights()
        if kind == "input":
            return self._read_input(layer)
        twin = layer.layer.__class__.from_config(_plain_config(layer.layer))
        described, weights = getattr(self, f"_read_{kind}")(layer, twin)
        self.layers[twin.name] = {"kind": kind, **described}
        return twin, weights

    def _read_prune(self, layer, twin):
        weights, paths = layer.layer.get_weights(), layer.layer.weights
        masks = []
        for weight, mask, _ in layer.pruning_vars:
            index = next(i for i, each in enumerate(paths) if each is weight)
            mask = mask.numpy() != 0
            weights[index] = np.where(mask, weights[index], 0)  # As inference sees it.
            masks.append(index)
            self.arrays[f"{twin.name}/mask/{index}"] = mask
        schedule = layer.pruning_schedule
        config = schedule.get_config()
        return {
            "masks": masks,
            "step": int(layer.pruning_step.numpy()),
            "schedule": {
                "module": type(schedule).__module__,
                "class_name": type(schedule).__name__,
                "config": config.get("config", config),
            },
            "block_size": list(layer.block_size),
            "block_pooling_type": layer.block_pooling_type,
            "sparsity_m_by_n": layer.sparsity_m_by_n and list(layer.sparsity_m_by_n),
        }, weights

    def _read_cluster(self, layer, twin):
        layer.update_clustered_weights_associations()
        # Those inside are trained along, as with `reassign`; the layer has lost track of them.
        weights, places = layer.layer.get_weights(), layer.position_original_weights
        for place in sorted(places):
            weights.insert(place, layer.original_clusterable_weights[places[place]].numpy())
        for place, name in places.items():
            centroids = layer.cluster_centroids[name].numpy()
            self.arrays[f"{twin.name}/centroids/{place}"] = centroids
            if layer.preserve_sparsity:
                # The masks that TFMOT has for them are not saved; these are what it computes with.
                zeros = np.asarray(layer.get_weight_from_layer(name)) == 0
                self.arrays[f"{twin.name}/zeros/{place}"] = zeros
        return {
            "weights": sorted(places),
            "number_of_clusters": layer.number_of_clusters,
            "cluster_centroids_init": str(layer.cluster_centroids_init.value),
            "preserve_sparsity": bool(layer.preserve_sparsity),
            "cluster_per_channel": bool(layer.cluster_per_channel),
        }, weights

    def _read_annotate(self, layer, twin):
        if layer.quantize_config is not None:
            raise ValueError(
                f"The layer {twin.name!r} is annotated with a QuantizeConfig of its own, "
                f"{type(layer.quantize_config).__name__}, written for Keras 2. Convert the model "
                "before it is annotated, and annotate it with tfcompress.tfmot."
            )
        return {}, layer.layer.get_weights()

    def _read_quantize(self, layer, twin):
        by_name = {_name(weight): weight.numpy() for weight in layer.weights}
        twin.build(_input_shape(layer))
        weights = [by_name[_name(weight)] for weight in twin.weights]
        pairs = layer.quantize_config.get_weights_and_quantizers(layer.layer)
        schemes = [_scheme(quantizer, twin.name, weight.shape) for weight, quantizer in pairs]
        ranged = [f"{_name(weight)}_min" in by_name for weight in twin.weights]
        # By index: Keras 3 has other names for some.
        quantized = dict(zip(np.flatnonzero(ranged).tolist(), schemes, strict=True))
        ranges, bits = {}, 8
        for place, name in _PLACES:
            if f"{name}_min" in by_name:
                ranges[place] = [float(by_name[f"{name}_{end}"]) for end in ("min", "max")]
        for _, quantizer in layer.quantize_config.get_activations_and_quantizers(layer.layer):
            bits = quantizer.num_bits
        for quantizer in layer.quantize_config.get_output_quantizers(layer.layer):
            bits = quantizer.num_bits
        return {"weights": quantized, "ranges": ranges, "bits": bits}, weights

    def _read_input(self, layer):
        by_name = {_name(weight): weight.numpy() for weight in layer.weights}
        twin = self.keras.layers.Activation("linear", name=layer.name)
        ends = [f"{layer.name}_min", f"{layer.name}_max"]
        ranges = {}
        if layer.quantizer is not None and ends[0] in by_name:
            ranges["output"] = [float(by_name[end]) for end in ends]
        bits = getattr(layer.quantizer, "num_bits", 8)
        described = {"kind": "quantize", "weights": {}, "ranges": ranges, "bits": bits}
        self.layers[twin.name] = described
        return twin, []


_PLACES = (("preactivation", "pre_activation"), ("output", "post_activation"), ("output", "output"))
_KINDS = {
    "PruneLowMagnitude": "prune",
    "ClusterWeights": "cluster",
    "ClusterWeightsRNN": "cluster",
    "ClusterWeightsMHA": "cluster",
    "QuantizeAnnotate": "annotate",
    "QuantizeWrapper": "quantize",
    "QuantizeWrapperV2": "quantize",
    "QuantizeLayer": "input",
}


def _kind(layer) -> str | None:
    """What a wrapper of TFMOT is for; None for other layers."""
    names = [each.__name__ for each in type(layer).__mro__]
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _reads_by_keyword(node) -> bool:
    """Whether a layer was called on tensors other than those in its first argument."""
    others = list(node.call_args[1:]), dict(node.call_kwargs)
    tensors = importlib.import_module("tensorflow").nest.flatten(others)
    return any(type(each).__name__ == "KerasTensor" for each in tensors)


def _name(weight) -> str:
    return weight.name.split(":")[0].split("/")[-1]


def _input_shape(layer):
    return layer.get_input_shape_at(0)


def _scheme(quantizer, name, shape) -> dict:
    if not hasattr(quantizer, "num_bits") or not hasattr(quantizer, "symmetric"):
        raise ValueError(
            f"The layer {name!r} is quantized by {type(quantizer).__name__}, a quantizer of its "
            "own. Convert the model before it is quantized, and quantize it with tfcompress.tfmot."
        )
    # The last axis of a depthwise kernel is that of the multiplier, mostly 1: one scale in all.
    per_channel = bool(quantizer.per_axis) and shape[-1] > 1
    return {
        "bits": quantizer.num_bits,
        "symmetric": bool(quantizer.symmetric),
        "granularity": "channel" if per_channel else "tensor",
    }


def _plain_config(layer) -> dict:
    """The config of a layer, without the activations that TFMOT put into it."""
    config = layer.get_config()
    for key, value in config.items():
        if isinstance(value, dict) and value.get("class_name") == "QuantizeAwareActivation":
            config[key] = _activation(value["config"]["activation"])
        elif isinstance(value, dict) and value.get("class_name") == "NoOpActivation":
            config[key] = "linear"
    return config


def _activation(value):
    inner = value.get("class_name") if isinstance(value, dict) else value
    return "linear" if inner == "NoOpActivation" else value


def load(path):
    """Read a model of Keras 2 from a file or directory, TFMOT wrappers included."""
    keras = importlib.import_module("tf_keras")
    with _scopes():
        return keras.models.load_model(path, compile=False)


@contextlib.contextmanager
def _scopes():
    """The names of TFMOT's classes; without TFMOT, files without wrappers are read all the same."""
    try:
        tfmot = importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        sys.stderr.write(f"TFMOT is not there, so no wrapper of it can be read: {error}\n")
        yield
        return
    module = "tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper"
    clustering = importlib.import_module(module)
    keras = importlib.import_module("tf_keras")
    kinds = {name: getattr(clustering, name) for name in _KINDS if hasattr(clustering, name)}
    with (
        tfmot.sparsity.keras.prune_scope(),
        tfmot.quantization.keras.quantize_scope(),
        keras.utils.custom_object_scope(kinds),
    ):
        yield


def main(path, directory) -> None:
    """Take the model in `path` apart into `directory`; what is in its way goes to `error.txt`."""
    try:
        take_apart(load(path), directory)
    except (ValueError, OSError, TypeError, AttributeError, ImportError) as error:
        (pathlib.Path(directory) / "error.txt").write_text(str(error), encoding="utf-8")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
