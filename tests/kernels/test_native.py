"""Kept launches from C++: on the CPU, with a driver of our own in place of CUDA's."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import itertools
import struct
import subprocess
import sys
import sysconfig
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad

import gluon_on_cpu
from helpers import Watch, same
from trinix import ops
from trinix.kernels import _native
from trinix.ops.attention import Options

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from trinix.kernels import _binary, _noting
from trinix.kernels.hopper import attention as hopper
from trinix.kernels.triton import _launch, _record
from trinix.kernels.triton import activation as kernels
from trinix.kernels.triton import head_mlp as kernels_mlp

op_attention = importlib.import_module("trinix.ops.attention")
op_glu = importlib.import_module("trinix.ops.glu")
op = importlib.import_module("trinix.ops.activation")  # the module: ``trinix.ops.activation`` is the function

FAKE = r"""
#include <pthread.h>
#include <unistd.h>
struct attribute { int id, pad; long value[8]; };
struct config { unsigned grid[3], block[3], shared; void* stream; struct attribute* attributes; unsigned count; };
static __thread long current = 0;
int get_context(void** to) { *to = (void*)5; return 0; }
volatile int let_go = 1;
int launch(const struct config* c, void* f, void** p, void** extra);
int waiting_launch(const struct config* c, void* f, void** p, void** extra) {
  for (int i = 0; i < 20000 && !let_go; i++) usleep(500);
  return let_go ? launch(c, f, p, extra) : 6;
}
int get_none(void** to) { *to = 0; return 0; }
int get_other(void** to) { *to = (void*)6; return 0; }
int set_context(void* to) { current = (long)to; return 0; }
void lose_context() { current = 0; }
int move_map(long* map, long address) { *map = address; return address % 32 ? 4 : 0; }
int launch(const struct config* c, void* f, void** p, void** extra) {
  if (current != 5) return 201;
  if ((long)f == 6) {  // x and y, each as a map, its size and its stride; n; y = 3 x
    for (int i = 0; i < 2; i++)
      if ((long)p[3 * i] % 64 || ((char*)p[3 * i])[8] != 'x' + i || ((char*)p[3 * i])[127] != 9) return 3;
    float *x = *(float**)p[0], *y = *(float**)p[3];
    if (c->grid[0] != 3 || *(int*)p[4] != 64 || *(long*)p[5] != 1) return 1;
    for (long i = 0; i < *(int*)p[6]; i++) y[i] = 3 * x[i];
    return 0;
  }
  int early = (long)f == 5;
  if (c->count != early || (early && (c->attributes[0].id != 6 || (int)c->attributes[0].value[0] != 1))) return 2;
  if (early) f = (void*)1;
  long n = *(int*)p[3];
  if (c->grid[0] != 3 || c->grid[1] != 1 || c->block[0] != 128 || c->block[2] != 1 || c->shared != 16 || (long)c->stream != 7) return 1;
  if ((long)f == 1) {  // x, y, mask
    float *x = *(float**)p[0], *y = *(float**)p[1]; unsigned char* mask = *(unsigned char**)p[2];
    for (long i = 0; i < n; i++) {
      int live = x[i] > 0;
      y[i] = live ? x[i] : 0;
      mask[i / 8] = (i % 8 ? mask[i / 8] : 0) | live << i % 8;
    }
    return 0;
  }
  if ((long)f == 2) {  // mask, dy, dx
    unsigned char* mask = *(unsigned char**)p[0]; float *dy = *(float**)p[1], *dx = *(float**)p[2];
    for (long i = 0; i < n; i++) dx[i] = mask[i / 8] >> i % 8 & 1 ? dy[i] : 0;
    return 0;
  }
  int cols = 256;  // of a tile of the library's masks: 8 rows, a bit each
  if ((long)f == 3) {  // x, y, mask
    float *x = *(float**)p[0], *y = *(float**)p[1]; unsigned char* mask = *(unsigned char**)p[2];
    for (long i = 0; i < n; i++) {
      int live = x[i] > 0; long tile = i / (8 * cols), r = i / cols % 8, c = i % cols;
      y[i] = live ? x[i] : 0;
      mask[tile * cols + c] = (r ? mask[tile * cols + c] : 0) | live << r;
    }
    return 0;
  }
  if ((long)f == 4) {  // mask, dy, dx
    unsigned char* mask = *(unsigned char**)p[0]; float *dy = *(float**)p[1], *dx = *(float**)p[2];
    for (long i = 0; i < n; i++) dx[i] = mask[i / (8 * cols) * cols + i % cols] >> i / cols % 8 & 1 ? dy[i] : 0;
    return 0;
  }
  return 700;
}
"""


def set_driver(module, *functions) -> None:
    module.set_driver(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions))


@pytest.fixture(autouse=True, scope="module")
def switched_on():
    """conftest.py switches it off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRINIX_NATIVE")
        yield


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    reason = _native.missing()
    if reason:
        pytest.skip(f"C++ launches {reason}")
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRINIX_CACHE", str(folder))
        assert _native.describe() == "can be built"
        assert _native.build() == _native.library()
        assert [path.name for path in folder.iterdir()] == [_native.library().name]
        assert _native.describe() == "are built"
        module = _native._import(_native.library())
    (folder / "fake.c").write_text(FAKE)
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "fake.c", "-o", folder / "fake.so"], check=True)
    driver = ctypes.CDLL(str(folder / "fake.so"))
    set_driver(module, driver.launch, driver.get_context, driver.set_context, driver.move_map)
    module.library = driver  # as long as the module
    return module


N = 64
FLAT, MASK = ((N,), (1,), torch.float32), ((N // 8,), (1,), torch.uint8)


def relu_pair(native, functions=(1, 2), otherwise=None):
    def step(function):
        return function, (3, 1, 1), 128, 16, function == 5, (0, 1, 2, struct.pack("i", N))

    forward = (FLAT, MASK), (step(functions[0]),)
    backward = (FLAT,), (step(functions[1]),)
    return native.make_pair(torch.empty(1), forward, backward, (1,), (2,), (MASK, FLAT), (2,), otherwise)


@pytest.fixture
def relu(native):
    """relu of 64 numbers; how often its gradient went the other way."""
    others = []

    def otherwise(mask, dy):
        others.append(dy.stride())
        return (torch.where(((mask[:, None] >> torch.arange(8)) & 1).flatten().bool(), dy, 0.0),)

    pair = relu_pair(native, otherwise=otherwise)
    return lambda x: native.call(pair, 7, x), others


def test_both_passes_are_relus(relu):
    function, others = relu
    x, dy = torch.randn(N, requires_grad=True), torch.randn(N)
    y = function(x)
    assert y.requires_grad
    assert "Trinix" in y.grad_fn.name()
    same([y], [torch.relu(x)])
    for _ in range(2):
        same(torch.autograd.grad(y, x, dy, retain_graph=True), [dy * (x > 0)])
    assert not others
    z = function(2 * x).pow(2).sum()  # in the middle of a graph
    z.backward()
    same([x.grad], [8 * x * (x > 0)])


def test_a_tangent_of_a_gradient_goes_the_other_way(relu):
    function, others = relu
    x = torch.randn(N, requires_grad=True)
    y = function(x)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones(N), torch.full((N,), 3.0))
        (dx,) = torch.autograd.grad(y, x, dy)
        tangent = forward_ad.unpack_dual(dx).tangent
    assert len(others) == 1
    same([tangent], [3.0 * (x > 0)])


def test_nothing_is_recorded_without_need(relu):
    function, _ = relu
    x = torch.randn(N)
    assert not function(x).requires_grad
    with torch.no_grad():
        assert not function(x.requires_grad_()).requires_grad


def test_a_gradient_that_lies_otherwise_goes_the_other_way(relu):
    function, others = relu
    x = torch.randn(N, requires_grad=True)
    same(torch.autograd.grad(function(x).sum(), x), [(x > 0).float()])
    assert others == [(0,)]
    odd = torch.randn(N + 1)[1:]
    same(torch.autograd.grad(function(x), x, odd), [odd * (x > 0)])
    assert len(others) == 2


def test_gradients_that_are_more_than_memory_go_the_other_way(relu):
    function, others = relu
    x, dy = torch.randn(N, requires_grad=True), torch.randn(3, N)
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    same([dx], [dy * (x > 0)])
    assert len(others) == 1
    negative = torch.complex(torch.zeros(N), dy[0]).conj().imag  # lazily negated
    assert negative.is_neg()
    same(torch.autograd.grad(y, x, negative, retain_graph=True), [-dy[0] * (x > 0)])
    assert len(others) == 2
    with Watch() as watch:
        torch.autograd.grad(y, x, dy[1])
    assert len(others) == 3
    assert watch.seen


def test_a_second_derivative_goes_the_other_way(relu):
    function, others = relu
    x, dy = torch.randn(N, requires_grad=True), torch.randn(N, requires_grad=True)
    (dx,) = torch.autograd.grad(function(x), x, dy, create_graph=True)
    same(torch.autograd.grad(dx.sum(), dy), [(x > 0).float()])
    assert others == [(1,)]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_compiled_autograd_has_backward_in_its_graph(relu, backend):
    function, others = relu
    graphs = []

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend=backend) if backend else graph

    for count in (1, 2, 3):
        x = torch.randn(N, requires_grad=True)
        with compiled_autograd._enable(compiler):
            y = function(2 * x)
            y.pow(2).sum().backward()
        same([x.grad], [8 * x * (x > 0)])
        assert len(others) == count
    assert len(graphs) == 1
    with compiled_autograd._enable(compiler):
        same(torch.autograd.grad(function(x), x, torch.ones(N)), [(x > 0).float()])


def test_compiled_autograd_keeps_pairs_apart_and_unpacks_by_hooks(native):
    def otherwise(factor):
        return lambda mask, dy: (None if dy is None else factor * dy,)

    two, three = (relu_pair(native, otherwise=otherwise(factor)) for factor in (2.0, 3.0))
    with compiled_autograd._enable(lambda graph: graph):
        for pair, factor in ((two, 2), (three, 3), (two, 2)):
            x = torch.randn(N, requires_grad=True)
            native.call(pair, 7, x).sum().backward()
            same([x.grad], [torch.full((N,), float(factor))])
    seen = []

    def unpack(t):
        seen.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = native.call(three, 7, x)
    with compiled_autograd._enable(lambda graph: graph):
        same(torch.autograd.grad(y.sum(), x), [torch.full((N,), 3.0)])
    assert seen == [torch.uint8]


def test_launches_take_their_attribute_and_context_and_failures_raise(native):
    x = torch.randn(N, requires_grad=True)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        native.call(relu_pair(native, functions=(9, 2)), 7, x)
    same([native.call(relu_pair(native, functions=(5, 2)), 7, x)], [torch.relu(x)])  # may begin early
    native.library.lose_context()  # as on a thread of autograd's
    same([native.call(relu_pair(native), 7, x)], [torch.relu(x)])
    y = native.call(relu_pair(native, functions=(1, 9)), 7, x)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        torch.autograd.grad(y, x, torch.ones(N))

    def broken(mask, dy):
        raise ValueError("no")

    y = native.call(relu_pair(native, otherwise=broken), 7, x)
    with pytest.raises(ValueError, match=r"^no$"):
        torch.autograd.grad(y.sum(), x)


def map_of(letter):
    """As the fake driver wants it: eight bytes for the address, then the tensor's letter."""
    return bytes(8) + letter.encode() + bytes(118) + b"\x09"


def described(place, letter):
    return (place, map_of(letter)), struct.pack("i", N), struct.pack("q", 1)


