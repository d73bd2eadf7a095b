"""Model to model passes over one form: the flat Functional graph."""

from tfcompress.graph.drop import blocks, drop_layers
from tfcompress.graph.expand import expand
from tfcompress.graph.factorize import factorize
from tfcompress.graph.fold import fold_batch_norm
from tfcompress.graph.rebuild import consumers, map_layers
from tfcompress.graph.shrink import Plan, shrink, shrink_plan
from tfcompress.graph.unit_groups import channel_groups
from tfcompress.graph.vocabulary import Vocabulary, prune_vocabulary, special_ids, used_tokens

__all__ = [
    "Plan",
    "Vocabulary",
    "blocks",
    "channel_groups",
    "consumers",
    "drop_layers",
    "expand",
    "factorize",
    "fold_batch_norm",
    "map_layers",
    "prune_vocabulary",
    "shrink",
    "shrink_plan",
    "special_ids",
    "used_tokens",
]
