"""DOC_MASK=1: documents do not see each other. The oracle is each document segment computed alone."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOS, SEQ, VOCAB, config, events, losses, run_ranks, score_of, tiny_env, write_shard
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

CPU = torch.device("cpu")
PARTS = {
    "SMEAR": 1,
    "BIGRAM_VOCAB_SIZE": 64,
    "BIGRAM_DIM": 8,
    "VE_DIM": 8,
    "VE_LAYERS": "1",
    "XSA_LAST_N": 1,
    "VALUE_RESIDUAL": "softmax",
}
FORMS = {
    "plain": {},
    "parts": PARTS,
    "smear across documents": {**PARTS, "SMEAR_CROSS_DOC": 1},
    "window smear": {"SMEAR": 1, "SMEAR_FORM": "window", "SMEAR_BEFORE_NORM": 1, "PRE_ENRICH_DIM": 16},
}


def model_of(tiny, attention="blocks", **changes) -> tg.GPT:
    cfg = config(tiny, ATTENTION=attention, **{"DOC_MASK": 1, **changes})
    torch.manual_seed(3)
    model = tg.GPT(cfg).place(CPU, tg.choose_attention(cfg, CPU)[1], "fp32")
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model


def stream(n: int, mean: int, seed: int = 0) -> torch.Tensor:
    """(n,) random tokens with a BOS about every `mean`; two in a row, and one last."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCAB, n)
    ids[rng.random(n) < 1 / mean] = BOS
    ids[n // 2 : n // 2 + 2], ids[-1] = BOS, BOS
    return torch.from_numpy(ids)


def spans(ids: torch.Tensor, longest: int) -> list[tuple[int, int]]:
    """Segments of one row, by a loop."""
    starts = [0]
    for t in range(1, len(ids)):
        if ids[t] == BOS or t - starts[-1] == longest:
            starts.append(t)
    return list(itertools.pairwise([*starts, len(ids)]))


def gradients(model: tg.GPT) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ---- segments


@pytest.mark.parametrize("longest", [5, 16, 100])
def test_segments_begin_with_rows_documents_and_every_so_many_tokens(longest):
    ids = torch.stack([stream(100, 9, seed) for seed in range(3)])
    found = tg.find_segments(ids, longest)
    assert found.longest == longest and len(found.bounds_M) & (len(found.bounds_M) - 1) == 0
    expected = [[(lo, hi) for lo, hi in spans(row, longest)] for row in ids]
    for row, rows_spans in enumerate(expected):
        assert [t for t in range(100) if found.offset_BT[row, t] == 0] == [lo for lo, _ in rows_spans]
        for lo, hi in rows_spans:
            assert torch.equal(found.offset_BT[row, lo:hi], torch.arange(hi - lo))
    edges = sorted({lo + 100 * row for row, s in enumerate(expected) for lo, _ in s})
    bounds = found.bounds_M.tolist()
    assert bounds[: len(edges)] == edges and set(bounds[len(edges) :]) == {300}
    assert len(tg.find_segments(ids, longest, 512).bounds_M) == 512


# ---- kernels


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(-1, -1), enable_gqa=False):  # noqa: ARG001
    """What a kernel of packed sequences promises, for the tests."""
    assert (causal or window_size == (-1, 0)) and cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert int(cu_q[0]) == 0 and int(cu_q[-1]) == len(q) and int(cu_q.diff().max()) <= max_q == max_k
    parts = [slice(lo, hi) for lo, hi in itertools.pairwise(cu_q.tolist()) if lo < hi]
    return torch.cat([tg.attend_sdpa(q[None, p], k[None, p], v[None, p])[0] for p in parts])


def varlen_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
    """Torch 2.11's: as many heads of keys as of queries."""
    assert q.shape == k.shape
    return varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)


def varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    """Torch 2.10's."""
    assert q.shape == k.shape
    return varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=is_causal)


