"""What flows through a model while it runs: the inputs and outputs of its layers, by path.

Private Keras API used here, each with a test in `tests/keras_hooks/test_capture.py`:
`_keras_mask` and `_keras_logits`, which Keras puts on tensors, `Trainer._compile_loss`, and that
Keras runs every layer and every op of a Functional model through `operation.call`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Collection, Iterator
from typing import Any

import keras

from tfcompress.keras_hooks.hook import add_hook
from tfcompress.keras_hooks.overlay import children


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One call of a layer or an op.

    Args:
        path: Its path, with `#2`, `#3`, ... for the second, third, ... call under the same path.
        operation: The layer or op.
        input: The first tensor that it was called on, or None.
        output: The first tensor that it returned, or None.
    """

    path: str
    operation: keras.Operation
    input: Any
    output: Any


def keras_mask(tensor):
    """The mask that Keras put on a tensor; None if there is none."""
    return getattr(tensor, "_keras_mask", None)


def keras_logits(tensor):
    """What a softmax or sigmoid that made this very tensor was applied to; None if none did."""
    return getattr(tensor, "_keras_logits", None)


def operations(model: keras.Model) -> list[tuple[str, keras.Operation]]:
    """`(path, operation)` of everything inside a model: layers at any depth, ops of graphs.

    A path is the names from the outermost layer inside the model to the operation, so it does not
    depend on what the model is called. What the model holds twice is listed under its first path;
    the cells of recurrent layers are left out.

    Args:
        model: Any model; what is not yet made is not listed.

    Example:

    >>> head = keras.Sequential([keras.layers.Dense(2, name="dense")], name="head")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU(name="relu"), head])
    >>> [path for path, _ in operations(model)]
    ['relu', 'head', 'head/dense']
    """
    found, seen = [], {id(model)}

    def walk(parent, prefix):
        inside = getattr(parent, "operations", None) or children(parent)
        for operation in inside:
            if id(operation) in seen or isinstance(operation, keras.layers.InputLayer):
                continue
            seen.add(id(operation))
            found.append((prefix + operation.name, operation))
            # What runs in a loop is called once outside of it too, for its shapes.
            looped = isinstance(operation, (keras.layers.RNN, keras.layers.TimeDistributed))
            if isinstance(operation, keras.layers.Layer) and not looped:
                walk(operation, f"{prefix}{operation.name}/")

    walk(model, "")
    return found


@contextlib.contextmanager
def recording(model: keras.Model, paths: Collection[str] | None = None) -> Iterator[list[Record]]:
    """Record the calls inside a model for the length of a `with` block.

    Calls made by other threads are not recorded: each replica of a strategy is one.

    Args:
        model: Any model.
        paths: What to record, paths without a call number; None for everything.

    Yields:
        A list to which every call adds a `Record` when it returns.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU(name="relu")])
    >>> with recording(model) as records:
    ...     _ = model(keras.ops.ones((3, 2)))
    >>> [(record.path, tuple(record.output.shape)) for record in records]
    [('relu', (3, 2))]
    """
    records, counts, owner = [], {}, threading.get_ident()

    def record(path, operation, proceed, *args, **kwargs):
        outputs = proceed(*args, **kwargs)
        if threading.get_ident() == owner:
            counts[path] = counts.get(path, 0) + 1
            name = path if counts[path] == 1 else f"{path}#{counts[path]}"
            records.append(Record(name, operation, _first((args, kwargs)), _first(outputs)))
        return outputs

    with contextlib.ExitStack() as stack:
        for path, operation in operations(model):
            if paths is None or path in paths:
                hook = functools.partial(record, path, operation)
                stack.callback(add_hook(operation, "call", hook))
        yield records


def _first(structure):
    leaves = keras.tree.flatten(structure)
    return next((leaf for leaf in leaves if keras.ops.is_tensor(leaf)), None)


def compiled_loss(model: keras.Model, y, y_pred, sample_weight=None):
    """The loss that a model was compiled with, and nothing else: no penalties of its layers.

    Args:
        model: A compiled model.
        y: Targets.
        y_pred: Outputs.
        sample_weight: Weights, as `fit` takes them.

    Returns:
        A scalar; None where the model was compiled without a loss.
    """
    loss = model._compile_loss
    return None if loss is None else loss(y, y_pred, sample_weight)
