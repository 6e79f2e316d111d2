"""Where the tests run: Triton's interpreter on the CPU, or the GPU itself for ``-m gpu``.

A kernel that leaves part of its output unwritten must not pass because the memory held the right numbers already: every
``torch.empty`` of a test is filled, floats with NaN and integers with their largest value.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import textwrap

if platform.machine() == "x86_64":
    # PyTorch's products in the same order of adding on every machine: a budget is twice PyTorch's own error, which of a few
    # numbers is chance.
    os.environ.setdefault("MKL_CBWR", "AVX2")
# two xdist workers share two cores: of NumPy's products, which kernels on the CPU are made of, before it is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# built in the background while the tests run, it would come between; tests/kernels/test_native.py has it
os.environ.setdefault("TRINIX_NATIVE", "0")

import pytest
import torch

torch.set_num_threads(1)  # as NumPy above


def pytest_configure(config):
    # Before a test module imports Triton, which reads this when a kernel is defined.
    chosen = config.option.markexpr
    if not torch.cuda.is_available() or "gpu" not in chosen or "not gpu" in chosen:
        os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # imports Triton, so not before; makes the next line work
    torch.utils.deterministic.fill_uninitialized_memory = True
    if interpreted() and importlib.util.find_spec("triton"):
        import footprints
        import quick_interpreter

        quick_interpreter.install()
        footprints.install()


def pytest_addoption(parser):
    parser.addoption("--every-binary", action="store_true", help="compile each binary, not only one of every sort")


@pytest.fixture
def every_binary(request) -> bool:
    return request.config.getoption("every_binary")


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if not interpreted():
        return
    reason = "needs a CUDA GPU, torch.cuda.is_available() is False"
    if torch.cuda.is_available():
        reason = "Triton's interpreter runs in this process; choose the GPU tests with -m gpu"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Both places where backend "triton" runs: the interpreter, and the card in a process of its own."""
    return request.param


@pytest.fixture
def fresh_dynamo():
    """torch.compile starts from nothing and leaves nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _environment(**more: str) -> dict[str, str]:
    """Ours without the interpreter, for a Python that finds the tests' modules."""
    paths = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = ("TRITON_INTERPRET", "TRINIX_FAST_LAUNCH")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | more


@pytest.fixture(scope="session")
def fresh_process():
    """``fresh_process(code, **environment)``: what the code prints in a Python of its own, which finds the tests' modules."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=_environment(**environment),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def forked_process(tmp_path_factory):
    """As ``fresh_process(code)``, where PyTorch and Triton (not the interpreter) are imported already: three seconds less."""
    folder = tmp_path_factory.mktemp("forked")
    streams = folder / "out", folder / "err"
    command = [sys.executable, "-m", "forking"]
    with subprocess.Popen(
        command, env=_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def run(code: str) -> str:
            for file in streams:
                file.write_text("")
            asked = (textwrap.dedent(code), *map(str, streams))
            print(json.dumps(asked), file=process.stdin, flush=True)
            status, (out, err) = process.stdout.readline(), (file.read_text() for file in streams)
            assert status == "0\n", f"exit status {status}{out}{err}"
            return out.strip()

        yield run
        process.stdin.close()
