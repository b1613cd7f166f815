"""The challenge's rules, asked of a record folder: PASS, WARN or FAIL a line. The folder's code is read, never run.

WARN means "a person must look": either a rule bent within what was accepted before, or something a folder cannot show.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import leaks
import runs as logs
import source
from runs import Run, UserError
from stats import Sample, welch
from tables import RECORD_GAIN_NATS, RECORD_P

LIMIT_BYTES, LIMIT_SECONDS, RECORD_SEEDS = 16_000_000, 600.0, 3
FINEWEB_VAL_BYTES = 151_075_000  # text bytes of the first 50,000 documents; exports differ by a few tenths of a percent
PLAUSIBLE_BPB = 1.0  # the best verified code length at this size is 1.0565 (PR 2135)
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
AUDIT = "audit (C1-C4)"
NEAR = 6e-5  # bpb: most folders round to four digits
LAST_DAY = "2026-05-02"
RULED = {  # of the flags that records carry: these are rules, the others say which methods were used
    *("artifact_under_16mb", "train_under_600s", "eval_under_600s", "three_seeds", "full_validation_targets"),
    *("score_before_update", "no_validation_training_leak", "val_tokens_equal_target_tokens"),
}


@dataclass(frozen=True)
class Check:
    status: str
    rule: str
    detail: str


@dataclass
class Entry:
    """A record folder, read once: its submission.json, the runs in its logs and its script."""

    folder: Path
    submission: dict | None = None
    broken_json: str | None = None
    runs: list[Run] = field(default_factory=list)
    others: list[Run] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    dumps: dict[str, str] = field(default_factory=dict)
    script: source.Script | None = None
    data_path: str | None = None

    @property
    def meta(self) -> dict:
        return self.submission or {}

    @property
    def scored(self) -> list[Run]:
        return [r for r in self.runs if r.score]

    @property
    def is_record(self) -> bool:
        track = f"{self.folder.parent.name} {self.meta.get('track', '')}"
        return "non_record" not in track and "non-record" not in track

    def bent(self, record_status: str = FAIL) -> str:
        """`record_status` in the record track, WARN outside it."""
        return record_status if self.is_record else WARN


def read_entry(folder: Path, data_path: str | None = None) -> Entry:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    entry = Entry(folder, data_path=data_path)
    meta = folder / "submission.json"
    if meta.is_file():
        try:
            entry.submission = json.loads(meta.read_text(encoding="utf-8", errors="replace"))
            if not isinstance(entry.submission, dict):
                entry.submission, entry.broken_json = None, "is no JSON object"
        except (ValueError, RecursionError) as error:
            entry.broken_json = f"is no JSON: {error}"
    places = [p for p in (folder, folder / "logs") if p.is_dir()]
    found, entry.unreadable = logs.load_runs(places)
    entry.runs = [r for r in found if r.mode == "train" and (r.score or r.info.get("v"))]
    entry.others = [r for r in found if r not in entry.runs]
    for run in entry.runs:
        for suffix in (".txt", ".log"):
            if (text := run.path.with_suffix(suffix)).is_file():
                dump = logs.dumped_source(text.read_text(encoding="utf-8", errors="surrogateescape"))
                entry.dumps |= {run.path.stem: dump} if dump else {}
    if (folder / "train_gpt.py").is_file():
        entry.script = source.read_script(folder / "train_gpt.py")
    return entry


def checks(entry: Entry) -> list[Check]:
    """Every rule's verdict, in the order a reviewer goes: files, figures, limits, seeds, data, score, code."""
    groups = (files, figures, limits, seeds, data, validity, code)
    return [Check(*line) for group in groups for line in group(entry)]


# ---- Files and figures

Lines = Iterator[tuple[str, str, str]]


def files(entry: Entry) -> Lines:
    for name in ("README.md", "submission.json", "train_gpt.py"):
        there = (entry.folder / name).is_file()
        yield PASS if there else FAIL, f"file {name}", "present" if there else "missing"
    if not (entry.folder / "requirements.txt").is_file():
        yield WARN, "file requirements.txt", "missing: the versions that ran stand nowhere but in the logs"
    if entry.scored:
        yield PASS, "training logs", ", ".join(r.path.name for r in entry.scored)
    else:
        yield FAIL, "training logs", "no log with a final score: nothing supports the figures"
    for run in entry.runs:
        if run.score is None or run.damage:
            yield FAIL, f"log {run.path.name}", run.status()
    for message in entry.unreadable:
        yield WARN, "log unreadable", message


