"""Quantization of one layer, with its ranges as saved variables."""

import numbers
from collections.abc import Mapping

import keras
import tensorflow as tf

from tfcompress.graph.placement import moves_only
from tfcompress.keras_hooks import walk
from tfcompress.keras_hooks.overlay import call_through
from tfcompress.keras_hooks.quantizer import (
    DynamicRange,
    LayerQuantizer,
    LearnedRange,
    MovingRange,
    QuantizedWeight,
    activation_name,
    dynamic_places,
    fixed_range,
    range_places,
    weight_axes,
)
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops import fake_quant as fq
from tfcompress.ops.schemes import Scheme, scheme_pair

SCALES = ("max", "fixed", "lsq")


@keras.saving.register_keras_serializable(package="tfcompress")
class Quantize(CompressionWrapper):
    """Compute a layer as its integer version will, in training and in inference.

    The layer sees its weights rounded to the symmetric grid of each output channel, and what it
    returns is rounded to the asymmetric grid of a moving range that training observes. Gradients
    pass straight through inside the ranges. The ranges are variables of the wrapper: a saved model
    goes on from them, `tfcompress.export` writes them, and no callback is needed. Until a range has
    seen a batch, activations are left as they are.

    What a model is called on needs a range too: begin with `Quantize(keras.layers.Identity())`, or
    let `tfcompress.quantize(model)` put the wrappers where they belong.

    Args:
        layer: The layer to wrap.
        weights: `"int8"`, `"int2"` to `"int8"`, a `Scheme`, or None to leave them float; `"w4a8"`
            says both.
        activations: `"int8"`, `"int2"` to `"int8"`, `"dynamic"`, a `Scheme`, or None to leave them
            float, as behind a layer that batch normalization or ReLU follows. Dynamic ones are
            rounded before a layer with weights, on the range of each row.
        scales: Where the scales of the weights come from. `"max"`: their extremes, at every call.
            `"fixed"`: a saved variable, set by whoever rounds them after training. `"lsq"`: a
            variable that is trained, and so are the ranges of the activations; see the reference.
            An optimizer with weight decay should leave both alone
            (`exclude_from_weight_decay(var_names=["scale", "range"])`).
        percentile: Share of the values of a batch that a range is to hold, in (50, 100].
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        output: Whether what it returns is rounded; False leaves only what is between the halves of
            a separable convolution, as in front of batch normalization or ReLU.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: A scheme or `scales` is not one of the above, `scales` other than `"max"` with
            asymmetric weights; when built: a glob matches nothing.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), Quantize(keras.layers.Identity()), Quantize(keras.layers.Dense(3))])
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(tf.ones((8, 4)), tf.zeros((8, 3)), verbose=0)
    >>> model.layers[0].ranges
    {'output': (0.0, 1.0)}

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; learned scales: Esser et al.
    2020, https://arxiv.org/abs/1902.08153, and Bhalgat et al. 2020,
    https://arxiv.org/abs/2004.09576.
    """

    def __init__(
        self,
        layer,
        weights: str | Scheme | None = "int8",
        activations: str | Scheme | None = "int8",
        scales: str = "max",
        percentile: float = 100.0,
        include=None,
        exclude=None,
        output: bool = True,
        **kwargs,
    ):
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        if isinstance(weights, Mapping) and "bits" not in weights:
            raise ValueError(
                f"layers.Quantize got weights={dict(weights)!r}, and a layer has one scheme. Pass "
                'it, e.g. weights="int8"; a dict of globs is for tfcompress.quantize.'
            )
        self.weights_scheme, self.activations_scheme = scheme_pair(weights, activations)
        check_scales(scales, self.weights_scheme)
        check_percentile(percentile)
        self.scales, self.percentile, self.rounds_output = scales, percentile, output

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """`(low, high)` by place: `"middle"`, `"preactivation"`, `"output"`."""
        return {
            place: tuple(keras.ops.convert_to_numpy(source.bounds()).tolist())
            for place, source in self.quantizer.ranges.items()
            if not isinstance(source, DynamicRange)
        }

    def build_state(self, was_built):
        """Make the ranges."""
        plain = self.layer
        while isinstance(plain, CompressionWrapper):
            plain = plain.layer
        self.quantizer = LayerQuantizer(
            layer=plain,
            weights=[self._weight(plain, *pair) for pair in self._chosen(plain)],
            activation_scheme=self.activations_scheme,
            ranges={place: self._range(plain, place) for place in self._places(plain)},
            wrapper=self,
        )

    def call(self, *args, **kwargs):
        """The layer's own call, on rounded weights, with rounded results."""
        quantizer = self.quantizer
        return call_through(quantizer.layer, quantizer.overlay(), self.layer, *args, **kwargs)

    def bake(self, variable, value):
        """`value` on the grid."""
        for weight in self.quantizer.weights:
            if weight.variable is variable:
                return tf.cast(weight.quantize(value), value.dtype)
        return value

    def get_config(self):
        """The constructor arguments."""
        schemes = {"weights": self.weights_scheme, "activations": self.activations_scheme}
        return {
            **super().get_config(),
            **{key: scheme and scheme.get_config() for key, scheme in schemes.items()},
            "scales": self.scales,
            "percentile": self.percentile,
            "output": self.rounds_output,
        }

    def _chosen(self, plain):
        if self.weights_scheme is None:
            return []
        include, exclude = walk.as_globs(self.include), walk.as_globs(self.exclude)
        paths = [variable.path for variable in plain.variables]
        walk.check_globs([*(include or ()), *(exclude or ())], paths)
        return [
            (variable, axes)
            for variable, axes in weight_axes(plain)
            if (include is None or walk.matches(variable.path, include))
            and not (exclude and walk.matches(variable.path, exclude))
        ]

    def _places(self, plain) -> tuple[str, ...]:
        if self.activations_scheme is None:
            return ()
        if self.activations_scheme.dynamic:
            return dynamic_places(plain)
        if moves_only(plain, identity=False):
            return ()
        return range_places(plain, self.rounds_output)

    def _weight(self, plain, variable, axes) -> QuantizedWeight:
        if self.scales == "max":
            return QuantizedWeight(variable, axes, self.weights_scheme)
        like = fq.weight_scale(tf.zeros(variable.shape), self.weights_scheme, axes)
        shape = fq.compact_scale(like, variable.shape, self.weights_scheme, axes).shape
        scale = self._state(f"{variable.name}_scale", tuple(shape), self.scales == "lsq")
        return QuantizedWeight(variable, axes, self.weights_scheme, scale)

    def _range(self, plain, place):
        if self.activations_scheme.dynamic:
            return DynamicRange()
        fixed = fixed_range(activation_name(plain), self.activations_scheme)
        if place == "output" and fixed is not None:
            return fixed
        variable = self._state(f"{place}_range", (2,), self.scales == "lsq")
        if self.scales == "lsq":
            return LearnedRange(variable)
        return MovingRange(variable, self.percentile)

    def _state(self, name, shape, trainable) -> keras.Variable:
        return self.add_weight(
            shape=shape,
            initializer="zeros",
            dtype="float32",
            trainable=trainable,
            autocast=False,
            # A training step sets it from the first batch, on every replica alike.
            aggregation="mean" if trainable else "only_first_replica",
            name=name,
        )


def check_scales(scales: str, scheme: Scheme | None) -> None:
    """Raise a ValueError if `scales` is not known, or not with such weights."""
    if scales not in SCALES:
        raise ValueError(f"scales={scales!r} is not known; pass one of {SCALES}.")
    restricted = scheme is not None and (not scheme.symmetric or scheme.power_of_two)
    if scales != "max" and restricted:
        raise ValueError(
            f"scales={scales!r} needs symmetric weights without powers of two, got {scheme}; pass "
            'scales="max", or another scheme.'
        )


def check_percentile(percentile: float) -> None:
    """Raise a ValueError if it is not in (50, 100]."""
    if not isinstance(percentile, numbers.Real) or not 50 < percentile <= 100:
        raise ValueError(
            f"percentile={percentile!r} must be in (50, 100]: the share of a batch's values that a "
            "range is to hold, in percent; 99.9 is a usual value."
        )
