"""A record folder, read once: its submission.json, the runs in its logs, its script. Nothing of it is run."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import runs as logs
from runs import Run, UserError
from textlog import decoded, dumped_source, sections, seed_in_name

from check import source

MEAN_SCORE = re.compile(r"(?:mean_)?val_bpb_(?:mean_)?\d+_?seeds?(?:_mean)?|\d+_?seeds?_(?:mean_)?val_bpb(?:_mean)?")
MAX_LOGS, MAX_PRINTED, MAX_CHOICES = 200, 20_000_000, 500  # files, bytes of one, ways to take one run a seed


@dataclass
class Entry:
    """A record folder; `runs` holds each run once, one a seed, and `others` what else its logs hold."""

    folder: Path
    submission: dict | None = None
    broken_json: str | None = None
    runs: list[Run] = field(default_factory=list)
    others: list[Run] = field(default_factory=list)
    copies: list[tuple[Run, Run]] = field(default_factory=list)  # (the one that counts, the same run in another file)
    reruns: list[tuple[Run, Run]] = field(default_factory=list)  # (the one that counts, another run of its seed)
    unreadable: list[str] = field(default_factory=list)
    script: source.Script | None = None
    helpers: list[Path] = field(default_factory=list)  # files of the folder that the script uses
    data_path: str | None = None

    @property
    def meta(self) -> dict:
        return self.submission or {}

    @property
    def scored(self) -> list[Run]:
        return [r for r in self.runs if r.score]

    @property
    def seed_results(self) -> dict[str, dict]:
        """What submission.json says of each seed, under any of the names and in any of the forms in use."""
        nested = self.meta.get("results") if isinstance(self.meta.get("results"), dict) else {}
        places = (self.meta.get("seed_results"), nested.get("seeds"), self.meta.get("seeds"), self.meta.get("results"))
        for found in places:
            if isinstance(found, list):  # [{"seed": 1, "val_bpb": 1.1}]
                rows = [row for row in found if isinstance(row, dict) and "seed" in row]
                if len({str(row["seed"]) for row in rows}) == len(found) > 0:
                    return {str(row["seed"]): row for row in rows}
            elif isinstance(found, dict) and found is not nested:
                told = {str(s): {"val_bpb": said} if is_number(said) else said for s, said in found.items()}
                return {seed: said for seed, said in told.items() if isinstance(said, dict)}
        return {}

    @property
    def named_seeds(self) -> set[str]:
        listed = self.meta.get("seeds") if isinstance(self.meta.get("seeds"), list) else []
        return {str(s) for s in [*listed, *self.seed_results] if not isinstance(s, (dict, list))}

    @property
    def told(self) -> dict[str, float]:
        """The figure of each seed that submission.json gives one of."""
        each = {seed: said.get("val_bpb") for seed, said in self.seed_results.items()}
        return {seed: float(bpb) for seed, bpb in each.items() if is_number(bpb)}

    @property
    def is_record(self) -> bool:
        track = f"{self.folder.parent.name} {self.meta.get('track', '')}"
        return "non_record" not in track and "non-record" not in track

    def bent(self, record_status: str) -> str:
        """`record_status` in the record track, WARN outside it."""
        return record_status if self.is_record else "WARN"


def read_entry(folder: Path, data_path: str | None = None) -> Entry:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    entry = Entry(folder, data_path=data_path)
    _read_submission(entry)
    found, entry.unreadable = logs.load_runs([folder])
    if not _explained(entry, found):
        below = [p for p in folder.rglob("*") if p.suffix in logs.SUFFIXES and p.is_file()]
        below = _readable([p for p in sorted(below) if p.parent not in (folder, folder / "logs")][:MAX_LOGS])
        if any(r.score for r in found):  # then only what has the figures that these lack
            told = [*entry.told.values()] or [entry.meta.get("val_bpb")]
            shown = [r for r in below if r.score and any(is_number(bpb) and shows(r, bpb) for bpb in told)]
            below = shown or (below if _explained(entry, below) else [])
        found += below
    trained = [r for r in found if r.mode == "train" and (r.score or r.info.get("v"))]
    entry.others = [r for r in found if r not in trained]
    _attach_evaluations(trained)
    entry.runs = _one_a_seed(entry, _without_copies(entry, trained))
    for run in entry.runs:
        for suffix in logs.SUFFIXES[1:]:
            if run.source is None and (text := run.path.with_suffix(suffix)).is_file():
                run.source = dumped_source(decoded(text))
    if script := find_script(folder):
        configs = [{**{k.lower(): v for k, v in r.config.items()}, "seed": r.seed} for r in entry.scored]
        entry.script = source.read_script(script, configs, functools.cache(lambda: _printed(entry)))
        artifacts = {(r.pack or {}).get("artifact_bytes") for r in entry.runs}
        found = source.bring_along(entry.script, folder)
        entry.helpers = [path for path in found if path.stat().st_size not in artifacts]
    return entry


def _explained(entry: Entry, runs: list[Run]) -> bool:
    """Whether the runs show the figures of submission.json: each seed's, or the score in one of them or as their mean."""
    scored, score = [r for r in runs if r.score], entry.meta.get("val_bpb")
    if entry.told or not is_number(score) or not scored:
        return bool(scored) and all(any(shows(r, bpb) for r in scored) for bpb in entry.told.values())
    means = [
        fmean(r.bpb(s) for r in scored)
        for s in (None, *scored[0].stages)
        if all(s is None or s in r.stages for r in scored)
    ]
    return any(shows(r, score) for r in scored) or min(abs(mean - score) for mean in means) < near(score)


