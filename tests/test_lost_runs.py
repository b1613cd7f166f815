"""What ends a run elsewhere does not end it here: terminals that break, disks that fill, signals, damaged files, twins."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, VOCAB, config, events, losses, process_env, run_ranks, score_of, tiny_env

import train_gpt as tg

FOREIGN_TEXT = "Ω 中 \U0001f600 \udc80"  # the last is a byte of a name that is not UTF-8


def artifact(env: dict[str, str]) -> bytes:
    return (Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.pgz").read_bytes()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The undisturbed run that the others must equal."""
    env = tiny_env(data, tmp_path_factory.mktemp("whole"))
    assert tg.main([], env) == 0
    return env


def assert_equal_runs(env: dict[str, str], whole: dict[str, str]) -> None:
    assert losses(env) == losses(whole) and score_of(env) == score_of(whole) and artifact(env) == artifact(whole)


# ---- the terminal


class Stream(io.RawIOBase):
    """A stream that takes some writes and then fails with an error of the system."""

    def __init__(self, writes: int, number: int) -> None:
        self.writes, self.number = writes, number

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


def stream(encoding: str = "utf-8", writes: int = 10**9, number: int = errno.EPIPE) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(Stream(writes, number)), encoding=encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_text_that_the_terminal_cannot_encode_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert tg.say(f"é {FOREIGN_TEXT}") is None
    said = raw.getvalue().decode(encoding)
    assert said.endswith("\\udc80\n") and ("中" in said or "\\u4e2d" in said)


def test_a_run_on_an_ascii_terminal_ends_well_and_its_log_has_the_text(tiny, monkeypatch):
    monkeypatch.setattr(tg, "device_name", lambda _: FOREIGN_TEXT)
    monkeypatch.setattr(sys, "stdout", stream("ascii"))
    assert tg.main([], tiny) == 0
    log = (Path(tiny["LOG_DIR"]) / "tiny.txt").read_text(encoding="utf-8")
    assert "Ω 中 \U0001f600 \\udc80" in log and log.splitlines()[-1].startswith("score ")


@pytest.mark.parametrize("number, status", [(errno.EPIPE, 0), (errno.EIO, 0), (errno.ENOSPC, 1)])
def test_a_terminal_that_goes_away_does_not_end_the_training(tiny, monkeypatch, capsys, number, status):
    monkeypatch.setattr(sys, "stdout", stream(writes=3, number=number))
    assert tg.main([], tiny) == status
    log = (Path(tiny["LOG_DIR"]) / "tiny.txt").read_text()
    assert log.splitlines()[-1].startswith("score ")
    assert events(tiny, "end")[0]["status"] == ("incomplete" if status else "ok")
    err = capsys.readouterr().err  # a reader who left is no error; an output file on a full disk is one
    full = "error: could not write the standard output (No space left on device)"
    assert err.splitlines() == [full] * bool(status)


def test_neither_stream_is_needed(tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert tg.main([], tiny) == 0 and tg.main(["--help"], {}) == 0
    assert tg.main([], {**tiny, "NUM_LAYERS": "0"}) == 2


def test_a_progress_bar_on_a_terminal_that_hung_up_is_dropped(run, monkeypatch):
    """Its stream is thrown away and nothing counts as lost; on one that can be written the bar stands."""
    run.on_terminal, dropped = True, []
    monkeypatch.setattr(Stream, "fileno", lambda _: 77)
    monkeypatch.setattr(tg.os, "dup2", lambda _, number: dropped.append(number))
    for number in (errno.EIO, errno.EPIPE):
        monkeypatch.setattr(sys, "stderr", stream(writes=0, number=number))
        run.progress("training", 1, 2, 0.0)
    assert dropped == [77, 77] and not run.lost
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run.progress("training", 1, 2, 0.0)
    assert "training [############            ] 50% eta" in sys.stderr.getvalue() and len(dropped) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_help_and_a_run_into_a_pipe_that_closes(tiny):
    """In a real shell: both end with their own status and say nothing of the pipe, also as the interpreter ends."""
    command = f'"{sys.executable}" "{SCRIPT}" --help | head -2; "{sys.executable}" "{SCRIPT}" | head -3; echo "${{PIPESTATUS[*]}}"'
    env = process_env({**tiny, "PYTHONIOENCODING": "ascii"})
    shell = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert shell.stderr == "" and shell.stdout.splitlines()[-1] == "0 0" and len(shell.stdout.splitlines()) == 2 + 3 + 1
    assert score_of(tiny) > 0


# ---- the disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_a_notice_and_the_run_goes_on(tiny, whole, script):
    folder = Path(tiny["LOG_DIR"])
    folder.mkdir()
    for name in ("tiny.txt", "tiny.jsonl"):
        (folder / name).symlink_to("/dev/full")
    result = script(tiny, FORCE=1)
    assert result.status == 1 and "Traceback" not in result.err
    assert len(re.findall("^notice: could not write the log .*tiny.*No space left on device", result.out, re.M)) == 1
    assert len(re.findall("^error: could not write the log .*tiny.*No space left on device", result.err, re.M)) == 1
    assert artifact(tiny) == artifact(whole) and result.out.splitlines()[-1].startswith("score ")


class PartFull(io.FileIO):
    """A file on a disk with room for a few bytes."""

    room = 25

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.room]
        self.room -= len(taken)
        return super().write(taken)


