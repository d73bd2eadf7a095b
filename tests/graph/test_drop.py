"""`drop_layers`: equal to a model that never had the blocks."""

import keras
import numpy as np
import pytest
from keras import layers

from tfcompress.graph import drop


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def tokens():
    ids = np.random.default_rng(0).integers(1, 40, (3, 7)).astype("int32")
    mask = np.arange(7) < np.array([[7], [5], [3]])
    return {"token_ids": ids, "padding_mask": mask.astype("int32"), "segment_ids": ids % 2}


def backbone(cls, num_layers, **kwargs):
    models = pytest.importorskip("keras_hub.models")
    return getattr(models, cls)(
        vocabulary_size=40,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=9,
        **kwargs,
    )


def assert_is(shallow, by_hand, sources, x):
    """`shallow` computes what `by_hand` does with the weights of `sources`."""
    by_hand.set_weights(sources)
    a, b = shallow.predict(x, verbose=0), by_hand.predict(x, verbose=0)
    for one, other in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def weights_without(model, *dropped):
    return [x.numpy() for x in model.weights if not any(f"{d}/" in x.path for d in dropped)]


@pytest.mark.parametrize("cls", ["BertBackbone", "GPT2Backbone"])
def test_a_transformer_without_a_layer_is_the_one_with_fewer(cls):
    deep = backbone(cls, 4)
    x = tokens() if cls == "BertBackbone" else {k: tokens()[k] for k in deep.input}
    before = keras.tree.flatten(deep.predict(x, verbose=0))
    shallow = drop.drop_layers(deep, keep=[0, 2])
    names = ["transformer_layer_1", "transformer_layer_3"]
    assert_is(shallow, backbone(cls, 2), weights_without(deep, *names), x)
    globbed = drop.drop_layers(deep, "transformer_layer_[13]").predict(x, verbose=0)
    after = keras.tree.flatten(shallow.predict(x, verbose=0))
    for one, other in zip(keras.tree.flatten(globbed), after, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before, keras.tree.flatten(deep.predict(x, verbose=0)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(np.allclose(a, b) for a, b in zip(before[:1], after[:1], strict=True))


def test_blocks_of_bert_are_its_layers():
    found = drop.blocks(backbone("BertBackbone", 3))
    assert [x.name for x in found] == [f"transformer_layer_{i}" for i in range(3)]
    assert all(x.is_droppable for x in found)
    assert "transformer_layer_1_feedforward_output_dense" in found[1].layers


def resnet(stages, named):
    """Residual blocks of the given widths; one that changes the width has a convolution beside."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(stages[0], 3, padding="same")(x)
    for i, width in enumerate(stages):

        def name(part, i=i):
            return f"stage_block{i}_{part}" if named else None

        h = layers.Conv2D(width, 3, padding="same", name=name("1_conv"))(x)
        h = layers.BatchNormalization(name=name("1_bn"))(h)
        h = layers.ReLU(name=name("1_relu"))(h)
        h = layers.Conv2D(width, 3, padding="same", name=name("2_conv"))(h)
        if x.shape[-1] != width:
            x = layers.Conv2D(width, 1, name=name("0_conv"))(x)
        x = layers.ReLU(name=name("out"))(layers.Add(name=name("add"))([h, x]))
    x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def test_resnet_blocks_by_name_with_the_reason_of_the_one_that_changes_the_width():
    model = resnet([4, 4, 6, 6], named=True)
    found = drop.blocks(model)
    assert [x.name for x in found] == [f"stage_block{i}" for i in range(4)]
    assert [x.is_droppable for x in found] == [True, True, False, True]
    with pytest.raises(ValueError, match=r"cannot drop 'stage_block2'.*\(None, 8, 8, 6\)"):
        drop.drop_layers(model, "*block2")


@pytest.mark.parametrize("named", [True, False])
def test_resnet_without_a_block_is_the_one_without(named):
    model = resnet([4, 4, 4, 6, 6], named)
    found = drop.blocks(model)
    # Without names, the blocks that repeat are found, not the one that changes the width.
    expected = [True, True, True, False, True] if named else [True, True, True]
    assert [x.is_droppable for x in found] == expected
    inner = [x.numpy() for x in model.weights]
    # A block has two convolutions with bias and a batch norm: 8 weights; 2 are before the first.
    kept = inner[:10] + inner[18:]
    indices = [i for i in range(len(found)) if i != 1]
    shallow = drop.drop_layers(model, keep=indices)
    assert_is(shallow, resnet([4, 4, 6, 6], named), kept, floats(3, 8, 8, 3))


def pre_norm(count):
    """Attention and feed-forward under automatic names, with a mask from a second input."""
    x = inputs = keras.Input((6, 8))
    mask = keras.Input((6, 6), dtype="bool")
    for _ in range(count):
        h = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(h, h, attention_mask=mask)])
        h = layers.Dense(8)(layers.Dense(12, "gelu")(layers.LayerNormalization()(x)))
        x = layers.Add()([x, h])
    return keras.Model([inputs, mask], layers.Dense(2)(layers.LayerNormalization()(x)))


def test_structure_finds_transformer_layers_that_have_no_names():
    deep = pre_norm(4)
    found = drop.blocks(deep)
    assert len(found) == 4
    assert all(x.is_droppable and len(x.layers) == len(found[0].layers) for x in found)
    weights = deep.get_weights()
    each = (len(weights) - 4) // 4
    kept = weights[:each] + weights[3 * each :]
    x = [floats(2, 6, 8), np.tril(np.ones((2, 6, 6), bool))]
    assert_is(drop.drop_layers(deep, keep=[0, -1]), pre_norm(2), kept, x)


def test_a_bias_that_the_first_block_makes_for_all_stays():
    """As in T5, the first layer computes from a side input what the others read."""
    inputs, side = keras.Input((8,)), keras.Input((3,))
    bias = layers.Dense(8, name="layer_0_bias")(side)
    x = inputs
    for i in range(3):
        h = layers.Dense(8, name=f"layer_{i}_dense")(x)
        x = layers.Add(name=f"layer_{i}_add")([x, h, bias])
    model = keras.Model([inputs, side], x)
    shallow = drop.drop_layers(model, "layer_0")
    assert "layer_0_bias" in [x.name for x in shallow.layers]
    assert "layer_0_dense" not in [x.name for x in shallow.layers]
    data = floats(2, 8), floats(2, 3)
    bias = model.get_layer("layer_0_bias")(data[1])
    y = data[0]
    for i in (1, 2):
        y = y + model.get_layer(f"layer_{i}_dense")(y) + bias
    np.testing.assert_allclose(shallow.predict(data, verbose=0), y, atol=1e-6)


def chain():
    x = inputs = keras.Input((4,))
    for i in range(3):
        h = layers.Dense(4, name=f"block_{i}_dense")(x)
        x = layers.Add(name=f"block_{i}_add")([x, h])
    return keras.Model(inputs, [x, h])


@pytest.mark.parametrize("dropped", ["transformer_encoder_layer_0", "transformer_decoder_layer_1"])
def test_t5_without_a_layer_keeps_the_bias_that_the_first_one_makes(dropped):
    models = pytest.importorskip("keras_hub.models")
    model = models.T5Backbone(40, 2, 2, 8, 16)
    for variable in model.weights:
        variable.assign(np.random.default_rng(0).normal(0, 0.3, variable.shape))
    found = {block.name: block.is_droppable for block in drop.blocks(model)}
    assert found == {
        f"transformer_{part}_layer_{number}": True
        for part in ("encoder", "decoder")
        for number in "01"
    }
    x = {
        f"{part}_{name}": tokens()[name]
        for part in ("encoder", "decoder")
        for name in ("token_ids", "padding_mask")
    }
    shallow = drop.drop_layers(model, dropped)
    # A residual block that adds nothing is one that is not there.
    for variable in model.weights:
        if f"{dropped}/" in variable.path and "output_projector" in variable.path:
            variable.assign(np.zeros(variable.shape))
    for one, other in zip(
        keras.tree.flatten(shallow(x)), keras.tree.flatten(model(x)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    kept = {path.path for path in shallow.weights}
    assert not any(f"{dropped}_cross" in path or f"{dropped}_input" in path for path in kept)


def test_two_tensors_read_outside_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'block_2': 2 of its tensors.*block_2_dense"):
        drop.drop_layers(chain(), "block_2")


def test_weights_are_new_and_the_result_saves_and_loads(tmp_path):
    model = chain()
    shallow = drop.drop_layers(model, "block_1")
    assert shallow.get_layer("block_0_dense").kernel is not model.get_layer("block_0_dense").kernel
    shallow.save(tmp_path / "m.keras")
    loaded, x = keras.saving.load_model(tmp_path / "m.keras"), floats(2, 4)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0)[0], shallow.predict(x, verbose=0)[0])


def test_any_other_part_can_be_named():
    x = inputs = keras.Input((4,))
    for name in ("first", "second"):
        x = layers.Add(name=f"{name}_sum")([x, layers.Dense(4, name=f"{name}_dense")(x)])
    model = keras.Model(inputs, x)
    assert [x.name for x in drop.drop_layers(model, "second").layers[1:]] == [
        "first_dense",
        "first_sum",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either layers or keep"),
        ({"layers": "a", "keep": [0]}, "Give either layers or keep"),
        ({"layers": "block_9"}, r"'block_9' fits no block.*'block_0', 'block_1', 'block_2'"),
        ({"keep": [0, 3]}, r"\[3\], but .* has 3 repeated blocks"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        drop.drop_layers(chain(), **arguments)
