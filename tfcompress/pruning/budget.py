"""Budgets: the least damaging sparsities of the weights whose cost stays within a limit."""

import glob
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import numpy as np

from tfcompress.keras_hooks.walk import select_kernels
from tfcompress.optional import require

# (path, sparsity) -> damage.
Damage = Callable[[str, float], float]
# {path: sparsity} -> cost.
Cost = Callable[[dict[str, float]], float]

_ENERGY_POINTS = 4096
_GRID_POINTS = 21
_RANDOM_STARTS = 2
_FINE, _COARSE = 1e-3, 1e-2


def budget(
    model: keras.Model,
    cost: Cost,
    limit: float,
    damage=None,
    max_sparsity: float = 0.99,
    include=None,
    exclude=None,
) -> dict[str, float]:
    """The sparsities with the least summed damage whose cost is at most `limit`.

    Minimizes `sum over weights of damage(weight, sparsity)` over sparsities in [0, max_sparsity]
    with `cost(sparsities) <= limit`. A cost whose slopes over one hundredth and one thousandth of
    sparsity agree is taken for smooth, and SLSQP solves it, which follows slopes and needs the
    fewest calls. Any other (it counts whole weights, blocks or bytes, or it is measured) would
    mislead it, as its slopes are 0 or noise: there [COBYQA](https://www.cobyqa.com) builds models
    of the cost from its values over a shrinking radius. Neither finds more than a local optimum
    where a damage is not convex or the cost has steps, so that there are several starts: all
    weights alike, the best on a grid under a price for cost
    ([Shoham & Gersho 1988](https://doi.org/10.1109/29.90373)), and random ones, of which COBYQA,
    being slow, gets the best two. The best of the starts and solutions is moved towards
    `max_sparsity` until the limit holds, if it does not, and then each weight back as far as it
    may.

    Args:
        model: A built Keras model; it is not changed.
        cost: {path: fraction of zeros} -> a number that does not rise with any fraction: bytes,
            MACs, a measured latency. It gets every selected weight by its variable's path, is
            called some hundred times a weight, and never twice with the same fractions.
        limit: The largest cost allowed, in the units of `cost`.
        damage: A `Sensitivity`, or a function (path, fraction of zeros) -> damage that does not
            fall. None for the share of each weight's own energy, `sum(w ** 2)`, that magnitude
            pruning removes; it is convex.
        max_sparsity: The largest fraction of zeros of any weight, in (0, 1).
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.

    Returns:
        {glob: fraction of zeros}, for `sparsity=` of `tfcompress.prune` and
        `tfcompress.callbacks.Pruning`; the glob is the weight's path, with `*?[` escaped. All 0
        where the model as it is costs no more than the limit.

    Raises:
        ValueError: The limit cannot be reached (the message has the lowest cost), a value is out of
            range or not a number, a weight is not finite or not in the `Sensitivity`, a glob
            matches nothing.
        ImportError: scipy is missing.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(100, name="wide"), keras.layers.Dense(2)]
    >>> model = keras.Sequential(layers)
    >>> sizes = {each.path: math.prod(each.shape) for each in model.trainable_variables}
    >>> def kept(sparsities):
    ...     return sum(sizes[path] * (1 - each) for path, each in sparsities.items())
    >>> found = budget(model, kept, limit=150)
    >>> round(kept(found))
    150
    """
    _check_max_sparsity(max_sparsity)
    selected, _ = select_kernels(model, include, exclude)
    found = least_damage(list(selected), cost, limit, _damage(damage, selected), max_sparsity)
    return as_globs(found)


def as_globs(sparsities: Mapping[str, float]) -> dict[str, float]:
    """The same fractions by globs that match each path alone.

    Example:

    >>> as_globs({"dense[0]/kernel": 0.5})
    {'dense[[]0]/kernel': 0.5}
    """
    return {glob.escape(path): each for path, each in sparsities.items()}


def least_damage(
    paths: Sequence[str], cost: Cost, limit: float, damage: Damage, max_sparsity: float = 0.99
) -> dict[str, float]:
    """What `budget` does, for weights of which only the paths are known.

    Args:
        paths: Of the weights, at least one.
        cost: As in `budget`.
        limit: As in `budget`.
        damage: A function (path, fraction of zeros) -> damage.
        max_sparsity: As in `budget`.

    Returns:
        {path: fraction of zeros}.

    Raises:
        ValueError: As in `budget`.

    Example:

    >>> square = lambda path, sparsity: sparsity**2
    >>> kept = lambda sparsities: 2 - sum(sparsities.values())
    >>> {path: round(each, 3) for path, each in least_damage("ab", kept, 1.0, square).items()}
    {'a': 0.5, 'b': 0.5}
    """
    _check_max_sparsity(max_sparsity)
    if not isinstance(limit, numbers.Real) or not math.isfinite(limit):
        raise ValueError(f"limit must be a finite number in the units of cost, got {limit!r}.")
    problem = _Problem(list(paths), cost, float(limit), damage, float(max_sparsity))
    return problem.named(_solved(problem))


