"""Section 7: codes are what the decoder multiplies, GPTQ is the algorithm, and bad input gets a message."""

import math
import types

import numpy as np
import pytest
import torch

import train_gpt as tg


def second_moments(power: float, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """H of inputs whose components decay as k**-power before a random mixing."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2 * columns, columns, generator=g, dtype=torch.float64)
    z *= torch.arange(1, columns + 1, dtype=torch.float64) ** -power
    x = z @ torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    return (x.T @ x / len(x)).float()


def output_error(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, h: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    e = codes.double() * scale.double()[:, None] - w.double()
    return float((e @ h.double() * e).sum() / (w.double() @ h.double() * w.double()).sum())


def brute_force_gptq(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, top: int, damp: float) -> torch.Tensor:
    """Column by column, re-solving the least-squares problem of the columns left: no Cholesky factor, no blocks."""
    w, h = w.double().clone(), h.double().clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = h.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(w)
    while left:
        j, rest = left[0], left[1:]
        codes[:, j] = (w[:, j] / scale.double()).round().clamp(-top, top)
        error = w[:, j] - codes[:, j] * scale.double()
        if rest:  # the shift of the others that minimises e H e^T given e_j
            w[:, rest] += error[:, None] * torch.linalg.solve(h[rest][:, rest], h[rest, j])
        left = rest
    return codes.to(torch.int8)


def quantize_rows(w: torch.Tensor, bits: int, clip: tg.ClipRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes (R, C) and steps (R,)."""
    scale = tg.clipped_scale(w, bits, clip)
    return tg.nearest_codes(w / scale.float()[:, None], tg.largest_code(bits)), scale


def gptq_codes(w, h, scale, top: int, block: int = 128, variant: str = "cholesky", order: str = "descending"):
    """tg.gptq of weights (N, R, C), second moments (N, C, C) and steps (N, R)."""
    factors = [tg.gptq_factors(h_CC, 0.01, variant, order) for h_CC in h]
    return tg.gptq(w, scale.float(), factors, top, block)


@pytest.mark.parametrize("block", [3, 16, 128])
def test_gptq_equals_a_brute_force_column_by_column_solution(block):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(2, 12, 16, generator=g)
    h = torch.stack([second_moments(0.5, 16, seed) for seed in (1, 2)])
    scale = (w.abs().amax(2) / 7).half()
    codes = gptq_codes(w, h, scale, 7, block)
    for i in range(2):
        assert torch.equal(codes[i], brute_force_gptq(w[i], h[i], scale[i], 7, 0.01))


@pytest.mark.parametrize(("power", "limit"), [(0.5, 0.23), (1.5, 0.0018)])
def test_gptq_removes_the_error_that_the_inputs_correlation_allows(power, limit):
    """Mild and strong correlation: descending order beats ascending, the published variant trails both."""
    w, h = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)), second_moments(power)
    scale = (w.abs().amax(1) / 31).half()
    nearest = output_error(w, tg.nearest_codes(w / scale.float()[:, None], 31), scale, h)

    def ratio(**how) -> float:
        return output_error(w, gptq_codes(w[None], h[None], scale[None], 31, **how)[0], scale, h) / nearest

    descending, ascending = ratio(), ratio(order="ascending")
    assert descending <= limit
    assert descending < ascending < ratio(variant="pr850", order="ascending") < 0.9


def test_dead_inputs_get_zero_codes_and_leave_the_others_alone():
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(8, 24, generator=g), second_moments(0.5, 24)
    h[5], h[:, 5] = 0.0, 0.0
    scale = (w.abs().amax(1) / 31).half()
    codes = gptq_codes(w[None], h[None], scale[None], 31)[0]
    keep = [j for j in range(24) if j != 5]
    alone = gptq_codes(w[None, :, keep], h[None][:, keep][:, :, keep], scale[None], 31)[0]
    assert (codes[:, 5] == 0).all()
    assert (codes[:, keep] != alone).float().mean() < 0.02  # the mean diagonal, hence the damping, differs a little
    weight = tg.gptq_factors(1e-6 * h, 0.01, "cholesky").weight_C
    assert weight[5] == pytest.approx(1e-3 * float(weight[keep].mean()), rel=1e-4)


