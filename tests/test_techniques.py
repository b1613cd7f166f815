"""Section 6's techniques: schedules, quantisation-aware and complementary training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import train_gpt as tg

V, T = 40, 16
TINY = {"vocab_size": V, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "train_seq_len": T,
        "train_batch_tokens": 4 * T, "device": "cpu"}  # fmt: skip


def config(**knobs) -> tg.Config:
    return tg.Config(**{**TINY, **knobs})


def trainer(**knobs) -> tg.Trainer:
    """A trainer on a random stream, the same for the same knobs."""
    cfg = config(**knobs)
    torch.manual_seed(0)
    stream = np.random.default_rng(0).integers(2, V, 4000).astype(np.uint16)
    run = tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1)
    return tg.Trainer(cfg, run, tg.GPT(cfg), tg.TokenStream([stream], V))


# ---- schedules


def test_warmdown_by_steps_is_flat_then_linear_to_zero():
    cfg = config(iterations=100, warmdown_iters=40)
    scales = [tg.lr_scale(cfg, step, 0.0, 0.0) for step in range(101)]
    assert scales[:61] == [1.0] * 61 and scales[100] == 0.0
    assert scales[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 101)])


def test_warmdown_by_the_clock_takes_the_time_of_its_steps_at_the_measured_pace():
    """100 s, 0.5 s a step: 60 steps of warmdown are the last 30 s; an iteration limit far off changes nothing."""
    cfg = config(iterations=10_000, warmdown_iters=60)
    scales = {step: tg.lr_scale(cfg, step, step * 0.5, 100.0) for step in range(201)}
    assert all(scales[step] == 1.0 for step in range(141)) and scales[200] == 0.0
    assert scales[170] == pytest.approx(0.5) and scales[185] == pytest.approx(0.25)


def test_a_warmdown_longer_than_the_run_still_ends_at_zero():
    cfg = config(iterations=10_000, warmdown_iters=3000)
    scales = [tg.lr_scale(cfg, step, float(step), 50.0) for step in range(51)]
    assert scales[0] == 1.0 and scales[-1] == 0.0 and scales == sorted(scales, reverse=True)


@pytest.mark.parametrize("budget", [0.0, 80.0])
def test_warmdown_as_a_share_of_the_budget_ends_at_the_floor(budget):
    """By the clock where there is a limit, else by steps: WARMDOWN_FRAC=.85 and MIN_LR=.1 as published."""
    cfg = config(iterations=100 if budget else 80, warmdown_frac=0.85, min_lr=0.1)
    scales = [tg.lr_scale(cfg, step, float(step) if budget else 0.0, budget) for step in range(81)]
    assert scales[:13] == [1.0] * 13 and scales[80] == 0.1
    expected = [max((1 - step / 80) / 0.85, 0.1) for step in range(13, 81)]
    assert scales[13:] == pytest.approx(expected)
    slow = [tg.lr_scale(cfg, step, 4.0 * step, 320.0) for step in range(81)] if budget else scales
    assert slow == pytest.approx(scales)  # the clock decides, not the pace


@pytest.mark.parametrize("knobs", [{"warmdown_iters": 40}, {"lr_schedule": "wsd"}])
def test_no_schedule_falls_below_the_floor(knobs):
    plain, floored = config(iterations=100, **knobs), config(iterations=100, min_lr=0.3, **knobs)
    scales = [(tg.lr_scale(plain, s, 0.0, 0.0), tg.lr_scale(floored, s, 0.0, 0.0)) for s in range(101)]
    assert all(b == max(a, 0.3) for a, b in scales) and min(a for a, _ in scales) < 0.01


@pytest.mark.parametrize("budget", [0.0, 80.0])
def test_wsd_is_flat_then_a_cosine_to_zero(budget):
    cfg = config(iterations=80, lr_schedule="wsd", wsd_stable_frac=0.75)
    scales = [tg.lr_scale(cfg, step, float(step) if budget else 0.0, budget) for step in range(81)]
    assert scales[:61] == [1.0] * 61 and scales[80] == pytest.approx(0.0)
    assert scales[60:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(21)])


def test_the_share_of_the_budget_is_that_of_the_nearer_limit():
    cfg = config(iterations=100)
    assert tg.budget_frac(cfg, 25, 90.0, 100.0) == 0.9 and tg.budget_frac(cfg, 25, 0.0, 0.0) == 0.25
    assert tg.budget_frac(cfg, 200, 1.0, 100.0) == 1.0


def test_the_sequence_length_rises_with_the_budget():
    cfg = config(train_seq_schedule="8@0.33,16@0.55", train_seq_len=32)
    assert [tg.switches_at(cfg, f)["seq_len"] for f in (0.0, 0.32, 0.33, 0.54, 0.55, 1.0)] == [8, 8, 16, 16, 32, 32]
    assert tg.switches_at(config(), 1.0)["seq_len"] == T
    t = trainer(train_seq_schedule="8@0.3")
    shapes = [t.batcher.next(tg.switches_at(t.cfg, f)["seq_len"])[0].shape for f in (0.0, 0.9)]
    assert shapes == [(8, 8), (4, T)] and t.batcher.stream.position == 2 * 4 * T  # the same tokens a step


def test_a_schedule_may_be_longer_than_the_model_s_own_length():
    cfg = config(train_seq_schedule="8@0.5,64@1.0", train_seq_len=32, eval_seq_len=16)
    assert cfg.seq_curriculum == [(0.5, 8), (1.0, 64)] and tg.rope_table(cfg).shape[1] == cfg.longest_seq == 64


# ---- quantisation-aware training


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_straight_through_rounds_forward_and_passes_the_gradient(bits):
    w = torch.randn(6, 50, requires_grad=True)
    top = 2 ** (bits - 1) - 1
    out = tg.FakeQuant("ste", bits)(w)
    scale = w.detach().abs().amax(1, keepdim=True) / top
    codes = out.detach() / scale
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max() <= top + 1e-3
    assert ((out - w).abs() <= 0.5001 * scale).all()
    out.backward(torch.arange(300.0).view(6, 50))
    assert torch.equal(w.grad, torch.arange(300.0).view(6, 50))
    small = tg.FakeQuant("ste", bits)(1e-4 * w.detach())  # no floor on the step: small rows keep their resolution
    assert torch.allclose(small, 1e-4 * out.detach(), rtol=1e-3, atol=1e-9)


def soft(kind: str, sharpness: float, w: torch.Tensor) -> torch.Tensor:
    quant = tg.FakeQuant(kind, 5)
    quant.sharpness.fill_(sharpness)
    return quant(w)


def test_soft_rounding_tends_to_rounding_and_the_published_form_to_nothing():
    w = torch.randn(8, 400)
    rounded = tg.FakeQuant("ste", 5)(w)
    gaps = [(soft("soft_round", a, w) - rounded).abs().mean().item() for a in (1, 4, 16, 200)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.02 * gaps[0]
    start = (soft("soft_round", 1.0, w) - w).abs().mean().item()
    assert start < 0.2 * (rounded - w).abs().mean().item()  # it begins near the weight itself
    scale = (w.abs().amax(1, keepdim=True) / 15).expand_as(w)
    shifts = [((soft("soft_round_pr850", a, w) - w).abs() / scale).max().item() for a in (1, 4, 16)]
    assert shifts == sorted(shifts, reverse=True) and shifts[-1] <= 1 / 32 + 1e-5


def test_a_row_of_zeros_stays_zero():
    for kind in ("ste", "soft_round", "soft_round_pr850"):
        assert torch.equal(tg.FakeQuant(kind, 6)(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_late_quantisation_starts_at_its_share_of_the_budget_and_sharpens_to_the_end():
    t = trainer(qat="soft_round", qat_start_frac=0.85)
    assert t.context(0.84) == tg.Ctx()
    assert t.context(0.85).fake_quant is t.fake_quant and t.fake_quant.sharpness.item() == 1.0
    assert [t.context(f).fake_quant.sharpness.item() for f in (0.85, 0.925, 1.0)] == pytest.approx([1, 8.5, 16])


# ---- complementary training


def counts_of(inputs, targets, **knobs) -> tg.BigramCounts:
    cfg = config(complement_alpha=0.5, **knobs)
    counts = tg.BigramCounts(cfg, tg.Run(cfg, rank=0, local_rank=0, world=1, local_world=1))
    counts.update(inputs, targets)
    return counts


def pairs(seed: int = 0, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 6, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def test_a_token_that_always_follows_is_weighted_down_to_a_tenth_at_most():
    inputs, targets = torch.full((1, 999), 3), torch.full((1, 999), 4)
    counts = counts_of(inputs, targets)
    counts.cfg = config(complement_alpha=1.0)
    assert counts.weights(inputs, targets)[0, 0].item() == pytest.approx(0.1)


def test_counts_pass_two_to_the_24():
    """An fp32 count would stop there."""
    counts = counts_of(*pairs())
    counts.pairs += 2**24
    before = counts.pairs.clone()
    counts.update(torch.tensor([[3]]), torch.tensor([[4]]))
    assert (counts.pairs - before).sum() == 1


def test_priming_forgets_what_it_counted_and_averaged():
    t = trainer(complement_alpha=0.5, ema_decay=0.9, qat="ste", qat_start_frac=0.5, warmup_steps=3)
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    t.prime()
    assert t.counts.pairs.sum() == 0 and not t.average.ema and t.step == 0
    assert all(torch.equal(before[k], v) for k, v in t.model.state_dict().items())
