"""Plots of profiles, and of sensitivities, as PNG files."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tfcompress.artefact import replacing
from tfcompress.measure import Profile
from tfcompress.report import figures


def accuracy_vs_size(profiles: Sequence[Profile], path: str | os.PathLike) -> pathlib.Path:
    """Accuracy over the zipped size, a point for each profile and a panel for each model.

    The zipped size is the one that zeros make smaller.

    Args:
        profiles: `Profile`s, those without accuracy are left out.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: No profile has an accuracy, or the path cannot be written.
        ImportError: matplotlib is missing.

    Example:

    >>> import tempfile
    >>> profiles = [Profile("mlp", "original", "keras", accuracy=0.9, zipped_bytes=1000)]
    >>> accuracy_vs_size(profiles, pathlib.Path(tempfile.mkdtemp(), "a.png")).exists()
    True
    """
    return _write(figures.ACCURACY_VS_SIZE, profiles, path)


def accuracy_vs_latency(profiles: Sequence[Profile], path: str | os.PathLike) -> pathlib.Path:
    """Accuracy over the latency at batch 1, a point for each profile, a panel for each model.

    Args:
        profiles: `Profile`s, those without accuracy or latency are left out.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: No profile has both numbers, or the path cannot be written.
        ImportError: matplotlib is missing.

    Example:

    >>> import tempfile
    >>> from tfcompress.measure import Latency
    >>> timing = {1: Latency(0.2, 0.1, 0.3, 31)}
    >>> profiles = [Profile("mlp", "original", "keras", accuracy=0.9, latency=timing)]
    >>> accuracy_vs_latency(profiles, pathlib.Path(tempfile.mkdtemp(), "a.png")).exists()
    True
    """
    return _write(figures.ACCURACY_VS_LATENCY, profiles, path)


def layer_sparsity(profiles: Sequence[Profile], path: str | os.PathLike) -> pathlib.Path:
    """The percentage of zeros in each kernel, a bar for each variant that has zeros.

    Args:
        profiles: `Profile`s, each model's original first; files are left out, as their tensors
            have names of their own, and so is what follows the 12 largest kernels.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: No profile has kernels, or the path cannot be written.
        ImportError: matplotlib is missing.

    Example:

    >>> import tempfile
    >>> from tfcompress.measure import WeightProfile
    >>> kernel = WeightProfile("dense/kernel", (2, 2), 4, 1, (1, 3), (-1.0, 0.0, 1.0))
    >>> profiles = [Profile("mlp", "original", "keras", layers=(kernel,))]
    >>> layer_sparsity(profiles, pathlib.Path(tempfile.mkdtemp(), "a.png")).exists()
    True
    """
    return _write(figures.LAYER_SPARSITY, profiles, path)


def weight_histograms(profiles: Sequence[Profile], path: str | os.PathLike) -> pathlib.Path:
    """The values of the 3 largest kernels before (filled) and after, a row for each variant.

    The count axis is logarithmic, since pruning puts most weights into one bin.

    Args:
        profiles: `Profile`s, each model's original first; files are left out.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: No profile has kernels, or the path cannot be written.
        ImportError: matplotlib is missing.

    Example:

    >>> import tempfile
    >>> from tfcompress.measure import WeightProfile
    >>> kernel = WeightProfile("dense/kernel", (2, 2), 4, 1, (1, 3), (-1.0, 0.0, 1.0))
    >>> profiles = [Profile("mlp", name, "keras", layers=(kernel,)) for name in ("original", "l1")]
    >>> weight_histograms(profiles, pathlib.Path(tempfile.mkdtemp(), "a.png")).exists()
    True
    """
    return _write(figures.WEIGHT_HISTOGRAMS, profiles, path)


def sensitivity(result: Any, path: str | os.PathLike) -> pathlib.Path:
    """The metric over the zeros in one weight at a time, a line for each; dashed is no pruning.

    The 10 most sensitive weights have a colour and a name.

    Args:
        result: What `tfcompress.sensitivity` returned, or its `get_config()`.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: `result` is something else, or the path cannot be written.
        ImportError: matplotlib is missing.

    Example:

    >>> import tempfile
    >>> result = {"metric": "loss", "higher_is_better": False, "baseline": 0.1,
    ...           "sparsities": (0.5, 0.9), "values": {"dense/kernel": (0.1, 0.4)}}
    >>> sensitivity(result, pathlib.Path(tempfile.mkdtemp(), "a.png")).exists()
    True
    """
    return _write(figures.SENSITIVITY, figures.curves(result), path)


def _write(drawing: figures.Drawing, data: Any, path: str | os.PathLike) -> pathlib.Path:
    with replacing(path) as temporary:
        drawing.png(data, temporary)
    return pathlib.Path(path)
