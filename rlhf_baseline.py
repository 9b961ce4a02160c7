"""RLHF in its three stages, one after the other: the baseline that AIHF is compared with.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et
al., arXiv 2406.06874: Sections 3.1, 6.1 and 6.2. Equation numbers are the paper's.

    python rlhf_baseline.py mujoco --env Hopper-v4
    python rlhf_baseline.py llm

Each learns from the data of aihf_sac_mujoco.py or aihf_ppo_llm.py, with the same networks and as
many steps of SAC (10 to 30 minutes) or PPO (7), writes runs/<run_name>/ and prints the true return
or the ground-truth score, which nothing else reads. torchrun shards language models (FSDP2).

To be a strong baseline (benchmark/tuning/rlhf.md) it differs from the paper in r's bounds, averaged
weights, the numbers marked "paper:" below, and in this:
- Stages 1 and 2 keep what does best on held-out demonstrations and pairs.
- New critics would undo the cloning in a few hundred updates. A robot's policy is frozen while they
  warm up; a language model's critic starts as a copy of the reward model, if that reads its text.
- A KL penalty holds the policy near stage 1's, as in (4), on robots too. The paper's robots have
  SAC's entropy bonus: --kl-coefficient 0 --learning-rate 1e-3 --demos-in-replay False; worse.
"""

import copy
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call, grad_and_value
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data_gen import read


@dataclass
class MujocoArgs:
    """MuJoCo robots: behaviour cloning, reward model, SAC"""

    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"  # a gymnasium robot
    seed: int = 1  # of networks, held-out data, batches, exploration; evaluation has its own
    total_timesteps: int | None = None  # SAC steps; None: 100,000 for each dimension of actions
    data_dir: str = ""  # high.npz, medium.npz, low.npz, pairs.csv; "": data_gen/assets/mujoco/<env>
    held_out_share: float = 0.1  # of demonstrated episodes, of pairs: on them the best is chosen

    # 1. Behaviour cloning
    bc_updates: int = 7_000  # Adam steps on the policy
    bc_batch_size: int = 256  # demonstrated steps in each
    bc_learning_rate: float = 1e-3  # Adam's, for cloning

    # 2. The reward model
    reward_updates: int = 3_000  # Adam steps on the reward
    segment_length: int = 50  # steps of each side of a preference
    preference_batch_size: int = 64  # pairs in each reward update
    reward_learning_rate: float = 3e-4  # Adam's (paper: 1e-4)
    reward_range: tuple[float, float] | None = None  # of r; None: (0, 4) if robots fall, else ±10

    # 3. RL
    demos_in_replay: bool | None = None  # SAC learns from D too (paper: no); None: if robots fall
    critic_warmup_steps: int = 10_000  # SAC steps in which the clone acts and does not learn
    kl_coefficient: float = 10.0  # β of (4): less loses the clone; 0: SAC's entropy bonus, β tuned
    policy_steps_per_iteration: int = 5_000  # SAC steps from a reset to a row of metrics.csv
    learning_rate: float = 1e-4  # Adam's (paper: 3e-3); AIHF's 1e-3 shakes HalfCheetah's clone
    anneal: bool = True  # let the learning rate of each stage fall linearly to 0 (paper: no)
    batch_size: int = 256  # transitions in an update (the authors' code: 100)
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the Q networks that goes into their targets at each update
    hidden: tuple[int, ...] = (64, 64)  # hidden layers of every network (the paper's)

    # Running
    eval_every: int = 5  # iterations between evaluations on the true reward
    eval_episodes: int = 10  # deterministic episodes in each
    checkpoint_every: int = 10  # iterations between checkpoints; stages 1 and 2 save at their end
    runs_dir: str = "runs"  # where run folders go
    run_name: str = ""  # the run's folder; "": from environment, method, seed and time
    resume: str = ""  # a run folder to carry on with its arguments; most flags beside it win
    evaluate: str = ""  # a run folder whose policy to evaluate instead of training; beats --resume
    compile: bool = True  # compile the SAC update (needs a C++ compiler)
    cuda: bool = True  # use a GPU when there is one; networks this small can be faster on a core
    threads: int = 1  # CPU threads of torch
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY ...)


SCRIPT = Path(__file__).name
ASSETS = "data_gen/assets/imdb"
BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every
CHECK_EVERY = 50  # robots: updates of stages 1 and 2 between looks at the held-out data
LOSSES = tuple(f"losses/{x}" for x in ("q", "policy", "entropy", "q_mean", "beta", "kl"))  # SAC's
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # of the policy


# --------------------------------------------------------------------- the reward, in equations
def mlp(*sizes: int) -> nn.Sequential:
    """ReLU network (batch, sizes[0]) -> (batch, sizes[-1])."""
    layers = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


