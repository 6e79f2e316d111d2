"""The clock of a decoding step: what it counts, and that it runs."""

import pytest
import torch

from trinix import models
from trinix.lab import decode, record

SMALL = {"dim": 64, "layers": 2, "heads": 4, "hidden": 96, "length": 64}


@pytest.mark.parametrize(
    ("config", "row"),
    [
        (models.llama(**SMALL), 2 * 2 * 2 * 16),
        (models.gpt(**SMALL), 2 * 2 * 4 * 16),
        (models.deepseek(**SMALL), 2 * (32 + 16)),
    ],
)
def test_the_least_bytes_are_weights_and_cache(config, row):
    model = models.Decoder(config, dtype=torch.bfloat16)
    tables = model.embedding.weight.numel() * (0 if config.tied else 1)
    weights = sum(p.numel() for p in model.parameters()) - tables
    # a tied table is the output's weight, and read whole; named_parameters shows it once, as the embedding's
    assert decode.least_bytes(model, 3, 10) == 2 * (weights + 3 * 10 * row)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        decode.main([])
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "deepseek"])
def test_a_step_is_timed_and_recorded(shape, tmp_path, capsys):
    config = getattr(models, shape)(**SMALL)
    assert decode.main(["--batch", "1", "3", "--length", "100", "--out", str(tmp_path)], config) == 0
    (path,) = tmp_path.glob("*/decode_step.jsonl")
    lines = record.read(path)
    assert [one["case"] for one in lines] == ["D-2x64-b1-100", "D-2x64-b3-100"]
    assert all(one["ok"] and one["device_ms"]["p50"] > 0 for one in lines)
