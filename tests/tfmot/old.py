"""TFMOT on Keras 2, in a process of its own: what the bridge is compared with.

`python -m tests.tfmot.old DIRECTORY` writes models, weights, losses and outputs there.
"""

import json
import pathlib
import sys
import warnings

import numpy as np

STEPS, BATCH = 200, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 12)).astype("float32")
Y = RNG.normal(size=(64, 4)).astype("float32")
IMAGES = RNG.normal(size=(64, 8, 8, 3)).astype("float32")
LABELS = RNG.integers(0, 4, 64)
SHAPES = {"a/kernel": (12, 16), "a/bias": (16,), "b/kernel": (16, 4), "b/bias": (4,)}
WEIGHTS = [RNG.normal(size=shape).astype("float32") * 0.3 for shape in SHAPES.values()]


def _decay(initial, final, begin, end, frequency):
    return {
        "initial_sparsity": initial,
        "final_sparsity": final,
        "begin_step": begin,
        "end_step": end,
        "frequency": frequency,
    }


# Where 201, the step before which TFMOT would prune next, is not due.
SCHEDULES = {
    "constant": ("ConstantSparsity", {"target_sparsity": 0.5, "begin_step": 3, "frequency": 7}),
    "decay": ("PolynomialDecay", _decay(0.25, 0.75, 5, 105, 10)),
    "often": ("PolynomialDecay", _decay(0.0, 0.5, 1, 91, 3)),
}


def mlp(keras):
    """The same two layers in either Keras, with the same weights."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu", name="a"),
            layers.Dense(4, name="b"),
        ]
    )
    model.set_weights(WEIGHTS)
    return model


def batches():
    """What `STEPS` steps train on, the same in either Keras."""
    order = np.random.default_rng(1)
    for _ in range(STEPS):
        chosen = order.permutation(len(X))[:BATCH]
        yield X[chosen], Y[chosen]


def train(keras, model, callbacks=()) -> list[float]:
    """The losses of `STEPS` steps of SGD."""
    import tensorflow as tf

    losses = []

    class Losses(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()

        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]))

    signature = (tf.TensorSpec((BATCH, 12)), tf.TensorSpec((BATCH, 4)))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    data = data.apply(tf.data.experimental.assert_cardinality(STEPS))
    model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(data, verbose=0, callbacks=[*callbacks, Losses()])
    return losses


def main(directory):
    """Write everything."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    directory = pathlib.Path(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import tfcompress.tfmot
    told = {"warnings": [str(each.message) for each in caught]}
    told["losses"] = {name: prune(tfmot, tf_keras, directory, name) for name in SCHEDULES}
    told["converted"] = {
        kind: compare(tfcompress.tfmot.convert, wrap_and_train(tfmot, tf_keras, kind))
        for kind in ("plain", "prune", "cluster", "zeros", "annotate", "mixed")
    }
    told["refused"] = refused(tfcompress.tfmot, tf_keras)
    quantize(tfmot, tf_keras, directory)
    linear(tfmot, tf_keras, directory)
    (directory / "told.json").write_text(json.dumps(told))


def prune(tfmot, keras, directory, name):
    kind, arguments = SCHEDULES[name]
    sparsity = tfmot.sparsity.keras
    model = sparsity.prune_low_magnitude(mlp(keras), getattr(sparsity, kind)(**arguments))
    losses = train(keras, model, [sparsity.UpdatePruningStep()])
    np.savez(directory / f"{name}.npz", *sparsity.strip_pruning(model).get_weights())
    if name == "decay":
        model.save(directory / "prune.h5")
    return losses


def cnn(keras):
    layers = keras.layers
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(6, 3, name="conv")(x)
    h = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(h))
    h = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(h)
    side = layers.Conv2D(6, 1, activation="relu", name="side")(h)
    h = layers.Flatten()(layers.MaxPooling2D()(layers.Add(name="sum")([h, side])))
    return keras.Model(x, layers.Dense(4, activation="softmax", name="head")(h))


