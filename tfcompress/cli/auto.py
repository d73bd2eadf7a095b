"""`tfcompress auto`: search recipes for the smallest or fastest file within a loss of accuracy."""

import dataclasses
import pathlib
from typing import Annotated

import typer

from tfcompress.cli.common import (
    Json,
    Label,
    Model,
    Trust,
    fail,
    note,
    print_json,
    read_data,
    reported,
    table,
)


@reported
def auto(
    model: Model,
    data: Annotated[str, typer.Option(metavar="PATH", help="As for the other commands.")],
    max_drop: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that may be lost: 0.01 is one point.")
    ] = 0.01,
    target: Annotated[str, typer.Option(help="size, zipped or latency.")] = "size",
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try.")] = 20,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many that do not move the front.")
    ] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 3,
    output: Annotated[
        pathlib.Path,
        typer.Option("--output", "-o", help="Directory; the study in it goes on where it was."),
    ] = pathlib.Path("auto"),
    seed: Annotated[int, typer.Option(min=0, help="Of the choices.")] = 0,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Try recipes for the best trade of accuracy against size or speed; exit code 1 without any."""
    from tfcompress.recipe import load_model
    from tfcompress.recipe.search import search

    loaded = load_model(model, trust)
    found = search(
        loaded,
        read_data(data, label, loaded, trust),
        output,
        target,
        max_drop,
        trials,
        patience,
        epochs,
        seed,
        on_trial=lambda trial, front: note(_line(trial, front), as_json),
    )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        rows = [
            [each.number, *map(str, each.choices.values()), f"{each.cost:.1%}", f"{each.drop:+.2%}"]
            for each in found.front
        ]
        table(["trial", *found.front[0].choices, target, "drop"] if rows else ["none"], rows)
    if found.best is None:
        fail(f"No recipe keeps the drop of accuracy within {max_drop:.2%}.", as_json, code=1)
    note(f"The best, trial {found.best.number}, is in {output}: model.tflite, recipe.yaml", as_json)


def _line(trial, front) -> str:
    mark = "*" if any(each.number == trial.number for each in front) else " "
    bar = "#" * min(round(trial.cost * 40), 60)
    choices = ", ".join(f"{key} {value}" for key, value in trial.choices.items())
    return f"{mark} {trial.number:3d} {trial.cost:6.1%} {trial.drop:+7.2%} {bar:40s} {choices}"
