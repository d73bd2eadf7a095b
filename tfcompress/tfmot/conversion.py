"""A model of Keras 2, in mid-training under TFMOT or plain, as one of Keras 3."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import keras
import numpy as np

from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers import Cluster, Prune
from tfcompress.schedules import TFMOTSchedule, import_tfmot, is_due
from tfcompress.tfmot import tf_keras_reader
from tfcompress.tfmot.keras2 import is_keras_2
from tfcompress.tfmot.legacy_config import modernize
from tfcompress.tfmot.models import depthwise_kernels, wrapped
from tfcompress.tfmot.pruning import pruning_settings
from tfcompress.tfmot.pruning_schedules import OFFSET, ConstantSparsity, PolynomialDecay
from tfcompress.tfmot.quantize_config import QuantizeAnnotate, QuantizeAt
from tfcompress.tfmot.weight_clustering import clustering_settings

_NEVER = -1
_SCHEDULES = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}


def convert(model_or_path) -> keras.Model:
    """A model of Keras 2 (`tf_keras`) as one of Keras 3, with the state of its TFMOT wrappers.

    Layers in pruning wrappers come in `tfcompress.layers.Prune`, with their masks and the step of
    their schedule, those that are clustered in `layers.Cluster`, with their centroids, those that
    are quantized in `layers.Quantize`, with their ranges, and those that are annotated as
    `tfcompress.tfmot.quantization.keras.quantize_apply` takes them. Compile it and train on.

    A file is read in a process of its own, which needs `tf_keras`, and TFMOT if the model is
    wrapped; this process stays with Keras 3. Optimizer states are not taken over.

    Args:
        model_or_path: A Functional or Sequential model of tf_keras; or the path of one, as `.h5`,
            `.keras` (as tf_keras writes it) or the directory of a SavedModel.

    Returns:
        The model of Keras 3, not compiled. Its outputs equal those of the old one; those of a
        quantized model, whose weights TFMOT rounds to the range of the step before, may be a step
        of an integer apart.

    Raises:
        ValueError: Nothing is there, it is of Keras 3 already, a subclassed model, or it has a
            layer, a schedule or a quantizer that Keras 3 or tfcompress does not have; the message
            names it and says what to do.
        ImportError: tf_keras is not installed.

    Example:

    >>> convert("missing.h5")
    Traceback (most recent call last):
    ...
    ValueError: There is no model at 'missing.h5'. Pass the path of a .h5 or .keras file...
    """
    with tempfile.TemporaryDirectory() as directory:
        parts = pathlib.Path(directory)
        if isinstance(model_or_path, str | os.PathLike):
            _take_file_apart(pathlib.Path(model_or_path), parts)
        elif is_keras_2(model_or_path):
            tf_keras_reader.take_apart(model_or_path, parts)
        else:
            raise ValueError(
                "convert takes a model of Keras 2 (tf_keras) or the path of one, got "
                f"{type(model_or_path).__name__} from {type(model_or_path).__module__}. Models of "
                "Keras 3 need no conversion."
            )
        return _put_together(parts)


def _take_file_apart(path: pathlib.Path, parts: pathlib.Path) -> None:
    if not path.exists():
        raise ValueError(
            f"There is no model at {str(path)!r}. Pass the path of a .h5 or .keras file of Keras "
            "2, or the directory of a SavedModel."
        )
    _refuse_keras_3_file(path)
    result = subprocess.run(
        # -P: the directory of the program is no place to import from.
        [sys.executable, "-P", tf_keras_reader.__file__, str(path.resolve()), str(parts)],
        env=os.environ | {"TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return
    told = parts / "error.txt"
    reason = told.read_text(encoding="utf-8") if told.exists() else result.stderr[-2000:]
    if "No module named 'tf_keras'" in reason + result.stderr:
        raise ImportError(
            f"Reading {str(path)!r} needs the package 'tf_keras', which is not installed. Install "
            'it with: pip install "tfcompress[tfmot]"'
        )
    missing = "TFMOT is not there" in result.stderr
    hint = (
        ' Install TFMOT as well: pip install "tfcompress[tfmot]".'
        if missing
        else " If it has classes of your own, which another process cannot find, load it with "
        "tf_keras in yours, and pass the model instead of its path."
    )
    raise ValueError(f"The model in {str(path)!r} could not be converted: {reason}{hint}")


def _refuse_keras_3_file(path):
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        version = json.loads(archive.read("metadata.json")).get("keras_version", "")
    if version.startswith("3"):
        raise ValueError(
            f"{str(path)!r} was saved by Keras {version}. Load it with keras.models.load_model."
        )


def _put_together(parts: pathlib.Path) -> keras.Model:
    modernize(parts / tf_keras_reader.PLAIN)
    plain = keras.models.load_model(parts / tf_keras_reader.PLAIN, compile=False)
    layers = json.loads((parts / tf_keras_reader.DESCRIPTION).read_text(encoding="utf-8"))
    with np.load(parts / tf_keras_reader.STATE) as arrays:
        restoring = []

        def wrap(layer):
            described = layers.get(layer.name)
            if described is None:
                return layer
            wrapper, restore = _WRAPPING[described["kind"]](layer, described, arrays)
            if wrapper is not layer:
                restoring.append((restore, wrapper, layer, described))
            return wrapper

        model = wrapped(plain, wrap)
        for restore, wrapper, layer, described in restoring:
            restore(wrapper, layer, described, arrays)
    return model


def _pruned(layer, described, arrays):
    if not described["masks"]:
        return layer, None
    schedule = described["schedule"]
    settings = pruning_settings(
        TFMOTSchedule(_schedule(layer, **schedule), OFFSET),
        described["block_size"],
        described["block_pooling_type"],
        described["sparsity_m_by_n"],
    )
    name = f"prune_low_magnitude_{layer.name}"
    wrapper = Prune(layer, exclude=depthwise_kernels(layer), name=name, **settings)
    return wrapper, _restore_pruned


def _schedule(layer, module, class_name, config):
    if class_name in _SCHEDULES:
        return _SCHEDULES[class_name](**config)
    kind = keras.saving.get_registered_object(class_name)
    if kind is None and module.split(".")[0] == "tensorflow_model_optimization":
        kind = getattr(import_tfmot(module), class_name)
    if kind is None:
        raise ValueError(
            f"The layer {layer.name!r} is pruned by the schedule {class_name}, which is not one of "
            "TFMOT's. Write it as a subclass of tfcompress.tfmot.sparsity.keras.PruningSchedule, "
            f"and convert in keras.saving.custom_object_scope({{'{class_name}': {class_name}}})."
        )
    return kind.from_config(config)


def _restore_pruned(wrapper, layer, described, arrays):
    step = described["step"]
    for index in described["masks"]:
        held = layer.weights[index].constraint
        held.mask.assign(arrays[f"{layer.name}/mask/{index}"])
        held.step.assign(max(step, 0))
        # A choice that TFMOT makes before the next batch is made in the next update.
        pending = step < 1 or is_due(held.schedule, step, wrapper.frequency)
        held.updated_at.assign(_NEVER if pending else step)


def _clustered(layer, described, arrays):
    if not described["weights"]:
        return layer, None
    settings = clustering_settings(
        described["number_of_clusters"],
        described["cluster_centroids_init"],
        described["preserve_sparsity"],
        described["cluster_per_channel"],
    )
    # The centroids are known: nothing is to be found.
    linear = settings | {"initialization": "linear", "name": f"cluster_{layer.name}"}
    wrapper = Cluster(layer, exclude=depthwise_kernels(layer), **linear)
    wrapper.initialization = settings["initialization"]
    return wrapper, _restore_clustered


def _restore_clustered(wrapper, layer, described, arrays):
    for index in described["weights"]:
        path = layer.weights[index].path
        centroids = arrays[f"{layer.name}/centroids/{index}"]
        if described["preserve_sparsity"]:
            # TFMOT's zero is among the others; ours comes first, and is held for its elements.
            first = np.argsort(centroids != 0.0, axis=-1, kind="stable")
            centroids = np.take_along_axis(centroids, first, -1)
            wrapper.zeros[path].assign(np.ones(wrapper.zeros[path].shape, bool))
            wrapper.indices[path].assign(~arrays[f"{layer.name}/zeros/{index}"])
        wrapper.centroids[path].assign(centroids)


def _quantized(layer, described, arrays):
    schemes = list(described["weights"].values())
    if len({json.dumps(each) for each in schemes}) > 1:
        raise ValueError(
            f"The weights of {layer.name!r} are quantized in several ways, {schemes}; tfcompress "
            "has one for a layer."
        )
    ranges = described["ranges"]
    if not schemes and not ranges:
        return layer, None
    activations = {"bits": described["bits"], "symmetric": False, "granularity": "tensor"}
    wanted = {id(layer.weights[int(index)]) for index in described["weights"]}
    kernels = [variable for variable, _ in weight_axes(layer)]
    left_out = [f"*/{variable.name}" for variable in kernels if id(variable) not in wanted]
    wrapper = QuantizeAt(
        layer,
        places=list(ranges),
        weights=schemes[0] if schemes else None,
        activations=activations if ranges else None,
        exclude=left_out if schemes and left_out else None,
        name=layer.name if layer.name.startswith("quantize_layer") else f"quant_{layer.name}",
    )
    return wrapper, _restore_quantized


def _restore_quantized(wrapper, layer, described, arrays):
    for place, bounds in described["ranges"].items():
        wrapper.quantizer.ranges[place].variable.assign(bounds)


def _annotated(layer, described, arrays):
    return QuantizeAnnotate(layer), lambda *arguments: None


_WRAPPING = {
    "prune": _pruned,
    "cluster": _clustered,
    "quantize": _quantized,
    "annotate": _annotated,
}
