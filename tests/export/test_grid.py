"""Integers found behind weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfcompress.export.grid import find_grid


@given(
    seed=st.integers(0, 2**31),
    largest=st.sampled_from([1, 3, 7, 31, 93, 126, 127]),
    lowest=st.sampled_from([-128, -127, -60, 0]),
)
@settings(max_examples=60, deadline=None)
def test_what_lies_on_a_grid_is_found_whatever_it_was_multiplied_with(seed, largest, lowest):
    rng = np.random.default_rng(seed)
    integers = rng.integers(lowest, largest + 1, (5, 40))
    scales = rng.uniform(1e-4, 1.0, (5, 1)).astype("float32")
    weights = (integers * scales).astype("float32") * rng.normal(size=(5, 1)).astype("float32")
    stored, found, zero_points = find_grid(weights)
    assert stored.dtype == np.int8
    real = (stored.astype("float64") - zero_points[:, None]) * found[:, None]
    np.testing.assert_allclose(real, weights, atol=1e-6 * np.abs(weights).max() + 1e-12)
    assert np.all((weights == 0) == (stored == zero_points[:, None]))


@pytest.mark.parametrize("steps", [255.5, 300.0])
def test_what_lies_on_none_is_not(steps):
    rng = np.random.default_rng(0)
    assert find_grid(rng.integers(-300, 301, (3, 200)) + (steps % 1)) is None
    assert find_grid(rng.normal(size=(2, 100))) is None


def test_one_row_on_no_grid_is_enough_to_give_up():
    rows = np.random.default_rng(0).integers(-127, 128, (3, 100)).astype(float)
    assert find_grid(rows) is not None
    rows[1] += np.linspace(0, 0.5, 100)
    assert find_grid(rows) is None


def test_rows_of_zeros_have_no_scale():
    integers, scales, _ = find_grid(np.array([[0.0, 0.0], [0.0, 2.0]]))
    assert scales[0] == 0 and scales[1] > 0
    assert integers[0].tolist() == [0, 0]
