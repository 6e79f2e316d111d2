"""Softmax on Hopper: the plan of every length, what the compiler makes of the kernels, and the kernels in NumPy
(gluon_on_cpu.py), without a GPU."""

import itertools
import json
import threading

import pytest
import torch

pytest.importorskip("triton")

import gluon_on_cpu
from trinix.kernels.hopper import row_vectors
from trinix.kernels.hopper import softmax as hopper
from trinix.kernels.hopper import softmax_rows as rows
from trinix.kernels.torch import softmax as reference
from trinix.testing import assert_within_budget, normal

SHARED_LIMIT = 227 * 1024

# Runs in a forked process: here TRITON_INTERPRET may be set.
COMPILE = """
import json, re
import torch
from binaries import compiled, given_back_too_early
from trinix.kernels.hopper.softmax import _columns, _constants, plan

names = _columns.arg_names
annotated = {p.name: p.annotation_type for p in _columns.params}
for dtype, letters in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
    for n, c, log, backward in CASES[letters]:
        p = plan(n, c, dtype.itemsize, backward)
        constants = _constants(p, log, backward, 16 // dtype.itemsize, n % p.rows == 0 and c % p.cols == 0)
        layout = f"NVMMASharedLayout(swizzle_byte_width={p.config.columns_bytes}, element_bitwidth={8 * dtype.itemsize}, rank=3)"
        box = f"tensordesc<{letters}[1, {p.config.chunk}, {p.cols}],{layout}>"
        given = {"a_desc": box, "b_desc": box, "out": "*" + letters, "partial": "*fp32", "arrived": "*i32"}
        signature = {k: "constexpr" if k in constants else given.get(k) or annotated[k] for k in names}
        options, aligned = {"num_warps": p.config.num_warps}, ("out", "partial", "arrived")
        binary, log_text = compiled(_columns, signature, constants, options, aligned)
        stores = re.findall(r"st\\.global\\S*\\.v4\\.b32", binary.asm["ptx"])
        print(json.dumps({"name": f"{letters}/{n}/{c}/{log}/{backward}", "shared": binary.metadata.shared, "stores": len(stores),
                          "early": given_back_too_early(binary.asm["ptx"]),
                          "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log_text)))}))
"""


CASES = (
    (1024, 128, False, False), (4096, 128, False, False), (1000, 120, True, False), (8192, 128, False, False),
    (40000, 120, True, False), (512, 128, False, True), (4096, 128, False, True), (40000, 120, True, True),
)  # fmt: skip
# --every-binary takes the others
FEW = {"bf16": (*CASES[:2], *CASES[4:6]), "fp16": (CASES[7],), "fp32": (CASES[4], CASES[6])}


def test_every_binary_keeps_its_values_in_registers_and_stores_16_bytes_at_a_time(forked_process, every_binary):
    cases = dict.fromkeys(FEW, CASES) if every_binary else FEW
    lines = [json.loads(line) for line in forked_process(f"CASES = {cases}\n" + COMPILE).splitlines()]
    assert len(lines) == sum(map(len, cases.values()))
    for one in lines:
        assert one["spills"] == 0, one
        assert not one["early"], one
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
            assert p.rows // p.config.chunk * p.config.groups <= p.slots  # and one of every group
            assert p.slots * p.config.chunk * p.config.columns_bytes * (1 + backward) <= hopper.SHARED_BYTES
            assert (p.panels - 1) * p.cols < c <= p.panels * p.cols
            assert p.parts <= 132 or hopper._too_large(1, n, c, itemsize, 132)


def test_what_it_cannot_run_has_a_reason():
    x = torch.ones(4, 8, 16)
    assert "GPU tensor" in hopper.unsupported(x, None, 1, 1.0)
    assert "float64" in hopper.unsupported(x.double(), None, 1, 1.0)
    fake = torch.empty(4, 8, 16, device="meta")
    assert "GPU tensor" in hopper.unsupported(fake, None, 1, 1.0)
    assert "16 bytes" in rows.unsupported(17, 1001, 2, 132)
    assert "too many" in rows.unsupported(17, 1 << 20, 2, 132)
    assert rows.unsupported(17, 1 << 19, 2, 132) is None
    assert "65536 bytes" in rows.unsupported(17, 32760, 2, 132)
    assert "16777216 programs" in rows.unsupported(1 << 22, 32768, 2, 132)


