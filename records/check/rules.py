"""The challenge's rules, asked of a record folder: PASS, WARN or FAIL a line. The folder's code is read, never run.

WARN means "a person must look": either a rule bent within what was accepted before, or something a folder cannot show.
One fact has one verdict: a figure over a limit is judged by the rule of that limit alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import runs as logs
from runs import Run, UserError
from stats import Sample, welch
from tables import RECORD_GAIN_NATS, RECORD_P
from textlog import seed_in_name

from check import leaks, patterns, source
from check.entry import Entry, is_number, near, read_entry, shows

LIMIT_BYTES, LIMIT_SECONDS, RECORD_SEEDS = 16_000_000, 600.0, 3
FINEWEB_VAL_BYTES = 151_075_000  # text bytes of the first 50,000 documents; exports differ by a few tenths of a percent
SPACES_TWICE = 1.177  # text bytes and its spaces once more, over text bytes
LEAST_BPB = 1e-5  # a figure below it is none
BEST_VERIFIED, BEST_VERIFIED_BY = (
    1.0565,
    "PR 2135",
)  # bpb; every record-track folder below it that was opened was invalid
IMPLAUSIBLE_BPB = 1.0
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
OPTIONAL = ("libcst", "brotli", "zstandard", "scipy")  # what reads newer Python and packed scripts, and tests a gain
AUDIT = "audit (C1-C4)"
LAST_DAY = "2026-05-02"
RULED = {  # of the flags that records carry: these are rules, the others say which methods were used
    "artifact_under_16mb": "bytes",
    "train_under_600s": "training time",
    "eval_under_600s": "evaluation time",
    "three_seeds": "seeds",
    "full_validation_targets": "validation text",
    "score_before_update": AUDIT,
    "no_validation_training_leak": "validation documents in training",
    "val_tokens_equal_target_tokens": "validation text",
}
SAME_NAMES = 0.6  # share of a script's names that a minifier leaves


@dataclass(frozen=True)
class Check:
    status: str
    rule: str
    detail: str


def checks(entry: Entry) -> list[Check]:
    """Every rule's verdict, in the order a reviewer goes: files, figures, limits, seeds, data, code, score."""
    groups = (files, figures, limits, seeds, data, code, validity)
    found = [check for group in groups for check in _asked(group, entry)]
    status = {c.rule: c.status for c in found}
    for index, check in enumerate(found):
        if check.rule == "own compliance list" and check.status == FAIL:
            broken = [name for name, rule in RULED.items() if name in check.detail]
            if all(status.get(RULED[name]) == WARN for name in broken):  # the same fact, judged by its own rule
                found[index] = Check(WARN, check.rule, check.detail)
    return found


def _unprovable(what: str, ask: str) -> str:
    """Of a fact that only other material can prove."""
    return f"{what} cannot be known, not provable from this folder: ask for {ask}"


def _asked(question: Callable[[Entry], Lines | Line], entry: Entry) -> list[Check]:
    """A question's verdicts; what stops it is one of them, and takes no other with it."""
    found: list[Check] = []
    try:
        lines = question(entry)
        for line in [lines] if isinstance(lines, tuple) else lines:
            found.append(Check(*line))
    except UserError:
        raise
    except Exception as error:  # a folder of others may hold what no rule foresaw
        name = question.__name__.strip("_").replace("_", " ")
        found.append(Check(WARN, name, f"could not be asked to the end: {type(error).__name__}: {error}"))
    return found


def _each(entry: Entry, *questions: Callable[[Entry], Lines | Line]) -> Lines:
    for question in questions:
        yield from ((c.status, c.rule, c.detail) for c in _asked(question, entry))


# ---- Files and figures

Line = tuple[str, str, str]
Lines = Iterator[Line]


def files(entry: Entry) -> Lines:
    for name in ("README.md", "submission.json"):
        there = (entry.folder / name).is_file()
        yield PASS if there else FAIL, f"file {name}", "present" if there else "missing"
    yield _script_file(entry)
    if not (entry.folder / "requirements.txt").is_file():
        yield WARN, "file requirements.txt", "missing: the versions that ran stand nowhere but in the logs"
    if entry.scored:
        yield PASS, "training logs", ", ".join(dict.fromkeys(r.path.name for r in entry.scored))
    else:
        yield FAIL, "training logs", "no log with a final score: nothing supports the figures"
    for run in entry.runs:
        if run.score is None or run.damage:
            yield FAIL, f"log {run.path.name}", run.status()
    told = {r.path for r in (*entry.scored, *(other for _, other in entry.reruns))}
    if cut := [r for r in entry.others if r.mode == "train" and r.steps and r.path not in told]:
        ends = "; ".join(f"{r.path.name} (seed {r.seed}) at step {r.last_step}" for r in cut)
        yield WARN, "logs without a score", f"{ends}: a run that was cut, or one that was left out"
    if entry.copies:
        pairs = "; ".join(f"{other.path.name} is {kept.path.name}" for kept, other in entry.copies)
        yield PASS, "copies of logs", f"counted once: {pairs}"
    for message in entry.unreadable:
        yield WARN, "log unreadable", message


def _script_file(entry: Entry) -> Line:
    rule, script = "file train_gpt.py", entry.script
    if script is None:
        return FAIL, rule, "missing, and no other script of this folder trains"
    if script.name != "train_gpt.py":
        return WARN, rule, f"missing; {script.name} ({len(script.outer):,} bytes) is read in its place"
    if not script.outer.strip():
        return FAIL, rule, f"empty ({len(script.outer):,} bytes)"
    return PASS, rule, "present"


