"""Case factored out of text and back: "The NASA iPhone" becomes TITLE the ALLCAPS nasa iCAPNEXTphone, all in lower case.

    stream = encode(normalize(text))
    decode(stream) == normalize(text)

So a tokenizer needs one piece for the, The and THE. Operators are four characters for private use; they act on runs of
ASCII letters and leave other letters alone. `encode` and strict `decode` are a bijection of all text onto the streams
that `encode` writes.

Text is normalised before it is encoded, and its tokenizer is trained with SentencePiece's rule "identity". Published
tokenizers normalise afterwards: NFKC then turns a sign into capital letters, or h and a bar below into one character
where H and that bar are two. Such streams are decoded with strict=False.

Needs no other module of the repository and no torch: a submission ships it beside its script. Source: PR #1729.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
FUSED = tuple(SPACE + operator for operator in OPERATORS[:3])  # an operator and the space before it as one piece
OPERATOR_BYTES = 3  # of an operator character in UTF-8

# From the first capital to the end of its run of letters; the second group takes part if the run began in lower case.
CAPITALS = re.compile(r"([A-Z](?:(?<=[a-z].)()|)[A-Za-z]*)")
# An operator with what it acts on; alone, or a capital: no encoder writes it. First letters come from a class, which the
# regular expression engine finds quickly. The look-ahead of TITLE refuses runs that are all capitals, ALLCAPS's mixed ones.
UNITS = re.compile(
    f"([{OPERATORS}A-Z](?:"
    f"(?<=(?<![a-z]){TITLE})[a-z](?!(?:{CAPNEXT}[a-z])+(?![a-z{CAPNEXT}]))"
    f"|(?<=[a-z]{CAPNEXT})[a-z]"
    f"|(?<=(?<![a-z]){ALLCAPS})[a-z]{{2,}}(?![a-z{CAPNEXT}])"
    f"|(?<={ESCAPE})[{OPERATORS}]"
    ")?)"
)
# The same for streams of another encoder or normalised afterwards: an operator acts on what follows, or is left out.
LOOSE_UNITS = re.compile(
    f"([{OPERATORS}](?:(?<=[{TITLE}{CAPNEXT}])[a-z]|(?<={ALLCAPS})[A-Za-z]+|(?<={ESCAPE})[{OPERATORS}])?)"
)


@lru_cache(maxsize=1)
def normalizer():
    """SentencePiece's nmt_nfkc: NFKC, white space as single spaces, none at the ends, no control characters."""
    import sentencepiece

    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )


def normalize(text: str) -> str:
    """The text as a tokenizer of the rule nmt_nfkc would leave it; half a surrogate pair is a ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (U+{ord(text[error.start]):04X})"
        raise ValueError(f"character {error.start:,}: {half}, which is no character") from None
    return normalizer().normalize(text)


def encode(text: str) -> str:
    """The stream of a text. An operator that stands in the text is escaped. Inverse: `decode`."""
    if not text.isascii() and any(operator in text for operator in OPERATORS):
        text = re.sub(f"[{OPERATORS}]", ESCAPE + r"\g<0>", text)
    parts = CAPITALS.split(text)  # text, run, mark, text, run, mark ... text: faster than a call for each match
    parts[1::3] = map(factor_run, parts[1::3], parts[2::3])
    parts[2::3] = [""] * len(parts[2::3])
    return "".join(parts)


@lru_cache(maxsize=1 << 16)
def factor_run(run: str, inside: str | None) -> str:
    """Operators and small letters for letters from the first capital on; unless `inside` is None small ones precede it."""
    if inside is None and run[1:].islower() | (len(run) == 1):
        return TITLE + run.lower()
    if inside is None and run.isupper():
        return ALLCAPS + run.lower()
    mixed = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), run)
    return TITLE + mixed[1:] if inside is None else mixed


def decode(stream: str, strict: bool = True) -> str:
    """The text of a stream; strictly, one that `encode` never writes is a ValueError with the offset of what is wrong."""
    parts = (UNITS if strict else LOOSE_UNITS).split(stream)  # text, unit, text, unit ... text
    parts[1::2] = restored = list(map(restore, parts[1::2]))
    if strict and None in restored:
        at = len("".join(UNITS.split(stream)[: 2 * restored.index(None) + 1]))
        names = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESCAPE: "ESCAPE"}
        found = names.get(stream[at], f"the capital {stream[at]}")
        raise ValueError(f"character {at:,} of the stream: {found} where no encoder writes it")
    return "".join(part or "" for part in parts) if None in restored else "".join(parts)


@lru_cache(maxsize=1 << 16)
def restore(unit: str) -> str | None:
    """What an operator stands for together with the letters or the operator after it; None for a lone one."""
    if len(unit) == 1:
        return None
    return unit[1:] if unit[0] == ESCAPE else unit[1:].upper()


# ---- bytes of tokens


def operators_of(pieces: list[str]) -> np.ndarray:
    """Operator characters in each piece of a vocabulary, (V,) int64."""
    return np.array([sum(piece.count(operator) for operator in OPERATORS) for piece in pieces], dtype=np.int64)


def original_bytes(tokens: np.ndarray, counted: np.ndarray, operators_V: np.ndarray, escape_id: int) -> np.ndarray:
    """Bytes of the original text that each token of a stream stands for, (n,) int64; a document or several.

    `counted` (n,) are the bytes of the stream, as for any text. Operators stand for none, so that a piece of a space and
    an operator has the 1 of its space; an operator after an escape is text and has its own 3.
    """
    literal = np.zeros(len(tokens), dtype=bool)
    for i in np.flatnonzero(tokens[:-1] == escape_id):
        literal[i + 1] = not literal[i]
    return counted - OPERATOR_BYTES * (operators_V[tokens] - literal)
