"""A model into one whose layers compute as their integer versions will."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfcompress.graph.attention import split_attention
from tfcompress.graph.expand import expand
from tfcompress.graph.inputs import repeatable
from tfcompress.graph.placement import place
from tfcompress.graph.rebuild import copied, replay
from tfcompress.keras_hooks import nodes, walk
from tfcompress.keras_hooks.quantizer import range_places, weight_axes
from tfcompress.layers.quantize import Quantize, check_scales
from tfcompress.ops.schemes import Scheme, scheme_pair
from tfcompress.quantization import calibrators
from tfcompress.quantization.assignment import Budget
from tfcompress.quantization.bias import correct_biases
from tfcompress.quantization.calibrate import calibrate
from tfcompress.quantization.equalization import equalize as equalize_model
from tfcompress.quantization.mixed import auto
from tfcompress.quantization.rounding import round_weights
from tfcompress.quantization.smooth import smooth as smooth_model

logger = logging.getLogger("tfcompress")

ROUNDINGS = ("nearest", "adaround", "gptq")
# Ops that only move values: what comes out is on the grid of what went in.
_MOVING_OPS = (
    "Reshape", "Transpose", "Squeeze", "ExpandDims", "GetItem", "Identity", "Flip", "Split",
    "BroadcastTo", "Repeat", "Take", "Cast", "Pad",
)  # fmt: skip
_ELEMENTWISE_OPS = ("Add", "Subtract", "Multiply", "Where")
# What is added to logits to mask them is this low, or lower: -1e4 in BERT, -1e9, the least float.
_MASKED = -1e4


def quantize(
    model: keras.Model,
    weights: str | dict | Scheme | None = "int8",
    activations: str | Scheme | None = "int8",
    calibration: Any = None,
    *,
    scales: str = "max",
    percentile: float = 100.0,
    calibrator: Any = "minmax",
    weight_calibrator: Any = None,
    equalize: bool = False,
    smooth: float | None = None,
    rounding: str = "nearest",
    bias_correction: bool = False,
    budget: Budget | None = None,
    candidates: tuple = ("int8", "int4"),
    include=None,
    exclude=None,
    verbose: int = 1,
) -> keras.Model:
    """Put `layers.Quantize` around every layer that computes, and calibrate the ranges.

    The result is a flat Functional model with copies of the weights. With `calibration`, its ranges
    are set from what these batches produce, and it is ready for `tfcompress.export`; without, or
    to recover accuracy, train it: training observes the ranges. `tfcompress.strip` takes the
    wrappers off again, with the weights on their grids.

    After training, more than rounding to the nearest can be done: from coarse to fine,
    `equalize` or `smooth` the float model, choose ranges by a better `calibrator`, `rounding` by
    what a layer computes, and `bias_correction`.

    Args:
        model: A built model that `tfcompress.expand` takes.
        weights: `"int8"`, `"int2"` to `"int8"`, a `Scheme`, or None to leave them float; `"w4a8"`
            says the activations too; a dict of glob over `variable.path` -> `"int8"`, a `Scheme` or
            None; or `"auto"`: a scheme for each layer out of `candidates`, within `budget`.
        activations: `"int8"`, `"int2"` to `"int8"`, `"dynamic"`, a `Scheme`, or None to leave them
            float.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator. They
            are streamed; a generator is kept in memory only where several passes are needed.
        scales: `"max"`, `"fixed"` or `"lsq"`; see `tfcompress.layers.Quantize`. `"lsq"` is for
            training the result.
        percentile: See `tfcompress.layers.Quantize`, for training.
        calibrator: How the calibrated ranges of activations are chosen: `"minmax"`,
            `"moving_average"`, `"percentile"`, `"mse"`, `"entropy"`, or an object of
            `tfcompress.quantization.calibrators`.
        weight_calibrator: The same for the scales of weights; None for their extremes.
        equalize: Whether to equalize the ranges of channels across layers of a convolutional
            network first; see `tfcompress.quantization.equalize`. Folds batch norms. For weights
            with one scale a tensor, or of few bits; 8 bits a channel are better without.
        smooth: Exponent, in [0, 1], of SmoothQuant, which moves outliers of activations into
            weights behind layer normalizations first (0.5 is usual); None not to.
        rounding: `"nearest"`, `"adaround"` or `"gptq"` (the latter two on calibration data).
        bias_correction: Whether to correct biases by the mean error of their layers' outputs.
        budget: What `"auto"` must keep to, e.g. `tfcompress.quantization.Budget(size=0.2)`.
        candidates: Schemes of weights that `"auto"` chooses from.
        include: Glob or globs over `variable.path` of `model`; None for every kernel and embedding.
        exclude: Glob or globs to leave out. A layer all of whose weights are left out stays float.
        verbose: Whether what takes long shows its progress.

    Returns:
        A new model, not compiled.

    Raises:
        ValueError: An argument is not one of the above, needs `calibration` and there is none, a
            glob matches nothing, or the model cannot be expanded.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> quantized = quantize(model, calibration=np.eye(4), verbose=0)
    >>> [layer.name for layer in quantized.layers]
    ['input_layer...', 'quantize_input_0', 'quantize_head']
    >>> quantized.layers[1].ranges
    {'output': (0.0, 1.0)}

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Nagel et al. 2021,
    https://arxiv.org/abs/2106.08295, for the order of the steps.
    """
    automatic = isinstance(weights, str) and weights == "auto"
    rounds = rounding != "nearest" or weight_calibrator is not None
    passes = {
        "smooth=": smooth is not None,
        f"rounding={rounding!r}": rounding != "nearest",
        "bias_correction=True": bias_correction,
        'weights="auto"': automatic,
    }
    _check_rounding(rounding, weight_calibrator, scales)
    _check_data(calibration, {**passes, f"calibrator={calibrator!r}": calibrator != "minmax"})
    _check_budget(budget, weights, automatic)
    if any(passes.values()):
        calibration = repeatable(calibration)
    if automatic:
        globs = {"include": include, "exclude": exclude}
        weights = auto(
            model, calibration, budget, candidates, activations, verbose=verbose, **globs
        )
    weights, activations = scheme_pair(weights, activations)
    _check_something(weights, activations)
    scales = "fixed" if rounds else scales
    for scheme in weights.values() if isinstance(weights, dict) else (weights,):
        check_scales(scales, scheme)

    flat = expand(model)
    chosen = _choose(model, flat, weights, include, exclude)
    reference = _prepared(flat, equalize, smooth, calibration, verbose)
    if activations is not None and not activations.dynamic:
        reference = split_attention(reference)
    settings = {"scales": scales, "percentile": percentile}
    quantized = replay(copied(reference), _Wrapping(reference, chosen, activations, settings))
    if weight_calibrator is not None:
        _set_weight_scales(quantized, weight_calibrator)
    if calibration is not None:
        calibrate(quantized, calibration, calibrator, verbose)
    if rounding != "nearest":
        round_weights(quantized, reference, calibration, rounding, verbose=verbose)
    if bias_correction:
        correct_biases(quantized, reference, calibration, verbose)
    return quantized


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """What becomes of one layer's weights.

    Args:
        scheme: How they are quantized; None to leave all of them float.
        left_out: Names of those that stay float.
        stays_float: Whether the layer was excluded as a whole, activations included.
    """

    scheme: Scheme | None
    left_out: tuple[str, ...] = ()
    stays_float: bool = False


def _choose(model, flat, weights, include, exclude) -> dict[str, _Chosen]:
    """By the name of the layer in `flat`, which holds the variables of `model`."""
    include, exclude = walk.as_globs(include), walk.as_globs(exclude)
    named = walk.named_variables(model)
    by_glob = weights if isinstance(weights, dict) else {"*": weights}
    of_weights = weights if isinstance(weights, dict) else ()
    walk.check_globs([*(include or ()), *(exclude or ()), *of_weights], named)
    paths = {id(variable): path for path, variable in named.items()}
    chosen = {
        layer.name: _of_layer(layer, paths, by_glob, include, exclude) for layer in flat.layers
    }
    left_out = any(each.stays_float for each in chosen.values())
    if weights and left_out and not any(each.scheme for each in chosen.values()):
        raise ValueError(
            f"No weight of {model.name!r} is left to quantize: include={include}, "
            f"exclude={exclude}. Expected one kernel or embedding at least; this model has: "
            f"{', '.join(named)}."
        )
    return chosen


def _of_layer(layer, paths, by_glob: Mapping, include, exclude) -> _Chosen:
    found = {variable.name: paths.get(id(variable), "") for variable, _ in weight_axes(layer)}
    wanted = {
        name: walk.first_match(path, by_glob)
        for name, path in found.items()
        if (include is None or walk.matches(path, include))
        and not (exclude and walk.matches(path, exclude))
    }
    schemes = {scheme for scheme in wanted.values() if scheme is not None}
    if len(schemes) > 1:
        raise ValueError(
            f"The weights {list(found.values())} of one layer have several schemes: {schemes}. "
            "Pass one for all of them; exclude= leaves single ones float."
        )
    left_out = tuple(name for name in found if wanted.get(name) is None)
    return _Chosen(next(iter(schemes), None), left_out, bool(found) and not wanted)


def _prepared(flat, equalize, smooth, calibration, verbose) -> keras.Model:
    """The float model that is quantized."""
    if equalize:
        flat = equalize_model(flat)
    if smooth is not None:
        flat = smooth_model(flat, calibration, smooth, verbose)
    return flat


def _set_weight_scales(quantized, calibrator):
    for wrapper in quantized.layers:
        for weight in wrapper.quantizer.weights if isinstance(wrapper, Quantize) else ():
            weight.set_scale(
                calibrators.weight_scale(
                    weight.variable.value, weight.scheme, weight.axes, calibrator
                )
            )


def _check_rounding(rounding, weight_calibrator, scales):
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not known; pass one of {ROUNDINGS}.")
    if scales == "lsq" and (rounding != "nearest" or weight_calibrator is not None):
        raise ValueError(
            f'scales="lsq" learns the scales in training, rounding={rounding!r} with '
            f"weight_calibrator={weight_calibrator!r} fixes them. Pass one or the other."
        )


def _check_something(weights, activations):
    if not weights and activations is None:
        raise ValueError(
            f"quantize got weights={weights!r} and activations=None, so there is nothing to do; "
            'pass weights="int8", activations="int8", or both.'
        )


def _check_budget(budget, weights, automatic):
    if automatic and not isinstance(budget, Budget):
        raise ValueError(
            f'weights="auto" needs a budget, got budget={budget!r}. Pass e.g. '
            "tfcompress.quantization.Budget(size=0.2), a fifth of the float32 bytes."
        )
    if budget is not None and not automatic:
        raise ValueError(
            f'quantize got {budget}, which only weights="auto" keeps to, and weights={weights!r}. '
            'Pass weights="auto", or leave the budget out.'
        )


def _check_data(calibration, steps: Mapping[str, bool]):
    needed_by = [name for name, wanted in steps.items() if wanted]
    if needed_by and calibration is None:
        raise ValueError(
            f"quantize got {' and '.join(needed_by)} without calibration=, on which it is "
            "computed. Pass some hundred inputs: arrays, a tf.data.Dataset or a generator."
        )


class _Wrapping:
    """Calls the operations of a flat graph, with wrappers around what its plan names."""

    def __init__(self, flat, chosen: Mapping[str, _Chosen], activations, settings):
        plan = place(flat)
        self.chosen, self.activations, self.settings = chosen, activations, settings
        self.outputs = {p.layer.name: p.output for p in plan.placements}
        self.inputs = dict(zip((x.name for x in flat.inputs), plan.inputs, strict=True))
        self.observed = activations is not None and not activations.dynamic
        self.left_float = _masking(flat)
        self.wrappers: dict[str, Quantize] = {}

    def __call__(self, call: nodes.Call, args, kwargs):
        args, kwargs = keras.tree.map_structure(self._input, (args, kwargs))
        operation = call.operation
        if isinstance(operation, keras.layers.Layer):
            return self._layer(operation)(*args, **kwargs)
        outputs = operation(*args, **kwargs)
        moves = type(operation).__name__ in _MOVING_OPS
        if moves or operation.name in self.left_float or not self.observed:
            return outputs
        return keras.tree.map_structure(lambda x: self._rounded(x, operation.name), outputs)

    def _layer(self, layer):
        # Passes over the graph add layers, which have no weights of the model.
        chosen = self.chosen.get(layer.name, _Chosen(None))
        output = self.observed and self.outputs.get(layer.name, False)
        inside = self.observed and bool(range_places(layer, output=False))
        weights = chosen.scheme if weight_axes(layer) else None
        dynamic = self.activations if weights and not self.observed else None
        if chosen.stays_float or not (output or inside or weights):
            return layer
        if layer.name not in self.wrappers:
            self.wrappers[layer.name] = Quantize(
                layer,
                weights,
                self.activations if output or inside else dynamic,
                exclude=[f"*/{name}" for name in chosen.left_out] if weights else None,
                output=output or not inside,
                **self.settings,
            )
        return self.wrappers[layer.name]

    def _input(self, x):
        if not isinstance(x, keras.KerasTensor) or not self.observed:
            return x
        if not isinstance(nodes.producer(x).operation, keras.layers.InputLayer):
            return x
        if not self.inputs.get(x.name, False):
            return x
        return self._rounded(x, f"input_{list(self.inputs).index(x.name)}")

    def _rounded(self, x, name):
        if not keras.backend.is_float_dtype(x.dtype):
            return x
        if name not in self.wrappers:
            # Not the name of the operation: `strip` leaves both in one model.
            identity = keras.layers.Identity(name=f"rounded_{name}", dtype=x.dtype)
            self.wrappers[name] = Quantize(
                identity, None, self.activations, name=f"quantize_{name}", **self.settings
            )
        return self.wrappers[name](x)


def _masking(flat) -> frozenset[str]:
    """The operations that add or write a mask: a range would hold nothing but the mask.

    A softmax of what is masked is computed in float, between its own range and the logits'.
    """
    masks, names = set(), set()
    for call in nodes.calls(flat):
        arguments = keras.tree.flatten((call.args, call.kwargs))
        if type(call.operation).__name__ not in _ELEMENTWISE_OPS:
            continue
        if any(id(x) in masks or _is_mask(x) for x in arguments):
            names.add(call.operation.name)
            masks.update(map(id, call.outputs))
    return frozenset(names)


def _is_mask(x) -> bool:
    if not (isinstance(x, float | int | np.generic | np.ndarray) or keras.ops.is_tensor(x)):
        return False
    return bool(np.min(np.asarray(x, "float32"), initial=0.0) <= _MASKED)
