import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress import schedules

RAMPS = [
    schedules.PolynomialDecay,
    schedules.Linear,
    schedules.Cosine,
    schedules.Exponential,
]
ALL = [
    schedules.Constant(0.5),
    schedules.Constant(0.5, begin_step=3, end_step=9),
    schedules.OneShot(0.5, step=7),
    *[ramp(0.1, 0.9, begin_step=10, end_step=110) for ramp in RAMPS],
    schedules.Cyclic(0.9, cycles=4, cycle_steps=20, begin_step=10),
    schedules.Cyclic(0.9, cycles=1, cycle_steps=20),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_starts_and_ends_exactly(ramp):
    schedule = ramp(0.1, 0.87, begin_step=10, end_step=110)
    assert [schedule(step) for step in (0, 10, 110, 10**9)] == [0.1, 0.1, 0.87, 0.87]


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_never_falls(ramp):
    schedule = ramp(0.0, 0.9, begin_step=5, end_step=50)
    assert np.all(np.diff([schedule(step) for step in range(60)]) >= 0)


def test_polynomial_decay_is_the_published_formula():
    schedule = schedules.PolynomialDecay(0.2, 0.8, begin_step=100, end_step=200)
    assert schedule(125) == pytest.approx(0.8 + (0.2 - 0.8) * (1 - 0.25) ** 3)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_tensor_step_gives_the_same_value(schedule, jit_compile):
    function = tf.function(
        lambda step: tf.convert_to_tensor(schedule(step), tf.float64), jit_compile=jit_compile
    )
    for step in (0, 7, 10, 33, 110, 500):
        assert float(function(tf.constant(step, tf.int64))) == pytest.approx(schedule(step), 1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_survives_serialization(schedule):
    config = keras.saving.serialize_keras_object(schedule)
    assert keras.saving.deserialize_keras_object(config) == schedule


def test_it_is_due_on_the_grid_and_at_the_end():
    schedule = schedules.Linear(0.0, 0.5, begin_step=3, end_step=14)
    due = [step for step in range(30) if schedules.is_due(schedule, step, frequency=5)]
    assert due == [3, 8, 13, 14]


def test_it_is_due_for_ever_without_an_end():
    due = [s for s in range(12) if schedules.is_due(schedules.Constant(0.5, 2), s, frequency=4)]
    assert due == [2, 6, 10]


def test_a_number_is_a_constant():
    assert schedules.get(0.3) == schedules.Constant(0.3)


@pytest.mark.parametrize("wrong", ["0.5", None, True, [0.5]])
def test_what_is_no_schedule_is_refused(wrong):
    with pytest.raises(ValueError, match="Expected a number or a schedule"):
        schedules.get(wrong)


def test_an_end_before_the_beginning_is_refused():
    with pytest.raises(ValueError, match="begin_step=5 and end_step=5. Use OneShot"):
        schedules.Linear(0.0, 0.5, begin_step=5, end_step=5)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="begin_step must be 0 or more, got -1"):
        schedules.Constant(0.5, begin_step=-1)


@pytest.mark.parametrize("wrong", [1.0, -0.1, 80])
def test_a_sparsity_outside_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"fraction of zeros in \[0, 1\), got"):
        schedules.check_sparsity(schedules.Constant(wrong))


def test_exponential_prunes_the_same_share_every_step():
    schedule = schedules.Exponential(0.2, 0.95, begin_step=4, end_step=14)
    kept = 1 - np.array([schedule(step) for step in range(4, 15)])
    np.testing.assert_allclose(kept[1:] / kept[:-1], (0.05 / 0.8) ** 0.1)


def test_exponential_may_stand_still():
    assert schedules.Exponential(0.5, 0.5, begin_step=0, end_step=10)(3) == 0.5


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("final", [0.87, 0.1, 1 / 3])
def test_the_last_value_is_exact_in_a_graph(final, jit_compile):
    for schedule in (
        *[ramp(0.05, final, begin_step=10, end_step=110) for ramp in RAMPS],
        schedules.Cyclic(final, cycles=3, cycle_steps=20, begin_step=70),
    ):
        function = tf.function(schedule, jit_compile=jit_compile)
        assert function(tf.constant(110, tf.int64)).dtype == tf.float64
        assert [float(function(tf.constant(step))) for step in (110, 999)] == [final, final]


