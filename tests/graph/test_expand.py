"""`expand`: one flat graph of the same function, for every kind of model."""

import logging

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.architectures import ARCHITECTURES
from tfcompress.graph import expand

COMPOSITE = (keras.Model, layers.MultiHeadAttention)


def floats(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")


def tokens(*shape, size=50):
    return np.random.default_rng(0).integers(0, size, shape).astype("int32")


def assert_equal(a, b):
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y)


class Residual(layers.Layer):
    def __init__(self, filters, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(filters, 3, padding="same")
        self.norm = layers.BatchNormalization()
        self.skip = layers.Conv2D(filters, 1)
        self.dropout = layers.Dropout(rate)

    def call(self, x, training=None):
        h = ops.relu(self.norm(self.conv(x), training=training))
        return self.dropout(h, training=training) + self.skip(x)


class Convolutional(keras.Model):
    def __init__(self, rate=0.0):
        super().__init__(name="convolutional")
        self.blocks = [Residual(4, rate, name="first"), Residual(4, rate, name="second")]
        self.pool = layers.GlobalAveragePooling2D()
        self.head = layers.Dense(3, name="head")

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(self.pool(x))


class Tokens(layers.Layer):
    """Token and position embeddings: one called on constants only, one masked, and own weights."""

    def __init__(self, length, size, width):
        super().__init__(name="tokens")
        self.token = layers.Embedding(size, width, mask_zero=True, name="token")
        self.position = layers.Embedding(length, width, name="position")
        self.bias = self.add_weight(shape=(1, length, width), initializer="normal", name="bias")
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        positions = self.position(ops.arange(ops.shape(x)[1]))
        return (self.token(x) + positions + self.bias) * self.scale


class Block(layers.Layer):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width // heads, dropout=0.1)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.feed_forward = keras.Sequential([layers.Dense(32, "gelu"), layers.Dense(width)])

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x))
        return self.norms[1](x + self.feed_forward(x))


class Transformer(keras.Model):
    """Its output weights are its token embeddings."""

    def __init__(self):
        super().__init__()
        self.tokens = Tokens(7, 50, 16)
        self.blocks = [Block(16, 2) for _ in range(2)]

    def call(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return ops.matmul(x, ops.transpose(self.tokens.token.embeddings))


class Patches(keras.Model):
    """Shapes that need the size of the batch, and a class token."""

    def __init__(self):
        super().__init__()
        self.patch = layers.Conv2D(8, 4, 4)
        self.token = self.add_weight(shape=(1, 1, 8), initializer="normal", name="token")
        self.block = Block(8, 2)

    def call(self, x):
        batch = ops.shape(x)[0]
        x = ops.reshape(self.patch(x), (batch, -1, 8))
        token = ops.broadcast_to(self.token, (batch, 1, 8))
        return self.block(ops.concatenate([token, x], axis=1))[:, 0]


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    ), floats(2, 8, 8, 3)


def nested():
    inner = keras.applications.MobileNetV2(
        weights=None, alpha=0.35, include_top=False, input_shape=(32, 32, 3)
    )
    x = keras.Input((32, 32, 3))
    pooled = layers.GlobalAveragePooling2D()(inner(x / 2))
    return keras.Model(x, layers.Dense(3)(pooled)), floats(2, 32, 32, 3)


def shared():
    x = keras.Input((4,))
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(4, "relu"), layers.Dense(4)])
    return keras.Model(x, layers.Add()([tower(x), tower(tower(x))])), floats(3, 4)


def recurrent():
    return keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            layers.Embedding(50, 8, mask_zero=True),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.TimeDistributed(keras.Sequential([layers.Dense(5), layers.ReLU()])),
            layers.GRU(3),
        ]
    ), tokens(3, 7, size=4)


def dictionaries():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model({"a": a, "b": b}, {"sum": layers.Add()([a, b]), "a": layers.Dense(2)(a)})
    outputs = inner({"a": b, "b": a})
    return keras.Model({"a": a, "b": b}, [outputs["a"], {"x": outputs["sum"]}]), {
        "a": floats(3, 4),
        "b": floats(3, 4) + 1,
    }