class Reward(nn.Module):
    """r(s, a; θ) in (low, high): a sigmoid of slope 1 in the middle; unlike a clamp it has a
    gradient everywhere. obs (N, obs_dim), the data's observations, standardise its inputs."""

    def __init__(self, obs: np.ndarray, act_dim: int, hidden: tuple, bounds: tuple[float, float]):
        super().__init__()
        self.net = mlp(obs.shape[1] + act_dim, *hidden, 1)
        self.low, self.high = bounds
        mean, std = torch.from_numpy(obs.mean(0)), torch.from_numpy(obs.std(0))
        self.register_buffer("obs_mean", mean)
        self.register_buffer("obs_std", torch.where(std < 1e-3, 1.0, std))  # 1 for constants

    def features(self, obs, actions) -> Tensor:
        """x (..., obs_dim + act_dim): observations in standard deviations, clipped, and actions."""
        obs, actions = (torch.as_tensor(x, device=self.obs_mean.device) for x in (obs, actions))
        return torch.cat([((obs - self.obs_mean) / self.obs_std).clamp(-10, 10), actions], -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., obs_dim + act_dim) -> (...,)"""
        width = self.high - self.low
        return self.low + width * torch.sigmoid(4 / width * self.net(x).squeeze(-1))


def hold_out(count: int, share: float, rng: np.random.Generator) -> list[Tensor]:
    """0 … count - 1 in random order: those to learn from, and those held out, at least one."""
    held_out = max(1, round(share * count))
    if held_out >= count:
        raise ValueError(f"--held-out-share {share} of {count} leaves none to learn from")
    return torch.from_numpy(rng.permutation(count)).split([count - held_out, held_out])


def fit(run_dir: Path, module, loss, split, batch_size, updates, learning_rate, anneal, rng):
    """Adam on loss(rows), rows a batch from split[0]; keeps the parameters with the lowest loss on
    split[1], held out. Returns their number of updates and this loss."""
    optimizer, (train, held_out), best = torch.optim.Adam(module.parameters()), split, math.inf
    for update in tqdm(range(1, updates + 1), f"fitting {type(module).__name__}"):
        share_left = 1 - (update - 1) / updates if anneal else 1.0
        optimizer.param_groups[0]["lr"] = learning_rate * share_left
        optimizer.zero_grad()
        loss(train[rng.integers(len(train), size=batch_size)]).backward()
        optimizer.step()
        if update % CHECK_EVERY == 0 or update == updates:
            with torch.no_grad():
                value = loss(held_out)
            read.check_finite(update, run_dir, held_out_loss=value)
            if value < best:
                best, kept, parameters = value.item(), update, copy.deepcopy(module.state_dict())
    module.load_state_dict(parameters)
    return kept, best


# ----------------------------------------------------------------------------- the three stages
def mujoco(args: MujocoArgs, state: dict) -> None:
    """All three stages, or what is left of them after the checkpoint `state`."""
    with read.input_errors():  # around set-up: what is wrong with the input is said in one line
        read.check_numbers(args, "seed critic_warmup_steps kl_coefficient", "reward_range")
        low, high = args.reward_range or (0.0, 1.0)
        if args.gamma >= 1 or args.tau > 1 or not -math.inf < low < high < math.inf:
            raise ValueError("--gamma must be below 1, --tau at most 1, --reward-range ascending")
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)  # of networks
        rng = np.random.default_rng(args.seed)  # of held-out data, batches, exploration and resets
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        env = make_env(args.env)
        (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        args.total_timesteps = args.total_timesteps or 100_000 * act_dim
        name = f"{Path(args.env).name}__rlhf__{args.seed}__{time.time_ns()}"
        args.run_name = args.run_name or name

        data_dir = Path(args.data_dir or f"data_gen/assets/mujoco/{args.env}")
        names = ("high", "medium", "low")  # D is high, P compares the others; env.env: unscaled
        tiers = {tier: read.episodes(data_dir / f"{tier}.npz", env.env) for tier in names}
        pairs = read.pairs(data_dir, tiers, args.segment_length)
        data_hash = read.fingerprint(*(x for tier in tiers.values() for x in tier), pairs)
        demos = tiers["high"]
        episode_split = hold_out(len(demos.lengths), args.held_out_share, rng)
        pair_rng = np.random.default_rng([args.seed, 1])  # cloning does not depend on pairs
        pair_split = hold_out(len(pairs), args.held_out_share, pair_rng)

        actor = Actor(obs_dim, act_dim, args.hidden).to(device)
        # Evaluated: averaged weights, the n-th ~ n⁹: last tenth 65 % (Shamir and Zhang 2013)
        averaged = AveragedModel(actor, avg_fn=lambda a, b, n: a.lerp(b, 10 / (10 + n)))
        critics = Critics(obs_dim, act_dim, args.hidden).to(device)
        sac = init_sac(actor, critics, args.kl_coefficient or 0.05)  # 0.05: where AIHF's β ends
        sac["cloned"] = {key: p.clone() for key, p in sac["actor"].items()}  # stage 1's result
        target_entropy = None if args.kl_coefficient else -act_dim
        settings = args.gamma, args.tau, target_entropy, args.critic_warmup_steps
        update = make_sac_update(actor, critics, *settings)
        *_, lengths, _ = play(env, actor, range(3), rng=np.random.default_rng(0))  # 3 episodes
        can_fall = lengths.min().item() < env.spec.max_episode_steps  # if it can, untrained it does
        args.reward_range = args.reward_range or ((0.0, 4.0) if can_fall else (-10.0, 10.0))
        args.demos_in_replay = can_fall if args.demos_in_replay is None else args.demos_in_replay
        all_obs = np.concatenate([tier.obs for tier in tiers.values()])
        reward = Reward(all_obs, act_dim, args.hidden, args.reward_range).to(device)
        widths = (obs_dim, act_dim, obs_dim, 1)  # a transition: s, a, s', whether it ended there
        demo_steps = len(demos.obs) if args.demos_in_replay else 0  # kept before SAC's own
        replay = np.zeros((demo_steps + args.total_timesteps, sum(widths)), np.float32)
        replay[:demo_steps] = np.column_stack([*demos[:2], *demos[3:]])[:demo_steps]  # no lengths
        counts = ("charts/iteration", "charts/sac_steps", "charts/env_steps", "charts/wall_seconds")
        log = []  # rows of metrics.csv: of stage 1, of stage 2, then one an iteration

        if state:
            if state["data_hash"] != data_hash:
                raise ValueError(f"the run learned from other data than {data_dir} now holds")
            read.check_steps(len(state["replay"]), args, "total_timesteps")
            tree_map(Tensor.copy_, sac, state["sac"])
            averaged.load_state_dict(state["averaged"])
            reward.load_state_dict(state["reward"])
            replay[demo_steps : demo_steps + len(state["replay"])] = state["replay"]
            log, rng.bit_generator.state = state["log"], state["rng"]
        run_dir, track = read.open_run(args, f"{SCRIPT} mujoco")
    data = {tier: reward.features(*tiers[tier][:2]) for tier in tiers}
    segments = [  # preferred and other, (pairs, segment_length, obs_dim + act_dim) each
        torch.stack([data[tier][start : start + args.segment_length] for tier, start in side])
        for side in zip(*pairs)
    ]
    iteration, step = (log[-1][count] for count in counts[:2]) if log else (0, 0)
    last_step = 0 if args.evaluate else args.total_timesteps
    if args.compile and step < last_step:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    started = time.perf_counter() - (log[-1]["charts/wall_seconds"] if log else 0)

    def record(row: dict, save: bool = True) -> None:
        """A row of metrics.csv, and a checkpoint. No rollouts: env_steps are sac_steps."""
        log.append(dict(zip(counts, (iteration, step, step, time.perf_counter() - started))) | row)
        read.write_csv(run_dir / "metrics.csv", log)
        track(log[-1], step=step or len(log) - 1)  # W&B's steps: 0 and 1 are stages 1 and 2
        if save:
            state = {"script": f"{SCRIPT} mujoco", "args": asdict(args), "data_hash": data_hash}
            state |= {"log": log, "sac": sac, "averaged": averaged.state_dict()}
            state |= {"reward": reward.state_dict(), "rng": rng.bit_generator.state}
            state["replay"] = torch.from_numpy(replay[demo_steps : demo_steps + step])
            read.write_whole(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    # =============================== 1. BEHAVIOUR CLONING: π⁰ = argmax_π Σ log π(a|s) over τ ~ D
    if not log:
        obs, actions = (torch.from_numpy(array).to(device) for array in demos[:2])
        std, mean = torch.std_mean(obs, 0)
        std = torch.where(std < 1e-3, 1.0, std)  # 1 for a constant
        obs = (obs - mean) / std  # what the policy sees while it is cloned
        episode = np.repeat(np.arange(len(demos.lengths)), demos.lengths)  # of each step
        split = [np.flatnonzero(np.isin(episode, part)) for part in episode_split]
        u = torch.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))  # atanh(±1) is infinite

        def cloning_loss(steps) -> Tensor:  # mean -log π(a|s), from the noise that leads to a
            mu, log_std = actor.gaussian(obs[steps])
            return -actor(obs[steps], (u[steps] - mu) / log_std.exp())[1].mean()

        schedule = args.bc_batch_size, args.bc_updates, args.bc_learning_rate, args.anneal
        kept, loss = fit(run_dir, actor, cloning_loss, split, *schedule, rng)
        row = {"bc/updates": kept, "bc/held_out_log_likelihood": -loss}
        with torch.no_grad():
            actor.net[0].weight /= std  # from here on the policy sees observations as they are
            actor.net[0].bias -= actor.net[0].weight @ mean
        tree_map(Tensor.copy_, sac["cloned"], sac["actor"])
        averaged.update_parameters(actor)
        row |= evaluate(env, averaged.module, args.eval_episodes, reward)
        del row["eval/reward_correlation"]  # there is no reward yet
        print(f"cloned policy: true return {row['eval/return_mean']:.0f}")
        record(row)

    # ================ 2. REWARD MODEL: θ = argmax_θ L2(θ), (11), over preferences (τ_l ≺ τ_w) ~ P
    if len(log) == 1 and not args.evaluate:

        def preference_loss(rows) -> Tensor:  # -L2, (11), R(τ) a sum (paper: discounted; AIHF: / 5)
            preferred, other = (reward(side[rows]) for side in segments)
            return -F.logsigmoid((preferred - other).sum(-1)).mean()

        schedule = args.preference_batch_size, args.reward_updates, args.reward_learning_rate
        kept, loss = fit(run_dir, reward, preference_loss, pair_split, *schedule, args.anneal, rng)
        row = {"reward/updates": kept, "reward/held_out_loss": loss}
        preferred, other = (reward(side[pair_split[1]]).sum(-1) for side in segments)
        row["reward/held_out_accuracy"] = (preferred > other).double().mean().item()
        print(f"reward model: {row['reward/held_out_accuracy']:.0%} of held-out pairs in order")
        record(row)

    # =========================== 3. RL: π = argmax_π E[R] - β KL(π ‖ π⁰), (4) with θ frozen, by SAC
    bar = tqdm(total=last_step, initial=step, desc=args.env, unit="step", disable=last_step == 0)
    while step < last_step:
        first_step = step
        share_left = 1 - step / args.total_timesteps if args.anneal else 1.0
        learning_rate = torch.tensor(args.learning_rate * share_left, device=device)
        before = tree_map(Tensor.clone, averaged.state_dict())  # to leave this iteration out
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        iteration_end = min(step + args.policy_steps_per_iteration, last_step)
        while step < iteration_end:
            block = min(BLOCK, iteration_end - step)
            for _ in range(block):
                action = actor.act(obs, rng.standard_normal(act_dim, np.float32))
                next_obs, _, terminated, truncated, _ = env.step(action)  # the first _: true reward
                replay[demo_steps + step] = np.concatenate([obs, action, next_obs, [terminated]])
                obs = env.reset()[0] if terminated or truncated else next_obs
                step += 1
            index = rng.integers(demo_steps + step, size=(block, args.batch_size))
            batches = torch.from_numpy(replay[index]).to(device).split(widths, dim=-1)
            s, a, next_s, terminations = (field.contiguous() for field in batches)
            with torch.no_grad():
                rewards = reward(reward.features(s, a)).float()  # compiled code checks no dtype
            noise = rng.standard_normal((block, 2, args.batch_size, act_dim), np.float32)
            noise = torch.from_numpy(noise).to(device)
            for batch in zip(s, a, rewards, next_s, terminations.squeeze(-1), noise):
                losses = update(sac, learning_rate, *batch)
            averaged.update_parameters(actor)
            read.check_finite(step, run_dir, rewards=rewards, sac_losses=losses, **sac["actor"])
            bar.update(block)
        fall_rate = float(replay[demo_steps:][first_step:step, -1].mean())  # falls per SAC step
        fewest = min(row.get("charts/fall_rate", 1.0) for row in log[-9:])  # of the nine before
        if fall_rate > fewest and args.reward_range[0] >= 0:  # falls cost
            averaged.load_state_dict(before)  # left out: it fell more often than the best of ten

        # =========================================================== LOG, EVALUATE and CHECKPOINT
        iteration, finished = iteration + 1, step >= last_step
        row = dict(zip(LOSSES, losses.tolist())) | {"charts/fall_rate": fall_rate}
        if iteration % args.eval_every == 0 or finished:
            row |= evaluate(env, averaged.module, args.eval_episodes, reward)
            bar.set_postfix_str(f"true return {row['eval/return_mean']:.0f}")
        record(row, save=iteration % args.checkpoint_every == 0 or finished)
    bar.close()
    mean, std, *_ = evaluate(env, averaged.module, args.eval_episodes, reward).values()
    print(f"final true return {mean:.0f} ± {std:.0f}; python benchmark/plot.py {run_dir} draws it")


# ---------------------------------------------------------------------------- the policy: SAC
class Actor(nn.Module):
    """π(a|s): tanh(u), u ~ N(mean, std); actions lie in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = mlp(obs_dim, *hidden, 2 * act_dim)

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of u, (..., act_dim) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (batch, act_dim) and their log π (batch,) from standard normal noise; log(1 -
        tanh(u)²) in the stable form of Spinning Up (Haarnoja et al. 2018, appendix C)."""
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_det_tanh).sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """One action (act_dim,) for obs (obs_dim,); noise 0 gives tanh(mean)."""
        x = torch.as_tensor(obs, dtype=torch.float32, device=self.net[0].weight.device)
        mean, log_std = torch.stack(self.gaussian(x)).cpu().numpy()
        return np.tanh(mean + np.exp(log_std) * noise)


def kl_divergence(actor: Actor, params: dict, cloned: dict, obs: Tensor) -> Tensor:
    """KL(π(·|s) ‖ π⁰(·|s)) of (4) in nats, (batch,), π and π⁰ an Actor with params and with cloned:
    that of their Gaussians, exactly, as tanh is one-to-one."""
    nets = ({key.removeprefix("net."): p for key, p in net.items()} for net in (params, cloned))
    outputs = (functional_call(actor.net, net, (obs,)).chunk(2, dim=-1) for net in nets)
    (mean, log_std), (mean_0, log_std_0) = outputs
    log_std, log_std_0 = (x.clamp(LOG_STD_MIN, LOG_STD_MAX) for x in (log_std, log_std_0))
    mean_part, log_ratio = ((mean - mean_0) / log_std_0.exp()) ** 2, log_std - log_std_0
    return 0.5 * (mean_part + (2 * log_ratio).expm1() - 2 * log_ratio).sum(-1)


class Critics(nn.Module):
    """The twin Q(s, a): (batch, 2)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.q1, self.q2 = (mlp(obs_dim + act_dim, *hidden, 1) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.cat([self.q1(x), self.q2(x)], -1)


def init_sac(actor: Actor, critics: Critics, beta: float) -> dict[str, dict[str, Tensor]]:
    """All that an update changes, in place: {"actor": {name: parameter, in the module's own
    memory}, "critics": the same, "beta": {"log": log β}}, Adam's moments, target networks."""
    sac = {"actor": dict(actor.state_dict()), "critics": dict(critics.state_dict())}  # detached
    sac["beta"] = {"log": torch.tensor(math.log(beta), device=actor.net[0].weight.device)}
    for net in list(sac):  # Adam's moments
        for moment in ("mean", "square"):
            sac[f"{net}_{moment}"] = {key: torch.zeros_like(p) for key, p in sac[net].items()}
    sac["targets"] = {key: p.clone() for key, p in sac["critics"].items()}
    sac["updates"] = {"count": torch.zeros_like(sac["beta"]["log"])}
    return sac


def adam_(sac: dict, net: str, gradients: dict[str, Tensor], learning_rate: Tensor) -> None:
    """A step of Adam (Kingma and Ba 2015) in place; torch.optim would break the compiled graph."""
    updates = sac["updates"]["count"]
    for key, gradient in gradients.items():
        mean, square = sac[f"{net}_mean"][key], sac[f"{net}_square"][key]
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient * gradient, 0.001)
        scale = (square / (1 - 0.999**updates)).sqrt() + 1e-8
        sac[net][key].sub_(learning_rate * mean / (1 - 0.9**updates) / scale)


