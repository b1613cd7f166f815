"""What reviewers rejected, found in a script's syntax tree: each finding with its line and the name it is about.

Names decide where nothing better does, so a finding asks for a reviewer's look; validation tokens flow.py follows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from check.flow import EVALUATES, VALIDATION, Flow
from check.syntax import Scope, calls, dotted, every, imports, keyword_is, last_name, names, nodes, scopes


class Finding(NamedTuple):
    """One pattern in a script: which, in which line of the unpacked source, its words, the name it is about."""

    pattern: str
    line: int
    text: str
    name: str = ""
    guards: tuple[str, ...] = ()  # names whose value decides whether it runs
    place: str = ""  # the file or layer of packing, where it is not the script's innermost


TRAINED = "training on validation text before it is scored"
STORED = "validation text compressed by the script"
SAVED = "validation text saved to a file"
LEARNED = "table that learns tokens before they are scored"
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


def find_patterns(tree: ast.Module, source: str) -> list[Finding]:
    """Every finding in reading order, one a line and pattern."""
    finders = (_target_keys, _pickles, _in_training, _training_files, _oracle_choices, _target_gates, _thresholds)
    raw = [found for finder in (*finders, _no_distribution, _network, _rejected_names, _flow) for found in finder(tree)]
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


def _first(words: set[str], pattern: re.Pattern) -> str:
    return min((w for w in words if pattern.search(w)), default="")


def _target_keys(tree: ast.Module) -> Found:
    """`ctx_hash ^ tgt * P`, or `(ctx * P + tgt) % B`: a cell chosen by the token whose probability it is to give."""
    for scope in scopes(tree):
        if _LEARNS.search(scope.name):
            continue
        for line, one, other in _hashed(scope):
            target = _first(names(one), _TARGET)
            if target and any(_HASHLIKE.search(n) for n in names(other)):
                yield TARGET_KEY, line, target
        for call in scope.of(ast.Call):
            target = _first(names(call), _TARGET) if dotted(call.func) == "hash" else ""
            if target:
                yield TARGET_KEY, call.lineno, target


def _hashed(scope: Scope) -> Iterator[tuple[int, ast.AST, ast.AST]]:
    """(line, one, other) of values mixed into a key: `a ^ b`, `(a + b) % n`, `h ^= b`, a loop that takes in b last."""
    for node in scope.of(ast.BinOp):
        mixed = node if isinstance(node.op, ast.BitXor) else None
        if isinstance(node.op, (ast.Mod, ast.BitAnd)) and isinstance(node.left, ast.BinOp):
            mixed = node.left
        if mixed is not None and isinstance(mixed.op, (ast.BitXor, ast.Add, ast.Mult, ast.BitOr)):
            yield from ((node.lineno, mixed.left, mixed.right), (node.lineno, mixed.right, mixed.left))
    for node in scope.of(ast.AugAssign):
        if isinstance(node.op, ast.BitXor):
            yield node.lineno, node.value, node.target
    for loop in scope.of(ast.For):  # `for t in (*context, target): h = (h * P + t) % B`
        last = [n for n in ast.walk(loop.iter) if isinstance(n, (ast.List, ast.Tuple))]
        keys = [
            n
            for n in ast.walk(loop)
            if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.BitXor, ast.Mod, ast.BitAnd))
        ]
        yield from ((key.lineno, group, key) for group in last for key in keys)


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
    """Validation tokens in a function that trains or calibrates, neither given to an evaluation nor held for one."""
    for scope in scopes(tree):
        if not _TRAINS.search(scope.name) or EVALUATES.search(scope.name) or _ADAPTS.search(scope.name):
            continue
        if isinstance(scope.node, ast.ClassDef):
            continue
        spared = {id(n) for node in scope.nodes for part in _spared(node) for n in ast.walk(part)}
        for node in scope.of(ast.Name, ast.Attribute, ast.Constant):
            word = getattr(node, "id", getattr(node, "attr", None))
            word = node.value if isinstance(node, ast.Constant) else word
            if not isinstance(word, str) or not VALIDATION.search(word) or id(node) in spared:
                continue
            if not (
                isinstance(node, ast.Constant) and " " in word
            ):  # a docstring or message speaks of it, nothing opens it
                yield IN_TRAINING, node.lineno, word


def _training_files(tree: ast.Module) -> Found:
    """`train_files = "fineweb_*.bin"`: a pattern of training shards that takes in the validation split."""
    for node in every(tree, ast.Assign, ast.AnnAssign):
        if node.value is None or not any(_TRAIN_FILES.search(n) for n in _assigned(node)):
            continue
        for part in ast.walk(node.value):
            if isinstance(part, ast.Constant) and re.search(r"fineweb_(?:val|\*)", str(part.value)):
                yield IN_TRAINING, node.lineno, str(part.value)


_TRAIN_FILES = re.compile(r"(?:^|_)train(?:ing)?_(?:files?|pattern|shards?|glob|paths?|data)$", re.I)


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
    for scope in scopes(tree):
        scores = EVALUATES.search(scope.name) or re.search("gram|hint|tilt|mix", scope.name, re.I)
        for node in scope.of(ast.Assign):
            weighs = _WEIGHT if scores and not re.search("byte|lut", ast.dump(node.value)) else _GATES
            if not any(_GATES.search(n) or weighs.search(n) for t in node.targets for n in names(t)):
                continue
            plain = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            plain -= set() if scores else {"y", "labels"}  # elsewhere a network's activations
            if target := _first(plain, _TARGET):  # plain names alone: `query.target` may well be a position
                yield GATE, node.lineno, target


_EXTREMES = {"minimum", "maximum", "fmin", "fmax", "min", "max", "amin", "amax"}
_COST = re.compile(r"(?:^|_)(?:nlls?|losses|logprobs?)(?:_|\d|$)", re.I)
_CHANCE = re.compile(r"(?:^|_)(?:p|probs?)(?:_|\d|$)", re.I)
_RUNNING = re.compile(r"best|lowest|min|max|running|clip|floor|eps|cap", re.I)


def _oracle_choices(tree: ast.Module) -> Found:
    """torch.minimum(nll_a, nll_b): per token the better of two models, which needs the target."""
    for scope in _scoring(tree):
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
                yield ORACLE, call.lineno, word


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
        part = piled.get(part.id, part) if isinstance(part, ast.Name) else part
        if not isinstance(part, ast.Call) or last_name(part) not in ("stack", "vstack", "array"):
            continue
        if word := min((n for n in names(part) if n in costs or _COST.search(n)), default=""):
            return word
        if any(_costs_a_target(n) for n in ast.walk(part) if isinstance(n, (ast.Call, ast.Subscript))):
            return last_name(part)
    return ""


def _scoring(tree: ast.Module) -> Iterator[Scope]:
    """Scopes whose losses may be scores: a training loss may choose its tokens."""
    trains = (s for s in scopes(tree) if _TRAINS.search(s.name))
    excused = {id(s) for s in trains if not (EVALUATES.search(s.name) or _ADAPTS.search(s.name))}
    yield from (s for s in scopes(tree) if id(s) not in excused)


def _thresholds(tree: ast.Module) -> Found:
    """`w = where(target_logp > -2, a, b)`: the weight of an expert is chosen by what the target turned out to cost."""
    for scope in _scoring(tree):
        compared = [n for test in scope.of(ast.Compare) for n in names(test)]
        costs = _target_costs(scope) if compared else set()
        if not any(n in costs or _OF_TARGET.search(n) for n in compared):
            continue
        for line, test in _weighing_tests(scope):
            for compare in (t for t in ast.walk(test) if isinstance(t, ast.Compare)):
                words = names(compare)
                cost = min((n for n in words if n in costs or _OF_TARGET.search(n)), default="")
                if cost and not any(re.search(r"best|isfinite|isnan", n, re.I) for n in words):
                    yield THRESHOLD, line, cost


def _weighing_tests(scope: Scope) -> Iterator[tuple[int, ast.AST]]:
    """(line, expression) of what decides between two values or a weight."""
    yield from ((n.lineno, n.args[0]) for n in scope.of(ast.Call) if last_name(n.func) == "where" and n.args)
    yield from ((n.lineno, n.test) for n in scope.of(ast.IfExp))
    weighed = (n for n in scope.of(ast.If) if any(_WEIGHT.search(w) for part in n.body for w in _assigned(part)))
    yield from ((n.lineno, n.test) for n in weighed)
    yield from ((n.lineno, n.value) for n in scope.of(ast.Assign) if any(map(_WEIGHT.search, _assigned(n))))


def _assigned(node: ast.AST) -> set[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {n for t in targets if t is not None for n in names(t)}


def _target_costs(scope: Scope) -> set[str]:
    """Names that hold what each target costs: gathered at the target, or a cross entropy without reduction."""
    costly = {id(n) for n in scope.of(ast.Call, ast.Subscript) if _costs_a_target(n)}
    costs: set[str] = set()
    for node in scope.of(ast.Assign) if costly else ():
        copied = isinstance(node.value, (ast.UnaryOp, ast.Name)) and names(node.value) & costs
        if copied or any(id(n) in costly for n in ast.walk(node.value)):
            costs |= _assigned(node)
    return costs


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
                yield NO_DISTRIBUTION, node.lineno, odd[0]


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


def _network(tree: ast.Module) -> Found:
    """Modules, calls and commands that reach the network while the script runs."""
    for module, line in imports(tree):
        if module.split(".")[0] in _NETWORK:
            yield "network module", line, module
    for call in every(tree, ast.Call):
        name = last_name(call)
        if name in _FETCHES or dotted(call.func).startswith("torch.hub."):
            yield "network access", call.lineno, name
        elif name in _COMMANDS:
            words = [n.value for a in call.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            if found := _FETCHING.search(" ".join(w for w in words if isinstance(w, str))):
                yield "network access", call.lineno, found[0]


def _rejected_names(tree: ast.Module) -> Found:
    """First use of each name (or knob in a string) that belongs to a method ruled out."""
    first: dict[str, int] = {}
    for node in nodes(tree):
        word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[A-Z_0-9]+", node.value):
            word = node.value
        if isinstance(word, str) and hasattr(node, "lineno"):
            first[word] = min(node.lineno, first.get(word, node.lineno))
    for what, pattern in REJECTED.items():
        if found := [(line, word) for word, line in first.items() if pattern.search(word)]:
            yield f"name of a rejected method: {what}", *min(found)


def is_off(value: object) -> bool:
    """Whether a knob's value, as logs or code print it, switches a method off."""
    return value is not None and str(value).strip().lower() in ("0", "0.0", "false", "off", "no", "none", "")


def defaults(tree: ast.Module) -> dict[str, object]:
    """name -> default of every `name = os.environ.get("NAME", default)`, in a conversion or not, and of constants."""
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
    yield from ((LEARNED, line, name) for line, name in flow.learned_first())
    yield from ((STORED if "compress" in name else SAVED, line, name) for line, name in flow.stored())
