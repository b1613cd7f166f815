"""Everything that a first look at a GPU should answer, in one command of under 8 minutes on one H100.

    python benchmarks/gpu.py [--out logs/gpu.json] [--parts losses scores ...] [--tiny] [--seconds 480]

Prints a table and writes the same figures as JSON. A part that fails is reported with its error and the others go on; parts
that would start after --seconds are left out. --tiny shrinks every part, to try the program itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from benchmarks.artifact import shapes_of, time_gptq, time_packing  # noqa: E402
from benchmarks.ngram import Uniform  # noqa: E402
from tools.plan import activation_bytes, state_bytes  # noqa: E402

TINY = {"NUM_LAYERS": "4", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "TRAIN_SEQ_LEN": "32", "BIGRAM_VOCAB_SIZE": "64",
        "BIGRAM_DIM": "8", "EVAL_STRIDE": "8", "XSA_LAST_N": "-1", "VE_DIM": "0", "VE_LAYERS": ""}  # fmt: skip
TINY_FRONTIER = {
    "BIGRAM_VOCAB_SIZE": "0",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "1",
    "PARALLEL_START_LAYER": "3",
    "VOCAB_SIZE": "1024",
}
RECIPES = ("pr164", "pr850", "frontier")


def quiet_run(cfg: tg.Config) -> tg.Run:
    """One rank without logs."""
    run = tg.Run(cfg, 0, 0, 1, 1)
    run.log = lambda *_, **__: None
    return run


def knobs(recipe: str, tiny: bool, **changes: Any) -> tg.Config:
    """A recipe on the shipped sample or what was downloaded; the environment wins over it, `changes` over both."""
    env = {**os.environ, "RECIPE": recipe, "LOG_DIR": os.devnull, "TTT_ENABLED": "0"}
    env |= {**(TINY if tiny else {}), **(TINY_FRONTIER if tiny and recipe == "frontier" else {})}
    return tg.load_config({**env, **{k: str(v) for k, v in changes.items()}}).cfg


def trainer_of(cfg: tg.Config) -> tg.Trainer:
    """A trainer on the training split, its weights drawn from SEED on the CPU so that every device starts alike."""
    run = quiet_run(cfg)
    torch.manual_seed(cfg.seed)
    model = tg.build_model(cfg, run)
    trainer = tg.Trainer(
        cfg,
        run,
        model,
        tg.TokenStream(tg.load_split(tg.find_data(cfg, vocab_size=cfg.vocab_size).folder, "train"), cfg.vocab_size),
    )
    trainer.compile()
    return trainer


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, the device waited for, after one call that is not counted."""
    sync, times = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None), []
    work()
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- correctness


def losses(tiny: bool) -> dict[str, float]:
    """20 steps of the cpu recipe in bf16 here and in fp32 on the CPU: the largest difference of the mean loss, nats."""
    steps, curves = 3 if tiny else 20, []
    for device, dtype in (("auto", "bf16"), ("cpu", "fp32")):
        trainer = trainer_of(
            knobs("cpu", tiny, DEVICE=device, TRAIN_DTYPE=dtype, COMPILE="auto" if device == "auto" else 0)
        )
        curves.append([trainer.train_step(0.0, 1.0).item() for _ in range(steps)])
    return {
        "largest difference, nats": max(abs(a - b) for a, b in zip(*curves, strict=True)),
        "last loss": curves[0][-1],
    }


def scores(tiny: bool) -> dict[str, float]:
    """One set of weights scored here and on the CPU, all in fp32: difference in bpb by stage."""
    found: dict[str, list[float]] = {}
    for device in ("auto", "cpu"):
        cfg = knobs(
            "cpu", tiny, DEVICE=device, TRAIN_DTYPE="fp32", VAL_TOKENS=200 if tiny else 20_000, NGRAM_TABLE="none"
        )
        run, paths = quiet_run(cfg), tg.find_data(cfg, vocab_size=cfg.vocab_size)
        torch.manual_seed(0)
        model = tg.build_model(cfg, run)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device)
        text = tg.load_validation(cfg, paths.folder, tg.Tokenizer(paths.tokenizer, cfg.vocab_size))
        for result in tg.evaluate(tg.Evaluation(cfg, run, model, text), cfg.stages):
            found.setdefault(result.stage, []).append(result.val_bpb)
    return {f"{stage}, difference in bpb": abs(a - b) for stage, (a, b) in found.items()}


