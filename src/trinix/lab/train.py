"""A training step of a whole decoder beside the same decoder in plain PyTorch: ``python -m trinix.lab.train``.

A step is forward, loss, and backward to a gradient for every parameter. The optimizer is not in it: its fused kernel is PyTorch's
for every implementation. All of them share the same parameters, in bfloat16.

The gate stands before the clocks: the loss of every token and the gradient of every parameter, at the very size that is timed,
within the budget of ``trinix.testing``. Float64 is the plain decoder's; it keeps nothing of a block but its input, so that it fits.
"""

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trinix import device, models, ops, testing
from trinix.lab import layers, measure, record, roofline
from trinix.lab.run import reason_of
from trinix.models import Config, Decoder

EPS = 1e-5  # of the decoder's norms


@dataclass(frozen=True)
class Case:
    """A decoder and the tokens of a step."""

    name: str
    config: Config
    batch: int
    length: int

    @property
    def id(self) -> str:
        return f"T-{self.name}-{self.config.layers}x{self.config.dim}-{self.batch}x{self.length}"


def tokens_of(case_id: str) -> int:
    """Tokens of a step, from the end of its case's id."""
    batch, length = case_id.rpartition("-")[2].split("x")
    return int(batch) * int(length)


SIZES = {"vocabulary": 32000, "dim": 2048, "layers": 8, "heads": 16, "length": 4096}
LLAMA = models.llama(**SIZES, kv_heads=8, hidden=5632)
GPT = models.gpt(**SIZES, kv_heads=16, hidden=8192)
CASES = (
    Case("llama", LLAMA, 1, 4096),
    Case("llama", LLAMA, 4, 2048),
    Case("gpt", GPT, 4, 2048),
)


