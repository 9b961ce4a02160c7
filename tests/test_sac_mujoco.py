"""aihf_sac_mujoco.py: its equations, its whole loop against a slow reference, and runs as a user's.

Where nothing else is said the numbers are float64 and a tolerance leaves 100 times their rounding
error or more.
"""

import copy
import math
import os
import shutil
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import slow_robot as slow
import torch
import tyro
from helpers import compare_checkpoints, load, make_robot_data, run_script
from slow_robot import close
from torch import nn

import aihf_sac_mujoco as aihf


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_robot_data(tmp_path_factory.mktemp("data") / "drift", seed=0)


OBS_DIM, ACT_DIM, HIDDEN, BATCH, GAMMA, TAU = 3, 2, (8, 7), 16, 0.9, 0.05
FORMS = ("discounted", "mean")
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 robots


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def autograd(value, theta):
    return torch.autograd.grad(value, list(theta), retain_graph=True)


class Linear(nn.Module):
    """r(x) = θ·x"""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(theta, dtype=torch.float64))

    def forward(self, x):
        return x @ self.theta


def new_reward(scale=1.0, bounds=(-2.0, 3.0)):
    """A float64 reward of features (..., 3)."""
    torch.manual_seed(1)
    reward = aihf.Reward(normal(50, 2).numpy(), 1, (4, 3), bounds).double()
    for parameter in reward.parameters():
        parameter.data *= scale
    return reward


def finite_differences(f, parameters, step=1e-6):
    """Central differences: truncation error step² = 1e-12, rounding error 1e-16 f / step."""
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients):
        for index in np.ndindex(*parameter.shape):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * step
                values.append(f().item())
                with torch.no_grad():
                    parameter[index] -= sign * step
            gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradients


# ------------------------------------------------------------------------------------ equations
DEMOS = [normal(length, 3, seed=length) for length in (4, 9, 1)]
ROLLOUTS = [0.5 + normal(length, 3, seed=100 + length) for length in (2, 13)]


def weighted(trajectories, form):
    lengths = torch.tensor([len(trajectory) for trajectory in trajectories])
    return torch.cat(trajectories), aihf.step_weights(lengths, form, GAMMA).double()


def slow_mean_return(reward, trajectories, form, gamma=GAMMA):
    """The mean over trajectories of R(τ), from its definition."""
    total = 0.0
    for x in trajectories:
        weights = [
            gamma**t if form == "discounted" else 1 / len(x) / (1 - gamma) for t in range(len(x))
        ]
        total = total + torch.tensor(weights).double() @ reward(x) / len(trajectories)
    return total


@pytest.mark.parametrize("form", FORMS)
def test_step_weights_have_their_closed_form(form):
    weights = aihf.step_weights(torch.tensor([2, 3]), form, 0.9)
    expected = {"discounted": [0.5, 0.45, 0.5, 0.45, 0.405], "mean": [2.5] * 2 + [5 / 3] * 3}[form]
    close(weights, torch.tensor(expected), 1e-6)  # float32
    endless = aihf.step_weights(torch.tensor([3000, 3000]), form, 0.99)  # 0.99^3000 = 1e-13
    assert endless.double().sum().item() == pytest.approx(100, rel=1e-6)  # 1 / (1 - gamma)


# step_weights are float32: relative error 6e-8 of terms that add up to at most 10, hence 1e-5.
@pytest.mark.parametrize("form", FORMS)
def test_gap_and_its_gradient_g1(form):
    """Lemma 5.1: g1 = mean over demonstrations of ∇R(τ) - mean over rollouts of ∇R(τ')."""
    reward = new_reward()
    demos, rollouts = weighted(DEMOS, form), weighted(ROLLOUTS, form)

    def slow_gap():
        returns = [slow_mean_return(reward, side, form) for side in (DEMOS, ROLLOUTS)]
        return returns[0] - returns[1]

    gap = aihf.demonstration_gap(reward, demos, rollouts)
    close(gap, slow_gap(), 1e-5)
    g1 = autograd(gap, reward.parameters())
    assert max(gradient.abs().max() for gradient in g1) > 0.1
    for gradient, its in zip(g1, autograd(slow_gap(), reward.parameters()), strict=True):
        close(gradient, its, 1e-5)
    close(aihf.demonstration_gap(reward, demos, demos).item(), 0.0, 1e-12)
    close(aihf.demonstration_gap(reward, rollouts, demos), -gap, 1e-12)
    close(aihf.demonstration_gap(reward, weighted(DEMOS * 2, form), rollouts), gap, 1e-5)


