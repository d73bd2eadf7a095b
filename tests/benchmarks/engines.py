"""How fast integers run: files of tfcompress against Keras, ONNX Runtime and OpenVINO with NNCF.

    python -m tests.benchmarks.engines [--quick] [--only mlp cnn] [--peers-python PATH]

Four models of random weights (an MLP, the demo's CNN, MobileNetV2 at 96x96 and a BERT-like
transformer of 6 layers, 384 wide, on 64 tokens), one example a call, one thread. All contenders of
a model are timed in one run, interleaved; the figures are how many times faster than the float32
Keras model (`tf.function`) each one is, by medians. ONNX Runtime's own static quantization and NNCF
start from the float32 files that tfcompress writes. NNCF runs in another Python, since it brings
packages of its own: make an environment with `pip install nncf openvino`, and pass its interpreter
as `--peers-python`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.console
import rich.table
import tensorflow as tf

import tfcompress as tfc
from tests.benchmarks.quantized_models import mobilenet
from tfcompress import demo
from tfcompress.artefact import Artefact
from tfcompress.measure.forward import as_tensors, forward
from tfcompress.timing import Timing, latency

CALIBRATION = 128
VOCABULARY, TOKENS, WIDTH, LAYERS = 8000, 64, 384, 6
# Reads a float32 model, writes an int8 one: input .xml, calibration .npz, output .xml, model type.
NNCF = """
import sys, nncf, numpy as np, openvino
source, calibration, target, kind = sys.argv[1:]
model = openvino.Core().read_model(source)
model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
with np.load(calibration) as saved:
    data = {name: saved[name] for name in saved.files}
rows = len(next(iter(data.values())))
examples = [{name: x[i : i + 1] for name, x in data.items()} for i in range(rows)]
dataset = nncf.Dataset(examples, lambda example: example)
kind = getattr(nncf.ModelType, kind) if kind else None
quantized = nncf.quantize(model, dataset, model_type=kind, subset_size=rows)
openvino.save_model(quantized, target, compress_to_fp16=False)
print(nncf.__version__)
"""


def mlp():
    """784-512-512-10."""
    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)], name="mlp")


def bert_like():
    """Token ids to two logits, by the encoder layers of KerasHub."""
    import keras_hub

    tokens = keras.Input((TOKENS,), dtype="int32", name="tokens")
    x = keras_hub.layers.TokenAndPositionEmbedding(VOCABULARY, TOKENS, WIDTH)(tokens)
    for _ in range(LAYERS):
        x = keras_hub.layers.TransformerEncoder(4 * WIDTH, 12, activation="gelu")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(2)(x), name="bert_like")


def _normal(*shape):
    return lambda rng: rng.normal(size=(CALIBRATION, *shape)).astype("float32")


def _tokens(rng):
    return rng.integers(0, VOCABULARY, (CALIBRATION, TOKENS)).astype("int32")


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and inputs for it; `is_transformer` tells NNCF."""

    build: Callable[[], keras.Model]
    inputs: Callable
    is_transformer: bool = False


NETWORKS = {
    "MLP": Network(mlp, _normal(784)),
    "CNN": Network(demo.cnn, _normal(28, 28)),
    "MobileNetV2": Network(mobilenet, _normal(96, 96, 3)),
    "BERT-like": Network(bert_like, _tokens, is_transformer=True),
}


class Contest:
    """One model, and what is made of it."""

    def __init__(self, network: Network, directory: pathlib.Path, peers_python: str | None):
        keras.utils.set_random_seed(0)
        self.network, self.directory, self.peers_python = network, directory, peers_python
        self.x = network.inputs(np.random.default_rng(0))
        self.notes: dict[str, str] = {}  # Name of a contender -> its precision.
        self.model = network.build()
        for _ in range(20):  # Batch norms that have seen data, without which signals vanish.
            self.model(self.x[:32], training=True)

    @functools.cached_property
    def quantized(self) -> keras.Model:
        """The model in int8, by tfcompress."""
        return tfc.quantize(self.model, calibration=self.x, verbose=0)

    def keras_float32(self):
        """The baseline."""
        return self._in_keras(self.model)

    def keras_int8(self):
        """What Keras makes of it: dense and embedding layers only, on dynamic ranges."""
        model = keras.models.clone_model(self.model)
        model.set_weights(self.model.get_weights())
        model.quantize("int8")
        return self._in_keras(model)

    def litert(self, precision=None):
        """Our LiteRT file, for one example a call; by default of the precision for its kind."""
        options = {"tolerance": 1.0} if precision == "fastest" else {}  # Random weights say little.
        name = f"{precision}.tflite"
        artefact = self._export(self.model, name, precision, self.x, batch_size=1, **options)
        self.notes[f"ours, LiteRT {precision or 'default'}"] = artefact.precision
        return self._in_file(artefact)

    def onnx(self):
        """Our int8 ONNX file."""
        return self._in_file(self._export(self.quantized, "int8.onnx", "int8"))

    def openvino(self):
        """Our int8 OpenVINO file."""
        from openvino import Core, save_model

        model = Core().read_model(self._export(self.quantized, "int8.xml", "int8").path)
        # As for NNCF: an open batch costs OpenVINO up to a sixth.
        model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
        save_model(model, self.directory / "one.xml", compress_to_fp16=False)
        return self._in_file(Artefact.load(self.directory / "one.xml"))

    def onnx_runtime(self):
        """What ONNX Runtime's static quantization makes of our float32 file."""
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference

        source = self._export(self.model, "float32.onnx", "float32").path
        prepared, target = source.with_name("prepared.onnx"), source.with_name("peer.onnx")
        shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            _Reader(self._named(source)),
            per_channel=True,
            # Unsigned activations are what x86 has instructions for.
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return self._in_file(Artefact.load(target))

    def nncf(self):
        """What NNCF makes of our float32 file."""
        source = self._export(self.model, "float32.xml", "float32").path
        calibration, target = source.with_name("inputs.npz"), source.with_name("peer.xml")
        np.savez(calibration, **self._named(source))
        kind = "TRANSFORMER" if self.network.is_transformer else ""
        files = map(str, (source, calibration, target))
        command = [self.peers_python, "-c", NNCF, *files, kind]
        # The other Python is not to see the packages of this one.
        environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"NNCF failed: {done.stderr[-1000:]}")
        return self._in_file(Artefact.load(target))

    def contenders(self) -> dict[str, Callable]:
        """Name to what makes it; those of tfcompress begin with `ours`."""
        makers = {
            "Keras float32": self.keras_float32,
            "Keras int8": self.keras_int8,
            "ONNX Runtime static int8": self.onnx_runtime,
            "OpenVINO NNCF int8": self.nncf,
            "ours, LiteRT default": self.litert,
            "ours, LiteRT fastest": functools.partial(self.litert, "fastest"),
            "ours, ONNX int8": self.onnx,
            "ours, OpenVINO int8": self.openvino,
        }
        if self.peers_python is None:
            del makers["OpenVINO NNCF int8"]
        return makers

    def _export(self, model, name, precision, calibration=None, **options) -> Artefact:
        path = self.directory / name
        verify_on = self.x[:16]
        return tfc.export(model, path, precision, calibration, verify_on, **options)

    def _named(self, path) -> dict[str, np.ndarray]:
        (name,) = Artefact.load(path).runner().inputs
        return {name: self.x}

    def _in_keras(self, model):
        return functools.partial(forward(model), as_tensors(self.x[:1]))

    def _in_file(self, artefact):
        return functools.partial(artefact.runner(1), self.x[:1])


