"""What a weight is to the model around it: the output layer, or in front of a batch norm."""

import dataclasses
import logging
from collections.abc import Mapping

import keras

from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import consumers
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.overlay import outside_of_calls, readers
from tfcompress.keras_hooks.walk import named_variables, select_kernels
from tfcompress.ops import criteria, structures
from tfcompress.ops.masks import Units

_log = logging.getLogger("tfcompress")
_CHANNELS_BEFORE_LAST = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


@dataclasses.dataclass(frozen=True)
class Prunable:
    """What a structure and a criterion can deal with.

    Args:
        weights: Path -> kernel, at least one.
        skipped: Path -> why another weight is left alone.
        scales: Path -> gamma of the batch norm behind, for the criterion that reads it.
    """

    weights: dict[str, keras.Variable]
    skipped: dict[str, str]
    scales: dict[str, keras.Variable]

    def statistics(self, criterion) -> dict:
        """Path -> what a criterion reads that needs neither training nor data."""
        if criteria.reads(criterion) == "batch_norm":
            return {path: gamma.value for path, gamma in self.scales.items()}
        return {path: place for place, path in enumerate(self.weights)}


def prunable(
    model: keras.Model,
    weights: Mapping[str, keras.Variable],
    structure: structures.Structure,
    criterion,
) -> Prunable:
    """Which of `weights` can be cut into units and scored.

    Args:
        model: Any built model.
        weights: Path -> kernel.
        structure: From `structures.get`.
        criterion: From `criteria.get`.

    Raises:
        ValueError: None of them.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3, name="hidden"), keras.layers.Dense(2)]
    >>> model = keras.Sequential(layers, name="model")
    >>> weights = {each.path: each for each in model.trainable_variables if each.ndim == 2}
    >>> list(prunable(model, weights, structures.Channel(), criteria.magnitude).weights)
    ['model/hidden/kernel']
    """
    _, skipped = Units.cut(structure, {path: w.shape for path, w in weights.items()})
    if isinstance(structure, structures.Channel) and structure.groups is None:
        skipped |= leave_output_layer(model, weights) | _other_channels(model, weights, structure)
    scales = {}
    if criteria.reads(criterion) == "batch_norm":
        found = batch_norm_scales(model)
        scales = {path: found[id(w)] for path, w in weights.items() if id(w) in found}
        reason = "no batch norm reads its output, and alone"
        skipped = {path: reason for path in weights if path not in scales} | skipped
    left = {path: weight for path, weight in weights.items() if path not in skipped}
    if not left:
        raise ValueError(
            f"The structure {structure} with the criterion {criterion} fits no weight of the model "
            f"{model.name!r}: {skipped}."
        )
    return Prunable(left, skipped, scales)


def select(
    model: keras.Model, structure: structures.Structure, include=None, exclude=None
) -> tuple[dict[str, keras.Variable], dict[str, str]]:
    """The weights that a structure prunes: kernels, or all that the groups of `Channel` name.

    Args:
        model: Any Keras model with at least one variable.
        structure: From `structures.get`.
        include: See `select_kernels`; None with groups.
        exclude: See `select_kernels`; None with groups.

    Returns:
        The selected variables by path, and path -> reason for every other one.

    Raises:
        ValueError: See `select_kernels`, or groups of another model.
    """
    groups = getattr(structure, "groups", None)
    if groups is None:
        return select_kernels(model, include, exclude)
    variables = named_variables(model)
    if missing := [path for path in groups if path not in variables]:
        raise ValueError(
            f"The groups have the weight {missing[0]!r}, which {model.name!r} has not; it has "
            f"{list(variables)}. Make them of this model, by tfcompress.channel_groups(model)."
        )
    selected = {path: each for path, each in variables.items() if path in groups}
    return selected, {path: "in none of the groups" for path in variables if path not in groups}


def check_coupled(structure: structures.Structure, **others) -> None:
    """Refuse what goes by single weights next to a structure whose units span several.

    Args:
        structure: From `structures.get`.
        **others: What must be left out; a sparsity must be one for all.

    Raises:
        ValueError: Something is not left out.
    """
    if getattr(structure, "groups", None) is None:
        return
    remedies = {
        "sparsity": "Pass one number or schedule for all groups",
        "include": "Choose groups by tfcompress.channel_groups(model, include=...)",
        "exclude": "Choose groups by tfcompress.channel_groups(model, exclude=...)",
        "regrowth": "Leave it out",
        "criterion": "Use one that reads weights or gradients, such as magnitude",
        "threshold": "Pass a sparsity",
    }
    for name, value in others.items():
        if value is not None and (name != "sparsity" or isinstance(value, Mapping)):
            raise ValueError(
                f"{name}={value!r} goes by single weights, and the units of {structure} span "
                f"several. {remedies[name]}."
            )


