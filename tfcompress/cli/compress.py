"""`tfcompress prune`, `quantize`, `shrink`, `export` and `migrate`: one technique, one file."""

import pathlib
from typing import Annotated, Any

import typer

from tfcompress.cli.common import (
    DataOption,
    Json,
    Label,
    Model,
    OutputFile,
    Trust,
    note,
    print_json,
    read_data,
    reported,
    table,
)
from tfcompress.cli.recipes import show

Epochs = Annotated[
    int, typer.Option(min=0, help="Epochs of training to recover accuracy; needs --data.")
]
LearningRate = Annotated[float, typer.Option(help="Of that training.")]
Precision = Annotated[
    str | None,
    typer.Option(help="float32, float16, dynamic, int8, int4 or fastest, for an exported file."),
]
Include = Annotated[list[str] | None, typer.Option(help="Glob over the paths of weights.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob over weights to leave out.")]


@reported
def prune(
    model: Model,
    output: OutputFile,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, in [0, 1): 0.8.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead: zero what is smaller than this.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt, random, ...")
    ] = "magnitude",
    structure: Annotated[
        str, typer.Option(help="unstructured, 2:4, channel or head.")
    ] = "unstructured",
    allocation: Annotated[str, typer.Option(help="uniform, global, erk or lamp.")] = "uniform",
    epochs: Epochs = 0,
    learning_rate: LearningRate = 1e-3,
    include: Include = None,
    exclude: Exclude = None,
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Set weights to zero: once, or (--epochs) little by little while training."""
    if sparsity is None and threshold is None and ":" not in structure:
        raise ValueError("Say how much: --sparsity 0.8, or --threshold 0.01.")
    technique = _given(
        sparsity=sparsity,
        threshold=threshold,
        criterion=criterion,
        structure=structure,
        allocation=allocation,
        include=include,
        exclude=exclude,
    )
    stage: dict[str, Any] = {"prune": technique}
    if epochs and threshold is None:
        if sparsity is not None and ":" not in structure:
            technique["sparsity"] = {
                "name": "PolynomialDecay",
                "initial_sparsity": 0.0,
                "final_sparsity": sparsity,
                "begin_step": 0,
                "end_step": "50%",
            }
        stage = {"pruning": {**technique, "frequency": 10}}
    elif epochs:
        stage = {"threshold": {"threshold": threshold}}
    if epochs:
        stage["train"] = {"epochs": epochs, "learning_rate": learning_rate}
    _run([stage], model, output, data, label, trust, as_json)


@reported
def quantize(
    model: Model,
    output: OutputFile,
    weights: Annotated[str, typer.Option(help="int8, int4, w4a8, ...")] = "int8",
    activations: Annotated[str, typer.Option(help="int8, dynamic, or float.")] = "int8",
    calibrator: Annotated[
        str, typer.Option(help="minmax, moving_average, percentile, mse or entropy.")
    ] = "minmax",
    rounding: Annotated[str, typer.Option(help="nearest, gptq or adaround.")] = "nearest",
    epochs: Epochs = 0,
    learning_rate: LearningRate = 1e-4,
    include: Include = None,
    exclude: Exclude = None,
    precision: Precision = None,
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Put weights and activations on integer grids: calibrated, or (--epochs) trained on them."""
    kind = None if activations in ("float", "none", "null") else activations
    selection = _given(include=include, exclude=exclude)
    technique: dict[str, Any] = {"weights": weights, "activations": kind, **selection}
    if epochs:
        train = {"epochs": epochs, "learning_rate": learning_rate}
        stages = [{"train": train, "qat": technique}]
    else:
        stages = [{"quantize": {**technique, "calibrator": calibrator, "rounding": rounding}}]
    _run(stages, model, output, data, label, trust, as_json, precision)


