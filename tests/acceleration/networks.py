"""Small models of every kind that acceleration has to take, each with a batch."""

import keras
import numpy as np
from keras import layers

from tests.models import mlp, subclassed


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def dense():
    """A Sequential."""
    return mlp(), _normal(3, 12)


def cnn():
    """Convolutions with batch norms that have seen data."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    x = _normal(4, 8, 8, 2)
    for _ in range(20):
        model(x, training=True)
    return model, x


def two_in_two_out():
    """A dict in, a dict out."""
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    x = layers.Concatenate()([layers.Dense(5)(left), layers.Dense(5, "tanh")(right)])
    outputs = {"sum": layers.Dense(2)(x), "all": [x, layers.Softmax()(x)]}
    model = keras.Model({"left": left, "right": right}, outputs)
    return model, {"left": _normal(3, 4), "right": _normal(3, 3, seed=1)}


def list_in():
    """A list whose names are not in the order of the alphabet."""
    b, a = keras.Input((3,), name="b"), keras.Input((3,), name="a")
    model = keras.Model([b, a], [layers.Subtract()([b, a]), layers.Dense(2)(a)])
    return model, [_normal(3, 3), _normal(3, 3, seed=1)]


def residual():
    """A subclassed model."""
    return subclassed(), _normal(3, 12)


def attention():
    """Token ids, a mask and attention."""
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    model = keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    return model, np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1]], "int32")


ALL = [dense, cnn, two_in_two_out, list_in, residual, attention]
