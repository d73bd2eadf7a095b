"""A recipe knows what the public objects do: every argument of each."""

import inspect

import pytest

import tfcompress as tfc
from tfcompress.recipe.objects import SCHEDULES, build
from tfcompress.recipe.recipe import Stage
from tfcompress.recipe.techniques import PASSES, TRAINING, Export

# What a run gives, or what no text can say: functions.
LEFT_OUT = {
    "model", "calibration", "verify_on", "verbose", "student", "teacher_weights", "name", "data",
    "cost", "target_cost",
}  # fmt: skip
PUBLIC = {
    "l1": tfc.callbacks.L1Regularization,
    "threshold": tfc.callbacks.ThresholdPruning,
    "pruning": tfc.callbacks.Pruning,
    "qat": tfc.callbacks.QuantizationAwareTraining,
    "distillation": tfc.distillation.Distiller,
    "fold": tfc.fold_batch_norm,
    "prune": tfc.prune,
    "shrink": tfc.shrink_plan,
    "drop_layers": tfc.drop_layers,
    "factorize": tfc.factorize,
    "cluster": tfc.cluster,
    "prune_vocabulary": tfc.prune_vocabulary,
    "quantize": tfc.quantize,
    "strip": tfc.strip,
}


def test_there_is_a_stage_for_each_technique():
    assert {**TRAINING, **PASSES}.keys() == PUBLIC.keys()
    assert set(Stage.model_fields) == {*PUBLIC, "train", "export"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_can_be_said_with_its_default(name):
    model, parameters = {**TRAINING, **PASSES}[name], inspect.signature(PUBLIC[name]).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    wanted = {key for key, each in parameters.items() if each.kind not in kinds}
    assert set(model.model_fields) == wanted - LEFT_OUT
    ours = {"teacher", "distillation_losses", "keep", "special"}  # Have defaults in recipes only.
    for key, field in model.model_fields.items():
        if key not in ours:
            assert field.default == parameters[key].default, key
        assert field.description, f"{name}.{key} is not described"


def test_export_takes_what_export_takes():
    assert set(Export.model_fields) == {"path", "precision", "io", "batch_size", "tolerance"}


def test_every_schedule_of_the_package_can_be_said():
    public = {name for name in tfc.schedules.__all__ if name[0].isupper()}
    # These wrap objects that no text can hold, or are the base class.
    assert public - {"Schedule", "RewoundLearningRate", "TFMOTSchedule"} == set(SCHEDULES)


def test_a_schedule_is_the_object_of_its_name_and_shares_are_of_the_steps():
    values = {
        "name": "PolynomialDecay",
        "initial_sparsity": 0.1,
        "final_sparsity": 0.9,
        "begin_step": 5,
        "end_step": "25%",
    }
    schedule = build(SCHEDULES["PolynomialDecay"].model_validate(values), steps=400)
    assert schedule == tfc.schedules.PolynomialDecay(0.1, 0.9, 5, 100)
