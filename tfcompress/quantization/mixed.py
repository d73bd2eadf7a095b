"""Mixed precision: how much each layer minds being quantized, and the scheme that each gets."""

import contextlib
import dataclasses
import glob
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import rich.progress
import tensorflow as tf

from tfcompress.batches import calibration_batches, first_batch, input_batches, num_batches
from tfcompress.graph.expand import expand
from tfcompress.graph.macs import macs_by_weight
from tfcompress.keras_hooks import nodes, walk
from tfcompress.keras_hooks.overlay import Overlay, attach, original_layers
from tfcompress.keras_hooks.quantizer import activation_name, weight_axes
from tfcompress.keras_hooks.session import Session
from tfcompress.ops import fake_quant as fq
from tfcompress.ops import ranges
from tfcompress.ops.schemes import Scheme, activation_scheme, scheme_pair, weight_scheme
from tfcompress.quantization.assignment import Budget, Cost, search
from tfcompress.values import SavedValue, Value

logger = logging.getLogger("tfcompress")

# `"int4"`, `"w4a8"`, a Scheme of the weights, a pair of both, or None for float.
Spec = str | Scheme | tuple | None
Metric = Callable[[keras.Model, Any], float]

_FLOAT_BITS = 32


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Candidate(Value):
    """What may become of a layer: a scheme for its weights and one for what it multiplies them by.

    Args:
        weights: None to leave them float.
        activations: None to leave them as they are.

    Example:

    >>> [Candidate.of(spec).name for spec in ("int4", "w4a8", Scheme(3, symmetric=False), None)]
    ['int4', 'w4a8', 'int3-asymmetric', 'float32']
    """

    weights: Scheme | None
    activations: Scheme | None = None

    @classmethod
    def of(cls, spec: "Spec | Candidate") -> "Candidate":
        """Resolve what a user passes in `candidates`."""
        if isinstance(spec, Candidate):
            return spec
        if isinstance(spec, tuple) and len(spec) == 2:
            return cls(weight_scheme(spec[0]), activation_scheme(spec[1]))
        if isinstance(spec, str) and spec.startswith("w"):
            return cls(*scheme_pair(spec, "int8"))
        return cls(weight_scheme(spec))

    @property
    def name(self) -> str:
        """`"int4"`, `"w4a8"`, `"float32"`, with what is not as in these behind it."""
        weights, activations = self.weights, self.activations
        if activations is None:
            parts = [f"int{weights.bits}" if weights else "float32"]
        else:
            parts = [f"w{weights.bits if weights else _FLOAT_BITS}a{activations.bits}"]
        parts += _differences(weights, weight_scheme("int8"))
        parts += [f"a:{each}" for each in _differences(activations, activation_scheme("int8"))]
        return "-".join(parts)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Candidate":
        """The candidate that `get_config` described."""
        return cls(**{key: each and Scheme(**each) for key, each in config.items()})


