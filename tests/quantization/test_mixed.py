"""Sensitivities, costs and the schemes that follow from them, on real values."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.models import Residual
from tfcompress import demo, zoo
from tfcompress.export import export
from tfcompress.keras_hooks.quantizer import weight_axes
from tfcompress.ops import fake_quant as fq
from tfcompress.ops.schemes import Scheme
from tfcompress.quantization import quantize
from tfcompress.quantization.assignment import Budget, search
from tfcompress.quantization.mixed import Candidate, Sensitivities, auto, costs, sensitivities

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 12)).astype("float32")


def mlp(activation=None):
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dense(3, activation=activation, name="head"),
        ],
        name="mlp",
    )


def measured(model, data=X, *args, **kwargs):
    return sensitivities(model, data, *args, verbose=0, **kwargs)


def on_grid(variable, scheme, axes=(0,)):
    return fq.fake_quant_weights(tf.convert_to_tensor(variable.value), scheme, axes).numpy()


def outputs_with(model, variable, value, x=X):
    before = variable.numpy()
    variable.assign(value)
    found = model.predict(x, verbose=0)
    variable.assign(before)
    return found


def test_an_error_is_that_of_the_outputs_with_one_layer_on_its_grid():
    model = mlp()
    expected = model.predict(X, verbose=0)
    found = measured(model, candidates=("int8", "int3", None))
    assert found.metric == "mse"
    for layer in model.layers:
        for name, bits in (("int8", 8), ("int3", 3)):
            moved = outputs_with(model, layer.kernel, on_grid(layer.kernel, Scheme(bits)))
            error = np.square(moved - expected).sum() / np.square(expected).sum()
            assert found.errors[layer.kernel.path][name] == pytest.approx(error, rel=1e-3)
        assert found.errors[layer.kernel.path]["float32"] == 0.0


def test_probabilities_are_compared_by_their_divergence():
    model = mlp("softmax")
    p = model.predict(X, verbose=0).astype("float64")
    found = measured(model, candidates=["int3"])
    assert found.metric == "kl"
    q = outputs_with(model, model.layers[0].kernel, on_grid(model.layers[0].kernel, Scheme(3)))
    divergence = np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert found.errors["mlp/hidden/kernel"]["int3"] == pytest.approx(divergence, rel=1e-2)
    assert measured(model, candidates=["int3"], metric="mse").metric == "mse"


def test_a_pair_rounds_the_weights_and_what_the_layer_reads():
    model = mlp()
    expected = model.predict(X, verbose=0)
    found = measured(model, X, ("w8a3", "int8", ("int8", "dynamic")))
    kernel = model.layers[0].kernel
    activations = Scheme(3, symmetric=False, granularity="tensor")
    # The range is that of each batch, of which there are two here.
    rounded = np.concatenate(
        [fq.fake_quant_activations(x, [x.min(), x.max()], activations) for x in (X[:32], X[32:])]
    )
    moved = outputs_with(model, kernel, on_grid(kernel, Scheme(8)), rounded)
    error = np.square(moved - expected).sum() / np.square(expected).sum()
    line = found.errors[kernel.path]
    assert line["w8a3"] == pytest.approx(error, rel=1e-3)
    assert line["int8"] < line["w8a8-a:channel-a:dynamic"] < line["w8a3"]
    assert model.layers[0].call.__func__ is layers.Dense.call, "a hook was left behind"


def test_the_model_is_left_as_it_was_whatever_happens():
    model = mlp()
    before = model.get_weights()
    calls = []

    def metric(model, data):
        calls.append(model.get_weights()[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        measured(model, metric=metric, candidates=["w2a8", "w4a8"])
    np.testing.assert_array_equal(calls[0], before[0])
    assert len(np.unique(calls[1][:, 0])) <= 3, "the second call should see two bits"
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert "call" not in vars(model.layers[0])


def test_a_metric_of_the_user_gets_the_quantized_model_and_its_data():
    model = mlp("softmax")
    model.compile(loss="sparse_categorical_crossentropy")
    data = X, np.argmax(model.predict(X, verbose=0), axis=-1)
    baseline = model.evaluate(*data, verbose=0)

    def loss(model, data):
        return model.evaluate(*data, verbose=0)

    found = measured(model, data, ["w8a2", "int2"], metric=loss)
    assert found.metric == "loss"
    moved = model.layers[1].kernel
    before = moved.numpy()
    moved.assign(on_grid(moved, Scheme(2)))
    increase = model.evaluate(*data, verbose=0) - baseline
    moved.assign(before)
    assert found.errors["mlp/head/kernel"]["int2"] == pytest.approx(increase, rel=1e-3, abs=1e-6)
    # `evaluate` was compiled before: it sees the rounded activations only if it is traced again.
    assert found.errors["mlp/head/kernel"]["w8a2"] != 0.0
    assert model.evaluate(*data, verbose=0) == pytest.approx(baseline, abs=1e-6)
    with pytest.raises(ValueError, match="can be read once"):
        measured(model, iter([X]), metric=loss)


def test_the_model_is_traced_once_a_batch_shape_and_data_is_streamed_once():
    traced = []

    class Counting(layers.Dense):
        def call(self, x):
            traced.append(x.shape)
            return super().call(x)

    model = keras.Sequential([keras.Input((12,)), Counting(4), Counting(4), layers.Dense(2)])
    traced.clear()
    read = []

    def batches():
        for start in (0, 16, 32):
            read.append(start)
            yield X[start : start + 16]

    found = measured(model, batches(), ("int8", "int4", "w3a4", "w8a2"))
    assert read == [0, 16, 32]
    # Two layers, each in the graph of `expand`, of the full batch and of any batch.
    assert len(traced) <= 6, traced
    whole = measured(model, X[:40], ("int8", "int4"))
    for path, line in whole.errors.items():
        assert found.errors[path]["int8"] == pytest.approx(line["int8"], rel=1e-4)


@pytest.mark.parametrize("kind", ["subclassed", "lstm", "separable", "attention"])
def test_models_of_many_kinds(kind):
    inputs = keras.Input((6, 8))
    model, x = {
        "subclassed": lambda: (Residual(), X),
        "lstm": lambda: (keras.Model(inputs, layers.LSTM(3, name="rnn")(inputs)), None),
        "separable": lambda: (keras.Model(inputs, layers.SeparableConv1D(3, 3)(inputs)), None),
        "attention": lambda: (
            keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs)),
            None,
        ),
    }[kind]()
    x = RNG.normal(size=(8, 6, 8)).astype("float32") if x is None else x
    model(x[:1])
    expected = [variable.path for variable, _ in weight_axes(model)]
    found = measured(model, x, ("int8", "w4a8"))
    members = [member for unit in found.members.values() for member in unit]
    assert sorted(members) == sorted(expected)
    for line in found.errors.values():
        assert 0 < line["int8"] < line["w4a8"]
    if kind in ("lstm", "separable"):
        assert len(found.errors) == 1, "the weights of one layer get one scheme"


class Tied(layers.Layer):
    """Multiplies by the transposed kernel of another layer."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.kernel = other.kernel

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.kernel))


