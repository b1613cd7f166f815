"""The yardstick: the challenge's baseline written plainly, in eager PyTorch, for any device.

    python benchmarks/reference.py --seconds 60                  the CPU-sized model on the shipped sample
    DATA_PATH=... TOKENIZER_PATH=... python benchmarks/reference.py --layers 9 --dim 512 --heads 8 --kv-heads 4 ...

It shares no code with train_gpt.py, so that the two can be compared: the same model, data order, optimizers and
schedule, written as one would write them first, with none of the speed-ups and none of the later techniques. Validation
stands outside the clock, as in the challenge. Loss in nats per token, score in bits per byte of the whole split.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"


@dataclass(frozen=True)
class Settings:
    """The baseline's values, except for the size of model and batch, which suit two CPU cores."""

    layers: int = 4
    dim: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp_mult: int = 2
    vocab: int = 1024
    seq_len: int = 512
    batch_tokens: int = 8192
    accumulate: int = 8  # micro-batches a step: the baseline's 8 / world size
    rope_base: float = 10000.0
    softcap: float = 30.0
    qk_gain: float = 1.5
    embed_std: float = 0.005
    embed_lr: float = 0.05
    matrix_lr: float = 0.04
    scalar_lr: float = 0.04
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 500
    warmdown: int = 1200
    iterations: int = 20000
    seconds: float = 600.0
    seed: int = 1337


# ---- data ------------------------------------------------------------------------------------------------------------


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard, uint16, left on disk until they are used."""
    magic, version, count = np.fromfile(path, "<i4", 3)
    assert (magic, version) == (20240520, 1) and path.stat().st_size == 1024 + 2 * count, f"{path} is no shard"
    return np.memmap(path, "<u2", "r", offset=1024)


def token_stream(data: Path) -> Iterator[np.ndarray]:
    """The training shards in the order of their names, again and again."""
    while True:
        yield from (read_shard(path) for path in sorted(data.glob("fineweb_train_*.bin")))


def batches(data: Path, tokens: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), both (tokens / seq_len, seq_len): consecutive stretches of the stream, unshuffled."""
    shards = token_stream(data)
    rest = next(shards)
    while True:
        while len(rest) < tokens + 1:
            rest = np.concatenate((rest, next(shards)))
        window, rest = torch.from_numpy(rest[: tokens + 1].astype(np.int64)), rest[tokens + 1 :]
        yield window[:-1].view(-1, seq_len), window[1:].view(-1, seq_len)