def test_hessians_add_all_uses_of_a_site_and_share_equal_inputs():
    tap, x, y = tg.Hessians(), torch.randn(2, 5, 4), torch.randn(1, 3, 4)
    for inputs in (x, y):
        tap("q", inputs)
        tap("k", inputs)
    sums = tap.reduced(lambda t: t.mul_(2))  # as if another rank had seen the same
    flat = torch.cat([x.reshape(-1, 4), y.reshape(-1, 4)])
    assert sums["q"] is sums["k"]
    torch.testing.assert_close(sums["q"], 2 * flat.T @ flat)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rule", tg.FIELDS["QUANT_CLIP"].metadata["choices"])
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(bits, rule):
    w = torch.randn(20, 65, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-5, 1, 20)[:, None]
    codes, scale = quantize_rows(w, bits, tg.ClipRule(rule, (0.9, 0.99, 1.0), 8.0))
    step = scale.float()[:, None]
    top = tg.largest_code(bits)
    inside = w.abs() <= top * step
    error = (codes.float() * step - w).abs()
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16 and codes.abs().max() <= top
    assert (error <= 0.5001 * step + 1e-12)[inside].all()
    assert (codes.abs() == top)[~inside].all()


def test_search_never_loses_to_the_largest_weight():
    w = torch.randn(30, 200, generator=torch.Generator().manual_seed(0)) ** 3

    def error(rule: str) -> float:
        codes, scale = quantize_rows(w, 4, tg.ClipRule(rule, (0.9, 0.95, 0.99, 1.0)))
        return float((codes.float() * scale.float()[:, None] - w).square().sum())

    assert error("row") <= error("tensor") <= error("max")


def test_sdclip_is_the_published_statistic_and_keeps_rows_without_deviation():
    """scale = fp16(k std(row) / q_max), std about the mean with n - 1; equal weights keep their value instead of a step of 0."""
    w = (
        torch.randn(40, 128, generator=torch.Generator().manual_seed(1)) * 0.02
        + torch.linspace(-0.03, 0.03, 40)[:, None]
    )
    codes, scale = quantize_rows(w, 6, tg.ClipRule("sigma", sigmas=12.85))
    expected = torch.tensor(
        [12.85 * math.sqrt(sum((x - sum(r) / 128) ** 2 for x in r) / 127) / 31 for r in w.double().tolist()]
    )
    torch.testing.assert_close(scale.float(), expected.half().float(), rtol=1e-3, atol=0)
    for equal in (torch.full((3, 128), 0.3), torch.tensor([[0.3], [-2.0]]), torch.full((1, 2), -5.0)):
        codes, scale = quantize_rows(equal, 6, tg.ClipRule("sigma", sigmas=12.85))
        torch.testing.assert_close(codes * scale.float()[:, None], equal, rtol=2e-3, atol=0)


