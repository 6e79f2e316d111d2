"""The low-overhead launcher: which kept kernel a call goes to, and when it takes Triton's normal path.

First with a fake kernel on the CPU, which remembers what it was compiled for and refuses everything else; then, marked
``gpu``, the same list with a real kernel and its results.
"""

import contextlib
import ctypes
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from helpers import from_threads
from trinix.kernels import _binary, _noting
from trinix.kernels.triton import _launch
from trinix.kernels.triton._launch import Launcher

BLOCK, FACTOR, WARPS = 64, 3, 2


def _scale(src, dst, n, m: "i64", a: "fp32", FACTOR: tl.constexpr, BLOCK: tl.constexpr):  # noqa: F821
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    v = tl.load(src + i, mask=live).to(tl.float32) * FACTOR + a + m.to(tl.float32)
    tl.store(dst + i, v.to(dst.dtype.element_ty), mask=live)


def _scale_unbound(src, dst, n, m: "i64", a: "fp32", FACTOR: tl.constexpr, BLOCK: tl.constexpr):  # noqa: F821
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    v = tl.load(src + i, mask=live).to(tl.float32) * FACTOR + a + m.to(tl.float32) + A_GLOBAL
    tl.store(dst + i, v.to(dst.dtype.element_ty), mask=live)


A_GLOBAL = tl.constexpr(0)


# name -> (arguments of the first call, arguments that need another kernel)
OTHER_KERNELS = {
    "an int becomes 1": ({"n": 48}, {"n": 1}),
    "an int is no longer 1": ({"n": 1}, {"n": 48}),
    "an int becomes divisible by 16": ({"n": 47}, {"n": 48}),
    "an int is no longer divisible by 16": ({"n": 48}, {"n": 47}),
    "an int exceeds int32": ({"n": 48}, {"n": 2**31}),
    "an odd int exceeds int32": ({"n": 47}, {"n": 2**31 + 47}),
    "an int fits int32 again": ({"n": 2**31}, {"n": 48}),
    "the first dtype differs": ({}, {"dtypes": (torch.bfloat16, torch.float32)}),
    "the second dtype differs": ({}, {"dtypes": (torch.float32, torch.float16)}),
}
SAME_KERNEL = {
    "another multiple of 16": ({"n": 48}, {"n": 64}),
    "another number that is none": ({"n": 47}, {"n": 5}),
    "another int beyond int32": ({"n": 2**31}, {"n": 2**31 + 64}),
    "a pinned int becomes 1": ({"m": 5}, {"m": 1}),
    "a pinned int exceeds int32": ({"m": 5}, {"m": 2**40}),
    "another float": ({"a": 0.5}, {"a": 1.0}),
    "more blocks": ({"blocks": 2}, {"blocks": 3}),
}


@contextlib.contextmanager
def _hooked(chain, hook):
    chain.add(hook)
    try:
        yield
    finally:
        chain.remove(hook)


@contextlib.contextmanager
def _chain_replaced(name, hook):
    runtime = triton.knobs.runtime
    plain = getattr(runtime, name)
    mine = type(plain)()
    mine.add(hook)
    setattr(runtime, name, mine)
    try:
        yield
    finally:
        setattr(runtime, name, plain)


@contextlib.contextmanager
def _pre_run_hook(kernel, hook):
    kernel.pre_run_hooks.append(hook)
    try:
        yield
    finally:
        kernel.pre_run_hooks.remove(hook)


@contextlib.contextmanager
def _noted(hook):
    @contextlib.contextmanager
    def noting(*launch):
        hook(*launch)
        yield

    with _noting.noted_by(SimpleNamespace(noting=noting)):
        yield


# name -> context in which a launch has to be seen by ``hook``
HOOKS = {
    "a launch enter hook": lambda kernel, hook: _hooked(triton.knobs.runtime.launch_enter_hook, hook),
    "a launch exit hook": lambda kernel, hook: _hooked(triton.knobs.runtime.launch_exit_hook, hook),
    "another enter chain": lambda kernel, hook: _chain_replaced("launch_enter_hook", hook),
    "another exit chain": lambda kernel, hook: _chain_replaced("launch_exit_hook", hook),
    "a pre-run hook": _pre_run_hook,
    "a recorder of launches": lambda _, hook: _noted(hook),
}


# ---- with a fake kernel ------------------------------------------------------------------------------------------------


class FakeTensor:
    def __init__(self, dtype, address, card, device=None):
        self.dtype, self.address, self.card = dtype, address, card
        self.device = device or SimpleNamespace(type="cuda", index=card)

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.card


class FakeCompiled:
    """A binary for one specialisation. Launched with arguments of another it fails, as the card would answer wrongly."""

    def __init__(self, kernel, signature, specialization, **metadata):
        self.kernel, self.specialization = kernel, specialization
        self.function, self.packed_metadata = self, object()  # a handle leads the launchers below back here
        self.src = SimpleNamespace(signature=signature, fn=kernel)
        facts = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "launch_cooperative_grid": False}
        self.metadata = SimpleNamespace(**({"num_warps": WARPS, "shared": 1088} | facts | metadata))

    def run(self, *arguments):
        """Triton's launcher."""
        self.check(arguments[9:-2])
        self.kernel.log.append(("fast", self, arguments))

    def check(self, pointers_and_scalars):
        *pointers, n, _m, _a = pointers_and_scalars
        wanted = specialization(tuple(p % 16 == 0 for p in pointers), n)
        assert self.specialization == wanted, f"compiled for {self.specialization}, launched with {wanted}"


