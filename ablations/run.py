"""Runs a study: many seeds of the public command, the statistics behind a verdict, a picture. The pages beside this file call it.

    python ablations/heads.py --seeds 0-9 --jobs 2      the same command again skips what is finished and resumes what is not
    python ablations/heads.py --dry-run                 the runs and what they cost; --smoke: one short run an arm
    python ablations/heads.py --script my_fork.py       the same study on a fork of ppo_mbrl.py
    python ablations/heads.py --check                   do new runs agree with the committed rows in ablations/results/?

A page declares a Study and hands it to `run_study`. Its runs lie in runs/ENV/NAME/seed_S, where NAME is what differs from the defaults, so studies
share identical runs. Rows, report and picture are in runs/studies/STUDY/. Read on: study, one run, batch, rows, verdict, picture, command line.
"""

import concurrent.futures
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Optional

import cloudpickle  # what joblib and Dask send work with
import numpy as np
import typer
from joblib.externals.loky import get_reusable_executor
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import stats  # noqa: E402

from world_model import ModelSettings, Replay, UsageError, WorldModel, load_replay, pyplot, run_command  # noqa: E402

RESULTS = ROOT / "ablations" / "results"

# --------------------------------------------------------------------------------------------------------------------- study


@dataclass
class More:
    """Runs of arm `of` have more of `what` than those of arm `than`: Mann-Whitney, or Fisher's exact test for what is yes or no.

    With `spread` they differ more from each other: Brown and Forsythe's test of the distances to the arm's own median.
    """

    of: str
    than: str
    what: str = "final_return_mean"
    spread: bool = False


@dataclass
class Often:
    """What is yes or no holds in more than `share` of the runs of an arm: an exact binomial test."""

    arm: str
    what: str
    share: float = 0.5


@dataclass
class Study:
    """What a page declares before anything is run."""

    name: str
    question: str
    claim: str
    arms: dict[
        str, dict | Callable[[int], dict]
    ]  # settings of each arm, or what makes them of the seed; the others are compared with the first
    tests: list[More | Often]  # reproduced: all of them hold, each with p < 0.05 after Holm's correction for their number
    shared: dict = field(default_factory=dict)  # settings of all arms
    seeds: str = "0-9"
    minutes: float | dict[str, float] = 1.9  # CPU time of one run, as expected; by arm where they differ
    metric: str = "final_return_mean"  # what the tables and the picture show
    costs: tuple[str, ...] = ("fall",)  # numbers of which less is better
    measure: Callable[[Path], dict] | None = None  # further columns, from the folder of a finished run
    also: Callable | None = None  # what a page adds to the report, from rows, folder and console
    script: str = "ppo_mbrl.py"  # what is run, below the kit's folder
    smoke: dict | None = None  # settings of a smoke run, where SMOKE's do not fit the script
    skip: Callable[[str, int], bool] = lambda arm, seed: False  # runs of the table that are left out


class Job(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int
    folder: Path  # below the current directory
    command: list[str]  # all but --run-dir
    total_steps: int
    minutes: float

    @property
    def run(self) -> str:
        """What identifies the run but for its seed: two jobs of the same `run` and seed are one run."""
        return self.folder.parent.as_posix()


# What most studies share: runs so short, without resets and held actions, that what an ingredient does to one agent in one model is seen, and what has
# become a default only since their rows were made.
THEN = dict(mirror=False, num_steps=250, action_repeat=1, minibatch=2048, reset_updates=3000, renew_growth=0.5, caution=1.0, wm_hidden=64)
SHORT = dict(mode="simple", total_steps=6_000, reset_from=0, gather_hold=0, wm_ending="mean") | THEN

# A smoke run is over within a minute on one core.
SMOKE = dict(
    ppo=dict(total_steps=20_000, eval_every=20_000),
    simple=dict(total_steps=1250, eval_every=1250, rounds=1, wm_updates=20, wm_first_updates=100),
    mpc=dict(total_steps=50, eval_every=50, warmup_steps=40, num_steps=10, wm_updates=20, wm_first_updates=100, plan_horizon=3),
)


def parse_seeds(text: str) -> list[int]:
    """'0-9' or '1,4,7' -> seeds. Raises UsageError."""
    try:
        parts = [[int(x) for x in part.split("-")] for part in text.split(",")]
    except ValueError:
        parts = [[]]
    if not all(1 <= len(part) <= 2 and part[0] <= part[-1] < part[0] + 10_000 for part in parts):
        raise UsageError(f"--seeds {text!r} is neither a range such as 0-9 nor a list such as 1,4,7.")
    return list(dict.fromkeys(seed for part in parts for seed in range(part[0], part[-1] + 1)))


def load_settings(script: Path):
    """The Settings of ppo_mbrl.py or of a fork of it."""
    try:
        spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)  # a fork may be called json.py
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        fields(module.Settings)
        return module.Settings
    except (Exception, SystemExit) as error:  # whatever a script may raise while it is imported
        raise UsageError(f"--script {script} is not a fork of ppo_mbrl.py: {type(error).__name__}: {error}.")


