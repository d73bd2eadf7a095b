"""The search for recipes."""

import dataclasses
import json

import keras
import pytest

from tests.models import classification, mlp
from tfcompress.data import as_data
from tfcompress.recipe import Recipe
from tfcompress.recipe import search as searching
from tfcompress.recipe.search import Trial, best_of, front, recipe_of, search

pytest.importorskip("optuna")


def trials(*points):
    return [Trial(i, {}, drop, cost, {}) for i, (drop, cost) in enumerate(points)]


def test_front_and_best():
    found = trials((0.0, 1.0), (0.02, 0.4), (0.005, 0.6), (0.02, 0.5), (0.3, 0.1))
    assert [each.number for each in front(found)] == [4, 1, 2, 0]
    assert best_of(found, max_drop=0.01).number == 2
    assert best_of(found, max_drop=-1) is None


def test_choices_become_a_recipe():
    recipe = recipe_of({"removed": 0.5, "sparsity": 0.8, "precision": "int8"}, epochs=7)
    names = [stage.names for stage in recipe.stages]
    assert names == [["shrink"], ["train", "distillation"], ["train", "pruning"], ["export"]]
    assert recipe.stages[2].train.epochs == 7
    plain = recipe_of({"removed": 0.0, "sparsity": 0.0, "precision": "dynamic"})
    assert [stage.names for stage in plain.stages] == [["export"]]


@pytest.fixture
def tried(monkeypatch):
    """The choices of each trial, which costs nothing here."""
    tried = []

    def fake(asked, choices, *rest):
        tried.append(tuple(choices.values()))
        if choices["precision"] == "qat":
            return None  # Cannot be done.
        return Trial(asked.number, choices, choices["removed"], 1 - choices["removed"], {})

    monkeypatch.setattr(searching, "_try", fake)
    monkeypatch.setattr(searching._Reference, "of", lambda *arguments: None)
    return tried


def test_nothing_is_tried_twice_and_a_search_goes_on(tried, tmp_path):
    for trials in (3, 12, 12):
        found = search(None, None, tmp_path, trials=trials, patience=100)
    assert len(tried) == 12
    assert len({each for each in tried if each[2] != "qat"}) == len(found.trials)
    assert found.best.choices["removed"] == 0.0
    assert len(found.front) == len({each.choices["removed"] for each in found.trials})


def test_a_search_that_finds_nothing_new_ends(tried, tmp_path):
    search(None, None, tmp_path, trials=120, patience=3)
    assert len(tried) < 40


@pytest.mark.slow
def test_a_search_keeps_the_best_and_goes_on_where_it_was(tmp_path):
    keras.utils.set_random_seed(0)
    model, data = mlp(), as_data(classification(200))
    arguments = {"max_drop": 1.0, "epochs": 1, "output": tmp_path / "out"}
    first = search(model, data, trials=2, **arguments)
    second = search(model, data, trials=4, **arguments)
    assert [each.number for each in second.trials[: len(first.trials)]] == [
        each.number for each in first.trials
    ]
    assert len(second.trials) > len(first.trials)
    assert second.best == min(second.trials, key=lambda each: each.cost)
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").to_dict() == second.best.recipe
    assert Recipe.from_model(tmp_path / "out" / "model.tflite").to_dict() == second.best.recipe
    saved = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert saved["best"] == json.loads(json.dumps(dataclasses.asdict(second.best)))
    names = ["model.keras", "model.tflite", "recipe.yaml", "study.db", "trials.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # Nothing is left to try.
    seen = []
    search(model, data, trials=4, on_trial=lambda *each: seen.append(each), **arguments)
    assert seen == []


def test_what_has_no_accuracy_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(1)])
    x, y = classification(50)
    with pytest.raises(ValueError, match="no accuracy"):
        search(model, as_data((x, x[:, :1])), tmp_path)
    with pytest.raises(ValueError, match="size, zipped, latency"):
        search(mlp(), as_data((x, y)), tmp_path, target="speed")