def wrap_and_train(tfmot, keras, kind):
    keras.utils.set_random_seed(1)
    model = mixed(keras) if kind == "mixed" else cnn(keras)
    linear = tfmot.clustering.keras.CentroidInitialization.LINEAR
    callbacks = []
    if kind == "prune":
        schedule = tfmot.sparsity.keras.PolynomialDecay(0.2, 0.8, 2, 30, frequency=4)
        model = tfmot.sparsity.keras.prune_low_magnitude(model, schedule, block_size=(1, 1))
        callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
    if kind == "cluster":
        model = tfmot.clustering.keras.cluster_weights(model, 6, linear)
    if kind == "zeros":
        halve(model)
        model = tfmot.clustering.keras.cluster_weights(model, 6, linear, preserve_sparsity=True)
    if kind == "annotate":
        model = tfmot.quantization.keras.quantize_annotate_model(model)
    if kind == "quantize":
        model = tfmot.quantization.keras.quantize_model(model)
    model.compile(keras.optimizers.SGD(0.02), "sparse_categorical_crossentropy")
    model.fit(data_of(kind), LABELS, batch_size=16, verbose=0, epochs=2, callbacks=callbacks)
    return model


def halve(model):
    for layer in model.layers:
        if layer.name in ("conv", "side", "head"):
            kernel, bias = layer.get_weights()
            layer.set_weights([np.where(abs(kernel) < np.median(abs(kernel)), 0, kernel), bias])


def mixed(keras):
    """Layers whose arguments Keras 3 has otherwise, and a nested model."""
    layers = keras.layers
    inner = keras.Sequential([keras.Input((6, 8)), layers.LSTM(5, name="lstm")], name="inner")
    x = keras.Input((6,), dtype="int32")
    h = layers.Embedding(10, 8, input_length=6, name="embedding")(x)
    h = layers.SeparableConv1D(8, 3, padding="same", name="separable")(h)
    h = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(h)
    h = layers.LayerNormalization(name="norm")(h)
    return keras.Model(x, layers.Dense(4, activation="softmax", name="head")(inner(h)))


def data_of(kind):
    return np.arange(64 * 6).reshape(64, 6) % 10 if kind == "mixed" else IMAGES


def compare(convert, model):
    """How far apart the outputs are, and what the layers are."""
    x = data_of("mixed") if model.input_shape[1:] == (6,) else IMAGES
    expected = model.predict(x, verbose=0)
    converted = convert(model)
    return {
        "difference": float(abs(converted.predict(x, verbose=0) - expected).max()),
        "layers": [type(layer).__name__ for layer in converted.layers],
    }


def refused(bridge, keras):
    """What is said of what cannot be converted, or is passed to what is for Keras 3."""

    class Own(keras.Model):
        def call(self, x):
            return x

    x, sequence = keras.Input((4,)), keras.Input((4, 4))
    attention = keras.layers.MultiHeadAttention(1, 4, name="attention")
    calls = {
        "several": lambda: bridge.convert(keras.Model(sequence, attention(sequence, sequence))),
        "operator": lambda: bridge.convert(keras.Model(x, keras.layers.Dense(2)(x + 1.0))),
        "subclassed": lambda: bridge.convert(Own(name="own")),
        "prune": lambda: bridge.sparsity.keras.prune_low_magnitude(mlp(keras)),
        "quantize": lambda: bridge.quantization.keras.quantize_model(mlp(keras)),
        "cluster": lambda: bridge.clustering.keras.cluster_weights(mlp(keras), 4),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            told[name] = str(error)
    return told


def quantize(tfmot, keras, directory):
    """A model in mid-training, whose weights' ranges are those of its weights, and its file."""
    import tensorflow as tf

    model = wrap_and_train(tfmot, keras, "quantize")
    keras.backend.set_value(model.optimizer.learning_rate, 0.0)
    model.fit(IMAGES, LABELS, verbose=0)
    model.save(directory / "quantize.h5")
    np.save(directory / "quantize.npy", model.predict(IMAGES, verbose=0))
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    outputs = []
    for image in IMAGES:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(target["index"])[0])
    np.save(directory / "litert.npy", np.stack(outputs))


def linear(tfmot, keras, directory):
    """The centroids that a linear initialization gives."""
    clustering = tfmot.clustering.keras
    start = clustering.CentroidInitialization.LINEAR
    model = clustering.cluster_weights(mlp(keras), 5, start)
    centroids = [layer.cluster_centroids["kernel"].numpy() for layer in model.layers]
    np.savez(directory / "linear.npz", *centroids)


if __name__ == "__main__":
    main(sys.argv[1])
