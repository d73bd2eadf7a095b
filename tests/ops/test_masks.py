import os
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.ops import allocation, criteria, structures
from tfcompress.ops.masks import apply_mask, choose_masks
from tfcompress.ops.penalties import l1, soft_threshold

WEIGHTS = hnp.arrays(
    "float32",
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=7),
    elements=st.floats(-2, 2, width=16),
)
SPARSITIES = st.floats(0, 0.999) | st.sampled_from([0.0, 0.5, 0.8, 0.9])


def test_uniform_keeps_the_same_share_of_each():
    masks = choose_masks([tf.constant([4.0, -3.0, 2.0, 1.0]), tf.constant([9.0, 8.0])], 0.5)
    assert [mask.numpy().tolist() for mask in masks] == [[True, True, False, False], [True, False]]


def test_global_lets_the_weights_compete():
    weights = [tf.constant([4.0, -3.0, 2.0, 1.0]), tf.constant([9.0, 8.0])]
    masks = choose_masks(weights, 0.5, allocation="global")
    assert [mask.numpy().tolist() for mask in masks] == [[True, False, False, False], [True, True]]


@hypothesis.given(st.lists(WEIGHTS, min_size=1, max_size=3), SPARSITIES)
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_count_is_exact(weights, sparsity):
    tensors = [tf.constant(weight) for weight in weights]
    for mask in choose_masks(tensors, sparsity):
        n = mask.shape.num_elements()
        assert np.sum(mask) == max(round(n * (1 - sparsity)), 1)
    n = sum(weight.size for weight in weights)
    total = sum(np.sum(mask) for mask in choose_masks(tensors, sparsity, allocation="global"))
    assert total == max(round(n * (1 - sparsity)), 1)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("how", [pytest.param("eager", marks=pytest.mark.slow), "graph"])
def test_no_second_copy_of_the_weights_is_alive(allocation, how):
    """In processes of their own, whose peak memory is compared for small and for large weights."""

    def peak(size):
        command = [sys.executable, "-m", "tests.ops.memory", allocation, how, str(size)]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        root = pathlib.Path(__file__).parents[2]
        return int(subprocess.run(command, cwd=root, env=environment, stdout=-1).stdout)

    masks = 40 * 1_000_000
    assert peak(1_000_000) - peak(1000) < masks + 0.4 * 4 * masks


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 127, 401_408, 25_000_000])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999])
def test_the_count_is_the_same_in_python_and_in_a_graph(n, sparsity):
    in_graph = tf.function(lambda s: allocation.num_kept(n, s))(tf.constant(sparsity, tf.float64))
    assert int(in_graph) == allocation.num_kept(n, sparsity)


def test_a_pruned_nan_is_zero():
    weight = tf.constant([np.nan, np.inf, 1.0])
    assert apply_mask(weight, tf.constant([False, False, True])).numpy().tolist() == [0, 0, 1]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_kept_stays_to_the_last_bit(dtype, jit_compile):
    weight = tf.cast(np.random.default_rng(0).normal(size=(33, 7)), dtype)
    mask = np.random.default_rng(1).random((33, 7)) < 0.5
    masked = tf.function(apply_mask, jit_compile=jit_compile)(weight, tf.constant(mask))
    assert masked.dtype == dtype
    expected = np.where(mask, weight.numpy(), 0)
    assert masked.numpy().tobytes() == expected.astype(weight.numpy().dtype).tobytes()


@pytest.mark.parametrize(
    ("module", "kind"),
    [(criteria, "criterion"), (structures, "structure"), (allocation, "allocation")],
)
def test_an_unknown_name_is_refused(module, kind):
    with pytest.raises(ValueError, match=f"Unknown {kind} 'magnitud'; expected one of"):
        module.get("magnitud")


def test_the_nearest_name_is_offered():
    with pytest.raises(ValueError, match="Did you mean 'magnitude'"):
        criteria.get("magnitud")


def test_l1():
    assert float(l1(tf.constant([[1.0, -2.0], [0.5, 0.0]]), 2.0)) == 7.0


@hypothesis.given(WEIGHTS, st.floats(0, 3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_soft_threshold_minimizes_its_objective(weight, amount):
    shrunk = soft_threshold(tf.constant(weight), amount).numpy()

    def objective(x):
        return 0.5 * (x - weight) ** 2 + amount * np.abs(x)

    for other in (shrunk + 1e-2, shrunk - 1e-2, np.zeros_like(weight), weight):
        assert np.all(objective(shrunk) <= objective(other) + 1e-5)
