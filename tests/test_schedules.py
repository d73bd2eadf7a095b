import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress import schedules

RAMPS = [schedules.PolynomialDecay, schedules.Linear, schedules.Cosine]
ALL = [
    schedules.Constant(0.5),
    schedules.Constant(0.5, begin_step=3, end_step=9),
    schedules.OneShot(0.5, step=7),
    *[ramp(0.1, 0.9, begin_step=10, end_step=110) for ramp in RAMPS],
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