def _printed(entry: Entry) -> str:
    """What the runs print: their logs without the sources in them."""
    paths = dict.fromkeys(r.path for r in entry.scored)
    texts = (decoded(path) for path in paths if path.stat().st_size < MAX_PRINTED)
    return "\n".join(part for text in texts for is_source, part in sections(text) if not is_source)


def _read_submission(entry: Entry) -> None:
    meta = entry.folder / "submission.json"
    if not meta.is_file():
        return
    try:
        entry.submission = json.loads(meta.read_text(encoding="utf-8-sig", errors="replace"))
        if not isinstance(entry.submission, dict):
            entry.submission, entry.broken_json = None, "is no JSON object"
            return
        means = [v for k, v in entry.submission.items() if MEAN_SCORE.fullmatch(k) and is_number(v)]
        if means and entry.submission.get("val_bpb") in (None, ""):
            entry.submission["val_bpb"] = means[0]
    except (ValueError, RecursionError) as error:
        entry.broken_json = f"is no JSON: {error}"


def _readable(paths: list[Path]) -> list[Run]:
    """Runs of the files that are logs; a folder's other texts are none."""
    found = []
    for path in paths:
        try:
            found += logs.read_logs(path)
        except UserError:
            continue
    return found


def find_script(folder: Path) -> Path | None:
    """train_gpt.py, or where there is none the largest script that trains."""
    if (script := folder / "train_gpt.py").is_file():
        return script
    found = [p for p in folder.glob("*.py") if p.is_file()]
    scripts = sorted(found, key=lambda p: ("train" not in p.name, -p.stat().st_size))[:MAX_LOGS]
    return next((p for p in scripts if re.search(rb"torch|exec\(", source.head(p))), None)


def _fingerprint(run: Run) -> tuple:
    """Everything measured: two files with the same are one run."""
    steps = tuple((e["step"], e.get("train_loss", e.get("val_loss")), e.get("train_s")) for e in run.steps + run.vals)
    return steps, tuple((n, e["val_loss"], e["val_bpb"]) for n, e in run.stages.items())


def _without_copies(entry: Entry, runs: list[Run]) -> list[Run]:
    """Each run once, from the file that is named after its seed if one is."""
    first: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda r: (r.path.suffix != ".jsonl", seed_in_name(r.path) is None, str(r.path))):
        known = first.setdefault(_fingerprint(run), run)
        if known is not run:
            entry.copies.append((known, run))
    return [r for r in runs if r in first.values()]


def _attach_evaluations(runs: list[Run]) -> None:
    """A text log without steps that scores a seed trained in another log belongs to that run."""
    for log in [r for r in runs if not (r.steps or r.vals or r.train_end or r.info.get("v"))]:
        if (named := seed_in_name(log.path)) is not None:  # a program that only scores prints the seed it did not use
            log.info["seed"] = named
        trained = [r for r in runs if r is not log and r.seed == log.seed is not None and (r.steps or r.train_end)]
        if len(trained) == 1 and not trained[0].info.get("v") and _fingerprint(log)[1] != _fingerprint(trained[0])[1]:
            run = trained[0]
            run.stages |= log.stages
            run.score = {
                **(run.score or {}),
                **{k: v for k, v in log.score.items() if v is not None},
                "train_s": run.train_s,
            }
            runs.remove(log)


def _one_a_seed(entry: Entry, runs: list[Run]) -> list[Run]:
    """Of several runs of one seed the one that submission.json shows, else the first with a score that is a number."""
    by_seed: dict[object, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed if run.seed is not None else id(run), []).append(run)
    score = entry.meta.get("val_bpb")
    unnamed = [r for r in runs if r.seed is None and r.score]
    if len(entry.named_seeds) < 2 and is_number(score) and sum(shows(r, score) for r in unnamed) == 1 < len(unnamed):
        by_seed = {s: m for s, m in by_seed.items() if m[0] not in unnamed} | {None: unnamed}  # one was meant
    for seed, members in by_seed.items():
        said = entry.told.get(str(seed), score)
        members.sort(
            key=lambda r: (not (r.score and is_number(said) and shows(r, said)), not is_number(r.bpb()), not r.score)
        )
    kept = [members[0] for members in by_seed.values()]
    if not entry.told and is_number(score):  # runs whose mean it is
        choices = itertools.product(*([r for r in m if is_number(r.bpb())] or m[:1] for m in by_seed.values()))
        means = ((c, [r.bpb() for r in c if is_number(r.bpb())]) for c in itertools.islice(choices, MAX_CHOICES))
        kept = next((list(c) for c, each in means if each and abs(fmean(each) - score) < near(score)), kept)
    for best, members in zip(kept, by_seed.values(), strict=True):
        entry.reruns += [(best, r) for r in members if r is not best]
    return kept


def shows(run: Run, bpb: float) -> bool:
    """Whether a run's score or one of its stages is `bpb`."""
    return any(abs(v - bpb) < near(bpb) for v in [run.bpb(), *(e["val_bpb"] for e in run.stages.values())])


def near(bpb: float) -> float:
    """How far a figure may be from what it rounds or cuts off, by its digits (three at least, five at most)."""
    digits = min(max(len(repr(float(bpb)).partition(".")[2]), 3), 5)
    return max(6e-5, 1.01 * 10.0**-digits)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
