"""aihf_sac_mujoco.py: its gradients, its policy and its SAC update against slow references written here.

python -m pytest tests/test_sac_mujoco_math.py      (seconds, and half a minute the first time to compile the update)

Where nothing else is said the numbers are float64 and a tolerance leaves 100 times their rounding error or more.
"""

import inspect
import math
import os
import shutil
import sys

import mujoco_data
import numpy as np
import pytest
import torch
from torch import nn

import aihf_sac_mujoco as aihf

OBS_DIM, ACT_DIM, BATCH = 3, 2, 16
ACTOR, CRITIC = (OBS_DIM, 8, 7, 2 * ACT_DIM), (OBS_DIM + ACT_DIM, 8, 7, 1)  # unequal widths: no transposition passes
GAMMA, TAU = 0.9, 0.05
REWARD, LOW, HIGH, HORIZON = (3, 4, 3, 1), -2.0, 3.0, 20
FORMS = ("discounted", "sum", "mean")


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def parameters(sizes, seed=0, copies=0, scale=1.0):
    return aihf.init_mlp(sizes, np.random.default_rng(seed), copies).double() * scale


def mlp_reward(theta, x):
    return aihf.reward(theta, x, REWARD, LOW, HIGH)


def linear_reward(theta, x):
    return x @ theta


def finite_differences(f, theta, step=1e-6):
    """Central differences: truncation error step² = 1e-12, rounding error 1e-16 f / step = 1e-10 f."""
    steps = step * torch.eye(len(theta), dtype=theta.dtype)
    return torch.stack([(f(theta + s) - f(theta - s)) / (2 * step) for s in steps])


def autograd(f, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0]


# ------------------------------------------------------------------------------------------------ g1: demonstrations
DEMOS = [normal(length, REWARD[0], seed=length) for length in (4, 9, 1)]
ROLLOUTS = [0.5 + normal(length, REWARD[0], seed=100 + length) for length in (2, 13)]


def weighted(trajectories, form):
    lengths = np.array([len(trajectory) for trajectory in trajectories])
    return aihf.Weighted(torch.cat(trajectories), aihf.step_weights(lengths, form, GAMMA, HORIZON).double())


def g1(theta, form, r=mlp_reward, demos=DEMOS, rollouts=ROLLOUTS):
    return aihf.demonstration_gradient(theta, r, weighted(demos, form), weighted(rollouts, form))


def slow_mean_return(theta, trajectories, form, r=mlp_reward):
    """The mean over trajectories of R(τ), step by step from its definition."""
    total = 0.0
    for trajectory in trajectories:
        for t, x in enumerate(trajectory):
            step_reward = r(theta, x[None])[0]
            if form == "discounted":
                total += GAMMA**t * step_reward / len(trajectories)
            elif form == "sum":
                total += step_reward / HORIZON / (1 - GAMMA) / len(trajectories)
            else:
                total += step_reward / len(trajectory) / (1 - GAMMA) / len(trajectories)
    return total


def slow_gap(theta, form, r=mlp_reward):
    return slow_mean_return(theta, DEMOS, form, r) - slow_mean_return(theta, ROLLOUTS, form, r)


# step_weights are float32: relative error 6e-8 of terms that add up to 1 / (1 - gamma) = 10 at most, hence 1e-5.
@pytest.mark.parametrize("form", FORMS)
def test_g1_is_the_gradient_of_the_gap_in_return(form):
    theta = parameters(REWARD)
    expected = autograd(lambda theta: slow_gap(theta, form), theta)
    assert expected.abs().max() > 0.1
    close(g1(theta, form), expected, 1e-5)
    close(g1(theta, form), finite_differences(lambda theta: slow_gap(theta, form), theta), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_weighted_reward_is_the_mean_return(form):
    theta, demos = parameters(REWARD), weighted(DEMOS, form)
    close((demos.weight * mlp_reward(theta, demos.x)).sum(), slow_mean_return(theta, DEMOS, form), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_g1_ascends_what_demonstrations_have_and_rollouts_lack(form):
    demos, rollouts = [torch.tensor([[1.0, 0.0, 1.0]] * 3).double()], [torch.tensor([[0.0, 1.0, 1.0]] * 3).double()]
    gradient = g1(torch.zeros(3).double(), form, linear_reward, demos, rollouts)
    assert gradient[0] > 0.1 and gradient[1] < -0.1 and gradient[2].abs() < 1e-12


def test_g1_is_linear_in_the_reward():
    theta = parameters(REWARD)

    def squared(theta, x):
        return mlp_reward(theta, x) ** 2

    def both(theta, x):
        return 3 * mlp_reward(theta, x) - 2 * squared(theta, x)

    close(g1(theta, "mean", both), 3 * g1(theta, "mean") - 2 * g1(theta, "mean", squared), 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_g1_compares_means_over_trajectories(form):
    theta = parameters(REWARD)
    close(g1(theta, form, demos=DEMOS, rollouts=DEMOS), torch.zeros_like(theta), 1e-12)
    close(g1(theta, form, demos=DEMOS + DEMOS), g1(theta, form), 1e-5)  # float32 weights again
    close(g1(theta, form, demos=ROLLOUTS, rollouts=DEMOS), -g1(theta, form), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_step_weights_have_their_closed_form(form):
    weights = aihf.step_weights(np.array([2, 3]), form, 0.9, 40)
    expected = {
        "discounted": [0.5, 0.45, 0.5, 0.45, 0.405],
        "sum": [0.125] * 5,  # 1 / (40 * 0.1) / 2
        "mean": [2.5] * 2 + [5 / 3] * 3,  # 1 / (2 * 0.1) / 2 and 1 / (3 * 0.1) / 2
    }[form]
    close(weights, torch.tensor(expected), 1e-6)  # float32


@pytest.mark.parametrize("form", FORMS)
def test_endless_trajectories_have_the_same_return_in_every_form(form):
    weights = aihf.step_weights(np.array([3000, 3000]), form, 0.99, 3000)  # 0.99^3000 = 1e-13
    assert weights.double().sum().item() == pytest.approx(100, rel=1e-6)  # 1 / (1 - gamma), in float32 weights


# --------------------------------------------------------------------------------------------------- g2: preferences
PREFERRED, OTHER = normal(5, 4, REWARD[0], seed=1), 0.3 + normal(5, 4, REWARD[0], seed=2)  # (pairs, length, ·)


def test_g2_has_its_closed_form_when_the_reward_is_linear():
    theta = normal(REWARD[0], seed=3)
    expected = torch.zeros_like(theta)
    for w, lo in zip(PREFERRED, OTHER):
        grad_gap = w.sum(0) - lo.sum(0)
        expected += (1 - torch.sigmoid(grad_gap @ theta)) * grad_gap / len(PREFERRED)
    assert expected.abs().max() > 0.1
    close(aihf.preference_gradient(theta, linear_reward, PREFERRED, OTHER), expected, 1e-12)


def test_g2_is_the_gradient_of_the_log_likelihood():
    def log_likelihood(theta):
        total = 0.0
        for w, lo in zip(PREFERRED, OTHER):
            gap = sum(mlp_reward(theta, x[None])[0] for x in w) - sum(mlp_reward(theta, x[None])[0] for x in lo)
            total += torch.log(1 / (1 + torch.exp(-gap))) / len(PREFERRED)
        return total

    theta = parameters(REWARD)
    g2 = aihf.preference_gradient(theta, mlp_reward, PREFERRED, OTHER)
    assert g2.abs().max() > 0.01
    close(g2, autograd(log_likelihood, theta), 1e-12)
    close(g2, finite_differences(log_likelihood, theta), 1e-8)


def test_g2_of_a_segment_against_itself_is_zero():
    theta = parameters(REWARD)
    close(aihf.preference_gradient(theta, mlp_reward, OTHER, OTHER), torch.zeros_like(theta), 1e-12)


def test_g2_stays_finite_when_the_probability_of_a_label_underflows():
    w, lo, theta = torch.ones(1, 2, 1), -torch.ones(1, 2, 1), torch.full((1,), 1000.0)  # R_w - R_l = ±4000, float32
    assert aihf.preference_gradient(theta, linear_reward, w, lo).item() == 0  # certain and right
    assert aihf.preference_gradient(theta, linear_reward, lo, w).item() == -4  # certain and wrong: 1 - σ = 1


# ------------------------------------------------------------------------------------------------------- smoothness
def test_smoothness_gradient_has_its_closed_form_when_the_reward_is_linear():
    x, direction = normal(6, 3), torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    for slope in (0.5, 0.99):
        close(aihf.smoothness_gradient(slope * direction, linear_reward, x), torch.zeros(3).double(), 1e-12)
    for slope in (1.5, 7.0):  # penalty (slope - 1)²; the 1e-12 under the root changes it by 1e-12
        expected = 2 * (slope - 1) * direction
        close(aihf.smoothness_gradient(slope * direction, linear_reward, x), expected, 1e-10)


def test_smoothness_gradient_against_finite_differences():
    def slope(theta, x):
        return autograd(lambda x: mlp_reward(theta, x[None])[0], x).norm()

    def penalty(theta):
        return sum(max(slope(theta, x) - 1, torch.tensor(0.0)) ** 2 for x in points) / len(points)

    points, theta = normal(8, REWARD[0], seed=4), parameters(REWARD, scale=3.0)
    slopes = [slope(theta, x).item() for x in points]
    assert min(slopes) < 1 < max(slopes)  # some points count and some do not
    gradient = aihf.smoothness_gradient(theta, mlp_reward, points)
    assert gradient.abs().max() > 0.01
    close(gradient, finite_differences(penalty, theta), 1e-7)
    flat = points[[s < 1 for s in slopes]]
    close(aihf.smoothness_gradient(theta, mlp_reward, flat), torch.zeros_like(theta), 1e-12)


def test_smoothness_gradient_of_a_constant_reward_is_zero_and_not_nan():
    theta = torch.zeros_like(parameters(REWARD))
    assert torch.equal(aihf.smoothness_gradient(theta, mlp_reward, normal(4, REWARD[0])), theta)


def test_between_draws_points_on_segments():
    demos, rollouts = normal(4, 3, seed=5).float(), 10 + normal(5, 3, seed=6).float()
    points = aihf.between(demos, rollouts, 200, np.random.default_rng(0))
    assert points.shape == (200, 3)
    used, fractions = set(), []
    for point in points.double():
        along = {}  # distance from a segment: (the segment, how far along it)
        for i, demo in enumerate(demos.double()):
            for j, step in enumerate(rollouts.double() - demo):
                fraction = ((point - demo) @ step / (step @ step)).clamp(0, 1)
                along[(point - demo - fraction * step).norm().item()] = (i, j), fraction.item()
        assert min(along) < 1e-5  # float32, coordinates of about 10
        segment, fraction = along[min(along)]
        used.add(segment)
        fractions.append(fraction)
    assert len(used) == 4 * 5
    counts, _ = np.histogram(fractions, bins=4, range=(0, 1))
    assert counts.min() > 25  # uniform: 50 ± 6 in each quarter


@pytest.mark.parametrize("gradient", ["g1", "g2", "smoothness"])
def test_gradients_need_no_grad_mode(gradient):
    def compute(theta):
        if gradient == "g1":
            return g1(theta, "mean")
        if gradient == "g2":
            return aihf.preference_gradient(theta, mlp_reward, PREFERRED, OTHER)
        return aihf.smoothness_gradient(theta, mlp_reward, OTHER[0])

    theta = parameters(REWARD, scale=3.0)
    expected = compute(theta)
    assert expected.abs().max() > 0.01
    torch.set_grad_enabled(False)  # as the script runs, with the leaf that it gives to Adam
    actual = compute(theta.clone().requires_grad_())
    assert not actual.requires_grad
    close(actual, expected, 1e-12)


# ------------------------------------------------------------------------------------------------ reward and networks


@pytest.mark.parametrize("low, high", [(0.0, 4.0), (-10.0, 10.0), (-2.0, 3.0)])
def test_reward_is_bounded_with_slope_one_in_the_middle_and_a_gradient_far_out(low, high):
    identity, middle = torch.tensor([1.0, 0.0], dtype=torch.float64), (low + high) / 2  # one weight, one bias: f(x) = x
    x = torch.tensor([-30.0, -10.0, -1.0, 0.0, 1.0, 10.0, 30.0], dtype=torch.float64, requires_grad=True)
    r = aihf.reward(identity, x[:, None], (1, 1), low, high)
    (slope,) = torch.autograd.grad(r.sum(), x)
    assert r.shape == (7,) and (r > low).all() and (r < high).all() and (slope > 0).all()
    assert r[3].item() == pytest.approx(middle, abs=1e-12)
    assert slope[3].item() == pytest.approx(1) and slope.argmax() == 3
    close(r, middle + (high - low) / 2 * torch.tanh(2 * x / (high - low)), 1e-12)
    x = torch.tensor([-10.0, 10.0], requires_grad=True)
    aihf.reward(identity.float(), x[:, None], (1, 1), low, high).sum().backward()
    assert (x.grad > 1e-6).all()  # in float32 too


def test_reward_takes_any_leading_shape():
    theta = parameters(REWARD)
    segments = mlp_reward(theta, OTHER)
    assert segments.shape == OTHER.shape[:-1]
    close(segments[3, 2], mlp_reward(theta, OTHER[3, 2][None])[0], 1e-12)


def network(params, sizes):
    """Linear and ReLU modules with the numbers of a flat vector: each layer's weight row by row, then its bias."""
    numbers, modules = iter(params.tolist()), []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        for to, count in ((linear.weight.data.T, fan_in * fan_out), (linear.bias.data, fan_out)):
            to.copy_(torch.tensor([next(numbers) for _ in range(count)], dtype=to.dtype).reshape(to.shape))
        modules += [linear, nn.ReLU()]
    assert next(numbers, None) is None
    return nn.Sequential(*modules[:-1])


def flat(module):
    """The flat vector of such a network."""
    linears = [linear for linear in module if isinstance(linear, nn.Linear)]
    return torch.cat([part.detach() for linear in linears for part in (linear.weight.T.flatten(), linear.bias)])


def test_mlp_equals_linear_modules():
    x = normal(BATCH, CRITIC[0])
    one, two = parameters(CRITIC, seed=1), parameters(CRITIC, seed=2, copies=2)
    close(aihf.mlp(one, x, CRITIC), network(one, CRITIC)(x).detach(), 1e-12)
    stacked = torch.stack([network(params, CRITIC)(x).detach() for params in two])
    assert stacked.shape == (2, BATCH, 1)
    close(aihf.mlp(two, x, CRITIC), stacked, 1e-12)


def test_mlp_of_a_stack_takes_an_input_of_its_own_for_each():
    x, two = normal(2, BATCH, CRITIC[0]), parameters(CRITIC, copies=2)
    close(aihf.mlp(two, x, CRITIC), torch.stack([aihf.mlp(two[i], x[i], CRITIC) for i in range(2)]), 1e-12)


def test_layers_are_views_of_tensors_and_of_arrays():
    params = parameters(CRITIC)
    for of_tensor, of_array in zip(aihf.layers(params, CRITIC), aihf.layers(params.numpy(), CRITIC)):
        for tensor, array in zip(of_tensor, of_array):
            assert np.array_equal(tensor.numpy(), array) and np.shares_memory(array, params.numpy())


@pytest.mark.parametrize("copies", [0, 2])
def test_init_mlp_is_uniform_within_linear_modules_bounds(copies):
    sizes = (100, 300, 50, 40)
    params = aihf.init_mlp(sizes, np.random.default_rng(0), copies)
    assert params.dtype == torch.float32
    assert params.shape == (*[copies] * (copies > 0), sum((a + 1) * b for a, b in zip(sizes, sizes[1:])))
    for (weight, bias), fan_in in zip(aihf.layers(params, sizes), sizes):
        bound = 1 / math.sqrt(fan_in)
        assert nn.Linear(fan_in, 10_000).weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        for numbers, spread in ((weight, 0.05), (bias, 0.5)):  # 2,000 weights or more, but 40 biases or more
            assert 0.9 * bound < numbers.abs().max().item() <= bound * (1 + 1e-6)
            assert numbers.std().item() == pytest.approx(bound / math.sqrt(3), rel=spread)
            assert abs(numbers.mean().item()) < spread * bound
    assert len(params.unique()) > 0.98 * params.numel()  # float32 repeats a few; the copies of a stack differ


# --------------------------------------------------------------------------------------------------------- the policy
def constant_policy(mean, log_std):
    """Parameters of a network (1, 2) whose output is (mean, log_std) where obs is 0."""
    return torch.tensor([0.0, 0.0, mean, log_std], dtype=torch.float64)


@pytest.mark.parametrize("mean, std", [(0.0, 0.5), (0.4, 0.3), (-1.2, 0.4)])
def test_log_prob_is_the_log_of_a_density(mean, std):
    action = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    noise = (torch.atanh(action) - mean) / std
    actor, obs = constant_policy(mean, math.log(std)), torch.zeros(len(action), 1).double()
    sampled, log_prob = aihf.sample_action(actor, obs, noise[:, None], (1, 2))
    close(sampled[:, 0], action, 1e-10)
    density = log_prob.exp()
    assert torch.trapezoid(density, action).item() == pytest.approx(1, abs=1e-6)  # grid of 1e-5: error 1e-8
    cumulative = torch.cumulative_trapezoid(density, action)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(noise[1:])  # P(action < a) = Φ((atanh(a) - mean) / std)
    close(cumulative, expected, 1e-6)


def test_log_prob_adds_up_over_action_dimensions():
    actor, obs, noise = parameters(ACTOR), normal(BATCH, OBS_DIM), normal(BATCH, ACT_DIM, seed=1)
    action, log_prob = aihf.sample_action(actor, obs, noise, ACTOR)
    expected_action, expected_log_prob = slow_policy(network(actor, ACTOR), obs, noise)
    assert action.shape == (BATCH, ACT_DIM) and log_prob.shape == (BATCH,)
    close(action, expected_action.detach(), 1e-12)
    close(log_prob, expected_log_prob.detach(), 1e-10)  # the naive log(1 - tanh²) loses a few digits


@pytest.mark.parametrize("u", [-100.0, -20.0, -0.001, 0.0, 3.0, 20.0, 100.0])
def test_log_prob_is_stable_far_out(u):
    actor, zero = constant_policy(u, 0.0).float().requires_grad_(), torch.zeros(1, 1)
    action, log_prob = aihf.sample_action(actor, zero, zero, (1, 2))
    log_det = 2 * math.log(2) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))  # log(1 - tanh²), exact
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - log_det, rel=1e-6, abs=1e-6)
    assert action.abs().item() <= 1
    (gradient,) = torch.autograd.grad(log_prob.sum(), actor)
    assert gradient[2].item() == pytest.approx(2 * math.tanh(u), abs=1e-6)  # -d log(1 - tanh²) / du


@pytest.mark.parametrize("log_std, used", [(-30.0, -20.0), (-1.0, -1.0), (7.0, 2.0)])
def test_log_std_is_clipped(log_std, used):
    noise, zero = torch.tensor([[0.5]]).double(), torch.zeros(1, 1).double()
    expected = math.tanh(0.2 + 0.5 * math.exp(used))
    actor = constant_policy(0.2, log_std)
    action, _ = aihf.sample_action(actor, zero, noise, (1, 2))
    assert action.item() == pytest.approx(expected, rel=1e-12)
    in_numpy = aihf.act(aihf.layers(actor.float().numpy(), (1, 2)), np.zeros(1), noise[0].numpy())
    assert in_numpy.item() == pytest.approx(expected, rel=1e-6)


def test_act_equals_sample_action():
    actor, obs, noise = parameters(ACTOR).float(), normal(BATCH, OBS_DIM), normal(BATCH, ACT_DIM, seed=1).float()
    actor_layers = aihf.layers(actor.numpy(), ACTOR)
    expected, _ = aihf.sample_action(actor, obs.float(), noise, ACTOR)
    for i in range(BATCH):  # float32, sums in another order
        action = aihf.act(actor_layers, obs[i].numpy(), noise[i].numpy())
        assert action.dtype == np.float32
        close(torch.from_numpy(action), expected[i], 1e-6)


def test_act_without_noise_is_the_mode():
    actor, obs = parameters(ACTOR), normal(OBS_DIM)
    action = aihf.act(aihf.layers(actor.float().numpy(), ACTOR), obs.numpy(), 0.0)
    close(torch.from_numpy(action).double(), torch.tanh(network(actor, ACTOR)(obs)[:ACT_DIM]).detach(), 1e-6)


# ---------------------------------------------------------------------------------------------------------------- SAC
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_equals_torch_optim(dtype, tolerance):
    """float32: 1 - 0.999^n has a relative error of 6e-5 at n = 1, so a step one of 3e-5 of the learning rate."""
    param, learning_rate = normal(50).to(dtype), 0.01
    m, v, updates = torch.zeros_like(param), torch.zeros_like(param), torch.tensor(0.0, dtype=dtype)
    expected = param.clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=learning_rate)
    for step in range(20):
        gradient = (normal(50, seed=step) * 10.0 ** (step % 5 - 3)).to(dtype)
        gradient[:3] = torch.tensor([0.0, 1e-9, 1e4])  # what never moves, what epsilon holds back, what is huge
        updates += 1
        aihf.adam_(param, gradient, m, v, updates, learning_rate)
        expected.grad = gradient
        optimizer.step()
        close(param, expected.detach(), tolerance)


def test_init_sac_starts_targets_at_critics_and_shares_no_memory():
    sac = aihf.init_sac(ACTOR, CRITIC, 0.2, np.random.default_rng(0), "cpu")
    assert torch.equal(sac.targets, sac.critics) and not torch.equal(sac.critics[0], sac.critics[1])
    assert sac.log_beta.exp().item() == pytest.approx(0.2)
    assert len({tensor.untyped_storage().data_ptr() for tensor in sac}) == len(sac)  # updates are in place
    for name in ("actor", "critics", "log_beta"):
        for moment in (getattr(sac, f"{name}_m"), getattr(sac, f"{name}_v")):
            assert moment.shape == getattr(sac, name).shape and not moment.any()
    assert sac.updates.item() == 0


def new_sac(beta=0.3, seed=0, dtype=torch.float64):
    sac = aihf.init_sac(ACTOR, CRITIC, beta, np.random.default_rng(seed), "cpu")
    return aihf.SAC(*(tensor.to(dtype) for tensor in sac))._replace(targets=parameters(CRITIC, 9, 2).to(dtype))


def new_update(auto_beta=True, target_entropy=-float(ACT_DIM)):
    return aihf.make_sac_update(ACTOR, CRITIC, GAMMA, TAU, auto_beta, target_entropy)


def new_batch(seed=0, terminated=None):
    obs, next_obs = normal(BATCH, OBS_DIM, seed=10 * seed), normal(BATCH, OBS_DIM, seed=10 * seed + 1)
    action, reward = torch.tanh(normal(BATCH, ACT_DIM, seed=10 * seed + 2)), normal(BATCH, seed=10 * seed + 3)
    ends = (torch.arange(BATCH) % 3 == 0).double() if terminated is None else torch.full((BATCH,), terminated).double()
    learning_rate = torch.tensor(1e-3 / (1 + seed), dtype=torch.float64)  # of this update: it is annealed
    return learning_rate, obs, action, reward, next_obs, ends, normal(2, BATCH, ACT_DIM, seed=10 * seed + 4)


def slow_policy(actor, obs, noise):
    mean, log_std = actor(obs).split(ACT_DIM, dim=-1)
    std = log_std.clamp(-20, 2).exp()
    u = mean + std * noise
    log_prob = torch.distributions.Normal(mean, std).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)
    return torch.tanh(u), log_prob.sum(-1)


def slow_sac(sac, batches, auto_beta, target_entropy=-float(ACT_DIM)):
    """SAC with modules, autograd and torch.optim: the losses of each update, and what they leave of sac."""
    actor, log_beta = network(sac.actor, ACTOR), sac.log_beta.clone().requires_grad_()
    critics, targets = ([network(params, CRITIC) for params in stack] for stack in (sac.critics, sac.targets))
    critic_optimizer = torch.optim.Adam([p for critic in critics for p in critic.parameters()])
    actor_optimizer = torch.optim.Adam(actor.parameters())
    beta_optimizer = torch.optim.Adam([log_beta])
    all_losses = []
    for learning_rate, obs, action, reward, next_obs, terminated, noise in batches:
        for optimizer in (critic_optimizer, actor_optimizer, beta_optimizer):
            optimizer.param_groups[0]["lr"] = learning_rate.item()
        beta = math.exp(log_beta.item())
        with torch.no_grad():
            next_action, next_log_prob = slow_policy(actor, next_obs, noise[0])
            next_q1, next_q2 = (target(torch.cat([next_obs, next_action], -1))[:, 0] for target in targets)
            future = GAMMA * (torch.minimum(next_q1, next_q2) - beta * next_log_prob)
            backup = torch.where(terminated == 1, reward, reward + future)
        q1, q2 = (critic(torch.cat([obs, action], -1))[:, 0] for critic in critics)
        q_loss = nn.functional.mse_loss(q1, backup) + nn.functional.mse_loss(q2, backup)
        critic_optimizer.zero_grad()
        q_loss.backward()
        critic_optimizer.step()

        new_action, log_prob = slow_policy(actor, obs, noise[1])
        new_q1, new_q2 = (critic(torch.cat([obs, new_action], -1))[:, 0] for critic in critics)
        policy_loss = (beta * log_prob - torch.minimum(new_q1, new_q2)).mean()
        actor_optimizer.zero_grad()
        policy_loss.backward()
        actor_optimizer.step()

        if auto_beta:
            beta_optimizer.zero_grad()
            (-log_beta * (log_prob.detach() + target_entropy).mean()).backward()
            beta_optimizer.step()
        with torch.no_grad():
            for critic, target in zip(critics, targets):
                for p, target_p in zip(critic.parameters(), target.parameters()):
                    target_p.copy_((1 - TAU) * target_p + TAU * p)
        all_losses.append(torch.stack([q_loss, policy_loss, -log_prob.mean(), (q1.mean() + q2.mean()) / 2]).detach())
    learned = {"actor": flat(actor), "log_beta": log_beta.detach()}
    return all_losses, learned | {
        "critics": torch.stack([flat(c) for c in critics]),
        "targets": torch.stack([flat(t) for t in targets]),
    }


