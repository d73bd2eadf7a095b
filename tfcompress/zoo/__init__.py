"""Real data and models that install as packages, so that examples need no download by hand.

Importing this also lets `keras.saving.load_model` read the models of `minilm`.
"""

from tfcompress.zoo.bert import minilm, minilm_preprocessor
from tfcompress.zoo.fetch import FetchError
from tfcompress.zoo.mnist import mnist5k
from tfcompress.zoo.reviews import movie_reviews

__all__ = ["FetchError", "minilm", "minilm_preprocessor", "mnist5k", "movie_reviews"]