def test_cyclic_prunes_the_same_share_at_every_jump():
    schedule = schedules.Cyclic(0.9, cycles=3, cycle_steps=10, begin_step=5)
    kept = [1 - schedule(step) for step in (0, 5, 14, 15, 24, 25, 99)]
    third = 0.1 ** (1 / 3)
    np.testing.assert_allclose(kept, [third, third, third, third**2, third**2, 0.1, 0.1])
    assert schedule.end_step == 25
    assert schedule(25) == 0.9


@pytest.mark.parametrize("frequency", [1, 7, 1000])
def test_cyclic_is_due_at_its_jumps_whatever_the_frequency(frequency):
    schedule = schedules.Cyclic(0.9, cycles=3, cycle_steps=10, begin_step=5)
    steps = range(60)
    assert [s for s in steps if schedules.is_due(schedule, s, frequency)] == [5, 15, 25]
    in_graph = tf.function(lambda step: schedules.is_due(schedule, step, frequency))
    assert [s for s in steps if in_graph(tf.constant(s, tf.int64))] == [5, 15, 25]


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_a_learning_rate_is_rewound_at_every_jump(jit_compile):
    decay = keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.0)
    rewound = schedules.Cyclic(0.9, cycles=3, cycle_steps=4, begin_step=3).rewind(decay)
    function = rewound
    if jit_compile is not None:
        function = tf.function(rewound, jit_compile=jit_compile)
    since = [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]  # Jumps at 3, 7 and 11.
    rates = [float(function(tf.constant(step))) for step in range(len(since))]
    np.testing.assert_allclose(rates, 1 - np.array(since) / 10, rtol=1e-6)


def test_an_optimizer_with_a_rewound_learning_rate_trains_and_is_saved():
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    rewound = schedules.Cyclic(0.9, cycles=2, cycle_steps=3).rewind(decay)
    optimizer = keras.optimizers.SGD(rewound)
    weight = keras.Variable([0.0])
    changes = []
    for _ in range(5):
        before = float(weight[0])
        optimizer.apply_gradients([(tf.constant([-1.0]), weight)])
        changes.append(float(weight[0]) - before)
    np.testing.assert_allclose(changes, [0.1, 0.05, 0.025, 0.1, 0.05], rtol=1e-5)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert float(again.learning_rate) == pytest.approx(0.1)
    again.iterations.assign(4)
    assert float(again.learning_rate) == pytest.approx(0.05)


