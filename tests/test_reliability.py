"""Nothing is ever lost: faults put into whole runs. The numbers in the names are those of the promises in the README's section "Reliability".

A few trials of each always run; the full numbers run with `pytest -m slow`. Promises 10 and 11 are held in test_ppo.py as well.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from safetensors import safe_open
from safetensors.torch import save
from test_runs import RUNS, SCRIPTS, TINY, command, contents, fingerprint, flags, in_brief, interrupted_after, rows_of, summary_of, train

import ppo_mbrl
import world_model
from ppo_mbrl import Run


def trials(few, many):
    """A few trials always, many with `pytest -m slow`."""
    return pytest.mark.parametrize("trials", [few, pytest.param(many, marks=pytest.mark.slow)])


def newest(folder: Path, ending="safetensors") -> Path:
    return sorted((folder / "checkpoint").glob(f"*.{ending}"))[-1]


def everything(folder: Path) -> tuple:
    """All that a run found out, all that it would go on from, and the names of its files; but no clocks, and no pictures in bits."""
    tensors, state = world_model.read_checkpoint(newest(folder))
    state = {name: value for name, value in json.loads(state).items() if name not in ("wall_s", "cpu_s")}
    numbers = {name: (x.dtype, x.shape, x.numpy().tobytes()) for name, x in tensors.items() if name != "metrics"}
    assert tensors["metrics"].numpy().tobytes() == (folder / "metrics.jsonl").read_bytes()
    return *fingerprint(folder), state, numbers, sorted(path.relative_to(folder) for path in folder.rglob("*"))


def forked(function, *args, **kwargs) -> multiprocessing.Process:
    """Runs a command in a process of its own, patches included, without importing torch again."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(function(*args, **kwargs)))
    process.start()
    return process


class Disk:
    """Stands between a run and its files: `before` is called ahead of each operation, and sees a write when half of it is done."""

    def __init__(self, monkeypatch, before):
        self.before, self.open = before, open
        for module in (ppo_mbrl, world_model):
            monkeypatch.setattr(module, "open", lambda path, mode: File(self, path, mode), raising=False)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name, function):
        def call(what, *rest):
            folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{what}")
            self.before("fsync of the folder" if folder else name)
            return function(what, *rest)

        return call


