"""Fake quantization as numbers: grids, rounding, gradients."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfcompress.ops import fake_quant as fq
from tfcompress.ops import ranges
from tfcompress.ops.schemes import Scheme

BITS = st.integers(2, 8)
FLOATS = st.floats(-100, 100, width=32)
MATRICES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=FLOATS
)
ASYMMETRIC = Scheme(symmetric=False, granularity="tensor")


def test_a_symmetric_grid_has_its_largest_weight_at_its_end():
    w = tf.constant([[0.5, 4.0], [-2.0, 0.0], [0.99, -1.0]])
    rounded = fq.fake_quant_weights(w, Scheme(bits=3), axes=0)  # -3..3, scales 2/3 and 4/3
    np.testing.assert_allclose(rounded, [[2 / 3, 4], [-2, 0], [2 / 3, -4 / 3]], rtol=1e-6)


def test_one_scale_a_tensor_ignores_the_axis():
    w = tf.constant([[0.5, 4.0]])
    rounded = fq.fake_quant_weights(w, Scheme(bits=3, granularity="tensor"), axes=0)
    np.testing.assert_allclose(rounded, [[0, 4]], rtol=1e-6)


def test_an_asymmetric_grid_moves_so_that_zero_is_on_it():
    scale, zero_point = fq.asymmetric_scale(-0.3, 1.0, bits=2)  # 4 values, 1.3 / 3 apart
    np.testing.assert_allclose([scale, zero_point], [1.3 / 3, -1])
    rounded = fq.fake_quant_activations(
        tf.constant([-9.0, 0.0, 0.5, 9.0]), [-0.3, 1.0], Scheme(2, False, "tensor")
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
        y = fq.fake_quant_weights(w, Scheme(), axes=0)
    np.testing.assert_array_equal(tape.gradient(y, w), np.ones_like(w))


def test_weights_of_zeros_stay_zeros_and_finite():
    for w in (np.zeros((3, 2)), np.full((3, 2), 1e-45)):
        rounded = fq.fake_quant_weights(tf.constant(w, tf.float32), Scheme(), axes=0)
        np.testing.assert_allclose(rounded, w, atol=1e-44)


def test_nan_weights_stay_visible():
    rounded = fq.fake_quant_weights(tf.constant([[np.nan], [1.0]]), Scheme(), axes=0)
    assert np.isnan(rounded.numpy()).all()


@given(MATRICES, BITS)
@settings(deadline=None, max_examples=40)
def test_weights_round_once_by_half_a_step_and_keep_zeros(w, bits):
    scheme = Scheme(bits=bits)
    once = fq.fake_quant_weights(w, scheme, axes=0).numpy()
    scale = fq.symmetric_scale(w, bits, axis=0).numpy()
    np.testing.assert_allclose(fq.fake_quant_weights(once, scheme, axes=0), once, rtol=1e-5)
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
    rounded = fq.fake_quant_weights(w, Scheme(), axes=0)
    assert rounded.dtype == w.dtype
    exact = fq.fake_quant_weights(tf.cast(w, tf.float32), Scheme(), axes=0)
    np.testing.assert_array_equal(rounded, tf.cast(exact, dtype))


@pytest.mark.parametrize("jit", [False, True])
def test_graph_and_xla_equal_eager(jit):
    x = tf.random.normal((4, 3, 5))

    def both(x):
        w = fq.fake_quant_weights(x, Scheme(), axes=(0, 1))
        bounds = ranges.moving_range([0.0, 0.0], ranges.extremes(x))
        a = fq.fake_quant_activations(x, bounds, ASYMMETRIC)
        return w, a, tf.gradients(a, x)[0] if not tf.executing_eagerly() else None

    compiled = tf.function(both, jit_compile=jit)(x)
    for ours, eager in zip(compiled[:2], both(x)[:2], strict=True):
        np.testing.assert_allclose(ours, eager, atol=1e-6)
    np.testing.assert_array_equal(compiled[2], np.ones_like(x))


def test_averages_round_halves_away_from_the_stored_zero():
    # Over [0, 2.55] the stored integers are value / 0.01 - 128.
    x = np.array([0.025, 1.275, 1.285, 2.545, 0.0251], np.float32)
    rounded = fq.fake_quant_averages(x, [0.0, 2.55], ASYMMETRIC)
    np.testing.assert_allclose(rounded, [0.02, 1.27, 1.29, 2.55, 0.03], rtol=1e-5)


W = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


def test_a_group_has_the_scale_of_its_largest_weight():
    scheme = Scheme(4, granularity="group", group_size=4)  # Rows 0 to 3, and 4 and 5.
    scale = fq.weight_scale(W, scheme, axes=(0,)).numpy()
    expected = [np.abs(W[:4]).max(axis=0) / 7] * 4 + [np.abs(W[4:]).max(axis=0) / 7] * 2
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    compact = fq.compact_scale(scale, W.shape, scheme, axes=(0,))
    assert compact.shape == (2, 4)
    np.testing.assert_array_equal(fq.spread_scale(compact, W.shape, scheme, axes=(0,)), scale)


def test_groups_of_a_convolution_share_the_window():
    w = np.random.default_rng(0).normal(size=(3, 3, 8, 2)).astype("float32")
    scheme = Scheme(4, granularity="group", group_size=4)
    scale = fq.weight_scale(w, scheme, axes=(0, 1, 2)).numpy()
    assert scale.shape == (1, 1, 8, 2)
    np.testing.assert_allclose(scale[0, 0, 5], np.abs(w[:, :, 4:]).max((0, 1, 2)) / 7, rtol=1e-6)
    assert fq.num_sharing(w.shape, scheme, (0, 1, 2)) == 36


def test_asymmetric_weights_use_the_whole_grid_and_keep_zero():
    w = np.array([[0.0], [0.5], [1.5], [-0.1]], np.float32)
    rounded = fq.fake_quant_weights(w, Scheme(4, symmetric=False), axes=0).numpy()
    assert rounded[0] == 0
    assert np.abs(rounded - w).max() <= 1.6 / 15 / 2 * 1.001
    symmetric = fq.fake_quant_weights(w, Scheme(4), axes=0).numpy()
    assert np.abs(symmetric - w).max() > np.abs(rounded - w).max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_power_of_two_scales_are_powers_of_two_and_clip_nothing(symmetric):
    scheme = Scheme(4, symmetric=symmetric, power_of_two=True)
    scale, zero_point = (x.numpy() for x in fq.weight_grid(W, scheme, axes=0))
    np.testing.assert_array_equal(np.log2(scale), np.round(np.log2(scale)))
    low, high = scheme.limits
    assert np.all((high - zero_point + 0.51) * scale >= W)
    assert np.all((low - zero_point - 0.51) * scale <= W)
    exact = fq.weight_scale(W, Scheme(4, symmetric=symmetric), axes=0).numpy()
    assert np.all((scale >= exact * 0.999) & (scale < 2 * exact))


def test_symmetric_activations_have_zero_point_0_in_the_words_of_the_converter():
    scheme = Scheme(granularity="tensor")
    low, high = fq.grid_bounds([-0.5, 2.54], scheme)
    scale, zero_point = fq.asymmetric_scale(low, high)
    np.testing.assert_allclose([scale, zero_point], [0.02, 0.0], rtol=1e-6)
    x = tf.constant([-0.013, 2.2, 0.0])
    rounded = fq.fake_quant_activations(x, [-0.5, 2.54], scheme)
    np.testing.assert_allclose(rounded, [-0.02, 2.2, 0.0], atol=1e-6)


def test_power_of_two_activations():
    scheme = Scheme(symmetric=False, granularity="tensor", power_of_two=True)
    low, high = fq.grid_bounds([-0.3, 1.0], scheme)
    scale, _ = fq.asymmetric_scale(low, high)
    np.testing.assert_allclose(scale, 2.0**-7, rtol=1e-6)


def test_dynamic_activations_take_each_row_by_itself():
    x = tf.constant([[100.0, 0.0, 30.0], [0.1, 0.0, 0.03]])
    rows = Scheme(symmetric=False, granularity="channel", dynamic=True)
    np.testing.assert_allclose(fq.fake_quant_dynamic(x, rows), x, rtol=0.01)
    whole = Scheme(symmetric=False, granularity="tensor", dynamic=True)
    np.testing.assert_array_equal(fq.fake_quant_dynamic(x, whole)[1], [0, 0, 0])


def lsq_by_hand(x, scale, low, high, upstream, count):
    """Equations 2 and 3 of the LSQ paper."""
    v = x / scale
    inside = (v > low) & (v < high)
    of_scale = np.where(inside, np.round(v) - v, np.clip(v, low, high))
    return inside * upstream, np.sum(of_scale * upstream) / np.sqrt(count * high)


@pytest.mark.parametrize("jit", [False, True])
def test_learned_scales_get_the_gradients_of_the_paper(jit):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, 40)).astype("float32")

    @tf.function(jit_compile=jit)
    def gradients(x, scale):
        y = fq.learned_fake_quant(x, fq.gradient_scaled(scale, 40, 7), 0.0, (-7, 7))
        return y, tf.gradients(y, [x, scale], upstream)

    y, found = gradients(tf.constant(x), tf.constant(0.1))
    expected = lsq_by_hand(x, 0.1, -7, 7, upstream, 40)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    np.testing.assert_array_equal(y, fq.fake_quant(x, 0.1, bits=4, narrow=True))


def test_a_learned_range_pulls_in_the_end_that_clips():
    x = tf.constant([[-1.0, 0.3, 4.0]])
    scheme = Scheme(4, symmetric=False, granularity="tensor")
    bounds = tf.Variable([-1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(fq.fake_quant_learned(x, bounds, scheme) - x))
    low, high = tape.gradient(loss, bounds).numpy()
    assert high < 0  # Moves up towards 4.
    assert abs(low) < abs(high) / 5


def test_learned_scales_descend_to_a_small_error():
    w = tf.constant(np.random.default_rng(1).standard_t(3, size=(512, 1)).astype("float32"))
    scheme = Scheme(3)
    scale = tf.Variable(fq.learned_scale(w, scheme, axes=0))

    def error(scale):
        scale = fq.gradient_scaled(scale, 512, 3)
        return tf.reduce_mean(tf.square(fq.learned_fake_quant(w, scale, 0.0, (-3, 3)) - w))

    for _ in range(200):
        with tf.GradientTape() as tape:
            loss = error(scale)
        scale.assign_sub(0.5 * tape.gradient(loss, scale))
    largest = fq.weight_scale(w, scheme, axes=0)
    best = min(float(error(largest * shrunk)) for shrunk in np.linspace(0.05, 1, 96))
    assert best < 0.6 * error(largest)
    assert error(scale) < 1.02 * best


def test_learned_scales_ignore_pruned_weights():
    w = np.float32([[1.0], [-3.0]])
    pruned = np.concatenate([w, np.zeros((6, 1), np.float32)])
    np.testing.assert_array_equal(
        fq.learned_scale(w, Scheme(4), axes=0), fq.learned_scale(pruned, Scheme(4), axes=0)
    )
