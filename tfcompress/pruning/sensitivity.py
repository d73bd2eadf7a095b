"""Sensitivity: how a metric falls off as one weight of a model after the other is pruned."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import rich.progress
import tensorflow as tf

from tfcompress.graph.roles import Prunable, prunable
from tfcompress.keras_hooks.walk import select_kernels
from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures
from tfcompress.ops.masks import Units, apply_mask
from tfcompress.pruning.budget import as_globs, least_damage
from tfcompress.values import SavedValue

logger = logging.getLogger("tfcompress")

Measure = Callable[[], float]

# Between the last measured sparsity and 1 the damage rises by this many times the worst of all.
_STEEPNESS = 10.0

_LOWER = ("loss", "error", "entropy", "mse", "mae", "mape", "msle", "divergence", "hinge",
          "poisson", "perplexity", "logcosh", "log_cosh", "false_")  # fmt: skip
_HIGHER = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "io_u", "true_", "r2",
           "cosine_similarity", "bleu", "rouge")  # fmt: skip


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Sensitivity(SavedValue):
    """What a metric is when a single weight is pruned to each of some sparsities.

    Args:
        metric: Its name.
        higher_is_better: Whether larger values are better ones.
        baseline: The value of the model as it is.
        sparsities: Fractions of zeros in (0, 1), ascending.
        values: Path of the weight -> a value for each sparsity.
        sizes: Path of the weight -> number of its elements.

    Raises:
        ValueError: The parts do not fit together.

    Example:

    >>> found = Sensitivity("loss", False, 1.0, (0.5, 0.9), {"a": (1.0, 3.0)}, {"a": 100})
    >>> round(found.damage("a", 0.7), 6)
    1.0
    """

    metric: str
    higher_is_better: bool
    baseline: float
    sparsities: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    sizes: dict[str, int]

    def __post_init__(self):
        lengths = {path: len(each) for path, each in self.values.items()}
        wrong = {path: n for path, n in lengths.items() if n != len(self.sparsities)}
        if wrong or not self.values or self.values.keys() != self.sizes.keys():
            raise ValueError(
                f"A Sensitivity has a value for each of its {len(self.sparsities)} sparsities and "
                f"a size for each weight, one at least; got {lengths} values and the sizes "
                f"{self.sizes}."
            )

    def damage(self, path: str, sparsity: float) -> float:
        """How much worse the metric gets, by interpolation; 0 or more, and never falling.

        Linear between the measured points and (0, 0); a point that is better than one before it, or
        than the baseline, counts as no worse than that one. Beyond the last point, where nothing is
        known and a weight soon holds nothing, a line rises by ten times the largest damage that was
        measured for any weight (by 1, if that is 0) until sparsity 1.

        Args:
            path: Of a measured weight.
            sparsity: Fraction of zeros in [0, 1].

        Returns:
            The damage in the units of the metric.

        Raises:
            ValueError: The weight was not measured, or the sparsity is out of range.
        """
        if path not in self._curves:
            raise ValueError(
                f"{path!r} was not measured; what was: {', '.join(self.values)}. Measure it, or "
                f"pass exclude={path!r}."
            )
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be a fraction of zeros in [0, 1], got {sparsity}.")
        return float(np.interp(sparsity, (0.0, *self.sparsities, 1.0), self._curves[path]))

    @functools.cached_property
    def _curves(self) -> dict[str, np.ndarray]:
        """Path -> damage at sparsity 0, at the measured ones, and at 1."""
        sign = -1.0 if self.higher_is_better else 1.0
        measured = {
            path: np.maximum.accumulate([0.0, *(sign * (each - self.baseline) for each in values)])
            for path, values in self.values.items()
        }
        worst = max(curve[-1] for curve in measured.values()) or 1.0
        return {
            p: np.append(curve, curve[-1] + _STEEPNESS * worst) for p, curve in measured.items()
        }

    def allocation(self, sparsity: float = 0.9, max_sparsity: float = 0.99) -> dict[str, float]:
        """The sparsities of the weights with this overall share of zeros and the least damage.

        The summed `damage` is minimized by `tfcompress.pruning.budget`: it treats the weights as if
        the damage of one did not depend on the others.

        Args:
            sparsity: Fraction of zeros over all measured weights together, in [0, max_sparsity].
            max_sparsity: The largest for any weight, in (0, 1).

        Returns:
            {glob: fraction}, for `sparsity=` of `tfcompress.prune` and
            `tfcompress.callbacks.Pruning`; the glob is the weight's path, with `*?[` escaped.

        Raises:
            ValueError: The sparsity is out of range.
            ImportError: scipy is missing.

        Example:

        >>> values = {"robust": (1.0, 1.0), "fragile": (2.0, 9.0)}
        >>> sizes = {"robust": 100, "fragile": 100}
        >>> found = Sensitivity("loss", False, 1.0, (0.5, 0.9), values, sizes).allocation(0.5)
        >>> {path: round(each, 2) for path, each in found.items()}
        {'robust': 0.9, 'fragile': 0.1}
        """
        if not 0 <= sparsity <= max_sparsity:
            raise ValueError(
                f"sparsity must be a fraction of zeros in [0, max_sparsity={max_sparsity}], got "
                f"{sparsity}."
            )
        total = sum(self.sizes.values())

        def kept(sparsities: Mapping[str, float]) -> float:
            return sum(self.sizes[path] * (1.0 - each) for path, each in sparsities.items()) / total

        # A little more than nothing, as 0.99 of every weight adds up to 0.99 but for rounding.
        limit = 1.0 - sparsity + 1e-12
        return as_globs(least_damage(list(self.sizes), kept, limit, self.damage, max_sparsity))

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict for each weight and sparsity.

        Returns:
            Dicts with the keys path, size, sparsity, metric, value, baseline, damage.
        """
        return [
            {
                "path": path,
                "size": self.sizes[path],
                "sparsity": sparsity,
                "metric": self.metric,
                "value": value,
                "baseline": self.baseline,
                "damage": self.damage(path, sparsity),
            }
            for path, values in self.values.items()
            for sparsity, value in zip(self.sparsities, values, strict=True)
        ]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sensitivity":
        """The result that `get_config` described."""
        values = {path: tuple(each) for path, each in config["values"].items()}
        return cls(**{**config, "sparsities": tuple(config["sparsities"]), "values": values})


