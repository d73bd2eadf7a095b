import keras
import numpy as np
import pytest
import tensorflow as tf

from tfcompress.artefact import (
    Artefact,
    Format,
    LiteRTRunner,
    Tensor,
    litert_flatbuffer,
    quantize,
    register_format,
    replacing,
    zipped_size,
)

L = keras.layers
X = np.random.default_rng(0).random((64, 8, 8, 1), np.float32)


def convert(model, **options):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    for name, value in options.items():
        target = converter.target_spec if name.startswith("supported") else converter
        setattr(target, name, value)
    return converter.convert()


def full_int8(model):
    return convert(
        model,
        optimizations=[tf.lite.Optimize.DEFAULT],
        representative_dataset=lambda: ([X[i : i + 1]] for i in range(len(X))),
        supported_ops=[tf.lite.OpsSet.TFLITE_BUILTINS_INT8],
        inference_input_type=tf.int8,
        inference_output_type=tf.int8,
    )


def set_biases(model):
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(keras.ops.arange(1, weight.shape[0] + 1, dtype="float32") / 10)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(4, 3, activation="relu"),
            L.Flatten(),
            L.Dense(10, activation="softmax"),
        ]
    )
    set_biases(model)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="module")
def float_file(model, directory):
    (directory / "float.tflite").write_bytes(convert(model))
    return directory / "float.tflite"


@pytest.fixture(scope="module")
def int8_file(model, directory):
    (directory / "int8.tflite").write_bytes(full_int8(model))
    return directory / "int8.tflite"


def test_a_float_file_computes_what_keras_computes_at_any_batch_size(model, float_file):
    run = Artefact.load(float_file).runner()
    for size in (1, 5, 64, 2):
        np.testing.assert_allclose(run(X[:size]), model(X[:size]), atol=1e-6)


def test_an_int8_file_takes_and_gives_real_values(model, int8_file):
    run = Artefact.load(int8_file).runner()
    assert next(iter(run.inputs.values()))["dtype"] == np.int8
    outputs = run(X)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, model(X), atol=3 / 256)


def test_an_int8_array_goes_into_an_int8_file_unchanged(int8_file):
    run = Artefact.load(int8_file).runner()
    scale, zero_point = next(iter(run.inputs.values()))["quantization"]
    stored = quantize(X, scale, zero_point, np.int8)
    np.testing.assert_array_equal(run(stored), run(X))


def test_quantize_rounds_and_clips():
    values = np.array([-1000.0, -0.26, -0.24, 0.0, 0.24, 0.26, 1000.0])
    np.testing.assert_array_equal(quantize(values, 0.5, 3, np.int8), [-128, 2, 3, 3, 3, 4, 127])
    np.testing.assert_array_equal(quantize(values, 0.5, 3, np.uint8), [0, 2, 3, 3, 3, 4, 255])


def test_inputs_keep_the_order_of_the_model_and_outputs_their_structure(directory):
    # The signature lists the inputs by alphabet: "alpha" before "zeta".
    zeta, alpha = keras.Input((3,), name="zeta"), keras.Input((3,), name="alpha")
    doubled, shifted = L.Rescaling(2.0)(zeta), L.Rescaling(1.0, offset=5.0)(alpha)
    file = directory / "multi.tflite"
    file.write_bytes(convert(keras.Model([zeta, alpha], [doubled, shifted])))
    z, a = np.ones((2, 3), np.float32), np.full((2, 3), 10, np.float32)
    run = Artefact.load(file).runner()
    for outputs in (run([z, a]), run({"alpha": a, "zeta": z})):
        np.testing.assert_array_equal(outputs[0], 2 * z)
        np.testing.assert_array_equal(outputs[1], a + 5)


def test_wrong_inputs_are_named(float_file):
    run = Artefact.load(float_file).runner()
    with pytest.raises(ValueError, match="has 1 inputs .*, 2 were passed"):
        run([X, X])
    with pytest.raises(ValueError, match=r"\['image'\] were passed"):
        run({"image": X})
    with pytest.raises(ValueError, match=r"\[-1, 8, 8, 1\].*\[64, 8, 8\] was passed"):
        run(X[..., 0])


def test_the_flatbuffer_tells_weights_from_shapes_and_activations(model, float_file):
    found = litert_flatbuffer(float_file)
    names = [operator.name for operator in found.operators]
    assert [names[0], *names[-2:]] == ["CONV_2D", "FULLY_CONNECTED", "SOFTMAX"]
    weights = sorted(t.shape for t in found.constants if t.is_weight)
    assert weights == [(4,), (4, 3, 3, 1), (10,), (10, 144)]
    assert {t.dtype for t in found.constants if not t.is_weight} == {"int32"}
    assert found.inputs[0].values is None
    assert found.operators[0].inputs[0].name == found.inputs[0].name
    (kernel,) = [t for t in found.constants if t.shape == (10, 144)]
    np.testing.assert_array_equal(kernel.values.T, model.layers[-1].kernel)


