"""Time of a training step as fixed part + passes through blocks x time a pass, over NUM_LOOPS 0, 1 and 2.

    python benchmarks/passes.py [--rounds 9] [KNOB=value ...]

RECIPE=cpu with two looped blocks, changed by the knobs given. The three models step in turn, so that a busy machine slows
all alike; the fit is by least squares on the least time of each, and the residual is its largest error relative to the
measured time. The machine should be idle.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt as tg


def trainer(loops: int, knobs: dict[str, str]) -> tg.Trainer:
    """A primed trainer of the looped plan with that many further passes."""
    env = {"RECIPE": "cpu", "DEVICE": "cpu", "COMPILE": "0", "NGRAM_TABLE": "none", "LOOP_START": "1", "LOOP_END": "2",
           "ENABLE_LOOPING_AT": "0", "NUM_LOOPS": str(loops), **knobs}  # fmt: skip
    cfg = tg.load_config(env).cfg
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(run.device, tg.choose_attention(cfg, run.device)[1], cfg.train_dtype)
    return tg.Trainer(
        cfg,
        run,
        model,
        tg.TokenStream(tg.load_split(tg.find_data(cfg, vocab_size=cfg.vocab_size).folder, "train"), cfg.vocab_size),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    args = parser.parse_args()
    knobs = dict(word.split("=", 1) for word in args.knobs)
    trainers = [trainer(loops, knobs) for loops in (0, 1, 2)]
    times: list[list[float]] = [[], [], []]
    for i in range(args.rounds + 1):
        for own, t in zip(times, trainers, strict=True):
            started = time.perf_counter()
            t.train_step(0.5, 1.0)
            own += [time.perf_counter() - started] if i else []  # the first step allocates
    least = np.array([min(own) for own in times])
    passes = np.array([len(t.model.plan) for t in trainers])
    (a_pass, fixed), *_ = np.polyfit(passes, least, 1, full=True)
    for n, seconds in zip(passes, least, strict=True):
        print(f"{n:3d} passes: {1000 * seconds:8.1f} ms, fit {1000 * (fixed + n * a_pass):8.1f} ms")
    residual = np.abs(fixed + passes * a_pass - least) / least
    print(f"fixed {1000 * fixed:.1f} ms + {1000 * a_pass:.1f} ms a pass, residual at most {100 * residual.max():.1f} %")


if __name__ == "__main__":
    main()
