"""What factoring case out costs: encode and decode in MB/s, and documents to checked tokens and sidecar against plain text.

    python benchmarks/transform.py corpus.jsonl.zst --documents 2000 --pieces 1024 4096

A tokenizer is trained for each form on the documents themselves. The documents are dealt into ten parts; each part goes
through all forms in turn on one core, and the ratio is the median over parts, so that a busy machine disturbs it little.

MB/s          of UTF-8 text, processor time
time          of documents to tokens as data/make_shards.py does it, checks included, relative to plain text
bytes/token   on the same documents
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import caseops
import make_shards
from shards import run_tool
from text import Document, read_documents

FORMS = {"plain": [], "caseops": ["--caseops", "--no-fused-markers"], "fused": ["--caseops"]}


def timed(call: Callable[[Any], Any], items: list) -> tuple[float, list]:
    """(seconds of processor time, results)."""
    started = time.process_time()
    results = [call(item) for item in items]
    return time.process_time() - started, results


def transform_speed(texts: list[str]) -> None:
    """Print MB/s of each direction, the best of three."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    normal = [caseops.normalize(text) for text in texts]
    streams = [caseops.encode(text) for text in normal]
    for call, items in ((caseops.normalize, texts), (caseops.encode, normal), (caseops.decode, streams)):
        print(f"{call.__name__:10s} {size / min(timed(call, items)[0] for _ in range(3)):6.1f} MB/s")


def encoder(documents: list[Document], form: str, pieces: int) -> make_shards.Encoder:
    """An Encoder of one form, with a tokenizer trained on the documents."""
    args = make_shards.parse_args(["x.jsonl", "--out", "x", "--vocab-size", str(pieces), *FORMS[form]])
    args.val_docs = 0  # nothing is scored here
    corpus = SimpleNamespace(documents=lambda _: iter(documents))
    model = make_shards.train_tokenizer(
        make_shards.training_lines(corpus, args), pieces, make_shards.trainer_settings(args)
    )
    return make_shards.Encoder(model, form, args.caseops)


def compare(documents: list[Document], pieces: int) -> None:
    """Print a line a form."""
    encoders = {form: encoder(documents, form, pieces) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    tokens = dict.fromkeys(FORMS, 0)
    for start, (form, one) in itertools.product(range(10), encoders.items()):
        spent, encoded = timed(one.encode, documents[start::10])
        seconds[form].append(spent)
        tokens[form] += sum(len(item.tokens) for item in encoded)
    size = sum(len(caseops.normalize(document.text).encode()) for document in documents)
    for form in FORMS:
        ratio = statistics.median(a / b for a, b in zip(seconds[form], seconds["plain"], strict=True))
        speed = size / sum(seconds[form]) / 1e6
        print(f"{form:8s} {pieces:6d} pieces {ratio:6.3f}x {speed:6.2f} MB/s {size / tokens[form]:6.3f} bytes/token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--documents", type=int, default=2000, metavar="N", help="the first N (2000)")
    parser.add_argument("--pieces", type=int, nargs="+", default=[1024, 4096])
    args = parser.parse_args()
    documents = list(itertools.islice(read_documents(args.corpus), args.documents))
    transform_speed([document.text for document in documents])
    for pieces in args.pieces:
        compare(documents, pieces)


if __name__ == "__main__":
    sys.exit(run_tool(main))
