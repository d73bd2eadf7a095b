"""Searching recipes: which one makes a model smallest or fastest within a loss of accuracy."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfcompress import measure
from tfcompress.artefact import Artefact, replacing
from tfcompress.data import Data
from tfcompress.export import ExportError, export
from tfcompress.optional import require
from tfcompress.recipe.recipe import Recipe
from tfcompress.recipe.run import VERIFICATION_EXAMPLES, quality

TARGETS = ("size", "zipped", "latency")
# What a trial chooses from; LiteRT files, since these are the smallest and fastest on a CPU.
SHARES_REMOVED = (0.0, 0.15, 0.25, 0.33, 0.5, 0.67)
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9)
PRECISIONS = ("float32", "dynamic", "int8", "qat")
# So many choices in a row that were made before mean that there is little else to choose.
_MAX_REPEATED = 50


@dataclasses.dataclass(frozen=True)
class Trial:
    """One recipe that was tried.

    Args:
        number: In the study, from 0.
        choices: `removed`, `sparsity` and `precision`.
        drop: Accuracy lost on the validation data, as a share; below 0 for a gain.
        cost: Share of what the original costs as a float32 file, in bytes or in time.
        recipe: What was done.
    """

    number: int
    choices: dict[str, Any]
    drop: float
    cost: float
    recipe: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found: all trials, those that none beats in both, and the best."""

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    best: Trial | None


def recipe_of(choices: dict[str, Any], epochs: int = 3) -> Recipe:
    """The recipe that choices stand for.

    Args:
        choices: `removed`, a share of channels; `sparsity`; and `precision`.
        epochs: Of each training.

    Returns:
        The recipe, whose last stage exports `model.tflite`.

    Example:

    >>> recipe = recipe_of({"removed": 0.5, "sparsity": 0.0, "precision": "qat"})
    >>> [stage.names for stage in recipe.stages]
    [['shrink'], ['train', 'distillation'], ['train', 'qat'], ['export']]
    """
    stages: list[dict[str, Any]] = []
    if choices["removed"]:
        stages.append({"shrink": {"ratio": choices["removed"]}})
        stages.append({"train": {"epochs": epochs}, "distillation": {}})
    last: dict[str, Any] = {}
    if choices["sparsity"]:
        schedule = {
            "name": "PolynomialDecay",
            "initial_sparsity": 0.0,
            "final_sparsity": choices["sparsity"],
            "begin_step": 0,
            "end_step": "50%",
        }
        last["pruning"] = {"sparsity": schedule, "allocation": "global", "frequency": 10}
    if choices["precision"] == "qat":
        last["qat"] = {}
    if last:
        stages.append({"train": {"epochs": epochs}, **last})
    precision = "int8" if choices["precision"] == "qat" else choices["precision"]
    stages.append({"export": {"path": "model.tflite", "precision": precision}})
    return Recipe.from_dict({"stages": stages})


