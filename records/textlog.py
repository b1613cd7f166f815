"""Text logs to runs: the baseline's keys, and what its heirs made of them. One file may hold several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from run import Run, UserError

_FINITE = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = f"({_FINITE})"
_VALUE = rf"({_FINITE}|[-+]?(?i:nan|inf(?:inity)?))(?![\w}}]|\.\w)"  # a format field such as .4f} is none
_COUNT = r"(\d[\d,_]*)"
_TIME = rf"{_NUMBER} ?(ms|s|sec|secs|seconds|m|min|mins|minutes)\b"
_BEFORE_KEY = re.compile(  # a time stamp, a logger's or a rank's name before the key
    r"(?:\[[^\]\n]{1,40}\]|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?|\d{10}(?:\.\d+)?(?= )"
    r"|\d\d:\d\d:\d\d(?:[.,]\d+)?|(?:INFO|DEBUG|WARNING)\b(?::root:)?|rank ?\d+\b)[\s:|>-]*"
)
_STEP = re.compile(
    rf"(?:step[: ] ?)?(\d+)/(\d+):? +(train_loss|val_loss)[:=] ?{_VALUE}(?:,? +val_bpb[:=] ?{_VALUE})?(.*)$"
)
_TRAIN_TIME = re.compile(rf"train_time[:=] ?{_TIME}")
_STOPPED = re.compile(rf"stopping_early:.* train_time[:=] ?{_TIME} step[:=] ?(\d+)")
_LOSS = re.compile(rf"(?<![\w{{.])(?:\w+_)?val_loss[:=] ?{_VALUE}")
_BPB = re.compile(rf"(?i)(?<![\w{{.])((?:\w+_)?)bpb ?[:=] ?{_VALUE}")
_OTHERS = re.compile(  # words before a figure that is not this run's, or not its last
    r"(?i)claim|baseline|target|reference|record|publish|best|goal|gain|delta|diff|improve|prev|sota|limit|threshold|expect"
    r"|running|partial|chunk|step|iter|epoch|batch|\bdocs?\b|window|\d/\d|\["
)
_STAGE_TIME = re.compile(rf"\b(?:eval_time|elapsed|time|took|in)\b[:= ]{{1,2}}{_TIME}")
_WHOLE_EVAL = re.compile(
    rf"(?i)(?:total[_ ]eval(?:uation)?[_ ]time|eval(?:uation)? (?:took|done in|finished in|time))\b[:= ]*{_TIME}"
)
_CALIBRATED = re.compile(rf"(?i).*(?:gptq|hessian|calibrat)\w*\b.*\bin {_TIME}")
_ADAPTS = r"ttt|adapt|lora|sgd|test[- _]time[- _]training|fine[- _]?tun"
_ADAPTED = re.compile(
    rf"(?i)\b(\w*(?:{_ADAPTS})\w*)\b(?:.*?\b(?:time|elapsed|took|done|finished|in)\b[^\d\n]{{0,12}}|[^\d\n]{{0,24}}[:=] ?){_TIME}"
)
_ADAPTED_BARE = re.compile(  # ttt_seconds: 350.2, whose unit stands in its name
    rf"(?i)\b(\w*?(?:{_ADAPTS})\w*?)[:_ ](?:time_)?(time|elapsed|seconds|secs|ms|s) ?[:=] ?{_VALUE}"
)
_UNTIMED = re.compile(r"(?i)compil|warm|random tokens|val_loss|train_time|budget|limit|max|reserve")
_GATES = re.compile(r"(\w+)_gate=(\d+)")
_PAIR = re.compile(r"(?:^|[\s:])([a-z][a-z0-9_]*)[:=] ?([^\s:=]+)(?=\s|$)")
_VAL_TOKENS = re.compile(rf"(?i)\bval(?:idation)?[ _]tokens ?[:=] ?{_COUNT}(?=\s|$)")
_SIZE = r"(\d[\d,_]*(?:\.\d+)?) ?(bytes|[kKmM]i?B|B)?(?!\w|\.\d)"
_TOTAL = re.compile(rf"(?i)\btotal[ _]submission[ _]size([^:\n]*): ?{_SIZE}")
_CODE = re.compile(rf"(?i)\bcode[ _]size([^:\n]*): ?{_SIZE}")
_MODEL = re.compile(rf"(?i)\bserialized[ _]model[ _]([^:\n]*): ?{_SIZE}")
_CLAIM = re.compile(rf"claimed_bpb: ?{_NUMBER}(?: z_mean: ?{_NUMBER} z_max: ?{_NUMBER})?")
_DEVICE = re.compile(r"NVIDIA (?:H\d+|A\d+|B\d+|GeForce RTX \d+)[^|\n]{0,24}")
_DIAGNOSTIC = re.compile(r"(?i)diagnostic|pre-?_?quant|post-?_?ema$")
_COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
MAX_STAGES = 100  # of a run, without a loss
MAX_LINE, MAX_PROSE = 20_000, 240  # characters; expressions that look ahead take time that grows with a line's square
_RULER = re.compile(r"^={80,}\s*$", re.M)
_CODE_LINE = re.compile(r'(?:import |from \w|def |class |@|#|"""|\'\'\')')
_DEFINES = re.compile(r"(?:def|class|async def) \w|if __name__ ?==|@\w")
_IS_SOURCE = re.compile(r"^(?:import \w|from \w[\w.]* import |exec\()", re.M)
_MEASURES = re.compile(r"^(?:step:)?\d+/\d+ (?:train|val)_loss:", re.M)
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0}
_SECONDS |= dict.fromkeys(("m", "min", "mins", "minutes"), 60.0)
_UNITS = {"": 1, "b": 1, "bytes": 1, "kb": 1e3, "mb": 1e6, "kib": 1 << 10, "mib": 1 << 20}
_MEASURED = {"step", "warmup_step", "train_loss", "val_loss", "val_bpb", "train_time", "step_avg", "eval_time"}
_TYPE = re.compile(  # what an annotation has where a log has a value
    r"(?:int|float|str|bool|bytes|object|None|Any|(?:\w+\.)*(?:Tensor|ndarray|Module|Path|dtype|device|Namespace))\b[\w|.\[\]]*,?"
    r"|(?:list|dict|tuple|set|Optional|Union|Callable|Iterator|Iterable|Sequence|Mapping)(?:\[.*)?,?"
)
_FACTS = {"world_size", "train_shards", "val_tokens", "tokens", "model_params", "dataset", "seed", "run_id"}


