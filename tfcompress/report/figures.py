"""Profiles as matplotlib figures, to be written as PNG files or as SVG inside a page.

A colour stands for a variant, a marker for a tool, a panel for a model.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfcompress.measure import Profile, WeightProfile
from tfcompress.optional import require
from tfcompress.report.rows import bytes_text, compact, groups

# Legible on white and on black.
_NEUTRAL = "#8a93a3"
_COLOURS = (
    "#4c8dd6", "#f2882d", "#46a758", "#e5484d", "#9b72cf",
    "#12a5a5", "#d6a419", "#e06ca5", "#a8795a", "#6f7fd8",
)  # fmt: skip
_MARKERS = "os^DvP<>X"
# An SVG inherits the ink of its page; this colour stands for it until the SVG is written.
_PAGE_INK = "#010203"
_MAX_LAYERS = 12
_MAX_PANELS = 3


@dataclasses.dataclass(frozen=True)
class Styles:
    """The colour of each variant and the marker of each tool."""

    colours: dict[str, str]
    markers: dict[str, str]


def styles(profiles: Sequence[Profile]) -> Styles:
    """Neutral for each model's original, colours in turn for the other variants."""
    originals = {group[0].variant for group in groups(profiles).values()}
    others = _unique(p.variant for p in profiles if p.variant not in originals)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    tools = _unique(profile.tool for profile in profiles)
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(tools)}
    return Styles(dict.fromkeys(originals, _NEUTRAL) | colours, markers)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How to draw profiles, or other data, into a figure, and the inches that this takes."""

    draw: Callable[[Any, Any, Styles], None]
    size: Callable[[Any], tuple[float, float]]
    styles: Callable[[Any], Styles] = styles

    def png(self, data: Any, path: Any) -> None:
        """Draw on white and write a PNG file."""
        with _figure("#1c2024", self.size(data)) as figure:
            self.draw(figure, data, self.styles(data))
            figure.savefig(path, format="png", dpi=160, facecolor="white")

    def svg(self, data: Any, used: Styles) -> str:
        """Draw in the colour of the text around it and return an `<svg>` element."""
        stream = io.StringIO()
        with _figure(_PAGE_INK, self.size(data)) as figure:
            self.draw(figure, data, used)
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
        return _inline(stream.getvalue())


def _inline(document: str) -> str:
    """The `<svg>` element alone, in the ink of the page, without ids that every figure has."""
    element = document[document.index("<svg") :].replace(_PAGE_INK, "currentColor")
    return re.sub(r'<g id="\w+_\d+">', "<g>", element)


@contextlib.contextmanager
def _figure(ink: str, size: tuple[float, float]) -> Iterator[Any]:
    matplotlib = require("matplotlib", extra="report")
    # Not pyplot: no window system, no global state.
    figures = require("matplotlib.figure", extra="report")
    with matplotlib.rc_context(_settings(ink)):
        yield figures.Figure(figsize=size, layout="constrained")


def _settings(ink: str) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inked, ink) | {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.axisbelow": True,
        "grid.color": _NEUTRAL,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        # Names are shown as they are, also those with a dollar sign.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "tfcompress",
    }


def _panels(figure, profiles: Sequence[Profile]) -> Iterator[tuple[Any, list[Profile]]]:
    """One axes beside the other, each with the profiles of a model."""
    by_model = groups(profiles)
    line = figure.subplots(1, len(by_model), squeeze=False)[0]
    for axes, (model, group) in zip(line, by_model.items(), strict=True):
        if len(by_model) > 1:
            axes.set_title(model)
        yield axes, group


def _legend(figure, profiles: Sequence[Profile], used: Styles, with_tools: bool) -> None:
    lines = require("matplotlib.lines", extra="report")

    def entry(label: str, colour: str, marker: str):
        return lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=label)

    entries = [entry(v, used.colours[v], "s") for v in _unique(p.variant for p in profiles)]
    tools = _unique(p.tool for p in profiles) if with_tools else []
    entries += [entry(tool, _NEUTRAL, used.markers[tool]) for tool in tools]
    figure.legend(
        handles=entries, loc="outside lower left", ncols=_columns(entries), handletextpad=0.2
    )


def _columns(entries: Sequence) -> int:
    return 3 if len(entries) > 4 else 2


def _panel_count(profiles: Sequence[Profile]) -> int:
    return len(groups(profiles))


def _scatter_size(profiles: Sequence[Profile]) -> tuple[float, float]:
    entries = _unique(p.variant for p in profiles) + _unique(p.tool for p in profiles)
    return 0.6 + 4.0 * _panel_count(profiles), 2.8 + 0.17 * -(-len(entries) // _columns(entries))


def _accuracy_over_size(figure, profiles: Sequence[Profile], used: Styles) -> None:
    label = "zipped size (log scale, left is smaller)"
    _accuracy_over(figure, profiles, used, lambda p: p.zipped_bytes, label, bytes_text)


def _accuracy_over_latency(figure, profiles: Sequence[Profile], used: Styles) -> None:
    label = "latency at batch 1 (log scale, left is faster)"
    value, text = lambda p: p.latency_ms.get(1), lambda value: f"{value:.3g} ms"
    _accuracy_over(figure, profiles, used, value, label, text)


def _accuracy_over(
    figure,
    profiles: Sequence[Profile],
    used: Styles,
    value: Callable[[Profile], float | None],
    label: str,
    text: Callable[[float], str],
) -> None:
    shown = [p for p in profiles if p.accuracy is not None and value(p)]
    if not shown:
        raise ValueError(
            f"None of the {len(profiles)} profiles has an accuracy and a {label.split(' (')[0]}. "
            "Measure with profile(model, batch, data=(x, y)), at batch size 1 among others."
        )
    for axes, group in _panels(figure, shown):
        for p in group:
            axes.plot(
                value(p), 100 * p.accuracy, color=used.colours[p.variant], linestyle="",
                marker=used.markers[p.tool], markersize=7, markeredgewidth=0, alpha=0.85,
            )  # fmt: skip
        _scatter_axes(axes, [value(p) for p in group], label, text)
        _at_least_two_points(axes)
    _legend(figure, shown, used, with_tools=True)


def _scatter_axes(axes, values: list[float], label: str, text: Callable[[float], str]) -> None:
    ticker = require("matplotlib.ticker", extra="report")
    axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="accuracy (%)")
    axes.margins(0.08)
    low, high = min(values), max(values)
    if high < 2 * low:
        # Equal values should look equal.
        middle = (low * high) ** 0.5
        axes.set_xlim(middle / 1.6, middle * 1.6)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=6))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, min_n_ticks=3))
    axes.grid(True)


def _at_least_two_points(axes) -> None:
    """Two percentage points on the axis, or noise would look like a difference."""
    low, high = axes.get_ylim()
    if high - low < 2:
        axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)


def kernels(profile: Profile) -> list[WeightProfile]:
    """The weights with 2 or more axes."""
    return [layer for layer in profile.layers if len(layer.shape) >= 2]


def aligned(original: Profile, other: Profile) -> dict[str, WeightProfile]:
    """The kernels of `other` by the paths of `original`.

    By position when all shapes agree, since a copy may carry other names; else by path.
    """
    ours, theirs = kernels(original), kernels(other)
    if [layer.shape for layer in ours] == [layer.shape for layer in theirs]:
        return {a.path: b for a, b in zip(ours, theirs, strict=True)}
    paths = {layer.path for layer in ours}
    return {layer.path: layer for layer in theirs if layer.path in paths}


def comparable(profiles: Sequence[Profile]) -> list[Profile]:
    """The profiles that have kernels of their model's original, which files name and turn anew."""
    found = [profile for profile in profiles if kernels(profile)]
    originals = {model: group[0] for model, group in groups(found).items()}
    return [p for p in found if aligned(originals[p.model], p)]


