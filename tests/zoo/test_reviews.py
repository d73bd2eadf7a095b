"""The film reviews: what is kept, and how they are split."""

import numpy as np
import pytest

from tfcompress import zoo
from tfcompress.zoo import reviews


@pytest.fixture(scope="module")
def split():
    return zoo.movie_reviews()


def test_sizes_and_types(split):
    (x_train, y_train), (x_test, y_test) = split
    assert x_train.shape == y_train.shape == (6879,)
    assert x_test.shape == y_test.shape == (2292,)
    assert x_train.dtype.kind == x_test.dtype.kind == "U"
    assert y_train.dtype == y_test.dtype == np.int64


def test_both_parts_have_the_same_share_of_each_label(split):
    (_, y_train), (_, y_test) = split
    np.testing.assert_array_equal(np.bincount(y_train), [3431, 3448])
    np.testing.assert_array_equal(np.bincount(y_test), [1143, 1149])


def test_no_sentence_is_in_both_parts(split):
    (x_train, _), (x_test, _) = split
    assert len({*x_train, *x_test}) == 9171


def test_known_sentences_have_the_label_of_their_rating(split):
    (x_train, y_train), (x_test, y_test) = split
    labels = dict(zip([*x_train, *x_test], [*y_train, *y_test], strict=True))
    assert labels["Münch's genuine insight makes the film's occasional overindulgence forgivable."]
    assert labels["...a pretentious mess..."] == 0
    assert "Effective but too tepid biopic" not in labels  # Rated -0.6.
    assert "Touché!" not in labels  # Rated 0.47.


def test_texts_have_no_line_ends_or_tabs(split):
    (x_train, _), (x_test, _) = split
    assert all(text == text.strip() and "\t" not in text for text in [*x_train, *x_test])


def test_the_seed_chooses_the_split(split):
    again, other = zoo.movie_reviews(seed=0), zoo.movie_reviews(seed=1)
    np.testing.assert_array_equal(split[1][0], again[1][0])
    assert not np.array_equal(split[1][0], other[1][0])
    assert {*other[0][0], *other[1][0]} == {*split[0][0], *split[1][0]}


def test_the_second_call_needs_no_network(split, monkeypatch):
    monkeypatch.setattr("tfcompress.zoo.fetch.subprocess.run", None)
    assert len(reviews._clear_reviews()[0]) == 9171
