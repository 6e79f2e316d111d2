"""The interpreter's check of addresses can fail: tests/footprints.py."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _add(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("kernel", [_copy, _add])
def test_a_kernel_that_leaves_its_tensors_fails(kernel):
    x, y = torch.arange(20.0), torch.zeros(40)
    kernel[(1,)](x, y, 20, BLOCK=32)
    kernel[(1,)](x[4:], y[::2], 1, BLOCK=32)
    assert y.tolist() == [x[4].item() + (x[0].item() if kernel is _add else 0), *x.tolist()[1:], *[0.0] * 20]
    for out_of_bounds, said in (
        ((x, y, 21), "loads from what lies 0 bytes behind"),
        ((x, y[:19], 20), "(stores|adds) to what lies between"),
        ((x[:19], y, 20), "loads from what lies between"),
        ((x[::2], y, 10), "loads from what lies between"),
    ):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=f"footprint: a kernel {said}"):
            kernel[(1,)](*out_of_bounds, BLOCK=32)


@triton.jit
def _at(x, y, row, stride, WIDE: tl.constexpr):
    at = (row.to(tl.int64) if WIDE else row) * stride
    tl.store(y, tl.load(x + at, mask=at == 0, other=1.0))


def test_a_place_that_int32_does_not_hold_fails():
    x, y = torch.zeros(1), torch.zeros(1)
    _at[(1,)](x, y, 2**16, 2**15, WIDE=True)
    assert y.item() == 1
    _at[(1,)](x, y, 2**16 - 1, 2**15, WIDE=False)
    with pytest.raises(
        triton.runtime.errors.InterpreterError, match="int32 overflow: mul gives 2147483648 to 2147483648"
    ):
        _at[(1,)](x, y, 2**16, 2**15, WIDE=False)