def removed_energy(weight: np.ndarray) -> Callable[[float], float]:
    """Fraction of zeros -> share of `sum(w ** 2)` that magnitude pruning removes, in [0, 1].

    Linear between at most 4096 points, and convex, as the smallest go first.

    Args:
        weight: Finite array of any shape.

    Returns:
        A function of a fraction in [0, 1].

    Example:

    >>> removed_energy(np.array([3.0, 1.0, 2.0, 0.0]))(0.75) == 5 / 14
    True
    """
    squares = np.sort(np.square(weight.astype(np.float64)).ravel())
    removed = np.concatenate([[0.0], np.cumsum(squares)])
    points = np.linspace(0, squares.size, min(squares.size, _ENERGY_POINTS) + 1).astype(int)
    shares = removed[points] / (removed[-1] or 1.0)
    return lambda sparsity: float(np.interp(sparsity, points / squares.size, shares))


def _damage(damage, weights: Mapping[str, keras.Variable]) -> Damage:
    if damage is None:
        curves = {path: removed_energy(_finite(path, w)) for path, w in weights.items()}
        return lambda path, sparsity: curves[path](sparsity)
    damage = getattr(damage, "damage", damage)
    if not callable(damage):
        raise ValueError(
            "damage must be a Sensitivity, a function (path, sparsity) -> float or None, got "
            f"{damage!r}."
        )
    return damage


def _finite(path: str, weight: keras.Variable) -> np.ndarray:
    values = weight.numpy().astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{path} holds NaN or infinite values, which have no energy. Load finite weights, or "
            "exclude it."
        )
    return values


def _check_max_sparsity(max_sparsity) -> None:
    if not 0 < max_sparsity < 1:
        raise ValueError(
            f"max_sparsity must be a fraction of zeros in (0, 1), e.g. 0.99; got {max_sparsity}."
        )


class _Problem:
    """Damage and cost as functions of a vector with one sparsity a path; costs are remembered."""

    def __init__(self, paths, cost, limit, damage, max_sparsity):
        self.paths = paths
        self.limit = limit
        self.lowest = np.zeros(len(paths))
        self.highest = np.full(len(paths), max_sparsity)
        self._cost = cost
        self._damage = damage
        self._known: dict[bytes, float] = {}

    def named(self, x: np.ndarray) -> dict[str, float]:
        return dict(zip(self.paths, map(float, x), strict=True))

    def clip(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self.lowest, self.highest)

    def cost(self, x: np.ndarray) -> float:
        key = x.tobytes()
        if key not in self._known:
            self._known[key] = self._number("cost", self._cost(self.named(x)), self.named(x))
        return self._known[key]

    def holds(self, x: np.ndarray) -> bool:
        return self.cost(x) <= self.limit

    def damages(self, x: np.ndarray) -> np.ndarray:
        found = {path: self._damage(path, each) for path, each in self.named(x).items()}
        return np.array([self._number("damage", each, path) for path, each in found.items()])

    def damage(self, x: np.ndarray) -> float:
        return float(self.damages(x).sum())

    def damage_slopes(self, x: np.ndarray) -> np.ndarray:
        below, above = self.clip(x - _FINE), self.clip(x + _FINE)
        return (self.damages(above) - self.damages(below)) / (above - below)

    def cost_slopes(self, x: np.ndarray, step: float = _FINE) -> np.ndarray:
        steps = np.where(x + step <= self.highest, step, -step)
        moved = x + np.diag(steps)
        return np.array([self.cost(each) - self.cost(x) for each in moved]) / steps

    def _number(self, what: str, value, argument) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{what} must be a finite number, got {value!r} for {argument}.")
        return number


def _solved(problem: _Problem) -> np.ndarray:
    if problem.holds(problem.lowest):
        return problem.lowest
    if not problem.holds(problem.highest):
        raise ValueError(
            f"The limit {problem.limit:g} cannot be reached: the lowest cost, with every weight at "
            f"max_sparsity={problem.highest[0]:g}, is {problem.cost(problem.highest):g}. Raise the "
            "limit or max_sparsity, or select more weights."
        )
    starts = sorted(_starts(problem), key=problem.damage)
    if _is_rough(problem, starts[0]):
        ends = [_derivative_free(problem, start) for start in starts[:2]]
    else:
        ends = [_by_slopes(problem, start) for start in starts]
    ends = [problem.clip(end) for end in ends]
    kept = [_moved_within(problem, x) for x in [*starts, *ends] if np.isfinite(x).all()]
    return _lowered(problem, min(kept, key=problem.damage))


