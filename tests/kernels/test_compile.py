"""The compilers' verdict on every kernel, without a GPU; and kernels made badly on purpose, which it has to reject."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

import trinix.kernels
from trinix import ops
from trinix.lab import aot

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from trinix.kernels.triton._compile import CompileCase  # noqa: E402


def fault(one: aot.Report) -> str | None:
    if one.reason:
        return one.reason
    # eight rows of a mask's tile, a norm's rows, column sums, all of a column, 8192 weights: registers full on purpose
    tiles = "-mask/" in one.case or re.match(
        "norm/.*/bwd/|glu/.*/bwd-sums/|rope/norm-|softmax/columns-|attention_decode/|attention/|head_mlp/|linear/",
        one.case,
    )
    if one.occupancy < 1 / 2 and not tiles:
        return f"{one.registers} registers leave an occupancy of {one.occupancy:.0%}"
    return None


# what differs from a case beside it in a formula, a length or a mask that other cases have too
TWINS = re.compile(
    "head_mlp/(relu|sigmoid|quick_gelu|squared_relu|leaky_relu|tanh|softplus)/|head_mlp/.*-99k/"
    "|attention/d(192-128|256)/[a-z]+/|attention/d192-128/(fwd|keys)-causal/|attention/d64/.*-(causal|bias)/"
    "|attention/d128/(fwd|keys|queries)/|attention_decode/(64|256)-large-tiles-append/"
    "|attention_decode/128-(whole|large-pages)/|norm/(layer-(768|1024)|rms-(128|1024|4096))/"
    "|glu/(geglu_tanh|reglu|quick_geglu|glu|bilinear)/(fwd|bwd)/|head_mlp/silu-gated-(64|128)/"
    "|rope/norm-(12x64|40x80|gqa-32-8x128)/|attention/d64/keys-sink/"
)
# on a card with 99 KiB of shared memory these take 80 and more, or would
LARGE = re.compile(
    "head_mlp/silu(-gated)?-256|head_mlp/silu-odd/bwd|attention/d(128/fwd|256/keys)-causal/"
    "|attention_decode/(256-large-tiles|256-packed.*|128-large-tiles|latent.*)/"
)
PRODUCTS = re.compile("(head_mlp|attention|attention_decode)/.*/bfloat16")

# Runs in a forked process: here TRITON_INTERPRET may be set. A report is what ``aot.report`` asks of its own processes, which
# would import PyTorch and Triton once more for every test.
COMPILE = """
import dataclasses, json
from trinix.lab import aot

cases = aot.load_cases(aot.KERNEL_MODULES, TARGET)
for name in NAMES:
    print(json.dumps(dataclasses.asdict(aot.compile_one(cases[name], TARGET))), flush=True)
