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

With --caseops the shards hold text whose case is factored out (caseops.py), and fineweb_val_bytes_*.bin the bytes of the
original text for each validation token. An operator after a space is one piece with it unless --no-fused-markers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import caseops
import numpy as np
import sentencepiece
from shards import (
    SPACE,
    Failure,
    locked,
    run_tool,
    sha256_of,
    shard_header,
    shard_name,
    sync_folder,
    write_synced,
    write_whole,
)
from text import Document, InputError, is_jsonl, read_documents
from tqdm import tqdm

OFFICIAL_VAL_DOCS = 50_000
FIELD_SHARDS = 80  # what the published exports hold and runs of the field train on
BATCH_CHARS = 1 << 19  # text handed to a worker at a time: large enough to hide the hand-over, small enough to share
# What decides the bytes of the shards, for the manifest; and what else must be equal for a job to go on.
SETTINGS = "val_docs shard_tokens blank_line_docs doc_bytes drop_copies".split()
OTHER_SETTINGS = "vocab_size character_coverage tokenizer_bytes caseops fused_markers train_shards".split()
STAGING, PROGRESS, MANIFEST = ".make_shards.partial", "progress.json", "manifest.json"
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
    official: bool  # a document without text is a mistake: the published split counts it

    def documents(self, label: str) -> Iterator[Document]:
        """Documents that are more than white space, in order, under a progress bar (on a terminal)."""
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
            for path in self.paths:
                for document in read_documents(path, self.blank_line_docs, self.doc_bytes, bar.update):
                    if document.text.strip():
                        yield document
                    elif self.official:
                        raise InputError(f"{document.where}: an empty document, which the official split would count")

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


def training_lines(corpus: Corpus, args: argparse.Namespace) -> Iterator[str]:
    """What a tokenizer is trained on: lines after the validation split, which it never sees, up to --tokenizer-bytes."""
    used = count = 0
    for count, document in enumerate(corpus.documents("tokenizer"), 1):
        if count <= args.val_docs:
            continue
        for line in document.text.split("\n"):
            if line.strip():
                used += len(line.encode())
                yield caseops.encode(caseops.normalize(line)) if args.caseops else line
        if used >= args.tokenizer_bytes:
            return
    if not used:
        raise corpus.too_few(count, args.val_docs)


FEWEST_PIECES = 4 + 256 + len(caseops.OPERATORS) + len(caseops.FUSED)  # special pieces, bytes, operators


def trainer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """SentencePiece's settings: with --caseops the text is normalised before, and operators are pieces (ids 4 to 10)."""
    if not args.caseops:
        return TRAINER
    symbols = [*caseops.OPERATORS, *(caseops.FUSED if args.fused_markers else ())]
    changes = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return {**TRAINER, **changes, "user_defined_symbols": symbols}


def train_tokenizer(lines: Iterator[str], vocab_size: int, settings: dict[str, Any]) -> bytes:
    """Serialised SentencePiece model of exactly `vocab_size` pieces; InputError where the text cannot fill it."""
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
            max_sentence_length=1 << 30,  # by default lines above 4,192 bytes would be left out in silence
            minloglevel=2,
            **settings,
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
    if "all_chars_count" in reason:
        return InputError("the training documents hold no character after normalisation; a tokenizer needs text")
    if most:
        remedy = f"this text fills at most {most[1]} pieces; give fewer, or more text"
    elif least:
        remedy = f"the special pieces, 256 bytes and single characters need {least[1]} already; give more"
        if vocab_size > FEWEST_PIECES:  # so it is the characters that are too many
            remedy += ", or fewer characters pieces of their own by a lower --character-coverage"
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


def trainer() -> Any:
    """The module train_gpt, imported when it is needed, since that takes seconds."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    return importlib.import_module("train_gpt")


def byte_counts(
    tokenizer: sentencepiece.SentencePieceProcessor, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the trainer counts, per piece: its own rule, `train_gpt.piece_bytes`; InputError where it refuses the tokenizer."""
    try:
        return trainer().piece_bytes(tokenizer, name)
    except trainer().ConfigError as error:
        raise InputError(str(error)) from None


class Encoded(NamedTuple):
    """One document: tokens (n,) uint16, bytes of its normalised text that each adds (n,) uint16, a digest to find copies."""

    tokens: np.ndarray
    bytes: np.ndarray
    digest: bytes


