"""Rounding of the weights of a quantized model that looks at what its layers compute."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import keras

from tfcompress.graph.expand import expand
from tfcompress.graph.inputs import repeatable
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.walk import named_variables
from tfcompress.layers.quantize import Quantize
from tfcompress.quantization.adaround import AdaRound, LayerPair, round_layers
from tfcompress.quantization.gptq import GPTQ, round_kernels

logger = logging.getLogger("tfcompress")

_METHODS = {"gptq": GPTQ, "adaround": AdaRound}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What `round_weights` did.

    Args:
        errors: Path -> squared error of the layer's output on the calibration data, as a share of
            that of rounding to nearest.
        skipped: Path -> why a weight was left to be rounded to nearest.
    """

    errors: dict[str, float]
    skipped: dict[str, str]


def round_weights(
    quantized: keras.Model,
    model: keras.Model,
    calibration: Any,
    method: str | GPTQ | AdaRound = "gptq",
    seed: int = 0,
    verbose: int = 1,
) -> Rounding:
    """Round the weights of a quantized model to what keeps the outputs of its layers.

    The weights of `model` are rounded, layer after layer, each on the inputs that the quantized
    model gives it so far. They stay on the grids that `quantized` has; its activations are rounded
    as they are. Pruned weights (exact zeros) stay 0.

    `"gptq"` takes the kernels of Dense, EinsumDense and ungrouped Conv2D layers, and about the time
    of a few passes over the data. `"adaround"` takes layers of any kind that have one input, and
    trains each for some seconds; it is better where a kernel has few weights for each output, as
    depthwise convolutions do. What is calibrated on should be some hundred examples: with less
    than a kernel has input features, either fits what it sees.

    Args:
        quantized: From `quantize(model, ..., scales="fixed")`, calibrated if its activations are
            quantized. Changed in place.
        model: The float model that it was made from, with the same weights.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator, whose
            batches are kept.
        method: `"gptq"`, `"adaround"`, or `GPTQ(...)`, `AdaRound(...)`.
        seed: For AdaRound: chooses what is learned from. Equal seeds give equal weights.
        verbose: Whether to show a progress bar.

    Returns:
        What was gained for each weight, and which weights were left to be rounded to nearest.

    Raises:
        ValueError: The scales of `quantized` are not fixed, its layers are not those of `model`,
            the method is unknown, or the calibration data is empty, NaN or infinite. `quantized` is
            left as it was.

    Example:

    >>> import numpy as np
    >>> from tfcompress.quantization import quantize
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, name="head")])
    >>> quantized = quantize(model, "int4", None, scales="fixed")
    >>> data = np.random.default_rng(0).normal(size=(64, 4)) @ np.ones((4, 16)) + np.eye(64, 16)
    >>> rounding = round_weights(quantized, model, data, verbose=0)
    >>> [error < 1 for error in rounding.errors.values()], rounding.skipped
    ([True], {})

    Reference: Frantar et al. 2022, https://arxiv.org/abs/2210.17323; Nagel et al. 2020,
    https://arxiv.org/abs/2004.10568.
    """
    settings = _settings(method)
    flat = expand(model)
    pairs = _pairs(quantized, flat)
    weights = {path: weight for pair in pairs for path, weight in pair.weights.items()}
    variables = [each for weight in weights.values() for each in (weight.variable, weight.scale)]
    before = [variable.numpy() for variable in variables]
    calibration = repeatable(calibration)
    bar = keras.utils.Progbar(len(weights), unit_name="weight", verbose=verbose)
    try:
        for pair in pairs:
            _start_from_float(pair)
        if isinstance(settings, GPTQ):
            errors, skipped = round_kernels(quantized, weights, calibration, settings, bar.add)
        else:
            errors, skipped = round_layers(
                (quantized, flat), pairs, calibration, settings, seed, bar.add
            )
    except BaseException:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        raise
    logger.info("%s rounded %s; to nearest: %s", type(settings).__name__, list(errors), skipped)
    return Rounding(errors, skipped)


def _settings(method) -> GPTQ | AdaRound:
    if isinstance(method, GPTQ | AdaRound):
        return method
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is not known; pass one of {sorted(_METHODS)}.")
    return _METHODS[method]()


def _pairs(quantized, flat) -> list[LayerPair]:
    """The layers with quantized weights, each with the one of the float model."""
    wrappers = [layer for layer in all_layers(quantized) if isinstance(layer, Quantize)]
    wrappers = [wrapper for wrapper in wrappers if wrapper.quantizer.weights]
    if not wrappers:
        raise ValueError(
            f"{quantized.name!r} has no layer with quantized weights; pass what "
            'tfcompress.quantize(model, weights="int4", scales="fixed") gives.'
        )
    paths = {id(variable): path for path, variable in named_variables(quantized).items()}
    by_name = {layer.name: layer for layer in all_layers(flat)}
    return [_pair(wrapper.quantizer, by_name, paths) for wrapper in wrappers]


def _pair(quantizer, by_name: Mapping[str, keras.layers.Layer], paths) -> LayerPair:
    layer = quantizer.layer
    for weight in quantizer.weights:
        if weight.scale is None:
            raise ValueError(
                f"The scale of {paths[id(weight.variable)]!r} follows its largest weight, which "
                'rounding changes; make the model with tfcompress.quantize(..., scales="fixed").'
            )
    float_layer = by_name.get(layer.name)
    shapes = [[tuple(v.shape) for v in each.variables] for each in (layer, float_layer) if each]
    if float_layer is None or shapes[0] != shapes[1]:
        raise ValueError(
            f"The float model has no layer {layer.name!r} with weights of these shapes: "
            f"{shapes[0]}. Pass the model that the quantized one was made from; it has: "
            f"{', '.join(by_name)}."
        )
    weights = {paths[id(weight.variable)]: weight for weight in quantizer.weights}
    return LayerPair(layer, float_layer, weights)


def _start_from_float(pair: LayerPair) -> None:
    """Give the weights their float values again, and hold their scales where they are."""
    places = {id(variable): place for place, variable in enumerate(pair.layer.variables)}
    for weight in pair.weights.values():
        place = places[id(weight.variable)]
        weight.variable.assign(pair.float_layer.variables[place])
        weight.set_scale(weight.grid()[0])
