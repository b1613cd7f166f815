"""CPU seconds (user + system) from the start of a script to its first priming step, of its own process and of its children.

    python benchmarks/startup.py [--rounds 5] [--against OTHER_FOLDER] [KNOB=value ...]

RECIPE=cpu, changed by the knobs given, on one thread. OTHER_FOLDER holds another version of the repository (git archive), which starts
in turn with this one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
# Runs the script's text as Python runs a script, but for the first statement of `prime`.
STARTER = """
import os, resource, sys
path, out = sys.argv[1:]
text = open(path, encoding="utf-8").read()
at = text.index("\\n", text.index("    def prime(self) -> None:"))
stop = "\\n        open(__out__, 'w').write(repr([sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]))"
text = text[:at] + "\\n        import resource" + stop + "\\n        os._exit(0)" + text[at:]
sys.argv, sys.path[0] = [path], os.path.dirname(path)
import types
main = types.ModuleType("__main__")
main.__file__, main.__out__ = path, out
sys.modules["__main__"] = main
exec(compile(text, path, "exec"), main.__dict__)
"""


def start(folder: Path, knobs: dict[str, str]) -> tuple[float, float]:
    """(seconds of the script, seconds of its children) of one start."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "seconds")
        env = os.environ | {"RECIPE": "cpu", "DEVICE": "cpu", "LOG_DIR": scratch} | knobs
        command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-c", STARTER, str(folder / "train_gpt.py"), str(out)]
        run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        if not out.exists():
            sys.exit(f"error: {folder} did not reach its first priming step: {run.stderr[-300:]}")
        own, children = map(float, out.read_text().strip("[]").split(","))
        return own, children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    args = parser.parse_args()
    knobs = dict(word.split("=", 1) for word in args.knobs)
    folders = [ROOT, *([args.against.resolve()] if args.against else [])]
    times = {folder: [] for folder in folders}
    for _ in range(args.rounds):
        for folder in folders:
            times[folder].append(start(folder, knobs))
    for folder, seconds in times.items():
        own, children = (median(column) for column in zip(*seconds, strict=True))
        print(f"{folder}: {own + children:.2f} s = script {own:.2f} + children {children:.2f}")
    if args.against:
        ratios = [sum(a) / sum(b) for a, b in zip(*times.values(), strict=True)]
        print(f"ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
