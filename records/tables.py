"""Tables of runs, and configurations tested against one of them: what `report.py table` and `compare` print."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence

import runs as logs
from runs import Run, UserError, show
from stats import Sample, welch

RECORD_GAIN_NATS, RECORD_P = 0.005, 0.01
RULE = (
    f"Record rule: {RECORD_GAIN_NATS} nats/token better, shown at p < {RECORD_P}: one-sided Welch's t of "
    f"'reference mean - new mean > {RECORD_GAIN_NATS} nats'."
)


# ---- Printing


def render(header: list[str], rows: list[list[object]], form: str) -> str:
    """A table as aligned text, Markdown (bars escaped) or CSV. Cells are printed with `cell`."""
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(
            [header, *[["" if c is None else c for c in row] for row in rows]]
        )
        return out.getvalue().rstrip("\n")
    bar = "\\|" if form == "markdown" else "|"
    cells = [[cell(c).replace("|", bar) for c in row] for row in [header, *rows]]
    least = 3 if form == "markdown" else 1  # a Markdown rule has at least three characters
    widths = [max(least, *map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(map(_numeric, column[1:])) for column in zip(*cells, strict=True)]
    lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in cells]
    if form == "markdown":
        lines.insert(1, ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _exact(value: float | None, _: int) -> float | None:
    return value


def cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(value)


def _numeric(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").lstrip("+-").isdigit()


def fixed(value: float | None, digits: int) -> str | None:
    return None if value is None or math.isnan(value) else f"{value:.{digits}f}"


# ---- table


def table(runs: list[Run], messages: list[str], form: str, sort: str) -> str:
    """All runs, best score first, with the knobs that differ between them; unreadable logs close the list."""
    trained = [r for r in runs if r.mode == "train" or r.score] or runs  # an audit shows as its run's status
    knobs = logs.telling(trained)
    stages = logs.stage_order(trained)
    header = ["run", *knobs, "seed", "steps", "ms/step", *stages, "score bpb", "total bytes", "train s", "eval s"]
    claims = any(r.claims for r in trained)
    header += (["claimed (no code length)"] if claims else []) + ["status"]
    exact = form == "csv"
    rows = [_row(r, knobs, stages, claims, exact) for r in trained]
    if sort not in header:
        raise UserError(f"--sort {sort}: expected one of {', '.join(header)}")
    rows.sort(key=lambda row: _sort_key(row[header.index(sort)]))
    rows += [[m.split(":")[0], *[None] * (len(header) - 2), "unreadable:" + m.split(":", 1)[1]] for m in messages]
    return render(header, rows, form)


def _row(run: Run, knobs: list[str], stages: list[str], claims: bool, exact: bool) -> list[object]:
    own, digits = logs.settings(run), _exact if exact else fixed
    row = [run.run_id, *[show(own.get(k)) for k in knobs], run.seed, run.last_step, digits(run.ms_per_step, 1)]
    row += [digits(run.bpb(s), 4) for s in stages]
    row += [digits(run.bpb(), 4), run.total_bytes, digits(run.train_s, 1), digits(run.eval_s, 1)]
    return row + ([digits(run.claimed and run.claimed["claimed_bpb"], 4)] if claims else []) + [run.status()]


def _sort_key(value: object) -> tuple:
    if value is None or value == "-":
        return (2, 0.0, "")
    try:
        number = float(str(value).replace(",", ""))
        return (1, 0.0, "") if math.isnan(number) else (0, number, "")
    except ValueError:
        return (1, 0.0, str(value))


# ---- compare


def comparison(
    groups: dict[str, list[Run]], ref: Sample | None, ref_name: str, stage: str | None, factor: float | None
) -> list[dict]:
    """One entry a group: n, mean and std in bpb and nats, and its test against `ref` (in bpb) or the group `ref_name`.

    `factor` is nats/token per bpb, one number where all runs share tokenizer and text, None where they do not.
    """
    samples = {name: Sample.of([r.bpb(stage) for r in runs]) for name, runs in groups.items()}
    against = ref or samples[ref_name]
    entries = []
    for name, own in samples.items():
        entry = {"group": name, "n": own.n, "seeds": [r.seed for r in groups[name]]}
        entry |= {"bpb_mean": own.mean, "bpb_std": own.std}
        entry |= {"nats_mean": factor and own.mean * factor, "nats_std": factor and own.std * factor}
        if ref or name != ref_name:
            entry |= _verdict(against, own, factor)
        entries.append(entry)
    return sorted(entries, key=lambda e: e["bpb_mean"])


def _verdict(ref: Sample, own: Sample, factor: float | None) -> dict:
    gain = ref.mean - own.mean
    plain = welch(ref, own)
    out = {"gain_bpb": gain, "gain_nats": factor and gain * factor, "t": plain.t, "df": plain.df, "p_better": plain.p}
    if factor:
        out["p_record"] = welch(ref, own, margin=RECORD_GAIN_NATS / factor).p
        out["meets_record_rule"] = out["p_record"] < RECORD_P  # nan, a group of one seed, is never below
    return out


def nats_per_bpb(runs: list[Run], stage: str | None) -> float | None:
    """ln 2 x bytes/token, read off the runs themselves; None if they disagree by more than rounding of a text log."""
    factors = [r.loss(stage) / r.bpb(stage) for r in runs if r.loss(stage) and r.bpb(stage)]
    return factors[0] if factors and max(factors) - min(factors) < 1e-3 * factors[0] else None


def comparison_text(entries: list[dict], ref_name: str, form: str, cautions: Sequence[str] = ()) -> str:
    header = ["configuration", "n", "bpb mean", "std", "nats/token", "std", "gain bpb", "gain nats", "t", "df"]
    header += ["p better", "p 0.005 nats", "record rule"]
    rows = []
    for e in entries:
        row = [e["group"], e["n"], *[fixed(e[k], 5) for k in ("bpb_mean", "bpb_std", "nats_mean", "nats_std")]]
        tested = [None] * 7
        if "t" in e:
            tested = [f"{e['gain_bpb']:+.5f}", e["gain_nats"] and f"{e['gain_nats']:+.5f}", fixed(e["t"], 2)]
            tested += [fixed(e["df"], 1), small(e["p_better"]), small(e.get("p_record")), _met(e)]
        rows.append(row + tested)
    notes = [f"Reference: {ref_name}. A positive gain is an improvement.", RULE, *cautions]
    if any(e["n"] < 2 for e in entries):
        notes.append("A group of one seed has no spread: no test. Run it with more values of SEED (a record shows 3).")
    return render(header, rows, form) + ("" if form == "csv" else "\n\n" + "\n".join(notes))


def _met(entry: dict) -> str:
    if "p_record" not in entry:
        return "not in nats"
    return "MET" if entry["meets_record_rule"] else "unknown" if math.isnan(entry["p_record"]) else "not met"


def small(p: float | None) -> str | None:
    return None if p is None or math.isnan(p) else f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"


def pick_reference(groups: dict[str, list[Run]], wanted: list[str]) -> str:
    """The one group that `wanted` describes by KNOB=VALUE words; without a wish the group that ran first."""
    if not wanted:
        return min(groups, key=lambda g: min(str(r.info.get("started", "")) for r in groups[g]))
    hits = []
    for name, members in groups.items():
        own = logs.settings(members[0])
        if all("=" in w and show(own.get(w.split("=")[0])) == w.split("=", 1)[1] for w in wanted):
            hits.append(name)
    if len(hits) != 1:
        found = "\n  ".join(groups)
        raise UserError(f"--ref {' '.join(wanted)}: fits {len(hits)} of these configurations, expected one:\n  {found}")
    return hits[0]


def published(text: str) -> Sample:
    """`MEAN` or `MEAN,STD,N`: a figure from someone else's table. A mean alone is taken as exact."""
    words = text.split(",")
    try:
        numbers = [float(w) for w in words]
    except ValueError:
        numbers = []
    if not all(map(math.isfinite, numbers)) or numbers[:1] <= [0.0] or not all(n.is_integer() for n in numbers[2:]):
        numbers = []
    if len(numbers) == 1:
        return Sample(numbers[0], math.nan, 0)
    if len(numbers) != 3 or numbers[2] < 2 or numbers[1] < 0:
        raise UserError(f"--published {text}: expected MEAN, or MEAN,STD,N with N >= 2 (bits per byte)")
    return Sample(numbers[0], numbers[1], int(numbers[2]))


def scored_runs(runs: list[Run], stage: str | None) -> list[Run]:
    """Runs that carry the score asked for; the others are named on stderr, never dropped in silence."""
    usable = []
    if any(r.mode == "train" for r in runs):  # MODE=eval repeats a training run's score; alone they may be compared
        runs = [r for r in runs if r.mode == "train"]
    for run in runs:
        if run.bpb(stage) is None or not run.finished:
            why = run.status() if not run.finished else f"no stage {stage}"
            print(f"left out: {run.run_id}: {why}", file=sys.stderr)
        else:
            usable.append(run)
    if not usable:
        raise UserError(f"no finished run with {'stage ' + stage if stage else 'a score'} in the logs given")
    return usable