def test_a_part_of_more_elements_than_32_bits_count_is_refused():
    """Where a row of a part begins is a product of 32 bits: the 480th row of 4.5 million columns lay in front of the tensor."""
    for n, c in ((512, 2**22), (1024, 2**21), (5000, 2**22)):
        assert hopper._too_large(1, n, c - 8, 2, 132) is None
        assert "32 bits" in hopper._too_large(1, n, c, 2, 132)


# ---- columns --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def columns_on_cpu(monkeypatch):
    """The launches of columns run here, all programs of a cooperative one at once."""
    names = gluon_on_cpu.functions_of(
        hopper,
        **gluon_on_cpu.hopper(),
        tma_load=lambda *arguments: gluon_on_cpu.tma_load(*arguments),
        block_barrier=lambda: None,
        range=gluon_on_cpu.range_of_tensors,
    )
    monkeypatch.setattr(
        hopper, "Binary", lambda kernel, device, examples, constants, launch_cooperative_grid, **_:
        gluon_on_cpu.Binary(names, kernel, examples, constants, launch_cooperative_grid),
    )  # fmt: skip
    monkeypatch.setattr(hopper.Box, "at", lambda self, address: ((self, address),))
    monkeypatch.setattr(hopper, "raw_stream", lambda device: 0)
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 13)
    monkeypatch.setattr(hopper, "_launch", hopper._Launch)
    for name in ("empty", "zeros"):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, device=None, of=function, **more: of(*size, **more))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)


SMALL = hopper.Config(64, 64, 4 << 10, 4, 3), hopper.Config(64, 64, 8 << 10, 4, 2)
WIDE = hopper.Config(128, 64, 8 << 10, 4, 3), hopper.Config(128, 64, 16 << 10, 8, 1)


def both_passes(x, dy, scale, log, configs, y=None):
    """(y, dx) by the kernels; dx from ``y``, if given."""
    out, dx = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    hopper._run(x, x, out, 1, scale, log, False, configs[0])
    hopper._run(out if y is None else y, dy, dx, 1, scale, log, True, configs[1])
    return out, dx


@pytest.mark.usefixtures("columns_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "configs", "scale", "log"),
    [((2, 50, 40), SMALL, 1.0, False), ((9, 200, 72), SMALL, 0.5, False), ((23, 192, 64), WIDE, 1.0, True),
     ((2, 640, 40), WIDE, 1.0, False)],
)  # fmt: skip
def test_columns_hold_the_budget_at_odd_sizes(shape, configs, scale, log, dtype):
    x, dy = normal(shape, dtype, seed=1), normal(shape, dtype, seed=9)
    y, dx = both_passes(x, dy, scale, log, configs)
    low, true = (reference.forward(x.to(t), None, 1, scale, log) for t in (dtype, torch.float64))
    assert_within_budget((y,), (low,), (true,))
    low, true = (reference.backward(y.to(t), dy.to(t), 1, scale, log) for t in (dtype, torch.float64))
    assert_within_budget((dx,), (low,), (true,))


@pytest.mark.usefixtures("columns_on_cpu", "on_cpu")
@pytest.mark.parametrize("dim", [1, 2], ids=["columns", "rows"])
def test_a_result_that_a_hook_gives_back_in_another_layout(dim):
    y, dy = (normal((2, 200, 64), torch.float16, seed=i) for i in range(2))
    wanted = hopper.backward(y, dy, dim, 1.0, True)
    for given in (y.mT.contiguous().mT, torch.stack((y, y + 1), -1)[..., 0]):
        assert torch.equal(hopper.backward(given, dy, dim, 1.0, True), wanted)


