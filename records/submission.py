"""Writes a record folder from finished runs or lists what is missing; keeps the index of systems."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import plots
import runs as logs
import tables
import textlog
from check import rules, source
from runs import Run, UserError
from stats import Sample

HERE = Path(__file__).resolve().parent
TRACKS = {False: "track_10min_16mb", True: "track_non_record_16mb"}
MAX_LINES_BEFORE_SOURCE = 20  # a text log may say a few things before it prints the script


class Refused(Exception):
    """What keeps runs from being a submission, one line each: exit status 1."""


def submit(runs: list[Run], args: argparse.Namespace) -> int:
    """Builds the folder aside, checks it by rules.py and moves it into place; 1 with the reasons if it fails."""
    system = _system(args.system)
    logged = _sort_out(runs)
    if system and (ran := logged.seeds[0].info.get("recipe")) != system["key"]:
        raise UserError(f"--system {system['key']}: these runs are of RECIPE={ran}")
    target = _target(args)
    staging = Path(tempfile.mkdtemp(prefix=".submission-", dir=target.parent))
    folder = staging / target.parent.name / target.name  # the checker reads the track off the parent's name
    try:
        folder.mkdir(parents=True)
        verdicts = _fill(folder, logged, args, system)
        if target.exists():
            raise UserError(f"{target} appeared meanwhile: nothing is overwritten")
        folder.rename(target)
    except Refused as reasons:
        print(f"no submission written:\n{reasons}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{target}\n{rules.format_checks(verdicts)}")
    return 0


def _target(args: argparse.Namespace) -> Path:
    date = args.date or datetime.date.today().isoformat()
    try:
        if datetime.date.fromisoformat(date).isoformat() != date:
            raise ValueError
    except ValueError:
        raise UserError(f"--date {date}: expected YYYY-MM-DD") from None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", args.name):
        raise UserError(f"--name {args.name!r}: letters, digits and _.+- only, it becomes a folder's name")
    target = Path(args.records) / TRACKS[args.non_record] / f"{date}_{args.name}"
    if target.exists():
        raise UserError(f"{target} exists and is never overwritten: choose another --name or --date, or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _system(key: str | None) -> dict | None:
    systems = json.loads((HERE / "systems.json").read_text(encoding="utf-8"))
    if key is not None and key not in systems:
        raise UserError(f"--system {key}: expected one of {', '.join(systems)}")
    return {"key": key, **systems[key]} if key else None


class Material(NamedTuple):
    """Logs sorted by their part in a submission."""

    seeds: list[Run]  # with their audits, named or lying beside them
    left_out: list[Run]  # finished runs of the same configuration that lie beside them, not named


def _sort_out(runs: list[Run]) -> Material:
    seeds = sorted((r for r in runs if r.mode == "train"), key=lambda r: (r.seed is None, r.seed))
    if not seeds:
        raise UserError("none of the logs is a training run")
    if foreign := [str(r.path) for r in seeds if r.path.suffix != ".jsonl"]:
        raise UserError(f"{', '.join(foreign)}: name the .jsonl logs, text logs do not hold what a submission needs")
    known = {r.path.resolve() for r in seeds}
    beside = [r for r in logs.load_runs({r.path.parent for r in seeds})[0] if r.path.resolve() not in known]
    logs.adopt_audits([*runs, *beside])
    others = [r for r in beside if r.mode == "train" and r.finished]
    return Material(seeds, [r for r in others if logs.settings(r) == logs.settings(seeds[0])])


def _fill(folder: Path, logged: Material, args: argparse.Namespace, system: dict | None) -> list[rules.Check]:
    """Writes all files of the submission, README.md last; raises `Refused` with every reason found so far."""
    seeds = logged.seeds
    problems = [f"{r.run_id}: {status}" for r in seeds if (status := _unfit(r, args.non_record))]
    problems += [f"the runs differ in {line}" for line in logs.differences(seeds)]
    problems += _copy_code(folder, seeds, Path(args.script))
    problems += _copy_logs(folder, seeds)
    problems += _copy_companions(folder, seeds)
    _refuse(problems)
    meta = describe(seeds, args, system)
    _write_json(folder / "submission.json", meta)
    (folder / "README.md").write_text(meta["name"] + "\n", encoding="utf-8")
    verdicts = [*rules.checks(rules.read_entry(folder)), _disclosure(logged)]
    problems = [f"{c.rule}: {c.detail}" for c in verdicts if c.status == rules.FAIL]
    _refuse(problems + [f"{r.run_id}: {_NO_AUDIT.format(r.stage, r.artifact)}" for r in seeds if not r.audit])
    meta["compliance"] = compliance(verdicts)
    meta["runs_left_out"] = {f"{r.run_id} (seed {r.seed})": r.bpb() for r in logged.left_out}
    _write_json(folder / "submission.json", meta)
    pictures = _draw(seeds, folder)
    (folder / "README.md").write_text(readme(seeds, meta, verdicts, pictures, args, system), encoding="utf-8")
    return verdicts


def _draw(seeds: list[Run], folder: Path) -> list[str]:
    """Names of the pictures; none where matplotlib is missing, and the caller is told."""
    try:
        return [p.name for p in plots.draw(seeds, folder)]
    except plots.NoMatplotlib as missing:
        print(f"no pictures in the folder: {missing}", file=sys.stderr)
        return []


_NO_AUDIT = "no audit of its stage {} by the script that ran: MODE=audit ARTIFACT={} python train_gpt.py"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise Refused("\n".join(f"  - {p}" for p in problems))


def _disclosure(logged: Material) -> rules.Check:
    """Seeds that ran and were not submitted: choosing the best of several got entries rejected."""
    if not logged.left_out:
        return rules.Check(rules.PASS, "all runs disclosed", "no other finished run of this configuration in the logs")
    names = ", ".join(f"{r.run_id} (seed {r.seed}): {r.bpb():.5f}" for r in logged.left_out)
    return rules.Check(rules.WARN, "all runs disclosed", f"left out of this submission: {names}")


def _unfit(run: Run, non_record: bool) -> str | None:
    """Why this run cannot be submitted at all, or None."""
    status = run.status()
    if status.startswith("limit broken") and non_record and run.total_bytes <= rules.LIMIT_BYTES:
        return None
    if status != "ok":
        return status
    missing = [name for name in ("config", "train_end", "pack", "score") if not getattr(run, name)]
    return f"its log holds no {' and no '.join(missing)} event" if missing else None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- What goes into the folder


def _copy_code(folder: Path, seeds: list[Run], script: Path) -> list[str]:
    """train_gpt.py in its counted form, by hash, and what it imports or opens beside it; a list of what is wrong."""
    wanted = {r.info.get("source_sha256") for r in seeds}
    if len(wanted) > 1:
        return ["code: the seeds ran different scripts (source_sha256): " + ", ".join(str(w)[:12] for w in wanted)]
    text = _script_that_ran(seeds, script)
    if text is None:
        return [f"code: {script} is not the script that ran (sha256 {str(wanted.pop())[:12]}); pass it as --script"]
    form = (seeds[0].pack or {}).get("code_form", "source")
    if form == "packed":
        packed = _pack(text, script)
        if hashlib.sha256(packed).hexdigest() not in {r.info.get("packed_sha256") for r in seeds}:
            return ["code: packing the script again gives other bytes than the log's packed_sha256"]
        text = packed
    (folder / "train_gpt.py").write_bytes(text)
    for helper in source.helpers(source.read_script(folder / "train_gpt.py"), script.parent):
        copy = folder / helper.relative_to(script.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(helper, copy)
    return []


def _script_that_ran(seeds: list[Run], script: Path) -> bytes | None:
    """The source whose hash the logs hold: --script, or the copy that a text log carries at its head."""
    wanted = seeds[0].info.get("source_sha256")
    texts = [script.read_bytes()] if script.is_file() else []
    for run in seeds:
        twin = run.path.with_suffix(".txt")
        dump = textlog.dumped_source(textlog.decoded(twin)) if twin.is_file() else None
        lines = dump.rstrip("\n").splitlines(keepends=True) if dump else []
        texts += [("".join(lines[first:]) + "\n").encode() for first in range(min(len(lines), MAX_LINES_BEFORE_SOURCE))]
    return next((t for t in texts if hashlib.sha256(t).hexdigest() == wanted), None)


def _pack(text: bytes, script: Path) -> bytes:
    """The self-extracting form of the script, by tools/pack_code.py."""
    tool = Path(__file__).resolve().parent.parent / "tools" / "pack_code.py"
    done = subprocess.run([sys.executable, tool, "-"], input=text, capture_output=True)
    if done.returncode:
        raise UserError(f"tools/pack_code.py cannot pack {script}:\n{done.stderr.decode()[-500:]}")
    return done.stdout


def _copy_logs(folder: Path, seeds: list[Run]) -> list[str]:
    """Both logs of each seed, and the events of its audit."""
    problems = []
    for run in seeds:
        if (folder / f"train_seed{run.seed}.jsonl").exists():
            problems.append(f"train_seed{run.seed}: two runs of one seed")
            continue
        if not run.path.with_suffix(".txt").is_file():
            problems.append(
                f"{run.run_id}: the text log {run.path.with_suffix('.txt')} is missing; reviewers read that one"
            )
        else:
            shutil.copyfile(run.path.with_suffix(".txt"), folder / f"train_seed{run.seed}.log")
        shutil.copyfile(run.path, folder / f"train_seed{run.seed}.jsonl")
        if run.audited_by:
            shutil.copyfile(run.audited_by, folder / f"audit_seed{run.seed}.jsonl")
    return problems


def transform_of(run: Run) -> str | None:
    """The name of the text transform that the data went through before the tokenizer, as the log has it."""
    places = (run.info.get("data", {}), run.info, run.pack or {})
    return next((p["transform"] for p in places if isinstance(p.get("transform"), str) and p["transform"]), None)


def _copy_transform(folder: Path, run: Run) -> list[str]:
    """data/<transform>.py, from which a reviewer rebuilds the text and the byte counts."""
    name = transform_of(run)
    if name in (None, "none"):
        return []
    module = HERE.parent / "data" / f"{name}.py"
    if not re.fullmatch(r"\w+", name) or not module.is_file():
        return [f"transform: the data went through {name!r}, and {module} is not here; a reviewer needs it"]
    shutil.copyfile(module, folder / module.name)
    return []


def _copy_companions(folder: Path, seeds: list[Run]) -> list[str]:
    """requirements.txt of the repository, the text transform and the tokenizer, whose hash must be the log's."""
    shutil.copyfile(HERE.parent / "requirements.txt", folder / "requirements.txt")
    if missing := _copy_transform(folder, seeds[0]):
        return missing
    tokenizer = seeds[0].info.get("tokenizer", {})
    path = Path(tokenizer.get("path") or "")
    if not path.is_file():
        return [f"tokenizer: {path} is not here; a reviewer needs it"]
    blob = path.read_bytes()
    if tokenizer.get("sha256") not in (None, hashlib.sha256(blob).hexdigest()):
        return [f"tokenizer: {path} has changed since the run (sha256 differs from the log's)"]
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / path.name).write_bytes(blob)
    return []


