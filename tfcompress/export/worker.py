"""The process that runs the converters (TensorFlow Lite, tf2onnx, OpenVINO), which can crash.

Run as a script, so that it imports TensorFlow and nothing of this package. It reads one request a
line from standard input (the path of a JSON file) and answers each with one line of JSON.
"""

import glob
import importlib
import json
import os
import sys

import numpy as np


def convert(request: dict) -> None:
    """Run one of the converters on a SavedModel.

    Args:
        request: `converter` (`"litert"`, the default, `"onnx"` or `"openvino"`), and what it takes.
    """
    converters = {"litert": to_litert, "onnx": to_onnx, "openvino": to_openvino}
    converters[request.get("converter", "litert")](request)


def to_litert(request: dict) -> None:
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


def to_onnx(request: dict) -> None:
    """Convert a SavedModel to an ONNX file with the names of its signature.

    Args:
        request: `saved_model` (directory), `output` (file to write), `opset`, `inputs` (their names
            in the order of the model; a signature has them by alphabet).
    """
    tf2onnx = importlib.import_module("tf2onnx")
    frozen, inputs, outputs = _frozen(request["saved_model"])
    if set(inputs.values()) & set(outputs.values()):
        raise ValueError(
            "an input and an output of the model have the same name, and in an ONNX file names "
            f"are unique: {sorted(set(inputs.values()) & set(outputs.values()))}"
        )
    model, _ = tf2onnx.convert.from_graph_def(
        frozen.graph.as_graph_def(),
        input_names=sorted(inputs, key=lambda name: request["inputs"].index(inputs[name])),
        output_names=list(outputs),
        opset=request["opset"],
        tensors_to_rename=inputs | outputs,
        custom_op_handlers={
            "FakeQuantWithMinMaxVars": (_fake_quant_to_onnx, []),
            "Erfc": (_erfc_to_onnx, []),
        },
    )
    with open(request["output"], "wb") as file:
        file.write(model.SerializeToString())


def to_openvino(request: dict) -> None:
    """Convert a SavedModel to the intermediate representation of OpenVINO.

    Args:
        request: `saved_model` (directory), `output` (the `.xml` to write, with its `.bin`).
    """
    openvino = importlib.import_module("openvino")
    frozen, inputs, outputs = _frozen(request["saved_model"])
    # From a file: what is made from a graph in memory lacks the bodies of loops.
    graph = os.path.splitext(request["output"])[0] + ".pb"
    with open(graph, "wb") as file:
        file.write(frozen.graph.as_graph_def().SerializeToString())
    model = openvino.convert_model(graph)
    for port in (*model.inputs, *model.outputs):
        ours = {*port.get_names()} & {*inputs, *outputs}
        port.set_names({(inputs | outputs)[name] for name in ours})
    openvino.save_model(model, request["output"], compress_to_fp16=False)


def _frozen(directory):
    """The signature with its variables as constants; its tensors' names, and what we call them."""
    import tensorflow as tf
    from tensorflow.python.framework import convert_to_constants

    loaded = tf.saved_model.load(directory)  # A signature alone does not keep its variables.
    signature = loaded.signatures["serving_default"]
    frozen = convert_to_constants.convert_variables_to_constants_v2(
        signature, lower_control_flow=False
    )
    names = {spec.name: name for name, spec in signature.structured_input_signature[1].items()}
    inputs = {tensor.name: names[tensor.op.name] for tensor in frozen.inputs}
    # A signature returns its outputs sorted by name.
    outputs = zip(frozen.outputs, sorted(signature.structured_outputs), strict=True)
    return frozen, inputs, {tensor.name: name for tensor, name in outputs}


def _fake_quant_to_onnx(graph, node, name, args):
    """QuantizeLinear and DequantizeLinear, on the grid that TensorFlow's kernel computes."""
    low, high = (np.float32(node.inputs[i].get_tensor_value(as_list=False)) for i in (1, 2))
    smallest = node.get_attr_value("narrow_range", 0)
    largest = 2 ** node.get_attr_value("num_bits") - 1
    scale = np.float32((high - low) / np.float32(largest - smallest))
    zero_point = np.clip(np.floor(smallest - low / scale + np.float32(0.5)), smallest, largest)
    grid = [
        graph.make_const(f"{name}_{kind}", value).output[0]
        for kind, value in (("scale", scale), ("zero_point", zero_point.astype(np.uint8)))
    ]
    shape, dtype = graph.get_shape(node.output[0]), graph.get_dtype(node.output[0])
    stored = {"dtypes": [2], "shapes": [shape]}  # 2 is uint8.
    integers = graph.make_node("QuantizeLinear", [node.input[0], *grid], **stored).output[0]
    if (smallest, largest) != (0, 255):
        ends = [
            graph.make_const(f"{name}_{kind}", np.array(value, np.uint8)).output[0]
            for kind, value in (("smallest", smallest), ("largest", largest))
        ]
        integers = graph.make_node("Clip", [integers, *ends], **stored).output[0]
    output = node.output[0]
    graph.remove_node(node.name)
    graph.make_node(
        "DequantizeLinear", [integers, *grid], outputs=[output], shapes=[shape], dtypes=[dtype]
    )


def _erfc_to_onnx(graph, node, name, args):
    """1 - erf: ONNX has no Erfc."""
    shape, dtype = graph.get_shape(node.output[0]), graph.get_dtype(node.output[0])
    erf = graph.make_node("Erf", [node.input[0]], shapes=[shape], dtypes=[dtype]).output[0]
    one = graph.make_const(f"{name}_one", np.array(1, np.float32)).output[0]
    output = node.output[0]
    graph.remove_node(node.name)
    graph.make_node("Sub", [one, erf], outputs=[output], shapes=[shape], dtypes=[dtype])


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
