"""What reviewers rejected, found in a script's syntax tree: each finding with its line and the name it is about.

Names decide where nothing better does, so a finding asks for a reviewer's look; validation tokens flow.py follows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from check.flow import EVALUATES, Flow, route, teaches
from check.switches import Off, Switches
from check.syntax import Scope, calls, dotted, every, imports, keyword_is, last_name, names, nodes, scopes


class Finding(NamedTuple):
    """One pattern in a script: which, in which line of the unpacked source, its words, the name it is about."""

    pattern: str
    line: int
    text: str
    name: str = ""
    off: Off | None = None  # why it did not run
    way: str = ""  # the path by which validation tokens come there
    place: str = ""  # the file or layer of packing, where it is not the script's innermost


TRAINED = "training on validation text before it is scored"
STORED = "validation text compressed by the script"
SAVED = "validation text saved to a file"
LEARNED = "table that learns tokens before they are scored"
TARGET_KEY = "target token in a cache key"
IN_TRAINING = "validation data in training code"
CALIBRATED = "calibration on training text after the training"
ORACLE = "per-token choice by the target"
THRESHOLD = "mixture decided by the target's log probability"
NO_DISTRIBUTION = "expert that is no distribution"
GATE = "n-gram gate that looks at the target"
SPACES = "spaces counted in the table of bytes and once more"
BROKEN = "a rule that could not be asked"

_TARGET = re.compile(r"^(tgt|target|targets|y|y_batch|next_tok|next_token|nxt|label|labels)(_\w+|\d*)$")
_HASHLIKE = re.compile(r"(hash|ctx|context|bucket|key|^h\d?$|prefix)", re.I)
_TRAINS = re.compile(r"train|calib|hessian|gptq|quantiz|collect", re.I)
_ADAPTS = re.compile(r"ttt|adapt|lora", re.I)  # adapting after scoring is evaluation; flow.py looks at its order
_LEARNS = re.compile(r"update|insert|observe|learn|record|(?:^|_)add(?:_|$)|build", re.I)
_OF_TARGET = re.compile(
    r"(?:^|_)(?:tgt|target|true|actual|gold|y)_(?:lp|logp|log_?prob|prob|nll|loss)s?(?:_|$)"
    r"|(?:^|_)(?:lp|logp|log_?prob|prob|nll|p)_(?:tgt|target|true|actual|gold|y)(?:_|$)"
    r"|(?:^|_)(?:tok|token)_(?:nll|lp|logp)s?(?:_|$)",
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
REJECTED = {  # words of methods that were ruled out (issue #1017, the FAQ, the rejections since)
    "pre-quantisation TTT on validation text": re.compile(r"pre_?quant_?ttt", re.I),
    "SLOT (optimises on the positions it scores)": re.compile(r"(^|_)slot_(lr|steps|delta|enabled|epochs)", re.I),
    "ETLB": re.compile(r"(^|_)etlb(_|$)", re.I),
    "byte-level PPM mixture (normalisation, denominator)": re.compile(r"(^|_)ppmd?(_|$)", re.I),
    "second pass over scored text": re.compile(r"two_?pass|second_pass|rescor", re.I),
    "hints computed outside the timer": re.compile(r"precompute_outside|outside_timer", re.I),
    "validation text hidden in the artifact": re.compile(
        r"paid_?prefix|(?:^|_)val_?(blob|payload|prefix)|prefix_(blob|payload)", re.I
    ),
}
_NETWORK = {
    *("requests", "urllib", "urllib3", "httpx", "socket", "http", "ftplib", "aiohttp", "wget", "boto3", "gdown"),
    *("huggingface_hub", "wandb", "kagglehub", "paramiko"),
}
_FETCHES = {
    *("from_pretrained", "load_dataset", "hf_hub_download", "snapshot_download", "load_state_dict_from_url"),
    *("urlopen", "urlretrieve", "get_kernel"),
}
_COMMANDS = {"run", "system", "popen", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
_FETCHING = re.compile(
    r"\b(?:curl|wget|aria2c|rsync|scp|git clone|gsutil|aws s3|apt-get|(?:pip3?|conda|uv) (?:pip )?install)\b"
)


def find_patterns(tree: ast.Module, source: str, switches: Switches | None = None) -> list[Finding]:
    """Every finding in reading order, one a line and pattern; what a finder cannot do is a finding, not an exception."""
    switches = switches or Switches(tree, [])
    flow = Flow(tree, switches)
    finders = (_target_keys, _pickles, _training_files, _target_gates, _no_distribution)
    asked = [(finder, tree) for finder in (*finders, _spaces, _network)]
    asked += [
        (finder, flow)
        for finder in (_trained, _calibrated, _learned, _kept, _oracle_choices, _thresholds, _rejected_names)
    ]
    raw = []
    for finder, of in asked:
        try:
            raw += finder(of)
        except Exception as error:  # a rule that fails takes no other rule with it
            raw.append((BROKEN, tree, f"{finder.__name__.strip('_')}: {type(error).__name__}"))
    lines, seen = source.split("\n"), {}
    for pattern, node, name, *more in sorted(raw, key=lambda f: (getattr(f[1], "lineno", 1), f[0], f[2])):
        line = getattr(node, "lineno", 1)
        text = name if pattern == BROKEN else lines[line - 1] if 0 < line <= len(lines) else ""
        way, off = (*more, *("", None)[len(more) :])
        found = Finding(pattern, line, _excerpt(text.strip(), name), name, off or switches.off(node), way)
        if (known := seen.get((pattern, line))) is None or (known.off and not found.off):
            seen[pattern, line] = found
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


Found = Iterator[tuple]  # pattern, node, name, and perhaps the way to it or why it did not run


def _first(words: set[str], pattern: re.Pattern) -> str:
    return min((w for w in words if pattern.search(w)), default="")


def _target_keys(tree: ast.Module) -> Found:
    """`ctx_hash ^ tgt * P`, `(ctx * P + tgt) % B`: a cell asked by the token whose probability it is to give."""
    for scope in scopes(tree):
        if _LEARNS.search(scope.name):
            continue
        taught, aimed = _taught(scope), _aimed(scope)
        first = {n.target.id for n in scope.of(ast.For) if isinstance(n.target, ast.Name) and _from_zero(n.iter)}
        for node, one, other in _hashed(scope):
            target = _first(names(one), _TARGET) or _aimed_at(one, aimed, first)
            if target and any(_HASHLIKE.search(n) for n in names(other)) and not _only_taught(node, scope, taught):
                yield TARGET_KEY, node, target
        for call in scope.of(ast.Call):
            target = last_name(call.func) in _HASHES and (_first(names(call), _TARGET) or _aimed_at(call, aimed, first))
            if target and not _only_taught(call, scope, taught):
                yield TARGET_KEY, call, target


_HASHES = {"hash", "crc32", "adler32", "xxh32", "xxh64", "blake2b", "md5", "sha1"}


def _hashed(scope: Scope) -> Iterator[tuple[ast.AST, ast.AST, ast.AST]]:
    """(node, one, other) of values mixed into a key: `a ^ b`, `(a + b) % n`, `h ^= b`, a loop that takes in b last."""
    for node in scope.of(ast.BinOp):
        mixed = node if isinstance(node.op, ast.BitXor) else None
        if isinstance(node.op, (ast.Mod, ast.BitAnd)) and isinstance(node.left, ast.BinOp):
            mixed = node.left
        if mixed is not None and isinstance(mixed.op, (ast.BitXor, ast.Add, ast.Mult, ast.BitOr)):
            yield from ((node, mixed.left, mixed.right), (node, mixed.right, mixed.left))
    for node in scope.of(ast.AugAssign):
        if isinstance(node.op, ast.BitXor):
            yield node, node.value, node.target
    for loop in scope.of(ast.For):  # `for t in (*context, target): h = (h * P + t) % B`
        last = [n for n in ast.walk(loop.iter) if isinstance(n, (ast.List, ast.Tuple))]
        keys = [
            n
            for n in ast.walk(loop)
            if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.BitXor, ast.Mod, ast.BitAnd))
        ]
        yield from ((key, group, key) for group in last for key in keys)


def _aimed(scope: Scope) -> dict[str, str]:
    """Subscripts that are the token to predict, as text -> the token's array: `tokens[pos]` where the context is
    `tokens[pos - n : pos]`, or where it is named a target or picks a probability."""
    wanted: set[str] = set()
    found: dict[str, str] = {}
    for node in scope.of(ast.Assign):
        if any(_TARGET.search(n) for n in _assigned(node)):
            wanted |= {ast.dump(n) for n in [node.value] if isinstance(n, ast.Subscript)}
    for node in scope.of(ast.Subscript):
        if any(re.search("log|prob", n, re.I) for n in names(node.value)):
            wanted |= {ast.dump(n) for n in ast.walk(node.slice) if isinstance(n, ast.Subscript)}
        if isinstance(node.slice, ast.Slice) and node.slice.upper is not None and node.slice.lower is not None:
            wanted.add(ast.dump(ast.Subscript(node.value, node.slice.upper, ast.Load())))
            if isinstance(node.slice.upper, ast.Name):
                found[f"{ast.dump(node.value)} from {ast.dump(node.slice.upper)}"] = last_name(node.value)
    for node in scope.of(ast.Subscript):
        if ast.dump(node) in wanted and not isinstance(node.slice, (ast.Slice, ast.Constant)):
            found[ast.dump(node)] = last_name(node.value)
            found[f"{ast.dump(node.value)} from {ast.dump(node.slice)}"] = last_name(node.value)
    return found


def _aimed_at(part: ast.AST, aimed: dict[str, str], first: set[str]) -> str:
    """The array of a target that a part of a key holds: alone, as the last of a slice, or at `pos - k` with k from 0."""
    for node in ast.walk(part) if aimed else ():
        if not isinstance(node, ast.Subscript):
            continue
        edge, key = node.slice, ast.dump(node)
        if isinstance(edge, ast.Slice) and isinstance(edge.upper, ast.BinOp) and isinstance(edge.upper.op, ast.Add):
            key = f"{ast.dump(node.value)} from {ast.dump(edge.upper.left)}" if _is_one(edge.upper.right) else ""
        elif isinstance(edge, ast.BinOp) and isinstance(edge.op, ast.Sub) and last_name(edge.right) in first:
            key = f"{ast.dump(node.value)} from {ast.dump(edge.left)}"
        if key in aimed:
            return aimed[key]
    return ""


def _from_zero(node: ast.AST) -> bool:
    """`range(n)`, `range(0, n)`."""
    return isinstance(node, ast.Call) and last_name(node.func) == "range" and (
        len(node.args) == 1 or getattr(node.args[0] if node.args else None, "value", None) == 0
    )  # fmt: skip


def _taught(scope: Scope) -> set[int]:
    """Nodes inside what is written: targets of assignments, arguments of calls that add to a table."""
    parts = [t for n in scope.of(ast.Assign) for t in n.targets if isinstance(t, ast.Subscript)]
    parts += [n.target for n in scope.of(ast.AugAssign) if isinstance(n.target, ast.Subscript)]
    parts += [a for n in scope.of(ast.Call) if teaches(n) for a in n.args]
    return {id(n) for part in parts for n in ast.walk(part)}


def _only_taught(node: ast.AST, scope: Scope, taught: set[int], deep: int = 0) -> bool:
    """Whether a key serves to write alone: nothing is asked by it."""
    if id(node) in taught:
        return True
    holders = [n for n in scope.of(ast.Assign, ast.AugAssign) if n is node or any(m is node for m in ast.walk(n.value))]
    keys = {t.id for n in holders for t in (getattr(n, "targets", None) or [n.target]) if isinstance(t, ast.Name)}
    if not keys or deep > 3:
        return False
    own = {id(m) for n in holders for m in ast.walk(n)}
    loads = [n for n in scope.of(ast.Name) if n.id in keys and isinstance(n.ctx, ast.Load) and id(n) not in own]
    return bool(loads) and all(_only_taught(n, scope, taught, deep + 1) for n in loads)


def _pickles(tree: ast.Module) -> Found:
    loaders = {"pickle.load", "pickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.loads", "marshal.load"}
    for call in calls(tree, loaders):
        yield "pickle loading", call, dotted(call.func)
    for call in calls(tree, {"torch.load"}):
        if not keyword_is(call, "weights_only", True):
            yield "pickle loading", call, dotted(call.func)
    for call in calls(tree, {"np.load", "numpy.load"}):
        if keyword_is(call, "allow_pickle", True):
            yield "pickle loading", call, dotted(call.func)


def _training_files(tree: ast.Module) -> Found:
    """`train_files = "fineweb_*.bin"`: a pattern of training shards that takes in the validation split."""
    for node in every(tree, ast.Assign, ast.AnnAssign):
        if node.value is None or not any(_TRAIN_FILES.search(n) for n in _assigned(node)):
            continue
        for part in ast.walk(node.value):
            if isinstance(part, ast.Constant) and re.search(r"fineweb_(?:val|\*)", str(part.value)):
                yield IN_TRAINING, node, str(part.value)


_TRAIN_FILES = re.compile(r"(?:^|_)train(?:ing)?_(?:files?|pattern|shards?|glob|paths?|data)$", re.I)


def _target_gates(tree: ast.Module) -> Found:
    """`gate = starts_word[targets]`: how much an n-gram counts is looked up by, or asks, the token to predict."""
    for scope in scopes(tree):
        scores = EVALUATES.search(scope.name) or re.search("gram|hint|tilt|mix", scope.name, re.I)
        for node in scope.of(ast.Assign):
            weighs = any((_WEIGHT if scores else _GATES).search(n) for n in _assigned(node))
            if not weighs or any(re.search("^mix|_mix|mixture", n) for n in _assigned(node)):
                continue
            for part in ast.walk(node.value):
                asked = part.slice if isinstance(part, ast.Subscript) and not _of_chances(part.value) else None
                asked = part if isinstance(part, ast.Compare) else asked
                plain = {n.id for n in ast.walk(asked) if isinstance(n, ast.Name)} if asked is not None else set()
                if target := _first(plain - (set() if scores else {"y", "labels"}), _TARGET):
                    yield GATE, node, target
                    break


def _of_chances(node: ast.AST) -> bool:
    """A table of bytes, or probabilities, of which the target's are picked to be scored."""
    return any(_PROBABILITY.search(n) or re.search("byte|lut|log|nll|loss", n, re.I) for n in names(node))


