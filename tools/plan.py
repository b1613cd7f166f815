"""What a configuration would cost: parameters, predicted bytes, memory and FLOPs of a step, without data or training.

    RECIPE=pr850 python tools/plan.py --device cuda

Every knob of train_gpt.py is read from the environment. --device cuda plans for a GPU that need not be there.
Exit status: 0 done, 2 a mistake (one message).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import sys
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tools.artifact import run_tool, tool_parser


class FlashFootprint(torch.autograd.Function):
    """Attention that computes nothing and keeps for the backward pass what a fused kernel on a GPU keeps."""

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, _segments: None = None) -> Tensor:
        y = torch.zeros_like(q_BTHK)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, y, q_BTHK.new_empty(q_BTHK.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on meta that operations made and that are still alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_iter(out) if isinstance(t, Tensor) and t.is_meta} - given:
            if storage not in self.known:
                self.known[storage] = storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def release(self, size: int) -> None:
        """A storage of `size` bytes is gone."""
        self.live -= size

    def most(self, action: Callable[[], Any]) -> int:
        """The most bytes at once while `action` runs."""
        self.peak = self.live
        action()
        return self.peak


def activation_bytes(cfg: tg.Config, model: tg.GPT, device: torch.device, tokens: int) -> tuple[int, int]:
    """(bytes kept for the backward pass, most bytes at once) of an eager pass of `tokens` tokens on `device`; `model` is on meta.

    Counted, not guessed: forward and backward run without data or memory. A compiled pass recomputes what is cheap and holds
    about what an eager one keeps.
    """
    model.compute_dtype = tg.compute_dtype(cfg.train_dtype, device)
    for block in model.blocks:
        block.attn.attend = FlashFootprint.apply if device.type == "cuda" else tg.choose_attention(cfg, device)[1]
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None  # counted as state
    parameters = {p.untyped_storage() for p in model.parameters()}
    kept: dict[torch.UntypedStorage, int] = {}

    def note(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage(), t.untyped_storage().nbytes())
        return t

    ids = torch.zeros(max(1, tokens // cfg.train_seq_len), cfg.train_seq_len, dtype=torch.int64, device="meta")
    quant = tg.FakeQuant(cfg.qat, cfg.qat_bits) if cfg.qat != "none" else None
    with LiveBytes() as memory:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model.nll(ids, ids, tg.Ctx(fake_quant=quant)).sum()
        size = sum(n for storage, n in kept.items() if storage not in parameters)
        kept.clear()
        loss.backward()
    return size, memory.peak


def state_bytes(cfg: tg.Config, model: tg.GPT) -> int:
    """Bytes that training holds between steps in a world of one rank: weights, gradients, optimizers, averages, counts."""
    matrices = sum(p.numel() for p in model.parameters() if p.role == "matrix")
    small = sum(p.numel() for p in model.parameters()) - matrices
    averages = (cfg.ema_decay > 0) + (cfg.swa_every > 0)
    # Weights, their gradients and these once more where they are reduced; then momentum, or Adam's two moments.
    floats = (3 + averages) * (matrices + small) + matrices + 2 * small + sum(b.numel() for b in model.buffers())
    hashed = sum(tg.HASHED_SIZES.values()) if "pr1095" in cfg.ngram_tables else 0
    return 4 * (floats + hashed) + (8 * cfg.vocab_size**2 if cfg.complement_alpha else 0)


# ---- memory of the evaluation on GPUs, part by part


def synthetic_lengths(seed: int = 0, n: int = 50_000, total: int = 47_851_520) -> np.ndarray:
    """Targets of n documents, lognormal, scaled to `total`; sigma 1.1 gives the 2,500 longest their published 30 %."""
    lengths = np.random.default_rng(seed).lognormal(0.0, 1.1, n)
    return np.maximum(1, (lengths * total / lengths.sum()).astype(np.int64))


def deal_blocks(cfg: tg.Config, lengths: np.ndarray, ranks: int) -> Iterator[list[list[list[tg.Document]]]]:
    """For each block of documents of so many targets the batches of each rank, as the evaluator deals them."""
    starts = np.cumsum([0, *lengths])
    documents = [tg.Document(int(s), int(t)) for s, t in zip(starts, lengths, strict=False)]
    chunks = list(tg.chunk_starts(cfg.ttt_chunk_steps, int(lengths.max())))
    edges = tg.block_edges(documents, tg.block_size(cfg, int(starts[-1]) + 1))
    for lo, hi in itertools.pairwise([1, *edges]):
        block = documents[bisect_left(starts, lo - 1) : bisect_left(starts, hi - 1)]
        yield tg.deal_documents(block, ranks, cfg.ttt_batch_size, chunks)


def largest_steps(batches: Iterable[list[tg.Document]], context: int) -> list[tuple[int, int, int]]:
    """(documents of a batch, those that go on, tokens that they see) of the steps that no other one exceeds in all three."""
    steps: list[tuple[int, int, int]] = []
    every = {(len(batch), i + 1, min(d.targets, context)) for batch in batches for i, d in enumerate(batch)}
    for step in sorted(every, reverse=True):
        if not any(step[1] <= other[1] and step[2] <= other[2] for other in steps):
            steps.append(step)
    return steps


# Bytes of n-gram stages: of a span's statistics, a target and order; as measured, of a target and level while a span is mixed with the
# text's n-grams, with those that the artifact carries, and until it is learned; of a target that is tilted.
STATS_BYTES, MIXED_BYTES, PACKED_BYTES, PENDING_BYTES, TILTED_BYTES = 12, 290, 200, 88, 160


class EvaluationPlan:
    """`peaks`: the most bytes at once in each part of an evaluation on one of `ranks` GPUs, of documents of so many targets.

    The network's passes and steps are counted: in the order of the evaluation they run without data or memory, one rank's share
    each. What has an entry a token of the text is added up. N-grams lie on the host. The published caches and tables of claims
    are left out.
    """

    def __init__(self, cfg: tg.Config, lengths: np.ndarray, ranks: int = 1) -> None:
        self.cfg = dataclasses.replace(cfg, device="cpu", val_batch_tokens=cfg.val_batch_tokens or 2**17)
        self.lengths, self.ranks, self.n = lengths, ranks, int(lengths.sum()) + 1
        self.run, self.memory = tg.Run(self.cfg, 0, 0, 1, 1), LiveBytes()
        self.run.device, self.peaks = torch.device("meta"), dict[str, int]()
        self.networks: dict[str, tg.NetworkExpert] = {}
        self.streams = 16 * self.n  # ids and counts of bytes
        with self.memory:
            with self.run.device:
                model = tg.GPT(cfg)
            self.model = model.place(self.run.device, FlashFootprint.apply)
            model.compute_dtype = tg.compute_dtype(cfg.train_dtype, torch.device("cuda"))
            best = "ttt" if cfg.ttt_enabled else "sliding" if cfg.eval_stride else "roundtrip"
            for stage in (s for s in cfg.stages if s != "normalized"):
                network = stage if stage in ("roundtrip", "sliding", "ttt") else best
                if network not in self.networks:
                    self.plan_network(network, hinted=cfg.ngram_tilt_enabled and network == best)
                if network != stage:
                    self.plan_ngrams(stage)

    def note(self, part: str, action: Callable[[], Any] = lambda: None, more: int = 0) -> None:
        """The peak of a part: what is there, what `action` makes, and `more`."""
        self.peaks[part] = max(self.peaks.get(part, 0), self.memory.most(action) + self.streams + more)

    def plan_network(self, stage: str, hinted: bool) -> None:
        """Roundtrip, sliding windows, test-time training."""
        cfg, learns = self.cfg, stage == "ttt"
        tokens = torch.full((1 + max(int(self.lengths.max()), cfg.eval_len, cfg.ttt_eval_len) + cfg.ttt_chunk_size,), 2)
        text = tg.ValidationText(tokens, torch.ones_like(tokens), complete=True)
        make = tg.TEST_TIME[cfg.ttt_reset] if learns else tg.NetworkExpert
        network = self.networks[stage] = make(cfg, self.run, self.model, text, tg.stage_stride(cfg, stage))
        self.streams += (20 + 4 * learns) * self.n  # scores, entropies, chances of hints, hints; weights
        if hinted:
            self.note("hints", more=12 * self.n)  # positions; the hints beside the empty ones
        if isinstance(network, tg.DocumentLoraNetwork):
            self.plan_documents(network)
            if cfg.phased_ttt_num_phases:
                self.plan_phase(network)
        else:
            self.plan_windows(network, stage)

    def plan_windows(self, network: tg.NetworkExpert, stage: str) -> None:
        """A batch of windows; where one LoRA learns, a step of it."""
        rows = min(network.rows, math.ceil(self.n / network.stride / self.ranks))
        ids = [torch.zeros(rows, network.seq_len + 1, dtype=torch.int64, device="meta") for _ in range(2)]
        with torch.no_grad():
            fresh = 12 * min(self.n, network.ahead * self.ranks)
            self.note(stage, lambda: network.score_rows(*ids, network.stride), fresh)
        if isinstance(network, tg.SharedLoraNetwork):
            learned = self.cfg.ttt_chunk_tokens // self.ranks
            network.tokens, network.weights = (torch.ones(learned + 1, dtype=t) for t in (torch.int64, torch.float32))
            self.note(stage, lambda: network.learn(network.tokens, 1, 1 + learned))

    def plan_documents(self, network: tg.DocumentLoraNetwork) -> None:
        """The largest steps of batches of documents, the second of two so that what the first one leaves is there."""
        cfg, blocks = self.cfg, list(deal_blocks(self.cfg, self.lengths, self.ranks))
        fresh = 12 * max(sum(d.targets for batch in itertools.chain(*dealt) for d in batch) for dealt in blocks)
        batches = (batch for dealt in blocks for batch in itertools.chain(*dealt))
        for rows, going_on, context in largest_steps(batches, cfg.ttt_eval_len):
            documents = [tg.Document(0, context + 1 if i < going_on else 1) for i in range(rows)]
            batch, last = tg.DocumentBatch(network, documents), max(1, context + 1 - cfg.ttt_chunk_size)
            for lo, hi in itertools.pairwise(sorted({1, max(1, last - cfg.ttt_chunk_size), last, context + 1})):
                step = lambda: (batch.score(network.tokens, lo, hi), batch.update(network.tokens, lo, hi))  # noqa: B023, E731
                if hi == context + 1:
                    self.note("ttt", step, fresh)
                else:
                    step()

    def plan_phase(self, network: tg.DocumentLoraNetwork) -> None:
        """The second step of SGD on all weights."""
        cfg = self.cfg
        most = min(cfg.global_ttt_batch_seqs * network.seq_len or self.n, cfg.global_ttt_chunk_tokens)
        length = min(network.seq_len, most, int(self.lengths.max()))
        rows = max(1, network.learning_rows * network.seq_len // length)  # those of one backward pass
        spans = [(1, 1 + length)] * min(rows, math.ceil(most / length / self.ranks))
        params = list(network.model.requires_grad_().parameters())
        optimizer = torch.optim.SGD(params, cfg.global_ttt_lr, cfg.global_ttt_momentum)
        step = functools.partial(network.descend, network.tokens, spans, params, tg.Ctx(), cfg.global_ttt_grad_clip)
        for _ in range(2):
            self.note("phase", lambda: step(optimizer))
        network.model.requires_grad_(False)

    def plan_ngrams(self, stage: str) -> None:
        """The span that is mixed at once, and its statistics."""
        cfg, tilted, levels = self.cfg, self.cfg.ngram_tilt_enabled, []
        if "exact" in cfg.ngram_tables and stage != "tilt":
            levels.append(cfg.ngram_table_order - 1)  # whose rows are found on the host
        if stage == "ngram":
            levels.append(cfg.ngram_order - 1)
        orders = {*cfg.counted_orders[-1:] * tilted, *cfg.counted_orders[:1] * (stage == "ngram")}
        stats = STATS_BYTES * sum(orders)
        last = MIXED_BYTES if stage == "ngram" else PACKED_BYTES
        mixed = last * levels[-1] + PENDING_BYTES * sum(levels[:-1]) if levels else 0
        self.note(stage, more=(stats + mixed + TILTED_BYTES * tilted) * tg.update_span(self.n))


def predicted_bytes(policy: tg.Policy, name: str, p: Tensor) -> float:
    """Bytes of a tensor in the artifact if its weights were normally distributed: the entropy of its codes, and its steps."""
    bits, (rows, columns) = policy.bits(name), tg.rows_and_columns(p.shape)
    if bits > 8:
        return p.numel() * bits / 8
    normal = torch.randn(min(rows, 64), columns, generator=torch.Generator().manual_seed(0))
    step_R1 = tg.clipped_scale(normal, bits, policy.clip(name)).float()[:, None]
    codes = tg.nearest_codes(normal / step_R1, tg.largest_code(bits))
    bits_a_weight = tg.entropy_bits(codes.unique(return_counts=True)[1].numpy()) / codes.numel()
    return p.numel() * bits_a_weight / 8 + 2 * rows


def plan_bytes(cfg: tg.Config, model: tg.GPT) -> None:
    """Print parameters and predicted bytes by role, and the total against the limit."""
    params = dict(model.named_parameters())
    policy, artifact = tg.Policy.of(cfg, model), 0.0
    for role in sorted({p.store for p in params.values()}):
        mine = {n: p for n, p in params.items() if p.store == role}
        count = sum(p.numel() for p in mine.values())
        fixed = sum(p.numel() * policy.bits(n) for n, p in mine.items()) / 8
        size = sum(predicted_bytes(policy, n, p) for n, p in mine.items())
        artifact += size
        print(f"  {role:<8} {count:>12,} parameters  {fixed:>12,.0f} bytes at fixed width  {size:>12,.0f} predicted")
    grams = cfg.ngram_table_bytes if "exact" in cfg.ngram_tables else 0
    grams += 2 * sum(tg.HASHED_SIZES.values()) if "pr1095" in cfg.ngram_tables else 0
    if grams:
        artifact += grams
        print(f"  ngram    {'':>12} n-grams of the training text {grams:>14,} bytes at most")
    if cfg.target_bytes:
        print(
            f"size: TARGET_BYTES={cfg.target_bytes:,} is filled, by widths chosen after training; limit {cfg.artifact_limit:,}"
        )
        return
    tg.start_packing(cfg)
    code = len(tg.counted_code(cfg)[0])
    # Published exports of #164, #740, #187, #850 and #1095 against this prediction: +1, -11, -17, -4 and -10 %.
    print(
        f"predicted size: {artifact + code:,.0f} bytes = artifact {artifact:,.0f} + code {code:,}, limit {cfg.artifact_limit:,}"
    )
    print("  as if weights were normally distributed; in five published runs trained ones took up to 17 % less")


def plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    env = {**os.environ, "MODE": "train", **({"DEVICE": args.device} if args.device else {})}
    loaded = tg.load_config(env)
    cfg = loaded.cfg
    device = torch.device("cuda") if cfg.device == "cuda" else tg.pick_device(cfg.device, 0)
    with torch.device("meta"):
        model = tg.GPT(cfg)
    for text in loaded.notices:
        print(f"notice: {text}")
    print(f"recipe {cfg.recipe}: {sum(p.numel() for p in model.parameters()):,} trainable parameters")
    plan_bytes(cfg, model)
    tokens = tg.first_micro_batch(cfg, device)
    state, (kept, peak) = state_bytes(cfg, model), activation_bytes(cfg, model, device, tokens)
    print(
        f"memory on {device.type} with one rank and {tokens:,} tokens at once (the micro-batch is halved until it fits):"
    )
    print(f"  {state / 2**20:>10,.0f} MiB weights, gradients, optimizer, averages")
    # The peaks that #164, #187 and #1095 reported are 1.00, 1.03 and 0.91 of the compiled sum at their micro-batches.
    print(
        f"  {(state + kept) / 2**20:>10,.0f} MiB with what a compiled pass holds (three published peaks are within 10 %)"
    )
    print(f"  {(state + peak) / 2**20:>10,.0f} MiB at the peak of an eager pass")
    if device.type == "cuda":
        peaks = EvaluationPlan(cfg, synthetic_lengths(), ranks=8).peaks
        print(
            "memory of the evaluation on each of 8, for a text of 50,000 documents and 47.8 M tokens, at the most (eager):"
        )
        print(f"  {', '.join(f'{part} {size / 2**20:,.0f}' for part, size in peaks.items())} MiB")
    flops = tg.flops_per_token(model, cfg.train_seq_len)
    print(
        f"FLOPs: {flops:.3g} a token, {flops * cfg.train_batch_tokens:.3g} a step of {cfg.train_batch_tokens:,} tokens"
    )


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="where it would run; default: DEVICE, else what is here"
    )
    return run_tool(plan, parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
