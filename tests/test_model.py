"""Section 4: the plain model against its reference, and each technique: off bitwise, at its neutral setting, at work."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as tg

ROOT = Path(tg.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reference  # noqa: E402

BOS, V, T = 1, 40, 24
TINY = {
    "vocab_size": V, "num_layers": 4, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "train_seq_len": T,
    "train_batch_tokens": 2 * T, "embed_init_std": 0.5,
}  # fmt: skip
# Everything that can be on at once, in the two orders of the embedding pipeline.
EVERYTHING = {
    "xsa_last_n": -1, "rope_dims": 4, "rope_train_len": 8, "ln_scale": "in", "attn_gate": "input", "attn_gate_init": 0.5,
    "value_residual": "softmax", "ve_dim": 6, "ve_layers": "1,3", "smear": True, "bigram_vocab_size": 50, "bigram_dim": 6,
    "bigram_table_std": 0.5, "leaky_slope": 0.5, "resid_mix_init": "phase", "mlp_mult_encoder": 1.0, "kv_fused": True,
}  # fmt: skip
EVERYTHING_ELSE = {
    **EVERYTHING, "ln_scale": "out", "attn_gate": "scalar", "value_residual": "sigmoid", "smear_before_norm": True,
    "pre_enrich_dim": 12, "encoder_recurrence": True, "skip_split": "ceil", "num_layers": 5,
    "bigram_hash": "pr187", "bigram_scale": 0.0, "adapter_rank": 3, "adapter_b_init": "published", "kv_fused": False,
    "overtone_init": True,
}  # fmt: skip


def config(**knobs) -> tg.Config:
    return tg.Config(**{**TINY, **knobs})


def build(seed: int = 0, noise: float = 0.0, **knobs) -> tg.GPT:
    """A model of `config(**knobs)`; with `noise` no parameter stays at its initial zeros and ones."""
    torch.manual_seed(seed)
    model = tg.GPT(config(**knobs))
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape)
    return model


def tokens(seed: int = 0, rows: int = 2, length: int = T) -> torch.Tensor:
    """Ids without BOS."""
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def like(model: tg.GPT, plain: tg.GPT) -> tg.GPT:
    """`model` with every parameter that the plain model has too."""
    unknown = model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert not unknown
    return model


# ---- the plain model


def test_the_plain_model_is_the_reference():
    s = reference.Settings(layers=5, dim=32, heads=4, kv_heads=2, mlp_mult=2, vocab=V)
    theirs = reference.GPT(s)
    ours = build(num_layers=5)
    names = {"tok_emb": "embed", "attn.": "", "mlp.": "", "q_gain_H": "q_gain"}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        for name, p in ours.named_parameters():
            for mine, other in names.items():
                name = name.replace(mine, other)
            p.copy_(theirs.get_parameter(name).view(p.shape))
    ids = tokens()
    z = ours.logits(ours.features(ids))
    assert torch.allclose(z, theirs(ids), atol=1e-4, rtol=1e-4)
    nll = ours.nll(ids[:, :-1], ids[:, 1:])
    assert nll.shape == (2, T - 1)
    assert torch.allclose(nll.mean(), reference.loss_of(theirs, ids[:, :-1], ids[:, 1:]), atol=1e-5)


def test_without_skips_and_mixes_the_u_net_is_a_plain_transformer():
    model = build(noise=0.1, num_layers=4)
    with torch.no_grad():
        model.skip_weights.zero_()
        for block in model.blocks:
            block.resid_mix[0], block.resid_mix[1] = 1.0, 0.0
            block.attn_scale.fill_(1.0)
            block.mlp_scale.fill_(1.0)
    x = tg.rms_norm(model.tok_emb(tokens(), torch.float32))
    stream = tg.Stream(x, model.rope[:, :T], {}, tg.Ctx())
    for slot, block in enumerate(model.blocks):
        x = x + block.attn(tg.rms_norm(x), None, stream, slot)[0]
        x = x + block.mlp(tg.rms_norm(x), tg.Ctx())
    assert torch.allclose(model.features(tokens()), tg.rms_norm(x), atol=1e-5)


def test_an_untrained_model_knows_nothing():
    model = build(vocab_size=1024, model_dim=128, embed_init_std=0.005)
    ids = torch.arange(2, 1002).view(50, 20)
    assert model.nll(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(1024), abs=0.01)


def test_every_parameter_knows_its_optimizer_and_its_storage():
    for knobs in (EVERYTHING, EVERYTHING_ELSE, {"tie_embeddings": False}):
        for name, p in build(**knobs).named_parameters():
            assert p.role in ("matrix", "scalar", "embed", "head") and p.lr_mult > 0, name
            assert p.store in ("attn", "mlp", "embed", "table", "proj", "adapter", "control"), name
            assert (p.role == "matrix") <= (p.ndim == 2), name


def test_a_head_of_its_own_starts_at_zero_and_is_not_the_table():
    model = build(tie_embeddings=False)
    assert torch.equal(model.logits(model.features(tokens())), torch.zeros(2, T, V))
    assert "head" in model.sites() and model.head.weight.role == "head"


# ---- switched off, and at the neutral setting

OFF = {
    "smear": {"smear": False, "smear_init": 2.0, "smear_before_norm": True, "smear_cross_doc": True},
    "bigram": {"bigram_vocab_size": 0, "bigram_dim": 7, "bigram_hash": "pr187", "bigram_scale": 1.0,
               "bigram_table_std": 1.0, "bigram_table_role": "scalar", "bigram_proj_role": "scalar"},
    "xsa": {"xsa_last_n": 0},
    "gate": {"attn_gate": "none", "attn_gate_init": -1.0},
    "value residual": {"value_residual": "none"},
    "value embedding": {"ve_dim": 0, "ve_layers": "1,2"},
    "branch scale without a branch": {"branch_proj_scaled": True},
    "pre-enrichment": {"pre_enrich_dim": 0},
    "recurrence": {"encoder_recurrence": False},
    "random base": {"adapter_rank": 0, "adapter_seed": 7},
    "leaky slope": {"leaky_slope": 0.0},
    "LN scale": {"ln_scale": "none"},
    "RoPE over all dims": {"rope_dims": 8},
    "NTK at its own length": {"rope_train_len": T},
    "split of an even number": {"skip_split": "ceil"},
    "own multipliers that agree": {"mlp_mult_encoder": 2.0, "mlp_mult_decoder": 2.0},
    "quantisation-aware training": {"qat": "none", "qat_bits": 3},
    "loops": {"num_loops": 0, "loop_start": 1, "loop_end": 2, "enable_looping_at": 0.1},
    "lanes": {"parallel_start_layer": 0},
    "sparse gate": {"attn_gate": "none", "gate_window": 3, "sparse_attn_gate_scale": 0.5},
    "window smear": {"smear": False, "smear_form": "window", "gate_window": 3},
    "gated xsa": {"xsa_last_n": 0, "xsa_gated": True},
    "skip gates": {"skip_gates_enabled": False},
    "softcap of two sides": {"asym_logit_rescale": False},
}  # fmt: skip


@pytest.mark.parametrize("knobs", OFF.values(), ids=OFF)
def test_switched_off_is_the_plain_model_bit_for_bit(knobs):
    plain, off = build(seed=3), build(seed=3, **knobs)
    a, b = plain.state_dict(), off.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), off.parameters(), strict=True):
            noise = torch.randn(p.shape)
            p += noise
            q += noise
    ids = tokens()
    assert torch.equal(plain.nll(ids[:, :-1], ids[:, 1:]), off.nll(ids[:, :-1], ids[:, 1:]))


NEUTRAL = {
    "smear": ({"smear": True, "smear_init": -20.0}, {}),
    "bigram without scale": ({"bigram_vocab_size": 50, "bigram_scale": 0.0}, {}),
    "bigram scale zero": ({"bigram_vocab_size": 50, "bigram_table_std": 1.0}, {"bigram.scale": 0.0}),
    "input gate": ({"attn_gate": "input", "attn_gate_init": 20.0}, {}),
    "scalar gate": ({"attn_gate": "scalar", "attn_gate_init": 20.0}, {}),
    "value embedding": ({"ve_dim": 6, "ve_layers": "0,3"}, {"ve.scale": 0.0}),
    "softmax residual": ({"value_residual": "softmax"}, {"value_residual.logits": [-30.0, 30.0]}),
    "sigmoid residual": ({"value_residual": "sigmoid"}, {"value_residual.logits": [-30.0, 30.0]}),
    "one more pass of nothing": (
        {"encoder_recurrence": True},
        {"attn_scale": 0.0, "mlp_scale": 0.0, "resid_mix": [[1.0], [0.0]]},
    ),
}


@pytest.mark.parametrize("knobs, values", NEUTRAL.values(), ids=NEUTRAL)
def test_at_its_neutral_setting_a_technique_leaves_the_plain_model(knobs, values):
    plain = build(noise=0.2)
    model = like(build(**knobs), plain)
    with torch.no_grad():
        for m in (plain, model):
            for name, p in m.named_parameters():
                for end, value in values.items():
                    if name.endswith(end):
                        p.copy_(torch.tensor(value))
    ids = tokens()
    assert torch.allclose(model.features(ids), plain.features(ids), atol=1e-5)


# ---- causality


@pytest.mark.parametrize("knobs", [EVERYTHING, EVERYTHING_ELSE], ids=["norm-smear", "smear-enrich-norm"])
@pytest.mark.parametrize("attention", list(tg.PLAIN_ATTENTION))
def test_a_token_cannot_change_what_was_predicted_before_it(knobs, attention):
    model = build(noise=0.1, **knobs).place(torch.device("cpu"), tg.PLAIN_ATTENTION[attention])
    ids = tokens()
    before = model.logits(model.features(ids))
    for t in (0, 1, T // 2, T - 1):
        other = ids.clone()
        other[:, t] = BOS if t % 2 else ids[:, t] % (V - 2) + 2
        after = model.logits(model.features(other))
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


# ---- embeddings


def smear_output(x, gate: float, starts=None, **knobs):
    smear = tg.Smear(config(model_dim=x.shape[-1], num_heads=1, num_kv_heads=1, smear_init=gate, **knobs))
    starts = torch.zeros(x.shape[:2], dtype=torch.bool) if starts is None else starts
    return smear(x, torch.zeros_like(x[:, :1]), starts)


@pytest.mark.parametrize("gate, own", [(0.0, 0.5), (-3.0, 0.9526)])
def test_smear_blends_with_the_embedding_before(gate, own):
    x = torch.randn(2, 5, 8)
    before = torch.cat([torch.zeros(2, 1, 8), x[:, :-1]], 1)
    assert torch.allclose(smear_output(x, gate), own * x + (1 - own) * before, atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_smear_never_reaches_across_a_bos_but_by_the_published_leak(first):
    """The last token of a document is invisible to the next one; SMEAR_CROSS_DOC=1 shows it."""
    ids = tokens(rows=1)
    ids[0, 10] = BOS
    other = ids.clone()
    other[0, 9] = ids[0, 9] % (V - 2) + 2
    for leak in (False, True):
        model = build(smear=True, smear_before_norm=first, smear_cross_doc=leak, num_layers=1)
        a, b = model.embed(ids, tg.Ctx()), model.embed(other, tg.Ctx())
        assert torch.equal(a[0, 11:], b[0, 11:])
        assert torch.equal(a[0, 10], b[0, 10]) is not leak


def test_bigram_rows_are_those_of_the_published_hashes():
    rng = random.Random(0)
    pairs = [(rng.randrange(1024), rng.randrange(1024)) for _ in range(200)]
    prev, cur = torch.tensor(pairs).T
    published = {
        "pr164": lambda p, c: ((36313 * c) ^ (27191 * p)) % 4095,
        "pr740": lambda p, c: (2654435761 * c + 40503 * p) % 4096,
        "pr187": lambda p, c: (92821 * p + c) % 4096,
    }
    for form, rule in published.items():
        assert tg.hash_bigram(form, prev, cur, 4096).tolist() == [rule(p, c) for p, c in pairs]
        first = tg.hash_bigram(form, torch.tensor([-1]), torch.tensor([77]), 4096).item()
        assert first == (4095 if form == "pr164" else rule(0, 77))


def test_bigram_branch_starts_at_nothing_and_adds_scale_times_projection():
    assert torch.equal(build(bigram_vocab_size=50).bigram.table.weight, torch.zeros(50, 128))
    model = build(noise=0.3, bigram_vocab_size=50, bigram_dim=6)
    ids = tokens()
    prev = F.pad(ids[:, :-1], (1, 0), value=-1)
    rows = model.bigram.table.weight[tg.hash_bigram("pr164", prev, ids, 50)]
    expected = model.tok_emb.weight[ids] + model.bigram.scale * rows @ model.bigram.proj.weight.T
    assert torch.allclose(model.embed(ids, tg.Ctx()), tg.rms_norm(expected), atol=1e-5)


def test_the_three_orders_of_the_embedding_pipeline():
    def shift(x):
        return F.pad(x, (0, 0, 1, 0))[:, :-1]

    ids = tokens()
    knobs = {"smear": True, "smear_init": 0.0}
    norm_smear = build(**knobs)
    smear_norm = build(**knobs, smear_before_norm=True)
    enriched = build(**knobs, smear_before_norm=True, pre_enrich_dim=12)
    e = norm_smear.tok_emb.weight[ids]
    n, blend = tg.rms_norm(e), 0.5 * e + 0.5 * shift(e)
    up, down = enriched.pre_enrich.up.weight, enriched.pre_enrich.down.weight
    own = enriched.tok_emb.weight[ids]
    own = 0.5 * own + 0.5 * shift(own)
    assert torch.allclose(norm_smear.embed(ids, tg.Ctx()), 0.5 * n + 0.5 * shift(n), atol=1e-5)
    assert torch.allclose(smear_norm.embed(ids, tg.Ctx()), tg.rms_norm(blend), atol=1e-5)
    assert torch.allclose(enriched.embed(ids, tg.Ctx()), tg.rms_norm(F.gelu(own @ up.T) @ down.T), atol=1e-4)


def test_overtone_keeps_directions_and_sets_the_spectrum():
    w = torch.randn(96, 64) * 0.005
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    tg.overtone_(w)
    after = torch.linalg.svdvals(w)
    assert torch.allclose(after, s[0] * torch.arange(1, 65) ** -0.5, rtol=1e-4)
    assert torch.allclose((u.T @ w @ vt.T).diag(), after, rtol=1e-3)
    assert abs(512**-0.5 - 0.0442) < 1e-4


def test_value_embedding_reaches_the_values_of_its_blocks_alone():
    plain = build(noise=0.2)
    model = like(build(ve_dim=6, ve_layers="1,3"), plain)
    assert [float(model.ve.scale.detach()), *model.ve.layer_scales.tolist()] == pytest.approx([0.1, 1.0, 1.0])
    ids = tokens()
    with torch.no_grad():
        model.ve.layer_scales[1] = 3.0
    added = model.ve(ids, torch.float32, tg.Ctx())
    shared = 0.1 * model.ve.table.weight[ids] @ model.ve.proj.weight.T
    assert added.keys() == {1, 3} and torch.allclose(added[1], shared) and torch.allclose(added[3], 3 * shared)
    x = torch.randn(2, T, 32)
    for layer, block in enumerate(model.blocks):
        k, v = block.attn.keys_values(x, tg.Stream(x, model.rope, added, tg.Ctx()))
        assert torch.equal(k, plain.blocks[layer].attn.k(x, tg.Ctx()))
        assert torch.allclose(
            v - plain.blocks[layer].attn.v(x, tg.Ctx()), added.get(layer, torch.zeros_like(v)), atol=1e-6
        )


# ---- attention


def test_rope_turns_only_its_dims_and_products_depend_on_distance_alone():
    table = tg.rope_table(config(rope_dims=4, train_seq_len=64, train_batch_tokens=64))
    x = torch.randn(1, 64, 2, 8)
    y = tg.rotate(x, table)
    assert torch.equal(y[..., 4:], x[..., 4:]) and not torch.allclose(y[:, 1:, :, :4], x[:, 1:, :, :4])
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    q, k = (tg.rotate(v.expand(1, 64, 1, 8), table)[0, :, 0] for v in (torch.randn(8), torch.randn(8)))
    scores = q @ k.T
    for distance in (0, 1, 7):
        line = scores.diagonal(-distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-4)


@pytest.mark.parametrize("dims, base", [(0, 20452.2), (16, 22081.8)])
def test_the_ntk_rule_gives_the_published_bases(dims, base):
    knobs = {"model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "rope_dims": dims, "train_batch_tokens": 2048}
    assert tg.rope_base(config(**knobs, rope_train_len=1024, train_seq_len=2048)) == pytest.approx(base, abs=0.05)
    assert tg.rope_base(config(**knobs, rope_train_len=2048, train_seq_len=2048)) == 10000.0
    assert tg.rope_base(config(**knobs, train_seq_len=2048)) == 10000.0


def test_exclusive_attention_is_orthogonal_to_its_own_value_and_equals_the_expanded_form():
    y, v = torch.randn(2, 7, 6, 8), torch.randn(2, 7, 3, 8)
    out = tg.exclude_self(y, v)
    full = F.normalize(v, dim=-1).repeat_interleave(2, dim=2)
    assert torch.allclose(out, y - (y * full).sum(-1, keepdim=True) * full, atol=1e-6)
    assert float((out * full).sum(-1).abs().max()) < 1e-5


def test_a_zero_value_neither_changes_nor_poisons_exclusive_attention():
    y = torch.randn(1, 3, 2, 4, requires_grad=True)
    v = torch.zeros(1, 3, 1, 4, requires_grad=True)
    out = tg.exclude_self(y, v)
    assert torch.equal(out, y)
    out.square().sum().backward()
    assert y.grad.isfinite().all() and v.grad.isfinite().all()


def head_inputs(model: tg.GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block's output projection of attention receives."""
    seen = {}
    model.features(ids, tg.Ctx(tap=lambda site, x: seen.update({site: x.detach()})))
    return [seen[f"blocks.{i}.attn.out"] for i in range(len(model.blocks))]


