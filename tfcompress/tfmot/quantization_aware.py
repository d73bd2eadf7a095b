"""TFMOT's quantization-aware training API on `tfcompress.quantize` and `layers.Quantize`."""

import warnings
from collections.abc import Mapping

import keras
import numpy as np

from tfcompress.graph.expand import expand
from tfcompress.graph.placement import moves_only, place
from tfcompress.graph.rebuild import consumers, map_layers
from tfcompress.keras_hooks import walk
from tfcompress.keras_hooks.overlay import all_layers, original_layers, raw_value
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.layers import Cluster, CompressionWrapper, Prune, Quantize
from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import quantize
from tfcompress.tfmot.keras2 import refuse_keras_2
from tfcompress.tfmot.models import require_model, wrapped
from tfcompress.tfmot.quantize_config import (
    QuantizeAnnotate,
    QuantizeConfig,
    QuantizeWithFixedOutput,
    QuantizeWrapperV2,
)
from tfcompress.tfmot.quantize_schemes import (
    Default8BitQuantizeScheme,
    QuantizeScheme,
    scheme_by_path,
)

# The smallest magnitude that is not a denormal: what `layers.Prune` is to keep.
_NOT_ZERO = float(np.finfo(np.float32).tiny)
_MOST_CLUSTERS = 256


def quantize_model(to_quantize, quantized_layer_name_prefix="quant_"):
    """Quantize a model with the default scheme, to train it (QAT).

    Args:
        to_quantize: A built model of any kind; nested and subclassed ones become flat graphs.
        quantized_layer_name_prefix: What comes before the names of quantized layers.

    Returns:
        A new model with copies of the weights, not compiled; see `tfcompress.quantize`.
        `tfcompress.export` writes its integer file.

    Raises:
        ValueError: Not a built model of Keras 3.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [layer.name for layer in quantize_model(model).layers]
    ['input_layer...', 'quantize_layer', 'quant_head']

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """
    _require(to_quantize, "to_quantize", "quantize_model")
    prefix = quantized_layer_name_prefix
    return quantize_apply(quantize_annotate_model(to_quantize), quantized_layer_name_prefix=prefix)


def quantize_annotate_model(to_annotate):
    """Mark every layer of a model for `quantize_apply`; those that are marked already stay.

    Args:
        to_annotate: A model of any kind.

    Returns:
        A new model with copies of the weights, not compiled.

    Raises:
        ValueError: Not a model of Keras 3.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [layer.name for layer in quantize_annotate_model(model).layers]
    ['quantize_annotate_head']
    """
    _require(to_annotate, "to_annotate", "quantize_annotate_model")
    return wrapped(to_annotate, _annotated)


def quantize_annotate_layer(to_annotate, quantize_config=None):
    """Mark a layer for `quantize_apply`.

    Args:
        to_annotate: A layer, not a model.
        quantize_config: A `QuantizeConfig`, or None for what the scheme says.

    Returns:
        The layer in a wrapper that computes as it does.

    Raises:
        ValueError: Something else was passed.

    Example:

    >>> quantize_annotate_layer(keras.layers.Dense(2, name="head")).name
    'quantize_annotate_head'
    """
    refuse_keras_2(to_annotate, "quantize_annotate_layer")
    if not isinstance(to_annotate, keras.layers.Layer) or isinstance(to_annotate, keras.Model):
        raise ValueError(
            "`to_annotate` can only be a `keras.layers.Layer` instance. You passed an instance of "
            f"type: {type(to_annotate).__name__}. For models there is quantize_annotate_model."
        )
    if quantize_config is not None and not isinstance(quantize_config, QuantizeConfig):
        raise ValueError(
            "`quantize_config` can only be a `tfmot.quantization.keras.QuantizeConfig` instance. "
            f"You passed an instance of type: {type(quantize_config).__name__}."
        )
    return QuantizeAnnotate(to_annotate, quantize_config)


