"""Dependent quantization: paths stay in the trellis, cost less error at equal bytes, and come back bit for bit."""

import dataclasses
import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import run_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_artifact import fuzz_one, layout, trained_stand_in, weights
from test_quantizer import gptq_codes, output_error, second_moments

import train_gpt as tg


def walk(codes: np.ndarray, states: int) -> np.ndarray:
    """States (R, C + 1) that codes lead through; asserts that each code has its state's parity."""
    path = [np.zeros(len(codes), np.int64)]
    for column in codes.T.astype(np.int64):
        assert np.array_equal(column & 1, tg.trellis_bits(states)[0][path[-1]])
        path.append(tg.next_state(path[-1], column, states))
    return np.stack(path, axis=1)


def random_paths(shape: tuple[int, int], states: int, spread: float, seed: int = 0) -> np.ndarray:
    """Random codes of the right parities."""
    rng, codes, state = np.random.default_rng(seed), np.zeros(shape, np.int16), np.zeros(shape[0], np.int64)
    for j in range(shape[1]):
        odd = tg.trellis_bits(states)[0][state].astype(np.int64)
        codes[:, j] = (2 * np.round((rng.normal(size=shape[0]) * spread - odd) / 2) + odd).clip(-2046, 2046 - odd)
        state = tg.next_state(state, codes[:, j].astype(np.int64), states)
    return codes


# Subset (code mod 4) -> next state, written out: the published tables up to the names of their states.
TABLES = {
    4: [{0: 0, 2: 1}, {1: 2, 3: 3}, {0: 1, 2: 0}, {1: 3, 3: 2}],
    8: [{0: 0, 2: 1}, {1: 2, 3: 3}, {2: 4, 0: 5}, {3: 6, 1: 7}, {2: 0, 0: 1}, {3: 2, 1: 3}, {0: 4, 2: 5}, {1: 6, 3: 7}],
}


@pytest.mark.parametrize("states", [4, 8])
def test_the_state_machine_is_the_published_trellis(states):
    for state, moves in enumerate(TABLES[states]):
        for code in range(-127, 128):
            if code % 2 == tg.trellis_bits(states)[0][state]:
                assert tg.next_state(state, code, states) == moves[code % 4], (state, code)


