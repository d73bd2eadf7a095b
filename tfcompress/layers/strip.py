"""Taking the wrappers off."""

import keras

from tfcompress.keras_hooks.overlay import raw_value
from tfcompress.keras_hooks.walk import is_graph
from tfcompress.layers.base import CompressionWrapper


def strip(model: keras.Model) -> keras.Model:
    """The plain model inside a wrapped one: masks, ranges and shared values baked into its weights.

    Its layers are new and hold copies of the weights, so that the wrapped model can go on training.

    Args:
        model: A built Sequential or Functional model, nested ones included; for a subclassed model
            pass `tfcompress.expand(model)`.

    Returns:
        A new model without any wrapper of tfcompress. Its outputs equal those of the
        wrapped model, but for activations that were quantized.

    Raises:
        ValueError: The model is not built, or it is a subclassed one.

    Example:

    >>> from tfcompress.layers.prune import Prune
    >>> model = keras.Sequential([keras.Input((4,)), Prune(keras.layers.Dense(5), sparsity=0.8)])
    >>> [type(layer).__name__ for layer in strip(model).layers]
    ['Dense']
    """
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights to keep. Build it or "
            "call it on a batch first."
        )
    if not is_graph(model):
        raise ValueError(
            f"strip takes Sequential and Functional models, got {type(model).__name__}. Pass "
            "tfcompress.expand(model) for a subclassed one."
        )
    pairs = []

    def plain_copy(layer):
        if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.layers.InputLayer):
            return layer.__class__.from_config(layer.get_config())
        wrappers, inner = _peel(layer)
        copy = inner.__class__.from_config(inner.get_config())
        pairs.append((wrappers, inner, copy))
        return copy

    plain = keras.models.clone_model(model, clone_function=plain_copy, recursive=True)
    for wrappers, inner, copy in pairs:
        _copy_weights(wrappers, inner, copy)
    return plain


def _peel(layer):
    wrappers = []
    while isinstance(layer, CompressionWrapper):
        wrappers.append(layer)
        layer = layer.layer
    return wrappers, layer


def _copy_weights(wrappers, inner, copy):
    """Copy every weight through the wrappers around it, the innermost first."""
    for variable, target in zip(inner.weights, copy.weights, strict=True):
        value = raw_value(variable)
        for wrapper in reversed(wrappers):
            value = wrapper.bake(variable, value)
        target.assign(value)
