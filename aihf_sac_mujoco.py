"""AIHF with SAC: one reward from demonstrations and preferences, and one policy aligned to it, in a single loop.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et al.,
arXiv 2406.06874: Algorithm 1 on MuJoCo robots (Section 6.1, A.2.1). Equation numbers are the paper's.

    python aihf_sac_mujoco.py --env Hopper-v4

learns to hop from 10 demonstrations and 2,000 preferences between 50-step segments (data_gen/assets/mujoco/Hopper-v4),
prints the true return as it goes, used for nothing else, and writes runs/<run_name>/metrics.csv, learning_curve.png.
A run of 300,000 steps took 12 minutes on two CPU cores with other work on both.

The main loop is at the end: LOWER LEVEL aligns the policy to the reward by SAC, SAMPLE plays it, UPPER LEVEL moves the
reward along α g1 + g2, where demonstration_gradient is g1 and preference_gradient g2.

Where the paper leaves a choice, or this file departs from it, and why (benchmark/tuning has what else was tried):
- "10k demonstrations, 20k preferences" are environment steps; R(τ) of a preference is a sum over 50 steps, because sums
  over whole episodes saturate σ in (11).
- g1 (Lemma 5.1) is linear in the reward and grows without bound. Here r lies in a range, 0 to 4 where falling ends an
  episode, so that falling does not pay; and slopes above 1 between demonstrations and rollouts are penalised, as in
  Wasserstein GANs (Petzka et al. 2018). Without the penalty the reward runs into its bounds and HalfCheetah fails.
- g1's rollouts are fresh, but those of the nine policies before stay in the average, and the learning rates fall to 0:
  a reward fitted to the newest policy alone forgets what was wrong with the last but one, and the two take turns.
- R(τ) in g1 is a per-step mean by default: discounted sums (--return-form discounted, the paper's) forget what
  happens after a few hundred steps. Its scale 1 / (1 - γ) makes α = 1 mean what it does there.
- 20 Adam steps of 3e-4 on the reward per iteration, instead of one of 1e-4: the paper's runs are several times longer.
- SAC learns with 1e-3 (paper: 3e-3) and tunes the entropy coefficient β; the paper's derivation has it fixed
  (--entropy-coefficient 0.2).
"""

import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.func import grad, grad_and_value
from tqdm import tqdm


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"
    """a MuJoCo environment of Gymnasium with continuous actions"""
    seed: int = 1
    """seeds everything: networks, exploration, batches, rollouts; evaluation has fixed seeds of its own"""
    total_timesteps: int | None = None
    """SAC steps: environment steps taken to train the policy, with one update each; rollouts and evaluation are apart.
    Default: 300k for Hopper, 600k for HalfCheetah, 1M for Walker2d"""
    data_dir: str = ""
    """folder with high.npz (the demonstrations), medium.npz, low.npz and pairs.csv (the preferences between these);
    default data_gen/assets/mujoco/<env>"""

    # Upper level: the reward
    demo_weight: float = 1.0
    """the paper's alpha, on the demonstrations in (8a); 0 is RLHF's reward learning"""
    preference_weight: float = 1.0
    """weight of the preferences; 0 is maximum-likelihood inverse reinforcement learning"""
    reward_updates_per_iteration: int = 20
    """Adam steps on the reward after each policy alignment (the paper does not say; the authors' code: 1)"""
    rollout_steps_per_iteration: int = 2_000
    """fresh episodes of the current policy for g1: whole ones, until they have this many steps in all"""
    return_form: Literal["discounted", "sum", "mean"] = "mean"
    """R(tau) in g1: the paper's discounted sum, the undiscounted sum, or the per-step mean (see step_weights)"""
    segment_length: int = 50
    """steps of each side of a preference pair: at most what pairs.csv has"""
    preference_batch_size: int = 64
    """pairs in each reward update"""
    rollout_memory: int = 10
    """g1 contrasts the demonstrations with the rollouts of this many latest policies (Lemma 5.1: 1), lest the reward
    forget what is wrong with the last policy but one and the two take turns"""
    reward_learning_rate: float = 3e-4
    """Adam's, for the reward (paper: 1e-4, with several times more iterations)"""
    reward_range: tuple[float, float] | None = None
    """the reward lies between these. Default: -10 10 for HalfCheetah, which cannot fall, and 0 4 for anything else: a
    reward that is never negative does not make falling, after which all is worth 0, pay"""
    gradient_penalty: float = 1000.0
    """weight of the penalty on slopes of the reward above 1, without which Lemma 5.1's linear g1 runs into the bound"""
    penalty_batch_size: int = 500
    """points between demonstrations and rollouts where the slope is measured"""

    # Lower level: the policy
    policy_steps_per_iteration: int = 5_000
    """SAC steps in each policy alignment (paper: 5k)"""
    learning_starts: int = 5_000
    """steps of uniformly random actions before the first update"""
    learning_rate: float = 1e-3
    """Adam's, for policy, Q networks and entropy coefficient (paper: 3e-3; the authors' code: 1e-3)"""
    anneal: bool = True
    """let both learning rates fall linearly to 0 over the run, so that it ends on a settled policy (paper: no)"""
    batch_size: int = 256
    """transitions in an update"""
    entropy_coefficient: str = "auto"
    """the paper's beta: a number, or auto for the one that holds the entropy at -dim(A)"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """share of the Q networks that goes into their targets at each update"""
    hidden: tuple[int, ...] = (64, 64)
    """hidden layers of the policy, of each Q network and of the reward (the paper's)"""

    # Running
    eval_every: int = 5
    """iterations between evaluations on the true reward"""
    eval_episodes: int = 10
    """deterministic episodes in each"""
    checkpoint_every: int = 10
    """iterations between checkpoints"""
    runs_dir: str = "runs"
    """where run folders go"""
    run_name: str = ""
    """name of the run's folder; default <env>__aihf_sac_mujoco__<seed>__<time>"""
    resume: str = ""
    """a run folder to carry on from its last checkpoint, with its own arguments"""
    evaluate: str = ""
    """a run folder whose policy to evaluate instead of training"""
    compile: bool = True
    """compile the SAC update (needs a C++ compiler)"""
    cuda: bool = True
    """use a GPU when there is one; networks this small are faster on a CPU core"""
    threads: int = 1
    """CPU threads of torch"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "aihf"
    """its project"""
    wandb_entity: str | None = None
    """its team"""
    capture_video: bool = False
    """write a video of the final policy to the run folder (pip install -e '.[video]')"""


# What differs between environments: how long they take, and whether an episode can end by a fall.
ENV_DEFAULTS = {
    "Hopper": {"total_timesteps": 300_000, "reward_range": (0.0, 4.0)},
    "HalfCheetah": {"total_timesteps": 600_000, "reward_range": (-10.0, 10.0)},
    "Walker2d": {"total_timesteps": 1_000_000, "reward_range": (0.0, 4.0)},
}


# ---------------------------------------------------------------------------------------------------------- networks
# Every network is ONE flat vector of parameters, unflattened by views where it is used. The compiled update then takes
# a dozen tensors instead of a hundred, and Adam, the target update and a checkpoint are a line each.
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


def init_mlp(sizes: tuple[int, ...], rng: np.random.Generator, copies: int = 0) -> Tensor:
    """Parameters of an MLP, uniform in ±1/sqrt(fan_in) like torch.nn.Linear: (P,), or (copies, P) for a stack."""
    parts = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        parts.append(rng.uniform(-1, 1, (max(copies, 1), (fan_in + 1) * fan_out)) / math.sqrt(fan_in))
    params = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
    return params if copies else params[0]


def layers(params, sizes: tuple[int, ...]):
    """[(weight (..., fan_in, fan_out), bias (..., 1, fan_out))], views of params (..., P), a tensor or an array."""
    views, start = [], 0
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        middle, end = start + fan_in * fan_out, start + (fan_in + 1) * fan_out
        weight = params[..., start:middle].reshape(*params.shape[:-1], fan_in, fan_out)
        views.append((weight, params[..., None, middle:end]))
        start = end
    return views


def mlp(params: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """ReLU network on x (batch, fan_in): (batch, fan_out) for params (P,), (copies, batch, fan_out) for (copies, P)."""
    *hidden, (weight, bias) = layers(params, sizes)
    for hidden_weight, hidden_bias in hidden:
        x = torch.relu(x @ hidden_weight + hidden_bias)
    return x @ weight + bias


def sample_action(actor: Tensor, obs: Tensor, noise: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Actions tanh(u) in (-1, 1), u ~ N(mean, std), and their log-probabilities: (batch, act_dim), (batch,).

    noise (batch, act_dim) is standard normal. log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) is the stable form
    (Haarnoja et al. 2018, appendix C; Spinning Up).
    """
    mean, log_std = mlp(actor, obs, sizes).chunk(2, dim=-1)
    log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_det_tanh).sum(-1)


