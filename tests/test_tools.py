"""tools/: bytes come back exactly and the size of the file is the score; samples; what each token cost."""

import dataclasses
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as tg
from benchmarks import codec as bench
from tools import artifact as ta
from tools import codec as tc
from tools import explain as te
from tools import sample as ts

SMALL = {
    "NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 32, "EVAL_STRIDE": 8,
    "TRAIN_BATCH_TOKENS": 64, "DEVICE": "cpu",
}  # fmt: skip
HERE = Path(__file__).parent


def load(recipe: str = "cpu", **knobs) -> tg.Config:
    env = {"RECIPE": recipe, **SMALL, **({"NGRAM_TABLE": "none"} if recipe == "cpu" else {}), **knobs}
    return tg.load_config({k: str(v) for k, v in env.items()}).cfg


def tiny_model(cfg: tg.Config) -> tg.GPT:
    """A model with random weights, the ones that start at zero included."""
    torch.manual_seed(0)
    model = tg.GPT(cfg).place(torch.device("cpu"), tg.attend_sdpa).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", autouse=True)
def small_scale():
    """Small products run best in one thread, above all on a busy machine; small texts shall have several lanes."""
    before = torch.get_num_threads(), tc.LANE_TOKENS
    torch.set_num_threads(1)
    tc.LANE_TOKENS = 256
    yield
    torch.set_num_threads(before[0])
    tc.LANE_TOKENS = before[1]


def make_run(cfg: tg.Config) -> tg.Run:
    run = tg.Run(cfg, 0, 0, 1, 1)
    torch.set_num_threads(1)
    return run


@pytest.fixture(scope="module")
def tokenizer() -> tg.Tokenizer:
    return tg.Tokenizer(tg.SAMPLE_DIR / "tokenizer_1024.model", 1024)


def open_tiny(cfg: tg.Config, tokenizer: tg.Tokenizer, name: str = "", **more) -> ta.Predictor:
    return ta.Predictor(cfg, make_run(cfg), tiny_model(cfg), ta.TextTokens(tokenizer.sp), name, **more)


@pytest.fixture(scope="module")
def codec(tokenizer) -> tc.Codec:
    return tc.Codec(open_tiny(load(), tokenizer, "0123456789abcdef"), 8)


@pytest.fixture(scope="module")
def sample_text(tokenizer) -> str:
    """100 kB of the sample's validation text, which is normalised already."""
    tokens = np.array(tg.load_split(tg.SAMPLE_DIR, "val")[0][:60_000])
    return tokenizer.sp.decode(tokens[tokens != 1].tolist())[:100_000].rsplit(" ", 1)[0]


def texts(sample: str) -> dict[str, bytes]:
    rng = random.Random(0)
    return {
        "empty": b"",
        "one byte": b"a",
        "one newline": b"\n",
        "prose": sample[:500].encode(),
        "code": (HERE / "test_tools.py").read_bytes()[:600],
        "crlf and tabs": b"  one\r\n\ttwo \r\n\r\n three\t\t\n" * 6,
        "other scripts": "Привет, мир. 你好，世界。 ＡＢＣ ｶﾞ 한국어 مرحبا Ελληνικά ½ ﬁne… ´ ¨ e\u0301 \u3000\ufeff\u200b▁ <s>".encode(),
        "emoji": "👩\u200d👩\u200d👧 🙂🙃 ❤️ 🇫🇷 e".encode() * 3,
        "NULs": b"\0a\0\0 b\0\n\x01\x7f\x02\x03" * 5,
        "broken UTF-8": b"Hello \xff\xfe world \xc3 and \xe2\x82 more \xed\xa0\x80.\n" * 4,
        "latin-1": "Il était déjà trop tard".encode("latin-1") * 3,
        "random bytes": rng.randbytes(150),
    }


def test_every_kind_of_bytes_comes_back(codec, sample_text):
    for name, data in texts(sample_text).items():
        text = codec.compress_text(data)
        assert text is None or codec.decompress(text.blob) == data, name
        plain = codec.compress_bytes(data)
        assert codec.decompress(plain.blob) == data, name
        assert text is None or len(data) > 80 or codec.compress(data) == min(text, plain, key=lambda p: len(p.blob))


