"""Schedules: step -> value.

A schedule is a frozen value that is called with the number of completed optimizer updates. It takes
Python ints and gives Python floats; it takes tensors and gives float64 tensors, in eager mode, in a
graph and under XLA, so the same object serves a report and a compiled training step. `begin_step`
and `end_step` bound the steps at which it acts; its last value is reached exactly.
"""

import contextlib
import dataclasses
import importlib
import math
import os
from typing import Any

import keras
import tensorflow as tf

from tfcompress.values import Value

__all__ = [
    "Constant",
    "Cosine",
    "Cyclic",
    "Exponential",
    "Linear",
    "OneShot",
    "PolynomialDecay",
    "RewoundLearningRate",
    "Schedule",
    "TFMOTSchedule",
    "get",
]

_TFMOT = "tensorflow_model_optimization"


class Schedule(Value):
    """What every schedule offers: a value at a step, and the steps at which it acts.

    Subclass it as a frozen dataclass with the fields `begin_step` and `end_step`, and define
    `value(progress)` with progress in [0, 1], or `__call__(step)`; any callable with those two
    fields serves as well. A schedule that has a `frequency` acts every so many steps, whatever
    frequency the pruning has.
    """

    begin_step: int
    end_step: int | None

    def __call__(self, step):
        """The value at `step`, a count of completed updates; before `begin_step` the first one."""
        return self.value(self._progress(step))

    def value(self, progress):
        """The value at `progress`, the share of [begin_step, end_step] that has passed."""
        raise NotImplementedError(f"{type(self).__name__} must define value(progress).")

    def _progress(self, step):
        if self.end_step is None:
            return 1.0
        span = max(self.end_step - self.begin_step, 1)
        if _in_graph(step):
            step = tf.cast(tf.convert_to_tensor(step), tf.float64)
            return tf.clip_by_value((step - self.begin_step) / span, 0.0, 1.0)
        return min(max((step - self.begin_step) / span, 0.0), 1.0)


def _in_graph(step):
    return tf.is_tensor(step) or isinstance(step, keras.Variable)