@pytest.mark.parametrize("behind", [0, 64])
def test_a_map_goes_to_where_its_tensor_lies(native, behind):
    place = (0, behind) if behind else 0
    step = 6, (3, 1, 1), 128, 16, False, (*described(place, "x"), *described(1, "y"), struct.pack("i", N - behind // 4))
    pair = native.make_pair(torch.empty(1), ((FLAT,), (step,)), ((), ()), (1,), (), (), (), None)
    for _ in range(3):
        x = torch.randn(N)
        y = native.call(pair, 7, x)
        same([y[: N - behind // 4]], [3 * x[behind // 4 :]])


def test_what_cannot_be_described_raises(native):
    def call(letter, behind):
        step = 6, (3, 1, 1), 128, 16, False, (*described((0, behind), letter), *described(1, "y"), struct.pack("i", 1))
        native.call(
            native.make_pair(torch.empty(1), ((FLAT,), (step,)), ((), ()), (1,), (), (), (), None), 7, torch.ones(N)
        )

    with pytest.raises(RuntimeError, match="a tensor could not be described, CUDA error 4"):
        call("x", 16)
    with pytest.raises(RuntimeError, match="could not be launched, CUDA error 3"):  # y's map for x
        call("y", 0)
    with pytest.raises(RuntimeError, match="a map of another size"):
        native.make_pair(
            torch.empty(1), ((FLAT,), ((6, (3, 1, 1), 128, 16, False, ((0, b"x"),)),)), ((), ()), (1,), (), (), (), None
        )


def test_what_backward_reads_is_freed_with_the_graph(relu):
    function, _ = relu
    x = torch.randn(N, requires_grad=True)
    y = function(x)
    torch.autograd.grad(y, x, torch.ones(N))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, x, torch.ones(N))


def test_hooks_on_saved_tensors_see_what_backward_reads(relu):
    function, _ = relu
    x, dy, seen = torch.randn(N, requires_grad=True), torch.randn(N), []

    def pack(t):
        seen.append((t.dtype, t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
    same(torch.autograd.grad(y, x, dy), [dy * (x > 0)])
    assert seen == [(torch.uint8, (N // 8,))]


def test_an_error_of_a_hook_goes_on(relu):
    function, _ = relu

    def pack(t):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(torch.randn(N, requires_grad=True))


def test_it_is_computed_again_under_checkpointing(relu):
    function, _ = relu
    x, dy = torch.randn(N, requires_grad=True), torch.randn(N)
    y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    same(torch.autograd.grad(y, x, dy), [dy * (x > 0)])
    with torch.autograd.set_detect_anomaly(True):
        same(torch.autograd.grad(function(x), x, dy), [dy * (x > 0)])


def test_backward_may_read_the_input_and_the_result(native):
    """And then an input that was written to since is noticed."""

    def otherwise(x, y, dy):
        return (torch.where((x > 0) & (y > 0), dy, 0.0),)

    def step(function, *tensors):
        return function, (3, 1, 1), 128, 16, False, (*tensors, struct.pack("i", N))

    forward, backward = ((FLAT, MASK), (step(1, 0, 1, 2),)), ((FLAT,), (step(1, 0, 3, 1),))
    pair = native.make_pair(torch.empty(1), forward, backward, (1,), (0, 1), (FLAT, FLAT, FLAT), (3,), otherwise)
    x = torch.randn(N, requires_grad=True)
    y = native.call(pair, 7, x)
    same(torch.autograd.grad(y.sum(), x, retain_graph=True), [(x > 0).float()])
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_many_threads_go_back_at_once(relu):
    function, _ = relu
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x, dy = (torch.randn(N, generator=generator) for _ in range(2))
            x.requires_grad_()
            for gradient in (dy, dy[:1].expand(N)):
                (dx,) = torch.autograd.grad(function(x), x, gradient)
                if not torch.equal(dx, gradient * (x > 0)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_many_threads_go_back_through_one_graph(relu):
    function, _ = relu
    x, dy = torch.randn(N, requires_grad=True), torch.randn(N)
    y, got = function(x), []

    def work():
        got.extend(torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(got) == 200
    assert all(torch.equal(dx, dy * (x > 0)) for dx in got)


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRINIX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"C\+\+ launches need a C\+\+ compiler"):
        _native.build()
    monkeypatch.delenv("CXX")
    if _native.missing():
        pytest.skip("no compiler")
    broken = tmp_path / "native.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(_native, "SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"failed:\n.*error"):
        _native.build()
    assert [path.name for path in tmp_path.iterdir()] == ["native.cpp"]


def with_a_card(monkeypatch, there=True):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


def no_home():
    raise RuntimeError("Could not determine home directory.")


def of_another_user(path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [("home", no_home, "Could not determine home"), ("exists", of_another_user, "Permission denied")],
)
def test_without_a_home_of_its_own_calls_go_on_without_it(name, fault, said, monkeypatch):
    for variable in ("TRINIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with_a_card(monkeypatch)
    monkeypatch.setattr(threading, "Thread", None)
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "_asked", False)
    monkeypatch.setattr(_native.pathlib.Path, name, fault)
    assert _native.loaded() is None
    assert _native._asked
    assert said in _native.describe()
    with pytest.raises(
        RuntimeError, match=rf"C\+\+ launches have no folder to be kept in \(.*{said}.*TRINIX_CACHE names one"
    ):
        _native.build()


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_made_is_a_reason_and_no_traceback(place, tmp_path, monkeypatch):
    if _native.missing():
        pytest.skip("no compiler")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("TRINIX_CACHE", str(tmp_path / place))
    with pytest.raises(RuntimeError, match="have no folder to be kept in"):
        _native.build()
    words = [sys.executable, "-m", "trinix.kernels._native"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_native._environment())
    assert done.returncode == 1
    assert done.stderr.startswith("C++ launches have no folder")
    assert len(done.stderr.splitlines()) == 1


def test_without_a_card_it_is_neither_built_nor_loaded(native, tmp_path, monkeypatch):
    """Though PyTorch is built for CUDA: its driver is not there."""
    monkeypatch.setenv("TRINIX_CACHE", str(tmp_path))
    monkeypatch.setattr(threading, "Thread", None)
    monkeypatch.setattr(_native, "module", None)

    no_driver, no_library = OSError("libcuda.so.1: cannot open shared object file"), ImportError("GLIBC_2.99 not found")
    for there, built, fault in (
        (False, False, None),
        (False, True, None),
        (True, True, no_driver),
        (True, True, no_library),
    ):

        def load(fault=fault):
            raise fault

        monkeypatch.setattr(_native, "_load", load)
        with_a_card(monkeypatch, there)
        monkeypatch.setattr(_native, "_asked", False)
        if built:
            _native.library().write_bytes(b"")
        assert _native.loaded() is None
        assert _native._asked


def test_who_only_asks_does_not_build(native, tmp_path, monkeypatch):
    monkeypatch.setenv("TRINIX_CACHE", str(tmp_path))
    with_a_card(monkeypatch)
    monkeypatch.setattr(threading, "Thread", None)
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "_asked", False)
    monkeypatch.setattr(_native, "_load", lambda: native)
    assert _native.loaded(build=False) is None
    _native.library().write_bytes(b"")
    assert _native.loaded(build=False) is native


def test_switched_off_it_is_not_loaded(native, tmp_path, monkeypatch):
    monkeypatch.setenv("TRINIX_NATIVE", "0")
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "_asked", False)
    with_a_card(monkeypatch)
    assert "switched off" in _native.missing()
    assert _native.loaded() is None


def test_the_first_process_that_needs_it_builds_it_and_no_other(native, tmp_path, monkeypatch):
    commands, asked_all = [], threading.Event()
    monkeypatch.setenv("TRINIX_CACHE", str(tmp_path))

    class Process:
        def __init__(self, command, **options):
            commands.append((command, options["start_new_session"]))

        def wait(self):
            asked_all.wait()
            _native.library().write_bytes(b"")
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    with_a_card(monkeypatch)
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "_load", lambda: native)
    for asked in range(3):
        if asked == 1:  # as in another process, while the first one's is built
            _native.library().unlink()
        monkeypatch.setattr(_native, "module", None)
        monkeypatch.setattr(_native, "_asked", False)
        got = _native.loaded()
        asked_all.set()
        [t.join() for t in threading.enumerate() if t.name == "trinix-native"]
        if asked == 0:
            assert got is None
            assert _native.loaded() is native
        if asked == 1:
            assert got is None
            assert _native.loaded() is None
            _native.library().write_bytes(b"")
        if asked == 2:
            assert got is native
    assert [(command[1:], own) for command, own in commands] == [(["-m", "trinix.kernels._native"], True)]


# ---- an op's calls -----------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(native, monkeypatch):
    """Calls of ops go by plans, after two."""
    if not _launch.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(_launch, "_raw_stream", lambda index: 7)
    monkeypatch.setattr(_native, "module", native)
    for name in PLANNED:
        monkeypatch.setattr(importlib.import_module(f"trinix.ops.{name}"), "_plans", _native.Plans())
    for name in ("attention", "head_mlp", "norm"):
        monkeypatch.setattr(importlib.import_module(f"trinix.ops.{name}"), "_prepared", {})


PLANNED = "activation", "attention", "glu", "head_mlp", "norm", "rope", "softmax"  # modules of ops


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_relu_goes_by_its_plan(planned, monkeypatch, layout):
    """Its launches and tensors, by the driver that is none of the interpreter's."""

    def step(launch, key, blocks, tensors, scalars, parameters):
        forward = "forward" in launch.kernel.fn.__name__
        return 3 if forward else 4, (3, 1, 1), 128, 16, False, (*parameters, struct.pack("i", scalars[0]))

    monkeypatch.setattr(_record, "step", step)
    x = torch.randn(31, 257)
    x = (x.t() if layout == "transposed" else x).requires_grad_()
    dy = torch.randn(31, 257)
    dy = dy.t() if layout == "transposed" else dy
    for call in range(5):
        y = ops.relu(x, backend="triton")
        assert ("Trinix" in y.grad_fn.name()) == (call > 1)
        assert y.stride() == x.stride()
        same([y], [torch.relu(x)])
        same(torch.autograd.grad(y, x, dy, retain_graph=True), [dy * (x > 0)])
        same(torch.autograd.grad(y.sum(), x, retain_graph=True), [(x > 0).float()])
        (dx,) = torch.autograd.grad(y, x, dy.clone().requires_grad_(), create_graph=True)
        same([dx], [dy * (x > 0)])
    part = x[::2, ::2]
    for _ in range(4):
        assert "Trinix" not in ops.relu(part, backend="triton").grad_fn.name()


def at_addresses(addresses, layouts):
    """Tensors that lie there; those that overlap, of one storage, as the views of one tensor are."""
    ends = [
        address + (1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))) * dtype.itemsize
        for address, (sizes, strides, dtype) in zip(addresses, layouts, strict=True)
    ]
    shared = []  # [begin, end] of storages
    for begin, end in sorted(zip(addresses, ends, strict=True)):
        if shared and begin < shared[-1][1]:
            shared[-1][1] = max(shared[-1][1], end)
        else:
            shared.append([begin, end])
    storages = {begin: (ctypes.c_char * (end - begin)).from_address(begin) for begin, end in shared}
    of = [max(begin for begin in storages if begin <= address) for address in addresses]
    bases = {}
    for begin, (_, _, dtype) in zip(of, layouts, strict=True):
        bases[begin, dtype] = torch.frombuffer(storages[begin], dtype=dtype)
    return tuple(
        bases[begin, dtype].as_strided(sizes, strides, (address - begin) // dtype.itemsize)
        for begin, address, (sizes, strides, dtype) in zip(of, addresses, layouts, strict=True)
    )


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3)]  # and more


@contextlib.contextmanager
def launched_by(native, run):
    """The driver's launches are calls of ``run(function, grid, addresses)``, addresses being those that its parameters begin with."""
    wrong = []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
    )
    def launch(config, function, params, extra):
        try:
            run(function, config.contents.grid, (ctypes.cast(p, ctypes.POINTER(ctypes.c_uint64))[0] for p in params))
        except BaseException as error:
            wrong.append(error)
            return 1
        return 0

    context = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda to: 0)
    set_driver(native, launch, context, context, context)
    yield
    driver = native.library
    set_driver(native, driver.launch, driver.get_context, driver.set_context, driver.move_map)
    assert not wrong


@pytest.fixture
def interpreted(planned, native, monkeypatch):
    """Every op by its plans, whose launches Triton's interpreter runs: the kernels' names."""
    steps, ran = [], []

    def run(function, grid, addresses):
        kept, layouts, scalars = steps[function - 1]
        kept(grid[0], at_addresses([*itertools.islice(addresses, len(layouts))], layouts), scalars)
        ran.append(kept.kernel.fn.__name__)

    def step(kept, key, blocks, tensors, scalars, parameters):
        steps.append((kept, [_record.layout(t) for t in tensors], scalars))
        return len(steps), (blocks, 1, 1), 32, 0, False, parameters

    monkeypatch.setattr(_record, "step", step)
    with launched_by(native, run):
        yield ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("center", "given"),
    [(True, "weight and bias"), (True, "weight"), (True, "bias"), (True, ""), (False, "weight"), (False, "")],
)
def test_norms_go_by_their_plans(interpreted, center, given, dtype):
    torch.manual_seed(0)  # the last comparison is of two roundings to half types
    x = torch.randn(3, 5, 40, dtype=dtype)
    weight, bias = (torch.randn(40, dtype=dtype) if name in given else None for name in ("weight", "bias"))
    dy = torch.randn(3, 5, 40, dtype=dtype)
    present = frozenset({"x", *(name for name in ("weight", "bias") if name in given)})
    for unwanted in {frozenset(present & names) for names in (set(), {"x"}, {"weight"}, {"x", "bias"})} - {present}:
        leaves = {"x": x, "weight": weight, "bias": bias}
        leaves = {
            name: t if t is None else t.detach().requires_grad_(name not in unwanted) for name, t in leaves.items()
        }

        def run(gradient, leaves=leaves, **options):
            if center:
                y = ops.layer_norm(leaves["x"], 40, leaves["weight"], leaves["bias"], backend="triton")
            else:
                y = ops.rms_norm(leaves["x"], 40, leaves["weight"], 1e-6, backend="triton")
            wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
            return y, torch.autograd.grad(y, wanted, gradient, retain_graph=True, **options), wanted

        first, grads, _ = run(dy)
        assert "Trinix" not in first.grad_fn.name()
        run(dy), run(dy)
        second, again, wanted = run(dy)
        assert "Trinix" in second.grad_fn.name()
        same([first, *grads], [second, *again])
        broad = dy[:1, :1, :1].expand(3, 5, 40)
        same(torch.autograd.grad(second, wanted, broad), torch.autograd.grad(first, wanted, broad))
        third, twice, _ = run(dy.clone().requires_grad_(), create_graph=True)
        assert "Trinix" in third.grad_fn.name()
        assert all(g.requires_grad for g in twice)
        for got, want in zip(twice, grads, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=0.05, atol=0.05)
    assert interpreted


