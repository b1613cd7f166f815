"""Test-time training document by document: a code in the order of the text, however its documents are computed."""

from __future__ import annotations

import copy
import itertools
import math
import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, config, events, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluator import model  # noqa: F401 (a fixture)

import train_gpt as tg
from benchmarks.strength import TwoSteps

# ruff: noqa: F811
TTT = {
    "TTT_ENABLED": 1, "TTT_RESET": "document", "TTT_CHUNK_SIZE": 12, "TTT_SHORT_SCORE_FIRST_STEPS": "8:4,20:6",
    "TTT_BLOCK_TOKENS": 60, "TTT_LORA_RANK": 3, "TTT_LORA_ALPHA": 6, "TTT_LORA_BLOCKS": 0, "TTT_GRAD_CLIP": 0,
    "TTT_LORA_SITES": "k,o,mlp,head", "TTT_LR": 0.01, "TTT_WD": 0.5, "TTT_BETA1": 0, "TTT_BETA2": 0.99, "TTT_ADAM_EPS": 1e-10,
    "TTT_BYTE_WEIGHTED": 0, "TTT_EVAL_SEQ_LEN": 24,
}  # fmt: skip
PHASES = {"PHASED_TTT_NUM_PHASES": 2, "PHASED_TTT_PREFIX": 0.8, "GLOBAL_TTT_LR": 0.05, "GLOBAL_TTT_CHUNK_TOKENS": 50}


@pytest.fixture
def text(data, tiny) -> tg.ValidationText:
    """240 tokens of short documents, some of one or two targets."""
    found = tg.load_validation(config(tiny, VAL_TOKENS=240), data.folder, tg.Tokenizer(data.tokenizer, VOCAB))
    found.tokens[[20, 47, 61, 63, 64, 80, 98, 115, 116, 150, 170, 200, 222]] = tg.BOS
    return found


@pytest.fixture
def double(model) -> tg.GPT:
    """The network in float64, where orders of summation are all that differ."""
    model.double().compute_dtype = torch.float64
    return model


def learner(tiny, model, text, run=None, **knobs) -> tg.DocumentLoraNetwork:
    cfg = config(tiny, **{**TTT, **knobs})
    return tg.DocumentLoraNetwork(cfg, run or tg.Run(cfg, 0, 0, 1, 1), model, text, cfg.eval_stride)


def walk(network: tg.NetworkExpert, text: tg.ValidationText, chunk: int | None = None) -> torch.Tensor:
    """Log-probabilities of targets 1 .. N-1 under the driver."""
    tg.score_first([network], text, chunk or len(text.tokens))
    return network.logp[1:].clone()


# ---- the structure: documents, blocks, chunks, phases


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 1, 5, 6, 7]), min_size=2, max_size=60), st.integers(1, 20))
def test_documents_have_every_target_once_and_blocks_end_where_documents_do(tokens, size):
    n, documents = len(tokens), tg.documents_of(torch.tensor(tokens))
    assert [t for d in documents for t in range(d.start + 1, d.start + d.targets + 1)] == list(range(1, n))
    assert all(d.start == 0 or tokens[d.start] == tg.BOS for d in documents)
    assert not any(tokens[t] == tg.BOS for d in documents for t in range(d.start + 1, d.start + d.targets) if t < n - 1)
    edges, ends = tg.block_edges(documents, size), [d.start + d.targets + 1 for d in documents]
    assert edges[-1] == n and set(edges) <= set(ends)
    for lo, hi in itertools.pairwise([1, *edges]):
        inside = [e for e in ends if lo < e <= hi]
        assert all(e - lo < size for e in inside[:-1]) and (hi - lo >= size or hi == n)


def test_where_a_block_ends_does_not_depend_on_what_follows():
    tokens = torch.tensor([1, 5, 5, 1, 5, 5, 5, 5, 1, 5, 1, 5, 5, 5, 1, 5])
    edges = tg.block_edges(tg.documents_of(tokens), 5)
    assert edges == [9, 15, 16]
    for t in range(2, len(tokens) + 1):
        known = tg.block_edges(tg.documents_of(tokens[:t]), 5)
        assert [e for e in known if e < t] == [e for e in edges if e < t], t


