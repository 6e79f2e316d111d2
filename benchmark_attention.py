"""The command of document 004's system: python benchmark_attention.py --models deepseek_v3 --num_runs 200 --dtype bfloat16"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a source tree needs no installation

from trinix.cli import document

if __name__ == "__main__":
    raise SystemExit(document("benchmark_attention"))