def test_a_norm_whose_saved_input_comes_back_otherwise(interpreted):
    x, weight = torch.randn(6, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    dy = torch.randn(6, 24)
    for _ in range(3):
        want = torch.autograd.grad(ops.rms_norm(x, 24, weight, 1e-6, backend="triton"), (x, weight), dy)

    def unpack(t):
        return t.t().contiguous().t() if t.ndim == 2 else t

    count = len(interpreted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = ops.rms_norm(x, 24, weight, 1e-6, backend="triton")
    assert "Trinix" in y.grad_fn.name()
    got = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(got, want)
    assert len(interpreted) == count + 1  # backward went the other way


@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "mish", "gelu"])
def test_activations_go_by_their_plans(interpreted, kind):
    x, dy = torch.randn(7, 300, requires_grad=True), torch.randn(7, 300)
    results = []
    for _ in range(3):
        y = ops.activation(x, kind, backend="triton")
        results.append((y, *torch.autograd.grad(y, x, dy, retain_graph=True)))
    assert ["Trinix" in y.grad_fn.name() for y, _ in results] == [False, False, True]
    same(results[0], results[2])
    want = ops.activation(x, kind, backend="torch")
    torch.testing.assert_close(results[0], (want, *torch.autograd.grad(want, x, dy)))


@pytest.mark.parametrize("kind", ["relu", "mish", "gelu"])
@pytest.mark.parametrize("why", ["no leaf", "no_grad", "inference_mode"])
def test_activations_that_are_not_recorded_go_by_plans_of_forward_alone(interpreted, kind, why):
    off = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, contextlib.nullcontext)
    x = torch.randn(7, 300, requires_grad=why != "no leaf")
    recorded = torch.randn(7, 300, requires_grad=True)
    with off():
        results = []
        for launches in (
            0,
            0,
            1,
            2,
        ):  # by C++: many calls look like no other, so the first is not planned, the second is
            results.append(ops.activation(x, kind, backend="triton"))
            assert len(interpreted) == launches
            assert results[-1].grad_fn is None
            assert results[-1].is_inference() == (why == "inference_mode")
        same(results[0], results[2])
        same(results[0], results[3])
    # one that is recorded looks otherwise, and has its own
    y = ops.activation(recorded, kind, backend="triton")
    same([y], [ops.activation(recorded.detach(), kind, backend="triton")])
    assert y.requires_grad
    y.sum().backward()
    want = ops.activation(recorded, kind, backend="torch")
    torch.testing.assert_close(recorded.grad, torch.autograd.grad(want.sum(), recorded)[0])


@pytest.mark.parametrize("given", ["weight and bias", "weight", "bias", ""])
def test_norms_that_are_not_recorded_go_by_plans_of_forward_alone(interpreted, given):
    x = torch.randn(3, 5, 40, requires_grad=True)
    weight, bias = (torch.randn(40, requires_grad=True) if name in given else None for name in ("weight", "bias"))

    def norm(x=x):
        return ops.layer_norm(x, 40, weight, bias, backend="triton")

    with torch.no_grad():
        results = [norm() for _ in range(5)]
        assert len(interpreted) == 2  # the first is looked at, the second let pass, the third planned
        same(results[:1] * 2, results[3:])
        torch.testing.assert_close(results[2], torch.nn.functional.layer_norm(x, (40,), weight, bias))
    y = norm()
    assert "Trinix" not in y.grad_fn.name()
    y.sum().backward()
    assert len(interpreted) == 2
    frozen = x.detach()
    assert norm(frozen).requires_grad == bool(given)  # whose parameters require one
    with torch.no_grad():
        norm(x[:, ::2])
        norm(x.double().float()[:2])
    assert len(interpreted) == 2 + (not given)


MLP_FORMS = {  # which of b1, b2, w_gate there are, whether x is shared, reduce
    "plain": ("", False, None), "biases": ("b1 b2", False, None), "one bias": ("b2", False, None), "gated": ("w_gate b1", False, None),
    "shared": ("", True, None), "mean": ("", False, "mean"), "shared, mean, all": ("b1 b2 w_gate", True, "mean"),
}  # fmt: skip


def mlp(leaves, reduce, backend="triton"):
    x, w1, w2, *_ = leaves.values()
    rest = {n: t for n, t in leaves.items() if n not in ("x", "w1", "w2")}
    return ops.head_mlp(x, w1, w2, "gelu", **rest, reduce=reduce, backend=backend)


@pytest.mark.parametrize(("form", "rows"), [*[(form, 7) for form in MLP_FORMS], ("plain", 300), ("gated", 300)])
def test_per_head_mlps_go_by_their_plans(interpreted, form, rows, monkeypatch):
    given, shared, reduce = MLP_FORMS[form]
    if rows == 300:  # the weights' gradients in parts, which a third launch adds
        monkeypatch.setattr(kernels_mlp, "_card", lambda index: (32, 227, False))
    kernels_mlp._backward_plan.cache_clear()
    shapes = {
        "x": (rows, 16) if shared else (2, rows, 16), "w1": (2, 16, 40), "w2": (2, 40, 16), "b1": (2, 40), "b2": (2, 16),
        "w_gate": (2, 16, 40),
    }  # fmt: skip
    there = [n for n in shapes if n in ("x", "w1", "w2") or n in given.split()]
    generator = torch.Generator().manual_seed(0)
    for frozen in ((), ("x",), ("w1", "b1", "b2"), ("w2", "w_gate", "x"))[: 4 if rows == 7 else 1]:
        leaves = {n: torch.randn(shapes[n], generator=generator).requires_grad_(n not in frozen) for n in there}
        wanted = [t for t in leaves.values() if t.requires_grad]

        def run(dy=None, leaves=leaves, wanted=wanted, backend="triton", **options):
            o = mlp(leaves, reduce, backend)
            dy = torch.linspace(-1, 1, o.numel()).view(o.shape) if dy is None else dy(o)
            return o, torch.autograd.grad(o, wanted, dy, retain_graph=True, **options)

        results = [run() for _ in range(4)]
        assert ["Trinix" in o.grad_fn.name() for o, _ in results] == [False, False, True, True]
        for o, grads in results[1:]:
            same([o, *grads], [results[0][0], *results[0][1]])
        true = run(backend="torch")
        torch.testing.assert_close(results[3], true, rtol=1e-4, atol=1e-4)
        broad = run(torch.ones_like)[1]
        torch.testing.assert_close(run(lambda o: torch.ones(()).expand(o.shape))[1], broad, rtol=1e-4, atol=1e-4)
        twice = run(lambda o: torch.ones_like(o, requires_grad=True), create_graph=True)[1]
        assert all(g.requires_grad for g in twice)
        torch.testing.assert_close([g.detach() for g in twice], list(broad), rtol=1e-3, atol=1e-3)
    kernels_mlp._backward_plan.cache_clear()
    assert ("_add_partials" in interpreted) == (rows == 300)
    with torch.no_grad():
        alone = [mlp(leaves, reduce) for _ in range(4)]
    same(alone[:1] * 3, alone[1:])
    count = len(interpreted)
    assert count
    # whose kernels were Hopper's alone has never loaded the portable ones
    monkeypatch.setattr(importlib.import_module("trinix.ops.head_mlp"), "_triton_module", None)
    with torch.no_grad():
        mlp(leaves, reduce)
    assert len(interpreted) > count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(leaves, reduce).dtype == torch.bfloat16
    assert len(interpreted) == count + 1


class Boxed:
    """``trinix.kernels._binary.Boxed`` in the interpreter."""

    def __init__(self, kernel, tensors, blocks, programs, integers, constants, gluon, **options):
        self.kernel, self.blocks, self.programs = kernel, blocks, programs
        self.integers, self.constants = integers, constants

    def __call__(self, *tensors):
        recorder = _noting.recorder()
        note = recorder and recorder.noting(self.by_plan, None, self.programs, tensors, self.integers)
        with note or contextlib.nullcontext():  # the interpreter asks PyTorch for this and that
            self.run(*tensors)

    def run(self, *tensors):
        boxes = [
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, *block])
            for t, block in zip(tensors, self.blocks, strict=True)
        ]
        self.kernel[(self.programs,)](*boxes, *self.integers, **self.constants)

    @property
    def by_plan(self):
        """As the driver's launches here call what a plan has kept."""
        kept = functools.partial(lambda programs, tensors, integers: self.run(*tensors))
        kept.kernel = self.kernel
        return kept


def test_per_head_mlps_in_boxes_go_by_their_plans(interpreted, monkeypatch):
    monkeypatch.setattr(kernels_mlp, "_takes_boxes", lambda index: True)
    monkeypatch.setattr(_launch._State, "off", None)  # the interpreter's reason
    monkeypatch.setattr(_binary, "Boxed", Boxed)
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: (torch.randn(shape, generator=generator) / 4).half().requires_grad_()
        for name, shape in (("x", (2, 65, 128)), ("w1", (2, 128, 48)), ("w2", (2, 48, 128)))
    }
    results = []
    kernels_mlp._forward_plan.cache_clear()
    for _ in range(5):
        o = mlp(leaves, None)
        results.append([o, *torch.autograd.grad(o, [*leaves.values()], torch.ones_like(o), retain_graph=True)])
    assert ["Trinix" in o.grad_fn.name() for o, *_ in results] == [False, False, True, True, True]
    for one in results[1:]:
        same(one, results[0])
    assert "_forward_boxed" in interpreted
    kernels_mlp._forward_plan.cache_clear()


TABLE, WEIGHTS = ops.rope_table(6, 8), (torch.linspace(0.5, 2, 8), torch.linspace(2, 0.5, 8))
MLP = torch.linspace(-1, 1, 6 * 8 * 16).view(6, 8, 16), torch.linspace(1, -0.5, 6 * 8 * 16).view(6, 16, 8)
SMALL = {  # of x [1, 6, 2, 8]
    "mish": lambda x, backend: ops.mish(x, backend=backend),
    "rms_norm": lambda x, backend: ops.rms_norm(x, 8, None, 1e-6, backend=backend),
    "layer_norm_residual": lambda x, backend: ops.layer_norm_residual(x, x + 1, 8, backend=backend)[0],
    "swiglu": lambda x, backend: ops.swiglu(x, x + 1, backend=backend),
    "softmax": lambda x, backend: ops.softmax(x, 1, backend=backend),
    "rope": lambda x, backend: ops.rope(x, x + 1, *TABLE, backend=backend)[1],
    "qk_norm_rope": lambda x, backend: ops.qk_norm_rope(x, x + 1, *WEIGHTS, *TABLE, backend=backend)[0],
    "head_mlp": lambda x, backend: ops.head_mlp(x[0], *[w.to(x.dtype) for w in MLP], backend=backend)[None],
}