def figures(entry: Entry) -> Lines:
    """submission.json: readable, complete, and equal to what the logs say; a claimed figure is never val_bpb."""
    if entry.broken_json:
        yield FAIL, "submission.json", entry.broken_json
    if entry.submission is None:
        return
    meta = entry.meta
    missing = [k for k in ("author", "github_id", "name", "date", "val_bpb") if meta.get(k) in (None, "")]
    status = FAIL if "val_bpb" in missing else WARN if missing else PASS
    other = [f"{k} is {v:.5f}" for k, v in _mean_figures(entry)] if "val_bpb" in missing else []
    other += (odd := _odd_fields(meta))
    status = WARN if odd and status == PASS else status
    detail = "; ".join([f"empty: {', '.join(missing)}"] * bool(missing) + other) or "complete"
    yield status, "submission fields", detail
    flags = meta.get("compliance") if isinstance(meta.get("compliance"), dict) else {}
    if broken := [k for k, v in flags.items() if v is False]:
        ruled = any(k in RULED for k in broken)
        yield entry.bent(FAIL) if ruled else WARN, "own compliance list", f"says no to: {', '.join(broken)}"
    yield from _each(entry, _seed_results, _gain, _dated)
    if is_number(bpb := meta.get("val_bpb")):
        yield _supported(entry, float(bpb))
    elif "val_bpb" not in missing:
        yield FAIL, "val_bpb", f"is no number: {bpb!r}"
    if is_number(loss := meta.get("val_loss")) and any(r.loss() for r in entry.scored):
        yield from _supported_loss(entry, float(loss))


def _mean_figures(entry: Entry) -> list[tuple[str, float]]:
    nested = entry.meta.get("results") if isinstance(entry.meta.get("results"), dict) else {}
    named = [(k, place.get(k)) for place in (entry.meta, nested) for k in ("mean_val_bpb", "val_bpb_mean")]
    return [(k, v) for k, v in named if is_number(v)]


def _seed_results(entry: Entry) -> Lines:
    """Each seed that submission.json speaks of has a log, and the log shows its figure."""
    scored = {str(r.seed): r for r in entry.scored}
    named, rule = entry.named_seeds, "a log for each seed"
    if missing := sorted(named - {*scored}):
        told = [_holds_another(entry, seed) for seed in missing]
        yield entry.bent(FAIL), rule, "; ".join(f"none for seed {s}{t}" for s, t in zip(missing, told, strict=True))
    elif named and (more := sorted({*scored} - named)):
        yield WARN, rule, f"logs of seed {', '.join(more)}, of which submission.json does not speak"
    elif odd := [
        r for r in entry.scored if None not in (seed_in_name(r.path), r.seed) and seed_in_name(r.path) != r.seed
    ]:
        yield WARN, rule, "; ".join(f"{r.path.name} holds seed {r.seed}" for r in odd)
    for seed in sorted({*entry.seed_results} & {*scored}):
        said, run = entry.seed_results[seed].get("val_bpb"), scored[seed]
        if is_number(said) and not shows(run, said):
            yield FAIL, f"val_bpb of seed {seed}", f"{said:.5f}, but its log's score is {run.bpb():.5f}"


def _holds_another(entry: Entry, seed: str) -> str:
    """What the file named after a missing seed holds instead."""
    known = [*entry.runs, *entry.others, *(r for pair in (*entry.copies, *entry.reruns) for r in pair)]
    named = [r for r in known if str(seed_in_name(r.path)) == seed]
    if not named:
        return ""
    run = named[0]
    if str(run.seed) != seed:
        return f": {run.path.name} holds seed {run.seed}"
    return "" if run.score else f": {run.path.name} ends at step {run.last_step} without a score"


def _gain(entry: Entry) -> Lines:
    """The gain over the baseline that submission.json names, against the spread of its own seeds."""
    meta, scored = entry.meta, [r for r in entry.scored if r.loss()]
    base = next((meta[k] for k in ("comparison_baseline_bpb", "base_val_bpb") if is_number(meta.get(k))), None)
    if base is None or not scored:
        return
    own, factor = Sample.of([r.bpb() for r in scored]), fmean(r.loss() / r.bpb() for r in scored)
    gain = (base - own.mean) * factor
    detail = f"{gain:+.5f} nats/token over the {base:.5f} bpb it compares with, {len(scored)} seed(s)"
    try:
        p = welch(Sample(base, math.nan, 0), own, margin=RECORD_GAIN_NATS / factor).p
    except UserError as error:
        yield WARN, "gain", f"{detail}: {error}"
        return
    if math.isnan(p):
        yield WARN, "gain", f"{detail}: no spread, so no test"
        return
    proof = f"p {p:.2g} of a gain below {RECORD_GAIN_NATS} (the baseline's own spread is not known)"
    yield PASS if p < RECORD_P else WARN, "gain", f"{detail}: {proof}" + ("" if p < RECORD_P else ", within noise")


def _dated(entry: Entry) -> Lines:
    date = str(entry.meta.get("date") or "")[:10]
    if date and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        yield WARN, "date", f"{entry.meta['date']!r:.60}: expected YYYY-MM-DD"
    elif entry.is_record and date > LAST_DAY:
        yield WARN, "date", f"{date}: entries after {LAST_DAY} were taken as non-record"


def _leaves(meta: object, names: set[str]) -> list[tuple[str, object]]:
    """(name, value) of all that submission.json says under one of `names`, at any depth, by seed or not."""
    found, waiting = [], [("", meta)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(k if k in names else name, v) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(name, v) for v in value]
        elif name and value is not None:
            found.append((name, value))
    return found


def _number(value: object) -> float | None:
    """A number, or a text that is one: "16,100,000", "599.8 s"."""
    if isinstance(value, str) and re.fullmatch(r"[\d,_]*\d(?:\.\d+)?(?: ?(?:bytes|s|seconds))?", value.strip()):
        return float(re.sub(r"[,_ a-z]", "", value))
    return value if is_number(value) else None


