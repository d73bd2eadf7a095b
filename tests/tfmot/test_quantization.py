"""`tfmot.quantization.keras` and `tfmot.experimental.combine` on Keras 3."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
import tfcompress.tfmot as tfmot
from tfcompress.layers import Quantize

quantization = tfmot.quantization.keras
quantizers = quantization.quantizers
layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 8)).astype("float32")
IMAGES = RNG.normal(size=(16, 8, 8, 3)).astype("float32")
LABELS = RNG.integers(0, 4, 16)


def cnn():
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(8, 3, name="conv")(x)
    h = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(h))
    h = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(h + 1.0))
    return keras.Model(x, layers.Dense(4, activation="softmax", name="head")(h))


def trained(model, x=IMAGES, y=LABELS, loss="sparse_categorical_crossentropy"):
    model.compile("adam", loss)
    model.fit(x, y, verbose=0)
    return model


def test_a_quantized_model_has_tfmots_names_and_becomes_an_integer_file(tmp_path):
    model = cnn()
    quantized = trained(quantization.quantize_model(model))
    names = [layer.name for layer in quantized.layers[1:]]
    assert names == [
        "quantize_layer", "quant_conv", "bn", "quant_relu", "quantize_add", "pool", "flat",
        "quant_head",
    ]  # fmt: skip
    granularity = {
        layer.name: layer.weights_scheme.granularity
        for layer in quantized.layers
        if isinstance(layer, Quantize) and layer.weights_scheme
    }
    assert granularity == {"quant_conv": "channel", "quant_head": "tensor"}
    artefact = tfc.export(quantized, tmp_path / "m.tflite", verify_on=IMAGES[:4])
    assert (artefact.precision, artefact.float_operators) == ("int8", ())
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        loaded.predict(IMAGES, verbose=0), quantized.predict(IMAGES, verbose=0)
    )
    prefixed = quantization.quantize_model(model, quantized_layer_name_prefix="q_")
    assert prefixed.get_layer("q_head").layer.name == "head"


class FourBits(quantization.QuantizeConfig):
    """As in TFMOT's guide."""

    def get_weights_and_quantizers(self, layer):
        arguments = {"symmetric": True, "narrow_range": False, "per_axis": False}
        return [(layer.kernel, quantizers.LastValueQuantizer(num_bits=4, **arguments))]

    def get_activations_and_quantizers(self, layer):
        return [(layer.activation, self.activations())]

    def activations(self):
        arguments = {"symmetric": False, "narrow_range": False, "per_axis": False}
        return quantizers.MovingAverageQuantizer(num_bits=8, **arguments)

    def set_quantize_weights(self, layer, quantize_weights):
        layer.kernel = quantize_weights[0]

    def set_quantize_activations(self, layer, quantize_activations):
        layer.activation = quantize_activations[0]

    def get_output_quantizers(self, layer):
        return []

    def get_config(self):
        return {}


class FixedRangeQuantizer(quantizers.Quantizer):
    """As in TFMOT's guide: a quantizer of the user's own."""

    def build(self, tensor_shape, name, layer):
        six = keras.initializers.Constant(0.5)
        return {"range_var": layer.add_weight(name + "_range", initializer=six, trainable=False)}

    def __call__(self, inputs, training, weights, **kwargs):
        return keras.ops.clip(inputs, 0.0, weights["range_var"])

    def get_config(self):
        return {}


class Clipped(FourBits):
    def activations(self):
        return FixedRangeQuantizer()


OWN = {"FourBits": FourBits, "Clipped": Clipped}


def annotated(config):
    mark = quantization.quantize_annotate_layer
    return keras.Sequential(
        [
            keras.Input((8,)),
            mark(layers.Dense(8, activation="relu", name="first"), config),
            layers.Dense(6, name="middle"),
            layers.Dropout(0.5, name="drop"),
            mark(layers.Dense(3, name="last")),
        ]
    )


