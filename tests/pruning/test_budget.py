import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfcompress as tfc
from tests.models import kernels, mlp
from tfcompress.measure import macs
from tfcompress.pruning import Sensitivity
from tfcompress.pruning.budget import budget, least_damage, removed_energy

GRID = np.linspace(0, 0.99, 34)
SIZES = {"a": 300, "b": 900, "c": 80}
PRICES = {"a": 9, "b": 1, "c": 30}
CURVES = {
    path: removed_energy(np.random.default_rng(i).standard_t(3, size))
    for i, (path, size) in enumerate(SIZES.items())
}
STEEP = Sensitivity(
    "loss", False, 0.0, (0.5, 0.8), {"a": (0.0, 0.4), "b": (0.1, 0.2), "c": (0.0, 0.9)}, SIZES
)


def convex(path, sparsity):
    return CURVES[path](sparsity)


def smooth(sparsities):
    return sum(PRICES[p] * SIZES[p] * (1 - s) for p, s in sparsities.items())


def coupled(sparsities):
    """The channels that one weight writes, the next one reads."""
    kept = {path: 1 - each for path, each in sparsities.items()}
    return 50 * kept["a"] + 20 * kept["a"] * kept["b"] + 30 * kept["b"] * kept["c"]


def counted(sparsities):
    return sum(PRICES[p] * round(SIZES[p] * (1 - s)) for p, s in sparsities.items())


def stairs(sparsities):
    """Eight rows of each weight, whole ones only."""
    return sum(PRICES[p] * math.ceil(8 * (1 - s) - 1e-9) for p, s in sparsities.items())


COSTS = [smooth, coupled, counted, stairs]


def total(damage, sparsities):
    return sum(damage(path, each) for path, each in sparsities.items())


def best_on_grid(damage, cost, limit):
    found = (dict(zip("abc", point, strict=True)) for point in itertools.product(GRID, repeat=3))
    table = {(path, each): damage(path, each) for path in "abc" for each in GRID}
    return min(total(lambda *key: table[key], x) for x in found if cost(x) <= limit)


@pytest.mark.parametrize("damage", [convex, STEEP.damage], ids=["energy", "sensitivity"])
@pytest.mark.parametrize("cost", COSTS)
def test_it_is_as_good_as_every_point_of_a_grid(cost, damage):
    limit = 0.35 * cost(dict.fromkeys("abc", 0.0))
    found = least_damage("abc", cost, limit, damage)
    assert cost(found) <= limit
    slack = 1.02 if cost in (smooth, coupled) else 1.1
    assert total(damage, found) <= slack * best_on_grid(damage, cost, limit)


def test_under_a_staircase_no_weight_loses_more_than_a_step_asks_for():
    limit = 0.35 * stairs(dict.fromkeys("abc", 0.0))
    for path, each in (found := least_damage("abc", stairs, limit, convex)).items():
        assert abs(8 * each - round(8 * each)) < 1e-2
        assert each == 0 or stairs(found | {path: each - 1e-2}) > limit


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0.02, 1.2),
    cost=st.sampled_from(COSTS),
    highest=st.sampled_from([0.9, 0.99]),
)
def test_the_limit_holds_always(share, cost, highest):
    whole, lowest = (cost(dict.fromkeys("abc", each)) for each in (0.0, highest))
    if (limit := share * whole) < lowest:
        with pytest.raises(ValueError, match="cannot be reached"):
            least_damage("abc", cost, limit, convex, highest)
        return
    found = least_damage("abc", cost, limit, convex, highest)
    assert cost(found) <= limit
    assert list(found) == list("abc")
    assert all(0 <= each <= highest for each in found.values())


def test_what_costs_more_gets_more_zeros():
    layers = [
        keras.layers.Conv2D(8, 3, padding="same", strides=1, name="early"),
        keras.layers.Conv2D(8, 3, padding="same", strides=4, name="late"),
        keras.layers.GlobalAveragePooling2D(),
    ]
    model = keras.Sequential([keras.Input((16, 16, 8)), *layers], name="net")
    size = 3 * 3 * 8 * 8
    positions = {"net/early/kernel": 16 * 16, "net/late/kernel": 4 * 4}
    assert macs(model, np.zeros((1, 16, 16, 8), "float32")) == size * 272

    def needed(sparsities):
        return sum(positions[path] * size * (1 - each) for path, each in sparsities.items())

    found = budget(model, needed, limit=0.4 * size * 272)
    assert needed(found) == pytest.approx(0.4 * size * 272)
    assert found["net/early/kernel"] > found["net/late/kernel"] + 0.3


