"""Cutting a row of layers into stages."""

import itertools

import numpy as np
import pytest

from tfcompress.parallel.partition import (
    Balance,
    LayerCost,
    partition,
    partitions,
    received_bytes,
)


def row(forwards, **fields):
    """Layers that each read the one before."""
    return [
        LayerCost(f"layer_{i}", seconds, 0.0, reads=(i - 1,) if i else (), **fields)
        for i, seconds in enumerate(forwards)
    ]


def slowest(costs, positions, bandwidth):
    received = received_bytes(costs)
    return max(
        sum(cost.forward + cost.backward for cost in costs[i:j]) + received[i, j] / bandwidth
        for i, j in itertools.pairwise(positions)
    )


def test_stages_take_the_same_time():
    assert partition(row([1, 1, 1, 3, 2, 4]), 3) == [0, 3, 5, 6]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("bandwidth", [1e10, 10.0, 1.0])
def test_no_other_cut_is_better(stages, bandwidth):
    random = np.random.default_rng(stages)
    costs = [
        LayerCost(
            str(i),
            float(random.uniform(0.1, 2)),
            0.0,
            output_bytes=int(random.integers(0, 20)),
            reads=tuple({*random.integers(0, i, 2).tolist()}) if i else (),
        )
        for i in range(9)
    ]
    found = partition(costs, stages, Balance(bandwidth=bandwidth))
    best = min(
        slowest(costs, [0, *cuts, 9], bandwidth)
        for cuts in itertools.combinations(range(1, 9), stages - 1)
    )
    assert slowest(costs, found, bandwidth) <= best * 1.02 + 1e-9


def test_what_is_sent_counts_once_a_stage_and_from_the_first_reader():
    costs = [
        LayerCost("a", 1.0, 0.0, output_bytes=5),
        LayerCost("b", 1.0, 0.0, output_bytes=7, reads=(0,)),
        LayerCost("c", 1.0, 0.0, output_bytes=9, reads=(0, 1)),
        LayerCost("d", 1.0, 0.0, reads=(0, 2)),
    ]
    received = received_bytes(costs)
    assert received[0, 4] == 0
    assert received[1, 4] == 5  # a, though all of b, c and d read it
    assert received[2, 3] == received[2, 4] == 12  # a and b
    assert received[3, 4] == 14  # the skip from a, and c


def test_a_narrow_place_is_taken_where_times_are_equal():
    costs = row([1.0, 0.001, 0.001, 1.0], output_bytes=10**6)
    costs[1] = LayerCost("narrow", 0.001, 0.0, output_bytes=10, reads=(0,))
    assert partition(costs, 2) == [0, 2, 4]


def test_gradients_come_back_over_the_same_cut():
    costs = [
        LayerCost("a", 1.0, 1.0, output_bytes=10),
        LayerCost("b", 1.0, 1.0, output_bytes=10, reads=(0,)),
        LayerCost("c", 1.5, 1.5, reads=(1,)),
    ]
    # 20 bytes at 20 bytes a second: 4 + 1 seconds for two layers with a cut before them.
    assert partition(costs, 2, Balance(bandwidth=20.0)) == [0, 2, 3]


def test_a_memory_limit_moves_the_cut():
    costs = row([1.0, 1.0, 1.0, 3.0])
    costs = [LayerCost(c.name, c.forward, 0.0, weight_bytes=100, reads=c.reads) for c in costs]
    assert partition(costs, 2) == [0, 3, 4]
    assert partition(costs, 2, Balance(memory_limit=200)) == [0, 2, 4]


def test_a_limit_that_no_cut_keeps_is_explained():
    costs = row([1.0, 1.0], weight_bytes=100)
    with pytest.raises(ValueError, match=r"200 bytes, cannot be cut into 2 stages of at most 50"):
        partition(costs, 2, Balance(memory_limit=50))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 stages cannot be made of 2 layers"):
        partition(row([1.0, 1.0]), 3)


def test_several_numbers_of_stages_at_once_are_those_of_each():
    costs = row([1, 4, 2, 2, 3, 1, 5], output_bytes=100)
    found = partitions(costs, [1, 2, 4, 7])
    assert found == {number: partition(costs, number) for number in (1, 2, 4, 7)}


def test_bad_values_are_refused_at_once():
    with pytest.raises(ValueError, match="bandwidth is in bytes a second, above 0"):
        Balance(bandwidth=0)
    with pytest.raises(ValueError, match="memory_limit is in bytes, 1 or more"):
        Balance(memory_limit=0)
