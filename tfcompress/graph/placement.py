"""Where quantizers go: which layers of a model need a range on what they return."""

import dataclasses

import keras

from tfcompress.graph.expand import expand, is_primitive
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.overlay import all_layers, children, original_layers
from tfcompress.keras_hooks.quantizer import activation_name, is_fused

# These only move values, or pick some of them: what comes out is on the grid of what went in.
_MOVES = (
    keras.layers.InputLayer,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.ActivityRegularization,
    keras.layers.Masking,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.UpSampling1D,
    keras.layers.UpSampling3D,
)
# Their integer kernels average in the scale of the input, and keep it.
_AVERAGES = (
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
)
# The converter folds a batch normalization into these.
_FOLDABLE = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
# Their inputs are names, not quantities, whatever the dtype.
_READ_IDS = (
    keras.layers.Embedding,
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
)
_NOT_A_LAYER = (
    "{} is an operation, not a layer, and has no call to put a range into; tfcompress.quantize or "
    "a calibration at export gives it one"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What one layer needs.

    Args:
        layer: A layer of the model.
        output: Whether what it returns needs a range.
        follows: The layer (or the model, for its input) whose range its output keeps, if any.
    """

    layer: keras.layers.Layer
    output: bool
    follows: keras.layers.Layer | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the quantizers of a model go.

    Args:
        placements: One for each layer that computes, in the order of the graph.
        inputs: For each input of the model, flattened, whether it needs a range.
        skipped: What gets no range although it computes: name to reason.
    """

    placements: tuple[Placement, ...]
    inputs: tuple[bool, ...]
    skipped: dict[str, str]


def place(model: keras.Model, inputs=None) -> Plan:
    """Decide where a model needs ranges, as integer kernels will compute it.

    A layer's output has a range, except where the next operator is computed in the same kernel
    (batch normalization behind a convolution, ReLU), where a kernel keeps the scale of its input
    (pooling), and where values are only moved.

    Args:
        model: A built model. One that cannot be expanded into a flat graph gets a range behind
            every layer that computes; `skipped` says so.
        inputs: What it is called on, where the model does not know; see `expand`.

    Returns:
        A `Plan` in terms of the model's own layers.

    Example:

    >>> import keras
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv"),
    ...     keras.layers.BatchNormalization(name="bn"), keras.layers.ReLU(name="relu"),
    ...     keras.layers.MaxPooling2D(name="pool"), keras.layers.Flatten(name="flat"),
    ...     keras.layers.Dense(2, name="dense")])
    >>> [p.layer.name for p in place(model).placements if p.output]
    ['relu', 'dense']
    """
    try:
        flat = expand(model, inputs)
    except ValueError as error:
        return _by_layer(model, str(error))
    return _by_graph(flat, model)


def _by_graph(flat, model) -> Plan:
    graph = _Graph(flat, model)
    placements: dict[int, Placement] = {}
    skipped: dict[str, str] = {}
    for call in graph.calls:
        layer = graph.original(call.operation)
        if layer is None:
            skipped[call.operation.name] = _NOT_A_LAYER.format(type(call.operation).__name__)
            continue
        placement = graph.placement(call, layer, placements)
        known = placements.get(id(layer))
        # A shared layer is quantized as its most demanding call needs it.
        if known is None or (placement.output and not known.output):
            placements[id(layer)] = placement
    return Plan(tuple(placements.values()), graph.inputs(), skipped)


class _Graph:
    """The calls of a flat graph, with who reads what."""

    def __init__(self, flat, model):
        self.flat, self.model, self.original = flat, model, original_layers(model)
        self.calls = nodes.calls(flat)
        self.readers: dict[int, list] = {}
        for call in self.calls:
            for tensor in call.inputs:
                self.readers.setdefault(id(tensor), []).append(call.operation)
        self.leaving = {id(tensor) for tensor in flat.outputs}

    def inputs(self) -> tuple[bool, ...]:
        return tuple(
            keras.backend.is_float_dtype(tensor.dtype)
            and not any(isinstance(r, _READ_IDS) for r in self.readers.get(id(tensor), ()))
            for tensor in self.flat.inputs
        )

    def placement(self, call, layer, placements) -> Placement:
        if moves_only(layer) or self._absorbed(call, layer):
            return Placement(layer, output=False)
        follows = None
        if isinstance(layer, _AVERAGES):
            follows = self._source(call.inputs[0], placements)
        return Placement(layer, output=True, follows=follows)

    def _absorbed(self, call, layer) -> bool:
        """Whether the one operator that reads the output is computed in the same kernel."""
        leaves = any(id(tensor) in self.leaving for tensor in call.outputs)
        readers = [r for tensor in call.outputs for r in self.readers.get(id(tensor), [])]
        return not leaves and len(readers) == 1 and _absorbs(readers[0], layer)

    def _source(self, tensor, placements):
        """The layer that last gave `tensor` a range; the model for its input, None if unknown."""
        if any(tensor is x for x in self.flat.inputs):
            return self.model
        layer = self.original(nodes.producer(tensor).operation)
        if layer is None:
            return None
        if moves_only(layer):
            return self._source(nodes.producer(tensor).arguments.keras_tensors[0], placements)
        known = placements.get(id(layer))
        return layer if known is not None and known.output else None


def _absorbs(reader, layer) -> bool:
    """Whether an operator that computes `layer` also computes `reader` on its result."""
    if isinstance(reader, keras.layers.Concatenate):
        # All that is concatenated has one scale, in which the converter lets it be written at once.
        return is_fused(activation_name(layer)) and not isinstance(layer, _AVERAGES)
    if isinstance(reader, keras.layers.BatchNormalization):
        return isinstance(layer, _FOLDABLE) and activation_name(layer) == "linear"
    if not isinstance(reader, keras.layers.ReLU | keras.layers.Activation):
        return False
    return activation_name(layer) == "linear" and is_fused(activation_name(reader))


def moves_only(layer: keras.layers.Layer, identity: bool = True) -> bool:
    """Whether a layer only moves or picks values, so that its output is on its input's grid.

    Args:
        layer: A layer.
        identity: What to say of `keras.layers.Identity`.

    Returns:
        True for pooling by maximum, reshaping, padding, dropout and the like.

    Example:

    >>> moves_only(keras.layers.Flatten()), moves_only(keras.layers.Dense(2))
    (True, False)
    """
    if isinstance(layer, keras.layers.Identity):
        return identity
    if isinstance(layer, keras.layers.UpSampling2D):
        return layer.interpolation == "nearest"
    linear = isinstance(layer, keras.layers.Activation) and activation_name(layer) == "linear"
    return linear or isinstance(layer, _MOVES)


def has_attention(model: keras.Model, inputs=None) -> bool:
    """Whether a model has attention: a softmax over a product of two activations.

    Args:
        model: A built model.
        inputs: What it is called on, where the model does not know; see `expand`. A model that
            cannot be expanded has attention if it has an attention layer.

    Returns:
        True for models with attention layers of Keras or KerasHub, and for what is written by hand.

    Example:

    >>> x = keras.Input((4, 8))
    >>> has_attention(keras.Model(x, keras.layers.Attention()([x, x])))
    True
    >>> has_attention(keras.Sequential([x, keras.layers.Dense(2, activation="softmax")]))
    False
    """
    if any("Attention" in type(layer).__name__ for layer in all_layers(model)):
        return True
    try:
        flat = expand(model, inputs)
    except ValueError:
        return False
    return any(_is_attention(call) for call in nodes.calls(flat))


def _is_attention(call) -> bool:
    operation = call.operation
    if type(operation).__name__ == "DotProductAttention":
        return True
    softmax = isinstance(operation, keras.layers.Softmax) or type(operation).__name__ == "Softmax"
    return softmax and _is_product(call.inputs[0])


def _is_product(tensor) -> bool:
    """Whether a tensor is a product of two tensors of the graph, scaled and masked."""
    node = nodes.producer(tensor)
    inputs = node.arguments.keras_tensors
    name = type(node.operation).__name__
    if name in ("Matmul", "Einsum", "Dot"):
        return len(inputs) == 2
    scales = name in ("Multiply", "Divide", "TrueDivide", "Add", "Subtract", "Where")
    return scales and any(_is_product(x) for x in inputs)


def _by_layer(model, reason) -> Plan:
    leaves = [leaf for leaf in _leaves(model) if not isinstance(leaf, keras.layers.InputLayer)]
    reads_ids = any(isinstance(leaf, _READ_IDS) for leaf in leaves)
    note = (
        "a range behind every layer that computes, none on the input"
        if reads_ids
        else ("a range behind every layer that computes")
    )
    return Plan(
        tuple(Placement(leaf, output=not moves_only(leaf)) for leaf in leaves),
        (not reads_ids,),
        {model.name: f"its graph cannot be read, so it gets {note}: {reason}"},
    )


def _leaves(layer) -> list:
    if is_primitive(layer):
        return [layer]
    unique = {id(leaf): leaf for child in children(layer) for leaf in _leaves(child)}
    return list(unique.values())
