"""The launches of backward at D = 256 that are apart, which only cards with 227 KiB of shared memory take."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a process of its own: here TRITON_INTERPRET may be set.
COMPILE = """
import json, os, re, subprocess, tempfile, torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trinix.kernels.triton import head_mlp as kernels
from trinix.kernels.triton._compile import compile_case

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
WANTED = {"x": (True, [0, 0, 0, 0, 0]), "w1": (False, [1, 0, 0, 0, 0]), "w2": (False, [0, 0, 1, 0, 0])}

for name, config in kernels.APART.items():
    for d, arch in ((256, 90), (192, 90), (256, 100)):
        want_x, wanted = WANTED[name]
        launch = kernels.backward_launch(
            "silu", torch.bfloat16, False, False, want_x, tuple(map(bool, wanted)), False, False, True,
            kernels.Layout(True, 8, False, False), d, config, 32,
        )
        case = compile_case(name, launch, 0.0, ("*bf16",) * 12, (), 64)
        names = case.kernel.arg_names
        hints = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
        constants = {(names.index(n),): value for n, value in case.constexprs.items()}
        source = ASTSource(case.kernel, case.signature, constants, hints)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
        with tempfile.TemporaryDirectory() as folder:
            ptx = os.path.join(folder, "k.ptx")
            open(ptx, "w").write(binary.asm["ptx"])
            tool = PTXAS if arch == 90 else PTXAS + "-blackwell"
            command = [tool, "-v", f"--gpu-name=sm_{arch}a", ptx, "-o", "/dev/null"]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        print(json.dumps({
            "name": name, "d": d, "arch": arch, "kib": binary.metadata.shared / 1024,
            "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log))),
            "warnings": sorted(set(re.findall("C75[0-9]{2}", log))), "apart_kib": kernels.APART_KIB,
        }))
"""


def test_each_fits_the_shared_memory_that_it_is_chosen_for_and_spills_little(fresh_process):
    lines = [json.loads(line) for line in fresh_process(COMPILE).splitlines()]
    assert len(lines) == 9
    for one in lines:
        assert one["kib"] <= one["apart_kib"], one
        assert not one["warnings"], one
        if one["arch"] == 90:
            assert one["spills"] <= 64, one