def make_sac_update(actor, critics, gamma: float, tau: float, target_entropy, warm_up: int):
    """The SAC update (Haarnoja et al. 2018), fit to be compiled, with the penalty β KL(π ‖ π⁰) of
    (4). π⁰ is the clone; with a target_entropy, which tunes β, π⁰ is uniform: SAC's own bonus."""

    def update(sac, learning_rate, obs, action, rewards, next_obs, terminated, noise) -> Tensor:
        """A step on a batch; noise (2, batch, act_dim). Returns LOSSES, (6,)."""
        sac["updates"]["count"].add_(1)
        beta = sac["beta"]["log"].exp()  # no graph: all of sac is detached
        policy_rate = learning_rate * (sac["updates"]["count"] > warm_up)  # 0: critics alone learn

        def sample(params, obs, noise) -> tuple[Tensor, Tensor, Tensor]:
            """Actions, their log π and KL(π ‖ π⁰), of the policy with these parameters."""
            action, log_prob = functional_call(actor, params, (obs, noise))
            kl = log_prob if target_entropy else kl_divergence(actor, params, sac["cloned"], obs)
            return action, log_prob, kl  # π⁰ uniform: log π, whose mean is KL but for a constant

        # Q networks: the soft Bellman backup goes on past a truncation, not past a termination.
        next_action, _, next_kl = sample(sac["actor"], next_obs, noise[0])
        next_q = functional_call(critics, sac["targets"], (next_obs, next_action)).amin(-1)
        backup = rewards + gamma * (1 - terminated) * (next_q - beta * next_kl)

        def critic_loss(params):
            q = functional_call(critics, params, (obs, action))
            return ((q - backup[:, None]) ** 2).mean(0).sum(), q.mean()

        gradients, (q_loss, mean_q) = grad_and_value(critic_loss, has_aux=True)(sac["critics"])
        adam_(sac, "critics", gradients, learning_rate)

        # Policy: maximise Q - β · KL.
        def actor_loss(params):
            new_action, log_prob, kl = sample(params, obs, noise[1])
            q = functional_call(critics, sac["critics"], (obs, new_action)).amin(-1)
            return (beta * kl - q).mean(), (-log_prob.mean(), kl.mean())

        gradients, (pi_loss, (entropy, kl)) = grad_and_value(actor_loss, has_aux=True)(sac["actor"])
        adam_(sac, "actor", gradients, policy_rate)

        if target_entropy is not None:
            adam_(sac, "beta", {"log": entropy - target_entropy}, policy_rate)
        for key, target in sac["targets"].items():
            target.lerp_(sac["critics"][key], tau)
        return torch.stack([q_loss, pi_loss, entropy, mean_q, beta, kl])

    return update