class FakeStaticLauncher:
    """PyTorch's launcher."""

    @staticmethod
    def _launch_kernel(function, *arguments):
        types, values = arguments[5:7]
        assert len(types) == len(values)
        function.check(values[:-2])
        function.kernel.log.append(("fast", function, arguments))


def specialization(aligned, n):
    """Triton's rule, written again."""
    return (*aligned, "constant 1" if n == 1 else n % 16 == 0, "i32" if -(2**31) <= n < 2**31 else "i64")


class FakeKernel:
    def __init__(self, **metadata):
        self.params = JITFunction(_scale, do_not_specialize=["m"]).params
        self.pre_run_hooks, self.used_global_vals, self.metadata, self.log = [], {}, metadata, []
        self.signature = {}  # what differs from the usual one

    def __getitem__(self, grid):
        def launch(*arguments, **constants_and_options):
            tensors, n = arguments[:-3], arguments[-3]
            self.log.append(("normal", grid, arguments, constants_and_options))
            special = specialization(tuple(t.data_ptr() % 16 == 0 for t in tensors), n)
            types = ["*fp32"] * len(tensors) + ["constexpr" if n == 1 else special[-1], "i64", "fp32"]
            names = [p.name for p in self.params]
            signature = dict(zip(names, [*types, "constexpr", "constexpr"], strict=True))
            return FakeCompiled(self, signature | self.signature, special, **self.metadata)

        return launch


class Rig:
    """``rig(n=48, ...)`` launches and says which path it took."""

    def __init__(self, kernel=None, device=None, tensors=2):
        self.kernel = kernel or FakeKernel()
        if tensors == 3:
            self.kernel.params = [SimpleNamespace(name="mask", is_constexpr=False), *self.kernel.params]
        self.launch = Launcher(self.kernel, tensors=tensors).bind(FACTOR=FACTOR, BLOCK=BLOCK, num_warps=WARPS)
        self.device, self.count = device, tensors

    def __call__(self, *, n=48, m=5, a=0.5, blocks=2, dtypes=(torch.float32,) * 2, addresses=(256, 512), card=0):
        extra = self.count - 2
        dtypes, addresses = dtypes + (torch.uint8,) * extra, addresses + (1024,) * extra
        self.tensors = tuple(FakeTensor(d, p, card, self.device) for d, p in zip(dtypes, addresses, strict=True))
        before = len(self.kernel.log)
        self.launch(blocks, self.tensors, (n, m, a))
        (entry,) = self.kernel.log[before:]  # one launch, no more and no less
        return entry[0]

    @property
    def last(self):
        return self.kernel.log[-1]

    @property
    def sent(self):
        """(blocks, stream, pointers and scalars) of the last launch, which was a fast one."""
        path, compiled, arguments = self.last
        assert path == "fast"
        if _launch._State.static and "constexpr" not in list(compiled.src.signature.values())[:-2]:
            grid, (_, _, _, values, stream) = arguments[:3], arguments[3:]
            assert values[-2:] == (None, None)
            return grid[0], stream, values[:-2]
        return arguments[0], arguments[3], arguments[9:-2]


@pytest.fixture(params=["PyTorch's launcher", "Triton's launcher"])
def fake_driver(request, monkeypatch):
    """The launcher as on a machine with one CUDA card, its self-check passed; yields the devices that were switched to."""
    switched = []

    @contextlib.contextmanager
    def switch(device):
        switched.append(device.index)
        yield

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_raw_stream", lambda card: 7000 + card)
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(_launch, "_static_launcher", FakeStaticLauncher)
    static = request.param == "PyTorch's launcher"
    for name, value in {"off": None, "checked": True, "many_devices": False, "static": static}.items():
        monkeypatch.setattr(_launch._State, name, value)
    return switched


@pytest.fixture
def rig(fake_driver):
    return Rig()


