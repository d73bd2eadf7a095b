"""What reaches each kernel when a model runs on calibration data: norms and second moments.

A kernel that multiplies its input is seen as a matrix `W` of shape (features in, features out): the
rows of its input matrix `X` are the positions it is applied to, in every example and every call.
Batches are streamed through the model as it is, eagerly, with a hook on the `call` of each layer.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches
from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.quantizer import contracted_axes
from tfcompress.keras_hooks.walk import named_variables

# What `tf.vectorized_map` traces sees no values.
NOT_REACHED = "its layer is not called on the calibration data, or only inside of a vectorized map"

# Patches are as many times larger than their images as the kernel has weights a channel.
_MAX_PATCH_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class LinearKernel:
    """A kernel as the matrix that its layer multiplies the input with.

    Args:
        path: Of the variable, in the model.
        variable: The kernel.
        layer: The layer that computes with it.
        axes: The axes of the kernel that are contracted with the input, ascending.
        rows: Input of the layer -> parts of the matrix `X`, each `(positions, features in)`, float.
    """

    path: str
    variable: keras.Variable
    layer: keras.layers.Layer
    axes: tuple[int, ...]
    rows: Callable[[tf.Tensor], Iterator[tf.Tensor]]

    @property
    def num_inputs(self) -> int:
        """Input features of a position: the product of the contracted axes."""
        return math.prod(self.variable.shape[axis] for axis in self.axes)

    def to_matrix(self, array: np.ndarray) -> np.ndarray:
        """An array of the kernel's shape as `(features in, features out)`."""
        return np.transpose(array, self._order).reshape(self.num_inputs, -1)

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `to_matrix`."""
        shape = [self.variable.shape[axis] for axis in self._order]
        return np.transpose(matrix.reshape(shape), np.argsort(self._order))

    def broadcastable(self, features: np.ndarray) -> np.ndarray:
        """One value for each input feature, in a shape that broadcasts to the kernel."""
        shape = self.variable.shape
        return features.reshape([n if axis in self.axes else 1 for axis, n in enumerate(shape)])

    @property
    def _order(self) -> list[int]:
        others = [axis for axis in range(len(self.variable.shape)) if axis not in self.axes]
        return [*self.axes, *others]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Kernels none of which feeds another one.

    Args:
        kernels: By path, in the order in which their layers run.
        last: The path after whose only call the rest of the model adds nothing to these kernels;
            None, if a layer is called more than once or was not reached.
    """

    kernels: dict[str, LinearKernel]
    last: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer: what it was called with and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: Any


class _Reached(BaseException):
    """Leaves a model in the middle of its call; no `except Exception` on the way takes it."""


def linear_kernels(
    model: keras.Model, paths: Sequence[str]
) -> tuple[dict[str, LinearKernel], dict[str, str]]:
    """The kernels whose inputs can be captured: of Dense, EinsumDense and ungrouped Conv2D.

    Args:
        model: A built model of any kind.
        paths: Variable paths, as `tfcompress.keras_hooks.walk.named_variables` gives them.

    Returns:
        The kernels by path, and path -> reason for every other one.

    Raises:
        ValueError: A path is not in the model.

    Example:

    >>> layers = [keras.Input((5,)), keras.layers.Dense(3, name="dense")]
    >>> model = keras.Sequential(layers, name="model")
    >>> kernels, skipped = linear_kernels(model, ["model/dense/kernel"])
    >>> kernels["model/dense/kernel"].num_inputs, skipped
    (5, {})
    """
    variables, layers = named_variables(model), all_layers(model)
    unknown = [path for path in paths if path not in variables]
    if unknown:
        raise ValueError(
            f"{model.name!r} has no variable {unknown[0]!r}; it has: {', '.join(variables)}."
        )
    found = {path: _linear_kernel(path, variables[path], layers) for path in paths}
    kernels = {path: each for path, each in found.items() if isinstance(each, LinearKernel)}
    skipped = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    return kernels, skipped


