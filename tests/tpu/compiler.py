"""Compiling for a TPU v5e without one: jax's description of its topology, and libtpu."""

import functools
import os

# Without these, libtpu asks a metadata server of a cloud for minutes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402


@functools.cache
def _device():
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]


def compile_for_tpu(function, *arguments):
    """Compile what `function` computes for one core of a TPU v5e, as TensorFlow hands it to XLA.

    Args:
        function: Of tensors; variables that it reads or writes become arguments and results.
        *arguments: Nested tensors.

    Returns:
        The executable.

    Raises:
        RuntimeError, ValueError: XLA does not compile it, for a host call or a dynamic shape, say.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    arguments = keras.tree.map_structure(tf.convert_to_tensor, arguments)
    jitted = tf.function(function, jit_compile=True, autograph=False)
    program = jitted.experimental_get_compiler_ir(*arguments)(stage="hlo_serialized")
    stablehlo = xla_client._xla.mlir.hlo_to_stablehlo(_without_copies(program))
    with mlir.make_ir_context():
        module = ir.Module.parse(stablehlo)
        options = xla_client.CompileOptions()
        options.num_replicas = options.num_partitions = 1
        device = _device()
        devices = xla_client.DeviceList((device,))
        return device.client.compile(module, executable_devices=devices, compile_options=options)


def _without_copies(program: bytes) -> bytes:
    """Copies, of what is read and written, as reshapes: StableHLO has no such operation."""
    from tensorflow.compiler.xla.service import hlo_pb2

    module = hlo_pb2.HloModuleProto.FromString(program)
    for computation in module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == "copy":
                instruction.opcode = "reshape"
    return module.SerializeToString()
