"""Whether a part of a script ran: its conditions under the knobs that the logs print, else under the code's own defaults.

A condition is known only where every log, every declaration of a knob and every call that hands it on give it the same
outcome; what the launcher sets (RANK and its kin) is never known. A line of a log that only the guarded part prints shows
that it ran.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from check.syntax import FUNCTIONS, Scope, dotted, every, last_name, places, scopes

_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"}
_KNOB = re.compile(r"[A-Z][A-Z0-9_]*")
_OPERATORS = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not},
    **{ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b},
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_},
}
_PLAIN = {"int": int, "float": float, "bool": bool, "str": str}
_TEXT = {"lower", "upper", "strip"}
_DEPTH, _LONGEST = 24, 1 << 12


class Off(NamedTuple):
    """Why a part did not run: `ttt_enabled=0`, and whether the logs say so (else it is a default that none prints)."""

    words: str
    logged: bool


class _Unknown(Exception):
    """A value that only running the script would give."""


class Switches:
    """The knobs of one tree. `configs` holds what each log prints, names in lower case; `printed` the logs' own lines."""

    def __init__(self, tree: ast.Module, configs: list[dict[str, object]], printed: Callable[[], str] = str) -> None:
        self.tree, self.configs, self.printed = tree, configs or [{}], printed
        self.places = places(tree)
        self.scopes = {scope.node: scope for scope in scopes(tree)}
        self.tests = {id(node.test): node for node in every(tree, ast.If)}
        self.declared: dict[str, list[tuple[ast.AST | None, Scope]]] = {}
        self.local: dict[tuple[ast.AST, str], list[ast.AST | None]] = {}
        self.uses: dict[str, list[ast.AST]] = {}  # where a function's or class's name is loaded
        self.calls: dict[str, list[ast.Call]] = {}
        self._holds: dict[tuple, tuple] = {}
        self._attributes: dict[str, ast.Attribute] = {}
        self._off: dict[ast.AST, Off | None] = {}
        self._read()

    def _read(self) -> None:
        for scope in self.scopes.values():
            shared = {name for node in scope.of(ast.Global, ast.Nonlocal) for name in node.names}
            for node in scope.of(ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr):
                value = None if isinstance(node, ast.AugAssign) else node.value
                for target in getattr(node, "targets", None) or [node.target]:
                    self._declare(target, value, scope, shared, isinstance(node, ast.AnnAssign))
            for node in scope.of(ast.For, ast.AsyncFor, ast.With, ast.AsyncWith, ast.comprehension):
                targets = [i.optional_vars for i in node.items] if hasattr(node, "items") else [node.target]
                for target in targets:
                    self._declare(target, None, scope, shared)
            for call in scope.of(ast.Call):
                self.calls.setdefault(last_name(call.func), []).append(call)
                if last_name(call.func) == "add_argument":
                    self._argument(call, scope)
            for node in scope.of(ast.Name, ast.Attribute):
                if isinstance(node.ctx, ast.Load):
                    self.uses.setdefault(getattr(node, "id", getattr(node, "attr", "")), []).append(node)

    def _declare(
        self, target: ast.AST | None, value: ast.AST | None, scope: Scope, shared: set[str], annotated: bool = False
    ) -> None:
        if isinstance(target, (ast.Tuple, ast.List, ast.Starred)):
            pairs = zip(target.elts, value.elts) if _alike(target, value) else None  # noqa: B905
            inner = pairs or [(t, None) for t in ast.iter_child_nodes(target)]
            for one, its in inner:
                self._declare(one, its, scope, shared)
        elif isinstance(target, ast.Name):
            if annotated and value is None:
                return
            of_all = target.id in shared or not isinstance(scope.node, (*FUNCTIONS, ast.Lambda))
            self.local.setdefault((scope.node, target.id), []).append(value)
            if of_all:
                self.declared.setdefault(target.id.lower(), []).append((value, scope))
            if isinstance(value, ast.Dict) or (isinstance(value, ast.Call) and last_name(value) == "dict"):
                self._dictionary(value, scope)
        elif isinstance(target, ast.Attribute) and not (annotated and value is None):
            self.declared.setdefault(target.attr.lower(), []).append((value, scope))
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            self.declared.setdefault(str(target.slice.value).lower(), []).append((value, scope))

    def _dictionary(self, value: ast.Dict | ast.Call, scope: Scope) -> None:
        pairs = [(k.value, v) for k, v in zip(value.keys, value.values, strict=True) if isinstance(k, ast.Constant)] \
            if isinstance(value, ast.Dict) else [(k.arg, k.value) for k in value.keywords if k.arg]  # fmt: skip
        for name, inner in pairs:
            self.declared.setdefault(str(name).lower(), []).append((inner, scope))

    def _argument(self, call: ast.Call, scope: Scope) -> None:
        """`parser.add_argument("--ngram-order", default=0)`."""
        words = {k.arg: k.value for k in call.keywords}
        action = getattr(words.get("action"), "value", None)
        value = words.get("default", ast.Constant({"store_true": False, "store_false": True}.get(action)))
        flags = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        named = [str(getattr(words["dest"], "value", ""))] if "dest" in words else flags
        for flag in named:
            self.declared.setdefault(flag.lstrip("-").replace("-", "_").lower(), []).append((value, scope))

    # ---- Values

    def holds(self, test: ast.AST, scope: Scope) -> tuple[bool | None, str, bool]:
        """What a condition comes out as in every log (None: not known), by which knob, and whether all logs print it."""
        key = (id(test), scope.node)
        if key not in self._holds:
            outcomes, told, logged = set(), "", True
            for config in self.configs:
                asked: list[tuple[str, object, bool]] = []
                try:
                    outcomes.add(bool(self._value(test, scope, config, asked, 0)))
                except _Unknown:
                    outcomes.add(None)
                except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, MemoryError):
                    outcomes.add(None)
                told = told or ", ".join(f"{n}={v}" for n, v, _ in asked[:2])
                logged &= any(seen for *_, seen in asked)
            self._holds[key] = (outcomes.pop() if len(outcomes) == 1 else None, told, logged)
        return self._holds[key]

    def _value(self, node: ast.AST | None, scope: Scope | None, config: dict, asked: list, deep: int) -> object:
        if node is None or scope is None or deep > _DEPTH:
            raise _Unknown

        def ask(child: ast.AST | None) -> object:
            return self._value(child, scope, config, asked, deep + 1)

        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._name(node.id, scope, config, asked, deep)
        if isinstance(node, ast.Attribute):
            return self._knob(node.attr, config, asked, deep)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = str(node.slice.value)
            return self._variable(key, None, config, asked, ask) if dotted(node.value).endswith("environ") else (
                self._knob(key, config, asked, deep))  # fmt: skip
        if isinstance(node, ast.UnaryOp):
            value = ask(node.operand)
            return not value if isinstance(node.op, ast.Not) else -value if isinstance(node.op, ast.USub) else +value
        if isinstance(node, ast.BoolOp):
            return self._all_or_any(node, ask)
        if isinstance(node, ast.Compare):
            return self._compared(node, config, asked, ask)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = ask(node.left), ask(node.right)
            if any(isinstance(v, (str, bytes, tuple)) for v in (left, right)) and not isinstance(node.op, ast.Add):
                raise _Unknown  # 10**9 copies of a text
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.IfExp):
            return ask(node.body if ask(node.test) else node.orelse)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)) and len(node.elts) < _LONGEST:
            return tuple(map(ask, node.elts))
        if isinstance(node, ast.Call):
            return self._call(node, config, asked, ask, deep)
        raise _Unknown

    def _all_or_any(self, node: ast.BoolOp, ask: Callable) -> object:
        """One decisive part is enough, whatever the others are."""
        decisive, unknown, value = isinstance(node.op, ast.Or), False, None
        for part in node.values:
            try:
                value = ask(part)
            except _Unknown:
                unknown = True
                continue
            if bool(value) is decisive:
                return value
        if unknown:
            raise _Unknown
        return value

    def _compared(self, node: ast.Compare, config: dict, asked: list, ask: Callable) -> bool:
        if isinstance(node.ops[0], ast.In) and dotted(node.comparators[0]).endswith("environ"):
            name = node.left.value if isinstance(node.left, ast.Constant) else None
            return self._variable(str(name), ast.Constant(None), config, asked, ask) is not None
        left = ask(node.left)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = ask(part)
            if type(op) not in _OPERATORS or not _OPERATORS[type(op)](left, right):
                return False
            left = right
        return True

    def _call(self, node: ast.Call, config: dict, asked: list, ask: Callable, deep: int) -> object:
        name, first = last_name(node.func), node.args[0] if node.args else None
        words = {k.arg: k.value for k in node.keywords}
        if name in _PLAIN and len(node.args) == 1:
            return _PLAIN[name](ask(first))
        if name in _TEXT and isinstance(node.func, ast.Attribute) and not node.args:
            return getattr(str(ask(node.func.value)), name)()
        text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
        default = node.args[1] if len(node.args) > 1 else words.get("default")
        if _KNOB.fullmatch(text):  # os.environ.get, or a function of the script's own that reads the environment
            return self._variable(text, default or ast.Constant(None), config, asked, ask)
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            try:
                return self._knob(str(node.args[1].value), config, asked, deep)
            except _Unknown:
                if str(node.args[1].value).lower() in self.declared or len(node.args) < 3:
                    raise
                asked.append((str(node.args[1].value).lower(), value := ask(node.args[2]), False))
                return value
        if name == "field" and (default := words.get("default")) is not None:
            return ask(default)
        raise _Unknown

    def _variable(
        self, name: str, default: ast.AST | None, config: dict, asked: list, ask: Callable
    ) -> object:  # of the environment
        if name in _LAUNCHER:
            raise _Unknown
        if name.lower() in config:
            asked.append((name.lower(), config[name.lower()], True))
            return _plain(config[name.lower()])
        value = ask(default)
        asked.append((name.lower(), value, False))
        return value

    def _knob(self, name: str, config: dict, asked: list, deep: int) -> object:
        """An attribute: as the log prints it, else the one value of all its declarations."""
        name = name.lower()
        if name in config:
            asked.append((name, config[name], True))
            return _plain(config[name])
        if name not in self.declared:
            raise _Unknown
        values = []
        for value, scope in self.declared[name]:
            if _copies(value, name):
                continue
            values.append(self._value(value, scope, config, asked, deep + 2))
        if not values or any(v != values[0] for v in values):
            raise _Unknown
        if not any(n == name for n, *_ in asked):
            asked.append((name, values[0], False))
        return values[0]

    def _name(self, name: str, scope: Scope, config: dict, asked: list, deep: int) -> object:
        while scope is not None:
            bound = self.local.get((scope.node, name))
            if isinstance(scope.node, (*FUNCTIONS, ast.Lambda)) and name in _arguments(scope.node):
                return (
                    self._handed(name, scope, config, asked, deep) if not bound else self._value(None, None, {}, [], 0)
                )
            if bound:
                if name.lower() in config and not isinstance(scope.node, FUNCTIONS):
                    asked.append((name.lower(), config[name.lower()], True))
                    return _plain(config[name.lower()])
                shared = [v for v, s in self.declared.get(name.lower(), ()) if s.node is not scope.node]
                values = [self._value(v, scope, config, asked, deep + 2) for v in bound]
                if any(v != values[0] for v in values) or (not isinstance(scope.node, FUNCTIONS) and None in shared):
                    raise _Unknown
                asked.append((name.lower(), values[0], False))
                return values[0]
            scope = scope.outer
        raise _Unknown

    def _handed(self, name: str, scope: Scope, config: dict, asked: list, deep: int) -> object:
        """A parameter: what every call gives it, and the default where one gives none."""
        called = getattr(scope.node, "name", "")
        if called == "__init__" and scope.outer is not None:
            called = scope.outer.name
        sites, parameters = self.calls.get(called, ()), _arguments(scope.node)
        if not sites or len(sites) != len(self.uses.get(called, ())) or len(sites) > 20:
            raise _Unknown
        place = parameters.index(name) - (parameters[:1] == ["self"])
        values = []
        for call in sites:
            if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
                raise _Unknown
            given = next((k.value for k in call.keywords if k.arg == name), None)
            given = given or (call.args[place] if 0 <= place < len(call.args) else _default(scope.node, name))
            at = self.places[id(call)].scope if id(call) in self.places else None
            values.append(self._value(given, at, config, asked, deep + 2))
        if any(v != values[0] for v in values):
            raise _Unknown
        return values[0]

    # ---- What did not run

    def knobs_off(self, wanted: re.Pattern) -> Off | None:
        """Whether all knobs of a name are off; those that end in `_enabled` speak for the others."""
        known = [n for n in {*self.declared, *(k for config in self.configs for k in config)} if wanted.search(n)]
        deciding = [n for n in known if n.endswith("_enabled")] or known
        each = [(self.holds(self._asked(n), self.scopes[self.tree]), n) for n in sorted(deciding)]
        if not each or any(outcome is not False for (outcome, *_), _ in each):
            return None
        return Off(each[0][0][1] or f"{each[0][1]}=0", all(logged for (*_, logged), _ in each))

    def _asked(self, name: str) -> ast.Attribute:
        return self._attributes.setdefault(name, ast.Attribute(ast.Name("args", ast.Load()), name, ast.Load()))

    def off(self, node: ast.AST) -> Off | None:
        """Why a node did not run: a condition around it, or around every use of the function that it stands in."""
        place = self.places.get(id(node))
        if place is None:
            return None
        return self.excluded(place.around.tests, place.scope) or self._function_off(place.scope)

    def excluded(self, tests: tuple[tuple[ast.AST, bool], ...], scope: Scope) -> Off | None:
        """Why a place did not run, by the conditions around it and what each would have to come out as."""
        for test, came in tests:
            outcome, knob, logged = self.holds(test, scope)
            if outcome is not None and outcome is not came and knob and not self._shown(test, came):
                return Off(knob, logged)
        return None

    def _function_off(self, scope: Scope) -> Off | None:
        if scope.outer is None:
            return None
        if scope.node not in self._off:
            self._off[scope.node] = None  # while it is asked: a function that calls itself
            self._off[scope.node] = self._never_used(scope)
        return self._off[scope.node]

    def _never_used(self, scope: Scope) -> Off | None:
        named = scope
        while named.outer is not None and (
            isinstance(named.node, ast.Lambda) or named.name.startswith("__") or named.name == "forward"
        ):
            named = named.outer
        if isinstance(named.node, ast.Lambda) or named.outer is None:
            return None
        inside = {id(n) for n in ast.walk(named.node)}
        sites = [n for n in self.uses.get(named.name, ()) if id(n) not in inside]
        if not sites:
            return None  # called by a way that is not seen, or from another file
        found = [self.off(site) for site in sites]
        if None in found:
            return self._function_off(named.outer)
        return Off(found[0].words, all(f.logged for f in found))

    def _shown(self, test: ast.AST, came: bool) -> bool:
        """Whether the logs hold a line that only the guarded statements print."""
        node = self.tests.get(id(test))
        body = (node.body if came else node.orelse) if node else []
        guarded = [n for part in body for n in ast.walk(part)]
        for call in [n for n in guarded if isinstance(n, ast.Call)]:
            scope = next((s for s in self.scopes.values() if s.name == last_name(call.func)), None)
            if scope is not None and len(self.uses.get(scope.name, ())) == 1 and isinstance(scope.node, FUNCTIONS):
                guarded += ast.walk(scope.node)
        words = {w for n in guarded if (w := _printed_words(n))}
        if not words or not (printed := self.printed()):
            return False
        inside = {id(n) for n in guarded}
        elsewhere = {w for n in every(self.tree, ast.Call) if id(n) not in inside and (w := _printed_words(n))}
        return any(w in printed for w in words - elsewhere)


