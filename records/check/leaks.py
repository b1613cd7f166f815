"""Validation documents in the training shards, found by hash: the leak that voided the best scores of the challenge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runs import UserError

MAGIC, HEADER_BYTES = 20240520, 1024
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


def _trainer() -> Any:
    """The trainer, whose check of the data this is too."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import train_gpt  # here, since it takes seconds

    return train_gpt


def refused(data_path: Path) -> str:
    """Why the trainer refuses the data of a folder, all of the training shards looked through; "" where it takes them."""
    trainer = _trainer()
    try:
        trainer.check_data(data_path, training=True, everything=True)
    except trainer.ConfigError as error:
        return str(error)
    return ""


def _shards(paths: list[Path]) -> Iterator[np.ndarray]:
    """The tokens of shards, with a line of progress where they are many."""
    for number, path in enumerate(paths, 1):
        if len(paths) > 4:
            end = "\n" if number == len(paths) else ""
            print(
                f"\rlooking for validation documents: shard {number}/{len(paths)}", end=end, file=sys.stderr, flush=True
            )
        yield read_shard(path)


def read_shard(path: Path) -> np.ndarray:
    """(N,) uint16 tokens; `UserError` for another magic or a size that is not 1024 + 2 N bytes."""
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != MAGIC or path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise UserError(f"{path}: not a token shard (wrong magic or size)")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))


def find_overlap(data_path: Path) -> Overlap:
    """Reads every shard under `data_path` once. Raises `UserError` if shards are missing or are none."""
    train, val = (sorted(data_path.glob(f"fineweb_{kind}_[0-9]*.bin")) for kind in ("train", "val"))
    if not train or not val:
        raise UserError(f"{data_path}: no fineweb_train_*.bin and fineweb_val_*.bin to look for leaked documents in")
    units = _trainer().text_units
    order = np.concatenate([hashes for hashes, _ in units(_shards(val), 0)])
    seen = np.zeros(len(order), dtype=bool)
    for hashes, _ in units(_shards(train), 0):
        seen |= np.isin(order, hashes)
    longest = current = 0
    for found in seen.tolist():
        current = current + 1 if found else 0
        longest = max(longest, current)
    return Overlap(len(order), int(seen.sum()), longest)