class Encoder:
    """Text to checked tokens with one tokenizer, its case factored out or not."""

    def __init__(self, model: bytes, name: str, case: bool = False):
        self.name, self.tokenizer, self.case = name, load_tokenizer(model, name), case
        self.length, self.spaced, self.boundary = byte_counts(self.tokenizer, name)
        pieces = [self.tokenizer.id_to_piece(i) for i in range(len(self.length))]
        if case and not set(caseops.OPERATORS) <= set(pieces):
            raise InputError(
                f"{name}: no tokenizer for --caseops, which has U+E001 to U+E004 as pieces; train one with --vocab-size"
            )
        self.operators, self.escape = caseops.operators_of(pieces), self.tokenizer.piece_to_id(caseops.ESCAPE)

    def prepare(self, text: str) -> tuple[str, str]:
        """(normalised text, what the tokenizer is given for it).

        A scorer counts no leading space after BOS, so a document starts at its first other character: most tokenizers
        drop leading space themselves, the rest get the text without it.
        """
        if self.case:
            normal = caseops.normalize(text).lstrip(" ")
            return normal, caseops.encode(normal)
        normal = self.tokenizer.normalize(text).replace(SPACE, " ")
        return normal.lstrip(" "), normal.lstrip(" ") if normal.startswith(" ") else text

    def encode(self, document: Document) -> Encoded:
        """BOS and pieces of a document; raises InputError unless they give back its normalised text and its bytes."""
        text, source = self.prepare(document.text)
        ids = self.tokenizer.encode(source)
        if not self.restores(ids, source, text):
            raise InputError(
                f"{document.where}: the tokenizer {self.name} does not give this document back; "
                "use one with byte fallback, or train one with --vocab-size"
            )
        tokens = np.array([self.tokenizer.bos_id(), *ids], dtype=np.int64)
        counted, blob = self.count_bytes(tokens), text.encode()
        if counted.sum() != len(blob):
            raise InputError(
                f"{document.where}: {counted.sum():,} bytes counted from the tokens of {self.name}, {len(blob):,} in the "
                "text; scores would be wrong: train a tokenizer with --vocab-size"
            )
        return Encoded(tokens.astype(np.uint16), counted.astype(np.uint16), hashlib.sha256(blob).digest()[:16])

    def restores(self, ids: list[int], source: str, text: str) -> bool:
        """Whether the pieces decode to the normalised text; a stream that comes back does, since it is a bijection of it."""
        decoded = self.tokenizer.decode(ids)
        if not self.case or decoded == source:
            return self.case or decoded == text
        try:  # a tokenizer that normalises afterwards
            return caseops.decode(decoded) == text
        except ValueError:
            return False

    def count_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of normalised text that each token adds after its predecessor, (n,) int64; 0 for the first, BOS."""
        inputs, targets = tokens[:-1], tokens[1:]
        counted = self.length[targets] + (self.spaced[targets] & ~self.boundary[inputs])
        counted = np.concatenate([[0], counted])
        return caseops.original_bytes(tokens, counted, self.operators, self.escape) if self.case else counted


# ---- parallel work


_encoder: Encoder  # one a worker process, set by start_worker


def start_worker(*settings: Any) -> None:
    """`settings` are the Encoder's."""
    global _encoder
    _encoder = Encoder(*settings)
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
        return [_encoder.encode(document) for document in batch]
    except InputError as error:
        return error


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


def encode_all(documents: Iterable[Document], workers: int, *encoder: Any) -> Iterator[Encoded]:
    """Tokens of all documents in their order, by `workers` processes with an Encoder each."""
    if workers == 1:
        start_worker(*encoder)
        results = map(encode_batch, batched(documents))
    else:
        results = in_processes(documents, workers, *encoder)
    for result in results:
        if isinstance(result, InputError):
            raise result
        yield from result


