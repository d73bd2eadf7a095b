"""The table of architectures that every model -> model pass is tried on.

Each is built small, from random weights and random batch statistics. `ARCHITECTURES` has own nets,
every model class of `keras.applications`, and backbones of KerasHub, which skip without it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

NUM_CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """A model to try a pass on.

    Args:
        build: `() -> model`, built, with the same weights at every call in a fresh Keras.
        batch: `rng -> inputs` of two or more examples.
        is_fast: Whether the table's tests run it in CI; the others are marked slow.
    """

    build: Callable[[], keras.Model]
    batch: Callable[[np.random.Generator], Any]
    is_fast: bool = True


def parameters(names=None) -> list:
    """The names in the table (or `names`) for `pytest.mark.parametrize`, the slow ones marked."""
    return [
        pytest.param(name, id=name, marks=[] if ARCHITECTURES[name].is_fast else pytest.mark.slow)
        for name in (ARCHITECTURES if names is None else names)
    ]


def randomized(model: keras.Model, inputs, seed: int = 0) -> keras.Model:
    """`model` with random values in the weights that start constant.

    Batch norms get nearly the statistics of `inputs`, so that the outputs of deep models depend on
    their inputs and neither vanish nor explode.
    """
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        value = ops.convert_to_numpy(variable)
        if not keras.backend.is_float_dtype(variable.dtype) or np.ptp(value) > 0:
            continue
        if np.all(value == 0):
            variable.assign(rng.normal(0, 0.1, value.shape))
        else:
            variable.assign(rng.uniform(0.7, 1.4, value.shape))
    every = model._flatten_layers()
    for layer in [x for x in every if isinstance(x, layers.Normalization)]:
        layer.finalize_state()
    with contextlib.ExitStack() as stack:
        for layer in [x for x in every if isinstance(x, layers.BatchNormalization)]:
            stack.enter_context(_statistics_from_inputs(layer, rng))
        model(inputs)
    return model


@contextlib.contextmanager
def _statistics_from_inputs(norm: layers.BatchNormalization, rng):
    """Meanwhile, a batch norm takes the statistics of what it is called on, and some noise."""
    own = norm.call

    def call(x, **kwargs):
        values = np.moveaxis(ops.convert_to_numpy(x), norm.axis, -1).reshape(-1, x.shape[norm.axis])
        mean, variance = values.mean(axis=0), values.var(axis=0)
        # Few examples leave channels without variance, which would amplify rounding errors.
        variance = np.maximum(variance, 0.3 * variance.mean()) + 1e-6
        norm.moving_variance.assign(variance * rng.uniform(1.0, 2.0, variance.shape))
        norm.moving_mean.assign(mean + 0.2 * rng.normal(size=mean.shape) * np.sqrt(variance))
        return own(x, training=False)

    norm.call = call
    try:
        yield
    finally:
        del norm.call


def image(*shape, low=-1.0, high=1.0):
    """A batch of two images (or other float inputs) of that shape."""
    return lambda rng: rng.uniform(low, high, (2, *shape)).astype("float32")


def tokens(length, size=40):
    """A batch of two token sequences, the second one padded with 0."""

    def batch(rng):
        ids = rng.integers(1, size, (2, length)).astype("int32")
        ids[1, length - length // 3 :] = 0
        return ids

    return batch


def _conv_norm(x, filters, size=3, strides=1, activation="relu", **kwargs):
    x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False, **kwargs)(x)
    x = layers.BatchNormalization()(x)
    return layers.Activation(activation)(x) if activation else x


def _classify(inputs, x):
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(x))


def residual():
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 16)
    for filters, strides in [(16, 1), (24, 2)]:
        skip = x if filters == x.shape[-1] else _conv_norm(x, filters, 1, strides, None)
        h = _conv_norm(_conv_norm(x, filters, 3, strides), filters, activation=None)
        x = layers.ReLU()(layers.Add()([skip, h]))
    return _classify(inputs, x)


def pre_activation():
    """Batch norm in front of the convolutions, and behind a sum that has other readers."""
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for _ in range(2):
        h = layers.Conv2D(16, 1)(layers.BatchNormalization()(x))
        h = layers.Conv2D(16, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(h)))
        x = x + h
    return _classify(inputs, x)


def separable():
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 16, strides=2)
    for filters in (16, 24):
        h = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        h = layers.ReLU(6.0)(layers.BatchNormalization()(h))
        x = _conv_norm(h, filters, 1)
    x = layers.SeparableConv2D(32, 3, depth_multiplier=2)(x)
    return _classify(inputs, layers.ReLU()(layers.BatchNormalization()(x)))


def grouped():
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 16)
    for strides in (1, 2):
        h = _conv_norm(_conv_norm(x, 16, 1), 16, 3, strides, groups=4)
        h = _conv_norm(h, 16, 1, activation=None)
        skip = x if strides == 1 else layers.MaxPooling2D()(x)
        x = layers.ReLU()(layers.Add()([skip, h]))
    return _classify(inputs, x)


def group_norm():
    inputs = keras.Input((16, 16, 3))
    x = inputs
    for filters in (16, 24):
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.MaxPooling2D()(layers.ReLU()(layers.GroupNormalization(groups=4)(x)))
    return _classify(inputs, x)


def squeeze_excite():
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 16)
    for _ in range(2):
        h = _conv_norm(x, 32, 3)
        gate = layers.GlobalAveragePooling2D(keepdims=True)(h)
        gate = layers.Conv2D(8, 1, activation="relu")(gate)
        gate = layers.Conv2D(32, 1, activation="sigmoid")(gate)
        x = x + _conv_norm(layers.Multiply()([h, gate]), 16, 1, activation=None)
    return _classify(inputs, x)


def unet():
    inputs = x = keras.Input((16, 16, 3))
    skips = []
    for filters in (8, 16):
        x = _conv_norm(_conv_norm(x, filters), filters)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = _conv_norm(x, 24)
    for filters, skip in zip((16, 8), reversed(skips), strict=True):
        x = layers.BatchNormalization()(layers.Conv2DTranspose(filters, 2, 2)(x))
        x = _conv_norm(layers.Concatenate()([layers.ReLU()(x), skip]), filters)
    return keras.Model(inputs, layers.Conv2D(NUM_CLASSES, 1)(x))


def inception():
    """Concatenated branches of different widths, twice."""
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 8)
    for _ in range(2):
        pooled = layers.AveragePooling2D(3, 1, padding="same")(x)
        branches = [_conv_norm(x, 8, 1), _conv_norm(_conv_norm(x, 8, 1), 16), pooled]
        x = layers.Concatenate()(branches)
    return _classify(inputs, x)


def flattened():
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(24, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(NUM_CLASSES),
        ]
    )


def conv1d():
    inputs = x = keras.Input((24, 6))
    for filters in (16, 24):
        x = layers.Conv1D(filters, 3, padding="causal", dilation_rate=2)(x)
        x = layers.PReLU(shared_axes=[1])(layers.BatchNormalization()(x))
    x = layers.Conv1DTranspose(16, 2, 2)(x)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.GlobalMaxPooling1D()(x)))


def conv3d():
    inputs = keras.Input((8, 8, 8, 2))
    x = layers.BatchNormalization()(layers.Conv3D(8, 3)(inputs))
    x = layers.Conv3D(16, 3, activation="relu")(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.GlobalAveragePooling3D()(x)))


def mlp():
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(32, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(24, activation="gelu"),
            layers.BatchNormalization(),
            layers.Dense(NUM_CLASSES),
        ]
    )


def lstm():
    return keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            layers.Embedding(40, 16, mask_zero=True),
            layers.LSTM(16, return_sequences=True),
            layers.LSTM(24),
            layers.Dense(NUM_CLASSES),
        ]
    )


def bidirectional_gru():
    return keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            layers.Embedding(40, 16, mask_zero=True),
            layers.Bidirectional(layers.GRU(8, return_sequences=True)),
            layers.Dense(16, activation="relu"),
            layers.Bidirectional(layers.GRU(8)),
            layers.Dense(NUM_CLASSES),
        ]
    )


def _embedded(length, width, mask_zero=False):
    ids = keras.Input((length,), dtype="int32")
    return ids, layers.Embedding(40, width, mask_zero=mask_zero)(ids)


def _feed_forward(x, size):
    return layers.Dense(x.shape[-1])(layers.Dense(size, activation="gelu")(x))


def transformer():
    """Post-norm encoder blocks with a padding mask."""
    ids, x = _embedded(10, 16, mask_zero=True)
    for _ in range(2):
        attended = layers.MultiHeadAttention(4, 4, dropout=0.1)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, attended]))
        x = layers.LayerNormalization()(layers.Add()([x, _feed_forward(x, 32)]))
    return keras.Model(ids, layers.Dense(NUM_CLASSES)(layers.GlobalAveragePooling1D()(x)))


def attention_flattened():
    """A causal attention, flattened into a dense layer."""
    inputs = keras.Input((6, 8))
    x = layers.Dense(16)(inputs)
    x = x + layers.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.Flatten()(x)))


def grouped_query():
    """Pre-norm blocks in which two query heads share a key and value head."""
    ids, x = _embedded(10, 16)
    for _ in range(2):
        h = layers.LayerNormalization()(x)
        x = x + layers.GroupQueryAttention(4, num_query_heads=4, num_key_value_heads=2)(h, h)
        x = x + _feed_forward(layers.LayerNormalization()(x), 32)
    return keras.Model(ids, layers.Dense(NUM_CLASSES)(layers.LayerNormalization()(x)))


def gated():
    """Root-mean-square norms and gated feed-forward blocks."""
    ids, x = _embedded(10, 16)
    for _ in range(2):
        h = layers.RMSNormalization()(x)
        gate, up = layers.Dense(32, activation="silu")(h), layers.Dense(32)(h)
        x = x + layers.Dense(16, use_bias=False)(gate * up)
    return keras.Model(ids, layers.Dense(NUM_CLASSES)(layers.RMSNormalization()(x)))


def two_inputs():
    """An image and features in; classes and a score out."""
    picture, features = keras.Input((12, 12, 3), name="image"), keras.Input((6,), name="features")
    x = layers.GlobalAveragePooling2D()(_conv_norm(_conv_norm(picture, 8), 16, strides=2))
    h = layers.Dense(16, activation="relu")(features)
    x = layers.Concatenate()([x, h])
    classes = layers.Dense(NUM_CLASSES)(layers.Dense(24, activation="relu")(x))
    outputs = {"classes": classes, "score": layers.Dense(1, activation="sigmoid")(x * 2)}
    return keras.Model({"image": picture, "features": features}, outputs)


def two_inputs_batch(rng):
    return {"image": image(12, 12, 3)(rng), "features": image(6)(rng)}


def tied():
    """One dense layer called twice, and one batch norm behind both."""
    inputs = keras.Input((16,))
    dense, norm = layers.Dense(16, name="shared"), layers.BatchNormalization(name="shared_norm")
    x = layers.ReLU()(norm(dense(inputs)))
    x = layers.ReLU()(norm(dense(x)))
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.Dense(24, "relu")(x) + 1))


def split():
    """Channels split, processed apart, and concatenated."""
    inputs = keras.Input((16, 16, 3))
    x = _conv_norm(inputs, 16)
    for _ in range(2):
        left, right = ops.split(x, 2, axis=-1)
        x = layers.Concatenate()([left, _conv_norm(right, 8)])
    return _classify(inputs, x)


def shuffled():
    """Channels sliced and shuffled by reshape and transpose."""
    inputs = keras.Input((8, 8, 3))
    x = _conv_norm(inputs, 16)
    x = layers.Concatenate()([_conv_norm(x[..., :8], 8), x[..., 8:]])
    x = layers.Reshape((8, 8, 2, 8))(x)
    x = layers.Reshape((8, 8, 16))(layers.Permute((1, 2, 4, 3))(x))
    return _classify(inputs, _conv_norm(x, 24))


class ResidualBlock(layers.Layer):
    """Two convolutions with a shortcut, as a layer of its own."""

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.convs = [
            layers.Conv2D(filters, 3, s, padding="same", use_bias=False) for s in (strides, 1)
        ]
        self.norms = [layers.BatchNormalization() for _ in self.convs]
        self.shortcut = layers.Conv2D(filters, 1, strides) if strides > 1 else None

    def call(self, x, training=None):
        h = ops.relu(self.norms[0](self.convs[0](x), training=training))
        h = self.norms[1](self.convs[1](h), training=training)
        return ops.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class ResidualNet(keras.Model):
    """A subclassed ResNet."""

    def __init__(self):
        super().__init__(name="residual_net")
        self.stem = layers.Conv2D(16, 3, padding="same")
        self.blocks = [ResidualBlock(16), ResidualBlock(16), ResidualBlock(24, 2)]
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x, training=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(ops.mean(x, axis=(1, 2)))


def subclassed():
    model = ResidualNet()
    model(np.zeros((1, 16, 16, 3), "float32"))
    return model


def nested():
    """A Sequential stem in a Functional model, and a tower that is used twice."""
    inputs = keras.Input((12,))
    stem = keras.Sequential([layers.Dense(16), layers.BatchNormalization(), layers.ReLU()])
    tower = keras.Sequential([layers.Dense(16, activation="relu"), layers.Dense(16)])
    x = stem(inputs)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(layers.Add()([tower(x), tower(x * 2)])))


_IMAGE, _TOKENS = image(16, 16, 3), tokens(10)
_OWN = {
    "residual": (residual, _IMAGE),
    "pre-activation": (pre_activation, _IMAGE),
    "depthwise-separable": (separable, _IMAGE),
    "grouped conv": (grouped, _IMAGE),
    "group norm": (group_norm, _IMAGE),
    "squeeze-excite": (squeeze_excite, _IMAGE),
    "U-Net": (unet, _IMAGE),
    "inception": (inception, _IMAGE),
    "flatten to dense": (flattened, image(12, 12, 3)),
    "conv 1D": (conv1d, image(24, 6)),
    "conv 3D": (conv3d, image(8, 8, 8, 2)),
    "MLP": (mlp, image(12)),
    "LSTM": (lstm, _TOKENS),
    "bidirectional GRU": (bidirectional_gru, _TOKENS),
    "transformer": (transformer, _TOKENS),
    "attention, flattened": (attention_flattened, image(6, 8)),
    "grouped-query attention": (grouped_query, _TOKENS),
    "gated FFN": (gated, _TOKENS),
    "two inputs, two outputs": (two_inputs, two_inputs_batch),
    "tied weights": (tied, image(16)),
    "split": (split, _IMAGE),
    "slice and shuffle": (shuffled, image(8, 8, 3)),
    "subclassed ResNet": (subclassed, _IMAGE),
    "nested": (nested, image(12)),
}


def _application(name, size, **kwargs):
    model = getattr(keras.applications, name)
    return model(
        weights=None,
        input_shape=(size, size, 3),
        classes=NUM_CLASSES,
        classifier_activation=None,
        **kwargs,
    )


# The smallest image that a class takes.
_SIZES = dict.fromkeys(
    [
        *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
        *(f"DenseNet{depth}" for depth in (121, 169, 201)),
        *(f"EfficientNetB{number}" for number in range(8)),
        *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")),
        *("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large"),
        *("NASNetMobile", "NASNetLarge"),
        *(f"ResNet{depth}{version}" for depth in (50, 101, 152) for version in ("", "V2")),
        *("VGG16", "VGG19"),
    ],
    32,
) | {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
# Narrow, where the class has a width.
_OPTIONS = {
    "MobileNet": {"alpha": 0.25},
    "MobileNetV2": {"alpha": 0.35},
    "MobileNetV3Small": {"alpha": 0.75},
    "MobileNetV3Large": {"alpha": 0.75},
}
# These scale pixels themselves.
_PIXELS = ("ConvNeXt", "EfficientNet", "MobileNetV3")
_FAST = ("MobileNet", "MobileNetV2", "MobileNetV3Small")


def _application_entry(name) -> Architecture:
    size = _SIZES[name]
    make = functools.partial(_application, name, size, **_OPTIONS.get(name, {}))
    limits = (0.0, 255.0) if name.startswith(_PIXELS) else (-1.0, 1.0)
    return _entry(make, image(size, size, 3, low=limits[0], high=limits[1]), name in _FAST)


def _hub(name, **kwargs):
    return getattr(pytest.importorskip("keras_hub").models, name)(**kwargs)


_TEXT = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
_LENGTH = {"max_sequence_length": 16}
_RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 72],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_strides": [1, 2],
    "block_type": "basic_block",
    "image_shape": (32, 32, 3),
}
_MOBILENET = {
    "stackwise_expansion": [[40, 56], [64, 72]],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_filters": [[16, 16], [24, 24]],
    "stackwise_kernel_size": [[3, 3], [5, 5]],
    "stackwise_num_strides": [[2, 1], [2, 1]],
    "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
    "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
    "stackwise_padding": [[1, 1], [2, 2]],
    "output_num_filters": 48,
    "depthwise_filters": 8,
    "depthwise_stride": 2,
    "depthwise_residual": False,
    "last_layer_filter": 48,
    "squeeze_and_excite": 0.5,
    "image_shape": (32, 32, 3),
}
_VIT = {
    "image_shape": (16, 16, 3),
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 32,
}


def padded_text(*names, prefix=""):
    """Token ids, and what the names ask for beside them."""

    def batch(rng):
        ids = tokens(8)(rng)
        parts = {
            "padding_mask": (ids != 0).astype("int32"),
            "segment_ids": (ids > 20).astype("int32"),
        }
        return {f"{prefix}token_ids": ids} | {prefix + name: parts[name] for name in names}

    return batch


def sequence_to_sequence(rng):
    encoder = padded_text("padding_mask", prefix="encoder_")(rng)
    return encoder | padded_text("padding_mask", prefix="decoder_")(rng)


def spectrogram_to_text(rng):
    features = {"encoder_features": rng.normal(size=(2, 12, 8)).astype("float32")}
    return features | padded_text("padding_mask", prefix="decoder_")(rng)


_PADDED, _SEGMENTED = padded_text("padding_mask"), padded_text("padding_mask", "segment_ids")
_WHISPER = {"num_mels": 8, "max_encoder_sequence_length": 12, "max_decoder_sequence_length": 16}
_HUB = {
    "BERT": ("BertBackbone", _TEXT | _LENGTH, _SEGMENTED),
    "RoBERTa": ("RobertaBackbone", _TEXT | _LENGTH, _PADDED),
    "DistilBERT": ("DistilBertBackbone", _TEXT | _LENGTH, _PADDED),
    "ALBERT": ("AlbertBackbone", _TEXT | _LENGTH | {"embedding_dim": 8}, _SEGMENTED),
    "DeBERTa-v3": ("DebertaV3Backbone", _TEXT | _LENGTH | {"bucket_size": 8}, _PADDED),
    "GPT-2": ("GPT2Backbone", _TEXT | _LENGTH, _PADDED),
    "T5": ("T5Backbone", _TEXT, sequence_to_sequence),
    "Whisper": ("WhisperBackbone", _TEXT | _WHISPER, spectrogram_to_text),
    "ViT": ("ViTBackbone", _VIT, image(16, 16, 3)),
    "ResNet": ("ResNetBackbone", _RESNET, image(32, 32, 3)),
    "MobileNet": ("MobileNetBackbone", _MOBILENET, image(32, 32, 3)),
}


def _entry(make, batch, is_fast=True) -> Architecture:
    def build():
        keras.utils.set_random_seed(0)
        rng = np.random.default_rng(1)
        examples = [batch(rng) for _ in range(16)]
        together = keras.tree.map_structure(lambda *x: np.concatenate(x), *examples)
        return randomized(make(), together)

    return Architecture(build, batch, is_fast)


def _table() -> dict[str, Architecture]:
    table = {name: _entry(make, batch) for name, (make, batch) in _OWN.items()}
    for name in sorted(_SIZES):
        table[f"applications.{name}"] = _application_entry(name)
    for name, (kind, arguments, batch) in _HUB.items():
        table[f"keras_hub.{name}"] = _entry(functools.partial(_hub, kind, **arguments), batch)
    return table


ARCHITECTURES: dict[str, Architecture] = _table()
