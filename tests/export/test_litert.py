"""Exports to LiteRT, run in the real runtime."""

import os
import pathlib
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from tests.export import networks
from tfcompress.artefact import litert_flatbuffer
from tfcompress.callbacks import Pruning, QuantizationAwareTraining
from tfcompress.export import ExportError, export, litert, process, register_exporter, verify
from tfcompress.keras_hooks.overlay import attached
from tfcompress.keras_hooks.quantizer import recall
from tfcompress.layers import L1, Prune
from tfcompress.layers.quantize import Quantize
from tfcompress.quantization import quantize

RNG = np.random.default_rng(0)


def chain(*operations, shape):
    return keras.Sequential([keras.Input(shape), *operations])


def mlp():
    return chain(layers.Dense(16, activation="relu", name="hidden"), layers.Dense(4), shape=(8,))


def cnn():
    return chain(
        layers.Conv2D(8, 3),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(4),
        shape=(10, 10, 3),
    )


def depthwise():
    return chain(
        layers.DepthwiseConv2D(3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.Conv2D(8, 1),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
        shape=(8, 8, 3),
    )


def averages():
    return chain(
        layers.Conv2D(8, 3, activation="relu"),
        layers.AveragePooling2D(2),
        layers.Flatten(),
        layers.Dense(4),
        shape=(8, 8, 3),
    )


def residual():
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    h = layers.Add()([h, layers.Conv2D(4, 3, padding="same")(h)])
    return keras.Model(x, layers.Dense(4)(layers.GlobalMaxPooling2D()(h)))


def branches():
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    h = layers.Concatenate()([layers.ReLU()(h), layers.Conv2DTranspose(2, 1)(h)])
    return keras.Model(x, layers.Dense(4)(layers.GlobalMaxPooling2D()(h)))


def sequence():
    return chain(
        layers.Conv1D(8, 3, activation="silu"),
        layers.Conv1D(8, 3),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.GlobalAveragePooling1D(),
        layers.Dense(4),
        shape=(12, 3),
    )


def conv1d():
    return chain(
        layers.Conv1D(8, 3, activation="relu"),
        layers.Conv1D(8, 3, strides=2),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(4),
        shape=(12, 3),
    )


def transposed():
    return chain(
        layers.Conv2DTranspose(4, 3, strides=2, activation="relu"),
        layers.Flatten(),
        layers.Dense(4),
        shape=(5, 5, 3),
    )


def separable():
    return chain(
        layers.SeparableConv2D(8, 3, activation="relu"),
        layers.SeparableConv2D(4, 3),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(4),
        shape=(8, 8, 3),
    )


def trained(model, *callbacks, seed=0):
    x = np.random.default_rng(seed).normal(size=(500, *model.input_shape[1:])).astype("float32")
    y = np.random.default_rng(seed).normal(size=(500, *model.output_shape[1:]))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, verbose=0, batch_size=50, callbacks=list(callbacks))
    return model, x


def simulate(model, x):
    with attached([(q.layer, q.overlay()) for q in recall(model)]):
        return np.asarray(model(x, training=False))


def output_step(path):
    file = litert_flatbuffer(path)
    return [op for op in file.operators if op.name == "DEQUANTIZE"][-1].inputs[0].scale[0]


@pytest.mark.parametrize(
    ("make", "most", "same"),
    [
        (mlp, 1, 0.98),
        (cnn, 1, 0.98),
        (depthwise, 1, 0.98),
        (averages, 1, 0.98),
        (conv1d, 1, 0.98),
        (transposed, 1, 0.95),
        (separable, 1, 0.95),
        (residual, 1, 0.98),
        (branches, 1, 0.98),
        # LiteRT does two things here that the simulation does not. It computes silu as LOGISTIC and
        # MUL, and writes the sigmoid in steps of 1/256. And MEAN over the 8 places multiplies their
        # sum by a number in [1/4, 1/2), which its fixed-point arithmetic rounds to halves, then to
        # integers: everything from 1/4 on is rounded up. Over the 64 places of a small image the
        # first rounding is to 16ths, and does no harm.
        (sequence, 2, 0.7),
    ],
)
def test_int8_is_within_steps_of_the_simulation_on_500_inputs(make, most, same, tmp_path):
    model, x = trained(make(), QuantizationAwareTraining())
    artefact = export(model, tmp_path / "m.tflite", verify_on=x[:10])
    assert artefact.precision == "int8"
    assert artefact.float_operators == ()
    check_bar(artefact, model, x.shape, most, same)


