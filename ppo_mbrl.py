"""PPO, model-free and inside a learned world model, from the first line to the last.

    python ppo_mbrl.py --mode ppo                   PPO in the real environment (Schulman et al., 2017)
    python ppo_mbrl.py --mode simple --seed 3       PPO in the dreams of a learned model (SimPLe: Kaiser et al., 2020, Algorithm 1)
    python ppo_mbrl.py --mode mpc                   no policy: plan through the learned model (PETS: Chua et al., 2018)
    python ppo_mbrl.py evaluate RUN_DIR --gif landing.gif

Read it top to bottom: settings, real environments, agent, PPO, the three training loops, evaluation, the run, its folder, pictures, command line.
The model itself is in `world_model.py`. To try an idea: `cp ppo_mbrl.py my_idea.py`, change it, run it; the diff is the idea.

Shapes: T time, N environments or dreams, O observation, A actions, B minibatch. `truncated` is a time-out: the value goes on after it.
A step of agent, model and dream is an action, which takes `--action-repeat` real steps. Lengths of time, discounts and the step counts of a run are in
real steps; minibatches, windows of the model and imagined steps are in actions.
"""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from world_model import (
    Dream,
    Mirror,
    ModelSettings,
    Normaliser,
    Replay,
    Rollout,
    UsageError,
    WorldModel,
    checkpoint_files,
    checkpoints,
    draw_diagnosis,
    fit,
    flatten,
    measure,
    pack,
    plan,
    pyplot,
    read_checkpoint,
    read_json,
    run_command,
    setting,
    settings_command,
    trusted_horizon,
    unpack,
    write_json,
    write_tensors,
)

# ------------------------------------------------------------------------------------------------------------------ settings


@dataclass(kw_only=True)
class Settings(ModelSettings):
    """Every setting of a run. Flags, `config.json`, `--help` and the run's name all come from here and from ModelSettings."""

    # fmt: off
    mode: Literal["ppo", "simple", "mpc"] = setting("simple", "PPO in the real environment, PPO in dreams, or planning.", panel="Run", identity=False)
    seed: int = setting(0, "Decides everything random.", 0, 2**63 - 1, "Run", identity=False)
    env_id: str = setting("LunarLander-v3", "Any Gymnasium environment with a flat Box observation and Discrete actions.", panel="Run", identity=False)
    total_steps: int = setting(20_000, "Real steps of the whole run.", 1, 10**12, "Run", identity=False, ppo=1_000_000, mpc=5_000)
    run_dir: str = setting("", "Run folder; by default runs/ENV/NAME/seed_SEED, named after what differs from the defaults.", panel="Run", identity=False)
    config: str = setting("", "A JSON file of settings, such as a config.json; flags override it.", panel="Run", identity=False)
    gamma: float = setting(0.99, "Discount of PPO and of the planner, of a real step.", 0, 1, "Run", ppo=0.999)
    eval_every: int = setting(500, "Real steps between evaluations.", 1, 10**12, "Run", identity=False, ppo=25_000, mpc=2_500)
    fresh: bool = setting(False, "Begin anew: delete what an earlier run left in the folder.", panel="Run", identity=False)
    device: str = setting("cpu", "Where to compute, such as cpu or cuda.", panel="Run", identity=False)
    threads: int = setting(1, "Threads of torch; small networks are fastest with one.", 1, 4096, "Run", identity=False)
    tensorboard: bool = setting(False, "Also write TensorBoard logs.", panel="Run", identity=False)

    num_envs: int = setting(1, "Real environments stepped side by side.", 1, 10_000, "Real environment", ppo=16)
    action_repeat: int = setting(3, "Real steps that each action is taken for; to agent and model they are one step, with the sum of their rewards.", 1, 1000, "Real environment", ppo=1, mpc=1)
    num_steps: int = setting(1000, "Real steps of each environment between two updates, at most.", 1, 10**9, "Real environment", ppo=1024, mpc=250)
    growth: float = setting(0.0625, "Gather this share of the real steps so far before the next fit, at most --num-steps of each environment: little data is soon learned.", 1e-6, 1e9, "Gathering")
    warmup_steps: int = setting(1000, "Real steps of uniformly random actions before the first fit.", 1, 10**9, "Gathering")
    gather_greedy: float = setting(0.75, "Share of an agent's real episodes that are greedy, the first among them; in the others actions are drawn.", 0, 1, "Exploring")
    gather_temperature: float = setting(1.0, "Temperature of the policy where it gathers data with drawn actions.", 1e-3, 1e3, "Exploring")
    gather_limit: int = setting(600, "A real episode is left after so many real steps, for most of the rest is known by then; 0: never, and then no action is held either, and hovering does not count as failing.", 0, 10**9, "Exploring")
    gather_hold: int = setting(60, "From half of --gather-limit on, in greedy episodes only if the latest of that age was cut off, random actions are held, each for up to so many real steps, so that an agent that comes to no end learns what would end it; 0: never.", 0, 10**6, "Exploring")

    gae_lambda: float = setting(0.99, "Lambda of generalised advantage estimation, of a real step.", 0, 1, "PPO", ppo=0.98)
    lr: float = setting(1e-3, "Adam's learning rate.", 1e-8, 1, "PPO", ppo=3e-4)
    epochs: int = setting(4, "Passes over each rollout.", 1, 10_000, "PPO")
    minibatch: int = setting(512, "Steps in a minibatch; advantages are normalised in it.", 2, 10**9, "PPO", ppo=64)
    clip: float = setting(0.2, "Clip range of the probability ratio.", 0, 1e6, "PPO")
    entropy_coef: float = setting(0.003, "Weight of the entropy bonus.", 0, 1e6, "PPO", ppo=0.01)
    value_coef: float = setting(0.5, "Weight of the value loss.", 0, 1e6, "PPO")
    max_grad_norm: float = setting(0.5, "Gradients are clipped to this global norm.", 1e-9, 1e9, "PPO")
    temperature: float = setting(1.0, "Divides the logits of the policy in the rollouts it is trained on, where it acts and in the ratio alike.", 1e-3, 1e3, "PPO")
    temperature_end: float = setting(0.0, "Temperature at the end of the run, approached linearly; 0 keeps --temperature.", 0, 1e3, "PPO")
    hidden: int = setting(64, "Width of the two hidden layers of actor and critic.", 1, 10_000, "PPO")

    rounds: int = setting(5, "PPO updates in dreams between two gatherings; three times as many for an agent that begins.", 1, 1_000_000, "Dreams")
    dreams: int = setting(200, "Dreams side by side.", 1, 10**7, "Dreams")
    dream_steps: int = setting(120, "Length of each dream in an update, in real steps; the next update goes on from there.", 1, 10**6, "Dreams")
    horizon: int = setting(600, "A dream is cut, and its value goes on, after so many real steps, and at the end of an iteration; 0 lets the held-out open-loop error decide.", 0, 10**6, "Dreams")
    horizon_max: int = setting(300, "Longest horizon the open-loop error may choose.", 1, 100_000, "Dreams")
    horizon_error: float = setting(5.0, "The horizon ends where the open-loop error exceeds this many standard deviations of a step's change.", 0, 1e9, "Dreams")
    caution: float = setting(2.0, "Scale the negative reward of an ending, in dreams and where real steps ground the critic, by the larger of two: the share of recent real steps whose episode ended, and this many times the share of good ones among the latest ten episodes; above 1 crashes cost more than in full. 0: in full.", 0, 1e6, "Dreams")
    renew_growth: float = setting(0.25, "Each time the data has grown by this share, and could once more before the run ends, what fails begins anew: up to --reset-from the agent, from there on model and agent. 0: never.", 0, 1e9, "Dreams")
    reset_from: int = setting(4000, "From so many real steps on it is model and agent that begin anew (see --renew-growth), unless enough of the latest ten episodes that ended or were left were good: a third at first, 80 % when the data is 3.3 times as much. 0: always the agent alone.", 0, 10**9, "Dreams")
    reset_updates: int = setting(2000, "Gradient steps of a model that begins anew.", 1, 10_000_000, "Dreams")
    reset_rounds: int = setting(60, "PPO updates of an agent that begins anew in such a model, before it acts.", 1, 1_000_000, "Dreams")
    good_gamma: float = setting(0.998, "Discount towards which --gamma moves as real episodes end well, or do not end.", 0, 1, "Dreams")
    good_lambda: float = setting(0.95, "The lambda of generalised advantage estimation comes to this as real episodes end well.", 0, 1, "Dreams")
    grounding: float = setting(1.0, "Weight of the value error on real steps, beside that in dreams, as real episodes end well.", 0, 1e6, "Dreams")
    mirror: bool = setting(True, "Learn from the mirror image of each real step as well, if the first real steps show that there is one.", panel="Dreams")
    realign: int = setting(0, "Every so many real steps each dream is moved to the nearest real observation; 0: never.", 0, 10**6, "Dreams")
    beginnings: float = setting(0.25, "Share of dreams that start at the beginning of a real episode.", 0, 1, "Dreams")
    rare: float = setting(0.2, "Share of dreams that start near something rare: an ending, a flipped flag, an extreme reward.", 0, 1, "Dreams")

    plan_horizon: int = setting(12, "Real steps the planner looks ahead.", 1, 10_000, "Planning")
    plan_candidates: int = setting(48, "Action sequences tried in each round.", 2, 10**6, "Planning")
    plan_rounds: int = setting(2, "Rounds of the cross-entropy method.", 1, 1000, "Planning")

    # fmt: on
    @classmethod
    def resolve(cls, given: dict, of_a_fork: bool = False) -> "Settings":
        """Defaults of the mode, then the --config file, then flags: resolved here and nowhere else. A fork's file may hold other settings, too."""
        known = {f.name: f for f in fields(cls)}
        file = read_settings_file(given["config"], known, of_a_fork) if given.get("config") else {}
        if ":" in str(file.get("env_id")) and "env_id" not in given:
            raise UsageError(
                f"{given['config']} names an environment that imports a module, {file['env_id']!r}; to trust it, type it as --env-id"
            )
        chosen = file | given
        mode = chosen.get("mode", known["mode"].default)
        return cls(**{name: f.metadata["modes"][mode] for name, f in known.items() if mode in list(f.metadata["modes"])} | chosen)

    def __post_init__(self):
        super().__post_init__()
        if self.beginnings + self.rare > 1:
            raise UsageError(f"--beginnings and --rare are shares of the same dreams: {self.beginnings:g} + {self.rare:g} is more than 1.")
        for name in ("temperature_end", "renew_growth"):
            if 0 < getattr(self, name) < 1e-3:
                raise UsageError(f"--{name.replace('_', '-')} must be 0 or at least 0.001, not {getattr(self, name)}.")

    def per_action(self) -> "Settings":
        """The same with discounts and the lengths of episodes, dreams and plans counted in actions, each of which takes --action-repeat real steps.

        Flags of time are in real steps, so that --action-repeat can be changed alone. What is compared with the steps of the run stays as it is."""
        k, s = self.action_repeat, asdict(self)
        lengths = "gather_limit", "gather_hold", "dream_steps", "horizon", "horizon_max", "realign", "plan_horizon"
        discounts = "gamma", "gae_lambda", "good_gamma", "good_lambda"
        return replace(self, **{name: math.ceil(s[name] / k) for name in lengths}, **{name: s[name] ** k for name in discounts})

    def folder(self) -> Path:
        """The run folder. Its name holds what differs from the mode's defaults and no time stamp, so that rerunning finds it."""
        if self.run_dir:
            return Path(self.run_dir)
        usual = Settings.resolve(dict(mode=self.mode))
        differs = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.metadata["identity"] and getattr(self, f.name) != getattr(usual, f.name)
        ]
        name = "_".join([self.mode, *differs])
        if len(name) > 200:  # longer than a file system may take
            name = name[:180] + "_" + hashlib.sha256(name.encode()).hexdigest()[:16]
        return Path("runs", self.env_id.replace("/", "_"), name, f"seed_{self.seed}")