def in_processes(documents: Iterable[Document], workers: int, *encoder: Any) -> Iterator[Any]:
    """Ordered results of `encode_batch`; only a few batches are in flight, or the whole corpus would be in memory."""
    pending: deque[Future] = deque()
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=encoder)
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
    """Writes one split's tokens into shards of exactly `shard_tokens` tokens (the last may be shorter), and with
    `sidecars` their bytes into files of the same form."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, sidecars: bool):
        self.folder, self.name, self.shard_tokens, self.sidecars = folder, name, shard_tokens, sidecars
        self.documents = self.text_bytes = self.tokens = self.held = 0
        self.parts: list[np.ndarray] = []  # (2, n) each: tokens and bytes that are in no shard yet, `held` in all
        self.files: dict[str, list[dict[str, Any]]] = {"shards": [], **({"sidecars": []} if sidecars else {})}

    def add(self, encoded: Encoded) -> None:
        self.documents += 1
        self.text_bytes += int(encoded.bytes.sum(dtype=np.int64))
        self.tokens += len(encoded.tokens)
        rows = np.stack([encoded.tokens, encoded.bytes])
        while self.held + rows.shape[1] >= self.shard_tokens:  # documents may cross from one shard to the next
            room = self.shard_tokens - self.held
            self.parts.append(rows[:, :room])
            self.flush()
            rows = rows[:, room:]
        self.parts.append(rows)
        self.held += rows.shape[1]

    def flush(self) -> None:
        """Write what is held as the next shard, if there is anything."""
        rows = np.concatenate([*self.parts, np.empty((2, 0), np.uint16)], axis=1).astype("<u2")
        self.parts, self.held = [], 0
        if rows.shape[1]:
            for kind, row, name in (("shards", rows[0], self.name), ("sidecars", rows[1], f"{self.name}_bytes")):
                if kind in self.files:
                    path = self.folder / shard_name(name, len(self.files[kind]))
                    write_synced(path, shard_header(len(row)) + row.tobytes())
                    about = {"file": path.name, "tokens": len(row), "sha256": sha256_of(path)}
                    self.files[kind].append(about)

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest; bytes are those of the normalised text, BOS counts as a token."""
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.text_bytes, **self.files}

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, for JSON."""
        return {**self.summary(), "held": np.concatenate([*self.parts, np.empty((2, 0), np.uint16)], axis=1).tolist()}

    def resume(self, state: dict[str, Any]) -> None:
        self.documents, self.text_bytes, self.tokens = state["documents"], state["bytes"], state["tokens"]
        self.files = {kind: state[kind] for kind in self.files}
        self.parts = [np.array(state["held"], dtype=np.uint16).reshape(2, -1)]
        self.held = self.parts[0].shape[1]


class Job:
    """Both splits on their way into `folder`; with --resume, progress.json there says after each shard where to go on."""

    def __init__(self, folder: Path, corpus: Corpus, args: argparse.Namespace, tokenizer: dict[str, Any]):
        self.folder, self.corpus, self.args, self.tokenizer = folder, corpus, args, tokenizer
        self.val = Split(folder, "val", args.shard_tokens, args.caseops)
        self.train = Split(folder, "train", args.shard_tokens, sidecars=False)
        self.read = self.copies = 0  # documents of the corpus; those of training that are in validation too
        self.digests: set[str] = set()
        self.pace = Pace(args)

    def write(self, encoded: Iterable[Encoded]) -> dict[str, Any]:
        """Write all documents, or as many as --train-shards holds; returns the manifest's entries."""
        limit = (self.args.train_shards or sys.maxsize) * self.args.shard_tokens
        for item in encoded:
            tokens = self.train.tokens + len(item.tokens)
            if self.val.documents == self.args.val_docs and tokens > limit:
                if not self.train.documents:
                    raise InputError(
                        f"--train-shards {self.args.train_shards}: the first training document has {tokens:,} tokens, they "
                        f"hold {limit:,}; give more, or larger ones by --shard-tokens"
                    )
                break
            self.add(item)
        if not self.train.documents:
            raise self.corpus.too_few(self.val.documents + self.copies, self.args.val_docs)
        for split in (self.val, self.train):
            split.flush()
            if not split.text_bytes:
                raise InputError(
                    f"--val-docs {self.args.val_docs}: the {split.name} split has no byte of text after normalisation, "
                    "so nothing could be scored; put other documents there"
                )
        return {"val": self.val.summary(), "train": self.train.summary(), "copies_of_validation": self.copies}

    def add(self, item: Encoded) -> None:
        self.read += 1
        if self.val.documents < self.args.val_docs:
            self.val.add(item)
            self.digests.add(item.digest.hex())
            if self.val.documents == self.args.val_docs:
                self.val.flush()
                self.save()
            return
        copied, shards = item.digest.hex() in self.digests, len(self.train.files["shards"])
        self.copies += copied
        if not (copied and self.args.drop_copies):
            self.train.add(item)
            if len(self.train.files["shards"]) > shards:
                self.save()
                self.pace.tell(self.val, self.train)

    def save(self) -> None:
        """Write down where to go on."""
        if self.args.resume:
            state = {"identity": identity(self.args), "tokenizer": self.tokenizer, "read": self.read, "copies": self.copies,
                     "digests": sorted(self.digests), "val": self.val.state(), "train": self.train.state()}  # fmt: skip
            write_whole(self.folder / PROGRESS, json.dumps(state).encode())

    def resume(self, state: dict[str, Any]) -> None:
        self.read, self.copies, self.digests = state["read"], state["copies"], set(state["digests"])
        self.val.resume(state["val"])
        self.train.resume(state["train"])
        self.pace.begin(self.val, self.train)
        if self.read:
            print(f"going on after {self.read:,} documents and {len(self.train.files['shards'])} training shards")


