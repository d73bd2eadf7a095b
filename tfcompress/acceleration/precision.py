"""Mixed precision: which policy suits the device, and models that use it."""

import contextlib
import functools
import logging
import pathlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfcompress.keras_hooks import nodes

_log = logging.getLogger("tfcompress")
_NAMES = ("auto", "mixed_bfloat16", "mixed_float16", "float32")
# Instructions that multiply bfloat16 matrices; without them it is emulated, and slower.
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def precision_policy(which: str = "auto") -> keras.DTypePolicy:
    """The policy for this machine; what was chosen, and why, goes to the log.

    "auto" is bfloat16 on a TPU, float16 on a GPU, and on a CPU bfloat16 where the processor has
    instructions for it, else float32. Variables are float32 in all of them. With float16, Keras
    scales the loss by itself when the model is compiled.

    Args:
        which: `"auto"`, `"mixed_bfloat16"`, `"mixed_float16"` or `"float32"`.

    Returns:
        A Keras policy, to pass as `dtype=` of a layer.

    Raises:
        ValueError: An unknown name.

    Example:

    >>> precision_policy("mixed_bfloat16").compute_dtype
    'bfloat16'
    """
    if which not in _NAMES:
        raise ValueError(f"Got the precision {which!r}; expected one of {_NAMES}.")
    if which != "auto":
        return keras.DTypePolicy(which)
    kinds = {device.device_type for device in tf.config.list_physical_devices()}
    name, reason = choose_policy(kinds, _processor_flags())
    _log.info("mixed_precision: %s: %s", name, reason)
    return keras.DTypePolicy(name)


def choose_policy(devices: set[str], flags: set[str]) -> tuple[str, str]:
    """The name of the policy that "auto" takes, and why.

    Args:
        devices: Kinds that TensorFlow sees, e.g. `{"CPU", "GPU"}`.
        flags: What the processor says that it has.

    Example:

    >>> choose_policy({"CPU", "GPU"}, set())
    ('mixed_float16', 'a GPU')
    """
    if "TPU" in devices:
        return "mixed_bfloat16", "a TPU"
    if "GPU" in devices:
        return "mixed_float16", "a GPU"
    if found := sorted(flags & _CPU_FLAGS):
        return "mixed_bfloat16", f"a CPU with {', '.join(found)}"
    return "float32", "a CPU without instructions for bfloat16"


@functools.cache
def _processor_flags() -> frozenset[str]:
    """What Linux says that the processor has; nothing elsewhere."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())


@contextlib.contextmanager
def mixed_precision(which: str = "auto") -> Iterator[keras.DTypePolicy]:
    """Layers that are made in a `with` block compute in lower precision.

    Make the last layer with `dtype="float32"`, so that losses are exact.

    Args:
        which: See `precision_policy`.

    Yields:
        The policy.

    Example:

    >>> with mixed_precision("mixed_bfloat16"):
    ...     layer = keras.layers.Dense(2)
    >>> layer.compute_dtype, layer.variable_dtype, keras.layers.Dense(2).compute_dtype
    ('bfloat16', 'float32', 'float32')
    """
    policy, before = precision_policy(which), keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield policy
    finally:
        keras.config.set_dtype_policy(before)


def to_mixed_precision(model: keras.Model, which: str = "auto") -> keras.Model:
    """A copy of a model that computes in lower precision; its outputs stay float32.

    Args:
        model: A built Sequential or Functional model of float32 layers, nested or not; expand
            another one first, with `tfcompress.expand`.
        which: See `precision_policy`.

    Returns:
        A new model with the same weights, not compiled.

    Raises:
        ValueError: The model is subclassed or not built.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> [layer.compute_dtype for layer in to_mixed_precision(model, "mixed_bfloat16").layers]
    ['bfloat16', 'float32']
    """
    if not (isinstance(model, keras.Model) and getattr(model, "outputs", None)):
        raise ValueError(
            f"to_mixed_precision needs a built Sequential or Functional model, got {model!r}. Use "
            "tfcompress.expand(model), or make the model under mixed_precision()."
        )
    policy = precision_policy(which)
    last = {nodes.producer(tensor).operation.name for tensor in model.outputs}

    def copied(layer):
        config = layer.get_config()
        if layer.name not in last and "dtype" in config:
            config["dtype"] = policy
        return type(layer).from_config(config)

    copy = keras.models.clone_model(model, clone_function=copied)
    copy.set_weights(model.get_weights())
    return copy
