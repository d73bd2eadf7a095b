"""The ready recipes, on small models of their kind."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.recipe import Recipe

RANDOM = np.random.default_rng(0)


def mlp():
    return keras.Sequential(
        [keras.Input((16,)), layers.Dense(32, activation="relu"), layers.Dense(4)]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(16, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


def mobilenet():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, 2, padding="same", use_bias=False)(inputs)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    for _ in range(2):
        h = layers.Conv2D(32, 1, use_bias=False)(x)
        h = layers.ReLU(6.0)(layers.BatchNormalization()(h))
        h = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(h)
        h = layers.ReLU(6.0)(layers.BatchNormalization()(h))
        h = layers.BatchNormalization()(layers.Conv2D(16, 1, use_bias=False)(h))
        x = layers.Add()([x, h])
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def bert():
    inputs = keras.Input((8,), dtype="int32")
    x = layers.Embedding(40, 16)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 4)(x, x))
        h = layers.Dense(32, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(16)(h))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


def lstm():
    return keras.Sequential([keras.Input((8, 6)), layers.LSTM(64), layers.Dense(4)])


MODELS = {"mlp": mlp, "cnn": cnn, "mobilenet": mobilenet, "bert": bert, "lstm": lstm}


@pytest.mark.slow
@pytest.mark.parametrize("name", Recipe.ready())
def test_a_ready_recipe_compresses_a_model_of_its_kind(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    shape = (96, *model.input_shape[1:])
    is_text = model.inputs[0].dtype == "int32"
    x = RANDOM.integers(0, 40, shape) if is_text else RANDOM.normal(size=shape).astype("float32")
    y = RANDOM.integers(0, 4, 96)
    values = Recipe.load(f"recipe:{name}").to_dict()
    for stage in values["stages"]:
        if "train" in stage:
            stage["train"]["epochs"] = 1
    result = Recipe.from_dict(values).apply(model, (x, y), output=tmp_path, verbose=0)
    found = result.metrics["model.tflite"]
    assert found["bytes"] < result.metrics["original"]["bytes"]
    assert result.artefacts[0].precision == values["stages"][-1]["export"]["precision"]
    removed = any("shrink" in stage for stage in values["stages"])
    fewer = result.metrics["result"]["parameters"] < result.metrics["original"]["parameters"]
    assert fewer == removed
    assert found["sparsity"] > 0.4 or removed
