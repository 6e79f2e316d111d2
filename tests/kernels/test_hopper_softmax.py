"""Softmax over columns on Hopper: the plan of every length, and what the compiler makes of the kernels, without a GPU."""

import json

import pytest
import torch

pytest.importorskip("triton")

from trinix.kernels.hopper import softmax as hopper

SHARED_LIMIT = 227 * 1024

# Runs in a process of its own: here TRITON_INTERPRET may be set.
COMPILE = """
import json, os, re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from trinix.kernels.hopper.softmax import _columns, _constants, plan

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
names = _columns.arg_names
annotated = {p.name: p.annotation_type for p in _columns.params}
for dtype, letters in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
    for n, c, log, backward in ((1024, 128, False, False), (4096, 128, False, False), (1000, 120, True, False),
                                (512, 128, False, True), (4096, 128, False, True), (40000, 120, True, True)):
        p = plan(n, c, dtype.itemsize, backward)
        constants = _constants(p, log, backward, 16 // dtype.itemsize, n % p.rows == 0 and c % p.cols == 0)
        layout = f"NVMMASharedLayout(swizzle_byte_width={p.config.columns_bytes}, element_bitwidth={8 * dtype.itemsize}, rank=3)"
        box = f"tensordesc<{letters}[1, {p.config.chunk}, {p.cols}],{layout}>"
        given = {"a_desc": box, "b_desc": box, "out": "*" + letters, "partial": "*fp32", "arrived": "*i32"}
        signature = {k: "constexpr" if k in constants else given.get(k) or annotated[k] for k in names}
        aligned = {(names.index(k),): [["tt.divisibility", 16]] for k in ("out", "partial", "arrived")}
        source = GluonASTSource(fn=_columns, signature=signature, attrs=aligned,
                                constexprs={(names.index(k),): v for k, v in constants.items()})
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": p.config.num_warps})
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
            ptx.write(binary.asm["ptx"])
            ptx.flush()
            command = [PTXAS, "-v", "--gpu-name=sm_90a", ptx.name, "-o", "/dev/null"]
            log_text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        stores = re.findall(r"st\\.global\\S*\\.v4\\.b32", binary.asm["ptx"])
        print(json.dumps({"name": f"{letters}/{n}/{c}/{log}/{backward}", "shared": binary.metadata.shared, "stores": len(stores),
                          "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log_text)))}))
"""


def test_every_binary_keeps_its_values_in_registers_and_stores_16_bytes_at_a_time(fresh_process):
    lines = [json.loads(line) for line in fresh_process(COMPILE).splitlines()]
    assert len(lines) == 18
    for one in lines:
        assert one["spills"] == 0, one
        assert one["shared"] <= SHARED_LIMIT, one
        assert one["stores"] >= 1, one


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_cover_every_length_and_fit_into_the_ring(itemsize, backward):
    for n in (*range(1, 700), 1023, 1024, 1025, 4095, 4096, 4097, 16385, 32768, 65537, 100_000):
        for c in (8, 120, 128, 1000):
            p = hopper.plan(n, c, itemsize, backward)
            assert (p.parts - 1) * p.rows < n <= p.parts * p.rows
            assert p.rows % p.config.chunk == 0
            assert p.rows // p.config.chunk <= p.slots  # all of an item lies in the ring at once
            assert p.slots * p.config.chunk * p.config.columns_bytes * (1 + backward) <= hopper.SHARED_BYTES
            assert (p.panels - 1) * p.cols < c <= p.panels * p.cols
            assert p.parts <= 132


def test_what_it_cannot_run_has_a_reason():
    x = torch.ones(4, 8, 16)
    assert "GPU tensor" in hopper.unsupported(x, None, 1, 1.0)
    assert "float64" in hopper.unsupported(x.double(), None, 1, 1.0)
    fake = torch.empty(4, 8, 16, device="meta")
    assert "GPU tensor" in hopper.unsupported(fake, None, 1, 1.0)
