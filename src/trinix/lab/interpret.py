"""Correctness of every portable kernel without a GPU: Triton's interpreter, float64 oracle, both passes, all dtypes and layouts.

The interpreter runs the kernels' own text on the CPU. It proves indexing, masks and formulas; it knows nothing of speed,
races, or the GPU's approximate exp. It has to be chosen before Triton is imported, so ``check`` runs this module in a
process of its own: ``TRITON_INTERPRET=1 python -m trinix.lab.interpret`` prints one JSON object a check.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

LAYOUTS = ("contiguous", "every second column", "transposed", "broadcast row")
DTYPES = ("float32", "bfloat16", "float16")


def check(names: Iterable[str] = ()) -> Iterator[dict]:
    """Yield {"kernel", "dtype", "layout", "error_ratio", "ok", "reason"} for every check, or those of ``CHECKS`` that are named, as
    they finish."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "trinix.lab.interpret", *names]
    # in a session of its own Ctrl-C does not reach it: what there is to say, and when it ends, is this process's affair
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        try:
            for text in process.stdout:
                yield json.loads(text)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"the interpreter run ended with exit status {process.returncode}")


def _view(base, layout: str):
    return {
        "contiguous": base,
        "every second column": base[:, ::2],
        "transposed": base.t(),
        "broadcast row": base[:1].expand(base.shape),
    }[layout]


def _result(kernel: str, dtype: str, layout: str, names, got, low, true) -> dict:
    from trinix import testing

    verdicts = [testing.judge(*one) for one in zip(names, got, low, true, strict=True)]
    bad = [str(v) for v in verdicts if not v.ok]
    return {
        "kernel": kernel,
        "dtype": dtype,
        "layout": layout,
        "error_ratio": max(v.ratio for v in verdicts),
        "ok": not bad,
        "reason": "; ".join(bad) or None,
    }


def _activations() -> Iterator[dict]:
    import torch

    from trinix import ops, testing

    for kind in ops.KINDS[1:]:
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((65, 130), dtype, seed=1, scale=3.0)
            for layout in LAYOUTS:
                x = _view(base, layout)
                dy = testing.normal(x.shape, dtype, seed=2)
                ours = partial(ops.activation, kind=kind, backend="triton")
                plain = partial(ops.activation, kind=kind, backend="torch")
                got, low = testing.vjp(ours, [x], dy), testing.vjp(plain, [x], dy)
                true = testing.vjp(plain, [x.double()], dy.double())
                yield _result(f"activation/{kind}", name, layout, ("y", "dx"), got, low, true)


def _norms() -> Iterator[dict]:
    import torch

    from trinix import ops, testing

    forms = {
        "layer_norm": lambda x, w, backend: ops.layer_norm(x, x.shape[-1], w, w, backend=backend),
        "rms_norm": lambda x, w, backend: ops.rms_norm(x, x.shape[-1], w, 1e-5, backend=backend),
        "layer_norm_residual": lambda x, w, backend: torch.cat(
            ops.layer_norm_residual(x, x.square(), x.shape[-1], w, backend=backend)
        ),
        "rms_norm_activation": lambda x, w, backend: ops.rms_norm_activation(
            x, x.shape[-1], w, "mish", 1e-5, backend=backend
        ),
    }
    for form, function in forms.items():
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((65, 130), dtype, seed=1, scale=3.0)
            for layout in LAYOUTS:
                x = _view(base, layout)
                w = testing.normal(x.shape[-1:], dtype, seed=2)
                ours, plain = partial(function, backend="triton"), partial(function, backend="torch")
                dy = testing.normal(plain(x, w).shape, dtype, seed=3)
                got, low = testing.vjp(ours, [x, w], dy), testing.vjp(plain, [x, w], dy)
                true = testing.vjp(plain, [x.double(), w.double()], dy.double())
                yield _result(f"norm/{form}", name, layout, ("y", "dx", "dw"), got, low, true)


def _glus() -> Iterator[dict]:
    """Two tensors, and one packed tensor in every order of one kind."""
    import torch

    from trinix import testing
    from trinix.ops.glu import KINDS, glu
    from trinix.ops.glu import LAYOUTS as ORDERS

    for kind in KINDS:
        for name in DTYPES:
            dtype = getattr(torch, name)
            bases = [testing.normal((34, 68), dtype, seed=seed, scale=2.0) for seed in (1, 2)]
            for layout in LAYOUTS:
                x = _view(bases[0], layout)
                for order in ("two", *ORDERS) if kind == "swiglu" else ("two",):
                    inputs = [x, _view(bases[1], layout)] if order == "two" else [x]
                    packing = {} if order == "two" else {"layout": order}
                    ours, plain = (partial(glu, kind=kind, backend=b, **packing) for b in ("triton", "torch"))
                    dy = testing.normal(plain(*inputs).shape, dtype, seed=3)
                    got, low = testing.vjp(ours, inputs, dy), testing.vjp(plain, inputs, dy)
                    true = testing.vjp(plain, [t.double() for t in inputs], dy.double())
                    kernel = f"glu/{kind}" if order == "two" else f"glu/{kind}-{order}"
                    yield _result(kernel, name, layout, ("y", "dgate", "dup")[: len(got)], got, low, true)


