"""rlhf_baseline.py mujoco: its equations, its three stages against a slow reference in float64, and
runs as a user's; benchmark/figure3_data.py.

What it repeats letter by letter from aihf_sac_mujoco.py is compared here and tested there.
"""

import copy
import csv
import inspect
import json
import shutil
import signal
import types
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
import tyro
from helpers import (
    ROOT,
    assert_one_line_error,
    assert_same_run,
    compare_checkpoints,
    files,
    killed_at,
    load,
    make_robot_data,
    metrics,
    run_process,
    run_script,
    save_arrays,
)
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

import aihf_sac_mujoco as aihf
import rlhf_baseline as rlhf
from data_gen import read

SCRIPT = ROOT / "rlhf_baseline.py"
FIGURE3_DATA = ROOT / "benchmark" / "figure3_data.py"
FLAGS = """--env helpers:Drift-v0 --seed 8 --bc-updates 17 --bc-batch-size 8 --bc-learning-rate 0.2
--reward-updates 13 --reward-learning-rate 0.1 --preference-batch-size 6 --segment-length 4
--held-out-share 0.3 --gradient-penalty 3 --reward-range -1 2 --total-timesteps 180
--policy-steps-per-iteration 70 --critic-warmup-steps 60 --learning-rate 1e-3 --batch-size 8
--hidden 8 7 --gamma 0.9 --tau 0.05 --eval-every 2 --eval-episodes 3 --checkpoint-every 1
--run-name run --demos-in-replay True --no-compile --no-cuda""".split()
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 robots


def execute(cwd, data, *flags) -> tuple[int, str, str]:
    return run_script(rlhf, ["mujoco", *FLAGS, "--data-dir", data, *flags], cwd)


def run(cwd, data, *flags) -> Path:
    """A tiny run that has to end well; returns its folder."""
    code, out, err = execute(cwd, data, *flags)
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Demonstrations that fall, so that the clone does."""
    folder = tmp_path_factory.mktemp("data")
    falling = make_robot_data(folder / "falling", seed=1)
    drift = make_robot_data(folder / "drift", seed=0)
    return Path(shutil.copy(falling / "low.npz", drift / "high.npz")).parent


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, data):
    """(folder, checkpoints in the order they were saved) of an undisturbed run; read only."""
    states, save = [], torch.save
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            torch, "save", lambda state, path: (save(state, path), states.append(torch.load(path)))
        )
        return run(tmp_path_factory.mktemp("plain"), data), states


@pytest.fixture(scope="module")
def plain(recorded) -> Path:
    return recorded[0]


@pytest.fixture
def finished(plain, tmp_path) -> Path:
    """A copy of the undisturbed run, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "runs" / "run"))


def close(actual, expected, tolerance, name=""):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(),
        torch.as_tensor(expected).double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


# ------------------------------------------------------------------------------------ equations
def new_actor(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return rlhf.Actor(3, 2, (8, 7)).to(dtype)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(net, obs):
    """The policy's normal distribution before tanh, of a network with twice as many outputs."""
    mean, log_std = net(obs).chunk(2, -1)
    return Normal(mean, log_std.clamp(-20, 2).exp())


def test_log_likelihood():
    """That of the actor's own samples, and of a squashed Gaussian."""
    actor, obs, noise = new_actor(), draw(500, 3), draw(500, 2, seed=1)
    actions, log_prob = actor(obs, noise)
    close(rlhf.log_likelihood(actor, obs, actions), log_prob, 1e-9)
    actions = torch.linspace(-0.99, 0.99, 1000).double().view(500, 2)
    squashed = TransformedDistribution(gaussian(actor.net, obs), TanhTransform())
    close(rlhf.log_likelihood(actor, obs, actions), squashed.log_prob(actions).sum(-1), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_likelihood_of_actions_at_the_bound(dtype):
    """Finite, and as if they were 1e-6 from it; float32 has 6 % of 1e-6 between two numbers."""
    actor, obs = new_actor(dtype=dtype), draw(500, 3).to(dtype)
    at_bound = torch.ones(500, 2, dtype=dtype) * torch.tensor([1, -1])
    value = rlhf.log_likelihood(actor, obs, at_bound).mean()
    value.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in actor.parameters())
    inside = new_actor().net, obs.double(), at_bound.double() * (1 - 1e-6)
    squashed = TransformedDistribution(gaussian(*inside[:2]), TanhTransform())
    expected = squashed.log_prob(inside[2]).sum(-1).mean().item()
    assert value.item() == pytest.approx(expected, rel=0.01)


def parameters(actor):
    return {key: p.detach() for key, p in actor.named_parameters()}


def test_kl_divergence():
    """That of torch.distributions before tanh, and after it the mean of log π - log π⁰ of samples;
    0 of a policy to itself, even where float32 rounds all of its actions to ±1."""
    actor, clone, obs = new_actor(), new_actor(seed=1), draw(16, 3)
    kl = rlhf.kl_divergence(actor, parameters(actor), parameters(clone), obs)
    close(kl, kl_divergence(gaussian(actor.net, obs), gaussian(clone.net, obs)).sum(-1), 1e-9)
    many = obs.repeat(20_000, 1)
    actions, log_prob = actor(many, draw(len(many), 2, seed=2))
    estimate = log_prob - rlhf.log_likelihood(clone, many, actions)
    close(kl, estimate.view(-1, 16).mean(0), 0.02)
    other = {key: p for key, p in parameters(clone).items()}
    close(rlhf.kl_divergence(clone, parameters(actor), other, obs), kl, 0)  # own parameters unused
    actor = actor.float()
    actor.net[-1].bias.data[:2] = 40.0  # the means
    assert (actor(obs.float(), torch.zeros(16, 2))[0] == 1).all()
    assert (rlhf.kl_divergence(actor, *2 * [parameters(actor)], obs.float()) == 0).all()


@pytest.mark.parametrize("share, held_out", [(0.1, 1), (0.3, 3), (0.001, 1), (0.9, 9)])
def test_hold_out(share, held_out):
    parts = rlhf.hold_out(10, share, np.random.default_rng(0))
    assert len(parts[1]) == held_out and sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.cat(parts).tolist() != list(range(10))


def test_update_to_a_uniform_policy_is_that_of_aihf():
    """With a target entropy, bit by bit."""
    sacs = []
    for module, after in ((aihf, ()), (rlhf, (0,))):
        torch.manual_seed(0)
        actor, critics = module.Actor(3, 2, (8,)), module.Critics(3, 2, (8,))
        sac = module.init_sac(actor, critics, 0.3)
        update = module.make_sac_update(actor, critics, 0.9, 0.05, -2, *after)
        for seed in range(3):
            obs, action, next_obs = (draw(16, n, seed=seed + n).float() for n in (3, 2, 4))
            noise, ends = draw(2, 16, 2, seed=seed).float(), (draw(16) > 0.5).float()
            batch = obs, action.tanh(), obs[:, 0], next_obs[:, :3], ends, noise
            losses = update(sac, torch.tensor(0.01), *batch)
        sacs.append(sac | {"losses": losses[:4]})
    assert not compare_checkpoints(*sacs)


# ------------------------------------------- the three stages against a slow reference in float64
TOLERANCE = 1e-3  # relative and absolute: the script computes in float32
SCALE = 3  # of the reward's first parameters, so that the penalty on slopes above 1 is at work
CHECK_EVERY = 5


def descend(optimizer, learning_rate, loss):
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def slow_action(actor, obs, noise):
    with torch.no_grad():
        policy = gaussian(actor, torch.from_numpy(obs))
        return torch.tanh(policy.mean + policy.stddev * torch.as_tensor(noise)).numpy()


class SlowSAC:
    """SAC with modules, autograd and torch.optim; its penalty is KL(π ‖ cloned), or log π."""

    def __init__(self, a, actor, critics):
        self.a, self.actor, self.critics, self.targets = a, actor, critics, copy.deepcopy(critics)
        beta = torch.tensor(a.kl_coefficient or 0.05, dtype=torch.float64)
        self.log_beta = beta.log().requires_grad_()
        q_parameters = [p for critic in critics for p in critic.parameters()]
        groups = [*actor.parameters()], q_parameters, [self.log_beta]
        self.optimizers, self.updates = [torch.optim.Adam(group) for group in groups], 0

    def sample(self, obs, noise):
        policy = gaussian(self.actor, obs)
        u = policy.mean + policy.stddev * noise
        log_det_tanh = TanhTransform().log_abs_det_jacobian(u, u.tanh())
        log_prob = penalty = (policy.log_prob(u) - log_det_tanh).sum(-1)
        if self.a.kl_coefficient:
            penalty = kl_divergence(policy, gaussian(self.cloned, obs)).sum(-1)
        return u.tanh(), log_prob, penalty

    def q(self, critics, obs, action):
        return torch.stack([critic(torch.cat([obs, action], -1))[:, 0] for critic in critics])

    def update(self, rate, obs, action, reward, next_obs, ended, noise):
        self.updates += 1
        beta, policy_rate = self.log_beta.exp().item(), rate
        if self.updates <= self.a.critic_warmup_steps:
            policy_rate = 0.0
        with torch.no_grad():
            next_action, _, penalty = self.sample(next_obs, noise[0])
            value = self.q(self.targets, next_obs, next_action).min(0).values - beta * penalty
            backup = torch.where(ended == 1, reward, reward + self.a.gamma * value)
        q = self.q(self.critics, obs, action)
        q_loss = ((q[0] - backup) ** 2).mean() + ((q[1] - backup) ** 2).mean()
        descend(self.optimizers[1], rate, q_loss)
        new_action, log_prob, penalty = self.sample(obs, noise[1])
        new_q = self.q(self.critics, obs, new_action).min(0).values
        loss = (beta * penalty - new_q).mean()
        descend(self.optimizers[0], policy_rate, loss)
        if not self.a.kl_coefficient:
            excess = -log_prob.detach().mean() + 2
            descend(self.optimizers[2], policy_rate, self.log_beta * excess)
        with torch.no_grad():
            for net, target in zip(self.critics, self.targets):
                for p, target_p in zip(net.parameters(), target.parameters()):
                    target_p.copy_((1 - self.a.tau) * target_p + self.a.tau * p)
        losses = q_loss, loss, -log_prob.mean(), q.mean(), penalty.mean()
        return dict(zip(rlhf.LOSSES, torch.stack(losses).tolist()))

    def state(self):
        """Names and tensors as the script's checkpoint has them."""
        nets = {"actor": {f"net.{k}": p for k, p in self.actor.named_parameters()}}
        nets |= {"cloned": {f"net.{k}": p for k, p in self.cloned.named_parameters()}}
        for name, pair in (("critics", self.critics), ("targets", self.targets)):
            named = [(i, k, p) for i, q in enumerate(pair, 1) for k, p in q.named_parameters()]
            nets[name] = {f"q{i}.{k}": p for i, k, p in named}
        nets |= {"beta": {"log": self.log_beta}, "updates": {"count": torch.tensor(self.updates)}}
        for net, optimizer in zip(("actor", "critics", "beta"), self.optimizers):
            for moment, name in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                nets[f"{net}_{moment}"] = {
                    key: optimizer.state[p].get(name, torch.zeros_like(p))
                    for key, p in nets[net].items()
                }
        return {f"sac.{k}": p.detach().clone() for k, p in helpers.leaves(nets).items()}


def slow_fit(a, net, updates, learning_rate, loss, held_out_loss):
    """Adam; (updates, parameters) of the lowest held-out loss, and where it was measured."""
    adam, losses, kept = torch.optim.Adam(net.parameters()), {}, {}
    for done in range(updates):
        descend(adam, learning_rate * ((updates - done) / updates if a.anneal else 1), loss())
        if done + 1 in {*range(CHECK_EVERY, updates, CHECK_EVERY), updates}:
            losses[done + 1] = held_out_loss().item()
            kept[done + 1] = copy.deepcopy(net.state_dict())
    best = min(losses, key=losses.get)
    net.load_state_dict(kept[best])
    return best, losses[best]


def slow_rlhf(a: rlhf.MujocoArgs, folder: Path):
    """The stages from their definitions, a state after each and after each iteration, with the
    script's random numbers in its order."""
    low, high = np.array([-1.0, -2.0]), np.array([0.5, 1.0])  # Drift's actions

    def network(*sizes):
        layers = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
        return nn.Sequential(*[layer for pair in layers for layer in pair][:-1]).double()

    torch.manual_seed(a.seed)
    actor = network(3, *a.hidden, 4)
    sac = SlowSAC(a, actor, [network(5, *a.hidden, 1), network(5, *a.hidden, 1)])
    net, rng = network(5, *a.hidden, 1), np.random.default_rng(a.seed)
    for p in net.parameters():
        p.data *= SCALE

    tiers, replay = {}, []
    for tier in ("high", "medium", "low"):
        file, tiers[tier], steps, row = np.load(folder / f"{tier}.npz"), [], [], 0
        for t, action in enumerate(file["actions"].astype(float)):
            unit = (action - (low + high) / 2) / ((high - low) / 2)
            steps, row = [*steps, (file["observations"][row].astype(float), unit)], row + 1
            after, fell = file["observations"][row].astype(float), float(file["terminations"][t])
            if tier == "high" and a.demos_in_replay:
                replay.append([*steps[-1][0], *unit, *after, fell])
            if file["terminations"][t] or file["truncations"][t]:
                tiers[tier].append([np.array(column) for column in zip(*steps)])
                steps, row = [], row + 1
    all_obs = np.concatenate([obs for tier in tiers.values() for obs, _ in tier])
    all_mean, all_std = all_obs.mean(0), np.append(all_obs.std(0)[:2], 1.0)  # a constant

    def features(obs, actions):
        standard = ((np.asarray(obs) - all_mean) / all_std).clip(-10, 10)
        return torch.from_numpy(np.concatenate([standard, actions], -1))

    def r(x):
        bottom, top = a.reward_range
        return bottom + (top - bottom) / (1 + torch.exp(-4 / (top - bottom) * net(x)[..., 0]))

    def step_robot(env, action):
        return env.step(low + (action + 1) / 2 * (high - low))[:4]

    def scores():
        returns, true, learned = [], [], []
        player = helpers.mean_policy(policies)
        for seed in range(10_000, 10_000 + a.eval_episodes):
            env = gym.make("helpers:Drift-v0", disable_env_checker=True)
            obs, done, rewards = env.reset(seed=seed)[0], False, []
            while not done:
                action = slow_action(player, obs, [0.0, 0.0])
                learned.append(r(features(obs, action)).item())
                obs, reward, terminated, truncated = step_robot(env, action)
                rewards, done = [*rewards, reward], terminated or truncated
            returns, true = [*returns, sum(rewards)], true + rewards
        row = {"return_mean": np.mean(returns), "return_std": np.std(returns)}
        row["length_mean"] = len(true) / a.eval_episodes
        row["reward_correlation"] = np.corrcoef(learned, true)[0, 1]
        return {f"eval/{key}": value for key, value in row.items()}

    def split(count):
        order, held_out = rng.permutation(count), max(1, round(a.held_out_share * count))
        return order[:-held_out], order[-held_out:]

    with open(folder / "pairs.csv") as file:
        pairs = []
        for row in csv.DictReader(file):
            sides = []
            for side in "ab":
                x = features(*tiers[row[f"tier_{side}"]][int(row[f"episode_{side}"])])
                start = int(row[f"start_{side}"])
                sides.append(x[start : start + a.segment_length])
            pairs.append(sides if row["label"] == "1" else sides[::-1])
    demos, step, iteration, policies = tiers["high"], 0, 0, []
    known = len(replay)
    episode_split, pair_split = split(len(demos)), split(len(pairs))

    def state(stage, **row):
        counts = {"charts/iteration": iteration, "charts/sac_steps": step, "charts/env_steps": step}
        reward = {f"reward.net.{key}": p.detach().clone() for key, p in net.named_parameters()}
        reward |= {"reward.obs_mean": all_mean, "reward.obs_std": all_std}
        log = {f"log.{key}": float(value) for key, value in (counts | row).items()}
        mean = helpers.mean_policy(policies).named_parameters()
        reward |= {f"averaged.module.net.{key}": p.detach() for key, p in mean}
        reward["averaged.n_averaged"] = torch.tensor(len(policies)).double()
        rest = {"stage": stage, "replay": torch.tensor(replay[known:]).double().view(-1, 9)}
        return sac.state() | reward | log | rest, copy.deepcopy(rng.bit_generator.state)

    # 1. Behaviour cloning
    of_demos = np.concatenate([obs for obs, _ in demos])
    mean, std = of_demos.mean(0), np.append(of_demos.std(0, ddof=1)[:2], 1.0)
    nearest_to_1 = float(np.float32(1 - 1e-6))
    rows = [[(s, u) for e in sorted(part) for s, u in zip(*demos[e])] for part in episode_split]

    def cloning_loss(steps):
        obs, actions = (torch.from_numpy(np.array(column)) for column in zip(*steps))
        policy = gaussian(actor, (obs - torch.from_numpy(mean)) / torch.from_numpy(std))
        squashed = TransformedDistribution(policy, TanhTransform())
        return -squashed.log_prob(actions.clamp(-nearest_to_1, nearest_to_1)).sum(-1).mean()

    def batch_loss():
        return cloning_loss([rows[0][i] for i in rng.integers(len(rows[0]), size=a.bc_batch_size)])

    fitting = a, actor, a.bc_updates, a.bc_learning_rate, batch_loss
    kept, loss = slow_fit(*fitting, lambda: cloning_loss(rows[1]))
    row = {"bc/updates": kept, "bc/held_out_log_likelihood": -loss}
    row["bc/log_likelihood"] = -cloning_loss(rows[0]).item()
    with torch.no_grad():
        weight = actor[0].weight.clone()
        for i in range(3):
            actor[0].weight[:, i] = weight[:, i] / std[i]
            actor[0].bias -= weight[:, i] * mean[i] / std[i]
    sac.cloned = copy.deepcopy(actor)
    policies.append(sac.cloned)
    row |= scores()
    del row["eval/reward_correlation"]
    yield state(2, **row)

    # 2. The reward model
    def margins(index):
        return torch.stack([r(pairs[i][0]).sum() - r(pairs[i][1]).sum() for i in index])

    def preference_loss(index):
        return torch.log(1 + torch.exp(-margins(index))).mean()

    def loss_and_penalty():
        batch = pair_split[0][rng.integers(len(pair_split[0]), size=a.preference_batch_size)]
        loss = preference_loss(batch)
        if a.gradient_penalty:
            w, other = (torch.cat([pairs[i][side] for i in pair_split[0]]) for side in (0, 1))
            i, j = rng.integers(len(w), size=500), rng.integers(len(other), size=500)
            share = torch.from_numpy(rng.random((500, 1), np.float32)).double()
            x = ((1 - share) * w[i] + share * other[j]).requires_grad_()
            slope = torch.autograd.grad(r(x).sum(), x, create_graph=True)[0].norm(dim=-1)
            slopes.append(slope.max().item())
            loss = loss + a.gradient_penalty * ((slope - 1).clamp(min=0) ** 2).mean()
        return loss

    slopes = []
    fitting = a, net, a.reward_updates, a.reward_learning_rate, loss_and_penalty
    kept, loss = slow_fit(*fitting, lambda: preference_loss(pair_split[1]))
    assert max(slopes, default=2) > 1  # the penalty is at work
    row = {"reward/updates": kept, "reward/held_out_loss": loss}
    row["reward/preference_loss"] = preference_loss(pair_split[0])
    row["reward/preference_accuracy"] = (margins(pair_split[0]) > 0).double().mean()
    row["reward/held_out_accuracy"] = (margins(pair_split[1]) > 0).double().mean()
    x_demos = torch.cat([features(*episode) for episode in demos])
    row["reward/demonstrations"] = r(x_demos).mean().item()
    row["eval/reward_correlation"] = scores()["eval/reward_correlation"]
    yield state(3, **row)

    # 3. RL
    env = gym.make("helpers:Drift-v0", disable_env_checker=True)
    while step < a.total_timesteps:
        rate = a.learning_rate * (1 - step / a.total_timesteps if a.anneal else 1)
        obs, resets = env.reset(seed=int(rng.integers(2**31)))[0], 1
        end, first = min(step + a.policy_steps_per_iteration, a.total_timesteps), step
        while step < end:
            block = min(50, end - step)
            for _ in range(block):
                action = slow_action(actor, obs, rng.standard_normal(2, np.float32))
                next_obs, _, terminated, truncated = step_robot(env, action)
                replay.append([*obs, *action, *next_obs, float(terminated)])
                obs, step = next_obs, step + 1
                if terminated or truncated:
                    obs, resets = env.reset()[0], resets + 1
            index = rng.integers(known + step, size=(block, a.batch_size))
            noise = rng.standard_normal((block, 2, a.batch_size, 2), np.float32)
            for one, its_noise in zip(index, torch.from_numpy(noise).double()):
                batch = torch.tensor([replay[i] for i in one]).double()
                s, action, next_s, ended = batch.split([3, 2, 3, 1], -1)
                with torch.no_grad():
                    rewards = r(features(s, action))
                row = sac.update(rate, s, action, rewards, next_s, ended[:, 0], its_noise)
            policies.append(copy.deepcopy(actor))
        iteration += 1
        played = np.array(replay[known + first :])
        r_policy = r(features(played[:, :3], played[:, 3:5])).detach()
        row |= {"losses/beta": sac.log_beta.exp().item(), "reward/policy": r_policy.mean()}
        row |= {"reward/max": r_policy.max(), "reward/demonstrations": r(x_demos).mean().item()}
        row["reward/gap"] = row["reward/demonstrations"] - row["reward/policy"]
        row["charts/episode_length"] = (step - first) / resets
        if iteration % a.eval_every == 0 or step == a.total_timesteps:
            row |= scores()
        yield state(3, **row)


CHANGES = {  # stage 1 keeps the policy of update 15, 15 and 5 of 17, stage 2 the last reward
    "penalty to the clone": "",
    "SAC's entropy bonus": """--kl-coefficient 0 --critic-warmup-steps 0 --eval-every 3
    --reward-learning-rate 0.2""",
    "no annealing, no smoothness": """--no-anneal --gradient-penalty 0 --checkpoint-every 2
    --demos-in-replay False --seed 11 --reward-learning-rate 0.05""",
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_stages_equal_a_slow_reference(tmp_path, data, monkeypatch, changes):
    """Checkpoint, metrics and random numbers after stages 1 and 2 and after each iteration."""
    args = tyro.cli(rlhf.MujocoArgs, args=[*FLAGS, *changes.split()])
    states, save, make_reward, clock = [], torch.save, rlhf.Reward, iter(range(1000))

    def scaled_reward(*arguments):
        reward = make_reward(*arguments)
        for p in reward.parameters():
            p.data *= SCALE
        return reward

    def recording_save(state, path):
        states.append(copy.deepcopy(state))
        save(state, path)

    fake_time = types.SimpleNamespace(perf_counter=lambda: next(clock), time_ns=lambda: 0)
    monkeypatch.setattr(rlhf, "Reward", scaled_reward)
    monkeypatch.setattr(rlhf, "CHECK_EVERY", CHECK_EVERY)
    monkeypatch.setattr(rlhf, "time", fake_time)
    monkeypatch.setattr(torch, "save", recording_save)
    code, out, err = execute(tmp_path, data, *changes.split())
    assert code == 0 and "180/180" in err, err
    for number, (expected, random_state) in enumerate(slow_rlhf(args, data)):
        iteration = max(number - 1, 0)
        if iteration % args.checkpoint_every and iteration < 3:
            continue
        state = states.pop(0)
        assert state["rng"] == random_state  # the same random numbers were drawn
        actual = {key: state[key] for key in ("sac", "averaged", "reward", "replay", "stage")}
        actual = helpers.leaves(actual | {"log": state["log"][number]})
        assert actual.pop("log.charts/wall_seconds") == sum([1, 1, 2, 2, 2][: number + 1])
        if number > 1:
            steps = expected["log.charts/sac_steps"] - 70 * (number - 2)
            assert actual.pop("log.charts/SPS") == steps
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            close(actual[name], value, TOLERANCE, f"{name} in row {number}")
    assert not states and number == len(state["log"]) - 1 == 4
    assert 3 < expected["replay"][:, 8].sum() < 180 / 4  # falls, and ends by the time limit


# ---------------------------------------------------------------------------------- it does learn
def test_cloning_recovers_a_squashed_gaussian(tmp_path, data):
    """Demonstrations of a known policy on observations of unequal scale, one of which is nearly
    constant: the clone has the policy's distribution, and the likelihood of its samples."""
    torch.manual_seed(3)
    teacher, rng = rlhf.Actor(3, 2, (16,)), np.random.default_rng(3)
    for p in teacher.parameters():
        p.data *= 2
    scale = np.float32([5, 20, 1e-5])

    def standard(obs):
        return torch.from_numpy((obs / scale - [0.5, 0.5, 0.5]) * [1, 1, 0]).float()

    obs = (scale * (0.5 + rng.standard_normal((6010, 3)))).astype(np.float32)
    steps = np.delete(obs, np.arange(600, 6010, 601), axis=0)
    noise = torch.from_numpy(rng.standard_normal((6000, 2), np.float32))
    with torch.no_grad():
        actions, log_prob = teacher(standard(steps), noise)
    shutil.copytree(data, tmp_path / "data")
    ends, middle = np.arange(1, 6001) % 600 == 0, np.float32([0.75, 1.5])
    arrays = {"observations": obs, "actions": actions.numpy() * middle - [0.25, 0.5]}
    arrays |= {"terminations": np.zeros(6000, bool), "truncations": ends, "rewards": None}
    save_arrays(tmp_path / "data" / "high.npz", **arrays)
    flags = "--bc-updates 1500 --bc-batch-size 128 --bc-learning-rate 0.01 --hidden 16".split()
    folder = run(tmp_path, tmp_path / "data", *flags, "--total-timesteps", 1, "--reward-updates", 1)

    clone = rlhf.Actor(3, 2, (16,))
    clone.load_state_dict(load(folder)["sac"]["cloned"])
    fresh = (scale * (0.5 + rng.standard_normal((2000, 3)))).astype(np.float32)
    with torch.no_grad():
        policy, true = (
            gaussian(clone.net, torch.from_numpy(fresh)),
            gaussian(teacher.net, standard(fresh)),
        )
    kl = kl_divergence(true, policy).sum(-1)
    assert kl.median() < 0.05 and kl.mean() < 0.2  # nats
    assert true.mean.std() > 0.5 and true.stddev.log().std() > 0.5  # it was not easy
    for column in ("bc/held_out_log_likelihood", "bc/log_likelihood"):
        assert float(metrics(folder)[0][column]) == pytest.approx(log_prob.mean().item(), abs=0.2)


def test_reward_model_orders_held_out_pairs(tmp_path, data):
    """Planted: what is preferred moves up, what is not moves down."""
    flags = ["--reward-updates", 60, "--total-timesteps", 1, "--gradient-penalty", 0.1]
    row = metrics(run(tmp_path, data, *flags))[1]
    assert float(row["reward/held_out_accuracy"]) > 0.9 > 0.4 > float(row["reward/held_out_loss"])


def test_reward_model_of_the_embedded_data(tmp_path):
    (tmp_path / "data_gen").symlink_to(ROOT / "data_gen")
    flags = "--env Hopper-v4 --segment-length 50 --total-timesteps 1 --eval-episodes 1 --hidden 32"
    flags += " --bc-updates 1 --reward-updates 150 --preference-batch-size 64 --seed 1"
    flags += " --reward-learning-rate 0.01 --reward-range 0 4 --gradient-penalty 10"
    folder = run(tmp_path, "", *flags.split())
    assert float(metrics(folder)[1]["reward/held_out_accuracy"]) > 0.6


# ------------------------------------------------------------------------------------- whole runs
def test_as_a_user(tmp_path, data):
    """The script and data_gen/read.py alone in a folder; without a name for the run."""
    (tmp_path / "data_gen").mkdir()
    shutil.copy(SCRIPT, tmp_path)
    shutil.copy(ROOT / "data_gen" / "read.py", tmp_path / "data_gen")
    flags = [*FLAGS, "--data-dir", data, "--run-name", "", "--total-timesteps", 50]
    code, out, err = run_process([SCRIPT.name, "mujoco", *flags], tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("helpers:Drift-v0__rlhf_baseline__8__")
    assert all(
        line in out for line in ("cloned policy:", "reward model:", f"plot.py runs/{folder.name}")
    )
    assert set(files(folder)) == {"args.json", "checkpoint.pt", "metrics.csv"}
    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("script") == "rlhf_baseline.py mujoco"
    assert set(saved) == {field.name for field in fields(rlhf.MujocoArgs)}


def test_what_moves_in_which_stage(recorded):
    """Checkpoints: after cloning, after the reward model, and after 70, 140 and 180 SAC steps."""
    states = recorded[1]
    assert [state["stage"] for state in states] == [2, 3, 3, 3, 3]
    assert [len(state["replay"]) for state in states] == [0, 0, 70, 140, 180]
    moved = [compare_checkpoints(a, b, ("args", "log", "rng")) for a, b in zip(states, states[1:])]
    always = {"sac.critics", "sac.targets", "sac.actor", "sac.critics_mean", "sac.critics_square"}
    always |= {"sac.actor_mean", "sac.actor_square", "sac.updates", "replay"}
    always |= {"averaged.module", "averaged.n_averaged"}
    nets = [{".".join(name.split(".")[:2]) for name in names} for names in moved]
    assert nets == [{"reward.net", "stage"}, always, always, always]
    beta = states[-1]["sac"]["beta"]["log"].exp().item()
    assert beta == pytest.approx(rlhf.MujocoArgs.kl_coefficient)
    assert not compare_checkpoints(states[1]["sac"]["actor"], states[1]["sac"]["cloned"])


@pytest.mark.parametrize("kl_coefficient, begins", [(0, 0.05), (3, 3)])
def test_policy_and_beta_stand_still_in_warm_up(tmp_path, data, kl_coefficient, begins):
    flags = ["--kl-coefficient", kl_coefficient, "--critic-warmup-steps", 50]
    state = load(run(tmp_path, data, *flags, "--total-timesteps", 50))
    mean, state = state["averaged"], state["sac"]
    assert not compare_checkpoints(state["actor"], state["cloned"])
    for name, p in state["cloned"].items():
        assert (mean[f"module.{name}"] == p).all()
    assert all(moment.any() for moment in state["actor_mean"].values())  # but Adam goes on
    assert state["beta"]["log"].exp().item() == pytest.approx(begins)
    shutil.rmtree(tmp_path / "runs")
    state = load(run(tmp_path, data, *flags, "--total-timesteps", 51))["sac"]
    assert compare_checkpoints(state["actor"], state["cloned"])


def test_training_cannot_see_the_true_reward(tmp_path, data, plain, monkeypatch):
    make = gym.make

    class Liar(gym.Wrapper):
        def step(self, action):
            obs, _, *rest = self.env.step(action)
            return obs, float("nan"), *rest

    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: Liar(make(*args, **kwargs)))
    shutil.copytree(data, tmp_path / "data")
    for tier in ("low", "medium", "high"):
        save_arrays(tmp_path / "data" / f"{tier}.npz", rewards=None)
    folder = run(tmp_path, tmp_path / "data")
    assert_same_run(folder, plain, without="eval/")
    assert metrics(folder)[0]["eval/return_mean"] == "nan"


def test_another_seed_differs(tmp_path, data, plain):
    state, other = load(plain), load(run(tmp_path, data, "--seed", 2))
    differ = compare_checkpoints(state, other)
    assert {name for name in leaves_of_networks(state)} <= set(differ)


def leaves_of_networks(state):
    names = helpers.leaves({"sac": state["sac"], "reward": state["reward"]})
    return [name for name in names if "weight" in name]


# ------------------------------------------------------------------------- kill, resume, evaluate
class Killed(BaseException):
    """Ends the script where it stands: nothing catches it."""


def stopped_at(monkeypatch, cwd, data, moment: str, do) -> None:
    """do() at Adam's step 7 (stage 1), 24 (stage 2), at an evaluation, or in the fourth save."""
    owner, name, number = {
        "1": (torch.optim.Adam, "step", 7),
        "2": (torch.optim.Adam, "step", 24),
        "evaluation": (rlhf, "evaluate", 3),
        "3": (rlhf.read, "check_finite", 7),
        "save": (torch, "save", 4),
    }[moment]
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            do()
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, counted)
        return execute(cwd, data)


def kill():
    raise Killed


@pytest.mark.parametrize("moment", ["1", "2", "evaluation", "3", "save"])
def test_kill_and_resume(tmp_path, data, plain, monkeypatch, moment):
    """Killed in stage 1 there is nothing to resume: the same command begins anew."""
    folder = tmp_path / "runs" / "run"
    with pytest.raises(Killed):
        stopped_at(monkeypatch, tmp_path, data, moment, kill)
    assert (folder / "checkpoint.pt").exists() == (moment != "1")
    if moment == "1":
        run(tmp_path, data)
    else:
        code, out, err = run_script(rlhf, ["mujoco", "--resume", folder], tmp_path)
        assert code == 0, (out, err)
    assert_same_run(folder, plain)


def test_sigkill_and_resume(tmp_path, data, plain):
    argv = ["mujoco", *FLAGS, "--data-dir", data]
    code, *_ = killed_at("os.replace", 7, SCRIPT, argv, tmp_path)  # in iteration 1
    assert code == -signal.SIGKILL
    code, out, err = run_process([SCRIPT, "mujoco", "--resume", "runs/run"], tmp_path)
    assert code == 0, (out, err)
    assert_same_run(tmp_path / "runs" / "run", plain)


@pytest.mark.parametrize("moment, what", [("1", "nothing is saved"), ("3", "mujoco --resume")])
def test_interrupt(tmp_path, data, monkeypatch, moment, what):
    do = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    code, out, err = stopped_at(monkeypatch, tmp_path, data, moment, do)
    assert code == 130 and what in out, (out, err)


def test_evaluate_and_resume_of_a_finished_run_change_nothing(tmp_path, finished):
    before = files(finished)
    true_return = float(metrics(finished)[-1]["eval/return_mean"])
    for flag in ("--evaluate", "--resume"):
        code, out, err = run_script(rlhf, ["mujoco", flag, finished], tmp_path)
        assert code == 0 and f"final true return {true_return:.0f} ±" in out, (out, err)
        after = files(finished)
        assert after.pop("args.json") and after == {k: v for k, v in before.items() if k in after}


def test_the_cloned_policy_of_an_unfinished_run_can_be_evaluated(tmp_path, finished, recorded):
    torch.save(recorded[1][0], finished / "checkpoint.pt")
    code, out, err = run_script(rlhf, ["mujoco", "--evaluate", finished], tmp_path)
    true_return = float(metrics(finished)[0]["eval/return_mean"])
    assert code == 0 and f"true return {true_return:.0f} ±" in out, (out, err)


def test_resuming_with_more_steps_goes_on(tmp_path, finished, plain):
    argv = ["mujoco", "--resume", finished, "--total-timesteps", 230]
    code, out, err = run_script(rlhf, argv, tmp_path)
    assert code == 0, (out, err)
    assert metrics(finished)[:5] == metrics(plain)
    assert metrics(finished)[5]["charts/sac_steps"] == "230"


# ------------------------------------------------------------------ not a number, and bad input
def test_not_finite(tmp_path, data, monkeypatch):
    """With steps so large that the networks overflow."""
    code, out, err = execute(tmp_path, data, "--bc-learning-rate", 10**15)
    assert code == 1 and "held-out loss" in err and "updates" in err, (out, err)
    code, out, err = execute(tmp_path, data, "--learning-rate", 10**15)
    assert code == 1 and "is not finite at step 50;" in err, (out, err)
    assert load(tmp_path / "runs" / "run")["stage"] == 3


BAD_ARGUMENTS = {
    "--env NoSuchRobot-v4": "NoSuchRobot",
    "--env Pendulum-v1": "Pendulum-v1",
    "--env Hopper-v4": "of another robot",
    "--data-dir nowhere": "nowhere",
    "--segment-length 7": "--segment-length",
    "--gamma 1": "--gamma",
    "--tau 1.5": "--tau",
    "--held-out-share 1": "--held-out-share",
    "--reward-range 4 0": "--reward-range",
    "--reward-range nan 4": "--reward-range",
    "--total-timesteps 100000000000000": "memory",
    "--hidden 0": "--hidden",
}


@pytest.mark.parametrize("flags, fragment", BAD_ARGUMENTS.items(), ids=BAD_ARGUMENTS)
def test_bad_arguments(tmp_path, data, flags, fragment):
    result = execute(tmp_path, data, *flags.split())
    assert_one_line_error(result, *([fragment] if fragment != "memory" else []))
    assert not (tmp_path / "runs").exists()


def test_numbers(tmp_path, data):
    may_be_zero = {"seed", "gradient_penalty", "critic_warmup_steps", "kl_coefficient"}
    for field in fields(rlhf.MujocoArgs):
        if type(field.default) in (int, float):
            for value in ("-1", *(() if field.name in may_be_zero else ("0",))):
                flag = f"--{field.name.replace('_', '-')}"
                assert_one_line_error(execute(tmp_path, data, f"{flag}={value}"), flag)
    assert not (tmp_path / "runs").exists()


def one_episode(folder):
    ends = {"terminations": np.zeros(30, bool), "truncations": np.arange(30) == 29}
    arrays = {"observations": np.zeros((31, 3)), "actions": np.zeros((30, 2)), "rewards": None}
    save_arrays(folder / "high.npz", **arrays, **ends)


def one_pair(folder):
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join(lines[:2]) + "\n")