PREFERRED, OTHER = normal(5, 4, 3, seed=1), 0.3 + normal(5, 4, 3, seed=2)  # (pairs, steps, ·)


def test_preference_likelihood_and_its_gradient_g2():
    """(27): g2 = mean (1 - σ(R_w - R_l)) ∇(R_w - R_l)."""
    linear = Linear(normal(3, seed=3))
    expected, likelihood = torch.zeros(3).double(), 0.0
    for w, lost in zip(PREFERRED, OTHER):
        difference = w.sum(0) - lost.sum(0)
        probability = 1 / (1 + torch.exp(-difference @ linear.theta.detach()))
        expected += (1 - probability) * difference / len(PREFERRED)
        likelihood += math.log(probability) / len(PREFERRED)
    value = aihf.preference_log_likelihood(linear, PREFERRED, OTHER, 1.0)
    assert value.item() == pytest.approx(likelihood, rel=1e-12) and expected.abs().max() > 0.1
    close(autograd(value, [linear.theta])[0], expected, 1e-12)
    warm = aihf.preference_log_likelihood(linear, PREFERRED, OTHER, 2.5)  # (R_w - R_l) / 2.5
    half = aihf.preference_log_likelihood(Linear(linear.theta.detach() / 2.5), PREFERRED, OTHER, 1)
    assert warm.item() == pytest.approx(half.item(), rel=1e-12) != value.item()

    equal = aihf.preference_log_likelihood(new_reward(), OTHER, OTHER, 1.0).item()
    assert equal == pytest.approx(-math.log(2))


def test_preference_likelihood_is_finite_when_a_probability_underflows():
    w, lost, linear = torch.ones(1, 2, 1), -torch.ones(1, 2, 1), Linear([1000.0]).float()
    for sides, gradient in (((w, lost), 0.0), ((lost, w), -4.0)):  # certain and right, or wrong
        value = aihf.preference_log_likelihood(linear, *sides, 1.0)
        assert value.item() == (0 if gradient == 0 else -4000)
        assert autograd(value, [linear.theta])[0].item() == gradient


def test_slope_penalty():
    x, direction = normal(6, 3), torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    for slope in (0.0, 0.5, 0.99, 1.5, 7.0):  # the 1e-12 under the root is seen nowhere
        linear = Linear(slope * direction)
        penalty = aihf.slope_penalty(linear, x)
        assert penalty.item() == pytest.approx(max(slope - 1, 0) ** 2, abs=1e-9)
        expected = 2 * max(slope - 1, 0) * direction
        close(autograd(penalty, [linear.theta])[0], expected, 1e-9)

    reward, points = new_reward(scale=3.0), normal(8, 3, seed=4)

    def slopes():
        x = points.clone().requires_grad_()
        return torch.autograd.grad(reward(x).sum(), x)[0].norm(dim=-1)

    def slow():
        return sum(max(slope - 1, 0) ** 2 for slope in slopes()) / len(points)

    assert slopes().min() < 1 < slopes().max()  # some points count and some do not
    penalty = aihf.slope_penalty(reward, points)
    assert penalty.item() == pytest.approx(slow().item(), rel=1e-9)
    parameters = list(reward.net[0].parameters())
    gradients = zip(autograd(penalty, parameters), finite_differences(slow, parameters))
    for gradient, difference in gradients:
        close(gradient, difference, 1e-6)


