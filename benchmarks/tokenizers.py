"""Which tokenizer is best for a run of so many seconds: bits per byte of original text, for the same seconds of training.

    python benchmarks/tokenizers.py corpus.jsonl.zst --work FOLDER --skip 450 --seconds 60
    python benchmarks/tokenizers.py corpus.jsonl.zst --work FOLDER --skip 450 --seconds 240 --seeds 1 2 3 --sets plain:1024 fused:2048

A set is a form of text and a number of pieces:

    plain     the text as it is
    caseops   case factored out, as published (data/caseops.py)
    fused     the same, an operator and the space before it are one piece

The choice is made on training text: the first --skip documents, the corpus' validation split, are not used at all, the
next --held-out ones are scored, the rest train tokenizer and model. Every set is made once, every run once: the same
command goes on where it was interrupted, and prints the table of what there is. Settings are RECIPE=cpu and --knobs.

bytes/token   of the held-out text
network       bits per byte of the model alone, in windows that do not overlap
score         bits per byte of the run's last stage, mean over seeds; +- their standard deviation
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "records")]

import make_shards  # noqa: E402
import runs  # noqa: E402
from shards import InputError, run_tool, write_whole  # noqa: E402
from text import read_documents  # noqa: E402

FORMS = {"plain": [], "caseops": ["--caseops", "--no-fused-markers"], "fused": ["--caseops"]}
PIECES = (1024, 2048, 4096)


def form_and_pieces(word: str) -> tuple[str, int]:
    """("fused", 2048) of "fused:2048"."""
    form, _, pieces = word.partition(":")
    if form not in FORMS or not pieces.isdigit():
        raise argparse.ArgumentTypeError(f"{word}: expected a set such as fused:2048, of {', '.join(FORMS)}")
    return form, int(pieces)


def write_documents(args: argparse.Namespace) -> Path:
    """The documents of this work folder, held-out ones first; InputError if it was begun with others."""
    settings = {"documents": str(args.documents.resolve()), "skip": args.skip, "limit": args.limit,
                "held_out": args.held_out}  # fmt: skip
    kept, path = args.work / "settings.json", args.work / "documents.jsonl"
    if kept.is_file():
        if (before := json.loads(kept.read_text())) != settings:
            raise InputError(f"--work {args.work}: begun with {before}, now {settings}; name another folder")
        return path
    args.work.mkdir(parents=True, exist_ok=True)
    documents = itertools.islice(read_documents(args.documents), args.skip, args.limit and args.skip + args.limit)
    write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text, _ in documents).encode())
    write_whole(kept, json.dumps(settings).encode())
    return path


def make_set(form: str, pieces: int, documents: Path, args: argparse.Namespace) -> Path:
    """Folder of the shards of a set, made unless they are there."""
    out = args.work / f"{form}_{pieces}"
    if not (out / "manifest.json").is_file():
        words = [documents, "--out", out, "--vocab-size", pieces, "--val-docs", args.held_out, *FORMS[form]]
        make_shards.main([str(word) for word in words])
    return out


def run_name(form: str, pieces: int, seed: int, args: argparse.Namespace) -> str:
    """RUN_ID of a run: what was asked for, and a digest of the other knobs."""
    knobs = hashlib.sha256(args.knobs.encode()).hexdigest()[:6] if args.knobs else "cpu"
    return f"{form}{pieces}-{args.seconds:g}s-seed{seed}-{knobs}"


def sweep(args: argparse.Namespace, folders: dict[tuple[str, int], Path]) -> int:
    """Train and score all sets with all seeds, one after another; the exit status of records/report.py sweep."""
    lines = []
    for seed in args.seeds:
        for (form, pieces), folder in folders.items():
            knobs = {"RECIPE": "cpu", "DEVICE": "cpu", "MAX_WALLCLOCK_SECONDS": args.seconds, "SEED": seed,
                     "VOCAB_SIZE": pieces, "DATA_PATH": folder.resolve(), "LOG_DIR": (args.work / "logs").resolve(),
                     "RUN_ID": run_name(form, pieces, seed, args)}  # fmt: skip
            words = [shlex.quote(f"{name}={value}") for name, value in knobs.items()]
            lines.append(" ".join([*words, args.knobs]))
    listing = args.work / "sweep.txt"
    listing.write_text("\n".join(lines) + "\n")
    launch = shlex.join([sys.executable, str(ROOT / "train_gpt.py")])
    report = [sys.executable, str(ROOT / "records" / "report.py"), "sweep", str(listing), "--launch", launch]
    return subprocess.run(report, check=False).returncode


def table(args: argparse.Namespace, folders: dict[tuple[str, int], Path]) -> str:
    """Markdown: a line a set, best score first; sets without a finished run are left out."""
    rows = []
    for (form, pieces), folder in folders.items():
        split = json.loads((folder / "manifest.json").read_text())["val"]
        paths = [args.work / "logs" / f"{run_name(form, pieces, seed, args)}.jsonl" for seed in args.seeds]
        done = [run for run in map(runs.read_log, filter(Path.is_file, paths)) if run.finished]
        if done:
            scores = [run.bpb() for run in done]
            network = [run.bpb("roundtrip") for run in done if "roundtrip" in run.stages]
            cells = [form, pieces, f"{split['bytes'] / split['tokens']:.3f}", len(done)]
            cells += [f"{statistics.mean(run.last_step for run in done):.0f}"]
            cells += [f"{statistics.mean(network):.4f}" if network else "", f"{statistics.mean(scores):.4f}"]
            cells += [f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""]
            rows.append((statistics.mean(scores), "| " + " | ".join(map(str, cells)) + " |"))
    head = "| text | pieces | bytes/token | seeds | steps | network | score | +- |\n|---|---|---|---|---|---|---|---|"
    return "\n".join([head, *(line for _, line in sorted(rows))])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("documents", type=Path, help="the corpus: .jsonl, plain, .gz or .zst")
    add("--work", type=Path, required=True, metavar="FOLDER", help="receives shards, logs and the sweep's list")
    add(
        "--sets", nargs="+", type=form_and_pieces, default=list(itertools.product(FORMS, PIECES)), metavar="FORM:PIECES"
    )
    add("--seconds", type=float, default=60, help="of training (60)")
    add("--seeds", type=int, nargs="+", default=[1337])
    add("--skip", type=int, default=0, metavar="N", help="documents of the corpus' validation split, never used (0)")
    add("--held-out", type=int, default=450, metavar="N", help="training documents that are scored (450)")
    add("--limit", type=int, metavar="N", help="use so many documents (all)")
    add("--knobs", default="", metavar="'KNOB=VALUE ...'", help="for every run")
    args = parser.parse_args(argv)
    documents = write_documents(args)
    folders = {(form, pieces): make_set(form, pieces, documents, args) for form, pieces in args.sets}
    status = sweep(args, folders)
    print(table(args, folders))
    return status


if __name__ == "__main__":
    sys.exit(run_tool(main))
