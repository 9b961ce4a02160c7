"""A slow reference in float64 of what the robots' two scripts share: SAC from modules, autograd and
torch.optim, and an iteration of it; the reward; Drift and its data, step by step. The trainings are
spelled out in the tests, which a recorder of a script's run helps."""

import copy
import csv
import itertools
import math
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, kl_divergence

LOW, HIGH = np.array([-1.0, -2.0]), np.array([0.5, 1.0])  # Drift's actions


def close(actual, expected, tolerance, name=""):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(),
        torch.as_tensor(expected).double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def network(*sizes):
    layers = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1]).double()


def gaussian(net, obs):
    """The policy's normal distribution before tanh, of a network with twice as many outputs."""
    mean, log_std = net(obs).chunk(2, -1)
    return Normal(mean, log_std.clamp(-20, 2).exp())


def act(net, obs, noise):
    with torch.no_grad():
        policy = gaussian(net, torch.from_numpy(obs))
        return torch.tanh(policy.mean + policy.stddev * torch.as_tensor(noise)).numpy()


def descend(optimizer, learning_rate, loss):
    optimizer.param_groups[0]["lr"] = float(learning_rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class SAC:
    """β is tuned or fixed; if fixed, the penalty is KL(π ‖ cloned) or, without a clone, log π."""

    def __init__(self, actor, critics, beta, tuned, gamma, tau, warm_up=0):
        self.actor, self.critics, self.targets = actor, critics, copy.deepcopy(critics)
        self.log_beta = torch.tensor(math.log(beta), dtype=torch.float64, requires_grad=True)
        self.tuned, self.gamma, self.tau, self.warm_up = tuned, gamma, tau, warm_up
        q_parameters = [p for critic in critics for p in critic.parameters()]
        groups = [*actor.parameters()], q_parameters, [self.log_beta]
        self.optimizers = [torch.optim.Adam(group) for group in groups]
        self.updates, self.cloned = 0, None

    def sample(self, obs, noise):
        policy = gaussian(self.actor, obs)
        u = policy.mean + policy.stddev * noise
        log_det_tanh = TanhTransform().log_abs_det_jacobian(u, u.tanh())
        log_prob = penalty = (policy.log_prob(u) - log_det_tanh).sum(-1)
        if self.cloned is not None and not self.tuned:
            penalty = kl_divergence(policy, gaussian(self.cloned, obs)).sum(-1)
        return u.tanh(), log_prob, penalty

    def q(self, critics, obs, action):
        return torch.stack([critic(torch.cat([obs, action], -1))[:, 0] for critic in critics])

    def update(self, rate, obs, action, reward, next_obs, ended, noise):
        """(6,): losses of Q and policy, entropy, Q, β, penalty."""
        self.updates += 1
        beta, policy_rate = self.log_beta.exp().item(), rate
        if self.updates <= self.warm_up:
            policy_rate = 0.0
        with torch.no_grad():
            next_action, _, penalty = self.sample(next_obs, noise[0])
            value = self.q(self.targets, next_obs, next_action).min(0).values - beta * penalty
            backup = torch.where(ended == 1, reward, reward + self.gamma * value)
        q = self.q(self.critics, obs, action)
        q_loss = ((q[0] - backup) ** 2).mean() + ((q[1] - backup) ** 2).mean()
        descend(self.optimizers[1], rate, q_loss)
        new_action, log_prob, penalty = self.sample(obs, noise[1])
        new_q = self.q(self.critics, obs, new_action).min(0).values
        loss = (beta * penalty - new_q).mean()
        descend(self.optimizers[0], policy_rate, loss)
        if self.tuned:  # haarnoja's loss of β: its entropy tends to -dim(A)
            excess = -log_prob.detach().mean() + noise.shape[-1]
            descend(self.optimizers[2], policy_rate, self.log_beta * excess)
        with torch.no_grad():
            for net, target in zip(self.critics, self.targets):
                for p, target_p in zip(net.parameters(), target.parameters()):
                    target_p.copy_((1 - self.tau) * target_p + self.tau * p)
        losses = q_loss, loss, -log_prob.mean(), q.mean(), torch.tensor(beta), penalty.mean()
        return torch.stack(losses).detach()

    def state(self):
        """Names and tensors as the scripts' checkpoints have them under `sac`."""
        nets = {"actor": {f"net.{k}": p for k, p in self.actor.named_parameters()}}
        if self.cloned is not None:
            nets["cloned"] = {f"net.{k}": p for k, p in self.cloned.named_parameters()}
        for name, pair in (("critics", self.critics), ("targets", self.targets)):
            named = [(i, k, p) for i, q in enumerate(pair, 1) for k, p in q.named_parameters()]
            nets[name] = {f"q{i}.{k}": p for i, k, p in named}
        nets["beta"] = {"log": self.log_beta}
        for net, optimizer in zip(("actor", "critics", "beta"), self.optimizers):
            for moment, name in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                nets[f"{net}_{moment}"] = {
                    key: optimizer.state.get(p, {}).get(name, torch.zeros_like(p))
                    for key, p in nets[net].items()
                }
        nets["updates"] = {"count": torch.tensor(self.updates).double()}
        named = {f"{net}.{key}": p for net, params in nets.items() for key, p in params.items()}
        return {name: p.detach().clone() for name, p in named.items()}


class Robot:
    """Drift and its time limit of 12 steps; actions in [-1, 1]."""

    def __init__(self):
        self.env = gym.make("helpers:Drift-v0", disable_env_checker=True)

    def reset(self, **seed):
        return self.env.reset(**seed)[0]

    def step(self, action):
        return self.env.step(LOW + (action + 1) / 2 * (HIGH - LOW))[:4]

    def episode(self, net, seed, noise):
        """Observations, actions and true rewards of an episode; noise() before each action."""
        obs, done, steps = self.reset(seed=int(seed)), False, []
        while not done:
            action = act(net, obs, noise())
            next_obs, true_reward, terminated, truncated = self.step(action)
            steps.append((obs, action, true_reward))
            obs, done = next_obs, terminated or truncated
        return [np.array(column) for column in zip(*steps)]


def episodes(path):
    """Read an episode file: a list of (observations, actions), the latter in [-1, 1]."""
    file, found, steps, position = np.load(path), [], [], 0
    for t, action in enumerate(file["actions"].astype(float)):
        obs = file["observations"][position].astype(float)
        steps.append((obs, (action - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)))
        position += 1
        if file["terminations"][t] or file["truncations"][t]:
            found.append([np.array(column) for column in zip(*steps)])
            steps, position = [], position + 1
    return found


def transitions(path):
    """Read an episode file: a list of [*observation, *action, *next observation, terminated]."""
    file, episode, rows = np.load(path), 0, []
    steps = [step for one in episodes(path) for step in zip(*one)]
    for t, (obs, action) in enumerate(steps):
        next_obs = file["observations"][t + episode + 1].astype(float)
        rows.append([*obs, *action, *next_obs, float(file["terminations"][t])])
        episode += file["terminations"][t] or file["truncations"][t]
    return rows


def pairs(folder: Path, tiers, features, length: int):
    """Read pairs.csv: features of the preferred and of the other segment of each pair."""
    found = []
    for row in csv.DictReader(open(folder / "pairs.csv")):
        sides = []
        for side in "ab":
            obs, actions = tiers[row[f"tier_{side}"]][int(row[f"episode_{side}"])]
            start = int(row[f"start_{side}"])
            sides.append(features(obs, actions)[start : start + length])
        found.append(sides if row["label"] == "1" else sides[::-1])
    return found


def iterate(a, sac, r, rng, replay, known, policies, block):
    """An iteration of SAC: the losses of its last update. Its transitions are appended to the
    replay, whose first `known` are demonstrated, a copy of the policy after each block to policies.
    Copies are dropped again if a greater share of its steps ended in a fall than in one of the nine
    iterations before that took no random actions."""
    robot, kept, losses = Robot(), len(policies), torch.full((6,), math.nan)
    obs, first = robot.reset(seed=int(rng.integers(2**31))), len(replay) - known
    rate = a.learning_rate * (1 - first / a.total_timesteps if a.anneal else 1)
    step, end = first, min(first + a.policy_steps_per_iteration, a.total_timesteps)
    while step < end:  # environment steps, then as many updates
        count = min(block, end - step)
        for _ in range(count):
            if step < getattr(a, "learning_starts", 0):
                action = rng.uniform(-1, 1, 2)
            else:
                action = act(sac.actor, obs, rng.standard_normal(2, np.float32))
            next_obs, _, terminated, truncated = robot.step(action)
            replay.append([*obs, *action, *next_obs, float(terminated)])
            obs = robot.reset() if terminated or truncated else next_obs
            step += 1
        if step >= getattr(a, "learning_starts", 0):
            index = rng.integers(known + step, size=(count, a.batch_size))
            noise = rng.standard_normal((count, 2, a.batch_size, 2), np.float32)
            for one, its_noise in zip(index, torch.from_numpy(noise).double()):
                batch = torch.tensor([replay[i] for i in one]).double()
                s, action, next_s, ended = batch.split([3, 2, 3, 1], -1)
                with torch.no_grad():
                    rewards = r(r.features(s, action))
                losses = sac.update(rate, s, action, rewards, next_s, ended[:, 0], its_noise)
            policies.append(copy.deepcopy(sac.actor))
    falls, size = [row[8] for row in replay[known:]], a.policy_steps_per_iteration
    random = getattr(a, "learning_starts", 0)
    before = [sum(falls[i : i + size]) / size for i in range(0, first, size) if i >= random]
    if any(sum(falls[first:]) / (step - first) > share for share in before[-9:]):
        del policies[kept:]
    return losses


class Reward:
    """r of a network; {tier: episodes} standardise its observations."""

    def __init__(self, net, tiers, bounds):
        obs = np.concatenate([obs for tier in tiers.values() for obs, _ in tier])
        self.net, (self.low, self.high) = net, bounds
        self.mean = obs.mean(0)
        self.std = np.append(obs.std(0)[:2], 1.0)  # Drift's third observation is a constant

    def features(self, obs, actions):
        standard = ((np.asarray(obs) - self.mean) / self.std).clip(-10, 10)
        return torch.from_numpy(np.concatenate([standard, actions], -1))

    def __call__(self, x):
        width = self.high - self.low
        return self.low + width / (1 + torch.exp(-4 / width * self.net(x)[..., 0]))


def scores(player, r, count):
    """What the evaluation of a policy logs."""
    played = [Robot().episode(player, 10_000 + i, lambda: [0.0, 0.0]) for i in range(count)]
    learned = [r(r.features(obs, actions)).detach().numpy() for obs, actions, _ in played]
    returns, true = zip(*((rewards.sum(), rewards) for *_, rewards in played))
    row = {"eval/return_mean": np.mean(returns), "eval/return_std": np.std(returns)}
    row["eval/length_mean"] = sum(map(len, true)) / count
    correlation = np.corrcoef(np.concatenate(learned), np.concatenate(true))[0, 1]
    return row | {"eval/reward_correlation": correlation}


SCALE = 2.5  # of a reward's first weights, so that the penalty on slopes above 1 is at work


def record(monkeypatch, script) -> list[dict]:
    """From here on a script's rewards begin so, two seconds go by before each look at the clock,
    and the list gets its checkpoints."""
    states, save, make_reward, clock = [], torch.save, script.Reward, itertools.count(0, 2)

    def scaled_reward(*arguments):
        reward = make_reward(*arguments)
        for p in reward.parameters():
            p.data *= SCALE
        return reward

    def recording_save(state, path):
        states.append(copy.deepcopy(state))
        save(state, path)

    fake_time = types.SimpleNamespace(perf_counter=clock.__next__, time_ns=lambda: 0)
    monkeypatch.setattr(script, "Reward", scaled_reward)
    monkeypatch.setattr(script, "time", fake_time)
    monkeypatch.setattr(torch, "save", recording_save)
    return states