# ---- submission.json


def describe(seeds: list[Run], args: argparse.Namespace, system: dict | None) -> dict:
    """The fields that recent records carry. val_bpb is the mean of the runs' scores and nothing else."""
    info, data = seeds[0].info, seeds[0].info.get("data", {})
    meta = {
        "author": args.author,
        "github_id": args.github_id,
        "name": _title(args.name, seeds[0], system),
        "blurb": args.blurb or _blurb(seeds[0], system),
        "date": args.date or datetime.date.today().isoformat(),
        "track": TRACKS[args.non_record].removeprefix("track_"),
        **_figures(seeds),
        "hardware": f"{info.get('world_size', '?')}x {info.get('device_name') or info.get('device', '?')}",
        "pytorch_version": info.get("torch"),
        "python_version": info.get("python"),
        "recipe": info.get("recipe"),
        "data": "sample" if data.get("sample") else Path(str(data.get("path"))).name,
        "technique_summary": _changes_in_words(seeds[0]),
        "logs": {str(r.seed): f"train_seed{r.seed}.log" for r in seeds},
    }
    if system:
        credit = f"PR #{system['pr']} by {system['author']}"
        meta |= {"system": system["key"], "base_pr": system["pr"], "attribution": credit}
    if claims := [r.claimed for r in seeds if r.claimed]:
        mean = sum(c["claimed_bpb"] for c in claims) / len(claims)
        z = max((c["z_mean"] for c in claims if c.get("z_mean") is not None), default=None)
        meta["claimed_not_a_code_length"] = {"claimed_bpb": mean, "z_mean": z}
    return meta


