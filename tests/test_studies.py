"""Studies: what the runner does with runs that finish, crash, are killed, or are wanted twice; and whether its statistics tell the truth."""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import f

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "ablations"))
import run  # noqa: E402
import stats  # noqa: E402
from rich.console import Console  # noqa: E402
from run import More, Often, Study  # noqa: E402

from world_model import UsageError  # noqa: E402

# A run without learning: it works for --gamma seconds, crashes as --lr says, and scores --hidden plus its seed.
FAKE = '''
import json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Settings:
    mode: str = "simple"
    seed: int = 0
    hidden: int = 0
    gamma: float = 0.0
    lr: float = 0.0
    total_steps: int = 100
    eval_every: int = 50
    rounds: int = 1
    wm_updates: int = 1
    wm_first_updates: int = 1

    @classmethod
    def resolve(cls, given):
        return cls(**given)

    def folder(self):
        name = "_".join(["simple"] + [f"{n}={x}" for n, x in asdict(self).items() if n in ("hidden", "gamma", "lr") and x])
        return Path("runs", "Fake-v0", name, f"seed_{self.seed}")

if __name__ == "__main__":
    words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    folder, seed, crash = Path(words["--run-dir"]), int(words["--seed"]), float(words.get("--lr", 0))
    folder.mkdir(parents=True, exist_ok=True)
    def save(*_):
        (folder / "saved").write_text("")
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    with open(folder / "calls", "a") as file:
        file.write(f"{os.getppid()}\\n")
    calls = len((folder / "calls").read_text().splitlines())
    if crash == 2 and seed == 1:
        sys.exit("Error: it is always wrong")
    if crash == 4 and seed == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit(1)
    time.sleep(float(words.get("--gamma", 0)))
    if crash == 1 and calls == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    score = float(words.get("--hidden", 0)) + seed
    rows = [{"real_steps": s, "eval/return_mean": score * s / 100} for s in (0, 50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    summary = dict(env_id="Fake-v0", real_steps=100, imagined_steps=0, steps_to_solve=None, final_return_mean=score, final_return_std=1.0, peak_return_mean=score,
                   outcome="solved" if score >= 200 else "other", hovering=False, cpu_s=1.0, wall_s=1.0, status="diverged" if crash == 3 else "finished")
    if crash == 3:
        summary["final_return_mean"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "env.json").write_text(json.dumps(dict(cpu="a processor", cores=2, torch="2.13.0", device="cpu")))
    sys.exit(3 if crash == 3 else 0)
'''  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path / "fake.py"


def study(arms=None, **more) -> Study:
    arms = arms or dict(low=dict(hidden=100), high=dict(hidden=300))
    return Study("made_up", "Which is higher?", "The high one.", arms, [More("high", "low")], **more)


def batch(s: Study, script: Path, seeds="0-2", index=None, workers=2, **more) -> int:
    options = dict(dry_run=False, smoke=False, backend="loky", scheduler="", reuse=False, compare=False) | more
    return run.carry_out(s, run.expand(s, run.parse_seeds(seeds), script), index, workers, script=script, **options)


def rows(s: Study) -> list[dict]:
    return run.read_rows(Path("runs/studies", f"{s.name}_fake", "rows.csv"))


def calls() -> list[int]:
    """How often each run was begun."""
    return [len(path.read_text().splitlines()) for path in sorted(Path("runs").rglob("calls"))]


# --------------------------------------------------------------------------------------------------------------- the runner


def test_a_batch_runs_each_seed_of_each_arm_once_and_a_second_one_runs_nothing(script, capsys):
    assert batch(study(), script) == 0 and calls() == [1] * 6
    assert [(row["arm"], row["seed"], row["final_return_mean"]) for row in rows(study())] == [
        (arm, seed, score + seed) for arm, score in (("high", 300), ("low", 100)) for seed in range(3)
    ]
    assert all(row["mean_return"] == (0.5 + 1) / 2 * row["final_return_mean"] for row in rows(study()))  # all evaluations but the first
    assert batch(study(), script) == 0 and calls() == [1] * 6
    assert batch(study(), script, seeds="1-4") == 0 and calls() == [1] * 10 and len(rows(study())) == 10
    said = capsys.readouterr().out
    assert "made_up: reproduced" in said
    assert (Path("runs/studies/made_up_fake") / "study.png").stat().st_size > 10_000
    assert "Made on: a processor, 2 cores, torch 2.13.0, cpu\n" in said and {row["machine"] for row in rows(study())} == {
        "a processor, 2 cores, torch 2.13.0, cpu"
    }