def test_any_tokenizer_will_do(data):
    """Here one of 300 pieces, trained without a dummy prefix, that spells most characters in bytes."""
    sp = tg.Tokenizer(data.tokenizer, 300).sp
    for text in (data.val_texts[0], " apple  river\n\nÉcole… ▁ 🙂\t", "\n", "x"):
        normal, edits = tc.Normalizer(ta.TextTokens(sp)).split(text.encode())
        assert sp.decode(sp.encode(normal)) == normal and tc.restore_bytes(normal, edits) == text.encode()
        assert "".join(te.token_texts(ta.TextTokens(sp), text)[1]) == (text if normal else "")


@pytest.fixture(scope="module")
def case_tokens(tmp_path_factory) -> ta.TextTokens:
    """A tokenizer of 300 pieces for text whose case is factored out."""
    prefix = tmp_path_factory.mktemp("caseops") / "t"
    stream = ta.caseops.encode("The Quick brown Fox: NASA, iPhone, McDonald. É fine " * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([stream]), model_prefix=str(prefix), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        num_threads=1, user_defined_symbols=list(ta.caseops.OPERATORS), hard_vocab_limit=False,
    )  # fmt: skip
    return ta.TextTokens(sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model"), "caseops")


@pytest.mark.parametrize("text", [
    "The NASA iPhone of McDonald, É and eÉE.", "  TABS\tand\r\nNewlines ﬁNe ™ ＡＢｃ\n", "\ue001 literal \ue004\ue002 Operators", "aB 🙂", " ",
])  # fmt: skip
def test_text_whose_case_is_factored_out_comes_back(case_tokens, text):
    normal, edits = tc.Normalizer(case_tokens).split(text.encode())
    assert tc.restore_bytes(normal, edits) == text.encode() and case_tokens.decode(case_tokens.encode(normal)) == normal
    ids, shown = te.token_texts(case_tokens, text)
    assert "".join(shown) == (text if normal else "") and ids == case_tokens.encode(text)


def test_a_transform_nobody_knows_is_refused(case_tokens):
    with pytest.raises(tg.ConfigError, match="transforms its text by 'rot13'"):
        ta.TextTokens(case_tokens.sp, "rot13")


def test_which_form_is_chosen(codec, sample_text):
    kinds = texts(sample_text)
    assert codec.compress_text(kinds["random bytes"]) is None and codec.compress_text(b"") is None
    assert tc.FORMS[codec.compress(kinds["random bytes"]).header.form] == "stored"
    assert tc.FORMS[codec.compress(b"ab" * 500).header.form] == "lzma"


def evaluator_bits(of: ta.Predictor, tokens: np.ndarray, lanes: int) -> float:
    """What the evaluator's final stage charges for `lanes` stretches of the tokens, each a stream of its own after a BOS."""
    nats = 0.0
    for lane in np.array_split(tokens, lanes):
        stream = torch.from_numpy(np.concatenate([[1], lane]))
        evaluation = tg.Evaluation(of.cfg, of.run, of.model, tg.ValidationText(stream, stream, True), of.tables)
        nats += evaluation.score(of.cfg.final_stage).val_loss * len(lane)
    return nats / math.log(2)


def test_actual_size_is_the_evaluators_score_of_the_same_segmentation(tokenizer, sample_text):
    codec = tc.Codec(open_tiny(load(EVAL_STAGES="sliding"), tokenizer), 64)
    text = sample_text[:60_000].rsplit(" ", 1)[0]
    packed = codec.compress_text(text.encode())
    assert packed.restoration_bits == 0, "normalisation leaves this text alone"
    tokens = np.array(tokenizer.sp.encode(text), np.int64)
    score = evaluator_bits(codec.predictor, tokens, 64)
    assert packed.ideal == pytest.approx(score, rel=1e-3)
    assert packed.token_bits == pytest.approx(score, rel=1e-3)
    assert 8 * len(packed.blob) == pytest.approx(score, rel=2e-3), "the header is small"


TECHNIQUES = {
    "baseline": {},
    "cpu": {},
    "pr164": {},
    "pr740": {"XSA_LAST_N": 2, "ROPE_DIMS": 4},
    "pr187": {"NUM_LAYERS": 4, "ENCODER_RECURRENCE": 1},
    "pr850": {"NUM_LAYERS": 3, "XSA_LAST_N": 2, "VE_LAYERS": "1,2", "ROPE_DIMS": 4},
    "pr1095": {"NUM_LAYERS": 3, "XSA_LAST_N": 3, "VE_LAYERS": "1,2", "ROPE_DIMS": 4, "ADAPTER_RANK": 4},
    "frontier": {"VOCAB_SIZE": 1024, "NUM_LAYERS": 11, "ROPE_DIMS": 4, "EVAL_SEQ_LEN": 32, "TTT_ENABLED": 0},
}


@pytest.mark.parametrize("recipe", TECHNIQUES)
def test_lanes_give_the_evaluators_distributions(recipe):
    cfg = load(recipe, **{**TECHNIQUES[recipe], "RESUME": ""})
    model, run, n = tiny_model(cfg), make_run(cfg), 90
    tokens = torch.randint(2, 1024, (2, n))
    tokens[:, 0] = 1
    tokens[0, 50] = 1
    lanes = ta.LaneNetwork(cfg, run, model, "sliding", 2, n - 1)
    found = []
    for t in range(1, n):
        found.append(lanes.dist())
        lanes.take(tokens[:, t].numpy())
    for lane in (0, 1):
        text = tg.ValidationText(tokens[lane], torch.zeros(n), True)
        network = tg.NetworkExpert(cfg, run, model, text, cfg.eval_stride)
        for t in (1, 2, 31, 32, 33, 40, 41, 51, 60, 88, 89):
            assert torch.allclose(found[t - 1][lane], network.dist(tokens[lane], t), atol=1e-6), (lane, t)
        mine = torch.stack(found)[:, lane].gather(1, tokens[lane, 1:, None])[:, 0].log()
        assert torch.allclose(mine, network.score(tokens[lane], 1, n), atol=1e-4)


STAGES = {  # what the score is of, in the order of the chain of experts
    "tilt": {"NGRAM_SCORE": "off", "NGRAM_TILT_ORDER": 4, "NGRAM_TILT_GAMMA": 1},
    "table": {"NGRAM_SCORE": "off", "NGRAM_TABLE": "exact"},
    "tilt, table": {"NGRAM_SCORE": "off", "NGRAM_TABLE": "exact", "NGRAM_TILT_ORDER": 4},
    "ngram": {},
    "tilt of longer contexts, ngram": {"NGRAM_ORDER": 2, "NGRAM_TILT_ORDER": 4},
    "tilt, table, ngram": {"NGRAM_TABLE": "exact", "NGRAM_TILT_ORDER": 4},
    "network below unused experts": {"NGRAM_TABLE": "exact", "NGRAM_TILT_ORDER": 4, "SCORE_STAGE": "sliding"},
    "network without overlap": {"NGRAM_TABLE": "exact", "EVAL_STAGES": "roundtrip"},
}
OFF = {"tilt": {"NGRAM_TILT_ENABLED": 0}, "table": {"NGRAM_TABLE": "none"}, "ngram": {"NGRAM_SCORE": "off"}}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_codes_as_it_scores(name, tokenizer, sample_text):
    """The text repeats itself, and the artifact's n-grams are of text like it: each expert has something to say."""
    learned = np.array(tokenizer.sp.encode(sample_text[2000:40_000]))
    tables = tg.Tables(trie=tg.unpack_trie(tg.build_trie(learned, 1024, 4, 20_000), 1024))
    knobs = {"NGRAM_ORDER": 6, "NGRAM_TILT_ENABLED": int("NGRAM_TILT_ORDER" in STAGES[name])}
    data = (sample_text[:400] + " and once more: " + sample_text[:300]) * 2

    def opened(**more) -> tc.Codec:
        cfg = load(**{**knobs, **STAGES[name], **more})
        return tc.Codec(open_tiny(cfg, tokenizer, tables=tables if cfg.ngram_tables else tg.NO_TABLES), 2)

    codec, tokens = opened(), np.array(tokenizer.sp.encode(data))
    packed = codec.compress_text(data.encode())
    score = evaluator_bits(codec.predictor, tokens, 2)
    assert packed.header.lanes == 2 and packed.ideal == pytest.approx(score, rel=1e-5)
    assert codec.decompress(packed.blob) == data.encode()
    for expert in name.split(", ") if "network" not in name else ():
        without = evaluator_bits(opened(**OFF[expert.split()[0]]).predictor, tokens, 2)
        assert abs(without - score) > 1e-4 * score, f"{expert} does something"


@pytest.mark.parametrize("smear_first", [0, 1])
def test_the_step_of_the_pre_enrichment_is_of_the_position_before_the_target(smear_first):
    cfg = load("pr187", SMEAR_BEFORE_NORM=smear_first, NUM_LAYERS=4)
    model, run, n = tiny_model(cfg), make_run(cfg), 80
    tokens = torch.randint(2, 1024, (2, n))
    tokens[:, 0] = 1
    for lane in (0, 1):
        network = tg.NetworkExpert(
            cfg, run, model, tg.ValidationText(tokens[lane], torch.zeros(n), True), cfg.eval_stride
        )
        x = model.embed_plain(tokens[lane : lane + 1], tg.Ctx())
        moved = (model.pre_enrich(x, tg.Ctx()) - x)[0].norm(dim=-1)
        assert torch.allclose(network.enrichment[1:], moved[:-1], rtol=1e-4)


@pytest.mark.parametrize(("vocab_size", "order"), [(2, 12), (5, 6), (60, 4)])
def test_incremental_counts_equal_the_sorted_engine(vocab_size, order):
    rng = np.random.default_rng(vocab_size)
    x = torch.from_numpy(rng.integers(0, vocab_size, 400))
    x[200:260], x[300:320] = x[100:160], 1
    growing, table = ta.GrowingTable(vocab_size, order, len(x)), tg.NgramTable(vocab_size, order)
    every = torch.from_numpy(np.append(np.arange(vocab_size), -1))
    for t, token in enumerate(x.tolist()):
        if t % 5 == 1:
            contexts, expected = growing.contexts(x, t), table.candidates(x, t)
            found = growing.stats_of(contexts, every)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine[:, :-1], theirs), t
            assert not found.count[:, -1].any()
            assert set(growing.followers(contexts).tolist()) == set(expected.count[1].nonzero()[:, 0].tolist())
        growing.add(token)
    assert all(map(torch.equal, growing.columns, table.span(x, 0, len(x))))