"""


@pytest.fixture(scope="session")
def kernels(forked_process):
    """name -> which kernel, of every case."""
    code = """
    import json
    from trinix.lab import aot
    cases = aot.load_cases(aot.KERNEL_MODULES, "sm_90")
    print(json.dumps({name: id(case.kernel) for name, case in cases.items()}))
    """
    return json.loads(forked_process(code))


@pytest.fixture(scope="session")
def listed(kernels):
    return lambda op: {name for name in kernels if name.startswith(f"{op}/")}


def firsts(kernels) -> list[str]:
    """As ``aot.first_cases()``."""
    quick = [name for name in kernels if aot.quick(name)]
    return list({kernels[name]: name for name in reversed(quick)}.values())[::-1]


def selection(kernels):
    """bfloat16 without the twins, float32 once a kernel, and what is known to spill: all with --every-binary."""
    quick = [name for name in kernels if aot.quick(name) and not TWINS.match(name)]
    first = {kernel: name for name, kernel in reversed(kernels.items()) if name.endswith("/float32")}
    spilling = [name for name in aot.KNOWN_SPILLS if not name.endswith("/float16")]
    return [name for name in kernels if name in {*quick, *first.values(), *spilling}]


@pytest.fixture
def compiled(forked_process):
    def run(names, target, more=""):
        """The reports, and what more code prints in the same process."""
        code = f"NAMES, TARGET = {list(names)}, {target!r}\n{COMPILE}{more}"
        lines = [json.loads(line) for line in forked_process(code).splitlines()]
        reports = [aot.Report(**one) for one in lines[: len(names)]]
        assert [one.case for one in reports] == list(names) != []
        assert not [f"{one.case} {one.target}: {fault(one)}" for one in reports if fault(one)]
        return reports, lines[len(names) :]

    return run


@pytest.mark.parametrize("half", [0, 1])
def test_every_binary_compiles_well(half, kernels, every_binary, compiled):
    names = [name for name in (kernels if every_binary else selection(kernels)) if not PRODUCTS.match(name)]
    compiled(names[half::2], "sm_90")


@pytest.mark.parametrize("half", [0, 1])
def test_every_binary_with_products_compiles_well_and_reads_no_unwritten_register(
    half, kernels, every_binary, compiled
):
    """In one test: the second half finds in Triton's cache what the first has compiled."""
    names = [name for name in (kernels if every_binary else selection(kernels)) if PRODUCTS.match(name)][half::2]
    lines = compiled(names, "sm_90", DISASSEMBLE)[1]
    assert len(lines) > len(names) / 2
    assert not {one["name"]: unwritten(one["uniform"])[:2] for one in lines if unwritten(one["uniform"])}


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_every_kernel_compiles_well_for_other_cards(target, kernels, every_binary, compiled):
    if every_binary:
        names = list(filter(aot.quick, kernels))
    elif target == "sm_100":  # in float16, which has no selection of its own
        halves = [name.replace("/bfloat16", "/float16") for name in firsts(kernels)]
        names = [half if half in kernels else name for half, name in zip(halves, firsts(kernels), strict=True)]
        assert sum(name.endswith("/float16") for name in names) > len(names) / 2
    else:
        names = firsts(kernels)
    compiled(names, target)


def test_a_card_with_99_kib_of_shared_memory_has_binaries_that_fit(kernels, every_binary, compiled):
    """sm_86, sm_89 and sm_120 have what sm_80 has of tensor cores, and less of this: what is over it has a smaller form."""
    quick = list(filter(aot.quick, kernels))
    some = [name for name in quick if name in firsts(kernels) or LARGE.match(name)]
    reports, _ = compiled(quick if every_binary else some, "sm_80")
    large = {one.case for one in reports if one.shared_bytes > 99 * 1024}
    tiles = {one for one in large if "-large-tiles" in one}  # never chosen there
    forms = ("head_mlp/silu-256{}/fwd", "head_mlp/silu-256{}/bwd", "head_mlp/silu-gated-256{}/fwd")
    forms += ("attention_decode/latent-packed{}", "attention_decode/256-packed{}")
    assert large - tiles == {form.format("") + "/bfloat16" for form in forms}
    assert {form.format("-99k") + "/bfloat16" for form in forms} <= {one.case for one in reports}


def test_the_selections_have_every_kernel_once(kernels):
    assert set(firsts(kernels)) == set(aot.first_cases())
    assert {kernels[name] for name in firsts(kernels)} == {kernels[name] for name in kernels if aot.quick(name)}
    assert {kernels[name] for name in selection(kernels)} == set(kernels.values())


def test_every_kind_pass_and_dtype_is_listed(listed):
    dtypes = ("float16", "bfloat16", "float32")
    flat = {f"activation/{k}/{p}/{d}" for k in ops.KINDS if k != "none" for p in ("fwd", "bwd") for d in dtypes}
    special = [f"{kind}/{way}-mask" for kind in ("relu", "leaky_relu") for way in ("fwd", "bwd")]
    special += ["silu/fwd-strided", "silu/bwd-strided", "relu/bwd-mask-strided"]
    assert listed("activation") == flat | {f"activation/{name}/{d}" for name in special for d in dtypes}


def test_every_norm_kernel_width_and_dtype_is_listed(listed):
    widths = (128, 768, 1024, 4096, 8192)
    names = [f"layer-{n}/{way}" for n in widths for way in ("fwd", "bwd")] + [f"rms-{n}/bwd" for n in widths]
    names += [f"{form}/{way}" for form in ("residual-4096", "wide-65536") for way in ("fwd", "bwd")]
    names += [
        "rms-mish-4096/bwd",
        "rms-1001/bwd",
        "layer-12288/bwd",
        "rms-16384/bwd",
        "wide-sums-65536/bwd",
        "add-partials/bwd",
    ]
    assert listed("norm") == {f"norm/{name}/{d}" for name in names for d in ("float16", "bfloat16", "float32")}


def test_every_glu_kernel_and_dtype_is_listed(listed):
    kinds = ("swiglu", "geglu", "geglu_tanh", "reglu", "quick_geglu", "glu", "bilinear")
    names = [f"{kind}/{way}" for kind in kinds for way in ("fwd", "bwd")] + ["swiglu/bwd-gate", "swiglu/bwd-up"]
    ways = ("pairs", "rows", "rows-short", "rows-pairs", "strided")
    names += [f"swiglu/{way}-{kernel}" for way in ("fwd", "bwd") for kernel in ways]
    names += [f"{kind}/bwd-sums" for kind in ("swiglu", "geglu", "reglu")]
    assert listed("glu") == {f"glu/{name}/{d}" for name in names for d in ("float16", "bfloat16", "float32")}


def test_every_softmax_kernel_and_dtype_is_listed(listed):
    lengths = (128, 1000, 4096, 32768, 50257, 131072)
    views = [f"rows-{n}" for n in lengths] + ["columns-256", "columns-8192"]
    names = {f"softmax/{view}/{way}" for view in views for way in ("fwd", "bwd")} | {"softmax/rows-4096-mask/fwd"}
    dtypes = ("float16", "bfloat16", "float32")
    assert listed("softmax") == {f"{name}/{d}" for name in names for d in dtypes}
    assert listed("log_softmax") == {f"log_softmax/rows-4096/{way}/{d}" for way in ("fwd", "bwd") for d in dtypes}


def test_every_attention_kernel_and_dtype_is_listed(listed):
    kernels = [f"{kernel}{form}" for kernel in ("fwd", "keys", "queries") for form in ("", "-causal")]
    kernels += ["prepare", "bias"]
    with_bias = ["fwd-bias", "keys-bias", "queries-bias", "apart", "sums"]
    halves = {f"d{d}/{kernel}" for d in ("64", "128", "192-128", "256") for kernel in kernels}
    small = {f"d{d}/{kernel}" for d in (64, 128) for kernel in (*kernels, *with_bias, "keys-sink")}
    wanted = {f"attention/{name}/{dtype}" for name in halves | small for dtype in ("float16", "bfloat16")}
    assert listed("attention") == wanted | {f"attention/{name}/float32" for name in small}


def test_every_decoding_kernel_and_dtype_is_listed(listed):
    forms = "64 128 128-whole 128-packed 128-pages 128-large-pages 128-append 256 latent latent-packed"
    forms += " latent-packed-99k 256-packed 256-packed-99k 80-options"
    large = "128-short 64-large-tiles 64-large-tiles-append 128-large-tiles 256-large-tiles 256-large-tiles-append"
    dtypes = ("float16", "bfloat16", "float32")
    names = (*forms.split(), "combine-128", "combine-512")
    wanted = {f"attention_decode/{name}/{d}" for name in names for d in dtypes}
    assert listed("attention_decode") == wanted | {
        f"attention_decode/{name}/{d}" for name in large.split() for d in dtypes[:2]
    }


def test_every_linear_kernel_is_listed(listed):
    names = ("4096", "14336-bias", "3000")
    assert listed("linear") == {f"linear/{name}/{d}" for name in names for d in ("float16", "bfloat16")}


