"""Section 5: orthogonalisation, Muon, AdamW groups, what one step does to whom; the whole step and its ranks stand in test_trainer_oracle.py."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same
from torch import nn

import train_gpt as tg

ALONE = SimpleNamespace(world=1, rank=0, device=torch.device("cpu"))
SHAPES = {"a": (24, 16), "b": (24, 16), "c": (24, 16), "d": (16, 24), "e": (32, 32)}


pytestmark = pytest.mark.usefixtures("one_thread")


class Toy(nn.Module):
    """Five matrices of three shapes, a table, a head and two control parameters; `b` learns at twice the rate."""

    def __init__(self, head_role: str = "embed"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(role: str, *shape: int, lr_mult: float = 1.0) -> nn.Parameter:
            return tg.tag(nn.Parameter(torch.randn(shape, generator=generator)), role, "control", lr_mult)

        for name, shape in SHAPES.items():
            self.register_parameter(name, parameter("matrix", *shape, lr_mult=2.0 if name == "b" else 1.0))
        self.table = parameter("embed", 11, 8)
        self.head = parameter(head_role, 11, 8)
        self.gain = parameter("scalar", 7)
        self.mix = parameter("scalar", 2, 5)


def config(**knobs) -> tg.Config:
    """The defaults with a short momentum warm-up, so that few steps see it move."""
    return tg.Config(**{"muon_momentum_warmup_steps": 3, **knobs})


def set_grads(model: nn.Module, step: int, parts: list[int]) -> None:
    """The gradient of `step` is the sum of numbered parts; part 0 does not touch the parameters `c` and `gain`."""
    for index, (name, p) in enumerate(model.named_parameters()):
        p.grad = None
        for part in parts:
            if part > 0 or name not in ("c", "gain"):
                generator = torch.Generator().manual_seed(10_000 * step + 100 * part + index)
                grad = torch.randn(p.shape, generator=generator) * (1 + step)  # growing, so that clipping matters
                p.grad = grad if p.grad is None else p.grad + grad


def train(model: nn.Module, optimizers: tg.Optimizers, steps: range, parts: list[int]) -> None:
    for step in steps:
        set_grads(model, step, parts)
        optimizers.step(step, lr_scale=1.0 - 0.1 * step)
        optimizers.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- orthogonalisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one(dtype):
    G = 1e-3 * torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(tg.orthogonalize(G, 5, dtype).float())
    assert values.min() > 0.65 and values.max() < 1.25


def test_orthogonalize_keeps_singular_vectors():
    G = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G[0], full_matrices=False)
    core = U.T @ tg.orthogonalize(G, 5, torch.float32)[0] @ Vh.T
    assert (core - core.diag().diag()).abs().max() < 1e-3


def test_orthogonalize_of_the_transpose_is_the_transpose():
    G = torch.randn(3, 96, 40, generator=torch.Generator().manual_seed(1))
    wide, tall = tg.orthogonalize(G.mT.contiguous(), 5, torch.float32), tg.orthogonalize(G, 5, torch.float32)
    torch.testing.assert_close(tall, wide.mT, rtol=0, atol=1e-5)


def test_a_batch_equals_its_matrices_one_by_one_and_zeros_stay_zeros():
    G = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(2))
    G[1] = 0
    together = tg.orthogonalize(G, 5, torch.float32)
    alone = torch.cat([tg.orthogonalize(g[None], 5, torch.float32) for g in G])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert torch.equal(together[1], torch.zeros(20, 30))


def test_polar_coefficients_bring_all_but_the_tiniest_singular_values_close_to_one():
    """Damped as published: values of [.001, 1] end within [.85, 1.15]; the classic tuple leaves .001 at a half."""
    values = torch.logspace(-3, 0, 400, dtype=torch.float64)
    ends = {}
    for name, tuples in tg.NEWTON_SCHULZ.items():
        x = values.clone()
        for i in range(5):
            a, b, c = tuples[min(i, len(tuples) - 1)]
            x = a * x + b * x**3 + c * x**5
        ends[name] = x
    assert ends["polar"].min() >= 0.85 and ends["polar"].max() <= 1.15
    assert ends["classic"].min() < 0.6

    q, r = (torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1))
    spectrum = torch.logspace(-2, 0, 64)
    G = ((q * spectrum) @ r)[None]
    for dtype, slack in ((torch.float32, 0.0), (torch.bfloat16, 0.05)):
        after = torch.linalg.svdvals(tg.orthogonalize(G, 5, dtype, "polar").float())
        assert after.min() > 0.85 - slack and after.max() < 1.15 + slack


def test_row_normalisation_gives_rows_of_length_one(monkeypatch):
    bank, seen = tg.Optimizers(config(muon_row_normalize=True), Toy(), ALONE).banks[0], []
    monkeypatch.setattr(tg, "orthogonalize", lambda G, *_: seen.append(G.clone()) or G)
    bank.shard.normal_(generator=torch.Generator().manual_seed(0)).mul_(
        torch.logspace(-3, 3, bank.shard.shape[1])[:, None]
    )
    bank.shard[0, 1] = 0
    bank.update(0.0)
    expected = torch.ones(bank.shard.shape[:2])
    expected[0, 1] = 0
    torch.testing.assert_close(seen[0].norm(dim=2), expected)


# ---- Muon


def test_momentum_rises_linearly_then_stays():
    momenta = [tg.muon_momentum(step, 0.85, 0.95, 4) for step in (0, 2, 4, 100)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert tg.muon_momentum(0, 0.85, 0.95, 0) == 0.95


def test_equals_torch_muon_at_constant_momentum_without_weight_decay(monkeypatch):
    """torch's momentum is an average and ours a sum: a constant factor, which the orthogonalisation removes."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon in fp32, to compare all digits
    ours, theirs = Toy(), Toy()
    knobs = {"muon_momentum_warmup_start": 0.9, "muon_momentum": 0.9, "matrix_lr": 0.05}
    optimizers = tg.Optimizers(config(**knobs), ours, ALONE)
    groups = [{"params": [getattr(theirs, name)], "lr": 0.1 if name == "b" else 0.05} for name in SHAPES]
    muon = torch.optim.Muon(groups, momentum=0.9, nesterov=True, weight_decay=0.0)
    for step in range(6):
        for model in (ours, theirs):
            set_grads(model, step, [1])
        optimizers.step(step, 1.0)
        muon.step()
    for name in SHAPES:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