def search(
    model: keras.Model,
    data: Data,
    output: pathlib.Path,
    target: str = "size",
    max_drop: float = 0.01,
    trials: int = 20,
    patience: int = 8,
    epochs: int = 3,
    seed: int = 0,
    on_trial: Callable[[Trial, Sequence[Trial]], None] | None = None,
) -> Found:
    """Try recipes, and keep the best file with its recipe.

    The study is kept in `output/study.db`; a search that was ended goes on where it was. It stops
    early when `patience` trials in a row have not moved the front.

    Args:
        model: A built classifier; it is not touched.
        data: To train and to validate on.
        output: Directory for `study.db`, `trials.json`, and the best `model.tflite`, `model.keras`
            and `recipe.yaml`.
        target: `"size"` in bytes, `"zipped"`, or `"latency"` of one example on this machine.
        max_drop: How much accuracy may be lost, as a share in [0, 1].
        trials: How many recipes, those of an earlier run included.
        patience: See above.
        epochs: Of each training.
        seed: Of the choices.
        on_trial: Called with each trial and the front so far.

    Returns:
        A `Found`; its best is None if no recipe keeps to `max_drop`.

    Raises:
        ValueError: An unknown target, or a model without an accuracy.
        ImportError: optuna is not installed.

    Reference: Akiba et al. 2019, "Optuna", https://arxiv.org/abs/1907.10902.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; expected one of {', '.join(TARGETS)}.")
    optuna = require("optuna", extra="auto")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output.mkdir(parents=True, exist_ok=True)
    reference = _Reference.of(model, data, output, target)
    study = optuna.create_study(
        storage=f"sqlite:///{output / 'study.db'}",
        study_name=target,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    # A search that goes on would choose again what it began with.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    idle = repeated = 0
    while _tried(study) < trials and idle < patience and repeated < _MAX_REPEATED:
        before = _points(study)
        asked = study.ask()
        choices = {
            "removed": asked.suggest_categorical("removed", SHARES_REMOVED),
            "sparsity": asked.suggest_categorical("sparsity", SPARSITIES),
            "precision": asked.suggest_categorical("precision", PRECISIONS),
        }
        if any(choices == each.choices for each in _trials(study)):
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)  # Known already.
            repeated += 1
            continue
        repeated = 0
        trial = _try(asked, choices, model, data, reference, max_drop, epochs, output)
        if trial is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            idle += 1
            continue
        asked.set_user_attr("recipe", trial.recipe)
        study.tell(asked, [trial.drop, trial.cost])
        idle = 0 if _points(study) != before else idle + 1
        if on_trial is not None:
            on_trial(trial, front(_trials(study)))
    return _finish(study, output, max_drop)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The original as a float32 file, which costs 1."""

    artefact: Artefact
    accuracy: float
    target: str
    batch: Any

    @classmethod
    def of(cls, model, data: Data, output: pathlib.Path, target: str) -> "_Reference":
        found = quality(model, data)
        if "accuracy" not in found:
            raise ValueError(
                f"{model.name!r} has no accuracy on this data, which the search keeps to. Write a "
                "recipe for it instead (tfcompress run --example mlp)."
            )
        batch = data.inputs(VERIFICATION_EXAMPLES, "validation")
        path = output.resolve() / "original.tflite"
        artefact = export(model, path, precision="float32", verify_on=batch)
        return cls(artefact, found["accuracy"], target, data.inputs(1))

    def cost(self, artefact: Artefact) -> float:
        if self.target == "size":
            return artefact.bytes / self.artefact.bytes
        if self.target == "zipped":
            return artefact.zipped_bytes / self.artefact.zipped_bytes
        runners = {"original": self.artefact.runner(), "trial": artefact.runner()}
        timed = measure.latency(
            {name: lambda run=run: run(self.batch) for name, run in runners.items()}
        )
        return timed["trial"].median_ms / timed["original"].median_ms


def _try(asked, choices, model, data, reference, max_drop, epochs, output) -> Trial | None:
    """One recipe, done; its files replace the best ones if it is better. None if it cannot be."""
    recipe = recipe_of(choices, epochs)
    directory = output / f".trial-{asked.number}"
    try:
        result = recipe.apply(model, data, output=directory, verbose=0)
    except (ValueError, ExportError) as error:
        asked.set_user_attr("error", str(error)[:500])
        return None
    else:
        after = result.metrics["model.tflite"]["accuracy"]
        cost = reference.cost(result.artefacts[0])
        trial = Trial(asked.number, choices, reference.accuracy - after, cost, recipe.to_dict())
        best = best_of(_trials(asked.study), max_drop)
        if trial.drop <= max_drop and (best is None or trial.cost < best.cost):
            for name in ("model.tflite", "model.keras", "recipe.yaml"):
                (directory / name).replace(output / name)
        return trial
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _trials(study) -> list[Trial]:
    return [
        Trial(each.number, dict(each.params), *each.values, each.user_attrs["recipe"])
        for each in study.trials
        if each.state.name == "COMPLETE"
    ]


def _tried(study) -> int:
    """How many recipes were done, or could not be."""
    return sum(each.state.name in ("COMPLETE", "FAIL") for each in study.trials)


def _points(study) -> set[tuple[float, float]]:
    return {(each.drop, each.cost) for each in front(_trials(study))}


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both drop and cost, by cost.

    Example:

    >>> points = [(0.0, 0.9), (0.1, 0.5), (0.2, 0.6), (0.3, 0.1)]
    >>> [t.cost for t in front([Trial(i, {}, *p, {}) for i, p in enumerate(points)])]
    [0.1, 0.5, 0.9]
    """
    kept, least = [], math.inf
    for trial in sorted(trials, key=lambda each: (each.cost, each.drop)):
        if trial.drop < least:
            kept.append(trial)
            least = trial.drop
    return kept


def best_of(trials: Sequence[Trial], max_drop: float) -> Trial | None:
    """The cheapest trial that loses no more accuracy than it may."""
    allowed = [trial for trial in trials if trial.drop <= max_drop]
    return min(allowed, key=lambda trial: trial.cost, default=None)


def _finish(study, output: pathlib.Path, max_drop: float) -> Found:
    trials = _trials(study)
    found = Found(tuple(trials), tuple(front(trials)), best_of(trials, max_drop))
    with replacing(output / "trials.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
    with contextlib.suppress(FileNotFoundError):
        (output / "original.tflite").unlink()
    return found
