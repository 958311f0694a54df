"""A learned world model: an ensemble that imagines what an environment would do.

The model learns p(next_obs, reward, ending | obs, action) from replayed episodes and stands in for the real environment: `Dream` answers
to the same `step` as the real one, `plan` searches through it. It knows nothing of policies, PPO or training loops; those are in
`ppo_mbrl.py`, which imports this file. Run by itself it fits a fresh model to a run's data and says where that model is wrong:

    python world_model.py runs/LunarLander-v3/simple/seed_3 --wm-target ode

Shapes: T time, N environments or dreams, E members, B batch, L window, O observation, A actions, F = O + A features, H memory.
A step is an action here, for however many real steps it was taken; "real" ones were not imagined.
Errors of the dynamics are always in standard deviations of the change of each observation from one step to the next.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Optional, get_args

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------------ settings


class UsageError(Exception):
    """Bad input, told in one sentence; the command line turns it into exit status 2."""


def setting(default, help: str, low: float = -math.inf, high: float = math.inf, panel: str = "World model", identity: bool = True, **modes):
    """One setting, declared once: default, sentence, bounds, help panel, defaults that differ by mode, and whether it names the run."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, panel=panel, identity=identity, modes=modes))


@dataclass(kw_only=True)
class ModelSettings:
    """Everything that shapes the model and its dreams. Raises UsageError when a value has the wrong type or is out of bounds."""

    # fmt: off
    wm_target: Literal["direct", "delta", "ode"] = setting("delta", "What the network predicts: the next observation, its change, or a derivative that RK4 integrates.")
    wm_likelihood: Literal["gaussian", "squared", "absolute"] = setting("gaussian", "Loss of the dynamics; absolute is that of rewards, too. Only gaussian learns, and dreams with, the environment's noise.")
    wm_beta: float = setting(0.5, "Weight of a step in the gaussian loss: its standard deviation to the power of twice this; 0 is plain likelihood.", 0, 1)
    wm_ensemble: int = setting(5, "Members of the ensemble.", 1, 100)
    wm_hidden: int = setting(128, "Width of every hidden layer.", 1, 10_000)
    wm_layers: int = setting(3, "Hidden layers of each network.", 1, 20)
    wm_memory: Literal["none", "gru"] = setting("none", "What the model remembers of the episode so far.")
    wm_memory_size: int = setting(32, "Units of the GRU.", 1, 10_000)
    wm_memory_window: int = setting(16, "Steps a GRU is unrolled for in training and before a dream.", 2, 1000)
    wm_heads: Literal["sa", "sas"] = setting("sas", "Reward and ending are predicted from (obs, action), or from (obs, action, next_obs) with a potential.")
    wm_ending: Literal["member", "mean", "agree"] = setting("member", "Who decides that a dream ends: its own member, the mean of all members' logits, or the least convinced one (optimism).")
    wm_binary: bool = setting(True, "Give observation columns that only ever hold 0 and 1 a Bernoulli head.")
    wm_autoencoder: float = setting(1.0, "Weight of the denoising autoencoder's error in the uncertainty; needs --uncertainty autoencoder or both.", 0, 1e6)
    wm_autoencoder_window: int = setting(4, "Steps of (obs, action) the autoencoder sees at once.", 1, 1000)
    wm_autoencoder_noise: float = setting(0.1, "Standard deviation of the noise it learns to remove, in standard deviations of the data.", 1e-6, 100)
    wm_lr: float = setting(3e-3, "Adam's learning rate at the beginning of each fit; it falls to a tenth.", 1e-8, 1)
    wm_weight_decay: float = setting(1e-5, "Decoupled weight decay.", 0, 1)
    wm_batch: int = setting(128, "Steps in a minibatch of each member.", 1, 1_000_000)
    wm_updates: int = setting(200, "Gradient steps an iteration.", 0, 10_000_000)
    wm_first_updates: int = setting(1000, "Gradient steps of the first fit: a policy that starts in a bad model learns to exploit it.", 0, 10_000_000)
    wm_newest: int = setting(0, "Fit to, and dream from, the newest so many actions of each environment only; 0: all.", 0, 1_000_000_000)
    wm_holdout: int = setting(10, "One episode in so many is held out to measure the model.", 2, 1_000_000)
    wm_margin: float = setting(0.1, "Dreams stay within the range of the data plus this share of it, and are cut where they would leave it.", 0, 1e6)
    uncertainty: Literal["none", "ensemble", "autoencoder", "both"] = setting("ensemble", "Where a dream's uncertainty comes from.", panel="Dreams")
    uncertainty_use: Literal["end", "penalise"] = setting("end", "Cut a dream where it grows uncertain, or subtract the uncertainty from the reward.", panel="Dreams")
    uncertainty_limit: float = setting(1.5, "Dreams are cut above this uncertainty; 1 is the 99.8th percentile on held-out real steps.", 0, 1e6, "Dreams")
    uncertainty_penalty: float = setting(0.1, "Price of one unit of uncertainty, in standard deviations of the reward.", 0, 1e6, "Dreams")
    # fmt: on

    def __post_init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))


def checked(f: dataclasses.Field, value):
    """`value` if it fits the setting `f`, else a UsageError that says what would."""
    flag, low, high = "--" + f.name.replace("_", "-"), f.metadata["low"], f.metadata["high"]
    choices = get_args(f.type)
    if choices:
        if value not in choices:
            raise UsageError(f"{flag} must be one of {', '.join(choices)}, not {value!r}.")
    elif f.type is float and type(value) is int:
        value = float(min(max(value, -(10**300)), 10**300))  # whole numbers may be larger than any float
    elif type(value) is not f.type:
        raise UsageError(
            f"{flag} must be {dict(int='a whole number', float='a number', bool='true or false', str='text')[f.type.__name__]}, not {value!r}."
        )
    if f.type is str and not value.isprintable():
        raise UsageError(f"{flag} must be printable text, not {value!r}.")
    if f.type in (int, float) and not low <= value <= high:  # `not <=` refuses NaN too
        raise UsageError(f"{flag} must be between {low:g} and {high:g}, not {value}.")
    return value


def settings_command(cls):
    """Decorator: turns a dataclass of settings into the options of a Typer command, which receives the ones given as a dict `given`."""

    def option(f: dataclasses.Field) -> inspect.Parameter:
        defaults = [str(f.default)] * (f.default != "") + [f"{mode}: {value}" for mode, value in f.metadata["modes"].items()]
        text = f.metadata["help"] + (f" [dim]\\[{'; '.join(defaults)}][/dim]" if defaults else "")
        info = typer.Option(help=text, rich_help_panel=f.metadata["panel"])
        return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Optional[f.type], info])

    def decorate(function):
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "given"]

        def command(**kwargs):
            mine = {p.name: kwargs.pop(p.name) for p in own}
            return function(**mine, given={k: v for k, v in kwargs.items() if v is not None})

        options = [option(f) for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)]
        command.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options)
        command.__doc__ = function.__doc__
        return command

    return decorate


# -------------------------------------------------------------------------------------------------------------------- replay


class Rollout(NamedTuple):
    """Steps of N environments, real or imagined, in order. `next_obs` is the true successor, never the first observation of a new episode."""

    obs: Tensor  # (T, N, O)
    actions: Tensor  # (T, N) int64
    rewards: Tensor  # (T, N)
    next_obs: Tensor  # (T, N, O)
    terminated: Tensor  # (T, N) bool: the episode really ended
    truncated: Tensor  # (T, N) bool: it was cut off; its value goes on


