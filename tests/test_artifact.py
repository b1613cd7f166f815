"""Section 8: what is packed comes back bit for bit, and no file can do more harm than a message."""

import hashlib
import random

import numpy as np
import pytest
import torch

import train_gpt as tg


def weights(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A small model's worth of tensors of every role, with correlated embedding columns."""
    g = torch.Generator().manual_seed(seed)
    named = {
        "tok_emb.weight": torch.randn(160, 24, generator=g) @ torch.randn(24, 48, generator=g) * 0.01,
        "blocks.0.attn.q.weight": torch.randn(48, 48, generator=g) * 0.1,
        "blocks.0.mlp.up.weight": torch.randn(96, 48, generator=g) * torch.rand(48, generator=g),
        "blocks.0.attn_scale": torch.randn(48, generator=g),
        "bigram.scale": torch.tensor(0.05),
    }
    roles = ["embed", "attn", "mlp", "control", "control"]
    return named, dict(zip(named, roles, strict=True))


def stored_with(low_rank: bool = False, **knobs) -> dict[str, tg.QuantizedTensor]:
    named, store = weights()
    stored = tg.quantize(tg.Config(quant_min_numel=100, **knobs), named, store)
    if low_rank:
        item = stored["blocks.0.attn.q.weight"]
        codes = lambda *shape: torch.randint(-7, 8, shape, dtype=torch.int8)  # noqa: E731
        factor = tg.LowRank(codes(48, 3), torch.rand(1).half(), codes(3, 48), torch.rand(3, 5).half(), 10)
        stored["blocks.0.attn.q.weight"] = tg.dataclasses.replace(item, low_rank=factor)
    return stored


def layout(stored: dict[str, tg.QuantizedTensor] | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """What a model of these tensors, or of `weights`, says of them."""
    return {n: (s.shape, s.role) for n, s in (stored or stored_with()).items()}


def reseal(blob: bytes) -> bytes:
    """Give a mutated body the checksum that a hostile author would give it."""
    return blob + hashlib.sha256(blob).digest()


@pytest.mark.parametrize("compressor", ["entropy", "zstd", "lzma"])
def test_tensors_and_header_come_back_bit_for_bit(compressor):
    cfg = tg.Config(compressor=compressor)
    stored = stored_with(low_rank=True, quant_overrides="blocks.0.mlp.up=16,tok_emb=5")
    header = {"config": {"MODEL_DIM": 48}, "note": "é"}
    blob = tg.pack(cfg, header, stored)
    found_header, found = tg.unpack(blob, layout(stored))
    assert found_header == header and list(found) == list(stored)
    for name, item in stored.items():
        assert (found[name].role, found[name].bits, found[name].shape) == (item.role, item.bits, item.shape)
        assert torch.equal(tg.dequantize(found[name]), tg.dequantize(item))
    assert tg.pack(cfg, header, stored) == blob, "packing is a function of its input"


def test_account_by_role_adds_up_to_the_file():
    blob = tg.pack(tg.Config(), {"config": {}}, stored_with())
    roles = tg.role_bytes(blob, layout())
    assert sum(r["bytes"] for r in roles.values()) == len(blob)
    assert sum(r["params"] for r in roles.values()) == sum(w.numel() for w in weights()[0].values())


@pytest.mark.parametrize("seed", range(12))
def test_any_codes_survive_the_entropy_coder(seed):
    """Shapes from 1 x 1 up, any spread, constant and extreme values, predicted or not."""
    rng = np.random.default_rng(seed)
    arrays = []
    for _ in range(rng.integers(1, 5)):
        shape = tuple(rng.integers(1, (200, 70)))
        spread = np.exp(rng.normal(size=(shape[0], 1)) + rng.normal(size=shape[1])) * rng.choice([0, 0.1, 1, 30])
        codes = np.clip(np.round(rng.standard_t(3, size=shape) * spread), -127, 127)
        arrays.append((codes + np.round(20 * rng.normal(size=shape[1]))).clip(-127, 127).astype(np.int8))
    for predictable in (False, True):
        stream = tg.encode_codes(arrays, predictable)
        for a, b in zip(arrays, tg.decode_codes(stream, [a.shape for a in arrays]), strict=True):
            assert b.dtype == np.int8 and np.array_equal(a, b)


@pytest.mark.parametrize("shape", [(5000, 6), (9, 700), (1, 5000), (5000, 1)])
def test_tensors_are_coded_in_regions_of_bounded_size(shape, monkeypatch):
    """What bounds a decoder's memory must not change the codes: parts of 64 rows or 500 codes."""
    monkeypatch.setattr(tg, "REGION_ROWS", 64)
    monkeypatch.setattr(tg, "REGION_CODES", 500)
    codes = np.random.default_rng(0).integers(-9, 9, size=shape).cumsum(axis=1).clip(-127, 127).astype(np.int8)
    for predictable in (False, True):
        assert all(
            (r.stop - r.start) * (c.stop - c.start) <= max(64 * tg.CHUNK, 700, 5000 * (shape[0] == 1))
            for r, c in tg.regions(shape, predictable)
        )
        (found,) = tg.decode_codes(tg.encode_codes([codes], predictable), [shape])
        assert np.array_equal(found, codes)


def test_correlated_columns_are_predicted_and_cost_less():
    rng = np.random.default_rng(0)
    codes = np.round(4 * rng.normal(size=(1024, 8)) @ rng.normal(size=(8, 64)) + rng.normal(size=(1024, 64)))
    codes = codes.clip(-127, 127).astype(np.int8)
    assert len(tg.encode_codes([codes], predictable=True)) < 0.75 * len(tg.encode_codes([codes]))


def test_stream_is_within_a_third_of_a_percent_of_the_model_s_entropy():
    """Known source, Gaussian with known variances: the stream may not exceed its entropy by more than the levels cost."""
    rng = np.random.default_rng(1)
    spread = 2.0 * np.exp(0.4 * rng.normal(size=512))
    codes = np.round(rng.normal(size=(1024, 512)) * spread).clip(-127, 127).astype(np.int8)
    edges = torch.special.ndtr(torch.from_numpy((np.arange(-127, 128)[:, None] - 0.5) / spread))
    p = (torch.special.ndtr(torch.from_numpy((np.arange(-127, 128)[:, None] + 0.5) / spread)) - edges).numpy()
    entropy = 1024 * -(p * np.log2(np.maximum(p, 1e-300))).sum()
    assert 8 * len(tg.encode_codes([codes])) < 1.004 * entropy


@pytest.mark.parametrize("share", [0.003, 0.03, 0.1])
def test_sparse_codes_cost_their_entropy(share):
    """Below a bit a code the levels that fit a Gaussian cost more than one level for all does."""
    rng = np.random.default_rng(2)
    codes = np.where(rng.random((256, 64)) < share, rng.choice([-1, 1], (256, 64)), 0).astype(np.int16)
    assert 8 * len(tg.encode_codes([codes])) < tg.entropy_bits(np.unique(codes, return_counts=True)[1]) + 8 * 64


@pytest.mark.parametrize(("pack", "unpack"), [(tg.lzma_pack, tg.lzma_unpack), (tg.zstd_pack, tg.zstd_unpack)])
def test_no_prefix_of_a_stream_is_one_and_nothing_follows_it(pack, unpack):
    packed = pack(raw := bytes(range(200)) * 3)
    assert unpack(packed, 600) == raw and unpack(pack(b""), 0) == b""
    for bad, size in (
        (packed[:-1], 600),
        (packed, 599),
        (packed, 601),
        (packed + b"x", 600),
        (2 * packed, 600),
        (b"", 600),
    ):
        with pytest.raises(tg.ArtifactError, match="an? (LZMA|zstd) stream does not"):
            unpack(bad, size)


def test_code_tables_are_the_same_numbers_on_every_machine():
    """Only square roots, products and floors: pin the result so that a change of arithmetic is noticed."""
    weights = tg.table_weights(np.arange(255))
    digest = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()[:16]
    assert digest == "a2825a3060557fd6"
    rng = np.random.default_rng(0)
    codes = rng.integers(-9, 10, size=(80, 40)).astype(float) @ np.triu(np.ones((40, 40)))
    factor = tg.regression(codes.T @ codes, 80)
    assert np.array_equal(factor, np.round(factor))
    assert hashlib.sha256(factor.tobytes()).hexdigest()[:16] == "ee1d571e0f6260a5"


def test_each_kind_of_bad_file_gets_its_own_message():
    blob = tg.pack(tg.Config(), {"config": {}}, stored_with())
    flipped = bytearray(blob)
    flipped[len(blob) // 2] ^= 4
    future = reseal(blob[:4] + b"\x63\x00" + blob[6:-32])
    for bad, words in [
        (b"", "begins with"),
        (b"PK\x03\x04" + blob[4:], "not an artifact"),
        (blob[:20], "truncated"),
        (blob[:-1], "truncated"),
        (blob + b"x", "appended"),
        (bytes(flipped), "checksum"),
        (future, "version 99.*the script that wrote it"),
        (reseal(blob[:4] + b"\x03\x00" + blob[6:-32]), "version 3.*commit 92a44cb"),
        (reseal(blob[:4] + b"\x04\x00" + blob[6:-32]), "version 4.*commit c21dca8"),
    ]:
        with pytest.raises(tg.ArtifactError, match=words):
            tg.unpack(bad, layout())


def test_a_file_for_another_model_is_refused_before_anything_is_decoded(monkeypatch):
    """Another shape, role, name, order or number of tensors."""
    blob, ours = tg.pack(tg.Config(), {"config": {}}, stored_with()), layout()
    monkeypatch.setattr(tg, "decode_stream", None)
    others = [{**ours, "tok_emb.weight": ((160, 64), "embed")}, {**ours, "tok_emb.weight": ((160, 48), "table")},
              {**ours, "head.weight": ((160, 48), "embed")}, dict(reversed(ours.items())), dict(list(ours.items())[1:]),
              {("t" if n == "tok_emb.weight" else n): tensor for n, tensor in ours.items()}]  # fmt: skip
    for other in others:
        with pytest.raises(tg.ArtifactError, match="not those that this script makes of its configuration"):
            tg.unpack(blob, other)


def hostile(header_change) -> bytes:
    """An artifact whose header was changed by someone who can compute checksums."""
    blob = tg.pack(tg.Config(), {"config": {}}, stored_with())
    _, _, _, packed, raw = tg.PREAMBLE.unpack_from(blob)
    start = tg.PREAMBLE.size + packed
    header = tg.json.loads(tg.lzma_unpack(blob[tg.PREAMBLE.size : start], raw))
    header_change(header)
    return tg.add_checksum(header, blob[start:-32])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((lambda h, record=record: h["tensors"].__setitem__(0, record), "impossible record") for record in (
            [9], [], [8.0], ["8"], [True], [8, 7], [8, 8, 2], [8, 8, 0, 0, 3], [8, 8, 1, -1], [8, True], [8, "8"], [8, 0, 0, 10**9],
            [8, 0, 0, 2, 49], [8, 0, 0, 2], [16, 8], [16, 0, 1], [32, 0, 0, 1], [8, 0, 0, 0, 0, 0])),
        (lambda h: h["tensors"].__setitem__(3, [8, 8]), "impossible record"),  # a vector has no trellis
        (lambda h: h["tensors"].append([8]), "not those"),
        (lambda h: h["tensors"].__setitem__(0, 8), "does not say"),
        (lambda h: h.__setitem__("layout", 5), "does not say"),
        (lambda h: h.__setitem__("layout", "0" * 16), "not those"),
        (lambda h: h.pop("tensors"), "does not say"),
        (lambda h: h["streams"][0].__setitem__(0, "pickle"), "unknown coder"),
        (lambda h: h["streams"][0].__setitem__(1, 1), "do not fill"),
        (lambda h: h["streams"][0].__setitem__(1, -1), "does not list"),
        (lambda h: h["streams"][0].__setitem__(1, 1 << 80), "do not fill"),
        (lambda h: h["streams"].append(["codes", 0]), "streams are not"),
        (lambda h: h["streams"].__setitem__(0, ["codes", h["streams"].pop(1)[1] + h["streams"][0][1]]), "streams are not"),
        (lambda h: h.pop("sections"), "does not list"),
        (lambda h: h["sections"].append(["x", True]), "does not list"),
        (lambda h: h["sections"].extend([["x", 0]] * 2), "two sections have the same name"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(change, words):
    with pytest.raises(tg.ArtifactError, match=words):
        tg.unpack(hostile(change), layout())


def test_a_small_file_cannot_claim_large_tensors():
    large = {"w": ((1 << 28,), "control")}
    blob = hostile(
        lambda h: h.update(
            layout=tg.layout_digest(large), tensors=[[32]], streams=[["zstd", sum(s[1] for s in h["streams"])]]
        )
    )
    with pytest.raises(tg.ArtifactError, match="too much for a file of this size"):
        tg.unpack(blob, large)


def test_a_small_file_cannot_ask_for_a_large_random_base():
    cfg = tg.Config(model_dim=8192, num_layers=2, adapter_rank=1)
    with pytest.raises(tg.ArtifactError, match="asks for .* bytes of model, too much for a file of 1000"):
        tg.load_model(cfg, None, bytes(1000))


def fuzz_one(rng: random.Random, blob: bytes) -> bytes:
    """A few random edits of a file, most of them with a valid checksum so that they reach the inner checks."""
    data = bytearray(blob[:-32])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(tg.PREAMBLE.size)
        data[at] = rng.randrange(256)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return reseal(bytes(data)) if rng.random() < 0.9 else bytes(data)


@pytest.mark.parametrize("compressor", ["entropy", "zstd", "lzma"])
def test_mutated_files_raise_artifact_errors_only(compressor):
    rng = random.Random(7)
    blob, tensors = tg.pack(tg.Config(compressor=compressor), {"config": {}}, stored_with(low_rank=True)), layout()
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(1500):
        try:
            tg.unpack(fuzz_one(rng, blob), tensors)
            outcomes["loaded"] += 1  # an edit inside the codes is another valid model
        except tg.ArtifactError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 500


# ---- the byte budget


def trained_stand_in() -> tuple[dict, dict, tg.Calibration]:
    """Tensors whose importance differs by 10,000, as layers' do, with Hessians of one of them."""
    named, store = weights()
    g = torch.Generator().manual_seed(5)
    named["blocks.1.mlp.up.weight"] = torch.randn(192, 48, generator=g) * 0.05
    store["blocks.1.mlp.up.weight"] = "mlp"
    importance = {"blocks.0.mlp.up.weight": 1e-4, "blocks.1.mlp.up.weight": 1.0}
    fisher = {n: torch.full((tg.rows_and_columns(w.shape)[0],), importance.get(n, 0.01)) for n, w in named.items()}
    x = torch.randn(400, 48, generator=g) * torch.linspace(0.1, 3, 48)
    return named, store, tg.Calibration({"blocks.1.mlp.up": x.T @ x}, fisher)


@pytest.mark.parametrize("compressor", ["entropy", "lzma"])
@pytest.mark.parametrize("with_gptq", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.35, 0.5, 0.7])
def test_budget_is_filled_to_the_last_half_percent_and_never_exceeded(share, with_gptq, compressor, monkeypatch):
    """In a few packs, whatever the size, the rounding and the coder; a toy of 24,000 weights is the hardest case."""
    named, store, calibration = trained_stand_in()
    calibration = calibration if with_gptq else calibration._replace(hessians={})
    packs, pack, code = [], tg.pack, 1000
    monkeypatch.setattr(tg, "pack", lambda *given: packs.append(0) or pack(*given))
    target = code + 2000 + int(share * sum(w.numel() for w in named.values()))
    cfg = tg.Config(target_bytes=target, quant_min_numel=100, compressor=compressor)
    budget = tg.BudgetSearch(cfg, {"config": {}}, named, store, calibration, code).fill()
    assert budget.spent == len(budget.blob) + code
    assert 0.995 * target <= budget.spent <= target
    assert len(packs) <= 4
    assert tg.unpack(budget.blob, layout(budget.stored))[1].keys() == named.keys()
    real = tg.role_bytes(budget.blob, layout(budget.stored))
    assert compressor == "lzma" or abs(budget.predicted["mlp"] / real["mlp"]["bytes"] - 1) < 0.1
    assert f"target:{target}" in tg.budget_table(budget, target)


def test_bits_go_where_they_count():
    named, store, calibration = trained_stand_in()
    cfg = tg.Config(target_bytes=1000 + sum(w.numel() for w in named.values()) // 2, quant_min_numel=100)
    stored = tg.BudgetSearch(cfg, {}, named, store, calibration, 1000).fill().stored
    step = {n: float(s.scale.float().mean() / named[n].std()) for n, s in stored.items() if s.codes is not None}
    assert step["blocks.1.mlp.up.weight"] < 0.25 * step["blocks.0.mlp.up.weight"]


def test_rare_rows_of_an_embedding_get_wider_steps():
    factor = tg.row_factors(torch.tensor([1.0, 1.0, 1 / 16]))
    assert factor[0] == factor[1] and factor[2] >= 2 * factor[0]
    assert (tg.row_factors(torch.ones(5)) == 1).all()


def test_a_model_too_small_for_the_budget_is_stored_at_the_finest_steps():
    named, store, calibration = trained_stand_in()
    budget = tg.BudgetSearch(
        tg.Config(target_bytes=10**6, quant_min_numel=100), {}, named, store, calibration, 0
    ).fill()
    assert budget.spent < 10**6
    assert all(int(s.codes.abs().max()) > 60 for s in budget.stored.values() if s.codes is not None)


def test_an_impossible_budget_says_what_takes_the_bytes():
    named, store, calibration = trained_stand_in()
    with pytest.raises(
        tg.ConfigError, match=r"TARGET_BYTES=900 cannot be met: the smallest total is [\d,]+ bytes.*embed"
    ):
        tg.BudgetSearch(tg.Config(target_bytes=900, quant_min_numel=100), {}, named, store, calibration, 500).fill()
