"""Optional packages, imported when they are needed and named when they are missing."""

import importlib
import types


def require(package: str, extra: str) -> types.ModuleType:
    """Import `package`, or say which extra of tfcompress installs it.

    Args:
        package: A module name, dotted or not, e.g. `"matplotlib.pyplot"`.
        extra: The extra in `setup.cfg` that brings it.

    Returns:
        The imported module.

    Raises:
        ImportError: The package is not installed; the message is the pip command to run.

    Example:

    >>> require("json", extra="demo").loads("[1]")
    [1]
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or package.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(
            f"This needs the package {error.name!r}, which is not installed. "
            f'Install it with: pip install "tfcompress[{extra}]"'
        ) from error
