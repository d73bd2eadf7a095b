"""Inference that is compiled by XLA where that is faster, and by TensorFlow's graph where not."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import rich.progress
import rich.table
import tensorflow as tf

from tfcompress.acceleration.program import (
    Frozen,
    Program,
    example_batch,
    flattened,
    folded,
    input_specs,
    with_batch_size,
)
from tfcompress.artefact import replacing_directory
from tfcompress.batches import first_batch
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.timing import Timing, latency
from tfcompress.values import Value

_log = logging.getLogger("tfcompress")
# Where a SavedModel keeps what is not TensorFlow's.
_JSON = pathlib.Path("assets.extra", "tfcompress.json")
# XLA has to win by this much: a compiled batch size is padded to, a graph takes any.
_MARGIN = 1.02
# What it takes, about, to cut a part out of a batch or to pad it, and to join the results.
_PART_MS = 0.1
# An engine that loses one call by this factor is not timed further.
_HOPELESS = 3.0


@dataclasses.dataclass(frozen=True)
class Measurement(Value):
    """One batch size in both engines, in milliseconds a call, on the machine that compiled.

    Args:
        batch_size: Examples of the call.
        graph_ms: Median of TensorFlow's graph, folded and frozen.
        xla_ms: Median of XLA on the same graph; None where it cannot compile it.
        note: Why XLA is not used, where it is not the clock that says so.
    """

    batch_size: int
    graph_ms: float
    xla_ms: float | None = None
    note: str = ""

    @property
    def engine(self) -> str:
        """`"xla"` where it was faster, else `"graph"`.

        >>> Measurement(8, graph_ms=2.0, xla_ms=1.0).engine
        'xla'
        """
        faster = self.xla_ms is not None and self.xla_ms * _MARGIN < self.graph_ms
        return "xla" if faster else "graph"


class Compiled:
    """A model's inference pass, compiled; call it as the model. Made by `compile` and `load`.

    A call never compiles: XLA runs the batch sizes it was compiled for, to which a batch is padded
    with copies of its last example, or cut into several; where the graph was faster, it takes the
    batch as it is. What is run for which batch follows from what was measured; see `parts`.

    Args:
        program: The inference pass with its variables.
        measured: One `Measurement` for each batch size.
        environment: Where they were measured.
    """

    def __init__(self, program: Any, measured: Sequence[Measurement], environment: dict[str, str]):
        self.measured = tuple(sorted(measured, key=lambda each: each.batch_size))
        self.environment = dict(environment)
        # Without it the variables of a loaded program are gone.
        self._program = program
        frozen = Frozen.of(_concrete(program))
        self._specs = frozen.specs
        self._outputs = frozen.outputs
        self._flat_specs = tf.nest.flatten(frozen.specs)
        self._graph = frozen.compiled(None, jit=False)
        self._xla = {
            each.batch_size: frozen.compiled(each.batch_size, jit=True)
            for each in self.measured
            if each.engine == "xla"
        }
        self._parts: dict[int, tuple[tuple[str, int], ...]] = {}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes that were measured."""
        return tuple(each.batch_size for each in self.measured)

    @property
    def engines(self) -> dict[int, str]:
        """Batch size -> `"xla"` or `"graph"`."""
        return {each.batch_size: each.engine for each in self.measured}

    def __call__(self, inputs: Any) -> Any:
        """What the model returns for these inputs: tensors, in the same structure.

        Args:
            inputs: Arrays or tensors in the structure that the model takes, of any batch size.

        Raises:
            ValueError: They have another structure or other shapes.
        """
        flat = [inputs] if isinstance(inputs, np.ndarray | tf.Tensor) else tf.nest.flatten(inputs)
        flat, size = self._checked(flat, inputs)
        engine = self._xla.get(size)
        outputs = engine(*flat) if engine is not None else self._in_parts(flat, size)
        if tf.is_tensor(self._outputs):
            return outputs[0]
        return tf.nest.pack_sequence_as(self._outputs, outputs)

    def parts(self, size: int) -> tuple[tuple[str, int], ...]:
        """How a batch is run: `("xla" | "graph", batch size)`, in order.

        The cheapest by the medians that were measured, between which those of the graph are taken
        as linear. Only the last part may be larger than what is left for it, and is then padded.

        Args:
            size: Examples of the batch, 1 or more.
        """
        if size not in self._parts:
            self._parts[size] = cheapest_parts(self.measured, size)
        return self._parts[size]

    def warm_up(self, verbose: int = 1) -> None:
        """Let XLA compile every batch size now instead of at its first call."""
        named = rich.progress.track(self._xla.items(), "Compiling", disable=not verbose)
        for size, engine in named:
            engine(*_zeros(self._flat_specs, size))

    def traces(self) -> int:
        """How many graphs there are; no call adds one."""
        return 1 + len(self._xla)

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Write a SavedModel, which also runs without this package, and what was measured.

        The signature `serve` takes any batch size and is compiled by neither engine: XLA compiles
        for the machine that it runs on, when `load` reads the directory there.

        Args:
            path: The directory, written whole or not at all; a SavedModel there is replaced.

        Returns:
            The path.

        Raises:
            ValueError: It cannot be written there.
        """
        config = {
            "measured": [each.get_config() for each in self.measured],
            "environment": self.environment,
        }
        with replacing_directory(path, "saved_model.pb", "a SavedModel") as temporary:
            signatures = {"serve": self._program.named}
            tf.saved_model.save(self._program, str(temporary), signatures=signatures)
            file = temporary / _JSON
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(config, indent=1), encoding="utf-8")
        return pathlib.Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike, verbose: int = 1) -> "Compiled":
        """Read what `save` wrote and compile it, with the engines that were faster there.

        Args:
            path: The directory.
            verbose: Whether to show progress.

        Returns:
            A `Compiled`.

        Raises:
            FileNotFoundError: There is no such directory.
            ValueError: It was not written by `save`.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no directory {str(path)!r}.")
        if not (path / _JSON).is_file():
            raise ValueError(
                f"{str(path)!r} was not written by Compiled.save: it has no {str(_JSON)!r}. Pass "
                "the directory that tfcompress.acceleration.compile(model).save(path) wrote."
            )
        config = json.loads((path / _JSON).read_text(encoding="utf-8"))
        measured = [Measurement.from_config(each) for each in config["measured"]]
        _warn_of_another_machine(config["environment"])
        made = cls(tf.saved_model.load(str(path)), measured, config["environment"])
        made.warm_up(verbose)
        return made

    def __repr__(self):
        return f"Compiled({self.engines})"

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table("batch size", "graph ms", "XLA ms", "engine", "note")
        for each in self.measured:
            xla = "-" if each.xla_ms is None else f"{each.xla_ms:.3g}"
            table.add_row(str(each.batch_size), f"{each.graph_ms:.3g}", xla, each.engine, each.note)
        return table

    def _checked(self, flat: list, inputs) -> tuple[list[tf.Tensor], int]:
        if len(flat) != len(self._flat_specs):
            raise ValueError(f"Expected {_described(self._specs)}, got {_described(inputs)}.")
        tensors = [_tensor(value, spec) for value, spec in zip(flat, self._flat_specs, strict=True)]
        sizes = {tensor.shape[0] if tensor.shape.rank else None for tensor in tensors}
        fits = all(
            t.shape.is_compatible_with(s.shape)
            for t, s in zip(tensors, self._flat_specs, strict=True)
        )
        if not fits or len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                f"Expected {_described(self._specs)} with one example or more, got "
                f"{_described(inputs)}. To take other shapes, compile with inputs= such a batch."
            )
        return tensors, sizes.pop()

    def _in_parts(self, flat: list[tf.Tensor], size: int) -> list[tf.Tensor]:
        parts, start, results = self.parts(size), 0, []
        for engine, wanted in parts:
            taken = min(wanted, size - start)
            rows = [t[start : start + taken] for t in flat] if len(parts) > 1 else flat
            if engine == "graph":
                results.append(self._graph(*rows))
            else:
                padded = self._xla[wanted](*[_padded(t, wanted) for t in rows])
                results.append([t[:taken] for t in padded] if taken < wanted else padded)
            start += taken
        if len(results) == 1:
            return results[0]
        return [tf.concat(each, axis=0) for each in zip(*results, strict=True)]


