"""What a pipeline over many devices would do, from what each layer costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from tfcompress.parallel.order import interleaved, needs, order
from tfcompress.parallel.partition import Balance, LayerCost, partitions, received_bytes


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A training or inference step on several devices.

    Args:
        devices: `stages * replicas`.
        stages: Of the pipeline.
        replicas: Copies of the pipeline, each with its part of the batch.
        positions: The first layer of each stage, and the number of layers.
        seconds: Of a step.
        examples: Of a step, over all replicas.
        bubble: The part of the step that the devices idle, on average.
        memory: For each stage the bytes that its device holds at the most: weights, their
            gradients, slots of the optimizer, and the activations of the micro-batches that have
            not been backward yet.
    """

    devices: int
    stages: int
    replicas: int
    positions: tuple[int, ...]
    seconds: float
    examples: int
    bubble: float
    memory: tuple[int, ...]

    @property
    def throughput(self) -> float:
        """Examples a second."""
        return self.examples / self.seconds


@dataclasses.dataclass(frozen=True)
class Link:
    """Between two devices.

    Args:
        bandwidth: Bytes a second.
        latency: Seconds that each message takes on top.
    """

    bandwidth: float = 1e10
    latency: float = 0.0

    def __post_init__(self):
        if not self.bandwidth > 0 or self.latency < 0:
            raise ValueError(
                "A link has a bandwidth above 0, in bytes a second, and a latency of 0 seconds or "
                f"more; got {self}."
            )

    def seconds(self, size: float) -> float:
        """For so many bytes; nothing takes no time."""
        return self.latency + size / self.bandwidth if size else 0.0


def simulate(
    costs: Sequence[LayerCost],
    devices: int,
    microbatches: int = 4,
    stages: int | None = None,
    schedule: str = "1f1b",
    link: Link | None = None,
    slots: int = 2,
) -> Simulation:
    """Predict the step of a pipeline on a number of devices.

    Devices make `devices / stages` replicas of a pipeline of `stages`. Every stage does its work in
    the order of the schedule, as soon as what it needs has come over the link, which carries any
    number of messages at once; then the replicas sum their gradients in a ring, of which each
    device sends and gets `2 (r - 1) / r` of its weights' bytes. The update is not counted, nor are
    ops that run side by side within a device, nor anything that devices share: where they share
    cores or memory, as logical CPUs do, the prediction is too good.

    Args:
        costs: Of one micro-batch, from `layer_costs`; backward costs of 0 make it inference.
        devices: How many.
        microbatches: In a step, for each replica.
        stages: Of the pipeline, a divisor of `devices`; None takes the one that is fastest for an
            example.
        schedule: `"1f1b"` or `"gpipe"`.
        link: Between any two devices.
        slots: Of the optimizer, for each weight: 2 for Adam.

    Returns:
        A `Simulation`.

    Raises:
        ValueError: Numbers below 1, `stages` that do not divide `devices`, more stages than layers.

    Example:

    >>> layers = [LayerCost(str(i), forward=1.0, backward=2.0) for i in range(8)]
    >>> found = simulate(layers, devices=4, microbatches=8, stages=4)
    >>> found.seconds, round(found.bubble, 3)  # bubble: (stages - 1) / (microbatches + stages - 1)
    (66.0, 0.273)
    >>> simulate(layers, devices=4096, microbatches=8).devices
    4096

    Reference: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.
    """
    link = link or Link()
    for name, number in (("devices", devices), ("microbatches", microbatches)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {number!r}.")
    if stages is not None and (stages < 1 or devices % stages):
        raise ValueError(
            f"stages must divide devices, got {stages} stages and {devices} devices. Use e.g. "
            f"stages={max(d for d in _divisors(devices) if d <= max(stages, 1))}."
        )
    if not costs:
        raise ValueError("costs is empty; pass those of tfcompress.parallel.layer_costs.")
    candidates = [stages] if stages else [each for each in _divisors(devices) if each <= len(costs)]
    cuts = partitions(costs, candidates, Balance(bandwidth=link.bandwidth))
    received = received_bytes(costs)
    found = [
        _step(costs, cuts[each], received, devices, microbatches, schedule, link, slots)
        for each in candidates
    ]
    return max(found, key=lambda each: each.throughput)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _step(costs, positions, received, devices, microbatches, schedule, link, slots) -> Simulation:
    stages = [costs[i:j] for i, j in itertools.pairwise(positions)]
    replicas = devices // len(stages)
    forward = [sum(cost.forward for cost in stage) for stage in stages]
    backward = [sum(cost.backward for cost in stage) for stage in stages]
    sent = [link.seconds(received[i, j]) for i, j in itertools.pairwise(positions)]
    training = any(backward)
    works = order(schedule, len(stages), microbatches)
    if not training:
        works = [[work for work in own if not work.backward] for own in works]
    finished, free = {}, [0.0] * len(stages)
    for work in interleaved(works):
        needed = needs(work, len(stages))
        # What a stage receives forward, it sends as gradients backward.
        way = sent[work.stage + 1 if work.backward and needed else work.stage] if needed else 0.0
        begin = max(free[work.stage], finished[needed] + way if needed else 0.0)
        seconds = (backward if work.backward else forward)[work.stage]
        finished[work] = free[work.stage] = begin + seconds
    weights = [sum(cost.weight_bytes for cost in stage) for stage in stages]
    reduced = [
        link.seconds(2 * (replicas - 1) / replicas * size) if training else 0.0 for size in weights
    ]
    total = max(time + more for time, more in zip(free, reduced, strict=True))
    busy = microbatches * (sum(forward) + sum(backward))
    copies = 2 + slots if training else 1
    memory = tuple(
        copies * size + _kept(works[place]) * sum(cost.output_bytes for cost in stage)
        for place, (size, stage) in enumerate(zip(weights, stages, strict=True))
    )
    examples = microbatches * replicas * costs[0].examples
    return Simulation(
        devices=devices,
        stages=len(stages),
        replicas=replicas,
        positions=tuple(positions),
        seconds=total,
        examples=examples,
        bubble=1 - busy / (total * len(stages)) if total else 0.0,
        memory=memory,
    )


def _kept(works) -> int:
    """The most micro-batches that a stage has been forward, and not backward, with."""
    if not any(work.backward for work in works):
        return 1
    kept = most = 0
    for work in works:
        kept += -1 if work.backward else 1
        most = max(most, kept)
    return most
