"""The conversion process seen from its caller: started when first needed, kept for the next one."""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

from tfcompress.export.verify import ExportError

_TITLES = {"litert": "LiteRT", "onnx": "ONNX", "openvino": "OpenVINO"}
_WORKER = pathlib.Path(__file__).with_name("worker.py")


class ConversionProcess:
    """A process that converts one model after another; after a crash, the next call starts anew.

    Starting TensorFlow takes seconds, so the process lives until its caller ends. It ends by
    itself when its caller is gone.

    Args:
        script: What it runs: `worker.py`.
    """

    def __init__(self, script: pathlib.Path = _WORKER):
        self._script = script
        self._process: subprocess.Popen | None = None
        self._log = None
        self._lock = threading.Lock()

    def __call__(self, request: dict) -> None:
        """Run one request of `worker.convert`.

        Args:
            request: See `worker.convert`.

        Raises:
            ExportError: The converter raised, or the process died.
        """
        with self._lock, tempfile.TemporaryDirectory() as directory:
            self._ensure_started()
            path = pathlib.Path(directory, "request.json")
            path.write_text(json.dumps(request))
            self._log.truncate(0)
            converter = request.get("converter", "litert")
            answer = self._ask(f"{path}\n", converter)
        if answer["error"]:
            raise ExportError(
                f"The {_TITLES[converter]} converter could not convert the model. It says: "
                f"{answer['error']}"
            )

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._process = None

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: the modules beside the script are not to be found under their bare names.
            [sys.executable, "-P", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Conversion runs on the CPU; a GPU belongs to the process that trains. `CI` keeps the
            # telemetry of OpenVINO off, whose forks of this process would never end.
            env={
                "TF_CPP_MIN_LOG_LEVEL": "2",
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "-1",
                "CI": "true",
            },
        )

    def _ask(self, line: str, converter: str) -> dict:
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        raise ExportError(self._epitaph(converter))

    def _epitaph(self, converter: str) -> str:
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read()[-500:].strip()
        remedy = ""
        if converter == "litert":
            remedy = (
                "Rolled LSTM and GRU layers do this at full int8: build them with unroll=True, or "
                'export with precision="dynamic". '
            )
        return (
            f"The {_TITLES[converter]} converter crashed (exit code {code}) on this model. {remedy}"
            f"The last lines of its log: {tail}"
        )


convert = ConversionProcess()
atexit.register(convert.close)
