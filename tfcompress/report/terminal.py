"""The table for the terminal."""

from collections.abc import Sequence

import rich.box
import rich.table
import rich.text

from tfcompress.measure import Profile
from tfcompress.report.rows import COLUMNS, compact, formatted, groups, rows

# Two lines where one would be wider than the numbers below it.
_HEADERS = {
    "accuracy": "acc.",
    "nonzeros": "non-\nzero",
    "bytes": "bytes",
    "zipped_bytes": "zip",
    "latency_ms_b1": "ms\nb1",
    "latency_ms_b32": "ms\nb32",
    "speedup_b1": "speed\n-up",
    "size_ratio": "small\n-er",
    "max_abs_diff": "max\ndiff",
}


def table(profiles: Sequence[Profile], title: str | None = None) -> rich.table.Table:
    """Profiles as a `rich` table, a section for each model, 80 columns wide if need be.

    Args:
        profiles: `Profile`s of one or more models, each model's original first.
        title: A line above the table.

    Returns:
        A table to pass to `rich.print`.

    Example:

    >>> result = table([Profile("mlp", "original", "keras")])
    >>> result.row_count, result.columns[0].header
    (2, 'variant')
    """
    result = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in COLUMNS:
        # Numbers keep their line, a narrow terminal folds the names.
        result.add_column(
            _HEADERS.get(column.key, column.title),
            justify="left" if column.is_text else "right",
            no_wrap=not column.is_text,
            min_width={"variant": 9, "tool": 7}.get(column.key),
        )
    for model, group in groups(profiles).items():
        result.add_row(rich.text.Text(model, style="bold"))
        _add_rows(result, group)
    return result


_COUNTS = ("params", "nonzeros", "bytes", "zipped_bytes")


def _add_rows(result: rich.table.Table, group: Sequence[Profile]) -> None:
    for position, row in enumerate(rows(group)):
        text = formatted(row) | {key: compact(row[key]) for key in _COUNTS}
        # `Text` keeps square brackets in a name from being read as markup.
        cells = [rich.text.Text(text[column.key]) for column in COLUMNS]
        result.add_row(*cells, end_section=position == len(group) - 1)
