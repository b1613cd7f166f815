"""The score's bytes are those of the text, for every SentencePiece model: counted exactly as decoded, or refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import BOS, SCRIPT, config, documents, events, write_shard

import train_gpt as tg

sys.path.append(str(SCRIPT.parent / "data"))
import make_shards
import shards

TEXTS = [
    *documents(3, 40),
    "Two  spaces,   three, and a tab\tor\nlines with RIVER and River",
    "x\u2581y holds a literal lower block, <x> a marker, 0123456789 digits",
    "ends with spaces   ",
    "a",
]
SPECIAL = [
    "emoji 😀 and accents é",
    "日本語 text",
    "ﬁ ligature, full width ＡＢＣ",
    " starts with a space",
    "   with three of them",
]
SUFFIX = {"treat_whitespace_as_suffix": True}
BARE, KEEP, ACROSS = {"add_dummy_prefix": False}, {"remove_extra_whitespaces": False}, {"split_by_whitespace": False}
SETTINGS = {
    "bpe": {},
    "bpe, no dummy prefix": BARE,
    "space as suffix": {**SUFFIX, **BARE},
    "extra spaces kept": KEEP,
    "extra spaces kept, no dummy prefix": {**KEEP, **BARE},
    "extra spaces kept, space as suffix": {**KEEP, **SUFFIX, **BARE},
    "pieces across spaces": {**ACROSS, "vocab_size": 600},
    "pieces across spaces, extra spaces kept": {**ACROSS, **KEEP, "vocab_size": 600},
    "pieces across spaces, space as suffix": {**ACROSS, **SUFFIX, **BARE, "vocab_size": 600},
    "pieces of spaces": {"allow_whitespace_only_pieces": True, **KEEP, "vocab_size": 600},
    "not normalised": {"normalization_rule_name": "identity", **KEEP, **BARE},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "rules of one's own": {"normalization_rule_tsv": "61 70 70\t41 20 42\n"},
    "unigram": {"model_type": "unigram"},
    "unigram across spaces, as suffix": {"model_type": "unigram", **ACROSS, **SUFFIX, **BARE},
    "user's pieces": {"user_defined_symbols": ["▁River", "<x>", "  ", "x▁y", "▁▁▁", "\ue001", "▁\ue001"], **BARE},
    "user's pieces, dummy prefix": {"user_defined_symbols": ["▁River", "<x>", "d▁", "▁"]},
    "control pieces": {"control_symbols": ["<sep>", "▁<mask>"]},
    "unigram, user's pieces, spaces kept": {"model_type": "unigram", "user_defined_symbols": ["▁▁", "r▁"], **KEEP},
}
LOSSY = {"char": {"model_type": "char"}, "word": {"model_type": "word", "vocab_size": 40}, "bpe": {"vocab_size": 120}}
REFUSED = {
    "dummy suffix": (SUFFIX, "decoding leaves the space that encoding adds"),
    "dummy suffix, extra spaces kept": ({**SUFFIX, **KEEP}, "decoding leaves the space that encoding adds"),
    "denormalizer": ({"denormalization_rule_tsv": "61 70\t41\n"}, "its denormalization rules rewrite decoded text"),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(settings) -> the path of a SentencePiece model of a few kB of text."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def call(settings: dict):
        key = json.dumps(settings)
        if key not in made:
            values = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
                      "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False, **settings}  # fmt: skip
            for name in [name for name in values if name.endswith("_tsv")]:
                rules = folder / f"{len(made)}.tsv"
                rules.write_text(values[name])
                values[name] = str(rules)
            blob = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=blob, **values)
            made[key] = folder / f"{len(made)}.model"
            made[key].write_bytes(blob.getvalue())
        return made[key]

    return call


def tokenizer_of(path) -> tg.Tokenizer:
    return tg.Tokenizer(path, sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())


def validation(tokenizer: tg.Tokenizer, folder, texts: list[str], tiny) -> tg.ValidationText:
    """The validation text of documents as the tokenizer encodes them, as a run loads it."""
    tokens = [i for text in texts for i in [BOS, *tokenizer.sp.encode(text)]]
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    cfg = config(tiny, DATA_PATH=folder, VOCAB_SIZE=tokenizer.sp.vocab_size(), TOKENIZER_PATH=tokenizer.path)
    return tg.load_validation(cfg, folder, tokenizer)


def test_documents_begin_with_id_1(train):
    with pytest.raises(tg.ConfigError, match="has BOS at 2; documents begin with id 1"):
        tokenizer_of(train({"bos_id": 2, "eos_id": 1}))


def published_rule(sp, _name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The challenge's own accounting: one leading space, every other letter as it stands in the piece."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(len(pieces))])
    lengths = [1 if sp.is_byte(i) else len(piece.removeprefix("▁").encode()) for i, piece in enumerate(pieces)]
    spaced = np.array([piece.startswith("▁") for piece in pieces]) & ~boundary
    return np.where(boundary, 0, lengths), spaced, boundary


@pytest.mark.parametrize("name", SETTINGS)
def test_every_model_is_counted_as_it_decodes(name, train, tmp_path, tiny):
    tokenizer = tokenizer_of(train(SETTINGS[name]))
    sp = tokenizer.sp
    for text in [*TEXTS, *SPECIAL]:
        ids = sp.encode(text)
        assert tokenizer.count_bytes(np.array([BOS, *ids])).sum() == len(sp.decode(ids).encode()), text
    text = validation(tokenizer, tmp_path, [*TEXTS, *SPECIAL], tiny)
    assert int(text.bytes.sum()) == sum(len(sp.decode(sp.encode(t)).encode()) for t in [*TEXTS, *SPECIAL])
    check = tg.bytes_check(text, tokenizer, True)
    assert check.passed, check.detail


@pytest.mark.parametrize("name", SETTINGS)
def test_make_shards_counts_what_the_trainer_counts(name, train):
    path = train(SETTINGS[name])
    encoder, tokenizer = make_shards.Encoder(path.read_bytes(), path.name), tokenizer_of(path)
    for text in [*TEXTS, *SPECIAL]:
        try:
            encoded = encoder.encode(make_shards.Document(text, "here"))
        except shards.InputError as error:
            assert "does not give this document back" in str(error), text
            assert "\u2581" in text, text  # normalisation takes a literal U+2581 for a space
            continue
        assert np.array_equal(tokenizer.count_bytes(encoded.tokens), encoded.bytes[1:]), text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_counted_is_refused_by_both(name, train):
    settings, words = REFUSED[name]
    path = train(settings)
    with pytest.raises(tg.ConfigError, match=words) as error:
        tokenizer_of(path)
    assert f"TOKENIZER_PATH={path}" in str(error.value)
    with pytest.raises(shards.InputError, match=words) as error:
        make_shards.Encoder(path.read_bytes(), path.name)
    assert path.name in str(error.value)


@pytest.mark.parametrize("name", LOSSY)
def test_a_text_with_lost_characters_is_refused_by_both(name, train, tmp_path, tiny):
    path = train({"byte_fallback": False, **LOSSY[name]})
    tokenizer, encoder = tokenizer_of(path), make_shards.Encoder(path.read_bytes(), path.name)
    known = [t for t in TEXTS if tokenizer.sp.unk_id() not in tokenizer.sp.encode(t)]
    if known:
        text = validation(tokenizer, tmp_path, known * 40, tiny)
        assert tg.bytes_check(text, tokenizer, True).passed
    with pytest.raises(tg.ConfigError, match="'<unk>', whose text is lost"):
        validation(tokenizer, tmp_path, [*TEXTS, *SPECIAL], tiny)
    with pytest.raises(shards.InputError, match="does not give this document back"):
        encoder.encode(make_shards.Document(SPECIAL[0], "here"))


@pytest.mark.parametrize(
    "name", ["space as suffix", "pieces across spaces", "extra spaces kept, no dummy prefix", "pieces of spaces"]
)
def test_the_audit_finds_the_published_accounting_wrong(name, train, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(tg, "piece_bytes", published_rule)
    tokenizer = tokenizer_of(train(SETTINGS[name]))
    check = tg.bytes_check(validation(tokenizer, tmp_path, [*TEXTS, *SPECIAL], tiny), tokenizer, True)
    assert not check.passed and check.name == "bytes are the text's" and "in the text" in check.detail


def test_the_challenge_s_tokenizers_keep_their_published_numbers(train):
    paths = [tg.SAMPLE_DIR / "tokenizer_1024.model", train({**BARE, "split_digits": True}), train({})]
    for path in paths:
        sp = tokenizer_of(path).sp
        for ours, published in zip(tg.piece_bytes(sp, ""), published_rule(sp, ""), strict=True):
            assert np.array_equal(ours, published), path


def test_the_audit_s_cut_may_lie_within_a_character(train, tmp_path, tiny, monkeypatch):
    tokenizer = tokenizer_of(train(BARE))
    text = validation(tokenizer, tmp_path, ["a 😀😀😀 b"] * 40, tiny)
    for n in range(1, 40):
        monkeypatch.setattr(tg, "DECODED_TOKENS", n)
        assert tg.bytes_check(text, tokenizer, True).passed
    text.bytes[20] += 1
    assert not tg.bytes_check(text, tokenizer, True).passed


def test_a_stream_without_text_has_no_score(data, tmp_path, tiny, script):
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS] * 100)
    result = script(tiny, DATA_PATH=tmp_path, TOKENIZER_PATH=data.tokenizer)
    assert result.status == 2 and "the 100 validation tokens hold no byte of text" in result.err


def test_fields_of_a_protocol_buffer_are_found():
    blob = bytes([0x08, 0x96, 0x01, 0x12, 3]) + b"abc" + bytes([0x1D]) + b"4444" + bytes([0x21]) + b"88888888"
    assert tg.proto_field(blob, 2) == b"abc" and tg.proto_field(blob, 7) == b""
    assert tg.proto_field(blob, 3) == b"4444" and tg.proto_field(b"", 1) == b""


# ---- CaseOps: the bytes of the original text


OPERATORS = ["\ue001", "\ue002", "\ue003", "\ue004"]
CASED = [
    "The River NASA sent to an iPhone, McDonald's A and OK",
    "no capitals at all",
    "literal \ue001 and \ue004\ue004 and \ue002x operators",
    "ÄRGER Übermut 😀 Stone",
    *documents(5, 30),
]
OWN = {"normalization_rule_name": "identity", **KEEP, **BARE}
CASE_SETTINGS = {
    "own": {"user_defined_symbols": [*OPERATORS, *("▁" + c for c in OPERATORS[:3])], **OWN},
    "own, not fused": {"user_defined_symbols": OPERATORS, **OWN},
    "published": {"user_defined_symbols": OPERATORS, **BARE},
}


def factor_case(text: str) -> str:
    """CaseOps as the challenge's data have it, a letter at a time."""

    def factor(match: re.Match) -> str:
        run = match[0]
        if run.isupper() and len(run) > 1:
            return OPERATORS[1] + run.lower()
        letters = [OPERATORS[2 if i else 0] + c.lower() if c.isupper() else c for i, c in enumerate(run)]
        return "".join(letters)

    return re.sub("[A-Za-z]+", factor, re.sub("([\ue001-\ue004])", "\ue004\\1", text))


