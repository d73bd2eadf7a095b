"""The fake quantization of one layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfcompress.keras_hooks import quantizer as quantizers
from tfcompress.ops.schemes import activation_scheme

FIXED = quantizers.FixedRange(0.0, 1.0)
AXES = {
    "Dense": (lambda: layers.Dense(3), (None, 4), {"kernel": (0,)}),
    "EinsumDense": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 3)),
        (None, 2, 3, 4),
        {"kernel": (0, 1)},
    ),
    "Conv1D": (lambda: layers.Conv1D(3, 2), (None, 6, 4), {"kernel": (0, 1)}),
    "Conv2D": (lambda: layers.Conv2D(3, 2), (None, 6, 6, 4), {"kernel": (0, 1, 2)}),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), (None, 6, 4), {"kernel": (0, 2)}),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(3, 2),
        (None, 6, 6, 4),
        {"kernel": (0, 1, 3)},
    ),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2), (None, 6, 6, 4), {"kernel": (0, 1)}),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(3, 2),
        (None, 6, 6, 4),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    "Embedding": (lambda: layers.Embedding(5, 3), (None, 4), {"embeddings": (0, 1)}),
    "LSTM": (lambda: layers.LSTM(3), (None, 6, 4), {"kernel": (0,), "recurrent_kernel": (0,)}),
    "GRU": (lambda: layers.GRU(3), (None, 6, 4), {"kernel": (0,), "recurrent_kernel": (0,)}),
    "EinsumDense with a bias of two axes": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        (None, 6, 4),
        {"kernel": (0,)},
    ),
    "TimeDistributed": (
        lambda: layers.TimeDistributed(layers.Conv1D(3, 2)),
        (None, 5, 6, 4),
        {"kernel": (0, 1)},
    ),
    "BatchNormalization": (lambda: layers.BatchNormalization(), (None, 4), {}),
    "ReLU": (lambda: layers.ReLU(), (None, 4), {}),
}


@pytest.mark.parametrize("kind", AXES)
def test_one_scale_for_each_output_channel(kind):
    make, shape, expected = AXES[kind]
    layer = make()
    layer.build(shape)
    assert {v.name: axes for v, axes in quantizers.weight_axes(layer)} == expected


def test_functions_that_integer_kernels_fuse_need_no_range_before_them():
    def places(**arguments):
        layer = layers.Dense(2, **arguments)
        layer.build((None, 2))
        return quantizers.range_places(layer)

    assert places() == places(activation="relu") == ("output",)
    assert places(activation="gelu") == places(activation="softmax") == ("preactivation", "output")


def test_fixed_ranges_are_those_of_the_kernels():
    def scale(name):
        bounds = quantizers.fixed_range(name, activation_scheme("int8"))
        return (bounds.high - bounds.low) / 255

    assert (scale("softmax"), scale("sigmoid"), scale("tanh")) == (1 / 256, 1 / 256, 1 / 128)
    assert quantizers.fixed_range("relu", activation_scheme("int8")) is None


def test_a_range_moves_in_training_and_is_handed_out_in_calibration():
    bounds = quantizers.MovingRange(keras.Variable([0.0, 0.0], trainable=False))
    bounds.observe(keras.ops.array([-1.0, 2.0]))
    bounds.observe(keras.ops.array([-1.0, 102.0]))
    np.testing.assert_allclose(bounds.bounds(), [-1, 3], rtol=1e-6)
    layer = layers.Identity()
    quantizer = quantizers.LayerQuantizer(
        layer, (), activation_scheme("int8"), {"output": bounds, "input_0": FIXED}
    )
    seen = []
    with quantizers.calibrating(lambda *args: seen.append(args)):
        x = quantizer.overlay().output(tf.constant([-2.0, 1.3]))
        quantizer.overlay().inputs[0](x)
    np.testing.assert_allclose(bounds.bounds(), [-1, 3], rtol=1e-6)
    np.testing.assert_array_equal(x, np.float32([-2.0, 1.3]))
    assert [source for source, _ in seen] == [bounds]
    np.testing.assert_array_equal(
        quantizers.FollowedRange(bounds).observe(keras.ops.ones(3) * 99), bounds.bounds()
    )
