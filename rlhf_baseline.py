"""RLHF in its three stages, one after the other: the baseline that AIHF is compared with.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et al.,
arXiv 2406.06874: the pipeline of Sections 2, 6.1 and 6.2. Equation numbers are the paper's.

Two worlds that share little but the command line: robots, and from LANGUAGE MODELS on, language models.

    python rlhf_baseline.py mujoco --env Hopper-v4

learns from the 10 demonstrations and 2,000 preferences that aihf_sac_mujoco.py learns from, with the same networks,
reward bounds, SAC and number of SAC steps, and writes runs/<run_name>/metrics.csv, learning_curve.png. The true return
is used for nothing but evaluation.

    1. BEHAVIOUR CLONING   π⁰ = argmax_π Σ log π(a|s) over the demonstrations
    2. REWARD MODEL        θ = argmax_θ L2(θ), (11), over the preferences, and over nothing else
    3. RL                  π = argmax_π L3(π; θ), (8b), by SAC from π⁰, with θ frozen

What is done to make it strong (benchmark/tuning/rlhf.md has what else was tried):
- Cloning is maximum likelihood of the squashed Gaussian that SAC goes on with, standard deviation included: at the end
  of stage 1 the policy has the demonstrations' entropy, close to the -dim(A) that stage 3 holds it at.
- Of the demonstrations some whole episodes are held out, of the preferences some pairs; each stage keeps what does best
  on these.
- A new critic would undo the cloning in a few hundred steps. So the policy and β stand still for the first
  --critic-warmup-steps, in which the cloned policy acts and the critics learn its value. The policy's Adam moments go
  on meanwhile: begun at 0 after so many updates, its first steps would be several times too long.
- A KL penalty holds the policy near the clone, as in (4), and SAC takes small steps. The paper's robots have SAC's
  entropy bonus alone; with it (--kl-coefficient 0 --learning-rate 1e-3, β beginning where it ends in AIHF's runs)
  Hopper-v4 ended at 30 % of the clone's return, three times of three.

    python rlhf_baseline.py llm

learns from demonstrations {prompt, completion} and preferences {prompt, chosen, rejected} to write movie reviews, and
prints the held-out ground-truth score, KL and win rate over SFT as it goes; the ground truth is used for nothing else.
The score went from SFT's 2.1 to 4.5 in 60 PPO steps, which took 4 minutes on one CPU core, with the stages before.
--preset imdb and --preset hh are the paper's settings for models from the hub; `torchrun --nproc-per-node 2
rlhf_baseline.py llm` shares every batch between processes.

    1. SFT                 π_SFT = argmax_π Σ log π(y|x) over the demonstrations
    2. REWARD MODEL        θ = argmax_θ L2(θ), (11), over the preferences: a language model with a scalar head
    3. RL                  π = argmax_π E[R] - β KL(π ‖ π_SFT), (4), by PPO from π_SFT, with θ frozen

A token is an action, and the score of the whole text comes with the last one (Ziegler et al. 2019). The value network
begins as a copy of the reward model. The reward is shifted so that demonstrations are worth 0 on average. PPO's epochs
and clips, β, and the lengths are not in the paper. Reward models read text, so their tokenizers may differ from the
policy's. Stages 1 and 2 keep what does best on held-out rows, as above.
"""

import copy
import csv
import gzip
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Union

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.func import grad, grad_and_value
from tqdm import tqdm


@dataclass
class MujocoArgs:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"
    """a MuJoCo environment of Gymnasium with continuous actions"""
    seed: int = 1
    """seeds everything: networks, held-out data, batches, exploration; evaluation has fixed seeds of its own"""
    total_timesteps: int | None = None
    """SAC steps: environment steps taken to train the policy, with one update each; stages 1 and 2 take none.
    Default: 300k for Hopper, 600k for HalfCheetah, 1M for Walker2d"""
    data_dir: str = ""
    """folder with high.npz (the demonstrations), medium.npz, low.npz and pairs.csv (the preferences between these);
    default data_gen/assets/mujoco/<env>"""
    held_out_share: float = 0.1
    """share of the demonstrations' episodes, and of the pairs, that chooses what stages 1 and 2 keep"""

    # 1. Behaviour cloning
    bc_updates: int = 7_000
    """Adam steps on the policy"""
    bc_batch_size: int = 256
    """demonstrated steps in each"""
    bc_learning_rate: float = 1e-3
    """Adam's, for cloning"""

    # 2. The reward model
    reward_updates: int = 3_000
    """Adam steps on the reward"""
    segment_length: int = 50
    """steps of each side of a preference pair: at most what pairs.csv has"""
    preference_batch_size: int = 64
    """pairs in each reward update"""
    reward_learning_rate: float = 3e-4
    """Adam's, for the reward"""
    reward_range: tuple[float, float] | None = None
    """the reward lies between these. Default: -10 10 for HalfCheetah, which cannot fall, and 0 4 for anything else: a
    reward that is never negative does not make falling, after which all is worth 0, pay"""
    gradient_penalty: float = 1000.0
    """weight of the penalty on slopes of the reward above 1"""
    penalty_batch_size: int = 500
    """points between preferred and other steps where the slope is measured"""

    # 3. RL
    critic_warmup_steps: int = 10_000
    """SAC steps in which the cloned policy acts and stands still while the Q networks learn its value"""
    kl_coefficient: float = 10.0
    """beta of (4), the weight of KL(π ‖ π⁰), where π⁰ is the cloned policy. With 0 it is uniform, as the paper's robots
    have it: SAC with its entropy bonus, weighted by --entropy-coefficient. That loses what was cloned"""
    policy_steps_per_iteration: int = 5_000
    """SAC steps between two rows of metrics.csv"""
    learning_rate: float = 1e-4
    """Adam's, for policy, Q networks and entropy coefficient (paper: 3e-3; the authors' code and AIHF here: 1e-3, whose
    steps shake HalfCheetah's clone until it falls)"""
    anneal: bool = True
    """let the learning rates fall linearly to 0, in each stage, so that it ends on a settled result (paper: no)"""
    batch_size: int = 256
    """transitions in an update"""
    entropy_coefficient: str = "auto"
    """beta where π⁰ is uniform: a number, or auto for the one that holds the entropy at -dim(A)"""
    initial_entropy_coefficient: float = 0.05
    """where auto begins"""
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
    """iterations between checkpoints; stages 1 and 2 save when they end"""
    runs_dir: str = "runs"
    """where run folders go"""
    run_name: str = ""
    """name of the run's folder; default <env>__rlhf_baseline__<seed>__<time>"""
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


def log_likelihood(actor: Tensor, obs: Tensor, actions: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """log π(a|s) of sample_action's squashed Gaussian, for actions in [-1, 1]: (batch,).

    u = atanh(a), where actions closer to ±1 than 1e-6 count as that close: atanh(±1) is infinite.
    """
    mean, log_std = mlp(actor, obs, sizes).chunk(2, dim=-1)
    log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
    u = torch.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))
    log_normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return (log_normal - log_det_tanh).sum(-1)