@pytest.mark.parametrize("low, high", [(0.0, 4.0), (-10.0, 10.0), (-2.0, 3.0)])
def test_reward_is_bounded_with_slope_one_in_the_middle_and_a_gradient_far_out(low, high):
    reward = aihf.Reward(np.zeros((2, 0)), 1, (), (low, high)).double()  # f(x) = x
    nn.init.ones_(reward.net[0].weight), nn.init.zeros_(reward.net[0].bias)
    x = torch.tensor([-30.0, -10.0, -1.0, 0.0, 1.0, 10.0, 30.0]).double().requires_grad_()
    r = reward(x[:, None])
    (slope,) = torch.autograd.grad(r.sum(), x)
    assert r.shape == (7,) and (r > low).all() and (r < high).all() and (slope > 0).all()
    assert slope[3].item() == pytest.approx(1) and slope.argmax() == 3
    close(r, (low + high) / 2 + (high - low) / 2 * torch.tanh(2 * x / (high - low)), 1e-12)
    x = torch.tensor([-10.0, 10.0], requires_grad=True)
    reward.float()(x[:, None]).sum().backward()
    assert (x.grad > 1e-6).all()  # in float32 too


def test_reward_features():
    """Standard deviations from the mean, clipped; 1 for a constant; actions as they are."""
    obs = np.float32([[1, 5, 0, -0.0005], [3, 5, 4e-3, 0.0005]])  # std 1, 0, 2e-3, 5e-4
    reward = aihf.Reward(obs, 2, (4,), (0.0, 1.0))
    x = reward.features(np.float32([[4, 7, 4e-3, 1], [90, -90, 0, 2]]), torch.ones(2, 2))
    close(x, torch.tensor([[2.0, 2, 1, 1, 1, 1], [10, -10, -1, 2, 1, 1]]), 1e-4)
    assert reward(x[None, None]).shape == (1, 1, 2)
    assert reward.state_dict().keys() >= {"obs_mean", "obs_std"}  # saved with the network


# ------------------------------------------------------------------------------------ the policy
def constant_actor(mean, log_std):
    actor = aihf.Actor(1, 1, ()).double()
    actor.net[0].weight.data.zero_()
    actor.net[0].bias.data[:] = torch.tensor([mean, log_std], dtype=torch.float64)
    return actor


@pytest.mark.parametrize("u", [-100.0, -20.0, -0.001, 0.0, 3.0, 20.0, 100.0])
def test_log_prob_is_stable_far_out(u):
    actor, zero = constant_actor(u, 0.0).float(), torch.zeros(1, 1)
    action, log_prob = actor(zero, zero)
    log_det = 2 * math.log(2) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))
    expected = -0.5 * math.log(2 * math.pi) - log_det
    assert log_prob.item() == pytest.approx(expected, rel=1e-6, abs=1e-6) and action.abs() <= 1
    gradient = autograd(log_prob.sum(), [actor.net[0].bias])[0][0].item()
    assert gradient == pytest.approx(2 * math.tanh(u), abs=1e-6)  # -d log(1 - tanh²) / du


@pytest.mark.parametrize("log_std, used", [(-30.0, -20.0), (-1.0, -1.0), (7.0, 2.0)])
def test_log_std_is_clipped(log_std, used):
    actor, zero, noise = constant_actor(0.25, log_std), torch.zeros(1, 1), torch.tensor([[0.5]])
    expected = math.tanh(0.25 + 0.5 * math.exp(used))
    assert actor(zero.double(), noise.double())[0].item() == pytest.approx(expected, rel=1e-9)
    action = actor.float().act(np.zeros(1), np.float32([0.5]))
    assert action.item() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------- SAC
def new_sac():
    torch.manual_seed(0)
    actor, critics = aihf.Actor(OBS_DIM, ACT_DIM, HIDDEN), aihf.Critics(OBS_DIM, ACT_DIM, HIDDEN)
    return actor, critics, aihf.init_sac(actor, critics, 0.3)


