"""Each published system against a second program in float64, written from its description: logits, two optimizer steps, a phase at test
time. Its network's second program is test_formulas' own, told below what each system is."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_formulas import Oracle, parameters

import train_gpt as tg

BOS, V, D, H, G, K = 1, 40, 32, 4, 2, 8  # ids, width, query and value heads, their width
T, LONG = 20, 28  # positions in training and evaluation
ENV = {
    "VOCAB_SIZE": V, "MODEL_DIM": D, "NUM_HEADS": H, "NUM_KV_HEADS": G, "NUM_LAYERS": 5, "TRAIN_SEQ_LEN": T, "TRAIN_BATCH_TOKENS": 6 * T,
    "EVAL_STRIDE": 0, "DEVICE": "cpu", "TRAIN_DTYPE": "fp32",
}  # fmt: skip
CLASSIC = ((3.4445, -4.7750, 2.0315),) * 5
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)  # fmt: skip


def system(**facts) -> SimpleNamespace:
    """The baseline's training with these differences."""
    plain = {
        "env": {}, "documents_apart": False, "rounded": ("", 0), "complement": 0.0, "rates": (0.05, 0.04, 0.04), "late": 1.0, "wd": 0.0,
        "wd_after": False, "adam_wd": (0.0, 0.0), "beta2": 0.95, "clip": 0.0, "roles": {}, "momentum": (0.85, 0.95, 500), "ns": CLASSIC,
        "rows_of_length_1": False, "scale": 60 / (1200 * 0.09), "base": 1e4, "rotated": K,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **facts})