@pytest.mark.parametrize("knobs", [{}, {"NGRAM_TILT_ENABLED": 1, "NGRAM_TILT_ORDER": 3}])
def test_mixed_distributions_sum_to_one_and_report_the_networks_share(knobs, tokenizer):
    lanes = open_tiny(load(**knobs), tokenizer).lanes(2, 80)
    rng = np.random.default_rng(0)
    for _ in range(80):
        p = lanes.dist()
        assert torch.allclose(p.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-9) and (p >= 0).all()
        share, match, seen = lanes.mixture(0)
        assert 0 <= share <= 1 and (share == 1) == (match < 1) and (match < 0 or seen > 0)
        assert (p[0] - share * lanes.network_p[0] > -1e-12).all(), "the rest is the n-gram's"
        lanes.take(rng.integers(2, 8, 2))


def test_edits_restore_what_normalisation_changes_and_cost_little(tokenizer):
    source = (HERE.parent / "train_gpt.py").read_bytes()[:30_000]
    normal, edits = tc.Normalizer(ta.TextTokens(tokenizer.sp)).split(source)
    assert "\n" not in normal and "  " not in normal and len(edits) > 300
    coder = tc.SymbolEncoder()
    tc.code_edits(coder, normal, edits)
    packed = coder.finish()
    assert tc.code_edits(tc.SymbolDecoder(packed), normal, None) == edits
    assert tc.restore_bytes(normal, edits) == source
    assert len(packed) < 0.012 * len(source), "newlines and indentation of code"