def test_the_first_call_takes_the_normal_path_with_every_constant_and_option(rig, fake_driver):
    assert rig() == "normal"
    _, grid, arguments, rest = rig.last
    assert grid == (2,)
    assert arguments == (*rig.tensors, 48, 5, 0.5)
    assert rest == {"FACTOR": FACTOR, "BLOCK": BLOCK, "num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
    assert fake_driver == [0]


def test_the_second_call_goes_straight_to_the_kept_kernel_with_the_exact_argument_list(rig, fake_driver):
    rig()
    assert rig(addresses=(1024, 2048), m=6, a=0.25, blocks=9) == "fast"
    _, compiled, arguments = rig.last
    handles = compiled.function, compiled.packed_metadata
    if _launch._State.static:
        # two scratch pointers of the binary that nothing uses
        assert arguments == (9, 1, 1, WARPS, 1088, "OOilfOO", (1024, 2048, 48, 6, 0.25, None, None), 7000)
    else:
        assert arguments == (9, 1, 1, 7000, *handles, None, None, None, 1024, 2048, 48, 6, 0.25, FACTOR, BLOCK)
    assert fake_driver == [0]  # nothing switched the device for the fast launch


def test_three_tensors_are_launched_as_two_are(fake_driver):
    rig = Rig(tensors=3)
    assert [rig(), rig(), rig(n=64), rig(n=1)] == ["normal", "fast", "fast", "normal"]
    assert rig() == "fast"
    assert rig.sent == (2, 7000, (256, 512, 1024, 48, 5, 0.5))
    assert rig(dtypes=(torch.float32, torch.float16)) == "normal"


@pytest.mark.parametrize("case", OTHER_KERNELS)
def test_a_call_that_triton_would_specialise_otherwise_gets_its_own_kernel(case, rig):
    one, other = OTHER_KERNELS[case]
    assert [rig(**one), rig(**one)] == ["normal", "fast"]
    first = rig.last[1]
    assert [rig(**other), rig(**other)] == ["normal", "fast"]
    assert rig.last[1] is not first
    assert rig(**one) == "fast"
    assert rig.last[1] is first


def test_another_device_gets_its_own_kernel_and_its_own_stream(rig, fake_driver):
    rig()
    assert [rig(card=1), rig(card=1)] == ["normal", "fast"]
    assert rig.sent[1] == 7001
    assert fake_driver == [0, 1]


@pytest.mark.parametrize("case", SAME_KERNEL)
def test_a_call_that_triton_would_specialise_alike_goes_fast_with_its_own_values(case, rig):
    one, other = SAME_KERNEL[case]
    assert [rig(**one), rig(**other)] == ["normal", "fast"]
    sent = {"n": 48, "m": 5, "a": 0.5, "blocks": 2} | other
    assert rig.sent == (sent["blocks"], 7000, (256, 512, sent["n"], sent["m"], sent["a"]))


@pytest.mark.parametrize("addresses", [(260, 512), (256, 520), (257, 513)])
def test_a_misaligned_pointer_takes_the_normal_path_and_leaves_no_kernel_behind(addresses, rig):
    assert [rig(addresses=addresses), rig(addresses=addresses)] == ["normal", "normal"]
    assert not rig.launch.keep
    assert [rig(), rig(), rig(addresses=addresses), rig()] == ["normal", "fast", "normal", "fast"]


def test_a_known_kernel_on_the_normal_path_waits_for_no_other_thread(rig):
    """Its launch may itself wait for room in a queue, behind work that another thread has yet to launch."""
    done = []
    rig(addresses=(260, 512))
    with _launch._lock:
        other = threading.Thread(target=lambda: done.append(rig(addresses=(260, 512))), daemon=True)
        other.start()
        other.join(20)
        assert done == ["normal"]
        new = threading.Thread(target=lambda: done.append(rig(addresses=(260, 520))), daemon=True)
        new.start()
        new.join(0.2)
        assert done == ["normal"], "one that is new is compiled by one thread at a time"
    new.join(20)
    assert done == ["normal", "normal"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_sends_launches_to_the_normal_path_as_long_as_it_stays(name, rig):
    rig()
    with HOOKS[name](rig.kernel, lambda *_, **__: None):
        assert [rig(), rig()] == ["normal", "normal"]
    assert rig() == "fast"


def repeated(rig, n=48, a=0.5, blocks=2, card=0):
    return rig.launch.repeated(blocks, (n, 5, a), card, (torch.float32,) * 2)


def test_a_repeated_launch_takes_what_a_call_has_kept(rig):
    assert not repeated(rig).at((256, 512)), "nothing is kept yet"
    rig()
    assert repeated(rig, a=0.25, blocks=9).at((256, 512))
    assert rig.sent == (9, 7000, (256, 512, 48, 5, 0.25))
    count = len(rig.kernel.log)
    assert not repeated(rig).at((256, 520)), "not aligned"
    assert not repeated(rig).at((264, 512)), "not aligned"
    assert not repeated(rig, n=47).at((256, 512)), "another binary"
    assert not repeated(rig, card=1).at((256, 512)), "another card"
    for put in HOOKS.values():
        with put(rig.kernel, lambda *_, **__: None):
            assert not repeated(rig).at((256, 512)), "a hook"
    assert len(rig.kernel.log) == count
    repeated(rig).of(*rig.tensors)
    assert rig.sent == (2, 7000, (256, 512, 48, 5, 0.5))


@pytest.fixture
def two_devices(fake_driver, monkeypatch):
    """The launcher as on a machine with two cards; yields the current one, in a list, and the devices that were switched to."""
    current = [0]

    @contextlib.contextmanager
    def switch(device):
        before, current[0] = current[0], getattr(device, "index", device)
        fake_driver.append(current[0])
        yield
        current[0] = before

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(_launch._State, "many_devices", True)
    return current, fake_driver


def test_a_repeated_launch_leaves_a_card_that_is_not_current_to_the_normal_path(two_devices):
    rig = Rig()
    rig(card=1)
    assert not repeated(rig, card=1).at((256, 512))
    two_devices[0][0] = 1
    assert repeated(rig, card=1).at((256, 512))


def test_a_tensor_on_another_device_than_the_current_one_is_launched_there(two_devices, monkeypatch):
    current, switched = two_devices
    rig, at = Rig(), []
    monkeypatch.setattr(FakeCompiled, "check", lambda *_: at.append(current[0]))
    assert [rig(), rig(card=1)] == ["normal", "normal"]
    assert switched == [0, 1]
    assert [rig(), rig(card=1)] == ["fast", "fast"]
    assert rig.sent[1] == 7001
    current[0] = 1
    assert [rig(), rig(card=1)] == ["fast", "fast"]
    assert at == [0, 1, 0, 1]  # the kernel's device was the current one at every launch
    assert switched == [0, 1, 1, 0]  # and nothing was switched where it was already
    assert current == [1]


class Alone:
    """Something that no two threads may be in: Triton sets a new kernel's launcher before it has loaded the function."""

    def __init__(self):
        self.inside, self.together = 0, False

    def __enter__(self):
        self.inside += 1
        self.together |= self.inside > 1
        time.sleep(0.01)

    def __exit__(self, *_):
        self.inside -= 1


def test_threads_compile_a_kernel_one_after_the_other(fake_driver):
    kernel, alone = FakeKernel(), Alone()
    launch = Launcher(kernel, tensors=2).bind(FACTOR=FACTOR, BLOCK=BLOCK, num_warps=WARPS)
    tensors = tuple(FakeTensor(torch.float32, p, 0) for p in (256, 512))

    class Slow:
        def __getitem__(self, grid):
            inner = kernel[grid]

            def launch(*arguments, **more):
                with alone:
                    return inner(*arguments, **more)

            return launch

        def __getattr__(self, name):
            return getattr(kernel, name)

    launch.kernel = Slow()
    from_threads(*[lambda: launch(2, tensors, (48, 5, 0.5))] * 4)
    assert not alone.together
    assert len(kernel.log) == 4
    launch(2, tensors, (48, 5, 0.5))
    assert kernel.log[-1][0] == "fast"


def test_threads_load_a_binary_of_hoppers_one_after_the_other(monkeypatch):
    alone, launched = Alone(), []

    class Compiled:  # one for all, as Triton keeps them
        function, packed_metadata = None, ()
        metadata = SimpleNamespace(global_scratch_size=1, tensordesc_meta=None)

        @property
        def run(self):
            if self.function is None:
                with alone:
                    self.function = 5
            return lambda *arguments: launched.append(arguments)

    compiled = Compiled()
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    kernel = SimpleNamespace(run=lambda *bound, **more: compiled)
    from_threads(*[lambda: _binary.Binary(kernel, 0, (1,), {})(3, 7000, (2,))] * 4)
    assert not alone.together
    assert len(launched) == 4


def test_a_binary_of_hoppers_is_launched_on_its_device(monkeypatch):
    current, at = [0], []

    @contextlib.contextmanager
    def switch(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    metadata = SimpleNamespace(global_scratch_size=1, tensordesc_meta=None)
    compiled = SimpleNamespace(
        metadata=metadata, function=5, packed_metadata=(), run=lambda *arguments: at.append(current[0])
    )
    kernel = SimpleNamespace(run=lambda *bound, **more: at.append(("compiled", current[0])) or compiled)
    binary = _binary.Binary(kernel, 1, (1,), {})
    for current[0] in (0, 1):
        binary(3, 7000, (2,))
    assert at == [("compiled", 1), 1, 1]
    assert current == [1]


@pytest.mark.parametrize(
    "metadata",
    [
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
    ],
    ids=str,
)
def test_a_kernel_that_the_short_argument_list_cannot_launch_is_not_kept(metadata, fake_driver):
    rig = Rig(FakeKernel(**metadata))
    assert [rig(), rig(), rig()] == ["normal"] * 3


def test_a_kernel_that_reads_globals_is_not_kept(rig):
    rig.kernel.used_global_vals = {("A", 0): (1, {})}
    assert [rig(), rig(), rig()] == ["normal"] * 3


@pytest.mark.parametrize("signature", [{"m": "u64"}, {"a": "fp64"}, {"n": "i1"}], ids=str)
def test_a_type_that_pytorchs_launcher_lacks_goes_through_tritons(signature, rig):
    rig.kernel.signature = signature
    assert [rig(), rig()] == ["normal", "fast"]
    assert len(rig.last[2]) == 9 + 5 + 2  # CompiledKernel.run's list


def test_an_int_that_became_a_constant_goes_through_tritons_launcher(rig):
    assert [rig(n=1), rig(n=1)] == ["normal", "fast"]
    assert rig.last[2][9:] == (256, 512, 1, 5, 0.5, FACTOR, BLOCK)


def test_a_binary_without_scratch_parameters_is_passed_none(rig, monkeypatch):
    monkeypatch.setattr(_launch._State, "static", True)
    compiled = FakeCompiled(rig.kernel, {"src": "*fp32", "n": "i32"}, (True, True, "i32"))
    rig.kernel.params = rig.kernel.params[:1] + rig.kernel.params[2:3]
    del compiled.metadata.global_scratch_size, compiled.metadata.profile_scratch_size
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch._static_launcher, "_launch_kernel", lambda *arguments: sent.extend(arguments))
        _launch._fire(compiled, ())(3, 7000, (256, 48))
    assert sent == [compiled, 3, 1, 1, WARPS, 1088, "Oi", (256, 48), 7000]


def test_a_kernel_that_may_start_early_goes_through_tritons_launcher_which_knows_the_attribute(fake_driver):
    rig = Rig(FakeKernel(launch_pdl=True))
    assert [rig(), rig()] == ["normal", "fast"]
    assert len(rig.last[2]) == 9 + 5 + 2  # CompiledKernel.run's list
    plain = Launcher(rig.kernel, tensors=2).bind(FACTOR=FACTOR, BLOCK=BLOCK)
    early = Launcher(rig.kernel, tensors=2).bind(FACTOR=FACTOR, BLOCK=BLOCK, launch_pdl=True)
    assert "launch_pdl" not in plain.options  # drivers that do not know the option refuse it
    assert early.options["launch_pdl"] is True


@pytest.mark.parametrize("pdl", [True, False])
def test_tritons_c_function_is_given_what_its_launcher_gives_it(pdl, monkeypatch):
    from triton.backends.nvidia.driver import CudaLauncher

    sent = []
    run = object.__new__(CudaLauncher)
    vars(run).update(
        launch=lambda *arguments: sent.append(arguments), num_ctas=1, launch_cooperative_grid=False, launch_pdl=pdl,
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
    )  # fmt: skip
    if triton.__version__.startswith("3.7."):
        run.arg_annotations, run.kernel_signature = [], b""
    function, packed = 5000, (WARPS, 1, 1088)
    for version in (triton.__version__, "4.0.0"):  # of the second nothing is known
        monkeypatch.setattr(triton, "__version__", version)
        _launch._tritons_fire(function, run, packed, (FACTOR, BLOCK))(9, 7000, (256, 512, 48, 5, 0.5))
    run(9, 1, 1, 7000, function, packed, None, None, None, 256, 512, 48, 5, 0.5, FACTOR, BLOCK)
    assert len(sent) == 3
    assert sent[0] == sent[1] == sent[2]


@pytest.mark.parametrize("facts", [(False, False), (True, False), (False, True)], ids=str)
def test_launches_with_descriptors_have_the_attributes_that_triton_gives_them(facts):
    """Programs that wait for one another have to be there at once: without the attribute those of two streams need not be."""
    from triton.backends.nvidia.driver import CudaLauncher

    sent = []
    run = object.__new__(CudaLauncher)
    vars(run).update(
        launch=lambda *arguments: sent.append(arguments), num_ctas=1, launch_cooperative_grid=facts[0], launch_pdl=facts[1],
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
    )  # fmt: skip
    if triton.__version__.startswith("3.7."):
        run.arg_annotations, run.kernel_signature = [], b""
    compiled = SimpleNamespace(function=5000, packed_metadata=(WARPS, 1, 1088), metadata=run)
    _binary._direct(compiled, run, (FACTOR, BLOCK))(9, 1, 1, 7000, (256, 512, 48, 5, 0.5))
    run(9, 1, 1, 7000, 5000, (WARPS, 1, 1088), None, None, None, 256, 512, 48, 5, 0.5, FACTOR, BLOCK)
    assert sent[0] == sent[1]


def test_a_launch_that_gives_no_kernel_back_is_not_kept(rig):
    assert not _launch._keepable(rig.kernel, None)


@pytest.mark.parametrize("reason", ["TRINIX_FAST_LAUNCH=0", "TRITON_INTERPRET is set"])
def test_switched_off_every_launch_takes_the_normal_path(reason, rig, monkeypatch):
    monkeypatch.setattr(_launch._State, "off", reason)
    assert [rig(), rig(), rig()] == ["normal"] * 3
    assert _launch.status() == f"off: {reason}"


@pytest.mark.parametrize("constants", [{"BLOCK": BLOCK, "FACTOR": FACTOR}, {"FACTOR": FACTOR}, {}], ids=str)
def test_constants_out_of_the_signatures_order_are_a_mistake_of_ours(constants, rig):
    with pytest.raises(AssertionError):
        Launcher(rig.kernel, tensors=2).bind(**constants)


def test_scalars_that_triton_looks_at_are_in_the_key():
    def kernel(n, free, m: "i32", k: "i64", a: "fp32", b: "bf16"):  # noqa: F821
        pass

    params = JITFunction(kernel, do_not_specialize=["free", "k"]).params
    assert [_launch._is_pinned(p) for p in params] == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "n", [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**62]
)
def test_the_class_of_an_int_is_tritons(n):
    native = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    from triton.backends.compiler import BaseBackend

    numbers = [0, 1, 3, 16, -16, -3, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40, 2**40 + 1]
    for other in numbers:
        ours = _launch._int_class(n) == _launch._int_class(other)
        tritons = [native(BaseBackend, v, False, True, True) for v in (n, other)]
        assert not ours or tritons[0] == tritons[1], (n, other)  # one key, one binary
        assert ours or tritons[0] != tritons[1], (n, other)  # and no binary kept twice


# ---- the switch and the self-check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"TRINIX_FAST_LAUNCH": "0"}, "off: TRINIX_FAST_LAUNCH=0"),
        ({"TRITON_INTERPRET": "1"}, "off: TRITON_INTERPRET is set"),
        ({"TRITON_INTERPRET": "1", "TRINIX_FAST_LAUNCH": "0"}, "off: TRINIX_FAST_LAUNCH=0"),
    ],
)
def test_the_environment_switches_fast_launches_off_and_status_says_so(environment, status, forked_process):
    code = f"import os; os.environ |= {environment}; from trinix.kernels.triton import _launch; print(_launch.status())"
    assert forked_process(code) == status


