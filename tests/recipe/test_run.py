"""Recipes that are done."""

import json

import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.models import classification, mlp
from tfcompress.recipe import Recipe, run


def apply(stages, model=None, data=None, **arguments):
    recipe = Recipe.from_dict({"stages": stages})
    return recipe.apply(model or mlp(), data, verbose=0, **arguments)


@pytest.fixture(scope="module")
def data():
    return classification(200)


def kernel_zeros(model):
    return [float((w.numpy() == 0).mean()) for w in model.weights if len(w.shape) == 2]


def test_prune_once_leaves_the_model_that_was_passed():
    model = mlp()
    before = model.get_weights()
    result = apply([{"prune": {"sparsity": 0.5}}], model)
    assert kernel_zeros(result.model) == [0.5, 0.5]
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert result.metrics["result"]["sparsity"] == 0.5
    assert result.metrics["original"]["sparsity"] == 0.0


def test_it_does_what_the_public_function_does(data):
    model = mlp()
    plan = tfc.shrink_plan(model, ratio=0.5)
    expected = tfc.prune(plan.apply(model), sparsity=0.75).get_weights()
    result = apply([{"shrink": {"ratio": 0.5}}, {"prune": {"sparsity": 0.75}}], model)
    for ours, theirs in zip(result.model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_techniques_of_one_stage_train_together_and_the_files_say_how(data, tmp_path):
    schedule = {
        "name": "PolynomialDecay",
        "initial_sparsity": 0.0,
        "final_sparsity": 0.8,
        "begin_step": 0,
        "end_step": "50%",
    }
    stages = [
        {
            "train": {"epochs": 2},
            "pruning": {"sparsity": schedule, "frequency": 2},
            "qat": {},
            "distillation": {"teacher": "original", "distillation_losses": ["logits", "mse"]},
        },
        {"export": {"path": "m.tflite", "precision": "int8"}},
        {"export": {"path": "float/m.tflite", "precision": "float32"}},
    ]
    result = apply(stages, data=data, output=tmp_path / "out")
    assert kernel_zeros(result.model)[0] == pytest.approx(0.8, abs=0.01)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "float",
        "m.tflite",
        "model.keras",
        "recipe.yaml",
        "result.json",
    ]
    recipe = Recipe.from_dict({"stages": stages})
    for name in ("m.tflite", "model.keras", "float/m.tflite"):
        assert Recipe.from_model(tmp_path / "out" / name) == recipe
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["metrics"]["m.tflite"]["bytes"] == (tmp_path / "out/m.tflite").stat().st_size
    assert [artefact.precision for artefact in result.artefacts] == ["int8", "float32"]
    assert all(artefact.path.exists() for artefact in result.artefacts)
    x = data[0][:5]
    assert result.artefacts[0](x).shape == (5, 3)


def test_what_was_done_before_is_done_again_first(tmp_path):
    first = apply([{"shrink": {"ratio": 0.5}}]).model
    second = apply([{"prune": {"sparsity": 0.5}}], first)
    recipe = Recipe.from_model(second.model)
    assert [stage.names for stage in recipe.stages] == [["shrink"], ["prune"]]
    model = mlp()
    once = recipe.apply(model, verbose=0).model
    twice = apply([{"prune": {"sparsity": 0.5}}], apply([{"shrink": {"ratio": 0.5}}], model).model)
    for ours, theirs in zip(once.get_weights(), twice.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        [{"fold": {}}],
        [{"factorize": {"ratio": 0.5}}],
        [{"cluster": {"clusters": 4}}, {"strip": {}}],
        [{"quantize": {"calibrator": {"name": "percentile", "percentile": 99.0}}}],
        [{"prune": {"structure": "2:4", "criterion": "wanda"}}],
        [{"shrink": {"ratio": 0.5, "criterion": "taylor"}}],
        [{"train": {"epochs": 1, "patience": 1}, "l1": {"strength": 0.001}}, {"threshold": {}}],
    ],
    ids=lambda stages: "+".join(key for stage in stages for key in stage),
)
def test_every_technique_runs(data, stages):
    result = apply(stages, data=data)
    assert "accuracy" in result.metrics["result"]
    outputs = result.model(data[0][:4])
    assert outputs.shape == (4, 3)
    assert np.isfinite(outputs).all()


