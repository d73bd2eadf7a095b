"""Schedules: step -> value.

A schedule is a frozen value that is called with the number of completed optimizer updates. It takes
Python ints and gives Python floats; it takes tensors and gives float64 tensors, in eager mode, in a
graph and under XLA, so the same object serves a report and a compiled training step. `begin_step`
and `end_step` bound the steps at which it acts; its last value is reached exactly.
"""

import dataclasses
import math
from typing import Any

import keras
import tensorflow as tf

__all__ = ["Constant", "Cosine", "Linear", "OneShot", "PolynomialDecay", "Schedule", "get"]


class Schedule:
    """What every schedule offers: a value at a step, and the steps at which it acts.

    Subclass it as a frozen dataclass with the fields `begin_step` and `end_step`, and define
    `value(progress)` with progress in [0, 1]; any callable with those two fields serves as well.
    """

    begin_step: int
    end_step: int | None

    def __call__(self, step):
        """The value at `step`, a count of completed updates; before `begin_step` the first one."""
        return self.value(self._progress(step))

    def value(self, progress):
        """The value at `progress`, the share of [begin_step, end_step] that has passed."""
        raise NotImplementedError(f"{type(self).__name__} must define value(progress).")

    def get_config(self) -> dict[str, Any]:
        """The constructor arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """The schedule that `get_config` described."""
        return cls(**config)

    def _progress(self, step):
        if self.end_step is None:
            return 1.0
        span = max(self.end_step - self.begin_step, 1)
        if tf.is_tensor(step) or isinstance(step, keras.Variable):
            step = tf.cast(tf.convert_to_tensor(step), tf.float64)
            return tf.clip_by_value((step - self.begin_step) / span, 0.0, 1.0)
        return min(max((step - self.begin_step) / span, 0.0), 1.0)


def _check_steps(begin_step, end_step):
    if begin_step < 0:
        raise ValueError(f"begin_step must be 0 or more, got {begin_step}.")
    if end_step is not None and end_step <= begin_step:
        raise ValueError(
            f"end_step must come after begin_step, got begin_step={begin_step} and "
            f"end_step={end_step}. Use OneShot for a single step."
        )


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same value from `begin_step` on.

    Args:
        value: The value.
        begin_step: First step at which it acts, in optimizer updates.
        end_step: Last step at which it acts; None for no end.

    Example:

    >>> Constant(0.5)(1000)
    0.5
    """

    constant: float
    begin_step: int = 0
    end_step: int | None = None

    def __init__(self, value, begin_step=0, end_step=None):
        _check_steps(begin_step, end_step)
        object.__setattr__(self, "constant", value)
        object.__setattr__(self, "begin_step", begin_step)
        object.__setattr__(self, "end_step", end_step)

    def value(self, progress):
        """The constant."""
        if tf.is_tensor(progress):
            return tf.constant(self.constant, tf.float64)
        return self.constant

    def get_config(self):
        """The constructor arguments."""
        return {
            "value": self.constant,
            "begin_step": self.begin_step,
            "end_step": self.end_step,
        }


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class OneShot(Schedule):
    """One value, applied at one step and held from then on.

    Args:
        final_sparsity: The value.
        step: When it is applied, in optimizer updates.

    Example:

    >>> OneShot(0.8, step=100)(100)
    0.8
    """

    final_sparsity: float
    step: int = 0

    def __post_init__(self):
        _check_steps(self.step, None)

    @property
    def begin_step(self):
        """The step at which it acts."""
        return self.step

    @property
    def end_step(self):
        """The same step."""
        return self.step

    def value(self, progress):
        """The value."""
        if tf.is_tensor(progress):
            return tf.constant(self.final_sparsity, tf.float64)
        return self.final_sparsity


