"""The reference decoder: it learns, it generates the same with every cache as without, and it compiles whole."""

import contextlib
import copy
import functools
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trinix
from trinix import models
from trinix.testing import normal

SHAPES = {"gpt": models.gpt, "llama": models.llama, "deepseek": models.deepseek}


def made(shape, device="cpu", **sizes):
    torch.manual_seed(0)
    return models.Decoder(SHAPES[shape](**{"dim": 32, "heads": 4, "hidden": 48, "length": 64} | sizes), device=device)


def tokens_of(device, *shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_learns_the_tiny_text(shape):
    torch.manual_seed(0)
    text = models.tiny_text()
    less = {} if shape == "gpt" else {"batch": 8, "length": 32}  # which learn faster
    losses = models.train(models.Decoder(SHAPES[shape]()), text, 80, **less)
    counts = torch.tensor([text.encode().count(byte) for byte in set(text.encode())], dtype=torch.float64)
    shares = counts / counts.sum()
    frequencies = float(
        -(shares * shares.log()).sum()
    )  # the loss of one who knows nothing but how often each byte comes
    assert losses[0] > 5 > frequencies
    assert sum(losses[-5:]) / 5 < frequencies - 0.2, losses[::10]
    assert losses[0] > losses[20] > losses[-1]


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation_is_the_same_with_a_cache_as_without(shape, kind, device):
    model = made(shape, device)
    prompt = tokens_of(device, 2, 5)
    wanted = model.generate(prompt, 12, kind=None)
    assert wanted.shape == (2, 17)
    assert torch.equal(model.generate(prompt, 12, kind=kind), wanted)


class Scripted(models.Decoder):
    """Answers with the next token of a script, one a sequence, which takes what came before for its place."""

    def __init__(self, *scripts):
        super().__init__(models.llama(dim=32, heads=4, hidden=48))
        self.scripts, self.fed = torch.tensor(scripts), []

    def forward(self, tokens, caches=None, *, last=False):
        logits = super().forward(tokens, caches, last=last)
        script = self.scripts[:, len(self.fed)]
        self.fed.append(tokens)
        return torch.nn.functional.one_hot(script, logits.shape[-1])[:, None].float()


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged", None])
@pytest.mark.parametrize(
    ("end", "pad", "wanted"),
    [
        (None, None, [[7, 8, 9, 7, 5, 4], [8, 5, 5, 9, 9, 9]]),
        (9, None, [[7, 8, 9, 9], [8, 5, 5, 9]]),
        ([9], 3, [[7, 8, 9, 3], [8, 5, 5, 9]]),
        ((5, 9), None, [[7, 8, 9], [8, 5, 5]]),
        ([5, 9], 0, [[7, 8, 9], [8, 5, 0]]),
        ([8, 7], 7, [[7], [8]]),
        (5, 5, [[7, 8, 9, 7, 5], [8, 5, 5, 5, 5]]),
        (4, 3, [[7, 8, 9, 7, 5, 4], [8, 5, 5, 9, 9, 9]]),  # the second never ends
        (1, None, [[7, 8, 9, 7, 5, 4], [8, 5, 5, 9, 9, 9]]),
    ],
)
def test_an_ended_sequence_is_padded_until_all_have_ended(end, pad, wanted, kind):
    prompt = torch.tensor([[9, 5, 1], [8, 1, 4]])  # an end in it ends nothing
    model = Scripted([7, 8, 9, 7, 5, 4], [8, 5, 5, 9, 9, 9])
    got = model.generate(prompt, 6, kind=kind, eos_token_id=end, pad_token_id=pad)
    assert got.tolist() == [[*p, *w] for p, w in zip(prompt.tolist(), wanted, strict=True)]
    assert len(model.fed) == len(wanted[0])
    for n, fed in enumerate(model.fed[1:], start=1):  # an ended sequence goes on as what it is filled with
        assert torch.equal(fed, got[:, 3 + n - 1 : 3 + n] if kind else got[:, : 3 + n])


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_generation_ends_at_the_same_tokens_with_a_cache_as_without(shape, kind, device):
    model, prompt = made(shape, device), tokens_of(device, 3, 5)
    free = model.generate(prompt, 12, kind=None)
    ends = [int(free[0, 8]), int(free[1, 10])]
    wanted = model.generate(prompt, 12, kind=None, eos_token_id=ends, pad_token_id=0)
    assert not torch.equal(wanted, free)
    assert torch.equal(model.generate(prompt, 12, kind=kind, eos_token_id=ends, pad_token_id=0), wanted)
    for one, all_of_it in zip(wanted.tolist(), free.tolist(), strict=True):
        end = next((i + 1 for i in range(5, len(one)) if all_of_it[i] in ends), len(one))
        assert one == all_of_it[:end] + [0] * (len(one) - end)


def test_ends_that_are_no_tokens_are_refused():
    model, prompt = made("llama"), tokens_of("cpu", 1, 3)
    for wrong in (256, -1, 1.0, True, "a", [3, 256], torch.tensor(3)):
        with pytest.raises(ValueError, match=r"eos_token_id must be an int from 0 to 255, the vocabulary, got"):
            model.generate(prompt, 2, eos_token_id=wrong)
    for wrong in (256, -1, [3]):
        with pytest.raises(ValueError, match=r"pad_token_id must be an int from 0 to 255, the vocabulary, got"):
            model.generate(prompt, 2, eos_token_id=3, pad_token_id=wrong)
    with pytest.raises(ValueError, match=r"eos_token_id must be a token or some, got none; None is for"):
        model.generate(prompt, 2, eos_token_id=[])
    with pytest.raises(ValueError, match=r"pad_token_id follows the end of a sequence, got 0 and no end; give an eos"):
        model.generate(prompt, 2, pad_token_id=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["static", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_step_generates_the_same(shape, kind):
    model = made(shape, "cuda")
    prompt = tokens_of("cuda", 2, 5)
    free = model.generate(prompt, 20, kind=kind)
    assert torch.equal(model.generate(prompt, 20, kind=kind, graph=True), free)
    ends = {"kind": kind, "eos_token_id": free[:, 9].tolist()}
    assert torch.equal(model.generate(prompt, 20, graph=True, **ends), model.generate(prompt, 20, **ends))
    caches = model.caches(2, 6, kind)
    with torch.no_grad():
        model(prompt, caches)
        step = model.captured(caches)
        step(prompt[:, :1])
    with pytest.raises(ValueError, match="6 tokens and 1 more exceed its capacity of 6"):
        step(prompt[:, :1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "deepseek"])
@torch.no_grad()
def test_a_captured_step_keeps_its_table_when_the_models_grows(shape):
    model, tokens = made(shape, "cuda"), tokens_of("cuda", 2, 200)
    caches = model.caches(2, 64)
    model(tokens[:, :5], caches)
    step = model.captured(caches)
    model(tokens)
    others = [torch.full((n,), 7.0, device="cuda") for n in (64, 128, 256, 512, 1024, 2048, 4096) for _ in range(20)]
    torch.testing.assert_close(step(tokens[:, 5:6]), model(tokens[:, :6], last=True), atol=1e-4, rtol=1e-4)
    assert len(others) == 140


class Unrecorded:
    """In the place of a CUDA graph: what is captured runs once, replays nothing."""

    def __getattr__(self, _):
        return lambda *_: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@torch.no_grad()
def test_a_captured_step_looks_after_its_caches(monkeypatch):
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: Unrecorded())
    tokens = tokens_of("cpu", 2, 5)
    model = made("gpt", length=6)
    caches = model.caches(2, 9)
    with pytest.raises(ValueError, match="captured wants caches with their prompts, got an empty one"):
        model.captured(caches)
    model(tokens, caches)
    step = model.captured(caches)
    step(tokens[:, :1])
    with pytest.raises(ValueError, match="7 tokens exceed the table of 6 learned positions"):
        step(tokens[:, :1])
    model = made("llama")
    caches = model.caches(2, 48, "paged")
    model(tokens, caches)
    step = model.captured(caches)
    for cache in caches:
        cache.lengths.fill_(32)
        cache.count(32 - cache.longest)
        cache.truncate(16)
        assert len(cache._free) == 4
    step(tokens[:, :1])
    for cache in caches:
        assert len(cache._free) == 2
        assert cache.page_table[:, 1].tolist() == [pages[1] for pages in cache._owned]


@torch.no_grad()
def test_a_step_is_captured_on_the_models_card_whichever_is_the_current_one(monkeypatch):
    inside, seen = [], []

    @contextlib.contextmanager
    def switch(index):
        inside.append(index)
        yield
        inside.pop()

    def asked(name):
        def call(*arguments, **more):
            seen.append((name, list(inside), more))
            return side if name == "Stream" else Unrecorded()

        return call

    side = Unrecorded()
    monkeypatch.setattr(torch.cuda, "device", switch)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, asked(name))
    model, tokens = made("llama", layers=1), tokens_of("cpu", 2, 5)
    caches = model.caches(2, 9)
    model(tokens, caches)
    model.captured(caches)
    assert {name for name, _, _ in seen} == {"Stream", "current_stream", "stream", "CUDAGraph", "graph"}
    assert all(at == [model.embedding.weight.get_device()] for _, at, _ in seen)
    # PyTorch makes its own stream once in a process, on the card that captured first
    assert [more for name, _, more in seen if name == "graph"] == [{"stream": side}]


@torch.no_grad()
def test_a_captured_step_keeps_the_tables_that_its_graph_reads(monkeypatch):
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: Unrecorded())
    model = made("llama", layers=1)
    position = model.blocks[0].attention.position
    position.grow(position.cos.shape[0] + 1)
    caches = model.caches(2, 9)
    model(tokens_of("cpu", 2, 5), caches)
    step = model.captured(caches)
    read = weakref.ref(position.cos)
    position.grow(2 * position.cos.shape[0])
    assert read() is not None
    del step
    assert read() is None


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_of_a_prompt_and_steps_are_those_of_the_whole(shape, device):
    model, tokens = made(shape, device), tokens_of(device, 2, 9)
    caches = model.caches(2, 9)
    got = torch.cat([model(part, caches) for part in tokens.split((5, 1, 3), 1)], 1)
    torch.testing.assert_close(got, model(tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(tokens, last=True), model(tokens)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_learns_and_the_whole_compiles(shape, fresh_dynamo, device):
    model, tokens = made(shape, device, layers=1), tokens_of(device, 2, 9)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(normal(p.shape, p.dtype, seed=i, device=device, scale=0.02))
    grads = []
    for call in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(tokens).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)
    assert all(bool(g.any()) for g in grads[0])


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_that_backward_computes_again_have_the_same_gradients(shape, backend, device):
    model, tokens = made(shape, device, dropout=0.2, layers=1), tokens_of(device, 1, 6)
    again = [0]
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda *_: again.__setitem__(0, again[0] + 1))
    results = []
    for checkpointed in (False, False, True):  # the second call of a kind may go another way than the first
        for block in model.blocks:
            whole = type(block).forward.__get__(block)
            block.forward = functools.partial(checkpoint, whole, use_reentrant=False) if checkpointed else whole
        model.zero_grad()
        torch.manual_seed(2)  # dropout's, which the second computation has to draw again
        with trinix.use_backend(backend):
            loss = model.loss(tokens)
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert again == [4 * len(model.blocks)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


# every shape, every kind of cache; of latents there is one, whatever is asked for
@pytest.mark.parametrize(
    ("shape", "kind"), [("gpt", "static"), ("llama", "dynamic"), ("llama", "paged"), ("deepseek", "static")]
)
@torch.no_grad()
def test_a_prompt_and_steps_compile_whole_with_every_cache(shape, kind, fresh_dynamo):
    model, tokens = made(shape, layers=2 if shape == "gpt" else 1), tokens_of("cpu", 2, 7)
    caches, compiled = model.caches(2, 8, kind), torch.compile(model, fullgraph=True, backend="eager")
    got = torch.cat([compiled(part, caches) for part in tokens.split((4, 1, 2), 1)], 1)
    torch.testing.assert_close(got, model(tokens), atol=1e-4, rtol=1e-4)
    assert caches[0].longest == 7
    assert caches[-1].lengths.tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_caches_of_a_model_are_cut_and_reordered_as_one(shape, kind, device):
    model, tokens = made(shape, device, layers=3), tokens_of(device, 3, 9)
    caches = model.caches(3, 9, kind)
    model(tokens[:, :5], caches)
    index, lengths = torch.tensor([1, 2, 0], device=device), torch.tensor([5, 3, 4], device=device)
    for cache in caches:
        cache.truncate(lengths)
    for cache in caches:
        cache.reorder(index)
    got = torch.cat([model(tokens[:, at : at + 1], caches) for at in (5, 6)], 1)
    for b, origin in enumerate(index.tolist()):
        alone = torch.cat((tokens[origin, : lengths[origin]], tokens[b, 5:7]))[None]
        torch.testing.assert_close(got[b], model(alone)[0, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_step_that_fails_midway_can_be_taken_again(shape, kind, broken, device):
    """Out of memory, or Ctrl-C: blocks in front have kept the token, those behind have not."""
    model, tokens = made(shape, device, layers=3), tokens_of(device, 2, 7)
    caches = model.caches(2, 7, kind)
    model(tokens[:, :5], caches)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.blocks[broken].register_forward_hook(fail)  # behind its own cache
    with pytest.raises(KeyboardInterrupt):
        model(tokens[:, 5:6], caches)
    hook.remove()
    got = torch.cat([model(tokens[:, at : at + 1], caches) for at in (5, 6)], 1)
    torch.testing.assert_close(got, model(tokens)[:, -2:], atol=1e-4, rtol=1e-4)
    assert [cache.longest for cache in caches] == [7] * 3


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_prompt_that_fails_says_why_and_can_be_given_again(shape, kind):
    model, tokens = made(shape, layers=3), tokens_of("cpu", 2, 5)
    caches = model.caches(2, 5, kind)

    def fail(*_):
        raise MemoryError

    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(tokens, caches)
    hook.remove()
    torch.testing.assert_close(model(tokens, caches), model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "what", [("reorder", "truncate"), ("rewind", "truncate"), ("truncate", "reorder"), ("rewind", "reorder")]
)
@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_models_caches_may_be_changed_one_by_one(shape, kind, what, device):
    model, tokens = made(shape, device, layers=3), tokens_of(device, 2, 9)
    arguments = {
        "reorder": torch.tensor([1, 0], device=device),
        "truncate": torch.tensor([4, 5], device=device),
        "rewind": 1,
    }
    seen = {
        "reorder": lambda rows: rows[::-1],
        "truncate": lambda rows: [row[:n] for row, n in zip(rows, (4, 5), strict=True)],
        "rewind": lambda rows: [row[:-1] for row in rows],
    }
    caches = model.caches(2, 9, kind)
    model(tokens[:, :6], caches)
    for cache in caches:
        cache.truncate(torch.tensor([6, 4], device=device))
    rows = [tokens[0, :6], tokens[1, :4]]
    for cache in caches:
        for one in what:
            getattr(cache, one)(arguments[one])
    for one in what:
        rows = seen[one](rows)
    got = model(tokens[:, 6:7], caches)
    for b, row in enumerate(rows):
        alone = torch.cat((row, tokens[b, 6:7]))[None]
        torch.testing.assert_close(got[b], model(alone)[0, -1:], atol=1e-4, rtol=1e-4)


def test_a_causal_model_does_not_look_ahead():
    model, tokens = made("llama", sliding_window_size=4), tokens_of("cpu", 1, 9)
    other = tokens.clone()
    other[:, 6:] += 1
    a, b = model(tokens), model(other % 256)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=0)
    assert not torch.equal(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_learns_and_generates_under_autocast(shape, device):
    model, tokens = made(shape, device), tokens_of(device, 2, 12)
    with torch.autocast(device, torch.bfloat16):
        loss = model.loss(tokens)
        loss.backward()
        for kind in ("static", "dynamic", "paged"):
            assert model.generate(tokens, 3, kind=kind).shape == (2, 15)
    torch.testing.assert_close(loss, model.loss(tokens), atol=0.05, rtol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, S\] with a token at least, got \[1, 0\]; begin with one"
    ):
        made("llama").generate(torch.zeros(1, 0, dtype=torch.int64), 2)


def test_tokens_and_caches_that_do_not_fit_are_named():
    model, tokens = made("llama"), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens must be a tensor \[B, S\], got list"):
        model.generate([[1, 2]], 2)
    for shape in ("gpt", "llama"):
        with pytest.raises(ValueError, match=r"Decoder: tokens must be a tensor \[B, S\], got \[3\]"):
            made(shape)(tokens[0])
    with pytest.raises(ValueError, match=r"caches must be one a block, 2, got 1; self\.caches makes them"):
        model(tokens, model.caches(1, 8)[:1])
    with pytest.raises(ValueError, match="Decoder: page_size must be an int from 1 on, got 0"):
        model.caches(1, 8, "paged", 0)
    with pytest.raises(ValueError, match="text must have more than length = 64 bytes, got 3"):
        models.train(model, "abc", 1)
    torch.testing.assert_close(model.loss(tokens.int()), model.loss(tokens))
    for wrong in (tokens + 256, tokens - 1):
        for call in (model, model.loss, lambda t: model.generate(t, 1)):
            with pytest.raises(
                ValueError, match=r"Decoder: tokens must be from 0 to 255, the vocabulary, got some from"
            ):
                call(wrong)
    with pytest.raises(ValueError, match="got some from 0 to 256"):  # which is only a target
        model.loss(torch.tensor([[0, 256]]))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"Decoder: tokens must be int64 or int32, got {dtype}; convert them"):
            model(tokens.to(dtype))
    with pytest.raises(ValueError, match=r"tokens of a loss must be \[B, S\] with S from 2 on, got \[1, 1\]"):
        model.loss(tokens[:, :1])


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_caches_of_another_batch_are_refused_before_they_are_read(shape, kind):
    model, tokens = made(shape), torch.zeros(2, 3, dtype=torch.int64)
    for batch in (1, 3):
        caches = model.caches(batch, 8, kind)
        model(torch.zeros(batch, 3, dtype=torch.int64), caches)
        with pytest.raises(ValueError, match=f"Cache: made for a batch of {batch}, got 2; make one of that size"):
            model(tokens, caches)
        assert [cache.longest for cache in caches] == [3, 3]
    for wrong, got in (([None, None], r"\['NoneType', 'NoneType'\]"), (3, "int"), (caches[0], r"\w+Cache")):
        with pytest.raises(TypeError, match=rf"^Decoder: caches must be a list of caches, got {got}; self\.caches"):
            model(tokens, wrong)


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_caches_that_count_for_other_blocks_are_refused(shape, kind):
    model, tokens = made(shape), torch.zeros(1, 3, dtype=torch.int64)
    caches, more = (made(shape, layers=layers).caches(1, 8, kind) for layers in (2, 3))
    wrong = [caches[:1] * 2, caches[1:] * 2]
    if kind != "dynamic":  # whose caches count for themselves
        wrong += [caches[::-1], more[:2], [caches[0], more[2]]]
    for given in wrong:
        with pytest.raises(
            ValueError, match=r"^Decoder: caches must be one for every block, .* give all that one call"
        ):
            model(tokens, given)
    model(tokens, caches)
    assert [cache.longest for cache in caches] == [3, 3]


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged", None])
def test_nothing_is_generated_for_nobody(kind):
    nobody = torch.zeros(0, 3, dtype=torch.int64)
    assert made("llama").generate(nobody, 2, kind=kind).shape == (0, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_are_where_the_model_is_whatever_the_default_device(shape):
    tokens, index = tokens_of("cpu", 2, 5), torch.tensor([1, 0])

    def everything(model):
        results = models.train(model, models.tiny_text(), 2, length=16)
        results += [model.generate(tokens, 3, kind=kind) for kind in ("static", "dynamic", "paged", None)]
        results += [model.generate(tokens, 3, eos_token_id=7)]
        for kind in ("static", "dynamic", "paged"):
            caches = model.caches(2, 9, kind)
            with torch.no_grad():
                model(tokens, caches)
                for cache in caches:
                    cache.truncate(4)
                    cache.reorder(index)
                results.append(model(tokens[:, :1], caches))
        return results

    here, there = made(shape), made(shape)
    wanted = everything(here)
    with torch.device("meta"):
        got = everything(there)
    torch.testing.assert_close(got, wanted)


def test_a_model_is_made_of_a_config():
    with pytest.raises(TypeError, match="Decoder: config must be a Config, got dict; gpt"):
        models.Decoder({})


def test_what_nothing_can_be_learned_from_is_refused():
    model, text = made("llama"), models.tiny_text()
    with pytest.raises(TypeError, match="train: text must be a str, got NoneType; tiny_text"):
        models.train(model, None, 1)
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(ValueError, match=f"train: steps must be an int from 0 on, got {wrong!r}"):
            models.train(model, text, wrong)
        for name in ("batch", "length"):
            with pytest.raises(ValueError, match=f"train: {name} must be an int from 1 on, got {wrong!r}"):
                models.train(model, text, 1, **{name: wrong})
    with pytest.raises(ValueError, match="train: batch must be an int from 1 on, got 0"):
        models.train(model, text, 1, batch=0)


def test_a_config_says_true_or_false():
    for name in ("gated", "learned_positions", "tied"):
        with pytest.raises(TypeError, match=f"Config: {name} must be True or False, got 'no'; convert it with bool"):
            models.Config(**{name: "no"})


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unknown_cache_is_refused(shape):
    with pytest.raises(ValueError, match="kind must be 'static', 'dynamic' or 'paged', got 'lazy'"):
        made(shape).caches(1, 8, "lazy")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_without_memory_has_caches_without_memory(shape):
    assert all(cache.lengths.is_meta for cache in made(shape, "meta").caches(1, 8))


def test_what_generation_cannot_do_is_refused():
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    for kind in ("dynamic", None):
        with pytest.raises(ValueError, match="graph=True needs kind 'static' or 'paged'"):
            made("llama").generate(tokens, 2, kind=kind, graph=True)
    with pytest.raises(ValueError, match="graph=True needs a model and tokens on a CUDA GPU, got cpu; leave it out"):
        made("llama").generate(tokens, 2, graph=True)
    for steps in (-1, 2.0, None):
        with pytest.raises(ValueError, match="Decoder: steps must be an int from 0 on, got"):
            made("llama").generate(tokens, steps)
    with pytest.raises(TypeError, match="Decoder: last must be True or False, got 'no'; convert it with bool"):
        made("llama")(tokens, last="no")
    with pytest.raises(TypeError, match="Decoder: graph must be True or False, got 'no'; convert it with bool"):
        made("llama").generate(tokens, 2, graph="no")
    for kind in ("static", None):
        model = made("llama", dropout=0.1)
        with pytest.raises(ValueError, match=r"Decoder: generate knows no dropout; call eval\(\) first"):
            model.generate(tokens, 2, kind=kind)
        assert model.eval().generate(tokens, 2, kind=kind).shape == (1, 5)
    model = models.Decoder(models.gpt(length=4, layers=1))
    for kind in ("static", "dynamic", None):
        with pytest.raises(ValueError, match="5 tokens exceed the table of 4 learned positions"):
            model.generate(tokens, 3, kind=kind)


def test_what_a_config_says_reaches_its_blocks():
    model = made("llama", rope_base=500.0, dropout=0.25, head_dim=16, length=24)
    for block in model.blocks:
        layer = block.attention
        assert (layer.head_dim, layer.position.base, layer.position.max_position_embeddings) == (16, 500.0, 24)
        assert layer.dropout == block.attention_norm.dropout == block.feed_forward_norm.dropout == 0.25
        assert layer.o_proj.bias is None
    for q_latent_dim in (0, 8):
        (layer,) = {block.attention for block in made("deepseek", layers=1, q_latent_dim=q_latent_dim).blocks}
        assert (layer.latent_dim, layer.q_latent_dim, layer.rope_head_dim) == (32, q_latent_dim, 16)
        assert layer.o_proj.bias is None
    assert all(block.attention.o_proj.bias is not None for block in made("gpt").blocks)


def test_dropout_takes_of_all_that_is_added_to_the_stream():
    """The embeddings, every attention and every feed-forward block, the last one's too."""
    model, shares = made("gpt", dropout=0.5), []

    def note(_, given, results):
        (x, h), (_, after) = given, results
        shares.append(float((after == h)[x != 0].float().mean()))

    for module in model.modules():
        if isinstance(module, trinix.FastFusedResidualLayerNorm):
            module.register_forward_hook(note)
    model(tokens_of("cpu", 4, 32))
    assert len(shares) == 2 * len(model.blocks) + 1
    assert all(0.4 < share < 0.6 for share in shares), shares


def test_a_table_of_learned_positions_may_be_used_to_its_end():
    model, tokens = made("gpt", length=4, layers=1), tokens_of("cpu", 1, 3)
    assert model(tokens_of("cpu", 1, 4)).shape == (1, 4, 256)
    assert model.generate(tokens, 2).shape == (1, 5)  # the last one is guessed, and has no position yet


def test_the_loss_of_half_types_is_taken_in_float32():
    model, tokens = made("llama").bfloat16(), tokens_of("cpu", 2, 9)
    loss = model.loss(tokens)
    assert loss.dtype == torch.float32
    logits = model(tokens[:, :-1])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.mT.float(), tokens[:, 1:]))


