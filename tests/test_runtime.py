"""Section 2: files whole or not at all, clocks that pause, signals, ranks, seeds, logs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import pytest
import torch
from conftest import SCRIPT, config, process_env

import train_gpt as tg
from tools.artifact import run_tool, tool_parser


class FakeTime:
    """time.perf_counter and time.monotonic that move only when told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(tg.time, "monotonic", lambda: self.now)


def test_a_paused_clock_stands(run, monkeypatch):
    fake = FakeTime(monkeypatch)
    clock = tg.Clock(run, elapsed=5.0)
    fake.now += 2
    with clock.paused():
        fake.now += 100
    fake.now += 1
    assert clock.seconds() == 8.0


# ---- files


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.bin"
    tg.atomic_write(path, b"old")
    monkeypatch.setattr(tg.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tg.atomic_write(path, b"new and longer")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(tg.ConfigError, match="cannot write .*/file/x.*choose a folder that can be written"):
        tg.atomic_write(tmp_path / "file" / "x", b"")
    with pytest.raises(tg.ConfigError, match="File name too long; choose a shorter name .RUN_ID, LOG_DIR"):
        tg.atomic_write(tmp_path / ("n" * 250), b"")


def test_logs_of_another_run_are_not_overwritten(tiny, tmp_path):
    def open_and_close(text: str, append: bool = False, **changes) -> None:
        run = tg.Run(config(tiny, **changes), 0, 0, 1, 1)
        run.run_id = "same"
        run.open_logs(append)
        run.log(text, to_terminal=False)
        run.event("notice", text=text)
        run.close("ok")

    open_and_close("one")
    with pytest.raises(tg.ConfigError, match=r"same\.txt exists: choose another RUN_ID, or FORCE=1"):
        open_and_close("two")
    open_and_close("three", append=True)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "same.jsonl").read_text().splitlines()]
    assert [(e["v"], e["event"]) for e in lines] == [(tg.LOG_SCHEMA, "notice"), (tg.LOG_SCHEMA, "end")] * 2
    open_and_close("four", FORCE=1)
    assert (tmp_path / "logs" / "same.txt").read_text() == "four\n"


def test_only_the_first_rank_logs(tiny, tmp_path, capsys):
    run = tg.Run(config(tiny), 1, 1, 2, 2)
    run.log("nothing")
    run.event("notice", text="nothing")
    assert not (tmp_path / "logs").exists() and capsys.readouterr().out == ""


# ---- signals


def test_a_signal_waits_for_the_loop_and_its_echo_is_ignored(run, monkeypatch):
    fake = FakeTime(monkeypatch)
    run.graceful = True
    run._on_signal(signal.SIGINT, None)
    fake.now += 0.5
    run._on_signal(signal.SIGINT, None)  # torchrun passes on what the terminal has sent already
    assert run.signal == signal.SIGINT
    with pytest.raises(tg.Interrupted, match="SIGINT"):
        run.end_graceful()


def test_an_insisting_signal_stops_at_once(run, monkeypatch):
    fake = FakeTime(monkeypatch)
    run.graceful = True
    run._on_signal(signal.SIGTERM, None)
    fake.now += 5
    with pytest.raises(tg.Interrupted, match="SIGTERM"):
        run._on_signal(signal.SIGTERM, None)


def test_outside_the_loop_a_signal_stops_at_once(run):
    with pytest.raises(tg.Interrupted):
        run._on_signal(signal.SIGTERM, None)


