"""Low rank: exact at full rank, least error below it, budgets met, plain Keras models out."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import correlated, nested, subclassed
from tfcompress import demo, zoo
from tfcompress.export import export
from tfcompress.graph import fold_batch_norm
from tfcompress.graph.factorize import factorize
from tfcompress.graph.low_rank import METHODS, Spatial, Svd, Tucker, damped
from tfcompress.graph.macs import macs
from tfcompress.graph.rank_choice import Option, share_out


def randomized(model, rank=None):
    """Every weight away from its initial value; kernels as sums of `rank` outer products."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape = variable.shape
        if rank is None or len(shape) < 2:
            low = 0.5 if "variance" in variable.name else -1.0
            variable.assign(rng.uniform(low, 1.0, shape))
            continue
        letters = "abcd"[: len(shape)]
        equation = ",".join(f"{letter}z" for letter in letters) + "->" + letters
        variable.assign(np.einsum(equation, *(rng.uniform(-1, 1, (n, rank)) for n in shape)))
    return model


def chain(shape, *stack, rank=None, dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype, name="inputs")
    return randomized(keras.Sequential([inputs, *stack], name="chain"), rank)


def batch_for(model, size=3, seed=1):
    inputs = model.inputs[0]
    shape = (size, *(5 if n is None else n for n in inputs.shape[1:]))
    rng = np.random.default_rng(seed)
    if keras.backend.is_int_dtype(inputs.dtype):
        return rng.integers(0, 9, shape)
    return rng.uniform(-1, 1, shape).astype("float32")


def largest_difference(model, other, batch=None):
    x = batch_for(model) if batch is None else batch
    a, b = (np.asarray(each(x), "float64") for each in (model, other))
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def names(model):
    return [layer.name for layer in model.layers[1:]]


def conv(**kwargs):
    return lambda: layers.Conv2D(**({"filters": 14, "kernel_size": 3, "name": "it"} | kwargs))


EXACT = {
    "Dense": ((12,), lambda: layers.Dense(11, activation="tanh", name="it")),
    "Dense, wide": ((8,), lambda: layers.Dense(40, use_bias=False, name="it")),
    "Dense on a sequence": ((None, 12), lambda: layers.Dense(11, activation="gelu", name="it")),
    "EinsumDense to heads": (
        (6, 12),
        lambda: layers.EinsumDense("abc,cde->abde", (None, 4, 5), bias_axes="de", name="it"),
    ),
    "EinsumDense from heads": (
        (6, 4, 5),
        lambda: layers.EinsumDense(
            "abcd,cde->abe", (None, 13), bias_axes="e", activation="relu", name="it"
        ),
    ),
    "EinsumDense, ellipsis on the left": (
        (6, 7, 12),
        lambda: layers.EinsumDense("...x,xy->...y", 11, bias_axes="y", name="it"),
    ),
    "EinsumDense, ellipsis on the right": (
        (12, 3, 4),
        lambda: layers.EinsumDense("ab...,bc->ac...", 11, bias_axes="c", name="it"),
    ),
    "EinsumDense, mixed order": (
        (12, 6),
        lambda: layers.EinsumDense("abc,dbe->adce", (4, None, 5), name="it"),
    ),
    "Conv2D": ((9, 8, 12), conv(activation="relu")),
    "Conv2D, strides": ((9, 8, 12), conv(strides=(2, 3), padding="same", use_bias=False)),
    "Conv2D, dilation": ((9, 11, 12), conv(dilation_rate=(2, 3), padding="same")),
    "Conv2D, oblong": ((9, 8, 12), conv(kernel_size=(5, 2), padding="same")),
    "Conv2D, channels first": ((12, 9, 8), conv(data_format="channels_first", strides=2)),
    "Conv2D, 1x1": ((9, 8, 12), conv(kernel_size=1, strides=2, activation="relu")),
}
CONVOLUTIONS = [case for case in EXACT if case.startswith("Conv2D") and "1x1" not in case]
PLACES = {"svd": ("in", "out"), "spatial": ("in", "out"), "tucker": ("in", "core", "out")}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("whitened", [False, True])
def test_at_full_rank_the_outputs_are_equal(case, whitened):
    shape, make = EXACT[case]
    model = chain(shape, make(), rank=2)
    data = batch_for(model, 64, seed=2) if whitened else None
    small = factorize(model, energy=1.0, calibration=data, verbose=0)
    assert small.count_params() < model.count_params()
    assert largest_difference(model, small) < 1e-5


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_factorize_a_convolution_is_exact(case, method):
    shape, make = EXACT[case]
    model = chain(shape, make(), rank=2)
    small = factorize(model, energy=1.0, method=method, verbose=0)
    assert names(small) == [f"it_{place}" for place in PLACES[method]]
    ranks = {layer.kernel.shape[-1] for layer in small.layers[1:-1]}
    assert ranks == {2}
    assert largest_difference(model, small) < 1e-5


