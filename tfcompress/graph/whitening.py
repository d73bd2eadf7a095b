"""The second moments of the inputs of kernels, by which `factorize` weighs what it loses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from tfcompress.batches import calibration_batches, num_batches
from tfcompress.graph.factored_layers import kernel_of
from tfcompress.graph.inputs import (
    NOT_REACHED,
    LinearKernel,
    linear_kernels,
    second_moments,
    watch_calls,
)
from tfcompress.graph.low_rank import damped
from tfcompress.keras_hooks.walk import named_variables

_log = logging.getLogger("tfcompress")

# Of the mean second moment: as if the inputs had so much noise, which no factor may amplify.
_DAMPING = 1e-3

# Entries of the moments that are held at once: 1 GB of float64.
_MOST_ENTRIES = 2**27


class Moments:
    """Positive definite moments of the inputs of some layers, as many at a time as fit in memory.

    Of `Dense`, `EinsumDense` and `Conv2D` layers `X^T X`, damped; of `Embedding` layers, whose
    inputs are one-hot, how often each token comes, and once more.

    Args:
        flat: A model from `tfcompress.expand`.
        layers: Its layers of these kinds, by a name of your choice, in the order in which they will
            be asked for, once or more often.
        calibration: Data that can be read many times; None for no moments.
        verbose: Whether to show progress.

    Example:

    >>> layer = keras.layers.Embedding(3, 2)
    >>> model = keras.Sequential([keras.Input((4,), dtype="int32"), layer])
    >>> tokens = np.array([[0, 0, 0, 2]])
    >>> Moments(model, {"table": layer}, tokens, verbose=0).of("table").tolist()
    [4.0, 1.0, 2.0]
    """

    def __init__(
        self,
        flat: keras.Model,
        layers: Mapping[str, keras.layers.Layer],
        calibration: Any,
        verbose: int,
    ):
        self._flat = flat
        self._calibration = calibration
        self._verbose = verbose
        self._sources: dict[str, LinearKernel | keras.layers.Embedding] = {}
        self._groups: dict[str, list[str]] = {}
        self._held: dict[str, np.ndarray | None] = {}
        if calibration is not None and layers:
            self._sources = _sources(flat, layers)
            for group in _in_groups(self._sources):
                self._groups.update((name, group) for name in group)

    def of(self, name: str) -> np.ndarray | None:
        """The moment for a layer; None without calibration data, or if they do not reach it."""
        if name in self._groups and name not in self._held:
            self._held = {}  # Frees one group before the next one is there.
            self._held = self._measured(self._groups[name])
        return self._held.get(name)

    def _measured(self, group: list[str]) -> dict[str, np.ndarray | None]:
        sources = {name: self._sources[name] for name in group}
        tables = {name: each for name, each in sources.items() if _is_table(each)}
        linear = {each.path: each for each in sources.values() if not _is_table(each)}
        found: dict[str, np.ndarray] = {}
        if linear:
            moments = second_moments(self._flat, linear, self._batches)
            names = {each.path: name for name, each in sources.items() if not _is_table(each)}
            found |= {names[path]: damped(moments.pop(path), _DAMPING) for path in [*moments]}
        if tables:
            found |= _token_counts(self._flat, tables, self._batches())
        for name in group:
            if name not in found:
                _log.warning("factorize: %s is not whitened: %s", name, NOT_REACHED)
        return {name: found.get(name) for name in group}

    def _batches(self) -> Iterator[tuple]:
        number = num_batches(self._calibration)
        bar = keras.utils.Progbar(number, verbose=self._verbose, unit_name="batch")
        for seen, batch in enumerate(calibration_batches(self._flat, self._calibration), 1):
            yield (batch,)
            bar.update(seen, finalize=False)
        bar.update(seen, finalize=True)


def _sources(flat, layers) -> dict[str, LinearKernel | keras.layers.Embedding]:
    paths = {id(variable): path for path, variable in named_variables(flat).items()}
    by_name = {
        name: paths[id(kernel_of(layer))] for name, layer in layers.items() if not _is_table(layer)
    }
    kernels, _ = linear_kernels(flat, list(by_name.values()))
    return {
        name: layer if _is_table(layer) else kernels[by_name[name]]
        for name, layer in layers.items()
    }


def _is_table(source) -> bool:
    return isinstance(source, keras.layers.Embedding)


def _in_groups(sources) -> Iterator[list[str]]:
    group, entries = [], 0
    for name, source in sources.items():
        size = source.input_dim if _is_table(source) else source.num_inputs**2
        if group and entries + size > _MOST_ENTRIES:
            yield group
            group, entries = [], 0
        group, entries = [*group, name], entries + size
    yield group


def _token_counts(flat, tables: Mapping[str, keras.layers.Layer], batches) -> dict[str, np.ndarray]:
    """Rows that are never looked up count once: they keep some weight."""
    counts = {name: np.ones(table.input_dim) for name, table in tables.items()}

    def told(name, call):
        tokens = call.args[0] if call.args else call.kwargs["inputs"]
        tokens = keras.ops.convert_to_numpy(tokens).astype("int64").reshape(-1)
        counts[name] += np.bincount(tokens, minlength=len(counts[name]))

    for (batch,) in batches:
        watch_calls(flat, tables, batch, told)
    return counts
