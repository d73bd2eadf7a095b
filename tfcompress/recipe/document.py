"""YAML text with the line of every key, so that an error can name it."""

import dataclasses
import difflib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

# A recipe is some hundred lines; this keeps a wrong file from being read for minutes.
_MAX_CHARACTERS = 1_000_000

Path = tuple[Hashable, ...]


class RecipeError(ValueError):
    """A recipe that is not one; the message names the line, what is allowed, and the nearest."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without aliases, with `1e-4` as a number, and no key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed in a recipe", event.start_mark
            )
        return super().compose_node(parent, index)


# YAML 1.1, which PyYAML reads, wants a dot: it takes 1e-4 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """What a YAML text says, and where.

    Args:
        values: Nested dicts, lists and scalars.
        lines: Path of keys and indices -> line, from 1.
        source: The name of the file, for messages.
    """

    values: Any
    lines: dict[Path, int | None]
    source: str = "recipe"

    @classmethod
    def parse(cls, text: str, source: str = "recipe") -> "Document":
        """Read a text.

        Args:
            text: YAML.
            source: The name of the file, for messages.

        Returns:
            The document.

        Raises:
            RecipeError: The text is no YAML, too long or too deep, has a key twice or an alias.

        Example:

        >>> document = Document.parse("stages:\\n  - fold:\\n")
        >>> document.values, document.line(("stages", 0, "fold"))
        ({'stages': [{'fold': None}]}, 2)
        """
        if len(text) > _MAX_CHARACTERS:
            raise RecipeError(
                f"{source} has {len(text):,} characters; a recipe has at most {_MAX_CHARACTERS:,}. "
                "Pass the path of a YAML file such as `tfcompress run --example cnn` prints."
            )
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                lines = dict(_lines(node, (), source)) if node is not None else {}
                values = loader.construct_document(node) if node is not None else None
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise RecipeError(_syntax_message(error, source)) from error
        except RecursionError as error:
            raise RecipeError(f"{source} is nested too deeply to be a recipe.") from error
        except (ValueError, OverflowError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{source} holds a value that cannot be read: {error}.") from error
        return cls(values, lines, source)

    @classmethod
    def of(cls, values: Any, source: str = "recipe") -> "Document":
        """Values that come from no text, so that no line is known."""
        return cls(values, dict.fromkeys(_paths(values, ())), source)

    def line(self, path: Iterable[Hashable]) -> int | None:
        """The line of what is at `path`, or of the nearest part of the document around it.

        Parts that the document does not have, such as the name of a model in pydantic's locations,
        are passed over.
        """
        return self.lines.get(self.within(path))

    def within(self, path: Iterable[Hashable]) -> Path:
        """The parts of `path` that the document has."""
        found: Path = ()
        for part in path:
            if (*found, part) in self.lines:
                found = (*found, part)
        return found


def _lines(node, path: Path, source: str):
    """`(path, line)` of a node and everything in it."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _lines(child, (*path, index), source)
    elif isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, child in node.value:
            line = key.start_mark.line + 1
            name = _key(key, source, line)
            if name in seen:
                raise RecipeError(
                    f"{source}, line {line}: the key {name!r} is there twice. Keep one of them."
                )
            seen.add(name)
            yield from _lines(child, (*path, name), source)
            # The line of a key, not that of its value, which may begin below.
            yield (*path, name), line


def _paths(values: Any, path: Path) -> Iterator[Path]:
    yield path
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _paths(value, (*path, key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _paths(value, (*path, index))


def _key(key, source: str, line: int) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise RecipeError(f"{source}, line {line}: a key must be a word, not a list or a mapping.")
    return key.value


def _syntax_message(error, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{source}{where}: not valid YAML: {problem}. Indent with spaces, and quote globs: '*'."


def nearest(word: Any, known: Sequence[str]) -> str:
    """A sentence with the known word that is most like `word`; nothing if none is.

    Example:

    >>> nearest("prunning", ["pruning", "qat"])
    " Did you mean 'pruning'?"
    """
    near = difflib.get_close_matches(str(word), [str(each) for each in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def to_yaml(values: Any) -> str:
    """The YAML of nested dicts, lists and scalars, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
