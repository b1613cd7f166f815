"""Runs a list of configurations one after another: skips finished ones, survives failing ones."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import runs as logs
from runs import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def run(list_file: str, launch: str, only: int | None) -> int:
    """Runs every line (or line `only`, counted from 0) and prints what became of each. 1 if any failed or still goes."""
    jobs, command = read_list(list_file), _words(launch)
    if only is not None:
        if not 0 <= only < len(jobs):
            raise UserError(f"--only {only}: {list_file} holds configurations 0 to {len(jobs) - 1}")
        jobs = jobs[only : only + 1]
    outcomes = []
    for number, knobs in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {knobs['RUN_ID']}", flush=True)
        try:
            outcomes.append((knobs["RUN_ID"], _one(knobs, command)))
        except KeyboardInterrupt:
            print(f"stopped by hand in {knobs['RUN_ID']}; the same command goes on from here", file=sys.stderr)
            return 1
        print(f"    {outcomes[-1][1]}", flush=True)
    failed = [name for name, outcome in outcomes if outcome.startswith("failed")]
    going = [name for name, outcome in outcomes if outcome.startswith("skipped: still going")]
    print(f"{len(outcomes) - len(failed) - len(going)} of {len(outcomes)} done", end="")
    print(*[f"; {word}: {', '.join(names)}" for word, names in (("failed", failed), ("still going", going)) if names])
    return int(bool(failed or going))


def _words(launch: str) -> list[str]:
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch {launch}: {error}") from None
    if not words:
        raise UserError("--launch: expected the command that a configuration starts")
    return words


def read_list(list_file: str) -> list[dict[str, str]]:
    """One dict of knobs a line, RUN_ID added; a `UserError` names the line that is no list of KNOB=value words."""
    try:
        data = sys.stdin.buffer.read() if list_file == "-" else Path(list_file).read_bytes()
    except OSError as error:
        raise UserError(f"{list_file}: {error.strerror}") from None
    jobs, ids = [], {}
    for number, line in enumerate(logs.split_lines(data), 1):
        if fault := logs.fault_of(line):
            raise UserError(f"{list_file}, line {number}: {fault}")
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{list_file}, line {number}: {error}") from None
        if not words:
            continue
        wrong = [w for w in words if not re.match(r"[A-Z][A-Z0-9_]*=", w)]
        if wrong:
            raise UserError(f"{list_file}, line {number}: expected KNOB=value words, got {wrong[0]!r}")
        knobs = dict(w.split("=", 1) for w in words)
        knobs.setdefault("RUN_ID", run_id(knobs))
        if not knobs["RUN_ID"] or re.search(r"[/\x00-\x1f]", knobs["RUN_ID"]):
            raise UserError(f"{list_file}, line {number}: RUN_ID={knobs['RUN_ID']}: expected the name of a file")
        if knobs["RUN_ID"] in ids:
            raise UserError(
                f"{list_file}, line {number}: the same run as line {ids[knobs['RUN_ID']]} ({knobs['RUN_ID']})"
            )
        ids[knobs["RUN_ID"]] = number
        jobs.append(knobs)
    if not jobs:
        raise UserError(f"{list_file}: no configuration in it")
    return jobs


def run_id(knobs: dict[str, str]) -> str:
    """A file name that says what runs; the same knobs give the same name in any order. Long ones end in a hash."""
    words = [f"{k.lower()}-{v}" for k, v in sorted(knobs.items(), key=lambda kv: (kv[0] == "SEED", kv[0]))]
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", "_".join(words))
    return name if len(name) <= 100 else f"{name[:88]}_{hashlib.sha256('_'.join(words).encode()).hexdigest()[:10]}"


AGAIN = {
    "RESUME": "auto",
    "FORCE": "1",
}  # from the newest checkpoint if there is one, over whatever else was left behind


def _lock(file: IO) -> bool | None:
    """Whether the lock is ours now, to be held until sweep and run have ended, however they end. None: no locks here."""
    try:
        return fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    except BlockingIOError:
        return False
    except OSError:  # of the file system
        return None


def _run(command: list[str], environment: dict[str, str], lock: IO) -> int:
    """Exit status of the command, which inherits the lock; a SIGTERM to the sweep ends it too."""
    with subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()] if fcntl else []) as child:

        def stop(*_: object) -> None:
            child.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _one(knobs: dict[str, str], launch: list[str]) -> str:
    """What became of one configuration. Its lock tells whether a run of it lives; without one, the age of its log."""
    environment = os.environ | knobs
    path = Path(os.path.expanduser(environment.get("LOG_DIR") or "logs"), f"{knobs['RUN_ID']}.jsonl")
    lock_file = path.with_suffix(".lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a+", encoding="utf-8") as lock:
        ours, before = _lock(lock), _state(path)
        lock.seek(0)
        owner = lock.read().strip()  # the sweep that ran it last; none if a hand did
        if before.startswith("finished"):
            outcome = f"skipped: {before}"
        elif ours is False:
            outcome = f"skipped: still going, held by {owner}"
        elif before.startswith("still going") and not (ours and owner):
            outcome = f"skipped: {before}"
        else:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
            outcome = _start(environment, path, launch, lock)
    if outcome.removeprefix("skipped: ").startswith("finished"):
        lock_file.unlink(missing_ok=True)
    return outcome


def _start(environment: dict[str, str], path: Path, launch: list[str], lock: IO) -> str:
    began = time.monotonic()
    if path.exists():
        environment = AGAIN | environment
    try:
        status = _run(launch, environment, lock)
    except OSError as error:
        raise UserError(f"--launch {shlex.join(launch)}: {error.strerror}") from None
    after = _state(path)
    if status != 0:
        return f"failed: exit status {status}; {after}"
    if not after.startswith("finished"):
        return f"failed: exit status 0, but {after}"
    return f"{after}, {time.monotonic() - began:.0f} s"


def _state(path: Path) -> str:
    if not path.is_file():
        return f"no log {path}"
    try:
        log = logs.read_log(path)
    except UserError as error:
        return str(error)
    if log.finished:
        return f"finished, {log.bpb():.4f} bpb"
    return "finished" if log.mode != "train" and log.status() == "ok" else log.status()