def test_chunks_depend_on_the_position_alone():
    steps = config({"RECIPE": "baseline", "TTT_SHORT_SCORE_FIRST_STEPS": "256:8,2000:24"}).ttt_chunk_steps
    starts = list(tg.chunk_starts(steps, 2300))
    sizes = [b - a for a, b in itertools.pairwise(starts)]
    assert starts[:3] == [1, 9, 17] and starts[32] == 257 and sizes[31:33] == [8, 24]
    assert all(size == (8 if at <= 256 else 24 if at <= 2000 else 48) for at, size in zip(starts, sizes, strict=False))
    assert list(tg.chunk_starts(steps, 700)) == starts[: len(list(tg.chunk_starts(steps, 700)))]
    assert starts[-1] > 2300 >= starts[-2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 9))
def test_documents_are_dealt_once_in_batches_of_no_more_than_a_ranks_share(lengths, ranks, rows):
    chunks = list(tg.chunk_starts([(20, 5), (math.inf, 8)], max(lengths)))
    documents = [tg.Document(1000 * i, n) for i, n in enumerate(lengths)]
    work = {d: min(at for at in chunks if at > d.targets) - 1 for d in documents}  # to the end of the last chunk
    batches = [batch for rank in tg.deal_documents(documents, ranks, rows, chunks) for batch in rank]
    assert sorted(d for batch in batches for d in batch) == documents and max(map(len, batches)) <= rows
    assert all(len(b) == 1 or sum(work[d] for d in b) <= sum(work.values()) / ranks for b in batches)


def test_phases_come_at_the_first_block_end_past_their_share():
    edges = [11, 21, 31, 41, 101]
    assert tg.phase_edges(edges, 0.3, 1) == [31] and tg.phase_edges(edges, 0.3, 3) == [11, 21, 31]
    assert tg.phase_edges(edges, 0.31, 1) == [41] == tg.phase_edges(edges, 0.4, 1), "30 targets are no 31"
    assert tg.phase_edges(edges, 0.25, 1) == [31] and tg.phase_edges(edges, 0.05, 3) == [11]
    assert tg.phase_edges(edges, 1.0, 1) == [] == tg.phase_edges(edges, 0.5, 0), "none after the end"


# ---- the scores are those of the definition


class Kept:
    """Keys and values of a document as they were computed; those from position `first` on are seen."""

    def __init__(self) -> None:
        self.first, self.length, self.last_id, self.last_embedding, self.all = 0, 0, None, None, {}

    def extend(self, slot, *new):
        self.all.setdefault(slot, []).append(new)
        earlier = [[x.detach() for x in pair] for pair in self.all[slot][:-1]]
        return [torch.cat(parts, 1)[:, self.first :] for parts in zip(*earlier, new, strict=True)]


def scored(model, ids, n, lora, temperature, cache):
    ctx = tg.Ctx(lora=lora, cache=cache)
    z = model.logits(model.features(ids[None, :-1], ctx)[:, -n:], ctx)
    nll = torch.nn.functional.cross_entropy(z[0], ids[-n:], reduction="none")
    return (z[0] / temperature).log_softmax(-1).gather(1, ids[-n:, None])[:, 0].detach(), nll


def trained(cfg, model, x, end):
    """A phase with torch's own SGD: chunk by chunk, each sequence alone; a step has so many tokens, a shorter one less weight."""
    params = list(model.requires_grad_().parameters())
    sgd, chunks = (
        torch.optim.SGD(params, cfg.global_ttt_lr, cfg.global_ttt_momentum),
        range(1, end, cfg.global_ttt_chunk_tokens),
    )
    for i, lo in enumerate(chunks):
        sgd.param_groups[0]["lr"] = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * i / max(len(chunks) - 1, 1)))
        hi, sequence, total, targets = min(lo + cfg.global_ttt_chunk_tokens, end), [], 0.0, 0
        most = min(cfg.global_ttt_batch_seqs * cfg.ttt_eval_len or 10**9, cfg.global_ttt_chunk_tokens)
        for t in range(lo, hi):
            sequence.append(t)
            targets += 1
            full = t == hi - 1 or targets == most
            if full or len(sequence) == cfg.ttt_eval_len or x[t] == tg.BOS:
                total = total + model.nll(x[None, sequence[0] - 1 : t], x[None, sequence[0] : t + 1]).sum()
                sequence = []
            if full:
                sgd.zero_grad()
                (total / targets).backward()
                torch.nn.utils.clip_grad_norm_(params, cfg.global_ttt_grad_clip)
                for p in params:
                    p.grad *= targets / most
                sgd.step()
                total, targets = 0.0, 0
    model.requires_grad_(False)


