"""The tiles that sm_90 takes, whose products are wgmma: what the compiler makes of them, without a GPU."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
from binaries import compiled_case
from trinix.kernels.triton import attention as kernels
from trinix.kernels.triton._compile import compile_case

T = "*bf16"
FORWARD = T, T, T, T, "*u8", "*fp32", T, "*i64", "*i32", "*i32", T, "*fp32"
BACKWARD = T, T, T, T, "*u8", "*fp32", "*i64", "*i32", "*i32", T, "*fp32", T, T, T, "*fp32", "*fp32"


def cases(d, dv, unit=8, **options):
    form, call = kernels.Form(d, dv, unit, **options), (d, dv, 2, "sm_90")
    yield "forward", kernels.forward_launch(form, kernels.choose_forward(*call, False, unit > 1)), FORWARD
    form = form._replace(raw=False)
    config = kernels.choose_keys(*call)
    walks = [(config, (True, True, False)), (config, (True, True, True))]
    if split := kernels.choose_split(*call):
        walks = zip(split, ((True, False, False), (False, True, False)))
    for config, want in walks:
        yield f"keys {want}", kernels.keys_launch(form, False, True, config, want, True), BACKWARD
    yield "queries", kernels.queries_launch(form, kernels.choose_queries(*call, False, form.right), True), BACKWARD[:-4]


for name, launch, tensors in CASES():
    binary, log = compiled_case(compile_case(name, launch, 0.0, tensors))
    print(json.dumps({"name": name, "products": binary.asm["ptx"].count("wgmma.mma"), "warnings": sorted(set(re.findall("C75[0-9]{2}", log))),
                      "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log)))}))
"""


def made(cases, forked_process):
    code = COMPILE.replace("CASES()", cases)
    return [json.loads(line) for line in forked_process(code).splitlines()]


@pytest.mark.parametrize(
    ("calls", "few"),
    [
        # a sink's gradient in the tile with fewer registers left, at D = 128
        ("cases(64, 64, right=True), cases(192, 128, right=True)", (0, 1, 3, 4, 5, 6, 7)),
        # of D = 256 what spills
        ("cases(128, 128, left=True, right=True), cases(256, 256, right=True)", (0, 1, 2, 3, 5, 6)),
    ],
    ids=["d64-and-192-128-causal", "d128-window-and-d256-causal"],
)
def test_no_product_waits_for_itself(calls, few, forked_process, every_binary):
    """Of eight binaries; --every-binary takes those too whose sort another tile has."""
    chosen = "True" if every_binary else f"i in {few}"
    lines = made(
        f"(one for i, one in enumerate(one for call in ({calls}) for one in call) if {chosen})", forked_process
    )
    assert len(lines) == (8 if every_binary else len(few))
    for one in lines:
        assert one["products"] >= 2, one
        assert not one["warnings"], one  # C7510 and its like: "wgmma serialized"


def test_forward_of_two_tiles_of_channels_spills_little(forked_process):
    for one in made("[next(cases(*call, right=True)) for call in ((129, 128, 1), (136, 200, 8))]", forked_process):
        assert one["spills"] <= 64, one  # with the aligned tiles 1700
