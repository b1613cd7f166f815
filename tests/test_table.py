"""n-grams of the training text: counted while training, pruned and packed, and what the evaluator makes of them."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEQ, Uniform, config, events, run_ranks, score_of
from test_ngram import VOCAB as SMALL
from test_ngram import ToyNetwork, make_text, tiny_audit, walk

import train_gpt as tg
from tools.artifact import LaneTable

# ---- #1095's hashed counts


def hashed(gram: tuple[int, ...]) -> int:
    """The published hash in plain integers."""
    h = 0
    for multiplier, token in zip(tg.HASHED_MULTIPLIERS, gram, strict=False):
        h = (h * multiplier + token) % 2**32
    return h


def test_hashed_counts_are_those_of_every_ngram_within_a_row(run):
    rows = torch.randint(0, 1024, (3, 20), generator=torch.Generator().manual_seed(0))
    counts = tg.HashedNgrams(run)
    counts.update(rows[:, :-1], rows[:, 1:])
    counts.update(rows[:, :-1], rows[:, 1:])
    for n, cells in counts.total().items():
        assert cells.dtype == np.uint16 and len(cells) == tg.HASHED_SIZES[n] and cells.sum() == 2 * 3 * (20 - n + 1)
        expected = Counter(hashed(tuple(r[i : i + n])) % len(cells) for r in rows.tolist() for i in range(21 - n))
        assert {int(c): int(cells[c]) for c in cells.nonzero()[0]} == {c: 2 * x for c, x in expected.items()}


def test_hashed_counts_saturate_and_go_on_from_a_checkpoint(run):
    counts, later = tg.HashedNgrams(run), tg.HashedNgrams(run)
    counts.cells[2][7] = 70_000
    later.load_state_dict(counts.state_dict())
    assert later.total()[2][7] == 65_535 and later.cells[2][7] == 70_000
    packed = tg.pack_hashed(later.total(), 1)
    assert all(
        np.array_equal(a, b) for a, b in zip(tg.unpack_hashed(packed).values(), later.total().values(), strict=True)
    )
    for damaged in (packed[:-3], packed + b"x", bytes(20)):
        with pytest.raises(tg.ArtifactError):
            tg.unpack_hashed(damaged)


def test_noise_costs_a_quarter_bit_as_published_and_ten_bits_once_normalised():
    """Cells of i.i.d. uniform training text at the published load: 9,888 n-grams each, so the claim is occupancy alone."""
    rng, n = np.random.default_rng(0), 4097
    cells = {order: rng.poisson(9888, size).astype(np.uint16) for order, size in tg.HASHED_SIZES.items()}
    x, base = torch.from_numpy(rng.integers(0, 1024, n)), Uniform(1024, n)
    claim = tg.HashedTable(cells, base, 1024, 2048, normalize=False)
    bits = -claim.score(x, 1, n) / math.log(2)
    assert bits.mean().item() == pytest.approx(0.262, abs=0.003)
    assert claim.dist(x, 3000).sum().item() == pytest.approx(854, abs=2)
    honest = tg.HashedTable(cells, base, 1024, 2048, normalize=True)
    scores = honest.score(x, 1, n)
    assert -scores.mean().item() / math.log(2) >= 10
    for t in (1, 2, 7, 2048, 2049, 2050, 4000):
        p = honest.dist(x, t)
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
        assert p[x[t]].log().item() == pytest.approx(scores[t - 1].item())


def test_contexts_of_the_claim_start_anew_in_each_sequence():
    cells = {n: np.full(size, 9, np.uint16) for n, size in tg.HASHED_SIZES.items()}
    cells[2][:] = 0
    x, base = torch.randint(0, 1024, (40,)), Uniform(1024, 40)
    mixed = tg.HashedTable(cells, base, 1024, 8, normalize=False).score(x, 1, 40) > -math.log(1024) + 1e-9
    # in a sequence of 8 targets the first has one token before it, for which order 2 is asked and found empty
    assert mixed.tolist() == [(t - 1) % 8 >= 1 for t in range(1, 40)]


# ---- exact n-grams: counted, pruned, packed


def text_of(n: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Skewed tokens with passages that repeat."""
    rng = np.random.default_rng(seed)
    x = (rng.zipf(1.3, n) % vocab).astype(np.int64)
    for _ in range(n // 60):
        a, b = rng.integers(0, max(n - 20, 1), 2)
        x[b : b + 20] = x[a : a + 20]
    return x


def spelled(levels: list[tg.TrieLevel]) -> list[list[tuple[int, ...]]]:
    """The grams of each level in full."""
    result, before = [], [()]
    for level in levels:
        before = [(*before[p], t) for p, t in zip(level.parent.tolist(), level.token.tolist(), strict=True)]
        result.append(before)
    return result


@pytest.mark.parametrize(("n", "vocab", "order"), [(400, 5, 6), (3000, 60, 4), (2, 3, 3)])
def test_counted_grams_are_all_that_repeat(n, vocab, order):
    x = text_of(n, vocab)
    grams = list(tg.count_grams(x, vocab, order))
    spell = spelled([level for level, _ in grams])
    for k, ((level, counts), names) in enumerate(zip(grams, spell, strict=True), 1):
        every = Counter(tuple(x[i : i + k].tolist()) for i in range(n - k + 1))
        assert dict(zip(names, counts.tolist(), strict=True)) == {g: c for g, c in every.items() if c >= min(k, 2)}
        assert [g[1:] for g in names] == [([()] if k == 1 else spell[k - 2])[row] for row in level.suffix]
        assert level.size.tolist() == [round(2 * math.log2(c)) for c in counts.tolist()]


def test_a_small_section_cannot_ask_for_many_levels():
    coder = tg.StreamCoder()
    coder.numbers(np.zeros(1, int), np.array([10**6]))
    with pytest.raises(tg.ArtifactError, match="n-grams of up to 1000000 tokens, 8 at most"):
        tg.unpack_trie(coder.finish(), 50)


def test_grouping_equals_unique_for_narrow_and_wide_keys():
    for top in (50, 2**60):
        keys = np.random.default_rng(top % 97).integers(0, top, 300)
        keys[100:150] = keys[:50]
        for mine, theirs in zip(
            tg.group_equal(keys), np.unique(keys, return_inverse=True, return_counts=True), strict=True
        ):
            assert np.array_equal(mine, theirs)


def test_gains_are_bits_saved_over_the_suffix():
    x, order = text_of(2000, 12), 3
    grams = list(tg.count_grams(x, 12, order))
    spell, gains = spelled([level for level, _ in grams]), tg.gram_gains(grams)
    count = [dict(zip(names, c.tolist(), strict=True)) for names, (_, c) in zip(spell, grams, strict=True)]
    kept_after = lambda g: sum(c for h, c in count[len(g)].items() if h[:-1] == g)  # noqa: E731
    for k in (1, 2):
        for g, gain in itertools.islice(zip(spell[k], gains[k], strict=True), 0, None, 7):
            rest, q = count[k][g] - 0.8, count[k - 1][g[1:]] / kept_after(g[1:-1])
            assert gain == pytest.approx(rest * math.log2(rest / kept_after(g[:-1]) / q))


@pytest.mark.parametrize(
    ("n", "vocab", "order", "least"), [(5000, 30, 5, 4), (20_000, 300, 4, 3), (800, 4, 7, 0.1), (60, 3, 2, 1e9)]
)
def test_a_pruned_trie_is_closed_and_comes_back_from_its_bytes(n, vocab, order, least):
    grams = list(tg.count_grams(text_of(n, vocab), vocab, order))
    gains = tg.gram_gains(grams)
    levels = tg.prune_grams(grams, gains, least)
    spell = spelled(levels)
    for k in range(1, order):
        assert all(g[:-1] in set(spell[k - 1]) and g[1:] in set(spell[k - 1]) for g in spell[k])
        useful = {
            g for g, gain in zip(spelled([level for level, _ in grams])[k], gains[k], strict=True) if gain >= least
        }
        assert useful <= set(spell[k])
    back = tg.unpack_trie(tg.pack_trie(levels, vocab), vocab)
    assert len(back) == order
    for mine, theirs in zip(back, levels, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_numbers_split_and_join():
    x = np.array([*range(200), 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**20, 2**22 + 12345, 2**24 - 1])
    symbol, width, rest = tg.split_ints(x)
    least, again = tg.join_symbols(symbol)
    assert np.array_equal(least + rest, x) and np.array_equal(width, again) and symbol.max() <= tg.MAX_SYMBOL
    assert (np.diff(symbol) >= 0).all()
    coder, context = tg.StreamCoder(), np.arange(len(x)) % 3
    coder.fields(edges := [2**30 - 1, -(2**30), 65_536, 32_768, 32_767, 0, -1], len(edges), -(2**31), 2**31)
    coder.numbers(context, x)
    reader = tg.StreamCoder(coder.finish())
    assert reader.fields(None, len(edges), -(2**31), 2**31).tolist() == edges
    assert np.array_equal(reader.numbers(context), x)
    reader.finish()
    for low, high in ((-(2**30) + 1, 2**30), (-(2**30), 2**30 - 2)):
        with pytest.raises(tg.ArtifactError, match="impossible fields"):
            tg.StreamCoder(coder.finish()).fields(None, len(edges), low, high)


def test_a_table_fills_its_bytes_with_ever_more_grams_and_never_more_than_them():
    x, before = text_of(60_000, 200), 0
    everything = tg.build_trie(x, 200, 4, 2**28)
    for limit in (3000, 9000, 20_000):
        packed = tg.build_trie(x, 200, 4, limit)
        grams = sum(len(level.token) for level in tg.unpack_trie(packed, 200))
        assert len(packed) <= limit and (len(packed) > 0.9 * limit or len(packed) == len(everything)) and grams > before
        before = grams


def test_damaged_tables_are_refused_with_one_error():
    packed, rng = tg.build_trie(text_of(6000, 50), 50, 4, 2**28), random.Random(0)
    refused = 0
    for _ in range(1500):
        blob = bytearray(packed)
        for _ in range(rng.randint(1, 3)):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        blob = blob[: rng.randrange(len(blob))] if rng.random() < 0.2 else blob
        try:
            levels = tg.unpack_trie(bytes(blob), 50)
        except tg.ArtifactError:
            refused += 1
        else:  # the container's checksum is what notices other grams; they must still be grams
            assert all((level.token < 50).all() and (level.size >= 0).all() for level in levels)
    assert refused > 500


# ---- the expert


def packed_table(seed: int = 0) -> tg.PackedTable:
    x = make_text(7500)[1500:].numpy()  # the source of make_text(1500), another stretch
    return tg.PackedTable(tg.unpack_trie(tg.build_trie(x, SMALL, 4, 2**28 if seed == 0 else 900), SMALL), SMALL)


@pytest.mark.parametrize("seed", [0, 1])
def test_statistics_are_those_of_the_kept_grams(seed):
    table = packed_table(seed)
    kept: dict[tuple[int, ...], dict[int, int]] = {}
    before = [()]
    for keys, tokens, counts in zip(table.keys, table.tokens, table.counts, strict=True):
        names = [(*before[key // SMALL], t) for key, t in zip(keys[:-1].tolist(), tokens.tolist(), strict=True)]
        for g, c in zip(names, counts.tolist(), strict=False):
            kept.setdefault(g[:-1], {})[g[-1]] = c
        before = names
    assert kept
    x = make_text(700)
    stats = table.span(x, 1, 700)
    for t in range(1, 700):
        for k in range(table.order):
            followers = kept.get(tuple(x[t - k : t].tolist()), {}) if k <= t else {}
            expected = (sum(followers.values()), followers.get(int(x[t]), 0), len(followers))
            assert tuple(int(column[k, t - 1]) for column in stats[:3]) == expected, (t, k)
            if followers:
                assert followers[int(stats.last[k, t - 1])] == max(followers.values())
    for t in (1, 2, 3, 50, 699):
        whole = table.candidates(x, t)
        for column, values in zip(whole, stats, strict=True):
            assert torch.equal(column[:, int(x[t])], values[:, t - 1])
        followers = LaneTable.followers(table, table.contexts(x, t))
        assert set(followers.tolist()) == set(whole.count[1].nonzero()[:, 0].tolist())
    assert torch.equal(table.span(x, 300, 310).count, stats.count[:, 299:309])


def chain(tokens: torch.Tensor) -> tg.NgramExpert:
    """The evaluator's: network, packed n-grams, exact n-grams of the text itself."""
    packed = tg.PackedCascade(packed_table(), ToyNetwork(tokens))
    return tg.Cascade(tg.NgramTable(SMALL, 6), packed)


class Whole:
    """An expert over another, updated together as the driver does."""

    def __init__(self, expert: tg.NgramExpert) -> None:
        self.score, self.dist, self.expert = expert.score, expert.dist, expert

    def update(self, tokens, lo, hi):
        self.expert.base.update(tokens, lo, hi)
        self.expert.update(tokens, lo, hi)


def test_stacked_experts_are_one_causal_distribution():
    tokens = make_text(1500)
    at = (1, 2, 3, 200, 777, 1499)
    scores, dists = walk(Whole(chain(tokens)), tokens, at=at)
    for t, p in dists.items():
        assert p.sum().item() == pytest.approx(1, abs=1e-9) and (p >= 0).all()
        assert p[tokens[t]].log().item() == pytest.approx(scores[t].item(), abs=1e-9)
    other = torch.cat([tokens[:777], torch.randint(2, SMALL, (723,), generator=torch.Generator().manual_seed(5))])
    again, theirs = walk(Whole(chain(other)), other, at=(777,))
    for one, two in ((again[:777], scores[:777]), (theirs[777], dists[777])):  # other shapes round in another way
        assert torch.allclose(one, two, rtol=0, atol=1e-12)
    alone = walk(tg.Cascade(tg.NgramTable(SMALL, 6), ToyNetwork(tokens)), tokens)[0]
    assert scores[1:600].mean() > alone[1:600].mean() + 0.05, "text of the same source is known from the first token on"


def tables() -> tg.Tables:
    rng = np.random.default_rng(1)
    x = make_text(7500)[1500:].numpy()  # the source of make_text(1500), another stretch
    cells = {n: rng.poisson(9888, size).astype(np.uint16) for n, size in tg.HASHED_SIZES.items()}
    return tg.Tables(cells, tg.unpack_trie(tg.build_trie(x, SMALL, 4, 2**28), SMALL))


def test_the_audit_rejects_the_claim():
    checks = tiny_audit("claimed", tables=tables(), NGRAM_TABLE="pr1095", NGRAM_CLAIM="pr1095")
    assert not checks["a distribution"] and not checks["noise costs its entropy"] and checks["every target once"]


# ---- whole runs


def test_a_run_carries_its_tables_and_scores_with_them_alone(tiny, script, monkeypatch):
    monkeypatch.setattr(tg, "HASHED_SIZES", {n: size >> 8 for n, size in tg.HASHED_SIZES.items()})
    env = {
        **tiny,
        "NGRAM_TABLE": "pr1095,exact",
        "NGRAM_SCORE": "exact,claimed",
        "NGRAM_CLAIM": "pr1095",
        "LZMA_PRESET": "1",
    }
    result = script(env)
    assert result.status == 0, result.err
    assert [e["stage"] for e in events(env, "stage")] == ["roundtrip", "sliding", "table", "ngram"]
    claim, pack = events(env, "claim")[0], events(env, "pack")[0]
    assert claim["name"] == "pr1095"
    assert pack["roles"]["ngram"]["bytes"] > 1000
    assert pack["roles"]["ngram"]["params"] == 0
    blob = Path(pack["artifact"]).read_bytes()
    assert sum(role["bytes"] for role in pack["roles"].values()) == len(blob)
    rows = 6 * 4 * sum(SEQ + 1 - n + 1 for n in tg.HASHED_SIZES)
    assert sum(int(c.sum()) for c in tg.unpack_hashed(tg.read_header(blob).sections["pr1095"]).values()) == rows
    # a fresh evaluation has the same numbers; without its tables it has fewer stages, and it cannot have what it lacks
    base = {k: env[k] for k in ("DATA_PATH", "DEVICE", "ATTENTION", "LOG_DIR")}
    again = {**base, "RUN_ID": "again"}
    assert script(again, MODE="eval", ARTIFACT=pack["artifact"]).status == 0 and score_of(again) == score_of(env)
    bare = {**base, "RUN_ID": "bare"}
    assert script(bare, MODE="eval", ARTIFACT=pack["artifact"], NGRAM_TABLE="none", NGRAM_SCORE="exact").status == 0
    assert [e["stage"] for e in events(bare, "stage")] == ["roundtrip", "sliding", "ngram"]
    assert score_of(bare) != score_of(env)
    assert script(tiny, RUN_ID="plain").status == 0
    lacking = script(
        base, MODE="eval", ARTIFACT=Path(env["LOG_DIR"]) / "plain.pgz", NGRAM_TABLE="exact", RUN_ID="lacking"
    )
    assert lacking.status == 2 and "the artifact carries no table exact" in lacking.err
    assert script(base, MODE="audit", ARTIFACT=pack["artifact"], RUN_ID="audit").status == 0


def test_ranks_count_the_same_text(tiny, script, tmp_path):
    env = {**tiny, "NGRAM_TABLE": "pr1095,exact", "LZMA_PRESET": "1", "ITERATIONS": "3", "EVAL_STAGES": "roundtrip"}
    assert script(env, RUN_ID="alone").status == 0
    run_ranks({**env, "RUN_ID": "shared"}, 3)
    alone, shared = ((tmp_path / "logs" / f"{name}.pgz").read_bytes() for name in ("alone", "shared"))
    for name in ("pr1095", "exact"):
        assert tg.read_header(alone).sections[name] == tg.read_header(shared).sections[name]


@pytest.mark.gpu
def test_a_gpu_counts_the_same_beside_its_steps(tiny):
    rows = torch.randint(0, 1024, (8, 65), generator=torch.Generator().manual_seed(0))
    totals = []
    for device in ("cpu", "cuda"):
        run = tg.Run(config(tiny, DEVICE=device), 0, 0, 1, 1)
        counts = tg.HashedNgrams(run)
        for _ in range(3):
            counts.update(rows[:, :-1].to(run.device), rows[:, 1:].to(run.device))
        totals.append(counts.total())
    assert all(np.array_equal(totals[0][n], totals[1][n]) for n in totals[0])