def _softmaxes() -> Iterator[dict]:
    import torch

    from trinix import ops, testing

    for function in (ops.softmax, ops.log_softmax):
        for dim in (-1, -2):
            for name in DTYPES:
                dtype = getattr(torch, name)
                base = testing.normal((33, 70), dtype, seed=1)
                for layout in LAYOUTS:
                    x = _view(base, layout)
                    dy = testing.normal(x.shape, dtype, seed=2)
                    ours, plain = (partial(function, dim=dim, backend=backend) for backend in ("triton", "torch"))
                    got, low = testing.vjp(ours, [x], dy), testing.vjp(plain, [x], dy)
                    true = testing.vjp(plain, [x.double()], dy.double())
                    yield _result(f"softmax/{function.__name__} {dim}", name, layout, ("y", "dx"), got, low, true)


def _embeddings() -> Iterator[dict]:
    """Two heads a token, q and k the same tensor; the bias of three slopes in the layouts that a vector has."""
    import torch

    from trinix import ops, testing

    def rope(x, cos, sin, backend, **options):
        x = x.unflatten(-1, (2, -1))
        return torch.cat(ops.rope(x, x, cos, sin, backend=backend, **options))

    def qk_norm_rope(x, cos, sin, backend):
        x = x.unflatten(-1, (2, -1))
        weight = torch.linspace(0.5, 1.5, x.shape[-1]).to(x.dtype)
        return torch.cat(ops.qk_norm_rope(x, x, weight, weight, cos, sin, backend=backend))

    forms = {"rope": rope, "rope interleaved": partial(rope, interleaved=True), "qk_norm_rope": qk_norm_rope}
    for form, function in forms.items():
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((4, 8), dtype, seed=1)
            for layout in LAYOUTS:
                x = _view(base, layout)
                cos, sin = ops.rope_table(16, x.shape[1] // 4 * 2 if form == "rope" else x.shape[1] // 2)
                ours, plain = (partial(function, cos=cos, sin=sin, backend=b) for b in ("triton", "torch"))
                dy = testing.normal(plain(x).shape, dtype, seed=2)
                got, low = testing.vjp(ours, [x], dy), testing.vjp(plain, [x], dy)
                true = testing.vjp(plain, [x.double()], dy.double())
                yield _result(f"rope/{form}", name, layout, ("y", "dx"), got, low, true)
    for causal in (False, True):
        for name in DTYPES:
            for layout in ("contiguous", "every second column", "broadcast row"):
                slopes = _view(ops.alibi_slopes(6).expand(3, 6), layout)[0][:3]
                run = partial(ops.alibi_bias, seq_q=33, seq_k=50, causal=causal)
                got, low = (run(slopes, dtype=getattr(torch, name), backend=b) for b in ("triton", "torch"))
                true = run(slopes.double(), dtype=torch.float64)
                kernel = "alibi/causal" if causal else "alibi/full"
                yield _result(kernel, name, layout, ("y",), [got], [low], [true])


def _attention() -> Iterator[dict]:
    """24 queries of 2 heads, 40 keys of one; the layout is the queries'."""
    import torch

    from trinix import ops, testing

    bias = testing.normal((2, 24, 40), torch.float32, seed=6)
    forms = {
        "full": {}, "causal": {"causal": True}, "window, cap": {"window": (20, 6), "softcap": 3.0}, "bias": {"bias": bias},
        "alibi, sink": {"alibi_slopes": ops.alibi_slopes(2), "sink": bias[:, 0, 0]},
    }  # fmt: skip
    for form, options in forms.items():
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((24, 24), dtype, seed=1)
            for layout in LAYOUTS:
                q = _view(base, layout)[None].unflatten(-1, (2, -1))
                k, v = (testing.normal((1, 40, 1, q.shape[-1]), dtype, seed=seed) for seed in (2, 3))
                dy = testing.normal(q.shape, dtype, seed=4)
                ours, plain = (partial(ops.attention, backend=backend, **options) for backend in ("triton", "torch"))
                got, low = testing.vjp(ours, [q, k, v], dy), testing.vjp(plain, [q, k, v], dy)
                true = testing.vjp(plain, [t.double() for t in (q, k, v)], dy.double())
                yield _result(f"attention/{form}", name, layout, ("out", "dq", "dk", "dv"), got, low, true)


def _decoding() -> Iterator[dict]:
    """Two tokens appended to a cache of 40 keys, or to its pages, in three shares; the layout is the queries'."""
    import torch

    from trinix import ops, testing

    for paged in (False, True):
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((16, 16), dtype, seed=1)
            lengths = torch.tensor([38, 7], dtype=torch.int32)
            table = torch.arange(9, -1, -1, dtype=torch.int32).view(2, 5) if paged else None
            for layout in LAYOUTS:
                q = _view(base, layout).unflatten(0, (2, 2, 4))
                shape = (*((10, 8) if paged else (2, 40)), 2, q.shape[-1])
                k, v = (testing.normal(shape, dtype, seed=seed) for seed in (2, 3))
                new = testing.normal((2, 2, *shape[2:]), dtype, seed=4)

                def run(backend, wide, table=table, lengths=lengths, tensors=(q, k, v, new)):
                    q, k, v, new = (t.to(wide) for t in tensors)  # keeps q's layout
                    return ops.attention_decode(
                        q, k.clone(), v.clone(), lengths, k_new=new, v_new=new, page_table=table, num_splits=3,
                        return_lse=True, backend=backend,
                    )  # fmt: skip

                got, low, true = run("triton", dtype), run("torch", dtype), run("torch", torch.float64)
                kernel = "attention_decode/pages" if paged else "attention_decode"
                yield _result(kernel, name, layout, ("out", "lse"), got, low, true)


def _head_mlps() -> Iterator[dict]:
    """Two heads, 20 hidden values: plain, in every layout of x, and gated with biases."""
    import torch

    from trinix import ops, testing

    for kind, optional in (("silu", ()), ("geglu", ("b1", "b2", "w_gate"))):
        for name in DTYPES:
            dtype = getattr(torch, name)
            base = testing.normal((16, 32), dtype, seed=1)
            for layout in LAYOUTS[:1] if optional else LAYOUTS:
                x = _view(base, layout).unflatten(0, (2, -1))
                d = x.shape[-1]
                shapes = {"w1": (2, d, 20), "w2": (2, 20, d), "b1": (2, 20), "b2": (2, d), "w_gate": (2, d, 20)}
                names = ("w1", "w2", *optional)
                weights = [testing.normal(shapes[n], dtype, seed=2 + i, scale=0.2) for i, n in enumerate(names)]

                def run(x, w1, w2, *more, backend, kind=kind, optional=optional):
                    return ops.head_mlp(x, w1, w2, kind, **dict(zip(optional, more, strict=True)), backend=backend)

                ours, plain = (partial(run, backend=backend) for backend in ("triton", "torch"))
                inputs, dy = [x, *weights], testing.normal(x.shape, dtype, seed=9)
                got, low = testing.vjp(ours, inputs, dy), testing.vjp(plain, inputs, dy)
                true = testing.vjp(plain, [t.double() for t in inputs], dy.double())
                yield _result(f"head_mlp/{kind}", name, layout, ("y", "dx", *(f"d{n}" for n in names)), got, low, true)


def _layer_kernels() -> Iterator[dict]:
    """What only the layers call: a product of one row, and the keys of latent attention. Neither takes other layouts."""
    import torch
    import torch.nn.functional as F

    from trinix import testing
    from trinix.ops.latent import keys_and_values
    from trinix.ops.linear import linear

    for name in (one for one in DTYPES if one != "float32"):
        inputs = [testing.normal(s, getattr(torch, name), seed=i) for i, s in enumerate(((1, 72), (33, 72), (33,)))]
        got, low, true = linear(*inputs), F.linear(*inputs), F.linear(*(t.double() for t in inputs))
        yield _result("linear", name, LAYOUTS[0], ("y",), [got], [low], [true])
    for name in DTYPES:
        inputs = [testing.normal(s, getattr(torch, name), seed=i) for i, s in enumerate(((2, 5, 3, 32), (2, 5, 1, 8)))]

        def run(both, k_rope, backend):
            return torch.cat(keys_and_values(both, k_rope, 16, backend), -1)

        ours, plain = partial(run, backend="triton"), partial(run, backend="torch")
        dy = testing.normal(plain(*inputs).shape, inputs[0].dtype, seed=3)
        got, low = testing.vjp(ours, inputs, dy), testing.vjp(plain, inputs, dy)
        true = testing.vjp(plain, [t.double() for t in inputs], dy.double())
        yield _result("latent", name, LAYOUTS[0], ("k and v", "dboth", "drope"), got, low, true)


CHECKS = {
    "activation": _activations, "norm": _norms, "glu": _glus, "softmax": _softmaxes, "rope": _embeddings,
    "attention": _attention, "attention_decode": _decoding, "head_mlp": _head_mlps, "linear": _layer_kernels,
}  # fmt: skip


def main(names: Sequence[str] = ()) -> int:
    for name in names or CHECKS:
        for result in CHECKS[name]():
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except BrokenPipeError:  # who asked was killed
        os._exit(1)