def test_a_line_of_a_log_is_there_whole_or_not_at_all(run, tmp_path, capsys):
    run._text = PartFull(tmp_path / "log", "ab")
    for line in ("one line of 20 bytes", "another that is too long"):
        run.log(line, to_terminal=False)
    run._text.room = 100  # somebody makes room
    run.log("later", to_terminal=False)
    assert (tmp_path / "log").read_text() == "one line of 20 bytes\nlater\n"
    assert capsys.readouterr().out.count("notice: could not write the log") == 1


def test_a_checkpoint_that_cannot_be_written_is_a_notice(tiny, whole, script):
    Path(tiny["LOG_DIR"]).mkdir()
    (Path(tiny["LOG_DIR"]) / "tiny.ckpt").write_text("in the way")
    result = script(tiny, CHECKPOINT_EVERY=2)
    assert result.status == 1 and result.out.count("could not write the checkpoint of step 2") == 1
    assert "of step 4" not in result.out and result.err.count("error: ") == 1 and not events(tiny, "checkpoint")
    assert_equal_runs(tiny, whole)


def test_a_trace_that_cannot_be_written_is_a_notice(tiny, script):
    (Path(tiny["LOG_DIR"]) / "tiny.trace.json").mkdir(parents=True)
    result = script(tiny, PROFILE=1, ITERATIONS=8)
    assert result.status == 1
    assert "could not write the trace" in result.err
    assert result.out.splitlines()[-1].startswith("score ")


def fill_disk(monkeypatch, *folders: Path) -> None:
    """From the first step on, no file can be written below `folders`."""
    write = tg.atomic_write

    def refuse(path: Path, blob: bytes) -> None:
        if tg.Run.current.training_began and any(path.is_relative_to(folder) for folder in folders):
            raise tg.cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write(path, blob)

    monkeypatch.setattr(tg, "atomic_write", refuse)


