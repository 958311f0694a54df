"""Study: do reward and ending have to see where a step leads?

Question   The article's model predicts the reward from (obs, action). In many tasks it depends on next_obs as well. Does it matter to the policy?
Claim      With reward and ending predicted from (obs, action, next_obs), the default, the final score is higher.
Arms       sas (default) and sa; everything else at the defaults of --mode simple, 10,000 real steps.
Metric     final_return_mean of each seed; share of seeds solved.
Threshold  reproduced: probability of improvement above one half with Mann-Whitney's p < 0.05. not reproduced: below one half with p < 0.05. Else inconclusive.

    python ablations/heads.py --seeds 0-9 --jobs 2

Runs that are finished are not run again; rows are in runs/heads/heads.csv.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu

ROOT = Path(__file__).resolve().parent.parent
ARMS = {"sas": [], "sa": ["--wm-heads", "sa"]}
FLAGS = ["--mode", "simple", "--total-steps", "10000", "--eval-every", "1000"]
SMOKE = ["--mode", "simple", "--total-steps", "1250", "--eval-every", "1000", "--rounds", "1", "--wm-updates", "20"]


def parse_seeds(text: str) -> list[int]:
    """'0-9' or '1,4,7' -> a list of seeds."""
    try:
        parts = [[int(x) for x in part.split("-")] for part in text.split(",")]
        return [seed for part in parts for seed in range(part[0], part[-1] + 1)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a range such as 0-9 nor a list such as 1,4,7")


def run(arm: str, seed: int, flags: list[str], folder: Path) -> dict:
    """One run of the public command, in a process of its own; its summary."""
    run_dir = folder / arm / f"seed_{seed}"
    command = [sys.executable, str(ROOT / "ppo_mbrl.py"), *flags, *ARMS[arm], "--seed", str(seed), "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return dict(arm=arm, seed=seed, status=f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    return dict(
        arm=arm,
        **{name: summary[name] for name in ("seed", "status", "real_steps", "steps_to_solve", "final_return_mean", "outcome", "cpu_s")},
    )


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0-9 or 1,4,7.")] = "0-9",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    dry_run: Annotated[bool, typer.Option(help="Only show what would be run.")] = False,
    smoke: Annotated[bool, typer.Option(help="Run every arm for a few seconds, to see that it works.")] = False,
):
    """Do reward and ending have to see where a step leads?"""
    console, folder = Console(), ROOT / "runs" / ("heads_smoke" if smoke else "heads")
    todo = [(arm, seed) for seed in parse_seeds(seeds) for arm in ARMS]
    if dry_run:
        for arm, seed in todo:
            console.print(" ".join(["python ppo_mbrl.py", *FLAGS, *ARMS[arm], f"--seed {seed}"]), highlight=False)
        return
    rows = Parallel(n_jobs=jobs, backend="threading", verbose=10)(
        delayed(run)(arm, seed, SMOKE if smoke else FLAGS, folder) for arm, seed in todo
    )
    with open(folder / "heads.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "seed", "status", "real_steps", "steps_to_solve", "final_return_mean", "outcome", "cpu_s"])
        writer.writeheader()
        writer.writerows(rows)

    scores = {
        arm: np.array([row["final_return_mean"] for row in rows if row["arm"] == arm and row["status"] == "finished"]) for arm in ARMS
    }
    table = Table("arm", "runs", "final score", "solved")
    for arm, x in scores.items():
        solved = sum(row["arm"] == arm and row.get("outcome") == "solved" for row in rows)
        table.add_row(arm, str(len(x)), f"{x.mean():.0f} ({x.min():.0f} to {x.max():.0f})" if len(x) else "-", str(solved))
    console.print(table)
    for row in rows:
        if row["status"] != "finished":
            console.print(f"{row['arm']}, seed {row['seed']}: {row['status']}", highlight=False)
    if min(map(len, scores.values())) < 3:
        console.print("inconclusive: fewer than three finished runs an arm")
        return
    test = mannwhitneyu(scores["sas"], scores["sa"])
    better = test.statistic / (len(scores["sas"]) * len(scores["sa"]))
    verdict = "inconclusive" if test.pvalue >= 0.05 else "reproduced" if better > 0.5 else "not reproduced"
    console.print(f"{verdict}: probability of improvement {better:.2f}, p = {test.pvalue:.3f}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
