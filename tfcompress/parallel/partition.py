"""Where to cut a row of layers, so that the slowest stage is as fast as it can be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# Among cuts whose slowest stage is this much slower, at most, the one that sends least is taken:
# costs are not known better.
_SLACK = 0.02


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one call of a layer costs with one micro-batch.

    Args:
        name: Of the layer or op.
        forward: Seconds of the forward pass.
        backward: Seconds of the backward pass.
        weight_bytes: Of its weights, those of an earlier call of the list excluded.
        output_bytes: Of what it returns.
        reads: Positions in the list of the calls whose outputs it reads.
        examples: In the micro-batch.
    """

    name: str
    forward: float
    backward: float
    weight_bytes: int = 0
    output_bytes: int = 0
    reads: tuple[int, ...] = ()
    examples: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
    """How `Pipeline` chooses its cuts.

    Args:
        costs: From `layer_costs`; None estimates them from the shapes of the model's inputs.
        bandwidth: Bytes a second between two devices.
        memory_limit: The most bytes of weights that a device may hold; None for no limit. Training
            adds as much for gradients, and for each slot of the optimizer.
    """

    costs: Sequence[LayerCost] | None = None
    bandwidth: float = 1e10
    memory_limit: int | None = None

    def __post_init__(self):
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth is in bytes a second, above 0; got {self.bandwidth!r}.")
        if self.memory_limit is not None and self.memory_limit < 1:
            raise ValueError(f"memory_limit is in bytes, 1 or more; got {self.memory_limit!r}.")


def partition(costs: Sequence[LayerCost], stages: int, balance: Balance | None = None) -> list[int]:
    """The first layer of each stage, and the number of layers.

    The time of a stage is that of its layers and of what it receives from earlier stages. The
    slowest one is made as fast as it can be, by dynamic programming over the cuts; of all cuts
    within 2% of that, the one that sends least.

    Args:
        costs: In the order of the graph.
        stages: How many.
        balance: Bandwidth and memory limit; its costs play no part here.

    Returns:
        `stages + 1` positions, from 0 to `len(costs)`.

    Raises:
        ValueError: More stages than layers, or no cut that keeps the memory limit.

    Example:

    >>> costs = [LayerCost(name, 1.0, 2.0) for name in "abcd"]
    >>> partition(costs, 2)
    [0, 2, 4]
    """
    return partitions(costs, [stages], balance)[stages]


def partitions(
    costs: Sequence[LayerCost], stages: Sequence[int], balance: Balance | None = None
) -> dict[int, list[int]]:
    """`partition` for several numbers of stages, in little more time than for the largest.

    Args:
        costs: In the order of the graph.
        stages: Numbers of stages.
        balance: See `partition`.

    Returns:
        Number of stages -> positions.

    Raises:
        ValueError: See `partition`.
    """
    balance = balance or Balance()
    for number in stages:
        if not 1 <= number <= len(costs):
            raise ValueError(
                f"{number} stages cannot be made of {len(costs)} layers: each needs one or more."
            )
    received = received_bytes(costs)
    # Gradients come back the same way.
    ways = 2 if any(cost.backward for cost in costs) else 1
    seconds = _stage_seconds(costs) + ways * received / balance.bandwidth
    if balance.memory_limit is not None:
        held = _sums([cost.weight_bytes for cost in costs])
        seconds[held > balance.memory_limit] = np.inf
    slowest, _ = _best(seconds, max(stages), np.maximum)
    return {
        number: _cut(costs, seconds, received, number, slowest[number], balance)
        for number in stages
    }


def _cut(costs, seconds, received, number, slowest, balance) -> list[int]:
    if not np.isfinite(slowest):
        largest = max(costs, key=lambda cost: cost.weight_bytes)
        raise ValueError(
            f"The weights, {sum(cost.weight_bytes for cost in costs):,} bytes, cannot be cut into "
            f"{number} stages of at most {balance.memory_limit:,}; the largest layer, "
            f"{largest.name!r}, has {largest.weight_bytes:,}. Use more devices or a larger limit."
        )
    allowed = np.where(seconds <= slowest * (1 + _SLACK), received, np.inf)
    _, firsts = _best(allowed, number, np.add)
    positions = [len(costs)]
    for count in range(number, 0, -1):
        positions.append(int(firsts[count][positions[-1]]))
    return positions[::-1]


def _best(values: np.ndarray, stages: int, combine) -> tuple[list[float], list[np.ndarray]]:
    """The least `combine`d value of a row of stages, for each number of them.

    Args:
        values: Of the stage from layer i to before layer j, at `[i, j]`.
        stages: The largest number.
        combine: `np.maximum` or `np.add`.

    Returns:
        By the number of stages: the least value for all layers; for each end of the last stage,
        where it begins.
    """
    size = len(values)
    best = np.where(np.arange(size) == 0, 0.0, np.inf)
    least, firsts = [np.inf], [np.zeros(size, int)]
    for _ in range(stages):
        table = combine(best[:, None], values)
        firsts.append(table.argmin(0))
        best = table.min(0)
        least.append(float(best[-1]))
    return least, firsts


def _sums(values: Sequence[float]) -> np.ndarray:
    """Of the values from i to before j, at `[i, j]`."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[None, :] - total[:, None]


def _stage_seconds(costs) -> np.ndarray:
    seconds = _sums([cost.forward + cost.backward for cost in costs])
    begin, end = np.indices(seconds.shape)
    return np.where(begin < end, seconds, np.inf)


def received_bytes(costs: Sequence[LayerCost]) -> np.ndarray:
    """What a stage receives from earlier ones, in bytes.

    Args:
        costs: In the order of the graph.

    Returns:
        Of the stage from layer i to before layer j, at `[i, j]`.
    """
    size = len(costs) + 1
    steps = np.zeros((size, size + 1))
    readers: dict[int, list[int]] = {}
    for position, cost in enumerate(costs):
        for read in dict.fromkeys(cost.reads):
            readers.setdefault(read, []).append(position)
    for made, places in readers.items():
        # A stage that begins behind the maker receives once, from its first reader on.
        for before, reader in itertools.pairwise([made, *places]):
            steps[before + 1 : reader + 1, reader + 1] += costs[made].output_bytes
    return np.cumsum(steps, axis=1)[:, :size]