@pytest.mark.parametrize("states", list(tg.TRELLISES))
def test_the_search_finds_the_path_of_least_cost(states):
    """Without compensation nothing is dropped: the cost is that of the best of all paths."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(states)) * 2
    codes = tg.TrellisSearch(x[None], None, states).codes()[0]
    walk(codes.numpy(), states)
    power_C = x.square().mean(0) + 0.1
    power_R = (x.square() / power_C).mean(1) + 0.1
    price = tg.RATE_PRICE / (2 * math.log(2)) / (power_C * power_R[:, None])
    cost = (x - codes).square() + price * codes.float().square()
    for r in range(len(x)):
        least = {0: 0.0}
        for j, target in enumerate(x[r].tolist()):
            after: dict[int, float] = {}
            for state, spent in least.items():
                for code in range(-13 if tg.trellis_bits(states)[0][state] else -12, 14, 2):
                    to = tg.next_state(state, code, states)
                    after[to] = min(
                        after.get(to, math.inf), spent + (target - code) ** 2 + float(price[r, j]) * code**2
                    )
            least = after
        assert float(cost[r].sum()) == pytest.approx(min(least.values()), rel=1e-4)


def rate_by_parity(codes: torch.Tensor) -> float:
    """Bits a code under its frequencies within its parity."""
    values = codes.numpy().astype(int).ravel() + 128
    counts = np.bincount(values, minlength=256)
    return sum(tg.entropy_bits(counts[p::2]) for p in (0, 1)) / values.size


@pytest.mark.parametrize(("states", "gap"), [(4, 0.62), (8, 0.53), (64, 0.37)])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_a_gaussian_source_is_coded_near_its_bound(states, gap, spread):
    """In dB above the rate-distortion bound; independent codes lie 1.5 dB above it."""
    x = torch.randn(1, 300, 400, generator=torch.Generator().manual_seed(1)) * spread
    codes = tg.TrellisSearch(x, None, states).codes()
    error = float((x - codes).square().mean()) / spread**2
    assert 10 * math.log10(error) + 20 * math.log10(2) * rate_by_parity(codes) < gap + (0.15 if spread == 1 else 0)


@pytest.mark.parametrize(("states", "gain"), [(4, 0.8), (8, 0.9), (64, 1.04)])
def test_compensation_inside_the_search_beats_gptq_at_equal_rate(states, gain):
    """Correlated inputs: at least `gain` dB below GPTQ in its best order, and below the search without it."""
    w, h = torch.randn(192, 160, generator=torch.Generator().manual_seed(0)), second_moments(0.7, 160)
    spread = tg.gptq_factors(h, 0.01, "cholesky")
    columns = tg.column_steps(spread.weight_C)
    step = tg.octave_eighths(columns) * 0.25
    codes = tg.TrellisSearch((w / step)[None], [spread.in_steps(columns)], states).codes()[0]
    walk(codes.numpy(), states)
    error = lambda codes, step: output_error(w, codes * step, torch.ones(192), h)  # noqa: E731
    at_rate = lambda e, rate: 10 * math.log10(e) + 20 * math.log10(2) * rate  # noqa: E731
    uniform = gptq_codes(w[None], h[None], torch.full((1, 192), 0.5), 127)[0]
    rate = tg.entropy_bits(np.bincount(uniform.numpy().astype(int).ravel() + 128)) / uniform.numel()
    found = at_rate(error(codes, step), rate_by_parity(codes))
    assert found < at_rate(error(uniform, 0.5), rate) - gain
    alone = tg.TrellisSearch((w / 0.25)[None], None, states).codes()[0]
    assert found < at_rate(error(alone, torch.full((160,), 0.25)), rate_by_parity(alone)) - 1


def test_steps_of_columns_make_every_column_cost_the_same():
    spread = tg.gptq_factors(second_moments(1.0, 48), 0.01, "cholesky")
    even = spread.in_steps(tg.column_steps(spread.weight_C))
    assert spread.weight_C.max() / spread.weight_C.min() > 4 and even.weight_C.max() / even.weight_C.min() < 1.4
    assert even.gain < spread.gain and float(even.weight_C.mean()) == pytest.approx(1)
    assert torch.equal(even.feedback_CC.diagonal(), torch.ones(48))


def test_dead_inputs_do_not_disturb_the_others():
    h = second_moments(0.5, 40)
    h[[3, 17]] = 0
    h[:, [3, 17]] = 0
    w, spread = torch.randn(64, 40), tg.gptq_factors(h, 0.01, "cholesky")
    assert torch.isfinite(spread.feedback_CC).all() and torch.isfinite(spread.weight_C).all()
    alive = [j for j in range(40) if j not in (3, 17)]
    columns = tg.column_steps(spread.weight_C)
    step = tg.octave_eighths(columns) * 0.3
    codes = tg.TrellisSearch(
        (w.index_fill(1, torch.tensor([3, 17]), 0) / step)[None], [spread.in_steps(columns)], 8
    ).codes()[0]
    walk(codes.numpy(), 8)
    assert output_error(w, codes * step, torch.ones(64), h) < 0.05
    assert output_error(w[:, alive], (codes * step)[:, alive], torch.ones(64), h[alive][:, alive]) < 0.05


def test_search_in_parts_and_in_threads_gives_the_same_codes(monkeypatch):
    named = {f"b.{i}.weight": torch.randn(rows, 24) for i, rows in enumerate((40, 40, 40, 33))}
    store, cfg = dict.fromkeys(named, "mlp"), tg.Config(quant_trellis=4, quant_min_numel=0)
    hessians = {"b.1": second_moments(0.5, 24)}
    whole = tg.quantize(cfg, named, store, hessians)
    monkeypatch.setattr(tg, "SURVIVORS_AT_ONCE", {"cpu": 16 * 4})
    for name, item in tg.quantize(cfg, named, store, hessians).items():
        assert torch.equal(item.codes, whole[name].codes) and item.trellis == 4
        assert (item.columns is not None) == (name == "b.1.weight")


@pytest.mark.parametrize("states", [4, 8])
def test_any_paths_survive_the_coder(states):
    shapes = [(16, 1), (90, 70), (17, 300), (64, 40)]
    arrays = [
        random_paths(s, states, spread, i) for i, (s, spread) in enumerate(zip(shapes, (1, 5, 0.3, 600), strict=True))
    ]
    arrays.append(
        tg.TrellisSearch((torch.randn(200, 4) @ torch.randn(4, 48) * 8)[None], None, states).codes()[0].numpy()
    )
    stream = tg.encode_codes(arrays, True, states)
    found = tg.decode_codes(stream, [a.shape for a in arrays], states)
    assert all(np.array_equal(a, b) and b.dtype == np.int16 for a, b in zip(arrays, found, strict=True))
    alone = tg.encode_codes(arrays[-1:], True, states)
    assert len(alone) < 0.9 * len(tg.encode_codes(arrays[-1:], False, states))  # prediction and trellis go together


def entropy_of(codes: np.ndarray, states: int) -> float:
    """Bits of codes under their frequencies, along a trellis under those of their state's parity."""
    odd = tg.trellis_bits(states)[0][walk(codes, states)[:, :-1]] if states else np.zeros_like(codes)
    return sum(tg.entropy_bits(np.unique(codes[odd == parity], return_counts=True)[1]) for parity in (0, 1))