def test_exclusive_attention_of_the_first_position_is_nothing_in_the_last_n_blocks_alone():
    inputs = head_inputs(build(noise=0.2, xsa_last_n=2), tokens())
    first = [float(x[:, 0].abs().max()) for x in inputs]
    assert min(first[:2]) > 0.01 and max(first[2:]) < 1e-5
    assert max(float(x[:, 0].abs().max()) for x in head_inputs(build(noise=0.2, xsa_last_n=-1), tokens())) < 1e-5


@pytest.mark.parametrize("form", ["input", "scalar"])
def test_a_gate_scales_the_heads_before_the_output_projection(form):
    """Blocks later than the first see other inputs; the first shows the gate alone."""
    plain = build(noise=0.2, xsa_last_n=-1)
    gated = like(build(xsa_last_n=-1, attn_gate=form, attn_gate_init=4.0), plain)
    ids = tokens()
    ratio = head_inputs(gated, ids)[0][:, 1:] / head_inputs(plain, ids)[0][:, 1:]
    assert torch.allclose(ratio, torch.full_like(ratio, 0.9820), atol=2e-4)


def test_the_input_gate_opens_each_head_by_the_normalised_input():
    gate = tg.InputGate(config())
    with torch.no_grad():
        gate.weight_HD[2] = 1.0
    x, y = torch.randn(2, T, 32), torch.ones(2, T, 4, 8)
    out = gate(y, x)
    assert torch.allclose(out[:, :, 2, 0], torch.sigmoid(4 + x.sum(-1)), atol=1e-5)
    assert torch.allclose(out[:, :, 0], torch.full((2, T, 8), 1 / (1 + math.exp(-4))))


