"""Exact n-gram statistics, mixing and the published scorers: each fast path against the law written plainly."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import Uniform
from torch import Tensor

import train_gpt as tg

VOCAB, BOS = 16, 1


pytestmark = pytest.mark.usefixtures("one_thread")


def make_text(n: int, seed: int = 0) -> Tensor:
    """A stream with structure: a random second-order source, copied passages, documents."""
    rng = np.random.default_rng(seed)
    follow = rng.integers(2, VOCAB, size=(VOCAB, VOCAB))
    x = [BOS, 2]
    while len(x) < n:
        if rng.random() < 0.02:
            x.append(BOS)
        elif rng.random() < 0.03 and len(x) > 40:
            start = rng.integers(0, len(x) - 30)
            x += x[start : start + 30]
        else:
            x.append(int(follow[x[-2], x[-1]] if rng.random() < 0.7 else rng.integers(2, VOCAB)))
    return torch.tensor(x[:n])


class Replay:
    """Statistics from a dictionary, one token at a time: slow and plain, what the fast code is tested against."""

    def __init__(self, order: int) -> None:
        self.order, self.history, self.followers = order, [], {}  # context -> positions of the tokens that followed it

    def counter(self, k: int) -> tuple[Counter[int], int]:
        """(token -> occurrences after the current context of k tokens, position of the latest one or -1)."""
        start = len(self.history) - k
        positions = self.followers.get(tuple(self.history[start:]), []) if start >= 0 else []
        return Counter(self.history[t] for t in positions), positions[-1] if positions else -1

    def add(self, token: int) -> None:
        """Learn the next token under every context length."""
        position = len(self.history)
        for k in range(min(self.order, position + 1)):
            self.followers.setdefault(tuple(self.history[position - k :]), []).append(position)
        self.history.append(token)


class ToyNetwork:
    """A base whose distribution depends on the previous token alone, with the features that a network offers."""

    def __init__(self, tokens: Tensor, vocab: int = VOCAB, seed: int = 3) -> None:
        z = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.logp = z.log_softmax(-1)
        self.set_features(tokens)

    def set_features(self, tokens: Tensor, hints: Tensor | None = None) -> None:
        rows = self.logp[tokens.roll(1)]
        self.entropy = -(rows.exp() * rows).sum(1)
        self.enrichment = 1.0 + tokens.roll(1).double()
        self.hint_prob = None if hints is None else rows.exp().gather(1, hints[:, None])[:, 0]

    def score(self, tokens: Tensor, lo: int, hi: int) -> Tensor:
        return self.logp[tokens[lo - 1 : hi - 1], tokens[lo:hi]]

    def dist(self, tokens: Tensor, t: int) -> Tensor:
        return self.logp[tokens[t - 1]].exp()

    def update(self, tokens: Tensor, lo: int, hi: int) -> None:
        """Nothing to learn."""


# ruff: noqa: ARG005
VALID = {
    "cascade": lambda table, base: tg.Cascade(table, base),
    "tilt": lambda table, base: tg.Tilt(table, base, 4, gamma=1.0),
    "normalized #740": lambda table, base: cache("pr740", base, normalize=True),
    "normalized #740, second form": lambda table, base: cache("pr740b", base, normalize=True),
    "normalized #187": lambda table, base: cache("pr187", base, normalize=True),
    "normalized #850": lambda table, base: cache("pr850", base, normalize=True),
}


def cache(name: str, base, normalize: bool, buckets: int = 64):
    return tg.HashedCache(name, base, len(base.logp), normalize=normalize, buckets=buckets, ranks=2)


def build(name: str, tokens: Tensor):
    table, base = tg.NgramTable(VOCAB, 6), ToyNetwork(tokens)
    if name == "tilt":
        table.load(tokens)
        base.set_features(tokens, tokens[table.span(tokens, 0, len(tokens)).last[3]])
    return VALID[name](table, base)


def walk(expert, tokens: Tensor, chunk: int = 128, at: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Log-probabilities of targets 1 .. N-1 under the driver's law, and whole distributions at some of them."""
    scores, dists = [torch.zeros(1, dtype=torch.float64)], {}
    for lo in range(1, len(tokens), chunk):
        hi = min(lo + chunk, len(tokens))
        scores.append(expert.score(tokens, lo, hi))
        dists.update({t: expert.dist(tokens, t) for t in at if lo <= t < hi})
        expert.update(tokens, lo, hi)
    return torch.cat(scores), dists


