"""What a configuration would cost: parameters, predicted bytes, memory and FLOPs of a step, without data or training.

    RECIPE=pr850 python tools/plan.py --device cuda

Every knob of train_gpt.py is read from the environment. --device cuda plans for a GPU that need not be there.
Exit status: 0 done, 2 a mistake (one message).
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tools.artifact import run_tool, tool_parser


class FlashFootprint(torch.autograd.Function):
    """Attention that computes nothing and keeps for the backward pass what a fused kernel on a GPU keeps."""

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, _segments: None = None) -> Tensor:
        y = torch.empty_like(q_BTHK)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, y, q_BTHK.new_empty(q_BTHK.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_iter(out) if isinstance(t, Tensor)} - given:
            if storage not in self.known:
                self.known[storage] = storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def release(self, size: int) -> None:
        """A storage of `size` bytes is gone."""
        self.live -= size


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
    small = tg.count_parameters(model) - matrices
    averages = (cfg.ema_decay > 0) + (cfg.swa_every > 0)
    # Weights, their gradients and these once more where they are reduced; then momentum, or Adam's two moments.
    floats = (3 + averages) * (matrices + small) + matrices + 2 * small + sum(b.numel() for b in model.buffers())
    return 4 * floats + (8 * cfg.vocab_size**2 if cfg.complement_alpha else 0)


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
    print(f"recipe {cfg.recipe}: {tg.count_parameters(model):,} trainable parameters")
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
