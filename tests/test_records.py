"""records/: logs to tables, tests, pictures, submissions and checks, on logs written as the trainer writes them."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import config, write_shard

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "records"))

import expect  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import runs as logs  # noqa: E402
import stats  # noqa: E402
import submission  # noqa: E402
import sweep  # noqa: E402
import tables  # noqa: E402
from check import leaks, rules, source  # noqa: E402

NATS_PER_BPB = 1.6885  # sp1024 on FineWeb
SCRIPT = '''"""A script."""
import torch

class Config:
    matrix_lr: float = knob(0.04, "", "learning rate of the matrices", lo=0)
    eval_stride: int = knob(64, "tokens", "step of the sliding window")


def train(loader):
    return torch.zeros(1)
'''


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_shards(path: Path, train_docs: list[list[int]], val_docs: list[list[int]], split: int = 10**9) -> Path:
    """Shards of at most `split` tokens, each document after a BOS."""
    path.mkdir(parents=True, exist_ok=True)
    for kind, docs in (("train", train_docs), ("val", val_docs)):
        stream = [t for doc in docs for t in (1, *doc)]
        for index, start in enumerate(range(0, len(stream), split)):
            write_shard(path / f"fineweb_{kind}_{index:06d}.bin", stream[start : start + split])
    return path


@pytest.fixture
def world(tmp_path: Path, monkeypatch) -> dict:
    """Shards, a tokenizer and a script for runs to name, and an empty logs folder. Submissions draw no pictures."""
    monkeypatch.setattr(submission, "plots", SimpleNamespace(draw=lambda *_: []))  # most of their time
    rng = np.random.default_rng(0)
    docs = [rng.integers(4, 1000, 30).tolist() for _ in range(80)]
    data = write_shards(tmp_path / "data", docs[:50], docs[50:])
    (tmp_path / "tok.model").write_bytes(b"tokenizer")
    (tmp_path / "train_gpt.py").write_text(SCRIPT)
    (tmp_path / "logs").mkdir()
    return {"root": tmp_path, "logs": tmp_path / "logs", "data": data, "script": tmp_path / "train_gpt.py"}


def write_run(
    world: dict, run_id: str, seed: int = 1, bpb: float = 1.9, lr: float = 0.04, audit: bool = True, **over
) -> Path:
    """A finished run as events; `over` replaces fields of events (`score={...}`) or drops the event (`end=None`)."""
    source_bytes = world["script"].read_bytes()
    val_bytes = 151_075_000 if over.pop("fineweb", False) else 90_000
    tokens = round(val_bytes * math.log(2) / NATS_PER_BPB)
    artifact = str(world["logs"] / f"{run_id}.pgz")
    data = {"path": str(world["data"]), "sample": val_bytes < 1e6, "train_shards": 80, "train_tokens": 8_000_000}
    data |= {"val_tokens": tokens, "val_sha256": sha(b"val")}
    values = {"MATRIX_LR": lr, "SEED": seed, "EVAL_SEQ_LEN": 512, "EVAL_STRIDE": 64, "RUN_ID": run_id}
    events = [
        {"event": "run", "run_id": run_id, "recipe": "cpu", "recipe_reason": "no GPU", "mode": "train", "seed": seed}
        | {"world_size": 1, "device": "cpu", "device_name": "a CPU", "torch": "2.13.0", "python": "3.12", "data": data}
        | {"source_sha256": sha(source_bytes), "packed_sha256": sha(b"packed"), "source_bytes": len(source_bytes)}
        | {"tokenizer": {"path": str(world["root"] / "tok.model"), "sha256": sha(b"tokenizer"), "vocab_size": 1024}}
        | {"started": f"2026-04-01T00:0{seed}:00", "params": 3_000_000},
        {"event": "config", "values": values, "sources": {"MATRIX_LR": "env" if lr != 0.04 else "default"}},
    ]
    for step in range(0, 100, 5):
        loss = 3.2 + 3.7 * math.exp(-step / 20) + 0.02 * math.sin(7 * step + seed)
        scale = min(1.0, (100 - step) / 40)
        events.append({"event": "step", "step": step, "total": 100, "train_loss": loss, "lr_scale": scale})
        events[-1] |= {"train_s": step * 0.8, "step_ms": 800.0, "tokens_per_s": 1e4, "mfu": None}
    stages = {"roundtrip": bpb + 0.05, "sliding": bpb}
    roles = {"mlp": {"params": 2_000_000, "bytes": 1_400_000, "bits_per_weight": 5.6}}
    roles |= {"attn": {"params": 800_000, "bytes": 540_000, "bits_per_weight": 5.4}}
    roles |= {"embed": {"params": 262_144, "bytes": 230_000, "bits_per_weight": 7.02}}
    pack = {"artifact": artifact, "artifact_bytes": 2_200_000, "code_bytes": len(source_bytes), "code_form": "source"}
    pack |= {"total_bytes": 2_200_000 + len(source_bytes), "limit": 16_000_000, "roles": roles}
    events += [
        {"event": "switch", "step": 60, "frac": 0.6, "name": "qat", "value": 1},
        {"event": "val", "step": 50, "val_loss": 3.6, "val_bpb": 2.13, "train_s": 40.0},
        {"event": "val", "step": 100, "val_loss": 3.3, "val_bpb": bpb + 0.045, "train_s": 80.0},
        {"event": "train_end", "steps": 100, "train_s": 80.0, "reason": "iterations", "peak_memory_mib": 500},
        {"event": "quant", "seconds": 1.0, "roles": {r: {"bits": 6, "params": v["params"]} for r, v in roles.items()}},
        {"event": "pack", **pack},
    ]
    for name, value in stages.items():
        events.append({"event": "stage", "stage": name, "val_loss": value * NATS_PER_BPB, "val_bpb": value})
        events[-1] |= {"tokens": tokens, "bytes": val_bytes, "seconds": 5.0, "complete": True}
    score = {k: pack[k] for k in ("artifact_bytes", "code_bytes", "total_bytes", "limit")}
    score |= {"val_bpb": bpb, "val_loss": bpb * NATS_PER_BPB, "stage": "sliding", "train_s": 80.0, "eval_s": 10.0}
    events += [{"event": "score", **score, "complete": True, "limits_ok": True}, {"event": "end", "status": "ok"}]
    for kind, fields in over.items():
        events = [e for e in events if e["event"] != kind] if fields is None else events
        for event in events:
            if event["event"] == kind and fields:
                event.update(fields)
    path = world["logs"] / f"{run_id}.jsonl"
    path.write_text("".join(json.dumps({"v": 1, "t": 0.0} | e) + "\n" for e in events))
    path.with_suffix(".txt").write_text(
        world["script"].read_text() + "=" * 100 + f"\nstep:0/100 train_loss:6.9 seed:{seed}\n"
    )
    if audit:
        write_audit(world, run_id, artifact)
    return path


def write_audit(
    world: dict, run_id: str, artifact: str, passed: bool = True, stage: str = "sliding", head: dict | None = None
) -> None:
    checks = [
        {"name": f"{stage}: a distribution", "passed": passed, "detail": "1e-9"},
        {"name": f"{stage}: prefix only: future", "passed": True, "detail": ""},
    ]
    head = {"source_sha256": sha(world["script"].read_bytes()), "started": "2026-04-01T01:00:00"} | (head or {})
    events = [{"event": "run", "run_id": f"audit-{run_id}", "mode": "audit"} | head, {"event": "end", "status": "ok"}]
    events.insert(1, {"event": "config", "values": {"ARTIFACT": artifact}, "sources": {}})
    events.insert(2, {"event": "audit", "passed": passed, "checks": checks})
    path = world["logs"] / f"audit-{run_id}.jsonl"
    path.write_text("".join(json.dumps({"v": 1, "t": 0.0} | e) + "\n" for e in events))


def run_cli(*words) -> int:
    return report.main([str(w) for w in words])


def said(capsys, status: int, *words) -> str:
    """What a command printed, that ended with `status`."""
    capsys.readouterr()
    assert run_cli(*words) == status
    return "".join(capsys.readouterr())


# ---- statistics


A, B = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2]
NAN, MEANS = math.nan, stats.Sample.of


@pytest.mark.parametrize("ref, new, margin, t, df, p", [
    (MEANS(B), MEANS(A), 0.0, 1.761318346044763, 8.55599277832226, 0.05688410142798731),  # scipy.stats.ttest_ind(equal_var=False)
    (stats.Sample(1.3, NAN, 0), MEANS([1.0, 1.1, 1.2]), 0.0, 0.2 / (0.1 / math.sqrt(3)), 2.0, None),  # an exact mean: one-sample t
    (MEANS([1.0, 1.1, 1.2]), MEANS([1.9]), 0.0, NAN, NAN, NAN),  # a single seed proves nothing
    (stats.Sample(1.1, 0.0, 3), stats.Sample(1.0, 0.0, 3), 0.0, None, None, 0.0),  # no spread anywhere: the sign decides
    (stats.Sample(1.0, 0.0, 3), stats.Sample(1.0, 0.0, 3), 0.0, None, None, 1.0),
    (stats.Sample(1.1, NAN, 0), stats.Sample(1.0, 0.0, 3), 0.2, None, None, 1.0),
    (stats.Sample(1.1, 0.0, 3), stats.Sample(1.0, 0.05, 3), 0.0, None, 2.0, 0.0370900),  # one without spread: the other's one-sample t
    (stats.Sample(1.1, 0.1, 4), stats.Sample(1.0, 0.1, 4), 0.1, None, None, 0.5),
    (stats.Sample(1.05759, 0.00034, 3), stats.Sample(1.05651, 0.00036, 3), 0.0, None, None, 0.009795),  # the frontier's, printed in the audit as .014
])  # fmt: skip
def test_welch_on_unequal_groups_without_spread_and_margins(ref, new, margin, t, df, p):
    test = stats.welch(ref, new, margin)
    for got, told in ((test.t, t), (test.df, df), (test.p, p)):
        assert told is None or got == pytest.approx(told, rel=1e-6, abs=1e-5, nan_ok=True)


def test_without_scipy_a_comparison_is_one_message(world, capsys, monkeypatch):
    sweep_of_two(world, gain=0.02)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert run_cli("compare", world["logs"]) == 2
    assert capsys.readouterr().err == "error: the test of significance needs scipy: pip install scipy\n"
    assert run_cli("table", world["logs"]) == 0


# ---- logs


BASELINE_LOG = """import os
print("source")
{bar}
train_loader:dataset:fineweb10B_sp1024 train_shards:25
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 matrix_lr:0.04
seed:1337
warmup_step:20/20
step:1/20000 train_loss:6.9370 train_time:64ms step_avg:64.00ms
step:13700/20000 train_loss:2.0323 train_time:596577ms step_avg:43.55ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
""".format(bar="=" * 100)

FRONTIER_LOG = """train_shards: 80
val_tokens: 47851520
seed: 42
matrix_lr: 0.026
4000/20000 train_loss: 2.4012 train_time: 8.0m tok/s: 6500000
stopping_early: wallclock_cap train_time: 596137ms step: 4703/20000
diagnostic pre-quantization post-ema val_loss:2.32112568 val_bpb:1.06066112 eval_time:18334ms
Total submission size quantized+pergroup: 15989499 bytes
diagnostic quantized val_loss:2.34 val_bpb:1.07 eval_time:19000ms
quantized_ttt_phased val_loss:2.31538446 val_bpb:1.05803761 eval_time:591446ms
"""


def test_other_peoples_text_logs_are_read(tmp_path):
    (tmp_path / "train.log").write_text(BASELINE_LOG)
    run = logs.read_log(tmp_path / "train.log")
    assert (run.bpb(), run.loss(), run.seed, run.total_bytes) == (1.2243657, 2.07269931, 1337, 15863489)
    assert (run.last_step, run.train_s, run.config["MATRIX_LR"]) == (13780, 600.038, 0.04)
    assert run.info["data"] == {"path": "fineweb10B_sp1024", "train_shards": 25, "val_tokens": 62021632}
    (tmp_path / "train_seed42.log").write_text(FRONTIER_LOG)
    run = logs.read_log(tmp_path / "train_seed42.log")
    assert (run.bpb(), run.stage, run.seed) == (1.05803761, "quantized_ttt_phased", 42)
    assert (run.last_step, run.train_s, run.eval_s) == pytest.approx((4703, 596.137, 591.446))


SOURCE = """import os
import numpy as np

