"""MuJoCo demonstrations and preferences, made the way the AIHF paper makes them (A.2.1, after Brown et al. 2019).

    python data_gen/mujoco_data.py --env Hopper-v4

trains SAC on the TRUE reward, keeps a checkpoint every 10,000 steps, picks three of them (low, medium, high) by their
return, lets each act (stochastic policy, whole episodes) and writes, into data_gen/assets/mujoco/<env>/,

    low.npz  medium.npz  high.npz    episodes; high = demonstrations, medium preferred over low
    pairs.csv                        preference pairs between equal-length segments of those episodes
    manifest.json                    what made them: command, versions, counts, returns, SHA-256 of each file

An episode file holds flat arrays over E episodes of N steps in all: observations (N + E, obs_dim), T + 1 an episode;
actions (N, act_dim); rewards (N,); terminations (N,) and truncations (N,), one of which is set on the last step of
each episode and nowhere else. It can be interrupted: the same command carries on from the last checkpoint.
"""

import hashlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.func import grad_and_value
from tqdm import tqdm

# Table 1 of the paper: mean return of the demonstrations, and the shares of it that low and medium have.
PAPER_TIERS = {"Hopper": (0.66, 0.85, 3560.0), "HalfCheetah": (0.62, 0.81, 11635.0), "Walker2d": (0.72, 0.93, 5453.0)}
TRAINING_STEPS = {"Hopper": 400_000, "HalfCheetah": 1_200_000, "Walker2d": 2_000_000}
TIERS = ("low", "medium", "high")


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"
    """a MuJoCo environment of Gymnasium with continuous actions"""
    seed: int = 1
    """seeds the expert's training, the episodes and the pairs"""
    output_dir: str = ""
    """where the data goes; default data_gen/assets/mujoco/<env>"""
    work_dir: str = ""
    """training state and checkpoints, kept so that the command can carry on; default runs/mujoco_data__<env>__<seed>"""

    tier_targets: tuple[float, ...] = ()
    """mean returns to aim at for low, medium and high; default: the paper's return for high (the best checkpoint for an
    environment the paper does not have) and the paper's shares of the return that high reaches for low and medium"""
    episodes_per_tier: int = 10
    """whole episodes written for each tier"""
    max_steps_per_tier: int = 30_000
    """no episode is begun in a tier that has this many steps (the paper collects 30k a checkpoint)"""
    segment_length: int = 50
    """steps in each side of a preference pair"""
    num_pairs: int = 2_000
    """preference pairs, each a random segment of a medium and of a low episode"""
    label_noise: float = 0.0
    """probability that a pair's label is flipped"""

    total_timesteps: int = 0
    """SAC steps of the expert; 0 takes 400k for Hopper, 1.2M for HalfCheetah, 2M for Walker2d, 1M for anything else"""
    checkpoint_every: int = 10_000
    """steps between checkpoints, each of which is a candidate for a tier"""
    learning_starts: int = 5_000
    """steps of uniformly random actions before the first update"""
    batch_size: int = 256
    """transitions an update"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of the hidden layers of the policy and of each Q network (the paper's)"""
    learning_rate: float = 1e-3
    """Adam's, for policy, Q networks and temperature (paper: 3e-3, which is unstable on HalfCheetah and Walker2d)"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """share of the Q networks that goes into their targets at each update"""
    compile: bool = True
    """compile the SAC update (needs a C++ compiler; without one the run is eager, 4 times slower)"""
    threads: int = 1
    """CPU threads of torch"""


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
class Episode(NamedTuple):
    observations: np.ndarray  # (T + 1, obs_dim)
    actions: np.ndarray  # (T, act_dim), in the environment's units
    rewards: np.ndarray  # (T,)
    terminated: bool  # fell over; otherwise cut off by the time limit


def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id: str) -> gym.Env:
    """A MuJoCo environment whose actions are scaled to [-1, 1]; fails with one line on anything else."""
    gym.logger.min_level = gym.logger.ERROR  # the paper's v4 environments are called out of date at every make
    try:
        env = gym.make(env_id, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:  # the latter for the robots of v2 and v3, which have moved out
        fail(f"no environment {env_id!r} ({' '.join(str(error).split())}); try Hopper-v4")
    if not isinstance(env.action_space, gym.spaces.Box):
        fail(f"{env_id} has no continuous actions; SAC needs a Box action space, such as Hopper-v4's")
    if not isinstance(env.unwrapped, gym.envs.mujoco.MujocoEnv):
        fail(f"{env_id} is not a MuJoCo environment; try Hopper-v4, HalfCheetah-v4 or Walker2d-v4")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def play(env: gym.Env, actor_layers: list, rng: np.random.Generator) -> Episode:
    """One whole episode of the stochastic policy, true rewards and all."""
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, actions, rewards, terminated, truncated = [obs], [], [], False, False
    while not (terminated or truncated):
        action = act(actor_layers, obs, rng.standard_normal(env.action_space.shape[0], np.float32))
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        actions.append(env.action(action))
        rewards.append(reward)
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards), terminated)


def play_tier(env, actor_layers, rng, episodes: int, max_steps: int) -> list[Episode]:
    tier: list[Episode] = []
    while len(tier) < episodes and sum(len(e.actions) for e in tier) < max_steps:
        tier.append(play(env, actor_layers, rng))
    return tier


def returns(tier: list[Episode]) -> np.ndarray:
    return np.array([episode.rewards.sum() for episode in tier])


def draw_pairs(medium: list[Episode], low: list[Episode], segment_length, num_pairs, label_noise, rng) -> list[dict]:
    """Preference pairs: side a or b is, at random, a segment of a medium episode and is then the preferred one.

    Raises ValueError when no episode of a tier is as long as a segment.
    """

    def segment(tier: list[Episode]) -> tuple[int, int]:
        starts = np.array([max(len(episode.actions) - segment_length + 1, 0) for episode in tier])
        if not starts.any():
            raise ValueError(f"no episode of the tier has {segment_length} steps")
        episode = rng.choice(len(tier), p=starts / starts.sum())
        return int(episode), int(rng.integers(starts[episode]))

    pairs = []
    for _ in range(num_pairs):
        sides = [("medium", *segment(medium)), ("low", *segment(low))]
        label = int(rng.integers(2))  # 1: a is preferred
        a, b = sides if label else sides[::-1]
        pair = {}
        for side, (tier, episode, start) in (("a", a), ("b", b)):
            columns = {"tier": tier, "episode": episode, "start": start, "length": segment_length}
            pair.update({f"{key}_{side}": value for key, value in columns.items()})
        pairs.append({**pair, "label": 1 - label if rng.random() < label_noise else label})
    return pairs


def write_dataset(output_dir: Path, tiers: dict[str, list[Episode]], pairs: list[dict], manifest: dict) -> dict:
    """Write the episode files, the pairs and the manifest, each whole or not at all; returns the manifest."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, tier in tiers.items():
        ends = np.concatenate([np.arange(len(episode.actions)) == len(episode.actions) - 1 for episode in tier])
        terminated = np.concatenate([np.full(len(episode.actions), episode.terminated) for episode in tier])
        arrays = {
            "observations": np.concatenate([episode.observations for episode in tier]).astype(np.float32),
            "actions": np.concatenate([episode.actions for episode in tier]).astype(np.float32),
            "rewards": np.concatenate([episode.rewards for episode in tier]).astype(np.float32),
            "terminations": ends & terminated,
            "truncations": ends & ~terminated,
        }
        with open(output_dir / f".{name}.npz.tmp", "wb") as file:
            np.savez_compressed(file, **arrays)
    lines = [",".join(pairs[0]), *(",".join(str(value) for value in pair.values()) for pair in pairs)]
    (output_dir / ".pairs.csv.tmp").write_text("\n".join(lines) + "\n")

    files = [*(f"{name}.npz" for name in tiers), "pairs.csv"]
    for name in files:
        os.replace(output_dir / f".{name}.tmp", output_dir / name)
    manifest = {
        **manifest,
        "counts": {"pairs": len(pairs), "segment_length": pairs[0]["length_a"]},
        "tiers": {
            name: {
                "return_mean": float(returns(tier).mean()),
                "return_std": float(returns(tier).std()),
                "episodes": len(tier),
                "steps": sum(len(episode.actions) for episode in tier),
            }
            for name, tier in tiers.items()
        },
        "sha256": {name: hashlib.sha256((output_dir / name).read_bytes()).hexdigest() for name in files},
    }
    (output_dir / ".manifest.json.tmp").write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(output_dir / ".manifest.json.tmp", output_dir / "manifest.json")
    return manifest