def figures(entry: Entry) -> Lines:
    """submission.json: readable, complete, and equal to what the logs say; a claimed figure is never val_bpb."""
    if entry.broken_json:
        yield FAIL, "submission.json", entry.broken_json
    if entry.submission is None:
        return
    meta = entry.meta
    missing = [k for k in ("author", "github_id", "name", "date", "val_bpb") if meta.get(k) in (None, "")]
    status = FAIL if "val_bpb" in missing else WARN if missing else PASS
    yield status, "submission fields", f"empty: {', '.join(missing)}" if missing else "complete"
    flags = meta.get("compliance") if isinstance(meta.get("compliance"), dict) else {}
    broken = [k for k, v in flags.items() if v is False]
    if broken:
        ruled = any(k in RULED for k in broken)
        yield entry.bent() if ruled else WARN, "own compliance list", f"says no to: {', '.join(broken)}"
    yield from _seed_results(entry)
    yield from _gain(entry)
    yield from _dated(entry)
    if _is_number(bpb := meta.get("val_bpb")):
        yield _supported(entry, float(bpb))
    elif "val_bpb" not in missing:
        yield FAIL, "val_bpb", f"is no number: {bpb!r}"


def _seed_results(entry: Entry) -> Lines:
    """Each seed that submission.json speaks of has a log, and the log shows its figure."""
    meta, scored = entry.meta, {str(r.seed): r for r in entry.scored}
    results = meta.get("seed_results") if isinstance(meta.get("seed_results"), dict) else {}
    listed = meta.get("seeds") if isinstance(meta.get("seeds"), list) else []
    named = {str(s) for s in [*listed, *results]}
    if missing := sorted(named - {*scored}):
        yield entry.bent(), "a log for each seed", f"none for seed {', '.join(missing)}"
    elif named and (more := sorted({*scored} - named)):
        yield WARN, "a log for each seed", f"logs of seed {', '.join(more)}, of which submission.json does not speak"
    for seed in sorted({*results} & {*scored}):
        said = results[seed].get("val_bpb") if isinstance(results[seed], dict) else None
        run = scored[seed]
        shown = [run.bpb(), *[e["val_bpb"] for e in run.stages.values()]]
        if _is_number(said) and min(abs(v - said) for v in shown) > NEAR:
            yield FAIL, f"val_bpb of seed {seed}", f"{said:.5f}, but its log's score is {run.bpb():.5f}"


def _gain(entry: Entry) -> Lines:
    """The gain over the baseline that submission.json names, against the spread of its own seeds."""
    meta, scored = entry.meta, [r for r in entry.scored if r.loss()]
    base = next((meta[k] for k in ("comparison_baseline_bpb", "base_val_bpb") if _is_number(meta.get(k))), None)
    if base is None or not scored:
        return
    own, factor = Sample.of([r.bpb() for r in scored]), fmean(r.loss() / r.bpb() for r in scored)
    gain = (base - own.mean) * factor
    p = welch(Sample(base, math.nan, 0), own, margin=RECORD_GAIN_NATS / factor).p
    detail = f"{gain:+.5f} nats/token over the {base:.5f} bpb it compares with, {len(scored)} seed(s)"
    if math.isnan(p):
        yield WARN, "gain", f"{detail}: no spread, so no test"
        return
    proof = f"p {p:.2g} of a gain below {RECORD_GAIN_NATS} (the baseline's own spread is not known)"
    yield PASS if p < RECORD_P else WARN, "gain", f"{detail}: {proof}" + ("" if p < RECORD_P else ", within noise")


def _dated(entry: Entry) -> Lines:
    date = str(entry.meta.get("date", ""))[:10]
    if entry.is_record and date > LAST_DAY:
        yield WARN, "date", f"{date}: entries after {LAST_DAY} were taken as non-record"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _said(meta: object, names: set[str]) -> list[float]:
    """Every number under one of `names`, at any depth of submission.json."""
    if isinstance(meta, list):
        return [n for item in meta for n in _said(item, names)]
    if not isinstance(meta, dict):
        return []
    return [n for k, v in meta.items() for n in ([v] if k in names and _is_number(v) else _said(v, names))]


