"""The published algorithm: each switch changes what it names, and with all of them turned the textbook's is left."""

import json
import math
import random
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from test_runs import counting, fingerprint, flags, in_brief, interrupted_after, rows_of, summary_of

import ppo_mbrl
import world_model
from world_model import Rollout, flatten

sys.path.insert(0, str(Path(__file__).parent.parent / "ablations"))
import as_published  # noqa: E402
import run as runner  # noqa: E402
import what_broke_it  # noqa: E402
from as_published import DEPARTURES, Data, Model, Settings, choose, dream  # noqa: E402
from rich.console import Console  # noqa: E402

TINY = dict(env_id="CartPole-v1", epochs=3, episodes=3, dream_steps=40, passes=2, minibatch=16, wm_passes=2, hidden=8, test_every=2)


def command(*words) -> int:
    """The command line in this process; returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        world_model.run_command(lambda: as_published.app([str(word) for word in words], prog_name="as_published.py"))
    except SystemExit as leaving:
        return leaving.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def train(folder, *words, **settings) -> int:
    return command(*flags(TINY | dict(run_dir=folder) | settings), *words)


def all_but(name: str) -> str:
    return ",".join(other for other in DEPARTURES if other != name)


class FakeRun:
    """What the algorithm asks of a run, without a folder."""

    def __init__(self, departures: str = "all", **settings):
        self.settings, self.way, self.iteration = Settings(**TINY | dict(departures=departures) | settings), choose(departures), 0
        self.real_steps = self.imagined_steps = 0
        self.tick = lambda: None


def parts_of(run: FakeRun):
    """An agent, a model and the data of a few episodes."""
    torch.manual_seed(0)
    envs = [gym.make(run.settings.env_id) for _ in range(run.settings.episodes)]
    agent = ppo_mbrl.Agent(4, 2, 8)
    data = Data(envs, run.way.replay)
    data.add(as_published.play_episodes(run, agent, envs, "data"))
    return agent, Model(4, 2, 8, run.way), data


def some_steps(n: int = 50, obs_dim: int = 3) -> Rollout:
    rng = torch.Generator().manual_seed(1)
    obs, change = torch.randn(n, obs_dim, generator=rng) * 3, torch.randn(n, obs_dim, generator=rng) / 5
    ends = torch.rand(n, generator=rng) < 0.2
    return Rollout(
        obs, torch.randint(4, (n,), generator=rng), torch.randn(n, generator=rng) * 9, obs + change, ends, torch.zeros_like(ends)
    )


def minibatch(B: int = 64) -> tuple:
    """obs, actions, old_logprobs, old_values, advantages, returns."""
    rng = torch.Generator().manual_seed(2)
    numbers = torch.randn(4, B, generator=rng)
    return torch.randn(B, 4, generator=rng), torch.randint(2, (B,), generator=rng), -numbers[0].abs(), *numbers[1:]


def loss_of(agent, obs, *batch, departures: str, **settings) -> dict[str, float]:
    """What `ppo_loss` says of an agent on a minibatch."""
    batch = [x.detach().numpy() for x in (agent.logits(obs), agent.value(obs), *batch)]
    info, _, _ = as_published.ppo_loss(*batch, Settings(**settings), choose(departures))
    return dict(zip(ppo_mbrl.PPO_INFO, info.tolist()))


# ------------------------------------------------------------------------------------------------------------ the departures


@pytest.mark.parametrize("name", DEPARTURES)
def test_each_switch_turns_one_departure_and_no_other(name):
    def turned(one, other):
        return [key for key in DEPARTURES if getattr(choose(one), key) is not getattr(choose(other), key)]

    assert turned("all", all_but(name)) == [name] == turned("", name)
    assert turned("all", "") == list(DEPARTURES)


@pytest.mark.parametrize("p, old", [(0.5, 0.25), (0.1, 0.9), (1.0, 1e-6)])
def test_the_published_ratio_is_that_of_probabilities_and_never_beyond_e(p, old):
    published, textbook = DEPARTURES["ratio"]
    assert published(math.log(p), math.log(old))[0] == pytest.approx(math.exp(p - old), rel=1e-5) and math.exp(p - old) <= math.e
    assert textbook(math.log(p), math.log(old))[0] == pytest.approx(p / old, rel=1e-5)


@pytest.mark.parametrize("departures, uniform_is_better", [("all", False), (all_but("entropy"), True)])
def test_the_published_loss_falls_with_the_entropy_and_the_textbooks_rises(departures, uniform_is_better):
    obs, actions, old, values, _, _ = minibatch()
    losses = []
    for sharpness in (0.0, 5.0):
        agent = ppo_mbrl.Agent(4, 2, 8)
        with torch.no_grad():
            agent.actor[-1].weight.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) * sharpness)
        same = torch.zeros(len(obs)), agent.value(obs).detach()  # equal advantages and no value error: entropy alone is left
        losses.append(loss_of(agent, obs, actions, old, same[1], *same, departures=departures, entropy_coef=1)["ppo/loss"])
    assert (losses[0] < losses[1]) == uniform_is_better


def test_the_published_value_clipping_does_nothing_and_the_textbooks_is_that_of_a_loop():
    agent, (obs, actions, old, values, advantages, returns) = ppo_mbrl.Agent(4, 2, 8), minibatch()
    value = agent.value(obs).tolist()
    loop = 0.0
    for v, o, r in zip(value, values.tolist(), returns.tolist()):
        loop += max((v - r) ** 2, (o + min(max(v - o, -0.3), 0.3) - r) ** 2) / len(obs) / 2
    plain = sum((v - r) ** 2 for v, r in zip(value, returns.tolist())) / len(obs) / 2
    batch = agent, obs, actions, old, values, advantages, returns
    found = [loss_of(*batch, departures=d, value_clip=0.3)["ppo/value_loss"] for d in ("all", all_but("clip"))]
    assert found == pytest.approx([plain, loop], rel=1e-5) and loop > 1.01 * plain


@pytest.mark.parametrize("departures, temperature", [("ratio", 2.0), ("ratio,temperature", 1.0)])
def test_the_published_ratio_forgets_the_temperature_at_which_actions_are_drawn(departures, temperature):
    agent, (obs, actions, *_) = ppo_mbrl.Agent(4, 2, 8), minibatch()
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        logprobs = agent.logprobs(obs, temperature).gather(-1, actions[:, None])[:, 0]
    zeros = torch.zeros(len(obs))
    log = loss_of(agent, obs, actions, logprobs, zeros, zeros, zeros, departures=departures, temperature=2.0)
    assert abs(log["ppo/approx_kl"]) < 1e-6  # no change of policy is seen at the temperature it should have
    other = agent.logprobs(obs, 3 - temperature).gather(-1, actions[:, None])[:, 0].detach()
    log = loss_of(agent, obs, actions, other, zeros, zeros, zeros, departures=departures, temperature=2.0)
    assert log["ppo/approx_kl"] > 1e-3


def test_the_published_replay_forgets_all_but_the_newest_episodes():
    kept = {}
    for name, keep in zip(("published", "textbook"), DEPARTURES["replay"]):
        data = Data([gym.make("LunarLander-v3")], keep)
        for n in (5, 7, 4):
            steps = some_steps(n, 8)
            data.add(steps._replace(rewards=torch.full((n,), float(n))))
        kept[name] = data.steps.rewards.tolist()
    assert kept["published"] == [4] * 4 and kept["textbook"] == [5] * 5 + [7] * 7 + [4] * 4


@pytest.mark.parametrize("departures, steps", [("all", 40), (all_but("endings"), 0)])
def test_the_published_dream_costs_real_steps_and_the_textbooks_none(departures, steps, monkeypatch):
    run = FakeRun(departures)
    parts = parts_of(run)
    count, run.real_steps = counting(monkeypatch), 0
    rollout, _ = dream(run, *parts)
    assert count["steps"] == steps == run.real_steps and run.imagined_steps == 40 == len(rollout.obs)


def test_the_published_dream_ends_where_the_real_environment_does_and_the_textbooks_where_the_model_says_so():
    for logit, share in ((-50.0, 0.0), (50.0, 1.0)):
        found = []
        for departures in ("all", all_but("endings")):
            run = FakeRun(departures, dream_steps=200)
            agent, model, data = parts_of(run)
            if departures != "all":
                with torch.no_grad():
                    model.net[-1].bias[-1] = logit
            found.append(float(dream(run, agent, model, data)[0].terminated.float().mean()))
        assert 0.005 < found[0] < 0.2 and found[1] == share


@pytest.mark.parametrize("departures", ["all", all_but("endings")])
def test_actions_in_dreams_are_those_of_the_agent_at_its_temperature_and_endings_as_likely_as_the_model_says(departures):
    run = FakeRun(departures, dream_steps=2000, temperature=2.0)
    agent, model, data = parts_of(run)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        if departures != "all":
            model.net[-1].weight[-1], model.net[-1].bias[-1] = 0, -1
    rollout, acted = dream(run, agent, model, data)
    p = agent.logprobs(acted, 2.0).exp()[:, 0, 1].detach()
    error = (rollout.actions[:, 0] - p) / (p * (1 - p)).sqrt()  # mean 0 and variance 1, whatever p is, if p is right
    assert (
        0.1 < p.std() and abs(float(error.mean())) < 4 / 2000**0.5 and abs(float((error * (p - p.mean())).mean() / p.std())) < 4 / 2000**0.5
    )
    if departures != "all":
        assert float(rollout.terminated.float().mean()) == pytest.approx(1 / (1 + math.e), abs=0.04)


@pytest.mark.parametrize("departures, stale", [("all", True), (all_but("realign"), False), ("", False), ("realign", True)])
def test_the_published_re_alignment_goes_back_to_the_old_episode_after_an_ending(departures, stale):
    run = FakeRun(departures, dream_steps=300, realign=1)
    agent, model, data = parts_of(run)
    if "endings" not in departures and departures != "all":
        with torch.no_grad():
            model.net[-1].bias[-1] = -2.0  # one imagined step in eight ends
    rollout, acted = dream(run, agent, model, data)
    ends = rollout.terminated[:-1, 0].nonzero()[:, 0]
    assert len(ends) > 5 and not torch.equal(rollout.obs[ends], acted[ends + 1])
    assert torch.equal(rollout.obs[ends + 1], rollout.obs[ends] if stale else acted[ends + 1])


def test_a_dream_that_is_always_re_aligned_is_reality(monkeypatch):
    seen, step = [], CartPoleEnv.step
    monkeypatch.setattr(CartPoleEnv, "step", lambda self, action: seen.append((action, step(self, action))) or seen[-1][1])
    run = FakeRun(all_but("realign"), dream_steps=100, realign=1)
    parts = parts_of(run)
    seen.clear()
    rollout, _ = dream(run, *parts)
    actions, steps = zip(*seen)
    assert rollout.actions[:, 0].tolist() == list(actions)
    for name, i in (("next_obs", 0), ("rewards", 1), ("terminated", 2)):
        np.testing.assert_array_equal(getattr(rollout, name)[:, 0].numpy(), np.array([s[i] for s in steps], dtype=np.float32))


def test_the_textbooks_dream_is_re_aligned_to_the_nearest_real_observation_and_lasts_no_longer_than_an_episode_may():
    run = FakeRun(all_but("endings"))
    _, _, data = parts_of(run)
    world, never = as_published.Imagined(run, data), np.array([-50.0])
    world.begin()
    for imagined in np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32):
        aligned, *_ = world.step(0, imagined, 0.0, never, True)
        distances = [math.dist(imagined, known) for known in data.steps.obs.tolist()]
        np.testing.assert_array_equal(aligned, data.steps.obs[int(np.argmin(distances))].numpy())
        free, reward, *over = world.step(0, imagined, 7.0, never, False)
        assert free is imagined and reward == 7 and over == [False, False]
    world.begin()
    over = [world.step(0, imagined, 0.0, never, False)[2:] for _ in range(500)]
    assert over == [(False, False)] * 499 + [(False, True)]


def test_a_published_time_out_is_worth_nothing_and_the_textbooks_its_future():
    rollout = Rollout(*(torch.zeros(1, 1),) * 4, torch.tensor([[False]]), torch.tensor([[True]]))
    published, textbook = (
        ppo_mbrl.compute_gae(way(rollout), torch.zeros(1, 1), torch.tensor([[10.0]]), 0.9, 0.95) for way in DEPARTURES["timeout"]
    )
    assert float(published[1]) == 0 and float(textbook[1]) == pytest.approx(9)


def test_the_published_action_is_one_number_and_the_textbooks_one_hot():
    published, textbook = (way(np.array([3, 0]), 4).tolist() for way in DEPARTURES["action"])
    assert published == [[3.0], [0.0]] and textbook == [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]


def test_both_scales_get_back_what_they_were_told():
    steps = some_steps()
    for way in DEPARTURES["scale"]:
        scale = way(3)
        target, obs = scale.fit(steps), steps.obs.numpy()
        perfect = target if way is as_published.Raw else np.concatenate([target, np.zeros_like(target)], -1)
        predicted = torch.from_numpy(scale.predict(perfect, obs, noise=0))
        torch.testing.assert_close(predicted, torch.cat([steps.next_obs, steps.rewards[:, None]], -1), atol=1e-4, rtol=1e-4)
        assert np.allclose(scale.inputs(obs).std(0), 1, atol=1e-5) == (way is as_published.Normalised)


def test_noise_in_the_textbooks_dreams_has_the_standard_deviation_that_the_model_predicts():
    steps, noise = some_steps(), np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for way in DEPARTURES["scale"]:
        scale = way(3)
        scale.fit(steps)
        output = np.random.default_rng(1).normal(size=(50, 4 * way.numbers)).astype(np.float32)
        moved = scale.predict(output, steps.obs.numpy(), noise) - scale.predict(output, steps.obs.numpy(), 0)
        change = torch.cat([steps.next_obs - steps.obs, steps.rewards[:, None]], -1)
        expected = noise * np.exp(output[:, 4:] / 2) * change.std(0, correction=0).numpy() if way is as_published.Normalised else 0 * moved
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4)


def test_the_published_samples_are_imagined_steps_and_the_textbooks_real_ones_and_nothing_else_differs(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    found = []
    for words, name in (((), "imagined_steps"), (("--fix", "count"), "real_steps")):
        assert train(tmp_path / name, *words, epochs=2) == 0
        last = rows_of(tmp_path / name)[-1]
        assert last["samples"] == last[name] and last["imagined_steps"] == 80 < last["real_steps"]
        policy, rows, summary = fingerprint(tmp_path / name)
        found.append((policy, [{name: x for name, x in row.items() if name != "samples"} for row in rows], summary))
    assert found[0] == found[1]


def test_published_gradients_are_clipped_one_by_one_and_the_textbooks_by_their_norm():
    found = []
    for way in DEPARTURES["gradients"]:
        both = np.array([3.0, -4.0]), np.array([0.1])
        way(both, 0.5)
        found.append(np.concatenate(both).tolist())
        small = np.array([0.1, -0.2])
        way([small], 0.5)
        assert small.tolist() == [0.1, -0.2]
    norm = math.sqrt(9 + 16 + 0.01)
    assert found[0] == pytest.approx([0.5, -0.5, 0.1]) and found[1] == pytest.approx([1.5 / norm, -2 / norm, 0.05 / norm], rel=1e-4)


def test_gradients_of_the_model_are_clipped_in_every_minibatch():
    run, clipped = FakeRun(), []
    _, model, data = parts_of(run)
    run.way.gradients = lambda gradients, limit: clipped.append((gradients[0] is model.gradient, limit))
    as_published.fit(run, model, torch.optim.Adam(model.flat), data.steps, 7)
    assert clipped == [(True, 0.5)] * 7


def test_learning_rates_follow_the_losses(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    told = {}

    class Plateau(as_published.ReduceLROnPlateau):
        def step(self, loss):
            told.setdefault(self.optimizer.param_groups[0]["lr"], []).append(loss)
            super().step(loss)

    monkeypatch.setattr(as_published, "ReduceLROnPlateau", Plateau)
    assert train(tmp_path, lr_actor=0.01, wm_lr=0.02) == 0
    assert told[0.02] == [row["wm/loss"] for row in rows_of(tmp_path) if "wm/loss" in row] and len(told[0.01]) == 3


# -------------------------------------------------------------------------------------------------------------- the textbook


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_departures_mended_an_update_is_that_of_the_pair(temperature):
    s = dict(gamma=0.97, gae_lambda=0.9, clip=0.15, minibatch=16, entropy_coef=0.02, temperature=temperature)
    ours, pairs = (
        Settings(passes=3, value_clip=1e6, max_grad=0.3, value_coef=0.7, **s),
        ppo_mbrl.Settings(epochs=3, max_grad_norm=0.3, value_coef=0.7, **s),
    )
    T, rng = 50, torch.Generator().manual_seed(5)
    obs, next_obs = torch.randn(2, T, 2, 4, generator=rng)
    flags = torch.rand(2, T, 2, generator=rng) < 0.1
    obs, next_obs, rewards = obs.double(), next_obs.double(), torch.randn(T, 2, generator=rng).double()
    rollout = Rollout(obs, torch.randint(2, (T, 2), generator=rng), rewards, next_obs, flags[0], flags[1] & ~flags[0])
    agents, logs = [], []
    for textbook in (True, False):
        torch.manual_seed(3)
        agent = ppo_mbrl.Agent(4, 2, 8).double()
        flat = [flatten(agent.actor), flatten(agent.critic)] if textbook else [flatten(agent)]
        if textbook:
            optimizer = torch.optim.Adam([dict(params=[weights]) for weights in flat], lr=1e-2)
            logs.append(as_published.ppo_update(agent, optimizer, rollout, rollout.obs, ours, choose(""))[0])
        else:
            optimizer = torch.optim.Adam(flat, lr=1e-2)
            logs.append(ppo_mbrl.ppo_update(agent, optimizer, rollout, pairs, temperature))
        agents.append(agent.state_dict())
    for name in agents[0]:
        torch.testing.assert_close(agents[0][name], agents[1][name], rtol=1e-5, atol=1e-6)  # torch's two ways to clip differ by 1e-6
    assert {name: logs[0][name] for name in logs[1]} == pytest.approx(logs[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["ratio", "entropy", "clip", "temperature", "timeout", "gradients"])
def test_each_departure_of_ppo_changes_the_update(name):
    T, rng = 50, torch.Generator().manual_seed(5)
    obs, next_obs = torch.randn(2, T, 1, 4, generator=rng)
    flags = torch.rand(2, T, 1, generator=rng) < 0.1
    rollout = Rollout(
        obs, torch.randint(2, (T, 1), generator=rng), torch.randn(T, 1, generator=rng) * 30, next_obs, flags[0], flags[1] & ~flags[0]
    )
    updated = []
    for departures in ("", name):
        torch.manual_seed(3)
        agent = ppo_mbrl.Agent(4, 2, 8)
        optimizer = torch.optim.Adam([dict(params=[flatten(net)]) for net in (agent.actor, agent.critic)], lr=3e-2)
        s = Settings(passes=3, minibatch=16, entropy_coef=0.1)
        as_published.ppo_update(agent, optimizer, rollout, rollout.obs, s, choose(departures))
        updated.append(torch.cat([p.flatten() for p in agent.parameters()]))
    assert (updated[0] - updated[1]).abs().max() > 1e-3


OF_THE_LOSS = "ratio", "entropy", "clip", "temperature"


@pytest.mark.parametrize("departures", ["all", "", *OF_THE_LOSS, *map(all_but, OF_THE_LOSS)])
def test_the_gradient_of_the_ppo_loss_by_hand_is_autograds(departures):
    on, s = as_published.names(departures), Settings(entropy_coef=0.2, value_coef=0.7, clip=0.1, value_clip=0.5, temperature=2.0)
    rng = torch.Generator().manual_seed(4)
    logits, (value, old_values, advantages, returns) = (torch.randn(*shape, generator=rng).double() for shape in ((200, 4), (4, 200)))
    logits, value, actions = logits.requires_grad_(), value.requires_grad_(), torch.randint(4, (200,), generator=rng)

    temperature = 1.0 if "temperature" in on else 2.0
    new = (logits / temperature).log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    old = new.detach() + torch.randn(200, generator=rng) / 5
    ratio = (new.exp() - old.exp()).exp() if "ratio" in on else (new - old).exp()
    A = (advantages - advantages.mean()) / advantages.std(correction=0)
    centre = returns if "clip" in on else old_values
    errors = (value - returns).square(), (centre + (value - centre).clamp(-0.5, 0.5) - returns).square()
    entropy = torch.distributions.Categorical(logits=logits / 2).entropy().mean()
    expected = 0.7 * torch.max(*errors).mean() / 2 - torch.min(A * ratio, A * ratio.clamp(0.9, 1.1)).mean()
    expected = expected + (0.2 if "entropy" in on else -0.2) * entropy

    known = [x.detach().numpy() for x in (logits, value, actions, old, old_values, advantages, returns)]
    info, *by_hand = as_published.ppo_loss(*known, s, choose(departures))
    clipped, kl = ((ratio - 1).abs() > 0.1).double().mean(), ((new - old).exp() - 1 - (new - old)).mean()
    assert info == pytest.approx([x.item() for x in (expected, kl, entropy, clipped, torch.max(*errors).mean() / 2)], rel=1e-6)
    assert 0.05 < clipped < 0.95 and ("clip" in on or (errors[0] < errors[1]).double().mean() > 0.05)  # both sides of each are seen
    for found, autograds in zip(by_hand, torch.autograd.grad(expected, (logits, value))):
        torch.testing.assert_close(torch.from_numpy(found), autograds, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("departures", ["all", all_but("scale"), all_but("endings"), ""])
def test_backpropagation_by_hand_is_autograds(departures):
    steps, way = some_steps(), choose(departures)
    model = Model(3, 4, 8, way)
    target = model.scale.fit(steps)
    inputs, ends = model.inputs(steps.obs.numpy(), steps.actions.numpy()), steps.terminated[:, None].float()
    loss = model.backpropagate(inputs, target, ends.numpy())
    by_hand = model.flat[0].grad

    output = model.net(torch.from_numpy(inputs))
    if way.scale is as_published.Raw:
        expected = torch.nn.functional.l1_loss(output[:, :4], torch.cat([steps.next_obs, steps.rewards[:, None]], -1))
    else:
        normal = torch.distributions.Normal(output[:, :4], (output[:, 4:8] / 2).exp())
        change = torch.cat([steps.next_obs - steps.obs, steps.rewards[:, None]], -1)
        normalised = (change - change.mean(0)) / change.std(0, correction=0)
        expected = -normal.log_prob(normalised).mean() - math.log(2 * math.pi) / 2
        pairs = world_model.gaussian_error(output[:, :4] - normalised, output[:, 4:8], beta=0.0).mean()
        assert pairs.item() == pytest.approx(expected.item(), rel=1e-4)
    if way.endings is as_published.Imagined:
        p = output[:, -1:].sigmoid()
        expected = expected - (ends * p.log() + (1 - ends) * (1 - p).log()).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    autograds = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))])
    torch.testing.assert_close(by_hand, autograds, rtol=1e-3, atol=1e-6)


def test_a_network_by_hand_is_the_pairs_before_and_after_a_step_of_the_optimiser():
    net = ppo_mbrl.mlp(5, 8, 3, last_gain=1.0)
    flat, weights, x = flatten(net), as_published.arrays(net.parameters()), torch.randn(20, 5)
    optimizer = torch.optim.Adam([flat], 0.1)
    for _ in range(2):
        *layers, output = as_published.forward(weights, x.numpy())
        torch.testing.assert_close(torch.from_numpy(output), net(x).detach(), rtol=1e-5, atol=1e-5)
        as_published.backward(weights, flat.grad.numpy(), *layers, np.cos(output))
        autograds = torch.autograd.grad(net(x).sin().sum(), list(net.parameters()))
        torch.testing.assert_close(flat.grad, torch.cat([g.flatten() for g in autograds]), rtol=1e-4, atol=1e-5)
        as_published.update(optimizer)


def test_adam_by_hand_is_torchs_and_each_goes_on_from_the_others_state():
    rng, finds = torch.Generator().manual_seed(0), []
    gradients = torch.randn(2, 40, 9, generator=rng) * 10 ** torch.linspace(-6, 2, 9)
    torchs, ours = torch.optim.Adam.step, as_published.update
    for ways in ((torchs, torchs), (ours, ours), (torchs, ours), (ours, torchs)):
        weights, states = [torch.nn.Parameter(torch.ones(9)) for _ in range(2)], None
        for way, half in zip(ways, (slice(0, 20), slice(20, 40))):
            optimizer = torch.optim.Adam([dict(params=[weights[0]], lr=1e-2), dict(params=[weights[1]], lr=0.3)])
            if states:
                optimizer.load_state_dict(states)
            for pair in gradients[:, half].unbind(1):
                for w, g in zip(weights, pair):
                    w.grad = g.clone()
                way(optimizer)
            states = optimizer.state_dict()
        finds.append(torch.stack(weights).detach())
    for found in finds[1:]:
        torch.testing.assert_close(found, finds[0], rtol=1e-5, atol=1e-6)


def test_a_pass_has_every_step_once_in_random_order():
    columns = np.arange(50), np.arange(100).reshape(50, 2)
    parts = list(as_published.minibatches(columns, 16))
    assert [len(first) for first, _ in parts] == [16, 16, 16, 2]
    firsts, seconds = (np.concatenate(column) for column in zip(*parts))
    assert sorted(firsts) == list(range(50)) != firsts.tolist()
    np.testing.assert_array_equal(seconds, columns[1][firsts])


@pytest.mark.parametrize("departures", ["all", ""])
def test_a_model_learns_a_linear_environment(departures):
    run = FakeRun(departures, hidden=32, wm_batch=32)
    rng = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(2000, 3, generator=rng), torch.randint(2, (2000,), generator=rng)
    next_obs = obs + 0.1 * obs.roll(1, -1) + 0.2 * actions[:, None]
    never = torch.zeros(2000, dtype=torch.bool)
    steps = Rollout(obs, actions, obs.sum(-1), next_obs, never, never)
    torch.manual_seed(0)
    model = Model(3, 2, 32, run.way)
    optimizer = torch.optim.Adam(model.flat, 3e-3)
    as_published.fit(run, model, optimizer, steps, 1500)
    found, reward, _ = (torch.from_numpy(x) for x in model.imagine(obs.numpy(), actions.numpy(), noise=0))
    unexplained = (found - next_obs).square().mean(0) / (next_obs - obs).var(0)
    assert unexplained.max() < 0.25 and float((reward - steps.rewards).square().mean()) < 0.05 * float(steps.rewards.var())


# --------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("words", [(), ("--fix", "endings"), ("--fix", "all")])
def test_every_real_step_is_counted(words, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    count = counting(monkeypatch)
    assert train(tmp_path, *words) == 0
    rows = rows_of(tmp_path)
    assert summary_of(tmp_path)["real_steps"] == count["steps"] == rows[-1]["real_steps"] > sum(row.get("data/steps", 0) for row in rows)


@pytest.mark.parametrize("words", [(), ("--fix", "all"), ("--break", "ratio,replay")])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(words, tmp_path, monkeypatch):
    in_brief(monkeypatch)
    finish, during = ppo_mbrl.Run.finish, []
    with monkeypatch.context() as patch:
        left = interrupted_after(patch, 10**9)
        patch.setattr(ppo_mbrl.Run, "finish", lambda run: during.append(10**9 - left[0]) or finish(run))
        assert train(tmp_path / "whole", *words) == 0
    rng, interruptions = random.Random(0), 0
    for share in (2, 1.5, 3):
        with monkeypatch.context() as patch:
            interrupted_after(patch, rng.randrange(during[0] // 4, int(during[0] / share)))
            interruptions += train(tmp_path / "torn", *words) == 128 + signal.SIGTERM
    assert train(tmp_path / "torn", *words) == 0 and interruptions >= 2
    assert fingerprint(tmp_path / "torn") == fingerprint(tmp_path / "whole")


def test_a_lander_interrupted_after_an_epoch_goes_on_bit_by_bit(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    settings = dict(env_id="LunarLander-v3", epochs=2, dream_steps=150)
    assert train(tmp_path / "whole", **settings) == 0
    assert train(tmp_path / "torn", **settings | dict(epochs=1)) == 0
    assert train(tmp_path / "torn", **settings) == 0
    (sha, rows, summary), (torn_sha, torn_rows, torn_summary) = (fingerprint(tmp_path / name) for name in ("whole", "torn"))
    assert sha == torn_sha and summary["real_steps"] == torn_summary["real_steps"]
    assert [row["data/return_mean"] for row in rows[1:]] == [row["data/return_mean"] for row in torn_rows[1:]]


def test_a_test_above_the_limit_ends_the_run_for_good(tmp_path, monkeypatch, capsys):
    in_brief(monkeypatch)
    assert train(tmp_path, test_return=-1) == 0
    assert [row["iteration"] for row in rows_of(tmp_path)] == [0, 1, 2] and rows_of(tmp_path)[-1]["test/return_mean"] > -1
    capsys.readouterr()
    assert train(tmp_path, test_return=-1) == 0 and "finished already" in capsys.readouterr().out


def test_the_returns_of_data_episodes_are_those_of_the_environment(monkeypatch):
    returns, reset, step = [], CartPoleEnv.reset, CartPoleEnv.step
    monkeypatch.setattr(
        CartPoleEnv,
        "reset",
        lambda self, *, seed=None, options=None: (
            returns.append(0.0) or vars(self).update(number=len(returns) - 1) or reset(self, seed=seed, options=options)
        ),
    )

    def counted(self, action):
        result = step(self, action)
        returns[self.number] += result[1]
        return result

    monkeypatch.setattr(CartPoleEnv, "step", counted)
    run = FakeRun(episodes=5)
    _, _, data = parts_of(run)
    assert len(returns) == 5 and as_published.mean_return(data.steps) == pytest.approx(np.mean(returns))
    assert len(data) == sum(returns) and len(data.first()) == 5 and (data.first().abs() <= 0.05).all()


def test_fix_begins_with_the_published_algorithm_and_break_with_the_textbooks(tmp_path, monkeypatch):
    monkeypatch.setattr(as_published, "carry_out", lambda run, loop: found.append(run.settings.departures))
    found = []
    for i, words in enumerate(
        [(), ("--fix", "ratio", "--fix", "replay, clip"), ("--fix", "all"), ("--break", "timeout,ratio"), ("--break", "all")]
    ):
        assert train(tmp_path / str(i), *words) == 0
    some = ",".join(name for name in DEPARTURES if name not in ("ratio", "replay", "clip"))
    assert found == ["all", some, "", "ratio,timeout", "all"]


def test_a_run_is_named_after_its_departures():
    named = {departures: Settings(departures=departures).folder().parent.name for departures in ("all", "", "ratio", all_but("scale"))}
    assert list(named.values()) == ["as_published", "textbook", "break=ratio", "fix=scale"]
    assert Settings(clip=0.2, seed=3).folder() == Path("runs/LunarLander-v3/as_published_clip=0.2/seed_3")


@pytest.mark.parametrize(
    "words, part",
    [
        (["--fix", "gravity"], "'gravity' is no departure; there are ratio, entropy,"),
        (["--break", "ratio,ratios"], "'ratios' is no departure"),
        (["--fix", "ratio", "--break", "clip"], "give one of the three"),
        (["--env-id", "Pendulum-v1"], "does not fit"),
        (["--epochs", "0"], "between 1 and"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(words, part, tmp_path, capsys):
    assert command("--run-dir", tmp_path / "run", *words) == 2
    printed = capsys.readouterr()
    assert part in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_the_policy_can_be_evaluated_like_that_of_any_run(tmp_path, monkeypatch):
    in_brief(monkeypatch)
    assert train(tmp_path) == 0
    settings, act = ppo_mbrl.load_policy(tmp_path)
    assert ppo_mbrl.play(act, settings.env_id, 2, 20_000, 1).returns.mean() == summary_of(tmp_path)["final_return_mean"]
    assert json.loads((tmp_path / "config.json").read_text())["departures"] == "all"


# ---------------------------------------------------------------------------------------------------------------- the study


def made_up_rows() -> list[dict]:
    """As published 40, the textbook 220; `ratio` alone costs 150 points, `scale` alone adds 100 to the largest fall, `action` is noise, `endings` is a crutch,
    and so is `clip` as published, while it costs 90 points in the textbook's."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(10):
        for arm, chosen in what_broke_it.STUDY.arms.items():
            on = as_published.names(chosen["departures"])
            many, fall = len(on) > 6, 20 + 100 * ("scale" in on)
            score = 220 - 150 * ("ratio" in on) + 40 * ("endings" in on) - 70 * many + 90 * ("clip" in on) * (2 * many - 1) - 90 * many
            score, fall = score + 3 * rng.normal(), fall + rng.normal()
            final = score + 200 * ("action" in arm) * rng.normal()
            rows.append(dict(arm=arm, seed=seed, run=arm, final_return_mean=final, data_fall=fall, data_return=score))
    return rows


