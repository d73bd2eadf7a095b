"""The precision a model computes in, changed for a while.

Private Keras API used here, with a test in `tests/keras_hooks/test_precision.py`:
`KerasTensor._dtype` and `InputLayer._dtype`, to which models cast their inputs, and
`Sequential._functional`.
"""

import contextlib
from collections.abc import Iterator

import keras

from tfcompress.keras_hooks.overlay import all_layers

_LOW = ("float16", "bfloat16")


@contextlib.contextmanager
def computing_in_float32(model: keras.Model) -> Iterator[None]:
    """Let every layer of a mixed-precision model compute in float32 for a `with` block.

    Args:
        model: Any model; its variables are float32.

    Raises:
        ValueError: A layer has variables of lower precision, or is quantized by Keras.

    Example:

    >>> layer = keras.layers.Dense(1, dtype="mixed_bfloat16")
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> with computing_in_float32(model):
    ...     print(layer.compute_dtype)
    float32
    >>> layer.compute_dtype
    'bfloat16'
    """
    layers = all_layers(model)
    for layer in layers:
        _require_float32_variables(layer)
    policies = [(layer, layer.dtype_policy) for layer in layers if layer.compute_dtype in _LOW]
    # A Sequential takes the dtype of its input from its first layer, and casts what comes in.
    inputs = [(x, x.dtype) for layer in layers for x in _graph_inputs(layer) if x.dtype in _LOW]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        for each, _ in inputs:
            each._dtype = "float32"
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy
        for each, dtype in inputs:
            each._dtype = dtype


def _graph_inputs(layer) -> list:
    if isinstance(layer, keras.layers.InputLayer):
        return [layer]
    graph = getattr(layer, "_functional", None) or layer
    return graph.inputs if hasattr(graph, "operations") else []


def _require_float32_variables(layer):
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            f"The layer {layer.path!r} was quantized by Keras ({layer.quantization_mode}), whose "
            "integers no exporter reads correctly. Export the float model, e.g. with "
            "tfcompress.quantize(model, calibration=data)."
        )
    if layer.variable_dtype in _LOW:
        raise ValueError(
            f"The layer {layer.path!r} holds {layer.variable_dtype} variables, which cannot be "
            f'exported. Build the model under "float32" or "mixed_{layer.variable_dtype}" and copy '
            "the weights: new.set_weights(model.get_weights())."
        )