class Cased(NamedTuple):
    """A folder of CaseOps shards with its sidecar."""

    folder: Path
    tokenizer: tg.Tokenizer
    tokens: np.ndarray
    sidecar: np.ndarray

    def write(self, sidecar) -> None:
        half = len(self.tokens) // 2
        for k, part in enumerate((sidecar[:half], sidecar[half:])):
            write_shard(self.folder / f"fineweb_val_bytes_00000{k}.bin", part)

    def load(self, tiny, **changes) -> tg.ValidationText:
        cfg = config(tiny, VOCAB_SIZE=self.tokenizer.sp.vocab_size(), **changes)
        return tg.load_validation(cfg, self.folder, self.tokenizer)

    def refusal(self, tiny, sidecar=None, **changes) -> str:
        if sidecar is not None:
            self.write(sidecar)
        with pytest.raises(tg.ConfigError) as error:
            self.load(tiny, **changes)
        return str(error.value)


@pytest.fixture
def cased(train, tmp_path):
    """cased(settings' name, manifest or not) -> shards of CASED."""

    def call(name: str, manifest: bool = True) -> Cased:
        path = shutil.copy(train(CASE_SETTINGS[name]), tmp_path / "my.model")
        tokenizer = tg.Tokenizer(path, tokenizer_of(path).sp.vocab_size(), "caseops" if manifest else None)
        tokens = np.array([i for text in CASED for i in [BOS, *tokenizer.sp.encode(factor_case(text))]])
        half = len(tokens) // 2
        for k, part in enumerate((tokens[:half], tokens[half:])):
            write_shard(tmp_path / f"fineweb_val_00000{k}.bin", part)
        write_shard(tmp_path / "fineweb_train_000000.bin", tokens[::-1])  # other documents
        about = {
            "format": tg.MANIFEST_FORMAT,
            "transform": "caseops",
            "tokenizer": {"file": "my.model", "sha256": tokenizer.sha256},
        }
        if manifest:
            (tmp_path / "manifest.json").write_text(json.dumps(about))
        made = Cased(tmp_path, tokenizer, tokens, np.concatenate([[0], tokenizer.count_bytes(tokens)]))
        made.write(made.sidecar)
        return made

    return call


