"""Criteria, structures and regrowth under training: against what they are defined to be."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.models import classification, compile_classifier, kernels, mlp


def train(model, callbacks=(), epochs=1, **kwargs):
    x, y = classification()
    arguments = {"batch_size": 24, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=list(callbacks), **arguments | kwargs)


def reference(model, steps, learning_rate=0.1):
    """Plain SGD by hand on the same batches: `(weights, gradients)` of every step, by path."""
    x, y = classification()
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    history = []
    for step in range(steps):
        batch = slice(24 * (step % 4), 24 * (step % 4) + 24)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x[batch], y=y[batch], y_pred=model(x[batch]))
        before = {v.path: v.numpy() for v in variables}
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        for v, g in zip(model.trainable_variables, gradients, strict=True):
            v.assign_sub(learning_rate * g)
        by_path = dict(zip((v.path for v in model.trainable_variables), gradients, strict=True))
        history.append((before, {v.path: by_path[v.path].numpy() for v in variables}))
    return history


def kept(scores, sparsity):
    """The mask of the highest scores."""
    k = max(round(scores.size * (1 - sparsity)), 1)
    return (
        np.argsort(np.argsort(-scores, axis=None, kind="stable"), kind="stable").reshape(
            scores.shape
        )
        < k
    )


SCORES = {
    "gradient": lambda w, history: sum(np.abs(before * g) for before, g in history),
    "fisher": lambda w, history: w**2 * sum(g**2 for _, g in history),
}


@pytest.mark.parametrize("name", SCORES)
def test_gradients_are_summed_since_the_last_choice(name):
    model = mlp()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compile_classifier(copy, keras.optimizers.SGD(0.1))
    history = reference(copy, 4)
    compile_classifier(model, keras.optimizers.SGD(0.1))
    pruning = tfc.callbacks.Pruning(tfc.schedules.OneShot(0.7, step=4), criterion=name, frequency=3)
    train(model, [pruning])
    # Observed from one interval before the choice, behind step 1.
    for path, weight in kernels(copy).items():
        seen = [(before[path], gradients[path]) for before, gradients in history[1:]]
        expected = kept(SCORES[name](weight, seen), 0.7)
        np.testing.assert_array_equal(pruning.masks[path].numpy(), expected)


def test_movement_learns_its_scores_from_the_first_step():
    """A warm-up before the schedule begins is when the scores of a whole model are learned."""
    model = mlp()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compile_classifier(copy, keras.optimizers.SGD(0.1))
    history = reference(copy, 4)
    compile_classifier(model, keras.optimizers.SGD(0.1))
    schedule = tfc.schedules.OneShot(0.7, step=4)
    pruning = tfc.callbacks.Pruning(schedule, criterion="movement", frequency=1)
    train(model, [pruning])
    for path in kernels(copy):
        scores = sum(-before[path] * gradients[path] for before, gradients in history)
        np.testing.assert_array_equal(pruning.masks[path].numpy(), kept(scores, 0.7))


def test_movement_keeps_what_moves_away_from_zero_and_pruned_weights_keep_their_value():
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.05))
    masks, values = [], []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            values.append(next(iter(kernels(self.model).values())))
            masks.append(next(iter(pruning.masks.values())).numpy())

    schedule = tfc.schedules.Linear(0.0, 0.8, begin_step=1, end_step=40)
    pruning = tfc.callbacks.Pruning(schedule, criterion="movement", frequency=2)
    train(model, [pruning, Watch()], epochs=12)
    came_back = sum(int((later & ~earlier).sum()) for earlier, later in itertools.pairwise(masks))
    assert came_back > 0
    for step in range(1, len(masks) - 1):  # Held where pruned, by SGD without momentum.
        frozen = ~masks[step]
        np.testing.assert_array_equal(values[step][frozen], values[step + 1][frozen])
    assert (values[-1] == 0).sum() < 10
    weight = next(iter(kernels(model).values()))
    assert (weight == 0).sum() == weight.size - round(weight.size * 0.2)


def test_movement_scores_follow_the_masked_model():
    """Two steps by hand: the scores, the mask, and the gradient of the kept weights only."""
    model = mlp()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compile_classifier(copy, keras.optimizers.SGD(0.1))
    ((before, gradients),) = reference(copy, 1)
    path = next(iter(before))
    mask = kept(-before[path] * gradients[path], 0.5)
    pruning = tfc.callbacks.Pruning(0.5, criterion="movement", frequency=50)
    compile_classifier(model, keras.optimizers.SGD(0.1))
    x, y = classification()
    with pruning.attached(model):
        model.train_on_batch(x[:24], y[:24])
        np.testing.assert_array_equal(pruning.masks[path].numpy(), mask)
        dense = model.layers[0].kernel.numpy()
        np.testing.assert_allclose(dense, copy.layers[0].kernel.numpy(), atol=1e-6)
        outputs = model.predict(x, verbose=0)  # The mask is in the forward pass.
        model.train_on_batch(x[24:48], y[24:48])
        moved = model.layers[0].kernel.numpy() != dense
        assert moved[mask].any() and not moved[~mask].any()
    for weight, values in zip(copy.weights, kernels_masked(copy, pruning), strict=True):
        weight.assign(values)
    np.testing.assert_allclose(outputs, copy.predict(x, verbose=0), atol=1e-5)


def kernels_masked(model, pruning):
    masks = iter(pruning.masks.values())
    return [
        np.where(next(masks).numpy(), w.numpy(), 0) if len(w.shape) > 1 else w.numpy()
        for w in model.weights
    ]


def test_the_strength_of_soft_movement_decides_the_sparsity():
    def zeros(strength):
        keras.utils.set_random_seed(0)
        model = compile_classifier(mlp(), keras.optimizers.SGD(0.05))
        movement = tfc.criteria.Movement(0.3, strength=strength, learning_rate=0.05)
        train(model, [tfc.callbacks.Pruning(criterion=movement, frequency=4)], epochs=10)
        return sum((w == 0).sum() for w in kernels(model).values())

    few, many = zeros(0.1), zeros(4.0)
    assert 0 < few < many


@pytest.mark.parametrize("regrowth", [tfc.regrowth.SET(0.6), tfc.regrowth.RigL(0.6)])
@pytest.mark.parametrize("structure", ["unstructured", "channel", tfc.structures.Block(4, 1)])
def test_regrowth_moves_the_mask_and_never_its_count(regrowth, structure):
    counts, masks = [], []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            masks.append({path: mask.numpy() for path, mask in pruning.masks.items()})
            counts.append([int(mask.sum()) for mask in masks[-1].values()])

    pruning = tfc.callbacks.Pruning(
        0.7, criterion="random", structure=structure, frequency=3, regrowth=regrowth
    )
    model = compile_classifier(mlp(), "adam")
    train(model, [pruning, Watch()], epochs=6)
    assert all(count == counts[0] for count in counts)
    path = next(iter(pruning.masks))
    changed = [bool((a[path] != b[path]).any()) for a, b in itertools.pairwise(masks)]
    # No gradient reaches a unit behind a ReLU all of whose weights are zero.
    assert any(changed[:17]) or (structure == "channel" and regrowth.reads == "gradients")
    assert not any(changed[18:])  # Three quarters of 24 steps.
    weight = kernels(model)[path]
    assert not weight[~masks[-1][path]].any()


def test_rigl_grows_where_the_gradient_is_largest():
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.1), run_eagerly=True)
    seen = []
    rule = tfc.regrowth.RigL(fraction=0.4, end_step=100)
    pruning = tfc.callbacks.Pruning(0.6, criterion="random", frequency=2, regrowth=rule)
    x, y = classification()
    with pruning.attached(model):
        model.train_on_batch(x, y)
        path, mask = next((path, mask.numpy()) for path, mask in pruning.masks.items())
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x, y=y, y_pred=model(x))
        gradient = np.abs(tape.gradient(loss, model.layers[0].kernel.value).numpy())
        model.train_on_batch(x, y)
        new = pruning.masks[path].numpy()
        seen.append((mask, gradient, new))
    mask, gradient, new = seen[0]
    grown = new & ~mask
    assert grown.any()
    assert gradient[grown].min() >= gradient[~mask & ~new].max()


def test_rigl_reads_the_gradient_of_the_step_at_which_the_schedule_ends():
    """An end off the grid of the frequency is a choice of masks like the others."""
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.1), run_eagerly=True)
    schedule = tfc.schedules.Linear(0.3, 0.6, begin_step=0, end_step=3)
    rule = tfc.regrowth.RigL(fraction=0.4, end_step=100)
    pruning = tfc.callbacks.Pruning(schedule, frequency=2, regrowth=rule)
    x, y = classification()
    with pruning.attached(model):
        for _ in range(2):
            model.train_on_batch(x, y)
        path, mask = next((path, mask.numpy()) for path, mask in pruning.masks.items())
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x, y=y, y_pred=model(x))
        gradient = np.abs(tape.gradient(loss, model.layers[0].kernel.value).numpy())
        model.train_on_batch(x, y)
        new = pruning.masks[path].numpy()
    grown = new & ~mask
    assert grown.any()
    assert gradient[grown].min() >= gradient[~mask & ~new].max()


def test_regrowth_without_a_known_end_says_so():
    model = compile_classifier(mlp())
    attached = tfc.callbacks.Pruning(0.5, regrowth="rigl").attached(model)
    with pytest.raises(ValueError, match=r"regrowth.RigL\(end_step=...\)"), attached:
        raise AssertionError("not reached")
    assert "compression_state" not in vars(model)


def test_batch_norm_scales_choose_the_channels():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(6, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    model.layers[1].gamma.assign([0.5, -2.0, 0.1, 1.0, -0.2, 3.0])
    compile_classifier(model, keras.optimizers.SGD(0.0))
    pruning = tfc.callbacks.Pruning(0.5, criterion="batch_norm", structure="channel")
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype("float32")
    model.fit(x, np.zeros(8), verbose=0, callbacks=[pruning])
    alive = np.abs(model.layers[0].kernel.numpy()).sum((0, 1, 2)) > 0
    assert alive.tolist() == [False, True, False, True, False, True]
    assert list(pruning.masks) == [model.layers[0].kernel.path]


COUPLED = {
    path: [{"axis": axis, "group": "hidden", "places": list(range(16))}]
    for path, axis in {"mlp/hidden/kernel": 1, "mlp/hidden/bias": 0, "mlp/head/kernel": 0}.items()
}
CHANNELS = tfc.structures.Channel(groups=COUPLED)


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "fisher"])
def test_coupled_channels_go_from_all_of_their_weights(criterion):
    model = compile_classifier(mlp(), "adam")
    pruning = tfc.callbacks.Pruning(0.5, criterion, CHANNELS, frequency=2)
    train(model, [pruning], epochs=2)
    assert set(pruning.masks) == set(COUPLED)
    kernel, bias, head, _ = (np.abs(weight.numpy()) for weight in model.weights)
    alive = kernel.sum(0) > 0
    assert alive.sum() == 8
    assert (alive == (bias > 0)).all() and (alive == (head.sum(1) > 0)).all()


def test_coupled_channels_are_saved_and_restored_with_the_callback():
    pruning = tfc.callbacks.Pruning(0.5, structure=CHANNELS)
    config = keras.saving.serialize_keras_object(pruning)
    assert keras.saving.deserialize_keras_object(config).structure == CHANNELS


def test_one_shot_pruning_of_coupled_channels():
    model = tfc.prune(mlp(), 0.5, structure=CHANNELS)
    kernel, _, head, _ = (weight.numpy() for weight in model.weights)
    gone = ~kernel.any(0)
    assert gone.sum() == 8 and (gone == ~head.any(1)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: tfc.callbacks.Pruning({"*": 0.5}, structure=CHANNELS), "sparsity=.*one number"),
        (lambda m: tfc.callbacks.Pruning(0.5, "batch_norm", CHANNELS), "criterion='batch_norm'"),
        (lambda m: tfc.callbacks.Pruning(0.5, structure=CHANNELS, regrowth="set"), "regrowth="),
        (lambda m: tfc.callbacks.Pruning(0.5, structure=CHANNELS, include="*"), "channel_groups"),
        (lambda m: tfc.prune(m, threshold=0.1, structure=CHANNELS), "threshold=0.1"),
        (lambda m: tfc.prune(attention(), 0.5, structure=CHANNELS), "which .* has not"),
        (lambda m: tfc.sensitivity(m, None, structure=CHANNELS), "one weight at a time"),
        (lambda m: tfc.layers.Prune(m.layers[0], 0.5, structure=CHANNELS).build((1, 12)), "none"),
    ],
)
def test_what_goes_by_single_weights_is_refused_for_coupled_channels(make, message):
    with pytest.raises(ValueError, match=message):
        make(mlp())


def attention():
    x = inputs = keras.Input((5, 8))
    y = keras.layers.MultiHeadAttention(4, 2, name="mha")(x, x)
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([x, y]))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(y))


def test_heads_go_as_a_whole():
    model = compile_classifier(attention())
    pruning = tfc.callbacks.Pruning(0.5, structure="head")
    x = np.random.default_rng(0).normal(size=(8, 5, 8)).astype("float32")
    model.fit(x, np.zeros(8), verbose=0, callbacks=[pruning])
    heads = {
        path.split("/")[-2]: mask.numpy().any((1, 2) if "output" in path else (0, 2))
        for path, mask in pruning.masks.items()
    }
    assert list(heads) == ["query", "key", "value", "attention_output"]
    assert all((each == heads["query"]).all() for each in heads.values())
    assert heads["query"].sum() == 2
    assert "not an attention kernel" in pruning.skipped[model.layers[-1].kernel.path]


def test_channels_leave_the_output_layer_whole():
    model = compile_classifier(mlp())
    pruning = tfc.callbacks.Pruning(0.5, structure="channel")
    train(model, [pruning])
    hidden, head = kernels(model).values()
    assert (np.abs(hidden).sum(0) == 0).sum() == 8 and (head != 0).all()
    assert pruning.skipped[model.layers[-1].kernel.path] == "the model's output layer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "2:4", "sparsity": 0.6}, "ends at the sparsity 0.5, got 0.6"),
        ({"structure": "2:4", "allocation": "global"}, "allocation='global' has no say"),
        ({"structure": "2:4", "regrowth": "rigl"}, "regrowth='rigl' exchanges units freely"),
        ({"sparsity": 0.5, "criterion": "movement", "regrowth": "set"}, "exchanges units freely"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "needs calibration data"),
        ({"sparsity": 0.5, "criterion": "batch_norm"}, 'Pass structure="channel"'),
        (
            {"sparsity": 0.5, "criterion": tfc.criteria.Movement(0.1)},
            "Soft movement decides the sparsity",
        ),
        ({"sparsity": 0.5, "structure": "blob"}, "Unknown structure 'blob'"),
    ],
)
def test_parts_that_exclude_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfc.callbacks.Pruning(**arguments)


def test_a_group_lasso_makes_whole_channels_zero():
    model = compile_classifier(mlp(), keras.optimizers.SGD(0.1))
    lasso = tfc.callbacks.L1Regularization(0.05, proximal=True, structure="channel")
    train(model, [lasso], epochs=20)
    hidden = np.abs(next(iter(kernels(model).values())))
    empty = hidden.sum(0) == 0
    assert 0 < empty.sum() < 16
    assert (hidden[:, ~empty] > 0).all()


def test_the_penalty_in_the_loss_is_the_group_lasso():
    model = compile_classifier(mlp())
    before = next(iter(kernels(model).values()))
    lasso = tfc.callbacks.L1Regularization(0.5, structure="channel")
    with lasso.attached(model):
        model.train_on_batch(*classification())
        losses = [float(loss) for loss in model.losses]
        weight = next(iter(kernels(model).values()))
    assert losses == pytest.approx([0.5 * 12**0.5 * np.linalg.norm(weight, axis=0).sum()])
    assert not np.array_equal(weight, before) and model.losses == []


def test_everything_survives_serialization():
    pruning = tfc.callbacks.Pruning(
        tfc.schedules.Cyclic(0.9, cycles=3, cycle_steps=5),
        criterion=tfc.criteria.Random(3),
        structure=tfc.structures.Block(2, 4),
        allocation="erk",
        regrowth=tfc.regrowth.RigL(0.2, end_step=9),
    )
    copy = tfc.callbacks.Pruning.from_config(pruning.get_config())
    assert copy.get_config() == pruning.get_config()
    assert (copy.criterion, copy.structure) == (pruning.criterion, pruning.structure)
    assert (copy.sparsity, copy.regrowth) == (pruning.sparsity, pruning.regrowth)
