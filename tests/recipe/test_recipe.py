"""Reading and writing recipes; what they refuse, with line, allowed values and the nearest."""

import json

import jsonschema
import pytest

from tests.recipe.mutations import BASE, recipes
from tfcompress.recipe import Recipe, RecipeError
from tfcompress.recipe.document import Document


def test_a_text_becomes_a_recipe_and_a_text_again():
    recipe = Recipe.parse(BASE)
    assert [stage.names for stage in recipe.stages] == [
        ["train", "pruning", "qat"],
        ["shrink"],
        ["quantize"],
        ["export"],
    ]
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_to_yaml_writes_a_file(tmp_path):
    recipe = Recipe.parse(BASE)
    recipe.to_yaml(tmp_path / "a.yaml")
    assert Recipe.load(tmp_path / "a.yaml") == recipe


@pytest.mark.parametrize("name", Recipe.ready())
def test_ready_recipes(name):
    recipe = Recipe.load(f"recipe:{name}")
    assert recipe.name == name
    assert recipe.description
    assert recipe.stages[-1].export is not None
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("pruning:", "prunning:", ["line 6", "'prunning'", "Did you mean 'pruning'", "qat"]),
        ("frequency: 10", "frequncy: 10", ["line 11", "Did you mean 'frequency'"]),
        ("criterion: magnitude", "criterion: magnitud", ["line 8", "fisher", "mean 'magnitude'"]),
        ("allocation: global", "allocation: globl", ["line 10", "erk", "Did you mean 'global'"]),
        ("final_sparsity: 0.8", "final_sparsity: 1.5", ["line 6", "1.5", "[0, 1)"]),
        ("PolynomialDecay", "PolynomialDelay", ["line 7", "Did you mean 'PolynomialDecay'"]),
        ("weights: int8", "weights: int9", ["line 12", "int9", "int2"]),
        ("ratio: 0.5", "ratio: 1.5", ["line 13", "shrink.ratio is 1.5", "less than 1"]),
        ("name: percentile", "name: percentil", ["line 14", "Did you mean 'percentile'"]),
        ("model.tflite", "../m.tflite", ["line 15", "leaves the output directory"]),
        ("precision: int8", "precision: int7", ["line 15", "Did you mean 'int8'"]),
        ("max_drop", "max_dropp", ["line 16", "Did you mean 'max_drop'"]),
        ("validation_split: 0.25", "validation_split: 1", ["line 3", "less than 1"]),
        ("optimizer: adam", "optimizer: adma", ["line 5", "adma"]),
        ("    qat:", "    fold:\n    qat:", ["fold makes a stage of its own"]),
        ("- shrink:", "- {}\n  - shrink:", ["line 13", "a stage names a technique"]),
    ],
)
def test_a_mistake_names_its_line_what_is_allowed_and_the_nearest(old, new, parts):
    assert old in BASE
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(BASE.replace(old, new, 1), "my.yaml")
    message = str(raised.value)
    assert message.startswith("my.yaml")
    for part in parts:
        assert part in message


def test_all_mistakes_are_named_at_once():
    text = BASE.replace("ratio: 0.5", "ratio: 1.5").replace("max_drop: 0.01", "max_drop: 7")
    with pytest.raises(RecipeError, match=r"(?s)line 13.*line 16"):
        Recipe.parse(text)


def test_two_exports_to_one_file_are_refused():
    with pytest.raises(RecipeError, match="same file"):
        Recipe.parse("stages: [{export: {path: a.onnx}}, {export: {path: a.onnx}}]")


@pytest.mark.parametrize("texts", [recipes(200)[part::10] for part in range(10)])
def test_malformed_recipes_are_recipe_errors(texts):
    # Reading one takes a millisecond, so that all 200 are read here, in parts.
    for text in texts:
        check_refused(text)


def check_refused(text):
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text)
    assert len(str(raised.value)) < 5000


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="recipe:cnn"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(tmp_path)


def test_the_schema_takes_valid_recipes_and_refuses_wrong_ones():
    schema = Recipe.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for name in Recipe.ready():
        values = json.loads(json.dumps(Document.parse(Recipe.ready_text(name)).values))
        check.validate(_without_empty(values))
    check.validate(Document.parse(BASE).values)
    check.validate({"data": "zoo:mnist5k", "stages": [{"fold": {}}]})
    for wrong in ({"stages": [{"prunning": {}}]}, {"stages": [{"shrink": {"ratio": "half"}}]}, {}):
        assert not check.is_valid(wrong)


def _without_empty(values):
    """`qat:` without arguments is null in YAML."""
    stages = [{k: {} if v is None else v for k, v in s.items()} for s in values["stages"]]
    return {**values, "stages": stages}
