"""What the commands share: options, errors, and output for people and for programs."""

import functools
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import rich.box
import rich.console
import rich.table
import rich.text
import tensorflow as tf
import typer

from tfcompress.export import ExportError

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the code that a model (Lambda layers) or a module:function brings along.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A .csv, .npz or .tfrecord file, a folder of images, zoo:mnist5k, or, with --trust, "
        "module:function.",
    ),
]
Label = Annotated[
    str | None, typer.Option(help="The column (CSV) or feature (TFRecord) with the labels.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A .keras file, or zoo:minilm.")]
OutputFile = Annotated[
    pathlib.Path,
    typer.Argument(
        metavar="OUTPUT",
        help="File to write: .keras, .tflite, .onnx, .xml (OpenVINO), or a folder (SavedModel).",
    ),
]

# What bad input raises: everything that the package checks, files, missing packages, TensorFlow.
_BAD_INPUT = (ValueError, OSError, ImportError, ExportError, tf.errors.OpError)


def reported(command: Callable) -> Callable:
    """A command whose errors are one message on stderr and exit code 2, not a traceback."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                return command(*args, **kwargs)
        except _BAD_INPUT as error:
            fail(str(error), kwargs.get("as_json", False))

    return run


def fail(message: str, as_json: bool = False, code: int = 2) -> None:
    """End with a message on stderr."""
    if as_json:
        typer.echo(json.dumps({"error": message}), err=True)
    else:
        console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(rich.text.Text("Error: ", style="bold red").append(message, style="default"))
    raise typer.Exit(code)


def print_json(values: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(values, indent=1, default=str))


def table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right."""
    made = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        is_text = all(isinstance(row[index], str) for row in rows)
        made.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        made.add_row(*(rich.text.Text(text(value)) for value in row))
    rich.console.Console().print(made)


def text(value: Any) -> str:
    """A value for people: thousands separated, a dash for nothing.

    Example:

    >>> text(12345), text(None), text(0.123456), text("a")
    ('12,345', '-', '0.1235', 'a')
    """
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def note(message: str, as_json: bool = False) -> None:
    """A line on stderr, for people only."""
    if not as_json:
        rich.console.Console(stderr=True, highlight=False).print(rich.text.Text(message))


def read_data(path: str | None, label: str | None, model, trust: bool):
    """The data of `--data`, or None."""
    from tfcompress.data import Source, load

    return None if path is None else load(Source(path, label), model, trust)