BAD_DATA = {
    "one demonstration": (one_episode, "--held-out-share 0.3 of 1"),
    "one pair": (one_pair, "--held-out-share 0.3 of 1"),
    "no demonstrations": (lambda folder: (folder / "high.npz").unlink(), "high.npz"),
    "no preferences": (lambda folder: (folder / "pairs.csv").unlink(), "pairs.csv"),
    "damaged": (lambda folder: (folder / "medium.npz").write_bytes(b"no zip"), "medium.npz"),
}


@pytest.mark.parametrize("spoil, fragment", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_leaves_no_run_folder(tmp_path, data, spoil, fragment):
    spoil(Path(shutil.copytree(data, tmp_path / "data")))
    assert_one_line_error(execute(tmp_path, tmp_path / "data"), fragment)
    assert not (tmp_path / "runs").exists()


def change_state(folder, **changes):
    torch.save(load(folder) | changes, folder / "checkpoint.pt")


BAD_RUNS = {  # what is done to the run folder, flags, and what the message has to say
    "no folder": (shutil.rmtree, [], "no checkpoint"),
    "another script's": (lambda f: change_state(f, script="x.py"), [], "no checkpoint of"),
    "other networks": (lambda f: None, ["--hidden", "16"], ""),
    "fewer steps": (lambda f: None, ["--total-timesteps", "100"], ""),
    "half a checkpoint": (lambda f: (f / "checkpoint.pt").write_bytes(b"PK"), [], "damaged"),
    "other data": (lambda f: change_state(f, data_hash="0"), [], "other data"),
}


@pytest.mark.parametrize("spoil, flags, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_bad_run_folder(tmp_path, finished, flag, spoil, flags, fragment):
    spoil(finished)
    before = files(finished)
    result = run_script(rlhf, ["mujoco", flag, finished, *flags], tmp_path)
    assert_one_line_error(result, fragment)
    assert files(finished) == before


@pytest.mark.parametrize("script", [aihf, rlhf])
def test_defaults_follow_from_the_robot(tmp_path, data, monkeypatch, script):
    """Drift falls and has two actions; one that starts far from the edge does not fall."""
    asked = []

    def refuse(args, *rest):
        asked.append((args.total_timesteps, args.reward_range, args.demos_in_replay))
        raise ValueError("enough")

    class High(helpers.Drift):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, False, truncated, info

    gym.register("High-v0", High, max_episode_steps=12)
    monkeypatch.setattr(script.read, "open_run", refuse)
    world = ["mujoco"] if script is rlhf else []
    common = ["--hidden", 8, "--segment-length", 4, "--data-dir", data]
    given = ["--reward-range", -2, 1, "--total-timesteps", 5, "--demos-in-replay", "True"]
    for more in (["helpers:Drift-v0"], ["High-v0"], ["High-v0", *given]):
        flags = [*world, *common, "--env", *more]
        code, _, err = run_script(script, flags, tmp_path)
        assert (code, err) == (2, "error: enough\n")
    falls, does_not = (200_000, (0.0, 4.0), True), (200_000, (-10.0, 10.0), False)
    assert asked == [falls, does_not, (5, (-2.0, 1.0), True)]


@pytest.mark.parametrize("argv", [[], ["--seed", "1"], ["robots"], ["mujoco", "--no-such-flag"]])
def test_the_subcommand_is_mandatory(tmp_path, argv):
    assert run_script(rlhf, argv, tmp_path)[0] == 2
    assert not list(tmp_path.iterdir())


def test_help(tmp_path):
    code, out, _ = run_script(rlhf, ["--help"], tmp_path)
    assert code == 0 and "mujoco" in out
    code, out, _ = run_script(rlhf, ["mujoco", "--help"], tmp_path)
    assert code == 0 and "--critic-warmup-steps" in out and "may be" not in out


# ---------------------------------------------------------------------------- repeated on purpose
IDENTICAL = """mlp Reward slope_penalty between Actor Critics init_sac adam_ compile_update make_env
play evaluate""".split()


@pytest.mark.parametrize("name", IDENTICAL)
def test_what_the_two_scripts_repeat_is_letter_identical(name):
    assert inspect.getsource(getattr(aihf, name)) == inspect.getsource(getattr(rlhf, name))


def test_shared_flags_have_the_same_defaults():
    of_aihf, of_rlhf = (
        {f.name: f.default for f in fields(x)} for x in (aihf.Args, rlhf.MujocoArgs)
    )
    shared = of_aihf.keys() & of_rlhf.keys()
    different = {name for name in shared if of_aihf[name] != of_rlhf[name]}
    assert different == {"learning_rate", "reward_learning_rate"}
    assert len(shared) > 25
    for name in ("BLOCK", "LOG_STD_MIN", "LOG_STD_MAX", "PENALTY_POINTS"):
        assert getattr(aihf, name) == getattr(rlhf, name)


# --------------------------------------------------------------------- the data with fewer pairs
def vary(cwd: Path, data: Path, **flags) -> tuple[int, str, str]:
    given = {"data-dir": data, "output-dir": "out"} | flags
    argv = [piece for name, value in given.items() for piece in (f"--{name}", value)]
    return run_script(FIGURE3_DATA, argv, cwd)


@pytest.fixture
def source(tmp_path, data) -> Path:
    folder = Path(shutil.copytree(data, tmp_path / "source"))
    tiers = {tier: {"return_mean": 4.0} for tier in ("low", "medium", "high")}
    (folder / "manifest.json").write_text(json.dumps({"tiers": tiers}))
    return folder


def pairs_of(folder: Path) -> list[str]:
    return (folder / "pairs.csv").read_text().splitlines()[1:]


def test_fewer_pairs_and_flipped_labels(tmp_path, source):
    kept = {}
    half = {"share": 0.5}
    variants = {"whole": {}, "half": half, "some": half | {"flip": 0.3}}
    variants |= {"again": variants["some"], "seed2": variants["some"] | {"seed": 2}}
    for name, flags in variants.items():
        code, out, err = vary(tmp_path, source, **{"output-dir": name}, **flags)
        assert code == 0, (out, err)
        kept[name] = pairs_of(tmp_path / name)
        for tier in ("low", "medium", "high"):
            copied = (tmp_path / name / f"{tier}.npz").read_bytes()
            assert copied == (source / f"{tier}.npz").read_bytes()
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["tiers"]["high"]["return_mean"] == 4
        assert manifest["counts"]["pairs"] == len(kept[name])
    assert kept["whole"] == pairs_of(source) and len(kept["half"]) == 20
    assert set(kept["half"]) <= set(kept["whole"])
    assert [pair[:-1] for pair in kept["some"]] == [pair[:-1] for pair in kept["half"]]
    assert sum(a != b for a, b in zip(kept["half"], kept["some"])) == 6
    assert kept["again"] == kept["some"] != kept["seed2"]
    run(tmp_path, tmp_path / "some", "--total-timesteps", 50)  # it is data as any other


def test_fewer_demonstrations(tmp_path, source):
    code, out, err = vary(tmp_path, source, demos=2)
    assert code == 0, (out, err)
    for name in ("low.npz", "medium.npz", "pairs.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    env = rlhf.make_env("helpers:Drift-v0")
    whole, two = (read.episodes(folder / "high.npz", env) for folder in (source, tmp_path / "out"))
    assert len(two.lengths) == 2 < len(whole.lengths)
    for kept, every in zip(two, whole):
        np.testing.assert_array_equal(kept, every[: len(kept)])
    high = json.loads((tmp_path / "out" / "manifest.json").read_text())["tiers"]["high"]
    with np.load(tmp_path / "out" / "high.npz") as file:
        assert high["episodes"] == 2 and high["steps"] == len(file["rewards"]) == two.lengths.sum()
        assert high["return_mean"] == pytest.approx(file["rewards"].sum() / 2)


def test_variants_are_nested(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import figure3_data

    pairs = [{"start_a": str(i), "label": str(i % 2)} for i in range(200)]
    small, large = (figure3_data.vary(pairs, share, 0.0, 1) for share in (0.1, 0.3))
    assert len(small) == 20 and len(large) == 60 and all(pair in large for pair in small)
    flipped = (figure3_data.vary(pairs, 1.0, flip, 1) for flip in (0.1, 0.3))
    few, many = ({p["start_a"] for p in variant if p not in pairs} for variant in flipped)
    assert len(few) == 20 and len(many) == 60 and few < many


BAD_VARIANTS = [
    *(({"share": 0}, "--share"), ({"flip": 1.5}, "--flip"), ({"share": 0.001}, "--share")),
    *(({"demos": 0}, "--demos"), ({"demos": 99}, "not 99"), ({"data-dir": "nowhere"}, "nowhere")),
    ({"output-dir": "source"}, "--output-dir"),
]


@pytest.mark.parametrize("flags, fragment", BAD_VARIANTS, ids=str)
def test_bad_variants(tmp_path, source, flags, fragment):
    assert_one_line_error(vary(tmp_path, source, **flags), fragment)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