def test_every_latent_kernel_is_listed(listed):
    dtypes = ("float16", "bfloat16", "float32")
    assert listed("latent_keys") == {f"latent_keys/{pass_}/{d}" for pass_ in ("fwd", "bwd") for d in dtypes}


def test_no_kernel_has_a_text_as_a_default():
    """Triton 3.6 takes the text of a function's default for a value at run time and does not compile the call."""
    found, folder = [], Path(trinix.kernels.__file__).parent
    for file in folder.rglob("*.py"):
        for function in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)):
            if any("jit" in ast.unparse(d) for d in function.decorator_list):
                defaults = [
                    d for d in (*function.args.defaults, *function.args.kw_defaults) if isinstance(d, ast.Constant)
                ]
                found += [f"{file.name}: {function.name}" for d in defaults if isinstance(d.value, str)]
    assert not found


def test_every_head_mlp_kernel_is_listed(listed):
    forms = (*ops.KINDS, "silu-16", "silu-128", "silu-256", "silu-gated-64", "silu-gated-128", "silu-gated-256")
    forms += ("silu-256-99k", "silu-gated-256-99k", "silu-odd", "silu-odd-32", "silu-odd-both")
    cases = [f"{form}/bfloat16" for form in (*forms, "silu-bias-mean", "silu-transposed")]
    cases += ["silu/float16", *(f"silu-{d}/float32" for d in (64, 128, 256))]
    wanted = {
        f"head_mlp/{form}/{way}/{dtype}" for form, dtype in (one.split("/") for one in cases) for way in ("fwd", "bwd")
    }
    assert listed("head_mlp") == wanted | {"head_mlp/add-partials/bwd/float32"}


# ---- registers that are read before they are written ---------------------------------------------------------------------
#
# ptxas 12.8, which Triton 3.6 and 3.7 bring, can lose the first write of a uniform register: two tiles of shared memory that
# take turns at one address, with descriptors that differ, and the matrix instruction of the second reads garbage (wrong
# results, or an illegal access, on the card only).

# Runs behind COMPILE.
DISASSEMBLE = """
import triton
from binaries import disassembled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

products = {}
for case in map(cases.get, NAMES):
    names = case.kernel.arg_names
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, case.signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)
    if any(word in binary.asm["ptx"] for word in ("wgmma.mma", "mma.sync")):
        products[case.name] = binary.asm["cubin"]
for name, lines in zip(products, disassembled(list(products.values()))):
    print(json.dumps({"name": name, "uniform": [line for line in lines if "UR" in line or "CALL" in line]}))
"""

WRITES = re.compile(r"(?:U(?!TMA|ISETP|PLOP3|SETMAXREG|BLKCP)|S2UR|R2UR|LDCU|VOTEU|CS2UR|REDUX)")


def unwritten(lines: list[str]) -> list[str]:
    """Instructions that read a uniform register before any instruction has written it, in the order of the code.

    What a called function writes counts from the call on; functions lie behind the kernel.
    """
    code = []
    for line in lines:
        if found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+([^;]*);", line):
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


# ---- bad on purpose; this module is a kernel module for ``aot.report``, so it needs compile_cases -----------------------


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def _masked_copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _center(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i).to(tl.float32)
    tl.store(y + i, (v - tl.sum(v, 0) / BLOCK).to(y.dtype.element_ty))


@triton.jit
def _multiply(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(n):
        total += tl.dot(tl.load(x + k * BLOCK * BLOCK + i), tl.load(y + k * BLOCK * BLOCK + i))
    tl.store(y + i, total.to(y.dtype.element_ty))


@triton.jit
def _odd(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK - 1), 0.0)


def compile_cases(lanes):
    def case(name, kernel, block, aligned=("x", "y"), **options):
        signature = {"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"}
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True} | options
        return CompileCase(name, kernel, signature, {"BLOCK": block}, options, aligned, 128, 4)

    yield case("good", _copy, 2048)
    yield case("narrow", _masked_copy, 2048)
    yield case("unaligned", _copy, 2048, aligned=())
    yield case("spilling", _center, 32768, **({"maxnreg": 64} if lanes == 32 else {"waves_per_eu": 8}))  # few registers
    yield case("unknown", _copy, 2048, **({"waves_per_eu": 8} if lanes == 32 else {"maxnreg": 64}))
    yield case("greedy", _multiply, 128, num_stages=5)
    yield case("wrong", _odd, 2048)
    yield case("crash", _copy, 2048, aligned=(os._exit(3) for _ in "x"))  # as a compiler's segmentation fault would


