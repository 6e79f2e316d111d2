"""ALiBi: slopes against the paper's numbers, the bias against float64 on every shape and alignment, trainable slopes, and how the
op behaves as a citizen of PyTorch. Backend "triton" runs in Triton's interpreter on the CPU; ``gpu`` tests run it on the card."""

import copy
import importlib
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trinix
from helpers import Watch
from trinix.kernels.triton import _launch
from trinix.kernels.triton import alibi as kernels
from trinix.ops import alibi_bias, alibi_slopes
from trinix.testing import judge, normal

op = importlib.import_module("trinix.ops.alibi")

HALF = (torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 1),
    (3, 5, 5),
    (2, 7, 12),
    (2, 4, 3),
    (3, 1, 40),
    (2, 5, 1),
    (1, 3, 2050),
    (5, 66, 8),
    (0, 3, 4),
    (2, 0, 4),
    (2, 3, 0),
]


def positive(heads, dtype, device):
    return normal((heads,), dtype, seed=heads, device=device).abs()


def by_hand(slopes, seq_q, seq_k, causal):
    rows = []
    for slope in slopes.tolist():
        for i in range(seq_q):
            at = i + seq_k - seq_q
            rows.append([-math.inf if causal and j > at else -slope * abs(at - j) for j in range(seq_k)])
    return torch.tensor(rows, dtype=torch.float64).view(slopes.shape[0], seq_q, seq_k)


def oracle(slopes, seq_q, seq_k, causal, dtype, backend="triton"):
    """THE test: the bias within the budget of PyTorch's in the same dtype against the formula in plain Python."""
    got, low = (alibi_bias(slopes, seq_q, seq_k, causal=causal, dtype=dtype, backend=b) for b in (backend, "torch"))
    verdict = judge("bias", got, low, by_hand(slopes, seq_q, seq_k, causal).to(slopes.device))
    assert verdict.ok, verdict
    assert got.is_contiguous()
    return got


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# ---- slopes ------------------------------------------------------------------------------------------------------------