def act(actor_layers: list, obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
    """The same policy for ONE observation in NumPy, tens of microseconds instead of hundreds; noise 0 is its mode."""
    *hidden, (weight, bias) = actor_layers
    x = obs.astype(np.float32)
    for hidden_weight, hidden_bias in hidden:
        x = np.maximum(x @ hidden_weight + hidden_bias[0], 0)
    x = x @ weight + bias[0]
    mean, log_std = x[: len(x) // 2], x[len(x) // 2 :]
    return np.tanh(mean + np.exp(np.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)) * noise)


# --------------------------------------------------------------------------------------------------------------- SAC
class SAC(NamedTuple):
    """Everything an update reads and writes, in place. m and v are Adam's moments; beta is the entropy coefficient."""

    actor: Tensor  # (P_actor,)
    critics: Tensor  # (2, P_critic), the twin Q networks
    targets: Tensor  # (2, P_critic)
    log_beta: Tensor  # ()
    actor_m: Tensor
    actor_v: Tensor
    critics_m: Tensor
    critics_v: Tensor
    log_beta_m: Tensor
    log_beta_v: Tensor
    updates: Tensor  # (), how many there have been


def init_sac(actor_sizes, critic_sizes, beta: float, rng: np.random.Generator, device) -> SAC:
    actor, critics = init_mlp(actor_sizes, rng), init_mlp(critic_sizes, rng, copies=2)
    log_beta = torch.tensor(math.log(beta))
    moments = [torch.zeros_like(p) for p in (actor, actor, critics, critics, log_beta, log_beta)]
    return SAC(*(p.to(device) for p in (actor, critics, critics.clone(), log_beta, *moments, torch.tensor(0.0))))


def adam_(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, updates: Tensor, learning_rate: Tensor) -> None:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place: torch.optim would break the compiled graph."""
    m.lerp_(grad, 0.1)
    v.lerp_(grad * grad, 0.001)
    m_hat, v_hat = m / (1 - 0.9**updates), v / (1 - 0.999**updates)
    param.sub_(learning_rate * m_hat / (v_hat.sqrt() + 1e-8))


def make_sac_update(actor_sizes, critic_sizes, gamma, tau, auto_beta, target_entropy):
    """The SAC update (Haarnoja et al. 2018) as one function of tensors, fit to be compiled into one graph."""

    def update(sac: SAC, learning_rate, obs, action, reward, next_obs, terminated, noise) -> Tensor:
        """One step on a batch; noise (2, batch, act_dim). Returns (4,): Q loss, policy loss, entropy, mean Q."""
        sac.updates.add_(1)
        beta = sac.log_beta.exp()

        # Q networks: the soft Bellman backup goes on past a truncation and stops at a termination.
        next_action, next_log_prob = sample_action(sac.actor, next_obs, noise[0], actor_sizes)
        next_q = mlp(sac.targets, torch.cat([next_obs, next_action], -1), critic_sizes).squeeze(-1).amin(0)
        backup = reward + gamma * (1 - terminated) * (next_q - beta * next_log_prob)

        def critic_loss(critics):
            q = mlp(critics, torch.cat([obs, action], -1), critic_sizes).squeeze(-1)
            return ((q - backup) ** 2).mean(-1).sum(), q.mean()

        critic_grad, (q_loss, mean_q) = grad_and_value(critic_loss, has_aux=True)(sac.critics)
        adam_(sac.critics, critic_grad, sac.critics_m, sac.critics_v, sac.updates, learning_rate)

        # Policy: maximise Q + beta * entropy.
        def actor_loss(actor):
            new_action, log_prob = sample_action(actor, obs, noise[1], actor_sizes)
            q = mlp(sac.critics, torch.cat([obs, new_action], -1), critic_sizes).squeeze(-1).amin(0)
            return (beta * log_prob - q).mean(), -log_prob.mean()

        actor_grad, (pi_loss, entropy) = grad_and_value(actor_loss, has_aux=True)(sac.actor)
        adam_(sac.actor, actor_grad, sac.actor_m, sac.actor_v, sac.updates, learning_rate)

        if auto_beta:
            adam_(sac.log_beta, entropy - target_entropy, sac.log_beta_m, sac.log_beta_v, sac.updates, learning_rate)
        sac.targets.lerp_(sac.critics, tau)
        return torch.stack([q_loss, pi_loss, entropy, mean_q])

    return update


def compile_update(update, sac: SAC, obs_dim: int, act_dim: int, batch_size: int):
    """The update compiled and warmed up on copies; as it was, with a printed line, where that cannot be done."""
    shapes = [(), (batch_size, obs_dim), (batch_size, act_dim), (batch_size,), (batch_size, obs_dim), (batch_size,)]
    inputs = [torch.zeros(shape, device=sac.actor.device) for shape in (*shapes, (2, batch_size, act_dim))]
    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    print("compiling the SAC update: half a minute the first time, seconds from the cache", flush=True)
    try:
        compiled(SAC(*(tensor.clone() for tensor in sac)), *inputs)
    except Exception as error:  # whatever the compiler lacks, eager mode does not need it
        reason = str(error).strip().split("\n")[0][:80]
        print(f"torch.compile failed ({reason}): eager updates, several times slower; is there a C++ compiler?")
        return update
    return compiled


class Replay:
    """Transitions in one float32 array, a row each; `widths` are the columns of its fields, in order."""

    def __init__(self, capacity: int, widths: tuple[int, ...]):
        self.rows, self.widths, self.size = np.zeros((capacity, sum(widths)), np.float32), widths, 0

    def add(self, *fields) -> None:
        self.rows[self.size] = np.concatenate([np.atleast_1d(field) for field in fields])
        self.size += 1

    def sample(self, updates: int, batch_size: int, rng: np.random.Generator, device) -> tuple[Tensor, ...]:
        """Batches for several updates at once, a tensor (updates, batch, width) for each field."""
        index = rng.integers(self.size, size=updates * batch_size)
        rows = torch.from_numpy(self.rows.take(index, axis=0)).to(device).view(updates, batch_size, -1)
        return tuple(field.contiguous() for field in rows.split(self.widths, dim=-1))


# ------------------------------------------------------------------------------------------------ environment and data
def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """A MuJoCo environment whose actions are scaled to [-1, 1]; fails with one line on anything else."""
    gym.logger.min_level = gym.logger.ERROR  # the paper's v4 environments are called out of date at every make
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:  # the latter for the robots of v2 and v3, which have moved out
        fail(f"no environment {env_id!r} ({' '.join(str(error).split())}); try Hopper-v4")
    if not isinstance(env.action_space, gym.spaces.Box):
        fail(f"{env_id} has no continuous actions; SAC needs a Box action space, such as Hopper-v4's")
    if not isinstance(env.unwrapped, gym.envs.mujoco.MujocoEnv):
        fail(f"{env_id} is not a MuJoCo environment; try Hopper-v4, HalfCheetah-v4 or Walker2d-v4")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class Trajectories(NamedTuple):
    """Episodes end to end, N steps in all."""

    obs: np.ndarray  # (N, obs_dim)
    actions: np.ndarray  # (N, act_dim), in [-1, 1]
    lengths: np.ndarray  # (episodes,), steps of each


def load_trajectories(path: Path, env: gym.Env, how_to_make: str) -> Trajectories:
    """Read an episode file (README, Data formats). Its `rewards`, the true ones, are never touched."""
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    if not path.is_file():
        fail(f"no data at {path}; make it with `{how_to_make}`, or give --data-dir")
    keys = ("observations", "actions", "terminations", "truncations")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in keys if key not in file]:
                fail(f"{path} has no array {', '.join(missing)}; it holds {', '.join(file)}")
            observations, actions = (file[key].astype(np.float32) for key in keys[:2])
            terminations, truncations = (file[key].astype(bool) for key in keys[2:])
    except Exception as error:  # a damaged file raises almost anything
        fail(f"{path} cannot be read as an .npz of plain arrays ({error}); make it anew with `{how_to_make}`")
    shapes = [array.shape for array in (observations, actions, terminations, truncations)]
    steps, ends = terminations.size, terminations | truncations if terminations.shape == truncations.shape else None
    if steps == 0:
        fail(f"{path} is empty: it holds no step; make it anew with `{how_to_make}`")
    if shapes != [(len(observations), obs_dim), (steps, act_dim), (steps,), (steps,)]:
        wanted = f"wanted (steps + episodes, {obs_dim}), (steps, {act_dim}), (steps,), (steps,)"
        fail(f"{path} does not fit {env.spec.id}: {', '.join(keys)} are {', '.join(map(str, shapes))}; {wanted}")
    episodes = int(ends.sum())
    if not ends[-1] or len(observations) != steps + episodes:
        fail(
            f"{path}: episode ends do not add up: {steps} steps, the last one{'' if ends[-1] else ' not'} an end, and "
            f"{episodes} ends need {steps + episodes} observations; it has {len(observations)}"
        )
    for key, array in (("observations", observations), ("actions", actions)):
        if not np.isfinite(array).all():
            fail(f"{path}: {key} holds NaN or infinity in row {np.argwhere(~np.isfinite(array))[0, 0]}")
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    obs = np.delete(observations, np.cumsum(lengths + 1) - 1, axis=0)  # an episode's last observation has no action
    low, high = env.unwrapped.action_space.low, env.unwrapped.action_space.high
    return Trajectories(obs, (2 * (actions - low) / (high - low) - 1).astype(np.float32), lengths)


def load_pairs(path: Path, tiers: dict[str, Trajectories], segment_length: int, how_to_make: str) -> list[list]:
    """Read pairs.csv: for each pair [(tier, episode, start) preferred, (tier, episode, start) other]."""
    if not path.is_file():
        fail(f"no preference pairs at {path}; make them with `{how_to_make}`, or give --data-dir")
    pairs = []
    try:
        with open(path, newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                sides, where = [], f"{path} line {line}"
                for side in "ab":
                    tier, episode = row[f"tier_{side}"], int(row[f"episode_{side}"])
                    start, length = int(row[f"start_{side}"]), int(row[f"length_{side}"])
                    if tier not in tiers or not 0 <= episode < len(tiers[tier].lengths):
                        fail(f"{where}: no episode {episode} in a tier {tier!r}; the tiers are {', '.join(tiers)}")
                    if not 0 <= start <= tiers[tier].lengths[episode] - length:
                        fail(f"{where}: step {start} + {length} is past the episode's {tiers[tier].lengths[episode]}")
                    if length < segment_length:
                        fail(f"{where}: segments of {length} steps are shorter than --segment-length {segment_length}")
                    sides.append((tier, episode, start))
                if row["label"] not in ("0", "1"):
                    fail(f"{where}: label {row['label']!r}; wanted 1 (a preferred) or 0 (b preferred)")
                pairs.append(sides if row["label"] == "1" else sides[::-1])
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        fail(f"{path} is not a table of pairs ({error!r}); make it anew with `{how_to_make}`")
    if not pairs:
        fail(f"{path} is empty: it holds no pair; make it anew with `{how_to_make}`")
    return pairs


# ------------------------------------------------------------------------------------------- the reward, in equations
class Weighted(NamedTuple):
    """Steps of some trajectories, with weights such that sum(weight * r) is the mean of R over the trajectories."""

    x: Tensor  # (N, obs_dim + act_dim)
    weight: Tensor  # (N,)


def reward(theta: Tensor, x: Tensor, sizes: tuple[int, ...], low: float, high: float) -> Tensor:
    """r(s, a; θ) in (low, high) for x (..., obs_dim + act_dim): (...,). A sigmoid of slope 1 in the middle: unlike a
    clamp, it has a gradient everywhere."""
    return low + (high - low) * torch.sigmoid(4 / (high - low) * mlp(theta, x, sizes).squeeze(-1))


def step_weights(lengths: np.ndarray, form: str, gamma: float, horizon: int) -> Tensor:
    """Weights (N,) of the steps of trajectories of these lengths, so that Σ weight · r = mean over trajectories of R.

    discounted: R(τ) = Σ_t γ^t r_t, the paper's; what comes after a termination is worth 0.
    sum: R(τ) = Σ_t r_t / (horizon (1 - γ)): the same, begun at any step of the trajectory alike, not at its first.
    mean: R(τ) = Σ_t r_t / (T (1 - γ)): what a trajectory is like, however soon it ends.
    A constant reward gives all three the same R on an endless trajectory.
    """
    t, length = np.concatenate([np.arange(length) for length in lengths]), np.repeat(lengths, lengths)
    weight = {"discounted": gamma**t, "sum": 1 / (horizon * (1 - gamma)), "mean": 1 / (length * (1 - gamma))}[form]
    return torch.from_numpy((np.ones(len(t)) * weight / len(lengths)).astype(np.float32))


def demonstration_gradient(theta: Tensor, r, demos: Weighted, rollouts: Weighted) -> Tensor:
    """g1, Lemma 5.1 (28): mean over demonstrations of ∇R(τ) minus mean over the policy's rollouts of ∇R(τ'); (P,).

    r(theta, x) is the reward. ∇L1 is this over β; the constant is absorbed by α.
    """

    def gap(theta):
        return (demos.weight * r(theta, demos.x)).sum() - (rollouts.weight * r(theta, rollouts.x)).sum()

    return grad(gap)(theta)


def preference_gradient(theta: Tensor, r, preferred: Tensor, other: Tensor) -> Tensor:
    """g2, (27): mean ∇ log σ(R(τ_w) - R(τ_l)) over pairs of segments (pairs, length, obs_dim + act_dim) each; (P,)."""

    def log_likelihood(theta):
        return F.logsigmoid((r(theta, preferred) - r(theta, other)).sum(-1)).mean()

    return grad(log_likelihood)(theta)


def smoothness_gradient(theta: Tensor, r, x: Tensor) -> Tensor:
    """∇ of mean max(0, ‖∂r/∂x‖ - 1)², which is 0 where r is 1-Lipschitz, over x (N, obs_dim + act_dim): (P,)."""

    def penalty(theta):
        slope = grad(lambda x: r(theta, x).sum())(x)
        return (torch.sqrt((slope**2).sum(-1) + 1e-12) - 1).clamp(min=0).square().mean()

    return grad(penalty)(theta)


def between(data: Tensor, rollouts: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Random points (count, d) on lines from a step in the data to one of the policy (Gulrajani et al. 2017)."""
    i, j = (torch.from_numpy(rng.integers(len(x), size=count)).to(x.device) for x in (data, rollouts))
    return torch.lerp(data[i], rollouts[j], torch.from_numpy(rng.random((count, 1), np.float32)).to(data.device))