def as_flags(settings: dict) -> list[str]:
    """Settings as they are typed."""
    named = [(name.replace("_", "-"), value) for name, value in settings.items()]
    return [word for name, x in named for word in ([f"--{name}" if x else f"--no-{name}"] if type(x) is bool else [f"--{name}", str(x)])]


def expand(study: Study, seeds: list[int], script: Path = ROOT / "ppo_mbrl.py", smoke: bool = False) -> list[Job]:
    """All runs of a study, seed by seed, so that a batch that is broken off has as many of each arm."""
    Settings, jobs = load_settings(script), []
    above = (["smoke"] if smoke else []) + ([script.stem] if script != ROOT / "ppo_mbrl.py" else [])
    for seed in seeds:
        for arm, chosen in ((arm, chosen) for arm, chosen in study.arms.items() if not study.skip(arm, seed)):
            given = study.shared | (chosen(seed) if callable(chosen) else chosen)
            if unknown := given.keys() - {f.name for f in fields(Settings)}:
                raise UsageError(f"Arm {arm!r} has an unknown setting {unknown.pop()!r}.")
            if smoke:
                given |= study.smoke or SMOKE[Settings.resolve(given).mode]
            s = Settings.resolve(given | dict(seed=seed))
            usual = Settings.resolve(dict(mode=s.mode))
            name = f"{s.folder().parent.name}_total_steps={s.total_steps}"  # runs of other lengths are other runs
            name += f"_eval_every={s.eval_every}" if s.eval_every != usual.eval_every else ""
            folder = Path("runs", *above, s.folder().parts[1], name, f"seed_{seed}")
            command = [sys.executable, str(script), *as_flags(given), "--seed", str(seed)]
            minutes = study.minutes[arm] if isinstance(study.minutes, dict) else study.minutes
            jobs.append(Job(arm, seed, folder, command, s.total_steps, 0.5 if smoke else minutes))
    return jobs


# ------------------------------------------------------------------------------------------------------------------- one run


def status(folder: Path) -> str:
    """'finished' or 'diverged' if there is nothing left to do in a run's folder, else ''."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / "summary.json").read_text())["status"]
        return found if found in ("finished", "diverged") else ""
    return ""


def execute(command: list[str], folder: Path, stop: Path, wait: bool = True) -> tuple[str, str]:
    """One run of the public command, in a process of its own with one thread -> how it ended, and its last words if it crashed.

    A run that crashed is tried once more. The log beside the run's folder is also its lock, and the run holds it too: whoever else wants the same
    run waits for it (or, without `wait`, hears 'busy') even if this process is killed, and then finds it finished.
    """
    with contextlib.suppress(ValueError):  # only a main thread may; Ctrl-C reaches the runs of workers by way of `stop`, so that they save
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "ab") as log:
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.exists() or not wait:
                    return "interrupted" if stop.exists() else "busy", ""
                time.sleep(0.5)
        environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for _ in range(2):
            if done := status(folder):
                return done, ""
            if stop.exists():
                return "interrupted", ""
            log.write(f"version {kit_version(Path(command[1]))}\n".encode())
            log.flush()
            run = subprocess.Popen([*command, "--run-dir", str(folder)], stdout=log, stderr=log, env=environment, start_new_session=True)
            while run.poll() is None:
                if stop.exists():
                    run.terminate()  # it saves
                    run.wait()
                time.sleep(0.2)
            if run.returncode == 2:  # bad input stays bad
                break
    if stop.exists():
        return status(folder) or "interrupted", ""
    words = Path(log.name).read_text(errors="replace").strip().splitlines()
    return status(folder) or "crashed", f"exit {run.returncode}: {words[-1] if words else ''}"


# --------------------------------------------------------------------------------------------------------------------- batch


PATIENCE = 20  # so often in a row workers may die, and no job end, before those that are left are given up
GRACE = 30  # seconds from a stop to leaving without those workers that do not answer


def batch(jobs: list[Job], workers: int, backend: str, scheduler: str, stop: Path, ended: Callable[[Job, str, str], None]) -> bool:
    """All jobs on worker processes; ended(job, how, words) is called for each. A worker that is killed takes no job with it.

    Returns whether every job was answered for; after a stop some may not be, and will look for `stop` yet.
    """
    task = lambda *given: execute(*given)  # noqa: E731  (goes by value: a scheduler elsewhere can't import this file)
    left, wait, deaths = jobs, False, 0
    while left:
        again, leave = [], float("inf")
        with pool(backend, scheduler, min(workers, len(left))) as (executor, death):
            paths = [(job.folder.absolute(), stop.absolute()) for job in left]
            doing = {executor.submit(task, job.command, *path, wait): job for job, path in zip(left, paths)}
            pending, died = set(doing), False
            while pending and time.time() < leave:
                done, pending = concurrent.futures.wait(pending, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED)
                if stop.exists():
                    leave = min(leave, time.time() + GRACE)  # for what no worker will answer
                for future in done:
                    how, words = answer(future, death)
                    died |= how == "died"
                    if how in ("busy", "died"):
                        again.append(doing[future])
                    else:
                        ended(doing[future], how, words)
            for future in pending:
                ended(doing[future], "interrupted", "no worker answers")
            if pending:
                return False
        deaths = deaths + 1 if died and len(again) == len(left) else 0
        if deaths > PATIENCE:
            for job in again:
                ended(job, "given up:", "workers are killed again and again; is there too little memory for so many --jobs?")
            again = []
        left, wait = again, wait or not died  # what another launcher is at work on comes last
    return True


def answer(future: concurrent.futures.Future, death: type[Exception]) -> tuple[str, str]:
    """What `execute` returned, or 'died' if its worker did."""
    try:
        return future.result()
    except (death, concurrent.futures.CancelledError):
        return "died", ""
    except Exception as error:  # of the job alone, such as a log that can't be written
        return "crashed", f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def pool(backend: str, scheduler: str, workers: int):
    """An executor of joblib's worker processes, or of a Dask cluster, at an address or of this machine; and what it raises where a worker died."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers, also of other machines, need neither this file nor torch
    if backend == "loky":
        yield get_reusable_executor(workers), concurrent.futures.BrokenExecutor
        return
    try:
        import distributed
    except ImportError:
        raise UsageError("--backend dask needs one more package: pip install distributed==2026.8.0")
    handler = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # as its workers inherit it: Ctrl-C is for this process, which asks runs to leave
    try:
        client = distributed.Client(scheduler, timeout=20) if scheduler else distributed.Client(n_workers=workers, threads_per_worker=1)
    except (OSError, ValueError) as error:
        raise UsageError(f"No Dask scheduler answers at {scheduler}: {error}.")
    finally:
        signal.signal(signal.SIGINT, handler)
    with client:
        yield client.get_executor(pure=False), distributed.KilledWorker