def test_slopes_are_the_papers():
    same(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    assert alibi_slopes(16)[:2].tolist() == pytest.approx([2**-0.5, 2**-1])
    assert alibi_slopes(1).tolist() == [2**-8]
    eight, sixteen = alibi_slopes(8), alibi_slopes(16)
    for heads in range(9, 16):
        same(alibi_slopes(heads), torch.cat([eight, sixteen[::2][: heads - 8]]))
    for heads in (40, 112):
        assert alibi_slopes(heads).unique().numel() == heads
        assert alibi_slopes(heads).dtype == torch.float32


@pytest.mark.parametrize("heads", [0, -1, 2.0, None])
def test_a_number_of_heads_that_is_none_is_refused(heads):
    with pytest.raises(ValueError, match=rf"num_heads must be an int from 1 on, got {heads}"):
        alibi_slopes(heads)


# ---- right numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_bias_is_right_in_every_shape(dtype, causal, shape, device):
    oracle(positive(shape[0], torch.float32, device), *shape[1:], causal, dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_float64_goes_through_the_formula(causal):
    slopes = positive(3, torch.float64, "cpu")
    same(alibi_bias(slopes, 4, 6, causal=causal, dtype=torch.float64), by_hand(slopes, 4, 6, causal))


def test_slopes_of_any_dtype_and_stride_are_read(device):
    for slopes in (
        positive(3, torch.bfloat16, device),
        positive(6, torch.float32, device)[::2],
        torch.ones(1, device=device).expand(3),
    ):
        oracle(slopes, 3, 5, False, torch.float32)
    oracle(-positive(2, torch.float16, device), 3, 5, True, torch.float16)


def test_a_missing_seq_k_is_seq_q_and_the_last_query_stands_at_the_last_key(device):
    slopes = alibi_slopes(2, device)
    whole = alibi_bias(slopes, 6, backend="triton")
    same(whole, alibi_bias(slopes, 6, 6, backend="torch"))
    same(alibi_bias(slopes, 2, 6, backend="triton"), whole[:, 4:])
    assert (whole.diagonal(dim1=1, dim2=2) == 0).all()


def test_distances_beyond_half_types_are_rounded_once(device):
    slopes = torch.tensor([0.5, 1.0], device=device)
    for dtype in HALF:
        oracle(slopes, 1, 5000, False, dtype)


def test_nan_and_infinite_slopes_are_pytorchs(device):
    slopes = torch.tensor([math.nan, math.inf], device=device)
    ours, theirs = (alibi_bias(slopes, 2, 3, causal=True, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("lanes", [32, 64])
def test_tiles_fit(lanes):
    for rows in (1, 5, 4096 * 64):
        for cols in (1, 3, 200, 2048, 100_000):
            for itemsize in (2, 4):
                tile = kernels.choose_tile(rows, cols, itemsize, lanes)
                assert tile.cols < 2 * cols
                assert tile.rows < 2 * rows
                assert tile.rows * tile.cols * itemsize <= 4 * 4 * lanes * 16


def test_rows_of_whole_vectors_are_written_16_bytes_at_once(forked_process):
    code = f"""
    from trinix.lab import aot
    reports = [aot.compile_one(case, "sm_90") for case in aot.load_cases(["{kernels.__name__}"], "sm_90").values()]
    print([one.store_bits for one in reports if one.ok])
    """
    assert forked_process(code) == str([128] * 12)


# ---- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gradient", ["dense", "stride 0", "transposed"])
def test_trainable_slopes_get_their_gradient(gradient, causal, device):
    dy = {
        "dense": lambda: normal((3, 4, 6), torch.float32, seed=1, device=device),
        "stride 0": lambda: torch.ones((), device=device).expand(3, 4, 6),
        "transposed": lambda: normal((6, 4, 3), torch.float32, seed=1, device=device).permute(2, 1, 0),
    }[gradient]()
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "torch"), (torch.float64, "torch")):
        slopes = alibi_slopes(3, device).to(dtype).requires_grad_()
        y = alibi_bias(slopes, 4, 6, causal=causal, dtype=dtype, backend=backend)
        found.append(torch.autograd.grad(y, slopes, dy.to(dtype))[0])
    verdict = judge("dslopes", *found)
    assert verdict.ok, verdict


def test_the_gradient_has_the_slopes_dtype_and_a_half_bias_gives_it_too(device):
    slopes = alibi_slopes(2, device).bfloat16().requires_grad_()
    y = alibi_bias(slopes, 3, dtype=torch.float16, backend="triton")
    assert type(y.grad_fn).__name__ == "_AlibiBiasBackward"
    assert y.grad_fn.saved_tensors == ()
    (dslopes,) = torch.autograd.grad(y.sum(), slopes)
    assert dslopes.tolist() == [-8.0, -8.0]
    assert dslopes.dtype == torch.bfloat16


def test_the_second_derivative_is_that_of_a_linear_function(device):
    slopes = alibi_slopes(2, device).requires_grad_()
    dy = torch.ones(2, 3, 3, device=device, requires_grad=True)
    found = []
    for backend in ("triton", "torch"):
        (first,) = torch.autograd.grad(alibi_bias(slopes, 3, backend=backend), slopes, dy, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), dy)[0])
    torch.testing.assert_close(*found)


