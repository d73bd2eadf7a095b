"""What a model or an exported file is and does, as one value that reports are made from."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfcompress.artefact import Artefact
from tfcompress.graph.macs import macs
from tfcompress.measure.accuracy import accuracy
from tfcompress.measure.forward import as_tensors, forward, max_abs_diff, with_batch_size
from tfcompress.measure.size import Weight, size, weights
from tfcompress.timing import Latency, Timing, latency

_BINS = 48


@dataclasses.dataclass(frozen=True)
class WeightProfile:
    """One weight: its zeros, and a histogram of its values (`counts` between `edges`)."""

    path: str
    shape: tuple[int, ...]
    params: int
    nonzeros: int
    counts: tuple[int, ...]
    edges: tuple[float, ...]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, in [0, 1]."""
        return 1.0 - self.nonzeros / self.params if self.params else 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """The measurements of one variant of one model; reports are made from these alone.

    Args:
        model: The model that variants are grouped by, e.g. `"mlp"`.
        variant: What was done to it; `"original"` is the one that others are compared with.
        tool: What ran it: `"keras"`, or the format of the file, e.g. `"litert"`.
        artefact: The name of the file; None for a Keras model.
        accuracy: Fraction of examples classified right, in [0, 1]; None without data.
        params: Numbers in all weights.
        nonzeros: Those that are not zero.
        bytes: Size of the file, or of the Keras model saved without optimizer.
        zipped_bytes: The same as a zip archive.
        macs: Multiply-accumulates for one example; None for a file.
        latency: Timings by batch size.
        max_abs_diff: Largest difference to the reference model's outputs; None without reference.
        layers: Every weight, in order.
        environment: The versions and the machine that the numbers come from.

    Example:

    >>> profile = Profile("mlp", "original", "keras", params=10, nonzeros=8)
    >>> profile.name, Profile.from_dict(profile.to_dict()) == profile
    ('mlp/original', True)
    """

    model: str
    variant: str
    tool: str
    artefact: str | None = None
    accuracy: float | None = None
    params: int = 0
    nonzeros: int = 0
    bytes: int = 0
    zipped_bytes: int = 0
    macs: int | None = None
    latency: dict[int, Latency] = dataclasses.field(default_factory=dict)
    max_abs_diff: float | None = None
    layers: tuple[WeightProfile, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """`model/variant`."""
        return f"{self.model}/{self.variant}"

    @property
    def latency_ms(self) -> dict[int, float]:
        """The median latency in milliseconds by batch size."""
        return {size: timing.median_ms for size, timing in self.latency.items()}

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        values = dataclasses.asdict(self)
        values["latency"] = {str(size): value for size, value in values["latency"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """The profile that `to_dict` was called on, also after a trip through JSON."""
        timings = {int(n): Latency(**value) for n, value in values["latency"].items()}
        layers = tuple(_weight_from_dict(layer) for layer in values["layers"])
        return cls(**{**values, "latency": timings, "layers": layers})


def _weight_from_dict(values: Mapping[str, Any]) -> WeightProfile:
    sequences = {key: tuple(values[key]) for key in ("shape", "counts", "edges")}
    return WeightProfile(**{**values, **sequences})


def profile(
    item: keras.Model | Artefact,
    batch,
    data=None,
    name: str | None = None,
    tool: str | None = None,
    reference: Any = None,
    timing: Timing | None = None,
) -> Profile:
    """Measure one model or file.

    To compare several, use `compare`: it times them in turns.

    Args:
        item: A built Keras model or an `Artefact`.
        batch: Example inputs of any batch size; latency repeats or cuts them to its batch sizes.
        data: Labelled data for the accuracy, `(x, y)` or a dataset; see `accuracy`.
        name: `"model/variant"`, or `"model"` for the original; default: the name of the model or
            the file.
        tool: What runs it; default: `"keras"`, or the format of the file.
        reference: The model whose outputs on `batch` are compared with; default: for a file, the
            difference that its export found.
        timing: Batch sizes and rounds of the latency; default: `Timing()`.

    Returns:
        A `Profile`.

    Raises:
        ValueError: The model is not built, or outputs do not fit the labels or the reference.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="tiny")
    >>> result = profile(model, np.ones((1, 4)), timing=Timing(rounds=3))
    >>> result.name, result.params, result.macs, sorted(result.latency_ms)
    ('tiny/original', 10, 8, [1, 32])
    """
    name = name or _default_name(item)
    references = {} if reference is None else {name: reference}
    (result,) = compare({name: item}, batch, data, references, timing)
    return dataclasses.replace(result, tool=tool) if tool else result


def compare(
    items: Mapping[str, keras.Model | Artefact],
    batch,
    data=None,
    references: Mapping[str, Any] | None = None,
    timing: Timing | None = None,
) -> list[Profile]:
    """Measure several models and files that take the same inputs, timing them in turns.

    Args:
        items: Keras models and `Artefact`s by name, `"model/variant"` each; a name without a
            slash is a model's original.
        batch: Example inputs of any batch size.
        data: Labelled data for the accuracy, `(x, y)` or a dataset that can be read again.
        references: By the same names, the models to compare outputs with.
        timing: Batch sizes and rounds of the latency.

    Returns:
        A `Profile` for each item, in their order.

    Raises:
        ValueError: As `profile`, or a reference has the name of no item.

    Example:

    >>> a = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> b = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> results = compare({"net": a, "net/other": b}, np.ones((1, 4)), timing=Timing(rounds=3))
    >>> [result.variant for result in results]
    ['original', 'other']
    """
    timing, references = timing or Timing(), references or {}
    unknown = sorted(set(references) - set(items))
    if unknown:
        raise ValueError(
            f"The references {unknown} have the name of no item. Expected names out of "
            f"{sorted(items)}."
        )
    statics = {
        name: _static(name, item, batch, data, references.get(name)) for name, item in items.items()
    }
    timings = {size: _timed(items, batch, size, timing) for size in timing.batch_sizes}
    environment = _environment(timing)
    return [
        dataclasses.replace(
            static,
            latency={size: by_name[name] for size, by_name in timings.items()},
            environment=environment,
        )
        for name, static in statics.items()
    ]


def _default_name(item: keras.Model | Artefact) -> str:
    return item.path.stem if isinstance(item, Artefact) else item.name


def _static(name: str, item: keras.Model | Artefact, batch, data, reference) -> Profile:
    """Everything but the clock."""
    model, _, variant = name.partition("/")
    is_file = isinstance(item, Artefact)
    found, sizes = weights(item), size(item)
    return Profile(
        model=model,
        variant=variant or "original",
        tool=item.format if is_file else "keras",
        artefact=item.path.name if is_file else None,
        accuracy=None if data is None else accuracy(item, data),
        params=sum(weight.params for weight in found),
        nonzeros=sum(weight.nonzeros for weight in found),
        bytes=sizes.bytes,
        zipped_bytes=sizes.zipped_bytes,
        macs=None if is_file else macs(item, batch),
        max_abs_diff=_difference(item, reference, batch),
        layers=tuple(_weight_profile(weight) for weight in found),
    )


def _difference(item: keras.Model | Artefact, reference, batch) -> float | None:
    if reference is not None:
        return max_abs_diff(item, reference, batch)
    return item.max_abs_diff if isinstance(item, Artefact) else None


def _weight_profile(weight: Weight) -> WeightProfile:
    finite = weight.values[np.isfinite(weight.values)]
    # A symmetric range with an even number of bins would put zero on an edge.
    limit = float(np.max(np.abs(finite), initial=0.0)) or 1.0
    counts, edges = np.histogram(finite, bins=_BINS + 1, range=(-limit, limit))
    return WeightProfile(
        weight.path,
        tuple(int(n) for n in weight.shape),
        weight.params,
        weight.nonzeros,
        tuple(counts.tolist()),
        tuple(edges.tolist()),
    )


def _timed(items: Mapping, batch, size: int, timing: Timing) -> dict[str, Latency]:
    inputs = with_batch_size(batch, size)
    return latency({name: _call(item, inputs, timing) for name, item in items.items()}, timing)


def _call(item: keras.Model | Artefact, inputs, timing: Timing) -> Callable[[], Any]:
    """One inference; a Keras model is handed tensors, so that it does not pay for the copy."""
    run = forward(item, timing.num_threads)
    return functools.partial(run, as_tensors(inputs) if isinstance(item, keras.Model) else inputs)


def _environment(timing: Timing) -> dict[str, str]:
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()
    return {
        "tfcompress": _version("tfcompress"),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": f"Keras {threads}, exported files {timing.num_threads or 'automatic'}",
        "timing": f"median of {timing.rounds} interleaved rounds",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