def new_batch(seed):
    sizes = enumerate((OBS_DIM, ACT_DIM, OBS_DIM))
    obs, action, next_obs = (normal(BATCH, n, seed=10 * seed + i) for i, n in sizes)
    ends = torch.arange(BATCH) % 3 == 0
    noise, reward = normal(2, BATCH, ACT_DIM, seed=10 * seed + 4), normal(BATCH, seed=10 * seed + 3)
    learning_rate = torch.tensor(1e-3 / (1 + seed)).double()  # of this update: it is annealed
    return learning_rate, obs, action.tanh(), reward, next_obs, ends.double(), noise


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_equals_torch_optim(dtype, tolerance):
    """float32: 1 - 0.999^n has a relative error of 6e-5 at n = 1, a step one of 3e-5."""
    zeros = {name: {"x": torch.zeros(50, dtype=dtype)} for name in ("net_mean", "net_square")}
    sac = zeros | {"net": {"x": normal(50).to(dtype)}, "updates": {"count": torch.tensor(0.0)}}
    sac["updates"]["count"] = sac["updates"]["count"].to(dtype)
    expected = sac["net"]["x"].clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=0.01)
    for step in range(20):
        gradient = (normal(50, seed=step) * 10.0 ** (step % 5 - 3)).to(dtype)
        gradient[:3] = torch.tensor([0.0, 1e-9, 1e4])  # never moves; epsilon holds it back; huge
        sac["updates"]["count"] += 1
        aihf.adam_(sac, "net", {"x": gradient}, torch.tensor(0.01, dtype=dtype))
        expected.grad = gradient
        optimizer.step()
        close(sac["net"]["x"], expected.detach(), tolerance)


COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")
def test_compiled_update_equals_the_eager_one():
    """float32, sums in another order: Adam makes that a part of its step, 1e-3, near gradient 0.
    A second update in the same process has its own constants."""
    for tau in (10 * TAU, TAU):
        (actor, critics, eager_sac), (*_, compiled_sac) = (new_sac() for _ in "12")
        eager = aihf.make_sac_update(actor, critics, GAMMA, tau, -ACT_DIM)
        compiled = aihf.compile_update(eager, compiled_sac, OBS_DIM, ACT_DIM, BATCH)
        assert compiled is not eager  # it did not fall back
        assert not compare_checkpoints(eager_sac, compiled_sac)  # the warm-up works on copies
        for seed in range(6):
            batch = [tensor.float() for tensor in new_batch(seed)]
            close(compiled(compiled_sac, *batch), eager(eager_sac, *batch), 1e-4)
        for name, value in helpers.leaves(compiled_sac).items():
            if "_" not in name:
                close(value, helpers.leaves(eager_sac)[name], 1e-4, name)


# --------------------------------------------- the whole loop against a slow reference in float64
LOOP = """--env helpers:Drift-v0 --seed 4 --total-timesteps 72 --policy-steps-per-iteration 28
--learning-starts 20 --rollout-steps-per-iteration 30 --batch-size 8 --hidden 8 7 --segment-length 4
--reward-updates-per-iteration 3 --preference-batch-size 6 --demo-weight 0.7 --preference-weight 1.6
--preference-temperature 1.7 --demo-batch-size 40 --gradient-penalty 3 --rollout-memory 2
--reward-learning-rate 0.02 --reward-range 0 3 --gamma 0.9 --tau 0.05 --eval-every 2
--eval-episodes 3 --checkpoint-every 1 --demos-in-replay True --no-compile --no-cuda"""
BLOCK, POINTS = 20, 50  # in the place of the script's constants
TOLERANCE = 2e-5  # relative and absolute