def tied():
    inputs = keras.Input((12,))
    first = layers.Dense(16, use_bias=False, name="first")
    hidden = first(inputs)
    outputs = layers.Dense(5, name="head")(Tied(first, name="tied")(hidden))
    return keras.Model(inputs, outputs)


def test_a_weight_of_two_layers_is_chosen_for_and_counted_once():
    model = tied()
    found = measured(model, X, ("int4", "w4a4"))
    assert list(found.errors) == ["first/kernel", "head/kernel"]
    cost = costs(model, found, Budget(size=0.5, bops=0.5), X, activations="int8")
    assert cost["size"].table["first/kernel"]["int4"] == 12 * 16 / 2 + 4 * 16
    assert cost["bops"].table["first/kernel"]["int4"] == 2 * 12 * 16 * 4 * 8
    assert cost["bops"].table["first/kernel"]["w4a4"] == 2 * 12 * 16 * 4 * 4


def test_sizes_and_bit_operations_are_those_counted_by_hand():
    model = mlp()
    group = Scheme(4, symmetric=False, granularity="group", group_size=8)
    found = measured(model, X, ("int8", group, None), exclude="*head*")
    cost = costs(model, found, Budget(size=0.5, bops=0.5), X, activations="int4")
    kept = 4.0 * (16 + 16 * 3 + 3)
    size = cost["size"]
    assert size.full == 4.0 * (12 * 16 + 16) + kept - 4.0 * 16 and size.rest == kept
    name = "int4-group8-asymmetric"
    assert size.table == {
        "mlp/hidden/kernel": {
            "int8": 12 * 16 + 4.0 * 16,
            name: 12 * 16 / 2 + 2 * 4.0 * 16 * 2,
            "float32": 4.0 * 12 * 16,
        }
    }
    bops = cost["bops"]
    assert bops.full == (12 * 16 + 16 * 3) * 32 * 32 and bops.rest == 16 * 3 * 32 * 32
    assert bops.table["mlp/hidden/kernel"]["int8"] == 12 * 16 * 8 * 4


