"""Compiling for inference with the faster of two engines."""

import functools
import logging

import keras
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from keras import layers

from tests.acceleration import networks
from tests.models import mlp
from tfcompress.acceleration import Compiled, Measurement, compile, program, xla
from tfcompress.timing import Timing

compile = functools.partial(compile, timing=Timing(rounds=1, min_ms=0.01, warmup=1), verbose=0)


@pytest.fixture
def engine(monkeypatch):
    """Sets the engine that wins, so that a test does not depend on the clock."""

    def choose(name):
        won = {"graph": {"graph_ms": 1.0, "xla_ms": 2.0}, "xla": {"graph_ms": 2.0, "xla_ms": 1.0}}
        monkeypatch.setattr(xla, "_timed", lambda calls, timing: won[name])

    return choose


EVERY = [(make, "xla") for make in networks.ALL] + [(networks.two_in_two_out, "graph")]


@pytest.mark.parametrize(("make", "name"), EVERY)
def test_any_batch_size_returns_what_the_model_returns(make, name, engine):
    engine(name)
    model, batch = make()
    fast = compile(model, batch_sizes=(2, 5), inputs=batch)
    assert set(fast.engines.values()) == {name}
    for size in (1, 2, 3, 5, 6, 13):
        given = program.with_batch_size(batch, size)
        found, expected = fast(given), model(given, training=False)
        assert type(found) is type(expected)
        keras.tree.assert_same_structure(found, expected)
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


SAVED = (networks.cnn, networks.two_in_two_out, networks.list_in)


@pytest.mark.parametrize(("make", "name"), [pair for pair in EVERY if pair[0] in SAVED])
def test_a_saved_one_is_the_same(make, name, engine, tmp_path):
    engine(name)
    model, batch = make()
    fast = compile(model, batch_sizes=(2, 4), inputs=batch)
    path = fast.save(tmp_path / "fast")
    loaded = Compiled.load(path, verbose=0)
    assert loaded.measured == fast.measured
    assert loaded.environment == fast.environment
    given = program.with_batch_size(batch, 5)
    found, expected = loaded(given), fast(given)
    keras.tree.assert_same_structure(found, expected)
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


def test_a_loaded_one_saves_again_over_the_first(tmp_path, engine):
    engine("xla")
    fast = compile(mlp(), batch_sizes=(2,))
    x = np.ones((3, 12), "float32")
    Compiled.load(fast.save(tmp_path / "a"), verbose=0).save(tmp_path / "a")
    np.testing.assert_array_equal(Compiled.load(tmp_path / "a", verbose=0)(x), fast(x))


def test_what_is_saved_is_served_without_this_package(tmp_path, engine):
    engine("xla")
    model, x = mlp(), np.ones((3, 12), "float32")
    compile(model, batch_sizes=(2,)).save(tmp_path / "m")
    serve = tf.saved_model.load(str(tmp_path / "m")).signatures["serve"]
    (found,) = serve(tf.constant(x)).values()
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


def test_no_call_traces_or_compiles(engine, monkeypatch):
    engine("xla")
    calls = []

    def counting(x):
        calls.append(x.shape)  # Runs when the model is traced, or called by Keras.
        return x

    model = keras.Sequential([keras.Input((4,)), layers.Lambda(counting), layers.Dense(2)])
    fast = compile(model, batch_sizes=(1, 8, 32))
    before, traces, seen = len(calls), fast.traces(), []

    def watched(size, function, *tensors):
        seen.append((size, tensors[0].shape[0]))
        return function(*tensors)

    for size, function in list(fast._xla.items()):
        monkeypatch.setitem(fast._xla, size, functools.partial(watched, size, function))
    monkeypatch.setattr(tf, "function", None)  # What would trace anew.
    for size in range(1, 70):
        assert fast(np.ones((size, 4), "float32")).shape == (size, 2)
    assert len(calls) == before
    assert fast.traces() == traces == 4
    # XLA compiles for a shape; it sees no shape but those that it was compiled for.
    assert {shape for _, shape in seen} == {1, 8, 32}
    assert all(size == shape for size, shape in seen)