@reported
def shrink(
    model: Model,
    output: OutputFile,
    ratio: Annotated[
        float | None, typer.Option(help="Share of channels, neurons and heads to remove.")
    ] = None,
    target_macs: Annotated[
        int | None, typer.Option(help="Or the most multiply-accumulates of an example.")
    ] = None,
    target_parameters: Annotated[int | None, typer.Option(help="Or the most parameters.")] = None,
    criterion: Annotated[str, typer.Option(help="l2, l1, batch_norm, taylor, fisher.")] = "l2",
    allocation: Annotated[str, typer.Option(help="uniform or global.")] = "uniform",
    distil: Annotated[
        bool, typer.Option(help="Whether the original teaches in the training.")
    ] = True,
    epochs: Epochs = 0,
    learning_rate: LearningRate = 1e-3,
    include: Include = None,
    exclude: Exclude = None,
    precision: Precision = None,
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Remove channels, neurons and heads: a smaller dense model, faster everywhere."""
    targets = _given(ratio=ratio, target_macs=target_macs, target_parameters=target_parameters)
    if len(targets) != 1:
        raise ValueError(
            "Say how much with one of --ratio 0.5, --target-macs, --target-parameters."
        )
    technique = _given(
        **targets, criterion=criterion, allocation=allocation, include=include, exclude=exclude
    )
    stages: list[dict[str, Any]] = [{"shrink": technique}]
    if epochs:
        train: dict[str, Any] = {"train": {"epochs": epochs, "learning_rate": learning_rate}}
        stages.append(train | ({"distillation": {}} if distil else {}))
    _run(stages, model, output, data, label, trust, as_json, precision)


@reported
def export(
    model: Model,
    output: OutputFile,
    precision: Precision = None,
    io: Annotated[str | None, typer.Option(help="For .tflite at int8: float or integer.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="A fixed batch size.")] = None,
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a file that runs without Keras, and verify that it computes what the model does."""
    if output.suffix == ".keras":
        raise ValueError(
            "A .keras file is what there is; export to .tflite, .onnx, .xml or a folder."
        )
    options = _given(io=io, batch_size=batch_size)
    _run([], model, output, data, label, trust, as_json, precision, options)


@reported
def migrate(
    old: Annotated[
        pathlib.Path, typer.Argument(help="A model of Keras 2 or TFMOT: .h5, .keras, SavedModel.")
    ],
    new: Annotated[pathlib.Path, typer.Argument(help="The .keras file to write.")],
    as_json: Json = False,
) -> None:
    """Convert a model of Keras 2, plain or wrapped by TFMOT, to Keras 3."""
    from tfcompress.recipe.models import save_model
    from tfcompress.tfmot import convert

    if new.suffix != ".keras":
        raise ValueError(f"The new file must end in .keras, got {str(new)!r}.")
    if not old.exists():
        raise FileNotFoundError(f"There is no model at {str(old)!r}.")
    model = convert(old)
    save_model(model, new)
    found = {"path": str(new), "parameters": model.count_params()}
    _print(found, as_json)


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _run(stages, reference, output, data, label, trust, as_json, precision=None, options=None):
    """Apply the stages, and write the one file; by way of a recipe, which then is in the file."""
    from tfcompress.recipe import Recipe, load_model, save_model

    is_model = output.suffix == ".keras"
    if is_model and precision is not None:
        raise ValueError("--precision is for exported files; a .keras file keeps its weights.")
    if not is_model:
        last = {"path": output.name, **_given(precision=precision), **(options or {})}
        stages = [*stages, {"export": last}]
    recipe = Recipe.from_dict({"stages": stages})
    model = load_model(reference, trust)
    found = read_data(data, label, model, trust)
    result = recipe.apply(
        model,
        found,
        output=None if is_model else output.parent,
        trust=trust,
        verbose=0 if as_json else 1,
        keep_model=False,
        on_stage=lambda index, stage: note(" + ".join(stage.names), as_json),
    )
    if is_model:
        save_model(result.model, output)
    values = {"path": str(output), **result.to_dict()}
    if as_json:
        print_json(values)
        return
    show(result, output)


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    table(["", ""], [[name, value] for name, value in values.items()])
