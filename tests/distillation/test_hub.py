"""Distillation of KerasHub models, whose paddings are an input and whose layers are nested."""

import keras
import numpy as np
import pytest

from tests.distillation.networks import entropy
from tfcompress import distillation
from tfcompress.distillation import Distiller, losses

models = pytest.importorskip("keras_hub").models


def classifier(layers, width, name):
    backbone = models.BertBackbone(
        vocabulary_size=30,
        num_layers=layers,
        num_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        max_sequence_length=6,
        dropout=0.0,
    )
    return models.BertTextClassifier(backbone, num_classes=3, preprocessor=None, name=name)


def tokens(padding=0):
    random = np.random.default_rng(0)
    mask = np.arange(6)[None] < random.integers(2, 7, (32, 1))
    ids = np.where(mask, random.integers(1, 30, (32, 6)), padding)
    inputs = {
        "token_ids": ids.astype("int32"),
        "segment_ids": np.zeros((32, 6), "int32"),
        "padding_mask": mask.astype("int32"),
    }
    return inputs, ids[:, 0] % 3


def test_a_bert_teaches_a_smaller_one():
    teacher, student = classifier(4, 12, "teacher"), classifier(2, 8, "student")
    states = distillation.Features("*transformer_layer_?", "*transformer_layer_?")
    chosen = ["logits", states, "relations", distillation.Attention(mapping="last")]
    distiller = Distiller(teacher, student, chosen, student_loss_weight=0.0, mask="padding_mask")
    for variable in [*teacher.variables, *student.variables]:
        if variable.path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            variable.assign(30 * variable)  # New ones attend to everything alike.
    distiller.compile(keras.optimizers.Adam(3e-3), entropy())
    history = distiller.fit(*tokens(), epochs=12, verbose=0).history
    for name in ("features", "relations", "attention"):
        assert history[f"{name}_loss"][-1] < history[f"{name}_loss"][0], name
    assert len(distiller.heads) == 2
    assert distiller._terms[1].pairs[0].teacher[0].endswith("transformer_layer_1")


def test_what_is_padded_does_not_matter():
    keras.utils.set_random_seed(0)
    teacher, student = classifier(2, 12, "teacher"), classifier(2, 8, "student")
    states = distillation.Features("*transformer_layer_?", "*transformer_layer_?")
    chosen = [states, "relations", "attention", distillation.Attention(on="maps")]
    distiller = Distiller(teacher, student, chosen, mask="padding_mask")
    distiller.compile("sgd", entropy())
    found = []
    for padding in (0, 7):
        x, y = tokens(padding)
        y = tokens()[1]
        found.append(distiller.evaluate(x, y, verbose=0, return_dict=True))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    wrong = Distiller(teacher, student, states, mask="mask")
    wrong.compile("sgd", entropy())
    with pytest.raises(ValueError, match="mask='mask' names no input"):
        wrong.evaluate(*tokens(), verbose=0)


def test_a_relation_is_that_of_the_models_own_queries():
    teacher, student = classifier(1, 12, "teacher"), classifier(1, 8, "student")
    loss = distillation.Relations(relations=("qq",))
    distiller = Distiller(teacher, student, loss, student_loss_weight=0.0)
    distiller.compile("sgd")
    x, _ = tokens()
    queries = []
    for model in (teacher, student):
        backbone = model.backbone
        attention = backbone.get_layer("transformer_layer_0")
        hidden = keras.Model(backbone.input, attention.input[0])(x)
        found = [each for each in attention._flatten_layers() if each.name == "query"]
        queries.append([found[0](hidden)] * 3)
    expected = float(loss(*queries, losses.DEFAULT))
    assert distiller.evaluate(x, verbose=0, return_dict=True)["loss"] == pytest.approx(
        expected, rel=1e-4
    )
