"""`tfcompress run`: a recipe from a file."""

import pathlib
from typing import Annotated

import typer

from tfcompress.cli.common import (
    DataOption,
    Json,
    Label,
    Trust,
    fail,
    note,
    print_json,
    read_data,
    reported,
    table,
)


@reported
def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A YAML file, or recipe:mlp, cnn, mobilenet, bert, lstm."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A .keras file; default: the model that the recipe names."),
    ] = None,
    data: DataOption = None,
    label: Label = None,
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="Directory for the results; it is made.")
    ] = pathlib.Path("compressed"),
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
    example: Annotated[
        str | None, typer.Option(help="Print a ready recipe to start from: mlp, cnn, ...")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read the recipe, and do nothing.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Compress a model as a recipe says; exit code 1 if the budget is missed."""
    from tfcompress.recipe import Recipe, load_model

    if schema:
        print_json(Recipe.schema())
        return
    if example is not None:
        typer.echo(Recipe.ready_text(example), nl=False)
        return
    if recipe is None:
        raise ValueError("Name a recipe: a YAML file, or recipe:cnn. --example cnn prints one.")
    found = Recipe.load(recipe)
    if check:
        note(f"{recipe} is a recipe of {len(found.stages)} stages.", as_json)
        if as_json:
            print_json(found.to_dict())
        return
    reference = model or found.model
    if reference is None:
        raise ValueError("Name the model: --model m.keras, or model: m.keras in the recipe.")
    loaded = load_model(reference, trust)
    result = found.apply(
        loaded,
        read_data(data, label, loaded, trust),
        output=output,
        trust=trust,
        verbose=0 if as_json else 1,
        on_stage=lambda index, stage: note(
            f"Stage {index + 1} of {len(found.stages)}: {' + '.join(stage.names)}", as_json
        ),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        show(result, output)
    if result.missed:
        fail("The budget is missed: " + "; ".join(result.missed), as_json, code=1)


_KEYS = ("accuracy", "mse", "parameters", "nonzeros", "macs", "bytes", "zipped_bytes")


def show(result, output) -> None:
    """What a result measures, as a table."""
    keys = [key for key in _KEYS if any(key in found for found in result.metrics.values())]
    rows = [[name, *(found.get(key) for key in keys)] for name, found in result.metrics.items()]
    table(["", *(key.replace("_", " ") for key in keys)], rows)
    typer.echo(f"Written to {output}")