# ---- groups


def test_a_parameter_without_a_role_is_named():
    model = Toy()
    model.orphan = nn.Parameter(torch.zeros(3))
    model.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(AssertionError, match=r"no optimizer owns \['orphan'\]"):
        tg.Optimizers(config(), model, ALONE)


@pytest.mark.parametrize("recipe", sorted(tg.RECIPES))
def test_every_parameter_of_every_recipe_has_one_owner(recipe):
    cfg = tg.load_config({"RECIPE": recipe}).cfg
    with torch.device("meta"):
        model = tg.GPT(cfg)
    run = SimpleNamespace(world=3, rank=1, device=torch.device("meta"))
    optimizers = tg.Optimizers(cfg, model, run)
    owned = [id(p) for part in (optimizers.small, *optimizers.banks) for p in part.params]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_missing_gradient_counts_as_zeros():
    silent, zeros = Toy(), Toy()
    for model in (silent, zeros):
        optimizers = tg.Optimizers(config(), model, ALONE)
        train(model, optimizers, range(2), [1])
        set_grads(model, 2, [0])  # leaves `c` and `gain` without gradient
        if model is zeros:
            model.c.grad, model.gain.grad = torch.zeros_like(model.c), torch.zeros_like(model.gain)
        before = weights(model)
        optimizers.step(2, 1.0)
        assert not torch.equal(before["c"], model.c) and not torch.equal(before["gain"], model.gain)  # momentum goes on
    assert_same(weights(silent), weights(zeros))


# ---- clipping


def test_a_limit_above_the_norm_changes_nothing():
    free, limited, tight = Toy(), Toy(), Toy()
    for model, limit in ((free, 0.0), (limited, 1e6), (tight, 1.0)):
        train(model, tg.Optimizers(config(grad_clip_norm=limit), model, ALONE), range(3), [1])
    assert_same(weights(free), weights(limited))
    assert not torch.equal(free.a, tight.a) and not torch.equal(free.gain, tight.gain)


# ---- state


def test_a_saved_state_does_not_move_with_later_steps():
    model = Toy()
    optimizers = tg.Optimizers(config(), model, ALONE)
    train(model, optimizers, range(1), [1])
    state = optimizers.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizers, range(1, 3), [1])
    assert_same(state, before)
