"""The integer program against every assignment there is."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tfcompress.quantization.assignment import Budget, Cost, search

NAMES = ("int2", "int4", "int8")
ERRORS = {"a": {"int4": 0.9, "int8": 0.1}, "b": {"int4": 0.2, "int8": 0.1}}
BYTES = {"a": {"int4": 50.0, "int8": 100.0}, "b": {"int4": 500.0, "int8": 1000.0}}


def enumerated(errors):
    """Every assignment, path -> candidate."""
    for names in itertools.product(*(errors[path] for path in errors)):
        yield dict(zip(errors, names, strict=True))


def error_of(errors, chosen):
    return math.fsum(max(errors[path][name], 0.0) for path, name in chosen.items())


# Errors span orders of magnitude, as measured ones do.
error = st.floats(-9, 2).map(lambda exponent: 10.0**exponent) | st.just(0.0) | st.just(-1e-3)
layer = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, error)).filter(len)


@st.composite
def problems(draw):
    errors = {
        f"layer{i}": each for i, each in enumerate(draw(st.lists(layer, min_size=1, max_size=6)))
    }
    number = st.integers(0, 10**7).map(float)
    table = {
        kind: {path: {name: draw(number) for name in errors[path]} for path in errors}
        for kind in draw(
            st.sampled_from([("size",), ("size", "bops"), ("size", "bops", "latency")])
        )
    }
    costs = {
        kind: Cost(each, rest=float(draw(st.integers(0, 1000)))) for kind, each in table.items()
    }
    limits = {kind: draw(st.floats(2, 2e7)) for kind in costs}
    latencies = {"latencies": table["latency"]} if "latency" in table else {}
    return errors, costs, Budget(**limits, **latencies)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(problems())
def test_no_assignment_within_the_budget_is_better(problem):
    errors, costs, budget = problem
    limits = budget.limits(costs)
    within = [
        chosen
        for chosen in enumerated(errors)
        if all(costs[kind].total(chosen) <= limits[kind] for kind in limits)
    ]
    if not within:
        with pytest.raises(ValueError, match="budget cannot be kept"):
            search(errors, costs, budget)
        return
    chosen = search(errors, costs, budget)
    assert chosen in within
    best = min(error_of(errors, each) for each in within)
    assert error_of(errors, chosen) <= best * (1 + 1e-6)


@pytest.mark.parametrize("limit", [550, 600, 1100])
def test_a_limit_may_be_reached_exactly(limit):
    chosen = search(ERRORS, {"size": Cost(BYTES)}, Budget(size=limit))
    assert Cost(BYTES).total(chosen) == limit


def test_many_layers_are_solved_as_by_dynamic_programming():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 40, 120)
    errors = {
        str(i): {"int2": each * 16, "int4": each, "int8": each / 256}
        for i, each in enumerate(random.lognormal(0, 3, 120))
    }
    table = {str(i): {n: float(size * int(n[3])) for n in NAMES} for i, size in enumerate(sizes)}
    limit = int(sizes.sum() * 4.2)
    least = np.zeros(limit + 1)
    for path in errors:
        choices = [(errors[path][name], int(table[path][name])) for name in NAMES]
        rows = [np.r_[np.full(size, np.inf), least[: limit + 1 - size] + e] for e, size in choices]
        least = np.min(rows, axis=0)
    chosen = search(errors, {"size": Cost(table)}, Budget(size=limit))
    assert Cost(table).total(chosen) <= limit
    assert error_of(errors, chosen) == pytest.approx(least[-1], rel=1e-9)


def test_an_unreachable_limit_is_told_with_the_smallest_reachable_value():
    with pytest.raises(ValueError, match=r"size=400, where the smallest reachable is 553 bytes"):
        search(ERRORS, {"size": Cost(BYTES, rest=3.0)}, Budget(size=400))


def test_limits_that_exclude_each_other_are_told_with_what_is_left():
    slow = {path: {"int4": 9.0, "int8": 1.0} for path in ERRORS}
    costs = {"size": Cost(BYTES), "latency": Cost(slow)}
    budget = Budget(size=600, latency=5.0, latencies=slow)
    with pytest.raises(
        ValueError, match="smallest reachable is 1100 bytes while the other"
    ) as told:
        search(ERRORS, costs, budget)
    assert "latency=5, where the smallest reachable is 10 ms" in str(told.value)


def test_all_limits_hold_at_once():
    slow = {"a": {"int4": 1.0, "int8": 9.0}, "b": {"int4": 9.0, "int8": 1.0}}
    costs = {"size": Cost(BYTES), "latency": Cost(slow)}
    assert search(ERRORS, costs, Budget(size=1060)) == {"a": "int8", "b": "int4"}
    budget = Budget(size=1060, latency=10.0, latencies=slow)
    assert search(ERRORS, costs, budget) == {"a": "int4", "b": "int8"}


def test_a_fraction_is_one_of_float32():
    costs = {"size": Cost(BYTES, full=4400.0)}
    assert search(ERRORS, costs, Budget(size=0.25)) == {"a": "int8", "b": "int8"}
    assert search(ERRORS, costs, Budget(size=600 / 4400)) == {"a": "int8", "b": "int4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a limit"),
        ({"size": 0}, "size=0; pass a number of bytes above 0"),
        ({"bops": float("nan")}, "bops=nan"),
        ({"size": "1MB"}, "size='1MB'"),
        ({"latency": 3.0}, "latency=3.0 and latencies=None; pass both"),
        ({"latencies": {"a": {}}, "size": 0.5}, "pass both"),
    ],
)
def test_a_wrong_budget_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_a_missing_number_is_named():
    with pytest.raises(ValueError, match="The size of 'b' as 'int4' is None"):
        search(ERRORS, {"size": Cost({"a": BYTES["a"], "b": {}})}, Budget(size=600))
