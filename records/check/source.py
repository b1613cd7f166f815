"""Reads a training script without running it: undoes self-extracting packs statically and finds what reviewers reject.

Everything here works on the syntax tree of text. Literals are decoded by trying the usual encodings and compressors on
them, each bounded to `MAX_BYTES` of output and `MAX_LAYERS` of nesting, so a hostile file costs time but runs nothing.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bisect
import bz2
import fnmatch
import functools
import hashlib
import importlib
import itertools
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from runs import BOOKKEEPING

from check.patterns import Finding, find_patterns
from check.switches import Switches
from check.syntax import calls, children, dotted, every, imports, nodes, parse

MAX_BYTES, MAX_LAYERS, MAX_PROGRAMS = 8_000_000, 4, 24
LARGE_LITERAL = 400  # bytes; shorter ones hold no training script
LARGE_PAYLOAD = 20_000  # bytes; shorter ones hold no text worth hiding


class Part(NamedTuple):
    """One program of a script: the innermost, its wrappers, what else its literals hold, or a helper file."""

    place: str  # "" for the innermost
    data: bytes
    tree: ast.Module
    held: dict[bytes, bytes]  # literal -> the program it decodes to


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
    parts: list[Part] = field(default_factory=list)  # every program it holds, that which runs first
    findings: list[Finding] = field(default_factory=list)
    configs: list[dict[str, object]] = field(default_factory=list)  # knobs as each log prints them, in lower case
    printed: Callable[[], str] = str  # the logs' own lines

    def hashes(self) -> set[str]:
        return {hashlib.sha256(b).hexdigest() for b in (self.outer, self.source.encode("utf-8", "surrogateescape"))}


def read_script(path: Path, configs: list[dict[str, object]] | None = None, printed: Callable[[], str] = str) -> Script:
    """The script at `path`, unpacked as far as static decoding goes, with its findings. Never raises on content."""
    script = _open(path)
    script.configs, script.printed = configs or [], printed
    _search(script)
    return script


def bring_along(script: Script, folder: Path) -> list[Path]:
    """The helper files beside a script. Their code is searched as one with it, calls followed from file to file."""
    found = helpers(script, folder)
    opened = [_open(path) for path in found if path.suffix == ".py"]
    opened += [packed for path in found if path.suffix in _PACKED and (packed := _unpacked(path))]
    if (
        script.opaque
        and script.tree is not None
        and (inner := [s for s in opened if s.tree is not None and not s.opaque])
    ):
        first = max(inner, key=lambda s: len(s.source))  # what a stub executes is the script
        script.opaque, script.source, script.tree, script.layers = None, first.source, first.tree, first.layers + 1
    script.parts += [p._replace(place=f"{s.name} {p.place}".strip()) for s in opened for p in s.parts]
    if opened:
        _search(script, together=True)
    return found


_PACKED = {".lzma", ".xz", ".br", ".zst", ".gz", ".bz2", ".bin", ".z", ".b85", ".b64", ".dat"}


def _unpacked(path: Path) -> Script | None:
    """The program that a packed file beside the script holds, None if it holds none."""
    if path.stat().st_size > MAX_BYTES // 4:
        return None
    text = next((text for text in _contents(path.read_bytes()) if _is_program(text)), None)
    return None if text is None else _read(Script(text, name=path.name))


def head(path: Path) -> bytes:
    """A file's bytes, of one that is too long the first."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _open(path: Path) -> Script:
    """A script and every program in its literals, nothing searched yet."""
    return _read(Script(head(path), name=path.name))


def _read(script: Script) -> Script:
    """The same of a script whose bytes are there."""
    if len(script.outer) > MAX_BYTES:
        script.opaque = f"more than {MAX_BYTES:,} bytes"
        return script
    if not script.outer.strip():
        script.opaque = f"holds no code ({len(script.outer):,} bytes)"
        return script
    waiting, depth = [script.outer], {script.outer: 0}
    data: bytes | None = script.outer  # of the layer that is not unpacked yet
    while waiting and len(depth) < MAX_PROGRAMS:
        text = waiting.pop(0)
        tree = parse(text)
        if text == data:
            script.source, script.layers, script.tree = text.decode("utf-8", "surrogateescape"), depth[text], tree
        if tree is None:
            if text == data:
                _explain(script, text)
            continue
        held = _programs(tree) if depth[text] < MAX_LAYERS else {}
        script.parts.append(Part(f"layer {depth[text]}", text, tree, held))
        if text == data:
            data = _wrapped(text, tree, held)
        fresh = [program for program in held.values() if program not in depth]
        depth |= dict.fromkeys(fresh, depth[text] + 1)
        waiting += fresh
    inner = [p for p in script.parts if p.tree is script.tree]
    script.parts = [p._replace(place="") for p in inner] + [p for p in script.parts if p.tree is not script.tree]
    if script.tree is not None and not (script.opaque or script.unread):
        script.opaque = _unread(script.tree)
        needed = {module.partition(".")[0] for module, _ in imports(script.tree)} & {"brotli", "zstandard"}
        if script.opaque and (missing := sorted(name for name in needed if find_spec(name) is None)):
            script.opaque, script.unread = None, f"is packed; with {', '.join(missing)} installed it is read"
    return script