@pytest.mark.usefixtures("columns_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_columns_of_infinities_and_nan_end_as_in_pytorch(dtype):
    x = normal((3, 200, 64), dtype, seed=1)
    x[0, :, 3] = float("-inf")
    x[0, :150, 4] = float("-inf")
    x[0, 7, 5] = float("inf")
    x[1, 199, 6] = float("nan")
    x[2, :, :] = torch.finfo(dtype).max
    for log, function in ((False, torch.softmax), (True, torch.log_softmax)):
        got, wanted = both_passes(x, x, 1.0, log, SMALL)[0], function(x.float(), 1)
        assert torch.equal(got.isnan(), wanted.isnan())
        torch.testing.assert_close(got, wanted.to(dtype), equal_nan=True)


@pytest.mark.usefixtures("columns_on_cpu")
def test_columns_are_right_in_whatever_order_the_copies_end(monkeypatch):
    """A group that is done with its item waits for one whose slots another group's has not even filled."""
    copy, count = gluon_on_cpu.tma_load, itertools.count()

    def late(*arguments):
        seconds = 0.3 if next(count) == 0 else 0.001
        threading.Timer(seconds, copy, arguments).start()

    monkeypatch.setattr(gluon_on_cpu, "tma_load", late)
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 1)
    monkeypatch.setattr(
        hopper, "SHARED_BYTES", 3 * 8192
    )  # three items of backward: two groups take turns, as on the card
    x, dy = normal((4, 64, 64), torch.float16, seed=1), normal((4, 64, 64), torch.float16, seed=2)
    config = hopper.Config(64, 64, 8 << 10, 4, 2)
    y = reference.forward(x, None, 1, 1.0, True)
    dx = torch.full_like(x, float("nan"))
    assert hopper.plan(64, 64, 2, True, config).slots == 3
    hopper._run(y, dy, dx, 1, 1.0, True, True, config)
    low, true = (reference.backward(y.to(t), dy.to(t), 1, 1.0, True) for t in (torch.float16, torch.float64))
    assert_within_budget((dx,), (low,), (true,))


# ---- rows in clusters -----------------------------------------------------------------------------------------------------

COMPILE_ROWS = """
import json, re
from binaries import compiled
from trinix.kernels.hopper import softmax_rows as rows

for letters, (itemsize, cases) in CASES.items():
    for count, n, log in cases:
        for kernel in (rows._forward, rows._backward):
            backward = kernel is rows._backward
            config = rows.choose_config(count, n, itemsize, backward, 132)
            constants = rows.constants(config, n, itemsize, log)
            names = kernel.arg_names
            annotated = {p.name: p.annotation_type for p in kernel.params}
            given = {"partial": "*fp32"}
            signature = {k: "constexpr" if k in constants else given.get(k) or annotated[k] or "*" + letters for k in names}
            aligned = [k for k in names if signature[k].startswith("*")]
            most = rows.registers(constants["VECTORS"], 1 + backward, itemsize)
            options = {"num_warps": config.num_warps, "num_ctas": config.ctas, "maxnreg": most}
            binary, log_text = compiled(kernel, signature, constants, options, aligned)
            count_of = lambda word: len(re.findall(word + r"\\.global\\S*\\.v4\\.b32", binary.asm["ptx"]))
            print(json.dumps({"name": f"{letters}/{count}/{n}/{log}/{backward}", "vectors": constants["VECTORS"],
                              "loads": count_of("ld"), "stores": count_of("st"), "inputs": 1 + backward,
                              "barriers": binary.asm["ptx"].count("barrier.cluster.arrive.release"),
                              "spills": sum(map(int, re.findall("([0-9]+) bytes spill", log_text)))}))
"""


def test_every_binary_of_rows_keeps_its_piece_in_registers_and_moves_16_bytes_at_a_time(forked_process, every_binary):
    cases = (1, 65544, True), (4096, 65536, False), (4096, 100000, False), (4096, 131072, True), (4096, 262144, False)
    cases_of = {"bf16": (2, cases), "fp32": (4, cases if every_binary else cases[::4])}
    cases_of |= {"fp16": (2, cases)} if every_binary else {}
    lines = [json.loads(line) for line in forked_process(f"CASES = {cases_of}\n" + COMPILE_ROWS).splitlines()]
    assert len(lines) == 2 * sum(len(some) for _, some in cases_of.values())
    for one in lines:
        assert one["spills"] == 0, one
        assert (one["loads"], one["stores"]) == (one["inputs"] * one["vectors"], one["vectors"]), one
        assert one["barriers"] == 1, one


@pytest.mark.parametrize("multiprocessors", [78, 132])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_pieces_cover_every_row(itemsize, multiprocessors):
    unit = 16 // itemsize
    lengths = [unit * k for k in (1, 2, 15, 16, 17, 255, 256, 4097, 8191, 8192, 12345, 16384, 18992, 32768, 65536)]
    for n in lengths:
        if multiprocessors < 132 and n * itemsize > 512 << 10:
            assert "too many" in rows.unsupported(17, n, itemsize, multiprocessors)
            continue
        for count in (1, 16, 17, 5000):
            for backward in (False, True):
                config = rows.choose_config(count, n, itemsize, backward, multiprocessors)
                assert config.ctas <= (16 if multiprocessors == 132 else 8)
                c = rows.constants(config, n, itemsize, False)
                piece = -(-n // (unit * config.ctas)) * unit
                assert (c["VECTORS"] - 1) * c["SPAN"] < piece <= c["VECTORS"] * c["SPAN"]
                assert piece * config.ctas >= n
                for line in range(config.ctas):  # what is read without a mask is all within the piece
                    assert c["FULL"] * c["SPAN"] <= max(0, min(piece, n - line * piece))
                assert c["VECTORS"] * (1 + backward) <= 16


def test_rows_that_clusters_win():
    assert rows.wins(4096, 131_072, 2, False)
    assert not rows.wins(4096, 65_536, 2, False)
    assert rows.wins(4096, 65_536, 2, True)
    assert rows.wins(64, 32_768, 2, False)
    assert not rows.wins(65, 32_768, 2, True)
    assert rows.choose_config(4096, 131_072, 2, True, 132) == (8, 8)  # K-softmax-4096x131072
    assert rows.choose_config(1, 131_072, 2, True, 132) == (16, 8)


@pytest.fixture
def on_cpu(monkeypatch):
    """The launches of rows run here, on float16 and float32 tensors, each cluster as one program."""
    names = gluon_on_cpu.functions_of(rows, **gluon_on_cpu.functions_of(row_vectors))
    monkeypatch.setattr(
        rows, "Binary", lambda kernel, device, examples, constants, **_: gluon_on_cpu.Binary(names, kernel, examples, constants)
    )  # fmt: skip
    monkeypatch.setattr(rows, "raw_stream", lambda device: 0)
    for cached in ("_launch", "_binary"):
        monkeypatch.setattr(rows, cached, getattr(rows, cached).__wrapped__)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: empty(*size, **more))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "scale"), [((2, 8), 1.0), ((1, 3, 1000), 0.3), ((18, 264), 1.0), ((1, 65544), 1.0), ((1, 200_000), 2.0)]
)
def test_rows_hold_the_budget_at_odd_sizes(shape, scale, dtype, log):
    n = shape[-1]
    x, dy = normal(shape, dtype, seed=1), normal(shape, dtype, seed=2)
    y = rows.forward(x, n, scale, log, 132)
    dx = rows.backward(y, dy, n, scale, log, 132)
    low = reference.forward(x, None, len(shape) - 1, scale, log)
    true = reference.forward(x.double(), None, len(shape) - 1, scale, log)
    assert_within_budget((y,), (low,), (true,))
    low, true = (reference.backward(y.to(t), dy.to(t), len(shape) - 1, scale, log) for t in (dtype, torch.float64))
    assert_within_budget((dx,), (low,), (true,))


@pytest.mark.usefixtures("on_cpu")
def test_rows_of_infinities_and_nan_end_as_in_pytorch():
    x = torch.full((5, 3000), float("-inf"))
    x[1, 2500] = 1.0
    x[2, 7] = float("inf")
    x[3, 2999] = float("nan")
    x[4] = 1e30
    for log, function in ((False, torch.softmax), (True, torch.log_softmax)):
        got, wanted = rows.forward(x, 3000, 1.0, log, 132), function(x, 1)
        assert torch.equal(got.isnan(), wanted.isnan())
        torch.testing.assert_close(got, wanted, equal_nan=True)
