"""Physical removal: `apply` computes what `mask` computes, on every architecture of the table."""

import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.architectures import ARCHITECTURES, parameters
from tests.models import classification, compile_classifier, mlp
from tfcompress import demo
from tfcompress.graph import Plan, channel_groups, expand, shrink, shrink_plan
from tfcompress.graph.groups import Coupling, groups
from tfcompress.graph.unit_scores import unit_scores


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
    assert found
    plan = random_plan(found, random)
    small = plan.apply(model)
    assert (small.count_params() < model.count_params()) == bool(plan.removed)
    actual, expected = small(inputs), plan.mask(model)(inputs)
    for x, y in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", parameters())
def test_apply_is_mask(name, seed):
    assert_apply_is_mask(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 18))
@pytest.mark.parametrize("name", [x for x in ARCHITECTURES if ARCHITECTURES[x].is_fast])
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
    scores = unit_scores(Coupling(expand(model)), model, [found["group"]], "taylor", [(x, y)])
    kernel, head = model.layers[0].kernel, model.layers[1].kernel
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    one, two = tape.gradient(loss, [kernel.value, head.value])
    change = (one * kernel).numpy().sum(0) + (two * head).numpy().sum(1)
    np.testing.assert_allclose(scores["mlp/hidden/kernel:1"], change**2, rtol=1e-4)


def test_fisher_takes_each_example_alone_however_they_are_batched():
    model, (x, y) = compile_classifier(mlp()), classification()
    found = groups(coupling := Coupling(expand(model)))
    ways = [(x, y), [(x, y)], tf.data.Dataset.from_tensor_slices((x, y)).batch(7)]
    scores = [unit_scores(coupling, model, found, "fisher", data) for data in ways]
    for other in scores[1:]:
        np.testing.assert_allclose(
            other["mlp/hidden/kernel:1"], scores[0]["mlp/hidden/kernel:1"], rtol=1e-5
        )


def test_activations_are_means_of_what_the_next_layer_reads():
    model, (x, _) = mlp(), classification(num_examples=70)
    coupling = Coupling(expand(model))
    read = np.maximum(x @ model.layers[0].kernel.numpy() + model.layers[0].bias.numpy(), 0)
    for data in (x, (x, np.zeros(70)), tf.data.Dataset.from_tensor_slices(x).batch(9)):
        scores = unit_scores(coupling, model, groups(coupling), "activation", data)
        np.testing.assert_allclose(scores["mlp/hidden/kernel:1"], read.mean(0), rtol=1e-5)


def test_activations_of_channels_are_those_behind_their_batch_norm_and_relu():
    model, random = cnn(), np.random.default_rng(0)
    conv, norm, relu = model.layers[:3]
    norm.gamma.assign(random.uniform(0.1, 2, 32))
    norm.beta.assign(random.normal(size=32))
    x = random.normal(size=(40, 12, 12, 1)).astype("float32")
    expected = np.abs(relu(norm(conv(x)))).mean((0, 1, 2))
    coupling = Coupling(expand(model))
    scores = unit_scores(coupling, model, groups(coupling), "activation", x)
    np.testing.assert_allclose(scores["cnn/conv/kernel:3"], expected, rtol=1e-5)
    assert all(each.shape == (64,) for name, each in scores.items() if "second" in name)
    plan = shrink_plan(model, {"*/conv/*": 0.5}, criterion="activation", data=x, verbose=0)
    (units,) = plan.removed.values()
    assert units == tuple(np.sort(np.argsort(expected)[:16]))


@pytest.mark.parametrize("name", ["residual", "transformer", "bidirectional GRU"])
def test_every_group_has_activations(name):
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch(np.random.default_rng(0))
    coupling = Coupling(expand(model))
    for group in groups(coupling):
        (scores,) = unit_scores(coupling, model, [group], "activation", [(batch,)]).values()
        assert scores.shape == (group.size,) and (scores > 0).any()


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


def widths(model):
    return [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]


def test_partial_removals_end_where_one_would():
    model, seen = cnn(), []

    def fine_tune(small):
        seen.append(widths(small))
        for weight in small.weights:
            weight.assign(weight * 1.5)

    small = shrink(model, 0.75, iterations=3, fine_tune=fine_tune)
    assert seen == [[24, 48], [16, 32], [8, 16]]
    assert widths(small) == widths(shrink(model, 0.75))
    # What was trained is what goes on: three times by half more, in what is left of each weight.
    kernel = small.layers[1].kernel.numpy()
    ratios = [
        kernel[..., i] / (1.5**3 * model.layers[0].kernel.numpy()[..., j])
        for i in range(8)
        for j in range(32)
    ]
    assert sum(np.allclose(ratio, 1, rtol=1e-5) for ratio in ratios) == 8


