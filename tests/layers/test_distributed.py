"""Two processes that train the small decoder together, as DistributedDataParallel and FSDP2 do it: what one process gets."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trinix
from trinix import models

SHAPES, WAYS = ("gpt", "llama", "deepseek"), ("ddp", "fsdp")
WORKER = Path(__file__).parents[1] / "two_processes.py"
LIMIT = 300  # seconds: they take 5 to 20, more on a loaded machine


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
    end = time.monotonic() + LIMIT
    while any(p.poll() is None for p in both) and not any(p.poll() for p in both) and time.monotonic() < end:
        time.sleep(0.05)
    for process in both:  # where one has failed the other waits for it
        process.kill()
    outputs = [process.communicate() for process in both]
    assert [p.returncode for p in both] == [0, 0], "\n".join(errors for _, errors in outputs)
    return json.loads(outputs[0][0])


@pytest.fixture(scope="module")
def on_two_cards(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    return trained("nccl", tmp_path_factory.mktemp("nccl") / "store")


def test_two_processes_learn_what_one_does(tmp_path):
    """Also from pieces of unlike lengths, for which each process has made a table of its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    results = trained("gloo", tmp_path / "store")  # all at once: most of the time goes into starting them
    assert set(results) == set(SHAPES)
    for shape, result in results.items():
        single = result["single"]["losses"]
        assert len(set(single)) == len(single) > 2
        for way in WAYS:
            assert result[way]["losses"] == pytest.approx(single, rel=1e-12), (shape, way)
            assert result[way]["furthest"] < 1e-9, (shape, way)
        assert result["checkpoint"] == 0, shape


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["gpt", "llama, autocast"])
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


def test_a_table_that_has_grown_goes_where_the_module_goes():
    module = trinix.FastRoPEPositionEmbedding(8, 4)
    module.grow(10)
    wanted = module.cos.clone(), module.sin.clone()
    module.to("meta")
    assert module.cos.is_meta
    assert module.sin.shape == (10, 4)
    module.to_empty(device="cpu").half()
    torch.testing.assert_close((module.cos, module.sin), wanted, rtol=0, atol=0)
