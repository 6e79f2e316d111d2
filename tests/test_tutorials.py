"""The tutorials run as they are, and the check in each finds what is broken in its kernels."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from trinix.lab import measure

pytest.importorskip("triton")

FOLDER = Path(__file__).parents[1] / "tutorials"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))
KERNELS = [name for name in FILES if name != "small_model.py"]  # which has none of its own


def run(path, name="__main__"):
    """What the file defines, after it ran as a program."""
    return runpy.run_path(str(path), run_name=name)


def test_all_five_are_there():
    assert FILES == [
        "flash_attention_lite.py", "layer_norm.py", "memory_analysis.py", "simple_fusion.py", "small_model.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("is_causal=True", "is_causal=False"),
        ("F.silu(gate) * up", "F.silu(up) * gate"),
    ],
)
def test_the_models_check_finds_a_defect(right, wrong, tmp_path):
    text = (FOLDER / "small_model.py").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "small_model.py").write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(AssertionError, match="not close"):
        run(tmp_path / "small_model.py", "tutorial")["check"]()


@pytest.mark.parametrize("file", FILES)
def test_it_runs_on_a_cpu_and_says_that_it_timed_nothing(file, capsys):
    run(FOLDER / file)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.search(r": .*right, \d shapes", first)
    assert last == "no GPU: not timed"


def test_it_chooses_the_interpreter_by_itself(fresh_process):
    """As a user starts it; the tests around this one have chosen before."""
    said = fresh_process(
        f"""
        import runpy, torch
        torch.cuda.is_available = lambda: False
        runpy.run_path({str(FOLDER / "simple_fusion.py")!r}, run_name="__main__")
        """
    )
    assert said.endswith("no GPU: not timed")


DEFECTS = {
    "simple_fusion.py": [
        ('other=float("-inf")', "other=0.0"),  # padding that takes part
        ("column * x_column_stride", "column"),  # a transposed matrix read as if it were none
    ],
    "layer_norm.py": [
        ("tl.where(inside, x - mean, 0.0)", "x - mean"),  # the published tutorial's
        (" - xhat * (tl.sum(g * xhat, 0) / columns)", ""),
        ("dbias += dy", "dbias = dy"),
    ],
    "flash_attention_lite.py": [
        ('"CAUSAL": causal', '"CAUSAL": True'),  # the published tutorial's
        ("shrink[:, None] + tl.dot", "1.0 + tl.dot"),
        ("(tl.dot(dout, tl.trans(v)) - delta[:, None])", "tl.dot(dout, tl.trans(v))"),
        ("p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)", "pass"),
        ("visible = keys[None, :] < length", "visible = keys[None, :] >= 0"),
    ],
    "memory_analysis.py": [
        ("tl.sum(z * z, 0) / columns", "tl.sum(z * z, 0) / BLOCK"),
        ("z_ptr + row + column, stored", "z_ptr + row + column, x"),
    ],
}


@pytest.mark.parametrize(
    ("file", "right", "wrong"), [(file, *defect) for file, defects in DEFECTS.items() for defect in defects]
)
def test_its_check_finds_a_defect(file, right, wrong, tmp_path):
    text = (FOLDER / file).read_text(encoding="utf-8")
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"OVER BUDGET|wrong NaN or infinity"):
        run(tmp_path / file)


@pytest.mark.parametrize("file", KERNELS)
def test_a_wrong_shape_is_refused(file):
    space = run(FOLDER / file, "tutorial")
    function = {
        "simple_fusion.py": "softmax",
        "layer_norm.py": "layer_norm",
        "flash_attention_lite.py": "flash_attention_lite",
        "memory_analysis.py": "add_rms_norm",
    }[file]
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=rf"^{function}: .*must be \["):
        space[function](*(x,) if function == "softmax" else (x, x, x))


def test_traffic_is_counted_by_operation():
    space = run(FOLDER / "memory_analysis.py", "tutorial")
    x, row = torch.zeros(4, 8), torch.zeros(4, 1)

    def chain(x, row):
        y = x.t().t() * x  # views move nothing, and x is read once
        y += row.expand(4, 8)
        return y.sum(-1)

    steps = [(step.name, step.read, step.written) for step in space["traffic"](chain, x, row)]
    assert steps == [("mul", 2 * 128, 128), ("add_", 128 + 16, 128), ("sum", 128, 16)]
    x, residual, weight = space["inputs_of"](4, 64)
    moved = sum(step.read + step.written for step in space["traffic"](space["one_by_one"], x, residual, weight))
    assert moved == 10 * x.nbytes + weight.nbytes + 6 * 8  # and the rows' numbers


class Clock:
    """Stands for ``measure.Gpu``: every call runs, the kernels above all in half of the others' time."""

    def device_ms(self, calls):
        for call in calls.values():
            call()
        return {name: measure.Spread(*[1.0 if "above" in name else 2.0] * 3) for name in calls}

    def peak_mib(self, call):
        return 5.0 + (call() is None)


SIZES = {
    "simple_fusion.py": ((8,), "the kernel runs at 200.0% of a copy's rate"),
    "layer_norm.py": ((4, 24), "the kernels run at 200.0% of a copy's rate forward, 500.0% forward and backward"),
    "memory_analysis.py": ((4, 1024), "the kernel runs at 425.0% of a copy's rate"),  # 4 n and the weight
    "flash_attention_lite.py": (
        (1, 2, 20, 16),
        "the kernels run at 2.00 of the speed of PyTorch's fused attention, forward and backward",
    ),
}


@pytest.mark.parametrize("file", KERNELS)
def test_what_it_says_is_what_the_clock_said(file, monkeypatch, capsys):
    monkeypatch.setattr(measure, "Gpu", Clock)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    sizes, said = SIZES[file]
    run(FOLDER / file, "tutorial")["measure"](*sizes)
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.gpu
@pytest.mark.parametrize("file", KERNELS)
def test_it_measures_on_a_gpu(file, capsys, fresh_dynamo):
    run(FOLDER / file)
    said = capsys.readouterr().out.splitlines()
    assert sum(" ms" in line for line in said) >= 4
    assert re.fullmatch(r"the kernels? runs? at .*\d.*", said[-1])
