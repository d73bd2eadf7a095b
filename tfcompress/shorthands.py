"""Strings as shorthands for registered objects, as everywhere in Keras."""

import difflib
from collections.abc import Mapping
from typing import Any


def resolve(kind: str, identifier: Any, known: Mapping[str, Any]) -> Any:
    """What the name `identifier` stands for, or `identifier` itself if it is callable.

    Args:
        kind: What is looked up, for the error, e.g. `"criterion"`.
        identifier: A name or an object.
        known: Name -> object.

    Returns:
        The object.

    Raises:
        ValueError: The name is unknown; the message lists the known ones and the nearest.

    Example:

    >>> resolve("criterion", "double", {"double": lambda x: 2 * x})(4)
    8
    """
    if isinstance(identifier, str) and identifier in known:
        return known[identifier]
    if callable(identifier):
        return identifier
    near = difflib.get_close_matches(str(identifier), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown {kind} {identifier!r}; expected one of {sorted(known)}.{hint}")
