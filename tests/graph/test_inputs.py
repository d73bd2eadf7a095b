"""What reaches a kernel, against inputs that are unfolded by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models import mlp, nested, subclassed
from tfcompress.graph.inputs import (
    NOT_REACHED,
    call_stages,
    input_norms,
    linear_kernels,
    repeatable,
    second_moments,
)
from tfcompress.keras_hooks.overlay import all_layers
from tfcompress.keras_hooks.walk import select_kernels


def one_layer(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def captured(model, data, layer):
    """The second moment and the norms of a layer's kernel."""
    path = layer.kernel.path
    kernels, skipped = linear_kernels(model, [path])
    assert skipped == {}
    moment = second_moments(model, kernels, data)[path]
    norms = input_norms(model, [path], data)[0][path]
    assert norms.ndim == len(layer.kernel.shape)
    shape = layer.kernel.shape
    spread = kernels[path].to_matrix(np.broadcast_to(norms, shape))
    np.testing.assert_allclose(spread[:, 0], np.sqrt(np.diag(moment)), rtol=1e-5)
    np.testing.assert_array_equal(spread, np.repeat(spread[:, :1], spread.shape[1], 1))
    return moment


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype("float32")


def hook_free(model):
    return all("call" not in vars(layer) for layer in all_layers(model))