def _comparable_or_raise(profiles: Sequence[Profile]) -> list[Profile]:
    if found := comparable(profiles):
        return found
    raise ValueError(
        f"None of the {len(profiles)} profiles has a weight with 2 or more axes. Measure a model "
        "that has kernels with tfcompress.measure.profile."
    )


def _sparse(group: Sequence[Profile]) -> list[Profile]:
    """The profiles with zeros in their kernels; all of them when none has any."""
    return [p for p in group if any(k.nonzeros < k.params for k in kernels(p))] or list(group)


def _largest(original: Profile, limit: int) -> list[str]:
    """The paths of the largest kernels, in the order of the model."""
    found = kernels(original)
    chosen = {layer.path for layer in sorted(found, key=lambda layer: -layer.params)[:limit]}
    return [layer.path for layer in found if layer.path in chosen]


def _sparsity_bars(figure, profiles: Sequence[Profile], used: Styles) -> None:
    found = _comparable_or_raise(profiles)
    for axes, group in _panels(figure, found):
        _bars(axes, group[0], _sparse(group), used)
    shown = [p for group in groups(found).values() for p in _sparse(group)]
    _legend(figure, shown, used, with_tools=False)


def _bars(axes, original: Profile, shown: Sequence[Profile], used: Styles) -> None:
    paths, height = _largest(original, _MAX_LAYERS), 0.8 / len(shown)
    for index, profile in enumerate(shown):
        found = aligned(original, profile)
        values = [100 * found[path].sparsity if path in found else np.nan for path in paths]
        offsets = np.arange(len(paths)) - 0.4 + height * (index + 0.5)
        axes.barh(offsets, values, height * 0.9, color=used.colours[profile.variant])
    axes.set_yticks(range(len(paths)), [_short(path) for path in paths])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="zeros (%)")
    axes.grid(True, axis="x")


