"""The private Keras API that distribution rests on; what it does is tested in tests/parallel."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.base_optimizer import BaseOptimizer

from tests.models import compile_classifier, mlp
from tfcompress.keras_hooks.distribute import _batch_spec, _compiled


@pytest.mark.parametrize(
    "name",
    [
        "_make_function",
        "_maybe_symbolic_build",
        "_symbolic_build",
        "_autoconvert_optionals",
        "_compute_loss",
        "_loss_tracker",
        "_call_has_training_arg",
        "_distribute_strategy",
    ],
)
def test_a_compiled_model_has(name):
    assert hasattr(compile_classifier(mlp()), name)


@pytest.mark.parametrize(
    "name",
    [
        "_apply_weight_decay",
        "_backend_update_step",
        "_backend_increment_gradient_accumulators",
        "_overwrite_model_variables_with_average_value",
    ],
)
def test_the_plain_update_is_what_tensorflow_replaces(name):
    replaced = getattr(keras.optimizers.SGD, name)
    assert replaced is not getattr(BaseOptimizer, name)


def test_the_optimizer_knows_its_strategy_and_weights():
    model = compile_classifier(mlp())
    model.optimizer.build(model.trainable_variables)
    assert model.optimizer._distribution_strategy is model.distribute_strategy
    keys = {model.optimizer._var_key(each) for each in model.trainable_variables}
    assert set(model.optimizer._trainable_variables_indices) == keys


def test_loss_scaling_has_a_plain_update():
    assert hasattr(keras.optimizers.LossScaleOptimizer, "_tf_apply")
    assert hasattr(keras.optimizers.LossScaleOptimizer, "_common_apply")


def test_means_are_scaled_through_one_function(monkeypatch):
    monkeypatch.setattr(keras_loss, "scale_loss_for_distribution", lambda value: value * 3)
    assert float(keras.losses.MeanSquaredError()([[0.0]], [[1.0]])) == 3.0
    assert callable(keras_loss.unscale_loss_for_distribution)


def test_a_variable_can_be_created_anew_in_place():
    variable = keras.Variable([1.0, 2.0])
    before = variable._value
    variable._initialize([3.0, 4.0])
    assert variable._value is not before
    assert variable.numpy().tolist() == [3.0, 4.0]


def test_the_epoch_iterator_tells_of_a_batch_through_its_distributed_dataset():
    iterator = TFEpochIterator(
        x=np.zeros((6, 4), "float32"),
        y=np.zeros(6, "int32"),
        batch_size=2,
        distribute_strategy=tf.distribute.get_strategy(),
    )
    x, y = _batch_spec(iterator._distributed_dataset.element_spec)
    assert (x.shape.as_list()[1:], x.dtype) == ([4], tf.float32)
    assert (y.shape.as_list()[1:], y.dtype) == ([], tf.int32)


def test_get_keras_mask_reads_what_a_layer_sets():
    masked = keras.layers.Masking()(tf.constant([[[1.0], [0.0]]]))
    assert backend.get_keras_mask(masked).numpy().tolist() == [[True, False]]
    assert backend.get_keras_mask(tf.ones(1)) is None


def test_set_keras_mask_changes_what_a_layer_sees():
    x = tf.constant([[[1.0], [3.0]]])
    backend.set_keras_mask(x, tf.constant([[False, True]]))
    assert keras.layers.GlobalAveragePooling1D()(x).numpy().tolist() == [[3.0]]


def test_a_mask_comes_out_of_the_part_that_xla_compiles():
    model = compile_classifier(mlp(), jit_compile=True)
    x = tf.constant([[[1.0], [0.0]]])
    y, loss = _compiled(model, lambda: (keras.layers.Masking()(x), tf.constant(2.0)))
    assert backend.get_keras_mask(y).numpy().tolist() == [[True, False]]
    assert float(loss) == 2.0
