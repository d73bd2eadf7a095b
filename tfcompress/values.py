"""Frozen dataclasses that Keras can save: schedules, criteria, structures, regrowth rules."""

import dataclasses
from typing import Any, Self


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