@pytest.mark.parametrize("form, shares", [("softmax", (0.5, 0.5)), ("sigmoid", (0.6225, 0.6225))])
def test_value_residual_mixes_the_first_blocks_own_values(form, shares):
    model = build(noise=0.0, value_residual=form)
    assert type(model.blocks[0].attn.value_residual) is tg.NoValueResidual
    v, v0 = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(model.blocks[1].attn.value_residual(v, v0), shares[0] * v0 + shares[1] * v, atol=1e-4)
    x = torch.randn(1, T, 32)
    stream = tg.Stream(x, model.rope, {}, tg.Ctx())
    raw = model.blocks[0].attn.heads(model.blocks[0].attn.v(x, tg.Ctx()))
    _, first = model.blocks[0].attn(x, None, stream, 0)
    assert torch.equal(first, raw)
    assert model.blocks[1].attn(x, first, stream, 1)[1] is first


# ---- blocks


def test_layer_scale_multiplies_what_blocks_read_or_what_they_add():
    u = torch.randn(1, 3, 32)
    block = tg.Block(config(num_layers=11, ln_scale="in"), 10)
    assert torch.allclose(block.norm(u), 0.3015 * tg.rms_norm(u), atol=1e-4)
    x = torch.randn(2, T, 32)
    for how in ("in", "out"):  # zero output projections: the stream itself is not scaled
        block = build(ln_scale=how).blocks[3]
        assert torch.equal(block(x, x, None, tg.Stream(x, build().rope, {}, tg.Ctx()), 3)[0], x)
    torch.manual_seed(0)
    plain, scaled = (build(noise=0.1, ln_scale=how).blocks[3] for how in ("none", "out"))
    stream = tg.Stream(x, build().rope, {}, tg.Ctx())
    with torch.no_grad():
        for block in (plain, scaled):
            block.mlp_scale.zero_()
            block.resid_mix[0], block.resid_mix[1] = 1.0, 0.0
    added, half = (block(x, x, None, stream, 3)[0] - x for block in (plain, scaled))
    assert torch.allclose(half, 0.5 * added, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.5, 0.9])