def test_an_artifact_that_cannot_be_written_is_put_elsewhere(tiny, whole, script, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for run_id, full, where in (
        ("one", [tmp_path / "a"], "logs/"),
        ("two", [tmp_path / "a", tmp_path / "logs"], "tmp/train_gpt-"),
    ):
        with monkeypatch.context() as patch:
            fill_disk(patch, *full)
            result = script(tiny, RUN_ID=run_id, ARTIFACT=tmp_path / "a" / f"{run_id}.pgz")
        assert result.status == 1 and "Traceback" not in result.err, result
        said = re.search(
            rf"error: could not write the artifact .*/a/{run_id}.pgz; it is (\S+{where}\S*{run_id}.pgz)", result.err
        )
        assert Path(said[1]).read_bytes() == artifact(whole)
        env = {**tiny, "RUN_ID": run_id}
        assert score_of(env) == score_of(whole) and events(env, "pack")[0]["artifact"] == said[1]


def test_a_full_disk_before_the_training_is_a_failure_not_a_mistake(tiny, script, monkeypatch):
    monkeypatch.setattr(
        tg.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    result = script(tiny)
    assert result.status == 1
    assert re.fullmatch(r"error: cannot write .*: No space left on device; free space .*\n", result.err)


# ---- what fails after the training


@pytest.mark.parametrize("part, error", [
    ("quantize", tg.ConfigError("w holds NaN")), ("quantize", ValueError("not normalizable")), ("pack", MemoryError()),
    ("quantize", KeyboardInterrupt()), ("evaluate", tg.ConfigError("EVAL_SEQ_LEN=32: one window does not fit in memory")),
])  # fmt: skip
def test_trained_weights_outlive_what_comes_after_and_are_packed_later(tiny, whole, script, monkeypatch, part, error):
    with monkeypatch.context() as patch:
        patch.setattr(tg, part, lambda *_, **__: (_ for _ in ()).throw(error))
        with contextlib.suppress(ValueError, MemoryError):  # faults of ours end with a traceback
            assert script(tiny).status == 1
    said = next(e["text"] for e in events(tiny, "notice") if "RESUME=" in e["text"])
    kept = re.search(r"RESUME=(\S+)", said)[1]
    assert events(tiny, "end")[-1]["status"] in ("failed", "stopped")
    later = script(tiny, RESUME=kept)
    assert later.status == 0, later
    assert_equal_runs(tiny, whole)


def test_all_that_the_artifact_carries_is_kept_with_the_weights(tiny, script, monkeypatch):
    knobs = {"NGRAM_TABLE": "exact,pr1095", "NGRAM_SCORE": "exact,claimed", "NGRAM_CLAIM": "pr1095", "GPTQ_ENABLED": 1, "GPTQ_N_SAMPLES": 2,
             "EMA_DECAY": 0.9, "COMPLEMENT_ALPHA": 0.5, "SWA_EVERY": 1, "SWA_START_SCALE": 2, "SWA_BLEND": 0.5}  # fmt: skip
    assert script(tiny, RUN_ID="whole", **knobs).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(tg, "pack", lambda *_: (_ for _ in ()).throw(tg.ConfigError("no")))
        assert script(tiny, **knobs).status == 1
    kept = Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "trained.pt"
    assert script(tiny, RESUME=kept, **{**knobs, "ITERATIONS": 12}).status == 2  # its training is over
    assert script(tiny, RESUME=kept, **knobs).status == 0
    assert_equal_runs(tiny, {**tiny, "RUN_ID": "whole"})


def test_weights_whose_average_cannot_be_taken_are_kept(tiny, script, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tg.WeightAverage, "apply", lambda *_: (_ for _ in ()).throw(tg.ConfigError("out of memory")))
        assert script(tiny, EMA_DECAY=0.9).status == 1
    assert script(tiny, EMA_DECAY=0.9, RESUME=Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "trained.pt").status == 0


def test_a_second_signal_does_not_cut_the_keeping_short(tiny, whole, script, monkeypatch):
    """As Ctrl-C under torchrun sends it, from the terminal and from the agent."""
    write, kill = tg.atomic_write, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(tg, "quantize", kill)
        patch.setattr(tg, "atomic_write", lambda path, blob: (path.name == "trained.pt" and kill(), write(path, blob)))
        stopped = script(tiny)
    assert stopped.status == 1 and stopped.err == "error: stopped by SIGINT\n", stopped
    assert script(tiny, RESUME=Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "trained.pt").status == 0
    assert_equal_runs(tiny, whole)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_that_fails_keeps_the_weights(tiny, data, capsys, monkeypatch, first):
    """The others may wait for it in a collective until they are killed."""
    cfg = config(tiny)
    run = tg.Run(cfg, 1, 1, 2, 2)
    run.run_id = "tiny"
    monkeypatch.setattr(run, "is_first", lambda what: first and what == "kept")
    stream = tg.TokenStream(tg.load_split(data.folder, "train"), VOCAB)
    with (
        pytest.raises(ZeroDivisionError),
        tg.Checkpoints(cfg, run).keep_weights(tg.GPT(cfg), stream, tg.TrainResult(6, 1.0, "iterations", 128)),
    ):
        raise ZeroDivisionError
    kept = Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "trained.pt"
    assert kept.exists() == first
    assert (f"notice: the trained weights are kept: RESUME={kept}" in capsys.readouterr().out) == first


# Place -> the call that fails on one rank, and what is kept.
FAILING_RANKS = {"Trainer.train_step": (5, "step_*3.pt"), "calibrate": (1, "trained.pt"), "quantize": (1, "trained.pt"),
                 "score_first": (2, "../tiny.pgz")}  # fmt: skip


def main() -> int:
    """A rank of the test below: the script, in which a call fails on rank 1."""
    place, mistake, rank = os.environ.pop("TEST_PLACE"), os.environ.pop("TEST_MISTAKE"), os.environ["RANK"]
    owner, name = (getattr(tg, place.split(".")[0]), place.split(".")[1]) if "." in place else (tg, place)
    calls, real = itertools.count(1), getattr(owner, name)

    def failing(*args, **kwargs):
        if next(calls) == FAILING_RANKS[place][0]:
            raise tg.ConfigError("KNOB=1: no") if mistake else ZeroDivisionError("KNOB=1: no")
        return real(*args, **kwargs)

    if rank == "1":
        setattr(owner, name, failing)
    try:
        status = tg.main([], os.environ)
    except Exception as e:
        status = f"1\nerror: {type(e).__name__}: {e}"
    print(f"rank {rank} ended with {status}", flush=True)
    os._exit(0)


@pytest.mark.parametrize(("place", "mistake"), list(zip(FAILING_RANKS, ["", "1"] * 2, strict=True)))
def test_a_rank_that_fails_ends_all_with_one_message_and_nothing_is_thrown_away(data, tmp_path, place, mistake):
    env = tiny_env(data, tmp_path, TEST_PLACE=place, TEST_MISTAKE=mistake, CHECKPOINT_EVERY=3, GPTQ_ENABLED=1, GPTQ_N_SAMPLES=2,
                   NGRAM_SCORE="off")  # fmt: skip
    text = run_ranks(env, 2, "test_lost_runs", seconds=120)
    said = [line for line in text.splitlines() if "error: " in line]
    assert text.count("ended with 1") == 2 and len(said) == 1 and "KNOB=1: no" in said[0], text
    assert list((tmp_path / "tiny.ckpt").glob(FAILING_RANKS[place][1])), text


def test_a_score_that_fails_leaves_the_artifact_and_says_how_to_score_it(tiny, script, monkeypatch):
    monkeypatch.setattr(tg, "account_bytes", lambda *_: (_ for _ in ()).throw(tg.ConfigError("NGRAM_X=1: no")))
    result = script(tiny)
    assert result.status == 1 and result.err == "error: NGRAM_X=1: no\n" and artifact(tiny)
    assert f"MODE=eval ARTIFACT={tiny['LOG_DIR']}/tiny.pgz scores it" in result.out


@pytest.mark.parametrize("part", ["Trainer.train_step", "WeightAverage.apply", "quantize", "pack", "load_model", "load_tables", "evaluate",
                                  "report_score", "Run.save_artifact"])  # fmt: skip
@pytest.mark.parametrize("error", [tg.ConfigError, tg.ArtifactError])
def test_exit_status_2_does_not_occur_once_training_has_begun(tiny, script, monkeypatch, part, error):
    """Whatever part finds the mistake: it should have been found before, and status 2 tells scripts that nothing was lost."""
    owner, name = (getattr(tg, part.split(".")[0]), part.split(".")[1]) if "." in part else (tg, part)
    monkeypatch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(error("KNOB=1: no")))
    result = script(tiny, WARMUP_STEPS=0, ITERATIONS=1, EVAL_STRIDE=0, NGRAM_SCORE="off")
    assert result.status == 1 and "error: KNOB=1: no" in result.err and events(tiny, "end")[0]["status"] == "failed"


def test_the_limit_of_the_evaluation_does_not_end_the_training(tiny, whole, script, monkeypatch):
    limits, evaluate = [], tg.evaluate
    monkeypatch.setattr(
        tg, "evaluate", lambda e, *args: limits.append(e.cfg.eval_wallclock_seconds) or evaluate(e, *args)
    )
    result = script(tiny, VAL_LOSS_EVERY=1, EVAL_WALLCLOCK_SECONDS=1e-9)
    assert limits == [0.0] * 6 + [1e-9]
    assert result.status == 1 and "EVAL_WALLCLOCK_SECONDS=1e-09" in result.out + result.err
    assert len(events(tiny, "val")) == 6 and losses(tiny) == losses(whole) and artifact(tiny)


def test_a_model_of_one_block_is_packed_reloaded_and_scored_again(tiny, script):
    """It has no skip weights: a tensor of no elements."""
    assert script(tiny, NUM_LAYERS=1, CONTROL_BITS=6, QUANT_MIN_NUMEL=0).status == 0
    base = {name: tiny[name] for name in ("DATA_PATH", "LOG_DIR", "DEVICE", "ATTENTION")}
    assert script(base, MODE="eval", RUN_ID="again", ARTIFACT=f"{tiny['LOG_DIR']}/tiny.pgz").status == 0
    assert score_of({**base, "RUN_ID": "again"}) == score_of(tiny)


def test_a_script_that_is_edited_during_the_run_changes_nothing(tiny, whole, script, monkeypatch, tmp_path):
    copy = tmp_path / "copy.py"
    copy.write_text(SCRIPT.read_text())
    shutil.copytree(SCRIPT.parent / "tools", tmp_path / "tools")
    monkeypatch.setattr(tg, "SCRIPT", copy)
    tg.script_bytes.cache_clear()
    train = tg.train
    monkeypatch.setattr(tg, "train", lambda *args: copy.write_text("  no python") and train(*args))
    assert script(tiny).status == 0
    assert_equal_runs(tiny, whole)
    assert events(tiny, "score")[0]["code_bytes"] == events(whole, "score")[0]["code_bytes"]
    tg.script_bytes.cache_clear()


# ---- signals


def stop_at(monkeypatch, step: int, number: int) -> None:
    train_step = tg.Trainer.train_step

    def interrupted(self, *args):
        if self.step == step and self.run.graceful:
            os.kill(os.getpid(), number)
        return train_step(self, *args)

    monkeypatch.setattr(tg.Trainer, "train_step", interrupted)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT", "SIGTERM"])
def test_every_signal_that_asks_to_stop_saves_a_checkpoint(tiny, whole, script, monkeypatch, name):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, getattr(signal, name))
        stopped = script(tiny, CHECKPOINT_EVERY=100)
    assert stopped.status == 1 and f"stopped by {name} at step 4; saved" in stopped.err and "RESUME=auto" in stopped.err
    assert events(tiny, "end")[-1]["status"] == "stopped" and not list(Path(tiny["LOG_DIR"]).glob("*.pgz.*"))
    assert script(tiny, RESUME="auto", CHECKPOINT_EVERY=100).status == 0
    assert_equal_runs(tiny, whole)


