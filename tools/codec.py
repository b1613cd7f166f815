"""Compress files with an artifact, and restore them: any bytes go in, the same bytes come out.

    python tools/codec.py compress notes.txt --artifact logs/run.pgz             -> notes.txt.pgz
    python tools/codec.py decompress notes.txt.pgz --artifact logs/run.pgz -o back.txt

A text becomes the tokens of its normalised form, each coded with the distribution that the evaluator scores with, and the
edits that restore what normalisation took away. Where that does not pay, the file holds LZMA or the bytes themselves. How
the artifact predicts stays in the environment (NGRAM_*, EVAL_*, DEVICE): a file names what differs from its artifact.

Decompression needs the artifact, this program, the tokenizer, and the same torch build and device, because floats must agree
to the last bit. Exit status: 0 done, 2 a mistake (one message).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
import torch

from tools import artifact as ta

# ---- coders: one function codes in both directions, so that writing and reading cannot drift apart


class SymbolEncoder:
    """Range coder that writes. `code` takes probabilities (V,) float64 and the symbol, and returns the symbol.

    Probabilities become 24-bit frequencies by constriction's rule for perfect=False: symbol i starts at
    i + floor((2^24 - V) (p_0 + .. + p_{i-1})). So each gets at least 1, and at most V / 2^24 of the mass is lost.
    """

    def __init__(self) -> None:
        import constriction

        self.model, self.coder = constriction.stream.model.Categorical, constriction.stream.queue.RangeEncoder()
        self.bits = 0.0

    def code(self, p_V: np.ndarray, symbol: int) -> int:
        self.coder.encode(symbol, self.model(p_V, lazy=True, perfect=False))
        self.bits -= math.log2(p_V[symbol])
        return symbol

    def finish(self) -> bytes:
        """The words written so far, 4 bytes each; nothing coded is no bytes."""
        return self.coder.get_compressed().astype("<u4").tobytes()


class SymbolDecoder:
    """Range coder that reads what SymbolEncoder wrote; `code` ignores the symbol it is given."""

    def __init__(self, packed: bytes) -> None:
        import constriction

        self.model = constriction.stream.model.Categorical
        self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(packed, "<u4").astype(np.uint32))

    def code(self, p_V: np.ndarray, symbol: int | None = None) -> int:  # noqa: ARG002
        try:
            return int(self.coder.decode(self.model(p_V, lazy=True, perfect=False)))
        except AssertionError:  # what the decoder raises on words that no encoder writes
            raise tg.ArtifactError("the file's streams do not decode") from None


Coder = SymbolEncoder | SymbolDecoder


MAX_SPELLED = 1 << 16  # bytes of one edit: a damaged stream cannot ask for more


class MixedBits:
    """Codes bits: a counter for each context predicts the bit, and weights learned online mix them in the logistic domain (PAQ)."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.counters: dict[tuple, list[float]] = {}
        self.weights: dict[tuple, list[float]] = {}

    def code(self, contexts: tuple, selector: tuple, bit: int | None) -> int:
        """The bit, coded (None while decoding) given hashable contexts; `selector` names the weights, its first entry the counters."""
        counters = [self.counters.setdefault((selector[0], i, c), [0.5, 1.5]) for i, c in enumerate(contexts)]
        weights = self.weights.setdefault(selector, [0.4] * len(contexts))
        stretched = [math.log(p / (1 - p)) for p, _ in counters]
        z = sum(w * s for w, s in zip(weights, stretched, strict=True))
        p = 1 / (1 + math.exp(-max(-11.0, min(11.0, z))))
        bit = self.coder.code(np.array([1 - p, p]), bit)
        for i, counter in enumerate(counters):
            weights[i] += 0.02 * (bit - p) * stretched[i]
            counter[0] = min(max(counter[0] + (bit - counter[0]) / counter[1], 1e-4), 1 - 1e-4)
            counter[1] = min(counter[1] + 1, 255.0)
        return bit

    def number(self, name: str, value: int | None, low: int, high: int) -> int:
        """The integer, coded as its bit length in unary, then its bits; ArtifactError unless in low..high."""
        width = 0
        while self.code(
            ((name, width),), ("width",), None if value is None else int((value + 1).bit_length() - 1 > width)
        ):
            width += 1
            if width > (high + 1).bit_length():
                break
        result = 1
        for i in reversed(range(width)):
            context = (name, width, result) if result < 8 else (name, i)
            result = 2 * result + self.code((context,), ("digit",), None if value is None else (value + 1) >> i & 1)
        if not low <= result - 1 <= high:
            raise tg.ArtifactError("the restoration stream holds impossible numbers")
        return result - 1

    def string(self, name: str, text: str | None) -> str:
        """The text, coded byte by byte, each predicted from the one before; bytes that are no UTF-8 are surrogates in it."""
        raw = None if text is None else text.encode("utf-8", "surrogateescape")
        out = bytearray()
        for k in range(self.number(name, None if raw is None else len(raw), 0, MAX_SPELLED)):
            byte, before = 1, out[-1] if out else -1
            for i in reversed(range(8)):
                bit = None if raw is None else raw[k] >> i & 1
                byte = 2 * byte + self.code(((byte,), (before, byte)), ("byte", i), bit)
            out.append(byte & 255)
        return out.decode("utf-8", "surrogateescape")


