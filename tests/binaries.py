"""A kernel's binary without a GPU, and what ptxas said of it; for processes in which TRITON_INTERPRET is not set."""

import contextlib
import io

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource


def compiled(kernel, signature, constants, options, aligned=(), arch=90, source=GluonASTSource):
    """(the binary, ptxas's words): the cache would know the binary only, and a second ptxas takes as long again."""
    at = kernel.arg_names.index
    source = source(
        fn=kernel,
        signature=signature,
        constexprs={(at(name),): value for name, value in constants.items()},
        attrs={(at(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert "bytes spill stores" in said.getvalue(), "ptxas did not say what it did"
    return binary, said.getvalue()


def compiled_case(case, arch=90):
    """The same of a ``CompileCase`` in Triton itself."""
    return compiled(case.kernel, case.signature, case.constexprs, case.options, case.aligned, arch, ASTSource)
