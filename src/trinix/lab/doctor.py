"""``trinix doctor``: what this machine can run, and why not the rest."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from trinix import device, dispatch, ops
from trinix.kernels import _native
from trinix.lab.peers import fa4
from trinix.lab.record import PACKAGES, version_of

# torch minor -> the Triton that its GPU builds bring
PAIRS = {"2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}


def report() -> str:
    """One line a fact, "ok" or "no" with the reason and the cure."""
    lines = [
        f"trinix {version_of('trinix') or 'from a source tree'}, Python {platform.python_version()} ({sys.executable})"
    ]
    lines += [_torch(), _triton(), *_cards(), _compiler(), _launcher(), _native_launches(), *_peers()]
    return "\n".join(lines)


def _torch() -> str:
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"HIP {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    return f"ok  torch {torch.__version__}, {build} build"


def _triton() -> str:
    found = version_of("triton")
    if importlib.util.find_spec("triton") is None:
        return "no  triton: not installed; every op runs through PyTorch. GPU builds of torch bring it"
    wanted = PAIRS.get(".".join(torch.__version__.split(".")[:2]))
    if found and wanted and not found.startswith(wanted):
        return f"no  triton {found}: torch {torch.__version__} pairs with triton {wanted}; other pairs are untested"
    text = f"ok  triton {found}" + (", the pair of this torch" if wanted else ", pair of this torch unknown")
    numpy = version_of("numpy")
    if found and found.startswith("3.6") and numpy and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        text += f"\nno  interpreter: triton 3.6 needs numpy below 2.4, found {numpy}; kernels on a GPU are not affected"
    elif numpy is None:
        text += "\nno  interpreter: needs numpy, which is not installed"
    else:
        on = " (on: TRITON_INTERPRET is set)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        text += f"\nok  interpreter, for tests without a GPU{on}"
    return text


def _cards() -> list[str]:
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if not (torch.version.cuda or torch.version.hip) else "PyTorch sees no device"
        return [f"no  GPU: {why}; ops run through PyTorch on the CPU, kernels in the interpreter"]
    lines = []
    for index in range(torch.cuda.device_count()):
        card = device.card(index)
        known = "" if card.limits else "; not a target we compile for in the tests (sm_80, sm_90, sm_100, gfx942)"
        lines.append(
            f"ok  GPU {index}: {card.name}, {card.target}, {card.sm_count} SMs, {card.memory_gib:.0f} GiB{known}"
        )
    return lines


def _compiler() -> str:
    """Triton up to 3.6 builds a C launcher at the first launch of a signature."""
    found = version_of("triton") or ""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    need = "triton 3.6 needs both at run time" if found.startswith("3.6") else "needed by triton 3.6 only"
    if compiler and headers:
        return f"ok  C compiler {compiler}, Python.h ({need})"
    lacks = " and ".join(name for name, there in (("a C compiler", compiler), ("Python.h", headers)) if not there)
    return f"no  C compiler: {lacks} not found ({need}); install gcc and python3-dev"


def _launcher() -> str:
    try:
        from trinix.kernels.triton import _launch
    except ModuleNotFoundError as error:
        return f"no  fast launches: {error.name} is not installed"
    text = _launch.status()
    if text.startswith("on") and not torch.cuda.is_available():
        text = "off: there is no GPU"
    return f"{'no' if text.startswith('off') else 'ok'}  fast launches: {text}"


def _native_launches() -> str:
    cure = "; python -m trinix.kernels._native builds it now, else the first call that would use it, in the background"
    if not torch.version.cuda:
        return "no  C++ launches: for builds of torch with CUDA"
    if not torch.cuda.is_available():
        return "no  C++ launches: there is no CUDA card"
    said = _native.describe()
    if said == "can be built":
        return f"no  C++ launches: not built yet{cure}"
    return f"{'no' if _native.missing() else 'ok'}  C++ launches: {said}"


def _peers() -> list[str]:
    found = {PACKAGES[module]: importlib.util.find_spec(module) for module in ("liger_kernel", "quack", "flashmlp")}
    lacking = {package: None if spec else "not installed" for package, spec in found.items()}
    # flash-attn-4 lies in flash-attn's folder, which tells nothing of flash-attn
    lacking["flash-attn"] = None if version_of("flash-attn") else "not installed"
    lacking["flash-attn-4"] = fa4.lacking()
    return [
        f"no  peer {package}: {reason} (a rival in the lab, never needed)"
        if reason
        else f"ok  peer {package} {version_of(package) or ''}".rstrip()
        for package, reason in lacking.items()
    ]


def ops_table() -> str:
    """Every public op with the backends it has and, for a small tensor here, whether each can run."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x, heads, table = (torch.zeros(s, device=where) for s in ((2, 8), (1, 2, 1, 8), (2, 4)))
    weight, slopes = x[0], x[0]
    arguments_of = {
        "activation": (x, "relu"),
        "layer_norm": (x, 8),
        "rms_norm": (x, 8),
        "layer_norm_residual": (x, x, 8),
        "rms_norm_residual": (x, x, 8),
        "rms_norm_activation": (x, 8),
        "glu": (x, x),
        "swiglu": (x, x),
        "geglu": (x, x),
        "reglu": (x, x),
        "rope": (heads, heads, table, table),
        "qk_norm_rope": (heads, heads, weight, weight, table, table),
        "alibi_bias": (slopes, 8),
        "attention": (heads, heads, heads),
        "attention_decode": (heads, heads, heads, torch.zeros(1, dtype=torch.int32, device=where)),
        "head_mlp": (heads[0], heads[0].mT, heads[0]),
    }
    lines = []
    for name, (op, _) in sorted(ops.EXPLAIN.items()):
        arguments = arguments_of.get(name, (x,))
        states = []
        for backend in sys.modules[op.__module__].BACKENDS:
            try:
                ops.explain(op, *arguments, backend=backend)
                states.append(f"{backend}: runs here")
            except dispatch.Unsupported as error:
                reason = str(error).partition(f"{backend!r} ")[2].partition("; use")[0]
                states.append(f"{backend}: {reason}")
        lines.append(f"{name:20} {'; '.join(states)}")
    return "\n".join(lines)
