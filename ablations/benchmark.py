"""How fast is the kit? Figures are ratios of two things done one after the other on one thread, several times.

    python ablations/benchmark.py                     all of it, about ten minutes; rows go to runs/benchmark/benchmark.csv
    python ablations/benchmark.py --only dreams,fit
    python ablations/benchmark.py --only solve        whole runs until they solve the task: not among the rest, for a pair takes ten to thirty minutes
    python ablations/benchmark.py --device cuda       dreams on a GPU against the CPU, from 200 to 1,048,576 of them

CPU time is what is compared, so that other processes on the machine do little harm; only seeds side by side and the GPU go by the clock. "Bare"
stands for matrix products of the same shapes as the kit's own, and nothing else. Peers: stable-baselines3, if it is installed
(requirements-dev.txt), and a loop in the manner of CleanRL's ppo.py: SyncVectorEnv with recorded statistics, a torch distribution, storage
filled step by step.
"""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ppo_mbrl import Agent, Environments, ReturnScale, Settings, check_device, collect, play, ppo_update  # noqa: E402
from world_model import Dream, Replay, UsageError, WorldModel, fit, flatten  # noqa: E402

ENV = "LunarLander-v3"


class Ratio(NamedTuple):
    """`ours` against `other`, in times as fast; or, with `at_most`, in times as much."""

    measure: str
    against: str
    target: float
    values: list[float]
    at_most: bool = False
    note: str = ""

    def row(self) -> dict:
        middle = float(np.median(self.values))
        met = middle <= self.target if self.at_most else middle >= self.target
        spread = dict(
            median=round(middle, 3), lowest=round(min(self.values), 3), highest=round(max(self.values), 3), pairs=len(self.values)
        )
        sign = "<=" if self.at_most else ">="
        return dict(measure=self.measure, against=self.against, **spread, target=f"{sign} {self.target:g}", met=met, note=self.note)


