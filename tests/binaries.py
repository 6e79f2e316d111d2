"""A kernel's binary without a GPU, and what ptxas said of it; for processes in which TRITON_INTERPRET is not set."""

import contextlib
import io
import os
import re
import struct
import subprocess
import tempfile

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


def disassembled(cubins: list[bytes]) -> list[list[str]]:
    """The instructions of each as nvdisasm writes them, whose start alone takes half a second: one run for all.

    Addresses go on from binary to binary, in jumps and calls too.
    """
    nvdisasm = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    codes = [b"".join(_code(cubin)) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvdisasm, "--binary", "SM90", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter(re.findall(r"/\*[0-9a-f]{4,}\*/ .*;", text))
    return [[next(lines) for _ in range(len(code) // 16)] for code in codes]


def _code(elf: bytes):
    """The sections with a kernel's instructions, of 16 bytes each."""
    (at,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, at + size * i) for i in range(count)]
    for name, *_, start, length in sections:
        if elf.startswith(b".text", sections[names][4] + name):
            yield elf[start : start + length]