class File:
    def __init__(self, disk: Disk, path: Path, mode: str):
        self.disk, self.file = disk, disk.open(path, mode)

    def write(self, data: bytes):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.disk.before("write")
        self.file.write(data[len(data) // 2 :])

    def writelines(self, pieces: tuple):
        self.write(b"".join(pieces))

    def flush(self):
        self.disk.before("flush")
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


# ------------------------------------------------------------------------------------------------------------ 1, 2: going on


@pytest.mark.slow  # in one process: test_runs.py
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", RUNS)
def test_1_the_same_command_in_two_processes_gives_the_same_result(kind, seed, tmp_path):
    words = flags(TINY | RUNS[kind] | dict(seed=seed))
    for name in "ab":  # the hashes of Python's own strings differ between them
        done = subprocess.run([sys.executable, SCRIPTS / "ppo_mbrl.py", *words, "--run-dir", tmp_path / name], capture_output=True)
        assert done.returncode == 0, done.stderr
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


KINDS = RUNS | {
    f"{memory}, {uncertainty}": dict(total_steps=180, wm_memory=memory, uncertainty=uncertainty, num_envs=2)
    for memory in ("none", "gru")
    for uncertainty in ("none", "ensemble", "autoencoder", "both")
}


@pytest.mark.parametrize("kind, trials", [(kind, 0) for kind in RUNS] + [pytest.param(kind, 20, marks=pytest.mark.slow) for kind in KINDS])
def test_2_a_run_stopped_at_any_moment_goes_on_as_if_nothing_had_happened(kind, trials, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    with monkeypatch.context() as patch:
        left = interrupted_after(patch, 10**9)
        assert train(tmp_path / "whole", eval_every=60, **KINDS[kind]) == 0
    ticks, rng, whole = 10**9 - left[0], random.Random(kind), everything(tmp_path / "whole")
    first_middle_last = [1, ticks // 2, ticks - 5] if trials else [ticks // 2]
    for moment in first_middle_last + [rng.randrange(1, ticks) for _ in range(trials)]:
        with monkeypatch.context() as patch:
            interrupted_after(patch, moment)
            assert train(tmp_path / "torn", eval_every=60, **KINDS[kind]) == 128 + signal.SIGTERM
        assert train(tmp_path / "torn", eval_every=60, **KINDS[kind]) == 0
        assert everything(tmp_path / "torn") == whole
        shutil.rmtree(tmp_path / "torn")


def test_a_run_folder_can_be_moved(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "whole", total_steps=150) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_mbrl, "save_checkpoint", stopped_after(patch, iteration=2))
        assert train(tmp_path / "here", total_steps=150) == 128 + signal.SIGTERM
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert train(tmp_path / "there", total_steps=150) == 0
    assert everything(tmp_path / "there") == everything(tmp_path / "whole")


def stopped_after(monkeypatch, iteration: int):
    """A signal arrives in the save of this iteration."""
    save_checkpoint = ppo_mbrl.save_checkpoint

    def stopped(run):
        save_checkpoint(run)
        if run.iteration == iteration:
            run.on_signal(signal.SIGTERM, None)

    return stopped


def test_a_checkpoint_of_another_version_is_refused_with_a_sentence(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    path = newest(tmp_path)
    tensors, state = world_model.read_checkpoint(path)
    renamed = (state.replace('"scale"', '"ladder"'), state.replace("actor.0.weight", "actor.weight", 1), "[]", '{"agent": 1}', "[" * 9999)
    for text in renamed:
        forge(path, save(tensors, {"state": text}))
        before = contents(tmp_path)
        capsys.readouterr()
        assert train(tmp_path, total_steps=150) == 2
        error = capsys.readouterr().err
        assert "was written by another version of this kit" in error and error.count("\n") == 1 and contents(tmp_path) == before


def test_a_folder_of_an_older_kit_with_fewer_settings_is_refused_with_a_sentence_and_begun_anew_when_asked(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    tensors, state = world_model.read_checkpoint(newest(tmp_path))
    forge(newest(tmp_path), save(tensors, {"state": state.replace('"gather_limit": 600, ', "")}))
    before = contents(tmp_path)
    capsys.readouterr()
    assert train(tmp_path) == 2 and "gather_limit was None and is now 600" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert command(*flags(TINY | dict(run_dir=tmp_path)), "--fresh") == 0
    assert '"gather_limit": 600, ' in world_model.read_checkpoint(newest(tmp_path))[1]


@pytest.mark.parametrize("count", ["5", -1, None, math.nan, True, 1.5])
def test_a_checkpoint_that_counts_what_can_not_be_is_refused(count, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    tensors, state = world_model.read_checkpoint(newest(tmp_path))
    forge(newest(tmp_path), save(tensors, {"state": json.dumps(json.loads(state) | dict(real_steps=count))}))
    capsys.readouterr()
    assert train(tmp_path, total_steps=150) == 2
    assert "it can't have counted" in capsys.readouterr().err


def forge(path: Path, data: bytes):
    """A checkpoint with the right SHA-256."""
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(dict(sha256=ppo_mbrl.hashlib.sha256(data).hexdigest())))


# -------------------------------------------------------------------------------------------------------- 3, 7: kills, signals


@trials(4, 100)
def test_3_kill_9_loses_nothing_but_the_unfinished_iteration(trials, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    began = time.perf_counter()
    assert train(tmp_path / "whole", total_steps=150) == 0
    took, whole, rng, killed, inside = time.perf_counter() - began, everything(tmp_path / "whole"), random.Random(0), 0, 0
    for trial in range(trials):
        folder, saving, saved = tmp_path / "torn", multiprocessing.Event(), multiprocessing.Event()
        with monkeypatch.context() as patch:
            if trial % 2:  # every other one in a slowed save
                chosen, slow, write = rng.randrange(1, 5), 0.02, ppo_mbrl.save_checkpoint

                def slowed(run):
                    if run.iteration == chosen:
                        saving.set()
                    write(run)
                    if run.iteration == chosen:
                        saved.set()

                patch.setattr(ppo_mbrl, "save_checkpoint", slowed)
                Disk(patch, lambda operation: time.sleep(slow))
            process = forked(train, folder, total_steps=150)
            if trial % 2:
                assert saving.wait(60)
                time.sleep(rng.uniform(0, 8 * slow))  # a save takes ten of these at least
            else:
                time.sleep(rng.uniform(0, took))
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            inside += saving.is_set() and not saved.is_set()
        assert train(folder, total_steps=150) == 0
        assert everything(folder) == whole
        shutil.rmtree(folder)
    assert killed >= trials / 2 and inside >= 0.3 * trials
    print(f"{killed} killed, {inside} of them inside a save")


PHASES = ["gathering", "fitting", "dreaming", "evaluating", "drawing", "final evaluation"]


@trials(len(PHASES), 20)
def test_7_a_signal_saves_and_leaves_within_ten_seconds_in_every_phase(trials, tmp_path, monkeypatch, capfd):
    settings = dict(total_steps=500, warmup_steps=380, eval_every=60)  # enough for an episode that is held out, and thus for all pictures
    if trials == len(PHASES):
        in_brief(monkeypatch)
    assert train(tmp_path / "whole", **settings) == 0
    whole, rng, phase = everything(tmp_path / "whole"), random.Random(0), Run.phase
    for trial in range(trials):
        folder, wanted, reached = tmp_path / "torn", PHASES[trial % len(PHASES)], multiprocessing.Event()
        left = [rng.randrange(4) if wanted in PHASES[:4] else 0]

        def watched(run, name):
            phase(run, name)
            left[0] -= name == wanted
            if left[0] < 0:
                reached.set()

        with monkeypatch.context() as patch:
            patch.setattr(Run, "phase", watched)
            process = forked(train, folder, **settings)
            assert reached.wait(60)
            time.sleep(rng.uniform(0, 0.03))
            process.terminate()
            process.join(10)
        assert process.exitcode in (128 + signal.SIGTERM, 0, -signal.SIGTERM)  # the last two: it had just finished
        assert summary_of(folder)["status"] == ("interrupted" if process.exitcode > 0 else "finished")
        assert train(folder, **settings) == 0
        assert everything(folder) == whole
        shutil.rmtree(folder)


@pytest.mark.slow
def test_7_a_signal_is_heeded_within_ten_seconds_at_the_size_of_the_defaults(tmp_path):
    for phase in ("gathering", "fitting", "dreaming"):
        reached = multiprocessing.Event()

        def watched(run, name):
            run.view.now = name
            if name == phase and (run.iteration or name == "fitting"):
                reached.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "phase", watched)
            process = forked(command, "--run-dir", tmp_path)
            assert reached.wait(300)
            time.sleep(0.2)
            process.terminate()
            process.join(10)
        assert process.exitcode == 128 + signal.SIGTERM


def test_7_a_signal_before_the_first_step_is_heeded(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    init = ppo_mbrl.Environments.__init__
    monkeypatch.setattr(ppo_mbrl.Environments, "__init__", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or init(*args))
    assert train(tmp_path / "torn") == 143
    assert "Interrupted; saved up to real step 0." in capsys.readouterr().out and summary_of(tmp_path / "torn")["status"] == "interrupted"
    monkeypatch.setattr(ppo_mbrl.Environments, "__init__", init)
    assert train(tmp_path / "torn") == train(tmp_path / "whole") == 0
    assert everything(tmp_path / "torn") == everything(tmp_path / "whole")


def test_a_second_ctrl_c_leaves_at_once(tmp_path, monkeypatch):
    reached = multiprocessing.Event()
    monkeypatch.setattr(ppo_mbrl, "fit", lambda *_: reached.set() or [time.sleep(0.05) for _ in range(10_000)])  # doesn't look at signals
    process = forked(train, tmp_path)
    assert reached.wait(60)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(5)
    assert process.exitcode == -signal.SIGINT


def test_of_two_processes_in_one_folder_the_second_leaves_and_the_first_goes_on(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path / "whole", total_steps=300) == 0
    first = multiprocessing.Event()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "phase", lambda run, name: first.set() or time.sleep(0.1))
        process = forked(train, tmp_path / "run", total_steps=300)
    assert first.wait(60)
    capsys.readouterr()
    assert train(tmp_path / "run", total_steps=300) == 2
    assert "Another process is at work" in capsys.readouterr().err
    assert train(tmp_path / "run", total_steps=300, fresh=True) == 2
    process.join(60)
    assert process.exitcode == 0 and everything(tmp_path / "run") == everything(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------ 4, 5, 6: disk, damage


@trials(1, 1000)
@pytest.mark.parametrize("kind", ["write", "flush", "fsync", "replace", "fsync of the folder"])
def test_4_a_failing_disk_never_destroys_the_last_checkpoint(kind, trials, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    operations, last, folder = [], tmp_path / "last", tmp_path / "run"
    assert train(last, total_steps=90) == 0
    shutil.copytree(last, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Disk(patch, operations.append)
        assert train(tmp_path / "whole", total_steps=150) == 0
    whole, moments = everything(tmp_path / "whole"), [i for i, name in enumerate(operations) if name == kind]
    assert len(moments) >= 9
    faults = [(moment, number, for_good) for moment in moments for number in (errno.ENOSPC, errno.EIO) for for_good in (True, False)]
    for moment, number, for_good in random.Random(kind).sample(faults, min(trials, len(faults))):
        seen = []

        def fail(operation):
            seen.append(operation)
            if len(seen) == moment + 1 or for_good and len(seen) > moment:
                raise OSError(number, os.strerror(number))

        shutil.copytree(last, folder)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            Disk(patch, fail)
            assert train(folder, total_steps=150) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: A file could not be read or written: ") and error.count("\n") == 1
        world_model.read_checkpoint(newest(folder, "json").with_suffix(".safetensors"))
        assert train(folder, total_steps=150) == 0 and everything(folder) == whole
        shutil.rmtree(folder)
    print(f"{min(trials, len(faults))} faults")


@trials(2, 40)
def test_4_a_disk_that_is_really_full_never_destroys_the_last_checkpoint(trials, tmp_path, monkeypatch, capfd):
    in_brief(monkeypatch)
    assert train(tmp_path / "before", total_steps=90) == 0
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    assert train(tmp_path / "whole", total_steps=150) == 0
    whole, size = everything(tmp_path / "whole"), newest(tmp_path / "whole").stat().st_size
    for trial in range(trials):

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, ((trial + 1) * size // (trials + 1),) * 2)  # the kernel refuses to write more
            return train(tmp_path / "run", total_steps=150)

        shutil.copytree(tmp_path / "before", tmp_path / "run")
        capfd.readouterr()
        process = forked(limited)
        process.join()
        error = capfd.readouterr().err
        assert process.exitcode == 1 and error.startswith("Error: A file could not be") and error.count("\n") == 1
        assert train(tmp_path / "run", total_steps=150) == 0 and everything(tmp_path / "run") == whole
        shutil.rmtree(tmp_path / "run")


@trials(8, 200)
def test_5_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(trials, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=150) == 0
    whole, rng = everything(tmp_path), random.Random(0)
    for trial in range(trials):
        path = newest(tmp_path).with_suffix(".json" if trial % 4 == 3 else ".safetensors")
        data = bytearray(path.read_bytes())
        if trial % 2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        capsys.readouterr()
        assert train(tmp_path, total_steps=150) == 0
        said = capsys.readouterr().out
        assert "00000004.safetensors is damaged; trying the one before it" in said and "from real step 120" in said
        assert everything(tmp_path) == whole


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "policy.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "flipped"])
def test_5_what_is_damaged_beside_the_checkpoint_is_mended_from_it(name, harm, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    before, path = contents(tmp_path), tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    harmed = dict(cut=data[: len(data) // 2], empty=b"", flipped=data).get(harm)
    path.unlink() if harmed is None else path.write_bytes(harmed)
    assert contents(tmp_path) != before
    assert train(tmp_path) == 0 and contents(tmp_path) == before
    assert train(tmp_path, fresh=True) == 0  # nor is the folder taken for a stranger's


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_6_a_half_written_row_does_no_harm(stride, tmp_path, monkeypatch):
    """Cut at every byte of the last row, or at every 97th: a row that the newest checkpoint knows, or one that it does not."""
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    path, before = tmp_path / "metrics.jsonl", contents(tmp_path)
    log = path.read_bytes()
    last = log.splitlines(keepends=True)[-1]
    for length in range(0, len(last), stride):
        for torn in (log[: len(log) - len(last) + length], log + last[: length + 1]):
            path.write_bytes(torn)
            assert train(tmp_path) == 0
            assert contents(tmp_path) == before
    print(f"{len(last)} bytes in the last row")
    path.write_bytes(log[:-20])
    assert train(tmp_path, total_steps=120) == 0
    assert [row["real_steps"] for row in rows_of(tmp_path)] == [0, 60, 90, 120]


# --------------------------------------------------------------------------------------------------- 8: strangers' files, names


class Bomb:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


@pytest.mark.parametrize("packed", ["pickle", "torch"])
def test_8_a_file_from_a_stranger_runs_no_code(packed, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    monkeypatch.setattr(world_model, "draw_diagnosis", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "good") == 0
    sentinel = tmp_path / "sentinel"
    bomb = tmp_path / "bomb"
    pickle.dump(Bomb(sentinel), open(bomb, "wb")) if packed == "pickle" else torch.save(Bomb(sentinel), bomb)
    evil, names = (
        bomb.read_bytes(),
        sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*") if path.is_file()),
    )
    assert len(names) == 9
    diagnose = lambda: world_model.run_command(lambda: world_model_app(tmp_path / "run", "--updates", 1))  # noqa: E731
    for name in [*names, "checkpoint"]:
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        if name == "checkpoint":  # all of them, with the right SHA-256
            for path in (tmp_path / "run" / "checkpoint").glob("*.safetensors"):
                forge(path, evil)
        else:
            (tmp_path / "run" / name).write_bytes(evil)
        for act in (
            lambda: train(tmp_path / "run", total_steps=120),
            lambda: command("evaluate", tmp_path / "run", "--episodes", 1),
            diagnose,
        ):
            capsys.readouterr()
            with contextlib.suppress(SystemExit):
                act()
            error = capsys.readouterr().err
            assert not error or error.startswith("Error: ") and error.count("\n") == 1, error
            assert not sentinel.exists()
        shutil.rmtree(tmp_path / "run")
    pickle.loads(pickle.dumps(Bomb(sentinel)))
    assert sentinel.exists()  # it would have gone off


def world_model_app(*words):
    app = world_model.typer.Typer(pretty_exceptions_enable=False)
    app.command()(world_model.main)
    app([str(word) for word in words])


HOSTILE = {
    "env_id": ["../../outside", "/tmp/outside", "a\0b", "..", "evil:Env-v0", "\ud800", "CartPole-v1/../../x", "%s%n", ""],
    "device": ["../x", "cpu\0", "cuda:99"],
    "mode": ["../x", None, {}],
    "wm_target": ["../../x", ["delta"]],
    "seed": ["../x", 1e3, None, -1, 10**30],
    "hidden": [1e9, 10**9, "8", True],
    "gamma": [10**400, -(10**400), math.nan],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HOSTILE.items() for value in values])
def test_hostile_settings_write_nothing_and_import_nothing(name, value, tmp_path, monkeypatch, capsys):
    (tmp_path / "kit").mkdir()
    (tmp_path / "evil.py").write_text("open('sentinel', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "kit")
    Path("config.json").write_text(json.dumps({name: value, "run_dir": "../outside", "fresh": True}))
    before = contents(tmp_path)
    for words in (["--config", "config.json"], ["evaluate", "."]):
        capsys.readouterr()
        assert command(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and error.count("\n") == 1
    assert contents(tmp_path) == before and not list(tmp_path.rglob("runs"))


def test_where_a_run_is_written_is_never_taken_from_a_settings_file(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    (tmp_path / "kit").mkdir()
    monkeypatch.chdir(tmp_path / "kit")
    hostile = TINY | dict(run_dir="../outside", config="../outside", fresh=True)
    Path("config.json").write_text(json.dumps(hostile))
    assert command("--config", "config.json") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kit"] and sorted(os.listdir()) == ["config.json", "runs"]


NAMES = ["metrics.jsonl", "summary.json", "policy.safetensors", "map.png", "checkpoint/00000007.safetensors", "checkpoint/00000007.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_something_else_that_have_our_names_are_left_alone(name, fresh, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert train(tmp_path, fresh=fresh) == 2
    assert capsys.readouterr().err == f"Error: {tmp_path / name} is not of a run of this kit; choose another --run-dir.\n"
    assert contents(tmp_path) == {Path(name): b"mine"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "policy.safetensors", "checkpoint/00000002.json", "checkpoint"])
def test_links_and_pipes_in_a_run_folder_are_refused(name, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path / "run") == 0
    path, outside = tmp_path / "run" / name, tmp_path / "outside"
    path.rename(outside)
    before = contents(tmp_path)
    for put in (lambda: path.symlink_to(outside), lambda: os.mkfifo(path)):
        put()
        capsys.readouterr()
        assert train(tmp_path / "run", total_steps=150) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and (str(path) in error or "Run folder" in error)
        path.unlink()
    assert contents(tmp_path) == before


def test_a_pipe_in_the_place_of_the_settings_is_not_opened(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    assert train(tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path / 'config.json'} is not of a run of this kit")


def test_beginning_anew_can_be_broken_off_anywhere_and_be_done_again(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "whole") == 0
    unlink, number = Path.unlink, len(contents(tmp_path / "whole"))

    def killed(path, **given):
        left[0] -= path.exists()
        if left[0] < 0:
            raise GeneratorExit  # nothing catches it
        unlink(path, **given)

    for i in range(number - 1):  # the log is emptied, not deleted
        folder, left = shutil.copytree(tmp_path / "whole", tmp_path / f"after_{i}"), [i]
        with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
            patch.setattr(Path, "unlink", killed)
            train(folder, fresh=True)
        assert train(folder, fresh=True) == 0 and fingerprint(folder) == fingerprint(tmp_path / "whole")


def test_a_summary_of_more_than_the_checkpoint_holds_is_made_anew(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=150) == 0
    newest = sorted((tmp_path / "checkpoint").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes() + b"0")
    assert train(tmp_path, total_steps=100) == 0  # where the checkpoint before it already is
    summary, last = summary_of(tmp_path), rows_of(tmp_path)[-1]
    assert summary["real_steps"] == last["real_steps"] == 120 and summary["iteration"] == last["iteration"]


def test_no_link_is_followed_when_a_file_is_written(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "run") == 0
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run" / "policy.safetensors.tmp").symlink_to(tmp_path / "outside")
    assert train(tmp_path / "run", total_steps=150) == 0
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "run" / "policy.safetensors.tmp").exists()


def test_a_folder_with_brackets_in_its_name_is_called_by_it(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path / "a[b]:smile:[" / "b]") == 0
    assert f"see {tmp_path}/a[b]:smile:[/b]\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"seed": ' + "9" * 5000 + "}", "\0", '"x"', "null", ""])
def test_settings_files_that_are_none_are_refused_with_a_sentence(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    for words in (["--config", tmp_path / "config.json", "--run-dir", tmp_path / "run"], ["--run-dir", tmp_path], ["evaluate", tmp_path]):
        capsys.readouterr()
        assert command(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and error.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == text and not (tmp_path / "run").exists()


def test_a_name_with_nul_is_refused_with_a_sentence(capsys):
    assert command("--run-dir", "a\0b") == 2
    assert "--run-dir must be printable text" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- 9: divergence


def put(patch, where: str, x: float):
    """From now on there is an x in one place of a run."""
    step, update, fit, loss, clip = CartPoleEnv.step, ppo_mbrl.ppo_update, ppo_mbrl.fit, ppo_mbrl.ppo_loss, torch.Tensor.renorm_
    dream = world_model.Dream.step

    def poison(tensor):
        tensor.data.view(-1)[0] = x

    def obs(self, action):
        obs, *rest = step(self, action)
        return np.array([x, *obs[1:]], np.float32), *rest

    def updated(agent, *rest):
        log = update(agent, *rest)
        poison(agent.actor[0].weight)
        return log

    def fitted(model, *rest):
        log = fit(model, *rest)
        poison(model.dynamics[0].weight)
        return log

    def moved(self, actions):
        reward, *rest = dream(self, actions)
        return reward + x, *rest

    def imagined(self, actions):
        reward, next_obs, *rest = dream(self, actions)
        return reward, next_obs + x, *rest

    targets = {
        "obs": (CartPoleEnv, "step", obs),
        "reward": (CartPoleEnv, "step", lambda self, action: (*(r := step(self, action))[:1], x, *r[2:])),
        "loss": (ppo_mbrl, "ppo_loss", lambda *args: [value + x for value in loss(*args)]),
        "gradient": (torch.Tensor, "renorm_", lambda gradient, *rest: poison(clip(gradient, *rest))),
        "policy": (ppo_mbrl, "ppo_update", updated),
        "model": (ppo_mbrl, "fit", fitted),
        "dreamed reward": (world_model.Dream, "step", moved),
        "dreamed obs": (world_model.Dream, "step", imagined),
    }
    patch.setattr(*targets[where])


PLACES = {
    "simple": ["obs", "reward", "loss", "gradient", "policy", "model", "dreamed reward", "dreamed obs"],
    "gru and both": ["obs", "reward", "policy", "model", "dreamed reward", "dreamed obs"],
    "ppo": ["obs", "reward", "loss", "gradient", "policy"],
    "mpc": ["obs", "reward", "model"],
}
FEW = [("simple", where, math.nan) for where in PLACES["simple"]] + [("ppo", "reward", math.inf), ("mpc", "model", -math.inf)]
ALL = [(kind, where, x) for kind, places in PLACES.items() for where in places for x in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize("kind, where, x", FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW])
def test_9_a_diverging_run_stops_says_why_and_keeps_its_last_good_checkpoint(kind, where, x, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    settings = RUNS[kind]
    steps = settings["total_steps"]
    assert train(tmp_path, **settings | dict(total_steps=steps // 2)) == 0
    before = {name: data for name, data in contents(tmp_path).items() if name.suffix in (".safetensors", ".jsonl")}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        put(patch, where, x)
        assert train(tmp_path, **settings) == 3
    assert "Diverged: not finite after" in capsys.readouterr().out
    assert summary_of(tmp_path)["status"] == "diverged" and summary_of(tmp_path)["final_return_mean"] is None
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert train(tmp_path, **settings) == 0 and summary_of(tmp_path)["status"] == "finished"


# --------------------------------------------------------------------------------------------- odd environments, 10, 14: the rest


class Odd(gym.Env):
    """A walk on a line; `length` steps an episode, rewards times `scale`, one column that never changes, one that is huge."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Discrete(2)

    def __init__(self, length: int, scale: float, huge: float):
        self.length, self.scale, self.huge = length, scale, huge

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(), 0
        return self.obs(), {}

    def obs(self):
        return np.array([self.x, 7.0, self.huge * self.x], np.float32)

    def step(self, action):
        self.x, self.t = self.x + self.np_random.normal() + (1 if action else -1), self.t + 1
        return self.obs(), float(self.scale * self.x), self.t >= self.length, False, {}


ODD = {
    "one-step episodes": dict(length=1, scale=1.0, huge=0.0),
    "rewards of a million": dict(length=9, scale=1e6, huge=0.0),
    "constant": dict(length=9, scale=0.0, huge=0.0),
    "huge observations": dict(length=9, scale=1.0, huge=1e6),
}


@pytest.mark.parametrize("mode", ["simple", "ppo", "mpc"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_environments_are_survived(odd, mode, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    name = f"{odd.title().replace(' ', '').replace('-', '')}-v0"
    if name not in gym.registry:
        gym.register(name, entry_point=Odd, kwargs=ODD[odd])
    assert train(tmp_path, env_id=name, mode=mode, wm_updates=20, wm_first_updates=20) == 0
    assert summary_of(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("huge", [0.001, 10.0, math.inf])
def test_imagined_values_that_leave_float_range_end_in_a_result_or_a_sentence(huge, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    init = world_model.WorldModel.__init__

    def broken(self, *args):
        init(self, *args)
        self.integrate = lambda field, obs: field(obs) * 1e38 * huge

    monkeypatch.setattr(world_model.WorldModel, "__init__", broken)
    status = train(tmp_path, wm_updates=0, wm_first_updates=0)
    assert (status, summary_of(tmp_path)["status"]) in [(0, "finished"), (3, "diverged")]


def test_10_our_environments_are_gymnasiums_asynchronous_ones():
    N, seed, rng = 3, 11, np.random.default_rng(0)
    ours = ppo_mbrl.Environments("CartPole-v1", N, seed)
    theirs = gym.vector.AsyncVectorEnv([lambda: gym.make("CartPole-v1")] * N, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    theirs.reset(seed=[int(x) for x in np.random.SeedSequence(seed).generate_state(N, np.uint64)])
    obs, _ = theirs.reset()
    for _ in range(200):
        assert np.array_equal(ours.obs.numpy(), obs)
        actions = rng.integers(2, size=N)
        reward, _, terminated, truncated = ours.step(torch.as_tensor(actions))
        obs, *real, _ = theirs.step(actions)
        assert all(np.array_equal(x.numpy(), y) for x, y in zip((reward, terminated, truncated), real))
    theirs.close()


def weigh(sizes: Path, folder: Path, **settings) -> int:
    """A run that notes its memory after each checkpoint: real steps, resident bytes, bytes of the checkpoint."""
    save_checkpoint = ppo_mbrl.save_checkpoint

    def weighed(run):
        save_checkpoint(run)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(sizes, "a") as file:
            file.write(f"{run.real_steps} {pages * resource.getpagesize()} {newest(run.folder).stat().st_size}\n")

    with pytest.MonkeyPatch.context() as monkeypatch:
        in_brief(monkeypatch)
        monkeypatch.setattr(ppo_mbrl, "save_checkpoint", weighed)
        return train(folder, **settings)


@trials(4_000, 300_000)
@pytest.mark.parametrize("mode", ["ppo", "simple"])
def test_14_long_runs_do_not_leak(mode, trials, tmp_path):
    """Memory after a third of the steps and at the end, in a process of its own, the growing replay of a run in dreams included."""
    sizes, settings = tmp_path / "sizes", dict(mode=mode, total_steps=trials, num_steps=500)
    process = multiprocessing.get_context("spawn").Process(target=weigh, args=(sizes, tmp_path / "run"), kwargs=settings)
    process.start()
    process.join()
    assert process.exitcode == 0
    steps, memory, saved = np.loadtxt(sizes).T
    warm = steps >= trials / 3
    growth = memory[warm].max() - memory[warm][0]
    print(
        f"{mode}: {memory[warm][0] / 2**20:.0f} MiB, grows by {growth / 2**20:.1f} MiB, checkpoint by {(saved[-1] - saved[warm][0]) / 2**20:.1f}"
    )
    assert growth < 0.05 * memory[warm][0]


def test_the_library_reads_what_was_written(tmp_path):
    numbers = torch.arange(24.0).view(2, 3, 4)
    tensors = dict(
        flag=torch.tensor(True),
        odd=torch.arange(3, dtype=torch.uint8),
        turned=numbers.mT,
        none=numbers[:0],
        wide=numbers.double(),
        whole=numbers.long(),
    )
    checksum = world_model.write_tensors(tmp_path / "file", tensors, state="grün", env_id="")
    assert checksum == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == dict(state="grün", env_id="") and set(file.keys()) == set(tensors)
        for name, x in tensors.items():
            assert torch.equal(file.get_tensor(name), x) and file.get_tensor(name).dtype == x.dtype


def test_14_checkpoints_of_ever_new_sizes_leave_nothing_behind(tmp_path, monkeypatch):
    """A library that makes a C array's type for each new size of a tensor keeps it for ever."""
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=120) == 0
    types = len(ctypes.Array.__subclasses__())
    assert train(tmp_path, total_steps=300) == 0
    assert len(ctypes.Array.__subclasses__()) == types
