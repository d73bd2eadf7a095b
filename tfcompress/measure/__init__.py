"""Measure models and exported files: size, sparsity, MACs, accuracy, latency."""

from tfcompress.graph.macs import macs
from tfcompress.measure.accuracy import accuracy
from tfcompress.measure.forward import forward, max_abs_diff
from tfcompress.measure.profile import Profile, WeightProfile, compare, profile
from tfcompress.measure.size import Size, Weight, size, sparsity, weights
from tfcompress.timing import Latency, Timing, latency

__all__ = [
    "Latency",
    "Profile",
    "Size",
    "Timing",
    "Weight",
    "WeightProfile",
    "accuracy",
    "compare",
    "forward",
    "latency",
    "macs",
    "max_abs_diff",
    "profile",
    "size",
    "sparsity",
    "weights",
]