class Replay:
    """Everything seen so far, as one long Rollout. Whole episodes are held out, so that errors are measured on episodes never fitted."""

    def __init__(self, num_envs: int, obs_dim: int, holdout: int, newest: int = 0, device="cpu"):
        self.holdout, self.newest = holdout, newest
        zeros = functools.partial(torch.zeros, 0, num_envs, device=device)
        vectors, numbers, flags = zeros(obs_dim), zeros(dtype=torch.long), zeros(dtype=torch.bool)
        self.steps, self.age, self.held_out = Rollout(vectors, numbers, zeros(), vectors, flags, flags), numbers, flags
        room = 1 + 4_000_000 // (num_envs * obs_dim)  # 16 MB of observations; what is not filled is hardly ever touched
        self.buffers = [x.new_empty(room, *x.shape[1:]) for x in (*self.steps, self.age, self.held_out)]  # the same, with room for more
        self.going_on = numbers.new_full((num_envs,), -1)  # (N) age of the newest steps; -1 where an episode begins with the next
        self.episode = numbers.new_full((num_envs,), -1)  # (N) number of the newest episodes

    def __len__(self) -> int:
        return self.steps.actions.numel()

    def add(self, rollout: Rollout):
        """Appends a Rollout that goes on exactly where the last one stopped, and numbers its episodes."""
        rollout = Rollout(*(x.to(self.age.device) for x in rollout))
        over = rollout.terminated | rollout.truncated
        began = torch.cat([(self.going_on < 0)[None], over[:-1]])
        time = torch.arange(len(over), device=over.device)[:, None]
        age = time - torch.where(began, time, -1 - self.going_on).cummax(0).values  # (T, N) steps since the episode began
        episode = self.episode + began.cumsum(0)
        held_out = episode % self.holdout == min(2, self.holdout - 1)  # (T, N), beginning with the third episode, or of two with the second
        self.going_on, self.episode = torch.where(over[-1], -1, age[-1]), episode[-1]
        T = len(self.age)
        self.buffers = [append(buffer, T, new) for buffer, new in zip(self.buffers, (*rollout, age, held_out))]
        *steps, self.age, self.held_out = (buffer[: T + len(age)] for buffer in self.buffers)
        self.steps = Rollout(*steps)

    @property
    def oldest(self) -> int:
        """The first of the recent steps."""
        return max(0, len(self.age) - self.newest) if self.newest else 0

    @property
    def recent(self) -> Tensor:
        """(T, N): the steps that are not too old."""
        recent = torch.ones_like(self.held_out)
        recent[: self.oldest] = False
        return recent

    @property
    def unseen(self) -> Tensor:
        """(T, N): the steps that no model was fitted to, the recent ones where there are any; all False while no episode is held out."""
        unseen = self.held_out & self.recent
        return unseen if unseen.any() else self.held_out

    @property
    def to_judge(self) -> Tensor:
        """(T, N): the unseen steps, or, while there are none, the recent ones."""
        unseen = self.unseen
        return unseen if unseen.any() else self.recent

    def window(self, t: Tensor, n: Tensor, before: int, after: int) -> tuple[Rollout, Tensor]:
        """Steps t - before .. t + after - 1 of environments n, each field (L, *t.shape, ...), and which of them lie in step t's own episode."""
        offset = torch.arange(-before, after, device=t.device).view(-1, *[1] * t.ndim)
        index = (t + offset).clamp(0, len(self.age) - 1)
        return Rollout(*(x[index, n] for x in self.steps)), self.age[index, n] == self.age[t, n] + offset

    def beside(self, image: Rollout) -> "Replay":
        """A replay with as many environments again, in which the same episodes happened as `image` shows them."""
        both = Replay(2 * self.age.shape[1], self.steps.obs.shape[-1], self.holdout, self.newest, self.age.device)
        both.add(Rollout(*(torch.cat(pair, 1) for pair in zip(self.steps, image))))
        return both

    def state_dict(self) -> dict:
        return self.steps._asdict()

    def load_state_dict(self, state: dict):
        self.add(Rollout(**state))

    def share_ended(self, latest: int) -> float:
        """The share of the latest so many steps whose episode has ended, and was neither cut off nor goes on still."""
        n = math.ceil(latest / self.age.shape[1])
        terminated, over = self.steps.terminated[-n:], (self.steps.terminated | self.steps.truncated)[-n:]
        time = torch.arange(len(over), device=over.device)[:, None]
        last = torch.where(over, time, len(over)).flip(0).cummin(0).values.flip(0)  # (n, N) step of its own episode
        ended = torch.cat([terminated, torch.zeros_like(terminated[:1])]).gather(0, last)  # step n, still to come, has not ended
        return float(ended.float().mean())

    def usual(self, action_repeat: int) -> float:
        """The median reward of an action, divided by `action_repeat` where it is positive: an episode may end with the first of an action's steps."""
        median = float(self.steps.rewards.median())
        return min(median, median / action_repeat)

    def finished(self, limit: int, action_repeat: int) -> Tensor:
        """Of each episode that ended, or was left after `limit` actions, in order, whether it was good (K): whether it ended with at least the usual reward, or,
        if it was left, had returned as much by then as those that ended so do (the median). Those that were cut off at other lengths do not count, and none
        does (K = 0) while nothing has ever ended."""
        t, n = (self.steps.terminated | self.steps.truncated).nonzero().unbind(-1)
        sums, age = F.pad(self.steps.rewards.cumsum(0), (0, 0, 1, 0)), self.age[t, n]
        returned, ended = sums[t + 1, n] - sums[t - age, n], self.steps.terminated[t, n]
        left, good = ~ended & (age + 1 == limit), ended & (self.steps.rewards[t, n] >= self.usual(action_repeat))
        if good.any():
            good |= left & (returned >= returned[good].median())
        return good[ended | left] if ended.any() else good[:0]

    def reward_rates(self, latest: int) -> tuple[float, float]:
        """The mean reward of a step before the latest so many real steps, among as many, and since then; NaN where there was none."""
        n = math.ceil(latest / self.age.shape[1])
        before, now = self.steps.rewards[-2 * n : -n], self.steps.rewards[-n:]
        return float(before.mean()), float(now.mean())

    def excerpts(self, number: int, length: int) -> tuple[Rollout, Tensor]:
        """Random windows of `length` recent real steps, or as many as there are: fields (L, number, ...), and which lie in the first one's episode."""
        (T, N), device = self.age.shape, self.age.device
        length = min(length, T - self.oldest)
        t = torch.randint(self.oldest, T - length + 1, (number,), device=device)
        return self.window(t, torch.randint(N, (number,), device=device), 0, length)

    def rare(self, binary: Tensor, reach: int) -> Tensor:
        """(T, N): steps within `reach` of something rare in their own episode: an ending, a flip of a binary column, an extreme reward (1 %)."""
        low, high = quantiles(self.steps.rewards, 0.005, 0.995)
        flip = ((self.steps.obs != self.steps.next_obs) & binary).any(-1)
        event = self.steps.terminated | flip | (self.steps.rewards < low) | (self.steps.rewards > high)
        near = event.clone()
        for k in range(1, min(reach, len(event) - 1) + 1):
            together = self.age[k:] == self.age[:-k] + k  # steps t and t + k belong to one episode
            near[:-k] |= event[k:] & together
            near[k:] |= event[:-k] & together
        return near


