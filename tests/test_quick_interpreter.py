"""What the tests' interpreter leaves out changes no result: its operands are Triton's own."""

import itertools

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.semantic import IncompatibleTypeErrorImpl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import quick_interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(not quick_interpreter.KNOWN, reason="written for Triton 3.7")

NUMBERS = (
    0,
    -0.0,
    1,
    -3,
    1.5,
    1e-42,
    1e300,
    float("inf"),
    float("nan"),
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**63,
    True,
)


def tensors():
    kinds = (
        tl.float32,
        tl.float64,
        tl.int32,
        tl.int64,
        tl.float16,
        tl.int8,
        tl.uint32,
        tl.int1,
        tl.pointer_type(tl.float32),
    )
    blocks = [tl.block_type(tl.int32, sizes) for sizes in ([4], [2, 4], [1, 4])]
    for kind in kinds:
        numbers = interpreter._get_np_dtype(kind)
        yield tl.tensor(interpreter.TensorHandle(np.array([3], numbers), kind), kind)
        for block in blocks:
            data = np.arange(block.numel, dtype=np.int32).reshape([int(n) for n in block.shape]).astype(numbers)
            yield tl.tensor(interpreter.TensorHandle(data, kind), block.with_element_ty(kind))


def outcome(function, *arguments):
    try:
        pair = function(interpreter.interpreter_semantic, *arguments)
    except (IncompatibleTypeErrorImpl, TypeError, ValueError, OverflowError) as error:
        return type(error)
    return [
        (t.type, t.dtype, t.handle.dtype, t.handle.data.dtype, t.handle.data.shape, t.handle.data.tobytes())
        for t in pair
    ]


@pytest.mark.parametrize(
    "how", [(True, True), (False, False), (False, False, False), (False, False, True, True)], ids=str
)
def test_operands_are_tritons_own(how, monkeypatch):
    some = list(tensors())
    pairs = [*itertools.product(some, (*some, *NUMBERS)), *itertools.product(NUMBERS, some)]
    results = []
    for operands, broadcast in (
        (quick_interpreter._operands_unlike, quick_interpreter._broadcast_unlike),
        (quick_interpreter._operands, quick_interpreter._broadcast),
    ):
        monkeypatch.setattr(type(interpreter.interpreter_semantic), "broadcast_impl_value", broadcast)
        results.append([outcome(operands, a, b, *how) for a, b in pairs])
    assert sum(isinstance(one, list) for one in results[1]) > len(pairs) / 4
    for (a, b), got, wanted in zip(pairs, *results, strict=True):
        assert got == wanted, (a.type if isinstance(a, tl.tensor) else a, b.type if isinstance(b, tl.tensor) else b)
