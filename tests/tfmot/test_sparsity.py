"""`tfmot.sparsity.keras` on Keras 3, with what TFMOT itself refuses."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
import tfcompress.tfmot as tfmot
from tfcompress import schedules
from tfcompress.layers import Prune

sparsity = tfmot.sparsity.keras
layers = keras.layers
RNG = np.random.default_rng(0)


def zeros(variable) -> float:
    return float(np.mean(keras.ops.convert_to_numpy(variable) == 0))


def half(**arguments):
    arguments = {"begin_step": 0, "frequency": 1} | arguments
    return {"pruning_schedule": sparsity.ConstantSparsity(0.5, **arguments)}


def trained(model, x, y, **arguments):
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0, **arguments)
    return model


def test_defaults_are_those_of_tfmot():
    decay = sparsity.PolynomialDecay(0.1, 0.9, 10, 100)
    assert decay.get_config() == {
        "class_name": "PolynomialDecay",
        "config": {
            "initial_sparsity": 0.1,
            "final_sparsity": 0.9,
            "power": 3,
            "begin_step": 10,
            "end_step": 100,
            "frequency": 100,
        },
    }
    constant = sparsity.ConstantSparsity(0.5, 0)
    assert (constant.end_step, constant.frequency) == (-1, 100)
    assert type(constant.from_config(constant.get_config())) is sparsity.ConstantSparsity
    prunes, value = decay(tf.constant(10, tf.int64))
    assert bool(prunes) and float(value) == np.float32(0.1)
    assert not bool(decay(50)[0])
    assert not bool(decay(210)[0])  # On the grid, but after the end.


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: sparsity.ConstantSparsity(1.0, 0), r"target_sparsity must be in range \[0,1\)"),
        (lambda: sparsity.ConstantSparsity(0.5, -1), "begin_step should be >= 0"),
        (lambda: sparsity.ConstantSparsity(0.5, 9, 3), "begin_step should be <= end_step"),
        (lambda: sparsity.ConstantSparsity(0.5, 0, frequency=0), "frequency should be > 0"),
        (lambda: sparsity.PolynomialDecay(0.0, 0.5, 0, -1), "end_step cannot be -1"),
        (lambda: sparsity.prune_low_magnitude("dense"), "You passed an object of type: str"),
        (
            lambda: sparsity.prune_low_magnitude(layers.Dense(1), block_pooling_type="SUM"),
            "Unsupported pooling type 'SUM'",
        ),
        (
            lambda: sparsity.prune_low_magnitude(layers.Dense(1), sparsity_m_by_n=2),
            "sparsity_m_by_n must be 2 integers, got 2",
        ),
        (lambda: sparsity.strip_pruning(layers.Dense(1)), "expected a keras.Model, got Dense"),
        (
            lambda: sparsity.prune_low_magnitude(
                keras.Sequential([keras.Input((2,)), layers.ReLU()])
            ),
            "No weight of the model",
        ),
    ],
)
def test_bad_arguments_say_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()


class Sometimes(sparsity.PruningSchedule):
    """A schedule of the user's own, without a begin_step."""

    def __init__(self, every=3):
        self.every = every

    def __call__(self, step):
        return tf.equal(step % self.every, 0), tf.cast(step, tf.float32) / 10.0

    def get_config(self):
        return {"every": self.every}


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_schedule_of_the_users_own_prunes_where_it_says_so(in_graph):
    schedule = schedules.get(Sometimes())
    due = functools.partial(schedules.is_due, schedule, frequency=100)
    value = schedule
    if in_graph:
        due, value = tf.function(due), tf.function(schedule, jit_compile=True)
        steps = [tf.constant(step, tf.int64) for step in range(1, 8)]
    else:
        steps = range(1, 8)
    assert [int(step) for step in steps if due(step)] == [3, 6]
    found = [round(float(value(step)), 4) for step in steps]
    assert found == [0, 0, 0.3, 0, 0, 0.6, 0]


def test_a_schedule_of_the_users_own_trains_and_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((10,)), layers.Dense(10, name="dense")])
    model = sparsity.prune_low_magnitude(model, Sometimes())
    x = RNG.normal(size=(8, 10))
    trained(model, x, x, epochs=5)  # Their step 6 is before our update 6.
    assert zeros(model.layers[0].layer.kernel) == 0.6
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="Register the class with keras.saving"):
        keras.models.load_model(tmp_path / "model.keras")
    with keras.saving.custom_object_scope({"Sometimes": Sometimes}):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    trained(loaded, x, x, epochs=3)
    assert zeros(loaded.layers[0].layer.kernel) == 0.9


