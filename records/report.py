"""From runs to a table, a comparison, pictures, a submission and its check. `python records/report.py --help`

    report.py table   [logs ...]                   one line a run: changed knobs, scores, bytes, seconds, status
    report.py compare [logs ...] --ref KNOB=VALUE  seeds grouped; Welch's t in bpb and nats/token; the record rule
    report.py plot    [logs ...] --out pictures    curves, waterfall of stages, bytes by role, bpb against bytes
    report.py sweep   sweep.txt                    runs one configuration a line, skips what is finished
    report.py submit  logs ... --name my_idea      writes records/<track>/<date>_<name>/, or says what is missing
    report.py check   records/track_*/FOLDER       a reviewer's summary and PASS/WARN/FAIL a rule for any record folder
    report.py index                                rewrites the table of systems in records/README.md

Exit status: 0 all good, 1 something was found to fail, 2 a mistake of the user. Needs numpy, scipy to test a gain,
matplotlib to draw, and libcst to read scripts in newer Python than the one that runs it.

Modules: run.py is what one log says, runs.py what the commands share (it reads JSON logs, textlog.py reads others), stats.py has the
t-test, tables.py prints, plots.py draws, expect.py asks the trainer what a line of a list would give, for sweep.py.
check/ reads a record folder, unpacks its script without running it and judges both; submission.py writes folders,
sweep.py runs lists.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import shlex
import sys
from pathlib import Path

import runs as logs
import tables
from runs import Run, UserError

# ---- Commands


def _load(places: list[str]) -> tuple[list[Run], list[str]]:
    """Runs of the logs named, or of logs/, and messages about unreadable neighbours; `UserError` if there is neither."""
    runs, messages = logs.load_runs(places or ["logs"])
    if not runs and not messages:
        raise UserError(f"no logs in {', '.join(places or ['logs'])}")
    return runs, messages


def _runs(places: list[str]) -> list[Run]:
    """The same with the messages on stderr."""
    runs, messages = _load(places)
    for message in messages:
        print(f"left out: {message}", file=sys.stderr)
    return runs


def run_table(args: argparse.Namespace) -> int:
    runs, messages = _load(args.logs)
    print(tables.table(runs, messages, args.format, args.sort))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    runs = tables.scored_runs(_runs(args.logs), args.stage)
    differing = logs.differences(runs)
    if differing and not args.anyway:
        raise UserError(
            "these runs cannot be compared, they differ in\n  " + "\n  ".join(differing)
            + "\nName only logs that belong together, or pass --anyway to see the numbers without a verdict in nats."
        )  # fmt: skip
    groups = logs.group_by_settings(runs)
    ref = tables.published(args.published) if args.published else None
    name = f"published {ref.mean:g} bpb" if ref else tables.pick_reference(groups, args.ref)
    factor = None if differing else tables.nats_per_bpb(runs, args.stage)
    entries = tables.comparison(groups, ref, name, args.stage, factor)
    if args.format == "json":
        entries = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in e.items()} for e in entries]
        report = {"reference": name, "rule": tables.RULE, "groups": entries, "differences": differing}
        print(json.dumps(report, indent=1))
    else:
        print(tables.comparison_text(entries, name, args.format, _cautions(runs, ref is not None, args.stage)))
        for line in differing:
            print(f"NOT COMPARABLE: {line}")
    return 0


def _cautions(runs: list[Run], published: bool, stage: str | None) -> list[str]:
    """What the numbers do not say of themselves."""
    lines = []
    stages = {r.stage for r in runs}
    if stage is None and len(stages) > 1:
        lines.append(f"The scores are of different stages: {', '.join(sorted(stages))}. --stage compares one of them.")
    if published:
        what = "whether it was scored on the same text, tokenizer and evaluation length cannot be known here"
        sample = any(r.info.get("data", {}).get("sample") for r in runs)
        lines.append(f"A published figure: {what}" + ("; these runs scored the shipped sample." if sample else "."))
    return lines


def run_plot(args: argparse.Namespace) -> int:
    import plots

    for path in plots.draw(_runs(args.logs), Path(args.out), args.force):
        print(path)
    return 0


def run_sweep(args: argparse.Namespace) -> int:
    import sweep

    return sweep.run(args.list, args.launch, args.only)


def run_submit(args: argparse.Namespace) -> int:
    import submission

    return submission.submit(_runs(args.logs), args)


def run_check(args: argparse.Namespace) -> int:
    from check import rules

    return rules.check_folders([Path(f) for f in args.folders], args.json, args.data_path)


def run_index(_: argparse.Namespace) -> int:
    import submission

    return submission.write_index()


# ---- Command line


def parser() -> argparse.ArgumentParser:
    """One block a command, each the list of its words."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    def takes_logs(sub: argparse.ArgumentParser, nargs: str = "*") -> None:
        sub.add_argument("logs", nargs=nargs, help="log files or folders (default: logs)")

    sub = command("table", run_table, "one line a run")
    takes_logs(sub)
    sub.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    sub.add_argument("--sort", default="score bpb", help="column to sort by (default: score bpb)")

    published_help = "a figure in bpb from someone else's table, as reference"
    sub = command("compare", run_compare, "configurations over their seeds, tested against one of them or a figure")
    takes_logs(sub)
    ref_help = "the reference group, may be repeated (default: the one that ran first)"
    sub.add_argument("--ref", action="append", default=[], metavar="KNOB=VALUE", help=ref_help)
    sub.add_argument("--published", metavar="MEAN[,STD,N]", help=published_help)
    sub.add_argument("--stage", help="compare this stage instead of each run's score")
    sub.add_argument(
        "--anyway", action="store_true", help="print numbers of runs that cannot be compared, marked as such"
    )
    sub.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")

    sub = command("plot", run_plot, "PNG pictures of runs")
    takes_logs(sub)
    sub.add_argument("--out", default="pictures", help="folder to write to (default: pictures)")
    sub.add_argument("--force", action="store_true", help="replace pictures that exist")

    sub = command(
        "sweep", run_sweep, "run one configuration a line; finished ones are skipped, failing ones are survived"
    )
    sub.add_argument("list", help="file with KNOB=value words a line (# comments), or - for stdin")
    sub.add_argument(
        "--launch", default=f"{shlex.quote(sys.executable)} train_gpt.py", help="command that each configuration starts"
    )
    sub.add_argument("--only", type=int, metavar="N", help="run only configuration N, from 0 (a Slurm array index)")

    sub = command("submit", run_submit, "write a record folder from finished runs that differ in SEED alone")
    takes_logs(sub, "+")
    sub.add_argument("--name", required=True, help="short name, part of the folder's name")
    sub.add_argument("--author", default="")
    sub.add_argument("--github-id", default="")
    sub.add_argument("--blurb", default="", help="one sentence for submission.json and the head of README.md")
    sub.add_argument("--date", help="YYYY-MM-DD (default: today)")
    sub.add_argument(
        "--non-record", action="store_true", help="relax hardware, time, seeds and data; the README says so"
    )
    sub.add_argument("--script", default="train_gpt.py", help="the script that ran (default: train_gpt.py)")
    sub.add_argument("--records", default="records", help="folder of the tracks (default: records)")
    sub.add_argument("--baseline", nargs="+", default=[], metavar="LOG", help="runs to compare with in the README")
    sub.add_argument("--published", metavar="MEAN[,STD,N]", help=published_help)
    sub.add_argument("--system", help="the published system this recipe reproduces (a key of records/systems.json)")

    sub = command("check", run_check, "the challenge's rules for any record folder; its code is read, never run")
    sub.add_argument("folders", nargs="+")
    sub.add_argument("--json", action="store_true", help="machine-readable output")
    sub.add_argument("--data-path", help="shards the runs used: looks for validation documents in the training ones")

    command("index", run_index, "rewrite the table of systems in records/README.md")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # other people's text on any terminal
    try:
        return args.function(args)
    except BrokenPipeError:
        return 0
    except (UserError, OSError) as error:  # a file that cannot be read or written: the system's words and its name
        print(f"error: {error}", file=sys.stderr)
        return 1 if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2


if __name__ == "__main__":
    sys.exit(main())