CONTENTS = {
    "gauss": lambda w: w,
    "sparse": lambda w: w * (w.abs() > 2.5),
    "zero": lambda w: 0 * w,
    "equal": lambda w: 0 * w + 0.3,
    "equal rows": lambda w: w[:, :1].expand(w.shape).clone(),
    "outlier": lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e4)),
    "scales": lambda w: w * torch.logspace(-3, 3, w.shape[1]),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 70)),
    st.sampled_from(list(CONTENTS)),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([0, *tg.TRELLISES]),
    st.sampled_from(["mlp", "embed", "adapter"]),
    st.none() | st.floats(-6, 8),
)
@example((256, 64), "gauss", 2, 4, "mlp", None)  # every odd code is +-1
@example((256, 64), "gauss", 2, 64, "mlp", 6.0)  # every code is 0
@example((40, 300), "equal", 8, 8, "embed", 3.0)
@example((40, 300), "equal", 8, 0, "mlp", None)  # every code is 127
def test_whatever_quantize_returns_comes_back_at_its_entropy(shape, content, bits, states, role, octave):
    """From 0 bits up: 2 % above the entropy and 64 bytes at most, besides the fields (tables). `octave`: log2 of the steps, None: the
    width's own."""
    w = CONTENTS[content](torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])))
    cfg = tg.Config(**{f"{role}_bits": bits}, quant_trellis=states, quant_min_numel=0)
    steps = octave and {
        "w": tg.steps_by_row(w, 2.0**octave, torch.ones(len(w)), tg.trellis_states(cfg.quant_trellis, shape))
    }
    inputs = tg.InputStats(tg.Policy(cfg, {"w": w}, {"w": role}), {}, None)
    stored = tg.store_tensors(inputs, ["w"], steps or {}, None)
    found = tg.unpack(tg.pack(cfg, {}, stored), layout(stored))[1]["w"]
    assert torch.equal(found.codes, stored["w"].codes) and torch.equal(found.scale, stored["w"].scale)
    stream = tg.encode_codes([found.codes.numpy()], role in tg.PREDICTED_ROLES, found.trellis)
    words = len(stream) - 8 - int.from_bytes(stream[4:8], "little")
    assert 8 * words <= 1.02 * entropy_of(found.codes.numpy().astype(int), found.trellis) + 8 * 64


@pytest.mark.parametrize("states", [0, 4])
@pytest.mark.parametrize("count", [32_767, 32_768, 65_535, 65_536, 100_003])
def test_tables_hold_any_number_of_codes(count, states):
    """Equal codes, all of them in one table: its count is a field of more than 15 and 16 bits."""
    codes = np.zeros((count, 1), np.int16)
    assert np.array_equal(tg.decode_codes(tg.encode_codes([codes], False, states), [codes.shape], states)[0], codes)


def test_codes_off_the_trellis_are_no_stream():
    with pytest.raises(AssertionError, match="leave the trellis"):
        tg.encode_codes([np.ones((16, 8), np.int16)], False, 8)


