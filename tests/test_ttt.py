"""Test-time training: what is scored is learned only afterwards, by a LoRA beside frozen weights."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SEQ, config
from test_evaluator import model, text  # noqa: F401 (fixtures)

import train_gpt as tg

# ruff: noqa: F811
CHUNK = 3 * SEQ
TTT = {"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": CHUNK, "TTT_LORA_RANK": 2, "TTT_LORA_BLOCKS": 2, "TTT_LR": 0.05}


def learner(tiny, model, text, **knobs) -> tg.SharedLoraNetwork:
    cfg = config(tiny, **{**TTT, **knobs})
    return tg.SharedLoraNetwork(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, cfg.eval_stride)


def walk(network: tg.NetworkExpert, text: tg.ValidationText) -> torch.Tensor:
    """Log-probabilities of targets 1 .. N-1 under the driver."""
    tg.score_first([network], text, len(text.tokens))
    return network.logp[1:].clone()


def test_without_a_learning_rate_it_is_the_network_to_the_bit(tiny, model, text):
    plain = tg.NetworkExpert(config(tiny), tg.Run(config(tiny), 0, 0, 1, 1), model, text, 8)
    frozen = learner(tiny, model, text, TTT_LR=0)
    # a chunk ends the last window before it early, so the windows are those of the same chunks without learning
    scores = walk(frozen, text)
    plain.edges, plain.learn = frozen.edges, lambda *_: None
    assert torch.equal(scores, walk(plain, text))


def test_the_audit_sees_what_learns_whatever_the_chunk(tiny, model, text, monkeypatch):
    learned, learn = [], tg.SharedLoraNetwork.learn
    monkeypatch.setattr(
        tg.SharedLoraNetwork, "learn", lambda self, x, lo, hi: (learned.append((lo, hi)), learn(self, x, lo, hi))
    )
    cfg = config(tiny, **{**TTT, "TTT_CHUNK_TOKENS": 65536, "TTT_LORA_SITES": "q,head", "NGRAM_SCORE": "off"})
    checks = list(tg.Audit(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, "ttt").checks())
    assert all(check.passed for check in checks), checks
    assert len(learned) >= 4 * 6, "every walk learns several times within the prefix"


def by_hand(tiny, model, text, **knobs) -> torch.Tensor:
    """The definition, a window and a sequence at a time, with torch's own optimizer."""
    cfg = config(tiny, **{**TTT, **knobs})
    generator = torch.Generator().manual_seed(tg.derive_seed(cfg.seed, "ttt"))
    live, rank = {}, cfg.ttt_lora_rank
    for site, (d_out, d_in) in tg.lora_sites(cfg, model).items():
        a = torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in)
        live[site] = tg.Lora(a.requires_grad_(), torch.zeros(d_out, rank, requires_grad=True), 1.0)
    averaged = {site: tg.Lora(lora.a.detach().clone(), lora.b.detach().clone(), 1.0) for site, lora in live.items()}
    params = [p for lora in live.values() for p in lora[:2]]
    adam = torch.optim.AdamW(params, cfg.ttt_lr, betas=(0.9, 0.999), weight_decay=cfg.ttt_wd)
    x, n, scores = text.tokens, len(text.tokens), []
    weights = text.bytes.clamp_min(1).double()
    for lo in range(1, n, cfg.ttt_chunk_tokens):
        hi, at = min(lo + cfg.ttt_chunk_tokens, n), lo
        while at < hi:
            w = tg.window_at(at, hi, SEQ, cfg.eval_stride)
            with torch.no_grad():
                z = model.logits(
                    model.features(x[None, w.start : w.hi - 1], tg.Ctx(lora=averaged)), tg.Ctx(lora=averaged)
                )
                logp = (z / cfg.ttt_temperature).log_softmax(-1)[0].gather(1, x[w.start + 1 : w.hi, None])[:, 0]
            scores.append(logp[-(w.hi - w.lo) :])
            at = w.hi
        if hi == n:
            break
        adam.zero_grad()
        total = 0.0
        for s in range(lo, hi, SEQ):
            e = min(s + SEQ, hi)
            nll = model.nll(x[None, s - 1 : e - 1], x[None, s:e], tg.Ctx(lora=live))[0]
            total = total + (nll * weights[s:e]).sum()
        model.zero_grad()
        (total / weights[lo:hi].sum()).backward()
        torch.nn.utils.clip_grad_norm_(params, cfg.ttt_grad_clip)
        adam.step()
        for a, b in zip(averaged.values(), live.values(), strict=True):
            for p, q in zip(a[:2], b[:2], strict=True):
                p.data = cfg.ttt_polyak_decay * p.data + (1 - cfg.ttt_polyak_decay) * q.data
    model.zero_grad()
    return torch.cat(scores)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"TTT_POLYAK_DECAY": 0},
        {"TTT_POLYAK_DECAY": 0.7, "TTT_TEMPERATURE": 0.9},
        {"TTT_LORA_SITES": "q,k,out,up,down,head"},
    ],
)
def test_scores_are_those_of_the_definition(tiny, model, text, knobs):
    mine, theirs = walk(learner(tiny, model, text, **knobs), text), by_hand(tiny, model, text, **knobs)
    assert torch.allclose(mine, theirs, atol=1e-4)
    alone = walk(learner(tiny, model, text, **knobs, TTT_LR=0), text)
    assert torch.equal(alone[:CHUNK], mine[:CHUNK]) and not torch.allclose(alone[CHUNK:], mine[CHUNK:], atol=1e-3)


