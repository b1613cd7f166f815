"""Runs a list of configurations one after another: skips finished ones, survives failing ones.

A log counts as that of a line only if the line would give the same run now: expect.py has the comparison.
"""

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
from collections import Counter
from pathlib import Path
from typing import IO

import expect
import runs as logs
from run import Run, UserError, is_locked, locks_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def run(list_file: str, launch: str, only: int | None) -> int:
    """Runs every line (or line `only`, counted from 0) and prints what became of each. 1 if any failed or still goes."""
    jobs, command = read_list(list_file), _words(launch)
    asks = expect.Expectations(command)
    if only is not None:
        if not 0 <= only < len(jobs):
            raise UserError(f"--only {only}: {list_file} holds configurations 0 to {len(jobs) - 1}")
        jobs = jobs[only : only + 1]
    outcomes = []
    for number, knobs in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {knobs['RUN_ID']}", flush=True)
        try:
            outcomes.append((knobs["RUN_ID"], _one(knobs, command, asks)))
        except KeyboardInterrupt:
            print(f"stopped by hand in {knobs['RUN_ID']}; the same command goes on from here", file=sys.stderr)
            return 1
        print(f"    {outcomes[-1][1]}", flush=True)
    asks.close()
    names = {}
    for name, outcome in outcomes:
        kind = next((k for k in NOT_DONE if outcome.removeprefix("skipped: ").startswith(k)), "done")
        names.setdefault(kind, []).append(name)
    print(f"{len(names.pop('done', []))} of {len(outcomes)} done", end="")
    print(*[f"; {kind}: {', '.join(names[kind])}" for kind in NOT_DONE if kind in names], sep="")
    return int(bool(names))


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
    jobs: dict[int, dict[str, str]] = {}
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
        if len(knobs) < len(words):
            twice = next(k for k, n in Counter(w.split("=", 1)[0] for w in words).items() if n > 1)
            raise UserError(f"{list_file}, line {number}: {twice} stands on it more than once; leave one of them")
        if "RUN_ID" in knobs and (not knobs["RUN_ID"] or re.search(r"[/\x00-\x1f]", knobs["RUN_ID"])):
            raise UserError(f"{list_file}, line {number}: RUN_ID={knobs['RUN_ID']}: expected the name of a file")
        same = next(
            (n for n, other in jobs.items() if other == knobs or knobs.get("RUN_ID", "") == other.get("RUN_ID")), None
        )
        if same is not None:
            raise UserError(
                f"{list_file}, line {number}: the same run as line {same} ({knobs.get('RUN_ID') or run_id(knobs)})"
            )
        jobs[number] = knobs
    if not jobs:
        raise UserError(f"{list_file}: no configuration in it")
    return _named(list(jobs.values()))


