"""The audit's strength: a score that looks ahead in any part fails it, by the check that is there for it."""

from __future__ import annotations

import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch
from test_ngram import small_claims, tiny_audit  # noqa: F401 (a fixture)
from test_table import tables

import train_gpt as tg

SHARED = {"n": 700, "TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 256, "TTT_LORA_RANK": 2, "TTT_LR": 0.05}
DOCUMENTS = {"TTT_ENABLED": 1, "TTT_RESET": "document", "TTT_EVAL_SEQ_LEN": 32, "TTT_CHUNK_SIZE": 16, "TTT_BLOCK_TOKENS": 60, "n": 360,
             "TTT_LORA_RANK": 2, "TTT_LORA_BLOCKS": 0, "TTT_LR": 0.05, "TTT_LORA_SITES": "q,o,mlp", "TTT_BATCH_SIZE": 4}  # fmt: skip
PHASES = {**DOCUMENTS, "PHASED_TTT_NUM_PHASES": 2, "PHASED_TTT_PREFIX": 0.6, "GLOBAL_TTT_LR": 1.0}
TILT = {"NGRAM_TILT_ENABLED": 1, "NGRAM_TILT_ORDER": 3, "NGRAM_TILT_THRESHOLD": 0.4}
TABLE = {"NGRAM_TABLE": "exact"}
CACHE = {"NGRAM_CLAIM": "pr740b"}

PAST, HERE, SUM, SAME = (
    "prefix only: future",
    "prefix only: target",
    "a distribution",
    "the score is the distribution's",
)
# (stage, knobs, function, what stands in it, what looks ahead in its place, the checks that fail)
AHEAD = {
    "the network reads a token more": ("roundtrip", {}, tg.score_windows, "ids[:, :-1]", "ids[:, 1:]", {SAME}),
    "attention without a mask": ("sliding", {}, tg.attend_sdpa, "is_causal=mask is None", "is_causal=False", {PAST}),
    "a window is scaled by all its logits": ("sliding", {}, tg.score_windows,
        "/ temperature", "\n    z = z / (temperature + z.std(dim=(1, 2), keepdim=True))", {PAST}),
    "the smear blends with the token after": ("sliding", {"SMEAR": 1, "SMEAR_INIT": 0}, tg.Smear.forward,
        "torch.cat([before_B1D, x_BTD[:, :-1]], dim=1)", "torch.cat([x_BTD[:, 1:], before_B1D], dim=1)", {SAME}),
    "a LoRA learns a target more": ("ttt", SHARED, tg.NetworkExpert.update,
        "self.learn(tokens, self.learned, end)", "self.learn(tokens, self.learned, end + 1)", {HERE}),
    "a document learns its chunk before its score": ("ttt", DOCUMENTS, tg.DocumentBatch.score,
        "self.z =", "slope = torch.autograd.grad(self.loss, self.live, retain_graph=True)[0]\n    z = last_logits(network.model, ids[:, :-1], hi - lo, network.adapters(self.live - slope))\n    self.z =", {PAST}),
    "a document learns a target more": ("ttt", DOCUMENTS, tg.DocumentBatch.score,
        "lo, hi, learners, 0)", "lo, hi, learners, 0)\n        nll = nll + z[:learners, -1:].log_softmax(-1).gather(-1, self.gather(tokens, hi, hi + 1, learners, BOS)[..., None])[..., 0]", {HERE}),
    "a phase trains on what follows": ("ttt", PHASES, tg.DocumentLoraNetwork.train_weights,
        "global_ttt_chunk_tokens, end)", "global_ttt_chunk_tokens, len(tokens))", {HERE, PAST}),
    "a phase trains on a target more": ("ttt", PHASES, tg.DocumentLoraNetwork.train_weights,
        "global_ttt_chunk_tokens, end)", "global_ttt_chunk_tokens, end + 1)", {HERE}),
    "a hint that its target confirms": ("tilt", TILT, tg.Tilt.transform,
        ".to(last.device) + 1", ".to(last.device) + 1 + (hint == query.tokens[query.target])", {HERE}),
    "packed contexts that hold the target": ("table", TABLE, tg.PackedTable.span, "in (rows[:-1], rows[1:])", "in ([np.append(x[1:], -1) for x in rows[:-1]], rows[1:])", {SAME}),
    "packed contexts a token ahead": ("table", TABLE, tg.PackedTable.span, "self.rows(tokens, lo, hi)", "self.rows(tokens.roll(-1), lo, hi)", {PAST}),
    "a cascade that learns before its score": ("ngram", {}, tg.NgramExpert.score,
        "return p.log()", "self.learn(self.pending)\n    return self.transform(self.query(self.base.score(tokens, lo, hi).exp(), entropy, tokens, lo, hi))[0].log()", {PAST}),
    "totals that count the target": ("ngram", {}, tg.NgramTable.span, "max(lo - 1, 0) : hi - 1]", "lo - 1 : hi - 1] * (1 + self.columns[0][:-1, lo:hi])", {SAME}),
    "a gate that looks at the target": ("ngram", {}, tg.Cascade.transform, "C, U, trust,", "C, U, 9 * (guess == query.token[at]).long(),", {SUM}),
    "a cache that counts before it scores": ("normalized", CACHE, tg.HashedScorer.score,
        "p, rows =", "self.update(tokens, lo, hi)\n    p, rows =", {PAST}),
    "a hash over the target": ("normalized", CACHE, tg.HashedCache._context_cells, "(target[:, None] - back)", "(target[:, None] - back + 1)", {HERE}),
    "the driver learns before it scores": ("normalized", CACHE, tg.score_then_learn,
        "        yield lo, hi, chain[-1].score(tokens, lo, hi)\n        for expert in chain:\n            expert.update(tokens, lo, hi)\n",
        "        for expert in chain:\n            expert.update(tokens, lo, hi)\n        yield lo, hi, chain[-1].score(tokens, lo, hi)\n", {PAST}),
}  # fmt: skip


BOTH = {"NGRAM_TABLE": "pr1095,exact", "NGRAM_CLAIM": "pr1095"}
SOUND = [("ngram", {**TILT, "NGRAM_TILT_ORDER": 4, "NGRAM_TILT_GAMMA": 1}), ("ngram", {"NGRAM_TILT_ENABLED": 1, "NGRAM_TILT_ORDER": 8}),
         ("ngram", SHARED), ("table", BOTH), ("ngram", BOTH), ("normalized", BOTH), ("normalized", {})]  # fmt: skip


def changed(function, old: str, new: str):
    """The function with one place of its text changed."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__qualname__}"
    scope = {}
    exec(
        f"from __future__ import annotations\n{source.replace(old, textwrap.indent(new, '', str.strip))}",
        vars(tg),
        scope,
    )
    return scope[function.__name__]


@pytest.mark.usefixtures("small_claims")
@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_fails_the_audit(name, monkeypatch):
    stage, knobs, function, old, new, failing = AHEAD[name]
    *owner, attribute = function.__qualname__.split(".")
    place = getattr(tg, owner[0]) if owner else tg
    monkeypatch.setattr(place, attribute, changed(function, old, new))
    checks = tiny_audit(stage, tables() if "NGRAM_TABLE" in knobs else tg.NO_TABLES, **knobs)
    assert failing <= {check for check, passed in checks.items() if not passed}, checks


@pytest.mark.usefixtures("small_claims")
@pytest.mark.parametrize(
    ("stage", "knobs"), [*dict.fromkeys((s, tuple(k.items())) for s, k, *_ in AHEAD.values()), *SOUND]
)
def test_the_same_parts_as_they_are_pass(stage, knobs):
    checks = tiny_audit(stage, tables() if "NGRAM_TABLE" in dict(knobs) else tg.NO_TABLES, **dict(knobs))
    assert len(checks) == 6 and all(checks.values()), checks


@pytest.mark.parametrize("sign", [-1, 1])
def test_each_tolerance_of_the_audit_has_two_sides(sign, monkeypatch):
    audit, flat = object.__new__(tg.Audit), torch.full((8,), 0.125, dtype=torch.float64)
    audit.model, audit.tolerance = SimpleNamespace(compute_dtype=torch.float32), 1e-6
    audit.text = tg.ValidationText(torch.arange(4), torch.ones(4, dtype=torch.int64), True)
    audit.noise, audit.cuts, audit.cfg = torch.arange(4), [2, 3], SimpleNamespace(vocab_size=8)
    scores = torch.full((3,), math.log(0.125), dtype=torch.float64)
    for size, passed in ((0.9, True), (1.1, False)):
        step = sign * size
        assert audit.sums_to_one({1: flat, 3: flat * (1 + step * 1e-6)}).passed is passed
        same = audit.scores_are_of_the_distribution(scores + torch.tensor([0.0, 0.0, step * 1e-4]), {1: flat, 3: flat})
        assert same.passed is passed
        for moved in (0, 1):  # the last score before a cut, an entry of the distribution at it

            def walk(_, at, t, step=step, moved=moved):
                entry, last = (torch.arange(n) == i for n, i in ((8, 5), (t - 1, 1)))
                dist = flat + moved * step * 1e-6 * entry * (t == 3)
                return scores[: t - 1] + (1 - moved) * step * 1e-6 * last, {at[0]: dist}, None

            monkeypatch.setattr(audit, "walk", walk)
            found = [check.passed for check in audit.rest_is_unseen(scores, {2: flat, 3: flat})]
            assert found == [passed or moved == 1, passed or moved == 0]
    assert not audit.sums_to_one({1: torch.cat([flat, torch.tensor([0.1, -0.1])])}).passed