@pytest.mark.parametrize("name", CASE_SETTINGS)
def test_case_is_restored_and_counts_the_original_bytes(name, cased, tiny):
    data = cased(name)
    starts = [*np.flatnonzero(data.tokens == BOS), len(data.tokens)]
    for text, lo, hi in zip(CASED, starts, starts[1:], strict=False):
        assert data.tokenizer.decode(data.tokens[lo:hi]) == (text, 0)
        assert data.sidecar[lo:hi].sum() == len(text.encode()), text
    for changes in ({}, {"VAL_BYTES": "sidecar"}, {"VAL_BYTES": "tokenizer"}):
        text = data.load(tiny, **changes)
        assert int(text.bytes.sum()) == sum(len(t.encode()) for t in CASED)
        assert text.bytes_from == changes.get("VAL_BYTES", "sidecar")
        assert tg.bytes_check(text, data.tokenizer, True).passed
    cut = data.load(tiny, VAL_TOKENS=100)
    assert np.array_equal(cut.bytes, data.sidecar[:100]) and not cut.complete


def test_a_fused_marker_has_the_one_byte_of_its_space(cased):
    data = cased("own")
    fused = data.tokenizer.sp.piece_to_id("▁" + OPERATORS[0])
    assert fused in data.tokens and set(data.sidecar[data.tokens == fused]) == {1}
    assert set(data.sidecar[data.tokens == data.tokenizer.sp.piece_to_id(OPERATORS[0])]) == {0, 3}  # 3: as text