def compile_update(update, sac: dict, obs_dim: int, act_dim: int, n: int):
    """The update compiled for batches of n, without guards, as shapes never change, with a C++
    wrapper on CPUs; as it is, after a printed line, if a trial run on copies fails."""
    shapes = [(), (n, obs_dim), (n, act_dim), (n,), (n, obs_dim), (n,), (2, n, act_dim)]
    inputs = [torch.zeros(shape, device=sac["beta"]["log"].device) for shape in shapes]
    options = {"cpp_wrapper": inputs[0].is_cpu, "guard_filter_fn": lambda g: [False] * len(g)}
    torch._dynamo.reset()  # without guards the code of an earlier update would do for this one
    compiled = torch.compile(update, fullgraph=True, dynamic=False, options=options)
    print("compiling the SAC update: a minute the first time", flush=True)
    try:
        compiled(tree_map(Tensor.clone, sac), *inputs)
    except Exception as error:  # whatever the compiler lacks, eager mode does not need it
        print(f"torch.compile failed ({read.one_line(error)[:80]}): eager. No C++ compiler?")
        return update
    return compiled


# --------------------------------------------------------------------------- play and evaluate
def make_env(name: str) -> gym.Env:
    """A robot, actions in [-1, 1], observations copied, as it may overwrite them; or ValueError."""
    gym.logger.min_level = gym.logger.ERROR  # it warns of v4 at every make
    env = gym.wrappers.TransformObservation(gym.make(name, disable_env_checker=True), np.copy, None)
    spaces = env.observation_space, env.action_space
    vectors = all(len(space.shape or ()) == 1 and space.dtype.kind == "f" for space in spaces)
    if not (vectors and env.action_space.is_bounded() and env.spec.max_episode_steps):
        raise ValueError(f"{name} needs a time limit, vectors, bounded actions: {spaces}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def play(env: gym.Env, actor: Actor, seeds, steps=math.inf, rng=None) -> tuple[Tensor, ...]:
    """An episode for each seed until N ≥ steps; deterministic without an rng. Observations (N,
    obs_dim), actions (N, act_dim), lengths (episodes,), and true rewards (N,) for evaluate."""
    observations, actions, lengths, true_rewards = [], [], [], []
    while len(actions) < steps and len(lengths) < len(seeds):
        obs, _ = env.reset(seed=int(seeds[len(lengths)]))
        first, done = len(actions), False
        while not done:
            noise = rng.standard_normal(env.action_space.shape, np.float32) if rng else 0.0
            observations.append(obs)
            actions.append(actor.act(obs, noise))
            obs, true_reward, terminated, truncated, _ = env.step(actions[-1])
            true_rewards.append(true_reward)
            done = terminated or truncated
        lengths.append(len(actions) - first)
    observations, actions = np.array(observations, np.float32), np.array(actions)
    return tuple(map(torch.as_tensor, (observations, actions, lengths, true_rewards)))


@torch.no_grad()
def evaluate(env: gym.Env, actor: Actor, episodes: int, reward: Reward) -> dict[str, float]:
    """The only user of the true reward: episodes of fixed seeds, no noise; correlation with r."""
    obs, actions, lengths, true_rewards = play(env, actor, range(10_000, 10_000 + episodes))
    returns = torch.stack([part.double().sum() for part in true_rewards.split(lengths.tolist())])
    learned_rewards = reward(reward.features(obs, actions)).cpu()
    correlation = torch.corrcoef(torch.stack([learned_rewards, true_rewards]))[0, 1]
    row = {"return_mean": returns.mean(), "return_std": returns.std(correction=0)}
    row |= {"length_mean": lengths.double().mean(), "reward_correlation": correlation}
    return {f"eval/{name}": value.item() for name, value in row.items()}


# ================================================================================ LANGUAGE MODELS
@dataclass
class LlmArgs:
    """language models: SFT, reward model, PPO"""

    preset: Literal["", "imdb", "hh"] = ""  # the paper's models, Table 2; flags beside it win
    model_name_or_path: str = f"{ASSETS}/model"  # the base policy, a folder or hub id
    sft_model_path: str = ""  # the policy that stage 3 begins with and stays near: no stage 1
    reward_model_path: str = ""  # base of the reward; "": the base policy. Trained head: no stage 2
    ground_truth_path: str = f"{ASSETS}/classifier"  # sequence classifier, to evaluate; "": none
    demonstrations: str = f"{ASSETS}/demonstrations.jsonl"  # {prompt, completion}, file or hub id
    preferences: str = f"{ASSETS}/preferences.jsonl"  # {prompt, chosen, rejected}
    num_demonstrations: int = 1000  # the first rows; 0 for all
    num_preferences: int = 1000  # the first rows; 0 for all
    prompts: str = f"{ASSETS}/prompts.jsonl"  # {prompt}; the last --eval-prompts are for evaluation
    seed: int = 1  # of heads, held-out data, batches, sampling; evaluation has a seed of its own
    held_out_share: float = 0.1  # of demonstrations, of preferences: on them the best is chosen
    max_prompt_length: int = 64  # tokens; of a longer prompt the policy reads the last ones
    response_length: int = 24  # tokens at most; longer demonstrations are cut, preferences not
    temperature: float = 1.0  # of sampling; logits are divided by it in every log-probability
    append_eos: bool = False  # end token after demonstrations with room for it, if not spelled out
    micro_batch_size: int = 64  # rows in a forward pass (R: twice that); sampling is not split
    anneal: bool = True  # let the learning rate of each stage fall linearly to 0 (paper: no)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    # 1. Supervised fine-tuning
    sft_epochs: float = 3.0  # passes over the demonstrations
    sft_batch_size: int = 32  # demonstrations in each step
    sft_learning_rate: float = 1e-4  # Adam's, for SFT

    # 2. The reward model
    reward_epochs: float = 2.0  # passes over the preferences
    reward_batch_size: int = 32  # pairs in each step (paper: 128)
    reward_learning_rate: float = 1e-3  # Adam's (paper: 1e-5, for GPT-2)

    # 3. PPO
    ppo_steps: int = 60  # batches of responses in all
    batch_size: int = 64  # responses in each (paper: 256)
    minibatch_size: int = 32  # responses in an optimiser step
    ppo_epochs: int = 2  # passes over each batch
    learning_rate: float = 1e-4  # Adam's, for the policy (paper: 1.41e-5, for GPT-2)
    value_learning_rate: float = 3e-4  # Adam's, for the critic
    gae_lambda: float = 0.95  # of generalised advantage estimation; the discount is 1
    clip: float = 0.2  # probability ratios are clipped to 1 ± this
    kl_coefficient: float = 0.05  # β of (4)

    # Running
    eval_prompts: int = 256  # held-out prompts
    eval_every: int = 5  # PPO steps between evaluations
    checkpoint_every: int = 10  # PPO steps between checkpoints; stages 1 and 2: some ten times
    runs_dir: str = "runs"  # where run folders go
    run_name: str = ""  # the run's folder; "": from script, seed and time
    resume: str = ""  # a run folder to carry on with its arguments; most flags beside it win
    evaluate: str = ""  # a run folder whose policy to evaluate instead of training; beats --resume
    cuda: bool = True  # use GPUs when there are any
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights are float32
    gradient_checkpointing: bool = False  # activations are computed anew in backward: less memory
    threads: int = 2  # CPU threads of each process
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY ...)