def test_fast_launches_are_off_where_the_driver_or_a_debug_mode_needs_the_normal_path(monkeypatch):
    monkeypatch.delenv("TRINIX_FAST_LAUNCH", raising=False)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    assert _launch._initial_reason() is None
    monkeypatch.setenv("TRINIX_FAST_LAUNCH", "1")
    assert _launch._initial_reason() is None
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = True
        assert "debug" in _launch._initial_reason()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.instrumentation_mode = "consan"
        assert "instrumentation" in _launch._initial_reason()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "HIP" in _launch._initial_reason()


def test_an_interpreted_kernel_runs_right_and_is_never_kept():
    if not _launch.INTERPRETED:
        pytest.skip("Triton's interpreter is off in this process")
    launch = Launcher(triton.jit(_scale), tensors=2).bind(FACTOR=FACTOR, BLOCK=BLOCK, num_warps=WARPS)
    for n in (48, 48, 1, 47):
        src, dst = torch.arange(128.0), torch.full((128,), -1.0)
        launch(2, (src, dst), (n, 5, 0.5))
        assert torch.equal(dst, torch.where(torch.arange(128) < n, src * FACTOR + 5.5, -1.0))
    assert not launch.keep
    assert _launch.status().startswith("off: ")


def test_the_interpreter_rounds_to_bfloat16_as_a_card_does():
    if not _launch.INTERPRETED:
        pytest.skip("Triton's interpreter is off in this process")
    launch = Launcher(triton.jit(_scale), tensors=2).bind(FACTOR=1, BLOCK=BLOCK, num_warps=WARPS)
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00008001, 0x7F800000, 0x7F800001]
    )
    src = torch.cat([bits, bits + 2**31]).to(torch.uint32).view(torch.float32)  # ties, largest, subnormal, inf, NaN; -
    dst = torch.empty(16, dtype=torch.bfloat16)
    launch(1, (src, dst), (16, 0, 0.0))
    torch.testing.assert_close(dst, src.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _product(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


def test_the_interpreter_rounds_a_product_once():
    """Whatever the order of adding: in float32 1e8 + 1 is 1e8."""
    if not _launch.INTERPRETED:
        pytest.skip("Triton's interpreter is off in this process")
    a, b, out = torch.ones(16, 16), torch.ones(16, 16), torch.empty(16, 16)
    a[:, 3], a[:, 11] = 1e8, -1e8
    _product[(1,)](a, b, out)
    torch.testing.assert_close(out, torch.full((16, 16), 14.0), rtol=0, atol=0)


class FakeProbe:
    """Stands in for the probe kernel: right on the normal path; on the fast one as PyTorch's and Triton's launchers are
    told to be."""

    def __init__(self, static, run):
        self.static, self.run = static, run

    def __getitem__(self, grid):
        return self.launch

    def launch(self, src, dst, n, FACTOR, BLOCK):
        dst[:n] = src[:n] * FACTOR
        params = [SimpleNamespace(is_constexpr=c) for c in (False, False, False, True, True)]
        signature = dict(zip("sdnFB", ["*fp32", "*fp32", "i32", "constexpr", "constexpr"], strict=True))
        return SimpleNamespace(
            run=lambda *arguments: self.run(*arguments[9:12]),
            function=self,
            packed_metadata=None,
            metadata=SimpleNamespace(num_warps=4, shared=0, global_scratch_size=0, profile_scratch_size=0),
            src=SimpleNamespace(signature=signature, fn=SimpleNamespace(params=params)),
        )


def right(src, dst, n):
    source, result = ((ctypes.c_float * n).from_address(pointer) for pointer in (src, dst))
    for i in range(n):
        result[i] = source[i] * 3


def one_element_short(src, dst, n):
    right(src, dst, n - 1)


def wrong_signature(*_):
    raise TypeError("function takes exactly 10 arguments (14 given)")


@pytest.fixture
def unchecked(fake_driver, monkeypatch):
    """The self-check lies ahead; yields a rig whose tensors say that they are on the CPU, where the check can run."""
    monkeypatch.setattr(_launch._State, "checked", False)
    launcher = SimpleNamespace(_launch_kernel=lambda probe, *arguments: probe.static(*arguments[6][:3]))
    monkeypatch.setattr(_launch, "_static_launcher", launcher)
    monkeypatch.setattr(_launch, "_raw_stream", lambda index: 7000)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return Rig(device=torch.device("cpu"))


def launcher_in_use():
    return "PyTorch's launcher" if _launch._State.static else "Triton's launcher"


def test_a_self_check_that_agrees_turns_fast_launches_on(unchecked, monkeypatch):
    monkeypatch.setattr(_launch, "_probe", FakeProbe(right, right))
    assert _launch.status() == f"on, through {launcher_in_use()}, self-check at the first launch"
    static = _launch._State.static
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unchecked() == "normal"
    assert _launch.status() == f"on, through {launcher_in_use()}, self-check passed"
    assert _launch._State.static is static
    assert _launch._State.many_devices
    monkeypatch.setattr(_launch, "_probe", None)  # once in a process
    assert unchecked(n=47) == "normal"
    assert len(unchecked.launch.keep) == 2


@pytest.mark.parametrize("wrong", [one_element_short, wrong_signature])
def test_where_only_pytorchs_launcher_disagrees_tritons_is_used(wrong, unchecked, monkeypatch):
    monkeypatch.setattr(_launch, "_probe", FakeProbe(wrong, right))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [unchecked(), unchecked()] == ["normal", "fast"]
    assert _launch.status() == "on, through Triton's launcher, self-check passed"
    assert len(unchecked.last[2]) == 9 + 5 + 2  # CompiledKernel.run's list


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(one_element_short, "the probe kernel gave another result"), (wrong_signature, "does not take the call")],
)
def test_a_self_check_that_disagrees_warns_once_and_leaves_the_normal_path(wrong, reason, unchecked, monkeypatch):
    monkeypatch.setattr(_launch, "_probe", FakeProbe(wrong, wrong))
    with pytest.warns(UserWarning, match=f"fast launches are off.*{reason}") as seen:
        assert [unchecked(), unchecked(), unchecked(n=47)] == ["normal"] * 3
    assert len(seen) == 1
    assert not unchecked.launch.keep
    assert _launch.status().startswith("off: ")
    assert reason in _launch.status()


