"""What the commands share. Logs to runs: reads logs/*.jsonl (schema 1) and, by textlog.py, text logs; compares settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import textlog
from run import Run, UserError, audit_checks

SCHEMA = 1
SUFFIXES = (".jsonl", ".txt", ".log", ".out")  # .out as Slurm names them
MAX_LOG_BYTES = 200_000_000
BOOKKEEPING = {  # knobs that name, place or watch a run without touching its score
    *("SEED", "RUN_ID", "ARTIFACT", "FORCE", "RESUME", "CHECKPOINT_EVERY", "CHECKPOINT_KEEP", "PROFILE"),
    *("TRAIN_LOG_EVERY", "VAL_LOSS_EVERY", "LOG_DIR", "OUTPUT", "INPUT", "MODE", "RECIPE", "DEVICE"),
    *("DATA_PATH", "TOKENIZER_PATH", "VAL_BATCH_TOKENS", "MICRO_BATCH_TOKENS", "EVAL_WALLCLOCK_SECONDS"),
}


def stage_order(runs: Iterable[Run]) -> list[str]:
    """Every stage of `runs` in the order of the logs, where two logs disagree by mean place."""
    places: dict[str, list[int]] = {}
    for run in runs:
        for place, name in enumerate(run.stages):
            places.setdefault(name, []).append(place)
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))


def adopt_audits(runs: list[Run]) -> None:
    """Gives each training run the audit among `runs` that speaks for it: a failed one, else the latest."""
    logs = sorted((r for r in runs if r.mode == "audit" and r.audit), key=lambda r: str(r.info.get("started", "")))
    for run in runs:
        mine = [a for a in logs if run.mode == "train" and run.score and _speaks_for(a, run)]
        if mine:
            chosen = next((a for a in mine if not a.audit["passed"]), mine[-1])
            run.audit, run.audited_by = chosen.audit, chosen.path


def _speaks_for(audit: Run, run: Run) -> bool:
    """Of this artifact, by the code that scored it, begun after it, and of the stage that is the score."""
    hashes = (audit.audit.get("artifact_sha256"), (run.pack or {}).get("artifact_sha256"))
    if None in hashes:
        paths = (audit.artifact, run.artifact)
        same_file = None not in paths and Path(paths[0]).resolve() == Path(paths[1]).resolve()
    else:
        same_file = hashes[0] == hashes[1]
    codes = {r.info.get("source_sha256") for r in (audit, run)} - {None}
    in_order = str(audit.info.get("started") or "~") >= str(run.info.get("started") or "")
    return (
        same_file
        and len(codes) < 2
        and in_order
        and any(n.startswith(f"{run.stage}: ") for n, _ in audit_checks(audit))
    )


# ---- Lines


def text_lines(path: Path) -> list[str]:
    r"""Lines of a text file, ended by \n or \r\n alone; no byte-order mark, bytes that are not UTF-8 as surrogates."""
    return split_lines(path.read_bytes())


def split_lines(data: bytes) -> list[str]:
    text = data.decode("utf-8-sig", "surrogateescape")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def fault_of(line: str) -> str | None:
    """What keeps a line from being UTF-8 text: its first lone surrogate or undecodable byte; None for a good one."""
    found = re.search(r"[\ud800-\udfff]", line)
    if not found:
        return None
    code = ord(found[0])
    what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
    return f"not UTF-8 ({what} at character {found.start() + 1}); save it as UTF-8"


# ---- JSON logs

_NUM = (int, float)
_DATA = {"path?": str, "val_sha256?": str, "val_tokens?": int, "train_tokens?": int}
EVENT_FIELDS: dict[str, dict] = {  # what this tool reads of schema 1; a name with ? may be missing
    "run": {"run_id": str, "mode?": str, "seed?": int, "source_sha256?": str, "packed_sha256?": str}
    | {"device_name?": str, "world_size?": int, "recipe?": str, "started?": str}
    | {"data?": _DATA, "tokenizer?": {"path?": str, "sha256?": str}},
    "config": {"values": {"EVAL_SEQ_LEN?": int, "TRAIN_SEQ_LEN?": int}, "sources?": dict},
    "step": {"step": int, "train_loss": _NUM, "lr_scale?": _NUM, "train_s?": _NUM},
    "switch": {"step": int, "name": str},
    "val": {"step": int, "val_loss": _NUM, "val_bpb?": _NUM, "train_s?": _NUM},
    "train_end": {"steps": int, "train_s": _NUM},
    "quant": {"roles": dict},
    "pack": {"artifact_bytes": int, "code_bytes": int, "total_bytes": int, "limit?": int, "roles?": dict}
    | {"artifact?": str, "artifact_sha256?": str},
    "stage": {"stage": str, "val_loss": _NUM, "val_bpb": _NUM, "tokens?": int},
    "claim": {"claimed_bpb": _NUM, "z_mean?": _NUM},
    "audit": {"passed": bool, "checks": list, "artifact_sha256?": str},
    "score": {"val_bpb": _NUM, "val_loss": _NUM, "stage": str, "total_bytes?": int, "limit?": int, "train_s?": _NUM}
    | {"eval_s?": _NUM, "complete?": bool, "limits_ok?": bool},
    "error": {"message": str},
    "end": {"status": str},
}


def read_jsonl(path: Path) -> Run:
    """One run from its JSON log. A cut last line is damage to report; another schema version is a `UserError`."""
    run = Run(path)
    for number, line in enumerate(text_lines(path), 1):
        try:
            event = json.loads(line)
            version, kind = event["v"], str(event["event"])
            (
                line + json.dumps(event, ensure_ascii=False) * ("\\ud" in line.lower())
            ).encode()  # refuses lone surrogates
        except (ValueError, KeyError, TypeError, RecursionError):
            run.damage = f"truncated or damaged at line {number}"
            continue
        if version != SCHEMA:
            raise UserError(f"{path}: written in log schema {version}; this tool reads schema {SCHEMA}")
        try:
            _take(run, kind, event)
        except TypeError as wrong:
            run.damage = f"damaged at line {number}: {kind} event with {wrong}"
    if not run.info:
        why = run.damage or "not a log of this trainer, or cut before its first line"
        raise UserError(f"{path}: no run event; {why}")
    run.steps, run.vals = _by_step(run.steps), _by_step(run.vals)
    first = {}
    for event in run.switches:  # a resumed run reports again what is switched on
        first.setdefault((event["name"], json.dumps(event.get("value"))), event)
    run.switches = list(first.values())
    return run


def _check(event: dict, fields: dict) -> None:
    """Raises TypeError for a field that is missing or of another type; an optional one that is None is dropped."""
    for name, kinds in fields.items():
        key, value = name.rstrip("?"), event.get(name.rstrip("?"))
        inner = kinds if isinstance(kinds, dict) else {}
        if value is None and name.endswith("?"):
            event.pop(key, None)
        elif not isinstance(value, dict if inner else kinds) or (isinstance(value, bool) and kinds is not bool):
            raise TypeError(f"{key}={value!r}")
        elif inner:
            _check(value, inner)


def _take(run: Run, kind: str, event: dict) -> None:
    _check(event, EVENT_FIELDS.get(kind, {}))
    if kind == "pack" and not all(
        isinstance(r, dict) and isinstance(r.get("bytes"), int) for r in (event.get("roles") or {}).values()
    ):
        raise TypeError(f"roles={event['roles']!r}")
    if kind in ("step", "val", "switch", "claim"):
        {"step": run.steps, "val": run.vals, "switch": run.switches, "claim": run.claims}[kind].append(event)
    elif kind == "run":
        run.info = event
        run.ended = run.error = None  # a resumed run writes a second head: what ended is going again
    elif kind == "config":
        run.config, run.sources = event["values"], event.get("sources", {})
    elif kind == "stage":
        run.stages[event["stage"]] = event
    elif kind == "error":
        run.error = str(event["message"])
    elif kind == "end":
        run.ended = event["status"]
    elif kind in ("train_end", "quant", "pack", "audit", "score"):
        setattr(run, kind, event)


def _by_step(events: list[dict]) -> list[dict]:
    """In step order, the later of two: a resumed run repeats the steps since its checkpoint."""
    return [e for _, e in sorted({e["step"]: e for e in events}.items())]


# ---- Many logs


def log_files(places: Iterable[str | Path]) -> list[Path]:
    """Log files in `places` (files, or folders and their logs/). Of a text log and a .jsonl of one stem, the .jsonl."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = [*place.iterdir(), *(place / "logs").glob("*")]
            found += sorted(p for p in inside if p.suffix in SUFFIXES and p.is_file())
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place}: no such log or folder")
    twins = {p.with_suffix("") for p in found if p.suffix == ".jsonl"}
    return list(dict.fromkeys(p for p in found if p.suffix == ".jsonl" or p.with_suffix("") not in twins))