def test_int8_weights_are_read_with_their_scales(model, int8_file):
    found = litert_flatbuffer(int8_file)
    (kernel,) = [t for t in found.constants if t.shape == (4, 3, 3, 1)]
    assert (kernel.dtype, kernel.scale.shape, kernel.axis) == ("int8", (4,), 0)
    expected = np.transpose(model.layers[0].kernel, (3, 0, 1, 2))
    assert np.all(np.abs(kernel.real() - expected) <= kernel.scale.reshape(4, 1, 1, 1) / 2 + 1e-7)
    dtypes = {tensor.dtype for operator in found.operators for tensor in operator.outputs}
    assert dtypes <= {"int8", "int32"}


def test_parameters_and_zeros_are_counted_in_the_file(model, directory):
    pruned = keras.models.clone_model(model)
    pruned.set_weights(model.get_weights())
    kernel = pruned.layers[-1].kernel
    kernel.assign(keras.ops.where(keras.ops.arange(144)[:, None] % 4 == 0, kernel, 0.0))
    for name, content in (("p32", convert(pruned)), ("p8", full_int8(pruned))):
        file = directory / f"{name}.tflite"
        file.write_bytes(content)
        (tensor,) = [t for t in Artefact.load(file).tensors() if t.shape == (10, 144)]
        assert tensor.params == 1440
        # Rounding to int8 may bring a few small weights to zero, and brings none back.
        assert 0.95 * 360 <= tensor.nonzeros <= 360
    assert sum(t.params for t in Artefact.load(file).tensors()) == model.count_params()


def test_zeros_are_at_the_zero_point():
    values = np.array([[3, 4], [5, 3]], np.int8)
    scale, zero_point = np.array([0.5], np.float32), np.array([3])
    tensor = Tensor("t", "int8", (2, 2), 1, values, scale, zero_point)
    assert tensor.nonzeros == 2
    np.testing.assert_array_equal(tensor.real(), [[0, 0.5], [1.0, 0]])


class Int4Dense(L.Layer):
    """Fake-quant ops around a product make the converter store the kernel in 4 bits."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        fake_quant = tf.quantization.fake_quant_with_min_max_vars
        kernel = fake_quant(self.kernel, -7.0, 7.0, num_bits=4, narrow_range=True)
        return fake_quant(tf.matmul(fake_quant(x, -1.0, 1.0), kernel), -8.0, 8.0)


def test_int4_weights_are_unpacked(directory):
    values = np.array([[-7, -1, 0], [3, 7, 2], [5, -6, -2]], np.float32)
    dense = keras.Sequential([keras.Input((3,)), Int4Dense()])
    dense.layers[0].kernel.assign(values)
    file = directory / "int4.tflite"
    file.write_bytes(convert(dense, optimizations=[tf.lite.Optimize.DEFAULT]))
    (kernel,) = litert_flatbuffer(file).constants
    assert (kernel.dtype, kernel.params, kernel.nonzeros) == ("int4", 9, 8)
    np.testing.assert_array_equal(kernel.real(), values.T)


def test_load_explains_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*m\.tflite.*tfcompress\.export"):
        Artefact.load(tmp_path / "m.tflite")
    with pytest.raises(ValueError, match=r"suffix '\.bin'.*\.tflite"):
        Artefact.load(tmp_path / "m.bin")
    (tmp_path / "m.tflite").write_bytes(b"PK\3\4 a zip archive")
    with pytest.raises(ValueError, match="not a LiteRT flatbuffer: expected .*TFL3"):
        Artefact.load(tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="not a LiteRT flatbuffer"):
        LiteRTRunner(tmp_path / "m.tflite")


def test_a_format_is_one_registration(tmp_path):
    register_format(
        Format(
            name="doubler",
            suffix=".double",
            check=lambda path: None,
            runner=lambda path, num_threads: lambda x: 2 * x,
            tensors=lambda path: [],
            files=lambda path: [path, path.with_suffix(".bin")],
        )
    )
    (tmp_path / "m.double").write_bytes(b"12")
    (tmp_path / "m.bin").write_bytes(b"345")
    artefact = Artefact.load(tmp_path / "m.double")
    assert (artefact.format, artefact.bytes, artefact(3)) == ("doubler", 5, 6)


def test_zipped_size_is_that_of_an_archive(tmp_path, float_file):
    noise = np.random.default_rng(0).bytes(50_000)
    for name, content in (("zeros", bytes(50_000)), ("noise", noise)):
        (tmp_path / name).write_bytes(content)
    assert zipped_size([tmp_path / "zeros"]) < 500
    assert 50_000 <= zipped_size([tmp_path / "noise"]) < 50_500
    assert zipped_size([tmp_path / "zeros", tmp_path / "noise"]) > 50_000
    assert Artefact.load(float_file).zipped_bytes < float_file.stat().st_size


def test_replacing_writes_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with replacing(file) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("first")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]


def test_replacing_names_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(ValueError, match="Cannot write .* Pass"), replacing(path):
            pass
