"""PPO, its environments and its agent: each promise against sums and loops written out by hand."""

import itertools
import math
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_mbrl
from ppo_mbrl import (
    PPO_INFO,
    Agent,
    Environments,
    Explorer,
    ReturnScale,
    Settings,
    compute_gae,
    fates,
    outcome,
    pack,
    ppo_loss,
    ppo_update,
    real_returns,
    renew,
    unpack,
)
from world_model import Replay, Rollout, UsageError, flatten

# --------------------------------------------------------------------------------------------------------------- advantages


def random_steps(T: int, N: int, seed: int, obs_dim: int = 3, num_actions: int = 4, p: float = 0.2, dtype=torch.float64) -> Rollout:
    rng = np.random.default_rng(seed)
    ended, cut = rng.random((T, N)) < p, rng.random((T, N)) < p
    obs, next_obs = (torch.as_tensor(rng.normal(size=(T, N, obs_dim)), dtype=dtype) for _ in range(2))
    rewards = torch.as_tensor(rng.normal(size=(T, N)), dtype=dtype)
    return Rollout(
        obs, torch.as_tensor(rng.integers(num_actions, size=(T, N))), rewards, next_obs, torch.tensor(ended), torch.tensor(cut & ~ended)
    )


def brute_force_gae(r: Rollout, v, next_v, gamma: float, lam: float) -> np.ndarray:
    """The definition: A_t = sum over l of (gamma lambda)^l delta_{t+l}, as far as t's own episode goes."""
    T, N = r.rewards.shape
    A = np.zeros((T, N))
    for n, t in itertools.product(range(N), range(T)):
        for k in range(t, T):
            future = 0.0 if r.terminated[k, n] else float(next_v[k, n])  # an ending has no future, a time-out has
            A[t, n] += (gamma * lam) ** (k - t) * (float(r.rewards[k, n]) + gamma * future - float(v[k, n]))
            if r.terminated[k, n] or r.truncated[k, n]:
                break
    return A


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.5]), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_sum_that_defines_them(seed, T, p, gamma, lam):
    rollout = random_steps(T, 2, seed, p=p)
    v, next_v = torch.as_tensor(np.random.default_rng(seed + 1).normal(size=(2, T, 2)))
    advantages, returns = compute_gae(rollout, v, next_v, gamma, lam)
    expected = brute_force_gae(rollout, v, next_v, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-5)  # the discounts are single precision
    np.testing.assert_allclose(returns.numpy(), expected + v.numpy(), atol=1e-5)


def test_time_outs_are_worth_their_future_and_endings_are_not():
    one = torch.ones(1, 1, dtype=torch.float64)
    for ended, expected in ((True, 1.0), (False, 1.0 + 0.9 * 10)):
        step = Rollout(one[..., None], one.long(), one, one[..., None], torch.tensor([[ended]]), torch.tensor([[not ended]]))
        assert float(compute_gae(step, 0 * one, 10 * one, 0.9, 0.95)[1]) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------------------- the loss


def small_agent(seed: int = 0) -> Agent:
    torch.manual_seed(seed)
    agent = Agent(3, 4, 8).double()
    torch.nn.init.normal_(agent.actor[-1].weight)  # far from uniform
    agent.normaliser.mean.normal_(), agent.normaliser.std.uniform_(0.5, 2)
    return agent


def minibatches(monkeypatch, acting: float, learning: float) -> list[dict]:
    """What ppo_loss reports of each minibatch, when actions were drawn at one temperature and the update is told another."""
    agent, infos = small_agent(), []
    rollout = random_steps(16, 4, seed=1)
    rollout = rollout._replace(actions=torch.stack([agent.act(obs, acting) for obs in rollout.obs]))

    def recorded(*args):
        logprobs, old = args[0].logprobs(args[1], acting).gather(-1, args[2][:, None])[:, 0], args[3]
        infos.append({"difference": float((logprobs - old).detach().abs().max())} | dict(zip(PPO_INFO, ppo_loss(*args)[1].tolist())))
        return ppo_loss(*args)

    monkeypatch.setattr(ppo_mbrl, "ppo_loss", recorded)
    ppo_update(agent, torch.optim.Adam([flatten(agent)], 1e-2), rollout, Settings(minibatch=16, epochs=1), learning)
    assert len(infos) == 4
    return infos


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_ratio_is_one_before_the_first_step(monkeypatch, temperature):
    first, *_, last = minibatches(monkeypatch, temperature, temperature)
    assert first["difference"] < 1e-12 and abs(first["ppo/approx_kl"]) < 1e-14 and first["ppo/clip_fraction"] == 0
    assert last["difference"] > 1e-4 and last["ppo/approx_kl"] > 1e-8  # and not after it


