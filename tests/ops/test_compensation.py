"""Rows that make up for others: against inverting the Hessian anew, and against least squares."""

import numpy as np
import pytest

from tfcompress.ops.compensation import block_edges, compensate, inverse_factor


def correlated(rows, features, seed=0):
    random = np.random.default_rng(seed)
    causes = random.normal(size=(rows, max(features // 3, 1)))
    return causes @ random.normal(size=(causes.shape[1], features)) + 0.3 * random.normal(
        size=(rows, features)
    )


def test_the_factor_of_the_inverse():
    x = correlated(50, 7)
    moment = x.T @ x
    factor = inverse_factor(moment, 0.01)
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(7)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(7), atol=1e-9)


def test_a_singular_moment_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="singular with damping=0.0.*damping=0.01 or more exam"):
        inverse_factor(np.ones((3, 3)), damping=0.0)


def test_an_input_that_is_always_zero_takes_no_part():
    x = correlated(50, 5)
    x[:, 2] = 0
    factor = inverse_factor(x.T @ x, 0.01)
    assert np.isfinite(factor).all()
    assert np.count_nonzero(factor[2]) == np.count_nonzero(factor[:, 2]) == 1


@pytest.mark.parametrize("block_size", [1, 3, 8, 50])
def test_the_rows_behind_are_the_least_squares_answer(block_size):
    """After each row that was replaced, those behind are optimal, given all before."""
    x = correlated(100, 8)
    weight = np.random.default_rng(1).normal(size=(8, 4))
    factor = inverse_factor(x.T @ x, 0.0)
    seen = []

    def replace(row, current):
        # Only the first 3 rows change.
        new = np.round(current[row]) if row < 3 else current[row]
        seen.append(row)
        return new

    new = compensate(weight, factor, block_edges(8, block_size), replace)
    assert seen == list(range(8))
    rest = x @ weight - x[:, :3] @ new[:3]
    best = np.linalg.lstsq(x[:, 3:], rest, rcond=None)[0]
    np.testing.assert_allclose(new[3:], best, atol=1e-8)
    np.testing.assert_array_equal(new[:3], np.round(new[:3]))
