"""Reports about profiles: a terminal table, plots, and one self-contained HTML page."""

from tfcompress.report import plots
from tfcompress.report.html import html
from tfcompress.report.rows import rows
from tfcompress.report.terminal import table

__all__ = ["html", "plots", "rows", "table"]
