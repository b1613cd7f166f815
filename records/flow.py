"""Follows validation tokens through a script, call by call: is a loss on them stepped before they are scored?

A value is a validation token by its name or its file (`VALIDATION`), by the argument it arrives as, and by being cut,
loaded or computed from one. A *score* adds a loss on such tokens to a sum, a *step* sends one backward. In a function that
evaluates, a step is in order once something was scored before it. In one that trains (losses on other tokens go backward
too) and at the top only a score in the same loop counts: scores taken while training prove nothing. A loop over epochs
around both scores again what was learned.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from syntax import FUNCTIONS, Scope, children, every, last_name, scopes

_ENDING = r"(?:_(?:all|full|cpu|gpu|cuda|np|flat|local|dev|device|t|x|y|\d+))*$"
VALIDATION = re.compile(
    r"(?:^|_)(?:val|valid|validation)_(?:tokens?|toks?|data|docs?|seqs?|stream|ids|text|inputs?|targets?"
    rf"|loader|files?|path|shards?|pattern|chunks?|x|y|set|split|ds|dataset){_ENDING}|fineweb_val",
    re.I,
)
_NEVER = re.compile(
    r"(?:^|_)(?:model|net|module|optimizers?|opt|params?|args|hparams|h|cfg|config|self|device|scaler|loras?|state|ema|rank)$"
)
_FACTS = {"shape", "device", "dtype", "size", "numel", "ndim", "dim", "nbytes", "is_cuda"}
_NO_TOKENS = {"len", "range", "int", "float", "bool", "str", "print", "min", "max", "round", "isinstance", "type"}
_HANDS_ON = re.compile(
    r"load|read|glob|open|memmap|fromfile|from_numpy|frombuffer|cat|stack|tensor|array|numpy|batch|chunk|split"
    r"|shard|token|stream|zip|enumerate|iter|list|tuple|sorted|reversed|seq|doc|window|tqdm|path|pad|long|next|slice|build|get",
    re.I,
)
EVALUATES = re.compile(r"eval|valid|score|audit|bpb|test", re.I)
_SUM = re.compile(r"loss|nll|nats|bits|bpb|score|logp|log_?prob|(?:^|_)(?:ce|lp|ptl|total|sum)(?:_|$)", re.I)
_EPOCHS = re.compile(r"(?:^|_)(?:epochs?|ep|n_?pass(?:es)?|passes|rounds?)(?:_|$)", re.I)
_CALIBRATES = re.compile(r"calib|hessian|gptq|collect_(?:act|stat)", re.I)
_IS_MODEL = re.compile(r"model|net$|forward|logits|compiled", re.I)  # a name of what is trained, not of a scorer
_ADDING = {"append", "add_", "copy_", "extend", "index_add_", "scatter_add_"}
_STORES = re.compile(r"\w*compress|save\w*|dumps?|tofile")
_BINDING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension, ast.With)
_MAX_DEPTH = 12


class Step(NamedTuple):
    """A backward pass on validation tokens that nothing scored before."""

    line: int
    name: str  # the function that does it
    again: bool = False  # scored before, but scored again after it
    guards: frozenset[str] = frozenset()  # names that an `if` around it or around its calls asks


class Item(NamedTuple):
    """A score or a step inside a function, in its loops."""

    at: tuple[int, int]
    loops: tuple[ast.AST, ...]
    step: Step | None  # None: a score


class Summary(NamedTuple):
    scores: bool
    trains: bool  # sends a loss on other tokens backward
    steps: tuple[Step, ...]


class Flow:
    """What the functions of one script do to validation tokens."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.scopes = {scope.node: scope for scope in scopes(tree)}
        self.functions = {scope.name: scope.node for scope in self.scopes.values() if isinstance(scope.node, FUNCTIONS)}
        self._bindings: dict[ast.AST, dict[str, list]] = {}
        self._summaries: dict[tuple, Summary] = {}
        self._under_way: set[tuple] = set()
        self._known: dict[tuple, bool] = {}

    # ---- What is a validation token

    def bindings(self, scope: ast.AST) -> dict[str, list[tuple[tuple[int, int], ast.AST | None]]]:
        """name -> [(where, expression)] of a scope in the order of the text; a parameter has no expression."""
        if scope not in self._bindings:
            found: dict[str, list] = {}
            for name in _parameters(scope):
                found.setdefault(name, []).append(((0, 0), None))
            for node in self.scopes[scope].of(*_BINDING):
                for target, value in _bound(node):
                    for name in _target_names(target):
                        found.setdefault(name, []).append((_at(node), value))
            self._bindings[scope] = {name: sorted(where, key=lambda b: b[0]) for name, where in found.items()}
        return self._bindings[scope]

    def tokens(
        self, node: ast.AST | None, scope: ast.AST, at: tuple, given: frozenset, loss: bool = False, deep: int = 0
    ) -> bool:
        """Whether an expression holds validation tokens, or with `loss` anything computed from them."""
        if node is None or deep > _MAX_DEPTH * 3:
            return False

        def ask(child: ast.AST | None, as_loss: bool = loss) -> bool:
            return self.tokens(child, scope, at, given, as_loss, deep + 1)

        if isinstance(node, ast.Name):
            return self._name(node.id, scope, at, given, loss, deep)
        if isinstance(node, ast.Attribute):
            return bool(VALIDATION.search(node.attr)) or (node.attr not in _FACTS and ask(node.value))
        if isinstance(node, ast.Constant):
            return isinstance(node.value, str) and "fineweb_val" in node.value and " " not in node.value
        if isinstance(node, ast.Subscript):
            return ask(node.value)
        if isinstance(node, ast.Call):
            return self._call(node, ask, loss)
        if isinstance(node, ast.comprehension):
            return ask(node.iter)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            return any(map(ask, node.generators))
        if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.Compare)):
            return False
        return any(ask(child) for child in children(node) if isinstance(child, ast.expr))

    def _name(self, name: str, scope: ast.AST, at: tuple, given: frozenset, loss: bool, deep: int) -> bool:
        if VALIDATION.search(name) or _NEVER.search(name):
            return bool(VALIDATION.search(name))
        bound = [b for b in self.bindings(scope).get(name, ()) if b[0] < at]
        if bound:
            where, value = bound[-1]
            if value is None:
                return name in given
            key = (scope, name, where, given, loss)
            if key not in self._known:
                self._known[key] = False  # while it is asked: a value computed from itself
                self._known[key] = self.tokens(value, scope, where, given, loss, deep + 1)
            return self._known[key]
        outer = self.scopes[scope].outer
        return outer is not None and self._name(name, outer.node, (1 << 60, 0), frozenset(), loss, deep + 1)

    def _call(self, node: ast.Call, ask, loss: bool) -> bool:
        name = last_name(node.func)
        arguments = [*node.args, *(k.value for k in node.keywords)]
        if name in _NO_TOKENS or name in _FACTS:
            return False
        if loss:
            return any(map(ask, arguments)) or (isinstance(node.func, ast.Attribute) and ask(node.func.value))
        if EVALUATES.search(name):
            return False
        if isinstance(node.func, ast.Attribute) and ask(node.func.value):
            return True
        return bool(_HANDS_ON.search(name)) and any(map(ask, arguments))

    # ---- What a function does to them

    def summary(self, scope: ast.AST, given: frozenset = frozenset()) -> Summary:
        """Scores and steps of a function whose arguments `given` are validation tokens, calls followed."""
        key = (scope, given)
        if key not in self._summaries:
            if key in self._under_way or len(self._under_way) > _MAX_DEPTH:
                return Summary(False, False, ())
            self._under_way.add(key)
            self._summaries[key] = self._summarise(scope, given)
            self._under_way.discard(key)
        return self._summaries[key]

    def _summarise(self, scope: ast.AST, given: frozenset) -> Summary:
        items, trains = [], False
        for node, around in self.scopes[scope].acts:
            if isinstance(node, ast.Call):
                found, other = self._of_call(node, scope, given)
                guards = frozenset(word for test in around.tests for word in _words(test)) if found else frozenset()
                found = [step and step._replace(guards=step.guards | guards) for step in found]
                items += [Item(_at(node), around.loops, step) for step in found]
                trains |= other
            elif self._is_score(node, scope, given, around.quiet):
                items.append(Item(_at(node), around.loops, None))
        items.sort(key=lambda item: item.at)
        top = trains or isinstance(scope, ast.Module) or scope.name in ("main", "run", "train")
        steps = [s for s in (_judged(item, items, top) for item in items if item.step) if s]
        return Summary(any(i.step is None for i in items), trains, tuple(dict.fromkeys(steps)))

    def _of_call(self, node: ast.Call, scope: ast.AST, given: frozenset) -> tuple[list[Step | None], bool]:
        """Scores (None) and steps of one call, and whether it trains on other tokens."""
        name, at = last_name(node.func), _at(node)
        if name == "backward" or (name == "grad" and node.args):
            gone = (
                node.func.value
                if name == "backward" and isinstance(node.func, ast.Attribute)
                else (node.args or [None])[0]
            )
            if self.tokens(gone, scope, at, given, loss=True):
                return [Step(node.lineno, getattr(scope, "name", _word(gone)))], False
            return [], name == "backward"
        called, arguments, keywords = self._called(node)
        if called is None:
            handed = any(self.tokens(a, scope, at, given) for a in [*node.args, *(k.value for k in node.keywords)])
            return ([None] if handed and EVALUATES.search(name) and not _IS_MODEL.search(name) else []), False
        inner = self.summary(called, self._given(called, arguments, keywords, scope, at, given))
        return [*inner.steps, *([None] if inner.scores else [])], inner.trains

    def _called(self, node: ast.Call) -> tuple[ast.AST | None, list, list]:
        """The function of this script that a call runs, itself or as an argument, and the arguments it gets."""
        name = last_name(node.func)
        if name in self.functions:
            return self.functions[name], node.args, node.keywords
        for place, argument in enumerate(node.args):
            if isinstance(argument, ast.Name) and argument.id in self.functions:
                return self.functions[argument.id], node.args[place + 1 :], node.keywords
        return None, [], []

    def _given(
        self, called: ast.AST, arguments: list, keywords: list, scope: ast.AST, at: tuple, given: frozenset
    ) -> frozenset:
        parameters = _parameters(called)
        parameters = parameters[1:] if parameters[:1] in (["self"], ["cls"]) else parameters
        pairs = [*zip(parameters, arguments), *((k.arg, k.value) for k in keywords if k.arg)]  # noqa: B905
        return frozenset(name for name, value in pairs if self.tokens(value, scope, at, given, loss=True))

    def _is_score(self, node: ast.AST, scope: ast.AST, given: frozenset, quiet: bool) -> bool:
        """A loss on validation tokens goes into a sum; where gradients flow, only if bytes are counted beside it."""
        targets, value = [], None
        if isinstance(node, ast.AugAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            subscripts = [t for t in node.targets if isinstance(t, ast.Subscript)]
            targets, value = subscripts or (node.targets if quiet else []), node.value
        elif (
            isinstance(node, ast.Expr)
            and last_name(node.value) in _ADDING
            and isinstance(node.value.func, ast.Attribute)
        ):
            targets, value = [node.value.func.value], ast.Tuple([*node.value.args], ast.Load())
        if value is None or not any(_SUM.search(_word(t)) for t in targets):
            return False
        counted = quiet or any("byte" in name.lower() for name in self.bindings(scope))
        return counted and self.tokens(value, scope, _at(node), given, loss=True)

    # ---- Answers

    def steps(self) -> list[Step]:
        """Every step on validation tokens that nothing excuses, in the module and in functions that nothing calls."""
        used = {last_name(n.func) for n in every(self.tree, ast.Call)}
        used |= {n.id for n in every(self.tree, ast.Name) if isinstance(n.ctx, ast.Load)}
        entries = [self.tree, *(f for name, f in self.functions.items() if name not in used)]
        return list(dict.fromkeys(step for entry in entries for step in self.summary(entry).steps))

    def _handed(self, call: ast.Call, scope: Scope, more: tuple = ()) -> bool:
        """Whether a call gets validation tokens."""
        arguments = [*call.args, *(k.value for k in call.keywords), *more]
        return any(self.tokens(a, scope.node, _at(call), frozenset()) for a in arguments)

    def calibrations(self) -> Iterator[tuple[int, str]]:
        """(line, name) of calls and loops that calibrate and get validation tokens."""
        for scope in self.scopes.values():
            for call in scope.of(ast.Call):
                if _calibrates(last_name(call.func)) and self._handed(call, scope):
                    yield call.lineno, last_name(call.func)
            for loop in scope.of(ast.For):
                if any(map(_calibrates, _words(loop.iter) | _words(loop.target))):
                    uses = [n for n in ast.walk(loop) if isinstance(n, ast.Subscript)]
                    found = (n for n in uses if self.tokens(n, scope.node, _at(n), frozenset()))
                    yield from ((n.lineno, _word(n)) for n in found)

    def stored(self) -> Iterator[tuple[int, str]]:
        """(line, name) of calls that compress or save validation tokens."""
        for scope in self.scopes.values():
            for call in scope.of(ast.Call):
                name = last_name(call.func)
                if _STORES.fullmatch(name) and self._handed(
                    call, scope, (call.func.value,) if name == "tofile" else ()
                ):
                    yield call.lineno, name


def _calibrates(name: str) -> bool:
    return bool(_CALIBRATES.search(name)) and not EVALUATES.search(name)


def _judged(item: Item, items: list[Item], top: bool) -> Step | None:
    """The step of `item` if no score before it excuses it."""
    before = [i for i in items if i.step is None and i.at < item.at]
    if any(_repeats(loop) for i in items if i.step is None for loop in set(i.loops) & set(item.loops)):
        return item.step._replace(again=True)
    if item.step.again or not any(set(i.loops) & set(item.loops) if top else True for i in before):
        return item.step
    return None


def _repeats(loop: ast.AST) -> bool:
    """Whether a loop is one over epochs."""
    head = [loop.test] if isinstance(loop, ast.While) else [loop.target, loop.iter]
    return any(_EPOCHS.search(word) for part in head for word in _words(part))


def _at(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _parameters(scope: ast.AST) -> list[str]:
    if not isinstance(scope, FUNCTIONS):
        return []
    parts = scope.args
    return [a.arg for a in (*parts.posonlyargs, *parts.args, *parts.kwonlyargs, parts.vararg, parts.kwarg) if a]


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
        yield node.target, node.iter
    elif isinstance(node, ast.With):
        yield from ((i.optional_vars, i.context_expr) for i in node.items if i.optional_vars is not None)


def _target_names(target: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _words(node: ast.AST) -> set[str]:
    return {
        getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    }


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
