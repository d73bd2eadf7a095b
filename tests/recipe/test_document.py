"""YAML with lines."""

import pytest

from tfcompress.recipe.document import Document, RecipeError, to_yaml

TEXT = """\
a: 1
b:
  - c: 1e-4
    d: [x, y]
  - e
"""


def test_values_and_lines():
    document = Document.parse(TEXT)
    assert document.values == {"a": 1, "b": [{"c": 1e-4, "d": ["x", "y"]}, "e"]}
    assert [document.line(path) for path in [("a",), ("b", 0, "d"), ("b", 1)]] == [1, 4, 5]


def test_parts_that_the_text_does_not_have_are_passed_over():
    assert Document.parse(TEXT).within(("b", 0, "SomeModel", "d", 7)) == ("b", 0, "d")


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("1E3", 1000.0), ("2.5e-2", 0.025), ("1e", "1e")]
)
def test_numbers_with_exponents(text, value):
    assert Document.parse(f"a: {text}").values == {"a": value}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\na: 2", "line 2: the key 'a' is there twice"),
        ("a: &x [1]\nb: *x", "line 2: .*aliases"),
        ("a:\n\t- 1", "line 2: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[" * 1000, "nested too deeply"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a: 2024-99-99", "cannot be read"),
        ("x" * 2_000_000, "a recipe has at most"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Document.parse(text)


def test_what_is_written_is_read():
    values = {"a": [1, 2.5e-5, "text: with colon", None, True], "b": {"*glob*": "50%"}}
    assert Document.parse(to_yaml(values)).values == values