PRESETS = {  # the paper's models and Table 2, else our guess; the user's own flags win
    "imdb": """--model-name-or-path gpt2 --ground-truth-path lvwerra/distilbert-imdb
        --num-demonstrations 0 --num-preferences 0 --sft-learning-rate 1e-5 --ppo-steps 1000
        --reward-learning-rate 1e-5 --reward-batch-size 128 --learning-rate 1.41e-5 --ppo-epochs 4
        --value-learning-rate 1.41e-5 --batch-size 256 --minibatch-size 64""",
    # no ground truth: beaver-7b-v3.0-reward needs remote code, which is never run
    "hh": """--model-name-or-path EleutherAI/pythia-160m --reward-model-path EleutherAI/pythia-1.4b
        --ground-truth-path= --demonstrations runs/hh_data/demonstrations.jsonl
        --preferences runs/hh_data/preferences.jsonl --prompts runs/hh_data/prompts.jsonl
        --num-demonstrations 0 --num-preferences 0 --max-prompt-length 512 --response-length 128
        --dtype bfloat16 --append-eos --sft-epochs 1 --sft-learning-rate 1e-5
        --reward-epochs 1 --reward-learning-rate 1e-5 --reward-batch-size 8
        --learning-rate 1e-6 --value-learning-rate 1e-6 --batch-size 4 --minibatch-size 4
        --micro-batch-size 4 --ppo-steps 24000 --eval-every 500 --checkpoint-every 500""",
}


# ------------------------------------------------------------------- the stages, in equations
def sft_losses(policy, demos: list[tuple[list[int], list[int]]]) -> Tensor:
    """-log π(y|x) of token ids x and y: (rows, 1)."""
    prompts, completions = zip(*demos)
    x, y = read.pad(prompts, left=True), read.pad(completions)
    ids, mask = (torch.cat(z, 1).to(policy.lm.device) for z in zip(x, y))
    return -policy.log_probs(ids, mask, mask[:, -y[0].shape[1] :]).sum(-1, keepdim=True)


def preference_losses(reward, pairs: list[tuple[str, str, str]]) -> Tensor:
    """-log σ(R(τ_w) - R(τ_l)) of (11), and what else is logged of held-out pairs: (rows, 4)."""
    texts = [pair[0] + pair[side] for side in (1, 2) for pair in pairs]
    chosen, rejected = reward.score(texts).chunk(2)
    return torch.stack([-F.logsigmoid(chosen - rejected), chosen, rejected, chosen > rejected], 1)


