"""Binaries that only some cards take, of kernels whose listed cases leave the flag off: what the compiler makes of them, without a GPU."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
import torch
from binaries import compiled_case
from trinix.kernels.triton import attention_decode, glu
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


def test_decoding_in_float64_runs_on_tensor_cores_and_spills_nothing(forked_process):
    lines = compiled("double", forked_process)
    assert len(lines) == 3
    for one in lines:
        assert one["float64"] >= 2, one
        assert not one["spills"], one