class Pace:
    """How fast text becomes shards, and what that means for the field's 80 shards of 100 M tokens."""

    def __init__(self, args: argparse.Namespace):
        self.workers, self.bytes, self.tokens = args.workers, 0, 0
        self.started = self.told = time.perf_counter()

    def begin(self, *splits: Split) -> None:
        """Count from here on: what the splits hold was written by an earlier process."""
        self.bytes, self.tokens = sum(split.text_bytes for split in splits), sum(split.tokens for split in splits)

    def tell(self, *splits: Split, wait: float = 30) -> None:
        """Print the pace, unless `wait` seconds have not passed since the last time."""
        now = time.perf_counter()
        if now - self.told < wait:
            return
        self.told, seconds = now, now - self.started
        done, tokens = (sum(getattr(split, what) for split in splits) for what in ("text_bytes", "tokens"))
        per_token = seconds / max(1, tokens - self.tokens)
        print(
            f"{(done - self.bytes) / seconds / 1e6:.2f} MB/s of text on {self.workers} process(es); at this pace "
            f"{FIELD_SHARDS} shards of 100,000,000 tokens take {per_token * FIELD_SHARDS * 1e8 / 3600:.1f} hours",
            flush=True,
        )


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for a job to go on: inputs, tokenizer, settings."""
    model = args.tokenizer and hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
    inputs = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in args.inputs]
    return {"inputs": inputs, "model": model, **{key: getattr(args, key) for key in [*SETTINGS, *OTHER_SETTINGS]}}


def saved_progress(folder: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """What an interrupted job with the same inputs and settings wrote down last; None if there is none."""
    try:
        state = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return None
    if state.get("identity") != identity(args):
        return None
    left = (MANIFEST, state["tokenizer"]["file"])  # neither is left of a set that was published
    return state if any((folder / name).exists() for name in left) else None


def files_of_set(out: Path) -> list[Path]:
    """Files in `out` that an earlier call left: shards, tokenizers, the manifest (first, so that no set is half valid)."""
    try:
        named = json.loads((out / MANIFEST).read_text())["tokenizer"]["file"]
    except (OSError, ValueError, LookupError, TypeError):
        named = None
    patterns = (MANIFEST, "fineweb_*.bin", "tokenizer*.model")
    found = [path for pattern in patterns for path in sorted(out.glob(pattern))]
    return found + [path for path in out.glob("*.model") if path.name == named and path not in found]


@contextlib.contextmanager
def staged(out: Path, args: argparse.Namespace) -> Iterator[Path]:
    """A folder aside whose files take the place of the old set in `out` at the end, or vanish on any failure; with
    --resume they wait there for the next call."""
    with locked(out) as created:
        folder = out / STAGING
        begun = args.resume and saved_progress(folder, args)
        if (old := files_of_set(out)) and not (args.force or (begun and (folder / MANIFEST).exists())):
            raise InputError(
                f"--out {out}: {old[0].name} is there already; name another folder, or --force to replace it"
            )
        if not begun:
            if args.resume and (folder / PROGRESS).exists():
                print(f"what an earlier job left in {folder} is of other inputs or settings: starting anew")
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
            publish(folder, out)
        except BaseException:
            if not (args.resume and (folder / PROGRESS).exists()):
                shutil.rmtree(out if created else folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def publish(folder: Path, out: Path) -> None:
    """Put the whole set in `folder` in the place of what `out` holds; after an interruption, the rest of it."""
    new, manifest = files_of_set(folder), json.loads((folder / MANIFEST).read_text())
    files = [manifest["tokenizer"]]
    for split, kind in itertools.product(("val", "train"), ("shards", "sidecars")):
        files += manifest[split].get(kind, [])
    moved = {file["file"] for file in files} - {path.name for path in new}
    for path in files_of_set(out):
        if path.name not in moved:
            path.unlink()
    for path in reversed(new):  # the manifest last
        os.replace(path, out / path.name)
    sync_folder(out)


# ---- the tool


def obtain_tokenizer(corpus: Corpus, args: argparse.Namespace) -> tuple[bytes, dict[str, Any]]:
    """(serialised model, manifest entry) of the tokenizer that was named, or of one trained now."""
    if args.tokenizer:
        model, name, how = args.tokenizer.read_bytes(), f"{args.tokenizer.stem}.model", {"trained_here": False}
    else:
        settings = {**trainer_settings(args), "character_coverage": args.character_coverage}
        model = train_tokenizer(training_lines(corpus, args), args.vocab_size, settings)
        name, how = f"tokenizer_{args.vocab_size}.model", {"trained_here": True, **settings}
    tokenizer = load_tokenizer(model, name)
    byte_counts(tokenizer, name)
    size = tokenizer.vocab_size()
    return model, {"file": name, "sha256": hashlib.sha256(model).hexdigest(), "vocab_size": size, **how}


def make_shards(args: argparse.Namespace) -> dict[str, Any]:
    """Do the whole job and return the manifest that was written."""
    check_inputs(args.inputs)
    args.workers = args.workers or trainer().usable_cpus()
    corpus = Corpus(args.inputs, args.blank_line_docs, args.doc_bytes, args.official_split)
    with staged(args.out, args) as folder:
        if (folder / MANIFEST).exists():  # the last call was stopped while it published
            return json.loads((folder / MANIFEST).read_text())
        state = saved_progress(folder, args) if args.resume else None
        if state:
            about, model = state["tokenizer"], (folder / state["tokenizer"]["file"]).read_bytes()
        else:
            model, about = obtain_tokenizer(corpus, args)
            write_synced(folder / about["file"], model)
        job = Job(folder, corpus, args, about)
        job.resume(state) if state else job.save()
        documents = itertools.islice(corpus.documents("shards"), job.read, None)
        splits = job.write(encode_all(documents, args.workers, model, about["file"], args.caseops))
        if args.official_split and splits["val"]["documents"] != OFFICIAL_VAL_DOCS:
            raise AssertionError(f"{splits['val']['documents']:,} validation documents, not {OFFICIAL_VAL_DOCS:,}")
        transform = {"transform": "caseops", "fused_markers": fused_markers(model)} if args.caseops else {}
        manifest = {
            "format": "parameter-golf shards, version 1",
            "inputs": [{"file": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in args.inputs],
            "settings": {key: getattr(args, key) for key in SETTINGS},
            **transform,
            "tokenizer": about,
            **splits,
        }
        write_whole(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    job.pace.tell(job.val, job.train, wait=0 if args.resume else 10)
    return manifest


def fused_markers(model: bytes) -> bool:
    """Whether an operator and the space before it are one piece of this tokenizer."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    return all(tokenizer.piece_to_id(piece) != tokenizer.unk_id() for piece in caseops.FUSED)


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
    add("--caseops", action="store_true", help="factor case out of the text, with a sidecar of original bytes")
    add("--no-fused-markers", dest="fused_markers", action="store_false",
        help="with --caseops: the space before an operator is a piece of its own, as published")  # fmt: skip
    add("--drop-copies", action="store_true", help="leave out training documents that equal a validation document")
    add("--tokenizer-bytes", type=positive, default=500_000_000, metavar="BYTES",
        help="train the tokenizer on the first so many bytes of training text (500,000,000)")  # fmt: skip
    add("--character-coverage", type=float, default=0.999,
        help="share of characters that get pieces of their own, the rest are bytes; 0.98 to 1 (0.999)")  # fmt: skip
    add("--workers", type=positive, help="processes that tokenise (all cores, or what a container allows)")
    add("--train-shards", type=positive, metavar="N", help="stop when so many training shards are full")
    add("--official-split", action="store_true",
        help="the input is the challenge's docs_selected.jsonl: every line is a document, 50,000 are validation")  # fmt: skip
    add("--force", action="store_true", help="replace the shards in DIR")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    args = parser.parse_args(argv)
    if not 0.98 <= args.character_coverage <= 1.0:
        parser.error(
            f"--character-coverage {args.character_coverage}: expected 0.98 to 1.0, SentencePiece's own bounds"
        )
    if args.shard_tokens >= 1 << 31:
        parser.error(f"--shard-tokens {args.shard_tokens}: a shard's header counts in 32 bits, so at most 2147483647")
    if args.doc_bytes >= 1 << 31:
        parser.error(f"--doc-bytes {args.doc_bytes}: expected at most 2147483647")
    if args.official_split and args.val_docs != OFFICIAL_VAL_DOCS:
        parser.error(f"--val-docs {args.val_docs}: the official split is {OFFICIAL_VAL_DOCS}")
    if not args.fused_markers and (args.tokenizer or not args.caseops):
        parser.error("--no-fused-markers needs --caseops and no --tokenizer: it says how the tokenizer is trained")
    if args.vocab_size > 1 << 16:
        parser.error(f"--vocab-size {args.vocab_size}: shards hold uint16, so at most 65536")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report(make_shards(args), args.out)


if __name__ == "__main__":
    sys.exit(run_tool(main))
