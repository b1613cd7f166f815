"""Cost of one optimizer step: batched banks against torch.optim.Muon and against one matrix at a time.

    python benchmarks/optimizer.py [--recipe cpu pr850] [--dtype bf16 fp32] [--rounds 7] [--device cpu|cuda]

Every contender takes one step per round on its own copy of the recipe's model, in turn, so that a busy machine slows all
alike; printed are medians of the times and of their ratios to the banks of the same dtype and round. AdamW's part is in
every row. The dtype is that of the Newton-Schulz products (TRAIN_DTYPE); torch.optim.Muon always has bf16. "MuonEq-R,
polar" are the banks with MUON_ROW_NORMALIZE=1 and NEWTON_SCHULZ=polar.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg


def model_with_gradients(recipe: str, device: torch.device) -> tuple[tg.Config, tg.GPT]:
    """A fresh model of the recipe, its gradients filled with noise."""
    cfg = tg.load_config({"RECIPE": recipe}).cfg
    model = tg.GPT(cfg).to(device)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    return cfg, model


def banks(recipe: str, device: torch.device, dtype: str, single: bool = False, **knobs) -> Callable[[], None]:
    """Our optimizer with other knobs; `single` gives each matrix a bank of its own, which is the per-matrix loop."""
    cfg, model = model_with_gradients(recipe, device)
    cfg = dataclasses.replace(cfg, train_dtype=dtype, muon_row_normalize=False, newton_schulz="classic")
    cfg = dataclasses.replace(cfg, **knobs)
    run = SimpleNamespace(world=1, rank=0, device=device)
    optimizers = tg.Optimizers(cfg, model, run)
    if single:
        pairs = [pair for bank in optimizers.banks for pair in zip(bank.names, bank.params, strict=True)]
        optimizers.banks = [tg.MatrixBank({name: p}, run, optimizers.banks[0].dtype, cfg) for name, p in pairs]
    return lambda: optimizers.step(0, 1.0)


def torch_muon(recipe: str, device: torch.device) -> Callable[[], None]:
    """torch.optim.Muon for the matrices and fused AdamW for the rest, as a user would write it."""
    cfg, model = model_with_gradients(recipe, device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.role == "matrix"]
    muon = torch.optim.Muon(matrices, lr=cfg.matrix_lr, momentum=cfg.muon_momentum, weight_decay=cfg.muon_wd)
    adam = torch.optim.AdamW([p for p in trainable if p.role != "matrix"], lr=cfg.scalar_lr, fused=True)

    def step() -> None:
        muon.step()
        adam.step()

    return step


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def report(recipe: str, dtypes: list[str], rounds: int, device: torch.device) -> None:
    """Measure one recipe and print its table."""
    contenders: dict[tuple[str, str], Callable[[], None]] = {}
    for dtype in dtypes:
        contenders[dtype, "banks"] = banks(recipe, device, dtype)
        contenders[dtype, "MuonEq-R, polar"] = banks(
            recipe, device, dtype, muon_row_normalize=True, newton_schulz="polar"
        )
        contenders[dtype, "one matrix at a time"] = banks(recipe, device, dtype, single=True)
    if "bf16" in dtypes:
        contenders["bf16", "torch.optim.Muon"] = torch_muon(recipe, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for i in range(rounds + 1):
        for key, step in contenders.items():
            elapsed = milliseconds(step, device)
            if i > 0:  # the first round allocates and warms up
                times[key].append(elapsed)
    for (dtype, name), own in times.items():
        ratio = statistics.median(t / base for t, base in zip(own, times[dtype, "banks"], strict=True))
        print(f"{recipe:8} {dtype} {name:20} {statistics.median(own):9.1f} ms   x{ratio:.3f}   (least {min(own):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["cpu", "pr850"])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        tg.tune_cpu(1)  # as a training run does
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"one optimizer step, {name}, median of {args.rounds}")
    for recipe in args.recipe:
        report(recipe, args.dtype, args.rounds, device)


if __name__ == "__main__":
    main()
