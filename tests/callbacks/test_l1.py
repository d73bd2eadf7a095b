import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.models import classification, compile_classifier, kernels, mlp, unbuilt_mlp


def fit(model, callbacks=(), **kwargs):
    x, y = classification()
    history = model.fit(
        x, y, batch_size=24, verbose=0, shuffle=False, callbacks=list(callbacks), **kwargs
    )
    return history.history


def copy_of(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def test_it_equals_a_kernel_regularizer():
    ours = mlp()
    theirs = copy_of(ours)
    for layer in theirs.layers:
        layer.kernel.regularizer = keras.regularizers.L1(0.01)
    expected = fit(compile_classifier(theirs), epochs=3)
    history = fit(compile_classifier(ours), [tfc.callbacks.L1Regularization(0.01)], epochs=3)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)
    for path, weight in kernels(ours).items():
        np.testing.assert_allclose(weight, kernels(theirs)[path], atol=1e-7)


def test_it_comes_on_top_of_a_regularizer_and_gives_it_back():
    model = mlp()
    previous = keras.regularizers.L2(0.1)
    model.layers[0].kernel.regularizer = previous
    compile_classifier(model)
    without = fit(model, epochs=1)["loss"]
    model = copy_of(model)
    assert without
    kernel = model.layers[0].kernel
    kernel.regularizer = previous
    compile_classifier(model)
    fit(model, [tfc.callbacks.L1Regularization(0.01)])
    assert kernel.regularizer is previous


def test_it_works_on_a_model_that_is_not_built():
    model = compile_classifier(unbuilt_mlp())
    with_l1 = fit(model, [tfc.callbacks.L1Regularization(10.0)])["loss"]
    keras.utils.set_random_seed(0)
    without = fit(compile_classifier(unbuilt_mlp()))["loss"]
    assert with_l1[0] > without[0] + 1
    assert all(layer.kernel.regularizer is None for layer in model.layers)


def test_a_proximal_step_is_soft_thresholding_after_the_update():
    model = mlp()
    plain = copy_of(model)
    optimizer = keras.optimizers.SGD(0.5)
    fit(compile_classifier(plain, keras.optimizers.SGD(0.5)), steps_per_epoch=1)
    l1 = tfc.callbacks.L1Regularization(0.1, proximal=True)
    fit(compile_classifier(model, optimizer), [l1], steps_per_epoch=1)
    for path, weight in kernels(model).items():
        updated = kernels(plain)[path]
        expected = np.sign(updated) * np.maximum(np.abs(updated) - 0.05, 0)
        np.testing.assert_allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_proximal_steps_reach_exact_zeros(jit_compile):
    model = compile_classifier(mlp(), jit_compile=jit_compile)
    fit(model, [tfc.callbacks.L1Regularization(0.3, proximal=True)], epochs=10)
    assert np.mean(kernels(model)["mlp/hidden/kernel"] == 0) > 0.1


def test_a_proximal_step_is_taken_once_an_update():
    def trained(**kwargs):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.SGD(0.1, **kwargs)
        model = compile_classifier(mlp(), optimizer)
        x, y = np.zeros((4, 12), "float32"), np.zeros(4)
        l1 = tfc.callbacks.L1Regularization(0.05, proximal=True)
        model.fit(x, y, batch_size=1, verbose=0, callbacks=[l1])
        return kernels(model)["mlp/hidden/kernel"]

    four, two = trained(), trained(gradient_accumulation_steps=2)
    start = kernels(mlp_with_seed())["mlp/hidden/kernel"]
    np.testing.assert_allclose(
        np.abs(start) - np.abs(two), np.minimum(np.abs(start), 0.01), atol=1e-6
    )
    np.testing.assert_allclose(
        np.abs(start) - np.abs(four), np.minimum(np.abs(start), 0.02), atol=1e-6
    )


def mlp_with_seed():
    keras.utils.set_random_seed(0)
    return mlp()


def test_a_distiller_leaves_regularizers_out_so_it_is_refused():
    distiller = keras.distillation.Distiller(mlp(), mlp(), keras.distillation.LogitsDistillation())
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"Use L1Regularization\(..., proximal=True\)"):
        fit(distiller, [tfc.callbacks.L1Regularization(0.1)])
    fit(distiller, [tfc.callbacks.L1Regularization(0.1, proximal=True)])


@pytest.mark.parametrize("strength", [0, -1, float("nan")])
def test_a_strength_that_is_not_positive_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be above 0"):
        tfc.callbacks.L1Regularization(strength)
