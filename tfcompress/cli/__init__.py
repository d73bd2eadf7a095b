"""The command line: `tfcompress --help`; one module for each family of commands."""

import signal
import sys

import typer

from tfcompress.cli import auto, bench, compress, demonstration, doctor, inspection, recipes

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress and accelerate Keras 3 models on TensorFlow.",
)


@app.callback()
def _commands() -> None:
    """Compress and accelerate Keras 3 models on TensorFlow."""


app.command()(demonstration.demo)
app.command("inspect")(inspection.inspect_model)
app.command()(recipes.run)
app.command()(compress.prune)
app.command()(compress.quantize)
app.command()(compress.shrink)
app.command()(compress.export)
app.command()(compress.migrate)
app.command()(bench.bench)
app.command()(bench.compare)
app.command()(bench.report)
app.command()(auto.auto)
app.command()(doctor.doctor)


def main() -> None:
    """The entry point of the `tfcompress` command."""
    # An exception, so that what was begun is cleaned up, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
