"""Every technique of the network against its formula: a second network in float64 that knows the names of the parameters alone.

All values are random and unequal: heads, shares, gates, lanes, scales, caps. Rows hold documents that begin within them.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from test_model import EVERYTHING, EVERYTHING_ELSE, T, V, build

import train_gpt as tg

BOS = 1
SWITCHES = {
    "xsa": {"xsa_last_n": 2}, "partial rope": {"rope_dims": 4}, "ntk": {"rope_train_len": 16, "rope_base": 500.0}, "ln in": {"ln_scale": "in"},
    "partial ntk": {"rope_dims": 6, "rope_train_len": 5}, "ln out": {"ln_scale": "out"}, "input gate": {"attn_gate": "input"},
    "softmax vrl": {"value_residual": "softmax"},
    "ve": {"ve_dim": 6, "ve_layers": "0,3"}, "smear": {"smear": True}, "leak": {"smear": True, "smear_cross_doc": True},
    "smear first": {"smear": True, "smear_before_norm": True}, "bigram": {"bigram_vocab_size": 50, "bigram_dim": 6},
    "bigram 740": {"bigram_vocab_size": 50, "bigram_hash": "pr740", "bigram_scale": 0.0, "bigram_table_std": 1.0},
    "bigram 187": {"bigram_vocab_size": 50, "bigram_hash": "pr187", "bigram_table_role": "matrix"},
    "enrich": {"pre_enrich_dim": 12}, "ceil": {"skip_split": "ceil", "num_layers": 5},
    "recurrence": {"encoder_recurrence": True}, "phase": {"resid_mix_init": "phase"},
    "orthogonal": {"linear_init": "orthogonal"}, "scaled out": {"out_init": "scaled"},
    "overtone": {"overtone_init": True}, "adapters": {"adapter_rank": 3}, "fused": {"kv_fused": True},
    "leaky": {"leaky_slope": 0.3},
    "wide": {"mlp_mult": 3.0}, "own head": {"tie_embeddings": False},
    "loop": {"num_loops": 2, "loop_start": 1, "loop_end": 1}, "odd loop": {"num_loops": 1, "loop_start": 1, "loop_end": 1, "num_layers": 5}, "lanes": {"parallel_start_layer": 3},
    "two loops": {"num_loops": 2, "loop_start": 1, "loop_end": 2}, "skip gates": {"skip_gates_enabled": True}, "more heads": {"num_heads": 8, "num_kv_heads": 2},
    "sparse gate": {"attn_gate": "sparse", "gate_window": 6, "sparse_attn_gate_scale": 0.4}, "xsa everywhere": {"xsa_last_n": -1},
    "window smear": {"smear": True, "smear_form": "window", "gate_window": 6}, "two caps": {"asym_logit_rescale": True, "logit_softcap": 4.0},
    "low cap": {"logit_softcap": 3.0}, "deep": {"num_layers": 7}, "lone heads": {"num_kv_heads": 4},
    "single": {"num_layers": 1, "xsa_last_n": -1, "ve_layers": "0", "value_residual": "none"},
}  # fmt: skip
ALONE = {"plain": {}, **SWITCHES, "everything": EVERYTHING, "everything else": EVERYTHING_ELSE}
REPEATING, LATE = ("loop", "odd loop", "two loops", "recurrence", "single"), ("lanes", "single", "recurrence")
CLASHES = [{a, b} for a, b in [*itertools.combinations(REPEATING, 2), *itertools.combinations(LATE, 2)]]
PAIRS = [pair for pair in itertools.combinations(SWITCHES, 2) if set(pair) not in CLASHES]
PAIRS = [
    *random.Random(1).sample(PAIRS, 90),
    ("two loops", "skip gates"),
    ("xsa", "more heads"),
    ("two loops", "ceil"),
    ("smear", "bigram"),
]


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


class Oracle:
    """The network of a configuration for one row of ids, from its parameters; float64, one head and one position at a time."""

    def __init__(
        self, cfg: tg.Config, P: dict[str, torch.Tensor], ids: list[int], looped: bool, rounded=lambda w: w
    ) -> None:
        self.cfg, self.P, self.ids, self.looped, self.rounded = cfg, P, ids, looped, rounded

    def matrix(self, site: str):
        if f"{site}.weight" in self.P:
            return self.rounded(self.P[f"{site}.weight"])
        return self.P[f"{site}.base"] + self.P[f"{site}.b"] @ self.P[f"{site}.a"]

    def bigram_row(self, t: int) -> int:
        cfg, rows, cur, prev = self.cfg, self.cfg.bigram_vocab_size, self.ids[t], self.ids[t - 1] if t else 0
        if cfg.bigram_hash == "pr164":
            return ((36313 * cur) ^ (27191 * prev)) % (rows - 1) if t else rows - 1
        return (2654435761 * cur + 40503 * prev if cfg.bigram_hash == "pr740" else 92821 * prev + cur) % rows

    def smear(self, x):
        P, rows = self.P, []
        for t in range(len(x)):
            before = x[t - 1] if t else torch.zeros_like(x[0])
            seen = float(self.cfg.smear_cross_doc or self.ids[t] != BOS)
            if "smear.gate" in P:
                s = seen * P["smear.gate"].sigmoid()
                rows.append((1 - s) * x[t] + s * before)
            else:
                w = P["smear.weight_W"]
                rows.append(x[t] + seen * P["smear.scale"] * (w @ x[t, : len(w)]).sigmoid() * before)
        return torch.stack(rows)

    def embedding(self):
        P, cfg = self.P, self.cfg
        x = P["tok_emb.weight"][self.ids]
        if "bigram.table.weight" in P:
            table = torch.stack([P["bigram.table.weight"][self.bigram_row(t)] for t in range(len(self.ids))])
            x = x + P.get("bigram.scale", 1.0) * table @ self.matrix("bigram.proj").T
        x = self.smear(x) if cfg.smear and cfg.smear_before_norm else x
        if cfg.pre_enrich_dim:
            x = F.gelu(x @ self.matrix("pre_enrich.up").T) @ self.matrix("pre_enrich.down").T
        return self.smear(norm(x)) if cfg.smear and not cfg.smear_before_norm else norm(x)

    def turned(self, x):
        """(T, K), each row turned by its position."""
        cfg, (length, width) = self.cfg, x.shape
        dims, longest = cfg.rope_dims or width, max(cfg.train_seq_len, cfg.eval_len)
        stretch = longest / cfg.rope_train_len if cfg.rope_train_len and longest > cfg.rope_train_len else 1.0
        base, y = cfg.rope_base * stretch ** (dims / (dims - 2)), x.clone()
        for j in range(dims // 2):
            angle, a, b = torch.arange(length).double() * base ** (-2 * j / dims), x[:, j], x[:, j + dims // 2]
            y[:, j] = a * angle.cos() + b * angle.sin()
            y[:, j + dims // 2] = b * angle.cos() - a * angle.sin()
        return y

    def attention(self, i: int, x):
        """What block i's attention adds, given its normalised input (T, D)."""
        cfg, P, name = self.cfg, self.P, f"blocks.{i}.attn"
        heads, groups, T = cfg.num_heads, cfg.num_kv_heads, len(x)
        q = (x @ self.matrix(f"{name}.q").T).view(T, heads, -1)
        W = self.matrix(f"{name}.kv") if cfg.kv_fused else torch.cat([self.matrix(f"{name}.{part}") for part in "kv"])
        k, v = (x @ W.T).view(T, 2, groups, -1).unbind(1)
        if cfg.ve_dim and str(i) in (layers := cfg.ve_layers.split(",")):
            added = P["ve.table.weight"][self.ids] @ self.matrix("ve.proj").T
            v = v + (P["ve.scale"] * P["ve.layer_scales"][layers.index(str(i))] * added).view(v.shape)
        self.v0 = v if self.v0 is None else self.v0
        if f"{name}.value_residual.logits" in P:
            logits = P[f"{name}.value_residual.logits"]
            a, b = logits.softmax(0)
            v = a * self.v0 + b * v
        outs = []
        for h in range(heads):
            g = h // (heads // groups)
            qh, kg, vg = self.turned(norm(q[:, h])) * P[f"{name}.q_gain_H"][h], self.turned(norm(k[:, g])), v[:, g]
            z = (qh @ kg.T / math.sqrt(kg.shape[1])).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            y = z.softmax(-1) @ vg
            if i >= cfg.num_layers - cfg.xsa_last_n or cfg.xsa_last_n == -1:
                unit = vg / vg.norm(dim=-1, keepdim=True)
                y = y - (y * unit).sum(-1, keepdim=True) * unit
            gate = torch.ones(T, dtype=torch.float64)
            if cfg.attn_gate == "input":
                gate = (x @ P[f"{name}.gate.weight_HW"][h] + P[f"{name}.gate.bias_H"][h]).sigmoid()
            elif cfg.attn_gate == "sparse":
                gate = (cfg.sparse_attn_gate_scale * x[:, : cfg.gate_window] @ P[f"{name}.gate.weight_HW"][h]).sigmoid()
            outs.append(y * gate[:, None])
        return torch.cat(outs, 1) @ self.matrix(f"{name}.out").T

    def mlp(self, i: int, x):
        z = x @ self.matrix(f"blocks.{i}.mlp.up").T
        return torch.where(z > 0, z, self.cfg.leaky_slope * z).square() @ self.matrix(f"blocks.{i}.mlp.down").T

    def block(self, i: int, a, m):
        P, name, depth = self.P, f"blocks.{i}", 1 / math.sqrt(i + 1)
        inner, outer = (depth if self.cfg.ln_scale == how else 1.0 for how in ("in", "out"))
        mix = P[f"{name}.resid_mix"]
        u = mix[0] * a + mix[1] * self.x0
        y = outer * P[f"{name}.attn_scale"] * self.attention(i, inner * norm(u))
        lanes = P.get(f"{name}.lane_mix")
        u = u + y if lanes is None else m
        z = outer * P[f"{name}.mlp_scale"] * self.mlp(i, inner * norm(u))
        if lanes is None:
            return u + z, u + z
        return tuple(lane * r + p * y + q * z for lane, (r, p, q) in zip((a, m), lanes, strict=True))

    def logits(self):
        cfg, P, self.v0 = self.cfg, self.P, None
        n, up = cfg.num_layers, int(cfg.skip_split == "ceil")
        order, half, kept = list(range(n)), (n + up) // 2, 0
        if cfg.encoder_recurrence:
            order, half, kept = [*range(half), *range(n)], 2 * half, half
        elif cfg.num_loops and self.looped:
            first, last = cfg.loop_start, cfg.loop_end + 1
            order = [*range(last), *list(range(first, last)) * cfg.num_loops, *range(last, n)]
            half = (len(order) + up) // 2
        a = m = self.x0 = self.embedding()
        saved = []
        for at, i in enumerate(order):
            a = norm(a) if cfg.encoder_recurrence and at == kept else a
            if at >= half and saved:
                skip = P["skip_weights"][at - half] * saved.pop()
                s = P["skip_gates"][at - half].sigmoid() if "skip_gates" in P else None
                a = a + skip if s is None else s * a + (1 - s) * skip
            a, m = self.block(i, a, m)
            saved += [a] if kept <= at < half else []
        out = norm((a + m) / 2 if f"blocks.{n - 1}.lane_mix" in P else a)
        z = out @ (P["tok_emb.weight"] if cfg.tie_embeddings else P["head.weight"]).T
        high, low = P.get("softcap.caps", (cfg.logit_softcap,) * 2)
        return torch.where(z > 0, high * (z / high).tanh(), low * (z / low).tanh())


