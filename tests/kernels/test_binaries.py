"""How tests compile: a binary that Triton's cache has comes with ptxas's words on it too."""

import json

import pytest

pytest.importorskip("triton")

# Runs in a forked process: here TRITON_INTERPRET may be set. Few registers, so ptxas has to say that values spill.
CODE = """
import json, os
os.environ["TRITON_CACHE_DIR"] = FOLDER
import triton
from binaries import compiled_case
from triton.runtime.cache import get_cache_manager
from trinix.kernels.triton.softmax import compile_cases

case = next(case for case in compile_cases(32) if case.name == "softmax/rows-4096/bwd/bfloat16")
case = case._replace(options=case.options | {"maxnreg": 24})
hits, words = [], []
triton.knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
for turn in range(3):
    binary, said = compiled_case(case)
    words.append(said)
    if turn == 1:
        os.remove(get_cache_manager(binary.hash).get_file("ptxas"))
print(json.dumps([hits, words]))
"""


def test_words_on_a_binary_are_kept_and_asked_for_again_where_they_are_lost(forked_process, tmp_path):
    hits, words = json.loads(forked_process(f"FOLDER = {str(tmp_path)!r}\n{CODE}"))
    assert hits == [False, True, True, False]
    assert words[0] == words[1]
    assert all("bytes spill stores" in one and " 0 bytes spill stores" not in one for one in words)