def byte_counts(tokenizer: Path, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per piece: utf-8 bytes without the leading space mark, whether it has that mark, whether it is no text at all."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    size, spaced, control = torch.zeros(vocab), torch.zeros(vocab), torch.ones(vocab)
    for i in range(model.vocab_size()):
        if not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
            piece = model.id_to_piece(i)
            size[i] = 1 if model.is_byte(i) else len(piece.removeprefix("\u2581").encode())
            spaced[i], control[i] = piece.startswith("\u2581"), 0
    return size, spaced, control


# ---- model -----------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weight over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BHTD: Tensor, base: float) -> Tensor:
    """RoPE by half-split rotation."""
    T, D = x_BHTD.shape[-2:]
    angle = torch.outer(torch.arange(T), base ** -(torch.arange(0, D, 2) / D)).to(x_BHTD)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x_BHTD.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def linear(rows: int, columns: int, *, zero: bool = False) -> nn.Linear:
    """A projection from `columns` to `rows` features without bias; `zero`: initialised to 0."""
    layer = nn.Linear(columns, rows, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


class Block(nn.Module):
    """Attention and relu^2 MLP, each added to a learned mix of the stream and the embedding."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s, self.head_dim = s, s.dim // s.heads
        self.q, self.out = linear(s.dim, s.dim), linear(s.dim, s.dim, zero=True)
        self.k, self.v = (linear(s.kv_heads * self.head_dim, s.dim) for _ in range(2))
        self.up, self.down = linear(s.mlp_mult * s.dim, s.dim), linear(s.dim, s.mlp_mult * s.dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((s.heads, 1, 1), s.qk_gain))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(s.dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(s.dim), torch.zeros(s.dim))))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(norm(q), self.s.rope_base) * self.q_gain, rotate(norm(k), self.s.rope_base)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attend(norm(x))
        return x + self.mlp_scale * self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, vocab); U-Net skips from the first half of the blocks to the second; tied head."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.dim)
        nn.init.normal_(self.embed.weight, std=s.embed_std)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.skip_weights = nn.Parameter(torch.ones(s.layers // 2, s.dim))

    def forward(self, tokens: Tensor) -> Tensor:
        x = x0 = norm(self.embed(tokens))
        half, saved = self.s.layers // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half and saved:
                x = x + self.skip_weights[i - half] * saved.pop()
            x = block(x, x0)
            if i < half:
                saved.append(x)
        z = F.linear(norm(x), self.embed.weight)
        return self.s.softcap * torch.tanh(z / self.s.softcap)


def loss_of(model: GPT, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction=reduction)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: singular values of the matrix g pushed to about 1 (Muon, github.com/KellerJordan/Muon)."""
    x = g.mT if g.size(0) > g.size(1) else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.size(0) > g.size(1) else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, matrix by matrix."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad + group["momentum"] * buffer)
                p.sub_(update, alpha=group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def make_optimizers(model: GPT, s: Settings) -> tuple[Muon, torch.optim.Adam]:
    """Muon for the matrices of the blocks, Adam for the embedding and for every gain and mix."""
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    taken = {id(p) for p in (*matrices, model.embed.weight)}
    scalars = [p for p in model.parameters() if id(p) not in taken]
    tables = {"params": [model.embed.weight], "lr": s.embed_lr}
    adam = torch.optim.Adam([tables, {"params": scalars, "lr": s.scalar_lr}], betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizers = Muon(matrices, s.matrix_lr, s.momentum), adam
    for group in (g for o in optimizers for g in o.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(s: Settings, step: int, elapsed: float) -> float:
    """Flat, then linear to 0 over the last `warmdown` steps: by their measured time, or by count without a limit."""
    if not s.seconds:
        return min(1.0, (s.iterations - step) / max(s.warmdown, 1))
    length = s.warmdown * elapsed / max(step, 1)
    return min(1.0, max(s.seconds - elapsed, 0.0) / max(length, 1e-9))


# ---- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: `step()` trains on the next batch, `train()` until time or steps are used up."""

    def __init__(self, s: Settings, data: Path, device: str = "cpu"):
        torch.manual_seed(s.seed)
        self.s, self.device = s, device
        self.model = GPT(s).to(device)
        self.optimizers = make_optimizers(self.model, s)
        self.batches = batches(data, s.batch_tokens // s.accumulate, s.seq_len)
        self.steps, self.elapsed = 0, 0.0

    def step(self) -> float:
        """One optimizer step; the mean training loss of its tokens."""
        start, total = time.perf_counter(), 0.0
        for _ in range(self.s.accumulate):
            loss = loss_of(self.model, *(t.to(self.device) for t in next(self.batches))) / self.s.accumulate
            loss.backward()
            total += loss.item()
        scale, warm = lr_scale(self.s, self.steps, self.elapsed), min(self.steps / self.s.momentum_warmup, 1.0)
        muon = self.optimizers[0]
        muon.param_groups[0]["momentum"] = self.s.momentum_start + (self.s.momentum - self.s.momentum_start) * warm
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        self.steps, self.elapsed = self.steps + 1, self.elapsed + time.perf_counter() - start
        return total

    def train(self, report: Callable[[int, float], None]) -> None:
        """Run to the end of the budget; `report(step, loss)` after each step."""
        while self.steps < self.s.iterations and (not self.s.seconds or self.elapsed < self.s.seconds):
            report(self.steps, self.step())

    @torch.no_grad()
    def validate(self, data: Path, tokenizer: Path) -> tuple[float, float]:
        """(nats per token, bits per byte) of the whole validation split in sequences that do not overlap."""
        stream = np.concatenate([read_shard(path) for path in sorted(data.glob("fineweb_val_[0-9]*.bin"))]).astype(
            np.int64
        )
        sequences = (len(stream) - 1) // self.s.seq_len
        size, spaced, control = byte_counts(tokenizer, self.s.vocab)
        nats = total_bytes = 0.0
        for lo in range(0, sequences, 16):
            hi = min(lo + 16, sequences)
            window = torch.from_numpy(stream[lo * self.s.seq_len : hi * self.s.seq_len + 1])
            inputs, targets = window[:-1], window[1:]
            batch = (t.view(-1, self.s.seq_len).to(self.device) for t in (inputs, targets))
            nats += loss_of(self.model, *batch, reduction="none").double().sum().item()
            total_bytes += (size[targets] + spaced[targets] * (1 - control[inputs])).double().sum().item()
        return nats / (sequences * self.s.seq_len), nats / math.log(2) / total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    device, s = args.pop("device"), Settings(**args)
    data = Path(os.environ.get("DATA_PATH", SAMPLE))
    tokenizer = Path(os.environ.get("TOKENIZER_PATH", SAMPLE / "tokenizer_1024.model"))
    trainer = Trainer(s, data, device)
    print(f"parameters:{sum(p.numel() for p in trainer.model.parameters())} {s}", flush=True)

    def report(step: int, loss: float) -> None:
        if step % 10 == 0:
            average = 1000 * trainer.elapsed / trainer.steps
            print(f"step:{step} train_loss:{loss:.4f} step_avg:{average:.1f}ms", flush=True)

    trainer.train(report)
    nats, bpb = trainer.validate(data, tokenizer)
    print(f"steps:{trainer.steps} train_s:{trainer.elapsed:.1f} val_loss:{nats:.4f} val_bpb:{bpb:.4f}")


if __name__ == "__main__":
    main()