class Board:
    """What the user sees: a live table on a terminal, a line for each run that ends elsewhere."""

    def __init__(self, jobs: list[Job], done: int, workers: int):
        self.jobs, self.ended, self.began, self.before, self.workers = jobs, done, time.time(), self.progress(jobs), workers
        self.total = done + len(jobs)

    def progress(self, jobs: list[Job]) -> float:
        """Expected CPU minutes that the runs in these jobs have behind them."""
        return sum(job.minutes * min(1, newest(job.folder).get("real_steps", 0) / job.total_steps) for job in jobs)

    def left(self) -> str:
        done, whole = self.progress(self.jobs), sum(job.minutes for job in self.jobs)
        if done - self.before < 0.01 * whole:
            return f"about {(whole - done) / self.workers:,.0f} min left, as declared"
        return f"about {(time.time() - self.began) / 60 * (whole - done) / (done - self.before):,.0f} min left"

    def __rich__(self):
        table = Table("arm", "seed", "real steps", "newest score", "model error", box=box.SIMPLE)
        for job in self.jobs:
            with contextlib.suppress(OSError):
                if (job.folder / "metrics.jsonl").stat().st_mtime > self.began and not status(job.folder):
                    row = newest(job.folder)
                    score, error = (
                        f"{row[name]:.3g}" if row.get(name) is not None else "-" for name in ("eval/return_mean", "wm/error_1step")
                    )
                    table.add_row(job.arm, str(job.seed), f"{row.get('real_steps', 0):,} of {job.total_steps:,}", score, error)
        return Group(table, f"{self.ended} of {self.total} runs ended, {self.left()}")


def newest(folder: Path) -> dict:
    """The newest numbers in a run's metrics."""
    row = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # the last row may be half written
        for line in (folder / "metrics.jsonl").read_text().splitlines()[-40:]:
            row |= json.loads(line)
    return row


# ---------------------------------------------------------------------------------------------------------------------- rows


COPIED = "env_id real_steps imagined_steps steps_to_solve final_return_mean final_return_std peak_return_mean outcome hovering cpu_s wall_s"


