"""AdaRound: whether each weight is rounded up or down is learned from what its layer computes."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.batches import calibration_batches
from tfcompress.graph.inputs import (
    NOT_REACHED,
    LayerCall,
    LinearKernel,
    linear_kernels,
    watch_calls,
)
from tfcompress.keras_hooks.overlay import Overlay, call_through
from tfcompress.keras_hooks.quantizer import QuantizedWeight
from tfcompress.values import Value

# The rectified sigmoid goes from _LOW to _HIGH and is cut to [0, 1], so that it gets to both ends.
_LOW, _HIGH = -0.1, 1.1
_STEPS_A_CALL = 100
# Examples are kept until their inputs and targets hold this many numbers.
_MAX_ELEMENTS = 2**24

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]  # Inputs of a layer, and what it should return.


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class AdaRound(Value):
    """How `round_weights` rounds with AdaRound.

    Args:
        steps: Gradient steps for each layer, 1 or more.
        batch_size: Positions that a layer is applied to in a step (rows of its input matrix), 1 or
            more; of layers that are no matrix product as many examples, 4 at least.
        samples: Positions (or examples) that are kept to learn from, 1 or more, as far as 64 MB go.
        learning_rate: Of Adam; above 0.
        strength: Weight of the regularizer that pushes each weight up or down, against the squared
            error of the layer's output, which is 1 where rounding to nearest gives it; above 0.
        warm_start: Share of the steps without the regularizer, in [0, 1).
        beta: Exponent of the regularizer, from the first to the last step: the larger, the flatter
            it is in the middle.

    Raises:
        ValueError: A value is out of range.

    Example:

    >>> AdaRound(steps=5000).warm_start
    0.2
    """

    steps: int = 1000
    batch_size: int = 256
    samples: int = 8192
    learning_rate: float = 0.03
    strength: float = 10.0
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def __post_init__(self):
        object.__setattr__(self, "beta", tuple(self.beta))  # JSON gives a list.
        for name in ("steps", "batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"AdaRound has {name}={getattr(self, name)!r}; pass 1 or more.")
        for name in ("learning_rate", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdaRound has {name}={getattr(self, name)!r}; pass more than 0.")
        if not 0 <= self.warm_start < 1:
            raise ValueError(
                f"AdaRound has warm_start={self.warm_start!r}; pass a share in [0, 1)."
            )
        if len(self.beta) != 2 or min(self.beta) <= 0:
            raise ValueError(f"AdaRound has beta={self.beta!r}; pass two numbers above 0: (20, 2).")


def adaround(
    weights: Sequence[np.ndarray],
    scales: Sequence[np.ndarray],
    limits: tuple[int, int],
    apply: Callable[[tf.Tensor, list[tf.Tensor]], tf.Tensor],
    inputs: np.ndarray,
    targets: np.ndarray,
    settings: AdaRound | None = None,
    seed: int = 0,
) -> tuple[list[np.ndarray], float]:
    """Learn to round weights up or down, so that a layer computes what it should.

    Minimizes `||apply(inputs, rounded) - targets||^2` over one continuous variable a weight, which
    a regularizer pushes to 0 or 1. Where all that is no better on `inputs` than rounding to
    nearest, the nearest values are returned. Weights that are exactly 0 (pruned ones) stay 0.

    Args:
        weights: What one layer computes with: a matrix, or any float arrays.
        scales: One for each weight, positive, broadcastable to it: its symmetric grid.
        limits: The smallest and largest integer of the grids.
        apply: `(inputs, weights) -> outputs`, differentiable TensorFlow.
        inputs: Examples, along the first axis.
        targets: What to compute for each: of the shape of the outputs.
        settings: How; None for the defaults.
        seed: Chooses the batches.

    Returns:
        Float32 arrays like `weights`: whole numbers within `limits`, times `scales`; and the
        squared error on `inputs` as a share of that of rounding to nearest, at most 1.

    Example: two inputs that are always equal; 0.4 + 0.4 is nearer to 1 + 0 than to 0 + 0.

    >>> x, w = np.ones((4, 2), "float32"), np.array([[0.4], [0.45]], "float32")
    >>> multiply = lambda x, weights: tf.matmul(x, weights[0])
    >>> (rounded,), error = adaround([w], [np.ones((1, 1))], (-7, 7), multiply, x, x @ w)
    >>> rounded.ravel().tolist(), round(error, 3)
    ([0.0, 1.0], 0.031)

    Reference: Nagel et al. 2020, https://arxiv.org/abs/2004.10568.
    """
    settings = settings or AdaRound()
    grids = [_Grid(*pair, limits) for pair in zip(weights, scales, strict=True)]
    problem = _Problem(apply, inputs, targets, min(settings.batch_size, len(inputs)))
    nearest = [grid.nearest() for grid in grids]
    worst = problem.error(nearest)
    if worst == 0.0:
        return nearest, 1.0
    _learn(grids, problem, worst / len(inputs), settings, seed)
    learned = [grid.hard() for grid in grids]
    error = problem.error(learned)
    return (learned, error / worst) if error < worst else (nearest, 1.0)


class _Grid:
    """One weight between the two values of its grid that are next to it."""

    def __init__(self, weight, scale, limits):
        self.scale = np.broadcast_to(scale, weight.shape).astype(np.float32)
        self.limits = tuple(float(limit) for limit in limits)
        steps = weight.astype(np.float32) / self.scale
        self.steps, self.floor = steps, np.floor(steps)
        self.free = (weight != 0).astype(np.float32)
        start = (steps - self.floor - _LOW) / (_HIGH - _LOW)
        self.logits = keras.Variable(np.log(start / (1 - start)), dtype="float32")

    def up(self):
        """How far each weight is rounded up, in [0, 1]."""
        stretched = tf.sigmoid(self.logits.value) * (_HIGH - _LOW) + _LOW
        return tf.clip_by_value(stretched, 0.0, 1.0) * self.free

    def soft(self):
        return tf.clip_by_value(self.floor + self.up(), *self.limits) * self.scale

    def hard(self) -> np.ndarray:
        return self._on_grid(self.floor + (self.up().numpy() >= 0.5))

    def nearest(self) -> np.ndarray:
        return self._on_grid(np.round(self.steps))

    def penalty(self, beta):
        """The sum of `1 - |2 up - 1|^beta` over the weights that are free."""
        # Without the small number, the gradient is NaN where `up` is 0.5.
        distance = tf.abs(2.0 * self.up() - 1.0) + 1e-12
        return tf.reduce_sum((1.0 - tf.pow(distance, beta)) * self.free)

    def _on_grid(self, steps):
        return (np.clip(steps, *self.limits) * self.free * self.scale).astype(np.float32)


class _Problem:
    """What a layer should compute, on a sample of its inputs."""

    def __init__(self, apply, inputs, targets, batch_size):
        self.apply, self.batch_size = apply, batch_size
        self.inputs, self.targets = tf.constant(inputs), tf.constant(targets)

    def error(self, weights) -> float:
        """The squared error, summed over the sample."""
        weights = [tf.constant(weight) for weight in weights]
        starts = range(0, len(self.inputs), self.batch_size)
        return sum(float(self._squares(slice(i, i + self.batch_size), weights)) for i in starts)

    def batch_error(self, weights, seed, step):
        """The mean of the squared error of an example, over a batch that the seed chooses."""
        count = tf.shape(self.inputs)[0]
        chosen = tf.random.stateless_uniform(
            [self.batch_size], [seed, step], maxval=count, dtype=tf.int32
        )
        inputs, targets = tf.gather(self.inputs, chosen), tf.gather(self.targets, chosen)
        return self._between(inputs, targets, weights) / self.batch_size

    def _squares(self, part, weights):
        return self._between(self.inputs[part], self.targets[part], weights)

    def _between(self, inputs, targets, weights):
        outputs = tf.cast(self.apply(inputs, weights), tf.float32)
        return tf.reduce_sum(tf.square(outputs - targets))


def _learn(grids, problem, worst, settings: AdaRound, seed) -> None:
    optimizer = keras.optimizers.Adam(settings.learning_rate)
    variables = [grid.logits for grid in grids]
    optimizer.build(variables)
    num_free = max(sum(grid.free.sum() for grid in grids), 1.0)
    warm = int(settings.warm_start * settings.steps)
    first, last = settings.beta

    def step(index):
        progress = tf.cast(index - warm, tf.float32) / max(settings.steps - warm, 1)
        beta = last + (first - last) * 0.5 * (1.0 + tf.cos(math.pi * progress))
        with tf.GradientTape() as tape:
            error = problem.batch_error([grid.soft() for grid in grids], seed, index) / worst
            penalty = tf.add_n([grid.penalty(beta) for grid in grids]) / num_free
            loss = error + tf.where(index < warm, 0.0, settings.strength) * penalty
        values = [variable.value for variable in variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, values), variables, strict=True))

    @tf.function(input_signature=[tf.TensorSpec([], tf.int32)] * 2)
    def steps(start, stop):
        for index in tf.range(start, stop):
            step(index)

    # TensorFlow warns of a function that is traced again and again, as this is for each layer.
    run = steps.get_concrete_function()
    for start in range(0, settings.steps, _STEPS_A_CALL):
        stop = min(start + _STEPS_A_CALL, settings.steps)
        run(tf.constant(start), tf.constant(stop))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPair:
    """A layer of a quantized model, and the float one that it should compute like.

    Args:
        layer: Without its wrapper; its weights are float.
        float_layer: The same layer of the float model.
        weights: Path in the quantized model -> weight of `layer`.
    """

    layer: keras.layers.Layer
    float_layer: keras.layers.Layer
    weights: Mapping[str, QuantizedWeight]


def round_layers(
    models: tuple[keras.Model, keras.Model],
    pairs: Sequence[LayerPair],
    calibration: Any,
    settings: AdaRound,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, str]]:
    """Round the weights of a quantized model by AdaRound, in place, in the order of the layers.

    Each layer learns to compute, from the inputs that the rounded layers before it give it, what
    the float layer computes from its own (asymmetric reconstruction, with a fused activation where
    the layer is no matrix product). A pass over the data through both models for each layer; a
    sample of it is kept.

    Args:
        models: The quantized one and the float one.
        pairs: Their layers.
        calibration: Inputs as the models get them, that can be read many times.
        settings: How.
        seed: Chooses the sample and the batches.
        advance: Told how many weights were dealt with.

    Returns:
        Path -> squared error of the layer's output, as a share of that of rounding to nearest, on
        the sample; and path -> reason for every weight that was left alone.
    """
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for pair in _in_order(models[0], pairs, calibration):
        outcome = _round_layer(models, pair, calibration, settings, seed)
        into = skipped if isinstance(outcome, str) else errors
        into.update(dict.fromkeys(pair.weights, outcome))
        advance(len(pair.weights))
    return errors, skipped


def _in_order(model, pairs, calibration) -> list[LayerPair]:
    called: list[str] = []
    named = {str(place): pair.layer for place, pair in enumerate(pairs)}
    batch = next(calibration_batches(None, calibration))
    watch_calls(model, named, batch, lambda name, call: called.append(name))
    return [pairs[int(name)] for name in dict.fromkeys([*called, *named])]


def _round_layer(models, pair: LayerPair, calibration, settings, seed) -> float | str:
    if isinstance(pair.layer, keras.layers.Embedding):
        return "nothing is summed over the rows of an embedding: nearest is best"
    view = _view(models[0], pair)
    reservoir = _Reservoir(settings.samples, seed)
    for batch in calibration_batches(None, calibration):
        calls = [
            _calls(model, layer, batch)
            for model, layer in zip(models, (pair.layer, pair.float_layer), strict=True)
        ]
        for ours, floats in zip(*calls, strict=True):
            problem = _why_not(ours) or _why_not(floats)
            if problem:
                return problem
            for inputs, targets in view.examples(ours, floats):
                reservoir.add(inputs, targets)
    if not reservoir.size:
        return NOT_REACHED
    return _learn_layer(pair, view, reservoir, settings, seed)


def _learn_layer(pair, view, reservoir, settings, seed) -> float:
    weights = list(pair.weights.values())
    scales = [np.broadcast_to(weight.grid()[0], weight.variable.shape) for weight in weights]
    settings = dataclasses.replace(settings, batch_size=view.batch_size(reservoir, settings))
    rounded, error = adaround(
        [view.to_array(weight.variable.numpy()) for weight in weights],
        [view.to_array(scale) for scale in scales],
        weights[0].scheme.limits,
        view.apply,
        reservoir.inputs,
        reservoir.targets,
        settings,
        seed,
    )
    for weight, array in zip(weights, rounded, strict=True):
        weight.variable.assign(view.from_array(array))
    return error


def _view(model, pair: LayerPair) -> "_MatrixView | _CallView":
    """A layer as a matrix if it is one: a step takes rows of many examples then."""
    if len(pair.weights) == 1:
        kernels, _ = linear_kernels(model, list(pair.weights))
        for kernel in kernels.values():
            return _MatrixView(kernel, pair.float_layer.kernel)
    return _CallView(pair)


class _MatrixView:
    """A layer as `X W`: bias and activation are left out."""

    def __init__(self, kernel: LinearKernel, float_kernel: keras.Variable):
        self.kernel = kernel
        self.to_array, self.from_array = kernel.to_matrix, kernel.from_matrix
        self.float_matrix = kernel.to_matrix(float_kernel.numpy().astype(np.float32))

    def examples(self, ours: LayerCall, floats: LayerCall) -> Pairs:
        rows = [self.kernel.rows(tf.cast(each.args[0], tf.float32)) for each in (ours, floats)]
        for inputs, float_inputs in zip(*rows, strict=True):
            yield inputs.numpy(), tf.matmul(float_inputs, self.float_matrix).numpy()

    def batch_size(self, reservoir, settings) -> int:
        return settings.batch_size

    def apply(self, inputs, weights):
        return tf.matmul(inputs, weights[0])


class _CallView:
    """A layer as its own call."""

    def __init__(self, pair: LayerPair):
        self.pair = pair
        self.to_array = self.from_array = np.asarray

    def examples(self, ours: LayerCall, floats: LayerCall) -> Pairs:
        yield ours.args[0].numpy(), tf.cast(floats.outputs, tf.float32).numpy()

    def batch_size(self, reservoir, settings) -> int:
        positions = math.prod(reservoir.targets.shape[1:-1])
        return max(4, settings.batch_size // positions)

    def apply(self, inputs, weights):
        layer = self.pair.layer
        variables = [weight.variable for weight in self.pair.weights.values()]
        replaced = [
            (variable, lambda value, new=new: tf.cast(new, value.dtype))
            for variable, new in zip(variables, weights, strict=True)
        ]
        return call_through(layer, Overlay(weights=replaced), layer, inputs, training=False)


def _calls(model, layer, batch) -> list[LayerCall]:
    calls: list[LayerCall] = []
    watch_calls(model, {"": layer}, batch, lambda name, call: calls.append(call))
    return calls


def _why_not(call: LayerCall) -> str | None:
    """Why the layer cannot be called again on examples of its inputs; None if it can."""
    passed = [each for each in keras.tree.flatten((call.args, call.kwargs)) if tf.is_tensor(each)]
    if any(tf.is_symbolic_tensor(each) for each in passed):
        return NOT_REACHED
    if len(passed) != 1 or len(call.args) != 1 or not tf.is_tensor(call.args[0]):
        return "its layer is called with more than one tensor"
    if not tf.is_tensor(call.outputs):
        return "its layer returns more than one tensor"
    return None


class _Reservoir:
    """A sample of a stream of examples, each as likely as the others, in bounded memory.

    Examples of another shape than the first (sequences padded batch by batch) are passed over.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self.random = np.random.default_rng(seed)
        self.keys = np.empty(0)
        self.inputs = self.targets = None

    @property
    def size(self) -> int:
        return len(self.keys)

    def add(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        if self.inputs is None:
            elements = math.prod(inputs.shape[1:]) + math.prod(targets.shape[1:])
            self.capacity = min(self.capacity, max(1, _MAX_ELEMENTS // max(1, elements)))
            self.inputs, self.targets = inputs[:0], targets[:0]
        if (inputs.shape[1:], targets.shape[1:]) != (self.inputs.shape[1:], self.targets.shape[1:]):
            return
        keys = self.random.random(len(inputs))
        # Those with the smallest keys stay.
        order = np.argsort(np.concatenate([self.keys, keys]), kind="stable")[: self.capacity]
        old, new = order[order < self.size], order[order >= self.size] - self.size
        self.inputs = np.concatenate([self.inputs[old], inputs[new]])
        self.targets = np.concatenate([self.targets[old], targets[new]])
        self.keys = np.concatenate([self.keys[old], keys[new]])
