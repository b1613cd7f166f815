"""Show what each token of a text cost an artifact, and whether the network or the n-grams predicted it.

    python tools/explain.py notes.txt --artifact logs/run.pgz        -> notes.txt.html

On a terminal the text is shaded by bits; the page also shows totals and, under the pointer, what else was likely.
Exit status: 0 done, 2 a mistake (one message).
"""

from __future__ import annotations

import argparse
import html
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text import InputError, read_documents

import train_gpt as tg  # before torch, since it sets how torch's threads wait

# isort: split
from torch import Tensor

from tools import artifact as ta
from tools.codec import END, START, Normalizer

SIDE_BY_SIDE = 16  # documents that are explained at once


class TokenNote(NamedTuple):
    """One token of a document, what it cost and what else was expected."""

    text: str
    bits: float  # as the codec would code it
    network_bits: float  # by the network alone
    ngram_bits: float  # by the n-gram side alone; inf where it gave the token nothing
    network_share: float  # weight of the network in the mixture, 1 where no context matched
    match: int  # tokens of the longest context seen before
    seen: int  # how often that context was seen
    likely: list[tuple[str, float]]  # the likeliest tokens and their probabilities
    piece: str  # the token itself, as `likely` spells it


def texts_of(path: str, spelling: ta.TextTokens) -> list[str]:
    """Documents of a token shard (.bin, split at BOS) or of what data/text.py reads: .jsonl, .txt, plain, .gz or .zst."""
    try:
        if not path.endswith(".bin"):
            return [document.text for document in read_documents(Path(path))]
    except InputError as e:
        raise tg.ConfigError(str(e)) from None
    tokens = tg.check_ids(np.asarray(tg.load_shard(Path(path))), spelling.sp.vocab_size(), path)
    parts = np.split(tokens, np.flatnonzero(tokens == tg.BOS))
    return [spelling.decode(part[part != tg.BOS].tolist()) for part in parts if len(part) > 1]


def token_texts(spelling: ta.TextTokens, text: str) -> tuple[list[int], list[str]]:
    """(token ids of a document, the stretch of the original text that each stands for); what precedes text joins its first token."""
    sp = spelling.sp
    normal, edits = Normalizer(spelling).split(text.encode()) or (spelling.decode(spelling.encode(text)), [])
    shown = ["", *normal, ""]
    for e in edits:
        shown[e.at : e.at + len(e.old)] = [e.new.strip(START + END), *[""] * (len(e.old) - 1)]
    stream, visible = spelling.stream(normal)
    characters = iter(shown[1:-1])
    written = [next(characters) if seen else "" for seen in visible]
    ids, texts, at, raw = sp.encode(stream), [], 0, b""
    for i in ids:
        if sp.is_byte(i):  # the last byte of a character shows it
            raw += bytes([int(sp.id_to_piece(i)[3:5], 16)])
            size = len(raw.decode(errors="ignore"))
            raw = b"" if size else raw
        else:
            size = len(sp.id_to_piece(i)) - (not texts and sp.id_to_piece(i).startswith("▁"))
        texts.append("".join(written[at : at + size]))
        at += size
    if texts:
        texts[0], texts[-1] = shown[0] + texts[0], texts[-1] + shown[-1]
    return ids, texts


def costs(lanes: ta.Lanes, lane: int, p_V: Tensor, token: int) -> tuple[float, float, float, float, int, int]:
    """TokenNote's numbers: what the mixture gave the token, split into the network's part and the n-gram's."""
    bits = lambda p: math.inf if p <= 0 else -math.log2(p)  # noqa: E731
    share, match, seen = lanes.mixture(lane)
    p, network = float(p_V[token]), float(lanes.network_p[lane, token])
    ngram = (p - share * network) / (1 - share) if share < 1 else 0.0
    return bits(p), bits(network), bits(ngram if ngram > 1e-12 else 0.0), share, match, seen


def explain_lanes(predictor: ta.Predictor, split: list[tuple[list[int], list[str]]]) -> list[list[TokenNote]]:
    """Notes on documents side by side, one a lane."""
    counts = np.array([len(ids) for ids, _ in split])
    lanes = predictor.lanes(len(split), int(counts.max()))
    notes: list[list[TokenNote]] = [[] for _ in split]
    for t in range(counts.max()):
        p_LV = lanes.dist()
        best = p_LV.topk(min(6, p_LV.shape[1]))
        for lane in np.flatnonzero(counts > t):
            ids, texts = split[lane]
            pairs = zip(best.indices[lane].tolist(), best.values[lane].tolist(), strict=True)
            spell = predictor.text.piece
            likely = [(spell(i), p) for i, p in pairs]
            notes[lane].append(TokenNote(texts[t], *costs(lanes, lane, p_LV[lane], ids[t]), likely, spell(ids[t])))
        lanes.take(np.array([ids[t] if t < len(ids) else 0 for ids, _ in split]))
    return notes


