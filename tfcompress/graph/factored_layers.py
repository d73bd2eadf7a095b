"""Layers as sequences of smaller ones: what is decomposed, and where its factors go."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfcompress.keras_hooks.quantizer import contracted_axes

# The shapes of what a layer was called with and what it returned, with the batch.
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the layers that a layer becomes.

    Args:
        layer: Not built yet.
        weight: The name of the attribute that takes the factor.
        value: The factor.
    """

    layer: keras.layers.Layer
    weight: str
    value: np.ndarray

    def store(self) -> None:
        """Assign the factor, once the layer is built."""
        getattr(self.layer, self.weight).assign(self.value)


def kernel_of(layer: keras.layers.Layer) -> keras.Variable | None:
    """The variable of a layer that `factorize` decomposes.

    Example:

    >>> layer = keras.layers.Embedding(10, 4)
    >>> layer.build()
    >>> tuple(kernel_of(layer).shape)
    (10, 4)
    """
    name = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    return getattr(layer, name, None)


def obstacle(layer: keras.layers.Layer) -> str | None:
    """Why a layer cannot be replaced by smaller ones, or None.

    Example:

    >>> obstacle(keras.layers.Conv1D(4, 3))
    'Conv1D is not a plain Dense, EinsumDense, Conv2D or Embedding layer'
    """
    if type(layer) not in _KINDS:
        kind = type(layer).__name__
        return f"{kind} is not a plain Dense, EinsumDense, Conv2D or Embedding layer"
    if layer.quantization_mode is not None or layer.lora_enabled:
        return "its weights are quantized or adapted by LoRA"
    name = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    if getattr(layer, f"{name}_constraint") is not None:
        return f"its {name}_constraint would hold for the factors, not for their product"
    return _KINDS[type(layer)].obstacle(layer)


def methods_for(layer: keras.layers.Layer, method: str) -> list[str]:
    """The decompositions that `method` stands for: only convolutions have a choice.

    Example:

    >>> layer = keras.layers.Conv2D(4, 3)
    >>> methods_for(layer, "auto"), methods_for(layer, "tucker")
    (['svd', 'spatial', 'tucker'], ['tucker'])
    >>> methods_for(keras.layers.Dense(4), "tucker")
    ['svd']
    """
    if not isinstance(layer, keras.layers.Conv2D) or layer.kernel_size == (1, 1):
        return ["svd"]
    return ["svd", "spatial", "tucker"] if method == "auto" else [method]


def decomposed_kernel(layer: keras.layers.Layer) -> np.ndarray:
    """The kernel as `low_rank.METHODS` take it: float64, the last axis for the outputs.

    Example:

    >>> layer = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3))
    >>> layer.build((None, 5, 4))
    >>> decomposed_kernel(layer).shape
    (4, 6)
    """
    kernel = keras.ops.convert_to_numpy(kernel_of(layer)).astype("float64")
    return _KINDS[type(layer)].kernel(layer, kernel)


def stages(
    layer: keras.layers.Layer,
    method: str,
    factors: Sequence[np.ndarray],
    name: Callable[[str], str],
) -> list[Stage]:
    """The layers that compute what `layer` does, with its kernel replaced by a product.

    The last one has its bias and activation; all of them have its dtype policy and regularizers.

    Args:
        layer: One without an `obstacle`.
        method: How its kernel was decomposed.
        factors: From `low_rank.METHODS[method]`.
        name: `"in"`, `"core"` or `"out"` -> the name of that layer.

    Returns:
        The layers in the order in which they run, not built yet. `layer.bias` is not copied.

    Example:

    >>> layer = keras.layers.Dense(6, activation="relu")
    >>> [each.layer.name for each in stages(layer, "svd", np.ones((2, 1, 1)), "dense_{}".format)]
    ['dense_in', 'dense_out']
    """
    return _KINDS[type(layer)].stages(layer, method, factors, name)


def positions(layer: keras.layers.Layer, method: str, calls: Sequence[Shapes]) -> list[int]:
    """How often each stage uses each of its weights, in all calls together.

    Args:
        layer: One without an `obstacle`.
        method: How its kernel is decomposed; None for the layer as it is.
        calls: The shapes in its calls, for one example.

    Example:

    >>> layer = keras.layers.Conv2D(4, 3, strides=2, padding="same")
    >>> positions(layer, "spatial", [((1, 8, 8, 3), (1, 4, 4, 4))])
    [32, 16]
    """
    counts = [_KINDS[type(layer)].positions(layer, method, *call) for call in calls]
    return [sum(each) for each in zip(*counts, strict=True)]


def _dense_stages(layer, method, factors, name):
    rank = factors[0].shape[-1]
    return [
        Stage(_like(layer, name("in"), units=rank, **_LINEAR), "kernel", factors[0]),
        Stage(_like(layer, name("out")), "kernel", factors[1]),
    ]


def _dense_positions(layer, method, inputs, outputs):
    number = math.prod(outputs[:-1])
    return [number] if method is None else [number, number]


def _einsum_obstacle(layer):
    inputs, kernel, output = _labels(layer)
    contracted = [kernel[axis] for axis in contracted_axes(layer.equation)]
    if any(label in inputs and label in output for label in kernel):
        return f"{layer.equation!r} has a kernel for each position along an axis of its output"
    if not contracted or len(contracted) == len(kernel) or inputs[0] in contracted:
        return f"{layer.equation!r} is not a product of matrices for each example"
    if set(inputs) - set(output) - set(contracted) - {"."}:
        return f"{layer.equation!r} sums over an axis that is not one of the kernel"
    return None


