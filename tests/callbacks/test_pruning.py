import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.models import (
    classification,
    compile_classifier,
    kernels,
    mlp,
    nested,
    subclassed,
    unbuilt_mlp,
)

DECAY = tfc.schedules.PolynomialDecay(0.0, 0.8, begin_step=2, end_step=11)


def num_zeros(model):
    return [int((w == 0).sum()) for w in kernels(model).values()]


def asked(model, sparsity):
    return [w.size - max(round(w.size * (1 - sparsity)), 1) for w in kernels(model).values()]


def train(model, callbacks, epochs=4, **kwargs):
    x, y = classification()
    model.fit(x, y, batch_size=24, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs)
    return model


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Muon", "Lion"])
def test_every_optimizer_ends_with_the_exact_number_of_zeros(name):
    optimizer = getattr(keras.optimizers, name)()  # Keras 3.12 has no string for Muon.
    model = train(compile_classifier(mlp(), optimizer), [tfc.callbacks.Pruning(DECAY, frequency=4)])
    assert num_zeros(model) == asked(model, 0.8)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("steps_per_execution", [1, 8])
def test_however_the_step_is_compiled(jit_compile, steps_per_execution):
    model = compile_classifier(
        mlp(), "adam", jit_compile=jit_compile, steps_per_execution=steps_per_execution
    )
    train(model, [tfc.callbacks.Pruning(DECAY, frequency=4)])
    assert num_zeros(model) == asked(model, 0.8)


@pytest.mark.parametrize("make", [mlp, unbuilt_mlp, nested, subclassed])
def test_every_kind_of_model(make):
    model = train(compile_classifier(make()), [tfc.callbacks.Pruning(0.75)])
    assert num_zeros(model) == asked(model, 0.75)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = train(
            compile_classifier(mlp(), "adam"), [tfc.callbacks.Pruning(DECAY, frequency=4)]
        )
    finally:
        keras.config.set_dtype_policy("float32")
    assert num_zeros(model) == asked(model, 0.8)


def test_gradient_accumulation_counts_updates():
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2)
    schedule = tfc.schedules.Linear(0.0, 0.5, begin_step=0, end_step=8)
    model = train(
        compile_classifier(mlp(), optimizer), [tfc.callbacks.Pruning(schedule, frequency=3)]
    )
    assert num_zeros(model) == asked(model, 0.5)  # 16 batches, 8 updates: just reached.


@pytest.mark.parametrize("overwrite", [None, 3])
def test_a_moving_average_of_the_weights_is_pruned(overwrite):
    optimizer = keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=overwrite)
    model = train(compile_classifier(mlp(), optimizer), [tfc.callbacks.Pruning(DECAY, frequency=4)])
    assert num_zeros(model) == asked(model, 0.8)


@pytest.mark.parametrize("behind", [False, True])
def test_swapped_in_averages_are_pruned(behind):
    optimizer = keras.optimizers.Adam(use_ema=True)
    callbacks = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        tfc.callbacks.Pruning(DECAY, frequency=4),
    ]
    model = train(compile_classifier(mlp(), optimizer), callbacks[:: -1 if behind else 1])
    assert num_zeros(model) == asked(model, 0.8)


