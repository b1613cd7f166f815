"""Pictures of runs: loss curves with schedule and switches, waterfall of stages, bytes by role, bpb against bytes."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import runs as logs
from runs import Run, UserError

MAX_CURVES, MAX_PANELS = 10, 6  # more lines than colours cannot be told apart; more panels cannot be read
COLOURS = {  # of the roles, the same in every picture
    **{"mlp": "tab:blue", "attn": "tab:orange", "embed": "tab:green", "table": "tab:red", "proj": "tab:purple"},
    **{
        "adapter": "tab:brown",
        "ngram": "tab:olive",
        "control": "tab:pink",
        "container": "tab:gray",
        "code": "tab:cyan",
    },
}


class NoMatplotlib(UserError):
    """Pictures were asked for where they cannot be drawn."""


def draw(runs: list[Run], out: Path, force: bool = False) -> list[Path]:
    """Writes every picture that `runs` have the events for and returns the paths; replaces none unless `force`."""
    pictures = {"curves": curves, "stages": waterfall, "bytes": bytes_by_role, "bpb_bytes": bpb_against_bytes}
    plt = _pyplot()
    drawn = [(picture(plt, runs), out / f"{name}.png") for name, picture in pictures.items()]
    jobs = [(figure, path) for figure, path in drawn if figure is not None]
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
        raise NoMatplotlib("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8})
    return plt


def configurations(runs: list[Run], most: int) -> tuple[dict[str, list[Run]], list[Run], str]:
    """(label -> runs, best score first, at most `most`; the runs that leaves out; words for the title that say so)."""
    groups = logs.group_by_settings(runs)
    best = sorted(groups, key=lambda name: min(r.bpb() or math.inf for r in groups[name]))
    named: dict[str, list[Run]] = {}
    for name in best[:most]:
        label = _label(name, groups[name])  # cut short, two may read the same
        named[label if label not in named else f"{label} [{len(named) + 1}]"] = groups[name]
    rest = [r for name in best[most:] for r in groups[name]]
    return named, rest, f", best {most} of {len(best)} configurations" if rest else ""


def _label(name: str, members: list[Run]) -> str:
    """What sets a configuration apart, in at most three short lines, and how many runs it has."""
    words = name if name != "all runs" else members[0].run_id if len(members) == 1 else "one configuration"
    words = f"{len(members)} runs: {words}" if len(members) > 1 else words
    return "\n".join(textwrap.wrap(words, 40, max_lines=3, placeholder=" ..."))


# ---- curves


def curves(plt, runs: list[Run]):
    """Loss against step and against training time; below, the learning-rate scale; switches as dotted lines."""
    groups, _, note = configurations([r for r in runs if r.steps or r.vals], MAX_CURVES)
    if not groups:
        return None
    drawn = [r for members in groups.values() for r in members]
    figure, axes = plt.subplots(2, 2, figsize=(12, 5.4), sharex="col", sharey="row", height_ratios=(5, 1), layout="constrained")  # fmt: skip
    for (axis, below), clock, unit in ((axes[:, 0], "step", "step"), (axes[:, 1], "train_s", "training time (s)")):
        for index, (name, members) in enumerate(groups.items()):
            for run in members:
                _curve(axis, run, clock, f"C{index}", name if run is members[0] else None)
        scale = _points(drawn[0].steps, clock, "lr_scale")
        below.fill_between(*scale, color="grey", alpha=0.2, lw=0)
        below.plot(*scale, color="grey", lw=1)
        _switches(axis, below, drawn[0], clock)
        below.set_xlabel(unit)
        below.set_xlim(left=0)
    axes[0][0].set_ylabel("loss (nats/token)")
    axes[0][0].set_ylim(*_loss_window(drawn))
    axes[1][0].set_ylabel("learning-\nrate scale", fontsize=8)
    axes[1][0].set_ylim(0, 1.15)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(groups)))
    whose = "" if len(drawn) == 1 else f"; schedule and switches of {drawn[0].run_id}"
    figure.suptitle(f"Training loss (line) and validation loss (dots){note}{whose}", fontsize=11)
    return figure


def _points(events: list[dict], clock: str, key: str) -> np.ndarray:
    """(2, n): `clock` and `key` of the events that have both, as numbers: a diverged run's NaN is no point."""
    points = np.array([(e.get(clock), e.get(key)) for e in events], dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)].T


