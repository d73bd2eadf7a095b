"""`tfcompress inspect`: what a model holds, and what each technique could do there."""

import collections
from collections.abc import Callable
from typing import Annotated, Any

import keras
import typer

from tfcompress import measure
from tfcompress.cli.common import Json, Trust, note, print_json, reported, table
from tfcompress.cli.items import example_inputs, open_item
from tfcompress.graph import blocks, expand, factorize, fold_batch_norm, shrink
from tfcompress.graph.macs import macs_by_weight
from tfcompress.graph.placement import place
from tfcompress.keras_hooks.walk import named_variables, select_kernels
from tfcompress.recipe import Recipe


@reported
def inspect_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A .keras file, or an exported file.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what each technique could do.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Layers, parameters, zeros and multiply-accumulates, and what each technique could do."""
    item = open_item(model, trust)
    found = _model(item, quick) if isinstance(item, keras.Model) else _file(item)
    found["recipe"] = _recipe(model)
    if as_json:
        print_json({"path": model, **found})
        return
    _show(found)


def _recipe(path: str) -> dict[str, Any] | None:
    try:
        return Recipe.from_model(path).to_dict()
    except (ValueError, OSError, ImportError):
        return None  # Not made by a recipe.


def _file(artefact) -> dict[str, Any]:
    tensors = artefact.tensors()
    return {
        "kind": artefact.format,
        "parameters": sum(tensor.params for tensor in tensors),
        "sparsity": measure.sparsity(artefact),
        "bytes": artefact.bytes,
        "zipped_bytes": artefact.zipped_bytes,
        "weights": [
            {
                "path": tensor.name,
                "shape": list(map(int, tensor.shape)),
                "dtype": tensor.dtype,
                "parameters": tensor.params,
                "sparsity": 1 - tensor.nonzeros / tensor.params if tensor.params else 0.0,
            }
            for tensor in tensors
        ],
    }


def _model(model: keras.Model, quick: bool) -> dict[str, Any]:
    size = measure.size(model)
    macs = _macs(model)
    weights = [_weight(path, variable, macs) for path, variable in named_variables(model).items()]
    found = {
        "kind": f"Keras {type(model).__name__}",
        "name": model.name,
        "inputs": [[*spec.shape] for spec in getattr(model, "inputs", None) or []],
        "parameters": model.count_params(),
        "sparsity": measure.sparsity(model),
        "macs": None if macs is None else sum(macs.values()),
        "bytes": size.bytes,
        "zipped_bytes": size.zipped_bytes,
        "layers": dict(collections.Counter(type(layer).__name__ for layer in model.layers)),
        "weights": weights,
    }
    if not quick:
        found["techniques"] = techniques(model)
    return found


def _macs(model: keras.Model) -> dict | None:
    try:
        return macs_by_weight(model, example_inputs({model.name: model}, examples=1))
    except ValueError:
        return None  # Its inputs are of any size.


def _weight(path: str, variable, macs) -> dict[str, Any]:
    values = keras.ops.convert_to_numpy(variable)
    return {
        "path": path,
        "shape": list(map(int, values.shape)),
        "dtype": str(values.dtype),
        "parameters": int(values.size),
        "sparsity": float((values == 0).mean()) if values.size else 0.0,
        "macs": None if macs is None else macs.get(path, 0),
    }


def techniques(model: keras.Model) -> dict[str, str]:
    """What each technique could do to a model, in words, or why it can do nothing.

    Args:
        model: A built model.

    Returns:
        Technique -> a sentence.

    Example:

    >>> layers = [keras.Input((8,)), keras.layers.Dense(64), keras.layers.Dense(2)]
    >>> found = techniques(keras.Sequential(layers))
    >>> found["prune"], found["fold"]
    ('2 weights with 640 of 706 parameters', 'no batch norm to fold')
    """
    return {name: _said(question, model) for name, question in _QUESTIONS.items()}


def _said(question: Callable[[keras.Model], str], model: keras.Model) -> str:
    try:
        return question(model)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return "not here: " + " ".join(str(error).split())[:200]


def _prune(model: keras.Model) -> str:
    selected, _ = select_kernels(model, None, None)
    count = sum(int(variable.shape.num_elements()) for variable in selected.values())
    return f"{len(selected)} weights with {count:,} of {model.count_params():,} parameters"


def _quantize(model: keras.Model) -> str:
    plan = place(model)
    kinds = collections.Counter(type(each.layer).__name__ for each in plan.placements)
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
    left = f"; {len(plan.skipped)} places stay float" if plan.skipped else ""
    return f"{text}{left}" if text else "no layer to quantize"


def _smaller(model: keras.Model, small: keras.Model) -> str:
    before, after = model.count_params(), small.count_params()
    if after >= before:
        return "no layer becomes smaller"
    return f"{before:,} to {after:,} parameters ({before / max(after, 1):.1f}x fewer)"


def _shrink(model: keras.Model) -> str:
    return f"ratio 0.5: {_smaller(model, shrink(model, ratio=0.5))}"


def _factorize(model: keras.Model) -> str:
    return f"energy 0.9: {_smaller(model, factorize(model, energy=0.9, verbose=0))}"


def _fold(model: keras.Model) -> str:
    def norms(each):
        kind = keras.layers.BatchNormalization
        return sum(isinstance(layer, kind) for layer in each.layers)

    before = norms(expand(model))
    if not before:
        return "no batch norm to fold"
    return f"{before - norms(fold_batch_norm(model))} of {before} batch norms"


def _drop_layers(model: keras.Model) -> str:
    found = list(blocks(model))
    return f"{len(found)} blocks: {', '.join(map(str, found[:6]))}" if found else "no blocks"


def _vocabulary(model: keras.Model) -> str:
    layers = [each for each in expand(model).layers if hasattr(each, "input_dim")]
    sizes = [f"{each.name}: {each.input_dim:,} rows" for each in layers]
    return ", ".join(sizes) or "no embedding"


_QUESTIONS: dict[str, Callable[[keras.Model], str]] = {
    "prune": _prune,
    "quantize": _quantize,
    "shrink": _shrink,
    "factorize": _factorize,
    "fold": _fold,
    "drop_layers": _drop_layers,
    "prune_vocabulary": _vocabulary,
}


def _show(found: dict[str, Any]) -> None:
    columns = ("path", "shape", "dtype", "parameters", "sparsity", "macs")
    columns = [key for key in columns if any(key in each for each in found["weights"])]
    rows = [[_cell(key, each.get(key)) for key in columns] for each in found["weights"]]
    table(columns, rows, title="Weights")
    keys = ("kind", "name", "inputs", "parameters", "sparsity", "macs", "bytes", "zipped_bytes")
    facts = [[key.replace("_", " "), _cell(key, found[key])] for key in keys if key in found]
    table(["", ""], facts)
    if "techniques" in found:
        table(["technique", "here"], [list(pair) for pair in found["techniques"].items()])
    if found["recipe"] is not None:
        note("Made by a recipe: --json shows it.")


def _cell(key: str, value: Any) -> Any:
    if key == "sparsity":
        return f"{value:.1%}"
    return str(value) if isinstance(value, list) else value