def _bars_size(profiles: Sequence[Profile]) -> tuple[float, float]:
    found = groups(comparable(profiles))
    heights = [
        min(len(kernels(group[0])), _MAX_LAYERS) * (0.12 + 0.09 * len(_sparse(group)))
        for group in found.values()
    ]
    return 0.6 + 4.0 * max(len(found), 1), max(2.4, 1.2 + max(heights, default=0))


def _histograms(figure, profiles: Sequence[Profile], used: Styles) -> None:
    pairs = _pairs(_comparable_or_raise(profiles))
    columns = max(len(_largest(original, _MAX_PANELS)) for original, _ in pairs)
    panels = figure.subplots(len(pairs), columns, squeeze=False)
    for line, (original, variant) in zip(panels, pairs, strict=True):
        _histogram_line(line, original, variant, used.colours[variant.variant])
        name = variant.variant if _panel_count(profiles) == 1 else variant.name
        line[0].set_ylabel(f"{name}\nweights")


def _pairs(found: Sequence[Profile]) -> list[tuple[Profile, Profile]]:
    """Each variant with the original of its model; an original alone with itself."""
    return [
        (group[0], variant)
        for group in groups(found).values()
        for variant in (group[1:] or group[:1])
    ]


def _histogram_line(line, original: Profile, variant: Profile, colour: str) -> None:
    before, after = {k.path: k for k in kernels(original)}, aligned(original, variant)
    paths = _largest(original, _MAX_PANELS)
    for axes, path in zip(line, paths, strict=False):
        _histogram(axes, before[path], after.get(path), colour)
        axes.set_title(_short(path))
    for axes in line[len(paths) :]:
        axes.set_visible(False)


def _histogram(axes, before: WeightProfile, after: WeightProfile | None, colour: str) -> None:
    ticker = require("matplotlib.ticker", extra="report")
    axes.stairs(before.counts, before.edges, fill=True, color=_NEUTRAL, alpha=0.45)
    if after is not None and after is not before:
        axes.stairs(after.counts, after.edges, color=colour, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(3))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _histograms_size(profiles: Sequence[Profile]) -> tuple[float, float]:
    return 4.6, 0.3 + 1.7 * max(len(_pairs(comparable(profiles))), 1)


@dataclasses.dataclass(frozen=True)
class Curves:
    """A metric over the sparsity of one weight at a time."""

    metric: str
    higher_is_better: bool
    baseline: float
    sparsities: tuple[float, ...]
    values: dict[str, tuple[float, ...]]

    @property
    def most_sensitive(self) -> list[str]:
        """Paths, those with the worst value first."""
        worst = min if self.higher_is_better else max
        sign = 1 if self.higher_is_better else -1
        return sorted(self.values, key=lambda path: sign * worst(self.values[path]))


def curves(result: Any) -> Curves:
    """What is drawn of a `tfcompress.pruning.Sensitivity`, its `get_config()` or its JSON.

    Example:

    >>> config = {"metric": "loss", "higher_is_better": False, "baseline": 1.0,
    ...           "sparsities": [0.5], "values": {"a": [2.0], "b": [3.0]}}
    >>> curves(config).most_sensitive
    ['b', 'a']
    """
    config = result if isinstance(result, Mapping) else getattr(result, "get_config", dict)()
    names = [field.name for field in dataclasses.fields(Curves)]
    missing = [name for name in names if name not in config]
    if missing or not config["values"]:
        raise ValueError(
            f"Expected the result of tfcompress.sensitivity, or its get_config(); got "
            f"{type(result).__name__} without {' and '.join(missing) or 'values'}."
        )
    return Curves(**{name: config[name] for name in names})


def _curve_styles(shown: Curves) -> Styles:
    """A colour for each of the most sensitive weights, neutral for the others."""
    named = dict(zip(shown.most_sensitive, _COLOURS, strict=False))
    return Styles(dict.fromkeys(shown.values, _NEUTRAL) | named, {})


def _sensitivity(figure, shown: Curves, used: Styles) -> None:
    axes = figure.subplots()
    named = shown.most_sensitive[: len(_COLOURS)]
    places = [0.0, *(100 * each for each in shown.sparsities)]
    for path in reversed(shown.most_sensitive):
        axes.plot(
            places, [shown.baseline, *shown.values[path]], color=used.colours[path],
            linewidth=1.4 if path in named else 0.7, marker="o", markersize=3,
        )  # fmt: skip
    axes.axhline(shown.baseline, color=_NEUTRAL, linestyle="--", linewidth=1.0, zorder=1)
    better = "higher" if shown.higher_is_better else "lower"
    axes.set(xlabel="zeros in this weight alone (%)", ylabel=f"{shown.metric} ({better} is better)")
    axes.grid(True)
    _curve_legend(figure, shown, used)