def _said(meta: object, names: set[str]) -> list[float]:
    """Every number under one of `names`, at any depth of submission.json."""
    return [n for _, value in _leaves(meta, names) if (n := _number(value)) is not None]


def _odd_fields(meta: dict) -> list[str]:
    """Fields of another type than every reader of records takes them for."""
    odd = [k for k, kind in _TYPES.items() if k in meta and meta[k] is not None and not isinstance(meta[k], kind)]
    told = [f"{k} is {meta[k]!r:.60}" for k in odd]
    numbers = _leaves(meta, _TOTALS | _TRAIN_S | _TRAIN_MS | _EVAL_S)
    return told + [f"{k} is {v!r:.60}, no number" for k, v in numbers if _number(v) is None]


def _supported(entry: Entry, bpb: float) -> Line:
    """Whether the logs' mean (or one log) shows `bpb` as a stage, or only as a claimed figure."""
    scored, rule = entry.scored, "val_bpb"
    named = [r for r in scored if str(r.seed) in entry.named_seeds]
    named = named if named and len(named) == len(entry.named_seeds) else scored
    means = {"score": [r.bpb() for r in named]}
    means |= {f"stage {s}": [r.bpb(s) for r in named if s in r.stages] for s in {s for r in named for s in r.stages}}
    claims = [c["claimed_bpb"] for r in entry.runs for c in r.claims]
    scores = f"the logs' scores are {', '.join(f'{r.bpb():.5f}' for r in scored)}"
    for what, values in means.items():
        if values and abs(fmean(values) - bpb) < near(bpb):
            return PASS, rule, f"{bpb:.5f} is the mean of the logs' {what} ({len(values)} log(s))"
    if claims and min(abs(c - bpb) for c in [*claims, fmean(claims)]) < near(bpb):
        return FAIL, rule, f"{bpb:.5f} is a claimed figure (no code length); {scores}"
    for what, values in means.items():
        if values and min(abs(v - bpb) for v in values) < near(bpb):
            mean = f"the mean over {len(values)} is {fmean(values):.5f}"
            return entry.bent(WARN), rule, f"{bpb:.5f} is one log's {what}; {mean}"
    return (FAIL, rule, f"{bpb:.5f}, but {scores}") if scored else (WARN, rule, f"{bpb:.5f}: no log shows it")


def _supported_loss(entry: Entry, loss: float) -> Lines:
    """Whether the logs show `val_loss`, as the mean of a stage or in one log; nothing to say if they do."""
    stages = {s for r in entry.scored for s in r.stages}
    each = [[r.loss(s) for r in entry.scored if s in r.stages] for s in stages] + [[r.loss() for r in entry.scored]]
    shown = [v for values in each for v in (*values, fmean(values))] if all(None not in v for v in each) else []
    if shown and min(abs(v - loss) for v in shown) >= near(loss):
        losses = ", ".join(f"{r.loss():.5f}" for r in entry.scored)
        yield WARN, "val_loss", f"{loss:.5f}, but the logs' scores are {losses} nats/token"


# ---- Limits

_TOTALS = {"bytes_total", "total_bytes", "artifact_bytes", "artifact_bytes_max", "max_artifact_bytes", "counted_bytes"}
_TRAIN_S, _TRAIN_MS = {"train_time_s", "train_wallclock_seconds"}, {"train_wallclock_ms", "train_wallclock_ms_max"}
_EVAL_S = {"eval_time_s", "ttt_eval_time_s", "eval_time_s_max", "eval_seconds", "max_eval_seconds"}
_TYPES = {
    **dict.fromkeys(("author", "name", "date", "track"), str),
    **{"github_id": str | int, "seeds": list | dict, "seed_results": dict, "compliance": dict},
}


def limits(entry: Entry) -> Lines:
    yield from _each(entry, _bytes, _hardware, _training_time, _evaluation_time)
    for run in entry.scored:
        over = [(run.train_s, LIMIT_SECONDS), (run.eval_s, LIMIT_SECONDS), (run.total_bytes, LIMIT_BYTES)]
        told = any(value is not None and value > limit for value, limit in over)
        if run.score.get("limits_ok") is False and not told:
            yield entry.bent(FAIL), f"limits of {run.path.name}", run.status()


def _totals(entry: Entry) -> list[int]:
    """Every total that logs and submission.json give, code included: a log's may be the model alone."""
    return [*(_whole_total(entry, r) for r in entry.runs if r.total_bytes), *map(int, _said(entry.meta, _TOTALS))]


def _whole_total(entry: Entry, run: Run) -> int:
    pack = run.pack or {}
    alone = pack.get("artifact_bytes") == run.total_bytes
    on_disk = len(entry.script.outer) if entry.script else 0
    return run.total_bytes + ((pack.get("code_bytes") or on_disk) if alone else 0)


def _bytes(entry: Entry) -> Lines:
    logged = [r.total_bytes for r in entry.runs if r.total_bytes]
    totals = _totals(entry)
    if not totals:
        yield WARN, "bytes", _unprovable("the total", "logs or a submission.json that give it")
        return
    worst = max(totals)
    detail = f"{worst:,} of {LIMIT_BYTES:,} (largest of {len(totals)} figures)"
    if alone := next((r for r in entry.runs if r.total_bytes and _whole_total(entry, r) > r.total_bytes), None):
        detail += (
            f"; the total of {alone.path.name}, {alone.total_bytes:,}, is the model's alone: the code was not counted"
        )
    packed = _with_packed_code(entry)
    if worst <= LIMIT_BYTES:
        yield WARN if alone else PASS, "bytes", detail
    elif packed and worst == max(logged) and packed <= LIMIT_BYTES:
        yield WARN, "bytes", f"{detail}: counted with unpacked code; with the packed {entry.script.name} {packed:,}"
        worst = packed
    else:
        yield FAIL, "bytes", detail
    if entry.script and entry.script.outer.strip():
        yield from _code_bytes(entry, len(entry.script.outer))
        yield _helper_bytes(entry, worst)


