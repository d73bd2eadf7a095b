"""State on a model; holds what it relies on in Keras: the walk of saving over attributes."""

import keras
import numpy as np
import pytest
from keras.src.saving.keras_saveable import KerasSaveable

from tests.models import mlp
from tfcompress.keras_hooks.state import CompressionState, add_state, find_state, remove_state


def test_keras_saves_what_hangs_on_a_model_as_a_keras_saveable(tmp_path):
    model = mlp()
    add_state(model, "mask/hidden", np.array([True, False]), "bool")
    model.save_weights(tmp_path / "m.weights.h5")
    restored = mlp()
    variable = add_state(restored, "mask/hidden", np.array([True, True]), "bool")
    restored.load_weights(tmp_path / "m.weights.h5")
    assert variable.numpy().tolist() == [True, False]
    assert isinstance(restored.compression_state, KerasSaveable)


def test_keras_accepts_the_kind_that_the_state_gives():
    from keras.src.saving.saving_lib import get_attr_skipset

    assert "entries" not in get_attr_skipset(CompressionState()._obj_type())


def test_a_file_with_state_loads_as_a_plain_model(tmp_path):
    model = mlp()
    add_state(model, "step", 3, "int64")
    model.save(tmp_path / "m.keras")
    plain = keras.models.load_model(tmp_path / "m.keras")
    assert "compression_state" not in vars(plain)
    np.testing.assert_array_equal(plain.layers[0].kernel, model.layers[0].kernel)


def test_a_plain_file_loads_into_a_model_with_state(tmp_path):
    mlp().save_weights(tmp_path / "m.weights.h5")
    model = mlp()
    step = add_state(model, "step", 3, "int64")
    model.load_weights(tmp_path / "m.weights.h5")
    assert int(step.numpy()) == 3


def test_the_state_of_another_run_is_refused(tmp_path):
    model = mlp()
    add_state(model, "a", 3, "int64")
    model.save_weights(tmp_path / "m.weights.h5")
    other = mlp()
    add_state(other, "b", 3, "int64")
    with pytest.raises(ValueError, match="the state of another compression run: it lacks"):
        other.load_weights(tmp_path / "m.weights.h5")


def test_only_the_given_variables_are_removed():
    model = mlp()
    old = add_state(model, "step", 1, "int64")
    new = add_state(model, "step", 2, "int64")
    remove_state(model, {"step": old})
    assert find_state(model) == {"step": new}
    remove_state(model, {"step": new})
    assert "compression_state" not in vars(model)
    assert find_state(model) == {}


def test_entries_are_found_by_prefix():
    model = mlp()
    low = add_state(model, "ranges/low", 0.0, "float32")
    add_state(model, "other", 0.0, "float32")
    assert find_state(model, "ranges/") == {"low": low}
