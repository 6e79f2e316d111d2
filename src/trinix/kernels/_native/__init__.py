"""Kept launches without Python (native.cpp), compiled on the user's machine against the PyTorch that is installed there.

A call through Python's ``autograd.Function`` costs the host more than both passes of eager's relu; the same from a C++ node does not.
The module is optional: where there is no compiler, or with ``TRINIX_NATIVE=0``, everything runs as before, with the same kernels.

It is built once for a PyTorch and a Python (about 30 seconds of one core), into $TRINIX_CACHE or ~/.cache/trinix: in the background
by the first process whose calls would use it, or at once by ``python -m trinix.kernels._native``. A build is written whole or not
at all, and only after it has run without a card in a process of its own.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time

import torch

SOURCE = pathlib.Path(__file__).with_name("native.cpp")
_NAME = "trinix_native"  # as in PyInit_
_LONGEST_BUILD_S = 600
_MOST_TRIES, _MOST_KINDS = 20, 2_000

module = None  # of this process, once it is loaded
_asked = False  # whether this process has looked for it


def cache_folder() -> pathlib.Path:
    root = os.environ.get("TRINIX_CACHE")
    if root:
        return pathlib.Path(root)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "trinix"


def library() -> pathlib.Path:
    """Where the built module lies, or would."""
    made_of = "\n".join((SOURCE.read_text(), torch.__version__, sys.version, sysconfig.get_platform()))
    return cache_folder() / f"{_NAME}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def missing() -> str | None:
    """Why C++ launches cannot be used here, or None."""
    if os.environ.get("TRINIX_NATIVE") == "0":
        return "are switched off by TRINIX_NATIVE=0"
    if not sys.platform.startswith("linux"):
        return f"are built for Linux only, not for {sys.platform}"
    try:
        if library().exists():
            return None
    except (OSError, RuntimeError) as error:  # a home that is another user's, or none at all
        return _no_folder(error)
    if compiler() is None:
        return "need a C++ compiler: $CXX, g++ or clang++"
    if not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "need Python's headers (Python.h)"
    return None


def _no_folder(error: Exception) -> str:
    return f"have no folder to be kept in ({error}); $TRINIX_CACHE names one"


def describe() -> str:
    """For ``trinix doctor``."""
    return missing() or ("are built" if library().exists() else "can be built")


def build() -> pathlib.Path:
    """Compile and check; the path of the module. RuntimeError with the compiler's words where that fails."""
    reason = missing()
    if reason:
        raise RuntimeError(f"C++ launches {reason}")
    path = library()
    if path.exists():
        return path
    root = pathlib.Path(torch.__file__).parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part.so")
    except OSError as error:
        raise RuntimeError(f"C++ launches {_no_folder(error)}") from None
    os.close(handle)
    try:
        run = subprocess.run(
            [
                compiler(), "-O2", "-shared", "-fPIC", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}",
                str(SOURCE), "-o", name, f"-L{root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10",
                # a C++ library that the compiler links in must not meet PyTorch's
                f"-Wl,-rpath,{root / 'lib'}", "-Wl,--exclude-libs,ALL",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise RuntimeError(f"C++ launches: {compiler()} failed:\n{run.stderr[-4000:]}")
        command = [sys.executable, "-m", "trinix.kernels._native", "--check", name]
        run = subprocess.run(command, capture_output=True, text=True, env=_environment())
        if run.returncode:
            raise RuntimeError(
                f"C++ launches: what {compiler()} built does not run (status {run.returncode}):\n{run.stderr[-4000:]}"
            )
        os.replace(name, path)
    finally:
        pathlib.Path(name).unlink(missing_ok=True)
    return path


def _environment() -> dict:
    """So that another process finds the same trinix."""
    root = pathlib.Path(__file__).parents[3]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}