def test_the_activation_is_leaky_relu_squared(slope):
    mlp = build(noise=0.1, leaky_slope=slope).blocks[0].mlp
    x = torch.randn(3, 32)
    z = x @ mlp.up.weight.T
    expected = torch.where(z > 0, z**2, slope**2 * z**2) @ mlp.down.weight.T
    assert torch.allclose(mlp(x, tg.Ctx()), expected, atol=1e-5)


def test_encoder_and_decoder_may_have_other_widths():
    model = build(num_layers=5, mlp_mult_encoder=1.0, mlp_mult_decoder=3.0, decoder_lr_mult=2.0)
    assert [b.mlp.up.weight.shape[0] for b in model.blocks] == [32, 32, 96, 96, 96]
    assert [b.mlp.up.weight.lr_mult for b in model.blocks] == [1, 1, 2, 2, 2]


def test_the_phase_mix_leans_on_the_embedding_in_early_blocks():
    mixes = [b.resid_mix for b in build(num_layers=10, resid_mix_init="phase").blocks]
    assert (mixes[0][0, 0].item(), mixes[9][0, 0].item()) == pytest.approx((0.182, 0.818), abs=1e-3)
    assert all(torch.allclose(m.sum(0), torch.ones(32)) for m in mixes)


def steps(**knobs) -> list[tuple[int, bool, int | None]]:
    return [(s.block, s.save, s.skip) for s in tg.layer_plan(config(**knobs))]


