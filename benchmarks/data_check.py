"""CPU seconds of `train_gpt.check_data` on random text of the challenge's size, with documents and without BOS.

python benchmarks/data_check.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

TOKENS, DOCUMENTS = 62_022_000, 50_000


def write(path: Path, rng: np.random.Generator, documents: int) -> None:
    """A shard of TOKENS random tokens in so many documents; 0: no BOS."""
    tokens = rng.integers(4, 1024, TOKENS).astype("<u2")
    if documents:
        tokens[[0, *rng.choice(TOKENS, documents - 1, replace=False)]] = tg.BOS
    head = np.zeros(tg.SHARD_HEADER, dtype="<i4")
    head[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, TOKENS
    path.write_bytes(head.tobytes() + tokens.tobytes())


def main() -> None:
    """One line a case."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for documents in (DOCUMENTS, 0):
            for split in ("val", "train"):
                write(Path(name) / f"fineweb_{split}_000000.bin", rng, documents)
            started = time.process_time()
            tg.check_data(Path(name), training=True)
            print(f"documents:{documents} tokens:{TOKENS} cpu_s:{time.process_time() - started:.2f}")


if __name__ == "__main__":
    main()