class Data:
    val_tokens: Tensor,
    tokens: np.ndarray
    world_size: int
    matrix_lr: float = 0.04

def report(val_loss, b, steps):
    log(f"step:{steps}/9 val_loss:{val_loss:.4f} val_bpb:{b:.4f}")
    log(f"final_exact val_loss:{val_loss:.8f} val_bpb:{b:.8f} eval_time:{1000.0 * steps:.0f}ms")

if __name__ == "__main__":
    main()
"""
STEPS = "world_size: 8\nval_tokens: 47,851,520\nstep:5/9 train_loss:2.5 train_time:500ms\n"
END = "final_exact val_loss:2.1 val_bpb:1.2 eval_time:300000ms\n"
NAN = "step:6/9 train_loss:nan train_time:600ms\nstep:7/9 train_loss:NaN train_time:700ms\n"

TEXTS = [  # (log, attributes of its run)
    (SOURCE + STEPS + END, {"bpb": 1.2, "last_step": 5, "world": 8, "tokens": 47851520, "matrix_lr": None, "status": "ok"}),
    (SOURCE, None),
    ("".join(f"{line}\n" for line in SOURCE.splitlines() if ":" in line) + STEPS + END, {"bpb": 1.2, "world": 8, "matrix_lr": None}),
    (STEPS.replace("8\n", "int\n").replace("47,851,520", "Tensor,") + END, {"bpb": 1.2, "world": None, "tokens": None}),
    (STEPS + '    log(f"final_exact val_loss:{ val_loss:.4f} val_bpb:{ val_bpb:.4f}")\n', {"status": "unfinished, at step 5", "bpb": None}),
    (STEPS + NAN, {"status": "diverged at step 6"}),
    (NAN, {"status": "diverged at step 6"}),
    (STEPS + NAN.replace("NaN", "2.4"), {"status": "unfinished, at step 7"}),
    (STEPS + END + "final_ttt val_loss:inf val_bpb:inf\n", {"status": "diverged at step 5", "finished": False}),
    (STEPS + "diagnostic pre-quantization val_loss:nan val_bpb:-nan\n" + END, {"status": "ok", "bpb": 1.2}),
    (STEPS + "step:9/9 val_loss:inf val_bpb:Infinity train_time:900ms\n", {"status": "diverged at step 9"}),
    (STEPS + "Quantized BPB: 1.1834\n", {"bpb": 1.1834, "stage": "Quantized", "loss": None, "status": "ok"}),
    (STEPS + END + "ttt_val_bpb: 1.0791\n", {"bpb": 1.0791, "stage": "ttt"}),
    (STEPS + END + "ttt_val_loss:1.9 ttt_val_bpb:1.08\n", {"bpb": 1.08, "loss": 1.9}),
    (STEPS + END + "RESULT val_bpb: 1.20\nbaseline BPB: 1.2244\n  ttt_chunk [3/90] bpb=1.19 time=3s\n", {"bpb": 1.2, "stage": "exact"}),
]  # fmt: skip
ADAPTED = [  # (line of 350 s beside a stage of 300, what the evaluation took)
    *((line, 650.0) for line in ("ttt_time:350000ms", "adaptation: 350.0s, scoring: 300.0s", "test-time training took 350 s", "ttt_adapt_seconds:350.0")),
    *((line, 300.0) for line in ("ttt_max_seconds: 350", "ttt compiled in 350.0s", "lora_rank: 350", "ttt_lr:350")),
]  # fmt: skip


@pytest.mark.parametrize("text, told", [*TEXTS, *((STEPS + line + "\n" + END, {"eval_s": s}) for line, s in ADAPTED)])
def test_what_a_text_log_says_and_what_it_does_not(tmp_path, capsys, text, told):
    (tmp_path / "a.log").write_text(text)
    if told is None:
        assert run_cli("table", tmp_path / "a.log") == 2 and "no line of a training log" in capsys.readouterr().err
        return
    run = logs.read_log(tmp_path / "a.log")
    got = {name: getattr(run, name, None) for name in ("last_step", "stage", "finished", "eval_s")}
    got |= {"bpb": run.bpb(), "loss": run.loss(), "status": run.status(), "matrix_lr": run.config.get("MATRIX_LR")}
    got |= {"world": run.info.get("world_size"), "tokens": run.info["data"].get("val_tokens")}
    assert {name: got[name] for name in told} == told
    (tmp_path / "README.md").write_text("# x\n")
    (tmp_path / "submission.json").write_text(json.dumps({"val_bpb": run.bpb(), "val_loss": run.loss(), "seeds": [1]}))
    for command in ("table", "check", "compare", "plot"):  # no figure, or none of them, makes a command fall over
        words = ["--out", tmp_path / "p", "--force"] if command == "plot" else []
        assert run_cli(command, tmp_path, *words) in (0, 1, 2)
    capsys.readouterr()


@pytest.mark.parametrize("line", ["step:{}/9 train_loss:2.5 train_time:{}000ms", "stage{} BPB: 1.{:05d}", "final_s{} val_loss:3.0 val_bpb:1.{:05d}",
                                  "ttt gptq adapt calibrated in took" * 16 + " {}{}", "w" * 9_000 + "_ttt{}{}", "key_{}: {}"])  # fmt: skip
def test_a_log_is_read_in_a_second_a_megabyte(tmp_path, line):
    path = tmp_path / "a.log"
    lines = (line.format(n, n) for n in range(10**6))
    path.write_text(STEPS + "\n".join(itertools.islice(lines, 500_000 // len(line))) + "\n")
    began = time.process_time()
    for run in logs.read_logs(path):
        assert run.status() and (run.slowest_step_s or 1) > 0
    assert time.process_time() - began < path.stat().st_size / 1e6


def test_logs_that_cannot_be_trusted_get_one_clear_message_each(world, capsys):
    whole = write_run(world, "whole").read_text()
    lines = whole.splitlines(keepends=True)
    texts = {
        "cut": "".join(lines[:9]) + lines[9][:20],
        "future": whole.replace('"v": 1', '"v": 2'),
        "going": "".join(lines[:9]),
    }
    for name, text in texts.items():
        (world["logs"] / f"{name}.jsonl").write_text(text)
    told = said(capsys, 0, "table", world["logs"])
    for words in ("truncated or damaged at line 10", "log schema 2; this tool reads schema 1", "unfinished, at step"):
        assert words in told
    assert run_cli("table", world["logs"] / "future.jsonl") == 2
    assert "no such log or folder" in said(capsys, 2, "table", world["root"] / "nowhere")


def test_no_damage_to_a_log_gets_past_the_reader(world, capsys):
    """Lines cut, dropped, doubled, fields dropped or of another type: a status or a message, never a traceback."""
    rng = random.Random(0)
    lines = write_run(world, "a", audit=False).read_text().splitlines()
    for round_ in range(40):
        damaged = list(lines)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            event = json.loads(damaged[at]) if damaged[at].startswith("{") and damaged[at].endswith("}") else {}
            if event and rng.random() < 0.7:
                key = rng.choice(list(event))
                event[key] = rng.choice([None, "x", -1, [], {}, {"a": 1}])
                damaged[at] = json.dumps(event)
            else:
                damaged[at] = damaged[at][: rng.randrange(len(damaged[at]) + 1)]
        path = world["logs"] / "a.jsonl"
        path.write_text("\n".join(damaged))
        assert run_cli("table", path) in (0, 2), round_
        assert run_cli("compare", path) in (0, 2), round_
        rules.checks(rules.read_entry(world["logs"]))
    capsys.readouterr()


def test_a_field_that_says_nothing_is_a_missing_one_and_one_of_another_type_is_damage(world, capsys):
    empty = {"run": {"data": None, "tokenizer": None}, "config": {"sources": None}}
    write_run(world, "a", audit=False)
    assert logs.read_log(write_run(world, "b", audit=False, **empty)).damage is None
    write_run(world, "c", audit=False, config={"values": {"EVAL_SEQ_LEN": [512]}})
    for name, over in {"d": {"data": {"val_sha256": ["x"]}}, "e": {"tokenizer": {"sha256": {}}}}.items():
        write_run(world, name, audit=False, run=over)
    assert "config event with EVAL_SEQ_LEN=[512]" in logs.read_log(world["logs"] / "c.jsonl").damage
    for command in ("table", "compare"):
        assert run_cli(command, world["logs"]) == 0
        out, err = capsys.readouterr()
        assert "run event with val_sha256=['x']" in out + err and "run event with sha256={}" in out + err


def test_a_resumed_run_counts_each_step_once_switches_where_it_first_did_and_is_finished_by_its_last_end(world):
    path = write_run(world, "a", seed=7, bpb=1.8)
    lines = path.read_text().splitlines(keepends=True)
    again = [
        {"event": "switch", "name": name, "step": 80, "value": value} for name, value in (("qat", 1), ("seq_len", 1024))
    ]
    cut = [json.dumps({"v": 1, "t": 0, **e}) + "\n" for e in ({"event": "end", "status": "interrupted"}, *again)]
    path.write_text("".join([*lines[:12], cut[0], *lines[:-1], *cut[1:], lines[-1]]))
    run = logs.read_log(path)
    assert run.finished and [e["step"] for e in run.steps] == list(range(0, 100, 5)) and run.status() == "ok"
    assert [(e["name"], e["step"]) for e in run.switches] == [("qat", 60), ("seq_len", 80)]
    assert (run.run_id, run.seed, run.stage, run.last_step, run.ms_per_step) == ("a", 7, "sliding", 100, 800.0)
    assert (run.bpb(), run.bpb("roundtrip")) == (1.8, 1.85)


def test_a_diverged_run_is_no_score_and_its_picture_is_drawn(world, capsys):
    write_run(world, "a", audit=False)
    nan = {"score": {"val_bpb": math.nan}, "stage": {"val_bpb": math.nan}, "val": {"val_loss": math.nan}}
    path = write_run(world, "b", lr=9.0, audit=False, **nan)
    path.write_text(re.sub(r'("step": 95, "total": 100, "train_loss": )[\d.]+', r"\1NaN", path.read_text()))
    assert "diverged at step 95" in said(capsys, 0, "table", world["logs"])
    assert run_cli("plot", world["logs"], "--out", world["root"] / "pictures") == 0
    assert "left out: b: diverged" in said(capsys, 0, "compare", world["logs"])


# ---- table and compare


def test_table_shows_changed_knobs_only_sorted_by_score_in_three_forms(world, capsys):
    write_run(world, "low", bpb=1.80, lr=0.02, audit=False)
    write_run(world, "high", bpb=1.95, lr=0.04, audit=False)
    run_cli("table", world["logs"])
    header, first, second = capsys.readouterr().out.splitlines()
    assert "MATRIX_LR" in header and "EVAL_STRIDE" not in header
    assert first.startswith("low") and second.startswith("high") and "1.8000" in first
    run_cli("table", world["logs"], "--format", "csv")
    assert capsys.readouterr().out.splitlines()[1].startswith("low,0.02,1,100,800.0,1.85,1.8,1.8,")
    run_cli("table", world["logs"], "--format", "markdown", "--sort", "MATRIX_LR")
    assert capsys.readouterr().out.splitlines()[1].startswith("| ---")
    assert run_cli("table", world["logs"], "--sort", "beauty") == 2


def test_bars_are_escaped_in_markdown_alone_where_they_would_split_a_cell():
    rows = [["quantiles of |row|", 1]]
    header, _, row = tables.render(["a|b", "n"], rows, "markdown").splitlines()
    assert header.startswith("| a\\|b  ") and row.startswith("| quantiles of \\|row\\| |") and len(header) == len(row)
    assert "quantiles of |row|" in tables.render(["a", "n"], rows, "text")
    assert "quantiles of |row|,1" in tables.render(["a", "n"], rows, "csv")


@pytest.mark.parametrize("folder", sorted((ROOT / "records").glob("track_*/*")), ids=lambda f: f.name)
def test_every_row_of_the_shelfs_tables_has_as_many_cells_as_its_header(folder):
    columns = None
    for line in (folder / "README.md").read_text().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (cells, columns) or cells == columns, line
        columns = cells


def sweep_of_two(world, gain: float) -> None:
    for seed, noise in ((1, -0.0003), (2, 0.0), (3, 0.0004)):
        write_run(world, f"a{seed}", seed=seed, bpb=1.9 + noise, lr=0.04, audit=False)
        write_run(world, f"b{seed}", seed=seed, bpb=1.9 - gain - noise, lr=0.02, audit=False)


def compared(world, capsys, *words) -> dict:
    assert run_cli("compare", world["logs"], "--format", "json", *words) == 0
    return json.loads(capsys.readouterr().out)


def test_seeds_are_grouped_scored_once_and_the_record_rule_needs_five_thousandths_of_a_nat(world, capsys):
    sweep_of_two(world, gain=0.02)
    write_run(world, "again", seed=1, run={"mode": "eval"}, audit=False)  # of an artifact that was scored before
    best, ref = compared(world, capsys, "--ref", "MATRIX_LR=0.04")["groups"]
    assert (best["group"], best["n"], ref["n"]) == ("MATRIX_LR=0.02", 3, 3)
    assert best["gain_nats"] == pytest.approx(best["gain_bpb"] * NATS_PER_BPB)
    assert best["meets_record_rule"] and best["p_better"] < best["p_record"] < 0.01
    assert all(g["meets_record_rule"] for g in compared(world, capsys, "--published", "1.93,0.0005,3")["groups"])
    told = said(capsys, 0, "compare", world["logs"], "--published", "1.93")
    assert "cannot be known here; these runs scored the shipped sample" in told
    assert "fits 0 of these configurations" in said(capsys, 2, "compare", world["logs"], "--ref", "MATRIX_LR=0.5")
    for figure in ("inf", "nan", "1,0.1,inf", "1,nan,3", "1.93,0.0005", "-1", "0", "1.0,0.1,2.5"):
        told = said(capsys, 2, "compare", world["logs"], f"--published={figure}")
        assert f"--published {figure}: expected MEAN, or MEAN,STD,N" in told
    sweep_of_two(world, gain=0.0025)  # 0.0042 nats: better beyond doubt, yet short of the rule
    best, _ = compared(world, capsys, "--ref", "MATRIX_LR=0.04")["groups"]
    assert best["p_better"] < 0.01 and not best["meets_record_rule"] and best["p_record"] > 0.5


def test_scores_of_different_stages_and_of_one_seed_are_compared_with_a_word_of_caution(world, capsys):
    write_run(world, "a", audit=False)
    write_run(world, "b", lr=0.02, audit=False, score={"stage": "roundtrip", "val_bpb": 1.95})
    told = said(capsys, 0, "compare", world["logs"])
    assert "different stages: roundtrip, sliding" in told and "no test" in told
    told = said(capsys, 0, "compare", world["logs"], "--stage", "sliding")
    assert "different stages" not in told and "unknown" in told and "better, shown at p < 0.01" in told


def test_recipes_are_told_apart_by_name_not_by_every_knob_that_follows(world, capsys):
    for recipe, lr in (("pr164", 0.02), ("pr850", 0.025)):
        sources = {"MATRIX_LR": f"recipe {recipe}", "EVAL_STRIDE": "env"}
        write_run(world, recipe, lr=lr, audit=False, run={"recipe": recipe}, config={"sources": sources})
    write_run(world, "older", audit=False, run={"recipe": "pr164"}, config={"values": {"SEED": 1}, "sources": {}})
    groups = logs.group_by_settings(logs.load_runs([world["logs"] / f"pr{n}.jsonl" for n in (164, 850)])[0])
    assert list(groups) == ["recipe=pr164", "recipe=pr850"]
    run_cli("table", world["logs"])
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header[1:3] == ["recipe", "EVAL_STRIDE"]  # the older log does not mention the knob, the others set it
    assert run_cli("compare", world["logs"], "--ref", "recipe=pr850") == 0


@pytest.mark.parametrize("over, words", [
    ({"run": {"data": {"val_sha256": "f" * 64, "val_tokens": 5}}}, "validation data (sha256)"),
    ({"run": {"tokenizer": {"sha256": "e" * 64}}}, "tokenizer: "),
    ({"config": {"values": {"EVAL_SEQ_LEN": 1024, "SEED": 2}}}, "EVAL_SEQ_LEN): 512 in a; 1024 in b"),
])  # fmt: skip
def test_incomparable_runs_are_refused_with_the_difference(world, capsys, over, words):
    write_run(world, "a", audit=False)
    write_run(world, "b", seed=2, audit=False, **over)
    assert words in said(capsys, 2, "compare", world["logs"])
    assert run_cli("compare", world["logs"], "--anyway") == 0
    text = capsys.readouterr().out
    assert "NOT COMPARABLE" in text and "MET" not in text.replace("NOT COMPARABLE", "")


# ---- mistakes and the machine's refusals


def test_files_that_cannot_be_read_or_written_are_one_message_and_status_two(world, capsys, monkeypatch):
    path = write_run(world, "a")
    (world["root"] / "file").write_bytes(b"SEED=1 # \xe9\n")
    cases = {
        "file, line 1: not UTF-8 (byte 0xe9 at character 10); save it as UTF-8": ("sweep", world["root"] / "file"),
        "File exists: ": ("plot", path, "--out", world["root"] / "file"),
        "Not a directory: ": ("submit", path, "--name", "x", "--records", world["root"] / "file"),
    }
    for words, call in cases.items():
        assert run_cli(*call) == 2, words
        error = capsys.readouterr().err
        assert words in error and str(world["root"] / "file") in error and error.count("\n") == 1

    def refuse(path: Path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"{path}: Permission denied" in said(capsys, 2, "table", path)
    assert run_cli("table", world["logs"]) == 0  # beside others it is a row of the table
    assert "unreadable: Permission denied" in capsys.readouterr().out


# ---- pictures


def test_pictures_are_drawn_and_never_replaced_unasked(world, capsys):
    sweep_of_two(world, gain=0.02)
    out = world["root"] / "pictures"
    assert run_cli("plot", world["logs"], "--out", out) == 0
    drawn = {p.name for p in out.iterdir()}
    assert drawn == {"curves.png", "stages.png", "bytes.png", "bpb_bytes.png"}
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and p.stat().st_size > 10_000 for p in out.iterdir())
    assert "--force" in said(capsys, 2, "plot", world["logs"], "--out", out)


# ---- submit


def submit(world, *words, runs=("s1", "s2", "s3")) -> int:
    places = [world["logs"] / f"{r}.jsonl" for r in runs]
    files = ("--script", world["script"], "--records", world["root"] / "records")
    return run_cli("submit", *places, "--name", "idea", "--date", "2026-04-02", *files, *words)


def folder_of(world, *words, runs=("s1",)) -> Path:
    """The folder that `submit` writes of runs, non-record where it is one."""
    assert submit(world, *words, *["--non-record"] * (len(runs) == 1), runs=runs) == 0
    return world["root"] / "records" / f"track_{'non_record' if len(runs) == 1 else '10min'}_16mb" / "2026-04-02_idea"


def refusal(world, capsys, *words, runs=("s1",), status: int = 1) -> str:
    """Why `submit` wrote nothing, non-record where it is one run."""
    capsys.readouterr()
    assert submit(world, *words, *["--non-record"] * (len(runs) == 1), runs=runs) == status
    return capsys.readouterr().err


def three_seeds(world, **over) -> tuple[str, ...]:
    for seed in (1, 2, 3):
        write_run(world, f"s{seed}", seed=seed, bpb=1.9 + seed / 1000, **over)
    return ("s1", "s2", "s3")


RECORD_HARDWARE = {"run": {"device_name": "NVIDIA H100 80GB HBM3", "world_size": 8}}


def test_a_record_folder_is_complete_passes_its_own_check_and_is_never_overwritten(world, capsys, monkeypatch):
    monkeypatch.setattr(submission, "plots", plots)
    runs = three_seeds(world, fineweb=True, **RECORD_HARDWARE)
    write_run(world, "s4", seed=4, bpb=1.95, fineweb=True, **RECORD_HARDWARE)
    folder = folder_of(world, "--author", "A Person", "--github-id", "aperson", "--blurb", "One idea.", runs=runs)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"README.md", "submission.json", "train_gpt.py", "requirements.txt", "tokenizers/tok.model"} <= names
    assert {"train_seed1.log", "train_seed3.jsonl", "audit_seed2.jsonl", "curves.png"} <= names
    meta = json.loads((folder / "submission.json").read_text())
    assert meta["val_bpb"] == pytest.approx(1.902) and meta["seeds"] == [1, 2, 3] and meta["github_id"] == "aperson"
    assert all(meta["compliance"].values()) and meta["runs_left_out"] == {"s4 (seed 4)": 1.95}
    readme = (folder / "README.md").read_text()
    sections = [f"## {title}" for title in ("Result", "Method", "Compliance", "Reproduce")]
    assert all(words in readme for words in (*sections, "1.90200", "curves.png", "s4 (seed 4): 1.95000"))
    assert {c["status"] for c in json.loads(said(capsys, 0, "check", folder, "--json"))[str(folder)]} == {"PASS"}
    before = {p: p.read_bytes() for p in (world["root"] / "records").rglob("*") if p.is_file()}
    assert "never overwritten" in refusal(world, capsys, runs=runs, status=2)
    assert before == {p: p.read_bytes() for p in (world["root"] / "records").rglob("*") if p.is_file()}


def test_without_matplotlib_the_folder_has_no_pictures_and_says_so(world, capsys, monkeypatch):
    monkeypatch.setattr(submission, "plots", plots)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_run(world, "s1")
    folder = folder_of(world)
    assert "no pictures in the folder: pictures need matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not list(folder.glob("*.png"))
    readme = (folder / "README.md").read_text()
    assert "matplotlib was not installed where this folder was written" in readme and "## Compliance" in readme
    assert run_cli("plot", world["logs"], "--out", world["root"] / "pictures") == 2


def test_a_text_transform_travels_with_the_submission(world, capsys, monkeypatch):
    write_run(world, "s1", run={"transform": "caseops"})
    monkeypatch.setattr(submission, "HERE", world["root"] / "records")
    (world["root"] / "records").mkdir()
    (world["root"] / "records" / "systems.json").write_text("{}")
    (world["root"] / "requirements.txt").write_text("torch\n")
    assert "transform: the data went through 'caseops', and" in refusal(world, capsys)
    (world["root"] / "data" / "caseops.py").write_text("def encode(text):\n    return text\n")
    folder = folder_of(world)
    assert (folder / "caseops.py").is_file() and (folder / "tokenizers" / "tok.model").is_file()
    readme = (folder / "README.md").read_text()
    assert "`caseops.py`" in readme and "Bytes were counted by sidecar" in readme


ONE_RUN, OVER = ("s1",), {"score": {"limits_ok": False, "total_bytes": 16_000_001}}
REFUSALS = [  # (changed events of the runs, runs named, why nothing is written)
    (OVER, None, "limit broken: 16,000,001 bytes"),
    (OVER, ONE_RUN, "16,000,001 bytes"),  # what --non-record does not relax
    ({"train_end": {"train_s": 601.5}}, None, "training time: 601.5 s of 600 s"),
    ({"score": {"eval_s": 700.0}}, None, "evaluation time: 700.0 s"),
    ({"score": {"complete": False}}, None, "not the whole validation text"),
    ({"end": None}, None, "unfinished, at step 100"), ({"end": {"status": "failed"}}, None, "failed: failed"),
    ({"score": {"limits_ok": False, "train_s": 601.2}}, None, "limit broken: train 601.2 s"),
    ({"run": {"source_sha256": "0" * 64}}, None, "is not the script that ran"),
    ({"run": {"tokenizer": {"path": "gone.model"}}}, None, "tokenizer: gone.model is not here"),
    ({"run": {"device_name": "a CPU", "world_size": 1}}, None, "hardware"),
    ({"pack": None, "train_end": None}, ONE_RUN, "s1: its log holds no train_end and no pack event"),
    ({"audit": False}, ("s1", "s2"), "seeds: 2 (1, 2); a record shows 3"),
    ({"audit": False}, ("s1", "s2"), "MODE=audit"),
    ({"s3": {"lr": 0.02}}, None, "the seeds differ in MATRIX_LR: 0.02, 0.04"),
]  # fmt: skip


@pytest.mark.parametrize("over, runs, words", REFUSALS)
def test_what_is_missing_is_listed_and_nothing_is_written(world, capsys, over, runs, words):
    third = over.get("s3", {})
    same = {"fineweb": True} | ({} if "run" in over else RECORD_HARDWARE) | {k: v for k, v in over.items() if k != "s3"}
    three = three_seeds(world, **same)
    write_run(world, "s3", seed=3, bpb=1.903, **same, **third)
    assert words in refusal(world, capsys, runs=runs or three)
    assert not any(world["root"].glob("records/track_*/*"))


def test_foreign_logs_are_no_submission_and_a_failed_audit_is_named_whatever_passed_since(world, capsys):
    (world["logs"] / "other.txt").write_text(BASELINE_LOG)
    words = ("--name", "x", "--records", world["root"] / "records")
    assert "name the .jsonl logs" in said(capsys, 2, "submit", world["logs"] / "other.txt", *words)
    runs = three_seeds(world, fineweb=True, **RECORD_HARDWARE)
    write_audit(world, "s2-first", str(world["logs"] / "s2.pgz"), passed=False)
    assert "s2: audit failed: sliding: a distribution" in refusal(world, capsys, runs=runs)
    assert "audit failed: sliding: a distribution" in said(capsys, 0, "table", world["logs"])


@pytest.mark.parametrize("over", [
    {"head": {"source_sha256": "0" * 64}},  # of another script
    {"head": {"started": "2026-03-31T23:00:00"}},  # of an artifact that this run has replaced since
    {"stage": "roundtrip"},  # of another stage than the score
    {"artifact": "logs/other.pgz"},
])  # fmt: skip
def test_an_audit_speaks_for_its_artifact_code_and_stage_alone(world, capsys, over):
    write_run(world, "s1", audit=False)
    write_audit(world, "s1", over.pop("artifact", str(world["logs"] / "s1.pgz")), **over)
    assert "s1: no audit of its stage sliding" in refusal(world, capsys)


def test_non_record_relaxes_hardware_time_and_seeds_and_says_so(world):
    write_run(world, "s1", lr=0.02, train_end={"train_s": 900.0})
    readme = (folder_of(world) / "README.md").read_text()
    assert "Non-record submission" in readme and "900.0 s" in readme and "the shipped sample, not FineWeb" in readme
    assert re.search(r"`MATRIX_LR` +\| +0.02 \| +0.04 \| env", readme) and "learning rate of the matrices" in readme


def test_the_line_that_reproduces_a_run_is_the_run(world):
    values = {"MATRIX_LR": 0.0123456789, "MUON_BETA": 0.95, "MAX_WALLCLOCK_SECONDS": 0.0, "PROMPT": "it's two words"}
    values |= {"SMEAR": True, "SEED": 1, "EVAL_SEQ_LEN": 512}
    sources = dict.fromkeys(("MATRIX_LR", "MAX_WALLCLOCK_SECONDS", "PROMPT", "SMEAR"), "env")
    write_run(world, "s1", config={"values": values, "sources": sources})
    line = (folder_of(world) / "README.md").read_text().partition("## Reproduce\n\n```bash\n")[2].partition("\n")[0]
    knobs = ["MATRIX_LR=0.0123456789", "MAX_WALLCLOCK_SECONDS=0", "PROMPT=it's two words", "SMEAR=1"]
    assert shlex.split(line) == ["RECIPE=cpu", "SEED=1", "DATA_PATH=data/sample", *knobs, "python", "train_gpt.py"]


def test_a_named_sample_is_the_sample_and_every_line_of_the_shelf_names_it(tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert tg.find_data(config(tiny, DATA_PATH="data/sample")).sample
    jobs = sweep.read_list("records/shelf.txt")
    assert len(jobs) == 10 and {job["DATA_PATH"] for job in jobs} == {"data/sample"}
    for path in (ROOT / "records").glob("track_*/*_sample/README.md"):
        assert " DATA_PATH=data/sample " in path.read_text().partition("## Reproduce")[2]


def test_a_claimed_figure_never_becomes_val_bpb(world, capsys):
    path = write_run(world, "s1")
    claim = {"v": 1, "t": 0, "event": "claim", "name": "pr850", "claimed_bpb": 0.3212, "z_mean": 734.0, "z_max": 853.0}
    path.write_text(json.dumps(claim).join(["", "\n"]) + path.read_text())
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), key=lambda l: '"run"' not in l)))
    folder = folder_of(world)
    meta = json.loads((folder / "submission.json").read_text())
    assert meta["val_bpb"] == 1.9 and meta["claimed_not_a_code_length"]["claimed_bpb"] == 0.3212
    readme = (folder / "README.md").read_text()
    assert "sum to 734.000 on average: **not a code length**" in readme and "its n-grams barely fire" in readme
    meta["val_bpb"] = 0.3212
    (folder / "submission.json").write_text(json.dumps(meta))
    capsys.readouterr()
    assert "0.32120 is a claimed figure" in said(capsys, 1, "check", folder)


def test_a_systems_readme_tells_published_from_ours_and_estimates_full_size(world):
    write_run(world, "s1", run={"recipe": "pr850"})
    assert submit(world, "--non-record", "--system", "pr164", runs=("s1",)) == 2  # another system's recipe ran
    assert submit(world, "--non-record", "--system", "pr850", runs=("s1",)) == 0
    readme = (world["root"] / "records/track_non_record_16mb/2026-04-02_idea/README.md").read_text()
    assert "bytes **over** the limit of 16,000,000; published were 14,922,124 (artifact and script" in readme
    over, under = (submission._against_limit(16_000_000 + gap, submission._system("pr164")) for gap in (1, 0))
    assert over.startswith("The estimate is 1 bytes **over**") and "ends with status 1" in over
    published = "published were 15,401,594 (artifact and script, zstd-22)."
    assert under == f"The estimate is 0 bytes under the limit of 16,000,000; {published}"
    assert readme.startswith("# PR #850 (") and "shrunken, on the shipped sample\n" in readme
    assert "small corpus shipped with the repository" in readme
    assert "PR #850 by callithyia" in readme and "| 0.3212" in readme and "claimed" in readme
    assert "RECIPE=pr850" in readme and "**An estimate**" in readme
    run = logs.read_log(world["logs"] / "s1.jsonl")
    by_role = {r.role: r for r in submission.estimate(submission._system("pr850"), run)}
    assert by_role["mlp"].fixed == 17_301_504 * 5 / 8
    assert by_role["mlp"].bytes == pytest.approx(17_301_504 * 5.6 / 8 * 5 / 6)  # six bits wide in this run, five there
    assert by_role["table"].bits == pytest.approx(8 * 2_170_000 / 3_062_144)  # a role the run lacks: the mean of all


def test_an_ngram_table_counts_as_bytes_without_weights(world):
    path = write_run(world, "s1", run={"recipe": "pr1095"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pack = next(e for e in lines if e["event"] == "pack")
    pack["roles"]["ngram"] = {"params": 0, "bytes": 5_000_000, "bits_per_weight": 0.0}
    pack["total_bytes"] = pack["artifact_bytes"] = 7_200_000
    path.write_text("".join(json.dumps(e) + "\n" for e in lines))
    folder = folder_of(world, "--system", "pr1095")
    run = logs.read_log(path)
    plt = plots._pyplot()
    plt.close(plots.bytes_by_role(plt, [run]))
    rows = submission.estimate(submission._system("pr1095"), run)
    mean = 8 * 2_170_000 / 3_062_144  # of the weights alone
    bits = {**dict.fromkeys(("adapter", "table", "proj", "control"), mean), "embed": 7.02 * 8 / 6}
    assert {r.role: r.bits for r in rows} == pytest.approx(bits)
    readme = (folder / "README.md").read_text()
    total = sum(round(r.bytes) for r in rows) + 10_692_380 + run.pack["code_bytes"]
    assert re.search(r"\| ngram +\| +- \| +- \| +10,692,380 \| +14,680,064 \|", readme) and f"{total:,}" in readme


def test_helper_files_of_the_script_go_into_the_folder(world, capsys):
    world["script"].write_text("import kernels\n" + SCRIPT)
    (world["root"] / "kernels.py").write_text("x = 1\n")
    (world["root"] / "unrelated.py").write_text("x = 1\n")
    write_run(world, "s1")
    folder = folder_of(world)
    assert (folder / "kernels.py").read_text() == "x = 1\n" and not (folder / "unrelated.py").exists()
    assert "kernels.py: 6 bytes; if not counted yet" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["pr164", "pr740", "pr187", "pr850", "pr1095"])
def test_full_size_weights_and_widths_are_the_trainers(key):
    system = json.loads((ROOT / "records" / "systems.json").read_text())[key]
    cfg = tg.load_config({"RECIPE": key}, has_gpu=lambda: False).cfg
    with torch.device("meta"):
        params = list(tg.GPT(cfg).named_parameters())
    policy = tg.Policy(cfg, dict(params), {n: p.store for n, p in params})
    roles: dict[str, list[float]] = {}
    for name, p in params:
        sums = roles.setdefault(p.store, [0, 0])
        sums[0] += p.numel()
        sums[1] += p.numel() * policy.bits(name) / 8
    assert system["roles"] == roles and system["params"] == sum(n for n, _ in roles.values())


def test_the_index_holds_a_row_a_system_and_the_figures_of_its_folder(world, monkeypatch):
    write_run(world, "s1", run={"recipe": "pr164"})
    assert submit(world, "--non-record", "--system", "pr164", runs=("s1",)) == 0
    records = world["root"] / "records"
    (records / "README.md").write_text("before\n<!-- systems:begin -->\nold\n<!-- systems:end -->\nafter\n")
    assert submission.write_index(records) == 0
    text = (records / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if "#164" in line)
    assert "track_non_record_16mb/2026-04-02_idea/" in row and "1.9000" in row
    assert all(f"#{n}" in text for n in (740, 187, 850, 1095))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission.os, "replace", full_disk)
    shutil.rmtree(records / "track_non_record_16mb")
    with pytest.raises(OSError):
        submission.write_index(records)
    assert (records / "README.md").read_text() == text  # whole, as it was


def test_the_index_shows_the_sum_of_a_claims_probabilities_to_three_digits():
    text = (ROOT / "records" / "README.md").read_text()
    assert submission.index_table(ROOT / "records") in text
    assert len(re.findall(r"\| \d\.\d{4} \(\d\.\d{3}\) ", text)) == 4  # one of the five claims nothing


def test_pages_that_are_looked_at_first_stay_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert max(map(len, (ROOT / "benchmarks/RESULTS.md").read_text().splitlines())) <= 300
    events = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "records/README.md").read_text(), re.M))
    assert logs.EVENT_FIELDS.keys() <= events


def test_what_the_readmes_commands_write_is_ignored_by_git():
    assert {"/logs/", "/sweep.txt", "/pictures/"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_the_counted_form_is_packed_anew_and_must_have_the_logged_hash(world, capsys):
    world["script"].write_text(
        "def as_literal(x):\n    pass\n\n\ndef self_extracting(text):\n    return b'packed'\n\n\nX = 1\n"
    )
    write_run(world, "s1", pack={"code_form": "packed", "code_bytes": 6})
    folder = folder_of(world)
    assert (folder / "train_gpt.py").read_bytes() == b"packed"
    shutil.rmtree(folder)
    write_run(world, "s1", pack={"code_form": "packed"}, run={"packed_sha256": "0" * 64})
    assert "other bytes than the log's packed_sha256" in refusal(world, capsys)


def test_the_script_is_found_in_the_text_log_when_the_file_has_changed_since(world):
    path = write_run(world, "s1")
    path.with_suffix(".txt").write_text("attention:sdpa\n" + SCRIPT + "\n" + "=" * 100 + "\nseed:1\n")
    world["script"].write_text("x = 1\n")
    folder = folder_of(world)
    assert (folder / "train_gpt.py").read_text() == SCRIPT


# ---- the trainer's own logs


def test_a_real_run_goes_from_its_logs_to_a_checked_folder(tiny, data, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submission, "plots", SimpleNamespace(draw=lambda *_: []))
    tiny |= {"EVAL_STRIDE": "0", "NGRAM_SCORE": "exact", "NGRAM_ORDER": "3", "ITERATIONS": "2"}
    (tmp_path / "data").mkdir()
    for path in (data.tokenizer, data.folder / "fineweb_train_000000.bin"):
        shutil.copyfile(path, tmp_path / "data" / path.name)
    write_shard(tmp_path / "data" / "fineweb_val_000000.bin", data.val[:100])  # an audit takes its time
    tiny["DATA_PATH"] = str(tmp_path / "data")
    folder, records = Path(tiny["LOG_DIR"]), tmp_path / "records"
    assert script(tiny).status == 0
    auditing = {"MODE": "audit", "ARTIFACT": str(folder / "tiny.pgz"), "RUN_ID": "audit"}
    assert script(auditing | {k: tiny[k] for k in ("LOG_DIR", "DATA_PATH", "DEVICE")}).status == 0
    run_cli("table", folder)
    header, row = capsys.readouterr().out.splitlines()
    assert "ngram" in header and row.startswith("tiny ") and row.endswith(" ok")
    words = ("--name", "tiny", "--records", records, "--script", ROOT / "train_gpt.py", "--non-record")
    assert run_cli("submit", folder / "tiny.jsonl", *words) == 0
    (made,) = (records / "track_non_record_16mb").iterdir()
    assert {"train_seed1337.log", "audit_seed1337.jsonl"} <= {p.name for p in made.iterdir()}
    meta = json.loads((made / "submission.json").read_text())
    assert meta["compliance"]["score_before_update"] is True
    assert meta["val_bpb"] == logs.read_log(folder / "tiny.jsonl").stages["ngram"]["val_bpb"]
    capsys.readouterr()
    assert run_cli("check", made) == 0
    text = capsys.readouterr().out
    assert re.search("PASS  script that ran", text)
    assert "ngram: a distribution" in text
    assert "1 layer(s) of packing" in text


# ---- leaked documents


def test_leaked_validation_documents_fail_and_stray_repeats_warn(tmp_path):
    rng = np.random.default_rng(1)
    docs = [rng.integers(4, 1000, rng.integers(5, 60)).tolist() for _ in range(3000)]
    val, train = docs[:2000], docs[2000:]
    clean = leaks.find_overlap(write_shards(tmp_path / "clean", train, val, split=7_001))
    assert (clean.documents, clean.found, clean.leaked) == (2000, 0, False)
    stray = leaks.find_overlap(write_shards(tmp_path / "stray", train + [val[5], val[700]], val, split=7_001))
    assert (stray.found, stray.longest_run, stray.leaked) == (2, 1, False)  # .1 % exactly: not above
    many = leaks.find_overlap(write_shards(tmp_path / "many", train + val[10:1000:300], val))
    assert (many.found, many.leaked) == (4, True)
    row = leaks.find_overlap(write_shards(tmp_path / "row", [*train, *val[40:60]], val * 15, split=5_003))
    assert (row.longest_run, row.leaked) == (20, True)


def test_documents_across_shard_ends_are_found(tmp_path):
    doc = list(range(10, 60))
    data = write_shards(tmp_path, [list(range(100, 120)), doc, [5, 6]], [doc], split=40)  # the doc spans three shards
    assert leaks.find_overlap(data).found == 1


def test_a_leak_stops_a_submission(world, capsys):
    tokens = leaks.read_shard(world["data"] / "fineweb_val_000000.bin").tolist()
    write_shards(world["data"], [tokens[1:31], [9, 9]], [tokens[1:31]])
    write_run(world, "s1")
    assert "1 of 1 validation documents in the training shards" in refusal(world, capsys)


def test_what_the_script_refuses_stops_a_submission(world, capsys):
    shard = world["data"] / "fineweb_val_000000.bin"
    shard.with_name("fineweb_val_000001.bin").write_bytes(shard.read_bytes())
    write_run(world, "s1")
    assert "have the same content" in refusal(world, capsys)


def test_knob_docs_are_read_from_the_source():
    docs = {"default": 0.04, "unit": "", "doc": "learning rate of the matrices"}
    assert source.knob_docs(SCRIPT)["MATRIX_LR"] == docs


# ---- check, on folders that other scripts made


def verdicts(folder: Path) -> dict[str, rules.Check]:
    return {c.rule: c for c in rules.checks(rules.read_entry(folder))}


def test_check_reads_the_baselines_folder_and_says_what_it_cannot_know(tmp_path):
    folder, meta = tmp_path / "track_10min_16mb" / "2026-03-17_Baseline", {"val_bpb": 1.2244, "bytes_total": 15863489}
    files = {"train_gpt.py": 'import os\nprint("source")\n', "submission.json": json.dumps(meta)}
    write_files(folder, {**files, "train.log": BASELINE_LOG})
    got = {rule: check.status for rule, check in verdicts(folder).items()}
    sure = ("val_bpb", "bytes", "script that ran", "validation text")  # 62,021,632 tokens imply 151 MB
    assert {got[rule] for rule in sure} == {"PASS"}
    assert (got["training time"], got["seeds"]) == ("WARN", "FAIL")  # 600.038 s: the baseline's own overshoot; one seed
    unknown = ("validation documents in training", "audit (C1-C4)")
    assert all("cannot be known" in verdicts(folder)[rule].detail for rule in unknown)


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run_text(
    seed: int, bpb: float | str, config_seed: int | None = None, key: str = "final_exact val_loss:2.1 val_bpb"
) -> str:
    return f"seed: {seed if config_seed is None else config_seed}\nstep:5/9 train_loss:2.5{seed} train_time:500ms\n{key}:{bpb}\n"


ONE = {"val_bpb": 1.2, "seeds": [1]}
CHOICES = [  # (files, submission.json, {file of each run that counts: its seed}, files of reruns)
    ({"a_seed1.log": run_text(1, 1.3), "sub/seed1.log": run_text(1, 1.2)}, ONE, {"sub/seed1.log": 1}, {"a_seed1.log"}),
    ({"a.log": run_text(1, 1.3), "sub/b.log": run_text(1, 1.3), "sub/c.log": run_text(1, 1.25)}, ONE, {"a.log": 1}, set()),
    ({"seed1.log": run_text(1, 1.3) + "ttt_val_bpb: 1.2\n", "old_seed1.log": run_text(1, 1.4)}, ONE, {"seed1.log": 1}, {"old_seed1.log"}),
    ({"a1.log": run_text(1, "nan"), "b1.log": run_text(1, 1.25)}, {"seeds": [1]}, {"b1.log": 1}, {"a1.log"}),
    ({"a1.log": run_text(1, 1.1), "b1.log": run_text(1, 1.3), "a2.log": run_text(2, 1.1)}, {"val_bpb": 1.2, "seeds": [1, 2]}, {"b1.log": 1, "a2.log": 2}, {"a1.log"}),
    ({"a1.log": run_text(1, 1.1), "b1.log": run_text(1, 1.3)}, {"val_bpb": 1.3, "seed_results": [{"seed": 1, "val_bpb": 1.3}]}, {"b1.log": 1}, {"a1.log"}),
    ({"train_seed1337.log": run_text(1337, 1.3), "eval_seed1337.log": "seed: 42\nfinal_ttt val_loss:2.0 val_bpb:1.2\n"}, ONE, {"train_seed1337.log": 1337}, set()),
    ({"eval_seed1337.log": "seed: 42\nfinal_ttt val_loss:2.0 val_bpb:1.2\n"}, ONE, {"eval_seed1337.log": 1337}, set()),
]  # fmt: skip


@pytest.mark.parametrize("files, meta, runs, reruns", CHOICES)
def test_the_log_that_shows_the_submissions_figure_is_the_run(tmp_path, files, meta, runs, reruns):
    write_files(tmp_path, files)
    (tmp_path / "submission.json").write_text(json.dumps(meta))
    entry = rules.read_entry(tmp_path)
    assert {str(r.path.relative_to(tmp_path)): r.seed for r in entry.runs} == runs
    assert {str(r.path.relative_to(tmp_path)) for _, r in entry.reruns} == reruns
    again = {c.rule: c.detail for c in rules.checks(entry)}.get("seeds differ", "")
    assert bool(again) == bool(reruns) and all(Path(name).stem in again for name in reruns)
    if "val_bpb" in meta:
        assert verdicts(tmp_path)["val_bpb"].status == "PASS" or not reruns


FORMS = [
    {"seeds": {"1": 1.1, "2": {"val_bpb": 1.2}}},
    {"seeds": [{"seed": 1, "val_bpb": 1.1}, {"seed": 2, "val_bpb": 1.2, "steps": 9}]},
    {"seed_results": [{"seed": "1", "val_bpb": 1.1}, {"seed": "2", "val_bpb": 1.2}], "seeds": [1, 2]},
    {"results": [{"seed": 1, "val_bpb": 1.1}, {"seed": 2, "val_bpb": 1.2}]},
    {"results": {"seeds": {"1": {"val_bpb": 1.1}, "2": {"val_bpb": 1.2}}}},
]  # fmt: skip


@pytest.mark.parametrize("meta", FORMS)
@pytest.mark.parametrize("key", ["val_bpb", "val_bpb_3seed_mean", "val_bpb_2_seed_mean", "3seed_mean_val_bpb"])
def test_every_form_of_submission_json_says_the_same(tmp_path, meta, key):
    write_files(tmp_path, {f"seed{seed}.log": run_text(seed, bpb) for seed, bpb in ((1, 1.1), (2, 1.2))})
    (tmp_path / "submission.json").write_text(json.dumps(meta | {key: 1.15}))
    entry = rules.read_entry(tmp_path)
    assert entry.told == {"1": 1.1, "2": 1.2} and entry.named_seeds == {"1", "2"} and entry.meta["val_bpb"] == 1.15
    got = verdicts(tmp_path)
    assert got["val_bpb"].status == "PASS" and "val_bpb of seed 1" not in got
    (tmp_path / "submission.json").write_text(json.dumps(meta | {key: 0.9}))
    got = verdicts(tmp_path)
    assert got["val_bpb"].status == got["plausible score"].status == "FAIL"


def test_check_of_an_empty_folder_fails_and_of_none_is_a_mistake(tmp_path, capsys):
    assert run_cli("check", tmp_path) == 1
    assert "no such folder" in said(capsys, 2, "check", tmp_path / "none")


# ---- sweep

FAKE_TRAINER = """
import json, os, pathlib, sys
with open("calls", "a") as f:
    f.write(os.environ["RUN_ID"] + "\\n")
