"""The predicted step of a pipeline."""

import time

import pytest

from tfcompress.parallel.partition import LayerCost
from tfcompress.parallel.simulate import Link, simulate


def uniform(number, forward=1.0, backward=2.0, **fields):
    return [
        LayerCost(str(i), forward, backward, reads=(i - 1,) if i else (), **fields)
        for i in range(number)
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (4, 4), (4, 16), (8, 2)])
def test_equal_stages_have_the_bubble_of_the_papers(schedule, stages, microbatches):
    found = simulate(uniform(8), stages, microbatches, stages, schedule)
    assert found.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert found.seconds == pytest.approx((microbatches + stages - 1) * 3 * 8 / stages)
    assert found.throughput == pytest.approx(microbatches / found.seconds)


def test_inference_needs_no_way_back():
    found = simulate(uniform(4, backward=0.0), 4, 8)
    assert found.stages == 1 or found.seconds == pytest.approx(8 + 4 - 1)
    assert simulate(uniform(4, backward=0.0), 4, 8, stages=4).seconds == pytest.approx(11)


def test_the_slowest_stage_sets_the_pace():
    costs = [LayerCost("a", 1.0, 0.0), LayerCost("b", 5.0, 0.0, reads=(0,))]
    assert simulate(costs, 2, 10, stages=2).seconds == pytest.approx(1 + 10 * 5)


def test_each_cut_delays_the_first_microbatch_by_its_transfer():
    costs = uniform(2, backward=0.0, output_bytes=100)
    found = simulate(costs, 2, 4, stages=2, link=Link(bandwidth=200.0, latency=0.25))
    # The transfers of the others run while the stages work.
    assert found.seconds == pytest.approx(1 + (0.25 + 0.5) + 4)


def test_1f1b_keeps_fewer_activations():
    costs = uniform(4, output_bytes=1000, weight_bytes=10)
    gpipe = simulate(costs, 4, 16, stages=4, schedule="gpipe")
    one = simulate(costs, 4, 16, stages=4, schedule="1f1b")
    # Weights, gradients and two slots; then one output a micro-batch in flight.
    assert gpipe.memory == (16040,) * 4
    assert one.memory == (4040, 3040, 2040, 1040)
    assert one.seconds == pytest.approx(gpipe.seconds)


def test_replicas_take_their_part_and_sum_their_gradients():
    costs = uniform(2, weight_bytes=400)
    one = simulate(costs, 2, 4, stages=2)
    four = simulate(costs, 8, 4, stages=2, link=Link(bandwidth=100.0))
    assert (four.replicas, four.examples) == (4, 4 * one.examples)
    assert four.seconds == pytest.approx(one.seconds + 2 * 3 / 4 * 400 / 100)


def test_the_fastest_number_of_stages_is_chosen():
    slow = Link(bandwidth=1.0)
    # Without weights to reduce, replicas have no bubble; with many, stages are better.
    assert simulate(uniform(8), 8, 4, link=slow).stages == 1
    assert simulate(uniform(8, weight_bytes=10**4), 8, 4, link=slow).stages == 8


def test_thousands_of_devices_take_seconds():
    start = time.perf_counter()
    costs = uniform(512, forward=1e-3, backward=2e-3, weight_bytes=10**6, output_bytes=10**5)
    found = simulate(costs, 4096, 64, stages=128)
    assert found.replicas == 32
    assert 0 < found.bubble < 1
    assert time.perf_counter() - start < 60


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="stages must divide devices, got 3 stages and 8 devices"):
        simulate(uniform(4), 8, stages=3)
    with pytest.raises(ValueError, match="devices must be a whole number, 1 or more, got 0"):
        simulate(uniform(4), 0)
    with pytest.raises(ValueError, match="costs is empty"):
        simulate([], 2)
    with pytest.raises(ValueError, match="bandwidth above 0"):
        Link(bandwidth=-1)