def test_the_temperature_of_the_update_is_the_one_it_is_told(monkeypatch):
    assert minibatches(monkeypatch, 1.0, 2.0)[0]["difference"] > 0.05


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_a_loop_written_by_hand(temperature):
    agent, s, B = small_agent(), Settings(clip=0.2, value_coef=0.7, entropy_coef=0.05), 12
    rng = np.random.default_rng(3)
    obs, actions = torch.as_tensor(rng.normal(size=(B, 3))), torch.as_tensor(rng.integers(4, size=B))
    old, advantages, returns = rng.normal(-1.4, 0.5, B), rng.normal(2, 3, B), rng.normal(size=B)
    policy = value = entropy = kl = clipped = 0.0
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for i in range(B):
        x = [(float(obs[i, j]) - float(agent.normaliser.mean[j])) / float(agent.normaliser.std[j]) for j in range(3)]
        logits = [float(y) / temperature for y in agent.actor(torch.tensor(x, dtype=torch.float64)).detach()]
        total = sum(math.exp(y) for y in logits)
        p = [math.exp(y) / total for y in logits]
        ratio = p[int(actions[i])] / math.exp(old[i])
        bounded = min(max(ratio, 0.8), 1.2)
        policy += min(ratio * normalised[i], bounded * normalised[i]) / B
        value += (float(agent.critic(torch.tensor(x, dtype=torch.float64)).detach()) - returns[i]) ** 2 / 2 / B
        entropy -= sum(q * math.log(q) for q in p) / B
        kl += (ratio - 1 - math.log(ratio)) / B
        clipped += (abs(ratio - 1) > 0.2) / B
    as_tensors = [torch.as_tensor(x) for x in (old, advantages, returns)]
    loss, info = ppo_loss(agent, obs, actions, *as_tensors, s, temperature)
    assert float(loss.detach()) == pytest.approx(-policy + 0.7 * value - 0.05 * entropy, abs=1e-9)
    by_hand = {
        "ppo/loss": -policy + 0.7 * value - 0.05 * entropy,
        "ppo/approx_kl": kl,
        "ppo/entropy": entropy,
        "ppo/clip_fraction": clipped,
        "ppo/value_loss": value,
    }
    assert dict(zip(PPO_INFO, info.tolist())) == pytest.approx(by_hand, abs=1e-6)
    assert 0 < clipped < 1


