"""Bits per byte after the same seconds of training: RECIPE=cpu of train_gpt.py against reference.py, on the sample.

    python benchmarks/quality.py --seconds 30 60 120 --seeds 1337

Each line is one training of each, one after the other on the same machine:

    reference   the baseline's settings as they are; its warmdown of 1200 steps is longer than such a run
    fitted      the reference with a warmdown of 40 % of the steps it makes, the first thing one would change
    ours        the artifact of train_gpt.py, so after quantisation; the reference keeps its fp32 weights

All are scored alike, in sequences that do not overlap, over the whole validation split. Knobs in the environment reach
train_gpt.py: TRAIN_DTYPE=fp32 python benchmarks/quality.py. On the CPU, and without n-grams: those come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = str(ROOT / "data" / "sample")  # also where FineWeb was downloaded


class Outcome(NamedTuple):
    """One training: optimizer steps, bits per byte."""

    steps: int
    bpb: float


def run(script: str, *arguments: str, **knobs: str) -> str:
    """Standard output of one of our scripts; raises CalledProcessError if it fails."""
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(
        command, env={"DATA_PATH": SAMPLE, **os.environ, **knobs}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def reference(seconds: float, seed: int, warmdown: int | None = None) -> Outcome:
    """Train the reference for `seconds`."""
    extra = [] if warmdown is None else ["--warmdown", str(warmdown)]
    out = run("benchmarks/reference.py", "--device", "cpu", "--seconds", str(seconds), "--seed", str(seed), *extra)
    steps, bpb = re.search(r"^steps:(\d+) .* val_bpb:([\d.]+)$", out, re.M).groups()
    return Outcome(int(steps), float(bpb))


def ours(seconds: float, seed: int) -> Outcome:
    """Train, pack and reload with train_gpt.py."""
    with tempfile.TemporaryDirectory() as folder:
        run("train_gpt.py", RECIPE="cpu", DEVICE="cpu", NGRAM_TABLE="none", NGRAM_SCORE="off", MAX_WALLCLOCK_SECONDS=str(seconds), SEED=str(seed), EVAL_STRIDE="0",
            EVAL_STAGES="roundtrip", LOG_DIR=folder, RUN_ID="quality")  # fmt: skip
        events = [json.loads(line) for line in (Path(folder) / "quality.jsonl").read_text().splitlines()]
    last = {event["event"]: event for event in events}
    return Outcome(last["train_end"]["steps"], last["score"]["val_bpb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 120], help="training budgets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    args = parser.parse_args()
    print("seconds   seed  reference bpb (steps)  fitted bpb (steps)  ours bpb (steps)  ours - fitted")
    for seconds in args.seconds:
        for seed in args.seeds:
            plain = reference(seconds, seed)
            fitted = reference(seconds, seed, max(1, round(0.4 * plain.steps)))
            mine = ours(seconds, seed)
            print(
                f"{seconds:7.0f} {seed:6d} {plain.bpb:14.4f} ({plain.steps:5d}) {fitted.bpb:10.4f} ({fitted.steps:5d})"
                f" {mine.bpb:9.4f} ({mine.steps:5d}) {mine.bpb - fitted.bpb:+14.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