@pytest.mark.parametrize("behind", [False, True])
def test_the_best_epochs_weights_are_pruned(behind):
    class Worse(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["loss"] = float(epoch)  # The first epoch, not yet pruned, is the best.

    stop = keras.callbacks.EarlyStopping("loss", patience=10, restore_best_weights=True)
    schedule = tfc.schedules.PolynomialDecay(0.0, 0.8, begin_step=8, end_step=11)
    callbacks = [Worse(), stop, tfc.callbacks.Pruning(schedule, frequency=2)]
    model = train(compile_classifier(mlp()), callbacks[:: -1 if behind else 1])
    assert num_zeros(model) == asked(model, 0.8)


def test_a_second_fit():
    model = compile_classifier(mlp(), "adam")
    train(model, [tfc.callbacks.Pruning(DECAY, frequency=4)])
    train(model, [tfc.callbacks.Pruning(0.9)])
    assert num_zeros(model) == asked(model, 0.9)


def test_the_zeros_are_there_at_every_step():
    class Watch(keras.callbacks.Callback):
        seen: list = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append(num_zeros(self.model))

    watch = Watch()
    schedule = tfc.schedules.Linear(0.0, 0.5, begin_step=4, end_step=8)
    model = train(
        compile_classifier(mlp(), "adam"), [tfc.callbacks.Pruning(schedule, frequency=2), watch]
    )
    sizes = [w.size for w in kernels(model).values()]
    expected = [0.0] * 5 + [0.25, 0.25] + [0.5] * 9  # After updates 1 to 16.
    assert watch.seen == [[size - round(size * (1 - s)) for size in sizes] for s in expected]


def test_a_step_without_a_choice_passes_the_choice_as_one_node():
    """Inlined into the step, the untaken branch has hundreds of nodes, all of them visited."""
    model = compile_classifier(mlp(), "adam")
    pruning = tfc.callbacks.Pruning(DECAY, frequency=4)
    with pruning.attached(model):
        step = tf.function(pruning._around_update).get_concrete_function(lambda: None)
    library = step.graph.as_graph_def().library.function
    functions = {function.signature.name: function for function in library}
    (condition,) = (op for op in step.graph.get_operations() if op.type.endswith("If"))
    calls = [
        node.attr["f"].func.name
        for node in functions[condition.get_attr("then_branch").name].node_def
        if node.op.endswith("PartitionedCall")
    ]
    assert [functions[name].attr["_noinline"].b for name in calls] == [True]


def test_global_allocation_prunes_the_sum_exactly():
    model = train(compile_classifier(mlp()), [tfc.callbacks.Pruning(0.7, allocation="global")])
    total = sum(w.size for w in kernels(model).values())
    assert sum(num_zeros(model)) == total - round(total * 0.3)


def test_a_dictionary_gives_each_weight_its_own():
    sparsity = {"*head*": 0.5, "*": tfc.schedules.Linear(0.0, 0.9, begin_step=0, end_step=10)}
    pruning = tfc.callbacks.Pruning(sparsity, exclude="*inner*", frequency=3)
    model = train(compile_classifier(nested()), [pruning])
    by_layer = dict(zip((p.split("/")[-2] for p in kernels(model)), num_zeros(model), strict=True))
    assert by_layer == {"inner": 0, "shared": 144 - 14, "head": 18}
    assert [path.split("/")[-2] for path in pruning.applied] == ["shared", "head"]
    assert "excluded" in pruning.skipped.values()


def test_the_masks_are_reported():
    pruning = tfc.callbacks.Pruning(0.5)
    model = train(compile_classifier(mlp()), [pruning])
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(pruning.masks[path].numpy(), weight != 0)
        assert pruning.masks[path].dtype == "bool"


def test_the_student_of_a_distiller_is_pruned_and_not_its_teacher():
    teacher, student = mlp(), mlp()
    before = kernels(teacher)
    distiller = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation()
    )
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    teacher_before = [w.numpy() for w in teacher.weights]
    train(distiller, [tfc.callbacks.Pruning(0.5)])
    assert num_zeros(student) == asked(student, 0.5)
    for now, then in zip(teacher.weights, teacher_before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert before


def test_a_threshold_prunes_at_the_start_and_the_zeros_hold():
    model = compile_classifier(mlp())
    below = {path: np.abs(w) < 0.2 for path, w in kernels(model).items()}
    pruning = tfc.callbacks.ThresholdPruning(0.2)
    train(model, [pruning])
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight == 0, below[path])
        np.testing.assert_array_equal(pruning.masks[path].numpy(), ~below[path])


def test_a_threshold_that_leaves_nothing_is_warned_about():
    with pytest.warns(UserWarning, match="threshold 9 left nothing of 'mlp/head/kernel'|hidden"):
        train(compile_classifier(mlp()), [tfc.callbacks.ThresholdPruning(9)])


