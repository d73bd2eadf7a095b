"""Models in stages: equal to one device, each way of running them in a process of its own."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import classification, mlp
from tests.parallel import stages
from tests.processes import run_module
from tfcompress.parallel import Balance, Pipeline, layer_costs

# Any number of stages may lie on one device; the processes below have several.
TWICE = ["CPU:0", "CPU:0"]


def test_two_stages_train_as_one_device():
    cases = ["tied, 1F1B", "memory limit"]  # All are run by the slow tests.
    result = run_module("tests.parallel.stages", 2, *cases)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{case}: ok" for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("case", stages.CASES)
def test_stages_train_as_one_device(case):
    result = run_module("tests.parallel.stages", 2, case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["transformer, 1F1B", "several", "mlp"])
def test_three_stages_train_as_one_device(case):
    result = run_module("tests.parallel.stages", 3, case)
    assert result.returncode == 0, result.stdout + result.stderr


def test_stages_say_what_they_hold():
    model = stages.deep()
    pipeline = Pipeline(model, TWICE)
    first, second = pipeline.stages
    assert [len(first.layers), len(second.layers)] == [2, 2]
    assert first.weight_bytes == (12 * 16 + 16 + 16 * 16 + 16) * 4
    assert second.weight_bytes == (16 * 16 + 16 + 16 * 3 + 3) * 4
    assert first.received_bytes == 0
    assert second.received_bytes == 16 * 4
    assert 0.5 < first.cost / second.cost < 2
    assert {id(v) for v in pipeline.variables} == {id(v) for v in model.variables}


def test_a_shared_weight_lies_with_the_first_stage_that_uses_it():
    model = stages.tied()
    first, second = Pipeline(model, TWICE).stages
    layer = next(each for each in model.layers if each.name.endswith("shared"))
    assert {v.path for v in layer.variables} <= set(second.shared)
    assert first.weight_bytes + second.weight_bytes == sum(
        v.numpy().nbytes for v in model.variables
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_of_any_size_are_split(size, training):
    model = mlp()
    x, _ = classification(size)
    pipeline = Pipeline(model, TWICE, microbatches=3)
    np.testing.assert_allclose(pipeline(x, training=training), model(x), atol=1e-6)


def test_a_batch_of_unknown_size_is_split_if_it_is_large_enough():
    model = mlp()
    pipeline = Pipeline(model, TWICE, microbatches=3)
    function = tf.function(
        lambda x: pipeline(x, training=False),
        input_signature=[tf.TensorSpec((None, 12), tf.float32)],
        autograph=False,
    )
    for size in (1, 3, 7):
        x, _ = classification(size)
        np.testing.assert_allclose(function(x), model(x), atol=1e-6)


def test_a_memory_limit_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="cannot be cut into 2 stages of at most 100"):
        Pipeline(mlp(), TWICE, balance=Balance(memory_limit=100))


def batch_norms_of(model):
    return [each for each in model.layers if isinstance(each, layers.BatchNormalization)]


def test_batch_norms_take_the_statistics_of_each_microbatch(caplog):
    model = stages.normalized()
    alone = keras.models.clone_model(model)
    alone.set_weights(model.get_weights())
    x, _ = classification(8)
    pipeline = Pipeline(model, TWICE, microbatches=2)
    assert "take the statistics of each micro-batch" in caplog.text
    outputs = pipeline(x, training=True)
    expected = np.concatenate([alone(x[:4], training=True), alone(x[4:], training=True)])
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    for ours, theirs in zip(batch_norms_of(model), batch_norms_of(alone), strict=True):
        np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, atol=1e-7)
        np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, atol=1e-7)


def test_dropout_is_drawn_for_each_microbatch():
    x = keras.Input((500,))
    model = keras.Model(x, layers.Dropout(0.25)(layers.Identity()(x)))
    pipeline = Pipeline(model, TWICE, microbatches=2)
    ones = np.ones((8, 500), "float32")
    outputs = pipeline(ones, training=True).numpy()
    assert 0.2 < np.mean(outputs == 0) < 0.3
    assert set(np.unique(outputs).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert np.any(outputs[:4] != outputs[4:])
    np.testing.assert_array_equal(pipeline(ones, training=False), ones)


def test_release_leaves_the_trained_model():
    x, y = classification(16)
    model = mlp()
    before = model.get_weights()
    pipeline = Pipeline(model, TWICE, microbatches=2)
    pipeline.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pipeline.fit(x, y, batch_size=8, verbose=0)
    assert pipeline.release() is model
    assert any(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))
    np.testing.assert_allclose(model(x), pipeline(x), atol=1e-6)


def test_costs_that_were_measured_move_the_cut():
    model = stages.deep()
    costs = layer_costs(model, np.zeros((4, 12), "float32"))
    slow = [type(c)(c.name, 1.0, 0.0, c.weight_bytes, c.output_bytes, c.reads) for c in costs[:1]]
    pipeline = Pipeline(model, TWICE, balance=Balance(costs=[*slow, *costs[1:]]))
    assert [len(stage.layers) for stage in pipeline.stages] == [1, 3]


def test_costs_of_another_model_are_refused():
    costs = layer_costs(mlp(), np.zeros((1, 12), "float32"))
    with pytest.raises(ValueError, match="The costs are not those of"):
        Pipeline(stages.deep(), TWICE, balance=Balance(costs=costs))


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="devices must be names of devices that TensorFlow has"):
        Pipeline(mlp(), ["CPU:0", "GPU:7"])
    with pytest.raises(ValueError, match="3 stages cannot be made of 2 layers"):
        Pipeline(mlp(), [*TWICE, "CPU:0"])
    with pytest.raises(ValueError, match="schedule must be"):
        Pipeline(mlp(), TWICE, schedule="other")
    with pytest.raises(ValueError, match="microbatches must be a whole number"):
        Pipeline(mlp(), TWICE, microbatches=0)


def test_layers_that_add_losses_are_refused():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, activity_regularizer="l2"), layers.Dense(2)]
    )
    with pytest.raises(ValueError, match="adds losses of its own"):
        Pipeline(model, TWICE)


def test_xla_of_the_whole_step_is_refused():
    with pytest.raises(ValueError, match=r"Use Pipeline\(..., xla=True\)"):
        Pipeline(mlp(), TWICE).compile("sgd", "mse", jit_compile=True)


def test_1f1b_refuses_losses_that_are_no_means():
    pipeline = Pipeline(mlp(), TWICE, schedule="1f1b")
    pipeline.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"), run_eagerly=True)
    with pytest.raises(ValueError, match='Use schedule="gpipe"'):
        pipeline.train_on_batch(np.zeros((4, 12)), np.zeros((4, 3)))


def test_it_is_the_model_that_is_saved():
    with pytest.raises(NotImplementedError, match="save pipeline.model"):
        Pipeline(mlp(), TWICE).get_config()


def test_a_stage_works_on_one_microbatch_after_another():
    """Control edges: without them TensorFlow would start all micro-batches at once."""
    pipeline = Pipeline(mlp(), TWICE, microbatches=2)
    function = tf.function(lambda x: pipeline(x, training=False), autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec((4, 12), tf.float32)).graph
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    assert len(calls) == 4
    assert sum(bool(op.control_inputs) for op in calls) >= 2
