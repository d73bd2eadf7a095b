"""Students made of their teachers."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from tests.distillation.networks import attentive, data, entropy
from tfcompress import distillation
from tfcompress.distillation import Distiller
from tfcompress.distillation.student import spread

X, Y = data()


def weights(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]


def residual(blocks=4, width=16, name="residual"):
    x = inputs = keras.Input((6,))
    for i in range(blocks):
        h = layers.Dense(width, activation="relu", name=f"block_{i}_in")(x)
        h = layers.Dense(6, name=f"block_{i}_out")(h)
        x = layers.Add(name=f"block_{i}_add")([x, h])
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name=name)


def cnn(filters=16):
    x = inputs = keras.Input((8, 8, 1))
    for i in range(2):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv_{i}")(x)
        x = layers.ReLU(name=f"relu_{i}")(layers.BatchNormalization(name=f"norm_{i}")(x))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="cnn")


def bert(num_layers=4, heads=4):
    models = pytest.importorskip("keras_hub").models
    backbone = models.BertBackbone(
        vocabulary_size=30,
        num_layers=num_layers,
        num_heads=heads,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=6,
        dropout=0.0,
        name="backbone",
    )
    task = models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)
    return keras.Model(task.input, task.output, name="bert")


def tokens():
    random = np.random.default_rng(0)
    mask = np.arange(6)[None] < random.integers(2, 7, (32, 1))
    ids = np.where(mask, random.integers(1, 30, (32, 6)), 0).astype("int32")
    padding = mask.astype("int32")
    return {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": padding}


def test_layers_are_taken_as_distilbert_takes_them():
    # https://github.com/huggingface/transformers, extract_distilbert.py
    assert spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert (spread(6, 3), spread(5, 1), spread(3, 3), spread(3, 0)) == (
        [0, 2, 5],
        [0],
        [0, 1, 2],
        [],
    )
    for count in range(1, 20):
        for chosen in range(2, count + 1):
            found = spread(count, chosen)
            assert found == sorted(set(found)) and len(found) == chosen
            assert (found[0], found[-1]) == (0, count - 1)


@pytest.mark.parametrize(
    ("given", "kept"), [(2, (0, 3)), ([1, -1], (1, 3)), (range(0, 4, 2), (0, 2))]
)
def test_the_layers_that_stay_have_the_teachers_weights(given, kept):
    teacher = residual()
    before = weights(teacher)
    small = distillation.student(teacher, layers=given)
    named = {layer.name: layer for layer in small.layers}
    assert [n for n in named if n.endswith("_in")] == [f"block_{i}_in" for i in kept]
    for name, layer in named.items():
        for one, two in zip(layer.weights, teacher.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(one, two)
    assert not {id(v) for v in small.variables} & {id(v) for v in teacher.variables}
    for variable in small.variables:
        variable.assign(0 * variable)
    for one, two in zip(before, weights(teacher), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_narrower_cnn_has_the_strongest_channels():
    teacher = cnn()
    teacher.get_layer("conv_0").kernel.assign_add(np.arange(16.0) * np.ones((3, 3, 1, 16)))
    small = distillation.student(teacher, width=0.5)
    strongest = teacher.get_layer("conv_0").kernel.numpy()[..., 8:]
    np.testing.assert_array_equal(small.get_layer("conv_0").kernel, strongest)
    assert [w.shape for w in small.get_layer("head").weights] == [(8, 3), (3,)]
    assert small.output_shape == teacher.output_shape
    assert {type(layer).__module__.split(".")[0] for layer in small.layers} == {"keras"}


def test_a_narrower_bert_keeps_its_hidden_width_and_the_size_of_a_head():
    teacher = bert()
    x = tokens()
    before = weights(teacher), teacher.predict(x, verbose=0)
    small = distillation.student(teacher, layers=2, width=0.5)
    shapes = {w.path: tuple(w.shape) for w in small.weights}
    start = "backbone_transformer_layer_3_"
    assert shapes[f"{start}self_attention_layer_query/kernel"] == (16, 2, 4)
    assert shapes[f"{start}self_attention_layer_value/kernel"] == (16, 2, 4)
    assert shapes[f"{start}feedforward_intermediate_dense/kernel"] == (16, 16)
    assert shapes[f"{start}feedforward_layer_norm/gamma"] == (16,)
    assert {path.split("_layer_")[1][0] for path in shapes if "_layer_" in path} >= {"0", "3"}
    assert not any("_layer_1_" in path or "_layer_2_" in path for path in shapes)
    assert small.predict(x, verbose=0).shape == (32, 3)
    for one, two in zip(before[0], weights(teacher), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(before[1], teacher.predict(x, verbose=0))


def test_what_globs_name_is_narrowed_alone():
    small = distillation.student(residual(), width={"*block_1_in*": 0.25}, round_to=1)
    assert [small.get_layer(f"block_{i}_in").units for i in range(4)] == [16, 4, 16, 16]
    small = distillation.student(residual(), width=0.5, exclude="*block_0_in*")
    assert [small.get_layer(f"block_{i}_in").units for i in range(4)] == [16, 8, 8, 8]


@pytest.mark.parametrize("width", [None, 1, {"*": 1.0}])
def test_with_all_of_it_a_student_is_a_copy(width):
    teacher = cnn()
    teacher.get_layer("norm_0").moving_mean.assign_add(np.ones(16))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1))
    twin = distillation.student(teacher, width=width)
    np.testing.assert_array_equal(twin.predict(x, verbose=0), teacher.predict(x, verbose=0))
    Distiller(teacher, twin, "logits")  # Shares no weight.


def test_every_layer_learns_from_the_one_it_was():
    teacher = bert(3)
    small = distillation.student(teacher, layers=[0, 2])
    norms = "*feedforward_layer_norm"
    losses = [
        distillation.Features(norms, norms, mapping="same"),
        distillation.Attention("*layer_0*", "*layer_0*", mapping="same"),
    ]
    distiller = Distiller(teacher, small, losses, [0.0, 1.0], 0.0, mask="padding_mask")
    states, attention = (term.pairs for term in distiller._terms)
    path = "backbone/transformer_layer_2/feedforward_layer_norm"
    assert states[1].teacher == (path,)
    assert states[1].student == (path.replace("/", "_"),)
    path = "backbone/transformer_layer_0/self_attention_layer/query"
    assert (attention[0].teacher[0], attention[0].student[0]) == (path, path.replace("/", "_"))
    distiller.compile("sgd")
    found = distiller.evaluate(tokens(), verbose=0, return_dict=True)
    # The second layer reads what the first makes and not what the second made.
    assert found["attention_loss"] < 1e-12 < 1e-8 < found["features_loss"]


@pytest.mark.slow
def test_it_learns_like_any_other():
    teacher = residual()
    small = distillation.student(teacher, layers=2, width=0.5)
    distiller = Distiller(teacher, small, ["logits", "features"])
    distiller.compile("adam", entropy())
    history = distiller.fit(X, Y, epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.slow
def test_it_is_saved_plain(tmp_path):
    distillation.student(residual(), layers=2, width=0.5).save(tmp_path / "student.keras")
    code = (
        "import sys, keras; keras.models.load_model(sys.argv[1]);"
        "assert 'tfcompress' not in sys.modules"
    )
    path = str(tmp_path / "student.keras")
    subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True)


def stages():
    """Three blocks of which the middle one makes another width."""
    x = inputs = keras.Input((8, 8, 4))
    for i, filters in enumerate((4, 6, 6, 6)):
        h = layers.Conv2D(filters, 3, padding="same", name=f"block{i}_conv")(x)
        h = layers.ReLU(name=f"block{i}_relu")(h)
        if x.shape[-1] != filters:
            x = layers.Conv2D(filters, 1, name=f"block{i}_short")(x)
        x = layers.Add(name=f"block{i}_add")([x, h])
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="stages")


def test_blocks_that_cannot_be_dropped_stay():
    small = distillation.student(stages(), layers=2)
    assert [x.name for x in small.layers if x.name.endswith("conv")] == [
        "block0_conv",
        "block1_conv",
    ]
    with pytest.raises(ValueError, match="cannot drop 'block1'"):
        distillation.student(stages(), layers=[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distillation.student(residual(), layers=5), "layers=5 of the 4 blocks.*1 to 4"),
        (lambda: distillation.student(residual(), layers=0), "1 to 4"),
        (lambda: distillation.student(residual(), layers=[]), "how many blocks stay"),
        (lambda: distillation.student(residual(), layers=True), "how many blocks stay"),
        (lambda: distillation.student(residual(), layers="block_0"), "layers=2"),
        (lambda: distillation.student(residual(), layers=[4]), r"has \[4\].*4 blocks"),
        (lambda: distillation.student(cnn(), layers=1), "no part of the teacher repeats"),
        (lambda: distillation.student(residual(), width=0.0), r"\(0, 1\]"),
        (lambda: distillation.student(residual(), width="half"), r"\(0, 1\]"),
        (lambda: distillation.student(residual(), 2, criterion="l1"), "width is None"),
        (lambda: distillation.student(normed(), width=0.5), r"layer norm.*width=\{'\*': 0.5\}"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def normed():
    x = inputs = keras.Input((6,))
    x = layers.LayerNormalization()(layers.Dense(16)(x))
    return keras.Model(inputs, layers.Dense(3)(x), name="normed")


def test_same_needs_a_layer_of_the_name():
    teacher, other = attentive(layers=2), attentive(layers=3)
    with pytest.raises(ValueError, match=r"no layer of the teacher for \['attention_2'\]"):
        Distiller(teacher, other, distillation.Attention(mapping="same"))
    Distiller(other, teacher, distillation.Attention(mapping="same"))