# ---- ranks, devices, seeds


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_partition_and_differ_by_one_at_most(tiny, world):
    runs = [tg.Run(config(tiny), rank, rank, world, world) for rank in range(world)]
    for n in (0, 1, 5, 64):
        shares = [run.share(n) for run in runs]
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_cores_are_shared_by_the_ranks_of_a_machine(tiny, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(tg, "cpu_quota", lambda: 3.4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    tg.Run(config(tiny), 0, 0, 64, 64)
    assert torch.get_num_threads() == 1  # not torchrun's accident: 64 ranks leave no core idle and none oversubscribed
    tg.Run(config(tiny), 0, 0, 1, 1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a user's word for one process is kept
    tg.Run(config(tiny), 0, 0, 1, 1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("own, files, cpus", [
    ("0::/", {"cpu.max": "50000 100000"}, 0.5),  # version 2, in a container
    ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2.5),  # the group above it
    ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "20000 10000"}, 2),
    ("12:cpuset:/\n3:cpu,cpuacct:/docker/ab", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),  # version 1
    ("3:cpuacct,cpu:/a", {"cpuacct,cpu/a/cpu.cfs_quota_us": "50000", "cpuacct,cpu/a/cpu.cfs_period_us": "50000"}, 1),
    ("3:cpu:/a\n0::/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000", "unified/a/cpu.max": "max 9"}, float("inf")),
    ("3:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "9"}, float("inf")),
    ("0::/", {"cpu.max": "not a limit"}, float("inf")), ("", {}, float("inf")),
])  # fmt: skip
def test_threads_follow_the_quota_of_the_control_group(tmp_path, monkeypatch, own, files, cpus):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    if own:
        (tmp_path / "own").write_text(own + "\n")
    assert (quota := tg.cpu_quota(tmp_path / "groups", tmp_path / "own")) == cpus
    monkeypatch.setattr(tg, "cpu_quota", lambda: quota)
    monkeypatch.setattr(tg, "bound_cpus", lambda: {*range(2)})
    assert tg.usable_cpus() == (1 if cpus <= 1 else 2)


def test_a_cpu_that_another_program_keeps_busy_gets_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "bound_cpus", lambda: {1, 3})
    monkeypatch.setattr(time, "process_time", lambda: 0.25)
    ticks = [f"cpu{n} {100 * n} 7 20 5000 600 4 2 {n} 9 9" for n in range(4)]
    (tmp_path / "stat").write_text("\n".join(["cpu 9 9 9 9 9 9 9 9 9 9", *ticks, "intr 5"]))
    second = os.sysconf("SC_CLK_TCK")
    assert tg.busy_seconds(tmp_path / "stat") == pytest.approx((101 + 33 + 303 + 33) / second - 0.25)
    assert tg.busy_seconds(tmp_path / "none") == 0
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(tg, "bound_cpus", lambda: {*range(8)})
    monkeypatch.setattr(tg, "cpu_quota", lambda: 6)
    for busy, ranks in ((0.4, 1), (2.4, 1), (2.6, 1), (9, 1), (2.6, 2)):
        monkeypatch.setattr(tg, "BUSY_CPUS", busy)
        tg.tune_cpu(ranks)
    assert chosen == [6, 6, 5, 1, 3]