log = pathlib.Path(os.path.expanduser(os.environ.get("LOG_DIR", "logs")), os.environ["RUN_ID"] + ".jsonl")
if log.exists() and (os.environ.get("FORCE"), os.environ.get("RESUME")) != ("1", "auto"):
    sys.exit("the log exists")  # as train_gpt.py refuses it
log.parent.mkdir(exist_ok=True)
log.write_text(json.dumps({"v": 1, "event": "run", "run_id": os.environ["RUN_ID"]}) + "\\n")
if os.environ.get("MATRIX_LR") == "9" and not os.path.exists("mended"):
    with log.open("a") as f:
        f.write(json.dumps({"v": 1, "event": "end", "status": "stopped"}) + "\\n")
    sys.exit(1)
mode = os.environ.get("MODE", "train")
values = {k: v for k, v in os.environ.items() if k in ("MATRIX_LR", "ITERATIONS", "DATA_PATH")}
lines = [{"event": "run", "run_id": os.environ["RUN_ID"], "mode": mode, "recipe": os.environ.get("RECIPE", "cpu")}]
lines += [{"event": "config", "values": {"ITERATIONS": 7} | values, "sources": dict.fromkeys(values, "env")}]
lines += [{"event": "score", "val_bpb": 1.5, "val_loss": 2.5, "stage": "sliding"} if mode == "train" else {"event": "audit", "passed": True, "checks": []}]
log.write_text("".join(json.dumps({"v": 1, **line}) + "\\n" for line in [*lines, {"event": "end", "status": "ok"}]))
"""


@pytest.fixture
def sweep_of(tmp_path, monkeypatch, capsys):
    """sweep_of(list, *words, trainer=...) -> (exit status, output), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(
        lines: str, *words: str, trainer: str = FAKE_TRAINER, launch: str = f"{sys.executable} trainer.py"
    ) -> tuple[int, str]:
        Path("trainer.py").write_text(trainer)
        Path("list.txt").write_text(lines)
        status = run_cli("sweep", "list.txt", "--launch", launch, *words)
        out, err = capsys.readouterr()
        return status, out + err

    return call