def test_the_plan_of_the_u_net():
    """(block, output kept, skip merged before): what was pushed last is merged first, with weight 0."""
    assert steps(num_layers=5) == [(0, True, None), (1, True, None), (2, False, 0), (3, False, 1), (4, False, None)]
    assert steps(num_layers=5, skip_split="ceil") == [
        (0, True, None), (1, True, None), (2, True, None), (3, False, 0), (4, False, 1)]  # fmt: skip
    assert steps(num_layers=1) == [(0, False, None)]
    assert [s for *_, s in steps(num_layers=11)][5:] == [0, 1, 2, 3, 4, None]


def test_the_plan_of_encoder_recurrence():
    plan = tg.layer_plan(config(num_layers=4, encoder_recurrence=True))
    assert [s.block for s in plan] == [0, 1, 0, 1, 2, 3]
    assert [i for i, s in enumerate(plan) if s.norm] == [2]
    assert [i for i, s in enumerate(plan) if s.save] == [2, 3] and [s.skip for s in plan][4:] == [0, 1]
    assert tg.count_parameters(build(encoder_recurrence=True)) == tg.count_parameters(build())


def test_init_of_projections():
    plain = build(model_dim=128, num_layers=2)
    assert all(torch.count_nonzero(w) == 0 for b in plain.blocks for w in (b.attn.out.weight, b.mlp.down.weight))
    bound = 128**-0.5
    w = plain.blocks[0].attn.q.weight
    assert bound * 0.98 < float(w.detach().abs().max()) <= bound

    model = build(model_dim=128, num_layers=2, linear_init="orthogonal", out_init="scaled", branch_proj_scaled=True,
                  bigram_vocab_size=50, bigram_dim=64, ve_dim=64, ve_layers="1")  # fmt: skip
    half = 1 / math.sqrt(2 * 2)
    gains = {"blocks.0.attn.q": 1, "blocks.1.mlp.up": 1, "blocks.0.attn.out": half, "blocks.1.mlp.down": half,
             "bigram.proj": half, "ve.proj": half}  # fmt: skip
    for site, gain in gains.items():
        values = torch.linalg.svdvals(model.get_parameter(site + ".weight"))
        assert torch.allclose(values, torch.full_like(values, gain), atol=1e-4), site