def test_frequencies_lose_less_than_a_thousandth():
    rng = np.random.default_rng(0)
    for size in (1024, 8192):
        coder = tc.SymbolEncoder()
        p = rng.dirichlet(np.full(size, 0.01), 400)
        for row in p:
            coder.code(row, int(rng.choice(size, p=row)))
        assert 8 * len(coder.finish()) < coder.bits * 1.001 + 64
    coder = tc.SymbolEncoder()
    coder.code(np.array([1.0, 1e-300]), 1)
    assert tc.SymbolDecoder(coder.finish()).code(np.array([1.0, 1e-300])) == 1, "every symbol keeps a floor"


def test_damage_and_strangers_are_refused(codec, sample_text):
    blob = codec.compress_text(sample_text[:2000].encode()).blob
    flipped = blob[:60] + bytes([blob[60] ^ 1]) + blob[61:]
    for bad in (b"", b"PK\3\4" + blob, blob[:-1], blob[:30], blob + b"x", flipped):
        with pytest.raises(tg.ArtifactError):
            codec.decompress(bad)
    other = tc.Codec(dataclasses.replace(codec.predictor, name="f" * 16))
    with pytest.raises(tg.ArtifactError, match="compressed with artifact 0123456789abcdef"):
        other.decompress(blob)
    other = tc.Codec(codec.predictor)
    other.machine = "2.0.0 cpu ABACUS"
    with pytest.raises(tg.ArtifactError, match="the arithmetic differs"):
        other.decompress(blob)


