"""TFMOT's quantization schemes: how the layers are quantized that have no config of their own."""

import abc
import dataclasses

import keras

from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.ops.schemes import Scheme

_PER_TENSOR = (keras.layers.Dense, keras.layers.Conv2DTranspose)


class QuantizeLayoutTransform(abc.ABC):
    """TFMOT's passes over the graph; here `tfcompress.quantize` sees to where ranges go."""

    @abc.abstractmethod
    def apply(self, model, layer_quantize_map):
        """Not called."""


class QuantizeRegistry(abc.ABC):
    """Configs for layers by their type. Subclass it for a scheme of your own."""

    @abc.abstractmethod
    def supports(self, layer):
        """Whether it has a config for `layer`."""

    @abc.abstractmethod
    def get_quantize_config(self, layer):
        """The `QuantizeConfig` of `layer`."""


class QuantizeScheme(abc.ABC):
    """How a model is quantized. Subclass it for one of your own; its registry is asked first."""

    @abc.abstractmethod
    def get_layout_transformer(self):
        """Not called."""

    @abc.abstractmethod
    def get_quantize_registry(self):
        """A `QuantizeRegistry`, or None for the defaults."""


class _OwnScheme(QuantizeScheme):
    """A scheme that is data: widths, and what is preserved of the weights' values."""

    num_bits_weight = 8
    num_bits_activation = 8
    disable_per_axis = False
    preserve_zeros = False
    preserve_clusters = False

    def get_layout_transformer(self):
        """None: `tfcompress.quantize` sees to it."""

    def get_quantize_registry(self):
        """None: every layer has a default."""

    def weights_of(self, layer) -> Scheme:
        """How the weights of a layer are quantized."""
        per_tensor = self.disable_per_axis or isinstance(layer, _PER_TENSOR)
        return Scheme(self.num_bits_weight, granularity="tensor" if per_tensor else "channel")

    def activations(self) -> Scheme:
        """How activations are quantized."""
        return Scheme(self.num_bits_activation, symmetric=False, granularity="tensor")


class Default8BitQuantizeScheme(_OwnScheme):
    """8 bits; one scale an output channel for convolutions, one a tensor for Dense.

    Args:
        disable_per_axis: Whether convolutions have one scale, too.

    Example:

    >>> Default8BitQuantizeScheme().weights_of(keras.layers.Dense(2)).granularity
    'tensor'
    """

    def __init__(self, disable_per_axis=False):
        self.disable_per_axis = disable_per_axis


class DefaultNBitQuantizeScheme(_OwnScheme):
    """As the default with other widths.

    Args:
        disable_per_axis: Whether convolutions have one scale, too.
        num_bits_weight: Width of weights, 2 to 8.
        num_bits_activation: Width of activations, 2 to 8.

    Raises:
        ValueError: A width is out of its range.
    """

    def __init__(self, disable_per_axis=False, num_bits_weight=8, num_bits_activation=8):
        self.disable_per_axis = disable_per_axis
        self.num_bits_weight, self.num_bits_activation = num_bits_weight, num_bits_activation
        Scheme(num_bits_weight)
        self.activations()


class Default8BitPrunePreserveQuantizeScheme(Default8BitQuantizeScheme):
    """The default, under which zeros of the weights stay zeros in training (PQAT)."""

    preserve_zeros = True


class Default8BitClusterPreserveQuantizeScheme(Default8BitQuantizeScheme):
    """The default, under which weights of few values keep to as many (CQAT).

    Args:
        preserve_sparsity: Whether zeros stay zeros as well (PCQAT).
    """

    preserve_clusters = True

    def __init__(self, preserve_sparsity=True):
        super().__init__()
        self.preserve_zeros = preserve_sparsity


def scheme_by_path(scheme: _OwnScheme, flat: keras.Model, paths: dict[int, str]) -> dict:
    """The schemes of the weights of a flat graph, for `tfcompress.quantize`.

    Args:
        scheme: The scheme.
        flat: A flat Functional model.
        paths: `id(variable) -> path`.
    """
    return {
        paths[id(variable)]: dataclasses.replace(scheme.weights_of(layer))
        for layer in flat.layers
        for variable, _ in weight_axes(layer)
        if id(variable) in paths
    }