# ---- random bases

# SHA-256 of the fp32 base of block 3's q at seed 42, 64 wide: a changed base makes every old artifact worthless.
BASE_SHA256 = "7b56a8de7f7a84ea8deaec51bff50f44c24f09e4bf96df323abe1c2c9011a025"
PRINT_BASE = (
    "import hashlib, torch, train_gpt as tg; torch.manual_seed(5); cfg = tg.Config(num_layers=4, model_dim=64, num_heads=2,"
    " num_kv_heads=1, adapter_rank=2); print(hashlib.sha256(tg.GPT(cfg).blocks[3].attn.q.base.numpy().tobytes()).hexdigest())"
)


def test_a_base_is_the_same_bits_in_every_process(capsys):
    """Whatever the seed of torch and the number of threads: here, and in a process of its own."""
    exec(PRINT_BASE.replace("seed(5)", "seed(6)"))
    assert capsys.readouterr().out.split()[-1] == BASE_SHA256
    threads = str(3 - min(torch.get_num_threads(), 2))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", PRINT_BASE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == BASE_SHA256


@pytest.mark.parametrize("m", [2, 7, 64, 96, 512, 1536])
def test_a_base_is_orthogonal(m):
    q = tg.random_orthogonal(42, m)
    assert np.abs(q @ q.T - np.eye(m)).max() < 1e-14 * max(m, 10)


def test_a_base_looks_like_a_gaussian_one():
    """Entries and the overlap of rows' energies; a product without its inner permutation repeats 34 values and fails."""
    q = tg.random_orthogonal(42, 512) * math.sqrt(512)
    g = torch.linalg.qr(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))[
        0
    ].double().numpy() * math.sqrt(512)
    assert abs((q**4).mean() - 3) < 0.05 and abs(q.mean()) < 0.01

    def overlap(w):
        energy = w**2 - 1
        return (energy @ energy.T / 512)[~np.eye(512, dtype=bool)].std()

    assert overlap(q) == pytest.approx(overlap(g), rel=0.05)
    rows = np.sort(np.abs(q), axis=1)
    assert np.abs(rows - rows[0]).mean() > 0.02  # a convolution has the same values in every row


def test_an_adapter_starts_at_its_base_and_the_base_is_never_stored():
    model = build(adapter_rank=3, kv_fused=True)
    q, kv, up = (model.get_submodule(f"blocks.2.{site}") for site in ("attn.q", "attn.kv", "mlp.up"))
    for site in (q, kv, up):
        assert torch.equal(site.matrix(tg.Ctx()), site.base)
        values = torch.linalg.svdvals(site.base)
        assert torch.allclose(values, torch.full_like(values, 32**-0.5), atol=1e-6)
    assert not torch.equal(q.base, kv.base) and not torch.equal(q.base, model.blocks[1].attn.q.base)
    assert not any("base" in name for name in model.state_dict())
    assert not any(b.requires_grad for b in model.buffers())
    published = build(adapter_rank=3, adapter_b_init="published").blocks[0]
    zero = {kind: bool((m.b == 0).all()) for kind, m in [*published.attn.named_children(), *published.mlp.named_children()]
            if isinstance(m, tg.AdapterLinear)}  # fmt: skip
    assert zero == {"q": False, "k": False, "v": False, "out": True, "up": False, "down": True}


def test_bases_and_adapters_rebuild_the_model_exactly():
    model = build(seed=1, noise=0.1, adapter_rank=3)
    again = build(seed=2, adapter_rank=3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model.features(tokens()), again.features(tokens()))


# ---- what a context adds


@pytest.mark.parametrize("knobs", [EVERYTHING, EVERYTHING_ELSE, {"tie_embeddings": False}])
def test_a_tap_sees_the_input_of_every_site(knobs):
    model, seen = build(noise=0.1, **knobs), {}
    ids = tokens()
    plain = model.nll(ids[:, :-1], ids[:, 1:])
    ctx = tg.Ctx(tap=lambda site, x: seen.setdefault(site, []).append(x.shape))
    assert torch.equal(model.nll(ids[:, :-1], ids[:, 1:], ctx), plain)
    sites = model.sites()
    assert seen.keys() == sites.keys() | (set() if model.head else {"tok_emb"})
    for site, shape in sites.items():
        assert set(seen[site]) == {torch.Size((2, T - 1, shape[1]))}, site
    passes = 2 if model.cfg.encoder_recurrence else 1
    assert len(seen["blocks.0.attn.q"]) == passes and len(seen["blocks.3.attn.q"]) == 1