def test_small_rows_keep_their_resolution():
    """The published floor of 1/qmax on the scale would leave these rows with no code but zero."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    codes, scale = quantize_rows(w, 6, tg.ClipRule())
    assert codes.abs().amax(dim=1).tolist() == [31] * 4
    assert (codes.float() * scale.float()[:, None] - w).abs().max() < 1e-3 / 10


def small_model(**knobs) -> tuple[tg.Config, tg.GPT]:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 64, "train_seq_len": 16}
    shape |= {"train_batch_tokens": 64, "quant_min_numel": 64, "gptq_n_samples": 8}
    shape |= {"linear_init": "orthogonal", "out_init": "scaled"}
    cfg = tg.Config(**{**shape, **knobs})
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_sdpa)
    return cfg, model


def tensors(model: tg.GPT) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return {n: p.detach() for n, p in model.named_parameters()}, {n: p.store for n, p in model.named_parameters()}


def test_policy_by_role_by_name_and_by_size():
    cfg, model = small_model(attn_bits=5, mlp_bits=4, quant_overrides="blocks.1.attn.k=16,*.up=3", control_bits=32)
    stored = tg.quantize(cfg, *tensors(model))
    bits = {name: item.bits for name, item in stored.items()}
    assert bits["blocks.0.attn.k.weight"] == 5 and bits["blocks.1.attn.k.weight"] == 16
    assert bits["blocks.0.mlp.up.weight"] == 3 and bits["blocks.0.mlp.down.weight"] == 4
    assert bits["tok_emb.weight"] == 8 and bits["blocks.0.attn_scale"] == 32
    assert list(stored) == [name for name, _ in model.named_parameters()]
    sizes = {"just small": torch.zeros(8, 8), "no more": torch.zeros(13, 5)}
    policy = tg.Policy(tg.Config(quant_min_numel=64, attn_bits=6), sizes, dict.fromkeys(sizes, "attn"))
    assert [policy.bits(name) for name in sizes] == [16, 6]


def test_weights_that_cannot_be_stored_are_named():
    cfg, model = small_model()
    named, store = tensors(model)
    with pytest.raises(tg.ConfigError, match="tok_emb.weight holds NaN"):
        tg.quantize(cfg, {**named, "tok_emb.weight": named["tok_emb.weight"] * float("nan")}, store)
    half = tg.dataclasses.replace(cfg, control_bits=16)
    with pytest.raises(tg.ConfigError, match="QUANT_OVERRIDES=blocks.0.attn_scale=32"):
        tg.quantize(half, {**named, "blocks.0.attn_scale": torch.full((32,), 1e6)}, store)


def test_pruning_zeroes_the_smallest_of_each_tensor_or_of_all():
    for scope in ("tensor", "global"):
        cfg, model = small_model(prune_frac=0.3, prune_scope=scope)
        named, store = tensors(model)
        plain = tg.quantize(tg.dataclasses.replace(cfg, prune_frac=0.0), named, store)
        pruned = tg.quantize(cfg, named, store)
        coded = [n for n in named if pruned[n].codes is not None]
        alive = sum(int((plain[n].codes != 0).sum()) for n in coded)
        left = sum(int((pruned[n].codes != 0).sum()) for n in coded)
        assert 0.66 * alive < left < 0.74 * alive
        kept = torch.cat([tg.dequantize(pruned[n]).abs().flatten() for n in coded])
        lost = torch.cat([tg.dequantize(plain[n])[tg.dequantize(pruned[n]) == 0].abs() for n in coded])
        assert scope == "tensor" or lost.max() <= kept[kept > 0].min() + 1e-9
    inputs = tg.InputStats(tg.Policy(tg.dataclasses.replace(cfg, prune_scope="tensor"), named, store), {}, None)
    for n in coded:
        size = named[n].abs().flatten()
        smallest = size <= size.sort().values[int(0.3 * len(size)) - 1]
        assert torch.equal(inputs.to_round(n)[0].flatten() == 0, smallest | (size == 0))


def test_low_rank_correction_lowers_the_error_of_the_worst_tensors():
    cfg, model = small_model(mlp_bits=3, lqer_top_k=2, lqer_rank=4)
    named, store = tensors(model)
    configs = tg.dataclasses.replace(cfg, lqer_top_k=0), cfg
    plain, corrected = (tg.quantize(each, named, store) for each in configs)
    touched = [n for n in named if corrected[n].low_rank is not None]
    assert len(touched) == 2
    for n in touched:
        error = lambda s, n=n: float((tg.dequantize(s[n]) - named[n]).norm())  # noqa: E731
        assert error(corrected) < error(plain)
    right = torch.cat([torch.randn(8, generator=torch.Generator().manual_seed(0)) * 0.01**i for i in range(3)])
    found = tg.low_rank_codes(torch.arange(1.0, 9.0)[:, None] * right, 1, 4, 8)
    assert (found.right.unflatten(1, (3, 8)).abs().amax(2) >= 7).all()  # each group of columns has a step of its own


def alone(device: str = "cpu") -> types.SimpleNamespace:
    """A run of one rank."""
    return types.SimpleNamespace(rank=0, device=torch.device(device), share=lambda n: range(n), all_reduce=lambda t: t)


def stream(tokens: int = 4000, vocab: int = 64) -> tg.TokenStream:
    return tg.TokenStream([np.random.default_rng(0).integers(4, vocab, tokens).astype(np.uint16)], vocab)


def test_calibration_sees_every_projection_and_gptq_beats_rounding_on_it():
    cfg, model = small_model(gptq_enabled=True, attn_bits=4, mlp_bits=4)
    run = alone()
    calibration = tg.calibrate(cfg, run, model, tg.calibration_inputs(cfg, run, stream()))
    assert set(calibration.hessians) == {*model.sites(), "tok_emb"} and not calibration.fisher
    named, store = tensors(model)
    nearest, found = tg.quantize(cfg, named, store), tg.quantize(cfg, named, store, calibration.hessians)
    for site in model.sites():
        h, name = calibration.hessians[site], f"{site}.weight"
        error = lambda s, name=name, h=h: float(((e := tg.dequantize(s[name]) - named[name]) @ h * e).sum())  # noqa: E731
        assert error(found) < error(nearest)


def test_fisher_by_row_matches_the_exact_fisher_of_a_softmax():
    """Head rows: E[(1[y = v] - p_v)^2] |x|^2 = p_v (1 - p_v) |x|^2, summed over tokens, by hand."""
    cfg, model = small_model(target_bytes=10**6, tie_embeddings=False, gptq_n_samples=64)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    run, batches = alone(), []
    for inputs in tg.calibration_inputs(cfg, run, stream()):
        batches += [inputs] * 40
    calibration = tg.calibrate(cfg, run, model, batches)
    fisher, table = calibration.fisher["head.weight"], calibration.fisher["tok_emb.weight"]
    x = model.features(batches[0]).flatten(0, 1)
    p = model.logits(x).softmax(-1)
    exact = ((p * (1 - p)) * x.square().sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(fisher.sum(), exact.sum().detach(), rtol=0.15, atol=0)
    met = torch.isin(
        torch.arange(len(table)), torch.cat(batches)
    )  # a row that the text lacks counts the mean token's once
    assert 0 < met.sum() < len(met) and table[met].min() > table[~met].max()
    once = table.sum() / (calibration.tokens + len(table))
    torch.testing.assert_close(table[~met], once.expand((~met).sum()))


def test_adapters_are_compensated_by_their_own_inputs():
    """GPTQ on A sees the site's input x, on B it sees A x: either way the output error falls below rounding's."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 24, generator=g) @ torch.randn(24, 24, generator=g)
    named = {"s.a": torch.randn(8, 24, generator=g), "s.b": torch.randn(12, 8, generator=g)}
    store, cfg = {"s.a": "adapter", "s.b": "adapter"}, tg.Config(adapter_bits=4, quant_min_numel=0)
    torch.testing.assert_close(tg.input_moments("s.a", named, {"s": x.T @ x}), x.T @ x)
    ax = x @ named["s.a"].T
    torch.testing.assert_close(tg.input_moments("s.b", named, {"s": x.T @ x}), ax.T @ ax, rtol=1e-4, atol=1.0)
    rounded, compensated = (tg.quantize(cfg, named, store, h) for h in ({}, {"s": x.T @ x}))
    for name, inputs in (("s.a", x), ("s.b", ax)):
        errors = [float((inputs @ (tg.dequantize(q[name]) - named[name]).T).norm()) for q in (compensated, rounded)]
        assert errors[0] < 0.9 * errors[1], (name, errors)


