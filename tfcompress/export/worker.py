"""The process that runs the TensorFlow Lite converter, which can crash.

Run as a script, so that it imports TensorFlow and nothing of this package. It reads one request a
line from standard input (the path of a JSON file) and answers each with one line of JSON.
"""

import glob
import json
import os
import sys

import numpy as np


def convert(request: dict) -> None:
    """Convert a SavedModel to a LiteRT file.

    Args:
        request: `saved_model` (directory), `output` (file to write), `precision` (`"float32"`,
            `"float16"`, `"dynamic"`, `"int8"`), `calibration` (directory of `.npz` files, one a
            batch, arrays by the names of the signature's inputs; or None).
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(
        request["saved_model"], signature_keys=["serving_default"]
    )
    if request["precision"] != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if request["precision"] == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if request["precision"] == "int8" and request["calibration"]:
        converter.representative_dataset = lambda: _batches(request["calibration"])
    content = converter.convert()
    with open(request["output"], "wb") as file:
        file.write(content)


def _batches(directory):
    for path in sorted(glob.glob(os.path.join(directory, "*.npz"))):
        with np.load(path) as batch:
            yield dict(batch)


def _answer(line: str) -> dict:
    with open(line.strip()) as file:
        request = json.load(file)
    try:
        convert(request)
    except Exception as error:  # Whatever the converter raises is the answer.
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def main() -> None:
    """Answer requests until standard input is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # The converter prints to standard output from C++; the answers must stay alone on theirs.
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_answer(line)), file=answers)


if __name__ == "__main__":
    main()
