"""Frozen dataclasses that Keras can save: schedules, criteria, structures, regrowth rules."""

import dataclasses
import json
import os
import pathlib
from typing import Any, Self

from tfcompress.artefact import replacing


class Value:
    """Gives a frozen dataclass the two methods that Keras's serialization asks for.

    Example:

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point(Value):
    ...     x: int
    >>> Point.from_config(Point(1).get_config())
    Point(x=1)
    """

    def get_config(self) -> dict[str, Any]:
        """The constructor arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The value that `get_config` described."""
        return cls(**config)


class SavedValue(Value):
    """A value that also goes into a JSON file, and comes back."""

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Write it to a JSON file.

        Args:
            path: The file; it is written whole or not at all.

        Returns:
            The path.

        Raises:
            ValueError: The file cannot be written there.
        """
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.get_config(), indent=1), encoding="utf-8")
        return pathlib.Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote.

        Args:
            path: The JSON file.

        Returns:
            The value.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds something else.
        """
        try:
            return cls.from_config(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} holds no {cls.__name__}: {error}. Pass a file that "
                f"{cls.__name__}.save wrote."
            ) from error