def called(model, data):
    model(data)
    return model, data


def mobilenet_v3():
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=4)
    return model, floats(1, 32, 32, 3)


MODELS = {
    "Sequential": sequential,
    "nested MobileNetV2": nested,
    "MobileNetV3Small": mobilenet_v3,
    "shared layers": shared,
    "recurrent, masked": recurrent,
    "dict inputs, nested outputs": dictionaries,
    "subclassed residual CNN": lambda: called(Convolutional(), floats(2, 8, 8, 3)),
    "subclassed transformer, tied": lambda: called(Transformer(), tokens(3, 7)),
    "batch-sized shapes": lambda: called(Patches(), floats(2, 16, 16, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_flat_graph_is_the_model(name, tmp_path):
    model, data = MODELS[name]()
    names = [layer.name for layer in model._flatten_layers()]
    flat = expand(model)

    assert type(flat).__name__ == "Functional"
    assert flat.name == model.name
    assert not any(isinstance(layer, COMPOSITE) for layer in flat.layers)
    assert len({op.name for op in flat.operations}) == len(flat.operations)
    assert_equal(flat(data), model(data))
    assert_equal(flat.predict(data, verbose=0), model.predict(data, verbose=0))

    mine = {id(variable) for variable in model.trainable_variables}
    assert {id(variable) for variable in flat.trainable_variables} == mine
    assert [layer.name for layer in model._flatten_layers()] == names

    flat.save(tmp_path / "flat.keras")
    loaded = keras.models.load_model(tmp_path / "flat.keras")
    assert_equal(loaded(data), model(data))
    assert len(loaded.trainable_variables) == len(flat.trainable_variables)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_the_flat_graph_is_training_the_model(jit_compile):
    data, target = floats(8, 8, 8, 3), floats(8, 3)
    histories, weights = [], []
    for form in (lambda model: model, expand):
        keras.utils.set_random_seed(0)
        model, _ = called(Convolutional(rate=0.3), data)
        trained = form(model)
        trained.compile("sgd", "mse", jit_compile=jit_compile)
        fit = trained.fit(data, target, batch_size=4, epochs=2, shuffle=False, verbose=0)
        histories.append(fit.history["loss"])
        weights.append(model.get_weights())
    assert histories[0] == histories[1]
    assert_equal(weights[0], weights[1])


def test_names_are_paths():
    model, _ = called(Convolutional(), floats(1, 8, 8, 3))
    names = [op.name for op in expand(model).operations]
    assert "head" in names
    assert "first_relu" in names
    assert "second_add" in names


def test_the_original_gets_no_new_nodes_and_no_new_attributes():
    model, _ = sequential()
    before = [(len(x._inbound_nodes), len(x._outbound_nodes), set(vars(x))) for x in model.layers]
    expand(model)
    after = [(len(x._inbound_nodes), len(x._outbound_nodes), set(vars(x))) for x in model.layers]
    assert after == before


def test_the_original_is_as_before_after_a_failure():
    class Branching(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x) if ops.sum(x) > 0 else x

    model, data = called(Branching(), np.ones((1, 2), "float32"))
    attributes = set(vars(model)), set(vars(model.dense))
    with pytest.raises(ValueError, match="Branching.call"):
        expand(model, inputs=data)
    assert (set(vars(model)), set(vars(model.dense))) == attributes
    assert_equal(model(data), model.dense(data))


def test_masks_cross_ops_that_would_drop_them():
    class Masked(layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True
            self.dense = layers.Dense(4)

        def call(self, x):
            return ops.tanh(self.dense(x))

    x = keras.Input((5,), dtype="int32")
    h = Masked()(layers.Embedding(9, 4, mask_zero=True)(x))
    model = keras.Model(x, layers.GlobalAveragePooling1D()(h))
    data = np.array([[1, 2, 0, 0, 0]])
    assert_equal(expand(model)(data), model(data))


def test_a_tied_embedding_stays_tied_after_loading(tmp_path):
    model, data = called(Transformer(), tokens(3, 7))
    expand(model).save(tmp_path / "flat.keras")
    loaded = keras.models.load_model(tmp_path / "flat.keras")
    shapes = [tuple(v.shape) for v in loaded.trainable_variables]
    assert shapes.count((50, 16)) == 1
    before = loaded(data)
    table = next(v for v in loaded.trainable_variables if tuple(v.shape) == (50, 16))
    table.assign(ops.concatenate([table[:49], table[49:] + 1]))
    assert np.any(np.asarray(loaded(data) != before)[..., 49])


def test_another_layers_weight_is_shared_and_the_log_warns(caplog):
    class Autoencoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = layers.Dense(3, name="encoder")

        def call(self, x):
            return ops.matmul(self.encoder(x), ops.transpose(self.encoder.kernel))

    model, data = called(Autoencoder(), floats(4, 5))
    with caplog.at_level(logging.WARNING, "tfcompress"):
        flat = expand(model)
    assert "encoder/kernel is used outside its layer" in caplog.text
    assert_equal(flat(data), model(data))
    assert len(flat.trainable_variables) == 2


def test_inputs_that_only_embeddings_read_become_integers():
    model, _ = called(Transformer(), tokens(3, 7))
    assert expand(model).inputs[0].dtype == "int32"


def test_inputs_whose_length_is_asked_for_become_integers_too():
    class Positions(keras.Model):
        def __init__(self):
            super().__init__()
            self.token, self.position = layers.Embedding(50, 4), layers.Embedding(9, 4)

        def call(self, x):
            return self.token(x) + self.position(ops.arange(ops.shape(x)[1]))

    model = Positions()
    model(tokens(2, 7))
    flat = expand(model, inputs=keras.Input((None,), dtype="int32"))
    for length in (7, 3):
        assert_equal(flat(tokens(2, length)), model(tokens(2, length)))
    model.build((None, None))
    free = expand(model)
    assert (free.inputs[0].shape, free.inputs[0].dtype) in [
        ((None, 7), "int32"),
        ((None, None), "int32"),
    ]
    assert_equal(free(tokens(2, 7)), model(tokens(2, 7)))


def test_several_arguments_of_call_are_passed_by_name():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, left, right):
            return self.dense(left) * right

    model, data = Two(), {"left": floats(3, 4), "right": floats(3, 4)}
    expected = model(**data)
    flat = expand(model, inputs=data)
    assert_equal(flat(data), expected)
    assert [x.shape for x in flat.inputs] == [(None, 4), (None, 4)]


def test_inputs_can_fix_the_sizes():
    model, _ = shared()
    flat = expand(model, inputs=keras.Input(batch_shape=(2, 4)))
    assert flat.inputs[0].shape == (2, 4)
    assert_equal(flat(floats(2, 4)), model(floats(2, 4)))


def test_a_layer_that_asks_for_it_stays_whole():
    class Whole(Residual):
        _tfcompress_primitive = True

    x = keras.Input((8, 8, 3))
    model = keras.Model(x, Whole(4, name="whole")(x))
    flat = expand(model)
    assert [layer.name for layer in flat.layers[1:]] == ["whole"]
    assert_equal(flat(floats(2, 8, 8, 3)), model(floats(2, 8, 8, 3)))


def test_a_whole_layer_leaves_training_to_the_layers_behind_it():
    class Whole(layers.Layer):
        _tfcompress_primitive = True

        def __init__(self):
            super().__init__()
            self.dropout = layers.Dropout(0.5)

        def call(self, x, training=None):
            return self.dropout(x, training=training)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.whole, self.noise = Whole(), layers.GaussianNoise(1.0)

        def call(self, x, training=None):
            return self.noise(self.whole(x))

    model, data = called(Model(), floats(3, 4))
    flat = expand(model)
    assert [type(layer).__name__ for layer in flat.layers[1:]] == ["Whole", "GaussianNoise"]
    assert np.all(np.asarray(flat(np.zeros((3, 4)), training=True)) != 0)


def test_a_dropout_that_is_called_with_training_false_is_an_identity():
    class Quiet(keras.Model):
        def __init__(self):
            super().__init__()
            self.dropout = layers.Dropout(0.5)

        def call(self, x, training=None):
            return self.dropout(x, training=False)

    model, data = called(Quiet(), floats(3, 4))
    assert_equal(expand(model)(data, training=True), data)


def test_a_trainable_batch_norm_that_is_called_with_training_false_is_refused():
    class Quiet(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization(name="bn")

        def call(self, x):
            return self.norm(x, training=False)

    model, data = called(Quiet(), floats(3, 4))
    with pytest.raises(ValueError, match="'bn'.*training=False.*layer.trainable = False"):
        expand(model)
    model.norm.trainable = False
    assert_equal(expand(model)(data, training=True), model(data))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_weights_that_a_call_reads_are_cast_as_in_the_layer(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, data = called(Transformer(), tokens(3, 7))
        assert_equal(expand(model)(data), model(data))
    finally:
        keras.config.set_dtype_policy("float32")


def test_mixed_precision_is_kept():
    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, dtype="mixed_bfloat16")])
    model = keras.Model(x, layers.Dense(2, dtype="float32")(inner(x)))
    flat = expand(model)
    assert [layer.compute_dtype for layer in flat.layers[1:]] == ["bfloat16", "float32"]
    assert_equal(flat(floats(3, 4)), model(floats(3, 4)))


def test_frozen_layers_stay_frozen():
    model, _ = sequential()
    model.layers[0].trainable = False
    flat = expand(model)
    assert [layer.trainable for layer in flat.layers[1:]] == [False, True, True, True]
    assert len(flat.trainable_variables) == len(model.trainable_variables)


def test_expanding_twice_changes_nothing():
    model, data = called(Transformer(), tokens(3, 7))
    once = expand(model)
    twice = expand(once)
    kinds = [[type(op) for op in flat.operations] for flat in (once, twice)]
    assert kinds[0] == kinds[1]
    assert_equal(twice(data), model(data))


@pytest.mark.parametrize("kind", ["BertBackbone", "RobertaBackbone", "AlbertBackbone"])
def test_keras_hub_encoders_expand(kind, tmp_path):
    models = pytest.importorskip("keras_hub").models
    arguments = {
        "vocabulary_size": 50,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": 16,
    }
    if kind == "AlbertBackbone":
        arguments["embedding_dim"] = 8
    model = getattr(models, kind)(**arguments)
    ids = tokens(2, 9)
    data = {"token_ids": ids, "padding_mask": ids > 5, "segment_ids": np.zeros_like(ids)}
    data = {name: value for name, value in data.items() if name in model.input}
    flat = expand(model)
    assert not any("Transformer" in type(layer).__name__ for layer in flat.layers)
    assert_equal(flat(data), model(data))
    flat.save(tmp_path / "flat.keras")
    assert_equal(keras.models.load_model(tmp_path / "flat.keras")(data), model(data))


def test_a_library_layer_that_cannot_be_traced_stays_whole_and_the_log_says_so(caplog):
    class FromHub(layers.Layer):
        def __init__(self):
            super().__init__(name="hub")
            self.dense = layers.Dense(4)

        def call(self, x):
            return self.dense(x) if ops.max(x) > 0 else x

        def compute_output_spec(self, x):
            return self.dense.compute_output_spec(x)

    FromHub.__module__ = "keras_hub.src.layers.from_hub"
    x = keras.Input((4,))
    layer = FromHub()
    layer(floats(2, 4))
    model = keras.Model(x, layer(x))
    with caplog.at_level(logging.INFO, "tfcompress"):
        flat = expand(model)
    assert "expand keeps hub whole" in caplog.text
    assert_equal(flat(floats(2, 4)), model(floats(2, 4)))


@pytest.mark.parametrize("name", ["GPT-2", "T5", "DeBERTa-v3"])
def test_what_was_expanded_takes_any_batch_and_length(name, tmp_path):
    architecture = ARCHITECTURES[f"keras_hub.{name}"]
    model = architecture.build()
    flat = expand(model)
    flat.save(tmp_path / "flat.keras")
    loaded = keras.models.load_model(tmp_path / "flat.keras")
    two = architecture.batch(np.random.default_rng(0))
    for rows, length in [(1, 8), (2, 3)]:
        data = keras.tree.map_structure(lambda x: x[:rows, :length], two)  # noqa: B023
        assert_equal(flat(data), model(data))
        assert_equal(loaded(data), model(data))


def test_a_norm_without_a_config_becomes_its_equivalent_or_its_ops():
    module = pytest.importorskip("keras_hub.src.models.t5.t5_layer_norm")
    kinds = {}
    for policy in ("float32", "mixed_float16"):
        x = keras.Input((4,))
        model = keras.Model(x, module.T5LayerNorm(dtype=keras.DTypePolicy(policy))(x))
        flat = expand(model)
        assert_equal(flat(floats(2, 4)), model(floats(2, 4)))
        kinds[policy] = [type(layer).__name__ for layer in flat.layers[1:]]
    assert kinds["float32"] == ["RMSNormalization"]
    assert "EinsumDense" in kinds["mixed_float16"]


def test_python_branches_name_the_layer_and_the_line():
    class Branching(layers.Layer):
        def __init__(self):
            super().__init__(name="fork")
            self.dense = layers.Dense(2)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            if ops.sum(x) > 0:
                x = -x
            return self.dense(x)

        def compute_output_shape(self, shape):
            return (*shape[:-1], 2)

    model = keras.Sequential([keras.Input((2,)), Branching()])
    with pytest.raises(ValueError) as error:
        expand(model)
    assert "Branching.call of the layer 'fork'" in str(error.value)
    assert "test_expand.py" in str(error.value)
    assert "if ops.sum(x) > 0:" in str(error.value)


def test_python_branches_on_training_are_refused():
    class Branching(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x, training=None):
            return self.dense(x * 2 if training else x)

    model, _ = called(Branching(), floats(3, 2))
    with pytest.raises(ValueError, match="branches on `training` in Python"):
        expand(model)


def test_random_numbers_in_call_are_refused():
    class Noisy(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)
            self.seed = keras.random.SeedGenerator(0)

        def call(self, x):
            return self.dense(x) + keras.random.normal((2,), seed=self.seed)

    model, _ = called(Noisy(), floats(3, 2))
    with pytest.raises(ValueError, match="random numbers in `call` need a layer of their own"):
        expand(model)


def test_constant_outputs_are_refused():
    class Constant(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return {"y": self.dense(x), "step": np.ones(3)}

    model, data = called(Constant(), floats(3, 2))
    with pytest.raises(ValueError, match="Return tensors only"):
        expand(model, inputs=data)


def test_indices_that_also_make_a_mask_are_integers():
    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(9, 4, mask_zero=True)
            self.lstm = layers.LSTM(2)

        def call(self, x):
            return self.lstm(self.embedding(x))

    model, data = called(Masked(), tokens(3, 5, size=3))
    flat = expand(model)
    assert flat.inputs[0].dtype == "int32"
    assert_equal(flat(data), model(data))


@pytest.mark.parametrize("make", [Convolutional, lambda: keras.Sequential([layers.Dense(2)])])
def test_an_unbuilt_model_is_refused_with_the_remedy(make):
    with pytest.raises(ValueError, match=r"needs a built model.*Call it on a batch"):
        expand(make())


def test_a_layer_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"keras\.Sequential\(\[keras\.Input\(shape\), layer\]\)"):
        expand(layers.Dense(2))


def test_a_distiller_is_refused_with_the_remedy():
    teacher, _ = shared()
    student, _ = shared()
    distiller = keras.distillation.Distiller(
        teacher, student, distillation_losses=keras.distillation.LogitsDistillation()
    )
    with pytest.raises(ValueError, match=r"pass its \.student"):
        expand(distiller)
