"""Teachers and students that the tests share."""

import keras
import numpy as np


def data(count=48, seed=0):
    """Inputs of 6 features and labels of 3 classes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 6)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def net(width=8, name="net", activation=None, dropout=0.0):
    """Two hidden layers with batch norm, built."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(width, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Dropout(dropout, name="dropout"),
            layers.Dense(width, activation="relu", name="second"),
            layers.Dense(3, activation=activation, name="head"),
        ],
        name=name,
    )


@keras.saving.register_keras_serializable(package="distillation_tests")
class Block(keras.layers.Layer):
    """A subclassed layer with layers inside."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.inner = keras.layers.Dense(width, activation="relu", name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return self.inner(x) * 2.0

    def get_config(self):
        return super().get_config() | {"width": self.width}


@keras.saving.register_keras_serializable(package="distillation_tests")
class Subclassed(keras.Model):
    """A subclassed model of blocks; `call` takes no `training`."""

    def __init__(self, width=8, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.width, self.depth = width, depth
        self.blocks = [Block(width, name=f"block_{i}") for i in range(depth)]
        self.drop = keras.layers.Dropout(0.3, name="drop")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        for block in self.blocks:
            x = self.drop(block(x))
        return self.head(x)

    def get_config(self):
        return {"width": self.width, "depth": self.depth, "name": self.name}


def attentive(heads=2, size=4, layers=2, name="attentive"):
    """Token ids with masked padding, self-attention, a mean, three classes."""
    ids = keras.Input((5,), dtype="int32", name="ids")
    x = keras.layers.Embedding(10, heads * size, mask_zero=True, name="embedding")(ids)
    for index in range(layers):
        attention = keras.layers.MultiHeadAttention(heads, size, name=f"attention_{index}")
        x = keras.layers.LayerNormalization(name=f"norm_{index}")(x + attention(x, x))
    x = keras.layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(ids, keras.layers.Dense(3, name="head")(x), name=name)


def entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def copy(model):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin
