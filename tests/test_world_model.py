"""The world model, from its bricks to its dreams: each promise against an oracle that knows nothing of the model's code."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import world_model
from ppo_mbrl import Environments, collect
from world_model import (
    Autoencoder,
    Dream,
    EnsembleLinear,
    GRUMemory,
    Mirror,
    ModelSettings,
    NoPotential,
    Normaliser,
    Potential,
    Replay,
    Rollout,
    UsageError,
    WorldModel,
    absolute_error,
    calibrate,
    delta,
    direct,
    ensemble_mlp,
    error_curve,
    find_mirror,
    fit,
    gaussian_error,
    measure,
    plan,
    quantiles,
    rk4,
    sample,
    spread,
    squared_error,
    trusted_horizon,
)

# ------------------------------------------------------------------------------------------------------------------- bricks


def twin(layer: EnsembleLinear, member: int) -> nn.Linear:
    """torch.nn.Linear with the weights of one member."""
    linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[2])
    with torch.no_grad():
        linear.weight.copy_(layer.weight[member].T)
        linear.bias.copy_(layer.bias[member, 0])
    return linear


@pytest.mark.parametrize("members", [1, 4])
def test_an_ensemble_of_layers_is_a_loop_of_linear_layers(members):
    torch.manual_seed(0)
    layer, x = EnsembleLinear(members, 5, 3), torch.randn(members, 7, 5)
    loop = torch.stack([twin(layer, e)(x[e]) for e in range(members)])
    torch.testing.assert_close(layer(x), loop, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("members, layers", [(1, 1), (3, 2), (2, 4)])
def test_an_ensemble_of_networks_is_a_loop_of_networks(members, layers):
    torch.manual_seed(1)
    net, x = ensemble_mlp(members, 4, 6, layers, 2), torch.randn(members, 9, 4)
    loop = []
    for e in range(members):
        h = x[e]
        linears = [twin(m, e) for m in net if isinstance(m, EnsembleLinear)]
        assert len(linears) == layers + 1
        for linear in linears[:-1]:
            h = F.silu(linear(h))
        loop.append(linears[-1](h))
    torch.testing.assert_close(net(x), torch.stack(loop), atol=1e-6, rtol=1e-5)


def test_every_member_starts_like_a_linear_layer_and_unlike_the_others():
    torch.manual_seed(2)
    layer = EnsembleLinear(50, 16, 64)
    usual = torch.stack([nn.Linear(16, 64).weight for _ in range(50)])
    assert layer.weight.abs().max() <= 1 / 4 and layer.bias.abs().max() <= 1 / 4
    assert float(layer.weight.detach().std()) == pytest.approx(float(usual.detach().std()), rel=0.02)
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_a_members_loss_gives_the_other_members_no_gradient():
    torch.manual_seed(3)
    net = ensemble_mlp(3, 4, 8, 2, 2)
    net(torch.randn(3, 5, 4))[1].square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad[0].eq(0).all() and parameter.grad[2].eq(0).all()
        assert parameter.grad[1].ne(0).any()


def textbook_gru(memory: GRUMemory, member: int, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Cho et al. (2014), equations 5 to 8, one unit after the other (with z as the share that is kept)."""
    W, b, C, c = (p[member].squeeze().tolist() for layer in (memory.gates, memory.candidate) for p in (layer.weight, layer.bias))
    F_, H = len(x), len(h)
    both = [float(v) for v in x] + [float(v) for v in h]
    gate = [1 / (1 + math.exp(-sum(both[i] * W[i][j] for i in range(F_ + H)) - b[j])) for j in range(2 * H)]
    r, z = gate[:H], gate[H:]
    mixed = [float(v) for v in x] + [r[j] * float(h[j]) for j in range(H)]
    new = [math.tanh(sum(mixed[i] * C[i][j] for i in range(F_ + H)) + c[j]) for j in range(H)]
    return torch.tensor([z[j] * float(h[j]) + (1 - z[j]) * new[j] for j in range(H)])


def test_the_memory_is_the_textbook_gru():
    torch.manual_seed(4)
    memory = GRUMemory(2, 3, 4, window=5)
    x, h = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    loop = torch.stack([torch.stack([textbook_gru(memory, e, x[e, b], h[e, b]) for b in range(6)]) for e in range(2)])
    torch.testing.assert_close(memory(x, h), loop, atol=1e-5, rtol=1e-5)


def test_the_memory_is_torchs_gru_cell_where_the_reset_gate_is_open():
    """torch resets after the matrix product, Cho et al. before it; with the gate wide open there is no difference."""
    torch.manual_seed(5)
    memory, cell = GRUMemory(1, 3, 4, window=5), nn.GRUCell(3, 4)
    with torch.no_grad():
        memory.gates.bias[0, 0, :4] = 50.0
        W, C = memory.gates.weight[0], memory.candidate.weight[0]
        cell.weight_ih.copy_(torch.cat([W[:3].T, C[:3].T])), cell.weight_hh.copy_(torch.cat([W[3:].T, C[3:].T]))
        cell.bias_ih.copy_(torch.cat([memory.gates.bias[0, 0], memory.candidate.bias[0, 0]])), cell.bias_hh.zero_()
    x, h = torch.randn(1, 6, 3), torch.randn(1, 6, 4)
    torch.testing.assert_close(memory(x, h)[0], cell(x[0], h[0]), atol=1e-6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=2, max_size=20),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_a_normaliser_can_be_undone(rows, keep):
    x, scale = torch.tensor(rows), Normaliser(3)
    scale.fit(x, keep=torch.tensor(keep))
    torch.testing.assert_close(scale.inverse(scale(x)), x, atol=2e-2, rtol=1e-4)  # of numbers as large as 1e4, in single precision
    assert all(torch.equal(scale(x)[:, i], x[:, i]) for i in range(3) if keep[i])


def test_a_normaliser_gives_mean_zero_and_standard_deviation_one_and_constant_columns_survive():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(5, 3, 500), np.full(500, 7.3), rng.normal(0, 1e-3, 500)], 1).astype(np.float32)
    scale = Normaliser(3)
    scale.fit(torch.tensor(x))
    y = scale(torch.tensor(x)).numpy()
    assert np.allclose(y.mean(0), 0, atol=1e-4) and np.allclose(y[:, [0, 2]].std(0), 1, atol=1e-3)
    assert np.allclose(y[:, 1], 0, atol=1e-5) and scale.std[1] == 1
    assert np.isfinite(scale(torch.tensor([[5.0, 8.0, 0.0]])).numpy()).all()


def test_quantiles_are_ranks():
    x = torch.randperm(1001).float()
    assert [float(q) for q in quantiles(x, 0, 0.005, 0.5, 0.95, 1)] == [0, 5, 500, 950, 1000]