# ------------------------------------------------------------------------------------------- evaluate, save and resume
def play(env: gym.Env, actor_layers: list, seed: int, rng: np.random.Generator | None = None):
    """One episode, stochastic with an rng and deterministic without: obs (T, obs_dim), actions (T, act_dim) in [-1, 1]
    and true rewards (T,), which only evaluate may look at."""
    all_obs, all_actions, true_rewards, done = [], [], [], False
    obs, _ = env.reset(seed=seed)
    while not done:
        noise = rng.standard_normal(env.action_space.shape[0], np.float32) if rng else 0.0
        all_obs.append(obs)
        all_actions.append(act(actor_layers, obs, noise))
        obs, true_reward, terminated, truncated, _ = env.step(all_actions[-1])
        true_rewards.append(true_reward)
        done = terminated or truncated
    return np.array(all_obs, np.float32), np.array(all_actions, np.float32), np.array(true_rewards)


def rollout(env: gym.Env, actor_layers: list, steps: int, rng: np.random.Generator) -> Trajectories:
    """Whole episodes of the stochastic policy, at least `steps` in all; the true rewards are dropped unread."""
    episodes = []
    while sum(len(actions) for _, actions in episodes) < steps:
        episodes.append(play(env, actor_layers, int(rng.integers(2**31)), rng)[:2])
    obs, actions = (np.concatenate(arrays) for arrays in zip(*episodes))
    return Trajectories(obs, actions, np.array([len(actions) for _, actions in episodes]))