def test_the_study_finds_who_did_it_in_made_up_runs(tmp_path):
    found = {row["departure"]: row for row in what_broke_it.verdicts(made_up_rows())}
    assert {name: row["verdict"] for name, row in found.items()} == dict.fromkeys(set(DEPARTURES) - {"count"}, "harmless") | dict(
        ratio="keeps the score low as published, keeps the score low in the textbook's",
        scale="makes it fall as published, makes it fall in the textbook's",
        action="open",
        endings="holds the score up as published, holds the score up in the textbook's",
        clip="holds the score up as published, keeps the score low in the textbook's",
    )
    assert found["ratio"]["data_return"] == found["ratio"]["final_return_mean"] and found["action"]["data_return"] == [1.0, 1.0]
    for name, points in dict(ratio=150, endings=-40).items():
        for value, low, high in found[name]["shares"]:
            assert low - 0.02 < points / 160 < high + 0.02 and value == pytest.approx(points / 160, abs=0.05)

    what_broke_it.tell(made_up_rows(), tmp_path, Console())
    assert (tmp_path / "verdicts.md").read_text().count("harmless") == 6 and (tmp_path / "verdicts.png").stat().st_size > 10_000


@pytest.mark.parametrize("length", [2, 12, 18, 19, 20, 40])
def test_the_model_is_measured_on_data_of_any_length(length):
    obs = torch.randn(length, 3)
    last = torch.arange(length) == length - 1
    steps = Rollout(obs, torch.randint(2, (length,)), torch.randn(length), torch.randn(length, 3), last, last & False)
    log = as_published.measure(as_published.Model(3, 2, 8, choose("all")), steps)
    assert (log["wm/error_openloop"] is None) == (length < 20) and log["wm/error_1step"] > 0


def test_the_study_measures_how_far_the_data_episodes_fell(tmp_path):
    returns = [-200, -100, 0, 90, 90, 90, 30, -30, -60]  # three at a time: -100, ..., 90, 70, 30, -20
    rows = [dict(real_steps=i, **{"data/return_mean": x}) for i, x in enumerate(returns)] + [dict(real_steps=9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert what_broke_it.data_returns(tmp_path) == pytest.approx(dict(data_fall=110, data_return=24))


def test_the_study_has_24_arms_of_five_seeds_and_ten_of_its_ends_and_of_what_is_mended_alone():
    jobs = runner.expand(what_broke_it.STUDY, list(range(10)), as_published_script())
    seeds = {arm: sorted(job.seed for job in jobs if job.arm == arm) for arm in what_broke_it.STUDY.arms}
    assert len(seeds) == 24 and len({job.folder for job in jobs}) == len(jobs) == 13 * 10 + 11 * 5
    assert all(found == list(range(5 if arm.startswith("break ") else 10)) for arm, found in seeds.items())


def as_published_script() -> Path:
    return Path(as_published.__file__).resolve()