def fakes(monkeypatch) -> dict[str, tg.AttentionKernel]:
    """Every kernel; those of a GPU with their packages replaced by what they promise."""
    monkeypatch.setitem(sys.modules, "fake_flash", SimpleNamespace(
        flash_attn_func=varlen, flash_attn_varlen_func=lambda *args, causal: (varlen(*args, causal=causal), None)))  # fmt: skip
    packed = {}
    for name, kernel in (("varlen", varlen), ("varlen of 2.11", varlen_2_11), ("varlen of 2.10", varlen_2_10)):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        packed[name] = tg.attend_varlen()
    return {
        **packed,
        "sdpa": tg.attend_sdpa,
        "blocks": tg.attend_blocks,
        "flash": tg.attend_flash("fake_flash"),
    }


def test_every_kernel_equals_a_dense_mask(monkeypatch):
    monkeypatch.setattr(tg.BlockedAttention, "ROWS", 16)
    torch.manual_seed(1)
    B, T, H, G, K = 2, 90, 4, 2, 8
    ids = torch.stack([stream(T, 12, seed) for seed in (1, 2)])
    q, k, v = (torch.randn(B, T, n, K, requires_grad=True) for n in (H, G, G))
    segments = tg.find_segments(ids, 33)
    at, starts = torch.arange(T), torch.arange(T) - segments.offset_BT
    seen = (at[None, :] <= at[:, None]) & (starts[:, None, :] == starts[:, :, None])
    heads = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen[:, None]).transpose(1, 2)
    weight = torch.randn_like(dense)
    wanted = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    for name, kernel in fakes(monkeypatch).items():
        y = kernel(q, k, v, segments)
        assert torch.allclose(y, dense, atol=1e-5), name
        for ours, theirs in zip(torch.autograd.grad((y * weight).sum(), (q, k, v)), wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4), name


