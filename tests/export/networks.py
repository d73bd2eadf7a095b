"""Small networks trained on digits, and what their files must hold to."""

import functools
import warnings

import keras
import numpy as np
from keras import layers

from tfcompress.callbacks import QuantizationAwareTraining
from tfcompress.export import export
from tfcompress.keras_hooks.overlay import attached
from tfcompress.keras_hooks.quantizer import recall
from tfcompress.zoo import mnist5k

IMAGE, ROWS = (28, 28, 1), (28, 28)


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(*args, **options)


def kinds(artefact):
    return {name.split(" (")[0] for name in artefact.float_operators}


def chain(*operations, shape=IMAGE):
    return keras.Sequential([keras.Input(shape), *operations])


def norm_relu():
    return layers.BatchNormalization(momentum=0.9), layers.ReLU()


def dense():
    return chain(layers.Flatten(), layers.Dense(32, activation="relu"), layers.Dense(10))


def conv1d():
    return chain(
        layers.Conv1D(16, 5, strides=2, activation="relu"),
        layers.Conv1D(16, 3),
        *norm_relu(),
        layers.Flatten(),
        layers.Dense(10),
        shape=ROWS,
    )


def conv2d():
    return chain(
        layers.Conv2D(8, 5, strides=2, padding="same", activation="relu"),
        layers.Conv2D(16, 3),
        *norm_relu(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(10),
    )


def depthwise():
    return chain(
        layers.Conv2D(8, 5, strides=2),
        *norm_relu(),
        layers.DepthwiseConv2D(3, padding="same"),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(6.0),
        layers.Conv2D(16, 1),
        *norm_relu(),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10),
    )


def separable():
    return chain(
        layers.SeparableConv2D(8, 5, strides=2, activation="relu"),
        layers.SeparableConv2D(16, 3, strides=2),
        *norm_relu(),
        layers.Flatten(),
        layers.Dense(10),
    )


def transposed():
    return chain(
        layers.Conv2D(8, 5, strides=4, activation="relu"),
        layers.Conv2DTranspose(8, 3, strides=2, activation="relu"),
        layers.Conv2D(8, 3, strides=2),
        layers.Flatten(),
        layers.Dense(10),
    )


def averages():
    return chain(
        layers.Conv2D(8, 5, strides=2, activation="relu"),
        layers.AveragePooling2D(2),
        layers.Flatten(),
        layers.Dense(10),
    )


def residual():
    x = keras.Input(IMAGE)
    h = layers.Conv2D(8, 5, strides=2, padding="same", activation="relu")(x)
    for _ in range(2):
        y = layers.Conv2D(8, 3, padding="same")(h)
        y = layers.Conv2D(8, 3, padding="same")(
            layers.ReLU()(layers.BatchNormalization(momentum=0.9)(y))
        )
        h = layers.ReLU()(layers.Add()([h, layers.BatchNormalization(momentum=0.9)(y)]))
    return keras.Model(x, layers.Dense(10)(layers.Flatten()(h)))


def attention():
    x = keras.Input(ROWS)
    h = layers.Dense(16)(x)
    a = layers.MultiHeadAttention(2, 8)(h, h)
    h = layers.LayerNormalization()(layers.Add()([h, a]))
    h = layers.Dense(16, activation="gelu")(h)
    return keras.Model(x, layers.Dense(10)(layers.GlobalAveragePooling1D()(h)))


def embedding():
    x = keras.Input((49,), dtype="int32")
    h = layers.Embedding(16, 8)(x)
    h = layers.Dense(16, activation="relu")(layers.Flatten()(h))
    return keras.Model(x, layers.Dense(10)(h))


def lstm():
    return chain(layers.LSTM(8), layers.Dense(10), shape=ROWS)


NETWORKS = (
    dense, conv1d, conv2d, depthwise, separable, transposed, averages, residual, attention,
    embedding,
)  # fmt: skip


@functools.cache
def digits(make):
    """Training inputs, labels and 500 held-out inputs, as the network of `make` takes them."""
    (x, y), (held_out, _) = mnist5k()
    return _as_taken(make, x[:1200]), y[:1200], _as_taken(make, held_out[:500])


def _as_taken(make, images):
    if make is embedding:
        return (images[:, ::4, ::4].reshape(len(images), 49) * 15).astype("int32")
    return images if make in (conv1d, attention, lstm) else images[..., None]


def trained(make, *callbacks, epochs=3):
    x, y, held_out = digits(make)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss)
    model.fit(x, y, epochs=epochs, batch_size=50, verbose=0, callbacks=list(callbacks))
    return model, x, held_out


@functools.cache
def trained_to_int8(make):
    """Shared by tests, which leave it as it is."""
    return trained(make, QuantizationAwareTraining())


def simulate(model, x):
    with attached([(q.layer, q.overlay()) for q in recall(model)]):
        return np.asarray(model(x, training=False))


def check_bars(artefact, model, held_out, most):
    """At most `most` output steps, and the same argmax wherever the outputs tell it so finely."""
    assert artefact.precision == "int8"
    simulated, found = simulate(model, held_out), artefact(held_out)
    step = output_step(model)
    steps = np.abs(found - simulated) / step
    assert steps.max() < most + 0.01, steps.max()
    best = np.sort(simulated, axis=-1)
    clear = best[:, -1] - best[:, -2] > most * step
    assert clear.mean() > 0.1  # Else the comparison would say little.
    np.testing.assert_array_equal(found[clear].argmax(-1), simulated[clear].argmax(-1))
    return steps


def output_step(model):
    low, high = recall(model)[-1].ranges["output"].bounds().numpy()
    return (high - low) / 255