def quantize_apply(
    model,
    scheme=Default8BitQuantizeScheme(),  # noqa: B008, as TFMOT documents it
    quantized_layer_name_prefix="quant_",
):
    """Quantize the layers of a model that were marked.

    Args:
        model: A built model with layers from `quantize_annotate_layer` or `_model`.
        scheme: A `QuantizeScheme`.
        quantized_layer_name_prefix: What comes before the names of quantized layers.

    Returns:
        A new flat model with copies of the weights, not compiled; what leads to a quantized layer
        is rounded, too.

    Raises:
        ValueError: Not a built model of Keras 3, or nothing is marked.

    Example:

    >>> marked = quantize_annotate_layer(keras.layers.Dense(2, name="head"))
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="body"), marked])
    >>> [layer.name for layer in quantize_apply(model).layers]
    ['input_layer...', 'quant_body', 'quant_head']
    """
    _require(model, "model", "quantize_apply")
    if not model.built:
        raise ValueError(
            f"`model` must be a built model, and {model.name!r} has not been built yet. Call "
            "`model.build(input_shape)` before quantizing your model."
        )
    configs = {}

    def unmark(layer):
        if not isinstance(layer, QuantizeAnnotate):
            return layer
        config = layer.quantize_config or _of_registry(scheme, layer.layer)
        configs.update((id(inner), config) for inner in all_layers(layer.layer))
        return layer.layer

    plain = wrapped(model, unmark)
    if not configs:
        raise ValueError(
            "`model` must contain at least one layer which has been annotated with "
            "`quantize_annotate*`. There are no layers to quantize."
        )
    own = scheme if hasattr(scheme, "weights_of") else Default8BitQuantizeScheme()
    return _Applying(plain, configs, own, quantized_layer_name_prefix or "").run()


def fix_input_output_range(
    model,
    num_bits=8,
    input_min=0.0,
    input_max=1.0,
    output_min=0.0,
    output_max=1.0,
    narrow_range=False,
):
    """Fix the ranges of what a quantized model takes and returns.

    Args:
        model: A model from `quantize_apply` or `quantize_model`.
        num_bits: Width of their integers.
        input_min: Lower end of the inputs' range, 0 or less.
        input_max: Upper end of the inputs' range, 0 or more.
        output_min: Lower end of the outputs' range, 0 or less.
        output_max: Upper end of the outputs' range, 0 or more.
        narrow_range: Taken, and not looked at.

    Returns:
        A new model of the same layers, but for those at the ends.

    Raises:
        ValueError: `model` is not quantized.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> fixed = fix_input_output_range(quantize_model(model), output_max=3.0)
    >>> [type(layer).__name__ for layer in fixed.layers]
    ['InputLayer', 'QuantizeWithFixedOutput', 'QuantizeWithFixedOutput']
    """
    inputs, outputs = _ends(model, "fix_input_output_range")
    activations = Scheme(num_bits, symmetric=False, granularity="tensor")

    def fix(operation):
        bounds = None
        if operation.name in outputs:
            bounds = output_min, output_max
        elif operation.name in inputs:
            bounds = input_min, input_max
        if bounds is None:
            return operation
        settings = _settings(operation) | {"activations": activations}
        fixed = QuantizeWithFixedOutput(operation.layer, *bounds, **settings)
        fixed.build_from_config(operation.layer.get_build_config())
        ranges = {variable.name: variable for variable in _own(operation)}
        for variable in _own(fixed):
            variable.assign(ranges[variable.name])
        return fixed

    return map_layers(model, fix)


def remove_input_range(model):
    """Let a quantized model take its inputs as they are.

    Args:
        model: A model from `quantize_apply` or `quantize_model`.

    Returns:
        A new model of the same layers, without those that round its inputs.

    Raises:
        ValueError: `model` is not quantized.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> [layer.name for layer in remove_input_range(quantize_model(model)).layers]
    ['input_layer...', 'quant_head']
    """
    inputs, _ = _ends(model, "remove_input_range")
    return map_layers(model, lambda each: None if each.name in inputs else each)


def quantize_scope(*args):
    """A scope to load quantized models in; their own classes are registered with Keras.

    Args:
        *args: Dicts of name -> class, for configs and quantizers of the user's own.

    Example:

    >>> with quantize_scope({"MyConfig": QuantizeConfig}):
    ...     keras.saving.get_custom_objects().get("MyConfig")
    """
    return keras.saving.custom_object_scope(*(args or ({},)))