MUON_99, BIGRAM = (0.92, 0.99, 1500), {"BIGRAM_VOCAB_SIZE": 31, "BIGRAM_DIM": 6}
# How each system trains: #164, #740, #187, #850, #1095, #2135; rates of tokens, matrices and scalars, decays of tokens and scalars. `scale` is
# that of the rates after 6,000 steps in 540 s of 600: .09 s each.
SYSTEMS = {
    "baseline": system(),
    "pr164": system(
        env={"ROPE_TRAIN_LEN": 10, **BIGRAM}, base=1e4 * 2 ** (K / (K - 2)), rates=(0.03, 0.02, 0.02), clip=0.3, momentum=MUON_99,
        scale=60 / (3000 * 0.09)),
    "pr740": system(
        env={"ROPE_DIMS": K // 2, **BIGRAM}, rotated=K // 2, rates=(0.03, 0.02, 0.02), wd=0.04, clip=0.3,
        roles={"bigram.table.weight": "scalar", "bigram.proj.weight": "scalar"}, momentum=MUON_99, scale=60 / (3500 * 0.09)),
    "pr187": system(
        env={"XSA_LAST_N": 2, "PRE_ENRICH_DIM": 24, "OVERTONE_INIT": 0, **BIGRAM}, rounded=("nearest", 31), rates=(0.035, 0.025, 0.025), wd=0.04,
        wd_after=True, adam_wd=(0.04, 0.04), roles={"bigram.table.weight": "matrix"}, momentum=MUON_99, scale=60 / (3500 * 0.09)),
    "pr850": system(
        env={"ROPE_DIMS": 4, "ROPE_TRAIN_LEN": 10, "XSA_LAST_N": 2, "VE_DIM": 7, "VE_LAYERS": "3,4", **BIGRAM}, rotated=4, base=1e4 * 2 ** (4 / 2),
        rounded=("soft", 15), complement=0.5, rates=(0.035, 0.025, 0.025), late=2.0, wd=0.04, adam_wd=(0.04, 0.04), clip=0.3,
        momentum=MUON_99, scale=0.5 * (1 + math.cos(math.pi * 0.6))),
    "pr1095": system(
        env={"ROPE_DIMS": 4, "VE_DIM": 7, "XSA_LAST_N": 5, "ADAPTER_RANK": 3, **BIGRAM}, rotated=4, rounded=("nearest", 31),
        rates=(0.035, 0.04, 0.025), wd=0.04, adam_wd=(0.04, 0.04), clip=0.1, momentum=MUON_99, scale=60 / (5000 * 0.09)),
    "frontier": system(
        env={"NUM_LAYERS": 6, "LOOP_START": 2, "LOOP_END": 3, "PARALLEL_START_LAYER": 4, "ROPE_DIMS": 4, "GATE_WINDOW": 6, "EVAL_SEQ_LEN": LONG,
             "TTT_EVAL_SEQ_LEN": LONG, "TTT_CHUNK_SIZE": 8}, rotated=4, documents_apart=True, rates=(0.03, 0.028, 0.02), wd=0.095,
        adam_wd=(0.085, 0.02), beta2=0.99, clip=0.3, momentum=(0.92, 0.97, 1500), ns=POLAR, rows_of_length_1=True, scale=0.1 / 0.85),
}  # fmt: skip


ROWS, IN, BEFORE = (
    {"bigram_vocab_size": 31, "bigram_dim": 6},
    {"ln_scale": "in"},
    {"smear": True, "smear_before_norm": True},
)
VE = {"ve_dim": 7, "ve_layers": "3,4"}
# What each system's network is, at that size.
NETWORKS: dict[str, dict] = {
    "baseline": {},
    "pr164": {**ROWS, "smear": True, "rope_train_len": 10},
    "pr740": {**ROWS, **BEFORE, **IN, "bigram_hash": "pr740", "bigram_scale": 0.0, "leaky_slope": 0.5, "rope_dims": K // 2, "xsa_last_n": -1},
    "pr187": {**ROWS, **BEFORE, "bigram_hash": "pr187", "bigram_scale": 0.0, "skip_split": "ceil", "xsa_last_n": 2, "pre_enrich_dim": 24},
    "pr850": {**ROWS, **IN, **VE, "smear": True, "leaky_slope": 0.9, "rope_dims": 4, "rope_train_len": 10, "xsa_last_n": 2, "attn_gate": "input",
              "value_residual": "softmax"},
    "pr1095": {**ROWS, **IN, **VE, "smear": True, "leaky_slope": 0.5, "rope_dims": 4, "xsa_last_n": 5, "kv_fused": True, "adapter_rank": 3},
    "frontier": {**BEFORE, **IN, "smear_form": "window", "num_layers": 6, "leaky_slope": 0.5, "rope_dims": 4, "xsa_last_n": -1, "attn_gate": "sparse",
                 "sparse_attn_gate_scale": 0.5, "gate_window": 6, "skip_gates_enabled": True, "num_loops": 2, "loop_start": 2, "loop_end": 3,
                 "parallel_start_layer": 4, "eval_seq_len": LONG},
}  # fmt: skip


def rounded(S, w, sharpness):
    """A row in steps of its largest weight / top; the gradient passes straight through."""
    how, top = S.rounded
    if not how or not sharpness:
        return w
    step = w.detach().abs().amax(1, keepdim=True) / top
    u = w.detach() / step
    below = u.floor()
    soft = below + 0.5 + (sharpness * (u - below - 0.5)).tanh() / (2 * math.tanh(sharpness / 2))
    return w + (step * (u.round() if how == "nearest" else soft).clamp(-top, top) - w).detach()


def nll(S, cfg, P, ids, targets, sharpness: float = 0.0):
    z = Oracle(cfg, P, ids, True, lambda w: rounded(S, w, sharpness)).logits()
    return -z.log_softmax(-1)[torch.arange(len(ids)), targets]


# ---- one optimizer step


def role(S, name: str) -> str:
    """token, matrix or scalar: whose optimizer and rate a parameter has."""
    if name.endswith((".a", ".b")) or name.split(".")[-2:-1] in [[x] for x in "q k v out up down proj".split()]:
        return S.roles.get(name, "matrix")
    return S.roles.get(name, "token") if name.endswith(("tok_emb.weight", "table.weight")) else "scalar"


def step(S, P, state, grads, n, start):
    """Step n (from 0) of the optimizers, whose momentum is that of step start + n; P and state change."""
    first, last, warm = S.momentum
    mu = first + (last - first) * min((start + n) / warm, 1)
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    for name, g in grads.items():
        kind, p = role(S, name), P[name].detach()
        lr = S.scale * S.rates[("token", "matrix", "scalar").index(kind)]
        g = g * min(1, S.clip / total) if S.clip else g
        if kind == "matrix":
            lr *= S.late if name.startswith("blocks.") and int(name.split(".")[1]) >= 2 else 1.0
            buffer = state[name] = mu * state.get(name, 0.0) + g
            x = g + mu * buffer
            x = x / x.norm(dim=1, keepdim=True) if S.rows_of_length_1 else x
            x = x / (x.norm() + 1e-7)
            for a, b, c in S.ns:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            delta, keep = lr * math.sqrt(max(1, len(g) / g.shape[1])) * x, 1 - lr * S.wd
            new = (p - delta) * keep if S.wd_after else p * keep - delta
        else:
            m, v = state.get(name, (0.0, 0.0))
            m, v = state[name] = 0.9 * m + 0.1 * g, S.beta2 * v + (1 - S.beta2) * g**2
            keep = 1 - lr * S.adam_wd[kind == "scalar"]
            new = p * keep - lr * m / (1 - 0.9 ** (n + 1)) / ((v / (1 - S.beta2 ** (n + 1))).sqrt() + 1e-8)
        P[name] = new.requires_grad_()


def segments(S, ids: list[int], targets: list[int], longest: int):
    """(ids, targets) that the network sees as one: rows, or under DOC_MASK documents and their parts of the longest length."""
    edges = [0]
    for t in range(1, len(ids) + 1):
        cut = t - edges[-1] == longest or (S.documents_apart and t < len(ids) and ids[t] == BOS)
        edges += [t] if cut or t == len(ids) else []
    return [(ids[lo:hi], targets[lo:hi]) for lo, hi in itertools.pairwise(edges)]


# ---- the comparisons


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


def build(name: str, **more) -> tuple[SimpleNamespace, tg.Config, tg.GPT]:
    """A system, its configuration, and its network in float64 with every parameter random and unequal."""
    S = SYSTEMS[name]
    env = {"RECIPE": name, **ENV, **S.env, **more}
    cfg = tg.load_config({key: str(value) for key, value in env.items()}, has_gpu=lambda: False).cfg
    torch.manual_seed(3)
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.PLAIN_ATTENTION["blocks" if name == "pr187" else "sdpa"]).double()
    model.compute_dtype = torch.float64
    at = torch.arange(model.rope.shape[1])[:, None] * S.base ** (-torch.arange(0, S.rotated, 2) / S.rotated)
    exact = torch.stack([at.cos(), at.sin()])
    assert (model.rope - exact).abs().max() < 1e-5, "angles are kept in fp32"
    model.rope = exact
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return S, cfg, model


def text(n: int) -> list[int]:
    rng = np.random.default_rng(7)
    ids = rng.integers(2, V, n)
    ids[rng.random(n) < 0.06] = BOS
    ids[[3, 4]] = BOS, BOS
    return ids.tolist()


@pytest.mark.parametrize("name", SYSTEMS)
def test_logits(name):
    """The second program is told what the system is, not what the recipe says."""
    S, cfg, model = build(name)
    size = {
        "vocab_size": V,
        "model_dim": D,
        "num_heads": H,
        "num_kv_heads": G,
        "num_layers": 5,
        "train_seq_len": T,
        "train_batch_tokens": 6 * T,
    }
    told, P = tg.Config(**{**size, **NETWORKS[name]}), parameters(model)
    rows = [text(3 * LONG)[i * LONG : i * LONG + (T, LONG)[cfg.eval_len > T]] for i in range(3)]
    for looped in (True, False)[: 1 + bool(told.num_loops)]:
        model.set_looped(looped)
        with torch.no_grad():
            found = model.logits(model.features(torch.tensor(rows)))
            for mine, row in zip(found, rows, strict=True):
                parts = [Oracle(told, P, ids, looped).logits() for ids, _ in segments(S, row, row, LONG)]
                assert (mine - torch.cat(parts)).abs().max() < 1e-9


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_optimizer_steps(name):
    """At nine tenths of the training time, where rounding and loops are on, with momentum as at steps 700 and 701."""
    S, cfg, model = build(name)
    P, state, ids = parameters(model), {}, text(12 * T + 1)
    trainer = tg.Trainer(cfg, tg.Run(cfg, 0, 0, 1, 1), model, tg.TokenStream([np.array(ids, np.uint16)], V))
    trainer.step = 700
    for bank in trainer.optimizers.banks:
        bank.dtype = torch.float64
        if S.rows_of_length_1:  # whose lengths are taken in fp32
            bank.shard = bank.grads = bank.grads.float()
            bank.momentum = bank.momentum.float()
    scale = tg.lr_scale(cfg, 6000, 540.0, 600.0)
    assert scale == pytest.approx(min(max(S.scale, 0.1 if name == "frontier" else 0.0), 1.0))
    pairs = torch.zeros(V, V)
    for n in range(2):
        inputs, targets = ids[n * 6 * T : (n + 1) * 6 * T], ids[n * 6 * T + 1 : (n + 1) * 6 * T + 1]
        loss = 0.0
        for x, y in segments(S, inputs, targets, T):
            weight = 1 - S.complement * pairs[x, y] / (pairs[x].sum(1) + 1)
            loss = loss + (weight * nll(S, cfg, P, x, y, 1 + 15 * (0.9 - 0.85) / 0.15)).sum() / (6 * T)
        names = [name for name, p in P.items() if p.requires_grad]
        grads = torch.autograd.grad(loss, [P[name] for name in names])
        before = {name: P[name].detach() for name in names}
        step(S, P, state, dict(zip(names, grads, strict=True)), n, 700)
        for x, y in zip(inputs, targets, strict=True):
            pairs[x, y] += 1
        assert float(trainer.train_step(0.9, scale)) == pytest.approx(loss.item(), rel=1e-9)
        for name, p in model.named_parameters():
            moved = (P[name] - before[name]).norm()
            assert moved > 0 and (P[name] - p).norm() < 1e-5 * moved, (n, name)


def test_a_phase_at_test_time_trains_on_steps_of_32_full_rows_by_their_targets():
    """Chunks of 300 targets: a step has 32 x 8 = 256 of them and the next 44; .001 with momentum .9, falling as a cosine."""
    S, cfg, model = build("frontier", GLOBAL_TTT_CHUNK_TOKENS=300, TTT_EVAL_SEQ_LEN=8)
    tokens, momentum, steps = text(700), {}, [(1, 257), (257, 301), (301, 557), (557, 601), (601, 700)]
    found = tg.ValidationText(torch.tensor(tokens), torch.ones(700, dtype=torch.int64), True)
    network = tg.DocumentLoraNetwork(cfg, tg.Run(cfg, 0, 0, 1, 1), model, found, LONG)
    P, before = parameters(model), dict(model.named_parameters())
    network.train_weights(found.tokens, 700)
    for lo, hi in steps:
        parts = segments(S, tokens[lo - 1 : hi - 1], tokens[lo:hi], 8)
        grads = torch.autograd.grad(sum(nll(S, cfg, P, x, y).sum() for x, y in parts) / (hi - lo), list(P.values()))
        total = math.sqrt(sum(float(g.square().sum()) for g in grads))
        rate = 0.001 * (0.5 + 0.5 * math.cos(math.pi * ((lo - 1) // 300) / 2))
        for name, g in zip(list(P), grads, strict=True):
            momentum[name] = 0.9 * momentum.get(name, 0.0) + g * min(1, 1 / total) * (hi - lo) / 256
            P[name] = (P[name] - rate * momentum[name]).detach().requires_grad_()
    for name, p in network.model.named_parameters():
        moved = (P[name] - before[name]).norm()
        assert moved > 0 and (P[name] - p).norm() < 1e-5 * moved, name
