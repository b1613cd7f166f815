"""Section 9's experts against their definitions, one target at a time in plain Python: dictionaries, loops and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SEQ, config
from fake_cuda import FakeCuda
from test_ngram import VOCAB, Replay, ToyNetwork, make_text
from test_table import packed_table

import train_gpt as tg

ORDER = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def under_the_driver(scorer, tokens, span: int) -> list[float]:
    """Scores of targets 1 .. N-1, learned in spans."""
    edge = lambda lo: min(lo + span, len(tokens))  # noqa: E731
    spans = tg.score_then_learn(tokens, len(tokens), edge, [scorer])
    return torch.cat([scores for *_, scores in spans]).tolist()


# ---- learned weights


@pytest.mark.parametrize(("sizes", "rate", "caution"), [([5, 3], 0.8, 3.0), ([4], 0.02, 0.5), ([2, 3, 6], 1.7, 0.1)])
def test_weights_are_a_softmax_and_learn_by_the_gradient_over_all_squares_so_far(sizes, rate, caution):
    rng, prior = np.random.default_rng(0), [0.05, 0.15, 0.8, 0.02]
    ours = tg.LearnedWeights(prior, sizes, rate, "cpu")
    ours.CAUTION = caution
    tables, squares = ([np.zeros((4, size)) for size in sizes] for _ in range(2))
    for n in (7, 1, 20):
        buckets = [rng.integers(0, size, n) for size in sizes]
        z = np.log(prior)[:, None] + sum(table[:, b] for table, b in zip(tables, buckets, strict=True))
        expected = np.exp(z) / np.exp(z).sum(0)
        weights = ours.weights([torch.from_numpy(b) for b in buckets])
        assert np.allclose(weights, expected, atol=1e-14)
        posterior = rng.dirichlet(np.array([0.2, 1, 3, 0.5]), n).T
        ours.learn([torch.from_numpy(b) for b in buckets], weights, torch.from_numpy(posterior))
        for table, square, bucket in zip(tables, squares, buckets, strict=True):
            step = np.zeros_like(table)
            for i, b in enumerate(bucket):
                step[:, b] += posterior[:, i] - expected[:, i]
                square[:, b] += (posterior[:, i] - expected[:, i]) ** 2
            table += rate * step / (square + caution)
    assert all(np.allclose(a, b, atol=1e-13) for a, b in zip(ours.tables, tables, strict=True))


def test_learning_waits_for_nothing_on_a_gpu():
    with FakeCuda() as gpu:
        mixing = tg.LearnedWeights([0.3, 0.7], [5, 4], 0.8, "cuda")
        buckets = [torch.randint(n, (9,)).to("cuda") for n in (5, 4)]
        weights, posterior = mixing.weights(buckets), torch.rand(2, 9, dtype=torch.float64).to("cuda")
        gpu.syncs.clear()
        mixing.learn(buckets, weights, posterior)
        assert not gpu.syncs


def cascade_by_hand(tokens, span: int, rate: float, counts) -> list[float]:
    """The cascade of its docstring. `counts(t, k)` gives C, c by token, the token of part 4 and the bucket of its age."""
    base, x, scores = ToyNetwork(tokens), tokens.tolist(), []
    tables, squares = ([{} for _ in range(3)] for _ in range(2))
    for lo in range(1, len(x), span):
        seen = []
        for t in range(lo, min(lo + span, len(x))):
            p = math.exp(base.logp[x[t - 1], x[t]])
            for k in range(1, ORDER):
                C, c, guess, age = counts(t, k)
                if not C:
                    continue
                U, count = sum(n > 0 for n in c.values()), c.get(x[t], 0)
                sure = min(max(int(3 * float(base.entropy[t])), 0), 23)
                keys = [(k, min(int(math.log2(C)), 15), min(int(math.log2(U)), 7)), (k, age), (k, sure)]
                zero = np.zeros(4)
                z = np.log([0.05, 0.15, 0.8, 0.02]) + sum(
                    table.get(key, zero) for table, key in zip(tables, keys, strict=True)
                )
                w = np.exp(z) / np.exp(z).sum()
                parts = np.array([count / C, (max(count - 1, 0) + U * p) / C, p, float(guess == x[t])])
                seen.append((keys, w, w * parts / (w * parts).sum()))
                p = float((w * parts).sum())
            scores.append(math.log(p))
        for feature in range(3):
            for key in {keys[feature] for keys, *_ in seen}:
                moves = [q - w for keys, w, q in seen if keys[feature] == key]
                squares[feature][key] = squares[feature].get(key, np.zeros(4)) + sum(m**2 for m in moves)
                step = rate * sum(moves) / (squares[feature][key] + 3.0)
                tables[feature][key] = tables[feature].get(key, np.zeros(4)) + step
    return scores


@pytest.mark.parametrize(("span", "rate"), [(64, 0.8), (17, 0.3)])
def test_the_cascade_is_its_definition_over_counters_fed_token_by_token(span, rate):
    tokens, replay, known = make_text(500), Replay(ORDER), {}
    for t, x in enumerate(tokens.tolist()):
        for k in range(1, ORDER):
            c, last = replay.counter(k)
            age = min(int(math.log2(t - last)) // 2, 9) if c else 0
            known[t, k] = sum(c.values()), c, int(tokens[last]), age
        replay.add(x)
    mine = under_the_driver(tg.Cascade(tg.NgramTable(VOCAB, ORDER), ToyNetwork(tokens), rate), tokens, span)
    assert mine == pytest.approx(cascade_by_hand(tokens, span, rate, lambda t, k: known[t, k]), abs=1e-10)


def test_weights_are_kept_apart_by_length_counts_age_and_certainty():
    """Over all counts there can be, one bucket a length, an octave and a third of a nat."""
    cascade = tg.Cascade(tg.NgramTable(VOCAB, ORDER), None)
    total = torch.tensor([1, 2, 3, 4, 127, 128, 2**14 - 1, 2**14, 2**15 - 1, 2**15, 2**16, 2**24 + 1, 2**30])
    kinds, entropy = total.flip(0), torch.linspace(0, 11, len(total)).double()
    for level in range(ORDER - 1):
        for trust in (0, 9):
            seen, age, sure = cascade.buckets(
                torch.full_like(total, level), total, kinds, torch.full_like(total, trust), entropy
            )
            octave = lambda n, most: min(n.bit_length() - 1, most)  # noqa: E731
            pairs = zip(total.tolist(), kinds.tolist(), strict=True)
            assert seen.tolist() == [128 * level + 8 * octave(c, 15) + octave(u, 7) for c, u in pairs]
            assert set(age.tolist()) == {10 * level + trust}
            assert sure.tolist() == [24 * level + min(int(3 * h), 23) for h in entropy.tolist()]
    for table, size in zip(cascade.mixing.tables, (128, 10, 24), strict=True):
        assert table.shape == (4, size * (ORDER - 1))


def test_each_expert_corrects_the_one_before_it(tiny):
    cfg = config(tiny, NGRAM_TILT_ENABLED=1, NGRAM_TILT_ORDER=7, NGRAM_TILT_BETA=1.5, NGRAM_TILT_THRESHOLD=0.7, NGRAM_TILT_GAMMA=0.5,
                 NGRAM_RATE=0.6, NGRAM_TABLE="exact")  # fmt: skip
    tables, packed, network = [tg.NgramTable(VOCAB, order) for order in (4, 7)], packed_table(), object()
    kinds = {"sliding": (), "ttt": (), "tilt": (tg.Tilt,), "table": (tg.Tilt, tg.PackedCascade),
             "ngram": (tg.Tilt, tg.PackedCascade, tg.Cascade)}  # fmt: skip
    for stage, expected in kinds.items():
        first, *experts = tg.expert_chain(cfg, stage, network, tables, packed)
        assert first is network and tuple(map(type, experts)) == expected
        assert [expert.base for expert in experts] == [network, *experts][: len(experts)]
        for expert in experts:
            assert expert.table is {tg.Tilt: tables[1], tg.PackedCascade: packed, tg.Cascade: tables[0]}[type(expert)]
            if isinstance(expert, tg.Tilt):
                assert (expert.k, expert.beta, expert.threshold, expert.gamma) == (6, 1.5, 0.7, 0.5)
            else:
                assert expert.mixing.rate == 0.6
    assert [type(e) for e in tg.expert_chain(config(tiny), "ngram", network, tables, None)[1:]] == [tg.Cascade]


def test_the_packed_cascade_is_the_same_over_the_artifacts_counts():
    tokens, table = make_text(400), packed_table()
    spelled, before = {}, [()]
    for keys, tokens_k, counts in zip(table.keys, table.tokens, table.counts, strict=True):
        names = [(*before[key // VOCAB], t) for key, t in zip(keys[:-1].tolist(), tokens_k.tolist(), strict=True)]
        for gram, count in zip(names, counts.tolist(), strict=False):
            spelled.setdefault(gram[:-1], {})[gram[-1]] = count
        before = names

    def counts(t, k):
        c = spelled.get(tuple(tokens[t - k : t].tolist()), {}) if t >= k else {}
        return sum(c.values()), c, int(table.span(tokens, t, t + 1).last[k, 0]) if c else 0, 0

    assert table.order == ORDER
    mine = under_the_driver(tg.PackedCascade(table, ToyNetwork(tokens), 0.5), tokens, 50)
    assert mine == pytest.approx(cascade_by_hand(tokens, 50, 0.5, counts), abs=1e-10)


def test_a_span_of_the_packed_table_is_a_part_of_the_whole_wherever_it_begins():
    tokens, table = make_text(90, seed=4), packed_table()
    whole = table.span(tokens, 1, 90)
    assert (whole.total[1:] > 0).any(1).all(), "every length is met"
    for lo in range(1, 90):
        for hi in {lo + 1, min(lo + 7, 90), 90}:
            for name, part, column in zip(whole._fields, table.span(tokens, lo, hi), whole, strict=True):
                assert torch.equal(part, column[:, lo - 1 : hi - 1]), (name, lo, hi)


# ---- the tilt


@pytest.mark.parametrize(("order", "beta", "threshold", "gamma"), [
    (3, 2.625, 0.8, 0.0), (2, 1.0, 0.31, 1.0), (4, 0.7, 0.5, 0.5), (3, 0.1, 0.0, 2.0)])  # fmt: skip
def test_the_tilt_is_its_formula(order, beta, threshold, gamma):
    tokens, span, expected = make_text(500), 60, []
    x, base, replay, hints = tokens.tolist(), ToyNetwork(tokens), Replay(order), []
    for token in x:
        c, last = replay.counter(order - 1)
        fires = bool(c) and c[x[last]] >= threshold * sum(c.values())
        hints.append((x[last], fires))
        replay.add(token)
    tilt = tg.Tilt(tg.NgramTable(VOCAB, order), base, order, beta, threshold, gamma)
    tilt.table.load(tokens)
    base.set_features(tokens, tokens[tilt.table.columns[2][order - 1]])
    for t in range(1, 500):
        (hint, fires), p = hints[t], base.logp[x[t - 1]].exp()
        q = float(p[hint])
        s = beta * (1 - q) ** gamma if fires else 0.0
        expected.append(math.log(float(p[x[t]]) * math.exp(s * (hint == x[t])) / (1 + q * (math.exp(s) - 1))))
    assert sum(fires for _, fires in hints) > 20
    assert under_the_driver(tilt, tokens, span) == pytest.approx(expected, abs=1e-9)


# ---- the published scorers


def published_hash(name: str, context: list[int], token: int | None = None) -> int:
    """Of a context, or with the token that follows it, in plain integers."""
    if name == "pr187":
        h = 0
        for c in context:
            h = h * 265443576 + c
        return h if token is None else h * 1000003 + token
    primes = tg.MULTIPLIERS_850 if name == "pr850" else tg.MULTIPLIERS_740
    h = 0
    for prime, c in zip(primes, context, strict=False):
        h ^= prime * c
    return h if token is None else h ^ (token * primes[len(context) % len(primes)])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("name", "ranks", "least"), [("pr740", 2, 2), ("pr740b", 3, 1), ("pr187", 2, 2), ("pr850", 4, 3)]
)
def test_a_published_cache_is_its_loop_over_dictionaries(monkeypatch, name, ranks, least, normalize):
    spec = tg.PUBLISHED[name]._replace(window=8, batch=2)
    monkeypatch.setitem(tg.PUBLISHED, name, spec)
    n, buckets = 403, 64
    tokens, base, ranks = make_text(n, seed=1), ToyNetwork(make_text(n, seed=1)), ranks if not normalize else 1
    ranks = 1 if spec.layout == "shared" else ranks
    x, scores, contexts, pairs, largest = tokens.tolist(), [], {}, {}, 0.0
    windows = (n - 2) // 8 + 1

    def rank(t):
        window = (t - 1) // 8
        return window % ranks if spec.layout == "windows" else window * ranks // windows

    def cells(t, order, token):
        context = x[t - order + 1 : t]
        return (rank(t), order, published_hash(name, context) % buckets), (
            rank(t),
            order,
            published_hash(name, context, token) % buckets,
        )

    span = 16 * (ranks if spec.layout == "windows" else 1)
    for lo in range(1, n, span):
        span_t = range(lo, min(lo + span, n))
        mixed_by = {}
        for t in span_t:
            p, step = math.exp(base.logp[x[t - 1], x[t]]), float(base.enrichment[t])
            if normalize:
                confidence = min(step / largest, 1.0) if largest else 0.5
            else:
                confidence = step / max(float(base.enrichment[s]) for s in span_t if rank(s) == rank(t))
            for order in spec.orders:
                if t < order - 1 or (C := contexts.get(cells(t, order, 0)[0], 0)) < least:
                    continue
                ratio = lambda v, C=C, t=t, order=order: min(pairs.get(cells(t, order, v)[1], 0), C) / C  # noqa: E731
                H = torch.tensor([float(base.entropy[t])], dtype=torch.float64)
                alpha = float(spec.alpha(H, torch.tensor([order]), torch.tensor([confidence], dtype=torch.float64)))
                mass = sum(map(ratio, range(VOCAB))) if normalize else 1.0
                p, mixed_by[t] = p if not mass else (1 - alpha) * p + alpha * ratio(x[t]) / mass, order
                break
            scores.append(math.log(p))
        for t in span_t:
            largest = max(largest, float(base.enrichment[t]))
            for order in (o for o in spec.orders if t >= o - 1 and not (spec.backs_off and o < mixed_by.get(t, 0))):
                for table, cell in zip((contexts, pairs), cells(t, order, x[t]), strict=True):
                    table[cell] = table.get(cell, 0) + 1
    cache = tg.HashedCache(name, base, VOCAB, normalize=normalize, buckets=buckets, ranks=ranks, least=least)
    assert cache.span == span and len({round(s, 6) for s in scores}) > 100
    assert under_the_driver(cache, tokens, span) == pytest.approx(scores, abs=1e-6)


def test_alphas_follow_their_formulas_over_all_entropies_and_orders():
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    for H in (0.0, 1.7, 3.1, 4.4, 9.0):
        for order in range(2, 13):
            row, confidence = min(order, 9), 0.1 + 0.07 * order
            centre, factor = (3.0, 3.0, 4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.75, 2.5)[row], (0.3,) * 4 + (1.0,) + (2.0,) * 5
            args = torch.tensor([H], dtype=torch.float64), torch.tensor([order]), torch.tensor([confidence])
            expected = {
                tg.alpha_fixed(0.2): 0.2,
                tg.alpha_pr740: 0.05 + 0.55 * sigmoid(2 * (H - 4)),
                tg.alpha_pr187: (0.05 + 0.55 * sigmoid(3 * (H - 3.5))) * (0.5 + confidence),
                tg.alpha_pr850: min((0.12 + 0.48 * sigmoid(2 * (H - centre))) * factor[row], 0.95),
            }
            assert [float(alpha(*args)) for alpha in expected] == pytest.approx([*expected.values()], abs=1e-6)


# ---- the network's scores


def test_scores_entropies_and_hints_are_those_of_the_softmax_of_the_last_targets():
    z, g = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0)) * 4, torch.Generator().manual_seed(1)
    targets, hints = torch.randint(11, (2, 3, 9), generator=g)

    class Model:
        features = staticmethod(lambda inputs, _: inputs[..., None])
        logits = staticmethod(lambda features, _: z[:, -features.shape[1] :])

    for n, temperature in ((7, 1.0), (4, 0.7), (1, 2.5)):
        ids = torch.cat([torch.zeros(3, 1, dtype=torch.int64), targets], 1)
        logp, entropy, hint = tg.score_windows(Model, ids, hints, n, tg.Ctx(), temperature)
        p = (z[:, -n:].double() / temperature).softmax(-1)
        for mine, theirs in (
            (logp, p.gather(-1, targets[:, -n:, None])[..., 0].log()),
            (entropy, -(p * p.log()).sum(-1)),
            (hint, p.gather(-1, hints[:, -n:, None])[..., 0]),
        ):
            assert torch.allclose(mine.double(), theirs, atol=1e-4)


# ---- where a table comes from


@pytest.mark.parametrize(("rows", "passes", "most"), [(4, 0, 2**23), (4, 0, 200), (64, 1, 2000)])
def test_the_packed_table_counts_the_start_of_the_training_text(tiny, data, script, tmp_path, rows, passes, most):
    """Three steps into the stream, more than there is and fewer than those steps read, and after a whole pass over it."""
    steps = passes * len(data.train) // (rows * SEQ) + 3
    env = {**tiny, "NGRAM_TABLE": "exact", "NGRAM_TABLE_TOKENS": str(most), "ITERATIONS": str(steps), "CODE_FORM": "source",
           "TRAIN_BATCH_TOKENS": str(rows * SEQ), "EVAL_STAGES": "roundtrip", "VAL_TOKENS": "100"}  # fmt: skip
    assert script(env).status == 0
    cfg, counted = config(env), data.train[:most].astype(np.int64)
    expected = tg.build_trie(counted, cfg.vocab_size, cfg.ngram_table_order, cfg.ngram_table_bytes)
    assert tg.read_header((tmp_path / "logs" / "tiny.pgz").read_bytes()).sections["exact"] == expected
