"""How long calls take, measured so that two of them can be compared."""

import contextlib
import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """How to measure latency.

    Args:
        batch_sizes: Examples a call, each size is measured on its own.
        rounds: Measurements of each callable; the median is reported.
        min_ms: Shortest measurement; a faster call is repeated within one.
        warmup: Calls before anything is measured.
        num_threads: Threads for exported files. A Keras model runs on the threads that TensorFlow
            was started with, so 1, the default, is never in favour of the file.
        seed: Fixes the order of the callables within each round.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    rounds: int = 31
    min_ms: float = 2.0
    warmup: int = 3
    num_threads: int | None = 1
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1 or self.warmup < 1 or any(size < 1 for size in self.batch_sizes):
            raise ValueError(
                f"rounds, warmup and batch sizes must be at least 1, {self} was passed. "
                "Use e.g. Timing(batch_sizes=(1, 32), rounds=31)."
            )


@dataclasses.dataclass(frozen=True)
class Latency:
    """The median of many timings of one call, with its quartiles, in milliseconds."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    rounds: int


def latency(
    callables: Mapping[str, Callable[[], object]], timing: Timing | None = None
) -> dict[str, Latency]:
    """Time several calls against each other.

    All are warmed up first. Then each round times every callable once, in a new random order, so
    that a slow phase of the machine meets all of them; garbage collection waits until the end.

    Args:
        callables: Functions without arguments, by name.
        timing: How often and how long; `batch_sizes` and `num_threads` play no part here.

    Returns:
        A `Latency` for each name.

    Example:

    >>> result = latency({"short": lambda: sum(range(100)), "long": lambda: sum(range(10_000))})
    >>> result["short"].median_ms < result["long"].median_ms
    True
    """
    timing = timing or Timing()
    repeats = {name: _warm_up(fn, timing) for name, fn in callables.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order, shuffle = list(callables), random.Random(timing.seed).shuffle
    with _no_garbage_collection():
        for _ in range(timing.rounds):
            shuffle(order)
            for name in order:
                samples[name].append(_milliseconds(callables[name], repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _warm_up(fn: Callable[[], object], timing: Timing) -> int:
    """Call until warm; how many calls make one measurement of at least `min_ms`."""
    fastest = min(_milliseconds(fn, 1) for _ in range(timing.warmup))
    return max(1, math.ceil(timing.min_ms / max(fastest, 1e-4)))


def _milliseconds(fn: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) * 1e3 / repeats


def _summary(values: list[float]) -> Latency:
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return Latency(float(median), float(lower), float(upper), len(values))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