@functools.lru_cache(maxsize=2**17)
def _printed_words(node: ast.AST) -> str:
    """What a call with a text prints first: `ttt:start` of `log(f"ttt:start lr:{lr}")`; "" of anything else."""
    if not isinstance(node, ast.Call) or not node.args:
        return ""
    text = node.args[0]
    while isinstance(text, (ast.BinOp, ast.JoinedStr, ast.Call, ast.Attribute)):
        if isinstance(text, ast.BinOp):
            text = text.left
        elif isinstance(text, ast.JoinedStr):
            text = text.values[0] if text.values else None
        else:
            text = text.func if isinstance(text, ast.Call) else text.value
    word = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
    word = re.split(r"[{%]", word.strip())[0].strip()
    return word if len(word) >= 6 and re.search("[a-z]{3}", word, re.I) else ""


def _copies(value: ast.AST | None, name: str) -> bool:
    """`self.order = args.order`, in a conversion or not: no value of its own."""
    while isinstance(value, ast.Call) and last_name(value) in _PLAIN and value.args:
        value = value.args[0]
    return isinstance(value, ast.Attribute) and value.attr.lower() == name


def _alike(target: ast.AST, value: ast.AST | None) -> bool:
    return (
        isinstance(target, (ast.Tuple, ast.List))
        and isinstance(value, (ast.Tuple, ast.List))
        and len(target.elts) == len(value.elts)
        and not any(isinstance(e, ast.Starred) for e in (*target.elts, *value.elts))
    )


def _plain(value: object) -> object:
    """What a log prints, as the value it stands for."""
    text = str(value).strip().strip("'\"")
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _arguments(node: ast.AST) -> list[str]:
    parts = node.args
    return [a.arg for a in (*parts.posonlyargs, *parts.args, *parts.kwonlyargs, parts.vararg, parts.kwarg) if a]


def _default(node: ast.AST, name: str) -> ast.AST | None:
    parts = node.args
    placed = [a.arg for a in (*parts.posonlyargs, *parts.args)]
    known = dict(zip(reversed(placed), reversed(parts.defaults)))  # noqa: B905
    known |= {a.arg: d for a, d in zip(parts.kwonlyargs, parts.kw_defaults, strict=True)}
    return known.get(name)
