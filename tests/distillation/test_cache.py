"""The cache of what a teacher says."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.distillation.networks import copy, data, entropy, net
from tfcompress import distillation
from tfcompress.distillation import Distiller, TeacherCache
from tfcompress.keras_hooks.hook import add_hook

X, Y = data()


def build(teacher, x=X, losses="logits", **arguments):
    return TeacherCache.build(teacher, x, losses, batch_size=20, verbose=0, **arguments)


def trained(teacher, given, losses, student=None, **arguments):
    keras.utils.set_random_seed(1)
    student = student or net()
    distiller = Distiller(teacher, student, losses)
    distiller.compile(keras.optimizers.SGD(0.1), entropy(), **arguments)
    history = distiller.fit(*given, epochs=3, shuffle=False, verbose=0, batch_size=None)
    return [np.asarray(w) for w in student.get_weights()], history.history


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_training_on_it_is_training_on_the_teacher(tmp_path, disk, jit_compile):
    teacher = net(16, dropout=0.2)
    losses = ["logits", "features", distillation.Features("relu", "relu")]
    path = tmp_path / "cache" if disk else None
    cache = build(teacher, losses=losses, dtype="float32", path=path)
    weights = np.linspace(0, 2, 48).astype("float32")
    plain = tf.data.Dataset.from_tensor_slices((X, Y, weights)).batch(16)
    one = trained(teacher, (plain,), losses, jit_compile=jit_compile)
    add_hook(teacher, "call", lambda proceed, *args, **kwargs: pytest.fail("it was asked"))
    stored = cache.dataset(X, Y, weights, batch_size=16, shuffle=False)
    two = trained(cache, (stored,), losses, jit_compile=jit_compile)
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(one[1]["loss"], two[1]["loss"], rtol=1e-4)


def test_each_example_keeps_what_was_said_about_it():
    teacher = net(16)
    cache = build(teacher)
    said = teacher.predict(X, verbose=0)
    rows = {tuple(x): t for x, t in zip(X, said, strict=True)}
    dataset = cache.dataset(X, Y, batch_size=None, seed=0).shuffle(48, seed=1).batch(7)
    for _ in range(2):
        order = []
        for x, y in dataset:
            inputs, targets = distillation.cache.unpack(x)
            restored = cache.restore(targets)[0]["output:0"].numpy()
            for row, label, values in zip(inputs.numpy(), y.numpy(), restored, strict=True):
                np.testing.assert_allclose(values, rows[tuple(row)], atol=2e-3)
                order.append(int(np.flatnonzero((row == X).all(1))[0]))
                assert label == Y[order[-1]]
        assert sorted(order) == list(range(48)) and order != sorted(order)


def test_the_largest_logits_keep_their_probabilities():
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(50, name="head")])
    teacher.layers[0].kernel.assign(3 * np.random.default_rng(0).normal(size=(6, 50)))
    cache = build(teacher, top_k=5, dtype="float32")
    logits = teacher.predict(X, verbose=0)
    targets = {name: tf.constant(array) for name, array in cache._arrays.items()}
    restored = cache.restore(targets)[0]["output:0"].numpy()
    order = np.argsort(-logits, axis=1)
    probabilities = [tf.nn.softmax(x).numpy() for x in (logits, restored)]
    for i in range(48):
        best, others = order[i, :5], order[i, 5:]
        np.testing.assert_allclose(probabilities[1][i, best], probabilities[0][i, best], rtol=1e-4)
        rest = probabilities[0][i, others].sum() / 45
        np.testing.assert_allclose(probabilities[1][i, others], rest, rtol=1e-3)
    half = build(teacher, top_k=5)
    assert half.bytes == 48 * (5 * 2 + 5 * 2 + 2)
    with pytest.raises(ValueError, match="top_k must be in"):
        build(teacher, top_k=50)


def test_probabilities_are_stored_as_logits():
    teacher = net(16, activation="softmax")
    cache = build(teacher, dtype="float32")
    targets = {name: tf.constant(array) for name, array in cache._arrays.items()}
    restored = cache.restore(targets)[0]["output:0"]
    np.testing.assert_allclose(tf.nn.softmax(restored), teacher.predict(X, verbose=0), atol=1e-6)


def test_a_stale_cache_is_refused(tmp_path):
    teacher = net(16)
    build(teacher, path=tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache", copy(teacher), X)
    for other in (X[::-1], X[:-1], X + 1e-6):
        with pytest.raises(ValueError, match="stale.*examples"):
            cache.dataset(other, Y[: len(other)])
        with pytest.raises(ValueError, match="stale"):
            TeacherCache.open(tmp_path / "cache", x=other)
    changed = copy(teacher)
    changed.get_layer("head").bias.assign_add([1e-6, 0, 0])
    with pytest.raises(ValueError, match="other weights"):
        TeacherCache.open(tmp_path / "cache", changed)
    twin = copy(teacher)
    twin.get_layer("second").activation = keras.activations.tanh
    with pytest.raises(ValueError, match="gives other values"):
        TeacherCache.open(tmp_path / "cache", twin, X)
    TeacherCache.open(tmp_path / "cache", twin)


def test_what_is_interrupted_leaves_nothing(tmp_path):
    teacher = net(16)

    def fail(proceed, x, **kwargs):
        if x.shape[0] == 8:  # The last batch, traced anew.
            raise KeyboardInterrupt
        return proceed(x, **kwargs)

    remove = add_hook(teacher, "call", fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        TeacherCache.build(teacher, X, path=tmp_path / "cache", batch_size=8, verbose=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"TeacherCache\.build"):
        TeacherCache.open(tmp_path / "cache")
    remove()
    build(teacher, path=tmp_path / "cache")
    with pytest.raises(ValueError, match="exists"):
        build(teacher, path=tmp_path / "cache")


@pytest.mark.slow
def test_it_outlives_its_process(tmp_path):
    teacher = net(16)
    teacher.save(tmp_path / "teacher.keras")
    np.save(tmp_path / "x.npy", X)
    build(teacher, path=tmp_path / "cache")
    code = (
        "import sys, keras, numpy as np; from tfcompress.distillation import TeacherCache;"
        "d = sys.argv[1]; keras.layers.Dense(1);"
        "teacher = keras.models.load_model(d + '/teacher.keras');"
        "print(TeacherCache.open(d + '/cache', teacher, np.load(d + '/x.npy')).size)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert result.stdout.strip() == "48", result.stderr
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["size"] == 48 and set(manifest["files"]) == {"0/output:0"}


def test_what_does_not_fit_is_refused():
    teacher = net(16)
    cache = build(teacher)
    with pytest.raises(ValueError, match=r"lacks the points \['head:input'\]"):
        Distiller(cache, net(), ["logits", "features"])
    distiller = Distiller(cache, net(), "logits")
    distiller.compile("adam", entropy())
    with pytest.raises(ValueError, match=r"fit\(cache.dataset"):
        distiller.fit(X, Y, verbose=0)
    asking = Distiller(teacher, net(), "logits")
    asking.compile("adam", entropy())
    with pytest.raises(ValueError, match=r"Distiller\(cache"):
        asking.fit(cache.dataset(X, Y), verbose=0)
    with pytest.raises(ValueError, match="in memory"):
        distiller.get_config()
    with pytest.raises(ValueError, match="needs arrays"):
        build(teacher, 3)
    with pytest.raises(ValueError, match="47 labels"):
        cache.dataset(X, Y[1:])


def test_validation_needs_no_teacher():
    cache = build(net(16))
    student = net()
    distiller = Distiller(cache, student, "logits")
    distiller.compile("adam", entropy(), metrics=["accuracy"])
    history = distiller.fit(cache.dataset(X, Y), validation_data=(X, Y), verbose=0).history
    right = student.predict(X, verbose=0).argmax(1) == Y
    assert history["val_accuracy"][0] == pytest.approx(right.mean(), abs=1e-6)
    assert history["val_distillation_loss"] == [0.0]
    np.testing.assert_array_equal(distiller.predict(X, verbose=0), student.predict(X, verbose=0))


def test_without_labels_and_with_several_inputs():
    one, two = keras.Input((4,), name="one"), keras.Input((2,), name="two")
    hidden = keras.layers.Dense(8, activation="relu")(keras.ops.concatenate([one, two], -1))
    teacher = keras.Model({"one": one, "two": two}, keras.layers.Dense(3)(hidden))
    x = {"one": X[:, :4], "two": X[:, 4:]}
    cache = build(teacher, x)
    distiller = Distiller(cache, copy(teacher), "logits", student_loss_weight=0.0)
    distiller.compile("adam")
    history = distiller.fit(cache.dataset(x), verbose=0).history
    assert 0 <= history["loss"][0] < 1e-4