def token_rewards(log_ratio: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(4) token by token, (rows, N): -β log(π/π⁰) at each, plus the score at the last (Ziegler et
    al. 2019); log_ratio and mask (rows, N), scores (rows,)."""
    last = (mask.cumsum(-1) == mask.sum(-1, keepdim=True)) * mask  # 1 at the last token
    return -beta * log_ratio * mask + scores[:, None] * last


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, lam: float):
    """Advantages and returns, (rows, N) each (Schulman et al. 2016, their (16), γ = 1), of rewards,
    values and mask (rows, N). values[:, t] is V before token t; after the end it counts as 0."""
    values = values * mask
    delta = (rewards + F.pad(values[:, 1:], (0, 1)) - values) * mask
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, N) with mean 0 and variance 1 where mask is 1, over all processes; 0 elsewhere."""
    count = total(mask.sum())
    x = (x - total((x * mask).sum()) / count) * mask
    return x * torch.rsqrt(total((x**2).sum()) / count + 1e-8)


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float):
    """PPO's loss of each token and π/π_old, (rows, N) each (Schulman et al. 2017, their (7))."""
    ratio = (log_probs - old_log_probs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


# ----------------------------------------------------------------------------- the three stages
def llm(args: LlmArgs, state: dict) -> None:
    """All three stages, or what is left of them after the checkpoint `state`."""
    with read.input_errors():  # around set-up: what is wrong with the input is said in one line
        read.check_numbers(args, "seed num_demonstrations num_preferences kl_coefficient")
        if args.gae_lambda > 1 or args.batch_size % args.minibatch_size:
            raise ValueError("--gae-lambda is at most 1, --minibatch-size divides --batch-size")
        device, processes = start_processes(args)  # share, gather, total: rows among processes

        # What is learned, a copy of what did best in stages 1 and 2, and what is not learned
        initial = args.sft_model_path or args.model_name_or_path
        policy, base = Policy(initial, args), Policy(args.model_name_or_path, args)
        if base.vocabulary != policy.vocabulary:
            raise ValueError("--model-name-or-path and --sft-model-path differ in vocabulary")
        reference = copy.deepcopy(policy)  # the best of stage 1, from then on π_SFT
        torch.manual_seed(args.seed)  # of new heads
        reward = Scorer(args.reward_model_path or args.model_name_or_path, args)
        best_reward = copy.deepcopy(reward)
        critic_from_reward = reward.is_decoder and reward.vocabulary == policy.vocabulary
        critic_from_reward &= reward.limit >= args.max_prompt_length + args.response_length
        value = best_reward if critic_from_reward else Scorer(initial, args)  # V: free by stage 3
        if not value.is_decoder:
            raise ValueError(f"{initial} has no linear head for every token: it is no critic")
        judge = Scorer(args.ground_truth_path, args, True) if args.ground_truth_path else None

        # The data: demonstrations (a new R is centred on them too), preferences for it, prompts
        demos, pairs, demo_prompt_ids, completions = [], [], [], []
        if not (args.sft_model_path and reward.has_head):
            demos = read.rows(args.demonstrations, "prompt completion", args.num_demonstrations)
            demo_prompt_ids = policy.texts.prompts([x for x, _ in demos], args.demonstrations)
            completions = policy.texts.responses(demos, args.demonstrations, args.append_eos)
        if not reward.has_head:
            pairs = read.rows(args.preferences, "prompt chosen rejected", args.num_preferences)
            pairs = policy.texts.pairs(pairs, args.preferences)
        prompts = [prompt for (prompt,) in read.rows(args.prompts, "prompt")]
        prompt_ids, n = policy.texts.prompts(prompts, args.prompts), args.eval_prompts
        if len(prompts) <= n:
            raise ValueError(f"{args.prompts} has too few rows for --eval-prompts {n}")
        rows = demo_prompt_ids, completions, pairs, prompts, [n]
        data_hash = read.fingerprint(*rows, *base.state_dict().values())
        if state and state["data_hash"] != data_hash:
            raise ValueError("the run had other data, lengths, model or --eval-prompts")
        rng = np.random.default_rng([args.seed, 0])
        splits = [hold_out(len(rows), args.held_out_share, rng) for rows in (demos, pairs) if rows]

        modules = {"policy": policy, "reference": reference, "best_reward": best_reward}
        modules |= {"reward": reward} | ({} if critic_from_reward else {"value": value})
        for name in modules if state else ():
            modules[name].load_state_dict(state[name])
        for module in (*modules.values(), base):
            shard(module.to(device), device)
        learned = {"sft": policy, "rewards": reward, "policy": policy, "value": value}
        optimizers = {x: torch.optim.Adam(m.parameters(), fused=True) for x, m in learned.items()}
        for name in optimizers if state and not args.evaluate else ():
            load_optimizer(optimizers[name], state[f"{name}_optimizer"])
        log = state.get("log", [])  # rows of metrics.csv
        stage, first_step = (log[-1][f"charts/{x}"] for x in ("stage", "step")) if log else (1, 0)
        read.check_steps(first_step if stage == 3 else 0, args, "ppo_steps")
        state.clear()  # memory and disk of the former checkpoint
        run_dir, track = read.open_run(args, f"{SCRIPT} llm")

    models = policy, reference, base, reward, (judge.to(device) if judge else None)
    evaluation = partial(evaluate_responses, models, (prompts[-n:], prompt_ids[-n:]), args, run_dir)
    if args.evaluate:
        return evaluation(log[-1]["charts/step"])
    started = time.perf_counter() - (log[-1]["charts/wall_seconds"] if log else 0)

    def record(step: int, row: dict, save: bool = True) -> None:
        """A row of metrics.csv, and a checkpoint."""
        counts = {"charts/stage": stage, "charts/step": step}
        log.append(counts | {"charts/wall_seconds": time.perf_counter() - started} | row)
        track(log[-1], step=len(log) - 1)
        if save:
            state = {"script": f"{SCRIPT} llm", "args": asdict(args), "data_hash": data_hash}
            parts = modules | {f"{name}_optimizer": x for name, x in optimizers.items()}
            read.write_checkpoint(run_dir, state | {"log": log}, parts, whole)

    def learn(name, module, best, losses, rows, lengths, split, size, epochs, learning_rate):
        """Adam on summed losses of batches over their summed lengths. Some ten times best gets the
        parameters, if their loss on the rows held out is the lowest so far; module ends as best."""
        (train, held_out), optimizer = (part.tolist() for part in split), optimizers[name]
        steps, train_losses = math.ceil(epochs * len(train) / size), []
        for step in tqdm(range(first_step, steps), f"{stage}. {name}", disable=not read.writes()):
            share_left = 1 - step / steps if args.anneal else 1.0
            batch = [train[i] for i in read.draw(len(train), size, step, (args.seed, stage))]
            drawn, length, loss = [rows[i] for i in share(batch)], sum(lengths[i] for i in batch), 0
            for part in read.parts(0, len(drawn), args.micro_batch_size):
                its_loss = losses(module, drawn[part])[:, 0].sum() / length
                its_loss.backward()
                loss += its_loss.detach()
            descend(optimizer, learning_rate * share_left, args, step, run_dir, loss)
            train_losses.append(total(loss).item())
            if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
                columns = in_parts(partial(losses, module), args, [rows[i] for i in held_out])
                sums = gather(columns.sum(0)[None])[0]  # process 0's, lest they keep different ones
                means = (sums / sum(lengths[i] for i in held_out)).tolist()
                before = [row[f"{name}/held_out_loss"] for row in log if f"{name}/loss" in row]
                if means[0] < min(before, default=math.inf):
                    best.load_state_dict(module.state_dict())
                keys = ("loss", "chosen", "rejected", "accuracies")  # stage 1 has the loss alone
                row = {f"{name}/held_out_{key}": mean for key, mean in zip(keys, means)}
                record(step + 1, row | {f"{name}/loss": np.mean(train_losses).item()})
                train_losses = []
        module.load_state_dict(best.state_dict())
        optimizer.state.clear()  # of no more use

    # ======================== 1. SFT: π_SFT = argmax_π Σ log π(y|x) over demonstrations (x, y) ~ D
    if stage == 1:
        if not args.sft_model_path:
            data = list(zip(demo_prompt_ids, completions)), list(map(len, completions)), splits[0]
            schedule = args.sft_batch_size, args.sft_epochs, args.sft_learning_rate
            learn("sft", policy, reference, sft_losses, *data, *schedule)
            save_model(policy.lm, policy.tokenizer, run_dir / "sft")
        stage, first_step = 2, 0

    # ================ 2. REWARD MODEL: θ = argmax_θ L2(θ), (11), over preferences (τ_l ≺ τ_w) ~ P
    if stage == 2:
        if not reward.has_head:
            data = pairs, [1] * len(pairs), splits[1]
            schedule = args.reward_batch_size, args.reward_epochs, args.reward_learning_rate
            learn("rewards", reward, best_reward, preference_losses, *data, *schedule)
            save_model(reward.model, reward.tokenizer, run_dir / "reward")
        stage, first_step = 3, 0

        if demos:  # R is free up to a constant: let demonstrations, cut, be worth 0 on average
            cut = zip(demos, policy.texts.decode(demo_prompt_ids, completions))
            reward.offset += in_parts(reward.score, args, [x + y for (x, _), y in cut]).mean()
        if critic_from_reward:
            value.load_state_dict(reward.state_dict())  # the critic begins as the reward
        record(0, evaluation(0), save=False)

    # ==================== 3. RL: π = argmax_π E[R] - β KL(π ‖ π_SFT), (4) with θ frozen, by PPO
    for step in tqdm(range(first_step, args.ppo_steps), "3. PPO", disable=not read.writes()):
        share_left = 1 - step / args.ppo_steps if args.anneal else 1.0

        # =========================================================================== SAMPLE: y ~ π
        indices = read.draw(len(prompts) - n, args.batch_size, step, (args.seed, 3))
        rng = np.random.default_rng([args.seed, 4, step])
        ids, mask, alive, ended, responses = policy.sample([prompt_ids[i] for i in indices], rng)
        texts = [prompts[i] + response for i, response in zip(indices, responses)]
        length, scores = alive.shape[1], in_parts(reward.score, args, share(texts))
        old_log_probs = in_parts(policy.log_probs, args, ids, mask, alive)
        log_ratio = old_log_probs - in_parts(reference.log_probs, args, ids, mask, alive)
        rewards = token_rewards(log_ratio, scores, alive, args.kl_coefficient)
        values = in_parts(value, args, ids, mask)[:, -length - 1 : -1]  # V before each token
        advantages, returns = generalised_advantages(rewards, values, alive, args.gae_lambda)
        advantages = whiten(advantages, alive)

        # ========================================= UPDATE: the clipped objective and V, by Adam
        statistics = []  # of each minibatch: policy and value loss, approximate KL, share clipped
        for batch in read.parts(0, len(ids), args.minibatch_size // processes) * args.ppo_epochs:
            token_weights = alive / total(alive[batch].sum())  # a mean over all its tokens
            sums = torch.zeros(4, device=device)
            for part in read.parts(batch.start, batch.stop, args.micro_batch_size):
                log_probs = policy.log_probs(ids[part], mask[part], alive[part])
                old, advantage = old_log_probs[part], advantages[part]
                losses, ratio = policy_losses(log_probs, old, advantage, args.clip)
                (losses * token_weights[part]).sum().backward()
                values = value(ids[part], mask[part])[:, -length - 1 : -1]
                errors = 0.5 * (values - returns[part]) ** 2
                (errors * token_weights[part]).sum().backward()
                columns = losses, errors, (log_probs - old) ** 2 / 2, (ratio - 1).abs() > args.clip
                sums += torch.stack([(x * token_weights[part]).sum().detach() for x in columns])
            statistics.append(total(sums))
            for name, rate in (("policy", args.learning_rate), ("value", args.value_learning_rate)):
                descend(optimizers[name], rate * share_left, args, step, run_dir, sums)

        # ========================================================= LOG, EVALUATE and CHECKPOINT
        names = ("losses/policy", "losses/value", "losses/approx_kl", "losses/clip_fraction")
        row = dict(zip(names, torch.stack(statistics).mean(0).tolist()))
        columns = {"objective/kl": log_ratio.sum(-1), "objective/scores": scores}
        columns |= {"objective/entropy": -old_log_probs.sum(-1), "charts/ended_share": ended}
        row |= {name: gather(column).mean().item() for name, column in columns.items()}
        finished = step + 1 == args.ppo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= evaluation(step + 1)
        record(step + 1, row, save=(step + 1) % args.checkpoint_every == 0 or finished)
    save_model(policy.lm, policy.tokenizer, run_dir / "policy")  # if a run is killed here: --resume
    if read.writes():
        print(f"final: {read.summary(log[-1])}; python benchmark/plot.py {run_dir} draws it")
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------- models
# Every pass of a model goes through its forward, which FSDP2 watches. Dropout is off: models stay
# in evaluation mode, as from_pretrained returns them.
def load(kind: str, name: str, args: LlmArgs, **new_head):
    """The float32 model that AutoModelFor<kind> gives, and its tokenizer; no remote code is run.
    ValueError if weights other than a new head's are missing, or tokens have no embedding."""
    auto, no_code = getattr(transformers, f"AutoModelFor{kind}"), {"trust_remote_code": False}
    model, info = auto.from_pretrained(name, output_loading_info=True, **no_code, **new_head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **no_code)
    body = model.base_model_prefix
    if missing := [key for key in info["missing_keys"] if not new_head or key.startswith(body)]:
        raise ValueError(f"the model {name} lacks {', '.join(missing)[:100]}")
    size = model.get_input_embeddings().num_embeddings  # Gemma has unused special tokens beyond
    used = [i for i, x in tokenizer.added_tokens_decoder.items() if not x.special]
    used += sum(read.special_tokens(tokenizer), [tokenizer.eos_token_id or 0])
    if max(tokenizer.vocab_size - 1, *used) >= size:
        raise ValueError(f"the tokenizer of {name} has more tokens than its model")
    if args.dtype == "bfloat16" and not (args.cuda and torch.cuda.is_available()):
        model.set_attn_implementation("eager")  # fused attention is slow on a CPU
    for block in blocks(model) if args.gradient_checkpointing else ():
        options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        block.forward = partial(checkpoint, block.forward, **options)
    return model.float(), tokenizer


def blocks(module: nn.Module) -> nn.ModuleList:
    """A transformer's layers: its longest list of modules."""
    return max((x for x in module.modules() if isinstance(x, nn.ModuleList)), key=len)


class Policy(nn.Module):
    """π: a causal language model and, in texts, its tokenizer."""

    def __init__(self, name: str, args: LlmArgs):
        super().__init__()
        self.lm, self.tokenizer = load("CausalLM", name, args)
        self.texts = read.Texts(self.tokenizer, args.max_prompt_length, args.response_length)
        self.args, self.vocabulary = args, self.tokenizer.get_vocab()
        limit = getattr(self.lm.config, "max_position_embeddings", None) or 10**6
        if args.max_prompt_length + args.response_length > limit:
            raise ValueError(f"{name} reads {limit} tokens: too few for prompt and response")
        encoder = "MaskedLM" in str(self.lm.config.architectures)  # it sees what it is to predict
        if encoder or getattr(self.lm, "_is_stateful", False):  # Mamba: not with padding
            raise ValueError(f"{name} is an encoder or recurrent, no policy for rows of any length")

    def forward(self, ids: Tensor, mask: Tensor, length: int, cache: dict | None = None):
        """Float32 logits (rows, length or more, vocabulary) of the last positions of ids (rows,
        tokens), and the next call's cache ({} at first); the mask covers what is cached too."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0 at the first token, after the padding
        inputs = {"input_ids": ids, "position_ids": positions[:, -ids.shape[1] :]}
        inputs |= {"use_cache": cache is not None, "logits_to_keep": length, **(cache or {})}
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            out = self.lm(attention_mask=mask, **inputs)
        name = "cache" if "cache" in out else "past_key_values"  # in older transformers
        return out.logits.float(), {name: out.get(name)}

    def log_probs(self, ids: Tensor, mask: Tensor, alive: Tensor) -> Tensor:
        """log π(y_t | x, y_<t), float32 (rows, N), 0 after the end; ids and mask (rows, P + N) hold
        prompts padded on the left and responses padded on the right, alive the responses' mask."""
        length = alive.shape[1]
        logits, _ = self(ids, mask, length + 1)
        log_probs = (logits[:, -length - 1 : -1] / self.args.temperature).log_softmax(-1)
        return log_probs.gather(-1, ids[:, -length:, None]).squeeze(-1) * alive

    def sample(self, prompts: list[list[int]], rng: np.random.Generator):
        """Of this process's rows: ids and mask (rows, P + N) of prompt and response, the responses'
        mask (rows, N), end token included, and whether it came (rows,). Of all rows: the responses'
        texts. Each row takes response_length numbers of the rng, however early it ends, and picks a
        token by inverse CDF with each: its text depends on no other row. Processes end together."""
        uniform = torch.from_numpy(share(rng.random((len(prompts), self.args.response_length))))
        ids, mask = (x.to(self.lm.device) for x in read.pad(share(prompts), left=True))
        token, cache, width = ids, {}, ids.shape[1]
        ended = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        alone = not dist.is_initialized()  # then weights are cast to bfloat16 once, not per token
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False, cache_enabled=alone):
            for u in uniform.to(ids.device).unbind(1):
                logits, cache = self(token, mask, 1, cache)
                cumulative = (logits[:, -1] / self.args.temperature).softmax(-1).double().cumsum(-1)
                token = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
                token = token.clamp(max=logits.shape[-1] - 1).masked_fill(ended, 0)
                ids, mask = torch.cat([ids, token], 1), torch.cat([mask, (~ended).long()], 1)
                ended = ended | (token == self.texts.eos_id)
                if total((~ended).sum()) == 0:
                    break
        responses, alive = ids[:, width:], mask[:, width:]
        rows = zip(gather(responses).tolist(), gather(alive.sum(-1)).tolist())
        texts = self.texts.decode(prompts, [row[:length] for row, length in rows])
        return ids, mask, alive, ended.squeeze(1).float(), texts


class Scorer(nn.Module):
    """R, V and the judge: a sequence classifier that gives one number at every token (of two
    outputs their difference). R(τ) is that at a text's last token, V(s) that at the last of s."""

    def __init__(self, name: str, args: LlmArgs, trained: bool = False):
        """A new head if there is none; ValueError if `trained` and none, or over two outputs."""
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        self.has_head = "SequenceClassification" in str(config.architectures)
        new_head = {} if self.has_head else {"num_labels": 1}
        self.model, self.tokenizer = load("SequenceClassification", name, args, **new_head)
        if trained and not self.has_head or self.model.config.num_labels > 2:
            raise ValueError(f"{name} has no trained head of one or two outputs: no reward model")
        self.vocabulary = self.tokenizer.get_vocab()
        self.prefix, self.suffix = read.special_tokens(self.tokenizer)
        self.is_decoder = hasattr(self.model, "score")  # a linear head, as GPT-2 and Llama have
        self.args = replace(args, dtype="float32") if trained or not self.is_decoder else args
        embeddings = getattr(self.model.base_model, "embeddings", None)
        unused = getattr(embeddings, "padding_idx", -1) + 1  # RoBERTa's positions begin after it
        limit = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        limit = min(limit - unused, self.tokenizer.model_max_length)
        self.limit = limit - len(self.prefix) - len(self.suffix)
        self.register_buffer("offset", torch.zeros(()))  # subtracted from every score

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (rows, tokens), float32, of ids and mask (rows, tokens)."""
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            if self.is_decoder:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                hidden = self.model.base_model(**inputs, use_cache=False)[0]
            else:  # BERT and its like read the whole text at once
                ids = ids.masked_fill(mask == 0, self.model.config.pad_token_id or 0)
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                logits = logits[:, None].expand(-1, ids.shape[1], -1)
        if self.is_decoder:  # outside autocast: bfloat16 would round R
            logits = self.model.score(hidden.float())
        first = logits[..., 0] if logits.shape[-1] == 2 else 0.0  # two outputs: log-odds
        return logits[..., -1] - first - self.offset

    def score(self, texts: list[str]) -> Tensor:
        """R of texts: (texts,); of a text that is too long the end is read."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [read.without_prefix(row, self.prefix)[-self.limit :] for row in rows]
        rows = [self.prefix + row + self.suffix or [0] for row in rows]
        ids, mask = (x.to(self.offset.device) for x in read.pad(rows))
        return self(ids, mask).gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


@torch.no_grad()
def in_parts(function, args: LlmArgs, *rows) -> Tensor:
    """function(*rows) without gradients, of micro_batch_size rows at a time."""
    parts = read.parts(0, len(rows[0]), args.micro_batch_size)
    return torch.cat([function(*(x[part] for x in rows)) for part in parts])


def descend(optimizer, learning_rate: float, args: LlmArgs, step: int, run_dir: Path, loss: Tensor):
    """A step along gradients clipped to max_grad_norm; the run stops where they are not finite."""
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    read.check_finite(step, run_dir, loss=loss, gradient=norm)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------- several processes (torchrun), or one
# Process i of n holds rows i, i + n ... of a batch and shards of all models but the judge (FSDP2).
# Gradients are summed: losses are divided by the whole batch. All do equally many forward passes.
def start_processes(args: LlmArgs) -> tuple[torch.device, int]:
    """Joins torchrun's processes, fills in args.run_name; the device, the number of processes."""
    transformers.logging.set_verbosity_error()  # else it warns of new heads
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_autocast_cache_enabled(False)  # it would hold all weights in bfloat16 at once
    torch.backends.cuda.enable_cudnn_sdp(False)  # its bfloat16 gradients can be nan
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # this process's "cuda"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))  # others wait while one saves
    began = gather(torch.tensor([time.time_ns()], device=device))[0]  # the same in every process
    args.run_name = args.run_name or f"llm__{SCRIPT[:-3]}__{args.seed}__{began}"
    batches = args.sft_batch_size, args.reward_batch_size, args.minibatch_size
    if any(size % count for size in (*batches, args.eval_prompts)):
        raise ValueError(f"batches and --eval-prompts must be multiples of {count} processes")
    return device, count


def share(rows):
    """This process's rows of a list, array or tensor."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def gather(x: Tensor) -> Tensor:
    """The inverse of share, for a tensor (rows, ...) of the same shape in every process."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def total(x: Tensor) -> Tensor:
    """The sum over processes."""
    return gather(x[None]).sum(0)


def shard(module: nn.Module, device: torch.device) -> None:
    """Share out the parameters, block by block; each is gathered whole where it is used."""
    if dist.is_initialized():
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*blocks(module), module):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)