# Adam divides by the size of a gradient and so magnifies the error of one close to 0, hence 1e-8.
@pytest.mark.parametrize("auto_beta", [True, False])
@pytest.mark.parametrize("updates", [1, 8])
def test_update_equals_a_slow_sac(updates, auto_beta):
    sac, batches = new_sac(), [new_batch(seed) for seed in range(updates)]
    before = aihf.SAC(*(tensor.clone() for tensor in sac))
    expected_losses, expected = slow_sac(sac, batches, auto_beta)
    update = new_update(auto_beta)
    for batch, losses in zip(batches, expected_losses):
        close(update(sac, *batch), losses, 1e-8)
    for name, value in expected.items():
        close(getattr(sac, name), value, 1e-8)
        assert torch.equal(getattr(sac, name), getattr(before, name)) == (name == "log_beta" and not auto_beta)
    assert sac.updates.item() == updates


@pytest.mark.parametrize("target_entropy, change", [(100.0, 1e-3), (-100.0, -1e-3)])
def test_beta_rises_when_the_entropy_is_below_its_target(target_entropy, change):
    sac = new_sac()
    before = sac.log_beta.item()
    new_update(target_entropy=target_entropy)(sac, *new_batch())
    assert sac.log_beta.item() - before == pytest.approx(change, rel=1e-6)  # Adam's first step is the learning rate


def slow_q_loss(sac, obs, action, backup):
    q1, q2 = (network(params, CRITIC)(torch.cat([obs, action], -1))[:, 0] for params in sac.critics)
    return ((q1 - backup) ** 2 + (q2 - backup) ** 2).mean().item()


def test_backup_of_a_termination_is_the_reward_alone():
    learning_rate, obs, action, reward, next_obs, ends, noise = new_batch(terminated=1)
    expected = slow_q_loss(new_sac(), obs, action, reward)
    for next_obs in (next_obs, 5 - next_obs):  # where it ended does not matter
        q_loss = new_update()(new_sac(), learning_rate, obs, action, reward, next_obs, ends, noise)[0]
        assert q_loss.item() == pytest.approx(expected, rel=1e-10)


def test_backup_goes_on_past_a_truncation():
    # A truncated step is stored as this one.
    learning_rate, obs, action, reward, next_obs, ends, noise = new_batch(terminated=0)
    sac = new_sac()
    next_action, log_prob = slow_policy(network(sac.actor, ACTOR), next_obs, noise[0])
    next_q = [network(params, CRITIC)(torch.cat([next_obs, next_action], -1))[:, 0] for params in sac.targets]
    backup = reward + GAMMA * (torch.minimum(*next_q) - 0.3 * log_prob)
    expected = slow_q_loss(sac, obs, action, backup)
    assert abs(expected - slow_q_loss(sac, obs, action, reward)) > 0.01
    q_loss = new_update()(sac, learning_rate, obs, action, reward, next_obs, ends, noise)[0]
    assert q_loss.item() == pytest.approx(expected, rel=1e-6)  # new_sac's beta was made in float32


