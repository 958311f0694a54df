"""The article's own experiment, as its code runs it, and the twelve places where that code departs from the textbook, each behind a switch.

    python ablations/as_published.py --seed 1                       as published
    python ablations/as_published.py --fix ratio --fix replay       two departures mended
    python ablations/as_published.py --fix all                      the textbook algorithm with the published settings
    python ablations/as_published.py --break ratio,replay           the textbook algorithm with two departures

An epoch is 3,000 imagined steps, 40 passes of PPO over them, 30 real episodes, and 40 passes of the model over those; a run has 50 epochs, about
700,000 real steps. `real_steps` counts them all; `samples` in metrics.jsonl is what the article would say, unless `count` is mended. The run folder
is that of `ppo_mbrl.py`, and `python ppo_mbrl.py evaluate RUN_DIR` reads it. What causes what is the question of `what_broke_it.py`.

A fork of the pair: networks, GAE, evaluation, run folder and command line are imported, what differs stands here. First the twelve pairs of functions
(as published, textbook), then the table of them, then the algorithm, which asks the table and nothing else. Networks, losses and Adam are computed by
hand, in numpy: for minibatches so small torch takes three times as long. Random numbers are torch's all the same, for only those can be resumed.

Shapes: T steps of one dream, n real steps, B minibatch, O observation, A actions, K = O + 1 numbers that the model predicts: next_obs and reward.
"""

import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; with more, a minibatch takes four times as much CPU time
import gymnasium as gym
import numpy as np
import torch
import typer
from numpy import ndarray as Array
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_mbrl  # noqa: E402
from ppo_mbrl import PPO_INFO, Agent, View, carry_out, compute_gae, fates, make_env, mlp  # noqa: E402
from world_model import Normaliser, Rollout, UsageError, checked, flatten, run_command, setting, settings_command  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ the departures


# ratio: how much likelier an action (B) has become, and the derivative of that by logprob
def exp_of_the_difference(logprob: Array, old_logprob: Array) -> tuple[Array, Array]:
    p = np.exp(logprob)
    ratio = np.exp(p - np.exp(old_logprob))  # of probabilities, not of their logarithms: between 1/e and e, whatever happens
    return ratio, ratio * p


def quotient(logprob: Array, old_logprob: Array) -> tuple[Array, Array]:
    ratio = np.exp(logprob - old_logprob)
    return ratio, ratio


# entropy: its weight in the loss
def punished(coef: float) -> float:
    return coef


def rewarded(coef: float) -> float:
    return -coef


# clip: the middle of the range (B) in which the value has its say
def around_the_return(old_value: Array, returns: Array) -> Array:
    return returns  # clipping makes no error greater, so it does nothing


def around_the_old_value(old_value: Array, returns: Array) -> Array:
    return old_value


# temperature: that of the ratio, where actions are drawn at `temperature`
def acting_only(temperature: float) -> float:
    return 1.0


def acting_and_ratio(temperature: float) -> float:
    return temperature


# replay: what the model is fitted to, (n, ...) each
def newest_episodes(old: Rollout, new: Rollout) -> Rollout:
    return new


def everything_seen(old: Rollout, new: Rollout) -> Rollout:
    return Rollout(*(torch.cat(both) for both in zip(old, new)))


# endings: who says that an imagined episode is over
class Beside:
    """The real environment, stepped beside the model at every imagined step. Its state is what the dream is re-aligned to."""

    logits = 0  # the model need not predict endings

    def __init__(self, run: "Run", data: "Data"):
        self.run, self.env = run, data.envs[0]
        self.env.reset(seed=streams(run, "dream", 1)[0])

    def begin(self) -> Array:
        """The first observation (O) of a new episode."""
        return np.asarray(self.env.reset()[0], np.float32)

    def step(self, action: int, next_obs: Array, reward: float, ending: Array, align: bool) -> tuple[Array, float, bool, bool]:
        """What the model imagined -> where the dream is re-aligned to (O), reward, terminated, truncated."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action + int(self.env.action_space.start))
        self.run.real_steps += 1
        return np.asarray(next_obs, np.float32), float(reward), terminated, truncated and not terminated

    @staticmethod
    def loss(logit: Array, terminated: Array) -> tuple[float, Array]:
        return 0.0, logit


class Imagined:
    """The model: it predicts endings, and imagining costs no real step. Dreams begin where real episodes did, are re-aligned to the nearest of 4,096
    real observations, by raw distance, and last no longer than the environment's time limit."""

    logits = 1

    def __init__(self, run: "Run", data: "Data"):
        self.first, self.known = data.first().numpy(), data.steps.obs[torch.linspace(0, len(data) - 1, min(4096, len(data))).long()].numpy()
        self.limit = data.envs[0].spec.max_episode_steps or math.inf

    def begin(self) -> Array:
        self.age = 0
        return self.first[torch.randint(len(self.first), ())]

    def step(self, action: int, next_obs: Array, reward: float, ending: Array, align: bool) -> tuple[Array, float, bool, bool]:
        self.age += 1
        terminated = bool(ending > torch.rand(()).logit().item())
        if align:
            next_obs = self.known[np.square(self.known - next_obs).sum(-1).argmin()]
        return next_obs, reward, terminated, self.age >= self.limit and not terminated

    @staticmethod
    def loss(logit: Array, terminated: Array) -> tuple[float, Array]:
        """Negative log-likelihood of endings and its gradient, (B, 1) each."""
        p = (np.tanh(logit / 2) + 1) / 2
        return (np.logaddexp(0, logit) - terminated * logit).sum() / len(logit), (p - terminated) / len(logit)


# realign: the state (O) that re-alignment takes for the true one when a new episode has begun; it matters where that is due in the very next step
def state_of_the_old_episode(old: Array, first: Array) -> Array:
    return old


def first_of_the_new_episode(old: Array, first: Array) -> Array:
    return first


# timeout: what GAE makes of a time-out
def an_ending(rollout: Rollout) -> Rollout:
    return rollout._replace(terminated=rollout.terminated | rollout.truncated)


def an_interruption(rollout: Rollout) -> Rollout:
    return rollout


# action: how it enters the model, (B) -> (B, width)
def a_number(actions: Array, num_actions: int) -> Array:
    return actions[:, None].astype(np.float32)


def one_hot(actions: Array, num_actions: int) -> Array:
    return np.eye(num_actions, dtype=np.float32)[actions]


# scale: units, target and loss of the model
class Raw(nn.Module):
    """Nothing is normalised; next_obs itself is predicted, with the absolute error as the loss and without noise."""

    numbers = 1  # outputs for each of the K predicted numbers

    def __init__(self, obs_dim: int):
        super().__init__()

    def fit(self, steps: Rollout) -> Array:
        """Finds the units in real steps (n, ...). Returns what the network is to predict of them (n, K)."""
        return torch.cat([steps.next_obs, steps.rewards[:, None]], -1).numpy()

    def inputs(self, obs: Array) -> Array:
        return obs

    def loss(self, output: Array, target: Array) -> tuple[float, Array]:
        """The loss and its gradient (B, numbers * K)."""
        error = output - target
        return abs(error).sum() / error.size, np.sign(error) / error.size

    def predict(self, output: Array, obs: Array, noise: Array | float) -> Array:
        """Outputs of the network -> next_obs and reward (B, K)."""
        return output


class Normalised(nn.Module):
    """Mean 0 and standard deviation 1 everywhere; the change of obs is predicted, with its likelihood as the loss and with noise in dreams."""

    numbers = 2

    def __init__(self, obs_dim: int):
        super().__init__()
        self.obs_scale, self.target_scale = Normaliser(obs_dim), Normaliser(obs_dim + 1)
        self.units = arrays([*self.obs_scale.buffers(), *self.target_scale.buffers()])

    def fit(self, steps: Rollout) -> Array:
        change = torch.cat([steps.next_obs - steps.obs, steps.rewards[:, None]], -1)
        self.obs_scale.fit(steps.obs)
        self.target_scale.fit(change)
        return self.target_scale(change).numpy()

    def inputs(self, obs: Array) -> Array:
        mean, std, *_ = self.units
        return (obs - mean) / std

    def loss(self, output: Array, target: Array) -> tuple[float, Array]:
        error, logvar = output[:, : target.shape[1]] - target, output[:, target.shape[1] :]
        by_mean = error * np.exp(-logvar)
        squared = error * by_mean
        return (squared + logvar).sum() / (2 * error.size), np.concatenate([by_mean, (1 - squared) / 2], -1) / error.size

    def predict(self, output: Array, obs: Array, noise: Array | float) -> Array:
        output, logvar = np.split(output, 2, -1)
        *_, mean, std = self.units
        predicted = (output + noise * np.exp(logvar / 2)) * std + mean
        predicted[:, :-1] += obs
        return predicted