def _figures(seeds: list[Run]) -> dict:
    """Scores, bytes, steps and seconds over the seeds."""
    bpb, loss = Sample.of([r.bpb() for r in seeds]), Sample.of([r.loss() for r in seeds])
    artifacts = [r.pack["artifact_bytes"] for r in seeds]
    return {
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": None if loss.n < 2 else loss.std,
        "val_bpb_std": None if bpb.n < 2 else bpb.std,
        "score_stage": seeds[0].stage,
        "seeds": [r.seed for r in seeds],
        "seed_results": {str(r.seed): seed_result(r) for r in seeds},
        "bytes_total": max(r.total_bytes for r in seeds),
        "bytes_code": seeds[0].pack["code_bytes"],
        "artifact_bytes_mean": sum(artifacts) / len(seeds),
        "artifact_bytes_max": max(artifacts),
        "train_steps_mean": sum(r.last_step for r in seeds) / len(seeds),
        "step_avg_ms_mean": sum(r.ms_per_step or 0.0 for r in seeds) / len(seeds),
        "train_wallclock_ms_max": max(round(1000 * r.train_s) for r in seeds),
        "eval_time_s_max": max(r.eval_s or 0.0 for r in seeds),
    }


def _title(name: str, run: Run, system: dict | None) -> str:
    """A system's folder says in its title what it is, so that no list of names takes it for the published result."""
    if system is None:
        return name
    where = "shrunken, on the shipped sample" if run.info.get("data", {}).get("sample") else "run anew"
    return f"PR #{system['pr']} ({system['title']}), {where}"


