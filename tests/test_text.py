"""data/text.py: what a line and a document are, in every form, and that each fault names its place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import text

# Everything that str.splitlines takes for the end of a line, and what JSON may hold unescaped.
ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


def read(folder: Path, name: str, content: bytes, **how) -> list[text.Document]:
    (folder / name).write_bytes(content)
    return list(text.read_documents(folder / name, **how))


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_newlines_are_those_of_every_system(tmp_path, end):
    content = f"\ufeffone{end}{end}two \u2028{end}{end}three".encode()
    for size in (1, 2, 3, 4, 99):
        lines = text.read_lines([content[i : i + size] for i in range(0, len(content), size)], "x")
        assert [line.text for line in lines] == ["one\n", "\n", "two \u2028\n", "\n", "three"]
    assert [d.text for d in read(tmp_path, "a.txt", content, blank_line_docs=True)] == [
        "one\n",
        "two \u2028\n",
        "three",
    ]
    assert read(tmp_path, "b.txt", end.encode() * 9, blank_line_docs=True) == []
    assert [d.where[-1] for d in read(tmp_path, "c.jsonl", f'{{"text": "x"}}{end * 2}{{"text": "y"}}'.encode())] == [
        "1",
        "3",
    ]


def test_lines_end_at_newlines_alone(tmp_path):
    record = json.dumps({"text": "x\u2028y\u0085z"}, ensure_ascii=False).encode()
    assert [d.text for d in read(tmp_path, "a.jsonl", record + b"\r\n\n" + record)] == ["x\u2028y\u0085z"] * 2
    assert [d.text for d in read(tmp_path, "a.txt", f"{ODD}\n\n{ODD}".encode(), blank_line_docs=True)] == [
        ODD + "\n",
        ODD,
    ]
    lines = list(text.read_lines([f"{ODD}\nsec".encode(), b"ond\n"], "list"))
    assert lines == [(1, ODD + "\n"), (2, "second\n")]


def test_blocks_may_end_anywhere():
    content = "\ufeffé😀\nzwei\n\n日本".encode()
    whole = list(text.read_lines([content], "x"))
    assert whole == [(1, "é😀\n"), (2, "zwei\n"), (3, "\n"), (4, "日本")]
    for size in (1, 2, 3, 5):
        assert list(text.read_lines([content[i : i + size] for i in range(0, len(content), size)], "x")) == whole


@pytest.mark.parametrize("pack, ending", [(bytes, ""), (gzip.compress, ".gz"), (zstandard.compress, ".zst")])
def test_every_form_gives_the_same_documents(tmp_path, pack, ending):
    record = b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two", "more": 1}\n'
    found = read(tmp_path, "a.jsonl" + ending, pack(record))
    assert [(d.text, d.where.rsplit(":")[-1]) for d in found] == [("one", "1"), ("two", "3")]
    assert [d.text for d in read(tmp_path, "a.txt" + ending, pack(b"\xef\xbb\xbfone\n"))] == ["one\n"]
    assert [d.text for d in read(tmp_path, "notes.md" + ending, pack(b"# one"))] == ["# one"]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 text (byte 0xe9 at offset 27"),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "caf\xe9"}', "a.jsonl:1: not UTF-8 text (byte 0xe9 at offset 16"),
    ("a.txt", b"x\ny\n\xff\xfeh\x00", "a.txt:3: not UTF-8 text (byte 0xff at offset 4"),
    ("a.txt", b"x\ncut \xe2\x82", "a.txt:2: not UTF-8 text (byte 0xe2 at offset 6"),
    ("a.txt", b"surrogate \xed\xa0\x80", "a.txt:1: not UTF-8 text (byte 0xed at offset 10"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": oops}', "a.jsonl:3: not JSON (Expecting value at column 10)"),
    ("a.jsonl", b'{"text": "x"} {"text": "y"}', "a.jsonl:1: not JSON (Extra data at column 15)"),
    ("a.jsonl", b"[" * 200_000, "a.jsonl:1: not JSON ("),
    ("a.jsonl", b"[1" + b"0" * 10_000 + b"]", "a.jsonl:1: not JSON ("),
    ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 99, "a.jsonl.gz: cannot be decompressed ("),
    ("a.jsonl", b'"text"', 'a.jsonl:1: no string under "text"'),
    ("a.jsonl", b'{"text": null}', 'a.jsonl:1: no string under "text"'),
    ("a.jsonl", b'{"text": "ab\\uD83D"}', "a.jsonl:1: the text holds half a surrogate pair (U+D83D at character 2)"),
    ("a.jsonl", b'{"text": "\\ude00\\ud83d"}', "a.jsonl:1: the text holds half a surrogate pair (U+DE00 at character 0)"),
])  # fmt: skip
def test_each_fault_names_file_line_and_place(tmp_path, name, content, words):
    with pytest.raises(text.InputError) as error:
        read(tmp_path, name, content)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert read(tmp_path, "a.jsonl", b'{"text": "\\ud83d\\ude00"}')[0].text == "😀"


def test_cutting_by_bytes_loses_nothing_and_finds_no_place_too_late(tmp_path):
    lines = ["short line\n"] * 30 + ["one long line " * 40 + "\n", "日本" * 300 + "\n", "end"]
    found = read(tmp_path, "a.txt", "".join(lines).encode(), doc_bytes=50)
    assert "".join(d.text for d in found) == "".join(lines)
    assert all(len(d.text) <= 150 for d in found) and all(len(d.text.encode()) >= 50 for d in found[:-1])
    assert [d.where.rsplit(":")[-1] for d in found[:3]] == ["1", "6", "11"]


def test_progress_adds_up_to_the_file(tmp_path):
    content = b'{"text": "x"}\n' * 10_000
    seen: list[int] = []
    read(tmp_path, "a.jsonl", content, progress=seen.append)
    assert sum(seen) == len(content)