@pytest.mark.parametrize("make", [mlp, cnn, depthwise, residual, conv1d, transposed])
def test_4_bit_weights_are_as_near_to_their_simulation(make, tmp_path):
    model, x = trained(make(), QuantizationAwareTraining(weights="w4a8"))
    artefact = export(model, tmp_path / "m.tflite", "int8", verify_on=x[:10])
    assert artefact.float_operators == ()
    check_bar(artefact, model, x.shape, 1, 0.9)


def check_bar(artefact, model, shape, most, same):
    types = {t.dtype for op in litert_flatbuffer(artefact.path).operators for t in op.outputs[:1]}
    assert types <= {"int8", "float32", "int32"}
    held_out = np.random.default_rng(7).normal(size=shape).astype("float32")
    simulated = simulate(model, held_out)
    steps = np.abs(artefact(held_out) - simulated) / output_step(artefact.path)
    assert steps.max() < most + 0.01
    assert np.mean(steps < 0.5) > same
    best = np.sort(simulated, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * output_step(artefact.path)
    np.testing.assert_array_equal(artefact(held_out)[clear].argmax(-1), simulated[clear].argmax(-1))


@pytest.mark.filterwarnings("ignore:These operators")
@pytest.mark.parametrize("make", [networks.attention, networks.embedding])
def test_attention_and_embeddings_are_within_two_steps(make, tmp_path):
    model, x, held_out = networks.trained_to_int8(make)
    artefact = export(model, tmp_path / "m.tflite", "int8", verify_on=x[:50])
    simulated, found = simulate(model, held_out), artefact(held_out)
    step = output_step(artefact.path)
    assert np.mean(np.abs(found - simulated) < 2.01 * step) > 0.99
    best = np.sort(simulated, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * step
    assert clear.mean() > 0.3
    assert np.mean(found[clear].argmax(-1) == simulated[clear].argmax(-1)) >= 0.99


def test_separable_convolutions_trained_on_digits_are_within_a_step(tmp_path):
    model, x, held_out = networks.trained_to_int8(networks.separable)
    artefact = export(model, tmp_path / "m.tflite", verify_on=x[:50])
    assert artefact.float_operators == ()
    networks.check_bars(artefact, model, held_out, 1)


def separable1d():
    return chain(
        layers.SeparableConv1D(16, 5, strides=2, activation="relu"),
        layers.SeparableConv1D(16, 3),
        *networks.norm_relu(),
        layers.Flatten(),
        layers.Dense(10),
        shape=networks.ROWS,
    )


def causal():
    x = keras.Input(networks.ROWS)
    h = layers.Dense(16)(x)
    h = layers.Add()([h, layers.MultiHeadAttention(2, 8)(h, h, use_causal_mask=True)])
    return keras.Model(x, layers.Dense(10)(layers.GlobalAveragePooling1D()(h)))


_NORM = {"ADD", "MEAN", "MUL", "NEG", "RSQRT", "SQUARED_DIFFERENCE"}


@pytest.mark.filterwarnings("ignore:These operators")
@pytest.mark.parametrize(
    ("make", "most", "floats"),
    [
        (networks.separable, 1, set()),
        (separable1d, 1, set()),
        (networks.embedding, 1, set()),
        # LiteRT computes the mean of a layer normalization in steps of its input.
        (networks.attention, 2, _NORM),
        # A mask is added in float.
        (causal, 1, {"ADD", "SOFTMAX"}),
    ],
)
def test_quantized_digit_networks_are_within_steps_without_a_calibration(
    make, most, floats, tmp_path
):
    x, y, held_out = networks.digits(networks.attention if make in (causal, separable1d) else make)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss)
    model.fit(x, y, epochs=3, batch_size=50, verbose=0)
    quantized = quantize(model, calibration=x, verbose=0)
    artefact = export(quantized, tmp_path / "m.tflite", "int8", verify_on=x[:50])
    assert {operator.split(" ")[0] for operator in artefact.float_operators} == floats
    simulated, found = quantized.predict(held_out, verbose=0), artefact(held_out)
    step = output_step(artefact.path)
    steps = np.abs(found - simulated) / step
    assert np.mean(steps < most + 0.01) >= (0.99 if make is networks.attention else 1.0)
    best = np.sort(simulated, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * step
    assert clear.mean() > 0.3
    assert np.mean(found[clear].argmax(-1) == simulated[clear].argmax(-1)) >= 0.99


@pytest.mark.filterwarnings("ignore:These operators")
def test_dense_layers_over_sequences_are_integer(tmp_path):
    model, x, _ = networks.trained_to_int8(networks.attention)
    artefact = export(model, tmp_path / "m.tflite", "int8", verify_on=x[:50])
    products = [
        op for op in litert_flatbuffer(artefact.path).operators if op.name == "FULLY_CONNECTED"
    ]
    assert len(products) == 7
    # The output projection of the attention reads a product of activations, which has no range.
    integer = [op for op in products if op.inputs[0].dtype == "int8"]
    assert len(integer) >= 6
    assert all(len(op.inputs) == 3 for op in integer)  # With their bias.


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "tanh"])
def test_functions_with_a_fixed_range_are_integer_too(activation, tmp_path):
    model, x = trained(
        chain(layers.Dense(8, "relu"), layers.Dense(4, activation), shape=(8,)),
        QuantizationAwareTraining(),
    )
    artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    assert artefact.float_operators == ()
    assert output_step(artefact.path) == pytest.approx(1 / 128 if activation == "tanh" else 1 / 256)