def test_rows_name_the_version_of_the_scripts_that_ran_and_not_the_newest(script, capsys):
    batch(study(), script, seeds="0-2")
    made, said = run.kit_version(script), capsys.readouterr().out
    script.write_text(FAKE + "\n")
    batch(study(), script, seeds="0-3")
    assert {(row["seed"], row["kit"]) for row in rows(study())} == {*((seed, made) for seed in range(3)), (3, run.kit_version(script))}
    assert "6 of 8 rows are of another version" in capsys.readouterr().out and "another version" not in said


def test_studies_share_identical_runs_and_keep_runs_of_other_lengths_apart(script):
    other = study(dict(another_name=dict(hidden=100), longer=dict(hidden=100, total_steps=200)))
    batch(study(), script, seeds="0")
    batch(other, script, seeds="0")
    assert calls() == [1] * 3
    one, two = (job.run for job in run.expand(other, [0], script))
    assert one != two and one == run.expand(study(), [0], script)[0].run


def test_a_run_that_crashes_is_tried_once_more_and_then_reported(script, capsys):
    assert batch(study(dict(killed=dict(lr=1))), script, seeds="0") == 0 and calls() == [2]  # killed -9, fine the second time
    assert batch(study(dict(wrong=dict(lr=2))), script, seeds="0-2") == 1
    assert calls() == [2, 1, 2, 1] and {row["seed"] for row in rows(study(dict(wrong=dict(lr=2))))} == {0, 2}
    said = capsys.readouterr().out
    assert "wrong, seed 1: crashed exit 1: Error: it is always wrong" in said and "Missing: wrong, seed 1" in said


def test_a_run_that_diverged_counts_as_the_worst_and_is_not_run_again(script):
    s = study(dict(low=dict(hidden=100), high=dict(lr=3, hidden=300)))
    assert batch(s, script) == 0 and batch(s, script) == 0 and calls() == [1] * 6
    assert run.values(s, rows(s), "high", "final_return_mean").tolist() == [100] * 3
    assert run.values(s, [dict(arm="low", fall=30.0), dict(arm="high", fall=None)], "high", "fall").tolist() == [30]  # more is worse
    assert run.judge(s, rows(s))[0] != "reproduced"


@pytest.mark.parametrize(
    "backend, runs, kills",
    [("loky", 12, 2), pytest.param("loky", 24, 5, marks=pytest.mark.slow), pytest.param("dask", 24, 5, marks=pytest.mark.slow)],
)
def test_12_a_batch_outlives_workers_that_are_killed_and_does_nothing_twice(backend, runs, kills, script):
    s = study(dict(slow=dict(gamma=0.8)))

    def murderer():
        while len(killed) < kills and not over.wait(0.5):
            at_work = [path for path in Path("runs").rglob("calls") if not (path.parent / "summary.json").exists()]
            workers = {int(pid) for path in at_work for pid in path.read_text().split()[-1:]} - {os.getpid(), 1}
            for worker in sorted(workers - set(killed))[-1:]:  # older ones may be dead already, their runs at work still
                with contextlib.suppress(OSError):
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)

    killed, over = [], threading.Event()
    thread = threading.Thread(target=murderer)
    thread.start()
    assert batch(s, script, seeds=f"0-{runs - 1}", backend=backend) == 0
    over.set()
    thread.join()
    assert len(killed) == kills and len(rows(s)) == runs
    begun = calls()
    assert batch(s, script, seeds=f"0-{runs - 1}", backend=backend) == 0 and calls() == begun and sum(begun) <= runs + kills


@pytest.mark.parametrize("backend", ["loky", pytest.param("dask", marks=pytest.mark.slow)])
def test_a_run_that_takes_its_workers_along_is_given_up_and_reported(backend, script, monkeypatch, capsys):
    monkeypatch.setattr(run, "PATIENCE", 3)  # on a busy machine the deadly run may twice be faster than all others
    assert batch(study(dict(low={}, high=dict(lr=4))), script, backend=backend) == 1
    said = capsys.readouterr().out
    missing = [line for line in said.splitlines() if line.startswith("Missing: ")]
    assert any(line.startswith("Missing: high, seed 1: given up: workers are killed again and again") for line in missing)
    assert len(missing) == 1 and len(rows(study())) == 5


