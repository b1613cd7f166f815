"""The shard format and the file habits that the tools in data/ share.

A shard is 256 little-endian int32 header words (magic 20240520, version 1, token count N, zeros) and N uint16 tokens,
so its size is 1024 + 2N bytes. Names: fineweb_train_000000.bin, fineweb_val_000000.bin and so on.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

MAGIC, VERSION, HEADER_BYTES, TOKEN_BYTES = 20240520, 1, 1024, 2
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class InputError(ValueError):
    """A user's mistake, or the outside world's: its text is the whole message, exit status 2."""


def shard_name(split: str, index: int) -> str:
    """File name of shard `index` of `split` ("train" or "val"): the names that trainers of this field look for."""
    return f"fineweb_{split}_{index:06d}.bin"


def shard_header(tokens: int) -> bytes:
    """The 1024 header bytes of a shard that holds `tokens` tokens; the inverse of `parse_header`."""
    return struct.pack("<3i", MAGIC, VERSION, tokens).ljust(HEADER_BYTES, b"\0")


def parse_header(head: bytes, name: str) -> int:
    """Token count of the shard that starts with `head`; raises InputError naming what is wrong with it."""
    if len(head) < HEADER_BYTES:
        raise InputError(f"{name}: {len(head)} bytes, shorter than a shard's header of {HEADER_BYTES}")
    magic, version, tokens = struct.unpack_from("<3i", head)
    if magic != MAGIC:
        raise InputError(f"{name}: magic {magic}, a shard starts with {MAGIC}")
    if version != VERSION:
        raise InputError(f"{name}: shard version {version}, only version {VERSION} is known")
    if tokens < 0:
        raise InputError(f"{name}: the header claims {tokens} tokens")
    return tokens


def check_shard(path: Path) -> int:
    """Token count of the shard at `path` once magic, version and size agree; raises InputError otherwise."""
    with path.open("rb") as file:
        tokens = parse_header(file.read(HEADER_BYTES), path.name)
    size, expected = path.stat().st_size, HEADER_BYTES + TOKEN_BYTES * tokens
    if size != expected:
        raise InputError(f"{path.name}: {size:,} bytes, but its header claims {tokens:,} tokens = {expected:,} bytes")
    return tokens


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` to `path` and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def run_tool(main: Callable[[], int | None]) -> int:
    """Exit status of a command-line tool: its own or 0, 2 after one clear message, 130 when interrupted."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # disk full, no permission, not a file: the system's own words and the file's name
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
