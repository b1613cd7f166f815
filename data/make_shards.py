#!/usr/bin/env python3
"""Turn text into a tokenizer and training shards.

    python data/make_shards.py corpus.jsonl.zst --out data/datasets/mine --vocab-size 1024 --val-docs 500
    python data/make_shards.py corpus.jsonl --out data/datasets/mine --tokenizer data/tokenizers/fineweb_1024_bpe.model

Inputs, in the order given: .jsonl (one {"text": ...} a line is one document) and .txt (one document; with
--blank-line-docs one between blank lines, with --doc-bytes one every so many bytes), plain, .gz or .zst. The first
--val-docs documents are the validation split. A new tokenizer is trained on the other documents only.

DIR receives fineweb_val_*.bin, fineweb_train_*.bin, the tokenizer and manifest.json, all of them or none. Each document
is its BOS and its pieces; every one is checked to decode to its normalised text, byte for byte as a scorer counts them.
Point DATA_PATH at DIR and TOKENIZER_PATH at the tokenizer. The same input and settings give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from shards import SPACE, Failure, locked, run_tool, sha256_of, shard_header, shard_name, sync_folder, write_synced
from text import Document, InputError, is_jsonl, read_documents
from tqdm import tqdm

OFFICIAL_VAL_DOCS = 50_000
BATCH_CHARS = 1 << 19  # text handed to a worker at a time: large enough to hide the hand-over, small enough to share
SETTINGS = (
    "val_docs",
    "shard_tokens",
    "blank_line_docs",
    "doc_bytes",
    "drop_copies",
)  # what decides the bytes, for the manifest
STAGING = ".make_shards.partial"
# What published tokenizers of the challenge are trained with: all text is representable (bytes), digits stand alone.
TRAINER = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
}


# ---- documents


class Corpus(NamedTuple):
    """The input files, read anew by each pass."""

    paths: list[Path]
    blank_line_docs: bool
    doc_bytes: int

    def documents(self, label: str) -> Iterator[Document]:
        """Documents that are more than white space, in order, under a progress bar (on a terminal)."""
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
            for path in self.paths:
                for document in read_documents(path, self.blank_line_docs, self.doc_bytes, bar.update):
                    if document.text.strip():
                        yield document

    def too_few(self, count: int, val_docs: int) -> InputError:
        """The complaint of `count` documents that the validation split uses up."""
        remedy = f"choose fewer (the official split is {OFFICIAL_VAL_DOCS:,})"
        whole = not (self.blank_line_docs or self.doc_bytes) and not all(map(is_jsonl, self.paths))
        if whole:
            remedy = (
                "a text file is one document; --blank-line-docs makes one of what stands between blank lines, "
                f"--doc-bytes 4000 one of every 4,000 bytes; then {remedy}"
            )
        documents = f"{count:,} document{'s' * (count != 1)}"
        return InputError(f"--val-docs {val_docs}: the input has {documents}, so none is left for training; {remedy}")


def check_inputs(paths: list[Path]) -> None:
    """Refuse missing files and unknown endings before any work is done."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if not re.search(r"\.(txt|jsonl)(\.gz|\.zst)?$", path.name):
            raise InputError(f"{path}: unknown ending; expected .txt or .jsonl, or one of them with .gz or .zst")


# ---- tokenizer


def training_lines(corpus: Corpus, val_docs: int, limit: int) -> Iterator[str]:
    """Lines of the documents after the validation split, up to `limit` bytes: the tokenizer never sees validation."""
    used = count = 0
    for count, document in enumerate(corpus.documents("tokenizer"), 1):
        if count <= val_docs:
            continue
        for line in document.text.split("\n"):
            if line.strip():
                used += len(line.encode())
                yield line
        if used >= limit:
            return
    if not used:
        raise corpus.too_few(count, val_docs)


def train_tokenizer(lines: Iterator[str], vocab_size: int, coverage: float) -> bytes:
    """Serialised SentencePiece BPE model of exactly `vocab_size` pieces; InputError where the text cannot fill it."""
    model = io.BytesIO()
    failure: list[InputError] = []

    def guarded() -> Iterator[str]:  # SentencePiece replaces exceptions of its iterator by its own
        try:
            yield from lines
        except InputError as error:
            failure.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=coverage,
            max_sentence_length=1 << 30,  # by default lines above 4,192 bytes would be left out in silence
            minloglevel=2,
            **TRAINER,
        )
    except (RuntimeError, OSError) as error:
        raise (failure or [vocabulary_error(vocab_size, str(error))])[0] from None
    if failure:
        raise failure[0]
    return model.getvalue()


