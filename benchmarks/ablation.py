"""Which technique helps a small model: one at a time beside the plain one, the same steps and the same data for all.

    python benchmarks/ablation.py --seconds 300 --seeds 1 2 3 --data FOLDER

The plain model is RECIPE=cpu with every technique of the table off. `--seconds` is the time the plain model trains in the
first seed; the steps it makes are then the steps of every training, whatever they cost. Scored are the bits per byte of
the last tokens of the training stream, which no training reaches: neither the validation split nor any choice of
settings by it is involved. Weights are neither averaged nor quantised. FOLDER holds shards of data/make_shards.py and
their tokenizer (default: the shipped sample, which is small for this).

gain      bits per byte less than the plain model of the same seed, mean over seeds; above 0 the technique helps
+-        standard error of that mean; a gain within two of them is none
cost      time of a step relative to the plain model's
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg

PLAIN = {"SMEAR": "0", "BIGRAM_VOCAB_SIZE": "0", "LEAKY_SLOPE": "0", "LN_SCALE": "none", "XSA_LAST_N": "0", "ROPE_DIMS": "0",
         "VALUE_RESIDUAL": "none", "ATTN_GATE": "none"}  # fmt: skip
TECHNIQUES = {
    "XSA, all blocks": {"XSA_LAST_N": "-1"},
    "XSA, last block": {"XSA_LAST_N": "1"},
    "SmearGate": {"SMEAR": "1"},
    "BigramHash 4096x128": {"BIGRAM_VOCAB_SIZE": "4096", "BIGRAM_DIM": "128"},
    "LN scale": {"LN_SCALE": "in"},
    "partial RoPE 16": {"ROPE_DIMS": "16"},
    "VRL, softmax": {"VALUE_RESIDUAL": "softmax"},
    "gate from input": {"ATTN_GATE": "input"},
    "gate, scalar": {"ATTN_GATE": "scalar", "ATTN_GATE_INIT": "1"},
    "LeakyReLU(.5)^2": {"LEAKY_SLOPE": "0.5"},
    "LeakyReLU(.9)^2": {"LEAKY_SLOPE": "0.9"},
}
TECHNIQUES["all of #850"] = {**TECHNIQUES["XSA, all blocks"], **TECHNIQUES["SmearGate"], **TECHNIQUES["LN scale"],
                             **TECHNIQUES["BigramHash 4096x128"], **TECHNIQUES["partial RoPE 16"],
                             **TECHNIQUES["VRL, softmax"], **TECHNIQUES["gate from input"],
                             **TECHNIQUES["LeakyReLU(.9)^2"]}  # fmt: skip


class Outcome(NamedTuple):
    """One training: optimizer steps, seconds they took, bits per byte of the held-out text."""

    steps: int
    seconds: float
    bpb: float


class Text(NamedTuple):
    """What is trained on and what is held out: the shards, the held-out tokens (n,), the bytes of their targets (n - 1,)."""

    shards: list
    tokens: torch.Tensor
    bytes: torch.Tensor


def configure(seed: int, data: str, knobs: dict[str, str]) -> tg.Config:
    """RECIPE=cpu without techniques but `knobs`; the budget is counted in steps by `train`."""
    env = {"RECIPE": "cpu", "DEVICE": "cpu", "SEED": str(seed), "DATA_PATH": data, "MAX_WALLCLOCK_SECONDS": "0",
           "COMPILE": "0", "NGRAM_TABLE": "none", "LOG_DIR": "logs", **PLAIN, **knobs}  # fmt: skip
    return tg.load_config(env).cfg


def load_text(cfg: tg.Config, held_out: int) -> Text:
    """The training split, its last `held_out` tokens apart."""
    paths = tg.find_data(cfg)
    *shards, last = tg.load_split(paths.folder, "train")
    if len(last) < 2 * held_out:
        sys.exit(
            f"--held-out {held_out}: the last shard of {paths.folder} has {len(last)} tokens; at most half may be held out"
        )
    tokens = last[-held_out:]
    counts = tg.Tokenizer(paths.tokenizer, cfg.vocab_size).count_bytes(tokens)
    return Text([*shards, last[:-held_out]], torch.from_numpy(tokens.astype("int64")), torch.from_numpy(counts))


@torch.no_grad()
def bits_per_byte(model: tg.GPT, text: Text, length: int) -> float:
    """Of the held-out text in sequences that do not overlap; the targets after the last whole one are left out."""
    n = (len(text.tokens) - 1) // length * length
    inputs, targets = (text.tokens[i : i + n].view(-1, length) for i in (0, 1))
    rows = range(0, len(inputs), 16)
    nats = sum(model.nll(inputs[i : i + 16], targets[i : i + 16]).double().sum().item() for i in rows)
    return nats / 0.6931471805599453 / int(text.bytes[:n].sum())


def train(cfg: tg.Config, text: Text, steps: int, seconds: float = 0.0) -> Outcome:
    """Train `steps` steps, or with `seconds` as many as they hold; the last 40 % of either are the warmdown."""
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    torch.manual_seed(tg.derive_seed(cfg.seed, "init"))
    model = tg.GPT(cfg).place(run.device, tg.choose_attention(cfg, run.device)[1], cfg.train_dtype)
    trainer = tg.Trainer(cfg, run, model, tg.TokenStream(text.shards, cfg.vocab_size))
    # Every seed reads its own stretch of the stream: the noise is that of data and of init.
    trainer.batcher.stream.position = cfg.seed * 7919 * cfg.train_seq_len % trainer.batcher.stream.total
    started, frac = time.perf_counter(), 0.0
    while frac < 1:
        trainer.train_step(frac, warmdown(frac))
        spent = time.perf_counter() - started
        frac = trainer.step / steps if steps else (spent + spent / trainer.step) / seconds
    return Outcome(trainer.step, spent, bits_per_byte(model, text, cfg.train_seq_len))


def warmdown(frac: float) -> float:
    """Learning-rate multiplier: flat, then down to nothing over the last 40 %."""
    return min(1.0, (1 - frac) / 0.4)


def report(name: str, outcomes: list[Outcome], plain: list[Outcome]) -> None:
    """One line of the table."""
    gains = [p.bpb - o.bpb for o, p in zip(outcomes, plain, strict=True)]
    error = f"{statistics.stdev(gains) / len(gains) ** 0.5:7.4f}" if len(gains) > 1 else "      ?"
    cost = sum(o.seconds / o.steps for o in outcomes) / sum(p.seconds / p.steps for p in plain)
    bpb = statistics.mean(o.bpb for o in outcomes)
    print(f"{name:22s} {bpb:8.4f} {statistics.mean(gains):+8.4f} {error} {cost:6.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--seconds", type=float, default=0.0, help="time of the first plain training; it fixes the steps"
    )
    budget.add_argument("--steps", type=int, default=0, help="the steps themselves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", default=str(tg.SAMPLE_DIR), help="folder of shards and tokenizer")
    parser.add_argument("--held-out", type=int, default=200_000, help="tokens scored")
    parser.add_argument("--only", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    args = parser.parse_args()
    text = load_text(configure(args.seeds[0], args.data, {}), args.held_out)
    plain: list[Outcome] = []
    for seed in args.seeds:
        steps = plain[0].steps if plain else args.steps
        plain.append(train(configure(seed, args.data, {}), text, steps, args.seconds))
    tokens = plain[0].steps * configure(1, args.data, {}).train_batch_tokens
    print(
        f"steps:{plain[0].steps} tokens:{tokens} of {sum(map(len, text.shards))} seeds:{len(plain)} held_out:{args.held_out}"
    )
    print("technique                   bpb     gain      +-    cost")
    report("plain", plain, plain)
    for name in args.only:
        report(
            name, [train(configure(s, args.data, TECHNIQUES[name]), text, plain[0].steps) for s in args.seeds], plain
        )


if __name__ == "__main__":
    main()