@pytest.mark.parametrize("name", ["vocabulary", "dim", "layers", "heads", "kv_heads", "hidden", "length"])
def test_sizes_of_no_model_are_refused(name):
    for wrong in (0, -1, 2.0, True, [2]):
        with pytest.raises(ValueError, match=f"Config: {name} must be an int from 1 on, got"):
            models.llama(**{name: wrong})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_that_was_made_without_memory_begins_as_a_new_one_does(shape):
    wanted, model = made(shape), made(shape, "meta").to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    torch.manual_seed(1)
    model.reset_parameters()
    assert (model.output.weight is model.embedding.weight) == model.config.tied
    for (name, new), old in zip(model.named_parameters(), wanted.parameters(), strict=True):
        new, old = new.detach(), old.detach()
        torch.testing.assert_close(
            new.mean(), old.mean(), atol=4 * float(old.std()) / old.numel() ** 0.5, rtol=0, msg=name
        )
        torch.testing.assert_close(new.std(), old.std(), atol=0, rtol=4 / (2 * old.numel()) ** 0.5, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(wanted.named_buffers()))


def test_the_embedding_may_be_the_output():
    model = made("gpt")
    assert model.output.weight is model.embedding.weight
    assert "output.weight" in model.state_dict()
    for assign in (False, True):
        with torch.device("meta"):
            other = models.Decoder(model.config)
        other = other if assign else other.to_empty(device="cpu")
        other.load_state_dict(copy.deepcopy(model).state_dict(), assign=assign)
        for one in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other)), copy.deepcopy(other).bfloat16()):
            assert one.output.weight is one.embedding.weight
    assert trinix.models.Decoder is models.Decoder


class Wrapped(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize(
    "output", [lambda _: torch.nn.Linear(32, 10, bias=False), lambda _: torch.nn.Identity(), Wrapped]
)
@pytest.mark.parametrize("move", ["to", "load", "assign", "to_empty"])
def test_what_was_put_in_the_outputs_place_stays_there(output, move):
    model, tokens = made("gpt"), tokens_of("cpu", 1, 5)
    model.output = output(model.output)
    wanted, state = model(tokens), copy.deepcopy(model.state_dict())
    tied = getattr(model.output, "base", None)
    if move == "to":
        model = model.double().float()
    elif move == "to_empty":
        model = model.to("meta").to_empty(device="cpu")
    if move != "to":
        model.load_state_dict(state, assign=move == "assign")
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(tokens), wanted)
    assert tied is None or tied.weight is model.embedding.weight


@pytest.mark.parametrize("which", ["embedding", "output"])
def test_a_tied_model_may_have_its_weights_made_of_others(which):
    model, tokens = made("gpt"), tokens_of("cpu", 1, 5)
    torch.nn.utils.parametrizations.weight_norm(getattr(model, which))
    wanted = model(tokens)
    model.to(torch.float64).half().float()
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), wanted, atol=0.02, rtol=0.02)