def sensitivity(
    model: keras.Model,
    data,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    metric="loss",
    criterion="magnitude",
    structure="unstructured",
    include=None,
    exclude=None,
    verbose: int = 1,
    mode: str = "auto",
) -> Sensitivity:
    """Measure a metric with one weight pruned at a time, at several sparsities.

    Nothing is trained: it shows which weights a model can spare
    ([Han et al. 2015](https://arxiv.org/abs/1506.02626);
    [Li et al. 2017](https://arxiv.org/abs/1608.08710)). Every weight gets its values back to the
    last bit, also when an error or Ctrl-C ends the measurement. It takes `weights * sparsities + 1`
    evaluations.

    Args:
        model: A built Keras model, compiled unless `metric` is a function.
        data: Labelled data, `(x, y)` as arrays or a `tf.data.Dataset` of such batches; as a rule
            not the training data. A function as `metric` gets it as it is.
        sparsities: Fractions of zeros in (0, 1).
        metric: "loss", the name of another value that `model.evaluate` returns, or a function
            (model, data) -> float.
        criterion: Scores the weights: "magnitude", "random", "batch_norm", an object of
            `tfcompress.criteria`, or a function weight -> scores.
        structure: What is pruned as a unit: "unstructured", "channel", "2:4" (with the sparsity 0.5
            alone), or an object of `tfcompress.structures`.
        include: Glob or globs over `variable.path`; None for all kernels and embeddings.
        exclude: Glob or globs to leave out.
        verbose: Whether to show a progress bar.
        mode: "min" if lower is better, "max" if higher is; "auto" knows from the names of the
            usual metrics, and takes the direction that pruning moves any other in for the worse.

    Returns:
        A `Sensitivity`; `tfcompress.report.plots.sensitivity` plots it, and its `allocation` is a
        sparsity for each weight.

    Raises:
        ValueError: A model that is not built or not compiled, an unknown metric, data or a value
            that do not fit, a glob that matches nothing, or a metric that is not finite.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3, name="dense")]
    >>> model = keras.Sequential(layers, name="model")
    >>> model.compile(loss="mse")
    >>> data = np.ones((8, 4), "float32"), np.zeros((8, 3), "float32")
    >>> found = sensitivity(model, data, sparsities=(0.5, 0.9), verbose=0)
    >>> [(path, len(values)) for path, values in found.values.items()]
    [('model/dense/kernel', 2)]
    """
    criterion, structure = criteria.get(criterion), structures.get(structure)
    criteria.require(criterion, "tfcompress.sensitivity", "weights", "index", "batch_norm")
    sparsities = _check_sparsities(sparsities, structure)
    if getattr(structure, "groups", None) is not None:
        raise ValueError(
            f"Sensitivity prunes one weight at a time, and the units of {structure} span several. "
            'Pass structure="channel".'
        )
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'mode must be "auto", "min" or "max", got {mode!r}.')
    measure = _measure(model, data, metric)
    selected, skipped = select_kernels(model, include, exclude)
    chosen = prunable(model, selected, structure, criterion)
    baseline = measure()
    values: dict[str, list[float]] = {path: [] for path in chosen.weights}
    masks = _Masks(chosen, criterion, structure)
    steps = [(path, each) for path in chosen.weights for each in sparsities]
    for path, each in rich.progress.track(steps, "Sensitivity", disable=not verbose):
        with _pruned(chosen.weights[path], masks.mask(path, each)):
            values[path].append(measure())
    logger.info("Measured %s; skipped %s", list(values), skipped | chosen.skipped)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", str(metric))
    changes = [value - baseline for line in values.values() for value in line]
    return Sensitivity(
        metric=name,
        higher_is_better=_higher_is_better(name, mode, changes),
        baseline=baseline,
        sparsities=sparsities,
        values={path: tuple(line) for path, line in values.items()},
        sizes={path: math.prod(weight.shape) for path, weight in chosen.weights.items()},
    )