# ---- speed and memory


def step(recipe: str, tiny: bool) -> dict[str, float]:
    """One optimizer step of a rank of eight: milliseconds, MFU, priming, memory against the plan."""
    cfg = knobs(recipe, tiny)
    cfg = knobs(
        recipe,
        tiny,
        TRAIN_BATCH_TOKENS=cfg.train_batch_tokens // 8 if not tiny else 4 * cfg.train_seq_len,
        WARMUP_STEPS=2,
    )
    start, trainer = time.perf_counter(), trainer_of(cfg)
    trainer.prime()
    primed = time.perf_counter() - start
    seconds = seconds_of(lambda: trainer.train_step(1.0, 1.0), 3 if tiny else 20)
    name, run = tg.device_name(trainer.run.device), trainer.run
    flops = tg.flops_per_token(trainer.model, cfg.train_seq_len) * cfg.train_batch_tokens
    peak = next((rate for word, rate in tg.PEAK_FLOPS.items() if word in name), float("nan"))
    with torch.device("meta"):
        meta = tg.GPT(cfg)
    kept, eager = (n + state_bytes(cfg, meta) for n in activation_bytes(cfg, meta, run.device, trainer.micro_tokens))
    return {"ms a step": 1000 * seconds, "tokens a step": cfg.train_batch_tokens, "MFU": flops / seconds / peak, "primed, s": primed,
            "micro-batch": trainer.micro_tokens, "peak memory, MiB": run.peak_memory_mib(), "planned, compiled, MiB": kept / 2**20,
            "planned, eager, MiB": eager / 2**20}  # fmt: skip


