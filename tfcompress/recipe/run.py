"""A recipe, done: stage after stage, then the files and what they measure."""

import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tfcompress import measure
from tfcompress.artefact import Artefact
from tfcompress.data import Data, Source, as_data, load
from tfcompress.export import ExportError, export
from tfcompress.ops import criteria
from tfcompress.recipe import record
from tfcompress.recipe.models import load_model, save_model
from tfcompress.recipe.objects import build
from tfcompress.recipe.techniques import TRAINING
from tfcompress.recipe.training import Training, metrics_for

CALIBRATION_EXAMPLES = 512
VERIFICATION_EXAMPLES = 128
_NEEDS_CALIBRATION = ("int8", "int4", "fastest")
_IN_PLACE = ("prune", "train", *TRAINING)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What became of a model.

    Args:
        model: The model after the last stage; `Recipe.from_model` of it gives the recipe.
        artefacts: The exported files, in their order.
        metrics: `"original"`, `"result"` and each file by name -> what was measured: parameters,
            nonzeros, sparsity, macs, bytes, zipped_bytes, and accuracy (or mse) on the validation
            data. Sizes in bytes; the accuracy is a share.
        missed: What the budget asks for and the result does not keep to, in words.
        recipe: All that was done, with what was done before to the model that was passed.
    """

    model: keras.Model
    artefacts: tuple[Artefact, ...]
    metrics: dict[str, dict[str, Any]]
    missed: tuple[str, ...]
    recipe: Any

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        files = [
            {
                "path": str(artefact.path),
                "format": artefact.format,
                "precision": artefact.precision,
                "max_abs_diff": artefact.max_abs_diff,
                "latency_ms": artefact.latency_ms,
            }
            for artefact in self.artefacts
        ]
        return {
            "artefacts": files,
            "metrics": self.metrics,
            "missed": list(self.missed),
            "recipe": self.recipe.to_dict(),
        }


def run(
    recipe,
    model: keras.Model,
    data: Any = None,
    output: str | os.PathLike | None = None,
    trust: bool = False,
    verbose: int = 1,
    on_stage: Callable | None = None,
    keep_model: bool = True,
) -> Result:
    """See `Recipe.apply`."""
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet. Call it on a batch first, or start it "
            "with keras.Input(shape)."
        )
    with _staging(recipe, output) as (directory, final):
        found = _data(recipe, model, data, trust)
        keras.utils.set_random_seed(recipe.seed)
        before = record.attached(model)
        done = recipe if before is None else type(recipe).from_dict(before).then(recipe)
        work = _Work(model, found, directory, trust, verbose)
        for index, stage in enumerate(recipe.stages):
            if on_stage is not None:
                on_stage(index, stage)
            with _named(index, stage):
                work.do(stage)
        if work.model is not model:  # What was passed is not touched.
            record.attach(work.model, done.to_dict())
        for artefact in work.artefacts:
            record.write(artefact, done.to_dict())
        metrics = work.measure()
        artefacts = tuple(
            dataclasses.replace(artefact, path=final / artefact.path.relative_to(directory))
            for artefact in work.artefacts
        )
        missed = _missed(recipe.budget, metrics)
        result = Result(work.model, artefacts, metrics, missed, done)
        if output is not None and keep_model:
            save_model(work.model, directory / "model.keras")
            done.to_yaml(directory / "recipe.yaml")
            text = json.dumps(result.to_dict(), indent=1)
            (directory / "result.json").write_text(text, encoding="utf-8")
    return result


class _Work:
    """The model as it is so far, and the data that fits it."""

    def __init__(self, model, data: Data | None, directory: pathlib.Path, trust, verbose):
        self.original, self.original_data = model, data
        self.model, self.data = model, data
        self.directory, self.trust, self.verbose = directory, trust, verbose
        self.artefacts: list[Artefact] = []
        self.sizes: dict[str, int | None] = {}

    def do(self, stage) -> None:
        """One stage."""
        names = stage.names
        if any(name in _IN_PLACE for name in names) and self.model is self.original:
            self.model = copy(self.original)
        if any(name in ("train", *TRAINING) for name in names):
            self._train(stage)
        elif names == ["export"]:
            self._export(stage.export)
        else:
            (name,) = names
            self.model = self._pass(name, getattr(stage, name))

    # Training.

    def _train(self, stage) -> None:
        data, train = self._need_data(), stage.train or Training()
        steps = train.steps(data)
        callbacks = [
            getattr(stage, name).build(steps)
            for name in TRAINING
            if name != "distillation" and getattr(stage, name) is not None
        ]
        loss = self._compile(train, steps)
        subject = self.model
        if stage.distillation is not None:
            subject = self._distiller(stage.distillation, steps)
            subject.compile(train.make_optimizer(steps), loss, metrics=metrics_for(loss))
        if train.patience is not None:
            callbacks.append(
                keras.callbacks.EarlyStopping(patience=train.patience, restore_best_weights=True)
            )
        arguments = data.fit_arguments(train.batch_size)
        subject.fit(
            **arguments, epochs=train.epochs, verbose=self.verbose or 0, callbacks=callbacks
        )

    def _compile(self, train: Training, steps: int):
        loss = train.make_loss(self.model, self._need_data(), self.original)
        self.model.compile(train.make_optimizer(steps), loss, metrics=metrics_for(loss))
        return loss

    def _distiller(self, distillation, steps: int):
        if distillation.teacher != "original":
            teacher = load_model(distillation.teacher, self.trust)
        elif self.data is not self.original_data:
            raise ValueError(
                "The original reads other token ids than the model with the smaller vocabulary, so "
                "it cannot teach it. Put the distillation before prune_vocabulary."
            )
        else:
            teacher = self.original
        arguments = {"student": self.model, "teacher_weights": None, "name": "distiller"}
        given = {
            name: build(getattr(distillation, name), steps)
            for name in type(distillation).model_fields
            if name not in ("name", "teacher")
        }
        return type(distillation).target(teacher=teacher, **given, **arguments)

    # Passes.

    def _pass(self, name: str, technique) -> keras.Model:
        supplied: dict[str, Any] = {"model": self.model}
        if "verbose" in inspect.signature(type(technique).target).parameters:
            supplied["verbose"] = self.verbose
        if name in ("quantize", "factorize"):
            supplied["calibration"] = self._calibration()
        if name == "prune" and _reads_inputs(technique):
            supplied["calibration"] = self._need_data().inputs(CALIBRATION_EXAMPLES)
        if name == "shrink":
            return self._shrink(technique, supplied)
        if name == "prune_vocabulary":
            return self._prune_vocabulary(technique)
        return technique.build(**supplied)

    def _shrink(self, technique, supplied) -> keras.Model:
        if technique.criterion in ("taylor", "fisher"):
            if self.model is self.original:
                self.model = supplied["model"] = copy(self.original)
            self._compile(Training(), 1)
            x = self._need_data().train
            supplied["data"] = [x] if isinstance(x, tuple) else x
        return technique.build(**supplied).apply(supplied["model"])

    def _prune_vocabulary(self, technique) -> keras.Model:
        keep = technique.keep
        if keep == "used":
            keep = used_ids(self._need_data())
        elif self.data is not None:
            keep = sorted({*keep, *technique.special})
        special = [token for token in technique.special if token in set(keep)]
        vocabulary = type(technique).target(
            self.model, keep=keep, embedding=technique.embedding, special=special
        )
        path = self.directory / "vocabulary.npz"
        np.savez(path, kept=vocabulary.kept, old_to_new=vocabulary.old_to_new)
        if self.data is not None:
            self.data = map_ids(self.data, vocabulary)
        return vocabulary.model

    # Export, and what it measures.

    def _export(self, stage) -> None:
        needs = stage.precision in _NEEDS_CALIBRATION
        data = self.data
        artefact = export(
            self.model,
            self.directory / stage.path,
            precision=stage.precision,
            calibration=self._calibration() if needs else None,
            verify_on=None if data is None else data.inputs(VERIFICATION_EXAMPLES, "validation"),
            **stage.options(),
        )
        self.artefacts.append(artefact)
        self.sizes[stage.path] = stage.batch_size

    def measure(self) -> dict[str, dict[str, Any]]:
        """The numbers of the original, the result, and each file."""
        found = {
            "original": _measured(self.original, self.original_data),
            "result": _measured(self.model, self.data),
        }
        for artefact in self.artefacts:
            name = artefact.path.relative_to(self.directory).as_posix()
            found[name] = _measured(artefact, self.data, self.sizes[name])
        return found

    def _calibration(self):
        return None if self.data is None else self.data.inputs(CALIBRATION_EXAMPLES)

    def _need_data(self) -> Data:
        if self.data is None:
            raise ValueError(
                "it needs data, and there is none. Name it in the recipe (data: train.csv), with "
                "--data, or as apply(model, data)."
            )
        return self.data


def _reads_inputs(technique) -> bool:
    criterion = build(technique.criterion, 1)
    criterion = criteria.get(criterion) if isinstance(criterion, str) else criterion
    return criteria.reads(criterion) in ("inputs", "reconstruction")


def copy(model: keras.Model) -> keras.Model:
    """A model of its own with the same weights.

    Args:
        model: A built model.

    Returns:
        The copy, not compiled.

    Raises:
        ValueError: Its class cannot be made from its config.
    """
    try:
        clone = keras.models.clone_model(model)
        if not clone.built:
            clone.build_from_config(model.get_build_config())
        clone.set_weights(model.get_weights())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{model.name!r} cannot be copied: {error}. Pass tfcompress.expand(model), a flat "
            "model with the same weights."
        ) from error
    return clone


def _data(recipe, model: keras.Model, data: Any, trust: bool) -> Data | None:
    if data is not None:
        if isinstance(data, str | Source):
            return load(data, model, trust)
        return as_data(data, seed=recipe.seed).check(model)
    if recipe.data is None:
        return None
    return load(recipe.data.build(), model, trust)


@contextlib.contextmanager
def _named(index: int, stage) -> Iterator[None]:
    """Errors say which stage they come from."""
    try:
        yield
    except (ValueError, ExportError) as error:
        kind = ExportError if isinstance(error, ExportError) else ValueError
        raise kind(f"Stage {index + 1} ({' + '.join(stage.names)}): {error}") from error


# Files: all of them or none.


@contextlib.contextmanager
def _staging(recipe, output) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A directory to write to, whose content moves to the output directory at the end."""
    final = pathlib.Path("." if output is None else output)
    existed = final.is_dir()
    _check_targets(recipe, final)
    try:
        final.mkdir(parents=True, exist_ok=True)
        # Absolute: the process that converts keeps the working directory that it began with.
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".tfcompress-", dir=final.resolve()))
    except OSError as error:
        raise ValueError(
            f"Cannot write to {str(final)!r}: {error.strerror}. Name a directory with --output "
            "(output=) that exists or can be made."
        ) from error
    try:
        yield temporary, final
        for entry in sorted(temporary.iterdir()):
            _move(entry, final / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and not any(final.iterdir()):
            final.rmdir()


def _check_targets(recipe, final: pathlib.Path) -> None:
    """Refuse, before anything is trained, to put a SavedModel in the place of something else."""
    for stage in recipe.stages:
        if stage.export is None:
            continue
        target = final / pathlib.PurePath(stage.export.path).parts[0]
        is_saved_model = (target / "saved_model.pb").is_file()
        if target.is_dir() and not is_saved_model or target.is_file() and not target.suffix:
            raise ValueError(
                f"{str(target)!r} is there already and would be replaced by an export. Take it "
                "away, or export to another path."
            )


def _move(entry: pathlib.Path, target: pathlib.Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(entry, target)


# Numbers.


def _measured(item, data: Data | None, batch_size: int | None = None) -> dict[str, Any]:
    weights, size = measure.weights(item), measure.size(item)
    found: dict[str, Any] = {
        "parameters": sum(weight.params for weight in weights),
        "nonzeros": sum(weight.nonzeros for weight in weights),
        "sparsity": measure.sparsity(item),
        "bytes": size.bytes,
        "zipped_bytes": size.zipped_bytes,
    }
    if isinstance(item, keras.Model) and data is not None:
        found["macs"] = measure.macs(item, data.inputs(1))
    if data is not None:
        found |= quality(item, data, batch_size)
    return found


def quality(item, data: Data, batch_size: int | None = None) -> dict[str, float]:
    """How good a model or file is on the validation data.

    Args:
        item: A Keras model or an `Artefact`.
        data: The data.
        batch_size: The fixed size of the batches that a file takes.

    Returns:
        `{"accuracy": share}` for a classifier, `{"mse": value}` for what predicts numbers, and
        nothing for a model of several outputs.
    """
    run_once = measure.forward(item)
    hits, errors, count = 0, 0.0, 0
    for x, y in _batches(data, batch_size):
        outputs = run_once(x)
        if not isinstance(outputs, np.ndarray):
            return {}
        right = _right(outputs, np.asarray(y))
        if right is None:
            reference = np.asarray(y, np.float64).reshape(outputs.shape)
            errors += float(np.sum((outputs - reference) ** 2))
            count += outputs.size
        else:
            hits += int(right.sum())
            count += right.size
    if not count:
        return {}
    return {"mse": errors / count} if right is None else {"accuracy": hits / count}


def _right(outputs: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Which examples are classified right; None if the labels are no classes."""
    if outputs.ndim > 1 and outputs.shape[-1] > 1:
        if y.shape == outputs.shape and y.dtype.kind == "f" and not _is_one_hot(y):
            return None
        labels = y.argmax(axis=-1) if y.shape == outputs.shape else y.reshape(outputs.shape[:-1])
        return outputs.argmax(axis=-1) == labels
    if y.dtype.kind not in "iub":
        return None
    # A probability is above one half where a logit is above 0; outputs below 0 are logits.
    limit = 0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0.0
    return (outputs.reshape(len(y), -1)[:, 0] > limit) == (y.reshape(len(y), -1)[:, 0] > 0)


def _is_one_hot(y: np.ndarray) -> bool:
    return bool(np.isin(y, (0, 1)).all() and (y.sum(axis=-1) == 1).all())


def _batches(data: Data, batch_size: int | None) -> Iterator[tuple]:
    if isinstance(data.validation, tuple):
        x, y = data.validation
        size = batch_size or 256
        for start in range(0, len(y), size):
            rows = slice(start, start + size)
            part = keras.tree.map_structure(lambda array, rows=rows: array[rows], x)
            if batch_size is None or len(y[rows]) == batch_size:
                yield part, y[rows]
        return
    dataset = data.validation
    if batch_size is not None:
        dataset = dataset.rebatch(batch_size, drop_remainder=True)
    for x, y in dataset:
        yield keras.tree.map_structure(np.asarray, x), np.asarray(y)


def _missed(budget, metrics: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    if budget is None:
        return ()
    files = {name: found for name, found in metrics.items() if name not in ("original", "result")}
    model = {"result": metrics["result"]}
    limits = [
        ("bytes", budget.max_bytes, files or model),
        ("zipped_bytes", budget.max_zipped_bytes, files or model),
        ("parameters", budget.max_parameters, model),
        ("macs", budget.max_macs, model),
    ]
    missed = [
        f"{name}: {key} {found[key]:,}, the budget is {limit:,}"
        for key, limit, items in limits
        if limit is not None
        for name, found in items.items()
        if found.get(key) is not None and found[key] > limit
    ]
    before = metrics["original"].get("accuracy")
    if budget.max_drop is not None and before is not None:
        for name, found in (files or model).items():
            after = found.get("accuracy")
            if after is not None and before - after > budget.max_drop:
                missed.append(
                    f"{name}: accuracy {after:.2%}, the original has {before:.2%} and the budget "
                    f"allows a drop of {budget.max_drop:.2%}"
                )
    return tuple(missed)


# Token ids.


def _tokens(x) -> Any:
    """The name of the input with the token ids; None where it is the only input."""
    if not isinstance(x, dict):
        return None
    if "token_ids" in x:
        return "token_ids"
    raise ValueError(
        f"It is not known which of the inputs {sorted(x)} has the token ids; name it token_ids, or "
        "call tfcompress.prune_vocabulary yourself."
    )


def used_ids(data: Data) -> list[int]:
    """The token ids that occur in the data, training and validation.

    Args:
        data: Data whose inputs are ids, or a dict with `token_ids`.

    Returns:
        Ids, ascending.
    """
    found: set[int] = set()
    for part in ("train", "validation"):
        x = data.inputs(2**31, part)
        name = _tokens(x)
        found |= set(np.unique(x if name is None else x[name]).astype(int).tolist())
    return sorted(found)


def map_ids(data: Data, vocabulary) -> Data:
    """The data with new token ids."""

    def mapped(x):
        name = _tokens(x)
        return vocabulary.map(x) if name is None else {**x, name: vocabulary.map(x[name])}

    def part(pair):
        if isinstance(pair, tuple):
            return mapped(pair[0]), pair[1]
        return pair.map(lambda x, y: (mapped(x), y))

    return dataclasses.replace(data, train=part(data.train), validation=part(data.validation))