def _search(script: Script, together: bool = False) -> None:
    """Findings in every part, each with its place and line; with `together` calls are followed from part to part."""
    if script.tree is None or script.opaque or script.unread:
        return
    texts = [part.data.decode("utf-8", "surrogateescape") for part in script.parts]
    tree = parse("\n".join(texts).encode("utf-8", "surrogateescape")) if together else None
    groups = [(tree, script.parts, texts)] if tree else [(p.tree, [p], [t]) for p, t in zip(script.parts, texts)]  # noqa: B905
    script.findings = []
    try:
        for tree, parts, group in groups:
            starts = [0, *itertools.accumulate(text.count("\n") + 1 for text in group)]
            switches = Switches(tree, script.configs, script.printed)
            for f in find_patterns(tree, "\n".join(group), switches):
                n = bisect.bisect(starts, f.line - 1) - 1
                script.findings.append(f._replace(line=f.line - starts[n], place=parts[n].place))
        for part in script.parts:
            script.findings += [f._replace(place=part.place) for f in (*_payloads(part), *_executes(part))]
    except RecursionError:
        script.unread = "is nested too deeply to be searched"
    except Exception as error:  # code that no finder foresaw costs its findings, and no other verdict
        script.unread = f"could not be searched ({type(error).__name__}: {error})"


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


def _programs(tree: ast.Module) -> dict[bytes, bytes]:
    """Literals that hold Python, largest first -> the program; one in plain sight counts only where code is executed."""
    runs = bool(calls(tree, {"exec", "eval", "runpy.run_path", "compile", "importlib.import_module", "subprocess.run"}))
    held = {}
    for literal in _literals(tree):
        texts = (text for text in _contents(literal) if (runs or text != literal) and _is_program(text))
        if program := next(texts, None):
            held[literal] = program
    return held


def _wrapped(data: bytes, tree: ast.Module, held: dict[bytes, bytes]) -> bytes | None:
    """The program that a script is the wrapper of: it defines nothing itself, or is smaller without its literals."""
    program = next(iter(held.values()), None)
    around = len(data) - sum(map(len, held))
    return program if program and (not _defines(tree) or around < len(program)) else None


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in nodes(tree))


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
    strict = functools.partial(base64.b64decode, validate=True)
    for decode in (base64.b85decode, strict, base64.a85decode, hexed, base64.b32decode):
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


def _payloads(part: Part) -> Iterator[Finding]:
    """Large literals that are no script: tables, or text that the artifact was not to hold."""
    for node in every(part.tree, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict):
        data = _bytes_of(node)
        if not isinstance(node, ast.Constant):
            data = b"".join(_flat(n.value) for n in children(node) if isinstance(n, ast.Constant))
        if len(data or b"") > LARGE_PAYLOAD and data not in part.held and not _CODE.search(data):
            yield Finding("large literal in the code", node.lineno, f"{len(data):,} bytes that no comment explains")


_CODE = re.compile(rb"#include|__global__|(?m:^\s*(?:def|class|import|from) \w)|@triton")


def _flat(value: object) -> bytes:
    """A constant of a collection as bytes, a number as the two that a token takes."""
    if isinstance(value, str | bytes):
        return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return b"\0\0"


def _executes(part: Part) -> Iterator[Finding]:
    """`exec` of what no literal holds: a file, a download, something computed."""
    for call in calls(part.tree, {"exec", "runpy.run_path", "runpy.run_module"}):
        if not part.held and call.args and not isinstance(call.args[0], ast.Constant | ast.JoinedStr):
            yield Finding("runs code that is not in the file", call.lineno, ast.unparse(call)[:100], "exec")


def _unread(tree: ast.Module) -> str | None:
    """Why the innermost layer is still not the whole program: it executes something that is not in plain sight."""
    blobs = [literal for literal in _literals(tree) if len(literal) > 4 * LARGE_LITERAL and b" " not in literal[:200]]
    runs = calls(tree, {"exec", "eval", "runpy.run_path"})
    if blobs and (runs or not _defines(tree)):
        return f"{'executes' if runs else 'holds'} a literal of {len(blobs[0]):,} bytes that no known decoder opens"
    if calls(tree, {"exec"}) and not _defines(tree):
        return "executes code that is not in the file, or not in a known form"
    return None


def packed_size(script: Script) -> int:
    """Bytes of the source packed as records pack theirs: raw LZMA in base85."""
    return packed_bytes(script.source.encode("utf-8", "surrogateescape"))


