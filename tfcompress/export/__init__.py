"""Export to files that run without Keras, each verified against its model."""

from tfcompress.export.dispatch import export, register_exporter
from tfcompress.export.verify import ExportError

__all__ = ["ExportError", "export", "register_exporter"]