def test_a_lora_adds_its_delta_and_a_zero_one_is_nothing():
    model = build(noise=0.1, **EVERYTHING)
    ids = tokens()
    plain = model.logits(model.features(ids))
    sites = {**model.sites(), "head": torch.Size((V, 32))}
    zeros = {site: lambda _, y: y + torch.zeros_like(y) for site in sites}
    zero = tg.Ctx(lora=every_pass(model, zeros))
    assert torch.equal(model.logits(model.features(ids, zero), zero), plain)
    for site in sites:  # each site is reached
        one = tg.Ctx(lora=every_pass(model, {site: plus_one}))
        assert not torch.equal(model.logits(model.features(ids, one), one), plain), site
    site = "blocks.1.mlp.up"
    d = torch.randn(sites[site]) * 0.1
    delta = model.logits(model.features(ids, tg.Ctx(lora=every_pass(model, {site: lambda x, y: y + F.linear(x, d)}))))
    with torch.no_grad():
        model.get_parameter(site + ".weight").add_(d)
    assert torch.allclose(delta, model.logits(model.features(ids)), atol=1e-4)


def every_pass(model: tg.GPT, lora: dict) -> dict:
    """Each site's function under every pass that may run it, and under -1 for what lies outside the blocks."""
    return {(slot, site): f for site, f in lora.items() for slot in range(-1, len(model.plan))}


