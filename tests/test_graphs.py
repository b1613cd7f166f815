"""Every training and scoring graph compiles whole, in the form a GPU runs; graphs and recompilations are counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_recipes import small
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

ROWS, LENGTH = 1, 8


def attend_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tg.Segments | None = None) -> torch.Tensor:
    """What attend_sdpa does on a GPU, where heads that share keys need not be expanded."""
    assert segments is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@pytest.fixture
def gpu_form(monkeypatch):
    """Take the branches of CUDA in the forward pass."""
    monkeypatch.setattr(tg, "rms_norm", lambda x: F.rms_norm(x, (x.shape[-1],)))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def model_of(recipe: str) -> tuple[tg.Config, tg.GPT]:
    smaller = (
        {}
        if recipe == "frontier"
        else {"NUM_LAYERS": 2, **({"VE_LAYERS": 1} if tg.RECIPES[recipe].get("VE_DIM") else {})}
    )
    cfg = tg.load_config(small(recipe, DOC_MASK=0, **smaller), has_gpu=lambda: False).cfg
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return cfg, model.place(torch.device("cpu"), attend_gpu)


def batch(cfg: tg.Config) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, cfg.vocab_size, (ROWS, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.usefixtures("gpu_form")
@pytest.mark.parametrize("recipe", sorted(tg.RECIPES))
def test_a_recipe_compiles_whole(recipe):
    """Training: one graph, and one for QAT whatever its sharpness. Scoring: one, and one with LoRA whatever it learned."""
    cfg, model = model_of(recipe)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)

    def train(ctx: tg.Ctx) -> None:
        inputs, targets = batch(cfg)
        got = forward(inputs, targets, ctx)
        got.sum().backward()
        torch.testing.assert_close(got, model(inputs, targets, ctx), rtol=2e-3, atol=2e-3)

    train(tg.Ctx())
    quant = tg.FakeQuant(cfg.qat if cfg.qat != "none" else "soft_round", 6)
    for sharpness in (1.0, 16.0):
        quant.sharpness.fill_(sharpness)
        train(tg.Ctx(fake_quant=quant))
    model.eval()  # as validation does in between
    model.train()
    train(tg.Ctx())
    assert counter.frame_count == 2

    scoring = CompileCounterWithBackend("aot_eager")
    score = torch.compile(tg.score_windows, dynamic=False, fullgraph=True, backend=scoring)

    def check(ctx: tg.Ctx) -> None:
        inputs, targets = batch(cfg)
        given = (model, inputs, targets, torch.zeros_like(inputs), 4, ctx, 1.0)
        with torch.no_grad():
            torch.testing.assert_close(score(*given), tg.score_windows(*given), rtol=2e-3, atol=2e-3)

    check(tg.Ctx())
    check(tg.Ctx())
    places = {(-1, "head"): (cfg.vocab_size, cfg.model_dim), (0, "blocks.0.attn.q"): model.sites()["blocks.0.attn.q"]}
    lora = {place: tg.Lora(torch.randn(2, d_in), torch.zeros(d_out, 2), 1.0) for place, (d_out, d_in) in places.items()}
    check(tg.Ctx(lora=lora))
    for part in lora.values():
        part.b.add_(0.1)
    check(tg.Ctx(lora=lora))
    assert scoring.frame_count == 2
