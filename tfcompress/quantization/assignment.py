"""One scheme for each weight: the least summed error within budgets, as an integer program."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tfcompress.optional import require

# Path -> name of the candidate -> number.
Table = Mapping[str, Mapping[str, float]]

_UNITS = {"size": "bytes", "bops": "bit operations", "latency": "ms"}
# Rows and objective are scaled to this, as the solver's tolerances are absolute, 1e-6 or less.
_SCALE = 1e6
_MAX_CUTS = 100


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a quantized model may cost; all limits that are given hold at once.

    Args:
        size: Bytes of the weights; up to 1, as a fraction of their bytes in float32. Integers count
            as packed, with 4 bytes for each scale and each zero point.
        bops: Bit operations of one example, multiply-accumulates times bits of the weight times
            bits of the activation; up to 1, as a fraction of those in float32.
        latency: Milliseconds, summed over the weights that are chosen for.
        latencies: What `latency` adds up: `{path: {candidate: ms}}`, or a function
            `(path, candidate) -> ms`, as measured on the target. Candidates are named as in
            `Sensitivities`: `"int8"`, `"w4a8"`.

    Raises:
        ValueError: No limit, one that is not a number above 0, or one of the last two without the
            other.

    Example:

    >>> Budget(size=0.2).limits({"size": Cost({}, full=1000.0)})
    {'size': 200.0}
    """

    size: float | None = None
    bops: float | None = None
    latency: float | None = None
    latencies: Callable[[str, str], float] | Table | None = None

    def __post_init__(self):
        given = self._given()
        if not given:
            raise ValueError(
                "A Budget needs a limit, e.g. Budget(size=0.2): a fifth of the bytes in float32."
            )
        for kind, limit in given.items():
            if not (isinstance(limit, numbers.Real) and math.isfinite(limit) and limit > 0):
                raise ValueError(
                    f"Budget has {kind}={limit!r}; pass a number of {_UNITS[kind]} above 0."
                )
        if (self.latency is None) != (self.latencies is None):
            raise ValueError(
                f"Budget has latency={self.latency!r} and latencies={self.latencies!r}; pass both: "
                "milliseconds in total, and those of each weight and candidate."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which limits there are: some of `"size"`, `"bops"`, `"latency"`."""
        return tuple(self._given())

    def limits(self, costs: Mapping[str, "Cost"]) -> dict[str, float]:
        """The limits in bytes, bit operations and milliseconds, fractions resolved."""
        return {
            kind: limit * costs[kind].full if kind != "latency" and limit <= 1 else float(limit)
            for kind, limit in self._given().items()
        }

    def _given(self) -> dict[str, float]:
        return {kind: getattr(self, kind) for kind in _UNITS if getattr(self, kind) is not None}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What each choice costs.

    Args:
        table: Path -> candidate -> cost, 0 or more.
        rest: What there is no choice about costs this much.
        full: The cost of the model in float32, of which a limit may be a fraction.
    """

    table: Table
    rest: float = 0.0
    full: float = math.nan

    def total(self, chosen: Mapping[str, str]) -> float:
        """The cost of an assignment, path -> candidate.

        Example:

        >>> Cost({"a": {"int4": 2.0, "int8": 4.0}}, rest=1.0).total({"a": "int8"})
        5.0
        """
        return self.rest + math.fsum(self.table[path][name] for path, name in chosen.items())


def search(errors: Table, costs: Mapping[str, Cost], budget: Budget) -> dict[str, str]:
    """The candidate of each weight with the least summed error whose costs keep to the budget.

    Solved exactly, by branch and bound. The errors are added up, as if that of one weight did not
    depend on the others; one below 0 counts as 0.

    Args:
        errors: Path -> candidate -> error, e.g. `Sensitivities.errors`; the candidates of one path
            may differ from those of another.
        costs: For each limit of `budget` (`"size"`, `"bops"`, `"latency"`) a `Cost` that knows
            every path and candidate of `errors`.
        budget: The limits.

    Returns:
        Path -> candidate.

    Raises:
        ValueError: The budget cannot be kept (the message has the smallest value that can), or a
            number is missing, or not finite.
        ImportError: scipy is missing.

    Example:

    >>> errors = {"robust": {"int4": 0.1, "int8": 0.0}, "fragile": {"int4": 0.9, "int8": 0.0}}
    >>> bytes = {path: {"int4": 50.0, "int8": 100.0} for path in errors}
    >>> search(errors, {"size": Cost(bytes)}, Budget(size=150))
    {'robust': 'int4', 'fragile': 'int8'}

    Reference: Yao et al. 2020 (HAWQ-V3), https://arxiv.org/abs/2011.10680.
    """
    problem = _Problem(errors, {kind: costs[kind] for kind in budget.kinds}, budget.limits(costs))
    chosen = problem.best()
    if chosen is None:
        raise ValueError(_reachable(problem))
    return problem.named(chosen)


class _Problem:
    """One variable of 0 or 1 for each path and candidate; each path takes one."""

    def __init__(self, errors: Table, costs: Mapping[str, Cost], limits: Mapping[str, float]):
        self.choices = [(path, name) for path, names in errors.items() for name in names]
        self.errors = np.maximum([_number("error", errors, *each) for each in self.choices], 0.0)
        self.loads = {
            kind: np.array([_number(kind, cost.table, *each) for each in self.choices])
            for kind, cost in costs.items()
        }
        self.costs, self.limits = costs, limits
        paths = {path: i for i, path in enumerate(errors)}
        self.one_each = np.zeros((len(paths), len(self.choices)))
        for j, (path, _) in enumerate(self.choices):
            self.one_each[paths[path], j] = 1.0

    def named(self, x: np.ndarray) -> dict[str, str]:
        return dict(each for each, taken in zip(self.choices, x, strict=True) if taken)

    def best(self) -> np.ndarray | None:
        """The choices with the least error, or None if none keep to the limits."""
        first = self.solve(self.errors, self.limits)
        if first is None or not self.errors @ first:
            return first
        # Errors span many orders of magnitude. What is worse on its own than the whole of a
        # solution is not in the best one; without it, the solver can tell the others apart.
        bound = self.errors @ first
        second = self.solve(self.errors, self.limits, self.errors <= bound)
        return min(first, first if second is None else second, key=lambda x: self.errors @ x)

    def solve(self, objective, kinds, allowed=None) -> np.ndarray | None:
        """The choices, among those allowed, that minimize `objective` within limits of `kinds`."""
        optimize = require("scipy.optimize", extra="search")
        allowed = np.ones(len(objective)) if allowed is None else allowed.astype(float)
        scale = np.max(objective * allowed, initial=0.0) or 1.0
        constraints = [optimize.LinearConstraint(self.one_each, 1.0, 1.0)]
        constraints += [optimize.LinearConstraint(*row) for row in self._rows(kinds)]
        for _ in range(_MAX_CUTS):
            found = optimize.milp(
                objective * allowed * (_SCALE / scale),
                integrality=np.ones(len(objective)),
                bounds=optimize.Bounds(0.0, allowed),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
            if found.status == 2:
                return None
            if found.x is None:
                raise RuntimeError(f"scipy.optimize.milp found no assignment: {found.message}")
            x = found.x > 0.5
            if all(self.cost(kind, x) <= self.limits[kind] for kind in kinds):
                return x
            # Over the limit by less than the solver's tolerance.
            constraints.append(optimize.LinearConstraint(x.astype(float), 0.0, x.sum() - 1.0))
        raise RuntimeError(
            f"{_MAX_CUTS} assignments were within rounding of the limits {dict(self.limits)}, and "
            "over them. Lower the limits by a millionth."
        )

    def cost(self, kind: str, x: np.ndarray) -> float:
        return self.costs[kind].total(self.named(x))

    def _rows(self, kinds) -> Iterator[tuple[np.ndarray, float, float]]:
        for kind in kinds:
            left = self.limits[kind] - self.costs[kind].rest
            scale = _SCALE / (abs(left) or 1.0)
            yield self.loads[kind] * scale, -np.inf, left * scale


def _number(what: str, table: Table, path: str, name: str) -> float:
    number = table.get(path, {}).get(name)
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise ValueError(
            f"The {what} of {path!r} as {name!r} is {number!r}; expected a finite number for every "
            "path and candidate."
        )
    return float(number)


def _reachable(problem: _Problem) -> str:
    """The message that says what could be reached."""
    alone = {kind: _smallest(problem, kind, others=()) for kind in problem.limits}
    found = {kind: least for kind, least in alone.items() if least > problem.limits[kind]}
    condition = ""
    if not found:
        condition = " while the other limits hold"
        joint = {
            kind: _smallest(problem, kind, [each for each in problem.limits if each != kind])
            for kind in problem.limits
        }
        found = {kind: least for kind, least in joint.items() if least is not None}
    told = "; ".join(
        f"{kind}={problem.limits[kind]:.10g}, where the smallest reachable is {least:.10g} "
        f"{_UNITS[kind]}{_fraction(least, problem.costs[kind])}{condition}"
        for kind, least in found.items()
    )
    told = told or f"of {dict(problem.limits)}, several limits must be raised"
    return f"The budget cannot be kept: {told}. Raise the limit, or add candidates with fewer bits."


def _smallest(problem: _Problem, kind: str, others) -> float | None:
    x = problem.solve(problem.loads[kind], others)
    return None if x is None else problem.cost(kind, x)


def _fraction(value: float, cost: Cost) -> str:
    """Rounded up, so that it can be kept."""
    share = value / cost.full
    return "" if math.isnan(share) else f" ({math.ceil(share * 1e4) / 1e4:g} of float32)"