def test_during_stream_capture_the_self_check_waits(unchecked, monkeypatch):
    monkeypatch.setattr(_launch, "_probe", None)  # touching it would raise
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [unchecked(), unchecked()] == ["normal", "normal"]
    assert _launch.status().endswith("self-check at the first launch")
    assert not unchecked.launch.keep
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "_probe", FakeProbe(right, right))
    assert unchecked() == "normal"
    assert _launch.status().endswith("self-check passed")
    assert len(unchecked.launch.keep) == 1


# ---- the tests can fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in OTHER_KERNELS if " int " in c])
@pytest.mark.parametrize("broken", ["_int_class", "_is_pinned"])
def test_a_key_without_the_int_launches_the_wrong_kernel_and_is_caught(broken, case, fake_driver, monkeypatch):
    monkeypatch.setattr(_launch, broken, {"_int_class": lambda value: 0, "_is_pinned": lambda param: True}[broken])
    rig = Rig()
    one, other = OTHER_KERNELS[case]
    rig(**one)
    with pytest.raises(AssertionError, match="compiled for"):
        rig(**other)


# ---- with a real kernel, on the card -----------------------------------------------------------------------------------

gpu = pytest.mark.gpu
SIZE = 4 * BLOCK


class Card:
    """``card(n=48, ...)`` launches the real kernel, compares its result, and says which path it took."""

    def __init__(self, monkeypatch, function=_scale):
        self.kernel = triton.jit(function, do_not_specialize=["m"])
        self.launch = Launcher(self.kernel, tensors=2).bind(FACTOR=FACTOR, BLOCK=BLOCK, num_warps=WARPS)
        self.normal = 0
        plain = _launch.Launch._normal

        def counting(launch, *arguments):
            self.normal += launch is self.launch
            plain(launch, *arguments)

        monkeypatch.setattr(_launch.Launch, "_normal", counting)

    def __call__(self, *, n=48, m=5, a=0.5, blocks=2, dtypes=(torch.float32,) * 2, offset=(0, 0), card=0):
        device = f"cuda:{card}"
        src = torch.arange(SIZE + 8, device=device).remainder(61).to(dtypes[0])[offset[0] :][:SIZE]
        dst = torch.full((SIZE + 8,), -1.0, device=device, dtype=dtypes[1])[offset[1] :][:SIZE]
        before = self.normal
        self.launch(blocks, (src, dst), (n, m, a))
        self.check(src, dst, n, m, a, blocks)
        return "normal" if self.normal > before else "fast"

    def check(self, src, dst, n=48, m=5, a=0.5, blocks=2):
        i = torch.arange(SIZE, device=src.device)
        wanted = (src.float() * FACTOR + a + torch.tensor(float(m), device=src.device)).to(dst.dtype)
        wanted = torch.where((i < n) & (i < blocks * BLOCK), wanted, -1.0)
        torch.testing.assert_close(dst, wanted)


