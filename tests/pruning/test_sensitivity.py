import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfcompress as tfc
from tests.models import classification, compile_classifier, kernels, mlp, nested, subclassed
from tfcompress import zoo
from tfcompress.pruning import Sensitivity

QUIET = {"verbose": 0}


def trained(**kwargs):
    model = compile_classifier(mlp(), optimizer=keras.optimizers.SGD(0.5), **kwargs)
    data = classification()
    model.fit(*data, epochs=20, verbose=0)
    return model, data


@pytest.fixture(scope="module")
def digits():
    """A small network that knows the digits, and images that it has not seen."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = zoo.mnist5k()
    layers = [
        keras.Input((28, 28)),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu", name="wide"),
        keras.layers.Dense(16, activation="relu", name="narrow"),
        keras.layers.Dense(10, name="head"),
    ]
    model = compile_classifier(
        keras.Sequential(layers, name="digits"), "adam", metrics=["accuracy"]
    )
    model.fit(x[:2000], y[:2000], epochs=6, verbose=0)
    return model, (x_test[:500], y_test[:500])


@pytest.fixture(scope="module")
def measured(digits):
    return tfc.sensitivity(*digits, metric="accuracy", **QUIET)


def bits(model):
    return {variable.path: variable.numpy().tobytes() for variable in model.weights}


def test_each_value_is_that_of_the_model_with_one_weight_pruned():
    model, data = trained()
    found = tfc.sensitivity(model, data, sparsities=(0.9, 0.5), **QUIET)
    assert found.sparsities == (0.5, 0.9)
    assert found.baseline == model.evaluate(*data, verbose=0)
    for path, values in found.values.items():
        for sparsity, value in zip(found.sparsities, values, strict=True):
            pruned = compile_classifier(keras.models.clone_model(model))
            pruned.set_weights(model.get_weights())
            tfc.prune(pruned, sparsity=sparsity, include=path)
            assert value == pytest.approx(pruned.evaluate(*data, verbose=0), rel=1e-6)
    assert found.sizes == {"mlp/hidden/kernel": 192, "mlp/head/kernel": 48}


@pytest.mark.parametrize("structure", ["2:4", "channel", tfc.structures.Block(2, 2)])
def test_structures_are_those_of_prune(structure):
    model, data = trained()
    found = tfc.sensitivity(model, data, sparsities=(0.5,), structure=structure, **QUIET)
    pruned = compile_classifier(keras.models.clone_model(model))
    pruned.set_weights(model.get_weights())
    tfc.prune(pruned, sparsity=0.5, structure=structure, exclude="mlp/head/kernel")
    expected = pruned.evaluate(*data, verbose=0)
    assert found.values["mlp/hidden/kernel"][0] == pytest.approx(expected, rel=1e-6)
    assert ("mlp/head/kernel" in found.values) == (structure != "channel")


@pytest.mark.parametrize("make", [mlp, nested, subclassed])
def test_the_model_is_the_same_to_the_last_bit(make):
    model = compile_classifier(make())
    x, y = classification()
    before = bits(model)
    tfc.sensitivity(model, (x, y), sparsities=(0.5, 0.9), **QUIET)
    assert bits(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_happens_the_weights_are_restored(error):
    model = mlp()
    model.layers[0].kernel.assign(model.layers[0].kernel * -0.0)
    before = bits(model)
    calls = []

    def failing(model, data):
        calls.append((model.layers[0].kernel.numpy() == 0).all() and bits(model) == before)
        if len(calls) == 5:
            raise error("stop")
        return 1.0

    with pytest.raises(error, match="stop"):
        tfc.sensitivity(model, None, sparsities=(0.5, 0.7), metric=failing, **QUIET)
    assert calls[0] is True and calls[4] is False, "it failed while a weight was pruned"
    assert bits(model) == before


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_model_is_traced_once(as_dataset):
    traces = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    layers = [keras.Input((12,)), keras.layers.Dense(4), Counting(), keras.layers.Dense(3)]
    model = compile_classifier(keras.Sequential(layers))
    data = classification(num_examples=80)
    if as_dataset:
        data = tf.data.Dataset.from_tensor_slices(data).batch(32)
    model.evaluate(*([data] if as_dataset else data), verbose=0)
    traces.clear()
    tfc.sensitivity(model, data, **QUIET)
    assert traces == []


def test_arrays_datasets_and_a_function_agree():
    model, (x, y) = trained(metrics=["accuracy"])
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(96)
    results = [
        tfc.sensitivity(model, data, metric="accuracy", **QUIET) for data in ((x, y), batches)
    ]
    results.append(tfc.sensitivity(model, (x, y), metric=tfc.measure.accuracy, **QUIET))
    assert all(each.higher_is_better and each.metric == "accuracy" for each in results)
    for other in results[1:]:
        for path, values in results[0].values.items():
            assert values == pytest.approx(other.values[path])


def test_real_digits_lose_more_the_more_is_pruned(measured, digits):
    assert measured.baseline > 0.85
    assert measured.higher_is_better
    for values in measured.values.values():
        assert values[0] > values[-1]
    assert measured.values["digits/wide/kernel"][0] > measured.baseline - 0.05


def test_its_allocation_has_the_share_of_zeros_and_beats_the_same_for_all(measured, digits):
    found = measured.allocation(0.85)
    sizes = measured.sizes
    zeros = sum(found[path] * sizes[path] for path in sizes) / sum(sizes.values())
    assert zeros == pytest.approx(0.85, abs=1e-6)
    assert sum(measured.damage(*each) for each in found.items()) <= sum(
        measured.damage(path, 0.85) for path in sizes
    )
    model, (x, y) = digits
    pruned = {"allocation": found, "uniform": 0.85}
    accuracy = {}
    for name, sparsity in pruned.items():
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        tfc.prune(copy, sparsity=sparsity)
        accuracy[name] = tfc.measure.accuracy(copy, (x, y))
    assert accuracy["allocation"] > accuracy["uniform"]


def test_its_allocation_is_a_sparsity_of_the_callback():
    model, data = trained()
    found = tfc.sensitivity(model, data, **QUIET).allocation(0.8)
    model.fit(*data, verbose=0, callbacks=[tfc.callbacks.Pruning(sparsity=found)])
    zeros = {path: (weight == 0).sum() for path, weight in kernels(model).items()}
    assert sum(zeros.values()) == pytest.approx(0.8 * 240, abs=1)
    assert zeros == {p: w.size - round(w.size * (1 - found[p])) for p, w in kernels(model).items()}


EXAMPLE = Sensitivity(
    metric="accuracy",
    higher_is_better=True,
    baseline=0.9,
    sparsities=(0.5, 0.8),
    values={"a": (0.8, 0.5), "b": (0.95, 0.85), "c[0]": (0.7, 0.75)},
    sizes={"a": 10, "b": 20, "c[0]": 30},
)


@pytest.mark.parametrize(
    ("path", "sparsity", "damage"),
    [
        ("a", 0.0, 0.0),
        ("a", 0.25, 0.05),
        ("a", 0.5, 0.1),
        ("a", 0.65, 0.25),
        ("a", 0.8, 0.4),
        ("a", 0.9, 0.4 + 2.0),  # half of ten times the worst, 0.4
        ("a", 1.0, 0.4 + 4.0),
        ("b", 0.5, 0.0),  # better than the baseline
        ("b", 0.65, 0.025),
        ("c[0]", 0.8, 0.2),  # better than before
    ],
)
def test_damage_is_interpolated_and_never_falls(path, sparsity, damage):
    assert EXAMPLE.damage(path, sparsity) == pytest.approx(damage)


def test_without_any_damage_the_end_is_still_steep():
    flat = dataclasses.replace(EXAMPLE, values=dict.fromkeys(EXAMPLE.sizes, (0.9, 0.9)))
    assert flat.damage("a", 0.8) == 0 and flat.damage("a", 1.0) == 10


def test_an_allocation_is_found_up_to_the_highest_sparsity():
    assert EXAMPLE.allocation(0.0) == {"a": 0.0, "b": 0.0, "c[[]0]": 0.0}
    assert set(EXAMPLE.allocation(0.99).values()) == {0.99}
    with pytest.raises(ValueError, match=r"\[0, max_sparsity=0.99\], got 0.995"):
        EXAMPLE.allocation(0.995)


def test_it_survives_json_and_keras(tmp_path, measured):
    for result in (EXAMPLE, measured):
        assert Sensitivity.load(result.save(tmp_path / "s.json")) == result
        config = keras.saving.serialize_keras_object(result)
        assert keras.saving.deserialize_keras_object(json.loads(json.dumps(config))) == result
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"values": {}}'])
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match="holds no Sensitivity"):
        Sensitivity.load(tmp_path / "s.json")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a value for each of its 2 sparsities"):
        dataclasses.replace(EXAMPLE, values={"a": (0.8,)}, sizes={"a": 10})


def test_rows_are_flat():
    assert EXAMPLE.rows()[1] == {
        "path": "a", "size": 10, "sparsity": 0.8, "metric": "accuracy", "value": 0.5,
        "baseline": 0.9, "damage": 0.4,
    }  # fmt: skip
    assert len(EXAMPLE.rows()) == 6


def test_the_plot_takes_the_result_as_it_is(measured, tmp_path):
    assert tfc.report.plots.sensitivity(measured, tmp_path / "s.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("metric", "mode", "answer"),
    [
        (lambda model, data: float(abs(model.layers[0].kernel.numpy()).sum()), "auto", True),
        (lambda model, data: float((model.layers[0].kernel.numpy() == 0).sum()), "auto", False),
        (lambda model, data: float((model.layers[0].kernel.numpy() == 0).sum()), "max", True),
        ("loss", "auto", False),
        ("mae", "auto", False),
        ("loss", "max", True),
    ],
)
def test_which_direction_is_better(metric, mode, answer):
    model = mlp()
    model.compile(loss="mse", metrics=["mae"])
    data = np.ones((8, 12), "float32"), np.zeros((8, 3), "float32")
    assert (
        tfc.sensitivity(model, data, metric=metric, mode=mode, **QUIET).higher_is_better is answer
    )


def test_a_progress_bar_is_shown_unless_it_is_not_wanted(capsys):
    for verbose in (1, 0):
        tfc.sensitivity(
            mlp(), None, metric=lambda model, data: 1.0, verbose=verbose, sparsities=(0.5,)
        )
        assert ("Sensitivity" in capsys.readouterr().out) is bool(verbose)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "magic"}, r"has no metric 'magic'; it has \['loss'\]"),
        ({"metric": 3}, "metric must be a name or a function .*got 3"),
        ({"sparsities": ()}, "fractions of zeros in .*at least; got"),
        ({"sparsities": (0.5, 1.0)}, r"in \(0, 1\), one at least; got \(0.5, 1.0\)"),
        ({"structure": "2:4"}, r"Pass sparsities=\(0.5,\)"),
        ({"criterion": "wanda"}, "tfcompress.sensitivity cannot use the criterion"),
        ({"criterion": "gradient"}, "tfcompress.sensitivity cannot use the criterion"),
        ({"include": "nothing"}, "The glob 'nothing' matches no variable"),
        ({"mode": "up"}, '"auto", "min" or "max", got \'up\''),
        ({"data": np.ones((4, 12))}, "Expected data as a pair .*got ndarray"),
        ({"data": tf.data.Dataset.range(3)}, "Expected a finite tf.data.Dataset of batches"),
        ({"data": tf.data.Dataset.zip(*[tf.data.Dataset.range(3)] * 2).repeat()}, "finite"),
        ({"metric": lambda model, data: float("nan")}, "is nan, which cannot be compared"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(changes, message):
    model = compile_classifier(mlp())
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        tfc.sensitivity(**{"model": model, "data": classification(), **QUIET} | changes)
    assert bits(model) == before


def test_a_model_that_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match="'mlp' is not compiled.*pass metric=function"):
        tfc.sensitivity(mlp(), classification(), **QUIET)
    with pytest.raises(ValueError, match="has no weights yet"):
        tfc.sensitivity(keras.Sequential([keras.layers.Dense(3)]), classification(), **QUIET)
