"""What a training with a teacher does, and what it must not."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.distillation.networks import Subclassed, attentive, copy, data, entropy, net
from tests.processes import run_module
from tfcompress import distillation, schedules
from tfcompress.distillation import Distiller, losses, names
from tfcompress.keras_hooks.hook import add_hook

X, Y = data()


def fit(distiller, x=X, y=Y, optimizer="adam", epochs=2, loss=None, jit=None, **arguments):
    compiled = {} if jit is None else {"jit_compile": jit}
    distiller.compile(optimizer, loss or entropy(), **compiled)
    arguments = {"batch_size": 16, "shuffle": False, "verbose": 0, "epochs": epochs} | arguments
    return distiller.fit(x, y, **arguments).history


def weights(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]


def assert_equal(one, two, tolerance=0.0):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def random_dropout_everywhere(name="teacher"):
    """Its dropout is on in inference too: it moves a random state."""
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    x = keras.layers.Dropout(0.5)(x, training=True)
    return keras.Model(inputs, keras.layers.Dense(3)(x), name=name)


@pytest.mark.parametrize("make", [lambda: net(16, dropout=0.3), random_dropout_everywhere])
def test_the_teacher_stays_bit_for_bit(make):
    teacher = make()
    before, trainable = weights(teacher), len(teacher.trainable_variables)
    student = net()
    start = weights(student)
    fit(Distiller(teacher, student, ["logits", "features"]))
    assert_equal(before, weights(teacher))
    assert len(teacher.trainable_variables) == trainable
    assert any((a != b).any() for a, b in zip(start, weights(student), strict=True))


@pytest.mark.parametrize("losses", ["logits", ["logits", "features", "rkd_distance"]])
def test_one_forward_of_each_a_step(losses):
    teacher, student = net(16), net()
    distiller = Distiller(teacher, student, losses)
    fit(distiller, epochs=1)  # Builds; what is built is not built again below.
    distiller.compile("adam", entropy(), run_eagerly=True)
    calls = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", student)):

        def count(proceed, *args, training=None, name=name, **kwargs):
            calls[name].append(training)
            return proceed(*args, training=training, **kwargs)

        add_hook(model, "call", count)
    x, y = tf.constant(X[:16]), tf.constant(Y[:16])
    for _ in range(3):
        distiller.train_step((x, y))
    assert calls == {"teacher": [False] * 3, "student": [True] * 3}
    distiller.test_step((x, y))
    assert calls == {"teacher": [False] * 4, "student": [True] * 3 + [False]}


def test_the_total_is_what_it_says():
    teacher, student = net(16), net()
    distiller = Distiller(
        teacher,
        student,
        [distillation.Logits(2.0), "mse"],
        distillation_loss_weights=[0.7, 0.2],
        student_loss_weight=0.25,
    )
    distiller.compile("sgd", entropy())
    sample_weight = np.linspace(0, 2, 48).astype("float32")
    t, s = (m(X, training=False) for m in (teacher, student))
    labels = float(entropy()(Y, s, sample_weight))
    context = losses.Context(weights=sample_weight)
    logits = float(distillation.Logits(2.0)([t], [s], context))
    squares = float(distillation.MeanSquaredError()([t], [s], context))
    found = distiller.evaluate(X, Y, 48, 0, sample_weight, return_dict=True)
    assert found["student_loss"] == pytest.approx(labels, rel=1e-5)
    assert found["logits_loss"] == pytest.approx(logits, rel=1e-5)
    assert found["mse_loss"] == pytest.approx(squares, rel=1e-5)
    distilled = 0.7 * logits + 0.2 * squares
    assert found["distillation_loss"] == pytest.approx(distilled, rel=1e-5)
    assert found["loss"] == pytest.approx(0.25 * labels + 0.75 * distilled, rel=1e-5)


def plain_twin(student, **arguments):
    twin = copy(student)
    twin.compile("sgd", entropy())
    twin.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0, **arguments)
    return twin


def test_with_the_labels_only_it_is_plain_training():
    student = net()
    twin = plain_twin(student, class_weight={0: 1.0, 1: 3.0, 2: 0.0})
    distiller = Distiller(net(16), student, "logits", student_loss_weight=1.0)
    fit(distiller, optimizer="sgd", class_weight={0: 1.0, 1: 3.0, 2: 0.0})
    assert_equal(weights(twin), weights(student), 1e-7)


@pytest.mark.parametrize("name", sorted(set(names.LOSSES) - {"relations"}))
def test_examples_of_weight_zero_teach_nothing(name):
    teacher, student, x = net(16), net(), X
    arguments = {"student_loss_weight": 0.0}
    loss = distillation.get(name)
    if name in ("activation_maps", "masked_features", "attention"):
        teacher, student = attentive(2, 6), attentive()
        x = np.random.default_rng(0).integers(1, 10, (48, 5))
        if name != "attention":
            loss = type(loss)("norm_1", "norm_1")
    distiller = Distiller(teacher, student, loss, **arguments)
    start = [np.array(v) for v in student.get_weights()]
    distiller.compile(keras.optimizers.SGD(1.0), entropy())
    distiller.train_on_batch(x, Y, np.zeros(48))
    trained = {id(v) for v in student.trainable_variables}
    for variable, before in zip(student.weights, start, strict=True):
        if id(variable) in trained:
            np.testing.assert_array_equal(variable.numpy(), before)
    distiller.train_on_batch(x, Y, np.ones(48))
    assert any((v.numpy() != b).any() for v, b in zip(student.weights, start, strict=True))


def test_a_whole_weight_is_a_repeated_example():
    found = []
    for rows, weight in ((np.r_[0:16, 0:8], None), (np.r_[0:16], np.r_[[2.0] * 8, [1.0] * 8])):
        keras.utils.set_random_seed(0)
        student = net()
        student.get_layer("norm").trainable = False  # Its statistics count examples.
        distiller = Distiller(net(16), student, ["logits", "features"])
        distiller.compile("sgd", entropy())
        results = distiller.evaluate(X[rows], Y[rows], 64, 0, weight, return_dict=True)
        found.append({name: value * len(rows) for name, value in results.items()})
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-5)


def test_data_without_labels():
    student = net()
    history = fit(Distiller(net(16), student, "logits", student_loss_weight=0.0), y=None, epochs=8)
    assert history["loss"][-1] < history["loss"][0]
    distiller = Distiller(net(16), net(), "logits", student_loss_weight=0.0)
    distiller.compile("adam", None, metrics=["accuracy"])
    distiller.fit(X, verbose=0)
    with pytest.raises(ValueError, match="student_loss_weight=0.0"):
        Distiller(net(16), net(), "logits").compile("adam", None)


@pytest.mark.parametrize("missing", [-1, np.nan])
def test_some_examples_have_no_label(missing):
    y = Y.astype("float32" if missing != missing else "int64")
    y[::3] = missing
    known = np.ones(48, bool)
    known[::3] = False
    teacher, student = net(16), net()
    distiller = Distiller(teacher, student, "logits", unlabelled=missing)
    distiller.compile("sgd", entropy(), metrics=["accuracy"])
    found = distiller.evaluate(X, y, 48, 0, return_dict=True)
    s = student(X, training=False)
    assert found["student_loss"] == pytest.approx(float(entropy()(Y, s, known)), rel=1e-5)
    assert found["accuracy"] == pytest.approx((s.numpy().argmax(1) == Y)[known].mean(), rel=1e-5)
    every = float(distillation.Logits()([teacher(X)], [s]))
    assert found["distillation_loss"] == pytest.approx(every, rel=1e-5)


def test_several_teachers_with_weights():
    teachers, student = [net(16), net(4)], net()
    distiller = Distiller(teachers, student, "logits", teacher_weights=[0.9, 0.3])
    distiller.compile("sgd", entropy())
    found = distiller.evaluate(X, Y, 48, 0, return_dict=True)["distillation_loss"]
    s = student(X, training=False)
    one, two = (float(distillation.Logits()([t(X)], [s])) for t in teachers)
    assert found == pytest.approx(0.9 * one + 0.3 * two, rel=1e-5)
    before = [weights(t) for t in teachers]
    fit(distiller)
    for old, teacher in zip(before, teachers, strict=True):
        assert_equal(old, weights(teacher))


def test_points_are_reached_in_subclassed_models_whose_call_takes_no_training():
    teacher, student = Subclassed(16, 4), Subclassed(8, 2)
    teacher(X), student(X)
    loss = distillation.Features("block_?/inner", "block_?/inner")
    distiller = Distiller(teacher, student, [loss, "features"])
    history = fit(distiller, epochs=6)
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]
    assert len(distiller.heads) == 3
    assert {id(v) for v in distiller.trainable_variables} == {
        id(v) for layer in (student, *distiller.heads) for v in layer.trainable_variables
    }


def test_a_student_is_built_by_the_first_batch():
    student = keras.Sequential([keras.layers.Dense(4, name="hidden"), keras.layers.Dense(3)])
    distiller = Distiller(net(16), student, ["logits", "features"])
    fit(distiller)
    assert student.built and len(distiller.heads) == 1


def test_a_layer_called_twice_has_two_points():
    inputs = keras.Input((6,))
    shared = keras.layers.Dense(6, activation="tanh", name="shared")
    student = keras.Model(inputs, keras.layers.Dense(3)(shared(shared(inputs))))
    loss = distillation.Features("second", "shared#2")
    distiller = Distiller(net(6), student, loss, student_loss_weight=0.0)
    distiller.compile("sgd", entropy())
    found = distiller.evaluate(X, Y, 48, 0, return_dict=True)["loss"]
    teacher = keras.Model(distiller.teacher.inputs, distiller.teacher.get_layer("second").output)
    expected = np.square(teacher(X) - shared(shared(X))).mean()
    assert found == pytest.approx(expected, rel=1e-5)


def test_attention_learns_where_the_tokens_are():
    ids = np.random.default_rng(0).integers(1, 10, (48, 5))
    ids[::2, 3:] = 0
    teacher, student = attentive(2, 8, layers=4), attentive(2, 4, layers=2)
    losses = ["attention", "relations", distillation.Features("norm_?", "norm_?")]
    distiller = Distiller(teacher, student, losses, student_loss_weight=0.0)
    distiller.compile("sgd", entropy())
    found = distiller.evaluate(ids, Y, 48, 0, return_dict=True)
    history = fit(distiller, ids, epochs=8)
    for name in ("attention", "features"):
        assert history[f"{name}_loss"][-1] < found[f"{name}_loss"]
    pairs = [term.pairs for term in distiller._terms]
    assert [p.teacher[0] for p in pairs[0]] == ["attention_1/query", "attention_3/query"]
    assert [p.teacher[0] for p in pairs[1]] == ["attention_2/query", "attention_3/query"]


def test_outputs_of_softmax_are_taken_as_logits():
    found = []
    for activation in (None, "softmax"):
        keras.utils.set_random_seed(0)
        teacher, student = net(16, activation=activation), net(activation=activation)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
        distiller = Distiller(teacher, student, "logits")
        distiller.compile("sgd", loss)
        found.append(distiller.evaluate(X, Y, 48, 0, return_dict=True)["distillation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_regularizer_of_the_student_counts_whole_and_the_teachers_not():
    teacher, student = net(16), net()
    teacher.get_layer("first").kernel_regularizer = keras.regularizers.L2(1.0)
    teacher.get_layer("first").kernel.regularizer = keras.regularizers.L2(1.0)
    distiller = Distiller(teacher, student, "logits")
    distiller.compile("sgd", entropy())
    before = distiller.evaluate(X, Y, 48, 0, return_dict=True)["loss"]
    kernel = student.get_layer("first").kernel
    kernel.regularizer = keras.regularizers.L2(0.5)
    distiller.compile("sgd", entropy())
    after = distiller.evaluate(X, Y, 48, 0, return_dict=True)["loss"]
    assert after - before == pytest.approx(0.5 * np.square(kernel.numpy()).sum(), rel=1e-4)


def test_weights_follow_schedules_in_the_step():
    share = schedules.Linear(0.0, 1.0, begin_step=0, end_step=3)
    distiller = Distiller(
        net(16), net(), ["logits"], [schedules.Constant(2.0)], student_loss_weight=share
    )
    history = fit(distiller, optimizer=keras.optimizers.SGD(0.0), epochs=5, batch_size=48)
    mixed = [
        a * one + (1 - a) * two
        for a, one, two in zip(
            (0, 1 / 3, 2 / 3, 1, 1),
            history["student_loss"],
            history["distillation_loss"],
            strict=True,
        )
    ]
    np.testing.assert_allclose(history["loss"], mixed, rtol=1e-5)


def test_balanced_losses_have_one_size():
    losses = ["logits", "mse", distillation.Features("second", "second")]
    distiller = Distiller(net(16), net(), losses, balancing="magnitude")
    history = fit(distiller, optimizer=keras.optimizers.SGD(0.0), epochs=3, batch_size=48)
    # Nothing learns, so that every loss has the size of the first, the labels'.
    assert history["distillation_loss"][-1] == pytest.approx(3 * history["student_loss"][-1])
    assert distiller.magnitudes.steps.numpy() == 3
    distiller.evaluate(X, Y, verbose=0)
    assert distiller.magnitudes.steps.numpy() == 3


def test_eager_is_graph_is_xla():
    trained = []
    for arguments in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        keras.utils.set_random_seed(0)
        student = net()
        bank = distillation.Contrastive(width=8, bank=40)
        losses = ["logits", "features", "similarity", "rkd_angle", bank]
        distiller = Distiller(net(16), student, losses, balancing="magnitude")
        distiller.compile(keras.optimizers.SGD(0.1), entropy(), **arguments)
        distiller.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        trained.append(weights(student))
    assert_equal(trained[0], trained[1], 1e-5)
    assert_equal(trained[0], trained[2], 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_with_a_teacher_of_full(policy):
    teacher = net(16)
    keras.config.set_dtype_policy(policy)
    try:
        student = net()
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = Distiller(teacher, student, ["logits", "features"])
    history = fit(distiller, epochs=8)
    scaled = isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert history["loss"][-1] < history["loss"][0]
    assert all(head.variables[0].dtype == "float32" for head in distiller.heads)


def interrupted(directory, stop):
    """Train with a backup; stop after an epoch, or go to the end."""
    keras.utils.set_random_seed(0)
    student = net()  # Keras's BackupAndRestore leaves out the random state of a dropout.
    losses = [
        "logits",
        "features",
        distillation.Features("relu", "relu"),
        distillation.Contrastive(width=8, bank=40),
    ]
    distiller = Distiller(net(16), student, losses, balancing="magnitude")

    def raise_at(epoch, logs):
        if epoch == stop:
            raise KeyboardInterrupt

    callbacks = [
        keras.callbacks.BackupAndRestore(directory),
        tfc.callbacks.Pruning(0.5, frequency=2),
        keras.callbacks.LambdaCallback(on_epoch_begin=raise_at),
    ]
    try:
        fit(distiller, epochs=4, callbacks=callbacks)
    except KeyboardInterrupt:
        assert stop is not None
    return weights(student), weights(distiller)


def test_resumed_is_uninterrupted(tmp_path):
    whole = interrupted(tmp_path / "whole", None)
    interrupted(tmp_path / "parts", 2)
    resumed = interrupted(tmp_path / "parts", None)
    for one, two in zip(whole[0], resumed[0], strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_student_is_saved_plain(tmp_path):
    student = net()
    fit(Distiller(net(16), student, ["logits", "features"]))
    student.save(tmp_path / "student.keras")
    code = (
        "import sys, keras, numpy as np; model = keras.models.load_model(sys.argv[1]);"
        "np.save(sys.argv[2], model.predict(np.ones((1, 6)), verbose=0));"
        "assert 'tfcompress' not in sys.modules"
    )
    paths = [str(tmp_path / "student.keras"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy"), student.predict(np.ones((1, 6)), verbose=0)
    )
    assert not any("call" in vars(layer) for layer in student.layers)


@pytest.mark.parametrize("make", [net, Subclassed])
def test_the_distiller_is_saved_and_trains_on(tmp_path, make):
    teacher, student = make(16), make(8)
    teacher(X), student(X)
    losses = [distillation.Logits(schedules.Linear(4.0, 1.0, 0, 9)), "features"]
    distiller = Distiller(teacher, student, losses, [1.0, 0.5], 0.3, balancing="magnitude")
    fit(distiller)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert type(loaded) is Distiller
    assert loaded.distillation_losses == distiller.distillation_losses
    one, two = (d.evaluate(X, Y, verbose=0, return_dict=True) for d in (distiller, loaded))
    assert one == pytest.approx(two, rel=1e-6)
    for each in (distiller, loaded):
        keras.utils.set_random_seed(0)
        each.fit(X, Y, shuffle=False, verbose=0)
    if make is net:
        assert_equal(weights(distiller.student), weights(loaded.student), 1e-6)


def test_a_penalty_on_the_student_counts():
    sizes = []
    for callbacks in ([], [tfc.callbacks.L1Regularization(0.05)]):
        keras.utils.set_random_seed(0)
        student = net()
        fit(Distiller(net(16), student, "logits"), epochs=10, callbacks=callbacks)
        sizes.append(np.abs(student.get_layer("second").kernel.numpy()).sum())
    assert sizes[1] < 0.95 * sizes[0]


def test_pruned_and_quantized_while_distilled():
    teacher = net(16)
    before = weights(teacher)
    student = net()
    distiller = Distiller(teacher, student, ["logits", "features"])
    pruning = tfc.callbacks.Pruning(0.5, frequency=1)
    qat = tfc.callbacks.QuantizationAwareTraining()
    fit(distiller, epochs=4, callbacks=[pruning, qat])
    assert sorted(path.split("/")[-2] for path in pruning.applied) == ["first", "head", "second"]
    assert set(pruning.applied) == set(qat.applied)
    kernel = student.get_layer("second").kernel.numpy()
    assert (kernel == 0).sum() == 32
    assert all(high > low for low, high in qat.ranges.values())
    assert len(qat.ranges) >= 3
    assert_equal(before, weights(teacher))
    assert not any("call" in vars(layer) for layer in student.layers)


def test_the_features_are_those_of_the_rounded_student():
    teacher, student = net(8), net(8)
    student.set_weights(teacher.get_weights())
    loss = distillation.Features("first", "first")
    distiller = Distiller(teacher, student, loss, student_loss_weight=0.0)
    plain = fit(distiller, epochs=1, batch_size=48, optimizer=keras.optimizers.SGD(0.0))
    assert plain["loss"][0] == 0
    qat = tfc.callbacks.QuantizationAwareTraining(weights="int2")
    rounded = fit(
        distiller, epochs=1, batch_size=48, optimizer=keras.optimizers.SGD(0.0), callbacks=[qat]
    )
    assert rounded["loss"][0] > 1e-3


@pytest.mark.slow
def test_self_distillation_recovers_what_pruning_lost():
    dense = net(32)
    dense.compile("adam", entropy())
    dense.fit(X, Y, epochs=20, verbose=0)
    student = copy(dense)
    distiller = Distiller(dense, student, "logits", student_loss_weight=0.0)
    pruning = tfc.callbacks.Pruning(0.8, frequency=1)
    history = fit(distiller, y=None, epochs=15, callbacks=[pruning])
    assert history["loss"][-1] < history["loss"][0]
    with pytest.raises(ValueError, match="share 8 trained weights.*clone_model"):
        Distiller(dense, dense, "logits")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distiller(net(), "student", "logits"), "must be keras.Models"),
        (lambda: Distiller(keras.Sequential(), net(), "logits"), "no weights yet"),
        (lambda: Distiller(net(), net(), "logits", student_loss_weight=2), r"\[0, 1\]"),
        (lambda: Distiller(net(), net(), ["logits", "mse"], [1.0]), "1 entries, expected 2"),
        (lambda: Distiller(net(), net(), "logits", balancing="auto"), "magnitude"),
        (
            lambda: Distiller(net(), net(), distillation.Features("nothing*", "first")),
            "matches no point of 'net'.*first, norm, relu",
        ),
        (lambda: Distiller(net(), net(), "attention"), "no attention layer"),
        (lambda: Distiller(net(), net(), "masked_features"), "Name a layer"),
        (
            lambda: Distiller(
                keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)]), net(), "logits"
            ),
            "same outputs",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_replicas_are_one():
    """In a process of its own: strategies do not share one well."""
    result = run_module("tests.distillation.two_replicas")
    assert result.returncode == 0, result.stdout + result.stderr
