"""Pictures of runs: loss curves with schedule and switches, waterfall of stages, bytes by role, bpb against bytes."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import runs as logs
from runs import Run, UserError

MAX_CURVES = 10  # more lines than colours cannot be told apart
ROLE_ORDER = ["mlp", "attn", "embed", "table", "proj", "adapter", "control"]


def draw(runs: list[Run], out: Path, force: bool = False) -> list[Path]:
    """Writes every picture that `runs` have the events for and returns the paths; replaces none unless `force`."""
    pictures = {"curves": curves, "stages": waterfall, "bytes": bytes_by_role, "bpb_bytes": bpb_against_bytes}
    plt = _pyplot()
    jobs = []
    for name, picture in pictures.items():
        figure = picture(plt, runs)
        if figure is not None:
            jobs.append((figure, out / f"{name}.png"))
    taken = [str(path) for _, path in jobs if path.exists()]
    if taken and not force:
        raise UserError(f"{', '.join(taken)} exist(s): choose another --out, or pass --force to replace")
    if not jobs:
        raise UserError("nothing to draw: no step, stage, pack or score event in these logs")
    out.mkdir(parents=True, exist_ok=True)
    for figure, path in jobs:
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
    return [path for _, path in jobs]


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.axisbelow": True, "figure.facecolor": "white"})
    return plt


def configurations(runs: list[Run]) -> tuple[dict[str, list[Run]], int]:
    """(label -> runs, best score first, at most MAX_CURVES; how many configurations that leaves out)."""
    groups = logs.group_by_settings(runs)
    best = sorted(groups, key=lambda name: min(r.bpb() or math.inf for r in groups[name]))
    named: dict[str, list[Run]] = {}
    for name in best[:MAX_CURVES]:
        label = _label(name, groups[name])  # cut short, two may read the same
        named[label if label not in named else f"{label} [{len(named) + 1}]"] = groups[name]
    return named, len(best) - len(named)


def _label(name: str, members: list[Run]) -> str:
    """What sets a configuration apart, in at most three short lines, and how many runs it has."""
    words = name if name != "all runs" else members[0].run_id if len(members) == 1 else "one configuration"
    words = f"{len(members)} runs: {words}" if len(members) > 1 else words
    return "\n".join(textwrap.wrap(words, 40, max_lines=3, placeholder=" ..."))


# ---- curves


def curves(plt, runs: list[Run]):
    """Loss against step and against training time; the schedule in grey, switches as dotted lines."""
    drawn = [r for r in runs if r.steps or r.vals]
    if not drawn:
        return None
    groups, left_out = configurations(drawn)
    drawn = [r for members in groups.values() for r in members]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    for axis, clock, unit in ((axes[0], "step", "step"), (axes[1], "train_s", "training time (s)")):
        for index, (name, members) in enumerate(groups.items()):
            for run in members:
                _curve(axis, run, clock, f"C{index}", name if run is members[0] else None)
        _schedule(axis, drawn[0], clock)
        _switches(axis, drawn[0], clock)
        axis.set_xlabel(unit)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("loss (nats/token)")
    axes[0].set_ylim(*_loss_window(drawn))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=min(4, len(groups)), frameon=False)
    note = f", best {MAX_CURVES} of {MAX_CURVES + left_out} configurations" if left_out else ""
    figure.suptitle(f"Training loss (line) and validation loss (dots){note}", fontsize=11)
    return figure


def _curve(axis, run: Run, clock: str, colour: str, name: str | None) -> None:
    train = [(e[clock], e["train_loss"]) for e in run.steps if e.get(clock) is not None]
    if train:
        x, y = np.array(train, dtype=float).T
        axis.plot(x, y, color=colour, lw=0.6, alpha=0.35)
        axis.plot(x, _smooth(y), color=colour, lw=1.6, label=name)
    val = [(e[clock], e["val_loss"]) for e in run.vals if e.get(clock) is not None]
    if val:
        axis.plot(*zip(*val, strict=True), "o", color=colour, ms=4, mec="white", mew=0.6, label=None if train else name)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Exponential mean over about a fiftieth of the points, debiased so that it starts at the first value."""
    keep, level, weight, out = 1 - 1 / max(1.0, len(y) / 50), 0.0, 0.0, []
    for value in y:
        level, weight = keep * level + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(level / weight)
    return np.array(out)