@pytest.mark.parametrize(
    "users", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}]
)
def test_torchs_threads_wait_as_the_user_says_or_shortly(users):
    head = tg.source_text().split("\nimport torch\n")[0]  # OpenMP reads the variables when torch is imported
    env = {"PATH": "/bin", **users}
    exec(
        head[head.index("\nos.environ.update(") : head.index("\n\ndef ")],
        {"os": types.SimpleNamespace(environ=env)},
    )
    assert env == {"PATH": "/bin", **(users or {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"})}


def test_more_ranks_than_gpus_is_a_mistake_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tg.pick_device("auto", 3) == torch.device("cuda", 3)
    with pytest.raises(tg.ConfigError, match="finds 4 GPUs; lower --nproc_per_node"):
        tg.pick_device("auto", 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused(tiny, monkeypatch):
    with pytest.raises(tg.ConfigError, match="DEVICE=cuda: no CUDA device is visible; use DEVICE=cpu"):
        tg.pick_device("cuda", 0)
    with pytest.raises(tg.ConfigError, match="DEVICE='mps': expected one of auto, cuda, cpu"):
        config(tiny, DEVICE="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert tg.pick_device("auto", 0).type == "cpu"  # of a Mac


@pytest.mark.parametrize("name, env", [
    ("SLURM_NTASKS", {"SLURM_NTASKS": "2"}), ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "2"}), ("PMI_SIZE", {"PMI_SIZE": "2"}),
    (None, {"SLURM_NTASKS": "1"}), (None, {"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "2"}), (None, {"OMPI_COMM_WORLD_SIZE": "many"}),
])  # fmt: skip
def test_processes_that_another_launcher_started_apart_are_told_how_to_join(monkeypatch, name, env):
    for key in (*tg.LAUNCHED, "RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    text = tg.launched_apart()
    assert (
        text.startswith(f"{name}=2 without RANK") and "torchrun --standalone --nproc_per_node=2" in text
        if name
        else text == ""
    )


def test_a_port_that_another_program_has_is_named_with_the_remedy(tiny, monkeypatch, script):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        joined = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for key, value in joined.items():
            monkeypatch.setenv(key, value)
        status, _, err = script({**tiny, **joined})
    assert status == 1
    assert re.fullmatch(
        rf"error: rank 0 cannot listen at .*127\.0\.0\.1:{port} \(.*EADDRINUSE.*another MASTER_PORT.*\n", err
    )


@pytest.mark.parametrize(
    "where, call", [(tg.np, "fromfile"), (tg.Path, "read_bytes"), (tg.Path, "read_text"), (tg.os, "listdir")]
)
def test_what_may_not_be_read_is_one_message(tiny, data, script, monkeypatch, where, call):
    """Of a shard, a tokenizer, a manifest, a folder."""
    of_call = {
        "fromfile": "fineweb_",
        "read_bytes": ".model",
        "read_text": "manifest.json",
        "listdir": data.folder.name,
    }
    known, plain = of_call[call], getattr(where, call)

    def refuse(path, *args, **kwargs):
        if known in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(where, call, refuse)
    isfile = os.path.isfile
    monkeypatch.setattr(
        tg.Path, "is_file", lambda path: isfile(path) or (call, path.name) == ("read_text", "manifest.json")
    )
    status, out, err = script(tiny)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: cannot read .*: Permission denied; check what it is and its permissions\n", err)


@pytest.mark.parametrize(
    "error, status", [(PermissionError(13, "no"), 2), (IsADirectoryError(21, "no"), 2), (OSError(28, "full"), 1)]
)
def test_tools_call_what_may_not_be_read_a_mistake(monkeypatch, error, status):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def job(_):
        raise error

    assert run_tool(job, tool_parser("a tool"), []) == status


def test_hidden_files_are_no_data(data, tmp_path):
    for path in data.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"._{path.name}").write_bytes(b"\0\5\26\7 what a Mac keeps beside it")
    assert tg.own_tokenizer(tmp_path, None) == tmp_path / data.tokenizer.name
    assert [p.name for p in tg.shard_paths(tmp_path, "train")] == [f"fineweb_train_00000{n}.bin" for n in (0, 1)]


def test_seeds_differ_by_purpose_and_rank_and_repeat():
    seeds = [tg.derive_seed(*of) for of in ((1, "init"), (2, "init"), (1, "ttt"), (1, "ttt", 1))]
    assert len(set(seeds)) == 4 and all(0 <= s < 2**63 for s in seeds)
    assert tg.derive_seed(1, "init") == seeds[0]


def test_what_is_written_elsewhere_takes_no_other_file_s_place(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other, no_folder = run.log_path.parent / "x.pgz", tmp_path / "file"
    other.parent.mkdir(exist_ok=True)
    other.write_text("old")
    no_folder.write_text("")
    path, why = run.write_somewhere(no_folder / "x.pgz", b"new")
    assert other.read_text() == "old" and path.read_bytes() == b"new" and path.parent.parent == tmp_path and why


def test_no_progress_bar_in_a_log(run, capsys):
    run.progress("training", 1, 2, time.perf_counter())
    assert capsys.readouterr() == ("", "")
    run.on_terminal = True
    run.progress("training", 1, 2, time.perf_counter())
    assert "[############            ] 50% eta" in capsys.readouterr().err


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tiny):
    """It costs a second of CPU time at the start."""
    code = "import os, sys, train_gpt as tg; print(tg.main([], os.environ), 'torch._dynamo' in sys.modules)"
    env = process_env({**tiny, "PYTHONPATH": str(SCRIPT.parent), "ITERATIONS": "2", "COMPILE": "0", "DEVICE": "cpu"})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.endswith("0 False\n"), done.stderr[-500:]