def by_hand(tiny, model, text, twice=False, **knobs) -> torch.Tensor:
    """The definition, one document and one chunk at a time, with torch's own optimizers; `twice`: a second step on each chunk."""
    cfg, x, n = config(tiny, **{**TTT, **knobs}), text.tokens, len(text.tokens)
    model, generator = (
        copy.deepcopy(model).requires_grad_(False),
        torch.Generator().manual_seed(tg.derive_seed(cfg.seed, "ttt")),
    )
    model.rope = tg.rope_table(cfg, n).to(model.rope)
    sites, scale, rank = tg.lora_sites(cfg, model), cfg.ttt_lora_alpha / cfg.ttt_lora_rank, cfg.ttt_lora_rank
    state = [(torch.empty(rank, i).uniform_(-1, 1, generator=generator) / i**0.5).double() for _, i in sites.values()]
    scores, left, block, done, phases = [], [], 0, 0, 0
    starts = [t for t in range(n - 1) if t == 0 or x[t] == tg.BOS]
    for s, e in zip(starts, [*(s + 1 for s in starts[1:]), n], strict=True):
        a = [p.clone().requires_grad_() for p in state]
        b = [torch.zeros(o, rank, dtype=torch.float64, requires_grad=True) for o, _ in sites.values()]
        lora = {site: tg.Lora(*pair, scale) for site, *pair in zip(sites, a, b, strict=True)}
        adam = torch.optim.AdamW([*a, *b], cfg.ttt_lr, (cfg.ttt_beta1, cfg.ttt_beta2), cfg.ttt_adam_eps, cfg.ttt_wd)
        lo, steps, kept = 1, 0, Kept()
        while s + lo < e:
            size = 4 if lo <= 8 else 6 if lo <= 20 else 12
            hi = lo + size
            kept.first, stop = max(0, hi - 1 - cfg.ttt_eval_len), min(hi, e - s)
            before = copy.copy(kept)
            before.all = {slot: [*pairs] for slot, pairs in kept.all.items()}
            logp, nll = scored(model, x[s + lo - 1 : s + stop], stop - lo, lora, cfg.ttt_temperature, kept)
            scores.append(logp)
            for again in range(1 + twice) if s + hi < e else ():
                if again:
                    _, nll = scored(model, x[s + lo - 1 : s + hi], size, lora, cfg.ttt_temperature, before)
                adam.zero_grad()
                w = text.bytes[s + lo : s + hi].clamp_min(1).double() if cfg.ttt_byte_weighted else torch.ones(size)
                (nll @ w.double() / w.sum()).backward()
                if cfg.ttt_grad_clip:
                    torch.nn.utils.clip_grad_norm_([*a, *b], cfg.ttt_grad_clip)
                adam.step()
                steps += 1
            lo = hi
        left.append((steps, a))
        block += e - s - 1
        done += e - s - 1
        if block >= cfg.ttt_block_tokens and e < n:
            if cfg.ttt_warm_start_a and sum(k for k, _ in left):
                state = [sum(k * p[i].detach() for k, p in left) / sum(k for k, _ in left) for i in range(len(state))]
            due = cfg.phased_ttt_num_phases and cfg.phased_ttt_prefix * (phases + 1) / cfg.phased_ttt_num_phases * (
                n - 1
            )
            if phases < cfg.phased_ttt_num_phases and done >= due:
                trained(cfg, model, x, e)
                phases += 1
            left, block = [], 0
    assert phases == cfg.phased_ttt_num_phases
    return torch.cat(scores)