def im2col(images, kernel_size, strides, dilation, padding):
    """Patches in the order (row, column, channel), one position at a time."""
    kernel, stride, rate = np.array(kernel_size), np.array(strides), np.array(dilation)
    size = np.array(images.shape[1:3])
    extent = (kernel - 1) * rate + 1
    if padding == "same":
        steps = -(-size // stride)
        missing = np.maximum((steps - 1) * stride + extent - size, 0)
        (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in missing)
        images = np.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
    else:
        steps = (size - extent) // stride + 1
    rows = []
    for y, x in np.ndindex(*steps):
        top, left = y * stride[0], x * stride[1]
        patch = images[:, top : top + extent[0] : rate[0], left : left + extent[1] : rate[1]]
        rows.append(patch.reshape(len(images), -1))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "dilation", "padding"),
    [
        ((3, 3), (1, 1), (1, 1), "valid"),
        ((3, 2), (1, 1), (1, 1), "same"),
        ((3, 3), (2, 2), (1, 1), "same"),
        ((2, 3), (3, 2), (1, 1), "valid"),
        ((3, 3), (1, 1), (2, 2), "same"),
        ((2, 3), (1, 1), (2, 1), "valid"),
    ],
)
def test_conv2d_is_its_im2col(kernel_size, strides, dilation, padding):
    layer = keras.layers.Conv2D(
        5, kernel_size, strides=strides, dilation_rate=dilation, padding=padding, use_bias=False
    )
    images = uniform(70, 9, 8, 3)  # Three batches.
    model = one_layer(layer, images.shape[1:])
    rows = im2col(images, kernel_size, strides, dilation, padding)
    kernel = linear_kernels(model, [layer.kernel.path])[0][layer.kernel.path]
    outputs = model(images).numpy()
    # The reference itself: its rows times the matrix are what the layer computes.
    ours = (rows @ kernel.to_matrix(layer.kernel.numpy())).reshape(-1, 70, 5).swapaxes(0, 1)
    np.testing.assert_allclose(ours.reshape(outputs.shape), outputs, atol=1e-5)
    np.testing.assert_allclose(captured(model, images, layer), rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_patches_in_parts_add_up(monkeypatch):
    layer = keras.layers.Conv2D(2, 3)
    images = uniform(10, 6, 6, 2)
    model = one_layer(layer, images.shape[1:])
    whole = captured(model, images, layer)
    monkeypatch.setattr("tfcompress.graph.inputs._MAX_PATCH_ELEMENTS", 3 * 6 * 6 * 2 * 9)
    np.testing.assert_allclose(captured(model, images, layer), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("equation", "shape", "output_shape"),
    [
        ("ab,bc->ac", (6,), (5,)),
        ("abc,cd->abd", (4, 6), (None, 5)),
        ("abc,cde->abde", (4, 6), (None, 2, 3)),
        ("abcd,cde->abe", (4, 2, 3), (None, 5)),
        ("abcd,ecd->abe", (4, 2, 3), (None, 5)),
        ("abcd,dec->abe", (4, 2, 3), (None, 5)),
        ("abc,bd->adc", (4, 6), (5, 6)),
        ("abc,cd->ad", (4, 6), (5,)),
        ("...x,xy->...y", (3, 4, 6), (5,)),
    ],
)
def test_einsum_dense(equation, shape, output_shape):
    layer = keras.layers.EinsumDense(equation, output_shape)
    data = uniform(40, *shape)
    model = one_layer(layer, shape)
    path = layer.kernel.path
    kernel = linear_kernels(model, [path])[0][path]
    moment = captured(model, data, layer)
    # Energy of the outputs: tr(W^T H W) for any W, whatever the equation means by it.
    weight = kernel.to_matrix(layer.kernel.numpy())
    energy = np.einsum("io,ij,jo->", weight, moment, weight)
    np.testing.assert_allclose(energy, np.square(model(data)).sum(), rtol=1e-4)
    # And in the kernel's own order: one weight at a time gives the diagonal.
    for index in range(0, kernel.num_inputs, 2):
        unit = np.zeros_like(weight)
        unit[index, 0] = 1
        layer.kernel.assign(kernel.from_matrix(unit))
        np.testing.assert_allclose(np.square(model(data)).sum(), moment[index, index], rtol=1e-4)


def test_the_matrix_of_a_kernel_and_back():
    layer = keras.layers.EinsumDense("abcd,dec->abe", (None, 5))
    model = one_layer(layer, (4, 2, 3))
    kernel = linear_kernels(model, [layer.kernel.path])[0][layer.kernel.path]
    array = uniform(3, 5, 2)
    assert kernel.axes == (0, 2)
    assert kernel.to_matrix(array)[1 * 2 + 1, 4] == array[1, 4, 1]
    np.testing.assert_array_equal(kernel.from_matrix(kernel.to_matrix(array)), array)


@pytest.mark.parametrize(
    ("equation", "shape", "output_shape", "reason"),
    [
        ("abc,bcd->abd", (4, 6), (4, 5), "has a kernel for each position along an axis"),
        ("abc,d->abcd", (4, 6), (4, 6, 5), "not a matrix product"),
    ],
)
def test_einsum_dense_that_is_no_matrix_product_is_refused(equation, shape, output_shape, reason):
    layer = keras.layers.EinsumDense(equation, output_shape)
    model = one_layer(layer, shape)
    _, skipped = linear_kernels(model, [layer.kernel.path])
    assert reason in skipped[layer.kernel.path]
    assert equation in skipped[layer.kernel.path]


@keras.saving.register_keras_serializable(package="tests")
class Normalizing(keras.layers.Dense):
    """A Dense layer in name only."""

    def call(self, inputs, training=None):
        return super().call(keras.ops.normalize(inputs), training=training)


def test_other_kinds_are_skipped_with_their_reason():
    inputs = keras.Input((8,), dtype="int32")
    x = keras.layers.LSTM(6, name="lstm", return_sequences=True)(
        keras.layers.Embedding(9, 4, name="embedding")(inputs)
    )
    x = Normalizing(6, name="normalizing")(x)
    x = keras.layers.Reshape((8, 6, 1))(x)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(keras.layers.Concatenate()([x, x]))
    x = keras.layers.Conv2D(4, 2, groups=2, name="grouped")(x)
    x = keras.layers.Dense(2, name="head")(x)
    model = keras.Model(inputs, x)
    selected, _ = select_kernels(model)
    norms, skipped = input_norms(model, list(selected), np.zeros((2, 8), "int32"))
    assert [path.split("/")[-2] for path in norms] == ["head"]
    reasons = {path.split("/")[0]: reason for path, reason in skipped.items()}
    other = "not the kernel of a Dense, EinsumDense or Conv2D layer"
    assert reasons == {
        "embedding": other,
        "lstm": other,
        "normalizing": "Normalizing is not a plain Dense, EinsumDense or Conv2D layer",
        "depthwise": "DepthwiseConv2D is not a plain Dense, EinsumDense or Conv2D layer",
        "grouped": "a convolution in 2 groups",
    }


def test_a_layer_that_is_called_twice_has_the_rows_of_both():
    model = nested()
    inner, shared = model.get_layer("block").layers[-1], model.get_layer("shared")
    data = uniform(50, 12)
    first = inner(data).numpy()
    rows = np.concatenate([first, shared(first).numpy()])
    np.testing.assert_allclose(captured(model, data, shared), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert hook_free(model)


def test_a_subclassed_model():
    model = subclassed()
    data = uniform(50, 12)
    hidden = model.first(data).numpy()
    np.testing.assert_allclose(
        captured(model, data, model.second), hidden.T @ hidden, rtol=1e-5, atol=1e-5
    )


def test_a_function_that_was_traced_counts():
    class Traced(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(4)
            self.second = keras.layers.Dense(2)

        @tf.function
        def inner(self, x):
            return self.second(self.first(x))

        def call(self, inputs):
            return self.inner(inputs)

    model = Traced()
    data = uniform(64, 5)
    model(data)
    hidden = model.first(data).numpy()
    path = model.second.kernel.path
    kernels, _ = linear_kernels(model, [path])
    for last in (None, path):
        moment = second_moments(model, kernels, data, last)[path]
        np.testing.assert_allclose(moment, hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    assert not tf.config.functions_run_eagerly()


def test_a_vectorized_map_cannot_be_seen_into():
    class Mapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def call(self, inputs):
            return keras.ops.vectorized_map(lambda x: self.dense(x[None])[0], inputs)

    model = Mapped()
    model.dense.build((None, 5))
    path = model.dense.kernel.path
    norms, skipped = input_norms(model, [path], uniform(64, 5))
    assert norms == {}
    assert skipped == {path: NOT_REACHED}


def test_time_distributed_of_unknown_length():
    layer = keras.layers.Dense(3)
    model = one_layer(keras.layers.TimeDistributed(layer), (None, 5))
    data = uniform(40, 7, 5)
    rows = data.reshape(-1, 5)
    np.testing.assert_allclose(captured(model, data, layer), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_half_precision_inputs_add_up_in_single():
    layer = keras.layers.Dense(3, dtype="mixed_float16")
    model = one_layer(layer, (4,))
    data = np.full((4096, 4), 8, "float32")  # Sums to 262144, above the largest float16.
    np.testing.assert_array_equal(captured(model, data, layer), np.full((4, 4), 4096 * 64.0))


def test_attention_shares_a_stage_for_query_key_and_value():
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.Dense(3, name="head")(x)
    model = keras.Model(inputs, x)
    kernels, _ = linear_kernels(model, list(select_kernels(model)[0]))
    stages = call_stages(model, kernels, uniform(5, 6, 8))
    names = [[path.split("/")[-2] for path in stage.kernels] for stage in stages]
    assert names == [["query", "key", "value"], ["attention_output"], ["head"]]
    assert [stage.last.split("/")[-2] for stage in stages] == ["value", "attention_output", "head"]


def test_a_layer_that_is_called_again_shares_no_stage():
    shared, after = keras.layers.Dense(4, name="shared"), keras.layers.Dense(4, name="after")
    between = keras.layers.Dense(4, name="between")
    inputs = keras.Input((4,))
    x = between(shared(inputs))
    model = keras.Model(inputs, [shared(x), after(x)])
    kernels, _ = linear_kernels(model, list(select_kernels(model)[0]))
    stages = call_stages(model, kernels, uniform(5, 4))
    names = [[path.split("/")[0] for path in stage.kernels] for stage in stages]
    assert names == [["shared"], ["between"], ["after"]]
    assert [stage.last is None for stage in stages] == [True, False, False]


def test_leaving_the_model_early_changes_nothing_but_the_time():
    model = nested()
    data = uniform(50, 12)
    path = model.get_layer("block").layers[-1].kernel.path
    kernels, _ = linear_kernels(model, [path])
    calls = []
    head = model.get_layer("head")
    original = head.call
    head.call = lambda x, **kwargs: calls.append(1) or original(x, **kwargs)
    early = second_moments(model, kernels, data, last=path)[path]
    assert calls == []
    np.testing.assert_array_equal(early, second_moments(model, kernels, data)[path])
    assert len(calls) == 2


def test_the_batches_of_an_iterator_are_kept_and_others_are_read_again():
    parts = [uniform(2, 3), uniform(1, 3)]
    kept = repeatable(iter(parts))
    for _ in range(2):
        assert all(ours is part for ours, part in zip(kept(), parts, strict=True))
    for data in (parts[0], parts, lambda: iter(parts)):
        assert repeatable(data) is data


@pytest.mark.parametrize("kind", ["arrays", "pairs", "dataset", "iterator", "function"])
def test_data_of_any_kind(kind):
    model = mlp()
    data = uniform(40, 12)
    parts = [data[:16], data[16:]]
    given = {
        "arrays": data,
        "pairs": (data, np.zeros(40)),
        "dataset": tf.data.Dataset.from_tensor_slices(data).batch(16),
        "iterator": iter(parts),
        "function": lambda: iter(parts),
    }[kind]
    path = "mlp/hidden/kernel"
    norms = input_norms(model, [path], given)[0][path]
    np.testing.assert_allclose(norms[:, 0], np.linalg.norm(data, axis=0), rtol=1e-5)


def test_an_endless_dataset_is_refused():
    data = tf.data.Dataset.from_tensors(uniform(4, 12)).repeat()
    with pytest.raises(ValueError, match=r"repeats forever; pass dataset.take\(n\)"):
        input_norms(mlp(), ["mlp/hidden/kernel"], data)


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("mlp/hidden", np.ones((2, 12)), "no variable 'mlp/hidden'; it has: mlp/hidden/kernel"),
        ("mlp/hidden/kernel", np.full((2, 12), np.nan), r"holds NaN or infinity.*shape \(2, 12\)"),
        ("mlp/hidden/kernel", np.ones((0, 12)), "holds no batch"),
    ],
)
def test_bad_input_is_refused(path, data, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        input_norms(model, [path], data)
    assert hook_free(model)


def test_activations_that_overflow_are_named():
    model = mlp()
    model.get_layer("hidden").bias.assign(np.full(16, np.inf))
    with pytest.raises(ValueError, match="that reach 'mlp/head/kernel' hold NaN or infinity"):
        input_norms(model, ["mlp/head/kernel"], np.ones((2, 12)))


def test_a_layer_that_is_not_called_is_skipped():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.idle = keras.layers.Dense(2), keras.layers.Dense(2)

        def build(self, shape):
            self.used.build(shape)
            self.idle.build(shape)

        def call(self, inputs):
            return self.used(inputs)

    model = Idle()
    model.build((None, 3))
    path = model.idle.kernel.path
    norms, skipped = input_norms(model, [path], np.ones((2, 3)))
    assert norms == {}
    assert skipped == {path: NOT_REACHED}


def test_a_failing_model_keeps_no_hook():
    model = mlp()
    with pytest.raises(ValueError):
        input_norms(model, ["mlp/hidden/kernel"], np.ones((2, 5)))
    assert hook_free(model)
