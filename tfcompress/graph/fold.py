"""Folding batch normalization into the linear layer beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import keras
import numpy as np

from tfcompress.graph.expand import expand
from tfcompress.graph.rebuild import Uses, finalize, map_layers
from tfcompress.keras_hooks import nodes

_log = logging.getLogger("tfcompress")

Weights = dict[str, np.ndarray]


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Fold batch normalization into the linear layers beside it, where that changes no output.

    In inference, batch norm is `s * x + t` a channel, with `s = gamma / sqrt(variance + epsilon)`
    and `t = beta - s * mean`. Behind a linear layer, `W' = s * W` and `b' = s * b + t`. In front of
    one, `W' = W * s` and `b' = b + W t`, which is exact without padding, or where `t` is 0, since
    the padded zeros are not shifted.

    Folded are `Dense`, `EinsumDense`, `Conv`, `DepthwiseConv`, `SeparableConv` and `ConvTranspose`
    layers. A batch norm stays if the layer beside it has an activation in between, is called more
    than once, or feeds something else as well. The logger "tfcompress" says what was folded (INFO)
    and what stayed, with the reason (INFO).

    Args:
        model: Any built model; see `tfcompress.expand`.

    Returns:
        A new flat Functional model with weights of its own. Its outputs in inference are those of
        `model` to rounding; in training, the folded layers no longer normalize.

    Raises:
        ValueError: `model` cannot be expanded.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3),
    ...                           keras.layers.BatchNormalization(), keras.layers.ReLU()])
    >>> [type(layer).__name__ for layer in fold_batch_norm(model).layers]
    ['InputLayer', 'Conv2D', 'ReLU']

    See Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2.
    """
    flat = expand(model)
    folds = _plan(flat)
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def replace(operation):
        if id(operation) in folds.dropped:
            return None
        if not isinstance(operation, keras.layers.Layer):
            return operation
        shifted = any(np.any(x.shift) for x in folds.affines.get(id(operation), {}).values())
        copy = type(operation).from_config(_config(operation, with_bias=shifted))
        copies.append((operation, copy))
        return copy

    folded = map_layers(flat, replace)
    for layer, copy in copies:
        _copy_weights(layer, copy, folds.affines.get(id(layer), {}))
    return folded


@dataclasses.dataclass(frozen=True)
class Affine:
    """`y = scale * x + shift` a channel; both of shape (channels,), float64."""

    scale: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, norm: keras.layers.BatchNormalization) -> Affine:
        """What a batch norm does in inference."""
        mean, variance = _float64(norm.moving_mean), _float64(norm.moving_variance)
        scale = 1 / np.sqrt(variance + norm.epsilon)
        if norm.scale:
            scale = scale * _float64(norm.gamma)
        beta = _float64(norm.beta) if norm.center else 0.0
        return cls(scale, beta - scale * mean)


