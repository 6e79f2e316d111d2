"""The tiles that sm_90 takes, whose products are wgmma: what the compiler makes of them, without a GPU."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a process of its own: here TRITON_INTERPRET may be set.
COMPILE = """
import json, os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trinix.kernels.triton import attention as kernels
from trinix.kernels.triton._compile import compile_case

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
T = "*bf16"
FORWARD = T, T, T, T, "*u8", "*fp32", T, "*i64", "*i32", "*i32", T, "*fp32"
BACKWARD = T, T, T, T, "*u8", "*fp32", "*i64", "*i32", "*i32", T, "*fp32", T, T, T


def cases(d, dv, unit=8, **options):
    form, call = kernels.Form(d, dv, unit, **options), (d, dv, 2, "sm_90")
    yield "forward", kernels.forward_launch(form, kernels.choose_forward(*call, False, unit > 1)), FORWARD
    form = form._replace(raw=False)
    walks = [(kernels.choose_keys(*call), (True, True))]
    if split := kernels.choose_split(*call):
        walks = zip(split, ((True, False), (False, True)))
    for config, want in walks:
        yield f"keys {want}", kernels.keys_launch(form, False, True, config, want, True), BACKWARD
    yield "queries", kernels.queries_launch(form, kernels.choose_queries(*call, False, form.right), True), BACKWARD[:-2]


for name, launch, tensors in cases(*CALL, **OPTIONS):
    case = compile_case(name, launch, 0.0, tensors)
    names = case.kernel.arg_names
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, case.signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = os.path.join(folder, "k.ptx")
        open(ptx, "w").write(binary.asm["ptx"])
        command = [PTXAS, "-v", "--gpu-name=sm_90a", ptx, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(json.dumps({"name": name, "products": binary.asm["ptx"].count("wgmma.mma"), "warnings": sorted(set(re.findall("C75[0-9]{2}", log))),
                      "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log)))}))
"""


@pytest.mark.parametrize(
    ("d", "options"),
    [
        ((64, 64), {"right": True}),
        ((128, 128), {}),
        ((128, 128), {"left": True, "right": True}),
        ((256, 256), {"right": True}),
        ((192, 128), {"right": True}),
    ],
    ids=["d64-causal", "d128", "d128-window", "d256-causal", "d192-128-causal"],
)
def test_no_product_waits_for_itself(d, options, fresh_process):
    lines = fresh_process(COMPILE.replace("CALL", repr(d)).replace("OPTIONS", repr(options))).splitlines()
    assert len(lines) >= 3
    for one in map(json.loads, lines):
        assert one["products"] >= 2, one
        assert not one["warnings"], one  # C7510 and its like: "wgmma serialized"


@pytest.mark.parametrize(("d", "dv", "unit"), [(129, 128, 1), (136, 200, 1), (136, 200, 8)])
def test_forward_of_two_tiles_of_channels_spills_little(d, dv, unit, fresh_process):
    code = COMPILE.replace("cases(*CALL, **OPTIONS)", f"[next(cases({d}, {dv}, {unit}, right=True))]")
    (line,) = fresh_process(code).splitlines()
    assert json.loads(line)["spills"] <= 64, line  # with the aligned tiles 1700