def evaluate(env: gym.Env, actor_layers: list, episodes: int, learned_reward) -> dict[str, float]:
    """The only reader of the true reward: deterministic episodes from fixed seeds, and how the learned reward
    correlates with the true one over their steps. learned_reward maps obs (n, ·) and actions (n, ·) to (n,)."""
    played = [play(env, actor_layers, seed=10_000 + episode) for episode in range(episodes)]
    returns = [true_rewards.sum() for _, _, true_rewards in played]
    obs, actions, true_rewards = (np.concatenate(arrays) for arrays in zip(*played))
    with np.errstate(invalid="ignore"):  # a constant reward has no correlation: nan
        correlation = np.corrcoef(learned_reward(obs, actions), true_rewards)[0, 1]
    return {
        "eval/return_mean": float(np.mean(returns)),
        "eval/return_std": float(np.std(returns)),
        "eval/length_mean": len(true_rewards) / episodes,
        "eval/reward_correlation": float(correlation),
    }


def write_atomically(path: Path, write) -> None:
    """write(path) to a temporary neighbour, flushed to disk and renamed: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_run_dir(run_dir: Path, args: Args) -> None:
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2) + "\n")
        (run_dir / "metrics.csv").write_text(",".join(METRICS) + "\n")
    except FileExistsError:
        fail(f"{run_dir} exists; carry it on with --resume {run_dir}, or give another --run-name")
    except OSError as error:
        fail(f"cannot write the run folder {run_dir} ({error.strerror}); give another --runs-dir")


def load_checkpoint(run_dir: Path, sac: SAC, theta: Tensor, data_hash: str) -> dict:
    """The run's last checkpoint; fails with one line if it is missing, damaged or does not belong to this run."""
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"no checkpoint at {path}; the run has to be started anew")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        shapes = [tensor.shape for tensor in (*state["sac"], state["theta"])]
        made_from, *_ = [state[key] for key in ("data_hash", "reward_optimizer", "replay", "recent", "rng", "progress")]
    except Exception as error:  # torch.load raises almost anything on a damaged file
        fail(f"{path} is damaged or no checkpoint of {SCRIPT}.py ({type(error).__name__}); start the run anew")
    if shapes != [tensor.shape for tensor in (*sac, theta)]:
        fail(f"{path} is of networks of other sizes; it does not belong to the run's args.json")
    if made_from != data_hash:
        fail(f"{path} was trained on other data than --data-dir now holds")
    return state