def test_bad_kernels_are_rejected(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiling processes
    modules, seen = (__name__,), []
    names = aot.case_names(modules)
    reports = aot.report(names, ["sm_90", "gfx942"], lambda done, total: seen.append((done, total)), modules)
    assert seen == [(n, len(reports)) for n in range(1, len(reports) + 1)]
    assert [(one.case, one.target) for one in reports] == [(n, t) for n in names for t in ("sm_90", "gfx942")]
    wanted = {
        "good": "None",
        "narrow": "widest load is 16 bits, wanted 128; widest store is 16 bits, wanted 128",
        "unaligned": "widest load is 16 bits, wanted 128; widest store is 16 bits, wanted 128",
        "spilling": r"spills \d+ bytes a thread.*",
        "unknown": "a launch refuses (maxnreg|waves_per_eu)",
        "greedy": r".*asks for \d+ bytes of shared memory, limit \d+.*",
        "wrong": "(?s)CompilationError: .*power of 2.*",
        "crash": "the compiling process ended with exit status 3",
    }
    assert not [str(one) for one in reports if not re.fullmatch(wanted[one.case], str(one.reason))]
    assert [one.ok for one in reports] == [one.case == "good" for one in reports]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no-such-case"):
        aot.report(["no-such-case"], modules=(__name__,))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--select", "no-such-case", "--modules", __name__],
            "--select 'no-such-case' leaves no case; --list has their names",
        ),
        (["--targets", "sm_9,sm_90", "--modules", __name__], "got ['sm_9']"),
    ],
)
def test_a_command_that_would_compile_nothing_is_refused(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["aot", *flags])
    with pytest.raises(SystemExit, match="2"):
        aot.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "load", "store"),
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n@%p1 st.global.b16 [ %rd2 + 0 ], { %rs1 };", 128, 16),
        ("ld.global.L1::evict_last.v8.b32 { %r1 };\nst.global.v2.b32 [ %rd1 ], { %r1 };", 256, 64),
        ("ld.shared.v4.b32 {%r1}, [%r2];\nld.param.b64 %rd1, [p];", 0, 0),
        ("cp.async.cg.shared.global [ %r5 + 0 ], [ %rd8 + 0 ], 0x10, %r6;", 128, 0),
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen\nglobal_store_short v0, v1, s[2:3]", 128, 16),
        ("global_load_ushort v0, v1, s[0:1]\nbuffer_store_dword v2, v1, s[0:3], 0 offen", 16, 32),
    ],
)
def test_widest_access(text, load, store):
    assert (aot.widest_access(text, "load"), aot.widest_access(text, "store")) == (load, store)


def test_too_many_registers_are_a_fault():
    facts = {"spills": 0, "shared_bytes": 0, "load_bits": 128, "store_bits": 128, "wanted_bits": 128}
    used = {("sm_90", 32): 1.0, ("sm_90", 40): 0.8, ("sm_90", 255): 0.125, ("gfx942", 64): 1.0, ("gfx942", 131): 0.375}
    for (target, registers), occupancy in used.items():
        one = aot.Report("activation/silu/fwd/float16", target, registers=registers, **facts)
        assert one.ok
        assert one.occupancy == pytest.approx(occupancy, abs=0.01)
        assert (fault(one) is None) == (occupancy > 0.5)


def test_estimate_is_bytes_over_listed_bandwidth():
    one = aot.Report("c", "sm_90", bytes_per_element=4)
    assert one.estimate_ms == pytest.approx(12 * 12 * 4096 * 128 * 4 / 3352e9 * 1e3)
