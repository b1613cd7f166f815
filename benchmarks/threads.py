"""What torch's threads cost: seconds of a training step by their number and GOMP_SPINCOUNT, on an idle machine and beside busy processes.

    python benchmarks/threads.py                        the cpu recipe; a thread a CPU that waits libgomp's own 300,000 rounds, against what train_gpt.py sets
    python benchmarks/threads.py --busy 1 2 --settings OMP_NUM_THREADS=2,GOMP_SPINCOUNT=300000 train_gpt.py OMP_NUM_THREADS=1
    nice -n -20 python benchmarks/threads.py            as root on a machine that others use too: their share is then small

Each setting has a process of its own, since OpenMP reads it once, and the others sleep while one works; steps are taken in turn,
so the ratios, medians of the same rounds, mean more than the seconds. A busy process is a Python loop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def burn() -> None:
    """Keeps a core busy until it is ended."""
    while True:
        pass


def measure(settings: list[str], busy: int, rounds: int) -> None:
    """Print a line for each of `settings` ("train_gpt.py": what the script sets) with `busy` processes beside it; ratios are over the first."""
    from benchmarks.step import SAMPLE, Ours, Worker  # imports torch, and here the spawned processes do too

    os.environ.setdefault("DATA_PATH", SAMPLE)
    knobs = {"RECIPE": "cpu", "COMPILE": "0"}
    workers, burners = {}, [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(busy)]
    for process in burners:
        process.start()
    for setting in settings:
        for name in OPENMP:
            os.environ.pop(name, None)
        os.environ.update(pair.split("=", 1) for pair in setting.split(",") if "=" in pair)
        workers[setting] = Worker(Ours, knobs, True)
    for _ in range(rounds):
        for worker in workers.values():
            worker.times.append(worker.ask("step"))
    first = workers[settings[0]]
    for setting, worker in workers.items():
        ratio = statistics.median(a / b for a, b in zip(worker.times, first.times, strict=True))
        print(f"{busy} busy  {setting:44s} {statistics.median(worker.times):6.3f} s/step (best {min(worker.times):.3f})  {ratio:.2f} of "
              f"{settings[0]}", flush=True)  # fmt: skip
        worker.close()
    for process in burners:
        process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[f"OMP_NUM_THREADS={os.cpu_count()},GOMP_SPINCOUNT=300000", "train_gpt.py"],
        metavar="NAME=value,NAME=value",
    )
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="busy processes beside the step")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each setting")
    args = parser.parse_args()
    for busy in args.busy:
        measure(args.settings, busy, args.rounds)


if __name__ == "__main__":
    main()