_EXTREMES = {"minimum", "maximum", "fmin", "fmax", "min", "max", "amin", "amax"}
_COST = re.compile(r"(?:^|_)(?:nlls?|losses|logprobs?)(?:_|\d|$)", re.I)
_CHANCE = re.compile(r"(?:^|_)(?:p|probs?)(?:_|\d|$)", re.I)
_RUNNING = re.compile(r"best|lowest|min|max|running|clip|floor|eps|cap", re.I)


def _oracle_choices(flow: Flow) -> Found:
    """torch.minimum(nll_a, nll_b): per token the better of two models, which needs the target."""
    for scope in _scoring(flow):
        costs = _target_costs(scope)
        for call in scope.of(ast.Call):
            name = last_name(call)
            if name == "where" and len(call.args) == 3 and isinstance(call.args[0], ast.Compare):
                compared = [call.args[0].left, *call.args[0].comparators]
            elif name in _EXTREMES:
                compared = _compared(call)
            else:
                continue
            word = _rivals(compared, costs, elementwise=isinstance(call.func, ast.Attribute))
            if word := word or (name in _EXTREMES and _stacked(call, scope, costs)):
                yield ORACLE, call, word


def _compared(call: ast.Call) -> list[ast.AST]:
    """The two sides of `torch.minimum(a, b)`, `min(a, b)` or `a.minimum(b)`."""
    of_module = isinstance(call.func, ast.Attribute) and dotted(call.func.value) not in ("torch", "np", "numpy", "math")
    return ([call.func.value] if of_module else []) + [a for a in call.args if not isinstance(a, ast.Starred)]


