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
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_BYTES, MAX_LAYERS = 8_000_000, 4
LARGE_LITERAL = 400  # bytes; shorter ones hold no training script


@dataclass(frozen=True)
class Finding:
    """One pattern in a script: which, where (line of the unpacked source) and the words of the source."""

    pattern: str
    line: int
    text: str


@dataclass
class Script:
    """A script as found (`outer`) and as it runs (`source`, after `layers` unpackings); `opaque` says what resisted."""

    outer: bytes
    source: str = ""
    layers: int = 0
    opaque: str | None = None
    tree: ast.Module | None = None
    findings: list[Finding] = field(default_factory=list)

    def hashes(self) -> set[str]:
        return {hashlib.sha256(b).hexdigest() for b in (self.outer, self.source.encode("utf-8", "surrogateescape"))}


def read_script(path: Path) -> Script:
    """The script at `path`, unpacked as far as static decoding goes, with its findings. Never raises on content."""
    with path.open("rb") as file:
        script = Script(file.read(MAX_BYTES + 1))
    if len(script.outer) > MAX_BYTES:
        script.opaque = f"more than {MAX_BYTES:,} bytes"
        return script
    data = script.outer
    for script.layers in range(MAX_LAYERS + 1):
        tree = parse(data)
        if tree is None:
            script.opaque = "is no Python that can be parsed"
            break
        script.tree, script.source = tree, data.decode("utf-8", "surrogateescape")
        inner = _hidden_script(tree)
        if inner is None:
            break
        data = inner
    if script.tree is not None and script.opaque is None:
        script.opaque = _unread(script.tree)
        script.findings = find_patterns(script.tree, script.source)
    return script


@functools.lru_cache(maxsize=8)
def _nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def parse(data: bytes) -> ast.Module | None:
    try:
        return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# ---- Packed scripts


def _literals(tree: ast.Module) -> Iterator[bytes]:
    """Large string and bytes constants, sums of constants joined, longest first."""
    found = [_constant(node) for node in _nodes(tree) if isinstance(node, ast.Constant | ast.BinOp | ast.JoinedStr)]
    return iter(sorted({f for f in found if f and len(f) >= LARGE_LITERAL}, key=len, reverse=True))


def _constant(node: ast.AST) -> bytes | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, bytes | str):
        return node.value if isinstance(node.value, bytes) else node.value.encode("utf-8", "surrogatepass")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _constant(node.left), _constant(node.right)
        return left + right if left is not None and right is not None else None
    return None


def _hidden_script(tree: ast.Module) -> bytes | None:
    """The largest Python text that a literal of `tree` decodes to, if `tree` itself looks like its wrapper."""
    if not _calls(tree, {"exec", "eval", "runpy.run_path", "compile", "importlib.import_module", "subprocess.run"}):
        return None
    for literal in _literals(tree):
        for raw in _decodings(literal):
            for inflate in INFLATERS:
                text = _quietly(inflate, raw)
                if text and len(text) >= LARGE_LITERAL // 4 and _is_program(text):
                    return text
    return None


def _is_program(data: bytes) -> bool:
    if not re.search(rb"\b(import|def|exec)\b", data[:100_000]):
        return False
    tree = parse(data)
    return tree is not None and any(isinstance(n, ast.Import | ast.ImportFrom | ast.FunctionDef) for n in tree.body)


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


def _unread(tree: ast.Module) -> str | None:
    """Why the innermost layer is still not the whole program: it executes something that is not in plain sight."""
    blobs = [literal for literal in _literals(tree) if len(literal) > 4 * LARGE_LITERAL and b" " not in literal[:200]]
    if blobs and _calls(tree, {"exec", "eval", "runpy.run_path"}):
        return f"executes a literal of {len(blobs[0]):,} bytes that no known decoder opens"
    if not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in _nodes(tree)) and _calls(tree, {"exec"}):
        return "executes code that is not in the file"
    return None


# ---- Patterns