def test_layers_are_dropped_by_name():
    x = inputs = keras.Input((4,))
    for i in range(3):
        h = keras.layers.Dense(4, name=f"block_{i}_dense")(x)
        x = keras.layers.Add(name=f"block_{i}_add")([x, h])
    result = apply([{"drop_layers": {"keep": [0, 2]}}], keras.Model(inputs, x))
    assert "block_1_dense" not in [layer.name for layer in result.model.layers]


def test_a_vocabulary_is_pruned_and_the_data_with_it(tmp_path):
    layers = [keras.layers.Embedding(50, 4), keras.layers.Flatten(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    ids = np.random.default_rng(0).choice([0, 7, 30, 49], size=(40, 3)).astype("int32")
    y = (ids[:, 0] > 10).astype("int32")
    stages = [{"prune_vocabulary": {}}, {"train": {"epochs": 1}}]
    result = apply(stages, model, (ids, y), output=tmp_path)
    assert result.model.layers[-3].input_dim == 4
    found = np.load(tmp_path / "vocabulary.npz")
    assert found["kept"].tolist() == [0, 7, 30, 49]
    assert found["old_to_new"][[0, 7, 30, 49]].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="cannot teach"):
        apply([{"prune_vocabulary": {}}, {"distillation": {}}], model, (ids, y))


def test_a_budget_that_is_missed_is_named():
    recipe = Recipe.parse("{stages: [{prune: {sparsity: 0.5}}], budget: {max_parameters: 100}}")
    assert recipe.apply(mlp(), verbose=0).missed == ("result: parameters 259, the budget is 100",)
    recipe = Recipe.parse("{stages: [{prune: {sparsity: 0.5}}], budget: {max_parameters: 259}}")
    assert recipe.apply(mlp(), verbose=0).missed == ()


def test_a_drop_of_accuracy_is_measured_on_held_out_examples():
    metrics = {"original": {"accuracy": 0.9}, "result": {"accuracy": 0.9}, "m": {"accuracy": 0.85}}
    budget = Recipe.parse("{stages: [{fold: }], budget: {max_drop: 0.02}}").budget
    (missed,) = run._missed(budget, metrics)
    assert missed.startswith("m: accuracy 85.00%")


def test_errors_name_the_stage_and_leave_nothing(tmp_path, data):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"Stage 2 \(pruning\): it needs data"):
        apply([{"fold": {}}, {"pruning": {"sparsity": 0.5}}], output=out)
    assert not out.exists()
    stages = [{"export": {"path": "m.tflite"}}, {"shrink": {"ratio": 0.5, "include": "*nothing*"}}]
    with pytest.raises(ValueError, match=r"Stage 2 \(shrink\).*nothing"):
        apply(stages, data=data, output=out)
    assert not out.exists()


def test_what_is_there_already_is_not_replaced_by_a_saved_model(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("precious")
    with pytest.raises(ValueError, match="is there already"):
        apply([{"export": {"path": "photos"}}], output=tmp_path)
    assert (tmp_path / "photos" / "a.png").exists()


def test_unbuilt_models_and_data_of_another_shape_are_refused(data):
    with pytest.raises(ValueError, match="no weights yet"):
        apply([{"fold": {}}], keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match="takes"):
        apply([{"fold": {}}], data=(data[0][:, :5], data[1]))


@pytest.mark.parametrize(
    "activation, units, labels, expected",
    [
        ("softmax", 3, np.array([0, 1, 2]), keras.losses.SparseCategoricalCrossentropy),
        (None, 3, np.array([0, 1, 2]), keras.losses.SparseCategoricalCrossentropy),
        (None, 3, np.eye(3), keras.losses.CategoricalCrossentropy),
        ("sigmoid", 1, np.array([0, 1, 1]), keras.losses.BinaryCrossentropy),
        (None, 1, np.array([0.5, 1.5, 2.0]), keras.losses.MeanSquaredError),
        (None, 2, np.array([[0.5, 1.5], [2.0, 1.0]]), keras.losses.MeanSquaredError),
    ],
)
def test_the_loss_follows_from_outputs_and_labels(activation, units, labels, expected):
    from tfcompress.data import Data
    from tfcompress.recipe.training import infer_loss

    layers = [keras.Input((4,)), keras.layers.Dense(units, activation=activation)]
    pair = np.zeros((len(labels), 4), "float32"), labels
    loss = infer_loss(keras.Sequential(layers), Data(pair, pair))
    assert type(loss) is expected
    if "Crossentropy" in expected.__name__:
        assert loss.get_config()["from_logits"] == (activation is None)