class FlatLanes:
    """Lanes whose every token is as likely as any other: decoding costs nothing but the coder."""

    def __init__(self, lanes: int) -> None:
        self.p = torch.full((lanes, 1024), 1 / 1024, dtype=torch.float64)

    def dist(self) -> torch.Tensor:
        return self.p

    def take(self, tokens: np.ndarray) -> None:
        pass


def forge(rng: random.Random, blob: bytes) -> bytes:
    """An edited compressed file with a valid checksum: header fields, bytes of the body, bytes of anything, a cut."""
    header, body = tc.read_file(blob)
    kind, data = rng.random(), bytearray(body)
    if kind < 0.3:
        field = rng.choice(header._fields[:7])
        header = header._replace(**{field: rng.choice([0, 1, 3, 255, 2**31, 2**55, 2**80, rng.randrange(900)])})
    elif kind < 0.7:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    blob = bytearray(tc.write_file(header, bytes(data))[:-4])
    if kind >= 0.7:
        blob[rng.randrange(5, len(blob))] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
    if kind > 0.95:
        del blob[rng.randrange(5, len(blob)) :]
    return bytes(blob) + struct.pack("<I", zlib.crc32(blob))


@pytest.mark.parametrize("form", ["text", "lzma", "stored"])
def test_forged_files_are_artifact_errors_and_nothing_else(form, codec, monkeypatch):
    """Thousands of files whose checksum is right: whatever they claim, one kind of error, soon and in little memory."""
    monkeypatch.setattr(ta.Predictor, "lanes", lambda _self, lanes, _length: FlatLanes(lanes))
    rng, data = random.Random(1), "  Ein Wort,\n\n\tｅin Satz\r\n und ﬁnis \xa0.\n".encode()
    packed = codec.compress_text(data) if form == "text" else codec.compress_bytes(data * (9 if form == "lzma" else 1))
    assert tc.FORMS[packed.header.form] == form
    header, body = tc.read_file(packed.blob)
    with pytest.raises(tg.ArtifactError, match="differ from the original's checksum"):
        codec.decompress(tc.write_file(header._replace(check=header.check ^ 1), body))
    refused = 0
    for _ in range(3000):
        try:
            codec.decompress(forge(rng, packed.blob))
        except tg.ArtifactError:
            refused += 1
    assert refused > 2000


@pytest.mark.parametrize("n", [0, 127, 128, 129, 16_383, 16_384, 2**31, 2**56 - 1])
def test_numbers_of_any_width_stand_in_a_file(n):
    header = tc.CodecHeader(2, n, n, n, n, n, n)
    assert tc.read_file(tc.write_file(header, b"body")) == (header, b"body")


def test_a_number_without_end_is_refused_at_once():
    head = tc.CODEC_MAGIC + bytes([tc.CODEC_VERSION]) + b"\xff" * 1_000_000
    with pytest.raises(tg.ArtifactError, match="inconsistent"):
        tc.read_file(head + struct.pack("<I", zlib.crc32(head)))