TARGET = re.compile(r"^(tgt|target|targets|y|y_batch|next_tok|next_token|nxt|label|labels)(_\w+|\d*)$")
HASHLIKE = re.compile(r"(hash|ctx|context|bucket|key|^h\d?$|prefix)", re.I)
TRAINISH = re.compile(r"train|calib|hessian|gptq|quantiz|collect", re.I)
EVALISH = re.compile(r"eval|valid|score|audit|bpb|test|ttt|adapt|lora", re.I)  # adapting after scoring is evaluation
VALIDATION = re.compile(r"(^|_)(val|validation)_(tokens|files|data|loader|path|shards|pattern|seqs)|fineweb_val", re.I)
REJECTED_NAMES = {  # words of methods that were ruled out (issue #1017, the rejections of the challenge's last weeks)
    "pre-quantisation TTT on validation text": re.compile(r"pre_?quant_?ttt", re.I),
    "SLOT (optimises on the positions it scores)": re.compile(r"(^|_)slot_(lr|steps|delta|enabled|epochs)", re.I),
    "ETLB": re.compile(r"(^|_)etlb(_|$)", re.I),
    "byte-level PPM mixture (normalisation, denominator)": re.compile(r"(^|_)ppmd?(_|$)", re.I),
    "second pass over scored text": re.compile(r"two_?pass|second_pass|rescor", re.I),
    "hints computed outside the timer": re.compile(r"precompute_outside|outside_timer", re.I),
}
NETWORK = {"requests", "urllib", "socket", "http", "ftplib", "huggingface_hub", "wandb", "aiohttp"}


def find_patterns(tree: ast.Module, source: str) -> list[Finding]:
    """Every finding in reading order, one a line and pattern."""
    lines = source.splitlines()
    raw = [
        *_target_keys(tree),
        *_pickles(tree),
        *_validation_in_training(tree),
        *_oracle_choices(tree),
        *_target_gates(tree),
    ]
    raw += [*_network(tree), *_rejected_names(tree)]
    seen = dict.fromkeys(sorted(raw, key=lambda f: (f[1], f[0])))
    return [Finding(p, n, lines[n - 1].strip()[:100] if 0 < n <= len(lines) else "") for p, n in seen]