def test_a_callback_takes_the_schedules_too():
    model = keras.Sequential([keras.Input((10,)), layers.Dense(10)])
    decay = sparsity.PolynomialDecay(0.0, 0.8, 0, 5, frequency=2)
    callback = tfc.callbacks.Pruning(decay)
    trained(model, RNG.normal(size=(8, 10)), np.ones((8, 10)), epochs=6, callbacks=[callback])
    assert zeros(model.layers[0].kernel) == 0.8  # 5 is off the grid, and reached.


def recurrent():
    x = keras.Input((3, 6))
    h = layers.LSTM(8, return_sequences=True)(x)
    h = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4)(h, h))
    return keras.Model(x, layers.GRU(4)(layers.Conv1D(4, 2)(h)))


def nested():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(6)], name="inner")
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(3)(inner(x) + x))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = layers.Dense(8, activation="relu"), layers.Dense(3)

    def call(self, x):
        return self.second(self.first(x) * 2.0)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6)))
    return model


def mixed_precision():
    policy = keras.DTypePolicy("mixed_float16")
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, dtype=policy), layers.Dense(3, dtype=policy)]
    )


def tokens():
    x = keras.Input((5,), dtype="int32")
    return keras.Model(x, layers.Dense(3)(layers.Embedding(10, 8)(x)))


MODELS = {
    "recurrent": (recurrent, RNG.normal(size=(8, 3, 6))),
    "nested": (nested, RNG.normal(size=(8, 6))),
    "subclassed": (subclassed, RNG.normal(size=(8, 6))),
    "mixed precision": (mixed_precision, RNG.normal(size=(8, 6))),
    "tokens": (tokens, RNG.integers(0, 10, (8, 5))),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_tfmot_refuses(name, tmp_path):
    make, x = MODELS[name]
    model = make()
    expected = model.predict(x, verbose=0)
    later = sparsity.prune_low_magnitude(model, **half(begin_step=2))
    np.testing.assert_allclose(later.predict(x, verbose=0), expected, rtol=1e-3, atol=1e-5)
    trained(later, x, expected + 1.0, epochs=3)
    later.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), later.predict(x, verbose=0))
    plain = sparsity.strip_pruning(loaded)
    kernels = [w for w in plain.trainable_weights if "kernel" in w.path or "embedd" in w.path]
    assert kernels and all(abs(zeros(w) - 0.5) < 0.01 for w in kernels)
    for own, other in zip(model.weights, make().weights, strict=True):
        assert own.shape == other.shape and zeros(own) == zeros(other)  # The original stays.


def test_what_is_pruned_by_default():
    x = keras.Input((8, 8, 4))
    h = layers.SeparableConv2D(8, 3, name="separable")(layers.DepthwiseConv2D(3, name="deep")(x))
    h = layers.Conv2D(4, 1, name="frozen", trainable=False)(layers.BatchNormalization()(h))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(h)))
    pruned = sparsity.prune_low_magnitude(model, **half())
    found = {each.layer.name: list(each.kernels()) for each in pruned.layers if type(each) is Prune}
    assert {name: [path.split("/")[-1] for path in paths] for name, paths in found.items()} == {
        "separable": ["pointwise_kernel"],
        "head": ["kernel"],
    }


class Prunable(layers.Layer, sparsity.PrunableLayer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 4), name="table")
        self.other = self.add_weight(shape=(shape[-1], 4), name="other")

    def call(self, x):
        return x @ self.table + x @ self.other

    def get_prunable_weights(self):
        return [self.table]


def test_a_layer_says_which_of_its_weights_are_pruned():
    pruned = sparsity.prune_low_magnitude(Prunable(name="own"), **half())
    model = keras.Sequential([keras.Input((6,)), pruned])
    trained(model, RNG.normal(size=(8, 6)), np.ones((8, 4)))
    assert pruned.name == "prune_low_magnitude_own"
    assert zeros(pruned.layer.table) == 0.5
    assert zeros(pruned.layer.other) == 0.0