def read_logs(path: Path) -> list[Run]:
    """The run of a JSON log or all runs of a text log; a `UserError` if it cannot be read or is none."""
    try:
        if (size := path.stat().st_size) > MAX_LOG_BYTES:
            raise UserError(f"{path}: {size:,} bytes; no log of a training run is that long")
        return [read_jsonl(path)] if path.suffix == ".jsonl" else textlog.read_text_runs(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_log(path: Path) -> Run:
    """The last run of a log."""
    return read_logs(path)[-1]


def load_runs(places: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """All runs in `places`, and a message for each unreadable log met in a folder (one that is named itself raises)."""
    places = [Path(p) for p in places]
    runs, messages = [], []
    for path in log_files(places):
        try:
            runs += read_logs(path)
        except UserError as error:
            if path in places:
                raise
            if path.suffix == ".jsonl" or path.stem.startswith("train"):  # a requirements.txt is no failed log
                messages.append(str(error))
    adopt_audits(runs)
    return runs, messages


# ---- What differs


def settings(run: Run) -> dict:
    """Everything that may move a run's score, seed aside: knobs, and in lower case the script, hardware and torch."""
    knobs = {k: v for k, v in run.config.items() if k not in BOOKKEEPING}
    code = (run.info.get("source_sha256") or "")[:8] or None
    around = {"recipe": run.info.get("recipe"), "mode": run.info.get("mode"), "code": code}
    around |= {
        "device": run.info.get("device_name"),
        "ranks": run.info.get("world_size"),
        "torch": run.info.get("torch"),
    }
    return knobs | {k: v for k, v in around.items() if v is not None}


def changed(runs: list[Run]) -> list[str]:
    """Names in `settings` that are not the same in all runs, in the order of the config.

    A knob that some logs do not mention (another version's, another script's) counts only where a log sets it.
    """
    every = [settings(r) for r in runs]
    names = dict.fromkeys(name for s in every for name in s)
    silent = {n for n in names if any(n not in s for s in every)}
    silent -= {n for r in runs for n, source in r.sources.items() if source != "default"}
    return [n for n in names if n not in silent and len({json.dumps(s.get(n)) for s in every}) > 1]


def telling(runs: list[Run]) -> list[str]:
    """`changed`, without the knobs that only follow from the recipes where these differ."""
    names = changed(runs)
    if "recipe" not in names:
        return names
    return [n for n in names if n.islower() or any(r.sources.get(n) == "env" for r in runs)]


def group_by_settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Label -> runs of one configuration; the label names what sets the group apart from the others."""
    names, telling_names, groups = changed(runs), telling(runs), {}
    for run in runs:
        own = settings(run)
        groups.setdefault(json.dumps([own.get(n) for n in names]), []).append(run)
    labelled: dict[str, list[Run]] = {}
    for members in groups.values():
        own = settings(members[0])
        label = ", ".join(f"{n}={show(own.get(n))}" for n in telling_names) or "all runs"
        labelled[label if label not in labelled else f"{label} (another {len(labelled)})"] = members
    return labelled


def show(value: object) -> str:
    """A knob's value as a person would type it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(int(value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def yardstick(run: Run) -> dict[str, object]:
    """What must be equal before two scores may stand in one comparison; None where the log does not say."""
    data, tokenizer = run.info.get("data", {}), run.info.get("tokenizer", {})
    length = run.config.get("EVAL_SEQ_LEN") or run.config.get("TRAIN_SEQ_LEN")
    score = run.stages.get(run.stage or "", {})
    return {
        "validation data (sha256)": data.get("val_sha256"),
        "validation tokens": data.get("val_tokens"),
        "scored tokens": score.get("tokens"),
        "training tokens on disk": data.get("train_tokens"),
        "tokenizer": tokenizer.get("sha256") or (Path(str(tokenizer["path"])).name if tokenizer.get("path") else None),
        "evaluation length (EVAL_SEQ_LEN)": length,
    }


def differences(runs: list[Run]) -> list[str]:
    """One line for each part of the yardstick on which the runs disagree; unknown values agree with all."""
    lines = []
    for name in yardstick(runs[0]):
        values: dict[object, list[str]] = {}
        for run in runs:
            if (value := yardstick(run)[name]) is not None:
                values.setdefault(value, []).append(run.run_id)
        if len(values) > 1:
            lines.append(f"{name}: " + "; ".join(f"{_brief(v)} in {_some(ids)}" for v, ids in values.items()))
    return lines


def _brief(value: object) -> str:
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else str(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
