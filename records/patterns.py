"""What reviewers rejected, found in a script's syntax tree: each finding with its line and the name it is about.

Names decide where nothing better does, so a finding asks for a reviewer's look; flow.py follows validation tokens instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from flow import EVALUATES, VALIDATION, Flow
from syntax import FUNCTIONS, calls, dotted, keyword_is, last_name, names, nodes, own


class Finding(NamedTuple):
    """One pattern in a script: which, where (line of the unpacked source), the words of the source, the name it is about."""

    pattern: str
    line: int
    text: str
    name: str = ""
    guards: tuple[str, ...] = ()  # names whose value decides whether it runs


TRAINED = "training on validation text before it is scored"
STORED = "validation text stored by the script"
TARGET_KEY = "target token in a cache key"
IN_TRAINING = "validation data in training code"
ORACLE = "per-token choice by the target"
THRESHOLD = "mixture decided by the target's log probability"
NO_DISTRIBUTION = "expert that is no distribution"
GATE = "n-gram gate that looks at the target"

_TARGET = re.compile(r"^(tgt|target|targets|y|y_batch|next_tok|next_token|nxt|label|labels)(_\w+|\d*)$")
_HASHLIKE = re.compile(r"(hash|ctx|context|bucket|key|^h\d?$|prefix)", re.I)
_TRAINS = re.compile(r"train|calib|hessian|gptq|quantiz|collect", re.I)
_ADAPTS = re.compile(r"ttt|adapt|lora", re.I)  # adapting after scoring is evaluation; flow.py looks at its order
_LEARNS = re.compile(r"update|insert|observe|learn|record|(?:^|_)add(?:_|$)|build", re.I)
_LOG_PROB = re.compile(r"^(?:nll|nlls|losses|logprobs?|log_probs?|lp|lps|logp|logps|ptl|per_tok\w*)$")
_OF_TARGET = re.compile(
    r"(?:^|_)(?:tgt|target|true|actual|gold|y)_(?:lp|logp|log_?prob|prob|nll|loss)s?(?:_|$)"
    r"|(?:^|_)(?:lp|logp|log_?prob|prob|nll|p)_(?:tgt|target|true|actual|gold|y)(?:_|$)|(?:^|_)(?:tok|token)_(?:nll|lp|logp)s?(?:_|$)",
    re.I,
)
_WEIGHT = re.compile(
    r"(?:^|_)(?:alpha|lam|lamb|lambda_?|weights?|w|mix|mixture|blend|beta|gate|gates|use|pick|boost)\d*(?:_|$)", re.I
)
_NO_PROBABILITY = re.compile(
    r"(?:^|_)(?:entropy|ent|ranks?|margin|similarity|surprise|confidence|counts?|freqs?)(?:_|$)", re.I
)
_PROBABILITY = re.compile(r"(?:^|_)(?:p|probs?|lp|logp|log_?probs?|softmax|model|nn|lm|neural)(?:_|\d|$)", re.I)
_GATES = re.compile(r"(^|_)(gate|gates|gated|tilt|alpha)(_|$)", re.I)
REJECTED = {  # words of methods that were ruled out (issue #1017, the FAQ, the rejections of the challenge's last weeks)
    "pre-quantisation TTT on validation text": re.compile(r"pre_?quant_?ttt", re.I),
    "SLOT (optimises on the positions it scores)": re.compile(r"(^|_)slot_(lr|steps|delta|enabled|epochs)", re.I),
    "ETLB": re.compile(r"(^|_)etlb(_|$)", re.I),
    "byte-level PPM mixture (normalisation, denominator)": re.compile(r"(^|_)ppmd?(_|$)", re.I),
    "second pass over scored text": re.compile(r"two_?pass|second_pass|rescor", re.I),
    "hints computed outside the timer": re.compile(r"precompute_outside|outside_timer", re.I),
    "validation text hidden in the artifact": re.compile(
        r"paid_?prefix|val_?(blob|payload|prefix)|prefix_(blob|payload)", re.I
    ),
}
_NETWORK = {"requests", "urllib", "socket", "http", "ftplib", "huggingface_hub", "wandb", "aiohttp"}


def find_patterns(tree: ast.Module, source: str) -> list[Finding]:
    """Every finding in reading order, one a line and pattern."""
    finders = (_target_keys, _pickles, _in_training, _oracle_choices, _target_gates, _thresholds, _no_distribution)
    raw = [found for finder in (*finders, _network, _rejected_names, _flow) for found in finder(tree)]
    lines, seen = source.split("\n"), {}
    for pattern, line, name, *guards in sorted(raw, key=lambda f: (f[1], f[0], f[2])):
        text = lines[line - 1] if 0 < line <= len(lines) else ""
        seen.setdefault((pattern, line), Finding(pattern, line, _excerpt(text.strip(), name), name, *guards))
    return list(seen.values())


def _excerpt(text: str, name: str, width: int = 100) -> str:
    """The line, or of a long one what stands around the name."""
    if len(text) <= width:
        return text
    found = re.search(rf"\b{re.escape(name)}\b", text) if name else None
    middle = found.start() if found else 0
    start = max(0, min(middle - width // 3, len(text) - width))
    return (
        f"{name}: " * bool(found)
        + "..." * (start > 0)
        + text[start : start + width]
        + "..." * (start + width < len(text))
    )


Found = Iterator[tuple]  # pattern, line, name and perhaps guards


def _scopes(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of the module, whose name is empty, and of every function."""
    yield "", tree
    yield from ((node.name, node) for node in nodes(tree) if isinstance(node, FUNCTIONS))


