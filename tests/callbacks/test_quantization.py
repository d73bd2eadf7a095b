"""Quantization-aware training of models as they are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import LAYER_KINDS
from tfcompress.callbacks import Pruning, QuantizationAwareTraining
from tfcompress.ops import fake_quant as fq
from tfcompress.ops.schemes import Scheme, activation_scheme

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 2))).astype("float32")
IMAGES = RNG.normal(size=(32, 8, 8, 3)).astype("float32")


def mlp(inputs=True):
    operations = [layers.Dense(8, activation="relu", name="hidden"), layers.Dense(2, name="logits")]
    return keras.Sequential([keras.Input((6,))] * inputs + operations, name="mlp")


def fit(model, callbacks, x=X, y=Y, epochs=1, optimizer=None, **compile_arguments):
    model.compile(optimizer or keras.optimizers.SGD(0.05), "mse", **compile_arguments)
    history = model.fit(
        x, y, epochs=epochs, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks
    )
    return history.history["loss"]


def ends(paths):
    return ["/".join(path.split("/")[-2:]) for path in paths]


def hidden_traces(model):
    every = [model, *model._flatten_layers()]
    return [n for each in every for n in ("call", "train_step") if n in vars(each)]


def test_a_step_sees_rounded_weights_inputs_and_outputs():
    model = mlp()
    w1, b1, w2, b2 = model.get_weights()
    qat = QuantizationAwareTraining()
    loss = fit(model, [qat], X[:16], Y[:16])
    activations = activation_scheme("int8")

    def rounded(x):
        return fq.fake_quant_activations(x, [x.min(), x.max()], activations).numpy()

    q1, q2 = (fq.fake_quant_weights(w, Scheme(), 0).numpy() for w in (w1, w2))
    hidden = rounded(np.maximum(rounded(X[:16]) @ q1 + b1, 0))
    expected = np.mean((rounded(hidden @ q2 + b2) - Y[:16]) ** 2)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)
    assert ends(qat.ranges) == ["mlp/input_0", "hidden/output", "logits/output"]
    assert ends(qat.applied) == ["hidden/kernel", "logits/kernel"]


def test_it_leaves_a_plain_model_and_its_ranges():
    model = mlp()
    qat = QuantizationAwareTraining()
    fit(model, [qat])
    assert hidden_traces(model) == []
    w1, b1, w2, b2 = model.get_weights()
    plain = np.maximum(X @ w1 + b1, 0) @ w2 + b2
    np.testing.assert_allclose(model.predict(X, verbose=0), plain, rtol=1e-4, atol=1e-5)
    low, high = qat.ranges["mlp/input_0"]
    assert X.min() <= low < 0 < high <= X.max()


def test_the_finished_model_saves_and_loads(tmp_path):
    model = mlp()
    fit(model, [QuantizationAwareTraining()])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))


def test_a_second_fit_goes_on_from_the_ranges():
    model = mlp()
    fit(model, [QuantizationAwareTraining()])
    qat = QuantizationAwareTraining()
    fit(model, [qat], x=np.zeros_like(X))
    assert qat.ranges["mlp/input_0"][1] > 0.9 * 0.99**4


@pytest.mark.parametrize(
    "arguments", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 4}]
)
def test_xla_eager_and_several_steps_a_call_equal_graph(arguments):
    results = []
    for compile_arguments in ({"jit_compile": False}, arguments):
        keras.utils.set_random_seed(0)
        model = mlp()
        qat = QuantizationAwareTraining()
        fit(model, [qat], epochs=2, **compile_arguments)
        results.append([*model.get_weights(), *qat.ranges.values()])
    for graph, other in zip(*results, strict=True):
        np.testing.assert_allclose(graph, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind != "BatchNormalization"])
def test_every_kind_of_layer_trains_as_it_will_compute(kind):
    make, shape = LAYER_KINDS[kind]
    keras.utils.set_random_seed(0)
    layer = make()
    model = keras.Sequential([keras.Input(shape[1:]), layer, layers.Flatten(), layers.Dense(1)])
    x = RNG.integers(0, 5, (16, *shape[1:])).astype("float32")
    kernels = [variable for variable in layer.trainable_variables if variable.ndim > 1]
    kernels = [variable for variable in kernels if "bias" not in variable.name]
    before = [np.asarray(kernel) for kernel in kernels]
    qat = QuantizationAwareTraining("int4")
    loss = fit(model, [qat], x, np.ones((16, 1)), optimizer=keras.optimizers.Adam(0.01), epochs=20)
    assert loss[-1] < loss[0]
    assert len(qat.applied) == len(kernels) + 1
    for kernel, first in zip(kernels, before, strict=True):
        assert np.abs(np.asarray(kernel) - first).max() > 1e-4
    assert all(high > low for low, high in qat.ranges.values())
    assert hidden_traces(model) == []


def functional():
    x = keras.Input((6,))
    shared = layers.Dense(6, name="shared")
    h = layers.Add()([shared(x), shared(layers.ReLU()(shared(x)))])
    return keras.Model(x, keras.Sequential([layers.Dense(4), layers.Dense(2)])(h))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.norm = layers.Dense(4), layers.BatchNormalization()
        self.relu, self.second = layers.ReLU(name="relu"), layers.Dense(2)

    def call(self, x):
        return self.second(self.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [mlp, lambda: mlp(inputs=False), functional, Subclassed])
def test_models_of_every_make_train(make, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    qat = QuantizationAwareTraining()
    loss = fit(model, [qat], epochs=4)
    assert loss[-1] < loss[0]
    assert all(high > low for low, high in qat.ranges.values())
    kernels = [v for v in model.trainable_variables if len(v.shape) == 2]
    assert len(qat.applied) == len(kernels)
    assert hidden_traces(model) == []


def test_a_subclassed_model_is_read_as_a_graph():
    qat = QuantizationAwareTraining()
    fit(Subclassed(), [qat])
    assert [path.split("/")[-2] for path in qat.ranges][1:] == ["relu", "dense_1"]


def test_a_shared_layer_has_one_range_for_all_calls():
    qat = QuantizationAwareTraining()
    fit(functional(), [qat])
    assert sum("shared" in path for path in qat.ranges) == 1


def test_nothing_is_rounded_before_begin_step_but_ranges_are_seen():
    losses = {}
    for name, callbacks in {
        "plain": [],
        "later": [QuantizationAwareTraining(begin_step=4)],
        "now": [QuantizationAwareTraining()],
    }.items():
        keras.utils.set_random_seed(0)
        losses[name] = fit(mlp(), callbacks, epochs=2)
    assert losses["later"][0] == pytest.approx(losses["plain"][0], rel=1e-6)
    assert losses["later"][1] != pytest.approx(losses["plain"][1], rel=1e-6)
    assert losses["now"][0] != pytest.approx(losses["plain"][0], rel=1e-6)


def test_globs_leave_layers_float():
    qat = QuantizationAwareTraining(exclude="*hidden/kernel")
    fit(mlp(), [qat])
    assert ends(qat.applied) == ["logits/kernel"]
    assert ends(qat.ranges) == ["mlp/input_0", "logits/output"]
    assert [path for path in qat.skipped if "hidden/kernel" in path]
    weights_only = QuantizationAwareTraining(activations=None, include="*logits*")
    fit(mlp(), [weights_only])
    assert ends(weights_only.applied) == ["logits/kernel"]


def test_pruned_zeros_stay_zeros():
    model = mlp()
    fit(model, [Pruning(0.5, frequency=1), QuantizationAwareTraining()], epochs=2)
    kernel = model.get_layer("hidden").kernel.numpy()
    assert np.count_nonzero(kernel) == 24
    rounded = fq.fake_quant_weights(kernel, Scheme(), 0).numpy()
    assert np.all(rounded[kernel == 0] == 0)


def test_only_the_student_of_a_distiller_is_quantized():
    teacher, student = mlp(), mlp()
    distiller = keras.distillation.Distiller(
        teacher, student, distillation_losses=keras.distillation.LogitsDistillation()
    )
    qat = QuantizationAwareTraining()
    fit(distiller, [qat])
    assert ends(qat.applied) == ["hidden/kernel", "logits/kernel"]
    assert all(high > low for low, high in qat.ranges.values())
    assert hidden_traces(distiller) == []


def test_a_custom_loop_attaches_with_a_with_block():
    model = mlp()
    optimizer = keras.optimizers.SGD(0.05)
    with QuantizationAwareTraining().attached(model, optimizer) as qat:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X, training=True) - Y))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        assert "call" in vars(model)
    assert hidden_traces(model) == []
    assert qat.ranges["mlp/input_0"][1] == pytest.approx(X.max(), rel=0.01)


def test_an_error_in_the_step_detaches():
    model = mlp()
    model.compile("sgd", "mse")
    with pytest.raises(Exception, match="(?i)shape|incompatible"):
        model.fit(X[:, :5], Y, verbose=0, callbacks=[QuantizationAwareTraining()])
    assert hidden_traces(model) == []


def test_convolutions_with_batch_norm_train():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(),
            layers.ReLU(name="relu"),
            layers.DepthwiseConv2D(3, activation="relu", name="depthwise"),
            layers.AveragePooling2D(2, name="average"),
            layers.Flatten(),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    qat = QuantizationAwareTraining()
    fit(model, [qat], IMAGES, np.eye(2)[[0, 1] * 16], epochs=2)
    places = [path.removeprefix("sequential/") for path in qat.ranges]
    assert places == [
        "input_0",
        "relu/output",
        "depthwise/output",
        "average/output",
        "head/preactivation",
        "head/output",
    ]
    ranges = list(qat.ranges.values())
    assert ranges[3] == ranges[2]
    assert ranges[5] == (0.0, 255 / 256)


def test_training_that_was_interrupted_equals_training_that_was_not(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*extra, epochs=4):
        keras.utils.set_random_seed(0)
        model = mlp()
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        qat = QuantizationAwareTraining()
        fit(model, [backup, qat, *extra], epochs=epochs)
        return [*model.get_weights(), *qat.ranges.values()]

    with pytest.raises(KeyboardInterrupt):
        run(Stop())
    resumed = run()
    keras.utils.set_random_seed(0)
    model, qat = mlp(), QuantizationAwareTraining()
    fit(model, [qat], epochs=4)
    for a, b in zip(resumed, [*model.get_weights(), *qat.ranges.values()], strict=True):
        np.testing.assert_array_equal(a, b)


def test_percentiles_leave_outliers_out():
    x = X.copy()
    x[3, 2] = 1000.0
    highest = {}
    for percentile in (100.0, 95.0):
        qat = QuantizationAwareTraining(percentile=percentile)
        fit(mlp(), [qat], x[:16], Y[:16])
        highest[percentile] = qat.ranges["mlp/input_0"][1]
    assert highest[100.0] == 1000.0
    assert 1.5 < highest[95.0] < 4


@pytest.mark.parametrize("jit_compile", [False, True])
def test_ranges_stay_after_their_last_step(jit_compile):
    ranges = []
    for epochs in (1, 3):
        qat = QuantizationAwareTraining(ranges_end_step=4)  # Four steps an epoch.
        fit(mlp(), [qat], epochs=epochs, jit_compile=jit_compile)
        ranges.append(qat.ranges)
    moving = QuantizationAwareTraining()
    fit(mlp(), [moving], epochs=3, jit_compile=jit_compile)
    assert ranges[0]["mlp/input_0"] == ranges[1]["mlp/input_0"] != moving.ranges["mlp/input_0"]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batch_norms_keep_their_statistics_after_their_last_step(jit_compile):
    def trained(epochs, **arguments):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(2), layers.BatchNormalization()])
        fit(model, [QuantizationAwareTraining(**arguments)], epochs=epochs, jit_compile=jit_compile)
        return model.layers[-1]

    at_the_end_of_the_first, frozen = (trained(n, batch_norm_end_step=4) for n in (1, 3))
    moving = trained(3)
    for name in ("moving_mean", "moving_variance"):
        first, last, free = (
            np.asarray(getattr(each, name)) for each in (at_the_end_of_the_first, frozen, moving)
        )
        np.testing.assert_array_equal(first, last)
        assert np.abs(free - last).max() > 1e-3
    gammas = [np.asarray(each.gamma) for each in (frozen, at_the_end_of_the_first)]
    assert np.abs(gammas[0] - gammas[1]).max() > 1e-4
    assert not hidden_traces(keras.Sequential([frozen]))


def test_frozen_batch_norms_normalize_with_moving_statistics_in_training():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2), layers.BatchNormalization()])
    model.layers[-1].moving_mean.assign([5.0, -5.0])
    qat = QuantizationAwareTraining(activations=None, batch_norm_end_step=0)
    expected = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    loss = fit(model, [qat], optimizer=keras.optimizers.SGD(0.0))
    np.testing.assert_allclose(loss[0], expected, rtol=0.01)


def test_dynamic_activations_have_no_range():
    qat = QuantizationAwareTraining(activations="dynamic")
    model = mlp()
    w1, b1, w2, b2 = model.get_weights()
    loss = fit(model, [qat], X[:16], Y[:16])
    rows = activation_scheme("dynamic")
    q1, q2 = (fq.fake_quant_weights(w, Scheme(), 0).numpy() for w in (w1, w2))
    hidden = np.maximum(fq.fake_quant_dynamic(X[:16], rows).numpy() @ q1 + b1, 0)
    expected = np.mean((fq.fake_quant_dynamic(hidden, rows).numpy() @ q2 + b2 - Y[:16]) ** 2)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)
    assert qat.ranges == {}


def test_each_weight_may_have_its_own_scheme():
    qat = QuantizationAwareTraining({"*hidden*": "int4", "*logits*": "int8"})
    fit(mlp(), [qat])
    bits = {path.split("/")[-2]: scheme[:13] for path, scheme in qat.applied.items()}
    assert bits == {"hidden": "Scheme(bits=4", "logits": "Scheme(bits=8"}
    partly = QuantizationAwareTraining({"*hidden*": "int4"})
    fit(mlp(), [partly])
    assert partly.skipped["mlp/logits/kernel"] == "no glob of weights= matches it"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QuantizationAwareTraining("int9"), "weights='int9' is not"),
        (lambda: QuantizationAwareTraining(None, None), "nothing to quantize; pass weights="),
        (lambda: QuantizationAwareTraining(begin_step=-1), "begin_step=-1; pass a number"),
        (lambda: QuantizationAwareTraining(ranges_end_step=1.5), "ranges_end_step=1.5; pass a"),
        (lambda: QuantizationAwareTraining(percentile=20), r"percentile=20 must be in \(50, 100\]"),
        (lambda: fit(mlp(), [QuantizationAwareTraining({"x": "int8"})]), "glob 'x' matches no"),
        (lambda: fit(mlp(), [QuantizationAwareTraining(include="x")]), "glob 'x' matches no"),
        (lambda: fit(mlp(), [QuantizationAwareTraining(exclude="*")]), "no weight to quantize"),
    ],
)
def test_bad_input_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