def compile(
    model: keras.Model,
    batch_sizes: Sequence[int] = (1, 8, 32),
    inputs: Any = None,
    tolerance: float | None = None,
    timing: Timing | None = None,
    verbose: int = 1,
) -> Compiled:
    """Compile a model for inference, with XLA or TensorFlow's graph, whichever is faster here.

    Batch norms are folded and weights become constants. For each batch size, both engines are
    compared with the model and timed against each other; the faster one is kept. XLA makes small
    networks several times faster and can make a convolutional one 20 times slower.

    Args:
        model: A built model of any kind.
        batch_sizes: The batch sizes to compile for; others are padded to, or cut into, these.
        inputs: An example batch (or data, of which the first batch is used) to compare and time on;
            needed where the model leaves an axis besides the first open, since XLA compiles for
            fixed shapes. By default, normal floats and zeros for indices.
        tolerance: The largest difference to the model's outputs, relative to the largest of them.
            By default 1e-5, or 16 units in the last place of a lower precision that the model
            computes in.
        timing: Rounds of the measurement; its batch sizes play no part. By default, 11 rounds.
        verbose: Whether to show progress.

    Returns:
        A `Compiled`: call it as the model, `save` and `load` it; `print` it with `rich` for what
        was measured.

    Raises:
        ValueError: The model is not built or keeps state, the batch sizes are not whole numbers
            above 0, or its outputs for an example depend on the other examples of the batch.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> fast = compile(model, batch_sizes=(1, 8), timing=Timing(rounds=3), verbose=0)
    >>> x = np.ones((5, 4), "float32")
    >>> fast.batch_sizes, bool(np.allclose(fast(x), model(x), atol=1e-5))
    ((1, 8), True)
    """
    sizes = _check_sizes(batch_sizes)
    inputs = None if inputs is None else first_batch(inputs)
    flat = flattened(model, inputs)
    specs = input_specs(flat, inputs)
    batch = example_batch(specs, inputs)
    expected = _expected(flat, batch, max(sizes))
    allowed = _tolerance(flat) if tolerance is None else tolerance
    program, frozen = _right_program(flat, specs, batch, expected, allowed)
    measured = []
    for size in rich.progress.track(sizes, "Compiling and timing", disable=not verbose):
        measured.append(_measure(frozen, batch, size, expected, allowed, timing))
        _log.info("compile: %s, batch size %d: %s", model.name, size, measured[-1])
    made = Compiled(program, measured, _environment())
    made.warm_up(verbose=0)
    _check_independent(made, batch, expected, allowed)
    return made