def _loss_window(runs: list[Run]) -> tuple[float, float]:
    """From just under the lowest loss to the level a tenth into the run: the fall from ln V would flatten the rest."""
    every = [e["train_loss"] for r in runs for e in r.steps] + [e["val_loss"] for r in runs for e in r.vals]
    late = [e["train_loss"] for r in runs for e in r.steps if e["step"] >= 0.1 * (r.last_step or 0)] or every
    low, high = min(every), max(late)
    pad = 0.05 * (high - low) or 0.1
    return low - pad, high + pad


def _schedule(axis, run: Run, clock: str) -> None:
    points = [
        (e[clock], e["lr_scale"]) for e in run.steps if e.get("lr_scale") is not None and e.get(clock) is not None
    ]
    if not points:
        return
    twin = axis.twinx()
    x, y = zip(*points, strict=True)
    twin.fill_between(x, y, color="grey", alpha=0.10, lw=0)
    twin.plot(x, y, color="grey", lw=0.8)
    twin.set_ylim(0, 3.0)  # the schedule keeps to the lower third, under the curves
    twin.set_yticks([0, 1])
    twin.grid(False)
    twin.set_ylabel("learning-rate scale", color="grey", loc="bottom", fontsize=8)


def _switches(axis, run: Run, clock: str) -> None:
    times = {e["step"]: e.get("train_s") for e in run.steps}
    for index, switch in enumerate(run.switches):
        x = switch["step"]
        if clock == "train_s":
            known = [(s, t) for s, t in times.items() if t is not None]
            if not known:
                return
            x = np.interp(x, *zip(*sorted(known), strict=True))
        axis.axvline(x, color="black", ls=":", lw=1)
        text = f"{switch['name']} = {logs.show(switch['value'])}"
        axis.annotate(text, (x, 0.98 - 0.22 * (index % 3)), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                      ha="right", va="top")  # fmt: skip


# ---- waterfall


def waterfall(plt, runs: list[Run]):
    """Each stage's bpb as a step from the one before, for the best run of each of the four best configurations."""
    groups, _ = configurations([r for r in runs if r.stages])
    staged = [(name, min(members, key=lambda r: r.bpb() or math.inf)) for name, members in groups.items()][:4]
    if not staged:
        return None
    figure, axes = plt.subplots(1, len(staged), figsize=(1.6 + 3.9 * len(staged), 4.4), sharey=True, squeeze=False)
    span = []
    for axis, (name, run) in zip(axes[0], staged, strict=True):
        span += _falls(axis, run)
        axis.set_title(name, fontsize=9)
    pad = 0.18 * (max(span) - min(span)) or 0.05
    axes[0][0].set_ylim(min(span) - pad, max(span) + pad)
    axes[0][0].set_ylabel("bits per byte (axis does not start at 0)")
    return figure


def _falls(axis, run: Run) -> list[float]:
    steps = [(s.replace("_", "\n"), e["val_bpb"]) for s, e in run.stages.items()]
    if run.vals and run.vals[-1].get("val_bpb") and run.vals[-1]["step"] == run.last_step:
        steps.insert(0, ("trained", run.vals[-1]["val_bpb"]))
    axis.set_xlim(-0.6, len(steps) - 0.4)
    for index, (name, bpb) in enumerate(steps):
        before = steps[index - 1][1] if index else bpb
        colour = "C7" if index == 0 else "C2" if bpb <= before else "C3"
        if index:
            axis.bar(index, bpb - before, bottom=before, color=colour, width=0.6)
            axis.plot([index - 1.3, index + 0.3], [before, before], color="black", lw=0.7)
        axis.plot([index - 0.3, index + 0.3], [bpb, bpb], color="black", lw=2)
        text = f"{bpb:.4f}" + (f"\n({bpb - before:+.4f})" if index else "")
        below = bpb <= before
        at, lift, side = (min, -4, "top") if below else (max, 4, "bottom")
        place = {"textcoords": "offset points", "xytext": (0, lift), "ha": "center", "va": side}
        axis.annotate(text, (index, at(bpb, before)), fontsize=8, **place)
        if name.split("\n")[0] == run.stage:
            axis.axvspan(index - 0.45, index + 0.45, color="gold", alpha=0.18, lw=0)
    axis.set_xticks(range(len(steps)), [f"{n}\n(score)" if n == run.stage else n for n, _ in steps], fontsize=8)
    return [bpb for _, bpb in steps]


