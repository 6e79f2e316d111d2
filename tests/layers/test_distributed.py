"""Two processes that train the small decoder together, as DistributedDataParallel and FSDP2 do it: what one process gets."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trinix
from trinix import models

SHAPES = ("gpt", "llama", "deepseek")
WORKER = Path(__file__).parents[1] / "two_processes.py"


def trained(backend, store):
    """What rank 0 of ``two_processes.py`` prints."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = Path(models.__file__).parents[2]
    environment = plain | {"PYTHONPATH": os.pathsep.join([str(source), *filter(None, [plain.get("PYTHONPATH")])])}
    both = [
        subprocess.Popen(
            [sys.executable, WORKER, backend, str(rank), store], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (_, errors) in zip(both, outputs, strict=True):
        assert process.returncode == 0, errors
    return json.loads(outputs[0][0])


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    return trained("gloo", tmp_path_factory.mktemp("gloo") / "store")


@pytest.fixture(scope="module")
def on_two_cards(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    return trained("nccl", tmp_path_factory.mktemp("nccl") / "store")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_learn_what_one_does(shape, way, on_the_cpu):
    """Also from pieces of unlike lengths, for which each process has made a table of its own."""
    result, single = on_the_cpu[shape][way], on_the_cpu[shape]["single"]["losses"]
    assert len(set(single)) == len(single) > 2
    assert result["losses"] == pytest.approx(single, rel=1e-12)
    assert result["furthest"] < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("shape", [f"{shape}{more}" for shape in SHAPES for more in ("", ", autocast")])
def test_two_cards_learn_what_one_does(shape, way, on_two_cards):
    result, single = on_two_cards[shape][way], on_two_cards[shape]["single"]["losses"]
    rounding = torch.finfo(torch.bfloat16 if "autocast" in shape else torch.float32).eps
    assert len(set(single)) == len(single) > 2
    # the same numbers are added up in another order
    assert result["losses"] == pytest.approx(single, rel=(2 if "autocast" in shape else 32) * rounding)


def test_a_table_that_has_grown_is_no_buffer_and_belongs_to_its_card():
    """What DistributedDataParallel writes rank 0's over has one length on all; a replica of DataParallel makes its own."""
    module = trinix.FastRoPEPositionEmbedding(8, 4)
    first = {name: t.shape for name, t in module.named_buffers()}
    module.grow(10)
    assert module.cos.shape == module.sin.shape == (10, 4)
    assert {name: t.shape for name, t in module.named_buffers()} == first
    replica = copy.copy(module)
    replica._buffers = {name: t.to("meta") for name, t in module._buffers.items()}
    assert replica.cos.is_meta
    assert replica.cos.shape == (4, 4)
    replica.grow(10)
    assert replica.sin.is_meta
    assert replica.sin.shape == (10, 4)
    assert not module.cos.is_meta