def seconds(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def pairs(ours, other, number: int) -> tuple[list[float], float]:
    """How many times as fast `ours` is as `other`, pair by pair after one pair to warm up, and the seconds of `ours`."""
    times = [(seconds(ours), seconds(other)) for _ in range(number + 1)][1:]
    return [b / a for a, b in times], float(np.median([a for a, _ in times]))


# ------------------------------------------------------------------------------------------------------------ model-free PPO


def our_ppo(num_envs: int, num_steps: int, minibatch: int, updates: int):
    s = Settings.resolve(dict(mode="ppo", num_envs=num_envs, num_steps=num_steps, minibatch=minibatch, epochs=4))
    env, scale = Environments(ENV, num_envs, 0), ReturnScale(num_envs, s.gamma)
    agent = Agent(env.obs_dim, env.num_actions, 64)
    optimizer = torch.optim.Adam([flatten(agent)], lr=s.lr, eps=1e-5, fused=True)

    def work():
        for _ in range(updates):
            rollout = collect(env, agent.act, num_steps)
            scale.update(rollout)
            ppo_update(agent, optimizer, rollout._replace(rewards=scale(rollout.rewards)), s)

    return work


def stable_baselines(num_envs: int, num_steps: int, minibatch: int, seed: int = 0):
    """The peer's PPO with what its zoo has tuned for LunarLander, but for these numbers."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    kwargs = dict(n_steps=num_steps, batch_size=minibatch, n_epochs=4, gamma=0.999, gae_lambda=0.98, ent_coef=0.01, device="cpu", seed=seed)
    return PPO("MlpPolicy", make_vec_env(ENV, num_envs), policy_kwargs=dict(net_arch=dict(pi=[64, 64], vf=[64, 64])), **kwargs)


def cleanrl_style(num_envs: int, num_steps: int, minibatch: int, updates: int):
    """The same algorithm, written and run as users of single-file implementations do."""
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(ENV)) for _ in range(num_envs)])

    def layer(size_in, size_out, gain=math.sqrt(2)):
        linear = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(linear.weight, gain)
        return linear

    actor = nn.Sequential(layer(8, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 4, 0.01))
    critic = nn.Sequential(layer(8, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2.5e-4, eps=1e-5)
    obs, rewards = torch.zeros(num_steps, num_envs, 8), torch.zeros(num_steps, num_envs)
    actions, logprobs, ended, values = (torch.zeros(num_steps, num_envs) for _ in range(4))
    now, over = torch.as_tensor(envs.reset(seed=0)[0]), torch.zeros(num_envs)

    def evaluate(x, action=None):
        distribution = torch.distributions.Categorical(logits=actor(x))
        action = distribution.sample() if action is None else action
        return action, distribution.log_prob(action), distribution.entropy(), critic(x)

    def work():
        nonlocal now, over
        for _ in range(updates):
            for t in range(num_steps):
                obs[t], ended[t] = now, over
                with torch.no_grad():
                    actions[t], logprobs[t], _, value = evaluate(now)
                values[t] = value.flatten()
                now, reward, terminated, truncated, _ = envs.step(actions[t].long().numpy())
                rewards[t], now, over = torch.tensor(reward).view(-1), torch.Tensor(now), torch.Tensor(np.logical_or(terminated, truncated))
            with torch.no_grad():
                advantages, last, after = torch.zeros_like(rewards), 0, critic(now).flatten()
                for t in reversed(range(num_steps)):
                    goes_on = 1 - (over if t == num_steps - 1 else ended[t + 1])
                    last = (
                        rewards[t]
                        + 0.99 * (after if t == num_steps - 1 else values[t + 1]) * goes_on
                        - values[t]
                        + 0.99 * 0.95 * goes_on * last
                    )
                    advantages[t] = last
                returns = advantages + values
            flat = [x.reshape(-1, *x.shape[2:]) for x in (obs, actions, logprobs, advantages, returns, values)]
            index, clipped = np.arange(num_envs * num_steps), []
            for _ in range(4):
                np.random.shuffle(index)
                for start in range(0, len(index), minibatch):
                    o, a, old, adv, ret, val = (x[index[start : start + minibatch]] for x in flat)
                    _, new, entropy, value = evaluate(o, a.long())
                    ratio = (new - old).exp()
                    with torch.no_grad():
                        clipped.append(((ratio - 1).abs() > 0.2).float().mean().item())
                    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                    policy_loss = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
                    value, near = value.view(-1), val + (value.view(-1) - val).clamp(-0.2, 0.2)
                    value_loss = torch.max((value - ret) ** 2, (near - ret) ** 2).mean() / 2
                    optimizer.zero_grad()
                    (policy_loss - 0.01 * entropy.mean() + 0.5 * value_loss).backward()
                    nn.utils.clip_grad_norm_(parameters, 0.5)
                    optimizer.step()

    return work


def peer_is_there() -> bool:
    there = bool(importlib.util.find_spec("stable_baselines3"))
    if not there:
        print("stable-baselines3 is not installed (requirements-dev.txt): left out.")
    return there


def ppo(number: int):
    """Real steps a second of model-free PPO, against the peers at the same numbers of environments, steps, passes and minibatches."""
    if peer_is_there():
        peer = stable_baselines(16, 1024, 64)
        values, took = pairs(our_ppo(16, 1024, 64, 1), lambda: peer.learn(16_384, reset_num_timesteps=False), number)
        yield Ratio("PPO, 16 x 1024, minibatch 64", "stable-baselines3", 2, values, note=f"{16_384 / took:,.0f} real steps/s")
    values, took = pairs(our_ppo(4, 128, 128, 20), cleanrl_style(4, 128, 128, 20), number)
    yield Ratio("PPO, 4 x 128, 4 minibatches", "a loop in CleanRL's manner", 2, values, note=f"{10_240 / took:,.0f} real steps/s")


def gathering(number: int):
    """Share of the environment alone in stepping it with a policy."""
    env, alone = Environments(ENV, 16, 0), [gym.make(ENV).unwrapped for _ in range(16)]
    agent, rng = Agent(env.obs_dim, env.num_actions, 64), np.random.default_rng(0)
    for e in alone:
        e.reset(seed=0)

    def bare():
        for _ in range(500):
            for e, action in zip(alone, rng.integers(4, size=16).tolist()):
                if e.step(action)[2]:
                    e.reset()

    values, took = pairs(lambda: collect(env, agent.act, 500), bare, number)
    yield Ratio(
        "gathering, 16 environments, policy included", "the environments alone", 0.7, values, note=f"{8000 / took:,.0f} real steps/s"
    )


# ----------------------------------------------------------------------------------------------------- the model and its dreams


def some_replay(steps: int = 3000) -> Replay:
    env, replay = Environments(ENV, 1, 0), Replay(1, 8, 10)
    replay.add(collect(env, lambda obs: torch.randint(4, (1,)), steps))
    return replay


def a_model(s: Settings, replay: Replay) -> tuple[WorldModel, torch.optim.Optimizer]:
    model = WorldModel(8, 4, s)
    optimizer = torch.optim.AdamW([flatten(model)], lr=1e-3, fused=True)
    fit(model, optimizer, replay, 20, 128)
    return model, optimizer


def products(module: nn.Module, *batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and weight of every matrix product of a network, for inputs of so many rows."""
    weights = [p for p in module.parameters() if p.ndim > 1 and p.shape[-2] > 1]
    return [(torch.randn(*w.shape[:-2], *batch, w.shape[-2]), w.detach()) for w in weights]


def dreams(number: int):
    """Imagined transitions a second, against the products of dynamics, heads, potential and actor: those the kit does, which asks heads and potential
    of each dream's own member only, and those of all members asked for everything."""
    replay, s = some_replay(), Settings.resolve(dict(dreams=512))
    (model, _), agent = a_model(s, replay), Agent(8, 4, 64)
    dream = Dream(model, replay, 512, s, s.beginnings, s.rare, s.horizon)
    actor = [(torch.randn(512, layer.in_features), layer.weight.detach().T) for layer in agent.actor[::2]]
    for asked, rows in ("own member", math.ceil(512 / s.wm_ensemble)), ("all members", 512):
        matrices = products(model.dynamics, 512) + products(model.heads, rows) + products(model.potential, 2 * rows) + actor

        @torch.no_grad()
        def bare():
            for _ in range(60):
                for x, w in matrices:
                    x @ w

        values, took = pairs(lambda: collect(dream, agent.act, 60), bare, number)
        name = f"imagining, {s.wm_ensemble} members, 512 dreams, policy included"
        yield Ratio(name, f"bare matrix products, heads of {asked}", 0.6, values, note=f"{30_720 / took:,.0f} imagined steps/s")


def fitting(number: int):
    """Samples a second of model fitting, against forward and backward products of the same shapes (first layers' input gradients, a few percent, too)."""
    replay, s = some_replay(), Settings.resolve({})
    model, optimizer = a_model(s, replay)
    matrices = products(model.dynamics, s.wm_batch) + products(model.heads, s.wm_batch) + products(model.potential, 2 * s.wm_batch)
    back = [
        (torch.randn(*x.shape[:-1], w.shape[-1]), x.transpose(-1, -2).contiguous(), w.transpose(-1, -2).contiguous()) for x, w in matrices
    ]

    @torch.no_grad()
    def bare():
        for _ in range(50):
            for x, w in matrices:
                x @ w
            for g, x, w in back:
                x @ g, g @ w

    values, took = pairs(lambda: fit(model, optimizer, replay, 50, s.wm_batch), bare, number)
    samples = 50 * s.wm_batch * s.wm_ensemble / took
    yield Ratio(
        f"fitting, 5 members, batch {s.wm_batch}", "bare matrix products, there and back", 0.6, values, note=f"{samples:,.0f} samples/s"
    )


# -------------------------------------------------------------------------------------------------------------- the whole program


def cpu_seconds(*command: str) -> float:
    """CPU seconds of python with these arguments."""
    before = os.times()
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"This command failed: python {' '.join(command)}")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def program(*flags: str) -> tuple[str, ...]:
    return str(ROOT / "ppo_mbrl.py"), *flags


