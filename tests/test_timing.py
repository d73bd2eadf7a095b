import gc
import time

import pytest

from tfcompress.timing import Timing, latency


def test_the_median_of_a_sleep_is_the_sleep():
    result = latency({"sleep": lambda: time.sleep(0.002)}, Timing(rounds=7))["sleep"]
    assert 2.0 <= result.lower_ms <= result.median_ms <= result.upper_ms
    assert result.median_ms < 6.0
    assert result.rounds == 7


def test_rounds_are_interleaved_and_reproducible():
    def order(seed):
        calls = []
        fns = {name: lambda name=name: calls.append(name) or time.sleep(1e-4) for name in "abc"}
        latency(fns, Timing(rounds=6, warmup=1, min_ms=1e-9, seed=seed))
        return "".join(calls[3:])

    calls = order(0)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 1
    assert calls == order(0) != order(1)


def test_a_fast_call_is_repeated_within_a_measurement():
    count = [0]

    def fast():
        count[0] += 1

    latency({"fast": fast}, Timing(rounds=3, min_ms=0.5))
    assert count[0] > 3 * 10


def test_garbage_collection_waits_and_comes_back():
    seen = []
    latency({"x": lambda: seen.append(gc.isenabled())}, Timing(rounds=2, warmup=1, min_ms=1e-9))
    assert not any(seen[1:])
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": 0}, {"batch_sizes": (1, 0)}])
def test_timing_refuses_counts_below_one(bad):
    with pytest.raises(ValueError, match="at least 1"):
        Timing(**bad)