def test_the_counted_size_is_nearly_that_of_the_file(tmp_path):
    model = demo.cnn()
    images = RNG.uniform(size=(16, 28, 28)).astype("float32")
    found = measured(model, images, ["int8"])
    counted = costs(model, found, Budget(size=1.0))["size"].total(
        dict.fromkeys(found.errors, "int8")
    )
    quantized = quantize(model, calibration=images)
    file = export(quantized, tmp_path / "m.tflite", precision="int8", verify_on=images)
    assert counted == pytest.approx(file.bytes, rel=0.03)


def test_latencies_come_from_a_table_or_a_function():
    model = mlp()
    found = measured(model, X)
    table = {path: {"int8": 2.0, "int4": 1.0} for path in found.errors}
    for given in (table, lambda path, name: table[path][name]):
        assert costs(model, found, Budget(latency=1, latencies=given))["latency"].table == table
    with pytest.raises(ValueError, match="no time of 'mlp/hidden/kernel' as 'int8'"):
        costs(model, found, Budget(latency=1, latencies={}))


def test_fixed_and_excluded_weights():
    model = mlp()
    found = auto(model, X, Budget(size=4000), fixed={"*head*": "int3"}, verbose=0)
    assert found == {"mlp/hidden/kernel": Scheme(8), "mlp/head/kernel": Scheme(3)}
    assert auto(model, X, Budget(size=4000), exclude="*head*", verbose=0) == {
        "mlp/hidden/kernel": Scheme(8)
    }
    assert auto(model, X, Budget(size=4000), (None, "int8"), verbose=0) == {
        "mlp/hidden/kernel": None, "mlp/head/kernel": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="several schemes"):
        pair = layers.LSTM(3, name="rnn")
        model = keras.Sequential([keras.Input((6, 8)), pair])
        fixed = {"*/kernel": "int8", "*recurrent*": "int4"}
        measured(model, np.zeros((2, 6, 8)), fixed=fixed)


def test_bit_operations_of_a_generator_and_several_limits_at_once():
    model = mlp()
    budget = Budget(size=0.9, bops=(12 * 16 * 4 + 16 * 3 * 8) * 8)
    found = auto(model, iter([X[:16], X[16:]]), budget, verbose=0)
    assert {path: scheme.bits for path, scheme in found.items()} == {
        "mlp/hidden/kernel": 4, "mlp/head/kernel": 8,
    }  # fmt: skip


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_measured():
    data = iter([X])
    with pytest.raises(ValueError, match=r"smallest reachable is 272 bytes \(0.2626 of float32\)"):
        auto(mlp(), data, Budget(size=0.2), verbose=0)
    assert next(data) is X


def test_paths_are_escaped_globs():
    found = Sensitivities(
        "mse", {"int4": Candidate.of("int4")}, {"a[0]": {"int4": 1.0}}, {"a[0]": ("a[0]", "b")}
    )
    assert found.schemes({"a[0]": "int4"}) == {"a[[]0]": Scheme(4), "b": Scheme(4)}