@pytest.mark.parametrize("knobs", [{}, {"TTT_WARM_START_A": 0, "TTT_TEMPERATURE": 0.9}, PHASES,
                                   {**PHASES, "GLOBAL_TTT_BATCH_SEQS": 2, "TTT_EVAL_SEQ_LEN": 12},
                                   {"TTT_LORA_SITES": "q,v,out,up,down,o", "TTT_BETA1": 0.9, "TTT_GRAD_CLIP": 0.2,
                                    "TTT_BYTE_WEIGHTED": 1},
                                   *({**PHASES, "TTT_EVAL_SEQ_LEN": n} for n in (12, 27, 34, 64))])  # fmt: skip
def test_scores_are_those_of_the_definition(tiny, double, text, knobs):
    mine, theirs = walk(learner(tiny, double, text, **knobs), text), by_hand(tiny, double, text, **knobs)
    assert (mine - theirs).abs().max() < 1e-9
    alone = walk(learner(tiny, double, text, **{**knobs, "TTT_LR": 0, "PHASED_TTT_NUM_PHASES": 0}), text)
    assert (alone[:4] - mine[:4]).abs().max() < 1e-9, "nothing is learned before the first chunk is scored"
    assert (alone[4:12] - mine[4:12]).abs().max() > 1e-3


def test_a_second_step_on_each_chunk_as_the_benchmark_takes_it_is_that_of_the_definition(
    tiny, double, text, monkeypatch
):
    once = walk(learner(tiny, double, text), text)
    monkeypatch.setattr(tg, "DocumentBatch", TwoSteps)
    twice = walk(learner(tiny, double, text), text)
    assert (twice - by_hand(tiny, double, text, twice=True)).abs().max() < 1e-9 and (twice - once).abs().max() > 1e-3


# ---- and do not depend on how they are computed


def shuffled(_self, documents):
    """Batches of two in some order of the documents."""
    order = list(documents)
    random.Random(len(order)).shuffle(order)
    return [order[i : i + 2] for i in range(0, len(order), 2)]


def test_any_order_and_any_batch_give_the_same_scores(tiny, double, text, monkeypatch):
    together = walk(learner(tiny, double, text, **PHASES), text)
    for change in ({"TTT_BATCH_SIZE": 1}, {"TTT_BATCH_SIZE": 3}):
        assert (walk(learner(tiny, double, text, **PHASES, **change), text) - together).abs().max() < 1e-9, change
    for chunk in (1, 7):
        assert (walk(learner(tiny, double, text, **PHASES), text, chunk=chunk) - together).abs().max() < 1e-9, chunk
    monkeypatch.setattr(tg.DocumentLoraNetwork, "deal", shuffled)
    assert (walk(learner(tiny, double, text, **PHASES), text) - together).abs().max() < 1e-9


class Rank(tg.Run):
    """One of several ranks in threads of one process."""

    def join(self, meeting: dict) -> Rank:
        self.meeting = meeting
        return self

    def all_reduce(self, t):
        self.meeting["given"][self.rank] = t
        self.meeting["barrier"].wait()
        total = sum(self.meeting["given"][r] for r in range(self.world))
        self.meeting["barrier"].wait()
        return t.copy_(total)