def _rivals(sides: list[ast.AST], costs: set[str], elementwise: bool) -> str:
    """The first of two sides that are both what a token cost, or (in arrays) both a probability of it; else ""."""
    words = [names(side) for side in sides]
    if len(words) != 2 or words[0] == words[1] or any(map(_RUNNING.search, words[0] | words[1])):
        return ""
    for kind in (_COST, _CHANCE) if elementwise else (_COST,):
        found = [
            min((n for n in side if kind.search(n) or (kind is _COST and n in costs)), default="") for side in words
        ]
        if all(found) and found[0] != found[1]:
            return found[0]
    return ""


def _stacked(call: ast.Call, scope: Scope, costs: set[str]) -> str:
    """The name of the smallest over models: `torch.stack([nll_a, nll_b]).min(0)`, whole or by way of a name."""
    piled = {n: node.value for node in scope.of(ast.Assign) for n in _assigned(node)}
    for part in [call.func.value, *call.args[:1]] if isinstance(call.func, ast.Attribute) else []:
        named = part.id if isinstance(part, ast.Name) and _COST.search(part.id) else ""
        part = piled.get(part.id, part) if isinstance(part, ast.Name) else part
        if not isinstance(part, ast.Call) or last_name(part) not in ("stack", "vstack", "array"):
            continue
        if word := named or min((n for n in names(part) if n in costs or _COST.search(n)), default=""):
            return word
        if any(_costs_a_target(n) for n in ast.walk(part) if isinstance(n, (ast.Call, ast.Subscript))):
            return last_name(part)
    return ""