def test_the_entropy_bonus_lowers_the_loss_when_entropy_rises():
    obs, zeros = torch.randn(20, 3, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    losses, entropies = [], []
    for sharpness in (3.0, 1.0, 0.1):
        agent = small_agent()
        with torch.no_grad():
            agent.actor[-1].weight.mul_(sharpness)
        args = (
            agent,
            obs,
            zeros.long(),
            zeros,
            zeros,
            agent.value(obs).detach(),
        )  # equal advantages and no value error: entropy alone is left
        losses.append(float(ppo_loss(*args, Settings(entropy_coef=0.1))[0].detach()))
        entropies.append(float(ppo_loss(*args, Settings())[1][PPO_INFO.index("ppo/entropy")]))
    assert entropies[0] < entropies[1] < entropies[2]
    np.testing.assert_allclose(losses, -0.1 * np.array(entropies), atol=1e-9)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_flattened_weights_are_stepped_and_clipped_like_torchs(limit):
    updated, (x, actions), rollout = [], (torch.randn(16, 4, 3), torch.randint(4, (16, 4))), random_steps(16, 4, seed=1)
    rollout = Rollout(x.double(), actions, rollout.rewards.double(), x.double(), rollout.terminated, rollout.truncated)
    s = Settings(minibatch=64, epochs=1, max_grad_norm=limit)
    for flat in (True, False):
        agent = small_agent()
        weights = [flatten(agent)] if flat else list(agent.parameters())
        optimizer = torch.optim.SGD(weights, 0.1)
        if flat:
            ppo_update(agent, optimizer, rollout, s)
        else:
            with torch.no_grad():
                old = agent.logprobs(rollout.obs).gather(-1, actions[..., None])[..., 0]
                values, next_values = agent.value(rollout.obs), agent.value(rollout.next_obs)
            advantages, returns = compute_gae(rollout, values, next_values, s.gamma, s.gae_lambda)
            ppo_loss(agent, *(y.flatten(0, 1) for y in (rollout.obs, actions, old, advantages, returns)), s)[0].backward()
            torch.nn.utils.clip_grad_norm_(weights, limit)
            optimizer.step()
        updated.append(agent.state_dict())
    for name in updated[0]:
        torch.testing.assert_close(updated[0][name], updated[1][name], rtol=1e-5, atol=1e-6)


def test_an_update_makes_rewarded_actions_likelier():
    agent = small_agent()
    obs = torch.randn(64, 4, 3, dtype=torch.float64)
    actions = torch.randint(4, (64, 4))
    over = torch.ones(64, 4, dtype=torch.bool)
    rollout = Rollout(obs, actions, (actions == 2).double(), obs, over, ~over)
    before = agent.logprobs(obs).exp()[..., 2].mean()
    weights = flatten(agent)
    for _ in range(10):
        ppo_update(agent, torch.optim.Adam([weights], 1e-3), rollout, Settings(minibatch=64, entropy_coef=0.0))
    assert agent.logprobs(obs).exp()[..., 2].mean() > before + 0.05


# ------------------------------------------------------------------------------------------------------------------- the agent


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_actions_are_drawn_with_the_probabilities_of_the_policy(temperature):
    agent, number = small_agent(), 40_000
    obs = torch.randn(1, 3, dtype=torch.float64)
    logits = agent.actor((obs - agent.normaliser.mean) / agent.normaliser.std)[0].detach()
    p = torch.tensor([math.exp(float(x) / temperature) for x in logits])
    p = p / p.sum()
    share = torch.bincount(agent.act(obs.expand(number, 3), temperature), minlength=4) / number
    assert ((share - p).abs() < 5 * (p * (1 - p) / number).sqrt() + 1e-4).all(), (share, p)
    assert agent.greedy(obs).item() == int(logits.argmax())


def test_rewards_are_divided_by_the_spread_of_the_discounted_return():
    rollout, scale, seen = random_steps(50, 3, seed=5), ReturnScale(3, 0.9), []
    for part in (slice(0, 20), slice(20, 50)):
        scale.update(Rollout(*(x[part] for x in rollout)))
    for n in range(3):
        total = 0.0
        for t in range(50):
            total = 0.9 * total + float(rollout.rewards[t, n])
            seen.append(total)
            if rollout.terminated[t, n] or rollout.truncated[t, n]:
                total = 0.0
    np.testing.assert_allclose(scale(rollout.rewards).numpy(), rollout.rewards.numpy() / np.std(seen), rtol=1e-9)


@pytest.mark.parametrize("usual", [-0.5, 0.0, 0.5])
def test_the_fates_of_dreams_add_up(usual):
    rollout = random_steps(30, 7, seed=6)
    result, dreams, good, bad, alive, cut = fates(rollout, usual), 0, 0, 0, 0, 0
    for n in range(7):
        open_ = False
        for t in range(30):
            dreams, open_ = dreams + (not open_), True
            if rollout.terminated[t, n]:
                good, bad, open_ = good + bool(rollout.rewards[t, n] >= usual), bad + bool(rollout.rewards[t, n] < usual), False
            elif rollout.truncated[t, n]:
                cut, open_ = cut + 1, False
        alive += open_
    assert good + bad + alive + cut == dreams
    shares = [
        result["dream/positive_end_share"],
        result["dream/negative_end_share"],
        result["dream/alive_share"],
        result["dream/return_mean"],
    ]
    assert shares == pytest.approx([good / dreams, bad / dreams, (alive + cut) / dreams, float(rollout.rewards.sum()) / dreams])


# ------------------------------------------------------------------------------------------------------------ real environments


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3"])
def test_environments_are_gymnasiums_vector_environment(env_id):
    N, seed = 3, 7
    ours = Environments(env_id, N, seed)
    theirs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * N, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    theirs.reset(seed=[int(x) for x in np.random.SeedSequence(seed).generate_state(N, np.uint64)])
    obs, _ = theirs.reset()  # the reset that seeds is not the one that is played
    rng, overs = np.random.default_rng(0), 0
    for _ in range(500):
        assert np.array_equal(ours.obs.numpy(), obs)
        actions = rng.integers(ours.num_actions, size=N)
        reward, next_obs, terminated, truncated = ours.step(torch.as_tensor(actions))
        obs, real_reward, ended, cut, info = theirs.step(actions)
        over = ended | cut
        final = np.array([info["final_obs"][i] if over[i] else obs[i] for i in range(N)])
        assert np.array_equal(next_obs.numpy(), final) and np.array_equal(reward.numpy(), real_reward.astype(np.float32))
        assert np.array_equal(terminated.numpy(), ended) and np.array_equal(truncated.numpy(), cut & ~ended)
        overs += over.sum()
    assert overs > 5
    theirs.close()


def test_a_time_out_is_truncated_and_not_terminated():
    env, cuts = Environments("CartPole-v1", 1, 0), 0
    steps = 0
    for _ in range(700):
        angle, speed = env.obs[0, 2], env.obs[0, 3]
        _, _, terminated, truncated = env.step(torch.tensor([int(angle + speed + 0.1 * env.obs[0, 0] + 0.2 * env.obs[0, 1] > 0)]))
        steps += 1
        assert not terminated.any()
        if truncated.any():
            assert steps == 500
            cuts += 1
    assert cuts == 1


@pytest.mark.parametrize("env_id, repeat", [("CartPole-v1", 1), ("LunarLander-v3", 1), ("LunarLander-v3", 3)])
@pytest.mark.parametrize("moment, leaving", [(0, False), (37, False), (150, False), (37, True)])
def test_environments_saved_in_mid_episode_go_on_bit_by_bit(env_id, repeat, moment, leaving):
    env, rng = Environments(env_id, 3, 1, 90, repeat), np.random.default_rng(1)
    draw = lambda: torch.as_tensor(rng.integers(env.num_actions, size=3))  # noqa: E731
    for _ in range(moment):
        env.step(draw())
    env.cut[1] = True
    if leaving:
        env.leave()
    state, obs = unpack(pack(env.state_dict(), tensors := {}), tensors), env.obs.clone()
    later = [draw() for _ in range(200)]
    original = [[*env.step(a), env.obs] for a in later]
    other = Environments(env_id, 3, 999, 90, repeat)
    other.load_state_dict(state)
    assert torch.equal(other.obs, obs) and other.real_steps == state["real_steps"] <= 3 * repeat * moment
    assert torch.equal(other.cut, state["cut"]) and other.cut[1] and torch.equal(other.episode, state["episode"])
    copy = [[*other.step(a), other.obs] for a in later]
    assert all(torch.equal(x, y) for a, b in zip(original, copy) for x, y in zip(a, b))
    assert sum(int((step[2] | step[3]).sum()) for step in original) > 2 and other.real_steps == env.real_steps
    assert torch.equal(other.cut, env.cut) and torch.equal(other.episode, env.episode)
    assert original[0][3].all() == leaving


def test_no_two_environments_of_any_run_share_a_random_stream():
    streams = [tuple(int(x) for x in np.random.SeedSequence(seed).generate_state(16, np.uint64)) for seed in range(100)]
    assert len({x for stream in streams for x in stream}) == 1600
    env = Environments("CartPole-v1", 16, 5)
    for own, stream in zip(env.envs, streams[5]):
        fresh = gym.make("CartPole-v1")
        fresh.reset(seed=stream)
        fresh.reset()
        assert own.unwrapped.np_random.bit_generator.state == fresh.unwrapped.np_random.bit_generator.state
    assert len({tuple(x) for x in env.obs.tolist()}) == 16


class Counted(gym.Env):
    """Actions 5, 6 and 7; the reward is the action. After seven steps it both ends and runs out of time."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3, start=5)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return np.full(2, self.t / 10, np.float32), float(action), self.t == 7, self.t == 7, {}


def registered(name: str, **kwargs) -> str:
    """The id of an environment made of an entry point."""
    if name not in gym.registry:
        gym.register(name, **kwargs)
    return name


def test_actions_may_start_anywhere_and_an_ending_at_the_time_limit_is_an_ending():
    env = Environments(registered("Counted-v0", entry_point=Counted), 2, 0)
    assert env.num_actions == 3
    for t in range(1, 15):
        reward, next_obs, terminated, truncated = env.step(torch.tensor([0, 2]))
        assert reward.tolist() == [5.0, 7.0] and torch.allclose(next_obs, torch.tensor((t - 1) % 7 + 1) / 10)
        assert terminated.tolist() == [t % 7 == 0] * 2 and not truncated.any()


class Loose(Counted):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs.astype(np.float64), np.float64(reward), int(terminated), np.int64(truncated), info


def test_numbers_and_flags_of_other_types_are_the_same_numbers_and_flags():
    loose, strict = (Environments(registered(f"{c.__name__}-v0", entry_point=c), 2, 0) for c in (Loose, Counted))
    for _ in range(15):
        for ours, theirs in zip(loose.step(torch.tensor([0, 2])), strict.step(torch.tensor([0, 2]))):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


class Endless(Counted):
    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}


def test_an_environment_without_a_time_limit_gets_one():
    scores = ppo_mbrl.play(lambda obs: torch.zeros(len(obs), dtype=torch.long), registered("Endless-v0", entry_point=Endless), 2, 0, 1)
    assert scores.lengths.tolist() == [10_000] * 2 and scores.timeouts.all() and scores.returns.tolist() == [10_000] * 2
    assert ppo_mbrl.make_env("CartPole-v1").spec.max_episode_steps == 500


@pytest.mark.parametrize("env_id, repeat, cut", [("CartPole-v1", 3, True), ("LunarLander-v3", 4, False), ("CartPole-v1", 1, False)])
def test_an_action_is_taken_for_so_many_real_steps_and_every_one_is_counted(env_id, repeat, cut):
    limit, N, seed = 6 * cut, 2, 5
    ours, rng = Environments(env_id, N, seed, limit, repeat), np.random.default_rng(3)
    theirs, overs, odd, total = [gym.make(env_id) for _ in range(N)], 0, 0, 0
    for env, stream in zip(theirs, np.random.SeedSequence(seed).generate_state(N, np.uint64)):
        env.reset(seed=int(stream))
    obs, age = [env.reset()[0] for env in theirs], np.zeros(N, int)
    for _ in range(300):
        assert np.array_equal(ours.obs.numpy(), obs) and ours.ages().tolist() == age.tolist()
        actions = rng.integers(ours.num_actions, size=N)
        rewards, next_obs, terminated, truncated = (x.numpy() for x in ours.step(torch.as_tensor(actions)))
        for i, env in enumerate(theirs):
            steps = [env.step(actions[i])]
            while len(steps) < repeat and not (steps[-1][2] or steps[-1][3]):
                steps.append(env.step(actions[i]))
            total, age[i], odd = total + len(steps), age[i] + 1, odd + (len(steps) < repeat)
            obs[i], ended = steps[-1][0], bool(steps[-1][2])
            assert np.array_equal(next_obs[i], obs[i]) and rewards[i] == pytest.approx(sum(float(step[1]) for step in steps), rel=1e-5)
            assert terminated[i] == ended and truncated[i] == (not ended and (bool(steps[-1][3]) or age[i] == limit))
            if ended or truncated[i]:
                obs[i], age[i], overs = env.reset()[0], 0, overs + 1
        assert ours.real_steps == total
    assert overs > 4 and (odd > 2 or repeat == 1)


def test_an_evaluation_takes_actions_for_as_long_as_training_does():
    act, counted = lambda obs: torch.full((len(obs),), 2), registered("Counted-v0", entry_point=Counted)
    for repeat in (1, 2, 3, 10):
        asked = []
        scores = ppo_mbrl.play(lambda obs: (asked.append(len(obs)), act(obs))[1], counted, 2, 0, repeat)
        assert scores.returns.tolist() == [49.0] * 2 and scores.lengths.tolist() == [7] * 2 and not scores.timeouts.any()
        assert asked == [2] * math.ceil(7 / repeat)
    scores = ppo_mbrl.play(act, registered("Endless-v0", entry_point=Endless), 1, 0, 3)
    assert scores.lengths.tolist() == [10_000] and scores.timeouts.all()


def test_settings_in_actions_last_as_long_as_those_in_real_steps():
    lengths = dict(gather_limit=602, gather_hold=61, dream_steps=121, horizon=599, horizon_max=303, realign=9, plan_horizon=13)
    s = Settings(mode="simple", action_repeat=4, gamma=0.9, gae_lambda=0.8, good_gamma=0.95, good_lambda=0.7, **lengths)
    before, short = asdict(s), asdict(s.per_action())
    changed = {name: x for name, x in short.items() if x != before[name]}
    in_actions = dict(gather_limit=151, gather_hold=16, dream_steps=31, horizon=150, horizon_max=76, realign=3, plan_horizon=4)
    assert changed == pytest.approx(in_actions | dict(gamma=0.6561, gae_lambda=0.4096, good_gamma=0.81450625, good_lambda=0.2401))
    assert replace(s, action_repeat=1).per_action() == replace(s, action_repeat=1)
    never = replace(s, horizon=0, gather_limit=0).per_action()
    assert never.horizon == never.gather_limit == 0


def test_each_ending_of_cartpole_is_good_however_many_real_steps_its_last_action_took():
    for repeat in (1, 2, 3, 4):
        env, replay = Environments("CartPole-v1", 2, 0, action_repeat=repeat), Replay(2, 4, 10)
        torch.manual_seed(repeat)
        replay.add(ppo_mbrl.collect(env, lambda obs: torch.randint(2, (2,)), 300))
        finished = replay.finished(0, repeat)
        assert len(finished) > 20 and finished.all()
        assert repeat == 1 or (replay.steps.rewards[replay.steps.terminated] < replay.steps.rewards.median()).any()


class Odd(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


@pytest.mark.parametrize(
    "observation, action, part",
    [
        (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Discrete(2), "flat Box"),
        (gym.spaces.Discrete(4), gym.spaces.Discrete(2), "flat Box"),
        (gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)), "Discrete actions"),
        (gym.spaces.Box(-1, 1, (3,)), gym.spaces.MultiDiscrete([2, 2]), "Discrete actions"),
    ],
)
def test_environments_that_do_not_fit_are_refused_in_one_sentence(observation, action, part):
    name = registered(
        f"Odd{hash((repr(observation), repr(action)))}-v0", entry_point=Odd, kwargs=dict(observation_space=observation, action_space=action)
    )
    with pytest.raises(UsageError, match=part) as caught:
        ppo_mbrl.make_env(name)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- how a run turned out


@pytest.mark.parametrize(
    "curve, final, expected",
    [
        ([-200, 0, 150, 230, 240], 235, "solved"),
        ([-200, -180, 100, 150, 160, 140, -200, -220, -210], -215, "collapsed"),
        ([-200, -180, 100, 150, 160, 140, -200, -220, -210], 210, "solved"),  # the final score alone decides
        ([-200, -100, -20, -10, -15, -12, -14, -11], -12, "stuck"),  # well above random, and flat
        ([-200, -190, -205, -195, -200, -198], -200, "other"),  # never better than random
        ([-200, -100, 0, 20, -90, 60, -100, 120], 20, "other"),  # neither flat nor fallen
        ([-200], -150, "other"),
        ([-180, -60], -20, "other"),
    ],
)
def test_a_run_is_called_what_its_curve_shows(curve, final, expected):
    assert outcome(curve, final, threshold=200, random=-180) == expected


# ----------------------------------------------------------------------------------------------------------------- exploring


@pytest.mark.parametrize("share, greedy", [(0.0, [0, 0, 0, 0, 0]), (0.5, [1, 0, 1, 0, 1]), (0.75, [1, 1, 1, 0, 1]), (1.0, [1, 1, 1, 1, 1])])
def test_so_many_real_episodes_are_greedy_and_no_others(share, greedy):
    s = Settings(env_id="MountainCar-v0", gather_greedy=share, gather_limit=20, gather_hold=0)
    env, agent = Environments(s.env_id, 50, 0, s.gather_limit), Agent(2, 3, 8)
    explore = Explorer(agent, env, s)
    torch.manual_seed(0)
    for episode in range(5):
        same = []
        for _ in range(20):
            assert (env.episode == 1 + episode).all()
            actions = explore(env.obs)
            same.append(actions == agent.greedy(env.obs))
            env.step(actions)
        found = float(torch.stack(same).float().mean())
        assert found == 1 if greedy[episode] else 0.25 < found < 0.6  # of three actions


def test_in_old_episodes_with_drawn_actions_and_no_others_actions_are_held():
    s = Settings(env_id="MountainCar-v0", gather_greedy=0.0, gather_limit=190, gather_hold=30)
    env, agent = Environments(s.env_id, 60, 0, s.gather_limit), Agent(2, 3, 8)
    agent.act = lambda obs, temperature: torch.full((len(obs),), -1)  # nobody else would
    explore, rows = Explorer(agent, env, s), []
    torch.manual_seed(0)
    for step in range(380):
        assert env.ages().tolist() == [step % 190] * 60
        rows.append(explore(env.obs).numpy())
        env.step(torch.zeros(60).long())
    rows = np.array(rows).reshape(2, 190, 60)
    young, old = rows[:, :95], rows[:, 95:].swapaxes(1, 2).reshape(-1, 95)
    assert (young == -1).all() and set(np.unique(old)) == {-1, 0, 1, 2}
    holds = [(key, len(list(group))) for row in old for key, group in itertools.groupby(row)]
    longest = max(length for key, length in holds if key >= 0)
    assert 0.5 < (old >= 0).mean() < 0.62 and 28 <= longest <= 90  # a hold may follow another of the same action at once
    gaps = [length for key, length in holds if key == -1]
    assert 7 < np.mean(gaps) < 11  # a hold begins with a chance of 3 / 30 a step


def test_greedy_episodes_hold_actions_only_if_the_latest_old_one_was_cut_off():
    s = Settings(env_id="CartPole-v1", gather_greedy=1.0, gather_limit=20, gather_hold=5)
    env, agent, cut, kept, seen = Environments(s.env_id, 30, 0, s.gather_limit), Agent(4, 2, 8), torch.zeros(30).bool(), 0, set()
    agent.greedy = lambda obs: torch.full((len(obs),), -1)
    explore = Explorer(agent, env, s)
    torch.manual_seed(0)
    for _ in range(300):
        assert torch.equal(env.cut, cut)
        held = explore(env.obs) != -1
        assert not (held & ~(cut & (env.ages() >= 10))).any()
        seen |= {(bool(a), bool(b)) for a, b in zip(cut[env.ages() >= 10], held[env.ages() >= 10])}
        old = env.ages() >= 10  # at its end it is more than half the limit
        _, _, terminated, truncated = env.step(torch.randint(2, (30,)))
        kept += int((cut & terminated & ~old).sum())
        cut = torch.where(old & (terminated | truncated), truncated, cut)
    assert kept > 3  # short episodes that ended meanwhile alter nothing
    assert seen == {(False, False), (True, False), (True, True)}


def test_whoever_begins_begins_with_an_episode_of_its_own():
    env = Environments("CartPole-v1", 8, 0, limit=20)
    torch.manual_seed(0)
    while not (env.cut.any() and (env.episode > 3).all()):
        env.step(torch.randint(2, (8,)))
    cut, old = env.cut.clone(), env.old()
    assert old.any() and not old.all()
    env.leave()
    _, _, terminated, truncated = env.step(torch.zeros(8).long())
    assert (terminated | truncated).all() and (env.ages() == 0).all() and (env.episode == 1).all()
    assert torch.equal(env.cut, torch.where(old, truncated, cut))  # of those who stood the next ones are suspected as well
    for age in range(1, 6):  # and nobody is left again
        env.step(torch.zeros(8).long())
        assert (env.ages() == age).all()


def test_an_episode_that_is_left_is_cut_off_unless_it_ends_by_itself():
    env, ended, left = Environments("CartPole-v1", 50, 0), 0, 0
    for _ in range(12):  # poles pushed to one side fall after 8 to 11 steps
        state = env.state_dict()
        env.leave()
        _, _, terminated, truncated = env.step(torch.zeros(50).long())
        assert torch.equal(truncated, ~terminated)
        ended, left = ended + int(terminated.sum()), left + int(truncated.sum())
        env.load_state_dict(state)
        assert torch.equal(env.step(torch.zeros(50).long())[2], terminated)
    assert ended > 40 and left > 400


@pytest.mark.parametrize("limit, hold, greedy", [(0, 5, 0.0), (100, 0, 0.0), (0, 5, 1.0)])
def test_without_a_limit_or_a_duration_no_action_is_held(limit, hold, greedy):
    s = Settings(env_id="MountainCar-v0", gather_greedy=greedy, gather_limit=limit, gather_hold=hold)
    env, agent = Environments(s.env_id, 4, 0, s.gather_limit), Agent(2, 3, 8)
    agent.greedy = lambda obs: torch.full((len(obs),), -1)
    if not greedy:
        agent.act = lambda obs, temperature: torch.full((len(obs),), -1)
    explore = Explorer(agent, env, s)
    for _ in range(150):
        assert (explore(env.obs) == -1).all()
        env.step(torch.zeros(4).long())


def test_episodes_are_left_at_the_limit_and_ended_ones_are_not_called_left():
    env, free = Environments("CartPole-v1", 8, 3, limit=15), Environments("CartPole-v1", 8, 3)
    torch.manual_seed(1)
    age, left, ended = torch.zeros(8).long(), 0, 0
    together = torch.ones(8, dtype=torch.bool)  # no episode has been left yet
    for _ in range(200):
        actions = torch.randint(2, (8,))
        ours, theirs = env.step(actions), free.step(actions)
        age += 1
        assert torch.equal(ours[3], (age >= 15) & ~ours[2])
        assert all(torch.equal(x[together], y[together]) for x, y in zip(ours[:3], theirs[:3]))
        together &= ~ours[3]
        age[ours[2] | ours[3]] = 0
        left, ended = left + int(ours[3].sum()), ended + int(ours[2].sum())
    assert left > 20 and ended > 20


# ------------------------------------------------------------------------------------------------------------------ real returns


def test_the_critic_is_shown_what_really_came_of_real_steps():
    """Against the definition of the lambda-return, step by step, with an episode that ends, one that is left and one that goes on."""
    torch.manual_seed(0)
    T, gamma, lam = 30, 0.9, 0.8
    terminated, truncated = torch.zeros(2, T, 1, dtype=torch.bool)
    terminated[9], truncated[19] = True, True
    obs = torch.randn(T + 1, 1, 2)
    replay = Replay(1, 2, 10)
    replay.add(Rollout(obs[:-1], torch.zeros(T, 1).long(), torch.randn(T, 1), obs[1:], terminated, truncated))
    agent, s = Agent(2, 3, 8), Settings(gamma=gamma, gae_lambda=lam)
    seen, returns = real_returns(agent, replay, lambda steps: steps._replace(rewards=2 * steps.rewards), s, number=500, length=8)
    value = lambda x: float(agent.value(x).detach())  # noqa: E731

    def lambda_return(t: int, last: int) -> float:
        reward, after = 2 * float(replay.steps.rewards[t, 0]), value(obs[t + 1, 0])
        if terminated[t]:
            return reward
        if truncated[t] or t == last:
            return reward + gamma * after
        return reward + gamma * ((1 - lam) * after + lam * lambda_return(t + 1, last))

    assert {int((obs[:, 0] == x).all(-1).nonzero()) for x in seen} == set(range(T))
    for t in range(T):
        found = {round(float(y), 3) for x, y in zip(seen, returns) if (x == obs[t, 0]).all()}
        began = max(x for x in (0, 10, 20) if x <= t)  # an excerpt of 8 steps begins in step t's episode
        assert found == {round(lambda_return(t, last), 3) for last in range(max(t, began + 7), min(t + 8, T))}


def test_real_steps_move_the_critic_and_not_the_policy():
    torch.manual_seed(0)
    agent, s = Agent(2, 3, 8), Settings(lr=1e-2, epochs=200, minibatch=64, entropy_coef=0.0, value_coef=1.0, grounding=1.0)
    still = Rollout(torch.zeros(8, 8, 2), torch.zeros(8, 8).long(), torch.zeros(8, 8), torch.zeros(8, 8, 2), *torch.ones(2, 8, 8).bool())
    before = agent.actor[0].weight.detach().clone()
    real = torch.ones(50, 2), torch.full((50,), 3.0)
    ppo_update(agent, torch.optim.Adam([flatten(agent)], lr=s.lr), still, s, real=real)
    at_one, at_zero = agent.value(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).tolist()
    assert at_one == pytest.approx(3, abs=0.2) and at_zero == pytest.approx(0, abs=0.2)
    assert torch.allclose(agent.actor[0].weight, before, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- beginning anew


def test_an_agent_that_begins_anew_keeps_nothing_but_its_normaliser():
    torch.manual_seed(0)
    agent = Agent(2, 3, 8)
    agent.normaliser.fit(torch.randn(9, 2))
    optimizer = torch.optim.Adam([flatten(agent)], lr=0.1)
    agent.value(torch.randn(5, 2)).sum().backward()
    optimizer.step()
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    renew(optimizer, Agent(2, 3, 8))
    after = agent.state_dict()
    assert not optimizer.state
    assert all(torch.equal(before[name], after[name]) == name.startswith("normaliser") for name in before if not name.endswith("bias"))
    assert all(not after[name].any() for name in before if name.endswith("bias"))  # as at the very beginning
    agent.value(torch.ones(5, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(torch.cat([p.flatten() for p in agent.parameters()]), optimizer.param_groups[0]["params"][0])  # still one vector
