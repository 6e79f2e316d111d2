"""Calls of every op and kernel on a card, forward and backward: ``test_second_device.py`` and ``test_streams.py`` make them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from trinix import ops
from trinix.dispatch import Unsupported
from trinix.ops.glu import linear_glu
from trinix.ops.latent import keys_and_values
from trinix.ops.linear import linear
from trinix.testing import normal


@dataclass(frozen=True)
class Call:
    """``prepared(device)()`` gives the results of ``function`` of tensors of ``shapes``, and all their gradients."""

    function: Callable
    shapes: tuple
    dtype: torch.dtype = torch.bfloat16
    grad: bool = True
    exact: bool = True  # the same bits every time; else sums in an order of their own

    def prepared(self, device, seed: int = 0) -> Callable[[], tuple[torch.Tensor, ...]]:
        inputs = [normal(shape, self.dtype, seed=seed + i).to(device) for i, shape in enumerate(self.shapes)]
        gradients = []

        def run():
            if not torch.cuda.is_current_stream_capturing():
                torch.manual_seed(7)  # dropout's
            if not self.grad:
                with torch.no_grad():
                    return _several(self.function(*inputs))
            leaves = [t.detach().requires_grad_() for t in inputs]
            results = _several(self.function(*leaves))
            if not gradients:
                gradients.extend(normal(y.shape, y.dtype, seed=seed + 90 + i).to(device) for i, y in enumerate(results))
            return (*(y.detach() for y in results), *torch.autograd.grad(results, leaves, gradients))

        try:
            run()
        except Unsupported as error:
            pytest.skip(str(error))
        return run

    def check(self, got, wanted) -> None:
        if self.exact:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
            return
        for one, other in zip(got, wanted, strict=True):
            rounding = torch.finfo(one.dtype).eps
            torch.testing.assert_close(one, other, rtol=2 * rounding, atol=rounding * float(other.abs().max()))


def _several(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _table(q, length=256, width=64):
    return ops.rope_table(length, width, device=q.device)


def _ends(q, *ends):
    return torch.tensor(ends, dtype=torch.int32, device=q.device)


def _varlen(q, k, v):
    ends = _ends(q, 0, 100, 100, 333, 500)
    return ops.attention(q, k, v, causal=True, cu_seqlens_q=ends, max_seqlen_q=233, max_seqlen_k=233, backend="hopper")


def _portable_attention(q, k, v, bias):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(20)
    return ops.attention(q, k, v, bias=bias, mask=mask, dropout_p=0.2, return_lse=True, backend="triton")


def _decode(q, k_cache, v_cache, k_new, v_new):
    lengths = _ends(q, 700, 33)
    return ops.attention_decode(
        q, k_cache, v_cache, lengths, k_new=k_new, v_new=v_new, return_lse=True, num_splits=5, backend="triton"
    )


def _decode_pages(q, k_pages, v_pages):
    table = torch.arange(24, dtype=torch.int32, device=q.device).flip(0).view(2, 12)
    return ops.attention_decode(
        q, k_pages, v_pages, _ends(q, 180, 33), page_table=table, num_splits=3, backend="triton"
    )


def _heads(batch, rows, heads, d, *, keys=None, key_heads=None, dv=None):
    kept = batch, keys or rows, key_heads or heads
    return (batch, rows, heads, d), (*kept, d), (*kept, dv or d)


def _attention(backend, **options):
    return lambda q, k, v, *more: ops.attention(q, k, v, backend=backend, **options)


def _with_vectors(q, k, v, slopes, sink):
    with torch.no_grad():
        slopes = slopes.float().abs()
    return ops.attention(q, k, v, causal=True, alibi_slopes=slopes.detach(), sink=sink, softcap=20.0, backend="hopper")


CALLS = {
    "silu": Call(lambda x: ops.silu(x, backend="triton"), ((64, 1000),)),
    "relu and its mask": Call(lambda x: ops.relu(x, backend="triton"), ((64, 1000),)),
    "leaky_relu, strided": Call(lambda x: ops.leaky_relu(x.mT[:, ::2], 0.1, backend="triton"), ((3, 64, 100),)),
    "softmax, rows": Call(lambda x: ops.softmax(x, backend="triton"), ((40, 4096),), torch.float32),
    "softmax, columns": Call(lambda x: ops.softmax(x, -2, backend="triton"), ((3, 256, 40),)),
    "softmax, long columns": Call(lambda x: ops.softmax(x, -2, backend="triton"), ((2, 16384, 128),)),
    "softmax, very long rows": Call(lambda x: ops.log_softmax(x, backend="triton"), ((2, 300_001),)),
    "softmax, rows in clusters": Call(lambda x: ops.softmax(x, backend="hopper"), ((8, 65536),)),
    "softmax, columns on Hopper": Call(lambda x: ops.softmax(x, -2, backend="hopper"), ((3, 4096, 128),)),
    "layer_norm": Call(lambda x, w, b: ops.layer_norm(x, 768, w, b, backend="triton"), ((100, 768), (768,), (768,))),
    "rms_norm, chunks": Call(lambda x, w: ops.rms_norm(x, 12288, w, backend="triton"), ((64, 12288), (12288,))),
    "layer_norm, wide": Call(
        lambda x, w, b: ops.layer_norm(x, 65536, w, b, backend="triton"), ((4, 65536), (65536,), (65536,))
    ),
    "rms_norm, rows in clusters": Call(
        lambda x, w: ops.rms_norm(x, 16384, w, backend="hopper"), ((150, 16384), (16384,))
    ),
    "layer_norm, rows in clusters": Call(
        lambda x, w, b: ops.layer_norm(x, 65536, w, b, backend="hopper"), ((20, 65536), (65536,), (65536,))
    ),
    "layer_norm_residual": Call(
        lambda x, r, w, b: ops.layer_norm_residual(x, r, 768, w, b, backend="triton"),
        ((100, 768), (100, 768), (768,), (768,)),
    ),
    "rms_norm_residual, dropout": Call(
        lambda x, r, w: ops.rms_norm_residual(x, r, 768, w, dropout_p=0.2, backend="triton"),
        ((100, 768), (100, 768), (768,)),
    ),
    "rms_norm_residual, rows in clusters": Call(
        lambda x, r, w: ops.rms_norm_residual(x, r, 16384, w, backend="hopper"), ((60, 16384), (60, 16384), (16384,))
    ),
    "rms_norm_activation": Call(
        lambda x, w: ops.rms_norm_activation(x, 768, w, backend="triton"), ((100, 768), (768,))
    ),
    "swiglu": Call(lambda gate, up: ops.swiglu(gate, up, backend="triton"), ((64, 1000), (64, 1000))),
    "geglu, packed": Call(lambda x: ops.geglu(x, backend="triton"), ((64, 1000),)),
    "reglu, interleaved": Call(lambda x: ops.reglu(x, layout="interleaved", backend="triton"), ((64, 1000),)),
    "a product and its glu": Call(
        lambda x, w, b: linear_glu(x, w, b, "swiglu"), ((300, 64), (256, 64), (256,)), exact=False
    ),
    "rope": Call(
        lambda q, k: ops.rope(q, k, *_table(q), offset=3, backend="triton"), ((2, 100, 4, 64), (2, 100, 2, 64))
    ),
    "rope, in place": Call(
        lambda q: ops.rope(q.clone(), None, *_table(q), inplace=True, backend="triton"), ((2, 100, 4, 64),), grad=False
    ),
    "qk_norm_rope": Call(
        lambda q, k, qw, kw: ops.qk_norm_rope(q, k, qw, kw, *_table(q), backend="triton"),
        ((2, 100, 4, 64), (2, 100, 2, 64), (64,), (64,)),
    ),
    "alibi_bias": Call(
        lambda slopes: ops.alibi_bias(slopes, 100, 130, causal=False, backend="triton"), ((8,),), torch.float32
    ),
    "attention on Hopper, short": Call(
        _attention("hopper", causal=True), _heads(2, 200, 4, 64, key_heads=2), exact=False
    ),
    "attention on Hopper, both passes short": Call(_attention("hopper", causal=True), _heads(2, 200, 4, 64)),
    "attention on Hopper, drawn": Call(_attention("hopper"), _heads(2, 1500, 12, 64), exact=False),
    "attention on Hopper, few drawn": Call(_attention("hopper"), _heads(1, 600, 3, 128), exact=False),
    "attention on Hopper, the same bits": Call(
        _attention("hopper", causal=True, deterministic=True), _heads(2, 1000, 6, 128)
    ),
    "attention on Hopper, the same bits of 64": Call(_attention("hopper", deterministic=True), _heads(2, 1500, 12, 64)),
    "attention on Hopper, wide": Call(
        _attention("hopper", causal=True, return_lse=True), _heads(1, 500, 4, 192, dv=128), exact=False
    ),
    "attention on Hopper, lengths": Call(_varlen, ((500, 4, 64), (500, 2, 64), (500, 2, 64)), exact=False),
    "attention on Hopper, slopes and a sink": Call(
        lambda q, k, v, sink: _with_vectors(q, k, v, q[0, 0, :, 0], sink), (*_heads(2, 300, 4, 128), (4,)), exact=False
    ),
    "attention by Triton": Call(
        _attention("triton", causal=True, deterministic=True), _heads(2, 300, 4, 64, key_heads=2)
    ),
    "attention by Triton, all options": Call(_portable_attention, (*_heads(2, 200, 4, 64), (1, 4, 200, 200))),
    "attention by cuDNN": Call(_attention("cudnn", causal=True), _heads(2, 256, 4, 128), exact=False),
    "attention by FlashAttention": Call(_attention("flash_attn", causal=True), _heads(2, 256, 4, 128), exact=False),
    "attention, auto": Call(_attention("auto", causal=True), _heads(2, 600, 4, 64), exact=False),
    "attention_decode": Call(
        _decode, ((2, 1, 8, 64), (2, 1024, 2, 64), (2, 1024, 2, 64), (2, 1, 2, 64), (2, 1, 2, 64)), grad=False
    ),
    "attention_decode, pages": Call(_decode_pages, ((2, 1, 8, 128), (24, 16, 2, 128), (24, 16, 2, 128)), grad=False),
    "head_mlp on Hopper": Call(
        lambda x, w1, w2: ops.head_mlp(x, w1 / 8, w2 / 16, backend="hopper"), ((6, 500, 64), (6, 64, 256), (6, 256, 64))
    ),
    "head_mlp on Hopper, 128": Call(
        lambda x, w1, w2: ops.head_mlp(x, w1 / 12, w2 / 16, "gelu", backend="hopper"),
        ((4, 300, 128), (4, 128, 264), (4, 264, 128)),
    ),
    "head_mlp by Triton": Call(
        lambda x, w1, w2, b1, b2, wg: ops.head_mlp(
            x, w1 / 8, w2 / 10, "swiglu", b1=b1, b2=b2, w_gate=wg / 8, reduce="mean", backend="triton"
        ),
        ((3000, 64), (2, 64, 96), (2, 96, 64), (2, 96), (2, 64), (2, 64, 96)),
    ),
    "one row of a linear layer": Call(linear, ((1, 1024), (300, 1024), (300,)), grad=False),
    "keys and values of a latent": Call(
        lambda both, rope: keys_and_values(both, rope, 64, "triton"), ((2, 50, 4, 128), (2, 50, 1, 32))
    ),
}