def _packs(entry: Entry) -> list[dict]:
    return [r.pack for r in entry.runs if r.pack and r.pack.get("code_bytes")]


def _with_packed_code(entry: Entry) -> int | None:
    """The largest total if logs counted the source and the folder ships the packed script that holds it."""
    script = entry.script
    if script is None or not script.layers:
        return None
    packs = [p for p in _packs(entry) if p.get("total_bytes") and p["code_bytes"] > len(script.outer)]
    return max((p["total_bytes"] - p["code_bytes"] + len(script.outer) for p in packs), default=None)


def _code_bytes(entry: Entry, on_disk: int) -> Lines:
    packs, name = _packs(entry), entry.script.name
    counted = sorted({p["code_bytes"] for p in packs})
    if on_disk in counted:
        yield PASS, "code bytes", f"{name} is the {on_disk:,} bytes that were counted"
        return
    if not counted:
        return
    sizes = [p.stat().st_size for p in entry.helpers]
    if sizes and {on_disk + sum(sizes), *sizes} & {*counted}:
        whole = on_disk + sum(sizes)
        total = whole + max(p.get("artifact_bytes", 0) for p in packs)
        status = PASS if whole in counted or total <= LIMIT_BYTES else entry.bent(FAIL)
        yield (
            status,
            "code bytes",
            f"{name} and its helper files have {whole:,} bytes, of which the logs counted {counted[-1]:,}",
        )
        return
    figures = f"{name} has {on_disk:,} bytes, the logs counted {', '.join(f'{c:,}' for c in counted)}"
    unpacked = sorted({p["code_uncompressed"] for p in packs if p.get("code_uncompressed")})
    if on_disk in unpacked:
        yield WARN, "code bytes", f"{figures}: readable source, whose packed form was counted"
        return
    detail = (
        f"{figures}; it differs from the {', '.join(f'{c:,}' for c in unpacked)} uncompressed" if unpacked else figures
    )
    total = on_disk + max(p.get("artifact_bytes", 0) for p in packs)
    if total <= LIMIT_BYTES:
        yield WARN, "code bytes", detail
    elif not entry.script.layers and min(counted) > 0.5 * (packs_to := source.packed_size(entry.script)):
        yield WARN, "code bytes", f"{detail}; packed by LZMA it takes {packs_to:,}, so the count can be its packed form"
    else:
        yield entry.bent(FAIL), "code bytes", f"{detail}; with the file as it is the total is {total:,}"


def _helper_bytes(entry: Entry, total: int) -> Line:
    found, rule, script = entry.helpers, "helper files", entry.script
    if not found:
        return PASS, rule, f"{script.name} uses no file of this folder but itself"
    extra = sum(p.stat().st_size for p in found)
    named, whole = f"{', '.join(p.name for p in found)}: {extra:,} bytes", f"{total + extra:,}"
    own = {len(script.outer), len(script.source.encode("utf-8", "surrogateescape"))}
    counts = [c for p in _packs(entry) for c in (p["code_bytes"], p.get("code_uncompressed")) if c]
    counts += _said(entry.meta, {"bytes_code", "code_bytes"})
    if counts and min(counts) in {p.stat().st_size for p in found} and len(found) == 1:
        extra = len(script.outer)  # the helper was counted, and the file that runs it was not
        if total + extra <= LIMIT_BYTES:
            return PASS, rule, f"{named}, counted already; {script.name} itself adds {extra:,}"
    if counts and min(counts) >= min(own) + extra:
        return (
            PASS,
            rule,
            f"{named}, counted already: {int(min(counts)):,} bytes of code, {min(own):,} in {script.name}",
        )
    if total + extra > LIMIT_BYTES:
        packed = sum(source.packed_bytes(p.read_bytes()) for p in found)
        if script.layers and total + packed <= LIMIT_BYTES:
            return (
                WARN,
                rule,
                f"{named}; {whole} breaks the limit, packed as {script.name} is {total + packed:,} keep it",
            )
        return FAIL, rule, f"{named} that the total must hold; {whole} breaks the limit"
    return WARN, rule, f"{named}; if not counted yet, the total is {whole}, within the limit"


def _hardware(entry: Entry) -> Line:
    found = {(r.info.get("device_name"), r.info.get("world_size")) for r in entry.scored}
    known = {f"{ranks or '?'} x {device}" for device, ranks in found if device}
    if not known:
        return WARN, "hardware", _unprovable("what it ran on (8 x H100 in the record track)", "logs that name it")
    good = all("H100" in (device or "H100") and ranks in (8, None) for device, ranks in found)
    return (
        PASS if good else entry.bent(FAIL),
        "hardware",
        f"{', '.join(sorted(known))}; the record track runs on 8 x H100",
    )


def _train_seconds(entry: Entry) -> list[float]:
    said = [*_said(entry.meta, _TRAIN_S), *(ms / 1000 for ms in _said(entry.meta, _TRAIN_MS))]
    return said + [r.train_s for r in entry.scored if r.train_s is not None]


def _eval_seconds(entry: Entry) -> list[float]:
    return _said(entry.meta, _EVAL_S) + [r.eval_s for r in entry.scored if r.eval_s is not None]