def explain_documents(predictor: ta.Predictor, documents: list[str], limit: int) -> list[list[TokenNote]]:
    """Notes on every token of the documents, each coded on its own; at most `limit` tokens together, and a notice then."""
    split, left = [], limit
    for i, document in enumerate(documents):
        ids, texts = token_texts(predictor.text, document)
        if ids[:left]:
            split.append((ids[:left], texts[:left]))
        if len(ids) > left:
            predictor.run.notice(
                f"--tokens={limit}: {left} of {len(ids)} tokens of document {i + 1} are explained, and nothing after them"
            )
            break
        left -= len(ids)
    result, since, total = [], time.perf_counter(), sum(len(ids) for ids, _ in split)
    for lo in range(0, len(split), SIDE_BY_SIDE):
        result += explain_lanes(predictor, split[lo : lo + SIDE_BY_SIDE])
        predictor.run.progress("explaining", sum(map(len, result)), total, since)
    return result


def document_totals(notes: list[TokenNote]) -> dict[str, float]:
    """Tokens, bytes and bits of one document, and bits a byte of mixture and network."""
    size = max(len("".join(n.text for n in notes).encode(errors="replace")), 1)
    bits, network = sum(n.bits for n in notes), sum(n.network_bits for n in notes)
    return {"tokens": len(notes), "bytes": size, "bits": bits, "bpb": bits / size, "network_bpb": network / size}


def terminal_text(notes: list[TokenNote]) -> str:
    """The document with each token on a background from grey-blue (cheap) to red (12 bits and more), for 256 colours."""
    ramp = (None, 236, 237, 24, 30, 65, 101, 136, 172, 166, 160, 124, 88)
    out = []
    for n in notes:
        colour = ramp[min(int(n.bits), len(ramp) - 1)]
        start, end = ("", "") if colour is None else (f"\033[48;5;{colour}m", "\033[0m")
        out.append(
            f"{end}\n{start}".join(f"{start}{n.text}{end}".split("\n")) if "\n" in n.text else f"{start}{n.text}{end}"
        )
    return "".join(out)


PAGE = Path(__file__).with_name("explain.html")


def page_html(title: str, subtitle: str, documents: list[list[TokenNote]]) -> str:
    """A page that needs nothing else: text shaded by bits, details under the pointer, totals by document."""
    rows = [
        {"name": f"document {i + 1}", "totals": document_totals(notes), "notes": notes}
        for i, notes in enumerate(documents)
    ]
    if len(rows) != 1:
        rows.append({"name": "all", "totals": document_totals([n for notes in documents for n in notes])})
    finite = lambda x: round(x, 6) if math.isfinite(x) else None  # noqa: E731
    for row in rows:
        row["notes"] = [[n.text, *map(finite, n[1:5]), n.match, n.seen, [(s, finite(p)) for s, p in n.likely], n.piece]
                        for n in row.get("notes", [])] or None  # fmt: skip
    data = json.dumps(rows, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title), "SUBTITLE": html.escape(subtitle), "[/* DOCUMENTS */]": data}
    page = PAGE.read_text(encoding="utf-8")
    return re.sub("|".join(map(re.escape, parts)), lambda m: parts[m[0]], page)


def explain(args: argparse.Namespace) -> None:
    """FILE, shaded by what each token cost: on a terminal, and as a page."""
    path = ta.output_path(args.output or f"{args.file}.html", args.force)
    ta.read_bytes(args.file)  # a mistake in it is found before the artifact is opened
    predictor = ta.open_predictor(*ta.read_artifact(args.artifact))
    documents = explain_documents(predictor, texts_of(args.file, predictor.text), args.tokens)
    for i, notes in enumerate(documents):
        if sys.stdout.isatty():
            print(terminal_text(notes), end="\n\n")
        total = document_totals(notes)
        print(
            f"document {i + 1} tokens:{len(notes)} bytes:{total['bytes']} bits:{total['bits']:.0f} bpb:{total['bpb']:.4f} network_bpb:{total['network_bpb']:.4f}"
        )
    subtitle = f"artifact {predictor.name}, recipe {predictor.cfg.recipe}, each document on its own; normalised text, newlines as in the original"
    tg.atomic_write(path, page_html(Path(args.file).name, subtitle, documents).encode())
    print(f"wrote {path}")


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    parser = ta.tool_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help='text, .jsonl of objects with "text", or a token shard (.bin)')
    ta.add_artifact(parser)
    parser.add_argument("-o", "--output", metavar="FILE", default="", help="the page; default FILE.html")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    parser.add_argument(
        "--tokens", type=ta.number_in(1, 10**9), default=20000, help="most tokens to explain (default 20000)"
    )
    return ta.run_tool(explain, parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