def _blurb(run: Run, system: dict | None) -> str:
    if system is None:
        return _changes_in_words(run)
    size = "at a shrunken size on the shipped sample" if run.info.get("data", {}).get("sample") else "at full size"
    return f"The system of PR #{system['pr']} by {system['author']}, trained and scored anew {size}."


def seed_result(run: Run) -> dict:
    out = {"val_loss": run.loss(), "val_bpb": run.bpb(), "artifact_bytes": run.pack["artifact_bytes"]}
    out |= {"bytes_total": run.total_bytes, "steps": run.last_step, "step_avg_ms": run.ms_per_step}
    out |= {"train_time_s": run.train_s, "eval_time_s": run.eval_s}
    out |= {"target_tokens": run.stages.get(run.stage, {}).get("tokens")}
    return out | {"stages": {name: e["val_bpb"] for name, e in run.stages.items()}}


def compliance(verdicts: list[rules.Check]) -> dict[str, bool | None]:
    """The flags that records carry, each from a check; None where a person must look."""
    named = {c.rule: c.status for c in verdicts}

    def holds(rule: str) -> bool | None:
        return {rules.PASS: True, rules.FAIL: False}.get(named.get(rule, rules.WARN))

    return {
        "artifact_under_16mb": holds("bytes"),
        "train_under_600s": holds("training time"),
        "eval_under_600s": holds("evaluation time"),
        "three_seeds": holds("seeds"),
        "full_validation_targets": holds("validation complete"),
        "score_before_update": holds(rules.AUDIT),
        "no_validation_training_leak": holds("validation documents in training"),
    }


def _changes(run: Run) -> dict[str, object]:
    """Knobs that are not at their default, bookkeeping and paths aside."""
    moved = {k: v for k, v in run.config.items() if run.sources.get(k, "default") != "default"}
    return {k: v for k, v in moved.items() if k not in logs.BOOKKEEPING and not k.endswith("_PATH")}


def _changes_in_words(run: Run) -> str:
    changes = [f"{k}={logs.show(v)}" for k, v in _changes(run).items()]
    return f"recipe {run.info.get('recipe')}" + (": " + ", ".join(changes[:12]) if changes else ", unchanged")


# ---- README.md


