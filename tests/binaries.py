"""A kernel's binary without a GPU, and what ptxas said of it; for processes in which TRITON_INTERPRET is not set."""

import contextlib
import io
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_manager


def compiled(kernel, signature, constants, options, aligned=(), arch=90, source=GluonASTSource):
    """(the binary, ptxas's words), from Triton's cache if it has the binary: its words are kept beside it there."""
    at = kernel.arg_names.index
    source = source(
        fn=kernel,
        signature=signature,
        constexprs={(at(name),): value for name, value in constants.items()},
        attrs={(at(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary, said, kept = _compile(source, arch, options, False)
    if not said and not kept.get_file("ptxas"):  # someone else has compiled it
        binary, said, kept = _compile(source, arch, options, True)
    if said:
        kept.put(said, "ptxas", binary=False)
    words = Path(kept.get_file("ptxas")).read_text()
    assert "bytes spill stores" in words, "ptxas did not say what it did"
    return binary, words


def _compile(source, arch, options, anew):
    """(the binary, what ptxas said if it was run, what Triton's cache has of this binary)."""
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.compilation.always_compile = anew
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return binary, said.getvalue(), get_cache_manager(binary.hash)


def compiled_case(case, arch=90):
    """The same of a ``CompileCase`` in Triton itself."""
    return compiled(case.kernel, case.signature, case.constexprs, case.options, case.aligned, arch, ASTSource)


def given_back_too_early(ptx: str, loads: str = r"ldmatrix|ld\.shared") -> list[str]:
    """Arrivals at a barrier while a load from shared memory may be under way: nothing has used its value or fenced it since.

    An arrival orders loads before ordinary stores, not before what the copy engine writes (docs/perf/head_mlp.md: 16 ldmatrix,
    bar.sync, an arrival, and wrong numbers on an H100)."""
    waiting, found = set(), []
    for line in ptx.splitlines():
        line = line.strip().rstrip(";")
        if re.search(r"mbarrier\.arrive(?!\.expect)", line) and waiting:
            found.append(line)
        if "fence.proxy.async" in line:
            waiting.clear()
        load = re.match(rf"(?:@\S+ )?(?:{loads})\S*\s+({{[^}}]*}}|[^,]+)", line)
        waiting -= set(re.findall(r"%\w+", line[load.end() :] if load else line))
        if load:
            waiting |= set(re.findall(r"%\w+", load[1]))
    return found


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
