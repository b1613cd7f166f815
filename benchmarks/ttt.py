"""Test-time training document by document against sliding windows and the single LoRA, on one artifact and one text.

    python benchmarks/ttt.py ARTIFACT [--data FOLDER] [--tokens 60000] [--parts gain,sites,order,cache,tilt] [--context 0]
    python benchmarks/ttt.py --estimate

ARTIFACT is any finished run's; FOLDER (default: its own data) holds the validation split, of which the first --tokens are
scored. All figures are bits per byte of the same text with the same context length (--context, default: as trained) and
the seconds of the stage, side by side in one process:

    gain    non-overlapping windows, sliding windows (stride = chunk), the single LoRA, a LoRA a document, warm A, phases
    sites   a LoRA a document for each choice of sites
    order   the text's order against the published one, longest document first, with the bits of order that figure leaves out
    cache   windows computed anew against keys and values kept from earlier chunks
    tilt    the token tilt on the network, alone and under the cascade, for several strengths

--estimate plans the full-size evaluation on 8 GPUs from a synthetic text of 50,000 documents; it needs no artifact.
The settings are those of the published runs but for the learning rate, which --lr sets for a network of another size. The
text is for measuring: nothing is chosen by these figures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from bisect import bisect_left
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg

PUBLISHED = {
    "TTT_ENABLED": "1", "TTT_RESET": "document", "TTT_LORA_RANK": "80", "TTT_LORA_ALPHA": "144", "TTT_LORA_BLOCKS": "0",
    "TTT_LORA_SITES": "q,k,v,o,mlp,head", "TTT_WD": "0.5", "TTT_BETA1": "0", "TTT_BETA2": "0.99", "TTT_ADAM_EPS": "1e-10",
    "TTT_GRAD_CLIP": "0", "TTT_BYTE_WEIGHTED": "0", "TTT_CHUNK_SIZE": "48", "PHASED_TTT_NUM_PHASES": "0",
}  # fmt: skip


class Bench:
    """One artifact and text, scored under changing knobs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.blob = args.artifact.read_bytes()
        self.header = tg.read_header(self.blob).fields["config"]
        self.base = {"DATA_PATH": args.data, "VAL_TOKENS": str(args.tokens), "NGRAM_SCORE": "off", "NGRAM_TABLE": "none", "EVAL_STAGES": "auto",
                     "SCORE_STAGE": "auto", "EVAL_STRIDE": PUBLISHED["TTT_CHUNK_SIZE"], "EVAL_SEQ_LEN": str(args.context), "TTT_LR": str(args.lr)}  # fmt: skip
        PUBLISHED.update(TTT_LORA_RANK=str(args.rank), TTT_LORA_ALPHA=str(1.8 * args.rank))
        cfg = self.config()
        self.run, paths = tg.Run(cfg, 0, 0, 1, 1), tg.find_data(cfg)
        self.text = tg.load_validation(cfg, paths.folder, tg.Tokenizer(paths.tokenizer, cfg.vocab_size))
        self.model = tg.load_model(cfg, self.run, self.blob).eval()

    def config(self, **knobs: str) -> tg.Config:
        return tg.load_config({**self.base, **knobs}, self.header).cfg

    def score(self, stage: str, text: tg.ValidationText | None = None, **knobs: str) -> tg.StageResult:
        """One stage under these knobs, in a fresh evaluation."""
        evaluation = tg.Evaluation(self.config(**knobs), self.run, self.model, text or self.text)
        return evaluation.score(stage, *evaluation.scorer(stage), math.inf)

    def line(self, name: str, r: tg.StageResult, than: tg.StageResult | None = None) -> tg.StageResult:
        versus = (
            "" if than is None else f"  gain {than.val_bpb - r.val_bpb:+.4f}  time {r.seconds / than.seconds:5.2f}x"
        )
        print(f"  {name:<44} {r.val_bpb:.4f} bpb {r.seconds:7.1f} s{versus}", flush=True)
        return r

    def gain(self) -> None:
        self.line("windows that do not overlap", self.score("roundtrip"))
        sliding = self.line("sliding, stride 48", self.score("sliding"))
        single = {"TTT_ENABLED": "1", "TTT_RESET": "none", "TTT_CHUNK_TOKENS": "4096", "TTT_LORA_SITES": "q,v"}
        self.line("single LoRA, q and v of the last 2 blocks", self.score("ttt", **single, TTT_LR="0.003"), sliding)
        frozen = self.score("ttt", **{**PUBLISHED, "TTT_LR": "0"})
        self.line("documents, nothing learned", frozen, sliding)
        plain = self.line("LoRA a document, A as drawn", self.score("ttt", **PUBLISHED, TTT_WARM_START_A="0"), frozen)
        self.line("LoRA a document, warm A", self.score("ttt", **PUBLISHED), plain)
        self.line(
            "  and chunks of 8, then 24, at the start",
            self.score("ttt", **PUBLISHED, TTT_SHORT_SCORE_FIRST_STEPS="256:8,2000:24"),
            plain,
        )
        self.line(
            "  and one phase on all weights", self.score("ttt", **{**PUBLISHED, "PHASED_TTT_NUM_PHASES": "1"}), plain
        )

    def sites(self) -> None:
        every = self.line("q,k,v,o,mlp,head", self.score("ttt", **PUBLISHED))
        for sites in ("k,o,mlp,head", "q,v,o,mlp,head", "o,mlp,head", "head", "q,v"):
            self.line(sites, self.score("ttt", **{**PUBLISHED, "TTT_LORA_SITES": sites}), every)

    def order(self) -> None:
        other, bits = tg.longest_first(self.text)
        for phases in ("0", "1"):
            knobs = {**PUBLISHED, "PHASED_TTT_NUM_PHASES": phases}
            mine = self.line(f"order of the text, {phases} phases", self.score("ttt", **knobs))
            r = self.line(f"longest first, {phases} phases", self.score("ttt", other, **knobs), mine)
            cost = bits / r.bytes
            print(
                f"  the order of {len(tg.documents_of(self.text.tokens))} documents: {bits:.0f} bits, {cost:.5f} bpb: {r.val_bpb + cost:.4f} with it"
            )

    def cache(self) -> None:
        fresh = self.line("windows computed anew", self.score("ttt", **PUBLISHED))
        self.line("keys and values kept", self.score("ttt", **PUBLISHED, TTT_KV_CACHE="1"), fresh)

    def tilt(self) -> None:
        forms = {"beta 2.625": {}, "gamma 1": {"NGRAM_TILT_GAMMA": "1"}, "gamma 1, beta learned": {"NGRAM_TILT_GAMMA": "1", "NGRAM_TILT_RATE": "0.8"}}  # fmt: skip
        for on, base in (("alone", "sliding"), ("under the cascade", "ngram")):
            than = self.line(f"{base} without", self.score(base, NGRAM_SCORE="exact"))
            for name, knobs in forms.items():
                stage = "ngram" if base == "ngram" else "tilt"
                self.line(
                    f"tilt {on}, {name}", self.score(stage, NGRAM_SCORE="exact", NGRAM_TILT_ENABLED="1", **knobs), than
                )


