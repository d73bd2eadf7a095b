"""Native code, built by the system's compiler and run without Python."""

import platform
import shutil
import subprocess

import keras
import numpy as np
import pytest
from keras import layers

from tests.acceleration import networks
from tests.models import mlp
from tfcompress.acceleration import aot

linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="aot compiles for 64-bit Linux",
)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("make")), reason="there is no C++ compiler"
)


def built(path):
    done = subprocess.run(["make", "-C", str(path), "-j2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return path / "example"


def run(example, batch):
    text = " ".join(str(v) for x in keras.tree.flatten(batch) for v in np.ravel(x))
    # Nothing of Python's is in the environment, nor on the path.
    done = subprocess.run([str(example)], input=text, capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    return np.array(done.stdout.split(), float)


def expected(model, batch):
    outputs = keras.tree.flatten(model(batch, training=False))
    return np.concatenate([np.ravel(np.asarray(x)) for x in outputs])


@linux
@needs_compiler
def test_it_builds_and_runs_without_python(tmp_path):
    model, batch = networks.two_in_two_out()
    path = aot(model, tmp_path / "native", batch_size=3)
    example = built(path)
    np.testing.assert_allclose(run(example, batch), expected(model, batch), rtol=1e-5, atol=1e-5)
    linked = subprocess.run(["ldd", str(example)], capture_output=True, text=True).stdout
    assert "libmodel.so" in linked
    assert "libpython" not in linked
    too_few = subprocess.run([str(example)], input="1 2", capture_output=True, text=True, env={})
    assert too_few.returncode == 2
    assert "expected more numbers" in too_few.stderr


@linux
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("make", [networks.cnn, networks.attention, networks.residual])
def test_models_of_every_kind_run(make, tmp_path):
    model, batch = make()
    size = len(keras.tree.flatten(batch)[0])
    example = built(aot(model, tmp_path / "native", batch_size=size, inputs=batch))
    np.testing.assert_allclose(run(example, batch), expected(model, batch), rtol=1e-4, atol=1e-5)


@linux
def test_the_header_says_what_it_takes(tmp_path):
    tokens = keras.Input((5,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(tokens))
    path = aot(keras.Model(tokens, layers.Dense(2)(x)), tmp_path / "n", batch_size=3)
    header = (path / "model.h").read_text()
    assert "#define MODEL_BATCH_SIZE 3" in header
    assert "#define MODEL_INPUT_0_SIZE 15 /* int32_t (3, 5) */" in header
    assert "#define MODEL_OUTPUT_0_SIZE 6 /* float (3, 2) */" in header
    assert "int model_run(model* m, const int32_t* input_0, float* output_0);" in header


def test_bad_arguments_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more, got 0"):
        aot(mlp(), tmp_path / "n", batch_size=0)
    half = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="float16")])
    with pytest.raises(ValueError, match="takes or gives float16, and aot knows float32"):
        aot(half, tmp_path / "n")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists and is not a directory of aot"):
        aot(mlp(), tmp_path / "mine")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="and this is .* on riscv64"):
        aot(mlp(), tmp_path / "n")
