"""Which rank each layer gets: by energy or ratio layer by layer, or by a budget for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfcompress.graph.low_rank import ROUNDING


@dataclasses.dataclass(frozen=True)
class Option:
    """A kernel as a product.

    Args:
        method: A key of `tfcompress.graph.low_rank.METHODS`; None for the kernel as it is.
        ranks: What its `factors` take.
        parameters: Weights in the factors.
        macs: Multiply-accumulates of one example; 0 where nobody asks.
        error: The share of the energy that is lost, in [0, 1].
    """

    method: str | None
    ranks: tuple[int, ...]
    parameters: int
    macs: int
    error: float


def by_energy(options: Sequence[Option], energy: float) -> Option | None:
    """The smallest option that keeps so much of the energy.

    Args:
        options: Of one kernel.
        energy: In (0, 1].

    Example:

    >>> options = [Option("svd", (1,), 8, 0, 0.3), Option("svd", (2,), 16, 0, 0.1)]
    >>> by_energy(options, 0.8).ranks
    (2,)
    """
    good = [each for each in options if each.error <= 1 - energy + ROUNDING]
    return min(good, key=lambda each: (each.parameters, each.error), default=None)


def by_ratio(options: Sequence[Option], parameters: int, ratio: float) -> Option | None:
    """The best option that removes so large a share of the parameters.

    Args:
        options: Of one kernel.
        parameters: Of the kernel as it is.
        ratio: In (0, 1).

    Example:

    >>> options = [Option("svd", (1,), 8, 0, 0.3), Option("svd", (2,), 16, 0, 0.1)]
    >>> by_ratio(options, parameters=20, ratio=0.5).ranks
    (1,)
    """
    # What the product of floats adds must not cost a rank.
    most = parameters * (1 - ratio) + 1e-6
    good = [each for each in options if each.parameters <= most]
    return min(good, key=lambda each: (each.error, each.parameters), default=None)


def share_out(
    options: Mapping[Any, Sequence[Option]], cost: str, budget: float
) -> dict[Any, Option]:
    """One option a kernel, of a small sum of errors, so that all of them together meet a budget.

    Each kernel takes the option of the least `error + price * cost`. The price at which they meet
    the budget is found by bisection; what they leave of it goes to the largest gains that fit.

    Args:
        options: By kernel; the kernel as it is should be among its options.
        cost: `"parameters"` or `"macs"`.
        budget: The largest sum of costs.

    Raises:
        ValueError: The cheapest options cost more.

    Example:

    >>> def options(*errors):
    ...     return [Option("svd", (r,), 10 * r, 0, e) for r, e in enumerate(errors, 1)]
    >>> kernels = {"steep": options(0.9, 0.1, 0.0), "flat": options(0.2, 0.1, 0.0)}
    >>> {name: each.ranks for name, each in share_out(kernels, "parameters", 30).items()}
    {'steep': (2,), 'flat': (1,)}
    """
    costs = [np.array([getattr(each, cost) for each in found]) for found in options.values()]
    errors = [np.array([each.error for each in found]) for found in options.values()]
    least = sum(int(each.min()) for each in costs)
    if budget < least:
        raise ValueError(f"{cost} can be lowered to {least}, not to {budget}")

    def chosen(price):
        return [int(np.argmin(e + price * c)) for e, c in zip(errors, costs, strict=True)]

    def spent(picks):
        return sum(int(c[pick]) for c, pick in zip(costs, picks, strict=True))

    picks = chosen(0.0)
    if spent(picks) > budget:
        # Costs are whole numbers and errors at most 1: at a price of 2, the cheapest wins.
        low, high = 1e-18, 2.0
        for _ in range(60):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if spent(chosen(middle)) > budget else (low, middle)
        picks = _spend(chosen(high), costs, errors, budget)
    return {name: found[pick] for (name, found), pick in zip(options.items(), picks, strict=True)}


def _spend(picks, costs, errors, budget) -> list[int]:
    """`picks`, with the largest gain that the budget still allows, again and again."""
    left = budget - sum(c[pick] for c, pick in zip(costs, picks, strict=True))
    while True:
        gains = []
        for i, pick in enumerate(picks):
            fits = costs[i] <= costs[i][pick] + left
            best = int(np.argmin(np.where(fits, errors[i], np.inf)))
            gains.append((errors[i][pick] - errors[i][best], i, best))
        gain, i, best = max(gains)
        if gain <= 0:
            return picks
        left += costs[i][picks[i]] - costs[i][best]
        picks[i] = best