@pytest.mark.parametrize("name", list(SMALL))
def test_a_planned_op_is_seen_by_who_has_to_see_it(interpreted, name):
    def function(x, backend="triton"):
        return SMALL[name](x, backend)

    def close(got, x):
        torch.testing.assert_close(got, function(x, "torch"), rtol=1e-5, atol=1e-5)

    x = torch.randn(1, 6, 2, 8)
    for _ in range(4):
        close(function(x), x)
    count = len(interpreted)
    assert count
    with Watch() as watch:
        close(function(x), x)
    assert any("trinix" in one for one in watch.seen)
    many = torch.randn(3, 1, 6, 2, 8)
    if name == "rope":  # whose list of results PyTorch cannot batch
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.func.vmap(function)(many)
    else:
        close(torch.func.vmap(function)(many)[1], many[1])
    with forward_ad.dual_level():
        try:
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, many[0]))).tangent
        except RuntimeError:
            pass  # a named backend may refuse; it may not lose it
        else:
            assert tangent is not None
    (dx,) = torch.autograd.grad(function(leaf := x.clone().requires_grad_()).square().sum(), leaf)
    (want,) = torch.autograd.grad(function(leaf, "torch").square().sum(), leaf)
    torch.testing.assert_close(dx, want, rtol=1e-4, atol=1e-4)

    class Sub(torch.Tensor):
        pass

    assert type(function(x.as_subclass(Sub))) is Sub
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    close(function(negative), x)
    assert len(interpreted) == count
    for other in (x.half(), x[:, :, :1], torch.randn(6, 1, 2, 8).transpose(0, 1)):
        torch.testing.assert_close(function(other), function(other, "torch"), rtol=2e-3, atol=2e-3)
    close(function(x), x)
    assert len(interpreted) > count


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", list(SMALL))
def test_compiled_autograd_has_the_gradient_of_a_planned_op(interpreted, name):
    def function(x, backend="triton"):
        return torch.cat(ops.rope(x, x + 1, *TABLE, backend=backend)) if name == "rope" else SMALL[name](x, backend)

    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    for _ in range(5):
        torch.autograd.grad((y := function(x)), x, torch.ones_like(y))
    y = function(x)
    assert "Trinix" in (y.grad_fn.next_functions[0][0] if name in ("rope", "head_mlp") else y.grad_fn).name()
    (want,) = torch.autograd.grad(function(x, "torch").square().sum(), x)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_compile_does_not_watch_the_tables():
    torch._dynamo.utils.counters.clear()
    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    compiled = {
        name: torch.compile(lambda x, f=f: f(x, "auto"), backend="eager", fullgraph=True) for name, f in SMALL.items()
    }
    for more in range(3):
        for name, function in compiled.items():
            torch.testing.assert_close(function(x), SMALL[name](x, "torch"))
        for name in PLANNED:
            importlib.import_module(f"trinix.ops.{name}")._plans.of["a test", more] = None
    for name in PLANNED:
        plans = importlib.import_module(f"trinix.ops.{name}")._plans
        [plans.of.pop(("a test", more)) for more in range(3)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(SMALL)


def test_what_is_more_than_memory_does_not_go_by_a_plan_of_forward_alone(interpreted):
    def mish(x):
        return ops.mish(x, backend="triton")

    x = torch.randn(6, 8)
    for _ in range(4):
        mish(x)
    count = len(interpreted)
    assert count == 2
    with Watch() as watch:
        mish(x)
    assert watch.seen
    same([torch.func.vmap(mish)(x)], [mish(x)])
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        mish(forward_ad.make_dual(x, x))

    class Sub(torch.Tensor):
        pass

    assert len(interpreted) == count + 1
    assert type(mish(x.as_subclass(Sub))) is Sub
    odd = torch.randn(49)[1:].view(6, 8)
    same([mish(odd)], [mish(odd.clone())])
    assert len(interpreted) == count + 2
    negative = torch.complex(torch.zeros(6, 8), x).conj().imag
    same([mish(negative)], [mish(-x)])


BEFORE = torch.ones(6, 8)
NO_PLANS = {
    "another operator": lambda x: kernels.forward(x, "mish", 0.0, 0.0) + 1,
    "a change by another operator": lambda x: kernels.forward(x, "mish", 0.0, 0.0).add_(1),
    "a view of what it makes": lambda x: kernels.forward(x, "mish", 0.0, 0.0)[:, 1:],
    "the same memory in another shape": lambda x: kernels.forward(x, "mish", 0.0, 0.0).view(8, 6),
    "the input": lambda x: (kernels.forward(x, "mish", 0.0, 0.0), x)[1],
    "memory that nothing wrote to": lambda x: (kernels.forward(x, "mish", 0.0, 0.0), torch.empty_like(x))[1],
    "nothing launched": torch.empty_like,
    "an input copied first": lambda x: kernels.forward(x.t().contiguous(), "mish", 0.0, 0.0),
    "made by filling": lambda x: kernels.forward(torch.zeros(6, 8), "mish", 0.0, 0.0),
    "memory from before": lambda x: kernels.forward(BEFORE, "mish", 0.0, 0.0),
    "an input that begins at an odd address": None,
    "an even address inside of one that begins at an odd one": lambda x: kernels.forward(
        x.flatten()[2:], "mish", 0.0, 0.0
    ),
    "no elements": None,
}


@pytest.mark.parametrize("what", list(NO_PLANS))
def test_what_has_no_plan(interpreted, what):
    plans, x = _native.Plans(), torch.randn(6, 8)
    run = NO_PLANS[what] or (lambda x: kernels.forward(x, "mish", 0.0, 0.0))
    if "address" in what:
        x = torch.randn(50)[2:].view(6, 8)
    if what == "no elements":
        x = x[:0]
    want = run(x)
    for call in range(_native._MOST_TRIES + 1):
        pending = plans.begin((), x)
        assert (pending is not None) == (0 < call < _native._MOST_TRIES)
        if pending is not None and not what.startswith("memory that"):
            same([pending.alone(lambda: run(x))], [want])
        elif pending is not None:
            pending.alone(lambda: run(x))
    assert not plans.of
    assert not _noting.recorders


def test_an_address_within_two_inputs_has_no_plan(interpreted):
    plans, fused = _native.Plans(), torch.randn(6, 24)
    one, other = fused[:, :8], fused[:, 8:16]
    for _ in range(3):
        pending = plans.begin((), one, other)
    want = kernels.forward(one[1:], "mish", 0.0, 0.0)
    same([pending.alone(lambda: kernels.forward(one[1:], "mish", 0.0, 0.0))], [want])
    assert not plans.of


def test_a_step_has_the_binarys_parameters():
    names = ["x", "y", "n", "one", "far", "a", "BLOCK"]
    signature = dict(zip(names, ["*bf16", "*fp32", "i32", "constexpr", "i64", "fp32", "constexpr"], strict=True))
    params = [SimpleNamespace(name=name, is_constexpr=name == "BLOCK") for name in names]
    facts = {"num_warps": 8, "shared": 1024, "global_scratch_size": 0, "profile_scratch_size": 0, "launch_pdl": True}
    source = SimpleNamespace(signature=signature, fn=SimpleNamespace(params=params))
    compiled = SimpleNamespace(src=source, metadata=SimpleNamespace(**facts), function=99)
    launch = SimpleNamespace(binaries={"kept": compiled})

    def step(key="kept"):
        return _record.step(launch, key, 3, (None, None), (7, 1, 1 << 40, 0.5), (0, (1, 32)))

    numbers = struct.pack("i", 7), struct.pack("q", 1 << 40), struct.pack("f", 0.5)
    assert step() == (99, (3, 1, 1), 256, 1024, True, (0, (1, 32), *numbers, bytes(8), bytes(8)))
    assert step("other") is None
    signature["n"] = "u64"
    assert step() is None


def test_a_tensors_map_is_what_tritons_launcher_is_given(monkeypatch):
    """And only where the driver moves that of another address to the same."""
    box = _binary.Box((2, 3, 100), (600, 200, 1), (1, 2, 64), torch.bfloat16, gluon=False)
    box.metadata = {"swizzle": 3}

    def make(described, metadata):
        assert metadata is box.metadata
        assert (described.shape, described.strides) == ([2, 3, 100], [600, 200, 1])
        address = described.base.data_ptr()
        return struct.pack("q", address) + map_of("b")[8:], *described.shape, *described.strides

    def move(to, address):
        to = ctypes.cast(to, ctypes.c_void_p).value
        assert to % 64 == 0
        ctypes.memmove(to, struct.pack("q", address.value + wrong), 8)
        return failed

    monkeypatch.setattr(_binary.driver, "make_tensordesc_arg", make)
    monkeypatch.setattr(_binary, "_bytes_of", lambda given: given)
    monkeypatch.setattr(_binary, "_cuda", lambda: SimpleNamespace(cuTensorMapReplaceAddress=move))
    address = 1 << 40
    wrong = failed = 0
    assert box.map_at(address) == struct.pack("q", address) + map_of("b")[8:]
    wrong = 16
    assert box.map_at(address) is None
    wrong, failed = 0, 1
    assert box.map_at(address) is None


def test_maps_are_read_of_objects_that_look_as_tritons_do(tmp_path):
    """In C: a type of that name and size, whose object lies as Triton's driver.c lays its own."""
    (tmp_path / "maps.c").write_text(MAPS)
    include = f"-I{sysconfig.get_paths()['include']}"
    subprocess.run(["gcc", "-shared", "-fPIC", include, tmp_path / "maps.c", "-o", tmp_path / "maps.so"], check=True)
    specification = importlib.util.spec_from_file_location("maps", tmp_path / "maps.so")
    maps = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(maps)
    assert _binary._bytes_of(maps.PyCUtensorMap()) == bytes(range(128))
    assert _binary._bytes_of(maps.Larger()) is None
    assert _binary._bytes_of(object()) is None
    assert _binary._bytes_of(torch.ones(1)) is None


MAPS = r"""
#include <Python.h>
#include <stdlib.h>
typedef struct { PyObject_HEAD; _Alignas(128) char map[128]; } Map;
static PyObject* alloc(PyTypeObject* type, Py_ssize_t n) {
  void* mem = NULL;
  if (posix_memalign(&mem, 128, type->tp_basicsize)) return PyErr_NoMemory();
  for (int i = 0; i < 128; i++) ((Map*)mem)->map[i] = i;
  return PyObject_Init((PyObject*)mem, type);
}
static void release(void* mem) { free(mem); }
#define TYPE(it, name, size) static PyTypeObject it = {PyVarObject_HEAD_INIT(NULL, 0).tp_name = name, .tp_basicsize = size, \
  .tp_flags = Py_TPFLAGS_DEFAULT, .tp_new = PyType_GenericNew, .tp_alloc = alloc, .tp_free = release}
TYPE(map_type, "maps.PyCUtensorMap", sizeof(Map));
TYPE(larger_type, "maps.PyCUtensorMap", sizeof(Map) + 128);
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "maps", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_maps(void) {
  PyObject* m = PyModule_Create(&module);
  PyType_Ready(&map_type);
  PyType_Ready(&larger_type);
  PyModule_AddObject(m, "PyCUtensorMap", (PyObject*)&map_type);
  PyModule_AddObject(m, "Larger", (PyObject*)&larger_type);
  return m;
}
"""


@pytest.fixture
def tripling(native, monkeypatch):
    """A launch of boxes on a CPU, by Python and by plans: y = 3 x of 64 numbers; how often it was Python's."""
    monkeypatch.setattr(_launch._State, "off", None)
    monkeypatch.setattr(_launch, "_raw_stream", lambda index: 7)
    monkeypatch.setattr(_binary, "raw_stream", lambda index: 7)
    monkeypatch.setattr(_native, "module", native)
    by_python = []

    class Binary(_binary.Binary):
        direct = alone = True
        are_tensors = True, True, False
        compiled = SimpleNamespace(
            function=6,
            src=SimpleNamespace(
                signature={"x_desc": "tensordesc<fp32[64]>", "y_desc": "tensordesc<fp32[64]>", "n": "i32"},
                fn=SimpleNamespace(
                    params=[SimpleNamespace(name=n, is_constexpr=False) for n in ("x_desc", "y_desc", "n")]
                ),
            ),
            metadata=SimpleNamespace(num_warps=4, shared=16, launch_pdl=False),
        )

        def __init__(self):
            pass

        def launch(self, programs, y, z, stream, arguments):
            assert (y, z) == (1, 1)
            x, y, n = arguments
            by_python.append((programs, stream, n))
            y.numpy()[:] = 3 * x.numpy()  # PyTorch is not asked

    boxes = []
    for letter in "xy":
        box = _binary.Box((N,), (1,), (N,), torch.float32, gluon=False)
        box.metadata, box.map_at = {}, lambda address, letter=letter: map_of(letter)
        boxes.append(box)
    boxed = object.__new__(_binary.Boxed)
    boxed.index, boxed.programs, boxed.integers, boxed.binary, boxed.boxes = 0, 3, (N,), Binary(), boxes

    def run(x):
        y = torch.empty_like(x)
        for box, t in zip(boxes, (x, y), strict=True):
            box.at = lambda address, t=t: (t,)
        boxed(x, y)
        return y

    plans = _native.Plans()

    def call(x):
        table = plans.of.get(("triple",))
        y = None if table is None else _launch.by_table(table, x)
        if y is not None:
            return y
        pending = plans.begin(("triple",), x)
        return run(x) if pending is None else pending.alone(lambda: run(x))

    call.by_itself = run
    return call, boxed, by_python


def test_a_launch_of_boxes_goes_by_its_plan(tripling):
    call, _, by_python = tripling
    for _ in range(5):
        x = torch.randn(N)
        same([call(x)], [3 * x])
    assert by_python == [(3, 7, N)] * 2


@pytest.mark.parametrize("why", ["slow path", "no copy engine", "no map", "switched off"])
def test_a_launch_of_boxes_without_a_plan(tripling, why, monkeypatch):
    call, boxed, by_python = tripling
    if why == "slow path":
        monkeypatch.setattr(type(boxed.binary), "direct", False)
    elif why == "no copy engine":
        boxed.boxes[1].metadata = None
    elif why == "no map":
        boxed.boxes[0].map_at = lambda address: None
    else:
        monkeypatch.setattr(_launch._State, "off", "TRINIX_FAST_LAUNCH=0")
    for _ in range(4):
        x = torch.randn(N)
        same([call(x)], [3 * x])
    assert len(by_python) == 4


def test_a_launch_that_is_not_noted_leaves_a_pass_without_a_plan(tripling):
    _, boxed, by_python = tripling
    x = torch.randn(N)
    with _record.recording() as recorder:
        boxed.binary(3, 7, (x, torch.empty_like(x), N))
    assert recorder.other == "a launch that is not noted"
    assert len(by_python) == 1
    boxed.binary(3, 7, (x, torch.empty_like(x), N))  # while nobody notes


def test_another_threads_boxes_are_not_noted(tripling):
    call, _, by_python = tripling
    x = torch.randn(N)
    with _record.recording() as recorder:
        thread = threading.Thread(target=call.by_itself, args=(x,))
        thread.start()
        thread.join()
        assert not recorder.launches
        call.by_itself(x)
    assert len(recorder.launches) == 1
    assert len(by_python) == 2


@pytest.fixture
def emulated(planned, native, monkeypatch):
    """Hopper's attention by its plans, whose launches gluon_on_cpu.py runs: how many, and the stream that calls are on."""
    gluon_on_cpu.attention_on_cpu(monkeypatch, hopper, 4)
    monkeypatch.setattr(hopper, "unsupported", lambda *call: None)
    steps, ran = [], SimpleNamespace(count=0, stream=0)
    monkeypatch.setattr(_launch, "_raw_stream", lambda index: ran.stream)

    def run(function, grid, addresses):
        noted, given = steps[function - 1], []
        for argument, is_tensor in zip(noted.arguments, noted.binary.are_tensors, strict=True):
            address = next(addresses) if is_tensor else argument
            given.append((argument[0], address) if isinstance(argument, tuple) else address)
        x, y, z = grid
        noted.binary.run(x, tuple(given), y, z)
        ran.count += 1

    def step(noted, places):
        steps.append(noted)
        return len(steps), noted.grid, 32, 0, False, tuple(places)

    monkeypatch.setattr(_record, "step_of_binary", step)
    with launched_by(native, run):
        yield ran


def qkv(how, frozen=(), seed=0):
    """(leaves, q, k, v) of two sequences of 70 tokens and two heads of 64; grouped: of four query heads."""
    torch.manual_seed(seed)
    heads = (4, 2, 2) if "grouped" in how else (2, 2, 2)
    if "slices" in how:
        fused = torch.randn(2, 70, sum(heads), 64).half().requires_grad_()
        return [fused], *fused.split(heads, dim=2)
    tensors = [
        torch.randn(2, 70, n, 64).half().requires_grad_(name not in frozen)
        for name, n in zip("qkv", heads, strict=True)
    ]
    return [t for t in tensors if t.requires_grad], *tensors


@pytest.mark.parametrize(("how", "frozen", "short"), [
    ("apart", "", True), ("slices", "", True), ("apart", "q", False), ("apart", "kv", False), ("slices", "", False),
    ("grouped", "", True), ("grouped", "q", False), ("grouped slices", "", False),
], ids=str)  # fmt: skip
def test_attention_goes_by_its_plans(emulated, how, frozen, short, monkeypatch):
    if not short:
        monkeypatch.setattr(hopper, "choose_short", lambda *call: None)
    options = {"causal": True, "deterministic": True, "backend": "hopper"}
    counts = []
    for call in range(5):
        leaves, q, k, v = qkv(how, frozen, seed=call)
        dout = torch.randn(q.shape).half()
        before = emulated.count
        out = ops.attention(q, k, v, **options)
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        counts.append(emulated.count - before)
        assert ("Trinix" in out.grad_fn.name()) == (call > 1)
        want, lse = hopper.forward(
            *(t.detach() for t in (q, k, v)), Options(scale=0.125, window_right=0, deterministic=True)
        )
        three = hopper.backward(
            dout, None, *(t.detach().contiguous() for t in (q, k, v)), want, lse,
            Options(scale=0.125, window_right=0, deterministic=True), (True,) * 5,
        )[:3]  # fmt: skip
        same([out], [want])
        three = (
            [torch.cat(three, 2)]
            if "slices" in how
            else [g for g, t in zip(three, (q, k, v), strict=True) if t.requires_grad]
        )
        same(grads, three)
    launches = 5 if "grouped" in how else 4  # dK and dV of two programs a head are added up
    assert counts == [0, 0, launches, launches, launches]
    # what C++ cannot do
    turned = dout.transpose(1, 2).contiguous().transpose(1, 2)
    same(torch.autograd.grad(out, leaves, turned, retain_graph=True), three)
    again = torch.autograd.grad(out, leaves, dout, create_graph=True)
    assert all(g.requires_grad for g in again)
    torch.testing.assert_close([g.detach() for g in again], list(three), rtol=4e-3, atol=4e-3)
    with torch.no_grad():
        before = emulated.count
        alone = [ops.attention(q, k, v, **options) for _ in range(4)]
        assert emulated.count == before + 2
    same(alone, [want] * 4)


class _ShortBackward:
    """Takes the place of the binary of one kernel for both gradients, which is plain Triton: float16, from addresses alone."""

    def __init__(self, kernel, device, examples, constants, **_):
        self.kernel, self.constants = kernel, constants | {"DEPENDENT": False, "UPCAST": True}
        self.are_tensors = tuple(isinstance(a, torch.Tensor) for a in examples)
        self.like = [(t.numel(), t.dtype) for t in examples if isinstance(t, torch.Tensor)]

    __call__ = gluon_on_cpu.Binary.__call__

    def run(self, blocks, arguments, y, z):
        tensors = []
        for (numel, dtype), address in zip(self.like, arguments, strict=False):
            held = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
            tensors.append(torch.frombuffer(held, dtype=dtype))
        self.kernel[(blocks,)](*tensors, *arguments[len(tensors) :], **self.constants)


def test_attention_whose_backward_is_one_kernel_goes_by_its_plans(emulated, monkeypatch):
    others = hopper.Binary
    monkeypatch.setattr(hopper, "choose_short_backward", lambda *call: hopper.ShortBackwardConfig(64, 64, 4, 3))
    monkeypatch.setattr(
        hopper,
        "Binary",
        lambda kernel, *rest, **options: (
            _ShortBackward if kernel is hopper.short_backward_kernels.attention_backward_short else others
        )(kernel, *rest, **options),
    )
    counts, names = [], []
    for call in range(4):
        leaves, q, k, v = qkv("apart", seed=call)
        dout, before = torch.randn(q.shape).half(), emulated.count
        out = ops.attention(q, k, v, causal=True, backend="hopper")
        got = torch.autograd.grad(out, leaves, dout)
        counts.append(emulated.count - before)
        names.append("Trinix" in out.grad_fn.name())
        want = torch.autograd.grad(ops.attention(q, k, v, causal=True, backend="torch"), leaves, dout)
        torch.testing.assert_close(got, want, rtol=0, atol=4e-3)
    assert counts == [0, 0, 2, 2]
    assert names == [False, False, True, True]


def test_attention_on_another_stream_has_no_plan_that_counts(emulated, monkeypatch):
    leaves, q, k, v = qkv("apart")

    def attention():
        out = ops.attention(q, k, v, backend="hopper")
        torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        return out

    for short in (True, False):
        if not short:
            monkeypatch.setattr(hopper, "choose_short", lambda *call: None)
            op_attention._prepared.clear()
            monkeypatch.setattr(op_attention, "_plans", _native.Plans())
        emulated.stream = 0
        outs = [attention() for _ in range(4)]
        emulated.stream = 7
        other = attention()
        assert ["Trinix" in out.grad_fn.name() for out in (*outs, other)] == [False, False, True, True, short]
        same(outs, [other] * 4)


@pytest.mark.parametrize("option", [
    {"return_lse": True}, {"window": [3, 0]}, {"scale": torch.tensor(0.1)}, {"sink": torch.zeros(2, dtype=torch.float16)},
], ids=str)  # fmt: skip
def test_attention_of_more_than_tensors_and_numbers_has_no_plan(emulated, option):
    leaves, q, k, v = qkv("apart")
    for _ in range(4):
        out = ops.attention(q, k, v, backend="hopper", **option)
        out = out[0] if isinstance(out, tuple) else out
        assert "Trinix" not in out.grad_fn.name()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not op_attention._plans.of


def test_attention_is_found_by_all_that_it_names(emulated):
    leaves, q, k, v = qkv("apart")
    ways = [
        {}, {"causal": True}, {"window": (5, 0)}, {"window": (6, 0)}, {"scale": 0.2}, {"softcap": 20.0}, {"deterministic": True},
    ]  # fmt: skip

    def all_ways():
        outs = [ops.attention(q, k, v, backend="hopper", **way) for way in ways]
        for out in outs:
            torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        return outs

    first = all_ways()
    for _ in range(3):
        got = all_ways()
        same(got, first)
    assert all("Trinix" in out.grad_fn.name() for out in got)
    assert len(op_attention._plans.of) == len(ways)


def test_kept_binaries_are_not_launched_while_somebody_notes(monkeypatch):
    fired = []
    monkeypatch.setattr(_launch, "_raw_stream", lambda index: 7)
    launch = object.__new__(_launch.Launch)
    launch.kernel = SimpleNamespace(pre_run_hooks=[])
    launch.keep = {(0,): lambda *call: fired.append(call)}
    assert launch.again((0,), 16, 3, (16,), (5,))
    with _record.recording():
        assert not launch.again((0,), 16, 3, (16,), (5,))
    assert fired == [(3, 7, (16, 5))]


def test_another_threads_launches_are_not_noted(interpreted):
    x, results = torch.randn(6, 8), []
    with _record.recording() as recorder:
        thread = threading.Thread(target=lambda: results.append(kernels.forward(x, "mish", 0.0, 0.0)))
        thread.start()
        thread.join()
    assert not recorder.launches
    assert not recorder.made
    same(results, [kernels.forward(x, "mish", 0.0, 0.0)])


def test_gradients_that_lie_otherwise_at_first_do_not_settle_the_plan(interpreted):
    x, dy = torch.randn(7, 300, requires_grad=True), torch.randn(7, 300)
    for _ in range(5):
        y = ops.mish(x, backend="triton")
        y.sum().backward()
        assert "Trinix" not in y.grad_fn.name()
    for call in range(3):
        y = ops.mish(x, backend="triton")
        assert ("Trinix" in y.grad_fn.name()) == (call > 0)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, torch.autograd.grad(torch.nn.functional.mish(x), x, dy)[0])