def _supported(entry: Entry, bpb: float) -> tuple[str, str, str]:
    """Whether the logs' mean (or one log) shows `bpb` as a stage, or only as a claimed figure."""
    scored, rule = entry.scored, "val_bpb"
    means = {"score": [r.bpb() for r in scored]}
    means |= {f"stage {s}": [r.bpb(s) for r in scored if s in r.stages] for s in {s for r in scored for s in r.stages}}
    claims = [c["claimed_bpb"] for r in entry.runs for c in r.claims]
    scores = f"the logs' scores are {_list(means['score'])}"
    for what, values in means.items():
        if values and abs(fmean(values) - bpb) < NEAR:
            return PASS, rule, f"{bpb:.5f} is the mean of the logs' {what} ({len(values)} log(s))"
    if claims and min(abs(c - bpb) for c in [*claims, fmean(claims)]) < NEAR:
        return FAIL, rule, f"{bpb:.5f} is a claimed figure (no code length); {scores}"
    for what, values in means.items():
        if values and min(abs(v - bpb) for v in values) < NEAR:
            mean = f"the mean over {len(values)} is {fmean(values):.5f}"
            return entry.bent(WARN), rule, f"{bpb:.5f} is one log's {what}; {mean}"
    return (FAIL, rule, f"{bpb:.5f}, but {scores}") if scored else (WARN, rule, f"{bpb:.5f}: no log shows it")


def _list(values: list[float]) -> str:
    return ", ".join(f"{v:.5f}" for v in values)


# ---- Limits


def limits(entry: Entry) -> Lines:
    yield from _bytes(entry)
    yield _hardware(entry)
    scored, meta = entry.scored, entry.meta
    train = _said(meta, {"train_time_s", "train_wallclock_seconds"})
    train += [ms / 1000 for ms in _said(meta, {"train_wallclock_ms", "train_wallclock_ms_max"})]
    evals = _said(meta, {"eval_time_s", "ttt_eval_time_s", "eval_time_s_max"})
    yield _seconds(entry, "training", [*train, *[r.train_s for r in scored]], [r.ms_per_step for r in entry.runs])
    yield _seconds(entry, "evaluation", [*evals, *[r.eval_s for r in scored]], [])
    for run in scored:
        if run.score.get("limits_ok") is False:
            yield entry.bent(), f"limits of {run.path.name}", run.status()


def _bytes(entry: Entry) -> Lines:
    totals = [r.total_bytes for r in entry.runs if r.total_bytes]
    totals += map(int, _said(entry.meta, {"bytes_total", "total_bytes", "artifact_bytes", "artifact_bytes_max"}))
    if not totals:
        yield WARN, "bytes", "cannot be known: neither logs nor submission.json give a total"
        return
    worst, of_limit = max(totals), f"of {LIMIT_BYTES:,} (largest of {len(totals)} figures)"
    yield PASS if worst <= LIMIT_BYTES else FAIL, "bytes", f"{worst:,} {of_limit}"
    if entry.script:
        yield from _code_bytes(entry, len(entry.script.outer))
        yield _helper_bytes(entry, worst)


def _code_bytes(entry: Entry, on_disk: int) -> Lines:
    packs = [r.pack for r in entry.runs if r.pack and r.pack.get("code_bytes")]
    counted = sorted({p["code_bytes"] for p in packs})
    if on_disk in counted:
        yield PASS, "code bytes", f"train_gpt.py is the {on_disk:,} bytes that were counted"
    elif counted:
        total = on_disk + max(p.get("artifact_bytes", 0) for p in packs)
        detail = f"train_gpt.py has {on_disk:,} bytes, the logs counted {', '.join(f'{c:,}' for c in counted)}"
        yield WARN if total <= LIMIT_BYTES else entry.bent(), "code bytes", detail


def _helper_bytes(entry: Entry, total: int) -> tuple[str, str, str]:
    found, rule = source.helpers(entry.script, entry.folder), "helper files"
    if not found:
        return PASS, rule, "train_gpt.py uses no file of this folder but itself"
    extra = sum(p.stat().st_size for p in found)
    named, whole = f"{', '.join(p.name for p in found)}: {extra:,} bytes", f"{total + extra:,}"
    if total + extra > LIMIT_BYTES:
        return FAIL, rule, f"{named} that the total must hold; {whole} breaks the limit"
    return WARN, rule, f"{named}; if not counted yet, the total is {whole}, within the limit"