def _curve_legend(figure, shown: Curves, used: Styles) -> None:
    lines = require("matplotlib.lines", extra="report")

    def entry(label: str, colour: str, **settings):
        return lines.Line2D([], [], color=colour, label=label, **settings)

    named = shown.most_sensitive[: len(_COLOURS)]
    entries = [entry(_short(path), used.colours[path]) for path in named]
    if others := len(shown.values) - len(named):
        entries.append(entry(f"{others} less sensitive", _NEUTRAL, linewidth=0.7))
    entries.append(entry("not pruned", _NEUTRAL, linestyle="--"))
    figure.legend(handles=entries, loc="outside lower left", ncols=2, handlelength=1.4)


def _sensitivity_size(shown: Curves) -> tuple[float, float]:
    entries = min(len(shown.values), len(_COLOURS) + 1) + 1
    return 4.6, 2.8 + 0.17 * -(-entries // 2)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that XLA's fused groups move, and would move without fusion."""

    model: str
    batch_size: int
    kernels: tuple[int, int]
    bytes: tuple[int, int]
    groups: tuple[tuple[str, int, int], ...]


def traffic(result: Any) -> Traffic:
    """What is drawn of a `tfcompress.acceleration.FusionReport`, its `get_config()` or its JSON.

    Example:

    >>> group = {"layers": ["dense"], "bytes_before": 9, "bytes_after": 4}
    >>> traffic({"model": "mlp", "batch_size": 1, "kernels_before": {"dot": 1, "add": 2},
    ...          "kernels_after": {"fusion": 1}, "bytes_before": 20, "bytes_after": 10,
    ...          "groups": [group]}).kernels
    (3, 1)
    """
    config = result if isinstance(result, Mapping) else getattr(result, "get_config", dict)()
    wanted = ("model", "batch_size", "kernels_before", "kernels_after", "bytes_before", "groups")
    missing = [name for name in wanted if name not in config]
    if missing or not config["groups"]:
        raise ValueError(
            f"Expected the result of tfcompress.acceleration.fusion_report with a fused group, or "
            f"its get_config(); got {type(result).__name__} without "
            f"{' and '.join(missing) or 'groups'}."
        )
    return Traffic(
        config["model"],
        config["batch_size"],
        (sum(config["kernels_before"].values()), sum(config["kernels_after"].values())),
        (config["bytes_before"], config["bytes_after"]),
        tuple(
            (", ".join(g["layers"]), g["bytes_before"], g["bytes_after"]) for g in config["groups"]
        ),
    )


def _fusion(figure, shown: Traffic, used: Styles) -> None:
    """Two bars a group: wide and pale is before, narrow and strong is after."""
    axes, groups_ = figure.subplots(), shown.groups[:_MAX_LAYERS]
    places = range(len(groups_))
    before, after = ([group[i] / 1000 for group in groups_] for i in (1, 2))
    axes.barh(places, before, height=0.8, color=used.colours["before"], label="apart")
    axes.barh(places, after, height=0.4, color=used.colours["after"], label="fused")
    axes.set_yticks(places, [_short(name) for name, *_ in groups_])
    axes.invert_yaxis()
    axes.set_xlabel(f"kB moved for a batch of {shown.batch_size}")
    axes.grid(True, axis="x")
    figure.legend(loc="outside lower left", ncols=2)


def _fusion_styles(shown: Traffic) -> Styles:
    return Styles({"before": _NEUTRAL, "after": _COLOURS[0]}, {})


def _fusion_size(shown: Traffic) -> tuple[float, float]:
    return 4.6, 1.4 + 0.24 * min(len(shown.groups), _MAX_LAYERS)


def _short(path: str) -> str:
    """The last two parts of a path, cut to fit beside a bar."""
    text = "/".join(path.split("/")[-2:])
    return text if len(text) <= 26 else "…" + text[-25:]


ACCURACY_VS_SIZE = Drawing(_accuracy_over_size, _scatter_size)
ACCURACY_VS_LATENCY = Drawing(_accuracy_over_latency, _scatter_size)
LAYER_SPARSITY = Drawing(_sparsity_bars, _bars_size)
WEIGHT_HISTOGRAMS = Drawing(_histograms, _histograms_size)
SENSITIVITY = Drawing(_sensitivity, _sensitivity_size, _curve_styles)
FUSION = Drawing(_fusion, _fusion_size, _fusion_styles)