@dataclasses.dataclass(frozen=True)
class _Ramp(Schedule):
    initial_sparsity: float
    final_sparsity: float
    begin_step: int
    end_step: int

    def __post_init__(self):
        _check_steps(self.begin_step, self.end_step)

    def _between(self, remaining):
        """From final to initial; in this form exact at both ends."""
        return self.final_sparsity * (1.0 - remaining) + self.initial_sparsity * remaining


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class PolynomialDecay(_Ramp):
    """From `initial_sparsity` to `final_sparsity`, fast at first: the pruning schedule.

    `final + (initial - final) * (1 - progress) ** power`, cubic by default
    ([Zhu & Gupta 2017](https://arxiv.org/abs/1710.01878)).

    Args:
        initial_sparsity: Value at `begin_step`, in [0, 1) for a sparsity.
        final_sparsity: Value from `end_step` on, reached exactly.
        begin_step: First step, in optimizer updates.
        end_step: Last step, in optimizer updates.
        power: Exponent, 1 is linear.

    Example:

    >>> PolynomialDecay(0.0, 0.8, begin_step=0, end_step=100)(100)
    0.8
    """

    power: float = 3

    def value(self, progress):
        """The value at `progress`."""
        return self._between((1.0 - progress) ** self.power)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Linear(_Ramp):
    """From `initial_sparsity` to `final_sparsity` in a straight line.

    Args:
        initial_sparsity: Value at `begin_step`.
        final_sparsity: Value from `end_step` on, reached exactly.
        begin_step: First step, in optimizer updates.
        end_step: Last step, in optimizer updates.

    Example:

    >>> Linear(0.0, 0.5, begin_step=10, end_step=20)(15)
    0.25
    """

    def value(self, progress):
        """The value at `progress`."""
        return self._between(1.0 - progress)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Cosine(_Ramp):
    """From `initial_sparsity` to `final_sparsity` on half a cosine, gentle at both ends.

    `final + (initial - final) * (1 + cos(pi * progress)) / 2`
    ([Loshchilov & Hutter 2017](https://arxiv.org/abs/1608.03983)).

    Args:
        initial_sparsity: Value at `begin_step`.
        final_sparsity: Value from `end_step` on, reached exactly.
        begin_step: First step, in optimizer updates.
        end_step: Last step, in optimizer updates.

    Example:

    >>> Cosine(0.0, 0.5, begin_step=0, end_step=100)(100)
    0.5
    """

    def value(self, progress):
        """The value at `progress`."""
        cos = tf.cos if tf.is_tensor(progress) else math.cos
        return self._between((1.0 + cos(math.pi * progress)) / 2)


def get(identifier) -> Schedule:
    """A schedule from a number (held from step 0 on) or from a schedule.

    Args:
        identifier: A number, a `Schedule`, or a callable with `begin_step` and `end_step`.

    Returns:
        The schedule.

    Raises:
        ValueError: Neither of these.

    Example:

    >>> get(0.5)
    Constant(constant=0.5, begin_step=0, end_step=None)
    """
    if isinstance(identifier, (int, float)) and not isinstance(identifier, bool):
        return Constant(float(identifier))
    if callable(identifier) and hasattr(identifier, "begin_step"):
        return identifier
    raise ValueError(
        f"Expected a number or a schedule, got {identifier!r}. Pass e.g. 0.8 or "
        "tfcompress.schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=1000)."
    )


def is_due(schedule: Schedule, step, frequency: int):
    """Whether something that follows `schedule` every `frequency` steps is updated at `step`.

    It is at `begin_step`, every `frequency` steps from there, and at `end_step` whatever the
    frequency, so that the last value is reached; not before and not after.

    Args:
        schedule: A schedule; an `end_step` of None means for ever.
        step: An int or a scalar integer tensor.
        frequency: In steps, 1 or more.

    Returns:
        A bool or a boolean tensor.

    Example:

    >>> schedule = Linear(0.0, 0.5, begin_step=0, end_step=25)
    >>> [step for step in range(40) if is_due(schedule, step, frequency=10)]
    [0, 10, 20, 25]
    """
    begin, end = schedule.begin_step, schedule.end_step
    on_grid = (step >= begin) & ((step - begin) % frequency == 0)
    return on_grid if end is None else (on_grid & (step <= end)) | (step == end)


def check_sparsity(schedule: Schedule) -> Schedule:
    """The schedule, whose first and last values must be sparsities.

    Args:
        schedule: A schedule.

    Returns:
        The same schedule.

    Raises:
        ValueError: A value outside [0, 1).

    Example:

    >>> check_sparsity(Constant(80))
    Traceback (most recent call last):
    ...
    ValueError: A sparsity is a fraction of zeros in [0, 1), got 80 from Constant(...)...
    """
    for step in (schedule.begin_step, schedule.end_step or schedule.begin_step):
        if not 0 <= schedule(step) < 1:
            raise ValueError(
                f"A sparsity is a fraction of zeros in [0, 1), got {schedule(step)} from "
                f"{schedule}. For 80% zeros pass 0.8."
            )
    return schedule
