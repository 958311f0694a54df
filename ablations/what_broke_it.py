"""Study: which of the twelve departures of the article's code made it fail?

Its agent got stuck at a return of about 100 and collapsed without warning. Each departure from the textbook (the table in as_published.py) is mended
alone in the published algorithm, and introduced alone into the textbook's. The two ends and what the claim names have ten seeds, the others were declared
with five; as their intervals left nine questions open, all that are mended alone had five more, settled before any of these was run, so that their p-values
are of a second look. No test ends a run early, so that all are 50 epochs long, 150,000 to 1.3 million real steps by how long their episodes are. `count`
changes no number but the one it names (tested): it has no arms.

Share    what a departure does to the mean final score, in units of the gap between as published and 200: what mending it alone adds, and what introducing
         it alone takes from the textbook's.
Fall     how far the data episodes' mean return, smoothed over three epochs, fell from its maximum, once that was 100 above the first epoch's. A run that
         never rises so far does not fall either: who lets a run rise may let it fall.
Verdict  A departure keeps the score low (the local optimum) if mending it alone raises the final score or introducing it alone lowers it; it holds the
         score up, as a crutch does, if the opposite is so. It makes a run fall (the collapse), or prevents that, if the same is true of the fall.
         Mann-Whitney's p < 0.05 after Holm's correction over both ways of all eleven, for each measure by itself: with five seeds only what is nearly
         always so can pass. It is harmless if none of this is so and both shares are surely, with 95 % (in truth 89 % with five seeds), between -1/4 and
         1/4; at the spread of these runs that takes far more than ten seeds. Else the question is open.
Data     The mean return of the last five epochs' data episodes, which is what the article plots, varies a third as much between seeds as the final score.
         It was added when 111 runs had been seen, so its p-values stand beside the verdict, and decide nothing.

    python ablations/what_broke_it.py --jobs 2              about 7 core-hours; rows and report in runs/studies/what_broke_it
    python ablations/what_broke_it.py --seeds 10-14         five more seeds of every arm, as an open question wants; the report says so
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import stats
from as_published import DEPARTURES
from rich import box
from rich.console import Console
from rich.table import Table
from run import More, Study, fall, provisional, run_study, spoken, values

from world_model import pyplot


def data_returns(run_dir: Path) -> dict:
    """How far the mean return of the data episodes fell, and what it was in the last five epochs."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    returns = [row["data/return_mean"] for row in rows if "data/return_mean" in row]
    return dict(data_fall=fall(returns), data_return=float(np.mean(returns[-5:])))


ENDS = dict(published=dict(departures="all"), textbook=dict(departures=""))
NAMES = [name for name in DEPARTURES if name != "count"]
FIXED = {f"fix {name}": dict(departures=",".join(other for other in DEPARTURES if other != name)) for name in NAMES}
BROKEN = {f"break {name}": dict(departures=name) for name in NAMES}
CLAIMED = [f"fix {name}" for name in ("ratio", "replay", "endings", "scale")]

STUDY = Study(
    name="what_broke_it",
    question="Which of the article's twelve departures from the textbook cause its local optimum and its collapses?",
    claim="With all of them mended the final score is higher and the falls are smaller; mending ratio, replay, endings or scale alone raises the score.",
    arms=ENDS | FIXED | BROKEN,
    shared=dict(test_return=1000.0),
    tests=[More("textbook", "published"), More("published", "textbook", "data_fall"), *(More(arm, "published") for arm in CLAIMED)],
    costs=("fall", "data_fall"),
    minutes=2.0,
    measure=data_returns,
    script="ablations/as_published.py",
    smoke=dict(epochs=2, dream_steps=300, passes=4, wm_passes=2),
    skip=lambda arm, seed: 5 <= seed < 10 and arm in BROKEN,
)


class Measure(NamedTuple):
    worse: int  # is more of it worse, 1, or less, -1
    harm: str  # what a departure does of which the world is better without
    good: str


MEASURES = {
    STUDY.metric: Measure(-1, "keeps the score low", "holds the score up"),
    "data_fall": Measure(1, "makes it fall", "prevents falls"),
    "data_return": Measure(-1, "", ""),  # not declared: see above
}