def test_replay_returns_the_rows_it_was_given():
    replay, rng = aihf.Replay(50, (OBS_DIM, ACT_DIM, OBS_DIM, 1)), np.random.default_rng(0)
    for step in range(20):  # 30 rows stay empty; the fields of a row are known from its number
        replay.add(np.full(OBS_DIM, step), np.full(ACT_DIM, step + 100), np.full(OBS_DIM, step + 200), step % 2 == 0)
    obs, action, next_obs, terminated = replay.sample(8, 40, rng, "cpu")
    assert (obs.shape, action.shape, next_obs.shape, terminated.shape) == (
        (8, 40, 3),
        (8, 40, 2),
        (8, 40, 3),
        (8, 40, 1),
    )
    step = obs[..., :1]
    assert set(step.flatten().tolist()) == set(range(20))
    assert (obs == step).all() and (action == step + 100).all() and (next_obs == step + 200).all()
    assert torch.equal(terminated, 1 - step % 2)
    assert (step.mean((1, 2)) - 9.5).abs().max() < 3  # each of the batches is a draw from all: 9.5 ± 0.9
    assert not torch.equal(step[0], step[1])
    assert all(field.is_contiguous() and field.dtype == torch.float32 for field in (obs, action, next_obs, terminated))


COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")
def test_compiled_update_equals_the_eager_one():
    """float32, sums in another order: Adam makes that a good part of its step, 1e-3, where a gradient is close to 0."""
    torch.set_grad_enabled(False)  # as the script runs
    eager_sac, compiled_sac = new_sac(dtype=torch.float32), new_sac(dtype=torch.float32)
    eager = new_update()
    compiled = aihf.compile_update(eager, compiled_sac, OBS_DIM, ACT_DIM, BATCH)
    assert compiled is not eager  # it did not fall back
    for one, other in zip(eager_sac, compiled_sac):
        assert torch.equal(one, other)  # the warm-up works on copies
    for seed in range(6):
        batch = [tensor.float() for tensor in new_batch(seed)]
        close(compiled(compiled_sac, *batch), eager(eager_sac, *batch), 1e-4)
    for name, one, other in zip(aihf.SAC._fields, eager_sac, compiled_sac):
        if not name.endswith(("_m", "_v")):
            close(other, one, 1e-4)
    assert compiled_sac.updates.item() == 6