def readme(
    seeds: list[Run],
    meta: dict,
    verdicts: list[rules.Check],
    pictures: list[str],
    args: argparse.Namespace,
    system: dict | None,
) -> str:
    parts = [f"# {meta['name']}\n\n{meta['blurb']}", *_notices(meta, verdicts, args.non_record), _result(seeds, meta)]
    if system:
        parts += [_system_text(system), _full_size(system, seeds[0])]
    parts += [_method(seeds[0], args), *_against(seeds, args), _pictures(pictures), _compliance_text(verdicts)]
    return "\n\n".join([*parts, _reproduce(seeds)]) + "\n"


def _notices(meta: dict, verdicts: list[rules.Check], non_record: bool) -> list[str]:
    if not non_record:
        return []
    relaxed = [f"{c.rule}: {c.detail}" for c in verdicts if c.status == rules.WARN]
    lines = [
        "> **Non-record submission.** It asks for no place in the 10-minute track. What that track would object to:"
    ]
    lines += [f"> - {line}" for line in relaxed]
    if meta["data"] == "sample" and "system" in meta:
        lines.append(
            "> - Trained and scored on the small corpus shipped with the repository, at a shrunken size: "
            "no figure here compares with the leaderboard or with the published system's."
        )
    return ["\n".join(lines)]


def _result(seeds: list[Run], meta: dict) -> str:
    stages = list(dict.fromkeys(s for r in seeds for s in r.stages))
    header = ["seed", "steps", "ms/step", *stages, "**score**", "artifact bytes", "total bytes", "train s", "eval s"]
    rows = []
    for r in seeds:
        row = [r.seed, r.last_step, tables.fixed(r.ms_per_step, 1), *[tables.fixed(r.bpb(s), 4) for s in stages]]
        row += [tables.fixed(r.bpb(), 5), r.pack["artifact_bytes"], r.total_bytes]
        rows.append([*row, tables.fixed(r.train_s, 1), tables.fixed(r.eval_s, 1)])
    spread = f" (standard deviation {meta['val_bpb_std']:.5f}, n = {len(seeds)})" if len(seeds) > 1 else ""
    text = f"## Result\n\n**val_bpb {meta['val_bpb']:.5f}**{spread}, val_loss {meta['val_loss']:.5f} nats/token, "
    text += f"stage `{meta['score_stage']}`, on {meta['hardware']} with PyTorch {meta['pytorch_version']}.\n\n{tables.render(header, rows, 'markdown')}"
    if claim := meta.get("claimed_not_a_code_length"):
        z = "" if claim["z_mean"] is None else f", its probabilities sum to {claim['z_mean']:.3f} on average"
        text += f"\n\nThe published scorer, kept for comparison, prints claimed_bpb {claim['claimed_bpb']:.4f}{z}: "
        text += "**not a code length**, and not the score."
        text += " On so short a text its n-grams barely fire." if meta["data"] == "sample" else ""
    return text


def _system_text(system: dict) -> str:
    rows = [[p["figure"], p["kind"], p["what"]] for p in system["published"]]
    differences = "\n".join(f"- **{what}**: {why}." for what, why in system["differences"])
    return (
        f"## The system: PR #{system['pr']} by {system['author']}\n\n{system['what']}\n\n"
        f"### Published figures: {system['author']}'s, at full size, on FineWeb\n\n"
        f"{tables.render(['figure', 'kind', 'what'], rows, 'markdown')}\n\n"
        "A *valid* figure is a code length; a *claimed* one is not, since its probabilities do not sum to one.\n\n"
        f"### What ours does differently, and why\n\n{differences}\n\n"
        f"### Full size, on 8xH100\n\n```bash\n{system['command']}\n```"
    )


class Estimate(NamedTuple):
    """One role of the full-size artifact, from its weights there and the bits a weight of it took in the shrunken run."""

    role: str
    weights: int
    bits: float
    bytes: float
    fixed: int  # bytes at the full size's fixed width


def estimate(system: dict, run: Run) -> list[Estimate]:
    """Every role of weights at full size; n-gram tables, container and code hold no weights and are not among them.

    Bits are scaled by the ratio of the mean widths at both sizes: small matrices pass through as floats, and they are not the
    same share of a role at both. A role that the shrunken run lacks takes its mean over all roles.
    """
    packed = {name: r for name, r in run.pack["roles"].items() if r["params"]}
    overall = 8 * sum(r["bytes"] for r in packed.values()) / max(1, sum(r["params"] for r in packed.values()))
    rows = []
    for role, (count, fixed) in system["roles"].items():
        width = (run.quant or {}).get("roles", {}).get(role, {}).get("bits")
        bits = packed.get(role, {}).get("bits_per_weight", overall) * (8 * fixed / count / width if width else 1)
        rows.append(Estimate(role, count, bits, count * bits / 8, fixed))
    return rows


