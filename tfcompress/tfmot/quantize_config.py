"""What a layer's quantization is told by the user, and the wrappers that hold and do it."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfcompress.keras_hooks.overlay import in_training
from tfcompress.keras_hooks.quantizer import (
    LayerQuantizer,
    QuantizedWeight,
    range_places,
    weight_axes,
)
from tfcompress.layers import CompressionWrapper, Quantize
from tfcompress.ops.schemes import Scheme
from tfcompress.tfmot.quantizers import FixedQuantizer, Quantizer, is_known


class QuantizeConfig(abc.ABC):
    """Which weights and activations of a layer are quantized, and how. Subclass it.

    `set_quantize_weights` and `set_quantize_activations`, by which TFMOT exchanges attributes of
    the layer, are never called: the layer sees rounded values of its own variables.
    """

    @abc.abstractmethod
    def get_weights_and_quantizers(self, layer):
        """`(variable, quantizer)` pairs; the layer is built."""

    @abc.abstractmethod
    def get_activations_and_quantizers(self, layer):
        """`(activation, quantizer)` pairs; an activation is rounded behind it, and before it where
        integer kernels compute it on its own."""

    def set_quantize_weights(self, layer, quantize_weights):  # noqa: B027, TFMOT has it
        """Not called."""

    def set_quantize_activations(self, layer, quantize_activations):  # noqa: B027, TFMOT has it
        """Not called."""

    @abc.abstractmethod
    def get_output_quantizers(self, layer):
        """A list with the quantizer of what the layer returns, or an empty one."""

    @abc.abstractmethod
    def get_config(self):
        """The constructor arguments."""

    @classmethod
    def from_config(cls, config):
        """The config that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class QuantizeAnnotate(CompressionWrapper):
    """Marks a layer for `quantize_apply`; computes as the layer does.

    Args:
        layer: The layer.
        quantize_config: A `QuantizeConfig`, or None for what the scheme says.
        **kwargs: What every Keras layer takes.
    """

    def __init__(self, layer, quantize_config=None, **kwargs):
        kwargs.setdefault("name", f"quantize_annotate_{layer.name}")
        super().__init__(layer, **kwargs)
        self.quantize_config = quantize_config

    def build_state(self, was_built):
        """There is none."""

    def twin(self) -> "QuantizeAnnotate":
        """A wrapper around a new layer like the one inside, with the same config object."""
        layer = self.layer.__class__.from_config(self.layer.get_config())
        return QuantizeAnnotate(layer, self.quantize_config, name=self.name)

    def get_config(self):
        """The constructor arguments."""
        arguments = {"quantize_config": self.quantize_config}
        return {**super().get_config(), **keras.saving.serialize_keras_object(arguments)}


