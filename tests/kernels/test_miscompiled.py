"""ptxas 12.8, which Triton 3.6 and 3.7 bring, can lose the first write of a uniform register: two tiles of shared memory that
take turns at one address, with descriptors that differ, and the matrix instruction of the second reads garbage (wrong results,
or an illegal access, on the card only). Here the machine code of every kernel with matrix instructions is searched for a
uniform register that is read before anything has written it."""

import json
import re

import pytest

pytest.importorskip("triton")

# Runs in a process of its own: here TRITON_INTERPRET may be set.
COMPILE = """
import importlib, json, os, subprocess
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
cases = [c for c in importlib.import_module("trinix.kernels.triton." + MODULE).compile_cases(32) if c.name.endswith("bfloat16")]
for case in cases[PART::4]:
    names = case.kernel.arg_names
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, case.signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)
    cubin = next(path for file, path in binary.metadata_group.items() if file.endswith(".cubin"))
    sass = subprocess.run([cuobjdump, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    print(json.dumps({"name": case.name, "uniform": [line for line in sass.splitlines() if "UR" in line or "CALL" in line]}))
"""

WRITES = re.compile(r"(?:U(?!TMA|ISETP|PLOP3|SETMAXREG|BLKCP)|S2UR|R2UR|LDCU|VOTEU|CS2UR|REDUX)")


def unwritten(lines: list[str]) -> list[str]:
    """Instructions that read a uniform register before any instruction has written it, in the order of the code.

    What a called function writes counts from the call on; functions lie behind the kernel.
    """
    code = []
    for line in lines:
        if found := re.search(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+([^;]*);", line):
            code.append(
                (int(found[1], 16), line.strip(), *_uses(found[2], [one.strip() for one in found[3].split(",")]))
            )
    written, faults = set(), []
    for _, line, writes, reads in code:
        faults += [line for n in reads if n not in written]
        written |= writes
        if called := re.search(r"\bCALL\S*\s+0x([0-9a-f]+)", line):
            written |= {n for at, _, others, _ in code if at >= int(called[1], 16) for n in others}
    return faults


def _uses(name: str, operands: list[str]) -> tuple[set[int], list[int]]:
    """The uniform registers that an instruction (writes, reads); addresses of descriptors are not looked at."""
    writes = set()
    if WRITES.match(name):  # predicates may come first
        at = next((i for i, one in enumerate(operands) if not re.fullmatch(r"!?U?P\w+", one)), len(operands))
        if at < len(operands) and (register := re.fullmatch(r"UR(\d+)", operands[at])):
            target = int(register[1])
            operands = operands[at + 1 :]
            writes = {target, target + 1} if re.search(r"\.64\b|\.WIDE", name) else {target}
    return writes, [int(n) for one in operands if "desc[" not in one for n in re.findall(r"UR(\d+)", one)]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("module", ["head_mlp", "attention", "attention_decode"])
def test_no_uniform_register_is_read_before_it_is_written(module, part, fresh_process):
    code = COMPILE.replace("MODULE", repr(module)).replace("PART", str(part))
    lines = [json.loads(line) for line in fresh_process(code).splitlines()]
    assert lines
    assert not {one["name"]: unwritten(one["uniform"])[:2] for one in lines if unwritten(one["uniform"])}


def test_a_lost_write_is_found():
    good = [
        "/*0000*/ UMOV UR4, 0x400 ;",
        "/*0010*/ @P0 UIADD3 UR5, UP0, UR4, 0x40, URZ ;",
        "/*0020*/ LDG.E R1, desc[UR9][R2.64] ;",
    ]
    assert not unwritten(good)
    assert unwritten(good[1:]) == [good[1]]
    assert not unwritten(["/*0000*/ ULDC.64 UR6, c[0x0][0x208] ;", "/*0010*/ UIADD3.X UR1, UR7, URZ, URZ, UP0, !UPT ;"])
    called = ["/*0000*/ CALL.REL.NOINC 0x40 ;", "/*0010*/ UMOV UR7, UR8 ;", "/*0040*/ UMOV UR8, 0x1 ;"]
    assert not unwritten(called)
    assert unwritten(called[1:]) == [called[1]]