# count: what is called a sample
def imagined_steps(run: "Run") -> int:
    return run.imagined_steps


def real_steps(run: "Run") -> int:
    return run.real_steps


# gradients: how they are kept small
def each_number(gradients: list[Array], limit: float):
    for gradient in gradients:
        gradient.clip(-limit, limit, out=gradient)


def the_norm(gradients: list[Array], limit: float):
    norm = math.sqrt(sum(gradient @ gradient for gradient in gradients))
    for gradient in gradients:
        gradient *= min(1, limit / (norm + 1e-6))


# fmt: off
DEPARTURES = dict(  # as published        textbook
    ratio       = (exp_of_the_difference, quotient),
    entropy     = (punished,              rewarded),
    clip        = (around_the_return,     around_the_old_value),
    temperature = (acting_only,           acting_and_ratio),
    replay      = (newest_episodes,       everything_seen),
    endings     = (Beside,                Imagined),
    realign     = (state_of_the_old_episode, first_of_the_new_episode),
    timeout     = (an_ending,             an_interruption),
    action      = (a_number,              one_hot),
    scale       = (Raw,                   Normalised),
    count       = (imagined_steps,        real_steps),
    gradients   = (each_number,           the_norm),
)
# fmt: on


def choose(departures: str) -> SimpleNamespace:
    """The published function for each departure in the list, the textbook's for all others: choose("ratio").ratio is exp_of_the_difference."""
    return SimpleNamespace(**{name: pair[name not in names(departures)] for name, pair in DEPARTURES.items()})


def names(text: str) -> list[str]:
    """'ratio,entropy', or 'all' -> names of departures, in the order of the table."""
    given = set(DEPARTURES) if text == "all" else {name.strip() for name in text.split(",")} - {""}
    for name in sorted(given - set(DEPARTURES)):
        raise UsageError(f"{name!r} is no departure; there are {', '.join(DEPARTURES)}, and all.")
    return [name for name in DEPARTURES if name in given]


# ------------------------------------------------------------------------------------------------------------------ settings


