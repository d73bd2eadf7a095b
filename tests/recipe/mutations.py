"""Recipes and model files that are damaged on purpose, each in a way of its own."""

import io
import json
import random
import zipfile

BASE = """\
name: base
seed: 3
data: {path: points.csv, validation_split: 0.25}
stages:
  - train: {epochs: 2, learning_rate: 0.001, optimizer: adam, decay: cosine}
    pruning:
      sparsity: {name: PolynomialDecay, initial_sparsity: 0.0, final_sparsity: 0.8, begin_step: 0, end_step: 50%}
      criterion: magnitude
      structure: unstructured
      allocation: global
      frequency: 10
    qat: {weights: int8, activations: int8}
  - shrink: {ratio: 0.5, criterion: l2, round_to: 8}
  - quantize: {calibrator: {name: percentile, percentile: 99.9}, rounding: nearest}
  - export: {path: model.tflite, precision: int8}
budget: {max_drop: 0.01, max_bytes: 100000}
"""  # noqa: E501
_KEYS = [
    "seed", "data", "path", "validation_split", "stages", "train", "epochs", "learning_rate",
    "pruning", "sparsity", "initial_sparsity", "criterion", "structure", "qat", "weights",
    "shrink", "ratio", "round_to", "quantize", "calibrator", "export", "precision", "budget",
    "max_drop",
]  # fmt: skip
_VALUES = {
    "seed: 3": ["seed: -1", "seed: three", "seed: [3]"],
    "epochs: 2": ["epochs: 0", "epochs: two", "epochs: 2.5", "epochs: {a: 1}", "epochs: -3"],
    "0.001": ["-0.001", "fast", "0"],
    "optimizer: adam": ["optimizer: adm", "optimizer: 3"],
    "decay: cosine": ["decay: cosin", "decay: 1"],
    "PolynomialDecay": ["PolynomialDelay", "Polynomial", "[]"],
    "final_sparsity: 0.8": ["final_sparsity: 1.0", "final_sparsity: 8", "final_sparsity: x"],
    "50%": ["50%%", "half", "-1"],
    "magnitude": ["magnitud", "{name: magnitud}", "7"],
    "unstructured": ["unstructred", "2:2", "block"],
    "allocation: global": ["allocation: globl", "allocation: 1"],
    "weights: int8": ["weights: int9", "weights: [int8]", "weights: {bits: 40}"],
    "ratio: 0.5": ["ratio: 1.5", "ratio: half", "ratio: {a: 2}"],
    "criterion: l2": ["criterion: l3", "criterion: null"],
    "percentile: 99.9": ["percentile: high", "percentil: 99.9"],
    "rounding: nearest": ["rounding: nearst", "rounding: []"],
    "model.tflite": ["../model.tflite", "/model.tflite", "model.exe", "''"],
    "precision: int8": ["precision: int7", "precision: 8"],
    "max_drop: 0.01": ["max_drop: 2", "max_drop: -1", "max_drop: much"],
    "max_bytes: 100000": ["max_bytes: 0", "max_bytes: 1e99"],
    "stages:\n": ["stages: 3\nx:\n", "stages: [\n"],
    "name: base": ["name: [a]", "name: base\nname: again", "version: 2", "- name", "\tname: base"],
    "  - shrink": [
        "  - shrink: {ratio: 0.5}\n    fold:\n  - shrink",
        "  -\n  - shrink",
        " - shrink",
    ],
}


def recipes(count: int) -> list[str]:
    """`count` texts, none of which is a recipe."""
    made = [BASE.replace(f"{key}:", f"{key}s:", 1) for key in _KEYS]
    made += [BASE.replace(old, new, 1) for old, news in _VALUES.items() for new in news]
    made += [
        "",
        "null",
        "[]",
        "3",
        "text",
        "stages: []",
        "{",
        "a: b: c",
        "\0",
        "!!python/object:os.system x",
    ]
    made += ["[" * 1000, "stages: [{fold: !!python/name:os.system }]", "? [a]\n: 1", "%YAML 9\n---"]
    rng = random.Random(0)
    while len(made) < count:  # Cut somewhere in the middle of the stages, inside of a bracket.
        start = BASE.index("{", rng.randrange(len(BASE) // 2))
        end = BASE.index("}", start)
        made.append(BASE[: rng.randrange(start + 1, end)] + "\n" * rng.randrange(3))
    rng.shuffle(made)
    return made[:count]


def _rewritten(content: bytes, change) -> bytes:
    """A `.keras` archive whose files went through `change(name, bytes)`; None leaves one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            found = change(name, old.read(name))
            if found is not None:
                new.writestr(name, found)
    return buffer.getvalue()


def _config(content: bytes, change) -> bytes:
    def in_config(name, data):
        if name != "config.json":
            return data
        config = json.loads(data)
        change(config)
        return json.dumps(config).encode()

    return _rewritten(content, in_config)


def _dense(config) -> dict:
    return config["config"]["layers"][1]["config"]


def keras_files(content: bytes, count: int) -> list[bytes]:
    """`count` damaged forms of a `.keras` file of dense layers, none of which can be loaded."""
    made = [
        b"",
        b"PK",
        b"not a model",
        content[: len(content) // 2],
        content[:-1],
        b"\0" * len(content),
        _rewritten(content, lambda n, d: None if n == "config.json" else d),
        _rewritten(content, lambda n, d: None if n == "metadata.json" else d),
        _rewritten(content, lambda n, d: None if n.endswith(".h5") else d),
        _rewritten(content, lambda n, d: d[: len(d) // 2] if n.endswith(".h5") else d),
        _rewritten(content, lambda n, d: b"\0" * len(d) if n.endswith(".h5") else d),
        _rewritten(content, lambda n, d: b"{" if n == "config.json" else d),
        _rewritten(content, lambda n, d: b"[" * 100_000 if n == "config.json" else d),
        _rewritten(content, lambda n, d: b"[]" if n == "config.json" else d),
        _config(content, lambda c: c.update(class_name="Lambda")),
        _config(content, lambda c: c.update(class_name="Thing", registered_name="my>Thing")),
        _config(content, lambda c: c.update(module="os", class_name="system")),
        _config(content, lambda c: c.update(config=None)),
        _config(content, lambda c: _dense(c).update(units=10**12)),
        _config(content, lambda c: _dense(c).update(units=7)),
        _config(content, lambda c: _dense(c).update(units=-1)),
        _config(content, lambda c: _dense(c).update(activation="boom")),
        _config(content, lambda c: _dense(c).update(unknown=1)),
        _config(content, lambda c: c["config"]["layers"].clear()),
        _config(content, lambda c: c["config"]["layers"].pop(1)),
    ]
    rng = random.Random(1)
    while len(made) < count:
        made.append(content[: rng.randrange(len(content))])
    return made[:count]


def flipped(content: bytes, count: int) -> list[bytes]:
    """`count` copies with some bytes changed: whether one can still be loaded is chance."""
    rng = random.Random(2)
    made = []
    for _ in range(count):
        copy = bytearray(content)
        for _ in range(rng.choice((1, 4, 64))):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        made.append(bytes(copy))
    return made
