"""Symbolic sizes: unified, taken apart, frozen."""

import numpy as np
import pytest

from tfcompress.graph.dims import Dim, concatenation, cut, product, unify


def removed(dim, index):
    keep = np.ones(dim.root.size, bool)
    keep[index] = False
    return {dim.root: keep}


def test_unified_dims_lose_the_same_elements():
    one, two, three = Dim(4), Dim(4), Dim(4)
    unify(one, two)
    unify(two, three)
    for dim in (one, two, three):
        assert dim.keep(removed(one, [1])).tolist() == [True, False, True, True]


def test_a_product_loses_rows_and_columns():
    rows, columns = Dim(2), Dim(3)
    whole = Dim(6)
    unify(whole, product([rows, columns]))
    assert whole.keep(removed(rows, [0])).tolist() == [False] * 3 + [True] * 3
    assert whole.keep(removed(columns, [2])).tolist() == [True, True, False] * 2
    assert whole.places(columns).tolist() == [0, 1, 2, 0, 1, 2]
    assert whole.places(rows).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_sum_loses_what_its_parts_lose():
    one, two = Dim(2), Dim(3)
    both = concatenation([one, two])
    assert both.keep(removed(two, [0])).tolist() == [True, True, False, True, True]
    assert both.places(two).tolist() == [-1, -1, 0, 1, 2]


def test_a_sum_of_products_is_a_product_of_sums():
    heads, size = Dim(4), Dim(5)
    whole = product([heads, size])
    first, second = cut(whole, [5, 15])
    assert first.frozen is None and heads.kind == "sum"
    leaf = heads.parts[1]
    assert whole.keep({leaf.root: np.array([True, False, True])}).sum() == 15
    assert second.keep({leaf.root: np.array([True, False, True])}).sum() == 10


def test_sizes_that_do_not_fit_are_frozen():
    one, two = product([Dim(4), Dim(6)]), product([Dim(6), Dim(4)])
    unify(one, two)
    assert all(leaf.frozen for dim in (one, two) for leaf in dim.leaves())


def test_frozen_dims_freeze_what_they_are_unified_with():
    free, frozen = Dim(6), Dim(6, "an input")
    unify(free, product([Dim(2), Dim(3)]))
    unify(free, frozen)
    assert [leaf.frozen for leaf in free.leaves()] == ["an input"] * 2


def test_what_would_contain_itself_is_frozen():
    one = Dim(4)
    unify(one, one)
    assert one.frozen is None
    with pytest.raises(ValueError, match="4 and 5"):
        unify(one, Dim(5))