@pytest.mark.parametrize("kind", ["document", "shared", "sliding"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_scores(tiny, double, text, ranks, kind):
    shared = {"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 70, "TTT_BATCH_SEQS": 2, "TTT_LR": 0.05}

    def network(run=None):
        if kind == "document":
            return learner(tiny, double, text, run, **PHASES)
        cfg = config(tiny, **(shared if kind == "shared" else {}), VAL_BATCH_TOKENS=64)
        form = tg.SharedLoraNetwork if kind == "shared" else tg.NetworkExpert
        return form(cfg, run or tg.Run(cfg, 0, 0, 1, 1), double, text, 8)

    cfg, alone, found = config(tiny), walk(network(), text), {}
    meeting = {"given": {}, "barrier": threading.Barrier(ranks, timeout=60)}
    networks = [network(Rank(cfg, r, r, ranks, ranks).join(meeting)) for r in range(ranks)]
    threads = [threading.Thread(target=lambda r=r: found.update({r: walk(networks[r], text)})) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[r] - alone).abs().max() < 1e-9 for r in range(ranks))
    if kind == "document":
        dealt = [{d for batch in network.deal(network.documents) for d in batch} for network in networks]
        assert all(dealt) and sum(map(len, dealt)) == len(networks[0].documents), "each rank has documents, none twice"


def test_two_processes_score_alike(tiny, script):
    knobs = {**TTT, **PHASES, "NGRAM_SCORE": "off", "EVAL_STAGES": "ttt", "VAL_TOKENS": 300, "ITERATIONS": 2}
    env = {**tiny, **{name: str(value) for name, value in knobs.items()}}
    assert script(env).status == 0
    base = {k: env[k] for k in ("DATA_PATH", "DEVICE", "ATTENTION", "LOG_DIR")}
    shared = {**base, "MODE": "eval", "RUN_ID": "shared", "VAL_TOKENS": "300", "ARTIFACT": f"{env['LOG_DIR']}/tiny.pgz"}
    run_ranks(shared, 2)
    (mine,), (theirs,) = events(shared, "stage"), events(env, "stage")
    assert abs(mine["val_bpb"] - theirs["val_bpb"]) < 1e-5


def test_other_stages_see_no_trace(tiny, model, text):
    cfg = config(tiny, **{**TTT, **PHASES, "NGRAM_SCORE": "off"})
    before = copy.deepcopy(model.state_dict())
    run = tg.Run(cfg, 0, 0, 1, 1)
    alone = tg.Evaluation(cfg, run, model, text).score("sliding")
    evaluation = tg.Evaluation(cfg, run, model, text)
    ttt, after = tg.evaluate(evaluation, ("ttt", "sliding"))
    assert after.val_loss == alone.val_loss != ttt.val_loss
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    moved = evaluation.networks["ttt"].model
    assert not torch.equal(moved.tok_emb.weight, model.tok_emb.weight), "the phases trained a copy"


def test_the_two_caps_move_in_the_global_phase_alone(tiny, double, text, monkeypatch):
    knobs = {**PHASES, "ASYM_LOGIT_RESCALE": 1, "LOGIT_SOFTCAP": 3}
    double.softcap = tg.Softcap(config(tiny, **knobs)).double()
    packed, moved, learn = copy.deepcopy(double.state_dict()), {}, tg.DocumentLoraNetwork.learn

    def watched(self, tokens, lo, hi):
        before = self.model.softcap.caps.clone()
        learn(self, tokens, lo, hi)
        moved[hi] = (self.model.softcap.caps - before).abs().min() > 1e-6  # both of them

    monkeypatch.setattr(tg.DocumentLoraNetwork, "learn", watched)
    network = learner(tiny, double, text, **knobs)
    scores = walk(network, text)
    assert len(network.phases) == 2 and [hi for hi in moved if moved[hi]] == network.phases != [*moved]
    assert (scores - by_hand(tiny, double, text, **knobs)).abs().max() < 1e-9, "what moved is what scores"
    shared = {"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 60, "ASYM_LOGIT_RESCALE": 1, "LOGIT_SOFTCAP": 3}
    single = tg.SharedLoraNetwork(config(tiny, **shared), network.run, double, text, 8)
    for still in (learner(tiny, double, text, **{**knobs, "PHASED_TTT_NUM_PHASES": 0}), single):
        walk(still, text)
        assert torch.equal(still.model.softcap.caps, packed["softcap.caps"])
    assert all(torch.equal(p, packed[name]) for name, p in double.state_dict().items())
    assert not double.softcap.caps.requires_grad, "as it was unpacked"


# ---- memory


def test_out_of_memory_halves_the_documents_and_changes_no_score(tiny, double, text, monkeypatch):
    plain, features, room = walk(learner(tiny, double, text, **PHASES), text), tg.GPT.features, [24]

    def narrow(self, ids, *ctx):
        if ids.numel() > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(self, ids, *ctx)

    monkeypatch.setattr(tg.GPT, "features", narrow)
    small = learner(tiny, double, text, **PHASES)
    assert (walk(small, text) - plain).abs().max() < 1e-9
    assert small.rows <= 3 and small.learning_rows == 1
    monkeypatch.setattr(small, "rehearsed", lambda rows: rows)  # as a GPU does
    small.rows = 16
    assert small.expected_seconds(text) > 0 and small.rows <= 3, "a rehearsal finds room before the training"
    room[0] = 0
    with pytest.raises(tg.ConfigError, match="TTT_EVAL_SEQ_LEN=24: one document does not fit in memory"):
        walk(learner(tiny, double, text), text)
    with pytest.raises(tg.ConfigError, match="TTT_EVAL_SEQ_LEN=24: one document does not fit in memory"):
        learner(tiny, double, text).expected_seconds(text)
    shared = tg.SharedLoraNetwork(config(tiny, TTT_ENABLED=1, TTT_CHUNK_TOKENS=96), small.run, double, text, 8)
    with pytest.raises(tg.ConfigError, match="EVAL_SEQ_LEN=32: learning one sequence does not fit in memory"):
        shared.learn(text.tokens, 1, 97)


# ---- sites


def test_a_branch_site_maps_the_branch_input_to_its_output(double):
    torch.manual_seed(1)
    block, d = double.blocks[1], 32
    ids = torch.randint(VOCAB, (2, 9))
    seen, lora = {}, tg.Lora(torch.randn(3, d).double(), torch.randn(d, 3).double(), 2.0)
    for part in ("attn", "mlp"):
        site, inner = (1, f"blocks.1.{part}"), getattr(block, part)
        inner.register_forward_hook(lambda _m, x, y, part=part: seen.update({part: (x[0], y)}))
        double.features(ids)
        plain = seen[part][1][0] if part == "attn" else seen[part][1]
        double.features(ids, tg.Ctx(lora={site: lora}))
        x, y = seen[part][0], seen[part][1][0] if part == "attn" else seen[part][1]
        assert torch.allclose(y - plain, 2.0 * (x @ lora.a.mT) @ lora.b.mT)


def test_every_pass_through_a_block_has_its_own_lora(tiny):
    cfg = config(tiny, **{**TTT, "ENCODER_RECURRENCE": 1, "TTT_LORA_SITES": "q,mlp,head"})
    with torch.device("meta"):
        model = tg.GPT(cfg)
    blocks = [step.block for step in model.plan]
    expected = [(slot, f"blocks.{i}.{part}") for slot, i in enumerate(blocks) for part in ("attn.q", "mlp")]
    assert blocks == [0, 0, 1] and list(tg.lora_sites(cfg, model)) == [*expected, (-1, "head")]


def test_passes_through_one_block_learn_different_things(tiny, text):
    torch.manual_seed(0)
    cfg = config(tiny, **{**TTT, "ENCODER_RECURRENCE": 1, "TTT_WARM_START_A": 0})
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_sdpa).eval()
    network = tg.DocumentLoraNetwork(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, 8)
    batch = tg.DocumentBatch(network, network.documents[:3])
    for _ in tg.score_then_learn(text.tokens, batch.n, network.chunk_end, [batch]):
        pass
    first, second = (network.adapters(batch.params).lora[slot, "blocks.0.mlp"].b for slot in (0, 1))
    assert first.abs().max() > 0 and not torch.allclose(first, second)


def test_a_lora_of_zeros_is_the_plain_network_to_the_bit(tiny, model):
    ids = torch.randint(VOCAB, (2, 9))
    every = tg.lora_sites(
        config(tiny, TTT_ENABLED=1, TTT_LORA_SITES="q,k,v,out,up,down,o,mlp,head", TTT_LORA_BLOCKS=0), model
    )
    lora = {site: tg.Lora(torch.randn(2, i), torch.zeros(o, 2), 1.5) for site, (o, i) in every.items()}
    assert len(every) == 2 * 8 + 1
    assert torch.equal(model.nll(ids, ids, tg.Ctx(lora=lora)), model.nll(ids, ids))


def test_kept_keys_and_values_are_the_same_network_where_nothing_is_learned(tiny, text):
    longest = max(d.targets for d in tg.documents_of(text.tokens))
    knobs = {"TTT_LR": 0, "TTT_EVAL_SEQ_LEN": longest + 16, "SMEAR": 1, "BIGRAM_VOCAB_SIZE": 64}
    torch.manual_seed(0)
    model = tg.GPT(config(tiny, **knobs, OUT_INIT="scaled", EMBED_INIT_STD=0.5)).place(
        torch.device("cpu"), tg.attend_sdpa
    )
    for p in model.double().parameters():
        p.data.add_(torch.randn(p.shape) * 0.2)
    model.compute_dtype = torch.float64
    kept, documents = walk(learner(tiny, model, text, **knobs), text), tg.documents_of(text.tokens)
    rows = [text.tokens[None, d.start : d.start + d.targets + 1] for d in documents]
    plain = torch.cat([-model.nll(ids[:, :-1], ids[:, 1:])[0].detach() for ids in rows])
    assert (plain - kept).abs().max() < 1e-9
    short, long = (walk(learner(tiny, model, text, TTT_EVAL_SEQ_LEN=n), text) for n in (12, 24))
    assert (short - long).abs().max() > 1e-3


# ---- the published order


def test_bits_of_order_count_the_orders_a_decoder_cannot_tell_apart(text):
    tokens = torch.tensor([1, 5, 1, 6, 7, 1, 8, 1, 9, 1, 9, 9, 9])
    text = tg.ValidationText(tokens, (tokens != 1).long(), True)
    other, bits = tg.longest_first(text)
    lengths = [2, 3, 2, 2, 4]
    assert bits == pytest.approx(math.log2(len(set(itertools.permutations(lengths)))))
    assert other.tokens.tolist() == [1, 9, 9, 9, 1, 6, 7, 1, 5, 1, 8, 1, 9]
    assert other.bytes.tolist() == (other.tokens != 1).long().tolist()


def test_the_published_order_is_a_claim_printed_after_the_score(tiny, script):
    knobs = {**TTT, "TTT_ORDER": "length", "NGRAM_SCORE": "off", "VAL_TOKENS": 600, "ITERATIONS": 2}
    result = script(tiny, **knobs)
    assert result.status == 0
    kinds = [e["event"] for e in events(tiny)]
    (claimed,), score = events(tiny, "order_claim"), events(tiny, "score")[-1]
    assert kinds.index("score") < kinds.index("order_claim") and score["stage"] == "ttt"
    assert claimed["claimed_bpb"] != score["val_bpb"] and claimed["order_bits"] > 0
    assert "not a code length" in result.out


# ---- what cannot be


@pytest.mark.parametrize(("knobs", "words"), [
    ({"TTT_LORA_SITES": "q,gate"}, "TTT_LORA_SITES='q,gate': this model has the sites"),
    ({"KV_FUSED": 1}, "TTT_LORA_SITES='k,o,mlp,head': this model has the sites"),
    ({"TTT_LORA_SITES": ""}, "TTT_LORA_SITES='': this model has the sites"),
    ({"TTT_BLOCK_TOKENS": 11}, "TTT_BLOCK_TOKENS=11 is shorter than a chunk of 12 targets"),
    ({"TTT_CHUNK_SIZE": 48}, "TTT_CHUNK_SIZE=48 exceeds the context of 24"),
    ({"TTT_SHORT_SCORE_FIRST_STEPS": "20:6,8:4"}, "TTT_SHORT_SCORE_FIRST_STEPS='20:6,8:4': expected POSITION:SIZE"),
    ({"TTT_SHORT_SCORE_FIRST_STEPS": "8"}, "TTT_SHORT_SCORE_FIRST_STEPS='8': expected POSITION:SIZE"),
    ({"TTT_SHORT_SCORE_FIRST_STEPS": "8:0"}, "TTT_SHORT_SCORE_FIRST_STEPS='8:0': expected POSITION:SIZE"),
    ({"TTT_OPTIMIZER": "sgd"}, "TTT_OPTIMIZER=sgd: a document's own LoRA is trained with adamw"),
    ({"TTT_RESET": "none", "PHASED_TTT_NUM_PHASES": 1}, "PHASED_TTT_NUM_PHASES=1: phases come at the ends of blocks"),
    ({"TTT_RESET": "none", "TTT_ORDER": "length"}, "TTT_ORDER=length orders the documents of"),
    ({"PHASED_TTT_NUM_PHASES": 1, "PHASED_TTT_PREFIX": 0}, "PHASED_TTT_PREFIX=0 leaves no text"),
    ({"TTT_EPOCHS": 2}, "TTT_EPOCHS=2: a document's LoRA takes one step on each chunk"),
    ({"TTT_KV_CACHE": 0}, "TTT_KV_CACHE=.0.: expected 1: windows computed anew scored alike"),
])  # fmt: skip
def test_bad_input_is_named(tiny, knobs, words):
    with pytest.raises(tg.ConfigError, match=words):
        config(tiny, **{**TTT, **knobs})


def test_phases_beyond_the_text_are_named_before_training(tiny, script):
    result = script(tiny, **{**TTT, "TTT_BLOCK_TOKENS": 100000, "PHASED_TTT_NUM_PHASES": 2})
    assert result.status == 2
    assert "PHASED_TTT_NUM_PHASES=2: the text's 1 blocks of TTT_BLOCK_TOKENS=100000 have room for 0" in result.err
    assert "step:" not in result.out


# ---- the audit


def test_the_audit_passes_and_sees_several_blocks_and_phases(tiny, model, data, monkeypatch):
    learned, learn = [], tg.DocumentLoraNetwork.learn
    monkeypatch.setattr(
        tg.DocumentLoraNetwork, "learn", lambda self, *a: (learned.append(a[2] in self.phases), learn(self, *a))
    )
    cfg = config(
        tiny,
        **{**TTT, "TTT_BLOCK_TOKENS": 65536, "PHASED_TTT_NUM_PHASES": 1, "GLOBAL_TTT_LR": 0.01, "NGRAM_SCORE": "off"},
    )
    text = tg.load_validation(config(tiny, VAL_TOKENS=450), data.folder, tg.Tokenizer(data.tokenizer, VOCAB))
    checks = list(tg.Audit(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, "ttt").checks())
    assert all(check.passed for check in checks), checks
    assert len(learned) >= 3 * 3 and sum(learned) >= 3, (
        "three walks of four have the text's documents, at least in part"
    )


@pytest.mark.parametrize(("given", "audited"), [(0, 0), (60, 60), (65536, 112)])
def test_the_audit_shortens_blocks_that_are_long_for_its_prefix(tiny, model, data, given, audited):
    cfg = config(tiny, **{**TTT, "TTT_BLOCK_TOKENS": given, "NGRAM_SCORE": "off"})
    text = tg.load_validation(config(tiny, VAL_TOKENS=900), data.folder, tg.Tokenizer(data.tokenizer, VOCAB))
    assert tg.Audit(cfg, tg.Run(cfg, 0, 0, 1, 1), model, text, "ttt").cfg.ttt_block_tokens == audited


def test_the_claim_fails_its_audit(tiny, script):
    assert script(tiny, NGRAM_SCORE="exact,claimed", NGRAM_BUCKETS=256).status == 0
    base = {k: tiny[k] for k in ("DATA_PATH", "DEVICE", "ATTENTION", "LOG_DIR")}
    audit = {**base, "MODE": "audit", "ARTIFACT": str(Path(tiny["LOG_DIR"]) / "tiny.pgz"), "VAL_TOKENS": "400"}
    passed = script(audit, RUN_ID="stages")
    assert passed.status == 0 and "NGRAM_SCORE=claimed audits it" in passed.out
    failed = script(audit, RUN_ID="claim", NGRAM_SCORE="claimed")
    assert failed.status == 1
    verdict = {row["name"]: row["passed"] for row in events({**audit, "RUN_ID": "claim"}, "audit")[0]["checks"]}
    assert [name for name, passed in verdict.items() if not passed] == [
        "claimed: a distribution",
        "claimed: noise costs its entropy",
    ]
    assert "audit claimed: a distribution: FAILED (sum at target" in failed.out
    assert "audit claimed: noise costs its entropy: FAILED (" in failed.out