def plain(config: Config, weights: Mapping[str, Tensor], tokens: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The logits of ``Decoder(config)`` with these parameters, in plain PyTorch; ``table`` is ``rotary_table``'s."""
    heads, kv_heads = config.heads, config.kv_heads

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        weight, width = weights[f"{name}.weight"], x.shape[-1:]
        if config.gated:
            return F.rms_norm(x, width, weight, EPS)
        return F.layer_norm(x, width, weight, weights[f"{name}.bias"], EPS)

    def attention(x, name):
        qkv = linear(x, f"{name}.qkv_proj").unflatten(-1, (heads + 2 * kv_heads, -1))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        if not config.learned_positions:
            q, k = _rotated(q, *table), _rotated(k, *table)
        return linear(layers.sdpa(q, k, v, True).flatten(2), f"{name}.o_proj")

    def feed_forward(x, name):
        if config.gated:
            gate, up = linear(x, f"{name}.gate_up_proj").chunk(2, -1)
            return linear(F.silu(gate) * up, f"{name}.down_proj")
        return linear(F.gelu(linear(x, f"{name}.0"), approximate="tanh"), f"{name}.2")

    def block(h, name):
        h = h + attention(norm(h, f"{name}.attention_norm"), f"{name}.attention")
        return h + feed_forward(norm(h, f"{name}.feed_forward_norm"), f"{name}.feed_forward")

    h = F.embedding(tokens, weights["embedding.weight"])
    if config.learned_positions:
        h = h + weights["positions.weight"][: tokens.shape[1]]
    for i in range(config.layers):
        wide = h.dtype == torch.float64
        h = checkpoint(block, h, f"blocks.{i}", use_reentrant=False) if wide else block(h, f"blocks.{i}")
    return linear(norm(h, "norm"), "embedding" if config.tied else "output")


def rotary_table(config: Config, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[length, 1, head_dim]`` in the dtype of ``like``, as a model makes them once for all layers."""
    width = config.head_dim or config.dim // config.heads
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width
    angle = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * config.rope_base**-exponent
    angle = angle.repeat(1, 2)[:, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every token given those before it, in float32 at least, as in ``Decoder.loss``."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="none")


def plain_losses(config: Config, weights: Mapping[str, Tensor], length: int) -> Callable[[Tensor], Tensor]:
    table = rotary_table(config, length, weights["embedding.weight"])
    return lambda tokens: losses(plain(config, weights, tokens[:, :-1], table), tokens)


def prepare(model: Decoder, length: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every implementation: ``[B, length + 1]`` tokens to the loss of each, on the model's parameters."""
    eager = plain_losses(model.config, dict(model.named_parameters()), length)
    return {
        "trinix": lambda tokens: losses(model(tokens[:, :-1]), tokens),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False, fullgraph=True),
    }


def step(call: Callable[[Tensor], Tensor], tokens: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One training step: the loss of every token, and the gradients of their mean."""
    found = call(tokens)
    grads = torch.autograd.grad(found.mean(), list(parameters.values()))
    return {"loss": found.detach()} | {f"d{name}": grad for name, grad in zip(parameters, grads, strict=True)}


class Oracle:
    """What the plain decoder gives for these tokens in the model's dtype, and in float64."""

    def __init__(self, model: Decoder, tokens: Tensor):
        parameters, length = dict(model.named_parameters()), tokens.shape[1] - 1
        double = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
        self.low = step(plain_losses(model.config, parameters, length), tokens, parameters)
        self.true = step(plain_losses(model.config, double, length), tokens, double)

    def gate(self, got: dict[str, Tensor]) -> tuple[str | None, float | None]:
        """(why the loss or a gradient misses its budget or None, the worst error ratio if it is finite)."""
        worst, reason = 0.0, None
        for name, true in self.true.items():
            verdict = testing.judge(name, got[name], self.low[name], true)
            worst = max(worst, verdict.ratio)
            reason = reason or (None if verdict.ok else f"misses its error budget: {verdict}")
        return reason, worst if isfinite(worst) else None


def gated(case: Case, model: Decoder, tokens: Tensor) -> dict[str, tuple[Callable | None, str | None, float | None]]:
    """By implementation: (its call, or None if it may not be timed; why; its worst error ratio)."""
    oracle, parameters, found = Oracle(model, tokens), dict(model.named_parameters()), {}
    for impl, call in prepare(model, case.length).items():
        if impl == "compile" and not tokens.is_cuda:
            found[impl] = None, "skipped: timed on a GPU only", None
            continue
        try:
            reason, ratio = oracle.gate(step(call, tokens, parameters))
        except Exception as error:
            reason, ratio = reason_of(impl, error), None
        found[impl] = None if reason else call, reason, ratio
    return found


def flops(case: Case, model: Decoder) -> int:
    """The least: every product once forward and twice backward, of causal scores the half."""
    config = case.config
    tables = {"positions.weight"} | (set() if config.tied else {"embedding.weight"})
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in tables)
    width = config.heads * (config.head_dim or config.dim // config.heads)
    scores = config.layers * case.length * width  # of a token, both products of all heads: a half of 2 * 2
    return 3 * case.batch * case.length * (2 * products + 2 * scores)


def measured(case: Case, model: Decoder, clock: measure.Gpu) -> list[dict]:
    """Result lines of one case, for every implementation."""
    where = model.embedding.weight.device
    generator = torch.Generator(where).manual_seed(0)
    shape = case.batch, case.length + 1
    tokens = torch.randint(case.config.vocabulary, shape, generator=generator, device=where)
    subjects, parameters = gated(case, model, tokens), dict(model.named_parameters())
    gc.collect()
    torch.cuda.empty_cache()
    runs = {
        impl: lambda call=call: step(call, tokens, parameters)
        for impl, (call, *_) in subjects.items()
        if call is not None
    }
    peaks = {impl: clock.peak_mib(run) for impl, run in runs.items()}
    work = roofline.Work(0, flops(case, model), "matmul")
    probes, scale = roofline.probes_of(work)
    times, walls = clock.device_ms(runs | probes), clock.wall_ms(runs)
    inputs = tokens.nbytes + sum(p.nbytes for p in parameters.values())
    lines = []
    for impl, (call, reason, ratio) in subjects.items():
        known = {"case": case.id, "op": "train_step", "pass": "fwd_bwd", "impl": impl, "error_ratio": ratio}
        known |= {"flops": work.flops, "ceiling": work.ceiling}
        if call is not None:
            ms = times[impl].p50
            reason = roofline.too_many_flops(ms, work.flops, device.card())
            known |= {
                "backend": attention_backend(case, model) if impl == "trinix" else impl,
                "device_ms": asdict(times[impl]),
                "wall_ms": round(walls[impl], 6),
                "peak_mib": round(peaks[impl], 4),
                "inputs_mib": round(inputs / 2**20, 4),
                "ceiling_share": round(times["matmul"].p50 * scale / ms, 4),
            }
        lines.append(record.line(**known, ok=reason is None, reason=reason))
    return lines


def attention_backend(case: Case, model: Decoder) -> str:
    """What runs the attention of our decoder."""
    weight, width = model.embedding.weight, case.config.head_dim or case.config.dim // case.config.heads
    q, k, v = (
        torch.empty(case.batch, case.length, heads, width, dtype=weight.dtype, device=weight.device, requires_grad=True)
        for heads in (case.config.heads, case.config.kv_heads, case.config.kv_heads)
    )
    return ops.explain("attention", q, k, v, causal=True).backend


def main(argv: list[str] | None = None, cases: tuple[Case, ...] = CASES) -> int:
    parser = argparse.ArgumentParser(prog="python -m trinix.lab.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder of result files")
    flags = parser.parse_args(argv)
    card = device.card()
    if card is None:
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    clock, model = measure.Gpu(), None
    file = record.ResultFile(flags.out / card.slug, "train_step")
    for case in cases:
        if model is None or model.config != case.config:
            model = None  # the last one's memory
            torch.manual_seed(0)
            model = Decoder(case.config, device="cuda", dtype=torch.bfloat16)
        lines = measured(case, model, clock)
        file.add(lines)
        for one in lines:
            print(f"{case.id} {one['impl']}: {_shown(one)}", flush=True)
    print(f"Wrote {file.finish()}")
    return 0 if all(one["ok"] for one in file.lines) else 1


def _shown(one: dict) -> str:
    if not one["ok"]:
        return one["reason"]
    rate = tokens_of(one["case"]) / one["wall_ms"] * 1000
    return f"{one['device_ms']['p50']:.3f} ms, {rate:.0f} tokens/s, {one['peak_mib']:.0f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
