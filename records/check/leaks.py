"""Validation documents in the training shards, found by hash: the leak that voided the best scores of the challenge."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from runs import UserError

BOS, MAGIC, HEADER_BYTES = 1, 20240520, 1024
MAX_SHARE, MAX_RUN = 0.001, 20  # above either, a block of the validation text was trained on; below, texts merely recur


@dataclass(frozen=True)
class Overlap:
    """How many of the validation documents stand in the training shards, and the longest row of such neighbours."""

    documents: int
    found: int
    longest_run: int

    @property
    def leaked(self) -> bool:
        return self.found > MAX_SHARE * self.documents or self.longest_run >= MAX_RUN

    def __str__(self) -> str:
        share = 100 * self.found / max(1, self.documents)
        return (
            f"{self.found:,} of {self.documents:,} validation documents in the training shards ({share:.3f} %), "
            f"{self.longest_run} in a row at most (FAIL above {100 * MAX_SHARE:g} % or from {MAX_RUN} in a row)"
        )


def find_overlap(data_path: Path) -> Overlap:
    """Reads every shard under `data_path` once. Raises `UserError` if shards are missing or are none."""
    train, val = (sorted(data_path.glob(f"fineweb_{kind}_[0-9]*.bin")) for kind in ("train", "val"))
    if not train or not val:
        raise UserError(f"{data_path}: no fineweb_train_*.bin and fineweb_val_*.bin to look for leaked documents in")
    order = list(document_hashes(val))
    seen = set(order).intersection(document_hashes(train, progress=len(train) > 4))
    longest = current = 0
    for digest in order:
        current = current + 1 if digest in seen else 0
        longest = max(longest, current)
    return Overlap(len(order), sum(d in seen for d in order), longest)


def document_hashes(paths: list[Path], progress: bool = False) -> Iterator[bytes]:
    """A hash of each document (BOS up to the next BOS) of consecutive shards, documents across shard ends included."""
    carry = np.empty(0, np.uint16)
    for number, path in enumerate(paths, 1):
        if progress:
            end = "\n" if number == len(paths) else ""
            print(
                f"\rlooking for validation documents: shard {number}/{len(paths)}", end=end, file=sys.stderr, flush=True
            )
        tokens = np.concatenate([carry, read_shard(path)])
        starts = np.flatnonzero(tokens == BOS)
        for start, stop in pairwise(starts):
            yield _digest(tokens[start:stop])
        carry = tokens[starts[-1] :] if len(starts) else tokens
    yield _digest(carry)


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=12).digest()


def read_shard(path: Path) -> np.ndarray:
    """(N,) uint16 tokens; `UserError` for another magic or a size that is not 1024 + 2 N bytes."""
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != MAGIC or path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise UserError(f"{path}: not a token shard (wrong magic or size)")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))