def check_args(args: Args) -> None:
    positive = (
        "episodes_per_tier max_steps_per_tier segment_length num_pairs checkpoint_every learning_starts batch_size"
    )
    for name in positive.split() + ["threads", "learning_rate", "total_timesteps"]:
        if not 0 < getattr(args, name) < 10**8:
            fail(f"--{name.replace('_', '-')} must be more than 0 and less than 100 million, not {getattr(args, name)}")
    if args.seed < 0 or not args.hidden or min(args.hidden) < 1:
        fail("--seed must not be negative, --hidden takes widths of at least 1")
    if args.checkpoint_every % BLOCK or args.learning_starts % BLOCK or args.total_timesteps % args.checkpoint_every:
        fail(f"--checkpoint-every and --learning-starts must be multiples of {BLOCK}, --total-timesteps of the former")
    if not (0 <= args.label_noise <= 1 and 0 <= args.gamma <= 1 and 0 < args.tau <= 1):
        fail("--label-noise and --gamma must lie in [0, 1], --tau in (0, 1]")
    if args.tier_targets and not (
        len(args.tier_targets) == 3
        and -math.inf < args.tier_targets[0] <= args.tier_targets[1] <= args.tier_targets[2] < math.inf
    ):
        fail("--tier-targets takes three returns in ascending order: low medium high")


BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    name = args.env.split("-v")[0]
    recipe = json.dumps({**asdict(args), "output_dir": "", "compile": True})
    args.total_timesteps = args.total_timesteps or TRAINING_STEPS.get(name, 1_000_000)
    check_args(args)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)  # gradients come from torch.func
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env, play_env = make_env(args.env), make_env(args.env)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    actor_sizes, critic_sizes = (obs_dim, *args.hidden, 2 * act_dim), (obs_dim + act_dim, *args.hidden, 1)
    output_dir = Path(args.output_dir or f"data_gen/assets/mujoco/{args.env}")
    state_path = Path(args.work_dir or f"runs/mujoco_data__{args.env}__{args.seed}") / "state.pt"
    for folder in (state_path.parent, output_dir):  # now, not when the training is over
        if not folder.is_dir() and any(path.is_file() for path in (folder, *folder.parents)):
            fail(f"{folder} cannot be made: there is a file in its place")
    try:
        state_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write {state_path.parent} ({error.strerror}); give another --work-dir")

    # ------------------------------------------------------------------------- 1. the expert: SAC on the true reward
    rng = np.random.default_rng(args.seed)
    sac = init_sac(actor_sizes, critic_sizes, 1.0, rng, device)
    replay = Replay(args.total_timesteps, (obs_dim, act_dim, obs_dim, 1, 1))
    step, candidates = 0, []  # candidates: (step, mean return, actor parameters)
    if state_path.exists():
        try:
            state = torch.load(state_path, weights_only=True)
            own = state["recipe"] == recipe
        except Exception as error:  # torch.load raises almost anything on a damaged file
            fail(f"{state_path} is damaged ({type(error).__name__}); delete it or give another --work-dir")
        if not own:
            fail(f"{state_path} belongs to a run with other arguments; give another --work-dir or delete it")
        sac, step, candidates = SAC(*(t.to(device) for t in state["sac"])), state["step"], state["candidates"]
        replay.rows[: len(state["replay"])], replay.size = state["replay"].numpy(), len(state["replay"])
        rng.bit_generator.state = json.loads(state["rng"])

    update = make_sac_update(actor_sizes, critic_sizes, args.gamma, args.tau, True, -float(act_dim))
    if args.compile:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    bar = tqdm(total=args.total_timesteps, initial=step, desc=f"1/2 expert {args.env}", unit="step", mininterval=1.0)
    while step < args.total_timesteps:
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        for _ in range(args.checkpoint_every // BLOCK):
            actor_layers = layers(sac.actor.cpu().numpy(), actor_sizes)
            for _ in range(BLOCK):
                if step < args.learning_starts:
                    action = rng.uniform(-1, 1, act_dim).astype(np.float32)
                else:
                    action = act(actor_layers, obs, rng.standard_normal(act_dim, np.float32))
                next_obs, reward, terminated, truncated, _ = env.step(action)
                replay.add(obs, action, next_obs, terminated, reward)
                obs = env.reset()[0] if terminated or truncated else next_obs
                step += 1
            if step >= args.learning_starts:
                noise = rng.standard_normal((BLOCK, 2, args.batch_size, act_dim), np.float32)
                fields = replay.sample(BLOCK, args.batch_size, rng, device)
                for o, a, o2, end, r, n in zip(*fields, torch.from_numpy(noise).to(device)):
                    update(sac, learning_rate, o, a, r.squeeze(-1), o2, end.squeeze(-1), n)
            bar.update(BLOCK)
        scores = returns([play(play_env, layers(sac.actor.cpu().numpy(), actor_sizes), rng) for _ in range(3)])
        candidates.append((step, float(scores.mean()), sac.actor.cpu().clone()))
        bar.set_postfix(true_return=f"{scores.mean():.0f}", best=f"{max(c[1] for c in candidates):.0f}")
        if step % (5 * args.checkpoint_every) == 0 or step == args.total_timesteps:
            state = {"recipe": recipe, "sac": list(sac), "step": step, "candidates": candidates}
            state |= {
                "replay": torch.from_numpy(replay.rows[: replay.size]),
                "rng": json.dumps(rng.bit_generator.state),
            }
            torch.save(state, state_path.with_suffix(".tmp"))
            os.replace(state_path.with_suffix(".tmp"), state_path)
    bar.close()

    # ------------------------------------------------------------- 2. the tiers: three checkpoints by their true return
    # Each tier's shortlist is the ten checkpoints whose three-episode return is nearest to its target; the one whose
    # own episodes come nearest is kept, a quarter of their standard deviation counted as distance.
    rng = np.random.default_rng([args.seed, 1])
    low_share, medium_share, paper_high = PAPER_TIERS.get(name, (0.66, 0.85, math.inf))
    targets = dict(zip(TIERS, args.tier_targets)) or {"high": min(paper_high, max(c[1] for c in candidates))}
    tiers, chosen = {}, {}
    for tier in ("high", "medium", "low"):
        shortlist = sorted(candidates, key=lambda c: abs(c[1] - targets[tier]))[:10]
        best = math.inf
        for at_step, _, actor in tqdm(
            shortlist, desc=f"2/2 {tier} tier, target {targets[tier]:.0f}", unit="checkpoint"
        ):
            actor_layers = layers(actor.numpy(), actor_sizes)
            episodes = play_tier(play_env, actor_layers, rng, args.episodes_per_tier, args.max_steps_per_tier)
            distance = abs(returns(episodes).mean() - targets[tier]) + returns(episodes).std() / 4
            if distance < best:
                best, tiers[tier], chosen[tier] = distance, episodes, at_step
        high = returns(tiers["high"]).mean()
        targets = {"low": low_share * high, "medium": medium_share * high, **targets}

    try:
        pairs = draw_pairs(tiers["medium"], tiers["low"], args.segment_length, args.num_pairs, args.label_noise, rng)
    except ValueError as error:
        fail(f"{error}; give a smaller --segment-length")
    manifest = {
        "env_id": args.env,
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "arguments": asdict(args),
        "checkpoint_steps": {tier: chosen[tier] for tier in TIERS},
        "versions": {
            "python": sys.version.split()[0],
            **{module.__name__: module.__version__ for module in (gym, mujoco, np)},
            "torch": str(torch.__version__),
        },
        "created": time.strftime("%Y-%m-%d"),
    }
    manifest = write_dataset(output_dir, {tier: tiers[tier] for tier in TIERS}, pairs, manifest)
    for tier, row in manifest["tiers"].items():
        print(f"{tier:>6}: return {row['return_mean']:7.0f} ± {row['return_std']:4.0f}, {row['episodes']} episodes")
    print(f"wrote {output_dir}/{{low,medium,high}}.npz, pairs.csv ({len(pairs)} pairs) and manifest.json")