def strip_clustering_cqat(to_strip):
    """Take the clustering out of a model from cluster-preserving QAT; the quantization stays.

    Args:
        to_strip: A model.

    Returns:
        A new model, whose weights hold the shared values.

    Raises:
        ValueError: Not a model of Keras 3.
    """
    require_model(to_strip, "strip_clustering_cqat")

    def strip_inside(layer):
        if not isinstance(layer, Quantize) or not isinstance(layer.layer, CompressionWrapper):
            return layer
        return _without_inner(layer)

    return wrapped(to_strip, strip_inside)


class _Applying:
    """What `quantize_apply` does to the plain model; `configs` of marked layers are by id."""

    def __init__(self, plain, configs: Mapping[int, QuantizeConfig | None], scheme, prefix):
        self.plain, self.configs, self.scheme, self.prefix = plain, configs, scheme, prefix
        self.flat = expand(plain)
        original = original_layers(plain)
        self.sources = {layer.name: original(layer) for layer in self.flat.layers}
        self.outputs = {each.layer.name: each.output for each in place(self.flat).placements}
        self.consumers = consumers(self.flat)
        self.all_marked = all(
            self._is_marked(layer.name)
            for layer in self.flat.layers
            if not isinstance(layer, keras.layers.InputLayer)
        )

    def run(self) -> keras.Model:
        named = walk.named_variables(self.plain)
        paths = {id(variable): path for path, variable in named.items()}
        left_float = [
            paths[id(variable)]
            for layer in self.flat.layers
            if not self._by_default(layer.name)
            for variable, _ in weight_axes(layer)
        ]
        weights = scheme_by_path(self.scheme, self.flat, paths)
        some = set(weights) - set(left_float)
        quantized = quantize(
            self.plain,
            {path: each for path, each in weights.items() if path in some} or None,
            self.scheme.activations(),
            exclude=left_float or None,
            verbose=0,
        )
        return map_layers(quantized, self._exchanged)

    def _is_marked(self, name) -> bool:
        """Whether a layer is; of operations that are none, whether all layers are."""
        return id(self.sources[name]) in self.configs if name in self.sources else self.all_marked

    def _config(self, name) -> QuantizeConfig | None:
        return self.configs.get(id(self.sources.get(name)))

    def _by_default(self, name) -> bool:
        return self._is_marked(name) and self._config(name) is None

    def _leads_to_marked(self, name) -> bool:
        """Whether a marked layer reads what it returns, as it is or moved about."""
        readers = self.consumers.get(name, ())
        return any(self._is_marked(reader.name) for reader in readers) or any(
            moves_only(reader) and self._leads_to_marked(reader.name) for reader in readers
        )

    def _exchanged(self, operation):
        inner = operation.layer if isinstance(operation, Quantize) else operation
        name = inner.name
        if self._config(name) is not None:
            return QuantizeWrapperV2(inner, self._config(name), self.prefix)
        if name not in self.sources:
            return self._rounding(operation)
        if self._is_marked(name):
            return self._renamed(operation) if operation is not inner else operation
        if self._leads_to_marked(name) and self.outputs.get(name):
            settings = {"weights": None, "activations": self.scheme.activations()}
            return Quantize(inner, name=self.prefix + name, **settings)
        return inner

    def _rounding(self, operation):
        """What rounds inputs of the model, and results of operations that are no layers."""
        if not isinstance(operation, Quantize):
            return operation
        place = operation.name.removeprefix("quantize_")
        if place.startswith("input_") and place.removeprefix("input_").isdigit():
            index = int(place.removeprefix("input_"))
            read = self._leads_to_marked(self.flat.inputs[index].name)
            name = "quantize_layer" if index == 0 else f"quantize_layer_{index}"
            return Quantize(operation.layer, **_settings(operation, name)) if read else None
        return operation if self.all_marked else None

    def _renamed(self, operation) -> Quantize:
        inner = self._preserved(operation.layer)
        return Quantize(inner, **_settings(operation, self.prefix + operation.layer.name))

    def _preserved(self, layer):
        """The layer in a wrapper that keeps the zeros or the few values of its weights."""
        weights = [keras.ops.convert_to_numpy(w) for w, _ in weight_axes(layer)]
        counts = [len(np.unique(w)) for w in weights]
        shared = all(count < w.size for count, w in zip(counts, weights, strict=True))
        if self.scheme.preserve_clusters and counts and shared and max(counts) <= _MOST_CLUSTERS:
            clusters = max(*counts, 2)
            return Cluster(layer, clusters, preserve_sparsity=self.scheme.preserve_zeros)
        if self.scheme.preserve_zeros and any(0.0 in w for w in weights):
            return Prune(layer, threshold=_NOT_ZERO)
        return layer