def kl_divergence(actor: Tensor, reference: Tensor, obs: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """KL(π(·|s) ‖ π⁰(·|s)) of two squashed Gaussians, in nats: (batch,). tanh is one-to-one, so it is the KL divergence
    of the two Gaussians, exactly; log π - log π⁰ of sampled actions is wrong where float32 rounds tanh to ±1."""
    (mean, log_std), (mean_0, log_std_0) = (mlp(policy, obs, sizes).chunk(2, dim=-1) for policy in (actor, reference))
    log_std, log_std_0 = (x.clamp(LOG_STD_MIN, LOG_STD_MAX) for x in (log_std, log_std_0))
    mean_part = ((mean - mean_0) / log_std_0.exp()) ** 2
    log_ratio = log_std - log_std_0
    return 0.5 * (mean_part + (2 * log_ratio).expm1() - 2 * log_ratio).sum(-1)


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


def make_sac_update(actor_sizes, critic_sizes, gamma, tau, auto_beta, target_entropy, cloned=None):
    """The SAC update (Haarnoja et al. 2018) as one function of tensors, fit to be compiled into one graph. Its penalty
    is β KL(π ‖ π⁰) of (4) and (10): π⁰ is the cloned policy, or uniform, which leaves SAC's β log π."""

    def divergence(actor, obs, log_prob):
        return log_prob if cloned is None else kl_divergence(actor, cloned, obs, actor_sizes)

    def update(sac: SAC, learning_rate, obs, action, reward, next_obs, terminated, noise) -> Tensor:
        """One step on a batch; noise (2, batch, act_dim). Returns (5,): Q loss, policy loss, entropy, mean Q, KL."""
        sac.updates.add_(1)
        beta = sac.log_beta.exp()

        # Q networks: the soft Bellman backup goes on past a truncation and stops at a termination.
        next_action, next_log_prob = sample_action(sac.actor, next_obs, noise[0], actor_sizes)
        next_q = mlp(sac.targets, torch.cat([next_obs, next_action], -1), critic_sizes).squeeze(-1).amin(0)
        next_value = next_q - beta * divergence(sac.actor, next_obs, next_log_prob)
        backup = reward + gamma * (1 - terminated) * next_value

        def critic_loss(critics):
            q = mlp(critics, torch.cat([obs, action], -1), critic_sizes).squeeze(-1)
            return ((q - backup) ** 2).mean(-1).sum(), q.mean()

        critic_grad, (q_loss, mean_q) = grad_and_value(critic_loss, has_aux=True)(sac.critics)
        adam_(sac.critics, critic_grad, sac.critics_m, sac.critics_v, sac.updates, learning_rate)

        # Policy: maximise Q - beta * KL.
        def actor_loss(actor):
            new_action, log_prob = sample_action(actor, obs, noise[1], actor_sizes)
            q = mlp(sac.critics, torch.cat([obs, new_action], -1), critic_sizes).squeeze(-1).amin(0)
            kl = divergence(actor, obs, log_prob)
            return (beta * kl - q).mean(), (-log_prob.mean(), kl.mean())

        actor_grad, (pi_loss, (entropy, kl)) = grad_and_value(actor_loss, has_aux=True)(sac.actor)
        adam_(sac.actor, actor_grad, sac.actor_m, sac.actor_v, sac.updates, learning_rate)

        if auto_beta:
            adam_(sac.log_beta, entropy - target_entropy, sac.log_beta_m, sac.log_beta_v, sac.updates, learning_rate)
        sac.targets.lerp_(sac.critics, tau)
        return torch.stack([q_loss, pi_loss, entropy, mean_q, kl])

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


# ------------------------------------------------------------------------------------- what is learned, in equations
def standardise_inputs_(params: Tensor, mean: Tensor, std: Tensor, sizes: tuple[int, ...]) -> None:
    """Change the first layer, in place, so that the MLP makes of x (batch, fan_in) what it made of (x - mean) / std."""
    weight, bias = layers(params, sizes)[0]
    weight.div_(std[:, None])
    bias.sub_(mean @ weight)


def reward(theta: Tensor, x: Tensor, sizes: tuple[int, ...], low: float, high: float) -> Tensor:
    """r(s, a; θ) in (low, high) for x (..., obs_dim + act_dim): (...,). A sigmoid of slope 1 in the middle: unlike a
    clamp, it has a gradient everywhere."""
    return low + (high - low) * torch.sigmoid(4 / (high - low) * mlp(theta, x, sizes).squeeze(-1))


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


def hold_out(count: int, share: float, what: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """0 … count - 1 in random order, parted into those to learn from and those held out, at least one of each."""
    if count < 2:
        fail(f"only {count} {what}: at least 2 are needed, because one is held out")
    index, held_out = rng.permutation(count), min(max(1, round(share * count)), count - 1)
    return index[held_out:], index[:held_out]


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


def make_run_dir(run_dir: Path, args, metrics: list[str]) -> None:
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2) + "\n")
        (run_dir / "metrics.csv").write_text(",".join(metrics) + "\n")
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
        shapes = [tensor.shape for tensor in (*state["sac"], state["theta"], state["cloned"])]
        made_from, *_ = [state[key] for key in ("data_hash", "replay", "rng", "progress")]
    except Exception as error:  # torch.load raises almost anything on a damaged file
        fail(f"{path} is damaged or no checkpoint of {SCRIPT}.py ({type(error).__name__}); start the run anew")
    if shapes != [tensor.shape for tensor in (*sac, theta, sac.actor)]:
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
    axes.plot(steps, mean, color="tab:blue", label="RLHF")
    axes.fill_between(steps, mean - std, mean + std, color="tab:blue", alpha=0.2, linewidth=0)
    axes.axhline(mean[0], color="tab:green", linewidth=1, label="behaviour cloning")
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
def arguments_of_run(args, world: str, may_change: list[str]):
    """The arguments of the run that --resume or --evaluate names, but what is given now and may change; else None."""
    if args.resume and args.evaluate:
        fail("--resume trains a run on and --evaluate does not train: give one of them")
    if args.resume or args.evaluate:
        path, kind = Path(args.resume or args.evaluate) / "args.json", type(args)
        try:
            saved = json.loads(path.read_text())
            if saved.pop("script") != SCRIPT:
                raise KeyError("script")
            saved = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path} is not the args.json of a run of {SCRIPT}.py {world}; give the run's folder, runs/<run_name>")
        args = tyro.cli(kind, default=saved, args=sys.argv[2:])  # flags given now win over the run's own ...
        for field in fields(kind):  # ... where that does not make it another run
            if field.name not in may_change and getattr(args, field.name) != getattr(saved, field.name):
                fail(f"a run goes on with its own arguments: leave out --{field.name.replace('_', '-')}")
        return args
    return None


def complete(args: MujocoArgs) -> MujocoArgs:
    """The arguments with what the environment decides; with --resume or --evaluate, those of that run."""
    if of_run := arguments_of_run(args, "mujoco", MAY_CHANGE):
        return of_run
    defaults = ENV_DEFAULTS.get(args.env.split("-v")[0], ENV_DEFAULTS["Hopper"])
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.data_dir = args.data_dir or f"data_gen/assets/mujoco/{args.env}"
    args.run_name = args.run_name or f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}"
    return args


def check_numbers(args, may_be_zero) -> None:
    for field in fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value < math.inf:
                fail(f"{flag} must be a finite number and not negative: {value}")
            if value == 0 and field.name not in may_be_zero:
                fail(f"{flag} must be more than 0")


def check_args(args: MujocoArgs) -> None:
    check_numbers(args, MAY_BE_ZERO)
    if args.total_timesteps > 10**8:
        fail("--total-timesteps must be at most 100 million: all of them are kept in memory")
    if args.gamma >= 1 or args.tau > 1 or args.held_out_share >= 1:
        fail("--gamma and --held-out-share must be below 1 and --tau at most 1")
    if not -math.inf < args.reward_range[0] < args.reward_range[1] < math.inf:
        fail("--reward-range takes two numbers, the lower one first, such as --reward-range 0 4")
    if not args.hidden or min(args.hidden) < 1:
        fail("--hidden takes one or more widths of at least 1, such as --hidden 64 64")
    try:
        assert args.entropy_coefficient == "auto" or 0 < float(args.entropy_coefficient) < math.inf
    except (AssertionError, ValueError):
        fail(f"--entropy-coefficient must be auto or a positive number, not {args.entropy_coefficient!r}")
    if args.kl_coefficient and args.entropy_coefficient != "auto":
        fail("--entropy-coefficient is for a uniform π⁰: give --kl-coefficient 0 with it, or leave it out")


SCRIPT = "rlhf_baseline"
BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every
CHECK_EVERY = 50  # updates of stages 1 and 2 between looks at the held-out data
MAY_CHANGE = (  # from a run to its continuation
    "resume evaluate total_timesteps eval_episodes checkpoint_every compile cuda threads "
    "track wandb_project_name wandb_entity capture_video"
).split()
MAY_BE_ZERO = ("seed", "gradient_penalty", "critic_warmup_steps", "kl_coefficient")
LOSSES = ("losses/q", "losses/policy", "losses/entropy", "losses/q_mean", "losses/kl")
METRICS = (
    "charts/iteration charts/sac_steps charts/env_steps charts/SPS charts/wall_seconds charts/episode_length "
    "bc/updates bc/log_likelihood bc/held_out_log_likelihood "
    "losses/q losses/policy losses/entropy losses/q_mean losses/kl losses/beta "
    "reward/updates reward/held_out_accuracy reward/held_out_loss "
    "reward/demonstrations reward/policy reward/gap reward/max reward/preference_accuracy reward/preference_loss "
    "eval/return_mean eval/return_std eval/length_mean eval/reward_correlation"
).split()


