"""What a line of a sweep's list would give now, beside what a log says that it gave.

The trainer itself is asked, by this file as a program: it imports the script in the interpreter that runs it and answers each
environment, a JSON object a line, with knobs, data and hashes as a log's head has them. A script without `load_config` cannot be asked:
then the words of the line and of the environment are held against the log's knobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PLACES = {
    "RUN_ID",
    "LOG_DIR",
    "FORCE",
    "RESUME",
    "CHECKPOINT_EVERY",
    "CHECKPOINT_KEEP",
    "PROFILE",
}  # move no figure of a log
BY_CONTENT = {"DATA_PATH", "TOKENIZER_PATH"}


class Expectations:
    """Answers, for one command that a sweep starts; `close` ends the script's process."""

    def __init__(self, command: list[str]) -> None:
        self.script = next((Path(w) for w in command if w.endswith(".py") and Path(w).is_file()), None)
        python = next((w for w in command if re.fullmatch(r"python[\d.]*(?:\.exe)?", Path(w).name)), sys.executable)
        self.command = [python, __file__, str(self.script)]
        self.words = dict(
            w.split("=", 1) for w in command if re.match(r"[A-Z][A-Z0-9_]*=", w)
        )  # as of `env A=1 python ...`
        self.child: subprocess.Popen | None = None
        self.can_ask = self.script is not None and b"def load_config(" in self.script.read_bytes()

    def close(self) -> None:
        if self.child:
            self.child.kill()
            self.child.communicate()

    def differences(self, log, environment: dict[str, str]) -> list[str]:
        """`NAME old there, new now` for each part of the log's configuration that the environment would not give again."""
        environment = environment | self.words
        now = self._ask(environment) if self.can_ask and log.config else None
        if now is None:
            now = self._read(log, environment)
        elif "error" in now:
            return [f"the line is refused now ({now['error']})"]
        return [
            f"{what} {_show(old)} there, {_show(new)} now"
            for what, old, new in _pairs(log, now)
            if not _equal(old, new)
        ]

    def _ask(self, environment: dict[str, str]) -> dict | None:
        """The script's answer; None, with a notice, if it cannot be asked."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self.child = self.child or subprocess.Popen(self.command, text=True, encoding="utf-8", **pipes)
            self.child.stdin.write(json.dumps(environment) + "\n")
            self.child.stdin.flush()
            answer = json.loads(self.child.stdout.readline())
        except (OSError, ValueError) as error:
            answer = {"fault": f"{shlex.join(self.command)}: {error}"}
        if "fault" not in answer:
            return answer
        self.can_ask = False
        print(
            f"notice: {self.script} cannot be asked what a line gives ({answer['fault']}); only its words are compared",
            file=sys.stderr,
        )
        return None

    def _read(self, log, environment: dict[str, str]) -> dict:
        """The same from the environment's words alone: knobs that it sets, and those that it has set no more."""
        values = {k: _like(log.config[k], v) for k, v in environment.items() if k in log.config}
        values |= {k: None for k, source in log.sources.items() if source == "env" and k not in environment}
        hashes = [log.info.get("source_sha256"), log.info.get("packed_sha256")]
        found = self.script and hashlib.sha256(self.script.read_bytes()).hexdigest()
        script = hashes[0] if found in hashes else found
        return {
            "values": values,
            "script": script,
            "mode": environment.get("MODE") or "train",
            "recipe": environment.get("RECIPE"),
        }


def _pairs(log, now: dict):
    """(what, the log's, now's) of everything that both know."""
    values = now["values"]
    data, tokenizer, pack = log.info.get("data", {}), log.info.get("tokenizer", {}), log.audit or log.pack or {}
    known = {"script": log.info.get("source_sha256"), "mode": log.info.get("mode") and log.mode}
    known |= {"recipe": log.info.get("recipe"), "tokenizer": tokenizer.get("sha256")}
    known["artifact"] = pack.get("artifact_sha256") if log.mode != "train" else None
    yield from ((what, old, now[what]) for what, old in known.items() if None not in (old, now.get(what)))
    for key, new in now.get("data", {}).items():
        what = {"path": "DATA_PATH", "val_sha256": "validation text"}.get(key, key)
        if None not in (data.get(key), new):
            yield what, data[key], new
    for name in [n for n in log.config if n in values and n not in PLACES | {"MODE", "RECIPE"}]:
        if not (name in BY_CONTENT and "data" in now):
            yield name, log.config[name], values[name]
    for name in now.get("set", []):  # a knob that the log's version did not have
        if name not in log.config and name not in PLACES | BY_CONTENT and log.config:
            yield name, None, values[name]