# ---- restoration: the edits that turn normalised text back into the original bytes

START, END = "\x02", "\x03"  # frame the normalised text, so that edits can hold what stood before and after it
KNOWN_EDITS = {" ": ["\n", "\n\n"], END: ["\n" + END]}
MAX_KINDS = 1000  # different edits of one character; more than that is no text


class Edit(NamedTuple):
    """At position `at` of the framed normalised text, `old` is replaced by `new`."""

    at: int
    old: str
    new: str


class Normalizer:
    """Splits bytes into text that the tokenizer keeps as it is and the edits that restore the bytes."""

    def __init__(self, text: ta.TextTokens) -> None:
        self.text = text
        self.plain = functools.lru_cache(maxsize=1 << 16)(self._plain)

    def _plain(self, text: str) -> str:
        """The normalised form of a word or character, without spaces around it; "" where tokens would not give it back."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = "".join(c for c in text if not "\ud800" <= c <= "\udfff")
        normal = self.text.normalize(text).strip(" ")
        return normal if self.text.decode(self.text.encode(normal)) == normal else ""

    def separators(self, text: str) -> str:
        """Pattern of what becomes one space: characters that normalise to a space, and vanishing ones beside them."""
        between = {c: self._plain(f"a{c}b") for c in set(text)}
        space = "".join(re.escape(c) for c, n in between.items() if n == "a b")
        gone = "".join(re.escape(c) for c, n in between.items() if n in ("a b", "ab"))
        return f"([{gone}]*[{space}][{gone}]*)" if space else "((?!))"

    def word_edits(self, word: str, normal: str, at: int) -> Iterator[Edit]:
        """Edits of one word whose normalised form stands at `at`: one a character where characters normalise alone, else one."""
        units, waiting = [], ""
        for c in word:
            if n := self.plain(c):
                units.append((n, waiting + c))
                waiting = ""
            else:
                waiting += c
        if waiting and units:
            units[-1] = (units[-1][0], units[-1][1] + waiting)
        if "".join(n for n, _ in units) != normal:
            units = [(normal, word)]
        for old, new in units:
            if old != new:
                yield Edit(at, old, new)
            at += len(old)

    def split(self, data: bytes) -> tuple[str, list[Edit]] | None:
        """(normalised text, edits), or None where the bytes are not text."""
        text = data.decode("utf-8", "surrogateescape")
        if 5 * sum(map(text.count, map(chr, range(0xDC80, 0xDD00)))) > len(text):  # bytes that are no UTF-8
            return None
        pieces = [*re.split(self.separators(text), text), ""]
        normal, length, edits, waiting = [], 1, [], ""
        for word, gap in zip(pieces[::2], pieces[1::2], strict=True):
            n = self.plain(word)
            if not n:
                waiting += word + gap
                continue
            old, before = (" ", waiting) if normal else (START, START + waiting)
            if old != before:
                edits.append(Edit(length - (not normal), old, before))
            if normal:
                normal.append(" ")
                length += 1
            edits += self.word_edits(word, n, length) if n != word else ()
            normal.append(n)
            length += len(n)
            waiting = gap
        if waiting:
            edits.append(Edit(length, END, waiting + END))
        whole, kinds = "".join(normal), Counter(e.old[0] for e in {e._replace(at=0) for e in edits})
        small = max(kinds.values(), default=0) <= MAX_KINDS and all(4 * len(e.new) <= MAX_SPELLED for e in edits)
        return (whole, edits) if small and self.text.decode(self.text.encode(whole)) == whole else None


def first_edits(edits: list[Edit]) -> list[int]:
    """Positions of edits that occur for the first time and are not among KNOWN_EDITS."""
    seen = {(c, new) for c, news in KNOWN_EDITS.items() for new in news}
    fresh = []
    for e in edits:
        if (e.old, e.new) not in seen:
            seen.add((e.old, e.new))
            fresh.append(e.at)
    return fresh


class EditContext:
    """What predicts the next edit: column, indentation and last separator of the text restored so far, and what surrounds it."""

    def __init__(self, framed: str) -> None:
        self.framed, self.column, self.indent, self.last = framed, 0, "", ""

    def take(self, text: str) -> None:
        _, newline, tail = text.rpartition("\n")
        if newline:
            self.column, self.indent = len(tail), tail
        else:
            self.column += len(text)
        if not text.isalnum():
            self.last = text

    def contexts(self, i: int) -> tuple:
        """Contexts of an edit at position i of the framed text, hashable, from the least to the most specific."""
        before, rest = self.framed[i - 1 : i], self.framed[i + 1 : i + 25]
        word = rest.partition(" ")[0]
        tail = self.framed[max(i - 12, 0) : i].rpartition(" ")[2]
        return (
            0,
            (before, rest[:1]),
            (word, before),
            min(self.column + len(word), 200),
            (self.indent, before, rest[:1]),
            (tail, self.last),
        )


def code_choice(
    bits: MixedBits, known: list[tuple[str, str]], around: EditContext, i: int, chosen: tuple[str, str], writing: bool
) -> tuple[str, str]:
    """Code which of the known edits of the text at `i` is made, one bit for each, latest first; it moves to the front."""
    possible = [pair for pair in known if around.framed.startswith(pair[0], i)]
    views = around.contexts(i)
    for rank, pair in enumerate(possible):
        contexts = tuple((pair, view) for view in views)
        if rank == len(possible) - 1 or bits.code(
            contexts, ("edit", min(rank, 3)), int(pair == chosen) if writing else None
        ):
            known.remove(pair)
            known.insert(0, pair)
            return pair
    raise AssertionError("a character always stands for itself")


def code_edits(coder: Coder, normal: str, edits: list[Edit] | None) -> list[Edit]:
    """The edits of the normalised text, written to the coder or, where they are None, read from it.

    First come the positions of edits that occur for the first time; these are spelled where they stand. From then on bits
    tell, at every character that a known edit begins with, whether it stands for itself or which edit is made.
    """
    bits, framed = MixedBits(coder), START + normal + END
    writing = edits is not None
    at = {e.at: e for e in edits or ()}
    fresh = first_edits(edits or [])
    positions = []
    for i in range(bits.number("fresh", len(fresh) if writing else None, 0, len(framed))):
        before = positions[-1] + 1 if positions else 0
        positions.append(before + bits.number("gap", fresh[i] - before if writing else None, 0, len(framed) - before))
    known = {c: [(c, c), *((c, new) for new in news)] for c, news in KNOWN_EDITS.items()}
    result, around, i, pending = [], EditContext(framed), 0, set(positions)
    while i < len(framed):
        edit, c = at.get(i), framed[i]
        if i in pending:
            size = bits.number("old", len(edit.old) if writing else None, 1, len(framed) - i)
            pair = (framed[i : i + size], bits.string("new", edit.new if writing else None))
            known.setdefault(c, [(c, c)]).insert(0, pair)
        elif c in known:
            pair = code_choice(bits, known[c], around, i, (edit.old, edit.new) if edit else (c, c), writing)
        else:
            pair = (c, c)
        if pair[0] != pair[1]:
            result.append(Edit(i, *pair))
        around.take(pair[1])
        i += len(pair[0])
    return result


def restore_bytes(normal: str, edits: list[Edit]) -> bytes:
    """Apply the edits to the normalised text."""
    framed, out, at = START + normal + END, [], 0
    for e in edits:
        out += [framed[at : e.at], e.new]
        at = e.at + len(e.old)
    text = "".join([*out, framed[at:]])
    return text[len(START) : -1].encode("utf-8", "surrogateescape")


def code_tokens(
    coder: Coder, lanes: ta.Lanes, counts: np.ndarray, given: np.ndarray | None, progress: Callable[[int], None]
) -> np.ndarray:
    """The coded tokens (L, longest), 0 where a lane has ended: counts[i] of lane i, position by position, lane by lane.

    A token is predicted, then coded, then learned from. counts (L,) differ by one at most, larger ones first; `given` are
    the tokens (L, longest) while writing, None while reading.
    """
    out = np.zeros((len(counts), int(counts.max(initial=0))), np.int64)
    for t in range(out.shape[1]):
        p = lanes.dist().numpy()
        for lane in range(int((counts > t).sum())):
            out[lane, t] = coder.code(p[lane], None if given is None else int(given[lane, t]))
        lanes.take(out[:, t])
        progress(int(np.minimum(counts, t + 1).sum()))
    return out


def lane_counts(n: int, lanes: int) -> np.ndarray:
    """(lanes,) tokens in each of `lanes` parts of n tokens; they differ by one at most, longest first."""
    return n // lanes + (np.arange(lanes) < n % lanes)


def to_lanes(tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Cut tokens into lanes, (L, longest), zeros behind the shorter ones."""
    out = np.zeros((len(counts), int(counts.max(initial=0))), np.int64)
    out[np.arange(out.shape[1]) < counts[:, None]] = tokens
    return out


