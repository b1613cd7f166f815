"""data/caseops.py: case comes out and goes back in, for all text, and nothing else is accepted."""

from __future__ import annotations

import itertools
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import caseops  # noqa: E402

T, A, C, E = caseops.OPERATORS
LETTERS = "abcxyzABCXYZ" + caseops.OPERATORS
TEXT = st.one_of(
    st.text(),  # all planes, no surrogates
    st.text(alphabet=LETTERS),
    st.text(alphabet=st.one_of(st.sampled_from(LETTERS), st.sampled_from(" .\n0_'\u2581éÉßΑﬁ™Ｋ\u0131\u212a\u0331😀\ue000\ue005"))),
)  # fmt: skip


@pytest.mark.parametrize("text, stream", [
    ("", ""),
    ("all lower 123", "all lower 123"),
    ("The End.", f"{T}the {T}end."),
    ("I am A", f"{T}i am {T}a"),
    ("NASA, US", f"{A}nasa, {A}us"),
    ("iPhone", f"i{C}phone"),
    ("McDonald", f"{T}mc{C}donald"),
    ("ABc", f"{T}a{C}bc"),
    ("ABcD", f"{T}a{C}bc{C}d"),
    ("aB", f"a{C}b"),
    ("aBC", f"a{C}b{C}c"),
    ("it's O'Neil-Smith_X", f"it's {T}o'{T}neil-{T}smith_{T}x"),
    ("ÉCOLE Étude", f"É{A}cole Étude"),  # letters that are no ASCII end a run and stay
    ("caféX", f"café{T}x"),
    ("x2Y", f"x2{T}y"),
    (f"{T}", f"{E}{T}"),
    (f"a{C}B{E}{A}CD", f"a{E}{C}{T}b{E}{E}{E}{A}{A}cd"),
])  # fmt: skip
def test_the_rules_are_those_of_the_published_transform(text, stream):
    assert caseops.encode(text) == stream
    assert caseops.decode(stream) == text == caseops.decode(stream, strict=False)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_all_text_comes_back(text):
    stream = caseops.encode(text)
    assert caseops.decode(stream) == text == caseops.decode(stream, strict=False)
    assert not any("A" <= character <= "Z" for character in stream)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_a_stream_is_refused_or_is_what_encode_writes(stream):
    try:
        text = caseops.decode(stream)
    except ValueError as error:
        assert "of the stream" in str(error)
    else:
        assert caseops.encode(text) == stream


def test_every_short_text_and_stream():
    """The two properties again, for all strings up to five characters of an alphabet that holds every case."""
    for length in range(6):
        for characters in itertools.product("aA." + caseops.OPERATORS, repeat=length):
            string = "".join(characters)
            assert caseops.decode(caseops.encode(string)) == string
            try:
                text = caseops.decode(string)
            except ValueError:
                continue
            assert caseops.encode(text) == string


def test_characters_of_every_plane_come_back_between_letters():
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 13)]  # other planes: one in 13
    characters = map(chr, codes)
    text = "aB".join(characters)
    assert caseops.decode(caseops.encode(text)) == text


@pytest.mark.parametrize("stream, at", [
    ("x Y", 2), (f"x {T}", 2), (f"x {T} a", 2), (f"ab{T}c", 2), (f"{T}{T}a", 0), (f"{A}a b", 0), (f"{A}", 0),
    (f"x{A}ab", 1), (f"{A}ab{C}c", 0), (f"{C}a", 0), (f" {C}a", 1), (f"a{C}", 1), (f"a{C}B", 1), (f"{T}a{C}b", 0),
    (f"{T}a{C}b{C}c.", 0), (f"{E}", 0), (f"a{E}b", 1), (f"{E}{E}{E}", 2), (f"{E}{T}{C}a", 2), ("é" * 70 + "Z", 70),
])  # fmt: skip
def test_a_malformed_stream_is_refused_with_its_offset(stream, at):
    with pytest.raises(ValueError, match=f"^character {at} of the stream: "):
        caseops.decode(stream)


@pytest.mark.parametrize("stream, text", [
    (f"{T}the TM {A}nasa sign", "The TM NASA sign"),  # what NFKC made of a sign afterwards stays
    (f"{T}\u1e96", "\u1e96"),  # an operator that lost its letter is left out
    (f"x{T}y {A} {C}", "xY  "),
    (f"{E}{T} {E}x{E}", "\ue001 x"),
    (f"{A}nasaTM", "NASATM"),
])  # fmt: skip
def test_streams_that_were_normalised_afterwards_are_read_all_the_same(stream, text):
    assert caseops.decode(stream, strict=False) == text


def test_normalising_is_that_of_a_tokenizer_of_the_rule_nmt_nfkc():
    assert caseops.normalize("  a™b \u2581 ＡＢ\tﬁ\n\nx\u200b \x01y ") == "aTMb AB fi x y"
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(ROOT / "data" / "sample" / "tokenizer_1024.model"))
    blocks = ["".join(map(chr, range(i, i + 256))) for i in range(0, 0xD800, 256)]
    for text in [*blocks, *(" ".join(block) for block in blocks)]:
        assert caseops.normalize(text) == model.normalize(text).replace(caseops.SPACE, " ")


def test_normalising_comes_first_because_it_does_not_keep_the_stream():
    text = "H\u0331"  # no composed form; small h with this bar has one
    stream = caseops.encode(caseops.normalize(text))
    assert caseops.normalize(stream) != stream
    assert caseops.decode(stream) == text == unicodedata.normalize("NFKC", text)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"character 2: half a surrogate pair \(U\+D800\)"):
        caseops.normalize("ab\ud800")


def test_bytes_of_tokens_are_those_of_the_original_text():
    pieces = ["<s>", "▁", T, A, C, E, "▁" + T, "the", "▁the", "ab", T + "x"]
    operators = caseops.operators_of(pieces)
    assert operators.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]
    stream = np.array([0, 2, 7, 6, 9, 1, 5, 2, 5, 5, 1, 5, 5, 2, 7, 10])  # The Ab E001 E004 ␣ E004 The X
    counted = np.array([0, 3, 3, 4, 2, 1, 3, 3, 3, 3, 1, 3, 3, 3, 3, 4])
    expected = [0, 0, 3, 1, 2, 1, 0, 3, 0, 3, 1, 0, 3, 0, 3, 1]
    assert caseops.original_bytes(stream, counted, operators, 5).tolist() == expected


def test_it_stands_alone():
    """A submission ships it beside its script: no torch, no other module of ours, under either name."""
    code = "import sys; import data.caseops; sys.path.insert(0, 'data'); import caseops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert len((ROOT / "data" / "caseops.py").read_bytes()) < 10_000