def test_update_stays_eager_where_it_cannot_be_compiled(monkeypatch, capsys):
    def broken_compile(update, **kwargs):
        def compiled(*args):
            raise RuntimeError("no compiler\nand a long traceback")

        return compiled

    monkeypatch.setattr(torch, "compile", broken_compile)
    eager, sac = new_update(), new_sac(dtype=torch.float32)
    assert aihf.compile_update(eager, sac, OBS_DIM, ACT_DIM, BATCH) is eager
    printed = capsys.readouterr().out
    assert "torch.compile failed (no compiler)" in printed and "long traceback" not in printed


# -------------------------------------------------------------------------------------------------- repeated on purpose
MAY_DIFFER = {"Args", "check_args", "make_env", "play"}


def defined_in(module):
    members = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return {name for name, value in members if value.__module__ == module.__name__}


def test_what_the_two_scripts_repeat_is_letter_identical():
    shared = defined_in(aihf) & defined_in(mujoco_data)
    assert shared >= {"make_sac_update", "compile_update", "sample_action", "act", "mlp", "Replay", "SAC", "fail"}
    differ = {
        name
        for name in shared
        if inspect.getsource(getattr(aihf, name)) != inspect.getsource(getattr(mujoco_data, name))
    }
    assert differ <= MAY_DIFFER
    for name in ("LOG_STD_MIN", "LOG_STD_MAX", "BLOCK"):
        assert getattr(aihf, name) == getattr(mujoco_data, name)