OF_THE_COMMAND = "run_dir", "config", "fresh"  # where to run, not what: never taken from a file


def read_settings_file(path: str, known: dict, of_a_fork: bool) -> dict:
    """The settings in a JSON file, such as the config.json of another run. Raises UsageError for names that are not known."""
    try:
        file = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} can't be read as JSON: {error}.")
    for name in () if of_a_fork else file.keys() - known.keys():
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
        raise UsageError(f"--config {path} has an unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    return {name: value for name, value in file.items() if name in known and name not in OF_THE_COMMAND}


# --------------------------------------------------------------------------------------------------------- real environments


def make_env(env_id: str, **kwargs) -> gym.Env:
    """One environment, or a UsageError that says why it can't be used here."""
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"Environment {env_id!r} can't be made: {str(error).strip() or type(error).__name__}")
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1 or not isinstance(action, gym.spaces.Discrete):
        raise UsageError(
            f"Environment {env_id!r} does not fit: it needs a flat Box observation and Discrete actions, and has {obs} and {action}."
        )
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)  # without a limit of its own it might never come to the end of an evaluation
    return env


def take(env: gym.Env, action: int, repeat: int) -> tuple[np.ndarray, float, bool, bool, int]:
    """Takes one of the environment's own actions for `repeat` real steps, or until the episode is over (frame skip: Mnih et al., 2015).

    Returns the observation after it, the sum of its rewards, terminated, truncated, and how many real steps it took.
    """
    total = 0.0
    for steps in range(1, repeat + 1):
        obs, reward, terminated, truncated, _ = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return obs, float(total), bool(terminated), bool(truncated and not terminated), steps


