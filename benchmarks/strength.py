"""Which parts still pay on a strong network: networks of 1.5 to 24 M tokens from one training, each part measured on all of them.

    python benchmarks/strength.py train --data DATA --out FOLDER [--seed 1] [--points 1.5 3 6 12 18 24] [--shape 4x256]
    python benchmarks/strength.py measure FOLDER --data DATA [--parts stages ttt quant spend] [--only 4x256-s1-6M] [--rates LoRA=0.01 phase=0.1]
    python benchmarks/strength.py report FOLDER [--picture strength.png] [--data DATA --fresh 0.02]

DATA is a folder of data/make_shards.py with case factored out and more training tokens than are trained on. `train` runs
train_gpt.py with the cpu recipe's network. A point is a finished network: the rate is flat for the first 80 % of its steps and
falls to a tenth over the rest, and the next point goes on from the checkpoint at those 80 %, so that no token is read twice.
Rates follow steps, not the clock. Each piece may be stopped at any time; the same line again goes on.

`measure` scores whole validation documents and chooses settings on training text that no training reaches. Each outcome is a
line of FOLDER/outcomes.jsonl with the nats of each document as soon as it is there; the same line again goes on. Seconds are
CPU seconds. `report` prints gains in bits per byte, paired by document, with their standard errors, and draws them; with --fresh
only of documents of which so small a share stands in the training text, in runs of 16 tokens.

    stages   windows, sliding windows, and on these the artifact's n-grams, the text's own, and the tilt
    ttt      a LoRA a document, one change at a time
    spend    what else the seconds of test-time training may buy
    quant    the gap at equal bytes: independent codes, trellises, steps of columns, LQER
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg

BATCH = 8192  # tokens a step
EVERY = 37  # steps between checkpoints: divides 80 % of each point's steps
POINTS = {1.5: 185, 3: 370, 6: 740, 12: 1480, 18: 2220, 24: 2960}  # million tokens -> steps
TRAINING = {
    "RECIPE": "cpu", "DEVICE": "cpu", "TRAIN_BATCH_TOKENS": str(BATCH), "MAX_WALLCLOCK_SECONDS": "0", "WARMDOWN_FRAC": "0.2",
    "MIN_LR": "0.1", "NGRAM_TABLE": "none", "NGRAM_SCORE": "off", "EVAL_STRIDE": "0",
    "EVAL_STAGES": "roundtrip", "VAL_TOKENS": "20000", "COMPILE": "0", "CHECKPOINT_EVERY": str(EVERY), "CHECKPOINT_KEEP": "12",
}  # fmt: skip


class Network(NamedTuple):
    """One finished network: its shape (blocks x width), seed and million tokens."""

    shape: str
    seed: int
    tokens: float

    @property
    def name(self) -> str:
        return f"{self.shape}-s{self.seed}-{self.tokens:g}M"

    @property
    def knobs(self) -> dict[str, str]:
        blocks, width = map(int, self.shape.split("x"))
        heads = width // 64
        return {**TRAINING, "SEED": str(self.seed), "ITERATIONS": str(POINTS[self.tokens]), "NUM_LAYERS": str(blocks), "MODEL_DIM": str(width),
                "NUM_HEADS": str(heads), "NUM_KV_HEADS": str(heads if heads % 2 else heads // 2)}  # fmt: skip

    def checkpoint(self, folder: Path, step: int) -> Path:
        return folder / f"{self.name}.ckpt" / f"step_{step:06d}.pt"

    def finished(self, folder: Path) -> Path:
        """The checkpoint of its last step."""
        return self.checkpoint(folder, POINTS[self.tokens])

    def fork(self, folder: Path) -> Path:
        """The checkpoint that the next point goes on from: the rate has not begun to fall."""
        return self.checkpoint(folder, POINTS[self.tokens] * 4 // 5)


def start(network: Network, data: str, folder: Path, before: Network | None) -> subprocess.Popen:
    """Train this network from its own newest checkpoint, or from the fork of the point before."""
    env = {
        **os.environ,
        **network.knobs,
        "DATA_PATH": data,
        "LOG_DIR": str(folder),
        "RUN_ID": network.name,
        "FORCE": "1",
    }
    own = any((folder / f"{network.name}.ckpt").glob("step_*.pt"))
    env["RESUME"] = "auto" if own or before is None else str(before.fork(folder))
    with (folder / f"{network.name}.out").open("a") as out:
        return subprocess.Popen([sys.executable, tg.__file__], env=env, stdout=out, stderr=subprocess.STDOUT)


def train(args: argparse.Namespace) -> None:
    """Each point as soon as the one before has reached its fork, so that at most two run at once."""
    args.out.mkdir(parents=True, exist_ok=True)
    networks = [Network(args.shape, args.seed, tokens) for tokens in args.points]
    running: list[tuple[Network, subprocess.Popen]] = []
    smaller = [tokens for tokens in POINTS if tokens < args.points[0]]
    first = Network(args.shape, args.seed, smaller[-1]) if smaller else None
    known = first if first and (args.out / f"{first.name}.ckpt").exists() else None  # another call trains or trained it
    for before, network in zip([known, *networks], networks, strict=False):
        if (args.out / f"{network.name}.pgz").exists():
            continue
        if before is not None:
            while not before.fork(args.out).exists():
                fail(running)
                time.sleep(1)
        running.append((network, start(network, args.data, args.out, before)))
    for _, process in running:
        process.wait()
    fail(running)


def fail(running: list[tuple[Network, subprocess.Popen]]) -> None:
    """End with the name of a training that failed."""
    for network, process in running:
        if process.poll():
            sys.exit(f"{network.name}: train_gpt.py ended with status {process.returncode}; see {network.name}.out")


# ---- measuring

STAGE_TOKENS, TTT_TOKENS, GAP_TOKENS, CHOICE_TOKENS = 150_000, 60_000, 30_000, 8_000
LONGEST = 3000  # tokens of a document that is measured
RUN_TOKENS = 16  # a run of as many that stands in the training text was read before
TABLE_TOKENS = BATCH * POINTS[1.5]  # training tokens whose n-grams are counted: all networks were trained on them
ARTIFACT_BYTES = 1_500_000  # of which a table takes a share: about the 4x256 network at 3.5 bits
LORA = {
    "TTT_ENABLED": "1", "TTT_RESET": "document", "TTT_LORA_RANK": "16", "TTT_LORA_ALPHA": "28.8", "TTT_LORA_BLOCKS": "0",
    "TTT_LORA_SITES": "q,v,o,mlp,head", "TTT_WD": "0.5", "TTT_BETA1": "0", "TTT_BETA2": "0.99", "TTT_ADAM_EPS": "1e-10",
    "TTT_GRAD_CLIP": "0", "TTT_BYTE_WEIGHTED": "0", "TTT_CHUNK_SIZE": "48", "PHASED_TTT_NUM_PHASES": "0", "TTT_BLOCK_TOKENS": "2048",
}  # fmt: skip
PHASE = {"PHASED_TTT_NUM_PHASES": "1", "GLOBAL_TTT_CHUNK_TOKENS": "1024"}
TILT = {"NGRAM_TILT_ENABLED": "1", "NGRAM_TILT_ORDER": "16"}
RATES, PHASE_RATES = ("0.001", "0.003", "0.01", "0.03"), ("0.001", "0.01", "0.1", "1")
SHORT = {"TTT_SHORT_SCORE_FIRST_STEPS": "256:8,2000:24"}
CHANGES: dict[str, dict[str, str]] = {  # from a LoRA a document
    "sites o,mlp,head": {"TTT_LORA_SITES": "o,mlp,head"},
    "short chunks": SHORT,
    "A as drawn": {"TTT_WARM_START_A": "0"},
    "phase": PHASE,
    "phase and caps": {**PHASE, "ASYM_LOGIT_RESCALE": "1"},
    "everything": {**PHASE, **SHORT, "ASYM_LOGIT_RESCALE": "1"},
}
SPENT: dict[str, dict[str, str]] = {  # what the seconds may be spent on that keeping keys and values takes away
    "chunks of 24": {"TTT_CHUNK_SIZE": "24"},
    "rank 64": {"TTT_LORA_RANK": "64", "TTT_LORA_ALPHA": "115.2"},
    "site head": {"TTT_LORA_SITES": "head"},
    "two steps": {},  # TwoSteps
}


class TwoSteps(tg.DocumentBatch):
    """A second step on each chunk, from the keys and values before it; later chunks see those that the chunk was scored with."""

    def score(self, tokens: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        self.before = copy.copy(self.cache)
        return super().score(tokens, lo, hi)

    def update(self, tokens: torch.Tensor, lo: int, hi: int) -> None:
        super().update(tokens, lo, hi)
        if self.rows(hi):
            kept, self.cache = self.cache, self.before
            super().score(tokens, lo, hi)
            self.cache = kept
            super().update(tokens, lo, hi)


QUANT: dict[str, dict[str, Any]] = {  # the slowest last
    "independent": {},
    "8 states": {"quant_trellis": 8},
    "LQER": {"quant_trellis": 8, "lqer_top_k": 3, "lqer_asym_group": 32},
    "8 states, 32 sequences": {"quant_trellis": 8, "gptq_n_samples": 32},
    "steps of columns": {"even": True},
    "64 states": {"quant_trellis": 64},
}
BITS = ("independent", "8 states", "steps of columns", "64 states")  # at 3 and 4 bits too, the others at 3.5 alone


def whole_documents(text: tg.ValidationText, n: int) -> tg.ValidationText:
    """The first documents of at most LONGEST targets that together have at most n; longer ones are left out, or two would decide."""
    pieces, total = [], 0
    for start, targets in tg.documents_of(text.tokens)[:-1]:
        if targets <= LONGEST and total + targets <= n:
            pieces.append(torch.arange(start, start + targets))
            total += targets
    at = torch.cat(pieces)
    tokens, sizes = text.tokens[at], text.bytes[at]
    return tg.ValidationText(torch.cat([tokens, tokens[:1]]), torch.cat([sizes, sizes[:1]]), complete=True)


def by_document(text: tg.ValidationText, values: torch.Tensor) -> list[float]:
    """Sums over the targets of each document of values (n - 1,), those of the targets 1 .. n-1."""
    return [float(values[d.start : d.start + d.targets].sum()) for d in tg.documents_of(text.tokens)]


def fresh_documents(data: Path, n: int, share: float) -> list[bool]:
    """Whether less than `share` of the RUN_TOKENS-token runs of each document measured on n tokens stand in what the last point trained on."""

    def runs(tokens: np.ndarray) -> np.ndarray:
        hashes, rows = np.zeros(len(tokens) - RUN_TOKENS + 1, np.uint64), len(tokens) - RUN_TOKENS + 1
        for i in range(RUN_TOKENS):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[i : i + rows].astype(np.uint64) + np.uint64(1)
        return hashes

    learned, read = (np.concatenate(tg.load_split(data, split)).astype(np.int64) for split in ("train", "val"))
    tokens = torch.from_numpy(read)
    text = whole_documents(tg.ValidationText(tokens, torch.ones_like(tokens), complete=True), n)
    known = np.isin(runs(text.tokens.numpy()), runs(learned[: BATCH * max(POINTS.values())]))
    ends = [(d.start, d.start + max(1, d.targets - RUN_TOKENS + 1)) for d in tg.documents_of(text.tokens)]
    return [float(known[start:end].mean()) < share for start, end in ends]


class Outcomes:
    """What is measured, kept in a file of one JSON line each: what stands there is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outcomes.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {(r["network"], r["part"], r["name"]): r for r in map(json.loads, lines)}

    def get(self, network: str, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An outcome, from the file or measured now: the nats and bytes of each document, seconds, and what else `measure` found."""
        key = (network, part, name)
        if key not in self.known:
            started = time.process_time()
            row = {"network": network, "part": part, "name": name, **measure()}
            row.setdefault("seconds", round(time.process_time() - started, 2))
            self.known[key] = row
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if k not in ("nats", "bytes")}
            print(f"{bpb(row):.4f} {shown}" if "nats" in row else shown, flush=True)
        return self.known[key]


def bpb(row: dict[str, Any]) -> float:
    return sum(row["nats"]) / math.log(2) / sum(row["bytes"])


def gain(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    """Bits per byte that `after` takes off, and its standard error over documents, each weighted by its bytes."""
    a, b, size = (np.array(x) for x in (before["nats"], after["nats"], before["bytes"]))
    saved = (a - b) / math.log(2)
    mean, n = saved.sum() / size.sum(), len(size)
    return mean, math.sqrt(n / (n - 1) * ((saved - mean * size) ** 2).sum()) / size.sum()


class Subject:
    """A finished network, its text, and what is measured on it."""

    def __init__(self, network: Network, folder: Path, data: str, outcomes: Outcomes, rates: dict[str, str]) -> None:
        self.rates = rates  # of LoRA and of phases, where they are not chosen anew
        self.network, self.folder, self.data, self.outcomes = network, folder, data, outcomes
        self.cfg = self.config()
        paths = tg.find_data(self.cfg, vocab_size=self.cfg.vocab_size)
        tokenizer = tg.Tokenizer(paths.tokenizer, self.cfg.vocab_size, paths.transform)
        self.run = tg.Run(self.cfg, 0, 0, 1, 1)
        self.run.log = lambda *_args, **_kwargs: None
        self.text = tg.load_validation(dataclasses.replace(self.cfg, val_tokens=0), paths.folder, tokenizer)
        self.stream = tg.TokenStream(tg.load_split(paths.folder, "train"), self.cfg.vocab_size)
        trained = BATCH * max(POINTS.values()) + 1
        if self.stream.total < trained + 500_000:
            sys.exit(f"{data}: {self.stream.total:,} training tokens leave nothing to choose by beyond {trained:,}")
        held = np.array(tg.load_split(paths.folder, "train")[-1][-300_000:-200_000]).astype(np.int64)
        held = held[int(np.argmax(held == tg.BOS)) :]
        counts = np.concatenate([[0], tokenizer.count_bytes(held)])
        self.held = tg.ValidationText(torch.from_numpy(held), torch.from_numpy(counts), complete=True)
        self.state = torch.load(network.finished(folder), map_location="cpu", weights_only=True)
        self.model = self.trained(self.cfg)

    def config(self, **knobs: str) -> tg.Config:
        return tg.fit_data(
            tg.load_config({**self.network.knobs, "DATA_PATH": self.data, "EVAL_STAGES": "auto", **knobs})
        )[0].cfg

    def trained(self, cfg: tg.Config) -> tg.GPT:
        """The network; parts of it that training lacked are new."""
        model = tg.GPT(cfg).place(self.run.device, tg.choose_attention(self.cfg, self.run.device)[1])
        model.load_state_dict(self.state["model"], strict=False)
        return model.eval()

    def get(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.outcomes.get(self.network.name, part, name, measure)

    def score(self, evaluation: tg.Evaluation, stage: str) -> dict[str, Any]:
        """Nats, bytes of each document; CPU seconds of this stage alone."""
        chain, span = evaluation.experts(stage)
        kept, started = tg.RecordingScorer(chain[-1], ()), time.process_time()
        tg.score_first([*chain, kept], evaluation.text, span)
        seconds = round(time.process_time() - started, 2)
        return {"nats": by_document(evaluation.text, -torch.cat(kept.scores)), "seconds": seconds,
                "bytes": by_document(evaluation.text, evaluation.text.bytes[1:])}  # fmt: skip

    def evaluation(self, text: tg.ValidationText, tables: tg.Tables = tg.NO_TABLES, **knobs: str) -> tg.Evaluation:
        cfg = self.config(**knobs)
        model = self.model if not cfg.asym_logit_rescale else self.trained(cfg)
        return tg.Evaluation(cfg, self.run, model, text, tables)

    # ---- the parts

    def table(self, share: float) -> list[tg.TrieLevel]:
        """N-grams of the training text in that share of ARTIFACT_BYTES, kept in the folder."""
        path = self.folder / f"table-{share:g}.bin"
        if not path.exists():
            learned = self.stream.read(0, TABLE_TOKENS - 1).astype(np.int64)
            tg.atomic_write(
                path,
                tg.build_trie(learned, self.cfg.vocab_size, self.cfg.ngram_table_order, int(share * ARTIFACT_BYTES)),
            )
        return tg.unpack_trie(path.read_bytes(), self.cfg.vocab_size)

    def measure_stages(self) -> None:
        text, networks = whole_documents(self.text, STAGE_TOKENS), {}
        on = {"EVAL_STRIDE": "256", "NGRAM_SCORE": "exact", "NGRAM_ORDER": "16"}
        tilt, steep = TILT, {**TILT, "NGRAM_TILT_GAMMA": "1"}
        forms = [("windows", "roundtrip", 0, tilt), ("sliding", "sliding", 0, tilt), ("tilt", "tilt", 0, tilt), ("steep tilt", "tilt", 0, steep),
                 ("n-grams", "ngram", 0, {}), ("tilt, n-grams", "ngram", 0, tilt), ("steep tilt, n-grams", "ngram", 0, steep),
                 ("n-grams of order 24", "ngram", 0, {"NGRAM_ORDER": "24"}), ("n-grams of order 8", "ngram", 0, {"NGRAM_ORDER": "8"}),
                 ("table 1 %", "table", 0.01, {}), ("table 5 %", "table", 0.05, {}), ("table 20 %", "table", 0.2, {}),
                 ("table 1 %, n-grams", "ngram", 0.01, {}), ("table 5 %, n-grams", "ngram", 0.05, {}), ("table 20 %, n-grams", "ngram", 0.2, {})]  # fmt: skip
        for name, stage, share, knobs in forms:
            self.get("stages", name, partial(self.staged, text, networks, stage, {**on, **knobs}, share))

    def staged(
        self, text: tg.ValidationText, networks: dict[str, Any], stage: str, knobs: dict[str, str], share: float = 0.0
    ) -> dict[str, Any]:
        """A stage, on a pass of the network that is made once, with the hints of the tilt, and kept in `networks`."""
        tables = tg.Tables(trie=self.table(share)) if share else tg.NO_TABLES
        evaluation = self.evaluation(text, tables, **knobs, **({"NGRAM_TABLE": "exact"} if share else {}))
        evaluation.networks, network = networks, evaluation.best_network
        if stage not in ("roundtrip", network) and network not in networks:
            first = self.evaluation(text, **{**knobs, **TILT})
            first.networks = networks
            self.score(first, network)
        return self.score(evaluation, stage)

    def choose(self, name: str, knob: str, values: tuple[str, ...], **knobs: str) -> str:
        """The value of least loss on held-back training text; the first that loses ends the search."""
        if name in self.rates:
            return self.rates[name]
        best, text = (math.inf, ""), whole_documents(self.held, CHOICE_TOKENS)
        for value in values:
            row = self.get(
                "choice",
                f"{name} {knob}={value}",
                lambda value=value: self.score(self.evaluation(text, **{**knobs, knob: value}), "ttt"),
            )
            if bpb(row) >= best[0]:
                break
            best = bpb(row), value
        return best[1]

    def lora(self) -> tuple[tg.ValidationText, dict[str, str]]:
        """The text of the part, and the knobs of a LoRA a document and of a phase at the rates that fit this network."""
        lora = {**LORA, "EVAL_STRIDE": "48", "NGRAM_SCORE": "exact", "NGRAM_ORDER": "16"}
        lora["TTT_LR"] = self.choose("LoRA", "TTT_LR", RATES, **lora)
        phase = {"GLOBAL_TTT_LR": self.choose("phase", "GLOBAL_TTT_LR", PHASE_RATES, **{**lora, **PHASE})}
        return whole_documents(self.text, TTT_TOKENS), {**lora, **phase}

    def with_rate(self, name: str, lora: dict[str, str], knobs: dict[str, str]) -> dict[str, str]:
        """These knobs and the rate that fits a LoRA with them, where it makes other or more steps."""
        return {**knobs, "TTT_LR": self.choose(name, "TTT_LR", RATES, **{**lora, **knobs})}

    def measure_ttt(self) -> None:
        text, lora = self.lora()
        for name, knobs in (("LoRA", lora), ("nothing learned", {**lora, "TTT_LR": "0"})):
            networks: dict[str, Any] = {}
            for more, stage, tilt in (
                ("", "ttt", TILT),
                (", n-grams", "ngram", {}),
                (", tilt", "tilt", TILT),
                (", tilt, n-grams", "ngram", TILT),
            ):
                self.get("ttt", name + more, partial(self.staged, text, networks, stage, {**knobs, **tilt}))
        short = self.with_rate("short chunks", lora, SHORT)
        for name, knobs in CHANGES.items():
            more = {**knobs, **short} if SHORT.items() <= knobs.items() else knobs
            self.get("ttt", name, lambda more=more: self.score(self.evaluation(text, **{**lora, **more}), "ttt"))

    def measure_spend(self) -> None:
        text, lora = self.lora()
        for name, knobs in SPENT.items():
            form = TwoSteps if name == "two steps" else tg.DocumentBatch
            with mock.patch.object(tg, "DocumentBatch", form):
                more = {**lora, **self.with_rate(name, lora, knobs)}
                self.get("ttt", name, lambda more=more: self.score(self.evaluation(text, **more), "ttt"))

    def measure_quant(self) -> None:
        text = whole_documents(self.text, GAP_TOKENS)
        held = self.held.tokens[: 16 * 512].view(-1, 512)
        cfg = dataclasses.replace(
            self.cfg, gptq_enabled=True, target_bytes=1, control_bits=16, gptq_n_samples=256, compressor="entropy"
        )
        named = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        store = {n: p.store for n, p in self.model.named_parameters()}
        policy = tg.Policy(cfg, named, store)
        coded = sum(w.numel() for n, w in named.items() if policy.bits(n) <= 8)
        calibrations: dict[int, tg.Calibration] = {}
        even = tg.InputStats.columns

        def log_probabilities() -> torch.Tensor:
            with torch.no_grad():
                parts = [self.model.logits(self.model.features(x, tg.Ctx()), tg.Ctx()) for x in held.split(4)]
            return torch.cat(parts).flatten(0, 1).log_softmax(-1)

        def measured(bits: float, even_columns: bool, knobs: dict[str, Any]) -> dict[str, Any]:
            aim = dataclasses.replace(cfg, target_bytes=int(coded * bits / 8) + 6000, **knobs)
            if aim.gptq_n_samples not in calibrations:
                inputs = tg.calibration_inputs(aim, self.run, self.stream)
                calibrations[aim.gptq_n_samples] = tg.calibrate(aim, self.run, self.model, inputs)
            calibration = calibrations[aim.gptq_n_samples]
            tg.InputStats.columns = columns_of_all if even_columns else even
            started = time.process_time()
            budget = tg.BudgetSearch(aim, {}, named, store, calibration, 0).fill()
            seconds = round(time.process_time() - started, 2)
            tg.InputStats.columns = even
            self.model.load_state_dict(named)
            before = log_probabilities()
            self.model.load_state_dict({n: tg.dequantize(s) for n, s in budget.stored.items()})
            divergence = float((before.exp() * (before - log_probabilities())).sum(-1).double().mean())
            row = self.score(tg.Evaluation(self.cfg, self.run, self.model, text), "roundtrip")
            self.model.load_state_dict(named)
            corrected = sum(s.low_rank is not None for s in budget.stored.values())
            return {
                **row,
                "divergence": divergence,
                "size": budget.spent,
                "aim": aim.target_bytes,
                "corrected": corrected,
                "seconds": seconds,
            }

        self.get(
            "quant", "before", lambda: self.score(tg.Evaluation(self.cfg, self.run, self.model, text), "roundtrip")
        )
        cells = [(3.5, name) for name in QUANT] + [(bits, name) for name in BITS for bits in (3.0, 4.0)]
        for bits, name in cells:
            knobs = dict(QUANT[name])
            self.get(
                "quant",
                f"{name}, {bits:g} bits",
                lambda bits=bits, knobs=knobs: measured(bits, knobs.pop("even", False), knobs),
            )


def columns_of_all(inputs: tg.InputStats, name: str) -> torch.Tensor | None:
    """Steps of columns for independent codes too."""
    factors = inputs.factors[name]
    return None if factors is None else tg.column_steps(factors.weight_C)


def finished(folder: Path) -> Iterator[Network]:
    """All networks of the folder, by tokens."""
    names = [path.stem.split("-") for path in folder.glob("*x*-s*M.pgz")]
    found = [Network(shape, int(seed[1:]), float(tokens[:-1])) for shape, seed, tokens in names]
    yield from sorted(found, key=lambda n: (n.tokens, n.shape, n.seed))


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
    for network in finished(args.folder):
        if not args.only or network.name in args.only:
            subject = Subject(
                network, args.folder, args.data, Outcomes(args.folder), dict(rate.split("=") for rate in args.rates)
            )
            for part in args.parts:
                print(f"{network.name}: {part}", flush=True)
                getattr(subject, f"measure_{part}")()


# ---- what came of it

COMPARED = {  # what is gained -> part, without, with
    "sliding windows": ("stages", "windows", "sliding"),
    "table 5 %": ("stages", "sliding", "table 5 %"),
    "table 5 % below n-grams": ("stages", "n-grams", "table 5 %, n-grams"),
    "table 1 %": ("stages", "sliding", "table 1 %"),
    "table 20 %": ("stages", "sliding", "table 20 %"),
    "table 20 % below n-grams": ("stages", "n-grams", "table 20 %, n-grams"),
    "n-grams": ("stages", "sliding", "n-grams"),
    "order 24 for 16": ("stages", "n-grams", "n-grams of order 24"),
    "order 16 for 8": ("stages", "n-grams of order 8", "n-grams"),
    "n-grams over table 5 %": ("stages", "table 5 %", "table 5 %, n-grams"),
    "tilt": ("stages", "sliding", "tilt"),
    "tilt below n-grams": ("stages", "n-grams", "tilt, n-grams"),
    "steep tilt below n-grams": ("stages", "n-grams", "steep tilt, n-grams"),
    "LoRA a document": ("ttt", "nothing learned", "LoRA"),
    "warm A": ("ttt", "A as drawn", "LoRA"),
    "sites q,v besides o,mlp,head": ("ttt", "sites o,mlp,head", "LoRA"),
    "sites besides head": ("ttt", "site head", "LoRA"),
    "short chunks": ("ttt", "LoRA", "short chunks"),
    "rank 64 for 16": ("ttt", "LoRA", "rank 64"),
    "chunks of 24": ("ttt", "LoRA", "chunks of 24"),
    "two steps a chunk": ("ttt", "LoRA", "two steps"),
    "phase": ("ttt", "LoRA", "phase"),
    "caps in the phase": ("ttt", "phase", "phase and caps"),
    "n-grams over LoRA": ("ttt", "LoRA", "LoRA, n-grams"),
    "tilt over LoRA": ("ttt", "LoRA", "LoRA, tilt"),
    "tilt between LoRA and n-grams": ("ttt", "LoRA, n-grams", "LoRA, tilt, n-grams"),
    "n-grams, nothing learned": ("ttt", "nothing learned", "nothing learned, n-grams"),
    "short chunks, phase, caps": ("ttt", "LoRA", "everything"),
}
DRAWN = ("LoRA a document", "n-grams", "n-grams over LoRA", "table 5 %", "table 5 % below n-grams", "tilt", "tilt below n-grams", "sliding windows",
         "short chunks", "phase", "warm A", "sites q,v besides o,mlp,head")  # fmt: skip
AIM = 1.06  # bits per byte of the frontier's network


class Point(NamedTuple):
    """A network's bits per byte in windows, and what a part takes off there, with its standard error."""

    network: Network
    bpb: float
    gain: float
    error: float


def compared(outcomes: Outcomes, networks: list[Network], name: str) -> list[Point]:
    """The part on every network where both sides are measured."""
    part, without, with_it = COMPARED[name]
    points = []
    for network in networks:
        rows = [
            outcomes.known.get((network.name, p, n))
            for p, n in (("stages", "windows"), (part, without), (part, with_it))
        ]
        if all(rows):
            points.append(Point(network, bpb(rows[0]), *gain(*rows[1:])))
    return points


def guessed(points: list[Point]) -> tuple[float, float]:
    """Least and largest gain at AIM on the lines through any two of the last three points of one training."""
    last = points[-3:]
    lines = [(b.gain - a.gain) / (b.bpb - a.bpb) for i, a in enumerate(last) for b in last[i + 1 :]]
    ends = [last[-1].gain + slope * (AIM - last[-1].bpb) for slope in lines]
    return min(ends), max(ends)


def gaps(outcomes: Outcomes, network: Network) -> Iterator[str]:
    """What quantisation costs a network: bytes, divergence in nats a token, gap in bits per byte."""
    before = outcomes.known.get((network.name, "quant", "before"))
    for (name, part, form), row in outcomes.known.items():
        if (name, part) == (network.name, "quant") and form != "before":
            lost, error = gain(row, before)
            yield (f"{network.name} | {form} | {row['size']:,} bytes | divergence {row['divergence']:.6f} | gap {lost:+.5f} +- {error:.5f} | "
                   f"{row['corrected']} corrected | {row['seconds']:.0f} s")  # fmt: skip


def report(args: argparse.Namespace) -> None:
    outcomes, networks = Outcomes(args.folder), list(finished(args.folder))
    if args.fresh:
        sizes = {"stages": STAGE_TOKENS, "ttt": TTT_TOKENS, "spend": TTT_TOKENS, "quant": GAP_TOKENS}
        kept = {part: fresh_documents(args.data, n, args.fresh) for part, n in sizes.items()}
        print(", ".join(f"{part}: {sum(fresh)} of {len(fresh)} documents" for part, fresh in kept.items()))
        for row in outcomes.known.values():
            for field in ("nats", "bytes") if row["part"] in kept and "nats" in row else ():
                row[field] = [x for x, fresh in zip(row[field], kept[row["part"]], strict=True) if fresh]
    print("| what | " + " | ".join(n.name for n in networks) + f" | at {AIM:g}, a guess |")
    print("|---" * (len(networks) + 2) + "|")
    windows = [outcomes.known.get((n.name, "stages", "windows")) for n in networks]
    print("| windows, bpb | " + " | ".join("" if row is None else f"{bpb(row):.4f}" for row in windows) + " | |")
    for name in COMPARED:
        points = {p.network: p for p in compared(outcomes, networks, name)}
        line = [f"{p.gain:+.4f} +- {p.error:.4f}" if (p := points.get(n)) else "" for n in networks]
        one = [p for p in points.values() if (p.network.shape, p.network.seed) == ("4x256", 1)]
        print(f"| {name} | {' | '.join(line)} | {'{:+.4f} to {:+.4f}'.format(*guessed(one)) if len(one) > 2 else ''} |")
    for network in networks:
        print("\n".join(gaps(outcomes, network)))
    if args.picture:
        draw(outcomes, [n for n in networks if (n.shape, n.seed) == ("4x256", 1)], args.picture)


def draw(outcomes: Outcomes, networks: list[Network], path: Path) -> None:
    """Gain against bits per byte of the network, a line a part; dashed: the guess at AIM."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for i, name in enumerate(DRAWN):
        points = compared(outcomes, networks, name)
        if len(points) < 3:
            continue
        x, y, error = ([getattr(p, field) for p in points] for field in ("bpb", "gain", "error"))
        color, marker = f"C{i % 10}", "o" if i < 10 else "s"
        axes.errorbar(x, y, error, color=color, marker=marker, markersize=4, capsize=2, label=name)
        low, high = guessed(points)
        axes.fill([x[-1], AIM, AIM], [y[-1], low, high], color=color, alpha=0.08)
        axes.plot([x[-1], AIM], [y[-1], (low + high) / 2], color=color, linestyle=":", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.001)
    axes.axvline(AIM, color="grey", linewidth=0.5)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.invert_xaxis()
    axes.set_xlabel("bits per byte of the network in windows; dotted and shaded: a guess from the last three points")
    axes.set_ylabel("gain in bits per byte")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100, bbox_inches="tight")


PARTS = ("stages", "ttt", "quant", "spend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the networks")
    training.add_argument("--data", required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--points", type=float, nargs="+", default=list(POINTS), choices=list(POINTS))
    training.add_argument("--shape", default="4x256", help="blocks x width")
    training.set_defaults(action=train)
    measuring = commands.add_parser("measure", help="measure what is trained")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--data", required=True)
    measuring.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    measuring.add_argument("--only", nargs="+", default=[], help="names of networks")
    measuring.add_argument(
        "--rates", nargs="+", default=[], metavar="PART=RATE", help="LoRA=0.01 phase=0.1: not chosen anew"
    )
    measuring.set_defaults(action=measure)
    reporting = commands.add_parser("report", help="print and draw what was measured")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--picture", type=Path)
    reporting.add_argument("--data", type=Path, help="with --fresh")
    reporting.add_argument("--fresh", type=float, default=0.0, metavar="SHARE")
    reporting.set_defaults(action=report)
    args = parser.parse_args()
    if args.command == "report" and args.fresh and not args.data:
        parser.error("--fresh needs --data")
    args.action(args)


if __name__ == "__main__":
    main()