def test_a_sweep_skips_the_finished_survives_the_failing_and_can_run_one_line(sweep_of):
    lines = "# two rates\nMATRIX_LR=0.02 SEED=1\nMATRIX_LR=9 SEED=1\n\nMATRIX_LR=0.04 SEED=1\n"
    status, out = sweep_of(lines)
    assert status == 1 and "2 of 3 done; failed: matrix_lr-9_seed-1" in out
    status, out = sweep_of(lines)
    assert status == 1 and "skipped: finished, 1.5000 bpb" in out
    ran = ("matrix_lr-0.02_seed-1", "matrix_lr-9_seed-1", "matrix_lr-0.04_seed-1", "matrix_lr-9_seed-1")
    assert Path("calls").read_text().split() == [*ran]
    assert sweep_of(lines, "--only", "0")[0] == 0 and sweep_of(lines, "--only", "3")[0] == 2
    Path("mended").touch()  # what the failed run left behind is no obstacle
    assert sweep_of(lines)[0] == 0
    Path("logs/matrix_lr-9_seed-1.jsonl").write_text('{"v": 1, "event": "run", "run_id": "x"}\n')
    os.utime("logs/matrix_lr-9_seed-1.jsonl", (4e9, 4e9))  # a clock that is wrong tells nothing
    with tg.lock_file(Path("logs/matrix_lr-9_seed-1.txt")):  # as a run that was started by hand has it
        status, out = sweep_of(lines)
        assert status == 1 and "2 of 3 done; still going: matrix_lr-9_seed-1" in out
        assert logs.read_log(Path("logs/matrix_lr-9_seed-1.jsonl")).status() == "still going, before the first step"
    assert sweep_of(lines)[0] == 0 and not list(Path("logs").glob("matrix_lr*.lock"))