def start(number: int):
    """From the start of Python, over all imports of the program, to the first step of its environment, against importing torch."""
    first = (
        "import sys; sys.path.insert(0, {!r}); import ppo_mbrl as k; e = k.Environments({!r}, 1, 0); e.step(k.torch.zeros(1, dtype=int))"
    )
    times = [(cpu_seconds("-c", first.format(str(ROOT), ENV)), cpu_seconds("-c", "import torch")) for _ in range(number + 1)][1:]
    yield Ratio("imports and first step of the environment", "import torch", 1.5, [a / b for a, b in times], at_most=True)


def memory(number: int):
    """Largest resident size of a default run, cut at 5,000 real steps; it writes down its own, for a child's also counts what its parent had."""
    code = (
        "import atexit, re, runpy, sys; out, *sys.argv = sys.argv[1:]; "
        "atexit.register(lambda: open(out, 'w').write(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kilobytes")
        cpu_seconds("-c", code, str(out), *program("--total-steps", "5000", "--run-dir", f"{folder}/run"))
        yield Ratio("memory of the default run, first 5,000 real steps (MB)", "-", 600, [int(out.read_text()) / 1024], at_most=True)


def side_by_side(number: int):
    """Eight runs, two at a time, against one alone times eight, by the clock; needs two idle cores."""
    with tempfile.TemporaryDirectory() as folder:

        def start(i):
            command = [sys.executable, *program("--total-steps", "1500", "--run-dir", f"{folder}/{i}")]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL)

        def finish(*processes):
            if any([process.wait() for process in processes]):
                raise SystemExit("A run failed.")

        began = time.perf_counter()
        finish(start(8))
        alone, began = time.perf_counter() - began, time.perf_counter()
        for i in range(0, 8, 2):
            finish(start(i), start(i + 1))
        ideal = 8 / 2 * alone
        yield Ratio("8 runs, two at a time", "one alone x 8 / 2", 0.9, [ideal / (time.perf_counter() - began)])


