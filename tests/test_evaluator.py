"""Section 9, the core: every target is scored once, by its prefix alone, and only then learned from."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS, SEQ, VOCAB, NoCompiler, config

import train_gpt as tg


@pytest.fixture
def model(tiny) -> tg.GPT:
    """A network whose predictions depend on all of its context (at birth the output projections are zero)."""
    torch.manual_seed(0)
    model = tg.GPT(config(tiny, OUT_INIT="scaled", EMBED_INIT_STD=0.5)).place(torch.device("cpu"), tg.attend_sdpa)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model.eval()


@pytest.fixture
def text(data, tiny) -> tg.ValidationText:
    return tg.load_validation(config(tiny, VAL_TOKENS=300), data.folder, tg.Tokenizer(data.tokenizer, VOCAB))


def expert(cfg: tg.Config, model: tg.GPT, text: tg.ValidationText, stride: int) -> tg.NetworkExpert:
    return tg.NetworkExpert(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, stride)


# ---- the meter


def test_the_meter_adds_nats_tokens_and_bytes():
    meter = tg.StageResult()
    meter.add(torch.tensor([-1.0, -2.0]), torch.tensor([3, 0]))
    meter.add(torch.tensor([-3.0]), torch.tensor([1]))
    assert (meter.tokens, meter.bytes) == (3, 4)
    assert meter.val_loss == 2.0 and meter.val_bpb == pytest.approx(6 / math.log(2) / 4)


def test_the_meter_sums_in_double_precision():
    meter = tg.StageResult()
    for _ in range(100):
        meter.add(torch.full((10_000,), -0.1), torch.ones(10_000, dtype=torch.int64))
    assert meter.nats == pytest.approx(1e6 * float(torch.tensor(0.1)), rel=1e-12)


# ---- windows


@pytest.mark.parametrize("n, seq_len, stride", [
    (200, 32, 32), (200, 32, 8), (33, 32, 32), (34, 32, 1), (65, 32, 32), (161, 32, 31), (100, 8, 3), (9, 8, 8), (160, 32, 32),
])  # fmt: skip
def test_every_target_is_scored_once_with_the_context_promised(n, seq_len, stride):
    scored, lo = [], 1
    while lo < n:
        w = tg.window_at(lo, n, seq_len, stride)
        scored += range(w.lo, w.hi)
        assert 0 <= w.start < w.lo and w.hi - 1 - w.start <= seq_len
        if w.lo > 1:  # each target of later windows, also of the last one, has at least this much before it
            assert w.lo - w.start == seq_len - stride + 1
        assert tg.window_at(lo, n + 999, seq_len, stride).start == w.start, "where the text ends moves no window"
        lo = w.hi
    assert scored == list(range(1, n))


@pytest.mark.parametrize("stride", [8, SEQ])
@torch.no_grad()
def test_a_score_is_the_network_on_exactly_its_window(tiny, model, text, stride):
    scores = expert(config(tiny), model, text, stride).score(text.tokens, 1, len(text.tokens))
    for t in (1, 20, 32, 33, 40, 41, 150, len(text.tokens) - 1):
        w, lo = None, 1
        while w is None or t >= w.hi:
            w = tg.window_at(lo, len(text.tokens), SEQ, stride)
            lo = w.hi
        z = model.logits(model.features(text.tokens[w.start : t][None])[:, -1])
        assert float(scores[t - 1]) == pytest.approx(float(z[0].log_softmax(-1)[text.tokens[t]]), abs=1e-4)


@pytest.mark.parametrize("stride", [8, SEQ])
def test_the_score_does_not_depend_on_the_batch_or_the_order_of_asking(tiny, model, text, stride):
    n = len(text.tokens)
    whole = expert(config(tiny), model, text, stride).score(text.tokens, 1, n)
    single = expert(config(tiny, VAL_BATCH_TOKENS=1), model, text, stride)
    parts = [single.score(text.tokens, lo, min(lo + 7, n)) for lo in range(1, n, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert stride == SEQ or single.ahead < n, "the buffer was filled in several goes"


@pytest.mark.parametrize(("stride", "chunk"), [(1, 0), (8, 0), (SEQ, 0), (8, 67)])
@pytest.mark.parametrize(
    ("share", "seed"), [(0.0, 3), (0.1, 36), (0.3, 10), (1.0, 3)]
)  # 36, 10: those after chunks hold most
def test_every_full_batch_of_windows_has_room_for_its_segments(tiny, model, stride, chunk, share, seed):
    tokens = torch.where(torch.rand(1000, generator=torch.Generator().manual_seed(seed)) < share, BOS, 7)
    text = tg.ValidationText(tokens, torch.ones_like(tokens), True)
    cfg = config(tiny, DOC_MASK=1, VAL_BATCH_TOKENS=4 * SEQ, TTT_CHUNK_TOKENS=chunk or 2**16)
    network = (tg.SharedLoraNetwork if chunk else tg.NetworkExpert)(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, stride)
    while network.done < len(tokens):
        plan = network.plan(len(tokens))
        rows = [tokens[w.start : w.hi - 1] for w in plan if (w.hi - w.lo, w.lo - w.start) == (stride, SEQ + 1 - stride)]
        for i in range(len(rows) - network.rows + 1):
            offset = tg.find_segments(torch.stack(rows[i : i + network.rows]), SEQ).offset_BT
            assert (offset == 0).sum() < network.room
        network.done = plan[-1].hi


def test_out_of_memory_halves_the_batch_and_changes_no_score(tiny, model, text, monkeypatch):
    n, score_windows, room = len(text.tokens), tg.score_windows, 10**9
    plain, small = (expert(config(tiny), model, text, 8) for _ in range(2))

    def forward(model, inputs, *rest):
        if len(inputs) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_windows(model, inputs, *rest)

    monkeypatch.setattr(tg, "score_windows", forward)
    plain.score(text.tokens, 1, n)
    room = 3
    torch.testing.assert_close(small.score(text.tokens, 1, n), plain.score(text.tokens, 1, n), rtol=1e-5, atol=1e-5)
    assert small.rows <= 3 and small.ahead == plain.ahead
    small.done, room = 1, 0
    with pytest.raises(tg.ConfigError, match="EVAL_SEQ_LEN=32: one window does not fit in memory"):
        small.score(text.tokens, 1, n)


@pytest.mark.parametrize("stride", [8, SEQ])
def test_only_full_batches_of_full_windows_are_compiled(tiny, model, text, stride):
    n, shapes = len(text.tokens), set()
    plain, compiled = (expert(config(tiny, VAL_BATCH_TOKENS=4 * SEQ), model, text, stride) for _ in range(2))

    def kernel(model, ids, hints, last, *rest):
        shapes.add((tuple(ids.shape), last))
        return tg.score_windows(model, ids, hints, last, *rest)

    compiled.compiled = kernel
    assert torch.equal(compiled.score(text.tokens, 1, n), plain.score(text.tokens, 1, n))
    assert shapes == {((4, SEQ + 1), stride)}  # each other shape would cost a compilation


def test_an_evaluation_outlives_a_failing_compiler(tiny, model, text, capsys):
    n = len(text.tokens)
    plain, broken = (expert(config(tiny, VAL_BATCH_TOKENS=4 * SEQ), model, text, 8) for _ in range(2))

    def kernel(*_):
        raise NoCompiler

    broken.compiled = kernel
    assert torch.equal(broken.score(text.tokens, 1, n), plain.score(text.tokens, 1, n))
    assert capsys.readouterr().out.count("torch.compile failed (no compiler); running eager") == 1


# ---- the law


class Recorder:
    """An expert and a part that writes down what it is asked, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def score(self, tokens, lo, hi):  # noqa: ARG002
        self.calls.append(("score", lo, hi))
        return torch.full((hi - lo,), -1.0, dtype=torch.float64)

    def update(self, tokens, lo, hi):  # noqa: ARG002
        self.calls.append(("update", lo, hi))


