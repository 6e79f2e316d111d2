"""What only some cards take: forward by tensor descriptors, backward's launches apart at D = 256, and float32 as float64."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
import torch
from binaries import compiled, compiled_case
from triton.compiler import ASTSource
from trinix.kernels.triton import head_mlp as kernels
from trinix.kernels.triton._compile import compile_case

WANTED = {"x": (True, (False,) * 5), "w1": (False, (True, *[False] * 4)), "w2": (False, (False, False, True, False, False))}


def backward(dtype, d, config, precision, want_x=True, wanted=(True, False, True, False, False), early=False):
    layout = kernels.Layout(True, 16 // dtype.itemsize, 16 // dtype.itemsize, False, False)
    return kernels.backward_launch(
        "silu", dtype, False, False, want_x, wanted, False, False, True, layout, d, config, precision, 32, early
    )


def early():
    dtype, layout, d = torch.bfloat16, kernels.Layout(True, 8, 8, False, False), 64
    for now in (True, False):
        config = kernels.choose_forward(2048, d, 2, False)
        forward = kernels.forward_launch(
            "silu", dtype, False, False, False, False, True, layout, d, config, None, 32, now
        )
        yield f"forward {now}", d, 90, forward, ("*bf16",) * 7
        config = kernels.choose_backward(2048, d, 2, False)
        yield f"backward {now}", d, 90, backward(dtype, d, config, None, early=now), ("*bf16",) * 12
        yield f"add {now}", 0, 90, kernels.partials_launch(now), ("*fp32",) * 6


def apart():
    for name, config in kernels.APART.items():
        for d, arch in ((256, 90), (192, 90), (256, 100)) if EVERY or name == "w1" else ((256, 90), (256, 100)):
            yield name, d, arch, backward(torch.bfloat16, d, config, None, *WANTED[name]), ("*bf16",) * 12


def double():
    dtype, layout = torch.float32, kernels.Layout(True, 4, 4, False, False)
    for d, arch in ((16, 80), (64, 80), (128, 90), *[(256, 80)] * EVERY, (256, 90)):
        config = kernels.choose_forward(2048, d, 4, False)
        forward = kernels.forward_launch("silu", dtype, False, False, False, False, True, layout, d, config, "double", 32)
        yield "forward", d, arch, forward, ("*fp32",) * 7
        config = kernels.choose_backward(2048, d, 4, False)
        yield "backward", d, arch, backward(dtype, d, config, "double"), ("*fp32",) * 12


def boxed():
    names = kernels._forward_boxed.arg_names
    for kind, d, dtype, heads in (
        ("silu", 128, "bf16", 16), ("silu", 128, "bf16", 17), ("mish", 128, "fp16", 17),
        ("silu", 256, "bf16", 8), ("mish", 256, "fp16", 2),
    ):
        layout = kernels.Layout(True, 8, 8, False, False)
        config = kernels.choose_boxed(kernels.choose_forward(2048, d, 2, False), heads, 2048, d, 2, layout, 132)
        assert config.num_stages == (5 if heads == 2 else 3)
        assert config.w2_first is (heads == 17)  # 544 programs, of 64 rows
        constants = kernels.boxed_constants(kind, torch.bfloat16, d, config, True)
        signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
        for name, block in zip(names, kernels.boxed_blocks(d, config)):
            signature[name] = f"tensordesc<{dtype}{[1, *block]}>"
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
        yield kind, d, 90, compiled(kernels._forward_boxed, signature, constants, options, source=ASTSource), None


def staged():
    names = kernels._hidden_boxed.arg_names
    for kind, dtype in (("silu", "bf16"), ("gelu", "bf16"), ("mish", "fp16"), *[(k, "bf16") for k in ("sigmoid", "quick_gelu", "gelu_tanh", "tanh")] * EVERY):
        constants = kernels.hidden_constants(kind, torch.bfloat16, True)
        signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
        for name, block in zip(names, kernels.hidden_blocks()):
            signature[name] = f"tensordesc<{dtype}{[1, *block]}>"
        options = {"num_warps": kernels.STAGED.num_warps, "num_stages": kernels.STAGED.num_stages, "launch_pdl": True}
        yield kind, 256, 90, compiled(kernels._hidden_boxed, signature, constants, options, source=ASTSource), None


for name, d, arch, launch, tensors in CASES():
    binary, log = launch if tensors is None else compiled_case(compile_case(name, launch, 0.0, tensors, (), 64), arch)
    text = binary.asm["ptx"]
    print(json.dumps({
        "name": name, "d": d, "arch": arch, "kib": binary.metadata.shared / 1024, "kib_limit": kernels.APART_KIB,
        "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log))),
        "warnings": sorted(set(re.findall("C75[0-9]{2}", log))),
        "waits": text.find("griddepcontrol.wait"),
        "reads": re.search(r"\\b(ld|st|red|atom)\\.global|\\bcp\\.async\\.(c|bulk)", text).start(),
        "float64 on tensor cores": len(re.findall("mma.sync[^;]*f64", text)), "tf32": "tf32" in text,
    }))
"""


@pytest.fixture
def compiled(forked_process, every_binary):
    """The binaries of some cases; with --every-binary also those whose like is among the others."""

    def run(cases):
        code = f"EVERY = {every_binary}\n" + COMPILE.replace("CASES", cases)
        return [json.loads(line) for line in forked_process(code).splitlines()]

    return run


def test_a_kernel_launched_early_touches_no_tensor_before_it_has_waited(compiled):
    lines = compiled("early")
    assert len(lines) == 6
    for one in lines:
        early = one["name"].endswith("True")
        assert (0 < one["waits"] < one["reads"]) if early else one["waits"] == -1, one


def test_forward_by_descriptors_leaves_room_for_two_programs_and_waits_for_no_product_early(compiled):
    lines = compiled("boxed")
    assert len(lines) == 5
    for one in lines:
        assert not one["warnings"], one  # C7510 and its like: "wgmma serialized"
        assert not one["spills"], one
        assert one["kib"] <= (227 if (one["name"], one["d"]) == ("mish", 256) else 113), (
            one
        )  # it has a multiprocessor for itself
        assert 0 < one["waits"] < one["reads"], one


def test_hidden_values_and_their_gradients_fit_the_registers(compiled, every_binary):
    lines = compiled("staged")
    assert len(lines) == (7 if every_binary else 3)
    for one in lines:
        assert not one["warnings"], one
        assert one["spills"] <= (64 if one["name"] == "mish" else 0), one
        assert one["kib"] <= 227, one
        assert 0 < one["waits"] < one["reads"], one


def test_launches_apart_fit_the_shared_memory_that_they_are_chosen_for_and_spill_little(compiled, every_binary):
    lines = compiled("apart")
    assert len(lines) == (9 if every_binary else 7)
    for one in lines:
        assert one["kib"] <= one["kib_limit"], one
        assert not one["warnings"], one
        if one["arch"] == 90:
            assert one["spills"] <= 64, one


def test_float32_as_float64_runs_on_tensor_cores(compiled, every_binary):
    lines = compiled("double")
    assert len(lines) == (10 if every_binary else 8)
    for one in lines:
        assert one["float64 on tensor cores"] >= 2, one
        assert not one["tf32"], one
        assert one["kib"] <= 99, one
        assert one["spills"] <= 16, one
