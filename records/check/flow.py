"""Follows validation tokens through a script, call by call: is a loss on them stepped before they are scored?

A value is a validation token by its name or its file (`VALIDATION`), by the argument it arrives as, and by being cut,
loaded or computed from one, put into a buffer or list that holds such, kept in an attribute or returned by a function. A
*score* adds a loss on such tokens to what becomes the figure, a *step* sends one backward, a *reset* throws away what a
step trained. In a function that evaluates, a step is in order once something was scored before it, and not if all of it is
scored once more afterwards. In one that trains (losses on other tokens go backward too) and at the top only a score in the
same loop counts: scores taken while training prove nothing. A loop over epochs around both scores again what was learned.
Every answer carries the path by which the text reaches it.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from check.switches import Off, Switches
from check.syntax import FUNCTIONS, Around, Scope, children, dotted, every, last_name, names, places, scopes

_ENDING = r"(?:_(?:all|full|cpu|gpu|cuda|np|flat|local|dev|device|t|x|y|\d+))*$"
VALIDATION = re.compile(
    r"(?:^|_)(?:val|valid|validation)_(?:tokens?|toks?|data|docs?|seqs?|stream|ids|text|inputs?|targets?"
    rf"|loader|files?|path|shards?|pattern|chunks?|x|y|set|split|ds|dataset){_ENDING}|fineweb_val",
    re.I,
)
_TRAINING = re.compile(
    r"(?:^|_)(?:train|training)_(?:tokens?|data|docs?|seqs?|stream|loader|files?|path|shards?|pattern|x|y|ds|dataset)"
    rf"{_ENDING}|fineweb_train",
    re.I,
)
_NEVER = re.compile(
    r"(?:^|_)(?:model|net|module|optimizers?|opt|params?|args|hparams|h|cfg|config|self|device|scaler|loras?|state|ema|rank)$"
)
_FACTS = {"shape", "device", "dtype", "size", "numel", "ndim", "dim", "nbytes", "is_cuda", "element_size", "itemsize"}
_NO_LOSS = {"len", "range", "print", "isinstance", "type", "id", "hasattr"}
_NO_TOKENS = {*_NO_LOSS, "int", "float", "bool", "str", "min", "max", "round"}
_HANDS_ON = re.compile(
    r"load|read|glob|open|memmap|fromfile|from_numpy|frombuffer|cat|stack|tensor|array|numpy|batch|chunk|split"
    r"|shard|token|stream|zip|enumerate|iter|list|tuple|sorted|reversed|seq|doc|window|tqdm|path|pad|long|next|slice|build|get",
    re.I,
)
EVALUATES = re.compile(r"eval|valid|score|audit|bpb|test", re.I)
_SUM = re.compile(r"loss|nll|nats|bits|bpb|score|logp|log_?prob|(?:^|_)(?:ce|lp|ptl|total|sum)(?:_|$)", re.I)
_FIGURE = re.compile(r"byte|bpb|bits|(?:^|_)ln2|log2", re.I)
_EPOCHS = re.compile(r"(?:^|_)(?:epochs?|ep|n_?pass(?:es)?|passes|rounds?)(?:_|$)", re.I)
_CALIBRATES = re.compile(r"calib|(?:^|_)cal(?:_|$)|hessian|gptq|quantize(?!d)|collect_(?:act|stat)", re.I)
_TABLE = re.compile(  # of n-grams; a network's keys and values are none
    r"^(?!.*(?:kv|past|rope|rotary|cos|sin|mask|attn)).*(?:gram|cache|table|mixer|(?:^|_)(?:ctx|full|counts?|ppm|trie|hist)(?:_|\d|$))",
    re.I,
)
_LEARNS = re.compile(
    r"^_?(?:update|insert|observe|learn|record|add|ingest|fit|feed|train|build)(?:_|$)|index_add_|scatter_add_", re.I
)
_IS_MODEL = re.compile(r"model|net$|forward|logits|compiled", re.I)  # a name of what is trained, not of a scorer
_ADDING = {
    "append",
    "add",
    "add_",
    "copy_",
    "extend",
    "insert",
    "put",
    "index_add_",
    "scatter_add_",
    "index_copy_",
    "fill_",
}
_RESETS = re.compile(r"reset|restore|reinit|re_init|load_state_dict|rollback|revert", re.I)
_STORES = re.compile(r"\w*compress|save\w*|dumps?|tofile|register_buffer|writes?|write_bytes|pack\w*")
_KEPT = re.compile(r"state|artifact|payload|blob|pack|(?:^|_)(?:sd|obj|meta|export)(?:_|$)", re.I)
_BINDING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension, ast.With, ast.AsyncWith)
_LAMBDAS = (*FUNCTIONS, ast.Lambda)
_MAX_DEPTH, _MAX_QUESTIONS = 12, 400_000
_SCORE, _STEP, _RESET, _ADAPTED = "score", "step", "reset", "adapted"


class Hop(NamedTuple):
    """One name on the way of a text, and its line; `carried`: it comes from the round before of a loop."""

    name: str
    line: int
    carried: bool = False


Path = tuple[Hop, ...]  # empty: no validation tokens


def route(path: Path) -> str:
    """`val_tokens (line 12) -> stream (20) -> loss (23)`, of a long way both ends."""
    hops = [h for n, h in enumerate(path) if h.name and (n == 0 or path[n - 1][:2] != h[:2])]
    words = [f"{h.name} ({'line ' * (n == 0)}{h.line})" for n, h in enumerate(hops)]
    return " -> ".join(words if len(words) < 7 else [*words[:3], "...", *words[-3:]])


class Here(NamedTuple):
    """Where in a scope a question is asked."""

    at: tuple[int, int]
    loops: tuple[ast.AST, ...] = ()
    tests: tuple[tuple[ast.AST, bool], ...] = ()


_END = Here((1 << 60, 0))


class Binding(NamedTuple):
    """What a name is given: replaced by `value` (whole), or holding it among others; a parameter has no value."""

    here: Here
    value: ast.AST | None
    whole: bool = True
    scope: ast.AST | None = None  # where it is given, if a function around declares the name its own


class Step(NamedTuple):
    """A backward pass on validation tokens that nothing scored before."""

    line: int
    name: str  # the function that does it
    again: bool = False  # scored before, but scored again after it
    node: ast.AST | None = None
    path: Path = ()
    trained: frozenset[str] = frozenset()  # names of what the optimizer holds, where known
    off: Off | None = None  # why it, or the call that leads to it, did not run


class Item(NamedTuple):
    """A score, step or reset inside a function, in its loops; a step that was in order is `adapted`."""

    here: Here
    kind: str
    node: ast.AST
    step: Step | None = None
    names: frozenset[str] = frozenset()  # of what is reset


class TableUse(NamedTuple):
    """An update of a table or a question to it; `path`: of the validation tokens it is about."""

    here: Here
    table: str
    learns: bool
    path: Path
    node: ast.AST


class Summary(NamedTuple):
    scores: bool
    trains: bool  # sends a loss on other tokens backward
    steps: tuple[Step, ...]
    adapted: tuple[Step, ...] = ()


class Called(NamedTuple):
    """What a call runs: a function of this script and what it is given, or a class of it that it makes one of."""

    scope: Scope
    arguments: list
    keywords: list
    owner: ast.AST | None  # the object whose method it is
    makes: bool = False


class Flow:
    """What the functions of one script do to validation tokens."""

    def __init__(self, tree: ast.Module, switches: Switches) -> None:
        self.tree, self.switches, self.places = tree, switches, places(tree)
        self.scopes = {scope.node: scope for scope in scopes(tree)}
        self.functions: dict[str, list[Scope]] = {}
        self.classes: dict[str, Scope] = {}
        self.methods: dict[ast.AST, list[Scope]] = {}  # of each class
        for scope in self.scopes.values():
            if isinstance(scope.node, FUNCTIONS):
                self.functions.setdefault(scope.name, []).append(scope)
                if scope.outer is not None and isinstance(scope.outer.node, ast.ClassDef):
                    self.methods.setdefault(scope.outer.node, []).append(scope)
            elif isinstance(scope.node, ast.ClassDef):
                self.classes.setdefault(scope.name, scope)
        self.modules = {a.asname: a.name for n in every(tree, ast.Import) for a in n.names if a.asname}
        self.modules |= {a.asname or a.name: n.module or "" for n in every(tree, ast.ImportFrom) for a in n.names}
        self.arrived: dict[tuple[ast.AST, str], Path] = {}  # the way by which an argument came
        self.objects: dict[tuple[ast.AST, str], Scope] = {}  # the class of an argument, where its calls tell
        self._bindings: dict[ast.AST, dict[str, list[Binding]]] = {}
        self._summaries: dict[tuple, Summary] = {}
        self._under_way: set[tuple] = set()
        self._active: dict[ast.AST, frozenset] = {}  # what the functions around are given meanwhile
        self._known: dict[tuple, Path] = {}
        self._members: dict[tuple, Path] = {}
        self._given_of: dict[tuple, frozenset] = {}
        self.questions = 0

    # ---- What is a validation token

    def bindings(self, scope: ast.AST) -> dict[str, list[Binding]]:
        """name (or `self.name`) -> what it is given in a scope, in the order of the text."""
        if scope not in self._bindings:
            found: dict[str, list[Binding]] = {}
            for name in _parameters(scope):
                found.setdefault(name, []).append(Binding(Here((0, 0)), None))
            inside = self.scopes[scope]
            for node in inside.of(*_BINDING):
                for target, value in _bound(node):
                    self._bind(found, target, value, self.here(node), isinstance(node, ast.Assign))
            for node in inside.of(ast.AugAssign):
                found.setdefault(_key(node.target), []).append(Binding(self.here(node), node.value, False))
            for call in inside.of(ast.Call):
                if (
                    isinstance(call.func, ast.Attribute)
                    and call.func.attr in _ADDING
                    and (key := _key(call.func.value))
                ):
                    given = [*call.args, *(k.value for k in call.keywords)]
                    found.setdefault(key, []).append(Binding(self.here(call), ast.Tuple(given, ast.Load()), False))
            if isinstance(scope, ast.Module):
                for other in self.scopes.values():
                    for name in {n for g in other.of(ast.Global) for n in g.names}:
                        of_other = self.bindings(other.node).get(name, ()) if other.node is not scope else ()
                        found.setdefault(name, []).extend(b._replace(whole=False, scope=other.node) for b in of_other)
            self._bindings[scope] = {k: sorted(where, key=lambda b: b.here.at) for k, where in found.items() if k}
        return self._bindings[scope]

    def _bind(self, found: dict, target: ast.AST, value: ast.AST | None, here: Here, unpacks: bool = False) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            apart = unpacks and isinstance(value, ast.Call)  # `a, b = f(x)`: what f gives first, and second
            for n, part in enumerate(target.elts):
                self._bind(found, part, ast.Subscript(value, ast.Constant(n), ast.Load()) if apart else value, here)
        elif isinstance(target, ast.Starred):
            self._bind(found, target.value, value, here)
        elif key := _key(target):
            found.setdefault(key, []).append(Binding(here, value, not isinstance(target, ast.Subscript)))

    def here(self, node: ast.AST) -> Here:
        place = self.places.get(id(node))
        around = place.around if place else Around()
        return Here(_at(node), around.loops, around.tests)

    def tokens(
        self, node: ast.AST | None, scope: ast.AST, here: Here, given: frozenset, loss: bool = False, deep: int = 0
    ) -> Path:
        """The way by which validation tokens come to an expression, or with `loss` to anything computed from them."""
        self.questions += 1
        if node is None or deep > _MAX_DEPTH * 3 or self.questions > _MAX_QUESTIONS:
            return ()

        def ask(child: ast.AST | None) -> Path:
            return self.tokens(child, scope, here, given, loss, deep + 1)

        if isinstance(node, ast.Name):
            return self._name(node.id, scope, here, given, loss, deep)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, scope, here, given, loss, deep)
        if isinstance(node, ast.Constant):
            found = isinstance(node.value, str) and "fineweb_val" in node.value and " " not in node.value
            return (Hop(node.value, node.lineno),) if found else ()
        if isinstance(node, ast.Subscript):
            place = getattr(node.slice, "value", None)
            if isinstance(node.value, ast.Call) and type(place) is int:
                return self._call(node.value, scope, here, given, loss, deep, place)
            return ask(node.value) or (ask(node.slice) if loss else ())
        if isinstance(node, ast.Call):
            return self._call(node, scope, here, given, loss, deep)
        if isinstance(node, ast.comprehension):
            return ask(node.iter)
        if isinstance(node, ast.DictComp):
            return _first(map(ask, (node.value, *node.generators)))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            return _first(map(ask, (node.elt, *node.generators)))
        if isinstance(node, ast.IfExp):
            outcome = self.switches.holds(node.test, self.scopes[scope])[0]
            return _first(map(ask, [node.body] * (outcome is not False) + [node.orelse] * (outcome is not True)))
        if isinstance(node, (*_LAMBDAS, ast.Compare)):
            return ()
        return _first(ask(child) for child in children(node) if isinstance(child, ast.expr))

    def _name(self, name: str, scope: ast.AST, here: Here, given: frozenset, loss: bool, deep: int) -> Path:
        if VALIDATION.search(name):
            return (Hop(name, self._first_line(name, scope, here)),)
        if _NEVER.search(name):
            return ()
        declared = any(name in n.names for n in self.scopes[scope].of(ast.Global))
        if not declared and (bound := self.bindings(scope).get(name)):
            return self._of_bindings(name, bound, scope, here, given, loss, deep)
        outer = self.scopes[scope].outer
        while outer is not None and isinstance(outer.node, ast.ClassDef):
            outer = outer.outer
        if outer is None:
            return ()
        return self._name(name, outer.node, _END, self._active.get(outer.node, frozenset()), loss, deep + 1)

    def _first_line(self, name: str, scope: ast.AST, here: Here) -> int:
        bound = [b for b in self.bindings(scope).get(name, ()) if b.here.at < here.at and b.value is not None]
        return bound[-1].here.at[0] if bound else min(here.at[0], getattr(scope, "lineno", here.at[0]) or here.at[0])

    def _of_bindings(
        self, name: str, bound: list[Binding], scope: ast.AST, here: Here, given: frozenset, loss: bool, deep: int
    ) -> Path:
        """What the last assignments before `here` gave, then what was put into it, then what the round before left."""
        used, later = set(here.tests), []
        kills: Binding | None = None
        for b in reversed(bound):
            if self._off(b.here, scope):
                continue
            if b.here.at >= here.at:
                later.append(b)
                continue
            if path := self._of_binding(name, b, scope, given, loss, deep):
                return path
            if b.whole and set(b.here.tests) <= used:
                kills = b
                break
        loops = set(here.loops) - set(kills.here.loops if kills else ())
        for b in later:
            if (loops if b.whole else set(here.loops)) & set(b.here.loops) and (
                path := self._of_binding(name, b, scope, given, loss, deep)
            ):
                return (*path[:-1], path[-1]._replace(carried=True))
        return ()

    def _off(self, here: Here, scope: ast.AST) -> Off | None:
        """Why a place did not run, by the conditions around it."""
        return self.switches.excluded(here.tests, self.scopes[scope]) if here.tests else None

    def _of_binding(self, name: str, b: Binding, scope: ast.AST, given: frozenset, loss: bool, deep: int) -> Path:
        if b.value is None:
            if (f"~{name}" if loss else name) not in given:
                return ()
            return (*self.arrived.get((scope, name), ()), Hop(name, getattr(scope, "lineno", 0)))[-12:]
        if b.scope is not None:
            scope, given = b.scope, self.usual(self.scopes[b.scope])
        key = (scope, name, b.here.at, b.value, given, loss, self._around(scope))
        if key not in self._known:
            self._known[key] = ()  # while it is asked: a value computed from itself
            path = self.tokens(b.value, scope, b.here, given, loss, deep + 1)
            self._known[key] = (*path[-11:], Hop(name, b.here.at[0])) if path else ()
        return self._known[key]

    def _around(self, scope: ast.AST) -> tuple:
        """What the functions around a scope are given, where their names may be asked."""
        found, outer = [], self.scopes[scope].outer
        while outer is not None:
            found.append(self._active.get(outer.node, frozenset()))
            outer = outer.outer
        return tuple(found)

    def _attribute(
        self, node: ast.Attribute, scope: ast.AST, here: Here, given: frozenset, loss: bool, deep: int
    ) -> Path:
        if VALIDATION.search(node.attr):
            return (Hop(node.attr, node.lineno),)
        if node.attr in _FACTS:
            return ()
        if (bound := self.bindings(scope).get(dotted(node))) and (
            path := self._of_bindings(dotted(node), bound, scope, here, given, loss, deep)
        ):
            return path
        owner = self._class_of(node.value, scope, here)
        if owner is not None:
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            holds = "self" in given if of_self else self._keeps(node.value, scope, here, given, deep)
            return self._member(owner, node.attr, holds, loss)
        return self.tokens(node.value, scope, here, given, loss, deep + 1) or self._declared(node.attr, loss)

    def _declared(self, attr: str, loss: bool) -> Path:
        """What a name stands for as an attribute of anything, if all classes that have it name files of validation text."""
        found = [(v, s) for v, s in self.switches.declared.get(attr.lower(), ()) if isinstance(s.node, ast.ClassDef)]
        ways = [self.tokens(v, s.node, self.here(v), frozenset(), loss, 2) if v is not None else () for v, s in found]
        return (*ways[0], Hop(attr, found[0][0].lineno)) if ways and all(ways) else ()

    def _member(self, owner: Scope, attr: str, holds: bool, loss: bool) -> Path:
        """`self.attr` as the methods of its class set it; with `holds` its object was made of validation tokens."""
        key = (owner.node, attr, holds, loss)
        if key not in self._members:
            self._members[key] = ()
            for b in self.bindings(owner.node).get(attr, ()):
                if path := self._of_binding(attr, b, owner.node, frozenset(), loss, 2):
                    self._members[key] = path
                    return path
            for scope in self.methods.get(owner.node, ()):
                for b in self.bindings(scope.node).get(f"self.{attr}", ()):
                    given = self._usually_given(scope, owner) if holds else frozenset()
                    if path := self._of_binding(f"self.{attr}", b, scope.node, given, loss, 2):
                        self._members[key] = path
                        return path
            if holds:
                self._members[key] = self._field(owner, attr, loss)
        return self._members[key]

    def _field(self, owner: Scope, attr: str, loss: bool) -> Path:
        """What the makers of a dataclass's objects give one of its fields."""
        fields = [n.target.id for n in owner.of(ast.AnnAssign) if isinstance(n.target, ast.Name)]
        for call in self.switches.calls.get(owner.name, ()) if attr in fields else ():
            given = [k.value for k in call.keywords if k.arg == attr] + call.args[fields.index(attr) :][:1]
            if (place := self.places.get(id(call))) is not None:
                here, usual = self.here(call), self.usual(place.scope)
                if path := _first(self.tokens(a, place.scope.node, here, usual, loss, 2) for a in given):
                    return (*path, Hop(attr, call.lineno))
        return ()

    def _usually_given(self, scope: Scope, owner: Scope) -> frozenset:
        """Parameters of a method that get validation tokens anywhere."""
        if scope.node not in self._given_of:
            self._given_of[scope.node] = frozenset()
            wanted = owner.name if scope.name == "__init__" else scope.name
            found: set[str] = set()
            for call in self.switches.calls.get(wanted, ()):
                if place := self.places.get(id(call)):
                    called = Called(scope, call.args, call.keywords, None)
                    found |= self._given(called, place.scope.node, self.here(call), self.usual(place.scope))
            self._given_of[scope.node] = frozenset(found)
        return self._given_of[scope.node]

    def _call(
        self,
        node: ast.Call,
        scope: ast.AST,
        here: Here,
        given: frozenset,
        loss: bool,
        deep: int,
        place: int | None = None,
    ) -> Path:
        name = last_name(node.func)
        arguments = [*node.args, *(k.value for k in node.keywords)]
        if name in (_NO_LOSS if loss else _NO_TOKENS) or name in _FACTS:
            return ()

        def ask(child: ast.AST) -> Path:
            return self.tokens(child, scope, here, given, loss, deep + 1)

        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        called = self._called(node, scope, here)
        if called is not None and called.makes:
            return _first(self.tokens(a, scope, here, given, False, deep + 1) for a in arguments)
        if called is not None:
            inner = self._given(called, scope, here, given, deep)
            return self._returned(called.scope, inner, loss, deep, place)
        if loss:
            return _first(map(ask, arguments)) or (ask(owner) if owner is not None else ())
        if EVALUATES.search(name):
            return ()
        if owner is not None and (path := ask(owner)):
            return path
        return _first(map(ask, arguments)) if _HANDS_ON.search(name) else ()

    def _returned(self, scope: Scope, given: frozenset, loss: bool, deep: int, place: int | None = None) -> Path:
        """What a function of this script hands back of what it is given, of a tuple the part at `place`."""
        key = ("returned", scope.node, given, loss, place, self._around(scope.node))
        if key not in self._known:
            self._known[key] = ()
            before = self._active.get(scope.node)
            self._active[scope.node] = given
            body = [scope.node.body] if isinstance(scope.node, ast.Lambda) else [
                n.value for n in scope.of(ast.Return, ast.Yield, ast.YieldFrom)]  # fmt: skip
            parts = [(v, getattr(v, "elts", ())) for v in body if v is not None]
            picked = [(e[place] if place is not None and -len(e) <= place < len(e) else v, v) for v, e in parts]
            path = _first(self.tokens(p, scope.node, self.here(v), given, loss, deep + 1) for p, v in picked)
            self._put_back(scope.node, before)
            self._known[key] = path
        return self._known[key]

    def _put_back(self, node: ast.AST, before: frozenset | None) -> None:
        if before is None:
            self._active.pop(node, None)
        else:
            self._active[node] = before

    # ---- What a call runs

    def _class_of(self, node: ast.AST, scope: ast.AST, here: Here, deep: int = 0) -> Scope | None:
        """The class of this script that an expression is an object of, where that is plain."""
        if deep > 5:
            return None
        if isinstance(node, ast.Name) and node.id == "self":
            outer: Scope | None = self.scopes[scope]
            while outer is not None and not isinstance(outer.node, ast.ClassDef):
                outer = outer.outer
            return outer
        if isinstance(node, ast.Call):
            made = self.classes.get(last_name(node.func))
            found = [] if made or not isinstance(node.func, ast.Name) else self.functions.get(node.func.id, [])
            return made or next((c for s in found if (c := self._annotated(s.node.returns)) is not None), None)
        if isinstance(node, ast.Name):
            inside: Scope | None = self.scopes[scope]
            while inside is not None:
                if node.id in self.classes and self.classes[node.id].outer is inside:
                    return self.classes[node.id]
                if bound := self.bindings(inside.node).get(node.id):
                    made = [b.value for b in bound if isinstance(b.value, (ast.Call, ast.Attribute))]
                    if made and made[-1] is not node:
                        return self._class_of(made[-1], inside.node, here, deep + 1)
                    noted = [a.annotation for a in _all_arguments(inside.node) if a.arg == node.id]
                    return self.objects.get((inside.node, node.id)) or self._annotated(*noted[:1])
                inside = inside.outer
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value, scope, here, deep + 1)
            if owner is None:
                return None
            for noted in owner.of(ast.AnnAssign):
                if isinstance(noted.target, ast.Name) and noted.target.id == node.attr:
                    return self._annotated(noted.annotation)
            for method in self.methods.get(owner.node, ()):
                for b in self.bindings(method.node).get(f"self.{node.attr}", ()):
                    if isinstance(b.value, ast.Call) and last_name(b.value.func) in self.classes:
                        return self.classes[last_name(b.value.func)]
        return None

    def _annotated(self, note: ast.AST | None = None) -> Scope | None:
        """The class of this script that an annotation names."""
        word = (
            note.value
            if isinstance(note, ast.Constant) and isinstance(note.value, str)
            else last_name(note or ast.Pass())
        )
        return self.classes.get(word)

    def _called(self, node: ast.Call, scope: ast.AST, here: Here) -> Called | None:
        """The function or class of this script that a call runs, itself or as an argument; None if it is none of it."""
        func = node.func
        if (found := self._function(func, scope, here)) is not None:
            owner = func.value if isinstance(func, ast.Attribute) else None
            return Called(found, node.args, node.keywords, owner)
        kind = self._class_of(func, scope, here) if isinstance(func, ast.Name) and func.id not in self.classes else None
        asked = [m for m in self.methods.get(kind.node, ()) if m.name == "__call__"] if kind is not None else []
        if asked:
            return Called(asked[0], node.args, node.keywords, func)
        name = last_name(func)
        if isinstance(func, ast.Name) and name in self.classes:
            return Called(self.classes[name], node.args, node.keywords, None, makes=True)
        for place, argument in enumerate(node.args):
            handed = isinstance(argument, (ast.Name, ast.Attribute)) and not isinstance(func, ast.Attribute | ast.Name)
            handed = handed or (isinstance(argument, ast.Name) and argument.id in self.functions)
            if handed and (found := self._function(argument, scope, here)) is not None:
                return Called(found, node.args[place + 1 :], node.keywords, None)
        return None

    def _function(self, func: ast.AST, scope: ast.AST, here: Here, deep: int = 0) -> Scope | None:
        """The function of this script that an expression names: a method of its object's class, or by way of a name."""
        if deep > 3:
            return None
        if isinstance(func, ast.Lambda):
            return self.scopes.get(func)
        if isinstance(func, ast.Call):  # `torch.compile(f)`, `partial(f, x)`
            inner = [a for a in func.args[:1] if isinstance(a, (ast.Name, ast.Attribute))]
            return self._function(inner[0], scope, here, deep + 1) if inner and len(func.args) == 1 else None
        name = last_name(func)
        if isinstance(func, ast.Attribute):
            owner = self._class_of(func.value, scope, here)
            found = [
                s for s in self.functions.get(name, ()) if isinstance(getattr(s.outer, "node", None), ast.ClassDef)
            ]
            if owner is not None:
                return next((s for s in found if s.outer is owner), None)
            module = [s for s in self.functions.get(name, ()) if s.outer is not None and s.outer.outer is None]
            plain = [s for s in module if isinstance(s.outer.node, ast.Module)]
            if isinstance(func.value, ast.Name) and plain and not found and not self._is_foreign(func.value.id, scope):
                return plain[-1]  # of a helper module
            return found[0] if len(found) == 1 and name not in _COMMON else None
        if not isinstance(func, ast.Name):
            return None
        inside: Scope | None = self.scopes[scope]
        while inside is not None:
            for b in reversed(self.bindings(inside.node).get(name, ())):
                if isinstance(b.value, (ast.Lambda, ast.Name, ast.Call)) and b.value is not func:
                    return self._function(b.value, inside.node, here, deep + 1)
                return None
            own = [s for s in self.functions.get(name, ()) if s.outer is inside]
            if own:
                return own[-1]
            inside = inside.outer
        free = [s for s in self.functions.get(name, ()) if not isinstance(getattr(s.outer, "node", None), ast.ClassDef)]
        return free[-1] if free else None

    def _is_foreign(self, name: str, scope: ast.AST) -> bool:
        """Whether a name is a value of the script's or a library, and no module that lies beside the script."""
        if self.modules.get(name, name).partition(".")[0] in _LIBRARIES:
            return True
        inside: Scope | None = self.scopes[scope]
        while inside is not None:
            if name in self.bindings(inside.node):
                return True
            inside = inside.outer
        return False

    def _given(self, called: Called, scope: ast.AST, here: Here, given: frozenset, deep: int = 0) -> frozenset:
        """Parameters that a call gives validation tokens, with a `~` those that it gives what is computed from them."""
        parameters = _parameters(called.scope.node)
        of_object = parameters[:1] in (["self"], ["cls"])
        parts = called.scope.node.args if isinstance(called.scope.node, _LAMBDAS) else None
        rest = parts.vararg.arg if parts is not None and parts.vararg else None
        placed = [a.arg for a in (*parts.posonlyargs, *parts.args)] if parts is not None else parameters
        placed = placed[1:] if of_object else placed
        pairs = [*zip(placed, called.arguments), *((k.arg, k.value) for k in called.keywords if k.arg)]  # noqa: B905
        pairs += [(rest, a) for a in called.arguments[len(placed) :] if rest]
        found = set()
        for name, value in pairs:
            path = self.tokens(value, scope, here, given, False, deep + 1)
            found |= {name} if path else set()
            if path or (path := self.tokens(value, scope, here, given, True, deep + 1)):
                found.add(f"~{name}")
                self.arrived.setdefault((called.scope.node, name), path)
                if (kind := self._class_of(value, scope, here)) is not None:
                    self.objects.setdefault((called.scope.node, name), kind)
        if of_object and called.owner is not None:
            own = isinstance(called.owner, ast.Name) and called.owner.id == "self"
            if "self" in given if own else self._keeps(called.owner, scope, here, given, deep):
                found.add("self")
        return frozenset(found)

    def _keeps(self, node: ast.AST, scope: ast.AST, here: Here, given: frozenset, deep: int) -> bool:
        """Whether an object was made of validation tokens, or has got some by one of its methods."""
        if self.tokens(node, scope, here, given, False, deep + 1):
            return True
        key = _key(node)
        told = (
            c
            for c in self.scopes[scope].of(ast.Call)
            if isinstance(c.func, ast.Attribute) and _key(c.func.value) == key
        )
        return bool(key) and deep < _MAX_DEPTH and any(
            _at(c) < here.at and self.tokens(a, scope, here, given, False, deep + 8) for c in told for a in c.args
        )  # fmt: skip

    # ---- What a function does to them

    def summary(self, scope: ast.AST, given: frozenset = frozenset()) -> Summary:
        """Scores and steps of a function whose arguments `given` are validation tokens, calls followed."""
        key = (scope, given, self._around(scope))
        if key not in self._summaries:
            if key in self._under_way or len(self._under_way) > _MAX_DEPTH or self.questions > _MAX_QUESTIONS:
                return Summary(False, False, ())
            self._under_way.add(key)
            before = self._active.get(scope)
            self._active[scope] = given
            self._summaries[key] = self._summarise(scope, given)
            self._put_back(scope, before)
            self._under_way.discard(key)
        return self._summaries[key]

    def _summarise(self, scope: ast.AST, given: frozenset) -> Summary:
        items, trains, inside = [], False, self.scopes[scope]
        for node, around in inside.acts:
            here = Here(_at(node), around.loops, around.tests)
            off = self._off(here, scope)
            if isinstance(node, ast.Call):
                found, other = self._of_call(node, scope, here, given)
                if off:  # what may not have run proves nothing, and is still to be told
                    found = [(kind, step._replace(off=off)) for kind, step in found if kind == _STEP]
                items += [Item(here, kind, node, step) for kind, step in found]
                trains |= other
            if off:
                continue
            if isinstance(node, ast.Call):
                if names := self._is_reset(node):
                    items.append(Item(here, _RESET, node, names=names))
            elif isinstance(node, ast.Delete):
                items.append(Item(here, _RESET, node, names=frozenset(n for t in node.targets for n in names_of(t))))
            elif self._is_score(node, scope, here, given, around.quiet):
                items.append(Item(here, _SCORE, node))
            if isinstance(node, ast.Assign):
                made = frozenset(n.id for n in node.targets if isinstance(n, ast.Name))
                if made and isinstance(node.value, ast.Call):
                    items.append(Item(here, _RESET, node, names=made))
        items.sort(key=lambda item: item.here.at)
        top = trains or isinstance(scope, ast.Module) or inside.name in ("main", "run", "train")
        steps, adapted = [], []
        for item in items:
            if item.kind == _STEP and not self._undone(item, items, inside):
                judged = self._judged(item, items, top)
                (steps if judged else adapted).append(judged or item.step)
            elif item.kind == _ADAPTED:
                repeats = any(_repeats(loop) for loop in item.here.loops) and not self._fresh(item, items)
                (steps if repeats else adapted).append(item.step._replace(again=repeats))
        scores = any(i.kind == _SCORE for i in items)
        return Summary(scores, trains, tuple(dict.fromkeys(steps)), tuple(dict.fromkeys(adapted)) if scores else ())

    def _fresh(self, item: Item, items: list[Item]) -> bool:
        """Whether each round of a loop adapts a copy, or what was put back in the round."""
        arguments = [*item.node.args, *(k.value for k in item.node.keywords)] if isinstance(item.node, ast.Call) else []
        copied = any(isinstance(a, ast.Call) and re.search("copy|clone", last_name(a)) for a in arguments)
        roots = {_root(a) for a in arguments}
        loops = set(item.here.loops)
        return copied or any(i.kind == _RESET and set(i.here.loops) & loops and i.names & roots for i in items)

    def _of_call(
        self, node: ast.Call, scope: ast.AST, here: Here, given: frozenset
    ) -> tuple[list[tuple[str, Step | None]], bool]:
        """Scores and steps of one call, and whether it trains on other tokens."""
        name = last_name(node.func)
        if name == "backward" or (name == "grad" and node.args):
            owner = node.func.value if name == "backward" and isinstance(node.func, ast.Attribute) else None
            gone = [*([owner] if owner is not None else []), *node.args[:1]]
            path = _first(self.tokens(g, scope, here, given, loss=True) for g in gone)
            if path:
                named = self.scopes[scope].name or _word(gone[0])
                step = Step(node.lineno, named, node=node, path=path, trained=self._trained(scope))
                return [(_STEP, step)], False
            return [], name == "backward"
        called = self._called(node, scope, here)
        if called is None:
            handed = any(self.tokens(a, scope, here, given) for a in [*node.args, *(k.value for k in node.keywords)])
            return ([(_SCORE, None)] if handed and EVALUATES.search(name) and not _IS_MODEL.search(name) else []), False
        target = called.scope
        if called.makes:
            target = next((s for s in self.functions.get("__init__", ()) if s.outer is called.scope), None)
            if target is None:
                return [], False
        inner = self.summary(target.node, self._given(called._replace(scope=target), scope, here, given))
        roots = frozenset(_root(a) for a in [*called.arguments, *(k.value for k in called.keywords), called.owner] if a)
        steps = [(_STEP, s._replace(trained=roots - {""})) for s in inner.steps]
        return [
            *steps,
            *([(_SCORE, None)] if inner.scores else []),
            *((_ADAPTED, s) for s in inner.adapted),
        ], inner.trains

    # ---- Scores

    def _is_score(self, node: ast.AST, scope: ast.AST, here: Here, given: frozenset, quiet: bool) -> bool:
        """A loss on validation tokens goes into what becomes the figure."""
        targets, value = [], None
        if isinstance(node, ast.AugAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            pairs = [(t, v) for target, v in _bound(node) for t in getattr(target, "elts", [target])]
            kept = [
                (t, v)
                for t, v in pairs
                if isinstance(t, (ast.Subscript, ast.Attribute)) or quiet or _key(t) in _keys(v)
            ]
            targets, value = [t for t, _ in kept], ast.Tuple([v for _, v in kept], ast.Load())
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            func = node.value.func
            if isinstance(func, ast.Attribute) and func.attr in _ADDING:
                targets, value = [func.value], ast.Tuple([*node.value.args], ast.Load())
        elif isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:
            told = quiet and any(_SUM.search(_word(v)) for v in getattr(node.value, "elts", [node.value]))
            if isinstance(node, ast.Yield) and not told and not self.tokens(node.value, scope, here, given):
                told = self._used_for_figure(self.scopes[scope], set(), True, 1)
            return told and bool(self.tokens(node.value, scope, here, given, loss=True))
        keys = {key for t in targets for key in [_key(t)] if key}
        if value is None or not keys:
            return False
        if quiet and not any(_SUM.search(_word(t)) for t in targets):
            quiet = False
        return (quiet or self._is_figure(keys, scope)) and bool(self.tokens(value, scope, here, given, loss=True))

    def _is_figure(self, keys: set[str], scope: ast.AST, deep: int = 0) -> bool:
        """Whether what is added up becomes bits per byte: it meets bytes or log 2 on its way, here or where it is handed."""
        inside, reached = self.scopes[scope], set(keys)
        for _ in range(4):
            reached |= {
                name
                for name, bound in self.bindings(scope).items()
                if name not in reached and any(b.value is not None and reached & _keys(b.value) for b in bound)
            }
        if any(_FIGURE.search(name) for name in reached - keys):
            return True
        if any(map(_FIGURE.search, self.bindings(scope))) and any(_SUM.search(key) for key in keys):
            return True  # the bytes are counted beside it
        if any(key.startswith("self.") or key in _parameters(scope) for key in keys) and _FIGURE.search(
            ast.dump(scope)
        ):
            return True
        for node in inside.of(ast.Return, ast.BinOp, ast.Call, ast.Yield):
            words = _keys(node)
            if reached & words and (_is_bits(node) or any(_FIGURE.search(w) for w in words - keys)):
                return True
        if deep < 3 and isinstance(scope, FUNCTIONS):
            handed = {name for name in _parameters(scope) if name in keys}
            back = any(reached & _keys(n) for n in inside.of(ast.Return, ast.Yield))
            if (handed or back) and self._used_for_figure(inside, handed, back, deep + 1):
                return True
        outer = inside.outer
        shared = [k for n in inside.of(ast.Nonlocal, ast.Global) for k in n.names if k in keys]
        shared += [
            k for k in keys if k not in self.bindings(scope) or not any(b.whole for b in self.bindings(scope)[k])
        ]
        shares = shared and outer is not None and not isinstance(outer.node, ast.ClassDef)
        return bool(shares and self._is_figure(set(shared), outer.node, deep))

    def _used_for_figure(self, scope: Scope, handed: set[str], back: bool, deep: int) -> bool:
        """Whether a call's result, or the argument that it adds to, meets bytes or log 2 where it is called."""
        for call in self.switches.calls.get(scope.name, ())[:8]:
            place = self.places.get(id(call))
            if place is None or place.scope is scope:
                continue
            names_there = {
                name
                for name, bound in self.bindings(place.scope.node).items()
                if back and any(b.value is not None and any(n is call for n in ast.walk(b.value)) for b in bound)
            }
            parameters = [p for p in _parameters(scope.node) if p not in ("self", "cls")]
            names_there |= {_key(a) for p, a in zip(parameters, call.args) if p in handed}  # noqa: B905
            names_there |= {_key(k.value) for k in call.keywords if k.arg in handed}
            if any(map(_FIGURE.search, names_there)) or self._is_figure(names_there - {""}, place.scope.node, deep):
                return True
            around = (n for n in place.scope.of(ast.BinOp) if back and any(m is call for m in ast.walk(n)))
            if any(_is_bits(n) or any(map(_FIGURE.search, _keys(n))) for n in around):
                return True
        return False

    # ---- Steps that are undone

    def _trained(self, scope: ast.AST) -> frozenset[str]:
        """Names of what the optimizers stepped in a scope hold, `lora` of `AdamW(lora.parameters())`."""
        found: set[str] = set()
        for call in self.scopes[scope].of(ast.Call):
            if last_name(call.func) == "step" and isinstance(call.func, ast.Attribute):
                found |= self._held(_root(call.func.value), scope, 0)
        return frozenset(found)

    def _held(self, name: str, scope: ast.AST, deep: int) -> set[str]:
        values = [b.value for b in self.bindings(scope).get(name, ()) if b.value is not None]
        if not values or deep > 3:
            return {name} if deep else set()
        found: set[str] = set()
        for value in values:
            makes = isinstance(value, ast.Call) and last_name(value) not in (
                "parameters",
                "list",
                "tuple",
                "filter",
                "chain",
            )
            if makes and deep:
                found.add(name)
                continue
            loads = {n.id for n in ast.walk(value) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            own = {t.id for t in ast.walk(value) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
            for word in loads - own - {name, "torch", "optim"}:
                if word in self.bindings(scope):
                    found |= self._held(word, scope, deep + 1)
        return found

    def _is_reset(self, node: ast.Call) -> frozenset[str]:
        """Names of what a call puts back: `lora.reset()`, `model.load_state_dict(base)`, `restore(model, base)`."""
        name = last_name(node.func)
        roots = {_root(a) for a in node.args} - {""}
        if isinstance(node.func, ast.Attribute) and name in ("copy_", "zero_", "data_copy_"):
            loops = [loop for loop in self.here(node).loops if isinstance(loop, ast.For)]
            return frozenset(roots | {_root(node.func.value)} | {n for loop in loops for n in names(loop.iter)})
        if not _RESETS.search(name):
            return frozenset()
        if isinstance(node.func, ast.Attribute) and _root(node.func.value):
            roots.add(_root(node.func.value))
        return frozenset(roots)

    def _undone(self, item: Item, items: list[Item], scope: Scope) -> bool:
        """Whether what a step trained is thrown away, or put back to what it was, before anything is scored."""
        step, outermost = item.step, item.here.loops[0] if item.here.loops else None
        if (
            step.node is not None
            and self.places[id(step.node)].scope is scope
            and self._never_stepped(scope, item.here.at)
        ):
            return True
        end = (outermost.end_lineno + 1, 0) if outermost is not None else item.here.at
        for other in items:
            if other.here.at <= item.here.at:
                continue
            if other.kind == _SCORE and (other.here.at > end or set(other.here.loops) & set(item.here.loops)):
                return False
            if (
                other.kind == _RESET
                and (other.names & step.trained or not step.trained)
                and self._puts_back(other, item, scope)
            ):
                return True
        if not isinstance(scope.node, FUNCTIONS) or item.kind != _STEP or step.node is None or not step.trained:
            return False
        if self.places[id(step.node)].scope is not scope or not all(self._made_here(n, scope) for n in step.trained):
            return False
        return not any(n.id in step.trained and _at(n) > end for n in scope.of(ast.Name))  # gone with the function

    def _never_stepped(self, scope: Scope, at: tuple[int, int]) -> bool:
        """A backward pass whose gradients are set to nothing behind it, in a function where no optimizer steps."""
        nothing = [n for n in scope.of(ast.Assign) if isinstance(n.value, ast.Constant) and n.value.value is None]
        zeroed = any(last_name(t) == "grad" and _at(n) > at for n in nothing for t in n.targets)
        calls = {last_name(c.func) for c in scope.of(ast.Call)}
        zeroed |= any(last_name(c.func) == "zero_grad" and _at(c) > at for c in scope.of(ast.Call))
        moves = {"add_", "sub_", "copy_", "addcdiv_", "lerp_", "mul_"} & calls
        return zeroed and not moves and not any("step" in c for c in calls)

    def _puts_back(self, reset: Item, item: Item, scope: Scope) -> bool:
        """Whether a reset's source is older than the step, so that nothing of it remains."""
        node = reset.node
        if not isinstance(node, ast.Call) or not re.search(
            "load_state_dict|restore|revert|rollback|copy_", last_name(node)
        ):
            return True
        first = item.here.loops[0] if item.here.loops else None
        begin = _at(first) if first is not None else item.here.at
        loops = [loop for loop in reset.here.loops if isinstance(loop, ast.For)]
        sources = {n for a in [*node.args, *(loop.iter for loop in loops)] for n in names_of(a)} - item.step.trained
        bound = {n: self.bindings(scope.node).get(n, []) for n in sources}
        known = [b for n, where in bound.items() for b in where if b.value is not None and b.here.at < reset.here.at
                 and not any(b.here.at == _at(loop) for loop in loops)]  # fmt: skip
        return bool(known) and all(b.here.at < begin for b in known)

    def _made_here(self, name: str, scope: Scope) -> bool:
        """Whether an object is made in the function: of a call that is no view of a model that came from outside."""
        values = [b.value for b in self.bindings(scope.node).get(name, ())]
        return bool(values) and all(isinstance(v, ast.Call) and last_name(v) not in _VIEWS for v in values)

    def _judged(self, item: Item, items: list[Item], top: bool) -> Step | None:
        """The step of `item` if no score before it excuses it."""
        loops, at = set(item.here.loops), item.here.at
        if any(h.carried for h in item.step.path) and item.here.loops:
            at = (item.here.loops[-1].end_lineno + 1, 0)  # it learns what the round before has scored
        scores = [i for i in items if i.kind == _SCORE]
        if any(_repeats(loop) for i in scores for loop in set(i.here.loops) & loops):
            return item.step._replace(again=True)
        before = [i for i in scores if i.here.at < at]
        if item.step.again or not any(set(i.here.loops) & loops if top else True for i in before):
            return item.step
        if loops and not any(set(i.here.loops) & loops for i in before):
            end = (item.here.loops[0].end_lineno + 1, 0)
            later = [i for i in scores if i.here.at >= end and i.here.loops]
            if any(not self._bounded(item.here, i.here, item.node, i.node) for i in later):
                return item.step._replace(again=True)
        return None

    def _bounded(self, learn: Here, use: Here, learnt: ast.AST, used: ast.AST) -> bool:
        """Whether one ends where the other begins: `range(0, first)` and `range(first, n)`, `text[:cut]`, `text[cut:]`."""
        above, below = self._limits(learn, learnt, True), self._limits(use, used, False)
        return bool(above & below)

    def _limits(self, here: Here, node: ast.AST, upper: bool) -> set[str]:
        """Expressions that bound what a node is about from above or below: ends of its loops' ranges and slices."""
        place = self.places.get(id(node))
        parts = [getattr(loop, "iter", None) or getattr(loop, "test", None) for loop in here.loops] + [node]
        if place is not None:
            bound = self.bindings(place.scope.node)
            asked = {n for p in parts if p is not None for n in names_of(p)}
            last = ([b for b in bound.get(n, ()) if b.here.at <= here.at][-1:] for n in asked)
            parts += [b.value for found in last for b in found if b.value is not None]
        found: set[str] = set()
        for inner in (n for part in parts if part is not None for n in ast.walk(part)):
            if isinstance(inner, ast.Slice) and (edge := inner.upper if upper else inner.lower) is not None:
                found.add(ast.dump(edge))
            elif isinstance(inner, ast.Call) and last_name(inner.func) in ("range", "arange") and inner.args:
                edges = inner.args[:2] if len(inner.args) > 1 else [None, inner.args[0]]
                if edges[upper] is not None:
                    found.add(ast.dump(edges[upper]))
            elif isinstance(inner, ast.Compare) and len(inner.ops) == 1:
                smaller = isinstance(inner.ops[0], (ast.Lt, ast.LtE))
                found.add(ast.dump(inner.comparators[0] if smaller == upper else inner.left))
            elif isinstance(inner, ast.Call) and len(inner.args) > 2:  # `table.update(text, 0, first)`
                found.add(ast.dump(inner.args[-1 if upper else -2]))
        return {f for f in found if not f.startswith("Constant")}

    # ---- Answers

    def steps(self) -> list[Step]:
        """Every step on validation tokens that nothing excuses, in the module and in functions that nothing calls."""
        used = {last_name(n.func) for n in every(self.tree, ast.Call)}
        used |= {n.id for n in every(self.tree, ast.Name) if isinstance(n.ctx, ast.Load)}
        entries = [s for s in self.scopes.values() if isinstance(s.node, FUNCTIONS) and s.name not in used]
        entries = [s for s in entries if not s.name.startswith("__") and s.name != "forward"]
        found: dict[tuple, Step] = {}
        for entry in (self.scopes[self.tree], *entries):
            for step in self.summary(entry.node).steps:
                if (known := found.get((step.line, step.name))) is None or (known.off and not step.off):
                    found[step.line, step.name] = step
        return list(found.values())

    def _handed(self, call: ast.Call, scope: Scope, more: tuple = (), loss: bool = False) -> Path:
        """The way of validation tokens to a call's arguments, or with `loss` of anything computed from them."""
        here = self.here(call)
        arguments = [*call.args, *(k.value for k in call.keywords), *more]
        bare = (a for a in arguments if self._class_of(a, scope.node, here) is None)  # an object is more than its text
        return _first(self.tokens(a, scope.node, here, self.usual(scope), loss) for a in bare)

    def usual(self, scope: Scope) -> frozenset:
        """Parameters of a function that get validation tokens at any of its calls."""
        if not isinstance(scope.node, FUNCTIONS) or scope.outer is None:
            return frozenset()
        owner = scope.outer if isinstance(scope.outer.node, ast.ClassDef) else None
        if scope.node not in self._given_of:
            self._usually_given(scope, owner or scope)
        return self._given_of[scope.node]

    def calibrations(self) -> Iterator[tuple[ast.AST, str, Path]]:
        """(node, name, path) of calls and loops that calibrate and get validation tokens that they do not score."""
        for scope in self.scopes.values():
            own = isinstance(scope.node, FUNCTIONS) and _calibrates(scope.name) and not self.summary(scope.node).scores
            for call in scope.of(ast.Call):
                if own and (path := self._handed(call, scope)) and len(path) == 1:  # it opens them itself
                    yield call, scope.name, path
                if _calibrates(last_name(call.func)) and (path := self._handed(call, scope)):
                    called = self._called(call, scope.node, self.here(call))
                    if called is None or called.makes or not self._only_scores(called, call, scope):
                        yield call, last_name(call.func), path
            for loop in scope.of(ast.For):
                if any(map(_calibrates, names(loop.iter) | names(loop.target))):
                    inner = [n for n in ast.walk(loop) if isinstance(n, ast.Subscript)]
                    uses = [loop.iter, *(n for n in inner if n.lineno <= loop.end_lineno)]
                    for n in uses:
                        if path := self.tokens(n, scope.node, self.here(n), self.usual(scope)):
                            yield n, _word(n), path
                            break

    def _only_scores(self, called: Called, call: ast.Call, scope: Scope) -> bool:
        """Whether a function that is given validation tokens hands them on to evaluations alone."""
        given = self._given(called, scope.node, self.here(call), self.usual(scope))
        inner = called.scope
        if self.summary(inner.node, given).scores:
            thrown = [n.value for n in inner.of(ast.Expr) if isinstance(n.value, ast.Call)]
            return not any(
                _IS_MODEL.search(last_name(c.func))
                and _first(self.tokens(a, inner.node, self.here(c), given) for a in c.args)
                for c in thrown
            )
        return False

    def late_calibrations(self) -> Iterator[tuple[ast.AST, str, Path]]:
        """(node, name, path) of calls that calibrate on training text once the loop that trains is over."""
        for scope in self.scopes.values():
            ends = [loop.end_lineno for loop in scope.of(ast.For, ast.While) if self._trains(loop)]
            for call in scope.of(ast.Call) if ends else ():
                words = [w for a in [*call.args, *(k.value for k in call.keywords)] for w in names_of(a)]
                word = next((w for w in words if _TRAINING.search(w)), "")
                if word and call.lineno > max(ends) and _calibrates(last_name(call.func)):
                    yield call, last_name(call.func), (Hop(word, call.lineno),)

    def _trains(self, loop: ast.AST) -> bool:
        found = {last_name(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)}
        return "backward" in found or any(
            last_name(c.func) == "backward"
            for name in found
            for s in self.functions.get(name, ())
            for c in s.of(ast.Call)
        )

    def stored(self) -> Iterator[tuple[ast.AST, str, Path]]:
        """(node, name, path) of what compresses validation tokens, or puts them into what is saved."""
        for scope in self.scopes.values():
            sized = {id(a) for c in scope.of(ast.Call) if last_name(c.func) in ("len", "print") for a in c.args}
            saved = {_root(a) for c in scope.of(ast.Call) if _STORES.fullmatch(last_name(c.func)) for a in c.args}
            saved |= {w for n in scope.of(ast.Return) for w in names_of(n.value)} if scope.of(ast.Return) else set()
            for call in scope.of(ast.Call):
                if re.fullmatch(r"\w*compress", last_name(call.func)) and id(call) not in sized:
                    path = self._handed(call, scope)
                    kept = self._named(call, scope)
                    if path and not (kept and self._only_sized(kept, scope)):
                        yield call, last_name(call.func), path
                elif last_name(call.func) == "register_buffer" and (path := self._handed(call, scope)):
                    spared = (k for k in call.keywords if k.arg == "persistent")
                    if not any(getattr(k.value, "value", True) is False for k in spared):
                        yield call, last_name(call.func), path
            for node in scope.of(ast.Assign):
                kept = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
                if any(_KEPT.search(_word(t)) and _root(t) in saved for t in kept) and (
                    path := self.tokens(node.value, scope.node, self.here(node), self.usual(scope))
                ):
                    yield node, _word(kept[0]), path

    def _named(self, call: ast.Call, scope: Scope) -> str:
        return next((_key(n.targets[0]) for n in scope.of(ast.Assign) if n.value is call), "")

    def _only_sized(self, name: str, scope: Scope) -> bool:
        """Whether nothing but the length of what a name holds is asked."""
        sized = {id(a) for c in scope.of(ast.Call) if last_name(c.func) == "len" for a in c.args}
        loads = [n for n in scope.of(ast.Name) if n.id == name and isinstance(n.ctx, ast.Load)]
        return bool(loads) and all(id(n) in sized for n in loads)

    # ---- Tables that learn

    def learned_first(self) -> Iterator[tuple[ast.AST, str, Path]]:
        """(node, table, path) of updates by validation tokens whose table is asked about the same tokens only afterwards.

        An update is in order once the table was asked before it in a loop around both, if no loop of its own is over by
        the time it is asked again (a second pass) and none around both is one over epochs; or if it learns what lies
        before the part that is asked about, which another rank has scored.
        """
        for scope in self.scopes.values():
            yield from self._built_whole(scope)
            if not any(_TABLE.search(_root(n.target)) for n in scope.of(ast.AugAssign)) and not any(
                map(teaches, scope.of(ast.Call))
            ):
                continue
            uses = sorted(self._table_uses(scope), key=lambda use: use.here.at)
            for learn in (u for u in uses if u.learns):
                asked = [u for u in uses if u.table == learn.table and not u.learns]
                made = [b.here.at for b in self.bindings(scope.node).get(learn.table, ()) if b.whole]
                by_text = [u for u in asked if u.path and not any(hop.name == u.table for hop in u.path)]
                if any(self._comes_late(learn, use, asked, made) for use in by_text):
                    yield learn.node, learn.table, learn.path

    def only_trains(self, scope: Scope) -> bool:
        """Whether everything that a function gives goes backward, at each of its calls: a loss of the training."""
        sites = [self.places[id(c)].scope for c in self.switches.calls.get(scope.name, ()) if id(c) in self.places]
        if not sites or not isinstance(scope.node, FUNCTIONS):
            return False
        for place in sites:
            given = {
                name
                for name, bound in self.bindings(place.node).items()
                for b in bound
                if b.value is not None
                and any(isinstance(n, ast.Call) and last_name(n.func) == scope.name for n in ast.walk(b.value))
            }
            gone = {w for c in place.of(ast.Call) if last_name(c.func) == "backward" for w in _keys(c.func)}
            if not given & gone or any(given & _keys(n.value) for n in place.of(ast.AugAssign)):
                return False
        return True

    def _built_whole(self, scope: Scope) -> Iterator[tuple[ast.AST, str, Path]]:
        """Tables that a function fills from validation tokens and never asks meanwhile, and that an evaluation is given."""
        for node in scope.of(ast.Assign):
            name = _key(node.targets[0]) if isinstance(node.value, ast.Call) else ""
            if not name or not _TABLE.search(name) or not (path := self._handed(node.value, scope)):
                continue
            called = self._called(node.value, scope.node, self.here(node))
            if called is None or called.makes or not self._fills(called.scope):
                continue
            for call in scope.of(ast.Call):
                given = [*call.args, *(k.value for k in call.keywords)]
                if (
                    call.lineno <= node.lineno
                    or not any(_key(a) == name for a in given)
                    or last_name(call.func) in _NO_LOSS
                ):
                    continue
                asks = self._called(call, scope.node, self.here(call))
                text = self._handed(call, scope)
                if text and (
                    asks is None
                    and EVALUATES.search(last_name(call.func))
                    or asks is not None
                    and self._scores(asks, call, scope)
                ):
                    yield node, name, path
                    break

    def _scores(self, called: Called, call: ast.Call, scope: Scope) -> bool:
        given = self._given(called, scope.node, self.here(call), self.usual(scope))
        return not called.makes and self.summary(called.scope.node, given).scores

    def _fills(self, scope: Scope) -> bool:
        """Whether a function hands back a container that it only writes to."""
        handed = {w for n in scope.of(ast.Return) if n.value is not None for w in _keys(n.value)}
        written = {n for n in handed for b in self.bindings(scope.node).get(n, ()) if not b.whole}
        written |= {_key(c.func.value) for c in scope.of(ast.Call) if last_name(c.func) in ("setdefault", "update")
                    and isinstance(c.func, ast.Attribute)} & handed  # fmt: skip
        written |= {_key(a) for c in scope.of(ast.Call) if teaches(c) for a in c.args[:1]} & handed
        reads = {_root(n) for n in scope.of(ast.Subscript) if isinstance(n.ctx, ast.Load)}
        reads |= {
            _root(c.func.value)
            for c in scope.of(ast.Call)
            if last_name(c.func) == "get" and isinstance(c.func, ast.Attribute)
        }
        return bool(written - reads)

    def _comes_late(self, learn: TableUse, use: TableUse, asked: list[TableUse], made: list[tuple[int, int]]) -> bool:
        """Whether `use` asks the table, not `made` anew since, what `learn` has told it."""
        common = set(learn.here.loops) & set(use.here.loops)
        if any(_repeats(loop) and not any(_at(loop) < m < (loop.end_lineno + 1, 0) for m in made) for loop in common):
            return True
        if use.here.at < learn.here.at or any(learn.here.at < where < use.here.at for where in made):
            return False
        if any((test, not came) in learn.here.tests for test, came in use.here.tests):
            return False  # one or the other of a round
        if any(h.carried for h in learn.path) or self._bounded(learn.here, use.here, learn.node, use.node):
            return False
        before = any(u.here.at < learn.here.at and common <= set(u.here.loops) for u in asked)
        return not before or set(learn.here.loops) != common

    def _table_uses(self, scope: Scope) -> Iterator[TableUse]:
        """Calls and subscripts about a table: updates by validation tokens, and questions, by such tokens or not."""
        given = self.usual(scope)
        for node, around in scope.acts:
            here = Here(_at(node), around.loops, around.tests)
            if self._off(here, scope.node):
                continue
            if isinstance(node, ast.Call):
                if _RESETS.search(last_name(node.func)):
                    continue
                tells, path = teaches(node), self._handed_present(node, scope)
                parts = [getattr(node.func, "value", None), *node.args, *(k.value for k in node.keywords)]
                about = [n for n in map(_root, parts) if _TABLE.search(n) and not self._holds(n, scope, here, given)]
                found = [(name, tells, path) for name in about[:1] if path or not tells]
            else:
                part = node.target if isinstance(node, ast.AugAssign) else node
                if not isinstance(part, ast.Subscript) or not _TABLE.search(_root(part)):
                    continue
                path = self.tokens(part.slice, scope.node, here, given, loss=True)
                learns = part is not node
                kept = path if learns else not self._holds(_root(part), scope, here, given)
                found = [(_root(part), learns, path)] if kept else []
            for name, learns, way in found:
                yield TableUse(here, name, learns, way, node)

    def _holds(self, name: str, scope: Scope, here: Here, given: frozenset) -> bool:
        """Whether a name that sounds like a table's holds the tokens themselves, as `ctx_tokens` does."""
        bound = [b for b in self.bindings(scope.node).get(name, ()) if b.whole and b.here.at < here.at]
        if bound and bound[-1].value is not None:
            return bool(self.tokens(bound[-1].value, scope.node, bound[-1].here, given))
        return bool(VALIDATION.search(name)) or (bool(bound) and name in given and name not in _tables_of(scope))

    def _handed_present(self, call: ast.Call, scope: Scope) -> Path:
        """Validation tokens among a call's arguments; `tokens[:start]` in a loop over `start` is what came before."""
        past = [a for a in call.args if isinstance(a, ast.Subscript) and isinstance(a.slice, ast.Slice)]
        if any(isinstance(p.slice.upper, ast.Name) and self._counts(p.slice.upper.id, scope) for p in past):
            return ()
        return self._handed(call, scope, loss=True)

    def _counts(self, name: str, scope: Scope) -> bool:
        return any(name in _target_names(loop.target) for loop in scope.of(ast.For))


_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "np", "F", "nn", "dist", "scipy", "sentencepiece", "triton"}
_COMMON = {
    *("to", "get", "item", "view", "append", "copy", "keys", "items", "read", "write", "close", "size", "step"),
    *("backward", "forward", "eval", "train", "load", "add"),
}
_VIEWS = {"parameters", "named_parameters", "compile", "DDP", "DistributedDataParallel", "unwrap", "cast"}


def names_of(node: ast.AST | None) -> set[str]:
    """Plain names in an expression, and `self.x` of attributes of self; {} of none."""
    return set() if node is None else _keys(node) | names(node)


def _first(found: Iterator[Path]) -> Path:
    return next((path for path in found if path), ())


def _key(node: ast.AST) -> str:
    """`x` of `x[i, :k]`, `self.x` of `self.x[i]`; "" of what has no name of its own."""
    while isinstance(node, (ast.Subscript, ast.Starred)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else dotted(node) if isinstance(node, ast.Attribute) else ""


@functools.lru_cache(maxsize=2**17)  # asked again and again while names are followed
def _keys(node: ast.AST) -> frozenset[str]:
    """Names and dotted attributes that an expression asks."""
    found = (n for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute)))
    return frozenset(_key(n) for n in found) - {""}


def _tables_of(scope: Scope) -> set[str]:
    return {_root(n.target) for n in scope.of(ast.AugAssign)} | {
        _root(getattr(c.func, "value", None)) for c in scope.of(ast.Call) if teaches(c)
    }


def _is_bits(node: ast.AST) -> bool:
    """Whether an expression turns nats into bits: by log(2), log2 or 0.6931..."""
    for n in ast.walk(node):
        if (
            isinstance(n, ast.Call)
            and last_name(n.func) == "log"
            and n.args
            and getattr(n.args[0], "value", None) in (2, 2.0)
        ):
            return True
        if isinstance(n, ast.Constant) and isinstance(n.value, float) and round(n.value, 3) in (0.693, 1.443):
            return True
    return False


def _calibrates(name: str) -> bool:
    return bool(_CALIBRATES.search(name)) and not EVALUATES.search(name)


def _repeats(loop: ast.AST) -> bool:
    """Whether a loop is one over epochs, or over a small number, that picks nothing in it."""
    head = [loop.test] if isinstance(loop, ast.While) else [loop.target, loop.iter]
    named = any(_EPOCHS.search(word) for part in head for word in names(part))
    times = loop.iter.args if isinstance(loop, ast.For) and last_name(loop.iter) == "range" else []
    listed = getattr(getattr(loop, "iter", None), "elts", ())
    if not (
        named
        or (len(times) == 1 and isinstance(times[0], ast.Constant))
        or any(isinstance(e, ast.Constant) for e in listed)
    ):
        return False
    if isinstance(loop, ast.While):
        return named
    reached = _target_names(loop.target)
    for _ in range(3):  # what follows from the loop's variable
        reached |= {
            n for part in loop.body for node in ast.walk(part) if isinstance(node, ast.Assign)
            and not _seeds(node.value) and names(node.value) & reached for t in node.targets for n in _target_names(t)
        }  # fmt: skip
    slices = [n.slice for part in loop.body for n in ast.walk(part) if isinstance(n, ast.Subscript)]
    ranges = [n.iter for part in loop.body for n in ast.walk(part) if isinstance(n, ast.For)]
    handed = [a for part in loop.body for n in ast.walk(part) if isinstance(n, ast.Call) and not _prints(n)
              and not _seeds(n) for a in n.args if isinstance(a, (ast.Name, ast.BinOp, ast.Tuple))] if not named else []  # fmt: skip
    return not any(names(part) & reached for part in (*slices, *ranges, *handed))


def _prints(call: ast.Call) -> bool:
    return bool(re.match(r"print|log|info|write|set_epoch", last_name(call.func)))


def _seeds(node: ast.AST) -> bool:
    """An order or a rate that a round chooses: the text stays the same."""
    return any(re.search("seed|perm|shuffle|lr|cos|manual", n, re.I) for n in names(node))


def _root(node: ast.AST | None) -> str:
    """`ctx_tables` of `ctx_tables[n][key]` and of `self.ctx_tables`; "" of anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return getattr(node, "id", getattr(node, "attr", ""))


def teaches(call: ast.Call) -> bool:
    return bool(_LEARNS.search(last_name(call))) or dotted(call.func).endswith("add.at")


def _at(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _all_arguments(scope: ast.AST) -> list[ast.arg]:
    if not isinstance(scope, _LAMBDAS):
        return []
    parts = scope.args
    return [a for a in (*parts.posonlyargs, *parts.args, *parts.kwonlyargs, parts.vararg, parts.kwarg) if a]


def _parameters(scope: ast.AST) -> list[str]:
    return [a.arg for a in _all_arguments(scope)]


def _bound(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(target, value) of a statement or comprehension that binds names."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            pairs = (
                isinstance(target, ast.Tuple)
                and isinstance(node.value, ast.Tuple)
                and len(target.elts) == len(node.value.elts)
            )
            yield from zip(target.elts, node.value.elts, strict=True) if pairs else [(target, node.value)]
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        yield from _of_loop(node.target, node.iter)
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        yield from ((i.optional_vars, i.context_expr) for i in node.items if i.optional_vars is not None)


def _of_loop(target: ast.AST, iterated: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """`for i, (x, y) in enumerate(zip(xs, ys))`: each name with what it runs over."""
    if isinstance(target, (ast.Tuple, ast.List)) and isinstance(iterated, ast.Call):
        name, arguments = last_name(iterated.func), iterated.args
        if name == "enumerate" and len(target.elts) == 2 and arguments:
            yield target.elts[0], ast.Constant(0)
            yield from _of_loop(target.elts[1], arguments[0])
            return
        if (
            name == "zip"
            and len(target.elts) == len(arguments)
            and not any(isinstance(a, ast.Starred) for a in arguments)
        ):
            for one, its in zip(target.elts, arguments, strict=True):
                yield from _of_loop(one, its)
            return
    yield target, iterated


def _target_names(target: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _word(node: ast.AST | None) -> str:
    """The name an expression is about: its last attribute or name, calls and subscripts removed."""
    while isinstance(node, (ast.Subscript, ast.Call, ast.BinOp)):
        node = (
            node.value
            if isinstance(node, ast.Subscript)
            else node.left
            if isinstance(node, ast.BinOp)
            else (node.args or [node.func])[0]
        )
    return getattr(node, "attr", getattr(node, "id", ""))