def test_a_config_of_the_users_own_is_kept_to(tmp_path):
    with quantization.quantize_scope(OWN):
        quantized = quantization.quantize_apply(annotated(FourBits()))
    assert [layer.name for layer in quantized.layers[1:]] == [
        "quantize_layer", "quant_first", "quant_middle", "drop", "quant_last",
    ]  # fmt: skip
    trained(quantized, X, np.ones((16, 3)), "mse")
    counts = {layer.name: len(np.unique(np.asarray(layer.kernel.value)))
              for layer in tfc.strip(quantized).layers if hasattr(layer, "kernel")}  # fmt: skip
    assert counts["first"] <= 15 < counts["middle"]
    assert counts["middle"] == 48  # Only what it returns is rounded, for the layer behind it.
    assert quantized.get_layer("quant_first").ranges["output"][1] > 0
    quantized.save(tmp_path / "m.keras")
    with quantization.quantize_scope(OWN):
        loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), quantized.predict(X, verbose=0))


def test_a_quantizer_of_the_users_own_is_called():
    quantized = quantization.quantize_apply(annotated(Clipped()))
    first = keras.Model(quantized.inputs, quantized.get_layer("quant_first").output)
    outputs = first.predict(X, verbose=0)
    assert outputs.max() == 0.5  # What its variable says.
    variables = [variable.name for variable in quantized.get_layer("quant_first").variables]
    assert "output_range" in variables


def test_ranges_that_are_fixed_or_removed():
    model = quantization.quantize_model(keras.Sequential([keras.Input((8,)), layers.Dense(4)]))
    fixed = quantization.fix_input_output_range(
        model, num_bits=4, input_min=-1, input_max=2, output_max=15
    )
    trained(fixed, X, X[:, :4], "mse")
    assert fixed.layers[1].ranges == {"output": (-1.0, 2.0)}
    assert fixed.layers[2].ranges == {"output": (0.0, 15.0)}
    outputs = fixed.predict(X * 9, verbose=0)
    np.testing.assert_array_equal(outputs, np.clip(np.round(outputs), 0, 15))
    assert "quantize_layer" not in [
        layer.name for layer in quantization.remove_input_range(model).layers
    ]
    with pytest.raises(ValueError, match="should be already quantized"):
        quantization.fix_input_output_range(cnn())


def test_the_n_bit_scheme():
    scheme = quantization.experimental.default_n_bit.DefaultNBitQuantizeScheme(
        num_bits_weight=4, num_bits_activation=6
    )
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, name="dense")])
    quantized = quantization.quantize_apply(quantization.quantize_annotate_model(model), scheme)
    layer = quantized.get_layer("quant_dense")
    assert (layer.weights_scheme.bits, layer.activations_scheme.bits) == (4, 6)
    assert len(np.unique(np.asarray(tfc.strip(quantized).layers[-1].kernel.value))) <= 15
    with pytest.raises(ValueError, match="bits=9"):
        quantization.experimental.default_n_bit.DefaultNBitQuantizeScheme(num_bits_weight=9)


class Registry(quantization.QuantizeRegistry):
    def supports(self, layer):
        return layer.name == "first"

    def get_quantize_config(self, layer):
        return FourBits()


class Scheme(quantization.QuantizeScheme):
    def get_layout_transformer(self):
        raise AssertionError("tfcompress.quantize sees to it")

    def get_quantize_registry(self):
        return Registry()