def _scoring(flow: Flow) -> Iterator[Scope]:
    """Scopes whose losses may be scores: a training loss may choose its tokens."""
    for scope in scopes(flow.tree):
        trains = _TRAINS.search(scope.name) and not (EVALUATES.search(scope.name) or _ADAPTS.search(scope.name))
        if not trains and not flow.only_trains(scope):
            yield scope


def _in_training(flow: Flow, node: ast.AST) -> bool:
    """Whether a node runs under `if self.training`."""
    place = flow.places.get(id(node))
    return place is not None and any(last_name(test) == "training" and came for test, came in place.around.tests)


def _thresholds(flow: Flow) -> Found:
    """`w = where(target_logp > -2, a, b)`: what an expert counts is chosen by what the target turned out to cost."""
    for scope in _scoring(flow):
        compared = [n for test in scope.of(ast.Compare) for n in names(test)]
        costs = _target_costs(scope) if compared else set()
        if not any(n in costs or _OF_TARGET.search(n) for n in compared):
            continue
        asked = {n: cost for a in scope.of(ast.Assign) if (cost := _asks_cost(a.value, costs)) for n in _assigned(a)}
        for node, test in _weighing_tests(scope, costs):
            named = min((asked[n] for n in names(test) if n in asked), default="")
            cost = _asks_cost(test, costs) or named
            if cost and not _in_training(flow, node):
                yield THRESHOLD, node, cost


