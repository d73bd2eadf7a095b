"""Points in a model, by path: what there is, and what flows through them in a step.

A point is the output of a layer, or of an op of a Functional graph, named by its path in the model:
`block_1/conv`. A layer that is called again (shared weights) has a point for each call,
`block_1/conv#2`. With `:input` behind it, the path names what the layer is called on. `output:0` is
the first output of the model.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfcompress.keras_hooks.capture import Record, recording
from tfcompress.keras_hooks.overlay import outside_of_calls
from tfcompress.values import Value

_INPUT = ":input"
_OUTPUT = "output:{}"


class AttentionPoints(tuple):
    """The points of query, key and value of one call of an attention layer.

    Attributes:
        layer: The path of the layer, with `#2`, ... of a further call.
    """

    layer = ""


@dataclasses.dataclass(frozen=True)
class Points(Value):
    """The points of one model in the order in which they are computed, and their shapes.

    Args:
        model: The name of the model, for messages.
        shapes: Point -> shape, sizes that are not fixed as None.
        outputs: The points of the model's outputs: `output:0`, ...
        activations: For each output `"softmax"`, `"sigmoid"` or `"linear"`.
        embedding: The input of the last layer with weights: what the classifier reads.
    """

    model: str
    shapes: dict[str, tuple]
    outputs: tuple[str, ...]
    activations: tuple[str, ...]
    embedding: str | None

    @classmethod
    def from_config(cls, config):
        """What `get_config` described, also once it has been JSON."""
        config = dict(config)
        config["shapes"] = {name: tuple(shape) for name, shape in config["shapes"].items()}
        return cls(**config | {key: tuple(config[key]) for key in ("outputs", "activations")})

    def match(self, globs: str | Sequence[str], what: str) -> list[str]:
        """The points that any of `globs` matches, in order of computation.

        Args:
            globs: Globs over whole names.
            what: Who asks, for the message.

        Returns:
            Names, at least one.

        Raises:
            ValueError: A glob matches nothing; the message lists the points.

        Example:

        >>> points = Points("net", {"a": (None, 4), "b": (None, 2)}, ("b",), ("linear",), "a")
        >>> points.match("*", "features")
        ['a', 'b']
        """
        globs = [globs] if isinstance(globs, str) else list(globs)
        for glob in globs:
            if not fnmatch.filter(self.shapes, glob):
                raise ValueError(
                    f"The glob {glob!r} of {what} matches no point of {self.model!r}. It is "
                    f"compared with whole paths; there are: {self._listed()}."
                )
        # A glob does not reach inputs and outputs of the model unless it says so.
        hits = [
            name
            for name in self.shapes
            for glob in globs
            if fnmatch.fnmatchcase(name, glob) and (":" in glob or ":" not in name)
        ]
        return list(dict.fromkeys(hits))

    def attention(self, globs, parts: Sequence[str], what: str) -> list["AttentionPoints"]:
        """The attention layers that `globs` match, each as the points of its query, key, value.

        In a flat graph (`tfcompress.expand`), where `attention/query` is `attention_query`, the
        layer is what these names begin with.

        Args:
            globs: Globs over the paths of layers; None for all that have such parts.
            parts: The names of the parts in the layer.
            what: Who asks, for the message.

        Returns:
            The names, in the order of `parts`, for each call of a layer.

        Raises:
            ValueError: There is none, or a glob matches another layer only.
        """
        last = parts[-1]
        found = {}
        for name in self.shapes:
            match = re.fullmatch(rf"(.+)([/_]){re.escape(last)}(#\d+)?", name)
            if match:
                layer, separator, call = match[1], match[2], match[3] or ""
                points = AttentionPoints(f"{layer}{separator}{part}{call}" for part in parts)
                points.layer = layer + call
                if all(point in self.shapes for point in points):
                    found[points.layer] = points
        globs = ["*"] if globs is None else [globs] if isinstance(globs, str) else list(globs)
        for glob in globs:
            if not fnmatch.filter(found, glob):
                raise ValueError(
                    f"The glob {glob!r} of {what} matches no attention layer of {self.model!r} "
                    f"with the parts {tuple(parts)}; there are: {', '.join(found) or 'none'}. "
                    "Pass parts= as the layers in yours are called."
                )
        return [p for name, p in found.items() if any(fnmatch.fnmatchcase(name, g) for g in globs)]

    def _listed(self) -> str:
        return ", ".join(name for name in self.shapes if ":" not in name)


def trace_points(model: keras.Model, inputs: Any) -> Points:
    """The points of a model that is called on `inputs`; nothing is computed, nothing changed.

    Args:
        model: Any model; what is not built is built.
        inputs: Nested tensors, `KerasTensor`s or arrays; the first axis is taken as any size.

    Returns:
        The `Points`. What is computed inside of loops (cells of RNNs) is not among them.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> trace_points(model, model.inputs[0]).shapes
    {'head:input': (None, 4), 'head': (None, 2), 'output:0': (None, 2)}
    """
    found = []

    def run(x):
        graph = tf.compat.v1.get_default_graph()
        with recording(model) as records:
            outputs = keras.tree.flatten(model(x, training=False))
        inside = [r for r in records if getattr(r.output, "graph", None) is graph]
        found.append(_points(model, inside, outputs, graph))
        return outputs

    with outside_of_calls():
        tf.function(run, autograph=False).get_concrete_function(
            keras.tree.map_structure(_spec, inputs)
        )
    return found[-1]


def _spec(x) -> tf.TensorSpec:
    shape = (None, *x.shape[1:]) if len(x.shape) else ()
    return tf.TensorSpec(shape, keras.backend.standardize_dtype(x.dtype))


def _points(model, records: list[Record], outputs, graph) -> Points:
    shapes = {}
    for record in records:
        if getattr(record.input, "graph", None) is graph:
            shapes[record.path + _INPUT] = tuple(record.input.shape)
        shapes[record.path] = tuple(record.output.shape)
    names = tuple(_OUTPUT.format(i) for i in range(len(outputs)))
    shapes.update((name, tuple(x.shape)) for name, x in zip(names, outputs, strict=True))
    # Models come after the layers whose output they return.
    makers = {id(record.output): record for record in reversed(records)}
    embedding = _embedding(makers, outputs[0])
    return Points(
        model.name,
        shapes,
        names,
        tuple(_activation(makers.get(id(x))) for x in outputs),
        embedding if embedding in shapes else None,
    )


def _embedding(makers, tensor) -> str | None:
    record = makers.get(id(tensor))
    while record is not None and not getattr(record.operation, "weights", None):
        record = makers.get(id(record.input))
    return None if record is None else record.path + _INPUT


def _activation(record: Record | None) -> str:
    operation = record and record.operation
    activation = getattr(operation, "activation", None)
    kinds = {"softmax": keras.layers.Softmax, "sigmoid": ()}
    for name, layer in kinds.items():
        is_op = type(operation).__name__.lower() == name
        if activation is getattr(keras.activations, name) or isinstance(operation, layer) or is_op:
            return name
    return "linear"


def observe(model: keras.Model, inputs, names: Iterable[str], training: bool):
    """Run a model once and read points.

    Args:
        model: A model.
        inputs: What it is called on.
        names: Points.
        training: As in Keras.

    Returns:
        `(outputs, point -> tensor)`; every output of the model is among the points.

    Raises:
        ValueError: A point is not reached in this call.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU(name="relu")])
    >>> _, tensors = observe(model, keras.ops.ones((1, 2)), ["relu:input"], training=False)
    >>> list(tensors)
    ['relu:input', 'output:0']
    """
    names = [name for name in names if not name.startswith("output:")]
    tensors = {}
    with recording(model, {_path(name) for name in names}) as records:
        outputs = model(inputs, training=training)
    for record in records:
        tensors[record.path] = record.output
        tensors[record.path + _INPUT] = record.input
    missing = [name for name in names if tensors.get(name) is None]
    if missing:
        raise ValueError(
            f"{model.name!r} did not reach the points {missing} in this call, and it did when it "
            "was traced. Points must not depend on the input."
        )
    tensors = {name: tensors[name] for name in names}
    flat = keras.tree.flatten(outputs)
    tensors.update((_OUTPUT.format(i), x) for i, x in enumerate(flat))
    return outputs, tensors


def _path(name: str) -> str:
    return re.sub(r"#\d+$", "", name.removesuffix(_INPUT))


def used(pairs: Iterable, side: int) -> Collection[str]:
    """The points on one side of pairs of points, each once, in order."""
    return list(dict.fromkeys(name for pair in pairs for name in pair[side]))
