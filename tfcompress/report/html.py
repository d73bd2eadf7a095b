"""One HTML page about profiles, with everything in it."""

import dataclasses
import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tfcompress.artefact import replacing
from tfcompress.measure import Profile
from tfcompress.optional import require
from tfcompress.report import figures
from tfcompress.report.rows import COLUMNS, bytes_text, formatted, groups, rows

# Points of accuracy that a variant may lose and still be called out at the top of its section.
_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Figure:
    """An `<svg>` element with its caption."""

    title: str
    svg: Any


@dataclasses.dataclass(frozen=True)
class Highlight:
    """A number to see first."""

    value: str
    label: str
    detail: str


def html(
    profiles: Sequence[Profile],
    path: str | os.PathLike,
    title: str = "Compression report",
    inputs: Mapping[str, Any] | None = None,
    sensitivity: Any = None,
    fusion: Any = None,
) -> pathlib.Path:
    """Write a report as one self-contained HTML file.

    It needs no network, follows the light or dark scheme of the reader, and fits a phone. For
    each model it has the table, accuracy against size and latency, the sparsity of every layer
    and the weights before and after; then what was measured, where, and with which versions.

    Args:
        profiles: `Profile`s of one or more models, each model's original first.
        path: The file to write.
        title: The heading.
        inputs: What the numbers come from (data, seed, options), shown as given.
        sensitivity: What `tfcompress.sensitivity` returned, or its `get_config()`, to be plotted.
        fusion: What `tfcompress.acceleration.fusion_report` returned, or its `get_config()`.

    Returns:
        The path.

    Raises:
        ValueError: There are no profiles, the path cannot be written, or `sensitivity` or
            `fusion` is something else.
        ImportError: jinja2 or matplotlib is missing.

    Example:

    >>> import tempfile
    >>> profiles = [Profile("mlp", "original", "keras", params=10, nonzeros=10)]
    >>> page = html(profiles, pathlib.Path(tempfile.mkdtemp(), "report.html"), inputs={"seed": 0})
    >>> "<title>Compression report</title>" in page.read_text()
    True
    """
    if not profiles:
        raise ValueError(
            "There is nothing to report: no profiles were passed. Make some with "
            "tfcompress.measure.profile(model, batch)."
        )
    page = _template().render(
        title=title,
        columns=COLUMNS,
        sections=[_section(model, group) for model, group in groups(profiles).items()],
        inputs=_texts(inputs or {}),
        environments=_environments(profiles),
        sensitivity=None if sensitivity is None else _sensitivity(sensitivity),
        fusion=None if fusion is None else _fusion(fusion),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return pathlib.Path(path)


def _template():
    jinja2 = require("jinja2", extra="report")
    source = importlib.resources.files("tfcompress.report").joinpath("template.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source.read_text(encoding="utf-8"))


def _section(model: str, group: Sequence[Profile]) -> dict[str, Any]:
    used = figures.styles(group)
    numbers = rows(group)
    return {
        "model": model,
        "highlights": _highlights(numbers),
        "rows": [
            {"text": formatted(row), "colour": used.colours[p.variant], "spread": _spread(p)}
            for row, p in zip(numbers, group, strict=True)
        ],
        "macs": group[0].macs,
        "figures": _figures(group, used),
        "histograms": _histograms(group, used),
    }


def _highlights(numbers: list[dict[str, Any]]) -> list[Highlight]:
    """The smallest and the fastest variant that keep the accuracy."""
    kept = [row for row in numbers[1:] if _keeps_accuracy(row, numbers[0])]
    found = [
        _highlight(kept, numbers[0], "size_ratio", "smaller file"),
        _highlight(kept, numbers[0], "speedup_b1", "faster at batch 1"),
    ]
    return [highlight for highlight in found if highlight is not None]


def _keeps_accuracy(row: dict[str, Any], original: dict[str, Any]) -> bool:
    loss = _accuracy_loss(row, original)
    return loss is None or loss <= _TOLERANCE


def _accuracy_loss(row: dict[str, Any], original: dict[str, Any]) -> float | None:
    if row["accuracy"] is None or original["accuracy"] is None:
        return None
    return original["accuracy"] - row["accuracy"]


def _highlight(
    kept: list[dict[str, Any]], original: dict[str, Any], key: str, label: str
) -> Highlight | None:
    measured = [row for row in kept if row[key] is not None]
    if not measured or (best := max(measured, key=lambda row: row[key]))[key] <= 1:
        return None
    loss = _accuracy_loss(best, original)
    # Adding 0 turns a negative zero into a positive one.
    change = "" if loss is None else f", accuracy {round(-100 * loss, 1) + 0.0:+.1f} points"
    return Highlight(formatted(best)[key], label, f"{best['variant']} ({best['tool']}){change}")


def _spread(profile: Profile) -> dict[str, str]:
    """The quartiles of the latencies, for the columns that show their medians."""
    return {
        f"latency_ms_b{size}": f"quartiles {timing.lower_ms:.3g} to {timing.upper_ms:.3g} ms"
        for size, timing in profile.latency.items()
    }


def _figures(group: Sequence[Profile], used: figures.Styles) -> list[Figure]:
    accurate = [p for p in group if p.accuracy is not None]
    wanted = [
        ("Accuracy against size", figures.ACCURACY_VS_SIZE, accurate),
        ("Accuracy against latency", figures.ACCURACY_VS_LATENCY, accurate),
        ("Zeros in each layer", figures.LAYER_SPARSITY, figures.comparable(group)),
    ]
    if not any(1 in p.latency for p in accurate):
        del wanted[1]
    return [_figure(title, drawing, shown, used) for title, drawing, shown in wanted if shown]


def _histograms(group: Sequence[Profile], used: figures.Styles) -> list[Figure]:
    """A figure for each variant that has the layers of the original."""
    found = figures.comparable(group)
    drawing = figures.WEIGHT_HISTOGRAMS
    return [_figure(v.variant, drawing, [found[0], v], used) for v in found[1:]]


def _figure(
    title: str, drawing: figures.Drawing, shown, used: figures.Styles, text: str | None = None
) -> Figure:
    """A figure with its title, or more of a text, for those who cannot see it."""
    markup = require("markupsafe", extra="report").Markup
    opening = markup('<svg role="img" aria-label="{}"').format(text or title)
    return Figure(title, opening + markup(drawing.svg(shown, used).removeprefix("<svg")))


def _sensitivity(result: Any) -> Figure:
    shown, drawing = figures.curves(result), figures.SENSITIVITY
    title = f"{shown.metric} against the zeros in one weight at a time"
    text = f"{title}; most sensitive first: {', '.join(shown.most_sensitive)}"
    return _figure(title, drawing, shown, drawing.styles(shown), text)


def _fusion(result: Any) -> Figure:
    shown, drawing = figures.traffic(result), figures.FUSION
    (before, after), (moved, left) = shown.kernels, map(bytes_text, shown.bytes)
    title = (
        f"{shown.model}: {before} kernels before fusion, {after} after; {moved} moved before, "
        f"{left} after"
    )
    return _figure(title, drawing, shown, drawing.styles(shown))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in values.items()
    }


def _environments(profiles: Sequence[Profile]) -> list[tuple[str, dict[str, str]]]:
    """Each environment once, with the models that were measured in it."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for profile in profiles:
        match = next((names for names, env in found if env == profile.environment), None)
        if match is None:
            found.append(([profile.model], profile.environment))
        elif profile.model not in match:
            match.append(profile.model)
    return [(", ".join(names), environment) for names, environment in found if environment]
