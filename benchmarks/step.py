"""Speed of one training step: train_gpt.py against reference.py, step by step in turn, in one run on one machine.

    python benchmarks/step.py                  the cpu recipe; any knob may be set: ATTENTION=sdpa python benchmarks/step.py
    python benchmarks/step.py --recipes        every recipe shrunk to that size, beside the FLOPs it should cost
    python benchmarks/step.py --against DOC_MASK=1    the cpu recipe with these knobs over the cpu recipe
    python benchmarks/step.py --full pr164 pr850    recipes as they are, on the GPU: compile time, ms a step, MFU, memory

All train on real text (DATA_PATH or the shipped sample), all but --full on the CPU. Each trainer lives in a process of its own, since settings such
as the matmul precision belong to the process, and the other sleeps while one works. Medians; the machine may be shared, so
the ratios mean more than the seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # before torch, since it sets how torch's threads wait, of both trainers

# isort: split
import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = str(ROOT / "data" / "sample")  # also where FineWeb was downloaded

# The size at which recipes are compared: the cpu recipe's.
SHRUNK = {
    "NUM_LAYERS": "4", "MODEL_DIM": "256", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": "512",
    "TRAIN_BATCH_TOKENS": "8192", "EVAL_SEQ_LEN": "512",
}  # fmt: skip


def gflops(seconds: float = 1.0) -> float:
    """Best rate of a 2048 x 512 x 2048 fp32 product in this process, in GFLOP/s."""
    a, b, best = torch.randn(2048, 512), torch.randn(512, 2048), 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048 * 512 * 2048 / (time.perf_counter() - start) / 1e9)
    return best


class Reference:
    """benchmarks/reference.py as it stands."""

    def __init__(self) -> None:
        from benchmarks.reference import Settings, Trainer

        self.trainer = Trainer(Settings(), Path(os.environ["DATA_PATH"]))
        self.tokens = self.trainer.s.batch_tokens

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.trainer.step()
        return time.perf_counter() - start


class Ours:
    """train_gpt.py at `knobs`, without logs; eager or compiled as COMPILE says. `quiet` says nothing of its choices."""

    def __init__(self, knobs: dict[str, str], quiet: bool = False) -> None:
        env = {**knobs, "DEVICE": "cpu", "DATA_PATH": os.environ["DATA_PATH"], "LOG_DIR": os.devnull}
        loaded, paths = t.fit_data(t.load_config(env))
        cfg = loaded.cfg
        run = t.Run(cfg, 0, 0, 1, 1)
        if quiet:
            run.log = lambda *_: None
        torch.manual_seed(cfg.seed)
        stream = t.TokenStream(t.load_split(paths.folder, "train"), cfg.vocab_size)
        self.trainer = t.Trainer(cfg, run, t.build_model(cfg, run), stream)
        self.trainer.compile()
        self.tokens = cfg.train_batch_tokens
        self.flops = t.flops_per_token(self.trainer.model, cfg.train_seq_len) * self.tokens

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.trainer.train_step(0.0, 1.0).item()
        return time.perf_counter() - start

    def ema(self) -> float:
        """Seconds that an EMA of the weights costs a step, on any recipe."""
        average = t.WeightAverage(t.dataclasses.replace(self.trainer.cfg, ema_decay=0.997), self.trainer.model)
        times = []
        for step in range(21):  # the first copies the weights
            start = time.perf_counter()
            average.update(step, 1.0, 1.0)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def breakdown(self) -> list[tuple[str, float]]:
        """[(kind of operation, seconds in one profiled step)], largest first."""
        kinds = {"mm": "products", "bmm": "products", "addmm": "products", "baddbmm": "products"}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        totals: dict[str, float] = {}
        for event in profile.key_averages():
            name = event.key.removeprefix("aten::").rstrip("_")
            kind = kinds.get(name, name)
            totals[kind] = totals.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        return sorted(totals.items(), key=lambda item: -item[1])


def serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """Child process: build a trainer, then call the methods whose names arrive; None ends it."""
    trainer = make(*arguments)
    trainer.step()
    pipe.send({name: getattr(trainer, name, None) for name in ("tokens", "flops")})
    while (name := pipe.recv()) is not None:
        pipe.send(gflops() if name == "gflops" else getattr(trainer, name)())


class Worker:
    """A trainer in its own process; `first_step` is the time from its start to the end of its first step, in seconds."""

    def __init__(self, make: Callable, *arguments: Any) -> None:
        start = time.perf_counter()
        self.pipe, child = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(child, make, arguments))
        self.process.start()
        child.close()
        self.facts = self.pipe.recv()
        self.first_step, self.times = time.perf_counter() - start, []

    def ask(self, name: str) -> object:
        """What the trainer's method `name` returns."""
        self.pipe.send(name)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def alternate(workers: list[Worker], rounds: int) -> None:
    """Time `rounds` steps of each worker in turn."""
    for _ in range(rounds):
        for worker in workers:
            worker.times.append(worker.ask("step"))


def describe(name: str, worker: Worker) -> str:
    """One line of results."""
    median = statistics.median(worker.times)
    return (
        f"{name:12s} {median:6.3f} s/step (best {min(worker.times):.3f})  {worker.facts['tokens'] / median:8.0f} tokens/s"
        f"  first step after {worker.first_step:.1f} s"
    )


