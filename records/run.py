"""One run as its log tells it: events, figures and status. What textlog.py and runs.py both need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(ValueError):
    """A mistake of the person at the keyboard: one message, exit status 2."""


@dataclass
class Run:
    """What one log says. Events are kept as the log wrote them; a missing one is None or empty."""

    path: Path
    info: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    steps: list[dict] = field(default_factory=list)
    vals: list[dict] = field(default_factory=list)
    switches: list[dict] = field(default_factory=list)
    stages: dict[str, dict] = field(default_factory=dict)
    claims: list[dict] = field(default_factory=list)
    train_end: dict | None = None
    quant: dict | None = None
    pack: dict | None = None
    audit: dict | None = None  # of this log, or of the MODE=audit log that speaks for it (see adopt_audits)
    audited_by: Path | None = None
    score: dict | None = None
    error: str | None = None
    ended: str | None = None
    damage: str | None = None  # why the log could not be read to its end
    source: str | None = None  # the script that a text log prints

    @property
    def run_id(self) -> str:
        return self.info.get("run_id") or self.path.stem

    @property
    def seed(self) -> int | None:
        return self.info.get("seed", self.config.get("SEED"))

    @property
    def mode(self) -> str:
        return self.info.get("mode", "train")

    @property
    def stage(self) -> str | None:
        return self.score["stage"] if self.score else None

    def bpb(self, stage: str | None = None) -> float | None:
        entry = self.stages.get(stage) if stage else self.score
        return entry["val_bpb"] if entry else None

    def loss(self, stage: str | None = None) -> float | None:
        entry = self.stages.get(stage) if stage else self.score
        return entry["val_loss"] if entry else None

    @property
    def last_step(self) -> int | None:
        if self.train_end:
            return self.train_end["steps"]
        return max((e["step"] for e in self.steps + self.vals), default=None)

    @property
    def train_s(self) -> float | None:
        """The largest clock that the log shows: the stop line's, or a step's after it, less its rounding."""
        clocks = [e["train_s"] - e.get("rounding_s", 0.0) for e in self.steps + self.vals if e.get("train_s")]
        return max([*clocks, *([self.train_end["train_s"]] if self.train_end else [])], default=None)

    @property
    def slowest_step_s(self) -> float | None:
        """The slowest mean time of a step between two lines of the log's last quarter."""
        events = sorted((e for e in self.steps + self.vals if e.get("train_s")), key=lambda e: e["step"])
        late = 3 * (self.last_step or 0)
        pairs = [(a, b) for a, b in pairwise(events) if 4 * b["step"] >= late and b["step"] > a["step"]]
        spans = [
            (b["train_s"] - a["train_s"]) / (b["step"] - a["step"])
            for a, b in pairs
            if "rounding_s" not in b or b["rounding_s"] < 0.1
        ]
        return max(spans, default=self.ms_per_step and self.ms_per_step / 1000)

    @property
    def ms_per_step(self) -> float | None:
        return 1000 * self.train_s / self.last_step if self.train_s and self.last_step else None

    @property
    def eval_s(self) -> float | None:
        return self.score.get("eval_s") if self.score else None

    @property
    def total_bytes(self) -> int | None:
        return next((e["total_bytes"] for e in (self.score, self.pack) if e and e.get("total_bytes")), None)

    @property
    def artifact(self) -> str | None:
        """Where the artifact was written, or for MODE=audit and eval the one that was read."""
        place = (self.pack or {}).get("artifact") or self.config.get("ARTIFACT")
        return place if isinstance(place, str) and place else None

    @property
    def claimed(self) -> dict | None:
        return self.claims[-1] if self.claims else None

    @property
    def diverged_at(self) -> int | None:
        """The step from which no loss is finite any more, or the last one if it is the score that is not; else None."""
        losses = sorted(
            (e["step"], "val_loss" in e, e.get("val_loss", e.get("train_loss"))) for e in self.steps + self.vals
        )
        final = self.score or next(reversed(self.stages.values()), None)
        last = final["val_bpb"] if final else losses[-1][2] if losses else 0.0
        if math.isfinite(last):
            return None
        finite = [n for n, (_, _, loss) in enumerate(losses) if math.isfinite(loss)]
        first = finite[-1] + 1 if finite else 0
        return losses[first][0] if first < len(losses) else self.last_step or 0

    def status(self) -> str:
        """`ok`, or the first thing that keeps this run out of a submission."""
        if self.damage and not self.ended:
            return self.damage
        if (step := self.diverged_at) is not None:
            return f"diverged at step {step}" + (f": {self.error}" if self.error else "")
        if self.audit and not self.audit["passed"]:
            return "audit failed: " + ", ".join(name for name, passed in audit_checks(self) if not passed)
        if self.ended == "limit broken" or (self.score and not self.score.get("limits_ok", True)):
            return f"limit broken: {self.error or broken_limits(self)}"
        if self.error or self.ended not in (None, "ok"):
            return f"failed: {self.error or self.ended}"
        if self.ended is None:
            where = f"at step {self.last_step}" if self.last_step is not None else "before the first step"
            return f"{'still going' if is_going(self.path) else 'unfinished'}, {where}"
        if self.score and not self.score.get("complete", True):
            return "not the whole validation text: no score"
        return "ok"

    @property
    def finished(self) -> bool:
        """It ran to its end and scored the whole validation text; a broken limit does not spoil the comparison."""
        whole = self.score is not None and self.score.get("complete", True) and math.isfinite(self.score["val_bpb"])
        return self.ended in ("ok", "limit broken") and whole


def audit_checks(run: Run) -> list[tuple[str, bool]]:
    """(name, passed) of each check of the run's audit."""
    checks = run.audit["checks"] if run.audit else []
    return [(str(c.get("name")), c.get("passed") is True) for c in checks if isinstance(c, dict)]


def broken_limits(run: Run) -> str:
    """The figures behind `limits_ok: false`, for logs whose error line does not name the limit."""
    score = run.score or {}
    if score.get("limit") and score.get("total_bytes", 0) > score["limit"]:
        return f"{score['total_bytes']:,} bytes of {score['limit']:,}"
    return f"train {score.get('train_s', 0):.1f} s, eval {score.get('eval_s', 0):.1f} s"


# ---- Locks


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock file `path`; None where it cannot be known (no locks on this system)."""
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except (AttributeError, OSError):
        return None
    return False


def locks_of(log: Path) -> Iterator[Path]:
    """The lock files of the run that writes `log`: the trainer's own, and that of a sweep."""
    yield log.with_name(f".{log.stem}.txt.lock")
    yield log.with_suffix(".lock")


def is_going(log: Path) -> bool:
    """Whether a process still writes this log: it holds a lock, however old or new the log looks."""
    return any(map(is_locked, locks_of(log)))