def mujoco(args: MujocoArgs) -> None:
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
    tiers = {tier: load_trajectories(data_dir / f"{tier}.npz", env, how_to_make) for tier in ("high", "medium", "low")}
    pairs = load_pairs(data_dir / "pairs.csv", tiers, args.segment_length, how_to_make)
    all_obs = np.concatenate([tier.obs for tier in tiers.values()])
    obs_mean, obs_std = to_device(all_obs.mean(0), all_obs.std(0) + 1e-6)
    arrays = [array.tobytes() for tier in tiers.values() for array in tier]
    data_hash = hashlib.sha256(b"".join(arrays) + repr(pairs).encode()).hexdigest()
    rng = np.random.default_rng(args.seed)  # the one source of randomness, environment resets included
    demos = tiers["high"]
    episodes = hold_out(len(demos.lengths), args.held_out_share, f"episode in {data_dir / 'high.npz'}", rng)
    pair_rows = hold_out(len(pairs), args.held_out_share, f"pair in {data_dir / 'pairs.csv'}", rng)

    def features(obs: Tensor, actions: Tensor) -> Tensor:
        """What the reward network sees: standardised observations, clipped at 10 deviations, and actions."""
        return torch.cat([((obs - obs_mean) / obs_std).clamp(-10, 10), actions], -1)

    data = {tier: features(*to_device(tiers[tier].obs, tiers[tier].actions)) for tier in tiers}
    starts = {tier: np.cumsum(tiers[tier].lengths) - tiers[tier].lengths for tier in tiers}
    preferred, other = (  # (pairs, segment_length, obs_dim + act_dim) each
        torch.stack([data[tier][starts[tier][e] + start :][: args.segment_length] for tier, e, start in side])
        for side in zip(*pairs)
    )

    # ------------------------------------------------------------------------- what is learned: policy, Q and reward
    auto_beta = args.entropy_coefficient == "auto" and not args.kl_coefficient
    beta = args.initial_entropy_coefficient if auto_beta else args.kl_coefficient or float(args.entropy_coefficient)
    sac = init_sac(actor_sizes, critic_sizes, beta, rng, device)
    theta = init_mlp(critic_sizes, rng).to(device).requires_grad_()
    cloned = sac.actor.clone()  # stage 1's result, when there is one
    replay = Replay(args.total_timesteps, (obs_dim, act_dim, obs_dim, 1))
    progress = {"stage": 1, "iteration": 0, "sac_steps": 0, "wall_seconds": 0.0, "csv_bytes": 0}

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
        cloned.copy_(state["cloned"])
        replay.rows[: len(state["replay"])], replay.size = state["replay"].numpy(), len(state["replay"])
        rng.bit_generator.state = json.loads(state["rng"])
    if args.evaluate:
        if progress["stage"] == 1:
            fail(f"{run_dir} has not cloned a policy yet; carry it on with --resume {run_dir}")
        actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
        scores = evaluate(eval_env, actor_layers, args.eval_episodes, learned_reward)
        print(f"true return {scores['eval/return_mean']:.0f} ± {scores['eval/return_std']:.0f}")
        if args.capture_video:
            print(f"video in {record_video(args.env, run_dir, actor_layers)}")
        return
    if args.resume:
        with open(csv_path, "rb+") as file:
            file.truncate(progress["csv_bytes"])  # rows written after the checkpoint will be written again
    else:
        make_run_dir(run_dir, args, METRICS)

    def save_checkpoint() -> None:
        state = {
            "sac": [tensor.cpu() for tensor in sac],
            "theta": theta.detach().cpu(),
            "cloned": cloned.cpu(),
            "replay": torch.from_numpy(replay.rows[: replay.size]),
            "rng": json.dumps(rng.bit_generator.state),
            "progress": {**progress, "csv_bytes": csv_path.stat().st_size},
            "data_hash": data_hash,
        }
        write_atomically(checkpoint_path, lambda path: torch.save(state, path))
        model = {"actor": sac.actor, "cloned_actor": cloned, "reward": theta.detach()}
        model |= {"obs_mean": obs_mean, "obs_std": obs_std}
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

    def log(row: dict, started: float) -> None:
        progress["wall_seconds"] += time.perf_counter() - started
        row["charts/iteration"], row["charts/wall_seconds"] = progress["iteration"], progress["wall_seconds"]
        row["charts/sac_steps"] = row["charts/env_steps"] = progress["sac_steps"]
        with open(csv_path, "a") as file:
            file.write(",".join(f"{row[name]:.9g}" if name in row else "" for name in METRICS) + "\n")
        if args.track:
            wandb.log(row, step=progress["sac_steps"])

    def interrupt(signum, frame):
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        tqdm.write("Ctrl-C: finishing this iteration, then saving; once more to stop at once")

    def stop_if_interrupted(where: str) -> None:
        if interrupted:
            print(f"stopped {where}; carry on with: python {SCRIPT}.py mujoco --resume {run_dir}")
            raise SystemExit(130)

    signal.signal(signal.SIGINT, interrupt)

    # ================================================= 1. BEHAVIOUR CLONING: maximise Σ log π(a|s) over demonstrations
    if progress["stage"] == 1:
        started = time.perf_counter()
        obs, actions = to_device(demos.obs, demos.actions)
        mean, std = obs.mean(0), obs.std(0) + 1e-6
        x = (obs - mean) / std  # what the network sees while it is cloned
        of_step = np.repeat(np.arange(len(demos.lengths)), demos.lengths)  # which episode
        train, held_out = (torch.from_numpy(np.flatnonzero(np.isin(of_step, part))).to(device) for part in episodes)
        actor = sac.actor.clone().requires_grad_()
        optimizer = torch.optim.Adam([actor], lr=args.bc_learning_rate)

        def score(actor: Tensor, rows: Tensor) -> Tensor:
            return log_likelihood(actor, x[rows], actions[rows], actor_sizes).mean()

        best = (0, -math.inf)  # updates, held-out log-likelihood
        for updates in tqdm(range(1, args.bc_updates + 1), "1. behaviour cloning", mininterval=1.0):
            if args.anneal:
                optimizer.param_groups[0]["lr"] = args.bc_learning_rate * (1 - (updates - 1) / args.bc_updates)
            batch = train[to_device(rng.integers(len(train), size=args.bc_batch_size))[0]]
            actor.grad = -grad(score)(actor, batch)
            optimizer.step()
            if updates % CHECK_EVERY == 0 or updates == args.bc_updates:
                value = score(actor, held_out)
                stop_if_not_finite(0, run_dir, held_out_log_likelihood=value, cloned_policy=actor)
                if value > best[1]:
                    best = (updates, value.item())
                    cloned.copy_(actor)
                stop_if_interrupted("in stage 1, which will begin anew")
        row = {"bc/updates": best[0], "bc/held_out_log_likelihood": best[1]}
        row["bc/log_likelihood"] = score(cloned, train).item()
        standardise_inputs_(cloned, mean, std, actor_sizes)  # from here on the policy sees observations as they are
        sac.actor.copy_(cloned)
        row |= evaluate(eval_env, layers(cloned.cpu().numpy(), actor_sizes), args.eval_episodes, learned_reward)
        del row["eval/reward_correlation"]  # there is no reward yet
        last_return = f"{row['eval/return_mean']:.0f}"
        print(
            f"cloned policy after {best[0]} updates: held-out log-likelihood {best[1]:.2f}, true return {last_return}"
        )
        log(row, started)
        progress["stage"] = 2
        save_checkpoint()

    # ================================================== 2. REWARD MODEL: maximise L2(θ), (11), over the preferences
    if progress["stage"] == 2:
        started = time.perf_counter()
        train, held_out = to_device(*pair_rows)
        optimizer = torch.optim.Adam([theta], lr=args.reward_learning_rate)
        steps = [side[train].flatten(0, 1) for side in (preferred, other)]
        best, best_theta = (0, math.inf), theta.clone()  # updates, held-out loss

        def margins(rows: Tensor) -> Tensor:
            return (r(theta, preferred[rows]) - r(theta, other[rows])).sum(-1)

        for updates in tqdm(range(1, args.reward_updates + 1), "2. reward model", mininterval=1.0):
            if args.anneal:
                optimizer.param_groups[0]["lr"] = args.reward_learning_rate * (1 - (updates - 1) / args.reward_updates)
            batch = train[to_device(rng.integers(len(train), size=args.preference_batch_size))[0]]
            gradient = preference_gradient(theta, r, preferred[batch], other[batch])
            if args.gradient_penalty:
                points = between(*steps, args.penalty_batch_size, rng)
                gradient -= args.gradient_penalty * smoothness_gradient(theta, r, points)
            theta.grad = -gradient  # Adam descends
            optimizer.step()
            if updates % CHECK_EVERY == 0 or updates == args.reward_updates:
                loss = -F.logsigmoid(margins(held_out)).mean()
                stop_if_not_finite(0, run_dir, held_out_preference_loss=loss, theta=theta)
                if loss < best[1]:
                    best = (updates, loss.item())
                    best_theta.copy_(theta)
                stop_if_interrupted("in stage 2, which will begin anew")
        theta.copy_(best_theta)
        accuracy = (margins(held_out) > 0).float().mean().item()
        row = {"reward/updates": best[0], "reward/held_out_loss": best[1], "reward/held_out_accuracy": accuracy}
        row["reward/preference_accuracy"] = (margins(train) > 0).float().mean().item()
        row["reward/preference_loss"] = -F.logsigmoid(margins(train)).mean().item()
        row["reward/demonstrations"] = r(theta, data["high"]).mean().item()
        scores = evaluate(eval_env, layers(cloned.cpu().numpy(), actor_sizes), args.eval_episodes, learned_reward)
        row["eval/reward_correlation"] = scores["eval/reward_correlation"]
        print(
            f"reward model after {best[0]} updates: held-out pairs ordered rightly {accuracy:.0%}, loss {best[1]:.3f}"
        )
        log(row, started)
        progress["stage"] = 3
        save_checkpoint()

    # ================================================= 3. RL: maximise L3(π; θ), (8b), with θ frozen, by SAC from π⁰
    reference = cloned if args.kl_coefficient else None
    update = make_sac_update(actor_sizes, critic_sizes, args.gamma, args.tau, auto_beta, -float(act_dim), reference)
    if args.compile:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    step, r_demos = progress["sac_steps"], r(theta, data["high"]).mean().item()
    bar = tqdm(total=args.total_timesteps, initial=step, desc=f"3. SAC, {args.env}", unit="step", mininterval=1.0)
    while step < args.total_timesteps and not interrupted:
        started, first_step = time.perf_counter(), step
        last_step = min(step + args.policy_steps_per_iteration, args.total_timesteps)
        share_left = 1 - step / args.total_timesteps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * share_left, device=device)
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        resets = 1
        while step < last_step:
            actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
            block = min(BLOCK, last_step - step)
            for step in range(step + 1, step + block + 1):
                action = act(actor_layers, obs, rng.standard_normal(act_dim, np.float32))
                next_obs, _, terminated, truncated, _ = env.step(action)
                replay.add(obs, action, next_obs, terminated)
                obs, resets = (env.reset()[0], resets + 1) if terminated or truncated else (next_obs, resets)
            o, a, o2, end = replay.sample(block, args.batch_size, rng, device)
            rewards = r(theta, features(o, a))
            (noise,) = to_device(rng.standard_normal((block, 2, args.batch_size, act_dim), np.float32))
            for i in range(block):
                losses = update(sac, learning_rate, o[i], a[i], rewards[i], o2[i], end[i].squeeze(-1), noise[i])
                if step <= args.critic_warmup_steps:
                    sac.actor.copy_(cloned)
                    sac.log_beta.fill_(math.log(beta))
            stop_if_not_finite(step, run_dir, rewards=rewards, sac_losses=losses)
            bar.update(block)
        stop_if_not_finite(step, run_dir, **sac._asdict())

        # ======================================================================================================== LOG
        progress["iteration"] += 1
        progress["sac_steps"] = step
        finished = step >= args.total_timesteps
        obs_now, actions_now = np.split(replay.rows[first_step:step, : obs_dim + act_dim], [obs_dim], axis=1)
        r_policy = learned_reward(obs_now, actions_now)
        row = {
            "charts/episode_length": (step - first_step) / resets,
            **dict(zip(LOSSES if args.kl_coefficient else LOSSES[:-1], losses.tolist())),
            "losses/beta": sac.log_beta.exp().item(),
            "reward/demonstrations": r_demos,
            "reward/policy": r_policy.mean(),
            "reward/gap": r_demos - r_policy.mean(),
            "reward/max": r_policy.max(),
            "charts/SPS": (step - first_step) / (time.perf_counter() - started),
        }

        # =================================================================================================== EVALUATE
        if progress["iteration"] % args.eval_every == 0 or finished:
            actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
            row |= evaluate(eval_env, actor_layers, args.eval_episodes, learned_reward)
            last_return = f"{row['eval/return_mean']:.0f}"
        log(row, started)
        bar.set_postfix_str(f"true return {last_return}, learned reward {row['reward/policy']:.2f}")

        # ================================================================================================= CHECKPOINT
        if progress["iteration"] % args.checkpoint_every == 0 or finished or interrupted:
            save_checkpoint()
    bar.close()
    if step < args.total_timesteps:
        stop_if_interrupted(f"at step {step}")
    if args.capture_video:
        print(f"video in {record_video(args.env, run_dir, layers(sac.actor.cpu().numpy(), actor_sizes))}")
    print(f"final true return {last_return}; {draw_learning_curve(run_dir, data_dir)}")