class Environments:
    """N real environments stepped in turn. A new episode begins in the step that ends the old one (SAME_STEP autoreset).

    `obs` (N, O) is where they are, `episode` (N) the number of the episode, `cut` (N) whether the latest old one was cut off; `step` returns the true
    successors. Each action is taken for `action_repeat` real steps; `real_steps` counts those of all environments. An episode is old after `limit` / 2
    actions and cut off after `limit` (0: never); `leave` cuts off all of them. Any moment, also in the midst of episodes, can be saved: it is the random
    state before the last reset and the actions since.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, limit: int = 0, action_repeat: int = 1):
        self.envs, self.action_repeat, self.real_steps = [make_env(env_id) for _ in range(num_envs)], action_repeat, 0
        self.past, self.limit = [None] * num_envs, limit or math.inf  # random state before the reset, actions since
        self.episode, self.cut, self.leaving = torch.zeros(num_envs, dtype=torch.long), torch.zeros(num_envs, dtype=torch.bool), False
        for env, stream in zip(self.envs, np.random.SeedSequence(seed).generate_state(num_envs, np.uint64)):
            env.reset(seed=int(stream))
        self.obs_dim, self.num_actions = self.envs[0].observation_space.shape[0], int(self.envs[0].action_space.n)
        self.lowest = int(self.envs[0].action_space.start)
        self.obs = torch.stack([self.begin(i) for i in range(num_envs)])

    def begin(self, i: int) -> Tensor:
        self.past[i] = (self.envs[i].unwrapped.np_random.bit_generator.state, [])
        self.episode[i] += 1
        return torch.as_tensor(self.envs[i].reset()[0], dtype=torch.float32)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """actions (N) -> rewards (N), next_obs (N, O), terminated (N), truncated (N)."""
        steps = []
        for env, (_, past), action in zip(self.envs, self.past, actions.tolist()):
            obs, reward, terminated, truncated, real_steps = take(env, action + self.lowest, self.action_repeat)
            self.real_steps += real_steps
            past.append(action)
            left = self.leaving or len(past) >= self.limit
            steps.append((obs, reward, terminated, truncated or (left and not terminated)))
        obs, rewards, terminated, truncated = map(np.array, zip(*steps))
        next_obs = torch.from_numpy(obs.astype(np.float32))
        self.obs = next_obs.clone()
        for i in (terminated | truncated).nonzero()[0]:
            if len(self.past[i][1]) - 1 >= self.limit / 2:  # it was old before its last action
                self.cut[i] = bool(truncated[i])
            self.obs[i] = self.begin(i)
        if self.leaving:
            self.episode, self.leaving = torch.ones_like(self.episode), False
        return torch.from_numpy(rewards.astype(np.float32)), next_obs, torch.from_numpy(terminated), torch.from_numpy(truncated)

    def leave(self):
        """Another agent acts from now on. The old episodes are cut off after its first action, and episodes counted anew; `cut` stays what it is."""
        self.leaving = True

    def ages(self) -> Tensor:
        """(N): actions since each episode began."""
        return torch.tensor([len(actions) for _, actions in self.past])

    def old(self) -> Tensor:
        """(N): whether each episode has lasted half of `limit`."""
        return self.ages() >= self.limit / 2

    def state_dict(self) -> dict:
        past, episode, cut = [[state, list(actions)] for state, actions in self.past], self.episode.clone(), self.cut.clone()
        return dict(past=past, episode=episode, cut=cut, real_steps=self.real_steps, leaving=self.leaving)

    def load_state_dict(self, state: dict):
        for i, (random_state, actions) in enumerate(state["past"]):
            env = self.envs[i]
            env.unwrapped.np_random.bit_generator.state = random_state
            self.obs[i] = self.begin(i)
            for action in actions:
                self.obs[i] = torch.as_tensor(take(env, action + self.lowest, self.action_repeat)[0], dtype=torch.float32)
            self.past[i] = (random_state, list(actions))
        self.episode, self.cut = state["episode"].clone(), state["cut"].clone()
        self.real_steps, self.leaving = state["real_steps"], state["leaving"]


# --------------------------------------------------------------------------------------------------------------------- agent


def mlp(size_in: int, hidden: int, size_out: int, last_gain: float) -> nn.Sequential:
    """Two tanh layers and a linear one, orthogonal weights, zero biases."""
    net = nn.Sequential(nn.Linear(size_in, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, size_out))
    for layer, gain in zip(net[::2], (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return net


class Agent(nn.Module):
    """A stochastic policy and a value function over the same observation. Dreams' agents normalise it, by the scales of the model's first fit."""

    def __init__(self, obs_dim: int, num_actions: int, hidden: int):
        super().__init__()
        self.normaliser = Normaliser(obs_dim)
        self.actor = mlp(obs_dim, hidden, num_actions, last_gain=0.01)
        self.critic = mlp(obs_dim, hidden, 1, last_gain=1.0)

    def logits(self, obs: Tensor, temperature: float = 1.0) -> Tensor:
        """(..., O) -> (..., A)."""
        return self.actor(self.normaliser(obs)) / temperature

    def logprobs(self, obs: Tensor, temperature: float = 1.0) -> Tensor:
        """(..., O) -> log-probabilities of all actions (..., A)."""
        return self.logits(obs, temperature).log_softmax(-1)

    def value(self, obs: Tensor) -> Tensor:
        """(..., O) -> (...)."""
        return self.critic(self.normaliser(obs)).squeeze(-1)

    @torch.inference_mode()
    def act(self, obs: Tensor, temperature: float = 1.0) -> Tensor:
        """(N, O) -> sampled actions (N). The index of the smallest Exp(1) / p is a sample of p, and so it is if p is not normalised."""
        logits = self.logits(obs, temperature)
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    @torch.inference_mode()
    def greedy(self, obs: Tensor) -> Tensor:
        return self.logits(obs.to(self.normaliser.mean.device)).argmax(-1)


class ReturnScale(nn.Module):
    """Running standard deviation of the discounted return; rewards are divided by it (Engstrom et al., 2020, section 3)."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))  # each environment's discounted return so far
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # count, sum, sum of squares

    def update(self, rollout: Rollout):
        running, path = self.running.numpy(), []
        for reward, goes_on in zip(rollout.rewards.numpy(), (~(rollout.terminated | rollout.truncated)).numpy()):
            path.append(self.gamma * running + reward)
            running = path[-1] * goes_on
        self.running, path = torch.from_numpy(running), torch.from_numpy(np.array(path))
        self.moments += torch.stack([torch.ones_like(path), path, path**2]).sum((1, 2))

    def __call__(self, rewards: Tensor) -> Tensor:
        count, total, squares = self.moments.tolist()
        variance = squares / count - (total / count) ** 2
        return rewards / max(math.sqrt(max(variance, 0)), 1e-4)


# ----------------------------------------------------------------------------------------------------------------------- PPO


def collect(env, act, num_steps: int, tick=lambda: None) -> Rollout:
    """`num_steps` steps of `env`, an Environments or a Dream, with actions act(obs)."""
    rows = []
    for _ in range(num_steps):
        obs, action = env.obs, act(env.obs)
        reward, next_obs, terminated, truncated = env.step(action)
        rows.append(Rollout(obs, action, reward, next_obs, terminated, truncated))
        tick()
    return Rollout(*(torch.stack(column) for column in zip(*rows)))


def compute_gae(rollout: Rollout, values: Tensor, next_values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, eq. 16): advantages and returns, (T, N) each.

    values and next_values (T, N) belong to obs and next_obs. Endings have no future; time-outs do, but it is not in this rollout.
    """
    delta = rollout.rewards + gamma * next_values * ~rollout.terminated - values
    goes_on = gamma * gae_lambda * ~(rollout.terminated | rollout.truncated)
    advantages = [torch.zeros_like(delta[0])]
    for now, weight in zip(delta.flip(0), goes_on.flip(0)):
        advantages.append(torch.addcmul(now, weight, advantages[-1]))
    advantages = torch.stack(advantages[1:]).flip(0)
    return advantages, advantages + values


PPO_INFO = "ppo/loss", "ppo/approx_kl", "ppo/entropy", "ppo/clip_fraction", "ppo/value_loss"


def ppo_loss(agent: Agent, obs, actions, old_logprobs, advantages, returns, s: Settings, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, value error and entropy bonus (Schulman et al., 2017, eq. 7 and 9) on a minibatch, every argument (B, ...).

    Returns the loss and, for the log, the numbers named in PPO_INFO.
    """
    logprobs = agent.logprobs(obs, temperature)
    logratio = logprobs.gather(-1, actions[:, None])[:, 0] - old_logprobs
    ratio = logratio.exp()
    std, mean = torch.std_mean(advantages, correction=0)
    advantages = (advantages - mean) / (std + 1e-8)
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - s.clip, 1 + s.clip))
    value_loss = (agent.value(obs) - returns).square() / 2
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    losses = s.value_coef * value_loss - s.entropy_coef * entropy - surrogate
    with torch.no_grad():
        change = ratio - 1
        approx_kl = change - logratio  # Schulman (2020), k3
        info = torch.stack([losses, approx_kl, entropy, change.abs() > s.clip, value_loss]).mean(-1)
    return losses.mean(), info