def vocabulary_error(vocab_size: int, reason: str) -> InputError:
    """The trainer's complaint in terms of --vocab-size."""
    most = re.search(r"value <= (\d+)", reason)
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason) or re.search(r"smaller than (\d+)", reason)
    if most:
        remedy = f"this text fills at most {most[1]} pieces; give fewer, or more text"
    elif least:
        remedy = (
            f"the special pieces, 256 bytes and single characters need {least[1]} already; give more, or fewer characters "
            "pieces of their own by a lower --character-coverage"
        )
    else:
        remedy = f"the tokenizer could not be trained ({reason.strip()})"
    return InputError(f"--vocab-size {vocab_size}: {remedy}")


def load_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with BOS at the id that train_gpt.py knows, fit for uint16; anything else raises InputError."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise InputError(f"{name}: not a SentencePiece model") from None
    if tokenizer.bos_id() != 1:
        raise InputError(
            f"{name}: documents start with BOS, id 1, and this tokenizer has it at {tokenizer.bos_id()} (-1: nowhere)"
        )
    if tokenizer.vocab_size() > 1 << 16:
        raise InputError(f"{name}: {tokenizer.vocab_size():,} pieces do not fit the shards' uint16 (65,536)")
    return tokenizer


def byte_counts(
    tokenizer: sentencepiece.SentencePieceProcessor, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the trainer counts, per piece: its own rule, `train_gpt.piece_bytes`; InputError where it refuses the tokenizer."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import train_gpt

    try:
        return train_gpt.piece_bytes(tokenizer, name)
    except train_gpt.ConfigError as error:
        raise InputError(str(error)) from None


class Encoder:
    """Text to checked tokens with one tokenizer."""

    def __init__(self, model: bytes, name: str):
        self.name, self.tokenizer = name, load_tokenizer(model, name)
        self.length, self.spaced, self.boundary = byte_counts(self.tokenizer, name)

    def normalise(self, text: str) -> str:
        return self.tokenizer.normalize(text).replace(SPACE, " ")

    def encode(self, document: Document) -> tuple[np.ndarray, str]:
        """(BOS and pieces as uint16, normalised text); raises InputError if one does not give back the other.

        A scorer counts no leading space after BOS, so a document starts at its first other character: most tokenizers
        drop leading space themselves, the rest get the text without it.
        """
        text = self.normalise(document.text)
        source = text.lstrip(" ") if text.startswith(" ") else document.text
        ids = self.tokenizer.encode(source)
        tokens = np.array([self.tokenizer.bos_id(), *ids], dtype=np.int64)
        self.check(document, tokens, ids, text.lstrip(" "))
        return tokens.astype(np.uint16), text.lstrip(" ")

    def check(self, document: Document, tokens: np.ndarray, ids: list[int], text: str) -> None:
        if self.tokenizer.decode(ids) != text:
            raise InputError(
                f"{document.where}: the tokenizer {self.name} does not give this document back; "
                "use one with byte fallback, or train one with --vocab-size"
            )
        counted, true = self.count_bytes(tokens), len(text.encode())
        if counted != true:
            raise InputError(
                f"{document.where}: {counted:,} bytes counted from the tokens of {self.name}, {true:,} in the text; "
                "scores would be wrong: train a tokenizer with --vocab-size"
            )

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Bytes that a scorer counts for the targets tokens[1:], each after its predecessor."""
        inputs, targets = tokens[:-1], tokens[1:]
        return int(self.length[targets].sum() + (self.spaced[targets] & ~self.boundary[inputs]).sum())


# ---- parallel work


class Encoded(NamedTuple):
    """One document's tokens (n,) uint16, bytes of its normalised text, and a digest that finds copies."""

    tokens: np.ndarray
    text_bytes: int
    digest: bytes


_encoder: Encoder  # one a worker process, set by start_worker


def start_worker(model: bytes, name: str) -> None:
    global _encoder
    _encoder = Encoder(model, name)
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
        threading.Thread(target=leave_with, args=(parent,), daemon=True).start()


def leave_with(parent: Any) -> None:
    """End this process when its parent does, even a killed one: an orphan would go on holding the folder's lock."""
    parent.join()
    os._exit(1)


def encode_batch(batch: list[Document]) -> list[Encoded] | InputError:
    """Tokens of some documents; a mistake is returned, since an exception would lose its place in the order."""
    try:
        pairs = [_encoder.encode(document) for document in batch]
    except InputError as error:
        return error
    return [Encoded(tokens, len(text.encode()), hashlib.sha256(text.encode()).digest()[:16]) for tokens, text in pairs]


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents in lists of about BATCH_CHARS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents: Iterable[Document], model: bytes, name: str, workers: int) -> Iterator[Encoded]:
    """Tokens of all documents in their order, by `workers` processes."""
    if workers == 1:
        start_worker(model, name)
        results = map(encode_batch, batched(documents))
    else:
        results = in_processes(documents, model, name, workers)
    for result in results:
        if isinstance(result, InputError):
            raise result
        yield from result