def test_the_engine_that_was_measured_to_be_faster_is_taken():
    assert Measurement(1, graph_ms=1.0, xla_ms=0.5).engine == "xla"
    assert Measurement(1, graph_ms=1.0, xla_ms=1.5).engine == "graph"
    assert Measurement(1, graph_ms=1.0, xla_ms=0.99).engine == "graph"  # Not worth the padding.
    assert Measurement(1, graph_ms=1.0).engine == "graph"


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        (1, [("xla", 1)]),
        (5, [("xla", 8)]),
        (8, [("xla", 8)]),
        (9, [("xla", 8), ("xla", 1)]),
        (17, [("xla", 8), ("xla", 8), ("xla", 1)]),
        (32, [("graph", 32)]),
        (1000, [("graph", 1000)]),
    ],
)
def test_the_parts_of_a_batch_are_the_cheapest(size, parts):
    measured = [
        Measurement(1, graph_ms=2.0, xla_ms=1.0),
        Measurement(8, graph_ms=6.0, xla_ms=2.0),
        Measurement(32, graph_ms=6.5, xla_ms=30.0),
    ]
    assert xla.cheapest_parts(measured, size) == tuple(parts)


def test_a_measured_batch_size_is_never_cut():
    # Eight calls for one example look cheaper than they are: the batch is cut and joined, too.
    measured = [Measurement(1, graph_ms=2.0, xla_ms=0.1), Measurement(8, graph_ms=3.0, xla_ms=4.0)]
    assert xla.cheapest_parts(measured, 8) == (("graph", 8),)