def _seconds(number: str, unit: str) -> float:
    return float(number) * _SECONDS[unit.lower()]


def _rounding(number: str, unit: str) -> float:
    """Half a unit of the last digit printed, in seconds: 9.9m may be 591 s."""
    return 0.5 * 10.0 ** -len(number.partition(".")[2]) * _SECONDS[unit.lower()]


def _whole(count: str | None) -> int | None:
    """A count as logs print it, 62,021,632 too; None for what is no count."""
    digits = re.sub(r"(?<=\d)[,_](?=\d)", "", count or "")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _bytes(number: str, unit: str | None) -> int:
    """15.93 MB may be 15,925,000 bytes: the least that a rounded figure can stand for."""
    each, digits = _UNITS[(unit or "").lower()], len(number.partition(".")[2])
    return round((float(re.sub(r"[,_]", "", number)) - (0.5 * 10.0**-digits if each > 1 else 0)) * each)


# ---- The parts of a log


def sections(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is source, its text) of each part between lines of `=`; log lines before source stand apart."""
    ruled = _RULER.search(text) is not None
    for part in _RULER.split(text):
        if not _IS_SOURCE.search(part):
            yield False, part
            continue
        lines = part.strip("\n").split("\n")
        first = next((n for n, line in enumerate(lines) if _CODE_LINE.match(line)), 0)
        whole = ruled and not _MEASURES.search(part)
        end = len(lines) if whole else _end_of_source(lines, first)
        if first:
            yield False, "\n".join(lines[:first])
        if end > first:
            yield True, "\n".join(lines[first:end]) + "\n"
        if end < len(lines):
            yield False, "\n".join(lines[end:])


def _end_of_source(lines: list[str], first: int) -> int:
    """Behind the last definition, or `if __name__`, before the first measurement, and behind the lines that belong to it.

    For a script that no line of `=` closes; `first` where none follows.
    """
    measures = next((n for n, line in enumerate(lines) if _MEASURES.match(line)), len(lines))
    defined = [n for n in range(first, measures) if _DEFINES.match(lines[n])]
    if not defined:
        return first
    end = defined[-1] + 1
    while end < measures and re.match(r"\s|$|[)\]}]|(?:el(?:se|if)|except|finally|with|try)\b.*:$", lines[end]):
        end += 1
    return end


def dumped_source(text: str) -> str | None:
    """The script that the baseline and its heirs print in their logs, mostly closed by a line of `=`."""
    return next((part for is_source, part in sections(text) if is_source), None)


# ---- Runs


class _Reader:
    """Collects runs line by line. A second script, or steps that begin anew after an end, start the next run."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs, self.pairs, self.source = path, [], {}, None
        self._begin()

    def _begin(self) -> None:
        self.run = Run(self.path, info={})
        self.diagnostics, self.labelled_total, self.last_step = set(), False, 0

    def dump(self, source: str) -> None:
        if self.run.steps or self.run.vals or self.run.stages:
            self.close()
        self.source = source

    def line(self, line: str) -> None:
        line = _COLOUR.sub("", line).strip()
        if len(line) > MAX_LINE:
            return  # no measurement
        while match := _BEFORE_KEY.match(line):
            line = line[match.end() :]
        if not self._measure(line):
            pairs = [(k, v) for k, v in _PAIR.findall(line) if k not in _MEASURED]
            found = {k: v.rstrip(",") for k, v in pairs if not _TYPE.fullmatch(v)}
            if match := _VAL_TOKENS.search(line):
                found["val_tokens"] = str(_whole(match[1]))
            self.pairs.update(found)

    def _measure(self, line: str) -> bool:
        """Takes one line's measurement into the run; False if the line carries none."""
        if match := _STEP.match(line):
            self._step(match)
        elif match := _STOPPED.match(line):
            self.run.train_end = {
                "steps": int(match[3]),
                "train_s": _seconds(match[1], match[2]),
                "reason": "wallclock",
            }
        elif match := _CLAIM.match(line):
            z_mean, z_max = (float(g) if g else None for g in match.groups()[1:])
            self.run.claims.append({"claimed_bpb": float(match[1]), "z_mean": z_mean, "z_max": z_max})
        elif line.startswith("score val_bpb:"):
            self.run.score, self.run.ended = _score_line(self.run, dict(_PAIR.findall(line))), "ok"
        elif bpb := _BPB.search(line):
            self._stage(line, _LOSS.search(line), bpb)
        elif match := _WHOLE_EVAL.match(line):
            took = _seconds(match[1], match[2])  # of validations on the way, too: the longest counts
            self.run.info["total_eval_s"] = max(took, self.run.info.get("total_eval_s", 0.0))
        elif len(line) < MAX_PROSE and (match := _CALIBRATED.match(line)):
            self.run.info["calibration_s"] = max(self.run.info.get("calibration_s", 0.0), _seconds(*match.groups()))
        elif line.startswith("ngram_tilt:hints"):
            self.run.info["gates"] = {name: int(n) for name, n in _GATES.findall(line) if int(n)}
        else:
            return self._size(line) or self._adaptation(line)
        return True

    def _step(self, match: re.Match) -> None:
        step, total, key, value, bpb, rest = match.groups()
        if int(step) < self.last_step and (self.run.stages or int(step) <= 1):
            self.close()
        self.last_step = max(self.last_step, int(step))
        clock = _TRAIN_TIME.search(rest)
        event = {"step": int(step), "total": int(total), key: float(value), "train_s": None}
        if clock:
            event |= {"train_s": _seconds(*clock.groups()), "rounding_s": _rounding(*clock.groups())}
        if key == "val_loss":
            event["val_bpb"] = float(bpb) if bpb else None
        (self.run.steps if key == "train_loss" else self.run.vals).append(event)
        self._adopt()

    def _stage(self, line: str, loss: re.Match | None, bpb: re.Match) -> None:
        """`final_sliding_window_eval_exact stride:64 val_loss:.. val_bpb:..`: words with a value name no stage.

        Without a loss (`Quantized BPB: 1.1234`, `ttt_val_bpb: 1.06`) only a figure that repeats none and is the run's own.
        """
        head = line[: min(loss.start() if loss else bpb.start(), bpb.start())].strip(" :,|-").split()
        words = [w.strip(":,") for w in head if not re.fullmatch(r"[\w.-]+[:=][\w.,/-]+", w)] or [
            w.partition(":")[0] for w in head[:1]
        ]
        key = re.sub(r"_?val_?$", "", bpb[1].rstrip("_"), flags=re.I)
        name = re.sub(r"^final_|_exact$|_?val$", "", "_".join([*words, *([key] if key else [])])) or "final"
        if (
            len(name) > 60
            or not re.match(r"\w", name)
            or (loss is None and self._is_no_stage(line[: bpb.end(1)], bpb[2]))
        ):
            return  # prose
        clock = _STAGE_TIME.search(line)
        seconds = _seconds(*clock.groups()) if clock else self.run.stages.get(name, {}).get("seconds")
        self._adopt()
        entry = {
            "stage": name,
            "val_loss": float(loss[1]) if loss else None,
            "val_bpb": float(bpb[2]),
            "seconds": seconds,
        }
        self.run.stages.pop(name, None)
        self.run.stages[name] = entry
        if _DIAGNOSTIC.search(name):
            self.diagnostics.add(name)

    def _is_no_stage(self, before: str, bpb: str) -> bool:
        digit = 10.0 ** -len(bpb.partition(".")[2])
        known = self.run.stages.values()
        repeats = len(known) > MAX_STAGES or any(abs(e["val_bpb"] - float(bpb)) <= digit for e in known)
        return repeats or bool(_OTHERS.search(before))

    def _size(self, line: str) -> bool:
        """Bytes of model, code and both; a total with a compressor's name counts before the bare one of raw weights."""
        pack = self.run.pack or {}
        if match := _CODE.search(line):
            raw = re.search(r"(?i)uncompressed|\braw\b|source", match[1])
            pack["code_uncompressed" if raw else "code_bytes"] = _bytes(*match.groups()[1:])
            pack.setdefault("code_bytes", _bytes(*match.groups()[1:]))
        if match := _TOTAL.search(line):
            labelled = bool(match[1].strip(" _"))
            if labelled or not self.labelled_total:
                pack["total_bytes"], self.labelled_total = _bytes(*match.groups()[1:]), labelled
        if match := _MODEL.search(line):
            pack["artifact_bytes"] = _bytes(*match.groups()[1:])
        changed = pack != (self.run.pack or {})
        self.run.pack = pack or None
        return changed

    def _adaptation(self, line: str) -> bool:
        if len(line) > MAX_PROSE or _UNTIMED.search(line):
            return False
        if match := _ADAPTED.search(line):
            took = _seconds(match[2], match[3])
        elif (match := _ADAPTED_BARE.search(line)) and math.isfinite(float(match[3])):
            took = _seconds(match[3], "ms" if match[2].lower() == "ms" else "s")
        else:
            return False
        times = self.run.info.setdefault("adapt_s", {})
        name = "adaptation" if re.search("(?i)adapt|test|fine", match[0]) else match[1]
        times[name] = max(times.get(name, 0.0), took)
        return True

    def _adopt(self) -> None:
        """The key:value lines read so far describe the run that measures now."""
        if self.pairs or self.source:
            if not (self.run.config or self.run.info.get("described")):
                _describe(self.run, self.pairs)
                self.run.info["described"], self.run.source = True, self.source
            elif tokens := _whole(self.pairs.get("val_tokens")):  # of the evaluation's own lines
                self.run.info["data"].setdefault("val_tokens", tokens)
            self.pairs, self.source = {}, None

    def close(self) -> None:
        """Ends the run; its last stage that is no diagnostic is the score. Lines read since describe the next run."""
        run, pairs, source = self.run, self.pairs, self.source
        if not (run.steps or run.vals or run.stages):
            return
        if not run.info.pop("described", None):
            _describe(run, {})
        final = [name for name in run.stages if name not in self.diagnostics]
        if final and not run.score:
            run.score = {**run.stages[final[-1]], "train_s": run.train_s, "complete": True}
            run.ended = "ok"
        if run.score and "eval_s" not in run.score:
            run.score["eval_s"] = _eval_seconds(run)
        if run.pack and run.score:
            run.score.setdefault("total_bytes", run.pack.get("total_bytes"))
        self.runs.append(run)
        self._begin()
        self.pairs, self.source = pairs, source


