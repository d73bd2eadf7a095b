"""Low rank: layers become sequences of smaller ones, in the graph of a model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import rich.progress

from tfcompress.batches import calibration_batches
from tfcompress.graph.expand import expand
from tfcompress.graph.factored_layers import (
    Shapes,
    Stage,
    decomposed_kernel,
    kernel_of,
    methods_for,
    obstacle,
    positions,
    stages,
)
from tfcompress.graph.inputs import (
    repeatable,
    watch_calls,
)
from tfcompress.graph.low_rank import METHODS
from tfcompress.graph.macs import macs, zero_example
from tfcompress.graph.rank_choice import Option, by_energy, by_ratio, share_out
from tfcompress.graph.rebuild import Uses, finalize, replay
from tfcompress.graph.whitening import Moments
from tfcompress.keras_hooks import nodes
from tfcompress.keras_hooks.walk import group_by_glob, select_kernels

_log = logging.getLogger("tfcompress")


def factorize(
    model: keras.Model,
    energy: float | None = None,
    ratio: float | Mapping[str, float] | None = None,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    calibration: Any = None,
    method: str = "auto",
    include=None,
    exclude=None,
    verbose: int = 1,
) -> keras.Model:
    """Replace layers by products of smaller ones: low rank.

    A kernel `W` becomes `A B`, and its layer two: `<layer>_in` with `A`, `<layer>_out` with `B`,
    the bias and the activation. The product loses the least of the energy `||W||^2`; with
    `calibration`, of `||X W||^2`, where `X` are the inputs that reach the layer, which costs less
    accuracy. Exactly one of `energy`, `ratio` and the two targets says how small the factors are.

    * `Dense` and `EinsumDense`: two of the same kind.
    * `Conv2D`: of `method` `"svd"` the kernel to fewer channels, then 1x1; `"spatial"` k x 1, then
      1 x k; `"tucker"` 1x1, the kernel on fewer channels, 1x1. `"auto"` takes the best for each.
    * `Embedding`: a narrow one and a `Dense`, as in ALBERT. Calibration counts the tokens.

    A layer stays as it is, if no product that is good enough has fewer parameters, if it is
    grouped, frozen or quantized, or if its weight is tied to another layer; the logger "tfcompress"
    says so by name, with the reason, and with the rank of the others (INFO). A shared layer is
    factorized once, for all its calls. What the model calculates with float32 at full rank is equal
    to rounding; fine-tune at lower ones.

    Time: some eigenvalue problems of the narrower side of each kernel; with calibration a pass over
    the data, and `inputs^3` for each convolution. Memory beside the model: a batch in it, the new
    model, and about 1 GB (or one layer's `inputs^2`) of second moments; where all of them do not
    fit, there are more passes.

    Args:
        model: Any built model; see `tfcompress.expand`. It is not touched.
        energy: Share of the energy that each layer keeps, in (0, 1]; 0.9 is a start.
        ratio: Share of the parameters of each kernel that is removed, in (0, 1), except of output
            layers, which few outputs make fragile; or `{glob over variable.path: ratio}`, of which
            the first match counts, for the kernels that it names.
        target_parameters: The largest number of parameters of the new model, biases and all. The
            ranks share it out so that the sum of the relative errors of the layers is small.
        target_macs: The same for multiply-accumulates of one example, see
            `tfcompress.measure.macs`.
        calibration: Inputs as the model gets them: arrays, a `tf.data.Dataset`, a generator; some
            hundred examples, of more positions than a layer has inputs. None to weigh all inputs
            alike.
        method: For convolutions larger than 1x1, see above.
        include: Glob or globs over `variable.path`, None for all kernels and embeddings.
        exclude: Glob or globs to leave out.
        verbose: Whether to show progress.

    Returns:
        A new flat Functional model with weights of its own, of plain Keras layers.

    Raises:
        ValueError: Not exactly one target is given, one is out of range or cannot be reached, a
            glob matches nothing, weights or calibration data are NaN or infinite, or `model` cannot
            be expanded.

    Example:

    >>> layers = [keras.layers.Dense(64, name="wide"), keras.layers.Dense(2, name="head")]
    >>> model = keras.Sequential([keras.Input((64,)), *layers])
    >>> small = factorize(model, ratio=0.75, verbose=0)
    >>> [(layer.name, tuple(layer.kernel.shape)) for layer in small.layers[1:]]
    [('wide_in', (64, 8)), ('wide_out', (8, 64)), ('head', (64, 2))]

    References: Wang et al. 2024, "SVD-LLM", https://arxiv.org/abs/2403.07378; Kim et al. 2016,
    https://arxiv.org/abs/1511.06530 (Tucker); Jaderberg et al. 2014,
    https://arxiv.org/abs/1405.3866 (spatial); Lan et al. 2020, https://arxiv.org/abs/1909.11942
    (embeddings).
    """
    goal = _Goal(energy, ratio, target_parameters, target_macs)
    if method not in ("auto", *METHODS):
        raise ValueError(f"method must be one of {['auto', *METHODS]}, got {method!r}.")
    selected, skipped = select_kernels(model, include, exclude)
    flat = expand(model)
    if calibration is not None:
        calibration = repeatable(calibration)
    kernels = _decomposable(flat, selected, skipped)
    if ratio is not None:
        ratios = _ratios(flat, kernels, ratio, list(selected))
        kernels = [kernel for kernel in kernels if kernel.path in ratios]
    layers = {kernel.path: kernel.layer for kernel in kernels}
    work = _Work(kernels, method, Moments(flat, layers, calibration, verbose), verbose)
    shared = _shared_out(goal, flat, work, calibration) if energy is ratio is None else {}

    def choose(kernel: _Kernel, options: list[Option]) -> Option | None:
        if energy is not None:
            return by_energy(options, energy)
        if ratio is not None:
            return by_ratio(options, kernel.size, ratios[kernel.path])
        return shared[kernel.path]

    parts: dict[int, list[Stage]] = {}
    names = _Names(flat)
    for kernel, options, found in work.decompositions("Factors"):
        chosen = choose(kernel, options)
        if chosen is None or chosen.method is None:
            _log.info("factorize: %s stays: %s", kernel.path, goal.reason(options))
            continue
        factors = found[chosen.method].factors(*chosen.ranks)
        parts[id(kernel.layer)] = stages(
            kernel.layer, chosen.method, factors, functools.partial(names.new, kernel.layer.name)
        )
        _log.info("factorize: %s %s", kernel.path, _described(kernel, chosen))
    if not parts:
        _log.warning("factorize: no layer of %r became smaller", model.name)
    return _rebuilt(flat, parts)


@dataclasses.dataclass(frozen=True)
class _Goal:
    """The arguments that say how small, checked."""

    energy: float | None
    ratio: Any
    target_parameters: int | None
    target_macs: int | None

    def __post_init__(self):
        given = {key: value for key, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"factorize needs exactly one of energy, ratio, target_parameters and target_macs, "
                f"got {given or 'none'}; e.g. energy=0.9."
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(
                f"energy must be in (0, 1], got {self.energy}. It is the share of the squared "
                "singular values that each layer keeps, e.g. 0.9."
            )
        if self.ratio is not None:
            _check_ratios(self.ratio)
        for key in ("target_parameters", "target_macs"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}.")

    def reason(self, options: list[Option]) -> str:
        """Why none of the smaller products was chosen."""
        if not options:
            return "no product of it has fewer parameters"
        least = min(each.error for each in options)
        if self.energy is not None:
            return (
                f"no product with fewer parameters keeps {self.energy:g} of the energy, "
                f"the best keeps {1 - least:.3g}"
            )
        if self.ratio is not None:
            return "rank 1 has more parameters than ratio leaves"
        return "it is worth most as it is"


def _check_ratios(ratio) -> None:
    if isinstance(ratio, Mapping) and not ratio:
        raise ValueError("ratio is an empty dict; expected {glob: ratio}, e.g. {'*dense*': 0.5}.")
    for each in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
        if not 0 < each < 1:
            raise ValueError(
                f"ratio must be in (0, 1), got {each}. It is the share of each kernel's parameters "
                "that is removed, e.g. 0.5."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernel:
    """What is decomposed: the layer in the flat graph, and the path of its kernel in the model."""

    layer: keras.layers.Layer
    path: str

    @property
    def size(self) -> int:
        return int(np.prod(kernel_of(self.layer).shape))


def _decomposable(flat, selected, skipped) -> list[_Kernel]:
    """The layers that can be factorized; logs every other one that was asked for."""
    for path, reason in skipped.items():
        if not reason.startswith("not a kernel"):
            _log.info("factorize: %s stays: %s", path, reason)
    owners = collections.defaultdict(list)
    for layer in flat.layers:
        for variable in layer.weights:
            owners[id(variable)].append(layer)
    uses = Uses(flat)
    kernels = []
    for path, variable in selected.items():
        reason = _reason_to_stay(variable, owners[id(variable)], uses)
        if reason is None:
            kernels.append(_Kernel(owners[id(variable)][0], path))
        else:
            _log.info("factorize: %s stays: %s", path, reason)
    return kernels


def _reason_to_stay(variable, owners, uses: Uses) -> str | None:
    if not owners:
        return "no output of the model depends on it"
    if len(owners) > 1:
        return f"it is tied: {', '.join(layer.name for layer in owners)} have it"
    layer = owners[0]
    reason = obstacle(layer)
    if reason is None and kernel_of(layer) is not variable:
        reason = f"it is not the kernel of {layer.name}"
    if reason is None and _reads_whole_table(layer, uses):
        reason = "it is tied: all of its rows are read as a matrix"
    if reason is None and not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
        raise ValueError(f"{variable.path!r} holds NaN or infinity; factorize a trained model.")
    return reason


def _reads_whole_table(layer, uses: Uses) -> bool:
    """Whether the model computes with the table itself: `expand` looks up `arange(rows)` then."""
    if not isinstance(layer, keras.layers.Embedding):
        return False
    calls = [call for call in uses.calls if call.operation is layer]
    return any(call.inputs[0].shape == (layer.input_dim,) for call in calls)


def _ratios(flat, kernels: list[_Kernel], ratio, paths: list[str]) -> dict[str, float]:
    """The ratio of each kernel that has one, by path; logs the others."""
    if isinstance(ratio, Mapping):
        matched = group_by_glob(ratio, paths).items()
        ratios = {path: ratio[glob] for glob, found in matched for path in found}
        reason = "no glob of ratio matches it"
    else:
        whole = _output_layers(flat)
        ratios = {each.path: ratio for each in kernels if id(each.layer) not in whole}
        reason = "it is an output layer, which a ratio for all leaves whole: use {glob: ratio}"
    for kernel in kernels:
        if kernel.path not in ratios:
            _log.info("factorize: %s stays: %s", kernel.path, reason)
    return ratios


def _output_layers(flat) -> set[int]:
    """The ids of the layers that make the outputs of the model, behind which all is element-wise.

    A layer whose output is added to something is none, or all of a residual network would be.
    """
    producers, found = Uses(flat).producers, set()
    for tensor in flat.outputs:
        call = producers.get(id(tensor))
        while call is not None and len(call.inputs) == 1 and obstacle(call.operation):
            call = producers.get(id(call.inputs[0]))
        if call is not None:
            found.add(id(call.operation))
    return found


class _Work:
    """The kernels with their decompositions, which are too large to be kept."""

    def __init__(self, kernels: list[_Kernel], method: str, moments: Moments, verbose: int):
        self.kernels = kernels
        self.calls: Mapping[str, list[Shapes]] | None = None
        self._method = method
        self._moments = moments
        self._verbose = verbose

    def decompositions(self, title: str) -> Iterator[tuple[_Kernel, list[Option], dict]]:
        """`(kernel, what is smaller, {method: decomposition})`, with a progress bar."""
        for kernel in rich.progress.track(self.kernels, title, disable=not self._verbose):
            value, moment = decomposed_kernel(kernel.layer), self._moments.of(kernel.path)
            methods = methods_for(kernel.layer, self._method)
            found = {method: METHODS[method](value, moment) for method in methods}
            yield kernel, self._smaller(kernel, value.shape, found), found

    def whole(self, kernel: _Kernel) -> Option:
        """The kernel as it is."""
        macs = self._macs(kernel, None, np.array([[kernel.size]]))
        return Option(None, (), kernel.size, int(macs[0]), 0.0)

    def _smaller(self, kernel, shape, found) -> list[Option]:
        options = []
        for method, each in found.items():
            sizes = each.sizes(shape, each.ranks)
            rows = zip(
                each.ranks.tolist(),
                sizes.sum(axis=1).tolist(),
                self._macs(kernel, method, sizes).tolist(),
                each.errors.tolist(),
                strict=True,
            )
            options += [Option(method, tuple(row[0]), *row[1:]) for row in rows]
        return [option for option in options if option.parameters < kernel.size]

    def _macs(self, kernel, method, sizes) -> np.ndarray:
        if self.calls is None:
            return np.zeros(len(sizes), int)
        return sizes @ np.array(positions(kernel.layer, method, self.calls[kernel.path]))


def _shared_out(goal: _Goal, flat, work: _Work, calibration) -> dict[str, Option]:
    if goal.target_macs is None:
        cost, target, total = "parameters", goal.target_parameters, flat.count_params()
    else:
        example = _example(flat, calibration)
        cost, target, total = "macs", goal.target_macs, macs(flat, example)
        if total is None:
            raise ValueError(
                f"The MACs of {flat.name!r} are not known, see the warning; use target_parameters."
            )
        work.calls = _shapes_of_calls(flat, work.kernels, example)
    options = {
        kernel.path: [work.whole(kernel), *smaller]
        for kernel, smaller, _ in work.decompositions("Singular values")
    }
    others = total - sum(getattr(each[0], cost) for each in options.values())
    try:
        return share_out(options, cost, target - others)
    except ValueError as error:
        least = others + sum(min(getattr(x, cost) for x in each) for each in options.values())
        raise ValueError(
            f"target_{cost}={target} is out of reach: at rank 1 everywhere {flat.name!r} still has "
            f"{least}, and now {total}. Ask for more, or leave fewer layers out."
        ) from error


def _example(flat, calibration):
    """A batch of one example, to see shapes in."""
    if calibration is not None:
        batch = next(calibration_batches(flat, calibration))
        return keras.tree.map_structure(lambda x: x[:1], batch)
    return zero_example(flat, "Pass calibration data, whose first example counts.")


def _shapes_of_calls(flat, kernels: list[_Kernel], example) -> dict[str, list[Shapes]]:
    calls = collections.defaultdict(list)

    def told(path, call):
        inputs = call.args[0] if call.args else call.kwargs["inputs"]
        calls[path].append((tuple(inputs.shape), tuple(call.outputs.shape)))

    watch_calls(flat, {kernel.path: kernel.layer for kernel in kernels}, example, told)
    return calls


class _Names:
    """Names that no operation of a graph has."""

    def __init__(self, flat):
        self._taken = {operation.name for operation in flat.operations}

    def new(self, name: str, place: str) -> str:
        """`<name>_<place>`, numbered if need be."""
        base = name = f"{name}_{place}"
        for count in itertools.count(1):
            if name not in self._taken:
                break
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


def _described(kernel: _Kernel, option: Option) -> str:
    rank = "x".join(map(str, option.ranks))
    return (
        f"of rank {rank} ({option.method}): {kernel.size} -> {option.parameters} parameters, "
        f"keeps {1 - option.error:.4f} of the energy"
    )


def _rebuilt(flat: keras.Model, parts: Mapping[int, list[Stage]]) -> keras.Model:
    """The graph with new layers, some of them in parts, and the weights of the old ones."""
    copies: dict[int, keras.Operation] = {}

    def call(node: nodes.Call, args: tuple, kwargs: dict) -> Any:
        key = id(node.operation)
        if key in parts:
            x = parts[key][0].layer(*args, **kwargs)
            for stage in parts[key][1:]:
                x = stage.layer(x)
            return x
        if key not in copies:
            copies[key] = _unbuilt(node.operation)
        return copies[key](*args, **kwargs)

    model = replay(flat, call)
    for layer in flat.layers:
        if id(layer) in parts:
            for stage in parts[id(layer)]:
                stage.store()
            if getattr(layer, "bias", None) is not None:
                parts[id(layer)][-1].layer.bias.assign(layer.bias)
        elif id(layer) in copies:
            copies[id(layer)].set_weights(layer.get_weights())
            finalize(copies[id(layer)])
    return model


def _unbuilt(operation: keras.Operation) -> keras.Operation:
    if isinstance(operation, keras.layers.Layer):
        return type(operation).from_config(operation.get_config())
    return operation
