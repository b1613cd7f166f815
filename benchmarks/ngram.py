"""N-gram statistics and mixing against the published caches, on one text, in one process; prints ratios.

    python benchmarks/ngram.py TEXT.jsonl.zst [--tokens 5000000] [--parts speed,growth,mix] [--device cuda]

TEXT holds one {"text": ...} object a line. The caches are our own plain NumPy, in the style of pull requests #850
(orders 9 to 2, one table for everyone, refreshed every 65,536 tokens) and #740 (orders 7 to 2, refreshed every window of
128). Like the published ones they look up the target alone and stop at the first matched order, and do not give a
distribution; the engine gives C, c and U of orders 1 to 9 at every position, updated after every token.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402

TOKENIZER = ROOT / "data" / "sample" / "tokenizer_1024.model"
VOCAB, BOS = 1024, 1


def read_tokens(path: Path, limit: int) -> tuple[np.ndarray, float]:
    """(token stream with a BOS before each document, bytes of text a token)."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    parts, n, size = [], 0, 0
    with open(path, "rb") as f:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), encoding="utf-8"):
            text = json.loads(line)["text"]
            parts.append(np.array([BOS, *pieces.encode(text)], dtype=np.int64))
            n, size = n + len(parts[-1]), size + len(text.encode())
            if n >= limit:
                break
    return np.concatenate(parts)[:limit], size / n


class NumpyCache:
    """A published hashed cache: two count tables an order, XOR hash, first order from the longest whose context was seen twice."""

    def __init__(self, tokens: np.ndarray, orders: range, multipliers: tuple[int, ...], refresh: int) -> None:
        self.tokens, self.orders, self.refresh = tokens.astype(np.uint64), orders, refresh
        self.multipliers, self.mask = np.array(multipliers, dtype=np.uint64), np.uint64(2**22 - 1)
        self.tables = {n: np.zeros((2, 2**22), np.uint32) for n in orders}

    def keys(self, order: int, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells of context and of context with target."""
        h = np.zeros(len(target), np.uint64)
        for j in range(order - 1):
            h ^= self.tokens[target - (order - 1) + j] * self.multipliers[j]
        full = h ^ (self.tokens[target] * self.multipliers[(order - 1) % len(self.multipliers)])
        return (h & self.mask).astype(np.int64), (full & self.mask).astype(np.int64)

    def run(self) -> np.ndarray:
        """The ratio of every target."""
        ratio = np.zeros(len(self.tokens))
        for lo in range(max(self.orders), len(self.tokens), self.refresh):
            target = np.arange(lo, min(lo + self.refresh, len(self.tokens)))
            todo, keys = target, {n: self.keys(n, target) for n in self.orders}
            for n in self.orders:
                context, full = (key[todo - lo] for key in keys[n])
                C = self.tables[n][0][context]
                hit = C >= 2
                ratio[todo[hit]] = np.minimum(self.tables[n][1][full[hit]], C[hit]) / C[hit]
                todo = todo[~hit]
            for n in self.orders:
                for table, key in zip(self.tables[n], keys[n], strict=True):
                    np.add.at(table, key, 1)
        return ratio


class Cost(NamedTuple):
    """Seconds on the wall and of processor time over all threads; on a busy machine only the second compares."""

    wall: float
    cpu: float


def cost(work: Callable[[], object], repeats: int = 1) -> Cost:
    """Best of `repeats` calls."""
    costs = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        costs.append(Cost(time.perf_counter() - wall, time.process_time() - cpu))
    return Cost(*map(min, zip(*costs, strict=True)))


def speed(tokens: np.ndarray) -> None:
    """Engine against both caches."""
    n = len(tokens)
    caches = {
        "#850 style, orders 9-2": NumpyCache(tokens, range(9, 1, -1), tg.MULTIPLIERS_850, 65536),
        "#740 style, orders 7-2": NumpyCache(tokens, range(7, 1, -1), tg.MULTIPLIERS_740, 128),
    }
    stream = torch.from_numpy(tokens)
    engine = cost(lambda: tg.ngram_stats(stream, VOCAB, 9), 3)
    print(f"  {n:,} tokens, {torch.get_num_threads()} threads")
    for name, c in {"engine, orders 1-9": engine, **{name: cost(cache.run) for name, cache in caches.items()}}.items():
        print(f"  {name:<24} wall {c.wall:7.2f} s {n / c.wall / 1e6:6.2f} M tokens/s (engine {c.wall / engine.wall:4.1f}x)   "
              f"cpu {c.cpu:7.2f} s (engine {c.cpu / engine.cpu:4.1f}x)")  # fmt: skip


def growth(tokens: np.ndarray) -> None:
    """Time a token from 1 M tokens to all of them."""
    for n in sorted({1_000_000, 5_000_000, len(tokens)}):
        if n <= len(tokens):
            stream = torch.from_numpy(tokens[:n])
            c = cost(lambda stream=stream: tg.ngram_stats(stream, VOCAB, 9), 2)
            print(
                f"  {n:>12,} tokens  wall {c.wall:7.2f} s {c.wall / n * 1e9:6.0f} ns a token   cpu {c.cpu / n * 1e9:6.0f} ns a token"
            )


class Uniform:
    """A base that takes every token for as likely as any other."""

    enrichment = None

    def __init__(self, n_tokens: int, device: torch.device | str) -> None:
        self.entropy = torch.full((1,), math.log(VOCAB), dtype=torch.float64, device=device).expand(n_tokens)

    def score(self, tokens: torch.Tensor, lo: int, hi: int) -> torch.Tensor:  # noqa: ARG002
        return -self.entropy[lo:hi]


def mix(tokens: np.ndarray, bytes_per_token: float, device: str, order: int = 12) -> None:
    """The pure n-gram model of each combiner: bits a byte and time against the update interval."""
    stream = torch.from_numpy(tokens).to(device)
    table = tg.NgramTable(VOCAB, order, device)
    c = cost(lambda: table.load(stream))
    print(f"  statistics of orders 1-{order} for {len(tokens):,} tokens: wall {c.wall:.2f} s, cpu {c.cpu:.2f} s")
    base = Uniform(len(tokens), device)
    experts = {"cascade": lambda: tg.Cascade(table, base)}
    for name, build in experts.items():
        for interval in sorted({512, 1024, 4096, 16384, max(1024, len(tokens) // 4096)}):
            expert, nats, started = build(), torch.zeros((), dtype=torch.float64, device=device), time.perf_counter()
            for lo in range(1, len(tokens), interval):
                hi = min(lo + interval, len(tokens))
                nats -= expert.score(stream, lo, hi).sum()
                expert.update(stream, lo, hi)
            bpb = nats.item() / math.log(2) / (len(tokens) - 1) / bytes_per_token
            print(
                f"  {name:<18} update every {interval:>6}: {bpb:.4f} bpb  wall {time.perf_counter() - started:6.2f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--mix-tokens", type=int, default=1_000_000)
    parser.add_argument("--parts", default="speed,growth,mix")
    parser.add_argument(
        "--device", default="cpu", help="where the combiners run; the engine and the caches stay on the CPU"
    )
    args = parser.parse_args()
    tokens, bytes_per_token = read_tokens(args.text, args.tokens)
    for part in args.parts.split(","):
        print(f"{part}:")
        if part == "mix":
            mix(tokens[: args.mix_tokens], bytes_per_token, args.device)
        else:
            {"speed": speed, "growth": growth}[part](tokens)


if __name__ == "__main__":
    main()