def packed_bytes(data: bytes) -> int:
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
    while tree is not None and layers < MAX_LAYERS and (data := _wrapped(data, tree, _programs(tree))):
        tree, layers = parse(data), layers + 1
    if tree is None or script.tree is None:
        return Likeness(False, False, False, 0.0)
    ours, theirs = ({getattr(n, "id", getattr(n, "attr", "")) for n in nodes(t)} for t in (script.tree, tree))
    shared = len(ours & theirs) / max(1, len(ours | theirs))
    equal = _bare(tree, script.configs) == _bare(script.tree, script.configs)
    return Likeness(equal, equal or _bare(tree, None) == _bare(script.tree, None), layers == script.layers, shared)


def alike(texts: list[str], configs: list[dict[str, object]]) -> tuple[bool, bool]:
    """Whether printed sources are one program under the runs' environment, or but for constants (a seed, a name)."""
    trees = [parse(text.encode("utf-8", "surrogateescape")) for text in dict.fromkeys(texts)]
    if not trees or None in trees:
        return False, False
    same, but = ([_bare(t, c) for t in trees] for c in (configs, None))
    return all(b == same[0] for b in same), all(b == but[0] for b in but)


def _bare(tree: ast.Module, configs: list[dict[str, object]] | None) -> list:
    """The tree without positions and docstrings, flat; without defaults that the environment replaced, or (None) constants.

    A default of an environment read takes no part where every log prints the knob, or where it names the run or a place.
    """
    dropped = set()
    for node in nodes(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and len(body) > 1
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            dropped |= {id(body[0]), id(body[0].value)}
        if configs is not None and isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            known = name in BOOKKEEPING or (bool(configs) and all(name.lower() in c for c in configs))
            if known and re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
                dropped |= {id(n) for a in node.args[1:] for n in ast.walk(a)}
    if tree.body and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        dropped |= {id(tree.body[0]), id(tree.body[0].value)}
    kept = [node for node in nodes(tree) if id(node) not in dropped]
    words = [
        (type(n).__name__, *(v for v in vars(n).values() if isinstance(v, str) and not isinstance(n, ast.Constant)))
        for n in kept
    ]
    return [*words, *(repr(n.value) for n in kept if configs is not None and isinstance(n, ast.Constant))]


# ---- What a script brings along

_FREE = {".md", ".txt", ".log", ".jsonl", ".model", ".vocab", ".png", ".yml", ".yaml", ".toml", ".ipynb", ".sh", ".out"}


def helpers(script: Script, folder: Path) -> list[Path]:
    """Files beside the script that it, or a helper of it, imports or names: their bytes count. Tokenizers do not."""
    found: dict[Path, bool] = {}
    waiting = [script]
    while waiting:
        for path in _brought_along(waiting.pop(), folder):
            if path not in found and not _same_program(script, path):
                found[path] = True
                program = path.suffix == ".py" and path.stat().st_size <= MAX_BYTES
                waiting += [Script(b"", tree=parse(path.read_bytes()), name=script.name)] if program else []
    return sorted(found)


def _same_program(script: Script, path: Path) -> bool:
    """Whether a file is the script once more, packed: `train_gpt.py.lzma` beside its source."""
    if not path.name.startswith(script.name) or path.stat().st_size > MAX_BYTES or not script.source:
        return False
    own = script.source.strip()
    return any(text.decode("utf-8", "replace").strip() == own for text in _contents(path.read_bytes()))


def _brought_along(script: Script, folder: Path) -> list[Path]:
    if script.tree is None:
        return []
    modules = {module.partition(".")[0] for module, _ in imports(script.tree)}
    words = _file_words(script)
    found, packages = [], (p for p in folder.iterdir() if p.is_dir() and p.name in modules)
    for path in sorted([*folder.iterdir(), *(p for package in packages for p in package.rglob("*.py"))]):
        if path.name in (script.name, "submission.json") or path.suffix in _FREE or not path.is_file():
            continue
        imported = path.suffix in (".py", ".so", ".pyd", ".pyx") and (
            {path.name.partition(".")[0], path.relative_to(folder).parts[0]} & modules
        )
        if imported or path.name in words or any(fnmatch.fnmatch(path.name, w) for w in words if "*" in w and "." in w):
            found.append(path)
    return found


def _file_words(script: Script) -> set[str]:
    """Names of files in a script's texts: whole, in a command, and what it makes of its own name."""
    spoken = {id(n.value) for n in every(script.tree, ast.Expr)}
    texts = [n for n in every(script.tree, ast.Constant) if isinstance(n.value, str) and len(n.value) < 500]
    words = {Path(n.value).name for n in texts if len(n.value) < 200 and n.value.isprintable()}
    for n in texts:
        if id(n) not in spoken:
            words |= set(re.findall(r"[\w-]+\.(?:cpp|cc|c|cu|cuh|h|so|rs|pyx|xz|lzma|br|zst)\b", n.value))
    own = Path(script.name)
    for call in every(script.tree, ast.Call, ast.BinOp, ast.JoinedStr):
        if not any(getattr(n, "id", "") == "__file__" for n in ast.walk(call)):
            continue
        given = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        words |= {own.name.replace(a, b) for a, b in itertools.permutations(given[:6], 2) if a}
        words |= {made for g in given for made in (own.name + g, own.stem + g)}
    return words - {own.name}


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
