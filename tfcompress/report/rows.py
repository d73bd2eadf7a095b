"""Profiles as rows: plain numbers for files, formatted text for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tfcompress.measure import Profile


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table that the terminal and the HTML report show."""

    title: str
    key: str

    @property
    def is_text(self) -> bool:
        """Text is aligned to the left, numbers to the right."""
        return self.key in ("variant", "tool")


COLUMNS = (
    Column("variant", "variant"),
    Column("tool", "tool"),
    Column("accuracy", "accuracy"),
    Column("params", "params"),
    Column("non-zeros", "nonzeros"),
    Column("size", "bytes"),
    Column("zipped", "zipped_bytes"),
    Column("ms b1", "latency_ms_b1"),
    Column("ms b32", "latency_ms_b32"),
    Column("speed-up", "speedup_b1"),
    Column("smaller", "size_ratio"),
    Column("max diff", "max_abs_diff"),
)


def groups(profiles: Sequence[Profile]) -> dict[str, list[Profile]]:
    """The profiles of each model, in order; the first of a group is its original."""
    result: dict[str, list[Profile]] = {}
    for profile in profiles:
        result.setdefault(profile.model, []).append(profile)
    return result


def rows(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """One flat dict a profile, compared with the first profile of the same model.

    `speedup_b1 = original latency / latency` at batch 1 and `size_ratio = original bytes / bytes`.

    Args:
        profiles: `Profile`s of one or more models, each model's original first.

    Returns:
        Dicts with the keys model, variant, tool, artefact, accuracy (in [0, 1]), params, nonzeros,
        bytes, zipped_bytes, latency_ms_b1, latency_ms_b32, speedup_b1, size_ratio, max_abs_diff;
        None where nothing was measured.

    Example:

    >>> dense = Profile("mlp", "original", "keras", bytes=400)
    >>> small = Profile("mlp", "int8", "litert", bytes=100)
    >>> [row["size_ratio"] for row in rows([dense, small])]
    [1.0, 4.0]
    """
    originals = {model: group[0] for model, group in groups(profiles).items()}
    return [_row(profile, originals[profile.model]) for profile in profiles]


def _row(profile: Profile, original: Profile) -> dict[str, Any]:
    latency = profile.latency_ms
    return {
        "model": profile.model,
        "variant": profile.variant,
        "tool": profile.tool,
        "artefact": profile.artefact,
        "accuracy": profile.accuracy,
        "params": profile.params,
        "nonzeros": profile.nonzeros,
        "bytes": profile.bytes,
        "zipped_bytes": profile.zipped_bytes,
        "latency_ms_b1": latency.get(1),
        "latency_ms_b32": latency.get(32),
        "speedup_b1": _ratio(original.latency_ms.get(1), latency.get(1)),
        "size_ratio": _ratio(original.bytes, profile.bytes),
        "max_abs_diff": profile.max_abs_diff,
    }


def _ratio(original: float | None, value: float | None) -> float | None:
    return original / value if original and value else None


def formatted(row: dict[str, Any]) -> dict[str, str]:
    """The values of a row as short text, a dash where nothing was measured.

    Example:

    >>> dense = Profile("mlp", "original", "keras", accuracy=0.9412, params=1000, nonzeros=200)
    >>> text = formatted(rows([dense])[0])
    >>> text["accuracy"], text["nonzeros"], text["latency_ms_b1"]
    ('94.1%', '200 (20%)', '-')
    """
    return {key: "-" if value is None else _text(key, value, row) for key, value in row.items()}


def _text(key: str, value: Any, row: dict[str, Any]) -> str:
    if key == "nonzeros" and row["params"]:
        return f"{value:,} ({value / row['params']:.0%})"
    return _FORMATS.get(key, str)(value)


def compact(count: float) -> str:
    """A count to three digits.

    Example:

    >>> compact(64), compact(109_386), compact(25_600_000)
    ('64', '109k', '25.6M')
    """
    return _scaled(count, "")


def bytes_text(count: float) -> str:
    """A size in decimal units, to three digits.

    Example:

    >>> bytes_text(999), bytes_text(423_456), bytes_text(12_345_678)
    ('999 B', '423 kB', '12.3 MB')
    """
    return _scaled(count, " ") + "B"


def _scaled(value: float, space: str) -> str:
    prefixes = ["", "k", "M", "G"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:.3g}{space}{prefixes[0]}"


def _ratio_text(value: float) -> str:
    digits = 0 if value >= 99.5 else 2 if value < 0.995 else 1
    return f"{value:.{digits}f}x"


def _milliseconds_text(value: float) -> str:
    if value >= 999.5:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.0995 else f"{value:.2g}"


_FORMATS = {
    "accuracy": lambda value: f"{value:.1%}",
    "params": lambda value: f"{value:,}",
    "nonzeros": lambda value: f"{value:,}",
    "bytes": bytes_text,
    "zipped_bytes": bytes_text,
    "latency_ms_b1": _milliseconds_text,
    "latency_ms_b32": _milliseconds_text,
    "speedup_b1": _ratio_text,
    "size_ratio": _ratio_text,
    "max_abs_diff": lambda value: f"{value:.1g}",
}