def test_pruned_zeros_are_zeros_in_the_file(tmp_path):
    model, x = trained(mlp(), Pruning(0.75, frequency=1), QuantizationAwareTraining())
    artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    pruned = {k.shape[::-1]: np.count_nonzero(k) for k in model.get_weights() if k.ndim == 2}
    stored = {t.shape: t.nonzeros for t in artefact.tensors() if len(t.shape) == 2}
    assert pruned == {(16, 8): 32, (4, 16): 16}
    assert all(stored[shape] <= count for shape, count in pruned.items())


@pytest.mark.parametrize("sequential", [True, False])
def test_the_range_of_an_integer_input_is_seen(sequential, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (256, 8)).astype("uint8")
    operations = [layers.Rescaling(1 / 255), layers.Dense(4)]
    model = chain(*operations, shape=(8,))
    if not sequential:
        model = keras.Model(model.inputs, model.outputs)
    model.compile("sgd", "mse")
    qat = QuantizationAwareTraining()
    model.fit(x, np.ones((256, 4)), verbose=0, callbacks=[qat])
    assert next(iter(qat.ranges.values())) == pytest.approx((0.0, 255.0), abs=5.0)
    assert export(model, tmp_path / "m.tflite", verify_on=x).float_operators == ()


def test_wrapped_models_are_written_with_their_ranges(tmp_path):
    model, x = trained(cnn())
    quantized = quantize(model, calibration=x)
    artefact = export(quantized, tmp_path / "m.tflite", verify_on=x[:50])
    assert (artefact.precision, artefact.float_operators) == ("int8", ())
    steps = np.abs(artefact(x) - quantized.predict(x, verbose=0)) / output_step(artefact.path)
    assert steps.max() < 1.01
    floating = export(quantized, tmp_path / "f.tflite", "float32", verify_on=x[:50])
    assert {op.name for op in litert_flatbuffer(floating.path).operators}.isdisjoint(
        {"QUANTIZE", "DEQUANTIZE", "ROUND"}
    )