def describe(study: Study, job: Job) -> dict:
    """The row of a run that is over: what its summary says, what its evaluations say of the way there, and what ran where."""
    log = Path(f"{job.folder}.log")
    versions = re.findall(r"^version (\w+)$", log.read_text(errors="replace") if log.exists() else "", re.M)
    summary = json.loads((job.folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["real_steps"], row["eval/return_mean"]) for row in rows if row.get("eval/return_mean") is not None]
    row = dict(arm=job.arm, seed=job.seed, status=summary["status"]) | {name: summary[name] for name in COPIED.split()}
    row |= {name: summary["outcome"] == name for name in ("solved", "stuck", "collapsed")}
    row |= dict(mean_return=None, fall=None)
    if summary["status"] == "finished":
        row |= dict(mean_return=np.mean([score for _, score in curve[1:]]), fall=fall([score for _, score in curve]))
        row |= study.measure(job.folder) if study.measure else {}
    with contextlib.suppress(OSError, ValueError):
        where = json.loads((job.folder / "env.json").read_text())
        row |= dict(machine=f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {where['device']}")
    row |= dict(
        run=job.run, kit="+".join(dict.fromkeys(versions)) or None, curve=" ".join(f"{steps}:{score:.1f}" for steps, score in curve)
    )
    return {name: round(float(x), 4) if isinstance(x, (float, np.floating)) else x for name, x in row.items()}


def load_model(run_dir: Path) -> tuple[WorldModel, Replay]:
    """The model of a finished run, and the real steps it was fitted to."""
    config = json.loads((run_dir / "config.json").read_text())
    settings = ModelSettings(**{name: config[name] for name in ModelSettings.__dataclass_fields__})
    replay = load_replay(run_dir, settings.wm_holdout, settings.wm_newest)
    tensors = load_file(sorted(run_dir.glob("checkpoint/*.safetensors"))[-1])
    model = WorldModel(replay.steps.obs.shape[-1], int(replay.steps.actions.max()) + 1, settings)
    model.load_state_dict({name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")})
    return model, replay


def descent(scores) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations, smoothed over three, and how far each lies below the maximum so far, once that is 100 above the first evaluation; (K) each."""
    smooth = np.convolve(scores, np.ones(3) / 3, "valid") if len(scores) >= 3 else np.array(scores)
    highest = np.maximum.accumulate(smooth)
    return smooth, (highest - smooth) * (highest >= scores[0] + 100)


def fall(scores) -> float:
    """How far evaluations fell at most."""
    return float(descent(scores)[1].max())


def kit_version(script: Path) -> str:
    """Ten digits that change with the two scripts, and with what a script imports from them."""
    text = script.read_bytes() + (ROOT / "world_model.py").read_bytes()
    if re.search(rb"^(from|import) ppo_mbrl\b", text, re.M):
        text += (ROOT / "ppo_mbrl.py").read_bytes()
    return hashlib.sha256(text).hexdigest()[:10]


def read_rows(path: Path, *needed: str) -> list[dict]:
    """The rows of a CSV, with numbers, True and False as such; [] if there is none. Raises UsageError where it holds something else, or lacks a column."""

    def value(text: str):
        if text in ("True", "False", ""):
            return {"True": True, "False": False, "": None}[text]
        try:
            return int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            return text

    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            texts = ("arm", "kit")  # also where they look like numbers
            rows = [{name: x if name in texts else value(x) for name, x in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise UsageError(f"{path} can't be read as rows of runs: {error}.")
    if rows and (lost := set(needed) - rows[0].keys()):
        raise UsageError(f"{path} has no column {sorted(lost)[0]!r}.")
    if odd := [row["seed"] for row in rows if "seed" in needed and type(row["seed"]) is not int]:
        raise UsageError(f"{path} has a row with {odd[0]!r} for a seed.")
    return rows


RUN = "arm", "seed", "run"  # the columns that say which run a row is of


def record(path: Path, rows: list[dict]):
    """Puts rows into a CSV of one row a run, new ones in place of old ones. Several launchers may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = {(row["arm"], row["seed"], row["run"]): row for row in read_rows(path, *RUN) + rows}
        names = list(dict.fromkeys(name for row in known.values() for name in row))
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(sorted(known.values(), key=lambda row: (str(row["arm"]), row["seed"])))
        os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------------- verdict


def values(study: Study, rows: list[dict], arm: str, what: str) -> np.ndarray:
    """`what` of each run of an arm. Runs that have none, because they diverged or never got there, count as the worst of all arms."""
    found = [row.get(what) for row in rows if row["arm"] == arm]
    known = [row[what] for row in rows if row.get(what) is not None]
    worst = False if yes_or_no(rows, what) else (max if what in study.costs else min)(known, default=np.nan)
    return np.array([worst if x is None else x for x in found], float)


def yes_or_no(rows: list[dict], what: str) -> bool:
    return {type(row.get(what)) for row in rows} in ({bool}, {bool, type(None)})


def judge(study: Study, rows: list[dict]) -> tuple[str, list[dict]]:
    """The verdict, and one row for each declared test: reproduced if all hold, not reproduced if the opposite of one does, both beyond chance."""
    found = []
    for test in study.tests:
        if isinstance(test, Often):
            x = values(study, rows, test.arm, test.what)
            text, size = f"{test.what} in more than {test.share:.0%} of {test.arm}", int(np.isfinite(x).sum())
            if size >= 3:
                share, low, high = stats.rate(int(x.sum()), size)
                p, right = stats.share_test(int(x.sum()), size, test.share), share > test.share
                number = f"{share:.0%} ({low:.0%} to {high:.0%})"
        else:
            x, y = values(study, rows, test.of, test.what), values(study, rows, test.than, test.what)
            text = f"{'more spread of' if test.spread else 'more'} {test.what} in {test.of} than in {test.than}"
            size = min(int(np.isfinite(z).sum()) for z in (x, y))  # none is, where no run of any arm has a number
            if size >= 3 and yes_or_no(rows, test.what):
                p, right = stats.fisher(int(x.sum()), len(x), int(y.sum()), len(y)), x.mean() > y.mean()
                number = f"{x.mean():.0%} and {y.mean():.0%}"
            elif size >= 3 and test.spread:
                far, near, p = stats.spread(x, y)
                right, number = far > near, f"mean distance to the median {far:.3g} and {near:.3g}"
            elif size >= 3:
                better, low, high, p = stats.improvement(x, y)
                right, number = better > 0.5, f"probability {spoken((better, low, high), '.2f')}"
        found.append(
            dict(test=text, found=number, p=p, right=right)
            if size >= 3
            else dict(test=text, found="fewer than three runs have it", p=1.0, right=False)
        )
    for row, p in zip(found, stats.holm([row["p"] for row in found])):
        row |= dict(p=p, verdict="inconclusive" if not p < 0.05 else "reproduced" if row["right"] else "not reproduced")
    verdicts = {row["verdict"] for row in found}
    whole = "not reproduced" if "not reproduced" in verdicts else "reproduced" if verdicts == {"reproduced"} else "inconclusive"
    return whole, found


def provisional(study: Study, rows: list[dict]) -> str:
    """What goes with a verdict whose rows are not those that were declared; '' if they are."""
    declared = {(arm, seed) for arm in study.arms for seed in parse_seeds(study.seeds) if not study.skip(arm, seed)}
    there = {(row["arm"], row["seed"]) for row in rows}
    absent, added = len(declared - there), sorted({seed for _, seed in there - declared})
    words = [f"{absent} of {len(declared)} declared runs are missing"] * (absent > 0)
    words += [f"there are runs beyond the declared seeds {study.seeds}, of {', '.join(map(str, added))}"] * (len(added) > 0)
    return f", provisional, for {'; '.join(words)}" if words else ""


def spoken(triple: tuple[float, float, float], form: str = ".0f") -> str:
    value, low, high = triple
    return f"{value:{form}}" + (f" ({low:{form}} to {high:{form}})" if np.isfinite(low) else "")


def spoken_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def report(study: Study, rows: list[dict], missing: list[str]) -> list:
    """What a study found, as sentences and tables that rich can print."""
    verdict, tests = judge(study, rows)
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in rows)]
    scores = {arm: values(study, rows, arm, study.metric) for arm in arms}
    form = ".0f" if max((np.abs(x).max() for x in scores.values()), default=0) >= 20 else ".2f"

    averages = Table("arm", "runs", *stats.AVERAGES, "lowest, highest", "CPU min", title=f"{study.metric}, with 95 % intervals")
    rates = Table("arm", "solved", "stuck", "hovering", "collapsed", "diverged", title="Shares of runs, with 95 % intervals")
    for arm, x in scores.items():
        mine = [row for row in rows if row["arm"] == arm]
        minutes = np.mean([row["cpu_s"] for row in mine]) / 60
        middle = [spoken(stats.average(name, x), form) for name in stats.AVERAGES]
        averages.add_row(arm, str(len(x)), *middle, f"{x.min():{form}}, {x.max():{form}}", f"{minutes:.1f}")
        hits = [sum(bool(row[name]) for row in mine) for name in ("solved", "stuck", "hovering", "collapsed")]
        hits.append(sum(row["status"] == "diverged" for row in mine))
        rates.add_row(arm, *(f"{n}: {spoken(stats.rate(n, len(mine)), '.0%')}" for n in hits))

    first, *others = arms or [""]
    differences = Table(
        "arm", "probability of improvement", "p", "solved, p", title=f"Against {first}, p corrected by Holm for the number of arms"
    )
    others = [arm for arm in others if min(len(scores[arm]), len(scores[first])) >= 3]
    sign = -1 if study.metric in study.costs else 1  # an improvement is less of what costs
    better = [stats.improvement(sign * scores[arm], sign * scores[first]) for arm in others]
    solved = {arm: values(study, rows, arm, "solved") for arm in arms}
    exact = [stats.fisher(int(solved[arm].sum()), len(solved[arm]), int(solved[first].sum()), len(solved[first])) for arm in others]
    for arm, b, p, q in zip(others, better, stats.holm([b[3] for b in better]), stats.holm(exact)):
        differences.add_row(arm, spoken(b[:3], ".2f"), spoken_p(p), spoken_p(q))

    declared = Table("declared test", "found", "p", "verdict", title="The claim, p corrected by Holm for the number of tests")
    for row in tests:
        declared.add_row(row["test"], row["found"], spoken_p(row["p"]), row["verdict"])
    tables = [averages, rates, *([differences] if others else []), declared]
    for table in tables:
        table.box, table.title_justify = box.MARKDOWN, "left"
    missing = [f"\nMissing: {line}" for line in missing]
    machines = sorted({row.get("machine") or "a machine that the row does not name" for row in rows})
    return [
        f"## {study.name}\n\nQuestion: {study.question}\nClaim: {study.claim}\n",
        *tables,
        *missing,
        f"\nMade on: {'; '.join(machines)}",
        f"\n{study.name}: {verdict}{provisional(study, rows)}",
    ]


def check(study: Study, rows: list[dict], reference: list[dict]) -> list:
    """Do new rows and reference rows of each arm come from the same distribution? A list of things to print."""
    table = Table(
        "arm", "runs", "of them equal", study.metric, "p", "solved, p", "", title="New runs against the reference", box=box.MARKDOWN
    )
    lines = []
    for arm in study.arms:
        both = [[row for row in some if row["arm"] == arm] for some in (rows, reference)]
        (x, new), (y, old) = ((values(study, some, arm, study.metric), values(study, some, arm, "solved")) for some in both)
        if min(len(x), len(y)) >= 3 and np.isfinite([*x, *y]).all():
            same = set.intersection(*({(row["run"], row["seed"], row[study.metric]) for row in some} for some in both))
            p, q = stats.improvement(x, y)[3], stats.fisher(int(new.sum()), len(new), int(old.sum()), len(old))
            lines.append((arm, f"{len(x)}, {len(y)}", str(len(same)), f"{x.mean():.4g}, {y.mean():.4g}", p, q))
    corrected = iter(stats.holm([p for line in lines for p in line[4:]]))
    for *cells, _, _ in lines:
        p, q = next(corrected), next(corrected)
        table.add_row(*cells, spoken_p(p), spoken_p(q), "differs beyond chance" if min(p, q) < 0.05 else "no difference found")
    nothing = f"Nothing to compare: an arm needs {study.metric} of three new runs and of three in ablations/results/."
    return [table] if lines else [nothing]


# ------------------------------------------------------------------------------------------------------------------- picture


def draw(study: Study, rows: list[dict], verdict: str, path: Path):
    """Curves over real steps, scores of each seed, rates of outcomes, performance profiles.

    Of more than ten arms only those that the tests name have colours, curves and profiles.
    """
    plt = pyplot()
    figure, ((curves, seeds), (rates, profiles)) = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in rows)]
    named = {arm for test in study.tests for arm in vars(test).values()}
    shown = [arm for arm in arms if len(arms) <= 10 or arm in named]
    colours = {arm: "0.6" for arm in arms} | {arm: plt.get_cmap("tab10")(i % 10) for i, arm in enumerate(shown)}
    every = np.concatenate([values(study, rows, arm, study.metric) for arm in arms])
    taus = np.linspace(every.min(), every.max(), 200)
    lengths = [max(row["real_steps"] for row in rows if row["arm"] == arm) for arm in arms]
    scale = "log" if max(lengths) > 5 * min(lengths) else "linear"
    for i, arm in enumerate(arms):
        mine, colour, x = [row for row in rows if row["arm"] == arm], colours[arm], values(study, rows, arm, study.metric)
        paths = [np.array([point.split(":") for point in row["curve"].split()], float) for row in mine if row["curve"] and arm in shown]
        paths = [path_of_seed[path_of_seed[:, 0] > (0 if scale == "log" else -1)] for path_of_seed in paths]
        for path_of_seed in paths:
            curves.plot(*path_of_seed.T, color=colour, linewidth=0.4, alpha=0.5)
        if paths:  # all on the steps of the longest; a run that ended early keeps its last value
            steps = max(paths, key=lambda p: p[-1, 0])[:, 0]
            same = np.array([np.interp(steps, *path_of_seed.T) for path_of_seed in paths])
            curves.plot(steps, stats.iqm(same, axis=0), color=colour, linewidth=2, label=arm)
            curves.fill_between(steps, *stats.bands(same), color=colour, alpha=0.15, linewidth=0)
        seeds.scatter(np.full(len(x), i) + np.linspace(-0.15, 0.15, len(x)), x, s=12, color=colour)
        for name, marker, shift in (("mean", "o", 0.25), ("iqm", "s", 0.35)):
            value, low, high = stats.average(name, x)
            seeds.plot([i + shift] * 2, [low, high], color=colour)
            seeds.plot(i + shift, value, marker, color=colour, markeredgecolor="black", label=name if i == 0 else None)
        for j, name in enumerate(("solved", "stuck", "hovering", "collapsed")):
            share, low, high = stats.rate(sum(bool(row[name]) for row in mine), len(mine))
            at = j + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
            rates.bar(at, share, 0.7 / len(arms), color=colour)
            rates.plot([at, at], [low, high], color="black", linewidth=0.8)
        if arm in shown:
            share, low, high = stats.profile(x, taus)
            profiles.plot(taus, share, color=colour, label=arm)
            profiles.fill_between(taus, low, high, color=colour, alpha=0.15, linewidth=0)
    low, high = np.percentile(np.concatenate([line.get_ydata() for line in curves.lines] or [[0, 1]]), [2, 100])
    curves.set(title="Return, greedy: IQM, 95 % interval, each seed", xlabel="real steps", ylim=(low - 20, high + 20), xscale=scale)
    seeds.set(title=f"{study.metric}: each seed, mean and IQM", xticks=range(len(arms)))
    seeds.set_xticklabels(arms, rotation=25 if len(arms) <= 10 else 90, ha="right" if len(arms) <= 10 else "center")
    rates.set(
        title="Shares of runs, 95 % intervals", xticks=range(4), xticklabels=("solved", "stuck", "hovering", "collapsed"), ylim=(0, 1)
    )
    profiles.set(title="Performance profiles, 95 % intervals", xlabel=study.metric, ylabel="share of runs above")
    curves.legend(fontsize=8)
    seeds.legend(fontsize=8)
    figure.suptitle(f"{study.name}: {verdict}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------------- command line


def run_study(study: Study):
    """The command line of a study's page."""

    def command(
        seeds: Annotated[str, typer.Option(help="Seeds, such as 0-9 or 1,4,7.")] = study.seeds,
        jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each. A cluster at an address decides for itself.")] = 2,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the runs and what they cost.")] = False,
        smoke: Annotated[bool, typer.Option("--smoke", help="One run an arm, of a minute at most, to see that it works.")] = False,
        backend: Annotated[Literal["loky", "dask"], typer.Option(help="Worker processes of joblib, or a Dask cluster.")] = "loky",
        scheduler: Annotated[str, typer.Option(help="Address of the Dask scheduler; without it, a cluster of this machine.")] = "",
        index: Annotated[Optional[int], typer.Option(min=0, envvar=["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"], help="Only the run of this number in --dry-run's table.")] = None,
        script: Annotated[Path, typer.Option(help="A fork of ppo_mbrl.py to run instead.")] = ROOT / study.script,
        reuse: Annotated[bool, typer.Option("--reuse", help="Runs whose rows are in ablations/results/ count as finished.")] = False,
        compare: Annotated[bool, typer.Option("--check", help="Afterwards compare the runs with the rows in ablations/results/.")] = False,
    ):  # fmt: skip
        if scheduler and backend != "dask":
            raise UsageError("--scheduler goes with --backend dask.")
        chosen = parse_seeds(seeds)
        table = expand(study, chosen[:1] if smoke else chosen, script.resolve(), smoke)
        if index is not None and index >= len(table):
            raise UsageError(f"--index {index} (or the job array's) is too high: there are {len(table)} runs, counted from 0.")
        if index is not None and compare:
            raise UsageError("--check compares whole batches: leave it to the page without an index.")
        if smoke and compare:
            raise UsageError("--check has nothing to compare smoke runs with.")
        raise typer.Exit(carry_out(study, table, index, jobs, dry_run, smoke, backend, scheduler, script.resolve(), reuse, compare))

    command.__doc__ = f"{study.question}\n\nClaim: {study.claim}"
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_command(app)