def score(peer, episodes: int) -> float:
    """The mean of as many greedy episodes, those of the kit's own evaluations."""
    act = lambda obs: torch.as_tensor(peer.predict(obs.numpy(), deterministic=True)[0])  # noqa: E731
    return play(act, ENV, episodes, 10_000, 1).returns.mean()


def solve(number: int):
    """CPU seconds until the mean of 100 greedy episodes is 200, seed by seed: a default run, its evaluations included, against the peer without any."""
    if not peer_is_there():
        return
    values, notes = [], []
    for seed in range(number):
        with tempfile.TemporaryDirectory() as folder:
            cpu_seconds(*program("--seed", str(seed), "--run-dir", folder))
            rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        solved = [row["cpu_s"] for row in rows if row.get("eval/episodes") == 100 and row["eval/return_mean"] >= 200]
        ours, peer, theirs = solved[0] if solved else math.inf, stable_baselines(16, 1024, 64, seed), 0.0
        while not (score(peer, 20) >= 200 and score(peer, 100) >= 200):
            theirs += seconds(lambda: peer.learn(16_384, reset_num_timesteps=False))
        values.append(theirs / ours)
        notes.append(f"{ours:.0f} and {theirs:.0f} s")
    yield Ratio("a default run until it solves the task", "stable-baselines3, 16 x 1024", 5, values, note="; ".join(notes))