@pytest.mark.parametrize("change, told", [
    ({}, ""),
    ({"ITERATIONS": "2.0"}, ""),
    ({"ITERATIONS": "3"}, "ITERATIONS 2 there, 3 now. FORCE=1"),
    ({"ITERATIONS": None}, "ITERATIONS 2 there, unset now"),
    ({"RECIPE": "pr164"}, "recipe cpu there, pr164 now"),
    ({"MODE": "eval"}, "mode train there, eval now"),
    ({"launch": f"env ITERATIONS=4 {sys.executable} trainer.py"}, "ITERATIONS 2 there, 4 now"),
])  # fmt: skip
def test_what_stands_in_a_log_is_not_taken_for_another_configuration(sweep_of, monkeypatch, change, told):
    monkeypatch.setenv("ITERATIONS", "2")
    assert sweep_of("MATRIX_LR=.10 SEED=1\n")[0] == 0
    launch = {k: v for k, v in change.items() if k == "launch"}
    for name, value in change.items() - launch.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    status, out = sweep_of("MATRIX_LR=.10 SEED=1\n", **launch)
    assert (status, told in out, Path("calls").read_text().count("\n")) == (int(bool(told)), True, 1)
    monkeypatch.setenv("FORCE", "1")
    anew = FAKE_TRAINER.replace('("1", "auto")', '("1", "")')  # from no checkpoint of the other configuration
    assert sweep_of("MATRIX_LR=.10 SEED=1\n", trainer=anew, **launch)[0] == 0
    assert Path("calls").read_text().count("\n") == 1 + bool(told)