def stop_if_not_finite(step: int, run_dir: Path, **tensors: Tensor) -> None:
    """Exit code 1 with one line that names the first tensor holding NaN or infinity; the last checkpoint stays."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            message = f"\nerror: {name} is not finite at step {step}; the last good state is in {run_dir}"
            print(message, file=sys.stderr)
            raise SystemExit(1)


def record_video(env_id: str, run_dir: Path, actor_layers: list) -> Path:
    """Write a video of one deterministic episode; returns its folder."""
    env = gym.wrappers.RecordVideo(make_env(env_id, render_mode="rgb_array"), str(run_dir / "video"), lambda _: True)
    play(env, actor_layers, seed=10_000)
    env.close()
    return run_dir / "video"


def draw_learning_curve(run_dir: Path, data_dir: Path) -> str:
    """learning_curve.png from metrics.csv, with the tiers' true returns if the data has a manifest."""
    try:
        import matplotlib
    except ImportError:
        return "no learning_curve.png: pip install -e '.[plot]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/return_mean"]]
    steps, mean, std = (
        np.array([float(row[key]) for row in rows])
        for key in ("charts/sac_steps", "eval/return_mean", "eval/return_std")
    )
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(steps, mean, color="tab:orange", label="AIHF")
    axes.fill_between(steps, mean - std, mean + std, color="tab:orange", alpha=0.2, linewidth=0)
    if (data_dir / "manifest.json").is_file():
        tiers = json.loads((data_dir / "manifest.json").read_text())["tiers"]
        names = {"high": "demonstrations", "medium": "preferred", "low": "non-preferred"}
        for (tier, name), style in zip(names.items(), ("-", "--", ":")):
            axes.axhline(tiers[tier]["return_mean"], color="gray", linestyle=style, linewidth=1, label=name)
    axes.set(xlabel="SAC steps", ylabel="true return (evaluation only)", title=run_dir.name)
    axes.legend(frameon=False)
    figure.savefig(run_dir / "learning_curve.png", dpi=150)
    plt.close(figure)
    return f"learning curve in {run_dir / 'learning_curve.png'}"


