"""SmoothQuant: outliers of activations move into the weights that read them."""

import dataclasses
import logging
import numbers
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches, num_batches
from tfcompress.graph.channels import Values, obstacle
from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import Uses, copied
from tfcompress.keras_hooks.overlay import Overlay, attached

logger = logging.getLogger("tfcompress")

_NORMS = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)
# Below this share of the largest one, a channel is not scaled: it hardly counts.
_SMALLEST = 1e-5


def smooth(
    model: keras.Model, calibration: Any, alpha: float = 0.5, verbose: int = 1
) -> keras.Model:
    """Divide the channels of layer normalizations by what their readers are multiplied by.

    Transformers have channels with activations much larger than the rest, which leave the others
    few steps of one scale a tensor. For channel `j` of a normalization and all layers that read it,
    `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`: gamma and beta are divided by it and the kernel
    rows multiplied, so that outputs are as before.

    It applies where every reader of the normalization is `Dense` or `EinsumDense` (query, key and
    value, or the first layer of a feed-forward block), as in transformers that normalize first. In
    one that normalizes last, as BERT, the residual connection reads the normalization as well; such
    are left, with the reason in the log of "tfcompress".

    Args:
        model: A built model that `tfcompress.expand` takes.
        calibration: Inputs as the model gets them, some hundred: arrays, a `tf.data.Dataset`, a
            generator; streamed once.
        alpha: In [0, 1]: how much of the outliers moves into the weights; 0.5 halves them, on a
            logarithmic scale.
        verbose: Whether to show a progress bar.

    Returns:
        A new flat Functional model with weights of its own; its outputs are those of `model`, to
        rounding.

    Raises:
        ValueError: `alpha` is not in [0, 1], `calibration` holds no batch or makes values that are
            not finite, or no normalization can be smoothed.

    Example:

    >>> x = keras.Input((3,))
    >>> norm = keras.layers.LayerNormalization(name="norm")
    >>> model = keras.Model(x, keras.layers.Dense(2, name="dense")(norm(x)))
    >>> norm.gamma.assign([1.0, 64.0, 1.0])
    <...>
    >>> data = np.random.default_rng(0).normal(size=(256, 3)).astype("float32")
    >>> smoothed = smooth(model, data, verbose=0)
    >>> gamma = np.asarray(smoothed.get_layer("norm").gamma)
    >>> bool(gamma.max() / gamma.min() < 20)
    True

    Reference: Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
    """
    if not isinstance(alpha, numbers.Real) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}; 0.5 is usual.")
    flat = copied(expand(model))
    smoothings, skipped = _find(flat)
    for name, reason in skipped.items():
        logger.info("smooth: leaving %s: %s", name, reason)
    if not smoothings:
        raise ValueError(
            f"smooth found no layer normalization of {model.name!r} that only Dense and "
            f"EinsumDense layers read: {skipped or 'it has none'}. Leave smooth out."
        )
    values = Values()
    largest = _largest_inputs(flat, [each.norm for each in smoothings], calibration, verbose)
    for each, magnitudes in zip(smoothings, largest, strict=True):
        _scale(each, magnitudes, alpha, values)
    values.store()
    logger.info("smooth: %s", [each.norm.name for each in smoothings])
    return flat


@dataclasses.dataclass(frozen=True, eq=False)
class _Smoothing:
    """A normalization and the layers that alone read it.

    Args:
        norm: It scales the last axis.
        readers: Layers whose kernels have the channels first.
    """

    norm: keras.layers.Layer
    readers: tuple[keras.layers.Layer, ...]


def _find(flat) -> tuple[list[_Smoothing], dict[str, str]]:
    uses, found, skipped = Uses(flat), [], {}
    for call in uses.calls:
        if not isinstance(call.operation, _NORMS):
            continue
        reason = _norm_obstacle(call, uses)
        readers = () if reason else uses.readers.get(id(call.outputs[0]), ())
        reason = reason or _readers_obstacle(readers, uses)
        if reason:
            skipped[call.operation.name] = reason
        else:
            unique = {id(reader.operation): reader.operation for reader in readers}
            found.append(_Smoothing(call.operation, tuple(unique.values())))
    return found, skipped


