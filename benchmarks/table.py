"""What n-grams of the training text are worth in the artifact: bytes spent against bits per byte gained, size by size.

    python benchmarks/table.py ARTIFACT [--data FOLDER] [--bytes 50000 200000 800000] [--order 5] [--tokens 8388608]

ARTIFACT is any finished run's; FOLDER (default: its own data) holds the training shards that are counted and the validation
split that is scored. A line a size of NGRAM_TABLE=exact: the n-grams kept, seconds to count, choose and pack them and to
unpack them, and the bits per byte of the network with the table alone (a fixed predictor but for its weights) and with the
scored text's own n-grams on top. The first line is the same without a table. Nothing is chosen by these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--bytes", type=int, nargs="+", default=[50_000, 200_000, 800_000])
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2**23)
    args = parser.parse_args()
    blob = args.artifact.read_bytes()
    env = {
        "DATA_PATH": args.data,
        "NGRAM_SCORE": "exact",
        "NGRAM_TABLE": "none",
        "EVAL_STAGES": "auto",
        "TTT_ENABLED": "0",
    }
    cfg = tg.load_config(env, tg.read_header(blob).fields["config"]).cfg
    run, paths = tg.Run(cfg, 0, 0, 1, 1), tg.find_data(cfg, vocab_size=cfg.vocab_size)
    text = tg.load_validation(cfg, paths.folder, tg.Tokenizer(paths.tokenizer, cfg.vocab_size))
    learned = np.concatenate([np.asarray(shard) for shard in tg.load_split(paths.folder, "train")])[
        : args.tokens
    ].astype(np.int64)
    model = tg.load_model(cfg, run, blob).eval()

    def score(evaluation: tg.Evaluation, stage: str) -> tg.StageResult:
        return evaluation.score(stage)

    bare = tg.Evaluation(cfg, run, model, text)
    network, online = score(bare, "sliding" if cfg.eval_stride else "roundtrip"), score(bare, "ngram")
    print(f"{len(learned):,} training tokens, {network.tokens:,} scored; artifact {len(blob):,} bytes")
    print("    bytes     n-grams  build s  load s   table alone    gain   with the text's own   gain")
    print(
        f"{0:9,} {0:11,}        -       -   {network.val_bpb:11.4f}       -   {online.val_bpb:19.4f}      -", flush=True
    )
    for limit in args.bytes:
        times = [time.perf_counter()]
        packed = tg.build_trie(learned, cfg.vocab_size, args.order, limit)
        times.append(time.perf_counter())
        levels = tg.unpack_trie(packed, cfg.vocab_size)
        times.append(time.perf_counter())
        evaluation = tg.Evaluation(
            dataclasses.replace(cfg, ngram_table="exact"), run, model, text, tg.Tables(trie=levels)
        )
        evaluation.networks, evaluation.counted = bare.networks, bare.counted  # scored and counted once
        alone, both = score(evaluation, "table"), score(evaluation, "ngram")
        print(f"{len(packed):9,} {sum(len(level.token) for level in levels):11,} {times[1] - times[0]:8.1f} {times[2] - times[1]:7.2f}"
              f"   {alone.val_bpb:11.4f} {network.val_bpb - alone.val_bpb:7.4f}   {both.val_bpb:19.4f} {online.val_bpb - both.val_bpb:6.4f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