# ===================================================================================================== LANGUAGE MODELS
# From here on nothing is shared with the robots but fail, write_atomically, stop_if_not_finite and the run folder.
ASSETS = "data_gen/assets/imdb"


@dataclass
class LlmArgs:
    preset: Literal["", "imdb", "hh"] = ""
    """the paper's settings (Table 2) for models from the hub; flags given beside it win"""
    model_name_or_path: str = f"{ASSETS}/model"
    """the base policy: a causal language model, a folder or hub id"""
    reward_model_path: str = ""
    """base of the reward model, default: the base policy. A sequence classifier whose head is trained (one output, or
    two: score = logit 1 - logit 0) is the reward model as it is: stage 2 is left out"""
    sft_model_path: str = ""
    """the policy to start stage 3 from, and its reference: stage 1 is left out"""
    ground_truth_path: str = f"{ASSETS}/classifier"
    """a sequence classifier, for evaluation alone; '' for none"""
    demonstrations: str = f"{ASSETS}/demonstrations.jsonl"
    """rows {prompt, completion}: .jsonl, .jsonl.gz or a hub id"""
    preferences: str = f"{ASSETS}/preferences.jsonl"
    """rows {prompt, chosen, rejected}"""
    num_demonstrations: int = 1000
    """rows of the demonstrations that are used, the first ones; 0 for all"""
    num_preferences: int = 1000
    """rows of the preferences, likewise"""
    prompts: str = f"{ASSETS}/prompts.jsonl"
    """rows {prompt}; the last --eval-prompts are for evaluation"""
    seed: int = 1
    """seeds everything: heads, held-out data, batches, sampling; evaluation has a fixed seed of its own"""
    held_out_share: float = 0.1
    """share of the demonstrations, and of the preferences, that chooses what stages 1 and 2 keep"""
    max_prompt_length: int = 64
    """tokens; of a longer prompt the policy reads the last ones"""
    response_length: int = 24
    """tokens of a response at most"""
    temperature: float = 1.0
    """of sampling; logits are divided by it in every log-probability of stage 3"""
    append_eos: bool = False
    """end demonstrations that are shorter than --response-length with the end token (they may also spell it out)"""
    micro_batch_size: int = 64
    """rows in one forward and backward pass of a process; the result does not depend on it"""
    anneal: bool = True
    """let the learning rates fall linearly to 0, in each stage"""
    max_grad_norm: float = 1.0
    """gradients are cut to this norm"""

    # 1. Supervised fine-tuning
    sft_epochs: float = 3.0
    """passes over the demonstrations"""
    sft_batch_size: int = 32
    """demonstrations in a step, those of all processes together, as in all batch sizes"""
    sft_learning_rate: float = 1e-4
    """Adam's"""

    # 2. The reward model
    reward_epochs: float = 2.0
    """passes over the preferences"""
    reward_batch_size: int = 32
    """pairs in a step"""
    reward_learning_rate: float = 1e-3
    """Adam's"""

    # 3. PPO
    ppo_steps: int = 60
    """batches of responses"""
    batch_size: int = 64
    """responses in each"""
    minibatch_size: int = 32
    """responses in an optimiser step"""
    ppo_epochs: int = 2
    """passes over each batch"""
    learning_rate: float = 3e-4
    """Adam's, for the policy"""
    value_learning_rate: float = 3e-4
    """Adam's, for the value network"""
    gamma: float = 1.0
    """discount"""
    gae_lambda: float = 0.95
    """of generalised advantage estimation"""
    clip: float = 0.2
    """probability ratios count up to 1 ± this"""
    value_clip: float = 0.2
    """values move at most this far from the old ones"""
    kl_coefficient: float = 0.02
    """β of (4) and (10), where the controller begins if it is adaptive"""
    adaptive_kl: bool = False
    """steer β so that the KL divergence goes to --target-kl (Ziegler et al. 2019)"""
    target_kl: float = 6.0
    """nats a response"""
    kl_horizon: float = 10_000.0
    """episodes in which an adaptive β changes by a factor of about e at most 20 % error a step"""
    missing_eos_penalty: float = 0.0
    """taken from the score of a response without the end token"""

    # Running
    eval_prompts: int = 256
    """held-out prompts"""
    eval_every: int = 5
    """PPO steps between evaluations"""
    samples: int = 3
    """rows of the table of samples on screen"""
    checkpoint_every: int = 10
    """PPO steps between checkpoints; stages 1 and 2 save at each tenth of their way"""
    save_every: int = 0
    """PPO steps between copies of the policy, policy_<step> in the run folder; 0 for the last one only, in policy"""
    runs_dir: str = "runs"
    """where run folders go"""
    run_name: str = ""
    """name of the run's folder; default llm__rlhf_baseline__<seed>__<time>"""
    resume: str = ""
    """a run folder to carry on from its last checkpoint, with its own arguments"""
    evaluate: str = ""
    """a run folder whose policy to evaluate instead of training"""
    cuda: bool = True
    """use a GPU when there is one, in bfloat16 with float32 weights and log-probabilities"""
    threads: int = 2
    """CPU threads of torch, of each process"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "aihf"
    """its project"""
    wandb_entity: str | None = None
    """its team"""


PRESETS = {  # Table 2 and Section 6; what it leaves open is chosen as in the libraries for these models
    "imdb": {
        "model_name_or_path": "gpt2",
        "ground_truth_path": "lvwerra/distilbert-imdb",
        "num_demonstrations": 0,
        "num_preferences": 0,
        "sft_learning_rate": 1e-5,
        "reward_learning_rate": 1e-5,
        "reward_batch_size": 128,
        "kl_coefficient": 0.05,
        "learning_rate": 1.41e-5,
        "value_learning_rate": 1.41e-5,
        "batch_size": 256,
        "minibatch_size": 64,
        "ppo_epochs": 4,
        "ppo_steps": 1000,
    },
    "hh": {
        "model_name_or_path": "EleutherAI/pythia-160m",
        "reward_model_path": "EleutherAI/pythia-1.4b",
        "ground_truth_path": "",  # beaver-7b-v3.0-reward is no architecture of transformers' own
        **{name: f"runs/hh_data/{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")},
        "num_demonstrations": 0,
        "num_preferences": 0,
        "max_prompt_length": 512,
        "response_length": 128,
        "append_eos": True,
        "missing_eos_penalty": 1.0,
        "sft_epochs": 1.0,
        "sft_learning_rate": 1e-5,
        "reward_epochs": 1.0,
        "reward_learning_rate": 1e-5,
        "reward_batch_size": 8,
        "kl_coefficient": 0.05,
        "learning_rate": 1e-6,
        "value_learning_rate": 1e-6,
        "batch_size": 4,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "ppo_steps": 6000,
        "eval_every": 500,
        "checkpoint_every": 500,
    },
}
LLM_MAY_CHANGE = (
    "resume evaluate ppo_steps eval_every samples checkpoint_every save_every micro_batch_size cuda threads "
    "track wandb_project_name wandb_entity"
).split()
LLM_MAY_BE_ZERO = (
    "seed num_demonstrations num_preferences kl_coefficient missing_eos_penalty save_every samples".split()
)
LLM_METRICS = (
    "charts/stage charts/step charts/episodes charts/episodes_per_second charts/wall_seconds "
    "sft/loss sft/held_out_loss "
    "rewards/loss rewards/held_out_loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    "objective/kl objective/scores objective/entropy objective/rlhf_reward objective/kl_coefficient "
    "losses/policy losses/value losses/approx_kl losses/clip_fraction losses/ratio "
    "charts/response_length charts/ended_share "
    "eval/gt_score eval/gt_score_std eval/kl eval/kl_base eval/win_rate eval/learned_score eval/reward_correlation "
    "eval/response_length"
).split()


# --------------------------------------------------------------------------------- several processes (torchrun), or one
# Process r of n holds rows r, r + n, r + 2n ... of every batch. Whatever is normalised (losses by tokens, advantages by
# mean and deviation) is normalised over the rows of all, so the number of processes changes nothing.
def processes() -> tuple[int, int]:
    """(rank, how many)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(rows):
    """This process's share of rows, a list, array or tensor."""
    rank, count = processes()
    return rows[rank::count]