def norms_behind(flat: keras.Model) -> dict[str, keras.layers.BatchNormalization]:
    """The batch norm that `fold_batch_norm` folds into the layer in front of it, by that layer.

    Args:
        flat: From `tfcompress.expand`.

    Returns:
        `{layer.name: batch norm}`.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense"),
    ...                           keras.layers.BatchNormalization(name="norm")])
    >>> {name: norm.name for name, norm in norms_behind(expand(model)).items()}
    {'dense': 'norm'}
    """
    uses = Uses(flat)
    norms = [x for x in uses.calls if isinstance(x.operation, keras.layers.BatchNormalization)]
    chosen = [(call.operation, *_choose(call, uses)) for call in norms]
    return {layer.name: norm for norm, layer, side, _ in chosen if side == "behind"}


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How an affine map of the channels goes into the weights of one kind of layer.

    Args:
        behind: `(layer, weights, affine) -> weights` for the batch norm behind the layer.
        before: The same for the one in front of it.
        shifts: Whether `before` is exact for a shift, without padding.
    """

    behind: Callable
    before: Callable
    shifts: bool = True


@dataclasses.dataclass(frozen=True)
class _Folds:
    """`dropped`: ids of batch norms; `affines`: `id(layer) -> {"before" | "behind": Affine}`."""

    dropped: set[int]
    affines: dict[int, dict[str, Affine]]


def _plan(flat: keras.Model) -> _Folds:
    """Which batch norms go into which layers; logs every one."""
    uses = Uses(flat)
    folds = _Folds(set(), {})
    for call in uses.calls:
        if not isinstance(call.operation, keras.layers.BatchNormalization):
            continue
        layer, side, reasons = _choose(call, uses)
        if layer is None:
            _log.info("fold_batch_norm: %s stays: %s", call.operation.name, "; ".join(reasons))
            continue
        folds.dropped.add(id(call.operation))
        folds.affines.setdefault(id(layer), {})[side] = Affine.of(call.operation)
        _log.info("fold_batch_norm: %s goes into %s", call.operation.name, layer.name)
    return folds


def _choose(call: nodes.Call, uses: Uses):
    """`(layer, "behind" | "before", [])` to fold a batch norm into, or `(None, None, reasons)`."""
    if uses.is_shared(call):
        return None, None, ["it is called more than once"]
    reasons = []
    previous = uses.producers.get(id(call.inputs[0]))
    if previous is None:
        reasons.append("it reads an input of the model")
    else:
        reason = _obstacle_behind(previous, call, uses)
        if reason is None:
            return previous.operation, "behind", []
        reasons.append(f"behind {previous.operation.name}: {reason}")
    following = uses.only_reader(call)
    if following is None:
        reasons.append("its output has several readers or is one of the model")
    else:
        reason = _obstacle_before(following, call, uses)
        if reason is None:
            return following.operation, "before", []
        reasons.append(f"before {following.operation.name}: {reason}")
    return None, None, reasons


def _obstacle(beside: nodes.Call, call: nodes.Call, uses: Uses) -> str | None:
    """What keeps the batch norm of `call` from being folded into the layer of `beside`."""
    layer, norm = beside.operation, call.operation
    axis, rank = _channel_axis(layer), len(call.outputs[0].shape)
    if type(layer) not in _RULES:
        return f"{type(layer).__name__} is not a linear layer with weights"
    if uses.is_shared(beside):
        return "it is called more than once"
    if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
        return "its weights are quantized or adapted by LoRA"
    if norm.axis % rank != axis % rank:
        return f"the batch norm is over axis {norm.axis}, its channels are axis {axis}"
    return None


def _obstacle_behind(previous: nodes.Call, call: nodes.Call, uses: Uses) -> str | None:
    layer = previous.operation
    if reason := _obstacle(previous, call, uses):
        return reason
    if uses.only_reader(previous) is None:
        return "something else reads its output too"
    if layer.activation is not None and layer.activation is not keras.activations.linear:
        return f"the activation {layer.activation.__name__} lies between"
    if isinstance(layer, keras.layers.EinsumDense) and not _einsum_ends_in_channels(layer):
        return f"the last axis of {layer.equation} is not one of the kernel, or not of the bias"
    return None


def _obstacle_before(following: nodes.Call, call: nodes.Call, uses: Uses) -> str | None:
    layer, norm = following.operation, call.operation
    if reason := _obstacle(following, call, uses):
        return reason
    if len(following.inputs) != 1:
        return "it has several inputs"
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, _ = _einsum_terms(layer)
        if inputs[-1] not in kernel:
            return f"the last input axis of {layer.equation} is not one of the kernel"
    padded = getattr(layer, "padding", "valid") != "valid"
    if np.any(Affine.of(norm).shift) and (padded or not _RULES[type(layer)].shifts):
        return "its borders would not see the shift of the batch norm"
    return None


def _channel_axis(layer) -> int:
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def _einsum_terms(layer: keras.layers.EinsumDense) -> tuple[str, str, str]:
    """The labels of input, kernel and output, without ellipses."""
    left, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    return inputs, kernel, output


def _einsum_ends_in_channels(layer: keras.layers.EinsumDense) -> bool:
    """Whether the last output axis is one of the kernel, and of the bias if there is one."""
    _, kernel, output = _einsum_terms(layer)
    return output[-1] in kernel and output[-1] in (layer.bias_axes or output[-1])


def _config(layer: keras.layers.Layer, with_bias: bool) -> dict:
    config = layer.get_config()
    if with_bias and "use_bias" in config:
        config["use_bias"] = True
    if with_bias and isinstance(layer, keras.layers.EinsumDense) and not layer.bias_axes:
        config["bias_axes"] = _einsum_terms(layer)[2][-1]
    return config


_WEIGHTS = ("kernel", "depthwise_kernel", "pointwise_kernel", "bias")


def _copy_weights(layer, copy, affines: dict[str, Affine]) -> None:
    """Give `copy` the weights of `layer`, with batch norms folded in."""
    if affines:
        for name, value in _folded_weights(layer, affines).items():
            if getattr(copy, name) is not None:
                getattr(copy, name).assign(np.broadcast_to(value, getattr(copy, name).shape))
        return
    copy.set_weights(layer.get_weights())
    finalize(copy)


def _folded_weights(layer, affines: dict[str, Affine]) -> Weights:
    weights = {
        name: _float64(getattr(layer, name))
        for name in _WEIGHTS
        if getattr(layer, name, None) is not None
    }
    weights.setdefault("bias", np.zeros(()))
    rule = _RULES[type(layer)]
    # The one in front first: what is behind scales the bias that it leaves.
    for side in ("before", "behind"):
        if side in affines:
            weights = getattr(rule, side)(layer, weights, affines[side])
    return weights


def _float64(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype("float64")


def _last_axis_behind(layer, weights: Weights, affine: Affine) -> Weights:
    return {
        "kernel": weights["kernel"] * affine.scale,
        "bias": weights["bias"] * affine.scale + affine.shift,
    }


def _dense_before(layer, weights: Weights, affine: Affine) -> Weights:
    kernel = weights["kernel"]
    return {
        "kernel": kernel * affine.scale[:, None],
        "bias": weights["bias"] + affine.shift @ kernel,
    }


def _conv_before(layer, weights: Weights, affine: Affine) -> Weights:
    """The filters of group g see the channels of group g: (in / groups, out) factors."""
    kernel = weights["kernel"]

    def by_group(channels):
        return np.repeat(
            channels.reshape(layer.groups, -1).T, kernel.shape[-1] // layer.groups, axis=1
        )

    taps = tuple(range(kernel.ndim - 1))
    return {
        "kernel": kernel * by_group(affine.scale),
        "bias": weights["bias"] + (kernel * by_group(affine.shift)).sum(axis=taps),
    }


def _depthwise_behind(layer, weights: Weights, affine: Affine) -> Weights:
    kernel = weights["kernel"]
    return {
        "kernel": kernel * affine.scale.reshape(kernel.shape[-2:]),
        "bias": weights["bias"] * affine.scale + affine.shift,
    }


def _depthwise_before(layer, weights: Weights, affine: Affine) -> Weights:
    kernel = weights["kernel"]
    taps = tuple(range(kernel.ndim - 2))
    shift = (kernel * affine.shift[:, None]).sum(axis=taps)
    return {
        "kernel": kernel * affine.scale[:, None],
        "bias": weights["bias"] + shift.reshape(-1),
    }


def _separable_behind(layer, weights: Weights, affine: Affine) -> Weights:
    return weights | {
        "pointwise_kernel": weights["pointwise_kernel"] * affine.scale,
        "bias": weights["bias"] * affine.scale + affine.shift,
    }


def _separable_before(layer, weights: Weights, affine: Affine) -> Weights:
    kernel, pointwise = weights["depthwise_kernel"], weights["pointwise_kernel"]
    taps = tuple(range(kernel.ndim - 2))
    shift = (kernel * affine.shift[:, None]).sum(axis=taps).reshape(-1)
    return weights | {
        "depthwise_kernel": kernel * affine.scale[:, None],
        "bias": weights["bias"] + shift @ pointwise.reshape(pointwise.shape[-2:]),
    }


def _transpose_behind(layer, weights: Weights, affine: Affine) -> Weights:
    return {
        "kernel": weights["kernel"] * affine.scale[:, None],
        "bias": weights["bias"] * affine.scale + affine.shift,
    }


def _transpose_before(layer, weights: Weights, affine: Affine) -> Weights:
    return weights | {"kernel": weights["kernel"] * affine.scale}


def _along(kernel: np.ndarray, labels: str, label: str, factors: np.ndarray) -> np.ndarray:
    """`kernel` times `factors` along the axis with that label."""
    shape = [-1 if x == label else 1 for x in labels]
    return kernel * factors.reshape(shape)


def _einsum_behind(layer, weights: Weights, affine: Affine) -> Weights:
    _, labels, output = _einsum_terms(layer)
    return {
        "kernel": _along(weights["kernel"], labels, output[-1], affine.scale),
        "bias": weights["bias"] * affine.scale + affine.shift,
    }


def _einsum_before(layer, weights: Weights, affine: Affine) -> Weights:
    inputs, labels, _ = _einsum_terms(layer)
    return weights | {"kernel": _along(weights["kernel"], labels, inputs[-1], affine.scale)}


_CONV = _Rule(_last_axis_behind, _conv_before)
_DEPTHWISE = _Rule(_depthwise_behind, _depthwise_before)
_SEPARABLE = _Rule(_separable_behind, _separable_before)
_TRANSPOSE = _Rule(_transpose_behind, _transpose_before, shifts=False)

_RULES: dict[type, _Rule] = {
    keras.layers.Dense: _Rule(_last_axis_behind, _dense_before),
    keras.layers.EinsumDense: _Rule(_einsum_behind, _einsum_before, shifts=False),
    keras.layers.Conv1D: _CONV,
    keras.layers.Conv2D: _CONV,
    keras.layers.Conv3D: _CONV,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
    keras.layers.Conv1DTranspose: _TRANSPOSE,
    keras.layers.Conv2DTranspose: _TRANSPOSE,
    keras.layers.Conv3DTranspose: _TRANSPOSE,
}
