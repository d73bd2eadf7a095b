"""What the rules of `groups` couple: sequence models of KerasHub, and single ops."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.architectures import ARCHITECTURES
from tfcompress.graph import Plan, expand, shrink
from tfcompress.graph.groups import Coupling, groups


def sizes_of(model):
    """Name of a group, as in a flat graph -> how many units it has."""
    found = groups(Coupling(expand(model)))
    return {group.name.replace("/", "_"): group.size for group in found}


# Name in the table -> how the groups of heads, and of neurons, of one block end.
BLOCKS = {
    "GPT-2": ("r_1_self_attention_key_kernel:1", "r_1_feedforward_intermediate_dense_kernel:1"),
    "T5": (
        "decoder_layer_1_cross_attention_query_projector_kernel:1",
        "_1_input_projector_kernel:1",
    ),
    "Whisper": (
        "r_1_cross_attention_query_kernel:1",
        "r_1_feedforward_intermediate_dense_kernel:1",
    ),
    "ViT": ("_2_mha_query_kernel:1", "_2_mlp_dense_1_kernel:1"),
    "DeBERTa-v3": (
        "r_1_self_attention_layer_key_kernel:1",
        "r_1_feedforward_intermediate_dense_kernel:1",
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformers_of_keras_hub_lose_heads_and_neurons(name, tmp_path):
    architecture, random = ARCHITECTURES[f"keras_hub.{name}"], np.random.default_rng(0)
    model, inputs = architecture.build(), architecture.batch(random)
    flat = expand(model)
    np.testing.assert_array_equal(
        keras.tree.flatten(flat(inputs))[0], keras.tree.flatten(model(inputs))[0]
    )
    found = sizes_of(model)
    heads, neurons = ([x for x in found if x.endswith(end)] for end in BLOCKS[name])
    assert {found[x] for x in heads} == {2} and {found[x] for x in neurons} == {32}

    small = shrink(model, ratio=0.5)
    left = sizes_of(small)
    assert {left[x] for x in neurons} == {16}
    # One head is no group any more; in T5 its size takes its name.
    assert all(left.get(x, 1) in (1, 4) for x in heads)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    for x, y in zip(
        keras.tree.flatten(loaded(inputs)), keras.tree.flatten(small(inputs)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_small_gpt_2_is_halved_for_any_batch_and_length(tmp_path):
    hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(0)
    backbone = hub.models.GPT2Backbone(60, 2, 4, 32, 64, max_sequence_length=16)
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits, name="gpt")

    def batch(count, length):
        ids = np.random.default_rng(count).integers(1, 60, (count, length)).astype("int32")
        padding = np.ones_like(ids)
        padding[0, length - 1 :] = 0
        return {"token_ids": ids, "padding_mask": padding}

    small = shrink(model, ratio=0.5)
    widths = {x.name: x.kernel.shape for x in small.layers if hasattr(x, "kernel")}
    assert widths["transformer_layer_0_self_attention_query"] == (16, 2, 4)
    assert widths["transformer_layer_0_feedforward_intermediate_dense"] == (16, 32)

    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    flat = expand(model)
    for count, length in [(2, 9), (1, 3), (3, 16)]:
        data = batch(count, length)
        np.testing.assert_array_equal(flat(data), model(data))
        np.testing.assert_array_equal(loaded(data), small(data))
    small.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = batch(8, 12)
    losses = small.fit(data, data["token_ids"], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def shrunk_and_masked(function, removed, width=8, **dense):
    """The outputs of a plan's `apply` and `mask` on Dense, function, Dense."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 5))
    h = function(layers.Dense(width, name="before", **dense)(x))
    model = keras.Model(x, layers.Dense(3, name="after")(h), name="model")
    for variable in model.weights:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    data = np.random.default_rng(2).normal(size=(2, 6, 5)).astype("float32")
    plan = Plan({"before/kernel:1": removed}, {"before/kernel:1": width})
    return plan.apply(model)(data), plan.mask(model)(data)


FUNCTIONS = {
    "take": lambda h: ops.take(h, np.array([3, 0, 0, 5]), axis=1),
    "take along an axis": lambda h: ops.take_along_axis(h, np.array([[[3], [0], [5]]]), axis=1),
    "cumsum": lambda h: ops.cumsum(h, axis=1),
    "ones like": lambda h: h * ops.ones_like(h)[:, :, 0][..., None],
    "full like": lambda h: h + ops.full_like(h, 2.0) * h,
    "pad": lambda h: ops.pad(h, [[0, 0], [2, 1], [0, 0]]),
    "repeat": lambda h: h * ops.repeat(ops.ones_like(h)[:, :, 0][..., None] * 2, 8, axis=-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_behind_an_op_can_go(name):
    small, masked = shrunk_and_masked(FUNCTIONS[name], (1, 4, 5))
    np.testing.assert_allclose(small, masked, atol=1e-5)


OPAQUE = {
    "take of channels": lambda h: ops.take(h, np.array([3, 0, 0, 5, 1, 2, 7, 7]), axis=-1),
    "cumsum over channels": lambda h: ops.cumsum(h, axis=-1),
    "padded channels": lambda h: ops.pad(h, [[0, 0], [0, 0], [1, 0]])[..., 1:],
    "padded with ones": lambda h: ops.pad(h, [[0, 0], [2, 1], [0, 0]], constant_values=1.0),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_channels_that_an_op_tells_apart_stay(name):
    x = keras.Input((6, 5))
    model = keras.Model(x, layers.Dense(3)(OPAQUE[name](layers.Dense(8, name="before")(x))))
    assert not any("before" in group for group in sizes_of(model))