def carry_out(study, table, index, workers, dry_run, smoke, backend, scheduler, script, reuse, compare) -> int:
    """Runs what is left of a study's table, writes each row at once, and reports. Returns the exit status."""
    console, folder, kit = Console(), Path("runs", "studies", study.name + "_smoke" * smoke), kit_version(script)
    if script != ROOT / study.script:
        folder = folder.with_name(f"{folder.name}_{script.stem}")
    say = lambda sentence: console.print(sentence, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    path, jobs = folder / "rows.csv", table if index is None else [table[index]]
    committed = {}
    if reuse:  # rows of other studies have the same runs under other names, but not what this one measures
        others, own = [] if study.measure else sorted(RESULTS.glob("*.csv")), RESULTS / f"{study.name}.csv"
        files = *others, own, path  # the last win
        committed = {(row["run"], row["seed"]): row for file in files for row in read_rows(file) if "run" in row}
    foreign = [job for job in jobs if (job.run, job.seed) in committed and not status(job.folder)]
    old = {(job.arm, job.seed): committed[job.run, job.seed] | dict(arm=job.arm) for job in foreign}
    todo = [job for job in jobs if (job.arm, job.seed) not in old]
    if dry_run:
        show_plan(study, table, jobs, old, console)
        return 0
    if old:
        record(path, list(old.values()))
        say(f"{len(old)} rows from ablations/results/")

    reference = read_rows(RESULTS / f"{study.name}.csv", *RUN, "solved", study.metric) if compare else []

    stop, caught, missing = folder / f"stop-{os.urandom(4).hex()}", [], []  # no process number: each container may count from 1
    folder.mkdir(parents=True, exist_ok=True)
    fresh = set()  # what this call has seen finished

    def on_signal(number, frame):  # workers see the file and ask their runs to save and leave
        caught.append(number)
        stop.touch()
        signal.signal(number, signal.SIG_DFL)  # a second time: leave at once

    def ended(job: Job, how: str, words: str):
        board.ended += 1
        if how in ("finished", "diverged"):
            try:
                row = describe(study, job)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, UsageError) as error:
                # a folder that was damaged, or copied in part, costs its own row and no other
                how, words = "finished, but can't be read:", f"{type(error).__name__}, {error}".splitlines()[0]
            else:
                record(path, [row])
                fresh.add((job.arm, job.seed))
                score = "-" if row["final_return_mean"] is None else f"{row['final_return_mean']:.0f}"
                sentence = f"{board.ended} of {board.total}: {job.arm}, seed {job.seed}: {score}, {row['outcome']}"
                return live.console.print(sentence, highlight=False)
        missing.append(f"{job.arm}, seed {job.seed}: {how} {words}".strip())
        live.console.print(missing[-1], highlight=False, markup=False, soft_wrap=True)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    board, answered = Board(todo, len(old), workers), True
    try:
        with Live(board if console.is_terminal else "", console=console, refresh_per_second=1, transient=True) as live:
            if index is None:
                answered = batch(todo, workers, backend, scheduler, stop, ended)
            else:
                for job in todo:
                    ended(job, *execute(job.command, job.folder, stop))
    finally:
        if answered:
            stop.unlink(missing_ok=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def as_declared(rows: list[dict]) -> list[dict]:  # none of an arm that was declared otherwise
        now = {(job.arm, job.run, job.seed) for job in expand(study, list(dict.fromkeys(row["seed"] for row in rows)), script, smoke)}
        return [row for row in rows if (row["arm"], row["run"], row["seed"]) in now]

    if index is None:
        rows = as_declared(read_rows(path, *RUN))  # also those of other launchers and seeds
        if older := sum(row["kit"] != kit for row in rows):
            say(f"{older} of {len(rows)} rows are of another version of the scripts. To make them anew, delete their run folders.")
        if rows:
            conclude(study, rows, missing, folder, console)
        if compare:
            mine = [row for row in rows if (row["arm"], row["seed"]) in fresh]
            for thing in check(study, mine, as_declared(reference) if script == ROOT / study.script else reference):
                wide(console).print(thing)
    if caught:
        say("Stopped; the runs are saved. The same command goes on from there.")
        return 128 + caught[0]
    return 1 if missing else 0


def wide(console: Console) -> Console:
    """Tables that go to a file or pipe are never folded."""
    return console if console.is_terminal else Console(width=200)


def conclude(study: Study, rows: list[dict], missing: list[str], folder: Path, console: Console):
    """Prints the report, and writes it with the picture beside the rows."""
    with open(folder / "report.md", "w") as file:
        for target in (wide(console), Console(file=file, width=200)):
            for thing in report(study, rows, missing):
                target.print(thing, highlight=False, markup=False) if isinstance(thing, str) else target.print(thing)
    draw(study, rows, judge(study, rows)[0] + provisional(study, rows), folder / "study.png")
    if study.also:
        study.also(rows, folder, wide(console))
    console.print(f"Rows, report and picture are in {folder}", highlight=False)


def show_plan(study: Study, table: list[Job], jobs: list[Job], old: dict, console: Console):
    """The runs of a study, where they stand, and what is left to pay."""
    shown, cost, seen = Table("index", "arm", "seed", "command", "state", "CPU min", box=box.SIMPLE), 0.0, set()
    index = {(job.arm, job.seed): str(i) for i, job in enumerate(table)}
    for job in jobs:
        if (job.arm, job.seed) in old:
            state = "in results"
        else:
            state = status(job.folder) or ("shared" if job.folder in seen else "begun" if job.folder.exists() else "")
        seen.add(job.folder)
        minutes = 0 if state in ("in results", "finished", "diverged", "shared") else job.minutes
        cost += minutes
        words = " ".join(["python", Path(job.command[1]).name, *job.command[2:]])
        shown.add_row(index[job.arm, job.seed], job.arm, str(job.seed), words, state, f"{minutes:g}")
    console.print(f"{study.question}\nClaim: {study.claim}", highlight=False, markup=False)
    wide(console).print(shown)
    console.print(f"{len(jobs)} runs, about {cost:,.0f} CPU minutes left to run ({cost / 60:.1f} hours)", highlight=False)


if __name__ == "__main__":
    sys.exit("Error: this is what the pages beside it call; run one of them, such as python ablations/heads.py --dry-run.")