@pytest.mark.parametrize("manifest", [True, False])
def test_a_sidecar_of_other_shards_is_refused(manifest, cased, tiny):
    data = cased("own", manifest)
    where = {piece: np.flatnonzero((data.tokens == data.tokenizer.sp.piece_to_id(piece)) & (data.sidecar < 2)) for piece in
             (OPERATORS[0], "▁" + OPERATORS[0], "<s>")}  # fmt: skip
    for piece, at in where.items():
        wrong = data.sidecar.copy()
        wrong[at[-1]] += 1
        assert f"gives {wrong[at[-1]]} bytes to validation token {at[-1]}, {piece!r}" in data.refusal(tiny, wrong)
    for length in (data.sidecar[:-1], [*data.sidecar, 1]):
        assert " numbers for the " in data.refusal(tiny, length)
    assert "bytes to validation token" in data.refusal(tiny, np.roll(data.sidecar, 1))
    data.write(data.sidecar)
    extra = write_shard(data.folder / "fineweb_val_bytes_000002.bin", [1])
    assert f"{extra}: has no shard" in data.refusal(tiny)
    extra.unlink()
    gone = data.folder / "fineweb_val_bytes_000001.bin"
    gone.unlink()
    assert f"{gone}: is missing beside its shard" in data.refusal(tiny)
    (data.folder / "fineweb_val_bytes_000000.bin").unlink()
    assert f"VAL_BYTES=sidecar: {data.folder} has no fineweb_val_bytes_*.bin" in data.refusal(tiny, VAL_BYTES="sidecar")
    assert data.load(tiny).bytes_from == "tokenizer"


def test_sums_are_exact_in_our_sets_and_close_in_published_ones(cased, tiny):
    data = cased("published", manifest=False)
    words = np.flatnonzero((data.tokenizer.operators[data.tokens] == 0) & (data.sidecar > 0))
    total = data.sidecar.sum()
    most = int(tg.SIDECAR_TOLERANCE * total)
    for step in (-1, 1):
        close, far = data.sidecar.copy(), data.sidecar.copy()
        close[words[5 : 5 + most]] += step
        far[words[: most + 1]] += step
        data.write([7, *close[1:]])  # what stands for the first token is no target's
        text = data.load(tiny)
        assert np.array_equal(text.bytes, close) and text.bytes_from == "sidecar"
        assert [tg.bytes_check(text, data.tokenizer, exact).passed for exact in (True, False)] == [False, True]
        words_of_it = f"{total + step * (most + 1)} bytes in the sidecar, {total} in the decoded text"
        assert words_of_it in data.refusal(tiny, far)
        assert not tg.bytes_check(text._replace(bytes=torch.from_numpy(far)), data.tokenizer, False).passed
    ours = cased("published")
    close[words[-5 - most : -5]] -= 1  # the total is right, two documents are not
    assert "bytes to document 0, at token 0, whose text has" in ours.refusal(tiny, close)


