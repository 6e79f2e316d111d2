"""A decoding step of a whole model in a CUDA graph, against the bytes that it has to read: ``python -m trinix.lab.decode``.

The floor is every weight but the embedding's table, and the cache, read once at a copy's rate. Weights and cache are random;
what is timed does not depend on them.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from trinix import device, models
from trinix.lab import measure, record, roofline
from trinix.models import Config, Decoder

CONFIG = models.llama(vocabulary=32000, dim=4096, layers=32, heads=32, kv_heads=8, hidden=14336, length=16384)
ROOM = 1024  # steps that the clock may take


def least_bytes(model: Decoder, batch: int, length: int) -> int:
    """What a step of ``batch`` sequences over ``length`` cached tokens reads at least."""
    weights = sum(p.nbytes for p in model.parameters()) - (0 if model.config.tied else model.embedding.weight.nbytes)
    size = model.output.weight.itemsize
    row = sum(_row(cache) for cache in model.caches(1, 1))
    return weights + batch * length * row * size


def _row(cache) -> int:
    """Numbers that a cache holds of a token."""
    return cache.rows.numel() if hasattr(cache, "rows") else cache.keys.numel() + cache.values.numel()


@torch.no_grad()
def measured(model: Decoder, batch: int, length: int, clock: measure.Gpu) -> dict:
    """A result line of a step of ``batch`` sequences over ``length`` cached tokens."""
    caches = model.caches(batch, length + ROOM)
    for cache in caches:
        for kept in (cache.rows,) if hasattr(cache, "rows") else (cache.keys, cache.values):
            kept.normal_()
        cache.lengths.fill_(length)
        cache.count(length)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    step = model.captured(caches)
    moved = least_bytes(model, batch, length)
    probes, scale = roofline.traffic_probes(moved)
    times = clock.device_ms({"step": lambda: step(tokens), "copy": probes["copy"]})
    finite = bool(step(tokens).isfinite().all())
    return record.line(
        case=f"D-{model.config.layers}x{model.config.dim}-b{batch}-{length}",
        op="decode_step",
        impl="trinix",
        device_ms=asdict(times["step"]),
        graph_ms=times["step"].p50,
        bytes=moved,
        ceiling="bandwidth",
        ceiling_share=round(times["copy"].p50 * scale / times["step"].p50, 4),
        ok=finite,
        reason=None if finite else "the logits are not finite",
        **{"pass": "fwd"},
    )


def main(argv: list[str] | None = None, config: Config = CONFIG) -> int:
    parser = argparse.ArgumentParser(prog="python -m trinix.lab.decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=8192, help="cached tokens of every sequence")
    parser.add_argument("--out", type=Path, default=Path("out/decode"), help="folder of result files")
    flags = parser.parse_args(argv)
    card = device.card()
    if card is None:
        parser.error("needs a GPU, torch.cuda.is_available() is False")
    model, clock = Decoder(config, device="cuda", dtype=torch.bfloat16).eval(), measure.Gpu()
    file = record.ResultFile(flags.out / card.slug, "decode_step")
    for batch in flags.batch:
        one = measured(model, batch, flags.length, clock)
        file.add([one])
        print(f"{one['case']}: {one['device_ms']['p50']:.3f} ms, {one['ceiling_share']:.1%} of a copy's rate")
    print(f"Wrote {file.finish()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