def test_a_huge_batch_is_cut_into_the_best_parts_at_once():
    measured = [Measurement(1, 9.0, 1.0), Measurement(8, 9.0, 2.0), Measurement(32, 99.0, 4.0)]
    parts = xla.cheapest_parts(measured, 10**6 + 5)
    assert sum(size for _, size in parts) - (10**6 + 5) in range(4)
    assert parts[:-1] == (("xla", 32),) * (10**6 // 32)


def test_what_is_hopeless_is_not_timed_further():
    calls = {"graph": 0, "xla": 0}

    def call(name):
        calls[name] += 1
        for _ in range(20_000 if name == "xla" else 1):
            pass

    timed = xla._timed({name: functools.partial(call, name) for name in calls}, Timing(rounds=50))
    assert timed["xla_ms"] > 3 * timed["graph_ms"]
    assert calls == {"graph": 2, "xla": 2}


def test_batch_norm_is_folded_and_the_model_is_left_alone(engine):
    engine("graph")
    model, batch = networks.cnn()
    before = [w.numpy() for w in model.weights]
    fast = compile(model, batch_sizes=(2,), inputs=batch)
    operations = {op.type for op in fast._program.function.graph.get_operations()}
    assert "Conv2D" in operations
    assert not {name for name in operations if "BatchNorm" in name or name == "Rsqrt"}
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_training_the_model_later_does_not_change_it(engine):
    engine("xla")
    model, x = mlp(), np.ones((2, 12), "float32")
    fast = compile(model, batch_sizes=(2,))
    expected = fast(x).numpy()
    model.set_weights([w + 1 for w in model.get_weights()])
    np.testing.assert_array_equal(fast(x), expected)


def test_weights_too_large_for_constants_stay_variables(engine, monkeypatch, caplog):
    engine("xla")
    monkeypatch.setattr(program, "_MAX_CONSTANT_BYTES", 100)
    model, x = mlp(), np.ones((3, 12), "float32")
    with caplog.at_level(logging.INFO, "tfcompress"):
        fast = compile(model, batch_sizes=(2,))
    assert "stay variables" in caplog.text
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_compared_at_its_own_precision(engine):
    engine("xla")
    with_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([keras.Input((12,)), layers.Dense(16, "relu"), layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy(with_policy)
    x = np.random.default_rng(0).normal(size=(3, 12)).astype("float32")
    fast = compile(model, batch_sizes=(2,))
    assert fast(x).dtype == "bfloat16"
    np.testing.assert_allclose(
        tf.cast(fast(x), "float32"), tf.cast(model(x), "float32"), rtol=0.05, atol=0.05
    )


def test_other_dtypes_are_cast_as_keras_does(engine):
    engine("xla")
    model = mlp()
    fast = compile(model, batch_sizes=(2,))
    for x in (np.ones((2, 12)), np.ones((2, 12), "int32"), tf.ones((2, 12))):
        np.testing.assert_allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_open_axes_are_fixed_by_an_example(engine):
    engine("xla")
    x = keras.Input((None,), dtype="int32", name="tokens")
    model = keras.Model(x, layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(x)))
    with pytest.raises(ValueError, match=r"shape \(None, None\).*Pass inputs="):
        compile(model)
    tokens = np.arange(14).reshape(2, 7) % 9
    fast = compile(model, batch_sizes=(2,), inputs=tokens)
    np.testing.assert_allclose(fast(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Expected \(None, 7\).*got \(2, 5\)"):
        fast(tokens[:, :5])


def test_wrong_inputs_are_refused(engine):
    engine("xla")
    model, batch = networks.two_in_two_out()
    fast = compile(model, batch_sizes=(2,), inputs=batch)
    left, right = (np.ones((2, n), "float32") for n in (4, 3))
    with pytest.raises(ValueError, match=r"Expected .*\(None, 4\).*\(None, 3\).*got \(2, 4\)"):
        fast(left)
    with pytest.raises(ValueError, match="with one example or more"):
        fast({"left": left, "right": right[:1]})
    with pytest.raises(ValueError, match="with one example or more"):
        fast({"left": left[:0], "right": right[:0]})


def test_examples_that_see_each_other_are_refused(engine):
    engine("xla")
    x = keras.Input((3,))
    model = keras.Model(x, x - keras.ops.mean(x, axis=0, keepdims=True))
    with pytest.raises(ValueError, match="changes by .* with the other examples of its batch"):
        compile(model, batch_sizes=(4,), inputs=np.eye(3, dtype="float32"))


def test_outputs_without_a_batch_axis_are_refused():
    x = keras.Input((3,))
    model = keras.Model(x, keras.ops.mean(x))
    with pytest.raises(ValueError, match="first axis of each must be that of the batch"):
        compile(model, batch_sizes=(4,))


def test_state_and_random_numbers_are_refused():
    x = keras.Input(batch_shape=(2, 5, 3))
    stateful = keras.Model(x, layers.LSTM(4, stateful=True)(x))
    with pytest.raises(ValueError, match="changes its variables when it is called"):
        compile(stateful, batch_sizes=(2,))


@pytest.mark.parametrize("sizes", [(), (0, 8), (1.5,)])
def test_bad_batch_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="batch_sizes must be whole numbers, 1 or more"):
        compile(mlp(), batch_sizes=sizes)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"Expected a built keras\.Model, got"):
        compile(layers.Dense(3))


def test_what_is_no_saved_one_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        Compiled.load(tmp_path / "none")
    with pytest.raises(ValueError, match="was not written by Compiled.save"):
        Compiled.load(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists and is not a SavedModel"):
        compile(mlp(), batch_sizes=(1,)).save(tmp_path / "mine")


def test_another_machine_is_warned_about(tmp_path, engine, caplog):
    engine("graph")
    fast = compile(mlp(), batch_sizes=(1,))
    fast.environment["cores"] = "640"
    Compiled.load(fast.save(tmp_path / "m"), verbose=0)
    assert "chosen elsewhere ({'cores': '640'}" in caplog.text


def test_progress_and_the_table_are_shown(capsys):
    fast = xla.compile(mlp(), batch_sizes=(1, 4), timing=Timing(rounds=1))
    assert "Compiling and timing" in capsys.readouterr().out
    console = rich.console.Console(width=120, record=True)
    console.print(fast)
    text = console.export_text()
    assert "XLA ms" in text
    assert f"{fast.measured[0].graph_ms:.3g}" in text
    xla.compile(mlp(), batch_sizes=(1,), timing=Timing(rounds=1), verbose=0)
    assert "Compiling" not in capsys.readouterr().out
