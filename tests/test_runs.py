"""Whole runs, through the command line as a user types it: what they count, write, resume, refuse and learn."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from safetensors import safe_open
from safetensors.torch import load_file

import ppo_mbrl
import world_model
from ppo_mbrl import Run, Schedule, Scores, Settings
from world_model import Rollout

SCRIPTS = Path(ppo_mbrl.__file__).parent
TINY = dict(env_id="CartPole-v1", wm_hidden=8, wm_updates=2, wm_first_updates=2, dreams=8, dream_steps=5, horizon=5, rounds=1, num_steps=30, growth=9.0, warmup_steps=60, hidden=8,
            total_steps=90, eval_every=100_000, num_envs=1, action_repeat=1, minibatch=32, plan_horizon=3, plan_candidates=8)  # fmt: skip


def flags(settings: dict) -> list[str]:
    """Settings as they are typed."""
    named = [(name.replace("_", "-"), value) for name, value in settings.items()]
    return [x for name, v in named for x in ([f"--{name}" if v else f"--no-{name}"] if type(v) is bool else [f"--{name}", str(v)])]


def command(*words) -> int:
    """The command line in this process; returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        world_model.run_command(lambda: ppo_mbrl.app([str(word) for word in words], prog_name="ppo_mbrl.py"))
    except SystemExit as leaving:
        return leaving.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def train(folder: Path, **settings) -> int:
    return command(*flags(TINY | dict(run_dir=folder) | settings))


def in_brief(monkeypatch):
    """Leaves out what takes long and is looked at elsewhere: two evaluation episodes at a time, and no pictures."""
    play = ppo_mbrl.play
    briefly = lambda act, env_id, episodes, *rest, **more: play(act, env_id, min(episodes, 2), *rest, **more)  # noqa: E731
    monkeypatch.setattr(ppo_mbrl, "play", briefly)
    monkeypatch.setattr(ppo_mbrl, "draw_training", lambda *_: None)
    monkeypatch.setattr(ppo_mbrl, "draw_diagnosis", lambda *_: None)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clocks(thing):
    if isinstance(thing, list):
        return [without_clocks(x) for x in thing]
    return {name: value for name, value in thing.items() if name not in ("wall_s", "cpu_s")}


def fingerprint(folder: Path) -> tuple:
    """All that a run found out: the policy's SHA-256, the metrics and the summary but for the clocks."""
    digest = hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest()
    return digest, without_clocks(rows_of(folder)), without_clocks(summary_of(folder))


# ------------------------------------------------------------------------------------------------------ every flag, every mode


def check(folder: Path, steps: int = 90):
    summary, rows = summary_of(folder), rows_of(folder)
    assert summary["status"] == "finished" and summary["real_steps"] == steps == rows[-1]["real_steps"]
    numbers = [value for row in rows for value in row.values() if value is not None]
    assert len(rows) >= 2 and all(math.isfinite(x) for x in numbers)
    assert all(torch.isfinite(x).all() for x in load_file(folder / "policy.safetensors").values() if x.is_floating_point())


VARIANTS = dict(
    wm_target=["direct", "delta", "ode"],
    wm_likelihood=["gaussian", "squared", "absolute"],
    wm_memory=["none", "gru"],
    uncertainty=["none", "ensemble", "autoencoder", "both"],
    uncertainty_use=["end", "penalise"],
    wm_heads=["sa", "sas"],
    wm_ending=["member", "mean", "agree"],
    wm_ensemble=[1, 3],
)


def pairs(choice: dict) -> set:
    return set(itertools.combinations(choice.items(), 2))


