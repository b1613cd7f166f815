"""Section 6: schedules, priming that leaves no trace, micro-batches, the loop, checkpoints to the last bit."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import SEQ, VOCAB, Data, NoCompiler, assert_same, config, events, finished, losses, score_of, spawn

import train_gpt as tg


def make(env: dict[str, str], data: Data, **changes) -> tg.Trainer:
    """A trainer on the tiny data, its weights from the seed alone."""
    cfg = config(env, **changes)
    run = tg.Run(cfg, 0, 0, 1, 1)
    run.run_id = "tiny"
    torch.manual_seed(tg.derive_seed(cfg.seed, "init"))
    model = tg.GPT(cfg).place(run.device, tg.attend_sdpa)
    return tg.Trainer(cfg, run, model, tg.TokenStream(tg.load_split(data.folder, "train"), VOCAB))


def steps(trainer: tg.Trainer, n: int) -> list[float]:
    """Losses of n steps at full rate in the middle of the budget."""
    return [float(trainer.train_step(0.5, 1.0)) for _ in range(n)]


EVERYTHING = {"EMA_DECAY": 0.9, "SWA_EVERY": 1, "SWA_START_SCALE": 2, "COMPLEMENT_ALPHA": 0.5, "QAT": "soft_round", "QAT_START_FRAC": 0.4,
              "TRAIN_SEQ_SCHEDULE": "8@0.3,16@0.6", "SEQ_CHANGE_WARMUP_STEPS": 2, "GRAD_CLIP_NORM": 0.5, "MUON_WD": 0.1,
              "ADAM_WD": 0.1}  # fmt: skip


# ---- schedules


def test_a_warmdown_longer_than_the_training_is_noticed(tiny, script):
    fitting, long = (script(tiny, ITERATIONS=4, WARMDOWN_ITERS=n, RUN_ID=f"w{n}", EVAL_STRIDE=0).out for n in (4, 5))
    assert "training ends after 4 steps" in fitting and "rates fall" not in fitting
    assert "notice: WARMDOWN_ITERS=5 is longer than ITERATIONS=4: rates fall from the first step on" in long


# ---- priming


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_priming_leaves_no_trace(tiny, data, changes):
    primed, plain = (make(tiny, data, WARMUP_STEPS=3, **changes) for _ in range(2))
    before = primed.state_dict()
    before = {**before, "model": {k: v.clone() for k, v in before["model"].items()}}
    primed.prime()
    assert_same(primed.state_dict(), before)
    assert steps(primed, 3) == steps(plain, 3)
    assert_same(primed.state_dict(), plain.state_dict())


def test_priming_visits_every_graph_of_the_training(tiny, data):
    trainer = make(tiny, data, WARMUP_STEPS=1, **EVERYTHING)
    seen, model = set(), trainer.model

    def forward(inputs, targets, ctx):
        seen.add((inputs.shape[1], ctx.fake_quant is not None))
        return model(inputs, targets, ctx)

    trainer.forward = forward
    trainer.prime()
    assert seen == {(8, False), (16, False), (16, True), (32, True)}


# ---- micro-batches


def gradients(trainer: tg.Trainer) -> dict[str, torch.Tensor]:
    inputs, targets = trainer.batcher.next(SEQ)
    trainer.backward(inputs, targets, tg.Ctx())
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("micro", [SEQ, 3 * SEQ, 100 * SEQ])
def test_the_gradient_does_not_depend_on_the_micro_batch(tiny, data, micro):
    whole, cut = (make(tiny, data, MICRO_BATCH_TOKENS=n, OUT_INIT="scaled") for n in (0, micro))
    expected, got = gradients(whole), gradients(cut)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7)


def memory_for(trainer: tg.Trainer, tokens: int) -> list[int]:
    """Make forwards above `tokens` run out of memory; returns the sizes that were tried."""
    tried, model = [], trainer.model

    def forward(inputs, targets, ctx):
        tried.append(inputs.numel())
        if inputs.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(inputs, targets, ctx)

    trainer.forward = forward
    return tried


def test_out_of_memory_halves_the_micro_batch_and_changes_no_step(tiny, data):
    small, large = make(tiny, data, MICRO_BATCH_TOKENS=SEQ), make(tiny, data)
    tried = memory_for(large, SEQ)
    large.prime()
    small.prime()
    assert tried[:3] == [4 * SEQ, 2 * SEQ, SEQ] and large.micro_tokens == SEQ
    assert steps(large, 2) == steps(small, 2)
    assert_same(large.state_dict(), small.state_dict())


def test_what_never_fits_is_a_mistake_with_a_remedy(tiny, data):
    for changes in ({}, {"MICRO_BATCH_TOKENS": 2 * SEQ}):
        trainer = make(tiny, data, **changes)
        memory_for(trainer, 0)
        with pytest.raises(tg.ConfigError, match="out of memory with 32-token sequences; use a smaller"):
            trainer.prime()


# ---- compiling


@pytest.mark.parametrize("changes, compiler, on, why", [
    ({"COMPILE": "auto", "MAX_WALLCLOCK_SECONDS": 3600}, True, True, "pays"),
    ({"COMPILE": "auto", "MAX_WALLCLOCK_SECONDS": 3600}, False, False, "no C++ compiler was found"),
    ({"COMPILE": "auto", "MAX_WALLCLOCK_SECONDS": 60}, True, False, "does not repay"),
    ({"COMPILE": "auto", "MAX_WALLCLOCK_SECONDS": 0}, True, False, "no time limit"),
    ({"COMPILE": "1"}, False, True, "COMPILE=1"),
    ({"COMPILE": "0", "MAX_WALLCLOCK_SECONDS": 3600}, True, False, "COMPILE=0"),
])  # fmt: skip
def test_compiling_where_it_pays_and_the_log_says_why(tiny, monkeypatch, changes, compiler, on, why):
    monkeypatch.setattr(tg.shutil, "which", lambda _: "/usr/bin/c++" if compiler else None)
    wanted, reason = tg.wants_compile(config(tiny, **changes), torch.device("cpu"))
    assert wanted == on and why in reason


def test_a_failing_compiler_is_left_out_with_a_notice(tiny, data, capsys):
    def forward(*_):
        raise NoCompiler

    broken, plain = make(tiny, data), make(tiny, data)
    broken.forward = forward
    assert steps(broken, 2) == steps(plain, 2)
    assert "notice: torch.compile failed (no compiler); running eager" in capsys.readouterr().out


# ---- the golden loss


GOLDEN = 1.924  # the last of 20 losses; another torch build may move the last digits


def test_twenty_steps_give_the_same_losses_bit_for_bit_and_those_of_old(tiny, data):
    first, second = (steps(make(tiny, data), 20) for _ in range(2))
    assert first == second
    assert first[0] == pytest.approx(math.log(VOCAB), abs=0.05)  # the model starts as a uniform guess
    assert first[-1] == pytest.approx(GOLDEN, abs=0.02)


# ---- the loop


class Text:
    """Collects what a run says."""

    def __init__(self, run: tg.Run) -> None:
        self.lines: list[str] = []
        run.log = lambda text, to_terminal=True: self.lines.append(text)  # noqa: ARG005


def train(trainer: tg.Trainer, validate=lambda _: (1.0, 2.0), forward=None) -> tuple[tg.TrainResult, list[str]]:
    """The whole loop over a prepared trainer, and its log."""
    cfg, run, text = trainer.cfg, trainer.run, Text(trainer.run)
    if forward:
        trainer.forward = forward
    loop = tg.TrainingLoop(cfg, run, trainer, tg.Checkpoints(cfg, run), validate)
    return loop.run_until_done(0.0), text.lines


def test_validation_is_not_on_the_clock_but_training_is(tiny, data, monkeypatch):
    trainer, passed, real = make(tiny, data, VAL_LOSS_EVERY=2), [0.0], time.perf_counter
    monkeypatch.setattr(tg.time, "perf_counter", lambda: real() + passed[0])

    def validate(_):
        passed[0] += 1000
        return 1.0, 2.0

    def forward(*args):
        passed[0] += 100
        return trainer.model(*args)

    result, lines = train(trainer, validate, forward)
    assert 600 <= result.seconds < 700 and result.reason == "iterations"
    assert [line.split(" train_time")[0] for line in lines if "val_loss" in line] == [
        f"step:{n}/6 val_loss:1.0000 val_bpb:2.0000" for n in (2, 4)
    ]


def test_the_training_ends_before_the_limit_not_after_it(tiny, data, monkeypatch):
    trainer, passed = make(tiny, data, ITERATIONS=0, MAX_WALLCLOCK_SECONDS=55), [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: passed[0])

    def forward(*args):
        passed[0] += 10
        return trainer.model(*args)

    result, _ = train(trainer, forward=forward)
    assert (result.steps, result.seconds, result.reason) == (5, 50.0, "wallclock")


def test_a_noisy_machine_does_not_push_the_training_over_the_limit(tiny, data, monkeypatch):
    """Every fifth step takes three times as long: by the mean pace, one would start at 670 s and end at 700 s."""
    trainer, passed = make(tiny, data, ITERATIONS=0, MAX_WALLCLOCK_SECONDS=690), [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: passed[0])

    def forward(*args):
        passed[0] += 30 if trainer.step % 5 == 4 else 10
        return trainer.model(*args)

    result, _ = train(trainer, forward=forward)
    assert result.seconds == 670


def test_flags_that_are_read_late_are_allowed_for(tiny, data, monkeypatch):
    """A device that works 10 s a step behind a host that waits only for the flags of the step before."""
    trainer, now, device = make(tiny, data, ITERATIONS=0, MAX_WALLCLOCK_SECONDS=200), [0.0], [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    run, done = trainer.run, {}

    def forward(*args):
        now[0] += 0.01
        device[0] = max(device[0], now[0]) + 10
        done[trainer.step + 1] = device[0]
        return trainer.model(*args)

    read = tg.StopConsensus.read

    def wait_and_read(watch):
        now[0] = max(now[0], done[watch.pending[0][0]])
        return read(watch)

    monkeypatch.setattr(tg.StopConsensus, "read", wait_and_read)
    monkeypatch.setattr(run, "sync", lambda: now.__setitem__(0, max(now[0], device[0])))
    monkeypatch.setattr(
        tg.StopConsensus, "__init__", lambda self, run, _: self.__dict__.update(run=run, late=1, pending=[], good=[])
    )
    result, _ = train(trainer, forward=forward)
    assert 200 - 10 <= result.seconds <= 200


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tiny, data):
    trainer = make(tiny, data)

    def forward(*args):
        return trainer.model(*args) * (math.nan if trainer.step == 2 else 1.0)

    with pytest.raises(
        tg.BrokenRun, match=r"not finite at step 3 on rank 0; last good: step 1 loss 5\.\d+, step 2 loss 5\.\d+; lower"
    ):
        train(trainer, forward=forward)


def test_flags_read_late_name_the_step_they_belong_to(run):
    watch = tg.StopConsensus(run)
    watch.late = 1  # as on a GPU
    good, bad = torch.tensor(2.0), torch.tensor(math.inf)
    sent = ((1, False, good, 1.5), (2, True, good, 2.5), (3, False, bad, 3.5))
    assert [watch.exchange(*flags) for flags in sent] == [False, False, True]
    assert watch.seconds == 2.5
    with pytest.raises(tg.BrokenRun, match=r"step 3 on rank 0; last good: step 1 loss 2\.0000, step 2 loss 2\.0000"):
        watch.read()


def test_one_rank_that_wants_to_stop_stops_all_and_a_bad_rank_is_named(tiny):
    runs = [tg.Run(config(tiny), rank, rank, 3, 3) for rank in range(3)]
    sent: list[torch.Tensor] = []
    for run in runs:
        run.all_reduce = lambda t: sent.append(t) or t
    watches = [tg.StopConsensus(run) for run in runs]
    for watch, stop, loss in zip(watches, (False, True, False), (1.0, 2.0, 3.0), strict=True):
        watch.late = 1
        watch.exchange(7, stop, torch.tensor(loss), 10.0 + watch.run.rank)
    total = sum(sent)
    for watch in watches:
        watch.pending = [(7, total, None), (8, total + torch.tensor([0.0, math.nan, 0.0, 0.0, 1.0, 0.0]), None)]
        assert watch.read() is True
        assert watch.seconds == 10.0, "all ranks schedule by the clock of the first"
        with pytest.raises(tg.BrokenRun, match="step 8 on rank 1; last good: step 7 loss 6"):
            watch.read()


def test_a_resumed_run_tells_the_time_that_is_left(tiny, data, monkeypatch):
    """Ten seconds a step, 30 of 40 steps done: 100 s are left, not the 33 that this process alone would suggest."""
    trainer, passed = make(tiny, data, ITERATIONS=40), [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: passed[0])
    trainer.step = 30

    def forward(*args):
        passed[0] += 10
        return trainer.model(*args)

    trainer.forward = forward
    text, run = Text(trainer.run), trainer.run
    tg.TrainingLoop(trainer.cfg, run, trainer, tg.Checkpoints(trainer.cfg, run), lambda _: (1.0, 2.0)).run_until_done(
        300.0
    )
    assert [line.split("eta:")[1] for line in text.lines if "eta:" in line][:2] == ["90s", "80s"]


def test_a_second_pass_over_the_data_is_announced(tiny, data):
    batch = 64 * SEQ
    _, lines = train(make(tiny, data, TRAIN_BATCH_TOKENS=batch, ITERATIONS=len(data.train) // batch + 3))
    assert [line for line in lines if line.startswith("notice: epoch 2 of the training data begins at step")]


def test_what_turns_on_is_logged_with_its_step(tiny, data):
    _, lines = train(make(tiny, data, ITERATIONS=10, **EVERYTHING))
    switches = [line for line in lines if line.startswith("switch:")]
    assert [line.split(" frac")[0] for line in switches if "ema" not in line] == [
        "switch:seq_len step:3", "switch:qat step:4", "switch:seq_len step:6"]  # fmt: skip


# ---- checkpoints


def test_the_last_checkpoints_stay(tiny, script, tmp_path):
    assert script(tiny, CHECKPOINT_EVERY=1, CHECKPOINT_KEEP=3).status == 0
    folder = tmp_path / "logs" / "tiny.ckpt"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{n:06d}.pt" for n in (4, 5, 6)]


def test_checkpoints_of_a_run_that_is_taken_back_go(tiny, script, tmp_path):
    assert script(tiny, CHECKPOINT_EVERY=1, CHECKPOINT_KEEP=4).status == 0
    folder = tmp_path / "logs" / "tiny.ckpt"
    assert (
        script(
            tiny, RESUME=folder / "step_000003.pt", FORCE=1, CHECKPOINT_EVERY=4, ITERATIONS=4, WARMDOWN_ITERS=3
        ).status
        == 2
    )
    taken_back = script(tiny, RESUME=folder / "step_000003.pt", FORCE=1, CHECKPOINT_EVERY=5)
    assert taken_back.status == 0, taken_back.err
    assert sorted(p.name for p in folder.iterdir()) == ["step_000004.pt", "step_000005.pt"]


def test_a_checkpoint_of_another_configuration_or_kind_is_refused(tiny, script, tmp_path):
    assert script(tiny, CHECKPOINT_EVERY=3).status == 0
    other = script(tiny, RESUME="auto", MATRIX_LR=0.01, MODEL_DIM=16)
    assert other.status == 2 and "made with another configuration" in other.err
    assert "MATRIX_LR was 0.04, is 0.01" in other.err and "MODEL_DIM was 32, is 16" in other.err
    assert "no such checkpoint" in script(tiny, RESUME=tmp_path / "absent.pt").err
    (tmp_path / "text.pt").write_text("text")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    for name in ("text.pt", "foreign.pt"):
        result = script(tiny, RESUME=tmp_path / name, RUN_ID="new")
        assert result.status == 2 and "not a checkpoint of this script" in result.err
    assert not (tmp_path / "logs" / "new.txt").exists()


def test_a_killed_run_goes_on_to_the_same_bits(tiny, script):
    """SIGKILL at random moments (also while a checkpoint is written, which happens each step) loses nothing."""
    env = {**tiny, "ITERATIONS": "40", "CHECKPOINT_EVERY": "1", "TRAIN_LOG_EVERY": "1", "EVAL_STRIDE": "0"}
    assert script(env, RUN_ID="whole").status == 0
    process, log = spawn(env), Path(env["LOG_DIR"]) / "tiny.jsonl"
    wanted = random.Random(os.getpid()).uniform(1, 35)
    while process.poll() is None and (not log.exists() or log.read_text().count('"event": "step"') < wanted):
        time.sleep(0.002)
    process.kill()
    assert finished(process).status == -signal.SIGKILL
    assert script(env, RESUME="auto").status == 0
    whole = {**env, "RUN_ID": "whole"}
    assert len(events(env, "run")) == 2 and any("resumed" in e["text"] for e in events(env, "notice"))
    assert losses(env) == losses(whole) and score_of(env) == score_of(whole)
