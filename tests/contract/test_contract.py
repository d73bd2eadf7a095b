"""What holds for every technique in the table."""

import signal

import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.contract.techniques import (
    BAKED,
    CALLBACKS,
    PRUNING,
    REMEMBERING,
    STATEFUL,
    TECHNIQUES,
    WRAPPERS,
)
from tests.models import classification, compile_classifier, kernels, mlp, nested, subclassed
from tests.processes import run_module, run_workers


def train(model, callbacks=(), epochs=3, initial_epoch=0):
    x, y = classification()
    return model.fit(
        x,
        y,
        batch_size=24,
        epochs=epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    ).history


def wrapped(technique):
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
    return keras.Sequential(
        [keras.Input((12,)), *(technique.wrapper(layer) for layer in layers)], name="wrapped"
    )


def outputs(model):
    return model.predict(classification()[0], verbose=0)


def assert_close(first, second, tolerance):
    for ours, theirs in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CALLBACKS)
def test_eager_is_graph_is_xla(name):
    trained = []
    for how in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        keras.utils.set_random_seed(0)
        model = compile_classifier(mlp(), keras.optimizers.SGD(0.1), **how)
        callback = TECHNIQUES[name].callback()
        train(model, [callback])
        trained.append((model, callback))
    (eager, in_eager), *others = trained
    for model, callback in others:
        assert_close(eager, model, 1e-5)
        for path, mask in getattr(in_eager, "masks", {}).items():
            np.testing.assert_array_equal(mask.numpy(), callback.masks[path].numpy())


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_saved_wrapped_model_goes_on_as_if_it_had_not_been_saved(name, tmp_path):
    model = compile_classifier(wrapped(TECHNIQUES[name]), "adam")
    train(model, epochs=1)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    train(model, epochs=2)
    train(loaded, epochs=2)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("name", BAKED)
def test_strip_is_wrapped(name):
    model = compile_classifier(wrapped(TECHNIQUES[name]))
    train(model)
    plain = tfc.strip(model)
    assert not any(isinstance(each, tfc.layers.CompressionWrapper) for each in plain.layers)
    np.testing.assert_allclose(outputs(plain), outputs(model), atol=1e-6)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_run_is_an_uninterrupted_one(name, tmp_path):
    start = mlp().get_weights()

    def fresh():
        model = mlp()
        model.set_weights(start)
        return compile_classifier(model, "adam"), TECHNIQUES[name].callback()

    whole, callback = fresh()
    train(whole, [callback], epochs=4)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    broken, callback = fresh()
    with pytest.raises(InterruptedError):
        train(broken, [backup, callback, Interrupt()], epochs=4)
    resumed, callback = fresh()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    history = train(resumed, [backup, callback], epochs=4)
    assert len(history["loss"]) == 2
    for ours, theirs in zip(resumed.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def run_killed(*arguments):
    return run_module("tests.contract.killed", *arguments)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(name, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert run_killed(name, whole).returncode == 0
    for epoch in (1, 2):
        assert run_killed(name, broken, epoch).returncode == -signal.SIGKILL
    last = run_killed(name, broken)
    assert last.returncode == 0, last.stderr
    expected, found = (np.load(each / "result.npz") for each in (whole, broken))
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_mixed_precision_trains_near_float32(name, policy):
    start = mlp().get_weights()

    def trained(policy):
        keras.config.set_dtype_policy(policy)
        try:
            model = mlp()
        finally:
            keras.config.set_dtype_policy("float32")
        model.set_weights(start)
        train(compile_classifier(model, keras.optimizers.SGD(0.05)), [TECHNIQUES[name].callback()])
        return model

    pairs = zip(trained(policy).get_weights(), trained("float32").get_weights(), strict=True)
    near = np.concatenate([np.abs(ours - theirs).ravel() < 0.06 for ours, theirs in pairs])
    # Where gradients choose the mask, a close call may turn out the other way.
    assert near.mean() >= (0.85 if name in STATEFUL else 1.0)


@pytest.mark.parametrize("make", [nested, subclassed])
@pytest.mark.parametrize("name", CALLBACKS)
def test_nested_subclassed_and_shared_layers(name, make):
    model = compile_classifier(make(), "adam")
    callback = TECHNIQUES[name].callback()
    losses = train(model, [callback], epochs=8)["loss"]
    assert losses[-1] < max(losses)  # Pruning raises it first.
    left = [path for path in kernels(model) if path not in callback.applied]
    assert [path for path in left if "head" not in path] == []
    assert bool(left) == TECHNIQUES[name].leaves_head
    if TECHNIQUES[name].prunes:
        for weight in kernels(model).values():
            assert (weight == 0).sum() == TECHNIQUES[name].prunes(weight.size)


@pytest.mark.parametrize("name", PRUNING)
def test_techniques_compose_without_knowing_each_other(name):
    teacher = mlp()
    student = mlp()
    distiller = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation()
    )
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callbacks = [
        TECHNIQUES[name].callback(),
        tfc.callbacks.QuantizationAwareTraining(),
        tfc.callbacks.L1Regularization(1e-4, proximal=True),
    ]
    train(distiller, callbacks, epochs=4)
    for weight in kernels(student).values():
        assert (weight == 0).sum() >= TECHNIQUES[name].prunes(weight.size)


def assert_ok(result, names):
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.endswith(": ok")]
    assert [line.removesuffix(": ok") for line in lines] == names


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_are_one(number):
    """In a process of its own: strategies do not share one well."""
    assert_ok(run_module("tests.contract.replicas", number), CALLBACKS)


@pytest.mark.slow
def test_two_workers_are_one():
    """A sample of it is in tests/parallel/workers.py, among what needs workers anyway."""
    for each in run_workers(2, "tests.contract.replicas", 2):
        assert_ok(each, CALLBACKS)