def _eval_seconds(run: Run) -> float | None:
    """The log's own total, or the score's stage and what adapted apart from it; else the longest stage."""
    seconds = [e["seconds"] for e in run.stages.values() if e.get("seconds") is not None]
    if whole := run.info.pop("total_eval_s", None):
        return max([whole, *seconds])
    stage = run.score.get("seconds") or max(seconds, default=None)
    apart, perhaps = 0.0, 0.0
    for name, took in run.info.get("adapt_s", {}).items():
        adapts = bool(re.search("ttt|adapt|lora|sgd", str(run.score["stage"])))
        if stage is None or took > 1.01 * stage or (name == "adaptation" and not adapts):
            apart = max(apart, took)
        elif not adapts or (name == "adaptation" and took < 0.97 * stage):
            perhaps = max(perhaps, took)  # the stage's time may hold it
    if perhaps:
        run.info["eval_s_if_apart"] = (stage or 0.0) + apart + perhaps
    return (stage or 0.0) + apart if stage is not None or apart else None


def _describe(run: Run, pairs: dict[str, str]) -> None:
    """Key:value lines before the first step: the config as this tool knows it, and the few facts it asks for."""
    run.config = {k.upper(): literal(v) for k, v in pairs.items() if k not in _FACTS}
    seed = int(pairs["seed"]) if pairs.get("seed", "").isdigit() else seed_in_name(run.path)
    run.info |= {"seed": seed, "run_id": pairs.get("run_id", run.path.stem)}
    counts = {"world_size": pairs.get("world_size"), "params": pairs.get("model_params")}
    run.info |= {name: n for name, text in counts.items() if (n := _whole(text)) is not None}
    shards, tokens = pairs.get("train_shards", "").partition("/")[0], pairs.get("val_tokens", pairs.get("tokens"))
    data = {"path": pairs.get("dataset"), "train_shards": _whole(shards), "val_tokens": _whole(tokens)}
    run.info["data"] = {k: v for k, v in data.items() if v is not None}
    if "tokenizer_path" in pairs:
        run.info["tokenizer"] = {"path": pairs["tokenizer_path"]}