def _training_time(entry: Entry) -> Line:
    """Over by up to one step is how the baseline stops; logs give means, so a step may take thrice as long."""
    seconds = _train_seconds(entry)
    steps = [r.slowest_step_s for r in entry.runs if r.slowest_step_s]
    if not seconds:
        return WARN, "training time", _unprovable("it", "logs with times")
    detail = f"{max(seconds):.1f} s of {LIMIT_SECONDS:.0f} s"
    calibrated = max((r.train_s + r.info.get("calibration_s", 0.0) for r in entry.scored if r.train_s), default=0.0)
    if max(seconds) <= LIMIT_SECONDS < calibrated:
        why = "with the calibration that the log times, which counts as training"
        return WARN, "training time", f"{detail}; {calibrated:.1f} s {why}"
    if max(seconds) <= LIMIT_SECONDS:
        return PASS, "training time", detail
    if max(seconds) <= LIMIT_SECONDS + min(3 * max(steps, default=0.0), 0.5):
        over = f"{1000 * (max(seconds) - LIMIT_SECONDS):.0f} ms over, less than a slow step"
        return WARN, "training time", f"{detail}: {over}, as the baseline's stop rule allows"
    return _over(entry, "training time", detail)


def _evaluation_time(entry: Entry) -> Line:
    seconds = _eval_seconds(entry)
    if not seconds:
        return WARN, "evaluation time", _unprovable("it", "logs with times")
    worst = max(entry.scored, key=lambda r: r.eval_s or 0.0, default=None)
    apart = ", ".join(f"{k} {v:.1f} s" for k, v in worst.info.get("adapt_s", {}).items()) if worst else ""
    detail = f"{max(seconds):.1f} s of {LIMIT_SECONDS:.0f} s"
    if max(seconds) > LIMIT_SECONDS:
        return _over(
            entry, "evaluation time", detail + (f" (adaptation and scoring together; {apart})" if apart else "")
        )
    together = max((r.info.get("eval_s_if_apart", 0.0) for r in entry.scored), default=0.0)
    if together > LIMIT_SECONDS:
        return WARN, "evaluation time", f"{detail}; {together:.1f} s if adaptation ({apart}) is not in the score's time"
    return PASS, "evaluation time", detail


def _over(entry: Entry, rule: str, detail: str) -> Line:
    return entry.bent(FAIL), rule, detail if entry.is_record else f"{detail}: more than the record track allows"


# ---- Seeds


def seeds(entry: Entry) -> Lines:
    scored = entry.scored
    enough = len(scored) >= RECORD_SEEDS
    names = ", ".join(str(r.seed) for r in scored) or "none"
    yield PASS if enough else entry.bent(FAIL), "seeds", f"{len(scored)} ({names}); a record shows {RECORD_SEEDS}"
    if again := [(kept, other) for kept, other in entry.reruns if other.score]:
        told = "; ".join(
            f"seed {kept.seed}: {kept.bpb():.5f} in {kept.run_id}, {other.bpb():.5f} in {other.run_id}"
            for kept, other in again
        )
        yield WARN, "seeds differ", f"a seed that ran more than once counts once, as submission.json has it: {told}"
    if len(scored) > 1:
        yield from _each(entry, _one_config, _one_code)
    yield from _each(entry, _script_is_logged)


def _one_config(entry: Entry) -> Line:
    scored = entry.scored
    places = [n for n in logs.changed(scored) if n != "code" and not _names_the_run(n, scored)]
    if not places:
        return PASS, "one configuration", "equal over the seeds, as far as the logs tell"
    mixed = "; ".join(f"{n}: {_values(n, scored)}" for n in places[:6])
    sure = all(r.path.suffix == ".jsonl" for r in scored)  # pairs read off foreign text may be no knobs at all
    return FAIL if sure else WARN, "one configuration", f"the seeds differ in {mixed}"


def _values(name: str, scored: list[Run]) -> str:
    return ", ".join(sorted({logs.show(logs.settings(r).get(name)) for r in scored}))


def _names_the_run(name: str, scored: list[Run]) -> bool:
    """A text log's pair that holds the seed or run id (an output folder, say) is no difference of configuration."""
    return all(str(r.seed) in (v := str(logs.settings(r).get(name))) or r.run_id in v for r in scored)


def _one_code(entry: Entry) -> Line:
    scored = entry.scored
    hashes = {r.info.get("source_sha256") or _sha(r.source) for r in scored}
    if hashes == {None}:
        return WARN, "one script", _unprovable("it", "logs that hold source or hash")
    if len(hashes - {None}) == 1:
        silent = [r.path.name for r in scored if not (r.info.get("source_sha256") or r.source)]
        said = f"; {', '.join(silent)} holds none" if silent else ""
        return PASS, "one script", f"all logs that hold one name {next(iter(hashes - {None}))[:12]}{said}"
    detail = f"the logs hold {len(hashes - {None})} different scripts"
    configs = [{k.lower(): v for k, v in r.config.items()} for r in scored]
    same, but = source.alike([r.source for r in scored if r.source], configs)
    if same:
        return PASS, "one script", f"{detail}, which differ in comments and defaults that the environment replaced"
    if but:
        return WARN, "one script", f"{detail}, which differ in values of constants alone"
    return FAIL, "one script", detail


def _script_is_logged(entry: Entry) -> Lines:
    """The script is what ran: by hash where the log has one, else by the source printed in the log."""
    scored = entry.scored
    if not entry.script or not entry.script.outer.strip() or not scored:
        return
    rule, name = "script that ran", entry.script.name
    logged = {h for r in scored for h in (r.info.get("source_sha256"), r.info.get("packed_sha256")) if h}
    dumped = [r.source for r in scored if r.source]
    if logged:
        same = bool(logged & entry.script.hashes())
        detail = f"{name} is the one in the logs" if same else f"{name} is not the one in the logs"
        yield PASS if same else entry.bent(FAIL), rule, detail
    elif dumped:
        yield _like_the_dump(entry, dumped)
    else:
        yield WARN, rule, _unprovable("it", "logs that hold source or hash")