def _check_fraction(name, value):
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} is a fraction of zeros in [0, 1), got {value}. For 80% zeros pass 0.8."
        )


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


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Exponential(_Ramp):
    """From `initial_sparsity` to `final_sparsity`; what is kept falls by one factor every step.

    `1 - (1 - initial) * ((1 - final) / (1 - initial)) ** progress`: each step prunes the same share
    of the weights that are left, the smooth form of iterative pruning
    ([Frankle & Carbin 2019](https://arxiv.org/abs/1803.03635)).

    Args:
        initial_sparsity: Value at `begin_step`, in [0, 1).
        final_sparsity: Value from `end_step` on, in [0, 1), reached exactly.
        begin_step: First step, in optimizer updates.
        end_step: Last step, in optimizer updates.

    Raises:
        ValueError: A sparsity outside [0, 1), or an end that is not after the beginning.

    Example:

    >>> schedule = Exponential(0.0, 0.99, begin_step=0, end_step=100)
    >>> round(schedule(50), 6), schedule(100)
    (0.9, 0.99)
    """

    def __post_init__(self):
        super().__post_init__()
        _check_fraction("initial_sparsity", self.initial_sparsity)
        _check_fraction("final_sparsity", self.final_sparsity)

    def value(self, progress):
        """The value at `progress`."""
        first, last = 1.0 - self.initial_sparsity, 1.0 - self.final_sparsity
        between = 1.0 - first * (last / first) ** progress
        if tf.is_tensor(progress):
            started = tf.where(progress > 0, between, self.initial_sparsity)
            return tf.where(progress < 1, started, self.final_sparsity)
        return {0.0: self.initial_sparsity, 1.0: self.final_sparsity}.get(progress, between)


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Cyclic(Schedule):
    """Iterative pruning: prune a share of what is left, train for `cycle_steps`, and again.

    In cycle c, from 1 to `cycles`, the sparsity is `1 - (1 - final) ** (c / cycles)`. Masks are
    chosen at its jumps and only there, whatever frequency the pruning has
    ([Renda et al. 2020](https://arxiv.org/abs/2003.02389)). `end_step` is the last jump: train for
    another `cycle_steps` after it.

    Args:
        final_sparsity: Value from the last jump on, in [0, 1), reached exactly.
        cycles: How many jumps there are, 1 or more.
        cycle_steps: Optimizer updates from one jump to the next, 1 or more.
        begin_step: The first jump, in optimizer updates.

    Raises:
        ValueError: A value out of its range.

    Example:

    >>> schedule = Cyclic(0.75, cycles=2, cycle_steps=100)
    >>> [schedule(step) for step in (0, 99, 100, 1000)]
    [0.5, 0.5, 0.75, 0.75]
    """

    final_sparsity: float
    cycles: int
    cycle_steps: int
    begin_step: int = 0

    def __post_init__(self):
        _check_fraction("final_sparsity", self.final_sparsity)
        _check_steps(self.begin_step, None)
        for name in ("cycles", "cycle_steps"):
            value = getattr(self, name)
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value}.")

    def __call__(self, step):
        """The value at `step`, a count of completed updates; before `begin_step` the first one."""
        if not _in_graph(step):
            return self._sparsity(min(max(self._jumps(step), 1), self.cycles))
        jumps = tf.clip_by_value(self._jumps(tf.cast(step, tf.int64)), 1, self.cycles)
        values = [self._sparsity(1 + i) for i in range(self.cycles)]
        return tf.gather(tf.constant(values, tf.float64), jumps - 1)

    @property
    def end_step(self):
        """The step of the last jump."""
        return self.begin_step + (self.cycles - 1) * self.cycle_steps

    @property
    def frequency(self):
        """Steps between two jumps."""
        return self.cycle_steps

    def rewind(self, learning_rate) -> "RewoundLearningRate":
        """The learning rate that starts anew at every jump: learning-rate rewinding.

        Retraining with the learning rates of the first training regains more accuracy than
        fine-tuning with the last, small one (Renda et al. 2020).

        Args:
            learning_rate: A float, or a `keras.optimizers.schedules.LearningRateSchedule`.

        Returns:
            A schedule for an optimizer. Before `begin_step` it runs from step 0.

        Example:

        >>> decay = keras.optimizers.schedules.PolynomialDecay(0.1, 100, 0.0)
        >>> learning_rate = Cyclic(0.75, cycles=2, cycle_steps=100).rewind(decay)
        >>> [round(float(learning_rate(step)), 3) for step in (0, 50, 99, 100, 150)]
        [0.1, 0.05, 0.001, 0.1, 0.05]
        """
        return RewoundLearningRate(learning_rate, self)

    def _jumps(self, step):
        return (step - self.begin_step) // self.cycle_steps + 1

    def _sparsity(self, jumps):
        if jumps == self.cycles:
            return float(self.final_sparsity)
        return 1.0 - (1.0 - self.final_sparsity) ** (jumps / self.cycles)