def _labels(layer) -> list[str]:
    """Of the inputs, the kernel and the outputs."""
    return layer.equation.replace(" ", "").replace("->", ",").split(",")


def _einsum_order(layer) -> list[int]:
    axes = contracted_axes(layer.equation)
    return [*axes, *(axis for axis in range(len(layer.kernel.shape)) if axis not in axes)]


def _einsum_matrix(layer, kernel):
    rows = math.prod(kernel.shape[axis] for axis in contracted_axes(layer.equation))
    return kernel.transpose(_einsum_order(layer)).reshape(rows, -1)


def _einsum_stages(layer, method, factors, name):
    """`abc,cde->abde` becomes `abc,cz->abz` and `abz,zde->abde`."""
    inputs, kernel, output = _labels(layer)
    shape = [layer.kernel.shape[axis] for axis in _einsum_order(layer)]
    axes = contracted_axes(layer.equation)
    summed = [kernel[axis] for axis in axes]
    free = "".join(label for label in kernel if label not in summed)
    new = next(label for label in string.ascii_letters if label not in layer.equation)
    place = min(inputs.index(label) for label in summed)
    kept = [label for label in inputs if label not in summed]
    hidden = "".join([*kept[:place], new, *kept[place:]])
    # The shape is given without the batch and without the axes of an ellipsis.
    given = hidden.replace(".", "") if hidden.startswith(".") else hidden.replace(".", "")[1:]
    rank = factors[0].shape[-1]
    first = _like(
        layer,
        name("in"),
        equation=f"{inputs},{''.join(summed)}{new}->{hidden}",
        output_shape=[rank if label == new else None for label in given],
        bias_axes=None,
        **{key: value for key, value in _LINEAR.items() if key != "use_bias"},
    )
    second = _like(layer, name("out"), equation=f"{hidden},{new}{free}->{output}")
    return [
        Stage(first, "kernel", factors[0].reshape(*shape[: len(axes)], rank)),
        Stage(second, "kernel", factors[1].reshape(rank, *shape[len(axes) :])),
    ]


def _einsum_positions(layer, method, inputs, outputs):
    free = math.prod(layer.kernel.shape) // _num_contracted(layer)
    number = math.prod(outputs) // free
    return [number] if method is None else [number, number]


def _num_contracted(layer):
    return math.prod(layer.kernel.shape[axis] for axis in contracted_axes(layer.equation))


def _conv_obstacle(layer):
    return None if layer.groups == 1 else f"a convolution in {layer.groups} groups"


# What belongs to the part of a convolution that sees more than one pixel.
_POINT = {"kernel_size": (1, 1), "strides": (1, 1), "dilation_rate": (1, 1), "padding": "valid"}


def _conv_stages(layer, method, factors, name):
    if method == "spatial":
        settings = [
            {key: (getattr(layer, key)[0], 1) for key in _POINT if key != "padding"},
            {key: (1, getattr(layer, key)[1]) for key in _POINT if key != "padding"},
        ]
    else:
        settings = {"svd": [{}, _POINT], "tucker": [_POINT, {}, _POINT]}[method]
    if method == "svd":
        factors = [factors[0], factors[1][None, None]]
    places = ["in", "core", "out"] if len(factors) == 3 else ["in", "out"]
    made = []
    for place, setting, factor in zip(places, settings, factors, strict=True):
        ending = {} if place == "out" else {"filters": factor.shape[-1], **_LINEAR}
        made.append(Stage(_like(layer, name(place), **setting, **ending), "kernel", factor))
    return made


def _conv_positions(layer, method, inputs, outputs):
    first = layer.data_format == "channels_first"
    (height, width), (rows, columns) = (x[2:] if first else x[1:-1] for x in (inputs, outputs))
    number = outputs[0] * rows * columns
    return {
        None: [number],
        "svd": [number, number],
        "spatial": [outputs[0] * rows * width, number],
        "tucker": [inputs[0] * height * width, number, number],
    }[method]


def _embedding_stages(layer, method, factors, name):
    """The table looks up the factor of a token; a `Dense` without bias makes it wide again."""
    regularizer = layer.embeddings_regularizer
    table = _like(layer, name("in"), output_dim=factors[0].shape[-1], activity_regularizer=None)
    wide = keras.layers.Dense(
        layer.output_dim,
        use_bias=False,
        kernel_regularizer=regularizer,
        activity_regularizer=layer.activity_regularizer,
        dtype=layer.dtype_policy,
        name=name("out"),
    )
    return [Stage(table, "embeddings", factors[0]), Stage(wide, "kernel", factors[1])]


def _embedding_positions(layer, method, inputs, outputs):
    # Looking up multiplies nothing.
    return [0] if method is None else [0, math.prod(inputs)]


_LINEAR = {"activation": None, "use_bias": False, "activity_regularizer": None}


def _like(layer, name, **changes):
    """A new layer with the settings of another one, but for some."""
    return type(layer).from_config({**layer.get_config(), **changes, "name": name})


@dataclasses.dataclass(frozen=True)
class _Kind:
    stages: Callable
    positions: Callable
    kernel: Callable = lambda layer, kernel: kernel
    obstacle: Callable = lambda layer: None


_KINDS: dict[type, _Kind] = {
    keras.layers.Dense: _Kind(_dense_stages, _dense_positions),
    keras.layers.EinsumDense: _Kind(
        _einsum_stages, _einsum_positions, _einsum_matrix, _einsum_obstacle
    ),
    keras.layers.Conv2D: _Kind(_conv_stages, _conv_positions, obstacle=_conv_obstacle),
    keras.layers.Embedding: _Kind(_embedding_stages, _embedding_positions),
}