def test_a_hangup_that_nohup_ignores_stays_ignored(tiny, whole, script, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_at(monkeypatch, 3, signal.SIGHUP)
    assert script(tiny).status == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert_equal_runs(tiny, whole)


def test_a_stop_whose_checkpoint_cannot_be_written_says_so(tiny, script, monkeypatch):
    stop_at(monkeypatch, 3, signal.SIGUSR1)
    Path(tiny["LOG_DIR"]).mkdir()
    (Path(tiny["LOG_DIR"]) / "tiny.ckpt").write_text("in the way")
    result = script(tiny, CHECKPOINT_EVERY=100)
    assert result.status == 1
    assert "at step 4; its checkpoint could not be written" in result.err
    assert "saved" not in result.err


# ---- damaged checkpoints, raised limits


def flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


DAMAGES = {
    "one bit": flip, "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]), "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("text"), "foreign": lambda p: torch.save({"model": {}}, p),
    "a folder": lambda p: (p.unlink(), p.mkdir()), "a dangling link": lambda p: (p.unlink(), p.symlink_to("absent")),
}  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny, whole, script, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        assert script(tiny, CHECKPOINT_EVERY=2, CHECKPOINT_KEEP=3).status == 1
    folder = Path(tiny["LOG_DIR"]) / "tiny.ckpt"
    shutil.copytree(folder, folder.with_suffix(".kept"))
    assert sorted(p.name for p in folder.iterdir()) == ["step_000002.pt", "step_000004.pt", "step_000005.pt"]
    for damage in DAMAGES.values():
        damage(folder / "step_000005.pt")
        with pytest.raises(tg.ConfigError, match="step_000005.pt: not a checkpoint of this script, or a damaged one"):
            tg.Checkpoints(config(tiny), named_run(tiny)).read(folder / "step_000005.pt")
        found = tg.Checkpoints(config(tiny, RESUME="auto"), named_run(tiny))
        assert found.find() == folder / "step_000004.pt" and "step_000005.pt" in found.damaged[0]
        shutil.rmtree(folder)
        shutil.copytree(folder.with_suffix(".kept"), folder)
    flip(folder / "step_000005.pt")
    refused = script(tiny, RESUME=folder / "step_000005.pt")
    assert refused.status == 2 and "damaged" in refused.err
    result = script(tiny, RESUME="auto")
    assert result.status == 0
    assert re.search(r"notice: passed over .*step_000005.pt: not a checkpoint .* checksum", result.out)
    assert "step_000004.pt at step 4" in result.out
    assert_equal_runs(tiny, whole)


def test_where_every_checkpoint_is_damaged_nothing_is_trained_anew_in_silence(tiny, script):
    folder = Path(tiny["LOG_DIR"]) / "tiny.ckpt"
    folder.mkdir(parents=True)
    (folder / "step_000002.pt").write_text("text")
    result = script(tiny, RESUME="auto")
    assert result.status == 2 and f"no checkpoint is left; remove {folder} to start anew" in result.err


def named_run(env: dict[str, str]) -> tg.Run:
    run = tg.Run(config(env), 0, 0, 1, 1)
    run.run_id = env["RUN_ID"]
    return run


def test_the_limits_of_a_training_may_be_raised_on_resume(tiny, script):
    assert script(tiny, CHECKPOINT_EVERY=6).status == 0
    longer = script(tiny, RESUME="auto", ITERATIONS=12)
    assert longer.status == 0 and sorted(losses(tiny)) == list(range(1, 13))
    scales = "the schedule follows the new end; lr_scale at step 6 was 0.000, is 1.000"
    assert f"raised ITERATIONS from 6 to 12: {scales}" in longer.out
    assert events(tiny, "train_end")[-1]["steps"] == 12
    for changes, words in (
        ({"ITERATIONS": 5}, "ITERATIONS was 6, is 5"),
        ({"MAX_WALLCLOCK_SECONDS": 99}, "MAX_WALLCLOCK_SECONDS was 0.0, is 99"),
    ):
        lowered = script(tiny, RESUME="auto", **changes)
        assert lowered.status == 2 and words in lowered.err
    unlimited = script(
        tiny, RESUME=Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "step_000006.pt", ITERATIONS=0, MAX_WALLCLOCK_SECONDS=99
    )
    assert unlimited.status == 2  # from no limit on time to one


def test_a_longer_time_limit_is_a_raised_one(tiny, script):
    knobs = {"MAX_WALLCLOCK_SECONDS": 1000, "CHECKPOINT_EVERY": 3}
    assert script(tiny, **knobs).status == 0
    for more in (2000, 0):
        longer = script(tiny, RESUME="auto", **{**knobs, "MAX_WALLCLOCK_SECONDS": more})
        assert "raised MAX_WALLCLOCK_SECONDS from 1000 to" in longer.out


def test_a_checkpoint_of_the_last_steps_leaves_no_time_for_another(tiny, script):
    """One killed while it packed: a further step would break the limit that it kept."""
    knobs = {"MAX_WALLCLOCK_SECONDS": 1000, "CHECKPOINT_EVERY": 3, "ITERATIONS": 0}
    assert script(tiny, **{**knobs, "ITERATIONS": 3}).status == 0
    path = Path(tiny["LOG_DIR"]) / "tiny.ckpt" / "step_000003.pt"
    torch.save({**torch.load(path, weights_only=True), "elapsed": 999.0, "slowest": 1.5}, path)
    assert script(tiny, RESUME=path, FORCE=1, **knobs).status == 0
    assert [(e["steps"], e["reason"]) for e in events(tiny, "train_end")[1:]] == [(3, "wallclock")]


# ---- twins


def test_two_processes_cannot_run_under_one_name(tiny, script):
    first = named_run(tiny)
    first.reserve_run_id()
    for changes in ({}, {"RESUME": "auto"}, {"FORCE": 1}, {"MODE": "eval", "ARTIFACT": SCRIPT}):
        result = script(tiny, **changes)
        assert result.status == 2 and not list(Path(tiny["LOG_DIR"]).glob("tiny*"))
        assert "MODE" in changes or "RUN_ID=tiny: a process that still runs has this name" in result.err
    first.close("ok")
    assert script(tiny).status == 0 and not list(Path(tiny["LOG_DIR"]).glob(".*"))


def test_the_lock_is_the_systems_and_goes_with_its_process(tiny, script):
    code = "import sys, time, train_gpt as tg, pathlib; f = tg.lock_file(pathlib.Path(sys.argv[1])); print(f is not None, flush=True); time.sleep(60)"
    command, env = (
        [sys.executable, "-c", code, f"{tiny['LOG_DIR']}/tiny.txt"],
        process_env({"PYTHONPATH": str(SCRIPT.parent)}),
    )
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert other.stdout.readline() == "True\n"
    assert script(tiny).status == 2
    other.kill()
    other.communicate()
    assert script(tiny).status == 0


def test_two_runs_do_not_write_one_artifact(tiny, script, tmp_path):
    env = {**tiny, "ARTIFACT": str(tmp_path / "a.pgz")}
    lock = tg.lock_file(tmp_path / "a.pgz")
    result = script(env)
    assert result.status == 2 and "a.pgz: a process that still runs will write it" in result.err
    tg.unlock_file(lock)
    assert script(env).status == 0 and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.pgz"]


def test_runs_without_a_name_that_start_in_one_second_get_names_of_their_own(tiny, script, monkeypatch):
    monkeypatch.setattr(tg.time, "strftime", lambda *_: "20260101-120000")
    env = {**tiny, "RUN_ID": "", "ITERATIONS": "1", "EVAL_STRIDE": "0", "NGRAM_SCORE": "off"}
    running = tg.Run(config(env), 0, 0, 1, 1)
    running.reserve_run_id()
    assert running.run_id == "20260101-120000-baseline-1337"
    assert [script(env).status for _ in range(2)] == [0, 0]
    running.close("ok")
    assert script(env).status == 0
    names = [f"20260101-120000-baseline-1337{s}" for s in ("", "-2", "-3")]
    assert sorted(p.stem for p in Path(env["LOG_DIR"]).glob("*.pgz")) == names


# ---- rank variables of another job

LEFT_OVER = [
    {"WORLD_SIZE": "8"}, {"WORLD_SIZE": ""}, {"RANK": ""}, {"RANK": "1"}, {"RANK": "0"}, {"LOCAL_RANK": "1"}, {"LOCAL_WORLD_SIZE": "2"},
    {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "port"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"},
]  # fmt: skip


@pytest.mark.parametrize("left", LEFT_OVER, ids=lambda left: ",".join(f"{k}={v}" for k, v in left.items()))
def test_rank_variables_of_another_job_are_one_message(tiny, script, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    result = script({**tiny, **left})
    ranks = [name for name in left if not name.startswith("MASTER")]
    assert result.status == 2 and len(result.err.splitlines()) == 1 and f"unset {' '.join(ranks)}" in result.err
    assert all(f"{name}={left[name]!r}" in result.err for name in ranks)


@pytest.mark.parametrize("env, ranks", [
    ({}, (0, 1, 0, 1)), ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, (0, 1, 0, 1)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1)),
    ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (9, 16, 1, 8)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4, 3, 1)),
])  # fmt: skip
def test_rank_variables_as_launchers_set_them(env, ranks):
    assert tg.read_ranks(env) == ranks