def in_processes(documents: Iterable[Document], model: bytes, name: str, workers: int) -> Iterator[Any]:
    """Ordered results of `encode_batch`; only a few batches are in flight, or the whole corpus would be in memory."""
    pending: deque[Future] = deque()
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(model, name))
    try:
        for batch in batched(documents):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise Failure(f"--workers {workers}: one was killed, often for want of memory; try fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- shards


class Split:
    """Writes one split's tokens into shards of exactly `shard_tokens` tokens (the last may be shorter)."""

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.documents = self.text_bytes = self.held = 0
        self.parts: list[np.ndarray] = []
        self.shards: list[dict[str, Any]] = []

    def add(self, encoded: Encoded) -> None:
        self.documents += 1
        self.text_bytes += encoded.text_bytes
        tokens = encoded.tokens
        while self.held + len(tokens) >= self.shard_tokens:  # documents may cross from one shard to the next
            room = self.shard_tokens - self.held
            self.parts.append(tokens[:room])
            self.flush()
            tokens = tokens[room:]
        self.parts.append(tokens)
        self.held += len(tokens)

    def flush(self) -> None:
        """Write what is held as the next shard, if there is anything."""
        tokens = np.concatenate([*self.parts, np.empty(0, np.uint16)]).astype("<u2")
        self.parts, self.held = [], 0
        if len(tokens):
            path = self.folder / shard_name(self.name, len(self.shards))
            write_synced(path, shard_header(len(tokens)) + tokens.tobytes())
            self.shards.append({"file": path.name, "tokens": len(tokens), "sha256": sha256_of(path)})

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest; bytes are those of the normalised text, BOS counts as a token."""
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {"documents": self.documents, "tokens": tokens, "bytes": self.text_bytes, "shards": self.shards}


def write_splits(encoded: Iterable[Encoded], folder: Path, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Write both splits into `folder`; returns their summaries and how many training documents copy validation ones."""
    val, train = (Split(folder, name, args.shard_tokens) for name in ("val", "train"))
    val_digests: set[bytes] = set()
    copies = 0
    for item in encoded:
        if val.documents < args.val_docs:
            val.add(item)
            val_digests.add(item.digest)
            continue
        copied = item.digest in val_digests
        copies += copied
        if not (copied and args.drop_copies):
            train.add(item)
    if not train.documents:
        raise corpus.too_few(val.documents + copies, args.val_docs)
    for split in (val, train):
        split.flush()
        if not split.text_bytes:
            raise InputError(
                f"--val-docs {args.val_docs}: the {split.name} split has no byte of text after normalisation, so nothing "
                "could be scored; put other documents there"
            )
    return {"val": val.summary(), "train": train.summary(), "copies_of_validation": copies}


def files_of_set(out: Path) -> list[Path]:
    """Files in `out` that an earlier call left: shards, tokenizers, the manifest (first, so that no set is half valid)."""
    try:
        named = json.loads((out / "manifest.json").read_text())["tokenizer"]["file"]
    except (OSError, ValueError, LookupError, TypeError):
        named = None
    patterns = ("manifest.json", "fineweb_*.bin", "tokenizer*.model")
    found = [path for pattern in patterns for path in sorted(out.glob(pattern))]
    return found + [path for path in out.glob("*.model") if path.name == named and path not in found]


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A folder aside whose files take the place of the old set in `out` at the end, or vanish on any failure."""
    with locked(out) as created:
        if (old := files_of_set(out)) and not force:
            raise InputError(
                f"--out {out}: {old[0].name} is there already; name another folder, or --force to replace it"
            )
        folder = out / STAGING
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            for path in old:
                path.unlink()
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):  # the manifest last
                os.replace(path, out / path.name)
            sync_folder(out)
        except BaseException:
            shutil.rmtree(out if created else folder, ignore_errors=True)
            raise
        folder.rmdir()


# ---- the tool


def obtain_tokenizer(corpus: Corpus, args: argparse.Namespace) -> tuple[bytes, str, dict[str, Any]]:
    """(serialised model, file name, manifest entry) of the tokenizer that was named, or of one trained now."""
    if args.tokenizer:
        model, name, how = args.tokenizer.read_bytes(), f"{args.tokenizer.stem}.model", {"trained_here": False}
    else:
        lines = training_lines(corpus, args.val_docs, args.tokenizer_bytes)
        model = train_tokenizer(lines, args.vocab_size, args.character_coverage)
        name = f"tokenizer_{args.vocab_size}.model"
        how = {"trained_here": True, **TRAINER, "character_coverage": args.character_coverage}
    tokenizer = load_tokenizer(model, name)
    byte_counts(tokenizer, name)
    size = tokenizer.vocab_size()
    return model, name, {"file": name, "sha256": hashlib.sha256(model).hexdigest(), "vocab_size": size, **how}


def make_shards(args: argparse.Namespace) -> dict[str, Any]:
    """Do the whole job and return the manifest that was written."""
    check_inputs(args.inputs)
    corpus = Corpus(args.inputs, args.blank_line_docs, args.doc_bytes)
    with staged(args.out, args.force) as folder:
        model, name, about_tokenizer = obtain_tokenizer(corpus, args)
        write_synced(folder / name, model)
        encoded = encode_all(corpus.documents("shards"), model, name, args.workers)
        splits = write_splits(encoded, folder, corpus, args)
        manifest = {
            "format": "parameter-golf shards, version 1",
            "inputs": [{"file": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in args.inputs],
            "settings": {key: getattr(args, key) for key in SETTINGS},
            "tokenizer": about_tokenizer,
            **splits,
        }
        write_synced(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def report(manifest: dict[str, Any], out: Path) -> None:
    """Say what was written, in the numbers a user compares."""
    for split in ("val", "train"):
        entry = manifest[split]
        print(
            f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens "
            f"({entry['bytes'] / entry['tokens']:.3f} bytes a token), {len(entry['shards'])} shard(s)"
        )
    settings, copies, tokenizer = manifest["settings"], manifest["copies_of_validation"], manifest["tokenizer"]
    if settings["val_docs"] != OFFICIAL_VAL_DOCS:
        split = f"{settings['val_docs']:,} documents; the official split is {OFFICIAL_VAL_DOCS:,}"
        print(f"validation is the first {split}")
    if copies:
        verdict = "left out" if settings["drop_copies"] else "kept; --drop-copies leaves them out"
        print(f"{copies:,} training documents equal a validation document ({verdict})")
    print(f"DATA_PATH={out} TOKENIZER_PATH={out / tokenizer['file']} VOCAB_SIZE={tokenizer['vocab_size']}")


def positive(text: str) -> int:
    """A whole number from 1 up, with _ or , between digits if one likes."""
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=".txt or .jsonl, plain, .gz or .zst")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for shards, tokenizer and manifest.json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--vocab-size", type=positive, default=1024, help="pieces of the tokenizer to train (1024)")
    which.add_argument("--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model instead")
    add("--val-docs", type=positive, default=OFFICIAL_VAL_DOCS, metavar="N",
        help="the first N documents are validation (official split, and default: 50,000)")  # fmt: skip
    add("--shard-tokens", type=positive, default=100_000_000, help="tokens a shard (100,000,000)")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--blank-line-docs", action="store_true", help="blank lines separate the documents of a .txt file")
    cut.add_argument("--doc-bytes", type=positive, default=0, metavar="BYTES",
        help="cut a .txt file into documents of about so many bytes, at the ends of lines")  # fmt: skip
    add("--drop-copies", action="store_true", help="leave out training documents that equal a validation document")
    add("--tokenizer-bytes", type=positive, default=500_000_000, metavar="BYTES",
        help="train the tokenizer on the first so many bytes of training text (500,000,000)")  # fmt: skip
    add("--character-coverage", type=float, default=0.999,
        help="share of characters that get pieces of their own, the rest are bytes; 0.98 to 1 (0.999)")  # fmt: skip
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes that tokenise (all cores)")
    add("--force", action="store_true", help="replace the shards in DIR")
    args = parser.parse_args(argv)
    if not 0.98 <= args.character_coverage <= 1.0:
        parser.error(
            f"--character-coverage {args.character_coverage}: expected 0.98 to 1.0, SentencePiece's own bounds"
        )
    if args.shard_tokens >= 1 << 31:
        parser.error(f"--shard-tokens {args.shard_tokens}: a shard's header counts in 32 bits, so at most 2147483647")
    if args.doc_bytes >= 1 << 31:
        parser.error(f"--doc-bytes {args.doc_bytes}: expected at most 2147483647")
    if args.vocab_size > 1 << 16:
        parser.error(f"--vocab-size {args.vocab_size}: shards hold uint16, so at most 65536")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report(make_shards(args), args.out)


if __name__ == "__main__":
    sys.exit(run_tool(main))