def replayed(tokens: Tensor, order: int) -> np.ndarray:
    """(4, order, N): total, count, kinds, last of every target, from dictionaries fed one token at a time."""
    replay = Replay(order)
    out = np.zeros((4, order, len(tokens)), dtype=np.int64)
    for t, x in enumerate(tokens.tolist()):
        for k in range(order):
            counter, last = replay.counter(k)
            out[:, k, t] = sum(counter.values()), counter[x], len(counter), last
        replay.add(x)
    return out


@pytest.mark.parametrize(("n", "vocab"), [(1, 2), (2, 2), (3, 2), (300, 1), (300, 2), (600, 7), (300, 400)])
def test_the_engine_equals_a_counter_fed_token_by_token(n, vocab):
    tokens = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n))
    if n == 600:
        tokens[400:500] = tokens[100:200]
    for name, column, truth in zip(
        ("count", "kinds", "last"), tg.ngram_stats(tokens, vocab, 9), replayed(tokens, 9)[1:], strict=True
    ):
        assert np.array_equal(column.numpy(), truth), name


def test_runs_of_groups_and_threads_do_not_change_the_statistics(monkeypatch):
    tokens = make_text(3000)
    whole = tg.ngram_stats(tokens, VOCAB, 6)
    cut = tg.split_between_groups
    torch.set_num_threads(3)
    monkeypatch.setattr(tg, "split_between_groups", lambda ngrams: cut(ngrams, 32))
    assert all(map(torch.equal, whole, tg.ngram_stats(tokens, VOCAB, 6)))


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_spans_join_to_the_replay(chunk):
    tokens = make_text(500)
    table, expected = tg.NgramTable(VOCAB, 6), replayed(tokens, 6)
    for lo in range(0, len(tokens), chunk):
        hi = min(lo + chunk, len(tokens))
        for column, truth in zip(table.span(tokens, lo, hi), expected, strict=True):
            assert np.array_equal(column.numpy(), truth[:, lo:hi])


def test_counts_of_every_candidate_equal_the_replay():
    tokens = make_text(300)
    table, replay = tg.NgramTable(VOCAB, 5), Replay(5)
    for t, x in enumerate(tokens.tolist()):
        if t % 17 == 1:
            stats = table.candidates(tokens, t)
            for k in range(5):
                counter, last = replay.counter(k)
                assert stats.count[k].tolist() == [counter[v] for v in range(VOCAB)]
                assert stats.total[k, 0] == sum(counter.values()) and stats.kinds[k, 0] == len(counter)
                assert stats.last[k, 0] == last
        replay.add(x)


@pytest.mark.parametrize("name", VALID)
def test_probabilities_sum_to_one_and_the_scored_one_is_among_them(name):
    tokens = make_text(700)
    at = (1, 2, 5, 128, 129, 300, 640, 699, *(int(t) + 1 for t in (tokens[:-1] == BOS).nonzero()[:3]))
    scores, dists = walk(build(name, tokens), tokens, at=at)
    for t, p in dists.items():
        assert p.min() >= 0 and p.sum().item() == pytest.approx(1, abs=1e-9), t
        assert p[tokens[t]].log().item() == pytest.approx(scores[t].item(), abs=1e-9), t


@pytest.mark.parametrize("name", ["cascade", "normalized #850"])
def test_uniform_noise_cannot_be_compressed(name):
    tokens = torch.randint(0, VOCAB, (6000,), generator=torch.Generator().manual_seed(1))
    table, base = tg.NgramTable(VOCAB, 6), Uniform(VOCAB, 6000)
    base.logp = torch.zeros(VOCAB)
    scores, _ = walk(VALID[name](table, base), tokens)
    assert -scores[1:].mean().item() / math.log(2) >= math.log2(VOCAB) - 0.01


def test_mixing_gains_on_text_that_repeats():
    tokens = make_text(4000)
    base = ToyNetwork(tokens).score(tokens, 1, 4000).mean()
    assert walk(build("cascade", tokens), tokens)[0][1:].mean() > base + 1.0


# ---- the published scorers