def _starts(problem: _Problem) -> Iterator[np.ndarray]:
    """All weights alike, the best on a grid, and random points; all within the limit."""
    random = np.random.default_rng(0)
    yield _moved_within(problem, problem.lowest)
    yield _moved_within(problem, _priced(problem))
    for _ in range(_RANDOM_STARTS):
        yield _moved_within(problem, random.uniform(problem.lowest, problem.highest))


def _priced(problem: _Problem) -> np.ndarray:
    """Each weight's best on a grid under one price for what it saves: the lowest that suffices."""
    grid = np.linspace(problem.lowest, problem.highest, _GRID_POINTS)
    damages = np.array([problem.damages(x) for x in grid])
    whole = problem.cost(problem.lowest)
    alone = [[np.where(np.arange(len(x)) == i, x, 0.0) for i in range(len(x))] for x in grid]
    savings = np.array([[whole - problem.cost(x) for x in line] for line in alone])

    def best(log_price: float) -> np.ndarray:
        chosen = np.argmin(damages - 10.0**log_price * savings, axis=0)
        return np.take_along_axis(grid, chosen[np.newaxis], axis=0)[0]

    # Of one unit of damage a unit of cost, the units being the whole range of either.
    unit = math.log10((abs(damages[-1].sum()) or 1.0) / (whole - problem.cost(problem.highest)))
    return best(_bisected(lambda log_price: problem.holds(best(log_price)), unit - 6, unit + 6))


def _bisected(holds: Callable[[float], bool], low: float, high: float, steps: int = 30) -> float:
    """Close to where `holds` begins, on the side of `high`, where it is taken for granted."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _moved_within(problem: _Problem, x: np.ndarray) -> np.ndarray:
    """The first point within the limit on the way from `x` to the highest sparsities."""
    if problem.holds(x):
        return x

    def point(t: float) -> np.ndarray:
        return problem.clip((1 - t) * x + t * problem.highest)

    return point(_bisected(lambda t: problem.holds(point(t)), 0.0, 1.0))


def _lowered(problem: _Problem, x: np.ndarray) -> np.ndarray:
    """`x` with each weight, the most damaged first, pruned no more than the limit asks for."""
    for i in np.argsort(-problem.damages(x), kind="stable"):

        def point(sparsity: float, i=i, x=x) -> np.ndarray:
            return np.where(np.arange(len(x)) == i, sparsity, x)

        if problem.holds(point(0.0)):
            x = point(0.0)
        else:
            x = point(_bisected(lambda each, p=point: problem.holds(p(each)), 0.0, x[i], steps=12))
    return x


def _is_rough(problem: _Problem, x: np.ndarray) -> bool:
    """Whether the slopes of the cost depend on the step that they are taken over."""
    fine, coarse = problem.cost_slopes(x, _FINE), problem.cost_slopes(x, _COARSE)
    # Between two steps of a staircase both are 0.
    return bool(np.linalg.norm(fine - coarse) >= 0.1 * np.linalg.norm(coarse))


def _by_slopes(problem: _Problem, start: np.ndarray) -> np.ndarray:
    damage_unit, cost_unit = _units(problem)
    within = {
        "type": "ineq",
        "fun": lambda x: (problem.limit - problem.cost(problem.clip(x))) / cost_unit,
        "jac": lambda x: -problem.cost_slopes(problem.clip(x)) / cost_unit,
    }
    return _minimized(
        lambda x: problem.damage(problem.clip(x)) / damage_unit,
        start,
        jac=lambda x: problem.damage_slopes(problem.clip(x)) / damage_unit,
        bounds=list(zip(problem.lowest, problem.highest, strict=True)),
        constraints=[within],
        method="SLSQP",
    )


def _derivative_free(problem: _Problem, start: np.ndarray) -> np.ndarray:
    optimize = require("scipy.optimize", extra="search")
    damage_unit, cost_unit = _units(problem)
    within = optimize.NonlinearConstraint(
        lambda x: (problem.cost(problem.clip(x)) - problem.limit) / cost_unit, -np.inf, 0.0
    )
    return _minimized(
        lambda x: problem.damage(problem.clip(x)) / damage_unit,
        start,
        bounds=optimize.Bounds(problem.lowest, problem.highest),
        constraints=[within],
        method="COBYQA",
        options={
            "initial_tr_radius": 0.1, "final_tr_radius": 1e-3, "maxfev": 20 * (len(start) + 5),
        },
    )  # fmt: skip


def _units(problem: _Problem) -> tuple[float, float]:
    """The damage at the highest sparsities, and what there is to save."""
    damage = problem.damage(problem.highest)
    return abs(damage) or 1.0, problem.cost(problem.lowest) - problem.limit


def _minimized(damage, start: np.ndarray, **settings) -> np.ndarray:
    return require("scipy.optimize", extra="search").minimize(damage, start, **settings).x