# ------------------------------------------------------------------------------------------------------ the arguments
def parse_args() -> Args:
    """The command line's arguments, complete; with --resume or --evaluate, those of that run."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.resume and args.evaluate:
        fail("--resume trains a run on and --evaluate does not train: give one of them")
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate) / "args.json"
        try:
            saved = json.loads(path.read_text())
            if saved.pop("script") != SCRIPT:
                raise KeyError("script")
            saved |= {key: tuple(saved[key]) for key in ("hidden", "reward_range")}
            saved = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path} is not the args.json of a run of {SCRIPT}.py; give the run's folder, such as runs/<run_name>")
        args = tyro.cli(Args, default=saved)  # flags given now win over the run's own ...
        for field in fields(Args):  # ... where that does not make it another run
            if field.name not in MAY_CHANGE and getattr(args, field.name) != getattr(saved, field.name):
                fail(f"a run goes on with its own arguments: leave out --{field.name.replace('_', '-')}")
        return args
    defaults = ENV_DEFAULTS.get(args.env.split("-v")[0], ENV_DEFAULTS["Hopper"])
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.data_dir = args.data_dir or f"data_gen/assets/mujoco/{args.env}"
    args.run_name = args.run_name or f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}"
    return args


def check_args(args: Args) -> None:
    for field in fields(Args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value < math.inf:
                fail(f"{flag} must be a finite number and not negative: {value}")
            if value == 0 and field.name not in MAY_BE_ZERO:
                fail(f"{flag} must be more than 0")
    if args.demo_weight == args.preference_weight == 0:
        fail("--demo-weight and --preference-weight are both 0: there is nothing to learn a reward from")
    if args.total_timesteps > 10**8:
        fail("--total-timesteps must be at most 100 million: all of them are kept in memory")
    if args.gamma >= 1 or args.tau > 1:
        fail("--gamma must be below 1 and --tau at most 1")
    if not -math.inf < args.reward_range[0] < args.reward_range[1] < math.inf:
        fail("--reward-range takes two numbers, the lower one first, such as --reward-range 0 4")
    if not args.hidden or min(args.hidden) < 1:
        fail("--hidden takes one or more widths of at least 1, such as --hidden 64 64")
    try:
        assert args.entropy_coefficient == "auto" or 0 < float(args.entropy_coefficient) < math.inf
    except (AssertionError, ValueError):
        fail(f"--entropy-coefficient must be auto or a positive number, not {args.entropy_coefficient!r}")


SCRIPT = "aihf_sac_mujoco"
BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every
MAY_CHANGE = (  # from a run to its continuation
    "resume evaluate total_timesteps eval_episodes checkpoint_every compile cuda threads "
    "track wandb_project_name wandb_entity capture_video"
).split()
MAY_BE_ZERO = ("seed", "demo_weight", "preference_weight", "gradient_penalty")
METRICS = (
    "charts/iteration charts/sac_steps charts/env_steps charts/SPS charts/wall_seconds charts/episode_length "
    "losses/q losses/policy losses/entropy losses/q_mean losses/beta "
    "reward/demonstrations reward/policy reward/gap reward/max reward/preference_accuracy reward/preference_loss "
    "eval/return_mean eval/return_std eval/length_mean eval/reward_correlation"
).split()


if __name__ == "__main__":
    args = parse_args()
    check_args(args)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)  # gradients come from torch.func
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env, eval_env = make_env(args.env), make_env(args.env)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    actor_sizes, critic_sizes = (obs_dim, *args.hidden, 2 * act_dim), (obs_dim + act_dim, *args.hidden, 1)

    def to_device(*arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(device) for array in arrays]

    # ------------------------------------------------------------------------------------------------------- the data
    data_dir = Path(args.data_dir)
    how_to_make = f"python data_gen/mujoco_data.py --env {args.env}"
    used = ["high"] * (args.demo_weight > 0) + ["medium", "low"] * (args.preference_weight > 0)
    tiers = {tier: load_trajectories(data_dir / f"{tier}.npz", env, how_to_make) for tier in used}
    pairs = load_pairs(data_dir / "pairs.csv", tiers, args.segment_length, how_to_make) if "low" in tiers else []
    all_obs = np.concatenate([tier.obs for tier in tiers.values()])
    obs_mean, obs_std = to_device(all_obs.mean(0), all_obs.std(0) + 1e-6)
    arrays = [array.tobytes() for tier in tiers.values() for array in tier]
    data_hash = hashlib.sha256(b"".join(arrays) + repr(pairs).encode()).hexdigest()
    horizon = env.spec.max_episode_steps or 1000

    def features(obs: Tensor, actions: Tensor) -> Tensor:
        """What the reward network sees: standardised observations, clipped at 10 deviations, and actions."""
        return torch.cat([((obs - obs_mean) / obs_std).clamp(-10, 10), actions], -1)

    def weighted(trajectories: Trajectories) -> Weighted:
        weight = step_weights(trajectories.lengths, args.return_form, args.gamma, horizon)
        return Weighted(features(*to_device(trajectories.obs, trajectories.actions)), weight.to(device))

    data = {tier: weighted(tiers[tier]) for tier in tiers}
    anchors = data["high"].x if args.demo_weight else torch.cat([data["medium"].x, data["low"].x])
    if pairs:
        starts = {tier: np.cumsum(tiers[tier].lengths) - tiers[tier].lengths for tier in tiers}
        preferred, other = (  # (pairs, segment_length, obs_dim + act_dim) each
            torch.stack([data[tier].x[starts[tier][e] + start :][: args.segment_length] for tier, e, start in side])
            for side in zip(*pairs)
        )

    # ------------------------------------------------------------------------- what is learned: policy, Q and reward
    rng = np.random.default_rng(args.seed)  # the one source of randomness, environment resets included
    auto_beta = args.entropy_coefficient == "auto"
    sac = init_sac(actor_sizes, critic_sizes, 1.0 if auto_beta else float(args.entropy_coefficient), rng, device)
    theta = init_mlp(critic_sizes, rng).to(device).requires_grad_()
    reward_optimizer = torch.optim.Adam([theta], lr=args.reward_learning_rate)
    replay = Replay(args.total_timesteps, (obs_dim, act_dim, obs_dim, 1))
    recent: list[Trajectories] = []  # rollouts of the latest policies
    progress = {"iteration": 0, "sac_steps": 0, "env_steps": 0, "wall_seconds": 0.0, "csv_bytes": 0}

    def r(theta: Tensor, x: Tensor) -> Tensor:
        return reward(theta, x, critic_sizes, *args.reward_range)

    def learned_reward(obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return r(theta, features(*to_device(obs, actions))).cpu().numpy()

    # ----------------------------------------------------------------------- the run folder, new or of an earlier run
    run_dir = Path(args.resume or args.evaluate or Path(args.runs_dir) / args.run_name)
    checkpoint_path, csv_path = run_dir / "checkpoint.pt", run_dir / "metrics.csv"
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs wandb: pip install wandb")
    if args.capture_video:  # now, not when the run is over
        try:
            import moviepy  # noqa: F401

            video_env = make_env(args.env, render_mode="rgb_array")
            video_env.reset()
            video_env.render()
        except Exception as error:  # MuJoCo, OpenGL and EGL each have errors of their own
            reason = " ".join(str(error).split())[:100]
            fail(f"--capture-video needs pip install -e '.[video]' and a renderer, see MUJOCO_GL ({reason})")
    if args.resume or args.evaluate:
        state = load_checkpoint(run_dir, sac, theta, data_hash)
        if not csv_path.is_file():
            fail(f"no {csv_path} to carry on")
        if args.total_timesteps < state["progress"]["sac_steps"]:
            fail(f"--total-timesteps {args.total_timesteps}: the run is at {state['progress']['sac_steps']} already")
        sac, progress = SAC(*(tensor.to(device) for tensor in state["sac"])), state["progress"]
        theta.copy_(state["theta"])
        reward_optimizer.load_state_dict(state["reward_optimizer"])
        replay.rows[: len(state["replay"])], replay.size = state["replay"].numpy(), len(state["replay"])
        recent = [Trajectories(*(tensor.numpy() for tensor in tensors)) for tensors in state["recent"]]
        rng.bit_generator.state = json.loads(state["rng"])
    if args.evaluate:
        actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
        scores = evaluate(eval_env, actor_layers, args.eval_episodes, learned_reward)
        print(f"true return {scores['eval/return_mean']:.0f} ± {scores['eval/return_std']:.0f}")
        if args.capture_video:
            print(f"video in {record_video(args.env, run_dir, actor_layers)}")
        raise SystemExit
    if args.resume:
        with open(csv_path, "rb+") as file:
            file.truncate(progress["csv_bytes"])  # rows written after the checkpoint will be written again
    else:
        make_run_dir(run_dir, args)

    def save_checkpoint() -> None:
        state = {
            "sac": [tensor.cpu() for tensor in sac],
            "theta": theta.detach().cpu(),
            "reward_optimizer": reward_optimizer.state_dict(),
            "replay": torch.from_numpy(replay.rows[: replay.size]),
            "recent": [[torch.from_numpy(array) for array in trajectories] for trajectories in recent],
            "rng": json.dumps(rng.bit_generator.state),
            "progress": {**progress, "csv_bytes": csv_path.stat().st_size},
            "data_hash": data_hash,
        }
        write_atomically(checkpoint_path, lambda path: torch.save(state, path))
        model = {"actor": sac.actor, "reward": theta.detach(), "obs_mean": obs_mean, "obs_std": obs_std}
        write_atomically(run_dir / "model.safetensors", lambda path: save_file(model, path))

    if not args.resume:
        save_checkpoint()
    if args.track:
        project, entity, name = args.wandb_project_name, args.wandb_entity, run_dir.name
        wandb.init(project=project, entity=entity, name=name, id=name, resume="allow", config=asdict(args))
    interrupted, last_return = False, "not yet evaluated"
    with open(csv_path, newline="") as file:  # a resumed run has been
        for row in csv.DictReader(file):
            last_return = f"{float(row['eval/return_mean']):.0f}" if row["eval/return_mean"] else last_return

    def interrupt(signum, frame):
        global interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        tqdm.write("Ctrl-C: finishing this iteration, then saving; once more to stop at once")

    signal.signal(signal.SIGINT, interrupt)
    update = make_sac_update(actor_sizes, critic_sizes, args.gamma, args.tau, auto_beta, -float(act_dim))
    if args.compile:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    bar = tqdm(total=args.total_timesteps, initial=progress["sac_steps"], desc=args.env, unit="step", mininterval=1.0)

    step = progress["sac_steps"]
    while step < args.total_timesteps and not interrupted:
        started, first_step = time.perf_counter(), step

        # ============================================================= LOWER LEVEL (8b): align the policy to r(·; θ_k)
        last_step = min(step + args.policy_steps_per_iteration, args.total_timesteps)
        share_left = 1 - step / args.total_timesteps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * share_left, device=device)
        losses = torch.full((4,), math.nan)
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        while step < last_step:
            actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
            block = min(BLOCK, last_step - step)
            for step in range(step + 1, step + block + 1):
                if step <= args.learning_starts:
                    action = rng.uniform(-1, 1, act_dim).astype(np.float32)
                else:
                    action = act(actor_layers, obs, rng.standard_normal(act_dim, np.float32))
                next_obs, _, terminated, truncated, _ = env.step(action)
                replay.add(obs, action, next_obs, terminated)
                obs = env.reset()[0] if terminated or truncated else next_obs
            if step >= args.learning_starts:
                o, a, o2, end = replay.sample(block, args.batch_size, rng, device)
                rewards = r(theta, features(o, a))  # relabelled: today's reward for transitions of any age
                (noise,) = to_device(rng.standard_normal((block, 2, args.batch_size, act_dim), np.float32))
                for i in range(block):
                    losses = update(sac, learning_rate, o[i], a[i], rewards[i], o2[i], end[i].squeeze(-1), noise[i])
                stop_if_not_finite(step, run_dir, rewards=rewards, sac_losses=losses)
            bar.update(block)

        # ======================================================================================= SAMPLE: τ' ~ π_{k+1}
        actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
        fresh = rollout(env, actor_layers, args.rollout_steps_per_iteration, rng)
        recent = [*recent, fresh][-args.rollout_memory :]
        rollouts = weighted(Trajectories(*(np.concatenate(arrays) for arrays in zip(*recent))))

        # ================================================ UPPER LEVEL (8a): θ_{k+1} = θ_k + η (α g1 + g2), kept smooth
        reward_optimizer.param_groups[0]["lr"] = args.reward_learning_rate * share_left
        for _ in range(args.reward_updates_per_iteration):
            gradient = torch.zeros_like(theta)
            if args.demo_weight:
                gradient += args.demo_weight * demonstration_gradient(theta, r, data["high"], rollouts)
            if args.preference_weight:
                (batch,) = to_device(rng.integers(len(pairs), size=args.preference_batch_size))
                gradient += args.preference_weight * preference_gradient(theta, r, preferred[batch], other[batch])
            if args.gradient_penalty:
                points = between(anchors, rollouts.x, args.penalty_batch_size, rng)
                gradient -= args.gradient_penalty * smoothness_gradient(theta, r, points)
            theta.grad = -gradient  # Adam descends
            reward_optimizer.step()
        stop_if_not_finite(step, run_dir, reward_gradient=gradient, theta=theta, **sac._asdict())

        # ======================================================================================================== LOG
        progress["iteration"] += 1
        progress["sac_steps"] = step
        progress["env_steps"] += step - first_step + len(fresh.obs)
        finished = step >= args.total_timesteps
        r_policy = r(theta, weighted(fresh).x)
        row = {
            "charts/iteration": progress["iteration"],
            "charts/sac_steps": step,
            "charts/env_steps": progress["env_steps"],
            "charts/episode_length": fresh.lengths.mean(),
            **dict(zip(("losses/q", "losses/policy", "losses/entropy", "losses/q_mean"), losses.tolist())),
            "losses/beta": sac.log_beta.exp().item(),
            "reward/policy": r_policy.mean().item(),
            "reward/max": r_policy.max().item(),
        }
        if args.demo_weight:
            r_demos = r(theta, data["high"].x)
            row["reward/demonstrations"] = r_demos.mean().item()
            row["reward/gap"] = (r_demos.mean() - r_policy.mean()).item()
        if args.preference_weight:
            margins = (r(theta, preferred) - r(theta, other)).sum(-1)
            row["reward/preference_accuracy"] = (margins > 0).float().mean().item()
            row["reward/preference_loss"] = -F.logsigmoid(margins).mean().item()

        row["charts/SPS"] = (step - first_step) / (time.perf_counter() - started)

        # =================================================================================================== EVALUATE
        if progress["iteration"] % args.eval_every == 0 or finished:
            row |= evaluate(eval_env, actor_layers, args.eval_episodes, learned_reward)
            last_return = f"{row['eval/return_mean']:.0f}"
        progress["wall_seconds"] += time.perf_counter() - started
        row["charts/wall_seconds"] = progress["wall_seconds"]
        with open(csv_path, "a") as file:
            file.write(",".join(f"{row[name]:.9g}" if name in row else "" for name in METRICS) + "\n")
        if args.track:
            wandb.log(row, step=step)
        bar.set_postfix_str(
            f"true return {last_return}, reward gap {row.get('reward/gap', math.nan):.2f}, "
            f"preference accuracy {row.get('reward/preference_accuracy', math.nan):.2f}"
        )

        # ================================================================================================= CHECKPOINT
        if progress["iteration"] % args.checkpoint_every == 0 or finished or interrupted:
            save_checkpoint()
    bar.close()
    if interrupted and step < args.total_timesteps:
        print(f"stopped at step {step}; carry on with: python {SCRIPT}.py --resume {run_dir}")
        raise SystemExit(130)
    if args.capture_video:
        print(f"video in {record_video(args.env, run_dir, layers(sac.actor.cpu().numpy(), actor_sizes))}")
    print(f"final true return {last_return}; {draw_learning_curve(run_dir, data_dir)}")