def _other_channels(model, weights, structure) -> dict[str, str]:
    """The kernels whose output channels are not where the default axis looks for them."""
    if structure.axis != -1:
        return {}
    paths = {id(weight): path for path, weight in weights.items()}
    return {
        paths[id(kernel)]: f"the channels of {type(layer).__name__} are axis -2 of its kernel: "
        "prune it by Channel(axis=-2)"
        for layer, kernels in readers(model, weights.values())
        for kernel in kernels
        if isinstance(layer, _CHANNELS_BEFORE_LAST)
    }


def leave_output_layer(model: keras.Model, weights: Mapping[str, keras.Variable]) -> dict[str, str]:
    """Which of `weights` compute the outputs of the model, whose units cannot be left out.

    Where the graph of the model cannot be known, the last weight is taken for it.

    Args:
        model: Any built model.
        weights: Path -> kernel.

    Returns:
        Path -> reason.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head")]
    >>> model = keras.Sequential(layers, name="model")
    >>> leave_output_layer(model, {each.path: each for each in model.trainable_variables})
    {'model/head/kernel': "the model's output layer"}
    """
    try:
        outputs = {id(kernel) for kernel in output_kernels(model)}
    except ValueError as error:
        path = list(weights)[-1]
        _log.info("Taking %s for the output layer: %s", path, error)
        return {path: f"taken for the model's output layer: {error}"}
    reason = "the model's output layer"
    return {path: reason for path, weight in weights.items() if id(weight) in outputs}


def output_kernels(model: keras.Model) -> list[keras.Variable]:
    """The kernels of the layers behind which no other kernel follows.

    Args:
        model: Any built model; see `tfcompress.expand`.

    Returns:
        Variables of `model`.

    Raises:
        ValueError: `model` cannot be expanded.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head"),
    ...           keras.layers.Softmax()]
    >>> [kernel.path for kernel in output_kernels(keras.Sequential(layers, name="model"))]
    ['model/head/kernel']
    """
    flat = _flat(model)
    producers = {id(x): call for call in nodes.calls(flat) for x in call.outputs}
    pending, seen, found = list(flat.outputs), set(), {}
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or id(tensor) not in producers:
            continue
        seen.add(id(tensor))
        call = producers[id(tensor)]
        kernels = _kernels(call.operation)
        found.update((id(kernel), kernel) for kernel in kernels)
        if not kernels:
            pending.extend(call.inputs)
    return list(found.values())


def batch_norm_scales(model: keras.Model) -> dict[int, keras.Variable]:
    """The gamma that scales the output channels of each kernel, by the kernel's id.

    Only where the batch norm, over the last axis, is the one reader of the layer's output.

    Args:
        model: Any built model; see `tfcompress.expand`.

    Returns:
        `id(kernel) -> gamma`, variables of `model`.

    Raises:
        ValueError: `model` cannot be expanded.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    >>> model = keras.Sequential(layers)
    >>> batch_norm_scales(model)[id(model.layers[0].kernel)] is model.layers[1].gamma
    True
    """
    flat = _flat(model)
    readers = consumers(flat)
    found = {}
    for call in nodes.calls(flat):
        following = readers[call.operation.name]
        if len(following) == 1 and _scales_last_axis(following[0], call):
            found.update((id(kernel), following[0].gamma) for kernel in _kernels(call.operation))
    return found


def _flat(model):
    with outside_of_calls():
        return expand(model)


def _kernels(operation) -> list[keras.Variable]:
    if not isinstance(operation, keras.layers.Layer):
        return []
    return [variable for variable in operation.trainable_variables if len(variable.shape) > 1]


def _scales_last_axis(norm, call) -> bool:
    rank = len(call.outputs[0].shape)
    is_norm = isinstance(norm, keras.layers.BatchNormalization) and norm.scale
    return is_norm and norm.axis % rank == rank - 1