def plus_one(_x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A LoRA that adds 1 to the first output."""
    return y + F.one_hot(torch.tensor(0), y.shape[-1]).to(y)


@pytest.mark.parametrize("knobs", [EVERYTHING, {**EVERYTHING_ELSE, "adapter_rank": 0, "adapter_b_init": "zero"}])
def test_fake_quantisation_is_the_model_with_quantised_projections(knobs):
    model = build(noise=0.1, **knobs)
    ids, quant = tokens(), tg.FakeQuant("ste", 4)
    faked = model.features(ids, tg.Ctx(fake_quant=quant))
    assert not torch.allclose(faked, model.features(ids), atol=1e-3)
    with torch.no_grad():
        for site in model.sites():
            w = model.get_parameter(site + ".weight")
            w.copy_(quant(w))
    assert torch.allclose(faked, model.features(ids), atol=1e-5)


def test_what_is_stored_as_adapters_is_not_fake_quantised():
    model = build(noise=0.1, adapter_rank=3)
    assert torch.equal(model.features(tokens(), tg.Ctx(fake_quant=tg.FakeQuant("ste", 3))), model.features(tokens()))


@pytest.mark.parametrize("knobs", [EVERYTHING, EVERYTHING_ELSE, {}], ids=["norm-smear", "smear-enrich-norm", "plain"])
@pytest.mark.parametrize("pieces", [[1] * T, [5, 1, 1, 9, 8], [T]], ids=["one by one", "pieces", "whole"])
def test_a_cache_continues_where_it_stopped(knobs, pieces):
    model = build(noise=0.1, **knobs)
    ids = tokens()
    ids[:, 6] = ids[:, 15] = BOS
    cache = tg.KVCache(model.cfg, 2, T, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        parts = [model.features(piece, tg.Ctx(cache=cache)) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), model.features(ids), atol=1e-4)
    assert cache.length == T


def test_a_full_cache_refuses_more():
    model = build()
    cache = tg.KVCache(model.cfg, 2, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError, match="cache of 4 positions cannot hold 5"):
        model.features(tokens(length=5), tg.Ctx(cache=cache))


# ---- many at once

SWITCHES = {
    "xsa": {"xsa_last_n": 2}, "partial rope": {"rope_dims": 4}, "ntk": {"rope_train_len": 8}, "ln in": {"ln_scale": "in"},
    "ln out": {"ln_scale": "out"}, "input gate": {"attn_gate": "input"}, "scalar gate": {"attn_gate": "scalar"},
    "softmax vrl": {"value_residual": "softmax"}, "sigmoid vrl": {"value_residual": "sigmoid"},
    "ve": {"ve_dim": 6, "ve_layers": "0,3"}, "smear": {"smear": True}, "leak": {"smear": True, "smear_cross_doc": True},
    "smear first": {"smear": True, "smear_before_norm": True}, "bigram": {"bigram_vocab_size": 50},
    "bigram 740": {"bigram_vocab_size": 50, "bigram_hash": "pr740", "bigram_scale": 0.0, "bigram_table_std": 1.0},
    "bigram 187": {"bigram_vocab_size": 50, "bigram_hash": "pr187", "bigram_table_role": "matrix"},
    "enrich": {"pre_enrich_dim": 12}, "ceil": {"skip_split": "ceil", "num_layers": 5},
    "recurrence": {"encoder_recurrence": True}, "phase": {"resid_mix_init": "phase"},
    "orthogonal": {"linear_init": "orthogonal"}, "scaled out": {"out_init": "scaled"},
    "overtone": {"overtone_init": True}, "adapters": {"adapter_rank": 3}, "fused": {"kv_fused": True},
    "published b": {"adapter_rank": 3, "adapter_b_init": "published"}, "leaky": {"leaky_slope": 0.5},
    "widths": {"mlp_mult_encoder": 1.0, "mlp_mult_decoder": 3.0}, "own head": {"tie_embeddings": False},
    "ste": {"qat": "ste"}, "soft": {"qat": "soft_round", "qat_bits": 5}, "soft 850": {"qat": "soft_round_pr850"},
    "loop": {"num_loops": 2, "loop_start": 1, "loop_end": 1}, "lanes": {"parallel_start_layer": 3},
    "carry": {"num_loops": 1, "loop_start": 1, "loop_end": 1, "loop_carry": "1.5,.2"}, "skip gates": {"skip_gates_enabled": True},
    "sparse gate": {"attn_gate": "sparse", "gate_window": 6}, "gated xsa": {"xsa_last_n": -1, "xsa_gated": True},
    "window smear": {"smear": True, "smear_form": "window", "gate_window": 6}, "two caps": {"asym_logit_rescale": True},
    "deep": {"num_layers": 7}, "single": {"num_layers": 1, "xsa_last_n": -1, "ve_layers": "0", "value_residual": "none"},
}  # fmt: skip
CLASHES = [
    *({a, "recurrence"} for a in ("loop", "carry")),
    *({"single", a} for a in ("loop", "carry", "lanes", "recurrence")),
]
PAIRS = [pair for pair in itertools.combinations(SWITCHES, 2) if set(pair) not in CLASHES]
PAIRS = random.Random(1).sample(PAIRS, 80)


@pytest.mark.parametrize("a, b", PAIRS, ids=[f"{a} + {b}" for a, b in PAIRS])
def test_a_pair_of_switches_learns(a, b):
    """Forward, backward; every parameter is reached, and no gradient is poisoned."""
    knobs = {**SWITCHES[a], **SWITCHES[b]}
    model = build(noise=0.05, **knobs)
    quant = tg.FakeQuant(model.cfg.qat, model.cfg.qat_bits) if model.cfg.qat != "none" else None
    ids = tokens()
    model.nll(ids[:, :-1], ids[:, 1:], tg.Ctx(fake_quant=quant)).mean().backward()
    for name, p in model.named_parameters():
        if p.numel() and p.requires_grad:  # a single block has no skip; the two caps are frozen
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


BAD = [
    ({"xsa_last_n": 5}, "XSA_LAST_N=5 exceeds NUM_LAYERS=4"),
    ({"ve_dim": 8, "ve_layers": "3,4"}, "VE_LAYERS='3,4': expected different blocks of 0 to 3"),
    ({"ve_dim": 8, "ve_layers": "two"}, "VE_LAYERS='two': expected different blocks of 0 to 3"),
    ({"ve_dim": 8, "ve_layers": "1,1"}, "VE_LAYERS='1,1': expected different blocks of 0 to 3"),
    ({"ve_dim": 8}, "VE_DIM=8 with VE_LAYERS='': expected different blocks of 0 to 3"),
    ({"rope_dims": 3}, "ROPE_DIMS=3: expected an even number of at most the head width 8"),
    ({"rope_dims": 10}, "ROPE_DIMS=10: expected an even number of at most the head width 8"),
    ({"rope_dims": 2, "rope_train_len": 8}, "ROPE_TRAIN_LEN=8: the NTK rule needs more than 2 rotated dims"),
    ({"adapter_b_init": "published"}, "set ADAPTER_RANK above 0"),
    ({"num_heads": 3}, "MODEL_DIM=32 is not a multiple of NUM_HEADS=3"),
    ({"num_kv_heads": 3}, "NUM_HEADS=4 is not a multiple of NUM_KV_HEADS=3"),
    ({"bigram_vocab_size": 1}, "BIGRAM_VOCAB_SIZE=1: expected 0 (off) or at least 2 rows"),
    ({"encoder_recurrence": True, "num_layers": 1}, "ENCODER_RECURRENCE=1 needs an encoder block"),
    ({"value_residual": "softmax", "num_layers": 1}, "VALUE_RESIDUAL=softmax needs at least 2 blocks"),
    ({"mlp_mult": 0.01}, "MLP_MULT=0.01 leaves no hidden unit at MODEL_DIM=32"),
    ({"swa_every": 5, "swa_source": "ema"}, "SWA_SOURCE=ema needs EMA_DECAY above 0"),
]  # fmt: skip


@pytest.mark.parametrize("knobs, message", BAD, ids=[m for _, m in BAD])
def test_a_combination_that_makes_no_sense_is_refused_by_name(knobs, message):
    with pytest.raises(tg.ConfigError) as error:
        config(**knobs)
    assert message in str(error.value)


def test_all_bad_combinations_are_reported_at_once():
    with pytest.raises(tg.ConfigError) as error:
        config(xsa_last_n=5, rope_dims=3, adapter_b_init="published")
    assert len(str(error.value).splitlines()) == 3


def test_flops_count_each_pass_of_a_block():
    once, twice = build(num_layers=4), build(num_layers=4, encoder_recurrence=True)
    matrices = sum(s.numel() for site, s in once.sites().items() if site.startswith("blocks.0"))
    assert tg.flops_per_token(twice, T) - tg.flops_per_token(once, T) == 2 * 6 * (matrices + T * 32)