def ppo_update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, s: Settings, temperature=1.0, tick=lambda: None, real=None
) -> dict[str, float]:
    """One PPO update on a rollout whose actions were drawn from `agent` at `temperature`; `optimizer` updates flatten(agent).

    From `real`, observations (K, O) and returns (K) of real steps, the critic learns as well. Returns means over all minibatches.
    """
    with torch.no_grad():
        logprobs = agent.logprobs(rollout.obs, temperature).gather(-1, rollout.actions[..., None])[..., 0]
        values, next_values = agent.value(rollout.obs), agent.value(rollout.next_obs)
        advantages, returns = compute_gae(rollout, values, next_values, s.gamma, s.gae_lambda)
    batch, infos = [x.flatten(0, 1) for x in (rollout.obs, rollout.actions, logprobs, advantages, returns)], []
    (weights,) = optimizer.param_groups[0]["params"]
    for _ in range(s.epochs):
        order = torch.randperm(returns.numel(), device=returns.device)
        for minibatch in zip(*(x[order].split(s.minibatch) for x in batch)):
            loss, info = ppo_loss(agent, *minibatch, s, temperature)
            if real is not None:
                index = torch.randint(len(real[0]), (max(1, s.minibatch // 2),), device=returns.device)
                loss = loss + s.grounding * s.value_coef * (agent.value(real[0][index]) - real[1][index]).square().mean() / 2
            weights.grad.zero_()
            loss.backward()
            weights.grad[None].renorm_(2, 0, s.max_grad_norm)  # clips the global norm
            optimizer.step()
            infos.append(info)
            tick()
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
    means = torch.stack(infos).mean(0).tolist()
    return dict(zip(PPO_INFO, means)) | {"ppo/explained_variance": 1 - float(unexplained)}


# ------------------------------------------------------------------------------------------------------- the training loops


def train_ppo(run: "Run"):
    """PPO in the real environment (Schulman et al., 2017, Algorithm 1)."""
    s = run.settings.per_action()
    env = Environments(s.env_id, s.num_envs, s.seed, action_repeat=s.action_repeat)
    agent = Agent(env.obs_dim, env.num_actions, s.hidden).to(s.device)
    optimizer = torch.optim.Adam([flatten(agent)], lr=s.lr, eps=1e-5, fused=True)
    scale = ReturnScale(s.num_envs, s.gamma)
    run.begin(agent.greedy, policy=agent, parts=dict(agent=agent, optimizer=optimizer, scale=scale, env=env))

    while run.goes_on():
        temperature = run.temperature()
        run.phase("acting")
        rollout = collect(env, lambda obs: agent.act(obs.to(s.device), temperature).cpu(), run.actions(s.num_steps), run.tick)
        run.real_steps = env.real_steps
        scale.update(rollout)
        run.phase("learning")
        scaled = Rollout(*(x.to(s.device) for x in rollout._replace(rewards=scale(rollout.rewards))))
        log = ppo_update(agent, optimizer, scaled, s, temperature, run.tick)
        run.end_iteration(log)


def train_simple(run: "Run"):
    """SimPLe (Kaiser et al., 2020, Algorithm 1): gather, fit, improve the policy in dreams, repeat."""
    s = run.settings.per_action()
    env = Environments(s.env_id, s.num_envs, s.seed, s.gather_limit, s.action_repeat)
    agent = Agent(env.obs_dim, env.num_actions, s.hidden).to(s.device)
    model = WorldModel(env.obs_dim, env.num_actions, s).to(s.device)
    optimizer = torch.optim.Adam([flatten(agent)], lr=s.lr, eps=1e-5, fused=True)
    wm_optimizer = torch.optim.AdamW([flatten(model)], lr=s.wm_lr, weight_decay=s.wm_weight_decay, fused=True)
    replay, mirror = Replay(s.num_envs, env.obs_dim, s.wm_holdout, s.wm_newest, s.device), Mirror(env.obs_dim, env.num_actions).to(s.device)
    scale = ReturnScale(s.num_envs, s.good_gamma)
    parts = dict(
        agent=agent, optimizer=optimizer, model=model, wm_optimizer=wm_optimizer, replay=replay, mirror=mirror, scale=scale, env=env
    )
    run.begin(agent.greedy, policy=agent, parts=parts)

    while run.goes_on():  # line 2: while not done
        run.phase("gathering")  # lines 3 and 4: collect observations from the real environment
        rollout = gather(run, env, Explorer(agent, env, s), replay)
        scale.update(rollout)
        schedule = Schedule.of(replay, s)
        late = 0 < s.reset_from <= run.real_steps
        stuck = not late and schedule.stuck and run.grown(s.renew_growth, s.warmup_steps * (1 + s.renew_growth))  # the agent begins anew
        reset = schedule.outgrown(run.real_steps, s.reset_from) and run.grown(s.renew_growth, s.reset_from)  # model and agent do
        run.phase("fitting")  # line 5: update the model on all of them
        if reset:
            renew(wm_optimizer, WorldModel(env.obs_dim, env.num_actions, s))
        both = mirror(replay, seek=run.real_steps <= 2 * s.warmup_steps) if s.mirror else replay
        log = learn(run, model, wm_optimizer, both, anew=reset)
        if run.iteration == 0:  # kept from then on, for the policy must not change its mind because the data moved
            agent.normaliser.load_state_dict(model.obs_scale.state_dict())
        run.phase("dreaming")  # line 6: improve the policy inside the model
        if stuck or reset:
            renew(optimizer, Agent(env.obs_dim, env.num_actions, s.hidden))
        begins = stuck or reset or run.iteration == 0
        if begins:
            env.leave()  # who begins is tried from the beginning of an episode
        rounds = s.reset_rounds if reset else s.rounds * (3 if begins else 1)  # ... and learns for longer
        log |= dream_and_improve(run, agent, optimizer, model, both, scale, schedule, rounds)
        run.end_iteration(log | {"wm/anew": int(reset), "dream/anew": int(stuck or reset)})


def learn(run: "Run", model: WorldModel, optimizer, replay: Replay, anew: bool = False) -> dict:
    """Fits the model to the replay, for longer the first time and where it begins anew, and measures it on the held-out episodes."""
    s = run.settings
    updates = s.reset_updates if anew else s.wm_updates if run.iteration else s.wm_first_updates
    return fit(model, optimizer, replay, updates, s.wm_batch, run.tick) | measure(model, replay, math.ceil(20 / s.action_repeat))


class Schedule(NamedTuple):
    """How PPO in dreams follows the fate of real episodes: first find a good ending, then make it safe.

    Where real episodes no longer end and none was good, as in hovering, endings lose their horror, and dreams dare what the data lacks. As they come to
    end well, losses count in full and more, the policy looks further ahead, and its advantages rest less on long dreams and more on a critic that
    knows real episodes.
    """

    good: float  # share of good ones among the latest ten episodes; 0 where nothing has ever ended
    caution: float  # so many times a negative reward at an ending is charged
    gamma: float
    gae_lambda: float
    grounding: float
    fine: float  # the same, but where nothing has ever ended 1 if the reward grows
    stuck: bool  # nothing is fine, and the reward does not grow, or most steps of late belong to episodes that come to no end for fear of bad ones

    @classmethod
    def of(cls, replay: Replay, s: Settings) -> "Schedule":
        latest, steps = replay.finished(s.gather_limit, s.action_repeat)[-10:], math.ceil(1000 / s.action_repeat)
        ended, (before, now) = replay.share_ended(steps), replay.reward_rates(steps)
        good = float(latest.float().mean()) if len(latest) else 0.0
        fine = good if len(latest) else float(now > before)
        sight = max(1 - ended, good)
        return cls(
            good=good,
            caution=max(ended, s.caution * good) if s.caution else 1.0,
            gamma=1 - (1 - s.gamma) ** (1 - sight) * (1 - s.good_gamma) ** sight,
            gae_lambda=s.gae_lambda + good * (s.good_lambda - s.gae_lambda),
            grounding=good * s.grounding,
            fine=fine,
            stuck=fine == 0 and (ended < 0.5 or now <= before),
        )

    def outgrown(self, steps: int, since: int) -> bool:
        """Whether too few of the latest episodes were good. At `since` steps a third is enough; the share needed grows with the data, for
        with more of it a new agent is expected to be better. Where all are good nothing is outgrown."""
        return self.fine < 1 - 2 / 3 * since / steps


def renew(optimizer: torch.optim.Optimizer, fresh: nn.Module):
    """What `optimizer` trains begins anew, with the weights of `fresh`. It loses the habits taken on when data and models were poorer (the primacy
    bias: Nikishin et al., 2022; for models: Ash and Adams, 2020), and keeps its normalisers."""
    (weights,) = optimizer.param_groups[0]["params"]
    weights.data.copy_(nn.utils.parameters_to_vector(fresh.parameters()))
    optimizer.state.clear()


def dream_and_improve(
    run: "Run", agent: Agent, optimizer, model: WorldModel, replay: Replay, scale: ReturnScale, schedule: Schedule, rounds: int
) -> dict:
    """`rounds` PPO updates on dreams that go on from one to the next. No real step is taken. Returns means over the rounds."""
    temperature = run.temperature()
    s = replace(run.settings.per_action(), gamma=schedule.gamma, gae_lambda=schedule.gae_lambda, grounding=schedule.grounding)

    def charged(steps: Rollout) -> Rollout:
        punished = steps.terminated & (steps.rewards < 0)
        return steps._replace(rewards=scale(torch.where(punished, schedule.caution * steps.rewards, steps.rewards)))

    horizon = s.horizon or trusted_horizon(model, replay, s.horizon_error, s.horizon_max)
    dream, usual = Dream(model, replay, s.dreams, s, s.beginnings, s.rare, horizon, s.realign), replay.usual(s.action_repeat)
    logs = []
    for _ in range(rounds):
        rollout = collect(dream, lambda obs: agent.act(obs, temperature), s.dream_steps, run.tick)
        run.imagined_steps += rollout.actions.numel()
        real = real_returns(agent, replay, charged, s) if s.grounding else None
        log = ppo_update(agent, optimizer, charged(rollout), s, temperature, run.tick, real)
        logs.append(log | fates(rollout, usual))
    means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    told = dict(disagreement=float(dream.disagreement), horizon=horizon * s.action_repeat) | schedule._asdict()
    return means | {f"dream/{name}": value for name, value in told.items()}


@torch.no_grad()
def real_returns(agent: Agent, replay: Replay, charged, s: Settings, number: int = 256, length: int = 64) -> tuple[Tensor, Tensor]:
    """Observations (K, O) on `number` pieces of real episodes and their lambda-returns (K). They ground the critic: what a model gets wrong, such
    as which falls are survived, it learns from what came of them. Older policies took these steps, and nothing corrects for that."""
    steps, valid = replay.excerpts(number, length)
    _, returns = compute_gae(charged(steps), agent.value(steps.obs), agent.value(steps.next_obs), s.gamma, s.gae_lambda)
    return steps.obs[valid], returns[valid]


def fates(rollout: Rollout, usual: float) -> dict[str, float]:
    """How dreams fare in a rollout: their undiscounted return in it, and the shares that end well (with at least the `usual` reward: "positive" in the
    log's names), end badly, and do not end."""
    dreams = rollout.rewards.shape[1] + int((rollout.terminated | rollout.truncated)[:-1].sum())
    good = int((rollout.terminated & (rollout.rewards >= usual)).sum())
    bad = int(rollout.terminated.sum()) - good
    total = float(rollout.rewards.sum())
    sums = dict(return_mean=total, positive_end_share=good, negative_end_share=bad, alive_share=dreams - good - bad)
    return {f"dream/{name}": value / dreams for name, value in sums.items()}


def gather(run: "Run", env: Environments, act, replay: Replay) -> Rollout:
    """Adds real steps to the replay, the more the longer it is; the first ones, when nothing is known yet, at random."""
    s = run.settings
    if run.real_steps:
        steps = min(s.num_steps, s.growth * run.real_steps / s.num_envs)
    else:
        steps, act = s.warmup_steps / s.num_envs, lambda obs: torch.randint(env.num_actions, (len(obs),))
    rollout = collect(env, act, run.actions(steps), run.tick)
    run.real_steps = env.real_steps
    replay.add(rollout)
    return rollout


class Explorer:
    """Acts in the real environment. Most episodes are greedy, for some rewards, such as for lying still, come to no policy that draws.

    In old episodes random actions are held (Dabney et al., 2021, with other durations): a hundred single steps undo each other, a held one ends what
    would go on for ever. In greedy episodes none is held unless the latest old one was cut off. It lives for one gathering, and so do its holds.
    """

    def __init__(self, agent: Agent, env: Environments, s: Settings):
        self.agent, self.env, self.s = agent, env, s
        self.held = self.remaining = torch.zeros(len(env.envs), dtype=torch.long)  # (N) actions, and how many more times they are taken

    def __call__(self, obs: Tensor) -> Tensor:
        """(N, O) -> actions (N)."""
        s, episode, N = self.s, self.env.episode, len(obs)
        greedy = (s.gather_greedy * episode).ceil() > (s.gather_greedy * (episode - 1)).ceil()
        obs = obs.to(s.device)
        actions = torch.where(greedy, self.agent.greedy(obs).cpu(), self.agent.act(obs, s.gather_temperature).cpu())
        if not (s.gather_limit and s.gather_hold):
            return actions
        old = self.env.old() & (~greedy | self.env.cut)
        begins = old & (self.remaining <= 0) & (torch.rand(N) < 3 / s.gather_hold)  # so that actions are held for about 60 % of the time
        self.held = torch.where(begins, torch.randint(self.env.num_actions, (N,)), self.held)
        self.remaining = torch.where(begins, torch.randint(1, s.gather_hold + 1, (N,)), self.remaining - 1)
        return torch.where(old & (self.remaining > 0), self.held, actions)


def train_mpc(run: "Run"):
    """Planning instead of a policy (Chua et al., 2018, Algorithm 1): gather with the planner, fit, repeat.

    Each plan starts without memory and looks `plan_horizon` steps ahead; of the settings of PPO and dreams only the discount plays a part.
    """
    s = run.settings.per_action()
    env = Environments(s.env_id, s.num_envs, s.seed, action_repeat=s.action_repeat)
    model = WorldModel(env.obs_dim, env.num_actions, s).to(s.device)
    optimizer = torch.optim.AdamW([flatten(model)], lr=s.wm_lr, weight_decay=s.wm_weight_decay, fused=True)
    replay = Replay(s.num_envs, env.obs_dim, s.wm_holdout, s.wm_newest, s.device)
    planner = functools.partial(plan_actions, model, s)
    run.begin(planner, policy=model, parts=dict(model=model, optimizer=optimizer, replay=replay, env=env))

    while run.goes_on():
        run.phase("gathering")
        gather(run, env, planner, replay)
        run.phase("fitting")
        log = learn(run, model, optimizer, replay)
        run.end_iteration(log)


def plan_actions(model: WorldModel, s: Settings, obs: Tensor) -> Tensor:
    """(N, O) -> planned actions (N)."""
    obs = obs.to(s.device)
    hidden = obs.new_zeros(model.members, len(obs), model.memory.size)
    return plan(model, obs, hidden, s.plan_horizon, s.plan_candidates, s.plan_rounds, s.gamma).cpu()


# ---------------------------------------------------------------------------------------------------------------- evaluation


class Scores(NamedTuple):
    returns: np.ndarray  # (n,) undiscounted
    lengths: np.ndarray  # (n,) steps
    timeouts: np.ndarray  # (n,) bool

    def row(self) -> dict[str, float]:
        return {
            "eval/return_mean": float(self.returns.mean()),
            "eval/return_std": float(self.returns.std()),
            "eval/length_mean": float(self.lengths.mean()),
            "eval/timeout_share": float(self.timeouts.mean()),
            "eval/episodes": len(self.returns),
        }


def play(act, env_id: str, episodes: int, seed: int, action_repeat: int, tick=lambda: None, frames: list | None = None) -> Scores:
    """Plays one episode on each of the environment seeds seed, seed + 1, ...; act(obs (n, O)) -> actions (n). `frames` collects pictures of the first,
    one an action."""
    envs = list(evaluation_envs(env_id, episodes))
    if frames is not None:
        envs[0] = make_env(env_id, render_mode="rgb_array")
    obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    returns, lengths, timeouts, alive = np.zeros(episodes), np.zeros(episodes, int), np.zeros(episodes, bool), list(range(episodes))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)  # for policies that draw, such as a planner
        while alive:
            actions = act(torch.as_tensor(np.array([obs[i] for i in alive], dtype=np.float32))).tolist()
            if frames is not None and 0 in alive:
                frames.append(envs[0].render())
            still = []
            for i, action in zip(alive, actions):
                own = action + int(envs[i].action_space.start)
                obs[i], reward, terminated, timeouts[i], steps = take(envs[i], own, action_repeat)
                returns[i] += reward
                lengths[i] += steps
                if not (terminated or timeouts[i]):
                    still.append(i)
            alive = still
            tick()
    return Scores(returns, lengths, timeouts)


@functools.lru_cache(maxsize=2)
def evaluation_envs(env_id: str, episodes: int) -> list[gym.Env]:
    return [make_env(env_id) for _ in range(episodes)]


def random_actions(s: Settings):
    """A policy that draws actions uniformly, from a stream of its own."""
    num_actions, rng = int(make_env(s.env_id).action_space.n), np.random.default_rng(0)
    return lambda obs: torch.as_tensor(rng.integers(num_actions, size=len(obs)))


def outcome(evaluations: list[float], final: float, threshold: float, random: float) -> str:
    """'solved', 'collapsed', 'stuck' or 'other', from the evaluation means over the run, the final score and the random policy's.

    The distances are those of LunarLander; where returns span less than 150, a run is solved or other.
    """
    curve = np.array(evaluations)
    if final >= threshold:
        return "solved"
    smooth = np.convolve(curve, np.ones(3) / 3, "valid") if len(curve) >= 3 else curve
    fall = (np.maximum.accumulate(smooth) - smooth).max()
    if fall >= 150 and smooth.max() >= curve[0] + 100 and smooth[-1] <= smooth.max() - 100:
        return "collapsed"
    last = curve[-max(2, len(curve) // 4) :]
    return "stuck" if final >= random + 100 and np.ptp(last) <= 100 else "other"


# ------------------------------------------------------------------------------------------------------------------- the run


class Diverged(Exception):
    """A number stopped being finite; the run ends with exit status 3."""


class Interrupted(Exception):
    """A signal asked the run to leave; the argument is its number."""


class Run:
    """One run, as the training loops see it: counts steps, logs, evaluates, saves after every iteration, and goes on from there when started again.

    All that happens between two saves follows from the first of them, so an interrupted iteration is simply done again, bit for bit.
    """

    COUNTERS = "real_steps", "imagined_steps", "iteration", "steps_to_solve"
    LENGTH = "--total-steps"  # what makes a finished run go on

    def __init__(self, settings: Settings, view: "View"):
        self.settings, self.view, self.folder = settings, view, settings.folder()
        self.real_steps = self.imagined_steps = self.iteration = 0
        self.steps_to_solve = self.summary = self.signal = self.board = None
        self.saved = self.counters()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.threshold = make_env(settings.env_id).spec.reward_threshold  # what counts as solved
        if self.threshold is None:
            self.threshold = 200.0
            view.say(f"{settings.env_id} does not say which return solves it; 200 is taken.")
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)

    def begin(self, act, policy: nn.Module, parts: dict):
        """`act` is what is evaluated, `policy` the module behind it, `parts` all that has a state. Goes on from the newest good checkpoint."""
        self.act, self.policy, self.parts = act, policy, parts
        restored, path = restore(self), self.folder / "summary.json"
        if restored and not self.goes_on():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or a damaged one: the end is done again
                summary = read_json(path)
                if summary["status"] == "finished" and verdict(summary) and summary | self.counters() == summary:
                    self.summary = summary
        if self.summary is None:
            path.unlink(missing_ok=True)
            write_json(self.folder / "config.json", asdict(self.settings))
            write_json(self.folder / "env.json", surroundings(self.settings))
            self.board = tensorboard(self.folder, self.real_steps + 1) if self.settings.tensorboard else None
            self.view.start(self)
        if not restored:
            self.log(self.evaluation())

    def goes_on(self) -> bool:
        return self.real_steps < self.settings.total_steps

    def actions(self, steps: float) -> int:
        """How many actions of each environment make so many real steps of it, or as many as the run still has."""
        s = self.settings
        return math.ceil(min(steps, (s.total_steps - self.real_steps) / s.num_envs) / s.action_repeat)

    def grown(self, share: float, since: float) -> bool:
        """Whether in this iteration the real steps have passed `since`, `since` (1 + share), `since` (1 + share)^2, ...; never if either is 0, nor in
        the first iteration, nor where no further growth is left: who begins anew near the end would hardly act (so a run that is made longer misses
        what fell on its end)."""
        times = lambda steps: int(math.log(steps / since, 1 + share)) if steps >= since else -1  # noqa: E731
        in_time = self.iteration > 0 and self.real_steps * (1 + share) <= self.settings.total_steps
        return share > 0 and since > 0 and in_time and times(self.real_steps) > times(self.saved["real_steps"])

    def temperature(self) -> float:
        s = self.settings
        return s.temperature + ((s.temperature_end or s.temperature) - s.temperature) * min(1, self.real_steps / s.total_steps)

    def phase(self, name: str):
        self.view.now = name

    def tick(self):
        """Called in every long loop: leaves if a signal has asked for it."""
        if self.signal:
            raise Interrupted(self.signal)
        self.view.tick(self)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second time: leave at once

    def end_iteration(self, log: dict):
        """Checks all that was logged and learned, evaluates if it is time to, logs and saves."""
        self.iteration += 1
        pack({name: part.state_dict() for name, part in self.parts.items()}, learned := {})
        self.check(log | learned)
        every, before = self.settings.eval_every, self.saved["real_steps"]
        evaluated = before // every != self.real_steps // every or not self.goes_on()
        self.log(log | (self.evaluation() if evaluated else {}))
        self.save_policy()
        save_checkpoint(self)
        self.saved = self.counters()

    def save_policy(self):
        policy = {name: x for name, x in self.policy.state_dict().items() if not name.startswith("critic")}
        write_tensors(self.folder / "policy.safetensors", policy, env_id=self.settings.env_id)

    def check(self, numbers: dict):
        """Ends the run, before anything is overwritten, unless all of these numbers and tensors are finite."""
        bad = [name for name, x in numbers.items() if x is not None and not torch.as_tensor(x).isfinite().all()]
        if bad:
            raise Diverged(f"not finite after {self.real_steps} real steps: {', '.join(bad[:5])}" + ", ..." * (len(bad) > 5))

    def play(self, episodes: int, seed: int) -> Scores:
        scores = play(self.act, self.settings.env_id, episodes, seed, self.settings.action_repeat, self.tick)
        self.check(scores.row())
        return scores

    def evaluation(self) -> dict:
        """Greedy, 20 episodes to follow progress, and 80 more where these average the threshold. No training depends on it."""
        self.phase("evaluating")
        scores = self.play(20, 10_000)
        if scores.returns.mean() >= self.threshold:
            scores = Scores(*map(np.concatenate, zip(scores, self.play(80, 10_020))))
            if scores.returns.mean() >= self.threshold and self.steps_to_solve is None:
                self.steps_to_solve = self.real_steps
        return scores.row()

    def log(self, row: dict):
        row = dict(iteration=self.iteration, real_steps=self.real_steps, imagined_steps=self.imagined_steps, **self.clocks()) | row
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        if self.board:
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(name, value, self.real_steps)
            self.board.flush()
        self.view.row(self, row)

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def counters(self) -> dict:
        return {name: getattr(self, name) for name in self.COUNTERS}

    def clocks(self) -> dict:
        return dict(wall_s=round(time.perf_counter() - self.wall, 3), cpu_s=round(time.process_time() - self.cpu, 3))

    def finish(self):
        """The pictures, the final score, and last of all the summary, which says that the run is finished."""
        self.phase("drawing")
        draw_training(self.rows(), self.threshold, self.folder / "training.png")
        self.tick()
        if "model" in self.parts:
            draw_diagnosis(self.parts["model"], self.parts["replay"], self.folder)
        self.phase("final evaluation")
        self.summarise("finished", self.play(100, 20_000))

    def summarise(self, status: str, final: Scores | None = None):
        """Writes summary.json; the outcome needs the final scores."""
        s, evaluations = self.settings, [row["eval/return_mean"] for row in self.rows() if "eval/return_mean" in row]
        summary = dict(status=status, mode=s.mode, env_id=s.env_id, seed=s.seed) | self.counters() | self.clocks()
        summary |= dict(peak_return_mean=max(evaluations, default=None), outcome="other", hovering=False)
        summary |= dict(final_return_mean=None, final_return_std=None, final_episodes=0)
        if final is not None:
            random = play(random_actions(s), s.env_id, 100, 20_000, 1, self.tick).returns.mean()  # an action a step, for all runs alike
            mean, std = float(final.returns.mean()), float(final.returns.std())
            summary |= dict(final_return_mean=mean, final_return_std=std, final_episodes=len(final.returns))
            summary |= dict(outcome=outcome(evaluations, mean, self.threshold, random), hovering=bool(final.timeouts.mean() >= 0.5))
        write_json(self.folder / "summary.json", summary)
        self.summary = summary


def verdict(summary: dict) -> str:
    score = "{outcome}: final score {final_return_mean:.1f} +- {final_return_std:.1f} over {final_episodes} episodes"
    return (score + " after {real_steps:,} real steps").format(**summary)


def surroundings(s: Settings) -> dict:
    """Versions, commit ("-dirty" if files here differ from it) and machine, for env.json."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True).stdout.strip()

    commit = ""
    with contextlib.suppress(OSError):  # no git
        commit = git("rev-parse", "--verify", "HEAD")
        commit += "-dirty" if commit and git("status", "--porcelain", ".") else ""
    versions = {module.__name__: module.__version__ for module in (torch, gym, np)}
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    machine = dict(platform=platform.platform(), cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count())
    return dict(python=platform.python_version(), **versions, commit=commit or None, **machine, threads=s.threads, device=s.device)


# ---------------------------------------------------------------------------------------------------------------- run folder


DIAGNOSIS = "reward_histogram.png", "dreams.png", "map.png"
OWN = "config.json", "env.json", "summary.json", "policy.safetensors", "training.png", *DIAGNOSIS
FOLDERS = "checkpoint", "world_model", "tensorboard"
ESSENTIAL = "mode", "env_id", "seed"


@contextlib.contextmanager
def claimed(run: Run):
    """In here the run folder is this process's alone. Refuses one where another is at work, and one of something else, before anything is touched.

    `run.metrics`, the open log, is also the lock: it is freed when the file is closed, in whatever way the process ends.
    """
    folder, log = run.folder, run.folder / "metrics.jsonl"
    files = [*own_files(folder), log]
    foreign = [path for path in files if path.is_symlink() or path.exists() and not path.is_file()]
    if not (foreign or any(path.exists() for path in checkpoints(folder)) or holds_settings(folder / "config.json")):
        foreign = [path for path in files if path.exists() and (path != log or path.stat().st_size)]
    foreign += [folder / name for name in FOLDERS if (folder / name).is_symlink()]
    if foreign:
        raise UsageError(f"{foreign[0]} is not of a run of this kit; choose another --run-dir.")
    try:
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        run.metrics = open(log, "ab")
    except OSError as error:
        raise UsageError(f"Run folder {folder} can't be used: {error.strerror or error}.")
    with run.metrics:
        try:
            fcntl.flock(run.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another process is at work in {folder}.")
        if run.settings.fresh:
            run.metrics.truncate(0)
            for path in sorted(own_files(folder), key=lambda path: path.name == "config.json"):  # last what tells that the folder is ours
                path.unlink(missing_ok=True)
        yield


def own_files(folder: Path) -> list[Path]:
    """Where a run, or a look at its model, has written or may write, the log apart."""
    diagnosis = (folder / "world_model" / name for name in ("diagnosis.json", *DIAGNOSIS))
    return [*(folder / name for name in OWN), *diagnosis, *folder.glob("tensorboard/events.out.tfevents.*"), *checkpoint_files(folder)]


def holds_settings(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return set(ESSENTIAL) <= read_json(path).keys()
    return False


def save_checkpoint(run: Run):
    """checkpoint/ITERATION.safetensors, then its .json with the SHA-256: only with both does it count. It holds the settings and the log, too."""
    tree = {name: part.state_dict() for name, part in run.parts.items()} | run.counters() | run.clocks()
    tree["settings"] = {name: x for name, x in asdict(run.settings).items() if name not in OF_THE_COMMAND}
    tree["metrics"] = torch.frombuffer(bytearray((run.folder / "metrics.jsonl").read_bytes()), dtype=torch.uint8)
    tree["random"] = torch.get_rng_state()
    if torch.device(run.settings.device).type == "cuda":
        tree["random_cuda"] = torch.cuda.get_rng_state(run.settings.device)
    tensors = {}
    state = json.dumps(pack(tree, tensors))
    path = run.folder / "checkpoint" / f"{run.iteration:08d}.safetensors"
    write_json(path.with_suffix(".json"), dict(sha256=write_tensors(path, tensors, state=state)))
    keep_two(run.folder)


def restore(run: Run) -> bool:
    """Goes on from the newest checkpoint whose SHA-256 is right; False if there is none at all.

    Log, settings and policy beside it are copies of what it holds. They are mended, for they may be those of an iteration that was not finished.
    """
    found = checkpoints(run.folder)
    for path in reversed(found):
        try:
            tensors, state = read_checkpoint(path)
        except (OSError, ValueError):
            run.view.say(f"Checkpoint {path} is damaged; trying the one before it.")
            continue
        try:
            state = unpack(json.loads(state), tensors)
            refuse_other(run, state["settings"])
            for name, part in run.parts.items():
                part.load_state_dict(state[name])
            run.saved = {name: state[name] for name in run.COUNTERS}
            kinds = {name: (type(x), int) if x is None else (type(x),) for name, x in run.counters().items()}
            if any(type(x) not in kinds[name] or (x or 0) < 0 for name, x in run.saved.items()):
                raise ValueError(f"it can't have counted {run.saved}")
            vars(run).update(run.saved)
            run.wall, run.cpu = run.wall - state["wall_s"], run.cpu - state["cpu_s"]
            torch.set_rng_state(state["random"])
            if "random_cuda" in state and torch.device(run.settings.device).type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], run.settings.device)
            log = state["metrics"].numpy().tobytes()
            write_json(run.folder / "config.json", asdict(run.settings) | state["settings"])
        except (UsageError, OSError):
            raise
        except Exception as error:  # whatever it is that doesn't fit
            reason = f"{type(error).__name__}, {error}".splitlines()[0]
            raise UsageError(f"{path} was written by another version of this kit and can't be resumed ({reason}); --fresh begins anew.")
        run.save_policy()
        break
    else:
        if found:
            raise UsageError(f"Every checkpoint in {run.folder} is damaged; --fresh deletes them and begins anew.")
        if holds_settings(run.folder / "config.json"):
            refuse_other(run, read_json(run.folder / "config.json"))
        log = b""
    if (run.folder / "metrics.jsonl").read_bytes() != log:
        run.metrics.truncate(0)
        run.metrics.write(log)
        run.metrics.flush()
    keep_two(run.folder)
    return bool(found)


def refuse_other(run: Run, old: dict):
    """Raises UsageError unless the old settings have the same essentials as the run's."""
    now = asdict(run.settings)
    own = [f.name for f in fields(run.settings) if f.metadata["identity"] or f.name in ESSENTIAL]
    differs = [f"{name} was {old.get(name)!r} and is now {now[name]!r}" for name in own if old.get(name) != now[name]]
    if differs:
        raise UsageError(f"{run.folder} holds a run with other settings: {'; '.join(differs)}. Choose another --run-dir, or --fresh.")


def keep_two(folder: Path):
    """Deletes all but the last two checkpoints, and what a kill left of an unfinished one."""
    kept = [path.stem for path in checkpoints(folder) if path.exists()][-2:]
    for path in checkpoint_files(folder):
        if path.stem not in kept:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------- live view


class View:
    """What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

    SHOWN = {
        "real steps": "real_steps", "imagined steps": "imagined_steps", "evaluation": "eval/return_mean", "episode length": "eval/length_mean",
        "time-outs": "eval/timeout_share", "model error, 1 step": "wm/error_1step", "open loop": "wm/error_openloop", "dream return": "dream/return_mean",
        "dreams ending well": "dream/positive_end_share", "ending badly": "dream/negative_end_share", "alive": "dream/alive_share",
        "disagreement": "dream/disagreement", "caution": "dream/caution", "KL": "ppo/approx_kl", "entropy": "ppo/entropy", "explained variance": "ppo/explained_variance",
    }  # fmt: skip

    def __init__(self):
        self.console, self.newest, self.live, self.now = Console(), {}, None, ""

    def say(self, sentence: str):
        self.console.print(sentence, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def start(self, run: Run):
        s = run.settings
        self.say(f"{s.mode} on {s.env_id}, seed {s.seed}, in {run.folder}" + f", from real step {run.real_steps:,}" * (run.real_steps > 0))
        now, steps = TextColumn("{task.fields[now]:<16}"), TextColumn("{task.completed:,}/{task.total:,} real steps, {task.fields[rate]}")
        left = TextColumn("left")
        self.progress = Progress(now, BarColumn(None), steps, TimeElapsedColumn(), TimeRemainingColumn(), left, console=self.console)
        self.bar = self.progress.add_task("", total=s.total_steps, completed=run.real_steps, now="", rate="")
        self.began, self.from_steps = time.perf_counter(), run.real_steps
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4)
            self.live.start()

    def render(self):
        table = Table.grid(padding=(0, 3))
        cells = [
            f"[dim]{label}[/dim] {number(self.newest[name])}" for label, name in self.SHOWN.items() if self.newest.get(name) is not None
        ]
        for i in range(0, len(cells), 3):
            table.add_row(*cells[i : i + 3])
        return Group(self.progress, table)

    def tick(self, run: Run):
        if self.live:
            rate = (run.real_steps - self.from_steps) / max(time.perf_counter() - self.began, 1e-9)
            self.progress.update(self.bar, completed=run.real_steps, now=self.now, rate=f"{rate:,.0f}/s")

    def row(self, run: Run, row: dict):
        self.newest |= row
        if not self.console.is_terminal:
            done, shown = run.real_steps / run.settings.total_steps, [name for name in self.SHOWN.values() if row.get(name) is not None]
            left = f", {(1 / done - 1) * row['wall_s']:,.0f} s left" if 0 < done < 1 else ""
            self.say(f"{100 * done:3.0f} %{left} | " + "  ".join(f"{name} {number(row[name])}" for name in shown))

    def stop(self):
        if self.live:
            self.live.stop()


def tensorboard(folder: Path, purge_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs one more package: pip install tensorboard==2.21.0")
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)


def number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"


# ------------------------------------------------------------------------------------------------------------------ pictures


PANELS = {  # title: names of the curves
    "return, greedy": ["eval/return_mean"],
    "losses": ["ppo/value_loss", "wm/loss_reward", "wm/loss_ending"],
    "policy": ["ppo/entropy", "ppo/explained_variance", "ppo/clip_fraction"],
    "model error on held-out episodes": ["wm/error_1step", "wm/error_openloop", "wm/reward_rmse", "wm/reward_tail_rmse"],
    "dreams": ["dream/positive_end_share", "dream/negative_end_share", "dream/alive_share"],
    "episodes": ["eval/timeout_share"],
}


def draw_training(rows: list[dict], threshold: float, path: Path):
    """Returns, losses and the rest over real steps."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items()):
        for name in names:
            points = [(row["real_steps"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(title=title, xlabel="real steps", yscale="log" if title == "losses" or title.startswith("model") else "linear")
        axis.locator_params(axis="x", nbins=5)
        if axis.lines:
            axis.legend(fontsize=8)
    columns = "real_steps", "eval/return_mean", "eval/return_std"
    steps, mean, std = np.array([[row[name] for name in columns] for row in rows if "eval/return_mean" in row]).T
    axes[0, 0].fill_between(steps, mean - std, mean + std, alpha=0.2)
    axes[0, 0].axhline(threshold, color="gray", linestyle=":")
    axes[0, 0].annotate("solved", (0, threshold), va="bottom", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_gif(frames: list[np.ndarray], action_repeat: int, path: Path):
    """About every third real step, of 20 ms each, or every action, at half size: a landing is about half a megabyte."""
    from PIL import Image

    every = max(1, 3 // action_repeat)
    images = [Image.fromarray(frame).reduce(2).convert("P", palette=Image.Palette.ADAPTIVE, colors=32) for frame in frames[::every]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=20 * every * action_repeat, loop=0, optimize=True)


# -------------------------------------------------------------------------------------------------------------- command line

app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
TRAIN = dict(ppo=train_ppo, simple=train_simple, mpc=train_mpc)


@app.callback(invoke_without_command=True)
@settings_command(Settings)
def train(ctx: typer.Context, given: dict):
    """Trains PPO in the real environment, or inside a world model learned from it.

    The same command again resumes an interrupted run, or says that it is finished. Everything is written to the run folder: [bold]summary.json[/bold],
    [bold]metrics.jsonl[/bold], [bold]policy.safetensors[/bold], pictures and checkpoints. A GIF of the result: [bold]python ppo_mbrl.py evaluate RUN_DIR --gif landing.gif[/bold]
    """
    if ctx.invoked_subcommand is not None:
        return
    settings, view = Settings.resolve(given), View()
    panels = {f.name: f.metadata["panel"] for f in fields(Settings)}
    in_dreams = ("Gathering", "Exploring", "World model", "Dreams", "Planning")
    unused = dict(ppo=in_dreams, simple=("Planning",), mpc=("Exploring", "PPO", "Dreams"))[settings.mode]
    idle = [name for name in given if panels[name] in unused]
    if idle:
        view.say(f"Without effect in --mode {settings.mode}: {', '.join(idle)}.")
    check_device(settings.device)
    raise typer.Exit(carry_out(Run(settings, view), TRAIN[settings.mode]))


def carry_out(run: Run, loop) -> int:
    """Takes a training loop to its end, or to where it breaks off, and says how it went. Returns the exit status."""
    view = run.view
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, run.on_signal)
    with claimed(run):
        try:
            loop(run)
            if run.summary:
                view.say(f"This run is finished already; raise {run.LENGTH} to go on, or begin anew with --fresh.")
            else:
                run.finish()
            sentence, status = f"{verdict(run.summary)}; see {run.folder}", 0
        except Diverged as error:
            run.summarise("diverged")
            sentence, status = f"Diverged: {error}. What was saved before is kept in {run.folder}.", 3
        except Interrupted as stop:
            vars(run).update(run.saved)  # the iteration that was not finished will be done again
            run.summarise("interrupted")
            sentence = f"Interrupted; saved up to real step {run.real_steps:,}. The same command goes on from there. ({run.folder})"
            status = 128 + stop.args[0]
        finally:
            view.stop()
    view.say(sentence)
    return status


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    episodes: Annotated[int, typer.Option(min=1, max=10_000, help="Episodes, one on each environment seed from --seed on.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="First environment seed.")] = 20_000,
    gif: Annotated[Optional[Path], typer.Option(help="Also record the first episode here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    env_id: Annotated[Optional[str], typer.Option(help="Play this environment instead of the run's own.")] = None,
):
    """Plays a trained policy greedily and prints its score."""
    if gif and (gif.suffix.lower() != ".gif" or not gif.absolute().parent.is_dir()):
        raise UsageError(f"{gif} must be a .gif in a folder that exists.")
    settings, act = load_policy(run_dir, env_id)
    frames = [] if gif else None
    scores = play(act, settings.env_id, episodes, seed, settings.action_repeat, frames=frames)
    if gif:
        save_gif(frames, settings.action_repeat, gif)
    if as_json:
        row = {name.removeprefix("eval/"): value for name, value in scores.row().items()}
        print(json.dumps(dict(run_dir=str(run_dir), env_id=settings.env_id, seed=seed) | row | dict(returns=scores.returns.tolist())))
    else:
        mean, std, length, timeouts, _ = scores.row().values()
        View().say(f"{mean:.1f} +- {std:.1f} over {episodes} episodes of {length:.0f} steps; {timeouts:.0%} ran into the time limit")


def load_policy(run_dir: Path, env_id: str | None = None):
    """The settings of a run and its newest policy as act(obs (n, O)) -> actions (n)."""
    try:
        settings = Settings.resolve(dict(config=str(run_dir / "config.json")) | (dict(env_id=env_id) if env_id else {}), of_a_fork=True)
        tensors = load_file(run_dir / "policy.safetensors")
    except (OSError, UsageError, SafetensorError) as error:
        raise UsageError(f"{run_dir} holds no policy that can be read: {error}.")
    torch.set_num_threads(settings.threads)
    env = make_env(settings.env_id)
    sizes = env.observation_space.shape[0], int(env.action_space.n)
    settings.device = "cpu"
    policy = WorldModel(*sizes, settings) if settings.mode == "mpc" else Agent(*sizes, settings.hidden)
    try:
        missing, unexpected = policy.load_state_dict(tensors, strict=False)
        if unexpected or any(not name.startswith("critic") for name in missing):
            raise RuntimeError("tensors are missing or unknown")
    except RuntimeError as error:
        raise UsageError(f"The policy in {run_dir} does not fit its settings: {str(error).splitlines()[-1].strip()}")
    return settings, functools.partial(plan_actions, policy, settings.per_action()) if settings.mode == "mpc" else policy.greedy


def check_device(device: str):
    try:
        torch.zeros(1, device=device, dtype=torch.float64).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UsageError(f"--device {device} can't be used here: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    run_command(app)