def named_calls():
    """(all calls, of one tensor, that a table must tell apart, by family)."""
    x, up, w, b = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8), torch.randn(8)
    packed = torch.randn(6, 16)
    yield [lambda o, kind=kind: ops.activation(x, kind, **o) for kind in ops.KINDS]
    yield [lambda o, slope=slope: ops.leaky_relu(x, slope, **o) for slope in (0.1, 0.2, -0.3)]
    yield [lambda o, beta=beta, end=end: ops.softplus(x, beta, end, **o) for beta in (1.0, 2.0) for end in (0.5, 20.0)]
    for layout in ("gate_first", "gate_last", "interleaved"):
        yield [
            lambda o, way=layout, k=kind: ops.glu(packed, kind=k, layout=way, **o)
            for kind in ("swiglu", "geglu", "reglu")
        ]
    yield [lambda o, layout=layout: ops.glu(packed, layout=layout, **o) for layout in ("gate_first", "gate_last")]
    numbers = [(eps, offset) for eps in (1e-6, 1.0) for offset in (0.0, 1.0)]
    yield [lambda o, n=n: ops.rms_norm(x, 8, w, n[0], weight_offset=n[1], **o) for n in numbers]
    yield [lambda o, n=n: ops.rms_norm_residual(x, up, 8, w, n[0], weight_offset=n[1], **o) for n in numbers]
    yield [
        lambda o: ops.layer_norm(x, 8, w, b, **o), lambda o: ops.layer_norm(x, 8, w, None, **o),
        lambda o: ops.layer_norm(x, 8, None, b, **o), lambda o: ops.rms_norm(x, 8, w, 1e-5, **o),
        lambda o: ops.layer_norm(x, (6, 8), **o), lambda o: ops.layer_norm(x, 8, **o),
    ]  # fmt: skip
    yield [lambda o, k=k: ops.rms_norm_activation(x, 8, w, k, 1e-6, **o) for k in ("quick_gelu", "mish")]
    cos, sin = ops.rope_table(6, 8)
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 1, 8)
    yield [lambda o, way=way: ops.rope(q, k, cos, sin, interleaved=way, **o) for way in (False, True)]
    yield [
        lambda o, e=eps, s=shift: ops.qk_norm_rope(q, k, w, b, cos, sin, eps=e, weight_offset=s, **o)
        for eps, shift in numbers
    ]


def test_calls_are_found_by_all_that_they_name(interpreted):
    count = 0
    for calls in named_calls():
        wanted = [call({"backend": "torch"}) for call in calls]
        for _ in range(5):
            for call, want in zip(calls, wanted, strict=True):
                torch.testing.assert_close(call({"backend": "triton"}), want, rtol=1e-4, atol=1e-4)
        assert len(interpreted) > count
        count = len(interpreted)


def test_a_call_that_fails_while_it_is_noted(interpreted):
    def run():
        raise ValueError("no")

    pending = None
    plans, x = _native.Plans(), torch.randn(6, 8)
    while pending is None:
        pending = plans.begin((), x)
    with pytest.raises(ValueError, match="no"):
        pending.alone(run)
    assert not _noting.recorders
    assert not plans.of


def second_derivatives(grads, wanted):
    squares = sum(g.square().sum() for g in grads if g is not None and g.requires_grad)
    if not isinstance(squares, torch.Tensor):  # of linear functions
        return [None for _ in wanted]
    return torch.autograd.grad(squares, wanted, allow_unused=True, retain_graph=True)