# ---- bytes


def bytes_by_role(plt, runs: list[Run]):
    """One bar a configuration: bytes of each role of tensors, of the container and of the code, with bits per weight."""
    groups, _ = configurations([r for r in runs if r.pack and r.pack.get("roles")])
    packed = [(name, members[0]) for name, members in groups.items()]
    if not packed:
        return None
    roles = [r for r in ROLE_ORDER if any(r in run.pack["roles"] for _, run in packed)]
    roles += sorted({role for _, run in packed for role in run.pack["roles"]} - set(roles))
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.75 * len(packed)))
    widest = max(sum(_parts(run, roles).values()) for _, run in packed)
    for row, (_, run) in enumerate(packed):
        _byte_bar(axis, row, run, roles, widest)
    axis.set_yticks(range(len(packed)), [name for name, _ in packed], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("bytes (1 kB = 1000)")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} MB" if x >= 1e6 else f"{x / 1e3:g} kB")
    axis.set_xlim(0, 1.28 * widest)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(roles) + 1)]
    axis.legend(handles, [*roles, "code"], ncols=5, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0))
    axis.grid(axis="y", visible=False)
    return figure


def _parts(run: Run, roles: list[str]) -> dict[str, int]:
    parts = {role: run.pack["roles"].get(role, {}).get("bytes", 0) for role in roles}
    return parts | {"code": run.pack["code_bytes"]}


def _byte_bar(axis, row: int, run: Run, roles: list[str], widest: int) -> None:
    left, parts = 0, _parts(run, roles)
    for index, (role, size) in enumerate(parts.items()):
        axis.barh(row, size, left=left, color=f"C{index}", height=0.6)
        bits = run.pack["roles"].get(role, {}).get("bits_per_weight")
        if size > 0.08 * widest:
            text = f"{size / 1e3:,.0f} kB" + (f"\n{bits:.2f} bit/w" if bits else "")
            axis.text(left + size / 2, row, text, ha="center", va="center", fontsize=8, color="white")
        left += size
    limit = run.pack.get("limit")
    text = f" {run.pack['total_bytes']:,}" + (
        f"\n {100 * run.pack['total_bytes'] / limit:.1f} % of {limit:,}" if limit else ""
    )
    axis.text(left, row, text, va="center", fontsize=8)


# ---- bpb against bytes


def bpb_against_bytes(plt, runs: list[Run]):
    """Every finished run as a point, one colour a configuration: what the bytes bought."""
    points = [r for r in runs if r.bpb() is not None and r.total_bytes]
    if len(points) < 2:
        return None
    figure, axis = plt.subplots(figsize=(8, 5))
    for index, (name, members) in enumerate(configurations(points)[0].items()):
        x, y = zip(*[(r.total_bytes, r.bpb()) for r in members], strict=True)
        axis.plot(x, y, "o", color=f"C{index}", ms=7, mec="white", label=name)
    axis.set_xlabel("total bytes (artifact + code)")
    axis.set_ylabel("score (bits per byte)")
    axis.xaxis.set_major_locator(plt.MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    for limit in {r.pack["limit"] for r in points if r.pack and r.pack.get("limit")}:
        if max(r.total_bytes for r in points) > 0.9 * limit:
            axis.axvline(limit, color="black", ls="--", lw=1, label=f"limit {limit:,}")
    axis.legend(fontsize=8)
    return figure