def test_operators_out_of_place_are_found(cased, tiny):
    data = cased("own")
    tokens = data.tokens.copy()
    title = data.tokenizer.sp.piece_to_id(OPERATORS[0])
    tokens[np.flatnonzero(tokens == title)[0] + 1] = title
    text = data.load(tiny)._replace(tokens=torch.from_numpy(tokens))
    check = tg.bytes_check(
        text._replace(bytes=torch.from_numpy(np.concatenate([[0], data.tokenizer.count_bytes(tokens)]))),
        data.tokenizer,
        True,
    )
    assert not check.passed and "1 operators out of place" in check.detail


def test_a_run_on_caseops_says_what_it_counted(cased, tiny, script, tmp_path, monkeypatch):
    data = cased("own")
    document = torch.from_numpy(data.tokens[: np.flatnonzero(data.tokens == 1)[1]])
    assert data.tokenizer.operators[document].any()
    monkeypatch.setattr(tg, "sample_text", lambda *_: document[None])
    env = {**tiny, "DATA_PATH": str(data.folder), "EVAL_STRIDE": "0", "ITERATIONS": "1", "NGRAM_SCORE": "off"}
    del env["VOCAB_SIZE"]
    result = script(env)
    assert result.status == 0 and "bytes_from:sidecar transform:caseops" in result.out
    assert f"sample: {data.tokenizer.decode(document[1:].numpy())[0]!r}" in result.out  # original text, case restored
    facts = events(env, "run")[0]
    assert facts["data"]["bytes_from"] == "sidecar" and facts["data"]["transform"] == "caseops"
    assert facts["data"]["val_bytes"] == data.sidecar.sum()
    assert facts["tokenizer"]["vocab_size"] == data.tokenizer.sp.vocab_size()
    artifact = tmp_path / "logs" / "tiny.pgz"
    header, blob = tg.read_header(artifact.read_bytes())[0], artifact.read_bytes()
    assert header["transform"] == "caseops"
    audited = script({**env, "MODE": "audit", "ARTIFACT": str(artifact), "RUN_ID": "audited"})
    assert audited.status == 0 and "counted by the sidecar" in audited.out
    (data.folder / "manifest.json").write_text((data.folder / "manifest.json").read_text().replace("caseops", ""))
    again = {**env, "MODE": "eval", "RUN_ID": "again"}
    result = script({**again, "ARTIFACT": str(artifact), "VAL_BYTES": "tokenizer"})
    assert result.status == 2
    assert "made for text that went through caseops, these data went through nothing" in result.err
    (data.folder / "manifest.json").write_text(
        (data.folder / "manifest.json").read_text().replace('"transform": ""', '"transform": "rot13"')
    )
    result = script({**again, "ARTIFACT": str(artifact)})
    assert result.status == 2 and "manifest.json: its text went through 'rot13'" in result.err
    unknown = tmp_path / "unknown.pgz"
    unknown.write_bytes(
        tg.pack(
            config(env, VOCAB_SIZE=300),
            {**{k: header[k] for k in ("config", "tokenizer_sha256")}, "transform": "rot13"},
            tg.unpack(blob, tg.model_layout(config(env, VOCAB_SIZE=facts["tokenizer"]["vocab_size"]), blob))[1],
            {},
        )
    )
    result = script({**again, "ARTIFACT": str(unknown)})
    assert result.status == 2 and f"ARTIFACT={unknown}: its text went through 'rot13'" in result.err


def test_caseops_needs_its_operators_as_pieces(train):
    path = train({})
    with pytest.raises(tg.ConfigError, match="lacks CaseOps' U\\+E001 to U\\+E004; name the data's tokenizer"):
        tg.Tokenizer(path, tokenizer_of(path).sp.vocab_size(), "caseops")
