"""Training on several devices of one machine, through `tf.distribute`."""

from tfcompress.parallel.fit import prepare, release
from tfcompress.parallel.strategy import strategy

__all__ = ["prepare", "release", "strategy"]