def all_rows(x: Tensor) -> Tensor:
    """The inverse of mine, for a tensor (rows, ...) with as many rows in every process."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(processes()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def all_texts(texts: list[str]) -> list[str]:
    """The same for texts."""
    parts = [texts] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, texts)
    return [text for rows in zip(*parts) for text in rows]


def distributed(module: torch.nn.Module) -> torch.nn.Module:
    """The module, to be called where gradients are wanted: DistributedDataParallel averages these over processes."""
    return torch.nn.parallel.DistributedDataParallel(module) if processes()[1] > 1 else module


# ---------------------------------------------------------------------------------------------- data and tokens
def is_local(name: str) -> bool:
    """A path rather than a hub id, which is `name` or `owner/name`."""
    return Path(name).exists() or name[:1] in (".", "~", "/") or name.count("/") > 1 or ".jsonl" in name


def check_path(name: str, flag: str) -> None:
    if is_local(name) and not Path(name).exists():
        made_by = {"model": "pretrain", "classifier": "classifier"}.get(Path(name).name, "tiers")
        hint = f"; make it with `python data_gen/imdb_data.py {made_by}`" if name.startswith(ASSETS) else ""
        fail(f"there is no {name}{hint or f'; give another --{flag}'}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_texts(name: str, flag: str, columns: tuple[str, ...], count: int = 0) -> list[tuple[str, ...]]:
    """The columns of a .jsonl(.gz) file, or of a hub data set's split train: of its first `count` rows, or of all."""
    check_path(name, flag)
    try:
        if is_local(name):
            with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        else:
            from datasets import load_dataset

            rows = list(load_dataset(name, split="train"))
    except ImportError:
        fail(f"there is no file {name}; to read it from the hub, pip install -e '.[hub]'")
    except Exception as error:  # no JSON, no UTF-8, half a .gz; or of the network, the hub, the cache ...
        fail(f"cannot read --{flag} {name} ({one_line(error)})")
    if len(rows) < count:
        fail(f"--{flag} {name} has {len(rows)} rows, --num-{flag} asks for {count}; 0 takes all")
    rows = rows[: count or None]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key] for key in columns)):
            fail(f"row {number} of {name} needs text under {', '.join(columns)}")
    return [tuple(row[key] for key in columns) for row in rows] or fail(f"--{flag} {name} is empty")


def pad_rows(rows: list[list[int]], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, int64 (rows, longest) each. The mask goes by length: a text may hold the pad token."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


def in_parts(rows, size: int) -> list:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def draw(count: int, size: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Batch number `step` of `size` rows of a stream of shuffled epochs: a resumed run needs no more to go on."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, -(-last // count))
    stream = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs])
    return stream[first % count :][:size]


# ----------------------------------------------------------------------------------------------------------- models
# Dropout is off because the models stay in evaluation mode, as from_pretrained returns them.
def load_pretrained(kind: str, name: str, flag: str, **kwargs):
    """A tokenizer, configuration or float32 model of a transformers Auto class; no remote code is ever run, and of
    pickled weights only tensors are read. Fails with one line."""
    import transformers

    check_path(name, flag)
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # of the network, the hub, the files, an unknown architecture ...
        fail(f"cannot load --{flag} {name} ({one_line(error)})")