@pytest.mark.slow
def test_a_batch_whose_cluster_has_no_workers_can_be_stopped(script, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(run, "GRACE", 1)
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert batch(study(), script, backend="dask", scheduler=cluster.scheduler_address) == 128 + signal.SIGTERM
    assert calls() == []


PAGE = """
import sys
sys.path[:0] = [{ablations!r}]
from run import More, Often, Study, run_study
if __name__ == "__main__":
    run_study(Study("made_up", "Which is higher?", "The high one.", {arms!r}, [More("high", "low")]))
"""


def page(tmp_path: Path, arms=None) -> list[str]:
    path = tmp_path / "made_up.py"
    path.write_text(PAGE.format(ablations=str(ROOT / "ablations"), arms=arms or dict(low=dict(hidden=100), high=dict(hidden=300))))
    return [sys.executable, str(path), "--script", "fake.py"]


def test_two_launchers_at_once_do_nothing_twice(script, tmp_path):
    command = [*page(tmp_path, dict(low=dict(gamma=0.3), high=dict(gamma=0.3, hidden=300))), "--seeds", "0-2"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [launcher.communicate(timeout=120)[0] for launcher in both]
    assert [launcher.returncode for launcher in both] == [0, 0], said
    assert calls() == [1] * 6 and len(rows(study())) == 6 and all("6 of 6" in words for words in said)


@pytest.mark.parametrize("number, jobs", [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)])
def test_stopping_a_batch_lets_its_runs_save_and_reports_what_there_is(number, jobs, script, tmp_path):
    command = [*page(tmp_path, dict(low=dict(hidden=100), high=dict(gamma=9, hidden=300))), "--seeds", "0-9", "--jobs", str(jobs)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(Path("runs/studies").rglob("rows.csv")):
        time.sleep(0.1)
    launcher.send_signal(number)
    said = launcher.communicate(timeout=8)[0]
    assert launcher.returncode == 128 + number and "The same command goes on from there" in said
    finished = len(list(Path("runs").rglob("summary.json")))
    assert len(list(Path("runs").rglob("saved"))) == len(calls()) - finished <= jobs and not list(Path("runs/studies").rglob("stop-*"))
    (report,) = Path("runs/studies").rglob("report.md")
    assert "Missing: high, seed 0: interrupted" in report.read_text() and "made_up: inconclusive" in said


@pytest.mark.parametrize("backend", ["loky", pytest.param("dask", marks=pytest.mark.slow)])
def test_ctrl_c_reaches_all_processes_and_ends_the_batch_at_once(backend, script, tmp_path):
    command = [*page(tmp_path, dict(low=dict(gamma=60), high=dict(gamma=60, hidden=300))), "--seeds", "0-9", "--backend", backend]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while not calls():
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(launcher.pid, signal.SIGINT)
    said = launcher.communicate(timeout=20)[0]
    assert launcher.returncode == 130 and "The same command goes on from there" in said and "no worker answers" not in said, said
    assert len(list(Path("runs").rglob("saved"))) == len(calls())


def test_another_process_in_a_run_is_waited_for(script):
    s = study(dict(low=dict(hidden=100)))
    (job,) = run.expand(s, [0], script)
    job.folder.parent.mkdir(parents=True)
    with open(f"{job.folder}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert run.execute(job.command, job.folder, Path("stop"), wait=False) == ("busy", "")
        threading.Timer(1, log.close).start()
        assert run.execute(job.command, job.folder, Path("stop"))[0] == "finished"


def test_an_array_index_runs_that_run_alone(script, tmp_path):
    command = page(tmp_path)
    for name, i in (("SLURM_ARRAY_TASK_ID", 3), ("JOB_COMPLETION_INDEX", 0)):
        done = subprocess.run([*command, "--seeds", "0-1"], env=os.environ | {name: str(i)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [(row["arm"], row["seed"]) for row in rows(study())] == [("high", 1), ("low", 0)]


def test_a_run_by_index_can_be_stopped_too(script, tmp_path):
    launcher = subprocess.Popen([*page(tmp_path, dict(slow=dict(gamma=9), high={})), "--index", "0"], stdout=subprocess.PIPE, text=True)
    while not calls():
        time.sleep(0.1)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGINT)
    assert "Stopped; the runs are saved" in launcher.communicate(timeout=8)[0] and launcher.returncode == 130
    assert list(Path("runs").rglob("saved")) and not list(Path("runs").rglob("summary.json"))


def test_bad_input_is_one_sentence(script, tmp_path):
    done = subprocess.run([*page(tmp_path), "--seeds", "0-1", "--index", "4"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "Error: --index 4 (or the job array's) is too high: there are 4 runs, counted from 0.\n"
    done = subprocess.run([*page(tmp_path), "--index", "0", "--check"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "Error: --check compares whole batches: leave it to the page without an index.\n"
    done = subprocess.run([sys.executable, run.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: this is what the pages beside it call")
    (tmp_path / "forks").mkdir()
    for text in ("Settings = 1", "raise SystemExit"):
        (tmp_path / "forks" / "json.py").write_text(text)
        with pytest.raises(UsageError, match="is not a fork of ppo_mbrl.py"):
            run.expand(study(), [0], tmp_path / "forks" / "json.py")
    (tmp_path / "wrong.py").write_text("Settings = unknown")
    with pytest.raises(UsageError, match="is not a fork of ppo_mbrl.py: NameError: name 'unknown' is not defined"):
        run.expand(study(), [0], tmp_path / "wrong.py")
    done = subprocess.run([*page(tmp_path), "--scheduler", "tcp://here:1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "Error: --scheduler goes with --backend dask.\n"
    with pytest.raises(UsageError, match="unknown setting 'wm_target'"):
        run.expand(study(dict(low=dict(wm_target="ode"))), [0], script)
    with pytest.raises(UsageError, match="is not a fork"):
        run.expand(study(), [0], tmp_path / "nowhere.py")
    for text in ("9-0", "-1", "0,x", "", "1-2-3", "0-99999999"):
        with pytest.raises(UsageError, match="neither a range such as 0-9 nor a list"):
            run.parse_seeds(text)
    assert run.parse_seeds("0-2,7,2") == [0, 1, 2, 7]


def test_a_dry_run_shows_runs_and_cost_and_runs_nothing(script, capsys):
    batch(study(minutes=dict(low=2.0, high=10.0)), script, seeds="0")
    assert batch(study(minutes=dict(low=2.0, high=10.0)), script, seeds="0-1", dry_run=True) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert calls() == [1] * 2 and "4 runs, about 12 CPU minutes left" in said and "--hidden 300 --seed 1" in said and "finished" in said


def test_committed_rows_count_as_finished_where_that_is_asked_for(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    batch(study(), script)
    run.record(tmp_path / "results" / "made_up.csv", rows(study()))
    os.rename("runs", "elsewhere")  # a fresh machine
    assert batch(study(), script, seeds="0-3", reuse=True) == 0 and calls() == [1] * 2 and len(rows(study())) == 8
    assert "made_up: reproduced" in capsys.readouterr().out


def test_committed_rows_never_take_the_place_of_ones_own(script, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    batch(study(), script)
    own = rows(study())
    run.record(tmp_path / "results" / "made_up.csv", [row | dict(final_return_mean=-1.0) for row in own])
    assert batch(study(), script, reuse=True) == 0 and rows(study()) == own
    os.rename("runs/fake", "elsewhere")  # rows without their folders, as from a cluster
    assert batch(study(), script, reuse=True) == 0 and rows(study()) == own and not Path("runs/fake").exists()


def test_of_committed_rows_of_one_run_the_page_s_own_count(script, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    batch(study(), script)
    own = rows(study())
    run.record(tmp_path / "results" / "made_up.csv", own)
    for name in ("a_page", "z_page"):  # the same runs on another machine
        run.record(tmp_path / "results" / f"{name}.csv", [row | dict(final_return_mean=-1.0) for row in own])
    os.rename("runs", "elsewhere")
    assert batch(study(), script, reuse=True) == 0 and rows(study()) == own and not Path("runs/fake").exists()


def test_a_run_that_cannot_be_read_costs_its_own_row_and_no_other(script, capsys):
    def measure(folder):
        if folder.name == "seed_1":
            raise UsageError("it lacks a checkpoint")
        return dict(extra=1.0)

    assert batch(study(measure=measure), script) == 1 and len(rows(study())) == 4
    assert "high, seed 1: finished, but can't be read: UsageError, it lacks a checkpoint" in capsys.readouterr().out


def test_rows_of_an_arm_that_was_declared_otherwise_are_left_out(script, capsys):
    for score in (300, 100):
        batch(study(dict(low={}, high=lambda seed: dict(hidden=score + seed))), script)
    assert len(rows(study())) == 9  # kept in the file
    assert "| high | 3    | 102 (" in capsys.readouterr().out.split("CPU min")[-1]


def test_a_page_may_add_to_the_report(script, capsys):
    batch(study(also=lambda rows, folder, console: console.print(f"{len(rows)} rows in {folder.name}")), script)
    assert "6 rows in made_up_fake" in capsys.readouterr().out


def test_a_check_tells_runs_that_differ_beyond_chance(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    batch(study(), script, seeds="0-9")
    reference = rows(study())
    run.record(
        tmp_path / "results" / "made_up.csv",
        [row | dict(final_return_mean=row["final_return_mean"] + 50 * (row["arm"] == "high")) for row in reference],
    )
    batch(study(), script, seeds="0-9", compare=True)
    high, low = sorted(line for line in capsys.readouterr().out.splitlines() if "no difference" in line or "differs" in line)
    assert high.startswith("| high") and "differs beyond chance" in high and low.startswith("| low") and "no difference found" in low
    batch(study(), script, seeds="10-13", compare=True)  # only the seeds that were asked for
    assert "| 4, 10 | 0 " in capsys.readouterr().out
    os.rename("runs", "elsewhere")
    batch(study(), script, seeds="0-9", compare=True, reuse=True)  # the reference is no witness for itself
    assert capsys.readouterr().out.rstrip().endswith("of three in ablations/results/.")
    for text, words in (
        ("arm,seed,run\nlow,0,x\n", "has no column 'final_return_mean'"),
        ("a\0b\n1\n", "has no column 'arm'|can't be read"),
    ):
        (tmp_path / "results" / "made_up.csv").write_text(text)
        with pytest.raises(UsageError, match=words):
            batch(study(), script, seeds="0-3", compare=True)


def test_a_check_finds_no_agreement_where_there_are_no_numbers():
    none = [row | dict(run="x", final_return_mean=None) for row in made_up(low=[1, 2, 3])]
    assert run.check(study(), none, none)[0].startswith("Nothing to compare")


def test_a_run_that_somebody_else_stops_is_resumed(script):
    s = study(dict(slow=dict(gamma=1.5)))
    (job,) = run.expand(s, [0], script)

    def stopper():
        while not (job.folder / "calls").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(job.folder.absolute()) in path.read_text():
                    os.kill(int(path.parent.name), signal.SIGTERM)

    thread = threading.Thread(target=stopper)
    thread.start()
    assert run.execute(job.command, job.folder.absolute(), Path("stop"))[0] == "finished" and calls() == [2]
    thread.join()


@pytest.mark.slow
def test_a_batch_runs_on_a_dask_cluster_whose_processes_know_nothing_of_the_kit(script, tmp_path_factory):
    pytest.importorskip("distributed")
    elsewhere, address = tmp_path_factory.mktemp("elsewhere"), "tcp://127.0.0.1:18786"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "18786", "--no-dashboard"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
    cluster = [subprocess.Popen(words, cwd=elsewhere, stderr=subprocess.DEVNULL) for words in (dask, worker)]
    try:
        assert batch(study(), script, backend="dask", scheduler=address) == 0
    finally:
        for process in reversed(cluster):
            process.terminate()
            process.wait()
    assert calls() == [1] * 6 and len(rows(study())) == 6


def test_who_answers_too_late_after_a_stop_begins_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(run, "GRACE", 0)
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert batch(study(dict(slow=dict(gamma=8), high=dict(hidden=1, gamma=8))), script) == 128 + signal.SIGTERM
    assert "no worker answers" in capsys.readouterr().out
    begun = calls()
    time.sleep(3)
    assert calls() == begun and len(begun) <= 2 and list(Path("runs/studies").rglob("stop-*"))  # which the others still find


def test_a_job_that_can_not_even_begin_costs_no_other(script, capsys):
    (job, *_) = run.expand(study(), [1], script)
    Path(f"{job.folder}.log").mkdir(parents=True)
    assert batch(study(), script) == 1 and len(rows(study())) == 5
    assert "Missing: low, seed 1: crashed IsADirectoryError" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, words",
    [("a,b\n1,2\n", "no column 'arm'"), ("arm,seed,run\nlow\n", "can't be read"), ("arm,seed,run\nlow,x,y\n", "'x' for a seed"), ("\xff\xfe,b\n", "can't be read|no column")],
)  # fmt: skip
def test_damaged_rows_are_one_sentence(text, words, script):
    path = Path("runs/studies/made_up_fake/rows.csv")
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=words):
        batch(study(), script)


@pytest.mark.parametrize(
    "name",
    "action_repeat autoencoder collapse ensemble_size heads horizon local_optimum memory model_free reward_tail sample_efficiency sensitivity target temperature".split(),
)
def test_each_page_declares_arms_and_tests_that_exist(name):
    s = __import__(name).STUDY
    jobs = run.expand(s, [0])
    assert s.name == name and {job.arm for job in jobs} == set(s.arms)
    assert all(({test.arm} if isinstance(test, Often) else {test.of, test.than}) <= set(s.arms) for test in s.tests)
    assert len({job.folder for job in jobs}) == len(jobs)  # no two arms are one


@pytest.mark.parametrize("path", sorted(run.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_rows_are_of_runs_that_their_page_declares(path):
    if "run" not in (rows := list(csv.DictReader(path.open())))[0]:
        return  # not of a study
    page = __import__(path.stem)
    runs = {(job.arm, job.seed): job.run for job in run.expand(page.STUDY, run.parse_seeds(page.STUDY.seeds), run.ROOT / page.STUDY.script)}
    assert all(runs[row["arm"], int(row["seed"])] == row["run"] for row in rows)


# -------------------------------------------------------------------------------------------------------------- the verdicts


def made_up(**arms) -> list[dict]:
    return [dict(arm=arm, seed=i, final_return_mean=float(x), solved=bool(x >= 200)) for arm, xs in arms.items() for i, x in enumerate(xs)]


@pytest.mark.parametrize("low, high, verdict", [
    (range(0, 10), range(100, 110), "reproduced"), (range(100, 110), range(0, 10), "not reproduced"),
    (range(0, 10), range(1, 11), "inconclusive"), (range(2), range(100, 102), "inconclusive"), ([5] * 10, [5] * 10, "inconclusive")])  # fmt: skip
def test_a_verdict_needs_a_difference_beyond_chance_in_the_declared_direction(low, high, verdict):
    assert run.judge(study(), made_up(low=low, high=high))[0] == verdict


def finished(rows: list[dict]) -> list[dict]:
    """The rows with all that a report tells."""
    return [
        row | dict(cpu_s=1, hovering=False, stuck=False, collapsed=False, status="finished", fall=row["final_return_mean"]) for row in rows
    ]


def test_a_verdict_says_if_its_runs_are_not_those_declared():
    declared = study(seeds="0-2", skip=lambda arm, seed: arm == "low" and seed == 2)
    rows = finished(made_up(low=[1, 2], high=[3, 4, 5]))
    assert run.provisional(declared, rows) == ""
    assert run.provisional(declared, made_up(low=[1, 2, 3, 4], high=[3, 4, 5])).endswith("beyond the declared seeds 0-2, of 2, 3")
    assert run.report(declared, rows[1:], [])[-1] == "\nmade_up: inconclusive, provisional, for 1 of 5 declared runs are missing"


@pytest.mark.parametrize("metric, probability", [("final_return_mean", "1.00"), ("fall", "0.00")])
def test_less_of_what_costs_is_an_improvement(metric, probability):
    said = io.StringIO()
    for thing in run.report(study(metric=metric), finished(made_up(low=[1, 2, 3], high=[4, 5, 6])), []):
        Console(file=said, width=200).print(thing)
    assert f"| high | {probability} " in said.getvalue().split("probability of improvement")[1]


def test_runs_without_an_answer_are_no_successes_and_without_any_there_is_no_verdict():
    lucky = [dict(arm="low", seed=i, lucky=True if i < 4 else None, number=None) for i in range(10)]
    judged = lambda *tests: run.judge(Study("x", "", "", {}, list(tests)), lucky + [dict(row, arm="high", lucky=None) for row in lucky])  # noqa: E731
    assert judged(Often("low", "lucky"))[1][0]["found"].startswith("40%")
    assert judged(Often("low", "lucky"))[0] == "inconclusive"
    assert judged(More("high", "low", "number"), Often("low", "number"))[0] == "inconclusive"


def test_each_kind_of_declared_test_finds_what_was_put_in():
    rows = made_up(low=[0, 1] * 5, high=[0, 500] * 5, never=[0] * 10, always=[300] * 10)
    for test, verdict in ((More("always", "never", "solved"), "reproduced"), (More("never", "always", "solved"), "not reproduced"), (More("high", "low", spread=True), "reproduced"),
                          (Often("always", "solved"), "reproduced"), (Often("never", "solved"), "not reproduced"), (Often("high", "solved"), "inconclusive")):  # fmt: skip
        assert run.judge(Study("x", "", "", {}, [test]), rows)[0] == verdict
    assert run.judge(Study("x", "", "", {}, [Often("always", "solved"), Often("high", "solved")]), rows)[0] == "inconclusive"


def test_a_fall_is_measured_as_the_contract_defines_a_collapse():
    assert run.fall([-200, -200, -200, 100, 100, 100, -100, -100, -100]) == pytest.approx(200)
    assert run.fall([0, 0, 0, 50, 50, 50, -300, -300, -300]) == 0  # it never rose by 100


# ------------------------------------------------------------------------------------------------------------ the statistics


@pytest.mark.parametrize(
    "scores, errors, fell, collapsed",
    [
        ([-500, 0, 0, 0, 200, 200, 200, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 3, 3, 3], True, True),
        ([-500, 0, 0, 0, 200, 200, 200, 0, 0, 0], [1, 1, 1, 1, 1, 9, 1, 1.5, 9, 1.5], True, False),  # single bad iterations don't count
        ([-500, 0, 0, 0, 200, 200, 200, 0, 0, 0], [3] * 4 + [1] * 3 + [1.5] * 3, True, False),
        ([-500, 0, 0, 0, 200, 200, 200, 100, 100, 100], [1] * 7 + [3] * 3, False, False),
        ([-500, 0, 0, 0, 200, 200, 200, 0, 0, 0], [None] * 10, True, False),
    ],
)
def test_a_model_collapses_if_its_error_doubles_where_the_return_falls(scores, errors, fell, collapsed, tmp_path):
    from collapse import model_collapse

    names = "real_steps", "eval/return_mean", "wm/error_openloop"
    rows = [dict(zip(names, (500 * i, score, error))) for i, (score, error) in enumerate(zip(scores, errors))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert model_collapse(tmp_path) == dict(fell=fell, model_collapsed=collapsed)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "run"
    given = "--env-id CartPole-v1 --uncertainty both --warmup-steps 300 --total-steps 330 --num-steps 30 --rounds 1 --wm-updates 2 --wm-first-updates 2 --wm-hidden 8 --dreams 8 --dream-steps 5"
    command = [sys.executable, str(ROOT / "ppo_mbrl.py"), *given.split(), "--run-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_areas_of_the_autoencoder_page_are_those_of_all_pairs(tiny_run, monkeypatch):
    import autoencoder
    import torch

    seen = {}

    def judged(model, replay, t, n):
        found, generator = autoencoder_judge(model, replay, t, n), torch.Generator().manual_seed(0)
        seen["error"], seen["unusual"], seen["disagreement"] = torch.rand(3, len(t), generator=generator)
        off = seen["error"][:, None] * model.change_scale.std  # the mean of all members is off by so much in each column
        mean = (found.steps.next_obs + off).expand_as(found.expected.mean)
        return found._replace(expected=found.expected._replace(mean=mean), unusual=seen["unusual"], disagreement=seen["disagreement"])

    autoencoder_judge = autoencoder.judge
    monkeypatch.setattr(autoencoder, "judge", judged)
    row = autoencoder.STUDY.measure(tiny_run)
    wrong = seen["error"] > seen["error"].quantile(0.9)
    for name, x in (("roc_autoencoder", seen["unusual"]), ("roc_disagreement", seen["disagreement"])):
        assert row[name] == pytest.approx(float((x[wrong][:, None] > x[~wrong]).float().mean()), abs=1e-6)
    assert row["autoencoder_finds"] == (row["roc_autoencoder"] > 0.5)
    assert row["autoencoder_finds_more"] == (row["roc_autoencoder"] > row["roc_disagreement"])


def test_the_errors_of_the_reward_page_are_relative_to_the_size_of_rewards(tiny_run, monkeypatch):
    import reward_tail
    import torch

    real = torch.tensor([1.0, -1.0] * 147 + [0.0] + [100.0, -100.0] * 3)  # median 0, the rarest hundredth is of size 100
    expected = torch.where(real.abs() > 1, 0.4 * real, 0.9 * real)
    monkeypatch.setattr(reward_tail, "expected_rewards", lambda *_, **__: (real, expected))
    row = reward_tail.STUDY.measure(tiny_run)
    assert row == dict(error_of_rare=pytest.approx(0.6), error_of_usual=pytest.approx(0.1), rare_is_worse=True)


def test_averages_are_those_of_rliable():
    rliable = pytest.importorskip("rliable.library")
    from rliable import metrics

    scores = np.random.default_rng(0).normal([0, 3], [1, 2], (10, 2))  # 10 runs of 2 tasks
    names = dict(mean=metrics.aggregate_mean, iqm=metrics.aggregate_iqm)
    for name, theirs in names.items():
        value, low, high = stats.average(name, *scores.T, reps=20_000)
        _, bounds = rliable.get_interval_estimates({"x": scores}, lambda x: np.array([theirs(x)]), reps=5000)
        assert value == pytest.approx(theirs(scores)) and [low, high] == pytest.approx(bounds["x"].ravel().tolist(), abs=0.08)
    x, y = scores.T
    assert stats.improvement(x, y)[0] == pytest.approx(metrics.probability_of_improvement(x[:, None], y[:, None]))
    taus = np.linspace(-2, 2, 5)
    ours, _, _ = stats.profile(x, taus)
    theirs, _ = rliable.create_performance_profile({"x": x[:, None]}, taus, reps=10)
    assert ours.tolist() == theirs["x"].tolist()


def test_exact_statistics_on_data_whose_answer_is_known():
    assert stats.rate(0, 10)[1:] == pytest.approx((0, 1 - 0.025**0.1))  # 31 %
    assert stats.rate(0, 20)[2] == pytest.approx(0.168, abs=1e-3)
    assert stats.iqm(np.array([-300, -300, *[250] * 8])) == 250  # and so hides two collapses
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.fisher(3, 3, 0, 3) == pytest.approx(2 / 20)  # 2 of the 20 ways to choose 3 of 6
    x, y = np.array([1.0, 2, 2, 5]), np.array([0.0, 2, 3])
    pairs = np.mean([(a > b) + (a == b) / 2 for a in x for b in y])
    assert stats.improvement(x, y)[0] == pytest.approx(pairs)
    ranks, chosen = np.array([1, 2, 4, 4, 4, 6, 7]), [2, 4, 4, 7]  # of both, and of x: three runs tie
    sums = [sum(ranks[list(some)]) for some in itertools.combinations(range(7), 4)]
    assert stats.improvement(x, y)[3] == pytest.approx(2 * np.mean([s >= sum(chosen) for s in sums]))
    assert stats.improvement(np.arange(3.0), np.arange(3.0) + 10)[::3] == pytest.approx((0, 2 / 20))
    far, near = np.array([0.0, 4, 5, 9]), np.array([0.0, 0, 1])  # distances to the medians: 4.5, 0.5, 0.5, 4.5 and 0, 0, 1
    between, within = 4 * (2.5 - 11 / 7) ** 2 + 3 * (1 / 3 - 11 / 7) ** 2, 4 * 2**2 + 2 / 3  # of these distances: sums of squares
    assert stats.spread(far, near) == pytest.approx((2.5, 1 / 3, f.sf(5 * between / within, 1, 5)))
    assert stats.spread(np.ones(5), np.zeros(5)) == (0, 0, 1)
    assert stats.improvement(np.arange(10.0), np.arange(12.0) - 20)[:3] == pytest.approx((1, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("studies", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_intervals_cover_and_verdicts_are_rarely_false(studies, capsys):
    """Made-up studies of three arms with ten seeds each, scores as such runs have them: some stuck near 0, most near 250; no arm is better."""
    rng, covered, false = np.random.default_rng(0), 0, 0
    declared = Study("x", "", "", {}, [More("a", "c"), More("b", "c"), More("b", "c", spread=True), Often("c", "lucky")])
    for _ in range(studies):
        stuck = rng.random((3, 10)) < 0.3
        scores = np.where(stuck, rng.normal(0, 40, (3, 10)), rng.normal(250, 20, (3, 10)))
        rows = [row | dict(lucky=bool(rng.random() < 0.5)) for row in made_up(a=scores[0], b=scores[1], c=scores[2])]
        false += any(test["verdict"] != "inconclusive" for test in run.judge(declared, rows)[1])
        _, low, high = stats.average("mean", scores[0], reps=1000)
        covered += low <= 0.7 * 250 <= high
    with capsys.disabled():
        print(f"\n{studies} studies: 95 % intervals of the mean cover {covered / studies:.1%}, false verdicts in {false / studies:.1%}")
    assert covered / studies >= 0.85 and false / studies <= 0.06


def test_a_curve_is_of_all_runs_also_where_some_ended_early_or_were_evaluated_elsewhere(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stats, "bands", lambda curves, *rest: seen.append(curves) or (curves.min(0), curves.max(0)))
    whole = [row | dict(status="finished", real_steps=100) for row in finished(made_up(low=[1, 2, 3], high=[1, 1, 1]))]
    curves = ["0:0 50:5 100:10", "0:0 100:20", "0:4 50:4"]
    run.draw(study(), [row | dict(curve=curves[i % 3]) for i, row in enumerate(whole)], "reproduced", tmp_path / "picture.png")
    (low, *_) = [curve for curve in seen if curve.shape == (3, 3)]
    assert low.tolist() == [[0, 5, 10], [0, 10, 20], [4, 4, 4]] and (tmp_path / "picture.png").stat().st_size > 10_000
