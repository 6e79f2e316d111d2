"""Binaries that only some cards take, of kernels whose listed cases leave the flag off: what the compiler makes of them, without a GPU."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
import torch
from binaries import compiled_case
from trinix.kernels.triton import attention, attention_decode, glu
from trinix.kernels.triton._compile import compile_case


def early():
    tile = glu.choose_rows(4096, 4096, 2, False, 32)
    yield "forward", 90, glu.forward_rows("swiglu", torch.bfloat16, False, 8, True, tile), ("*bf16",) * 3
    yield "backward", 90, glu.backward_rows("swiglu", torch.bfloat16, False, True, True, 8, True, tile), ("*bf16",) * 5


def double():
    plain = attention_decode.Flags(0, False, False, False, False, False, False, False, True, False, double=True)
    options = plain._replace(pages=2, new=True, left=True, right=True, alibi=True, softcap=True, sink=True, parts=False)
    for arch, d, flags in ((90, 192, plain), (90, 256, options), (80, 64, plain)):
        config = attention_decode.choose_config(4, d, d, False, 4, flags.pages, flags.new, 32)
        launch = attention_decode.attend_launch(d, d, 4, 4, flags, config)
        yield str(d), arch, launch, ("*fp32",) * 3 + ("*i32",) * 2 + ("*fp32",) * 6


def float32_attention():
    read = ("*fp32",) * 4 + ("*u8", "*fp32", "*i64", "*i32", "*i32", "*fp32", "*fp32")
    forward = ("*fp32",) * 4 + ("*u8", "*fp32", "*fp32", "*i64", "*i32", "*i32", "*fp32", "*fp32")
    wide, narrow = (192, 128, 4, "sm_90"), (64, 64, 4, "nvidia")
    form = attention.Form(192, 128, 4, precision="double", base2=False)
    yield "forward", 90, attention.forward_launch(form, attention.choose_forward(*wide)), forward
    causal = form._replace(d=64, dv=64, right=True, cap=True, raw=False)
    yield "keys", 80, attention.keys_launch(causal, False, True, attention.choose_keys(*narrow)), read + ("*fp32",) * 5
    yield "queries", 80, attention.queries_launch(causal, attention.choose_queries(*narrow)), read + ("*fp32",)


for name, arch, launch, tensors in CASES():
    binary, log = compiled_case(compile_case(name, launch, 0.0, tensors, (), 64), arch)
    text = binary.asm["ptx"]
    print(json.dumps({
        "name": name, "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log))),
        "waits": text.find("griddepcontrol.wait"), "reads": re.search(r"\\b(ld|st)\\.global", text).start(),
        "float64": len(re.findall("mma.sync[^;]*f64", text)),
    }))
"""


def compiled(cases, forked_process):
    return [json.loads(line) for line in forked_process(COMPILE.replace("CASES", cases)).splitlines()]


def test_glu_launched_early_touches_no_tensor_before_it_has_waited(forked_process):
    lines = compiled("early", forked_process)
    assert len(lines) == 2
    for one in lines:
        assert 0 < one["waits"] < one["reads"], one
        assert not one["spills"], one


@pytest.mark.parametrize(("cases", "count"), [("double", 3), ("float32_attention", 3)])
def test_float32_as_float64_runs_on_tensor_cores_and_spills_nothing(cases, count, forked_process):
    lines = compiled(cases, forked_process)
    assert len(lines) == count
    for one in lines:
        assert one["float64"] >= 2, one
        assert not one["spills"], one