@pytest.mark.parametrize("wrap", [L1, lambda layer: Prune(layer, sparsity=0.5)])
def test_other_wrappers_leave_no_trace_in_the_file(wrap, tmp_path):
    model, x = trained(chain(wrap(layers.Dense(4)), shape=(8,)))
    artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    assert [op.name for op in litert_flatbuffer(artefact.path).operators] == ["FULLY_CONNECTED"]
    assert len(model.layers[0].losses) <= 1


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("float16", 1e-2), ("dynamic", 0.1)]
)
def test_other_precisions(precision, tolerance, tmp_path):
    model, x = trained(cnn())
    artefact = export(model, tmp_path / "m.tflite", precision, verify_on=x)
    expected = model.predict(x, verbose=0)
    error = np.abs(artefact(x) - expected).max()
    assert error == pytest.approx(artefact.max_abs_diff, rel=0.2, abs=1e-6)
    assert error < tolerance * np.abs(expected).max()
    assert artefact(x[:3]).shape == (3, 4)


def test_precisions_differ_in_size(tmp_path):
    model, x = trained(chain(layers.Dense(256), layers.Dense(64), shape=(64,)))
    sizes = [
        export(model, tmp_path / "m.tflite", precision, calibration=x).bytes
        for precision in ("float32", "float16", "dynamic", "int8")
    ]
    assert sizes[0] > 1.8 * sizes[1]
    assert sizes[1] > 1.6 * max(sizes[2:])


@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_float_model_gets_its_ranges_from_calibration(make, tmp_path):
    model, x = trained(make())
    artefact = export(model, tmp_path / "m.tflite", calibration=(x[i : i + 50] for i in (0, 50)))
    assert (artefact.precision, artefact.float_operators) == ("int8", ())
    expected = model.predict(x[:100], verbose=0)
    assert np.abs(artefact(x[:100]) - expected).max() < 0.05 * np.abs(expected).max()


def test_calibration_gives_ranges_to_what_has_none(tmp_path):
    x = keras.Input((8,))
    product = keras.ops.multiply(layers.Dense(6)(x), layers.Dense(6)(x))
    model = keras.Model(x, layers.Dense(2)(product))
    model, x = trained(model, QuantizationAwareTraining())
    with pytest.warns(UserWarning, match="compute in float: MUL"):
        artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    assert artefact.float_operators[0].startswith("MUL (")
    artefact = export(model, tmp_path / "m.tflite", calibration=x)
    assert artefact.float_operators == ()


def test_mixed_precision_is_exported_as_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(2)])
    finally:
        keras.config.set_dtype_policy("float32")
    x = RNG.normal(size=(64, 6)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.ones((64, 2)), verbose=0, callbacks=[QuantizationAwareTraining()])
    for precision in ("int8", "float32"):
        artefact = export(model, tmp_path / "m.tflite", precision, verify_on=x)
        assert {t.dtype for t in litert_flatbuffer(artefact.path).inputs} == {"float32"}
    assert model.layers[0].compute_dtype == "bfloat16"


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(8, activation="relu"), layers.Dense(2)

    def call(self, x):
        return self.head(self.hidden(x))


