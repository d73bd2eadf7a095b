"""Sentences from film reviews that people have rated."""

import csv

import numpy as np

from tfcompress.zoo.fetch import Member, Package, fetch
from tfcompress.zoo.split import Split, stratified_split

_FILE = "movieReviewSnippets_GroundTruth.txt"
_PACKAGE = Package(
    name="vaderSentiment",
    version="3.0",
    sha256="74d716d26e14a1465d64ab5e48231afa9773a173de01ae9cf37b78c585e2b431",
    source=True,
    members={
        _FILE: Member(
            path=(
                "vaderSentiment-3.0/additional_resources/hutto_ICWSM_2014.tar.gz",
                f"hutto_ICWSM_2014/{_FILE}",
            ),
            sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        )
    },
)


def movie_reviews(seed: int = 0) -> Split:
    """9,171 sentences from film reviews, each clearly for or against: 6,879 train, 2,292 test.

    Every sentence was rated from -4 to 4 by 20 or more people. Those with a mean of at least 1 in
    magnitude are kept, and of equal sentences one, so that none is in both parts. The split is
    stratified: half the sentences of both parts are for the film (4,597 of 9,171 altogether).

    The first call downloads 2.5 MB with pip into the cache (`$TFCOMPRESS_CACHE`, or the folder
    `tfcompress` in the user's own cache).

    Args:
        seed: Chooses the split, and nothing else.

    Returns:
        `((x_train, y_train), (x_test, y_test))`: texts, arrays of str of shape `(n,)`, and
        labels of shape `(n,)`, int64: 1 for, 0 against.

    Raises:
        FetchError: The package cannot be downloaded, or is not the one that was expected.

    Example:

    >>> from tfcompress import zoo
    >>> (x_train, y_train), (x_test, y_test) = zoo.movie_reviews()
    >>> x_train.shape, x_test.shape
    ((6879,), (2292,))

    Data: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", 2014; the reviews are those of Pang and Lee, "A Sentimental Education:
    Sentiment Analysis Using Subjectivity Summarization Based on Minimum Cuts", 2004.
    """
    texts, labels = _clear_reviews()
    train, test = stratified_split(labels, test_fraction=0.25, seed=seed)
    return (texts[train], labels[train]), (texts[test], labels[test])


def _clear_reviews() -> tuple[np.ndarray, np.ndarray]:
    with open(fetch(_PACKAGE) / _FILE, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    positive = {text: float(rating) > 0 for _, rating, text in rows if abs(float(rating)) >= 1}
    return np.array(list(positive)), np.array(list(positive.values()), np.int64)
