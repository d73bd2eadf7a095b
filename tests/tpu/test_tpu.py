"""Everything that runs inside a training step compiles for a TPU v5e: no host call, fixed shapes.

What compiles is what TensorFlow gives to XLA. That it runs on a TPU is not shown here.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("libtpu", reason="pip install jax libtpu")
pytest.importorskip("jax")

import tfcompress as tfc  # noqa: E402
from tests.models import classification, compile_classifier, mlp  # noqa: E402
from tests.tpu.compiler import compile_for_tpu  # noqa: E402
from tfcompress.ops import (  # noqa: E402
    clusters,
    criteria,
    fake_quant,
    histogram,
    masks,
    penalties,
    ranges,
    regrowth,
    schemes,
    selection,
    structures,
)

W = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
MASK = W > 0
INT8 = schemes.weight_scheme("int8")
UINT8 = schemes.activation_scheme("int8")
BOUNDS = np.array([-1.0, 2.0], "float32")


def chosen(structure="unstructured", allocation="uniform", criterion="magnitude"):
    return lambda *weights: masks.choose_masks(weights, 0.5, criterion, structure, allocation)


def regrown(w, mask):
    return regrowth.regrow([mask], [tf.abs(w)], [w * w], 0.3)


def learned(w):
    with tf.GradientTape() as tape:
        scale = fake_quant.learned_scale(w, INT8, (0,))
        tape.watch(scale)
        y = fake_quant.learned_fake_quant(w, scale, 0.0, schemes.integer_limits(8, True))
    return tape.gradient(y, scale)


OPS = {
    "top k": (lambda w: selection.top_k_mask(w, 20, absolute=True), W),
    "unstructured, global": (chosen(allocation="global"), W, W.T),
    "unstructured, erk": (chosen(allocation="erk"), W, W.T),
    "unstructured, lamp": (chosen(allocation="lamp"), W, W.T),
    "2:4": (chosen("2:4"), W),
    "block": (chosen(structures.Block(2, 4)), W),
    "channel": (chosen("channel"), W),
    "random": (chosen(criterion="random"), W),
    "criteria": (lambda w, s: [criteria.get(n)(w, s) for n in ("gradient", "movement")], W, W),
    "apply": (lambda w, m: masks.apply_mask(w, m), W, MASK),
    "straight through": (lambda w, m: masks.apply_mask_straight_through(w, m), W, MASK),
    "threshold": (lambda w: masks.threshold_mask(w, 0.1), W),
    "regrow": (regrown, W, MASK),
    "l1": (lambda w: penalties.soft_threshold(w, 0.1) + penalties.l1(w, 0.1), W),
    "group lasso": (
        lambda w: (
            penalties.group_soft_threshold(w, 0.1, structures.Channel()),
            penalties.group_lasso(w, 0.1, structures.Channel()),
        ),
        W,
    ),
    "quantized weights": (lambda w: fake_quant.fake_quant_weights(w, INT8, (0,)), W),
    "quantized activations": (
        lambda x, b: fake_quant.fake_quant_activations(x, b, UINT8),
        W,
        BOUNDS,
    ),
    "dynamic range": (lambda x: fake_quant.fake_quant_dynamic(x, UINT8), W),
    "learned scale": (learned, W),
    "moving range": (lambda b, x: ranges.moving_range(b, ranges.extremes(x)), BOUNDS, W),
    "percentiles": (lambda x: ranges.percentiles(x, 99.0), W),
    "nearest of k values": (
        lambda w, c: clusters.nearest(w, c, False, (0, 1)),
        W,
        np.linspace(-1, 1, 4, dtype="float32"),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_compiles(name):
    function, *arguments = OPS[name]
    assert compile_for_tpu(function, *arguments).hlo_modules()


def test_the_histogram_of_calibration_does_not_compile():
    """It is no part of a training step; `tf.math.bincount` has no fixed shape for XLA."""
    with pytest.raises(ValueError, match="bincount"):
        compile_for_tpu(lambda x: tuple(histogram.updated(histogram.empty(), x)), W)


@contextlib.contextmanager
def attached(callbacks, model):
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback.attached(model))
        yield


CALLBACKS = {
    "pruning": lambda: [tfc.callbacks.Pruning(0.5, frequency=1)],
    "2:4 and regrowth": lambda: [tfc.callbacks.Pruning(structure="2:4", frequency=2)],
    "movement": lambda: [tfc.callbacks.Pruning(0.5, criterion="movement", frequency=1)],
    "threshold": lambda: [tfc.callbacks.ThresholdPruning(0.1)],
    "quantization": lambda: [tfc.callbacks.QuantizationAwareTraining()],
    "l1": lambda: [tfc.callbacks.L1Regularization(proximal=True)],
}


def compiled_step(model, x, y, callbacks=()):
    """The train step of Keras as it runs, with what the callbacks put into it."""
    with attached(callbacks, model):
        model.train_on_batch(x, y)  # Makes the variables of the optimizer, metrics and masks.
        return compile_for_tpu(model.train_step, (x, y))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_training_step_compiles(name):
    x, y = classification(num_examples=8)
    model = compile_classifier(mlp(), keras.optimizers.AdamW(1e-3))
    executable = compiled_step(model, x, y, CALLBACKS[name]())
    assert executable.hlo_modules()


def test_pruning_quantization_and_distillation_compile_together():
    x, y = classification(num_examples=8)
    distiller = tfc.distillation.Distiller(mlp(), mlp(), distillation_losses=["logits"])
    distiller.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callbacks = [
        tfc.callbacks.Pruning(0.5, frequency=1),
        tfc.callbacks.QuantizationAwareTraining(),
    ]
    assert compiled_step(distiller, x, y, callbacks)


def test_what_calls_the_host_does_not_compile():
    with pytest.raises((RuntimeError, ValueError, tf.errors.OpError)):
        compile_for_tpu(lambda w: tf.py_function(lambda x: x, [w], "float32"), W)