# ---- errors, choice, explanation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([0.5], 3), {}, TypeError, r"slopes must be a floating-point tensor, got list; alibi_slopes\(num_heads\)"),
        ((torch.ones(2, dtype=torch.int64), 3), {}, TypeError, "got torch.int64"),
        ((torch.ones(1, 2), 3), {}, ValueError, r"slopes must be \[H\], got \[1, 2\]; flatten"),
        ((torch.ones(2), -1), {}, ValueError, "seq_q must be an int from 0 on, got -1"),
        ((torch.ones(2), 3), {"causal": "no"}, TypeError, "alibi_bias: causal must be True or False, got 'no'"),
        ((torch.ones(2), 3, 2.5), {}, ValueError, "seq_k must be an int from 0 on, got 2.5"),
        (
            (torch.ones(2), 3),
            {"dtype": torch.int32},
            TypeError,
            "dtype must be a floating-point dtype, got torch.int32",
        ),
        ((torch.ones(2), 3), {"backend": "tritn"}, ValueError, r"\['auto', 'triton', 'torch'\], got 'tritn'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_cure(arguments, options, error, text):
    for call in (alibi_bias, lambda *a, **o: trinix.explain("alibi_bias", *a, **o)):
        with pytest.raises(error, match=text):
            call(*arguments, **options)


def test_a_named_triton_says_why_it_cannot_run(device):
    slopes = torch.ones(2, device=device)
    with pytest.raises(trinix.Unsupported, match=r"needs dtype float16, bfloat16 or float32, got float64.*auto"):
        alibi_bias(slopes, 3, dtype=torch.float64, backend="triton")
    with pytest.raises(trinix.Unsupported, match="needs slopes of float16, bfloat16 or float32, got float64"):
        alibi_bias(slopes.double(), 3, backend="triton")
    with pytest.raises(trinix.Unsupported, match="needs slopes on a GPU, got meta"):
        alibi_bias(slopes, 3, device="meta", backend="triton")
    assert alibi_bias(slopes, 3, device="meta").is_meta


def test_explain_says_backend_reason_and_configuration(device):
    slopes = torch.ones(2, device=device)
    assert str(trinix.explain("alibi_bias", slopes.cpu(), 3)) == (
        "alibi_bias -> torch: the first backend that is right and fastest here\n"
        "  not triton: needs slopes on a GPU, got cpu"
    )
    assert str(trinix.explain(alibi_bias, slopes, 300, backend="triton")) == (
        "alibi_bias -> triton: named by the caller\n  config: tile 4 x 512, 4 warps"
    )
    assert trinix.explain("alibi_bias", slopes, 300, backend="torch").backend == "torch"
    with trinix.use_backend("triton"):
        assert trinix.explain("alibi_bias", slopes, 300).backend == "triton"


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_takes_it_whole(backend, dynamic, device):
    targets = []

    def recording(graph, example_inputs):
        graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets.extend(str(node.target) for one in graphs for node in one.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    function = lambda slopes, n: alibi_bias(slopes * 2, n, n + 3, causal=True, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=recording, dynamic=dynamic)
    for n in (4, 6):
        slopes = alibi_slopes(3, device).requires_grad_()
        ours, theirs = (f(slopes, n) for f in (compiled, function))
        same(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(y[..., :4].sum(), slopes) for y in (ours, theirs)))
    assert ("trinix.alibi_bias.default" in targets) == (backend == "triton")


def test_the_registered_op_passes_opcheck(device):
    call = (alibi_slopes(3, device), 4, 6, True, torch.bfloat16)
    torch.library.opcheck(torch.ops.trinix.alibi_bias.default, call)


def test_a_dispatch_mode_sees_one_op(device):
    slopes = alibi_slopes(3, device).requires_grad_()
    with Watch() as watch:
        y = alibi_bias(slopes, 4, backend="triton")
    assert [name for name in watch.seen if "trinix" in name] == ["trinix.alibi_bias.default"]
    same(y, alibi_bias(slopes, 4, backend="torch"))
    assert y.grad_fn is not None


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_pass_and_no_kernel_runs(backend, device, monkeypatch):
    monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: pytest.fail("a kernel ran on a fake tensor"))
    with FakeTensorMode():
        y = alibi_bias(torch.ones(3, device=device), 4, 5, dtype=torch.float16, backend=backend)
    assert (y.shape, y.dtype) == ((3, 4, 5), torch.float16)


def test_forward_mode_gives_the_tangent_or_an_error(device):
    slopes, tangent = alibi_slopes(2, device), torch.ones(2, device=device)
    for backend in ("auto", "triton"):
        try:
            got = torch.func.jvp(lambda s, b=backend: alibi_bias(s, 3, backend=b), (slopes,), (tangent,))[1]
        except RuntimeError:
            continue
        same(got, alibi_bias(tangent, 3, backend="torch"))