@dataclass(kw_only=True)
class Settings:
    """The published settings."""

    # fmt: off
    mode: Literal["simple"] = setting("simple", "It is PPO in dreams; there is no other mode here.", panel="Run", identity=False)
    seed: int = setting(0, "Decides everything random.", 0, 2**63 - 1, "Run", identity=False)
    env_id: str = setting("LunarLander-v3", "Any Gymnasium environment with a flat Box observation and Discrete actions.", panel="Run", identity=False)
    epochs: int = setting(50, "Length of the run; an epoch as published takes 9,000 to 37,000 real steps on LunarLander.", 1, 10**9, "Run", identity=False)
    run_dir: str = setting("", "Run folder; by default runs/ENV/NAME/seed_SEED, named after what differs from the defaults.", panel="Run", identity=False)
    action_repeat: int = setting(1, "Real steps that each action is taken for: one, as published.", 1, 1, "Run", identity=False)
    eval_every: int = setting(12_500, "Real steps between evaluations.", 1, 10**12, "Run", identity=False)
    fresh: bool = setting(False, "Begin anew: delete what an earlier run left in the folder.", panel="Run", identity=False)
    threads: int = setting(1, "Threads of torch; networks are numpy's here, and have one.", 1, 4096, "Run", identity=False)
    tensorboard: bool = setting(False, "Also write TensorBoard logs.", panel="Run", identity=False)
    departures: str = setting("all", "Those that are on, with commas between them; --fix and --break are shorter.", panel="Departures")

    dream_steps: int = setting(3000, "Imagined steps of an epoch, one after the other.", 1, 10**9, "Settings")
    realign: int = setting(5, "Every so many imagined steps the dream is moved to the true state.", 1, 10**9, "Settings")
    temperature: float = setting(2.0, "Divides the logits of the policy where it acts.", 1e-3, 1e3, "Settings")
    passes: int = setting(40, "Passes of PPO over the imagined steps.", 1, 10**6, "Settings")
    minibatch: int = setting(128, "Imagined steps in a minibatch.", 2, 10**9, "Settings")
    lr_actor: float = setting(2.5e-4, "Adam's learning rate of the actor.", 1e-8, 1, "Settings")
    lr_critic: float = setting(1e-3, "The same of the critic.", 1e-8, 1, "Settings")
    gamma: float = setting(0.99, "Discount.", 0, 1, "Settings")
    gae_lambda: float = setting(0.95, "Lambda of generalised advantage estimation.", 0, 1, "Settings")
    clip: float = setting(0.1, "Clip range of the probability ratio.", 0, 1e6, "Settings")
    value_clip: float = setting(0.3, "Clip range of the value, in raw units of the return: narrow, where `clip` is mended.", 0, 1e6, "Settings")
    value_coef: float = setting(1.0, "Weight of half the squared error of the value; half of the whole error, in the article's words.", 0, 1e6, "Settings")
    entropy_coef: float = setting(0.001, "Weight of the entropy.", 0, 1e6, "Settings")
    max_grad: float = setting(0.5, "Gradients of agent and model are clipped here.", 1e-9, 1e9, "Settings")
    episodes: int = setting(30, "Real episodes an epoch, and in a test.", 1, 10_000, "Settings")
    wm_passes: int = setting(40, "Passes of the model over as many steps as these episodes have.", 1, 10**6, "Settings")
    wm_batch: int = setting(32, "Real steps in a minibatch of the model.", 1, 10**6, "Settings")
    wm_lr: float = setting(1e-3, "Adam's learning rate of the model.", 1e-8, 1, "Settings")
    lr_factor: float = setting(0.95, "All learning rates fall by this factor where the loss has not fallen for 10 epochs.", 0.01, 0.99, "Settings")
    hidden: int = setting(64, "Width of the two hidden layers of actor, critic and model.", 1, 10_000, "Settings")
    test_every: int = setting(20, "Epochs between tests, which cost real steps.", 1, 10**9, "Settings")
    test_return: float = setting(150.0, "A test with a higher mean ends the run.", -1e9, 1e9, "Settings")

    # fmt: on
    device = "cpu"

    @classmethod
    def resolve(cls, given: dict) -> "Settings":
        return cls(**given)

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))
        on = names(self.departures)
        self.departures = "all" if on == list(DEPARTURES) else ",".join(on)

    @property
    def total_steps(self) -> int:
        """About what the run will take, for the view."""
        return 12_000 * self.epochs

    def folder(self) -> Path:
        """The run folder: departures first, then what else differs from the published settings."""
        if self.run_dir:
            return Path(self.run_dir)
        on, usual = names(self.departures), Settings()
        off = [name for name in DEPARTURES if name not in on]
        few = f"fix={','.join(off)}" if len(off) <= 6 else f"break={','.join(on)}"
        differs = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.metadata["identity"] and f.name != "departures" and getattr(self, f.name) != getattr(usual, f.name)]  # fmt: skip
        name = "_".join(["as_published"] * (not off) + ["textbook"] * (not on) + [few] * bool(off and on) + differs)
        return Path("runs", self.env_id.replace("/", "_"), name, f"seed_{self.seed}")


# ------------------------------------------------------------------------------------------------------------- real episodes


class Data:
    """Whole real episodes, one after the other, fields (n, ...); `add` keeps what departure `replay` says."""

    def __init__(self, envs: list[gym.Env], keep):
        self.envs, self.keep = envs, keep
        numbers, flags = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        vectors = torch.zeros(0, envs[0].observation_space.shape[0])
        self.steps = Rollout(vectors, numbers.long(), numbers, vectors, flags, flags)

    def __len__(self) -> int:
        return len(self.steps.obs)

    def add(self, steps: Rollout):
        self.steps = self.keep(self.steps, steps)

    def first(self) -> Tensor:
        """The first observations of all episodes (episodes, O)."""
        return self.steps.obs[(self.steps.terminated | self.steps.truncated).roll(1)]

    def state_dict(self) -> dict:
        return self.steps._asdict()

    def load_state_dict(self, state: dict):
        self.steps = Rollout(**state)


def streams(run: "Run", what: str, number: int) -> list[int]:
    """Environment seeds that nothing else uses. An epoch's follow from the run's seed alone, so no environment has to be saved."""
    purpose = ("dream", "data", "test").index(what)
    return [int(x) for x in np.random.SeedSequence([run.settings.seed, run.iteration, purpose]).generate_state(number, np.uint64)]


@torch.no_grad()
def play_episodes(run: "Run", agent: Agent, envs: list[gym.Env], what: str) -> Rollout:
    """One episode of each environment, side by side, with actions drawn at the temperature: whole episodes, one after the other (n, ...)."""
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, streams(run, what, len(envs)))]
    episodes, alive = [[] for _ in envs], list(range(len(envs)))
    while alive:
        actions = agent.act(torch.as_tensor(np.array([obs[i] for i in alive], dtype=np.float32)), run.settings.temperature).tolist()
        for i, action in zip(alive, actions):
            next_obs, reward, terminated, truncated, _ = envs[i].step(action + int(envs[i].action_space.start))
            episodes[i].append((obs[i], action, reward, next_obs, terminated, truncated and not terminated))
            obs[i] = next_obs
        run.real_steps += len(alive)
        alive = [i for i in alive if not any(episodes[i][-1][4:])]
        run.tick()
    return together([step for episode in episodes for step in episode])


