"""Kept launches without Python (native.cpp), compiled on the user's machine against the PyTorch that is installed there.

A call through Python's ``autograd.Function`` costs the host more than both passes of eager's relu; the same from a C++ node does not.
The module is optional: where there is no compiler, or ``TRINIX_NATIVE=0``, everything runs as before.

``python -m trinix.kernels._native`` builds it (about 20 seconds) into the cache folder, $TRINIX_CACHE or ~/.cache/trinix, under a
name that says what it was built from: its source, PyTorch, Python. A build is written whole or not at all.
"""

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

import torch

SOURCE = pathlib.Path(__file__).with_name("native.cpp")
_NAME = "trinix_native"  # as in PyInit_


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
    """Why it cannot be built here, or None."""
    if os.name != "posix":
        return f"is built for Linux only, not for {os.name}"
    if compiler() is None:
        return "needs a C++ compiler: $CXX, g++ or clang++"
    if not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "needs Python's headers (Python.h)"
    return None


def build() -> pathlib.Path:
    """Compile; the path of the module. RuntimeError with the compiler's words where that fails."""
    reason = missing()
    if reason:
        raise RuntimeError(f"trinix native: {reason}")
    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(torch.__file__).parent
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so.part")
    os.close(handle)
    try:
        run = subprocess.run(
            [
                compiler(), "-O2", "-shared", "-fPIC", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}",
                str(SOURCE), "-o", name, f"-L{root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10",
                f"-Wl,-rpath,{root / 'lib'}",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise RuntimeError(f"trinix native: {compiler()} failed:\n{run.stderr[-4000:]}")
        os.replace(name, path)
    finally:
        pathlib.Path(name).unlink(missing_ok=True)
    return path


@functools.cache
def load():
    """The module, or None where it has not been built or is switched off."""
    if os.environ.get("TRINIX_NATIVE") == "0" or not library().exists():
        return None
    spec = importlib.util.spec_from_file_location(_NAME, library())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