def half_on_cuda(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def positions(mask: Tensor) -> Tensor:
    """Positions that begin at 0 with each row's first token, wherever the padding is: (rows, tokens)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Policy(torch.nn.Module):
    """π: a causal language model, of which nothing is wanted but log-probabilities of responses and their sampling."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        parameters = inspect.signature(lm.forward).parameters
        self.can_keep = "logits_to_keep" in parameters  # older versions of transformers cannot
        self.cache = "cache" if "cache" in parameters else "past_key_values"  # as they call it

    def logits(self, length: int, **inputs):
        """Logits of the last `length` positions, float32 (rows, length, vocabulary), and the cache."""
        with half_on_cuda(inputs["input_ids"].device):
            out = self.lm(**inputs, **({"logits_to_keep": length} if self.can_keep else {}))
        return out.logits[:, -length:].float(), getattr(out, self.cache)

    def forward(self, ids: Tensor, mask: Tensor, length: int, temperature: float = 1.0) -> Tensor:
        """log π(y_t | x, y_<t) of the last `length` tokens of ids, float32 (rows, length); ids and mask (rows, tokens)
        hold prompts padded on the left and responses padded on the right. Padding gets a number, to be masked."""
        logits, _ = self.logits(
            length + 1, input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        return token_log_probs(logits[:, :-1], ids[:, -length:], temperature)

    @torch.no_grad()
    def sample(self, ids: Tensor, mask: Tensor, uniform: Tensor, temperature: float, eos_id: int, pad_id: int):
        """Responses to prompts ids, mask (rows, P) padded on the left: (rows, N'), padded after the end token.

        uniform (rows, N) in [0, 1) holds the randomness: token t is where the cumulative probability passes it, so no
        row depends on its batch. Ends when every row has, at N tokens at the latest.
        """
        tokens, where, cache = [], positions(mask), None
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for u in uniform.unbind(1):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": where, self.cache: cache}
            logits, cache = self.logits(1, **inputs, use_cache=True)
            cumulative = (logits[:, -1] / temperature).softmax(-1).double().cumsum(-1)
            chosen = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
            ids = torch.where(ended[:, None], pad_id, chosen.clamp(max=logits.shape[-1] - 1))
            tokens.append(ids)
            ended |= ids[:, 0] == eos_id
            if ended.all():
                break
            mask, where = torch.cat([mask, torch.ones_like(ids)], 1), where[:, -1:] + 1
        return torch.cat(tokens, 1)


class Scorer(torch.nn.Module):
    """r and V: a sequence classifier as a number at every token. Reward model: its number at the last token of a text.
    Value network: the same, at every state. Right-padded or left-padded, by mask."""

    def __init__(self, model, tokenizer, pad_id: int):
        super().__init__()
        self.model, self.tokenizer, self.pad_id = model, tokenizer, pad_id
        self.is_decoder = hasattr(model, "score")  # GPT-2, GPT-NeoX, Llama ...: a linear head on every token
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.limit = min([limit for limit in limits if limit] + [10**6])
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (rows, tokens), float32, of ids and mask (rows, tokens)."""
        with half_on_cuda(ids.device):
            if self.is_decoder:
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
                logits = self.model.score(self.model.base_model(**inputs, use_cache=False)[0]).float()
            else:  # BERT and its like read the whole text at once
                logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
                logits = logits[:, None].expand(-1, ids.shape[1], -1)
        return logits[..., -1] - (logits[..., 0] if logits.shape[-1] == 2 else 0) - self.offset

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the right; of a text that is too long the end is read."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        return tuple(x.to(self.offset.device) for x in pad_rows(rows, self.pad_id))

    @torch.no_grad()
    def score(self, texts: list[str], rows_at_once: int) -> Tensor:
        """(texts,)"""
        inputs = map(self.encode, in_parts(texts, rows_at_once))
        return torch.cat([at_last(self(ids, mask), mask) for ids, mask in inputs])


def load_tokenizer(name: str, flag: str):
    """(tokenizer, id of the end token, id of the padding), the latter two distinct."""
    tokenizer = load_pretrained("AutoTokenizer", name, flag)
    tokenizer.truncation_side = "left"
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad_id is None or pad_id == eos_id:  # which token it is does not matter, masks go by length
        pad_id = int(eos_id == 0)
    return tokenizer, eos_id, pad_id


def load_scorer(name: str, flag: str, must_be_trained: bool, device: torch.device) -> tuple[Scorer, bool]:
    """A scorer, and whether its head was there: otherwise it is one output, new."""
    config = load_pretrained("AutoConfig", name, flag)
    trained = any("SequenceClassification" in kind for kind in config.architectures or ())
    one_output = {} if trained else {"num_labels": 1}
    model, info = load_pretrained(
        "AutoModelForSequenceClassification", name, flag, output_loading_info=True, **one_output
    )
    if model.config.num_labels > 2 or (must_be_trained or trained) and info["missing_keys"]:
        fail(f"--{flag} {name} has no trained head of one or two outputs: it is no reward model")
    tokenizer, _, pad_id = load_tokenizer(name, flag)
    return Scorer(model.float(), tokenizer, pad_id).to(device).eval(), trained


# ----------------------------------------------------------------------------------------- what PPO does, in equations
def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at tokens: (rows, N) of logits (rows, N, vocabulary) and tokens (rows, N)."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, tokens) at each row's last token, for texts padded on the right: (rows,)."""
    return x.gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


def response_mask(responses: Tensor, eos_id: int) -> Tensor:
    """1 up to and with the first end token, 0 after it: int64 (rows, N)."""
    ends = (responses == eos_id).long()
    return (ends.cumsum(-1) - ends == 0).long()


def token_rewards(log_ratio: Tensor, scores: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """(4) and (10) token by token: -β log(π/π_SFT) at each, plus the score at the last (the end token if there is one).

    log_ratio and mask (rows, N), scores (rows,); returns (rows, N), 0 after the end (Ziegler et al. 2019, (2)).
    """
    last = (positions(mask)[:, -1:] == torch.arange(mask.shape[1], device=mask.device)).float()
    return (-kl_coefficient * log_ratio + scores[:, None] * last) * mask


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float):
    """Advantages and returns, (rows, N) each (Schulman et al. 2016, (16)); rewards, values and mask are (rows, N).

    The value after the end is 0. values[:, t] is that of the state in which token t is chosen. Returns are those of the
    value network, A + V, before any whitening.
    """
    values = values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    delta = (rewards + gamma * next_values - values) * mask
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (rows, N) where mask is 1, over the rows of all processes: ()."""
    total, count = all_rows(torch.stack([(x * mask).sum(), mask.sum()])[None]).sum(0)
    return total / count


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, N) with mean 0 and variance 1 where mask is 1, over the rows of all processes; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token and the probability ratio, (rows, N) each (Schulman et al. 2017, (7))."""
    ratio = (log_probs - old_log_probs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token, (rows, N); to move a value further than clip gains nothing."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Proportional control of log β (Ziegler et al. 2019, 2.2)."""
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of x and y (rows,), ties in the order they come."""
    return torch.corrcoef(torch.stack([x, y]).argsort().argsort().double())[0, 1].item()


# --------------------------------------------------------------------------------------------------------- arguments
def complete_llm(args: LlmArgs) -> LlmArgs:
    """The arguments with those of the preset; with --resume or --evaluate, those of that run."""
    if of_run := arguments_of_run(args, "llm", LLM_MAY_CHANGE):
        return of_run
    if args.preset:
        args = tyro.cli(LlmArgs, default=LlmArgs(**PRESETS[args.preset]), args=sys.argv[2:])
    args.run_name = args.run_name or f"llm__{SCRIPT}__{args.seed}__{int(time.time())}"
    return args


def check_llm_args(args: LlmArgs) -> None:
    check_numbers(args, LLM_MAY_BE_ZERO)
    if args.gamma > 1 or args.gae_lambda > 1 or args.held_out_share >= 1:
        fail("--gamma and --gae-lambda must be at most 1 and --held-out-share below 1")
    if args.batch_size % args.minibatch_size:
        fail("--batch-size must be a multiple of --minibatch-size")
    count = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("sft_batch_size", "reward_batch_size", "minibatch_size", "eval_prompts"):
        if getattr(args, name) % count:
            fail(f"--{name.replace('_', '-')} must be a multiple of the {count} processes")


def load_llm_checkpoint(run_dir: Path) -> dict:
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"no checkpoint at {path}; the run has to be started anew")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not {"stage", "step", "csv_bytes"} <= set(state["progress"]) or not {"parts", "data_hash"} <= set(state):
            raise KeyError
    except Exception as error:  # torch.load raises almost anything on a damaged file
        fail(f"{path} is damaged or no checkpoint of {SCRIPT}.py llm ({type(error).__name__}); start the run anew")
    return state


def llm(args: LlmArgs) -> None:
    import transformers  # here, as robots need none

    transformers.logging.set_verbosity_error()  # a new head is no news
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        name = [args.run_name]
        dist.broadcast_object_list(name)  # it has the time in it
        args.run_name = name[0]
    rank, count = processes()
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs wandb: pip install wandb")

    # ------------------------------------------------------------------------------ the run so far, models and data
    run_dir = Path(args.resume or args.evaluate or Path(args.runs_dir) / args.run_name)
    csv_path = run_dir / "metrics.csv"
    state = load_llm_checkpoint(run_dir) if args.resume or args.evaluate else None
    progress = {"stage": 1, "step": 0, "episodes": 0, "wall_seconds": 0.0, "csv_bytes": 0, "losses": []}
    progress |= {"best": math.inf, "kl_coefficient": args.kl_coefficient, **(state["progress"] if state else {})}

    sft_path = args.sft_model_path or str(run_dir / "sft" if progress["stage"] > 1 else args.model_name_or_path)
    flag = "sft-model-path" if args.sft_model_path else "model-name-or-path"
    tokenizer, eos_id, pad_id = load_tokenizer(sft_path, flag)
    if eos_id is None:
        fail(f"--{flag} {sft_path} has no end-of-text token")
    policy = Policy(load_pretrained("AutoModelForCausalLM", sft_path, flag).float()).to(device).eval()
    limit = getattr(policy.lm.config, "max_position_embeddings", None) or math.inf
    if args.max_prompt_length + args.response_length > limit:
        fail(f"--max-prompt-length and --response-length together must be at most the {limit} that {sft_path} reads")
    torch.manual_seed(args.seed)  # of the reward model's head
    reward_path = args.reward_model_path or args.model_name_or_path
    reward, given = load_scorer(reward_path, "reward-model-path", False, device)
    if progress["stage"] == 3 and not given:
        reward, _ = load_scorer(str(run_dir / "reward"), "resume", True, device)
    judge = None
    if args.ground_truth_path:  # for evaluation, and for nothing else
        judge, _ = load_scorer(args.ground_truth_path, "ground-truth-path", True, device)

    demos = pairs = []
    if not args.sft_model_path or not given:
        columns = ("prompt", "completion")
        demos = read_texts(args.demonstrations, "demonstrations", columns, args.num_demonstrations)
    if not given:
        pairs = read_texts(args.preferences, "preferences", ("prompt", "chosen", "rejected"), args.num_preferences)
    prompts = [prompt for (prompt,) in read_texts(args.prompts, "prompts", ("prompt",))]
    if len(prompts) <= args.eval_prompts:
        fail(f"--prompts {args.prompts} has {len(prompts)} rows: too few for --eval-prompts {args.eval_prompts}")
    data_hash = hashlib.sha256(repr((demos, pairs, prompts)).encode()).hexdigest()
    if state and state["data_hash"] != data_hash:
        fail(f"{run_dir / 'checkpoint.pt'} was trained on other data than the data flags now give")
    if progress["stage"] == 3 and args.ppo_steps < progress["step"]:
        fail(f"--ppo-steps {args.ppo_steps}: the run is at {progress['step']} already")
    if state and not csv_path.is_file():
        fail(f"no {csv_path} to carry on")
    held_out_rng = np.random.default_rng([args.seed, 0])
    splits = [
        hold_out(len(rows), args.held_out_share, f"row in {name}", held_out_rng) if rows else ()
        for rows, name in ((demos, args.demonstrations), (pairs, args.preferences))
    ]

    def token_ids(texts: list[str], **kwargs) -> list[list[int]]:
        return tokenizer(texts, **kwargs)["input_ids"]

    prompt_ids = token_ids(prompts, truncation=True, max_length=args.max_prompt_length)
    train_prompts, eval_prompts = prompts[: -args.eval_prompts], prompts[-args.eval_prompts :]
    train_ids, eval_ids = prompt_ids[: -args.eval_prompts], prompt_ids[-args.eval_prompts :]

    # ----------------------------------------------------------------------------------- the run folder, log and state
    if progress["stage"] == 1 and args.sft_model_path:
        progress["stage"] = 2
    if progress["stage"] == 2 and given:
        progress["stage"] = 3
    if args.evaluate and progress["stage"] < 3:
        fail(f"{run_dir} has not come to PPO yet; carry it on with --resume {run_dir}")
    if args.resume and rank == 0:
        with open(csv_path, "rb+") as file:
            file.truncate(progress["csv_bytes"])  # rows written after the checkpoint will be written again
    elif not args.evaluate and rank == 0:
        make_run_dir(run_dir, args, LLM_METRICS)
    if args.track and rank == 0 and not args.evaluate:
        project, entity, name = args.wandb_project_name, args.wandb_entity, run_dir.name
        wandb.init(project=project, entity=entity, name=name, id=name, resume="allow", config=asdict(args))
    interrupted = False

    def interrupt(signum, frame):
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        tqdm.write("Ctrl-C: finishing this step, then saving; once more to stop at once")

    signal.signal(signal.SIGINT, interrupt)

    def is_interrupted() -> bool:
        """Whether any of the processes is."""
        return bool(all_rows(torch.tensor([float(interrupted)], device=device)).any())

    def stop() -> None:
        if rank == 0:
            where = f"in stage {progress['stage']} after step {progress['step']}"
            print(f"stopped {where}; carry on with: python {SCRIPT}.py llm --resume {run_dir}")
        raise SystemExit(130)

    def save_checkpoint(**modules_and_optimizers) -> None:
        if rank == 0:
            parts = {name: part.state_dict() for name, part in modules_and_optimizers.items()}
            now = {**progress, "csv_bytes": csv_path.stat().st_size}
            state = {"progress": now, "data_hash": data_hash, "parts": parts}
            write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    def load(**modules_and_optimizers) -> bool:
        """What save_checkpoint saved, if that was in this stage; whether it was."""
        found = state and state["progress"]["stage"] == progress["stage"] and state["parts"]
        for name, part in modules_and_optimizers.items() if found else ():
            part.load_state_dict(state["parts"][name])
        return bool(found)

    def save_model(model, its_tokenizer, name: str) -> None:
        if rank == 0:
            temporary = run_dir / f".{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary)
            its_tokenizer.save_pretrained(temporary)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(temporary, run_dir / name)
        if count > 1:
            dist.barrier()

    def log(row: dict) -> None:
        if rank == 0:
            row |= {f"charts/{name}": progress[name] for name in ("stage", "step", "episodes", "wall_seconds")}
            with open(csv_path, "a") as file:
                file.write(",".join(f"{row[name]:.9g}" if name in row else "" for name in LLM_METRICS) + "\n")
            if args.track:
                wandb.log(row)

    if not state:
        save_checkpoint()

    def fit(name: str, module, rows: np.ndarray, size: int, epochs: float, learning_rate: float, batch_loss, held_out):
        """Adam on batch_loss, which leaves gradients, for stages 1 and 2; in the end the module is as when it did best
        in held_out(), which gives (loss, row for the log) and is asked ten times."""
        steps = max(1, math.ceil(epochs * len(rows) / size))
        optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
        best = copy.deepcopy(module)
        load(module=module, optimizer=optimizer, best=best)
        forward = distributed(module)
        bar = tqdm(total=steps, initial=progress["step"], desc=name, mininterval=1.0, disable=rank > 0)
        for step in range(progress["step"], steps):
            started = time.perf_counter()
            if args.anneal:
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            batch = rows[draw(len(rows), size, step, (args.seed, progress["stage"]))]
            loss = batch_loss(forward, batch)
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)
            stop_if_not_finite(step, run_dir, loss=loss, gradient=norm)
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] = step + 1
            progress["losses"].append(loss.item())
            is_check = (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps
            if is_check:
                value, row = held_out()
                if value < progress["best"]:
                    progress["best"] = value
                    best.load_state_dict(module.state_dict())
                prefix = "sft" if progress["stage"] == 1 else "rewards"
                row |= {f"{prefix}/loss": np.mean(progress["losses"]), f"{prefix}/held_out_loss": value}
                progress["losses"] = []
                bar.set_postfix_str(f"held-out loss {value:.3f}")
            progress["wall_seconds"] += time.perf_counter() - started
            bar.update()
            if is_check:
                log(row)
            if (leave := is_interrupted()) or is_check:
                save_checkpoint(module=module, optimizer=optimizer, best=best)
            if leave:
                stop()
        bar.close()
        module.load_state_dict(best.state_dict())

    def next_stage(stage: int) -> None:
        progress.update(stage=stage, step=0, best=math.inf, losses=[])
        save_checkpoint()

    # ================================================================ 1. SFT: maximise Σ log π(y|x) over demonstrations
    if progress["stage"] == 1:
        demo_prompts = token_ids([p for p, _ in demos], truncation=True, max_length=args.max_prompt_length)
        completions = token_ids([y for _, y in demos], add_special_tokens=False)
        if args.append_eos:
            completions = [ids + [eos_id] for ids in completions]
        completions = [ids[: args.response_length] for ids in completions]

        def nll(policy, rows) -> Tensor:
            """Σ -log π over the completions' tokens, ()."""
            left = pad_rows([demo_prompts[i] for i in rows], pad_id, left=True)
            right = pad_rows([completions[i] for i in rows], pad_id)
            ids, mask = (torch.cat(pair, 1).to(device) for pair in zip(left, right))
            return -(policy(ids, mask, right[1].shape[1]) * right[1].to(device)).sum()

        def sft_loss(policy, batch) -> Tensor:
            tokens, total = sum(len(completions[i]) for i in batch), torch.zeros((), device=device)
            for part in in_parts(mine(batch), args.micro_batch_size):
                loss = nll(policy, part) / tokens
                (loss * count).backward()  # because gradients are averaged over processes
                total += loss.detach()
            return all_rows(total[None]).sum()

        @torch.no_grad()
        def sft_held_out() -> tuple[float, dict]:
            rows = splits[0][1]
            total = sum(nll(policy, part).item() for part in in_parts(rows, args.micro_batch_size))
            return total / sum(len(completions[i]) for i in rows), {}

        sizes = args.sft_batch_size, args.sft_epochs, args.sft_learning_rate
        fit("1. SFT", policy, splits[0][0], *sizes, sft_loss, sft_held_out)
        save_model(policy.lm, tokenizer, "sft")
        sft_path = str(run_dir / "sft")
        next_stage(3 if given else 2)

    # ========================================================= 2. REWARD MODEL: maximise L2(θ), (11), over preferences
    if progress["stage"] == 2:
        encode = reward.encode  # of the model itself: margins is also given a distributed one

        def margins(reward, rows) -> tuple[Tensor, Tensor]:
            """R of the chosen and of the rejected responses, (rows,) each."""
            ids, mask = encode([pairs[i][0] + pairs[i][side] for side in (1, 2) for i in rows])
            return at_last(reward(ids, mask), mask).chunk(2)

        def reward_loss(reward, batch) -> Tensor:
            total = torch.zeros((), device=device)
            for part in in_parts(mine(batch), args.micro_batch_size):
                chosen, rejected = margins(reward, part)
                loss = -F.logsigmoid(chosen - rejected).sum() / len(batch)
                (loss * count).backward()
                total += loss.detach()
            return all_rows(total[None]).sum()

        @torch.no_grad()
        def reward_held_out() -> tuple[float, dict]:
            scores = [margins(reward, part) for part in in_parts(splits[1][1], args.micro_batch_size)]
            chosen, rejected = (torch.cat(side) for side in zip(*scores))
            margin = chosen - rejected
            row = {"chosen": chosen, "rejected": rejected, "margins": margin, "accuracies": (margin > 0).float()}
            row = {f"rewards/{name}": x.mean().item() for name, x in row.items()}
            return -F.logsigmoid(margin).mean().item(), row

        sizes = args.reward_batch_size, args.reward_epochs, args.reward_learning_rate
        fit("2. reward model", reward, splits[1][0], *sizes, reward_loss, reward_held_out)
        save_model(reward.model, reward.tokenizer, "reward")
        next_stage(3)

    # ============================================================ 3. RL: maximise (4), E[R] - β KL(π ‖ π_SFT), by PPO
    if demos:  # the reward is free up to a constant: let demonstrations be worth 0
        reward.offset.copy_(reward.score([p + y for p, y in demos], args.micro_batch_size).mean())
    if reward.is_decoder and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        value = copy.deepcopy(reward)
    else:  # it cannot read the policy's tokens
        value, _ = load_scorer(sft_path, flag, False, device)
        value.model.score.weight.data.zero_()
    reference = copy.deepcopy(policy).requires_grad_(False)
    base = None
    if load_tokenizer(args.model_name_or_path, "model-name-or-path")[0].get_vocab() == tokenizer.get_vocab():
        base = Policy(load_pretrained("AutoModelForCausalLM", args.model_name_or_path, "model-name-or-path").float())
        base = base.to(device).eval().requires_grad_(False)
    reward.requires_grad_(False)
    optimizers = [torch.optim.Adam(module.parameters()) for module in (policy, value)]
    learning_rates = args.learning_rate, args.value_learning_rate
    current = {"policy": policy, "value": value, "optimizer": optimizers[0], "value_optimizer": optimizers[1]}
    resumed = load(**current)
    policy_forward, value_forward = distributed(policy), distributed(value)

    def respond(policy: Policy, prompts: list[list[int]], uniform: np.ndarray):
        """Prompts with sampled responses, ids and mask (rows, P + N); the responses' mask (rows, N) and texts."""
        ids, mask = (x.to(device) for x in pad_rows(prompts, pad_id, left=True))
        uniform = torch.from_numpy(uniform).to(device)
        responses = policy.sample(ids, mask, uniform, args.temperature, eos_id, pad_id)
        ended = response_mask(responses, eos_id)
        rows = [row[:n].tolist() for row, n in zip(responses, ended.sum(-1).tolist())]
        decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts = [tokenizer.decode(row, **decode) for row in rows]
        return torch.cat([ids, responses], 1), torch.cat([mask, ended], 1), ended, texts

    @torch.no_grad()
    def by_parts(function, *tensors: Tensor) -> Tensor:
        return torch.cat([function(*part) for part in zip(*(x.split(args.micro_batch_size) for x in tensors))])

    def log_probs_of(policy: Policy, ids: Tensor, mask: Tensor, ended: Tensor) -> Tensor:
        length = ended.shape[1]
        return by_parts(lambda ids, mask: policy(ids, mask, length, args.temperature), ids, mask) * ended

    eval_uniform = np.random.default_rng(10_000).random((args.eval_prompts, args.response_length))

    def evaluate_policy(policy: Policy) -> tuple[dict[str, Tensor], list[str]]:
        """For each held-out prompt: ground-truth and learned score, log-ratio to the reference (in the mean, KL), the
        same to the base model, tokens, (prompts,) each; the responses. The only reader of the ground truth."""
        prompts, uniform = mine(eval_prompts), mine(eval_uniform)
        ids, mask, ended, texts = respond(policy, mine(eval_ids), uniform)
        log_probs = log_probs_of(policy, ids, mask, ended)
        whole = [prompt + text for prompt, text in zip(prompts, texts)]
        scores = {"kl": (log_probs - log_probs_of(reference, ids, mask, ended)).sum(-1)}
        if base:
            scores["kl_base"] = (log_probs - log_probs_of(base, ids, mask, ended)).sum(-1)
        scores["response_length"] = ended.sum(-1).float()
        scores["learned_score"] = reward.score(whole, args.micro_batch_size)
        if judge:
            scores["gt_score"] = judge.score(whole, args.micro_batch_size)
        return {name: all_rows(x) for name, x in scores.items()}, all_texts(texts)

    sft_scores, sft_texts = evaluate_policy(reference)

    def evaluation(scores: dict[str, Tensor], texts: list[str]) -> dict[str, float]:
        row = {f"eval/{name}": x.mean().item() for name, x in scores.items()}
        if judge:
            truth, sft_truth = scores["gt_score"], sft_scores["gt_score"]
            row["eval/gt_score_std"] = truth.std().item()
            row["eval/win_rate"] = ((truth > sft_truth).float() + 0.5 * (truth == sft_truth)).mean().item()
            row["eval/reward_correlation"] = rank_correlation(scores["learned_score"], truth)
        if rank == 0:
            lines = [f"after {progress['step']} PPO steps: " + summary(row)]
            for i in range(min(args.samples, len(texts))):
                both = ((sft_scores, sft_texts, "SFT"), (scores, texts, "now"))
                lines.append(f"  prompt      | {' '.join(eval_prompts[i].split())[-100:]}")
                for numbers, words, who in both:
                    score = f"{numbers['gt_score' if judge else 'learned_score'][i].item():6.2f}"
                    lines.append(f"  {who}  {score} | {' '.join(words[i].split())[:100]}")
            tqdm.write("\n".join(lines))
            write_atomically(run_dir / "samples.jsonl", lambda path: path.write_text(jsonl(scores, texts)))
        return row

    def jsonl(scores: dict[str, Tensor], texts: list[str]) -> str:
        columns = {"prompt": eval_prompts, "response": texts, **{name: x.tolist() for name, x in scores.items()}}
        return "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))

    def summary(row: dict) -> str:
        truth = f"ground truth {row['eval/gt_score']:.2f} (SFT {sft_scores['gt_score'].mean():.2f}), " if judge else ""
        wins = f", win rate over SFT {row['eval/win_rate']:.0%}" if judge else ""
        return f"{truth}learned score {row['eval/learned_score']:.2f}, KL {row['eval/kl']:.2f}{wins}"

    if args.evaluate:
        print(summary(evaluation(*evaluate_policy(policy))))
        return
    if not resumed:
        log(evaluation(sft_scores, sft_texts))
        save_checkpoint(**current)
    last = None
    bar = tqdm(
        total=args.ppo_steps, initial=progress["step"], desc="3. PPO", unit="step", mininterval=1.0, disable=rank > 0
    )
    for step in range(progress["step"], args.ppo_steps):
        started = time.perf_counter()

        # -------------------------------------------------------------------------------------------- sample and score
        rows = mine(draw(len(train_ids), args.batch_size, step, (args.seed, 3)))
        uniform = mine(np.random.default_rng([args.seed, 4, step]).random((args.batch_size, args.response_length)))
        ids, mask, ended, texts = respond(policy, [train_ids[i] for i in rows], uniform)
        length = ended.shape[1]
        old_log_probs, reference_log_probs = (log_probs_of(p, ids, mask, ended) for p in (policy, reference))
        old_values = by_parts(value, ids, mask)[:, -length - 1 : -1] * ended
        scores = reward.score([train_prompts[i] + text for i, text in zip(rows, texts)], args.micro_batch_size)
        has_eos = ((ids[:, -length:] == eos_id) * ended).any(-1).float()
        log_ratio, penalised = old_log_probs - reference_log_probs, scores - args.missing_eos_penalty * (1 - has_eos)
        rewards = token_rewards(log_ratio, penalised, ended, progress["kl_coefficient"])
        advantages, returns = generalised_advantages(rewards, old_values, ended, args.gamma, args.gae_lambda)
        advantages = whiten(advantages, ended)

        # ------------------------------------------------------------------------------------------------------ update
        for optimizer, learning_rate in zip(optimizers, learning_rates):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / args.ppo_steps if args.anneal else 1)
        statistics = []  # of each minibatch: policy loss, value loss, approximate KL, clipped share, mean ratio
        minibatches = torch.arange(len(ids), device=device).split(args.minibatch_size // count)
        for minibatch in minibatches * args.ppo_epochs:  # their rows are random already
            tokens = all_rows(ended[minibatch].sum()[None]).sum()
            sums = torch.zeros(5, device=device)
            for part in minibatch.split(args.micro_batch_size):
                weight = ended[part] / tokens
                log_probs = policy_forward(ids[part], mask[part], length, args.temperature) * ended[part]
                losses, ratio = policy_losses(log_probs, old_log_probs[part], advantages[part], args.clip)
                (losses * weight * count).sum().backward()  # because gradients are averaged over processes
                values = value_forward(ids[part], mask[part])[:, -length - 1 : -1] * ended[part]
                errors = value_losses(values, old_values[part], returns[part], args.value_clip)
                (errors * weight * count).sum().backward()
                with torch.no_grad():
                    change, clipped = log_probs - old_log_probs[part], ((ratio - 1).abs() > args.clip).float()
                    sums += torch.stack([(x * weight).sum() for x in (losses, errors, change**2 / 2, clipped, ratio)])
            statistics.append(all_rows(sums[None]).sum(0))
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), args.max_grad_norm) for m in (policy, value)]
            stop_if_not_finite(step, run_dir, losses=statistics[-1], gradients=torch.stack(norms))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        # ======================================================================================================== LOG
        progress["step"] = step + 1
        progress["episodes"] += args.batch_size
        names = ("losses/policy", "losses/value", "losses/approx_kl", "losses/clip_fraction")
        row = dict(zip(names, torch.stack(statistics).mean(0).tolist()))
        row["losses/ratio"] = statistics[0][4].item()  # of the first minibatch: 1, or something is wrong
        columns = [log_ratio.sum(-1), scores, -old_log_probs.sum(-1), rewards.sum(-1), ended.sum(-1).float(), has_eos]
        names = "objective/kl objective/scores objective/entropy objective/rlhf_reward charts/response_length".split()
        row |= dict(zip([*names, "charts/ended_share"], all_rows(torch.stack(columns, 1)).mean(0).tolist()))
        row["objective/kl_coefficient"] = progress["kl_coefficient"]
        row["charts/episodes_per_second"] = args.batch_size / (time.perf_counter() - started)
        if args.adaptive_kl:
            settings = row["objective/kl"], args.target_kl, args.batch_size, args.kl_horizon
            progress["kl_coefficient"] = adapt_kl_coefficient(progress["kl_coefficient"], *settings)

        # =================================================================================================== EVALUATE
        leave, finished = is_interrupted(), step + 1 >= args.ppo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= (last := evaluation(*evaluate_policy(policy)))
        progress["wall_seconds"] += time.perf_counter() - started
        log(row)
        bar.update()
        bar.set_postfix_str(f"score {row['objective/scores']:.2f}, KL {row['objective/kl']:.2f}")

        # ================================================================================================= CHECKPOINT
        if args.save_every and (step + 1) % args.save_every == 0:
            save_model(policy.lm, tokenizer, f"policy_{step + 1}")
        if finished:
            save_model(policy.lm, tokenizer, "policy")
        if (step + 1) % args.checkpoint_every == 0 or finished or leave:
            save_checkpoint(**current)
        if leave and not finished:
            bar.close()
            stop()
    bar.close()
    last = last or evaluation(*evaluate_policy(policy))
    if rank == 0:
        print(f"final: {summary(last)}; policy in {run_dir / 'policy'}")


Command = Union[  # noqa: UP007
    Annotated[MujocoArgs, tyro.conf.subcommand("mujoco", description="MuJoCo robots: cloning, reward model, SAC")],
    Annotated[LlmArgs, tyro.conf.subcommand("llm", description="language models: SFT, reward model, PPO")],
]


if __name__ == "__main__":
    args = tyro.cli(Command, description=__doc__.split("\n\n")[0])
    if isinstance(args, LlmArgs):
        args = complete_llm(args)
        check_llm_args(args)
        llm(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    else:
        args = complete(args)
        check_args(args)
        mujoco(args)
