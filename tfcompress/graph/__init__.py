"""Model to model passes over one form: the flat Functional graph."""

from tfcompress.graph.expand import expand
from tfcompress.graph.fold import fold_batch_norm
from tfcompress.graph.rebuild import consumers, map_layers

__all__ = ["consumers", "expand", "fold_batch_norm", "map_layers"]