def _names(node: ast.AST) -> set[str]:
    """Identifiers in an expression: names, and the last part of attributes."""
    out = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return out | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _target_keys(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """`ctx_hash ^ tgt * P`, or `(ctx * P + tgt) % B`: a cell chosen by the token whose probability it is to give."""
    for node in _nodes(tree):
        if not isinstance(node, ast.BinOp):
            continue
        mixed = node if isinstance(node.op, ast.BitXor) else None
        if isinstance(node.op, ast.Mod | ast.BitAnd) and isinstance(node.left, ast.BinOp):
            mixed = node.left
        if mixed is None or not isinstance(mixed.op, ast.BitXor | ast.Add | ast.Mult | ast.BitOr):
            continue
        for one, other in ((mixed.left, mixed.right), (mixed.right, mixed.left)):
            if any(TARGET.match(n) for n in _names(one)) and any(HASHLIKE.search(n) for n in _names(other)):
                yield "target token in a cache key", node.lineno


def _pickles(tree: ast.Module) -> Iterator[tuple[str, int]]:
    loaders = {"pickle.load", "pickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.loads", "marshal.load"}
    for call in _calls(tree, loaders):
        yield "pickle loading", call.lineno
    for call in _calls(tree, {"torch.load"}):
        if not _keyword_is(call, "weights_only", True):
            yield "pickle loading", call.lineno
    for call in _calls(tree, {"np.load", "numpy.load"}):
        if _keyword_is(call, "allow_pickle", True):
            yield "pickle loading", call.lineno


def _validation_in_training(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Validation tokens named inside a function that trains or calibrates, other than handed to an evaluation."""
    for function in _nodes(tree):
        if not isinstance(function, ast.FunctionDef) or not TRAINISH.search(function.name):
            continue
        if EVALISH.search(function.name):
            continue
        inside_eval = {id(n) for call in ast.walk(function) if _is_evaluation(call) for n in ast.walk(call)}
        for node in ast.walk(function):
            word = getattr(node, "id", getattr(node, "attr", None))
            word = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else word
            if isinstance(word, str) and VALIDATION.search(word) and id(node) not in inside_eval:
                if isinstance(node, ast.Constant) and " " in word:
                    continue  # a docstring or message speaks of it, nothing opens it
                yield "validation data in training code", node.lineno


def _is_evaluation(node: ast.AST) -> bool:
    """A call that evaluates or only reports: what is handed to it is not trained on."""
    name = _dotted(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
    return bool(EVALISH.search(name)) or name in ("print", "log", "log0", "len", "info")


GATES = re.compile(r"(^|_)(gate|gates|gated|tilt|alpha)(_|$)", re.I)


def _target_gates(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """`gate = starts_word[targets]`: how much an n-gram counts is decided by the token that it is to predict."""
    for node in _nodes(tree):
        gated = isinstance(node, ast.Assign) and any(GATES.search(n) for t in node.targets for n in _names(t))
        names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} if gated else set()
        if any(TARGET.match(n) for n in names):  # plain names alone: `query.target` may well be a position
            yield "n-gram gate that looks at the target", node.lineno


def _oracle_choices(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """torch.minimum(nll_a, nll_b): per token the better of two models, which needs the target."""
    for call in _calls(tree, {"torch.minimum", "np.minimum", "torch.maximum", "np.maximum", "min", "max"}):
        if len(call.args) == 2:
            words = [{w for n in _names(a) for w in n.lower().split("_")} for a in call.args]
            if all(w & {"nll", "losses", "logprob", "logprobs", "nlls"} for w in words):
                yield "per-token choice by the target", call.lineno


def _network(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in _nodes(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(m.split(".")[0] in NETWORK for m in modules):
            yield "network module", node.lineno


def _rejected_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """First use of each name (or knob in a string) that belongs to a method ruled out."""
    found: dict[str, int] = {}
    for node in _nodes(tree):
        word = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[A-Z_0-9]+", node.value):
            word = node.value
        for what, pattern in REJECTED_NAMES.items():
            if isinstance(word, str) and pattern.search(word) and hasattr(node, "lineno"):
                found[what] = min(node.lineno, found.get(what, node.lineno))
    for what, line in found.items():
        yield f"name of a rejected method: {what}", line


def _calls(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    """Calls of `names` (dotted), import aliases resolved."""
    aliases = {}
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in _nodes(tree):
        if isinstance(node, ast.Call):
            head, dot, rest = _dotted(node.func).partition(".")
            if aliases.get(head, head) + dot + rest in names:
                found.append(node)
    return found


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


# ---- What a script brings along


def helpers(script: Script, folder: Path) -> list[Path]:
    """Files beside the script that it, or a helper of it, imports or names: their bytes count. Tokenizers do not."""
    found, waiting = {}, [script]
    while waiting:
        for path in _brought_along(waiting.pop(), folder):
            if path not in found:
                found[path] = True
                waiting += [Script(b"", tree=parse(path.read_bytes()))] if path.suffix == ".py" else []
    return sorted(found)


def _brought_along(script: Script, folder: Path) -> list[Path]:
    if script.tree is None:
        return []
    modules, words = set(), set()
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Import):
            modules |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            words.add(Path(node.value).name)
    found = []
    for path in sorted(folder.iterdir()):
        code = path.suffix in (".py", ".c", ".cpp", ".cu", ".so", ".h", ".json", ".npy", ".npz", ".pkl", ".pt")
        if path.name in ("train_gpt.py", "submission.json") or not code:
            continue
        if path.name in words or (path.suffix == ".py" and path.stem in modules):
            found.append(path)
    return found


def knob_docs(source: str) -> dict[str, dict]:
    """`NAME -> {default, unit, doc}` of every `knob(default, unit, doc, ...)` in a script's Config, read statically."""
    tree, docs = parse(source.encode("utf-8", "surrogateescape")), {}
    for node in _nodes(tree) if tree else ():
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
        ):
            continue
        if _dotted(node.value.func) == "knob" and len(node.value.args) >= 3:
            default, unit, doc = (_value(a) for a in node.value.args[:3])
            docs[node.target.id.upper()] = {"default": default, "unit": unit, "doc": doc}
    return docs


def _value(node: ast.AST) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return None