@keras.saving.register_keras_serializable(package="tfcompress")
class RewoundLearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that starts anew at every jump of a `Cyclic` schedule; see `Cyclic.rewind`.

    Args:
        learning_rate: A float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        cyclic: The schedule whose jumps it follows.

    Raises:
        ValueError: Something else was passed.

    Example:

    >>> float(RewoundLearningRate(0.5, Cyclic(0.9, cycles=3, cycle_steps=10))(25))
    0.5
    """

    def __init__(self, learning_rate, cyclic):
        is_schedule = isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
        if not is_schedule and not isinstance(learning_rate, (int, float)):
            raise ValueError(
                "Expected a float or a keras.optimizers.schedules.LearningRateSchedule as learning "
                f"rate, got {learning_rate!r}."
            )
        if not isinstance(cyclic, Cyclic):
            raise ValueError(f"Expected a Cyclic schedule to follow, got {cyclic!r}.")
        self.learning_rate = learning_rate
        self.cyclic = cyclic

    def __call__(self, step):
        """The learning rate at `step`, a count of completed updates."""
        if not callable(self.learning_rate):
            return tf.constant(self.learning_rate, tf.float32)
        step = tf.cast(step, tf.int64)
        begin, cycle = self.cyclic.begin_step, self.cyclic.cycle_steps
        jumps = tf.clip_by_value((step - begin) // cycle, 0, self.cyclic.cycles - 1)
        start = tf.where(step < begin, tf.zeros_like(step), begin + jumps * cycle)
        return self.learning_rate(step - start)

    def get_config(self):
        """The constructor arguments."""
        arguments = {"learning_rate": self.learning_rate, "cyclic": self.cyclic}
        return keras.saving.serialize_keras_object(arguments)

    @classmethod
    def from_config(cls, config):
        """The learning rate that `get_config` described."""
        return cls(**keras.saving.deserialize_keras_object(config))


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True, eq=False)
class TFMOTSchedule(Schedule):
    """A pruning schedule of TensorFlow Model Optimization, as it is, user subclasses included.

    `get` wraps these by itself. Steps and frequency are the schedule's own: masks are chosen where
    it says so. But its last value is applied even if `end_step` is off the grid of the frequency,
    and is not rounded to float32. A schedule without a `begin_step` is 0 where it does not prune.

    Args:
        schedule: A `tfmot.sparsity.keras.PolynomialDecay`, `ConstantSparsity` or another subclass
            of `PruningSchedule`, of TFMOT or of `tfcompress.tfmot`.
        offset: What the schedule's steps are ahead of ours, in steps. TFMOT counts the batch that
            it works on, from 1, and prunes before it; we count completed updates.

    Raises:
        ValueError: Not a pruning schedule of TFMOT, or one whose values are not finite.
    """

    schedule: Any
    offset: int = 0

    def __post_init__(self):
        if not _is_of_tfmot(self.schedule):
            raise ValueError(
                "Expected a TensorFlow Model Optimization PruningSchedule, got "
                f"{self.schedule!r}. Pass e.g. tfmot.sparsity.keras.ConstantSparsity(0.5, 0)."
            )
        for step in (self.begin_step, self.begin_step if self.end_step is None else self.end_step):
            if not math.isfinite(self(step)):
                raise ValueError(
                    f"{self} gives {self(step)} at step {step}; expected a number. Give it an "
                    "end_step after its begin_step."
                )

    @property
    def begin_step(self):
        """The first step at which it acts."""
        return getattr(self.schedule, "begin_step", self.offset) - self.offset

    @property
    def end_step(self):
        """The last step at which it acts, or None for no end, which TFMOT writes as -1."""
        end = getattr(self.schedule, "end_step", -1)
        return None if end < 0 else end - self.offset

    @property
    def frequency(self):
        """Steps between two updates, or None if the schedule does not say."""
        return getattr(self.schedule, "frequency", None)

    def __call__(self, step):
        """The value at `step`, a count of completed updates; before `begin_step` the first one."""
        if _in_graph(step):
            return self._sparsity(tf.cast(step, tf.int64))
        with tf.init_scope():
            return float(self._sparsity(tf.constant(int(step), tf.int64)))

    def due(self, step, on_grid):
        """Whether it prunes at `step`.

        Args:
            step: An int or a scalar integer tensor.
            on_grid: Whether it would by its `begin_step` and the frequency that is asked for.
        """
        prunes = self._prunes(step)
        if not hasattr(self.schedule, "begin_step"):
            return prunes
        if self.frequency is None:
            return prunes & on_grid
        return prunes if self.end_step is None else prunes | (step == self.end_step)

    def _prunes(self, step):
        if _in_graph(step):
            return tf.cast(self._ask(tf.cast(step, tf.int64))[0], tf.bool)
        with tf.init_scope():
            return bool(self._ask(tf.constant(int(step), tf.int64))[0])

    def _ask(self, step):
        return self.schedule(step + self.offset)

    def _sparsity(self, step):
        step = tf.maximum(step, tf.constant(self.begin_step, tf.int64))
        if self.end_step is not None:
            step = tf.minimum(step, self.end_step)
        prunes, sparsity = self._ask(step)
        sparsity = tf.cast(sparsity, tf.float64)
        if not hasattr(self.schedule, "begin_step"):
            sparsity = tf.where(prunes, sparsity, 0.0)
        # It computes in float32, where 0.8 is 0.800000012: a weight too few of a hundred million.
        for name in ("final_sparsity", "target_sparsity"):
            exact = tf.constant(getattr(self.schedule, name, math.nan), tf.float64)
            sparsity = tf.where(tf.abs(sparsity - exact) < 1e-7, exact, sparsity)
        return sparsity

    def get_config(self):
        """Where the schedule's class is found, and its arguments."""
        kind = type(self.schedule)
        config = self.schedule.get_config()
        described = {
            "tfmot_module": kind.__module__,
            "tfmot_class": keras.saving.get_registered_name(kind),
            "arguments": config.get("config", config),
        }
        return described | ({"offset": self.offset} if self.offset else {})

    @classmethod
    def from_config(cls, config):
        """The schedule that `get_config` described; TFMOT is imported if it is one of its own."""
        module, name = config["tfmot_module"], config["tfmot_class"]
        kind = keras.saving.get_registered_object(name)
        if kind is None and module.split(".")[0] not in (_TFMOT, "tfcompress"):
            raise ValueError(
                f"The schedule {module}.{name} is not part of {_TFMOT}, and code is not imported "
                "because a file names it. Register the class with keras.saving."
                "register_keras_serializable, or load in a keras.saving.custom_object_scope that "
                "names it."
            )
        if kind is None:
            kind = getattr(import_tfmot(module), name.split(">")[-1], None)
        if not isinstance(kind, type) or not _is_of_tfmot(kind):
            raise ValueError(f"{module}.{name} is not a pruning schedule of {_TFMOT}.")
        return cls(kind.from_config(config["arguments"]), config.get("offset", 0))

    def __eq__(self, other):
        return isinstance(other, TFMOTSchedule) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(repr(self))

    def __repr__(self):
        config = self.get_config()
        arguments = ", ".join(f"{key}={value!r}" for key, value in config["arguments"].items())
        return f"TFMOTSchedule({config['tfmot_class'].split('>')[-1]}({arguments}))"


