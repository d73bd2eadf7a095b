"""Correction of what rounding does to the mean output of each channel."""

import dataclasses
import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches
from tfcompress.graph.expand import expand
from tfcompress.graph.inputs import repeatable
from tfcompress.keras_hooks.overlay import Overlay, all_layers, attached
from tfcompress.layers.quantize import Quantize

logger = logging.getLogger("tfcompress")

# What a sweep corrects moves the layers behind, which the next sweep corrects.
_MAX_SWEEPS = 12
_SETTLED = 1e-3
_NORM = keras.layers.BatchNormalization


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A layer of the quantized model with a bias, and the one of the float model.

    Args:
        path: Of the bias.
        layer: In the quantized model.
        reference: In the float model.
        bias: Of `layer`.
    """

    path: str
    layer: keras.layers.Layer
    reference: keras.layers.Layer
    bias: keras.Variable


def correct_biases(
    quantized: keras.Model, model: keras.Model, calibration: Any, verbose: int = 1
) -> dict[str, str]:
    """Move the biases of a quantized model so that channels have the mean they had in float.

    The mean of each output channel, before the activation, is taken over the calibration data in
    both models, and the difference is added to the bias. That changes what the layers behind see,
    so it is done in sweeps over the data, all layers at once in each, until nothing moves by more
    than a thousandth of the largest mean of its layer: twelve at most.

    Args:
        quantized: From `tfcompress.quantize(model, ...)`, calibrated. Changed in place.
        model: The float model that it was made from.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator, whose
            batches are kept. Some hundred examples.
        verbose: Whether to show a progress bar.

    Returns:
        Path -> reason, for the layers with quantized weights whose outputs are not corrected.

    Raises:
        ValueError: `calibration` holds no batch, or no layer of `quantized` has a bias.

    Example:

    >>> import numpy as np
    >>> from tfcompress.quantization.quantize import quantize
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> data = np.random.default_rng(0).uniform(size=(64, 8)).astype("float32")
    >>> quantized = quantize(model, "int3", None)
    >>> _ = correct_biases(quantized, model, data, verbose=0)
    >>> error = np.mean(quantized.predict(data, verbose=0) - model.predict(data, verbose=0), axis=0)
    >>> bool(np.abs(error).max() < 1e-4)
    True

    Reference: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2.
    """
    flat, calibration = expand(model), repeatable(calibration)
    pairs, skipped = _pairs(quantized, flat)
    bar = keras.utils.Progbar(None, unit_name="batch", verbose=verbose)
    targets = _Means(flat, [pair.reference for pair in pairs], pairs)(calibration, bar)
    means = _Means(quantized, [pair.layer for pair in pairs], pairs)
    for _ in range(_MAX_SWEEPS):
        corrections = [a - b for a, b in zip(targets, means(calibration, bar), strict=True)]
        for pair, correction in zip(pairs, corrections, strict=True):
            pair.bias.assign_add(tf.cast(correction, pair.bias.dtype))
        sizes = zip(corrections, targets, strict=True)
        if all(np.abs(c).max() <= _SETTLED * np.abs(t).max() for c, t in sizes):
            break
    logger.info(
        "Corrected the biases %s; left: %s", [pair.path for pair in pairs], skipped or "none"
    )
    return skipped


def _pairs(quantized, flat) -> tuple[list[_Pair], dict[str, str]]:
    by_name = {layer.name: layer for layer in flat.layers}
    pairs, skipped = [], {}
    for layer in quantized.layers:
        rounded = isinstance(layer, Quantize) and bool(layer.quantizer.weights)
        layer = layer.quantizer.layer if isinstance(layer, Quantize) else layer
        # Batch norms have the bias of the layer in front of them.
        if layer.name not in by_name or not (rounded or isinstance(layer, _NORM)):
            continue
        both = zip(all_layers(layer), all_layers(by_name[layer.name]), strict=True)
        found = [pair for pair in (_pair(*each) for each in both) if pair is not None]
        pairs += found
        if rounded and not found:
            skipped[layer.name] = "no bias that is added to its output before an activation"
    if not pairs:
        raise ValueError(
            f"No layer of {quantized.name!r} has a bias to correct: {skipped}. Pass what "
            "tfcompress.quantize(model, ...) gives, of a model with biases or batch norms."
        )
    return pairs, skipped


def _pair(layer, reference) -> _Pair | None:
    if isinstance(layer, _NORM):
        bias = (
            layer.beta if layer.center and layer.axis in (-1, layer.input_spec.ndim - 1) else None
        )
    elif isinstance(layer, keras.layers.RNN) or "activation" not in vars(layer):
        return None
    else:
        bias = getattr(layer, "bias", None)
    if not isinstance(bias, keras.Variable):
        return None
    return _Pair(bias.path, layer, reference, bias)


class _Means:
    """The mean output of layers over a stream, before their activations, in the shape of a bias.

    Args:
        model: Runs the layers.
        layers: Layers of it.
        pairs: Say the shapes.
    """

    def __init__(self, model, layers, pairs):
        self.model, self.layers = model, layers
        self.sums = [tf.Variable(tf.zeros(pair.bias.shape, tf.float64)) for pair in pairs]
        self.counts = [tf.Variable(0.0, dtype=tf.float64) for _ in pairs]
        self._step = tf.function(
            lambda inputs: model(inputs, training=False), reduce_retracing=True, autograph=False
        )

    def __call__(self, calibration, bar) -> list[np.ndarray]:
        """One pass over the data."""
        for variable in (*self.sums, *self.counts):
            variable.assign(tf.zeros_like(variable))
        with attached(zip(self.layers, self._taps(), strict=True)):
            for batch in calibration_batches(self.model, calibration):
                self._step(keras.tree.map_structure(tf.convert_to_tensor, batch))
                bar.add(1)
        pairs = zip(self.sums, self.counts, strict=True)
        return [tf.math.divide_no_nan(total, count).numpy() for total, count in pairs]

    def _taps(self):
        for place, layer in enumerate(self.layers):

            def tap(x, place=place):
                self._add(place, x)
                return x

            norm = isinstance(layer, _NORM)
            yield Overlay(output=tap) if norm else Overlay(preactivation=tap)

    def _add(self, place, x):
        shape = self.sums[place].shape
        leading = x.shape.rank - shape.rank
        self.sums[place].assign_add(
            tf.reduce_sum(tf.cast(x, tf.float64), axis=list(range(leading)))
        )
        self.counts[place].assign_add(
            tf.cast(tf.size(x), tf.float64) / tf.cast(tf.size(self.sums[place]), tf.float64)
        )
