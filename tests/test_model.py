"""Section 4: the plain model against its reference, and each technique: off bitwise, at its neutral setting, at work."""

from __future__ import annotations

import math
import os
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
    "bigram_table_std": 0.5, "leaky_slope": 0.5, "resid_mix_init": "phase", "mlp_mult": 1.0, "kv_fused": True,
}  # fmt: skip
EVERYTHING_ELSE = {
    **EVERYTHING, "ln_scale": "out", "attn_gate": "sparse", "gate_window": 5, "smear_before_norm": True,
    "pre_enrich_dim": 12, "encoder_recurrence": True, "skip_split": "ceil", "num_layers": 5,
    "bigram_hash": "pr187", "bigram_scale": 0.0, "adapter_rank": 3, "kv_fused": False,
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


# ---- embeddings


def test_overtone_keeps_directions_and_sets_the_spectrum():
    w = torch.randn(96, 64) * 0.005
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    tg.overtone_(w)
    after = torch.linalg.svdvals(w)
    assert torch.allclose(after, s[0] * torch.arange(1, 65) ** -0.5, rtol=1e-4)
    assert torch.allclose((u.T @ w @ vt.T).diag(), after, rtol=1e-3)
    assert abs(512**-0.5 - 0.0442) < 1e-4


# ---- attention


@pytest.mark.parametrize("dims, base", [(0, 20452.2), (16, 22081.8)])
def test_the_ntk_rule_gives_the_published_bases(dims, base):
    knobs = {"model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "rope_dims": dims, "train_batch_tokens": 2048}
    assert tg.rope_base(config(**knobs, rope_train_len=1024, train_seq_len=2048)) == pytest.approx(base, abs=0.05)
    assert tg.rope_base(config(**knobs, rope_train_len=2048, train_seq_len=2048)) == 10000.0
    assert tg.rope_base(config(**knobs, train_seq_len=2048)) == 10000.0


def test_a_zero_value_neither_changes_nor_poisons_exclusive_attention():
    y = torch.randn(1, 3, 2, 4, requires_grad=True)
    v = torch.zeros(1, 3, 1, 4, requires_grad=True)
    out = tg.exclude_self(y, v)
    assert torch.equal(out, y)
    out.square().sum().backward()
    assert y.grad.isfinite().all() and v.grad.isfinite().all()


# ---- blocks


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


@pytest.mark.parametrize("knobs", [EVERYTHING, {**EVERYTHING_ELSE, "adapter_rank": 0}])
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


def test_a_full_cache_refuses_more():
    model = build()
    cache = tg.KVCache(model.cfg, 2, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError, match="cache of 4 positions cannot hold 5"):
        model.features(tokens(length=5), tg.Ctx(cache=cache))


# ---- many at once


def test_flops_count_each_pass_of_a_block():
    once, twice = build(num_layers=4), build(num_layers=4, encoder_recurrence=True)
    matrices = sum(s.numel() for site, s in once.sites().items() if site.startswith("blocks.0"))
    assert tg.flops_per_token(twice, T) - tg.flops_per_token(once, T) == 2 * 6 * (matrices + T * 32)
