"""Physical removal: `apply` computes what `mask` computes, on every architecture of the table."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.architectures import ARCHITECTURES, parameters
from tests.graph.test_architectures import NOT_SAVED
from tests.models import classification, compile_classifier, mlp
from tfcompress.graph import Plan, expand, shrink, shrink_plan
from tfcompress.graph.groups import Coupling, groups
from tfcompress.graph.unit_scores import unit_scores

SHRINKABLE = [name for name in ARCHITECTURES if name not in NOT_SAVED]
# Nothing in them can be removed yet: their blocks stay whole.
WITHOUT_GROUPS = {"keras_hub.GPT-2"}


def random_plan(found, random):
    """Any number of units of some of the groups, one left at least."""
    removed = {}
    for group in found:
        if random.random() < 0.6:
            count = random.integers(1, group.size)
            units = random.permutation(group.size)[:count]
            removed[group.name] = tuple(sorted(map(int, units)))
    return Plan(removed, {group.name: group.size for group in found})


def assert_apply_is_mask(name, seed):
    architecture, random = ARCHITECTURES[name], np.random.default_rng(seed)
    model, inputs = architecture.build(), architecture.batch(random)
    found = groups(Coupling(expand(model)))
    assert bool(found) == (name not in WITHOUT_GROUPS)
    plan = random_plan(found, random)
    small = plan.apply(model)
    assert (small.count_params() < model.count_params()) == bool(plan.removed)
    actual, expected = small(inputs), plan.mask(model)(inputs)
    for x, y in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", parameters(SHRINKABLE))
def test_apply_is_mask(name, seed):
    assert_apply_is_mask(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 18))
@pytest.mark.parametrize("name", [x for x in SHRINKABLE if ARCHITECTURES[x].is_fast])
def test_apply_is_mask_in_many_cases(name, seed):
    assert_apply_is_mask(name, seed)


def names_of(model):
    return [group.name for group in groups(Coupling(expand(model)))]


def test_the_groups_of_an_mlp():
    assert names_of(mlp()) == ["mlp/hidden/kernel:1"]


def test_residual_branches_are_one_group():
    x = keras.Input((4,))
    one = keras.layers.Dense(8, name="one")(x)
    two = keras.layers.Dense(8, name="two")(one)
    y = keras.layers.Dense(2, name="head")(keras.layers.Add()([one, two]))
    (group,) = groups(Coupling(expand(keras.Model(x, y))))
    touched = sorted((m.variable.path.split("/")[-2], m.axis) for m in group.members)
    assert touched == [
        ("head", 0), ("one", 0), ("one", 1), ("two", 0), ("two", 0), ("two", 1),
    ]  # fmt: skip


def test_heads_are_units():
    x = keras.Input((6, 16))
    y = keras.layers.MultiHeadAttention(4, 8, name="mha")(x, x)
    sizes = [group.size for group in groups(Coupling(expand(keras.Model(x, y))))]
    assert sizes == [4, 8, 8]  # Heads, and the sizes of keys and of values.


def test_what_no_rule_knows_is_left_alone():
    class Reversed(keras.layers.Layer):
        def call(self, x):
            return x[..., ::-1]

    layers = [keras.layers.Dense(8), Reversed(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    with pytest.raises(ValueError, match="No channels"):
        shrink(model, ratio=0.5)


def test_the_weakest_units_go():
    model = mlp()
    kernel = model.layers[0].kernel
    kernel.assign(kernel * np.array([0.01, 1.0] * 8, "float32"))
    head = model.layers[1].kernel
    head.assign(head * np.array([[0.01], [1.0]] * 8, "float32"))
    plan = shrink_plan(model, 0.5)
    assert plan.removed == {"mlp/hidden/kernel:1": tuple(range(0, 16, 2))}
    np.testing.assert_array_equal(plan.apply(model).layers[1].kernel, kernel.numpy()[:, 1::2])


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_units_that_change_no_loss_go_first(criterion):
    model, (x, y) = compile_classifier(mlp()), classification()
    head = model.layers[1].kernel.numpy()
    head[:8] = 0.0
    model.layers[1].kernel.assign(head)
    kernel = model.layers[0].kernel.numpy()
    kernel[:, :8] *= 100.0
    model.layers[0].kernel.assign(kernel)
    plan = shrink_plan(model, 0.5, criterion=criterion, data=(x, y))
    assert plan.removed == {"mlp/hidden/kernel:1": tuple(range(8))}


def test_taylor_is_the_change_of_the_loss_to_first_order():
    model, (x, y) = compile_classifier(mlp()), classification()
    found = {}

    def remember(group):
        found["group"] = group
        return np.zeros(group.size)

    shrink_plan(model, 0.5, criterion=remember)
    scores = unit_scores(expand(model), model, [found["group"]], "taylor", [(x, y)])
    kernel, head = model.layers[0].kernel, model.layers[1].kernel
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    one, two = tape.gradient(loss, [kernel.value, head.value])
    change = (one * kernel).numpy().sum(0) + (two * head).numpy().sum(1)
    np.testing.assert_allclose(scores["mlp/hidden/kernel:1"], change**2, rtol=1e-4)


def test_fisher_takes_each_example_alone_however_they_are_batched():
    model, (x, y) = compile_classifier(mlp()), classification()
    found = groups(Coupling(flat := expand(model)))
    ways = [(x, y), [(x, y)], tf.data.Dataset.from_tensor_slices((x, y)).batch(7)]
    scores = [unit_scores(flat, model, found, "fisher", data) for data in ways]
    for other in scores[1:]:
        np.testing.assert_allclose(
            other["mlp/hidden/kernel:1"], scores[0]["mlp/hidden/kernel:1"], rtol=1e-5
        )


def test_batch_norm_criterion():
    layers = [keras.layers.Dense(16), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.layers[1].gamma.assign(np.arange(16, dtype="float32"))
    (units,) = shrink_plan(model, 0.5, criterion="batch_norm").removed.values()
    assert units == tuple(range(8))


def cnn(channels=32):
    layers = [
        keras.layers.Conv2D(channels, 3, name="conv"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Conv2D(2 * channels, 3, strides=2, activation="relu", name="second"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, name="head"),
    ]
    return keras.Sequential([keras.Input((12, 12, 1)), *layers], name="cnn")


def test_channels_are_kept_in_multiples():
    for ratio in (0.2, 0.4, 0.7, 0.99):
        small = shrink(cnn(), ratio=ratio)
        for layer in small.layers[1:5:3]:
            assert layer.filters % 8 == 0 and layer.filters > 0
    assert shrink(cnn(), ratio=0.4, round_to=1).layers[1].filters == round(32 * 0.6)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_targets_are_met(allocation):
    model = cnn()
    macs = tfc.measure.macs(model, np.zeros((1, 12, 12, 1), "float32"))
    small = shrink(model, target_macs=macs // 2, allocation=allocation)
    now = tfc.measure.macs(small, np.zeros((1, 12, 12, 1), "float32"))
    assert 0.3 * macs < now <= macs // 2
    target = model.count_params() // 3
    small = shrink(model, target_parameters=target, allocation=allocation, round_to=1)
    assert 0.8 * target < small.count_params() <= target


def test_any_cost_is_a_target():
    small = shrink(cnn(), target_cost=24, cost=lambda model: model.layers[1].filters)
    assert small.layers[1].filters == 24


def test_a_ratio_by_group():
    small = shrink(cnn(), ratio={"*second*": 0.5})
    assert [small.layers[1].filters, small.layers[4].filters] == [32, 32]
    small = shrink(cnn(), ratio=0.5, exclude="*conv/kernel:3")
    assert [small.layers[1].filters, small.layers[4].filters] == [32, 32]


def test_a_plan_travels_as_json():
    plan = shrink_plan(cnn(), ratio=0.5)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.apply(cnn()).layers[1].filters == 16
    with pytest.raises(ValueError, match="32 units in 'cnn/conv/kernel:3'"):
        plan.apply(cnn(16))


def test_the_model_is_not_touched():
    model, x = cnn(), np.random.default_rng(0).normal(size=(2, 12, 12, 1)).astype("float32")
    before = model(x).numpy()
    shrink(model, ratio=0.5)
    np.testing.assert_array_equal(model(x), before)


def test_a_smaller_model_goes_on_as_any_other(tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 12, 12, 1)).astype("float32")
    y = random.integers(0, 3, 64)
    small = compile_classifier(shrink(cnn(), ratio=0.5))
    qat = tfc.callbacks.QuantizationAwareTraining()
    small.fit(x, y, verbose=0, callbacks=[qat])
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(loaded(x), small(x), atol=1e-6)
    artefact = tfc.export(small, tmp_path / "small.tflite", "int8", verify_on=x)
    assert not artefact.float_operators
    quantized = tfc.quantize(small, calibration=x, verbose=0)
    assert quantized(x[:2]).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of ratio"),
        ({"ratio": 0.5, "target_macs": 3}, "exactly one of ratio"),
        ({"ratio": 1.0}, r"in \(0, 1\), got 1.0"),
        ({"ratio": 50}, r"in \(0, 1\), got 50"),
        ({"ratio": {"*nothing*": 0.5}}, "matches no group"),
        ({"ratio": 0.5, "include": "*nothing*"}, "matches no group"),
        ({"ratio": 0.5, "criterion": "l3"}, "criterion must be one of"),
        ({"ratio": 0.5, "criterion": "taylor"}, "compile the model"),
        ({"ratio": 0.5, "criterion": "batch_norm"}, "reads the gammas"),
        ({"ratio": 0.5, "criterion": lambda group: [1.0]}, "16 finite scores"),
        ({"ratio": 0.5, "allocation": "erk"}, "allocation must be"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be"),
        ({"target_parameters": 3}, "out of reach"),
        ({"target_cost": 3}, "exactly one of ratio"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrink_plan(mlp(), **arguments)


def test_a_thousand_layers_are_grouped_in_seconds():
    x = inputs = keras.Input((8,))
    for _ in range(500):
        x = keras.layers.Add()([x, keras.layers.Dense(8)(keras.layers.Dense(16)(x))])
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert len(groups(Coupling(expand(model)))) == 500
