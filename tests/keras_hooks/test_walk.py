"""Which weights are chosen; holds what it relies on in Keras: the class of Functional models."""

import keras
import pytest

from tests.models import mlp, nested, subclassed
from tfcompress.keras_hooks.walk import is_graph, named_variables, select_kernels, trained_model


def test_nested_and_shared_kernels_are_found_once():
    selected, skipped = select_kernels(nested())
    assert [path.split("/")[-2] for path in selected] == ["inner", "shared", "head"]
    assert set(skipped.values()) == {"not a kernel: fewer than 2 axes"}


def test_a_tied_weight_comes_once():
    embedding = keras.layers.Embedding(7, 4)
    inputs = keras.Input((3,), dtype="int32")
    x = embedding(inputs)
    model = keras.Model(inputs, keras.ops.matmul(x, keras.ops.transpose(embedding.embeddings)))
    assert len(named_variables(model)) == 1


def test_equal_paths_are_told_apart():
    first, second = keras.layers.Dense(2, name="same"), keras.layers.Dense(2, name="same")
    first.build((None, 3))
    second.build((None, 2))
    model = keras.Sequential([keras.Sequential([first], name="a"), second])
    model.build((None, 3))
    assert first.kernel.path == second.kernel.path
    assert list(named_variables(model)) == [
        "same/kernel",
        "same/bias",
        "same/kernel#2",
        "same/bias#2",
    ]


def test_every_variable_that_is_skipped_has_its_reason():
    inputs = keras.Input((4, 6))
    x = keras.layers.LayerNormalization(axis=[1, 2])(inputs)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = keras.layers.Dense(5, trainable=False, name="frozen")(x)
    _, skipped = select_kernels(keras.Model(inputs, x), exclude="*value/kernel")
    reasons = {"/".join(path.split("/")[-2:]): reason for path, reason in skipped.items()}
    assert reasons == {
        "layer_normalization/gamma": "not a kernel: named gamma",
        "layer_normalization/beta": "not a kernel: named beta",
        "query/bias": "not a kernel: named bias",
        "key/bias": "not a kernel: named bias",
        "value/kernel": "excluded",
        "value/bias": "not a kernel: named bias",
        "attention_output/bias": "not a kernel: fewer than 2 axes",
        "frozen/kernel": "frozen: trainable=False",
        "frozen/bias": "not a kernel: fewer than 2 axes",
    }


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(argument):
    with pytest.raises(ValueError, match="The glob 'nothing' matches no variable.*mlp.*kernel"):
        select_kernels(mlp(), **{argument: ["nothing"]})


def test_a_model_without_kernels_is_refused():
    model = keras.Sequential([keras.Input((3,)), keras.layers.LayerNormalization()])
    with pytest.raises(ValueError, match="has no weight to compress.*check include, exclude"):
        select_kernels(model)


def test_the_student_is_what_a_distiller_trains():
    teacher, student = mlp(), mlp()
    loss = keras.distillation.LogitsDistillation()
    distiller = keras.distillation.Distiller(teacher, student, loss)
    assert trained_model(distiller) is student
    assert trained_model(student) is student


def test_functional_and_sequential_models_are_graphs():
    assert is_graph(mlp())
    assert is_graph(nested())
    assert not is_graph(subclassed())