def input_norms(
    model: keras.Model, paths: Sequence[str], calibration: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The norm of each input feature of each kernel: what Wanda multiplies `|w|` with.

    `||X_j||_2` over all positions of all examples: the samples, the steps of a sequence, the places
    that a filter is applied to (padding included, as zeros). Masked steps count like the others,
    since the layers compute them. A layer that is called more than once has the rows of all calls.
    One pass over the data; memory is that of a batch in the model and a number for each feature.

    Args:
        model: A built model of any kind.
        paths: Paths of kernels.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator.

    Returns:
        Path -> float64 array, 0 or more, in a shape that broadcasts to the kernel; and path ->
        reason for every kernel whose inputs cannot be captured.

    Raises:
        ValueError: A path is not in the model, there is no batch, or values are NaN or infinite.

    Example:

    >>> layers = [keras.Input((2,)), keras.layers.Dense(3, name="dense")]
    >>> model = keras.Sequential(layers, name="model")
    >>> norms, _ = input_norms(model, ["model/dense/kernel"], np.array([[3.0, 0.0], [4.0, 1.0]]))
    >>> norms["model/dense/kernel"].tolist()
    [[5.0], [1.0]]

    Reference: Sun et al. 2023, https://arxiv.org/abs/2306.11695.
    """
    kernels, skipped = linear_kernels(model, paths)
    squares = _accumulate(model, kernels, calibration, _sum_of_squares)
    for path in kernels.keys() - squares.keys():
        skipped[path] = NOT_REACHED
    norms = {path: kernels[path].broadcastable(np.sqrt(sums)) for path, sums in squares.items()}
    return norms, skipped


def second_moments(
    model: keras.Model,
    kernels: Mapping[str, LinearKernel],
    calibration: Any,
    last: str | None = None,
) -> dict[str, np.ndarray]:
    """`X^T X` of the inputs of each kernel, in one pass over the data.

    Products are float32, their sums float64; positions count as in `input_norms`.

    Args:
        model: A built model of any kind.
        kernels: From `linear_kernels`.
        calibration: Inputs as the model gets them.
        last: Path of the kernel at which the model is left, to save the time of the layers after
            it; None to run all of it.

    Returns:
        Path -> float64 array `(features in, features in)`; kernels that are not reached, see
        `NOT_REACHED`, are left out.

    Raises:
        ValueError: There is no batch, or values are NaN or infinite.

    Example:

    >>> layers = [keras.Input((2,)), keras.layers.Dense(3, name="dense")]
    >>> model = keras.Sequential(layers, name="model")
    >>> kernels, _ = linear_kernels(model, ["model/dense/kernel"])
    >>> second_moments(model, kernels, np.array([[3.0, 1.0]]))["model/dense/kernel"].tolist()
    [[9.0, 3.0], [3.0, 1.0]]
    """
    return _accumulate(model, kernels, calibration, _gram, last)


def call_stages(
    model: keras.Model, kernels: Mapping[str, LinearKernel], calibration: Any
) -> list[Stage]:
    """The kernels in the order in which their layers run on the first batch.

    Layers called one after the other with the very same tensor (query, key and value) cannot feed
    each other and share a stage. Kernels that the first batch does not reach come last.

    Args:
        model: A built model of any kind.
        kernels: From `linear_kernels`.
        calibration: Inputs as the model gets them.

    Returns:
        The stages; each kernel is in one of them.

    Raises:
        ValueError: There is no batch, or its values are NaN or infinite.

    Example:

    >>> layers = [keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")]
    >>> model = keras.Sequential([keras.Input((2,)), *layers], name="model")
    >>> kernels, _ = linear_kernels(model, ["model/second/kernel", "model/first/kernel"])
    >>> [list(stage.kernels) for stage in call_stages(model, kernels, np.ones((1, 2)))]
    [['model/first/kernel'], ['model/second/kernel']]
    """
    calls: list[str] = []
    joined: set[tuple[str, str]] = set()
    previous = None

    def record(kernel, inputs):
        nonlocal previous
        if inputs is previous:
            joined.add((calls[-1], kernel.path))
        calls.append(kernel.path)
        previous = inputs

    with _recording(kernels, record):
        _run(model, next(calibration_batches(None, calibration)))
    counts = collections.Counter(calls)
    stages: list[Stage] = []
    for path in dict.fromkeys([*calls, *kernels]):
        # A layer that runs twice may feed what runs in between.
        last = path if counts[path] == 1 else None
        if last and stages and stages[-1].last and (stages[-1].last, path) in joined:
            stages.append(Stage(stages.pop().kernels | {path: kernels[path]}, last))
        else:
            stages.append(Stage({path: kernels[path]}, last))
    return stages


def watch_calls(
    model: keras.Model,
    layers: Mapping[str, keras.layers.Layer],
    batch: Any,
    told: Callable[[str, LayerCall], bool | None],
) -> None:
    """Run a model on a batch, eagerly, and tell of every call of some layers.

    Args:
        model: A built model of any kind.
        layers: Layers in it, by a name of your choice.
        batch: Inputs as the model gets them.
        told: `(name, call)`, after each call; once it returns True, the model is left. Calls that
            `tf.vectorized_map` traces come without values.

    Raises:
        ValueError: There is no batch, or its values are NaN or infinite.

    Example:

    >>> layers = [keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")]
    >>> model = keras.Sequential([keras.Input((2,)), *layers], name="model")
    >>> named = {layer.name: layer for layer in layers}
    >>> tell = lambda name, call: print(name, call.outputs.shape)
    >>> watch_calls(model, named, np.ones((1, 2)), tell)
    first (1, 3)
    second (1, 2)
    """

    def around(name, call, *args, **kwargs):
        outputs = call(*args, **kwargs)
        if told(name, LayerCall(args, kwargs, outputs)):
            raise _Reached
        return outputs

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(add_hook(layer, "call", functools.partial(around, name)))
        with contextlib.suppress(_Reached):
            _run(model, batch)


def repeatable(calibration: Any) -> Any:
    """Data that can be iterated over more than once: the batches of an iterator are kept.

    Args:
        calibration: Anything that `tfcompress.batches.input_batches` takes.

    Returns:
        `calibration`, or a function that gives its batches.

    Example:

    >>> from tfcompress.batches import input_batches
    >>> data = repeatable(iter([np.ones((2, 3)), np.ones((1, 3))]))
    >>> [[len(batch) for batch in input_batches(data)] for _ in range(2)]
    [[2, 1], [2, 1]]
    """
    if isinstance(calibration, Iterator):
        batches = list(calibration)
        return lambda: batches
    return calibration


def _linear_kernel(path, variable, layers) -> LinearKernel | str:
    owners = [layer for layer in layers if getattr(layer, "kernel", None) is variable]
    if not owners:
        return "not the kernel of a Dense, EinsumDense or Conv2D layer"
    if len(owners) > 1:
        return f"the kernel of several layers: {', '.join(layer.name for layer in owners)}"
    layer = owners[0]
    kind = next((kind for kind in _VIEWS if _computes_as(layer, kind)), None)
    if kind is None:
        return f"{type(layer).__name__} is not a plain Dense, EinsumDense or Conv2D layer"
    view = _VIEWS[kind](layer)
    if isinstance(view, str):
        return view
    axes, rows = view
    return LinearKernel(path, variable, layer, axes, rows)


def _computes_as(layer, kind) -> bool:
    methods = ("call", "convolution_op")
    return isinstance(layer, kind) and all(
        getattr(type(layer), name, None) is getattr(kind, name, None) for name in methods
    )


def _dense_view(layer):
    def rows(x):
        yield tf.reshape(x, [-1, layer.kernel.shape[0]])

    return (0,), rows


def _einsum_view(layer):
    inputs, kernel, output = layer.equation.replace(" ", "").replace("->", ",").split(",")
    axes = contracted_axes(layer.equation)
    contracted = [kernel[axis] for axis in axes]
    if any(label in inputs and label in output for label in kernel):
        return f"{layer.equation!r} has a kernel for each position along an axis of its output"
    if not contracted or any(label not in inputs for label in contracted):
        return f"{layer.equation!r} is not a matrix product"
    # What is in neither kernel nor output is summed away before the product.
    kept = [label for label in inputs if label in output and label != "."]
    ellipsis = "..." if "..." in inputs else ""
    unfold = f"{inputs}->{ellipsis}{''.join(kept)}{''.join(contracted)}"

    def rows(x):
        width = math.prod(layer.kernel.shape[axis] for axis in axes)
        yield tf.reshape(tf.einsum(unfold, x), [-1, width])

    return axes, rows


def _conv2d_view(layer):
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"

    def rows(x):
        if layer.data_format == "channels_first":
            x = tf.transpose(x, [0, 2, 3, 1])
        for images in _parts(x, layer.kernel_size):
            patches = tf.image.extract_patches(
                images,
                sizes=[1, *layer.kernel_size, 1],
                strides=[1, *layer.strides, 1],
                rates=[1, *layer.dilation_rate, 1],
                padding=layer.padding.upper(),
            )
            yield tf.reshape(patches, [-1, math.prod(layer.kernel.shape[:3])])

    return (0, 1, 2), rows


def _parts(images, kernel_size) -> Iterator[tf.Tensor]:
    """Images in parts whose patches fit in memory."""
    elements = math.prod(images.shape[1:]) * math.prod(kernel_size)
    size = max(1, _MAX_PATCH_ELEMENTS // max(1, elements))
    for start in range(0, images.shape[0], size):
        yield images[start : start + size]


_VIEWS: dict[type, Callable] = {
    keras.layers.Dense: _dense_view,
    keras.layers.EinsumDense: _einsum_view,
    keras.layers.Conv2D: _conv2d_view,
}


def _sum_of_squares(rows):
    return tf.reduce_sum(tf.square(rows), axis=0)


def _gram(rows):
    return tf.matmul(rows, rows, transpose_a=True)


def _accumulate(model, kernels, calibration, statistic, last=None) -> dict[str, np.ndarray]:
    """The sum of `statistic(rows)` for each kernel whose layer is called."""
    sums: dict[str, tf.Tensor] = {}
    traced: set[str] = set()

    def record(kernel, inputs):
        if not tf.executing_eagerly():
            traced.add(kernel.path)
            return
        for rows in kernel.rows(tf.cast(inputs, tf.float32)):
            sums[kernel.path] = sums.get(kernel.path, 0.0) + tf.cast(statistic(rows), tf.float64)
        if kernel.path == last:
            raise _Reached

    with _recording(kernels, record):
        for batch in calibration_batches(None, calibration):
            with contextlib.suppress(_Reached):
                _run(model, batch)
    arrays = {path: total.numpy() for path, total in sums.items() if path not in traced}
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"The inputs that reach {path!r} hold NaN or infinity, though the calibration data "
                "does not. Check the weights of the layers before it."
            )
    return arrays


@contextlib.contextmanager
def _recording(kernels: Mapping[str, LinearKernel], record: Callable) -> Iterator[None]:
    """Call `record(kernel, inputs)` at each call of a kernel's layer."""

    def around(kernel, call, *args, **kwargs):
        record(kernel, args[0] if args else kwargs["inputs"])
        return call(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for kernel in kernels.values():
            hook = functools.partial(around, kernel)
            stack.callback(add_hook(kernel.layer, "call", hook))
        yield


def _run(model, batch) -> None:
    for leaf in keras.tree.flatten(batch):
        if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
            raise ValueError(
                f"The calibration data holds NaN or infinity, in a batch of shape {leaf.shape}. "
                "Clean the data, or leave these examples out."
            )
    with _eager_functions():
        model(keras.tree.map_structure(tf.convert_to_tensor, batch), training=False)


@contextlib.contextmanager
def _eager_functions() -> Iterator[None]:
    """Let a `tf.function` in the model call its layers: once traced, it does so no more."""
    previous = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(previous)
