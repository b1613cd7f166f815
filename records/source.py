"""Reads a training script without running it: undoes self-extracting packs statically and finds what reviewers reject.

Everything here works on the syntax tree of text. Literals are decoded by trying the usual encodings and compressors on
them, each bounded to `MAX_BYTES` of output and `MAX_LAYERS` of nesting, so a hostile file costs time but runs nothing.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import functools
import hashlib
import importlib
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from patterns import Finding, find_patterns
from syntax import calls, dotted, every, nodes, parse

MAX_BYTES, MAX_LAYERS = 8_000_000, 4
LARGE_LITERAL = 400  # bytes; shorter ones hold no training script
LARGE_PAYLOAD = 20_000  # bytes; shorter ones hold no text worth hiding


@dataclass
class Script:
    """A script as found (`outer`) and as it runs (`source`, after `layers` unpackings).

    `opaque` says what resisted; `unread` that it was decoded, and that this interpreter cannot parse it.
    """

    outer: bytes
    source: str = ""
    layers: int = 0
    opaque: str | None = None
    unread: str | None = None
    tree: ast.Module | None = None
    name: str = "train_gpt.py"
    findings: list[Finding] = field(default_factory=list)

    def hashes(self) -> set[str]:
        return {hashlib.sha256(b).hexdigest() for b in (self.outer, self.source.encode("utf-8", "surrogateescape"))}


def read_script(path: Path) -> Script:
    """The script at `path`, unpacked as far as static decoding goes, with its findings. Never raises on content."""
    with path.open("rb") as file:
        script = Script(file.read(MAX_BYTES + 1), name=path.name)
    if len(script.outer) > MAX_BYTES:
        script.opaque = f"more than {MAX_BYTES:,} bytes"
        return script
    if not script.outer.strip():
        script.opaque = f"holds no code ({len(script.outer):,} bytes)"
        return script
    data = script.outer
    for script.layers in range(MAX_LAYERS + 1):
        script.source = data.decode("utf-8", "surrogateescape")
        tree = parse(data)
        if tree is None:
            _explain(script, data)
            break
        script.tree = tree
        inner = _hidden_script(tree)
        if inner is None:
            break
        data = inner
    if script.tree is not None and not (script.opaque or script.unread):
        script.opaque = _unread(script.tree)
        try:
            script.findings = [*find_patterns(script.tree, script.source), *_payloads(script.tree)]
        except RecursionError:
            script.unread = "is nested too deeply to be searched"
    return script


def _explain(script: Script, data: bytes) -> None:
    """Why the innermost layer has no tree: without libcst it may only be newer than this interpreter."""
    decoded = f"decoded, {len(data):,} bytes, " if script.layers else ""
    if find_spec("libcst") is None and _reads_as_python(data):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        script.unread = (
            f"{decoded}syntax that Python {version} does not parse; with libcst installed it is read all the same"
        )
    else:
        script.opaque = f"{decoded}is no Python that can be parsed"
    script.tree = None


# ---- Packed scripts


def _literals(tree: ast.Module) -> Iterator[bytes]:
    """Large string and bytes constants, sums of constants joined, longest first."""
    found = [_constant(node) for node in every(tree, ast.Constant, ast.BinOp)]
    return iter(sorted({f for f in found if f and len(f) >= LARGE_LITERAL}, key=len, reverse=True))


def _constant(node: ast.AST) -> bytes | None:
    """The bytes of a constant or a sum of constants."""
    parts: list[bytes] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant):
        parts.append(_bytes_of(node.right))
        node = node.left
    parts.append(_bytes_of(node))
    return b"".join(reversed(parts)) if None not in parts else None


def _bytes_of(node: ast.AST) -> bytes | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return (
        value.encode("utf-8", "surrogatepass")
        if isinstance(value, str)
        else value
        if isinstance(value, bytes)
        else None
    )


def _hidden_script(tree: ast.Module) -> bytes | None:
    """The largest Python text that a literal of `tree` decodes to, if `tree` itself looks like its wrapper."""
    if not calls(tree, {"exec", "eval", "runpy.run_path", "compile", "importlib.import_module", "subprocess.run"}):
        return None
    return next((text for literal in _literals(tree) for text in _contents(literal) if _is_program(text)), None)


def _contents(literal: bytes) -> Iterator[bytes]:
    """What a literal decodes and inflates to, in every known way."""
    for raw in _decodings(literal):
        for inflate in INFLATERS:
            text = _quietly(inflate, raw)
            if text and len(text) >= LARGE_LITERAL // 4:
                yield text


def _is_program(data: bytes) -> bool:
    if not re.search(rb"\b(import|def|exec)\b", data[:100_000]):
        return False
    tree = parse(data)
    if tree is None:
        return _reads_as_python(data)
    return any(isinstance(n, ast.Import | ast.ImportFrom | ast.FunctionDef) for n in tree.body)


def _reads_as_python(data: bytes) -> bool:
    """Text whose lines begin as a program's do, whatever version of Python it is written for."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    starts = (
        r"(?m)^(?:import \w[\w., ]*(?:$|;)|from [\w.]+ import |\s*def \w+[\[(]|\s*class \w+|\s*return\b|if __name__)"
    )
    return len(re.findall(starts, text)) >= 3 and "\0" not in text


