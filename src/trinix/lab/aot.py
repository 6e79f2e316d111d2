"""What the compilers make of our kernels, without a GPU: registers, spills, shared memory, access width.

Every binary that ``compile_cases`` of a kernel module lists is compiled by Triton for cards that need not be here. That
shows what a GPU would suffer from silently: a spill, a vector load that fell apart, too much shared memory. It shows no
time: ``Report.estimate_ms`` is bytes over the listed bandwidth.

A jit function is an interpreted function for good if TRITON_INTERPRET is set when its module is imported. So ``report``
compiles in child processes without that variable, and its caller, who may have it set, never imports Triton::

    python -m trinix.lab.aot --select mish --targets sm_90,gfx942
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from trinix.device import LIMITS

# each has compile_cases(lanes), lanes: threads of a warp
KERNEL_MODULES = (
    "trinix.kernels.triton.activation",
    "trinix.kernels.triton.norm",
    "trinix.kernels.triton.glu",
    "trinix.kernels.triton.softmax",
    "trinix.kernels.triton.rope",
    "trinix.kernels.triton.alibi",
    "trinix.kernels.triton.attention",
    "trinix.kernels.triton.head_mlp",
    "trinix.kernels.triton.attention_decode",
    "trinix.kernels.triton.linear",
    "trinix.kernels.triton.latent",
)
TARGETS = tuple(LIMITS)
ELEMENTS = 12 * 12 * 4096 * 128  # of the estimate: the cases X-*-4096
MOST_WORKERS = 16  # each imports torch

# case -> bytes a thread that may spill, on any target: more is a fault. These reach 93% of a copy all the same (docs/perf/norm.md)
KNOWN_SPILLS = {"norm/layer-12288/bwd/float32": 88, "norm/rms-16384/bwd/float32": 16}
# head_mlp's sums fill the registers on purpose: with fewer a tile, or with more warps, it is slower (docs/perf/head_mlp.md)
KNOWN_SPILLS |= {"head_mlp/silu-128/bwd/bfloat16": 256, "head_mlp/silu-256/bwd/bfloat16": 504}
KNOWN_SPILLS |= {f"head_mlp/silu-gated-256{card}/bwd/bfloat16": 112 for card in ("", "-99k")}
KNOWN_SPILLS |= {"head_mlp/silu-gated-256/fwd/bfloat16": 32}
KNOWN_SPILLS |= {"head_mlp/gelu_tanh/bwd/bfloat16": 80, "head_mlp/squared_relu/bwd/bfloat16": 8}
KNOWN_SPILLS |= {"head_mlp/silu-bias-mean/bwd/bfloat16": 64}
KNOWN_SPILLS |= {"rope/norm-gqa-32-8x128/bwd/float32": 8, "rope/norm-32x128/bwd/float16": 8}  # on sm_100 only
KNOWN_SPILLS |= {"softmax/rows-32768/bwd/float16": 8}  # bfloat16 has the same loads in flight without
# four vectors in flight; on sm_100 only
KNOWN_SPILLS |= {f"softmax/rows-50257/fwd/{t}": 8 for t in ("bfloat16", "float16")}
KNOWN_SPILLS |= {"attention/d128/queries-bias/float32": 24}  # 16 on sm_90
KNOWN_SPILLS |= {f"attention/d192-128/queries-causal/{t}": 8 for t in ("bfloat16", "float16")}
KNOWN_SPILLS |= {"attention/d64/keys-bias/bfloat16": 24, "attention/d64/keys-bias/float16": 24}
KNOWN_SPILLS |= {f"attention/d64/queries-bias/{t}": 8 for t in ("bfloat16", "float16")}
KNOWN_SPILLS |= {"attention/d128/queries-bias/float16": 8}
KNOWN_SPILLS |= {"attention/d256/queries/bfloat16": 16}
# on gfx942 only: 64 and 32 rows of 256 channels in 4 warps
KNOWN_SPILLS |= {f"attention_decode/256-packed/{t}": 536 for t in ("bfloat16", "float16")}
KNOWN_SPILLS |= {f"attention_decode/256-packed-99k/{t}": 408 for t in ("bfloat16", "float16")}


@dataclass(frozen=True)
class Report:
    """One case compiled for one target; with ``error`` the facts are None."""

    case: str
    target: str
    error: str | None = None
    registers: int | None = None  # a thread
    spills: int | None = None  # bytes of stack a thread: our kernels put nothing else there
    shared_bytes: int | None = None  # a block
    load_bits: int | None = None  # the widest access to global memory
    store_bits: int | None = None
    wanted_bits: int | None = None  # what both have to reach
    bytes_per_element: float | None = None
    seconds: float | None = None  # None when Triton's cache had it

    @property
    def shared_limit_bytes(self) -> int:
        return LIMITS[self.target].shared_kib * 1024

    @property
    def occupancy(self) -> float | None:
        """The share of a multiprocessor's thread slots that the registers leave usable; of nothing else."""
        if self.registers is None:
            return None
        granules = -(-self.registers // 8)
        if self.target.startswith("gfx"):
            return min(1.0, 512 // (granules * 8) / 8)  # 8 waves share a SIMD's 512 registers a lane
        return min(1.0, 65536 // (granules * 8 * 32) / 64)  # 64 warps share 65536

    @property
    def estimate_ms(self) -> float | None:
        """An estimate, not a time: the bytes of ``ELEMENTS`` elements over the card's listed bandwidth."""
        if self.bytes_per_element is None:
            return None
        return ELEMENTS * self.bytes_per_element / (LIMITS[self.target].bandwidth_gbs * 1e6)

    @property
    def reason(self) -> str | None:
        """Why this binary is not good enough, or None."""
        if self.error:
            return self.error
        faults = []
        if self.spills > KNOWN_SPILLS.get(self.case, 0):
            faults.append(f"spills {self.spills} bytes a thread")
        if self.shared_bytes > self.shared_limit_bytes:
            faults.append(f"asks for {self.shared_bytes} bytes of shared memory, limit {self.shared_limit_bytes}")
        for verb, bits in (("load", self.load_bits), ("store", self.store_bits)):
            if bits < self.wanted_bits:
                faults.append(f"widest {verb} is {bits} bits, wanted {self.wanted_bits}")
        return "; ".join(faults) or None

    @property
    def ok(self) -> bool:
        return self.reason is None


def quick(name: str) -> bool:
    """Whether a case belongs to the quick selection: everything in bfloat16."""
    return name.endswith("/bfloat16")


def quick_cases() -> tuple[str, ...]:
    return tuple(filter(quick, case_names()))


@functools.cache
def case_names(modules: tuple[str, ...] = KERNEL_MODULES) -> tuple[str, ...]:
    """The names of all cases, asked of a child process (about two seconds, once)."""
    return _listed("--list", modules)


@functools.cache
def first_cases(modules: tuple[str, ...] = KERNEL_MODULES) -> tuple[str, ...]:
    """The first quick case of every kernel: what two cores compile for all targets in a minute."""
    return _listed("--list-first", modules)


def _listed(command: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    options = {"env": _environment(), "stdout": subprocess.PIPE, "start_new_session": True}
    listing = subprocess.run(_child(command, modules), check=True, **options)
    return tuple(listing.stdout.decode().split())


def report(
    cases: Iterable[str],
    targets: Sequence[str] = TARGETS,
    progress: Callable[[int, int], object] | None = None,
    modules: tuple[str, ...] = KERNEL_MODULES,
) -> list[Report]:
    """Compile the named cases for all targets, in one child process a CPU core; reports in the order asked for.

    ``progress(done, total)`` is called after each. A compiler that crashes costs its own case only.
    """
    jobs = [(case, target) for case in cases for target in targets]
    if unknown := {c for c, _ in jobs}.difference(case_names(modules)) | {t for _, t in jobs}.difference(LIMITS):
        raise ValueError(f"aot.report: no such case or target: {sorted(unknown)}")
    compilers = [_Compiler(modules) for _ in range(min(os.cpu_count() or 1, MOST_WORKERS, len(jobs)))]
    idle = queue.SimpleQueue()
    for one in compilers:
        idle.put(one)

    def compile_with_idle(case: str, target: str) -> Report:
        compiler = idle.get()
        try:
            return compiler.compile(case, target)
        finally:
            idle.put(compiler)

    pool = ThreadPoolExecutor(max(1, len(compilers)))
    try:
        futures = [pool.submit(compile_with_idle, *job) for job in jobs]
        for done, _ in enumerate(as_completed(futures), 1):
            if progress:
                progress(done, len(jobs))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        for one in compilers:
            one.close()


class _Compiler:
    """A child process that answers "case, tab, target" with a report in JSON; started again after a crash.

    In a session of its own: Ctrl-C is this process's affair, which closes the child's input."""

    def __init__(self, modules: tuple[str, ...]):
        self.modules = modules
        self.process = None

    def compile(self, case: str, target: str) -> Report:
        if self.process is None:
            self.process = subprocess.Popen(
                _child("--serve", self.modules), env=_environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        try:
            self.process.stdin.write(f"{case}\t{target}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return Report(**json.loads(answer))
        status = self.process.wait()
        self.close()
        return Report(case, target, error=f"the compiling process ended with exit status {status}")

    def close(self) -> None:
        if self.process:
            self.process.communicate()  # its input ends, so it does
            self.process = None


def _child(command: str, modules: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "trinix.lab.aot", command, "--modules", ",".join(modules)]


def _environment() -> dict[str, str]:
    """Ours without the interpreter; the child finds modules where this process does."""
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return ours | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


# From here on: the child's side, the only one that imports Triton.


def load_cases(modules: Iterable[str], target: str) -> dict:
    """name -> case, in the order of the modules. The names are the same for all targets, the configurations are not."""
    lanes = _gpu(target).warp_size
    return {case.name: case for module in modules for case in importlib.import_module(module).compile_cases(lanes)}


def _gpu(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def compile_one(case, target: str) -> Report:
    """Compile a case of ``compile_cases`` for a target of ``device.LIMITS`` and look at the result."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.errors import TritonError

    known = vars(make_backend(_gpu(target)).parse_options({}))  # triton.compile passes over others, a launch does not
    if unknown := [name for name in case.options if name not in known]:
        return Report(case.name, target, error=f"a launch refuses {', '.join(unknown)}")
    amd = target.startswith("gfx")
    names = case.kernel.arg_names
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    if amd:  # what Triton adds for tensors below 2 GiB: buffer instructions with 32-bit offsets
        for at in (i for i, name in enumerate(names) if case.signature[name].startswith("*")):
            hints.setdefault((at,), []).append(["tt.pointer_range", 32])
    source = ASTSource(
        case.kernel, case.signature, {(names.index(name),): value for name, value in case.constexprs.items()}, hints
    )
    cached = []
    start = time.perf_counter()
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = lambda **facts: cached.append(facts["cache_hit"])
            compiled = triton.compile(source, target=_gpu(target), options=case.options)
    except (TritonError, RuntimeError) as error:  # a pass that fails raises RuntimeError
        return Report(case.name, target, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    text = compiled.asm["amdgcn" if amd else "ptx"]
    registers, spills = _amd_registers(text) if amd else _nvidia_registers(compiled)
    return Report(
        case.name, target, None, registers, spills, compiled.metadata.shared, widest_access(text, "load"),
        widest_access(text, "store"), case.access_bits, case.bytes_per_element, None if any(cached) else seconds,
    )  # fmt: skip


def _nvidia_registers(compiled) -> tuple[int, int]:
    """(registers, bytes of stack) a thread."""
    from triton import knobs

    cubin = next(path for file, path in compiled.metadata_group.items() if file.endswith(".cubin"))
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    return registers, stack + local


def _amd_registers(amdgcn: str) -> tuple[int, int]:
    """(vector registers, bytes of stack) a thread. Scalar registers spill into vector registers, which costs no memory."""
    facts = dict(re.findall(r"^\s*\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", amdgcn, re.M))
    return int(facts["vgpr_count"]), int(facts["private_segment_fixed_size"])


def widest_access(text: str, verb: str) -> int:
    """Bits of the widest "load" or "store" of global memory in PTX or in AMD assembly; 0 without any."""
    short = {"load": "ld", "store": "st"}[verb]
    ptx = re.findall(rf"\b{short}(?:\.\w+)*\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bufs](\d+)\s", text)
    amd = re.findall(rf"\b(?:global|buffer|flat)_{verb}_(?:dword(?:x(\d))?|[us]?(short|byte))", text)
    widths = [int(lanes or 1) * int(bits) for lanes, bits in ptx]
    if verb == "load":  # straight into shared memory; the size comes in bytes
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;\n]*?\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", text)
        widths += [8 * int(size, 0) for size in copies]
    widths += [{"short": 16, "byte": 8}.get(part) or 32 * int(words or 1) for words, part in amd]
    return max(widths, default=0)


def _serve(modules: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print must not pass for an answer
    cases = {target: load_cases(modules, target) for target in LIMITS}
    for line in sys.stdin:
        name, target = line.split()
        print(json.dumps(dataclasses.asdict(compile_one(cases[target][name], target))), file=answers)


def _line(one: Report) -> str:
    facts = f"{one.case:44} {one.target:7}"
    if not one.error:
        time_taken = "cached" if one.seconds is None else f"{one.seconds:.2f} s"
        facts += (
            f"{one.registers:4} registers (occupancy {one.occupancy:4.0%}), {one.spills} spilled, {one.shared_bytes:6} B"
            f" shared, load {one.load_bits:3} store {one.store_bits:3} bits, estimate {one.estimate_ms:.3f} ms,"
            f" {time_taken:6}"
        )
    return f"{facts} {one.reason or 'ok'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trinix.lab.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--select", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="bfloat16 only")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--modules", default=",".join(KERNEL_MODULES), help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="the names of all cases")
    parser.add_argument("--list-first", action="store_true", help="the names of the first quick case of every kernel")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    modules = tuple(asked.modules.split(","))
    if asked.serve:
        _serve(modules)
        return 0
    if asked.list or asked.list_first:
        cases, first = load_cases(modules, TARGETS[0]), {}
        for name in filter(quick, cases):
            first.setdefault(id(cases[name].kernel), name)
        print(*(first.values() if asked.list_first else cases), sep="\n")
        return 0
    cases = [c for c in case_names(modules) if asked.select in c and (quick(c) or not asked.quick)]
    if not cases:
        parser.error(f"--select {asked.select!r} leaves no case; --list has their names")
    targets = asked.targets.split(",")
    if unknown := set(targets) - set(LIMITS):
        parser.error(f"--targets must be among {list(LIMITS)}, got {sorted(unknown)}")
    reports = report(cases, targets, modules=modules)
    for one in reports:
        print(json.dumps(dataclasses.asdict(one)) if asked.json else _line(one))
    return int(not all(one.ok for one in reports))


if __name__ == "__main__":
    sys.exit(main())
