"""The private Keras API that variables on devices stand on. Several devices: tests/parallel."""

import keras
import numpy as np
import pytest

from tests.models import compile_classifier, mlp
from tfcompress.keras_hooks.capture import keras_mask
from tfcompress.keras_hooks.devices import build_beside, move, native, set_mask, track_loss


def test_a_moved_variable_is_the_same_keras_variable():
    """`Variable._initialize` and `_value`."""
    model = mlp()
    kernel, before = model.layers[0].kernel, native(model.layers[0].kernel)
    value = kernel.numpy()
    move([kernel], "CPU:0")
    assert model.layers[0].kernel is kernel
    assert native(kernel) is not before
    assert native(kernel) is kernel.value
    assert native(kernel).device.endswith("CPU:0")
    np.testing.assert_array_equal(kernel.numpy(), value)
    kernel.assign(2 * value)
    np.testing.assert_allclose(model.get_weights()[0], 2 * value)


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "lion", "adafactor", "ftrl"])
def test_optimizers_make_their_slots_by_add_variable_from_reference(name):
    model = mlp()
    plain, beside = keras.optimizers.get(name), keras.optimizers.get(name)
    plain.build(model.trainable_variables)
    build_beside(beside, model.trainable_variables)
    expected = [(v.path.split("/", 1)[-1], v.shape) for v in plain.variables]
    assert [(v.path.split("/", 1)[-1], v.shape) for v in beside.variables] == expected
    assert "add_variable_from_reference" not in vars(beside)
    gradients = [keras.ops.ones_like(variable) for variable in model.trainable_variables]
    before = model.get_weights()
    beside.apply(gradients, model.trainable_variables)
    assert all(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))


def test_the_tracked_loss_is_a_mean_over_examples():
    """`Trainer._loss_tracker`."""
    model = compile_classifier(mlp())
    track_loss(model, 1.0, 3)
    track_loss(model, 5.0, 1)
    assert float(model.get_metrics_result()["loss"]) == pytest.approx(2.0)


def test_masks_are_put_on_tensors():
    """`set_keras_mask`."""
    x, mask = keras.ops.ones((2, 3)), keras.ops.ones((2, 3), "bool")
    set_mask(x, None)
    assert keras_mask(x) is None
    set_mask(x, mask)
    assert keras_mask(x) is mask
