"""What is no number, kind or backend is refused by the op's and the argument's name, by the op and by ``explain`` alike."""

import inspect

import pytest
import torch

from trinix import ops

X = torch.zeros(2, 4, 8)
HEADS, TABLE, WEIGHT = torch.zeros(1, 4, 2, 8), torch.zeros(4, 4), torch.ones(8)
CALLS = {
    "leaky_relu": (X,),
    "softplus": (X,),
    "softmax": (X,),
    "log_softmax": (X,),
    "layer_norm": (X, 8),
    "rms_norm": (X, 8),
    "layer_norm_residual": (X, X, 8),
    "rms_norm_residual": (X, X, 8),
    "rms_norm_activation": (X, 8),
    "glu": (X, X),
    "rope": (HEADS, HEADS, TABLE, TABLE),
    "qk_norm_rope": (HEADS, HEADS, WEIGHT, WEIGHT, TABLE, TABLE),
    "attention": (HEADS, HEADS, HEADS),
    "attention_decode": (HEADS, HEADS, HEADS, torch.zeros(1, dtype=torch.int32)),
    "head_mlp": (X, X.mT, X),
}
NUMBERS = ("negative_slope", "beta", "threshold", "scale", "eps", "weight_offset", "softcap", "dropout_p")
CHECKED = [(op, name) for op in CALLS for name in inspect.signature(getattr(ops, op)).parameters if name in NUMBERS]


NO_NUMBERS = {
    "text": "3.5", "bytes": b"3.5", "list": [], "object": object(), "class": object, "complex": 1j,
    "complex tensor": torch.tensor(1j), "two": torch.ones(2),
}  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize(("op", "name"), CHECKED)
def test_what_is_no_number_is_refused_by_name(op, name, value):
    function = getattr(ops, op)
    # softmax takes no tensor at all
    cure = "multiply x by it.*" if "softmax" in op and isinstance(value, torch.Tensor) else r"convert it with float\(\)"
    for call in (function, lambda *a, **more: ops.explain(function, *a, **more)):
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be a number, got .*; {cure}$"):
            call(*CALLS[op], **{name: value})


@pytest.mark.parametrize(("op", "name"), CHECKED)
def test_an_int_is_a_number(op, name):
    value = 0 if name in ("dropout_p", "softcap") else 1
    wanted = getattr(ops, op)(*CALLS[op], **{name: float(value)})
    torch.testing.assert_close(getattr(ops, op)(*CALLS[op], **{name: value}), wanted)


@pytest.mark.parametrize(
    "value", [10**400, -(10**5000)], ids=["400 digits", "5000 digits"]
)  # the second, Python refuses to print
@pytest.mark.parametrize(("op", "name"), CHECKED)
def test_an_int_that_no_float_holds_is_refused_by_name(op, name, value):
    function = getattr(ops, op)
    for call in (function, lambda *a, **more: ops.explain(function, *a, **more)):
        with pytest.raises(
            ValueError, match=rf"^{op}: {name} must be a number that a float holds, got one beyond 1.8e308$"
        ):
            call(*CALLS[op], **{name: value})


def test_a_rope_tables_base_is_a_number():
    with pytest.raises(TypeError, match=r"^rope_table: base must be a number, got '1e4'; convert it with float\(\)$"):
        ops.rope_table(8, 4, base="1e4")
    with pytest.raises(ValueError, match=r"^rope_table: base must be a number that a float holds"):
        ops.rope_table(8, 4, base=10**400)


@pytest.mark.parametrize("value", [[], 3, None], ids=repr)
@pytest.mark.parametrize("op", CALLS)
def test_what_is_no_name_is_refused_with_the_names_there_are(op, value):
    function = getattr(ops, op)
    for name in {"backend", "kind"} & set(inspect.signature(function).parameters):
        for call in (function, lambda *a, **more: ops.explain(function, *a, **more)):
            with pytest.raises(ValueError, match=rf"^\w+: {name} must be one of \[.*, got "):
                call(*CALLS[op], **{name: value})


def test_head_mlp_s_reduce_is_refused_by_explain_too():
    for call in (ops.head_mlp, lambda *a, **more: ops.explain(ops.head_mlp, *a, **more)):
        with pytest.raises(ValueError, match=r"^head_mlp: reduce must be None or 'mean', got 'sum'$"):
            call(*CALLS["head_mlp"], reduce="sum")