# ---- other files, other paths, limits that cannot be met


def test_only_numbered_checkpoints_count(tiny, script):
    """A copy under another name is neither resumed from nor removed, and removes no newer one."""
    assert script(tiny, CHECKPOINT_EVERY=2, CHECKPOINT_KEEP=9, ITERATIONS=6).status == 0
    folder = Path(tiny["LOG_DIR"]) / "tiny.ckpt"
    others = ["step_000004_backup.pt", "step_000006 (1).pt", "step_.pt", "step_000009.pt.old", ".notes.partial"]
    for name in others:
        (folder / name).write_text("mine")
    (folder / "step_0000010.pt").mkdir()
    checkpoints = tg.Checkpoints(config(tiny, CHECKPOINT_KEEP=1), named_run(tiny))
    assert [p.name for p in checkpoints.saved()] == [*(f"step_{n:06d}.pt" for n in (2, 4, 6)), "step_0000010.pt"]
    (folder / "step_7.pt").write_bytes((folder / "step_000006.pt").read_bytes())
    assert checkpoints.saved()[-2].name == "step_7.pt" and config(tiny).resume == ""
    state = checkpoints.read(folder / "step_7.pt")
    assert checkpoints.save(8, state) == folder / "step_000008.pt"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*others, "step_000008.pt", "step_0000010.pt"])


