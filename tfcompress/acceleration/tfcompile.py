"""A program of its own: a frozen graph to object files, with XLA's ahead-of-time compiler.

Run as `python tfcompile.py directory class target_triple target_cpu`. XLA reads its flags once a
process, and these must not be those of the process that trains; so this runs in another one.
"""

import pathlib
import sys


def main():
    """Compile `graph.pb` and `config.pbtxt` of a directory to objects and a header there."""
    from tensorflow.python import _pywrap_tfcompile

    directory, name, triple, cpu = sys.argv[1:]
    path = pathlib.Path(directory)
    _pywrap_tfcompile.Compile(
        graph=str(path / "graph.pb"),
        config=str(path / "config.pbtxt"),
        cpp_class=name,
        target_triple=triple,
        target_cpu=cpu,
        entry_point=f"xla_{name}",
        out_function_object=str(path / "kernels.o"),
        out_header=str(path / "xla_model.h"),
        out_metadata_object=str(path / "metadata.o"),
        out_constant_buffers_object=str(path / "constants.o"),
        gen_name_to_index=True,
        gen_program_shape=False,
    )


if __name__ == "__main__":
    main()
