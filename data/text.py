"""Files to lines and documents: the one reader of .txt and .jsonl, plain, .gz or .zst, that this repository has.

A line ends at a newline, a carriage return or both, and reads with a newline. It ends nowhere else: str.splitlines would also
cut at U+2028 and U+0085, which stand inside JSON strings. A byte-order mark at the start is left out. Whatever cannot be read is an InputError that names file and line.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard


class InputError(ValueError):
    """A mistake of the user's: its text is the whole message, the exit status is 2."""


class Line(NamedTuple):
    """A line with its newline, counted from 1."""

    number: int
    text: str


class Document(NamedTuple):
    """One text and where it came from ("file:line"), for messages."""

    text: str
    where: str


# ---- bytes


def zstd_blocks(file: io.BufferedIOBase, name: str) -> Iterator[bytes]:
    """Decompressed bytes of all frames; unlike the library's stream reader it notices a file cut short."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    fresh = True
    while block := file.read(1 << 18):
        while block:
            yield frame.decompress(block)
            fresh, block = False, b""
            if frame.eof:
                block, fresh = frame.unused_data, True
                frame = zstandard.ZstdDecompressor().decompressobj()
    if not fresh:
        raise InputError(f"{name}: the zstd stream ends early; the file is cut short")


def blocks(path: Path, file: io.BufferedIOBase) -> Iterator[bytes]:
    """Decompressed bytes of an open file, by the ending of its name; damage raises InputError."""
    try:
        if path.suffix == ".zst":
            yield from zstd_blocks(file, str(path))
            return
        plain = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        while block := plain.read(1 << 20):
            yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: cannot be decompressed ({error})") from None


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their endings (\\n, \\r\\n or \\r) from blocks of bytes; the last may lack one."""
    held: list[bytes] = []
    for part in parts:
        if held and held[-1].endswith(b"\r"):  # which a newline may follow at the start of this block
            end, part = (b"\n", part[1:]) if part.startswith(b"\n") else (b"", part)
            yield b"".join([*held, end])
            held.clear()
        lines = part.splitlines(keepends=True)  # of bytes, it knows those three alone
        for line in lines[:-1]:
            yield b"".join([*held, line])
            held.clear()
        held += lines[-1:]
        if held and held[-1].endswith(b"\n"):
            yield b"".join(held)
            held.clear()
    if held:
        yield b"".join(held)


# ---- lines


def read_lines(parts: Iterable[bytes], name: str) -> Iterator[Line]:
    """Lines of UTF-8 bytes, which `name` stands for in messages; other encodings raise InputError."""
    offset = 0
    for number, line in enumerate(split_lines(parts), 1):
        mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        try:
            text = re.sub(r"\r\n?\Z", "\n", line[mark:].decode())
        except UnicodeDecodeError as error:
            at = mark + error.start
            raise InputError(
                f"{name}:{number}: not UTF-8 text (byte 0x{line[at]:02x} at offset {offset + at:,}: {error.reason}); "
                "convert the file to UTF-8"
            ) from None
        yield Line(number, text)
        offset += len(line)


def parse_line(line: str, where: str) -> Document:
    """The document on one line of JSON, an object with a string under "text"; raises InputError where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{where}: not JSON ({at}); each line must be an object with a string under text") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where}: no string under "text"; each line must be {{"text": "..."}}')
    if re.search(r"\\u[dD]", line) and (half := re.search(r"[\ud800-\udfff]", text)):
        raise InputError(
            f"{where}: the text holds half a surrogate pair (U+{ord(half[0]):04X} at character {half.start():,}), "
            "which is no character; remove it"
        )
    return Document(text, where)


# ---- documents


def paragraphs(lines: Iterable[Line], name: str) -> Iterator[Document]:
    """Documents between blank lines."""
    held: list[str] = []
    start = 1
    for number, line in lines:
        if line.strip():
            held.append(line)
            continue
        if held:
            yield Document("".join(held), f"{name}:{start}")
        held, start = [], number + 1
    if held:
        yield Document("".join(held), f"{name}:{start}")


def parts_of(lines: Iterable[Line], name: str, size: int) -> Iterator[Document]:
    """Documents of about `size` bytes that end where a line does; a line of more than twice that is cut at blanks."""
    held: list[str] = []
    start = used = 0
    for number, line in lines:
        cuts = [line] if len(line) <= 2 * size else re.findall(rf"(?s).{{{size}}}\S{{0,{size}}}\s?|.+", line)
        for piece in cuts:
            start = start if held else number
            held.append(piece)
            used += len(piece.encode())
            if used >= size:
                yield Document("".join(held), f"{name}:{start}")
                held, used = [], 0
    if held:
        yield Document("".join(held), f"{name}:{start}")


def is_jsonl(path: Path) -> bool:
    """Whether the name says that each line holds a JSON object; every other file is text."""
    return re.search(r"\.jsonl(\.gz|\.zst)?$", path.name) is not None


def read_documents(
    path: Path,
    blank_line_docs: bool = False,
    doc_bytes: int = 0,
    progress: Callable[[int], object] = int,
) -> Iterator[Document]:
    """Documents of one file in order: the lines of a .jsonl; of other files the whole text, or what stands between blank
    lines, or parts of about `doc_bytes` bytes. `progress` is called with the bytes of the file that were read since the last.
    """
    with path.open("rb") as file:
        seen = 0
        lines, name = read_lines(blocks(path, file), str(path)), str(path)
        if is_jsonl(path):
            found = (parse_line(line, f"{name}:{number}") for number, line in lines if line.strip())
        elif blank_line_docs:
            found = paragraphs(lines, name)
        elif doc_bytes:
            found = parts_of(lines, name, doc_bytes)
        else:
            found = iter([Document("".join(line for _, line in lines), name)])
        for document in found:
            yield document
            progress(file.tell() - seen)
            seen = file.tell()