def growth(number: int):
    """How cost grows: slope of log CPU time over log size. A fit also looks at the whole replay once (20 ms for 40,000 steps, beside seconds)."""
    replay = some_replay()

    def slope(sizes, work) -> float:
        times = [min(seconds(work(size)) for _ in range(number)) for size in sizes]
        return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])

    def dream(members=5, dreams=400, steps=60):
        s = Settings.resolve(dict(wm_ensemble=members, dreams=dreams))
        d, agent = Dream(a_model(s, replay)[0], replay, dreams, s, horizon=600), Agent(8, 4, 64)
        return lambda: collect(d, agent.act, steps)

    def fits(members):
        s = Settings.resolve(dict(wm_ensemble=members))
        model, optimizer = a_model(s, replay)
        return lambda: fit(model, optimizer, replay, 30, 256)

    def adds(steps):  # a run of so many real steps, 250 at a time, without anything learned
        rollout = collect(Environments(ENV, 1, 0), lambda obs: torch.randint(4, (1,)), 250)
        return lambda: [replay.add(rollout) for replay in [Replay(1, 8, 10)] for _ in range(steps // 250)]

    for name, sizes, work in (
        ("dreams side by side", (200, 800, 3200), lambda n: dream(dreams=n)),
        ("imagined steps", (30, 120, 480), lambda n: dream(steps=n)),
        ("members, imagining", (2, 5, 10, 20), lambda n: dream(members=n)),
        ("members, fitting", (2, 5, 10, 20), fits),
        ("real steps, adding them to the replay", (10_000, 40_000, 160_000), adds),
    ):
        yield Ratio(f"growth with {name}", "slope in log-log", 1.1, [slope(sizes, work)], at_most=True, note=" ".join(map(str, sizes)))


def gpu(device: str):
    """Imagined transitions a second on a device, as a multiple of one thread of the CPU with as many dreams, or with 32,768 if there are more."""
    replay, on_cpu = some_replay(), {}

    def rates(where: str, dreams: int) -> list[float]:
        s = Settings.resolve(dict(dreams=dreams))
        torch.manual_seed(0)
        data = Replay(1, 8, 10, device=where)
        data.add(replay.steps)
        model, agent = a_model(s, replay)[0].to(where), Agent(8, 4, 64).to(where)
        dream, synchronise = Dream(model, data, dreams, s, horizon=600), torch.cuda.synchronize if where != "cpu" else lambda: None

        def rate(steps: int) -> float:
            synchronise()
            began = time.perf_counter()
            collect(dream, agent.act, steps)
            synchronise()
            return dreams * steps / (time.perf_counter() - began)

        rate(5)
        return [rate(20) for _ in range(3)]

    for dreams in (200, 512, 4096, 32_768, 262_144, 1_048_576):
        few = min(dreams, 32_768)
        on_cpu[few] = on_cpu.get(few) or rates("cpu", few)
        ours = rates(device, dreams)
        note = f"{np.median(ours):,.0f} imagined steps/s, the CPU {np.median(on_cpu[few]):,.0f}"
        ratios = [x / y for x, y in zip(ours, on_cpu[few])]
        yield Ratio(f"imagining on {device}, {dreams:,} dreams", f"one thread of the CPU, {few:,} dreams", 1, ratios, note=note)


MEASURES = dict(
    ppo=ppo, gathering=gathering, dreams=dreams, fit=fitting, start=start, memory=memory, seeds=side_by_side, growth=growth, solve=solve
)
USUAL = ",".join(name for name in MEASURES if name != "solve")


def main(
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(MEASURES)}, with commas between them.")] = USUAL,
    number: Annotated[int, typer.Option("--pairs", min=1, help="Pairs of each ratio.")] = 5,
    device: Annotated[str, typer.Option(help="cuda: measure dreams there instead.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The table goes here as CSV.")] = ROOT / "runs" / "benchmark" / "benchmark.csv",
):
    """Ratios of the kit's speed to its peers' and to the machine's limit."""
    unknown = [name for name in only.split(",") if name not in MEASURES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(MEASURES)}")
    try:
        check_device(device)
    except UsageError as error:
        raise typer.BadParameter(str(error))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console, rows = Console(), []
    table = Table("measure", "against", "ratio", "lowest", "highest", "target", "met", "")
    for work in [gpu] if device != "cpu" else [MEASURES[name] for name in only.split(",")]:
        for ratio in work(device if device != "cpu" else number):
            row = ratio.row()
            rows.append(row)
            shown = (row[name] for name in ("measure", "against", "median", "lowest", "highest", "target", "met", "note"))
            table.add_row(
                *(
                    "yes" if x is True else "no" if x is False else f"{x:,.3g}" if isinstance(x, float) and x < 100 else str(x)
                    for x in shown
                )
            )
            console.print(f"{row['measure']}: {row['median']} ({row['target']})", highlight=False)
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
