"""Syntax trees of Python text that is never run: the same tree for every interpreter, and what is asked of trees."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

DOWNGRADE, NEWER_SECONDS = Path(__file__).with_name("downgrade.py"), 60
_STATEMENT = re.compile(rb"(?m)(?:^|;)\s*(?:import|from|def|class|async def)\s+\w")


@functools.lru_cache(maxsize=4)
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
    for node in every(tree, ast.JoinedStr):
        for inner in ast.walk(node):
            if hasattr(inner, "lineno"):
                inner.lineno, inner.col_offset = node.lineno, node.col_offset
    return tree


# ---- Questions


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES, _LOOPS = {*FUNCTIONS, ast.ClassDef, ast.Lambda}, {ast.For, ast.AsyncFor, ast.While}
_ACTS = {ast.Call, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Subscript, ast.Delete, ast.Return, ast.Yield}


class Around(NamedTuple):
    """What stands around a node inside its function: loops, conditions that hold, and whether gradients are off."""

    loops: tuple[ast.AST, ...] = ()
    tests: tuple[tuple[ast.AST, bool], ...] = ()  # (expression, what it came out as)
    quiet: bool = False

    def under(self, test: ast.AST, holds: bool) -> Around:
        return self._replace(tests=(*self.tests, (test, holds)))


class Scope:
    """A module, function or class: its own nodes in the order of the text, without those of scopes inside it."""

    def __init__(self, name: str, node: ast.AST, outer: Scope | None) -> None:
        self.name, self.node, self.outer = name, node, outer
        self.nodes: list[ast.AST] = []
        self.by_type: dict[type, list] = {}
        self.acts: list[tuple[ast.AST, Around]] = []  # calls, assignments, subscripts

    def of(self, *types: type) -> list:
        found = [self.by_type.get(t, ()) for t in types]
        return [*found[0]] if len(found) == 1 else [n for group in found for n in group]


class Place(NamedTuple):
    """Where a node stands."""

    scope: Scope
    around: Around


def children(node: ast.AST) -> list[ast.AST]:
    found = []
    for name in node._fields:
        value = getattr(node, name, None)
        if type(value) is list:
            found += [v for v in value if isinstance(v, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


@functools.lru_cache(maxsize=4)
def _walked(tree: ast.Module) -> tuple[list[Scope], dict[int, Place]]:
    found, places = [Scope("", tree, None)], {}
    waiting = [(child, found[0], around) for child, around in reversed(_block(tree.body, Around()))]
    while waiting:
        node, scope, around = waiting.pop()
        kind = type(node)
        scope.nodes.append(node)
        scope.by_type.setdefault(kind, []).append(node)
        places[id(node)] = Place(scope, around)
        if kind in _ACTS:
            scope.acts.append((node, around))
        elif kind in _SCOPES:
            scope = Scope(getattr(node, "name", scope.name), node, scope)  # a lambda goes by the name around it
            found.append(scope)
            decorators = getattr(node, "decorator_list", ())
            around = Around(quiet=any(map(_turns_gradients_off, decorators)) or (kind is ast.Lambda and around.quiet))
        elif kind in _LOOPS:
            around = around._replace(loops=(*around.loops, node))
        elif kind in (ast.With, ast.AsyncWith) and not around.quiet:
            around = around._replace(quiet=any(_turns_gradients_off(i.context_expr) for i in node.items))
        waiting += [(child, scope, held) for child, held in reversed(_inside(node, around))]
    return found, places


def _inside(node: ast.AST, around: Around) -> list[tuple[ast.AST, Around]]:
    """The children of a node, each with what stands around it there."""
    found = []
    for name in node._fields:
        value = getattr(node, name, None)
        held = around
        if isinstance(node, (ast.If, ast.IfExp)) and name in ("body", "orelse"):
            held = around.under(node.test, name == "body")
        if type(value) is list:
            found += _block([v for v in value if isinstance(v, ast.AST)], held)
        elif isinstance(value, ast.AST):
            found.append((value, held))
    return found


def _block(body: list[ast.AST], around: Around) -> list[tuple[ast.AST, Around]]:
    """Statements one after the other: what follows `if test: continue` runs where the test does not hold."""
    found = []
    for node in body:
        found.append((node, around))
        if isinstance(node, ast.If) and _leaves(node.body) != _leaves(node.orelse):
            around = around.under(node.test, _leaves(node.orelse))
    return found


def _leaves(body: list[ast.AST]) -> bool:
    return bool(body) and isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def scopes(tree: ast.Module) -> list[Scope]:
    """Every scope of a module, the module's own first."""
    return _walked(tree)[0]


def places(tree: ast.Module) -> dict[int, Place]:
    """Where each node stands, by its identity."""
    return _walked(tree)[1]


def _turns_gradients_off(node: ast.AST) -> bool:
    return bool(re.search("no_grad|inference_mode", last_name(node)))


@functools.lru_cache(maxsize=4)
def nodes(tree: ast.Module) -> list[ast.AST]:
    return [node for scope in scopes(tree) for node in scope.nodes]


def every(tree: ast.Module, *types: type) -> list:
    """All nodes of the types."""
    return [node for scope in scopes(tree) for node in scope.of(*types)]


def names(node: ast.AST) -> set[str]:
    """Identifiers in an expression: names, and the last part of attributes."""
    found = (n for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute)))
    return {getattr(n, "id", getattr(n, "attr", "")) for n in found}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, of `f().c` and of a call of either."""
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, "attr", getattr(node, "id", ""))


def imports(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """(module, node) of every import: statements, `__import__("name")` and `importlib.import_module("name")`."""
    found = [(a.name, n) for n in every(tree, ast.Import) for a in n.names]
    found += [(n.module or "", n) for n in every(tree, ast.ImportFrom)]
    dynamic = (c for c in every(tree, ast.Call) if last_name(c) in ("__import__", "import_module") and c.args)
    return found + [(str(c.args[0].value), c) for c in dynamic if isinstance(c.args[0], ast.Constant)]


@functools.lru_cache(maxsize=4)
def _called(tree: ast.Module) -> dict[str, list[ast.Call]]:
    """Dotted name, import aliases resolved -> its calls."""
    aliases = {a.asname: a.name for n in every(tree, ast.Import) for a in n.names if a.asname}
    aliases |= {a.asname or a.name: f"{n.module}.{a.name}" for n in every(tree, ast.ImportFrom) for a in n.names}
    found: dict[str, list[ast.Call]] = {}
    for call in every(tree, ast.Call):
        head, dot, rest = dotted(call.func).partition(".")
        found.setdefault(aliases.get(head, head) + dot + rest, []).append(call)
    return found


def calls(tree: ast.Module, wanted: set[str]) -> list[ast.Call]:
    """Calls of `wanted` (dotted), import aliases resolved."""
    return [call for name in sorted(wanted) for call in _called(tree).get(name, ())]


def keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)