def slow_aihf(a: aihf.Args, folder: Path):
    """Algorithm 1, a state after each iteration; the script's random numbers in its order."""

    torch.manual_seed(a.seed)
    actor = slow.network(3, *a.hidden, 4)
    *critics, net = (slow.network(5, *a.hidden, 1) for _ in range(3))
    for p in net.parameters():
        p.data *= slow.SCALE
    auto = a.entropy_coefficient is None
    beta = 1.0 if auto else a.entropy_coefficient
    sac = slow.SAC(actor, critics, beta, auto, a.gamma, a.tau)
    adam = torch.optim.Adam(net.parameters())
    rng, robot = np.random.default_rng(a.seed), slow.Robot()
    used = (["high"] if a.demo_weight else []) + (["medium", "low"] if a.preference_weight else [])
    tiers = {tier: slow.episodes(folder / f"{tier}.npz") for tier in used}
    r = slow.Reward(net, tiers, a.reward_range)
    features = r.features

    def mean_return(policies):
        """The mean of R(τ) over policies' trajectories, each policy alike, by steps drawn."""
        weights = []
        for trajectories in policies:
            for length in map(len, trajectories):
                mean = [1 / length / (1 - a.gamma)] * length
                discounted = [a.gamma**t for t in range(length)]
                of_steps = np.array(mean if a.return_form == "mean" else discounted)
                weights.append(of_steps / len(trajectories) / len(policies))
        x, weights = torch.cat([x for one in policies for x in one]), np.concatenate(weights)
        index = rng.choice(len(x), a.demo_batch_size, p=weights / weights.sum())
        return weights.sum() * r(x[index]).mean()

    demos = [features(*episode) for episode in tiers.get("high", [])]
    anchors = torch.cat(
        [features(*e) for tier in used[:1] if demos for e in tiers[tier]]
        or [features(*e) for tier in used for e in tiers[tier]]
    )
    pairs = slow.pairs(folder, tiers, features, a.segment_length) if a.preference_weight else []

    memory, policies_of_blocks, step, env_steps, iteration = [], [], 0, 0, 0
    demos_too = a.demos_in_replay and a.demo_weight
    replay = slow.transitions(folder / "high.npz") if demos_too else []
    known = len(replay)
    while step < a.total_timesteps:
        left = 1 - step / a.total_timesteps if a.anneal else 1
        losses = slow.iterate(a, sac, r, rng, replay, known, policies_of_blocks, BLOCK)
        first, step = step, len(replay) - known

        seeds = rng.integers(2**31, size=a.rollout_steps_per_iteration)  # SAMPLE
        fresh = []
        while sum(len(episode[0]) for episode in fresh) < a.rollout_steps_per_iteration:
            draw = lambda: rng.standard_normal(2, np.float32)  # noqa: E731
            fresh.append(robot.episode(actor, seeds[len(fresh)], draw)[:2])
        memory = (memory + [fresh])[-a.rollout_memory :]
        policies = [[features(*episode) for episode in one] for one in memory]

        adam.param_groups[0]["lr"] = a.reward_learning_rate * left  # UPPER LEVEL
        steepest = 0.0
        for _ in range(a.reward_updates_per_iteration):
            loss = 0.0
            if a.demo_weight:
                loss = loss - a.demo_weight * (mean_return([demos]) - mean_return(policies))
            if a.preference_weight:
                for i in rng.integers(len(pairs), size=a.preference_batch_size):
                    margin = r(pairs[i][0]).sum() - r(pairs[i][1]).sum()
                    margin = margin / a.preference_temperature
                    likelihood = -torch.log(1 + torch.exp(-margin)) / a.preference_batch_size
                    loss = loss - a.preference_weight * likelihood
            x_policy = torch.cat([x for one in policies for x in one])
            i, j = (
                rng.integers(len(anchors), size=POINTS),
                rng.integers(len(x_policy), size=POINTS),
            )
            share = torch.from_numpy(rng.random((POINTS, 1), np.float32)).double()
            x = ((1 - share) * anchors[i] + share * x_policy[j]).requires_grad_()
            slope = torch.autograd.grad(r(x).sum(), x, create_graph=True)[0].norm(dim=-1)
            excess = torch.where(slope > 1, slope - 1, torch.zeros_like(slope))
            loss = loss + a.gradient_penalty * (excess**2).mean()
            steepest = max(steepest, slope.max().item())
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert steepest > 1.1 or not a.gradient_penalty  # the penalty is at work

        iteration, fresh_steps = iteration + 1, sum(len(episode[0]) for episode in fresh)  # LOG
        env_steps += step - first + fresh_steps
        row = {"charts/iteration": iteration, "charts/sac_steps": step}
        fell = [ended for *_, ended in replay[known:][first:]]
        row["charts/env_steps"] = env_steps
        row |= {"charts/fall_rate": sum(fell) / len(fell)} if first >= a.learning_starts else {}
        row |= {"charts/SPS": (step - first) / 2, "charts/wall_seconds": 4.0 * iteration}
        names = "q policy entropy q_mean beta".split()
        row |= {f"losses/{name}": loss for name, loss in zip(names, losses)}
        with torch.no_grad():
            r_policy = r(torch.cat([features(*episode) for episode in fresh]))
            row |= {"reward/policy": r_policy.mean()}
            if demos:
                row["reward/demonstrations"] = r(torch.cat(demos)).mean()
                row["reward/gap"] = row["reward/demonstrations"] - row["reward/policy"]
            if pairs:
                margins = torch.stack([r(w).sum() - r(lost).sum() for w, lost in pairs])
                row["reward/preference_accuracy"] = (margins > 0).double().mean()
                margins = margins / a.preference_temperature
                row["reward/preference_loss"] = torch.log(1 + torch.exp(-margins)).mean()
        if iteration % a.eval_every == 0 or step == a.total_timesteps:
            player = helpers.mean_policy(policies_of_blocks or [actor])
            row |= slow.scores(player, r, a.eval_episodes)

        state = {f"sac.{name}": tensor for name, tensor in sac.state().items()}
        for i, (key, p) in enumerate(net.named_parameters()):
            state[f"reward.net.{key}"] = p.detach().clone()
            state[f"reward_optimizer.state.{i}.exp_avg"] = adam.state[p]["exp_avg"].clone()
            state[f"reward_optimizer.state.{i}.exp_avg_sq"] = adam.state[p]["exp_avg_sq"].clone()
            state[f"reward_optimizer.state.{i}.step"] = adam.state[p]["step"].double()
        state["averaged.n_averaged"] = torch.tensor(len(policies_of_blocks)).double()
        for key, p in helpers.mean_policy(policies_of_blocks or [actor]).named_parameters():
            state[f"averaged.module.net.{key}"] = p.detach()
        state["reward.obs_mean"] = torch.from_numpy(r.mean)
        state["reward.obs_std"] = torch.from_numpy(r.std)
        state["replay"] = torch.tensor(replay[known:], dtype=torch.float64)
        for i, one in enumerate(memory):
            for part in range(2):
                joined = np.concatenate([episode[part] for episode in one])
                state[f"recent.{i}.{part}"] = torch.from_numpy(joined)
            state[f"recent.{i}.2"] = torch.tensor([len(episode[0]) for episode in one]).double()
        state |= {f"log.{iteration}.{key}": torch.as_tensor(x).double() for key, x in row.items()}
        yield state, copy.deepcopy(rng.bit_generator.state)