def test_a_model_within_the_limit_is_left_whole():
    assert budget(mlp(), lambda sparsities: 5.0, limit=5.0) == {
        "mlp/hidden/kernel": 0.0,
        "mlp/head/kernel": 0.0,
    }


def test_a_limit_out_of_reach_names_the_lowest_cost():
    with pytest.raises(
        ValueError, match=r"limit 0.5 cannot be reached: .*max_sparsity=0.9, is 1\."
    ):
        budget(mlp(), lambda s: 10 * (1 - min(s.values())), limit=0.5, max_sparsity=0.9)


def test_a_cost_that_is_noise_below_a_trend_keeps_the_limit():
    """As a measured latency would: the same sparsities may take another time."""
    random, seen = np.random.default_rng(0), {}

    def measured(sparsities):
        value = 5.0 + smooth(sparsities) / 1000 + random.normal(0, 0.02)
        assert tuple(sparsities.values()) not in seen
        return seen.setdefault(tuple(sparsities.values()), value)

    found = least_damage("abc", measured, 7.0, convex)
    assert seen[tuple(found.values())] <= 7.0
    assert 1000 < smooth(found) < 2100


def test_the_result_prunes_a_model_to_the_budget():
    model = mlp()
    sizes = {path: weight.size for path, weight in kernels(model).items()}

    def kept(sparsities):
        return sum(tfc.allocations.num_kept(sizes[p], s) for p, s in sparsities.items())

    tfc.prune(model, sparsity=budget(model, kept, limit=100))
    assert sum((weight != 0).sum() for weight in kernels(model).values()) <= 100


def test_a_path_with_glob_characters_is_a_glob_of_itself():
    layers = [keras.Input((4,)), keras.layers.Dense(5, name="a[0]"), keras.layers.Dense(5)]
    model = keras.Sequential(layers, name="net")
    found = budget(model, lambda s: 1 - s["net/a[0]/kernel"], limit=0.5)
    tfc.prune(model, sparsity=found)
    assert (kernels(model)["net/a[0]/kernel"] == 0).sum() == 10


def test_a_sensitivity_decides_as_damage():
    model = mlp()
    values = {"mlp/hidden/kernel": (5.0,), "mlp/head/kernel": (1.1,)}
    sizes = {path: weight.size for path, weight in kernels(model).items()}
    damage = Sensitivity("loss", False, 1.0, (0.9,), values, sizes)
    found = budget(model, lambda s: 2 - sum(s.values()), limit=1.2, damage=damage)
    assert found == pytest.approx({"mlp/hidden/kernel": 0.0, "mlp/head/kernel": 0.8}, abs=1e-2)


def test_removed_energy_is_the_share_of_the_smallest_squares():
    curve = removed_energy(np.array([[4.0, -1.0], [2.0, 0.0]]))
    assert [curve(each) for each in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 1 / 21, 5 / 21, 1]
    assert removed_energy(np.zeros(7))(0.5) == 0
    large = np.random.default_rng(0).normal(size=50_000)
    expected = np.sort(large**2)[:40_000].sum() / (large**2).sum()
    assert removed_energy(large)(0.8) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": math.nan}, "limit must be a finite number .*, got nan"),
        ({"limit": "1MB"}, "limit must be a finite number .*, got '1MB'"),
        ({"max_sparsity": 1.0}, r"in \(0, 1\), e.g. 0.99; got 1.0"),
        ({"cost": lambda s: math.nan}, "cost must be a finite number, got nan for"),
        ({"damage": "loss"}, "damage must be a Sensitivity, .*got 'loss'"),
        ({"damage": STEEP}, "'mlp/hidden/kernel' was not measured; what was: a, b, c"),
        ({"include": "nothing"}, "The glob 'nothing' matches no variable"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {"cost": lambda s: 2 - sum(s.values()), "limit": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        budget(mlp(), **arguments)


def test_weights_that_are_not_finite_have_no_energy():
    model = mlp()
    model.layers[0].kernel.assign(np.full((12, 16), np.nan))
    with pytest.raises(ValueError, match="hidden/kernel holds NaN"):
        budget(model, lambda s: 2 - sum(s.values()), limit=1.0)