def _equal(old: object, new: object) -> bool:
    if old == new or json.dumps(old) == json.dumps(new):  # nan too
        return True
    try:
        return float(old) == float(new)
    except (TypeError, ValueError):
        return False


def _like(old: object, text: str) -> object:
    """`text` as a value of the kind that `old` is, where it can be one."""
    try:
        if isinstance(old, bool):
            return {"1": True, "0": False, "true": True, "false": False}[text.lower()]
        return float(text) if isinstance(old, (int, float)) else text
    except (KeyError, ValueError):
        return text


def _show(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return (
        "unset"
        if value in (None, "")
        else str(int(value))
        if isinstance(value, bool)
        else str(value).removesuffix(".0")
    )


# ---- The program: beside the script


def answer(script, environment: dict[str, str], cache: dict) -> dict:
    """Head of the log that the script would write in this environment; {"error": its message} if it would refuse to."""
    mode = script.translate(environment, environment.get("RECIPE", ""), [], []).get("MODE")
    blob, header = (
        script.open_artifact("ARTIFACT", environment.get("ARTIFACT", "")) if mode in ("eval", "audit") else (b"", {})
    )
    loaded, paths = script.fit_data(
        script.load_config(environment, header.get("config")), header.get("tokenizer_sha256", "")
    )
    cfg = loaded.cfg
    key = (
        paths,
        bool(blob),
        *(getattr(cfg, n) for n in ("vocab_size", "val_tokens", "val_drop_tail", "val_bytes", "eval_len")),
    )
    if key not in cache:
        tokenizer = script.Tokenizer(paths.tokenizer, cfg.vocab_size, paths.transform)
        tokens = script.load_validation(cfg, paths.folder, tokenizer).tokens
        shards = script.load_split(paths.folder, "train") if not blob else []
        cache[key] = (
            tokenizer.sha256,
            {
                "path": script.shown_path(paths.folder),
                "val_sha256": hashlib.sha256(tokens.numpy().astype("<u2").tobytes()).hexdigest(),
                "train_shards": len(shards),
                "train_tokens": sum(map(len, shards)),
            },
        )
    tokenizer_sha256, data = cache[key]
    return {
        "values": {n: getattr(cfg, n.lower()) for n in script.FIELDS},
        "set": [n for n, source in loaded.source.items() if source == "env"],
        "mode": cfg.mode,
        "recipe": cfg.recipe,
        "script": hashlib.sha256(script.source_text().encode()).hexdigest(),
        "artifact": hashlib.sha256(blob).hexdigest() if blob else None,
        "tokenizer": tokenizer_sha256,
        "data": data,
    }


def main(path: str) -> None:
    """Answers the lines of stdin on stdout; {"fault": why} for a script that has other functions than train_gpt.py."""
    from importlib.util import module_from_spec, spec_from_file_location

    out, sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8"), sys.stderr
    fault, cache, script = None, {}, None
    try:
        sys.path.insert(0, str(Path(path).resolve().parent))
        spec = spec_from_file_location("train_gpt", path)
        sys.modules["train_gpt"] = script = module_from_spec(spec)
        spec.loader.exec_module(script)
    except BaseException as error:  # whatever a script may raise
        fault = f"{type(error).__name__}: {error}"
    mistakes = tuple(kind for name in ("ConfigError", "ArtifactError") if (kind := getattr(script, name, None)))
    for line in sys.stdin:
        try:
            reply = {"fault": fault} if fault else answer(script, json.loads(line), cache)
        except mistakes as error:
            reply = {"error": str(error).replace("\n", "; ")}
        except Exception as error:
            reply = {"fault": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply, default=str), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
