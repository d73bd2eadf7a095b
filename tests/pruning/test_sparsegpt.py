"""SparseGPT against least squares, plain masking and Wanda; counts; what goes wrong."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.reconstruction import measure, trained_on_digits
from tests.models import correlated, kernels, matrix, mlp, nested, subclassed
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.ops.structures import NofM
from tfcompress.pruning.sparsegpt import (
    _n_of_m_plan,
    _unstructured_plan,
    largest,
    reconstruct,
    sparsegpt,
)


def squared_error(x, weight, new):
    return np.square(x @ weight - x @ new).sum()


def least_squares(x, weight, mask):
    """The best values for the weights that a mask keeps, an output at a time."""
    best = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        kept = mask[:, column]
        best[kept, column] = np.linalg.lstsq(x[:, kept], x @ weight[:, column], rcond=None)[0]
    return best


def brain_surgery(weight, moment, mask):
    """Optimal brain surgery as in the books: H is inverted anew after each input feature."""
    weight = weight.copy()
    for row in range(len(weight)):
        inverse = np.linalg.inv(moment[row:, row:])
        removed = np.where(mask[row], 0.0, weight[row])
        weight[row:] -= np.outer(inverse[:, 0], removed / inverse[0, 0])
    return np.where(mask, weight, 0.0)


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_between_least_squares_and_plain_masking(n_of_m):
    x, weight = correlated(400, 24), matrix(24, 10)
    if n_of_m:
        plan = _n_of_m_plan(24, 24, n_of_m, block_size=8)
    else:
        plan = _unstructured_plan(24, 240, 120, block_size=8)
    new, mask = reconstruct(weight, x.T @ x, *plan)
    ours = squared_error(x, weight, new)
    best = squared_error(x, weight, least_squares(x, weight, mask))
    plain = squared_error(x, weight, np.where(mask, weight, 0.0))
    assert best < ours < 0.7 * plain


@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 100])
def test_blocks_only_batch_the_work(block_size):
    x, weight = correlated(200, 24), matrix(24, 10)
    mask = np.random.default_rng(2).random(weight.shape) < 0.5
    blocks, _ = _unstructured_plan(24, 240, 120, block_size)
    moment = x.T @ x
    new, chosen = reconstruct(weight, moment, blocks, lambda _, group: mask[slice(*group)])
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(24)
    np.testing.assert_array_equal(chosen, mask)
    np.testing.assert_allclose(new, brain_surgery(weight, damped, mask), rtol=1e-8, atol=1e-10)


def test_the_scores_are_the_errors_of_removing_one_weight():
    x, weight = correlated(200, 6), matrix(6, 3)
    moment = x.T @ x
    seen = {}

    def choose(scores, group):
        seen[group] = scores
        return np.ones(scores.shape, bool)

    reconstruct(weight, moment, [[(0, 6)]], choose, damping=1e-12)
    for row in range(6):
        # Only the features from here on make up for it.
        rest = x[:, row + 1 :]
        target = x[:, row]
        unexplained = target - rest @ np.linalg.lstsq(rest, target, rcond=None)[0]
        removal = np.square(weight[row]) * np.square(unexplained).sum()
        np.testing.assert_allclose(seen[(0, 6)][row], removal, rtol=1e-6)


def test_inputs_that_are_always_zero_go_first_and_do_no_harm():
    x, weight = correlated(200, 12), matrix(12, 5)
    x[:, [2, 7, 8]] = 0
    weight[[2, 7, 8]] *= 100
    plan = _unstructured_plan(12, 60, 30, block_size=4)
    new, mask = reconstruct(weight, x.T @ x, *plan)
    assert mask.sum() == 30
    assert not mask[2].any()  # Three live features of the block hold more than it keeps.
    assert mask[[7, 8]].sum() == 0
    assert np.isfinite(new).all()
    # With more to keep than live ones there are, the largest of the others stay as they were.
    new, mask = reconstruct(weight, x.T @ x, *_unstructured_plan(12, 60, 57, block_size=12))
    assert mask.sum() == 57
    assert mask[[0, 1, 3, 4, 5, 6, 9, 10, 11]].all()
    smallest = np.sort(np.abs(weight[[2, 7, 8]]), axis=None)[2]
    np.testing.assert_array_equal(mask[[2, 7, 8]], np.abs(weight[[2, 7, 8]]) > smallest)
    np.testing.assert_array_equal(
        new[mask & (x.sum(0) == 0)[:, None]], weight[mask & (x.sum(0) == 0)[:, None]]
    )


def test_no_input_at_all_prunes_by_magnitude():
    weight = matrix(6, 4)
    new, mask = reconstruct(weight, np.zeros((6, 6)), *_unstructured_plan(6, 24, 12, 6), 0.0)
    expected = largest(np.abs(weight).reshape(-1), 12).reshape(6, 4)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(new, np.where(expected, weight, 0))


@settings(deadline=None, max_examples=200)
@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 9),
    sparsity=st.floats(0, 1, exclude_max=True),
    block_size=st.integers(1, 50),
)
def test_unstructured_counts_are_exact(inputs, outputs, sparsity, block_size):
    size = inputs * outputs
    kept = max(round(size * (1 - sparsity)), 1)
    x = correlated(30, inputs)
    blocks, choose = _unstructured_plan(inputs, size, kept, block_size)
    _, mask = reconstruct(matrix(inputs, outputs), x.T @ x, blocks, choose)
    assert mask.sum() == kept
    for ((start, stop),) in blocks:
        share = kept * (stop - start) / inputs
        assert abs(mask[start:stop].sum() - share) < 1


@settings(deadline=None, max_examples=200)
@given(
    runs=st.integers(1, 4),
    depth=st.integers(1, 13),
    outputs=st.integers(1, 5),
    n_of_m=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5)]),
    block_size=st.integers(1, 30),
)
def test_n_of_m_counts_are_exact(runs, depth, outputs, n_of_m, block_size):
    n, m = n_of_m
    inputs = runs * depth
    x = correlated(30, inputs)
    plan = _n_of_m_plan(inputs, depth, n_of_m, block_size)
    _, mask = reconstruct(matrix(inputs, outputs), x.T @ x, *plan)
    for run in mask.reshape(runs, depth, outputs):
        for start in range(0, depth, m):
            group = run[start : start + m]
            expected = n if len(group) == m else max(round(len(group) * n / m), 1)
            np.testing.assert_array_equal(group.sum(0), expected)


@pytest.mark.parametrize("shape", [(12, 5), (3, 3, 6, 4)])
@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 3)])
def test_n_of_m_is_the_structure_of_that_name(shape, n_of_m):
    """Where no input tells more than another, both keep the largest of each group."""
    weight = np.random.default_rng(0).normal(size=shape)
    inputs = int(np.prod(shape[:-1]))
    plan = _n_of_m_plan(inputs, shape[-2], n_of_m, 128)
    _, mask = reconstruct(weight.reshape(inputs, -1), np.eye(inputs), *plan)
    structure = NofM(*n_of_m)
    expected = structure.choose(tf.constant(np.abs(weight)), structure.sparsity).numpy()
    np.testing.assert_array_equal(mask.reshape(shape), expected)


def data_for(model, num_examples=80):
    shape = model.input_shape if hasattr(model, "input_shape") else (None, 12)
    return np.random.default_rng(0).normal(size=(num_examples, *shape[1:])).astype("float32")


def hook_free(model):
    return all("call" not in vars(layer) for layer in all_layers(model))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.83])
@pytest.mark.parametrize("make", [mlp, nested, subclassed])
def test_models_of_any_kind(make, sparsity):
    model = make()
    before = kernels(model)
    biases = {w.path: w.numpy() for w in model.weights if w.path not in before}
    masks = sparsegpt(
        model, dict.fromkeys(before, sparsity), np.ones((80, 12)) * matrix(80, 12), verbose=0
    )
    assert list(masks) == list(before)
    for path, weight in kernels(model).items():
        mask = masks[path].numpy()
        assert masks[path].dtype == tf.bool
        assert mask.sum() == max(round(weight.size * (1 - sparsity)), 1)
        np.testing.assert_array_equal(weight == 0, ~mask)
        if sparsity == 0:
            np.testing.assert_allclose(weight, before[path], rtol=1e-6)
    for path, bias in biases.items():
        np.testing.assert_array_equal(next(w for w in model.weights if w.path == path), bias)
    assert hook_free(model)


def test_each_layer_sees_what_the_pruned_ones_before_it_compute():
    data = data_for(mlp())
    both, one = mlp(), mlp()
    one.set_weights(both.get_weights())
    sparsegpt(both, dict.fromkeys(kernels(both), 0.6), data, verbose=0)
    sparsegpt(one, {"mlp/hidden/kernel": 0.6}, data, verbose=0)
    hidden = one.get_layer("hidden")(data).numpy()
    weight = one.get_layer("head").kernel.numpy()
    plan = _unstructured_plan(16, 48, round(48 * 0.4), 128)
    expected, _ = reconstruct(weight, hidden.T @ hidden, *plan)
    np.testing.assert_allclose(both.get_layer("head").kernel, expected, rtol=1e-3, atol=1e-4)


def test_batches_of_an_iterator_are_enough():
    data = data_for(mlp())
    model, same = mlp(), mlp()
    same.set_weights(model.get_weights())
    sparsities = dict.fromkeys(kernels(model), 0.5)
    sparsegpt(model, sparsities, data, verbose=0)
    sparsegpt(same, sparsities, iter([data[:32], data[32:64], data[64:]]), verbose=0)
    for ours, theirs in zip(model.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_half_precision_weights():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, dtype="bfloat16")])
    kernel = model.layers[0].kernel
    sparsegpt(model, {kernel.path: 0.5}, data_for(model), verbose=0)
    assert kernel.dtype == "bfloat16"
    assert np.count_nonzero(np.asarray(kernel, "float32")) == 24


def test_the_progress_bar_is_shown_on_demand(capsys):
    model = mlp()
    sparsegpt(model, {"mlp/head/kernel": 0.5}, data_for(model), verbose=0)
    assert capsys.readouterr().out == ""
    sparsegpt(model, {"mlp/head/kernel": 0.5}, data_for(model))
    assert "SparseGPT" in capsys.readouterr().out


GOOD = {"mlp/hidden/kernel": 0.5, "mlp/head/kernel": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": {"mlp/hidden/kernel": 1.0}}, r"'mlp/hidden/kernel'.*\[0, 1\), got 1.0"),
        ({"sparsities": {"mlp/none": 0.5}}, "no variable 'mlp/none'; it has: mlp/hidden/kernel"),
        ({"sparsities": {"mlp/head/bias": 0.5}}, "takes kernels of .*mlp/head/bias.*exclude"),
        ({"n_of_m": (4, 4)}, r"1 <= n < m, got \(4, 4\)"),
        ({"n_of_m": (1, 4)}, "1 of 4 is sparsity 0.75, but 0.5 was given for 'mlp/hidden/kernel'"),
        ({"damping": -0.1}, "damping must be 0 or more, got -0.1"),
        ({"block_size": 0}, "block_size must be 1 or more, got 0"),
        ({"calibration": np.full((4, 12), np.inf)}, "calibration data holds NaN or infinity"),
        ({"calibration": iter([])}, "holds no batch"),
        ({"calibration": np.ones((4, 12)), "damping": 0}, "singular with damping=0.*Pass"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(arguments, message):
    model = mlp()
    before = kernels(model)
    arguments = {"sparsities": GOOD, "calibration": data_for(model), **arguments}
    with pytest.raises(ValueError, match=message):
        sparsegpt(model, **arguments, verbose=0)
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight, before[path])
    assert hook_free(model)


def test_a_late_failure_gives_the_weights_back():
    """The first layer is pruned by the time that the last batch turns out to be bad."""
    model = mlp()
    before = kernels(model)
    data = data_for(model)
    reads = []

    def batches():
        reads.append(1)
        yield data
        # Read for the order, for the first layer, and for the second.
        if len(reads) == 3:
            assert np.count_nonzero(model.get_layer("hidden").kernel) == 96
            yield np.full((4, 12), np.nan)

    with pytest.raises(ValueError, match="holds NaN"):
        sparsegpt(model, GOOD, batches, verbose=0)
    assert len(reads) == 3
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight, before[path])
    assert hook_free(model)


def test_a_kernel_of_nan_is_named():
    model = mlp()
    model.get_layer("head").kernel.assign(np.full((16, 3), np.nan))
    with pytest.raises(ValueError, match="'mlp/head/kernel' holds NaN or infinity"):
        sparsegpt(model, GOOD, data_for(model), verbose=0)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_sparsegpt_beats_wanda_beats_magnitude(name):
    """By what layers and the model compute on data that was not calibrated on."""
    model, calibration, x_test, y_test = trained_on_digits(name, epochs=2)
    results = measure(model, calibration[:256], x_test[:256], y_test[:256])
    for how in ("50%", "2:4"):
        errors = {method: rest[:2] for (each, method), rest in results.items() if each == how}
        for ours, theirs in (("SparseGPT", "Wanda"), ("Wanda", "magnitude")):
            for better, worse in zip(errors[ours], errors[theirs], strict=True):
                assert 0 < better < worse, (how, errors)