# ---- the compressed file

CODEC_MAGIC, CODEC_VERSION = b"PGTX", 1
FORMS = ("text", "lzma", "stored")
# A shorter lane saves seconds and costs a cold start: 13 instead of 3 lanes made 8 kB as large as xz does.
LANE_TOKENS = 1024
MAX_THREADS = 1024
MAX_TOKENS_A_BYTE = 256  # of the file; what compresses better than that goes to LZMA


class CodecHeader(NamedTuple):
    """What a compressed file says of itself."""

    form: int  # index into FORMS
    size: int  # bytes of the original
    check: int  # CRC-32 of the original
    tokens: int = 0
    lanes: int = 0
    restoration: int = 0  # bytes of the restoration stream, which comes before the tokens' stream
    threads: int = 0
    artifact: str = ""  # first 16 digits of the artifact's SHA-256
    machine: str = ""  # torch build and device: floats agree bitwise only there
    settings: str = ""  # JSON of ta.SCORING_KNOBS that differ from the artifact's

    @property
    def numbers(self) -> tuple[int, ...]:
        return self[:7]


def varint(n: int) -> Iterator[int]:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    while n > 127:
        yield n & 127 | 128
        n >>= 7
    yield n


def write_file(header: CodecHeader, body: bytes) -> bytes:
    """Magic, version, seven varints, three strings, body, CRC-32 of all before it."""
    parts = [bytes(varint(n)) for n in header.numbers]
    for raw in (bytes.fromhex(header.artifact), header.machine.encode(), header.settings.encode()):
        parts += [bytes(varint(len(raw))), raw]
    blob = CODEC_MAGIC + bytes([CODEC_VERSION]) + b"".join(parts) + body
    return blob + struct.pack("<I", zlib.crc32(blob))