def attention(tiny: bool) -> dict[str, float]:
    """Forward and backward of every attention kernel that is here, ms for 8 heads on 4, width 64, bf16."""
    device = tg.pick_device("auto", 0)
    batch, length = (1, 64) if tiny else (16, 2048)
    result = {}
    for kernel in ("fa3", "fa2", "sdpa"):
        try:
            attend = tg.choose_attention(knobs("baseline", False, ATTENTION=kernel, TRAIN_DTYPE="bf16"), device)[1]
        except tg.ConfigError as e:
            result[f"{kernel}: {e}"] = float("nan")
            continue
        q, k, v = (
            torch.randn(batch, length, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            for n in (8, 4, 4)
        )

        def both(attend: Any = attend, q: Any = q, k: Any = k, v: Any = v) -> None:
            attend(q, k, v).sum().backward()

        result[f"{kernel}, ms for {batch} x {length}"] = 1000 * seconds_of(both, 3 if tiny else 20)
    return result


def evaluation(tiny: bool) -> dict[str, float]:
    """Tokens a second of the network's stages with pr850's network, stride 64."""
    cfg = knobs(
        "pr850",
        tiny,
        VAL_TOKENS=200 if tiny else 60_000,
        NGRAM_SCORE="off",
    )
    run, paths = quiet_run(cfg), tg.find_data(cfg, vocab_size=cfg.vocab_size)
    model = tg.build_model(cfg, run)
    text = tg.load_validation(cfg, paths.folder, tg.Tokenizer(paths.tokenizer, cfg.vocab_size))
    results = list(tg.evaluate(tg.Evaluation(cfg, run, model, text), ("roundtrip", "sliding")))
    return {f"{r.stage}, targets a second": r.tokens / r.seconds for r in results}


def statistics_and_mixing(tiny: bool) -> dict[str, float]:
    """Exact statistics of orders 1 to 12 and their cascade over 62 M tokens of a power law."""
    n, vocab = 5_000 if tiny else 62_000_000, 1024
    cfg = knobs("cpu", tiny, NGRAM_ORDER=12)
    run = quiet_run(cfg)
    device = run.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = (vocab ** torch.rand(n, generator=generator, device=device)).long().clamp_(max=vocab - 1)
    table, base = tg.NgramTable(vocab, 12, device), Uniform(n, device)
    run.sync()
    start = time.perf_counter()
    table.load(tokens)
    run.sync()
    counted = time.perf_counter() - start
    expert, interval = tg.Cascade(table, base), max(1024, n // 4096)
    start = time.perf_counter()
    for lo in range(1, n, interval):
        expert.score(tokens, lo, min(lo + interval, n))
        expert.update(tokens, lo, min(lo + interval, n))
    run.sync()
    return {"tokens": n, f"statistics on {device.type}, s": counted, "mixing, s": time.perf_counter() - start,
            "peak memory, MiB": run.peak_memory_mib()}  # fmt: skip


def packing(tiny: bool) -> dict[str, float]:
    """GPTQ of every matrix of pr850 and of frontier (along its trellis) on this device; packing and unpacking of the baseline's
    weights on the CPU."""
    packed, unpacked = time_packing("baseline", *shapes_of(knobs("baseline", tiny)))
    searched = {f"GPTQ of {recipe}, s": time_gptq(knobs(recipe, tiny)) for recipe in ("pr850", "frontier")}
    return {**searched, "pack, s": packed, "unpack, s": unpacked}


def profile(tiny: bool) -> dict[str, float]:
    """The 15 kernels that take most time in a step of pr850, ms."""
    cfg = knobs(
        "pr850", tiny, WARMUP_STEPS=0, **({"TRAIN_BATCH_TOKENS": 128} if tiny else {"TRAIN_BATCH_TOKENS": 98304})
    )
    trainer = trainer_of(cfg)
    for _ in range(3):
        trainer.train_step(0.0, 1.0)
    with torch.profiler.profile() as recorded:
        trainer.train_step(0.0, 1.0)
        trainer.run.sync()
    on_device = lambda e: getattr(e, "self_device_time_total", 0) or e.self_cpu_time_total  # noqa: E731
    rows = sorted(recorded.key_averages(), key=on_device, reverse=True)[:15]
    return {e.key[:90]: on_device(e) / 1000 for e in rows}


def parts() -> Iterator[tuple[str, Callable[[bool], dict[str, float]]]]:
    """(name, part), what matters most first."""
    yield "losses", losses
    yield "scores", scores
    for recipe in RECIPES:
        yield f"step {recipe}", lambda tiny, recipe=recipe: step(recipe, tiny)
    yield "attention", attention
    yield "evaluation", evaluation
    yield "statistics", statistics_and_mixing
    yield "packing", packing
    yield "profile", profile


def measure(wanted: list[str] | None, tiny: bool, limit_s: float) -> dict[str, Any]:
    """part -> its figures, or {"error": why}; prints each as it is done."""
    started, report = time.perf_counter(), {}
    for name, part in parts():
        if wanted and name not in wanted and name.split()[0] not in wanted:
            continue
        since = time.perf_counter()
        if since - started > limit_s:
            report[name] = {"error": f"not started: --seconds {limit_s:g} were over"}
        else:
            try:
                report[name] = part(tiny)
            except Exception as e:
                report[name] = {"error": f"{type(e).__name__}: {e}", "where": traceback.format_exc(limit=-3)}
        print(f"{name} ({time.perf_counter() - since:.1f} s)", flush=True)
        for what, value in report[name].items():
            print(
                f"    {what:<60} {value:,.4f}" if isinstance(value, (int, float)) else f"    {what}: {value}",
                flush=True,
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/gpu.json"))
    parser.add_argument("--parts", nargs="+", help="only these, e.g. losses step statistics")
    parser.add_argument("--tiny", action="store_true", help="shrink every part")
    parser.add_argument("--seconds", type=float, default=460, help="start no part after this")
    args = parser.parse_args(argv)
    device = tg.pick_device("auto", 0)
    report: dict[str, Any] = {
        "device": tg.device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(report.values()))
    report["parts"] = measure(args.parts, args.tiny, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tg.atomic_write(args.out, json.dumps(report, indent=1).encode())
    print(f"written: {args.out}")
    return 1 if any("error" in figures for figures in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
