"""TFMOT's pruning API on `tfcompress.layers.Prune`."""

import abc
import logging

import keras

from tfcompress.keras_hooks import walk
from tfcompress.layers import Prune, strip
from tfcompress.ops import structures
from tfcompress.schedules import OneShot
from tfcompress.tfmot.keras2 import refuse_keras_2
from tfcompress.tfmot.models import depthwise_kernels, has_kernels, require_model, wrapped
from tfcompress.tfmot.pruning_schedules import ConstantSparsity, as_schedule

logger = logging.getLogger("tfcompress")

_POOLING = {"AVG": "mean", "MAX": "max"}


class PrunableLayer(abc.ABC):
    """A layer of the user's own that says which of its weights are pruned."""

    @abc.abstractmethod
    def get_prunable_weights(self):
        """The weights, a list of variables; called once the layer is built."""


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class PruneCustomLayer(Prune):
    """`layers.Prune` of the weights that a `PrunableLayer` names, biases included."""

    def kernels(self):
        """The weights that the layer names, by path."""
        return {weight.path: weight for weight in self.layer.get_prunable_weights()}


def prune_low_magnitude(
    to_prune,
    pruning_schedule=ConstantSparsity(0.5, 0),  # noqa: B008, as TFMOT documents it
    block_size=(1, 1),
    block_pooling_type="AVG",
    pruning_policy=None,
    sparsity_m_by_n=None,
    **kwargs,
):
    """Prune a layer, a list of layers or a model while it trains, by magnitude.

    Layers come back in `tfcompress.layers.Prune`, which needs no callback and holds the zeros after
    every update; those without kernels come back as they are. A model is copied, with its weights,
    nested models included; a subclassed one becomes its flat graph. Frozen layers, biases and
    depthwise kernels are not pruned.

    Args:
        to_prune: A layer, a list of layers, or a model.
        pruning_schedule: When and to which sparsity, in TFMOT's count of steps: a
            `PruningSchedule`, a schedule of `tfcompress.schedules`, or a float.
        block_size: Height and width of the blocks that are pruned as a whole.
        block_pooling_type: `"AVG"` or `"MAX"`: the score of a block from those of its weights.
        pruning_policy: A `PruningPolicy`: which layers of a model are pruned.
        sparsity_m_by_n: `(m, n)`: m zeros in n consecutive weights; overrides the sparsity of the
            schedule, and is chosen in the first step and held.
        **kwargs: What every Keras layer takes, for a single layer.

    Returns:
        The layer, list or model with pruning wrappers; a model is not compiled.

    Raises:
        ValueError: Something else was passed, a layer or model of Keras 2, an argument is out of
            its range, or the policy does not support the model.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> pruned = prune_low_magnitude(model, ConstantSparsity(0.5, begin_step=0, frequency=10))
    >>> [layer.name for layer in pruned.layers]
    ['prune_low_magnitude_head']

    Reference: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878.
    """
    refuse_keras_2(to_prune, "prune_low_magnitude")
    settings = pruning_settings(pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n)
    if isinstance(to_prune, list):
        return [_wrap(layer, settings) for layer in to_prune]
    if isinstance(to_prune, keras.Model):
        return _prune_model(to_prune, settings, pruning_policy)
    if isinstance(to_prune, keras.layers.Layer):
        return _wrap(to_prune, settings | kwargs)
    raise ValueError(
        "prune_low_magnitude can only prune an object of the following types: a keras.Model, a "
        "keras.layers.Layer, a list of keras.layers.Layer. You passed an object of type: "
        f"{type(to_prune).__name__}."
    )


def strip_pruning(model):
    """The plain model, with the zeros in its weights; see `tfcompress.strip`.

    Args:
        model: A model with pruning wrappers.

    Returns:
        A new model.

    Raises:
        ValueError: Not a model of Keras 3.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> [layer.name for layer in strip_pruning(prune_low_magnitude(model)).layers]
    ['head']
    """
    require_model(model, "strip_pruning")
    return strip(model)


def prune_scope():
    """A scope to load pruned models in. Not needed: their classes are registered with Keras."""
    return keras.saving.custom_object_scope({})


def pruned_weights(model: keras.Model) -> dict:
    """The weights that are pruned in `layers.Prune` wrappers at any depth, by path.

    Args:
        model: A model or layer.

    Returns:
        Path -> variable; its `constraint` holds `mask`, `step` and `updated_at`.
    """
    return {
        path: variable
        for path, variable in walk.named_variables(model).items()
        if hasattr(variable.constraint, "updated_at")
    }


def pruning_settings(schedule, block_size, block_pooling_type, m_by_n) -> dict:
    """The arguments of `layers.Prune` for those of TFMOT."""
    if block_pooling_type not in _POOLING:
        raise ValueError(
            f"Unsupported pooling type {block_pooling_type!r}. Should be 'AVG' or 'MAX'."
        )
    if m_by_n:
        zeros, group = _two_ints(m_by_n, "sparsity_m_by_n")
        structure = structures.NofM(group - zeros, group)
        return {"structure": structure, "sparsity": OneShot(structure.sparsity)}
    height, width = _two_ints(block_size, "block_size")
    structure = "unstructured"
    if (height, width) != (1, 1):
        structure = structures.Block(height, width, _POOLING[block_pooling_type])
    return {"sparsity": as_schedule(schedule), "structure": structure}


def _prune_model(model, settings, policy):
    if policy is not None:
        policy.ensure_model_supports_pruning(model)

    def wrap(layer):
        allowed = policy is None or policy.allow_pruning(layer)
        return _wrap(layer, settings) if allowed else layer

    pruned = wrapped(model, wrap)
    if pruned.built and not pruned_weights(pruned):
        raise ValueError(
            f"No weight of the model {model.name!r} can be pruned. Expected a kernel with 2 or "
            f"more axes in a layer that is not frozen and that the policy {policy!r} allows."
        )
    return pruned


def _wrap(layer, settings):
    if isinstance(layer, Prune):
        return layer
    named = {"name": f"prune_low_magnitude_{layer.name}"} | settings
    if hasattr(layer, "get_prunable_weights"):
        return PruneCustomLayer(layer, **named)
    if not has_kernels(layer):
        logger.info("Not pruned, without a kernel to prune: %s", layer.name)
        return layer
    return Prune(layer, exclude=depthwise_kernels(layer), **named)


def _two_ints(value, name) -> tuple[int, int]:
    try:
        first, second = map(int, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be 2 integers, got {value!r}.") from error
    return first, second