def read_file(blob: bytes) -> tuple[CodecHeader, bytes]:
    """Inverse of write_file: (header, body). Raises ArtifactError for a foreign, future, truncated or damaged file."""
    if blob[:4] != CODEC_MAGIC:
        raise tg.ArtifactError(
            f"not a compressed file of this program: it begins with {bytes(blob[:4])!r}, not {CODEC_MAGIC!r}"
        )
    if len(blob) > 4 and blob[4] != CODEC_VERSION:
        raise tg.ArtifactError(
            f"format version {blob[4]}, this program reads {CODEC_VERSION}: use the one that wrote it"
        )
    if len(blob) < 9 or zlib.crc32(blob[:-4]) != struct.unpack("<I", blob[-4:])[0]:
        raise tg.ArtifactError("the file is truncated or damaged: its checksum differs; copy it again")
    at = 5

    def number() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 56, 7):
            at += 1
            value |= (blob[at - 1] & 127) << shift
            if blob[at - 1] < 128:
                return value
        raise IndexError

    def string() -> bytes:
        nonlocal at
        size = number()
        at += size
        return blob[at - size : at]

    try:
        numbers = [number() for _ in range(7)]
        header = CodecHeader(*numbers, string().hex(), string().decode(), string().decode())
    except (IndexError, UnicodeDecodeError):
        raise tg.ArtifactError("the file's header is inconsistent") from None
    body = blob[at:-4]
    if (
        at > len(blob) - 4
        or header.form >= len(FORMS)
        or (FORMS[header.form] == "text" and not sound_text(header, body))
    ):
        raise tg.ArtifactError("the file's header is inconsistent")
    return header, body


