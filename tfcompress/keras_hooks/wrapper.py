"""A wrapper that Keras calls, builds and saves as if it were the layer inside.

Private Keras API used here, each with a test in `tests/keras_hooks/test_wrapper.py`:
`Layer._call_signature`, `_call_has_training_arg`, `_call_has_mask_arg`, `_call_has_context_arg` and
`call_signature_parameters`, which Keras reads from a layer's `call` when the layer is made,
`Layer.build.__signature__`, which it matches with the shapes of the call, and
`Layer._input_shape_arg`, with which the first layer of a Sequential builds it.
"""

import inspect

import keras

_READ_FROM_CALL = (
    "_call_signature",
    "call_signature_parameters",
    "_call_has_training_arg",
    "_call_has_mask_arg",
    "_call_has_context_arg",
)


def forward_signatures(wrapper: keras.layers.Wrapper) -> None:
    """Give `wrapper` the signatures of `call` and `build` of the layer inside.

    Without them a wrapped MultiHeadAttention is not told `training`, and is built with one shape.

    Args:
        wrapper: A wrapper whose `call` and `build` take any arguments and pass them on.
    """
    layer = wrapper.layer
    for name in (*_READ_FROM_CALL, "_input_shape_arg"):
        if hasattr(layer, name):
            setattr(wrapper, name, getattr(layer, name))
    wrapper.build.__signature__ = inspect.signature(layer.build)
    wrapper.supports_masking = layer.supports_masking