@pytest.fixture(params=["the launcher in use", "Triton's launcher"])
def card(request, monkeypatch):
    if request.param == "Triton's launcher":
        monkeypatch.setattr(_launch._State, "static", False)
    return Card(monkeypatch)


@gpu
def test_on_the_card_fast_launches_are_on():
    """Or every test below passes by the normal path."""
    from trinix.ops import silu

    for _ in range(2):
        silu(torch.ones(8, device="cuda"), backend="triton")
    assert _launch.status() in [f"on, through {name} launcher, self-check passed" for name in ("PyTorch's", "Triton's")]


@gpu
@pytest.mark.parametrize("case", OTHER_KERNELS)
def test_on_the_card_another_specialisation_gets_its_own_kernel(case, card):
    one, other = OTHER_KERNELS[case]
    assert [card(**one), card(**one)] == ["normal", "fast"]
    assert [card(**other), card(**other)] == ["normal", "fast"]
    assert card(**one) == "fast"


@gpu
@pytest.mark.parametrize("case", SAME_KERNEL)
def test_on_the_card_the_same_specialisation_goes_fast(case, card):
    one, other = SAME_KERNEL[case]
    assert [card(**one), card(**other)] == ["normal", "fast"]


@gpu
@pytest.mark.parametrize("offset", [(1, 0), (0, 1), (3, 2)])
def test_on_the_card_a_misaligned_pointer_takes_the_normal_path(offset, card):
    assert [card(offset=offset), card(offset=offset), card(), card()] == ["normal", "normal", "normal", "fast"]
    assert [card(offset=offset), card(offset=(4, 4))] == ["normal", "fast"]


