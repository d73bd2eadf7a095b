"""Fake quantization as numbers: grids, rounding, gradients."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfcompress.ops import fake_quant as fq

BITS = st.integers(2, 8)
FLOATS = st.floats(-100, 100, width=32)
MATRICES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=FLOATS
)
ASYMMETRIC = fq.activation_scheme("int8")


def test_a_symmetric_grid_has_its_largest_weight_at_its_end():
    w = tf.constant([[0.5, 4.0], [-2.0, 0.0], [0.99, -1.0]])
    rounded = fq.fake_quant_weights(w, fq.Scheme(bits=3), axis=0)  # -3..3, scales 2/3 and 4/3
    np.testing.assert_allclose(rounded, [[2 / 3, 4], [-2, 0], [2 / 3, -4 / 3]], rtol=1e-6)


def test_one_scale_a_tensor_ignores_the_axis():
    w = tf.constant([[0.5, 4.0]])
    rounded = fq.fake_quant_weights(w, fq.Scheme(bits=3, granularity="tensor"), axis=0)
    np.testing.assert_allclose(rounded, [[0, 4]], rtol=1e-6)


def test_an_asymmetric_grid_moves_so_that_zero_is_on_it():
    scale, zero_point = fq.asymmetric_scale(-0.3, 1.0, bits=2)  # 4 values, 1.3 / 3 apart
    np.testing.assert_allclose([scale, zero_point], [1.3 / 3, -1])
    rounded = fq.fake_quant_activations(
        tf.constant([-9.0, 0.0, 0.5, 9.0]), [-0.3, 1.0], fq.Scheme(2, False, "tensor")
    )
    np.testing.assert_allclose(rounded, np.array([-1, 0, 1, 2]) * 1.3 / 3, rtol=1e-6)


def test_quantize_gives_the_stored_integers():
    q = fq.quantize(tf.constant([-1.0, 0.0, 1.0, 9.0]), 0.01, zero_point=-28.0)
    assert q.dtype == tf.int8
    np.testing.assert_array_equal(q, [-128, -28, 72, 127])
    np.testing.assert_allclose(fq.dequantize(q, 0.01, -28.0), [-1, 0, 1, 1.55], rtol=1e-6)


def test_the_gradient_passes_inside_the_range_and_stops_outside():
    x = tf.constant([-1.1, -0.4, 0.0, 1.0, 1.1])  # The grid ends at -1 and 1.
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fq.fake_quant(x, 1.0 / 127, narrow=True)
    np.testing.assert_array_equal(tape.gradient(y, x, tf.constant([2.0] * 5)), [0, 2, 2, 2, 0])


def test_the_largest_weight_of_every_channel_gets_its_gradient():
    w = tf.random.normal((50, 400), dtype=tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(w)
        y = fq.fake_quant_weights(w, fq.Scheme(), axis=0)
    np.testing.assert_array_equal(tape.gradient(y, w), np.ones_like(w))


def test_weights_of_zeros_stay_zeros_and_finite():
    for w in (np.zeros((3, 2)), np.full((3, 2), 1e-45)):
        rounded = fq.fake_quant_weights(tf.constant(w, tf.float32), fq.Scheme(), axis=0)
        np.testing.assert_allclose(rounded, w, atol=1e-44)


def test_nan_weights_stay_visible():
    rounded = fq.fake_quant_weights(tf.constant([[np.nan], [1.0]]), fq.Scheme(), axis=0)
    assert np.isnan(rounded.numpy()).all()


@given(MATRICES, BITS)
@settings(deadline=None, max_examples=40)
def test_weights_round_once_by_half_a_step_and_keep_zeros(w, bits):
    scheme = fq.Scheme(bits=bits)
    once = fq.fake_quant_weights(w, scheme, axis=0).numpy()
    scale = fq.symmetric_scale(w, bits, axis=0).numpy()
    np.testing.assert_allclose(fq.fake_quant_weights(once, scheme, axis=0), once, rtol=1e-5)
    assert np.all(np.abs(once - w) <= scale * 0.5001)
    assert np.all(once[w == 0] == 0)


@given(st.floats(-50, 0, width=32), st.floats(0.125, 50, width=32))
@settings(deadline=None, max_examples=40)
def test_activations_equal_tensorflows_own_kernel(low, high):
    x = np.linspace(low - 1, high + 1, 301, dtype=np.float32)
    ours = fq.fake_quant_activations(x, [low, high], ASYMMETRIC).numpy()
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, low, high).numpy()
    step = (high - low) / 255
    differs = np.abs(ours - theirs) > step * 1e-3
    # Half a step exactly rounds up there, and to even here.
    assert np.mean(differs) < 0.02
    assert np.abs(ours - theirs).max() <= step * 1.001


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_computed_in_float32(dtype):
    w = tf.cast(tf.linspace(-1.0, 1.0, 64)[:, None], dtype)
    rounded = fq.fake_quant_weights(w, fq.Scheme(), axis=0)
    assert rounded.dtype == w.dtype
    exact = fq.fake_quant_weights(tf.cast(w, tf.float32), fq.Scheme(), axis=0)
    np.testing.assert_array_equal(rounded, tf.cast(exact, dtype))


@pytest.mark.parametrize("jit", [False, True])
def test_graph_and_xla_equal_eager(jit):
    x = tf.random.normal((4, 3, 5))

    def both(x):
        w = fq.fake_quant_weights(x, fq.Scheme(), axis=(0, 1))
        bounds = fq.moving_range([0.0, 0.0], x)
        a = fq.fake_quant_activations(x, bounds, ASYMMETRIC)
        return w, a, tf.gradients(a, x)[0] if not tf.executing_eagerly() else None

    compiled = tf.function(both, jit_compile=jit)(x)
    for ours, eager in zip(compiled[:2], both(x)[:2], strict=True):
        np.testing.assert_allclose(ours, eager, atol=1e-6)
    np.testing.assert_array_equal(compiled[2], np.ones_like(x))


def test_a_range_starts_at_the_first_batch_and_then_moves():
    bounds = fq.moving_range([0.0, 0.0], tf.constant([-2.0, 4.0]))
    np.testing.assert_array_equal(bounds, [-2, 4])
    bounds = fq.moving_range(bounds, tf.constant([1.0, 104.0]))
    np.testing.assert_allclose(bounds, [-1.98, 5.0], rtol=1e-6)


def test_a_calibrated_range_holds_everything():
    bounds = fq.widened_range([-1.0, 2.0], tf.constant([-3.0, 1.0]))
    np.testing.assert_array_equal(bounds, [-3, 2])


def test_averages_round_halves_away_from_the_stored_zero():
    # Over [0, 2.55] the stored integers are value / 0.01 - 128.
    x = np.array([0.025, 1.275, 1.285, 2.545, 0.0251], np.float32)
    rounded = fq.fake_quant_averages(x, [0.0, 2.55], ASYMMETRIC)
    np.testing.assert_allclose(rounded, [0.02, 1.27, 1.29, 2.55, 0.03], rtol=1e-5)


def test_shorthands():
    assert fq.weight_scheme("int4") == fq.Scheme(4, True, "channel")
    assert fq.activation_scheme("int8") == fq.Scheme(8, False, "tensor")
    assert fq.weight_scheme(None) is None
    assert fq.weight_scheme(fq.Scheme(6).get_config()) == fq.Scheme(6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fq.Scheme(bits=9), "bits=9; pass an integer from 2 to 8"),
        (lambda: fq.Scheme(granularity="row"), "granularity='row'; pass one of"),
        (lambda: fq.weight_scheme("int9"), "weights='int9' is not a .*pass \"int8\""),
        (lambda: fq.weight_scheme(8), "weights=8 is not a quantization scheme"),
        (lambda: fq.weight_scheme(fq.Scheme(8, False)), "move pruned zeros"),
        (lambda: fq.activation_scheme(fq.Scheme()), "must be asymmetric"),
    ],
)
def test_bad_schemes_say_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()