def _first(words: set[str], pattern: re.Pattern) -> str:
    return min((w for w in words if pattern.search(w)), default="")


def _target_keys(tree: ast.Module) -> Found:
    """`ctx_hash ^ tgt * P`, or `(ctx * P + tgt) % B`: a cell chosen by the token whose probability it is to give."""
    for scope_name, scope in _scopes(tree):
        for node in own(scope) if not _LEARNS.search(scope_name) else ():
            mixed = node if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor) else None
            if (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, (ast.Mod, ast.BitAnd))
                and isinstance(node.left, ast.BinOp)
            ):
                mixed = node.left
            if mixed is None or not isinstance(mixed.op, (ast.BitXor, ast.Add, ast.Mult, ast.BitOr)):
                continue
            for one, other in ((mixed.left, mixed.right), (mixed.right, mixed.left)):
                target = _first(names(one), _TARGET)
                if target and any(_HASHLIKE.search(n) for n in names(other)):
                    yield TARGET_KEY, node.lineno, target


def _pickles(tree: ast.Module) -> Found:
    loaders = {"pickle.load", "pickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.loads", "marshal.load"}
    for call in calls(tree, loaders):
        yield "pickle loading", call.lineno, dotted(call.func)
    for call in calls(tree, {"torch.load"}):
        if not keyword_is(call, "weights_only", True):
            yield "pickle loading", call.lineno, dotted(call.func)
    for call in calls(tree, {"np.load", "numpy.load"}):
        if keyword_is(call, "allow_pickle", True):
            yield "pickle loading", call.lineno, dotted(call.func)


def _in_training(tree: ast.Module) -> Found:
    """Validation tokens inside a function that trains or calibrates, neither handed to an evaluation nor only held for one."""
    for name, scope in _scopes(tree):
        if not _TRAINS.search(name) or EVALUATES.search(name) or _ADAPTS.search(name):
            continue
        spared = {id(n) for node in own(scope) for part in _spared(node) for n in ast.walk(part)}
        for node in own(scope):
            word = getattr(node, "id", getattr(node, "attr", None))
            word = node.value if isinstance(node, ast.Constant) else word
            if not isinstance(word, str) or not VALIDATION.search(word) or id(node) in spared:
                continue
            if not (
                isinstance(node, ast.Constant) and " " in word
            ):  # a docstring or message speaks of it, nothing opens it
                yield IN_TRAINING, node.lineno, word


