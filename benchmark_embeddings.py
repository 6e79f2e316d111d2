"""The command of document 002's system: python benchmark_embeddings.py --num_heads 64 --head_dim 128 --seq_len 8192"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # a source tree needs no installation

from trinix.cli import document

if __name__ == "__main__":
    raise SystemExit(document("benchmark_embeddings"))