def test_a_constant_learning_rate_stays():
    rewound = schedules.Cyclic(0.9, cycles=2, cycle_steps=3).rewind(0.25)
    assert [float(rewound(step)) for step in (0, 3, 99)] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: schedules.Exponential(0.0, 1.0, 0, 10), r"final_sparsity is .* got 1.0. For 80%"),
        (lambda: schedules.Exponential(1.0, 0.5, 0, 10), "initial_sparsity is a fraction of zeros"),
        (lambda: schedules.Cyclic(80, 2, 10), "final_sparsity is a fraction of zeros"),
        (lambda: schedules.Cyclic(0.8, 0, 10), "cycles must be a whole number, 1 or more, got 0"),
        (lambda: schedules.Cyclic(0.8, 2, 0.5), "cycle_steps must be a whole number, 1 or more"),
        (lambda: schedules.Cyclic(0.8, 2, 10, begin_step=-1), "begin_step must be 0 or more"),
        (lambda: schedules.Cyclic(0.8, 2, 10).rewind("0.1"), "Expected a float or a keras"),
        (lambda: schedules.RewoundLearningRate(0.1, 0.8), "Expected a Cyclic schedule"),
        (lambda: schedules.TFMOTSchedule(schedules.Constant(0.5)), "Model Optimization Pruning"),
        (
            lambda: schedules.TFMOTSchedule.from_config(
                {"tfmot_module": "os.path", "tfmot_class": "join", "arguments": {}}
            ),
            "not part of tensorflow_model_optimization, and code is not imported",
        ),
    ],
)
def test_bad_arguments_say_what_to_pass(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def run_with_tfmot(code: str) -> None:
    """Run `code` in a process of its own: TFMOT changes which Keras a process gets."""
    prelude = """
import os, sys, math
import keras, numpy as np, tensorflow as tf
from tfcompress import schedules
def tfmot():
    dir(tf.keras)
    import tensorflow_model_optimization
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    return tensorflow_model_optimization.sparsity.keras
"""
    result = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(schedules.__file__).parent.parent,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert result.returncode == 0, result.stderr


def test_tfmot_schedules_are_accepted_as_they_are():
    run_with_tfmot("""
tfmot = tfmot()
decay = schedules.get(tfmot.PolynomialDecay(0.1, 0.9, begin_step=10, end_step=35, frequency=10))
ours = schedules.PolynomialDecay(0.1, 0.9, begin_step=10, end_step=35)
assert (decay.begin_step, decay.end_step, decay.frequency) == (10, 35, 10)
assert schedules.check_sparsity(decay) is decay
steps = [0, 10, 17, 20, 30, 34, 35, 500]
for jit in (False, True):
    function = tf.function(decay, jit_compile=jit)
    for step in steps:
        value = function(tf.constant(step, tf.int64))
        assert value.dtype == tf.float64
        assert abs(float(value) - ours(step)) < 1e-6, (step, value)
        assert abs(decay(step) - ours(step)) < 1e-6
        assert float(value) == 0.9 or step < 35
assert decay(35) == decay(500) == 0.9
for frequency in (1, 100):
    due = [step for step in range(99) if schedules.is_due(decay, step, frequency)]
    assert due == [10, 20, 30, 35], due
    in_graph = tf.function(lambda step: schedules.is_due(decay, step, frequency))
    assert [s for s in range(99) if in_graph(tf.constant(s, tf.int64))] == due

constant = schedules.get(tfmot.ConstantSparsity(0.7, begin_step=3, frequency=4))
assert constant.end_step is None and constant(3) == constant(10**6) == 0.7
assert [step for step in range(12) if schedules.is_due(constant, step, 5)] == [3, 7, 11]
once = schedules.get(tfmot.ConstantSparsity(0.7, begin_step=3, end_step=3))
assert once(3) == 0.7

class Custom(tfmot.PruningSchedule):
    begin_step = 2
    def __call__(self, step):
        return True, tf.cast(step, tf.float32) / 100.0
    def get_config(self):
        return {"class_name": "Custom", "config": {}}

custom = schedules.get(Custom())
assert (custom.end_step, custom.frequency) == (None, None)
assert abs(custom(30) - 0.3) < 1e-6 and abs(custom(0) - 0.02) < 1e-6
assert [step for step in range(9) if schedules.is_due(custom, step, 3)] == [2, 5, 8]
try:
    keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(custom))
except ValueError as error:
    assert "not part of tensorflow_model_optimization" in str(error), error
else:
    raise AssertionError("a class outside TFMOT was imported")
try:
    schedules.get(tfmot.PolynomialDecay(0.1, 0.9, begin_step=10, end_step=10))
except ValueError as error:
    assert "Give it an end_step after its begin_step" in str(error), error
else:
    raise AssertionError("a schedule without an end was accepted")
try:
    schedules.get(tfmot.PolynomialDecay)
except ValueError as error:
    assert "Expected a number or a schedule" in str(error), error
else:
    raise AssertionError("a class was accepted")
""")


def test_a_tfmot_schedule_survives_serialization_and_leaves_keras_3_in_place():
    run_with_tfmot("""
arguments = {"target_sparsity": 0.7, "begin_step": 3, "end_step": -1, "frequency": 4}
config = {
    "tfmot_module": "tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule",
    "tfmot_class": "ConstantSparsity",
    "arguments": arguments,
}
assert "tensorflow_model_optimization" not in sys.modules
schedule = schedules.TFMOTSchedule.from_config(config)
assert "tensorflow_model_optimization" in sys.modules
assert "TF_USE_LEGACY_KERAS" not in os.environ
assert tf.keras.__version__[0] == "3"
assert schedule(5) == 0.7
assert schedule.get_config() == config
for name in ("tf", "abc", "missing"):
    try:
        schedules.TFMOTSchedule.from_config(config | {"tfmot_class": name})
    except ValueError as error:
        assert "is not a pruning schedule" in str(error)
    else:
        raise AssertionError(name)

tfmot = tfmot()
made = tfmot.PolynomialDecay(0.1, 0.9, begin_step=10, end_step=35, power=2, frequency=7)
schedule = schedules.get(made)
config = keras.saving.serialize_keras_object({"sparsity": schedule})
again = keras.saving.deserialize_keras_object(config)["sparsity"]
assert again == schedule and hash(again) == hash(schedule)
assert again != schedules.get(tfmot.PolynomialDecay(0.1, 0.9, 10, 35))
assert type(again.schedule) is tfmot.PolynomialDecay
assert again.schedule.get_config() == made.get_config()
assert again.schedule is not made
assert "PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.9, power=2" in repr(again)
""")
