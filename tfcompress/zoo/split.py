"""One part of the rows to train on and one to test on, with the same share of every label."""

import numpy as np

Split = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def stratified_split(
    labels: np.ndarray, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows of both parts, in random order.

    Args:
        labels: One label a row, shape `(n,)`.
        test_fraction: In (0, 1). Of `n` rows with a label, `floor(n * test_fraction)` are for
            the test.
        seed: Chooses the split.

    Returns:
        The indices to train on and those to test on.

    Example:

    >>> train, test = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(train), len(test)
    (6, 2)
    """
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        num_test = int(len(indices) * test_fraction)
        test.append(indices[:num_test])
        train.append(indices[num_test:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))