def test_a_scheme_of_the_users_own_is_asked():
    quantized = quantization.quantize_apply(annotated(None), Scheme())
    kinds = {layer.name: type(layer).__name__ for layer in quantized.layers}
    assert kinds["quant_first"] == "QuantizeWrapperV2"
    assert kinds["quant_last"] == "Quantize"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quantization.quantize_model(None), "`to_quantize` cannot be None"),
        (lambda: quantization.quantize_model(layers.Dense(1)), "can only be a `keras.Model`"),
        (lambda: quantization.quantize_annotate_layer(cnn()), "can only be a `keras.layers.Layer`"),
        (lambda: quantization.quantize_annotate_layer(layers.Dense(1), {}), "`quantize_config`"),
        (lambda: quantization.quantize_apply(cnn()), "There are no layers to quantize"),
        (
            lambda: quantization.quantize_apply(keras.Sequential([layers.Dense(1)])),
            "`model` must be a built model",
        ),
        (
            lambda: quantization.quantize_apply(annotated(None), "int8"),
            "`scheme` can only be a QuantizeScheme, got str",
        ),
    ],
)
def test_bad_arguments_say_what_to_pass(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_lambda_is_left_float_with_a_warning():
    model = keras.Sequential([keras.Input((8,)), layers.Lambda(lambda x: x), layers.Dense(2)])
    with pytest.warns(UserWarning, match="Lambda layer .* is not quantized"):
        marked = quantization.quantize_annotate_model(model)
    assert isinstance(marked.layers[0], layers.Lambda)


def test_quantizers_by_themselves():
    x = tf.constant([-1.0, 0.26, 9.0])
    arguments = {"per_axis": False, "symmetric": False, "narrow_range": False}
    every = quantizers.AllValuesQuantizer(8, **arguments)
    variables = every.build(None, "output", layers.Layer())
    assert (every(x, False, variables).numpy() == x.numpy()).all()  # Nothing was seen.
    every(x, True, variables)
    every(x / 2, True, variables)
    np.testing.assert_array_equal(variables["range"].numpy(), [-1.0, 9.0])
    assert quantizers.FixedQuantizer.from_config(
        quantizers.FixedQuantizer(8, 0, 6, False).get_config()
    ) == quantizers.FixedQuantizer(8, 0.0, 6.0, False)
    assert quantizers.NoQuantizer()(x, True, {}) is x


def recurrent():
    x = keras.Input((3, 6))
    h = layers.LSTM(4, return_sequences=True, name="lstm")(x)
    h = layers.LayerNormalization(name="norm")(layers.Conv1D(4, 2, name="conv")(h))
    return keras.Model(x, layers.Dense(2)(layers.MultiHeadAttention(1, 4, name="mha")(h, h)))


def nested():
    inner = keras.Sequential([keras.Input((24,)), layers.Dense(8), layers.ReLU()], name="inner")
    x = keras.Input((4,), dtype="int32")
    h = layers.Flatten()(layers.Embedding(9, 6, name="embedding")(x))
    return keras.Model(x, layers.Dense(3)(inner(h)))


@pytest.mark.parametrize(
    ("make", "x"),
    [(recurrent, RNG.normal(size=(8, 3, 6))), (nested, RNG.integers(0, 9, (8, 4)))],
)
def test_models_that_tfmot_refuses(make, x):
    model = make()
    expected = model.predict(x, verbose=0)
    quantized = quantization.quantize_model(model)
    trained(quantized, x, expected, "mse")
    assert np.isfinite(quantized.predict(x, verbose=0)).all()
    weights = [w for layer in quantized.layers if isinstance(layer, Quantize)
               for w in layer.quantizer.weights]  # fmt: skip
    kernels = [w for w in model.weights if len(w.shape) > 1 and "bias" not in w.name]
    assert len(weights) == len(kernels)


def halved():
    model = cnn()
    for name in ("conv", "head"):
        kernel, bias = model.get_layer(name).get_weights()
        kernel = np.where(abs(kernel) < np.median(abs(kernel)), 0, kernel)
        model.get_layer(name).set_weights([kernel, bias])
    return model


@pytest.mark.parametrize("kind", ["PQAT", "CQAT", "PCQAT"])
def test_what_came_before_outlasts_the_training(kind):
    model, combine = halved(), tfmot.experimental.combine
    if kind != "PQAT":
        start = tfmot.clustering.keras.CentroidInitialization.LINEAR
        model = tfmot.clustering.keras.cluster_weights(
            model, 6, start, preserve_sparsity=kind == "PCQAT"
        )
        model = tfmot.clustering.keras.strip_clustering(model)
    scheme = {
        "PQAT": combine.Default8BitPrunePreserveQuantizeScheme,
        "CQAT": lambda: combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=False),
        "PCQAT": combine.Default8BitClusterPreserveQuantizeScheme,
    }[kind]()
    marked = quantization.quantize_annotate_model(model)
    quantized = trained(quantization.quantize_apply(marked, scheme))
    outputs = quantized.predict(IMAGES, verbose=0)
    if kind != "PQAT":
        quantized = combine.strip_clustering_cqat(quantized)
        np.testing.assert_allclose(quantized.predict(IMAGES, verbose=0), outputs, atol=1e-6)
    plain = tfc.strip(quantized)
    for name in ("conv", "head"):
        before = np.asarray(model.get_layer(name).kernel.value)
        after = np.asarray(plain.get_layer(name).kernel.value)
        assert (before != after).any()
        if kind != "CQAT":
            np.testing.assert_array_equal(after[before == 0], 0)
        if kind != "PQAT":
            channels = after.reshape(-1, after.shape[-1]).T if name == "conv" else [after]
            assert max(len(np.unique(channel)) for channel in channels) <= 6