# ---- the module --------------------------------------------------------------------------------------------------------


def test_a_module_with_wrong_arguments_is_refused_by_its_name():
    for wrong in (0, -1, 3.0, True, [3]):
        with pytest.raises(ValueError, match="FastALiBiPositionEmbedding: num_heads must be an int from 1 on, got"):
            trinix.FastALiBiPositionEmbedding(wrong)
    for wrong in (-2, "2"):
        with pytest.raises(
            ValueError, match=f"FastALiBiPositionEmbedding: batch_size must be an int from 0 on, got {wrong!r}"
        ):
            trinix.FastALiBiPositionEmbedding(3)(5, wrong)
    for argument in ("causal", "trainable"):
        with pytest.raises(TypeError, match=f"FastALiBiPositionEmbedding: {argument} must be True or False, got 'no'"):
            trinix.FastALiBiPositionEmbedding(3, **{argument: "no"})
    with pytest.raises(TypeError, match="FastALiBiPositionEmbedding: use_triton must be None, True or False, got 'no'"):
        trinix.FastALiBiPositionEmbedding(3, use_triton="no")


@pytest.mark.parametrize("use_triton", [None, False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_module_gives_the_bias_of_a_batch_and_survives_copying(trainable, use_triton, device):
    module = trinix.FastALiBiPositionEmbedding(3, 64, use_triton, causal=True, trainable=trainable).to(device)
    wanted = alibi_bias(alibi_slopes(3, device), 4, 6, causal=True, backend="torch")
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        bias = one(4, 2, 6)
        assert bias.shape == (2, 3, 4, 6)
        assert bias.stride(0) == 0
        same(bias[1], wanted)
        assert list(one.state_dict()) == (["slopes"] if trainable else [])
        assert bias.requires_grad == trainable
    assert module(5, dtype=torch.bfloat16).dtype == torch.bfloat16
    if trainable:
        module(4)[..., :2].sum().backward()
        assert module.slopes.grad.isfinite().all()
    shown = f"FastALiBiPositionEmbedding(3, causal=True, max_seq_len=64{'' if use_triton is None else f', use_triton={use_triton}'}"
    assert repr(module) == shown + (", trainable=True)" if trainable else ")")


def test_constant_slopes_stay_float32_and_trainable_ones_follow_the_model(device):
    constant, trainable = (trinix.FastALiBiPositionEmbedding(3, trainable=t).to(device).half() for t in (False, True))
    same(constant.slopes, alibi_slopes(3, device))
    assert trainable.slopes.dtype == torch.float16
    with torch.device("meta"):
        lazy = trinix.FastALiBiPositionEmbedding(3)
    same(lazy.to_empty(device=device).slopes, alibi_slopes(3, device))


# ---- the tests can fail ------------------------------------------------------------------------------------------------


def test_a_program_that_does_not_run_fails_the_oracle(monkeypatch):
    run = _launch.Launch.__call__
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, blocks, *rest: run(self, blocks - 1, *rest))
    with pytest.raises(AssertionError, match="error=nan"):
        oracle(alibi_slopes(2), 3, 2050, False, torch.float32)


# ---- on the card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(5, 1000, 1000), (3, 517, 2051), (2, 1, 70_000), (32, 256, 4096)])
def test_on_the_card_large_biases_are_right(shape, causal):
    slopes = alibi_slopes(shape[0], "cuda")
    for dtype in (torch.float32, *HALF):
        for _ in range(2):  # Triton's own path, then the fast launch
            ours, theirs = (
                alibi_bias(slopes, *shape[1:], causal=causal, dtype=dtype, backend=b) for b in ("triton", "torch")
            )
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_are_right():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    slopes = alibi_slopes(9, "cuda")
    y = alibi_bias(slopes, 16384, dtype=torch.bfloat16, backend="triton")
    same(y[8, -3:], alibi_bias(slopes[8:], 3, 16384, dtype=torch.bfloat16, backend="torch")[0])
