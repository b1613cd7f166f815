"""The score's bytes are those of the text, for every SentencePiece model: counted exactly as decoded, or refused."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import sentencepiece
from conftest import BOS, SCRIPT, config, documents, write_shard

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
    check = tg.bytes_check(text, tokenizer)
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
        assert tg.bytes_check(text, tokenizer).passed
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
    check = tg.bytes_check(validation(tokenizer, tmp_path, [*TEXTS, *SPECIAL], tiny), tokenizer)
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
        monkeypatch.setattr(tg, "AUDIT_TOKENS", n)
        assert tg.bytes_check(text, tokenizer).passed
    text.bytes[20] += 1
    assert not tg.bytes_check(text, tokenizer).passed


def test_a_stream_without_text_has_no_score(data, tmp_path, tiny, script):
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS] * 100)
    result = script(tiny, DATA_PATH=tmp_path, TOKENIZER_PATH=data.tokenizer)
    assert result.status == 2 and "the 100 validation tokens hold no byte of text" in result.err


def test_fields_of_a_protocol_buffer_are_found():
    blob = bytes([0x08, 0x96, 0x01, 0x12, 3]) + b"abc" + bytes([0x1D]) + b"4444" + bytes([0x21]) + b"88888888"
    assert tg.proto_field(blob, 2) == b"abc" and tg.proto_field(blob, 7) == b""
    assert tg.proto_field(blob, 3) == b"4444" and tg.proto_field(b"", 1) == b""