def test_settings_of_a_file_are_checked():
    loaded = tg.load_config({"MODE": "eval", "ARTIFACT": "x"}, {})
    assert tc.adopt_settings(loaded, '{"EVAL_STRIDE":16}').cfg.eval_stride == 16
    values = ('"EVAL_STRIDE":"x"', '"EVAL_STRIDE":[]', '"NGRAM_ORDER":1e99', '"SEED":2', '"GONE":1')
    for bad in ("[1]", "{", "[" * 100_000, "7", *(f"{{{value}}}" for value in values)):
        with pytest.raises(tg.ArtifactError, match="inconsistent"):
            tc.adopt_settings(loaded, bad)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer) -> Path:
    """An artifact of random weights."""
    cfg = load()
    model = tiny_model(cfg)
    stored = tg.quantize(
        cfg, {n: p.detach() for n, p in model.named_parameters()}, {n: p.store for n, p in model.named_parameters()}
    )
    path = tmp_path_factory.mktemp("artifact") / "tiny.pgz"
    path.write_bytes(tg.pack(cfg, tg.artifact_header(cfg, tokenizer), stored))
    return path


TOOLS = {"compress": tc, "decompress": tc, "sample": ts, "explain": te}


@pytest.fixture
def tool(artifact, capfd, monkeypatch):
    """tool(name, *arguments, **environment) -> (status, output): a tool's main in this process, with the artifact."""

    def call(name: str, *arguments, **env) -> tuple[int, str]:
        command = [name] if TOOLS[name] is tc else []
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for knob in tg.FIELDS:
                patch.delenv(knob, raising=False)
            for knob, value in {"DEVICE": "cpu", **env}.items():
                patch.setenv(knob, str(value))
            try:
                status = TOOLS[name].main([*command, *map(str, arguments), "--artifact", str(artifact)])
            except SystemExit as e:  # argparse
                status = e.code
        torch.set_num_threads(1)
        out = capfd.readouterr()
        return status, out.out + out.err

    return call


def test_files_go_through_the_command_line_and_back(tool, tmp_path, sample_text):
    data = b"def f(x):\n    return x\n\n" + sample_text[:1000].encode()
    source, packed, back = tmp_path / "a.txt", tmp_path / "a.txt.pgz", tmp_path / "b.txt"
    source.write_bytes(data)
    status, text = tool("compress", source, EVAL_STRIDE=16)
    assert status == 0 and ("form:text" in text or "form:lzma" in text)
    assert packed.stat().st_size == int(re.search(r"compressed_bytes:(\d+)", text)[1])
    status, text = tool("compress", source)
    assert status == 2 and "exists" in text and "--force" in text
    assert tool("compress", source, "--force", "--lanes", 1)[0] == 0
    status, text = tool("decompress", packed, "-o", back)
    assert status == 0 and back.read_bytes() == data
    status, text = tool("decompress", packed, "-o", tmp_path / "c", NUM_LAYERS=3)
    assert status == 2 and "NUM_LAYERS" in text
    packed.write_bytes(packed.read_bytes()[:-3])
    status, text = tool("decompress", packed, "-o", tmp_path / "c")
    assert status == 2 and text.count("error:") == 1 and "truncated" in text
    assert not (tmp_path / "c").exists()


def test_the_file_says_which_settings_it_was_coded_with(tool, tmp_path, monkeypatch, sample_text):
    monkeypatch.setattr(tc.Codec, "compress", tc.Codec.compress_text)
    source, packed = tmp_path / "a.txt", tmp_path / "a.txt.pgz"
    source.write_text(sample_text[:1500])
    assert tool("compress", source, EVAL_STRIDE=16, NGRAM_TILT_ENABLED=1)[0] == 0
    status, text = tool("decompress", packed, "-o", tmp_path / "b", EVAL_STRIDE=8)
    assert status == 2 and "EVAL_STRIDE=8: the file was coded with 16" in text
    assert tool("decompress", packed, "-o", tmp_path / "b")[0] == 0
    assert (tmp_path / "b").read_text() == sample_text[:1500]


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["compress", "/nowhere/a"], {}, "no such file"),
        (["compress"], {}, "required: FILE"),
        (["compress", __file__, "--lanes", "0"], {}, "'0' is not a number between 1 and 4096"),
        (["decompress", __file__], {}, "does not end in .pgz: name the file to write with -o"),
        (["decompress", __file__, "-o", "/nowhere/b"], {}, "not a compressed file"),
        (["compress", __file__, "-o", __file__], {}, "exists"),
        (["explain", __file__, "-o", str(HERE)], {}, "exists"),
        (["compress", __file__, "-o", "x"], {"TOKENIZER_PATH": "/nowhere/t.model"}, "TOKENIZER_PATH"),
        (["sample", "--temperature", "hot"], {}, "'hot' is not a number between 0 and 100"),
        (["sample"], {"WORLD_SIZE": "2"}, "runs in one process"),
        (["sample"], {"NGRAM_ORDER": "1"}, "NGRAM_ORDER=1"),
    ],
)
def test_mistakes_are_one_message(tool, arguments, env, words):
    status, text = tool(*arguments, **env)
    assert status == 2 and text.count("error:") == 1 and words in text and "Traceback" not in text


