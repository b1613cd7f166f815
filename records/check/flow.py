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

from check.syntax import FUNCTIONS, Scope, children, dotted, every, last_name, names, scopes

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
_CALIBRATES = re.compile(r"calib|(?:^|_)cal(?:_|$)|hessian|gptq|quantize(?!d)|collect_(?:act|stat)", re.I)
_TABLE = re.compile(  # of n-grams; a network's keys and values are none
    r"^(?!.*(?:kv|past|rope|rotary|cos|sin|mask|attn)).*(?:gram|cache|table|mixer|(?:^|_)(?:ctx|full|counts?|ppm|trie|hist)(?:_|\d|$))",
    re.I,
)
_LEARNS = re.compile(
    r"^_?(?:update|insert|observe|learn|record|add|ingest|fit|feed|train|build)(?:_|$)|index_add_|scatter_add_", re.I
)
_IS_MODEL = re.compile(r"model|net$|forward|logits|compiled", re.I)  # a name of what is trained, not of a scorer
_ADDING = {"append", "add_", "copy_", "extend", "index_add_", "scatter_add_"}
_STORES = re.compile(r"\w*compress|save\w*|dumps?|tofile|register_buffer")
_KEPT = re.compile(r"state|artifact|payload|blob|pack|(?:^|_)(?:sd|obj|meta|export)(?:_|$)", re.I)
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


class TableUse(NamedTuple):
    """An update of a table or a question to it, in its loops; `tokens`: by what validation tokens give."""

    at: tuple[int, int]
    table: str
    learns: bool
    tokens: bool
    loops: tuple[ast.AST, ...]


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
            return any(map(ask, (node.elt, *node.generators)))
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
                guards = frozenset(word for test in around.tests for word in names(test)) if found else frozenset()
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

    def _handed(self, call: ast.Call, scope: Scope, more: tuple = (), loss: bool = False) -> bool:
        """Whether a call gets validation tokens, or with `loss` anything computed from them."""
        arguments = [*call.args, *(k.value for k in call.keywords), *more]
        return any(self.tokens(a, scope.node, _at(call), frozenset(), loss) for a in arguments)

    def calibrations(self) -> Iterator[tuple[int, str]]:
        """(line, name) of calls and loops that calibrate and get validation tokens."""
        for scope in self.scopes.values():
            for call in scope.of(ast.Call):
                if _calibrates(last_name(call.func)) and self._handed(call, scope):
                    yield call.lineno, last_name(call.func)
            for loop in scope.of(ast.For):
                if any(map(_calibrates, names(loop.iter) | names(loop.target))):
                    uses = [loop.iter, *(n for n in ast.walk(loop) if isinstance(n, ast.Subscript))]
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
            for node in scope.of(ast.Assign):
                kept = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
                if any(_KEPT.search(_word(t)) for t in kept) and self.tokens(
                    node.value, scope.node, _at(node), frozenset()
                ):
                    yield node.lineno, _word(kept[0])

    # ---- Tables that learn

    def learned_first(self) -> Iterator[tuple[int, str]]:
        """(line, table) of updates by validation tokens whose table is asked about the same tokens only afterwards.

        An update is in order once the table was asked before it in a loop around both, if no loop of its own is over by
        the time it is asked again (a second pass) and none around both is one over epochs.
        """
        for scope in self.scopes.values():
            if not any(_TABLE.search(_root(n.target)) for n in scope.of(ast.AugAssign)) and not any(
                map(_teaches, scope.of(ast.Call))
            ):
                continue
            uses = sorted(self._table_uses(scope), key=lambda use: use.at)
            for learn in (u for u in uses if u.learns):
                asked = [u for u in uses if u.table == learn.table and not u.learns]
                made = [where for where, _ in self.bindings(scope.node).get(learn.table, ())]
                if any(use.tokens and _comes_late(learn, use, asked, made) for use in asked):
                    yield learn.at[0], learn.table

    def _table_uses(self, scope: Scope) -> Iterator[TableUse]:
        """Calls and subscripts about a table: updates by validation tokens, and questions, by such tokens or not."""
        for node, around in scope.acts:
            if isinstance(node, ast.Call):
                teaches, handed = _teaches(node), self._handed_present(node, scope)
                parts = [getattr(node.func, "value", None), *node.args, *(k.value for k in node.keywords)]
                about = [
                    name for name in map(_root, parts) if _TABLE.search(name) and not self._holds(name, scope, node)
                ]
                found = [(name, teaches, handed) for name in about[:1] if handed or not teaches]
            else:
                part = node.target if isinstance(node, ast.AugAssign) else node
                if not isinstance(part, ast.Subscript) or not _TABLE.search(_root(part)):
                    continue
                keyed = self.tokens(part.slice, scope.node, _at(node), frozenset(), loss=True)
                learns = part is not node
                kept = keyed if learns else not self._holds(_root(part), scope, node)
                found = [(_root(part), learns, keyed)] if kept else []
            for name, learns, tokens in found:
                yield TableUse(_at(node), name, learns, tokens, around.loops)

    def _holds(self, name: str, scope: Scope, node: ast.AST) -> bool:
        """Whether a name that sounds like a table's holds the tokens themselves, as `ctx_tokens` does."""
        return self.tokens(ast.Name(name, ast.Load()), scope.node, _at(node), frozenset())

    def _handed_present(self, call: ast.Call, scope: Scope) -> bool:
        """Validation tokens among a call's arguments; `tokens[:start]` in a loop over `start` is what came before."""
        past = [a for a in call.args if isinstance(a, ast.Subscript) and isinstance(a.slice, ast.Slice)]
        if any(isinstance(p.slice.upper, ast.Name) and self._counts(p.slice.upper.id, scope) for p in past):
            return False
        return self._handed(call, scope, loss=True)

    def _counts(self, name: str, scope: Scope) -> bool:
        return any(name in _target_names(loop.target) for loop in scope.of(ast.For))


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


def _comes_late(learn: TableUse, use: TableUse, asked: list[TableUse], made: list[tuple[int, int]]) -> bool:
    """Whether `use` asks the table, not `made` anew since, what `learn` has told it."""
    common = set(learn.loops) & set(use.loops)
    if any(_repeats(loop) and not any(_at(loop) < m < (loop.end_lineno + 1, 0) for m in made) for loop in common):
        return True
    if use.at < learn.at or any(learn.at < where < use.at for where in made):
        return False
    before = any(u.at < learn.at and common <= set(u.loops) for u in asked)
    return not before or set(learn.loops) != common


def _repeats(loop: ast.AST) -> bool:
    """Whether a loop is one over epochs, or over a small number that picks nothing in it."""
    head = [loop.test] if isinstance(loop, ast.While) else [loop.target, loop.iter]
    if any(_EPOCHS.search(word) for part in head for word in names(part)):
        return True
    times = loop.iter.args if isinstance(loop, ast.For) and last_name(loop.iter) == "range" else []
    if len(times) != 1 or not isinstance(times[0], ast.Constant):
        return False
    used = {w for part in loop.body for n in ast.walk(part) if isinstance(n, ast.Subscript) for w in names(n.slice)}
    return not used & _target_names(loop.target)


def _root(node: ast.AST) -> str:
    """`ctx_tables` of `ctx_tables[n][key]` and of `self.ctx_tables`; "" of anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return getattr(node, "id", getattr(node, "attr", ""))


def _teaches(call: ast.Call) -> bool:
    return bool(_LEARNS.search(last_name(call))) or dotted(call.func).endswith("add.at")


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
