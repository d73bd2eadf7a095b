"""`tfcompress bench`, `compare` and `report`: numbers of models and files, and a page of them."""

import json
import pathlib
from typing import Annotated, Any

import keras
import numpy as np
import rich.console
import typer

import tfcompress as tfc
from tfcompress.artefact import replacing
from tfcompress.cli.common import (
    DataOption,
    Json,
    Label,
    Trust,
    note,
    print_json,
    read_data,
    reported,
    table,
)
from tfcompress.cli.items import example_inputs, open_item
from tfcompress.measure import Profile, Timing

Items = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help=".keras, .tflite, .onnx, .xml, or SavedModel; the first is the base.",
    ),
]


@reported
def bench(
    files: Items,
    data: DataOption = None,
    label: Label = None,
    batch_sizes: Annotated[
        list[int], typer.Option("--batch-size", min=1, help="Examples of a call; repeatable.")
    ] = [1, 32],  # noqa: B006
    rounds: Annotated[
        int, typer.Option(min=1, help="Timings of each file; the median counts.")
    ] = 31,
    threads: Annotated[int, typer.Option(min=1, help="For exported files.")] = 1,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", help="JSON file for the profiles, which `report` reads."),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Time any mix of models and files in turns, with their sizes and (--data) their accuracy."""
    profiles = _profiles(
        files, data, label, Timing(tuple(batch_sizes), rounds, num_threads=threads), trust
    )
    values = [profile.to_dict() for profile in profiles]
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(values), encoding="utf-8")
    if as_json:
        print_json([_without_histograms(each) for each in values])
        return
    rich.console.Console().print(tfc.report.table(profiles))
    if output is not None:
        typer.echo(f"Written to {output}")


def _profiles(files, data, label, timing: Timing, trust: bool) -> list[Profile]:
    items = _opened(files, trust)
    found = read_data(data, label, _first_model(items), trust)
    batch = example_inputs(items) if found is None else found.inputs(32, "validation")
    base = next(iter(items))
    group = pathlib.Path(files[0]).stem
    names = {name: f"{group}/{name}" for name in items}
    return tfc.measure.compare(
        {names[name]: item for name, item in items.items()},
        batch,
        None if found is None else found.validation,
        {names[name]: items[base] for name in items if name != base},
        timing,
    )


def _without_histograms(profile: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in profile.items() if key != "layers"}


def _opened(files: list[str], trust: bool) -> dict[str, Any]:
    """Items by a short name: that of the file, with its folder where two have the same."""
    names = [pathlib.Path(file).name for file in files]
    short = [
        name if names.count(name) == 1 else file for name, file in zip(names, files, strict=True)
    ]
    if len(set(short)) != len(short):
        raise ValueError(f"A file is named twice: {files}.")
    return {name: open_item(file, trust) for name, file in zip(short, files, strict=True)}


def _first_model(items: dict[str, Any]) -> keras.Model | None:
    return next((item for item in items.values() if isinstance(item, keras.Model)), None)


@reported
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model or an exported file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same inputs.")],
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Whether two models or files compute the same, and what they differ in."""
    items = _opened([first, second], trust)
    found = read_data(data, label, _first_model(items), trust)
    batch = example_inputs(items, 128) if found is None else found.inputs(512, "validation")
    (name_a, a), (name_b, b) = items.items()
    outputs = [_flat(tfc.measure.forward(item)(batch)) for item in (a, b)]
    shapes = [[each.shape for each in side] for side in outputs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first!r} has outputs of the shapes {shapes[0]} and {second!r} of {shapes[1]}; "
            "only models of the same outputs can be compared."
        )
    values = {
        "a": _numbers(a, found),
        "b": _numbers(b, found),
        "difference": _difference(*outputs),
        "examples": len(outputs[0][0]),
        "inputs": "random" if found is None else found.source,
    }
    if as_json:
        print_json(values)
        return
    keys = list(dict.fromkeys([*values["a"], *values["b"]]))
    rows = [[key.replace("_", " "), values["a"].get(key), values["b"].get(key)] for key in keys]
    table(["", name_a, name_b], rows)
    kind = f"{values['examples']} {'random ' if found is None else ''}examples"
    table(
        [f"difference on {kind}", ""],
        [[k.replace("_", " "), v] for k, v in values["difference"].items()],
    )


def _flat(outputs) -> list[np.ndarray]:
    return [np.asarray(each) for each in keras.tree.flatten(outputs)]


def _numbers(item, data) -> dict[str, Any]:
    from tfcompress.recipe.run import quality

    size, weights = tfc.measure.size(item), tfc.measure.weights(item)
    return {
        "parameters": sum(weight.params for weight in weights),
        "nonzeros": sum(weight.nonzeros for weight in weights),
        "bytes": size.bytes,
        "zipped_bytes": size.zipped_bytes,
        **({} if data is None else quality(item, data)),
    }


def _difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    gaps = [np.abs(a.astype(np.float64) - b) for a, b in zip(ours, theirs, strict=True)]
    scale = np.sqrt(np.mean([np.mean(a.astype(np.float64) ** 2) for a in ours]))
    found = {
        "max_abs": float(max(gap.max(initial=0.0) for gap in gaps)),
        "relative_rms": float(np.sqrt(np.mean([np.mean(gap**2) for gap in gaps])) / (scale or 1.0)),
    }
    if len(ours) == 1 and ours[0].ndim == 2 and ours[0].shape[1] > 1:
        agree = ours[0].argmax(axis=-1) == theirs[0].argmax(axis=-1)
        found["same_class"] = float(agree.mean())
    return found


@reported
def report(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="JSON files of `bench --output`, or models and files to bench."
        ),
    ],
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="The HTML file to write.")
    ] = pathlib.Path("report.html"),
    title: Annotated[str, typer.Option(help="The heading.")] = "Compression report",
    data: DataOption = None,
    label: Label = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """One self-contained HTML page about models and files."""
    profiles = [p for file in files if file.endswith(".json") for p in _read_profiles(file)]
    models = [file for file in files if not file.endswith(".json")]
    if models:
        profiles += _profiles(models, data, label, Timing(), trust)
    inputs = {"files": ", ".join(files), **({"data": data} if data else {})}
    path = tfc.report.html(profiles, output, title=title, inputs=inputs)
    if as_json:
        print_json({"path": str(path), "profiles": len(profiles)})
    else:
        note(f"Written to {path}")


def _read_profiles(path: str) -> list[Profile]:
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return [Profile.from_dict(each) for each in values]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path!r} holds no profiles: {error}. Write some with tfcompress bench A B -o "
            "profiles.json"
        ) from error
