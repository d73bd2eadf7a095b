"""Model to model passes over one form: the flat Functional graph."""

from tfcompress.graph.expand import expand
from tfcompress.graph.factorize import factorize
from tfcompress.graph.fold import fold_batch_norm
from tfcompress.graph.rebuild import consumers, map_layers

__all__ = ["consumers", "expand", "factorize", "fold_batch_norm", "map_layers"]