def test_the_errors_are_those_of_the_named_distributions():
    error, logvar = torch.randn(50), torch.randn(50)
    normal = torch.distributions.Normal(torch.zeros(50), (logvar / 2).exp())
    nll = -normal.log_prob(error) - math.log(2 * math.pi) / 2
    for beta in (0.0, 0.5, 1.0):
        torch.testing.assert_close(gaussian_error(error, logvar, beta), nll * normal.variance**beta, atol=1e-4, rtol=1e-4)
    zeros = torch.zeros(50)
    torch.testing.assert_close(squared_error(error, logvar), F.mse_loss(error, zeros, reduction="none"))
    torch.testing.assert_close(absolute_error(error, logvar), F.l1_loss(error, zeros, reduction="none"))


def test_the_gaussian_error_teaches_its_mean_as_if_each_step_were_worth_its_standard_deviation():
    error, logvar = torch.randn(50, requires_grad=True), torch.randn(50, requires_grad=True)
    normal = torch.distributions.Normal(error, (logvar / 2).exp())
    nll = torch.autograd.grad(-normal.log_prob(torch.zeros(50)).sum(), (error, logvar))
    ours = torch.autograd.grad(gaussian_error(error, logvar, 0.5).sum(), (error, logvar))
    for mine, theirs in zip(ours, nll):
        torch.testing.assert_close(mine, theirs * (logvar.detach() / 2).exp(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- potential


def test_a_potential_cannot_be_mined_in_a_loop():
    phi, path = Potential(3, 4, 16, 2), torch.randn(10, 3, 5, 4)
    steps = torch.stack([phi(a, b) for a, b in zip(path, path.roll(-1, 0))])
    assert steps.abs().mean() > 0.01
    torch.testing.assert_close(steps.sum(0), torch.zeros(3, 5), atol=1e-5, rtol=0)


def test_the_reward_is_the_head_and_the_potential_of_the_true_next_observation():
    model, replay = WorldModel(3, 2, ModelSettings(wm_binary=False)), filled(random_rollout(100, 1, 3, seed=3))
    model.adapt(replay)
    obs, next_obs, hidden = torch.randn(5, 7, 3), torch.randn(5, 7, 3), torch.zeros(5, 7, 0)
    x = model.features(obs, torch.randint(2, (5, 7)))
    alone = model.heads(torch.cat([x, model.change_scale(next_obs - obs)], -1))[..., 0]
    phi = [model.potential.net(model.obs_scale(o))[..., 0] for o in (obs, next_obs)]
    slope = (model.obs_scale.std / model.change_scale.std).median()
    torch.testing.assert_close(model.outcome(x, next_obs - obs, hidden).reward, alone + slope * (phi[1] - phi[0]), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- integrators


def linear_field(seed: int, step: float = 1.0):
    """A linear field x -> step * G x and the exact flow over one unit of time."""
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x: x @ (step * G).T, torch.linalg.matrix_exp(step * G)


@pytest.mark.parametrize("seed", range(5))
def test_rk4_is_the_matrix_exponential_with_a_local_error_of_fifth_order(seed):
    x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    errors = []
    for step in (0.1, 0.05, 0.025):
        field, flow = linear_field(seed, step)
        errors.append(float((rk4(field, x) - x @ flow.T).norm() / x.norm()))
    assert errors[0] < 1e-4
    assert 24 < errors[0] / errors[1] < 40 and 24 < errors[1] / errors[2] < 40  # 2 ** 5 = 32


def test_delta_is_one_euler_step_and_direct_is_the_field_itself():
    field, _ = linear_field(0)
    G = torch.stack([field(row) for row in torch.eye(4, dtype=torch.float64)], 1)
    x = torch.randn(10, 4, dtype=torch.float64)
    torch.testing.assert_close(delta(field, x), x @ (torch.eye(4, dtype=torch.float64) + G).T)
    torch.testing.assert_close(direct(field, x), x @ G.T)


# ------------------------------------------------------------------------------------------------------------------- replay


def random_rollout(T: int, N: int, obs_dim: int, seed: int, p: float = 0.15) -> Rollout:
    rng = np.random.default_rng(seed)
    ended, cut = rng.random((T, N)) < p / 2, rng.random((T, N)) < p / 2
    as_tensor = lambda x: torch.as_tensor(x, dtype=torch.float32)  # noqa: E731
    obs, next_obs = as_tensor(rng.normal(size=(T, N, obs_dim))), as_tensor(rng.normal(size=(T, N, obs_dim)))
    actions, rewards = torch.as_tensor(rng.integers(2, size=(T, N))), as_tensor(rng.normal(size=(T, N)))
    return Rollout(obs, actions, rewards, next_obs, torch.tensor(ended), torch.tensor(cut & ~ended))


def filled(rollout: Rollout, holdout: int = 10, newest: int = 0) -> Replay:
    replay = Replay(rollout.obs.shape[1], rollout.obs.shape[2], holdout, newest)
    replay.add(rollout)
    return replay


@pytest.mark.parametrize("seed, holdout, pieces, obs_dim", [(0, 10, 1, 2), (1, 4, 3, 2), (2, 2, 7, 20_000)])
def test_a_replay_numbers_episodes_like_a_plain_loop(seed, holdout, pieces, obs_dim):
    whole = random_rollout(120, 3, obs_dim, seed)
    replay = Replay(3, obs_dim, holdout)
    room = len(replay.buffers[0])
    for part in np.array_split(np.arange(120), pieces):
        replay.add(Rollout(*(x[part] for x in whole)))
    over = (whole.terminated | whole.truncated).numpy()
    for n in range(3):
        age, episode = 0, 0
        for t in range(120):
            assert replay.age[t, n] == age
            assert bool(replay.held_out[t, n]) == (episode % holdout == min(2, holdout - 1))
            age, episode = (0, episode + 1) if over[t, n] else (age + 1, episode)
    assert all(torch.equal(a, b) for a, b in zip(replay.steps, whole)) and len(replay) == 360
    assert (room < 120) == (obs_dim == 20_000)  # it was outgrown


@pytest.mark.parametrize("before, after", [(0, 1), (4, 1), (3, 5)])
def test_windows_hold_the_right_steps_and_never_cross_an_episode(before, after):
    replay = filled(random_rollout(80, 2, 2, seed=3))
    over = replay.steps.terminated | replay.steps.truncated
    episode = torch.zeros(80, 2, dtype=torch.long)
    for t in range(1, 80):
        episode[t] = episode[t - 1] + over[t - 1]
    t, n = (x.flatten() for x in torch.meshgrid(torch.arange(80), torch.arange(2), indexing="ij"))
    window, valid = replay.window(t, n, before, after)
    assert window.obs.shape == (before + after, 160, 2)
    for i, (at, env) in enumerate(zip(t.tolist(), n.tolist())):
        for j, k in enumerate(range(at - before, at + after)):
            same = 0 <= k < 80 and bool(episode[k, env] == episode[at, env])
            assert bool(valid[j, i]) == same
            if same:
                assert torch.equal(window.obs[j, i], replay.steps.obs[k, env]) and window.rewards[j, i] == replay.steps.rewards[k, env]


def test_samples_are_uniform_over_the_chosen_steps_and_only_those():
    replay = filled(random_rollout(50, 2, 1, seed=4))
    torch.manual_seed(0)
    t, n = sample(replay.held_out.nonzero(), (20_000,))
    assert replay.held_out[t, n].all()
    counts = torch.bincount(t * 2 + n, minlength=100)[replay.held_out.flatten()]
    expected = 20_000 / len(counts)
    assert (counts - expected).abs().max() < 6 * math.sqrt(expected)


def test_a_spread_is_even_and_uses_up_no_randomness():
    where, before = torch.arange(200).view(100, 2), torch.get_rng_state()
    t, n = spread(where, 10)
    assert t.tolist() == [2 * round(x) for x in np.floor(np.linspace(0, 99, 10))] and torch.equal(n, t + 1)
    assert torch.equal(torch.stack(spread(where, 1000), 1), where) and torch.equal(torch.get_rng_state(), before)


def test_scales_are_those_of_the_fitted_steps_and_ranges_of_all():
    replay, model = filled(random_rollout(400, 2, 3, seed=6)), WorldModel(3, 2, ModelSettings(wm_margin=0.0))
    model.adapt(replay)
    fitted, both = replay.steps.obs[~replay.held_out], torch.cat([replay.steps.obs, replay.steps.next_obs])
    assert replay.held_out.any() and torch.allclose(model.obs_scale.mean, fitted.mean(0), atol=1e-5)
    assert torch.allclose(model.obs_scale.std, fitted.std(0, correction=0), atol=1e-5)
    assert torch.equal(model.obs_low, both.amin((0, 1))) and torch.equal(model.obs_high, both.amax((0, 1)))
    rewards = replay.steps.rewards[~replay.held_out & replay.steps.terminated]
    assert model.last_reward_range.tolist() == [rewards.min(), rewards.max()]


def test_only_the_newest_steps_are_recent():
    replay = filled(random_rollout(50, 2, 1, seed=5), newest=12)
    assert set(map(tuple, replay.recent.nonzero().tolist())) == set(itertools.product(range(38, 50), range(2)))
    assert filled(random_rollout(50, 2, 1, seed=5)).recent.all()
    steps, _ = replay.excerpts(500, 5)  # and only they are shown to the critic
    assert {float(x) for x in steps.obs.flatten()} == {float(x) for x in replay.steps.obs[38:].flatten()}


def test_rare_steps_are_those_near_endings_flips_and_extreme_rewards():
    T, zeros = 400, torch.zeros(400, 1, 2)
    rollout = Rollout(zeros.clone(), zeros[..., 0].long(), torch.zeros(T, 1), zeros.clone(), zeros[..., 0].bool(), zeros[..., 0].bool())
    rollout.terminated[50] = True
    rollout.truncated[90] = True  # a time-out is nothing rare
    rollout.next_obs[120, 0, 1] = 1.0  # flips the binary column
    rollout.next_obs[160, 0, 0] = 1.0  # moves the other one
    rollout.rewards[200], rollout.rewards[300] = 100.0, -100.0
    expected = {t for event in (50, 120, 200, 300) for t in range(event - 3, event + 4) if t not in (51, 52, 53)}  # the next episode
    rare = filled(rollout).rare(torch.tensor([False, True]), reach=3)
    assert set(rare[:, 0].nonzero()[:, 0].tolist()) == expected


def test_binary_columns_are_found_from_the_data_and_only_those():
    rollout = random_rollout(200, 2, 5, seed=6)
    flags = torch.randint(2, (201, 2)).float()
    rollout.obs[..., 1], rollout.next_obs[..., 1] = flags[:-1], flags[1:]  # a flag
    rollout.obs[..., 2], rollout.next_obs[..., 2] = 0.0, 0.0
    rollout.next_obs[-1, 0, 2] = 0.5  # a flag, but for one last step
    rollout.obs[..., 3], rollout.next_obs[..., 3] = 2 * flags[:-1], 2 * flags[1:]  # two values, but not 0 and 1
    rollout.obs[..., 4], rollout.next_obs[..., 4] = 7.0, 7.0  # constant
    model = WorldModel(5, 2, ModelSettings(wm_hidden=4))
    model.adapt(filled(rollout))
    assert model.binary.tolist() == [False, True, False, False, False]
    blind = WorldModel(5, 2, ModelSettings(wm_hidden=4, wm_binary=False))
    blind.adapt(filled(rollout))
    assert not blind.binary.any()


def test_dreams_keep_constant_columns_constant_and_binary_columns_binary():
    rollout = random_rollout(300, 1, 3, seed=7)
    flags = torch.randint(2, (301, 1)).float()
    rollout.obs[..., 1], rollout.next_obs[..., 1] = flags[:-1], flags[1:]
    rollout.obs[..., 2], rollout.next_obs[..., 2] = 7.0, 7.0
    s = ModelSettings(wm_hidden=8, wm_ensemble=2, uncertainty="none")
    model, replay = WorldModel(3, 2, s), filled(rollout)
    torch.manual_seed(0)
    fit(model, torch.optim.AdamW(model.parameters(), 1e-3), replay, 20, 64)
    dream = Dream(model, replay, 50, s, 0.3, 0.3)
    dream.reset()
    path = torch.stack([dream.step(torch.randint(2, (50,)))[1] for _ in range(20)])
    assert torch.isfinite(path).all() and path[..., 2].eq(7).all()
    assert set(path[..., 1].unique().tolist()) == {0.0, 1.0}
    assert path[..., 0].unique().numel() > 100


# --------------------------------------------------------------------------------------- dreams through the true dynamics


class TrueDynamics(nn.Module):
    """Takes the place of the network: computes a known field of the observation and the action, in the units the model asks for."""

    def __init__(self, model, field, unit):
        super().__init__()
        self.model, self.field, self.unit = [model], field, unit

    def forward(self, x):
        m = self.model[0]
        obs, action = m.obs_scale.inverse(x[..., : len(m.binary)]), x[..., len(m.binary) :].argmax(-1)
        mean = self.unit(self.field(obs, action))
        return torch.cat([mean, torch.zeros_like(mean), torch.zeros_like(mean)], -1)


class TrueHeads(nn.Module):
    """reward(next_obs), and an ending, sure as can be, where ends(next_obs)."""

    def __init__(self, model, reward, ends):
        super().__init__()
        self.model, self.reward, self.ends = [model], reward, ends

    def forward(self, x):
        m, size, actions = self.model[0], len(self.model[0].binary), self.model[0].num_actions
        next_obs = m.obs_scale.inverse(x[..., :size]) + m.change_scale.inverse(x[..., size + actions : size + actions + size])
        reward, ends = self.reward(next_obs), self.ends(next_obs)
        plain, last = m.reward_scale(reward[..., None])[..., 0], m.last_reward_scale(reward[..., None] - 10)[..., 0]
        return torch.stack([plain, last, torch.where(ends, 60.0, -60.0)], -1)


def oscillator(seed: int = 0):
    """G (2, O, O) and c (2, O): one linear field d obs / dt = G obs + c an action, a damped oscillation that action 1 pushes."""
    rng = np.random.default_rng(seed)
    G = np.array([[-0.02, 0.15, 0], [-0.15, -0.02, 0.05], [0, 0, -0.1]]) + rng.normal(0, 0.01, (2, 3, 3))
    return G, np.array([[0.0, 0, 0], [0.1, 0.0, 0.1]])


def exact_flow(G: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The step of one unit of time, obs' = A obs + b, by the matrix exponential of the augmented field."""
    block = np.zeros((2, 4, 4))
    block[:, :3, :3], block[:, :3, 3] = G, c
    flow = torch.linalg.matrix_exp(torch.tensor(block)).numpy()
    return flow[:, :3, :3], flow[:, :3, 3]


def mixed(A, b, obs, action):
    """A[action] @ obs + b[action] for whole batches."""
    A, b = torch.as_tensor(A, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32)
    return (A[action] @ obs[..., None])[..., 0] + b[action]


def true_model(target: str, s: ModelSettings, ends=lambda x: x[..., 0] > 1e9) -> WorldModel:
    """A WorldModel with the oscillator for a network, behind arbitrary normalisers; rewards are 2 x0 - x1, 10 less at the end."""
    model = WorldModel(3, 2, s)
    torch.manual_seed(7)
    for scale in (model.obs_scale, model.change_scale, model.reward_scale, model.last_reward_scale):
        scale.mean.normal_()
        scale.std.uniform_(0.5, 2)
    model.obs_low.fill_(-1e6), model.obs_high.fill_(1e6)
    model.reward_range.copy_(torch.tensor([-1e6, 1e6])), model.last_reward_range.copy_(torch.tensor([-1e6, 1e6]))
    G, c = oscillator()
    A, b = exact_flow(G, c)
    fields = dict(direct=(A, b), delta=(A - np.eye(3), b), ode=(G, c))
    unit = model.obs_scale if target == "direct" else model.change_scale
    model.dynamics = TrueDynamics(model, lambda obs, action: mixed(*fields[target], obs, action), unit)
    model.potential = NoPotential()
    model.heads = TrueHeads(model, lambda x: 2 * x[..., 0] - x[..., 1], ends)
    return model


@pytest.mark.parametrize("target", ["direct", "delta", "ode"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_dream_through_the_true_dynamics_is_reality(target, members):
    s = ModelSettings(wm_target=target, wm_likelihood="squared", wm_ensemble=members, uncertainty="none")
    model, replay = true_model(target, s, ends=lambda x: x[..., 0] > 1.5), filled(random_rollout(200, 2, 3, seed=8))
    A, b = exact_flow(*oscillator())
    dream, seen = Dream(model, replay, 40, s, 0.3, 0.3), {tuple(x) for x in replay.steps.obs.flatten(0, 1).tolist()}
    state = dream.reset().double().numpy().copy()
    assert {tuple(x) for x in dream.obs.tolist()} <= seen
    ends, untouched = 0, np.ones(40, bool)
    for _ in range(20):
        action = torch.randint(2, (40,))
        real = np.einsum("nij,nj->ni", A[action], state) + b[action]
        ended = real[:, 0] > 1.5
        reward, next_obs, terminated, truncated = dream.step(action)
        np.testing.assert_allclose(next_obs.numpy(), real, atol=2e-4)
        np.testing.assert_allclose(reward.numpy(), 2 * real[:, 0] - real[:, 1] - 10 * ended, atol=2e-3)
        assert terminated.tolist() == ended.tolist() and not truncated.any()
        assert {tuple(x) for x in dream.obs[terminated].tolist()} <= seen
        state = np.where(ended[:, None], dream.obs.double().numpy(), real)
        ends, untouched = ends + ended.sum(), untouched & ~ended
    assert ends > 5 and untouched.sum() > 5  # both were put to the test: endings, and twenty steps in one go


def test_the_open_loop_error_of_a_constant_bias_grows_by_the_bias_and_sets_the_horizon():
    drift = 0.5
    rollout = random_rollout(100, 2, 3, seed=9, p=0)
    position = torch.arange(101)[:, None, None].expand(101, 2, 3) * 1.0
    rollout = rollout._replace(obs=position[:-1], next_obs=position[1:])
    s = ModelSettings(wm_likelihood="squared", wm_ensemble=2, wm_holdout=2)
    model, replay = true_model("delta", s), filled(rollout)
    model.dynamics = TrueDynamics(model, lambda obs, action: torch.full_like(obs, 1 + drift), model.change_scale)
    model.change_scale.std.fill_(1.0)
    curve = error_curve(model, replay, 30, torch.ones_like(replay.held_out))
    np.testing.assert_allclose(curve.numpy(), drift * np.arange(1, 31), rtol=1e-3)
    assert [trusted_horizon(model, replay, limit, 25) for limit in (0.1, 5.1, 1e9)] == [1, 10, 25]


@pytest.mark.parametrize(
    "price, gamma, goal, i, limit, ending",
    [(0, 0.5, 0.2, 1, 1.0, "member"), (5, 0.8, -0.2, 0, 0.5, "member"), (5, 0.8, -0.2, 0, 0.5, "agree")],
    ids=["endings are bad", "living is worse", "living is worse, but one member knows no endings"],
)
def test_the_planner_finds_what_trying_every_sequence_finds(price, gamma, goal, i, limit, ending):
    s = ModelSettings(wm_likelihood="squared", wm_ensemble=2, wm_ending=ending)
    model = true_model("delta", s)
    A, b = exact_flow(*oscillator())
    model.potential, knows = NoPotential(), torch.tensor([[True], [ending == "member"]])
    model.heads = TrueHeads(model, lambda x: -price - (x[..., 0] - goal) ** 2, lambda x: (x[..., i] > limit) & knows)
    starts = np.random.default_rng(0).normal(size=(40, 3))
    torch.manual_seed(0)
    found = plan(model, torch.tensor(starts, dtype=torch.float32), torch.zeros(2, 40, 0), 5, 300, 4, gamma).tolist()
    for start, first in zip(starts, found):
        scores = {}
        for sequence in itertools.product((0, 1), repeat=5):
            state, score = start, 0.0
            for k, a in enumerate(sequence):
                state = A[a] @ state + b[a]
                ends = state[i] > limit and ending == "member"
                score -= gamma**k * (price + (state[0] - goal) ** 2 + 10 * ends)
                if ends:
                    break
            scores[sequence] = score
        assert max(score for sequence, score in scores.items() if sequence[0] == first) > max(scores.values()) - 2e-3
    assert set(found) == {0, 1}


def test_each_dream_stays_in_its_own_member():
    s = ModelSettings(wm_likelihood="squared", wm_ensemble=3, uncertainty="none")
    model, replay = true_model("delta", s), filled(random_rollout(50, 1, 3, seed=10))
    member_id = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    model.dynamics = TrueDynamics(model, lambda obs, action: obs * 0 + member_id, model.change_scale)
    dream = Dream(model, replay, 7, s, 0.0, 0.0)
    start = dream.reset().clone()
    for _ in range(6):
        dream.step(torch.zeros(7, dtype=torch.long))
    moved = (dream.obs - start).numpy()
    np.testing.assert_allclose(moved, np.array([6, 12, 18, 6, 12, 18, 6])[:, None].repeat(3, 1), atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- uncertainty


def quarrelsome(use: str, uncertainty: str = "ensemble", limit: float = 1.0, members: int = 3, ends=None, **bounds):
    """A dream whose members disagree in proportion to the observation: member e changes it by e * obs / 10."""
    s = ModelSettings(wm_likelihood="squared", wm_ensemble=members, uncertainty=uncertainty, uncertainty_use=use, uncertainty_limit=limit,
                      uncertainty_penalty=0.7)  # fmt: skip
    model, replay = true_model("delta", s, *([ends] if ends else [])), filled(random_rollout(100, 1, 3, seed=11))
    model.change_scale.std.copy_(torch.tensor([1.0, 2.0, 4.0]))
    model.typical.copy_(torch.tensor([0.05, 1.0]))
    share = torch.arange(members)[:, None, None] / 10
    model.dynamics = TrueDynamics(model, lambda obs, action: share * obs, model.change_scale)
    return model, replay, Dream(model, replay, 200, s, **bounds)


def by_hand(obs: np.ndarray, members: int = 3) -> np.ndarray:
    """Root mean square over the columns of the standard deviation over the members, in units of the change, over what is typical."""
    means = np.stack([obs * (1 + e / 10) for e in range(members)]) / np.array([1.0, 2.0, 4.0])
    return np.sqrt((means.std(0) ** 2).mean(-1)) / 0.05


def test_uncertainty_cuts_dreams_above_the_limit_and_does_not_end_them():
    torch.manual_seed(0)
    _, _, dream = quarrelsome("end", ends=lambda x: x[..., 0] > 1.2)
    uncertainty = by_hand(dream.reset().numpy())
    _, _, terminated, truncated = dream.step(torch.zeros(200, dtype=torch.long))
    assert truncated.tolist() == ((uncertainty > 1.0) & ~terminated.numpy()).tolist()
    assert truncated.any() and terminated.any() and not truncated.all()
    assert (terminated.numpy() & (uncertainty > 1.0)).any()


def test_dreams_end_where_the_data_ends_and_columns_that_never_change_do_not_count():
    torch.manual_seed(0)
    model, _, dream = quarrelsome("end", "none")
    low, high = torch.tensor([-0.5, -1e6, 2.0]), torch.tensor([0.7, 1e6, 2.0])
    model.obs_low.copy_(low), model.obs_high.copy_(high)
    _, next_obs, _, truncated = dream.step(torch.zeros(200, dtype=torch.long))
    clipped = (next_obs[:, 0] <= -0.5) | (next_obs[:, 0] >= 0.7)
    assert (next_obs[:, 2] == 2).all() and truncated.tolist() == clipped.tolist() and clipped.any() and not clipped.all()


def test_binary_columns_are_never_outside():
    model = WorldModel(3, 2, ModelSettings(wm_margin=0.0))
    obs = torch.rand(200, 2, 3)
    obs[..., 2] = (obs[..., 2] > 0.5).float()
    model.adapt(filled(random_rollout(200, 2, 3, seed=1)._replace(obs=obs, next_obs=obs.roll(-1, 0))))
    assert model.binary.tolist() == [False, False, True]
    assert not model.outside(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]])).any()
    assert model.outside(torch.tensor([[0.5, 2.0, 0.0], [-1.0, 0.5, 1.0]])).all()


def test_the_penalty_lowers_the_reward_by_what_is_documented_and_cuts_nothing():
    rewards = {}
    for use, uncertainty in (("penalise", "ensemble"), ("penalise", "none"), ("end", "none")):
        torch.manual_seed(0)
        model, _, dream = quarrelsome(use, uncertainty)
        obs = dream.reset().numpy().copy()
        rewards[use, uncertainty], _, _, truncated = dream.step(torch.zeros(200, dtype=torch.long))
        assert not truncated.any()
    assert torch.equal(rewards["penalise", "none"], rewards["end", "none"])
    price = 0.7 * float(model.reward_scale.std) * by_hand(obs)
    np.testing.assert_allclose((rewards["end", "none"] - rewards["penalise", "ensemble"]).numpy(), price, atol=1e-4)
    assert price.min() > 0.01


def test_an_ensemble_of_one_agrees_with_itself():
    _, _, dream = quarrelsome("end", limit=0.0, members=1)
    dream.reset()
    _, _, _, truncated = dream.step(torch.zeros(200, dtype=torch.long))
    assert dream.disagreement == 0 and not truncated.any()
    _, _, crowd = quarrelsome("end", limit=0.0, members=3)
    crowd.reset()
    assert crowd.step(torch.zeros(200, dtype=torch.long))[3].all() and crowd.disagreement > 0


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("ending", ["member", "mean", "agree"])
def test_what_comes_of_a_step_the_own_member_says_and_who_ends_it_those_who_are_asked(ending, memory):
    s = ModelSettings(wm_ending=ending, wm_memory=memory, wm_ensemble=3, wm_hidden=8, wm_likelihood="squared", wm_binary=False)
    torch.manual_seed(1)
    model = WorldModel(4, 2, s)
    model.adapt(filled(random_rollout(300, 1, 4, seed=2, p=0.05)))
    obs, action, hidden = torch.randn(20, 4), torch.randint(2, (20,)), torch.randn(3, 20, model.memory.size)
    next_obs, rewards, logits = [], [], []
    for i in range(20):  # each dream alone, before all members
        x, here = model.features(obs[i], action[i]).expand(3, 1, -1), obs[i].expand(3, 1, -1)
        next_obs.append(model.transition(x, here, hidden[:, i : i + 1]).mean[i % 3, 0].clamp(model.obs_low, model.obs_high))
        outcome = model.outcome(x, next_obs[-1] - here, hidden[:, i : i + 1])
        rewards.append(torch.stack(model.rewards(outcome))[:, i % 3, 0])
        every = [x.item() for x in outcome.ending]
        logits.append(dict(member=every[i % 3], mean=sum(every) / 3, agree=min(every))[ending])
    ends = np.array(logits) > np.median(logits)
    model.calibration.copy_(1e9 * torch.tensor([1, -np.median(logits)]))  # an ending is sure, one way or the other
    found = model.imagine(obs, action, hidden)  # two members have seven of the dreams, the third has six
    assert found.terminated.tolist() == ends.tolist() and ends.sum() == 10
    np.testing.assert_allclose(found.next_obs, torch.stack(next_obs).detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.reward, torch.stack(rewards).detach()[range(20), ends.astype(int)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_dreams_are_cut_at_the_horizon_and_new_ones_begin_at_real_states(k):
    _, replay, dream = quarrelsome("end", "none", horizon=k)
    seen = {tuple(x) for x in replay.steps.obs.flatten(0, 1).tolist()}
    for step in range(1, 3 * k + 1):
        _, next_obs, terminated, truncated = dream.step(torch.ones(200, dtype=torch.long))
        assert truncated.tolist() == [step % k == 0] * 200 and not terminated.any()
        real = [tuple(x) in seen for x in dream.obs.tolist()]
        assert all(real) if step % k == 0 else torch.equal(dream.obs, next_obs)
    _, _, endless = quarrelsome("end", "none")
    assert not any(endless.step(torch.ones(200, dtype=torch.long))[3].any() for _ in range(30))


@pytest.mark.parametrize("k", [1, 4])
def test_realigned_dreams_move_to_the_nearest_real_observation_and_go_on(k):
    model, replay, dream = quarrelsome("end", "none", realign=k)
    real = replay.steps.obs.flatten(0, 1).numpy()
    for step in range(1, 3 * k + 1):
        x, action = dream.obs, torch.ones(200, dtype=torch.long)
        torch.manual_seed(step)
        imagined = model.imagine(x, action, dream.hidden).next_obs.numpy()
        torch.manual_seed(step)
        _, next_obs, _, truncated = dream.step(action)
        assert not truncated.any() and torch.equal(dream.obs, next_obs)
        if step % k:
            np.testing.assert_array_equal(next_obs, imagined)
        else:
            distance = (((imagined[:, None] - real) / model.obs_scale.std.numpy()) ** 2).sum(-1)
            chosen = (((next_obs.numpy()[:, None] - real) / model.obs_scale.std.numpy()) ** 2).sum(-1).argmin(-1)
            np.testing.assert_allclose(distance[range(200), chosen], distance.min(-1), rtol=1e-4, atol=1e-6)


def test_dreams_begin_where_they_are_told_to():
    replay = filled(random_rollout(400, 1, 3, seed=12, p=0.02))
    s = ModelSettings(wm_ensemble=1, wm_hidden=4)
    model = WorldModel(3, 2, s)
    begun = {tuple(x) for x in replay.steps.obs[replay.age == 0].tolist()}
    rare = {tuple(x) for x in replay.steps.obs[replay.rare(model.binary, 10)].tolist()}
    torch.manual_seed(0)
    for beginnings, near, where in ((1.0, 0.0, begun), (0.0, 1.0, rare)):
        assert {tuple(x) for x in Dream(model, replay, 100, s, beginnings, near).starts(300)[0].tolist()} <= where
    anywhere = {tuple(x) for x in Dream(model, replay, 100, s, 0.0, 0.0).starts(2000)[0].tolist()}
    assert len(anywhere) > 350 and not anywhere <= rare


def test_a_dream_remembers_its_own_episode_and_nothing_before_it():
    torch.manual_seed(0)
    model = WorldModel(3, 2, ModelSettings(wm_ensemble=2, wm_hidden=4, wm_memory="gru", wm_memory_size=5, wm_memory_window=6))
    replay = filled(random_rollout(60, 1, 3, seed=13))
    t = torch.arange(60)
    hidden, _ = model.recall(replay, t, torch.zeros_like(t))
    over = (replay.steps.terminated | replay.steps.truncated)[:, 0]
    for at in range(60):
        first = max([k + 1 for k in range(at) if over[k]], default=0)
        h = torch.zeros(2, 1, 5)
        for k in range(max(first, at - 6), at):
            x = torch.cat([replay.steps.obs[k, 0], F.one_hot(replay.steps.actions[k, 0], 2).float()])
            h = torch.stack([textbook_gru(model.memory, e, x, h[e, 0])[None] for e in range(2)])
        torch.testing.assert_close(hidden[:, at], h[:, 0], atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- mirrors

MIRRORS = {  # from the environments' own equations: signs, columns, actions
    "LunarLander-v3": ([-1, 1, -1, 1, -1, -1, 1, 1], [0, 1, 2, 3, 4, 5, 7, 6], [0, 3, 2, 1]),
    "CartPole-v1": ([-1, -1, -1, -1], [0, 1, 2, 3], [1, 0]),
    "Acrobot-v1": ([1, -1, 1, -1, -1, -1], [0, 1, 2, 3, 4, 5], [2, 1, 0]),
}


def random_steps_of(env_id: str, seed: int, steps: int = 1500, action_repeat: int = 1) -> tuple[Rollout, int]:
    env, rng = Environments(env_id, 1, seed, action_repeat=action_repeat), np.random.default_rng(seed)
    return collect(env, lambda obs: torch.as_tensor(rng.integers(env.num_actions, size=1)), steps), env.num_actions


@pytest.mark.parametrize("env_id", MIRRORS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_mirror_is_found_in_random_steps(env_id, seed):
    found = find_mirror(*random_steps_of(env_id, seed))
    assert tuple(x.tolist() for x in found) == MIRRORS[env_id]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_a_false_mirror_is_corrected_by_more_steps(seed):
    """Which leg is which is told by a few touches; of the first 333 actions of three real steps some have no other leg's, or one."""
    steps, _ = random_steps_of("LunarLander-v3", seed, 666, action_repeat=3)
    mirror, signs, columns, actions = Mirror(8, 4), *MIRRORS["LunarLander-v3"]
    mirror.load_state_dict(mirror.state_dict() | dict(found=torch.tensor(True), actions=torch.tensor([1, 0, 2, 3])))  # a false one
    for length in (333, 500, 666):
        mirror(filled(Rollout(*(x[:length] for x in steps))), seek=True)
    assert (mirror.signs.tolist(), mirror.columns.tolist(), mirror.actions.tolist()) == (signs, columns, actions)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_left_and_right_differ_no_mirror_is_found(seed):
    assert find_mirror(*random_steps_of("MountainCar-v0", seed)) is None
    for env_id, column in (("LunarLander-v3", 2), ("CartPole-v1", 1)):
        steps, num_actions = random_steps_of(env_id, seed)
        assert find_mirror(steps._replace(rewards=steps.rewards + 10 * steps.obs[..., column]), num_actions) is None  # one way pays
        assert find_mirror(steps._replace(next_obs=steps.next_obs + 0.3 * steps.obs.std()), num_actions) is None  # a wind blows


def test_no_mirror_is_found_where_it_can_not_be_told():
    """Too many columns or actions to try, none that moves, binary columns that nothing tells apart, numbers that are none."""
    steps = random_rollout(200, 1, 3, seed=1)
    assert find_mirror(random_rollout(200, 1, 11, seed=1), 2) is None and find_mirror(steps, 7) is None
    assert find_mirror(steps._replace(obs=steps.obs * 0, next_obs=steps.next_obs * 0), 2) is None
    lander, _ = random_steps_of("LunarLander-v3", 0, 300)
    assert find_mirror(lander, 4) is None  # hardly a leg has touched the ground
    lander, _ = random_steps_of("LunarLander-v3", 0)
    one_leg = torch.tensor([1.0] * 7 + [0.0])  # the other has not touched at all
    assert find_mirror(lander, 4) and find_mirror(lander._replace(obs=lander.obs * one_leg, next_obs=lander.next_obs * one_leg), 4) is None
    assert find_mirror(lander._replace(rewards=lander.rewards.index_fill(0, torch.tensor([7]), math.nan)), 4) is None


def test_the_mirror_image_of_a_real_episode_is_a_real_episode():
    """Against the environment: the images of actions lead from the images of observations to the images of the next."""
    steps, _ = random_steps_of("CartPole-v1", 5)
    mirror, env = Mirror(4, 2), CartPoleEnv()
    mirror(filled(steps), seek=True)
    image = mirror.image(steps)
    for t in range(300):
        env.reset(seed=0)
        env.state = image.obs[t, 0].double().numpy()
        next_obs, reward, terminated, *_ = env.step(int(image.actions[t, 0]))
        np.testing.assert_allclose(next_obs, image.next_obs[t, 0], atol=1e-5)
        assert reward == image.rewards[t, 0] and terminated == image.terminated[t, 0]
    twice = mirror.image(image)
    assert all(torch.equal(x, y) for x, y in zip(twice, steps)) and not torch.equal(image.obs, steps.obs)


@pytest.mark.parametrize("known", [True, False])
def test_every_episode_has_its_image_beside_it_once_a_mirror_is_found_and_kept(known, monkeypatch):
    rollout, asked = random_rollout(300, 2, 3, seed=4), []
    found = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([2, 1, 0]), torch.tensor([1, 0])
    monkeypatch.setattr(
        world_model, "find_mirror", lambda steps, number: asked.append((len(steps.obs), number)) or (found if known else None)
    )
    mirror, replay = Mirror(3, 2), filled(rollout, holdout=3, newest=250)
    both = mirror(replay, seek=True)
    again = mirror(replay, seek=False)
    assert asked == [(300, 2)]  # when it is no longer sought the policy has had its way
    if not known:
        assert both is replay and again is replay
        return
    monkeypatch.setattr(world_model, "find_mirror", lambda steps, number: None)
    assert mirror(replay, seek=True) is not replay  # what has been found is kept where nothing speaks for another one
    assert both.newest == 250 and both.holdout == 3
    copy = Mirror(3, 2)
    copy.load_state_dict(mirror.state_dict())
    for seen in (both, again, copy(replay, seek=True)):
        steps = seen.steps
        for now, then in zip((*steps, seen.age, seen.held_out), (*replay.steps, replay.age, replay.held_out)):
            assert torch.equal(now[:, :2], then)
        assert torch.equal(seen.age[:, 2:], replay.age) and torch.equal(seen.held_out[:, 2:], replay.held_out)
        for name in ("obs", "next_obs"):
            a, b, c = getattr(rollout, name).unbind(-1)
            assert torch.equal(getattr(steps, name)[:, 2:], torch.stack([c, -b, a], -1))
        assert torch.equal(steps.actions[:, 2:], 1 - rollout.actions)
        for name in ("rewards", "terminated", "truncated"):
            assert torch.equal(getattr(steps, name)[:, 2:], getattr(rollout, name))


# ------------------------------------------------------------------------------------------------- endings and autoencoder


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_shifted_ending_is_calibrated(shift):
    rng = np.random.default_rng(0)
    obs = torch.as_tensor(rng.normal(size=(2000, 4, 1)), dtype=torch.float32)
    ended = torch.as_tensor(rng.random((2000, 4)) < torch.sigmoid(obs[..., 0] - 3).numpy())
    none = torch.zeros(2000, 4)
    replay = filled(Rollout(obs, none.long(), none, obs, ended, none.bool()), holdout=3)
    model = WorldModel(1, 1, ModelSettings(wm_ensemble=2, wm_hidden=4))
    model.heads.forward = lambda x: torch.stack([x[..., 0] * 0, x[..., 0] * 0, x[..., 0] - 3 + shift], -1)
    real = float(ended[~replay.held_out].sum())  # the calibration never sees these
    wrong = [float(model.ending(obs[..., 0] - 3 + shift)[~replay.held_out].sum())]
    calibrate(model, replay)
    wrong.append(float(model.ending(obs[..., 0] - 3 + shift)[~replay.held_out].sum()))
    assert abs(wrong[1] - real) < 0.2 * abs(wrong[0] - real) and abs(wrong[1] - real) < 0.2 * real
    assert model.calibration[1] * shift < 0 and model.calibration[0] > 0


def test_the_autoencoder_knows_its_manifold():
    torch.manual_seed(0)
    net = Autoencoder(3, 2, noise=0.1, hidden=64)

    def curve(number):
        t = torch.rand(number, 2) * 4
        return torch.stack([t.cos(), t.sin(), t - 2], -1)

    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        net.loss(curve(128)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        on, off = net.error(curve(400)), net.error(torch.rand(400, 2, 3) * 4 - 2)
    auc = float((off[:, None] > on[None]).float().mean())
    assert auc > 0.8, auc


# ------------------------------------------------------------------------------------------------------------------ learning


def pendulum_data(T: int = 3000, seed: int = 0) -> Rollout:
    """The oscillator's real steps under random actions, cut every 50 steps, with reward 2 x0 - x1."""
    (A, b), rng = exact_flow(*oscillator()), np.random.default_rng(seed)
    obs, actions, next_obs = np.zeros((T, 1, 3)), rng.integers(2, size=(T, 1)), np.zeros((T, 1, 3))
    for t in range(T):
        obs[t, 0] = rng.normal(size=3) if t % 50 == 0 else next_obs[t - 1, 0]
        next_obs[t, 0] = A[actions[t, 0]] @ obs[t, 0] + b[actions[t, 0]]
    cut = torch.arange(T)[:, None] % 50 == 49
    x = torch.as_tensor(obs, dtype=torch.float32), torch.as_tensor(next_obs, dtype=torch.float32)
    return Rollout(x[0], torch.as_tensor(actions), 2 * x[1][..., 0] - x[1][..., 1], x[1], torch.zeros_like(cut), cut)


@pytest.mark.parametrize("target", ["direct", "delta", "ode"])
def test_every_target_learns_a_linear_system(target):
    torch.manual_seed(0)
    s = ModelSettings(wm_target=target, wm_ensemble=2, wm_hidden=32, wm_lr=3e-3)
    model, replay = WorldModel(3, 2, s), filled(pendulum_data())
    optimizer = torch.optim.AdamW(model.parameters(), s.wm_lr)
    fit(model, optimizer, replay, 1, 256)
    before = error_curve(model, replay, 5, replay.held_out)
    fit(model, optimizer, replay, 400, 256)
    after = error_curve(model, replay, 5, replay.held_out)
    assert after[0] < 0.25 * before[0] and after[4] < 0.25 * before[4], (before, after)


def test_what_is_too_old_does_not_count_where_a_model_is_judged():
    """Two pasts, one present: a model of the newest steps has the same errors, calibration and horizon, whatever came before."""
    past, present = random_rollout(100, 2, 3, seed=1, p=0.05), random_rollout(200, 2, 3, seed=2, p=0.05)
    found = []
    for scale, newest in ((1, 190), (100, 190), (100, 0)):
        torch.manual_seed(0)
        before = past._replace(obs=scale * past.obs, next_obs=scale * past.next_obs, rewards=scale * past.rewards)
        replay = filled(Rollout(*map(torch.cat, zip(before, present))), holdout=3, newest=newest)
        model = WorldModel(3, 2, ModelSettings(wm_ensemble=2, wm_hidden=4))
        calibrate(model, replay)
        horizons = [trusted_horizon(model, replay, limit, 30) for limit in (1.5, 2, 3, 4)]
        found.append([*measure(model, replay, 5).values(), *model.typical.tolist(), *model.calibration.tolist(), *horizons])
    assert found[0] == pytest.approx(found[1]) and found[1][0] != pytest.approx(found[2][0], rel=0.1)


def test_held_out_episodes_are_never_fitted():
    torch.manual_seed(0)
    rollout, s = random_rollout(300, 2, 3, seed=14), ModelSettings(wm_ensemble=2, wm_hidden=4, wm_memory="gru", uncertainty="both")
    replay, model, seen = filled(rollout, holdout=3), WorldModel(3, 2, s), []
    learn = model.loss
    model.loss = lambda steps, valid: seen.append((steps.rewards[-1].flatten(), steps.rewards[valid])) or learn(steps, valid)
    fit(model, torch.optim.AdamW(model.parameters(), 1e-3), replay, 40, 256)
    secret = set(rollout.rewards[replay.held_out].tolist())
    fitted = {x for last, all_valid in seen for part in (last, all_valid) for x in part.tolist()}
    assert len(secret) > 50 and not fitted & secret
    assert len(fitted) > 0.9 * (600 - len(secret))


def test_a_bad_setting_is_told_with_its_bounds():
    cases = [
        (dict(wm_hidden=0), "between 1 and"),
        (dict(wm_lr=math.nan), "between"),
        (dict(wm_target="odd"), "direct, delta, ode"),
        (dict(wm_ensemble=2.5), "whole number"),
        (dict(wm_binary=1), "true or false"),
    ]
    for bad, part in cases:
        with pytest.raises(UsageError, match=part):
            ModelSettings(**bad)


def test_the_same_seed_fits_the_same_model():
    def weights(seed):
        torch.manual_seed(seed)
        model = WorldModel(3, 2, ModelSettings(wm_ensemble=2, wm_hidden=8))
        fit(model, torch.optim.AdamW(model.parameters(), 1e-3), filled(pendulum_data(300)), 10, 64)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_each_fit_lowers_its_learning_rate_to_a_tenth():
    s = ModelSettings(wm_hidden=4, wm_ensemble=2)
    model, replay, rates = WorldModel(3, 2, s), filled(random_rollout(100, 1, 3, seed=5)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    for _ in range(2):
        fit(model, optimizer, replay, 100, 8, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    np.testing.assert_allclose(rates[:100], 1 - 0.009 * np.arange(100))
    assert rates[:100] == rates[100:]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["goes on", "ends", "is cut"]), min_size=2, max_size=60), st.integers(1, 40))
def test_the_share_of_the_latest_steps_whose_episode_ended_is_that_of_counting_them(fates, latest):
    terminated, truncated = (torch.tensor([[fate == name] for fate in fates]) for name in ("ends", "is cut"))
    replay, zeros = Replay(1, 2, 10), torch.zeros(len(fates), 1)
    replay.add(Rollout(torch.zeros(len(fates), 1, 2), zeros.long(), zeros, torch.zeros(len(fates), 1, 2), terminated, truncated))
    counted, episode = [], []
    for fate in fates:  # an episode's steps count once it has ended
        episode.append(False)
        if fate != "goes on":
            counted += [fate == "ends"] * len(episode)
            episode = []
    counted = (counted + episode)[-latest:]
    assert replay.share_ended(latest) == pytest.approx(sum(counted) / len(counted))


def test_rewards_of_late_are_compared_with_those_of_as_many_steps_before():
    replay, flags = Replay(2, 1, 10), torch.zeros(5, 2).bool()
    rewards, obs = torch.arange(10.0).view(5, 2), torch.zeros(5, 2, 1)
    replay.add(Rollout(obs, torch.zeros(5, 2).long(), rewards, obs, flags, flags))
    assert replay.reward_rates(4) == ((2 + 3 + 4 + 5) / 4, (6 + 7 + 8 + 9) / 4)
    assert replay.reward_rates(6) == ((0 + 1 + 2 + 3) / 4, 6.5) and replay.reward_rates(5) == replay.reward_rates(6)
    before, now = replay.reward_rates(10)
    assert math.isnan(before) and now == 4.5


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["goes on", "ends", "is cut"]), st.sampled_from([-3.0, 0.0, 3.0])), min_size=2, max_size=60),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2]),
)
@example(  # the bad ending comes in the step after which the episode would have been left, and no less was returned than by good ones
    [("ends", 0.0), ("goes on", 0.0), ("ends", -3.0), ("goes on", -3.0), ("goes on", 0.0), ("ends", 0.0)], 1, 1
)
@example([("is cut", 0.0)] * 2, 1, 1)  # left, and nothing has ever ended
def test_finished_episodes_are_good_if_their_ending_was_or_they_returned_as_much(steps, limit, repeat):
    steps = steps[: len(steps) // 2 * 2]  # of two environments
    fates, rewards = [[x[i] for x in steps] for i in (0, 1)]
    terminated, truncated = (torch.tensor([fate == name for fate in fates]).view(-1, 2) for name in ("ends", "is cut"))
    replay, obs = Replay(2, 1, 10), torch.zeros(len(steps) // 2, 2, 1)
    replay.add(Rollout(obs, obs[..., 0].long(), torch.tensor(rewards).view(-1, 2), obs, terminated, truncated))
    median, now, found = float(np.sort(rewards)[(len(rewards) - 1) // 2]), [[], []], []
    usual = min(median, median / repeat)
    for i, (fate, reward) in enumerate(steps):
        now[i % 2].append(reward)
        if fate != "goes on":
            found.append((fate, sum(now[i % 2]), len(now[i % 2]), reward))
            now[i % 2] = []
    paid = sorted(returned for fate, returned, _, last in found if fate == "ends" and last >= usual)
    expected = []
    for fate, returned, length, last in found:
        if fate == "ends":
            expected.append(last >= usual)
        elif length == limit:  # left there, and not where another agent began, or the environment's time was up
            expected.append(bool(paid) and returned >= paid[(len(paid) - 1) // 2])
    ever = any(fate == "ends" for fate, *_ in found)
    assert replay.finished(limit, repeat).tolist() == (expected if ever else [])
