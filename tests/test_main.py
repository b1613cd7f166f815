"""Section 10: whole runs. One process, several, two nodes, restarts; what is written, what is refused, what is returned."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    SCRIPT,
    SEQ,
    VOCAB,
    children,
    events,
    finished,
    free_port,
    losses,
    run_ranks,
    score_of,
    spawn,
    tiny_env,
    torchrun,
    write_shard,
)

import train_gpt as tg


def log_text(env: dict[str, str]) -> str:
    """The text log below the source that heads it."""
    text = (Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.txt").read_text()
    return text[text.index("=" * 100 + "\n") :]


# ---- one run, seen from all sides

# event -> its fields, as records/README.md tells them
SCHEMA = dict(
    re.findall(r"^\| `(\w+)` \|[^|]*\| ([\w ]+) \|$", (SCRIPT.parent / "records/README.md").read_text(), re.M)
)


def base_env(folder: Path, data) -> dict[str, str]:
    """The tiny run of conftest with every step logged, a validation on the way and a clipped gradient, in `folder`."""
    return tiny_env(data, folder, ITERATIONS=8, VAL_LOSS_EVERY=4, GRAD_CLIP_NORM=0.5, MUON_WD=0.1)


@pytest.fixture(scope="module")
def done(tmp_path_factory, data):
    """The environment of a finished run with all its by-products, and what it printed."""
    env = {**base_env(tmp_path_factory.mktemp("done"), data), "VAL_LOSS_EVERY": "3", "CHECKPOINT_EVERY": "5", "EMA_DECAY": "0.5",
           "EMA_START_FRAC": "0.5", "PROFILE": "1"}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert tg.main([], env) == 0
    tg.Run.current = None
    return env, out.getvalue()


def test_a_run_writes_what_it_promises(done, data):
    env, out = done
    folder, log = Path(env["LOG_DIR"]), log_text(env)
    # the baseline's keys
    step = (
        r"^step:\d+/8 train_loss:\d+\.\d{4} .*train_time:\d+ms step_avg:\d+\.\d\dms tokens_per_s:\d+ mfu:n/a eta:\d+s$"
    )
    assert len(re.findall(step, log, re.M)) == 8
    validation = r"^step:(\d)/8 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms$"
    assert re.findall(validation, log, re.M) == ["3", "6", "8"]
    assert len(re.findall(r"^final_(?:roundtrip|sliding)_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}", log, re.M)) == 2
    last = r"score val_bpb:\d+\.\d{8} stage:sliding artifact_bytes:\d+ code_bytes:\d+ total_bytes:\d+ limit:16000000 train_time:\S+s eval_time:\S+s"
    assert re.fullmatch(last, log.splitlines()[-1]) and out.splitlines()[-1] == log.splitlines()[-1]
    # what a reviewer needs
    assert (folder / "tiny.txt").read_text().startswith(SCRIPT.read_text())
    assert "MODEL_DIM=32  # env" in log and "BETA1=0.9  # default" in log and f"torch:{torch.__version__}" in log
    # sizes are those of the disk
    pack, score = events(env, "pack")[0], events(env, "score")[0]
    code = events(env, "run")[0]["source_bytes" if pack["code_form"] == "source" else "packed_bytes"]
    assert pack["artifact_bytes"] == (folder / "tiny.pgz").stat().st_size and pack["code_bytes"] == code
    assert pack["total_bytes"] == pack["artifact_bytes"] + pack["code_bytes"] == score["total_bytes"]
    assert sum(role["bytes"] for role in pack["roles"].values()) == pack["artifact_bytes"]
    # all of the text was scored
    stages = {e["stage"]: e for e in events(env, "stage")}
    assert all(e["tokens"] == len(data.val) - 1 and e["complete"] for e in stages.values())
    assert all(e["bytes"] == sum(len(t.encode()) for t in data.val_texts) for e in stages.values())
    assert score["val_bpb"] == stages["sliding"]["val_bpb"] and score["limits_ok"] and score["complete"]
    # a trace a viewer can open
    assert any(e.get("name") for e in json.loads((folder / "tiny.trace.json").read_text())["traceEvents"])
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.probe"))


def test_every_event_has_the_fields_of_the_schema(done):
    seen = events(done[0])
    assert [e["event"] for e in seen[:2]] == ["run", "config"]
    assert seen[-1] == {
        **seen[-1],
        "event": "end",
        "status": "ok",
    }
    assert {"step", "switch", "val", "checkpoint", "train_end", "quant", "pack", "stage", "score"} <= {
        e["event"] for e in seen
    }
    for e in seen:
        assert e["v"] == tg.LOG_SCHEMA == 1 and e["t"] >= 0
        assert set(SCHEMA[e["event"]].split()) <= set(e), e["event"]
    run, config = seen[:2]
    assert run["source_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert {*run["data"]} == {
        *"path sample train_shards train_tokens val_tokens val_bytes val_sha256 bytes_from transform".split()
    }
    assert set(config["values"]) == set(config["sources"]) == set(tg.FIELDS)


def test_a_fresh_process_scores_the_artifact_alone_to_the_same_number(done, tmp_path, data):
    env, _ = done
    folder = tmp_path / "no_training_data"
    folder.mkdir()
    for path in [*data.folder.glob("fineweb_val_*.bin"), data.tokenizer]:
        shutil.copy(path, folder)
    artifact = shutil.copy(Path(env["LOG_DIR"]) / "tiny.pgz", tmp_path / "alone.pgz")
    fresh = {"MODE": "eval", "ARTIFACT": str(artifact), "DATA_PATH": str(folder), "DEVICE": "cpu", "ATTENTION": "sdpa",
             "LOG_DIR": str(tmp_path / "eval"), "RUN_ID": "eval"}  # fmt: skip
    result = finished(spawn(fresh))
    assert result.status == 0, result.err
    assert score_of(fresh) == score_of(env)
    assert [e["val_bpb"] for e in events(fresh, "stage")] == [e["val_bpb"] for e in events(env, "stage")]


def test_the_modes_and_limits_of_an_artifact(done, script, tmp_path):
    env, _ = done
    artifact = Path(env["LOG_DIR"]) / "tiny.pgz"
    base = {k: env[k] for k in ("DATA_PATH", "DEVICE", "ATTENTION")}
    base |= {"ARTIFACT": str(artifact), "LOG_DIR": str(tmp_path)}
    # the published name of MODE=eval; an environment knob changes how it is scored, and may leave the score aside
    quick = script(base, EVAL_ONLY=1, RUN_ID="quick", VAL_TOKENS=200, EVAL_STRIDE=16)
    assert quick.status == 0
    assert quick.out.splitlines()[-1].startswith("no_score (VAL_TOKENS=200 scored a prefix only) val_bpb:")
    line = events({**base, "RUN_ID": "quick"}, "score")[0]
    assert not line["complete"] and events({**base, "RUN_ID": "quick"}, "stage")[0]["tokens"] == 199
    # what the artifact fixes stays fixed, what it is not made for is refused
    for changes, words in [
        ({"MODEL_DIM": 64}, "MODEL_DIM=64: the artifact was made with 32; unset MODEL_DIM"),
        ({"ARTIFACT": tmp_path / "absent.pgz"}, "no such file"),
        ({"ARTIFACT": SCRIPT}, "not an artifact of this script"),
    ]:
        result = script(base, MODE="eval", RUN_ID="refused", **changes)
        assert result.status == 2 and words in result.err and "Traceback" not in result.err
    assert not (tmp_path / "refused.txt").exists()


def test_a_tokenizer_that_is_not_the_artifacts_is_refused(done, script, tmp_path, data):
    env, _ = done
    other = tmp_path / "tokenizer_other.model"
    other.write_bytes(
        data.tokenizer.read_bytes() + b"\x7a\x00"
    )  # an empty unknown field: the same pieces, another file
    result = script({k: env[k] for k in ("DATA_PATH", "DEVICE")}, MODE="eval", TOKENIZER_PATH=other, LOG_DIR=tmp_path / "logs",
                    ARTIFACT=Path(env["LOG_DIR"]) / "tiny.pgz", RUN_ID="other")  # fmt: skip
    assert result.status == 2 and "not the tokenizer of" in result.err


def test_over_the_limit_the_run_fails_after_writing_everything(tiny, script):
    result = script(tiny, ARTIFACT_LIMIT=1000)
    assert result.status == 1 and "Traceback" not in result.err
    score = events(tiny, "score")[0]
    assert not score["limits_ok"] and score["total_bytes"] > 1000
    assert (Path(tiny["LOG_DIR"]) / "tiny.pgz").stat().st_size == score["artifact_bytes"]
    assert re.search(r"limit broken: total \d+ bytes exceed ARTIFACT_LIMIT=1000", result.out)
    assert result.out.splitlines()[-1].startswith("score val_bpb:")
    assert events(tiny, "end")[0]["status"] == "limit broken"


def test_training_and_calibration_over_the_time_limit_fail_the_run(tiny, script, monkeypatch):
    train, calibrate = tg.train, tg.calibrate
    limits = {"MAX_WALLCLOCK_SECONDS": 100, "GPTQ_ENABLED": 1, "GPTQ_N_SAMPLES": 2}
    monkeypatch.setattr(tg, "train", lambda *args: train(*args)._replace(seconds=92.0))
    in_time = script(tiny, **limits)
    assert in_time.status == 0 and events(tiny, "score")[0]["limits_ok"] and "calibrated on" not in in_time.out

    def slow(*args):
        wait[0] += 9
        return calibrate(*args)

    wait, now = [0.0], time.perf_counter
    monkeypatch.setattr(tg, "calibrate", slow)
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now() + wait[0])
    late = script(tiny, RUN_ID="late", **limits)
    assert late.status == 1 and not events({**tiny, "RUN_ID": "late"}, "score")[0]["limits_ok"]
    assert re.search(
        r"limit broken: training and calibration took 101\.\ds, MAX_WALLCLOCK_SECONDS=100; raise GPTQ_RESERVE", late.out
    )
    assert re.search(r"^score .* train_time:101\.\ds", late.out, re.M)


def test_calibration_that_runs_out_of_time_says_how_far_it_came(tiny, script, monkeypatch):
    train = tg.train
    monkeypatch.setattr(tg, "train", lambda *args: train(*args)._replace(seconds=99.9999, micro_tokens=2 * SEQ))
    result = script(tiny, MAX_WALLCLOCK_SECONDS=100, GPTQ_ENABLED=1, GPTQ_N_SAMPLES=6)
    assert "notice: calibrated on 1 of GPTQ_N_SAMPLES=6 sequences, as many as the 0.0s left of" in result.out
    assert result.status == 1  # one batch is always taken, and here it was too much


# ---- mistakes: exit status 2, one message, nothing written


def shards_in(folder: Path, data, train=None, val=None, tokenizer: bool = True) -> Path:
    """A data folder with what is given, the tiny data for what is not."""
    folder.mkdir()
    if tokenizer:
        shutil.copy(data.tokenizer, folder)
    write_shard(folder / "fineweb_train_000000.bin", data.train if train is None else train)
    write_shard(folder / "fineweb_val_000000.bin", data.val if val is None else val)
    return folder


def bad_inputs(data, tmp: Path) -> list[tuple[dict, str]]:
    """(knobs, words of the message) for each mistake that a user can make."""
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("a file")
    foreign = shards_in(tmp / "magic", data)
    write_shard(foreign / "fineweb_train_000000.bin", data.train, magic=7)
    version = shards_in(tmp / "version", data)
    write_shard(version / "fineweb_val_000000.bin", data.val, version=9)
    cut = shards_in(tmp / "cut", data)
    write_shard(cut / "fineweb_train_000001.bin", data.train, count=len(data.train) + 5)
    beyond = shards_in(tmp / "beyond", data, train=np.append(data.train, VOCAB))
    beyond_val = shards_in(tmp / "beyond_val", data, val=np.append(data.val, VOCAB))
    return [
        ({"DATA_PATH": tmp / "absent"}, "absent: no such folder"),
        ({"DATA_PATH": tmp / "empty"}, "empty: no fineweb_*.bin there"),
        ({"DATA_PATH": shards_in(tmp / "bare", data, tokenizer=False)}, "TOKENIZER_PATH=none beside"),
        ({"DATA_PATH": foreign}, "fineweb_train_000000.bin: not a token shard"),
        ({"DATA_PATH": version}, "fineweb_val_000000.bin: shard version 9"),
        ({"DATA_PATH": cut}, "fineweb_train_000001.bin: "),
        ({"DATA_PATH": beyond}, "token id 300 with VOCAB_SIZE=300"),
        ({"DATA_PATH": beyond_val}, "fineweb_val_000000.bin: token id 300"),
        (
            {"DATA_PATH": shards_in(tmp / "short", data, val=[BOS] * 20)},
            f"20 validation tokens are fewer than one window of {SEQ}",
        ),
        (
            {"DATA_PATH": shards_in(tmp / "few", data, train=[BOS] * 20), "GPTQ_ENABLED": 1},
            f"calibration needs {SEQ} training tokens",
        ),
        ({"EMA_DECAYS": ".9,.99"}, "EMA_DECAY keeps one"),
        ({"NGRAM_TILT_RATE": ".8"}, "NGRAM_TILT_BETA sets it"),
        ({"TARGET_BYTES": 99999, "QUANT_MIN_NUMEL": 10**6}, "TARGET_BYTES=99999 finds no tensor to code"),
        ({"TARGET_BYTES": 999, "EMBED_BITS": 16, "QUANT_MIN_NUMEL": 100}, "tensors that are kept as floats take"),
        ({"QUANT_OVERRIDES": "nowhere=5"}, "QUANT_OVERRIDES item nowhere=5 matches no parameter"),
        ({"QUANT_OVERRIDES": "blocks.7.attn.k=8"}, "blocks.7.attn.k=8 matches no parameter"),
        *(({"QUANT_OVERRIDES": item}, f"QUANT_OVERRIDES item '{item}'") for item in ("tok_emb=9", "attn")),
        *(
            ({"QUANT_QUANTILES": text}, f"QUANT_QUANTILES='{text}': expected numbers in (0, 1]")
            for text in ("0.9,1.2", "0.9,all")
        ),
        ({"TARGET_BYTES": 900, "ARTIFACT_LIMIT": 800}, "TARGET_BYTES=900 exceeds ARTIFACT_LIMIT=800"),
        ({"VOCAB_SIZE": 301}, "has 300 pieces but VOCAB_SIZE=301"),
        ({"TOKENIZER_PATH": tmp / "file"}, "not a SentencePiece model"),
        ({"MODE": "fly"}, "MODE='fly'"),
        ({"ATTENTION": "fa3"}, "ATTENTION=fa3: it needs a CUDA device"),
        ({"LOG_DIR": tmp / "file" / "logs"}, "cannot write"),
        ({"ARTIFACT": tmp / "file" / "a.pgz"}, "cannot write"),
        ({"ARTIFACT": tmp / "file"}, "file exists: choose another RUN_ID or ARTIFACT, or FORCE=1"),
        ({"ARTIFACT": tmp / "empty", "FORCE": 1}, "empty: expected a file, and this is a folder"),
        ({"MODE": "eval", "ARTIFACT": tmp / "absent.pgz"}, "no such file"),
        ({"RESUME": tmp / "absent.pt"}, "no such checkpoint"),
        ({"RESUME": tmp / "file"}, "not a checkpoint"),
    ]


def test_bad_input_gets_one_clear_message_and_leaves_nothing(tiny, script, data, tmp_path):
    for changes, words in bad_inputs(data, tmp_path):
        result = script(tiny, **changes)
        assert result.status == 2, (changes, result)
        lines = result.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], (changes, result.err)
        assert not list(tmp_path.rglob("*tiny*")) and not list(tmp_path.rglob("*.partial")), changes


def test_a_finished_run_is_not_overwritten_by_accident(tiny, script):
    assert script(tiny, ITERATIONS=1).status == 0
    before = score_of(tiny)
    again = script(tiny, ITERATIONS=2)
    assert again.status == 2 and "exists: choose another RUN_ID" in again.err and score_of(tiny) == before
    assert script(tiny, ITERATIONS=2, FORCE=1).status == 0 and score_of(tiny) != before


def test_a_crash_is_in_the_log_too(tiny, script, monkeypatch):
    monkeypatch.setattr(tg, "quantize", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script(tiny)
    assert events(tiny, "error")[0]["message"].startswith("ZeroDivisionError")
    assert events(tiny, "end")[0]["status"] == "failed"


# ---- the engine room: several processes


@pytest.fixture(scope="module")
def single(tmp_path_factory, data):
    """The run of one process that the others must agree with."""
    env = base_env(tmp_path_factory.mktemp("single"), data)
    assert tg.main([], env) == 0
    tg.Run.current = None
    return env


def assert_agree(env: dict[str, str], single: dict[str, str]) -> None:
    """Training losses equal to rounding, scores to 1e-6 of what the same weights give, artifact complete."""
    ours, theirs = losses(env), losses(single)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[s] - theirs[s]) for s in ours) < 2e-4
    assert abs(score_of(env) - score_of(single)) < 2e-3  # another rounding in training may move a code of a weight


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_trains_the_same_and_scores_the_same(tmp_path, data, single, script, ranks):
    env = base_env(tmp_path, data)
    run_ranks(env, ranks)
    assert events(env, "run")[0]["world_size"] == ranks
    assert_agree(env, single)
    # its own artifact, scored by one process: the number of ranks that share the scoring does not matter
    alone = {k: env[k] for k in ("DATA_PATH", "DEVICE", "ATTENTION", "LOG_DIR")}
    assert script(alone, MODE="eval", RUN_ID="alone", ARTIFACT=tmp_path / "tiny.pgz").status == 0
    for mine, theirs in zip(events({**env, "RUN_ID": "alone"}, "stage"), events(env, "stage"), strict=True):
        assert abs(mine["val_bpb"] - theirs["val_bpb"]) < 1e-6 and mine["bytes"] == theirs["bytes"]


def test_two_nodes_work_and_all_ranks_stop_on_the_same_step(tmp_path, data, single):
    """Two torchrun agents on loopback, stopped by the clock: ranks that disagreed on the last step would hang."""
    env = {**base_env(tmp_path, data), "ITERATIONS": "0", "MAX_WALLCLOCK_SECONDS": "2"}
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    agents = [spawn(env, *nodes, f"--node_rank={rank}") for rank in range(2)]
    for result in [
        finished(agent) for agent in agents
    ]:  # a busy machine may overshoot so short a limit, all ranks alike
        assert result.status == int(not events(env, "score")[0]["limits_ok"]), result.err[-3000:]
    end, theirs = events(env, "train_end")[0], losses(single)
    assert end["reason"] == "wallclock" and events(env, "run")[0]["world_size"] == 2
    assert all(abs(loss - theirs[step]) < 2e-4 for step, loss in losses(env).items() if step <= 4)
    assert events(env, "score")[0]["complete"]


def test_a_mistake_that_one_rank_finds_is_told_once_by_torchrun_too(tmp_path, data):
    (tmp_path / "file").write_text("no folder")
    result = torchrun({**base_env(tmp_path, data), "LOG_DIR": str(tmp_path / "file")}, 2)
    assert result.status == 1 and result.err.count("error: ") == 1, result.err[-3000:]
    assert "cannot write" in result.err and 'train_gpt.py", line' not in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(tmp_path, data, script):
    env = {**base_env(tmp_path, data), "ITERATIONS": "24", "CHECKPOINT_EVERY": "1", "VAL_LOSS_EVERY": "0", "EVAL_STRIDE": "0",
           "RESUME": "auto"}  # fmt: skip
    agent = spawn(env, "--standalone", "--nproc_per_node=2", "--max-restarts=2")
    log, wanted = tmp_path / "tiny.jsonl", random.Random(os.getpid()).uniform(1, 17)
    while agent.poll() is None and (not log.exists() or log.read_text().count('"event": "step"') < wanted):
        time.sleep(0.03)
    os.kill(random.choice(children(agent.pid)), signal.SIGKILL)
    result = finished(agent, 90)
    assert result.status == 0, result.err[:6000]
    assert len(events(env, "run")) == 2 and any("resumed" in e["text"] for e in events(env, "notice"))
    assert script(env, LOG_DIR=tmp_path / "single", RESUME="").status == 0
    theirs = losses({**env, "LOG_DIR": str(tmp_path / "single")})
    ours = losses(env)
    assert ours.keys() == theirs.keys() and max(abs(ours[s] - theirs[s]) for s in ours) < 5e-3


# ---- with a GPU

ON_GPU = {"DEVICE": "cuda", "ATTENTION": "auto", "TRAIN_DTYPE": "auto", "MODEL_DIM": "128", "ITERATIONS": "3"}


@pytest.mark.gpu
def test_a_gpu_goes_on_from_its_checkpoint(tiny, script):
    env = {**tiny, **ON_GPU, "ITERATIONS": "6", "CHECKPOINT_EVERY": "2", "NGRAM_TABLE": "pr1095"}
    assert script(env).status == 0
    whole, kept = losses(env), Path(env["LOG_DIR"]) / "tiny.ckpt" / "step_000004.pt"
    again = {**env, "RUN_ID": "again", "RESUME": str(kept)}
    assert script(again).status == 0
    assert losses(again)[6] == pytest.approx(whole[6], abs=1e-3)  # sums on a GPU have no fixed order


@pytest.mark.gpu
def test_gpus_train_over_nccl(tiny, script):
    ranks = torch.cuda.device_count()
    if ranks < 2:
        pytest.skip("one GPU has nobody to talk to")
    env = {**tiny, **ON_GPU, "TRAIN_BATCH_TOKENS": str(8 * ranks * SEQ), "NGRAM_SCORE": "exact"}
    result = torchrun({**env, "RUN_ID": "all"}, ranks)
    assert result.status == 0, result.err
    assert script({**env, "RUN_ID": "one"}).status == 0
    assert losses({**env, "RUN_ID": "all"})[3] == pytest.approx(losses({**env, "RUN_ID": "one"})[3], abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"COMPILE": "1"},
        {"ATTENTION": "sdpa", "QAT": "ste", "EMA_DECAY": "0.9"},
        {"GPTQ_ENABLED": "1", "COMPLEMENT_ALPHA": "0.5", "TRAIN_SEQ_SCHEDULE": "16@0.33,16@0.55"},
        {"NGRAM_SCORE": "exact,normalized,claimed", "NGRAM_TABLE": "pr1095,exact", "TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "256"},
        {"COMPILE": "1", "TTT_ENABLED": "1", "TTT_RESET": "document", "NGRAM_SCORE": "exact"},
        {"TARGET_BYTES": "150000", "CODE_FORM": "packed", "NGRAM_SCORE": "exact", "NGRAM_TILT_ENABLED": "1"},
    ],
)  # fmt: skip
def test_a_gpu_trains_packs_and_scores(tiny, script, changes):
    env = {**tiny, **ON_GPU, **changes}
    result = script(env)
    assert result.status == 0, result.err
    assert losses(env)[3] < losses(env)[1] and events(env, "train_end")[0]["peak_memory_mib"] > 0
    artifact = Path(env["LOG_DIR"]) / "tiny.pgz"
    base = {k: env[k] for k in ("DATA_PATH", "LOG_DIR")}
    assert script(base, MODE="eval", ARTIFACT=artifact, DEVICE="cuda", RUN_ID="again").status == 0
    assert score_of({**env, "RUN_ID": "again"}) == pytest.approx(score_of(env), abs=1e-4)
    assert script(base, MODE="eval", ARTIFACT=artifact, DEVICE="cpu", RUN_ID="cpu").status == 0
    assert score_of({**env, "RUN_ID": "cpu"}) == pytest.approx(score_of(env), rel=0.02)


@pytest.mark.parametrize(("package", "changes"), [("sentencepiece", {}), ("zstandard", {"COMPRESSOR": "zstd"})])
def test_a_missing_package_is_one_message_before_the_training(package, changes, script, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = script(tiny, **changes)
    assert status == 2 and "step:" not in out and "Traceback" not in err
    assert package in err and err.endswith("; pip install -r requirements.txt\n")