def append(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """`buffer` with `new` behind its first `length` rows. Where they don't fit it is moved to one with twice the room: a row costs the same, however many."""
    end = length + len(new)
    if end > len(buffer):
        old, buffer = buffer, new.new_empty(2 * end, *new.shape[1:])
        buffer[:length] = old[:length]
    buffer[length:end] = new
    return buffer


def sample(where: Tensor, shape: tuple) -> tuple[Tensor, Tensor]:
    """Random indices (t, n) of the given shape, uniform over the rows (t, n) of `where`, such as a mask's nonzero()."""
    return where[torch.randint(len(where), shape, device=where.device)].unbind(-1)


def spread(where: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """At most `limit` of the rows (t, n) of `where`, evenly spaced: no randomness is used up by measuring."""
    return where[torch.linspace(0, len(where) - 1, min(limit, len(where)), dtype=torch.float64, device=where.device).long()].unbind(-1)


def quantiles(x: Tensor, *q: float) -> list[Tensor]:
    """Quantiles by rank, for tensors of any size (torch.quantile stops at 16 million)."""
    ranked = x.flatten().sort().values
    return [ranked[round(p * (len(ranked) - 1))] for p in q]


def binary_columns(*obs: Tensor) -> Tensor:
    """(..., O) each -> (O): which columns only ever hold 0 and 1."""
    return torch.stack([((x == 0) | (x == 1)).flatten(0, -2).all(0) for x in obs]).all(0)


# ------------------------------------------------------------------------------------------------------------ mirror images


class Mirror(nn.Module):
    """Shows real steps as they might have happened just as well: columns with the other sign, binary ones and actions in each other's place.

    Called with a Replay it returns one in which every episode has its image beside it, or the same where no mirror has been found. It is sought in the
    first steps, before a policy that goes its own ways has chosen many of them: anew in each call, as long as `seek`. The last one found stays.
    """

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()
        self.register_buffer("found", torch.tensor(False))
        self.register_buffer("signs", torch.ones(obs_dim))  # 1 or -1
        self.register_buffer("columns", torch.arange(obs_dim))
        self.register_buffer("actions", torch.arange(num_actions))

    def forward(self, replay: Replay, seek: bool) -> Replay:
        if seek and (found := find_mirror(replay.steps, len(self.actions))):
            self.load_state_dict(dict(zip(self.state_dict(), (torch.tensor(True), *found))))
        return replay.beside(self.image(replay.steps)) if self.found else replay

    def image(self, steps: Rollout) -> Rollout:
        obs, next_obs = ((x * self.signs)[..., self.columns] for x in (steps.obs, steps.next_obs))
        return steps._replace(obs=obs, next_obs=next_obs, actions=self.actions[steps.actions])


def find_mirror(steps: Rollout, num_actions: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Signs (O), columns (O) and actions (A) of the mirror in which real steps (T, N) look most like real steps; None if in no mirror they do, it is not
    clear in which, or there are too many to try (what makes one a symmetry: Ravindran and Barto, 2001).

    A difference that random steps hardly show, such as a goal on one side out of their reach, is not seen.
    """
    obs, actions, rewards, next_obs, terminated, _ = (x.flatten(0, 1).cpu() for x in steps)
    scale, binary = obs.double().std(0), binary_columns(obs, next_obs)
    numbers, flags = (kind.nonzero()[:, 0] for kind in (~binary & (scale > 1e-9), binary))
    if not len(numbers) or 2 ** len(numbers) * math.factorial(min(num_actions, 7)) > 2000 or len(flags) > 4:
        return None
    here, there = (x[:, numbers].double() / scale[numbers] for x in (obs, next_obs))
    mirror = mirror_of_numbers(here, actions, torch.cat([there - here, rewards.double()[:, None]], 1), ~terminated, num_actions)
    if mirror is None:
        return None
    some, swap = mirror
    one_hot, ones = torch.eye(num_actions), torch.ones(len(obs), 1)
    inputs, images = torch.cat([ones, here, one_hot[actions]], 1), torch.cat([ones, here * some, one_hot[swap[actions]]], 1)
    order = exchange_of_flags(obs[:, flags] > 0, next_obs[:, flags] > 0, here, there, inputs, images, some)
    if order is None:
        return None
    signs = torch.ones(len(scale)).index_put((numbers,), some.float())
    return signs, torch.arange(len(scale)).index_put((flags,), flags[order]), swap


def ridge(x: Tensor, y: Tensor, weight: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + weight * torch.eye(x.shape[1]).double(), x.T @ y)


def exchanges(number: int) -> list[Tensor]:
    """All ways to exchange some of so many things in pairs, the first of which exchanges none."""
    return [torch.tensor(p, dtype=torch.long) for p in itertools.permutations(range(number)) if all(p[p[i]] == i for i in p)]


def mirror_of_numbers(obs, actions, targets, usual, num_actions: int, limit: float = 2.0) -> tuple[Tensor, Tensor] | None:
    """The signs (M) of obs (K, M) and the exchange (A) of actions (K) under which the targets (K, M + 1), changes and reward, still follow. All are tried.

    They are told by a linear model of each action, fitted to those of the `usual` steps (K) that fit it best, nine tenths for each target. In a true
    mirror its median error is about the usual one, in any other that of some target mostly more than `limit` times as large.
    """
    one_hot, ones = torch.eye(num_actions).double(), torch.ones(len(obs), 1).double()
    inputs = lambda obs, actions: (one_hot[actions][..., None] * torch.cat([ones, obs], 1)[:, None]).flatten(1)  # noqa: E731
    x, y = inputs(obs, actions), targets * (targets.std(0) > 1e-9)
    for _ in range(4):
        weights = ridge(x[usual], y[usual], 0.1)
        error = (x @ weights - y).abs()
        usual = (error <= error.quantile(0.9, 0)).all(1)
    least = error.median(0).values + 0.01 * (y - y.median(0).values).abs().median(0).values + 1e-12
    least[-1] *= 2  # rewards are the least linear

    def strangeness(signs, swap):
        error = inputs(obs * signs, swap[actions]) @ weights - y * torch.cat([signs, ones[0]])
        return float((error.abs().median(0).values / least).max())

    every = [torch.tensor(signs).double() for signs in itertools.product((1.0, -1.0), repeat=obs.shape[1])]
    mirrors = [(strangeness(signs, swap), signs, swap) for signs, swap in itertools.product(every, exchanges(num_actions))]
    best, *others = sorted(mirrors[1:], key=lambda mirror: mirror[0])  # the first changes nothing
    return best[1:] if best[0] <= limit and all(limit < other[0] for other in others) else None


def exchange_of_flags(before, after, here, there, inputs, images, signs) -> Tensor | None:
    """The order (B) in which the mirror shows binary columns, `before` and `after` each step (K, B); None if it is not clear.

    It is that for which two linear models of steps and their images err least: of which flags flip where they were the same, from the numbers after it,
    `there` (K, M), and of how the numbers change where flags differ, from `inputs` (K, F) or their `images` and the flags. `signs` (M) mirrors numbers.
    The second is told by many more steps, and its errors differ less: it counts four times. One flip of the rarest flag says nothing.
    """
    first, *others = orders = exchanges(before.shape[1])
    if not others:
        return first
    differ = lambda flags: (flags != flags[:, :1]).any(1)  # noqa: E731
    flips, apart = ~differ(before) & differ(after), differ(before) | differ(after)
    rarest, change = after[flips].sum(0).min(), (there - here)[apart]
    if rarest == 0:
        return None  # one of them has not flipped yet

    ones, change = torch.ones(int(flips.sum()), 1), change / change.std(0).clamp(min=1e-9)
    seen, shown = torch.cat([ones, there[flips]], 1), torch.cat([ones, there[flips] * signs], 1)

    def error(x, x_image, y, y_image) -> float:
        x, y = torch.cat([x, x_image]).double(), torch.cat([y, y_image]).double()
        return math.log(float((x @ ridge(x, y, 1.0) - y).square().sum()) + 1e-12)

    def strangeness(order) -> float:
        of_flips = error(seen, shown, after[flips], after[flips][:, order]) if rarest > 1 else 0.0
        known, image = (torch.cat([x, before[:, o], after[:, o]], 1)[apart] for x, o in ((inputs, first), (images, order)))
        return of_flips + 4 * error(known, image, change, change * signs)

    (least, best), (next_least, _), *_ = sorted(((strangeness(order), i) for i, order in enumerate(orders)))
    return orders[best] if next_least - least > 0.2 else None


# ------------------------------------------------------------------------------------------------------------ building blocks


class Normaliser(nn.Module):
    """Shifts and scales the last dimension to mean 0 and standard deviation 1; constant columns are only shifted, columns in `keep` stay."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, x: Tensor, keep: Tensor | None = None):
        x = x.reshape(-1, len(self.mean)).double()
        mean, std = x.mean(0), x.std(0, correction=0)
        keep = torch.zeros_like(self.mean, dtype=torch.bool) if keep is None else keep
        self.mean.copy_(torch.where(keep, 0, mean))
        self.std.copy_(torch.where(keep | (std <= 1e-7 * (1 + mean.abs())), 1, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class EnsembleLinear(nn.Module):
    """E linear layers as one batched matrix product: (E, B, in) -> (E, B, out). Each member starts like torch.nn.Linear."""

    def __init__(self, members: int, size_in: int, size_out: int):
        super().__init__()
        bound = 1 / math.sqrt(size_in)
        self.weight = nn.Parameter(torch.empty(members, size_in, size_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, size_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def ensemble_mlp(members: int, size_in: int, hidden: int, layers: int, size_out: int) -> nn.Sequential:
    """E multi-layer perceptrons with SiLU: (E, B, in) -> (E, B, out)."""
    sizes = [size_in] + [hidden] * layers
    blocks = [m for a, b in zip(sizes, sizes[1:]) for m in (EnsembleLinear(members, a, b), nn.SiLU())]
    return nn.Sequential(*blocks, EnsembleLinear(members, sizes[-1], size_out))


def flatten(module: nn.Module) -> nn.Parameter:
    """All weights of a module, now on its device, as one vector; its own and their gradients become views. An optimiser then has one tensor to update."""
    parameters = list(module.parameters())
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)
    for parameter, gradient in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)
    return flat


# A field maps an observation to a prediction; an integrator makes the next observation of it. The three targets differ in nothing else.
def direct(field, obs: Tensor) -> Tensor:
    """The field is the next observation itself."""
    return field(obs)


def delta(field, obs: Tensor) -> Tensor:
    """The field is the change over one step: one Euler step of d obs / dt = field(obs)."""
    return obs + field(obs)


def rk4(field, obs: Tensor) -> Tensor:
    """The field is d obs / dt, with the step as the unit of time: one classical Runge-Kutta step (Kutta, 1901)."""
    k1 = field(obs)
    k2 = field(obs + k1 / 2)
    k3 = field(obs + k2 / 2)
    k4 = field(obs + k3)
    return obs + (k1 + 2 * k2 + 2 * k3 + k4) / 6


class NoMemory(nn.Module):
    """Remembers nothing: a hidden state of width zero. One step is all it is trained on."""

    size, window, context = 0, 1, 0

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return hidden


class GRUMemory(nn.Module):
    """One gated recurrent unit a member (Cho et al., 2014): features (E, B, F) and hidden state (E, B, H) -> new hidden state (E, B, H)."""

    def __init__(self, members: int, features: int, size: int, window: int):
        super().__init__()
        self.size, self.window, self.context = size, window, window
        self.gates = EnsembleLinear(members, features + size, 2 * size)
        self.candidate = EnsembleLinear(members, features + size, size)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        reset, update = self.gates(torch.cat([x, hidden], -1)).sigmoid().chunk(2, -1)
        candidate = self.candidate(torch.cat([x, reset * hidden], -1)).tanh()
        return update * hidden + (1 - update) * candidate


class NoPotential(nn.Module):
    """The potential that is switched off."""

    def forward(self, here: Tensor, there: Tensor) -> float:
        return 0.0


class Potential(nn.Module):
    """phi(there) - phi(here) for normalised observations (E, B, O) -> (E, B): a part of the reward that no loop can mine (after Ng et al., 1999)."""

    def __init__(self, members: int, obs_dim: int, hidden: int, layers: int):
        super().__init__()
        self.net = ensemble_mlp(members, obs_dim, hidden, layers, 1)

    def forward(self, here: Tensor, there: Tensor) -> Tensor:
        before, after = self.net(torch.cat([here, there], 1))[..., 0].chunk(2, 1)
        return after - before


class NoAutoencoder(nn.Module):
    """The autoencoder that is switched off: no error anywhere, nothing to train."""

    window = 1

    def error(self, windows: Tensor) -> Tensor:
        return windows.new_zeros(windows.shape[:-2])

    loss = error


class Autoencoder(nn.Module):
    """Denoises windows (B, W, F) of (obs, action). Its squared error is small on familiar windows only (Boney et al., 2019, eq. 5)."""

    def __init__(self, features: int, window: int, noise: float, hidden: int):
        super().__init__()
        self.window, self.noise = window, noise
        self.net = nn.Sequential(
            nn.Linear(window * features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, window * features)
        )

    def error(self, windows: Tensor) -> Tensor:
        """Mean squared distance between windows (..., W, F) and their denoised selves -> (...)."""
        flat = windows.flatten(-2)
        return (self.net(flat) - flat).square().mean(-1)

    def loss(self, windows: Tensor) -> Tensor:
        flat = windows.flatten(-2)
        return (self.net(flat + self.noise * torch.randn_like(flat)) - flat).square().mean(-1)


# ----------------------------------------------------------------------------------------------------------- the world model


class Transition(NamedTuple):
    """What each member expects of the next observation, all (E, B, O)."""

    mean: Tensor  # in the observation's own units
    logvar: Tensor  # of the error in standard deviations of the change
    logit: Tensor  # that a binary column is 1


class Outcome(NamedTuple):
    """What each member expects of reward and ending, all (E, B)."""

    reward: Tensor  # if the episode goes on
    last_reward: Tensor  # if it ends here
    ending: Tensor  # logit that it ends here, not yet calibrated


class Judged(NamedTuple):
    """What the members say of B real steps."""

    steps: Rollout  # (B, ...) what really happened
    expected: Transition
    outcome: Outcome
    disagreement: Tensor  # (B)
    unusual: Tensor  # (B) the autoencoder's error


class Imagined(NamedTuple):
    """One imagined step of B dreams."""

    features: Tensor  # (B, F) of the observation and action it began with
    next_obs: Tensor  # (B, O)
    reward: Tensor  # (B)
    terminated: Tensor  # (B) bool
    hidden: Tensor  # (E, B, H)
    disagreement: Tensor  # (B)


def squared_error(error: Tensor, logvar: Tensor) -> Tensor:
    return error.square()


def absolute_error(error: Tensor, logvar: Tensor) -> Tensor:
    return error.abs()


def gaussian_error(error: Tensor, logvar: Tensor, beta: float) -> Tensor:
    """Negative log-likelihood of a normal distribution, without its constant, times its variance to the power of beta (Seitzer et al., 2022).

    Under plain likelihood, beta 0, rare steps that are hard to predict, such as a touch of the ground, soon pass for noise and are never learned.
    """
    return (error.square() * (-logvar).exp() + logvar) / 2 * (beta * logvar.detach()).exp()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where `mask` holds; zero where it never does."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class WorldModel(nn.Module):
    """An ensemble of E models of one environment. Every variant is chosen here, once; nothing below this constructor asks for it again.

    `obs_dim` and `num_actions` are the environment's; `settings` a ModelSettings.
    """

    MIN_LOGVAR, MAX_LOGVAR = -10.0, 1.0

    def __init__(self, obs_dim: int, num_actions: int, settings: ModelSettings):
        super().__init__()
        s, features, E = settings, obs_dim + num_actions, settings.wm_ensemble
        self.members, self.num_actions, self.margin = E, num_actions, s.wm_margin
        self.memory = GRUMemory(E, features, s.wm_memory_size, s.wm_memory_window) if s.wm_memory == "gru" else NoMemory()
        denoise = s.uncertainty in ("autoencoder", "both")
        self.autoencoder = (
            Autoencoder(features, s.wm_autoencoder_window, s.wm_autoencoder_noise, s.wm_hidden) if denoise else NoAutoencoder()
        )
        self.context = max(self.memory.context, self.autoencoder.window - 1)  # real steps to look back on before a dream begins
        known, sees_next = features + self.memory.size, s.wm_heads == "sas"
        self.dynamics = ensemble_mlp(E, known, s.wm_hidden, s.wm_layers, 3 * obs_dim)
        self.heads = ensemble_mlp(E, known + (obs_dim if sees_next else 0), s.wm_hidden, s.wm_layers, 3)
        self.potential = Potential(E, obs_dim, max(1, s.wm_hidden // 2), max(1, s.wm_layers - 1)) if sees_next else NoPotential()
        self.integrate = dict(direct=direct, delta=delta, ode=rk4)[s.wm_target]
        gaussian = functools.partial(gaussian_error, beta=s.wm_beta)
        self.error = dict(gaussian=gaussian, squared=squared_error, absolute=absolute_error)[s.wm_likelihood]
        self.point_error = absolute_error if s.wm_likelihood == "absolute" else squared_error
        self.noisy = s.wm_likelihood == "gaussian"
        self.see = (lambda change: change) if sees_next else (lambda change: change[..., :0])
        verdicts = dict(
            member=lambda own, every: own, mean=lambda own, every: every().mean(0), agree=lambda own, every: every().min(0).values
        )
        self.verdict = verdicts[s.wm_ending]
        self.find_binary = s.wm_binary

        self.obs_scale, self.change_scale = Normaliser(obs_dim), Normaliser(obs_dim)
        self.reward_scale, self.last_reward_scale = Normaliser(1), Normaliser(1)
        self.target_unit = (self.obs_scale if s.wm_target == "direct" else self.change_scale).inverse
        for name, size in dict(binary=obs_dim, obs_low=obs_dim, obs_high=obs_dim, reward_range=2, last_reward_range=2).items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.bool if name == "binary" else torch.float))
        self.register_buffer("one_hot", torch.eye(num_actions), persistent=False)
        self.register_buffer("slope", torch.ones(()))  # of the potential: how many times as large observations are as their changes
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # slope and shift of the ending's logit
        self.register_buffer("typical", torch.ones(2))  # 99.8th percentiles of disagreement and autoencoder error on real steps

    def adapt(self, replay: Replay):
        """Takes all scales, and the ranges of rewards, from the fitted episodes (those of observations from every k-th step, 100,000 or so); the ranges of
        observations and the binary columns from all. Weights stay."""
        both, thinned = (replay.steps.obs, replay.steps.next_obs), slice(None, None, 1 + len(replay) // 100_000)
        obs, next_obs = (x[thinned][~replay.held_out[thinned]] for x in both)
        self.binary.copy_(binary_columns(*both) & self.find_binary)
        self.obs_scale.fit(obs, keep=self.binary)
        self.change_scale.fit(next_obs - obs, keep=self.binary)
        self.slope.copy_((self.obs_scale.std / self.change_scale.std).median())
        low, high = torch.minimum(*(x.amin((0, 1)) for x in both)), torch.maximum(*(x.amax((0, 1)) for x in both))
        self.obs_low.copy_(low - self.margin * (high - low)), self.obs_high.copy_(high + self.margin * (high - low))
        for where, scale, range in (
            (~replay.held_out & ~replay.steps.terminated, self.reward_scale, self.reward_range),
            (~replay.held_out & replay.steps.terminated, self.last_reward_scale, self.last_reward_range),
        ):
            rewards = replay.steps.rewards[where]
            if len(rewards):
                scale.fit(rewards)
                range.copy_(torch.stack([rewards.min(), rewards.max()]))

    @property
    def numbers(self) -> Tensor:
        """(O): 1 for columns that are numbers, 0 for binary ones."""
        return (~self.binary).to(self.obs_low.dtype)

    def features(self, obs: Tensor, action: Tensor) -> Tensor:
        """(..., O) and (...) -> (..., F): the normalised observation and the action as one-hot."""
        return torch.cat([self.obs_scale(obs), self.one_hot[action]], -1)

    def transition(self, x: Tensor, obs: Tensor, hidden: Tensor) -> Transition:
        """Features x (E, B, F) of obs (E, B, O), hidden (E, B, H) -> the distribution of the next observation."""
        here, logvar, logit = self.dynamics(torch.cat([x, hidden], -1)).chunk(3, -1)

        def field(at):
            if at is obs:  # known already; only RK4 asks for more
                return self.numbers * self.target_unit(here)
            there = torch.cat([self.obs_scale(at), x[..., len(self.binary) :], hidden], -1)
            return self.numbers * self.target_unit(self.dynamics(there).chunk(3, -1)[0])

        logvar = self.MAX_LOGVAR - F.softplus(self.MAX_LOGVAR - logvar)  # soft bounds (Chua et al., 2018, appendix A.1)
        logvar = self.MIN_LOGVAR + F.softplus(logvar - self.MIN_LOGVAR)
        return Transition(self.integrate(field, obs), logvar, logit)

    def outcome(self, x: Tensor, change: Tensor, hidden: Tensor) -> Outcome:
        """Features x (E, B, F) of a step, change (E, B, O) = next_obs - obs, hidden (E, B, H) -> reward and ending."""
        reward, last_reward, ending = self.heads(torch.cat([x, self.see(self.change_scale(change)), hidden], -1)).unbind(-1)
        here = x[..., : len(self.binary)]
        return Outcome(reward + self.slope * self.potential(here, here + change / self.obs_scale.std), last_reward, ending)

    # --- learning

    def loss(self, steps: Rollout, valid: Tensor) -> dict[str, Tensor]:
        """Losses on windows of real steps, fields (L, E, B, ...), valid (L, E, B): each summed over members, averaged over batch and dimensions.

        Steps before the beginning of an episode are not valid: they leave the memory at zero and cost nothing.
        """
        x = self.features(steps.obs, steps.actions) * valid[..., None]
        hidden = x.new_zeros(*x.shape[1:3], self.memory.size)
        losses, length = 0, len(x)
        for i in range(length):
            if i >= length - self.memory.window:
                losses = losses + self.step_loss(x[i], Rollout(*(field[i] for field in steps)), hidden, valid[i]) / self.memory.window
            hidden = self.memory(x[i], hidden) * valid[i, ..., None]
        dynamics, reward, last_reward, ending = losses.sum(-1)
        window = x[length - self.autoencoder.window :, 0].transpose(0, 1)  # one member's batch is enough for the one autoencoder
        return dict(
            dynamics=dynamics, reward=reward, last_reward=last_reward, ending=ending, autoencoder=self.autoencoder.loss(window).mean()
        )

    def step_loss(self, x: Tensor, step: Rollout, hidden: Tensor, valid: Tensor) -> Tensor:
        """(4, E): dynamics, reward, last reward, ending. Rewards of endings are learned apart, so that +-100 does not drown the rest."""
        mean, logvar, logit = self.transition(x, step.obs, hidden)
        numbers = self.error((step.next_obs - mean) / self.change_scale.std, logvar)
        flags = F.binary_cross_entropy_with_logits(logit, step.next_obs.clamp(0, 1), reduction="none")
        dynamics = torch.where(self.binary, flags, numbers).mean(-1)
        reward, last_reward, ending = self.outcome(x, step.next_obs - step.obs, hidden)
        reward = self.point_error(self.reward_scale(step.rewards) - reward, None)
        last_reward = self.point_error(self.last_reward_scale(step.rewards) - last_reward, None)
        surprise = F.binary_cross_entropy_with_logits(ending, step.terminated.to(ending.dtype), reduction="none")
        last = step.terminated
        return masked_mean(torch.stack([dynamics, reward, last_reward, surprise]), torch.stack([valid, valid & ~last, valid & last, valid]))

    # --- imagining

    def recall(self, replay: Replay, t: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """What came before real steps (t, n), each (B) -> hidden state (E, B, H), newest features (B, W - 1, F)."""
        steps, valid = replay.window(t, n, self.context, 0)
        x = self.features(steps.obs, steps.actions) * valid[..., None]
        hidden = x.new_zeros(self.members, x.shape[1], self.memory.size)
        for i in range(len(x)):
            hidden = self.memory(self.everyone(x[i]), hidden) * valid[i, :, None]
        return hidden, x[len(x) - (self.autoencoder.window - 1) :].transpose(0, 1)

    def everyone(self, x: Tensor) -> Tensor:
        """The same (B, ...) for each member: (E, B, ...), without a copy."""
        return x.expand(self.members, *x.shape)

    def draw(self, expected: Transition) -> Tensor:
        """A sample of the next observation, clipped to the range of the data with a margin."""
        sample = expected.mean
        if self.noisy:
            sample = sample + torch.randn_like(sample) * (expected.logvar / 2).exp() * self.change_scale.std
        sample = torch.where(self.binary, (torch.rand_like(sample) < expected.logit.sigmoid()).to(sample.dtype), sample)
        return torch.clamp(sample, self.obs_low, self.obs_high)

    def outside(self, obs: Tensor) -> Tensor:
        """(B, O) -> (B): whether a number in an imagined observation was clipped; columns that never change don't count."""
        return (((obs <= self.obs_low) | (obs >= self.obs_high)) & (self.obs_low < self.obs_high) & ~self.binary).any(-1)

    def most_likely(self, expected: Transition) -> Tensor:
        return torch.where(self.binary, (expected.logit > 0).to(expected.mean.dtype), expected.mean)

    def disagreement(self, expected: Transition) -> Tensor:
        """(E, B, O) -> (B): standard deviation over the members' means, root mean square over the columns that are numbers."""
        apart = (expected.mean - expected.mean.mean(0)) / self.change_scale.std
        return self.mean_over_numbers(apart.square().mean(0)).sqrt()

    def mean_over_numbers(self, x: Tensor) -> Tensor:
        """(..., O) -> (...): mean over the columns that are not binary."""
        return (x * self.numbers).sum(-1) / self.numbers.sum().clamp(min=1)

    def rewards(self, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """Reward if the episode goes on, and if it ends here; both in the environment's units and within the range of those seen."""
        reward, last_reward = self.reward_scale.inverse(outcome.reward), self.last_reward_scale.inverse(outcome.last_reward)
        return reward.clamp(*self.reward_range), last_reward.clamp(*self.last_reward_range)

    def ending(self, logit: Tensor) -> Tensor:
        """Calibrated probability that an episode ends."""
        return torch.sigmoid(self.calibration[0] * logit + self.calibration[1])

    def ends(self, logits: Tensor) -> Tensor:
        """All members' logits (E, B) -> the calibrated probability of an ending (B), or (E, B) where each member decides for itself."""
        return self.ending(self.verdict(logits, lambda: logits))

    def own(self, x: Tensor) -> Tensor:
        """(E, B, ...) -> (B, ...): what the member that each dream belongs to says of it."""
        dream = torch.arange(x.shape[1], device=x.device)
        return x[dream % self.members, dream]

    def by_member(self, x: Tensor) -> Tensor:
        """(B, ...) -> (E, ceil(B / E), ...): for each member the dreams that belong to it; those that are one short see the last dream again."""
        rows = -(-len(x) // self.members)
        return x[torch.arange(rows * self.members, device=x.device).clamp(max=len(x) - 1).view(rows, self.members).T]

    @torch.inference_mode()
    def imagine(self, obs: Tensor, action: Tensor, hidden: Tensor) -> Imagined:
        """One step of B dreams from obs (B, O) and hidden (E, B, H) under action (B). Dream i belongs to member i mod E.

        All members say where it leads, for what they disagree on is uncertain; what comes of it, the own one alone, unless all decide on endings.
        """
        x = self.features(obs, action)
        all_x, all_obs = self.everyone(x), self.everyone(obs)
        expected = self.transition(all_x, all_obs, hidden)
        next_obs = self.draw(Transition(*map(self.own, expected)))
        change = next_obs - obs
        outcome = self.outcome(*map(self.by_member, (x, change, self.own(hidden))))
        outcome = Outcome(*(y.T.flatten()[: len(obs)] for y in outcome))  # (E, B / E) -> (B)
        logit = self.verdict(outcome.ending, lambda: self.outcome(all_x, self.everyone(change), hidden).ending)
        terminated = torch.rand(len(obs), device=obs.device) < self.ending(logit)
        reward, last_reward = self.rewards(outcome)
        reward = torch.where(terminated, last_reward, reward)
        return Imagined(x, next_obs, reward, terminated, self.memory(all_x, hidden), self.disagreement(expected))


def fit(
    model: WorldModel, optimizer: torch.optim.Optimizer, replay: Replay, updates: int, batch: int, tick=lambda: None
) -> dict[str, float]:
    """Fits the model to the replay (Kaiser et al., 2020, Algorithm 1, line 5) by `updates` minibatches of `batch` real steps a member.

    Held-out episodes are not fitted; they calibrate endings and uncertainty. `tick` is called after each update. Returns mean losses.
    """
    model.adapt(replay)
    where = (~replay.held_out & replay.recent).nonzero()
    where = where if len(where) else (~replay.held_out).nonzero()
    before, sums = max(model.memory.window, model.autoencoder.window) - 1, {}
    windows = max(1, batch // model.memory.window)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * (1 - 0.9 * i / updates)
        window, valid = replay.window(*sample(where, (model.members, windows)), before, 1)
        losses = model.loss(window, valid)
        optimizer.zero_grad(set_to_none=False)
        sum(losses.values()).backward()
        optimizer.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        tick()
    calibrate(model, replay)
    slope, shift = model.calibration.tolist()
    means = {name: float(value) / updates / (1 if name == "autoencoder" else model.members) for name, value in sums.items()}
    return (
        {"wm/loss": sum(means.values())}
        | {f"wm/loss_{name}": value for name, value in means.items()}
        | {"wm/ending_slope": slope, "wm/ending_shift": shift}
    )


@torch.no_grad()
def judge(model: WorldModel, replay: Replay, t: Tensor, n: Tensor, imagined: bool = False) -> Judged:
    """One-step predictions at real steps (t, n), each (B).

    The outcome is that of the real next_obs, or, if `imagined`, of the one each member expects.
    """
    hidden, history = model.recall(replay, t, n)
    step = Rollout(*(x[t, n] for x in replay.steps))
    x = model.features(step.obs, step.actions)
    expected = model.transition(model.everyone(x), model.everyone(step.obs), hidden)
    next_obs = model.most_likely(expected) if imagined else model.everyone(step.next_obs)
    outcome = model.outcome(model.everyone(x), next_obs - step.obs, hidden)
    unusual = model.autoencoder.error(torch.cat([history, x[:, None]], 1))
    return Judged(step, expected, outcome, model.disagreement(expected), unusual)


def calibrate(model: WorldModel, replay: Replay, limit: int = 4096):
    """Sets the ending's calibration and the typical uncertainty, both on recent held-out real steps, or on all recent ones while none is held out.

    Slope and shift of the logit (Platt, 1999) minimise the Brier score, with a prior towards no change. Under the log score a single ending
    that the model held impossible would flatten the slope until dreams die everywhere; the Brier score is proper too, but bounded.
    """
    judged = judge(model, replay, *spread(replay.to_judge.nonzero(), limit))
    typical = [quantiles(x, 0.998)[0] for x in (judged.disagreement, judged.unusual)]
    model.typical.copy_(torch.stack(typical).clamp(min=1e-6))
    every = judged.outcome.ending
    logit = model.verdict(every, lambda: every)  # (B), or (E, B) where each member decides for itself
    free = torch.zeros(2, device=logit.device, requires_grad=True)  # log slope, shift
    lbfgs = torch.optim.LBFGS([free], max_iter=50, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        brier = (torch.sigmoid(free[0].exp() * logit + free[1]) - judged.steps.terminated.to(logit.dtype)).square().sum(-1).mean()
        loss = brier + (free / torch.tensor([0.3, 1.0], device=free.device)).square().sum() / 2
        loss.backward()
        return loss

    if logit.isfinite().all():  # else the model has diverged, which its losses tell
        lbfgs.step(objective)
    model.calibration.copy_(torch.stack([free[0].exp(), free[1]]).detach())


# ------------------------------------------------------------------------------------------------------------ dreams, planner


class Dream:
    """Imagined episodes behind the real environments' interface: `step(actions)` goes on with N of them at once; `obs` is where they are.

    Each dream belongs to one member for good: drawing the member anew at every step would average its systematic errors away (Chua et al., 2018,
    TS-infinity). It starts at a real state: a true beginning with probability `beginnings`, one near something rare with probability `rare`,
    else any. Where it ends, leaves the range of the data, grows too uncertain, or is `horizon` steps old, a new one starts in its place. Every
    `realign` steps (0: never) all dreams are moved to the nearest real observation, a projection onto the data; what they remember stays.
    """

    def __init__(self, model: WorldModel, replay: Replay, num_envs: int, settings, beginnings=0.0, rare=0.0, horizon=math.inf, realign=0):
        self.model, self.replay, self.num_envs, self.horizon, self.realign = model, replay, num_envs, horizon, realign
        self.beginnings, self.rare, recent = beginnings, rare, replay.recent
        kinds = (replay.age == 0) & recent, replay.rare(model.binary, reach=10) & recent, recent
        self.places = [(kind if kind.any() else recent).nonzero() for kind in kinds]
        self.known = replay.steps.obs[spread(self.places[-1], 4096)]
        s, device = settings, model.binary.device
        ensemble, autoencoder = s.uncertainty in ("ensemble", "both"), s.uncertainty in ("autoencoder", "both")
        self.weights = torch.tensor([float(ensemble), s.wm_autoencoder * autoencoder], device=device)
        self.limit = s.uncertainty_limit if s.uncertainty_use == "end" else math.inf
        self.penalty = s.uncertainty_penalty if s.uncertainty_use == "penalise" else 0.0
        self.reset()

    def starts(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Real states to dream from, with their past: obs (B, O), hidden (E, B, H), history (B, W - 1, F)."""
        kind = torch.rand(number, device=self.known.device)
        beginning, rare, anywhere = (torch.stack(sample(where, (number,))) for where in self.places)
        t, n = torch.where(kind < self.beginnings, beginning, torch.where(kind < self.beginnings + self.rare, rare, anywhere))
        return self.replay.steps.obs[t, n], *self.model.recall(self.replay, t, n)

    @torch.inference_mode()
    def reset(self) -> Tensor:
        """New dreams everywhere, and a pool of further starts for those that will end."""
        self.pool = self.starts(3 * self.num_envs)
        self.obs, self.hidden, self.history = self.pool[0][: self.num_envs], self.pool[1][:, : self.num_envs], self.pool[2][: self.num_envs]
        self.age = torch.zeros(self.num_envs, device=self.known.device)
        self.disagreement, self.steps = torch.zeros((), device=self.known.device), 0  # mean disagreement over all steps since the reset
        return self.obs

    @torch.inference_mode()
    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """actions (N) -> rewards (N), next_obs (N, O), terminated (N), truncated (N); `obs` moves on to a new start where a dream is over."""
        m = self.model
        x, next_obs, reward, terminated, hidden, disagreement = m.imagine(self.obs, actions, self.hidden)
        window = torch.cat([self.history, x[:, None]], 1)
        uncertainty = (torch.stack([disagreement, m.autoencoder.error(window)], -1) / m.typical * self.weights).amax(-1)
        reward = reward - self.penalty * m.reward_scale.std * uncertainty
        self.age += 1
        self.steps += 1
        if self.realign and self.steps % self.realign == 0:
            next_obs = self.nearest(next_obs)
        truncated = ((uncertainty > self.limit) | m.outside(next_obs) | (self.age >= self.horizon)) & ~terminated

        over = terminated | truncated
        obs, hidden_0, history = self.pool
        fresh = torch.randint(len(obs), (self.num_envs,), device=obs.device)
        self.obs = torch.where(over[:, None], obs[fresh], next_obs)
        self.hidden = torch.where(over[:, None], hidden_0[:, fresh], hidden)
        self.history = torch.where(over[:, None, None], history[fresh], window[:, 1:])
        self.age = torch.where(over, 0, self.age)
        self.disagreement += (disagreement.mean() - self.disagreement) / self.steps
        return reward, next_obs, terminated, truncated

    def nearest(self, obs: Tensor) -> Tensor:
        """(N, O) -> the nearest of the real observations at hand (N, O), in standard deviations."""
        scale = self.model.obs_scale
        return self.known[torch.cdist(scale(obs), scale(self.known)).argmin(-1)]


@torch.inference_mode()
def plan(model: WorldModel, obs: Tensor, hidden: Tensor, horizon: int, candidates: int, rounds: int, gamma: float) -> Tensor:
    """Model-predictive control by the cross-entropy method over action sequences (Chua et al., 2018), for discrete actions.

    obs (N, O), hidden (E, N, H) -> the first action of the best sequence found (N). Each sequence is judged by all members, each in its own
    imagined trajectory; what follows counts by the probability that the episode has not ended before.
    """
    N, E, A = len(obs), model.members, model.num_actions
    chances = torch.full((N, horizon, A), 1 / A, device=obs.device)
    for _ in range(rounds):
        sequences = torch.multinomial(chances.view(-1, A), candidates, replacement=True).view(N, horizon, candidates).transpose(1, 2)
        at, memory = (model.everyone(obs.repeat_interleave(candidates, 0)), hidden.repeat_interleave(candidates, 1))
        score, alive = 0, 1
        for k in range(horizon):
            x = model.features(at, model.everyone(sequences[..., k].flatten()))
            next_at = model.draw(model.transition(x, at, memory))
            outcome = model.outcome(x, next_at - at, memory)
            ends, (reward, last_reward) = model.ends(outcome.ending), model.rewards(outcome)
            score = score + gamma**k * alive * (ends * last_reward + (1 - ends) * reward)
            alive, at, memory = alive * (1 - ends), next_at, model.memory(x, memory)
        best = score.view(E, N, candidates).mean(0).topk(max(1, candidates // 10), -1).indices
        elite = sequences.gather(1, best[..., None].expand(-1, -1, horizon))
        chances = 0.1 * chances + 0.9 * model.one_hot[elite].mean(1)
    return chances[:, 0].argmax(-1)


# ----------------------------------------------------------------------------------------------------------------- diagnosis


@torch.no_grad()
def open_loop(model: WorldModel, replay: Replay, t: Tensor, n: Tensor, length: int) -> tuple[Tensor, Rollout, Tensor]:
    """Every member runs freely from real states (t, n), each (B), under the recorded actions, without noise.

    Returns predictions (K, E, B, O), the real steps (K, B, ...), and which of them exist (K, B), K = length.
    """
    hidden, _ = model.recall(replay, t, n)
    real, exists = replay.window(t, n, 0, length)
    at, path = model.everyone(real.obs[0]), []
    for k in range(length):
        x = model.features(at, model.everyone(real.actions[k]))
        at = torch.clamp(model.most_likely(model.transition(x, at, hidden)), model.obs_low, model.obs_high)
        hidden = model.memory(x, hidden)
        path.append(at)
    return torch.stack(path), real, exists


def error_curve(model: WorldModel, replay: Replay, length: int, where: Tensor) -> Tensor:
    """(K): root mean square open-loop error after 1 .. K steps, K <= length, as far as episodes among `where` (T, N) last."""
    t, n = spread(where.nonzero(), 512)
    path, real, exists = open_loop(model, replay, t, n, length)
    error = ((path - real.next_obs[:, None]) / model.change_scale.std).square()
    error = model.mean_over_numbers(error).mean(1)  # (K, B)
    return masked_mean(error, exists).sqrt()[exists.any(1)]


def trusted_horizon(model: WorldModel, replay: Replay, limit: float, longest: int) -> int:
    """The number of steps, at least 1, until the held-out open-loop error exceeds `limit`: a better model dreams further (Lambert et al., 2021)."""
    within = error_curve(model, replay, longest, replay.to_judge) <= limit
    return max(1, int(within.cummin(0).values.sum()))


def measure(model: WorldModel, replay: Replay, length: int = 20) -> dict[str, float | None]:
    """The model's errors on held-out recent steps, for the log; None where there are none, or no episode lasts `length` steps. Not random."""
    names = "wm/error_1step", "wm/error_openloop", "wm/reward_rmse", "wm/reward_tail_rmse"
    unseen = replay.unseen
    if not unseen.any():
        return dict.fromkeys(names)
    curve = error_curve(model, replay, length, unseen)
    real, expected = expected_rewards(model, replay, unseen)
    error, size = (real - expected).square(), (real - real.median()).abs()
    tail = size >= quantiles(size, 0.99)[0]
    last = float(curve[-1]) if len(curve) == length else None
    return dict(zip(names, [float(curve[0]), last, float(error.mean().sqrt()), float(error[tail].mean().sqrt())]))


def expected_rewards(model: WorldModel, replay: Replay, where: Tensor, limit: int = 4096) -> tuple[Tensor, Tensor]:
    """Real rewards (B) and the ensemble's expectation of them, endings included, at real steps among `where`.

    The heads are shown the next observation that each member expects, as in a dream, and not the real one.
    """
    judged = judge(model, replay, *spread(where.nonzero(), limit), imagined=True)
    (reward, last_reward), ends = model.rewards(judged.outcome), model.ends(judged.outcome.ending)
    return judged.steps.rewards, (ends * last_reward + (1 - ends) * reward).mean(0)


def diagnose(model: WorldModel, replay: Replay) -> dict:
    """Where the model is wrong, on held-out episodes: by horizon, by size of the reward, by place, and whether endings are as frequent as expected."""
    where = replay.held_out
    curve = error_curve(model, replay, 50, where)
    real, expected = expected_rewards(model, replay, where)
    size = (real - real.median()).abs()
    edges = [*quantiles(size, 0, 0.5, 0.9, 0.99), size.new_tensor(math.inf)]
    by_size = {}
    for low, high in zip(edges, edges[1:]):
        inside = (size >= low) & (size < high)
        if inside.any():
            by_size[f"{low:.3g} to {high:.3g}"] = dict(
                steps=int(inside.sum()), rmse=float((real - expected)[inside].square().mean().sqrt())
            )
    judged = judge(model, replay, *spread(where.nonzero(), 10_000))
    ends = model.ends(judged.outcome.ending).view(-1, len(judged.steps.rewards)).mean(0)
    counts, errors, edges_x, edges_y = place_map(model, replay, bins=6)
    places = [
        dict(
            x=[edges_x[i].item(), edges_x[i + 1].item()],
            y=[edges_y[j].item(), edges_y[j + 1].item()],
            fitted_steps=int(counts[i, j]),
            error=errors[i, j].item(),
        )
        for i, j in (~errors.isnan()).nonzero().tolist()
    ]
    by_horizon = {k: float(curve[k - 1]) for k in (1, 2, 5, 10, 20, 50) if k <= len(curve)}
    endings = dict(steps=len(ends), expected=float(ends.sum()), real=int(judged.steps.terminated.sum()))
    return dict(error_by_horizon=by_horizon, reward_error_by_size=by_size, error_by_place=places, endings=endings)


def place_map(model: WorldModel, replay: Replay, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the first two observation columns: fitted steps (bins, bins), one-step error on held-out steps (NaN where there are none), edges (bins + 1) twice."""
    obs = replay.steps.obs.flatten(0, 1)[:, [0, min(1, replay.steps.obs.shape[-1] - 1)]]
    low, high = obs.amin(0), obs.amax(0)
    cell = ((obs - low) / (high - low).clamp(min=1e-9) * bins).long().clamp(0, bins - 1)
    cell = cell[:, 0] * bins + cell[:, 1]
    held_out = replay.held_out.flatten()
    t, n = spread(replay.held_out.nonzero(), 10_000)
    judged = judge(model, replay, t, n)
    error = ((judged.expected.mean - judged.steps.next_obs) / model.change_scale.std).square().mean(0)
    error = model.mean_over_numbers(error)
    here = cell.view_as(replay.age)[t, n]
    total = error.new_zeros(bins * bins).index_add(0, here, error)
    number = torch.bincount(here, minlength=bins * bins)
    counts = torch.bincount(cell[~held_out], minlength=bins * bins).view(bins, bins)
    edges = [torch.linspace(float(a), float(b), bins + 1) for a, b in zip(low, high)]
    return counts, torch.where(number > 0, total / number, torch.nan).sqrt().view(bins, bins), *edges


def pyplot():
    """matplotlib.pyplot, imported only where something is drawn, and without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_diagnosis(model: WorldModel, replay: Replay, folder: Path):
    """reward_histogram.png, dreams.png and map.png; all on held-out episodes. Draws nothing while no episode is held out."""
    if not replay.held_out.any():
        return
    plt = pyplot()

    def page(rows, columns, width, height):
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)

    def write(figure, name):
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)

    real, expected = (x.cpu().numpy() for x in expected_rewards(model, replay, replay.held_out))
    figure, axes = page(1, 2, 11, 4.5)
    bins = torch.linspace(float(min(real.min(), expected.min())), float(max(real.max(), expected.max())) + 1e-6, 61).numpy()
    axes[0, 0].hist(real, bins, label="real", color="0.7")
    axes[0, 0].hist(expected, bins, label="predicted", histtype="step", color="tab:orange", linewidth=1.5)
    axes[0, 0].set(yscale="log", xlabel="reward", ylabel="held-out steps", title="Rewards, real and predicted")
    axes[0, 0].legend()
    axes[0, 1].scatter(real, expected, s=4, alpha=0.5, color="tab:orange")
    axes[0, 1].axline((0, 0), slope=1, color="gray", linewidth=0.8)
    axes[0, 1].set(xlabel="real reward", ylabel="predicted reward", title="Step by step")
    write(figure, "reward_histogram.png")

    t, n = ((replay.age == 0) & replay.held_out).nonzero(as_tuple=True)
    path, steps, exists = open_loop(model, replay, t[-1:], n[-1:], 200)  # the newest held-out episode, from its beginning
    length = int(exists.sum())
    path, truth = path[:length, :, 0].cpu().numpy(), steps.next_obs[:length, 0].cpu().numpy()
    columns = min(4, truth.shape[1])
    figure, axes = page(math.ceil(truth.shape[1] / columns), columns, 3.2 * columns, 2.6 * math.ceil(truth.shape[1] / columns))
    for i, axis in zip(range(truth.shape[1]), axes.flat):
        axis.fill_between(range(1, length + 1), path[:, :, i].min(1), path[:, :, i].max(1), alpha=0.2, color="tab:orange")
        axis.plot(range(1, length + 1), path[:, :, i], color="tab:orange", linewidth=0.6)
        axis.plot(range(1, length + 1), truth[:, i], color="black", linewidth=1.2)
        axis.set(title=f"obs[{i}]", xlabel="steps")
    figure.suptitle("A held-out episode (black) as each member dreams it, without correction, under the same actions (orange)")
    write(figure, "dreams.png")

    counts, errors, edges_x, edges_y = (x.cpu() for x in place_map(model, replay, bins=24))
    figure, axes = page(1, 2, 12, 4.8)
    panels = (
        ("Where there is data", "fitted steps (grey: none)", counts),
        ("Where the model is accurate", "one-step error, held-out (grey: not measured)", errors),
    )
    for axis, (title, label, values) in zip(axes[0], panels):
        shown = values.where(values > 0, torch.nan).T.numpy()
        mesh = axis.pcolormesh(edges_x.numpy(), edges_y.numpy(), shown, norm="log" if (shown > 0).any() else None)
        figure.colorbar(mesh, ax=axis, label=label)
        axis.set(title=title, xlabel="obs[0]", ylabel="obs[1]", facecolor="0.85")
    write(figure, "map.png")


# --------------------------------------------------------------------------------------------------------------------- files

DTYPES = {  # of checkpoints
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_json(path: Path) -> dict:
    """The one JSON object in a file. Raises OSError or ValueError."""
    try:
        value = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deeply")
    if not isinstance(value, dict):
        raise ValueError("it must hold one JSON object")
    return value


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors and the text in a .safetensors checkpoint. Raises OSError, or ValueError if the .json beside it holds another SHA-256."""
    data = path.read_bytes()
    if read_json(path.with_suffix(".json")).get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError("it is damaged")
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # of the format: its length, itself, then the tensors
        return load(data), header["__metadata__"]["state"]
    except (LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"it is no checkpoint of this kit: {error}")


def checkpoint_files(folder: Path) -> list[Path]:
    """Our own files in checkpoint/, oldest first, and what a kill left of an unfinished one; whatever else is there is none of our business."""
    files = sorted((folder / "checkpoint").glob("[0-9]" * 8 + ".*"))
    return [path for path in files if path.name[8:].removesuffix(".tmp") in (".safetensors", ".json")]


def checkpoints(folder: Path) -> list[Path]:
    """The .safetensors of all checkpoints, oldest first: with the .json, the second half to be written, there is one."""
    return [path.with_suffix(".safetensors") for path in checkpoint_files(folder) if path.suffix == ".json"]


def write_atomically(path: Path, *pieces: bytes):
    """The file is the old one or the new one, never half of either, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # a new one, never what a link points to
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: dict):
    write_atomically(path, json.dumps(value, indent=1).encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], **texts: str) -> str:
    """Writes a .safetensors file, by its format: length of the header, header, tensors. Returns its SHA-256.

    The library's own writers copy everything first, or leak memory with every new size of a tensor, or leave a file behind when they are killed.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # wide types first: all are aligned
    header, end = {"__metadata__": texts}, 0
    for name, x in tensors.items():
        header[name] = dict(dtype=DTYPES[x.dtype], shape=list(x.shape), data_offsets=[end, end := end + x.nbytes])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pieces = [len(text).to_bytes(8, "little"), text, *(x.cpu().contiguous().view(-1).numpy().view(np.uint8) for x in tensors.values())]
    write_atomically(path, *pieces)
    checksum = hashlib.sha256()
    for piece in pieces:
        checksum.update(piece)
    return checksum.hexdigest()


def pack(tree, tensors: dict, name: str = ""):
    """Moves the tensors of a nested dict or list into `tensors`, under dotted names; what is left can be written as JSON."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {str(key): pack(value, tensors, f"{name}.{key}".lstrip(".")) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{name}.{i}") for i, value in enumerate(tree)]
    return tree


def unpack(tree, tensors: dict):
    if isinstance(tree, dict) and tree.keys() == {"tensor"}:
        return tensors[tree["tensor"]]
    if isinstance(tree, dict):
        return {int(key) if key.isdigit() else key: unpack(value, tensors) for key, value in tree.items()}
    return [unpack(value, tensors) for value in tree] if isinstance(tree, list) else tree


# -------------------------------------------------------------------------------------------------------------- command line


def load_replay(run_dir: Path, holdout: int, newest: int) -> Replay:
    """The real steps in a run's newest good checkpoint."""
    found = checkpoints(run_dir)
    if not found:
        raise UsageError(f"{run_dir} holds no checkpoint; is it the folder of a run in a learned model?")
    for path in reversed(found):
        try:
            tensors, _ = read_checkpoint(path)
            steps = Rollout(*(tensors[f"replay.{name}"] for name in Rollout._fields))
            replay = Replay(steps.obs.shape[1], steps.obs.shape[2], holdout, newest)
            replay.add(steps)
            break
        except (LookupError, OSError, RuntimeError, ValueError) as error:
            problem = f"{path} holds no real steps of a run in a learned model: {error}."
    else:
        raise UsageError(problem)
    if not replay.held_out.any():
        raise UsageError(f"{run_dir} has too few episodes to hold one out; let it run on.")
    return replay


@settings_command(ModelSettings)
def main(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run in a learned model.")],
    updates: Annotated[int, typer.Option(min=1, max=10_000_000, help="Gradient steps of the fit, from scratch.")] = 3000,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Decides everything random.")] = 0,
    given: dict = {},
):
    """Fits a fresh world model to the data of a run and says where it is wrong: by horizon, by size of the reward, by place.

    Flags override the run's own settings. Numbers go to RUN_DIR/world_model/diagnosis.json, pictures beside it.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    try:
        config = read_json(run_dir / "config.json")
        settings = ModelSettings(**{f.name: config[f.name] for f in dataclasses.fields(ModelSettings)} | given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run_dir} is not the folder of a run: {error}.")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    replay, folder = load_replay(run_dir, settings.wm_holdout, settings.wm_newest), run_dir / "world_model"
    folder.mkdir(exist_ok=True)
    model = WorldModel(replay.steps.obs.shape[-1], int(replay.steps.actions.max()) + 1, settings)
    optimizer = torch.optim.AdamW([flatten(model)], lr=settings.wm_lr, weight_decay=settings.wm_weight_decay, fused=True)
    console = Console()
    of_runs = "wm_updates", "wm_first_updates", "wm_autoencoder", "uncertainty_use", "uncertainty_limit", "uncertainty_penalty"
    if idle := [name for name in given if name in of_runs]:
        console.print(f"Without effect outside a run: {', '.join(idle)}.", highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fitting", total=updates)
        losses = fit(model, optimizer, replay, updates, settings.wm_batch, lambda: progress.advance(bar))
    if not all(map(math.isfinite, losses.values())):
        raise UsageError("The fit diverged: its losses are not finite. Try a smaller --wm-lr.")
    result = diagnose(model, replay)
    write_json(folder / "diagnosis.json", result)
    draw_diagnosis(model, replay, folder)

    def show(title, head, rows):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
        console.print(table)

    show("Open-loop error by horizon (standard deviations of a step's change)", ("steps", "error"), result["error_by_horizon"].items())
    show(
        "Reward error by the reward's distance from the median",
        ("distance", "steps", "RMSE"),
        [(k, v["steps"], v["rmse"]) for k, v in result["reward_error_by_size"].items()],
    )
    places, between = sorted(result["error_by_place"], key=lambda p: -p["error"])[:8], "{:.2f} to {:.2f}".format
    show(
        "Worst places (of a 6 x 6 grid over obs[0] and obs[1])",
        ("obs[0]", "obs[1]", "fitted steps", "error"),
        [(between(*p["x"]), between(*p["y"]), p["fitted_steps"], p["error"]) for p in places],
    )
    show("Endings on held-out steps", ("steps", "expected", "real"), [tuple(result["endings"].values())])
    console.print(f"Pictures and numbers are in {folder}", highlight=False, markup=False, emoji=False)


def run_command(command):
    """Runs a Typer app: bad input is one sentence and exit status 2; a failing disk, or too little memory, one sentence and exit status 1."""
    try:
        return command()
    except UsageError as error:
        sentence, status = str(error), 2
    except OSError as error:
        sentence, status = f"A file could not be read or written: {error}.", 1
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sentence, status = f"These settings need more memory than there is: {str(error).splitlines()[0]}", 1
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(main)
    run_command(app)
