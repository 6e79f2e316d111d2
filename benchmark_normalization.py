"""The command of document 002's system: python benchmark_normalization.py --hidden_size 8192 --seq_len 4096 --batch_size 1"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a source tree needs no installation

from trinix.cli import document

if __name__ == "__main__":
    raise SystemExit(document("benchmark_normalization"))
