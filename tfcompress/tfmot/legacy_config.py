"""Configs of Keras 2's layers, without the arguments that Keras 3 does not know any more."""

import inspect
import json
import pathlib
from collections.abc import Iterator

import h5py
import keras

# Arguments that say how a layer is computed, not what.
_HINTS = (
    "implementation",
    "experimental_autocast",
    "input_length",
    "fused",
)
# What Keras reads from keyword arguments that are in no signature.
_OF_EVERY_LAYER = ("batch_input_shape", "input_shape", "batch_shape", "layers", "build_input_shape")
_MODELS = ("Functional", "Model", "Sequential")
_BY_DEFAULT = (None, False, 1, [], {})


def modernize(path: pathlib.Path) -> None:
    """Take out of a model file of Keras 2 what stops Keras 3 from reading it.

    Args:
        path: A `.h5` file of a plain model; it is changed.

    Raises:
        ValueError: A layer, or an argument that is not at its default, that Keras 3 does not have.
    """
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in _layers(config):
            _modernize_layer(layer["class_name"], layer["config"])
        for graph in _dicts(config):
            _renumber_calls(graph)
        file.attrs["model_config"] = json.dumps(config)


def _layers(config) -> Iterator[dict]:
    """The configs of the layers at any depth."""
    return filter(_is_layer, _dicts(config))


def _dicts(config) -> Iterator[dict]:
    """The dicts in a config, at any depth."""
    if isinstance(config, dict):
        yield config
    for each in config.values() if isinstance(config, dict) else config:
        if isinstance(each, dict | list):
            yield from _dicts(each)


def _is_layer(config) -> bool:
    described = isinstance(config.get("class_name"), str) and isinstance(config.get("config"), dict)
    return described and "name" in config["config"] and "trainable" in config["config"]


def _renumber_calls(graph: dict) -> None:
    """Count the calls of nested models from 0; in Keras 2, their own graph was call 0."""
    if not {"layers", "input_layers", "output_layers"} <= graph.keys():
        return
    nested = {each["config"]["name"] for each in graph["layers"] if each["class_name"] in _MODELS}
    used = [node for each in graph["layers"] for node in each["inbound_nodes"]]
    references = list(_references([used, graph["output_layers"]]))
    for name in nested:
        calls = [each for each in references if each[0] == name]
        first = min((each[1] for each in calls), default=0)
        for each in calls:
            each[1] -= first


def _references(nested) -> Iterator[list]:
    """The `[layer name, call, output, ...]` in nested lists and dicts."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if not isinstance(nested, list):
        return
    if len(nested) > 2 and isinstance(nested[0], str) and isinstance(nested[1], int):
        yield nested
        return
    for each in nested:
        yield from _references(each)


def _modernize_layer(class_name: str, config: dict) -> None:
    kind = getattr(keras.layers, class_name, None)
    if class_name in _MODELS:
        return
    kind = kind or keras.saving.get_registered_object(class_name)
    if kind is None:
        raise ValueError(
            f"The layer {config['name']!r} of type {class_name} has no twin in Keras 3. Write it "
            "as a layer of Keras 3, and convert in keras.saving.custom_object_scope("
            f"{{'{class_name}': {class_name}}})."
        )
    known = set(_OF_EVERY_LAYER).union(*map(_arguments, kind.__mro__))
    for name in [name for name in config if name not in known]:
        value = config.pop(name)
        # The weights are there already, whatever they started from.
        unused = name in _HINTS or name.endswith("_initializer")
        harmless = unused or value in _BY_DEFAULT
        if not harmless:
            raise ValueError(
                f"The layer {config['name']!r} of type {class_name} has {name}={value!r}, which "
                "Keras 3 does not have. Leave the argument out in the old code, and save again."
            )


def _arguments(kind) -> list[str]:
    if "__init__" not in vars(kind) or kind is object:
        return []
    return list(inspect.signature(kind.__init__).parameters)