def test_calibration_time_is_part_of_the_training_budget():
    assert tg.training_budget(tg.Config(max_wallclock_seconds=600, gptq_enabled=True, gptq_reserve_seconds=12)) == 588
    assert tg.training_budget(tg.Config(max_wallclock_seconds=600, gptq_reserve_seconds=12)) == 600
    assert tg.training_budget(tg.Config(max_wallclock_seconds=600, target_bytes=1)) == 592  # what the field keeps
    assert tg.training_budget(tg.Config(max_wallclock_seconds=0, target_bytes=1)) == 0


@pytest.mark.parametrize("seconds, taken", [(math.inf, 8), (80, 8), (79, 7), (30, 3), (29, 2), (5, 1), (-1, 1)])
def test_calibration_takes_no_batch_that_would_end_too_late_but_always_one(monkeypatch, seconds, taken):
    now = [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    run = types.SimpleNamespace(sync=lambda: None)
    got = []
    for batch in tg.while_time(iter(range(8)), seconds, run):
        got.append(batch)
        now[0] += 10
    assert got == list(range(taken))


def test_a_slow_batch_makes_the_next_ones_expected_as_slow(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    got = []
    for batch in tg.while_time(iter(range(8)), 60, types.SimpleNamespace(sync=lambda: None)):
        got.append(batch)
        now[0] += 30 if batch == 1 else 5
    assert got == [0, 1]  # 35 s used and 30 s for one more are above 60


def test_every_rank_calibrates_even_if_there_are_more_ranks_than_sequences():
    cfg, model = small_model(gptq_enabled=True, gptq_n_samples=1)
    for rank in range(3):
        run = alone()
        run.share = lambda n, rank=rank: range(rank * n // 3, (rank + 1) * n // 3)
        batches = list(tg.calibration_inputs(cfg, run, stream()))
        assert [b.shape[0] for b in batches] == [1]
        assert tg.calibrate(cfg, run, model, batches).tokens == batches[0].numel()


def test_calibration_batches_stay_within_the_tokens_that_fitted():
    cfg, model = small_model(gptq_enabled=True, gptq_n_samples=10)
    length = cfg.train_seq_len
    for most, rows in ((2**16, [10]), (4 * length, [4, 4, 2]), (1, [1] * 10)):
        assert [len(b) for b in tg.calibration_inputs(cfg, alone(), stream(), most)] == rows
