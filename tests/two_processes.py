"""One of two processes that train a small decoder together; rank 0 prints what came of it, as JSON.

``python two_processes.py BACKEND RANK STORE``: "gloo" on the CPU in float64, "nccl" on two cards in float32 or under autocast.
``tests/layers/test_distributed.py`` starts both.
"""

import contextlib
import json
import os
import sys

import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trinix import models

SHAPES = {"gpt": models.gpt, "llama": models.llama, "deepseek": models.deepseek}
STEPS, LENGTH = 3, 16  # LENGTH: of RoPE's first tables, which longer pieces make grow


class Run:
    """What all trainings of these processes have in common."""

    def __init__(self, backend: str, rank: int):
        self.rank, self.on_cards = rank, backend == "nccl"
        self.device = torch.device("cuda", rank) if self.on_cards else torch.device("cpu")
        # heads of 64 channels: the fused kernels' size
        self.sizes = (
            {"dim": 128, "heads": 2, "kv_heads": 2} if self.on_cards else {"dim": 32, "heads": 4, "kv_heads": 2}
        )
        self.mesh = init_device_mesh(self.device.type, (2,))

    def model(self, shape: str, device: torch.device | str | None = None) -> models.Decoder:
        torch.manual_seed(0)
        length = 64 if shape == "gpt" else LENGTH  # a learned table does not grow
        config = SHAPES[shape](**self.sizes | {"hidden": 48, "length": length})
        # drawn on the CPU, where a seed gives the same numbers to all
        dtype = torch.float32 if self.on_cards else torch.float64
        made = models.Decoder(config, device="cpu" if device is None else device, dtype=dtype)
        return made.to(self.device) if device is None else made

    def pieces(self, step: int, rank: int) -> list[torch.Tensor]:
        """A step's tokens of one process, in two calls of the model; the second process has the longer ones, and they grow."""
        generator = torch.Generator().manual_seed(10 * step + rank)
        lengths = 9 + 4 * step + 13 * rank, 11
        return [torch.randint(256, (2, n), generator=generator).to(self.device) for n in lengths]

    def loss(self, model, pieces) -> torch.Tensor:
        total = 0.0
        for tokens in pieces:
            logits = model(tokens[:, :-1]).flatten(0, 1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            total = total + F.cross_entropy(logits.to(wide), tokens[:, 1:].flatten())
        return total / len(pieces)

    def trained(self, model, alone: bool, autocast: bool) -> list[float]:
        """Losses of the steps, of both processes' pieces together; ``alone``: this process computes all of them."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)  # Adam would not see a factor in its gradients
        losses = []
        for step in range(STEPS):
            ranks = (0, 1) if alone else (self.rank,)
            context = torch.autocast(self.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
            with context:
                loss = sum(self.loss(model, self.pieces(step, rank)) for rank in ranks) / len(ranks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss = loss.detach().double()
            if not alone:
                distributed.all_reduce(loss)
                loss = loss / 2
            losses.append(loss.item())
        return losses

    def sharded(self, shape: str) -> models.Decoder:
        """Made without memory, sharded block by block, filled with rank 0's weights; backward computes every block again."""
        model = self.model(shape, "meta")
        for block in model.blocks:
            again = block.forward
            block.forward = lambda x, h, cache, again=again: checkpoint(again, x, h, cache, use_reentrant=False)
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        model.to_empty(device=self.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, self.model(shape).state_dict() if self.rank == 0 else {}, options=options)
        return model

    def compared(self, shape: str, autocast: bool = False) -> dict:
        """How each way of training ended, beside one process that has seen all."""
        single = self.model(shape)
        result = {"single": {"losses": self.trained(single, True, autocast)}}
        for way in ("ddp", "fsdp"):
            if way == "ddp":
                model = DistributedDataParallel(self.model(shape))
                losses, state = self.trained(model, False, autocast), model.module.state_dict()
            else:
                model = self.sharded(shape)
                losses = self.trained(model, False, autocast)
                state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            wanted = single.state_dict()
            if self.rank == 0:  # which alone has the whole
                furthest = max(float((state[name].to(t.device) - t).abs().max()) for name, t in wanted.items())
                result[way] = {"losses": losses, "furthest": furthest}
        return result | {"checkpoint": self.handed_over(model)}

    def handed_over(self, model: models.Decoder) -> float:
        """How far a new sharded model is from the sharded ``model`` in the layers that have taken its layers' checkpoints."""
        dtype, options = model.embedding.weight.dtype, StateDictOptions(full_state_dict=True)
        new, taken = models.Decoder(model.config, device=self.device, dtype=dtype), []
        fully_shard(new, mesh=self.mesh)
        for i, (mine, theirs) in enumerate(zip(new.blocks, model.blocks, strict=True)):
            for name in ("attention", "feed_forward"):
                if hasattr(layer := getattr(mine, name), "load_checkpoint"):
                    layer.load_checkpoint(getattr(theirs, name).checkpoint())
                    taken.append(f"blocks.{i}.{name}.")
        got, wanted = (get_model_state_dict(one, options=options) for one in (new, model))
        return max(float((got[name] - t).abs().max()) for name, t in wanted.items() if name.startswith(tuple(taken)))


def main(backend: str, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    run = Run(backend, rank)
    if run.on_cards:
        results = {"gpt": run.compared("gpt"), "llama, autocast": run.compared("llama", True)}
    else:
        results = {shape: run.compared(shape) for shape in SHAPES}
    if rank == 0:
        print(json.dumps(results), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()
    # gloo's threads let go of tensors when they like; one that wants the interpreter while it ends aborts the process
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