def test_partial_removals_meet_a_target():
    model, x, costs = cnn(), np.zeros((1, 12, 12, 1), "float32"), []
    first = tfc.measure.macs(model, x)
    settings = {"target_macs": first // 3, "allocation": "global", "round_to": 1, "verbose": 0}
    shrink(
        model,
        iterations=3,
        fine_tune=lambda small: costs.append(tfc.measure.macs(small, x)),
        **settings,
    )
    limits = [first - (first - first // 3) * part / 3 for part in (1, 2, 3)]
    assert all(0.85 * limit < cost <= limit for cost, limit in zip(costs, limits, strict=True))


def test_what_is_left_is_scored_anew():
    """A unit that became weak in fine-tuning goes, though it was the strongest before."""
    model = mlp()
    model.layers[0].kernel.assign(np.ones((12, 16)) * np.arange(1, 17))
    model.layers[1].kernel.assign(np.zeros((16, 3)))

    def fine_tune(small):
        kernel = small.layers[1].kernel.numpy()
        kernel[:, -1] *= 0.01
        small.layers[1].kernel.assign(kernel)

    small = shrink(model, 0.5, iterations=2, fine_tune=fine_tune, round_to=1)
    # 1 to 4 went first, then 16, and what has become the last of each step is weak.
    left = small.layers[1].kernel.numpy()[0]
    np.testing.assert_allclose(left, [8, 9, 10, 11, 12, 13, 14, 0.15], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("transformer", "taylor"), ("transformer", "activation"), ("residual", "l2")],
)
def test_what_went_plays_no_part_in_the_scores(name, criterion):
    """At full size with zeros, and norms that ignore them, the scores are those of the rest."""
    architecture, random = ARCHITECTURES[name], np.random.default_rng(0)
    model, x = compile_classifier(architecture.build()), architecture.batch(random)
    data, seen = (x, np.array([0, 1])), []

    def scored(coupling, compiled, found, *arguments, **kwargs):
        seen.append(unit_scores(coupling, compiled, found, criterion, data, 0, *arguments[3:]))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tfcompress.graph.shrink"], "unit_scores", scored)
        first = []
        shrink(model, 0.5, iterations=2, round_to=1, fine_tune=first.append)
    small = compile_classifier(first[0])
    coupling = Coupling(expand(small))
    alone = unit_scores(coupling, small, groups(coupling), criterion, data)
    # The groups come in the same order. Means over zeros change a group's scores by one factor.
    for full, rest in zip(seen[1].values(), alone.values(), strict=True):
        kept = np.sort(full)[-len(rest) :]
        expected = np.sort(rest) / rest.sum()
        np.testing.assert_allclose(kept / kept.sum(), expected, rtol=2e-3, atol=1e-6)


ZEROED = {
    "demo CNN": (lambda: demo.cnn(8), lambda random: random.normal(size=(2, 28, 28))),
    **{name: (ARCHITECTURES[name].build, ARCHITECTURES[name].batch) for name in (
        "residual", "transformer", "depthwise-separable",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", ZEROED)
def test_training_towards_zero_and_removal_change_no_output(name):
    build, batch = ZEROED[name]
    random = np.random.default_rng(0)
    x = np.concatenate([np.asarray(batch(random), None) for _ in range(16)])
    x = x.astype("int32" if x.dtype.kind == "i" else "float32")
    model = compile_classifier(build(), "adam")
    data = json.loads(json.dumps(channel_groups(model)))
    channels = tfc.structures.Channel(groups=data)
    schedule = tfc.schedules.Linear(0.0, 0.5, begin_step=0, end_step=6)
    pruning = tfc.callbacks.Pruning(schedule, structure=channels, frequency=2)
    model.fit(x, random.integers(0, 5, 32), 8, epochs=3, verbose=0, callbacks=[pruning])
    plan = shrink_plan(model, zeros=True)
    trained = {axis["group"] for axes in data.values() for axis in axes}
    assert {name: len(units) for name, units in plan.removed.items()} == {
        name: plan.sizes[name] - round(plan.sizes[name] / 2) for name in trained
    }
    small = plan.apply(model)
    assert small.count_params() < 0.6 * model.count_params()
    np.testing.assert_allclose(small(x), model(x), rtol=0, atol=1e-5)


def test_groups_that_zeros_cannot_stand_for_are_left_out():
    model = ARCHITECTURES["transformer"].build()
    names = {axis["group"] for axes in channel_groups(model).values() for axis in axes}
    left_out = [name for name in names_of(model) if name not in names]
    assert left_out == ["embedding/embeddings:1"]  # The layer norms average over it.
    frozen = cnn()
    frozen.layers[0].trainable = False
    names = {axis["group"] for axes in channel_groups(frozen).values() for axis in axes}
    assert names == {"cnn/second/kernel:3"}
    frozen.trainable = False
    with pytest.raises(ValueError, match="trained to zero"):
        channel_groups(frozen)


def test_a_mean_without_a_gamma_is_part_of_a_unit():
    layers = [keras.layers.Dense(16, name="wide"), keras.layers.BatchNormalization(scale=False)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    paths = [path.split("/")[-1] for path in channel_groups(model)]
    assert paths == ["kernel", "bias", "beta", "moving_mean", "kernel"]


@pytest.mark.parametrize("name", ["depthwise-separable", "grouped conv", "grouped-query attention"])
def test_the_plan_of_the_zeros_is_the_one_that_made_them(name):
    model = ARCHITECTURES[name].build()
    zeroable = {axis["group"] for axes in channel_groups(model).values() for axis in axes}
    plan = random_plan(groups(Coupling(expand(model))), np.random.default_rng(1))
    removed = {name: units for name, units in plan.removed.items() if name in zeroable}
    plan = Plan(removed, plan.sizes)
    assert removed and shrink_plan(plan.mask(model), zeros=True) == plan


def test_one_unit_stays_where_all_are_zero():
    model = mlp()
    for weight in model.weights:
        weight.assign(weight * 0)
    (units,) = shrink_plan(model, zeros=True).removed.values()
    assert units == tuple(range(1, 16))


def encoder():
    """A transformer block over features, small."""
    x = inputs = keras.Input((6, 12))
    x = keras.layers.Dense(32, name="embed")(x)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(4, 8)(x, x))
    hidden = keras.layers.Dense(64, activation="relu", name="ffn")(x)
    x = keras.layers.LayerNormalization()(x + keras.layers.Dense(32)(hidden))
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(pooled), name="encoder")


GOING_ON = {"CNN": (lambda: demo.cnn(8), (28, 28)), "encoder": (encoder, (6, 12))}


@pytest.mark.parametrize(("name", "factorized"), [("CNN", False), ("encoder", True)])
def test_a_smaller_model_goes_on_as_any_other(name, factorized, tmp_path):
    build, shape = GOING_ON[name]
    random = np.random.default_rng(0)
    x = random.normal(size=(64, *shape)).astype("float32")
    y = random.integers(0, 3, 64)
    small = shrink(build(), ratio=0.5)
    if factorized:
        before = small.count_params()
        small = tfc.factorize(small, ratio=0.6, verbose=0)
        assert small.count_params() < before
    small.save(tmp_path / "small.keras")
    small = compile_classifier(keras.models.load_model(tmp_path / "small.keras"), "adam")
    losses = small.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    quantized = tfc.quantize(small, calibration=x, verbose=0)
    artefact = tfc.export(quantized, tmp_path / "ptq.tflite", "int8", verify_on=x[:16])
    assert artefact.precision == "int8"
    small.fit(x, y, verbose=0, callbacks=[tfc.callbacks.QuantizationAwareTraining()])
    artefact = tfc.export(small, tmp_path / "qat.tflite", "int8", verify_on=x[:16])
    assert artefact.precision == "int8"


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
        ({"ratio": 0.5, "criterion": "activation"}, "pass data="),
        ({"ratio": 0.5, "zeros": True}, "exactly one of ratio"),
        ({"target_parameters": 3}, "out of reach"),
        ({"target_cost": 3}, "exactly one of ratio"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrink_plan(mlp(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5, "iterations": 0}, "iterations must be"),
        ({"ratio": 0.5, "iterations": 2.0}, "iterations must be"),
        ({"ratio": 0.5, "fine_tune": 3}, "fine_tune must be"),
        ({"zeros": True, "iterations": 2}, "goes at once"),
    ],
)
def test_bad_iterations(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrink(mlp(), **arguments)


def test_a_thousand_layers_are_grouped_in_seconds():
    x = inputs = keras.Input((8,))
    for _ in range(500):
        x = keras.layers.Add()([x, keras.layers.Dense(8)(keras.layers.Dense(16)(x))])
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert len(groups(Coupling(expand(model)))) == 500