@pytest.mark.parametrize("n", [2, 3, 9, 23])
def test_a_text_of_a_few_tokens_is_audited(tiny, model, text, n):
    cfg = config(tiny, EVAL_SEQ_LEN=1, EVAL_STRIDE=1)
    few = text._replace(tokens=text.tokens[:n], bytes=text.bytes[:n])
    checks = {c.name: c.passed for c in tg.Audit(cfg, tg.Run(cfg, 0, 0, 1, 1), model, few, "ngram").checks()}
    checks.pop("noise costs its entropy")  # which is a mean over many tokens
    assert len(checks) == 5 and all(checks.values()), checks


def test_the_driver_scores_each_chunk_once_before_anything_learns_it(tiny, model, text):
    network, recorder = expert(config(tiny), model, text, SEQ), Recorder()
    n = len(text.tokens)
    meter = tg.score_first([network, recorder], text, 64)
    bounds = [(lo, min(lo + 64, n)) for lo in range(1, n, 64)]
    assert recorder.calls == [(what, *span) for span in bounds for what in ("score", "update")]
    assert (meter.tokens, meter.bytes) == (n - 1, int(text.bytes.sum()))


def test_a_part_of_a_score_is_no_score(tiny, model, text):
    network, recorder = expert(config(tiny, EVAL_WALLCLOCK_SECONDS=1), model, text, SEQ), Recorder()
    with pytest.raises(tg.BrokenRun, match=r"EVAL_WALLCLOCK_SECONDS=1 passed after 65 of 300 tokens"):
        tg.score_first([network, recorder], text, 64, -math.inf)
    tg.score_first([network, recorder], text, 10**6, -math.inf)  # all is scored: the account tells