def together(steps: list[tuple]) -> Rollout:
    """Steps as tuples, one field of a Rollout each -> one Rollout (n, ...)."""
    types = torch.float32, torch.int64, torch.float32, torch.float32, torch.bool, torch.bool
    return Rollout(*(torch.as_tensor(np.array(column), dtype=kind) for column, kind in zip(zip(*steps), types)))


def mean_return(steps: Rollout) -> float:
    return float(steps.rewards.sum() / (steps.terminated | steps.truncated).sum())


# ---------------------------------------------------------------------------------------------------------- networks by hand


def arrays(tensors) -> list[Array]:
    """The same memory in numpy's eyes: what changes here changes there."""
    return [x.detach().numpy() for x in tensors]


def forward(weights: list, x: Array) -> tuple[Array, Array, Array, Array]:
    """The pair's `mlp`, its weights as `arrays`: (B, inputs) -> the same, both hidden layers, output (B, outputs)."""
    w1, b1, w2, b2, w3, b3 = weights
    below = np.tanh(x @ w1.T + b1)
    top = np.tanh(below @ w2.T + b2)
    return x, below, top, top @ w3.T + b3


def backward(weights: list, gradient: Array, x: Array, below: Array, top: Array, by_output: Array):
    """What `forward` returned and a gradient by the output (B, outputs) -> into `gradient`, that by all weights as one vector."""
    by_top = by_output @ weights[4] * (1 - top * top)
    by_below = by_top @ weights[2] * (1 - below * below)
    layers = (by_below, x), (by_top, below), (by_output, top)
    np.concatenate([part.ravel() for by, before in layers for part in (by.T @ before, by.sum(0))], out=gradient)


def update(optimizer: torch.optim.Adam):
    """`optimizer.step()` for flat weights, with the same state: what torch does around its own takes more time than all of this."""
    for group in optimizer.param_groups:
        (p,), (beta1, beta2) = group["params"], group["betas"]
        if p not in optimizer.state:
            optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        weights, gradient, step, mean, square = arrays([p, p.grad, *optimizer.state[p].values()])
        step += 1
        mean += (1 - beta1) * (gradient - mean)
        square += (1 - beta2) * (gradient * gradient - square)
        std = np.sqrt(square / (1 - beta2 ** float(step)))
        weights -= group["lr"] / (1 - beta1 ** float(step)) * mean / (std + group["eps"])


def minibatches(columns: list, size: int):
    """One pass in random order over arrays (n, ...): minibatches (B, ...) of all of them together."""
    order = torch.randperm(len(columns[0])).numpy()
    return zip(*(np.split(x[order], range(size, len(order), size)) for x in columns))


# ----------------------------------------------------------------------------------------------------------------- the model


class Model(nn.Module):
    """Predicts next_obs, reward and, if departure `endings` is mended, endings from (obs, action), with two tanh layers.

    Its arrays are views of its tensors: a model is never copied, converted or moved.
    """

    def __init__(self, obs_dim: int, num_actions: int, hidden: int, way: SimpleNamespace):
        super().__init__()
        self.num_actions, self.encode, self.scale, self.endings = num_actions, way.action, way.scale(obs_dim), way.endings
        self.numbers = self.scale.numbers * (obs_dim + 1)
        width = self.encode(np.zeros(1, int), num_actions).shape[1]
        self.net = mlp(obs_dim + width, hidden, self.numbers + self.endings.logits, last_gain=math.sqrt(2))
        self.flat = [flatten(self.net)]
        self.weights, self.gradient = arrays(self.net.parameters()), self.flat[0].grad.numpy()

    def inputs(self, obs: Array, actions: Array) -> Array:
        """(B, O) and (B) -> (B, inputs)."""
        return np.concatenate([self.scale.inputs(obs), self.encode(actions, self.num_actions)], -1)

    def backpropagate(self, inputs: Array, target: Array, terminated: Array) -> float:
        """Inputs (B, inputs), target (B, K), terminated (B, 1) -> the loss, and its gradient in .grad of the flat weights."""
        *layers, output = forward(self.weights, inputs)
        loss, by_numbers = self.scale.loss(output[:, : self.numbers], target)
        loss_of_endings, by_logit = self.endings.loss(output[:, self.numbers :], terminated)
        backward(self.weights, self.gradient, *layers, np.concatenate([by_numbers, by_logit], -1))
        return loss + loss_of_endings

    def imagine(self, obs: Array, actions: Array, noise: Array | float) -> tuple[Array, Array, Array]:
        """(B, O), (B), standard normal noise (B, K) or 0 -> next_obs (B, O), reward (B), logit that the episode ends (B, logits)."""
        *_, output = forward(self.weights, self.inputs(obs, actions))
        predicted = self.scale.predict(output[:, : self.numbers], obs, noise)
        return predicted[:, :-1], predicted[:, -1], output[:, self.numbers :]