def test_a_saved_result_is_the_same(tmp_path):
    specs = ("int8", ("int4", "dynamic"), Scheme(4, granularity="group", group_size=4), None)
    found = measured(mlp(), X, specs)
    assert Sensitivities.load(found.save(tmp_path / "found.json")) == found
    (tmp_path / "other.json").write_text('{"errors": 1}')
    with pytest.raises(ValueError, match="holds no Sensitivities"):
        Sensitivities.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": "int8"}, "must be a sequence"),
        ({"candidates": ("int9",)}, "int9"),
        ({"candidates": ("int4", "w4")}, "same scheme twice"),
        ({"metric": "accuracy"}, "metric must be"),
        ({"include": "*nowhere*"}, "matches no variable"),
        ({"include": "*bias"}, "no weight to quantize"),
        ({"fixed": {"*bias": "int8"}}, "matches no variable"),
        ({"data": []}, "holds no batch"),
        ({"metric": lambda model, data: float("nan")}, "as 'int8' is nan"),
        ({"data": tf.data.Dataset.from_tensors(X).repeat()}, "repeats forever"),
        ({"data": X * np.nan}, "holds NaN or infinity"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measured(mlp(), **arguments)


def test_candidates_with_other_activations_than_the_model_will_have_are_refused():
    with pytest.raises(ValueError, match="one scheme for all, here activations='int8'"):
        auto(mlp(), X, Budget(size=0.5), ("w8a8", "w4a4"), verbose=0)
    with pytest.raises(ValueError, match="one scheme for all"):
        auto(mlp(), X, Budget(size=0.5), fixed={"*head*": "w8a4"}, verbose=0)
    specs = ("w8a4", "w4a4", None)
    assert auto(mlp(), X, Budget(size=0.5), specs, activations="int4", verbose=0)


def trained(model, num_epochs):
    """The model, inputs to measure with, and others to judge by."""
    train, test = zoo.mnist5k()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    model.fit(*train, batch_size=64, epochs=num_epochs, verbose=0)
    return model, train[0][:256], test[0]


def relative_error(model, schemes, x):
    """That of the logits with all weights on their grids at once."""
    expected = model.predict(x, verbose=0)
    before = model.get_weights()
    for variable, axes in weight_axes(model):
        variable.assign(on_grid(variable, schemes[variable.path], axes))
    found = model.predict(x, verbose=0)
    model.set_weights(before)
    return np.square(found - expected).sum() / np.square(expected).sum()


def ratio_to_uniform(model, calibration, held_out, bits):
    """The error of mixed weights over that of uniform ones of the same size."""
    candidates = [f"int{each}" for each in range(2, 9)]
    found = measured(model, calibration, candidates)
    size = costs(model, found, Budget(size=1.0))["size"]
    uniform = dict.fromkeys(found.errors, f"int{bits}")
    chosen = search(found.errors, {"size": size}, Budget(size=size.total(uniform)))
    assert size.total(chosen) <= size.total(uniform)
    mixed, plain = found.schemes(chosen), found.schemes(uniform)
    return relative_error(model, mixed, held_out) / relative_error(model, plain, held_out)


def test_mixed_weights_beat_uniform_ones_of_the_same_size():
    keras.utils.set_random_seed(0)
    assert ratio_to_uniform(*trained(demo.cnn(filters=8), num_epochs=2), bits=4) < 0.7  # 0.5 here


def separable_cnn():
    def block(filters, strides):
        for layer in (
            layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False),
            layers.Conv2D(filters, 1, use_bias=False),
        ):
            yield from (layer, layers.BatchNormalization(momentum=0.9), layers.ReLU())

    stem = layers.Conv2D(16, 3, 2, padding="same")
    blocks = [*block(32, 1), *block(48, 2), *block(64, 1)]
    ends = [keras.Input((28, 28)), layers.Reshape((28, 28, 1)), stem]
    return keras.Sequential([*ends, *blocks, layers.GlobalAveragePooling2D(), layers.Dense(10)])


@pytest.mark.slow
def test_mixed_weights_beat_uniform_ones_clearly_where_layers_differ():
    keras.utils.set_random_seed(0)
    network = trained(separable_cnn(), num_epochs=3)
    ratios = {bits: ratio_to_uniform(*network, bits) for bits in (3, 4, 5, 6)}
    assert max(ratios.values()) < 0.5, ratios
