"""Syntax trees of Python text that is never run: the same tree for every interpreter, and what is asked of trees."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

DOWNGRADE, NEWER_SECONDS = Path(__file__).with_name("downgrade.py"), 60
_STATEMENT = re.compile(rb"(?m)(?:^|;)\s*(?:import|from|def|class|async def)\s+\w")


def parse(data: bytes) -> ast.Module | None:
    """The tree of a module, by `ast`, and where that fails by libcst (see downgrade.py); None if neither reads it."""
    try:
        return _settled(_parse(data))
    except SyntaxError:
        return _newer(data)
    except (ValueError, RecursionError, MemoryError):
        return None


def _parse(text: bytes | str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's strings
        return ast.parse(text)


def _newer(data: bytes) -> ast.Module | None:
    """The tree of a module in syntax that this interpreter does not know; None without libcst, too."""
    if b"\0" in data or not _STATEMENT.search(data):
        return None
    command = [sys.executable, str(DOWNGRADE)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=NEWER_SECONDS)
        return _settled(_parse(done.stdout.decode("utf-8", "surrogatepass"))) if done.returncode == 0 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError, subprocess.TimeoutExpired):
        return None


def _settled(tree: ast.Module) -> ast.Module:
    """Everything inside an f-string stands where the f-string begins: interpreters place it differently."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for inner in ast.walk(node):
                if hasattr(inner, "lineno"):
                    inner.lineno, inner.col_offset = node.lineno, node.col_offset
    return tree


# ---- Questions


@functools.lru_cache(maxsize=8)
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def names(node: ast.AST) -> set[str]:
    """Identifiers in an expression: names, and the last part of attributes."""
    out = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return out | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, of `f().c` and of a call of either."""
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, "attr", getattr(node, "id", ""))


def calls(tree: ast.AST, wanted: set[str]) -> list[ast.Call]:
    """Calls of `wanted` (dotted), import aliases resolved."""
    aliases = {}
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Call):
            head, dot, rest = dotted(node.func).partition(".")
            if aliases.get(head, head) + dot + rest in wanted:
                found.append(node)
    return found


def keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def own(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function or module but those of functions and classes inside it, in the order of the text."""
    waiting = list(ast.iter_child_nodes(node))[::-1]
    while waiting:
        child = waiting.pop()
        yield child
        if not isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            waiting += list(ast.iter_child_nodes(child))[::-1]