def test_an_artifact_takes_no_other_file_s_place(tiny, script, data, tmp_path):
    logs = Path(tiny["LOG_DIR"])
    (logs / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(logs)
    for path in (logs / "tiny.jsonl", logs / "tiny.txt", logs / "deep" / ".." / "tiny.jsonl", tmp_path / "link" / "tiny.jsonl",
                 logs / "tiny.ckpt", logs / "tiny.ckpt" / "step_000001.pt", data.tokenizer, data.folder / "fineweb_val_000000.bin",
                 SCRIPT):  # fmt: skip
        result = script(tiny, ARTIFACT=path, FORCE=1)
        assert result.status == 2 and f"ARTIFACT={path}: " in result.err and "choose another ARTIFACT" in result.err
    assert [p.name for p in logs.iterdir()] == ["deep"]
    assert script(tiny, ARTIFACT=logs / "deep" / "tiny.jsonl").status == 0


def test_target_bytes_without_room_for_the_code_ends_before_the_training(tiny, script, monkeypatch):
    code = len(tg.counted_code(config(tiny))[0])
    monkeypatch.setattr(tg, "rehearse", lambda *_: pytest.fail("the run was primed"))
    result = script(tiny, TARGET_BYTES=code)
    assert result.status == 2 and f"TARGET_BYTES={code} counts the code too, which has {code} bytes" in result.err
    with pytest.raises(pytest.fail.Exception):
        script(tiny, TARGET_BYTES=code + 1, FORCE=1)
    assert any("will hardly be met" in e["text"] for e in events(tiny, "notice"))


def test_a_failure_ends_threads_and_says_one_thing(tiny, script, monkeypatch):
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        monkeypatch.setattr(tg, "build_model", lambda *_, error=error: (_ for _ in ()).throw(error))
        result = script(tiny, RUN_ID=type(error).__name__)
        assert result.status == 1 and result.err.startswith("error: out of memory") and "Traceback" not in result.err
    monkeypatch.setattr(tg, "build_model", lambda *_: (_ for _ in ()).throw(RuntimeError("another failure")))
    with pytest.raises(RuntimeError, match="another failure"):
        script(tiny, RUN_ID="other")
    program = ("import sys, threading, time, train_gpt as tg\n"
               "threading.Thread(target=time.sleep, args=(99,)).start()\ntg.end(3)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, timeout=60).returncode == 3


def test_a_working_folder_that_is_gone(tmp_path):
    """oneMKL aborts where torch is imported, so that the script looks before it imports it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    line = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$1" "$2"', gone, sys.executable, SCRIPT]
    result = subprocess.run(line, env=process_env({}), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: the working folder cannot be used"), (
        result.stderr
    )


def test_a_lock_file_that_its_owner_removes_before_it_is_locked_is_no_lock(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(how)
        if len(calls) == 1:
            os.unlink(file.name)
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    file = tg.lock_file(tmp_path / "run")
    assert len(calls) == 2 and os.path.samestat(os.fstat(file.fileno()), os.stat(tmp_path / ".run.lock"))
    assert tg.lock_file(tmp_path / "run") is None
    tg.unlock_file(file)