def _like_the_dump(entry: Entry, dumped: list[str]) -> Line:
    """Equal, equal but for comments, perhaps the same in another form (a person must look), or another script."""
    rule, name, texts = "script that ran", entry.script.name, list(dict.fromkeys(dumped))
    inner = entry.script.source.encode("utf-8", "surrogateescape")
    shipped = [_lines(text.decode("utf-8", "replace")) for text in (entry.script.outer, inner)]
    if any(_lines(dump) in shipped for dump in texts):
        return PASS, rule, f"{name} is the one in the logs"
    like = max((source.likeness(entry.script, dump) for dump in texts), key=lambda k: (k.equal, k.constants, k.names))
    if like.equal:
        return (
            PASS,
            rule,
            f"{name} is the one in the logs, comments and formatting aside, under the environment of the runs",
        )
    if like.constants:
        return WARN, rule, f"{name} is the one in the logs but for values of constants"
    if not like.form and like.names > SAME_NAMES:
        return (
            WARN,
            rule,
            f"{name} has the names of the one in the logs, in another form (packed or minified): not compared",
        )
    share, odd = max(_shared(lines, _lines(dump)) for lines in shipped for dump in texts)
    detail = f"{name} is not the one in the logs: {100 * share:.0f} % of the lines are shared"
    return entry.bent(FAIL), rule, f"{detail}; the first that is not: {odd[:80]}" if share > 0.5 else detail


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def _shared(one: list[str], other: list[str]) -> tuple[float, str]:
    """Share of the lines of both that the other has too, and the first that it has not."""
    sets = set(one), set(other)
    odd = [line for line in one if line not in sets[1]] + [line for line in other if line not in sets[0]]
    return 1 - len(odd) / (len(one) + len(other)), odd[0].strip() if odd else "a line's place"


def _sha(text: str | None) -> str | None:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() if text else None


# ---- Data


def data(entry: Entry) -> Lines:
    scored = entry.scored
    if any(r.info.get("data", {}).get("sample") for r in scored):
        yield entry.bent(FAIL), "data", "the shipped sample, not FineWeb: no figure here compares with the leaderboard"
    else:
        yield from _each(entry, _validation_size)
    partial = [r.path.name for r in scored if not r.score.get("complete", True)]
    if partial:
        yield FAIL, "validation complete", f"only a part was scored in {', '.join(partial)}"
    elif scored and all("complete" in (r.score or {}) and r.path.suffix == ".jsonl" for r in scored):
        yield PASS, "validation complete", "every target scored, says each log"
    if (shards := _train_shards(entry)) > 200:
        yield WARN, "training shards", f"{shards}: the self-made export that trained on validation documents had 1,499"
    yield _leaks(entry, scored)


def _train_shards(entry: Entry) -> int:
    counts = [str(r.info.get("data", {}).get("train_shards", "")) for r in entry.scored]
    return max((int(s) for s in counts if s.isdigit()), default=0)


def _scored_tokens(entry: Entry, run: Run) -> int | None:
    """Of the stage, else of the validation split, else as submission.json has it for this seed."""
    said = _said(entry.seed_results.get(str(run.seed), {}), {"target_tokens", "val_tokens"})
    known = (run.stages.get(run.stage, {}).get("tokens"), run.info.get("data", {}).get("val_tokens"), *map(int, said))
    return next((tokens for tokens in known if isinstance(tokens, int)), None)


def _validation_size(entry: Entry) -> Lines:
    """Text bytes that the score implies (tokens x nats / ln 2 / bpb) against the official split's."""
    rule, implied, mixed = "validation text", [], []
    for run in entry.scored:
        tokens, loss, bpb = _scored_tokens(entry, run), run.loss(), run.bpb()
        if tokens and loss and bpb and bpb > LEAST_BPB:
            implied.append(tokens * loss / math.log(2) / bpb)
            mixed += [s for s in _of_another_stage(run) if not _official(implied[-1])]
    if not implied:
        yield WARN, rule, _unprovable("the text's size", "a log that prints val_loss, val_bpb and the number of tokens")
        return
    worst = max(implied, key=lambda b: abs(math.log(b / FINEWEB_VAL_BYTES)))
    factor = worst / FINEWEB_VAL_BYTES
    two = f"the two figures imply {worst:,.0f} bytes; the validation text of 50,000 documents has {FINEWEB_VAL_BYTES:,}"
    if _official(worst):
        yield PASS, rule, two
    elif mixed:
        yield WARN, rule, f"{two}; the val_loss is that of {mixed[0]}, so nothing follows from the pair"
    elif abs(factor / SPACES_TWICE - 1) < 0.01:
        yield (
            entry.bent(FAIL),
            rule,
            f"{two}: spaces counted twice give {SPACES_TWICE:g} times the bytes, here {factor:.3f}",
        )
    elif factor > 1:
        yield WARN, rule, f"{two}: val_loss and val_bpb are not of one scoring, or bytes were counted that are none"
    else:
        yield entry.bent(FAIL), rule, f"{two}: a part of the text, or bytes not counted"


def _official(size: float) -> bool:
    return abs(size / FINEWEB_VAL_BYTES - 1) < 0.01


def _of_another_stage(run: Run) -> list[str]:
    """Stages and validations whose loss the score repeats beside another bpb: the network's, beside a mixture's bpb."""
    stages = [(name, e.get("val_loss"), e.get("val_bpb")) for name, e in run.stages.items() if name != run.stage]
    stages += [(f"step {e['step']}", e.get("val_loss"), e.get("val_bpb")) for e in run.vals]
    return [
        f"{name} ({bpb:.4f} bpb)"
        for name, loss, bpb in stages
        if loss and bpb and abs(loss - run.loss()) < 2e-4 and abs(bpb - run.bpb()) > 2e-4
    ]


