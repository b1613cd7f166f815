"""What helps the quick start's model: each technique alone beside RECIPE=cpu at equal seconds, then the best of them.

    python benchmarks/ablation.py --data FOLDER [--screen 60] [--final 240] [--best 8] [--seeds 1 2 3] [--out logs/ablation.jsonl]

Screens every technique for `--screen` seconds with the first seed; trains the `--best` ones, all of those together, and
the plain recipe for `--final` seconds with every seed; prints a Markdown table of each stage. Equal are the seconds of
training, not the steps: a technique pays for its time. Scored are the bits per byte of the last tokens of the training
stream, which no training reaches; neither the validation split nor any choice by it is involved. Weights are averaged as
the technique says and not quantised. Each outcome is a line of `--out` as soon as it is there, so that a run cut off goes
on where it stopped. FOLDER holds shards of data/make_shards.py and their tokenizer (default: the shipped sample, small for
this). The machine must be idle: what else runs on it costs steps.

gain   bits per byte less than the plain recipe with the same seed, mean over seeds; above 0 the technique helps
+-     standard error of that mean; a gain within two of them is none
cost   time of a step relative to the plain recipe's
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg

LOOP = {"NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2"}
TECHNIQUES: dict[str, dict[str, str]] = {
    "loop 1-2 once": LOOP,
    "loop 1-2 twice": {**LOOP, "NUM_LOOPS": "2"},
    "loop 2 once": {**LOOP, "LOOP_START": "2"},
    "loop 1-2 once from .6": {**LOOP, "ENABLE_LOOPING_AT": "0.6"},
    "lanes in the last block": {"PARALLEL_START_LAYER": "3"},
    "lanes in two blocks": {"PARALLEL_START_LAYER": "2"},
    "lanes in three blocks": {"PARALLEL_START_LAYER": "1"},
    "sparse gate": {"ATTN_GATE": "sparse"},
    "sparse gate at .5": {"ATTN_GATE": "sparse", "SPARSE_ATTN_GATE_SCALE": "0.5"},
    "gate from input": {"ATTN_GATE": "input"},
    "window smear": {"SMEAR_FORM": "window", "SMEAR_BEFORE_NORM": "1"},
    "smear from .5": {"SMEAR_INIT": "0"},
    "no smear": {"SMEAR": "0"},
    "no bigram": {"BIGRAM_VOCAB_SIZE": "0"},
    "skip gates": {"SKIP_GATES_ENABLED": "1"},
    "XSA": {"XSA_LAST_N": "-1"},
    "QK gain 5": {"QK_GAIN_INIT": "5"},
    "LN scale in": {"LN_SCALE": "in"},
    "documents apart": {"DOC_MASK": "1"},
    "sequences of 256, then 512": {"TRAIN_SEQ_SCHEDULE": "256@0.6,512@1.0"},
    "RoPE on 16 dims": {"ROPE_DIMS": "16"},
    "value residual": {"VALUE_RESIDUAL": "softmax"},
    "slope .3": {"LEAKY_SLOPE": "0.3"},
    "slope .9": {"LEAKY_SLOPE": "0.9"},
    "orthogonal init": {"LINEAR_INIT": "orthogonal"},
    "MuonEq-R": {"MUON_ROW_NORMALIZE": "1"},
    "Polar Express": {"NEWTON_SCHULZ": "polar"},
    "MuonEq-R + Polar Express": {"MUON_ROW_NORMALIZE": "1", "NEWTON_SCHULZ": "polar"},
    "MATRIX_LR .028": {"MATRIX_LR": "0.028"},
    "MATRIX_LR .06": {"MATRIX_LR": "0.06"},
    "MuonEq-R + Polar Express at .06": {"MATRIX_LR": "0.06", "MUON_ROW_NORMALIZE": "1", "NEWTON_SCHULZ": "polar"},
    "decay .095": {"MUON_WD": "0.095", "EMBED_WD": "0.085", "ADAM_WD": "0.02"},
    "beta2 .99": {"BETA2": "0.99"},
    "clip at .3": {"GRAD_CLIP_NORM": "0.3"},
    "warmdown .85": {"WARMDOWN_FRAC": "0.85"},
    "floor .1 + EMA .97": {"MIN_LR": "0.1", "EMA_DECAY": "0.97"},
    "EMA .97": {"EMA_DECAY": "0.97"},
    "8,192 tokens a step": {"TRAIN_BATCH_TOKENS": "8192"},
    "2,048 tokens a step": {"TRAIN_BATCH_TOKENS": "2048"},
    "sequences of 256": {"TRAIN_SEQ_LEN": "256", "EVAL_SEQ_LEN": "512"},
    "MLP 3x": {"MLP_MULT": "3"},
    "6 blocks": {"NUM_LAYERS": "6"},
}


class Outcome(NamedTuple):
    """One training: its technique, seed and seconds allowed, the steps made, and bits per byte of the held-back text."""

    name: str
    seed: int
    seconds: float
    steps: int
    bpb: float


class Text(NamedTuple):
    """Training shards; held-back tokens (n,) int64; bytes of their targets (n - 1,)."""

    shards: list
    tokens: torch.Tensor
    bytes: torch.Tensor


def configure(seed: int, data: str, seconds: float, knobs: dict[str, str]) -> tg.Config:
    """RECIPE=cpu with `knobs`, trained for that many seconds."""
    env = {"RECIPE": "cpu", "DEVICE": "cpu", "SEED": str(seed), "DATA_PATH": data, "MAX_WALLCLOCK_SECONDS": str(seconds),
           "COMPILE": "0", "NGRAM_TABLE": "none", **knobs}  # fmt: skip
    return tg.fit_data(tg.load_config(env))[0].cfg


def load_text(cfg: tg.Config, held_back: int) -> Text:
    """The training split with its last `held_back` tokens apart."""
    paths = tg.find_data(cfg)
    *shards, last = tg.load_split(paths.folder, "train")
    if len(last) < 2 * held_back:
        sys.exit(
            f"--held-back {held_back}: the last shard of {paths.folder} has {len(last)} tokens; at most half may be held back"
        )
    tokens = last[-held_back:]
    counts = tg.Tokenizer(paths.tokenizer, cfg.vocab_size, paths.transform).count_bytes(tokens)
    return Text([*shards, last[:-held_back]], torch.from_numpy(tokens.astype("int64")), torch.from_numpy(counts))


@torch.no_grad()
def bits_per_byte(model: tg.GPT, text: Text, length: int) -> float:
    """Of the held-back text in sequences that do not overlap; the targets after the last whole one are left out."""
    n = (len(text.tokens) - 1) // length * length
    inputs, targets = (text.tokens[i : i + n].view(-1, length) for i in (0, 1))
    rows = range(0, len(inputs), 16)
    nats = sum(model.nll(inputs[i : i + 16], targets[i : i + 16]).double().sum().item() for i in rows)
    return nats / 0.6931471805599453 / int(text.bytes[:n].sum())


def train(cfg: tg.Config, text: Text) -> tuple[int, float]:
    """Train until MAX_WALLCLOCK_SECONDS are used: (steps, bits per byte)."""
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    run.log = lambda *_args, **_kwargs: None  # no files here
    torch.manual_seed(tg.derive_seed(cfg.seed, "init"))
    model = tg.GPT(cfg).place(run.device, tg.choose_attention(cfg, run.device)[1], cfg.train_dtype)
    trainer = tg.Trainer(cfg, run, model, tg.TokenStream(text.shards, cfg.vocab_size))
    trainer.prime()
    # Every seed reads its own part of the stream: the noise is that of data and of init.
    trainer.batcher.stream.position = cfg.seed * 7919 * 512 % trainer.batcher.stream.total
    budget, started, spent = cfg.max_wallclock_seconds, time.perf_counter(), 0.0
    while spent + spent / max(trainer.step, 1) < budget:
        trainer.train_step(
            tg.budget_frac(cfg, trainer.step, spent, budget), tg.lr_scale(cfg, trainer.step, spent, budget)
        )
        spent = time.perf_counter() - started
    trainer.average.apply()
    return trainer.step, bits_per_byte(model, text, cfg.eval_len)


class Results:
    """Outcomes so far, kept in a file of one JSON line each: what stands there is not trained again."""

    def __init__(self, path: Path, data: str, held_back: int) -> None:
        self.path, self.data, self.held_back, self.text = path, data, held_back, None
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.known = {(r["name"], json.dumps(r["knobs"]), r["seed"], r["seconds"]): (r["steps"], r["bpb"]) for r in rows
                      if (r["data"], r["held_back"]) == (data, held_back)}  # fmt: skip

    def get(self, name: str, knobs: dict[str, str], seed: int, seconds: float) -> Outcome:
        """The outcome of this training, from the file or by training now."""
        key = (name, json.dumps(knobs), seed, seconds)
        if key not in self.known:
            cfg = configure(seed, self.data, seconds, knobs)
            self.text = self.text or load_text(cfg, self.held_back)
            self.known[key] = steps, bpb = train(cfg, self.text)
            row = {"name": name, "knobs": knobs, "seed": seed, "seconds": seconds, "data": self.data,
                   "held_back": self.held_back, "steps": steps, "bpb": bpb}  # fmt: skip
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: seed {seed}, {seconds:g} s, {steps} steps, {bpb:.4f} bpb", file=sys.stderr, flush=True)
        return Outcome(name, seed, seconds, *self.known[key])


def gains(outcomes: list[Outcome], plain: list[Outcome]) -> list[float]:
    """Bits per byte less than the plain recipe's, seed by seed."""
    return [p.bpb - o.bpb for o, p in zip(outcomes, plain, strict=True)]