def _annotated(layer):
    if isinstance(layer, QuantizeAnnotate):
        return layer
    if isinstance(layer, keras.layers.Lambda):
        warnings.warn(
            f"The Lambda layer {layer.name!r} is not quantized: what it computes is not known. "
            "Write a layer of its own, and give it a QuantizeConfig.",
            stacklevel=2,
        )
        return layer
    return QuantizeAnnotate(layer)


def _require(model, argument, function):
    if model is None:
        raise ValueError(f"`{argument}` cannot be None. Pass a keras.Model to {function}.")
    refuse_keras_2(model, function)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`{argument}` can only be a `keras.Model` instance. Use the `quantize_annotate_layer` "
            f"API to handle individual layers. You passed an instance of type: "
            f"{type(model).__name__}."
        )


def _of_registry(scheme, layer) -> QuantizeConfig | None:
    """What a scheme of the user's own says of a layer."""
    if not isinstance(scheme, QuantizeScheme):
        raise ValueError(
            f"`scheme` can only be a QuantizeScheme, got {type(scheme).__name__}, e.g. "
            "default_8bit.Default8BitQuantizeScheme()."
        )
    registry = scheme.get_quantize_registry()
    if registry is None or not registry.supports(layer):
        return None
    return registry.get_quantize_config(layer)


def _settings(wrapper: Quantize, name=None) -> dict:
    """The arguments of `layers.Quantize` but for the layer."""
    return {
        "name": name or wrapper.name,
        "weights": wrapper.weights_scheme,
        "activations": wrapper.activations_scheme,
        "scales": wrapper.scales,
        "percentile": wrapper.percentile,
        "include": wrapper.include,
        "exclude": wrapper.exclude,
        "output": wrapper.rounds_output,
    }


def _ends(model, function) -> tuple[set[str], set[str]]:
    """The names of the wrappers that round a quantized model's inputs, and of those at its end."""
    require_model(model, function)
    if not any(isinstance(layer, Quantize) for layer in model.layers):
        raise ValueError(
            f"`model` should be already quantized: {function} takes what quantize_model or "
            f"quantize_apply returned, and {model.name!r} has no quantized layer."
        )
    readers = consumers(model)
    names = {each.name for x in model.inputs for each in readers[x.name]}
    inputs = {each.name for each in model.layers if _rounds_only(each) and each.name in names}
    leaving = {name for name, found in readers.items() if not found}
    outputs = {each.name for each in model.layers if isinstance(each, Quantize)} & leaving
    return inputs, outputs


def _rounds_only(layer) -> bool:
    return isinstance(layer, Quantize) and isinstance(layer.layer, keras.layers.Identity)


def _without_inner(wrapper: Quantize) -> Quantize:
    """A quantized layer without wrappers inside, whose effect is in its weights."""
    inner, inside = wrapper.layer, []
    while isinstance(inner, CompressionWrapper):
        inside.append(inner)
        inner = inner.layer
    copy = inner.__class__.from_config(inner.get_config())
    copy.build_from_config(inner.get_build_config())
    for variable, target in zip(inner.weights, copy.weights, strict=True):
        value = raw_value(variable)
        for each in reversed(inside):
            value = each.bake(variable, value)
        target.assign(value)
    plain = Quantize(copy, **_settings(wrapper))
    plain.build_from_config(inner.get_build_config())
    for variable, target in zip(_own(wrapper), _own(plain), strict=True):
        target.assign(variable)
    return plain


def _own(wrapper) -> list[keras.Variable]:
    """The variables of a wrapper that are not those of the layer inside."""
    inside = {id(variable) for variable in wrapper.layer.variables}
    return [variable for variable in wrapper.variables if id(variable) not in inside]