def _hardware(entry: Entry) -> tuple[str, str, str]:
    found = {(r.info.get("device_name"), r.info.get("world_size")) for r in entry.scored}
    known = {f"{ranks or '?'} x {device}" for device, ranks in found if device}
    if not known:
        return WARN, "hardware", "cannot be known from the logs; the record track runs on 8 x H100"
    good = all("H100" in (device or "") and ranks in (8, None) for device, ranks in found)
    return PASS if good else entry.bent(), "hardware", f"{', '.join(sorted(known))}; the record track runs on 8 x H100"


def _seconds(entry: Entry, what: str, seconds: list[float | None], step_ms: list[float | None]) -> tuple[str, str, str]:
    known = [s for s in seconds if s is not None]
    if not known:
        return WARN, f"{what} time", "cannot be known from the logs"
    worst, step = max(known), max([s for s in step_ms if s], default=0.0) / 1000
    detail = f"{worst:.1f} s of {LIMIT_SECONDS:.0f} s"
    if worst <= LIMIT_SECONDS:
        return PASS, f"{what} time", detail
    if worst <= LIMIT_SECONDS + min(step, 0.5):
        return WARN, f"{what} time", f"{detail}: over by less than the last step, as the baseline's stop rule allows"
    return entry.bent(), f"{what} time", detail if entry.is_record else f"{detail}: more than the record track allows"


# ---- Seeds


def seeds(entry: Entry) -> Lines:
    scored = entry.scored
    values = [r.seed for r in scored]
    enough = len(scored) >= RECORD_SEEDS
    names = ", ".join(str(v) for v in values) or "none"
    yield PASS if enough else entry.bent(), "seeds", f"{len(scored)} ({names}); a record shows {RECORD_SEEDS}"
    known = [v for v in values if v is not None]
    if len(set(known)) < len(known):
        yield FAIL, "seeds differ", f"one seed more than once: {names}"
    if len(scored) > 1:
        yield _one_config(scored)
        yield _one_code(entry, scored)
    yield from _script_is_logged(entry, scored)


def _one_config(scored: list[Run]) -> tuple[str, str, str]:
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


def _one_code(entry: Entry, scored: list[Run]) -> tuple[str, str, str]:
    hashes = {r.info.get("source_sha256") or _sha(entry.dumps.get(r.path.stem)) for r in scored}
    if hashes == {None}:
        return WARN, "one script", "cannot be known: the logs hold neither source nor hash"
    if len(hashes) == 1:
        return PASS, "one script", f"all logs name {next(iter(hashes))[:12]}"
    return FAIL, "one script", f"the logs hold {len(hashes)} different scripts"


def _script_is_logged(entry: Entry, scored: list[Run]) -> Lines:
    """train_gpt.py is what ran: by hash where the log has one, else by the source printed at the log's head."""
    if not entry.script or not scored:
        return
    logged = {h for r in scored for h in (r.info.get("source_sha256"), r.info.get("packed_sha256")) if h}
    dumped = {d.strip() for d in entry.dumps.values()}
    have = {entry.script.source.strip(), entry.script.outer.decode("utf-8", "surrogateescape").strip()}
    if logged:
        same = bool(logged & entry.script.hashes())
    elif dumped:
        same = bool(dumped & have)
    else:
        yield WARN, "script that ran", "cannot be known: the logs hold neither source nor hash"
        return
    detail = "train_gpt.py is the one in the logs" if same else "train_gpt.py is not the one in the logs"
    yield PASS if same else entry.bent(), "script that ran", detail


def _sha(text: str | None) -> str | None:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() if text else None


# ---- Data


def data(entry: Entry) -> Lines:
    scored = entry.scored
    if any(r.info.get("data", {}).get("sample") for r in scored):
        yield entry.bent(), "data", "the shipped sample, not FineWeb: no figure here compares with the leaderboard"
    else:
        yield from _validation_size(entry, scored)
    partial = [r.path.name for r in scored if not r.score.get("complete", True)]
    if partial:
        yield FAIL, "validation complete", f"only a part was scored in {', '.join(partial)}"
    elif scored and all("complete" in (r.score or {}) and r.path.suffix == ".jsonl" for r in scored):
        yield PASS, "validation complete", "every target scored, says each log"
    shards = {int(s) for r in scored if str(s := r.info.get("data", {}).get("train_shards", "")).isdigit()}
    if shards and max(shards) > 200:
        detail = f"{max(shards)}: the self-made export that trained on validation documents had 1,499"
        yield WARN, "training shards", detail
    yield _leaks(entry, scored)