def covering(variants: dict) -> list[dict]:
    """A few combinations among which every pair of choices occurs: greedily, always the candidate with most pairs not seen yet."""
    rng = random.Random(0)
    missing = {pair for values in itertools.product(*variants.values()) for pair in pairs(dict(zip(variants, values)))}
    chosen = []
    while missing:
        candidates = [{name: rng.choice(values) for name, values in variants.items()} for _ in range(300)]
        chosen.append(max(candidates, key=lambda c: len(pairs(c) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize("choice", covering(VARIANTS), ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_pair_of_variants_of_the_model_runs(choice, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, **choice) == 0
    check(tmp_path)
    assert rows_of(tmp_path)[-1]["imagined_steps"] == 4 * 8 * 5  # rounds in two iterations, dreams, steps


@pytest.mark.parametrize(
    "choice",
    [
        dict(mode="ppo", total_steps=90, num_envs=1),
        dict(mode="ppo", total_steps=180, num_envs=3, temperature=2.0, temperature_end=0.5),
        dict(mode="mpc"),
        dict(mode="mpc", wm_memory="gru", wm_target="ode", num_envs=3),
        dict(horizon=0, horizon_max=12),
        dict(realign=2),
        dict(gather_temperature=0.01, gather_greedy=0.0, gather_limit=7, caution=0.0, renew_growth=0.0, grounding=0.0),
        dict(temperature_end=0.3),
        dict(wm_newest=40),
        dict(num_envs=3, wm_newest=20, beginnings=0.0, rare=0.0),
        dict(wm_binary=False, wm_margin=0.0, wm_autoencoder_window=9, uncertainty="autoencoder"),
        dict(wm_updates=0),
        dict(gamma=1.0, good_gamma=1.0, gae_lambda=1.0, good_lambda=0.0, entropy_coef=0.0, clip=0.0, wm_layers=1),
        dict(gather_limit=0, beginnings=1.0, rare=0.0),
    ],
    ids=lambda choice: " ".join(flags(choice)),
)
def test_every_mode_and_the_other_flags_run(choice, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, **choice) == 0
    steps = choice.get("total_steps", 90)
    check(tmp_path, steps)


# ------------------------------------------------------------------------------------------------------------- what is counted


def counting(monkeypatch) -> dict:
    """Counts the real steps of training: every step of CartPole itself, but not those of evaluations."""
    count, step, play = dict(steps=0, playing=False), CartPoleEnv.step, ppo_mbrl.play

    def counted(self, action):
        count["steps"] += not count["playing"]
        return step(self, action)

    def played(*args, **kwargs):
        count["playing"] = True
        try:
            return play(*args, **kwargs)
        finally:
            count["playing"] = False

    monkeypatch.setattr(CartPoleEnv, "step", counted)
    monkeypatch.setattr(ppo_mbrl, "play", played)
    return count


@pytest.mark.parametrize(
    "mode, num_envs, total, repeat",
    [("simple", 1, 90, 1), ("simple", 3, 100, 1), ("simple", 2, 150, 3), ("ppo", 4, 150, 1), ("ppo", 4, 150, 2), ("mpc", 1, 80, 2)],
)
def test_the_summary_tells_how_often_the_environment_was_stepped(mode, num_envs, total, repeat, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    count = counting(monkeypatch)
    assert train(tmp_path, mode=mode, num_envs=num_envs, total_steps=total, eval_every=30, action_repeat=repeat) == 0
    assert summary_of(tmp_path)["real_steps"] == count["steps"] == rows_of(tmp_path)[-1]["real_steps"]
    assert total <= count["steps"] < total + num_envs * repeat


def test_dreams_and_updates_take_no_real_step(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    count, calls = counting(monkeypatch), []

    def still(owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            before = count["steps"]
            result = function(*args, **kwargs)
            calls.append((name, count["steps"] - before))
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((world_model.Dream, "reset"), (world_model.Dream, "step"), (ppo_mbrl, "ppo_update"), (ppo_mbrl, "fit")):
        still(owner, name)
    assert train(tmp_path) == 0
    assert count["steps"] == 90 and {taken for _, taken in calls} == {0}
    assert [sum(name == called for called, _ in calls) for name in ("reset", "step", "ppo_update", "fit")] == [2, 20, 4, 2]


@pytest.mark.parametrize(
    "caution, ended, latest, good, charged, gamma, gae_lambda",
    [
        (0.0, 0.25, [], 0.0, 1.0, 0.98222, 0.8),  # endings count in full; 1 - 0.1^(1/4) 0.01^(3/4)
        (1.0, 0.25, [False], 0.0, 0.25, 0.98222, 0.8),  # a quarter of the steps came to an end
        (1.0, 0.75, [False], 0.0, 0.75, 0.94377, 0.8),  # 1 - 0.1^(3/4) 0.01^(1/4)
        (1.0, 0.25, [False, True], 0.5, 0.5, 0.98222, 0.7),
        (3.0, 0.25, [False, True], 0.5, 1.5, 0.98222, 0.7),  # more than in full
        (3.0, 0.25, [False], 0.0, 0.25, 0.98222, 0.8),
        (1.0, 0.25, [True, False] + [True] * 9, 0.9, 0.9, 0.98741, 0.62),  # the latest ten; 1 - 0.1^0.1 0.01^0.9
        (1.0, 0.0, [False, True], 0.5, 0.5, 0.99, 0.7),  # nothing ends any more
    ],
)
def test_the_schedule_follows_how_real_episodes_end(caution, ended, latest, good, charged, gamma, gae_lambda):
    s = Settings(action_repeat=1, caution=caution, gamma=0.9, good_gamma=0.99, gae_lambda=0.8, good_lambda=0.6, grounding=3.0)
    found = Schedule.of(fates(ended, latest, (0, 1)), s)
    assert found[:5] == pytest.approx((good, charged, gamma, gae_lambda, 3 * good), abs=1e-5)


@pytest.mark.parametrize(
    "ended, latest, rates, fine, stuck",
    [
        (0.0, [], (0, 1), 1.0, False),  # an environment without endings
        (0.0, [], (1, 1), 0.0, True),
        (0.0, [], (math.nan, 1), 0.0, True),
        (0.0, [False] * 2 + [True] * 10, (1, 1), 1.0, False),  # nothing to shun: a pole that is balanced for good
        (0.45, [False], (0, 1), 0.0, True),  # hovering
        (0.55, [False], (0, 1), 0.0, False),
        (0.1, [False, True], (1, 0), 0.5, False),
        (0.9, [False, False], (0, 1), 0.0, False),  # still learning how to crash
        (0.9, [False, False], (1, 1), 0.0, True),
        (0.9, [False, False], (math.nan, 0), 0.0, False),  # nothing to compare with yet
        (0.9, [True] + [False] * 9, (1, 0), 0.1, False),
        (0.9, [True] + [False] * 10, (1, 0), 0.0, True),  # the latest ten
    ],
)
def test_an_agent_is_stuck_if_nothing_is_good_and_nothing_gets_better(ended, latest, rates, fine, stuck):
    schedule = Schedule.of(fates(ended, latest, rates, asked=250), Settings(action_repeat=4).per_action())
    assert (schedule.fine, schedule.stuck) == (pytest.approx(fine), stuck)
    assert schedule.good == (schedule.fine if latest else 0)


def fates(ended: float, latest: list, rates: tuple, asked: int = 1000):
    """Stands in for a replay: how real episodes went, and how the reward grew."""
    return types.SimpleNamespace(
        share_ended=lambda latest: {asked: ended}[latest],
        finished=lambda limit, action_repeat: {600 // action_repeat: torch.tensor(latest).bool()}[limit],
        reward_rates=lambda latest: {asked: rates}[latest],
    )


@pytest.mark.parametrize("mirror", [True, False])
def test_real_steps_are_learned_from_beside_their_images_and_counted_once(mirror, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    learned = {}
    for name, at in dict(fit=2, measure=1, Dream=1, real_returns=1).items():
        original = getattr(ppo_mbrl, name)

        def told(*given, name=name, original=original, at=at):
            learned.setdefault(name, []).append(tuple(given[at].age.shape))
            return original(*given)

        monkeypatch.setattr(ppo_mbrl, name, told)
    assert train(tmp_path, warmup_steps=300, total_steps=360, mirror=mirror) == 0
    assert [row["real_steps"] for row in rows_of(tmp_path)] == [0, 300, 330, 360]
    shapes = [(300, 1 + mirror), (330, 1 + mirror), (360, 1 + mirror)]
    assert learned["fit"] == learned["measure"] == learned["Dream"] == shapes
    assert learned["real_returns"] == [shapes[0]] * 3 + shapes[1:]  # three rounds for an agent that begins


@pytest.mark.parametrize("grounding", [0.0, 0.7])
def test_dreams_charge_what_is_due_and_learn_as_the_schedule_says(grounding, monkeypatch):
    ended = torch.tensor([[False], [True], [True]])
    rollout = Rollout(
        torch.zeros(3, 1, 2), torch.zeros(3, 1).long(), torch.tensor([[-2.0], [5.0], [-100.0]]), torch.zeros(3, 1, 2), ended, ended
    )
    given, real, replay = [], (torch.zeros(1, 2), torch.zeros(1)), types.SimpleNamespace(usual=lambda action_repeat: -2.0)
    update = lambda agent, optimizer, rollout, s, *rest: given.append((rollout.rewards[:, 0].tolist(), s, rest[-1])) or {}  # noqa: E731
    grounds = lambda agent, replay, charge, s: real if charge(rollout).rewards[2] == -25 else None  # noqa: E731
    for name, stand_in in dict(collect=lambda *_: rollout, ppo_update=update, real_returns=grounds).items():
        monkeypatch.setattr(ppo_mbrl, name, stand_in)
    monkeypatch.setattr(ppo_mbrl, "Dream", lambda *_: types.SimpleNamespace(disagreement=0.0))
    run = types.SimpleNamespace(settings=Settings(), temperature=float, tick=None, imagined_steps=0)
    schedule = Schedule(good=0.0, caution=0.25, gamma=0.5, gae_lambda=0.6, grounding=grounding, fine=0.0, stuck=False)
    log = ppo_mbrl.dream_and_improve(run, None, None, None, replay, lambda rewards: rewards, schedule, 2)
    assert len(given) == 2 and run.imagined_steps == 6
    assert log["dream/return_mean"] == pytest.approx(-97 / 2)  # the log tells the whole loss
    assert log["dream/positive_end_share"] == log["dream/negative_end_share"] == 0.5  # 5 is more than the median, -2
    for rewards, used, seen in given:
        assert rewards == [-2.0, 5.0, -25.0] and seen is (real if grounding else None)
        assert (used.gamma, used.gae_lambda, used.grounding) == (0.5, 0.6, grounding)


@pytest.mark.parametrize("stuck, reset_from, times", [(True, 0, [90, 120]), (True, 100, [90]), (False, 0, [])])
def test_an_agent_that_is_stuck_begins_anew_whenever_the_data_has_grown(stuck, reset_from, times, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    monkeypatch.setattr(Schedule, "of", lambda replay, s: Schedule(0.0, 1.0, 0.9, 0.9, 0.0, 1.0, stuck))
    left, leave = [], ppo_mbrl.Environments.leave
    monkeypatch.setattr(ppo_mbrl.Environments, "leave", lambda env: left.append(env.real_steps) or leave(env))
    assert train(tmp_path, total_steps=180, renew_growth=0.4, reset_from=reset_from) == 0
    assert left == [60, *times]  # who begins is tried from the beginning of an episode
    rows = rows_of(tmp_path)[1:]
    assert [row["real_steps"] for row in rows] == [60, 90, 120, 150, 180]
    # the data has grown at 60 x 1.4 = 84, 118, and at 165: too late for a run of 180
    assert [row["real_steps"] for row in rows if row["dream/anew"]] == times and not any(row["wm/anew"] for row in rows)
    imagined = np.diff([0] + [row["imagined_steps"] for row in rows])
    assert imagined.tolist() == [40 * (3 if row["real_steps"] in (60, *times) else 1) for row in rows]


@pytest.mark.parametrize(
    "fine, reset_from, times",
    [
        (0.0, 100, [120, 150]),
        (0.3, 90, [90, 150]),
        (0.0, 60, [90, 120]),
        (0.4, 100, [120, 150]),  # less than 1 - 2/3 100/120 = 0.44
        (0.5, 100, [150]),  # less than 0.56
        (0.6, 100, []),
        (0.0, 0, []),
    ],
)
def test_model_and_agent_begin_anew_as_the_data_grows_until_episodes_are_good(fine, reset_from, times, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    did = []

    def told(name, what):  # each step of an iteration, in order
        original = getattr(ppo_mbrl, name)
        monkeypatch.setattr(ppo_mbrl, name, lambda *given, **more: did.append(what(*given)) or original(*given, **more))

    monkeypatch.setattr(Schedule, "of", lambda replay, s: Schedule(0.5, 1.0, 0.9, 0.9, 0.0, fine, False))
    told("gather", lambda run, *_: run.real_steps + 30)
    told("renew", lambda optimizer, fresh: f"{type(fresh).__name__} anew")
    told("fit", lambda model, optimizer, replay, updates, *_: f"fitted {updates} times")
    told("dream_and_improve", lambda *given: f"dreamed {given[-1]} times")
    leave = ppo_mbrl.Environments.leave
    monkeypatch.setattr(ppo_mbrl.Environments, "leave", lambda env: did.append("left") or leave(env))
    # with --renew-growth 0.4 the data has grown at 140 and 196, at 126 and 176.4, or at 84, 118 and 165; from 240 / 1.4 = 171 on it is too late
    more = dict(total_steps=240, renew_growth=0.4, reset_from=reset_from, reset_updates=7, reset_rounds=4, wm_first_updates=9, wm_updates=5)
    assert train(tmp_path, **more, rounds=2) == 0
    expected = [30, "fitted 9 times", "left", "dreamed 6 times"]
    for steps in range(90, 241, 30):
        if steps in times:
            expected += [steps, "WorldModel anew", "fitted 7 times", "Agent anew", "left", "dreamed 4 times"]
        else:
            expected += [steps, "fitted 5 times", "dreamed 2 times"]
    assert did == expected
    assert [row["real_steps"] for row in rows_of(tmp_path)[1:] if row["wm/anew"] and row["dream/anew"]] == times


@pytest.mark.parametrize(
    "num_steps, growth, expected", [(30, 9.0, [60, 90, 120, 150]), (30, 0.25, [60, 75, 94, 118, 148]), (10, 0.25, [60, 70, 80, 90])]
)
def test_data_grows_by_a_share_of_itself_up_to_a_limit(num_steps, growth, expected, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=150, num_steps=num_steps, growth=growth) == 0
    assert [row["real_steps"] for row in rows_of(tmp_path)][1 : len(expected) + 1] == expected


@pytest.mark.parametrize("mode", ["simple", "ppo", "mpc"])
def test_how_often_a_run_is_evaluated_changes_nothing_but_the_log(mode, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    for name, every in (("often", 1), ("seldom", 100_000)):
        assert train(tmp_path / name, mode=mode, total_steps=150, eval_every=every) == 0
    often, seldom = rows_of(tmp_path / "often"), rows_of(tmp_path / "seldom")
    assert sum("eval/return_mean" in row for row in often) > sum("eval/return_mean" in row for row in seldom)
    assert fingerprint(tmp_path / "often")[0] == fingerprint(tmp_path / "seldom")[0]


# ------------------------------------------------------------------------------------------------------- twice, and interrupted


def interrupted_after(monkeypatch, ticks: int):
    """A signal arrives at the so-manieth tick."""
    tick, left = Run.tick, [ticks]

    def counted(run):
        left[0] -= 1
        if left[0] == 0:
            run.on_signal(signal.SIGTERM, None)
        tick(run)

    monkeypatch.setattr(Run, "tick", counted)
    return left


RUNS = {
    "simple": dict(total_steps=180, gather_limit=25),
    "stuck": dict(env_id="MountainCar-v0", total_steps=180, gather_limit=25, renew_growth=0.5),  # nothing ends: the agent begins anew
    "reset": dict(
        env_id="MountainCar-v0",
        total_steps=300,
        gather_limit=25,
        renew_growth=0.4,
        reset_from=150,
        reset_updates=5,
        reset_rounds=2,
        num_envs=2,
        wm_memory="gru",
        uncertainty="both",
    ),
    "gru and both": dict(
        total_steps=180, wm_memory="gru", uncertainty="both", num_envs=2, gather_temperature=0.5, gather_limit=25, realign=3
    ),
    "ppo": dict(mode="ppo", num_envs=3, total_steps=540, temperature_end=0.5),
    "mpc": dict(mode="mpc", total_steps=150),
    "repeated actions": dict(action_repeat=3, env_id="LunarLander-v3", total_steps=500, warmup_steps=200, num_steps=100, num_envs=2),
    "ppo, repeated actions": dict(mode="ppo", action_repeat=2, num_envs=3, total_steps=540),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_same_command_twice_learns_the_same_and_another_seed_does_not(kind, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        assert train(tmp_path / name, seed=seed, **RUNS[kind]) == 0
    one, two, three = (fingerprint(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one[0] != three[0]
    if kind in ("stuck", "reset"):
        imagined = [row["imagined_steps"] for row in rows_of(tmp_path / "one")]
        assert (2 * 40 in np.diff(imagined)) == (kind == "reset")
        assert np.diff(imagined).tolist().count(3 * 40) > 1 and 40 in np.diff(
            imagined
        )  # thrice the rounds where the agent alone began anew


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(kind, tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    finish, during = Run.finish, []
    with monkeypatch.context() as patch:
        left = interrupted_after(patch, 10**9)
        patch.setattr(Run, "finish", lambda run: during.append(10**9 - left[0]) or finish(run))
        assert train(tmp_path / "whole", eval_every=60, **RUNS[kind]) == 0

    def killed(run):
        raise ppo_mbrl.Interrupted(signal.SIGKILL)  # leaves the end for later

    rng, interruptions, ticks = random.Random(kind), 0, during[0]
    for moments in [(1, ticks // 4), (ticks // 2, ticks), (1, ticks // 8), (1, ticks // 4), (1, ticks // 3), (1, ticks // 3)]:
        with monkeypatch.context() as patch:
            interrupted_after(patch, rng.randrange(*moments))
            patch.setattr(Run, "finish", killed)
            patch.setattr(Run, "summarise", lambda *_: None)
            interruptions += train(tmp_path / "torn", eval_every=60, **RUNS[kind]) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert train(tmp_path / "torn", eval_every=60, **RUNS[kind]) == 0
    assert interruptions >= 3 and ", from real step " in capsys.readouterr().out
    assert fingerprint(tmp_path / "torn") == fingerprint(tmp_path / "whole")


def test_off_a_terminal_lines_say_what_is_left_once_that_can_be_told(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    lines = [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert lines[0] == "0 %" and lines[-1] == "100 %"
    assert [line.split(",")[0] for line in lines[1:-1]] == ["67 %"] and all(line.endswith(" s left") for line in lines[1:-1])


@pytest.mark.parametrize(
    "first, others, episodes, solved", [(199, 300, 20, None), (200, 200, 100, 123), (300, 174, 100, None), (300, 175, 100, 123)]
)
def test_twenty_episodes_are_evaluated_and_eighty_more_where_these_reach_the_threshold(first, others, episodes, solved):
    played = []

    def play(number: int, seed: int) -> Scores:
        seeds = np.arange(seed, seed + number)
        played.extend(seeds)
        return Scores(np.where(seeds < 10_020, first, others), seeds, seeds % 4 == 0)

    run = types.SimpleNamespace(phase=str, play=play, threshold=200.0, steps_to_solve=None, real_steps=123)
    row = Run.evaluation(run)
    assert row["eval/episodes"] == episodes and run.steps_to_solve == solved
    assert played == [*range(10_000, 10_000 + episodes)]
    assert row["eval/length_mean"] == 10_000 + (episodes - 1) / 2 and row["eval/timeout_share"] == 0.25
    assert row["eval/return_mean"] == (first * 20 + others * (episodes - 20)) / episodes
    run.real_steps = 456
    assert Run.evaluation(run) == row and run.steps_to_solve == solved


def test_the_temperature_stops_at_its_end_where_the_last_steps_of_many_environments_go_beyond_it():
    run = types.SimpleNamespace(settings=Settings(temperature=1.0, temperature_end=0.001, total_steps=20_000, num_envs=64))
    for steps, expected in ((0, 1.0), (10_000, 0.5005), (20_000, 0.001), (20_063, 0.001)):
        run.real_steps = steps
        assert Run.temperature(run) == pytest.approx(expected)


def test_evaluations_on_the_cpu_do_not_wake_a_gpu(monkeypatch):
    def wake(*_):
        raise AssertionError("CUDA was asked for its random state")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", wake)
    before = torch.get_rng_state()
    scores = ppo_mbrl.play(lambda obs: torch.randint(2, (len(obs),)), "CartPole-v1", 3, 7, 1)
    again = ppo_mbrl.play(lambda obs: torch.randint(2, (len(obs),)), "CartPole-v1", 3, 7, 1)
    assert (scores.returns == again.returns).all() and torch.equal(before, torch.get_rng_state())


def test_an_interrupted_run_says_so(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 100)
        assert train(tmp_path) == 128 + signal.SIGTERM
    assert "The same command goes on from there" in capsys.readouterr().out
    assert summary_of(tmp_path)["status"] == "interrupted" and summary_of(tmp_path)["final_return_mean"] is None
    assert train(tmp_path) == 0 and summary_of(tmp_path)["status"] == "finished"


def test_a_run_interrupted_in_its_last_evaluation_is_finished_the_next_time(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        finish = Run.finish
        patch.setattr(Run, "finish", lambda run: run.on_signal(signal.SIGTERM, None) or finish(run))
        assert train(tmp_path / "torn") == 128 + signal.SIGTERM
    assert train(tmp_path / "torn") == 0
    assert fingerprint(tmp_path / "torn") == fingerprint(tmp_path / "whole")


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_nothing_changes(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert train(tmp_path) == 0
    assert "finished already" in capsys.readouterr().out and contents(tmp_path) == before


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "a", total_steps=120) == 0 and train(tmp_path / "a", total_steps=180) == 0
    assert train(tmp_path / "b", total_steps=180) == 0
    assert summary_of(tmp_path / "a")["real_steps"] == 180
    assert fingerprint(tmp_path / "a")[0] == fingerprint(tmp_path / "b")[0]


def test_fresh_begins_anew_and_leaves_other_files_alone(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, hidden=16, fresh=True) == 0
    assert len(rows_of(tmp_path)) == len(before[1]) and fingerprint(tmp_path)[0] != before[0]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def flip_a_byte(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=150) == 0
    before, checkpoints = fingerprint(tmp_path), sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(checkpoints) == 2
    flip_a_byte(checkpoints[-1])
    capsys.readouterr()
    assert train(tmp_path, total_steps=150) == 0
    said = capsys.readouterr().out
    assert f"{checkpoints[-1].name} is damaged" in said and "from real step 120" in said
    assert fingerprint(tmp_path) == before


def test_damaged_checkpoints_are_never_deleted_unasked(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=150) == 0
    for path in (tmp_path / "checkpoint").glob("*.safetensors"):
        flip_a_byte(path)
    before = contents(tmp_path)
    capsys.readouterr()
    assert train(tmp_path, total_steps=150) == 2
    assert capsys.readouterr().err.startswith("Error: Every checkpoint in")
    after = contents(tmp_path)
    assert {name: data for name, data in after.items() if name.name != "env.json"} == {
        n: d for n, d in before.items() if n.name != "env.json"
    }
    assert train(tmp_path, total_steps=150, fresh=True) == 0


def test_checkpoints_hold_numbers_and_text_only(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    newest = sorted((tmp_path / "checkpoint").glob("*.safetensors"))[-1]
    with safe_open(newest, "pt") as file:
        state = json.loads(file.metadata()["state"])
        assert state["real_steps"] == 90 and len(list(file.keys())) > 20
    assert json.loads(newest.with_suffix(".json").read_text())["sha256"] == hashlib.sha256(newest.read_bytes()).hexdigest()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json", ".jsonl"}


def test_a_number_that_is_not_finite_ends_the_run_with_status_3(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_mbrl, "ppo_update", lambda *_: {"ppo/value_loss": math.nan})
        assert train(tmp_path, total_steps=120) == 3
    assert "ppo/value_loss" in capsys.readouterr().out and summary_of(tmp_path)["status"] == "diverged"
    assert rows_of(tmp_path)[-1]["real_steps"] == 90


# ------------------------------------------------------------------------------------------------- the finished run, looked at


def test_a_run_leaves_pictures_and_its_policy_can_be_evaluated_recorded_and_rebuilt(tmp_path, capsys):
    from PIL import Image, ImageSequence

    folder = tmp_path / "run"
    assert train(folder, warmup_steps=400, num_steps=100, total_steps=500) == 0
    for name in ("training", "reward_histogram", "dreams", "map"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 500 and len(picture.convert("L").getcolors(1000)) > 20
    capsys.readouterr()

    assert command("evaluate", folder, "--episodes", 7, "--seed", 123, "--json", "--gif", tmp_path / "cart.gif") == 0
    result = json.loads(capsys.readouterr().out)
    tensors = load_file(folder / "policy.safetensors")
    returns, obs_seen = [], []
    for seed in range(123, 130):
        env, total, over = gym.make("CartPole-v1"), 0.0, False
        obs, _ = env.reset(seed=seed)
        while not over:
            obs_seen.append(obs)
            obs, reward, terminated, truncated, _ = env.step(rebuilt(tensors, obs))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert result["returns"] == returns and result["episodes"] == 7 and result["env_id"] == "CartPole-v1"
    assert result["return_mean"] == pytest.approx(np.mean(returns)) and result["return_std"] == pytest.approx(np.std(returns))
    settings, act = ppo_mbrl.load_policy(folder)
    assert ppo_mbrl.play(act, settings.env_id, 7, 123, settings.action_repeat).returns.tolist() == returns
    assert act(torch.tensor(np.array(obs_seen))).tolist() == [rebuilt(tensors, obs) for obs in obs_seen]
    with Image.open(tmp_path / "cart.gif") as gif:
        assert gif.format == "GIF" and gif.size == (300, 200)
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]  # pictures that are alike are one, shown for longer
    assert sum(shown) == 60 * math.ceil(returns[0] / 3)

    assert command("evaluate", folder, "--episodes", 3) == 0
    assert "over 3 episodes" in capsys.readouterr().out


def rebuilt(tensors: dict, obs) -> int:
    """The greedy action by nothing but the tensors in the file."""
    x = (torch.as_tensor(obs) - tensors["normaliser.mean"]) / tensors["normaliser.std"]
    for layer in ("0", "2", "4"):
        x = tensors[f"actor.{layer}.weight"] @ x + tensors[f"actor.{layer}.bias"]
        x = x.tanh() if layer != "4" else x
    return int(x.argmax())


def test_a_planning_model_can_be_evaluated(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path, mode="mpc") == 0
    capsys.readouterr()
    assert command("evaluate", tmp_path, "--episodes", 2, "--json") == 0
    returns = json.loads(capsys.readouterr().out)["returns"]
    assert len(returns) == 2 and np.mean(returns) == summary_of(tmp_path)["final_return_mean"]


def test_the_diagnosis_of_a_run_tells_where_the_model_is_wrong(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, warmup_steps=1600, total_steps=1630) == 0
    words = [sys.executable, SCRIPTS / "world_model.py", "--updates", "150", "--wm-target", "ode", "--wm-updates", "5", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Without effect outside a run: wm_updates." in done.stdout
    result = json.loads((tmp_path / "world_model" / "diagnosis.json").read_text())
    assert 0 < result["error_by_horizon"]["1"] < result["error_by_horizon"]["20"]
    assert sum(part["steps"] for part in result["reward_error_by_size"].values()) == result["endings"]["steps"]
    assert 0 < result["endings"]["real"] < result["endings"]["steps"] and result["endings"]["expected"] > 0
    assert (tmp_path / "world_model" / "map.png").exists() and len(result["error_by_place"]) > 3


def test_the_diagnosis_takes_the_newest_checkpoint_that_is_good(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path, total_steps=180) == 0
    older, newest = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    expected = len(world_model.load_replay(tmp_path, 2, 0)) - 30
    newest.write_bytes(b"damaged")
    assert len(world_model.load_replay(tmp_path, 2, 0)) == expected
    older.unlink()
    with pytest.raises(world_model.UsageError, match="holds no real steps"):
        world_model.load_replay(tmp_path, 2, 0)


class Corridor(gym.Env):
    """Six places in a row, observed as flags only; the last one ends the episode."""

    observation_space, action_space = gym.spaces.Box(0, 1, (6,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(3))
        return np.eye(6, dtype=np.float32)[self.place], {}

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        return np.eye(6, dtype=np.float32)[self.place], float(self.place == 5), self.place == 5, False, {}


def test_an_environment_of_flags_only_is_modelled_and_drawn(tmp_path, capsys):
    gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=30)
    assert train(tmp_path, env_id="Corridor-v0", warmup_steps=400, total_steps=430) == 0
    assert "Corridor-v0 does not say which return solves it; 200 is taken." in capsys.readouterr().out
    check(tmp_path, 430)
    assert (tmp_path / "map.png").exists()


# ------------------------------------------------------------------------------------------------------------------- settings


def test_defaults_of_the_mode_come_first_then_the_file_then_the_flags(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(mode="ppo", gamma=0.5, lr=0.1)))
    s = Settings.resolve(dict(config=str(path), lr=0.2))
    assert (s.mode, s.gamma, s.lr, s.num_envs, s.hidden) == ("ppo", 0.5, 0.2, 16, 64)
    assert Settings.resolve({}).num_envs == 1 and Settings.resolve(dict(config=str(path), mode="simple")).num_envs == 1


def test_a_run_can_be_repeated_from_its_settings_file(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path / "a", wm_target="ode", seed=5) == 0
    assert command("--config", tmp_path / "a" / "config.json", "--run-dir", tmp_path / "b") == 0
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_a_run_is_named_after_what_differs_from_the_defaults():
    name = lambda **given: str(Settings.resolve(given).folder())  # noqa: E731
    assert name() == "runs/LunarLander-v3/simple/seed_0"
    assert name(mode="ppo", seed=3, total_steps=5) == "runs/LunarLander-v3/ppo/seed_3"
    assert name(wm_target="ode", gamma=0.99) == "runs/LunarLander-v3/simple_wm_target=ode/seed_0"
    assert name(mode="ppo", gamma=0.99) == "runs/LunarLander-v3/ppo_gamma=0.99/seed_0"


# ------------------------------------------------------------------------------------------------------------------ bad input


BAD = {
    "unknown environment": (dict(env_id="Nonsense-v0"), "Nonsense"),
    "no such version": (dict(env_id="CartPole-v99"), "CartPole-v99"),
    "not a name": (dict(env_id="a b//c"), "a b//c"),
    "continuous actions": (dict(env_id="Pendulum-v1"), "Discrete actions"),
    "gamma": (dict(gamma="nan"), "--gamma must be between 0 and 1, not nan"),
    "lr": (dict(lr=-1), "--lr must be between"),
    "infinite": (dict(wm_lr="inf"), "--wm-lr must be between"),
    "no steps": (dict(total_steps=0), "--total-steps must be between 1 and"),
    "seed": (dict(seed=-1), "--seed must be between"),
    "huge seed": (dict(seed=10**400), "--seed must be between"),
    "device": (dict(device="nonsense"), "--device nonsense can't be used"),
    "shares": (dict(beginnings=0.8, rare=0.4), "more than 1"),
    "no config": (dict(config="/nowhere/x.json"), "can't be read as JSON"),
}


@pytest.mark.parametrize("bad, part", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_exit_status_2(bad, part, tmp_path, capsys):
    assert train(tmp_path / "run", **bad) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and part in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words", [["--mode", "magic"], ["--num-envs", "two"], ["--no-such-flag", "1"], ["evaluate"], ["evaluate", "x", "--episodes", 0]]
)
def test_what_cant_be_parsed_is_refused_with_the_usage(words, capsys):
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert "Usage: ppo_mbrl.py" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"gama": 0.9}', "did you mean 'gamma'?"),
        ('{"zzzzzz": 1}', "unknown setting 'zzzzzz'"),
        ('{"gamma": "0.9"}', "--gamma must be a number"),
        ('{"mode": "magic"}', "--mode must be one of ppo, simple, mpc"),
        ('{"mode": ["ppo"]}', "--mode must be one of ppo, simple, mpc"),
        ('{"lr": NaN}', "--lr must be between"),
        ('{"hidden": true}', "--hidden must be a whole number"),
        ("[1]", "one JSON object"),
        ("{", "can't be read as JSON"),
    ],
)
def test_a_bad_settings_file_is_told_from_a_good_one(text, part, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert command("--config", path, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and part in error
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_settings_is_refused_and_left_alone(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert train(tmp_path, gamma=0.5, wm_target="ode", seed=1) == 2
    error = capsys.readouterr().err
    for part in ("gamma was 0.99 and is now 0.5", "wm_target was 'delta' and is now 'ode'", "seed was 0 and is now 1"):
        assert part in error
    assert error.count(" was ") == 3 and contents(tmp_path) == before
    shutil.rmtree(tmp_path / "checkpoint")
    before = contents(tmp_path)
    assert train(tmp_path, gamma=0.5) == 2 and "gamma was 0.99 and is now 0.5" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_the_agent_keeps_the_normaliser_of_the_first_fit(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    for steps in (90, 150):  # the second run goes on from the first
        assert train(tmp_path, total_steps=steps) == 0
        seen = load_file(tmp_path / "policy.safetensors")
        if steps == 90:
            first = seen
        model = load_file(sorted((tmp_path / "checkpoint").glob("*.safetensors"))[-1])
        assert not torch.equal(model["model.obs_scale.mean"], seen["normaliser.mean"])  # the model's own moves on
    assert torch.equal(first["normaliser.mean"], seen["normaliser.mean"]) and torch.equal(first["normaliser.std"], seen["normaliser.std"])


def test_folders_that_are_no_folders_are_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        assert train(path) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: Run folder") and error.count("\n") == 1
    assert file.read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"name": "something else"}')
    assert train(tmp_path / "other") == 2
    assert "config.json is not of a run of this kit" in capsys.readouterr().err
    assert (tmp_path / "other" / "config.json").read_text() == '{"name": "something else"}'


def test_two_processes_do_not_share_a_run_folder(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = open(tmp_path / "metrics.jsonl", "ab")
    fcntl.flock(other, fcntl.LOCK_EX)  # as another process would hold it
    assert train(tmp_path, total_steps=120) == 2
    assert "Another process is at work" in capsys.readouterr().err
    other.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train(tmp_path, total_steps=120) == 0


def test_fresh_deletes_nothing_that_is_not_a_runs_own(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path / "run") == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoint" / "best.pt").write_text("mine too")
    (tmp_path / "run" / "checkpoint" / "20260101.txt").write_text("mine as well")
    left = [
        tmp_path / "run" / name for name in ("world_model/diagnosis.json", "world_model/map.png", "tensorboard/events.out.tfevents.1.2")
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the old run")
    (tmp_path / "run" / "world_model" / "notes.txt").write_text("mine, too")
    assert train(tmp_path / "run", fresh=True, seed=9) == 0
    assert not any(path.exists() for path in left) and (tmp_path / "run" / "world_model" / "notes.txt").exists()
    for name in ("notes.txt", "checkpoint/best.pt", "checkpoint/20260101.txt"):
        assert (tmp_path / "run" / name).read_text().startswith("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"name": "something else"}')
    assert train(tmp_path / "other", fresh=True) == 2 and (tmp_path / "other" / "config.json").exists()


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train(tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "env.json").read_text())["commit"] is None


def test_the_commit_is_noted_and_that_files_differ_from_it(tmp_path, monkeypatch):
    commit = lambda: ppo_mbrl.surroundings(Settings())["commit"]  # noqa: E731
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
    script = tmp_path / "kit" / "ppo_mbrl.py"
    script.parent.mkdir()
    script.write_text("pass")
    monkeypatch.setattr(ppo_mbrl, "__file__", str(script))
    assert commit() is None  # no repository
    git("init")
    assert commit() is None  # no commit
    git("add", ".")
    git("-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "-m", "first")
    (tmp_path / "notes.txt").write_text("beside the kit")
    head = git("rev-parse", "HEAD")
    assert commit() == head and len(head) == 40
    script.with_name("my_idea.py").write_text("a fork")
    assert commit() == head + "-dirty"
    script.with_name("my_idea.py").unlink()
    script.write_text("1 / 0")
    assert commit() == head + "-dirty"


def test_what_cant_be_evaluated_is_told(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert command("evaluate", tmp_path / "nowhere") == 2
    assert "holds no policy that can be read" in capsys.readouterr().err
    assert train(tmp_path / "run") == 0
    capsys.readouterr()
    assert command("evaluate", tmp_path / "run", "--episodes", 1, "--gif", tmp_path / "nowhere" / "x.gif") == 2
    assert "must be a .gif in a folder that exists" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | dict(hidden=9)))
    assert command("evaluate", tmp_path / "run") == 2
    assert "does not fit its settings" in capsys.readouterr().err


def test_bad_input_in_a_shell_leaves_no_traceback():
    for script, words in (("ppo_mbrl.py", ["--env-id", "CarRacing-v3"]), ("world_model.py", ["nowhere"])):
        done = subprocess.run([sys.executable, SCRIPTS / script, *words], capture_output=True, text=True, timeout=60)
        lines = [line for line in done.stderr.splitlines() if line]
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("Error: ") and not done.stdout, done


def test_a_signal_in_a_shell_saves_and_leaves(tmp_path):
    words = flags(TINY | dict(run_dir=tmp_path, total_steps=10**6))
    process = subprocess.Popen([sys.executable, SCRIPTS / "ppo_mbrl.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with contextlib.suppress(StopIteration):
        while "dream/" not in next(process.stdout):
            pass
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "Interrupted; saved up to" in out and not error
    assert summary_of(tmp_path)["status"] == "interrupted" and sorted((tmp_path / "checkpoint").glob("*.json"))


# ------------------------------------------------------------------------------------------------------------------- learning


def final_score(folder: Path) -> float:
    settings, act = ppo_mbrl.load_policy(folder)
    return float(ppo_mbrl.play(act, settings.env_id, 20, 0, settings.action_repeat).returns.mean())


def test_ppo_learns_cartpole(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    words = dict(mode="ppo", env_id="CartPole-v1", num_steps=256, total_steps=40_000, run_dir=tmp_path)
    assert command(*flags(words)) == 0
    assert final_score(tmp_path) >= 400


def test_ppo_learns_cartpole_in_dreams(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    words = dict(mode="simple", env_id="CartPole-v1", warmup_steps=500, total_steps=1000, growth=0.25, wm_ensemble=3, run_dir=tmp_path)
    assert command(*flags(words)) == 0
    assert final_score(tmp_path) >= 400