def _decodings(literal: bytes) -> Iterator[bytes]:
    yield literal
    packed = re.sub(rb"\s", b"", literal)
    hexed = functools.partial(base64.b16decode, casefold=True)
    for decode in (base64.b85decode, functools.partial(base64.b64decode, validate=True), base64.a85decode, hexed):
        if raw := _quietly(decode, packed):
            yield raw
    latin = _quietly(lambda b: b.decode("utf-8").encode("latin-1"), literal)
    if latin and latin != literal:
        yield latin


def _quietly(function: Callable, data) -> bytes | None:
    """`function(data)`, or None where the bytes are not of its kind."""
    try:
        return function(data)
    except (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError, binascii.Error, _Unreadable):
        return None


class _Unreadable(Exception):
    """An optional decompressor is missing, failed, or met its bound."""


def _whole(decoder, data: bytes) -> bytes:
    """All output of an incremental decompressor, refused beyond the bound."""
    out = decoder.decompress(data, MAX_BYTES)
    if not getattr(decoder, "eof", True):
        raise _Unreadable("does not end within the bound")
    return out


def _raw_lzma(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), data)


def _brotli(data: bytes) -> bytes:
    decoder, out = _module("brotli").Decompressor(), bytearray()
    try:
        for start in range(len(data)):  # byte by byte: no single step can inflate far beyond the bound
            out += decoder.process(data[start : start + 1])
            if len(out) > MAX_BYTES:
                raise _Unreadable("beyond the bound")
        if not decoder.is_finished():
            raise _Unreadable("no whole stream")
    except _module("brotli").error as error:
        raise _Unreadable(str(error)) from None
    return bytes(out)


def _zstd(data: bytes) -> bytes:
    if data[:4] != b"\x28\xb5\x2f\xfd":
        raise _Unreadable("no zstd magic")
    zstandard = _module("zstandard")
    try:
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data).read(MAX_BYTES)
    except zstandard.ZstdError as error:
        raise _Unreadable(str(error)) from None


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _Unreadable(f"{name} is not installed") from None


INFLATERS: list[Callable[[bytes], bytes]] = [
    lambda data: data,
    lambda data: _whole(zlib.decompressobj(47), data),  # zlib or gzip
    lambda data: _whole(zlib.decompressobj(-15), data),
    lambda data: _whole(lzma.LZMADecompressor(memlimit=1 << 28), data),
    _raw_lzma,
    lambda data: _whole(bz2.BZ2Decompressor(), data),
    _zstd,
    _brotli,
]


def _payloads(tree: ast.Module) -> Iterator[Finding]:
    """Large literals that are no script: tables, or text that the artifact was not to hold."""
    for node in every(tree, ast.Constant):
        size = len(_bytes_of(node) or b"")
        if size > LARGE_PAYLOAD and b" " not in (_bytes_of(node) or b"")[:200]:
            yield Finding("large literal in the code", node.lineno, f"{size:,} bytes that no comment explains", "")


def _unread(tree: ast.Module) -> str | None:
    """Why the innermost layer is still not the whole program: it executes something that is not in plain sight."""
    blobs = [literal for literal in _literals(tree) if len(literal) > 4 * LARGE_LITERAL and b" " not in literal[:200]]
    if blobs and calls(tree, {"exec", "eval", "runpy.run_path"}):
        return f"executes a literal of {len(blobs[0]):,} bytes that no known decoder opens"
    if not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in nodes(tree)) and calls(tree, {"exec"}):
        return "executes code that is not in the file"
    return None


