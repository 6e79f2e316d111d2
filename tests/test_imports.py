"""What an import costs and does, each in a process of its own."""

import ast
from pathlib import Path

import pytest

import trinix


def test_an_import_loads_only_what_it_needs(fresh_process):
    """One after the other in one process: what a statement must not load, those before it must not either."""
    steps = [
        ("import trinix", ["torch", "triton", "rich", "numpy"]),
        ("dir(trinix); trinix.__version__", ["torch", "triton", "rich", "numpy"]),
        ("import trinix.ops", ["triton", "rich", "trinix.kernels.triton", "trinix.layers", "trinix.lab"]),
        ("trinix.FastReLU; trinix.Unsupported", ["triton", "rich", "trinix.lab"]),
        ("import torch; trinix.ops.relu(torch.ones(3, requires_grad=True)).sum().backward()", ["rich"]),
    ]
    code = "import sys\n" + "".join(
        f"{statement}\nprint([name for name in {absent} if name in sys.modules])\n" for statement, absent in steps
    )
    assert fresh_process(code).splitlines() == ["[]"] * len(steps)


def test_every_public_name_can_be_had_and_is_listed(forked_process):
    code = """
        import trinix
        assert set(dir(trinix)) == set(trinix.__all__)
        for name in trinix.__all__:
            assert getattr(trinix, name) is getattr(trinix, name), name
        try:
            trinix.no_such_name
        except AttributeError as error:
            print(error)
    """
    assert forked_process(code) == "module 'trinix' has no attribute 'no_such_name'"


def test_without_triton_every_activation_runs_on_the_cpu_and_naming_triton_says_what_is_missing(forked_process):
    code = """
        import sys
        sys.modules |= dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "triton"])
        import torch, trinix
        from trinix.ops import KINDS, activation
        for kind in KINDS:
            x = torch.linspace(-3, 3, 7, requires_grad=True)
            (dx,) = torch.autograd.grad(activation(x, kind).sum(), x)
            assert dx.isfinite().all(), kind
            try:
                activation(x, kind, backend="triton")
            except trinix.Unsupported as error:
                assert "'triton'" in str(error) and "needs the package triton, which is not installed" in str(error)
            else:
                raise AssertionError(kind)
            assert "triton" in str(trinix.explain("activation", x, kind)) or kind == "none"
        assert trinix.FastSiLU(use_triton=True)(torch.ones(3)).shape == (3,)
        print("done")
    """
    assert forked_process(code) == "done"


def test_without_triton_every_glu_runs_on_the_cpu_and_naming_triton_says_what_is_missing(forked_process):
    code = """
        import sys
        sys.modules |= dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "triton"])
        import torch, trinix
        from trinix.ops import glu
        for kind in ("swiglu", "geglu", "geglu_tanh", "reglu", "quick_geglu", "bilinear", "glu"):
            x = torch.linspace(-3, 3, 8, requires_grad=True)
            (dx,) = torch.autograd.grad(glu(x, kind=kind).sum(), x)
            assert dx.isfinite().all(), kind
            try:
                glu(x, x, kind, backend="triton")
            except trinix.Unsupported as error:
                assert "'triton'" in str(error) and "needs the package triton, which is not installed" in str(error)
            else:
                raise AssertionError(kind)
            assert "triton" in str(trinix.explain("glu", x, x, kind))
        print("done")
    """
    assert forked_process(code) == "done"


@pytest.mark.parametrize("modules", ["trinix.ops, trinix.layers.activation", "trinix.kernels.triton.activation"])
def test_importing_leaves_torch_and_the_process_as_they_were(modules, forked_process):
    code = f"""
        import os, random, torch, warnings, triton
        def facts():
            return [
                torch.get_rng_state().tolist(), random.getstate(), dict(os.environ), torch.cuda.is_initialized(),
                torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                torch.backends.cuda.matmul.allow_tf32, list(warnings.filters), str(torch.get_default_device()),
                [list(h.calls) for h in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)],
            ]
        before = facts()
        import {modules}
        print([i for i, (a, b) in enumerate(zip(before, facts(), strict=True)) if a != b])
    """
    assert forked_process(code) == "[]"


def test_torch_compile_may_be_the_first_to_call_a_named_backend(fresh_process):
    """Backends are imported at their first call, here by what torch.compile traces."""
    pytest.importorskip("triton")
    code = """
    import torch
    from trinix import ops

    x = torch.ones(2, 4, 16)
    heads = torch.ones(1, 8, 2, 16)
    cos, sin = ops.rope_table(8, 16)
    calls = {
        "silu": lambda: ops.silu(x, backend="triton"),
        "softmax": lambda: ops.softmax(x, -1, backend="triton"),
        "rms_norm": lambda: ops.rms_norm(x, 16, backend="triton"),
        "glu": lambda: ops.glu(x, backend="triton"),
        "rope": lambda: ops.rope(heads, cos=cos, sin=sin, backend="triton"),
        "attention": lambda: ops.attention(heads, heads, heads, backend="triton"),
        "head_mlp": lambda: ops.head_mlp(x, torch.ones(2, 16, 8), torch.ones(2, 8, 16), backend="triton"),
    }
    for name, call in calls.items():
        torch.compile(call, fullgraph=True, backend="eager")()
        print(name)
    """
    said = fresh_process(code, TRITON_INTERPRET="1")
    assert said.split() == ["silu", "softmax", "rms_norm", "glu", "rope", "attention", "head_mlp"]


def test_type_checkers_see_the_names_that_load_on_first_use():
    """__init__.pyi has each from where __init__.py loads it."""
    stub = Path(trinix.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    found = {}
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.ImportFrom):
            found |= {one.name: node.module if node.module != "trinix" else f"trinix.{one.name}" for one in node.names}
            assert [one.asname for one in node.names] == [
                one.name for one in node.names
            ]  # what is not renamed is private
    assert found == trinix._HOMES