@gpu
@pytest.mark.parametrize("name", HOOKS)
def test_on_the_card_a_hook_sees_every_launch(name, card):
    seen = []
    card()
    with HOOKS[name](card.kernel, lambda *arguments, **_: seen.append(len(arguments))):
        assert [card(), card()] == ["normal", "normal"]
    assert len(seen) == 2
    assert card() == "fast"
    assert len(seen) == 2


@gpu
def test_on_the_card_a_kernel_that_reads_globals_takes_the_normal_path(monkeypatch):
    card = Card(monkeypatch, _scale_unbound)
    assert [card(), card(), card()] == ["normal"] * 3


@gpu
def test_on_the_card_switched_off_every_launch_takes_the_normal_path(card, monkeypatch):
    card()
    monkeypatch.setattr(_launch._State, "off", "a test")
    other = Card(monkeypatch)
    assert [other(), other()] == ["normal", "normal"]


@gpu
def test_on_the_card_the_environment_switches_fast_launches_off(fresh_process):
    code = (
        "import torch, trinix; from trinix.kernels.triton import _launch, activation as kernels\n"
        "x = torch.randn(1000, device='cuda')\n"
        "for _ in range(3): assert torch.equal(trinix.ops.relu(x, backend='triton'), x.relu())\n"
        "print(_launch.status(), len(kernels.flat_launches('relu', x.dtype)[1].keep))"
    )
    assert fresh_process(code, TRINIX_FAST_LAUNCH="0") == "off: TRINIX_FAST_LAUNCH=0 0"
    assert fresh_process(code).endswith("self-check passed 1")


