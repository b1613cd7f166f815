#!/usr/bin/env python3
"""Pack train_gpt.py into the form that counts against the limit: one file that unpacks and runs the script without its comments.

    python tools/pack_code.py train_gpt.py -o packed.py
    python tools/pack_code.py - < train_gpt.py > packed.py

It leaves out what only people read (docstrings, comments, texts of knobs, most annotations, white space) and gives what the script defines
short names; the packed script does the same, and messages and tracebacks stay. Standard library only: train_gpt.py starts it as a child
process to count its own bytes. Exit status 2 for a file that is no such script.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import bz2
import hashlib
import io
import itertools
import keyword
import lzma
import os
import re
import string
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path


def removable(source: str) -> Iterator[tuple[ast.AST, ast.AST, str]]:
    """(where to begin cutting, where to end, what to put there) for docstrings, what knobs are for and why others have no effect,
    annotations that nothing reads, and what stands below `if not PACKED`.

    A cut begins at the start of a docstring or at the end of an annotated name; for a function's result the first node is
    the annotation itself. Annotated fields of classes keep theirs, and so do decorated functions: Triton reads them.
    """
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, False) is not None:
            yield body[0], body[0], "pass" if len(body) == 1 else ""
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not PACKED":
            yield node, node, "pass"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "knob":
            yield node.args[2], node.args[2], '""'
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Dead":
            yield node.args[0], node.args[0], '""'
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            yield from ((arg, arg.annotation, "") for arg in args if arg is not None and arg.annotation is not None)
            if node.returns is not None:
                yield node.returns, node.returns, ""
        for child in body if isinstance(node, (ast.Module, ast.FunctionDef)) else ():
            if isinstance(child, ast.AnnAssign) and child.value is not None:
                yield child.target, child.annotation, ""


def squeeze(source: str) -> str:
    """The same tokens with the least white space: a statement a line, a space a level, no comments but what --toc and --help read; idempotent.

    From Python 3.12 on the tokens of an f-string come one by one; it is copied as it stands.
    """
    lines, out, level, inside = source.splitlines(keepends=True), [], 0, 0
    last = tokenize.TokenInfo(tokenize.NEWLINE, "\n", (1, 0), (1, 0), "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        level += (kind == "INDENT") - (kind == "DEDENT")
        if inside or kind == "FSTRING_START":
            inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
            if kind == "FSTRING_START" and inside == 1:
                start = token.start
            if inside:
                continue
            (top, left), (bottom, right) = start, token.end
            text = lines[top - 1][left:right] if top == bottom else "".join(
                [lines[top - 1][left:], *lines[top : bottom - 1], lines[bottom - 1][:right]])  # fmt: skip
            token = token._replace(type=tokenize.STRING, string=text)
        if kind == "COMMENT" and token.string.startswith("# ---- " if token.start[1] else "# ===="):
            out.append(" " * (token.start[1] > 0) + token.string + "\n")
        elif kind == "NEWLINE":
            out.append("\n")
            last = token
        elif kind not in ("COMMENT", "NL", "INDENT", "DEDENT", "ENDMARKER"):
            words = (last.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING)
                     and token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING))  # fmt: skip
            dotted = last.type == tokenize.NUMBER and token.string.startswith(".")
            out.append(" " * level if last.type == tokenize.NEWLINE else " " if words or dotted else "")
            out.append(token.string)
            last = token
    return "".join(out)


def strip_source(source: str) -> str:
    """The script without docstrings, comments, texts of knobs, white space and most annotations, but for the banners and the first
    paragraph of all; idempotent."""
    lines = source.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))
    place = lambda row, column: starts[row - 1] + len(lines[row - 1].encode()[:column].decode())  # noqa: E731
    cuts = []
    for first, last, put in removable(source):
        begin, end = place(first.lineno, first.col_offset), place(last.end_lineno, last.end_col_offset)
        if isinstance(first, ast.arg):
            begin += len(first.arg)
        elif first is not last:
            begin = place(first.end_lineno, first.end_col_offset)
        elif not put and not isinstance(first, ast.Expr):  # the result of a function, with its arrow
            begin = source.rindex("->", 0, begin)
        cuts.append((begin, end, put))
    kept, at = [], 0
    for begin, end, put in sorted(cuts):
        kept += [source[at:begin], put]
        at = end
    head = source.split("\n\n")[0].strip('"')
    return f'"""{head}\n\n"""\n' + squeeze("".join(kept) + source[at:])


def shorter_names(function: ast.FunctionDef, nodes: list[ast.AST], taken: set[str]) -> dict[str, str]:
    """Local variables and parameters of a function and of those inside it, its `nodes` -> names of one or two letters that occur
    nowhere in it.

    Left alone are names of two letters or less and all that may mean something else: `taken` (defined outside, built in, or
    given by keyword in some call), global or nonlocal, defined inside, imported, caught, or read in an f-string, whose positions
    Python < 3.12 does not know.
    """
    words = [n for n in nodes if isinstance(n, (ast.Name, ast.arg))]
    others = [n for n in nodes if isinstance(n, (ast.stmt, ast.excepthandler, ast.alias))]
    uses = Counter(getattr(n, "id", getattr(n, "arg", None)) for n in words)
    if any(isinstance(n, (ast.ClassDef, ast.Match)) for n in others) or {"locals", "vars", "eval", "exec"} & {*uses}:
        return {}
    kept = taken | {n.id for f in nodes if isinstance(f, ast.JoinedStr) for n in ast.walk(f) if isinstance(n, ast.Name)}
    for n in others:
        kept |= {*getattr(n, "names", ()), getattr(n, "name", None), getattr(n, "asname", None)}
    if function.decorator_list:  # a decorator may read the signature
        kept |= {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
    bound = {
        n.arg if isinstance(n, ast.arg) else n.id
        for n in words
        if not isinstance(getattr(n, "ctx", None), (ast.Load, ast.Del))
    }
    names = sorted((n for n in bound - kept if len(n) > 2), key=lambda name: (-uses[name], name))
    letters = [*string.ascii_lowercase, *string.ascii_uppercase]
    closed = kept | {*uses, *keyword.kwlist}
    free = (w for w in (*letters, *map("".join, itertools.product(letters, letters))) if w not in closed)
    return dict(zip(names, free, strict=False))


def module_names(parts: dict[ast.stmt, list[ast.AST]]) -> set[str]:
    """Functions, classes and constants of the script that may have another name: bound at the top of the script alone, not read
    in an f-string, printed by no message (exceptions) and sought by no text (Config)."""
    top = {n.name for n in parts if isinstance(n, (ast.FunctionDef, ast.ClassDef))} - {"Config"}
    top |= {t.id for n, within in parts.items() if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in within
            if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}  # fmt: skip
    inner = [m for n, within in parts.items() if isinstance(n, (ast.FunctionDef, ast.ClassDef)) for m in within[1:]]
    bound = {getattr(m, "arg", getattr(m, "name", getattr(m, "id", None))) for m in inner
             if not isinstance(m, (ast.Name, ast.keyword)) or isinstance(getattr(m, "ctx", None), ast.Store)}  # fmt: skip
    nodes = itertools.chain(*parts.values())
    texts = {m.id for f in nodes if isinstance(f, ast.JoinedStr) for m in ast.walk(f) if isinstance(m, ast.Name)}
    raised = {n.name for n in parts if isinstance(n, ast.ClassDef) and n.name.endswith(("Error", "Run", "Interrupted"))}
    return {n for n in top - bound - texts - raised if len(n) > 4 and not n.startswith("__")}


def shorten_names(source: str) -> str:
    """The same program with short names for what the script defines and for local variables and parameters; idempotent.

    Attributes, fields and whatever some call gives by keyword keep theirs, and parameters of what is called with `**`.
    """
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    parts = {n: list(ast.walk(n)) for n in tree.body}
    nodes = list(itertools.chain(*parts.values()))
    taken = {*dir(builtins), *(n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))}
    taken |= {t.id for n, within in parts.items() if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) for t in within
              if isinstance(t, ast.Name)}  # fmt: skip
    imported = [a for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    taken |= {(a.asname or a.name).split(".")[0] for a in imported}
    uses = Counter(n.id for n in nodes if isinstance(n, ast.Name))
    ranked = sorted(module_names(parts), key=lambda name: (-uses[name], name))
    used = {*uses, *(n.arg for n in nodes if isinstance(n, ast.arg))}
    short = (
        w
        for k in (1, 2)
        for c in itertools.product(string.ascii_letters, repeat=k)
        if (w := "_" + "".join(c)) not in used
    )
    renamed_globals = dict(zip(ranked, short, strict=False))
    cuts = {(n.lineno, n.col_offset + len("def " if isinstance(n, ast.FunctionDef) else "class "), n.name, renamed_globals[n.name])
            for n in tree.body if getattr(n, "name", "") in renamed_globals}  # fmt: skip
    cuts |= {(n.lineno, n.col_offset, n.id, renamed_globals[n.id]) for n in nodes
             if isinstance(n, ast.Name) and n.id in renamed_globals}  # fmt: skip
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    taken |= {k.arg for n in calls for k in n.keywords if k.arg}
    unpacked = {
        getattr(n.func, "id", getattr(n.func, "attr", "")) for n in calls if any(k.arg is None for k in n.keywords)
    }
    methods = ((n, f) for n in tree.body for f in ([n] if isinstance(n, ast.FunctionDef) else getattr(n, "body", ())))
    for owner, function in ((n, f) for n, f in methods if isinstance(f, ast.FunctionDef)):
        within = parts[owner] if owner is function else list(ast.walk(function))
        inside = [n for n in within if isinstance(n, (ast.Name, ast.arg))]
        named = {getattr(n, "name", "") for n in (owner, *within)} & unpacked
        names = shorter_names(function, within, taken | {n.arg for n in inside if named and isinstance(n, ast.arg)})
        for n in inside:
            if (old := getattr(n, "id", getattr(n, "arg", ""))) in names:
                cuts.add((n.lineno, n.col_offset, old, names[old]))
    for row, column, old, new in sorted(cuts, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + new.encode() + line[column + len(old) :]
    return b"".join(lines).decode()


def minify(source: str) -> str:
    """The same program in fewer bytes."""
    return shorten_names(strip_source(source))


def packer_of(source: str) -> Callable[[str], bytes]:
    """The script's own `self_extracting`, compiled without the rest, which would import torch; ValueError if it has none."""
    names = ("as_literal", "self_extracting")
    mine = [re.search(rf"^def {name}\(.*?^(?=\S)", source, re.M | re.S) for name in names]
    if None in mine:
        raise ValueError(f"it does not define {' and '.join(names)}; a packed script cannot be packed again")
    space = {"bz2": bz2, "lzma": lzma, "re": re}
    exec("".join(m[0] for m in mine), space)
    return space["self_extracting"]