class _Reader:
    """Calibration data as ONNX Runtime wants it."""

    def __init__(self, data):
        rows = len(next(iter(data.values())))
        self._examples = iter(
            [{name: x[i : i + 1] for name, x in data.items()} for i in range(rows)]
        )

    def get_next(self):
        return next(self._examples, None)


def made(contest, console) -> dict[str, Callable]:
    """The calls to time; what cannot be made is said and left out."""
    calls = {}
    for name, make in contest.contenders().items():
        try:
            calls[name] = make()
            calls[name]()
        except Exception as error:  # Of other projects, whatever it is: the table goes on.
            if os.environ.get("TRACEBACK"):
                traceback.print_exc()
            calls.pop(name, None)
            console.print(f"    {name}: not possible, {type(error).__name__}: {str(error)[:300]}")
    return calls


def verdict(speed: dict[str, float]) -> str:
    """Who is first, and how far the best of ours is from the best of the others."""
    first = max(speed, key=speed.get)
    ours = max((name for name in speed if name.startswith("ours")), key=speed.get)
    others = max((name for name in speed if not name.startswith("ours")), key=speed.get)
    ratio = speed[ours] / speed[others]
    if first == ours:
        return f"first: {ours}, {ratio:.2f} times as fast as the next ({others})"
    return f"first: {others}; {ours} runs at {ratio:.2f} of its speed"


def cell(speed: float | None, note: str | None) -> str:
    """One figure of the table."""
    if speed is None:
        return "-"
    return f"{speed:.2f} ({note})" if note else f"{speed:.2f}"


def versions() -> str:
    """What was measured."""
    packages = ("tensorflow", "keras", "keras-hub", "ai-edge-litert", "onnxruntime", "openvino")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def nncf_version(python) -> str:
    """The version that the other Python has."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('nncf'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{python} has no NNCF: {done.stderr.strip()[-300:]}. Make an environment with "
            "`pip install nncf openvino`, and pass its python as --peers-python."
        )
    return done.stdout.strip()


def main():
    """Measure and print, a model as soon as it is known, and all in a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--peers-python", help="an interpreter that can import nncf and openvino")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--quick", action="store_true", help="5 rounds, MLP and CNN")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.only = 5, ["MLP", "CNN"]
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    warnings.filterwarnings("ignore")  # Of operators in float; here only the clock counts.
    console = rich.console.Console(highlight=False, width=110)
    peer = "NNCF is left out: pass --peers-python, see the head of this file"
    if arguments.peers_python:
        peer = f"nncf {nncf_version(arguments.peers_python)}"
    console.print(f"{versions()}, {peer}")
    results, notes = {}, {}
    for model in arguments.only:
        with tempfile.TemporaryDirectory() as directory:
            contest = Contest(NETWORKS[model], pathlib.Path(directory), arguments.peers_python)
            calls = made(contest, console)
            found = latency(calls, Timing(rounds=arguments.rounds, min_ms=5.0))
        base = found["Keras float32"].median_ms
        results[model] = {name: base / each.median_ms for name, each in found.items()}
        notes[model] = contest.notes
        figures = "; ".join(f"{name} {value:.2f}" for name, value in results[model].items())
        console.print(f"{model} ({base:.3f} ms): {figures}")
        console.print(f"    {verdict(results[model])}")
    table = rich.table.Table("", *results, title="Times faster than Keras float32, batch 1")
    for name in dict.fromkeys(name for speed in results.values() for name in speed):
        table.add_row(name, *(cell(results[m].get(name), notes[m].get(name)) for m in results))
    console.print(table)


if __name__ == "__main__":
    main()