def _asks_cost(node: ast.AST, costs: set[str]) -> str:
    """The cost of a target that a comparison in an expression asks; "" of none, and of a best or a finite one."""
    for compare in (n for n in ast.walk(node) if isinstance(n, ast.Compare)):
        words = names(compare)
        cost = min((n for n in words if n in costs or _OF_TARGET.search(n)), default="")
        if cost and not any(re.search(r"best|worst|isfinite|isnan", n, re.I) for n in words):
            return cost
    return ""


def _weighing_tests(scope: Scope, costs: set[str]) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(node, expression) of what decides between two values or a weight, or whether the scored value is mixed."""
    yield from (
        (n, n.args[0]) for n in scope.of(ast.Call) if last_name(n.func) == "where" and _chooses(n.args[1:], n.args[0])
    )
    yield from ((n, n.test) for n in scope.of(ast.IfExp) if _chooses([n.body, n.orelse], n.test))
    for node in scope.of(ast.If):
        weighed = any(_WEIGHT.search(w) for part in node.body for w in _assigned(part))
        if weighed or _scored_otherwise(node, scope, costs):
            yield node, node.test
    yield from ((n, n.value) for n in scope.of(ast.Assign) if any(map(_WEIGHT.search, _assigned(n))))


def _chooses(values: list[ast.AST], test: ast.AST) -> bool:
    """Whether two outcomes differ by more than a bound: `where(p > 0, p, 0)` and `where(nll > cap, cap, nll)` clip."""
    words = {n for v in values for n in names(v)}
    clips = bool(words) and words <= names(test)
    clips |= any(isinstance(v, ast.Constant) for v in values) and any(
        _CHANCE.search(n) or _COST.search(n) for n in words
    )
    return len(values) == 2 and not clips


def _scored_otherwise(node: ast.If, scope: Scope, costs: set[str]) -> bool:
    """Whether the body of an `if` gives a cost or a probability that is summed a value of other experts."""
    summed = {n for s in scope.of(ast.AugAssign) for n in names(s.value)}
    summed |= {n for c in scope.of(ast.Call) if last_name(c.func) == "append" for a in c.args for n in names(a)}
    for _ in range(3):
        summed |= {n for s in scope.of(ast.Assign) if _assigned(s) & summed for n in names(s.value)}
    tested = names(node.test)
    for part in (n for body in (node.body, node.orelse) for s in body for n in ast.walk(s)):
        if isinstance(part, ast.Assign) and _assigned(part) & summed:
            others = {n for n in names(part.value) if n not in tested | costs and n not in _MATHS}
            if others and (
                _assigned(part) & (costs | tested) or any(_COST.search(n) or _CHANCE.search(n) for n in _assigned(part))
            ):
                return True
        elif (
            isinstance(part, ast.AugAssign)
            and _assigned(part) & summed
            and any(_COST.search(n) for n in _assigned(part))
        ):
            return True
    return False


_MATHS = {"math", "np", "numpy", "torch", "log", "exp", "max", "min", "float", "logaddexp", "log1p", "item", "clamp"}


def _assigned(node: ast.AST) -> set[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {n for t in targets if t is not None for n in names(t)}


def _target_costs(scope: Scope) -> set[str]:
    """Names that hold what each target costs: gathered at the target, or a cross entropy without reduction; or named so."""
    costly = {id(n) for n in scope.of(ast.Call, ast.Subscript) if _costs_a_target(n)}
    costs: set[str] = set()
    for node in scope.of(ast.Assign):
        value = node.value
        while isinstance(value, (ast.Subscript, ast.UnaryOp)) or (isinstance(value, ast.Call) and _only_casts(value)):
            value = value.func.value if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else (
                value.args[0] if isinstance(value, ast.Call) else getattr(value, "value", getattr(value, "operand", None)))  # fmt: skip
        word = last_name(value) if isinstance(value, (ast.Name, ast.Attribute)) else ""
        named = word and (word in costs or _OF_TARGET.search(word))
        if named or (costly and any(id(n) in costly for n in ast.walk(node.value))):
            costs |= _assigned(node)
    return costs


def _only_casts(call: ast.Call) -> bool:
    name = last_name(call.func)
    if isinstance(call.func, ast.Attribute):
        return name in (
            "item",
            "cpu",
            "numpy",
            "tolist",
            "float",
            "double",
            "detach",
            "exp",
            "neg",
            "view",
            "squeeze",
            "reshape",
        )
    return name in ("float", "exp") and len(call.args) == 1


def _costs_a_target(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        gathered = isinstance(node.slice, ast.Tuple) and any(re.search("log|prob", n, re.I) for n in names(node.value))
        return gathered and bool(_first(names(node.slice), _TARGET))
    if last_name(node.func) in ("gather", "take_along_axis"):
        return bool(_first({n for a in node.args for n in names(a)}, _TARGET))
    return any(k.arg == "reduction" and getattr(k.value, "value", "") == "none" for k in node.keywords)


def _no_distribution(tree: ast.Module) -> Found:
    """`w * p + (1 - w) * rank`: what is mixed with probabilities is none, so the mixture sums to no one."""
    for scope in scopes(tree):
        if _TRAINS.search(scope.name) and not EVALUATES.search(scope.name):
            continue
        for node in scope.of(ast.BinOp):
            experts = _mixed(node) if isinstance(node.op, ast.Add) else []
            odd = [
                w
                for words in experts
                if (w := _first(words, _NO_PROBABILITY)) and not any("softmax" in n for n in words)
            ]
            if odd and any(_first(words, _PROBABILITY) for words in experts):
                yield NO_DISTRIBUTION, node, odd[0]
        for call in scope.of(ast.Call):
            if last_name(call.func) in ("stack", "cat", "vstack", "concatenate") and call.args:
                parts = call.args[0].elts if isinstance(call.args[0], (ast.List, ast.Tuple)) else []
                each = [names(p) for p in parts if not _reduced(p)]
                odd = min((w for words in each if (w := _first(words, _NO_PROBABILITY))), default="")
                if odd and any(_first(words, _COST) or _first(words, _OF_TARGET) for words in each):
                    yield NO_DISTRIBUTION, call, odd


def _reduced(node: ast.AST) -> bool:
    """`nll.sum()`: a figure for a report, none a token."""
    return isinstance(node, ast.Call) and last_name(node.func) in ("sum", "mean", "item", "tensor", "float")


def _mixed(node: ast.BinOp) -> list[set[str]]:
    """Names of the two experts of `w * a + (1 - w) * b`, in any order; none if it is another sum."""
    sides = [side for side in (node.left, node.right) if isinstance(side, ast.BinOp) and isinstance(side.op, ast.Mult)]
    factors = [(f, g) for side in sides for f, g in ((side.left, side.right), (side.right, side.left))]
    rest = [(f, g) for f, g in factors if isinstance(f, ast.BinOp) and isinstance(f.op, ast.Sub) and _is_one(f.left)]
    if len(sides) < 2 or not rest:
        return []
    same = [names(g) for f, g in factors if not isinstance(f, ast.BinOp) and names(f) == names(rest[0][0])]
    return [names(rest[0][1]), *same]


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in (1, 1.0)


def _spaces(tree: ast.Module) -> Found:
    """A table of bytes that keeps the space of a piece, beside a loop that adds the same space once more."""
    adds = [n for n in every(tree, ast.AugAssign) if isinstance(n.op, ast.Add) and _leading_space(n.value)]
    adds += [n for n in every(tree, ast.Assign) if isinstance(n.value, ast.BinOp) and _leading_space(n.value)]
    if not adds:
        return
    for scope in scopes(tree):
        marks = [n for n in scope.of(ast.Constant) if isinstance(n.value, str) and n.value in ("\u2581", " ")]
        if not marks or not any("\u2581" in n.value for n in marks):
            continue
        flags = [c for c in scope.of(ast.Call) if last_name(c.func) == "startswith"]
        for node in scope.of(ast.Assign):
            if not flags or not any(isinstance(t, ast.Subscript) for t in node.targets):
                continue
            sizes = [c for c in ast.walk(node.value) if isinstance(c, ast.Call) and last_name(c.func) == "len"]
            encoded = [
                c for s in sizes for c in ast.walk(s) if isinstance(c, ast.Call) and last_name(c.func) == "encode"
            ]
            for call in encoded:
                piece = call.func.value if isinstance(call.func, ast.Attribute) else call
                if not _stripped(piece, scope) and not isinstance(node.value, ast.BinOp):
                    yield SPACES, node, last_name(piece) or "len"


def _leading_space(node: ast.AST) -> bool:
    return any(re.search(r"(?:leading|has|lead|pre)_?space|space_?(?:lut|flag|mask)", n, re.I) for n in names(node))


def _stripped(piece: ast.AST, scope: Scope) -> bool:
    """Whether the space before a piece is taken off: in the expression, or by an assignment to its name."""
    values = [piece]
    if isinstance(piece, ast.Name):
        values += [n.value for n in scope.of(ast.Assign, ast.NamedExpr) if piece.id in _assigned(n)]
    for part in (n for value in values for n in ast.walk(value)):
        if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Slice):
            return True
        if isinstance(part, ast.Call) and last_name(part.func) in ("lstrip", "strip", "removeprefix"):
            return True
        if isinstance(part, ast.Call) and last_name(part.func) == "replace" and len(part.args) == 2:
            return getattr(part.args[1], "value", " ") == ""
    return False


def _network(tree: ast.Module) -> Found:
    """Modules, calls and commands that reach the network while the script runs."""
    for module, node in imports(tree):
        if module.split(".")[0] in _NETWORK:
            yield "network module", node, module
    for call in every(tree, ast.Call):
        name = last_name(call)
        if name in _FETCHES or dotted(call.func).startswith("torch.hub."):
            yield "network access", call, name
        elif name in _COMMANDS:
            words = [n.value for a in call.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            if found := _FETCHING.search(" ".join(w for w in words if isinstance(w, str))):
                yield "network access", call, found[0]


def _rejected_names(flow: Flow) -> Found:
    """First use of each name (or knob in a string) that belongs to a method ruled out."""
    first: dict[str, ast.AST] = {}
    for node in nodes(flow.tree):
        word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[A-Z_0-9]+", node.value):
            word = node.value
        if isinstance(word, str) and hasattr(node, "lineno"):
            first[word] = min(node, first.get(word, node), key=lambda n: n.lineno)
    for what, pattern in REJECTED.items():
        if found := [(node.lineno, word) for word, node in first.items() if pattern.search(word)]:
            yield (
                f"name of a rejected method: {what}",
                first[min(found)[1]],
                min(found)[1],
                "",
                flow.switches.knobs_off(pattern),
            )


def _trained(flow: Flow) -> Found:
    for step in flow.steps():
        yield TRAINED, step.node, step.name, f"{route(step.path)}{', scored again' * step.again}", step.off


def _calibrated(flow: Flow) -> Found:
    yield from ((IN_TRAINING, node, name, route(path)) for node, name, path in flow.calibrations())
    yield from ((CALIBRATED, node, name, route(path)) for node, name, path in flow.late_calibrations())


def _learned(flow: Flow) -> Found:
    yield from ((LEARNED, node, name, route(path)) for node, name, path in flow.learned_first())


def _kept(flow: Flow) -> Found:
    for node, name, path in flow.stored():
        yield STORED if "compress" in name else SAVED, node, name, route(path)