# ---- the model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_the_model_equals_each_segment_computed_alone(form, attention, tiny):
    model, ids = model_of(tiny, attention, **FORMS[form]), stream(121, 20)
    inputs, targets = ids[None, :-1], ids[None, 1:]
    nll = model.nll(inputs, targets, tg.Ctx(segments=tg.find_segments(inputs, SEQ)))
    nll.sum().backward()
    together = gradients(model)
    parts = [model.nll(inputs[:, lo:hi], targets[:, lo:hi]) for lo, hi in spans(inputs[0], SEQ)]
    torch.cat(parts, dim=1).sum().backward()
    assert torch.allclose(nll, torch.cat(parts, dim=1), atol=2e-5)
    for name, grad in gradients(model).items():
        assert torch.allclose(together[name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-5), name


@pytest.mark.parametrize("form", FORMS)
def test_off_is_the_plain_model_and_on_changes_nothing_within_a_document(form, tiny):
    off, on = model_of(tiny, DOC_MASK=0, **FORMS[form]), model_of(tiny, **FORMS[form])
    ids = stream(SEQ, 10_000)[None]
    ids[ids == BOS] = 7
    assert torch.allclose(off.nll(ids[:, :-1], ids[:, 1:]), on.nll(ids[:, :-1], ids[:, 1:]), atol=1e-5)
    ids[0, 12] = BOS
    other = ids.clone()
    other[0, :12] = 9
    change = [(m.features(ids) - m.features(other)).abs()[0, 12:].max().item() for m in (off, on)]
    assert change[0] > 1e-3 and change[1] == 0


# ---- training and evaluation


def trainer_of(tiny, data, **changes) -> tg.Trainer:
    cfg = config(tiny, **changes)
    run = tg.Run(cfg, 0, 0, 1, 1)
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(CPU, tg.choose_attention(cfg, CPU)[1], "fp32")
    return tg.Trainer(cfg, run, model, tg.TokenStream(tg.load_split(data.folder, "train"), VOCAB))


def test_a_compiled_step_is_the_eager_one(tiny, data, monkeypatch):
    """As a CPU compiles it; a stream of more documents than expected takes another size of bounds, not another result."""
    monkeypatch.setattr(tg, "notice_failed_compile", lambda _run, error: pytest.fail(str(error)))
    eager, compiled = (trainer_of(tiny, data, DOC_MASK=1, ATTENTION="blocks", SMEAR=1) for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.forward = torch.compile(compiled.model, dynamic=False, backend=counter)
    crowded = torch.full((4, SEQ), BOS)
    for inputs, targets in [*(eager.batcher.next(SEQ) for _ in range(3)), (crowded, crowded)]:
        expected = eager.backward(inputs, targets, tg.Ctx())
        assert abs(compiled.backward(inputs, targets, tg.Ctx()) - expected) < 1e-5
        ours, theirs = gradients(compiled.model), gradients(eager.model)
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert 0 < counter.frame_count < 20
    torch._dynamo.reset()


def test_ranks_train_alike_where_rows_begin_with_documents(tmp_path, data, script):
    """A rank's part of a step begins a segment; here one does so anyway, so one process and two make the same steps."""
    folder = tmp_path / "halves"
    folder.mkdir()
    tokens = np.array(data.train[: 80 * SEQ])
    tokens[tokens == BOS] = 5
    tokens[:: SEQ // 2] = BOS
    write_shard(folder / "fineweb_train_000000.bin", tokens)
    write_shard(folder / "fineweb_val_000000.bin", data.val)
    (folder / data.tokenizer.name).write_bytes(data.tokenizer.read_bytes())
    env = tiny_env(data, tmp_path / "logs", DOC_MASK=1, ATTENTION="blocks", DATA_PATH=folder, EVAL_STRIDE=0)
    assert script(env, RUN_ID="one").status == 0 and script(env, RUN_ID="unmasked", DOC_MASK=0).status == 0
    run_ranks({**env, "RUN_ID": "two"}, 2)
    one, two, unmasked = (losses({**env, "RUN_ID": name}) for name in ("one", "two", "unmasked"))
    assert max(abs(one[step] - two[step]) for step in one) < 2e-4
    assert max(abs(one[step] - unmasked[step]) for step in one) > 1e-3


def test_the_score_is_of_the_masked_model(tiny, script, tmp_path):
    env = {**tiny, "DOC_MASK": "1", "ATTENTION": "auto", "NGRAM_SCORE": "off", "VAL_TOKENS": "300", "ITERATIONS": "2"}
    assert script(env).status == 0
    trained = score_of(tiny)
    run = {**env, "RUN_ID": "again", "MODE": "eval", "ARTIFACT": str(tmp_path / "logs" / "tiny.pgz")}
    del run["DOC_MASK"]  # the artifact's
    assert script(run, ATTENTION="sdpa").status == 0
    assert abs(score_of(run) - trained) < 1e-5
    assert {e["stage"] for e in events(run, "stage")} == {"roundtrip", "sliding"}
    assert script(run, RUN_ID="audit", MODE="audit", EVAL_STRIDE=0).status == 0
    result = script(run, RUN_ID="off", DOC_MASK=0)
    assert result.status == 2 and "DOC_MASK=0: the artifact was made with 1" in result.err


def test_the_first_stage_scores_each_document_of_a_window_alone(tiny, data):
    cfg = config(tiny, DOC_MASK=1, VAL_TOKENS=200)
    run, model = tg.Run(cfg, 0, 0, 1, 1), model_of(tiny).eval()
    text = tg.load_validation(cfg, data.folder, tg.Tokenizer(data.tokenizer, VOCAB))
    evaluation = tg.Evaluation(cfg, run, model, text)
    result = evaluation.score("roundtrip")
    nats, ids = 0.0, text.tokens
    with torch.no_grad():
        for at in range(0, len(ids) - 1, SEQ):
            row, following = ids[at : at + SEQ][: len(ids) - 1 - at], ids[at + 1 : at + 1 + SEQ]
            for lo, hi in spans(row, SEQ):
                nats += model.nll(row[None, lo:hi], following[None, lo:hi]).sum().item()
    assert abs(result.val_loss - nats / (len(ids) - 1)) < 1e-5