def _spared(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node that do not train: evaluations, messages, sizes, and the loading of what is named validation."""
    if isinstance(node, ast.Call):
        name = last_name(node.func)
        spared = EVALUATES.search(name) or _ADAPTS.search(name) or re.match(r"print|log|len$|info$|numel$|size$", name)
    elif isinstance(node, ast.Assign):
        spared = all("val" in n.lower() for t in node.targets for n in names(t))
    else:
        spared = isinstance(node, ast.Delete) or getattr(node, "attr", "") in ("shape", "numel", "size")
    if spared:
        yield node


def _target_gates(tree: ast.Module) -> Found:
    """`gate = starts_word[targets]`: how much an n-gram counts is decided by the token that it is to predict."""
    for node in nodes(tree):
        gated = isinstance(node, ast.Assign) and any(_GATES.search(n) for t in node.targets for n in names(t))
        plain = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} if gated else set()
        if target := _first(plain, _TARGET):  # plain names alone: `query.target` may well be a position
            yield GATE, node.lineno, target


def _oracle_choices(tree: ast.Module) -> Found:
    """torch.minimum(nll_a, nll_b): per token the better of two models, which needs the target."""
    for call in calls(tree, {"torch.minimum", "np.minimum", "torch.maximum", "np.maximum", "min", "max"}):
        if len(call.args) == 2:
            words = [{w for n in names(a) for w in n.lower().split("_")} for a in call.args]
            if all(w & {"nll", "losses", "logprob", "logprobs", "nlls"} for w in words):
                yield ORACLE, call.lineno, _first(names(call.args[0]), re.compile("nll|loss|logprob", re.I))


def _thresholds(tree: ast.Module) -> Found:
    """`w = where(target_logp > -2, a, b)`: the weight of an expert is chosen by what the target turned out to cost."""
    for name, scope in _scopes(tree):
        if _TRAINS.search(name) and not (EVALUATES.search(name) or _ADAPTS.search(name)):
            continue  # a training loss may choose its tokens
        costs = _target_costs(scope)
        for node in own(scope):
            if isinstance(node, ast.Call) and last_name(node.func) == "where" and node.args:
                tests, chosen = [node.args[0]], True
            elif isinstance(node, ast.IfExp):
                tests, chosen = [node.test], True
            elif isinstance(node, ast.If):
                tests, chosen = [node.test], any(_WEIGHT.search(n) for part in node.body for n in _assigned(part))
            elif isinstance(node, ast.Assign) and any(_WEIGHT.search(n) for n in _assigned(node)):
                tests, chosen = [node.value], True
            else:
                continue
            for test in (t for part in tests if chosen for t in ast.walk(part) if isinstance(t, ast.Compare)):
                cost = min((n for n in names(test) if n in costs or _OF_TARGET.search(n)), default="")
                if cost and not any(_best(n) for n in names(test)):
                    yield THRESHOLD, node.lineno, cost


def _best(name: str) -> bool:
    return bool(re.search(r"best|isfinite|isnan", name, re.I))


def _assigned(node: ast.AST) -> set[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {n for t in targets if t is not None for n in names(t)}


def _target_costs(scope: ast.AST) -> set[str]:
    """Names of a function that hold what each target costs: gathered at the target, or a cross entropy without reduction."""
    costs: set[str] = set()
    for node in own(scope):
        if not isinstance(node, ast.Assign):
            continue
        for call in (c for c in ast.walk(node.value) if isinstance(c, (ast.Call, ast.Subscript))):
            if isinstance(call, ast.Subscript):
                source, at = call.value, names(call.slice)
                gathered = bool(_first(names(source), re.compile("log|prob", re.I))) and isinstance(
                    call.slice, ast.Tuple
                )
            else:
                gathered, at = (
                    last_name(call.func) in ("gather", "take_along_axis"),
                    {n for a in call.args for n in names(a)},
                )
            entropy = isinstance(call, ast.Call) and any(
                k.arg == "reduction" and getattr(k.value, "value", "") == "none" for k in call.keywords
            )
            if entropy or (gathered and _first(at, _TARGET)):
                costs |= _assigned(node)
        if isinstance(node.value, (ast.UnaryOp, ast.Name)) and names(node.value) & costs:
            costs |= _assigned(node)
    return costs


def _no_distribution(tree: ast.Module) -> Found:
    """`w * p + (1 - w) * rank`: what is mixed with probabilities is none, so the mixture sums to no one."""
    for name, scope in _scopes(tree):
        for node in own(scope) if not (_TRAINS.search(name) and not EVALUATES.search(name)) else ():
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
                continue
            sides = [
                side
                for side in (node.left, node.right)
                if isinstance(side, ast.BinOp) and isinstance(side.op, ast.Mult)
            ]
            factors = [(f, g) for side in sides for f, g in ((side.left, side.right), (side.right, side.left))]
            rest = [
                (f, g) for f, g in factors if isinstance(f, ast.BinOp) and isinstance(f.op, ast.Sub) and _is_one(f.left)
            ]
            if len(sides) < 2 or not rest:
                continue
            weight = names(rest[0][0])
            experts = [
                names(rest[0][1]),
                *(names(g) for f, g in factors if names(f) == weight and not isinstance(f, ast.BinOp)),
            ]
            odd = [
                word
                for words in experts
                if (word := _first(words, _NO_PROBABILITY)) and not _first(words, re.compile("softmax"))
            ]
            if odd and any(_first(words, _PROBABILITY) for words in experts):
                yield NO_DISTRIBUTION, node.lineno, odd[0]


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in (1, 1.0)


def _network(tree: ast.Module) -> Found:
    for node in nodes(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.split(".")[0] in _NETWORK:
                yield "network module", node.lineno, module


def _rejected_names(tree: ast.Module) -> Found:
    """First use of each name (or knob in a string) that belongs to a method ruled out."""
    found: dict[str, tuple[int, str]] = {}
    for node in nodes(tree):
        word = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[A-Z_0-9]+", node.value):
            word = node.value
        for what, pattern in REJECTED.items():
            if isinstance(word, str) and pattern.search(word) and hasattr(node, "lineno"):
                found[what] = min((node.lineno, word), found.get(what, (node.lineno, word)))
    for what, (line, word) in found.items():
        yield f"name of a rejected method: {what}", line, word


def is_off(value: object) -> bool:
    """Whether a knob's value, as logs or code print it, switches a method off."""
    return value is not None and str(value).strip().lower() in ("0", "0.0", "false", "off", "no", "none", "")


def defaults(tree: ast.Module) -> dict[str, object]:
    """name -> default of every `name = os.environ.get("NAME", default)`, conversions around it aside, and of plain constants."""
    found: dict[str, object] = {}
    for node in nodes(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        while isinstance(value, ast.Call) and last_name(value.func) in ("int", "float", "bool", "str") and value.args:
            value = value.args[0]
        if isinstance(value, ast.Call) and last_name(value.func) in ("get", "getenv") and len(value.args) == 2:
            value = value.args[1]
        if isinstance(value, ast.Constant):
            found |= {name: value.value for target in targets for name in names(target)}
    return found


def _flow(tree: ast.Module) -> Found:
    flow = Flow(tree)
    yield from ((TRAINED, step.line, step.name, tuple(sorted(step.guards))) for step in flow.steps())
    yield from ((IN_TRAINING, line, name) for line, name in flow.calibrations())
    yield from ((STORED, line, name) for line, name in flow.stored())