def fit(run: "Run", model: Model, optimizer, steps: Rollout, updates: int) -> float:
    """So many minibatches of `wm_batch`, in passes over shuffled real steps (n, ...). Returns the mean loss of the latest."""
    s, losses, target = run.settings, [], model.scale.fit(steps)
    known = model.inputs(steps.obs.numpy(), steps.actions.numpy()), target, steps.terminated[:, None].float().numpy()
    while len(losses) < updates:
        for batch, _ in zip(minibatches(known, s.wm_batch), range(updates - len(losses))):
            losses.append(model.backpropagate(*batch))
            run.way.gradients([model.gradient], s.max_grad)
            update(optimizer)
            run.tick()
    return float(np.mean(losses[-math.ceil(updates / s.wm_passes) :]))


def measure(model: Model, steps: Rollout, length: int = 20) -> dict[str, float | None]:
    """Errors of the model on episodes it was not fitted to, in the units of the pair; open loop: after 20 steps under the recorded actions."""
    steps = Rollout(*arrays(steps))
    over = steps.terminated | steps.truncated
    columns = ~((steps.obs == 0) | (steps.obs == 1)).all(0)
    std = (steps.next_obs - steps.obs)[:, columns].std(0, ddof=1).clip(min=1e-9)

    def rmse(error):
        return float(np.sqrt(np.square(error).mean()))

    next_obs, reward, _ = model.imagine(steps.obs, steps.actions, noise=0)
    wrong, size = reward - steps.rewards, abs(steps.rewards - np.median(steps.rewards))
    log = {"wm/error_1step": rmse((next_obs - steps.next_obs)[:, columns] / std), "wm/error_openloop": None}
    log |= {"wm/reward_rmse": rmse(wrong), "wm/reward_tail_rmse": rmse(wrong[size >= np.quantile(size, 0.99, method="nearest")])}

    episode = over.cumsum() - over
    (start,) = (episode[length - 1 :] == episode[: max(0, len(episode) - length + 1)]).nonzero()
    if len(start):
        start = start[np.linspace(0, len(start) - 1, min(512, len(start))).astype(int)]
        obs = steps.obs[start]
        for k in range(length):
            obs, _, _ = model.imagine(obs, steps.actions[start + k], noise=0)
        log["wm/error_openloop"] = rmse((obs - steps.next_obs[start + length - 1])[:, columns] / std)
    return log


# ------------------------------------------------------------------------------------------------------------------- dreams


def dream(run: "Run", agent: Agent, model: Model, data: Data) -> tuple[Rollout, Tensor]:
    """One dream of `dream_steps`, episode after episode: its Rollout (T, 1, ...) and the observations (T, 1, O) at which the agent acted.

    These differ where the dream is re-aligned: the action was chosen in the imagined state, and the step is recorded from the true one.
    """
    s, way, rows, acted = run.settings, run.way, [], []
    world = way.endings(run, data)
    obs = truth = world.begin()
    actor, luck = arrays(agent.actor.parameters()), torch.empty(s.dream_steps, model.num_actions).exponential_().log_().numpy()
    noise = torch.randn(s.dream_steps, 1, len(obs) + 1).numpy()
    for t in range(s.dream_steps):
        *_, (logits,) = forward(actor, obs[None])
        action = (logits / s.temperature - luck[t]).argmax()  # as in `Agent.act`, whose normaliser is never fitted here
        (next_obs,), (reward,), (ending,) = model.imagine(obs[None], action[None], noise[t])
        align = (t + 1) % s.realign == 0
        true_obs, true_reward, terminated, truncated = world.step(int(action), next_obs, float(reward), ending, align)
        acted.append(obs)
        if align:
            obs, reward, next_obs = truth, true_reward, true_obs
        rows.append((obs, action, reward, next_obs, terminated, truncated))
        if terminated or truncated:
            obs = world.begin()
            truth = way.realign(truth, obs)
        else:
            obs, truth = next_obs, true_obs
        run.imagined_steps += 1
        run.tick()
    return Rollout(*(x[:, None] for x in together(rows))), torch.from_numpy(np.array(acted))[:, None]