def _validation_size(entry: Entry, scored: list[Run]) -> Lines:
    """Text bytes that the score implies (tokens x nats / ln 2 / bpb) against the official split's."""
    implied = []
    for run in scored:
        tokens = run.stages.get(run.stage, {}).get("tokens") or run.info.get("data", {}).get("val_tokens")
        if isinstance(tokens, int) and run.loss() and run.bpb():
            implied.append(tokens * run.loss() / math.log(2) / run.bpb())
    if not implied:
        yield WARN, "validation text", "cannot be known: the logs give no token count, so no number of bytes follows"
        return
    off = max(abs(b / FINEWEB_VAL_BYTES - 1) for b in implied)
    detail = f"the scores imply {implied[0]:,.0f} bytes of text; the official split has about {FINEWEB_VAL_BYTES:,}"
    yield PASS if off < 0.01 else entry.bent(), "validation text", detail


def _leaks(entry: Entry, scored: list[Run]) -> tuple[str, str, str]:
    rule, paths = "validation documents in training", [r.info.get("data", {}).get("path") for r in scored]
    here = [p for p in paths if isinstance(p, str) and list(Path(p).glob("fineweb_train_*.bin"))]
    if not (entry.data_path or here):
        return WARN, rule, "cannot be known: the shards are not here (pass --data-path)"
    overlap = leaks.find_overlap(Path(entry.data_path or here[0]))
    return FAIL if overlap.leaked else WARN if overlap.found else PASS, rule, str(overlap)


# ---- Validity and code


def validity(entry: Entry) -> Lines:
    """The four conditions: evidence of an audit, and the plausibility of the figure without one."""
    yield _audited(entry)
    gates = [f"{k}={n} in {r.path.name}" for r in entry.scored for k, n in r.info.get("target_gates", {}).items()]
    if gates:
        yield entry.bent(), "n-gram gate", f"{', '.join(gates)}: gates that look at the target token were ruled out"
    bpb, sample = entry.meta.get("val_bpb"), any(r.info.get("data", {}).get("sample") for r in entry.runs)
    if _is_number(bpb) and bpb < PLAUSIBLE_BPB and not sample:
        detail = f"{bpb:.4f} bpb is below any verified code length at this size; unnormalised caches score so"
        yield WARN if _audited(entry)[0] == PASS else FAIL, "plausible score", detail


def _audited(entry: Entry) -> tuple[str, str, str]:
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
    return WARN, AUDIT, f"{what}: whether the score is a code length cannot be known from the folder"


HARD = {"target token in a cache key", "validation data in training code", "per-token choice by the target"}


def code(entry: Entry) -> Lines:
    """Static reading of the script: what cannot be read, and patterns that got entries rejected."""
    script = entry.script
    if script is None:
        return
    if script.opaque:
        yield FAIL, "code readable", f"train_gpt.py {script.opaque}; a reviewer cannot read it"
        return
    packed = f"{script.layers} layer(s) of packing undone statically" if script.layers else "plain source"
    yield PASS, "code readable", packed
    audited = _audited(entry)[0] == PASS
    grouped: dict[str, list[source.Finding]] = {}
    for finding in script.findings:
        grouped.setdefault(finding.pattern, []).append(finding)
    for pattern, found in grouped.items():
        where = f"line {', '.join(str(f.line) for f in found[:5])}{' ...' * (len(found) > 5)}: {found[0].text}"
        if pattern in HARD and audited:
            where += "; the audit of the scored stage passed, so it takes no part in the score"
        yield FAIL if pattern in HARD and not audited else WARN, f"code: {pattern}", where
    if not grouped:
        yield PASS, "code patterns", "none of those that got entries rejected"


# ---- Command


def check_folders(folders: list[Path], as_json: bool, data_path: str | None) -> int:
    """Prints every folder's verdicts; 1 if any line fails."""
    results = {str(folder): checks(read_entry(folder, data_path)) for folder in folders}
    if as_json:
        print(json.dumps({f: [vars(c) for c in lines] for f, lines in results.items()}, indent=1))
    else:
        for folder, lines in results.items():
            print(f"{folder}\n{format_checks(lines)}\n")
    return int(any(c.status == FAIL for lines in results.values() for c in lines))


def format_checks(lines: list[Check]) -> str:
    width = max(len(c.rule) for c in lines)
    body = "\n".join(f"  {c.status}  {c.rule.ljust(width)}  {c.detail}" for c in lines)
    counts = ", ".join(f"{sum(c.status == s for c in lines)} {s}" for s in (PASS, WARN, FAIL))
    return f"{body}\n  {counts}"