def _named(jobs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same with a RUN_ID each; those that would share one with another line end in a hash of their knobs."""
    names = [knobs.get("RUN_ID") or run_id(knobs) for knobs in jobs]
    shared = {name for name, n in Counter(names).items() if n > 1}
    return [{"RUN_ID": run_id(k, name in shared), **k} for name, k in zip(names, jobs, strict=True)]


def run_id(knobs: dict[str, str], hashed: bool = False) -> str:
    """A file name that says what runs; the same knobs give the same name in any order.

    A slash becomes an underscore. A name that is cut, or in which more than slashes is replaced, ends in a hash.
    """
    words = [f"{k.lower()}-{v}" for k, v in sorted(knobs.items(), key=lambda kv: (kv[0] == "SEED", kv[0]))]
    whole = "_".join(words)
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", whole)
    if len(name) <= 100 and name == whole.replace("/", "_") and not hashed:
        return name
    return f"{name[:88]}_{hashlib.sha256('_'.join(words).encode()).hexdigest()[:10]}"


NOT_DONE = ("failed", "still going", "another configuration")  # how outcomes begin that leave a line undone
AGAIN = {"RESUME": "auto", "FORCE": "1"}  # from the newest checkpoint, if any, over whatever else was left behind


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
        lock.write(_owner(child.pid))
        lock.flush()

        def stop(*_: object) -> None:
            child.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _owner(process: int) -> str:
    return f"process {process} on {platform.node()}\n"


def _lives(owner: str) -> bool:
    """Whether a process that a lock file names, other than this one, may live: it does here, or is of another machine."""
    found = re.fullmatch(r"process (\d+) on (.*)", owner)
    if not found or found[2] != platform.node() or not fcntl:
        return True
    if int(found[1]) == os.getpid():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _one(knobs: dict[str, str], launch: list[str], asks: expect.Expectations) -> str:
    """What became of one configuration. Locks tell whether a run of it lives, without locks the processes named there."""
    environment = os.environ | knobs
    path = Path(os.path.expanduser(environment.get("LOG_DIR") or "logs"), f"{knobs['RUN_ID']}.jsonl")
    trainers, lock_file = locks_of(path)
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a+", encoding="utf-8") as lock:
        ours = _lock(lock)
        lock.seek(0)
        owners = lock.read().split("\n")[:-1]  # the sweep that ran it last and its run; none if a hand did
        alive = [] if ours else [owner for owner in owners if ours is False or _lives(owner)]
        outcome, log = None, _read(path)
        if ours is False or alive or is_locked(trainers):
            outcome = f"skipped: still going, held by {alive[0] if alive else 'a run that no sweep started'}"
            if ours is None:
                outcome += f"; there are no locks here: remove {lock_file} if it has ended"
        elif ours is None and not owners and log and log.info and not log.ended and environment.get("FORCE") != "1":
            outcome = "skipped: still going or cut off, without locks nothing tells; FORCE=1 runs the line over it"
        elif log is not None:
            outcome = _what_stands(log, environment, asks)
        if outcome is None:
            lock.truncate(0)
            lock.write(_owner(os.getpid()))
            lock.flush()
            outcome = _start(environment, path, launch, lock)
    if outcome.removeprefix("skipped: ").startswith("finished"):
        lock_file.unlink(missing_ok=True)
    return outcome


def _what_stands(log: Run, environment: dict[str, str], asks: expect.Expectations) -> str | None:
    """What a log spares this line or keeps it from; None where it is to run, `environment` then says how."""
    done = _finished(log)
    differs = asks.differences(log, environment)
    if not done:  # a script mended since is why it is run again
        differs = [line for line in differs if not line.startswith("script ")]
    if not differs:
        return f"skipped: {done}" if done else None
    if environment.get("FORCE") == "1":
        environment.setdefault("RESUME", "")  # anew: checkpoints of the other configuration are no beginning
        return None
    what = "; ".join(differs[:8]) + (f" and {len(differs) - 8} more" if len(differs) > 8 else "")
    return f"another configuration is in {log.path}: {what}. FORCE=1 runs the line over it; RUN_ID=... gives it a name of its own"


def _start(environment: dict[str, str], path: Path, launch: list[str], lock: IO) -> str:
    began = time.monotonic()
    if path.exists():
        environment = AGAIN | environment
    try:
        status = _run(launch, environment, lock)
    except OSError as error:
        raise UserError(f"--launch {shlex.join(launch)}: {error.strerror}") from None
    log = _read(path)
    after = f"no log {path}" if log is None else log.damage if log.info == {} else _finished(log) or log.status()
    if status != 0:
        return f"failed: exit status {status}; {after}"
    if log is None or not _finished(log):
        return f"failed: exit status 0, but {after}"
    return f"{after}, {time.monotonic() - began:.0f} s"


def _read(path: Path) -> Run | None:
    """The run in a log; None without the file. A log that cannot be read is a run of which nothing is known but why."""
    if not path.is_file():
        return None
    try:
        return logs.read_log(path)
    except UserError as error:
        return Run(path, damage=str(error))


def _finished(log: Run) -> str | None:
    """How it finished, or None if it did not."""
    if log.finished:
        return f"finished, {log.bpb():.4f} bpb"
    return "finished" if log.mode != "train" and log.status() == "ok" else None
