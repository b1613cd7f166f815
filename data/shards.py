"""The shard format and the file habits that the tools in data/ share.

A shard is 256 little-endian int32 header words (magic 20240520, version 1, token count N, zeros) and N uint16 tokens,
so its size is 1024 + 2N bytes. Names: fineweb_train_000000.bin, fineweb_val_000000.bin and so on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from text import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAGIC, VERSION, HEADER_BYTES, TOKEN_BYTES = 20240520, 1, 1024, 2
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Failure(InputError):
    """What is no mistake of the user's, as a hub that does not answer: its text is the whole message, exit status 1."""


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
    """Write `content` to `path` and wait until the disk has it; an OSError names the file."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk is reported without a name
        error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file at `path`, so that it holds the old content or all of the new, whenever this process ends."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_synced(aside, content)
    os.replace(aside, path)


_held: set[Path] = set()  # folders that this process has locked


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold `folder` for this process; yields whether it was made just now. InputError if another process holds it.

    The lock is the system's on the folder itself: it ends with the process, however that ends, and leaves no file. A
    process may lock a folder that it holds already. Where there are no such locks, nothing is locked.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if fcntl is None or key in _held:
        yield created
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        take_lock(handle, folder)
        _held.add(key)
        yield created
    finally:
        _held.discard(key)
        os.close(handle)
        if created:
            with contextlib.suppress(OSError):  # unless something is in it
                folder.rmdir()


def take_lock(handle: int, folder: Path) -> None:
    """Lock the open folder; InputError if another process has it, or has just removed it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError:
        gone = True
    except OSError:  # a file system without locks
        gone = False
    if gone:
        raise InputError(f"{folder}: another process is writing into this folder; wait for its end, or name another")


MISTAKES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def run_tool(main: Callable[[], int | None]) -> int:
    """Exit status of a command-line tool after at most one message: its own or 0; 2 for a user's mistake; 1 for a failure
    such as a full disk; 130 when interrupted."""
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # the system's own words and the file's name
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, MISTAKES) or error.errno == errno.ENAMETOOLONG else 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