def _full_size(system: dict, run: Run) -> str:
    rows = estimate(system, run)
    cells = [[r.role, r.weights, f"{r.bits:.2f}", round(r.bytes), r.fixed] for r in rows]
    if table := system.get("ngram_table"):
        cells.append(["ngram", None, None, table["bytes"], table["fixed"]])
    code = run.pack["code_bytes"]
    cells.append(["code", None, None, code, code])
    estimated, fixed = ([c[column] for c in cells] for column in (3, 4))
    cells.append(["**total**", None, None, sum(estimated), sum(fixed)])
    header = ["role", "weights at full size", "bits/weight", "estimated bytes", "bytes at fixed width"]
    note = (
        "**An estimate**, not a measurement: the full-size weights of each role times the bits that a weight of that "
        "role took in the shrunken run's artifact (times the ratio of widths where small matrices stay floats at one size "
        "alone). Only storage at fixed width is an upper bound (row scales aside): "
        "trained matrices of another size compress differently, and untrained ones that start at zero cost nothing."
    )
    extra = "".join(f" {text}" for text in (system.get("note"), (table or {}).get("note")) if text)
    limit = _against_limit(sum(estimated), system)
    return f"### Artifact at full size (estimate)\n\n{tables.render(header, cells, 'markdown')}\n\n{note}{extra}\n\n{limit}"


def _against_limit(estimated: int, system: dict) -> str:
    gap = estimated - rules.LIMIT_BYTES
    text = f"The estimate is {abs(gap):,} bytes {'**over**' if gap > 0 else 'under'} the limit of {rules.LIMIT_BYTES:,}"
    for known in system["published"]:
        if known["kind"] == "bytes":
            text += f"; published were {known['figure']} ({known['what']})"
    if gap > 0:
        text += (
            ". Whether a full-size run fits shows when it is packed: over the limit it says so and ends with status 1"
        )
    return f"{text}."


def _method(run: Run, args: argparse.Namespace) -> str:
    script = Path(args.script)
    docs = source.knob_docs(script.read_text(encoding="utf-8", errors="replace")) if script.is_file() else {}
    rows = []
    for name, value in _changes(run).items():
        known = docs.get(name, {})
        if known and known["default"] == value:
            continue  # asked for, and the same as the default
        default = logs.show(known.get("default"))
        rows.append([f"`{name}`", logs.show(value), default, run.sources[name], known.get("doc", "")])
    head = f"## Method\n\nRecipe `{run.info.get('recipe')}` ({run.info.get('recipe_reason', 'as asked')}). "
    if not rows:
        return head + "No knob differs from its default."
    table = tables.render(["knob", "value", "default", "set by", "meaning"], rows, "markdown")
    return f"{head}Every knob that is not at its default:\n\n{table}"


def _against(seeds: list[Run], args: argparse.Namespace) -> list[str]:
    """Welch's test against --baseline runs or a --published figure, if one was named."""
    if args.published:
        ref, groups = tables.published(args.published), {"this submission": seeds}
        name, factor = f"published {ref.mean:g}", tables.nats_per_bpb(seeds, None)
    elif args.baseline:
        base = tables.scored_runs(logs.load_runs(args.baseline)[0], None)
        if differing := logs.differences([*base, *seeds]):
            raise UserError("--baseline cannot be compared: " + "; ".join(differing))
        groups, ref, name = {"baseline": base, "this submission": seeds}, None, "baseline"
        factor = tables.nats_per_bpb([*base, *seeds], None)
    else:
        return []
    entries = tables.comparison(groups, ref, name, None, factor)
    return ["## Comparison\n\n" + tables.comparison_text(entries, name, "markdown")]


def _pictures(names: list[str]) -> str:
    if not names:
        return "## Pictures\n\nNone: matplotlib was not installed where this folder was written."
    return "## Pictures\n\n" + "\n\n".join(f"![{n.removesuffix('.png').replace('_', ' ')}]({n})" for n in names)