@pytest.mark.parametrize(
    ("name", "tokens", "buckets", "window", "batch", "bits", "last_quarter"),
    [
        ("pr740", 7_750_000 // 64, 2**16, 1024, 1, 8.83, 7.32),
        ("pr740b", 7_750_000 // 256, 2**14, 256, 1, 6.61, 4.46),  # 3.58 where each order learns every position,
        ("pr850", 62_000_000 // 1024, 2**12, 64, 1, 1.40, 0.31),
    ],
)
def test_published_scorers_code_noise_below_its_entropy(
    monkeypatch, name, tokens, buckets, window, batch, bits, last_quarter
):
    """Ten bits a token cannot be coded in fewer: what the published caches report at their own load is collisions."""
    monkeypatch.setitem(tg.PUBLISHED, name, tg.PUBLISHED[name]._replace(window=window, batch=batch))
    x = torch.randint(0, 1024, (tokens,), generator=torch.Generator().manual_seed(0))
    scorer = tg.HashedCache(name, Uniform(1024, tokens), 1024, normalize=False, buckets=buckets, ranks=1)
    scores, dists = walk(scorer, x, chunk=scorer.span, at=(tokens - 1,))
    cost = -scores[1:] / math.log(2)
    assert cost.mean().item() == pytest.approx(bits, rel=0.06)
    assert cost[3 * tokens // 4 :].mean().item() == pytest.approx(last_quarter, rel=0.12)
    assert dists[tokens - 1].sum() > 20


def test_orders_nine_to_eleven_of_187_are_one():
    context = torch.randint(0, 1024, (50, 10), generator=torch.Generator().manual_seed(2))
    h = [tg.PUBLISHED["pr187"].hash[0](context[:, -k:]) % 2**22 for k in (8, 9, 10)]
    assert torch.equal(h[0], h[1]) and torch.equal(h[0], h[2])


# ---- the audit


def tiny_audit(stage: str, tables: tg.Tables = tg.NO_TABLES, n: int = 1500, **knobs) -> dict[str, bool]:
    """name -> passed of the audit's checks, on a random two-block network and a text full of repeats."""
    env = {"RECIPE": "baseline", "DEVICE": "cpu", "COMPILE": 0, "VOCAB_SIZE": VOCAB, "NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 2,
           "NUM_KV_HEADS": 1, "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 128, "EVAL_STRIDE": 16, "BIGRAM_VOCAB_SIZE": 0,
           "NGRAM_SCORE": "exact,normalized", "NGRAM_ORDER": 6, "NGRAM_BUCKETS": 64, **knobs}  # fmt: skip
    cfg = tg.load_config({name: str(value) for name, value in env.items()}).cfg
    run = tg.Run(cfg, 0, 0, 1, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_sdpa).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tokens = make_text(n)
    text = tg.ValidationText(tokens, torch.ones(n, dtype=torch.int64), True)
    return {check.name: check.passed for check in tg.Audit(cfg, run, model, text, stage, tables).checks()}


@pytest.fixture
def small_claims(monkeypatch):
    """Published caches that update often enough to fill within a small text."""
    for name, spec in tg.PUBLISHED.items():
        monkeypatch.setitem(tg.PUBLISHED, name, spec._replace(window=64, batch=1))


def test_a_former_knob_is_accepted_at_the_value_that_is_left_of_it():
    assert tg.load_config({"RECIPE": "cpu", "NGRAM_MIX": "cascade"}).cfg == tg.load_config({"RECIPE": "cpu"}).cfg
    for other in ("chain", "cascade"):  # files of that time have another version
        with pytest.raises(
            tg.ConfigError, match="^the artifact's configuration: NGRAM_MIX is no knob .* script that wrote it$"
        ):
            tg.load_config({}, {"RECIPE": "cpu", "NGRAM_MIX": other})


@pytest.mark.usefixtures("small_claims")
@pytest.mark.parametrize("name", tg.PUBLISHED)
def test_the_audit_rejects_every_claim(name):
    checks = tiny_audit("claimed", NGRAM_CLAIM=name)
    assert not checks["a distribution"]
    assert checks["every target once"]


def test_the_audit_notices_a_wrong_count():
    tokens = make_text(500)
    table = tg.NgramTable(VOCAB, 4)
    text = tg.ValidationText(tokens, torch.ones(500, dtype=torch.int64), True)
    assert tg.replay_check(text, table).passed
    table.columns[0][2, 300] += 1
    table.latest_span = (0, 0, None)
    assert not tg.replay_check(text, table).passed
