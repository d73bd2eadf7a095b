"""TFMOT's quantizers: how a tensor is rounded, and the interface for those of the user's own."""

import abc

import keras
import tensorflow as tf

from tfcompress.keras_hooks.quantizer import FixedRange, MovingRange
from tfcompress.ops import fake_quant as fq
from tfcompress.ops import ranges
from tfcompress.ops.schemes import Scheme


class Quantizer(abc.ABC):
    """How a tensor is rounded. Subclass it for rounding of your own, which no exporter knows."""

    @abc.abstractmethod
    def build(self, tensor_shape, name, layer):
        """The quantizer's variables, by name, made with `layer.add_weight(name, ...)`.

        Args:
            tensor_shape: Shape of what is quantized; None for activations.
            name: Of what is quantized, e.g. `"kernel"`.
            layer: The wrapper that owns the variables.
        """

    @abc.abstractmethod
    def __call__(self, inputs, training, weights, **kwargs):
        """The rounded tensor.

        Args:
            inputs: What is quantized.
            training: Whether this is a training step.
            weights: What `build` returned.
            **kwargs: Nothing, so far.
        """

    @abc.abstractmethod
    def get_config(self):
        """The constructor arguments."""

    @classmethod
    def from_config(cls, config):
        """The quantizer that `get_config` described."""
        return cls(**config)


class _OnGrid(Quantizer):
    """A quantizer that tfcompress has by itself: a scheme, and where the range comes from."""

    def __init__(self, num_bits, per_axis, symmetric, narrow_range):
        self.num_bits, self.per_axis = num_bits, per_axis
        self.symmetric, self.narrow_range = symmetric, narrow_range
        self.scheme  # noqa: B018, raises for bits that there are not

    @property
    def scheme(self) -> Scheme:
        """The same as a value of `tfcompress.quantization`."""
        granularity = "channel" if self.per_axis else "tensor"
        return Scheme(self.num_bits, self.symmetric, granularity)

    def build(self, tensor_shape, name, layer):
        """The range, one variable."""
        variable = layer.add_weight(
            name=f"{name}_range",
            shape=(2,),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )
        return {"range": variable}

    def __call__(self, inputs, training, weights, **kwargs):
        """`inputs` on the grid of the range."""
        source = self.source(weights["range"])
        bounds = source.observe(inputs) if training else source.bounds()
        rounded = fq.fake_quant_activations(inputs, bounds, self._of_tensor())
        return tf.where(ranges.range_is_empty(bounds), inputs, rounded)

    def source(self, variable):
        """Where the range comes from, for `keras_hooks.quantizer.LayerQuantizer`."""
        return MovingRange(variable)

    def _of_tensor(self) -> Scheme:
        return Scheme(self.num_bits, self.symmetric, "tensor")

    def get_config(self):
        """The constructor arguments."""
        names = ("num_bits", "per_axis", "symmetric", "narrow_range")
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(repr(self.get_config()))


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class LastValueQuantizer(_OnGrid):
    """On the range that the tensor has: for weights, whose range needs no variable.

    Args:
        num_bits: Width of the integers, 2 to 8.
        per_axis: Whether each output channel has a scale of its own.
        symmetric: Whether the zero point is 0.
        narrow_range: Taken, and not looked at: a symmetric grid leaves out the smallest integer.

    Raises:
        ValueError: `num_bits` is out of its range.

    Example:

    >>> quantizer = LastValueQuantizer(4, per_axis=False, symmetric=True, narrow_range=True)
    >>> quantizer(tf.constant([0.7, 0.33]), training=True, weights={}).numpy().round(2)
    array([0.7, 0.3], dtype=float32)
    """

    def __call__(self, inputs, training, weights, **kwargs):
        """`inputs` on the grid of their extremes."""
        axes = tuple(range(len(inputs.shape) - 1)) if self.per_axis else None
        return fq.fake_quant_weights(inputs, self.scheme, axes)

    def build(self, tensor_shape, name, layer):
        """Of activations the last range, for inference; weights have theirs at hand."""
        return super().build(tensor_shape, name, layer) if tensor_shape is None else {}


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class MovingAverageQuantizer(_OnGrid):
    """On the moving average of the ranges of batches; the first batch sets it.

    Args:
        num_bits: Width of the integers, 2 to 8.
        per_axis: Must be False: integer kernels have one scale for an activation.
        symmetric: Whether the zero point is 0.
        narrow_range: As for `LastValueQuantizer`.
    """


class WidenedRange(MovingRange):
    """A range that holds all that was seen."""

    def observe(self, x: tf.Tensor) -> tf.Tensor:
        """Take a batch into account; returns the new `[low, high]`."""
        widened = ranges.widened_range(self.bounds(), ranges.extremes(x))
        self.variable.assign(widened)
        return widened


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class AllValuesQuantizer(_OnGrid):
    """On the range of all that was seen in training.

    Args:
        num_bits: Width of the integers, 2 to 8.
        per_axis: Must be False.
        symmetric: Whether the zero point is 0.
        narrow_range: As for `LastValueQuantizer`.
    """

    def source(self, variable):
        """Where the range comes from."""
        return WidenedRange(variable)


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class FixedQuantizer(_OnGrid):
    """On a range that is known.

    Args:
        num_bits: Width of the integers, 2 to 8.
        init_min: Lower end of the range, 0 or less.
        init_max: Upper end of the range, 0 or more.
        narrow_range: As for `LastValueQuantizer`.

    Example:

    >>> FixedQuantizer(8, 0.0, 25.5, False)(tf.constant([3.14]), False, {}).numpy().round(2)
    array([3.1], dtype=float32)
    """

    def __init__(self, num_bits, init_min, init_max, narrow_range):
        self.init_min, self.init_max = float(init_min), float(init_max)
        super().__init__(num_bits, per_axis=False, symmetric=False, narrow_range=narrow_range)

    def build(self, tensor_shape, name, layer):
        """Nothing."""
        return {}

    def source(self, variable=None):
        """Where the range comes from."""
        return FixedRange(self.init_min, self.init_max)

    def __call__(self, inputs, training, weights, **kwargs):
        """`inputs` on the grid of the range."""
        return fq.fake_quant_activations(inputs, self.source().bounds(), self._of_tensor())

    def get_config(self):
        """The constructor arguments."""
        names = ("num_bits", "init_min", "init_max", "narrow_range")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class NoQuantizer(Quantizer):
    """Rounds nothing."""

    def build(self, tensor_shape, name, layer):
        """Nothing."""
        return {}

    def __call__(self, inputs, training, weights, **kwargs):
        """`inputs`."""
        return inputs

    def get_config(self):
        """Nothing."""
        return {}


def is_known(quantizer: Quantizer) -> bool:
    """Whether tfcompress has the quantizer by itself, so that it can export it.

    >>> is_known(NoQuantizer()), is_known(FixedQuantizer(8, 0.0, 1.0, False))
    (False, True)
    """
    return isinstance(quantizer, _OnGrid) and type(quantizer).__call__ in _OWN_CALLS


_OWN_CALLS = (_OnGrid.__call__, LastValueQuantizer.__call__, FixedQuantizer.__call__)