def parameters(model: tg.GPT) -> dict[str, torch.Tensor]:
    """All by name, in float64, and the random bases."""
    frozen = {name: b.double() for name, b in model.named_buffers() if name.endswith(".base")}
    return frozen | {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def documents(rows: int = 2) -> torch.Tensor:
    """Ids with documents that begin at the start, within and at the end of rows, one of them of one token."""
    ids = torch.randint(2, V, (rows, T), generator=torch.Generator().manual_seed(5))
    ids[0, [0, 9, 10, T - 1]] = ids[1, [4, 17]] = BOS
    return ids


def network(looped: bool = True, **knobs) -> tg.GPT:
    """Of test_model's tiny configuration with these knobs."""
    model = randomised(build(**knobs))
    model.set_looped(looped)
    return model


def randomised(model: tg.GPT) -> tg.GPT:
    """In float64, every parameter random and unequal."""
    model, generator = model.double(), torch.Generator().manual_seed(1)
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
            if name.endswith(("alpha_H", "caps", "lane_mix", "gate.weight_HW", "smear.scale")):
                p.copy_(
                    torch.linspace(0.4, 1.9, p.numel()).view(p.shape) * p.sign() if "caps" not in name else 2.0 + p / 3
                )
        if model.head is not None:
            model.head.weight += torch.randn(model.head.weight.shape, generator=generator)
    return model


def check(model: tg.GPT, attention: str) -> tg.GPT:
    ids, P = documents(), parameters(model)
    model.place(torch.device("cpu"), tg.PLAIN_ATTENTION[attention]).compute_dtype = torch.float64
    with torch.no_grad():
        for mine, row in zip(model.logits(model.features(ids)), ids.tolist(), strict=True):
            assert (
                mine - Oracle(model.cfg, P, row, model.looped).logits()
            ).abs().max() < 2e-5  # angles are kept in fp32
    return model


@pytest.mark.parametrize("name", ALONE)
def test_a_technique_is_its_formula(name):
    check(network(**ALONE[name]), "sdpa")
    if ALONE[name].get("num_loops"):
        check(network(looped=False, **ALONE[name]), "blocks")


@pytest.mark.parametrize("a, b", PAIRS, ids=[f"{a} + {b}" for a, b in PAIRS])
def test_a_pair_of_techniques_is_its_formula_and_learns(a, b):
    """Every parameter is reached, and no gradient is poisoned."""
    model, ids = (
        check(network(**SWITCHES[a], **{k: v for k, v in SWITCHES[b].items() if k not in SWITCHES[a]}), "blocks"),
        documents(),
    )
    model.nll(ids[:, :-1], ids[:, 1:]).mean().backward()
    for name, p in model.named_parameters():
        if p.numel() and p.requires_grad:  # a single block has no skip; the two caps are frozen
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_a_prefix_and_a_cache_have_the_features_of_the_whole_text(name, mask):
    """No token changes what was predicted before it, and kept keys, values, ids and embeddings are all that a later one needs."""
    for looped in {True, not ALONE[name].get("num_loops")}:
        model, ids = network(looped, doc_mask=mask, **ALONE[name]), documents()
        with torch.no_grad():
            whole = model.features(ids)
            for t in (1, 9, 10, T - 1):
                assert (model.features(ids[:, :t]) - whole[:, :t]).abs().max() < 1e-9
            for pieces in ([1] * T, [5, 1, 1, 9, 8], [T]):
                cache = tg.KVCache(model.cfg, 2, T, torch.device("cpu"), torch.float64)
                parts = [model.features(piece, tg.Ctx(cache=cache)) for piece in ids.split(pieces, dim=1)]
                assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9 and cache.length == T


INITIAL = {  # what each control parameter is at birth, by the end of its name
    "q_gain_H": 1.5, "attn_scale": 1, "mlp_scale": 1, "skip_weights": 1, "skip_gates": 0, "smear.gate": -3, "smear.weight_W": 0,
    "smear.scale": 0, "bigram.scale": 0.05, "ve.scale": 0.1, "ve.layer_scales": 1, "gate.weight_HW": 0, "gate.bias_H": 4,
    "value_residual.logits": 0.5, "softcap.caps": 30, "bigram.table.weight": 0, "attn.out.weight": 0,
    "mlp.down.weight": 0, "lane_mix": [[1.1, 1, 1], [1.1, 1, 1]], "resid_mix": [[1.0], [0.0]],
}  # fmt: skip


def test_control_parameters_begin_where_their_technique_does_nothing_yet():
    forms = [{"smear": True, "smear_init": -3.0, "attn_gate": "input", "value_residual": "softmax", "parallel_start_layer": 2},
             {"smear": True, "smear_form": "window", "attn_gate": "sparse", "xsa_last_n": -1, "skip_gates_enabled": True,
              "asym_logit_rescale": True, "bigram_vocab_size": 50, "ve_dim": 6, "ve_layers": "1,3"}]  # fmt: skip
    met = set()
    for knobs in forms:
        for name, p in build(**knobs).named_parameters():
            for end, value in INITIAL.items():
                if name.endswith(end):
                    met.add(end)
                    assert torch.equal(p, torch.tensor(value, dtype=torch.float32).expand(p.shape)), name
    assert met == INITIAL.keys()
    mixes = [block.resid_mix for block in build(num_layers=10, resid_mix_init="phase").blocks]
    shares = [1 / (1 + math.exp(-3 * (i / 9 - 0.5))) for i in range(10)]
    assert all(
        torch.allclose(m, torch.tensor([[a], [1 - a]]).expand(2, 32)) for m, a in zip(mixes, shares, strict=True)
    )