def whole(state):
    """A state with its shards put together: on the CPU of process 0, which writes them, and without
    memory or numbers (meta) in the others."""
    where = "cpu" if read.writes() else "meta"
    return tree_map_only(DTensor, lambda x: x.full_tensor().to(where), state)


def load_optimizer(optimizer, state: dict) -> None:
    """Load a whole state into the optimiser of parameters that may be shared out."""
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if isinstance(parameter, DTensor) and i in state["state"]:
            moments, where = state["state"][i], (parameter.device_mesh, parameter.placements)
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = distribute_tensor(moments[name], *where)
    optimizer.load_state_dict(state)


# ------------------------------------------------------------------------------ evaluate and save
def evaluate_responses(models, held_out, args: LlmArgs, run_dir: Path, step: int) -> dict:
    """Means over held-out prompts, printed with samples: the only reader of the ground truth."""
    (policy, reference, base, reward, judge), (prompts, prompt_ids) = models, held_out
    ids, mask, alive, _, responses = policy.sample(prompt_ids, np.random.default_rng(10_000))
    log_probs = in_parts(policy.log_probs, args, ids, mask, alive)
    others = (in_parts(x.log_probs, args, ids, mask, alive) for x in (reference, base))
    kl, kl_base = ((log_probs - other).sum(-1) for other in others)
    scores = {"kl": kl, "kl_base": kl_base, "response_length": alive.sum(-1).float()}
    texts = share([x + y for x, y in zip(prompts, responses)])
    scores["learned_score"] = in_parts(reward.score, args, texts)
    scores = {name: gather(x).cpu() for name, x in scores.items()}
    row = {f"eval/{name}": x.mean().item() for name, x in scores.items()}
    if judge:
        scores["gt_score"] = truth = gather(in_parts(judge.score, args, texts)).cpu()
        row["eval/gt_score"] = truth.mean().item()
        row["eval/gt_score_std"] = truth.std(correction=0).item()
        ranks = torch.stack([scores["learned_score"], truth]).argsort().argsort().double()
        row["eval/reward_correlation"] = torch.corrcoef(ranks)[0, 1].item()  # Spearman's
    path = None if args.evaluate else run_dir / ("samples.jsonl" if step else "samples_sft.jsonl")
    read.write_samples(path, f"after {step} steps: {read.summary(row)}", prompts, responses, scores)
    return row


def save_model(model, tokenizer, folder: Path) -> None:
    save = partial(model.save_pretrained, state_dict=whole(model.state_dict()))
    read.write_whole(folder, lambda path: (save(path), tokenizer.save_pretrained(path)))


# ------------------------------------------------------------------------------- the command line
def main() -> None:
    """A given run's arguments or the defaults, a preset new to it, the flags: the last wins."""
    with read.input_errors():
        kinds = {"mujoco": MujocoArgs, "llm": LlmArgs}  # parsed twice: first for run and preset
        args = tyro.extras.subcommand_cli_from_dict(kinds, description=__doc__.split("\n\n")[0])
        kind, script = type(args), f"{SCRIPT} {sys.argv[1]}"
        state = read.checkpoint(args.evaluate or args.resume, script, go_on=not args.evaluate)
        given, preset = state.get("args", {}), getattr(args, "preset", "")
        preset = PRESETS[preset].split() if preset not in ("", given.get("preset")) else []
        args = tyro.cli(kind, default=kind(**given), args=preset + sys.argv[2:])
    (llm if kind is LlmArgs else mujoco)(args, state)


if __name__ == "__main__":
    main()