# ----------------------------------------------------------------------------------------------------------------------- PPO


def ppo_loss(logits, value, actions, old_logprobs, old_values, advantages, returns, s: Settings, way) -> tuple[Array, Array, Array]:
    """The pair's `ppo_loss` with the departures in it, on the agent's logits (B, A) and values and a minibatch, all others (B).

    Returns the numbers named in PPO_INFO, the loss first, and its gradients by logits (B, A) and value (B).
    """
    B, rows, temperature = len(actions), np.arange(len(actions)), way.temperature(s.temperature)
    both = np.stack([logits / temperature, logits / s.temperature])
    both -= both.max(-1, keepdims=True)
    acting, logprobs = both - np.log(np.exp(both).sum(-1, keepdims=True))
    p, logprob = np.exp(logprobs), acting[rows, actions]
    ratio, slope = way.ratio(logprob, old_logprobs)
    advantages = advantages - advantages.mean()
    advantages /= np.sqrt(advantages @ advantages / B) + 1e-8
    free, clipped = advantages * ratio, advantages * ratio.clip(1 - s.clip, 1 + s.clip)
    entropy, weight = -(p * logprobs).sum(-1), way.entropy(s.entropy_coef)
    error, change = value - returns, value - way.clip(old_values, returns)
    squared, clipped_squared = error**2, (error - (change - change.clip(-s.value_clip, s.value_clip))) ** 2

    by_logprob = np.where(free <= clipped, -advantages * slope, 0)  # what is clipped can't move
    by_logits = -np.exp(acting) * by_logprob[:, None]
    by_logits[rows, actions] += by_logprob
    by_logits = by_logits / temperature - p * (logprobs + entropy[:, None]) * (weight / s.temperature)
    by_value = s.value_coef * np.where(squared >= clipped_squared, error, 0)

    value_loss, logratio = np.maximum(squared, clipped_squared) / 2, logprob - old_logprobs
    loss = s.value_coef * value_loss + weight * entropy - np.minimum(free, clipped)
    approx_kl = np.exp(logratio) - 1 - logratio  # Schulman (2020), k3
    return np.stack([loss, approx_kl, entropy, abs(ratio - 1) > s.clip, value_loss]).mean(-1), by_logits / B, by_value / B


