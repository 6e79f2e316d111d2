"""What the pages promise, run: every Python block of the Markdown pages and every example of a docstring, on the CPU.

The blocks of a page share one namespace, in order. An HTML comment ``<!-- not run: reason -->`` on the line before a block
keeps it from being run; it is reported as skipped with that reason.
"""

import ast
import doctest
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import trinix

ROOT = Path(__file__).parents[1]
SOURCES = Path(trinix.__file__).parent
PAGES = [
    p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()
]
ELSEWHERE = ("kernels/triton/", "lab/aot.py")  # their text runs inside kernels or in the compiler's process

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*)")
NOT_RUN = re.compile(r"^\s*<!--\s*not run:\s*(?P<reason>.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of code, from 1
    code: str
    not_run: str | None


def blocks_of(text: str, page: str) -> list[Block]:
    """Every fenced block of a Markdown text whose language is Python."""
    found, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        first = number
        closing = re.compile(rf"^ *{re.escape(opening['fence'])}{opening['fence'][0]}*\s*$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        if number == len(lines):
            raise ValueError(f"{page}: the block that opens in line {first} is never closed")
        if opening["language"].lower() in ("python", "py", "python3"):
            marked = NOT_RUN.match(lines[first - 2]) if first >= 2 else None
            indent = len(opening["indent"])
            code = "\n".join(one[indent:] if not one[:indent].strip() else one for one in lines[first:number])
            found.append(Block(page, first + 1, code + "\n", marked["reason"] if marked else None))
        number += 1
    return found


def run_blocks(blocks: list[Block]) -> dict:
    """Run blocks in one namespace; an error's traceback shows the page and its line."""
    space = {"__name__": "__main__"}
    for block in blocks:
        if block.not_run is None:
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), space)
    return space


@dataclass(frozen=True)
class Example:
    name: str
    file: Path
    line: int
    docstring: str


def examples_of(file: Path, name: str) -> list[Example]:
    """The docstrings with examples in a source file, read rather than imported: decorators hide them from doctest."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and doctest.DocTestParser().get_examples(text):
                label = f"{name}:{getattr(node, 'name', 'module')}"
                found.append(Example(label, file, node.body[0].lineno - 1, text))
    return found


def run_example(example: Example) -> str:
    """What doctest has to complain about; nothing when all is well."""
    space = {"torch": torch, "trinix": trinix, "__name__": "__main__"}
    test = doctest.DocTestParser().get_doctest(example.docstring, space, example.name, str(example.file), example.line)
    complaints = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=complaints.append)
    return "".join(complaints)


BLOCKS = {p.relative_to(ROOT).as_posix(): blocks_of(p.read_text(encoding="utf-8"), p.name) for p in PAGES}
RUNS = [pytest.param(page, id=page) for page, blocks in BLOCKS.items() if any(b.not_run is None for b in blocks)]
RUNS += [
    pytest.param(page, id=f"{page}:{block.line}", marks=pytest.mark.skip(reason=f"line {block.line}: {block.not_run}"))
    for page, blocks in BLOCKS.items()
    for block in blocks
    if block.not_run is not None
]
NAMES = {p.relative_to(SOURCES).as_posix(): p for p in sorted(SOURCES.rglob("*.py"))}
EXAMPLES = [e for name, file in NAMES.items() if not name.startswith(ELSEWHERE) for e in examples_of(file, name)]


@pytest.fixture(autouse=True)
def _on_the_cpu_and_nothing_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    yield
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device if device.type != "cpu" else None)


@pytest.mark.parametrize("page", RUNS)
def test_the_python_blocks_of_a_page_run(page):
    run_blocks(BLOCKS[page])


@pytest.mark.parametrize("page", BLOCKS)
def test_every_python_block_can_be_parsed_and_a_marked_one_says_why(page):
    for block in BLOCKS[page]:
        compile(block.code, page, "exec")
        assert block.not_run != "", f"{page}, line {block.line}: not run, and no reason"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_the_examples_of_a_docstring_hold(example):
    complaints = run_example(example)
    assert not complaints, complaints


def test_no_example_is_overlooked():
    """Counted in the text: a prompt that no docstring holds is never run by anyone."""
    written = sum(
        len(re.findall(r"^ *>>> ", file.read_text(encoding="utf-8"), re.M))
        for name, file in NAMES.items()
        if not name.startswith(ELSEWHERE)
    )
    assert sum(len(doctest.DocTestParser().get_examples(e.docstring)) for e in EXAMPLES) == written
    assert EXAMPLES


# -- the collector itself

PAGE = """# A page

```python
first = 1
```

```bash
false
```

1. In a list:

   ```python
   second = first + 1
   if second:
       third = 3
   ```

<!-- not run: needs a GPU -->
```python
import no_such_module
```

````markdown
```python
raise SystemExit
```
````

~~~python
fourth = third + 1
~~~
"""


def test_the_collector_finds_python_blocks_only_with_their_lines_and_marks():
    blocks = blocks_of(PAGE, "page.md")
    assert [(b.line, b.not_run) for b in blocks] == [(4, None), (14, None), (21, "needs a GPU"), (31, None)]
    assert blocks[1].code == "second = first + 1\nif second:\n    third = 3\n"


def test_blocks_share_a_namespace_and_marked_ones_are_left_out():
    space = run_blocks(blocks_of(PAGE, "page.md"))
    assert (space["first"], space["second"], space["third"], space["fourth"]) == (1, 2, 3, 4)


def test_an_error_in_a_block_shows_the_page_and_its_line():
    with pytest.raises(ZeroDivisionError) as failed:
        run_blocks(blocks_of("\n\n```python\nx = 1\nx / 0\n```\n", "page.md"))
    last = failed.traceback[-1]
    assert (str(last.path).endswith("page.md"), last.lineno + 1) == (True, 5)


def test_a_block_that_is_never_closed_is_an_error():
    with pytest.raises(ValueError, match=r"page\.md: the block that opens in line 2 is never closed"):
        blocks_of("text\n```python\nx = 1\n", "page.md")


def test_a_wrong_example_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('def f():\n    """Say.\n\n    >>> 1 + 1\n    3\n    """\n')
    (example,) = examples_of(file, "module.py")
    complaints = run_example(example)
    assert "line 4" in complaints
    assert "Expected:\n    3\nGot:\n    2" in complaints


def test_a_right_example_is_left_in_peace_behind_a_decorator_too(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('@some.decorator\ndef f():\n    """Say.\n\n    >>> torch.ones(2).sum().item()\n    2.0\n    """\n')
    (example,) = examples_of(file, "module.py")
    assert run_example(example) == ""