def _norm_obstacle(call, uses) -> str | None:
    norm = call.operation
    last = len(call.outputs[0].shape) - 1
    axes = norm.axis if isinstance(norm.axis, list | tuple) else [norm.axis]
    if [axis % (last + 1) for axis in axes] != [last]:
        return f"it normalizes the axes {axes}, not the last one"
    if uses.is_shared(call):
        return "it is called more than once"
    if uses.is_output(call):
        return "it is an output of the model"
    return "it has no gamma" if _gain(norm) is None else None


def _gain(norm) -> keras.Variable | None:
    """What a normalization multiplies by: the gamma of a layer norm, the scale of an RMS norm."""
    return norm.scale if isinstance(norm, keras.layers.RMSNormalization) else norm.gamma


def _readers_obstacle(readers, uses) -> str | None:
    if not readers:
        return "nothing reads it"
    for reader in readers:
        layer = reader.operation
        if not _reads_last_axis(layer):
            return f"{layer.name} ({type(layer).__name__}) reads it too"
        reason = obstacle(reader, uses)
        if reason:
            return reason
    return None


def _reads_last_axis(layer) -> bool:
    """Whether a layer is linear in the last axis of its input, the first of its kernel."""
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = layer.equation.replace(" ", "").replace("->", ",").split(",")
        return inputs[-1] == kernel[0] and [x for x in kernel if x not in output] == [kernel[0]]
    return isinstance(layer, keras.layers.Dense)


def _largest_inputs(flat, norms, calibration, verbose) -> list[np.ndarray]:
    """The largest magnitude of each channel of each normalization, in one pass."""
    largest = [tf.Variable(tf.zeros(_gain(norm).shape)) for norm in norms]

    def tap(variable):
        def record(x):
            axes = list(range(x.shape.rank - 1))
            seen = tf.reduce_max(tf.abs(tf.cast(x, tf.float32)), axis=axes)
            variable.assign(tf.maximum(variable, seen))
            return x

        return Overlay(output=record)

    step = tf.function(
        lambda inputs: flat(inputs, training=False), reduce_retracing=True, autograph=False
    )
    bar = keras.utils.Progbar(num_batches(calibration), unit_name="batch", verbose=verbose)
    with attached(zip(norms, map(tap, largest), strict=True)):
        for batch in calibration_batches(flat, calibration):
            step(keras.tree.map_structure(tf.convert_to_tensor, batch))
            bar.add(1)
    found = [variable.numpy() for variable in largest]
    for norm, magnitudes in zip(norms, found, strict=True):
        if not np.isfinite(magnitudes).all():
            raise ValueError(
                f"The calibration data makes NaN or infinite values behind {norm.name!r}; look for "
                "such values in the data and the weights."
            )
    return found


def _scale(smoothing: _Smoothing, magnitudes, alpha, values: Values) -> None:
    kernels = [reader.kernel for reader in smoothing.readers]
    flat = [np.abs(values[kernel]).reshape(kernel.shape[0], -1) for kernel in kernels]
    weights = np.max([each.max(axis=1) for each in flat], axis=0)
    floors = [_SMALLEST * each.max() for each in (magnitudes, weights)]
    counts = (magnitudes > floors[0]) & (weights > floors[1])
    factors = np.ones(len(weights))
    factors[counts] = magnitudes[counts] ** alpha / weights[counts] ** (1 - alpha)
    # Only what the channels are to each other matters; so the norm keeps its size.
    factors[counts] /= np.exp(np.mean(np.log(factors[counts]))) if counts.any() else 1.0
    norm = smoothing.norm
    for variable in (_gain(norm), getattr(norm, "beta", None)):
        if variable is not None:
            values[variable] = values[variable] / factors
    for kernel in kernels:
        values[kernel] = values[kernel] * factors.reshape(-1, *[1] * (len(kernel.shape) - 1))