def goes_by_plans(interpreted, function, leaves, by_plan=True, calls=3):
    """After so many, like calls go by plans, with a gradient and without one: the same bits, and what the formula gives."""
    wanted = [t for t in leaves if t.requires_grad]
    formula = function("torch")
    formula = formula if isinstance(formula, tuple) else (formula,)
    with torch.no_grad():  # gradients lie as the results do
        like = function("triton")
    dys = [torch.empty_like(y).copy_(torch.randn(y.shape)) for y in (like if isinstance(like, tuple) else (like,))]

    def run(*, of=slice(None), gradients=dys, **options):
        results = function("triton")
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(results[of], wanted, gradients[of], retain_graph=True, allow_unused=True, **options)
        return [*results], [*grads]

    def close(got, want):
        for t, one, other in zip(wanted, got, want, strict=True):
            one, other = (torch.zeros_like(t) if g is None else g.detach() for g in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def of_formula(of=slice(None)):
        pairs = [(y, dy) for y, dy in zip(formula[of], dys[of], strict=True) if y.requires_grad]
        results, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(results, wanted, incoming, retain_graph=True, allow_unused=True)

    broad = [dy.flatten()[:1].expand(dy.shape) for dy in dys]
    first, grads = run()
    _, of_broad = run(gradients=broad)
    recorded = [y.requires_grad for y in first]
    assert not any("Trinix" in y.grad_fn.name() for y in first if y.requires_grad)
    for _ in range(calls - 2):
        run()
    count = len(interpreted)
    later, again = run()
    assert ["Trinix" in y.grad_fn.name() for y in later if y.requires_grad] == [by_plan] * sum(recorded)
    assert (len(interpreted) >= count + 2) == by_plan  # both passes
    same(later, first)
    same([g for g in again if g is not None], [g for g in grads if g is not None])
    for got, want in zip(later, formula, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    close(again, of_formula())
    for i in range(len(dys)):  # of one result alone
        if formula[i].requires_grad:
            close(run(of=slice(i, i + 1))[1], of_formula(slice(i, i + 1)))
    same([g for g in run(gradients=broad)[1] if g is not None], [g for g in of_broad if g is not None])
    twice = run(gradients=[dy.clone().requires_grad_() for dy in dys], create_graph=True)[1]
    assert all(g.requires_grad for g in twice if g is not None)
    close(twice, grads)
    pairs = [(y, dy) for y, dy in zip(formula, dys, strict=True) if y.requires_grad]
    results, incoming = zip(*pairs, strict=True)
    again = torch.autograd.grad(results, wanted, incoming, create_graph=True, allow_unused=True)
    close(*(second_derivatives(grads, wanted) for grads in (twice, again)))
    count = len(interpreted)
    with torch.no_grad():
        results = [function("triton") for _ in range(calls + 1)]
    assert (len(interpreted) > count) == by_plan
    for one in results:
        same(one if isinstance(one, tuple) else (one,), [y.detach() for y in first])


GLUS = {
    "two": lambda: (torch.randn(6, 40), torch.randn(6, 40)),
    "packed": lambda: (torch.randn(6, 80), None),
    "gate of a larger": lambda: (torch.randn(6, 96)[:, 16:56], torch.randn(6, 40)),
    "transposed": lambda: (torch.randn(40, 6).t(), torch.randn(40, 6).t()),
    "in one row": lambda: torch.randn(6, 80).chunk(2, dim=-1),
    "packed and transposed": lambda: (torch.randn(80, 6).t(), None),
    "packed and spread": lambda: (torch.randn(6, 160)[:, ::2], None),  # kernels get up's first address
}


@pytest.mark.parametrize(("lies", "frozen"), [*((lies, None) for lies in GLUS), ("two", 0), ("two", 1)])
@pytest.mark.parametrize(
    ("kind", "layout"), [("swiglu", "gate_first"), ("reglu", "interleaved"), ("geglu", "gate_last")]
)
def test_glus_go_by_their_plans(interpreted, lies, kind, layout, frozen):
    gate, up = (t if t is None else t.detach().requires_grad_(i != frozen) for i, t in enumerate(GLUS[lies]()))
    leaves = [t for t in (gate, up) if t is not None]
    aligned = layout != "interleaved" or lies != "packed and spread"  # there up begins 8 bytes behind gate
    goes_by_plans(interpreted, lambda backend: ops.glu(gate, up, kind, layout=layout, backend=backend), leaves, aligned)


@pytest.mark.parametrize("frozen", [None, "weight"])
@pytest.mark.parametrize("kind", ["swiglu", "reglu"])
def test_glus_of_a_product_with_a_bias_go_by_their_plans(interpreted, kind, frozen):
    x, weight, bias = torch.randn(6, 16), torch.randn(40, 16), torch.randn(40)
    leaves = [t.requires_grad_(name != frozen) for name, t in (("x", x), ("weight", weight), ("bias", bias))]

    def function(backend):
        if backend == "torch" or not torch.is_grad_enabled():  # where the layer asks for no sums
            return ops.glu(torch.nn.functional.linear(x, weight, bias), kind=kind, backend=backend)
        return op_glu.linear_glu(x, weight, bias, kind)

    goes_by_plans(interpreted, function, leaves)


SOFTMAXES = {
    "rows": ((6, 40), -1, {}),
    "columns": ((6, 40), 0, {"scale": 0.5}),
    "middle": ((3, 16, 8), 1, {}),
    "masked": ((6, 40), 1, {"mask": (6, 40)}),
    "mask for all rows": ((6, 40), 1, {"mask": (40,), "scale": -2.0}),
    "long": ((2, 70_000), 1, {}),
    "odd": ((5, 1001), 1, {}),
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", list(SOFTMAXES))
def test_softmaxes_go_by_their_plans(interpreted, name, log):
    shape, dim, options = SOFTMAXES[name]
    options = options | ({"mask": torch.randn(options["mask"])} if "mask" in options else {})
    x = torch.randn(shape).requires_grad_()
    function = ops.log_softmax if log else ops.softmax
    goes_by_plans(interpreted, lambda backend: function(x, dim, backend=backend, **options), [x])


@pytest.mark.parametrize("frozen", [(), ("x",), ("residual", "weight"), ("weight", "bias")])
@pytest.mark.parametrize(("center", "given"), [(True, "weight and bias"), (False, "weight"), (False, "")])
def test_residual_norms_go_by_their_plans(interpreted, center, given, frozen):
    leaves = {"x": torch.randn(3, 5, 40), "residual": torch.randn(3, 5, 40)}
    leaves |= {name: torch.randn(40) for name in ("weight", "bias") if name in given}
    leaves = {name: t.requires_grad_(name not in frozen) for name, t in leaves.items()}
    x, residual, weight, bias = (leaves.get(name) for name in ("x", "residual", "weight", "bias"))

    def function(backend):
        if center:
            return ops.layer_norm_residual(x, residual, 40, weight, bias, backend=backend)
        return ops.rms_norm_residual(x, residual, 40, weight, 1e-6, backend=backend)

    goes_by_plans(interpreted, function, list(leaves.values()), calls=4)


PLACES = {
    "offset 0": {},
    "offsets": {"offset": torch.tensor([3, 0])},
    "position_ids": {"position_ids": torch.randint(0, 16, (2, 5))},
    "interleaved": {"interleaved": True},
}
ROTATIONS = [(op, places, None) for op in ("q", "q and k", "with norm") for places in PLACES]
ROTATIONS += [(op, "offset 0", 0) for op in ("q and k", "with norm")]
ROTATIONS += [(op, "offsets", 1) for op in ("q", "q and k", "with norm")]


@pytest.mark.parametrize(("op", "places", "frozen"), ROTATIONS)
def test_rotations_go_by_their_plans(interpreted, op, places, frozen):
    cos, sin = ops.rope_table(16, 8)
    fused = torch.randn(2, 5, 6, 8)  # as a projection lays them
    q, k = (t.detach().requires_grad_(i != frozen) for i, t in enumerate((fused[:, :, :4], fused[:, :, 4:])))
    weights = [torch.randn(8, requires_grad=True) for _ in range(2)]

    def function(backend):
        options = PLACES[places] | {"backend": backend}
        if op == "with norm":
            return ops.qk_norm_rope(q, k, *weights, cos, sin, **options)
        return ops.rope(q, k if op == "q and k" else None, cos, sin, **options)

    goes_by_plans(interpreted, function, [q] if op == "q" else [q, k, *(weights if op == "with norm" else [])])


def test_a_rotation_is_found_by_all_that_it_names(interpreted):
    cos, sin = ops.rope_table(16, 8)
    q, k, ids = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.arange(5)
    calls = [{}, {"interleaved": True}, {"offset": torch.tensor([2])}, {"position_ids": ids + 1}]
    others = [{"offset": 3}, {"offset": 4}]  # from one call to the next: these have none
    for _ in range(10):
        for options in (*calls, *others):
            for mine in ((q, k), (q, None)):
                want = ops.rope(*mine, cos, sin, backend="torch", **options)
                torch.testing.assert_close(ops.rope(*mine, cos, sin, backend="triton", **options), want)
    assert len(interpreted) == 2 * 8 * len(calls)
    both = q.clone(), k.clone()
    got = ops.rope(*both, cos, sin, inplace=True, backend="triton")
    assert [a is b for a, b in zip(got, both, strict=True)] == [True, True]
    assert len(interpreted) == 2 * 8 * len(calls)
    same(got, ops.rope(q, k, cos, sin, backend="triton"))
    with pytest.raises(ValueError, match="within the table's 16 rows"):
        ops.rope(torch.randn(1, 17, 4, 8), None, cos, sin, backend="triton")


def test_a_softmax_is_found_by_all_that_it_names(interpreted):
    x = torch.randn(6, 8)
    mask = torch.randn(8)
    for _ in range(10):
        for options in ({}, {"scale": 2.0}, {"dim": 0}, {"mask": mask}, {"mask": x}, {"scale": 2}):
            for function in (ops.softmax, ops.log_softmax):
                want = function(x, backend="torch", **options)
                torch.testing.assert_close(function(x, backend="triton", **options), want)
    assert len(interpreted) == 2 * 4 * (10 - 2)  # not x as its own mask, which may be another next time; nor an int
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        ops.softmax([1.0], backend="triton")
    with pytest.raises(TypeError, match="mask must be a floating-point tensor"):
        ops.softmax(x, mask="x", backend="triton")


def test_only_what_is_memory_and_like_a_call_before_goes_by_a_plan(interpreted):
    x, dy = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)

    def relu(x):
        return ops.relu(x, backend="triton")

    for _ in range(3):
        relu(x).backward(dy)
    count = len(interpreted)
    assert "Trinix" in relu(x).grad_fn.name()
    assert len(interpreted) == count + 1
    with torch.no_grad():
        assert relu(x).grad_fn is None
    with torch.inference_mode():
        assert not relu(x).requires_grad
    assert relu(x.detach()).grad_fn is None
    count = len(interpreted)
    with Watch() as watch:
        assert "Trinix" not in relu(x).grad_fn.name()
    assert watch.seen
    with pytest.raises(RuntimeError, match="functorch transforms"):  # as without a table
        torch.func.vmap(lambda z: relu(x) + z)(torch.zeros(2, 6, 8))
    assert len(interpreted) == count
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: relu(x).sum())(x.detach())
    same([torch.func.vmap(relu)(x)], [torch.relu(x)])
    table = op._plans.of[("relu", 0.0, 0.0, "triton", None, True)]
    with forward_ad.dual_level():
        assert _launch.by_table(table, forward_ad.make_dual(x, dy)) is None
        assert _launch.by_table(table, x) is not None
    for other in ("x", None, 3.0, dy):
        assert _launch.by_table(table, other) is None

    class Sub(torch.Tensor):
        pass

    for other in (x.detach().as_subclass(Sub).requires_grad_(), x[:, :4], x.double()):
        y = relu(other) if other.dtype == torch.float32 else ops.relu(other, backend="torch")
        assert "Trinix" not in y.grad_fn.name()
        same([y.detach().as_subclass(torch.Tensor)], [torch.relu(other.detach().as_subclass(torch.Tensor))])
    odd = torch.randn(49)[1:].view(6, 8).requires_grad_()
    assert "Trinix" not in relu(odd).grad_fn.name()
    negative = torch.complex(torch.zeros(6, 8), dy).conj().imag.requires_grad_()
    assert negative.is_neg()
    same([relu(negative)], [torch.relu(-dy)])


def test_only_on_the_current_device_and_its_stream(native):
    table, x = native.table(), torch.randn(N)
    native.add(table, relu_pair(native), ((x.shape, x.stride(), x.dtype, False),))
    driver, asked = native.library, []

    def stream_of(index):
        asked.append(index)
        return 7

    def again(get):
        set_driver(native, driver.launch, get, driver.set_context, driver.move_map)
        return native.again(table, stream_of, x)

    try:
        for get in (driver.get_context, driver.get_none):  # a thread begins without a context
            same([again(get)], [torch.relu(x)])
        assert again(driver.get_other) is None
        assert asked == [-1, -1]  # the index of the CPU
        set_driver(native, driver.launch, driver.get_context, driver.set_context, driver.move_map)
        with pytest.raises(ZeroDivisionError):
            native.again(table, lambda index: 1 // 0, x)
    finally:
        set_driver(native, driver.launch, driver.get_context, driver.set_context, driver.move_map)


def test_a_table_may_grow_while_a_call_asks_for_its_stream(native):
    table, x = native.table(), torch.randn(N)
    looks = ((x.shape, x.stride(), x.dtype, False),)
    native.add(table, relu_pair(native), looks)

    def stream_of(index):
        for _ in range(100):  # its entries move
            native.add(table, relu_pair(native), looks)
        return 7

    same([native.again(table, stream_of, x)], [torch.relu(x)])


def test_other_threads_run_while_a_launch_waits(native):
    driver, x = native.library, torch.randn(N)
    let_go = ctypes.c_int.in_dll(driver, "let_go")
    set_driver(native, driver.waiting_launch, driver.get_context, driver.set_context, driver.move_map)
    pair = relu_pair(native)
    let_go.value = 0
    timer = threading.Timer(0.2, lambda: setattr(let_go, "value", 1))
    timer.start()
    try:
        same([native.call(pair, 7, x)], [torch.relu(x)])
    finally:
        timer.join()
        let_go.value = 1
        set_driver(native, driver.launch, driver.get_context, driver.set_context, driver.move_map)


def test_two_threads_go_back_while_their_graph_is_noted(interpreted, monkeypatch):
    x, dy, together = torch.randn(7, 30, requires_grad=True), torch.randn(7, 30), threading.Barrier(2, timeout=60)
    ops.mish(x, backend="triton").backward(dy)
    y = ops.mish(x, backend="triton")
    want = torch.autograd.grad(torch.nn.functional.mish(x), x, dy)[0]
    backward, got, lock = kernels.backward, [], threading.Lock()

    def slowly(*call):
        with lock:  # the interpreter runs one kernel at a time
            dx = backward(*call)
        together.wait()
        return dx

    monkeypatch.setattr(kernels, "backward", slowly)
    threads = [
        threading.Thread(target=lambda: got.extend(torch.autograd.grad(y, x, dy, retain_graph=True))) for _ in "ab"
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for dx in got:
        torch.testing.assert_close(dx, want)
    assert len(got) == 2
    monkeypatch.setattr(kernels, "backward", backward)
    y = ops.mish(x, backend="triton")
    assert "Trinix" in y.grad_fn.name()
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], want)


def test_a_full_table_stays_as_it_is(interpreted):
    for n in range(1, 140):
        x = torch.randn(n, requires_grad=True)
        for _ in range(3):
            y = ops.relu(x, backend="triton")
            y.backward(torch.ones(n))
        assert ("Trinix" in y.grad_fn.name()) == (n <= 128)


def test_auto_takes_it_where_it_wins(monkeypatch):
    def wins(kind, n):
        return op._native_wins(torch.empty(n, device="meta"), kind)

    monkeypatch.setattr(op, "_native_there", None)
    monkeypatch.setattr(_native, "module", object())
    assert [wins("relu", n) for n in ((1 << 22) - 1, 1 << 22, 1 << 23)] == [False, True, False]
    assert [wins("silu", n) for n in ((1 << 22) - 1, 1 << 22, 1 << 26)] == [False, True, False]
    assert [wins("sigmoid", n) for n in ((1 << 22) - 1, 1 << 22, 1 << 23)] == [False, True, False]
    assert not wins("tanh", 1 << 22)
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "_asked", True)
    assert wins("relu", 1 << 22)  # a call that is computed again goes the same way
    monkeypatch.setattr(op, "_native_there", None)
    assert not wins("relu", 1 << 22)
    monkeypatch.setattr(_native, "module", object())  # the build has ended
    assert not wins("relu", 1 << 22)