@gpu
def test_on_the_card_another_device_is_served_there(card):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA GPU, this machine has {torch.cuda.device_count()}")
    assert [card(), card(card=1)] == ["normal", "normal"]
    assert [card(), card(card=1)] == ["fast", "fast"]
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert [card(), card(card=1)] == ["fast", "fast"]


@gpu
def test_on_the_card_a_self_check_that_disagrees_warns_and_results_stay_right(card, monkeypatch):
    monkeypatch.setattr(_launch._State, "checked", False)
    for name in ("off", "static"):  # set again, so that they are restored
        monkeypatch.setattr(_launch._State, name, getattr(_launch._State, name))
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.warns(UserWarning, match="fast launches are off"):
        assert [card(), card()] == ["normal", "normal"]
    assert _launch.status().startswith("off: the probe kernel gave another result")


@gpu
def test_on_the_card_a_self_check_waits_for_the_end_of_a_capture(card, monkeypatch):
    card()  # compiled, so that the capture only launches
    card.launch.keep.clear()
    monkeypatch.setattr(_launch._State, "checked", False)
    src, dst = (torch.zeros(SIZE, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        card.launch(2, (src, dst), (48, 5, 0.5))
    assert not card.launch.keep
    assert _launch.status().endswith("self-check at the first launch")
    assert [card(), card()] == ["normal", "fast"]
    assert _launch.status().endswith("self-check passed")
    src.copy_(torch.arange(SIZE))
    dst.fill_(-1.0)
    graph.replay()
    card.check(src, dst)


@gpu
@pytest.mark.parametrize("offset", [0, 1])
def test_on_the_card_a_captured_launch_replays_on_new_data(offset, card):
    assert [card(), card()] == ["normal", "fast"]
    src, dst = (torch.zeros(SIZE + 1, device="cuda")[offset:][:SIZE] for _ in range(2))
    card(offset=(offset, offset))
    graph = torch.cuda.CUDAGraph()
    before = card.normal
    with torch.cuda.graph(graph):
        card.launch(2, (src, dst), (48, 5, 0.5))
    assert card.normal - before == offset  # a misaligned pointer went the normal way, the other one fast
    for step in (1, 7):
        src.copy_(torch.arange(SIZE) * step)
        dst.fill_(-1.0)
        graph.replay()
        card.check(src, dst)


@gpu
def test_on_the_card_a_launch_goes_to_the_current_stream(card):
    card()
    src, dst = torch.zeros(SIZE, device="cuda"), torch.full((SIZE,), -1.0, device="cuda")
    values = torch.arange(SIZE, device="cuda").float()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        src.copy_(values)
        before = card.normal
        card.launch(2, (src, dst), (48, 5, 0.5))
    assert card.normal == before
    side.synchronize()
    card.check(values, dst)


@gpu
def test_on_the_card_a_key_without_the_int_gives_wrong_numbers(card, monkeypatch):
    monkeypatch.setattr(_launch, "_int_class", lambda value: 0)
    assert card(n=1) == "normal"
    with pytest.raises(AssertionError):  # the kernel for n = 1 writes one element
        card(n=48)