def test_the_trainer_itself_says_what_a_line_would_give(tiny, data, script, tmp_path):
    tiny |= {"ITERATIONS": "1", "EVAL_STRIDE": "0", "WARMUP_STEPS": "0"}
    assert script(tiny).status == 0
    assert script(tiny, MODE="audit", ARTIFACT=tmp_path / "logs/tiny.pgz", RUN_ID="audit").status == 0
    run, audit = (logs.read_log(tmp_path / "logs" / f"{name}.jsonl") for name in ("tiny", "audit"))
    other = Path(shutil.copytree(data.folder, tmp_path / "other"))
    write_shard(other / "fineweb_val_000001.bin", data.val[:-40])
    (tmp_path / "trainer.py").write_text((ROOT / "train_gpt.py").read_text() + "\n")
    auditing = {"MODE": "audit", "ARTIFACT": str(tmp_path / "logs/tiny.pgz")}
    cases = [
        (run, {}, []),
        (run, {"LOG_DIR": "elsewhere", "CHECKPOINT_EVERY": "5", "MATRIX_LR": ".04"}, []),
        (run, {"ITERATIONS": "3", "SEED": "2"}, ["SEED 1337 there, 2 now", "ITERATIONS 1 there, 3 now"]),
        (run, {"RECIPE": "pr164"}, ["recipe baseline there, pr164 now"]),
        (run, {"LEAKY_RELU": "1"}, ["LEAKY_SLOPE 0 there, 0.5 now"]),  # a published name
        (run, {"DATA_PATH": str(other)}, [f"DATA_PATH {data.folder} there, {other} now", "validation text "]),
        (run, {"MODEL_DIM": "x"}, ["the line is refused now (MODEL_DIM='x'"]),
        (audit, auditing, []),
    ]
    asks = expect.Expectations([sys.executable, str(ROOT / "train_gpt.py")])
    for log, change, told in cases:
        found = asks.differences(log, tiny | change)
        assert all(any(line.startswith(words) for line in found) for words in told), (change, found)
        assert bool(found) == bool(told), (change, found)
    assert script(tiny | {"SEED": "3", "FORCE": "1"}).status == 0
    assert any(line.startswith("artifact ") for line in asks.differences(audit, tiny | auditing))
    asks.close()
    (
        edited := expect.Expectations([sys.executable, str(tmp_path / "trainer.py")])
    ).can_ask = False  # as a packed script
    assert [line.split()[0] for line in edited.differences(run, tiny)] == ["script"]


