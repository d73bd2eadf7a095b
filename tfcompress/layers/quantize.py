"""Quantization of one layer, with its ranges as saved variables."""

import dataclasses

import keras
import tensorflow as tf

from tfcompress.graph.placement import moves_only
from tfcompress.keras_hooks import walk
from tfcompress.keras_hooks.overlay import call_through
from tfcompress.keras_hooks.quantizer import (
    LayerQuantizer,
    MovingRange,
    activation_name,
    fixed_range,
    range_places,
    weight_axes,
)
from tfcompress.layers.base import CompressionWrapper
from tfcompress.ops.fake_quant import (
    Scheme,
    activation_scheme,
    fake_quant_weights,
    weight_scheme,
)


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
        weights: `"int8"`, `"int2"` to `"int8"`, a symmetric `Scheme`, or None to leave them float.
        activations: The same, asymmetric per tensor; None to leave them float, as behind a layer
            that batch normalization or ReLU follows.
        include: Glob or globs over the paths of the layer's variables; None for all kernels.
        exclude: Glob or globs to leave out.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: A scheme is not one of the above; when built: a glob matches nothing.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), Quantize(keras.layers.Identity()), Quantize(keras.layers.Dense(3))])
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(tf.ones((8, 4)), tf.zeros((8, 3)), verbose=0)
    >>> model.layers[0].ranges
    {'output': (0.0, 1.0)}

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """

    def __init__(
        self,
        layer,
        weights: str | Scheme | None = "int8",
        activations: str | Scheme | None = "int8",
        include=None,
        exclude=None,
        **kwargs,
    ):
        super().__init__(layer, include=include, exclude=exclude, **kwargs)
        self.weights_scheme = weight_scheme(weights)
        self.activations_scheme = activation_scheme(activations)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """`(low, high)` by place: `"preactivation"`, `"output"`."""
        return {
            place: tuple(keras.ops.convert_to_numpy(source.bounds()).tolist())
            for place, source in self.quantizer.ranges.items()
        }

    def build_state(self, was_built):
        """Make the ranges."""
        plain = self.layer
        while isinstance(plain, CompressionWrapper):
            plain = plain.layer
        places = () if moves_only(plain, identity=False) else range_places(plain)
        if self.activations_scheme is None:
            places = ()
        self.quantizer = LayerQuantizer(
            layer=plain,
            weights=self._chosen(plain),
            weight_scheme=self.weights_scheme,
            activation_scheme=self.activations_scheme,
            ranges={place: self._range(plain, place) for place in places},
            wrapper=self,
        )

    def call(self, *args, **kwargs):
        """The layer's own call, on rounded weights, with rounded results."""
        quantizer = self.quantizer
        return call_through(quantizer.layer, quantizer.overlay(), self.layer, *args, **kwargs)

    def bake(self, variable, value):
        """`value` on the grid."""
        for weight, axes in self.quantizer.weights:
            if weight is variable:
                return tf.cast(fake_quant_weights(value, self.weights_scheme, axes), value.dtype)
        return value

    def get_config(self):
        """The constructor arguments."""
        schemes = {"weights": self.weights_scheme, "activations": self.activations_scheme}
        return {
            **super().get_config(),
            **{key: scheme and dataclasses.asdict(scheme) for key, scheme in schemes.items()},
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

    def _range(self, plain, place):
        fixed = fixed_range(activation_name(plain), self.activations_scheme)
        if place == "output" and fixed is not None:
            return fixed
        return MovingRange(
            self.add_weight(
                shape=(2,),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name=f"{place}_range",
            )
        )