def test_a_subclassed_model_tells_its_inputs_by_training_or_by_example(tmp_path):
    x = RNG.normal(size=(64, 6)).astype("float32")
    model = Subclassed()
    model(x)
    assert export(model, tmp_path / "m.tflite", verify_on=x).max_abs_diff < 1e-5
    model.compile("sgd", "mse")
    model.fit(x, np.ones((64, 2)), verbose=0, callbacks=[QuantizationAwareTraining()])
    with pytest.warns(UserWarning, match="verified on random input"):
        artefact = export(model, tmp_path / "m.tflite")
    assert artefact.float_operators == ()
    assert artefact.output_steps <= 2.01


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((4,), name="a")
    outputs = {"sum": layers.Dense(2)(b) + layers.Dense(2)(a), "a/out": layers.Dense(1)(a)}
    model = keras.Model([b, a], outputs)
    batch = [RNG.normal(size=(5, n)).astype("float32") for n in (3, 4)]
    artefact = export(model, tmp_path / "m.tflite", verify_on=batch)
    expected = model.predict(batch, verbose=0)
    found = artefact(batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_list_of_inputs_of_one_shape_keeps_the_order_of_the_model(tmp_path):
    p, r = keras.Input((4,), name="p"), keras.Input((4,), name="r")
    model = keras.Model([p, r], layers.Dense(2)(layers.Subtract()([p, r])))
    batch = [RNG.normal(size=(5, 4)).astype("float32") for _ in "pr"]
    artefact = export(model, tmp_path / "m.tflite", verify_on=batch)
    # The converter writes r first.
    assert list(artefact.runner().inputs) == ["p", "r"]
    np.testing.assert_allclose(artefact(batch), model.predict(batch, verbose=0), atol=1e-5)


def test_a_dict_of_inputs_is_read_by_name(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((3,), name="a")
    model = keras.Model([b, a], layers.Dense(2)(layers.Subtract()([b, a])))
    batch = {"a": RNG.normal(size=(64, 3)), "b": 100 * RNG.normal(size=(64, 3))}
    found = export(model, tmp_path / "m.tflite", calibration=batch)(batch)
    expected = model.predict(batch, verbose=0)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_model_without_a_layer_kernel_warns_of_random_input(tmp_path):
    with pytest.warns(UserWarning, match="verified on random input. Pass verify_on="):
        export(mlp(), tmp_path / "m.tflite")


def test_given_data_gives_no_warning(tmp_path):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        export(mlp(), tmp_path / "m.tflite", verify_on=np.zeros((2, 8)))
    assert [str(w.message) for w in found if issubclass(w.category, UserWarning)] == []


def test_a_file_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    def sabotaged(request):
        process.convert(request)
        path = pathlib.Path(request["output"])
        content = bytearray(path.read_bytes())
        kernel = np.float32(0.5).tobytes() * 4
        assert kernel in content
        path.write_bytes(bytes(content).replace(kernel, np.float32(0.75).tobytes() * 4))

    monkeypatch.setattr(litert, "convert", sabotaged)
    constant = keras.initializers.Constant(0.5)
    model = chain(layers.Dense(4, kernel_initializer=constant), shape=(8,))
    before = tmp_path / "m.tflite"
    before.write_bytes(b"old")
    with pytest.raises(ExportError, match="relative error is .*, expected at most 0.0001"):
        export(model, before, verify_on=np.ones((2, 8)))
    assert before.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_a_crash_of_the_converter_is_an_error_and_the_next_one_works(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys\nsys.stdin.readline()\n"
        "print('its last words', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    broken = process.ConversionProcess(worker)
    for _ in range(2):
        with pytest.raises(
            ExportError, match=r"crashed \(exit code -6\).*unroll=True(.|\n)*its last words"
        ):
            broken({})


def test_what_the_converter_says_is_passed_on(tmp_path):
    with pytest.raises(ExportError, match="could not convert the model. It says: .*nowhere"):
        process.convert({"saved_model": str(tmp_path / "nowhere"), "precision": "float32"})


def test_a_path_that_cannot_be_written_fails_before_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "convert", lambda request: pytest.fail("converted"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "m.tflite", tmp_path / "d.tflite"):
        (tmp_path / "d.tflite").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="Cannot write"):
            export(mlp(), path, verify_on=np.zeros((1, 8)))


@pytest.mark.parametrize("trained_on", ["float", "4 bits", "4 bits, weights only"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_int4_stores_weights_in_4_bits(trained_on, calibrated, tmp_path):
    callbacks = {
        "float": [],
        "4 bits": [QuantizationAwareTraining("w4a8")],
        "4 bits, weights only": [QuantizationAwareTraining("w4")],
    }[trained_on]
    model, x = trained(
        chain(layers.Conv2D(64, 3, activation="relu"), layers.Flatten(), layers.Dense(40),
              shape=(6, 6, 3)),
        *callbacks,
    )  # fmt: skip
    calibration = x if calibrated else None
    artefact = export(model, tmp_path / "m.tflite", "int4", calibration, verify_on=x)
    integer = calibrated or trained_on == "4 bits"
    file = litert_flatbuffer(artefact.path)
    kernels = {op.name: op.inputs[1] for op in file.operators if len(op.inputs) > 2}
    stored = {name: kernels[name] for name in ("CONV_2D", "FULLY_CONNECTED")}
    assert {tensor.dtype for tensor in stored.values()} == {"int4"}
    assert ("QUANTIZE" in {op.name for op in file.operators}) == integer
    expected = simulate(model, x) if callbacks else model.predict(x, verbose=0)
    rms = np.sqrt(np.mean((artefact(x) - expected) ** 2) / np.mean(expected**2))
    # Rounding a trained model to 4 bits costs what it costs; a grid that it knows costs nothing.
    assert rms < (0.25 if trained_on == "float" else 0.03)
    as_int8 = export(model, tmp_path / "8.tflite", "dynamic", verify_on=x)
    assert artefact.bytes < 0.65 * as_int8.bytes or callbacks


def test_int8_keeps_convolutions_in_8_bits(tmp_path):
    model, x = trained(cnn(), QuantizationAwareTraining("w4a8"))
    artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    kernels = [t for t in artefact.tensors() if t.dtype in ("int8", "int4")]
    assert {(len(t.shape), t.dtype) for t in kernels} == {(4, "int8"), (2, "int4")}
    assert all(len(np.unique(np.abs(t.values))) <= 8 for t in kernels)


def test_attention_is_dynamic_unless_asked(tmp_path, caplog):
    x = keras.Input((6, 8))
    model = keras.Model(x, layers.Dense(4)(layers.Attention()([x, x])))
    batch = RNG.normal(size=(64, 6, 8)).astype("float32")
    with caplog.at_level("INFO", "tfcompress"):
        artefact = export(model, tmp_path / "m.tflite", calibration=batch)
    assert artefact.precision == "dynamic"
    assert 'exported at precision="dynamic"' in caplog.text
    assert export(model, tmp_path / "m.tflite", "int8", batch).precision == "int8"


def test_integer_inputs_and_outputs(tmp_path):
    model, x = trained(cnn(), QuantizationAwareTraining())
    real = export(model, tmp_path / "f.tflite", verify_on=x)
    artefact = export(model, tmp_path / "i.tflite", verify_on=x, io="integer")
    file = litert_flatbuffer(artefact.path)
    assert {t.dtype for t in (*file.inputs, *file.outputs)} == {"int8"}
    np.testing.assert_array_equal(artefact(x), real(x))
    assert artefact.output_steps == real.output_steps
    scale, zero_point = file.inputs[0].scale[0], file.inputs[0].zero_point[0]
    stored = np.clip(np.round(x / scale) + zero_point, -128, 127).astype("int8")
    np.testing.assert_array_equal(artefact(stored), real(x))


def test_a_fixed_batch_size(tmp_path):
    model, x = trained(cnn())
    artefact = export(model, tmp_path / "m.tflite", calibration=x, batch_size=4)
    file = litert_flatbuffer(artefact.path)
    assert file.inputs[0].shape == (4, 10, 10, 3)
    assert {op.name for op in file.operators}.isdisjoint({"SHAPE", "PACK", "STRIDED_SLICE"})
    assert artefact(x[:4]).shape == (4, 4)
    with pytest.raises(ValueError, match=r"has the shape \[4, 10, 10, 3\]"):
        artefact(x[:3])


def test_fastest_measures_and_chooses(tmp_path):
    model, x = trained(cnn())
    artefact = export(model, tmp_path / "m.tflite", "fastest", x, x, tolerance=0.2)
    found = {candidate.precision: candidate for candidate in artefact.candidates}
    assert set(found) == {"float32", "dynamic", "int8"}
    assert all(c.latency_ms > 0 and c.bytes > 0 and c.note is None for c in found.values())
    assert found["float32"].difference < 0.01
    near = [c for c in found.values() if c.difference <= 0.2]
    best = min(near, key=lambda candidate: candidate.latency_ms)
    assert (artefact.precision, artefact.latency_ms) == (best.precision, best.latency_ms)
    assert artefact.bytes == best.bytes
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_fastest_drops_what_is_too_far_off(tmp_path):
    model, x = trained(chain(layers.Dense(64), layers.Dense(1), shape=(64,)))
    artefact = export(model, tmp_path / "m.tflite", "fastest", x, tolerance=1e-5)
    assert artefact.precision == "float32"
    assert {c.difference > 1e-5 for c in artefact.candidates if c.precision != "float32"} == {True}


def test_what_is_always_zero_has_no_range_and_stays_float(tmp_path):
    dead = layers.Dense(8, "relu", kernel_initializer="zeros", trainable=False, name="dead")
    model, x = trained(chain(dead, layers.Dense(4), shape=(8,)), QuantizationAwareTraining())
    with pytest.warns(UserWarning, match="FULLY_CONNECTED .*has a range"):
        artefact = export(model, tmp_path / "m.tflite", verify_on=x)
    np.testing.assert_allclose(artefact(x), simulate(model, x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:These operators")
@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_recurrent_layers_are_unrolled_for_int8(layer, tmp_path):
    model, x = trained(chain(layer(4), layers.Dense(3), shape=(5, 3)))
    artefact = export(model, tmp_path / "m.tflite", calibration=x)
    assert artefact.precision == "int8"
    expected = model.predict(x, verbose=0)
    assert np.abs(artefact(x) - expected).max() < 0.1 * np.abs(expected).max()
    assert not model.layers[0].unroll
    for precision in ("float32", "dynamic"):
        assert export(model, tmp_path / "m.tflite", precision, verify_on=x).precision == precision


@pytest.mark.parametrize("steps", [5, None])
def test_recurrent_layers_stay_loops_where_they_can(steps, tmp_path):
    model = chain(layers.LSTM(4), layers.Dense(3), shape=(steps, 3))
    x = RNG.normal(size=(8, 5, 3)).astype("float32")
    artefact = export(model, tmp_path / "m.tflite", "float32", verify_on=x, batch_size=2)
    assert "WHILE" in {op.name for op in litert_flatbuffer(artefact.path).operators}
    np.testing.assert_allclose(artefact(x[:2]), model.predict(x[:2], verbose=0), atol=1e-5)


def test_sequences_of_any_length_are_refused_at_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "convert", lambda request: pytest.fail("converted"))
    model = chain(layers.LSTM(4), shape=(None, 3))
    with pytest.raises(ExportError, match='any length(.|\n)*precision="dynamic"'):
        export(model, tmp_path / "m.tflite", calibration=np.zeros((4, 5, 3)))
    assert not model.layers[0].unroll


def test_the_error_function_has_a_remedy(tmp_path):
    x = keras.Input((4,))
    with pytest.raises(ExportError, match="only as part of an exact GELU"):
        export(keras.Model(x, keras.ops.erf(x)), tmp_path / "m.tflite", verify_on=np.ones((2, 4)))
    model = chain(layers.Dense(4, activation="gelu"), shape=(4,))
    assert export(model, tmp_path / "m.tflite", verify_on=np.ones((2, 4))).max_abs_diff < 1e-4


def test_float_operators_come_with_the_reason(tmp_path):
    x = keras.Input((8,))
    h = layers.Dense(8, name="first")(x)
    model = keras.Model(x, layers.Dense(4, name="second")(keras.ops.sin(h)))
    batch = RNG.normal(size=(64, 8)).astype("float32")
    with pytest.warns(UserWarning, match="SIN .*LiteRT has no integer kernel for SIN"):
        artefact = export(model, tmp_path / "m.tflite", calibration=batch)
    assert [text.split(" ")[0] for text in artefact.float_operators] == ["SIN"]
    model, x = trained(mlp(), QuantizationAwareTraining(exclude="*hidden/kernel"))
    with pytest.warns(UserWarning, match="the layer 'hidden' was left out of the quantization"):
        export(model, tmp_path / "m.tflite", verify_on=x)


def trained_at_4_bits():
    model, _ = trained(mlp(), QuantizationAwareTraining(activations="int4"))
    return model


def trained_at_8_bits():
    model, _ = trained(mlp(), QuantizationAwareTraining())
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (mlp, {"path": "m.zip"}, r"suffix '.zip' is not known. Supported: .*\.tflite"),
        (mlp, {"precision": "int9"}, "precision='int9' is not known"),
        (mlp, {"precision": "int8"}, "needs the ranges of the activations. Pass calibration="),
        (mlp, {"calibration": iter([])}, "calibration= holds no batch"),
        (mlp, {"verify_on": np.zeros((2, 7))}, r"has the shape \(None, 8\), but .* \(2, 7\)"),
        (mlp, {"verify_on": [np.zeros((2, 8))] * 2}, "has 1 inputs .* holds 2 arrays"),
        (lambda: keras.Sequential([layers.Dense(2)]), {}, "has no weights yet"),
        (lambda: "model", {}, "needs a keras.Model, got 'model'"),
        (trained_at_4_bits, {}, r"were trained with Scheme\(bits=4.*kernels for 8 bits"),
        (trained_at_8_bits, {"precision": "int4"}, "trained on weights of 8 bits, and rounding"),
        (mlp, {"io": "uint8"}, "io='uint8' is not known"),
        (mlp, {"io": "integer"}, 'io="integer" needs activations in integers'),
        (mlp, {"batch_size": 0}, "batch_size=0; pass 1 or more"),
        (mlp, {"tolerance": 0.1}, "export got tolerance"),
        (mlp, {"speed": 1}, "export got speed, .* takes batch_size, io"),
        (mlp, {"precision": "fastest"}, "Pass verify_on="),
        (mlp, {"precision": "fastest", "tolerance": 2}, "tolerance=2; pass a share"),
        (mlp, {"precision": "fastest", "path": "m.onnx"}, "chooses between LiteRT files"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, arguments, text, tmp_path):
    path = tmp_path / arguments.get("path", "m.tflite")
    arguments = {k: v for k, v in arguments.items() if k != "path"}
    with pytest.raises(ValueError, match=text):
        export(make(), path, **arguments)
    assert not path.exists()


def test_other_suffixes_can_be_registered(monkeypatch):
    from tfcompress.export import dispatch

    monkeypatch.setattr(dispatch, "_EXPORTERS", dict(dispatch._EXPORTERS))
    register_exporter(".mine", lambda model, path, *rest: (path.name, rest))
    assert export(None, "m.mine", "int8") == ("m.mine", ("int8", None, None))


@pytest.mark.parametrize(
    ("actual", "expected", "precision", "scale", "text"),
    [
        ([np.nan], [0.0], "float32", None, "not finite"),
        ([1.1], [1.0], "float16", None, "relative error is 0.1"),
        ([1.0, 5.0], [1.0, 1.0], "dynamic", None, "relative error"),
        ([3.1, 0.0], [0.0, 0.0], "int8", verify.OutputScale(1.0), "50.0% .* up to 3.1 steps"),
    ],
)
def test_differences_that_precision_does_not_explain_are_errors(
    actual, expected, precision, scale, text
):
    with pytest.raises(ExportError, match=text):
        verify.check_output("y", actual, expected, precision, scale)


def test_differences_that_precision_explains_are_none():
    verify.check_output("y", [1.001], [1.0], "float16")
    verify.check_output("y", [1.9], [0.0], "int8", verify.OutputScale(1.0))
    verify.check_output("y", [1.9], [0.0], "int8", verify.OutputScale(0.1, slack=1.8))


def test_quantize_wrappers_of_users_need_a_first_one_on_the_input(tmp_path):
    model, x = trained(chain(Quantize(layers.Identity()), Quantize(layers.Dense(4)), shape=(8,)))
    assert export(model, tmp_path / "m.tflite", verify_on=x).float_operators == ()


def test_a_channel_of_one_weight_leaves_the_others_their_8_bits(tmp_path):
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(16, name="dense")])
    kernel = rng.normal(size=(32, 16)).astype("float32")
    kernel[1:, 3] = 0.0
    kernel[:, 5] = 0.0
    model.layers[0].kernel.assign(kernel)
    x = rng.normal(size=(256, 32)).astype("float32")
    artefact = export(model, tmp_path / "m.tflite", "int8", calibration=x)
    expected = model.predict(x, verbose=0)
    assert np.abs(artefact(x) - expected).max() < 0.03 * np.abs(expected).max()


def test_a_relative_path_is_meant_from_where_the_caller_is_now(tmp_path, monkeypatch):
    for name in ("first", "second"):  # The process that converts is started in the first.
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        export(mlp(), "m.tflite", precision="float32", verify_on=RNG.normal(size=(4, 8)))
        assert [file.name for file in (tmp_path / name).iterdir()] == ["m.tflite"]