@pytest.mark.parametrize("folder", ["mine", "~/mine"])
def test_a_sweep_runs_audits_too_and_looks_where_the_runs_write(folder, sweep_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    lines = f"RUN_ID=a LOG_DIR={folder}\nMODE=audit ARTIFACT=mine/a.pgz RUN_ID=a-audit LOG_DIR={folder}\n"
    assert sweep_of(lines)[0] == 0
    assert sweep_of(lines)[1].count("skipped: finished") == 2 and not Path("~").exists()
    assert Path("calls").read_text().split() == ["a", "a-audit"]


SILENT_TRAINER = """
import os, pathlib, time
os.makedirs("logs", exist_ok=True)
pathlib.Path("logs/seed-1.jsonl").write_text('{"v": 1, "event": "run", "run_id": "x"}')
pathlib.Path("pid.part").write_text(str(os.getpid()))
os.rename("pid.part", "pid")
time.sleep(60)
"""


@pytest.mark.skipif(not sweep.fcntl, reason="locks and SIGTERM")
def test_a_sweep_told_to_end_ends_its_run_and_a_killed_ones_run_is_left_alone_while_it_lives(sweep_of):
    Path("list.txt").write_text("SEED=1\nSEED=2\n")
    Path("trainer.py").write_text(SILENT_TRAINER)
    launch = f"{sys.executable} trainer.py"
    words = [sys.executable, ROOT / "records/report.py", "sweep", "list.txt", "--launch", launch]
    for end in ("terminate", "kill"):
        with subprocess.Popen(words, stderr=subprocess.PIPE if end == "terminate" else None, text=True) as process:
            while process.poll() is None and not Path("pid").exists():
                time.sleep(0.05)
            getattr(process, end)()
            if end == "terminate":  # the pipe closes only once the trainer has ended too
                assert "stopped by hand in seed-1" in process.communicate(timeout=30)[1] and process.returncode == 1
                Path("pid").unlink()
    os.utime("logs/seed-1.jsonl", (0, 0))  # silent, and alive
    status, out = sweep_of("SEED=1\n")
    assert status == 1 and f"skipped: still going, held by process {process.pid} on" in out
    os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    os.utime("logs/seed-1.jsonl")  # heard of just now, and dead
    for _ in range(100):  # the system ends it when it gets to it
        status, out = sweep_of("SEED=1\n")
        if status != 1:
            break
        time.sleep(0.05)
    assert "1 of 1 done" in out and not Path("logs/seed-1.lock").exists()


@pytest.mark.skipif(not sweep.fcntl, reason="locks")
def test_without_locks_the_process_that_wrote_it_tells(sweep_of, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(sweep.fcntl, "flock", no_locks)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = sweep.platform.node()
    owners = ("process 1 on elsewhere", f"process {os.getppid()} on {here}", f"process {dead.pid} on {here}", "")
    assert sweep_of("SEED=1\n")[0] == 0
    for owner, status in zip(owners, (1, 1, 0, 1), strict=True):
        Path("logs/seed-1.jsonl").write_text('{"v": 1, "event": "run", "run_id": "x"}\n')
        os.utime("logs/seed-1.jsonl", (0, 0))
        Path("logs/seed-1.lock").write_text(owner + "\n" * bool(owner))
        assert sweep_of("SEED=1\n")[0] == status, owner
    monkeypatch.setenv("FORCE", "1")
    assert sweep_of("SEED=1\n")[0] == 0


@pytest.mark.parametrize("text, words", [
    ("matrix_lr=1", "line 1: expected KNOB=value words, got 'matrix_lr=1'"),
    ("SEED=1\nSEED=1", "line 2: the same run as line 1"),
    ("A='1", "line 1: No closing quotation"),
    ("# nothing", "no configuration"),
    ("A=1 B=2 A=1", "line 1: A stands on it more than once"),
    ("SEED=1\nSEED=2 PROMPT=\udcff\n", "list.txt, line 2: not UTF-8 (byte 0xff at character 15)"),
    ("SEED=1\nSEED=2\nPROMPT=\udced\udca0\udc80\n", "list.txt, line 3: not UTF-8"),  # a lone surrogate
    *((f"RUN_ID={name} A=1", "line 1: RUN_ID=") for name in ("../x", "a/b", "")),
])  # fmt: skip
def test_a_wrong_sweep_list_names_its_line(tmp_path, text, words):
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(logs.UserError, match=re.escape(words)):
        sweep.read_list(str(tmp_path / "list.txt"))


def test_a_sweep_list_is_cut_at_newlines_alone(tmp_path):
    path = tmp_path / "list"
    path.write_bytes(b"\xef\xbb\xbfPROMPT='one\xe2\x80\xa8two\xc2\x85three' SEED=1\r\nSEED=2\r\n")
    jobs = sweep.read_list(str(path))
    assert [job.get("PROMPT") for job in jobs] == ["one\u2028two\x85three", None] and jobs[1]["SEED"] == "2"


def test_a_run_id_does_not_depend_on_the_order_of_knobs_and_names_one_run(tmp_path):
    orders = ({"B": "2", "A": "1/x", "SEED": "3"}, {"SEED": "3", "A": "1/x", "B": "2"})
    assert {sweep.run_id(knobs) for knobs in orders} == {"a-1_x_b-2_seed-3"}
    assert len(sweep.run_id({f"KNOB_{i}": "value" for i in range(40)})) < 110
    assert sweep.run_id({"A": "a*b"}) != sweep.run_id({"A": "a?b"})
    (tmp_path / "list").write_text("A=a/b\nA=a_b\nA=a*b\nA=a?b\nA=c\n")
    names = [job["RUN_ID"] for job in sweep.read_list(str(tmp_path / "list"))]
    assert len(set(names)) == 5 and names[-1] == "a-c"


@pytest.mark.parametrize(
    "launch, message", [("", "expected the command"), ("'python", "No closing quotation"), ("./none", "No such file")]
)
def test_a_launch_that_is_no_command_is_one_message(sweep_of, launch, message):
    status, out = sweep_of("A=1\n", launch=launch)
    assert status == 2 and message in out


def test_the_default_command_of_a_sweep_is_this_python_wherever_it_lies(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a folder/it's/python")
    launch = report.parser().parse_args(["sweep", "list"]).launch
    assert shlex.split(launch) == ["/a folder/it's/python", "train_gpt.py"]


def test_a_full_disk_is_no_mistake_of_the_user(monkeypatch, capsys):
    def full(_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "run_index", full)
    assert run_cli("index") == 1 and "No space left" in capsys.readouterr().err
