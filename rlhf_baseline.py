"""RLHF in its three stages, one after the other: the baseline that AIHF is compared with.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et al.,
arXiv 2406.06874: the pipeline of Sections 2 and 6.1. Equation numbers are the paper's.

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
- β begins where it ends in AIHF's runs, and not at 1: that would widen the cloned policy.
- A KL penalty holds the policy near the clone (--kl-coefficient), as in (4). The paper's robots have SAC's entropy
  bonus alone (--kl-coefficient 0), which on Hopper-v4 ends at a tenth of the clone's return.
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
from typing import Annotated, NamedTuple, Union

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
    bc_weight_decay: float = 0.0
    """decoupled (AdamW's), for cloning"""

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
    kl_coefficient: float = 1.0
    """weight of log π⁰(a|s), of the cloned policy, which with the entropy bonus makes the KL penalty of (4) and (10).
    0 leaves the bonus alone, as the paper's robots have it, and loses what was cloned"""
    policy_steps_per_iteration: int = 5_000
    """SAC steps between two rows of metrics.csv"""
    learning_rate: float = 1e-3
    """Adam's, for policy, Q networks and entropy coefficient (paper: 3e-3; the authors' code: 1e-3)"""
    anneal: bool = True
    """let the learning rates fall linearly to 0, in each stage, so that it ends on a settled result (paper: no)"""
    batch_size: int = 256
    """transitions in an update"""
    entropy_coefficient: str = "auto"
    """the paper's beta: a number, or auto for the one that holds the entropy at -dim(A)"""
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


# A subcommand for each world. A union needs two members: the second cannot be seen or chosen.
ROBOTS = tyro.conf.subcommand("mujoco", description="MuJoCo robots: behaviour cloning, reward model, SAC")
Command = Union[Annotated[MujocoArgs, ROBOTS], Annotated[None, tyro.conf.Suppress]]  # noqa: UP007

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


def make_sac_update(actor_sizes, critic_sizes, gamma, tau, auto_beta, target_entropy, cloned, kl_coefficient):
    """The SAC update (Haarnoja et al. 2018) as one function of tensors, fit to be compiled into one graph; beside the
    entropy bonus it has the other half of the KL penalty of (4), k log π⁰(a|s), π⁰ being the cloned policy."""

    def log_prior(obs, action):
        return kl_coefficient * log_likelihood(cloned, obs, action, actor_sizes) if kl_coefficient else 0.0

    def update(sac: SAC, learning_rate, obs, action, reward, next_obs, terminated, noise) -> Tensor:
        """One step on a batch; noise (2, batch, act_dim). Returns (4,): Q loss, policy loss, entropy, mean Q."""
        sac.updates.add_(1)
        beta = sac.log_beta.exp()

        # Q networks: the soft Bellman backup goes on past a truncation and stops at a termination.
        next_action, next_log_prob = sample_action(sac.actor, next_obs, noise[0], actor_sizes)
        next_q = mlp(sac.targets, torch.cat([next_obs, next_action], -1), critic_sizes).squeeze(-1).amin(0)
        backup = reward + gamma * (1 - terminated) * (next_q - beta * next_log_prob + log_prior(next_obs, next_action))

        def critic_loss(critics):
            q = mlp(critics, torch.cat([obs, action], -1), critic_sizes).squeeze(-1)
            return ((q - backup) ** 2).mean(-1).sum(), q.mean()

        critic_grad, (q_loss, mean_q) = grad_and_value(critic_loss, has_aux=True)(sac.critics)
        adam_(sac.critics, critic_grad, sac.critics_m, sac.critics_v, sac.updates, learning_rate)

        # Policy: maximise Q + beta * entropy.
        def actor_loss(actor):
            new_action, log_prob = sample_action(actor, obs, noise[1], actor_sizes)
            q = mlp(sac.critics, torch.cat([obs, new_action], -1), critic_sizes).squeeze(-1).amin(0)
            return (beta * log_prob - log_prior(obs, new_action) - q).mean(), -log_prob.mean()

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


def make_run_dir(run_dir: Path, args: MujocoArgs) -> None:
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
def complete(args: MujocoArgs) -> MujocoArgs:
    """The arguments with what the environment decides; with --resume or --evaluate, those of that run."""
    if args.resume and args.evaluate:
        fail("--resume trains a run on and --evaluate does not train: give one of them")
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate) / "args.json"
        try:
            saved = json.loads(path.read_text())
            if saved.pop("script") != SCRIPT:
                raise KeyError("script")
            saved |= {key: tuple(saved[key]) for key in ("hidden", "reward_range")}
            saved = MujocoArgs(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path} is not the args.json of a run of {SCRIPT}.py mujoco; give the run's folder, runs/<run_name>")
        args = tyro.cli(MujocoArgs, default=saved, args=sys.argv[2:])  # flags given now win over the run's own ...
        for field in fields(MujocoArgs):  # ... where that does not make it another run
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


def check_args(args: MujocoArgs) -> None:
    for field in fields(MujocoArgs):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value < math.inf:
                fail(f"{flag} must be a finite number and not negative: {value}")
            if value == 0 and field.name not in MAY_BE_ZERO:
                fail(f"{flag} must be more than 0")
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


SCRIPT = "rlhf_baseline"
BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every
CHECK_EVERY = 50  # updates of stages 1 and 2 between looks at the held-out data
MAY_CHANGE = (  # from a run to its continuation
    "resume evaluate total_timesteps eval_episodes checkpoint_every compile cuda threads "
    "track wandb_project_name wandb_entity capture_video"
).split()
MAY_BE_ZERO = ("seed", "bc_weight_decay", "gradient_penalty", "critic_warmup_steps", "kl_coefficient")
METRICS = (
    "charts/iteration charts/sac_steps charts/env_steps charts/SPS charts/wall_seconds charts/episode_length "
    "bc/updates bc/log_likelihood bc/held_out_log_likelihood "
    "losses/q losses/policy losses/entropy losses/q_mean losses/beta "
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
    auto_beta = args.entropy_coefficient == "auto"
    beta = args.initial_entropy_coefficient if auto_beta else float(args.entropy_coefficient)
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
        make_run_dir(run_dir, args)

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
        optimizer = torch.optim.AdamW([actor], lr=args.bc_learning_rate, weight_decay=args.bc_weight_decay)

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
    update = make_sac_update(
        actor_sizes, critic_sizes, args.gamma, args.tau, auto_beta, -float(act_dim), cloned, args.kl_coefficient
    )
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
            **dict(zip(("losses/q", "losses/policy", "losses/entropy", "losses/q_mean"), losses.tolist())),
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


if __name__ == "__main__":
    args = tyro.cli(Command, description=__doc__.split("\n\n")[0])
    args = complete(args)
    check_args(args)
    mujoco(args)