def _differences(scheme: Scheme | None, usual: Scheme) -> list[str]:
    if scheme is None:
        return []
    found = []
    if scheme.granularity != usual.granularity:
        found.append(f"{scheme.granularity}{scheme.group_size or ''}")
    if scheme.symmetric != usual.symmetric:
        found.append("symmetric" if scheme.symmetric else "asymmetric")
    flags = {"power_of_two": scheme.power_of_two, "dynamic": scheme.dynamic}
    return found + [name for name, on in flags.items() if on]


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Sensitivities(SavedValue):
    """What quantizing a single layer does to a model, for each layer and candidate.

    Args:
        metric: `"mse"`, `"kl"`, or the name of the function that measured it.
        candidates: Name -> candidate.
        errors: Path of the layer's first weight -> name -> what is lost; 0 for nothing.
        members: The same paths -> all weights that get the same scheme: those of the layer, and of
            the layers that share one with it.

    Raises:
        ValueError: The parts do not fit together.

    Example:

    >>> found = Sensitivities(
    ...     "mse", {"int4": Candidate.of("int4")}, {"a/kernel": {"int4": 0.1}},
    ...     {"a/kernel": ("a/kernel",)})
    >>> found.schemes({"a/kernel": "int4"})["a/kernel"].bits
    4
    """

    metric: str
    candidates: dict[str, Candidate]
    errors: dict[str, dict[str, float]]
    members: dict[str, tuple[str, ...]]

    def __post_init__(self):
        names = {name for line in self.errors.values() for name in line}
        if not names or names - self.candidates.keys() or self.errors.keys() != self.members.keys():
            raise ValueError(
                "Sensitivities have an error for a path and a candidate at least, and members for "
                f"the same paths; got the errors {self.errors}, the members {self.members} and the "
                f"candidates {list(self.candidates)}."
            )

    def schemes(self, chosen: Mapping[str, str]) -> dict[str, Scheme | None]:
        """The schemes of an assignment, for `weights=` of `tfcompress.quantize`.

        Args:
            chosen: Path -> name, e.g. from `search`.

        Returns:
            Glob -> scheme of the weights, None for float; the glob is the path of one weight, with
            `*?[` escaped.
        """
        return {
            glob.escape(member): self.candidates[name].weights
            for path, name in chosen.items()
            for member in self.members[path]
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sensitivities":
        """The result that `get_config` described."""
        candidates = {k: Candidate.from_config(each) for k, each in config["candidates"].items()}
        members = {path: tuple(each) for path, each in config["members"].items()}
        return cls(**{**config, "candidates": candidates, "members": members})


def auto(
    model: keras.Model,
    data: Any,
    budget: Budget,
    candidates: Sequence[Spec] = ("int8", "int4"),
    activations: str | Scheme | None = "int8",
    metric: str | Metric = "auto",
    include=None,
    exclude=None,
    fixed: Mapping[str, Spec] | None = None,
    verbose: int = 1,
) -> dict[str, Scheme | None]:
    """The scheme of each weight that loses least within a budget.

    Args:
        model: A built model that `tfcompress.expand` takes.
        data: Inputs as the model gets them, some hundred; see `sensitivities`.
        budget: The limits. Weights that are left out count as float32.
        candidates: See `sensitivities`. Those that name activations name `activations`.
        activations: What `tfcompress.quantize` will be told.
        metric: See `sensitivities`.
        include: Glob or globs over `variable.path` of `model`; None for every kernel and embedding.
        exclude: Glob or globs to leave out.
        fixed: Glob -> the one candidate of what it matches.
        verbose: Whether to show a progress bar.

    Returns:
        Glob -> scheme, for `weights=` of `tfcompress.quantize`; see `Sensitivities.schemes`. What
        is left out has no entry.

    Raises:
        ValueError: As in `sensitivities` and `search`, or candidates with other activations.
        ImportError: scipy is missing.

    Example:

    >>> layers = [keras.Input((64,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8)]
    >>> model = keras.Sequential(layers, name="model")
    >>> schemes = auto(model, np.eye(64), Budget(size=0.2), verbose=0)
    >>> schemes["model/a/kernel"].bits
    4

    Reference: Yao et al. 2020 (HAWQ-V3), https://arxiv.org/abs/2011.10680, with measured errors
    in place of second derivatives.
    """
    all_specs = [*_candidates(candidates).values(), *(fixed or {}).values()]
    named = {each.activations for each in map(Candidate.of, all_specs)} - {None}
    if named - {activation_scheme(activations)}:
        raise ValueError(
            f"The candidates name {named} for activations, but tfcompress.quantize has one scheme "
            f"for all, here activations={activations!r}. Pass the same in both, e.g. "
            'activations="int4" with candidates=("w8a4", "w4a4").'
        )
    batch, data = _peek(data) if "bops" in budget.kinds else (None, data)
    unmeasured = _unmeasured(_units(model, expand(model), include, exclude), candidates, fixed)
    cost = costs(model, unmeasured, budget, batch, activations)
    search(unmeasured.errors, cost, budget)  # Raises at once if the budget cannot be kept.
    found = sensitivities(
        model, data, candidates, metric, include, exclude, fixed=fixed, verbose=verbose
    )
    chosen = search(found.errors, cost, budget)
    logger.info("Chose %s", chosen)
    return found.schemes(chosen)


def sensitivities(
    model: keras.Model,
    data: Any,
    candidates: Sequence[Spec] = ("int8", "int4"),
    metric: str | Metric = "auto",
    include=None,
    exclude=None,
    fixed: Mapping[str, Spec] | None = None,
    verbose: int = 1,
) -> Sensitivities:
    """Measure what a model loses when a single layer is quantized, for each layer and candidate.

    The data is streamed once; each batch takes a forward pass for each layer and candidate, in one
    traced function. The weights of one layer at a time are set to their grid, and get their values
    back to the last bit, also when an error or Ctrl-C ends the measurement. Activations, where a
    candidate names them, are rounded where the layer reads them, on the range that the batch has.

    Args:
        model: A built model that `tfcompress.expand` takes.
        data: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator; some hundred.
            A function as `metric` gets it as it is.
        candidates: `"int2"` to `"int8"` or a `Scheme` for the weights alone, `"w4a8"` or a pair of
            schemes for the activations too, None for float. Layers must choose among these.
        metric: `"mse"`, the squared error of the outputs over their power; `"kl"`, the divergence
            of probabilities, in nats an example; `"auto"`, `"kl"` where all outputs come from a
            softmax. Or a function (model, data) -> float, lower being better, of which the increase
            is taken; the model is this one, with the layer quantized.
        include: Glob or globs over `variable.path` of `model`; None for every kernel and embedding.
        exclude: Glob or globs to leave out.
        fixed: Glob -> the one candidate of the layers with a weight that it matches.
        verbose: Whether to show a progress bar.

    Returns:
        The `Sensitivities`.

    Raises:
        ValueError: Candidates, a metric or data that are none of these, a glob that matches
            nothing, no batch, or outputs that are not finite.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3, name="head")]
    >>> found = sensitivities(keras.Sequential(layers, name="model"), np.eye(4), verbose=0)
    >>> errors = found.errors["model/head/kernel"]
    >>> 0 < errors["int8"] < errors["int4"]
    True
    """
    flat = expand(model)
    units = _units(model, flat, include, exclude)
    unmeasured, metric = _unmeasured(units, candidates, fixed), _metric(metric, flat)
    pairs = [(path, name) for path, line in unmeasured.errors.items() for name in line]
    with _Quantizer(model, units, unmeasured.candidates) as quantizer:
        measure = _increases if callable(metric) else _distances
        values = measure(model, data, metric, pairs, quantizer, verbose)
    errors: dict[str, dict[str, float]] = {path: {} for path in units}
    for (path, name), value in zip(pairs, values, strict=True):
        errors[path][name] = _finite(value, path, name)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", str(metric))
    return dataclasses.replace(unmeasured, metric=name, errors=errors)


def costs(
    model: keras.Model,
    found: Sensitivities,
    budget: Budget,
    batch: Any = None,
    activations: str | Scheme | None = "int8",
) -> dict[str, Cost]:
    """What each candidate costs each layer, in all that a budget limits.

    Args:
        model: The model that was measured.
        found: Its sensitivities.
        budget: The limits.
        batch: A batch of inputs, for bit operations; only its shapes and types matter.
        activations: The scheme of activations of candidates that name none; None for float.

    Returns:
        `"size"`, `"bops"`, `"latency"`, as far as they are limited -> `Cost`.

    Raises:
        ValueError: The operations of the model cannot be counted, or a latency is missing.

    Example:

    >>> layers = [keras.Input((4,)), keras.layers.Dense(3, name="head")]
    >>> model = keras.Sequential(layers, name="model")
    >>> found = sensitivities(model, np.eye(4), ["int4"], verbose=0)
    >>> costs(model, found, Budget(size=0.5))["size"]  # 12 half bytes, 3 scales; 3 biases
    Cost(table={'model/head/kernel': {'int4': 18.0}}, rest=12.0, full=60.0)
    """
    make = {
        "size": lambda: _sizes(model, found),
        "bops": lambda: _bit_operations(model, found, batch, activation_scheme(activations)),
        "latency": lambda: Cost(_table(found, _latency(budget.latencies))),
    }
    return {kind: make[kind]() for kind in budget.kinds}


@dataclasses.dataclass(frozen=True, eq=False)
class _Unit:
    """Weights that get the same scheme, and the layers that multiply by them.

    Args:
        weights: Path -> variable, and the axes that share a scale.
        layers: Layers of the model.
    """

    weights: dict[str, tuple[keras.Variable, tuple[int, ...]]]
    layers: tuple[keras.layers.Layer, ...]

    def joined(self, other: "_Unit") -> "_Unit":
        return _Unit({**self.weights, **other.weights}, (*self.layers, *other.layers))


def _units(model, flat, include, exclude) -> dict[str, _Unit]:
    """What is chosen for together, by the path of its first weight."""
    named = walk.named_variables(model)
    include, exclude = walk.as_globs(include), walk.as_globs(exclude)
    walk.check_globs([*(include or ()), *(exclude or ())], named)
    paths = {
        id(variable): path
        for path, variable in named.items()
        if (include is None or walk.matches(path, include))
        and not (exclude and walk.matches(path, exclude))
    }
    original = original_layers(model)
    units: list[_Unit] = []
    for layer in flat.layers:
        found = {paths[id(v)]: (v, axes) for v, axes in weight_axes(layer) if id(v) in paths}
        if not found:
            continue
        unit = _Unit(found, (original(layer) or layer,))
        shared = [each for each in units if each.weights.keys() & found.keys()]
        units = [each for each in units if each not in shared]
        for each in reversed(shared):
            unit = each.joined(unit)
        units.append(unit)
    if not units:
        raise ValueError(
            f"The model {model.name!r} has no weight to quantize among {list(named)}, with "
            f"include={include} and exclude={exclude}. Expected a kernel or an embedding."
        )
    return {next(iter(unit.weights)): unit for unit in units}


def _candidates(specs: Sequence[Spec]) -> dict[str, Candidate]:
    if isinstance(specs, str) or not specs:
        raise ValueError(f'candidates must be a sequence such as ("int8", "int4"), got {specs!r}.')
    found = {each.name: each for each in map(Candidate.of, specs)}
    if len(found) < len(specs):
        raise ValueError(f"candidates={specs!r} has the same scheme twice: {list(found)}.")
    return found


def _fixed(fixed: Mapping[str, Spec] | None, units) -> dict[str, Candidate]:
    walk.check_globs(list(fixed or ()), [path for unit in units.values() for path in unit.weights])
    return {glob: Candidate.of(spec) for glob, spec in (fixed or {}).items()}


def _unmeasured(units: Mapping[str, _Unit], candidates, fixed) -> Sensitivities:
    """What there is to choose from, with errors of 0."""
    free, fixed = _candidates(candidates), _fixed(fixed, units)
    choices = {path: _only(unit, fixed) or free for path, unit in units.items()}
    return Sensitivities(
        metric="none",
        candidates={name: each for line in choices.values() for name, each in line.items()},
        errors={path: dict.fromkeys(line, 0.0) for path, line in choices.items()},
        members={path: tuple(unit.weights) for path, unit in units.items()},
    )


def _only(unit: _Unit, fixed: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """The candidate that `fixed` has for a unit, by its name; empty if none."""
    found = {walk.first_match(path, fixed) for path in unit.weights} - {None}
    if len(found) > 1:
        raise ValueError(
            f"fixed has several schemes for {list(unit.weights)}, which are of one layer or of "
            f"layers that share one: {sorted(each.name for each in found)}. Pass one for all."
        )
    return {each.name: each for each in found}


def _metric(metric: str | Metric, flat: keras.Model) -> str | Metric:
    if callable(metric) or metric in ("mse", "kl"):
        return metric
    if metric != "auto":
        raise ValueError(
            'metric must be "auto", "mse", "kl" or a function (model, data) -> float, got '
            f"{metric!r}."
        )
    return "kl" if all(map(_is_softmax, flat.outputs)) else "mse"


def _is_softmax(output: keras.KerasTensor) -> bool:
    operation = nodes.producer(output).operation
    if isinstance(operation, keras.layers.Layer):
        return activation_name(operation) == "softmax"
    return type(operation).__name__ == "Softmax"


class _Quantizer(contextlib.ExitStack):
    """Sets one layer at a time to its grid; what is quantized is data, so nothing is retraced."""

    def __init__(self, model, units: Mapping[str, _Unit], candidates: Mapping[str, Candidate]):
        super().__init__()
        self.units, self.candidates = units, candidates
        schemes = {each.activations: None for each in candidates.values()}
        self.schemes = [scheme for scheme in schemes if scheme is not None]
        # 0 for none of the schemes.
        self.rounding = {path: tf.Variable(0, trainable=False) for path in units}
        if self.schemes:
            session = Session(model)
            self.callback(session.close)
            for path, unit in units.items():
                for layer in unit.layers:
                    session.defer(attach(layer, self._overlay(path)))

    @contextlib.contextmanager
    def quantized(self, path: str, name: str) -> Iterator[None]:
        """The layer of `path` as the candidate, for the length of a `with` block."""
        candidate = self.candidates[name]
        weights = self.units[path].weights.values() if candidate.weights else ()
        originals = [(variable, tf.identity(variable.value)) for variable, _ in weights]
        try:
            for variable, axes in weights:
                w = tf.convert_to_tensor(variable.value)
                variable.assign(fq.fake_quant_weights(w, candidate.weights, axes))
            if candidate.activations is not None:
                self.rounding[path].assign(self.schemes.index(candidate.activations) + 1)
            yield
        finally:
            for variable, value in originals:
                variable.assign(value)
            self.rounding[path].assign(0)

    def _overlay(self, path) -> Overlay:
        def read(x):
            rounded = [lambda scheme=scheme: _rounded(x, scheme) for scheme in self.schemes]
            taken = tf.convert_to_tensor(self.rounding[path])
            return tf.switch_case(taken, [lambda: tf.identity(x), *rounded])

        return Overlay(inputs=[read])


def _rounded(x, scheme: Scheme):
    if scheme.dynamic:
        return fq.fake_quant_dynamic(x, scheme)
    return fq.fake_quant_activations(x, ranges.extremes(x), scheme)


def _increases(model, data, metric: Metric, pairs, quantizer, verbose) -> list[float]:
    """How much a user's metric rises."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"metric={metric!r} reads the data once for each layer and candidate, but {data!r} can "
            "be read once; pass arrays, a tf.data.Dataset or a list of batches."
        )
    baseline = float(metric(model, data))
    values = []
    for path, name in rich.progress.track(pairs, "Sensitivities", disable=not verbose):
        with quantizer.quantized(path, name):
            values.append(float(metric(model, data)) - baseline)
    return values


def _distances(model, data, metric: str, pairs, quantizer, verbose) -> np.ndarray:
    """How far the outputs move, over all data: an error for each pair."""
    distance, unit = _DISTANCES[metric]
    outputs = tf.function(lambda x: _outputs(model(x, training=False)), reduce_retracing=True)
    distances = tf.function(lambda a, b: tf.stack(list(map(distance, a, b))), reduce_retracing=True)
    moved, whole = 0.0, 0.0
    bar = rich.progress.Progress(disable=not verbose)
    with bar:
        length = num_batches(data)
        total = None if length is None else length * len(pairs)
        task = bar.add_task("Sensitivities", total=total)
        for batch in calibration_batches(model, data):
            inputs = keras.tree.map_structure(_finite_tensor, batch)
            expected = outputs(inputs)
            found = []
            for path, name in pairs:
                with quantizer.quantized(path, name):
                    found.append(distances(expected, outputs(inputs)).numpy())
                bar.advance(task)
            moved = moved + np.array(found)
            whole = whole + np.array([float(unit(each)) for each in expected])
    if not np.all(whole):
        raise ValueError(
            "An output of the model is 0 for all of the data, which nothing can be compared with; "
            "pass some hundred inputs."
        )
    return np.mean(moved / whole, axis=-1)


def _outputs(structure) -> list:
    found = [x for x in keras.tree.flatten(structure) if keras.backend.is_float_dtype(x.dtype)]
    if not found:
        raise ValueError("The model has no floating-point output; pass a function as metric.")
    return [tf.cast(x, tf.float64) for x in found]


def _squared_error(expected, found):
    return tf.reduce_sum(tf.square(found - expected))


def _power(expected):
    return tf.reduce_sum(tf.square(expected))


def _divergence(expected, found):
    # The last two terms add up to 0, and keep every summand above 0 where the logarithms cancel.
    ratio = tf.math.log(tf.maximum(expected, 1e-12) / tf.maximum(found, 1e-12))
    return tf.reduce_sum(expected * ratio - expected + found)


def _num_distributions(expected):
    return tf.size(expected) // tf.shape(expected)[-1]


_DISTANCES = {"mse": (_squared_error, _power), "kl": (_divergence, _num_distributions)}


def _finite_tensor(array) -> tf.Tensor:
    # ReLU turns NaN into 0 on some processors, so that it would not be seen in the outputs.
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError(
            f"The data holds NaN or infinity, in a batch of shape {array.shape}. Clean it, or "
            "leave these examples out."
        )
    return tf.convert_to_tensor(array)


def _finite(value, path: str, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"The error with {path!r} as {name!r} is {value}. Check the data and the weights, or "
            f"pass exclude={path!r}."
        )
    return float(value)


def _peek(data) -> tuple[Any, Any]:
    """The first batch of inputs, and data that still has it."""
    if not isinstance(data, Iterator):
        return first_batch(data), data
    batches = input_batches(data)
    first = first_batch(batches)
    return first, _Chained(first, batches)


class _Chained:
    """Batches of inputs, the first of which was read already."""

    def __init__(self, first, rest):
        self.first, self.rest = first, rest

    def __iter__(self):
        yield self.first
        yield from self.rest


def _table(found: Sensitivities, cost: Callable[[str, str], float]) -> dict[str, dict[str, float]]:
    return {
        path: {name: float(cost(path, name)) for name in line}
        for path, line in found.errors.items()
    }


def _sizes(model, found: Sensitivities) -> Cost:
    axes = {id(variable): axes for variable, axes in weight_axes(model)}
    named = walk.named_variables(model)
    chosen = {member for members in found.members.values() for member in members}

    def size(path, name):
        scheme = found.candidates[name].weights
        variables = [named[member] for member in found.members[path]]
        return sum(_num_bytes(tuple(v.shape), scheme, axes[id(v)]) for v in variables)

    floats = {path: 4.0 * math.prod(variable.shape) for path, variable in named.items()}
    rest = sum(size for path, size in floats.items() if path not in chosen)
    return Cost(_table(found, size), rest, sum(floats.values()))


def _num_bytes(shape: tuple[int, ...], scheme: Scheme | None, axes: tuple[int, ...]) -> float:
    """Bytes of packed integers and of what maps them to real numbers.

    >>> _num_bytes((64, 3), Scheme(4, granularity="group", group_size=32), (0,))
    120
    """
    if scheme is None:
        return 4 * math.prod(shape)
    num_scales = 1
    if scheme.granularity != "tensor":
        num_scales = math.prod(n for axis, n in enumerate(shape) if axis not in axes)
    if scheme.granularity == "group":
        num_scales *= math.ceil(shape[axes[-1]] / scheme.group_size)
    parts = 1 if scheme.symmetric else 2
    return math.ceil(math.prod(shape) * scheme.bits / 8) + 4 * parts * num_scales


def _bit_operations(model, found: Sensitivities, batch, activations: Scheme | None) -> Cost:
    if batch is None:
        raise ValueError("Bit operations are counted from the shapes of a batch; pass batch=.")
    macs = macs_by_weight(model, batch)
    if macs is None:
        raise ValueError(
            f"The operations of {model.name!r} cannot be counted, as a shape in its graph is not "
            "known; pass a Budget without bops."
        )

    def bops(path, name):
        candidate = found.candidates[name]
        reads = candidate.activations or activations
        number = sum(macs.get(member, 0) for member in found.members[path])
        return number * _bits(candidate.weights) * _bits(reads)

    chosen = {member for members in found.members.values() for member in members}
    rest = sum(
        number * (_bits(activations) ** 2 if path is None else _FLOAT_BITS**2)
        for path, number in macs.items()
        if path not in chosen
    )
    return Cost(_table(found, bops), float(rest), float(sum(macs.values()) * _FLOAT_BITS**2))


def _bits(scheme: Scheme | None) -> int:
    return _FLOAT_BITS if scheme is None else scheme.bits


def _latency(latencies) -> Callable[[str, str], float]:
    if callable(latencies):
        return latencies

    def look_up(path, name):
        known = latencies.get(path, {})
        if name not in known:
            raise ValueError(
                f"latencies has no time of {path!r} as {name!r}; it has {dict(latencies)}."
            )
        return known[name]

    return look_up