def cheapest_parts(measured: Sequence[Measurement], size: int) -> tuple[tuple[str, int], ...]:
    """The parts that a batch is run in; see `Compiled.parts`.

    >>> measured = [Measurement(1, 1.0, 0.5), Measurement(8, 8.0, 2.0)]
    >>> cheapest_parts(measured, 9), cheapest_parts(measured, 6)
    ((('xla', 8), ('xla', 1)), (('xla', 8),))
    """
    exact = next((each for each in measured if each.batch_size == size), None)
    if exact is not None:
        return ((exact.engine, size),)
    compiled = [each for each in measured if each.engine == "xla"]
    if not compiled:
        return (("graph", size),)
    # Far above all sizes, the one with the most examples a millisecond is the one to repeat.
    bulk = min(compiled, key=lambda each: each.xla_ms / each.batch_size)
    times = max(0, (size - 4 * measured[-1].batch_size) // bulk.batch_size)
    rest = size - times * bulk.batch_size
    if times and _graph_ms(measured, size) < times * (bulk.xla_ms + _PART_MS):
        return (("graph", size),)
    return (("xla", bulk.batch_size),) * times + _cheapest(measured, compiled, rest)


def _cheapest(measured, compiled, size: int) -> tuple[tuple[str, int], ...]:
    """`best[n]`: cost and parts for n examples, from those for fewer; the graph ends a batch."""
    best: list[tuple[float, tuple]] = [(0.0, ())]
    for n in range(1, size + 1):
        choices = [(_graph_ms(measured, n), (("graph", n),))]
        for each in reversed(compiled):
            cost, parts = best[max(n - each.batch_size, 0)]
            cost += each.xla_ms + _PART_MS
            choices.append((cost, (("xla", each.batch_size), *parts)))
        best.append(min(choices, key=lambda choice: (choice[0], len(choice[1]))))
    return best[size][1]


def _graph_ms(measured, size: int) -> float:
    sizes = [each.batch_size for each in measured]
    if size > sizes[-1]:
        return measured[-1].graph_ms * size / sizes[-1]
    return float(np.interp(size, sizes, [each.graph_ms for each in measured]))


def _check_sizes(batch_sizes) -> list[int]:
    sizes = sorted(set(batch_sizes))
    if not sizes or any(size < 1 or size != int(size) for size in sizes):
        raise ValueError(
            f"batch_sizes must be whole numbers, 1 or more, got {tuple(batch_sizes)}; e.g. "
            "(1, 8, 32)."
        )
    return [int(size) for size in sizes]


def _expected(model, batch, size: int) -> list[np.ndarray]:
    """The outputs of the model for the example batch at the largest batch size."""
    tensors = keras.tree.map_structure(tf.convert_to_tensor, with_batch_size(batch, size))
    outputs = [np.asarray(x) for x in tf.nest.flatten(model(tensors, training=False))]
    if any(x.shape[:1] != (size,) for x in outputs):
        raise ValueError(
            f"{model.name!r} gives outputs of the shapes {[x.shape for x in outputs]} for {size} "
            "examples; the first axis of each must be that of the batch. Take the reduction over "
            "examples out of the model."
        )
    return outputs


def _tolerance(model) -> float:
    """Compute in bfloat16 and XLA rounds in other places than the graph."""
    finest = {"bfloat16": 2**-7, "float16": 2**-10}
    return max([1e-5, *(16 * finest.get(layer.compute_dtype, 0.0) for layer in all_layers(model))])


def _right_program(flat, specs, batch, expected, allowed):
    """The folded model, or the model as it is where folding costs more than the tolerance."""
    small = folded(flat)
    for model in [small] if small is flat else [small, flat]:
        program = Program(model, specs)
        frozen = Frozen.of(program.function)
        size = len(expected[0])
        found = frozen.compiled(None, jit=False)(*_tensors(frozen, batch, size))
        error = _error(found, expected)
        if error <= allowed:
            return program, frozen
        _log.info("compile: %s differs from the model by %.2g", model.name, error)
    raise ValueError(
        f"The frozen graph of {flat.name!r} differs from the model by {error:.2g} of its largest "
        f"output, and {allowed:.2g} is allowed. If the model draws random numbers in inference, it "
        "cannot be compiled; else pass a larger tolerance=."
    )


def _tensors(frozen: Frozen, batch, size: int) -> list[tf.Tensor]:
    leaves = tf.nest.flatten(with_batch_size(batch, size))
    specs = tf.nest.flatten(frozen.specs)
    return [_tensor(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]


def _error(found, expected) -> float:
    """The largest difference over the largest output, over all outputs."""
    errors = [0.0]
    for actual, wanted in zip(found, expected, strict=True):
        actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
        scale = max(float(np.max(np.abs(wanted), initial=0.0)), 1e-6)
        errors.append(float(np.max(np.abs(actual - wanted[: len(actual)]), initial=0.0)) / scale)
    return float(np.max(errors))


def _measure(frozen, batch, size, expected, allowed, timing) -> Measurement:
    arguments = _tensors(frozen, batch, size)
    graph = functools.partial(frozen.compiled(None, jit=False), *arguments)
    calls, note = {"graph": graph}, ""
    try:
        xla = functools.partial(frozen.compiled(size, jit=True), *arguments)
        error = _error(xla(), expected)
        note = "" if error <= allowed else f"XLA differs from the model by {error:.2g}"
    except (tf.errors.OpError, ValueError) as reason:
        note = f"XLA cannot compile it: {str(reason).splitlines()[0][:200]}"
    if not note:
        calls["xla"] = xla
    return Measurement(size, **_timed(calls, timing), note=note)


def _timed(calls: dict[str, Callable], timing: Timing | None) -> dict[str, float]:
    """Median milliseconds by `graph_ms` and `xla_ms`, interleaved; the hopeless are run once."""
    once = {name: _fastest(call) for name, call in calls.items()}
    if once.get("xla", 0.0) > _HOPELESS * once["graph"]:
        return {f"{name}_ms": value for name, value in once.items()}
    found = latency(calls, timing or Timing(rounds=11))
    return {f"{name}_ms": each.median_ms for name, each in found.items()}


def _fastest(call: Callable) -> float:
    """The faster of two calls, the first of which may have to make something ready."""
    times = []
    for _ in itertools.repeat(None, 2):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def _check_independent(made: Compiled, batch, expected, allowed) -> None:
    """Padding and cutting are right only where an example does not see the others."""
    size = len(expected[0])
    for part in {1, max(size - 1, 1)}:
        rows = with_batch_size(batch, size)
        rows = keras.tree.map_structure(lambda x, part=part: x[:part], rows)
        error = _error(tf.nest.flatten(made(rows)), expected)
        if error > allowed:
            raise ValueError(
                f"What the model returns for an example changes by {error:.2g} with the other "
                "examples of its batch, so batches cannot be padded or cut. Use "
                "tf.function(model, jit_compile=True), or take the step over the batch out of the "
                "model."
            )


def _concrete(program):
    """The concrete function of a program, fresh or loaded."""
    made = getattr(program, "function", None)
    return made if made is not None else program.serve.concrete_functions[0]


def _zeros(specs, size: int) -> list[tf.Tensor]:
    return [tf.zeros((size, *spec.shape[1:]), spec.dtype) for spec in specs]


def _tensor(value, spec) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    return tensor if tensor.dtype == spec.dtype else tf.cast(tensor, spec.dtype)


def _padded(tensor: tf.Tensor, size: int) -> tf.Tensor:
    """Repeats the last example: zeros might be outside of what the model takes."""
    missing = size - tensor.shape[0]
    if not missing:
        return tensor
    return tf.concat([tensor, tf.repeat(tensor[-1:], missing, axis=0)], axis=0)


def _described(structure) -> str:
    shapes = tf.nest.map_structure(lambda x: str(tuple(np.shape(x))), structure)
    return str(shapes).replace("'(", "(").replace(")'", ")")


def _environment() -> dict[str, str]:
    devices = tf.config.list_logical_devices()
    return {
        "tensorflow": tf.__version__,
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "devices": ", ".join(sorted({device.device_type for device in devices})),
    }


def _warn_of_another_machine(environment) -> None:
    here = _environment()
    other = {key: value for key, value in environment.items() if here.get(key) != value}
    if other:
        _log.warning(
            "The engines were chosen elsewhere (%s; here %s). Compile the model here to have them "
            "measured here.",
            other,
            {key: here.get(key) for key in other},
        )