def _score_line(run: Run, pairs: dict[str, str]) -> dict:
    """The last line of our own text logs, as the score event of the JSON log."""
    whole = {k: int(pairs[k]) for k in ("artifact_bytes", "code_bytes", "total_bytes", "limit") if k in pairs}
    seconds = {f"{k}_s": float(pairs[f"{k}_time"].rstrip("s")) for k in ("train", "eval") if f"{k}_time" in pairs}
    stage = run.stages.get(pairs.get("stage", ""), {})
    run.pack = {**(run.pack or {}), **whole}
    figures = {"val_bpb": stage.get("val_bpb", float(pairs["val_bpb"])), "val_loss": stage.get("val_loss")}
    return {"stage": pairs.get("stage", "?"), **figures, **whole, **seconds, "complete": True}


def literal(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def seed_in_name(path: Path) -> int | None:
    """The seed that a log's name speaks of, or a folder of its own such as seed_1337."""
    match = re.search(r"(?:seed|(?:^|_)s)[_-]?(\d+)(?!\d*[a-z])", path.stem, re.I)
    match = match or re.fullmatch(r"(?:seed|s)[_-]?(\d+)", path.parent.name, re.I)
    return int(match[1]) if match else None


def decoded(path: Path) -> str:
    """A text log: UTF-8, or UTF-16 with a byte-order mark as some shells redirect it."""
    data = path.read_bytes()
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text_runs(path: Path) -> list[Run]:
    """Every run of a text log that keeps the baseline's keys; a `UserError` if no line of it is one of those."""
    text = decoded(path)
    reader = _Reader(path)
    for is_source, part in sections(text):
        if is_source:
            reader.dump(part)
        else:
            for line in part.split("\n"):
                reader.line(line)
    reader.close()
    if not reader.runs:
        raise UserError(
            f"{path}: no line of a training log in it (step:N/M train_loss:.. or ... val_loss:.. val_bpb:..)"
        )
    device = _DEVICE.search(text)
    for number, run in enumerate(reader.runs, 1):
        if device:
            run.info["device_name"] = re.sub(r"\s+(?:On|Off)?\s*$", "", device[0])
        if len(reader.runs) > 1:
            run.info["run_id"] = f"{path.stem}#{number}"
    return reader.runs
