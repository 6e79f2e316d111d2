"""A Gluon kernel's binary for Hopper, without a GPU; imported by processes in which TRITON_INTERPRET is not set only."""

import contextlib
import io

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource


def compiled(kernel, signature, constants, options, aligned=()):
    """(the binary, what ptxas said of it): the cache would know the binary only, and a second ptxas takes as long again."""
    at = kernel.arg_names.index
    source = GluonASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(at(name),): value for name, value in constants.items()},
        attrs={(at(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "bytes spill stores" in said.getvalue(), "ptxas did not say what it did"
    return binary, said.getvalue()
