"""`tfcompress demo`."""

import enum
import pathlib
from typing import Annotated

import typer


class DemoModel(enum.StrEnum):
    """What the demo compresses."""

    mlp = "mlp"
    cnn = "cnn"
    all = "all"


def demo(
    model: Annotated[DemoModel, typer.Option(help="The model to compress.")] = DemoModel.all,
    output: Annotated[
        pathlib.Path, typer.Option(help="Directory for the report, the plots and the files.")
    ] = pathlib.Path("tfcompress-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data split and training.")] = 0,
) -> None:
    """Train real models, compress, export, verify and compare them: about three minutes."""
    from tfcompress import demo as demonstration

    models = ("mlp", "cnn") if model is DemoModel.all else (model.value,)
    try:
        demonstration.writable_directory(output)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from error
    demonstration.run(models, output, seed)