def shares(rows: list[dict], name: str) -> list[tuple[float, float, float]]:
    """Share of the gap that mending a departure alone closes, and that introducing it alone tears open: value, low, high of each."""
    published, textbook, fixed, broken = (values(STUDY, rows, arm, STUDY.metric) for arm in (*ENDS, f"fix {name}", f"break {name}"))

    def closed(start, end, published, axis=-1):
        return (end.mean(axis) - start.mean(axis)) / (200 - published.mean(axis))

    def mended(published, fixed, axis=-1):
        return closed(published, fixed, published, axis)

    both = ((mended, (published, fixed)), (closed, (broken, textbook, published)))
    return [(float(share(*samples)), *stats.interval(share, *samples)) for share, samples in both]


def verdicts(rows: list[dict]) -> list[dict]:
    """One row a departure: both shares, p of each measure for both ways (mended alone, introduced alone), and what it does."""
    found = [dict(departure=name, shares=shares(rows, name), does=[]) for name in NAMES]
    for what, measure in MEASURES.items():
        # which arm is compared with which end, and where: it does harm as published if without it there is less of what is worse
        ways = [(f"fix {name}", "published", -measure.worse, "as published") for name in NAMES]
        ways += [(f"break {name}", "textbook", measure.worse, "in the textbook's") for name in NAMES]
        tests = [stats.improvement(values(STUDY, rows, arm, what), values(STUDY, rows, end, what), reps=10) for arm, end, *_ in ways]
        for i, (p, (share, *_), (*_, sign, where)) in enumerate(zip(stats.holm([test[3] for test in tests]), tests, ways)):
            row = found[i % len(NAMES)]
            row.setdefault(what, []).append(p)
            if p < 0.05 and measure.harm:
                row["does"].append(f"{measure.harm if (share - 0.5) * sign > 0 else measure.good} {where}")
    for row in found:
        harmless = all(-0.25 <= low and high <= 0.25 for _, low, high in row["shares"])
        row["verdict"] = ", ".join(row["does"]) or ("harmless" if harmless else "open")
    return found


def tell(rows: list[dict], folder: Path, console: Console):
    """The tables of arms and verdicts and the picture that tells it at a glance, once every arm has three runs."""
    if min(len(values(STUDY, rows, arm, STUDY.metric)) for arm in STUDY.arms) < 3:
        return
    arms = Table("arm", "runs", "final score", "data return", "above 200 once", "collapsed", "real steps", box=box.MARKDOWN)
    for arm in STUDY.arms:
        mine = [row for row in rows if row["arm"] == arm]
        middle = (spoken(stats.average("mean", values(STUDY, rows, arm, what))) for what in (STUDY.metric, "data_return"))
        once, collapsed = (sum(bool(row.get(what)) for row in mine) for what in ("steps_to_solve", "collapsed"))
        steps = [row.get("real_steps") or 0 for row in mine]
        arms.add_row(arm, str(len(mine)), *middle, str(once), str(collapsed), f"{min(steps):,} to {max(steps):,}")
    found = verdicts(rows)
    heads = "departure", "share added, mended", "share taken, introduced", *(f"p, {what}" for what in MEASURES), "verdict"
    table = Table(*heads, box=box.MARKDOWN)
    for row in found:
        both = (f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in row["shares"])
        table.add_row(row["departure"], *both, *(", ".join(f"{p:.3f}" for p in row[what]) for what in MEASURES), row["verdict"])
    with open(folder / "verdicts.md", "w") as file:
        for target in (console, Console(file=file, width=240)):
            target.print(arms, table, f"Verdicts of {len(rows)} runs{provisional(STUDY, rows)}")

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 8), layout="constrained")
    for way, (label, marker) in enumerate((("mended alone: adds", "o"), ("introduced alone: takes", "s"))):
        value, low, high = np.array([row["shares"][way] for row in found]).T
        at = np.arange(len(found)) + 0.3 * way - 0.15
        axis.errorbar(value, at, xerr=abs(np.array([low, high]) - value), fmt=marker, capsize=2, label=label)
    axis.axvspan(-0.25, 0.25, color="0.92", zorder=0)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1)
    ticks = -5, -2, -1, -0.5, 0, 0.5, 1, 2
    axis.set(xticks=ticks, xticklabels=ticks, xlabel="share of the gap between as published and 200")
    axis.set(yticks=range(len(found)), yticklabels=["\n".join([row["departure"], *row["verdict"].split(", ")]) for row in found])
    axis.invert_yaxis()
    axis.legend(loc="lower left")
    figure.suptitle(f"{len(rows)} runs{provisional(STUDY, rows)}", fontsize=8)
    figure.savefig(folder / "verdicts.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_study(replace(STUDY, also=tell))