def _curve(axis, run: Run, clock: str, colour: str, name: str | None) -> None:
    x, y = _points(run.steps, clock, "train_loss")
    if len(x):
        axis.plot(x, y, color=colour, lw=0.6, alpha=0.35)
        axis.plot(x, _smooth(y), color=colour, lw=1.6, label=name)
    val = _points(run.vals, clock, "val_loss")
    axis.plot(*val, "o", color=colour, ms=5, mec="white", mew=0.6, label=None if len(x) else name, zorder=3)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Exponential mean over about a fiftieth of the points, debiased so that it starts at the first value."""
    keep, level, weight, out = 1 - 1 / max(1.0, len(y) / 50), 0.0, 0.0, []
    for value in y:
        level, weight = keep * level + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(level / weight)
    return np.array(out)


def _loss_window(runs: list[Run]) -> tuple[float, float]:
    """From just under the lowest loss to the level a tenth into the run: the fall from ln V would flatten the rest."""
    curves = [(r, _points(e, "step", key)) for r in runs for e, key in ((r.steps, "train_loss"), (r.vals, "val_loss"))]
    share, loss = np.hstack([points / [[r.last_step or 1], [1]] for r, points in curves])
    every = loss if len(loss) else np.zeros(1)
    late = loss[share >= 0.1] if (share >= 0.1).any() else every
    low, high = min(every), max(late)
    pad = 0.05 * (high - low) or 0.1
    return low - pad, high + pad


def _switches(axis, below, run: Run, clock: str) -> None:
    """A dotted line a switch; those too close for two labels share one."""
    steps, times = _points(run.steps, "step", clock)
    if not len(steps):
        return
    near, labels = 0.03 * times.max(), []
    for switch in run.switches:
        x, text = float(np.interp(switch["step"], steps, times)), f"{switch['name']} = {logs.show(switch.get('value'))}"
        for part in (axis, below):
            part.axvline(x, color="black", ls=":", lw=1)
        if labels and x - labels[-1][0] < near:
            labels[-1][1] += f", {text}"
        else:
            labels.append([x, text])
    for x, text in labels:
        height, side = (0.98, "top") if x > 0.2 * times.max() else (0.03, "bottom")  # where the curve is not
        axis.annotate(text, (x, height), xycoords=("data", "axes fraction"), xytext=(-2, 0), textcoords="offset points",
                      rotation=90, fontsize=8, ha="right", va=side)  # fmt: skip


# ---- waterfall


def waterfall(plt, runs: list[Run]):
    """Each stage's bpb as a step from the one before: the best run of each configuration, best first."""
    groups, _, note = configurations([r for r in runs if r.stages and r.finished], MAX_PANELS)
    if not groups:
        return None
    wide = min(3, len(groups))
    high = math.ceil(len(groups) / wide)
    figure, axes = plt.subplots(high, wide, figsize=(1.4 + 4.2 * wide, 4.4 * high), sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    span = []
    for axis, (name, members) in zip(axes.flat, groups.items(), strict=False):
        span += _falls(axis, min(members, key=lambda r: r.bpb() or math.inf))
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    pad = 0.2 * (max(span) - min(span)) or 0.05
    axes[0][0].set_ylim(min(span) - pad, max(span) + pad)
    for axis in axes[:, 0]:
        axis.set_ylabel("bits per byte (axis does not start at 0)")
    figure.suptitle(f"What each stage of the evaluation changes{note}", fontsize=11)
    return figure


def _falls(axis, run: Run) -> list[float]:
    steps = [(s, e["val_bpb"]) for s, e in run.stages.items() if math.isfinite(e["val_bpb"])]
    last = run.vals[-1] if run.vals else {}
    if math.isfinite(last.get("val_bpb") or math.nan) and last["step"] == run.last_step:
        steps.insert(0, ("trained", last["val_bpb"]))
    axis.set_xlim(-0.6, len(steps) - 0.4)
    axis.grid(axis="x", visible=False)
    for index, (name, bpb) in enumerate(steps):
        before = steps[index - 1][1] if index else bpb
        if index:
            axis.bar(index, bpb - before, bottom=before, color="tab:green" if bpb <= before else "tab:red", width=0.6)
            axis.plot([index - 1.3, index + 0.3], [before, before], color="black", lw=0.7)
        axis.plot([index - 0.3, index + 0.3], [bpb, bpb], color="black", lw=2)
        text = f"{bpb:.4f}" + (f"\n({bpb - before:+.4f})" if index else "")
        edge, lift, side = (min(bpb, before), -4, "top") if bpb <= before else (max(bpb, before), 4, "bottom")
        axis.annotate(
            text, (index, edge), xytext=(0, lift), textcoords="offset points", ha="center", va=side, fontsize=8
        )
        if name == run.stage:
            axis.axvspan(index - 0.45, index + 0.45, color="gold", alpha=0.18, lw=0, zorder=0)
    names = [(f"{n}\n(score)" if n == run.stage else n).replace("_", "\n") for n, _ in steps]
    axis.set_xticks(range(len(steps)), names, fontsize=8)
    return [bpb for _, bpb in steps]


# ---- bytes


def bytes_by_role(plt, runs: list[Run]):
    """One bar a configuration: bytes of each role of tensors, of n-gram tables, container and code; bits per weight."""
    groups, _, note = configurations([r for r in runs if r.pack and r.pack.get("roles")], MAX_CURVES)
    if not groups:
        return None
    bars = [(name, members[0].pack) for name, members in groups.items()]
    present = {role for _, pack in bars for role in pack["roles"]} | {"code"}
    names = [*[n for n in COLOURS if n in present], *sorted(present - {*COLOURS})]
    figure, axis = plt.subplots(figsize=(11, 1.8 + 0.75 * len(bars)), layout="constrained")
    widest = max(sum(r["bytes"] for r in pack["roles"].values()) + pack["code_bytes"] for _, pack in bars)
    for row, (_, pack) in enumerate(bars):
        _byte_bar(axis, row, pack, names, widest)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("size (MB = 1,000,000 bytes)")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}")
    axis.set_xlim(0, 1.28 * widest)
    axis.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS.get(name, "black")) for name in names]
    figure.legend(handles, names, ncols=len(names), loc="outside lower center", handlelength=1.2, columnspacing=1.4)  # fmt: skip
    axis.set_title(f"Bytes of the artifact by role, and of the code{note}", fontsize=11)
    return figure


