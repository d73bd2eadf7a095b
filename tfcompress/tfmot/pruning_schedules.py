"""TFMOT's pruning schedules: step -> (whether to prune, sparsity), in TFMOT's own count of steps.

TFMOT counts the batch that it works on, from 1, and prunes before that batch.
"""

import abc

import keras
import tensorflow as tf

from tfcompress import schedules

# TFMOT's step of the first batch is 1, where ours is 0: no update is complete yet.
OFFSET = 1


class PruningSchedule(abc.ABC):
    """When to prune, and to which sparsity. Subclass it for a schedule of your own.

    A subclass defines `__call__(step) -> (should_prune, sparsity)` and `get_config`. Where it has
    a `begin_step` and an `end_step`, the last sparsity is reached whatever the frequency.
    """

    @abc.abstractmethod
    def __call__(self, step):
        """Whether to prune before batch number `step`, a bool tensor, and the sparsity, a float."""

    @abc.abstractmethod
    def get_config(self):
        """The constructor arguments, alone or as `{"class_name": ..., "config": ...}`."""

    @classmethod
    def from_config(cls, config):
        """The schedule that `get_config` described."""
        return cls(**config.get("config", config))

    def _should_prune_in_step(self, step, begin_step, end_step, frequency):
        """Whether `step` is on the grid; an `end_step` below 0 means for ever."""
        step = tf.convert_to_tensor(step)
        ended = (step > end_step) & (end_step >= 0)
        return (step >= begin_step) & ~ended & ((step - begin_step) % frequency == 0)

    def _validate_step(self, begin_step, end_step, frequency, allow_negative_1):
        if begin_step < 0:
            raise ValueError(f"begin_step should be >= 0, got {begin_step}.")
        if end_step == -1 and not allow_negative_1:
            raise ValueError("end_step cannot be -1: this schedule needs an end.")
        if end_step < -1:
            raise ValueError(f"end_step can be -1 or >= 0, got {end_step}.")
        if end_step != -1 and end_step < begin_step:
            raise ValueError(
                f"begin_step should be <= end_step, got begin_step={begin_step} and "
                f"end_step={end_step}."
            )
        if frequency <= 0:
            raise ValueError(f"frequency should be > 0, got {frequency}.")

    def _validate_sparsity(self, sparsity, variable_name):
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(
                f"{variable_name} must be in range [0,1), got {sparsity}. For 80% zeros pass 0.8."
            )


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class ConstantSparsity(PruningSchedule):
    """The same sparsity in [`begin_step`, `end_step`], every `frequency` steps.

    Args:
        target_sparsity: Fraction of zeros, in [0, 1).
        begin_step: First step, 0 or more.
        end_step: Last step, -1 for no end.
        frequency: Steps between two choices of the mask, 1 or more.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> prunes, sparsity = ConstantSparsity(0.5, begin_step=10, frequency=5)(15)
    >>> bool(prunes), float(sparsity)
    (True, 0.5)
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        self.target_sparsity = target_sparsity
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self._validate_step(begin_step, end_step, frequency, True)
        self._validate_sparsity(target_sparsity, "target_sparsity")

    def __call__(self, step):
        """Whether to prune at `step`, and the sparsity."""
        grid = (self.begin_step, self.end_step, self.frequency)
        return self._should_prune_in_step(step, *grid), tf.constant(self.target_sparsity)

    def get_config(self):
        """The class's name and the constructor arguments."""
        names = ("target_sparsity", "begin_step", "end_step", "frequency")
        return _config(self, names)


@keras.saving.register_keras_serializable(package="tfcompress.tfmot")
class PolynomialDecay(PruningSchedule):
    """From `initial_sparsity` to `final_sparsity`; see `tfcompress.schedules.PolynomialDecay`.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity from `end_step` on, in [0, 1).
        begin_step: First step, 0 or more.
        end_step: Last step, after `begin_step`.
        power: Exponent, 1 is linear.
        frequency: Steps between two choices of the mask, 1 or more.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> decay = PolynomialDecay(0.0, 0.8, begin_step=0, end_step=100, power=1)
    >>> [round(float(decay(step)[1]), 2) for step in (0, 50, 100, 200)]
    [0.0, 0.4, 0.8, 0.8]

    Reference: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878.
    """

    def __init__(
        self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100
    ):
        self.initial_sparsity, self.final_sparsity = initial_sparsity, final_sparsity
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self.power = power
        self._validate_step(begin_step, end_step, frequency, False)
        self._validate_sparsity(initial_sparsity, "initial_sparsity")
        self._validate_sparsity(final_sparsity, "final_sparsity")
        self._values = schedules.PolynomialDecay(
            initial_sparsity, final_sparsity, begin_step, end_step, power
        )

    def __call__(self, step):
        """Whether to prune at `step`, and the sparsity."""
        grid = (self.begin_step, self.end_step, self.frequency)
        return self._should_prune_in_step(step, *grid), tf.cast(self._values(step), tf.float32)

    def get_config(self):
        """The class's name and the constructor arguments."""
        names = ("initial_sparsity", "final_sparsity", "power")
        return _config(self, (*names, "begin_step", "end_step", "frequency"))


def _config(schedule, names):
    arguments = {name: getattr(schedule, name) for name in names}
    return {"class_name": type(schedule).__name__, "config": arguments}


def as_schedule(schedule) -> schedules.Schedule:
    """A schedule of TFMOT's API, which prunes before a batch, as one that prunes after an update.

    Args:
        schedule: A `PruningSchedule`, of this module or of TFMOT; anything else that
            `tfcompress.schedules.get` takes stays as it is.

    Example:

    >>> ours = as_schedule(ConstantSparsity(0.5, begin_step=10, frequency=5))
    >>> [step for step in range(20) if schedules.is_due(ours, step, 1)]
    [9, 14, 19]
    """
    found = schedules.get(schedule)
    if isinstance(found, schedules.TFMOTSchedule) and not found.offset:
        return schedules.TFMOTSchedule(found.schedule, OFFSET)
    return found
