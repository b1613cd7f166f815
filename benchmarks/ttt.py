"""Test-time training document by document against sliding windows and the single LoRA, on one artifact and one text.

    python benchmarks/ttt.py ARTIFACT [--data FOLDER] [--tokens 60000] [--parts lr,gain,sites,order,tilt] [--context 0]
    python benchmarks/ttt.py --estimate

ARTIFACT is any finished run's; FOLDER (default: its own data) holds the validation split, of which the first --tokens are
scored. All figures are bits per byte of the same text with the same context length (--context, default: as trained) and
the seconds of the stage, side by side in one process:

    lr      the learning rates of the parts below, each the best of a few on the last --training-tokens of the *training* split
    gain    non-overlapping windows, sliding windows (stride = chunk), the single LoRA, a LoRA a document, warm A, phases
    sites   a LoRA a document for each choice of sites
    order   the text's order against the published one, longest document first, with the bits of order that figure leaves out
    tilt    the token tilt on the network, alone and under the cascade, for several strengths

--estimate plans the evaluation of RECIPE=frontier on 8 GPUs from a synthetic text of 50,000 documents; it needs no artifact, and any
knob may be set: TTT_CHUNK_SIZE=24 python benchmarks/ttt.py --estimate.
The settings are those of the published runs but for the learning rates and the text that the single LoRA and the phases take a
step on, which fit other sizes: part lr chooses the rates, --lr sets that of the documents without it. The validation text is for measuring: nothing is chosen by these figures.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg
from tools.plan import EvaluationPlan, deal_blocks, synthetic_lengths

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
                     "SCORE_STAGE": "auto", "EVAL_STRIDE": PUBLISHED["TTT_CHUNK_SIZE"], "EVAL_SEQ_LEN": str(args.context)}  # fmt: skip
        self.document = {
            **PUBLISHED,
            "TTT_LORA_RANK": str(args.rank),
            "TTT_LORA_ALPHA": str(1.8 * args.rank),
            "TTT_LR": str(args.lr),
        }
        self.single = {
            "TTT_ENABLED": "1",
            "TTT_RESET": "none",
            "TTT_CHUNK_TOKENS": "1024",
            "TTT_LORA_SITES": "q,v",
            "TTT_LR": "0.003",
        }
        self.phase = {"PHASED_TTT_NUM_PHASES": "1", "GLOBAL_TTT_CHUNK_TOKENS": "1024", "GLOBAL_TTT_LR": "0.001"}
        cfg = self.config()
        self.run, paths = tg.Run(cfg, 0, 0, 1, 1), tg.find_data(cfg, vocab_size=cfg.vocab_size)
        tokenizer = tg.Tokenizer(paths.tokenizer, cfg.vocab_size)
        self.text = tg.load_validation(cfg, paths.folder, tokenizer)
        held = np.array(tg.load_split(paths.folder, "train")[-1][-args.training_tokens :]).astype(np.int64)
        counts = np.concatenate([[0], tokenizer.count_bytes(held)])
        self.training = tg.ValidationText(torch.from_numpy(held), torch.from_numpy(counts), complete=True)
        self.model = tg.load_model(cfg, self.run, self.blob).eval()
        self.scored: dict[tuple[object, ...], tg.StageResult] = {}

    def config(self, **knobs: str) -> tg.Config:
        return tg.load_config({**self.base, **knobs}, self.header).cfg

    def score(self, stage: str, text: tg.ValidationText | None = None, **knobs: str) -> tg.StageResult:
        """One stage under these knobs, in a fresh evaluation; a second time the same result."""
        text = text or self.text
        key = (stage, id(text), *sorted(knobs.items()))
        if key not in self.scored:
            evaluation = tg.Evaluation(self.config(**knobs), self.run, self.model, text)
            self.scored[key] = evaluation.score(stage)
        return self.scored[key]

    def line(self, name: str, r: tg.StageResult, than: tg.StageResult | None = None) -> tg.StageResult:
        versus = (
            "" if than is None else f"  gain {than.val_bpb - r.val_bpb:+.4f}  time {r.seconds / than.seconds:5.2f}x"
        )
        print(f"  {name:<44} {r.val_bpb:.4f} bpb {r.seconds:7.1f} s{versus}", flush=True)
        return r

    def lr(self) -> None:
        """Choose each rate by the training text; the first of a list that loses ends it."""
        forms = [("a LoRA a document", self.document, "TTT_LR", (1e-3, 3e-3, 1e-2, 3e-2)),
                 ("single LoRA", self.single, "TTT_LR", (1e-3, 3e-3, 1e-2, 3e-2)),
                 ("phase", self.phase, "GLOBAL_TTT_LR", (1e-3, 1e-2, 1e-1))]  # fmt: skip
        for name, knobs, rate, values in forms:
            best = math.inf
            for value in values:
                tried = {**(self.document if knobs is self.phase else {}), **knobs, rate: f"{value:g}"}
                r = self.line(f"{name}, {rate}={value:g}, training text", self.score("ttt", self.training, **tried))
                if r.val_bpb >= best:
                    break
                best, knobs[rate] = r.val_bpb, f"{value:g}"
            print(f"  {name}: {rate}={knobs[rate]}")

    def gain(self) -> None:
        self.line("windows that do not overlap", self.score("roundtrip"))
        sliding = self.line("sliding, stride 48", self.score("sliding"))
        self.line("single LoRA, q and v of the last 2 blocks", self.score("ttt", **self.single), sliding)
        frozen = self.line("documents, nothing learned", self.score("ttt", **{**self.document, "TTT_LR": "0"}), sliding)
        drawn = self.score("ttt", **self.document, TTT_WARM_START_A="0")
        self.line("LoRA a document, A as drawn", drawn, frozen)
        plain = self.line("LoRA a document, warm A", self.score("ttt", **self.document), drawn)
        short = self.score("ttt", **self.document, TTT_SHORT_SCORE_FIRST_STEPS="256:8,2000:24")
        self.line("  and chunks of 8, then 24, at the start", short, plain)
        self.line("  and one phase on all weights", self.score("ttt", **{**self.document, **self.phase}), plain)

    def sites(self) -> None:
        every = self.line("q,k,v,o,mlp,head", self.score("ttt", **self.document))
        for sites in ("k,o,mlp,head", "q,v,o,mlp,head", "o,mlp,head", "head", "q,v"):
            self.line(sites, self.score("ttt", **{**self.document, "TTT_LORA_SITES": sites}), every)

    def order(self) -> None:
        other, bits = tg.longest_first(self.text)
        for phases in ("0", "1"):
            knobs = {**self.document, **(self.phase if phases == "1" else {})}
            mine = self.line(f"order of the text, {phases} phases", self.score("ttt", **knobs))
            r = self.line(f"longest first, {phases} phases", self.score("ttt", other, **knobs), mine)
            cost = bits / r.bytes
            print(
                f"  the order of {len(tg.documents_of(self.text.tokens))} documents: {bits:.0f} bits, {cost:.5f} bpb: {r.val_bpb + cost:.4f} with it"
            )

    def tilt(self) -> None:
        """All forms on the scores of one network pass, whose hints do not depend on the strength."""
        on, networks = {"NGRAM_SCORE": "exact", "NGRAM_TILT_ENABLED": "1"}, {}
        forms = {"beta 2.625": {}, "gamma 1": {"NGRAM_TILT_GAMMA": "1"}}  # fmt: skip

        def score(stage: str, **knobs: str) -> tg.StageResult:
            evaluation = tg.Evaluation(self.config(**{**on, **knobs}), self.run, self.model, self.text)
            evaluation.networks = networks
            return evaluation.score(stage)

        for stage, base in (("tilt", "sliding"), ("ngram", "ngram")):
            than = self.line(f"{base} without", score(base, NGRAM_TILT_ENABLED="1" if base == "sliding" else "0"))
            for name, knobs in forms.items():
                self.line(f"tilt on {base}, {name}", score(stage, **knobs), than)


# ---- the plan at full size


class Plan(NamedTuple):
    """What test-time training document by document takes."""

    sent: float  # tokens that go through the network, all windows together
    steps: int  # of optimizers, batches of documents one after the other
    flops: float
    balance: float  # tokens of the fullest rank of each block over the mean


def plan_documents(cfg: tg.Config, model: tg.GPT, lengths: np.ndarray, ranks: int) -> Plan:
    """The plan for documents of so many targets, from the evaluator's own blocks, chunks and batches."""
    sites, context = tg.lora_sites(cfg, model), cfg.ttt_eval_len
    sent = np.array(list(tg.chunk_starts(cfg.ttt_chunk_steps, int(lengths.max())))) - 1  # tokens of the first chunks
    done = np.searchsorted(sent + 1, np.arange(lengths.max() + 1), side="right")  # chunks by a document's targets
    steps, slowest = 0, 0.0
    for dealt in deal_blocks(cfg, lengths, ranks):
        steps += sum(int(done[batch[0].targets]) - 1 for batches in dealt for batch in batches)
        slowest += max(sum(float(sent[done[d.targets]]) for batch in batches for d in batch) for batches in dealt)
    total, learned = (float(sent[done[lengths] - last].sum()) for last in (0, 1))
    # A forward without the head; new tokens see all of the context. Backward through frozen weights costs a forward, through LoRA two.
    plain = tg.flops_per_token(model, 2 * context) / 3 - 2 * cfg.vocab_size * cfg.model_dim
    lora = 2.0 * cfg.ttt_lora_rank * sum(d_out + d_in for (slot, _), (d_out, d_in) in sites.items() if slot >= 0)
    flops = (plain + lora) * total + (plain + 2 * lora) * learned
    return Plan(total, steps, flops, slowest * ranks / total)