def _leaks(entry: Entry, scored: list[Run]) -> Line:
    rule, paths = "validation documents in training", [r.info.get("data", {}).get("path") for r in scored]
    here = [p for p in paths if isinstance(p, str) and list(Path(p).glob("fineweb_train_*.bin"))]
    if not (entry.data_path or here):
        return WARN, rule, _unprovable("a leak", "the training shards (then --data-path), or what made them")
    folder = Path(entry.data_path or here[0])
    overlap = leaks.find_overlap(folder)
    if not overlap.leaked and (why := leaks.refused(folder)):
        return FAIL, "validation text as the script checks it", why
    return FAIL if overlap.leaked else WARN if overlap.found else PASS, rule, str(overlap)


# ---- Code

HARD = {
    patterns.TARGET_KEY,
    patterns.LEARNED,
    patterns.IN_TRAINING,
    patterns.ORACLE,
    patterns.TRAINED,
    patterns.THRESHOLD,
    patterns.STORED,
}


def code(entry: Entry) -> Lines:
    """Static reading of the script: what cannot be read, and patterns that got entries rejected."""
    script = entry.script
    if script is None:
        yield FAIL, "code readable", "no script: nothing of the code was checked"
        return
    if script.unread:
        yield WARN, "code readable", f"{script.name}: {script.unread}; its patterns were not looked for"
        return
    if script.opaque:
        yield FAIL, "code readable", f"{script.name}: {script.opaque}; a reviewer cannot read it"
        return
    packed = f"{script.layers} layer(s) of packing undone statically" if script.layers else "plain source"
    yield PASS, "code readable", packed
    grouped: dict[str, list[source.Finding]] = {}
    off: set[str] = set()
    for finding in script.findings:
        if finding.off and (finding.off.logged or finding.pattern not in HARD):
            off.add(finding.off.words)
        elif finding.pattern != patterns.CALIBRATED or _no_time_left(entry):
            grouped.setdefault(finding.pattern, []).append(finding)
    yield from (_finding(entry, pattern, found) for pattern, found in grouped.items())
    note = f"; in the code and not run: {', '.join(sorted(off))}" if off else ""
    if not grouped:
        yield PASS, "code patterns", f"none of those that got entries rejected{note}"
    elif note:
        yield PASS, "code patterns", note.removeprefix("; ")


def _no_time_left(entry: Entry) -> bool:
    """Whether the training took its 600 s, so that what calibrates on its text behind it is on the evaluation's clock."""
    return max(_train_seconds(entry), default=LIMIT_SECONDS) > LIMIT_SECONDS - 2


def _finding(entry: Entry, pattern: str, found: list[source.Finding]) -> Line:
    found = sorted(found, key=lambda f: f.off is not None)
    lines = ", ".join(f"{f.line} of {f.place}" if f.place else str(f.line) for f in found[:5])
    where = f"line {lines}{' ...' * (len(found) > 5)}: {found[0].text}"
    rule, first = f"code: {pattern}", found[0]
    if pattern == patterns.TRAINED:
        where = f"{first.name}, {where}"
    where += f"; the text comes by {first.way}" if first.way else ""
    if pattern not in HARD:
        return WARN, rule, where
    if first.off:
        return WARN, rule, f"{where}; not run as far as code and logs tell ({first.off.words})"
    if _audited(entry)[0] == PASS:
        return WARN, rule, f"{where}; the audit of the scored stage passed, so it takes no part in the score"
    return FAIL, rule, where


# ---- Validity


def validity(entry: Entry) -> Lines:
    """The four conditions: evidence of an audit, and the plausibility of the figure without one."""
    yield _audited(entry)
    yield from _each(entry, _gates)
    bpb, sample = entry.meta.get("val_bpb"), any(r.info.get("data", {}).get("sample") for r in entry.runs)
    if not is_number(bpb):
        bpb = next((v for _, v in _mean_figures(entry)), None)
    if bpb is None or sample or bpb >= (BEST_VERIFIED if entry.is_record else IMPLAUSIBLE_BPB):
        return
    best = f"the best verified score, {BEST_VERIFIED} ({BEST_VERIFIED_BY})"
    detail = f"{bpb:.4f} bpb is below {best}; look first at {_look_first(entry, bpb)}"
    status = FAIL if bpb < IMPLAUSIBLE_BPB and _audited(entry)[0] != PASS else WARN
    yield status, "plausible score", detail


def _gates(entry: Entry) -> Lines:
    """Which gates of an n-gram fired: `token` asks the prefix alone, `within` and `word` look at the target."""
    fired = [(k, n, r.path.name) for r in entry.scored for k, n in r.info.get("gates", {}).items()]
    if ruled_out := [f"{k}_gate={n} in {name}" for k, n, name in fired if k in ("within", "word")]:
        yield entry.bent(FAIL), "n-gram gate", f"{', '.join(ruled_out)}: gates that look at the target were ruled out"
    elif unknown := [f"{k}_gate={n} in {name}" for k, n, name in fired if k != "token"]:
        yield WARN, "n-gram gate", f"{', '.join(unknown)}: whether it looks at the target stands in the code"
    elif fired:
        yield (
            PASS,
            "n-gram gate",
            f"token_gate={fired[0][1]} asks the prefix alone; within_gate and word_gate did not fire",
        )


def _look_first(entry: Entry, bpb: float) -> str:
    """The rule that a score too good most likely breaks, by what the folder shows."""
    shown = [f.pattern for f in (entry.script.findings if entry.script else []) if not f.off]
    for pattern in (patterns.TRAINED, *sorted(HARD), patterns.NO_DISTRIBUTION, patterns.GATE):
        if pattern in shown:
            return f"the code: {pattern}"
    if names := [p for p in shown if p.startswith("name of a rejected method")]:
        return f"the code: {names[0]}"
    if any(line[0] != PASS for line in _validation_size(entry)):
        return "the text's size: validation text"
    if _train_shards(entry) > 200:
        return f"validation documents in training: {_train_shards(entry)} training shards"
    if entry.script is None or entry.script.opaque or entry.script.unread:
        return "the code, which could not be read"
    if bpb < IMPLAUSIBLE_BPB:
        return "condition 2: whether what is mixed in sums to one over the vocabulary"
    return "validation documents in training, then whether adaptation scores before it learns (condition 3)"