@pytest.mark.parametrize(
    "seconds, ended", [(0.11, None), (0.13, "will pass after 65 of 300"), (0.5, "passed after 65 of 300")]
)
def test_an_evaluation_that_clearly_will_miss_its_limit_ends(tiny, model, text, monkeypatch, seconds, ended):
    """300 tokens in 30 s: 0.1 s each is the limit, a fifth above it is the tolerance, and a tenth of the text must be done."""
    network, recorder, now = expert(config(tiny, EVAL_WALLCLOCK_SECONDS=30), model, text, SEQ), Recorder(), [0.0]
    network.done = len(text.tokens)
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    recorder.score = lambda _tokens, lo, hi: now.__setitem__(0, now[0] + seconds * (hi - lo)) or torch.zeros(hi - lo)
    if ended is None:
        tg.score_first([network, recorder], text, 64, 33.0)
    else:
        with pytest.raises(tg.BrokenRun, match=f"EVAL_WALLCLOCK_SECONDS=30 {ended}"):
            tg.score_first([network, recorder], text, 64, 30.0)
    now[0] = 20.0
    assert [tg.overtime(network.cfg, 0.0, 30.0, done, 300) for done in (29, 30)] == ["", "will pass"]


def test_the_projection_is_one_batch_times_the_text(tiny, model, text, monkeypatch):
    """Of windows by their number; of documents by their tokens, the slowest rank of each block. It runs on its own tokens."""
    cfg = config(tiny, TTT_RESET="document", TTT_CHUNK_SIZE=8, TTT_BLOCK_TOKENS=10**6, TTT_LORA_RANK=2)
    monkeypatch.setattr(tg.NetworkExpert, "timed", lambda _self, action: action() and 0 or 2.0)
    run = tg.Run(cfg, 0, 0, 1, 1)
    own = text._replace(tokens=torch.tensor([1, *[5] * SEQ] * 2))
    own = own._replace(bytes=torch.ones_like(own.tokens))
    assert expert(cfg, model, own, 8).expected_seconds(text) == pytest.approx(2.0 * len(text.tokens) / 8)
    # 33 targets, of which the last makes a fifth step: a step is a constant and 8 tokens, those of padding too
    found = tg.DocumentLoraNetwork(cfg, run, model, own, 8).expected_seconds(text)
    steps = [-(-d.targets // 8) for d in tg.documents_of(text.tokens)]
    assert found == pytest.approx(2.0 * sum(steps) / 5)
    network = tg.DocumentLoraNetwork(cfg, run, model, own, 8)
    network.rehearsed = lambda _: 2
    times = iter([20.0, 15.0])  # of two documents, of one: 10 s the steps, 5 s a document
    monkeypatch.setattr(tg.NetworkExpert, "timed", lambda _self, action: action() and 0 or next(times))
    assert len(steps) <= cfg.ttt_batch_size
    assert network.expected_seconds(text) == pytest.approx(10.0 * max(steps) / 5 + 5.0 * sum(steps) / 5)


def test_the_evaluation_is_projected_before_the_training_on_tokens_of_its_own(tiny, script, monkeypatch):
    seen, expected = [], tg.NetworkExpert.expected_seconds
    monkeypatch.setattr(
        tg.NetworkExpert,
        "expected_seconds",
        lambda self, text: seen.append((self.tokens, text.tokens)) or expected(self, text),
    )
    result = script(tiny, ITERATIONS=1, EVAL_WALLCLOCK_SECONDS=100)
    lines = [line for line in result.out.splitlines() if line.startswith(("evaluation projected", "training ends"))]
    assert result.status == 0
    assert re.match(r"evaluation projected: roundtrip \d+s, sliding \d+s of 100s$", lines[0])
    assert len(lines) == 2
    assert len(seen) == 2 and all(len(own) == 2 * (SEQ + 1) < len(text) for own, text in seen)
    broken = script(tiny, ITERATIONS=1, EVAL_WALLCLOCK_SECONDS=1e-6, RUN_ID="broken")
    assert "notice: EVAL_WALLCLOCK_SECONDS=1e-06 will break: the network's stages take" in broken.out
    base = {k: tiny[k] for k in ("DATA_PATH", "LOG_DIR", "DEVICE", "ATTENTION")}
    again = script(base, MODE="eval", RUN_ID="again", ARTIFACT=f"{tiny['LOG_DIR']}/tiny.pgz")
    assert again.out.count("evaluation projected") == 1
    assert "projected" not in script(tiny, ITERATIONS=1, EVAL_WALLCLOCK_SECONDS=0, RUN_ID="unlimited").out


def test_evaluation_leaves_the_model_in_training_as_it_was(tiny, model, text):
    cfg, before = config(tiny), {k: v.clone() for k, v in model.state_dict().items()}
    run = tg.Run(cfg, 0, 0, 1, 1)
    results = list(tg.evaluate(tg.Evaluation(cfg, run, model.train(), text), cfg.stages))
    assert [r.stage for r in results] == ["roundtrip", "sliding"] and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all((r.tokens, r.bytes) == (len(text.tokens) - 1, int(text.bytes.sum())) for r in results)
    assert results == [
        dataclasses.replace(r, seconds=s.seconds)
        for r, s in zip(tg.evaluate(tg.Evaluation(cfg, run, model, text), cfg.stages), results, strict=True)
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "auto"])
def test_a_gpu_scores_in_the_arithmetic_of_the_training_and_a_cpu_in_fp32(tiny, monkeypatch, device, dtype):
    """Whatever the CPU's model: its score must not depend on it."""
    asked = []
    monkeypatch.setattr(tg, "unpack", lambda *_: ({}, {}))
    monkeypatch.setattr(tg.GPT, "load_state_dict", lambda *_args, **_: None)
    monkeypatch.setattr(tg.GPT, "place", lambda _model, _device, _attend, words: asked.append(words))
    cfg = config(tiny, TRAIN_DTYPE=dtype)
    tg.load_model(cfg, SimpleNamespace(device=torch.device(device)), bytes(10**6))
    assert asked == [dtype if device == "cuda" else "fp32"]