# ---- the plan at full size


def synthetic_lengths(seed: int = 0, n: int = 50_000, total: int = 47_851_520) -> np.ndarray:
    """Targets of n documents, lognormal, scaled to `total`; sigma 1.1 gives the 2,500 longest their published 30 %."""
    lengths = np.random.default_rng(seed).lognormal(0.0, 1.1, n)
    return np.maximum(1, (lengths * total / lengths.sum()).astype(np.int64))


def estimate(ranks: int = 8, peak: float = 989e12, share: float = 0.11) -> None:
    """Forwards, steps, FLOPs and seconds of the frontier's test-time training, with the sum written down."""
    depth, d, v, rank, context, chunk, rows = 17, 512, 8192, 80, 2560, 48, 64
    matrices = depth * (2 * d * d + 2 * d * d // 2 + 8 * d * d)  # q, out; k, v; up, down
    site = 2 * rank * d  # A and B of o or mlp
    lora = depth * 2 * site + rank * (d + v)
    lengths = synthetic_lengths()
    starts = np.cumsum([0, *lengths])
    documents = [tg.Document(int(s), int(n)) for s, n in zip(starts, lengths, strict=False)]
    edges = tg.block_edges(documents, -(-int(starts[-1]) // 24))
    chunks = list(tg.chunk_starts([(math.inf, chunk)], int(lengths.max())))
    steps, windows, learned, slowest = 0, 0, 0, 0.0
    for lo, hi in itertools.pairwise([1, *edges]):
        block = documents[bisect_left(starts, lo - 1) : bisect_left(starts, hi - 1)]
        loads = []
        for batches in tg.deal_documents(block, ranks, rows, chunks, context):
            sent = 0
            for batch in batches:
                targets = np.array([d.targets for d in batch])
                ends = np.arange(chunk, targets.max() + chunk, chunk)
                active, going = ((targets > at[:, None]).sum(1) for at in (ends - chunk, ends))
                seen = np.minimum(ends, context)
                sent += int((active * seen).sum())
                steps, learned = steps + int((going > 0).sum()), learned + int((going * seen).sum())
            loads.append(sent)
        windows, slowest = windows + sum(loads), slowest + max(loads)
    # 2 a weight and token forward; backward through frozen weights 2 more; attention 2 products of T D / 2 pairs a token.
    per_token = 2 * (matrices + depth * 2 * site) + 2 * depth * context * d
    flops = per_token * windows + (per_token + 2 * depth * 2 * site) * learned
    phase = 6 * (matrices + v * d) * 0.3 * lengths.sum()
    pace = ranks * peak * share
    balance = slowest * ranks / windows
    parts = {
        "LoRA": flops / pace * balance,
        "one phase of SGD": phase / pace,
        "n-grams, both statistics": 2 * 5.0,
        "loading": 30.0,
    }
    print(f"  documents {len(lengths):,}, targets {lengths.sum():,}, longest {lengths.max():,}; the 2,500 longest hold "
          f"{np.sort(lengths)[-2500:].sum() / lengths.sum():.0%}")  # fmt: skip
    print(
        f"  window tokens {windows:.3e} ({windows / lengths.sum():.1f} a target), optimizer steps {steps:,} ({steps // ranks:,} a rank)"
    )
    print(
        f"  FLOPs {flops:.2e} (LoRA) + {phase:.2e} (phase); the fullest rank of each block has {balance:.2f}x the mean"
    )
    print(
        "  seconds at 11 % of peak: "
        + " + ".join(f"{name} {s:.0f}" for name, s in parts.items())
        + f" = {sum(parts.values()):.0f}"
    )
    held = rows * lora * 4 * 4  # parameters, gradients, two moments, fp32
    kept = (
        rows * context * depth * (2 * d * 11) * 2
    )  # inputs of norms, projections, attention, both halves of the MLP; bf16
    print(f"  memory: LoRA of {rows} documents {lora:,} numbers each, {held / 2**30:.1f} GiB with gradients and moments; "
          f"activations about {kept / 2**30:.1f} GiB; two models in fp32 {2 * 4 * 36e6 / 2**30:.1f} GiB")  # fmt: skip
    cached = per_token * lengths.sum() * 2
    print(f"  with TTT_KV_CACHE=1: {cached:.1e} FLOPs, {cached / flops:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--data", default="")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=80, help="of the LoRA; alpha keeps the published ratio to it")
    parser.add_argument("--parts", default="gain,sites,order,cache,tilt")
    parser.add_argument("--estimate", action="store_true")
    args = parser.parse_args()
    if args.estimate:
        print("estimate, 8 GPUs:")
        return estimate()
    if args.artifact is None:
        parser.error("name an artifact, or --estimate")
    bench = Bench(args)
    print(f"{len(bench.text.tokens):,} tokens, {len(tg.documents_of(bench.text.tokens))} documents, TTT_LR={args.lr:g}")
    for part in args.parts.split(","):
        started = time.perf_counter()
        print(f"{part}:")
        getattr(bench, part)()
        print(f"  {time.perf_counter() - started:.0f} s")
    return None


if __name__ == "__main__":
    main()