@dataclasses.dataclass(frozen=True, eq=False)
class _CustomWeight:
    """A weight that the user's own quantizer rounds; in the place of a `QuantizedWeight`."""

    variable: keras.Variable
    axes: tuple[int, ...]
    round: Callable[[tf.Tensor], tf.Tensor]
    scheme: Scheme = Scheme()  # Nothing is known of its grid.

    def quantize(self, w: tf.Tensor) -> tf.Tensor:
        """`w`, rounded."""
        return self.round(w)


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class QuantizeWrapperV2(Quantize):
    """`layers.Quantize` that does what a `QuantizeConfig` says.

    Args:
        layer: The layer to wrap.
        quantize_config: What is quantized, and how.
        name_prefix: What comes before the layer's name in that of the wrapper.
        **kwargs: What every Keras layer takes.

    Raises:
        ValueError: No `QuantizeConfig`; when built: a weight that is not the layer's, activations
            with several schemes.
    """

    def __init__(self, layer, quantize_config, name_prefix="quant_", **kwargs):
        if not isinstance(quantize_config, QuantizeConfig):
            raise ValueError(
                "quantize_config must be a QuantizeConfig, got "
                f"{type(quantize_config).__name__}. It says how the layer is quantized."
            )
        kwargs.setdefault("name", f"{name_prefix or ''}{layer.name}")
        super().__init__(layer, **kwargs)
        self.quantize_config = quantize_config

    def build_state(self, was_built):
        """Make what the quantizers need."""
        plain = self.layer
        while isinstance(plain, CompressionWrapper):
            plain = plain.layer
        weights = self.quantize_config.get_weights_and_quantizers(plain)
        places = self._quantizers(plain)
        known = {place: each for place, each in places.items() if is_known(each)}
        schemes = {
            dataclasses.replace(each.scheme, granularity="tensor") for each in known.values()
        }
        if len(schemes) > 1:
            raise ValueError(
                f"The activations of {plain.name!r} have several schemes, {schemes}; pass one."
            )
        self.quantizer = LayerQuantizer(
            layer=plain,
            weights=[self._weight_on(plain, *pair) for pair in weights],
            activation_scheme=next(iter(schemes), None),
            ranges={
                place: each.source(each.build(None, place, self).get("range"))
                for place, each in known.items()
            },
            wrapper=self,
        )
        self._custom = {
            place: self._rounding(each, None, place)
            for place, each in places.items()
            if place not in known
        }

    def call(self, *args, **kwargs):
        """The layer's own call, on rounded weights, with rounded results."""
        outputs = super().call(*args, **kwargs)
        if "output" not in self._custom:
            return outputs
        return keras.tree.map_structure(self._custom["output"], outputs)

    def add_weight(self, *args, **kwargs):
        """As in Keras 2, the name may come first."""
        if args and isinstance(args[0], str):
            kwargs["name"], args = args[0], args[1:]
        return super().add_weight(*args, **kwargs)

    def get_config(self):
        """The constructor arguments."""
        base = CompressionWrapper.get_config(self)
        config = keras.saving.serialize_keras_object(self.quantize_config)
        return {**base, "quantize_config": config}

    def _quantizers(self, plain) -> dict[str, Quantizer]:
        """By place."""
        config = self.quantize_config
        found = dict.fromkeys(["output"], next(iter(config.get_output_quantizers(plain)), None))
        for _, quantizer in config.get_activations_and_quantizers(plain):
            places = range_places(plain) if is_known(quantizer) else ["output"]
            found |= dict.fromkeys(places, quantizer)
        return {place: each for place, each in found.items() if each is not None}

    def _weight_on(self, plain, variable, quantizer):
        if not any(variable is each for each in plain.variables):
            raise ValueError(
                f"{type(self.quantize_config).__name__} names {variable!r}, which is no weight of "
                f"{plain.name!r}; it has {[each.path for each in plain.variables]}."
            )
        axes = {id(each): found for each, found in weight_axes(plain)}
        axes = axes.get(id(variable), tuple(range(len(variable.shape))))
        if is_known(quantizer):
            return QuantizedWeight(variable, axes, quantizer.scheme)
        rounding = self._rounding(quantizer, variable.shape, variable.name)
        return _CustomWeight(variable, axes, rounding)

    def _rounding(self, quantizer, shape, name) -> Callable[[Any], tf.Tensor]:
        variables = quantizer.build(shape, name, self)
        return functools.partial(_call_quantizer, quantizer, variables)


def _call_quantizer(quantizer, variables, x):
    return quantizer(x, in_training(), weights=variables)


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class QuantizeWithFixedOutput(Quantize):
    """`layers.Quantize` whose output has a range that is known.

    Args:
        layer: The layer to wrap.
        low: Lower end of the range, 0 or less.
        high: Upper end of the range, 0 or more.
        **kwargs: What `layers.Quantize` takes.
    """

    def __init__(self, layer, low, high, **kwargs):
        super().__init__(layer, **kwargs)
        self.low, self.high = float(low), float(high)

    def get_config(self):
        """The constructor arguments."""
        return {**super().get_config(), "low": self.low, "high": self.high}

    def _range(self, plain, place):
        if place != "output":
            return super()._range(plain, place)
        return FixedQuantizer(8, self.low, self.high, False).source()


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class QuantizeAt(Quantize):
    """`layers.Quantize` that rounds where it is told, whatever integer kernels do.

    Args:
        layer: The layer to wrap.
        places: Out of `"preactivation"` and `"output"`.
        **kwargs: What `layers.Quantize` takes.
    """

    def __init__(self, layer, places=(), **kwargs):
        super().__init__(layer, **kwargs)
        self.places = list(places)

    def get_config(self):
        """The constructor arguments."""
        return {**super().get_config(), "places": self.places}

    def _places(self, plain):
        return tuple(self.places)