CHANGES = {
    "demonstrations and preferences": "",
    "preferences alone, anchors in their data": "--demo-weight 0 --rollout-memory 1",
    "demonstrations alone, as in the paper": "--preference-weight 0 --return-form discounted "
    "--gradient-penalty 0 --no-anneal --entropy-coefficient 0.3 --eval-every 3",
    "learning starts late": "--learning-starts 29 --checkpoint-every 2 --total-timesteps 58 "
    "--demos-in-replay False",
}


KEPT = ("sac", "averaged", "reward", "replay", "recent")


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_loop_equals_a_slow_reference(tmp_path, data, monkeypatch, changes):
    """Checkpoint, metrics and random numbers after each iteration. float32 against float64. What
    has weight 0 needs no data."""
    flags = [*LOOP.split(), *changes.split(), "--data-dir", tmp_path / "data"]
    args = tyro.cli(aihf.Args, args=[str(flag) for flag in flags])
    data = helpers.falling_data(tmp_path) if not changes else data  # of demonstrations that fall
    data = shutil.copytree(data, tmp_path / "data")
    unused = ["high.npz"] * (not args.demo_weight)
    for name in unused + ["low.npz", "medium.npz", "pairs.csv"] * (not args.preference_weight):
        (data / name).unlink()
    assert (aihf.BLOCK, aihf.PENALTY_POINTS) == (50, 500)
    monkeypatch.setattr(aihf, "BLOCK", BLOCK)
    monkeypatch.setattr(aihf, "PENALTY_POINTS", POINTS)
    states = slow.record(monkeypatch, aihf)
    code, out, err = run_script(aihf, flags, tmp_path)
    total = args.total_timesteps
    assert code == 0 and f"{total}/{total}" in err and "true return" in err, err
    for iteration, (expected, random_state) in enumerate(slow_aihf(args, data), start=1):
        if iteration % args.checkpoint_every and iteration * 28 < total:
            continue
        state = states.pop(0)
        assert state["rng"] == random_state  # the same random numbers were drawn
        actual = helpers.leaves({key: state[key] for key in KEPT})
        actual |= {f"log.{iteration}.{key}": x for key, x in state["log"][iteration].items()}
        for i, moments in state["reward_optimizer"]["state"].items():
            actual |= {f"reward_optimizer.state.{i}.{key}": x for key, x in moments.items()}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            actual_value = torch.as_tensor(actual[name]).double()
            close(actual_value, value, TOLERANCE, f"{name} after iteration {iteration}")
    assert not states and iteration == len(state["log"]) - 1
    rows = expected["replay"]
    cut = (rows[:-1, 5:8] != rows[1:, :3]).any(-1)  # the next row begins elsewhere
    fell = rows[:-1, 8] == 1
    assert (cut & fell).sum() > 1 and (cut & ~fell).sum() > 1  # falls; iterations, time limits