def pack_code(source: str) -> bytes:
    """The packed form of a readable script; ValueError or SyntaxError for another text."""
    return packer_of(source)(minify(source))


def main(argv: list[str]) -> int:
    """Pack as the arguments say; exit status 0, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="-: standard input or output")
    parser.add_argument("script", help="train_gpt.py, or -")
    parser.add_argument(
        "-o", "--out", default="-", help="the file to write, which must not exist; standard output by default"
    )
    parser.add_argument("--force", action="store_true", help="overwrite it")
    args = parser.parse_args(argv)
    try:
        source = sys.stdin.buffer.read() if args.script == "-" else Path(args.script).read_bytes()
        packed = pack_code(source.decode())
        if args.out == "-":
            sys.stdout.buffer.write(packed)
            sys.stdout.buffer.flush()
            return 0
        out = Path(args.out)
        if out.exists() and not args.force:
            print(f"error: {out} exists: choose another --out, or --force", file=sys.stderr)
            return 2
        aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            aside.write_bytes(packed)
            os.replace(aside, out)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as e:
        print(f"error: {e.filename or args.out}: {(e.strerror or str(e)).lower()}", file=sys.stderr)
        return 2
    except (SyntaxError, ValueError) as e:  # of text that is no UTF-8 too
        print(f"error: {args.script}: not a script that can be packed ({e})", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}; source {len(source)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