def ppo_update(agent: Agent, optimizer, rollout: Rollout, acted: Tensor, s: Settings, way, tick=lambda: None) -> tuple[dict, float]:
    """`passes` over a Rollout (T, N, ...) whose actions were drawn at `acted` (T, N, O); `optimizer` updates actor and critic, both flattened.

    Returns means over all minibatches, and the mean loss of the last pass.
    """
    with torch.no_grad():
        logprobs = agent.logprobs(acted, way.temperature(s.temperature)).gather(-1, rollout.actions[..., None])[..., 0]
        values, next_values = agent.value(acted), agent.value(rollout.next_obs)
        advantages, returns = compute_gae(way.timeout(rollout), values, next_values, s.gamma, s.gae_lambda)
    inputs, infos = agent.normaliser(rollout.obs), []
    known = arrays(x.flatten(0, 1) for x in (inputs, rollout.actions, logprobs, values, advantages, returns))
    actor, critic = arrays(agent.actor.parameters()), arrays(agent.critic.parameters())
    gradients = arrays(group["params"][0].grad for group in optimizer.param_groups)
    for _ in range(s.passes):
        for obs, *batch in minibatches(known, s.minibatch):
            *actor_layers, logits = forward(actor, obs)
            *critic_layers, value = forward(critic, obs)
            info, by_logits, by_value = ppo_loss(logits, value[:, 0], *batch, s, way)
            backward(actor, gradients[0], *actor_layers, by_logits)
            backward(critic, gradients[1], *critic_layers, by_value[:, None])
            way.gradients(gradients, s.max_grad)
            update(optimizer)
            infos.append(info)
            tick()
    means, last_pass = dict(zip(PPO_INFO, np.mean(infos, 0).tolist())), infos[-(len(infos) // s.passes) :]
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
    return means | {"ppo/explained_variance": 1 - float(unexplained)}, float(np.mean(last_pass, 0)[0])


# --------------------------------------------------------------------------------------------------------- the training loop


class Run(ppo_mbrl.Run):
    """A run that ends after so many epochs, or when a test says that the task is solved."""

    COUNTERS = *ppo_mbrl.Run.COUNTERS, "stopped"
    LENGTH = "--epochs"
    stopped = False

    def __init__(self, settings: Settings, view: View):
        self.way = choose(settings.departures)
        super().__init__(settings, view)

    def goes_on(self) -> bool:
        return self.iteration < self.settings.epochs and not self.stopped


@np.errstate(over="ignore", invalid="ignore")  # `Run.check` finds what is not finite
def train(run: Run):
    """Dream, improve the policy, gather, fit, repeat. The first dream is that of a model that has seen nothing yet."""
    s, way = run.settings, run.way
    envs = [make_env(s.env_id) for _ in range(s.episodes)]
    sizes = envs[0].observation_space.shape[0], int(envs[0].action_space.n)
    agent = Agent(*sizes, s.hidden)
    agent.actor = mlp(sizes[0], s.hidden, sizes[1], last_gain=math.sqrt(2))
    agent.critic = mlp(sizes[0], s.hidden, 1, last_gain=math.sqrt(2))
    model, data = Model(*sizes, s.hidden, way), Data(envs, way.replay)
    groups = [dict(params=[flatten(net)], lr=lr) for net, lr in ((agent.actor, s.lr_actor), (agent.critic, s.lr_critic))]
    optimizer, wm_optimizer = torch.optim.Adam(groups), torch.optim.Adam(model.flat, s.wm_lr)
    plateau, wm_plateau = (ReduceLROnPlateau(x, factor=s.lr_factor, patience=10, min_lr=1e-5) for x in (optimizer, wm_optimizer))
    parts = dict(agent=agent, optimizer=optimizer, plateau=plateau, wm=model, wm_optimizer=wm_optimizer, wm_plateau=wm_plateau, data=data)
    run.begin(agent.greedy, policy=agent, parts=parts)

    while run.goes_on():
        log = {}
        if len(data) or way.endings is Beside:  # without data a model can't dream by itself
            run.phase("dreaming")
            rollout, acted = dream(run, agent, model, data)
            run.phase("learning")
            log, loss = ppo_update(agent, optimizer, rollout, acted, s, way, run.tick)
            log |= fates(rollout, usual=0.0)
            plateau.step(loss)
        run.phase("gathering")
        new = play_episodes(run, agent, envs, "data")
        log |= {"data/return_mean": mean_return(new), "data/steps": len(new.obs)} | measure(model, new)
        run.phase("fitting")
        data.add(new)
        log["wm/loss"] = fit(run, model, wm_optimizer, data.steps, s.wm_passes * math.ceil(len(new.obs) / s.wm_batch))
        wm_plateau.step(log["wm/loss"])
        if (run.iteration + 1) % s.test_every == 0:
            run.phase("testing")
            log["test/return_mean"] = mean_return(play_episodes(run, agent, envs, "test"))
            run.stopped = log["test/return_mean"] > s.test_return
        run.end_iteration(log | {"samples": way.count(run)})


# -------------------------------------------------------------------------------------------------------------- command line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
@settings_command(Settings)
def main(
    fix: Annotated[
        list[str], typer.Option(help="Departures to mend, with commas or one by one, or all.", rich_help_panel="Departures")
    ] = [],
    broken: Annotated[list[str], typer.Option("--break", help="The only departures to keep.", rich_help_panel="Departures")] = [],
    given: dict = {},
):
    """Runs the article's experiment as its code does, with any of its twelve departures from the textbook mended.

    The departures: ratio, entropy, clip, temperature, replay, endings, realign, timeout, action, scale, count, gradients.
    """
    if bool(fix) + bool(broken) + ("departures" in given) > 1:
        raise UsageError(
            "--fix begins with the published algorithm, --break with the textbook's, --departures names them all: give one of the three."
        )
    if fix:
        mended = names(",".join(fix))
        given["departures"] = ",".join(name for name in DEPARTURES if name not in mended)
    elif broken:
        given["departures"] = ",".join(broken)
    raise typer.Exit(carry_out(Run(Settings.resolve(given), View()), train))


if __name__ == "__main__":
    run_command(app)