def _is_of_tfmot(schedule):
    kind = schedule if isinstance(schedule, type) else type(schedule)
    return any(
        each.__name__ == "PruningSchedule"
        and each.__module__.split(".")[0] in (_TFMOT, "tfcompress")
        for each in kind.__mro__
    )


def import_tfmot(module: str):
    """Import a module of TensorFlow Model Optimization; Keras 3 and the environment stay.

    Args:
        module: Its dotted name.

    Returns:
        The module.
    """
    with _keras_3_stays():
        return importlib.import_module(module)


@contextlib.contextmanager
def _keras_3_stays():
    """TFMOT asks for Keras 2 in the environment when it is imported; neither that nor it stays."""
    dir(tf.keras)  # Its first use decides for good which Keras it is.
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        yield
    finally:
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        if before is not None:
            os.environ["TF_USE_LEGACY_KERAS"] = before


def get(identifier) -> Schedule:
    """A schedule from a number (held from step 0 on) or from a schedule.

    Args:
        identifier: A number, a `Schedule`, a callable with `begin_step` and `end_step`, or a
            pruning schedule of TensorFlow Model Optimization.

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
    if _is_of_tfmot(identifier) and not isinstance(identifier, type):
        return TFMOTSchedule(identifier)
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
        frequency: In steps, 1 or more. A schedule that has a `frequency` of its own follows that,
            and one that has a method `due(step, on_grid)` what that returns.

    Returns:
        A bool or a boolean tensor.

    Example:

    >>> schedule = Linear(0.0, 0.5, begin_step=0, end_step=25)
    >>> [step for step in range(40) if is_due(schedule, step, frequency=10)]
    [0, 10, 20, 25]
    """
    begin, end = schedule.begin_step, schedule.end_step
    frequency = getattr(schedule, "frequency", None) or frequency
    on_grid = (step >= begin) & ((step - begin) % frequency == 0)
    due = on_grid if end is None else (on_grid & (step <= end)) | (step == end)
    return schedule.due(step, due) if hasattr(schedule, "due") else due


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