def test_a_schedule_that_training_does_not_reach_is_warned_about():
    schedule = tfc.schedules.Linear(0.0, 0.5, begin_step=0, end_step=1000)
    with pytest.warns(UserWarning, match="Training ends at step 16, before .* at step 1000"):
        train(compile_classifier(mlp()), [tfc.callbacks.Pruning(schedule)])


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 80, {"*": 1.5}])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"fraction of zeros in \[0, 1\), got"):
        tfc.callbacks.Pruning(sparsity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "sparsity is needed"),
        ({"sparsity": {}}, "sparsity is an empty dict"),
        ({"sparsity": "half"}, "Expected a number or a schedule, got 'half'"),
        ({"sparsity": 0.5, "criterion": "magic"}, "Unknown criterion 'magic'"),
        ({"sparsity": 0.5, "structure": "magic"}, "Unknown structure 'magic'"),
        ({"sparsity": 0.5, "allocation": "magic"}, "Unknown allocation 'magic'"),
        ({"sparsity": 0.5, "frequency": 0}, "frequency must be a whole number"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfc.callbacks.Pruning(**arguments)


@pytest.mark.parametrize("make", [mlp, unbuilt_mlp])
@pytest.mark.parametrize("arguments", [{"include": "nothing"}, {"sparsity": {"nothing": 0.5}}])
def test_a_glob_that_matches_nothing_is_refused_and_nothing_is_left(make, arguments):
    model = compile_classifier(make())
    with pytest.raises(ValueError, match="The glob 'nothing' matches no variable"):
        train(model, [tfc.callbacks.Pruning(**{"sparsity": 0.5, **arguments})])
    assert "compression_state" not in vars(model)
    assert "apply" not in vars(model.optimizer)


def test_weights_that_are_not_finite_are_refused():
    model = compile_classifier(mlp())
    model.layers[0].kernel.assign(np.full((12, 16), np.nan))
    with pytest.raises(ValueError, match="'mlp/hidden/kernel' holds NaN or infinity"):
        train(model, [tfc.callbacks.Pruning(0.5)])


def test_a_model_without_kernels_is_refused():
    model = keras.Sequential([keras.Input((12,)), keras.layers.LayerNormalization()])
    with pytest.raises(ValueError, match="has no weight to compress"):
        train(compile_classifier(model), [tfc.callbacks.Pruning(0.5)])


def test_two_callbacks_on_one_weight_are_refused():
    with pytest.raises(ValueError, match="Two Pruning callbacks work on the same weights"):
        train(compile_classifier(mlp()), [tfc.callbacks.Pruning(0.5), tfc.callbacks.Pruning(0.6)])


def test_two_callbacks_on_different_weights():
    callbacks = [
        tfc.callbacks.Pruning(0.5, include="*hidden*"),
        tfc.callbacks.Pruning(0.25, include="*head*"),
    ]
    model = train(compile_classifier(mlp()), callbacks)
    assert num_zeros(model) == [96, 12]


def test_a_step_count_from_the_middle_of_training_is_caught_up_with():
    model = compile_classifier(mlp())
    train(model, [], epochs=5)
    train(model, [tfc.callbacks.Pruning(DECAY, frequency=4)], epochs=1)
    assert num_zeros(model) == asked(model, 0.8)


def test_it_survives_serialization():
    pruning = tfc.callbacks.Pruning({"*": DECAY}, allocation="global", frequency=7, exclude="x*")
    config = keras.saving.serialize_keras_object(pruning)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == pruning.get_config()
    assert copy.sparsity == {"*": DECAY}


def test_the_logger_puts_the_sparsity_into_the_logs(tmp_path):
    logger = tfc.callbacks.CompressionLogger(tmp_path)
    x, y = classification()
    model = compile_classifier(mlp())
    history = model.fit(
        x, y, epochs=2, verbose=0, callbacks=[tfc.callbacks.Pruning(0.75), logger]
    ).history
    assert history["sparsity"] == [0.75, 0.75]
    events = [
        tf.compat.v1.Event.FromString(record.numpy())
        for record in tf.data.TFRecordDataset([str(next(tmp_path.glob("events*")))])
    ]
    tags = {value.tag for event in events for value in event.summary.value}
    assert {"compression/sparsity", "compression/sparsity/mlp/hidden/kernel"} <= tags


def test_the_logger_counts_what_movement_masks_while_the_weights_keep_their_value():
    class Zeros(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            zeros.append(num_zeros(self.model))

    zeros = []
    x, y = classification()
    model = compile_classifier(mlp())
    pruning = tfc.callbacks.Pruning({"*hidden*": 0.75}, criterion="movement")
    callbacks = [pruning, Zeros(), tfc.callbacks.CompressionLogger()]
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    hidden, head = 12 * 16, 16 * 3
    assert history["sparsity"] == [0.75 * hidden / (hidden + head)] * 2
    assert zeros == [[0, 0]] * 2 and num_zeros(model) == [0.75 * hidden, 0]