class _Masks:
    """The mask of one weight at one sparsity, as `tfcompress.prune` would choose it."""

    def __init__(self, chosen: Prunable, criterion, structure):
        self._weights = chosen.weights
        self._structure = structure
        self._criterion = criterion
        self._statistics = chosen.statistics(criterion)

    def mask(self, path: str, sparsity: float) -> tf.Tensor:
        weights, read = [self._weights[path]], [self._statistics[path]]
        units, _ = Units.cut(self._structure, {path: weights[0].shape})
        (mask,) = units.masks(weights, self._criterion, read, sparsity, allocations.uniform)
        return mask


@contextlib.contextmanager
def _pruned(weight: keras.Variable, mask: tf.Tensor) -> Iterator[None]:
    original = weight.numpy().copy()
    try:
        weight.assign(apply_mask(tf.convert_to_tensor(weight), mask))
        yield
    finally:
        weight.assign(original)


def _measure(model: keras.Model, data, metric) -> Measure:
    """The metric of the model as it is when called."""
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet. Call it on a batch first, or start it "
            "with keras.Input(shape)."
        )
    if not isinstance(metric, str):
        if not callable(metric):
            raise ValueError(
                f"metric must be a name or a function (model, data) -> float, got {metric!r}."
            )
        return lambda: _finite(metric(model, data), metric)
    if not model.compiled:
        raise ValueError(
            f"The model {model.name!r} is not compiled, so that it cannot be evaluated. Call "
            "model.compile(loss=..., metrics=[...]), or pass metric=function, which gets the model "
            "and the data."
        )
    arguments = _evaluate_arguments(data)

    def measure() -> float:
        results = model.evaluate(**arguments, verbose=0, return_dict=True)
        if metric not in results:
            raise ValueError(
                f"The model {model.name!r} has no metric {metric!r}; it has {sorted(results)}. "
                "Pass one of these, or compile it with metrics=[...]."
            )
        return _finite(results[metric], metric)

    return measure


def _evaluate_arguments(data) -> dict[str, Any]:
    if isinstance(data, tuple) and len(data) == 2:
        return {"x": data[0], "y": data[1]}
    if isinstance(data, tf.data.Dataset):
        spec, is_endless = data.element_spec, data.cardinality() == tf.data.INFINITE_CARDINALITY
        if isinstance(spec, tuple) and len(spec) in (2, 3) and not is_endless:
            return {"x": data}
        raise ValueError(
            "Expected a finite tf.data.Dataset of batches (x, y), got one with elements of "
            f"{spec} and cardinality {int(data.cardinality())}. Use dataset.take(n) on an endless "
            "one."
        )
    raise ValueError(
        "Expected data as a pair of arrays (x, y) or a tf.data.Dataset of such batches, got "
        f"{type(data).__name__}."
    )


def _finite(value, metric) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"The metric {metric!r} is {number}, which cannot be compared. Check the data, or "
            "leave out the weight or the sparsity that is being measured."
        )
    return number


def _check_sparsities(sparsities, structure) -> tuple[float, ...]:
    found = tuple(sorted({float(each) for each in sparsities}))
    if not found or found[0] <= 0 or found[-1] >= 1:
        raise ValueError(
            f"sparsities must be fractions of zeros in (0, 1), one at least; got {sparsities}."
        )
    if structure.sparsity is not None and found != (structure.sparsity,):
        raise ValueError(
            f"{structure} has no other sparsity than {structure.sparsity}, got {found}. Pass "
            f"sparsities=({structure.sparsity},)."
        )
    return found


def _higher_is_better(name: str, mode: str, changes: Sequence[float]) -> bool:
    if mode != "auto":
        return mode == "max"
    for words, answer in ((_LOWER, False), (_HIGHER, True)):
        if any(word in name.lower() for word in words):
            return answer
    answer = sum(changes) < 0
    logger.info("Taking %s values of %r for better ones", "higher" if answer else "lower", name)
    return answer
