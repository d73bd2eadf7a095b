"""Calibrators: what is known of the values at a place -> the range that integers shall cover.

Of activations a histogram is kept (see `tfcompress.ops.histogram`), within whose bins values are
taken as evenly spread; weights are at hand, and every error is that of the weights themselves. Both
leave zeros out, which are exact on every grid, however many a ReLU or pruning has made.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfcompress.ops import fake_quant as fq
from tfcompress.ops import histogram
from tfcompress.ops.schemes import Scheme, integer_limits
from tfcompress.shorthands import resolve
from tfcompress.values import Value

__all__ = [
    "MSE",
    "Calibrator",
    "Entropy",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "get",
    "weight_scale",
]

# Ranges are searched among these shares of the one that holds everything, then near the best one.
_COARSE = 2.0 ** (-np.arange(49) / 4)
_FINE = 2.0 ** (np.arange(8, -9, -1) / 32)
_WEIGHT_COARSE = _COARSE[:33]
_CLEARLY = 0.95  # share of an estimated error that a better one must not exceed
# As many weights are looked at at a time as the caches hold.
_BLOCK = 2**17


class Calibrator(Value):
    """Base of the calibrators; subclasses are frozen dataclasses.

    Attributes:
        reads_histogram: Whether `bounds` needs the counts of the stream, besides its extremes.
        widens: Whether what a range held before calibration is part of the extremes.
        momentum: Of the moving average that the stream keeps.
    """

    reads_histogram: ClassVar[bool] = True
    widens: ClassVar[bool] = False
    momentum: ClassVar[float] = 0.9

    def bounds(self, stream: histogram.Stream, scheme: Scheme) -> tuple[float, float]:
        """The range of a place.

        Args:
            stream: What was seen there, as tensors or arrays.
            scheme: How it is quantized, per tensor.

        Returns:
            `(low, high)` with `low <= 0 <= high`; `(-high, high)` for a symmetric scheme; `(0, 0)`
            if there were only zeros.
        """
        stream = histogram.Stream(*(np.asarray(each) for each in stream))
        low, high = self._bounds(stream, scheme)
        if scheme.symmetric:
            low, high = -max(-low, high), max(-low, high)
        return float(low), float(high)

    def thresholds(self, weights: np.ndarray, scheme: Scheme) -> np.ndarray:
        """The magnitudes that the largest integer shall stand for.

        Args:
            weights: float32 `(number of scales, weights that share one)`.
            scheme: A symmetric scheme.

        Returns:
            float32 `(number of scales,)`; 0 where all weights are 0.
        """
        raise NotImplementedError

    def _bounds(self, stream, scheme):
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class MinMax(Calibrator):
    """Everything is held: nothing is clipped, and one outlier makes all steps coarse.

    Example:

    >>> stream = histogram.updated(histogram.empty(), tf.constant([-1.0, 3.0]))
    >>> MinMax().bounds(stream, Scheme(symmetric=False, granularity="tensor"))
    (-1.0, 3.0)
    """

    reads_histogram: ClassVar[bool] = False
    widens: ClassVar[bool] = True

    def thresholds(self, weights, scheme):
        """The largest magnitudes."""
        return np.abs(weights).max(axis=1)

    def _bounds(self, stream, scheme):
        return stream.extremes


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class MovingAverage(MinMax):
    """The moving average of the extremes of each batch; weights are one batch.

    Args:
        momentum: In [0, 1): `range <- momentum * range + (1 - momentum) * extremes`.

    Raises:
        ValueError: `momentum` is out of range.

    Example:

    >>> calibrator, stream = MovingAverage(momentum=0.5), histogram.empty()
    >>> for x in ([0.0, 3.0], [0.0, 5.0]):
    ...     stream = histogram.updated(stream, x, calibrator.momentum)
    >>> calibrator.bounds(stream, Scheme(symmetric=False, granularity="tensor"))
    (0.0, 4.0)

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """

    widens: ClassVar[bool] = False
    momentum: float = 0.9

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}; 0.9 is usual.")

    def _bounds(self, stream, scheme):
        return stream.average


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Percentile(Calibrator):
    """A share of the values is held; half of the others lie beyond each end.

    All of them lie beyond the one end if the values have one sign, and a symmetric scheme holds
    that share of the magnitudes. Zeros are counted.

    Args:
        percentile: In (50, 100], the share in percent.

    Raises:
        ValueError: `percentile` is out of range.

    Example:

    >>> stream = histogram.updated(histogram.empty(), tf.range(-1000.0, 1001.0))
    >>> low, high = Percentile(99.0).bounds(stream, Scheme(symmetric=False, granularity="tensor"))
    >>> round(low, -1), round(high, -1)
    (-990.0, 990.0)
    """

    percentile: float = 99.99

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"percentile must lie in (50, 100], got {self.percentile}: the share of the values "
                "that is held, in percent, e.g. 99.99."
            )

    def thresholds(self, weights, scheme):
        """The percentiles of the magnitudes."""
        # Exact, and a group that is filled up with zeros gets none of them.
        outside = int(weights.shape[1] * (1 - self.percentile / 100))
        return -np.partition(-np.abs(weights), outside, axis=1)[:, outside]

    def _bounds(self, stream, scheme):
        low, high = stream.extremes.astype(float)
        below, zeros, above = np.split(stream.counts, [_ZEROS, _ZEROS + 1])
        outside = (1 - self.percentile / 100) * stream.counts.sum()
        if scheme.symmetric:
            largest = max(-low, high)
            return 0.0, _quantile(below[::-1] + above, outside, largest)
        outside /= 2 if low < 0 < high else 1
        return -_quantile(below[::-1], outside, -low), _quantile(above, outside, high)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class MSE(Calibrator):
    """The least mean squared error of what is quantized, inside of the range and beyond.

    Both ends are searched, each by itself unless the scheme is symmetric, from the extremes to a
    4096th of them (a 256th, of weights). The range that holds everything is one of those.

    Example:

    >>> values = tf.concat([tf.random.normal([10_000]), [8.0]], axis=0)
    >>> stream = histogram.updated(histogram.empty(), values)
    >>> low, high = MSE().bounds(stream, Scheme(4, symmetric=False, granularity="tensor"))
    >>> 2 < high < 4
    True

    Reference: Choukroun et al. 2019, https://arxiv.org/abs/1902.06822.
    """

    def thresholds(self, weights, scheme):
        """Those of the least error, exactly as the weights have it."""
        return _searched_blocks(weights, lambda part: lambda t: _weight_errors(part, t, scheme))

    def _bounds(self, stream, scheme):
        bins = _bins(stream)
        return _searched(bins, scheme, lambda low, high: _errors(bins, low, high, scheme))


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Entropy(Calibrator):
    """The least information lost: the KL divergence of the quantized values from the float ones.

    An integer stands for a float that is as likely anywhere in its step; of what is clipped nothing
    is known, and it gets the density of one value of the stream spread over the whole range. In
    `KL(float || quantized)` the entropy of the floats is a constant. What is left is the likelihood
    of a histogram whose bins are the steps of the grid: neither the number of bins the values were
    counted in, nor how many of these are empty, nor the size of the sample shifts it, as they do
    where a reference is clipped, rebinned and smoothed.

    Information has no notion of distance: where most values lie close together, clipping all others
    costs little. Ranges whose squared error is not below that of the extremes are therefore left
    out; of activations, by 5%, which a histogram may be wrong by where single values are frequent.

    Example:

    >>> values = tf.concat([tf.random.stateless_normal([10_000], seed=[0, 1]), [30.0]], 0)
    >>> stream = histogram.updated(histogram.empty(), values)
    >>> low, high = Entropy().bounds(stream, Scheme(4, symmetric=False, granularity="tensor"))
    >>> 3 < high < 6
    True

    Reference: Migacz 2017, "8-bit inference with TensorRT", GPU Technology Conference.
    """

    def thresholds(self, weights, scheme):
        """Those of the least divergence, as the weights have it."""

        def cost(part):
            accepted = _weight_errors(part, np.abs(part).max(axis=1), scheme)

            def divergence(t):
                lost = np.full(len(part), np.inf)
                near = _weight_errors(part, t, scheme) <= accepted
                lost[near] = _weight_divergences(part[near], t[near], scheme)
                return lost

            return divergence

        return _searched_blocks(weights, cost)

    def _bounds(self, stream, scheme):
        bins = _bins(stream)
        accepted = _errors(bins, *_all(bins, scheme)[:, None], scheme) * _CLEARLY

        def cost(low, high):
            refused = _errors(bins, low, high, scheme) > accepted
            return np.where(refused, np.inf, _divergences(bins, low, high, scheme))

        return _searched(bins, scheme, cost)


_KNOWN = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
    "mse": MSE(),
    "entropy": Entropy(),
}


def get(identifier: "str | Calibrator") -> Calibrator:
    """The calibrator with this name, or a calibrator as it is.

    Example:

    >>> get("percentile")
    Percentile(percentile=99.99)
    """
    if isinstance(identifier, Calibrator):
        return identifier
    if not isinstance(identifier, str):
        raise ValueError(
            f"calibrator={identifier!r} is none; pass one of {sorted(_KNOWN)}, or an object such "
            "as tfcompress.quantization.calibrators.Percentile(99.9)."
        )
    return resolve("calibrator", identifier, _KNOWN)


def weight_scale(
    w, scheme: Scheme, axes=None, calibrator: "str | Calibrator" = "minmax"
) -> tf.Tensor:
    """The scale of weights, as a calibrator chooses it for each of their channels or groups.

    Args:
        w: Float tensor of any rank, of known shape.
        scheme: A symmetric scheme.
        axes: Axes that share one scale; see `tfcompress.ops.fake_quant.weight_grid`.
        calibrator: A name or a calibrator; `"minmax"` gives `ops.fake_quant.weight_scale`.

    Returns:
        A float32 scale, broadcastable to `w`; 1 where every weight is 0.

    Raises:
        ValueError: The scheme is asymmetric, or the calibrator unknown.

    Example:

    >>> w = tf.constant([[1.27, 0.0], [-2.54, 0.0]])
    >>> weight_scale(w, Scheme(), axes=(0,), calibrator="minmax").numpy()
    array([[0.02, 1.  ]], dtype=float32)
    """
    if not scheme.symmetric:
        raise ValueError(
            f"Calibrated scales are for symmetric weights, got {scheme}; pass symmetric=True."
        )
    like = fq.compact_scale(fq.weight_scale(w, scheme, axes), w.shape, scheme, axes)
    rows = _rows(np.asarray(w, np.float32), scheme, axes)
    scales = _weight_scales(get(calibrator).thresholds(rows, scheme), scheme)
    scales = tf.convert_to_tensor(scales.reshape(like.shape))
    return fq.spread_scale(scales, w.shape, scheme, axes)


def _rows(w, scheme, axes):
    """Weights as a matrix, one row for what shares one scale, in the order of the scales."""
    rank = w.ndim
    if axes is None or scheme.granularity == "tensor":
        axes = range(rank)
    elif isinstance(axes, int):
        axes = (axes,)
    axes = sorted(axis % rank for axis in axes)
    if scheme.granularity == "group":
        # The axis is cut in two: that of the groups, and that inside of a group.
        axis, group = axes[-1], scheme.group_size
        missing = -w.shape[axis] % group
        w = np.pad(w, [(0, missing if a == axis else 0) for a in range(rank)])
        w = w.reshape(*w.shape[:axis], -1, group, *w.shape[axis + 1 :])
        axes = [*axes[:-1], axis + 1]
    others = [axis for axis in range(w.ndim) if axis not in axes]
    num_scales = math.prod(w.shape[axis] for axis in others)
    return w.transpose(*others, *axes).reshape(num_scales, -1)


def _weight_scales(thresholds, scheme):
    scales = (thresholds / scheme.limits[1]).astype(np.float32)
    scales = np.where(scales == 0, np.float32(1), scales)
    return fq.to_power_of_two(scales).numpy() if scheme.power_of_two else scales


def _searched_blocks(weights, make_cost):
    """The thresholds of the least cost; `make_cost(rows)` is `thresholds -> costs` of each row."""
    num_blocks = min(max(weights.size // _BLOCK, 1), len(weights))
    blocks = np.array_split(weights, num_blocks)
    return np.concatenate([_searched_rows(block, make_cost(block)) for block in blocks])


def _searched_rows(rows, cost):
    largest = np.abs(rows).max(axis=1)
    best, least = largest, cost(largest)

    def compare(candidates):
        nonlocal best, least
        found = cost(candidates)
        better = found < least
        best, least = np.where(better, candidates, best), np.where(better, found, least)

    for factor in _WEIGHT_COARSE[1:]:
        compare((largest * factor).astype(np.float32))
    for near in [np.minimum(best * factor, largest) for factor in _FINE]:
        compare(near.astype(np.float32))
    return best


def _weight_errors(rows, thresholds, scheme):
    scales = _weight_scales(thresholds, scheme)[:, None]
    low, high = scheme.limits
    rounded = np.clip(np.round(rows / scales), low, high) * scales
    return np.square(rounded - rows).mean(axis=1, dtype=np.float64)


def _weight_divergences(rows, thresholds, scheme):
    scales = _weight_scales(thresholds, scheme)[:, None]
    low, high = scheme.limits
    steps = np.round(rows / scales)
    # Behind those of the integers come the codes of what lies outside, and of zeros.
    integers = high - low + 1
    codes = np.where(np.abs(steps) > high, integers, steps - low)
    codes = np.where(rows == 0, integers + 1, codes).astype(np.int32)
    codes += np.arange(len(rows), dtype=np.int32)[:, None] * (integers + 2)
    counts = np.bincount(codes.ravel(), minlength=len(rows) * (integers + 2))
    held, outside, _ = np.split(counts.reshape(-1, integers + 2), [-2, -1], axis=1)
    count = np.count_nonzero(rows, axis=1)
    spread = rows.max(axis=1, initial=0) - rows.min(axis=1, initial=0)
    return _lost(held, outside[:, 0], scales[:, 0], count, spread)


class _Bins(NamedTuple):
    """The bins that hold anything but zeros."""

    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


_ZEROS = histogram.NUM_BINS // 2


def _bins(stream) -> _Bins:
    low, high = stream.extremes.astype(float)
    counts = stream.counts.astype(float)
    counts[_ZEROS] = 0
    (held,) = np.nonzero(counts)
    # Only the extremes are known exactly, so that the outermost bins end there.
    edges = np.clip(histogram.edges(), low, high)
    bins = _Bins(edges[held], edges[held + 1], counts[held])
    if len(held) == 1:
        # Values of one bin are one value, for all that is known, and it is an extreme.
        value = np.where(bins.high > 0, high, low)
        return _Bins(value, value, bins.count)
    return bins


def _all(bins, scheme):
    """The range that holds everything."""
    low = min(bins.low.min(initial=0), 0)
    high = max(bins.high.max(initial=0), 0)
    largest = max(-low, high)
    return np.array((-largest, largest) if scheme.symmetric else (low, high))


def _searched(bins: _Bins, scheme: Scheme, cost: Callable) -> tuple[float, float]:
    """The range of the least cost; the widest, of several.

    Args:
        bins: Of the values.
        scheme: Of the activations.
        cost: `(lows, highs) -> costs`, arrays of one dimension.
    """
    low, high = _all(bins, scheme)
    best = (np.inf, low, high)

    def compare(lows, highs):
        nonlocal best
        lows, highs = (np.atleast_1d(ends) for ends in np.broadcast_arrays(lows, highs))
        costs = cost(lows, highs)
        least = np.argmin(costs)
        best = min(best, (costs[least], lows[least], highs[least]), key=lambda found: found[0])

    def each_end(lows, highs):
        compare(lows, best[2])
        compare(best[1], highs)

    if not len(bins.count):
        return 0.0, 0.0
    compare(low * _COARSE, high * _COARSE)
    if scheme.symmetric:
        near = np.minimum(best[2] * _FINE, high)
        compare(-near, near)
        return best[1:]
    for _ in range(2):
        each_end(low * _COARSE, high * _COARSE)
    for _ in range(2):
        each_end(np.maximum(best[1] * _FINE, low), np.minimum(best[2] * _FINE, high))
    return best[1:]


def _grid(low, high, scheme):
    """Scale, smallest and largest step from zero, of many ranges; float64 `(ranges, 1)`."""
    ends = fq.grid_bounds((tf.constant(low, tf.float32), tf.constant(high, tf.float32)), scheme)
    scale, zero_point = (
        np.asarray(each, np.float64)[:, None] for each in fq.asymmetric_scale(*ends, scheme.bits)
    )
    smallest, largest = integer_limits(scheme.bits)
    return scale, smallest - zero_point, largest - zero_point


def _errors(bins: _Bins, low, high, scheme):
    """The mean squared error on each of many ranges."""
    grid = _grid(low, high, scheme)
    width = bins.high - bins.low
    from_low, at_low = _integrated_error(bins.low, *grid)
    from_high, _ = _integrated_error(bins.high, *grid)
    inside = (from_high - from_low) / np.where(width > 0, width, 1)
    return np.where(width > 0, inside, at_low) @ bins.count / max(bins.count.sum(), 1)


def _integrated_error(x, scale, smallest, largest):
    """The squared error summed up from 0 to x, and that of x."""
    steps = np.clip(np.round(x / scale), smallest, largest)
    off = x - steps * scale
    # A whole step adds scale^3 / 12; beyond the grid, `off` goes on growing.
    return steps * scale**3 / 12 + off**3 / 3, off**2


def _divergences(bins: _Bins, low, high, scheme):
    """The information lost on each of many ranges."""
    scale, smallest, _ = _grid(low, high, scheme)
    borders = (smallest + np.arange(2**scheme.bits + 1) - 0.5) * scale
    total = np.concatenate([[0], np.cumsum(bins.count)])
    ends = np.stack([bins.low, bins.high], axis=1).ravel()
    below = np.interp(borders, ends, np.stack([total[:-1], total[1:]], axis=1).ravel())
    held = np.diff(below)
    outside = np.maximum(total[-1] - held.sum(axis=1), 0)
    spread = bins.high.max(initial=0) - bins.low.min(initial=0)
    return _lost(held, outside, scale[:, 0], total[-1], spread)


def _lost(held, outside, scale, count, spread):
    """KL(float || quantized) but for a constant, in nats a value.

    Args:
        held: Values in each step of the grid, `(ranges, steps)`.
        outside: Values beyond it, `(ranges,)`.
        scale: Width of a step.
        count: Values altogether.
        spread: From the smallest to the largest of them.
    """
    count = np.maximum(count, 1)
    share, share_outside = held / count[..., None], outside / count
    density = share / scale[:, None]
    inside = (share * np.log(np.where(density > 0, density, 1))).sum(axis=1)
    unseen = np.log((count + 1) * np.where(spread > 0, spread, 1))
    return share_outside * unseen - inside


def _quantile(counts, outside, largest):
    """The smallest magnitude with at most `outside` values beyond; counts are from zero upwards."""
    beyond = np.cumsum(counts[::-1])
    place = np.searchsorted(beyond, outside, side="right")
    if place == len(counts):
        return 0.0
    low, high = np.minimum(histogram.edges()[[-2 - place, -1 - place]], largest)
    inside = outside - (beyond[place - 1] if place else 0)
    return high - (high - low) * inside / counts[::-1][place]