def test_the_base_weights_are_left_alone(tiny, model, text):
    before = {name: p.clone() for name, p in model.named_parameters()}
    network = learner(tiny, model, text)
    walk(network, text)
    assert all(
        torch.equal(p, before[name]) and p.requires_grad and p.grad is None for name, p in model.named_parameters()
    )
    assert all(lora.b.abs().max() > 0 for lora in network.ctx.lora.values())


@pytest.mark.parametrize(("knobs", "steps"), [
    ({}, 1), ({"TTT_EPOCHS": 3}, 3), ({"TTT_BATCH_SEQS": 2}, 2), ({"TTT_BATCH_SEQS": 1, "TTT_EPOCHS": 2}, 6),
])  # fmt: skip
def test_steps_a_chunk_and_none_after_the_last(tiny, model, text, monkeypatch, knobs, steps):
    taken = []
    monkeypatch.setattr(tg.SharedLoraNetwork, "descend", lambda _self, _tokens, spans, *_rest: taken.append(spans))
    walk(learner(tiny, model, text, **knobs), text)
    chunks = math.ceil((len(text.tokens) - 1) / CHUNK)
    assert len(taken) == steps * (chunks - 1)
    learned = sorted({span for spans in taken for span in spans})
    assert learned[0][0] == 1 and learned[-1][1] == 1 + (chunks - 1) * CHUNK
    assert all(a[1] == b[0] for a, b in zip(learned, learned[1:], strict=False))


def test_how_many_sequences_fit_changes_no_step(tiny, model, text):
    wide, narrow = (
        learner(tiny, model, text, VAL_BATCH_TOKENS=64 * SEQ),
        learner(tiny, model, text, VAL_BATCH_TOKENS=SEQ),
    )
    assert wide.rows > 1 == narrow.rows
    assert torch.allclose(walk(wide, text), walk(narrow, text), atol=1e-5)


def test_bytes_weigh_the_loss_unless_told_otherwise(tiny, model, text):
    assert learner(tiny, model, text).weights.tolist() == text.bytes.clamp_min(1).tolist()
    assert (learner(tiny, model, text, TTT_BYTE_WEIGHTED=0).weights == 1).all()
    assert isinstance(learner(tiny, model, text, TTT_OPTIMIZER="sgd").optimizer, torch.optim.SGD)


def test_850_adapts_28672_numbers_and_cuts_the_real_text_into_947_chunks():
    cfg = config({"RECIPE": "pr850"})
    with torch.device("meta"):
        sites = tg.lora_sites(cfg, tg.GPT(cfg))
    assert list(sites) == [(i, f"blocks.{i}.attn.{kind}") for i in (9, 10) for kind in ("q", "v")]
    assert sum(cfg.ttt_lora_rank * (d_out + d_in) for d_out, d_in in sites.values()) == 28_672
    assert math.ceil(62_021_632 / cfg.ttt_chunk_tokens) == 947