def compare(knobs: dict[str, str], rounds: int) -> None:
    """Ours against the reference."""
    workers = reference, ours = Worker(Reference), Worker(Ours, knobs)
    for worker, what in zip(workers, ("as PyTorch comes", "as train_gpt.py sets it"), strict=True):
        worker.rate = worker.ask("gflops")
        print(f"2048x512x2048 fp32 product, {what}: {worker.rate:.0f} GFLOP/s")
    alternate(workers, rounds)
    for name, worker in zip(("reference", "train_gpt.py"), workers, strict=True):
        print(describe(name, worker))
    ratios = [a / b for a, b in zip(reference.times, ours.times, strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (best steps {min(reference.times) / min(ours.times):.2f})")
    floor = ours.facts["flops"] / ours.rate / 1e9
    print(f"floor {floor:.3f} s/step: {ours.facts['flops'] / 1e9:.0f} GFLOP at that rate, without the optimizer")
    print(f"EMA: {1000 * ours.ask('ema'):.2f} ms a step")
    print("one profiled step: " + ", ".join(f"{kind} {s:.3f}" for kind, s in ours.ask("breakdown")[:9]))
    for worker in workers:
        worker.close()


def compare_knobs(knobs: dict[str, str], changes: list[str], rounds: int) -> None:
    """A step with `changes` ("KNOB=value") over one without."""
    workers = without, changed = Worker(Ours, knobs), Worker(Ours, knobs | dict(word.split("=", 1) for word in changes))
    alternate(workers, rounds)
    for name, worker in zip(("without", "with"), workers, strict=True):
        print(describe(name, worker))
        worker.close()
    ratios = [a / b for a, b in zip(changed.times, without.times, strict=True)]
    print(f"{' '.join(changes)}: {statistics.median(ratios):.3f} of the time")


def shrink(recipe: str) -> dict[str, str]:
    """Knobs of `recipe` at the common size; block numbers move to the last blocks of the smaller model."""
    values = t.RECIPES[recipe]
    knobs = {"RECIPE": recipe, **SHRUNK, "COMPILE": "0"}
    if values.get("XSA_LAST_N", 0) > 4:
        knobs["XSA_LAST_N"] = "4"
    if "VE_LAYERS" in values:
        knobs["VE_LAYERS"] = "2,3"
    return knobs


def compare_recipes(rounds: int) -> None:
    """Tokens a second of each recipe; its time and its theoretical FLOPs as multiples of the baseline's, and their ratio."""
    workers = {recipe: Worker(Ours, shrink(recipe), True) for recipe in t.RECIPES}
    alternate(list(workers.values()), rounds)
    base = workers["baseline"]
    print(
        f"{'recipe':10s} {'s/step':>7s} {'tokens/s':>9s} {'x baseline':>11s} {'FLOPs x baseline':>17s} {'time/FLOPs':>11s}"
    )
    for recipe, worker in workers.items():
        ratio = statistics.median(a / b for a, b in zip(worker.times, base.times, strict=True))
        flops = worker.facts["flops"] / base.facts["flops"]
        median = statistics.median(worker.times)
        rate = worker.facts["tokens"] / median
        print(f"{recipe:10s} {median:7.3f} {rate:9.0f} {ratio:11.2f} {flops:17.2f} {ratio / flops:11.2f}")
        worker.close()


def full_size(recipe: str, rounds: int) -> None:
    """One line of a recipe as it is (but for knobs in the environment), on the device that a run would use."""
    cfg = t.load_config({**os.environ, "RECIPE": recipe, "LOG_DIR": os.devnull, "WARMUP_STEPS": "3"}).cfg
    run = t.Run(cfg, 0, 0, 1, 1)
    run.log = lambda *_: None
    torch.manual_seed(cfg.seed)
    stream = t.TokenStream(t.load_split(t.find_data(cfg, vocab_size=cfg.vocab_size).folder, "train"), cfg.vocab_size)
    trainer, start = t.Trainer(cfg, run, t.build_model(cfg, run), stream), time.perf_counter()
    trainer.compile()
    trainer.prime()  # compiles, finds the micro-batch, and is undone
    primed, times = time.perf_counter() - start, []
    for _ in range(rounds):
        run.sync()
        start = time.perf_counter()
        trainer.train_step(0.0, 1.0)
        run.sync()
        times.append(time.perf_counter() - start)
    seconds, tokens = statistics.median(times), cfg.train_batch_tokens
    name = t.device_name(run.device)
    peak = next((rate for word, rate in t.PEAK_FLOPS.items() if word in name), None)
    mfu = f"{t.flops_per_token(trainer.model, cfg.train_seq_len) * tokens / seconds / peak:.3f}" if peak else "n/a"
    print(
        f"{recipe} on one {name}, attention {t.choose_attention(cfg, run.device)[0]}: {1000 * seconds:.1f} ms a step of {tokens:,} tokens "
        f"({1000 * seconds * 786432 / tokens:.1f} ms for 786,432), {tokens / seconds:,.0f} tokens/s, MFU {mfu}, micro-batch {trainer.micro_tokens:,}, "
        f"peak memory {run.peak_memory_mib():,.0f} MiB, primed in {primed:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each trainer")
    parser.add_argument("--recipes", action="store_true", help="compare the recipes instead")
    parser.add_argument("--against", nargs="+", metavar="KNOB=value", help="compare these settings with the recipe's")
    parser.add_argument("--full", nargs="+", metavar="RECIPE", help="measure these recipes at full size instead")
    args = parser.parse_args()
    os.environ.setdefault("DATA_PATH", SAMPLE)
    if args.full:
        for recipe in args.full:
            full_size(recipe, args.rounds)
    elif args.against:
        compare_knobs({"RECIPE": "cpu", **os.environ}, args.against, args.rounds)
    elif args.recipes:
        compare_recipes(args.rounds)
    else:
        compare({"RECIPE": "cpu", **os.environ}, args.rounds)


if __name__ == "__main__":
    main()