def test_blocks_and_m_by_n():
    block = sparsity.prune_low_magnitude(layers.Dense(6), block_size=(2, 3), **half())
    few = sparsity.prune_low_magnitude(layers.Dense(4), sparsity_m_by_n=(3, 4))
    model = keras.Sequential([keras.Input((8,)), block, layers.Dense(8), few])
    trained(model, RNG.normal(size=(8, 8)), np.ones((8, 4)))
    kernel = np.asarray(block.layer.kernel).reshape(4, 2, 2, 3)
    per_block = np.count_nonzero(kernel, axis=(1, 3))
    assert sorted(per_block.ravel()) == [0] * 4 + [6] * 4
    groups = np.asarray(few.layer.kernel).reshape(2, 4, 4)
    assert (np.count_nonzero(groups, axis=1) == 1).all()


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_a_list_and_a_first_layer_with_an_input_shape():
    wrapped = sparsity.prune_low_magnitude([layers.Dense(4, input_shape=(8,)), layers.ReLU()])
    assert [type(each) for each in wrapped] == [Prune, layers.ReLU]
    model = keras.Sequential(wrapped)
    assert model.input_shape == (None, 8)
    assert sparsity.prune_low_magnitude(wrapped[0]) is wrapped[0]


def test_float_weights_go_into_the_layers_inside():
    plain = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    pruned = sparsity.prune_low_magnitude(plain, **half(begin_step=2))
    pruned.layers[0].layer.set_weights(plain.layers[0].get_weights())
    x = RNG.normal(size=(4, 8))
    np.testing.assert_array_equal(pruned.predict(x, verbose=0), plain.predict(x, verbose=0))


def test_a_training_loop_of_the_users_own(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="dense")])
    model = sparsity.prune_low_magnitude(model, **half(begin_step=3))
    model.optimizer = keras.optimizers.Adam()
    step, log = sparsity.UpdatePruningStep(), sparsity.PruningSummaries(str(tmp_path))
    step.set_model(model)
    log.set_model(model)
    step.on_train_begin()
    x, seen = tf.constant(RNG.normal(size=(8, 8)), tf.float32), []
    for _ in range(2):
        log.on_epoch_begin(epoch=-1)
        for _ in range(2):
            step.on_train_batch_begin(batch=-1)
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(model(x, training=True) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            seen.append(zeros(model.layers[0].layer.kernel))
        step.on_epoch_end(batch=-1)
    assert seen == [0, 0.5, 0.5, 0.5]  # TFMOT prunes before batch 3, we do after update 2.
    written = list((tmp_path / "metrics").iterdir())
    events = [
        tf.compat.v1.Event.FromString(e.numpy()) for e in tf.data.TFRecordDataset(str(written[0]))
    ]
    path = model.layers[0].layer.kernel.path
    values = {
        (event.step, value.tag): float(tf.make_ndarray(value.tensor))
        for event in events
        for value in event.summary.value
    }
    assert values[2, f"{path}/mask/sparsity"] == 0.5
    assert values[2, f"{path}/threshold"] > 0


def test_a_schedule_that_is_not_reached_is_told():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model = sparsity.prune_low_magnitude(model, sparsity.PolynomialDecay(0.0, 0.5, 0, 1000))
    with pytest.warns(UserWarning, match="Training ends at step 2, before .* at step 999"):
        trained(model, np.ones((4, 4)), np.ones((4, 4)), epochs=2, batch_size=4,
                callbacks=[sparsity.UpdatePruningStep()])  # fmt: skip


def mobile(keepdims=True, first="valid"):
    x = keras.Input((16, 16, 3))
    h = layers.ZeroPadding2D(1)(x)
    h = layers.Conv2D(8, 3, strides=2, padding=first, name="first")(h)
    h = layers.ReLU(6.0)(layers.BatchNormalization()(h))
    deep = layers.DepthwiseConv2D(3, padding="same")(h)
    h = layers.Conv2D(8, 1, name="pointwise")(deep) + h
    h = layers.GlobalAveragePooling2D(keepdims=keepdims)(h)
    return keras.Model(x, layers.Conv2D(4, 1, name="head")(h) if keepdims else h)


def test_xnnpack_gets_its_pointwise_convolutions_pruned():
    policy = sparsity.PruneForLatencyOnXNNPack()
    pruned = sparsity.prune_low_magnitude(mobile(), pruning_policy=policy, **half())
    found = [layer.layer.name for layer in pruned.layers if isinstance(layer, Prune)]
    assert found == ["pointwise", "head"]
    policy.ensure_model_supports_pruning(pruned)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: mobile(keepdims=False), "GlobalAveragePooling2D is not supported"),
        (lambda: mobile(first="same"), "Could not find a Conv2D of 3x3 with stride 2"),
        (lambda: keras.Sequential([layers.Dense(2)]), "Unbuilt models are not supported"),
    ],
)
def test_a_policy_says_what_is_in_the_way(model, text):
    with pytest.raises(ValueError, match=text):
        sparsity.prune_low_magnitude(model(), pruning_policy=sparsity.PruneForLatencyOnXNNPack())