def _compliance_text(verdicts: list[rules.Check]) -> str:
    rows = [[c.status, c.rule, c.detail] for c in verdicts]
    return (
        "## Compliance\n\nFrom the logs, the audit and the files of this folder "
        "(`python records/report.py check` on it says it again). WARN: a person must look.\n\n"
        + tables.render(["", "rule", "evidence"], rows, "markdown")
    )


def _reproduce(seeds: list[Run]) -> str:
    run = seeds[0]
    data, others = run.info.get("data", {}), ", ".join(str(r.seed) for r in seeds[1:])
    asked = {k: v for k, v in run.config.items() if run.sources.get(k) == "env"}
    asked = {k: v for k, v in asked.items() if k not in logs.BOOKKEEPING and not k.endswith("_PATH")}
    # Without DATA_PATH, downloaded FineWeb is used.
    sample = "data/sample" + "/caseops_2048" * str(data.get("path")).endswith("caseops_2048")
    data_path = {"DATA_PATH": sample} if data.get("sample") else {}
    words = {"RECIPE": run.info.get("recipe"), "SEED": run.seed} | data_path | asked
    line = " ".join(f"{k}={shlex.quote(logs.show(v))}" for k, v in words.items())
    ranks = run.info.get("world_size") or 1
    launch = "python train_gpt.py" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks} train_gpt.py"
    where = "the shipped sample" if data.get("sample") else f"`{Path(str(data.get('path'))).name}`"
    text = f"## Reproduce\n\n```bash\n{line} {launch}\n```\n\n"
    text += f"The other seeds: {others}. " if others else ""
    counts = ", ".join(f"{data[k]:,} {k.split('_')[0]}" for k in ("train_tokens", "val_tokens") if data.get(k))
    text += f"Data: {where}; tokens: {counts}; sha256 of the validation tokens {str(data.get('val_sha256'))[:16]}."
    if (transform := transform_of(run)) not in (None, "none"):
        text += f" The text went through `{transform}.py` before the tokenizer. Bytes were counted by sidecar: "
        text += "`fineweb_val_bytes_*.bin` holds, for each token, the bytes of the original text that it stands for."
    return text


# ---- The index of systems


def write_index(records: Path = HERE) -> int:
    """Rewrites the table between the markers of records/README.md from the systems' folders. Rows stand in PR order."""
    page = records / "README.md"
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- systems:begin -->", "<!-- systems:end -->"
    if begin not in text or end not in text:
        raise UserError(f"{page}: without the markers {begin} and {end}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    aside = page.with_suffix(".partial")
    aside.write_text(f"{head}{begin}\n{index_table(records)}\n{end}{tail}", encoding="utf-8")
    os.replace(aside, page)
    print(page)
    return 0


def index_table(records: Path) -> str:
    systems = json.loads((HERE / "systems.json").read_text(encoding="utf-8"))
    found = {}
    for path in sorted(records.glob("track_*/*/submission.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta.get("system") in systems:
            found[meta["system"]] = (path.parent.relative_to(records), meta)  # the latest date wins
    header = ["system", "published claim", "published valid bpb", "ours on the sample: network", "+ exact n-grams"]
    header += ["claimed (mean Z), no code length"]
    rows = []
    for key, system in sorted(systems.items(), key=lambda kv: kv[1]["pr"]):
        place, meta = found.get(key, (None, {}))
        stages = [r.get("stages", {}) for r in meta.get("seed_results", {}).values()]
        claim = meta.get("claimed_not_a_code_length")
        title = f"#{system['pr']} {system['title']}"
        row = [f"[{title}]({place}/)" if place else title, system["claim"], system["valid_bpb"]]
        row += [_mean_stage(stages, ("sliding", "roundtrip")), _mean_stage(stages, ("ngram",))]
        rows.append([*row, claim and f"{claim['claimed_bpb']:.4f} ({tables.cell(tables.fixed(claim['z_mean'], 3))})"])
    return tables.render(header, rows, "markdown")


def _mean_stage(stages: list[dict], names: tuple[str, ...]) -> str | None:
    """Mean over seeds of the first of `names` that all seeds have."""
    for name in names:
        if stages and all(name in s for s in stages):
            return f"{sum(s[name] for s in stages) / len(stages):.4f}"
    return None