def test_a_trellis_saves_error_at_equal_bytes_in_the_whole_quantizer():
    """Real bytes of the packed file: at 3.5 bits at least 0.9 dB less error, all tensors together."""
    g = torch.Generator().manual_seed(2)
    named = {f"blocks.{i}.mlp.up.weight": torch.randn(256, 96, generator=g) * 0.02 for i in range(2)}
    store, h = dict.fromkeys(named, "mlp"), second_moments(0.6, 96)
    hessians, fisher = {f"blocks.{i}.mlp.up": h for i in range(2)}, {n: torch.ones(256) for n in named}

    def error(states: int) -> float:
        cfg = tg.Config(target_bytes=2 * 256 * 96 * 7 // 16, quant_trellis=states, gptq_enabled=True)
        budget = tg.BudgetSearch(cfg, {}, named, store, tg.Calibration(hessians, fisher), 0).fill()
        assert 0.995 * cfg.target_bytes <= budget.spent <= cfg.target_bytes
        _, stored = tg.unpack(budget.blob, layout(budget.stored))
        assert all(s.trellis == states for s in stored.values())
        return sum(float(((e := tg.dequantize(s) - named[n]) @ h * e).sum()) for n, s in stored.items())

    uniform = error(0)
    assert 10 * math.log10(error(8) / uniform) < -0.9
    assert 10 * math.log10(error(4) / uniform) < -0.8


def test_fine_steps_of_rows_columns_and_trellis_multiply():
    """A frequent token's row at a high rate: 8 bits would widen its step, which cost more than the trellis saves."""
    g = torch.Generator().manual_seed(6)
    named, h = {"tok_emb.weight": torch.randn(1200, 48, generator=g)}, second_moments(1.0, 48)
    calibration = tg.Calibration({"tok_emb": h}, {"tok_emb.weight": 1 / torch.arange(1, 1201)})

    def loss(states: int) -> float:
        cfg = tg.Config(target_bytes=1200 * 48 * 6 // 8, quant_trellis=states, gptq_enabled=True)
        budget = tg.BudgetSearch(cfg, {}, named, {"tok_emb.weight": "embed"}, calibration, 0).fill()
        item = tg.unpack(budget.blob, layout(budget.stored))[1]["tok_emb.weight"]
        error = tg.dequantize(item) - named["tok_emb.weight"]
        assert (item.codes.abs().max() > 127) == (states > 0)
        return float(calibration.fisher["tok_emb.weight"] @ (error @ h * error).sum(1))

    assert 10 * math.log10(loss(8) / loss(0)) < -0.9


# ---- files


def mixed(states: int = 8) -> dict[str, tg.QuantizedTensor]:
    """Tensors with everything that a file can hold."""
    named, store = weights()
    h = {"blocks.0.attn.q": second_moments(0.5, 48), "blocks.0.mlp.up": second_moments(1.0, 48)}
    cfg = tg.Config(quant_min_numel=100, quant_trellis=states, lqer_top_k=2, lqer_asym_group=20,
                    gptq_enabled=True, mlp_bits=3, attn_bits=3)  # fmt: skip
    return tg.quantize(cfg, named, store, h)


@pytest.mark.parametrize("states", list(tg.TRELLISES))
def test_everything_comes_back_bit_for_bit(states):
    stored = mixed(states)
    assert {s.trellis for s in stored.values()} == {0, states} and any(s.columns is not None for s in stored.values())
    assert any(s.low_rank and s.low_rank.group for s in stored.values())
    _, found = tg.unpack(tg.pack(tg.Config(), {}, stored), layout(stored))
    for name, item in stored.items():
        assert torch.equal(tg.dequantize(item), tg.dequantize(found[name]))
        assert item.trellis == found[name].trellis
        for a, b in zip(tg.arrays_of(item), tg.arrays_of(found[name]), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_mutated_files_with_paths_raise_artifact_errors_only():
    rng, blob = random.Random(11), tg.pack(tg.Config(), {"config": {}}, stored := mixed())
    refused = 0
    for _ in range(200):
        try:
            tg.unpack(fuzz_one(rng, blob), layout(stored))
        except tg.ArtifactError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("states", [0, 8])
def test_mutated_streams_raise_artifact_errors_only(states):
    """Edits of fields and words below the container: most are refused, and whatever loads is a path, or fits 8 bits."""
    rng, codes = random.Random(5), tg.TrellisSearch(torch.randn(1, 60, 24) * 3, None, 8).codes()[0].numpy()
    reader = tg.StreamCoder(stream := tg.encode_codes([codes], True, states))
    words, outcomes = stream[8 + int.from_bytes(stream[4:8], "little") :], Counter()
    for _ in range(600):
        edited, flipped = tg.StreamCoder(), bytearray(words)
        edited.stored = reader.stored.tolist()
        if rng.random() < 0.7:
            edited.stored[rng.randrange(len(edited.stored))] = rng.randrange(-300, 300) << rng.choice([0, 0, 8, 20])
        else:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        try:
            (found,) = tg.decode_codes(edited.finish() + bytes(flipped), [(60, 24)], states)
            assert found.shape == (60, 24) and (states == 0 or walk(found, 8) is not None)
            outcomes["loaded"] += 1
        except tg.ArtifactError as error:
            outcomes[str(error)] += 1
    assert 0 < outcomes["loaded"] < 300 and len(outcomes) > 4, outcomes


def test_a_trellis_of_few_rows_or_many_columns_is_refused():
    for shape in ((8, 4096), (16, 1 << 17)):
        assert not tg.TensorEntry(shape, "mlp", 8, 8).is_possible() and tg.TensorEntry(shape, "mlp", 8).is_possible()
        assert tg.trellis_states(8, shape) == 0


# ---- corrections, the last bytes


def test_asymmetric_factors_have_two_bits_left_and_a_step_a_group_right():
    residual = torch.randn(60, 3) @ torch.randn(3, 100) + 0.1 * torch.randn(60, 100)
    factors = tg.low_rank_codes(residual, 3, 4, 32)
    assert set(factors.left.unique().tolist()) <= {-2, -1, 0, 1} and factors.left_scale.shape == (1,)
    assert factors.right_scale.shape == (3, 4) and -8 <= factors.right.min() <= factors.right.max() <= 7
    assert float((residual - factors.product()).norm()) < 0.8 * float(residual.norm())


def test_corrections_are_taken_only_where_they_save_more_than_their_bytes():
    """A rank-1 residual that matters is corrected, a white one is not."""
    named, store, calibration = trained_stand_in()
    cfg = tg.Config(target_bytes=12_000, quant_min_numel=100, gptq_enabled=True, lqer_top_k=9, quant_trellis=8)
    search = tg.BudgetSearch(cfg, {}, named, store, calibration, 0, {})
    name = "blocks.1.mlp.up.weight"
    strong = torch.randn(192, 1) @ torch.randn(1, 48)
    step = 0.2
    factors = lambda r: tg.low_rank_codes(r, 1, 4, 16)  # noqa: E731
    assert search.correction_pays(name, factors(strong), strong, step)
    white = torch.randn(192, 48)
    assert not search.correction_pays(name, factors(white), white, step)


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize(("code", "wants"), [(0, 1), (20_000, 1), (20_000, 3)])
def test_the_last_bytes_are_spent_and_none_that_the_code_takes(states, code, wants, monkeypatch):
    """At most LEFT_BYTES are left where the first files leave far more; tries that take three times too much are not taken."""
    g = torch.Generator().manual_seed(4)
    named = {f"blocks.{i}.mlp.up.weight": torch.randn(256, 128, generator=g) * 0.02 for i in range(4)}
    store = dict.fromkeys(named, "mlp")
    fisher = {n: torch.full((256,), 4.0**i) for i, n in enumerate(named)}
    monkeypatch.setattr(tg, "BUDGET_FLOOR", 0.9)
    monkeypatch.setattr(tg, "BUDGET_AIM", 0.94)
    monkeypatch.setattr(tg, "LEFT_BYTES", 300)
    refine, asked = tg.BudgetSearch.refine, []
    monkeypatch.setattr(
        tg.BudgetSearch, "refine", lambda *given: asked.append(given) or refine(*given[:-1], wants * given[-1])
    )
    cfg = tg.Config(target_bytes=60_000 + code, quant_trellis=states)
    budget = tg.BudgetSearch(cfg, {}, named, store, tg.Calibration({}, fisher), code).fill()
    assert 0 <= cfg.target_bytes - budget.spent <= (300 if wants == 1 else 3000) and 1 <= len(asked) <= tg.LAST_TRIES
    assert len(tg.pack(cfg, {}, budget.stored)) == len(budget.blob) == budget.spent - code
    asked.clear()
    full = dataclasses.replace(cfg, target_bytes=budget.spent)  # nothing is left: nothing is tried
    assert tg.BudgetSearch(full, {}, named, store, tg.Calibration({}, fisher), code, {}).spend_rest(budget) is budget
    assert not asked


def test_a_run_at_the_lowest_rates_ends_with_an_artifact_that_scores(tiny, script, monkeypatch):
    head = tg.log_head
    monkeypatch.setattr(tg, "log_head", lambda *given: head(*given) * 0)
    result = script(tiny, QUANT_TRELLIS="8", TARGET_BYTES="6500", QUANT_MIN_NUMEL="64", GPTQ_N_SAMPLES="4")
    assert result.status == 0 and "score val_bpb:" in result.out, result.err


def fill_with(run: tg.Run | None) -> list[str]:
    """Hashes of files of one model, independent codes and paths, that the ranks of `run` make together."""
    torch.set_num_threads(1)
    named, store, calibration = trained_stand_in()
    tg.SURVIVORS_AT_ONCE = {"cpu": 256}
    digests = []
    for states in (0, 8):
        cfg = tg.Config(target_bytes=9000, quant_min_numel=100, gptq_enabled=True, quant_trellis=states, lqer_top_k=1)
        budget = tg.BudgetSearch(cfg, {}, named, store, calibration, 500, run=run).fill()
        digests.append(hashlib.sha256(budget.blob).hexdigest())
        assert tg.unpack(budget.blob, layout(budget.stored))[1].keys() == budget.stored.keys()
        assert budget.spent == len(budget.blob) + 500
    return digests


def main() -> int:
    """A rank of the test below: the files, then what a job that fails on rank 1 raises here."""
    run = tg.Run.start(tg.Config(device="cpu"))
    print("made", *fill_with(run))
    assert tg.share_out(run, [(cost, lambda cost=cost: cost) for cost in (1, 7, 3, 3)]) == [1, 7, 3, 3]
    try:
        tg.share_out(run, [(9, int), (8, lambda: 1 / 0), (1, int)])  # the second costliest is rank 1's
    except (ZeroDivisionError, tg.BrokenRun) as error:
        print("ended", type(error).__name__, error)
    run.close("ok")
    return 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_same_file_together_and_fail_together(ranks, monkeypatch):
    monkeypatch.setattr(tg, "SURVIVORS_AT_ONCE", dict(tg.SURVIVORS_AT_ONCE))
    text = run_ranks({}, ranks, "test_trellis")
    assert text.count("made " + " ".join(fill_with(None))) == ranks
    assert text.count("ended BrokenRun rank 1: ZeroDivisionError: division by zero") == ranks - 1
    assert text.count("ended ZeroDivisionError") == 1


def test_tensors_that_are_pruned_together_are_not_refined_alone(monkeypatch):
    """The file of a budget is that of its steps: with PRUNE_SCOPE=global a tensor coded by itself would lose other codes."""
    g = torch.Generator().manual_seed(4)
    named = {f"blocks.{i}.mlp.up.weight": torch.randn(256, 128, generator=g) * 0.01 * (2 + i) for i in range(3)}
    fisher = {n: torch.full((256,), 4.0**-i) for i, n in enumerate(named)}
    for knob, value in (("BUDGET_FLOOR", 0.9), ("BUDGET_AIM", 0.94), ("LEFT_BYTES", 300)):
        monkeypatch.setattr(tg, knob, value)
    for scope, fraction, left in (("global", 0.3, True), ("tensor", 0.3, False), ("global", 0.0, False)):
        cfg = tg.Config(target_bytes=45_000, prune_frac=fraction, prune_scope=scope)
        search = tg.BudgetSearch(cfg, {}, named, dict.fromkeys(named, "mlp"), tg.Calibration({}, fisher), 0)
        budget = search.fill()
        again = search.quantize_at(budget.steps, named)
        assert all(torch.equal(again[n].codes, s.codes) for n, s in budget.stored.items())
        assert 0 <= cfg.target_bytes - budget.spent < 0.1 * cfg.target_bytes
        assert (cfg.target_bytes - budget.spent > 300) == left