def check(path: str) -> None:
    """Both passes and an error of a built module, without a card."""
    built = _import(path)
    built.set_doubling_driver()
    flat = (3,), (1,), torch.float32

    def pair(function):
        described = bytes(127) + b"\7"
        step = function, (1, 1, 1), 1, 0, False, ((0, described), 1, (3).to_bytes(4, sys.byteorder))
        plan = (flat,), (step,)
        return built.make_pair(torch.empty(1), plan, plan, (1,), (), (flat,), (1,), None)

    # a step of backward reads tensor 0, which is the gradient, for nothing was saved
    x = torch.arange(3.0, requires_grad=True)
    y = built.call(pair(1), 0, x)
    (dx,) = torch.autograd.grad(y, x, torch.ones(3))
    if y.tolist() != [0, 2, 4] or dx.tolist() != [2, 2, 2]:
        raise RuntimeError(f"wrong results: {y.tolist()}, {dx.tolist()}")
    try:
        built.call(pair(2), 0, x)
    except RuntimeError as error:
        if "error 98" in str(error):
            return
        raise
    raise RuntimeError("a launch that failed was not noticed")


def _import(path):
    spec = importlib.util.spec_from_file_location(_NAME, path)
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


def _load():
    """The built module with CUDA's functions."""
    built = _import(library())
    cuda = ctypes.CDLL("libcuda.so.1")
    functions = cuda.cuLaunchKernelEx, cuda.cuCtxGetCurrent, cuda.cuCtxSetCurrent, cuda.cuTensorMapReplaceAddress
    built.set_driver(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions))
    return built


class Plans:
    """An op's calls that the module makes: of everything that a call names besides tensors, a table of what its tensors look like,
    each with the plans of both passes, or of forward alone where autograd does not record."""

    def __init__(self):
        self.of = {}
        self._tries = {}  # all that a call looks like -> how often its plans were asked for

    def begin(self, named: tuple, *inputs: torch.Tensor | None):
        """A ``_record.Pending`` that plans calls that look like this one; None where there is no module, or it was tried as often as
        a caller can be expected to want forward alone. The first call is not planned: many look like no other, and would fill the table.
        """
        if module is None and loaded() is None:
            return None
        recording = torch.is_grad_enabled()
        looks = tuple([
            None if t is None else (t.shape, t.stride(), t.dtype, recording and t.requires_grad) for t in inputs
        ])  # fmt: skip
        key = named, inputs[0].device, looks
        tries = self._tries.get(key, 0)
        if tries >= _MOST_TRIES:
            return None
        if len(self._tries) >= _MOST_KINDS:
            self._tries.clear()
            self.of.clear()
        self._tries[key] = tries + 1
        if not tries:
            return None
        from trinix.kernels.triton import _record  # a module is loaded where there is Triton only

        def add(pair) -> None:
            self._tries[key] = _MOST_TRIES
            module.add(self.of.setdefault(named, module.table()), pair, looks)

        return _record.Pending(inputs, add)


@functools.cache
def launches():
    """Triton's side of a call by its plans, for ops whose kernels are of more than one backend."""
    from trinix.kernels.triton import _launch

    return _launch


def loaded(build: bool = True):
    """The module, or None: cannot be built here, or is not yet, which a process of its own begins then, if ``build``."""
    global _asked, module
    if module is None and not _asked:
        # a PyTorch with CUDA is on machines without a card, too: without its driver nothing can be loaded
        usable = torch.version.cuda is not None and torch.cuda.is_available() and missing() is None
        there = usable and library().exists()
        _asked = build or there or not usable
        if there:
            with contextlib.suppress(OSError, ImportError):  # built on a machine with another C library, say
                module = _load()
        elif usable and build:
            threading.Thread(target=_build_and_load, name="trinix-native", daemon=True).start()
    return module


def _build_and_load() -> None:
    """What fails here shows in ``python -m trinix.kernels._native``."""
    global module
    with contextlib.suppress(OSError, ImportError):
        if _alone():
            # a process of its own: it ends its work even if this one ends before
            command = [sys.executable, "-m", "trinix.kernels._native"]
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            run = subprocess.Popen(command, start_new_session=True, env=_environment(), **quiet)
            if run.wait() == 0:
                module = _load()


def _alone() -> bool:
    """Whether no other process began this build a short while ago: many start at once."""
    mark = library().with_suffix(".building")
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if time.time() - mark.stat().st_mtime < _LONGEST_BUILD_S:
            return False
        mark.touch()
    return True