def packed_size(script: Script) -> int:
    """Bytes of the source packed as records pack theirs: raw LZMA in base85."""
    data = script.source.encode("utf-8", "surrogateescape")
    return len(base64.b85encode(lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])))


@dataclass(frozen=True)
class Likeness:
    """How far another text is the same program, comments, docstrings, formatting and packing aside."""

    equal: bool
    constants: bool  # equal but for values of constants
    form: bool  # both packed equally deep, so that a minifier explains no difference
    names: float  # share of the names of both that both have


def likeness(script: Script, text: str) -> Likeness:
    """Compares the innermost layers of a script and of a text."""
    data, layers = text.encode("utf-8", "surrogateescape"), 0
    tree = parse(data)
    while tree is not None and layers < MAX_LAYERS and (data := _hidden_script(tree)):
        tree, layers = parse(data), layers + 1
    if tree is None or script.tree is None:
        return Likeness(False, False, False, 0.0)
    ours, theirs = ({getattr(n, "id", getattr(n, "attr", "")) for n in nodes(t)} for t in (script.tree, tree))
    shared = len(ours & theirs) / max(1, len(ours | theirs))
    equal = _bare(tree) == _bare(script.tree)
    return Likeness(equal, equal or _bare(tree, False) == _bare(script.tree, False), layers == script.layers, shared)


def same_but_for_constants(texts: list[str]) -> bool:
    """Whether printed sources are one program with other values (a seed, a run's name)."""
    trees = [parse(text.encode("utf-8", "surrogateescape")) for text in dict.fromkeys(texts)]
    return bool(trees) and None not in trees and all(_bare(t, False) == _bare(trees[0], False) for t in trees)


def _bare(tree: ast.Module, constants: bool = True) -> list:
    """The tree without positions and docstrings, or without any constant, flat."""
    docstrings = set()
    for node in nodes(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and len(body) > 1
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings |= {id(body[0]), id(body[0].value)}
    kept = [node for node in nodes(tree) if id(node) not in docstrings]
    words = [
        (type(n).__name__, *(v for v in vars(n).values() if isinstance(v, str) and not isinstance(n, ast.Constant)))
        for n in kept
    ]
    return [*words, *(repr(n.value) for n in kept if constants and isinstance(n, ast.Constant))]


# ---- What a script brings along


def helpers(script: Script, folder: Path) -> list[Path]:
    """Files beside the script that it, or a helper of it, imports or names: their bytes count. Tokenizers do not."""
    found, waiting = {}, [script]
    while waiting:
        for path in _brought_along(waiting.pop(), folder):
            if path not in found:
                found[path] = True
                waiting += (
                    [Script(b"", tree=parse(path.read_bytes()), name=script.name)] if path.suffix == ".py" else []
                )
    return sorted(found)


def _brought_along(script: Script, folder: Path) -> list[Path]:
    if script.tree is None:
        return []
    modules, words = set(), set()
    for node in every(script.tree, ast.Import, ast.ImportFrom, ast.Constant):
        if isinstance(node, ast.Import):
            modules |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            words.add(Path(node.value).name)
    found = []
    for path in sorted(folder.iterdir()):
        free = path.suffix in (
            ".md",
            ".txt",
            ".log",
            ".jsonl",
            ".model",
            ".vocab",
            ".png",
            ".yml",
            ".yaml",
            ".toml",
            ".ipynb",
            ".sh",
        )
        if path.name in (script.name, "submission.json") or free or not path.is_file():
            continue
        if path.name in words or (path.suffix == ".py" and path.stem in modules):
            found.append(path)
    return found


def knob_docs(source: str) -> dict[str, dict]:
    """`NAME -> {default, unit, doc}` of every `knob(default, unit, doc, ...)` in a script's Config, read statically."""
    tree, docs = parse(source.encode("utf-8", "surrogateescape")), {}
    for node in nodes(tree) if tree else ():
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
        ):
            continue
        if dotted(node.value.func) == "knob" and len(node.value.args) >= 3:
            default, unit, doc = (_value(a) for a in node.value.args[:3])
            docs[node.target.id.upper()] = {"default": default, "unit": unit, "doc": doc}
    return docs


def _value(node: ast.AST) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return None