def _audited(entry: Entry) -> Line:
    audits = [r for r in [*entry.scored, *entry.others] if r.audit]
    failed = [f"{r.path.name} ({name})" for r in audits for name, passed in logs.audit_checks(r) if not passed]
    failed += [r.path.name for r in audits if not r.audit["passed"] and not failed]
    bare = [r.path.name for r in entry.scored if not r.audit]
    if failed:
        return FAIL, AUDIT, f"failed in {', '.join(failed)}"
    if entry.scored and not bare:
        names = dict.fromkeys(name for r in entry.scored for name, _ in logs.audit_checks(r))
        return PASS, AUDIT, f"passed: {', '.join(names)}"
    what = f"no audit of {', '.join(bare)} (its artifact, its code, its stage)" if audits else "no audit in the logs"
    return WARN, AUDIT, f"{what}; {_unprovable('whether the score is a code length', 'the artifact, to audit it')}"


# ---- A reviewer's summary

_WEIGHT = (  # what matters most: a file that cannot be read, a wrong score, a figure without support, a budget
    r"submission\.json|code readable|file train_gpt|training logs",
    r"code: (?!pickle|network|large)|n-gram gate|validation (?:text|complete)|plausible|audit",
    r"val_bpb|script that ran|one script|a log for each seed",
    r"bytes|helper|time|hardware|seeds$|limits",
    r"seeds differ|one configuration|gain",
)
_ASIDE = re.compile(r"requirements\.txt|pickle|shards|validation documents|submission fields|^date$")


def matter(check: Check) -> tuple:
    """Sort key: failures first, what only other material can prove last, and so a missing list of versions."""
    weight = next((n for n, rule in enumerate(_WEIGHT) if re.search(rule, check.rule)), len(_WEIGHT))
    aside = check.status != FAIL and bool(_ASIDE.search(check.rule))
    return (PASS, WARN, FAIL).index(check.status) * -1, aside, _open(check), weight


def _open(check: Check) -> bool:
    return check.status == WARN and "cannot be known" in check.detail


def summary(entry: Entry, lines: list[Check]) -> Check:
    """One line: verdict, score, bytes, seconds, seeds. PASS: nothing was found, though not everything can be proven."""
    counts = {s: sum(c.status == s for c in lines) for s in (PASS, WARN, FAIL)}
    unproven = [c.rule for c in lines if _open(c)]
    status = FAIL if counts[FAIL] else WARN if counts[WARN] > len(unproven) else PASS
    bpb = entry.meta.get("val_bpb") if is_number(entry.meta.get("val_bpb")) else None
    if bpb is None and entry.scored:
        bpb = fmean(r.bpb() for r in entry.scored)
    totals, train, evals = _totals(entry), _train_seconds(entry), _eval_seconds(entry)
    parts = [
        f"{bpb:.5f} bpb" if bpb is not None else "no score",
        f"{max(totals):,} bytes" if totals else "bytes unknown",
    ]
    parts.append(f"train {max(train):.1f} s" if train else "train time unknown")
    parts.append(f"eval {max(evals):.1f} s" if evals else "eval time unknown")
    parts.append(f"seeds {', '.join(str(r.seed) for r in entry.scored) or 'none'}")
    parts.append(f"{counts[FAIL]} FAIL, {counts[WARN]} WARN, {counts[PASS]} PASS")
    parts += ["nothing found"] * (status == PASS)
    parts += [f"not provable from this folder: {', '.join(unproven)}"] * bool(unproven)
    if missing := [name for name in OPTIONAL if find_spec(name) is None]:
        parts.append(f"without {', '.join(missing)}, which are not installed, some scripts and tests stay unread")
    return Check(status, "summary", "; ".join(parts))


# ---- Command


def check_folders(folders: list[Path], as_json: bool, data_path: str | None) -> int:
    """Prints every folder's verdicts; 1 if any line fails."""
    if wrong := [str(f) for f in folders if not f.is_dir()]:
        raise UserError(f"{', '.join(wrong)}: no such folder")
    results: dict[str, list[Check]] = {}
    for folder in folders:
        results[str(folder)] = _judged(folder, data_path)
        if not as_json:
            print(f"{folder}\n{format_checks(results[str(folder)])}\n")
    if as_json:
        print(json.dumps({f: [vars(c) for c in lines] for f, lines in results.items()}, indent=1))
    return int(any(c.status == FAIL for lines in results.values() for c in lines))


def _judged(folder: Path, data_path: str | None) -> list[Check]:
    """The summary and every verdict; of a folder that no rule was made for, that it could not be read."""
    try:
        entry = read_entry(folder, data_path)
        lines = checks(entry)
        return [summary(entry, lines), *lines]
    except (UserError, OSError):
        raise
    except Exception as error:
        return [Check(WARN, "summary", f"could not be read: {type(error).__name__}: {error}; nothing was checked")]


def format_checks(lines: list[Check]) -> str:
    """The summary if there is one, the three findings that matter most, then every verdict."""
    width = max(len(c.rule) for c in lines if c.rule != "summary") if len(lines) > 1 else 0
    head = [f"  {c.status}  {c.detail}" for c in lines if c.rule == "summary"]
    rest = [c for c in lines if c.rule != "summary"]
    if head:
        found = sorted((c for c in rest if c.status != PASS), key=matter)
        worst = ([c for c in found if not matter(c)[1]] or found)[:3]
        head += [f"    {n}. {c.status}  {c.rule}: {c.detail}" for n, c in enumerate(worst, 1)]
    return "\n".join([*head, *(f"  {c.status}  {c.rule.ljust(width)}  {c.detail}" for c in rest)])