@pytest.mark.parametrize(("path", "words"), [("/nowhere/a.pgz", "no such file"), (__file__, "not an artifact")])
def test_an_artifact_that_is_none_is_one_message(path, words, capfd):
    assert ts.main(["--artifact", path]) == 2
    text = capfd.readouterr().err
    assert text.count("error:") == 1 and text.startswith("error: --artifact=") and words in text


HELP = """
import runpy, sys
paths, start = sys.argv[1:], list(sys.path)
for path in paths:  # each as in a fresh interpreter, but for torch, whose import takes seconds
    sys.path[:], sys.argv = start, [path, "--help"]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tools", "train_gpt", "text", "caseops")]:
        del sys.modules[name]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""


def test_each_tool_runs_from_any_folder_and_explains_itself(tmp_path):
    names = ("codec", "sample", "explain", "plan")
    paths = [Path(tc.__file__).with_name(f"{name}.py") for name in names]
    done = subprocess.run([sys.executable, "-c", HELP, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("status 0") == done.stdout.count("usage:") == 4, done.stderr
    assert all(f"python tools/{name}.py" in done.stdout for name in names)


def test_samples_follow_the_seed(tool):
    arguments = ("--prompt", "The parser", "--tokens", 24)
    first, second = (tool("sample", *arguments, SEED=5)[1] for _ in range(2))
    assert first == second and first.startswith("The parser") and len(first) > 20
    assert tool("sample", *arguments, SEED=6)[1] != first
    greedy = [tool("sample", *arguments, "--temperature", 0, SEED=s)[1] for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_sample_from_nothing_writes_something(tool):
    assert len(tool("sample", "--tokens", 8, SEED=3)[1].strip()) > 0


def test_samples_may_use_their_own_ngrams(tool):
    arguments = ("--prompt", prompt := "one two one two one two one", "--tokens", 30, "--temperature", 0)
    alone, mixed = (tool("sample", *arguments, *flag)[1] for flag in ([], ["--ngram"]))
    assert "one two one two" in mixed[len(prompt) :] and alone != mixed


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    p = torch.tensor([0.1, 0.5, 0.3, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = {ts.choose_token(p, 1.0, 0.7, generator) for _ in range(200)}
    assert drawn == {1, 2}
    assert {ts.choose_token(p, 1.0, 0.01, generator) for _ in range(20)} == {1}
    counts = np.bincount([ts.choose_token(p, 1.0, 1.0, generator) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - p.numpy()).max() < 0.03


def test_explained_tokens_add_up_to_the_codes_bits(codec, sample_text):
    data = sample_text[:700]
    (notes,) = te.explain_documents(codec.predictor, [data], 10_000)
    assert "".join(n.text for n in notes) == data
    single = tc.Codec(codec.predictor, 1)
    assert sum(n.bits for n in notes) == pytest.approx(single.compress_text(data.encode()).ideal, rel=1e-6)
    for n in notes:
        mixed = n.network_share * 2**-n.network_bits + (1 - n.network_share) * 2**-n.ngram_bits
        assert mixed == pytest.approx(2**-n.bits, rel=1e-6)
        assert [p for _, p in n.likely] == sorted((p for _, p in n.likely), reverse=True)
        assert all(s != n.piece or p == pytest.approx(2**-n.bits) for s, p in n.likely)


def test_explained_text_is_the_original_with_its_newlines(codec):
    data = '\n  def f(x):\n\treturn x… "½"  # 🙂 中\n'
    (notes,) = te.explain_documents(codec.predictor, [data], 10_000)
    assert "".join(n.text for n in notes) == data
    assert len(te.explain_documents(codec.predictor, [data, data], 5)[0]) == 5
    assert len(te.explain_documents(codec.predictor, [data, data], 5)) == 1
    assert re.sub(r"\033\[[\d;]*m", "", te.terminal_text(notes)) == data


def test_what_is_not_explained_is_said(codec, monkeypatch):
    said = []
    monkeypatch.setattr(codec.predictor.run, "notice", said.append)
    whole = len(te.explain_documents(codec.predictor, ["one two three four"], 10_000)[0])
    assert not said and not te.explain_documents(codec.predictor, ["", " "], 9) and not said
    assert [
        len(notes) for notes in te.explain_documents(codec.predictor, ["one two three four", "", "five", "six"], whole)
    ] == [whole]
    assert len(said) == 1 and re.match(rf"--tokens={whole}: 0 of \d tokens of document 3 ", said[0])


def test_the_page_stands_alone(tool, tmp_path, sample_text):
    source = tmp_path / "two.jsonl"
    source.write_text("\n".join(json.dumps({"text": t}) for t in ("A <b>bold</b> </script> try.", sample_text[:300])))
    status, text = tool("explain", source)
    page = (tmp_path / "two.jsonl.html").read_text()
    assert status == 0 and text.count("document ") == 2
    assert page.count("</script>") == 1 and "http" not in page and "<b>bold" not in page
    rows = json.loads(re.search(r"const DOCUMENTS = (.*?);\n", page)[1])
    assert [r["name"] for r in rows] == ["document 1", "document 2", "all"]
    assert "".join(n[0] for n in rows[0]["notes"]) == "A <b>bold</b> </script> try."
    assert rows[2]["totals"]["bits"] == pytest.approx(sum(r["totals"]["bits"] for r in rows[:2]))
    assert tool("explain", source)[0] == 2, "the page exists"
    source.write_text("{}")
    assert "jsonl" in tool("explain", source, "--force")[1]


@pytest.mark.parametrize("ranks", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "x"}, {"RANK": "", "WORLD_SIZE": "8"}])
def test_rank_variables_of_another_job_are_one_message(tool, ranks):
    status, text = tool("sample", "--tokens", 1, **ranks)
    assert status == 2 and text.startswith("error: ") and "WORLD_SIZE" in text


def test_what_is_no_utf8_is_refused_or_escaped_and_a_full_disk_is_no_mistake(tool, artifact, tmp_path, monkeypatch):
    status, text = tool("sample", "--prompt", "a\udcff")
    assert status == 2 and "not UTF-8 at character 2" in text
    program = Path(ta.__file__).with_name("sample.py")
    command = [sys.executable, program, "--artifact", artifact, "--prompt", "\xe9", "--tokens", 1]
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii", "DEVICE": "cpu"}
    done = subprocess.run([*map(str, command)], capture_output=True, env=environment)
    assert (done.returncode, done.stdout[:4]) == (0, rb"\xe9"), done.stderr

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg, "atomic_write", full)
    (tmp_path / "a.txt").write_text("some text\n")
    status, text = tool("explain", tmp_path / "a.txt")
    assert status == 1 and text.splitlines()[-1] == "error: [Errno 28] No space left on device"


def test_codec_benchmark_measures_the_stages_that_it_names(monkeypatch, capsys):
    """Seconds stand for stages here: a line's tokens a second tell which one was coded."""
    predictor = SimpleNamespace(cfg=None, model=None, lanes=lambda _count, _steps, stage: stage)
    monkeypatch.setattr(bench, "random_predictor", lambda _threads: predictor)
    monkeypatch.setattr(bench, "time_steps", lambda stage, *_: ({"sliding": 1.0, "ngram": 2.0}[stage],) * 2)
    monkeypatch.setattr(bench, "time_recompute", lambda *_: (1.0, 1.0))
    bench.speed(1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[1] in ("ngram", "none")]
    assert lines == [[str(n), name, *[f"{640 * n / s:.0f}"] * 2] for n in (1, 8, 16, 32, 64)
                     for name, s in (("none", 1), ("ngram", 2))]  # fmt: skip