# ---- on the card -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_card(monkeypatch):
    """Runs a function twice: by Functions, then by plans."""
    reason = _native.missing()
    if reason:
        pytest.skip(f"C++ launches {reason}")
    _native.build()
    monkeypatch.setattr(_native, "_asked", False)
    monkeypatch.setattr(_native, "module", None)
    assert _native.loaded() is not None
    module = _native.module

    def both(function, leaves, dy):
        def run():
            y = function()
            y = y if isinstance(y, tuple) else (y,)
            grads = torch.autograd.grad(y, leaves, dy if isinstance(dy, tuple) else (dy,))
            return "Trinix" in y[0].grad_fn.name(), [*(one.detach() for one in y), *grads]

        monkeypatch.setattr(_native, "module", None)
        by_plan, want = run()
        assert not by_plan
        monkeypatch.setattr(_native, "module", module)
        for _ in range(4):
            by_plan, got = run()
            same(got, want)
        assert by_plan

    return both


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def norm_of(x, *parameters):
    """layer_norm of x, weight, bias; rms_norm of x and weight."""
    if len(parameters) == 2:
        return ops.layer_norm(x, x.shape[-1], *parameters, backend="triton")
    return ops.rms_norm(x, x.shape[-1], *parameters, 1e-6, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (4097,), (64, 300), (12, 12, 256, 128)])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "mish", "gelu", "quick_gelu"])
def test_activations_have_the_same_bits(on_card, kind, shape, dtype):
    x = leaf(*shape, dtype=dtype)
    on_card(lambda: ops.activation(x, kind, backend="triton"), [x], torch.randn_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16384, 256), (1, 7), (333, 1000), (64, 8192)])
@pytest.mark.parametrize("parameters", [1, 2])
def test_norms_have_the_same_bits(on_card, parameters, shape):
    leaves = leaf(*shape), *(leaf(shape[-1]) for _ in range(parameters))
    on_card(lambda: norm_of(*leaves), leaves, torch.randn_like(leaves[0]))


def like(*tensors):
    return tuple([torch.randn_like(t) for t in tensors])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 100, 512), (1, 3, 7), (3, 40, 4096)])
def test_other_ops_have_the_same_bits(on_card, shape, dtype):
    gate, up, packed = (leaf(*shape[:-1], n * shape[-1], dtype=dtype) for n in (1, 1, 2))
    weight, bias = (leaf(shape[-1], dtype=dtype) for _ in range(2))
    (dy,) = like(gate)
    for kind in ("swiglu", "geglu"):
        on_card(lambda kind=kind: ops.glu(gate, up, kind, backend="triton"), [gate, up], dy)
        on_card(lambda kind=kind: ops.glu(gate, up.detach(), kind, backend="triton"), [gate], dy)
        for layout in ("gate_first", "interleaved"):
            on_card(lambda k=kind, o=layout: ops.glu(packed, kind=k, layout=o, backend="triton"), [packed], dy)
    mask = torch.randn(shape[-1], device="cuda", dtype=dtype)
    for dim in (-1, 1):
        on_card(lambda dim=dim: ops.softmax(gate, dim, backend="triton"), [gate], dy)
    on_card(lambda: ops.log_softmax(gate, scale=0.5, mask=mask, backend="triton"), [gate], dy)
    on_card(
        lambda: ops.layer_norm_residual(gate, up, shape[-1], weight, bias, backend="triton"),
        [gate, up, weight, bias], like(gate, gate),
    )  # fmt: skip
    on_card(
        lambda: ops.rms_norm_residual(gate, up, shape[-1], weight, 1e-6, backend="triton"), [gate, up, weight],
        like(gate, gate),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [((32, 8), 128), ((5, 5), 40)])
def test_rotations_have_the_same_bits(on_card, heads, width, dtype):
    cos, sin = (t.cuda() for t in ops.rope_table(64, width))
    fused = leaf(2, 50, sum(heads), width, dtype=dtype).detach()
    q, k = (t.requires_grad_() for t in fused.split(heads, dim=2))
    weights = [leaf(width, dtype=dtype) for _ in range(2)]
    ids, ends = torch.randint(0, 64, (2, 50), device="cuda"), torch.tensor([3, 14], device="cuda")
    for options in ({}, {"interleaved": True}, {"position_ids": ids}, {"offset": ends}):
        dy = like(q, k)
        dy = tuple([torch.empty_like(t.detach().contiguous()).copy_(g) for t, g in zip((q, k), dy, strict=True)])
        on_card(lambda o=options: ops.rope(q, k, cos, sin, backend="triton", **o), [q, k], dy)
        on_card(
            lambda o=options: ops.qk_norm_rope(q, k, *weights, cos, sin, backend="triton", **o), [q, k, *weights], dy
        )


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(8, 512, 64, 512), (3, 77, 40, 100), (1, 3000, 32, 64)], ids=str)
@pytest.mark.parametrize("form", MLP_FORMS)
def test_per_head_mlps_have_the_same_bits(on_card, form, sizes):
    given, shared, reduce = MLP_FORMS[form]
    h, b, d, e = sizes
    leaves = {"x": leaf(b, d) if shared else leaf(h, b, d), "w1": leaf(h, d, e), "w2": leaf(h, e, d)}
    for name, shape in (("b1", (h, e)), ("b2", (h, d)), ("w_gate", (h, d, e))):
        if name in given.split():
            leaves[name] = leaf(*shape)
    dy = torch.randn((b, d) if reduce else (h, b, d), device="cuda", dtype=torch.bfloat16)
    on_card(lambda: mlp(leaves, reduce), [*leaves.values()], dy)


def same_elsewhere(function, leaves, dy):
    """Of a call that has plans: the same bits without gradients, on another stream and in a graph."""

    def run():
        y = function()
        return y.grad_fn.name(), [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    name, want = run()
    assert "Trinix" in name
    with torch.no_grad():
        same([function() for _ in range(4)], want[:1] * 4)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        same(run()[1], want)
        with torch.cuda.graph(graph, stream=stream):
            _, got = run()
    for t in got:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    same(got, want)


@pytest.fixture
def on_hopper(on_card, monkeypatch):
    """``on_card``, for calls one of whose launches at least is of boxes."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")

    def both(*call):
        kept, steps = _record.step_of_binary, []
        monkeypatch.setattr(_record, "step_of_binary", lambda *launch: steps.append(kept(*launch)) or steps[-1])
        on_card(*call)
        assert steps
        assert None not in steps

    return both


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("hopper", (8, 512, 64, 512)), ("hopper", (3, 77, 128, 72)), ("hopper", (2, 1000, 64, 264)),
        ("auto", (2, 300, 128, 1024)), ("auto", (16, 2048, 64, 1024)), ("auto", (12, 4096, 64, 768)),
        ("triton", (2, 300, 128, 1024)),
    ],
    ids=str,
)  # fmt: skip
def test_per_head_mlps_in_boxes_have_the_same_bits(on_hopper, backend, sizes):
    h, b, d, e = sizes
    dy = torch.randn((h, b, d), device="cuda", dtype=torch.bfloat16)
    for check in (on_hopper, same_elsewhere):  # the second with other tensors of the same layout
        leaves = {"x": leaf(h, b, d), "w1": leaf(h, d, e), "w2": leaf(h, e, d)}
        check(lambda leaves=leaves: mlp(leaves, None, backend), [*leaves.values()], dy)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["apart", "slices"])
@pytest.mark.parametrize(
    ("shape", "causal", "key_heads"),
    [((2, 200, 4, 64), True, 4), ((4, 256, 8, 64), False, 8), ((2, 1000, 3, 128), True, 3), ((1, 4096, 8, 64), False, 8),
     ((1, 700, 2, 256), True, 2), ((2, 1000, 8, 128), True, 2), ((1, 300, 6, 64), False, 2), ((1, 2048, 32, 128), True, 1)],
    ids=str,
)  # fmt: skip
def test_attention_has_the_same_bits(on_hopper, shape, causal, key_heads, how):
    b, n, h, d = shape
    heads = h, key_heads, key_heads
    dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    for check in (on_hopper, same_elsewhere):
        leaves = [leaf(b, n, sum(heads), d)] if how == "slices" else [leaf(b, n, one, d) for one in heads]

        def function(leaves=leaves):
            q, k, v = leaves[0].split(heads, dim=2) if how == "slices" else leaves
            return ops.attention(q, k, v, causal=causal, deterministic=True, backend="hopper")

        check(function, leaves, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["relu", "norm"])
def test_a_graph_and_another_stream_have_them_too(on_card, name):
    x, weight = leaf(512, 384), leaf(384)
    leaves = [x] if name == "relu" else [x, weight]
    dy = torch.randn_like(x)

    def function():
        return ops.relu(x, backend="triton") if name == "relu" else norm_of(x, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_card(function, leaves, dy)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = function()
            grads = torch.autograd.grad(y, leaves, dy)
        assert "Trinix" in y.grad_fn.name()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        stream.synchronize()
        on_card(function, leaves, dy)
        z = function()
        same([y, *grads], [z, *torch.autograd.grad(z, leaves, dy)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mish", "norm"])
def test_forward_alone_has_the_same_bits_in_a_graph_and_another_stream_too(on_card, name, monkeypatch):
    module, went = _native.module, []

    class Counting:
        def __getattr__(self, name):
            return getattr(module, name)

        def again(self, *call):
            y = module.again(*call)
            went.append(y is not None)
            return y

    x, weight = leaf(512, 384), leaf(384)
    x, weight = x.detach(), weight.detach()

    def function(x=x):
        return ops.mish(x, backend="triton") if name == "mish" else norm_of(x, weight)

    monkeypatch.setattr(_native, "module", None)
    want = function()
    monkeypatch.setattr(_native, "module", Counting())
    same([function() for _ in range(5)], [want] * 5)
    assert went[-1]
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            went.clear()
            same([function()], [want])
            assert went == [True]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    went.clear()
    with torch.cuda.graph(graph, stream=stream):
        y = function()
    assert went == [True]
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    same([y], [function()])
    results = []  # a thread begins without a context
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    same(results, [y])
    odd = torch.randn(512 * 384 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(512, 384)
    same([function(odd)], [function(odd.clone())])


@pytest.mark.gpu
def test_on_another_than_the_current_device(on_card):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    for index in (1, 0):
        x, weight = (t.to(f"cuda:{index}") for t in (torch.randn(64, 256), torch.randn(256)))
        want = torch.nn.functional.rms_norm(x, (256,), weight, 1e-6)
        for current in (0, 1, 0, 1, 1, 0, 0):
            with torch.cuda.device(current):
                got = ops.rms_norm(x, 256, weight, 1e-6, backend="triton")
                leaf = x.clone().requires_grad_()
                ops.mish(leaf, backend="triton").backward(want)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(
                leaf.grad, torch.autograd.grad(torch.nn.functional.mish(leaf), leaf, want)[0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.gpu
def test_what_lies_at_an_odd_address_goes_through_triton(on_card):
    leaves = leaf(64, 256), leaf(256)
    on_card(lambda: norm_of(*leaves), leaves, torch.randn_like(leaves[0]))
    x = torch.randn(64 * 256 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(64, 256).requires_grad_()
    y = norm_of(x, leaves[1])
    assert "Trinix" not in y.grad_fn.name()
    same([y], [norm_of(x.clone(), leaves[1])])