def sound_text(header: CodecHeader, body: bytes) -> bool:
    """Whether an encoder may have written these numbers: others could ask for any amount of memory."""
    words = header.restoration % 4 == len(body) % 4 == 0 and header.restoration <= len(body)
    return (
        words
        and 1 <= header.lanes <= max(header.tokens, 1)
        and 1 <= header.threads <= MAX_THREADS
        and header.tokens <= MAX_TOKENS_A_BYTE * (len(body) + 64)
    )


def machine_name(cfg: tg.Config, run: tg.Run) -> str:
    """What floats depend on besides the number of threads: torch build, device, attention kernel."""
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
    else:
        name = torch.backends.cpu.get_cpu_capability() + " AMX" * ("amx_bf16" in tg.cpu_features())
    return f"{torch.__version__} {run.device.type} {name} {tg.choose_attention(cfg, run.device)[0]}"


class Compressed(NamedTuple):
    """A compressed file and its account, all in bits but `blob`."""

    blob: bytes
    header: CodecHeader
    ideal: float  # -log2 of the tokens' probabilities, as the evaluator scores them
    token_bits: int
    restoration_bits: int


class Codec:
    """Compresses bytes with one artifact, in at most `most_lanes` lanes, and restores them."""

    def __init__(self, predictor: ta.Predictor, most_lanes: int = 16) -> None:
        self.predictor, self.most_lanes = predictor, most_lanes
        self.machine = machine_name(predictor.cfg, predictor.run)

    def compress(self, data: bytes) -> Compressed:
        """The smaller of two forms: text, or plain bytes where data is no text worth that form."""
        plain = self.compress_bytes(data)
        text = self.compress_text(data, plain.token_bits // 8)
        return plain if text is None or len(text.blob) > len(plain.blob) else text

    def compress_bytes(self, data: bytes) -> Compressed:
        """LZMA, or the bytes themselves: needs no artifact to restore."""
        packed = tg.lzma_pack(data) if data else b""
        form, body = ("lzma", packed) if len(packed) < len(data) else ("stored", data)
        header = CodecHeader(FORMS.index(form), len(data), zlib.crc32(data))
        return Compressed(write_file(header, body), header, 0.0, 8 * len(body), 0)

    def compress_text(self, data: bytes, limit: int = 2**62) -> Compressed | None:
        """Tokens of the normalised text after the edits that restore the bytes; None where the edits alone reach `limit`."""
        split = Normalizer(self.predictor.text).split(data)
        if split is None or not data:
            return None
        normal, edits = split
        restoration = SymbolEncoder()
        if edits:
            code_edits(restoration, normal, edits)
        restored = restoration.finish()
        if len(restored) >= limit:
            return None
        tokens = np.array(self.predictor.text.encode(normal), np.int64)
        counts = lane_counts(len(tokens), max(1, min(self.most_lanes, len(tokens) // LANE_TOKENS)))
        coder = SymbolEncoder()
        self.code(coder, counts, to_lanes(tokens, counts), "compressing")
        changed = self.predictor.settings
        settings = json.dumps(changed, separators=(",", ":")) if changed else ""
        header = CodecHeader(0, len(data), zlib.crc32(data), len(tokens), len(counts), len(restored), torch.get_num_threads(),
                             self.predictor.name, self.machine, settings)  # fmt: skip
        coded = coder.finish()
        if not sound_text(header, restored + coded):
            return None
        return Compressed(write_file(header, restored + coded), header, coder.bits, 8 * len(coded), 8 * len(restored))

    def decompress(self, blob: bytes) -> bytes:
        """The original bytes. Raises ArtifactError if the file, the artifact or the machine is not the right one."""
        header, body = read_file(blob)
        data = self.decode_text(header, body) if FORMS[header.form] == "text" else self.decode_bytes(header, body)
        if len(data) != header.size or zlib.crc32(data) != header.check:
            raise tg.ArtifactError("the restored bytes differ from the original's checksum: the file was altered, or this machine's "
                                f"arithmetic differs from that of the machine that compressed ({header.machine})")  # fmt: skip
        return data

    def decode_bytes(self, header: CodecHeader, body: bytes) -> bytes:
        if FORMS[header.form] == "stored":
            return body
        return tg.lzma_unpack(body, header.size)

    def decode_text(self, header: CodecHeader, body: bytes) -> bytes:
        """Tokens, then their text, then the edits, each from what the one before it gave."""
        if header.artifact != self.predictor.name:
            raise tg.ArtifactError(
                f"compressed with artifact {header.artifact}.., this one is {self.predictor.name}..; name the right one"
            )
        if header.machine != self.machine:
            raise tg.ArtifactError(f"compressed on {header.machine!r}, this is {self.machine!r}: the arithmetic differs, and so "
                                "would the text; decompress it where the two agree")  # fmt: skip
        threads = torch.get_num_threads()
        torch.set_num_threads(header.threads)
        try:
            counts = lane_counts(header.tokens, header.lanes)
            out = self.code(SymbolDecoder(body[header.restoration :]), counts, None, "decompressing")
        finally:
            torch.set_num_threads(threads)
        normal = self.predictor.text.decode(out[np.arange(out.shape[1]) < counts[:, None]].tolist())
        edits = code_edits(SymbolDecoder(body[: header.restoration]), normal, None) if header.restoration else []
        if sum(len(e.new) for e in edits) > header.size + len(START + END):
            raise tg.ArtifactError("the edits would make more bytes than the original has")
        return restore_bytes(normal, edits)

    def code(self, coder: Coder, counts: np.ndarray, given: np.ndarray | None, what: str) -> np.ndarray:
        """code_tokens with this codec's distributions and a progress bar."""
        since, total = time.perf_counter(), int(counts.sum())
        lanes = self.predictor.lanes(len(counts), int(counts.max(initial=0)))
        return code_tokens(
            coder, lanes, counts, given, lambda done: self.predictor.run.progress(what, done, total, since)
        )


# ---- the commands


def compress(args: argparse.Namespace) -> None:
    """FILE -> FILE.pgz, and the account of its bits."""
    data, path = ta.read_bytes(args.file), ta.output_path(args.output or f"{args.file}.pgz", args.force)
    predictor = ta.open_predictor(*ta.read_artifact(args.artifact))
    started = time.perf_counter()
    packed = Codec(predictor, args.lanes).compress(data)
    seconds = time.perf_counter() - started
    tg.atomic_write(path, packed.blob)
    h, per_byte = packed.header, 1 / max(len(data), 1)
    other = 8 * len(packed.blob) - packed.token_bits - packed.restoration_bits
    print(
        f"compressed {args.file} -> {path} form:{FORMS[h.form]} original_bytes:{h.size} compressed_bytes:{len(packed.blob)} "
        f"bpb:{8 * len(packed.blob) * per_byte:.4f} seconds:{seconds:.1f} lanes:{h.lanes} tokens_per_s:{h.tokens / seconds:.0f}"
    )
    if FORMS[h.form] == "text":
        print(
            f"bits a byte: tokens {packed.token_bits * per_byte:.4f} (ideal {packed.ideal * per_byte:.4f}), restoration "
            f"{packed.restoration_bits * per_byte:.4f}, header {other * per_byte:.4f}; the artifact's {predictor.size} bytes are not counted"
        )


def adopt_settings(loaded: tg.LoadedConfig, settings: str) -> tg.LoadedConfig:
    """The configuration with the scoring knobs that the compressed file was coded with."""
    try:
        coded = {n: tg.parse_value(n, tg.as_text(v)) for n, v in json.loads(settings or "{}").items()}
        if coded.keys() - set(ta.SCORING_KNOBS):
            raise ValueError
        cfg = dataclasses.replace(loaded.cfg, **{n.lower(): v for n, v in coded.items()})
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise tg.ArtifactError("the file's header is inconsistent") from None
    for name in ta.SCORING_KNOBS:
        mine, theirs = getattr(loaded.cfg, name.lower()), getattr(cfg, name.lower())
        if loaded.source[name] == "env" and mine != theirs:
            raise tg.ConfigError(
                f"{name}={tg.as_text(mine)}: the file was coded with {tg.as_text(theirs)}; unset {name}"
            )
    return loaded._replace(cfg=cfg)


def decompress(args: argparse.Namespace) -> None:
    """FILE.pgz -> FILE."""
    packed = ta.read_bytes(args.file)
    if not args.output and not args.file.endswith(".pgz"):
        raise tg.ConfigError(f"{args.file} does not end in .pgz: name the file to write with -o")
    path = ta.output_path(args.output or args.file.removesuffix(".pgz"), args.force)
    blob, header, loaded = ta.read_artifact(args.artifact)
    try:
        file_header = read_file(packed)[0]
        predictor = ta.open_predictor(blob, header, adopt_settings(loaded, file_header.settings))
        started = time.perf_counter()
        data = Codec(predictor).decompress(packed)
    except tg.ArtifactError as e:
        raise tg.ConfigError(f"{args.file}: {e}") from None
    seconds = time.perf_counter() - started
    tg.atomic_write(path, data)
    print(
        f"restored {path} original_bytes:{len(data)} compressed_bytes:{len(packed)} seconds:{seconds:.1f} "
        f"tokens_per_s:{file_header.tokens / seconds:.0f}"
    )


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    parser = ta.tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compress|decompress")
    for job in (compress, decompress):
        command = commands.add_parser(job.__name__, help=job.__doc__, description=job.__doc__)
        command.add_argument("file", metavar="FILE", help="the file to read")
        ta.add_artifact(command)
        command.add_argument("-o", "--output", metavar="FILE", default="", help="the file to write")
        command.add_argument("--force", action="store_true", help="overwrite it")
        command.set_defaults(job=job)
    commands.choices["compress"].add_argument(
        "--lanes",
        type=ta.number_in(1, 4096),
        default=16,
        help="most parts of the text that are coded side by side: more is faster, but each learns from less (default 16)",
    )
    return ta.run_tool(lambda args: args.job(args), parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
