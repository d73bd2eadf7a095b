import keras
import numpy as np
import pytest

import tfcompress as tfc
from tests.models import kernels, mlp, nested, subclassed


@pytest.mark.parametrize("make", [mlp, nested, subclassed])
def test_the_count_is_exact(make):
    model = make()
    assert tfc.prune(model, sparsity=0.8) is model
    for weight in kernels(model).values():
        assert (weight == 0).sum() == weight.size - round(weight.size * 0.2)


def test_the_smallest_go_everywhere():
    model = mlp()
    before = kernels(model)
    tfc.prune(model, sparsity=0.5, allocation="global")
    kept = np.concatenate([np.abs(w[w != 0]) for w in kernels(model).values()])
    pruned = np.concatenate([np.abs(before[p][w == 0]) for p, w in kernels(model).items()])
    assert kept.min() >= pruned.max()
    assert kept.size == pruned.size


def test_a_threshold():
    model = mlp()
    before = kernels(model)
    tfc.prune(model, threshold=0.25)
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(
            weight, np.where(np.abs(before[path]) < 0.25, 0, before[path])
        )


def test_a_criterion_of_ones_own():
    model = tfc.prune(mlp(), sparsity=0.5, criterion=lambda weight: -weight)
    assert all((weight <= 0.3).all() for weight in kernels(model).values())


def conv_net():
    layers = [
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(8, 3, name="stem"),
        keras.layers.BatchNormalization(),
        keras.layers.DepthwiseConv2D(3, name="depthwise"),
        keras.layers.Flatten(),
        keras.layers.Dense(4, name="head"),
    ]
    return keras.Sequential(layers, name="net")


IMAGES = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype("float32")


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("arguments", [{"sparsity": 0.7}, {"structure": "2:4"}])
def test_calibrated_criteria_prune_what_has_inputs_to_capture(criterion, arguments):
    model = conv_net()
    depthwise = model.get_layer("depthwise").kernel.numpy()
    tfc.prune(model, criterion=criterion, calibration=IMAGES, **arguments)
    for name in ("stem", "head"):
        weight = model.get_layer(name).kernel.numpy()
        zeros = int((weight == 0).sum())
        if "sparsity" in arguments:
            assert zeros == weight.size - round(weight.size * 0.3)
        elif name == "head":
            assert zeros == weight.size // 2
        else:  # 3 input channels: one group of 3 keeps round(1.5) = 2.
            assert zeros == weight.size // 3
    np.testing.assert_array_equal(model.get_layer("depthwise").kernel.numpy(), depthwise)


def test_sparsegpt_follows_the_allocation():
    model = conv_net()
    include = ["*stem*", "*head*"]
    copy = conv_net_like(model)
    tfc.prune(copy, 0.8, allocation="erk", include=include)
    counts = {path: int((w == 0).sum()) for path, w in kernels(copy).items()}
    tfc.prune(
        model, 0.8, criterion="sparsegpt", allocation="erk", calibration=IMAGES, include=include
    )
    assert {path: int((w == 0).sum()) for path, w in kernels(model).items()} == counts


def conv_net_like(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def test_channels_of_a_depthwise_kernel_are_left_with_the_remedy(caplog):
    with caplog.at_level("INFO", "tfcompress"):
        model = tfc.prune(conv_net(), 0.5, structure="channel")
    assert "prune it by Channel(axis=-2)" in caplog.text
    assert (model.get_layer("depthwise").kernel.numpy() != 0).all()
    stem = np.abs(model.get_layer("stem").kernel.numpy()).sum((0, 1, 2))
    assert (stem == 0).sum() == 4


def test_a_dictionary_prunes_what_it_names():
    model = tfc.prune(mlp(), {"*head*": 0.5})
    hidden, head = kernels(model).values()
    assert (hidden != 0).all() and (head == 0).sum() == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either sparsity or threshold"),
        ({"sparsity": 0.5, "threshold": 0.1}, "Give either sparsity or threshold"),
        ({"sparsity": 1.0}, r"fraction of zeros in \[0, 1\), got 1.0"),
        ({"threshold": -1}, "threshold must be above 0, got -1"),
        ({"sparsity": 0.5, "criterion": "magic"}, "Unknown criterion 'magic'"),
        ({"sparsity": 0.5, "include": "nothing"}, "The glob 'nothing' matches no variable"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "needs calibration data"),
        ({"sparsity": 0.5, "calibration": np.ones(3)}, "reads no calibration data"),
        ({"sparsity": 0.5, "criterion": "movement"}, "use tfcompress.callbacks.Pruning"),
        ({"sparsity": 0.6, "structure": "2:4"}, "ends at the sparsity 0.5, got 0.6"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(arguments, message):
    model = mlp()
    before = kernels(model)
    with pytest.raises(ValueError, match=message):
        tfc.prune(model, **arguments)
    for path, weight in kernels(model).items():
        np.testing.assert_array_equal(weight, before[path])