# ---------------------------------------------------------------------------------------- learning
def test_learning_ranks_the_data_and_closes_the_gap(tmp_path, data):
    """Planted data: high pushes up, low down."""
    flags = """--env helpers:Drift-v0 --total-timesteps 600 --policy-steps-per-iteration 200
    --gamma 0.9 --learning-starts 100 --rollout-steps-per-iteration 60 --batch-size 32
    --learning-rate 0.01 --hidden 16 --segment-length 4 --reward-updates-per-iteration 40
    --reward-learning-rate 0.01 --gradient-penalty 10 --eval-every 1 --run-name run
    --no-compile --no-cuda"""
    code, out, err = run_script(aihf, [*flags.split(), "--data-dir", data], tmp_path)
    assert code == 0, err
    state = load(tmp_path / "runs/run")
    tiers = [slow.episodes(data / f"{tier}.npz") for tier in ("low", "medium", "high")]
    reward = aihf.Reward(np.ones((2, 3), np.float32), 2, (16,), (0.0, 4.0))
    reward.load_state_dict(state["reward"])
    low, medium, high = (
        np.mean(
            [reward(reward.features(*map(np.float32, episode))).mean().item() for episode in tier]
        )
        for tier in tiers
    )
    _, first, _, last = state["log"]
    assert high > medium + 0.2 > low + 0.4, (low, medium, high)
    assert first["reward/gap"] > 1 and abs(last["reward/gap"]) < 0.5
    assert last["reward/preference_accuracy"] > 0.9 and last["eval/reward_correlation"] > 0.5
    assert last["eval/return_mean"] > first["eval/return_mean"] + 3


# ---------------------------------------------------------------------------------- small things
def test_true_rewards_may_be_whole_numbers(monkeypatch):
    """As those of InvertedPendulum-v5 are."""
    lengths, rewards = torch.tensor([3, 1]), torch.tensor([1, 0, 1, 1])
    played = torch.zeros(4, OBS_DIM), torch.zeros(4, ACT_DIM), lengths, rewards
    monkeypatch.setattr(aihf, "play", lambda *args: played)
    reward = aihf.Reward(np.eye(OBS_DIM, dtype=np.float32), ACT_DIM, HIDDEN, (0.0, 1.0))
    row = aihf.evaluate(None, None, 2, reward)
    assert (row["eval/return_mean"], row["eval/return_std"]) == (1.5, 0.5)


def test_a_robot_with_a_namespace_has_a_run_with_a_plain_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--env", "mine/Robot-v0"])
    assert aihf.parse_args()[0].run_name.startswith("Robot-v0__aihf__1__")
