"""Telling what belongs to Keras 2 from what belongs to Keras 3."""

import warnings

import tensorflow as tf

_FIX = (
    "Import keras, or tfcompress, before tensorflow_model_optimization, which asks for Keras 2 in "
    "the environment (TF_USE_LEGACY_KERAS) as soon as it is imported; or write `import "
    "tfcompress.tfmot as tfmot` in its place, which needs no Keras 2"
)


def is_keras_2(x) -> bool:
    """Whether an object is of a class of Keras 2 (the package tf_keras).

    >>> import keras
    >>> is_keras_2(keras.layers.Dense(1))
    False
    """
    return any(kind.__module__.split(".")[0] == "tf_keras" for kind in type(x).__mro__)


def refuse_keras_2(x, function: str) -> None:
    """Raise a ValueError that says what to do, if `x` is a model or layer of Keras 2."""
    if is_keras_2(x):
        raise ValueError(
            f"{function} works on Keras 3, and got {type(x).__name__} of Keras 2 (tf_keras). "
            f"Pass a model through tfcompress.tfmot.convert first, or build it with `import "
            f"keras`. If it was built with tf.keras: {_FIX}."
        )


def warn_if_tf_keras_is_keras_2() -> None:
    """Warn when `tf.keras` of this process is Keras 2."""
    if tf.keras.layers.Layer.__module__.split(".")[0] == "tf_keras":
        warnings.warn(
            f"tf.keras is Keras 2 in this process; tfcompress works on models of Keras 3. {_FIX}. "
            "Models of Keras 2 go through tfcompress.tfmot.convert.",
            stacklevel=3,
        )