# A number of a LoRA at each step: AdamW reads and writes it and both moments in fp32, and writes, sums and reads its gradient; three products
# read it in bf16.
STEP_BYTES, BANDWIDTH = 6 * 4 + 3 * 4 + 2 + 3 * 2, 3.35e12  # bytes, of an H100 a second


def estimate(ranks: int = 8, peak: float = 989e12, share: float = 0.11) -> None:
    """Forwards, steps, FLOPs and seconds of all stages of RECIPE=frontier, or of what the environment makes of it, with the sum written down."""
    cfg = tg.load_config({"RECIPE": "frontier", **os.environ}, has_gpu=lambda: True).cfg
    with torch.device("meta"):
        model = tg.GPT(cfg)
    lengths, context, pace = synthetic_lengths(), cfg.ttt_eval_len, ranks * peak * share
    n = int(lengths.sum())
    ttt = plan_documents(cfg, model, lengths, ranks)
    phase = tg.flops_per_token(model, context) * n * cfg.global_ttt_epochs * sum(
        cfg.phased_ttt_prefix * (i + 1) / cfg.phased_ttt_num_phases for i in range(cfg.phased_ttt_num_phases))  # fmt: skip
    cpu = (
        1e-6 * n * sum(cfg.counted_orders) / 12
    )  # measured at order 12 on one CPU core: .54 us a token and 1.2, see RESULTS.md
    numbers, rows = cfg.ttt_lora_rank * sum(map(sum, tg.lora_sites(cfg, model).values())), cfg.ttt_batch_size
    steps = ttt.steps / ranks * rows * numbers * STEP_BYTES / BANDWIDTH
    parts = {"loading (published: 20 to 60)": 30.0, "roundtrip": tg.flops_per_token(model, cfg.eval_len) / 3 * n / pace,
             "LoRA": ttt.flops / pace * ttt.balance, "its steps": steps, "phases": phase / pace, "n-gram statistics": 0.54 * cpu, "mixing": 1.2 * cpu}  # fmt: skip
    print(f"  stages {', '.join(cfg.stages)}; {len(lengths):,} documents, {n:,} targets, longest {lengths.max():,}; the 2,500 longest hold "
          f"{np.sort(lengths)[-2500:].sum() / n:.0%}")  # fmt: skip
    print(f"  tokens through the network {ttt.sent:.3e} ({ttt.sent / n:.1f} a target), optimizer steps {ttt.steps:,} ({ttt.steps // ranks:,} a rank); "
          f"FLOPs {ttt.flops:.2e} + {phase:.2e} (phases); the fullest rank of each block has {ttt.balance:.2f}x the mean")  # fmt: skip
    print(f"  seconds at {share:.0%} of peak: {' + '.join(f'{name} {s:.0f}' for name, s in parts.items())} = {sum(parts.values()):.0f}"
          f" of EVAL_WALLCLOCK_SECONDS={cfg.eval_wallclock_seconds:g}")  # fmt: skip
    peaks = EvaluationPlan(cfg, lengths, ranks).peaks
    print(f"  GiB of memory, at most, on each GPU: {', '.join(f'{part} {size / 2**30:.1f}' for part, size in peaks.items())}; of them LoRA of "
          f"{rows} documents, {numbers:,} numbers each: {rows * numbers * 12 / 2**30:.1f} with moments")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--data", default="")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--training-tokens", type=int, default=6000, help="of the training split's end, to choose rates by"
    )
    parser.add_argument("--rank", type=int, default=80, help="of the LoRA; alpha keeps the published ratio to it")
    parser.add_argument("--parts", default="lr,gain,sites,order,tilt")
    parser.add_argument("--estimate", action="store_true")
    args = parser.parse_args()
    if args.estimate:
        print("estimate, 8 GPUs:")
        return estimate()
    if args.artifact is None:
        parser.error("name an artifact, or --estimate")
    bench = Bench(args)
    documents, context = len(tg.documents_of(bench.text.tokens)), bench.config().eval_len
    print(f"{len(bench.text.tokens):,} tokens, {documents} documents, context {context}, LoRA of rank {args.rank}")
    for part in args.parts.split(","):
        started = time.perf_counter()
        print(f"{part}:")
        getattr(bench, part)()
        print(f"  {time.perf_counter() - started:.0f} s")
    return None


if __name__ == "__main__":
    main()