def _byte_bar(axis, row: int, pack: dict, names: list[str], widest: int) -> None:
    left = 0
    for name in names:
        role = {"bytes": pack["code_bytes"]} if name == "code" else pack["roles"].get(name, {"bytes": 0})
        axis.barh(row, role["bytes"], left=left, color=COLOURS.get(name, "black"), height=0.6, ec="white", lw=0.5)
        if role["bytes"] > 0.06 * widest:
            wide = role["bytes"] > 0.13 * widest and role.get("bits_per_weight")
            bits = f"\n{role['bits_per_weight']:.2f} bit/weight" if wide else ""
            text = f"{role['bytes'] / 1e3:,.0f} kB{bits}"
            axis.text(left + role["bytes"] / 2, row, text, ha="center", va="center", fontsize=8, color="white")
        left += role["bytes"]
    share = f"\n {100 * pack['total_bytes'] / pack['limit']:.1f} % of {pack['limit']:,}" if pack.get("limit") else ""
    axis.text(left, row, f" {pack['total_bytes']:,} bytes{share}", va="center", fontsize=8)


# ---- bpb against bytes


def bpb_against_bytes(plt, runs: list[Run]):
    """Every finished run as a point, one colour a configuration, grey beyond the best: what the bytes bought."""
    points = [r for r in runs if r.finished and r.total_bytes]
    if len(points) < 2:
        return None
    groups, rest, _ = configurations(points, MAX_CURVES)
    staged = len({r.stage for r in points}) > 1  # scores of different stages share a picture only by name
    figure, axis = plt.subplots(figsize=(8, 5.6), layout="constrained")
    if rest:
        axis.plot(
            [r.total_bytes for r in rest],
            [r.bpb() for r in rest],
            "o",
            color="lightgrey",
            label=f"{len(rest)} more runs",
        )
    for index, (name, members) in enumerate(groups.items()):
        label = f"{name} ({members[0].stage})" if staged else name
        places = [r.total_bytes for r in members], [r.bpb() for r in members]
        axis.plot(*places, "o", color=f"C{index}", ms=7, mec="white", label=label)
    axis.set_xlabel("total bytes (artifact + code)")
    axis.set_ylabel("score (bits per byte)")
    axis.xaxis.set_major_locator(plt.MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    for limit in {r.pack["limit"] for r in points if r.pack and r.pack.get("limit")}:
        if max(r.total_bytes for r in points) > 0.9 * limit:
            axis.axvline(limit, color="black", ls="--", lw=1, label=f"limit {limit:,}")
    columns = min(3, len(groups) + bool(rest))
    figure.legend(*axis.get_legend_handles_labels(), ncols=columns, loc="outside lower center")
    axis.set_title("What the bytes bought: every finished run", fontsize=11)
    return figure