def test_the_parts_of_a_convolution_are_the_documented_ones():
    model = chain((9, 8, 12), conv(strides=2, padding="same", kernel_size=(3, 5))(), rank=2)

    def shape(method):
        small = factorize(model, energy=1.0, method=method, verbose=0)
        return [(x.kernel_size, x.strides, x.use_bias) for x in small.layers[1:]]

    assert shape("svd") == [((3, 5), (2, 2), False), ((1, 1), (1, 1), True)]
    assert shape("spatial") == [((3, 1), (2, 1), False), ((1, 5), (1, 2), True)]
    assert shape("tucker") == [
        ((1, 1), (1, 1), False),
        ((3, 5), (2, 2), False),
        ((1, 1), (1, 1), True),
    ]


def test_an_embedding_becomes_a_narrow_one_and_a_dense():
    table = layers.Embedding(50, 16, mask_zero=True, name="it")
    model = chain((7,), table, layers.LSTM(4), rank=3, dtype="int32")
    tokens = np.array([[3, 9, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
    for data in (None, tokens):
        small = factorize(model, energy=1.0, include="*embeddings", calibration=data, verbose=0)
        assert names(small)[:2] == ["it_in", "it_out"]
        assert small.get_layer("it_in").embeddings.shape == (50, 3)
        assert small.get_layer("it_in").mask_zero
        # The mask reaches the LSTM as before.
        assert largest_difference(model, small, tokens) < 1e-5


def test_the_error_is_the_tail_of_the_singular_values():
    model = chain((20,), layers.Dense(16, use_bias=False, name="it"))
    kernel = np.asarray(model.layers[0].kernel, "float64")
    singular = np.linalg.svd(kernel, compute_uv=False)
    small = factorize(model, ratio={"*": 0.5}, verbose=0)  # 160 of 320: rank 4 has 144
    first, second = (np.asarray(layer.kernel, "float64") for layer in small.layers[1:])
    assert first.shape == (20, 4)
    error = np.linalg.norm(kernel - first @ second)
    np.testing.assert_allclose(error, np.sqrt(np.sum(singular[4:] ** 2)), rtol=1e-5)


def test_the_rank_is_the_first_that_keeps_the_energy():
    model = chain((20,), layers.Dense(20, use_bias=False, name="it"))
    # Energies 8, 4, 2, 1, 1: of 16, three keep 14 and four keep 15.
    values = np.sqrt([8.0, 4.0, 2.0, 1.0, 1.0] + [0.0] * 15)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    model.layers[0].kernel.assign(rotation * values)
    for energy, rank in [(0.8, 3), (0.87, 3), (0.88, 4), (0.9375 - 1e-6, 4), (0.94, 5)]:
        small = factorize(model, energy=energy, verbose=0)
        assert small.get_layer("it_in").units == rank, energy


def whitened_error(kernel, product, inputs):
    return np.linalg.norm(inputs @ (product - kernel)) / np.linalg.norm(inputs @ kernel)


def test_whitened_loses_less_on_held_out_inputs():
    inputs = correlated(400, 24).astype("float32")
    model = chain((24,), layers.Dense(24, use_bias=False, name="it"))
    kernel = np.asarray(model.layers[0].kernel)
    errors = []
    for data in (None, inputs[:200]):
        small = factorize(model, ratio={"*": 0.5}, calibration=data, verbose=0)
        product = np.asarray(small.layers[1].kernel) @ np.asarray(small.layers[2].kernel)
        errors.append(whitened_error(kernel, product, inputs[200:]))
    plain, whitened = errors
    assert whitened < 0.5 * plain


@pytest.mark.parametrize("method", METHODS)
def test_whitened_convolutions_lose_less_on_held_out_images(method):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(96, 10, 10, 2)).cumsum(axis=1).cumsum(axis=2)
    images = (images @ rng.normal(size=(2, 8)) + 0.3 * rng.normal(size=(96, 10, 10, 8))) / 10
    images = images.astype("float32")
    model = chain((10, 10, 8), layers.Conv2D(12, 3, use_bias=False, name="it"))
    ratio, errors = {"*": 0.6}, []
    for data in (None, images[:64]):
        small = factorize(model, ratio=ratio, method=method, calibration=data, verbose=0)
        assert len(small.layers) > 2
        reference = np.asarray(model(images[64:]))
        errors.append(np.linalg.norm(np.asarray(small(images[64:])) - reference))
    assert errors[1] < 0.8 * errors[0]


def test_rare_tokens_count_less():
    model = chain((6,), layers.Embedding(40, 12, name="it"), dtype="int32")
    common = np.random.default_rng(0).integers(0, 4, (64, 6))
    table = np.asarray(model.layers[0].embeddings)
    errors = []
    for data in (None, common):
        small = factorize(model, ratio={"*": 0.5}, calibration=data, verbose=0)
        product = np.asarray(small.layers[1].embeddings) @ np.asarray(small.layers[2].kernel)
        errors.append(np.linalg.norm((product - table)[:4]))
    assert errors[1] < 0.3 * errors[0]


@pytest.fixture(scope="module")
def patches():
    """A kernel of shape (3, 2, 5, 6) and the moment of correlated patches."""
    inputs = correlated(300, 30)
    kernel = np.random.default_rng(3).normal(size=(3, 2, 5, 6))
    return kernel, damped(inputs.T @ inputs, 1e-3)


PRODUCT = {
    Svd: "ijcr,ro->ijco",
    Spatial: "iacr,ajro->ijco",
    Tucker: "abcr,ijrs,abso->ijco",
}


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("kind", PRODUCT)
def test_the_predicted_errors_are_those_of_the_factors(kind, whitened, patches):
    kernel, moment = patches
    if not whitened:
        moment = None
    found = kind(kernel, moment)
    weights = np.eye(30) if moment is None else moment
    for ranks, predicted in list(zip(found.ranks, found.errors, strict=True))[::3]:
        factors = found.factors(*ranks)
        assert sum(each.size for each in factors) == kind.sizes(kernel.shape, ranks[None])[0].sum()
        error = (np.einsum(PRODUCT[kind], *factors) - kernel).reshape(30, 6)
        matrix = kernel.reshape(30, 6)
        lost = np.sum(error * (weights @ error)) / np.sum(matrix * (weights @ matrix))
        if kind is Tucker:  # Its alternations come after the prediction.
            assert lost <= predicted + 1e-9
            assert lost >= predicted * 0.5
        else:
            np.testing.assert_allclose(lost, predicted, atol=1e-9)


def test_no_product_of_a_rank_is_better_than_the_whitened_one(patches):
    kernel, moment = patches
    matrix, rng = kernel.reshape(30, 6), np.random.default_rng(4)
    best = Svd(matrix, moment).errors[2]
    total = np.sum(matrix * (moment @ matrix))
    factors = Svd(matrix, moment).factors(3)
    for _ in range(20):
        left, right = (each + 0.01 * rng.normal(size=each.shape) for each in factors)
        error = left @ right - matrix
        assert np.sum(error * (moment @ error)) / total > best


def test_alternations_lower_the_error_of_tucker(patches):
    kernel, _ = patches
    found = Tucker(kernel)
    gains = []
    for ranks, predicted in zip(found.ranks, found.errors, strict=True):
        error = np.einsum(PRODUCT[Tucker], *found.factors(*ranks)) - kernel
        gains.append(predicted - np.sum(error**2) / np.sum(kernel**2))
    assert min(gains) > -1e-9
    assert max(gains) > 1e-3


def encoder(vocabulary=60, width=16, length=8):
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    x = layers.Embedding(vocabulary, width, name="table")(tokens)
    attended = layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x + attended)
    hidden = layers.Dense(4 * width, activation="gelu", name="up")(x)
    x = layers.LayerNormalization(name="norm_2")(x + layers.Dense(width, name="down")(hidden))
    pooled = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(tokens, layers.Dense(3, name="head")(pooled), name="encoder")


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_budget_of_parameters_is_met_and_used(share, whitened):
    model = randomized(encoder())
    target = int(share * model.count_params())
    data = batch_for(model, 32) if whitened else None
    small = factorize(model, target_parameters=target, calibration=data, verbose=0)
    assert 0.97 * target < small.count_params() <= target


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("make", [encoder, demo.cnn])
def test_a_budget_of_macs_is_met_and_used(make, share):
    model = make()
    batch = batch_for(model, 1)
    target = int(share * macs(model, batch))
    small = factorize(model, target_macs=target, verbose=0)
    assert 0.95 * target < macs(small, batch) <= target


def test_a_budget_of_macs_is_met_where_convolutions_have_strides_and_are_shared():
    inputs = keras.Input((None, None, 8), name="inputs")
    shared = layers.Conv2D(8, 3, padding="same", name="shared")
    down = layers.Conv2D(16, (5, 3), strides=(2, 1), data_format="channels_last", name="down")
    model = randomized(keras.Model(inputs, down(shared(shared(inputs))), name="model"))
    images = np.random.default_rng(0).normal(size=(4, 12, 10, 8)).astype("float32")
    for method in METHODS:
        target = macs(model, images) // 2
        small = factorize(model, target_macs=target, calibration=images, method=method, verbose=0)
        assert 0.9 * target < macs(small, images) <= target


def test_a_budget_goes_where_little_is_lost():
    model = chain((32,), layers.Dense(32, name="low"), layers.Dense(32, name="full"))
    low, full = model.layers
    rng = np.random.default_rng(0)
    low.kernel.assign(rng.normal(size=(32, 2)) @ rng.normal(size=(2, 32)))
    small = factorize(model, target_parameters=1300, verbose=0)
    assert names(small) == ["low_in", "low_out", "full"]
    assert largest_difference(model, small) < 1e-5


def test_shares_are_close_to_the_best_there_is():
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = {
            name: [
                Option("svd", (rank,), int(step * rank), 0, error)
                for rank, error in enumerate(np.sort(rng.random(4))[::-1], 1)
            ]
            for name, step in zip("abc", rng.integers(5, 20, 3), strict=True)
        }
        budget = 100
        every = [
            sum(x.error for x in (a, b, c))
            for a in options["a"]
            for b in options["b"]
            for c in options["c"]
            if a.parameters + b.parameters + c.parameters <= budget
        ]
        chosen = share_out(options, "parameters", budget).values()
        assert sum(x.parameters for x in chosen) <= budget
        assert sum(x.error for x in chosen) <= min(every) + 0.35


def test_ratio_by_glob_leaves_the_rest(caplog):
    model = chain((32,), layers.Dense(32, name="a"), layers.Dense(32, name="b"))
    with caplog.at_level(logging.INFO, "tfcompress"):
        small = factorize(model, ratio={"*/a/*": 0.5}, verbose=0)
    assert names(small) == ["a_in", "a_out", "b"]
    assert small.get_layer("a_in").units == 8
    assert "chain/b/kernel stays: no glob of ratio matches it" in caplog.text
    assert "chain/a/kernel of rank 8 (svd): 1024 -> 512 parameters" in caplog.text


def test_one_ratio_leaves_the_output_layers(caplog):
    inputs = keras.Input((24,), name="inputs")
    x = layers.Dense(24, name="hidden")(inputs)
    heads = [layers.Dense(24, name=name) for name in ("a", "b")]
    outputs = [heads[0](x), layers.Softmax(name="softmax")(heads[1](x))]
    model = keras.Model(inputs, outputs, name="model")
    with caplog.at_level(logging.INFO, "tfcompress"):
        small = factorize(model, ratio=0.5, verbose=0)
    assert sorted(names(small)) == ["a", "b", "hidden_in", "hidden_out", "softmax"]
    assert "b/kernel stays: it is an output layer" in caplog.text

    residual = keras.Model(inputs, layers.Add(name="add")([x, heads[0](x)]), name="model")
    small = factorize(residual, ratio=0.5, verbose=0)
    assert names(small) == ["hidden_in", "hidden_out", "a_in", "a_out", "add"]


def test_a_layer_that_would_not_get_smaller_stays(caplog):
    model = chain((32,), layers.Dense(32, name="random"), layers.Dense(2, name="head"))
    with caplog.at_level(logging.INFO, "tfcompress"):
        same = factorize(model, energy=0.999, verbose=0)
    assert names(same) == ["random", "head"]
    assert "chain/random/kernel stays: no product with fewer parameters keeps" in caplog.text
    assert "no layer of 'chain' became smaller" in caplog.text
    assert largest_difference(model, same) < 1e-6


LEFT = {
    "grouped": (
        (8, 8, 8),
        lambda: layers.Conv2D(16, 3, groups=2, name="it"),
        "in 2 groups",
    ),
    "Conv1D": ((8, 8), lambda: layers.Conv1D(16, 3, name="it"), "Conv1D is not a plain Dense"),
    "recurrent": ((8, 8), lambda: layers.LSTM(8, name="it"), "LSTM is not a plain Dense"),
    "frozen": ((32,), lambda: layers.Dense(32, trainable=False, name="it"), "frozen"),
    "constrained": (
        (32,),
        lambda: layers.Dense(32, kernel_constraint="non_neg", name="it"),
        "its kernel_constraint would hold for the factors",
    ),
    "by position": (
        (6, 8),
        lambda: layers.EinsumDense("abc,bcd->abd", (6, 8), name="it"),
        "has a kernel for each position",
    ),
    "summed": (
        (6, 32),
        lambda: layers.EinsumDense("abc,cd->ad", 32, name="it"),
        "sums over an axis that is not one of the kernel",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_factorized_stays_with_a_reason(case, caplog):
    shape, make, reason = LEFT[case]
    model = chain(shape, make(), layers.Flatten(), layers.Dense(40, name="other"), rank=1)
    with caplog.at_level(logging.INFO, "tfcompress"):
        small = factorize(model, energy=1.0, verbose=0)
    assert names(small) == ["it", "flatten", "other_in", "other_out"]
    stays = [line for line in caplog.messages if "/it/" in line and "stays" in line]
    assert stays
    assert all(reason in line for line in stays)


@keras.saving.register_keras_serializable(package="tests")
class Tied(keras.Model):
    """Its output layer is its embedding, transposed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(30, 8, name="table")
        self.hidden = layers.Dense(8, name="hidden")

    def call(self, tokens):
        x = self.hidden(self.table(tokens))
        return keras.ops.matmul(x, keras.ops.transpose(self.table.embeddings))


def test_a_tied_embedding_stays(caplog):
    model = Tied(name="tied")
    tokens = np.array([[1, 2, 3]])
    model(tokens)
    randomized(model, rank=1)
    with caplog.at_level(logging.INFO, "tfcompress"):
        small = factorize(model, energy=1.0, verbose=0)
    assert "table/embeddings stays: it is tied" in caplog.text
    assert small.get_layer("hidden_in").kernel.shape == (8, 1)
    assert largest_difference(model, small, tokens) < 1e-5


def test_a_reversible_embedding_stays(caplog):
    hub = pytest.importorskip("keras_hub")
    table = hub.layers.ReversibleEmbedding(30, 8, name="table")
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Dense(8, name="hidden")(table(tokens))
    model = randomized(keras.Model(tokens, table(x, reverse=True)), rank=1)
    with caplog.at_level(logging.INFO, "tfcompress"):
        small = factorize(model, energy=1.0, verbose=0)
    assert "ReversibleEmbedding is not a plain" in caplog.text
    assert largest_difference(model, small) < 1e-5


def test_a_shared_layer_is_factorized_once():
    model = randomized(nested(), rank=2)
    for data in (None, batch_for(model, 32)):
        small = factorize(model, energy=1.0, exclude="*head*", calibration=data, verbose=0)
        kinds = sorted(names(small))
        assert kinds == ["block_inner_in", "block_inner_out", "head", "shared_in", "shared_out"]
        assert largest_difference(model, small) < 1e-5


def test_a_subclassed_model_is_factorized():
    model = randomized(subclassed(), rank=2)
    x = np.random.default_rng(0).normal(size=(5, 12)).astype("float32")
    small = factorize(model, energy=1.0, calibration=x, verbose=0)
    assert "first_in" in names(small)
    assert largest_difference(model, small, x) < 1e-5


def test_names_that_are_taken_are_numbered():
    model = chain((16,), layers.Dense(16, name="a"), layers.Dense(16, name="a_in"), rank=2)
    small = factorize(model, energy=1.0, verbose=0)
    assert names(small) == ["a_in_1", "a_out", "a_in_in", "a_in_out"]


def test_the_model_passed_in_is_untouched_and_shares_nothing():
    model = randomized(demo.cnn())
    before, config = [w.numpy() for w in model.weights], model.get_config()
    small = factorize(model, ratio=0.5, verbose=0)
    for variable in small.weights:
        variable.assign(np.zeros(variable.shape))
    for old, variable in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, variable)
    assert model.get_config() == config


def test_batches_of_a_generator_are_used_more_than_once():
    model = chain((24,), layers.Dense(24, name="it"))
    x = correlated(64, 24).astype("float32")
    batches = (x[i : i + 16] for i in range(0, 64, 16))
    streamed = factorize(model, target_parameters=400, calibration=batches, verbose=0)
    whole = factorize(model, target_parameters=400, calibration=x, verbose=0)
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(16)
    from_dataset = factorize(model, target_parameters=400, calibration=dataset, verbose=0)
    for other in (whole, from_dataset):
        assert largest_difference(other, streamed) < 1e-3


def test_moments_that_do_not_fit_in_memory_are_measured_in_parts(monkeypatch):
    from tfcompress.graph import whitening

    model = randomized(encoder())
    data = batch_for(model, 16)
    whole = factorize(model, target_parameters=2500, calibration=data, verbose=0)
    monkeypatch.setattr(whitening, "_MOST_ENTRIES", 300)
    parts = factorize(model, target_parameters=2500, calibration=data, verbose=0)
    assert names(whole) == names(parts)
    assert largest_difference(whole, parts) < 1e-3


def test_mixed_precision_keeps_its_policy():
    model = chain((24,), layers.Dense(24, name="it", dtype="mixed_bfloat16"), rank=2)
    small = factorize(model, energy=1.0, verbose=0)
    assert [x.dtype_policy.name for x in small.layers[1:]] == ["mixed_bfloat16"] * 2
    assert small.layers[1].kernel.dtype == "float32"


def test_a_factorized_model_saves_reloads_trains_and_exports(tmp_path):
    (x, y), _ = zoo.mnist5k()
    x, y = x[:256], y[:256]
    model = demo.cnn()
    small = factorize(fold_batch_norm(model), ratio=0.6, calibration=x[:64], verbose=0)
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded(x[:4]), small(x[:4]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loaded.compile(keras.optimizers.Adam(1e-3), loss)
    losses = loaded.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    artefact = export(loaded, tmp_path / "small.tflite", precision="float32", verify_on=x[:8])
    assert artefact.path.stat().st_size < 4.5 * model.count_params()


@pytest.fixture(scope="module")
def trained():
    """The demo's CNN after three epochs, and the digits."""
    keras.utils.set_random_seed(0)
    (x, y), test = zoo.mnist5k()
    model = demo.cnn()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=3, batch_size=64, verbose=0)
    return model, x, test


def test_real_digits_survive_at_half_the_parameters(trained):
    model, x, test = trained
    target = model.count_params() // 2
    small = factorize(model, target_parameters=target, calibration=x[:256], verbose=0)
    small.compile(loss=model.loss, metrics=["accuracy"])
    dense, low = (each.evaluate(*test, verbose=0)[1] for each in (model, small))
    assert small.count_params() <= target
    assert dense > 0.93
    assert low > dense - 0.01


def test_whitening_helps_on_real_digits(trained):
    model, x, (images, _) = trained
    reference = np.asarray(model(images))
    errors = []
    for data in (None, x[:256]):
        small = factorize(model, target_parameters=24_000, calibration=data, verbose=0)
        errors.append(np.linalg.norm(np.asarray(small(images)) - reference))
    assert errors[1] < 0.75 * errors[0]


BAD = {
    "none": ({}, "exactly one of energy, ratio, target_parameters and target_macs, got none"),
    "two": ({"energy": 0.9, "ratio": 0.5}, r"got \{'energy': 0.9, 'ratio': 0.5\}"),
    "energy": ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
    "ratio": ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
    "ratios": ({"ratio": {"*": -0.1}}, r"ratio must be in \(0, 1\), got -0.1"),
    "no ratios": ({"ratio": {}}, "ratio is an empty dict"),
    "glob": ({"ratio": {"*nothing*": 0.5}}, "'\\*nothing\\*' matches no variable"),
    "target": ({"target_parameters": 0}, "target_parameters must be above 0, got 0"),
    "reach": ({"target_parameters": 60}, r"target_parameters=60 is out of reach: at rank 1"),
    "reach of macs": ({"target_macs": 20}, r"target_macs=20 is out of reach: at rank 1"),
    "method": ({"energy": 0.9, "method": "cp"}, "method must be one of .*, got 'cp'"),
    "data": ({"energy": 0.9, "calibration": np.ones((4, 7))}, "takes"),
    "nan": ({"energy": 0.9, "calibration": np.full((4, 16), np.nan)}, "NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    arguments, message = BAD[case]
    model = chain((16,), layers.Dense(16, name="a"), layers.Dense(16, name="b"))
    with pytest.raises(ValueError, match=message):
        factorize(model, **arguments, verbose=0)


def test_weights_that_are_not_finite_are_refused():
    model = chain((16,), layers.Dense(16, name="a"))
    model.layers[0].kernel.assign(np.full((16, 16), np.inf))
    with pytest.raises(ValueError, match="chain/a/kernel.* holds NaN or infinity"):
        factorize(model, energy=0.9, verbose=0)


def test_a_target_of_macs_needs_sizes():
    model = chain((None, 16), layers.Dense(16, name="a"))
    with pytest.raises(ValueError, match="target_macs needs the shapes of the inputs"):
        factorize(model, target_macs=100, verbose=0)


def test_a_kernel_of_zeros_is_of_rank_one():
    model = chain((16,), layers.Dense(16, name="a"))
    model.layers[0].kernel.assign(np.zeros((16, 16)))
    small = factorize(model, energy=1.0, calibration=np.ones((4, 16)), verbose=0)
    assert small.get_layer("a_in").units == 1
    assert largest_difference(model, small) == 0.0