def table(rows: Iterable[list[Outcome]], plain: list[Outcome]) -> str:
    """A Markdown table, best first."""
    lines = ["| technique | bpb | gain | +- | cost |", "|---|---|---|---|---|"]
    for outcomes in sorted(rows, key=lambda o: statistics.mean(x.bpb for x in o)):
        gain = gains(outcomes, plain)
        error = f"{statistics.stdev(gain) / len(gain) ** 0.5:.4f}" if len(gain) > 1 else "?"
        cost = sum(p.steps for p in plain) / sum(o.steps for o in outcomes)
        bpb = statistics.mean(o.bpb for o in outcomes)
        lines.append(f"| {outcomes[0].name} | {bpb:.4f} | {statistics.mean(gain):+.4f} | {error} | {cost:.2f} |")
    return "\n".join(lines)


def together(names: list[str]) -> dict[str, str]:
    """The knobs of these techniques at once; where two set the same knob the first, the better one, stays as a whole."""
    knobs: dict[str, str] = {}
    for name in names:
        if not knobs.keys() & TECHNIQUES[name].keys():
            knobs |= TECHNIQUES[name]
    return knobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(tg.SAMPLE_CASEOPS), help="folder of shards and tokenizer")
    parser.add_argument("--screen", type=float, default=60.0, help="seconds of training in the first stage")
    parser.add_argument(
        "--final", type=float, default=240.0, help="seconds of training in the second stage; 0: only the first"
    )
    parser.add_argument("--best", type=int, default=8, help="how many techniques reach the second stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--held-back", type=int, default=200_000, help="tokens scored")
    parser.add_argument("--only", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    parser.add_argument("--out", type=Path, default=Path("logs/ablation.jsonl"), help="outcomes, one a line")
    args = parser.parse_args()
    results = Results(args.out, args.data, args.held_back)
    first = args.seeds[0]
    plain = [results.get("plain", {}, first, args.screen)]
    screened = {name: [results.get(name, TECHNIQUES[name], first, args.screen)] for name in args.only}
    print(f"{args.screen:g} s, seed {first}\n{table([plain, *screened.values()], plain)}\n", flush=True)
    best = [n for n in sorted(args.only, key=lambda n: screened[n][0].bpb) if gains(screened[n], plain)[0] > 0][
        : args.best
    ]
    if not args.final or not best:
        return
    stage = {"plain": {}, **{name: TECHNIQUES[name] for name in best}, "all of these": together(best)}
    final = {name: [] for name in stage}
    for seed, name in itertools.product(args.seeds, stage):  # seed by seed: a run cut off leaves whole columns
        final[name].append(results.get(name, stage[name], seed, args.final))
    print(f"{args.final:g} s, seeds {', '.join(map(str, args.seeds))}\n{table(final.values(), final['plain'])}")
    print("\nall of these: " + " ".join(f"{k}={v}" for k, v in stage["all of these"].items()))


if __name__ == "__main__":
    main()
