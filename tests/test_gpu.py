"""On a GPU: the same numbers as on the CPU, and no dream that waits for the host. Skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_mbrl import Agent, Settings, collect
from world_model import Dream, Replay, Rollout, WorldModel

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def made_up(device: str, **given):
    """A model and an agent with the same weights everywhere, and a replay of made-up steps."""
    torch.manual_seed(0)
    s = Settings.resolve(given)
    obs, next_obs = torch.randn(2, 60, 4, 3)
    steps = Rollout(obs, torch.randint(0, 2, (60, 4)), torch.randn(60, 4), next_obs, *(torch.rand(2, 60, 4) < 0.1))
    replay = Replay(4, 3, 10, device=device)
    replay.add(steps)
    model, agent = WorldModel(3, 2, s), Agent(3, 2, 64)
    model, agent = model.to(device), agent.to(device)
    model.adapt(replay)
    return s, replay, model, agent


def test_model_and_agent_say_what_they_say_on_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        _, replay, model, agent = made_up(device)
        obs, actions = replay.steps.obs[-1], replay.steps.actions[-1]
        x = model.features(obs, actions)
        hidden = torch.zeros(model.members, len(obs), 0, device=device)
        expected = model.transition(model.everyone(x), model.everyone(obs), hidden)
        outcome = model.outcome(model.everyone(x), model.everyone(obs) * 0.1, hidden)
        found.append([y.cpu() for y in (*expected, *outcome, agent.logits(obs), agent.value(obs))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [{}, dict(uncertainty="both", uncertainty_use="penalise"), dict(wm_memory="gru", wm_ending="mean")])
def test_a_dream_never_waits_for_the_host(given):
    s, replay, model, agent = made_up("cuda", **given)
    dream = Dream(model, replay, 64, s, beginnings=0.25, rare=0.25, horizon=5, realign=3)
    collect(dream, agent.act, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            dream.obs.sum().item()
        rollout = collect(dream, agent.act, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rollout.obs.isfinite().all() and (rollout.terminated | rollout.truncated).any()


def test_a_run_on_a_gpu_goes_from_end_to_end_and_its_policy_is_scored_on_the_cpu(tmp_path):
    small = (
        "--total-steps 300 --warmup-steps 200 --num-steps 50 --rounds 1 --wm-updates 10 --wm-first-updates 50 --dreams 20 --dream-steps 20"
    )
    command = [sys.executable, str(ROOT / "ppo_mbrl.py"), "--mode", "simple", "--env-id", "CartPole-v1", "--device", "cuda", *small.split()]
    for words in ([*command, "--run-dir", str(tmp_path / "run")], [*command[:2], "evaluate", str(tmp_path / "run"), "--episodes", "2"]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
