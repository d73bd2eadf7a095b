"""Data of one's own, as examples to train on and examples to validate on.

    data = tfcompress.data.load("photos/", like=model)
    model.fit(*data.fit_arguments(batch_size=32)...)

CSV, NPZ and TFRecord files, folders of images, the data of `tfcompress.zoo`, and whatever a
function returns. Nothing is executed, unless it is a function and `trust=True` says so.
"""

from tfcompress.data.examples import Data, as_data
from tfcompress.data.source import Source, load

__all__ = ["Data", "Source", "as_data", "load"]
