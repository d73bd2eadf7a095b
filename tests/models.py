"""Small models and data that tests share."""

import keras
import numpy as np
from keras import layers


def classification(num_examples=96, num_features=12, num_classes=3, seed=0):
    """Features and labels that a linear model can learn."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(num_examples, num_features)).astype("float32")
    y = np.argmax(x @ random.normal(size=(num_features, num_classes)), axis=1)
    return x, y.astype("int32")


def correlated(rows, features, seed=0):
    """Inputs that share a few causes, as activations do."""
    random = np.random.default_rng(seed)
    causes = random.normal(size=(rows, max(features // 3, 1)))
    mixed = causes @ random.normal(size=(causes.shape[1], features))
    return mixed + 0.3 * random.normal(size=(rows, features))


def matrix(features, outputs, seed=1):
    return np.random.default_rng(seed).normal(size=(features, outputs))


def mlp(num_features=12, num_classes=3):
    """Two dense layers, built."""
    return keras.Sequential(
        [
            keras.Input((num_features,)),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(num_classes, name="head"),
        ],
        name="mlp",
    )


def unbuilt_mlp():
    """Two dense layers that get their weights from the first batch."""
    return keras.Sequential(
        [
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def nested():
    """A Functional model with a Sequential inside, and a layer that is used twice."""
    inner = keras.Sequential(
        [keras.layers.Dense(12, activation="relu", name="inner")], name="block"
    )
    shared = keras.layers.Dense(12, activation="relu", name="shared")
    inputs = keras.Input((12,))
    x = shared(shared(inner(inputs)))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="nested")


@keras.saving.register_keras_serializable(package="tests")
class Residual(keras.Model):
    """A subclassed model with a residual connection."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(12, activation="relu", name="first")
        self.second = keras.layers.Dense(12, name="second")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, inputs):
        return self.head(inputs + self.second(self.first(inputs)))


def subclassed():
    """A built subclassed model."""
    model = Residual(name="residual")
    model(np.zeros((1, 12), "float32"))
    return model


def compile_classifier(model, optimizer="sgd", **kwargs):
    """Compile for integer labels and logits."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **kwargs)
    return model


def kernels(model):
    """Path -> array, for every weight with 2 or more axes."""
    return {w.path: w.numpy() for w in model.trainable_variables if len(w.shape) > 1}


class SelfAttention(layers.MultiHeadAttention):
    def __init__(self):
        super().__init__(num_heads=2, key_dim=3)

    def build(self, shape):
        super().build(shape, shape)

    def call(self, x):
        return super().call(x, x)

    def compute_output_spec(self, x):
        return super().compute_output_spec(x, x)


_SEQUENCE = (2, 6, 4)
_IMAGE = (2, 6, 6, 4)
# Kind -> how to make one, and the shape of a batch that it takes.
LAYER_KINDS = {
    "Dense": (lambda: layers.Dense(3, activation="tanh"), (2, 4)),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (6, 3)), _SEQUENCE),
    "Conv1D": (lambda: layers.Conv1D(3, 2), _SEQUENCE),
    "Conv2D": (lambda: layers.Conv2D(3, 2), _IMAGE),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (2, 3, 3, 3, 2)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), _IMAGE),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2), _IMAGE),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 2), _IMAGE),
    "Embedding": (lambda: layers.Embedding(5, 3), (2, 4)),
    "MultiHeadAttention": (lambda: SelfAttention(), _SEQUENCE),
    "LSTM": (lambda: layers.LSTM(3), _SEQUENCE),
    "GRU": (lambda: layers.GRU(3), _SEQUENCE),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), _SEQUENCE),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(3)), _SEQUENCE),
    "ConvLSTM2D": (lambda: layers.ConvLSTM2D(2, 2), (2, 3, 4, 4, 2)),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(3)), _SEQUENCE),
    "Sequential": (lambda: keras.Sequential([layers.Dense(3), layers.Dense(2)]), (2, 4)),
    "BatchNormalization": (lambda: layers.BatchNormalization(), (8, 4)),
}
